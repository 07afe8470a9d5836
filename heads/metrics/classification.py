"""Every measure once, under weights; weights of one give the value.

From logits to calibrated probabilities, calls and measures.

Notation: n rows, C classes (or labels), z logits float64 [n, C].

Calibration of a head trained with priors that are not those of the data. Balanced batches show every class with
probability q_c = 1/C while train has prevalence p_c, so log p_c - log q_c is added to z_c; a multi-label head trained
with pos_weight w_c saw its positives w_c times, so log w_c is taken from z_c. Then z is divided by one temperature,
that of the smallest NLL on val. (Tried at 10 % prevalence: ECE 0.286 raw, 0.282 with temperature alone,
0.005 with both.)

The measures of `heads.evaluate` under many weightings of the rows at once: what a bootstrap of R resamples needs.

A resample is a weight for each row (how often it was drawn). Everything that does not depend on weights is prepared
once: counts and sums become products with a sparse matrix, and a ranking becomes segments between distinct scores.

Ranking, of one class: its positives have G distinct scores. With p_g the weight of positives at score g, t_g that of
negatives at the same score, and u_g that of negatives strictly below it,

    AUROC = sum_g p_g (u_g + t_g / 2) / (P N),     AP = sum_g p_g / P · (p_>=g / (p_>=g + n_>=g)).

A measure that is not defined in a resample (a class is missing, nothing was called positive) is NaN there. A mean over
classes or labels is over those that are defined with all weights 1, and NaN where one of these is not: another set of
classes would be another measure.

Notation: n rows, C classes (or labels), b resamples, W weights float32 [n, b], whole numbers.

The measures, each a few lines of numpy. Undefined ones are NaN (in JSON null), never 0 or 1 by default.

Notation: n rows, C classes. ``score`` [n] is anything that grows with the probability; ``truth`` [n] is boolean. A
confusion matrix [C, C] counts rows of class i that were called j, in row i and column j; it may hold fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

UNTRAINED = "The weights are untrained (random): these numbers show that the tool works, not what a backbone can do."
COMPARED = {  # measures of test in a comparison table
    "binary": ("auroc", "sensitivity", "specificity", "accuracy"),
    "multiclass": ("auroc", "accuracy", "macro_f1"),
    "ordinal": ("quadratic_kappa", "mae", "accuracy"),
    "multilabel": ("auroc", "ap", "f1"),
}


def title(measure: str, task: str) -> str:
    macro = "macro " if measure in ("auroc", "ap") and task != "binary" else ""
    return macro + (METRICS[measure].title if measure in METRICS else measure.upper())


TEMPERATURES = (0.05, 20.0)  # no val split says anything believable beyond


def log_probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    """log p [n, C]: softmax over classes, or a sigmoid for each label."""
    if kind == "multilabel":
        return -np.logaddexp(0, -z)
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    return np.exp(log_probabilities(kind, z))


def measure_scores(kind: str, z: np.ndarray) -> np.ndarray:
    """Log-odds of each class against all others [n, C]: the order of the probabilities, which does not run into 1.0.

    Only a row's largest class can be near 1, so only there is 1 - p summed from the others.
    """
    if kind == "multilabel":
        return z
    if z.shape[1] == 2:
        return np.stack([z[:, 0] - z[:, 1], z[:, 1] - z[:, 0]], axis=1)
    rows, top = np.arange(len(z)), z.argmax(axis=1)
    logp = log_probabilities(kind, z)
    rest = logp.copy()
    rest[rows, top] = -np.inf
    with np.errstate(divide="ignore"):  # log1p(-1) of the largest class, replaced in the next line
        odds = logp - np.log1p(-np.exp(logp))
    odds[rows, top] = logp[rows, top] - np.logaddexp.reduce(rest, axis=1)
    return odds


def nll(kind: str, z: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-likelihood: per row, for multi-label per known entry."""
    if kind == "multilabel":
        signed = np.where(y == 1, z, -z)
        return float(np.minimum(np.logaddexp(0, -signed), -np.log(EPS))[~np.isnan(y)].mean())
    logp = log_probabilities(kind, z)[np.arange(len(y)), y]
    return float(-np.maximum(logp, np.log(EPS)).mean())


def predict_labels(kind: str, p: np.ndarray, cuts: tuple[float, ...], positive: int | None) -> np.ndarray:
    """What each row is called: int [n], or for multi-label bool [n, L]."""
    if kind == "multilabel":
        return p >= np.array(cuts)
    if kind == "binary":
        assert positive is not None
        return np.where(p[:, positive] >= cuts[0], positive, 1 - positive)
    return p.argmax(axis=1)


