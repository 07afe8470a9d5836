"""What a shard or a view may hold, and reading it: the same functions here and in the process that looks at files of
unknown origin before we do (see `featurecache.files.guard`). No torch is imported.

Nothing is read before its size is known: links, layouts, types, shapes and attributes first, then the small datasets.
Allowed is what our own writers make: groups one level deep, datasets in one piece, plain numbers and text.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5t

from featurecache.errors import CacheError, UnsafeFile
from featurecache.files.atomic import FORMAT, USER_BLOCK
from featurecache.files.records import parse
from featurecache.images.augmentation import AugmentedCopies

DIGEST = np.dtype("S32")
FILES = np.dtype([("path", "S255"), ("size", "i8"), ("offset", "i8"), ("rows", "i8"), ("hash", "S32")])
TASKS = ("binary", "multiclass", "ordinal", "multilabel", "unlabelled")
SPLITS = {"train", "val", "test", ""}
MAX_OBJECTS = 65_536  # groups and datasets in a file: a table's columns, each one dataset
MAX_ATTRIBUTES = 64  # of one object
MAX_ATTRIBUTE = 32 << 20  # bytes of one attribute
MAX_VIEW = 4 << 30  # bytes of a view, which is read into memory
MAX_VALUES = 1 << 30  # numbers in one row; a shard is not larger
_MAX_STRING = 4096  # bytes of one element of fixed-length text
_NUMBERS = [
    getattr(h5t, f"STD_{kind}{bits}{order}") for kind in "IU" for bits in (8, 16, 32, 64) for order in ("LE", "BE")
] + [getattr(h5t, f"IEEE_F{bits}{order}") for bits in (16, 32, 64) for order in ("LE", "BE")]
_OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]*")
_NOT_HEX = re.compile(rb"[^0-9a-f]")


def check_inside(file: h5py.File, name: Path, *, virtual: bool) -> None:
    """Refuse what could lead HDF5 out of this file or cost more than the file has: links, external storage, filters,
    shapes beyond the file, types of other kinds, large attributes and, unless ``virtual``, virtual datasets and text
    of variable length. Follows no link; reads no data, and attributes only by their size."""
    size = file.id.get_filesize()
    seen = {h5o.get_info(file.id).addr}
    _check_attributes(file.id, str(name))
    pending = [(file.id, True)]
    while pending:
        group, is_root = pending.pop()
        for key in group:
            shown = f"{name}: {key.decode(errors='backslashreplace')!a}"
            if group.links.get_info(key).type != h5l.TYPE_HARD:
                raise UnsafeFile(f"{shown} is a link that leads elsewhere; no file of featurecache has one.")
            thing = h5o.open(group, key)
            identity = h5o.get_info(thing).addr
            if identity in seen:
                raise UnsafeFile(f"{name} names one object twice; no file of featurecache does.")
            seen.add(identity)
            if len(seen) > MAX_OBJECTS:
                raise UnsafeFile(f"{name} holds more than {MAX_OBJECTS:,} datasets.")
            if isinstance(thing, h5g.GroupID) and is_root:
                pending.append((thing, False))
            elif isinstance(thing, h5d.DatasetID):
                _check_dataset(thing, shown, size, virtual)
            else:
                raise UnsafeFile(f"{shown} is neither a dataset nor a group of datasets.")
            _check_attributes(thing, shown)


def _check_dataset(dataset: h5d.DatasetID, name: str, size: int, virtual: bool) -> None:
    creation = dataset.get_create_plist()
    if creation.get_external_count():
        raise UnsafeFile(f"{name} keeps its data in another file; no file of featurecache does.")
    if creation.get_nfilters():
        raise UnsafeFile(f"{name} is compressed or filtered; no file of featurecache is.")
    kind = dataset.get_type()
    if not _is_plain(kind) or (kind.get_class() == h5t.STRING and kind.is_variable_str() and not virtual):
        raise UnsafeFile(f"{name} holds other things than numbers and text ({_named(kind)}).")
    if creation.get_layout() == h5d.VIRTUAL:
        if not virtual:
            raise UnsafeFile(f"{name} is a virtual dataset; a shard holds its rows itself.")
        return
    if creation.get_layout() != h5d.CONTIGUOUS:
        raise UnsafeFile(f"{name} is not stored in one piece; every dataset of featurecache is.")
    declared = math.prod(dataset.shape) * kind.get_size()
    offset = dataset.get_offset()
    if declared and (offset is None or offset < USER_BLOCK or offset + declared > size):
        raise UnsafeFile(f"{name} declares {declared:,} bytes, which its file of {size:,} bytes does not hold.")


def _is_plain(kind: h5t.TypeID) -> bool:
    if kind.committed():
        return False
    what = kind.get_class()
    if what == h5t.STRING:
        return bool(kind.is_variable_str()) or kind.get_size() <= _MAX_STRING
    if what == h5t.ENUM:
        return kind.get_size() == 1 and bool(kind.dtype == np.dtype(bool))
    if what == h5t.COMPOUND:
        return (
            kind.get_nmembers() == len(FILES.names or ())
            and kind.get_size() == FILES.itemsize
            and bool(kind.dtype == FILES)
        )
    return what in (h5t.INTEGER, h5t.FLOAT) and any(kind.equal(number) for number in _NUMBERS)


def _named(kind: h5t.TypeID) -> str:
    names = {h5t.REFERENCE: "references", h5t.OPAQUE: "opaque bytes", h5t.VLEN: "lists", h5t.ARRAY: "arrays",
             h5t.COMPOUND: "records", h5t.ENUM: "an enumeration", h5t.STRING: "long or loose text"}  # fmt: skip
    return "a type of its own" if kind.committed() else names.get(kind.get_class(), "an unusual number")


def _check_attributes(thing: Any, name: str) -> None:
    count = h5a.get_num_attrs(thing)
    if count > MAX_ATTRIBUTES:
        raise UnsafeFile(f"{name} has {count:,} attributes; no file of featurecache has more than {MAX_ATTRIBUTES}.")
    for index in range(count):
        attribute = h5a.open(thing, index=index)
        kind = attribute.get_type()
        single = attribute.get_space().get_simple_extent_npoints() == 1
        if not single or kind.get_class() == h5t.COMPOUND or not _is_plain(kind):
            raise UnsafeFile(f"{name} has an attribute of {_named(kind)}; ours are single numbers and text.")
        if attribute.get_storage_size() > MAX_ATTRIBUTE:
            raise UnsafeFile(f"{name} has an attribute of {attribute.get_storage_size():,} bytes.")


def attributes_of(thing: h5py.HLObject, name: Path) -> dict[str, Any]:
    """Attributes of an object whose number and types were checked; text is `str`."""
    found = {}
    for key, value in thing.attrs.items():
        value = value.decode() if isinstance(value, bytes) else value
        if isinstance(value, str) and len(value) > MAX_ATTRIBUTE:
            raise UnsafeFile(f"{name} has an attribute of {len(value):,} characters ({key[:40]!a}).")
        found[key] = value
    return found


@dataclass(frozen=True)
class ShardContent:
    """A shard without its features. ``errors`` is empty where none are kept."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    digests: np.ndarray
    checksums: np.ndarray
    errors: np.ndarray | None
    notes: dict[str, Any]
    places: dict[str, Any]  # attributes of the features: prefix and grid


