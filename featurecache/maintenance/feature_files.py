"""Feature files made elsewhere, `.npy`, `.npz`, `.h5` and `.safetensors`: their arrays, and the rows in blocks.

Nothing is unpickled, no reference inside a file is followed, and no array is read whole unless it is a column. What
could lead HDF5 out of the file, or have it load code, is refused before any data are read: soft and external links,
external storage, virtual datasets, filters that are plugins. A hostile file can still crash HDF5: import files of
people you trust. Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5z
from safetensors import SafetensorError, safe_open

from featurecache.errors import FeatureCacheError, SourceError, UnsafeFile
from featurecache.files.atomic import refuse_special
from featurecache.files.records import parse_json
from featurecache.sources.npz import read_npy_header

TokenLayout = tuple[tuple[str, ...], tuple[int, int]]  # what the first tokens are, and the grid (h, w) of the others
BLOCK = 16 << 20  # bytes in memory at a time
_COLUMN = 1 << 30  # bytes of an array that is read whole
_ATTRIBUTE = 32 << 20  # bytes of an attribute of HDF5
_OBJECTS = 65_536  # datasets of an HDF5 file
_SAFE = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
         "BOOL": "?"}  # fmt: skip
_WRONG = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a file. ``text``: its elements are words. ``read``: its rows in order, so many at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    text: bool
    read: Callable[[int], Iterator[np.ndarray]] = field(repr=False)

    @property
    def is_features(self) -> bool:
        return len(self.shape) in (2, 3) and self.dtype.kind == "f" and self.dtype.itemsize <= 8

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """All of a column. Raises SourceError where it is too large to be one."""
        if math.prod(self.shape) * self.dtype.itemsize > _COLUMN:
            raise SourceError(f"{self.name} {list(self.shape)} is too large for a column.")
        parts = list(self.read(max(1, BLOCK // max(1, self.row_bytes))))
        if not self.shape:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(self.shape, self.dtype)

    def texts(self) -> list[str]:
        """Words, or numbers as words."""
        values = self.whole()
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise SourceError(f"{self.name} has the shape {list(self.shape)}; expected one value a row.")
        return [v.decode("utf-8", "backslashreplace") if isinstance(v, bytes) else str(v) for v in values.tolist()]


@dataclass(frozen=True)
class FeatureFile:
    """The arrays of a file by name, and what it says of itself in words."""

    path: Path
    arrays: dict[str, ArrayInfo]
    attributes: dict[str, str]  # of the file
    token_layouts: dict[str, TokenLayout]  # of the arrays of which the file says it


def open_feature_file(path: Path) -> FeatureFile:
    """What is in a file; its features are not read. Raises SourceError, UnsafeFile, DamagedFile."""
    kind = path.suffix.lower()
    refuse_special(path)
    if not path.is_file():
        raise SourceError(f"there is no file {path}.")
    if kind not in FORMATS:
        raise SourceError(f"{path.name} has an ending that is not read here; it may be {', '.join(FORMATS)}.")
    with _as_source_error(f"{path} cannot be read as {kind[1:]}"):
        return FORMATS[kind](path)


@contextlib.contextmanager
def _as_source_error(what: str) -> Iterator[None]:
    """What the libraries raise of a file that is none of theirs, or damaged, as SourceError."""
    try:
        yield
    except FeatureCacheError:
        raise
    except _WRONG as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise SourceError(f"{what} ({reason}).") from error


def _pieces(values: Any, shape: tuple[int, ...], rows: int) -> Iterator[np.ndarray]:
    """``values`` [N, ...], so many rows at a time; a single value as it is."""
    if not shape:
        yield np.asarray(values[()])
    for start in range(0, shape[0] if shape else 0, rows):
        yield np.asarray(values[start : min(start + rows, shape[0])])


def _token_layouts(outputs: Any) -> dict[str, TokenLayout]:
    """(prefix, grid) of each output that says both. Raises ValueError."""
    layouts = {}
    for name, entry in outputs.items():
        prefix, grid = entry.get("prefix"), entry.get("grid")
        if prefix is None or grid is None:
            continue
        lists = isinstance(prefix, list) and isinstance(grid, list) and len(grid) == 2
        if not lists or any(type(n) is not int or n < 1 for n in grid) or any(type(w) is not str for w in prefix):
            raise ValueError("its prefix and grid do not say which tokens are what")
        layouts[name] = tuple(prefix), (grid[0], grid[1])
    return layouts


# -- numpy's format


def _open_npy(path: Path) -> FeatureFile:
    array = _npy_array(path.stem, lambda: path.open("rb"), path.stat().st_size)
    return FeatureFile(path, {path.stem: array}, {}, {})


def _open_npz(path: Path) -> FeatureFile:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                name = entry.filename.removesuffix(".npy")
                arrays[name] = _npy_array(name, partial(_member, path, entry.filename), entry.file_size)
    if "attributes" not in arrays or not arrays["attributes"].text or arrays["attributes"].shape != ():
        return FeatureFile(path, arrays, {}, {})
    record = parse_json(str(arrays.pop("attributes").whole()), str(path))  # of one of our own exports
    record = record if isinstance(record, dict) else {}
    attributes = {key: value for key, value in record.items() if isinstance(value, str)}
    outputs = parse_json(attributes["outputs"], str(path)) if "outputs" in attributes else {}
    return FeatureFile(path, arrays, attributes, _token_layouts(outputs))


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        yield member


def _npy_array(name: str, opened: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> ArrayInfo:
    """An array of numpy's format in a file of ``size`` bytes, or in a member of an archive."""
    with opened() as file:
        header = read_npy_header(file)
    shape, dtype = header.shape, header.dtype
    if dtype.hasobject:
        raise SourceError(
            f"{name} holds Python objects, which only pickle reads, and that can run code: save it as plain numbers "
            "(np.stack(rows).astype(np.float32)) or words (np.array(words, str))."
        )
    if header.offset + header.size != size:
        raise ValueError(f"{name} declares {header.size:,} bytes and has {size - header.offset:,}")
    by_columns = header.by_columns and len(shape) > 1  # read as a whole, for a row lies everywhere

    def read(rows: int) -> Iterator[np.ndarray]:
        if by_columns and header.size > _COLUMN:
            raise SourceError(f"{name} is stored by columns (Fortran order): save it with np.ascontiguousarray.")
        step = max(1, shape[0]) if by_columns else rows
        with opened() as file:
            file.seek(header.offset)
            for start in range(0, shape[0] if shape else 1, step):
                part = (min(step, shape[0] - start), *shape[1:]) if shape else ()
                data = file.read(math.prod(part) * dtype.itemsize)
                if len(data) != math.prod(part) * dtype.itemsize:
                    raise SourceError(f"{name} ends too early.")
                block = np.frombuffer(data, dtype).reshape(part, order="F" if by_columns else "C")
                yield from _pieces(block, part, rows)

    return ArrayInfo(name, shape, dtype, dtype.kind in "US", read)


