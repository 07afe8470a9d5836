"""What somebody's file says of its rows: ids, labels, splits, groups, classes. Found by name, or as asked for.

Labels are whole numbers [N] (-1: none), words [N], or 0, 1 and NaN [N,L] for several labels; they lie in the file, in
an `.npy`, or in a table. Rows of a table that has paths belong to the features of that id, if the file has ids; else
the order is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import BadOption, SourceError, nearest
from featurecache.files.records import is_text
from featurecache.maintenance.feature_files import ArrayInfo, FeatureFile, open_foreign
from featurecache.sources.base import abbreviated, class_labels, resolve_task, split_names
from featurecache.sources.tables import Annotations, read_annotations

# Role -> names it is known by, lower case.
KNOWN = {
    "features": ("features", "feature", "feats", "embeddings", "embedding", "vectors", "x"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "ids": ("ids", "id", "filenames", "filename", "files", "paths", "path", "names", "image_ids", "image_id"),
    "splits": ("splits", "split"),
    "groups": ("groups", "group", "patients", "patient", "patient_ids", "patient_id"),
}
OURS = ("digests", "classes")  # in our own exports, and not needed
_TABLES = (".csv", ".tsv", ".parquet", ".pq")


@dataclass(frozen=True)
class ImportOptions:
    """What the user said about the rows. Keys name arrays of the file; an empty one says that there is none."""

    labels: str | None = None  # a file, or a key
    ids_key: str | None = None
    splits_key: str | None = None
    groups_key: str | None = None
    columns: dict[str, str] | None = None  # of a table of labels
    classes: Sequence[str] | None = None
    task: str | None = None


@dataclass
class RowAnnotations:
    """Columns [N], and what the file holds beside them."""

    ids: list[str]
    labels: np.ndarray
    splits: list[str]
    groups: list[str] | None
    meta: dict[str, Any]
    classes: list[str]
    task: str
    unused: list[str] = field(default_factory=list)


def annotate_rows(foreign: FeatureFile, features: Sequence[str], rows: int, asked: ImportOptions) -> RowAnnotations:
    """Raises SourceError and BadOption where something does not fit the ``rows`` of the features."""
    if is_export(foreign) and "versions" in foreign.arrays:
        raise SourceError(
            f"{foreign.path.name} was exported with augmented copies, and an import takes every row for an image. "
            "Export it without --copies."
        )
    table = _table(asked, rows)
    if asked.columns and table is None:
        raise BadOption("--column names columns of a table: --labels FILE.csv.")
    keys = {"ids": asked.ids_key, "splits": asked.splits_key, "groups": asked.groups_key}
    found = {role: _column(foreign, role, key, rows) for role, key in keys.items()}
    ids = _ids(foreign, found["ids"], rows)
    order = _order(table, ids if found["ids"] else None, rows)
    ids = [table.ids[k] for k in order] if table and table.ids and not found["ids"] else ids
    labels, classes, task, where = _labels(foreign, table, order, rows, asked)
    splits = [table.splits[k] for k in order] if table else _splits(found["splits"], rows)
    groups = found["groups"].texts() if found["groups"] else None
    if table and table.groups and groups is None:
        groups = [table.groups[k] for k in order]
    meta = {name: _picked(values, order) for name, values in table.meta.items()} if table else {}
    meta |= {name.removeprefix("meta/"): _further(array, rows) for name, array in _meta(foreign).items()}
    used = {*features, *(array.name for array in found.values() if array), where, *OURS, *(f"meta/{n}" for n in meta)}
    unused = [name for name in foreign.arrays if name not in used]
    annotated = RowAnnotations(ids, labels, splits, groups, meta, classes, task, unused)
    _check_text(annotated)
    return annotated


def _table(asked: ImportOptions, rows: int) -> Annotations | None:
    if not asked.labels or not asked.labels.lower().endswith(_TABLES):
        return None
    if not Path(asked.labels).is_file():
        raise SourceError(f"there is no file {asked.labels}.")
    return read_annotations(asked.labels, asked.columns, asked.task)


def _column(foreign: FeatureFile, role: str, key: str | None, rows: int) -> ArrayInfo | None:
    """The array of a role: as asked for, else by its name; of as many rows as the features."""
    if key == "":
        return None
    array: ArrayInfo | None
    if key is not None:
        array = array_named(foreign, key, f"--{role}-key")
    else:
        hits = [array for name, array in foreign.arrays.items() if name.lower() in KNOWN[role]]
        if len(hits) > 1:
            names = ", ".join(hit.name for hit in hits)
            raise SourceError(f"{foreign.path.name} has several arrays that could be the {role}: {names}. "
                              f"Say which: --{role}-key {hits[0].name}.")  # fmt: skip
        array = hits[0] if hits else None
    if array is not None and (not array.shape or array.shape[0] != rows):
        found = f"{array.shape[0]:,} rows" if array.shape else "one value"
        raise SourceError(f"{array.name} of {foreign.path.name} has {found}, the features have {rows:,}.")
    return array


def array_named(foreign: FeatureFile, key: str, option: str) -> ArrayInfo:
    if key not in foreign.arrays:
        near = nearest(key, foreign.arrays)
        raise SourceError(f"{option}: {foreign.path.name} has no {key!r}.{near} It holds {describe_arrays(foreign)}.")
    return foreign.arrays[key]


def describe_arrays(foreign: FeatureFile) -> str:
    """What a file holds, for a sentence."""
    return (
        abbreviated([f"{array.name} {list(array.shape)} {_kind(array)}" for array in foreign.arrays.values()], 8)
        or "nothing"
    )


def _kind(array: ArrayInfo) -> str:
    return "text" if array.text else str(array.dtype)


def _ids(foreign: FeatureFile, array: ArrayInfo | None, rows: int) -> list[str]:
    if array is None:
        return [f"{foreign.path.name}:{row}" for row in range(rows)]
    ids = array.texts()
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name in seen:
            raise SourceError(
                f"{array.name} of {foreign.path.name} names {name!r} twice (rows {seen[name]:,} and {row:,}); ids "
                f"are different. --ids-key '' leaves them out."
            )
        seen[name] = row
    return ids


def _order(table: Annotations | None, ids: list[str] | None, rows: int) -> np.ndarray:
    """For each row of the features that of the table."""
    if table is None:
        return np.arange(rows)
    if table.ids is not None and ids is not None:
        place = {name: row for row, name in enumerate(table.ids)}
        missing = [name for name in ids if name not in place]
        if missing:
            raise SourceError(
                f"{len(missing):,} ids of the features are not in the table of labels: {abbreviated(missing, 3)}."
            )
        return np.array([place[name] for name in ids], np.int64)
    if len(table.splits) != rows:
        raise SourceError(f"the table of labels has {len(table.splits):,} rows, the features have {rows:,}.")
    return np.arange(rows)


def _labels(
    foreign: FeatureFile, table: Annotations | None, order: np.ndarray, rows: int, asked: ImportOptions
) -> tuple[np.ndarray, list[str], str, str]:
    """(labels, classes, task, name of the array they lie in)."""
    said = _said(foreign)
    classes = list(asked.classes) if asked.classes else said.get("classes")
    task, where = asked.task or said.get("task"), ""
    if table is not None:
        labels, known = table.labels[order], table.classes
        labels, known = _renamed(labels, known, list(asked.classes)) if asked.classes else (labels, known)
    else:
        array = _labels_array(foreign, asked.labels, rows)
        if array is None:
            labels, known = np.full(rows, -1, np.int64), []
        else:
            where = array.name
            labels, known = labels_of(array, classes, task)
    task = resolve_task(task, known, labels.ndim == 2, foreign.path.name)
    if task == "unlabelled":
        labels, known = np.full(rows, -1, np.int64), []
    return labels, known, task, where


def _said(foreign: FeatureFile) -> dict[str, Any]:
    """Classes and task that one of our own exports states."""
    if not is_export(foreign):
        return {}
    try:
        classes = json.loads(foreign.attributes["classes"])
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SourceError(f"{foreign.path.name}: its classes are no list of names.")
    return {"classes": classes, "task": foreign.attributes["task"]}


def is_export(foreign: FeatureFile) -> bool:
    return {"fingerprint", "classes", "task"} <= set(foreign.attributes)


def _labels_array(foreign: FeatureFile, asked: str | None, rows: int) -> ArrayInfo | None:
    if asked and asked not in foreign.arrays and Path(asked).suffix.lower() == ".npy":
        array = next(iter(open_foreign(Path(asked)).arrays.values()))
        if not array.shape or array.shape[0] != rows:
            raise SourceError(f"{asked} has the shape {list(array.shape)}; the features have {rows:,} rows.")
        return array
    if asked and asked not in foreign.arrays and Path(asked).suffix:
        raise SourceError(
            f"--labels {asked}: expected a table ({', '.join(_TABLES)}), an .npy, or one of {describe_arrays(foreign)}."
        )
    return _column(foreign, "labels", asked, rows)


def labels_of(array: ArrayInfo, classes: list[str] | None, asked: str | None) -> tuple[np.ndarray, list[str]]:
    """int64 [N] or float32 [N,L], and the classes."""
    if array.text:
        names = array.texts()
        return _renamed(*_from_names(names), classes) if classes else _from_names(names)
    values = array.whole()
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2 and values.dtype.kind in "biuf":
        return _several(array, values, classes, asked)
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise SourceError(f"{array.name} {list(array.shape)} {_kind(array)} is no column of labels.")
    numbers = _whole_numbers(array, values)
    if classes:
        if numbers.max(initial=-1) >= len(classes):
            raise SourceError(f"{array.name} has the label {numbers.max()}, and there are {len(classes)} classes.")
        return numbers, classes
    distinct = np.unique(numbers[numbers >= 0])
    return np.where(numbers < 0, -1, np.searchsorted(distinct, numbers)), [str(k) for k in distinct.tolist()]


def _from_names(names: list[str]) -> tuple[np.ndarray, list[str]]:
    classes = sorted(set(names) - {""})
    return class_labels(names, classes), classes


def _renamed(labels: np.ndarray, known: list[str], classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels of classes ``known`` in the order of ``classes``."""
    unknown = [name for name in known if name not in classes]
    if unknown or len(set(classes)) < len(classes):
        raise BadOption(
            f"--classes {','.join(classes)}: the labels are {abbreviated(known, 8)}; name each of them once."
        )
    if labels.ndim == 2:
        return labels[:, [known.index(name) for name in classes if name in known]], classes
    place = np.array([*(classes.index(name) for name in known), -1], np.int64)
    return place[labels], classes


