"""What the sources that fetch have in common: where files go, packages that may be missing, and networks that are.

A source first opens what is on this machine; only where nothing is does it fetch, and never when a view opens its
images again. A failed fetch ends soon and with one sentence that says what to type where there is a network.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featurecache.errors import NotFetched, SourceError

VARIABLE = "FEATURECACHE_DATA"
PATIENCE = 15.0  # seconds without a byte after which a server counts as out of reach


def data_folder() -> Path:
    """Where published data sets are looked for and put: ``$FEATURECACHE_DATA``, else the user's cache folder."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featurecache" / "data"


def package(name: str, extra: str, what: str) -> Any:
    """An optional package. Raises SourceError where it is not installed."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some keep the stdout they find for their log
            return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(f"{name.partition('.')[0]} is needed {what}: pip install 'featurecache[{extra}]'.") from error


def at_place(words: str) -> tuple[list[str], str | None]:
    """``name[@word…][@folder]`` → name and words; the folder, absolute. One without a ``/`` has to be there."""
    first, *rest = words.split("@")
    for place, word in enumerate(rest):
        if "/" in word or word.startswith((".", "~")) or (os.path.isdir(word) and not word.isdigit()):
            return [first, *rest[:place]], os.path.abspath(os.path.expanduser("@".join(rest[place:])))
    return [first, *rest], None


def not_here(what: str, where: str | Path, source: str, copy: str, why: str) -> NotFetched:
    """The sentence about a data set that is not on this machine; ``copy``: how one that the user has is named; ``why``:
    the reason that it could not be fetched, where that was tried."""
    tried = f" and could not be fetched ({why})" if why else ""
    fetch = f"python -c \"import featurecache; featurecache.open_source('{source}')\""
    return NotFetched(
        f"{what} is not on this machine (looked in {where}){tried}. Where there is a network this fetches it: {fetch} "
        f"  A copy you have: {copy}"
    )


@contextlib.contextmanager
def fetching(absent: Callable[[str], NotFetched]) -> Iterator[None]:
    """Whatever goes wrong inside becomes what ``absent`` makes of the reason. Talk goes to stderr, and a server that
    is silent for ``PATIENCE`` is given up (most loaders wait for ever)."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SourceError:
        raise
    except Exception as error:  # loaders raise whatever their HTTP library does
        raise absent(first_line(error)) from error
    finally:
        socket.setdefaulttimeout(before)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextlib.contextmanager
def beside(folder: Path, name: str) -> Iterator[Path]:
    """A folder to fetch into; what it holds at the end moves into ``folder``. Loaders take a half-unpacked archive for
    a whole one, so nothing unfinished may have its final name."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        _move(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, folder: Path) -> None:
    """Every entry to its place; a folder that is there already takes in the files of the new one."""
    for entry in list(draft.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            entry.replace(place)
