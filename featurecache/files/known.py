"""Files that HDF5 may be trusted with: those that this machine's own runs wrote, or that were looked at.

Remembered outside of every cache, since a stranger could ship a list of good files: ``$FEATURECACHE_STATE``, else
``$XDG_STATE_HOME/featurecache``, else ``~/.local/state/featurecache``. Where nothing can be remembered, every file is
looked at every time. A file is known by path, inode, size, mtime and ctime. The last cannot be set, so a file that was
copied, unpacked or changed is a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

RULES = 1  # raised when the rules grow stricter: what passed before is looked at again
_REMEMBERED = 2_000_000  # files
_IN_ONE_QUERY = 500
_PATIENCE = 5.0  # seconds for another process that writes

_known: set[bytes] = set()  # in this process


def key_of(path: Path, kind: str) -> bytes | None:
    """The name under which a file is remembered; None when it is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    place = os.path.join(os.path.realpath(path.parent), path.name)
    what = (RULES, kind, place, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.blake2b(repr(what).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _state() -> Path:
    set_to = os.environ.get("FEATURECACHE_STATE")
    if set_to:
        return Path(set_to)
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base or os.path.expanduser("~/.local/state")) / "featurecache"


def recall(keys: list[bytes]) -> set[bytes]:
    """Those of ``keys`` that are remembered."""
    missing = [key for key in keys if key not in _known]

    def ask(memory: sqlite3.Connection) -> None:
        for start in range(0, len(missing), _IN_ONE_QUERY):
            part = missing[start : start + _IN_ONE_QUERY]
            marks = ",".join("?" * len(part))
            _known.update(row[0] for row in memory.execute(f"SELECT key FROM known WHERE key IN ({marks})", part))

    if missing:
        _with_memory(ask)
    return _known.intersection(keys)


def remember(keys: list[bytes]) -> None:
    _known.update(keys)

    def write(memory: sqlite3.Connection) -> None:
        with memory:
            memory.executemany("INSERT OR IGNORE INTO known (key) VALUES (?)", [(key,) for key in keys])
            newest = memory.execute("SELECT max(rowid) FROM known").fetchone()[0]
            memory.execute("DELETE FROM known WHERE rowid <= ?", (newest - _REMEMBERED,))

    if keys:
        _with_memory(write)


def _with_memory(work: Callable[[sqlite3.Connection], None]) -> None:
    """Do ``work`` on the list of known files. It only saves time: nothing that goes wrong with it is an error."""
    file = _state() / "known.sqlite"
    try:
        if not _is_ours(file.parent):
            return
        with contextlib.closing(sqlite3.connect(file, timeout=_PATIENCE)) as memory:
            memory.execute("PRAGMA journal_mode=MEMORY")
            memory.execute("PRAGMA synchronous=OFF")
            memory.execute("CREATE TABLE IF NOT EXISTS known (key BLOB NOT NULL UNIQUE)")
            work(memory)
    except (sqlite3.OperationalError, OSError):  # locked for long, a full disk, a place that cannot be written
        return
    except sqlite3.DatabaseError:  # damaged: begun anew
        with contextlib.suppress(OSError):
            os.unlink(file)


def _is_ours(folder: Path) -> bool:
    """A folder of this user that nobody else may write to, made if it is not there."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
