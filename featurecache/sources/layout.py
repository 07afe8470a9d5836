"""Layout of a folder of images: which of its levels are splits, classes, persons, folds, and which files are masks.

    chest/NORMAL/1.png                      classes
    chest/training_set/NORMAL/1.png         splits, then classes; also classes, then splits
    idc/8863/0/1.png                        persons (their images stay together), then classes
    leukemia/fold_0/all/1.png               folds (kept in the column fold), then classes
    covid/COVID/images/1.png, masks/1.png   classes; masks are left out (`featurecache.sources.pairs`)

A level is what the names say that stand beside each other. What has two readings is refused with both, and
``classes_at`` (the level of the classes, 1 for the folders in the data folder) chooses.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from featurecache.errors import Reading, SeveralReadings, SourceError
from featurecache.formatting import abbreviated, counted, shell_word
from featurecache.sources.pairs import (
    IMAGES,
    are_sides,
    groups_of_pairs,
    plain_name,
    refuse_pairs,
    share_names,
    without_masks,
)
from featurecache.sources.vocabulary import PERSON, hints_at_split, split_names_of, words_of

# What looks like the number of somebody, where something stands below it: 8863, P001, LIDC-IDRI-0001, TCGA-A1-A0SB;
# n01440764 is a class of ImageNet.
_NUMBER = re.compile(r"(?!n\d{8}$)(\d{3,}|[a-z]+([-_][a-z]+)*[-_]?\d{3,}|tcga(-\w+)+|[a-z]\d{2,})", re.I)
_FOLD = re.compile(r"(cv|fold|split|partition)s?[\W_]*\d+", re.I)
_VISIT = re.compile(r"(study|series|visit|session|ses|exam|scan|view|slice|day|week)s?[\W_]*\d*\w?", re.I)
_CSV = "or list the images in a CSV (columns path, label, split)"


@dataclass
class FolderLayout:
    """What the names of N images say; the lists are as long as ``rows``."""

    rows: list[int]  # which of the paths are images of the set, not masks
    splits: list[str]  # train, val, test or nothing
    classes: list[str]  # name of the class, or nothing
    groups: list[str] | None  # persons; nothing where none is named
    folds: list[str] | None
    folders: list[str]  # the class folder, or nothing
    remarks: list[str] = field(default_factory=list)  # what was understood, each a few words; no names of persons


def read_layout(paths: Sequence[str], where: str, classes_at: int | None = None) -> FolderLayout:
    """The layout of images by their paths below the folder ``where``. Raises SeveralReadings where it has two, else
    SourceError."""
    rows, masks = without_masks(paths, where, classes_at)
    folders = [paths[row].rpartition("/")[0] for row in rows]
    images: dict[str, list[str]] = defaultdict(list)
    for row, folder in zip(rows, folders, strict=True):
        images[folder].append(paths[row].rpartition("/")[2])
    reader = _Reader(images, where)
    if classes_at is None:
        reader.read()
    else:
        reader.read_at(classes_at)
    number = {folder: place for place, folder in enumerate(images)}
    places = [number[folder] for folder in folders]
    columns = (reader.splits, reader.classes, reader.groups, reader.folds, reader.folders)
    splits, classes, groups, folds, class_folders = ([column[place] for place in places] for column in columns)
    if not any(groups) and (pairs := groups_of_pairs(paths[row] for row in rows)):
        groups = pairs[0]
        reader.remarks.append(pairs[1])
    remarks = reader.remarks + masks
    return FolderLayout(
        rows, splits, classes, groups if any(groups) else None, folds if any(folds) else None, class_folders, remarks
    )


class _Reader:
    """Reads folders of images from the outermost inward; ``at`` is how far it has come for each of them."""

    def __init__(self, folders: dict[str, list[str]], where: str) -> None:
        self.parts = [folder.split("/") if folder else [] for folder in folders]
        self.levels = [list(range(1, len(parts) + 1)) for parts in self.parts]
        self.paths, self.images, self.where = list(folders), list(folders.values()), where
        self.at = [0] * len(folders)
        self.splits, self.classes, self.groups, self.folds, self.folders = ([""] * len(folders) for _ in range(5))
        self.remarks: list[str] = []

    def read(self) -> None:
        rows = list(range(len(self.parts)))
        self._read_above(rows)
        if any(self.splits):
            self._read_splits(rows)
        if labelled := [row for row in rows if self._name(row) is not None]:
            self._read_classes(labelled)
            self._refuse_sides(labelled)

    def _name(self, row: int, deeper: int = 0) -> str | None:
        at = self.at[row] + deeper
        return self.parts[row][at] if at < len(self.parts[row]) else None

    def _names(self, rows: Sequence[int], deeper: int = 0) -> set[str]:
        return {name for row in rows if (name := self._name(row, deeper)) is not None}

    def _level(self, rows: Sequence[int], deeper: int = 0) -> int:
        return next(self.levels[r][self.at[r] + deeper] for r in rows if self._name(r, deeper) is not None)

    def _advance(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.at[row] += 1

    def _folder(self, row: int, deeper: int = 0) -> str:
        return "/".join([self.where, *self.parts[row][: self.at[row] + deeper]])

    # -- above the classes

    def _read_above(self, rows: list[int]) -> None:
        """Passes through folders that hold everything, then one level of splits."""
        while names := self._names(rows):
            self._refuse_loose(rows)
            split = split_names_of(sorted(names))
            if len(split) == len(names):
                return self._take_splits(rows, split)
            self._refuse_half(rows, names, split)
            if len(names) > 1 or any(self._name(row, 1) is None for row in rows):
                return None
            self._take_folds(rows) if _all(_FOLD, names) else self._advance(rows)
        return None

    def _take_splits(self, rows: Sequence[int], split: dict[str, str], deeper: int = 0) -> None:
        folders: dict[tuple[str, str], str] = {}
        for row in rows:
            name = str(self._name(row, deeper))
            self.splits[row], above = split[name], self._folder(row, deeper)
            if (other := folders.setdefault((above, split[name]), name)) != name:
                self._ask_for_classes(
                    f"the folders {other} and {name} in {above} both say {split[name]}. Put their images into one "
                    f"folder, {_CSV}",
                    self._level(rows, deeper),
                )
        spelt = ", ".join(f"{name}/" for name in sorted(split))
        self.remarks.append(f"splits from {spelt} (read as {', '.join(split[name] for name in sorted(split))})")
        if not deeper:
            self._advance(rows)

    def _read_splits(self, rows: Sequence[int]) -> None:
        for split in dict.fromkeys(self.splits[row] for row in rows):
            self._read_within([row for row in rows if self.splits[row] == split], split)

    def _read_within(self, rows: list[int], split: str) -> None:
        """Passes through what repeats the split (``seg_train/seg_train``) or says images only (``train/images``)."""
        while all(self._name(row) is not None for row in rows):
            names = self._names(rows)
            inner = split_names_of(sorted(names))
            again = names == {self.parts[row][self.at[row] - 1] for row in rows}  # seg_train/seg_train
            if len(names) == 1 and (again or inner == dict.fromkeys(names, split)):
                self._advance(rows)
            elif len(inner) > 1 or (inner and len(inner) == len(names)):
                self._ask_for_classes(
                    f"{self._folder(rows[0])} is {split}, and in it lie {abbreviated(sorted(inner))}: which of them "
                    f"says the split? Move one, {_CSV}",
                    self._level(rows),
                )
            elif len(names) == 1 and set(words_of(*names)) <= IMAGES:
                self._advance(rows)
            else:
                break
        self._refuse_loose(rows)

    def _refuse_loose(self, rows: Sequence[int]) -> None:
        loose = [row for row in rows if self._name(row) is None]
        if loose and (names := self._names(rows)):
            raise SourceError(
                f"{self._folder(loose[0])} holds images ({abbreviated(self.images[loose[0]], 3)}) beside the folders "
                f"{abbreviated(sorted(names), 3)}: of which class are they? Move them, {_CSV}."
            )

    def _refuse_half(self, rows: Sequence[int], names: set[str], split: dict[str, str]) -> None:
        """Folders of which some are splits; or that hint at several splits and are none."""
        level, others = self._level(rows), sorted(names - split.keys())
        if split:
            ends = {row: self.levels[row][self.at[row]] for row in rows if self._name(row) in others}
            out = sorted({"/".join(self.paths[row].split("/")[:end]) for row, end in ends.items()})
            self._ask_for_classes(
                f"{self._folder(rows[0])} has split folders ({abbreviated(sorted(split))}) and beside them "
                f"{abbreviated(others)}, which belong to no split. Leave those out (--leave-out {shell_word(out[0])}), "
                f"{_CSV}",
                level,
                [Reading(f"without {abbreviated(out)}, which are no part of the data", {"leave_out": tuple(out)})],
            )
        hints = {name: kinds for name in others if (kinds := hints_at_split(name))}
        if len(set().union(*hints.values())) > 1:
            self._ask_for_classes(
                f"the folders {abbreviated(sorted(hints))} in {self._folder(rows[0])} look like splits, and what their "
                "other words mean is not plain. Rename them train, val, test",
                level,
            )

    # -- the classes

    def _read_classes(self, rows: list[int]) -> None:
        """The first level that the rows have not come past: persons, folds or splits above classes, or classes."""
        self._pass_images(rows)
        tops, subs = self._names(rows), self._names(rows, 1)
        deep = [row for row in rows if self._name(row, 1) is not None]
        all_deep = len(deep) == len(rows)
        pairs = {(self._name(row), self._name(row, 1)) for row in deep}
        shared = any(count > 1 for count in Counter(sub for _, sub in pairs).values())
        persons, numbers = _all(PERSON, tops), _all(_NUMBER, tops, PERSON)
        below, further = split_names_of(sorted(subs)), split_names_of(sorted(tops)) if not any(self.splits) else {}
        if further and len(further) < len(tops):
            self._refuse_half(rows, tops, further)
        elif further:
            self._refuse_folds_of_splits(rows)
            self._take_splits(rows, further)
            self._read_splits(rows)
            if labelled := [row for row in rows if self._name(row) is not None]:
                self._read_classes(labelled)
        elif not deep:
            self._take_persons(rows) if persons else self._take_classes(rows)
        elif all_deep and _all(_FOLD, tops):
            self._take_folds(rows)
            self._read_classes(rows)
        elif below and not persons and not any(self.splits):
            third = self._names(rows, 2)
            if numbers and third and not _all(_NUMBER, third, PERSON) and not _all(_VISIT, third):
                self._refuse_two(rows, 2)
            if len(below) < len(subs) or not all_deep:
                self._refuse_half_below(rows, below)
            self._refuse_folds_of_splits(rows)
            self._take_splits(rows, below, deeper=1)
            self._take_classes(rows, below=2)
        elif all_deep and numbers and not _all(_NUMBER, subs, PERSON):
            if not (shared or persons or _all(_VISIT, subs)):
                self._refuse_two(rows)
            self._take_persons(rows)
            if not _all(_VISIT, subs):
                self._advance(rows)
                self._read_classes(rows)
        elif _all(_NUMBER, subs, PERSON) and not (numbers and shared):
            self._take_classes(rows)
        elif not _all(_VISIT, subs) and shared and not (all_deep and len(subs) == 1):
            self._refuse_two(rows)
        else:
            self._take_classes(rows)

    def _pass_images(self, rows: Sequence[int]) -> None:
        """Takes folders that say images only out of the way, wherever they stand below a class."""
        for row in rows:
            start, parts = self.at[row] + 1, self.parts[row]
            picked = [n for n, name in enumerate(parts) if n < start or not set(words_of(name)) <= IMAGES]
            self.parts[row], self.levels[row] = [parts[n] for n in picked], [self.levels[row][n] for n in picked]

    def _take_classes(self, rows: Sequence[int], below: int = 1) -> None:
        for row in rows:
            self.classes[row] = str(self._name(row))
            self.folders[row] = "/".join(self.parts[row][: self.at[row] + 1])
        names = sorted({self.classes[row] for row in rows})
        self.remarks.append(f"classes from level {self._level(rows)} of the folders ({abbreviated(names, 6)})")
        for deeper in range(below, max(len(self.parts[row]) - self.at[row] for row in rows)):
            names_below = self._names(rows, deeper)
            named = len(names_below) > 1 and _all(_NUMBER, names_below, PERSON)
            if not any(self.groups) and (named or _all(PERSON, names_below)):
                self._take_persons(rows, deeper)

    def _refuse_sides(self, rows: Sequence[int]) -> None:
        """Refuses classes that may be the sides of pairs: called like some, with files of the same names."""
        if are_sides(classes := {self.classes[row] for row in rows}):
            below: dict[str, set[str]] = {name: set() for name in classes}
            for row in rows:
                folder = "/".join([self.splits[row], *self.parts[row][self.at[row] + 1 :]])
                below[self.classes[row]] |= {f"{folder}/{plain_name(image)}" for image in self.images[row]}
            if share_names(*below.values()):
                refuse_pairs(sorted(classes), self._folder(rows[0]), self._level(rows))

    def _take_persons(self, rows: Sequence[int], deeper: int = 0) -> None:
        for row in rows:
            self.groups[row] = self._name(row, deeper) or ""
        many = len({self.groups[row] for row in rows} - {""})
        self.remarks.append(f"persons from level {self._level(rows, deeper)} ({many:,}, kept together)")

    def _take_folds(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.folds[row] = str(self._name(row))
        self.remarks.append(f"folds from {abbreviated(sorted(self._names(rows)))} (in the column fold)")
        self._advance(rows)

    def _refuse_folds_of_splits(self, rows: Sequence[int]) -> None:
        if any(self.folds):
            raise SourceError(
                f"{self._folder(rows[0])} has splits of its own, as other folds have: an image stands in several. Give "
                f"one fold: --data {shell_word(self._folder(rows[0]))}"
            )

    def _ask_for_classes(self, wrong: str, level: int, readings: Sequence[Reading] = ()) -> NoReturn:
        """Refuses with what is ``wrong`` unless the folders of this level are classes, or one of ``readings`` holds."""
        names = {"/".join(path.split("/")[level - 1 : level]) for path in self.paths}
        classes = Reading(f"the classes are {abbreviated(sorted(names), 6)}", {"classes_at": level})
        raise SeveralReadings(
            f"{wrong}; or, if all folders of that level are classes, --classes-at {level}.",
            [*readings, *([] if "" in names else [classes])],
        )

    def _refuse_two(self, rows: Sequence[int], deeper: int = 1) -> None:
        levels = self._level(rows), self._level(rows, deeper)
        first, second = (abbreviated(sorted(self._names(rows, depth)), 4) for depth in (0, deeper))
        raise SeveralReadings(
            f"the classes of {self._folder(rows[0])} may be {first} or, below these, {second}. Say which: "
            f"--classes-at {levels[0]} or --classes-at {levels[1]}.",
            [
                Reading(f"the classes are {text}", {"classes_at": level})
                for text, level in zip((first, second), levels, strict=True)
            ],
        )

    def _refuse_half_below(self, rows: Sequence[int], split: dict[str, str]) -> None:
        row = next(row for row in rows if self._name(row, 1) in split)
        self._ask_for_classes(
            f"{self._folder(row)} has split folders below class folders ({self._name(row)}/{self._name(row, 1)}), but "
            f"not every image lies in one. Move the others, {_CSV}",
            self._level([row]),
        )

    def read_at(self, level: int) -> None:
        """The classes are at this level; of the others those are splits, persons or folds of which all names are."""
        rows, depth = list(range(len(self.parts))), max(map(len, self.parts))
        if above := [row for row in rows if len(self.parts[row]) < level or level < 1]:
            images = sum(len(self.images[row]) for row in above)
            raise SourceError(
                f"--classes-at {level}: {counted(images, 'image')} of {self.where} above that level "
                f"({'/'.join(self.parts[above[0]]) or 'in the folder itself'}); 1 are the folders in {self.where}."
            )
        for other in range(1, depth + 1):
            self.at = [other - 1] * len(rows)
            if other == level or any(len(parts) < other for parts in self.parts):
                continue
            names = {parts[other - 1] for parts in self.parts}
            split = split_names_of(sorted(names))
            if len(split) == len(names) and not any(self.splits):
                self._take_splits(rows, split)
            elif _all(_FOLD, names) and not any(self.folds):
                self._take_folds(rows)
            elif not any(self.groups) and _all(_NUMBER, names, PERSON):
                self._take_persons(rows)
            elif other < level and len(names) > 1:
                self.remarks.append(f"level {other} not used ({abbreviated(sorted(names), 4)})")
        self.at = [level - 1] * len(rows)
        self._take_classes(rows, below=depth)


def _all(pattern: re.Pattern[str], names: set[str], other: re.Pattern[str] | None = None) -> bool:
    return bool(names) and all(pattern.fullmatch(name) or (other and other.fullmatch(name)) for name in names)
