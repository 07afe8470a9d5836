"""Tables that list images, CSV, TSV or Parquet, one row an image; and tables of labels for images that lie elsewhere.

Columns are found by their names (`labels.ROLES`) or told by ``columns={"path": ..., "label": ..., "split": ...,
"group": ...}``; an empty name says that there is none. All others go to ``meta``. Paths are relative to the folder of
the table, and the id of an image is its path as the table writes it. Published tables often name files from the folder
above, or without their folders, or without their ending:

    CheXpert-v1.0-small/train.csv   CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
    Data_Entry_2017.csv             00000001_000.png       of images_001/images/00000001_000.png
    HAM10000_metadata.csv           ISIC_0027419           of HAM10000_images_part_1/ISIC_0027419.jpg

Where none of the first names is beside the table, the folder above is tried; and names without a folder are looked for
in those below. A name that is there twice is refused, one that is nowhere is a named failure when it is read.

Labels. One column: its distinct values are the classes, sorted (numbers as numbers); an empty cell is no label. Where
there are splits, the classes are those of the train rows. Several columns, ``"label": "effusion,mass"``: each holds
1, 0, or nothing where nobody knows. Nothing else is taken for unknown: what -1 means differs between data sets
(CheXpert writes it for "uncertain"), so whoever has such a table decides and writes 0, 1 or nothing.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from featurecache.errors import SourceError
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset, ImageFiles, package
from featurecache.sources.folders import is_image
from featurecache.sources.labels import ROLES, Annotations, Table, annotations_of_text, find_roles, resolve_labels

TABLES = (".csv", ".tsv", ".parquet", ".pq")  # endings
_CELLS = 1 << 30  # of a Parquet table: a few bytes of it can stand for any number
_TRIED = 20  # paths tried at opening


def open_table(data: str, columns: dict[str, str] | None, task: str | None) -> Dataset:
    """The dataset listed in the table ``data`` (an absolute path)."""
    table = _read_table(data)
    roles = _find_roles(table, columns or {})
    ids = _paths(table, roles["path"][0])
    rows = annotations_of_text(table, roles, ids, task)
    labelled = resolve_labels(rows.labels, rows.classes, task, table.name)
    images, notes = _image_files(os.path.dirname(data), ids)
    if labelled.task == "unlabelled" and task is None:
        others = f" among {abbreviated(list(rows.meta), 8)}" if rows.meta else ""
        way = "--column label=NAME names one, or several: label=A,B,C"
        notes.insert(0, f"No column of labels was found{others}: {way}.")
    return Dataset(
        name=table.name.rsplit(".", 1)[0],
        ids=ids,
        **labelled._asdict(),
        splits=rows.splits,
        groups=rows.groups,
        meta=rows.meta,
        images=images,
        notes=tuple(notes),
    )


def read_annotations(data: str, columns: dict[str, str] | None, task: str | None) -> Annotations:
    """Labels of features that are there already: a table as for images, in which the paths may be missing. Its only
    column is the label, whatever it is called."""
    table = _read_table(data)
    only = {"label": next(iter(table.columns))} if len(table.columns) == 1 else {}
    roles = _find_roles(table, columns or only, needs_path=False)
    if not roles["label"]:
        there = abbreviated(list(table.columns), 8)
        raise SourceError(f"{table.name} has no column of labels among {there}; --column label=NAME names one.")
    ids = _paths(table, roles["path"][0]) if roles["path"] else None
    own = [f"{table.name}:{row}" for row in range(len(table.places))]  # one without a group is a group of its own
    return replace(annotations_of_text(table, roles, ids or own, task), ids=ids)


def annotate(
    table: Table, ids: list[str], columns: dict[str, str], task: str | None, classes: Sequence[str] = ()
) -> Annotations:
    """What columns say of images whose ``ids`` are there; labels may be missing. ``classes``, in their order: those of
    which the labels are names, or numbers from 0."""
    roles = _find_roles(table, {**columns, "path": ""}, needs_path=False)
    return annotations_of_text(table, roles, ids, task, classes)


# -- reading


def _read_table(file: str) -> Table:
    read = _read_parquet if file.lower().endswith((".parquet", ".pq")) else _read_csv
    names, columns, places = read(file)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SourceError(f"{file} has the column {repeated[0]!r} more than once; rename one.")
    return Table(file, dict(zip(names, columns, strict=True)), places)


def _read_csv(file: str) -> tuple[list[str], list[list[str]], Sequence[int]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            lines.seek(0)
            delimiter = "\t" if file.lower().endswith(".tsv") else max(",;\t|", key=header.count)
            reader = csv.reader(lines, delimiter=delimiter)
            rows = [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise SourceError(f"{file} is not UTF-8 ({byte}): save it as UTF-8 (Excel: CSV UTF-8).") from error
    except (csv.Error, OSError) as error:
        raise SourceError(f"{file} cannot be read as a table ({error}).") from error
    if len(rows) < 2:
        there = "a header only" if rows else "no rows"
        raise SourceError(f"{file} has {there}; expected a header and a row for each image.")
    names = [name.strip() or f"column {number}" for number, name in enumerate(rows.pop(0)[1], 1)]
    for number, row in rows:
        if len(row) != len(names):
            there = f"{os.path.basename(file)} row {number:,} has {len(row)} fields, the header {len(names)}"
            raise SourceError(f"{there} ({abbreviated(names)}): write a field that holds {delimiter!r} in quotes.")
    columns = [[row[place].strip() for _, row in rows] for place in range(len(names))]
    return names, columns, [number for number, _ in rows]


def _read_parquet(file: str) -> tuple[list[str], list[list[str]], Sequence[int]]:
    """As the CSV of the same table has it."""
    arrow = package("pyarrow", "parquet", f"to read {file} (or save the table as CSV)")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            rows, width = opened.metadata.num_rows, opened.metadata.num_columns
        if rows * max(width, 1) > _CELLS:
            there = f"{rows:,} rows of {width:,} columns"
            raise SourceError(f"{file} declares {there}; more than {_CELLS:,} cells are not read.")
        table = parquet.read_table(file)
    except (arrow.ArrowException, OSError) as error:
        raise SourceError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}).") from error
    if nested := [field.name for field in table.schema if not _is_plain(field.type)]:
        there = f"{os.path.basename(file)} holds other than text and numbers in {abbreviated(nested)}"
        raise SourceError(f"{there}; expected paths of image files. Leave those columns out.")
    if not table.num_rows:
        raise SourceError(f"{file} has no rows; expected one for each image.")

    def text(value: Any) -> str:
        return "" if value is None or value != value else str(value).strip()

    columns = [[text(value) for value in column.to_pylist()] for column in table.columns]
    return table.column_names, columns, range(1, table.num_rows + 1)


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


# -- what each column is


def _find_roles(table: Table, requested: dict[str, str], *, needs_path: bool = True) -> dict[str, list[str]]:
    """Role → its columns: as requested, else by name."""
    plain = _plain_names(table.columns)
    candidates = {role: [name for name in plain if plain[name] in names] for role, names in ROLES.items()}
    roles = find_roles(table.name, list(plain), requested, candidates, several="label")
    if needs_path and not roles["path"]:
        expected = f"expected one called {abbreviated(ROLES['path'], 4)}, or --column path=NAME"
        raise SourceError(f"{table.name} has no column of image paths among {abbreviated(list(plain), 8)}; {expected}.")
    return roles


def label_columns(names: Iterable[str]) -> list[str]:
    """Those that are called as columns of labels are."""
    return [name for name, plain in _plain_names(names).items() if plain in ROLES["label"]]


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """As names of columns are compared."""
    return {name: re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names}


def _paths(table: Table, name: str) -> list[str]:
    ids = table.columns[name]
    seen: dict[str, int] = {}
    for row, path in enumerate(ids):
        if not path:
            raise SourceError(f"{table.row(row)} has no path in its column {name!r}.")
        if (first := seen.setdefault(path, row)) != row:
            rows = f"rows {table.places[first]:,} and {table.places[row]:,}"
            raise SourceError(f"{table.name} lists {path} twice ({rows}); expected one row for each image.")
    return ids


# -- the files that the paths name


def _image_files(folder: str, names: list[str]) -> tuple[ImageFiles, list[str]]:
    """The files of ``names``, relative to ``folder``; what to say where the first of them are not there. Raises
    SourceError."""
    images, above = ImageFiles(folder, names), ImageFiles(os.path.dirname(folder), names)
    tried = range(min(_TRIED, len(names)))
    if any(os.path.exists(images.path(row)) for row in tried):
        return images, []
    if "/" in names[0] and any(os.path.exists(above.path(row)) for row in tried):
        return above, [f"Paths are relative to {above.root}, the folder above that of the table."]
    paths = names if any("/" in name for name in names) else _paths_below(folder, names)
    if located := sum(path != name for path, name in zip(paths, names, strict=True)):
        counts = f"{located:,} of {len(names):,}"
        return ImageFiles(folder, paths), [f"The table gives bare names: {counts} were found in the folders below it."]
    first = images.path(0)
    stem = f"; {first}.png would be: the paths lack their ending" if os.path.exists(first + ".png") else ""
    looked = f"looked for {first}{stem}"
    return images, [f"None of the first {len(tried):,} images is there ({looked}). Paths are relative to {folder}."]


def _paths_below(folder: str, names: Sequence[str]) -> list[str]:
    """The path of each name below ``folder``; the name itself where it is nowhere. Raises SourceError."""
    paths: dict[str, list[str]] = {name: [] for name in names}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for file in files:
            if is_image(file) and not file.startswith("."):
                for word in {file, os.path.splitext(file)[0]} & paths.keys():
                    paths[word].append(os.path.relpath(os.path.join(place, file), folder))
    if twice := [name for name, several in paths.items() if len(several) > 1]:
        there = f"{abbreviated(sorted(paths[twice[0]]), 3)} in {folder}; expected one file of that name"
        raise SourceError(f"{twice[0]} stands for {there}. Remove the others, or write the paths with their folders.")
    return [several[0] if several else name for name, several in paths.items()]
