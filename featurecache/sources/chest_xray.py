"""The chest X-rays of children of Kermany et al. (2018), as Kaggle and Mendeley have them: what the file names say.

    train/NORMAL/IM-0115-0001.jpeg             train/NORMAL/NORMAL2-IM-0592-0001.jpeg
    train/PNEUMONIA/person1_bacteria_1.jpeg    test/PNEUMONIA/person1_virus_6.jpeg        (Kaggle)
    train/PNEUMONIA/BACTERIA-1049278-0001.jpeg                                            (Mendeley, version 2 and 3)

Classes are the two folders; ``--column label=kind`` makes three of them, normal, bacteria and virus, by the names. In
both cases the kind is also a further column.

Groups are the numbers of persons (of the normal ones: of examinations), within a split and a kind. Whether person 1 of
train and person 1 of test are the same child nobody has said, so such pairs are counted and called possible.

Kaggle's archive holds everything twice, the second time in a folder of the same name: that one is left out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice

from featurecache.dataset import SPLITS, Dataset, class_labels, settle_task, source_record
from featurecache.errors import SourceError
from featurecache.sources.folders import open_folder

KINDS = ("normal", "bacteria", "virus")
_CLASSES = {"normal", "pneumonia"}
_NAMES = (
    re.compile(r"(?P<number>person\d+)_(?P<kind>bacteria|virus)_\d+$", re.IGNORECASE),
    re.compile(r"(?P<number>(NORMAL2-)?IM-\d+)-\d+(-\d+)*$", re.IGNORECASE),
    re.compile(r"(?P<kind>NORMAL|BACTERIA|VIRUS)-(?P<number>\d+)-\d+$", re.IGNORECASE),
)
_TRIED = 50  # names of a folder


def is_chest_xray(folder: str) -> bool:
    """Class folders NORMAL and PNEUMONIA, with or without split folders above them, and names of this set in them."""
    above = [folder, *(os.path.join(folder, name) for name in _entries(folder) if name.lower() in SPLITS)]
    for place in above:
        classes = {name.lower(): name for name in _entries(place)}
        if classes.keys() >= _CLASSES:
            names = islice(_entries(os.path.join(place, classes["pneumonia"])), _TRIED)
            if any((found := _read_name(name)) and found[0] in ("bacteria", "virus") for name in names):
                return True
    return False


def open_chest_xray(data: str, columns: dict[str, str] | None, asked: str | None) -> Dataset:
    """The dataset in the folder ``data`` (an absolute path)."""
    by_kind = _by_kind(columns)
    again = [name for name in _entries(data) if name in (os.path.basename(data), "chest_xray") and _splits(data)]
    again = [name for name in again if _splits(os.path.join(data, name)) == _splits(data)]
    plain = open_folder(data, None, without=again)
    read = [_read_name(os.path.basename(name)) for name in plain.ids]
    folders = [plain.classes[label].lower() if label >= 0 else "" for label in plain.labels.tolist()]
    kinds = [_kind(folder, found) for folder, found in zip(folders, read, strict=True)]
    groups = [
        f"{split}/{kind}/{found[1]}" if found and kind else name
        for split, kind, found, name in zip(plain.splits, kinds, read, plain.ids, strict=True)
    ]
    classes = list(KINDS) if by_kind else plain.classes
    labels = class_labels(kinds, KINDS) if by_kind else plain.labels
    task = settle_task(asked, classes, False, data)
    if task == "unlabelled":
        classes, labels = [], class_labels([""] * len(plain), [])
    notes = [f"{name} inside {data} repeats its splits and was left out." for name in again]
    unnamed = sum(found is None for found in read)
    if unnamed:
        missing = " and no label" if by_kind and "" in kinds else ""
        notes.append(f"{unnamed:,} images have other names than this set's: they have no number of a person{missing}.")
    return replace(
        plain, source=source_record("chest-xray", data, columns, asked), labels=labels, classes=classes, task=task,
        groups=groups, meta={"kind": kinds}, notes=(*plain.notes, *notes, *_possible(groups, plain.ids)),
    )  # fmt: skip


def _kind(folder: str, found: tuple[str, str] | None) -> str:
    """normal by the folder, bacteria or virus by the name; nothing where neither says it."""
    if folder == "pneumonia":
        return found[0] if found and found[0] != "normal" else ""
    return "normal" if folder == "normal" else ""


def _by_kind(columns: dict[str, str] | None) -> bool:
    """Whether the label is the kind, as ``--column label=kind`` says; the folder is ``label=folder``, or nothing."""
    wrong = {role: name for role, name in (columns or {}).items() if role != "label" or name not in ("kind", "folder")}
    if wrong:
        role, name = next(iter(wrong.items()))
        raise SourceError(
            f"a folder of chest X-rays has no column for {role}={name}; --column label=kind makes three classes "
            "(normal, bacteria, virus), label=folder the two of the folders."
        )
    return (columns or {}).get("label") == "kind"


def _read_name(name: str) -> tuple[str, str] | None:
    """(kind, number of the person) as a file name has them."""
    for pattern in _NAMES:
        found = pattern.match(os.path.splitext(name)[0])
        if found:
            parts = found.groupdict()
            return (parts.get("kind") or "normal").lower(), parts["number"].lower()
    return None


def _possible(groups: list[str], ids: list[str]) -> list[str]:
    """One sentence for the persons of one kind whose number stands in two splits."""
    named = {group for group, name in zip(groups, ids, strict=True) if group != name}
    splits: dict[tuple[str, str], set[str]] = {}
    for split, kind, number in (group.split("/", 2) for group in named):
        splits.setdefault((kind, number), set()).add(split)
    both = Counter(pair for found in splits.values() for pair in combinations(sorted(found), 2))
    if not both:
        return []
    pairs = ", ".join(f"{first} and {second} {count:,}" for (first, second), count in sorted(both.items()))
    return [
        f"Persons of one kind with the same number in two splits: {pairs}. Possible leaks only: nobody has said "
        "whether a number means the same child in both."
    ]


def _splits(folder: str) -> set[str]:
    return {SPLITS[name.lower()] for name in _entries(folder) if name.lower() in SPLITS}


def _entries(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
