"""Such files: NPZ, HDF5, Parquet, safetensors, arrays by name.

Files of features that somebody else made: what arrays there are, and their rows in blocks.

`.npy`, `.npz`, `.h5` and `.safetensors`. Nothing is unpickled, no reference inside a file is followed, and no array is
read whole unless it is a column. Imports no torch (see `featurecache.foreign_hdf5`).

Somebody's HDF5 file of features: what datasets there are, and their rows in blocks.

HDF5 can crash or hang on a hostile file, so another process looks at it first (`featurecache.guard`) and does with it
what `open_hdf5` and `Array.blocks` do here. Imports no torch.
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
from h5py import h5d, h5g, h5l, h5o

from featurecache.errors import FeatureCacheError, SourceError, UnsafeFile, first_line
from featurecache.files import guard
from featurecache.files.records import parse
from featurecache.store.schema import token_layout

ENDINGS = (".npy", ".npz", ".h5", ".hdf5", ".safetensors")
BLOCK = 16 << 20  # bytes in memory at a time
_COLUMN = 1 << 30  # bytes of an array that is read whole
_HEADER = 100_000_000  # bytes of a safetensors header
_SAFE = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
         "BOOL": "?"}  # fmt: skip


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a file. ``text``: its elements are words."""

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

    def blocks(self) -> Iterator[np.ndarray]:
        """Its rows in order, some at a time."""
        return self.read(max(1, BLOCK // max(1, self.row_bytes)))

    def whole(self) -> np.ndarray:
        """All of a column. Raises SourceError where it is too large to be one."""
        if math.prod(self.shape) * self.dtype.itemsize > _COLUMN:
            raise SourceError(f"{self.name} {list(self.shape)} is too large for a column.")
        parts = list(self.blocks())
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
    places: dict[str, dict[str, Any]]  # prefix and grid of token arrays, where the file says them


_WRONG = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def open_foreign(path: Path) -> FeatureFile:
    """What is in a file; its features are not read. Raises SourceError, UnsafeFile."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise SourceError(f"there is no file {path}.")
    if kind not in ENDINGS:
        raise SourceError(f"{path.name} has an ending that is not read here; it may be {', '.join(ENDINGS)}.")
    try:
        if kind == ".npy":
            return FeatureFile(
                path, {path.stem: _npy_array(path.stem, lambda: open(path, "rb"), path.stat().st_size)}, {}, {}
            )
        if kind == ".npz":
            return _open_npz(path)
        if kind == ".safetensors":
            return _open_safetensors(path)
        return open_hdf5(path)
    except FeatureCacheError:
        raise
    except _WRONG as error:
        raise SourceError(f"{path} cannot be read as {kind[1:]} ({first_line(error)}).") from error


def _npy_array(name: str, opened: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> ArrayInfo:
    """An array of numpy's format in a file of ``size`` bytes, or in a member of an archive."""
    with opened() as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name} has version {version[0]}.{version[1]} of the format")
        shape, by_columns, dtype = readers[version](file)
        begin = file.tell()
    if dtype.hasobject:
        raise SourceError(
            f"{name} holds Python objects, which only pickle reads, and that can run code: save it as plain numbers "
            "(np.stack(rows).astype(np.float32)) or words (np.array(words, str))."
        )
    if begin + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} declares {math.prod(shape) * dtype.itemsize:,} bytes and has {size - begin:,}")

    def read(rows: int) -> Iterator[np.ndarray]:
        with opened() as file:
            file.seek(begin)
            if by_columns and len(shape) > 1:
                whole = _by_columns(name, file, shape, dtype)
                yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
                return
            for start in range(0, shape[0] if shape else 1, rows):
                part = (min(rows, shape[0] - start), *shape[1:]) if shape else ()
                yield np.frombuffer(_exactly(file, math.prod(part) * dtype.itemsize, name), dtype).reshape(part)

    return ArrayInfo(name, shape, dtype, dtype.kind in "US", read)