def _whole_numbers(array: ArrayInfo, values: np.ndarray) -> np.ndarray:
    """int64 [N]; NaN is no label."""
    plain = np.where(np.isnan(values), -1, values) if values.dtype.kind == "f" else values
    wrong = np.flatnonzero((plain != np.rint(plain)) | (plain < -1) | (plain > 1 << 31))
    if len(wrong):
        raise SourceError(
            f"{array.name} row {wrong[0]:,} is {values[wrong[0]]}; a label is a whole number, or -1 for none."
        )
    return plain.astype(np.int64)


def _several(
    array: ArrayInfo, values: np.ndarray, classes: list[str] | None, asked: str | None
) -> tuple[np.ndarray, list[str]]:
    labels = values.astype(np.float32)
    wrong = np.argwhere((labels != 0) & (labels != 1) & ~np.isnan(labels))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise SourceError(
            f"{array.name} row {row:,}, label {column} is {values[row, column]}; expected 0, 1, or NaN for unknown."
        )
    names = classes or [f"label {k}" for k in range(labels.shape[1])]
    if len(names) != labels.shape[1]:
        raise SourceError(f"{array.name} has {labels.shape[1]} labels a row, and there are {len(names)} classes.")
    if asked in ("binary", "multiclass", "ordinal"):
        if not (labels.sum(1) == 1).all():
            raise SourceError(f"{array.name} has rows with other than one 1: its task is multilabel, not {asked}.")
        return labels.argmax(1).astype(np.int64), names
    return labels, names


