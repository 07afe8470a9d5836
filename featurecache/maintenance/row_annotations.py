"""Row annotations of a feature file: which of its columns are ids, labels, splits, groups, and what its classes are.

Columns are found by name, or as requested. Labels are whole numbers [N] (-1: none), words [N], or 0, 1 and NaN [N,L]
for several labels; they lie in the file, in an `.npy`, or in a table. Rows of a table that has paths or ids belong to
the features of that id, if the file has ids; else the order is the same, which is said. Splits, groups and further
columns are a table's before the file's, unless an option names the file's; what is not taken is left out, and said.
Classes and task that an export states are those of its own labels alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import BadOption, Reading, SeveralReadings, SourceError, UnknownSourceName, nearest
from featurecache.files.records import is_text
from featurecache.formatting import abbreviated, counted
from featurecache.maintenance.feature_files import ArrayInfo, FeatureFile, open_feature_file
from featurecache.sources.annotations import Annotations
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns
from featurecache.sources.labels import labels_of_numbers, ordered_labels, resolve_labels, split_names
from featurecache.sources.tables import is_table, read_annotations
from featurecache.store.schema import column_at

# Role -> names of arrays, lower case.
ARRAY_ROLES = {
    "features": ("features", "feature", "feats", "embeddings", "embedding", "vectors", "x"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "ids": ("ids", "id", "filenames", "filename", "files", "paths", "path", "names", "image_ids", "image_id"),
    "splits": ("splits", "split"),
    "groups": ("groups", "group", "patients", "patient", "patient_ids", "patient_id"),
}
_OURS = ("digests", "classes")  # in our own exports, and not needed


@dataclass(frozen=True)
class RowAnnotations(Annotations):
    """Columns [N] of the features' rows, and what the file holds beside them."""

    ids: list[str]
    task: str
    unused: list[str]


def annotate_rows(
    file: FeatureFile,
    features: Sequence[str],
    rows: int,
    keys: dict[str, str | None],
    columns: dict[str, str] | None,
    classes: Sequence[str] | None,
    how: LabelOptions,
    order: Sequence[str] | None = None,
) -> RowAnnotations:
    """What is known of the ``rows`` of the arrays ``features``. ``keys``: names of the arrays of labels (or a file),
    ids, splits and groups; ``how``: the task, and what -1 is in a table; for the others see `import_view`. Raises
    SourceError and BadOption where something does not fit."""
    if is_export(file) and "versions" in file.arrays:
        raise SourceError(
            f"{file.path.name} was exported with augmented copies, and an import takes every row for an image. "
            "Export it without --copies."
        )
    arrays = {role: _column(file, role, keys[role], rows) for role in ("ids", "splits", "groups")}
    ids = _ids(file, arrays["ids"], rows)
    table = _open_table(keys, columns, how, ids if arrays["ids"] else None)
    arrays["labels"] = None if table is not None else _labels_array(file, keys["labels"], rows)
    stated = _stated_classes(file) if table is None and keys["labels"] in (None, "labels") else None
    task = how.task or (file.attributes["task"] if stated is not None else None)
    labels, names, splits, meta = np.full(rows, -1, np.int64), list[str](), [""] * rows, dict[str, Any]()
    groups, notes = None, list[str]()
    if table is not None:
        matched = _order(table, ids if arrays["ids"] else None, rows)
        labels, names = _reordered(table.labels[matched], table.classes, classes)
        if table.ids is None or not arrays["ids"]:
            notes.append(f"Rows of {Path(str(keys['labels'])).name} are taken in the order of the features.")
        ids = column_at(table.ids, matched) if table.ids and not arrays["ids"] else ids
        splits = column_at(table.splits, matched)
        groups = column_at(table.groups, matched) if table.groups else None
        meta = column_at(table.meta, matched)
    if table is None and not (arrays["labels"] and arrays["labels"].text):
        how.refuse_unused("there are numbers" if arrays["labels"] else "there are none")
    cells = LabelColumns(file.path.name, lambda row: f"row {row:,}", replace(how, task=task))
    if array := arrays["labels"]:
        again = stated and set(classes or ()) == set(stated)  # the same names: another order, no other names
        labels, names = _labels_of(array, stated if again else classes or stated, cells)
        labels, names = _reordered(labels, names, classes if again else None)
    arrays |= {"splits": None} if any(splits) else {}
    arrays |= {"groups": None} if groups is not None else {}
    if named := arrays["splits"]:
        splits = split_names(named.texts(), lambda row: f"{named.name} row {row:,}", "--splits-key '' leaves them out.")
    if arrays["groups"]:
        groups = arrays["groups"].texts()
    further = {
        name: array for each, array in file.arrays.items()
        if is_export(file) and each.startswith("meta/") and (name := each.removeprefix("meta/")) not in meta
    }  # fmt: skip
    meta |= {name: _further(values, rows) for name, values in further.items()}
    labels, names, task = resolve_labels(labels, names, task, file.path.name)
    if order or not (classes or stated):  # which have an order of their own
        labels, names = ordered_labels(labels, names, task, order, keys["labels"] or file.path.name)
    _check_text({"ids": ids, "groups": groups or [], "classes": names, **meta})
    used = {*features, *_OURS, *(a.name for a in arrays.values() if a), *(f"meta/{name}" for name in further)}
    unused = [name for name in file.arrays if name not in used]
    said = table or Annotations(
        None, labels, splits, None, {}, names, remarks=tuple(cells.remarks), uncertain=cells.assumed
    )
    return RowAnnotations(
        ids, labels, splits, groups, meta, names, task, unused,
        remarks=said.remarks, notes=(*said.notes, *notes), uncertain=said.uncertain,
    )  # fmt: skip


