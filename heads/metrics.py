"""The measures, each a few lines of numpy. Undefined ones are NaN (in JSON null), never 0 or 1 by default.

Notation: n rows, C classes. ``score`` [n] is anything that grows with the probability; ``truth`` [n] is boolean. A
confusion matrix [C, C] counts rows of class i that were called j, in row i and column j; it may hold fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

EPS = float(np.finfo(np.float64).eps)  # probabilities are kept this far from 0, as scikit-learn's log_loss does


@dataclass(frozen=True)
class Metric:
    title: str
    higher: bool = True


METRICS: dict[str, Metric] = {
    "auroc": Metric("AUROC"),
    "ap": Metric("AP"),
    "accuracy": Metric("accuracy"),
    "top5": Metric("top-5 accuracy"),
    "balanced_accuracy": Metric("balanced acc."),
    "macro_f1": Metric("macro F1"),
    "quadratic_kappa": Metric("quadratic kappa"),
    "mae": Metric("MAE (classes)", higher=False),
    "sensitivity": Metric("sensitivity"),
    "specificity": Metric("specificity"),
    "ppv": Metric("PPV"),
    "npv": Metric("NPV"),
    "f1": Metric("F1"),
    "nll": Metric("NLL", higher=False),
    "brier": Metric("Brier", higher=False),
    "ece": Metric("ECE", higher=False),
}
BINS = 15  # of the calibration error and of a reliability plot


def named_by(select: str) -> str:
    """What ``--select`` is called among the measures of a run."""
    return "nll" if select == "loss" else select


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def macro(values: np.ndarray) -> float:
    """Mean over the defined ones; NaN if there is none."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if len(defined) else float("nan")


def auroc(score: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    scikit-learn's number at a twentieth of its time: it is asked for every class after every epoch of every head.
    """
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # average rank of tied scores
    total = rank[place.reshape(-1)][truth].sum()
    return float((total - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Sum over thresholds of (recall - recall before) · precision, tied scores as one threshold: scikit-learn's number
    at a tenth of its time; it is asked for every class of every head of a sweep."""
    if not truth.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(truth[order])
    last = np.append(np.diff(score[order]) != 0, True)  # of each group of ties
    hits, called = found[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / called).sum() / found[-1])


