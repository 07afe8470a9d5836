"""Reading the HDF5 files of a cache without HDF5: user block, checksum, directory, columns as numpy arrays.

A file begins with a line that says what its bytes hash to and where its *directory* lies: JSON with the attributes of
the file and, of every column, dtype, shape, offset and attributes (written by `featurecache.files.hdf5`; docs/format.md
has all of it). Nothing that the line or the directory says is believed: types are exact, every column lies inside the
file, at a multiple of 64 bytes, and over no other. So a file can neither lead out of itself nor have more read than it
holds, and no C library sees it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featurecache.errors import CacheError, DamagedFile, UnsafeFile
from featurecache.files.atomic import hash_from, open_regular
from featurecache.files.records import parse_json

FORMAT = 2
USER_BLOCK = 512  # bytes; the smallest HDF5 allows
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every itemsize we store
TEXTS = "index/text/"  # under it, of every column of text, `bytes` (UTF-8) and `ends` (int64)
AGAIN = "Delete it and run the extraction again: that computes what is not there."
_LARGEST = 64 << 20  # bytes of a directory
_MOST = 1 << 48  # values of a column; numpy cannot make a larger array, not even an empty one
_LINE = re.compile(rb"featurecache \d{1,9} ([0-9a-f]{32}) (\d{1,18}) (\d{1,18}) (\d{1,18}) ([0-9a-f]{16})\n")
_FORMAT = re.compile(rb"featurecache (\d{1,9}) ")
_DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|\|S[1-9]\d{0,3}")


@dataclass(frozen=True)
class Texts:
    """A column of text before a str is made of each, of which a million take longer than all else of a view."""

    text: str
    stops: np.ndarray  # int64 [N+1]: text k goes from stops[k] to stops[k+1]

    def __len__(self) -> int:
        return len(self.stops) - 1

    def array(self) -> np.ndarray:
        """object [N]"""
        return np.array([self.text[start:stop] for start, stop in pairwise(self.stops.tolist())], object)


@dataclass(frozen=True)
class UserBlock:
    """The first 512 bytes of a file: one line by which it can be checked and read."""

    digest: str  # xxh3_128 of all bytes after the block
    size: int  # bytes of the whole file
    offset: int  # of the directory, from the beginning of the file
    length: int  # of the directory
    check: str  # xxh3_64 of the directory

    def to_bytes(self) -> bytes:
        line = f"featurecache {FORMAT} {self.digest} {self.size} {self.offset} {self.length} {self.check}\n"
        return line.encode().ljust(USER_BLOCK, b"\0")


@dataclass(frozen=True)
class Column:
    """An array of the file. ``dtype`` is packed and little-endian."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    attributes: dict[str, Any]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ColumnFile:
    """A file, open for reading: what its directory says, and its columns."""

    path: Path
    block: UserBlock
    attributes: dict[str, Any]
    columns: dict[str, Column]
    descriptor: int

    def check_bytes(self) -> None:
        """Raises DamagedFile unless every byte is the one that was written."""
        if hash_from(self.descriptor, USER_BLOCK) != self.block.digest:
            raise DamagedFile(f"{self.path} is damaged: its content does not match the hash in its first line. {AGAIN}")

    def column(self, name: str) -> Column:
        try:
            return self.columns[name]
        except KeyError:
            raise CacheError(f"{self.path} has no column {name}.") from None

    def array(self, name: str, dtype: Any = None, ndim: int | None = 1) -> np.ndarray:
        """A column's values; of ``dtype`` and so many dimensions, unless None."""
        column = self.column(name)
        if dtype is not None and column.dtype != np.dtype(dtype):
            raise CacheError(f"{self.path}: {name} has the type {column.dtype}; expected {np.dtype(dtype)}.")
        if ndim not in (None, len(column.shape)):
            raise CacheError(f"{self.path}: {name} has the shape {list(column.shape)}; expected {ndim} dimensions.")
        data = _pread(self.path, self.descriptor, column.offset, column.end - column.offset)
        values = np.frombuffer(data, column.dtype).reshape(column.shape)
        if column.dtype.kind == "b" and (values.view(np.uint8) > 1).any():
            raise CacheError(f"{self.path}: {name} holds other things than true and false.")
        return values

    def text_block(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(UTF-8 uint8, stops int64 [N+1]) of a column of text: text k goes from stops[k] to stops[k+1]."""
        block, ends = self.array(f"{TEXTS}{name}/bytes", "u1"), self.array(f"{TEXTS}{name}/ends", "<i8")
        stops = np.concatenate([[0], ends])
        if stops[-1] != len(block) or (stops[1:] < stops[:-1]).any():
            raise UnsafeFile(f"{self.path}: the texts of {name} do not lie where it says.")
        return block, stops

    def texts(self, name: str) -> Texts:
        """A column of text: slices of one block of UTF-8, which are checked and not yet made."""
        block, stops = self.text_block(name)
        try:
            text = str(block.data, "utf-8")
        except UnicodeDecodeError as error:
            raise CacheError(f"{self.path}: {name} is no column of text ({error.reason}).") from error
        if len(text) != len(block):  # characters of several bytes: count where they begin
            begins = np.append((block & 0xC0) != 0x80, True)
            if not begins[stops].all():
                raise CacheError(f"{self.path}: a text of {name} ends within a character.")
            stops = (np.cumsum(begins) - 1)[stops]
        return Texts(text, stops)


def read_user_block(path: Path) -> UserBlock:
    """The line that ``path`` was written with; its actual length is checked."""
    with _reading(path) as descriptor:
        return _user_block(path, descriptor)


@contextlib.contextmanager
def open_columns(path: Path) -> Iterator[ColumnFile]:
    """A file by its directory, which has a hash of its own; `ColumnFile.check_bytes` hashes all of it."""
    with _reading(path) as descriptor:
        block = _user_block(path, descriptor)
        attributes, columns = _directory(path, block, bytes(_pread(path, descriptor, block.offset, block.length)))
        yield ColumnFile(path, block, attributes, columns, descriptor)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[int]:
    try:
        with open_regular(path) as file:
            yield file.fileno()
    except FileNotFoundError as error:
        raise DamagedFile(f"{path} is missing.") from error
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}.") from error


def _pread(path: Path, descriptor: int, offset: int, size: int) -> bytearray:
    data, done = bytearray(size), 0
    with memoryview(data) as view:
        while done < size and (count := os.preadv(descriptor, [view[done:]], offset + done)):
            done += count
    if done < size:
        raise DamagedFile(f"{path} was cut while it was read. {AGAIN}")
    return data


def _user_block(path: Path, descriptor: int) -> UserBlock:
    return user_block_of(path, os.pread(descriptor, USER_BLOCK, 0), os.fstat(descriptor).st_size)


def user_block_of(path: Path, line: bytes, size: int) -> UserBlock:
    """The block at the beginning of a file of ``size`` bytes. Raises DamagedFile."""
    match, version = _LINE.match(line), _FORMAT.match(line)
    if version is not None and int(version[1]) != FORMAT:
        raise DamagedFile(f"{path} has format {int(version[1])}; this featurecache reads format {FORMAT}.")
    if match is None:
        raise DamagedFile(f"{path} is not a file of featurecache, or its beginning is damaged. {AGAIN}")
    block = UserBlock(match[1].decode(), int(match[2]), int(match[3]), int(match[4]), match[5].decode())
    if block.size != size:
        raise DamagedFile(f"{path} has {size:,} bytes; it was written with {block.size:,}. {AGAIN}")
    inside = USER_BLOCK <= block.offset and block.offset + block.length <= size and block.length <= _LARGEST
    if line != block.to_bytes() or not inside:
        raise DamagedFile(f"{path} is damaged in its first {USER_BLOCK} bytes. {AGAIN}")
    return block


def _directory(path: Path, block: UserBlock, text: bytes) -> tuple[dict[str, Any], dict[str, Column]]:
    if xxhash.xxh3_64_hexdigest(text) != block.check:
        raise DamagedFile(f"{path} is damaged: its directory does not match the hash in its first line. {AGAIN}")
    try:
        record = parse_json(text.decode(), f"the directory of {path}")
    except UnicodeDecodeError as error:
        raise CacheError(f"the directory of {path} cannot be read: {error.reason}.") from error
    if type(record) is not dict or set(record) != {"attributes", "columns"} or type(record["columns"]) is not dict:
        raise CacheError(f"the directory of {path} does not list attributes and columns.")
    columns = {name: _column(entry, f"{path}: {name[:80]!a}") for name, entry in record["columns"].items()}
    last = USER_BLOCK
    extents = [(block.offset, block.offset + block.length), *((c.offset, c.end) for c in columns.values())]
    for start, end in sorted(extents):
        if start < last or end > block.size:
            raise UnsafeFile(f"{path} does not hold its columns one behind the other, each inside it.")
        last = end
    return _attributes(record["attributes"], str(path)), columns


def _column(entry: Any, where: str) -> Column:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "offset", "attributes"}:
        raise CacheError(f"{where} is no column: it has other fields than dtype, shape, offset and attributes.")
    shape, offset = entry["shape"], entry["offset"]
    sides = shape if type(shape) is list else []
    if not 1 <= len(sides) <= 3 or not all(type(side) is int and side >= 0 for side in sides):
        raise CacheError(f"{where} is no column: {str(shape)[:80]} is not its shape.")
    if math.prod(max(1, side) for side in sides) >= _MOST:
        raise UnsafeFile(f"{where} declares more than a file can hold.")
    if type(offset) is not int or offset % ALIGNMENT:
        raise CacheError(f"{where} is no column: it does not begin at a multiple of {ALIGNMENT} bytes.")
    return Column(_dtype(entry["dtype"], where), tuple(shape), offset, _attributes(entry["attributes"], where))


def _dtype(word: Any, where: str) -> np.dtype[Any]:
    """Of plain numbers and text of fixed length, or of a record of such: [[name, dtype], ...]."""
    if type(word) is str and _DTYPE.fullmatch(word):
        return np.dtype(word)
    fields: list[Any] = word if type(word) is list and len(word) <= 16 else []
    names = [field[0] for field in fields if type(field) is list and len(field) == 2 and type(field[0]) is str]
    if not fields or len(set(names)) != len(fields) or not all(name.isidentifier() for name in names):
        raise CacheError(f"{where} is no column: it holds other things than numbers and text ({str(word)[:80]!a}).")
    if not all(type(kind) is str for _, kind in fields):
        raise CacheError(f"{where} is no column: {str(word)[:80]!a} is no type of a field.")
    return np.dtype([(name, _dtype(kind, where)) for name, kind in fields])


def _attributes(record: Any, where: str) -> dict[str, Any]:
    if type(record) is not dict or not all(type(value) in (str, int, float, bool) for value in record.values()):
        raise CacheError(f"{where} has attributes other than text and numbers.")
    return record
