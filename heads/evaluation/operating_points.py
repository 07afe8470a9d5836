"""Calibration and operating points of a family, for the record of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featurecache.errors import BadOption
from heads.evaluation.families import FamilyPredictions
from heads.metrics.classification import evaluate
from heads.metrics.intervals import FamilyEstimates, TestSet
from heads.metrics.reliability import Confidence, consistency_interval, reliability
from heads.runs.run import Run

Prevalence = float | dict[str, float]


def check_prevalence(run: Run, prevalence: Prevalence | None) -> None:
    """Raises BadOption where there is no such positive class, or no such share of images."""
    if prevalence is None:
        return
    if run.task not in ("binary", "multilabel"):
        none = f"--prevalence is of one positive class, and a {run.task} task has none"
        raise BadOption(f"{none}. It is for two classes, or for several labels.")
    positives = run.classes if run.task == "multilabel" else (run.config["positive"],)
    by_name = prevalence if isinstance(prevalence, dict) else dict.fromkeys(positives, prevalence)
    for name, value in by_name.items():
        if name not in positives:
            raise BadOption(f"--prevalence of {name}: the positives of this task are {', '.join(positives)}.")
        if not 0 < value < 1:
            raise BadOption(f"--prevalence is {value:g}; it is a share of the images, above 0 and below 1.")


def operating_points(run: Run, estimates: FamilyEstimates, prevalence: Prevalence | None) -> list[dict[str, Any]]:
    """What the thresholds of val (means over the heads) reach on test: of the positive class, or of each label; several
    classes have none."""
    labels: list[tuple[str, int | None]] = [(run.config["positive"], None)] if run.task == "binary" else []
    if run.task == "multilabel":
        labels = [(name, c) for c, name in enumerate(run.classes)]
    points = []
    for name, c in labels:
        cuts = [each.thresholds[c or 0] for test_set in estimates.test_sets for each in test_set.predictions]
        reached = {m: estimates.estimate(m, c).record() for m in ("sensitivity", "specificity", "ppv", "npv")}
        share = prevalence.get(name) if isinstance(prevalence, dict) else prevalence
        elsewhere = None
        if share is not None:
            elsewhere = {m: e.record() for m, e in estimates.at_prevalence(share, c).items()} | {"prevalence": share}
        chosen = {"threshold": float(np.mean(cuts)), "wanted": run.config["settings"].get("sensitivity")}
        points.append({"class": name, **chosen, **reached, "at_prevalence": elsewhere})
    return points


def calibration_record(predictions: FamilyPredictions) -> dict[str, Any]:
    """On test, ``before`` (the head's own logits) and ``after`` prior correction and temperature: means over the runs
    of Brier, NLL and ECE, ``calibrated`` (the ECE that a perfectly calibrated head would show) and bins of all their
    answers; ``words``: which of the two the ECE after is."""
    raw = [
        replace(each, predictions=tuple(replace(p, z=a.logits) for p, a in zip(each.predictions, answers, strict=True)))
        for each, answers in zip(predictions.test_sets, predictions.answers, strict=True)
    ]
    after = _calibration(predictions.test_sets)
    images = len({name for answers in predictions.answers for name in answers[0].ids})
    return {"before": _calibration(raw), "after": after, "words": _ece_words(after, images)}


def _calibration(test_sets: Sequence[TestSet]) -> dict[str, Any]:
    """Several labels are pooled in the bins, while ECE is the mean over labels."""
    heads = [(each, test_set) for test_set in test_sets for each in test_set.predictions]
    names = [str(c) for c in range(heads[0][0].z.shape[1])]
    measured = [evaluate(each, names) for each, _ in heads]
    means = {m: float(np.mean([each[m] for each in measured])) for m in ("brier", "nll", "ece")}
    low, high = consistency_interval([(each.predictions, each.cluster_ids) for each in test_sets])
    judged = [(each.p, each.truth, of.cluster_ids[each.row]) for p, of in heads for each in (Confidence.of(p),)]
    bins = reliability(*map(np.concatenate, zip(*judged, strict=True)))
    return means | {"calibrated": {"low": low, "high": high}, "bins": bins}


def _ece_words(after: dict[str, Any], images: int) -> str:
    ece, low, high = after["ece"], after["calibrated"]["low"], after["calibrated"]["high"]
    reading = "its probabilities are off by more than chance" if ece > high else "no miscalibration is shown"
    would = "a perfectly calibrated head of these probabilities would show"
    digits = next((d for d in range(3, 17) if ece <= high or round(ece, d) > round(high, d)), 17)  # tell them apart
    return f"ECE {ece:.{digits}f}; {would} {low:.{digits}f} to {high:.{digits}f} on {images:,} images: {reading}"
