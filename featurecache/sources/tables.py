"""Tables that list images, CSV, TSV or Parquet; and tables of labels for images that lie elsewhere.

Columns are found by their names (`labels.ROLES`) or told by ``columns={"path": ..., "label": ..., "split": ...,
"group": ...}``; an empty name says that there is none. All others go to ``meta``. The id of an image is its path as the
table writes it; where the files are `image_paths` finds. What the cells of labels mean `label_cells` says. A Parquet
file may hold the images themselves.

An image may have several rows, one for each box or finding: equal labels are one, different ones in a table of boxes
(or with the task multilabel) are several labels, and whatever else contradicts itself is refused with its rows. Where
there are splits, the classes are those of the train rows.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from featurecache.errors import Reading, SeveralReadings, SourceError
from featurecache.files.delimited import read_delimited
from featurecache.formatting import abbreviated, counted
from featurecache.sources.annotations import Annotations, Table, annotations_of_text, roles_of_table
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles
from featurecache.sources.image_paths import image_files
from featurecache.sources.label_cells import LabelOptions, one_hot_columns
from featurecache.sources.labels import ROLES, resolve_labels
from featurecache.sources.parquet_files import ParquetTable, read_parquet
from featurecache.sources.vocabulary import is_missing, spelling_key

_TEXTS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zip", ".tsv.zip")
_PARQUET = (".parquet", ".pq")
# Columns of boxes: a table that has one lists findings, and an image as often as it has some.
_BOXES = frozenset(("x", "xmin", "x1", "bbox", "box", "boxes"))


def is_table(name: str) -> bool:
    """By its ending."""
    return name.lower().endswith((*_TEXTS, *_PARQUET))


def open_table(
    data: str, columns: dict[str, str] | None, task: str | None, *, root: str | None = None, **how: object
) -> Dataset:
    """The dataset listed in the table ``data`` (an absolute path), its files below ``root`` instead of its own folder;
    ``how``: see `LabelOptions`. Raises SourceError."""
    reading = LabelOptions(task, **how)  # type: ignore[arg-type]
    table, inside = _read_table(data)
    embedded = inside.images if inside and not (columns or {}).get("path") else None
    roles = roles_of_table(table, columns or {})
    if embedded is None and not roles["path"]:
        expected = f"expected one called {abbreviated(ROLES['path'][0], 4)}, or --column path=NAME"
        there = abbreviated(list(table.columns), 8)
        raise SourceError(f"{table.name} has no column of image paths among {there}; {expected}.")
    if inside and embedded:
        ids = _ids_of_embedded(table, roles, inside)
        understood = [f"images inside {table.name}, in its column {embedded.column}"]
    else:
        table, understood = _one_row_each(table, roles, task)
        ids = table.columns[roles["path"][0]]
    rows = annotations_of_text(table, roles, ids, reading, splits_in_paths="split" not in (columns or {}))
    labelled = resolve_labels(rows.labels, rows.classes, task, table.name)
    images: ImageFiles | ImageArrays
    if embedded:
        images = ImageArrays([embedded], (data,))
    else:
        images, found = image_files(os.path.dirname(data), ids, root)
        understood += found
    notes = list(rows.notes)
    if inside and inside.left:
        understood.append(f"columns left out, neither text nor numbers: {abbreviated(inside.left)}")
    if labelled.task == "unlabelled" and task is None:
        notes.insert(0, _no_labels(rows))
    return Dataset(
        name=re.sub(r"\.\w+(\.gz|\.zip)?$", "", table.name),
        source={"root": root and os.path.abspath(os.path.expanduser(root)), "uncertain": rows.uncertain},
        ids=ids,
        **labelled._asdict(),
        splits=rows.splits,
        groups=rows.groups,
        meta=rows.meta,
        images=images,
        notes=tuple(notes),
        understood=(*understood, *rows.remarks),
    )


def read_annotations(
    data: str, columns: dict[str, str] | None, how: LabelOptions, own_ids: Sequence[str] | None = None,
    leave: Sequence[str] = (),
) -> Annotations:  # fmt: skip
    """Labels of features that are there already: a table as for images, in which the paths may be missing. Its only
    column is the label, whatever it is called. ``own_ids``: of the features; where no column is called a path, the one
    that holds them is. ``leave``: roles that something else has, "split" or "group"."""
    table, _ = _read_table(data)
    only = {"label": next(iter(table.columns))} if len(table.columns) == 1 else {}
    roles = roles_of_table(table, columns or only) | {role: [] for role in leave}
    if not roles["path"] and own_ids is not None:
        free = {name: cells for name, cells in table.columns.items() if not any(name in own for own in roles.values())}
        holding = [name for name, cells in free.items() if set(own_ids) <= set(cells)]
        roles["path"] = (holding or [name for name in free if name.lower() in ("id", "ids")])[:1]
    if not roles["label"]:
        there = abbreviated(list(table.columns), 8)
        raise SourceError(f"{table.name} has no column of labels among {there}; --column label=NAME names one.")
    if roles["path"]:
        table, _ = _one_row_each(table, roles, how.task)
    ids = table.columns[roles["path"][0]] if roles["path"] else None
    own = [f"{table.name}:{row}" for row in range(len(table.places))]  # one without a group is a group of its own
    by_path = ids is not None and "split" not in (*(columns or {}), *leave)
    return replace(annotations_of_text(table, roles, ids or own, how, splits_in_paths=by_path), ids=ids)


# -- reading


def _read_table(file: str) -> tuple[Table, ParquetTable | None]:
    places: Sequence[int]
    if file.lower().endswith(_PARQUET):
        inside = read_parquet(file)
        names, columns, places = inside.names, inside.columns, range(1, inside.rows + 1)
    else:
        inside = None
        names, columns, places = _read_csv(file)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SourceError(f"{file} has the column {repeated[0]!r} more than once; rename one.")
    return Table(file, dict(zip(names, columns, strict=True)), places), inside


def _read_csv(file: str) -> tuple[list[str], list[list[str]], Sequence[int]]:
    try:
        rows = read_delimited(file)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise SourceError(f"{file} is not UTF-8 ({byte}): save it as UTF-8 (Excel: CSV UTF-8).") from error
    except (csv.Error, UnicodeError, OSError) as error:
        raise SourceError(f"{file} cannot be read as a table ({error}).") from error
    if len(rows) < 2:
        there = "a header only" if rows else "no rows"
        raise SourceError(f"{file} has {there}; expected a header and a row for each image.")
    names = [name.strip() or f"column {number}" for number, name in enumerate(rows.pop(0)[1], 1)]
    for number, row in rows:
        if len(row) != len(names):
            there = f"{os.path.basename(file)} row {number:,} has {len(row)} fields, the header {len(names)}"
            raise SourceError(
                f"{there} ({abbreviated(names)}): write a field that holds the sign between fields in quotes."
            )
    columns = [[row[place].strip() for _, row in rows] for place in range(len(names))]
    return names, columns, [number for number, _ in rows]


# -- what is said of its columns


def _no_labels(rows: Annotations) -> str:
    others = f" among {abbreviated(list(rows.meta), 8)}" if rows.meta else ""
    way = "--column label=NAME names one, or several: label=A,B,C"
    if columns := one_hot_columns(rows.meta):
        way = f"{abbreviated(columns, 3)} hold one 1 in each row: --column label={','.join(columns)}"
    return f"No column of labels was found{others}: {way}."


def _ids_of_embedded(table: Table, roles: dict[str, list[str]], inside: ParquetTable) -> list[str]:
    """The paths that stand beside the images, where they tell them apart; else the table's name and the row."""
    named = table.columns[roles["path"][0]] if roles["path"] else None
    for paths in (inside.paths, named):
        if paths and all(paths) and len(set(paths)) == len(paths):
            return list(paths)
    return [f"{table.name}:{row}" for row in range(inside.rows)]


