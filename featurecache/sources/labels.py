"""Labels of foreign columns: class names, several labels a row, names of splits, groups, and the task they imply.

Every source and every import of features asks here what its columns mean. Labels are int64 [N], the index of a class
and -1 for none, or, where an image has L of them, float32 [N, L] of 1, 0 and NaN for unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from featurecache.errors import Reading, SeveralReadings, SourceError, UnknownSourceName, nearest
from featurecache.formatting import abbreviated, names_in, shell_word
from featurecache.sources.vocabulary import in_order, is_missing, split_names_of

TASKS = ("binary", "multiclass", "ordinal", "multilabel", "unlabelled")
SPLIT_ORDER = ("train", "val", "test")
# Role of a column -> its names, compared by their letters and digits alone, in steps: names of the second count where a
# table has none of the first. Of groups the most encompassing comes first.
ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "path": (
        ("path", "file", "filename", "filepath", "image_path", "image_file", "image_name", "img_path"),
        ("image", "img", "image_index"),
        ("image_id", "img_id", "id_code", "dicom_id", "isic_id"),
    ),
    "label": (
        ("label", "class", "target", "finding", "diagnosis", "category", "class_name", "label_name"),
        ("labels", "finding_labels", "dx", "level", "grade"),
    ),
    "split": (("split", "set", "fold", "subset", "partition"),),
    "group": (
        ("group", "group_id", "patient", "patient_id"),
        ("subject", "subject_id", "person", "person_id", "participant", "participant_id"),
        ("case", "case_id"),
        ("study", "study_id"),
        ("exam", "exam_id"),
        ("series", "series_id"),
        ("lesion", "lesion_id"),
    ),
}  # fmt: skip
_LARGEST = 1 << 31  # a label; a file may hold any number


class Labels(NamedTuple):
    """Labels of N images, what they mean, and what a head is to make of them: three fields of a Dataset."""

    labels: np.ndarray
    classes: list[str]
    task: str


def resolve_labels(labels: np.ndarray, classes: Sequence[str], task: str | None, where: str) -> Labels:
    """Labels, classes and task of a dataset: the task as requested, else as the labels have it. Raises SourceError
    where they contradict."""
    if task is not None and task not in TASKS:
        raise SourceError(f"the task {task!r} is unknown; it is one of {', '.join(TASKS)}.")
    several = labels.ndim == 2
    implied = "multilabel" if several else {0: "unlabelled", 2: "binary"}.get(len(classes), "multiclass")
    fits = {implied, "unlabelled", *{"binary": ("multiclass", "ordinal"), "multiclass": ("ordinal",)}.get(implied, ())}
    if task is not None and task not in fits:
        there = f"{len(classes)} {'labels' if several else 'classes'}" if classes else "no labels"
        raise SourceError(f"{where} has {there}: its task is {implied}, it cannot be {task}.")
    if "unlabelled" in (task, implied):
        return Labels(np.full(len(labels), -1, np.int64), [], "unlabelled")
    return Labels(labels, list(classes), task or implied)


def ordered_labels(
    labels: np.ndarray, classes: Sequence[str], task: str, order: Sequence[str] | None, where: str
) -> tuple[np.ndarray, list[str]]:
    """Labels and classes with the classes in their order: the one given, or of ordinal ones that of their numbers.
    Raises SourceError where ordinal classes have none, or ``order`` names others."""
    if order is None and task != "ordinal":
        return labels, list(classes)
    if labels.ndim == 2 or not classes:
        there = "several labels an image" if classes else "no labels"
        raise SourceError(f"--order is that of the classes of which an image has one; {where} has {there}.")
    ordered = in_order(classes, task, order, where)
    place = np.array([*(ordered.index(name) for name in classes), -1], np.int64)  # the last: of -1
    return place[labels], ordered


def role_columns(role: str, columns: Iterable[str]) -> list[str]:
    """Those of some columns that could have a role by their names; several where that cannot be told."""
    plain = {column: re.sub(r"[^a-z0-9]+", "", column.lower()) for column in columns}
    steps = ([name.replace("_", "") for name in names] for names in ROLES[role])
    return next((there for names in steps if (there := [column for column in plain if plain[column] in names])), [])


def find_roles(
    name: str, columns: list[str], requested: Mapping[str, str], candidates: Mapping[str, list[str]], several: str = ""
) -> dict[str, list[str]]:
    """Role → its columns of the table ``name``: as requested (empty: none), else the one of its ``candidates``; the
    role ``several`` may have some, ``A,B``. Raises SourceError."""
    if unknown := [role for role in requested if role not in candidates]:
        near = nearest(unknown[0], candidates)
        raise UnknownSourceName(
            f"columns of {name} cannot name a {unknown[0]!r}; they name {', '.join(candidates)}.{near}"
        )
    roles = {}
    for role, text in requested.items():  # a name with a comma: one column where the table has it, or in quotes
        listed = names_in(text)
        roles[role] = [text] if text in columns else [word for part in listed if (word := part.strip())]
        if missing := [word for word in roles[role] if word not in columns]:
            there = f"{abbreviated(columns, 8)}.{nearest(missing[0], columns)}"
            raise UnknownSourceName(f"{name} has no column {missing[0]!r} for the {role}; it has {there}")
        if len(roles[role]) > 1 and role != several:
            raise SourceError(f"the {role} is one column of {name}, not {len(roles[role])} ({text}).")
    elsewhere = [column for listed in roles.values() for column in listed]
    for role, names in candidates.items():
        roles.setdefault(role, [column for column in names if column not in elsewhere])
        if role not in requested and len(roles[role]) > 1:
            there = f"several columns that could be the {role}: {abbreviated(roles[role])}"
            raise SeveralReadings(
                f"{name} has {there}. Say which: --column {shell_word(f'{role}={roles[role][0]}')}.",
                [Reading(f"the {role} is in {column}", {"columns": {role: column}}) for column in roles[role]],
            )
    used = [column for listed in roles.values() for column in listed]
    if twice := [column for column in used if used.count(column) > 1]:
        raise SourceError(f"the column {twice[0]!r} of {name} cannot be two things at once ({dict(requested)}).")
    return roles


def class_labels(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int64 [N]: the index of each name in ``classes``; -1 where the name is empty."""
    index = {name: number for number, name in enumerate(classes)}
    return np.fromiter((index[name] if name else -1 for name in names), np.int64, len(names))


