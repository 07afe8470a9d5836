"""Calibration: from logits to probabilities and predicted labels; temperature scaling, prior correction and decision
thresholds, fitted on val.

A head is often trained with priors that are not those of the data. Balanced batches show every class with probability
q_c = 1/C while train has prevalence p_c, so log p_c - log q_c is added to z_c; a multi-label head trained with
pos_weight w_c saw its positives w_c times, so log w_c is taken from z_c. Then z is divided by one temperature, that of
the smallest NLL on val. (Tried at 10 % prevalence: ECE 0.286 raw, 0.282 with temperature alone, 0.005 with both.)

Notation: N rows, C classes (or labels), logits z float64 [N, C]; y int [N], or float [N, C] with NaN for what is
unknown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

EPS = float(np.finfo(np.float64).eps)  # probabilities are kept this far from 0, as scikit-learn's log_loss does
EQUAL = 1e3  # a temperature of so many times the largest difference of two logits: no two probabilities differ by 0.1 %


def log_probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    """log p [N, C]: softmax over classes, or a sigmoid for each label."""
    if kind == "multilabel":
        return -np.logaddexp(0, -z)
    return z - functools.reduce(np.logaddexp, z.T)[:, None]  # logaddexp.reduce by rows: the same, slower


def probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    return np.exp(log_probabilities(kind, z))


def log_odds(kind: str, z: np.ndarray) -> np.ndarray:
    """Log-odds of each class against all others [N, C], which rankings (ROC, AP) are made of: the order of the
    probabilities, which does not run into 1.0. Only a row's largest class can be near 1, so only there is 1 - p summed
    from the others."""
    if kind == "multilabel":
        return z
    if z.shape[1] == 2:
        first = z[:, 0] - z[:, 1]
        return np.stack([first, -first]).T
    rows, top = np.arange(len(z)), z.argmax(axis=1)
    logp = log_probabilities(kind, z)
    rest = logp.copy()
    rest[rows, top] = -np.inf
    with np.errstate(divide="ignore"):  # log1p(-1) of the largest class, replaced in the next line
        odds = logp - np.log1p(-np.exp(logp))
    odds[rows, top] = logp[rows, top] - np.logaddexp.reduce(rest, axis=1)
    return odds


def predict_labels(kind: str, p: np.ndarray, thresholds: tuple[float, ...], positive: int | None) -> np.ndarray:
    """The predicted class of each row, int [N]; for multi-label bool [N, C]."""
    if kind == "multilabel":
        return p >= np.array(thresholds)
    if kind == "binary":
        assert positive is not None
        return np.where(p[:, positive] >= thresholds[0], positive, 1 - positive)
    return p.argmax(axis=1)


@dataclass(frozen=True)
class CalibratedPredictions:
    """Calibrated logits z of one head for N images, their labels y, and the thresholds that decide."""

    kind: str
    z: np.ndarray
    y: np.ndarray
    positive: int | None = None
    thresholds: tuple[float, ...] = ()

    @property
    def multilabel(self) -> bool:
        return self.kind == "multilabel"

    @cached_property
    def label_mask(self) -> np.ndarray:
        """bool, as y: all but unknown labels."""
        return ~np.isnan(self.y) if self.multilabel else np.ones(len(self.y), dtype=bool)

    @cached_property
    def log_p(self) -> np.ndarray:
        return log_probabilities(self.kind, self.z)

    @cached_property
    def p(self) -> np.ndarray:
        return np.exp(self.log_p)

    @cached_property
    def predicted_labels(self) -> np.ndarray:
        return predict_labels(self.kind, self.p, self.thresholds, self.positive)

    @cached_property
    def losses(self) -> np.ndarray:
        """Negative log-likelihood of each row [N]; for multi-label the sum over its known labels."""
        if not self.multilabel:
            return -np.maximum(self.log_p[np.arange(len(self.y)), self.y], np.log(EPS))
        loss = np.logaddexp(0, np.where(self.y == 1, -self.z, self.z))
        return np.where(self.label_mask, np.minimum(loss, -np.log(EPS)), 0.0).sum(axis=1)

    @cached_property
    def log_odds(self) -> np.ndarray:
        return log_odds(self.kind, self.z)

    def ranking(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of class c, or of label c over its known rows: score, whether it is the true one, row."""
        if not self.multilabel:
            return self.log_odds[:, c], self.y == c, np.arange(len(self.y))
        rows = np.flatnonzero(self.label_mask[:, c])
        return self.log_odds[rows, c], self.y[rows, c] == 1, rows

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood: per row, for multi-label per known label."""
        return float(self.losses.sum() / np.count_nonzero(self.label_mask))

    @property
    def squared_errors(self) -> np.ndarray:
        """Brier score of each row [N]: summed over classes or known labels, of two classes that of the positive."""
        if self.multilabel:
            return np.where(self.label_mask, (self.p - self.y) ** 2, 0.0).sum(axis=1)
        if self.kind == "binary":
            return (self.p[:, self.positive] - (self.y == self.positive)) ** 2
        return ((self.p - np.eye(self.p.shape[1])[self.y]) ** 2).sum(axis=1)

    @cached_property
    def top5(self) -> np.ndarray:
        """bool [N]: whether the true class is among the five most probable; a tie counts against it, so that equal
        probabilities for all are no success."""
        return (self.p >= self.p[np.arange(len(self.y)), self.y][:, None]).sum(axis=1) <= 5

    def confusion(self) -> np.ndarray:
        """Confusion matrix [C, C]; for multi-label one of absent and present for each label, [C, 2, 2]."""
        width = self.z.shape[1]
        if not self.multilabel:
            counts = np.bincount(self.y * width + self.predicted_labels, minlength=width**2)
            return counts.reshape(width, width).astype(float)
        rows, label = np.nonzero(self.label_mask)
        cell = 4 * label + 2 * (self.y[rows, label] == 1) + self.predicted_labels[rows, label]
        return np.bincount(cell, minlength=4 * width).reshape(width, 2, 2).astype(float)


@dataclass(frozen=True)
class Calibration:
    """What turns raw logits into probabilities and predicted labels: chosen on val, kept with the run.

    ``thresholds``: of the positive class (binary, one) or of each label (multi-label); () where the largest
    probability decides."""

    correction: tuple[float, ...]
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[N, C] raw logits -> float64 calibrated logits."""
        return (np.asarray(logits, dtype=np.float64) + np.array(self.correction)) / self.temperature

    def predictions(self, kind: str, logits: np.ndarray, y: np.ndarray, positive: int | None) -> CalibratedPredictions:
        return CalibratedPredictions(kind, self(logits), y, positive, self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        return cls(tuple(data["correction"]), data["temperature"], tuple(data["thresholds"]))


def calibrate(
    kind: str, logits: np.ndarray, y: np.ndarray, prior: np.ndarray, positive: int | None, sensitivity: float | None
) -> tuple[Calibration, str | None]:
    """Calibration by val, and a sentence where NLL on val has no smallest value. ``prior`` [C]: its correction."""
    z = np.asarray(logits, dtype=np.float64) + prior
    t, note = temperature(kind, z, y)
    cuts = thresholds(kind, probabilities(kind, z / t), y, positive, sensitivity)
    return Calibration(tuple(prior.tolist()), t, cuts), note


def prior_correction(train: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """log(train / seen) [C]; 0 for a class that train does not have."""
    there = (train > 0) & (seen > 0)
    return np.log(np.where(there, train, 1.0) / np.where(there, seen, 1.0))


def temperature(kind: str, z: np.ndarray, y: np.ndarray) -> tuple[float, str | None]:
    """The temperature T of the smallest NLL on val; where there is none, the T that is taken and a sentence about it.

    With b = 1/T and d_c = z_c - z_y (a label is a choice between 0 and z), NLL(b) = mean log sum_c exp(b d_c) is convex
    with the slope mean sum_c p_c d_c. It has a minimum where it falls at first, from b = 0 with equal p, and rises at
    last, which it does if some d_c is above 0. That place scales with 1 / d: logits of several hundred have T = 50."""
    d = _margins(kind, z, y)
    size = float(np.abs(d).max(initial=0.0)) or 1.0

    def slope(log_b: float) -> float:
        return float((probabilities("multiclass", np.exp(log_b) * d) * d).sum(axis=1).mean())

    low = high = -np.log(EQUAL * size)
    if not len(d) or slope(low) >= 0:
        why = "on val its probabilities are no better than equal ones (NLL falls as T grows)"
        return EQUAL * size, f"{why}: T is so large that they are nearly equal"
    if d.max() <= 0:
        return 1.0, "val is separated without error (NLL falls for ever as T goes to 0): T stays 1"
    while slope(high) <= 0:
        high += 1
    return float(np.exp(-_zero(slope, low, high))), None


def _zero(slope: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses 0 between ``low`` and ``high``, to 1e-10: regula falsi by the Illinois rule
    (Dowell & Jarratt 1971). By hand: scipy.optimize takes longer to import than a head to calibrate."""
    last, other = (high, slope(high)), (low, slope(low))
    while abs(last[0] - other[0]) > 1e-10:
        (x1, y1), (x0, y0) = last, other
        x = (x0 * y1 - x1 * y0) / (y1 - y0)
        y = slope(x)
        if y == 0:
            return x
        last, other = (x, y), last if y * y1 < 0 else (x0, y0 / 2)
    return last[0]


def _margins(kind: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logits minus that of the truth [N, C]; of labels [known entries, 2]."""
    if kind != "multilabel":
        return z - z[np.arange(len(y)), y][:, None]
    known = ~np.isnan(y)
    wrong = np.where(y == 1, -z, z)[known]
    return np.stack([np.zeros_like(wrong), wrong], axis=1)


def thresholds(
    kind: str, p: np.ndarray, y: np.ndarray, positive: int | None, sensitivity: float | None = None
) -> tuple[float, ...]:
    """On val, for the positive class, or for each label over its known entries: Youden's, or the highest that reaches
    the wanted ``sensitivity`` (above 0, at most 1)."""
    threshold = functools.partial(sensitivity_threshold, wanted=sensitivity) if sensitivity else youden_threshold
    if kind == "binary":
        return (threshold(p[:, positive], y == positive),)
    if kind == "multilabel":
        return tuple(threshold(p[rows, c], y[rows, c] == 1) for c, rows in enumerate(~np.isnan(y).T))
    assert sensitivity is None, "of several classes the most probable is predicted: there is no threshold"
    return ()


def counts_at(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each value of a score [n] as the threshold, from the highest: the value, true positives and false positives.
    scikit-learn's roc_curve and precision_recall_curve in counts; its import takes longer than a linear head is
    trained."""
    order = np.argsort(-score, kind="stable")
    falling = score[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))  # of equal ones
    hits = np.cumsum(truth[order])[last]
    return falling[last], hits, last + 1 - hits


def youden_threshold(probability: np.ndarray, truth: np.ndarray) -> float:
    """Where sensitivity + specificity - 1 is largest: halfway between two neighbouring probabilities; of equally
    good ones the nearest to 0.5. 0.5 where one class is missing."""
    if truth.all() or not truth.any():
        return 0.5
    values, hits, alarms = counts_at(probability, truth)
    youden = hits / hits[-1] - alarms / alarms[-1]
    best = youden >= youden.max() - 1e-12
    value, below = values[best], np.append(values[1:], 0.0)[best]
    middle = np.clip((value + below) / 2, np.nextafter(below, 1), value)
    return float(middle[np.argmin(np.abs(middle - 0.5))])


def sensitivity_threshold(probability: np.ndarray, truth: np.ndarray, wanted: float) -> float:
    """The highest threshold that finds at least ``wanted`` of the positives, so that as few others as possible are
    predicted so: halfway down to the next probability. 0.5 where there is no positive."""
    if not truth.any():
        return 0.5
    positives = np.sort(probability[truth])[::-1]
    # of P positives ceil(wanted P) must be found; 0.9 * 10 is 9.000000000000002 only to a computer
    last = positives[int(np.ceil(wanted * len(positives) - 1e-9)) - 1]
    below = probability[probability < last].max(initial=0.0)
    return float(np.clip((last + below) / 2, np.nextafter(below, 1), last))