def evaluate(
    kind: str,
    classes: tuple[str, ...],
    z: np.ndarray,
    y: np.ndarray,
    *,
    positive: int | None = None,
    cuts: tuple[float, ...] = (),
    confusion: np.ndarray | None = None,
) -> dict[str, Any]:
    """All measures of the task from calibrated logits z [n, C] and labels y.

    ``confusion`` ([C, C]; multi-label [L, 2, 2]) replaces the counts of the calls: chance calls every class equally
    often, which no call of single rows can show. Returns plain numbers: ``n``, the measures by name, ``per_class``, and
    ``confusion`` (multi-label: one for each label).
    """
    if kind == "multilabel":
        return _evaluate_labels(classes, z, y, cuts, confusion)
    p, order = probabilities(kind, z), measure_scores(kind, z)
    if confusion is None:
        confusion = confusion_matrix(y, predict_labels(kind, p, cuts, positive), len(classes))
    one_hot = np.eye(len(classes), dtype=bool)[y]
    aurocs = np.array([auroc(order[:, c], one_hot[:, c]) for c in range(len(classes))])
    ap = np.array([average_precision(order[:, c], one_hot[:, c]) for c in range(len(classes))])
    result: dict[str, Any] = {"n": len(y)}
    if kind == "binary":
        assert positive is not None
        result |= {"auroc": float(aurocs[positive]), "ap": float(ap[positive])}
        result |= binary_measures(confusion, positive)
        result["brier"] = float(((p[:, positive] - (y == positive)) ** 2).mean())
    else:
        result |= _many_classes(confusion, p, y) | {"auroc": macro(aurocs), "ap": macro(ap)}
        result["brier"] = float(((p - one_hot) ** 2).sum(axis=1).mean())
    if kind == "ordinal":
        result |= {"quadratic_kappa": quadratic_kappa(confusion), "mae": class_distance(confusion)}
    result["nll"] = nll(kind, z, y)
    result["ece"] = calibration_error(*confidence(kind, p, y, positive))
    table = per_class(confusion) | {"auroc": aurocs, "ap": ap, "n": one_hot.sum(0)}
    result["per_class"] = {
        name: {key: column[c].item() for key, column in table.items()} for c, name in enumerate(classes)
    }
    result["confusion"] = confusion.tolist()
    return result