def roc_curve(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False and true positive rates from (0, 0) to (1, 1), and the least score called positive at each point.

    Both classes have to be there.
    """
    from sklearn import metrics

    rates: tuple[np.ndarray, np.ndarray, np.ndarray] = metrics.roc_curve(truth, score, drop_intermediate=False)
    return rates


def youden_threshold(probability: np.ndarray, truth: np.ndarray) -> float:
    """Where sensitivity + specificity - 1 is largest: halfway between two neighbouring probabilities; of equally
    good ones the nearest to 0.5. 0.5 where one class is missing."""
    if truth.all() or not truth.any():
        return 0.5
    false, found, values = (column[1:] for column in roc_curve(probability, truth))  # without "none is positive"
    youden = found - false
    below = np.append(values[1:], 0.0)
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    middle = np.clip((values[best] + below[best]) / 2, np.nextafter(below[best], 1), values[best])
    return float(middle[np.argmin(np.abs(middle - 0.5))])


def sensitivity_threshold(probability: np.ndarray, truth: np.ndarray, wanted: float) -> float:
    """The highest threshold that finds at least ``wanted`` of the positives, so that as few others as possible are
    called: halfway down to the next probability. 0.5 where there is no positive."""
    if not truth.any():
        return 0.5
    found = np.sort(probability[truth])[::-1]
    # of P positives ceil(wanted P) must be found; 0.9 * 10 is 9.000000000000002 only to a computer
    last = found[int(np.ceil(wanted * len(found) - 1e-9)) - 1]
    below = probability[probability < last].max(initial=0.0)
    return float(np.clip((last + below) / 2, np.nextafter(below, 1), last))


def mass_bins(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """int [n]: bins of equal numbers of rows, by increasing probability; equal probabilities share a bin, so that no
    order of the rows matters."""
    from scipy.stats import rankdata

    rank = rankdata(probability) - 0.5
    return np.minimum((rank * bins / max(len(probability), 1)).astype(np.int64), bins - 1)


def calibration_error(probability: np.ndarray, truth: np.ndarray) -> float:
    """ECE: the mean over rows of |mean probability - share of positives| in the row's bin (Naeini, Cooper & Hauskrecht
    2015), with bins of equal mass (Nixon et al. 2019, section 4). Biased upwards: also a perfect model has one above 0.
    """
    if not len(probability):
        return float("nan")
    gaps = np.bincount(mass_bins(probability), probability - truth, minlength=BINS)
    return float(np.abs(gaps).sum() / len(probability))


def reliability(probability: np.ndarray, truth: np.ndarray) -> list[dict[str, float]]:
    """The bins of `calibration_error` that hold rows: mean probability ``p``, ``share`` of positives, ``n``."""
    bins = mass_bins(probability)
    count = np.bincount(bins, minlength=BINS)
    there = np.flatnonzero(count)
    p = np.bincount(bins, probability, minlength=BINS)[there] / count[there]
    share = np.bincount(bins, truth, minlength=BINS)[there] / count[there]
    return [
        {"p": a, "share": b, "n": n} for a, b, n in zip(p.tolist(), share.tolist(), count[there].tolist(), strict=True)
    ]


def predictive_values(sensitivity: Any, specificity: Any, prevalence: float) -> tuple[Any, Any]:
    """PPV and NPV where ``prevalence`` of the images are positive (Bayes), numbers or arrays; NaN where nothing would
    be called so."""
    found, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    cleared, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(found, found + false), np.divide(cleared, cleared + missed)


def confusion_matrix(truth: np.ndarray, called: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] counts from two int arrays [n]."""
    return np.bincount(truth * classes + called, minlength=classes * classes).reshape(classes, classes).astype(float)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall, specificity and F1 of each class [C]. Precision of a class never called is 0 if it exists;
    all NaN for a class that is neither there nor called."""
    return class_measures(np.diag(confusion), confusion.sum(1), confusion.sum(0), confusion.sum())


def class_measures(hit: np.ndarray, there: np.ndarray, called: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    """`per_class` from the counts of each class [C, ...]: found, there are, called so; and of all rows [...]."""
    precision = ratio(hit, called)
    precision[(called == 0) & (there > 0)] = 0.0
    return {
        "precision": precision,
        "recall": ratio(hit, there),
        "specificity": ratio(total - there - called + hit, total - there),
        "f1": ratio(2 * hit, there + called),
    }


def binary_measures(confusion: np.ndarray, positive: int) -> dict[str, float]:
    """From a [2, 2] matrix; PPV and NPV are NaN where nothing was called so."""
    other = 1 - positive
    tp, fn = confusion[positive, positive], confusion[positive, other]
    fp, tn = confusion[other, positive], confusion[other, other]
    parts = {
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "ppv": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "f1": (2 * tp, 2 * tp + fp + fn),
        "accuracy": (tp + tn, confusion.sum()),
    }
    return {name: float(part / whole) if whole > 0 else float("nan") for name, (part, whole) in parts.items()}


def quadratic_kappa(confusion: np.ndarray) -> float:
    """Cohen's kappa with weights (i - j)²; NaN where truth and calls are all of one and the same class."""
    distance = np.subtract.outer(np.arange(len(confusion)), np.arange(len(confusion))) ** 2
    expected = np.outer(confusion.sum(1), confusion.sum(0)) / max(confusion.sum(), 1e-300)
    worst = (distance * expected).sum()
    return float(1 - (distance * confusion).sum() / worst) if worst > 0 else float("nan")


def class_distance(confusion: np.ndarray) -> float:
    """Mean absolute error, in classes."""
    distance = np.abs(np.subtract.outer(np.arange(len(confusion)), np.arange(len(confusion))))
    return float((distance * confusion).sum() / confusion.sum())
