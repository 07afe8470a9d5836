"""Differences of two families on the same test images.

The interval is that of a paired bootstrap: both are measured on the same resamples, so what is hard for both cancels.
p is exact where it can be (one head each, no clusters): McNemar's for proportions, DeLong's for the AUROC of two
classes; else from the bootstrap. Where each was tested on several sets of images (folds, draws), the differences of
these are taken: Nadeau and Bengio's t. p is corrected by Holm over the families, for each measure by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from heads import evaluate as ev
from heads.intervals import Estimates, tally
from heads.metrics import METRICS
from heads.statistics import LEVEL, corrected_t, delong, holm, mcnemar, percentiles, sign_share

MCNEMAR = ("accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class Difference:
    """Of a measure, this family minus the reference."""

    measure: str
    value: float
    low: float
    high: float
    p: float
    method: str
    p_holm: float = math.nan

    def record(self) -> dict[str, Any]:
        numbers = {"value": self.value, "low": self.low, "high": self.high, "p": self.p, "p_holm": self.p_holm}
        return {**numbers, "method": self.method, "words": self.words}

    @property
    def words(self) -> str:
        told = f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        if self.p_holm >= 1 - LEVEL or self.low <= 0 <= self.high:
            return f"no difference shown: {told}"
        better = (self.value > 0) is METRICS[self.measure].higher
        return f"{'better' if better else 'worse'}: {told}"


def same_sets(a: Estimates, b: Estimates) -> bool:
    return {part.key for part in a.parts} == {part.key for part in b.parts}


def differences(a: Estimates, b: Estimates) -> dict[str, Difference]:
    """By measure, where both are defined; of families with the same sets of test images."""
    found = [_over_sets(a, b, name) if len(a.parts) > 1 else _resampled(a, b, name) for name in a.names]
    return {each.measure: each for each in found if each is not None}


def _resampled(a: Estimates, b: Estimates, name: str) -> Difference | None:
    value = a.value(name) - b.value(name)
    drawn = a.resampled(name) - b.resampled(name)
    if math.isnan(value) or np.isnan(drawn).mean() > 0.5:
        return None
    low, high = percentiles(drawn)
    exact = _exact(a, b, name)
    words = "paired cluster bootstrap" if a.clustered else "paired bootstrap"
    p, method = (sign_share(drawn), words) if exact is None else (exact[0], f"{words}, p by {exact[1]}")
    return Difference(name, value, low, high, p, method)


def _exact(a: Estimates, b: Estimates, name: str) -> tuple[float, str] | None:
    first, second = (each.parts[0] for each in (a, b))
    if a.clustered or len(first.said) > 1 or len(second.said) > 1:
        return None
    one, other = first.said[0], second.said[0]
    if name == "auroc" and one.kind == "binary":
        truth = one.y == one.positive
        if min(truth.sum(), (~truth).sum()) < 2:
            return None
        first_score, second_score = (ev.scores(s.kind, s.z)[:, s.positive] for s in (one, other))
        return delong(first_score, second_score, truth)[2], "DeLong"
    if name in MCNEMAR and not one.multilabel:
        right, of = tally(one, name, None)
        return mcnemar(right[of], tally(other, name, None)[0][of]), "exact McNemar"
    return None


def _over_sets(a: Estimates, b: Estimates, name: str) -> Difference | None:
    place = {part.key: j for j, part in enumerate(b.parts)}
    values = a.of_parts(name) - b.of_parts(name)[[place[part.key] for part in a.parts]]
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None
    low, high, p = corrected_t(values, a.ratio)
    return Difference(name, float(values.mean()), low, high, p, f"corrected t, {len(values)} sets of test images")


def with_holm(found: Sequence[dict[str, Difference] | None]) -> list[dict[str, Difference] | None]:
    """Each measure's p over all families that were compared."""
    corrected = [None if each is None else dict(each) for each in found]
    for name in {name for each in found if each for name in each}:
        mine = [each for each in corrected if each and name in each]
        for each, p in zip(mine, holm([each[name].p for each in mine]), strict=True):
            each[name] = replace(each[name], p_holm=p)
    return corrected
