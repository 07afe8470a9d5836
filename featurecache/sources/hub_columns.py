"""What the columns of a dataset of `datasets` say: which is the image, which the label, and the classes.

The label is the one column of classes, or one called label; lists in it are several labels an image. Whatever else has
one number or text a row is kept beside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurecache.dataset import class_labels, distinct, few
from featurecache.errors import SourceError
from featurecache.sources.tables import ROLES

_LABELS = ("label", "labels")


@dataclass(frozen=True)
class Part:
    """One split: ours and theirs, and the rows."""

    split: str
    word: str
    rows: Any


def roles_of(features: Any, columns: dict[str, str], name: str) -> dict[str, str | None]:
    """image, label and group → their columns, as asked for or as their kinds and names have it."""
    unknown = [role for role in columns if role not in ("image", "label", "group")]
    if unknown:
        raise SourceError(f"columns of {name} cannot name a {unknown[0]!r}; they name image, label, group.")
    for role, column in columns.items():
        if column not in features:
            raise SourceError(f"{name} has no column {column!r} for the {role}; it has {few(list(features), 8)}.")
    pictures = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    classes = [key for key, kind in features.items() if _names_of(kind)]
    by_name = [key for key in features if key.lower() in (*_LABELS, *ROLES["label"])]
    named = [key for key in classes if key.lower() in _LABELS]
    labels = named or classes or by_name
    groups = [key for key in features if key.lower() in ROLES["group"] and _is_plain(features[key])]
    found = {
        "image": _one(columns, "image", pictures, name),
        "label": _one(columns, "label", labels, name),
        "group": _one(columns, "group", groups, name),
    }
    if found["image"] is None or found["image"] not in pictures:
        raise SourceError(
            f"{name} has no column of images{' called ' + columns['image'] if 'image' in columns else ''} among "
            f"{few(list(features), 8)}; cast it: dataset.cast_column(NAME, datasets.Image())."
        )
    return found


def _one(columns: dict[str, str], role: str, found: Sequence[str], name: str) -> str | None:
    if role in columns:
        return columns[role]
    if len(found) > 1:
        raise SourceError(
            f"{name} has several columns that could be the {role}: {few(list(found))}. Say which: "
            f"--column {role}={found[0]}."
        )
    return found[0] if found else None


def _names_of(kind: Any) -> list[str] | None:
    """The names of a column of classes, or of lists of them."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    return list(inner.names) if type(inner).__name__ == "ClassLabel" and inner.names else None


def _is_plain(kind: Any) -> bool:
    """One number or text a row."""
    plain = re.match(r"u?int|float|bool|string|large_string", str(getattr(kind, "dtype", "")))
    return type(kind).__name__ in ("Value", "ClassLabel") and bool(plain)


def _column(parts: list[Part], key: str) -> list[Any]:
    return [value for part in parts for value in part.rows.select_columns([key])[:][key]]


def rest_of(parts: list[Part], used: Sequence[str | None]) -> dict[str, list[str] | np.ndarray]:
    """Further columns."""
    features = parts[0].rows.features
    return {key: _meta(parts, key) for key, kind in features.items() if key not in used and _is_plain(kind)}


def _meta(parts: list[Part], key: str) -> list[str] | np.ndarray:
    """A further column: numbers, a class by its name, else text."""
    values = _column(parts, key)
    names = _names_of(parts[0].rows.features[key])
    if names:
        return [names[value] if value is not None and value >= 0 else "" for value in values]
    if all(type(value) is int and abs(value) < 1 << 63 for value in values):
        return np.array(values, np.int64)
    if all(value is None or isinstance(value, float) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return ["" if value is None else str(value) for value in values]


def labels_of(parts: list[Part], kind: Any, key: str | None, name: str) -> tuple[np.ndarray, list[str]]:
    """int64 [N], or float32 [N, L] of lists of classes, and their names."""
    if key is None:
        return np.full(sum(len(part.rows) for part in parts), -1, np.int64), []
    values, names = _column(parts, key), _names_of(kind)
    if any(isinstance(value, list) for value in values):
        return _several(values, names, f"the column {key} of {name}")
    if names:
        numbers = np.array([-1 if value is None else int(value) for value in values], np.int64)
        if numbers.max(initial=-1) >= len(names) or numbers.min(initial=0) < -1:
            raise SourceError(f"the column {key} of {name} holds the class {numbers.max()} and has {len(names)} names.")
        return numbers, distinct(names)
    words = ["" if value is None else str(value) for value in values]
    numbered = all(type(value) is int for value in values if value is not None)
    classes = sorted(set(words) - {""}, key=int) if numbered else sorted(set(words) - {""})
    if len(classes) > 2 and not numbered and 2 * len(classes) > len(words):
        raise SourceError(f"the column {key} of {name} has {len(classes):,} values in {len(words):,} rows: no classes.")
    return class_labels(words, classes), classes


def _several(values: list[Any], names: list[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Lists as labels [N, L]: of the classes that are there; or, as long as each other and of 0 and 1 alone, one
    number for each label."""
    lengths = {len(value) for value in values if value is not None}
    flat = {entry for value in values if value is not None for entry in value}
    ones = len(lengths) == 1 and flat <= {0, 1, None} and (not names or len(names) in (2, *lengths))
    if ones and (not names or any(len(set(value)) < len(value) for value in values if value is not None)):
        width = next(iter(lengths))
        columns = names if names and len(names) == width else [str(place) for place in range(width)]
        unknown = [None] * width
        rows = [[np.nan if entry is None else entry for entry in (value or unknown)] for value in values]
        return np.array(rows, np.float32).reshape(len(values), width), distinct(columns)
    if not names or any(not isinstance(entry, int) or not 0 <= entry < len(names) for entry in flat):
        raise SourceError(
            f"{where} holds lists that are neither numbers of classes nor 0 and 1 for each label: "
            f"{few(sorted(map(str, flat)))}."
        )
    labels = np.zeros((len(values), len(names)), np.float32)
    for row, value in enumerate(values):
        labels[row, value if value is not None else slice(None)] = np.nan if value is None else 1
    return labels, distinct(names)


def groups_of(parts: list[Part], key: str | None, ids: list[str]) -> list[str] | None:
    """The group of each image; one without is a group of its own."""
    if key is None:
        return None
    values = zip(_column(parts, key), ids, strict=True)
    return [own if value is None or value == "" else str(value) for value, own in values]