def shard_content(file: h5py.File, name: Path) -> ShardContent:
    """Of a file that `check_inside` let pass. Raises CacheError, KeyError where something is not there."""
    features = file["features"]
    if not isinstance(features, h5py.Dataset) or str(features.dtype) not in ("float16", "float32"):
        raise CacheError(f"{name} holds no features of float16 or float32.")
    digests, checksums = _read(file, "digests", DIGEST), _read(file, "checksums", "u8")
    errors = _read(file, "errors", "f4") if "errors" in file else None
    lengths = {len(column) for column in (features, digests, checksums, errors) if column is not None}
    flat = all(column.ndim == 1 for column in (digests, checksums, errors) if column is not None)
    if features.ndim < 2 or len(lengths) != 1 or not flat:
        raise CacheError(f"{name}: its columns do not agree with each other.")
    if _NOT_HEX.search(digests.tobytes()):
        raise CacheError(f"{name}: its digests are not 32 hexadecimal digits.")
    return ShardContent(
        features.shape, str(features.dtype), features.id.get_offset() or 0, digests, checksums, errors,
        attributes_of(file, name), attributes_of(features, name),
    )  # fmt: skip


def _read(file: h5py.Group, key: str, dtype: Any) -> np.ndarray:
    column = file[key]
    if not isinstance(column, h5py.Dataset) or column.dtype != np.dtype(dtype):
        raise CacheError(f"{key} has the type {getattr(column, 'dtype', 'of a group')}; expected {np.dtype(dtype)}.")
    values: np.ndarray = column[...]
    return values


