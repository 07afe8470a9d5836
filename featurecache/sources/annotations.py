"""Annotations: what the columns of a table of text say of images: labels, splits, groups, and further columns.

The table may be a CSV, a Parquet file, or the fields of samples in tars. What each column is was found by its name or
told (`labels.find_roles`); what was understood of it comes back as sentences.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featurecache.errors import SourceError
from featurecache.formatting import abbreviated
from featurecache.sources.groups import groups_in_paths, repeated_ids, repeated_ids_note
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns
from featurecache.sources.labels import class_labels, finite_number, groups_or_ids, role_columns, split_names
from featurecache.sources.vocabulary import is_missing


@dataclass(frozen=True)
class Table:
    """Columns of text, and by what a person finds a row: a CSV's line, of Parquet the row from 1, a name."""

    file: str
    columns: dict[str, list[str]]
    places: Sequence[int] | Sequence[str]

    @property
    def name(self) -> str:
        return os.path.basename(self.file)

    def row(self, index: int) -> str:
        place = self.places[index]
        return place if isinstance(place, str) else f"{self.name} row {place:,}"


@dataclass(frozen=True)
class Annotations:
    """What a table says of N images, in the order of its rows."""

    ids: list[str] | None  # None: it has no column of paths
    labels: np.ndarray
    splits: list[str]
    groups: list[str] | None
    meta: dict[str, list[str] | np.ndarray]
    classes: list[str]
    remarks: tuple[str, ...] = field(default=(), kw_only=True)  # what was understood
    notes: tuple[str, ...] = field(default=(), kw_only=True)  # what a user should hear
    uncertain: str | None = field(default=None, kw_only=True)  # what -1 was read as, where a label column holds it


def annotations_of_text(
    table: Table, roles: Mapping[str, list[str]], ids: list[str], how: LabelOptions, listed: Sequence[str] = ()
) -> Annotations:
    """What the columns of a table with these ``roles`` say of the images ``ids``. ``listed``, in their order: the
    classes of which the labels are names, or numbers from 0. Raises SourceError."""
    columns, row, splits, remarks = table.columns, table.row, [""] * len(ids), list[str]()
    if roles["split"]:
        name, remedy = roles["split"][0], "If this column is no split: --column split= (with nothing behind it)."
        splits = split_names(columns[name], lambda index: f"{row(index)}: {name!r}", remedy)
        read = {word: split for word, split in zip(columns[name], splits, strict=True) if split and word != split}
        remarks += [f"splits from {name} ({', '.join(f'{w} is {s}' for w, s in sorted(read.items()))})"] if read else []
    cells = {name: columns[name] for name in roles["label"]}
    labels, classes = np.full(len(ids), -1, np.int64), list[str]()
    label = LabelColumns(table.name, row, how, splits, remarks)
    if cells and listed and len(cells) == 1 and how.task != "multilabel":
        labels, classes = labels_of_listed(next(iter(cells.values())), listed, row)
    elif cells and how.task != "unlabelled":
        labels, classes = labels_of_columns(cells, label)
        remarks += _missing_words(cells)
    used = {name for several in roles.values() for name in several}
    notes: tuple[str, ...] = ()
    groups, understood = _groups(table, roles["group"], ids)
    further = {name: columns[name] for name in columns if name not in used}
    if groups is None and (repeated := repeated_ids(further, labels.tolist() if labels.ndim == 1 else [0] * len(ids))):
        notes = (repeated_ids_note(repeated),)
    meta = {name: numbers_or_text(cells) for name, cells in further.items()}
    said = (*remarks, *understood)
    return Annotations(ids, labels, splits, groups, meta, classes, remarks=said, notes=notes, uncertain=label.assumed)


def _groups(table: Table, named: Sequence[str], ids: list[str]) -> tuple[list[str] | None, list[str]]:
    """The group of each image by its column, or else by its path."""
    if named:
        others = [name for name in table.columns if name not in named and role_columns("group", [name])]
        beside = f", not {abbreviated(others)}" if others else ""
        return groups_or_ids(table.columns[named[0]], ids), [f"groups from {named[0]}{beside}"]
    by_path = groups_in_paths(ids)
    return (by_path[0], [by_path[1]]) if by_path else (None, [])


def _missing_words(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence where words stand for a label that is missing."""
    words = Counter(cell for several in cells.values() for cell in several if cell and is_missing(cell))
    return [f"labels {abbreviated(sorted(words))} ({words.total():,}) are missing"] if words else []


def labels_of_listed(
    cells: Sequence[str], classes: Sequence[str], row: Callable[[int], str]
) -> tuple[np.ndarray, list[str]]:
    """int64 [N] of cells that are names of ``classes``, or numbers from 0; and the classes."""
    names = [cell if cell in classes or not is_missing(cell) else "" for cell in cells]
    for index, cell in enumerate(names):
        if cell.isascii() and cell.isdigit() and int(cell[:9]) < len(classes):
            names[index] = classes[int(cell[:9])]
        elif cell and cell not in classes:
            there = f"0 to {len(classes) - 1} or one of {abbreviated(classes)}"
            raise SourceError(f'the label of {row(index)} is "{cell}"; expected {there}.')
    return class_labels(names, classes), list(classes)


def numbers_or_text(values: list[str]) -> list[str] | np.ndarray:
    """A further column: int64 or float64 (empty: NaN) where every cell is a number, else the text."""
    numbers = {value: finite_number(value) for value in set(values)}
    missing = {value for value in numbers if is_missing(value)}
    code = any(re.match(r"^[-+]?0\d", value) for value in numbers)  # 007 is a code: as a number it would lose zeros
    text = any(number is None for value, number in numbers.items() if value not in missing)
    if code or text or len(missing) == len(numbers):
        return values
    try:
        return np.array([int(value) for value in values], np.int64)
    except (ValueError, OverflowError):
        return np.array([np.nan if value in missing else numbers[value] for value in values], np.float64)
