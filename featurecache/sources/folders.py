"""Images in folders: which files are images, and what the folders above them say of splits, classes and persons.

    chest/*.png                         no labels
    chest/NORMAL/*.png                  a class for each folder (whatever lies deeper belongs to it)
    chest/train/NORMAL/*.png            a split for each folder, then classes
    chest/test/*.png                    a split without labels

What the names say is read in `featurecache.sources.layout`. Ids are paths below the folder, with ``/``, sorted as
bytes. Left out, and counted, are masks, what this tool wrote itself, for it is never data, and folders of systems, of
thumbnails and hidden ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featurecache.errors import SourceError, UnknownSourceName, UnreadableImage, nearest
from featurecache.formatting import abbreviated, counted
from featurecache.sources.base import Dataset, ImageFiles, as_unreadable, open_image_file
from featurecache.sources.dicom_frames import EXTENSIONS as DICOM
from featurecache.sources.dicom_frames import PICTURES, is_dicom_file, may_be_dicom
from featurecache.sources.label_cells import LabelOptions
from featurecache.sources.labels import class_labels, groups_or_ids, resolve_labels
from featurecache.sources.layout import FolderLayout, read_layout
from featurecache.sources.vocabulary import in_order, one_spelling, refuse_letter_case, spelling_key, split_name

EXTENSIONS = (*PICTURES, *DICOM)
# Folders of systems and of thumbnails, lower case; beside what begins with a dot.
_NOT_DATA = {
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbnails", "#recycle",
}  # fmt: skip
# The record of a folder, and keys that it has and a stranger's file of that name has not.
_RECORDS = {
    "spec.json": {"fingerprint", "spec", "provenance"},
    "config.json": {"head", "view", "settings", "calibration", "splits"},
    "sweep.json": {"frame", "views", "asked"},
    "study.json": {"study", "asked", "images"},
    "metrics.json": {"families", "select"},
    "explain.json": {"format", "maps", "files"},
    "finetuned.json": {"provider", "name", "vector", "image_size", "sized"},
}
SHEET = ("Software", "featurecache contact sheet")  # a tEXt chunk, the first behind the header of 33 bytes
_STAMP = b"tEXt" + "\0".join(SHEET).encode()


@dataclass
class _Tree:
    """What was found below a folder."""

    ids: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)  # visible ones → images in them, however deep
    own: list[str] = field(default_factory=list)  # what this tool wrote
    systems: Counter[str] = field(default_factory=Counter)  # folders of systems, thumbnails and hidden ones, by name
    ignored: Counter[str] = field(default_factory=Counter)  # by extension
    loops: list[str] = field(default_factory=list)


def open_folder(
    data: str, task: str | None, *, classes_at: int | None = None, leave_out: Sequence[str] = (),
    letter_case: str | None = None,
) -> Dataset:  # fmt: skip
    """The dataset in the folder ``data`` (an absolute path). ``classes_at``: the level of the class folders, where they
    do not say it themselves; ``leave_out``: folders in it (by their paths below it) that are no part of it;
    ``letter_case``: see `one_spelling`."""
    how = LabelOptions(task, letter_case=letter_case)
    refuse_own_output(data)
    tree = _tree_of(data, leave_out)
    layout = read_layout(tree.ids, data, classes_at)
    ids, (names, spellings) = [tree.ids[row] for row in layout.rows], _spelt(layout, data, how.letter_case)
    classes = in_order(set(names) - {""}, None, None, data)
    notes = _class_notes(data, tree, layout, names, classes)
    if tree.loops:
        back = abbreviated(sorted(tree.loops), 3)
        notes.insert(0, f"Links that lead back to a folder above them were not followed: {back}.")
    if many := tree.ignored.total():
        notes.insert(0, f"{counted(many, 'file')} ignored, by name no image ({kinds_text(tree.ignored)}).")
    return Dataset(
        name=os.path.basename(data),
        ids=ids,
        **resolve_labels(class_labels(names, classes), classes, task, data)._asdict(),
        splits=layout.splits,
        groups=None if layout.groups is None else groups_or_ids(layout.groups, ids),
        meta={} if layout.folds is None else {"fold": layout.folds},
        images=ImageFiles(data, ids),
        notes=tuple(notes),
        understood=(*layout.remarks, *spellings, *_left_out(tree, leave_out)),
    )


def open_images_below(data: str) -> Dataset:
    """All images in and below the folder ``data`` (an absolute path), without labels: what is to be predicted."""
    ids = _tree_of(data).ids
    none = resolve_labels(np.full(len(ids), -1, np.int64), [], None, data)._asdict()
    return Dataset(name=os.path.basename(data), ids=ids, **none, splits=[""] * len(ids), images=ImageFiles(data, ids))


def _tree_of(data: str, leave_out: Sequence[str] = ()) -> _Tree:
    """The images below a folder. Raises SourceError where there are none."""
    tree, out = _Tree(), [os.path.normpath(name) for name in leave_out]
    for name in out:
        above, last = os.path.split(name)
        if last in (".", "..") or not os.path.isdir(os.path.join(data, name)) or os.path.isabs(name):
            near = nearest(last, list_folder(os.path.join(data, above))[1])
            raise UnknownSourceName(f"--leave-out {name}: there is no such folder in {data}.{near}")
    _walk(data, "", (), tree, out)
    if not tree.ids:
        others = f"only other files ({kinds_text(tree.ignored)})"
        there = others if tree.ignored else "empty folders" if tree.folders else "nothing"
        there = f"only what featurecache wrote ({abbreviated(tree.own, 3)})" if tree.own else there
        raise SourceError(f"no images in {data}: found {there}, expected files ending in {abbreviated(EXTENSIONS, 8)}.")
    tree.ids.sort()  # by code points, which for UTF-8 is the order of the bytes
    return tree


def _spelt(layout: FolderLayout, data: str, letter_case: str | None) -> tuple[list[str], list[str]]:
    """The class of each image in one spelling, and what to say of others. Raises SeveralReadings where folders that lie
    in one and differ in case may be one class or two, SourceError where they differ in less."""
    for case in ("keep", "ignore") if letter_case is None else ("keep",):
        beside: dict[tuple[str, str], set[str]] = {}
        for folder in set(layout.folders) - {""}:
            above, _, name = folder.rpartition("/")
            beside.setdefault((above, spelling_key(name, case)), set()).add(name)
        if two := next((sorted(names) for names in beside.values() if len(names) > 1), None):
            if case == "ignore":
                refuse_letter_case(f"one folder of {data}", two)
            raise SourceError(f"{data} has {' and '.join(map(ascii, two))} in one folder: rename one.")
    chosen, notes = one_spelling(Counter(name for name in layout.classes if name), data, letter_case)
    return [chosen.get(name, "") for name in layout.classes], [note.rstrip(".") for note in notes]


def _left_out(tree: _Tree, told: Sequence[str]) -> list[str]:
    own = [f"left out as told ({abbreviated(told, 3)})"] if told else []
    own += [f"what featurecache wrote left out ({abbreviated(tree.own, 3)})"] if tree.own else []
    many, names = tree.systems.total(), abbreviated([f"{name}/" for name in sorted(tree.systems)], 3)
    return own + ([f"{counted(many, 'folder')} of systems left out ({names})"] if many else [])


def is_image(name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def kinds_text(counts: Mapping[str, int]) -> str:
    """The most frequent kinds of files with their numbers."""
    return ", ".join(f"{kind or 'no extension'} {count:,}" for kind, count in Counter(counts).most_common(4))


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Names of the visible files and of the folders in ``folder``, sorted; none where there is no such folder. No file
    is opened; where the listing tells files from folders, none is even looked at (a second or so for 100,000)."""
    return _list(folder)[:2]


