"""Bootstrap confidence intervals of 95 % for the measures of one family (heads of several seeds) on a test set.

=====================================  ===============================================================================
proportions of one head, no clusters   Wilson, on images
proportions at 0 or 100 %              Wilson, on clusters (a bootstrap would have no width)
everything else, on one test set       percentiles of a stratified bootstrap of images or clusters; with several heads
                                       (seeds), of their mean in each resample, so that what is hard for all stays so
ECE                                    the same, moved so that its mean is the value: the ECE of a resample is larger by
                                       its own share of noise (tried: 600 images with calibrated probabilities, value
                                       0.031, percentiles 0.032 to 0.064)
several test sets (folds, resplits)    Student's t over sets, with Nadeau and Bengio's variance
=====================================  ===============================================================================

A resample in which a measure is undefined is left out; where that happened to more than one in twenty it is said, to
more than half, there is no interval.

A bootstrap draws *clusters* with replacement: the images of one group or of one digest, or single images, the same ones
for every head that is compared. Each row has a weight then, how often its cluster was drawn, and measures are computed
from weights, not from copied rows. Strata keep in every resample what the data were made of, so an interval speaks of
data with the same mix of classes. Images with classes that exclude each other: the classes, so that none is ever
missing. Clusters: the class they hold most of, of several such the rarest; with several labels the pattern of labels.
There, what has fewer than ``FEW`` clusters is one stratum together, since a stratum of one cluster is drawn the same
every time and would hide its part of the variance.

Notation: N images of a test set, U clusters, K heads on it, J test sets, R resamples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from featurecache.errors import BadOption, plain_value
from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.classification import Values, WeightedMeasures, evaluate, macro, predictive_values
from heads.metrics.significance import over_test_sets, percentiles, wilson
from heads.settings import METRICS

PROPORTIONS = ("sensitivity", "specificity", "ppv", "npv", "accuracy", "top5")
OF_CLASS = ("recall", "precision", "specificity")  # proportions, where classes exclude each other
BOUNDS = {"quadratic_kappa": (-1.0, 1.0), "nll": (0.0, math.inf), "mae": (0.0, math.inf), "brier": (0.0, 2.0)}
OFTEN = 0.05  # of the resamples: a measure that is undefined in more of them is said to be
FEW = 10  # clusters that are a stratum of their own
CELLS = 1_000_000  # of a block of weights [N, R]: 4 MB, which a cache holds (tried: 25 % faster than all R at once)
RETAINED = 1 << 28  # bytes of weights that are retained for the next head instead of being drawn again


@dataclass(frozen=True)
class Clusters:
    """``of_row``: the cluster of each row, int [N] in 0 … U-1; ``strata``: int [U]."""

    of_row: np.ndarray
    strata: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, y: np.ndarray) -> Clusters:
        """``ids``: rows with one number belong together; y: int [N], or float [N, C] with NaN for unknown."""
        of_row = np.unique(ids, return_inverse=True)[1]
        strata = _by_pattern(of_row, y) if y.ndim == 2 else _by_class(of_row, y)
        if y.ndim == 1 and len(strata) == len(y):
            return cls(of_row, strata)
        _, own, size = np.unique(strata, return_inverse=True, return_counts=True)
        return cls(of_row, np.where(size[own] < FEW, len(size), own))

    @property
    def clustered(self) -> bool:
        """Whether some cluster holds several images."""
        return len(self.strata) < len(self.of_row)

    def among(self, rows: np.ndarray) -> int:
        """Clusters that have one of these rows (bool [N])."""
        return len(np.unique(self.of_row[rows]))


def _by_class(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    count = int(y.max(initial=0)) + 1
    rows_of = np.zeros((int(of_row.max(initial=-1)) + 1, count), dtype=np.int64)
    np.add.at(rows_of, (of_row, y), 1)
    rare_first = np.argsort(np.bincount(y, minlength=count), kind="stable")
    return rare_first[rows_of[:, rare_first].argmax(axis=1)]


def _by_pattern(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A cluster has a label if one of its images has it, and does not have it if that is known of one."""
    pattern = np.full((int(of_row.max(initial=-1)) + 1, y.shape[1]), -1, dtype=np.int8)
    np.maximum.at(pattern, of_row, np.where(np.isnan(y), -1, y).astype(np.int8))
    return np.unique(pattern, axis=0, return_inverse=True)[1].reshape(-1)


