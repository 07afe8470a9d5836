"""Rows of features out of mapped shards, in any order, each checked when it is first read."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from featurecache.errors import CacheError
from featurecache.files import ALIGNMENT
from featurecache.inspection import OutputInfo, Stored
from featurecache.shards import TORCH_DTYPE, damaged_rows, wrong_rows


class Mapped:
    """All shards of one output as one tensor, whose rows begin wherever the mapped files lie in memory.

    A gather over many shards would be one index_select for each, and a second copy to put the rows in order. Instead
    the address range from the first mapping to the last is taken as one buffer, [M, ...] with overlapping rows a
    common divisor of all row addresses apart; one parallel index_select then reads any rows of any shards in the
    order asked. Of the range only rows of shards are ever touched.
    """

    def __init__(
        self, stored: Stored, paths: Sequence[Path], mapped: Callable[[int, OutputInfo], torch.Tensor]
    ) -> None:
        """``paths`` of the shards by number; ``mapped`` gives the rows of one."""
        self._info, self._index, self._checksums, self._paths = stored.info, stored.index, stored.checksums, paths
        self._unchecked = np.ones(len(stored.index), bool)  # rows whose bytes nobody has looked at in this process
        used = np.unique(stored.index[:, 0])
        self._shards = {int(number): mapped(int(number), stored.info) for number in used}  # keeps them mapped
        self._bytes = int(np.prod(stored.info.shape)) * np.dtype(stored.info.dtype).itemsize
        self._unit = math.gcd(ALIGNMENT, self._bytes)
        starts = {number: rows.data_ptr() for number, rows in self._shards.items()}
        first = min(starts.values(), default=0)
        self._start = np.zeros(max(starts, default=0) + 1, np.int64)  # by file, in units
        for number, address in starts.items():
            assert (address - first) % self._unit == 0
            self._start[number] = (address - first) // self._unit
        span = (
            max((rows.data_ptr() + rows.numel() * rows.itemsize for rows in self._shards.values()), default=0) - first
        )
        self._buffer = self._over(first, span)

    def _over(self, first: int, span: int) -> torch.Tensor:
        dtype, shape = TORCH_DTYPE[self._info.dtype], self._info.shape
        if not span:
            return torch.empty((0, *shape), dtype=dtype)
        memory = torch.frombuffer((ctypes.c_byte * span).from_address(first), dtype=dtype)
        inner = torch.empty(shape, dtype=dtype, device="meta").stride()
        count = (span - self._bytes) // self._unit + 1
        return memory.as_strided((count, *shape), (self._unit // dtype.itemsize, *inner))

    def _check(self, rows: np.ndarray) -> None:
        """Bytes of rows [n] against their checksums. Costs a row's first reading about as much again."""
        for number in np.unique(self._index[rows, 0]).tolist():
            here = rows[self._index[rows, 0] == number]
            wrong = wrong_rows(self._shards[number], self._index[here, 1], self._checksums[here])
            if len(wrong):
                raise damaged_rows(self._paths[number], wrong)
        self._unchecked[rows] = False

    def take(self, rows: np.ndarray, out: torch.Tensor | None) -> torch.Tensor:
        """rows [n] of the view → [n, ...]."""
        new = rows[self._unchecked[rows]]
        if len(new):
            self._check(new)
        places = self._index[rows]
        index = torch.from_numpy(self._start[places[:, 0]] + places[:, 1] * (self._bytes // self._unit))
        if out is None:
            out = empty_rows((len(places), *self._info.shape), self._buffer.dtype)
        assert out.shape == (len(places), *self._info.shape) and out.dtype == self._buffer.dtype
        return torch.index_select(self._buffer, 0, index, out=out) if len(places) else out


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for rows [n, ...]. An index can name one large row a million times, so the sum is looked at first."""
    size = math.prod(shape) * dtype.itemsize
    if size > _memory_bytes():
        raise CacheError(
            f"{shape[0]:,} rows of {list(shape[1:])} take {size:,} bytes and this machine has {_memory_bytes():,}; "
            "ask for fewer rows at a time."
        )
    return torch.empty(shape, dtype=dtype)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
