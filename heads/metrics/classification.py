"""Classification measures (AUROC, AP, accuracy, sensitivity, Brier, ECE, …) of one head, also under sample weights.

A bootstrap resample is a weight for each row: how often it was drawn. What does not depend on weights is prepared once:
counts become products with a sparse matrix, a ranking becomes segments between distinct scores. Of one class, whose
positives have G distinct scores, with p_g the weight of positives at score g, t_g that of negatives at the same score,
and u_g that of negatives strictly below it,

    AUROC = sum_g p_g (u_g + t_g / 2) / (P N),     AP = sum_g p_g / P · (p_>=g / (p_>=g + n_>=g)).

Without weights the same sums are taken over the sorted rows: scikit-learn's numbers at a fraction of its time, as they
are asked for every class of every head of a sweep, and AUROC after every epoch.

A measure that is undefined (a class is missing, nothing was predicted positive) is NaN, in JSON null, never 0 or 1 by
default. A mean over classes or labels is over those that are defined with all weights 1, and NaN where one of these is
not: another set of classes would be another measure.

Notation: as in `heads.metrics.calibration`, R weightings. A confusion matrix counts rows of true class i that were
predicted as j in row i and column j.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.reliability import MOST_BINS, Confidence
from heads.settings import METRICS

Values = dict[str, np.ndarray]  # measure -> [R], or of every class [C, R]


COMPARED = {  # measures of test in a comparison table
    "binary": ("auroc", "sensitivity", "specificity", "accuracy"),
    "multiclass": ("auroc", "accuracy", "macro_f1"),
    "ordinal": ("quadratic_kappa", "mae", "accuracy"),
    "multilabel": ("auroc", "ap", "f1"),
}
MACRO = {"macro_precision": "precision", "macro_recall": "recall", "macro_f1": "f1"}  # of classes that exclude others
UNTRAINED = "The weights are untrained (random): these numbers show that the tool works, not what a backbone can do."


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def macro(values: Sequence[float] | np.ndarray) -> float:
    """Macro average: the mean over the defined ones; NaN if there is none."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if len(defined) else float("nan")


def predictive_values(sensitivity: Any, specificity: Any, prevalence: float) -> dict[str, Any]:
    """PPV and NPV where ``prevalence`` of the images are positive (Bayes), numbers or arrays; NaN where nothing would
    be predicted so."""
    hits, false_alarms = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    cleared, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"ppv": np.divide(hits, hits + false_alarms), "npv": np.divide(cleared, cleared + missed)}