def unique_names(names: Sequence[str]) -> list[str]:
    """``names`` with a number behind each that stood there before: two classes may not share a name."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique if len(set(unique)) == len(unique) else unique_names(unique)


def split_names(
    words: Sequence[str], row: Callable[[int], str], remedy: str, readings: Sequence[Reading] = ()
) -> list[str]:
    """train, val, test or nothing for each word that people use for them. Raises SourceError at another, with the
    ``readings`` of the column that there are."""
    splits = {word: "" for word in set(words) if is_missing(word)}
    splits |= split_names_of(sorted(set(words) - splits.keys()))
    for index, word in enumerate(words):
        if word not in splits:
            wrong = f'{row(index)} is "{word}", expected train, val or test (or nothing). {remedy}'
            raise SeveralReadings(wrong, readings) if readings else SourceError(wrong)
    return [splits[word] for word in words]


def groups_or_ids(groups: Sequence[Any], ids: Sequence[str]) -> list[str]:
    """The group of each image; one without is a group of its own."""
    return [
        own if group is None or is_missing(str(group)) else str(group) for group, own in zip(groups, ids, strict=True)
    ]


def finite_number(text: str) -> float | None:
    """None for what is none; also for 1_000, which Python reads."""
    try:
        number = float(text if "_" not in text else "nan")
    except ValueError:
        return None
    return number if np.isfinite(number) else None


# -- columns of numbers and of Python's values; ``where`` names the column


def labels_of_numbers(
    values: np.ndarray, where: str, classes: Sequence[str] | None = None, unnamed: str = "{}"
) -> tuple[np.ndarray, list[str]]:
    """int64 [N] of whole numbers [N] or [N, 1] (-1 and NaN: none), or float32 [N, L] of 1, 0 and NaN [N, L]; and the
    classes: those given, by number, else the numbers that occur; of several labels ``unnamed`` with a number."""
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim not in (1, 2) or values.dtype.kind not in "biuf":
        raise SourceError(f"{where} {list(values.shape)} {values.dtype} is no column of labels.")
    if values.ndim == 2:
        several = values.astype(np.float32)
        cells = np.argwhere((several != 0) & (several != 1) & ~np.isnan(several))
        if len(cells):
            row, column = cells[0].tolist()
            cell = f"{where} row {row:,}, label {column} is {values[row, column]}"
            raise SourceError(f"{cell}; expected 0, 1, or NaN for unknown.")
        names = list(classes or (unnamed.format(number) for number in range(values.shape[1])))
        if len(names) != values.shape[1]:
            raise SourceError(f"{where} has {values.shape[1]} labels a row, and there are {len(names)} classes.")
        return several, names
    plain = np.where(np.isnan(values), -1, values) if values.dtype.kind == "f" else values
    wrong = np.flatnonzero((plain != np.rint(plain)) | (plain < -1) | (plain > _LARGEST))
    if len(wrong):
        raise SourceError(f"{where} row {wrong[0]:,} is {values[wrong[0]]}; a label is a whole number, or -1 for none.")
    numbers = plain.astype(np.int64)
    if classes:
        if numbers.max(initial=-1) >= len(classes):
            raise SourceError(f"{where} has the label {numbers.max()}, and there are {len(classes)} classes.")
        return numbers, list(classes)
    occurring = np.unique(numbers[numbers >= 0])
    return np.where(numbers < 0, -1, np.searchsorted(occurring, numbers)), [str(k) for k in occurring.tolist()]


def labels_of_values(values: Sequence[Any], names: list[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Labels and classes of numbers that index ``names``, or of lists (see `labels_of_lists`). None is none."""
    if any(isinstance(value, list) for value in values):
        return labels_of_lists(values, names, where)
    numbers = np.array([-1 if value is None else int(value) for value in values], np.int64)
    return labels_of_numbers(numbers, where, unique_names(names or []))