@dataclass(frozen=True)
class OutputInfo:
    """Of one output of a view: shape of a row, storage dtype, and of token outputs which rows are what."""

    shape: tuple[int, ...]
    dtype: str
    prefix: tuple[str, ...] | None
    grid: tuple[int, int] | None


@dataclass
class StoredOutput:
    """One output of a view: what it is, where its rows lie, what their bytes hash to."""

    info: OutputInfo
    index: np.ndarray  # [N,2] int64 (file, row)
    checksums: np.ndarray  # [N] uint64, xxh3_64 of the row's bytes
    errors: np.ndarray | None  # [N] float32: relative error of the row's rounding, NaN not measured; None: none rounded

    def first(self, rows: int) -> StoredOutput:
        errors = None if self.errors is None else self.errors[:rows]
        return StoredOutput(self.info, self.index[:rows], self.checksums[:rows], errors)


@dataclass
class ViewContent:
    """All of a view: what `View` shows, and its index."""

    attributes: dict[str, Any]
    fingerprint: str
    classes: list[str]
    task: str
    source: dict[str, Any]
    failed: list[dict[str, str]]
    ids: list[str]
    labels: np.ndarray
    splits: list[str]
    groups: list[str] | None
    digests: np.ndarray
    versions: np.ndarray | None
    meta: dict[str, np.ndarray]
    files: np.ndarray
    stored: dict[str, StoredOutput]
    augmented: AugmentedCopies | None  # how the rows whose version is not 0 were made

    @property
    def plain_rows(self) -> int:
        """The first so many rows are plain images, the others augmented copies of them."""
        return len(self.ids) if self.versions is None else int((self.versions == 0).sum())

    def plain(self) -> ViewContent:
        """The same with the columns of plain rows only; ``stored`` keeps all."""
        n = self.plain_rows
        if n == len(self.ids):
            return self
        cut = {name: getattr(self, name)[:n] for name in ("ids", "labels", "splits", "digests", "versions")}
        groups = None if self.groups is None else self.groups[:n]
        return dataclasses.replace(self, **cut, groups=groups, meta={key: c[:n] for key, c in self.meta.items()})


def view_content(file: h5py.File, name: Path, data: bytes) -> ViewContent:
    """Of a file that `check_inside` let pass; ``data`` are its bytes. Raises CacheError."""
    try:
        content = _view_content(file, name, memoryview(data))
    except CacheError:
        raise
    except (KeyError, ValueError, TypeError, OSError, AttributeError, OverflowError, RuntimeError) as error:
        raise CacheError(f"{name} is not a view as featurecache writes them: {error}.") from error
    _check_columns(content, name)
    _check_references(file, content, name)
    return content


def _view_content(file: h5py.File, name: Path, data: memoryview) -> ViewContent:
    attributes = attributes_of(file, name)
    version = attributes["format_version"]
    if version != FORMAT:
        raise CacheError(f"{name} has format {version}; this featurecache reads {FORMAT}.")
    failed = _attribute(attributes, "failed", name)
    if not all(isinstance(pair, list) and len(pair) == 2 and _all_text(pair) for pair in failed):
        raise CacheError(f"{name}: its list of failed images is not one of ids and reasons.")
    index, sums = file["index"], file["checksums"]
    lost = {key: _read(file["errors"], key, "f4") for key in file["errors"]} if "errors" in file else {}
    return ViewContent(
        attributes=attributes,
        fingerprint=str(attributes["fingerprint"]),
        classes=_attribute(attributes, "classes", name),
        task=str(attributes["task"]),
        source=_attribute(attributes, "source", name, dict),
        failed=[{"id": name, "reason": reason} for name, reason in failed],
        ids=_text(file["ids"], name, data),
        labels=_numbers(file["labels"], name),
        splits=_text(file["splits"], name, data),
        groups=_text(file["groups"], name, data) if "groups" in file else None,
        digests=_read(file, "digests", DIGEST),
        versions=_read(file, "versions", "i4") if "versions" in file else None,
        meta={key: _column(column, name, data) for key, column in file["meta"].items()},
        files=_read(index, "files", FILES),
        stored={
            key: _stored(index[key], _read(sums, key, "u8"), lost.get(key), name) for key in index if key != "files"
        },
        augmented=AugmentedCopies.from_dict(_attribute(attributes, "augmentation", name, dict))
        if "augmentation" in attributes
        else None,
    )