class WeightedSums:
    """Sums of ``values`` [M] by ``place`` [M] in 0 … P-1, each times the weight of its row (``rows`` [M]): [P, R].

    Of weights a product with a sparse matrix, made when it is first needed; without them a bincount in float64."""

    def __init__(self, place: np.ndarray, rows: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
        self.place, self.rows, self.values, self.shape = place, rows, values, shape

    def __call__(self, weights: np.ndarray | None) -> np.ndarray:
        if weights is None:
            return np.bincount(self.place, self.values, minlength=self.shape[0])[:, None]
        return self._matrix @ weights

    @cached_property
    def _matrix(self) -> Any:
        from scipy.sparse import csr_array

        return csr_array((self.values.astype(np.float32), (self.place, self.rows)), shape=self.shape)


class Ranking:
    """AUROC and average precision of one class; ``rows``: which of the N rows the M scores are of."""

    def __init__(self, score: np.ndarray, truth: np.ndarray, rows: np.ndarray, n: int) -> None:
        self.score, self.truth, self.rows, self.n = score, truth, rows, n

    def __call__(self, weights: np.ndarray | None) -> np.ndarray:
        """[2, R]"""
        if weights is None:
            return np.array([[auroc(self.score, self.truth)], [average_precision(self.score, self.truth)]])
        count, ties, sums = self._sums
        segment, tied = sums(weights), np.float32(0)  # counts below 2^24: exact in float32
        positive, below = segment[:count], np.cumsum(segment[count : 2 * count + 1], axis=0)  # [G, R], [G + 1, R]
        negatives, below = below[-1], below[:-1]
        if ties:
            tied = segment[2 * count + 1 :]
            below += np.cumsum(tied, axis=0) - tied
            negatives = negatives + tied.sum(axis=0)
        pairs = np.einsum("gr,gr->r", positive, below + tied / 2, dtype=np.float64)
        area = ratio(pairs, positive.sum(axis=0, dtype=np.float64) * negatives)
        above = np.cumsum(positive[::-1], axis=0)[::-1]  # positives at score g or above
        below -= negatives  # minus the negatives at score g or above
        precision = np.divide(above, above - below, out=np.zeros_like(above), where=positive > 0)
        recalled = np.einsum("gr,gr->r", positive, precision, dtype=np.float64)
        return np.stack([area, ratio(recalled, positive.sum(axis=0))])

    @cached_property
    def _sums(self) -> tuple[int, bool, WeightedSums]:
        """G, whether a negative ties with a positive, and the sums of positives at each of G distinct scores, negatives
        in the G + 1 gaps between these, negatives tied with each."""
        values = np.unique(self.score[self.truth])
        count = len(values)
        g = np.searchsorted(values, self.score)
        tied = np.append(values, np.nan)[g] == self.score
        ties = bool((tied & ~self.truth).any())
        place = np.where(self.truth, g, np.where(tied, 2 * count + 1 + g, count + g))
        shape = ((3 if ties else 2) * count + 1, self.n)
        return count, ties, WeightedSums(place, self.rows, np.ones(len(self.rows)), shape)


def auroc(score: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    positives, negatives = np.sort(score[truth]), np.sort(score[~truth])
    pairs = len(positives) * len(negatives)
    below, upto = (negatives.searchsorted(positives, side).sum() for side in ("left", "right"))
    return float(below + upto) / (2 * pairs) if pairs else float("nan")


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """The mean over positives of the precision among all that score as high or higher."""
    positives, everything = np.sort(score[truth]), np.sort(score)
    hits, predicted = (len(ordered) - ordered.searchsorted(positives) for ordered in (positives, everything))
    return float((hits / predicted).sum() / len(positives)) if len(positives) else float("nan")


def mean_auroc(predictions: CalibratedPredictions) -> float:
    """AUROC alone, which chooses an epoch: of the positive class, or the mean over classes or labels."""
    if predictions.positive is not None:
        return auroc(*predictions.ranking(predictions.positive)[:2])
    return macro([auroc(*predictions.ranking(c)[:2]) for c in range(predictions.z.shape[1])])


class WeightedMeasures:
    """All measures of one head's predictions, prepared; called with weights [N, R] it gives them under each weighting.

    ``value``: the same with all weights 1. ``confusion`` replaces that of the predictions in it."""

    def __init__(self, predictions: CalibratedPredictions, confusion: np.ndarray | None = None) -> None:
        self.predictions = predictions
        n, self.width = predictions.z.shape
        self.rankings = [Ranking(*predictions.ranking(c), n) for c in range(self.width)]
        self._row_values = {"nll": predictions.losses, "brier": predictions.squared_errors}
        if self.width >= 20 and not predictions.multilabel:
            self._row_values["top5"] = predictions.top5.astype(float)
        if predictions.kind == "ordinal":
            self._row_values["mae"] = np.abs(predictions.predicted_labels - predictions.y).astype(float)
        self._defined: dict[str, np.ndarray] = {}
        self.confusion = predictions.confusion() if confusion is None else confusion
        self.counts = counts_of(self.confusion)
        self.value = self._measure(None, self.counts)

    def __call__(self, weights: np.ndarray) -> tuple[Values, Values]:
        """(measures [R], measures of every class [C, R]); weights float32 [N, R], whole numbers."""
        counts = self._counts(weights).astype(np.float64).reshape(-1, self.width, weights.shape[1])
        if not self.predictions.multilabel:
            total = np.broadcast_to(weights.sum(axis=0, dtype=np.float64), counts.shape[1:])
            counts = np.concatenate([counts, total[None]])
        return self._measure(weights, counts)

    def _measure(self, weights: np.ndarray | None, counts: np.ndarray) -> tuple[Values, Values]:
        """``counts``: [4, C, R], as `counts_of` has them."""
        kind, positive, rates = self.predictions.kind, self.predictions.positive, rates_of(*counts)
        only = slice(None) if weights is None or positive is None else slice(positive, positive + 1)  # what costs most
        areas = np.array([ranking(weights) for ranking in self.rankings[only]])  # [C or 1, 2, R]
        ranks = {"auroc": areas[:, 0], "ap": areas[:, 1]}
        if kind == "multilabel":
            of_class, total = ranks | rates, counts[3].sum(axis=0)
            overall = {name: self._macro(name, values) for name, values in of_class.items()}
        elif kind == "binary":
            of_class, total = class_rates(counts, rates) | ({} if weights is not None else ranks), counts[3, 0]
            overall = {name: values[positive if weights is None else 0] for name, values in ranks.items()}
            overall |= {name: values[positive] for name, values in rates.items()}
            overall |= {name: self._macro(name, of_class[column]) for name, column in MACRO.items()}
        else:
            of_class, total = class_rates(counts, rates) | ranks, counts[3, 0]
            overall = {"accuracy": ratio(counts[2].sum(axis=0), total)}
            columns = {"auroc": "auroc", "ap": "ap", "balanced_accuracy": "recall", **MACRO}
            overall |= {name: self._macro(name, of_class[column]) for name, column in columns.items()}
        overall |= {name: ratio(_product(column, weights), total) for name, column in self._row_values.items()}
        if kind == "ordinal":
            overall["quadratic_kappa"] = _kappa(_product(self._row_values["mae"] ** 2, weights), counts)
        gaps = np.abs(self._gaps(weights).astype(np.float64)).reshape(-1, MOST_BINS, counts.shape[2]).sum(axis=1)
        return overall | {"ece": self._macro("ece", ratio(gaps, counts[3][: len(gaps)]))}, of_class

    def _macro(self, name: str, values: np.ndarray) -> np.ndarray:
        """[C, R] -> [R], over the classes that are defined with all weights 1, which is the first call."""
        defined = self._defined.setdefault(name, ~np.isnan(values[:, 0]))
        return values[defined].mean(axis=0) if defined.any() else np.full(values.shape[1], np.nan)

    @cached_property
    def _counts(self) -> WeightedSums:
        """[3 C, N], of labels [4 C, N]: what `counts_of` counts."""
        y, predicted, n = self.predictions.y, self.predictions.predicted_labels, len(self.predictions.y)
        if self.predictions.multilabel:
            label_mask = self.predictions.label_mask
            pairs = [np.nonzero(mask) for mask in (y == 1, predicted & label_mask, predicted & (y == 1), label_mask)]
        else:
            rows, hit = np.arange(n), predicted == y
            pairs = [(rows, y), (rows, predicted), (rows[hit], y[hit])]
        place = np.concatenate([what * self.width + c for what, (_, c) in enumerate(pairs)])
        rows = np.concatenate([rows for rows, _ in pairs])
        return WeightedSums(place, rows, np.ones(len(rows)), (len(pairs) * self.width, n))

    @cached_property
    def _gaps(self) -> WeightedSums:
        """[15, N], for multi-label [15 C, N]: probability minus truth of each row, in the row of its bin. The ECE is
        their absolute sum (`heads.metrics.reliability`).

        The bins are those of the whole sample: what is resampled is how far off each of them is. Biased upwards: also a
        perfect model has an ECE above 0."""
        judged = Confidence.of(self.predictions)
        shape = (judged.labels * MOST_BINS, len(self.predictions.y))
        return WeightedSums(judged.bin, judged.row, judged.p - judged.truth, shape)


def _product(column: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """sum_i column_i W_i [R] in float64."""
    return column.sum(keepdims=True) if weights is None else np.einsum("n,nr->r", column, weights, dtype=np.float64)


def counts_of(confusion: np.ndarray) -> np.ndarray:
    """[4, C, 1]: of each class or label, rows that are it, that are predicted so, both, and that are known at all."""
    if confusion.ndim == 3:
        there, predicted = confusion[:, 1].sum(axis=1), confusion[:, :, 1].sum(axis=1)
        return np.stack([there, predicted, confusion[:, 1, 1], confusion.sum(axis=(1, 2))])[..., None]
    total = np.full(len(confusion), confusion.sum())
    return np.stack([confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion), total])[..., None]


def rates_of(there: np.ndarray, predicted: np.ndarray, hit: np.ndarray, total: np.ndarray) -> Values:
    """Sensitivity, specificity, predictive values, F1, accuracy of each class against all others [C, R]."""
    right = total - there - predicted + hit
    parts = np.stack([hit, right, hit, right, 2 * hit, hit + right])
    wholes = np.stack([there, total - there, predicted, total - predicted, there + predicted, total])
    names = ("sensitivity", "specificity", "ppv", "npv", "f1", "accuracy")
    return dict(zip(names, ratio(parts, wholes), strict=True))


def class_rates(counts: np.ndarray, rates: Values) -> Values:
    """As they are called of one class among several. Precision of a class never predicted is 0 if it exists; all are
    NaN for a class that is neither there nor predicted."""
    precision = np.where((counts[1] == 0) & (counts[0] > 0), 0.0, rates["ppv"])
    return {"precision": precision, "recall": rates["sensitivity"]} | {m: rates[m] for m in ("specificity", "f1")}


def _kappa(squared: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa with weights (i - j)² [R], from their sum and the marginals: were truth and prediction independent,
    E (i - j)² would be E i² + E j² - 2 E i E j. Whole numbers are exact up to the division; NaN where truth and
    predictions are all of one and the same class."""
    there, predicted, _, total = counts
    i = np.arange(len(there))[:, None]
    chance = total[0] * (i**2 * (there + predicted)).sum(axis=0)
    chance -= 2 * (i * there).sum(axis=0) * (i * predicted).sum(axis=0)
    return 1 - ratio(squared * total[0], chance)


def evaluate(
    predictions: CalibratedPredictions, classes: Sequence[str], confusion: np.ndarray | None = None
) -> dict[str, Any]:
    """All measures of the task as plain numbers: ``n``, the measures by name, ``per_class``, and ``confusion``.

    ``confusion`` replaces that of the predictions: a guess predicts every class equally often, which no prediction of
    single rows can show."""
    measures = WeightedMeasures(predictions, confusion)
    overall, of_class = measures.value
    there, _, _, total = np.rint(measures.counts[:, :, 0]).astype(int).tolist()
    columns: dict[str, list[Any]] = {name: values[:, 0].tolist() for name, values in of_class.items()}
    confusion_record = {"confusion": measures.confusion.tolist()}
    if predictions.multilabel:
        columns = {"n_known": total, "n_positive": there} | columns | confusion_record
    else:
        columns |= {"n": there}
    result: dict[str, Any] = {"n": len(predictions.y)}
    result |= {name: float(overall[name][0]) for name in METRICS if name in overall}
    result["per_class"] = {name: {m: column[c] for m, column in columns.items()} for c, name in enumerate(classes)}
    return result if predictions.multilabel else result | confusion_record
