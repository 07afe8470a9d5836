"""Who may work in a store beside whom; marks of dead processes are recognised."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featurecache.errors import InUse
from featurecache.files import locks
from featurecache.files.locks import exclusive_lock, shared_lock, update_lock

HOLD = "import sys, pathlib; from featurecache.files import locks; kind = getattr(locks, sys.argv[2])\n" + (
    "with kind(pathlib.Path(sys.argv[1]), 'gc'):\n    print('in', flush=True); sys.stdin.read()"
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "spec.json").write_text("{}")
    return tmp_path


@pytest.fixture
def holder(store: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has the store for itself."""
    words = [sys.executable, "-c", HOLD, str(store), "exclusive_lock"]
    home = Path(locks.__file__).parents[2]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        yield process
        process.kill()


def marks(store: Path) -> list[Path]:
    return [path for path in store.iterdir() if path.name != "spec.json"]


@pytest.mark.parametrize(
    ("first", "second"), [(shared_lock, exclusive_lock), (exclusive_lock, shared_lock), (exclusive_lock,) * 2]
)
def test_who_removes_files_is_alone(store: Path, first, second):
    with first(store, "gc"):
        said = rf"gc by process {os.getpid()} on {socket.gethostname()} since 20"
        with pytest.raises(InUse, match=said), second(store, "x"):
            pass
        assert len(marks(store)) == 1
    with second(store, "x"):
        pass


@pytest.mark.integration
def test_another_process_is_named_and_its_death_noticed(store: Path, holder: subprocess.Popen[str]):
    said = f"gc by process {holder.pid} on .*Try again when it has finished"
    with pytest.raises(InUse, match=said), shared_lock(store, "x"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(marks(store)) == 1  # it could not clear up
    with shared_lock(store, "extract"), pytest.raises(InUse, match="extract by process"), exclusive_lock(store, "gc"):
        pass
    assert marks(store) == []


def test_the_mark_goes_when_the_work_fails(store: Path):
    with pytest.raises(KeyboardInterrupt), exclusive_lock(store, "gc"):
        raise KeyboardInterrupt
    assert marks(store) == []


def leave_mark(store: Path, **change) -> Path:  # type: ignore[no-untyped-def]
    path = store / ".exclusive-0123456789abcdef"
    record = {"pid": 1, "host": socket.gethostname(), "since": "2026-01-01 00:00:00", "what": "gc", **change}
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def no_locks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A file system without locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


@pytest.mark.integration
def test_without_file_locks_a_dead_process_of_this_host_is_recognised(store: Path, no_locks: None):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave_mark(store, pid=child.pid)
    with shared_lock(store, "extract"):
        pass
    leave_mark(store, pid=os.getpid())
    with pytest.raises(InUse), shared_lock(store, "extract"):
        pass


@pytest.mark.integration
def test_without_file_locks_another_hosts_mark_counts_and_is_named(store: Path, no_locks: None):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    path = leave_mark(store, host="node7", pid=child.pid)  # a number that says nothing about another host
    said = f"on node7 since 2026.*if there is no such process, delete {path}"
    with pytest.raises(InUse, match=said), shared_lock(store, "x"):
        pass
    path.unlink()
    with shared_lock(store, "x"):
        pass


@pytest.mark.parametrize("content", [b"", b"[" * 4000, b"[1]", b"\xff\xfe"])
def test_a_mark_that_nobody_holds_is_removed_whatever_it_says(store: Path, content: bytes):
    leave_mark(store).write_bytes(content)
    with exclusive_lock(store, "gc"):
        assert len(marks(store)) == 1


def test_a_link_or_a_folder_in_a_marks_place_is_not_followed(store: Path, tmp_path: Path):
    target = tmp_path / "precious"
    target.write_text("kept")
    (store / ".exclusive-feedfeedfeedfeed").symlink_to(target)
    with pytest.raises(InUse, match="cannot be read"), shared_lock(store, "x"):
        pass
    assert target.read_text() == "kept"


def test_changes_of_a_small_file_wait_for_each_other(store: Path):
    order = []

    def change(_: int) -> None:
        with update_lock(store):
            order.append("in")
            time.sleep(0.05)
            order.append("out")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(change, range(2)))
    assert order == ["in", "out", "in", "out"]
