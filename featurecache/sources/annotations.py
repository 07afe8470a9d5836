"""Annotations: what the columns of a table of text say of images: labels, splits, groups, and further columns.

The table may be a CSV, a Parquet file, or the fields of samples in tars. What each column is was found by its name or
told (`labels.find_roles`); what was understood of it comes back as sentences.

A group (a person, a lesion) is never in two drawn splits. Columns of known names are taken, the most encompassing
first, else persons in paths; a column that repeats where ids do not and looks like an id is named, so that nobody draws
across it unknowingly.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featurecache.errors import Reading, SourceError
from featurecache.formatting import abbreviated
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns
from featurecache.sources.labels import (
    ROLES,
    class_labels,
    find_roles,
    finite_number,
    groups_or_ids,
    role_columns,
    split_names,
)
from featurecache.sources.pairs import groups_of_pairs
from featurecache.sources.vocabulary import PERSON, is_missing, split_names_of, words_of

_PERSON = re.compile(rf"{PERSON.pattern}|p\d+", re.IGNORECASE)  # also of MIMIC-CXR in a path: p10000032
_ID_WORDS = frozenset(("id", "ids", "uid", "number", "nr", "mrn", "accession", "barcode", "code", "person", "owner"))
_NUMBERED = frozenset(("case", "study", "exam", "series", "lesion"))  # in their bare form
_MOST_SPLITS = 12  # folders beside each other that may be splits
_FEWEST, _SHARE = 3, 200  # a column of ids has at least so many values, and one in so many rows


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


def roles_of_table(table: Table, requested: Mapping[str, str]) -> dict[str, list[str]]:
    """Role → its columns: as requested (empty: none), else by name. Raises SourceError."""
    taken = {word.strip() for text in requested.values() for word in (text, *text.split(","))}
    free = {name: cells for name, cells in table.columns.items() if name not in taken}
    kinds = {name: {cell for cell in cells if not is_missing(cell)} for name, cells in free.items()}
    # One called case or study has to number some, not to say yes and no or to name two cohorts.
    grouping = [name for name in free if name.strip().lower() not in _NUMBERED or len(kinds[name]) >= _FEWEST]
    candidates = {role: role_columns(role, grouping if role == "group" else free) for role in ROLES}
    return find_roles(table.name, list(table.columns), requested, candidates, several="label")


def annotations_of_text(
    table: Table, roles: Mapping[str, list[str]], ids: list[str], how: LabelOptions, listed: Sequence[str] = (), *,
    splits_in_paths: bool = False,
) -> Annotations:  # fmt: skip
    """What the columns of a table with these ``roles`` say of the images ``ids``. ``listed``, in their order: the
    classes of which the labels are names, or numbers from 0; ``splits_in_paths``: where no column says the splits, the
    folders of the ids may. Raises SourceError."""
    columns, row, splits, remarks = table.columns, table.row, [""] * len(ids), list[str]()
    if roles["split"]:
        name, none = roles["split"][0], Reading(f"{roles['split'][0]} is no split", {"columns": {"split": ""}})
        remedy = "If this column is no split: --column split= (with nothing behind it)."
        splits = split_names(columns[name], lambda index: f"{row(index)}: {name!r}", remedy, [none])
        read = {word: split for word, split in zip(columns[name], splits, strict=True) if split and word != split}
        remarks += [f"splits from {name} ({', '.join(f'{w} is {s}' for w, s in sorted(read.items()))})"] if read else []
    notes = list[str]()
    if splits_in_paths and not roles["split"]:
        splits, said = splits_of_paths(ids)
        (remarks if any(splits) else notes).extend(said)
    cells = {name: columns[name] for name in roles["label"]}
    labels, classes = np.full(len(ids), -1, np.int64), list[str]()
    used = {name for several in roles.values() for name in several}
    further = {name: columns[name] for name in columns if name not in used}
    label = LabelColumns(table.name, row, how, splits, remarks, further)
    if cells and listed and len(cells) == 1 and how.task != "multilabel":
        labels, classes = labels_of_listed(next(iter(cells.values())), listed, row)
    elif cells and how.task != "unlabelled":
        labels, classes = labels_of_columns(cells, label)
        remarks += _missing_words(cells)
    groups, understood = _groups(table, roles["group"], ids)
    if groups is None:
        notes += _repeated_ids(further, labels.tolist() if labels.ndim == 1 else [0] * len(ids))
    meta = {name: numbers_or_text(cells) for name, cells in further.items()}
    return Annotations(
        ids, labels, splits, groups, meta, classes, remarks=(*remarks, *understood), notes=tuple(notes),
        uncertain=label.assumed,
    )  # fmt: skip


def splits_of_paths(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The split of each image by the folder of its path (``set/train/1.png``), and what was understood: where one level
    is splits alone, two at least. Else none, and what to say where some folders look like splits."""
    folders = [path.replace("\\", "/").split("/")[:-1] for path in paths]
    notes = list[str]()
    for level in range(min(map(len, folders), default=0)):
        names = {parts[level] for parts in folders}
        split = split_names_of(sorted(names)) if len(names) < _MOST_SPLITS else {}
        if len(set(split.values())) < 2:
            continue
        shown = ", ".join(f"{name}/" for name in sorted(split))
        if len(split) == len(names):
            read = ", ".join(split[name] for name in sorted(split))
            return [split[parts[level]] for parts in folders], [f"splits from {shown} in the paths (read as {read})"]
        others = abbreviated(sorted(names - split.keys()), 3)
        notes = [
            f"The paths have {shown} and beside them {others}: no splits were taken from them; a column says them."
        ]
    return [""] * len(paths), notes


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
    """A further column: int64 or float64 (empty: NaN) where every cell is a number, else the text; so are whole numbers
    of which a float would lose digits."""
    numbers = {value: finite_number(value) for value in set(values)}
    missing = {value for value in numbers if is_missing(value)}
    code = any(re.match(r"^[-+]?0\d", value) for value in numbers)  # 007 is a code: as a number it would lose zeros
    text = any(number is None for value, number in numbers.items() if value not in missing)
    if code or text or len(missing) == len(numbers):
        return values
    whole = [int(value) for value in numbers if re.fullmatch(r"\s*[-+]?[0-9]+\s*", value)]
    if len(whole) == len(numbers) and max(map(abs, whole)) < 2**63:
        return np.array([int(value) for value in values], np.int64)
    if any(abs(number) > 2**53 for number in whole):
        return values
    return np.array([np.nan if value in missing else numbers[value] for value in values], np.float64)


