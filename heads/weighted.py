"""The measures of `heads.evaluate` under many weightings of the rows at once: what a bootstrap of R resamples needs.

A resample is a weight for each row (how often it was drawn). Everything that does not depend on weights is prepared
once: counts and sums become products with a sparse matrix, and a ranking becomes segments between distinct scores.

Ranking, of one class: its positives have G distinct scores. With p_g the weight of positives at score g, t_g that of
negatives at the same score, and u_g that of negatives strictly below it,

    AUROC = sum_g p_g (u_g + t_g / 2) / (P N),     AP = sum_g p_g / P · (p_>=g / (p_>=g + n_>=g)).

A measure that is not defined in a resample (a class is missing, nothing was called positive) is NaN there. A mean over
classes or labels is over those that are defined with all weights 1, and NaN where one of these is not: another set of
classes would be another measure.

Notation: n rows, C classes (or labels), b resamples, W weights float32 [n, b], whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from heads import evaluate as ev
from heads import metrics

Measured = dict[str, np.ndarray]  # name -> [b], or of every class [C, b]


@dataclass(frozen=True)
class Said:
    """Calibrated answers of one head to n images: y int [n] or float [n, C] with NaN, z float64 [n, C]."""

    kind: str
    z: np.ndarray
    y: np.ndarray
    positive: int | None = None
    cuts: tuple[float, ...] = ()

    @property
    def multilabel(self) -> bool:
        return self.kind == "multilabel"

    @cached_property
    def p(self) -> np.ndarray:
        return ev.probabilities(self.kind, self.z)

    @cached_property
    def called(self) -> np.ndarray:
        return ev.call(self.kind, self.p, self.cuts, self.positive)


class Weighted:
    """One head's answers, prepared; called with weights [n, b] it gives (measures by name [b], of classes [C, b])."""

    def __init__(self, said: Said) -> None:
        self.said = said
        self._rankings = _rankings(said)
        self._values = _row_values(said)
        self._counts = _counts(said)
        self._gaps = _gaps(said)
        self._defined: dict[str, np.ndarray] = {}
        _, of_class = self(np.ones((len(said.z), 1), dtype=np.float32))
        self._defined = {name: ~np.isnan(values[:, 0]) for name, values in of_class.items()}

    def __call__(self, weights: np.ndarray) -> tuple[Measured, Measured]:
        said = self.said
        total = weights.sum(axis=0, dtype=np.float64)
        means = {name: metrics.ratio(_product(column, weights), total) for name, column in self._values.items()}
        areas = np.array([ranking(weights) for ranking in self._rankings])  # [C or 1, 2, b]
        of_class = {"auroc": areas[:, 0], "ap": areas[:, 1]}
        counts = (self._counts @ weights).astype(np.float64).reshape(4, -1, weights.shape[1])  # [4, C, b]
        if said.multilabel:
            return self._labels(weights, of_class, counts)
        if said.kind == "binary":
            assert said.positive is not None
            overall = _of_counts(*(part[said.positive] for part in counts)) | {k: v[0] for k, v in of_class.items()}
            overall |= means | {"ece": self._error(weights, total)}
            return overall, _of_classes(*counts)
        of_class |= _of_classes(*counts)
        overall = means | {name: self._macro(name, of_class[name]) for name in ("auroc", "ap")}
        overall |= {"balanced_accuracy": self._macro("recall", of_class["recall"])}
        overall |= {"macro_f1": self._macro("f1", of_class["f1"]), "ece": self._error(weights, total)}
        if said.kind == "ordinal":
            overall["quadratic_kappa"] = _kappa(overall.pop("squared"), counts)
        return overall, of_class

    def _labels(self, weights: np.ndarray, of_class: Measured, counts: np.ndarray) -> tuple[Measured, Measured]:
        of_class |= _of_counts(*counts)
        known = counts[3].sum(axis=0)
        overall = {name: self._macro(name, values) for name, values in of_class.items()}
        overall |= {name: metrics.ratio(_product(column, weights), known) for name, column in self._values.items()}
        gaps = np.abs((self._gaps @ weights).astype(np.float64)).reshape(len(counts[3]), metrics.BINS, -1).sum(axis=1)
        of_class = of_class | {"ece": metrics.ratio(gaps, counts[3])}
        return overall | {"ece": self._macro("ece", of_class["ece"])}, of_class

    def _macro(self, name: str, values: np.ndarray) -> np.ndarray:
        """[C, b] -> [b]"""
        there = self._defined.get(name, ~np.isnan(values[:, 0]))
        return values[there].mean(axis=0) if there.any() else np.full(values.shape[1], np.nan)

    def _error(self, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
        return metrics.ratio(np.abs((self._gaps @ weights).astype(np.float64)).sum(axis=0), total)


def _product(column: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum_i column_i W_i [b] in float64."""
    return np.einsum("n,nb->b", column, weights, dtype=np.float64)


class _Ranking:
    """AUROC and AP [2, b] of one class; rows: those that count, int."""

    def __init__(self, score: np.ndarray, truth: np.ndarray, rows: np.ndarray, n: int) -> None:
        values = np.unique(score[truth])
        g = np.searchsorted(values, score)  # a negative lies below the g-th distinct score of a positive, or at it
        tied = np.zeros(len(score), dtype=bool)
        tied[g < len(values)] = values[g[g < len(values)]] == score[g < len(values)]
        self.distinct, self.ties = len(values), bool((tied & ~truth).any())
        place = np.where(truth, g, np.where(tied, 2 * len(values) + 1 + g, len(values) + g))
        height = (3 if self.ties else 2) * len(values) + 1
        ones = np.ones(len(rows), dtype=np.float32)
        self.matrix = csr_array((ones, (place, rows)), shape=(height, n))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        count, b = self.distinct, weights.shape[1]
        if not count:
            return np.full((2, b), np.nan)
        sums = self.matrix @ weights  # counts below 2^24: exact in float32
        positive, between = sums[:count], sums[count : 2 * count + 1]
        below = np.cumsum(between[:count], axis=0)  # [G, b] negatives below score g, without ties
        negatives = below[-1] + between[count]
        half = np.float32(0)
        if self.ties:
            tied = sums[2 * count + 1 :]
            below += np.cumsum(tied, axis=0) - tied
            negatives += tied.sum(axis=0)
            half = tied / 2
        positives = positive.sum(axis=0)
        pairs = np.einsum("gb,gb->b", positive, below + half, dtype=np.float64)
        found = np.cumsum(positive[::-1], axis=0)[::-1]
        below -= negatives  # minus the negatives at score g or above
        precision = np.divide(found, found - below, out=np.zeros_like(found), where=positive > 0)
        area = metrics.ratio(pairs, positives.astype(np.float64) * negatives)
        return np.stack([area, metrics.ratio(np.einsum("gb,gb->b", positive, precision, dtype=np.float64), positives)])


def _rankings(said: Said) -> list[_Ranking]:
    order, n = ev.scores(said.kind, said.z), len(said.z)
    if said.multilabel:
        known = [np.flatnonzero(~np.isnan(column)) for column in said.y.T]
        return [_Ranking(order[rows, c], said.y[rows, c] == 1, rows, n) for c, rows in enumerate(known)]
    classes = [said.positive] if said.kind == "binary" else range(said.z.shape[1])
    return [_Ranking(order[:, c], said.y == c, np.arange(n), n) for c in classes]


def _row_values(said: Said) -> dict[str, np.ndarray]:
    """What is a mean over rows (multi-label: a sum over a row's known labels)."""
    y, p = said.y, said.p
    logp = np.maximum(ev.log_probabilities(said.kind, said.z), np.log(metrics.EPS))
    if said.multilabel:
        known = ~np.isnan(y)
        other = np.maximum(-np.logaddexp(0, said.z), np.log(metrics.EPS))
        loss = np.where(known, -np.where(y == 1, logp, other), 0.0)
        return {"nll": loss.sum(axis=1), "brier": np.where(known, (p - y) ** 2, 0.0).sum(axis=1)}
    rows, called = np.arange(len(y)), said.called
    values = {"nll": -logp[rows, y], "accuracy": (called == y).astype(float)}
    if said.kind == "binary":
        return values | {"brier": (p[:, said.positive] - (y == said.positive)) ** 2}
    values["brier"] = ((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1)
    if p.shape[1] >= 20:
        values["top5"] = ((p >= p[rows, y][:, None]).sum(axis=1) <= 5).astype(float)
    if said.kind == "ordinal":
        distance = np.abs(called - y).astype(float)
        values |= {"mae": distance, "squared": distance**2}
    return values


def _counts(said: Said) -> csr_array:
    """[4 C, n]: of each class, rows that are it, that are called it, both, and that are known at all."""
    n, width = said.z.shape
    if said.multilabel:
        known = ~np.isnan(said.y)
        called = said.called & known
        masks = [said.y == 1, called, called & (said.y == 1), known]
        places = [np.nonzero(mask) for mask in masks]
    else:
        rows, called = np.arange(n), said.called
        hit = called == said.y
        places = [(rows, said.y), (rows, called), (rows[hit], said.y[hit])]
        every = np.repeat(rows, width), np.tile(np.arange(width), n)
        places.append(every if said.kind == "binary" else (rows[:0], rows[:0]))
    row = np.concatenate([kind * width + c for kind, (_, c) in enumerate(places)])
    column = np.concatenate([r for r, _ in places])
    return csr_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=(4 * width, n))


def _gaps(said: Said) -> csr_array:
    """[15, n], multi-label [15 L, n]: probability minus truth of each row, in the row of its bin.

    The bins are those of the whole sample: what is resampled is how far off each of them is.
    """
    n, p = len(said.z), said.p
    if not said.multilabel:
        sure, true = ev.sureness(said.kind, p, said.y, said.positive)
        place, rows, gaps = metrics.mass_bins(sure), np.arange(n), sure - true
        return csr_array((gaps.astype(np.float32), (place, rows)), shape=(metrics.BINS, n))
    known = [np.flatnonzero(~np.isnan(column)) for column in said.y.T]
    place = np.concatenate([c * metrics.BINS + metrics.mass_bins(p[rows, c]) for c, rows in enumerate(known)])
    gaps = np.concatenate([p[rows, c] - said.y[rows, c] for c, rows in enumerate(known)])
    shape = (metrics.BINS * len(known), n)
    return csr_array((gaps.astype(np.float32), (place, np.concatenate(known))), shape=shape)


def _of_counts(there: np.ndarray, called: np.ndarray, hit: np.ndarray, known: np.ndarray) -> Measured:
    """`metrics.binary_measures` from weights of rows that are positive, called so, both, and known; any shape."""
    right = known - there - called + hit
    return {
        "sensitivity": metrics.ratio(hit, there),
        "specificity": metrics.ratio(right, known - there),
        "ppv": metrics.ratio(hit, called),
        "npv": metrics.ratio(right, known - called),
        "f1": metrics.ratio(2 * hit, there + called),
        "accuracy": metrics.ratio(hit + right, known),
    }


def _of_classes(there: np.ndarray, called: np.ndarray, hit: np.ndarray, _: np.ndarray) -> Measured:
    """`metrics.per_class`, [C, b]."""
    return metrics.class_measures(hit, there, called, there.sum(axis=0))


def _kappa(squared: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Quadratic kappa [b] from the mean of (i - j)² and the marginals: with truth and call independent it would be
    E i² + E j² - 2 E i E j."""
    there, called = counts[0] / counts[0].sum(axis=0), counts[1] / counts[1].sum(axis=0)
    i = np.arange(len(there))[:, None]
    chance = (i**2 * (there + called)).sum(axis=0) - 2 * (i * there).sum(axis=0) * (i * called).sum(axis=0)
    return 1 - np.divide(squared, chance, out=np.full(len(squared), np.nan), where=chance > 1e-12)