# -- safetensors


def _open_safetensors(path: Path) -> FeatureFile:
    with safe_open(path, "numpy") as file:
        attributes: dict[str, str] = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        arrays = {
            name: _tensor(path, name, piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()
        }
    keys = ("outputs", "ids", "splits", "groups", "meta")  # what one of our exports keeps as JSON
    columns: dict[str, Any] = {key: parse_json(attributes[key], str(path)) for key in keys if key in attributes}
    outputs, further = columns.pop("outputs", {}), columns.pop("meta", {})
    columns |= {f"meta/{key}": values for key, values in further.items()}
    arrays |= {key: _in_memory(key, values) for key, values in columns.items() if isinstance(values, list)}
    return FeatureFile(path, arrays, attributes, _token_layouts(outputs))


def _tensor(path: Path, name: str, kind: str, shape: tuple[int, ...]) -> ArrayInfo:
    if kind not in _SAFE:
        raise SourceError(f"{name} of {path.name} is {kind}, which numpy cannot hold; save it as F16 or F32.")

    def read(rows: int) -> Iterator[np.ndarray]:
        with _as_source_error(f"{name} of {path} cannot be read"), safe_open(path, "numpy") as file:
            yield from _pieces(file.get_slice(name) if shape else file.get_tensor(name), shape, rows)

    return ArrayInfo(name, shape, np.dtype(_SAFE[kind]), False, read)


def _in_memory(name: str, values: list[Any]) -> ArrayInfo:
    words = any(isinstance(value, str) for value in values)
    array = np.array(values, object if words else None)
    if not words and array.dtype == object:  # numbers with a null among them
        array = np.array(values, np.float64)
    return ArrayInfo(name, array.shape, array.dtype, words, partial(_pieces, array, array.shape))


# -- HDF5

_FILTERS = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF)  # that come with h5py


