"""Files that this machine's own runs did not write are looked at by another process first.

HDF5 can crash or hang on a file whose hash is right and whose content is hostile. So a view or shard of unknown origin
goes through `featurecache.files.child`, which does with it what our readers do, with limits of memory and time. What
our own runs wrote, and what passed, is remembered (`featurecache.files.known`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from featurecache import errors
from featurecache.errors import CacheError, UnsafeFile
from featurecache.files.known import key_of, recall, remember

SECONDS = 10  # of computing for one file, and one more for each ...
BYTES_A_SECOND = 20_000_000  # ... of it
WAIT = 12  # times as long it may take in all: the machine is busy, the disk slow
MEMORY = 5 << 30  # bytes, and six times the largest file; 100,000 virtual mappings take 2.6 GB of HDF5
_START = 120.0  # seconds until the process answers at all
_LINE = 1 << 16  # bytes of an answer

ERRORS = ("CacheError", "DamagedFile", "UnsafeFile")  # that the process may answer with
_IN_ONE_PROCESS = 1000
_ENVIRONMENT = {  # no plugins of HDF5, one thread, and memory that is used after it was freed shall be noticed
    "HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165",
}  # fmt: skip

_PROGRAM = "import sys; sys.path[:] = {path!r}; from featurecache.files.child import main; main()"


def own(paths: Iterable[Path]) -> None:
    """This run wrote these files: their final names, with nothing to follow that changes them."""
    remember([key for path in paths if (key := key_of(path, "own")) is not None])


def checked(paths: Sequence[Path], kind: str) -> None:
    """Have files that are not known looked at, as "view" or "shard". Raises UnsafeFile, DamagedFile, CacheError.

    A file that is not there is left to whoever opens it.
    """
    for error in verdicts(paths, kind).values():
        raise error


def verdicts(paths: Sequence[Path], kind: str) -> dict[Path, CacheError]:
    """`checked` for many files at once: what is wrong with those that were refused."""
    keys = {path: key for path in paths if (key := key_of(path, kind)) is not None}
    own_keys = {path: key_of(path, "own") for path in keys}
    known = recall([*keys.values(), *(key for key in own_keys.values() if key)])
    strange = [path for path, key in keys.items() if not known & {key, own_keys[path]}]
    found = _examine(strange, kind) if strange else {}
    # A file that was exchanged while it was looked at has another key by now, and is not remembered.
    remember([keys[path] for path in strange if path not in found and key_of(path, kind) == keys[path]])
    return found


def _examine(paths: list[Path], kind: str) -> dict[Path, CacheError]:
    """Refused files and why. A process that ends at a file is started again behind it."""
    found: dict[Path, CacheError] = {}
    rest = list(paths)
    while rest:
        done, refused, reason = _one_process(rest[:_IN_ONE_PROCESS], kind)
        found |= refused
        if reason is not None:
            found[rest[done]] = UnsafeFile(f"{rest[done]} is not opened: {reason}.")
            done += 1
        rest = rest[done:]
    return found


def _one_process(paths: list[Path], kind: str) -> tuple[int, dict[Path, CacheError], str | None]:
    """(number of files it got through, those it refused, why it ended before the last)."""
    sizes = [path.lstat().st_size if path.exists() else 0 for path in paths]
    largest = max(sizes) if kind != "shard" else 0  # of a shard the features are not read
    seconds = [SECONDS + (size // BYTES_A_SECOND if kind != "shard" else 0) for size in sizes]
    files = [[os.path.abspath(path), kind, limit] for path, limit in zip(paths, seconds, strict=True)]
    refused: dict[Path, CacheError] = {}
    with _started({"files": files, "memory": MEMORY + 6 * largest}) as process:
        answers, wait = _Answers(process), _START
        for number, path in enumerate(paths):
            try:
                if answers.next(wait) != [number]:
                    if not answers.any:
                        raise CacheError(f"{path} cannot be looked at: {_ended(process)} before it began.")
                    return number, refused, _ended(process)
                answer = answers.next(seconds[number] * WAIT)
            except TimeoutError as error:
                if not answers.any:
                    raise CacheError(f"{path} cannot be looked at: no process answers in {_START:.0f} s.") from error
                return number, refused, f"HDF5 took more than {seconds[number] * WAIT:.0f} s to read it"
            if answer is None or len(answer) != 2:
                return number, refused, _ended(process)
            if answer[1] is not None:
                refused[path] = getattr(errors, answer[1][0])(answer[1][1])
            wait = SECONDS * WAIT
    return len(paths), refused, None


class _Answers:
    """Lines of JSON from the process, each awaited for a limited time and of limited length."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._descriptor = process.stdout.fileno()
        self._buffer = b""
        self.any = False

    def next(self, seconds: float) -> list[Any] | None:
        """None when the process has ended, or says what is no answer. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([self._descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(self._descriptor, _LINE)
            if not piece or len(self._buffer) > _LINE:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.any = True
        return _parsed(line)


def _parsed(line: bytes) -> list[Any] | None:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, list) or not 1 <= len(answer) <= 2 or type(answer[0]) is not int:
        return None
    said = answer[-1] if len(answer) == 2 else None
    fine = said is None or (isinstance(said, list) and len(said) == 2 and said[0] in ERRORS and type(said[1]) is str)
    return answer if fine else None


@contextlib.contextmanager
def _started(request: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, having got its request; killed at the end, whatever it does."""
    root = str(Path(__file__).resolve().parents[1])
    path = [root, *(each for each in sys.path if isinstance(each, str) and each not in ("", root))]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HDF5_", "PYTHON"))}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM.format(path=path)], env={**kept, **_ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
    except OSError as error:
        raise CacheError(f"files of unknown origin cannot be looked at: no process starts ({error}).") from error
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def _ended(process: subprocess.Popen[bytes]) -> str:
    """How a process that answers no more came to its end."""
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "the process that looked at it gave no proper answer"
    if code == -signal.SIGXCPU:
        return "HDF5 took too long to read it, computing all the time"
    if code < 0:
        return f"HDF5 crashed on it (signal {-code})"
    return f"the process that looked at it ended with code {code}"
