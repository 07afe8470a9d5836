"""Features in memory: all shards of one output mapped as one tensor, each row checked when it is first read."""

from __future__ import annotations

import ctypes
import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurecache.files.directory import ALIGNMENT
from featurecache.files.mirror import fetch
from featurecache.store.schema import StoredOutput
from featurecache.store.shards import damaged_rows, empty_rows, map_rows, torch_dtype, wrong_rows

if TYPE_CHECKING:
    import torch

AHEAD = 32 << 20  # bytes that the disk may be asked for before they are read


def _read_ahead(rows: torch.Tensor) -> int:
    """Have the system read a mapped shard meanwhile; its bytes."""
    begin = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(rows.data_ptr() + rows.nbytes - begin)
    if hasattr(mmap, "MADV_WILLNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, mmap.MADV_WILLNEED)
    return rows.nbytes


class MappedRows:
    """All shards of one output as one tensor, whose rows begin wherever the mapped files lie in memory.

    A gather over many shards would be one index_select for each, and a second copy to put the rows in order. Instead
    the address range from the first mapping to the last is taken as one buffer, [M, ...] with overlapping rows a
    common divisor of all row addresses apart; one parallel index_select then reads any rows of any shards in the
    order asked. Of the range only rows of shards are ever touched.
    """

    def __init__(self, stored: StoredOutput, store: Path, files: np.ndarray) -> None:
        """``files``: the shards of ``store`` by number, as a view has them."""
        import torch

        self._info, self._index, self._checksums = stored.info, stored.index, stored.checksums
        self._bytes = stored.info.row_bytes
        self._unchecked = np.ones(len(stored.index), bool)  # rows whose bytes nobody has looked at in this process
        used = np.unique(stored.index[:, 0]).tolist()
        self._paths = {number: store / files["path"][number].decode() for number in used}
        fetch(self._paths.values())
        self._shards = {}  # which keeps them mapped
        for number, path in self._paths.items():
            size, offset, rows = (int(files[key][number]) for key in ("size", "offset", "rows"))
            self._shards[number] = map_rows(path, size, offset, rows, stored.info)
        self._unit = math.gcd(ALIGNMENT, self._bytes)
        starts = {number: rows.data_ptr() for number, rows in self._shards.items()}
        first = min(starts.values(), default=0)
        self._start = np.zeros(max(starts, default=0) + 1, np.int64)  # by file, in units
        for number, address in starts.items():
            assert (address - first) % self._unit == 0
            self._start[number] = (address - first) // self._unit
        span = max((rows.data_ptr() + rows.nbytes for rows in self._shards.values()), default=0) - first
        dtype, shape = torch_dtype(self._info.dtype), self._info.shape
        self._buffer = torch.empty((0, *shape), dtype=dtype)
        if span:
            memory = torch.frombuffer((ctypes.c_byte * span).from_address(first), dtype=dtype)
            count, inner = (span - self._bytes) // self._unit + 1, self._buffer.stride()[1:]
            self._buffer = memory.as_strided((count, *shape), (self._unit // dtype.itemsize, *inner))

    def _check(self, rows: np.ndarray) -> None:
        """Bytes of rows [n] against their checksums. Costs a row's first reading about as much again; meanwhile the
        disk reads the next shards, where these rows are a good part of them."""
        numbers, ahead = np.unique(self._index[rows, 0]).tolist(), 0
        size = sum(self._shards[number].nbytes for number in numbers)
        coming = iter(numbers if len(rows) * self._bytes * 4 >= size else ())
        for number in numbers:
            while ahead < AHEAD and (following := next(coming, None)) is not None:
                ahead += _read_ahead(self._shards[following])
            here = rows[self._index[rows, 0] == number]
            if len(wrong := wrong_rows(self._shards[number], self._index[here, 1], self._checksums[here])):
                raise damaged_rows(self._paths[number], wrong)
            ahead -= self._shards[number].nbytes
        self._unchecked[rows] = False

    def take(self, rows: np.ndarray, out: torch.Tensor | None) -> torch.Tensor:
        """rows [n] of the view → [n, ...]."""
        import torch

        if len(new := rows[self._unchecked[rows]]):
            self._check(new)
        places = self._index[rows]
        index = torch.from_numpy(self._start[places[:, 0]] + places[:, 1] * (self._bytes // self._unit))
        if out is None:
            out = empty_rows((len(places), *self._info.shape), self._buffer.dtype)
        assert out.shape == (len(places), *self._info.shape) and out.dtype == self._buffer.dtype
        return torch.index_select(self._buffer, 0, index, out=out) if len(places) else out