def bootstrap_weights(clusters: Clusters, resamples: int) -> Iterator[np.ndarray]:
    """Resamples of clusters as weights of rows, in blocks float32 [N, R]; counts, so they are exact."""
    width = max(16, CELLS // max(len(clusters.of_row), 1))
    members = [np.flatnonzero(clusters.strata == s) for s in np.unique(clusters.strata)]
    for number, start in enumerate(range(0, resamples, width)):
        rng = np.random.default_rng([0, number])
        r = min(width, resamples - start)
        weights = np.empty((len(clusters.strata), r), dtype=np.float32)
        for own in members:
            drawn = rng.integers(0, len(own), (r, len(own))) + len(own) * np.arange(r)[:, None]
            weights[own] = np.bincount(drawn.reshape(-1), minlength=r * len(own)).reshape(r, -1).T
        yield weights[clusters.of_row]


@dataclass(frozen=True)
class TestSet:
    """One set of test images and the predictions of K heads for them; ``key``: equal for equal images with equal
    labels; ``cluster_ids``: int [N], equal where images belong together; ``train_images``: images of train."""

    key: str
    cluster_ids: np.ndarray
    predictions: tuple[CalibratedPredictions, ...]
    train_images: float = math.nan

    def __len__(self) -> int:
        return len(self.cluster_ids)

    @property
    def y(self) -> np.ndarray:
        return self.predictions[0].y

    @cached_property
    def clusters(self) -> Clusters:
        return Clusters.of(self.cluster_ids, self.y)

    def where(self, rows: np.ndarray, name: str) -> TestSet:
        """The same heads on some of the images, bool [N]."""
        predictions = tuple(replace(each, z=each.z[rows], y=each.y[rows]) for each in self.predictions)
        return TestSet(f"{self.key}/{name}", self.cluster_ids[rows], predictions, self.train_images)


@dataclass
class SharedResamples:
    """The bootstrap weights of every test set, the same for all heads that are compared on it."""

    resamples: int = 2000
    _blocks: dict[str, list[np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if plain_value("resamples", self.resamples, "int") < 1:
            raise BadOption(f"resamples is {self.resamples}; it must be at least 1.")

    def weights(self, test_set: TestSet) -> Iterable[np.ndarray]:
        if test_set.key not in self._blocks:
            blocks = bootstrap_weights(test_set.clusters, self.resamples)
            if len(test_set) * self.resamples * 4 > RETAINED:
                return blocks
            if len(self._blocks) > 8:  # each may hold 256 MB; they can be drawn again
                self._blocks.clear()
            self._blocks[test_set.key] = list(blocks)
        return self._blocks[test_set.key]


@dataclass(frozen=True)
class MeasureEstimate:
    """A measure with its confidence interval. ``low`` and ``high`` are NaN where there is none; ``method`` says what it
    is of, or why there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str | None = None

    def record(self) -> dict[str, Any]:
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"method": self.method}


def bootstrap_estimate(value: float, resampled: np.ndarray, method: str, *, centre: bool = False) -> MeasureEstimate:
    """The percentile interval of resampled values [R]."""
    undefined = int(np.isnan(resampled).sum())
    if math.isnan(value) or undefined > len(resampled) / 2:
        return MeasureEstimate(value, method=f"undefined in {undefined:,} of {len(resampled):,} resamples")
    if undefined > OFTEN * len(resampled):
        method += f", undefined in {undefined:,} of {len(resampled):,}"
    low, high = percentiles(resampled)
    if centre:
        shift = value - float(np.nanmean(resampled))
        low, high, method = max(0.0, low + shift), high + shift, method + ", centred"
    return MeasureEstimate(value, low, high, method)


class FamilyEstimates:
    """All measures of one family. What is resampled is computed when an interval first asks for it."""

    def __init__(self, test_sets: Sequence[TestSet], classes: Sequence[str], resamples: SharedResamples) -> None:
        self.test_sets, self.classes, self.resamples = tuple(test_sets), tuple(classes), resamples
        self.values = [[evaluate(each, self.classes) for each in test_set.predictions] for test_set in test_sets]
        self.names = [name for name in METRICS if name in self.values[0][0]]
        self.kind = self.test_sets[0].predictions[0].kind
        self.clustered = any(test_set.clusters.clustered for test_set in self.test_sets)
        self._method = "cluster bootstrap" if self.clustered else "bootstrap"

    def by_test_set(self, name: str, c: int | None = None) -> np.ndarray:
        """[J]: means over the heads; of a measure, or of that of class or label c."""
        tables = [[v if c is None else v["per_class"][self.classes[c]] for v in heads] for heads in self.values]
        return np.array([np.mean([table[name] for table in heads]) for heads in tables])

    def value(self, name: str, c: int | None = None) -> float:
        return macro(self.by_test_set(name, c))

    @cached_property
    def _resampled(self) -> tuple[Values, Values]:
        """Means over the heads: measures [R], of classes [C, R]. Of one test set only."""
        (test_set,) = self.test_sets
        heads = []
        for measures in map(WeightedMeasures, test_set.predictions):
            blocks = [measures(weights) for weights in self.resamples.weights(test_set)]
            heads.append(_combine(partial(np.concatenate, axis=-1), blocks))
        return _combine(partial(np.mean, axis=0), heads)

    def resampled(self, name: str, c: int | None = None) -> np.ndarray:
        """[R]"""
        return self._resampled[0][name] if c is None else self._resampled[1][name][c]

    def estimate(self, name: str, c: int | None = None) -> MeasureEstimate:
        """A measure, or that of class or label c."""
        value = self.value(name, c)
        if math.isnan(value):
            return MeasureEstimate(value, method="undefined here")
        if len(self.test_sets) > 1:
            return self._over_test_sets(value, name, c)
        multilabel = self.kind == "multilabel"
        proportions = () if c is None and multilabel else PROPORTIONS if c is None or multilabel else OF_CLASS
        if name in proportions and (by_wilson := self._wilson(value, name, c)) is not None:
            return by_wilson
        return bootstrap_estimate(value, self.resampled(name, c), self._method, centre=name == "ece")

    def _wilson(self, value: float, name: str, c: int | None) -> MeasureEstimate | None:
        """Wilson's interval where it is the one to take."""
        (test_set,) = self.test_sets
        counts = [proportion_counts(each, name, c) for each in test_set.predictions]
        if value in (0.0, 1.0):
            n = min(test_set.clusters.among(of) for _, of in counts)
            method = f"Wilson, {n:,} clusters" if self.clustered else "Wilson"
            return MeasureEstimate(value, *wilson(int(value * n), n), method)
        if len(counts) > 1 or self.clustered:
            return None
        ((hit, of),) = counts
        return MeasureEstimate(value, *wilson(int((hit & of).sum()), int(of.sum())), "Wilson")

    def _over_test_sets(self, value: float, name: str, c: int | None) -> MeasureEstimate:
        if (interval := over_test_sets(self.by_test_set(name, c), self.ratio)) is None:
            return MeasureEstimate(value, method="defined in one set of test images only")
        low, high, _, method = interval
        least, most = BOUNDS.get(name, (0.0, 1.0))
        return MeasureEstimate(value, max(low, least), min(high, most), method)

    @property
    def ratio(self) -> float:
        """Images tested / images trained on."""
        tested, trained = zip(*((len(each), each.train_images) for each in self.test_sets), strict=True)
        return float(np.mean(tested) / np.mean(trained))

    def all(self) -> dict[str, MeasureEstimate]:
        return {name: self.estimate(name) for name in self.names}

    def of_classes(self) -> dict[str, dict[str, MeasureEstimate]]:
        """By class or label: every measure that is one of a class."""
        first = self.values[0][0]["per_class"][self.classes[0]]
        names = [name for name, value in first.items() if isinstance(value, float)]
        names = [name for name in names if self.kind != "binary" or name not in ("auroc", "ap")]  # equal for both
        return {name: {m: self.estimate(m, c) for m in names} for c, name in enumerate(self.classes)}

    def at_prevalence(self, prevalence: float, c: int | None = None) -> dict[str, MeasureEstimate]:
        """PPV and NPV where that share of the images is positive, by Bayes from sensitivity and specificity.

        Both grow with both, so where one of the two has no width in a bootstrap, the ends of its Wilson interval and of
        the other's give an interval that is rather too wide."""
        hits, rejections = self.estimate("sensitivity", c), self.estimate("specificity", c)
        value = predictive_values(hits.value, rejections.value, prevalence)
        if len(self.test_sets) > 1 or {hits.value, rejections.value} & {0.0, 1.0}:
            low = predictive_values(hits.low, rejections.low, prevalence)
            high = predictive_values(hits.high, rejections.high, prevalence)
            ends = {m: (float(value[m]), float(low[m]), float(high[m])) for m in value}
            return {m: MeasureEstimate(*numbers, "ends of both intervals") for m, numbers in ends.items()}
        resampled = predictive_values(self.resampled("sensitivity", c), self.resampled("specificity", c), prevalence)
        return {m: bootstrap_estimate(float(value[m]), resampled[m], self._method) for m in value}


def _combine(function: Callable[..., Any], tables: Sequence[tuple[Values, Values]]) -> tuple[Values, Values]:
    """``function`` of what several tables have under one name, name by name."""
    overall, of_class = (
        {name: function([each[name] for each in values]) for name in values[0]} for values in zip(*tables, strict=True)
    )
    return overall, of_class


def proportion_counts(predictions: CalibratedPredictions, name: str, c: int | None) -> tuple[np.ndarray, np.ndarray]:
    """bool [N] each: the rows that a proportion counts, and those it counts them among."""
    predicted, label_mask = predictions.predicted_labels, predictions.label_mask
    if name == "top5":
        return predictions.top5, label_mask
    if name == "accuracy" and not predictions.multilabel:
        return predicted == predictions.y, label_mask
    if predictions.multilabel:
        truth, predicted, label_mask = predictions.y[:, c] == 1, predicted[:, c], label_mask[:, c]
    else:
        c = predictions.positive if c is None else c
        truth, predicted = predictions.y == c, predicted == c
    hit, of = {
        "sensitivity": (predicted, truth),
        "recall": (predicted, truth),
        "specificity": (~predicted, ~truth),
        "ppv": (truth, predicted),
        "precision": (truth, predicted),
        "npv": (~truth, ~predicted),
        "accuracy": (predicted == truth, label_mask),
    }[name]
    return hit & of & label_mask, of & label_mask