def _open_table(
    keys: dict[str, str | None], columns: dict[str, str] | None, how: LabelOptions, ids: Sequence[str] | None
) -> Annotations | None:
    if (labels := keys["labels"]) and is_table(labels):
        if not Path(labels).exists():
            raise SourceError(f"there is no file {labels}.")
        leave = [role for role in ("split", "group") if keys[f"{role}s"]]
        if twice := [role for role in leave if role in (columns or {})]:
            role = twice[0]
            raise BadOption(f"--{role}s-key {keys[f'{role}s']} and --column {role}=… both say the {role}s; give one.")
        return read_annotations(labels, columns, how, ids, leave)
    if columns:
        raise BadOption("--column is about columns of a table: --labels FILE.csv.")
    return None


def is_export(file: FeatureFile) -> bool:
    return {"fingerprint", "classes", "task"} <= set(file.attributes)


def array_named(file: FeatureFile, key: str, option: str) -> ArrayInfo:
    if key not in file.arrays:
        near = nearest(key, file.arrays)
        raise UnknownSourceName(f"{option}: {file.path.name} has no {key!r}.{near} It holds {describe_arrays(file)}.")
    return file.arrays[key]


def describe_arrays(file: FeatureFile) -> str:
    """What a file holds, for a sentence."""
    return abbreviated([_shape_text(array) for array in file.arrays.values()], 8) or "nothing"


def _shape_text(array: ArrayInfo) -> str:
    return f"{array.name} {list(array.shape)} {'text' if array.text else array.dtype}"


def _column(file: FeatureFile, role: str, key: str | None, rows: int) -> ArrayInfo | None:
    """The array of a role: as requested, else by its name; of as many rows as the features."""
    if key is not None:
        arrays = [array_named(file, key, f"--{role}-key")] if key else []
    else:
        arrays = [array for name, array in file.arrays.items() if name.lower() in ARRAY_ROLES[role]]
    if len(arrays) > 1:
        names, option = [array.name for array in arrays], "labels" if role == "labels" else f"{role}_key"
        raise SeveralReadings(
            f"{file.path.name} has several arrays that could be the {role}: {', '.join(names)}. "
            f"Say which: --{role}-key {names[0]}.",
            [Reading(f"the {role} are {name}", {option: name}) for name in names],
        )
    for array in arrays:
        if array.shape[:1] != (rows,):
            there = counted(array.shape[0], "row") if array.shape else "one value"
            raise SourceError(f"{array.name} of {file.path.name} has {there}, the features have {rows:,}.")
    return arrays[0] if arrays else None


