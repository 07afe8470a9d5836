"""Parquet tables: columns as the CSV of the same table would have them, and images that lie inside.

A column of images is one of encoded bytes, or of records of bytes and path as the Hugging Face hub writes them. It is
read a row group at a time, when an image is asked for.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from featurecache.errors import SourceError, UnreadableImage
from featurecache.formatting import abbreviated
from featurecache.sources.base import package

_CELLS = 1 << 30  # of a Parquet table: a few bytes of it can stand for any number
_GROUPS = 2  # row groups of images in memory
# First bytes of what `images.decoding` reads; DICOM has its own 128 bytes later.
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", *(b"P%d" % k for k in range(1, 7)))


@dataclass(frozen=True)
class ParquetTable:
    """Columns of text; which column holds images, and what was left out."""

    rows: int
    names: list[str]
    columns: list[list[str]]
    images: ParquetImages | None
    paths: list[str] | None  # beside the bytes, where each has one and they differ
    left: list[str]


@dataclass(frozen=True, eq=False)
class ParquetImages:
    """The encoded images of one column."""

    file: str
    column: str
    inner: str | None  # the field of the bytes, in a column of records
    ends: np.ndarray  # int64: rows up to the end of each row group
    groups: OrderedDict[int, list[Any]] = field(default_factory=OrderedDict, repr=False)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself."""
        return type(self), (self.file, self.column, self.inner, self.ends)

    def __getitem__(self, row: int) -> bytes:
        group = int(np.searchsorted(self.ends, row, side="right"))
        with self.lock:
            if group not in self.groups:
                self.groups[group] = self._opened.read_row_group(group, columns=[self.column]).column(0).to_pylist()
                while len(self.groups) > _GROUPS:
                    self.groups.popitem(last=False)
            cell = self.groups[group][row - (int(self.ends[group - 1]) if group else 0)]
        value = cell.get(self.inner) if self.inner and cell else cell
        if not value:
            raise UnreadableImage("no image in this row")
        return bytes(value)

    @cached_property
    def _opened(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.file)


def read_parquet(file: str) -> ParquetTable:
    """Raises SourceError."""
    arrow = package("pyarrow", "parquet", f"to read {file} (or save the table as CSV)")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            rows, width, schema = opened.metadata.num_rows, opened.metadata.num_columns, opened.schema_arrow
            if rows * max(width, 1) > _CELLS:
                there = f"{rows:,} rows of {width:,} columns"
                raise SourceError(f"{file} declares {there}; more than {_CELLS:,} cells are not read.")
            ends = np.cumsum([opened.metadata.row_group(k).num_rows for k in range(opened.metadata.num_row_groups)])
            image, inner = _image_column(opened, schema) if rows else (None, None)
            plain = [name for name in schema.names if name != image and _is_text(schema.field(name).type)]
            left = [name for name in schema.names if name not in plain and name != image]
            table = opened.read(columns=plain)
            paths = _paths(opened, image, inner)
    except (arrow.ArrowException, OSError) as error:
        raise SourceError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}).") from error
    if not rows:
        raise SourceError(f"{file} has no rows; expected one for each image.")
    named = _class_names(schema.metadata or {})
    columns = [[_text(value, named.get(name)) for value in table.column(name).to_pylist()] for name in plain]
    images = ParquetImages(file, image, inner, ends.astype(np.int64)) if image else None
    return ParquetTable(rows, plain, columns, images, paths, left)


def _image_column(opened: Any, schema: Any) -> tuple[str | None, str | None]:
    """The column of encoded images, and the field of their bytes in it. Raises SourceError where there are two."""
    from pyarrow import types

    several: list[tuple[str, str | None]] = []
    for entry in schema:
        kind = entry.type
        if types.is_struct(kind) and any(part.name == "bytes" and _is_bytes(part.type) for part in kind):
            several.append((entry.name, "bytes"))
        elif _is_bytes(kind):
            first = next(opened.iter_batches(1, columns=[entry.name])).column(0)[0].as_py()
            several += (
                [(entry.name, None)] if first and (first.startswith(_STARTS) or first[128:132] == b"DICM") else []
            )
    if len(several) > 1:
        there = abbreviated([name for name, _ in several])
        raise SourceError(f"several columns hold images: {there}; save the table with one of them.")
    return several[0] if several else (None, None)


def _paths(opened: Any, image: str | None, inner: str | None) -> list[str] | None:
    if not image or not inner or "path" not in [part.name for part in opened.schema_arrow.field(image).type]:
        return None
    cells = opened.read(columns=[f"{image}.path"]).column(0).to_pylist()
    paths: list[Any] = [cell["path"] if cell else None for cell in cells]
    return paths if all(paths) and len(set(paths)) == len(paths) else None


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _is_text(kind: Any) -> bool:
    """Text, a number, or a list of them: what a cell of a CSV can say."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return not (types.is_nested(kind) or _is_bytes(kind))


def _text(value: Any, names: list[str] | None) -> str:
    if value is None or value != value:
        return ""
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else ""
    return str(value).strip()


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column → the names of its classes, as the hub's files state them beside the table."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {key: kind["names"] for key, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
