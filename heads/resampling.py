"""What a bootstrap draws: independent units, within strata, the same ones for every head that is compared.

A *unit* is a cluster: the images of one group or of one digest, or a single image. Drawing units with replacement gives
each row a weight, how often its unit was drawn; every measure is then computed from weights, not from copied rows.

Strata keep in every resample what the data were made of, so an interval speaks of data with the same mix of classes.
Images with classes that exclude each other: the classes, so that none is ever missing. Clusters: the class they hold
most of, of several such the rarest; with several labels the pattern of labels. There, what has fewer than ``FEW``
clusters is one stratum together, since a stratum of one cluster is drawn the same every time and would hide its part of
the variance.

Notation: n rows, U units, R resamples, b of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

FEW = 10  # clusters that are a stratum of their own
CELLS = 1_000_000  # of a block of weights [n, b]: 4 MB, which a cache holds (tried: 25 % faster than all R at once)
KEPT = 1 << 28  # bytes of weights that are kept for the next head instead of being drawn again


@dataclass(frozen=True)
class Units:
    """``of_row``: the unit of each row, int [n] in 0 … U-1; ``strata``: int [U]."""

    of_row: np.ndarray
    strata: np.ndarray

    @property
    def count(self) -> int:
        return len(self.strata)

    @property
    def clustered(self) -> bool:
        """Whether some unit holds several images."""
        return self.count < len(self.of_row)

    def among(self, rows: np.ndarray) -> int:
        """Units that have one of these rows (bool [n])."""
        return len(np.unique(self.of_row[rows]))


def units_for(clusters: np.ndarray, y: np.ndarray) -> Units:
    """``clusters``: rows with one number belong together; y: int [n], or float [n, L] with NaN for unknown."""
    of_row = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    if y.ndim == 2:
        return Units(of_row, _pooled(_by_pattern(of_row, y)))
    strata = _by_class(of_row, y)
    return Units(of_row, strata if len(strata) == len(y) else _pooled(strata))


def _pooled(strata: np.ndarray) -> np.ndarray:
    """Strata with fewer than ``FEW`` units made one."""
    _, own, size = np.unique(strata, return_inverse=True, return_counts=True)
    own = own.reshape(-1)
    return np.where(size[own] < FEW, len(size), own)


def _by_class(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    count = int(y.max(initial=0)) + 1
    held = np.zeros((int(of_row.max(initial=-1)) + 1, count), dtype=np.int64)
    np.add.at(held, (of_row, y), 1)
    rare_first = np.argsort(np.bincount(y, minlength=count), kind="stable")
    return rare_first[held[:, rare_first].argmax(axis=1)]


def _by_pattern(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A cluster has a label if one of its images has it, and does not have it if that is known of one."""
    pattern = np.full((int(of_row.max(initial=-1)) + 1, y.shape[1]), -1, dtype=np.int8)
    np.maximum.at(pattern, of_row, np.where(np.isnan(y), -1, y).astype(np.int8))
    return np.unique(pattern, axis=0, return_inverse=True)[1].reshape(-1)


@dataclass
class Draws:
    """R resamples of units as weights of rows. Iterating twice gives the same weights."""

    units: Units
    resamples: int
    seed: int = 0
    _kept: list[np.ndarray] = field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks of weights float32 [n, b]; counts, so they are exact."""
        if self._kept:
            yield from self._kept
            return
        keep = len(self.units.of_row) * self.resamples * 4 <= KEPT
        found: list[np.ndarray] = []
        for block in self._drawn():
            if keep:
                found.append(block)
            yield block
        self._kept = found

    def _drawn(self) -> Iterator[np.ndarray]:
        width = max(16, CELLS // max(len(self.units.of_row), 1))
        members = [np.flatnonzero(self.units.strata == s) for s in np.unique(self.units.strata)]
        for number, start in enumerate(range(0, self.resamples, width)):
            rng = np.random.default_rng([self.seed, number])
            b = min(width, self.resamples - start)
            weights = np.empty((self.units.count, b), dtype=np.float32)
            for own in members:
                drawn = rng.integers(0, len(own), (b, len(own))) + len(own) * np.arange(b)[:, None]
                weights[own] = np.bincount(drawn.reshape(-1), minlength=b * len(own)).reshape(b, -1).T
            yield weights[self.units.of_row]
