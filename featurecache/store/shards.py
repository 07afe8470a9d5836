"""Shards: one output for a run of images, in one HDF5 file. The unit of work, commit, retry and verification.

    <store>/<output>/<name>.h5     features [n, ...] storage dtype, contiguous, starting at a multiple of 64 bytes
                                   digests [n] 32 hex; checksums [n] uint64, xxh3_64 of each row's bytes
                                   errors [n] float32, only where float16 is stored: what rounding did to each row,
                                   |stored − computed|₂ / |computed|₂; NaN where it was not measured

The name is the hash of the digests: whoever computes a shard again gets the same name, and the first to commit it
wins. Rows are found by digest, never by position.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from featurecache.errors import CacheError, DamagedFile
from featurecache.files.atomic import AtomicFile, file_stamp, refuse_links
from featurecache.files.directory import AGAIN, open_columns
from featurecache.files.hdf5 import WriteTrace, create_unwritten, new_hdf5, seal
from featurecache.store.schema import DIGEST, Layout, check_digests, token_layout

if TYPE_CHECKING:
    import torch

_STEP = 1 << 24  # bytes copied at a time
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def torch_dtype(name: str) -> torch.dtype:
    """Of stored rows, float16 or float32, as torch has it."""
    import torch

    return {"float16": torch.float16, "float32": torch.float32}[name]


def shard_name(digests: np.ndarray) -> str:
    """32 hex of the digests [n] in the order of the rows."""
    return hashlib.blake2b(np.ascontiguousarray(digests, DIGEST).tobytes(), digest_size=16).hexdigest()


class ShardWriter:
    """Collects the rows of one shard, at most those of ``planned``, in a temporary file on the disk and commits it.

    Images that fail are left out, and the rest of the file is made for the rows there are.
    """

    def __init__(self, folder: Path, planned: np.ndarray, layout: Layout, notes: dict[str, str]) -> None:
        self._layout, self._notes = layout, notes
        self._folder = folder / layout.output
        self._digests: list[bytes] = []
        self._checksums: list[int] = []
        self._errors: list[np.ndarray] = []
        self._offset = _trace(layout, planned, np.zeros(len(planned), "u8"), unmeasured(len(planned)), notes)[1]
        self._file = AtomicFile(self._folder / f"{shard_name(planned)}.h5", inside=folder)

    def append(self, digests: list[bytes], rows: np.ndarray, errors: np.ndarray | None = None) -> None:
        """rows [k, ...] of the layout's shape and dtype, with the digests of their images and, where they were
        measured, the relative errors of their rounding, float32 [k]."""
        assert rows.shape == (len(digests), *self._layout.shape) and rows.dtype == self._layout.dtype
        rows = np.ascontiguousarray(rows)
        self._file.write(self._offset + len(self._digests) * self._layout.row_bytes, rows.data)
        self._digests += digests
        self._checksums += [_checksum(row) for row in rows]
        self._errors.append(unmeasured(len(digests)) if errors is None else errors)

    def commit(self, *, replace: bool = False) -> Path | None:
        """The shard's path; None when no row came. ``replace``: over a file of that name, which is damaged."""
        digests = np.array(self._digests, DIGEST)
        if not len(digests):
            self._file.discard()
            return None
        checksums, errors = np.array(self._checksums, "u8"), np.concatenate(self._errors)
        trace, offset = _trace(self._layout, digests, checksums, errors, self._notes)
        path = self._folder / f"{shard_name(digests)}.h5"
        if offset == self._offset:
            file, self._file.path = self._file, path
        else:  # fewer rows than planned: a smaller frame, so the rows move
            file = AtomicFile(path, inside=self._folder.parent)
        with file, self._file:
            if file is not self._file:
                size = len(digests) * self._layout.row_bytes
                for done in range(0, size, _STEP):
                    file.write(offset + done, self._file.read(self._offset + done, min(_STEP, size - done)))
            seal(file, trace)
            file.commit(replace=replace)
        return path

    def close(self) -> None:
        """Give up what is not committed, and the memory it took."""
        self._file.discard()
        self._digests, self._checksums, self._errors = [], [], []


def unmeasured(rows: int) -> np.ndarray:
    return np.full(rows, np.nan, np.float32)


def _trace(
    layout: Layout, digests: np.ndarray, checksums: np.ndarray, errors: np.ndarray, notes: dict[str, str]
) -> tuple[WriteTrace, int]:
    """The file without its features, and where they go (bytes from the start). The same input gives the same bytes."""
    trace = WriteTrace()
    with new_hdf5(trace) as file:
        file.attrs.update(sorted(notes.items()))
        file.create_dataset("digests", data=digests, dtype=DIGEST)
        file.create_dataset("checksums", data=checksums, dtype="u8")
        if layout.dtype == "float16":
            file.create_dataset("errors", data=errors, dtype="f4")
        features = create_unwritten(file, "features", (len(digests), *layout.shape), layout.dtype)
        features.attrs.update(layout.attributes())
        return trace, features.id.get_offset()


