"""CSV and Parquet tables that name images; annotations on top of another source; names without folder or ending.

Images listed in a table: CSV, TSV or Parquet, one row an image.

Columns are found by their names (``ROLES``) or told by ``columns={"path": ..., "label": ..., "split": ..., "group":
...}``; an empty name says that there is none. All others go to ``meta``. Paths are relative to the folder of the
table (bare names are looked for below it: `featurecache.sources.bare_names`); the id of an image is its path as the
table writes it.

Labels. One column: its distinct values are the classes, sorted (numbers as numbers); an empty cell is no label. Where
there are splits, the classes are those of the train rows. Several columns, ``"label": "effusion,mass"``: each holds
1, 0, or nothing where nobody knows. Nothing else is taken for unknown: what -1 means differs between data sets
(CheXpert writes it for "uncertain"), so whoever has such a table decides and writes 0, 1 or nothing.

The files that a table names. Published tables often name them from the folder above, or without their folders, or
without their ending:

    CheXpert-v1.0-small/train.csv   CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
    Data_Entry_2017.csv             00000001_000.png       of images_001/images/00000001_000.png
    HAM10000_metadata.csv           ISIC_0027419           of HAM10000_images_part_1/ISIC_0027419.jpg

Where none of the first names is beside the table, the folder above is tried; and names without a folder are looked for
in those below. A name that is there twice is refused, one that is nowhere is a named failure when it is read.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featurecache.errors import SourceError, nearest
from featurecache.sources.base import (
    Dataset,
    ImageFiles,
    abbreviated,
    class_labels,
    resolve_task,
    safe_name,
    source_record,
    split_names,
)
from featurecache.sources.folders import is_image

# Role -> names it is known by, as compared: lower case, everything but letters and digits as "_".
ROLES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file",
             "image_name", "image_index", "img", "img_path"),
    "label": ("label", "class", "target", "finding", "diagnosis", "category", "class_name", "label_name"),
    "split": ("split", "set", "fold", "subset", "partition"),
    "group": ("group", "patient", "patient_id", "patientid", "subject", "subject_id", "group_id"),
}  # fmt: skip
_KNOWN = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0, "": np.nan, "nan": np.nan}
_CELLS = 1 << 30  # of a Parquet table: a few bytes of it can stand for any number


@dataclass
class Table:
    """Columns of text, and the number by which a person finds a row (a CSV's line; of Parquet the row, from 1)."""

    file: str
    columns: dict[str, list[str]]
    numbers: Sequence[int]

    @property
    def name(self) -> str:
        return os.path.basename(self.file)

    def row(self, index: int) -> str:
        return f"{self.name} row {self.numbers[index]:,}"


def open_table(data: str, columns: dict[str, str] | None, asked: str | None) -> Dataset:
    """The dataset listed in the table ``data`` (an absolute path)."""
    table = _read_table(data)
    roles = _find_roles(table, columns or {})
    ids = _paths(table, roles["path"][0])
    splits = _splits(table, roles["split"])
    notes = []
    labels, classes = _labels(table, roles["label"], splits, asked)
    task = resolve_task(asked, classes, labels.ndim == 2, table.name)
    if task == "unlabelled":
        labels, classes = np.full(len(ids), -1, np.int64), []
    used = {name for names in roles.values() for name in names}
    rest = [name for name in table.columns if name not in used]
    if task == "unlabelled" and asked is None:
        others = f" among {abbreviated(rest, 8)}" if rest else ""
        notes.append(f"No column of labels was found{others}: --column label=NAME names one, or several: label=A,B,C.")
    images, said = files_named(os.path.dirname(data), ids)
    return Dataset(
        name=safe_name(table.name.rsplit(".", 1)[0]),
        source=source_record("table", data, columns, asked),
        ids=ids,
        labels=labels,
        splits=splits,
        groups=_groups(table, roles["group"], ids),
        meta={name: _numbers_or_text(table.columns[name]) for name in rest},
        classes=classes,
        task=task,
        images=images,
        notes=(*notes, *said),
    )


@dataclass(frozen=True)
class Annotations:
    """What a table says of rows that lie elsewhere, in its order."""

    ids: list[str] | None  # None: it has no column of paths
    labels: np.ndarray
    splits: list[str]
    groups: list[str] | None
    meta: dict[str, list[str] | np.ndarray]
    classes: list[str]


def read_annotations(data: str, columns: dict[str, str] | None, asked: str | None) -> Annotations:
    """Labels of features that are there already: a table as for images, in which the paths may be missing. Its only
    column is the label, whatever it is called."""
    table = _read_table(data)
    given = {"label": next(iter(table.columns))} if len(table.columns) == 1 else {}
    roles = _find_roles(table, columns or given, needs_path=False)
    if not roles["label"]:
        raise SourceError(
            f"{table.name} has no column of labels among {abbreviated(list(table.columns), 8)}; "
            "--column label=NAME names one."
        )
    ids = _paths(table, roles["path"][0]) if roles["path"] else None
    alone = [f"{table.name}:{row}" for row in range(len(table.numbers))]  # one without a group is a group of its own
    return replace(_annotations(table, roles, asked, ids or alone), ids=ids)


def annotate(
    table: Table, ids: list[str], columns: dict[str, str], asked: str | None, known: Sequence[str] = ()
) -> Annotations:
    """What columns say of images whose ids are known; labels may be missing. ``known``: the classes in their order, of
    which the labels are names or numbers from 0."""
    roles = _find_roles(table, {**columns, "path": ""}, needs_path=False)
    if not known or len(roles["label"]) != 1 or asked in ("unlabelled", "multilabel"):
        return _annotations(table, roles, asked, ids)
    values = [_among(table.row(row), value, known) for row, value in enumerate(table.columns[roles["label"][0]])]
    said = _annotations(table, roles, "unlabelled", ids)
    return replace(said, labels=class_labels(values, known), classes=list(known))


def _among(row: str, value: str, known: Sequence[str]) -> str:
    if value.isascii() and value.isdigit() and int(value[:9]) < len(known):
        return known[int(value[:9])]
    if value in known or not value:
        return value
    raise SourceError(
        f'the label of {row} is "{value}"; expected 0 to {len(known) - 1} or one of {abbreviated(known)}.'
    )


def _annotations(table: Table, roles: dict[str, list[str]], asked: str | None, ids: list[str]) -> Annotations:
    splits = _splits(table, roles["split"])
    labels, classes = _labels(table, roles["label"], splits, asked)
    used = {name for names in roles.values() for name in names}
    meta = {name: _numbers_or_text(table.columns[name]) for name in table.columns if name not in used}
    return Annotations(ids, labels, splits, _groups(table, roles["group"], ids), meta, classes)


def _read_table(data: str) -> Table:
    return (_read_parquet if data.lower().endswith((".parquet", ".pq")) else _read_csv)(data)


def _labels(table: Table, names: list[str], splits: list[str], asked: str | None) -> tuple[np.ndarray, list[str]]:
    if len(names) > 1 or (names and asked == "multilabel"):
        return _several_labels(table, names), names
    return _one_label(table, names, splits, asked == "unlabelled")


def _read_csv(file: str) -> Table:
    rows, numbers = [], []
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            lines.seek(0)
            delimiter = "\t" if file.lower().endswith(".tsv") else max(",;\t|", key=header.count)
            reader = csv.reader(lines, delimiter=delimiter)
            for row in reader:
                if row:
                    rows.append(row)
                    numbers.append(reader.line_num)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise SourceError(f"{file} is not UTF-8 ({found}): save it as UTF-8 (Excel: CSV UTF-8).") from error
    except (csv.Error, OSError) as error:
        raise SourceError(f"{file} cannot be read as a table ({error}).") from error
    if len(rows) < 2:
        found = "a header only" if rows else "no rows"
        raise SourceError(f"{file} has {found}; expected a header and a row for each image.")
    names = [name.strip() or f"column {number}" for number, name in enumerate(rows[0], 1)]
    _refuse_repeated(file, names)
    for row, number in zip(rows[1:], numbers[1:], strict=True):
        if len(row) != len(names):
            raise SourceError(
                f"{os.path.basename(file)} row {number:,} has {len(row)} fields, the header {len(names)} "
                f"({abbreviated(names)}): write a field that holds {delimiter!r} in quotes."
            )
    columns = {name: [row[place].strip() for row in rows[1:]] for place, name in enumerate(names)}
    return Table(file, columns, numbers[1:])


def _read_parquet(file: str) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(
            f"{file} needs pyarrow to be read: pip install 'featurecache[parquet]', or save the table as CSV."
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            rows, columns_there = opened.metadata.num_rows, opened.metadata.num_columns
        if rows * max(columns_there, 1) > _CELLS:
            raise SourceError(
                f"{file} declares {rows:,} rows of {columns_there:,} columns; more than {_CELLS:,} cells are not read."
            )
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}).") from error
    _refuse_repeated(file, table.column_names)
    nested = [field.name for field in table.schema if not _is_plain(field.type)]
    if nested:
        raise SourceError(
            f"{os.path.basename(file)} holds other than text and numbers in {abbreviated(nested)}; expected paths of "
            "image files. Leave those columns out."
        )
    if not table.num_rows:
        raise SourceError(f"{file} has no rows; expected one for each image.")
    columns = {name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names}
    return Table(file, columns, range(1, table.num_rows + 1))


