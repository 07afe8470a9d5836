"""Shared by all tests: nothing is downloaded, and the real images are found through an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("FEATURECACHE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEATURECACHE_TEST_DATA names no folder with the real images")
    return Path(folder)