def _attribute(attributes: dict[str, Any], key: str, name: Path, kind: type = list) -> Any:
    value = parse(attributes[key], f"{name}: {key}")
    if not isinstance(value, kind):
        raise CacheError(f"{name}: {key} is {type(value).__name__}, not {kind.__name__}.")
    return value


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _text(column: Any, name: Path, data: memoryview) -> list[str]:
    """Text of variable length. In the file an element is (length uint32, address, number): many may name the same
    gigabyte, so the lengths are added up first."""
    if not isinstance(column, h5py.Dataset) or column.ndim != 1 or not h5py.check_string_dtype(column.dtype):
        raise CacheError(f"{name}: {getattr(column, 'name', '')!a} is no column of text.")
    if not len(column):
        return []
    start = column.id.get_offset()
    loose = column.id.get_type().is_variable_str()
    places = np.frombuffer(data, "<u4, <u8, <u4", len(column) if loose else 0, start)
    if int(places["f0"].sum(dtype=np.uint64)) > len(data):
        raise UnsafeFile(f"{name}: {column.name!a} declares more text than the file has bytes.")
    texts: list[str] = column.asstr()[...].tolist()
    return texts


def _column(column: Any, name: Path, data: memoryview) -> np.ndarray:
    if isinstance(column, h5py.Dataset) and column.dtype.kind in "biuf" and column.ndim == 1:
        return _numbers(column, name)
    return np.array(_text(column, name, data), object)


def _numbers(column: Any, name: Path) -> np.ndarray:
    if not isinstance(column, h5py.Dataset) or column.dtype.kind not in "biuf":
        raise CacheError(f"{name}: {getattr(column, 'name', '')!a} is no column of numbers.")
    values: np.ndarray = column[...]
    return values


def _stored(entry: Any, checksums: np.ndarray, errors: np.ndarray | None, name: Path) -> StoredOutput:
    attributes = attributes_of(entry, name)
    dtype = str(attributes["dtype"])
    if dtype not in ("float16", "float32"):
        raise CacheError(f"{name}: {entry.name!a} has the storage dtype {dtype!a}.")
    shape, (prefix, grid) = _sides(_attribute(attributes, "shape", name), name), token_layout(attributes, name)
    index = _numbers(entry, name)
    if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2:
        raise CacheError(f"{name}: {entry.name!a} is no index (file, row).")
    return StoredOutput(OutputInfo(shape, dtype, prefix, grid), index, checksums, errors)


def token_layout(attributes: dict[str, Any], name: Path) -> tuple[tuple[str, ...] | None, tuple[int, int] | None]:
    """(prefix, grid) out of the attributes of token features; (None, None) of others."""
    if "prefix" not in attributes or "grid" not in attributes:
        return None, None
    prefix, grid = _attribute(attributes, "prefix", name), _sides(_attribute(attributes, "grid", name), name)
    if len(grid) != 2 or not _all_text(prefix):
        raise CacheError(f"{name}: prefix and grid do not say which rows are what.")
    return tuple(prefix), (grid[0], grid[1])


def _sides(shape: list[Any], name: Path) -> tuple[int, ...]:
    fine = 1 <= len(shape) <= 2 and all(type(side) is int and side > 0 for side in shape)
    if not fine or math.prod(shape) > MAX_VALUES:
        raise CacheError(f"{name}: {str(shape)[:80]} is not the shape of a row.")
    return tuple(shape)