def _by_columns(name: str, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if size > _COLUMN:
        raise SourceError(f"{name} is stored by columns (Fortran order): save it with np.ascontiguousarray.")
    return np.frombuffer(_exactly(file, size, name), dtype).reshape(shape, order="F")


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise SourceError(f"{name} ends too early.")
    return data


def _open_npz(path: Path) -> FeatureFile:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                name = entry.filename.removesuffix(".npy")
                arrays[name] = _npy_array(name, partial(_member, path, entry.filename), entry.file_size)
    attributes: dict[str, str] = {}
    places: dict[str, dict[str, Any]] = {}
    if "attributes" in arrays and arrays["attributes"].text and arrays["attributes"].shape == ():
        attributes, places = _said(str(arrays.pop("attributes").whole()), path)
    return FeatureFile(path, arrays, attributes, places)


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        yield member


def _said(text: str, path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """(attributes, places) out of the JSON of one of our own exports."""
    record = parse(text, str(path))
    if not isinstance(record, dict):
        return {}, {}
    outputs = parse(record["outputs"], str(path)) if isinstance(record.get("outputs"), str) else {}
    words = {key: value for key, value in record.items() if isinstance(value, str)}
    return words, {name: _place(entry) for name, entry in outputs.items()}


def _place(entry: dict[str, Any]) -> dict[str, Any]:
    """prefix and grid of one output; both, or neither. Raises ValueError."""
    prefix, grid = entry["prefix"], entry["grid"]
    if prefix is None or grid is None:
        return {"prefix": None, "grid": None}
    sides = [side for side in grid if type(side) is int and side > 0]
    if len(grid) != 2 or len(sides) != 2 or not all(isinstance(word, str) for word in prefix):
        raise ValueError("its prefix and grid do not say which tokens are what")
    return {"prefix": tuple(prefix), "grid": (grid[0], grid[1])}


def _open_safetensors(path: Path) -> FeatureFile:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(_exactly(file, 8, path.name), "little")
        if length > min(_HEADER, size - 8):
            raise ValueError("its header does not fit into it")
        header = parse(_exactly(file, length, path.name).decode(), str(path))
    metadata = header.pop("__metadata__", {})
    arrays = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    attributes = {key: value for key, value in metadata.items() if isinstance(value, str)}
    places = _said(f'{{"outputs": {_quoted(attributes["outputs"])}}}', path)[1] if "outputs" in attributes else {}
    return FeatureFile(path, {**arrays, **_listed(attributes, path)}, attributes, places)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)


def _tensor(path: Path, name: str, entry: dict[str, Any], first: int, size: int) -> ArrayInfo:
    if entry["dtype"] not in _SAFE:
        raise SourceError(f"{name} of {path.name} is {entry['dtype']}, which numpy cannot hold; save it as F16 or F32.")
    dtype, shape = np.dtype(_SAFE[entry["dtype"]]), tuple(int(side) for side in entry["shape"])
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if (
        min(shape, default=1) < 0
        or not 0 <= start <= stop <= size - first
        or stop - start != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name} does not lie inside the file")

    def read(rows: int) -> Iterator[np.ndarray]:
        with open(path, "rb") as file:
            file.seek(first + start)
            for row in range(0, shape[0], rows):
                part = (min(rows, shape[0] - row), *shape[1:])
                yield np.frombuffer(_exactly(file, math.prod(part) * dtype.itemsize, name), dtype).reshape(part)

    return ArrayInfo(name, shape, dtype, False, read)


def _listed(metadata: dict[str, str], path: Path) -> dict[str, ArrayInfo]:
    """Columns that one of our exports keeps as JSON lists."""
    found: dict[str, Any] = {
        key: parse(metadata[key], str(path)) for key in ("ids", "splits", "groups") if key in metadata
    }
    further = parse(metadata["meta"], str(path)) if "meta" in metadata else {}
    found |= {f"meta/{key}": values for key, values in further.items()}
    return {key: _in_memory(key, values) for key, values in found.items() if isinstance(values, list)}


def _in_memory(name: str, values: list[Any]) -> ArrayInfo:
    words = any(isinstance(value, str) for value in values)
    array = np.array(values, object if words else None)
    if not words and array.dtype == object:  # numbers with a null among them
        array = np.array([math.nan if value is None else value for value in values], np.float64)
    return ArrayInfo(
        name, array.shape, array.dtype, words,
        lambda rows: (array[start : start + rows] for start in range(0, len(array), rows)),
    )  # fmt: skip


FOREIGN = "file of features"  # what `guard` calls them
_ATTRIBUTE = 32 << 20  # bytes of an attribute
_OBJECTS = 65_536  # datasets of a file


def open_hdf5(path: Path) -> FeatureFile:
    """What is in a file that was looked at. Raises UnsafeFile, DamagedFile."""
    guard.checked([path], FOREIGN)
    return _look(path)


def _look(path: Path) -> FeatureFile:
    with h5py.File(path, "r", locking=False) as file:
        arrays = {name: _dataset(path, name, file[name]) for name in datasets_of(file, path)}
        attributes = _words_of(file)
        about = {name: _words_of(file[name]) for name in arrays}
    places = {
        name: dict(zip(("prefix", "grid"), token_layout(words, path), strict=True)) for name, words in about.items()
    }
    return FeatureFile(path, arrays, attributes, places)


def _words_of(thing: h5py.HLObject) -> dict[str, str]:
    """Attributes that are a text; others say nothing to us."""
    found = {}
    for key in thing.attrs:
        attribute = h5py.h5a.open(thing.id, key.encode())
        if attribute.shape == () and isinstance(attribute.get_type(), h5py.h5t.TypeStringID):
            if attribute.get_storage_size() > _ATTRIBUTE:
                raise UnsafeFile(f"{thing.file.filename} has an attribute of {attribute.get_storage_size():,} bytes.")
            value = thing.attrs[key]
            found[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return found


def datasets_of(file: h5py.File, path: Path) -> list[str]:
    """Names of all datasets with their groups. Refuses what could lead HDF5 out of the file, before it is followed."""
    found, seen = [], {h5o.get_info(file.id).addr}
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
                found.append(name)
    return sorted(found)


def _refuse_references(dataset: h5d.DatasetID, name: str) -> None:
    creation = dataset.get_create_plist()
    if creation.get_external_count():
        raise UnsafeFile(f"{name} keeps its data in another file.")
    if creation.get_layout() == h5d.VIRTUAL:
        raise UnsafeFile(f"{name} refers to other files (a virtual dataset); featurecache export makes one plain file.")


def _dataset(path: Path, name: str, dataset: h5py.Dataset) -> ArrayInfo:
    text, sides = h5py.check_string_dtype(dataset.dtype) is not None, dataset.shape or ()

    def read(rows: int) -> Iterator[np.ndarray]:
        try:
            with h5py.File(path, "r", locking=False) as file:
                found = file[name].asstr() if text else file[name]
                if not sides:
                    yield np.asarray(found[()])
                for start in range(0, sides[0] if sides else 0, rows):
                    yield np.asarray(found[start : start + rows])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise SourceError(f"{name} of {path} cannot be read ({first_line(error)}).") from error

    return ArrayInfo(name, sides, dataset.dtype, text, read)


def read_all(path: Path) -> None:
    """Read a strange HDF5 file from its beginning to its end, as an import does."""
    for array in _look(path).arrays.values():
        if array.text or array.dtype.kind in "biuf":
            for _ in array.blocks():
                pass
