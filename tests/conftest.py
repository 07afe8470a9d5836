"""Fixtures of all tests, and the tier of each test: nothing is downloaded, every process has a state of its own.

Unmarked tests take less than a second, start no process, load no transformers model and train no network.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.object_storage import Server, serve

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FEATURECACHE_SECRET"] = "of the tests"  # none is made in the user's own configuration

TIERS = ("integration", "slow")
INTEGRATION = {  # whole files: they load models, train or start processes; single tests elsewhere carry the mark
    "backbones": "certificate grey_networks remembered state_dicts timm_models torchvision_models transformers_generic "
    "transformers_models vision_towers weights",
    "commands": "cli",
    "extraction": "bits cache_miss canary cost digest_cache extraction forward incremental pipeline plan ray "
    "remote_extraction",
    "heads": "inference",
    "heads/evaluation": "comparison external",
    "heads/explanations": "explain explain_backbones",
    "heads/models": "adapters finetune",
    "heads/reports": "layout page",
    "heads/runs": "heads_runs run_faults run_flips",
    "heads/studies": "studies studies_run",
    "heads/sweeps": "search sweep sweep_folder sweep_views",
    "heads/training": "engine linear_layers networks train",
    "images": "copies",
    "maintenance": "copies repair",
    "robustness": "at_once faults flips fuzz real_images workers",
    "sources": "pseudonyms sources_commands",
    "store": "keys remote_cache remote_faults same_store",
}
ALONE = ("test_at_once.py", "test_faults.py", "test_flips.py")  # use two cores themselves: one process of pytest -n

platform.processor()  # h5py asks when it is imported, which starts a process once


def pytest_configure(config: pytest.Config) -> None:
    """Two threads compute, as at a user's; one in each process of pytest -n, which starts one for every core."""
    os.environ.setdefault("OMP_NUM_THREADS", "1" if getattr(config.option, "numprocesses", None) else "2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    files = {here / folder / f"test_{name}.py" for folder, names in INTEGRATION.items() for name in names.split()}
    for item in items:
        if item.path in files:
            item.add_marker("integration")
        if item.path.name in ALONE:
            item.add_marker(pytest.mark.xdist_group("faults"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Two of `ALONE` beside each other would take the cores from each other, and time out."""
    if hasattr(session.config, "workerinput"):
        apart = [item.nodeid for item in session.items if item.path.name in ALONE and "@" not in item.nodeid]
        assert not apart, f"this pytest-xdist does not keep groups together: {apart[0]}"


@pytest.fixture(autouse=True)
def _no_process_in_the_first_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(request.node.get_closest_marker, TIERS)):
        import torch  # noqa: F401  # its first import starts ldconfig

        for call in ("subprocess.Popen", "os.fork"):
            monkeypatch.setattr(call, lambda *_, **__: pytest.fail("starts a process: mark it integration"))


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_project() -> Iterator[None]:
    """Neither runs nor studies: `verify` of another test would find them."""
    left = [Path(__file__).parents[1] / name for name in ("runs", "studies")]
    before = [path.exists() for path in left]
    yield
    assert [path.exists() for path in left] == before, (
        f"a test wrote into {left[0].parent}: it has to change the folder"
    )


@pytest.fixture(autouse=True)
def machine_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the machine remembers: of each test its own."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("FEATURECACHE_STATE", str(folder))
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small ViT as transformers saves it: a backbone for tests that do not change it."""
    from support.checkpoints import save_vit

    return str(save_vit(tmp_path_factory.mktemp("checkpoint") / "vit"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's with nets.py in it, as the current folder; afterwards its modules are forgotten."""
    from support.user_nets import CNN, write

    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    write(CNN)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


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
def _server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def server(_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Object storage, empty and in the environment."""
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    _server.empty()
    _server.reset()
    yield _server
    _server.reset()


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("FEATURECACHE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEATURECACHE_TEST_DATA names no folder with the real images")
    return Path(folder)


@pytest.fixture(scope="session")
def home_with_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, images and a cache that has augmented copies of them: to be copied by tests that change it."""
    from support.copied_home import make_home

    return make_home(tmp_path_factory.mktemp("copies"))
