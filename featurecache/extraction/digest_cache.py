"""Digest cache: digests of files in ``<cache>/files.sqlite``, so that an unchanged file is not read again.

    files   key → size, mtime, ctime, inode, digest, check       looks   digest → `ImageHeader`

A file is known by a hash of its absolute path, never by the path: paths hold patients' names. It is unchanged where
size, mtime, ctime and inode are what they were; whoever sets the mtime back cannot set the ctime. A file that changed
less than ``YOUNG`` before it was looked at is not remembered: it could change again within one tick of the file
system's clock (git calls that racily clean).

All of it can be made again by reading the images. So a file that is damaged, foreign or of a later version is thrown
away, and where no lock is to be had or the folder is read-only the run goes on without memory. SQLite has no checksums
and the cache may come from a stranger: every entry carries its own, the schema is compared with ours before anything is
asked of it, and journals that only a stranger's file can have are never given to SQLite. The journal is an ordinary
one: write-ahead logs need memory shared between processes, which network file systems do not have.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featurecache.images.headers import ImageHeader
from featurecache.store.schema import DIGEST

NAME = "files.sqlite"
YOUNG = 2 * 10**9  # ns; the coarsest clock of a file system in use (FAT)
STAT = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("ctime", "<i8"), ("inode", "<u8")])  # size -1: no file
_ENTRY = np.dtype([("stat", STAT), ("digest", "V16"), ("check", "<u8")])
_SIZE = _ENTRY.itemsize
_APPLICATION, _VERSION = 0x66656174, 1  # "feat"; the version of this schema
_SCHEMA = {
    "files": "CREATE TABLE files (key INTEGER PRIMARY KEY, entry BLOB NOT NULL)",
    "looks": "CREATE TABLE looks (digest BLOB PRIMARY KEY, look BLOB NOT NULL) WITHOUT ROWID",
}
_CREATE = (*_SCHEMA.values(), f"PRAGMA application_id = {_APPLICATION}", f"PRAGMA user_version = {_VERSION}")
_AT_ONCE = 10_000  # keys in one question
_IN_ONE = 100_000  # entries in one transaction: a second, for which another process has to wait
_PATIENCE = 10.0  # seconds to wait for another process's transaction
_SUPER = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names a file for SQLite to delete
_NOT_NOW = ("locked", "readonly", "I/O", "full", "unable to open", "permission", "locking protocol")

# Closing any descriptor of a file drops all locks this process has on it (POSIX): one thread at a time.
_TURN = threading.Lock()


class _Foreign(Exception):
    """Not a file of ours, or one that must not be opened."""


class DigestCache:
    """What a cache remembers of files. Holds no open file.

    ``writes=False`` changes nothing on the disk. ``trouble`` says, after the first failure, why there is no memory.
    """

    def __init__(self, cache: Path, *, writes: bool) -> None:
        self.path = cache / NAME
        self.writes = writes
        self.trouble: str | None = None

    def get(self, keys: np.ndarray, stats: np.ndarray) -> np.ndarray:
        """Digests S32 [N] of files with ``keys`` int64 [N] and ``stats`` STAT [N]; empty where not known."""
        digests = np.zeros(len(keys), DIGEST)
        order = np.argsort(keys)

        def ask(database: sqlite3.Connection) -> None:
            for start in range(0, len(order), _AT_ONCE):
                rows = order[start : start + _AT_ONCE]
                digests[rows] = _ask(database, keys[rows], stats[rows])

        self._use(ask)
        return digests

    def put(self, keys: np.ndarray, stats: np.ndarray, digests: np.ndarray) -> None:
        """Keep digests S32 [n] of files. A kill loses at most the last transaction."""
        order = np.argsort(keys)
        for start in range(0, len(order), _IN_ONE):
            rows = order[start : start + _IN_ONE]
            entries = list(_entries(keys[rows], stats[rows], digests[rows]))
            self._change("INSERT OR REPLACE INTO files VALUES (?, ?)", entries)

    def drop(self, keys: np.ndarray) -> None:
        self._change("DELETE FROM files WHERE key = ?", [(key,) for key in keys.tolist()])

    def get_headers(self, digests: Iterable[bytes]) -> dict[bytes, ImageHeader]:
        """What is remembered of the headers of images."""
        headers: dict[bytes, ImageHeader] = {}

        def ask(database: sqlite3.Connection) -> None:
            question = "SELECT look FROM looks WHERE digest = ? AND typeof(look) = 'blob' AND length(look) < 100"
            rows = {digest: database.execute(question, (digest,)).fetchone() for digest in digests}
            headers.update({digest: header for digest, row in rows.items() if row and (header := _header(row[0]))})

        self._use(ask)
        return headers

    def put_headers(self, headers: dict[bytes, ImageHeader]) -> None:
        rows = [(digest, json.dumps(header).encode()) for digest, header in headers.items()]
        self._change("INSERT OR REPLACE INTO looks VALUES (?, ?)", rows)

    def _change(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        def change(database: sqlite3.Connection) -> None:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(statement, rows)
            database.execute("COMMIT")

        if rows and self.writes:
            self._use(change, make=True)

    def _use(self, action: Callable[[sqlite3.Connection], None], make: bool = False) -> None:
        """``action`` on the open file, where there is one to be had. ``make``: it has to exist."""
        for _ in range(2):
            if self.trouble or not (make or self.path.exists() or self.path.is_symlink()):
                return
            try:
                with _TURN, contextlib.closing(self._open(make)) as database:
                    return action(database)
            except (sqlite3.Error, _Foreign, OSError) as error:
                passing = isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _NOT_NOW)
                if passing or isinstance(error, OSError):  # nothing is wrong with the file itself
                    self.trouble = f"{self.path} cannot be used ({error}): files are read again by every run."
                elif not self.writes:
                    return
                else:
                    self._throw_away()

    def _open(self, make: bool) -> sqlite3.Connection:
        """A connection to a file that is ours by its schema. Raises _Foreign, sqlite3.Error, OSError."""
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._refuse_strange()
        mode = "ro" if not self.writes else "rwc" if make else "rw"
        name = f"file:{urllib.parse.quote(str(self.path.absolute()))}?mode={mode}"
        database = sqlite3.connect(name, uri=True, timeout=_PATIENCE, isolation_level=None)
        try:
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "cache_size = -8192"):
                database.execute(f"PRAGMA {pragma}")
            if make and not _schema(database):
                database.execute("BEGIN IMMEDIATE")
                for statement in _CREATE if not _schema(database) else ():  # another process may have been quicker
                    database.execute(statement)
                database.execute("COMMIT")
            if _schema(database) != {**_SCHEMA, "": f"{_APPLICATION} {_VERSION}"}:
                raise _Foreign("another schema")
        except BaseException:
            database.close()
            raise
        return database

    def _refuse_strange(self) -> None:
        """What SQLite must not even open: links, pipes, write-ahead logs, journals that name a file to be deleted."""
        journal, *logs = (self.path.with_name(NAME + end) for end in ("-journal", "-wal", "-shm"))
        there = [path.lstat() for path in (self.path, journal) if os.path.lexists(path)]
        if not all(stat.S_ISREG(status.st_mode) for status in there) or any(os.path.lexists(path) for path in logs):
            raise _Foreign("a link, a pipe or a log beside it")
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            header = file.read(20)
            if header and (header[:16] != b"SQLite format 3\0" or header[18:20] != b"\1\1"):
                raise _Foreign("no such file of ours")
        with contextlib.suppress(FileNotFoundError), open(journal, "rb") as file:
            file.seek(max(0, journal.stat().st_size - len(_SUPER)))
            if file.read() == _SUPER:
                raise _Foreign("a journal of several files")

    def _throw_away(self) -> None:
        for end in ("", "-journal", "-wal", "-shm"):
            try:
                self.path.with_name(NAME + end).unlink(missing_ok=True)
            except OSError as error:
                self.trouble = f"{self.path} is damaged and cannot be removed ({error.strerror}): files are read again."


def _schema(database: sqlite3.Connection) -> dict[str, str]:
    """Table → the statement that made it, and under "" whose file it is; empty for an empty file."""
    tables: dict[str, str] = dict(database.execute("SELECT name, sql FROM sqlite_master").fetchall())
    if tables:
        facts = [database.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in ("application_id", "user_version")]
        tables[""] = "{} {}".format(*facts)
    return tables


def _ask(database: sqlite3.Connection, keys: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """Digests S32 [n] for sorted ``keys`` [n]; an entry counts only where its stat and its checksum agree."""
    digests = np.zeros(len(keys), DIGEST)
    chosen = f"key IN ({','.join(map(str, keys.tolist()))}) AND typeof(entry) = 'blob' AND length(entry) = {_SIZE}"
    rows = database.execute(f"SELECT key, entry FROM files WHERE {chosen}").fetchall()
    if not rows:
        return digests
    place = np.searchsorted(keys, np.array([key for key, _ in rows], np.int64))
    entries = np.frombuffer(b"".join([entry for _, entry in rows]), _ENTRY)
    checks = np.array([_check(key, entry) for key, entry in rows], np.uint64)
    good = (entries["check"] == checks) & (entries["stat"] == stats[place]) & (stats["size"][place] >= 0)
    hexadecimal = np.frombuffer(entries["digest"].tobytes().hex().encode(), DIGEST)
    digests[place[good]] = hexadecimal[good]
    return digests


def _check(key: int, entry: bytes) -> int:
    return xxhash.xxh3_64_intdigest(entry[:-8], key & (1 << 64) - 1)


def _entries(keys: np.ndarray, stats: np.ndarray, digests: np.ndarray) -> Iterator[tuple[int, bytes]]:
    entries = np.zeros(len(keys), _ENTRY)
    entries["stat"] = stats
    entries["digest"] = np.frombuffer(bytes.fromhex(digests.tobytes().decode()), "V16")
    for key, entry in zip(keys.tolist(), entries, strict=True):
        plain = entry.tobytes()
        yield key, plain[:-8] + _check(key, plain).to_bytes(8, "little")


def _header(stored: bytes) -> ImageHeader | None:
    """A stored header, if it is one: its words are shown at a terminal."""
    try:
        header = ImageHeader(*json.loads(stored))
    except (ValueError, TypeError):
        return None
    numbers = (header.width, header.height, header.pages, 1 if header.used is None else header.used)
    if all(type(number) is int and 0 < number < 1 << 31 for number in numbers) and isinstance(header.kind, str):
        return header if header.kind.isprintable() else None
    return None