def _ids(file: FeatureFile, array: ArrayInfo | None, rows: int) -> list[str]:
    if array is None:
        return [f"{file.path.name}:{row}" for row in range(rows)]
    ids = array.texts()
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        if (first := seen.setdefault(name, row)) != row:
            raise SourceError(
                f"{array.name} of {file.path.name} names {name!r} twice (rows {first:,} and {row:,}); ids are "
                "different. --ids-key '' leaves them out."
            )
    return ids


def _order(table: Annotations, ids: list[str] | None, rows: int) -> np.ndarray:
    """For each row of the features that of the table."""
    if table.ids is not None and ids is not None:
        row_of = {name: row for row, name in enumerate(table.ids)}
        if missing := [name for name in ids if name not in row_of]:
            raise SourceError(
                f"the table of labels lacks {counted(len(missing), 'id')} of the features: {abbreviated(missing, 3)}. "
                "--ids-key '' takes its rows in their order."
            )
        return np.array([row_of[name] for name in ids], np.int64)
    if len(table.splits) != rows:
        raise SourceError(f"the table of labels has {counted(len(table.splits), 'row')}, the features have {rows:,}.")
    return np.arange(rows)


# -- labels


def _stated_classes(file: FeatureFile) -> list[str] | None:
    """The classes that one of our own exports states."""
    if not is_export(file):
        return None
    try:
        classes = json.loads(file.attributes["classes"])
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SourceError(f"{file.path.name}: its classes are no list of names.")
    return classes


def _labels_array(file: FeatureFile, key: str | None, rows: int) -> ArrayInfo | None:
    ending = Path(key).suffix.lower() if key and key not in file.arrays else ""
    if key and ending == ".npy":
        array = next(iter(open_feature_file(Path(key)).arrays.values()))
        if array.shape[:1] != (rows,):
            raise SourceError(f"{key} has the shape {list(array.shape)}; the features have {counted(rows, 'row')}.")
        return array
    if ending:
        raise SourceError(
            f"--labels {key}: expected a table (.csv, .tsv, .parquet), an .npy, or one of {describe_arrays(file)}."
        )
    return _column(file, "labels", key, rows)


def _labels_of(array: ArrayInfo, classes: Sequence[str] | None, reading: LabelColumns) -> tuple[np.ndarray, list[str]]:
    """int64 [N] or float32 [N,L], and the classes."""
    if array.text:
        return _reordered(*labels_of_columns({array.name: array.texts()}, reading), classes)
    labels, names = labels_of_numbers(array.whole(), array.name, classes, "label {}")
    if labels.ndim == 2 and reading.how.task in ("binary", "multiclass", "ordinal"):
        if not (labels.sum(1) == 1).all():
            raise SourceError(
                f"{array.name} has rows with other than one 1: its task is multilabel, not {reading.how.task}."
            )
        return labels.argmax(1).astype(np.int64), names
    return labels, names


def _reordered(labels: np.ndarray, names: list[str], classes: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels of the classes ``names`` in the order of ``classes``, if there is one."""
    if not classes:
        return labels, names
    others = set(names) ^ set(classes) if labels.ndim == 2 else set(names) - set(classes)
    if others or len(set(classes)) < len(classes):
        raise BadOption(f"--classes {','.join(classes)}: the labels are {abbreviated(names, 8)}; name each once.")
    if labels.ndim == 2:
        return labels[:, [names.index(name) for name in classes]], list(classes)
    place = np.array([*(classes.index(name) for name in names), -1], np.int64)
    return place[labels], list(classes)


def _further(array: ArrayInfo, rows: int) -> Any:
    values: Any = np.array(array.texts(), object) if array.text else array.whole()
    if values.shape != (rows,) or values.dtype.kind not in "biufO":
        raise SourceError(f"{_shape_text(array)} is no further column.")
    return values


def _check_text(columns: dict[str, Any]) -> None:
    """HDF5 stores no NUL and no half characters."""
    for name, values in columns.items():
        for value in values if not isinstance(values, np.ndarray) or values.dtype == object else []:
            if "\0" in value or not is_text(value):
                raise SourceError(f"{name} has {value[:40]!a}, which cannot be stored as text.")
