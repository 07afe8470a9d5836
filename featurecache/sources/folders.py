"""Images in folders: as they lie, in class folders, or in class folders below split folders.

    chest/*.png                         no labels
    chest/NORMAL/*.png                  a class for each folder (whatever lies deeper belongs to it)
    chest/train/NORMAL/*.png            a split for each folder, then classes
    chest/test/*.png                    a split without labels

Which of them it is follows from the names of the folders. Ids are paths below the folder, with ``/``, sorted as
bytes. What cannot be told (images beside class folders, folders beside split folders) is an error and not a guess.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from featurecache.errors import SourceError
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset, ImageFiles
from featurecache.sources.dicom_frames import EXTENSIONS as DICOM
from featurecache.sources.dicom_frames import PICTURES, is_dicom_file, may_be_dicom
from featurecache.sources.labels import SPLITS, class_labels, resolve_labels

EXTENSIONS = (*PICTURES, *DICOM)
_NOT_DATA = "__MACOSX"  # beside what begins with a dot
_CSV = "or list the images you mean in a CSV (columns path, label, split)"


@dataclass
class _Tree:
    """What was found below a folder."""

    ids: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)  # visible ones → images in them, however deep
    ignored: Counter[str] = field(default_factory=Counter)  # by extension
    loops: list[str] = field(default_factory=list)


def open_folder(data: str, task: str | None, *, without: Sequence[str] = ()) -> Dataset:
    """The dataset in the folder ``data`` (an absolute path); ``without`` names folders in it that are left out."""
    tree = _Tree()
    _walk(data, "", (), tree, without)
    if not tree.ids:
        others = f"only other files ({kinds_text(tree.ignored)})"
        there = others if tree.ignored else "empty folders" if tree.folders else "nothing"
        raise SourceError(f"no images in {data}: found {there}, expected files ending in {abbreviated(EXTENSIONS, 8)}.")
    tree.ids.sort()  # by code points, which for UTF-8 is the order of the bytes
    splits, names = _layout(data, tree.ids)
    classes = sorted(set(names) - {""})
    notes = _class_notes(data, tree, splits, names, classes)
    if tree.loops:
        back = abbreviated(sorted(tree.loops), 3)
        notes.insert(0, f"Links that lead back to a folder above them were not followed: {back}.")
    if many := tree.ignored.total():
        notes.insert(0, f"{many:,} files are no images by their names and were ignored ({kinds_text(tree.ignored)}).")
    return Dataset(
        name=os.path.basename(data),
        ids=tree.ids,
        **resolve_labels(class_labels(names, classes), classes, task, data)._asdict(),
        splits=splits,
        images=ImageFiles(data, tree.ids),
        notes=tuple(notes),
    )


def is_image(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def kinds_text(counts: Mapping[str, int]) -> str:
    """The most frequent kinds of files with their numbers."""
    return ", ".join(f"{kind or 'no extension'} {count:,}" for kind, count in Counter(counts).most_common(4))


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Names of the visible files and of the folders in ``folder``, sorted; none where there is no such folder. No file
    is opened; where the listing tells files from folders, none is even looked at (a second or so for 100,000)."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith((".", _NOT_DATA))]
            inner = {entry.name for entry in visible if _is_folder(entry)}
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as error:
        raise SourceError(f"the folder {folder} cannot be read ({error.strerror}).") from error
    return sorted(entry.name for entry in visible if entry.name not in inner), sorted(inner)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(
    folder: str, below: str, parents: tuple[tuple[int, int], ...], tree: _Tree, without: Sequence[str] = ()
) -> None:
    files, inner = list_folder(folder)
    if not files and not inner:
        return
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in parents:  # a symbolic link to a folder above
        tree.loops.append(below.rstrip("/"))
        return
    for name in files:
        if is_image(name) or (may_be_dicom(name) and is_dicom_file(os.path.join(folder, name))):
            tree.ids.append(below + name)
        else:
            tree.ignored[os.path.splitext(name)[1].lower()] += 1
    for name in inner:
        if name not in without:
            before = len(tree.ids)
            _walk(os.path.join(folder, name), f"{below}{name}/", (*parents, here), tree)
            tree.folders[below + name] = len(tree.ids) - before


def _layout(data: str, ids: list[str]) -> tuple[list[str], list[str]]:
    """The split and the class of each image; empty strings where there is none."""
    none, tops_of = [""] * len(ids), [sys.intern(image.split("/", 1)[0]) for image in ids]
    loose = [image for image in ids if "/" not in image]
    tops = sorted(set(tops_of) - set(loose))
    if not tops:
        return none, none
    above = [top for top in tops if top.lower() in SPLITS]
    if not above:
        _refuse_loose(data, loose, tops)
        _refuse_splits_below(data, ids, tops)
        return none, tops_of
    if beside := [*(top for top in tops if top not in above), *loose]:
        there = f"split folders ({abbreviated(above)}) and beside them images in {abbreviated(beside)}"
        raise SourceError(f"{data} has {there}, which belong to no split. Move those away, {_CSV}.")
    names = [sys.intern(image.split("/", 2)[1]) if image.count("/") > 1 else "" for image in ids]
    pairs = set(zip(tops_of, names, strict=True))
    for top in above:
        classes = sorted(name for split, name in pairs if split == top and name)
        loose = [image.split("/")[1] for image in ids if image.startswith(f"{top}/") and image.count("/") == 1]
        if classes:
            _refuse_loose(f"{data}/{top}", loose, classes)
    return [SPLITS[top.lower()] for top in tops_of], names


def _refuse_loose(folder: str, loose: list[str], classes: list[str]) -> None:
    if loose:
        there = f"images ({abbreviated(loose, 3)}) beside class folders ({abbreviated(classes, 3)})"
        raise SourceError(f"{folder} holds {there}: of which class are they? Move them, {_CSV}.")


def _refuse_splits_below(data: str, ids: list[str], classes: list[str]) -> None:
    """Split folders below class folders, or one level too deep: taken for classes they would be lost."""
    shared = os.path.commonpath([os.path.dirname(image) for image in ids]).split("/")
    inner = next((depth for depth, name in enumerate(shared) if name.lower() in SPLITS), len(shared))
    if len(classes) == 1 and any(image.split("/", inner + 1)[inner].lower() in SPLITS for image in ids):
        raise SourceError(f"the split folders are further down: give {data}/{'/'.join(shared[:inner])}.")
    pairs = {tuple(image.split("/", 2)[:2]) for image in ids if image.count("/") >= 2}
    if below := sorted(pair for pair in pairs if pair[1].lower() in SPLITS):
        there = f"split folders below class folders ({'/'.join(below[0])})"
        raise SourceError(f"{data} has {there}; expected above: {below[0][1]}/{below[0][0]}. Move them, {_CSV}.")


def _class_notes(data: str, tree: _Tree, splits: list[str], names: list[str], classes: list[str]) -> list[str]:
    """Refuses class folders without any image; says which splits lack a class."""
    empty = sorted(folder for folder, images in tree.folders.items() if not images)
    at_depth = [folder for folder in empty if folder.count("/") == any(splits) and folder.lower() not in SPLITS]
    if gone := [folder for folder in at_depth if classes and folder.split("/")[-1] not in classes]:
        none = f"holds no image ({abbreviated(EXTENSIONS, 3)})"
        raise SourceError(f"the class folder {data}/{gone[0]} {none}. Put its images there, or remove it.")
    notes = [f"The folder {folder} is empty." for folder in empty if folder.lower() in SPLITS]
    if len(classes) == 1:
        notes.append(f"There is one class only, {classes[0]}; if the classes lie deeper, give the folder above them.")
    pairs = set(zip(splits, names, strict=True))
    for split in dict.fromkeys(splits):
        absent = [name for name in classes if (split, name) not in pairs]
        if split and classes and len(absent) == len(classes):
            notes.append(f"The images of {split} have no class folders and so no labels.")
        elif split and absent:
            notes.append(f"{split} has no images of {abbreviated(absent)}.")
    return notes
