"""The process that looks at files of unknown origin, so that HDF5 crashes, hangs or fills the memory here.

Started by `featurecache.files.guard` with a JSON request on stdin; answers with one line of JSON before and one after
every file. Imports no torch. May write no file, start no process, and use no more memory and time than it was told.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import h5py

from featurecache.errors import CacheError
from featurecache.files.atomic import read_checked, read_user_block
from featurecache.files.guard import ERRORS
from featurecache.maintenance.feature_files import FOREIGN, read_all
from featurecache.store.schema import MAX_VIEW, check_inside, shard_content, view_content


def examine(path: Path, kind: str) -> None:
    """Do with the file what our readers do with it."""
    if kind == "view":
        data = read_checked(path, MAX_VIEW)
        with h5py.File(io.BytesIO(data), "r") as file:
            check_inside(file, path, virtual=True)
            view_content(file, path, data)
    elif kind == FOREIGN:
        read_all(path)
    else:
        read_user_block(path)
        with h5py.File(path, "r", locking=False) as file:
            check_inside(file, path, virtual=False)
            shard_content(file, path)


def verdict(path: Path, kind: str) -> list[str] | None:
    """None for a harmless file; else the class of the error and its sentence."""
    try:
        examine(path, kind)
    except CacheError as error:
        name = type(error).__name__
        return [name if name in ERRORS else "CacheError", str(error)[:2000]]
    except MemoryError:
        return ["UnsafeFile", f"{path} needs more memory than a file of its size may."]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return ["DamagedFile", f"{path} cannot be read as a {kind} ({reason[:300] or type(error).__name__})."]
    return None


def _limit(memory: int) -> None:
    for what, most in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0)):
        with contextlib.suppress(ValueError, OSError, AttributeError):  # this system has no such limit
            resource.setrlimit(getattr(resource, what), (most, most))


def _limit_time(seconds: int) -> None:
    """Of computing, from now on; beyond it the system ends the process with SIGXCPU."""
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, most))


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a library that prints shall not be taken for an answer
        os.dup2(nothing, descriptor)
    _limit(request["memory"])
    for number, (path, kind, seconds) in enumerate(request["files"]):
        _limit_time(seconds)
        _say(answers, [number])
        _say(answers, [number, verdict(Path(path), kind)])


def _say(descriptor: int, answer: list[Any]) -> None:
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
