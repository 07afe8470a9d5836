"""``kaggle:<owner>/<set>[/versions/<n>][/inside]``: a data set of Kaggle, opened as the folder or table that it is.

The copy that kagglehub (extra ``kaggle``) keeps on this machine is looked for first, without kagglehub; of several
versions the newest. What is opened is the first folder, going down, that holds more than one other folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from featurecache.dataset import Dataset, few, safe_name, source_record
from featurecache.errors import NotFetched, SourceError
from featurecache.sources.fetching import fetching, not_here, package
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
            f"there is no {asked.inside} in {asked.handle} ({top}); it has {few(sorted(os.listdir(top)))}."
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
            raise SourceError(f"{asked.handle} holds {few([*inner, *tables])}: say which, such as {few(choices, 3)}.")
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
