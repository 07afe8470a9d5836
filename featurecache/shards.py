"""Shards: one output for a run of images, in one HDF5 file. The unit of work, commit, retry and verification.

    <store>/<output>/<name>.h5     features [n, ...] storage dtype, contiguous, starting at a multiple of 64 bytes
                                   digests [n] 32 hex; checksums [n] uint64, xxh3_64 of each row's bytes

The name is the hash of the digests: whoever computes a shard again gets the same name, and the first to commit it
wins. Rows are found by digest, never by position.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import xxhash

from featurecache.errors import CacheError, DamagedFile
from featurecache.files import AGAIN, Draft, Frame, check_inside, new_hdf5, read_user_block, refuse_links

DIGEST = np.dtype("S32")
TORCH_DTYPE = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """What every shard of one output has in common."""

    output: str
    row_shape: tuple[int, ...]
    dtype: str
    prefix: tuple[str, ...] | None = None  # of token outputs: what the first rows are
    grid: tuple[int, int] | None = None  # of token outputs: the patch grid (h, w)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    def attributes(self) -> dict[str, str]:
        if self.prefix is None or self.grid is None:
            return {}
        return {"prefix": json.dumps(list(self.prefix)), "grid": json.dumps(list(self.grid))}


def shard_name(digests: np.ndarray) -> str:
    """32 hex of the digests [n] in the order of the rows."""
    return hashlib.blake2b(np.ascontiguousarray(digests, DIGEST).tobytes(), digest_size=16).hexdigest()


class ShardWriter:
    """Collects the rows of one shard in a draft on the disk and commits it.

    ``rows`` is how many at most; images that fail are left out, and the frame is then made for the rows there are.
    """

    def __init__(self, folder: Path, planned: np.ndarray, layout: Layout, notes: dict[str, str]) -> None:
        self._layout, self._notes = layout, notes
        self._folder = folder / layout.output
        self._digests: list[bytes] = []
        self._checksums: list[int] = []
        self._offset = _frame(layout, planned, np.zeros(len(planned), "u8"), notes)[1]
        self._draft = Draft(self._folder / f"{shard_name(planned)}.h5")

    def append(self, digests: list[bytes], rows: np.ndarray) -> None:
        """rows [k, ...] of the layout's shape and dtype, with the digests of their images."""
        assert rows.shape == (len(digests), *self._layout.row_shape) and rows.dtype == self._layout.dtype
        rows = np.ascontiguousarray(rows)
        self._draft.write(self._offset + len(self._digests) * self._layout.row_bytes, rows.data)
        self._digests += digests
        self._checksums += [xxhash.xxh3_64_intdigest(row.data) for row in rows]

    def commit(self) -> Path | None:
        """The shard's path; None when no row came."""
        digests = np.array(self._digests, DIGEST)
        if not len(digests):
            self._draft.discard()
            return None
        frame, offset = _frame(self._layout, digests, np.array(self._checksums, "u8"), self._notes)
        path = self._folder / f"{shard_name(digests)}.h5"
        if offset != self._offset:  # fewer rows than planned: a smaller frame, so the rows move
            with Draft(path) as draft:
                _copy(self._draft, self._offset, draft, offset, len(digests) * self._layout.row_bytes)
                draft.commit(frame)
        else:
            self._draft.path = path
            self._draft.commit(frame)
        self._draft.discard()
        return path

    def discard(self) -> None:
        """Give up what is not committed, and the memory it took."""
        self._draft.discard()
        self._digests, self._checksums = [], []


def _copy(source: Draft, start: int, target: Draft, offset: int, size: int, step: int = 1 << 24) -> None:
    for done in range(0, size, step):
        target.write(offset + done, source.read(start + done, min(step, size - done)))


def _frame(layout: Layout, digests: np.ndarray, checksums: np.ndarray, notes: dict[str, str]) -> tuple[Frame, int]:
    """The file without its features, and where they go (bytes from the start). The same input gives the same bytes."""
    frame = Frame()
    with new_hdf5(frame) as file:
        for key, value in sorted(notes.items()):
            file.attrs[key] = value
        file.create_dataset("digests", data=digests, dtype=DIGEST)
        file.create_dataset("checksums", data=checksums, dtype="u8")
        features = _features(file, (len(digests), *layout.row_shape), layout.dtype)
        for key, value in layout.attributes().items():
            features.attrs[key] = value
        return frame, features.id.get_offset()


