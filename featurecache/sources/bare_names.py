"""The files that a table names. Published tables often name them from the folder above, or without their folders, or
without their ending:

    CheXpert-v1.0-small/train.csv   CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
    Data_Entry_2017.csv             00000001_000.png       of images_001/images/00000001_000.png
    HAM10000_metadata.csv           ISIC_0027419           of HAM10000_images_part_1/ISIC_0027419.jpg

Where none of the first names is beside the table, the folder above is tried; and names without a folder are looked for
in those below. A name that is there twice is refused, one that is nowhere is a named failure when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from featurecache.dataset import Files, few
from featurecache.errors import SourceError
from featurecache.sources.folders import is_image

_LOOKED_AT = 20  # paths tried at opening


def files_named(folder: str, names: list[str]) -> tuple[Files, list[str]]:
    """The files of ``names``, relative to ``folder``; what to say where the first of them are not there. Raises
    SourceError."""
    images = Files(folder, names)
    tried, above = range(min(_LOOKED_AT, len(names))), Files(os.path.dirname(folder), names)
    if any(os.path.exists(images.path(row)) for row in tried):
        return images, []
    if "/" in names[0] and any(os.path.exists(above.path(row)) for row in tried):
        return above, [f"Paths are relative to {above.root}, the folder above that of the table."]
    places = [] if any("/" in name for name in names) else _located(folder, names)
    found = [place for place, name in zip(places, names, strict=False) if place != name]
    if found:
        counts = f"{len(found):,} of {len(names):,}"
        return Files(folder, places), [f"The table gives bare names: {counts} were found in the folders below it."]
    first = images.path(0)
    stem = f"; {first}.png would be: the paths lack their ending" if os.path.exists(first + ".png") else ""
    return images, [
        f"None of the first {len(tried):,} images is there (looked for {first}{stem}). Paths are relative to {folder}."
    ]


def _located(folder: str, names: Sequence[str]) -> list[str]:
    """The path of each name below ``folder``; the name itself where it is nowhere. Raises SourceError."""
    places: dict[str, list[str]] = {name: [] for name in names}
    for path in _images_below(folder):
        name = os.path.basename(path)
        for word in (name, os.path.splitext(name)[0]):
            if word in places:
                places[word].append(path)
    twice = next((name for name, found in places.items() if len(found) > 1), None)
    if twice is not None:
        raise SourceError(
            f"{twice} stands for {few(sorted(places[twice]), 3)} in {folder}; expected one file of that name. Remove "
            "the others, or write the paths with their folders."
        )
    return [found[0] if found else name for name, found in places.items()]


def _images_below(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            if is_image(name) and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)
