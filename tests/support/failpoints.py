"""Every call by which a process changes a folder, counted, and a fault at one of them.

To be imported before anything else: pathlib and others take functions of `os` by name. Events are ``os`` calls that
write, name or remove something below the watched folder, and the statements that sqlite3 is given for a file there.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

_folder: str | None = None
_fault: dict[str, Any] = {}
_turn = threading.RLock()
events: list[tuple[str, str, str]] = []  # (call, path below the folder, path it is made of)


def arm(folder: str, fault: dict[str, Any]) -> None:
    """Watch ``folder``. A fault has ``at`` (number of the event, from 0; None: none), what to do there (``do``), and
    ``on``: at every later event of the same calls too. ``calls``: only these count.

    kill, torn (half of it is written, then killed), short (half is written, and said so), pause (until the file
    ``beside`` is gone again), remove (the folder ``what``), ENOSPC, EIO, ... (that error).
    """
    global _folder, _fault
    events.clear()
    _folder, _fault = os.path.realpath(folder), fault


def _below(path: str) -> str | None:
    if _folder is None:
        return None
    relative = os.path.relpath(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), _folder)
    return None if relative.startswith("..") else relative


def _by_descriptor(descriptor: int) -> str | None:
    try:
        return _below(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None


def _by_name(path: Any, at: int | None) -> str | None:
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    base = os.readlink(f"/proc/self/fd/{at}") if at is not None else os.getcwd()
    return _below(os.path.join(base, name))


def _reached(call: str, place: str, source: str, real: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    with _turn:
        if call not in _fault.get("calls", (call,)):
            return real(*arguments, **named)
        number, at = len(events), _fault.get("at")
        events.append((call, place, source))
    if at is None or number < at or (number > at and not _fault.get("on")):
        return real(*arguments, **named)
    return _act(_fault["do"], call, real, arguments, named)


def _act(do: str, call: str, real: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if do in ("short", "torn") and call in ("pwrite", "write"):
        descriptor, data, *rest = arguments
        arguments = (descriptor, memoryview(data)[: max(1, len(data) // 2)], *rest)
    if do == "torn":
        real(*arguments, **named)
    if do in ("kill", "torn"):
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "pause":
        open(_fault["beside"], "w").close()
        while os.path.exists(_fault["beside"]):
            time.sleep(0.002)
    if do == "remove":
        _unwatched(_remove, _fault["what"])
    if hasattr(errno, do):
        if call.startswith("sqlite"):
            raise sqlite3.OperationalError("database or disk is full" if do == "ENOSPC" else "disk I/O error")
        raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))
    return real(*arguments, **named)


def _remove(folder: str) -> None:
    """At one moment: file by file, what another thread writes meanwhile would be left of it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as elsewhere:
        os.rename(folder, os.path.join(elsewhere, "removed"))


def _unwatched(function: Any, *arguments: Any) -> None:
    global _folder
    kept, _folder = _folder, None
    try:
        function(*arguments)
    finally:
        _folder = kept


def _wrap(call: str, places: Callable[..., tuple[str | None, str | None]]) -> None:
    """``places``: of the call's arguments, what it changes and what that is made of; None: nothing of the folder."""
    real = getattr(os, call)

    @functools.wraps(real)
    def counted(*arguments: Any, **named: Any) -> Any:
        place, source = places(*arguments, **named) if _folder else (None, None)
        if place is None:
            return real(*arguments, **named)
        return _reached(call, place, source or "", real, arguments, named)

    setattr(os, call, counted)


def _of_descriptor(descriptor: int, *_: Any, **__: Any) -> tuple[str | None, None]:
    return _by_descriptor(descriptor), None


def _of_name(path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> tuple[str | None, None]:
    return _by_name(path, dir_fd), None


def _of_new_name(path: Any, flags: int, *_: Any, dir_fd: int | None = None) -> tuple[str | None, None]:
    return (_by_name(path, dir_fd) if flags & os.O_CREAT else None), None


def _of_two_names(
    source: Any, path: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **_: Any
) -> tuple[str | None, str | None]:
    return _by_name(path, dst_dir_fd), _by_name(source, src_dir_fd)


class _Counted(sqlite3.Connection):
    place: str | None = None

    def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
        return self._counted(statement, super().execute, statement, *rest)

    def executemany(self, statement: str, *rest: Any) -> sqlite3.Cursor:
        return self._counted(statement, super().executemany, statement, *rest)

    def _counted(self, statement: str, real: Any, *arguments: Any) -> sqlite3.Cursor:
        word = statement.split()[0]
        if self.place is None or word in ("PRAGMA", "SELECT"):
            return real(*arguments)
        return _reached(f"sqlite {word}", self.place, "", real, arguments, {})


def _wrap_sqlite() -> None:
    real = sqlite3.connect

    @functools.wraps(real)
    def connect(name: Any, *rest: Any, **named: Any) -> sqlite3.Connection:
        connection = real(name, *rest, **{"factory": _Counted, **named})
        if _folder:
            connection.place = _below(os.path.abspath(os.fsdecode(name).removeprefix("file:").split("?")[0]))
        return connection

    sqlite3.connect = connect


for _calls, _places in (
    (("pwrite", "write", "ftruncate", "fsync"), _of_descriptor),
    (("unlink", "mkdir", "rmdir"), _of_name),
    (("open",), _of_new_name),
    (("link", "rename", "replace"), _of_two_names),
):
    for _call in _calls:
        _wrap(_call, _places)
_wrap_sqlite()
