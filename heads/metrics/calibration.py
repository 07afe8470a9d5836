"""Temperature, priors, thresholds: fitted on val."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from heads.metrics import classification
from heads.metrics.classification import TEMPERATURES, probabilities


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
            return classification.youden_threshold(probability, truth)
        return classification.sensitivity_threshold(probability, truth, sensitivity)

    if kind == "binary":
        return (cut(p[:, positive], y == positive),)
    if kind == "multilabel":
        known = ~np.isnan(y)
        return tuple(cut(p[known[:, c], c], y[known[:, c], c] == 1) for c in range(y.shape[1]))
    assert sensitivity is None, "of several classes the most probable is called: there is no threshold"
    return ()
