"""Pairs of rows whose features point the same way, seen from the mean of all.

The features of images of one kind share a large common part (untrained ones almost nothing else): raw cosines are all
near 1 and say nothing. So the mean over the view is taken away first. Few rows make a poor mean: below a hundred or so,
cosines say little. A row that lies on the mean has no direction and is near to nothing.

Notation: D width; u, v the unit vectors of two rows; Q [D,k] with orthonormal columns; p = Qᵀu, q = Qᵀv.

**Screen.** Split u into Q p and a rest of length r(u) = √(1 − |p|²). The rests of u and v have a product of at most
r(u)·r(v) (Cauchy–Schwarz), so

    u·v  ≤  p·q + r(u)·r(v)  =  [p, r(u)] · [q, r(v)],

a product of k + 1 numbers instead of D that no pair at or above the threshold can fail. With Q the main directions of
the features (their rests are short), or with features that have none (a rest of length 0.97 leaves every chance pair
far below 0.99), k of 16 to 64 does for D = 768. k is chosen on a sample; where it saves nothing, all of u is taken.

**Rounding of the screen.** p is computed in double precision and rounded to float32: |p̂ − p| ≤ 2⁻²⁴ + 10⁻¹² =: ε. So
1 − |p̂|² is less than 1 − |p|² by at most 2ε + ε², and r̂ = √(max(0, 1 − |p̂|²) + 10⁻⁶) is never shorter than r. The
product of m numbers in float32, in any order of summation, is off by at most m·2⁻²⁴/(1 − m·2⁻²⁴) times the lengths of
its factors, which are at most 1 + 10⁻⁶; p̂·q̂ is off from p·q by at most 2ε + ε². `_margin` is more than the sum of all.

**Verdict.** Every pair that the screen lets through is computed again from the stored numbers in double precision and
rounded to nine decimals, so that the result does not depend on the screen, on blocks or on the order of summation.

The estimates decide how fast a search is, never what it finds. (bfloat16 products as a screen: tried, 8 times
slower than float32 on a CPU without instructions for it.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from featurecache.reader import View

TILE, BLOCK = 32_768, 2_048  # rows of the first split held at a time; rows on each side of one product
SAMPLE = 1_024  # rows of each side on which k is chosen
FEW = 20  # times D², the pairs below which a basis costs more than it saves (an estimate)
_PAIR_COST = 3.5e5  # multiply-adds of a screen in the time one pair is computed again alone (an estimate)
_DENSE = 1 / 100  # share of a block from which on one product of the block is faster than its pairs (an estimate)
_DECIMALS = 9
_WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # k that are considered


@dataclass(frozen=True)
class Pairs:
    """``count`` pairs in all; of them the closest, closest first: rows int64 [n,2], cosines float64 [n]."""

    count: int
    rows: np.ndarray
    cosines: np.ndarray


@dataclass(frozen=True)
class Directions:
    """The rows of one output as unit vectors from their mean."""

    read: Callable[[np.ndarray], torch.Tensor]  # rows [n] -> [n,D], as stored
    mean: np.ndarray  # float64 [D]
    tiny: float  # a distance from the mean that is only rounding

    @classmethod
    def of(cls, view: View, output: str, rows: np.ndarray) -> Directions:
        """The mean is that of ``rows``; rows that are not finite are not in it. An output that is made of tokens is
        made once and kept in memory, a stored one is read block by block."""
        read: Callable[[np.ndarray], torch.Tensor] = lambda picked: view.tensor(output, picked)  # noqa: E731
        if output not in view.outputs:
            whole = view.tensor(output)
            read = lambda picked: whole[torch.from_numpy(picked)]  # noqa: E731
        total, number = np.zeros(view.info(output).shape), 0
        for start in range(0, len(rows), BLOCK):
            x = _double(read(rows[start : start + BLOCK]))
            part = x.sum(axis=0)
            if not np.isfinite(part).all():
                x = x[np.isfinite(x).all(axis=1)]
                part = x.sum(axis=0)
            total += part
            number += len(x)
        mean = total / max(number, 1)
        return cls(read, mean, 1e-9 * float(np.linalg.norm(mean)))

    def units(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n,D]; zero where a row has no direction."""
        x = _double(self.read(rows))
        x -= self.mean
        length = np.sqrt(np.einsum("nd,nd->n", x, x))
        none = ~((length > self.tiny) & np.isfinite(length))
        length[none], x[none] = 1, 0
        x /= length[:, None]
        return x


def _double(x: torch.Tensor) -> np.ndarray:
    return x.numpy().astype(np.float64)  # five times as fast as torch's own, of float16