def _splits(array: ArrayInfo | None, rows: int) -> list[str]:
    if array is None:
        return [""] * rows

    def wrong(row: int, word: str) -> SourceError:
        return SourceError(
            f"{array.name} row {row:,} is {word!r}; a split is train, val or test, or nothing. "
            "--splits-key '' leaves them out."
        )

    return split_names(array.texts(), wrong)


def _meta(foreign: FeatureFile) -> dict[str, ArrayInfo]:
    """Further columns of our own exports."""
    return {name: a for name, a in foreign.arrays.items() if name.startswith("meta/")} if is_export(foreign) else {}


def _further(array: ArrayInfo, rows: int) -> Any:
    if array.text:
        values: Any = np.array(array.texts(), object)
    else:
        values = array.whole()
    if values.shape != (rows,) or values.dtype.kind not in "biufO":
        raise SourceError(f"{array.name} {list(array.shape)} {_kind(array)} is no further column.")
    return values


def _picked(values: Any, order: np.ndarray) -> Any:
    return values[order] if isinstance(values, np.ndarray) else [values[k] for k in order.tolist()]


def _check_text(found: RowAnnotations) -> None:
    """HDF5 stores no NUL and no half characters."""
    columns: dict[str, Any] = {"ids": found.ids, "groups": found.groups or [], "classes": found.classes, **found.meta}
    for name, values in columns.items():
        for value in values if not isinstance(values, np.ndarray) or values.dtype == object else []:
            if "\0" in value or not is_text(value):
                raise SourceError(f"{name} has {value[:40]!a}, which cannot be stored as text.")
