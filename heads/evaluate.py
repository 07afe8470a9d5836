"""From logits to calibrated probabilities, calls and measures.

Notation: n rows, C classes (or labels), z logits float64 [n, C].

Calibration of a head trained with priors that are not those of the data. Balanced batches show every class with
probability q_c = 1/C while train has prevalence p_c, so log p_c - log q_c is added to z_c; a multi-label head trained
with pos_weight w_c saw its positives w_c times, so log w_c is taken from z_c. Then z is divided by one temperature,
that of the smallest NLL on val. (Tried at 10 % prevalence: ECE 0.286 raw, 0.282 with temperature alone,
0.005 with both.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from heads import metrics

TEMPERATURES = (0.05, 20.0)  # no val split says anything believable beyond


def log_probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    """log p [n, C]: softmax over classes, or a sigmoid for each label."""
    if kind == "multilabel":
        return -np.logaddexp(0, -z)
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def probabilities(kind: str, z: np.ndarray) -> np.ndarray:
    return np.exp(log_probabilities(kind, z))


def scores(kind: str, z: np.ndarray) -> np.ndarray:
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
        return float(np.minimum(np.logaddexp(0, -signed), -np.log(metrics.EPS))[~np.isnan(y)].mean())
    logp = log_probabilities(kind, z)[np.arange(len(y)), y]
    return float(-np.maximum(logp, np.log(metrics.EPS)).mean())


def prior_correction(train: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """log(train / seen) [C]; 0 for a class that train does not have."""
    there = (train > 0) & (seen > 0)
    return np.log(np.where(there, train, 1.0) / np.where(there, seen, 1.0))


def temperature(kind: str, z: np.ndarray, y: np.ndarray) -> float | None:
    """The temperature of the smallest NLL on val, or None where there is none within ``TEMPERATURES``.

    With b = 1/T, NLL(b) is convex and its derivative is the mean of sum_c p_c z_c - z_y (multi-label: (p - y) z over
    known entries): bisection on log b. There is none if val is separated without error (NLL falls for ever).
    """
    known = ~np.isnan(y) if kind == "multilabel" else np.ones(len(y), dtype=bool)

    def slope(b: float) -> float:
        p = probabilities(kind, b * z)
        if kind == "multilabel":
            return float(((p - y) * z)[known].mean())
        return float(((p * z).sum(1) - z[np.arange(len(y)), y]).mean())

    low, high = np.log(1 / TEMPERATURES[1]), np.log(1 / TEMPERATURES[0])
    if slope(np.exp(low)) >= 0 or slope(np.exp(high)) <= 0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


@dataclass(frozen=True)
class Calibration:
    """What turns raw logits into probabilities and calls: chosen on val, kept with the run.

    ``thresholds``: of the positive class (binary, one) or of each label (multi-label); () where the largest
    probability decides.
    """

    correction: tuple[float, ...]
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[n, C] raw logits -> float64 calibrated logits."""
        return (np.asarray(logits, dtype=np.float64) + np.array(self.correction)) / self.temperature

    def to_dict(self) -> dict[str, Any]:
        return {
            "correction": list(self.correction),
            "temperature": self.temperature,
            "thresholds": list(self.thresholds),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        return cls(tuple(data["correction"]), data["temperature"], tuple(data["thresholds"]))


def calibrate(
    kind: str,
    logits: np.ndarray,
    y: np.ndarray,
    correction: np.ndarray,
    positive: int | None,
    sensitivity: float | None = None,
) -> tuple[Calibration, str | None]:
    """Calibration by val, and a sentence where val could not set the temperature."""
    z = np.asarray(logits, dtype=np.float64) + correction
    t, note = temperature(kind, z, y), None
    if t is None:
        note = "no temperature has a smallest NLL on val (it is separated without error, or not at all): 1 is kept"
        t = 1.0
    cuts = thresholds(kind, probabilities(kind, z / t), y, positive, sensitivity)
    return Calibration(tuple(float(v) for v in correction), t, cuts), note


def thresholds(
    kind: str, p: np.ndarray, y: np.ndarray, positive: int | None, sensitivity: float | None = None
) -> tuple[float, ...]:
    """On val, for the positive class, or for each label over its known entries: Youden's, or the highest that reaches
    the wanted ``sensitivity`` (above 0, at most 1)."""

    def cut(probability: np.ndarray, truth: np.ndarray) -> float:
        if sensitivity is None:
            return metrics.youden_threshold(probability, truth)
        return metrics.sensitivity_threshold(probability, truth, sensitivity)

    if kind == "binary":
        return (cut(p[:, positive], y == positive),)
    if kind == "multilabel":
        known = ~np.isnan(y)
        return tuple(cut(p[known[:, c], c], y[known[:, c], c] == 1) for c in range(y.shape[1]))
    assert sensitivity is None, "of several classes the most probable is called: there is no threshold"
    return ()


def call(kind: str, p: np.ndarray, cuts: tuple[float, ...], positive: int | None) -> np.ndarray:
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
    p, order = probabilities(kind, z), scores(kind, z)
    if confusion is None:
        confusion = metrics.confusion_matrix(y, call(kind, p, cuts, positive), len(classes))
    one_hot = np.eye(len(classes), dtype=bool)[y]
    auroc = np.array([metrics.auroc(order[:, c], one_hot[:, c]) for c in range(len(classes))])
    ap = np.array([metrics.average_precision(order[:, c], one_hot[:, c]) for c in range(len(classes))])
    result: dict[str, Any] = {"n": len(y)}
    if kind == "binary":
        assert positive is not None
        result |= {"auroc": float(auroc[positive]), "ap": float(ap[positive])}
        result |= metrics.binary_measures(confusion, positive)
        result["brier"] = float(((p[:, positive] - (y == positive)) ** 2).mean())
    else:
        result |= _many_classes(confusion, p, y) | {"auroc": metrics.macro(auroc), "ap": metrics.macro(ap)}
        result["brier"] = float(((p - one_hot) ** 2).sum(axis=1).mean())
    if kind == "ordinal":
        result |= {"quadratic_kappa": metrics.quadratic_kappa(confusion), "mae": metrics.class_distance(confusion)}
    result["nll"] = nll(kind, z, y)
    result["ece"] = metrics.calibration_error(*sureness(kind, p, y, positive))
    table = metrics.per_class(confusion) | {"auroc": auroc, "ap": ap, "n": one_hot.sum(0)}
    result["per_class"] = {
        name: {key: column[c].item() for key, column in table.items()} for c, name in enumerate(classes)
    }
    result["confusion"] = confusion.tolist()
    return result


def _many_classes(confusion: np.ndarray, p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    of_class = metrics.per_class(confusion)
    result = {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "balanced_accuracy": metrics.macro(of_class["recall"]),
        "macro_f1": metrics.macro(of_class["f1"]),
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
            counts = metrics.confusion_matrix(truth.astype(int), (p[known, c] >= cuts[c]).astype(int), 2)
        else:
            counts = confusion[c]
        table[name] = {
            "n_known": int(known.sum()),
            "n_positive": int(truth.sum()),
            "auroc": metrics.auroc(z[known, c], truth),
            "ap": metrics.average_precision(z[known, c], truth),
            **metrics.binary_measures(counts, 1),
            "confusion": counts.tolist(),
        }
    names = ("auroc", "ap", "sensitivity", "specificity", "ppv", "npv", "f1", "accuracy")
    result: dict[str, Any] = {"n": len(y)}
    result |= {m: metrics.macro(np.array([row[m] for row in table.values()])) for m in names}
    known = ~np.isnan(y)
    result |= {"nll": nll("multilabel", z, y), "brier": float(((p - y) ** 2)[known].mean())}
    errors = [metrics.calibration_error(p[k, c], y[k, c]) for c, k in enumerate(known.T)]
    result |= {"ece": metrics.macro(np.array(errors)), "per_class": table}
    return result


def sureness(kind: str, p: np.ndarray, y: np.ndarray, positive: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The probability [n] that is judged by what came true [n]: that of the positive class; of several classes that of
    the most probable one, which is true or not (Guo et al. 2017)."""
    if kind == "binary":
        return p[:, positive], (y == positive).astype(float)
    return p.max(axis=1), (p.argmax(axis=1) == y).astype(float)