def closest(
    directions: Directions,
    first: np.ndarray,
    second: np.ndarray,
    *,
    threshold: float,
    most: int,
    same: np.ndarray,
    what: str = "",
    width: int | None = None,
) -> Pairs:
    """The pairs of a row of ``first`` and one of ``second`` with a cosine of at least ``threshold``.

    Rows with one number in ``same`` [N] are copies and no pair. ``what``: name of a progress bar, "" for none.
    ``width``: k of the screen, D for no screen; by default chosen on a sample. Memory: a tile, a block and ``most``.
    """
    from tqdm import tqdm

    screen = Screen.chosen(directions, first, second, threshold, width)
    cut = np.float32(threshold - 0.5 * 10**-_DECIMALS - screen.margin)
    kept = _Kept(most)
    product = np.empty((BLOCK, BLOCK), np.float32)
    total = len(first) * len(second)
    with tqdm(
        total=total, desc=what, unit=" pairs", unit_scale=True, leave=False, disable=None if what else True
    ) as bar:
        for tile in _parts(first, TILE):
            left = [(rows, screen(directions.units(rows))) for rows in _parts(tile, BLOCK)]
            for columns in _parts(second, BLOCK):
                right = screen(directions.units(columns))
                for rows, factors in left:
                    bounds = np.matmul(factors, right.T, out=product[: len(rows), : len(columns)])
                    a, b = _reaching(bounds, cut)
                    other = same[rows[a]] != same[columns[b]]
                    if other.any():
                        a, b = a[other], b[other]
                        cosines = exact(directions, rows, columns, a, b)
                        near = cosines >= threshold
                        kept.add(rows[a[near]], columns[b[near]], cosines[near])
                    bar.update(len(rows) * len(columns))
    return kept.pairs()


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _reaching(bounds: np.ndarray, cut: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Places [h], [h] in bounds [a,b] that reach ``cut``; most blocks have few, so that the maxima are looked at."""
    rows = np.flatnonzero(bounds.max(axis=1) >= cut)
    a, b = np.nonzero(bounds[rows] >= cut)
    return rows[a], b


def exact(directions: Directions, rows: np.ndarray, columns: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines float64 [h] of rows[a] and columns[b], from the stored numbers, to nine decimals."""
    left, a = np.unique(a, return_inverse=True)
    right, b = np.unique(b, return_inverse=True)
    u, v = directions.units(rows[left]), directions.units(columns[right])
    if len(a) > _DENSE * len(u) * len(v):
        cosines = (u @ v.T)[a, b]
    else:
        cosines = np.empty(len(a))
        for start in range(0, len(a), BLOCK):
            here = slice(start, start + BLOCK)
            cosines[here] = np.einsum("hd,hd->h", u[a[here]], v[b[here]])
    return np.round(cosines, _DECIMALS)


@dataclass(frozen=True)
class Screen:
    """Unit vectors float64 [n,D] -> factors float32 [n,m] whose products are bounds of the cosines."""

    basis: np.ndarray | None  # float64 [D,k]; None: the vectors themselves, m = D
    margin: float  # what rounding may take from a bound

    def __call__(self, units: np.ndarray) -> np.ndarray:
        if self.basis is None:
            return units.astype(np.float32)
        p = (units @ self.basis).astype(np.float32)
        rest = np.sqrt(np.maximum(0, 1 - np.einsum("nk,nk->n", p, p, dtype=np.float64)) + 1e-6)
        return np.concatenate([p, rest.astype(np.float32)[:, None]], axis=1)

    @classmethod
    def chosen(
        cls, directions: Directions, first: np.ndarray, second: np.ndarray, threshold: float, width: int | None
    ) -> Screen:
        """The cheapest on a sample of pairs, by multiply-adds; for a small search no screen."""
        full = len(directions.mean)
        if width == full or (width is None and len(first) * len(second) < FEW * full**2):
            return cls(None, _margin(full))
        rng = np.random.default_rng(0)
        u, v = (directions.units(_sample(rng, rows, SAMPLE)) for rows in (first, second))
        more = directions.units(_sample(rng, np.concatenate([first, second]), 8 * SAMPLE))
        basis = torch.linalg.eigh(torch.from_numpy(more.T @ more))[1].numpy()[:, ::-1]  # the main directions first
        if width is None:
            width = _cheapest(u @ basis, v @ basis, threshold)
        return (
            cls(None, _margin(full)) if width == full else cls(np.ascontiguousarray(basis[:, :width]), _margin(width))
        )


def _sample(rng: np.random.Generator, rows: np.ndarray, size: int) -> np.ndarray:
    return np.sort(rng.choice(rows, min(size, len(rows)), replace=False))


def _cheapest(u: np.ndarray, v: np.ndarray, threshold: float) -> int:
    """k of the least work for pairs of u [a,D], v [b,D], coordinates in the whole basis."""
    full = u.shape[1]
    u, v = u.astype(np.float32), v.astype(np.float32)
    product = np.zeros((len(u), len(v)), np.float32)
    rests = [np.sqrt(np.maximum(0, 1 - np.cumsum(x * x, axis=1))) for x in (u, v)]

    def work(k: int, bound: np.ndarray) -> float:
        passed = np.count_nonzero(bound >= threshold) / bound.size
        return k + min(_PAIR_COST * passed, 4 * full)  # many pairs are computed as one product in double precision

    cost, before = {full: work(full, u @ v.T)}, 0
    for k in (k for k in _WIDTHS if k < full):
        if k >= min(cost.values()):
            break
        product += u[:, before:k] @ v[:, before:k].T
        cost[k] = work(k, product + rests[0][:, k - 1, None] * rests[1][:, k - 1])
        before = k
    return min(cost, key=cost.__getitem__)


def _margin(width: int) -> float:
    unit = 2.0**-24
    terms = (width + 2) * unit / (1 - (width + 2) * unit)
    return 1.01 * terms + 4 * unit + 1e-7


@dataclass
class _Kept:
    """The closest pairs so far. All are counted; not many more than ``most`` are held."""

    most: int
    count: int = 0
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    number: int = 0

    def add(self, a: np.ndarray, b: np.ndarray, cosines: np.ndarray) -> None:
        self.count += len(a)
        self.number += len(a)
        self.held.append((a, b, cosines))
        if self.number > 4 * self.most + BLOCK:
            self._prune()

    def _prune(self) -> None:
        a, b, cosines = (np.concatenate(parts) for parts in zip(*self.held, strict=True))
        order = np.lexsort((b, a, -cosines))[: self.most]  # equal ones in the order of the rows
        self.held, self.number = [(a[order], b[order], cosines[order])], len(order)

    def pairs(self) -> Pairs:
        if not self.held:
            return Pairs(0, np.zeros((0, 2), np.int64), np.zeros(0))
        self._prune()
        a, b, cosines = self.held[0]
        return Pairs(self.count, np.stack([a, b], axis=1), cosines)
