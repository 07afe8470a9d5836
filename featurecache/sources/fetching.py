"""Downloads: folders, leftovers, kaggle:, one sentence per failure.

``kaggle:<owner>/<set>[/versions/<n>][/inside]``: a data set of Kaggle, opened as the folder or table that it is.

The copy that kagglehub (extra ``kaggle``) keeps on this machine is looked for first, without kagglehub; of several
versions the newest. What is opened is the first folder, going down, that holds more than one other folder.

What the sources that fetch have in common: where files go, packages that may be missing, and networks that are.

A source first opens what is on this machine; only where nothing is does it fetch, and never when a view opens its
images again. A failed fetch ends soon and with one sentence that says what to type where there is a network.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from featurecache.errors import NotFetched, SourceError, first_line
from featurecache.sources.base import Dataset, abbreviated, safe_name, source_record
from featurecache.sources.folders import is_image

FORM = "kaggle:<owner>/<set>"
_WORDS = re.compile(r"([\w.-]+)/([\w.-]+)(?:/versions/(\d+))?(?:/(.+))?")
_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_DEPTH = 8


@dataclass(frozen=True)
class _Asked:
    owner: str
    name: str
    version: int | None
    inside: str

    @property
    def handle(self) -> str:
        return f"{self.owner}/{self.name}" + (f"/versions/{self.version}" if self.version else "")

    @property
    def words(self) -> str:
        return f"kaggle:{self.handle}" + (f"/{self.inside}" if self.inside else "")

    @property
    def place(self) -> Path:
        """Where kagglehub keeps it: <n>.complete and versions/<n> for each version (kagglehub/cache.py)."""
        cache = os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub"
        return Path(cache).expanduser().absolute() / "datasets" / self.owner / self.name


def open_kaggle(
    words: str, columns: dict[str, str] | None, task: str | None, open_path: Callable[..., Dataset]
) -> Dataset:
    """The set of ``words`` from kagglehub's folder; ``open_path`` opens what lies there. Raises NotFetched."""
    asked = _parse(words)
    versions = _complete(asked)
    if not versions:
        raise _absent(asked)
    asked = replace(asked, version=max(versions))
    top = asked.place / "versions" / str(asked.version)
    inner = top / asked.inside
    if not inner.exists() or top.resolve() not in [inner.resolve(), *inner.resolve().parents]:
        raise SourceError(
            f"there is no {asked.inside} in {asked.handle} ({top}); it has {abbreviated(sorted(os.listdir(top)))}."
        )
    dataset = open_path(str(_down(asked, inner)), columns=columns, task=task)
    return replace(dataset, name=safe_name(asked.name), source=source_record("kaggle", asked.words, columns, task))


def fetch_kaggle(words: str) -> None:
    """Let kagglehub download the set of ``words``. Raises SourceError."""
    asked = _parse(words)
    kagglehub = package("kagglehub", "kaggle", f"to fetch {asked.handle}")
    with fetching(partial(_absent, asked)):
        place = kagglehub.dataset_download(asked.handle)
        if not _complete(asked):
            raise SourceError(f"kagglehub mounts {asked.handle} at {place}, as in notebooks: give --data {place}")


def _complete(asked: _Asked) -> list[int]:
    """Versions that were unpacked to the end: those that kagglehub marked."""
    marks = [path.stem for path in asked.place.glob("*.complete")]
    found = [int(mark) for mark in marks if mark.isdigit() and (asked.place / "versions" / mark).is_dir()]
    return [number for number in found if asked.version in (None, number)]


def _down(asked: _Asked, folder: Path) -> Path:
    """The folder, or the only table, that holds the data. Raises SourceError where that cannot be told."""
    for _ in range(_DEPTH):
        if folder.is_file():
            return folder
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
        inner = [name for name in names if (folder / name).is_dir()]
        tables = [name for name in names if name.lower().endswith((*_TABLES, ".npz"))]
        if any(map(is_image, names)) or (len(inner) > 1 and not tables):
            return folder
        if len(inner) + len(tables) != 1:
            choices = [f"kaggle:{asked.handle}/{_below(asked, folder / name)}" for name in [*inner, *tables]]
            if not choices:
                raise SourceError(f"{asked.handle} holds no folder of images and no table ({folder}).")
            raise SourceError(
                f"{asked.handle} holds {abbreviated([*inner, *tables])}: say which, such as {abbreviated(choices, 3)}."
            )
        folder = folder / [*inner, *tables][0]
    return folder


def _below(asked: _Asked, path: Path) -> str:
    return path.relative_to(asked.place / "versions" / str(asked.version)).as_posix()


def _parse(words: str) -> _Asked:
    found = _WORDS.fullmatch(words.strip("/"))
    if not found or ".." in words.split("/"):
        raise SourceError(
            f'kaggle:{words} is no name of a data set; expected {FORM}, such as "kaggle:owner/chest-xrays".'
        )
    owner, name, version, inside = found.groups()
    return _Asked(owner, name, int(version) if version else None, inside or "")


def _absent(asked: _Asked, why: str = "") -> NotFetched:
    return not_here(asked.handle, asked.place, asked.words, "--data FOLDER, once it is unpacked", why)


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
