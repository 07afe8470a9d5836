"""Writing HDF5 files: in memory, with a directory for readers without HDF5, a user block and a checksum.

HDF5 never writes to a disk here: after a full disk it fails only at close and can take the interpreter down, while a
failed ``os.pwrite`` is an ordinary error. h5py builds a file in a `WriteTrace`, without the regions that it never
touches (features of gigabytes); `seal` writes it around what already lies in an `AtomicFile`. `Sink` is for exports,
which HDF5 and zipfile write piece by piece.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from featurecache.errors import CannotWrite
from featurecache.files.atomic import AtomicFile, hash_from
from featurecache.files.directory import ALIGNMENT, TEXTS, USER_BLOCK, UserBlock
from featurecache.files.records import canonical_json

if TYPE_CHECKING:  # it is loaded by whoever writes
    import h5py

DIRECTORY = "directory"  # the dataset


class WriteTrace(io.RawIOBase):
    """What h5py writes of a file and where, in memory: a file object for its ``fileobj`` driver."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, bytes]] = []  # (offset, bytes) as written; later ones lie over earlier ones
        self._position = 0
        self.size = 0
        self.directory = b""
        self.directory_offset = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence] + offset
        return self._position

    def write(self, data: Any) -> int:
        self.extents.append((self._position, bytes(data)))
        return self._advance(len(data))

    def readinto(self, buffer: Any) -> int:
        """HDF5 reads back the heaps of texts and the chunk index."""
        with memoryview(buffer) as view:
            begin, end = self._position, max(self._position, min(self._position + len(view), self.size))
            data = self._base(end - begin)
            for offset, piece in self.extents:
                start, stop = max(offset, begin), min(offset + len(piece), end)
                if start < stop:
                    data[start - begin : stop - begin] = piece[start - offset : stop - offset]
            view[: end - begin] = data
        self._position = end
        return end - begin

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def _advance(self, count: int) -> int:
        self._position += count
        self.size = max(self.size, self._position)
        return count

    def _base(self, count: int) -> bytearray:
        """What the extents lie over, from the position on."""
        return bytearray(count)


class Sink(WriteTrace):
    """A file object that writes through an `AtomicFile`, for writers that must not meet a failed write.

    libhdf5 can take the interpreter down when a write fails at close, and zipfile complains again for every member.
    So a failed write is remembered and looks like a good one; from then on everything is kept in memory (little: the
    writers call `check` after each block, which raises CannotWrite).
    """

    def __init__(self, file: AtomicFile) -> None:
        super().__init__()
        self._file = file
        self._error: CannotWrite | None = None

    def writable(self) -> bool:
        return True

    readable = seekable = writable

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.write(self._position, view)
            except CannotWrite as error:
                self._error = error
        if self._error is not None:  # the disk did not take it
            return super().write(view)
        return self._advance(len(view))

    def _base(self, count: int) -> bytearray:
        return bytearray(self._file.read(self._position, count).ljust(count, b"\0"))

    def check(self) -> None:
        """Raises CannotWrite when a write failed."""
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def new_hdf5(trace: WriteTrace) -> Iterator[h5py.File]:
    """A file to be filled in memory, in a format that every HDF5 since 1.10 reads; at the end it gets its directory."""
    import h5py

    with h5py.File(
        trace, "w", libver=("v110", "v110"), userblock_size=USER_BLOCK,
        alignment_threshold=1, alignment_interval=ALIGNMENT,
    ) as file:  # fmt: skip
        yield file
        trace.directory = canonical_json({"attributes": _attributes(file), "columns": _columns(file)}).encode()
        dataset = file.create_dataset(DIRECTORY, data=np.frombuffer(trace.directory, np.uint8))
        trace.directory_offset = dataset.id.get_offset()


def _columns(file: h5py.File) -> dict[str, dict[str, Any]]:
    """Where each dataset lies that is stored in one piece; not virtual ones, and not texts of variable length."""
    import h5py

    file.flush()  # before, some have no place
    columns: dict[str, dict[str, Any]] = {}

    def add(name: str, thing: h5py.HLObject) -> None:
        if isinstance(thing, h5py.Dataset) and not thing.is_virtual and thing.dtype.kind != "O":
            kind = thing.dtype
            columns[name] = {
                "dtype": [[field, kind[field].str] for field in kind.names] if kind.names else kind.str,
                "shape": list(thing.shape),
                "offset": thing.id.get_offset() if thing.size else USER_BLOCK,
                "attributes": _attributes(thing),
            }

    file.visititems(add)
    return columns


def _attributes(thing: h5py.HLObject) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in thing.attrs.items()}


def write_texts(file: h5py.File, name: str, values: Iterable[str]) -> None:
    """A column of text for readers without HDF5, whose own texts of variable length lie in heaps."""
    texts = [value.encode() for value in values]
    file[f"{TEXTS}{name}/bytes"] = np.frombuffer(b"".join(texts), np.uint8)
    file[f"{TEXTS}{name}/ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)


def create_unwritten(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """A dataset whose place is known before there is a value, and where HDF5 never writes."""
    import h5py

    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape, dtype, dcpl=creation)


def seal(file: AtomicFile, trace: WriteTrace) -> None:
    """Lay what HDF5 wrote around what is in ``file``, and write the line by which all of it can be checked."""
    for offset, data in trace.extents:
        file.write(offset, data)
    file.truncate(trace.size)
    check = xxhash.xxh3_64_hexdigest(trace.directory)
    digest = hash_from(file.fileno(), USER_BLOCK)
    file.write(0, UserBlock(digest, trace.size, trace.directory_offset, len(trace.directory), check).to_bytes())
