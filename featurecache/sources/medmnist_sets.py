"""``medmnist:<name>[@28|64|128|224][@folder]``: the twelve 2D sets of MedMNIST v2, as their publishers have them.

The file is looked for in the folder that was given, in ``$FEATURECACHE_DATA`` and in the package's own ``~/.medmnist``;
only where it is in none of them does the package (extra ``medmnist``) say where it is to be had, and its MD5.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from featurecache.dataset import Dataset, safe_name, source_record
from featurecache.errors import NotFetched, SourceError, nearest
from featurecache.sources.fetching import VARIABLE, at_place, beside, fetching, not_here, package
from featurecache.sources.medmnist_names import MEDMNIST
from featurecache.sources.npz import open_npz

SIZES = ("28", "64", "128", "224")  # pixels; a file without a number in its name has 28
FORM = "medmnist:<name>[@28|64|128|224][@folder]"


@dataclass(frozen=True)
class _Asked:
    name: str
    size: str
    folder: str | None

    @property
    def stem(self) -> str:
        return self.name if self.size == "28" else f"{self.name}_{self.size}"

    @property
    def words(self) -> str:
        return f"medmnist:{self.name}@{self.size}" + (f"@{self.folder}" if self.folder else "")

    @property
    def places(self) -> list[Path]:
        """Folders in which the file may lie; it is fetched into the first."""
        if self.folder:
            return [Path(self.folder)]
        given = os.environ.get(VARIABLE)
        return [*([Path(given).expanduser().absolute()] if given else []), Path.home() / ".medmnist"]


def open_medmnist(words: str, asked_task: str | None) -> Dataset:
    """The set of ``words``, from a file on this machine. Raises NotFetched where there is none."""
    asked = _parse(words)
    for folder in asked.places:
        file = folder / f"{asked.stem}.npz"
        if file.is_file():
            record = source_record("medmnist", asked.words, None, asked_task)
            return replace(open_npz(str(file), asked_task), name=safe_name(asked.stem), source=record)
    raise _absent(asked)


def fetch_medmnist(words: str) -> None:
    """Download the file of ``words`` from where the package says. Raises SourceError."""
    asked = _parse(words)
    infos = package("medmnist.info", "medmnist", f"to fetch {asked.name}").INFO
    if asked.name not in infos:
        raise SourceError(f"the installed medmnist does not know {asked.name}: pip install --upgrade medmnist.")
    info, size = infos[asked.name], "" if asked.size == "28" else f"_{asked.size}"
    if f"url{size}" not in info:
        raise SourceError(
            f"the installed medmnist has {asked.name} at 28 px only: pip install --upgrade medmnist (3 or newer)."
        )
    from torchvision.datasets.utils import download_url

    with fetching(partial(_absent, asked)), beside(asked.places[0], asked.stem) as draft:
        download_url(info[f"url{size}"], str(draft), f"{asked.stem}.npz", info[f"MD5{size}"])


def _parse(words: str) -> _Asked:
    (name, *sizes), folder = at_place(words)
    name = name.lower()
    if name not in MEDMNIST:
        raise SourceError(
            f'MedMNIST has no 2D set called "{name}".{nearest(name, MEDMNIST)} It has {", ".join(sorted(MEDMNIST))}.'
        )
    if len(sizes) > 1 or (sizes and sizes[0] not in SIZES):
        raise SourceError(f'medmnist:{words}: "{"@".join(sizes)}" is no size; it is {", ".join(SIZES)} ({FORM}).')
    return _Asked(name, sizes[0] if sizes else "28", folder)


def _absent(asked: _Asked, why: str = "") -> NotFetched:
    places = " and ".join(map(str, asked.places))
    return not_here(f"{asked.stem}.npz", places, asked.words, f"--data medmnist:{asked.name}@{asked.size}@FOLDER", why)
