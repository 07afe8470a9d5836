"""Shared, exclusive and update lock of a store: many may add to it at once, whoever takes something away must be alone.

Readers need no lock: a file with its final name is whole, and a mapped file outlives its name. Only two things must not
meet: an extraction, whose newest shards no view names yet, and a command that removes what no view names. Each puts a
mark into the store, a hidden file with its process, host and time, and holds it locked (flock) for as long as it lives;
then it looks for marks of the other kind. A mark that can be locked, or whose process is gone, is a dead one's: it is
removed. On a file system without locks a mark from another host counts as alive, and the error names the file.

By hand and not by the package filelock (version 4.3 was read, not tried): its ReadWriteLock is an SQLite database,
which locks only where SQLite does (many nodes fill a cache on a network file system), its SoftReadWriteLock takes a
holder for dead that was suspended for longer than its heartbeat, and neither says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featurecache.errors import InUse
from featurecache.files.atomic import NO_LOCKS, locked_temporary, writing
from featurecache.files.mirror import refuse_address

MARKS = SHARED, EXCLUSIVE = ".shared-", ".exclusive-"  # beginnings of the marks' names


def shared_lock(store: Path, what: str) -> contextlib.AbstractContextManager[None]:
    """While rows are added to ``store``. Raises InUse where somebody holds the exclusive lock."""
    return _lock(store, SHARED, what, (EXCLUSIVE,))


def exclusive_lock(store: Path, what: str) -> contextlib.AbstractContextManager[None]:
    """While files of ``store`` are removed or replaced. Raises InUse where anybody holds a lock, and BadOption where
    the store is in object storage, which has none."""
    refuse_address(store, what.split()[0])
    return _lock(store, EXCLUSIVE, what, MARKS)


@contextlib.contextmanager
def update_lock(store: Path) -> Iterator[None]:
    """For reading a small file of the store, changing it and writing it back; others wait for their turn."""
    with writing(store):
        descriptor = os.open(store / "spec.json", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # there while the store is
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(store: Path, kind: str, what: str, others: tuple[str, ...]) -> Iterator[None]:
    """A mark of a kind under its final name, complete and locked before anybody can see it; no other of ``others``."""
    path = store / f"{kind}{secrets.token_hex(8)}"
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "what": what}
    with writing(path):
        temporary, descriptor = locked_temporary(path)
    try:
        with writing(path):
            os.write(descriptor, json.dumps(record).encode())
            os.rename(temporary, path)
        for mark in sorted(mark for kind in MARKS for mark in store.glob(f"{kind}*")):  # those of the dead go
            if mark == path or mark.suffix:
                continue
            if (holder := _holder(mark)) is not None and mark.name.startswith(others):
                raise InUse(
                    f"{store} is in use: {holder.get('what')} by process {holder.get('pid')} on {holder.get('host')} "
                    f"since {holder.get('since')}. Try again when it has finished; if there is no such process, "
                    f"delete {mark}."
                )
        yield
    finally:
        for name in (path, temporary):
            with contextlib.suppress(OSError):  # the store itself may be gone
                name.unlink()
        os.close(descriptor)


def _holder(path: Path) -> dict[str, Any] | None:
    """What a mark says of a process that lives, or None; a dead one's mark is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:  # finished meanwhile
        return None
    except OSError as error:
        return {"what": f"a mark that cannot be read ({error.strerror})"}
    record: Any = None
    try:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(os.pread(descriptor, 4096, 0))
        record = record if isinstance(record, dict) else {"what": "something"}
        if not _is_dead(descriptor, record):
            return record
        with writing(path):
            path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)


def _is_dead(descriptor: int, record: dict[str, Any]) -> bool:
    """Whether nobody holds the mark: it can be locked; without locks, its process on this host is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in NO_LOCKS:
            raise
    pid: Any = record.get("pid")
    if record.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return True
    except OSError:  # another user's
        pass
    return pid <= 0
