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
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

EPS = float(np.finfo(np.float64).eps)  # probabilities are kept this far from 0, as scikit-learn's log_loss does
BINS = 15  # of the calibration error and of a reliability diagram
TEMPERATURES = (0.05, 20.0)  # no val split says anything believable beyond


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


def confidence(predictions: CalibratedPredictions) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities that are judged by what came true, and that: of the positive class; of several classes of the
    most probable one, which is true or not (Guo et al. 2017); of labels all that are known, label by label."""
    p, y = predictions.p, predictions.y
    if predictions.multilabel:
        return p.T[predictions.label_mask.T], y.T[predictions.label_mask.T].astype(float)
    if predictions.kind == "binary":
        return p[:, predictions.positive], (y == predictions.positive).astype(float)
    return p.max(axis=1), (p.argmax(axis=1) == y).astype(float)


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
    """Calibration by val, and a sentence where val could not set the temperature. ``prior`` [C]: its correction."""
    z = np.asarray(logits, dtype=np.float64) + prior
    t = temperature(kind, z, y)
    undecided = "no temperature has a smallest NLL on val (it is separated without error, or not at all): 1 is kept"
    cuts = thresholds(kind, probabilities(kind, z / (t or 1.0)), y, positive, sensitivity)
    return Calibration(tuple(prior.tolist()), t or 1.0, cuts), None if t else undecided


def prior_correction(train: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """log(train / seen) [C]; 0 for a class that train does not have."""
    there = (train > 0) & (seen > 0)
    return np.log(np.where(there, train, 1.0) / np.where(there, seen, 1.0))


def temperature(kind: str, z: np.ndarray, y: np.ndarray) -> float | None:
    """The temperature of the smallest NLL on val, or None where there is none within ``TEMPERATURES``.

    With b = 1/T, NLL(b) is convex and its derivative is the mean of sum_c p_c z_c - z_y (multi-label: (p - y) z over
    known entries): bisection on log b. There is none if val is separated without error (NLL falls for ever)."""

    def slope(b: float) -> float:
        p = probabilities(kind, b * z)
        if kind == "multilabel":
            return float(((p - y) * z)[~np.isnan(y)].mean())
        return float(((p * z).sum(1) - z[np.arange(len(y)), y]).mean())

    low, high = np.log(1 / TEMPERATURES[1]), np.log(1 / TEMPERATURES[0])
    if slope(np.exp(low)) >= 0 or slope(np.exp(high)) <= 0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


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


def youden_threshold(probability: np.ndarray, truth: np.ndarray) -> float:
    """Where sensitivity + specificity - 1 is largest: halfway between two neighbouring probabilities; of equally
    good ones the nearest to 0.5. 0.5 where one class is missing."""
    from sklearn.metrics import roc_curve

    if truth.all() or not truth.any():
        return 0.5
    curve = roc_curve(truth, probability, drop_intermediate=False)
    false_rate, true_rate, values = (column[1:] for column in curve)  # without "none is positive"
    youden = true_rate - false_rate
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


def mass_bins(probability: np.ndarray) -> np.ndarray:
    """int [N]: bins of equal numbers of rows, by increasing probability; equal probabilities share a bin, so that no
    order of the rows matters."""
    order, rank = np.argsort(probability), np.empty(len(probability))
    ordered = probability[order]
    rank[order] = (ordered.searchsorted(ordered) + ordered.searchsorted(ordered, "right")) / 2  # from 1/2 to N - 1/2
    return np.minimum((rank * BINS / max(len(probability), 1)).astype(np.int64), BINS - 1)


def reliability(probability: np.ndarray, truth: np.ndarray) -> list[dict[str, float]]:
    """Reliability diagram: of the bins that hold rows the mean probability ``p``, ``share`` of positives, ``n``."""
    bins = mass_bins(probability)
    count = np.bincount(bins, minlength=BINS)
    there = np.flatnonzero(count)
    p, share = (np.bincount(bins, column, minlength=BINS)[there] / count[there] for column in (probability, truth))
    rows = zip(p.tolist(), share.tolist(), count[there].tolist(), strict=True)
    return [{"p": p, "share": share, "n": n} for p, share, n in rows]
