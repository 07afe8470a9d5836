"""Image paths of a table: where the files lie that its rows name.

Published tables name files from the folder above, without their folders, without their ending, with back-slashes, in
other case or Unicode form, or from the root of another machine:

    CheXpert-v1.0-small/train.csv   CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
    Data_Entry_2017.csv             00000001_000.png       of images_001/images/00000001_000.png
    HAM10000_metadata.csv           ISIC_0027419           of HAM10000_images_part_1/ISIC_0027419.jpg
    list.csv                        /kaggle/input/set/img/0.png

What says the same (back-slashes, a missing ending, another Unicode form or case, where one file alone fits) is taken
and said. Another root is taken where ``--root`` names it, and else refused with what to type. A name that is there
twice is refused; one of many that is nowhere is a named failure when it is read; where none is there, it is refused.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property

from featurecache.errors import SourceError
from featurecache.files.storage import is_address
from featurecache.formatting import abbreviated, shell_word
from featurecache.sources.base import ImageFiles
from featurecache.sources.dicom_frames import split_frame
from featurecache.sources.folders import is_image

_TRIED = 20  # paths tried for each way to read them
_LEVELS = 12  # leading folders of a path that may be those of another machine


class _Below:
    """The image files below a folder, listed when first needed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> list[str]:
        paths = []
        for place, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
            inner = "" if place == self.folder else os.path.relpath(place, self.folder) + "/"
            paths += [inner + file for file in files if is_image(file) and not file.startswith(".")]
        return paths


def image_files(folder: str, names: list[str], root: str | None = None) -> tuple[ImageFiles, list[str]]:
    """The files of ``names``, relative to ``folder`` or to ``root``, and what was understood. Raises SourceError."""
    if addresses := [name for name in names if re.match(r"^[a-z][a-z0-9+]+://", name)]:
        way = "fetch the images first, and list their paths"
        if is_address(addresses[0]):
            folder = addresses[0].rpartition("/")[0]
            way = f"list paths below one folder, and name that with --root, such as --root {shell_word(folder)}"
        raise SourceError(f"{addresses[0]} is an address, not a file; {way}.")
    base = folder if root is None else os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(base):
        raise SourceError(f"--root {root}: there is no such folder.")
    notes: list[str] = []
    slashed = [name.replace("\\", "/") for name in names]
    if slashed != names and not _any_there(base, names):
        notes, names = ["back-slashes in the paths read as slashes"], slashed
    if _any_there(base, names):
        return ImageFiles(base, names), notes
    above = os.path.dirname(base)
    if root is None and "/" in names[0] and _any_there(above, names):
        own, notes = f"{os.path.basename(base)}/", [*notes, "paths relative to the folder above that of the table"]
        if all(name.startswith(own) for name in names):  # in object storage nothing above has an address here
            return ImageFiles(base, [name.removeprefix(own) for name in names]), notes
        return ImageFiles(above, names), notes
    if root is not None and (shorter := _without_first_folders(base, names)):
        paths, level = shorter
        return ImageFiles(base, paths), [*notes, f"the first {level} folders of the paths left out"]
    below = _Below(base)
    if located := _read_otherwise(below, names):
        return ImageFiles(base, located[0]), [*notes, located[1]]
    if any(_exists(base, name) for name in names):  # not among the first
        return ImageFiles(base, names), notes
    raise SourceError(_nowhere(below, names, root))


def _any_there(base: str, names: Sequence[str]) -> bool:
    return any(_exists(base, name) for name in names[:_TRIED])


def _exists(base: str, name: str) -> bool:
    return os.path.exists(os.path.join(base, split_frame(name)[0]))


def _without_first_folders(base: str, names: list[str]) -> tuple[list[str], int] | None:
    for level in range(1, _LEVELS):
        shorter = ["/".join(name.strip("/").split("/")[level:]) or name for name in names]
        if _any_there(base, shorter):
            return shorter, level
    return None


# -- names that are no paths as they stand


def _read_otherwise(below: _Below, names: list[str]) -> tuple[list[str], str] | None:
    """All paths, and what was understood; None where no way to read the names has a file."""
    bare = not any("/" in name for name in names)
    for what, form in _FORMS.items():
        paths = _paths_alike(below, names, form, bare=bare, any_ending=what == "ending")
        located = [k for k, path in enumerate(paths) if path != names[k]]
        if not located:
            continue
        if what:
            return paths, f"files found by paths that differ in their {what}"
        if bare:
            counts = f"{len(located):,} of {len(names):,}"
            return paths, f"bare names: {counts} found in the folders below the table"
        return paths, "paths without ending: the files have one"
    return None


def _paths_alike(
    below: _Below, names: list[str], form: Callable[[str], str], *, bare: bool, any_ending: bool
) -> list[str]:
    """The file of each name that is alike by ``form``, with or without its ending; the name itself where there is none.
    Raises SourceError where there are two."""
    files: dict[str, set[str]] = defaultdict(set)
    for path in below.files:
        scope = os.path.basename(path) if bare else path
        files[form(scope)].add(path)
        files[form(_stem(scope))].add(path)
    paths = []
    for name in names:
        key = os.path.normpath(name)
        there = files.get(form(_stem(key) if any_ending else key), set())
        if len(there) > 1:
            several = f"{abbreviated(sorted(there), 3)} in {below.folder}; expected one file of that name"
            raise SourceError(f"{name} stands for {several}. Remove the others, or write the paths with their folders.")
        paths.append(next(iter(there), name))
    return paths


def _stem(path: str) -> str:
    return os.path.splitext(path)[0] if is_image(path) else path


# What the path of a table and that of its file may differ in -> what is compared instead.
_FORMS: dict[str, Callable[[str], str]] = {
    "": str,
    "Unicode form": lambda path: unicodedata.normalize("NFC", path),
    "case": lambda path: unicodedata.normalize("NFC", path).casefold(),
    "ending": lambda path: unicodedata.normalize("NFC", path).casefold(),
}


def _nowhere(below: _Below, names: list[str], root: str | None) -> str:
    """No image is there: where it was looked for, and whether the same file lies elsewhere below."""
    base = below.folder
    first, number = os.path.join(base, names[0]), f"{len(names):,} images" if len(names) > 1 else "images"
    parts = names[0].strip("/").split("/")
    where = "Paths are relative to the table" if root is None else f"Paths are relative to --root {root}"
    text = f"None of the {number} of the table is there: looked for {first}. {where}"
    ends = [path for path in below.files if os.path.basename(path) == parts[-1]]
    if len(ends) == 1:
        tail = next(level for level in range(len(parts)) if ends[0].endswith("/".join(parts[level:])))
        shared = "/".join(parts[tail:])
        top = os.path.normpath(os.path.join(base, ends[0].removesuffix(shared)))
        return f"{text}; {shared} lies in {top}: --root {shell_word(top)} takes the paths from there."
    return f"{text}; --root DIR names another folder."