def _features(file: h5py.File, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # its place is known before a row is
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # and HDF5 never writes there
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, b"features", kind, space, creation))


@dataclass(frozen=True)
class Shard:
    """A committed shard as the views' index knows it, with its digests."""

    path: Path
    size: int  # bytes
    offset: int  # of the features, bytes from the start of the file
    hash: str  # xxh3_128 of all after the user block
    digests: np.ndarray = field(repr=False)  # [n] S32


def read_shard(path: Path, layout: Layout) -> Shard:
    """Digests and place of the features. Refuses another size, shape or dtype, and references to elsewhere."""
    refuse_links(path.parent)
    digest, size = read_user_block(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            check_inside(file, path, virtual=False)
            features, digests = file["features"], file["digests"][...]
            found, offset = (features.shape, str(features.dtype)), features.id.get_offset()
    except (OSError, KeyError, RuntimeError) as error:
        raise DamagedFile(f"{path} cannot be read as a shard ({error}). {AGAIN}") from error
    expected = (len(digests), *layout.row_shape), layout.dtype
    if found != expected or digests.dtype != DIGEST:
        raise CacheError(f"{path} holds {found[1]} {found[0]}; expected {expected[1]} {expected[0]}.")
    if offset is None or offset % 64 or offset + len(digests) * layout.row_bytes > size:
        raise DamagedFile(f"{path} does not hold its {len(digests):,} rows in one piece. {AGAIN}")
    return Shard(path, size, offset, digest, digests)


def map_rows(path: Path, size: int, offset: int, rows: int, row_shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The rows of a shard [rows, ...] as a tensor over the mapped file; no file stays open.

    Private mapping: writing to the tensor does not reach the file. Raises DamagedFile when it is gone or cut.
    """
    refuse_links(path.parent, path)
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise DamagedFile(
            f"{path} is missing. Run the extraction again."
            if found is None
            else f"{path} has {found:,} bytes, not {size:,}. {AGAIN}"
        )
    itemsize = np.dtype(dtype).itemsize
    whole = torch.from_file(str(path), shared=False, size=size // itemsize, dtype=TORCH_DTYPE[dtype])
    count = rows * int(np.prod(row_shape))
    return whole[offset // itemsize : offset // itemsize + count].view(rows, *row_shape)


@dataclass(frozen=True)
class Located:
    """Where rows of one output lie: ``file`` [N] index into ``shards`` (-1 = nowhere) and ``row`` [N] in it."""

    shards: tuple[Shard, ...]
    file: np.ndarray
    row: np.ndarray

    @property
    def found(self) -> np.ndarray:
        return self.file >= 0


def locate(shards: list[Shard], digests: np.ndarray) -> Located:
    """Find ``digests`` [N] in shards; of several copies of a row the shard that comes first is taken."""
    missing = np.full(len(digests), -1, np.int64)
    if not shards or not len(digests):
        return Located(tuple(shards), missing, missing.copy())
    stored = np.concatenate([shard.digests for shard in shards])
    lengths = [len(shard.digests) for shard in shards]
    file = np.repeat(np.arange(len(shards)), lengths)
    row = np.concatenate([np.arange(n) for n in lengths])
    order = np.argsort(stored, kind="stable")
    position = np.minimum(np.searchsorted(stored[order], digests), len(stored) - 1)
    pick = order[position]
    hit = stored[pick] == digests
    return Located(tuple(shards), np.where(hit, file[pick], -1), np.where(hit, row[pick], -1))


def notes_for(fingerprint: str, plan: dict[str, Any]) -> dict[str, str]:
    """Attributes of every shard: its store and how it was computed. No dates, no speeds: same rows, same file."""
    how = {key: value for key, value in plan.items() if key != "images_per_s"}
    return {"fingerprint": fingerprint, "plan": json.dumps(how, sort_keys=True)}