def _open_hdf5(path: Path) -> FeatureFile:
    """What is in a file. Raises UnsafeFile."""
    with h5py.File(path, "r", locking=False) as file:
        arrays = {name: _dataset(path, name, file[name]) for name in datasets_of(file, path)}
        attributes = _words_of(file)
        words = {name: _words_of(file[name]) for name in arrays}
    parsed = {
        name: {key: parse_json(text, str(path)) for key, text in each.items() if key in ("prefix", "grid")}
        for name, each in words.items()
    }
    return FeatureFile(path, arrays, attributes, _token_layouts(parsed))


def _words_of(thing: h5py.HLObject) -> dict[str, str]:
    """Attributes that are a text; others say nothing to us."""
    words = {}
    for key in thing.attrs:
        attribute = h5py.h5a.open(thing.id, key.encode())
        if attribute.shape == () and isinstance(attribute.get_type(), h5py.h5t.TypeStringID):
            if attribute.get_storage_size() > _ATTRIBUTE:
                raise UnsafeFile(f"{thing.file.filename} has an attribute of {attribute.get_storage_size():,} bytes.")
            value = thing.attrs[key]
            words[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return words


def datasets_of(file: h5py.File, path: Path) -> list[str]:
    """Names of all datasets with their groups. Refuses what could lead HDF5 out of the file, before it is followed."""
    names, seen = [], {h5o.get_info(file.id).addr}
    pending: list[tuple[h5g.GroupID, str]] = [(file.id, "")]
    while pending:
        group, above = pending.pop()
        for key in group:
            name = above + key.decode("utf-8", "backslashreplace")
            if group.links.get_info(key).type != h5l.TYPE_HARD:
                raise UnsafeFile(f"{path}: {name!a} is a link that leads elsewhere; a plain file has none.")
            thing = h5o.open(group, key)
            address = h5o.get_info(thing).addr
            if address in seen:
                continue  # a second name for one object
            seen.add(address)
            if len(seen) > _OBJECTS:
                raise UnsafeFile(f"{path} holds more than {_OBJECTS:,} datasets.")
            if isinstance(thing, h5g.GroupID):
                pending.append((thing, f"{name}/"))
            elif isinstance(thing, h5d.DatasetID):
                _refuse_references(thing, f"{path}: {name!a}")
                names.append(name)
    return sorted(names)


def _refuse_references(dataset: h5d.DatasetID, name: str) -> None:
    creation = dataset.get_create_plist()
    if creation.get_external_count():
        raise UnsafeFile(f"{name} keeps its data in another file.")
    if creation.get_layout() == h5d.VIRTUAL:
        raise UnsafeFile(f"{name} refers to other files (a virtual dataset); featurecache export makes one plain file.")
    for number in range(creation.get_nfilters()):
        if creation.get_filter(number)[0] not in _FILTERS:
            raise UnsafeFile(
                f"{name} is packed by a filter for which HDF5 would load a plugin; save it plain, or with gzip or lzf."
            )


def _dataset(path: Path, name: str, dataset: h5py.Dataset) -> ArrayInfo:
    text, shape = h5py.check_string_dtype(dataset.dtype) is not None, dataset.shape or ()

    def read(rows: int) -> Iterator[np.ndarray]:
        with _as_source_error(f"{name} of {path} cannot be read"), h5py.File(path, "r", locking=False) as file:
            yield from _pieces(file[name].asstr() if text else file[name], shape, rows)

    return ArrayInfo(name, shape, dataset.dtype, text, read)


FORMATS = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".safetensors": _open_safetensors,
}