def _list(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Visible files; folders; those that are no data (see ``_NOT_DATA``)."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
            inner = {entry.name for entry in found if _is_folder(entry)}
    except (FileNotFoundError, NotADirectoryError):
        return [], [], []
    except OSError as error:
        raise SourceError(f"the folder {folder} cannot be read ({error.strerror}).") from error
    hidden = {entry.name for entry in found if entry.name.startswith(".") or entry.name.lower() in _NOT_DATA}
    files = sorted(entry.name for entry in found if entry.name not in inner | hidden)
    return files, sorted(inner - hidden), sorted(inner & hidden)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(
    folder: str, below: str, parents: tuple[tuple[int, int], ...], tree: _Tree, leave_out: Sequence[str] = ()
) -> None:
    files, inner, hidden = _list(folder)
    tree.systems.update(hidden)
    if not files and not inner:
        return
    if below and is_own_output(folder, files):
        tree.own.append(below)
        return
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in parents:  # a symbolic link to a folder above
        tree.loops.append(below.rstrip("/"))
        return
    for name in files:
        if is_own_sheet(os.path.join(folder, name)):
            tree.own.append(below + name)
        elif is_image(name) or (may_be_dicom(name) and is_dicom_file(os.path.join(folder, name))):
            tree.ids.append(below + name)
        else:
            tree.ignored[os.path.splitext(name)[1].lower()] += 1
    for name in inner:
        if below + name not in leave_out:
            before = len(tree.ids), len(tree.own)
            _walk(os.path.join(folder, name), f"{below}{name}/", (*parents, here), tree, leave_out)
            if len(tree.own) == before[1] or len(tree.ids) > before[0]:  # a cache is no empty class
                tree.folders[below + name] = len(tree.ids) - before[0]


def _class_notes(data: str, tree: _Tree, layout: FolderLayout, names: list[str], classes: list[str]) -> list[str]:
    """Refuses class folders without any image; says which splits lack a class."""
    empty = sorted(folder for folder, images in tree.folders.items() if not images)
    splits = [folder for folder in empty if "/" not in folder and split_name(folder)]
    keys = set(map(spelling_key, classes))
    above = {folder.rpartition("/")[0] for folder in layout.folders if folder}
    at_level = [folder for folder in empty if folder.rpartition("/")[0] in above and folder not in splits]
    if gone := [folder for folder in at_level if spelling_key(folder.rpartition("/")[2]) not in keys]:
        none = f"holds no image ({abbreviated(EXTENSIONS, 3)})"
        raise SourceError(f"the class folder {data}/{gone[0]} {none}. Put its images there, or remove it.")
    notes = [f"The folder {folder} is empty." for folder in splits]
    if len(classes) == 1:
        notes.append(f"There is one class only, {classes[0]}; if the classes lie deeper, --classes-at says where.")
    pairs = set(zip(layout.splits, names, strict=True))
    for split in dict.fromkeys(layout.splits):
        absent = [name for name in classes if (split, name) not in pairs]
        if split and classes and len(absent) == len(classes):
            notes.append(f"The images of {split} have no class folders and so no labels.")
        elif split and absent:
            notes.append(f"{split} has no images of {abbreviated(absent)}.")
    return notes


# -- what this tool wrote: a name says nothing, for a class may be called runs, a picture sheet.png. A folder (a store,
# a run, a sweep, a study, a report, maps, a fine-tuned network) is known by the keys of the record in it, a contact
# sheet by the software that its PNG names.


def is_own_output(folder: str, files: Sequence[str]) -> bool:
    """Whether this tool wrote ``folder``, by the record among its ``files``."""
    for name in _RECORDS.keys() & set(files):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as opened:
                content = json.load(opened)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and content.keys() >= _RECORDS[name]:
            return True
    return False


def is_own_sheet(path: str) -> bool:
    """Whether a file is a contact sheet of ours: of a PNG 80 bytes are read, some 10 µs, where its digest takes all."""
    if not path.lower().endswith(".png"):
        return False
    try:
        with open_image_file(path) as (descriptor, _), as_unreadable(path):
            return os.read(descriptor, 80)[37:].startswith(_STAMP)
    except UnreadableImage:  # said when it is read
        return False


def refuse_own_output(data: str) -> None:
    """Raises SourceError where the folder ``data`` is, or lies in, what this tool wrote."""
    folder = data
    while True:
        if is_own_output(folder, list(_RECORDS)):
            what = "was written by featurecache" if folder == data else f"lies in {folder}, which featurecache wrote"
            raise SourceError(f"{data} {what}: expected a folder of your images.")
        if folder == (folder := os.path.dirname(folder)):
            return
