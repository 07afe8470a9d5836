"""Shared by all tests: nothing is downloaded, and the real images are found through an environment variable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["FEATURECACHE_SECRET"] = "of the tests"  # none is made in the user's own configuration


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the Hugging Face hub, and no way to the hub."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own: to be filled up, or mounted read-only (permissions alone do not stop root)."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    made = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)])
    if not made or made.returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("FEATURECACHE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEATURECACHE_TEST_DATA names no folder with the real images")
    return Path(folder)