def _is_plain(kind: object) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type  # type: ignore[attr-defined]
    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _text(value: object) -> str:
    """A cell as the CSV of the same table would have it."""
    return "" if value is None or value != value else str(value).strip()


def _refuse_repeated(file: str, names: list[str]) -> None:
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise SourceError(f"{file} has the column {repeated[0]!r} more than once; rename one.")


def _find_roles(table: Table, asked: dict[str, str], *, needs_path: bool = True) -> dict[str, list[str]]:
    """Role -> its columns: as asked for, else by name."""
    unknown = [role for role in asked if role not in ROLES]
    if unknown:
        raise SourceError(f"columns cannot name a {unknown[0]!r}; they name {', '.join(ROLES)}.")
    roles: dict[str, list[str]] = {}
    for role, known in ROLES.items():
        if role in asked:
            roles[role] = _asked_columns(table, role, asked[role])
        else:
            told = {name for other in asked for name in asked[other].split(",")}
            roles[role] = [name for name in table.columns if _plain(name) in known and name not in told]
            if len(roles[role]) > 1:
                raise SourceError(
                    f"{table.name} has several columns that could be the {role}: {abbreviated(roles[role])}. "
                    f"Say which: --column {role}={roles[role][0]}."
                )
    if needs_path and not roles["path"]:
        raise SourceError(
            f"{table.name} has no column of image paths among {abbreviated(list(table.columns), 8)}; expected one "
            f"called {abbreviated(ROLES['path'], 4)}, or --column path=NAME."
        )
    taken = [name for names in roles.values() for name in names]
    if len(taken) > len(set(taken)):
        twice = next(name for name in taken if taken.count(name) > 1)
        raise SourceError(f"the column {twice!r} of {table.name} cannot be two things at once ({asked}).")
    return roles


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _asked_columns(table: Table, role: str, asked: str) -> list[str]:
    """The columns of ``asked``; a name with a comma in it is one column where the table has it."""
    names = [asked] if asked in table.columns else [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in table.columns:
            near = nearest(name, table.columns)
            raise SourceError(
                f"{table.name} has no column {name!r}; it has {abbreviated(list(table.columns), 8)}.{near}"
            )
    if len(names) > 1 and role != "label":
        raise SourceError(f"the {role} is one column of {table.name}, not {len(names)} ({asked}).")
    return names


def _paths(table: Table, name: str) -> list[str]:
    ids = table.columns[name]
    seen: dict[str, int] = {}
    for row, path in enumerate(ids):
        if not path:
            raise SourceError(f"{table.row(row)} has no path in its column {name!r}.")
        if path in seen:
            raise SourceError(
                f"{table.name} lists {path} twice (rows {table.numbers[seen[path]]:,} and {table.numbers[row]:,}); "
                "expected one row for each image."
            )
        seen[path] = row
    return ids


def _splits(table: Table, names: list[str]) -> list[str]:
    if not names:
        return [""] * len(table.numbers)

    def wrong(row: int, value: str) -> SourceError:
        return SourceError(
            f'{table.row(row)}: {names[0]!r} is "{value}", expected train, val or test (or nothing). '
            "If this column is no split: --column split= (with nothing behind it)."
        )

    return split_names(table.columns[names[0]], wrong)


def _groups(table: Table, names: list[str], ids: list[str]) -> list[str] | None:
    """The group of each image; one without is a group of its own."""
    return [group or image for group, image in zip(table.columns[names[0]], ids, strict=True)] if names else None


def _one_label(table: Table, names: list[str], splits: list[str], unlabelled: bool) -> tuple[np.ndarray, list[str]]:
    """int64 [N] and the classes. With splits, a class has to occur in train: a head cannot learn what it never sees."""
    if not names or unlabelled:
        return np.full(len(splits), -1, np.int64), []
    values = _class_names(table.columns[names[0]])
    has_train = "train" in splits
    shown = [value for value, split in zip(values, splits, strict=True) if split == "train" or not has_train]
    classes = sorted(set(shown) - {""}, key=_number_or_name)
    known = {*classes, ""}
    for row, value in enumerate(values):
        if value not in known:
            raise SourceError(
                f'{table.row(row)}: the label "{value}" is in no train row (there: {abbreviated(classes) or "none"}). '
                "Correct it, or put images of that class into train."
            )
    return class_labels(values, classes), classes


def _class_names(values: list[str]) -> list[str]:
    """Labels as names: "nan" is none, and 1.0 is 1 (what pandas makes of whole numbers beside an empty cell)."""
    names = {value: "" if value.lower() == "nan" else re.sub(r"^(-?\d+)\.0+$", r"\1", value) for value in set(values)}
    return [names[value] for value in values]


def _number_or_name(name: str) -> tuple[bool, float, str]:
    number = _number(name)
    return number is None, number or 0.0, name


def _several_labels(table: Table, names: list[str]) -> np.ndarray:
    """float32 [N, L]: 1, 0, NaN for unknown."""
    labels = np.empty((len(table.numbers), len(names)), np.float32)
    for place, name in enumerate(names):
        for row, value in enumerate(table.columns[name]):
            known = _KNOWN.get(value.lower())
            if known is None:
                raise SourceError(
                    f'{table.row(row)}: {name!r} is "{value}", expected 1, 0, or nothing where it is not known. '
                    "If this value means uncertain, decide: write 1, 0 or nothing."
                )
            labels[row, place] = known
    return labels


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _numbers_or_text(values: list[str]) -> list[str] | np.ndarray:
    """A further column: int64 or float64 (empty: NaN) where every cell is a number, else the text."""
    found: dict[str, float | None] = {value: _number(value) for value in set(values)}
    missing = {value for value in found if not value or value.lower() == "nan"}
    code = any(re.match(r"^[-+]?0\d", value) for value in found)  # 007 is a code: as a number it would lose its zeros
    text = any(number is None for value, number in found.items() if value not in missing)
    if code or text or len(missing) == len(found):
        return values
    try:
        return np.array([int(value) for value in values], np.int64)
    except (ValueError, OverflowError):
        return np.array([np.nan if value in missing else found[value] for value in values], np.float64)


_LOOKED_AT = 20  # paths tried at opening


def files_named(folder: str, names: list[str]) -> tuple[ImageFiles, list[str]]:
    """The files of ``names``, relative to ``folder``; what to say where the first of them are not there. Raises
    SourceError."""
    images = ImageFiles(folder, names)
    tried, above = range(min(_LOOKED_AT, len(names))), ImageFiles(os.path.dirname(folder), names)
    if any(os.path.exists(images.path(row)) for row in tried):
        return images, []
    if "/" in names[0] and any(os.path.exists(above.path(row)) for row in tried):
        return above, [f"Paths are relative to {above.root}, the folder above that of the table."]
    places = [] if any("/" in name for name in names) else _located(folder, names)
    found = [place for place, name in zip(places, names, strict=False) if place != name]
    if found:
        counts = f"{len(found):,} of {len(names):,}"
        return ImageFiles(folder, places), [f"The table gives bare names: {counts} were found in the folders below it."]
    first = images.path(0)
    stem = f"; {first}.png would be: the paths lack their ending" if os.path.exists(first + ".png") else ""
    return images, [
        f"None of the first {len(tried):,} images is there (looked for {first}{stem}). Paths are relative to {folder}."
    ]


def _located(folder: str, names: Sequence[str]) -> list[str]:
    """The path of each name below ``folder``; the name itself where it is nowhere. Raises SourceError."""
    places: dict[str, list[str]] = {name: [] for name in names}
    for path in _images_below(folder):
        name = os.path.basename(path)
        for word in (name, os.path.splitext(name)[0]):
            if word in places:
                places[word].append(path)
    twice = next((name for name, found in places.items() if len(found) > 1), None)
    if twice is not None:
        raise SourceError(
            f"{twice} stands for {abbreviated(sorted(places[twice]), 3)} in {folder}; expected one file of that name. "
            "Remove the others, or write the paths with their folders."
        )
    return [found[0] if found else name for name, found in places.items()]


def _images_below(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            if is_image(name) and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)