# -- several rows of one image


def _one_row_each(table: Table, roles: dict[str, list[str]], task: str | None) -> tuple[Table, list[str]]:
    """The table with one row for each image, and what was understood of those that have several."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, path in enumerate(table.columns[roles["path"][0]]):
        if not path:
            raise SourceError(f"{table.row(row)} has no path in its column {roles['path'][0]!r}.")
        rows_of[path].append(row)
    count = len(table.places)
    if len(rows_of) == count:
        return table, []
    boxes = [name for name in table.columns if re.sub(r"[^a-z0-9]", "", name.lower()) in _BOXES]
    unite = len(roles["label"]) == 1 and (task == "multilabel" or (task is None and bool(boxes)))
    label = roles["label"][0] if unite else ""
    ruled = [name for role in ("label", "split", "group") for name in roles[role] if name != label]
    columns, left, united = dict[str, list[str]](), list[str](), ""
    for name, cells in table.columns.items():
        kinds = [_kinds(cells, rows) for rows in rows_of.values()]
        several = [number for number, cell in enumerate(kinds) if len(cell) > 1]
        numbers = name == label and _are_numbers(cell for number in several for cell in kinds[number])
        if several and (name in ruled or numbers):
            _refuse_contradiction(table, name, list(rows_of.items())[several[0]], roles)
        if several and name == label:
            united = ", the findings of the rows of one several labels"
            columns[name] = [str(cell) if cell else "" for cell in kinds]
        elif several:
            left.append(name)
        else:
            columns[name] = [cell[0] if cell else "" for cell in kinds]
    notes = [f"{count:,} rows are {counted(len(rows_of), 'image')}{united}"]
    if left:
        notes.append(f"columns left out, different between the rows of an image: {abbreviated(left)}")
    firsts = [table.places[rows[0]] for rows in rows_of.values()]
    return Table(table.file, columns, firsts), notes  # type: ignore[arg-type]


def _kinds(cells: Sequence[str], rows: list[int]) -> list[str]:
    """The different cells of some rows that say something, in their order; spellings of one are one."""
    if len(rows) == 1:
        return [cells[rows[0]]]
    kinds = {spelling_key(re.sub(r"^([-+]?\d+)\.0+$", r"\1", cells[row])): cells[row] for row in reversed(rows)}
    return [cell for cell in reversed(kinds.values()) if not is_missing(cell)]


def _refuse_contradiction(table: Table, name: str, image: tuple[str, list[int]], roles: dict[str, list[str]]) -> None:
    path, rows = image
    cells = table.columns[name]
    first, *others = (row for row in rows if not is_missing(cells[row]))
    other = next(row for row in others if len(_kinds(cells, [first, row])) > 1)
    there = f"rows {table.places[first]:,} and {table.places[other]:,}: {name} {cells[first]!r} and {cells[other]!r}"
    wrong = f"{table.name} lists {path} twice ({there}); expected one row for each image, or rows that agree"
    if [name] == roles["label"] and not _are_numbers(_kinds(cells, rows)):
        raise SeveralReadings(
            f"{wrong}; --task multilabel takes several findings of one image together.",
            [Reading("the rows of an image are its several findings", {"task": "multilabel"})],
        )
    raise SourceError(f"{wrong}.")


def _are_numbers(cells: Iterable[str]) -> bool:
    return all(cell.replace(".", "").lstrip("-").isdigit() for cell in cells)