@dataclass(frozen=True)
class Shard:
    """A committed shard as the views' index knows it, with its digests."""

    path: Path
    size: int  # bytes
    offset: int  # of the features, bytes from the start of the file
    hash: str  # xxh3_128 of all after the user block
    digests: np.ndarray = field(repr=False)  # [n] S32
    checksums: np.ndarray = field(repr=False)  # [n] uint64
    errors: np.ndarray = field(repr=False)  # [n] float32, NaN where not measured
    notes: dict[str, str] = field(repr=False)  # attributes: which store, computed how


_OPENED: dict[tuple[Path, Layout], tuple[tuple[int, ...], Shard]] = {}  # opening one takes milliseconds


def read_shard(path: Path, layout: Layout) -> Shard:
    """All of a shard but its features. Refuses another size, shape or dtype."""
    refuse_links(path.parent)
    stamp = file_stamp(path)
    stamped, shard = _OPENED.get((path, layout), (None, None))
    if shard is None or stamped != stamp:
        actual, shard = _read(path)
        if (actual.shape, actual.dtype) != (layout.shape, layout.dtype):
            raise CacheError(
                f"{path} holds rows of {actual.dtype} {actual.shape}; expected {layout.dtype} {layout.shape}."
            )
        if stamp is not None:
            _OPENED[path, layout] = stamp, shard
    return shard


def _read(path: Path) -> tuple[Layout, Shard]:
    refuse_links(path.parent)
    with open_columns(path) as file:
        features = file.column("features")
        dtype = str(features.dtype)
        if dtype not in ("float16", "float32"):
            raise CacheError(f"{path} holds no features of float16 or float32.")
        digests, checksums = file.array("digests", DIGEST), file.array("checksums", "u8")
        errors = file.array("errors", "f4") if "errors" in file.columns else unmeasured(len(digests))
        shapes = {digests.shape, checksums.shape, errors.shape}
        if len(features.shape) < 2 or shapes != {features.shape[:1]}:
            raise CacheError(f"{path}: its columns do not agree with each other.")
        check_digests(digests, path)
        layout = Layout(path.parent.name, features.shape[1:], dtype, *token_layout(features.attributes, path))
        notes = {key: str(value) for key, value in file.attributes.items()}
        size, hash_ = file.block.size, file.block.digest
        return layout, Shard(path, size, features.offset, hash_, digests, checksums, errors, notes)


def layout_in(path: Path) -> Layout:
    """The layout of a shard, as the shard has it. Raises DamagedFile, UnsafeFile."""
    return _read(path)[0]


def file_size(path: Path | str) -> int | None:
    """Bytes of a plain file; None where there is none."""
    try:
        entry = os.lstat(path)
    except OSError:
        return None
    return entry.st_size if stat.S_ISREG(entry.st_mode) else None