def _many_classes(confusion: np.ndarray, p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    of_class = per_class(confusion)
    result = {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "balanced_accuracy": macro(of_class["recall"]),
        "macro_f1": macro(of_class["f1"]),
    }
    if p.shape[1] >= 20:
        # rank of the true class; a tie counts against it, so that equal probabilities for all are no success
        above = (p >= p[np.arange(len(y)), y][:, None]).sum(axis=1)
        result["top5"] = float((above <= 5).mean())
    return result


def _evaluate_labels(
    classes: tuple[str, ...], z: np.ndarray, y: np.ndarray, cuts: tuple[float, ...], confusion: np.ndarray | None
) -> dict[str, Any]:
    """Each label over its known entries; the overall numbers are means over the labels where they are defined."""
    p, table = probabilities("multilabel", z), {}
    for c, name in enumerate(classes):
        known = ~np.isnan(y[:, c])
        truth = y[known, c] == 1
        if confusion is None:
            counts = confusion_matrix(truth.astype(int), (p[known, c] >= cuts[c]).astype(int), 2)
        else:
            counts = confusion[c]
        table[name] = {
            "n_known": int(known.sum()),
            "n_positive": int(truth.sum()),
            "auroc": auroc(z[known, c], truth),
            "ap": average_precision(z[known, c], truth),
            **binary_measures(counts, 1),
            "confusion": counts.tolist(),
        }
    names = ("auroc", "ap", "sensitivity", "specificity", "ppv", "npv", "f1", "accuracy")
    result: dict[str, Any] = {"n": len(y)}
    result |= {m: macro(np.array([row[m] for row in table.values()])) for m in names}
    known = ~np.isnan(y)
    result |= {"nll": nll("multilabel", z, y), "brier": float(((p - y) ** 2)[known].mean())}
    errors = [calibration_error(p[k, c], y[k, c]) for c, k in enumerate(known.T)]
    result |= {"ece": macro(np.array(errors)), "per_class": table}
    return result


def confidence(kind: str, p: np.ndarray, y: np.ndarray, positive: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The probability [n] that is judged by what came true [n]: that of the positive class; of several classes that of
    the most probable one, which is true or not (Guo et al. 2017)."""
    if kind == "binary":
        return p[:, positive], (y == positive).astype(float)
    return p.max(axis=1), (p.argmax(axis=1) == y).astype(float)


Measured = dict[str, np.ndarray]  # name -> [b], or of every class [C, b]


@dataclass(frozen=True)
class CalibratedPredictions:
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
        return probabilities(self.kind, self.z)

    @cached_property
    def called(self) -> np.ndarray:
        return predict_labels(self.kind, self.p, self.cuts, self.positive)


class WeightedMeasures:
    """One head's answers, prepared; called with weights [n, b] it gives (measures by name [b], of classes [C, b])."""

    def __init__(self, said: CalibratedPredictions) -> None:
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
        means = {name: ratio(_product(column, weights), total) for name, column in self._values.items()}
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
        overall |= {name: ratio(_product(column, weights), known) for name, column in self._values.items()}
        gaps = np.abs((self._gaps @ weights).astype(np.float64)).reshape(len(counts[3]), BINS, -1).sum(axis=1)
        of_class = of_class | {"ece": ratio(gaps, counts[3])}
        return overall | {"ece": self._macro("ece", of_class["ece"])}, of_class

    def _macro(self, name: str, values: np.ndarray) -> np.ndarray:
        """[C, b] -> [b]"""
        there = self._defined.get(name, ~np.isnan(values[:, 0]))
        return values[there].mean(axis=0) if there.any() else np.full(values.shape[1], np.nan)

    def _error(self, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
        return ratio(np.abs((self._gaps @ weights).astype(np.float64)).sum(axis=0), total)


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
        area = ratio(pairs, positives.astype(np.float64) * negatives)
        return np.stack([area, ratio(np.einsum("gb,gb->b", positive, precision, dtype=np.float64), positives)])


def _rankings(said: CalibratedPredictions) -> list[_Ranking]:
    order, n = measure_scores(said.kind, said.z), len(said.z)
    if said.multilabel:
        known = [np.flatnonzero(~np.isnan(column)) for column in said.y.T]
        return [_Ranking(order[rows, c], said.y[rows, c] == 1, rows, n) for c, rows in enumerate(known)]
    classes = [said.positive] if said.kind == "binary" else range(said.z.shape[1])
    return [_Ranking(order[:, c], said.y == c, np.arange(n), n) for c in classes]


def _row_values(said: CalibratedPredictions) -> dict[str, np.ndarray]:
    """What is a mean over rows (multi-label: a sum over a row's known labels)."""
    y, p = said.y, said.p
    logp = np.maximum(log_probabilities(said.kind, said.z), np.log(EPS))
    if said.multilabel:
        known = ~np.isnan(y)
        other = np.maximum(-np.logaddexp(0, said.z), np.log(EPS))
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


def _counts(said: CalibratedPredictions) -> csr_array:
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


def _gaps(said: CalibratedPredictions) -> csr_array:
    """[15, n], multi-label [15 L, n]: probability minus truth of each row, in the row of its bin.

    The bins are those of the whole sample: what is resampled is how far off each of them is.
    """
    n, p = len(said.z), said.p
    if not said.multilabel:
        sure, true = confidence(said.kind, p, said.y, said.positive)
        place, rows, gaps = mass_bins(sure), np.arange(n), sure - true
        return csr_array((gaps.astype(np.float32), (place, rows)), shape=(BINS, n))
    known = [np.flatnonzero(~np.isnan(column)) for column in said.y.T]
    place = np.concatenate([c * BINS + mass_bins(p[rows, c]) for c, rows in enumerate(known)])
    gaps = np.concatenate([p[rows, c] - said.y[rows, c] for c, rows in enumerate(known)])
    shape = (BINS * len(known), n)
    return csr_array((gaps.astype(np.float32), (place, np.concatenate(known))), shape=shape)


def _of_counts(there: np.ndarray, called: np.ndarray, hit: np.ndarray, known: np.ndarray) -> Measured:
    """`metrics.binary_measures` from weights of rows that are positive, called so, both, and known; any shape."""
    right = known - there - called + hit
    return {
        "sensitivity": ratio(hit, there),
        "specificity": ratio(right, known - there),
        "ppv": ratio(hit, called),
        "npv": ratio(right, known - called),
        "f1": ratio(2 * hit, there + called),
        "accuracy": ratio(hit + right, known),
    }


def _of_classes(there: np.ndarray, called: np.ndarray, hit: np.ndarray, _: np.ndarray) -> Measured:
    """`metrics.per_class`, [C, b]."""
    return class_measures(hit, there, called, there.sum(axis=0))


def _kappa(squared: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Quadratic kappa [b] from the mean of (i - j)² and the marginals: with truth and call independent it would be
    E i² + E j² - 2 E i E j."""
    there, called = counts[0] / counts[0].sum(axis=0), counts[1] / counts[1].sum(axis=0)
    i = np.arange(len(there))[:, None]
    chance = (i**2 * (there + called)).sum(axis=0) - 2 * (i * there).sum(axis=0) * (i * called).sum(axis=0)
    return 1 - np.divide(squared, chance, out=np.full(len(squared), np.nan), where=chance > 1e-12)


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
