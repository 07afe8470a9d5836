"""A view in many processes: workers of a DataLoader, locks of others, a read-only disk."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import image_folder
from torch.utils.data import DataLoader, Dataset

import featurecache
from featurecache.store.shards import layout_in
from featurecache.store.view import View


class Rows(Dataset):  # type: ignore[type-arg]
    """What a user writes: a view, and one row of it at a time."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.view.tensor("tokens", [row])[0].clone(), os.getpid()


@pytest.fixture(scope="module")
def made(tmp_path_factory, vit: str) -> tuple[Path, str]:  # type: ignore[no-untyped-def]
    """A view, and the backbone it was made with."""
    home = tmp_path_factory.mktemp("workers")
    data = image_folder(home / "data", 12)
    return featurecache.extract(data, backbone=vit, cache=home / "cache", outputs="cls,tokens").view, vit


def opened(store: Path) -> list[str]:
    """Files of the store that this process has open."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [name for name in map(os.readlink, links) if name.startswith(str(store))]


def mapped(store: Path) -> list[str]:
    """Files of the store that this process has open or mapped."""
    maps = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return opened(store) + [path for path in maps if path.startswith(str(store))]


def in_a_fork(job: Callable[[], Any]) -> Any:
    """What ``job`` gives in a forked process."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(job()))
    child.start()
    answer = receive.recv() if receive.poll(60) else None
    child.join(60)
    assert child.exitcode == 0
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(("start", "used", "workers"), [("fork", False, 2), ("fork", True, 2), ("spawn", True, 1)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")  # Python's own remark on every fork beside threads
def test_workers_of_a_dataloader_get_the_right_rows(made, start, used, workers):
    view = View(made[0])
    expected = View(made[0]).tensor("tokens")
    if used:  # the parent has its shards mapped already
        view.tensor("tokens")
    loader = DataLoader(Rows(view), batch_size=5, num_workers=workers, multiprocessing_context=start, timeout=120)
    batches = list(loader)
    assert torch.equal(torch.cat([rows for rows, _ in batches]), expected)
    assert os.getpid() not in {int(process) for _, processes in batches for process in processes}


def test_a_pickled_view_carries_no_rows_and_opens_them_where_it_is_used(made: tuple[Path, str]) -> None:
    view = View(made[0])
    before = len(pickle.dumps(view))
    rows = view.tensor("tokens")
    carried = pickle.dumps(view)
    assert len(carried) == before
    again = pickle.loads(carried)
    assert again._maps == {}
    assert torch.equal(again.tensor("tokens"), rows)


def test_an_open_view_holds_no_file_and_maps_what_was_asked_for_only(made: tuple[Path, str], tmp_path: Path) -> None:
    store = shutil.copytree(made[0].parent, tmp_path / "cache" / made[0].parent.name)
    view = View(store / made[0].name)
    assert mapped(store) == []
    view.tensor("cls")
    assert mapped(store) and all("/cls/" in path for path in mapped(store))
    assert opened(store) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_of_a_fresh_view_opens_its_own(made: tuple[Path, str], tmp_path: Path) -> None:
    store = shutil.copytree(made[0].parent, tmp_path / "cache" / made[0].parent.name)
    view = View(store / made[0].name)
    answer = in_a_fork(lambda: (mapped(store), view.tensor("tokens").sum().item()))
    assert answer == ([], view.tensor("tokens").sum().item())


LOCKER = """
import fcntl, sys, time
files = [open(path, "r+b") for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
    fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_reading_waits_for_no_lock_and_takes_none(made: tuple[Path, str]) -> None:
    files = [str(made[0]), *map(str, made[0].parent.glob("*/*.h5"))]
    words = [sys.executable, "-c", LOCKER, *files]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"locked\n"
    try:
        start = time.monotonic()
        view = View(made[0])
        assert len(view.tensor("tokens")) == len(view.tensor("cls")) == 12
        assert [layout_in(Path(path)).dtype for path in files[1:]] == ["float16"] * 2
        assert time.monotonic() - start < 5
    finally:
        other.communicate()
    view = View(made[0])
    rows = view.tensor("tokens")
    for path in files:  # with its rows in use
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(rows) == 12


def test_a_cache_on_a_read_only_file_system_is_read(made: tuple[Path, str], mounted: Path) -> None:
    store = shutil.copytree(made[0].parent, mounted / made[0].parent.name)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    rows = View(store / made[0].name).tensor("tokens")
    assert torch.equal(rows, View(made[0]).tensor("tokens"))
    assert len(featurecache.open_view("data", mounted)) == 12
    del rows