def labels_of_lists(values: Sequence[Any], names: list[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Lists as labels [N, L]: of the classes that are there; or, as long as each other and of 0 and 1 alone, one
    number for each label."""
    lengths = {len(value) for value in values if value is not None}
    flat = {entry for value in values if value is not None for entry in value}
    ones = len(lengths) == 1 and flat <= {0, 1, None} and (not names or len(names) in (2, *lengths))
    if ones and (not names or any(len(set(value)) < len(value) for value in values if value is not None)):
        width = next(iter(lengths))
        columns = names if names and len(names) == width else [str(place) for place in range(width)]
        rows = [[np.nan if entry is None else entry for entry in (value or [None] * width)] for value in values]
        return np.array(rows, np.float32).reshape(len(values), width), unique_names(columns)
    if not names or any(not isinstance(entry, int) or not 0 <= entry < len(names) for entry in flat):
        there = abbreviated(sorted(map(str, flat)))
        raise SourceError(
            f"{where} holds lists that are neither numbers of classes nor 0 and 1 for each label: {there}."
        )
    return several_labels(values, len(names)), unique_names(names)


def several_labels(rows: Sequence[Any], width: int) -> np.ndarray:
    """float32 [N, L], L the ``width``: 1 for the numbers that stand in a row, else 0; a row that is None is unknown."""
    labels = np.zeros((len(rows), width), np.float32)
    for number, row in enumerate(rows):
        labels[number, slice(None) if row is None else row] = np.nan if row is None else 1
    return labels