def map_rows(path: Path, size: int, offset: int, rows: int, layout: Layout) -> torch.Tensor:
    """The rows of a shard [rows, ...] as a tensor over the mapped file; no file stays open.

    Private mapping: writing to the tensor does not reach the file. Raises DamagedFile when it is gone or cut.
    """
    import torch

    refuse_links(path.parent, path)
    actual = file_size(path)
    if actual is None:
        raise DamagedFile(f"{path} is missing. Run the extraction again.")
    if actual != size:
        raise DamagedFile(f"{path} has {actual:,} bytes, not {size:,}. {AGAIN}")
    itemsize = np.dtype(layout.dtype).itemsize
    try:
        whole = torch.from_file(str(path), shared=False, size=size // itemsize, dtype=torch_dtype(layout.dtype))
    except RuntimeError as error:  # cut meanwhile, or larger than the address space
        raise DamagedFile(f"{path} cannot be mapped ({str(error).splitlines()[0]}).") from error
    return whole[offset // itemsize :][: rows * math.prod(layout.shape)].view(rows, *layout.shape)


@dataclass(frozen=True)
class RowLocations:
    """Where rows of one output lie: ``file`` [N] index into ``shards`` (-1 = nowhere) and ``row`` [N] in it."""

    shards: tuple[Shard, ...]
    file: np.ndarray
    row: np.ndarray

    def __getitem__(self, rows: Any) -> RowLocations:
        return RowLocations(self.shards, self.file[rows], self.row[rows])

    @property
    def mask(self) -> np.ndarray:
        """bool [N]: which rows lie somewhere."""
        return self.file >= 0

    @property
    def digests(self) -> np.ndarray:
        """S32 [N] of the rows; all must have been found."""
        return self._gather([shard.digests for shard in self.shards], DIGEST)

    @property
    def checksums(self) -> np.ndarray:
        """uint64 [N] of the rows; all must have been found."""
        return self._gather([shard.checksums for shard in self.shards], "u8")

    @property
    def errors(self) -> np.ndarray:
        """float32 [N]: relative errors of the rows' rounding, NaN where not measured; all must have been found."""
        return self._gather([shard.errors for shard in self.shards], "f4")

    def _gather(self, columns: list[np.ndarray], dtype: Any) -> np.ndarray:
        starts = np.cumsum([0, *(len(column) for column in columns)])
        return np.concatenate([np.zeros(0, dtype), *columns])[starts[self.file] + self.row]


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for rows [n, ...]. An index can name one large row a million times, so the sum is looked at first."""
    import torch

    size, memory = math.prod(shape) * dtype.itemsize, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise CacheError(
            f"{shape[0]:,} rows of {list(shape[1:])} take {size:,} bytes and this machine has {memory:,}; "
            "ask for fewer rows at a time."
        )
    return torch.empty(shape, dtype=dtype)


def read_feature_rows(places: RowLocations, layout: Layout) -> torch.Tensor:
    """Stored rows [n, ...] in the order of ``places``, each checked against its checksum. Raises DamagedFile."""
    import torch

    result = torch.empty((len(places.file), *layout.shape), dtype=torch_dtype(layout.dtype))
    for number in np.unique(places.file):
        shard = places.shards[number]
        mapped = map_rows(shard.path, shard.size, shard.offset, len(shard.digests), layout)
        chosen = np.flatnonzero(places.file == number)
        rows = places.row[chosen]
        result[torch.from_numpy(chosen)] = mapped[torch.from_numpy(rows)]
        if len(wrong := wrong_rows(result, chosen, shard.checksums[rows])):
            raise damaged_rows(shard.path, rows[np.isin(chosen, wrong)])
    return result


def wrong_rows(features: torch.Tensor, rows: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """Of ``rows`` of features [n, ...] those whose bytes do not have the checksum they were stored with."""
    flat = features.view(len(features), -1).numpy()
    sums = checksums.tolist()
    return np.array([k for k, sum_ in zip(rows.tolist(), sums, strict=True) if _checksum(flat[k]) != sum_], np.int64)


def damaged_rows(path: Path, rows: np.ndarray) -> DamagedFile:
    which = f"row {rows[0]:,}" if len(rows) == 1 else f"{len(rows):,} rows, the first {rows[0]:,},"
    return DamagedFile(
        f"{which} of {path} {'is' if len(rows) == 1 else 'are'} damaged: the bytes do not have the checksum they were "
        "stored with. featurecache verify lists what is damaged, featurecache repair computes it again."
    )


def _checksum(row: np.ndarray) -> int:
    return int(xxhash.xxh3_64_intdigest(row.data))


def find_by_digest(shards: list[Shard], digests: np.ndarray) -> RowLocations:
    """Find ``digests`` [N] in shards; of several copies of a row the shard that comes first is taken."""
    lengths = [len(shard.digests) for shard in shards]
    if not sum(lengths) or not len(digests):
        return RowLocations(tuple(shards), *np.full((2, len(digests)), -1, np.int64))
    stored = np.concatenate([shard.digests for shard in shards])
    file, row = np.repeat(np.arange(len(shards)), lengths), np.concatenate([np.arange(n) for n in lengths])
    order = np.argsort(stored, kind="stable")
    pick = order[np.minimum(np.searchsorted(stored[order], digests), len(stored) - 1)]
    hit = stored[pick] == digests
    return RowLocations(tuple(shards), np.where(hit, file[pick], -1), np.where(hit, row[pick], -1))


def row_keys(digests: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """S48 [n]: digest and checksum of each row, in hexadecimal digits."""
    keys = np.empty((len(digests), 48), np.uint8)
    keys[:, :32] = np.ascontiguousarray(digests, "S32").view(np.uint8).reshape(-1, 32)
    sums = np.ascontiguousarray(checksums, ">u8").view(np.uint8).reshape(-1, 8)
    keys[:, 32::2], keys[:, 33::2] = _HEX[sums >> 4], _HEX[sums & 15]
    return keys.reshape(-1).view("S48")


def find_by_key(shards: Sequence[Shard], wanted: np.ndarray) -> RowLocations:
    """Where rows of these keys lie; of several copies that in the first shard."""
    keyed = [replace(shard, digests=row_keys(shard.digests, shard.checksums)) for shard in shards]
    return replace(find_by_digest(keyed, wanted), shards=tuple(shards))


def notes_for(fingerprint: str, device: str, plan: dict[str, Any]) -> dict[str, str]:
    """Attributes of every shard: its store and how it was computed. No dates, no speeds: same rows, same file."""
    how = {key: value for key, value in plan.items() if key not in ("images_per_s", "cost", "candidates")}
    return {"fingerprint": fingerprint, "device": device, "plan": json.dumps(how, sort_keys=True)}
