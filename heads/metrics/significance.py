"""Intervals and tests that need no resampling, or come after it. All are of 95 % (``LEVEL``) and two-sided.
scipy is imported by what compares heads or parts: it takes as long as a linear head is trained.

Notation: n images, R resamples, J parts (folds, or draws of the splits), M hypotheses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
Interval = tuple[float, float]


def wilson(hits: float, n: float) -> Interval:
    """Of a proportion, hits of n (Wilson 1927; Newcombe 1998, method 3), which may be fractions: those of several heads
    on the same images are their mean. NaN where there is nothing to count."""
    if not n:
        return np.nan, np.nan
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), hits / n
    centre, wide = share + z**2 / (2 * n), z * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    return max(0.0, (centre - wide) / (1 + z**2 / n)), min(1.0, (centre + wide) / (1 + z**2 / n))


def percentiles(values: np.ndarray) -> Interval:
    """Of resampled values [R], those that are defined."""
    low, high = np.quantile(values[~np.isnan(values)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_share(differences: np.ndarray) -> float:
    """p that a difference is 0, from resampled differences [R]: twice the smaller share on one side of it, never 0
    (Davison & Hinkley 1997, equation 4.11)."""
    there = differences[~np.isnan(differences)]
    beyond = min(int((there <= 0).sum()), int((there >= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (len(there) + 1))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact p that two heads are right equally often; bool [n], right or not, on the same images."""
    from scipy import stats

    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    return float(stats.binomtest(alone, alone + other, 0.5).pvalue) if alone + other else 1.0


def delong(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Difference of two AUROCs on the same images, its standard error, and p (DeLong, DeLong & Clarke-Pearson 1988).

    By ranks (Sun & Xu 2014): of m positives and n negatives, the share of negatives below positive i is
    V_i = (rank among all - rank among positives) / n, that of positives above negative j
    W_j = 1 - (rank among all - rank among negatives) / m; the AUROC is mean V, its variance var V / m + var W / n.
    ``truth`` bool, with at least two of each."""
    from scipy import stats

    m, n = int(truth.sum()), int((~truth).sum())
    above, below = [], []
    for score in (first, second):
        rank = stats.rankdata(score)
        above.append((rank[truth] - stats.rankdata(score[truth])) / n)
        below.append(1 - (rank[~truth] - stats.rankdata(score[~truth])) / m)
    difference = float(above[0].mean() - above[1].mean())
    variance = np.var(above[0] - above[1], ddof=1) / m + np.var(below[0] - below[1], ddof=1) / n
    error = float(np.sqrt(variance))
    if error < 1e-12:  # one ranks as the other; what is left of the variance is rounding
        return difference, error, 1.0 if abs(difference) < 1e-12 else 0.0
    return difference, error, math.erfc(abs(difference) / error / math.sqrt(2))


def holm(ps: Sequence[float]) -> list[float]:
    """p of M hypotheses so that the chance of one false alarm among all stays below the level (Holm 1979)."""
    order = np.argsort(ps)
    scaled = np.array(ps, dtype=float)[order] * np.arange(len(ps), 0, -1)
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()


def corrected_t(values: np.ndarray, ratio: float) -> tuple[float, float, float]:
    """Interval of the mean of values [J] measured on J parts, and p that it is 0: Student's t with J - 1 degrees and
    variance (1 / J + ratio) s². ``ratio``: images tested / images trained on. Trainings overlap, so the plain s² / J is
    too small (Nadeau & Bengio 2003, section 3; for repeated folds Bouckaert & Frank 2004)."""
    from scipy import special

    mean, count = float(np.mean(values)), len(values)
    error = float(np.sqrt((1 / count + ratio) * np.var(values, ddof=1)))
    wide = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    p = float(2 * special.stdtr(count - 1, -abs(mean) / error)) if error else float(mean == 0)
    return mean - wide, mean + wide, p


def over_test_sets(values: np.ndarray, ratio: float) -> tuple[float, float, float, str] | None:
    """`corrected_t` of those of ``values`` [J] that are defined, and what it is called; None of fewer than two."""
    values = values[~np.isnan(values)]
    return (*corrected_t(values, ratio), f"corrected t, {len(values)} sets of test images") if len(values) > 1 else None
