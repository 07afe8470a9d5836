"""Downloads of data sets: where files go, optional packages, networks that fail; and Kaggle's, by kagglehub.

A source first opens what is on this machine; only where nothing is does it fetch, and never when a view opens its
images again. A failed fetch ends soon and with one sentence that says what to type where there is a network.

``kaggle:<owner>/<set>[/versions/<n>][/inside]`` is opened as the folder or table that it is. The copy that kagglehub
(extra ``kaggle``) keeps on this machine is looked for first, without kagglehub; of several versions the newest. What is
opened is the first folder, going down, that holds more than one other folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from featurecache.errors import NotFetched, SourceError, first_line
from featurecache.formatting import abbreviated, shell_word
from featurecache.sources.base import Dataset, package
from featurecache.sources.folders import is_image, list_folder
from featurecache.sources.tables import is_table

VARIABLE = "FEATURECACHE_DATA"
PATIENCE = 15.0  # seconds without a byte after which a server counts as out of reach
KAGGLE = "kaggle:<owner>/<set>"
_KAGGLE = re.compile(r"([\w.-]+/[\w.-]+(?:/versions/\d+)?)(?:/(.+))?")
_DEPTH = 8
_REMEDY = ". Where there is a network this fetches it: "


@dataclass(frozen=True)
class SourceOptions:
    """A published set as ``--data`` names it, ``kind:name[:variant][@version][@folder]``; `str` gives that again."""

    kind: str
    name: str
    variant: str = ""
    version: str = ""
    folder: str = ""  # absolute

    @classmethod
    def parse(cls, kind: str, text: str, *, with_folder: bool = True) -> SourceOptions:
        """Of what stands behind ``kind:``. A folder has a ``/`` in its name, or is there."""
        name, *words = text.split("@")
        folder = ""
        for place, word in enumerate(words):
            is_folder = "/" in word or word.startswith((".", "~")) or (os.path.isdir(word) and not word.isdigit())
            if with_folder and is_folder:
                folder = os.path.abspath(os.path.expanduser("@".join(words[place:])))
                words = words[:place]
                break
        name, _, variant = name.partition(":")
        return cls(kind, name, variant, "@".join(words), folder)

    def __str__(self) -> str:
        signs = ((":", self.variant), ("@", self.version), ("@", self.folder))
        return f"{self.kind}:{self.name}" + "".join(f"{sign}{word}" for sign, word in signs if word)


def data_folder(default: Path) -> Path:
    """Where published data sets are looked for and put: ``$FEATURECACHE_DATA``, else ``default``."""
    return Path(os.environ.get(VARIABLE) or default).expanduser().absolute()


def not_here(what: str, where: str | Path, source: object, copy: str) -> NotFetched:
    """The sentence about a data set that is not on this machine; ``copy``: how one that the user has is named."""
    fetch = f"python -c \"import featurecache; featurecache.open_source('{source}')\""
    return NotFetched(f"{what} is not on this machine (looked in {where}){_REMEDY}{fetch}   A copy you have: {copy}")


@contextlib.contextmanager
def fetching(absent: NotFetched) -> Iterator[None]:
    """Whatever goes wrong inside is said in the sentence of `not_here`. Talk goes to stderr, and a server that is
    silent for ``PATIENCE`` is given up (most loaders wait for ever)."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SourceError:
        raise
    except Exception as error:  # loaders raise whatever their HTTP library does
        tried = f" and could not be fetched ({first_line(error)}){_REMEDY}"
        raise NotFetched(str(absent).replace(_REMEDY, tried, 1)) from error
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


# -- Kaggle


@dataclass(frozen=True)
class _KaggleSet:
    handle: str  # owner/set, or owner/set/versions/n
    inside: str

    @property
    def name(self) -> str:
        return self.handle.partition("/versions/")[0]

    @property
    def place(self) -> Path:
        """Where kagglehub keeps it: <n>.complete and versions/<n> for each version (kagglehub/cache.py)."""
        cache = os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub"
        return Path(cache).expanduser().absolute() / "datasets" / self.name

    def __str__(self) -> str:
        return f"kaggle:{self.handle}" + (f"/{self.inside}" if self.inside else "")

    def versions(self) -> list[int]:
        """Those that were unpacked to the end, as kagglehub marks them."""
        marks = [int(path.stem) for path in self.place.glob("*.complete") if path.stem.isdigit()]
        wanted = [number for number in marks if self.handle in (self.name, f"{self.name}/versions/{number}")]
        return [number for number in wanted if (self.place / "versions" / str(number)).is_dir()]


def open_kaggle(
    words: str, columns: dict[str, str] | None, task: str | None, open_path: Callable[..., Dataset], **levels: int
) -> Dataset:
    """The set of ``words`` from kagglehub's folder; ``open_path`` opens what lies there. Raises NotFetched."""
    options = _parse_kaggle(words)
    versions = options.versions()
    if not versions:
        raise not_here(options.handle, options.place, options, "--data FOLDER, once it is unpacked")
    options = replace(options, handle=f"{options.name}/versions/{max(versions)}")
    top = options.place / "versions" / str(max(versions))
    inner = top / options.inside
    if not inner.exists() or not inner.resolve().is_relative_to(top.resolve()):
        there = abbreviated(sorted(os.listdir(top)))
        raise SourceError(f"there is no {options.inside} in {options.handle} ({top}); it has {there}.")
    dataset = open_path(str(_down(options, top, inner)), columns=columns, task=task, **levels)
    return replace(dataset, name=options.name.split("/")[1], source={"data": str(options)})


def fetch_kaggle(words: str) -> None:
    """Let kagglehub download the set of ``words``. Raises SourceError."""
    options = _parse_kaggle(words)
    place = package("kagglehub", "kaggle", f"to fetch {options.handle}").dataset_download(options.handle)
    if not options.versions():
        raise SourceError(
            f"kagglehub mounts {options.handle} at {place}, as in notebooks: give --data {shell_word(place)}"
        )


def _down(options: _KaggleSet, top: Path, folder: Path) -> Path:
    """The folder, or the only table, that holds the data. Raises SourceError where that cannot be told."""
    for _ in range(_DEPTH):
        if folder.is_file():
            return folder
        files, inner = list_folder(str(folder))
        tables = [name for name in files if is_table(name) or name.lower().endswith(".npz")]
        if any(map(is_image, files)) or (len(inner) > 1 and not tables):
            return folder
        there = [*inner, *tables]
        if not there:
            raise SourceError(f"{options.handle} holds no folder of images and no table ({folder}).")
        if len(there) > 1:
            such = abbreviated(
                [str(replace(options, inside=str((folder / name).relative_to(top)))) for name in there], 3
            )
            raise SourceError(f"{options.handle} holds {abbreviated(there)}: say which, such as {such}.")
        folder = folder / there[0]
    return folder


def _parse_kaggle(words: str) -> _KaggleSet:
    match = _KAGGLE.fullmatch(words.strip("/"))
    if not match or ".." in words.split("/"):
        expected = f'expected {KAGGLE}, such as "kaggle:owner/chest-xrays"'
        raise SourceError(f"kaggle:{words} is no name of a data set; {expected}.")
    return _KaggleSet(match[1], match[2] or "")