def _check_columns(view: ViewContent, name: Path) -> None:
    """Columns of one length and of the values that they may have."""
    columns: list[Any] = [view.labels, view.splits, view.digests, *view.meta.values()]
    columns += [column for column in (view.groups, view.versions) if column is not None]
    columns += [column for stored in view.stored.values() for column in (stored.index, stored.checksums)]
    columns += [stored.errors for stored in view.stored.values() if stored.errors is not None]
    if view.task not in TASKS or {len(column) for column in columns} != {len(view.ids)}:
        raise CacheError(f"{name}: its columns do not agree with each other.")
    if not _all_text(view.classes) or len(set(view.classes)) != len(view.classes):
        raise CacheError(f"{name}: its classes are not different names.")
    if not set(view.splits) <= SPLITS:
        raise CacheError(f"{name}: it has a split other than train, val and test.")
    if _NOT_HEX.search(view.digests.tobytes()) or view.digests.ndim != 1:
        raise CacheError(f"{name}: its digests are not 32 hexadecimal digits.")
    if not _labels_fit(view):
        raise CacheError(f"{name}: its labels do not fit its {len(view.classes):,} classes ({view.task}).")
    if not _copies_fit(view):
        raise CacheError(f"{name}: its augmented copies are not those of its images.")
    for output, stored in view.stored.items():
        info = stored.info
        rows = info.grid and info.prefix is not None and len(info.prefix) + info.grid[0] * info.grid[1]
        if not _OUTPUT.fullmatch(output) or (rows and info.shape[0] != rows):
            raise CacheError(f"{name}: {output[:80]!a} is not an output with the shape {list(info.shape)}.")


def _copies_fit(view: ViewContent) -> bool:
    """Plain rows first, then copies of some of them; who has such rows says how they were made."""
    if view.versions is None or view.augmented is None:
        return view.versions is None and view.augmented is None
    n = view.plain_rows
    copies = view.versions[n:]
    fine = view.versions.ndim == 1 and n > 0 and not view.versions[:n].any()
    return bool(fine and ((copies > 0) & (copies <= view.augmented.views)).all()) and set(view.ids[n:]) <= set(
        view.ids[:n]
    )


def _labels_fit(view: ViewContent) -> bool:
    labels, classes = view.labels, len(view.classes)
    if view.task == "multilabel":
        fits = labels.dtype == np.float32 and labels.ndim == 2 and labels.shape[1] == classes
        return bool(fits) and bool(((labels == 0) | (labels == 1) | np.isnan(labels)).all())
    return labels.dtype == np.int64 and labels.ndim == 1 and bool(((labels >= -1) & (labels < classes)).all())


def _check_references(file: h5py.File, view: ViewContent, name: Path) -> None:
    """The index names shards below the store; a virtual dataset, which we never follow, names no others."""
    paths = set()
    for entry in view.files["path"].tolist():
        relative = PurePosixPath(entry.decode(errors="backslashreplace"))
        plain = entry.isascii() and str(relative).isprintable()
        if not plain or relative.is_absolute() or ".." in relative.parts or len(relative.parts) != 2:
            raise UnsafeFile(f"{name} refers to {str(relative)!a}, outside its store.")
        paths.add(str(relative))
    for key, thing in _root(file):
        creation = thing.get_create_plist()
        if creation.get_layout() != h5d.VIRTUAL:
            continue
        number = range(creation.get_virtual_count())
        sources = {(creation.get_virtual_filename(i), creation.get_virtual_dsetname(i)) for i in number}
        for source, inside in sources:
            if os.path.isabs(source) or ".." in Path(source).parts:
                raise UnsafeFile(f"{name}: {key!a} refers to {source!a}, outside its store.")
            if source not in paths or inside not in ("features", "/features"):
                raise UnsafeFile(f"{name}: {key!a} refers to {inside!a} in {source!a}, which its index does not name.")


def _root(file: h5py.File) -> Iterator[tuple[str, h5d.DatasetID]]:
    for key in file.id:
        thing = h5o.open(file.id, key)
        if isinstance(thing, h5d.DatasetID):
            yield key.decode(errors="backslashreplace"), thing