# -- groups


def groups_in_paths(paths: Sequence[str]) -> tuple[list[str], str] | None:
    """The person or pair of each image by its path, and what was understood; None where paths do not say it of all, or
    nobody has two images."""
    folders = [path.replace("\\", "/").split("/")[:-1] for path in paths]
    persons = [next((part for part in reversed(parts) if _PERSON.fullmatch(part)), "") for parts in folders]
    if all(persons) and 1 < len(set(persons)) < len(persons):
        return persons, "groups are the persons in the paths"
    return groups_of_pairs(paths)


def _repeated_ids(columns: Mapping[str, Sequence[str]], labels: Sequence[object]) -> list[str]:
    """One sentence where some of further columns look like ids and stand beside several images each."""
    names = []
    for name, cells in columns.items():
        kinds = Counter(cell for cell in cells if not is_missing(cell))
        if not _FEWEST <= len(kinds) < kinds.total() or len(kinds) * _SHARE < len(cells):
            continue
        codes = all(re.fullmatch(r"(?=.*\d)(?=.*[^\W\d])\S+", cell) for cell in kinds)  # letters, digits: HAM_0000118
        like_ids = _ID_WORDS & set(words_of(name)) or (codes and len(kinds) > 2 * _FEWEST)
        if like_ids and len(set(zip(labels, cells, strict=True))) > len(set(labels)):
            names.append(name)
    if not names:
        return []
    each = "stands" if len(names) == 1 else "stand"
    return [
        f"{abbreviated(names, 3)} {each} beside several images each, and may be of one person or lesion: --column "
        f"group={names[0]} keeps such images in one split."
    ]
