"""The order in which training rows are seen: a function of ``split_seed`` alone, so that heads can share batches.

Notation: N training rows, B rows a batch, C classes that train has. An epoch is N draws, so ceil(N / B) batches, the
last one short. Balanced batches (the article's): B = qC + r gives every class q rows and r classes one more; who gets
one more goes round, so that over the batches all classes are drawn equally. Every class is cycled through its own
shuffle: no image of it comes again before all of them have come, across epochs too.

Features that do not fit in memory are read from the mapped shards, where rows far apart are slow: ``window`` then says
how many rows may be in use at once, and a shuffle is one of blocks of ``BLOCK`` neighbouring rows first, and of the
rows inside windows of that size after.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 64  # neighbouring rows


def shuffled(rows: np.ndarray, rng: np.random.Generator, window: int | None) -> np.ndarray:
    """A permutation of ``rows`` [n], which are in the order they are stored in."""
    if window is None or window >= len(rows):
        return rng.permutation(rows)
    blocks = np.split(rows, np.arange(BLOCK, len(rows), BLOCK))
    mixed = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return np.concatenate([rng.permutation(part) for part in np.split(mixed, np.arange(window, len(rows), window))])


class _Cycle:
    """Endless draws from ``rows``, each pass in a new order."""

    def __init__(self, rows: np.ndarray, rng: np.random.Generator, window: int | None) -> None:
        self.rows, self.rng, self.window = rows, rng, window
        self.queue = shuffled(rows, rng, window)

    def take(self, n: int) -> np.ndarray:
        while len(self.queue) < n:
            self.queue = np.concatenate([self.queue, shuffled(self.rows, self.rng, self.window)])
        taken, self.queue = self.queue[:n], self.queue[n:]
        return taken


class PlainBatches:
    """A new permutation of all N rows in every epoch."""

    def __init__(self, n: int, batch_size: int, split_seed: int, window: int | None = None) -> None:
        self.n, self.batch_size, self.window = n, batch_size, window
        self.rng = np.random.default_rng([split_seed, 1])

    def epoch(self) -> list[torch.Tensor]:
        """int64 [B] row numbers, batch by batch."""
        order = shuffled(np.arange(self.n), self.rng, self.window)
        return list(torch.from_numpy(order).split(self.batch_size))


class BalancedBatches:
    """Every batch draws its classes equally. ``labels``: int64 [N]."""

    def __init__(self, labels: np.ndarray, batch_size: int, split_seed: int, window: int | None = None) -> None:
        self.n, self.batch_size = len(labels), batch_size
        self.rng = np.random.default_rng([split_seed, 1])
        self.classes = np.unique(labels)
        each = None if window is None else max(BLOCK, window // len(self.classes))
        self.cycles = [_Cycle(np.flatnonzero(labels == c), self.rng, each) for c in self.classes]
        self.turn = self.rng.permutation(len(self.classes))  # whose turn it is to give one more

    def epoch(self) -> list[torch.Tensor]:
        """int64 [B] row numbers, batch by batch."""
        sizes = [min(self.batch_size, self.n - start) for start in range(0, self.n, self.batch_size)]
        which = np.concatenate([self._classes_of_batch(size) for size in sizes])
        rows = np.empty(self.n, dtype=np.int64)
        for c, cycle in enumerate(self.cycles):
            places = np.flatnonzero(which == c)
            rows[places] = cycle.take(len(places))
        return list(torch.from_numpy(rows).split(sizes))

    def _classes_of_batch(self, size: int) -> np.ndarray:
        count = len(self.classes)
        each, more = divmod(size, count)
        return np.concatenate([np.repeat(np.arange(count), each), self._extra(more)])

    def _extra(self, n: int) -> np.ndarray:
        """n different classes, in turn; a new round begins with those that this batch has not had."""
        if len(self.turn) < n:
            again = self.rng.permutation(len(self.classes))
            had = np.isin(again, self.turn)
            self.turn = np.concatenate([self.turn, again[~had], again[had]])
        taken, self.turn = self.turn[:n], self.turn[n:]
        return taken


def versions_of(order: list[torch.Tensor], n: int, versions: int, rng: np.random.Generator) -> list[torch.Tensor]:
    """Every image's version for this epoch, drawn anew: places in 0 … n - 1 become places in 0 … n·V - 1."""
    drawn = torch.from_numpy(rng.integers(versions, size=n)) * n
    return [places + drawn[places] for places in order]
