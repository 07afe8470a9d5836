"""Bootstrap weights by class, split and cluster; estimates of many heads at once.

A measure with its interval of 95 %, for the heads of one family (seeds) on the images they were tested on.

=====================================  ===============================================================================
proportions of one head, no clusters   Wilson, on images
proportions at 0 or 100 %              Wilson, on clusters (a bootstrap would have no width)
everything else, on one set of images  percentiles of a stratified bootstrap of images or clusters; with several heads
                                       (seeds), of their mean in each resample, so that what is hard for all stays so
ECE                                    the same, moved so that its mean is the value: the ECE of a resample is larger by
                                       its own share of noise (tried: 600 images with calibrated probabilities, value
                                       0.031, percentiles 0.032 to 0.064)
several sets of images (folds, draws)  Student's t over sets, with Nadeau and Bengio's variance
=====================================  ===============================================================================

A resample in which a measure is undefined is left out; where that happened to more than one in twenty it is said, to
more than half, there is no interval.

Notation: n images of a set, K heads on it, J sets, R resamples, C classes.

What a bootstrap draws: independent units, within strata, the same ones for every head that is compared.

A *unit* is a cluster: the images of one group or of one digest, or a single image. Drawing units with replacement gives
each row a weight, how often its unit was drawn; every measure is then computed from weights, not from copied rows.

Strata keep in every resample what the data were made of, so an interval speaks of data with the same mix of classes.
Images with classes that exclude each other: the classes, so that none is ever missing. Clusters: the class they hold
most of, of several such the rarest; with several labels the pattern of labels. There, what has fewer than ``FEW``
clusters is one stratum together, since a stratum of one cluster is drawn the same every time and would hide its part of
the variance.

Notation: n rows, U units, R resamples, b of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from heads.metrics import classification
from heads.metrics import classification as ev
from heads.metrics.classification import CalibratedPredictions, Measured, WeightedMeasures
from heads.metrics.significance import corrected_t, percentiles, wilson

PROPORTIONS = ("sensitivity", "specificity", "ppv", "npv", "accuracy", "top5")
OF_CLASS = ("recall", "precision", "specificity")  # proportions, where classes exclude each other
BOUNDS = {"quadratic_kappa": (-1.0, 1.0), "nll": (0.0, math.inf), "mae": (0.0, math.inf), "brier": (0.0, 2.0)}
_PLACES = {"ppv": 0, "npv": 1}  # in what `metrics.predictive_values` gives
OFTEN = 0.05  # of the resamples: a measure that is undefined in more of them is said to be


@dataclass(frozen=True)
class MeasureEstimate:
    """``low`` and ``high`` are NaN where there is no interval; ``method`` says what it is of, or why there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str | None = None

    def record(self) -> dict[str, Any]:
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"method": self.method}


@dataclass(frozen=True)
class EvaluationSet:
    """One set of images and what K heads said of them; ``key``: equal for equal images with equal labels."""

    key: str
    clusters: np.ndarray  # int [n]
    said: tuple[CalibratedPredictions, ...]
    trained_on: float = math.nan  # images

    def __len__(self) -> int:
        return len(self.clusters)

    @property
    def y(self) -> np.ndarray:
        return self.said[0].y

    @cached_property
    def units(self) -> Clusters:
        return units_for(self.clusters, self.y)

    def where(self, rows: np.ndarray, name: str) -> EvaluationSet:
        """The same heads on some of the images, bool [n]."""
        said = tuple(replace(each, z=each.z[rows], y=each.y[rows]) for each in self.said)
        return EvaluationSet(f"{self.key}/{name}", self.clusters[rows], said, self.trained_on)


@dataclass
class SharedResamples:
    """The draws of every set of images, the same for all who ask."""

    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        self._draws: dict[str, BootstrapWeights] = {}

    def draws(self, part: EvaluationSet) -> BootstrapWeights:
        if part.key not in self._draws:
            if len(self._draws) > 8:  # each may hold 256 MB; they can be drawn again
                self._draws.clear()
            self._draws[part.key] = BootstrapWeights(part.units, self.resamples, self.seed)
        return self._draws[part.key]


class FamilyEstimates:
    """All measures of one family. What is resampled is computed when an interval first asks for it."""

    def __init__(self, parts: Sequence[EvaluationSet], classes: Sequence[str], resampler: SharedResamples) -> None:
        self.parts, self.classes, self.resampler = tuple(parts), tuple(classes), resampler
        self.measured = [
            [ev.evaluate(s.kind, self.classes, s.z, s.y, positive=s.positive, cuts=s.cuts) for s in part.said]
            for part in parts
        ]

    @property
    def kind(self) -> str:
        return self.parts[0].said[0].kind

    @property
    def clustered(self) -> bool:
        return any(part.units.clustered for part in self.parts)

    @property
    def names(self) -> list[str]:
        """The measures, in the order of `metrics.METRICS`."""
        return [name for name in classification.METRICS if name in self.measured[0][0]]

    def of_parts(self, name: str, c: int | None = None) -> np.ndarray:
        """[J]: means over the heads."""
        return np.array([np.mean([self._one(m, name, c) for m in part]) for part in self.measured])

    def value(self, name: str, c: int | None = None) -> float:
        return classification.macro(self.of_parts(name, c))

    def _one(self, measured: dict[str, Any], name: str, c: int | None) -> float:
        return measured[name] if c is None else measured["per_class"][self.classes[c]][name]

    @cached_property
    def _resampled(self) -> tuple[Measured, Measured]:
        """Means over the heads: measures [R], of classes [C, R]. Of one set of images only."""
        (part,) = self.parts
        overall: list[Measured] = []
        of_class: list[Measured] = []
        for said in part.said:
            weighted = WeightedMeasures(said)
            blocks = [weighted(weights) for weights in self.resampler.draws(part)]
            overall.append({k: np.concatenate([a[k] for a, _ in blocks], axis=-1) for k in blocks[0][0]})
            of_class.append({k: np.concatenate([b[k] for _, b in blocks], axis=-1) for k in blocks[0][1]})
        return tuple(
            {k: np.mean([each[k] for each in found], axis=0) for k in found[0]} for found in (overall, of_class)
        )  # type: ignore[return-value]

    def resampled(self, name: str, c: int | None = None) -> np.ndarray:
        """[R]"""
        return self._resampled[0][name] if c is None else self._resampled[1][name][c]

    def estimate(self, name: str, c: int | None = None) -> MeasureEstimate:
        """A measure, or that of class or label c."""
        value = self.value(name, c)
        if math.isnan(value):
            return MeasureEstimate(value, method="undefined here")
        if len(self.parts) > 1:
            return self._over_parts(value, name, c)
        if self._is_proportion(name, c) and (found := self._counted(value, name, c)) is not None:
            return found
        return bootstrap(value, self.resampled(name, c), self._words, centre=name == "ece")

    @property
    def _words(self) -> str:
        return "cluster bootstrap" if self.clustered else "bootstrap"

    def _is_proportion(self, name: str, c: int | None) -> bool:
        if c is None:
            return name in PROPORTIONS and self.kind != "multilabel"
        return name in (PROPORTIONS if self.kind == "multilabel" else OF_CLASS)

    def _counted(self, value: float, name: str, c: int | None) -> MeasureEstimate | None:
        """Wilson's interval where it is the one to take."""
        (part,) = self.parts
        counts = [proportion_counts(said, name, c) for said in part.said]
        if value in (0.0, 1.0):
            n = min(part.units.among(of) for _, of in counts)
            words = f"Wilson, {n:,} clusters" if self.clustered else "Wilson"
            return MeasureEstimate(value, *wilson(int(value * n), n), words)
        if len(counts) > 1 or self.clustered:
            return None
        ((hit, of),) = counts
        return MeasureEstimate(value, *wilson(int((hit & of).sum()), int(of.sum())), "Wilson")

    def _over_parts(self, value: float, name: str, c: int | None) -> MeasureEstimate:
        values = self.of_parts(name, c)
        there = ~np.isnan(values)
        if there.sum() < 2:
            return MeasureEstimate(value, method="defined in one set of test images only")
        low, high, _ = corrected_t(values[there], self.ratio)
        least, most = BOUNDS.get(name, (0.0, 1.0))
        return MeasureEstimate(
            value, max(low, least), min(high, most), f"corrected t, {int(there.sum())} sets of test images"
        )

    @property
    def ratio(self) -> float:
        """Images tested / images trained on."""
        return float(np.mean([len(part) for part in self.parts]) / np.mean([part.trained_on for part in self.parts]))

    def all(self) -> dict[str, MeasureEstimate]:
        return {name: self.estimate(name) for name in self.names}

    def of_classes(self) -> dict[str, dict[str, MeasureEstimate]]:
        """By class or label: every measure that is one of a class."""
        first = self.measured[0][0]["per_class"]
        names = [k for k, v in first[self.classes[0]].items() if isinstance(v, float)]
        if self.kind == "binary":  # the ranking of one class is that of the other
            names = [name for name in names if name not in ("auroc", "ap")]
        return {name: {m: self.estimate(m, c) for m in names} for c, name in enumerate(self.classes)}

    def at_prevalence(self, prevalence: float, c: int | None = None) -> dict[str, MeasureEstimate]:
        """PPV and NPV where that share of the images is positive, by Bayes from sensitivity and specificity.

        Both grow with both, so where one of the two has no width in a bootstrap, the ends of its Wilson interval and of
        the other's give an interval that is rather too wide.
        """
        found, spared = self.estimate("sensitivity", c), self.estimate("specificity", c)
        value = classification.predictive_values(found.value, spared.value, prevalence)
        if len(self.parts) > 1 or {found.value, spared.value} & {0.0, 1.0}:
            low = classification.predictive_values(found.low, spared.low, prevalence)
            high = classification.predictive_values(found.high, spared.high, prevalence)
            words = "ends of both intervals"
            return {
                m: MeasureEstimate(float(value[i]), float(low[i]), float(high[i]), words) for m, i in _PLACES.items()
            }
        drawn = classification.predictive_values(
            self.resampled("sensitivity", c), self.resampled("specificity", c), prevalence
        )
        return {m: bootstrap(float(value[i]), drawn[i], self._words) for m, i in _PLACES.items()}


def bootstrap(value: float, resampled: np.ndarray, words: str, *, centre: bool = False) -> MeasureEstimate:
    """The interval of resampled values [R]."""
    undefined = int(np.isnan(resampled).sum())
    if math.isnan(value) or undefined > len(resampled) / 2:
        return MeasureEstimate(value, method=f"undefined in {undefined:,} of {len(resampled):,} resamples")
    if undefined > OFTEN * len(resampled):
        words += f", undefined in {undefined:,} of {len(resampled):,}"
    low, high = percentiles(resampled)
    if centre:
        shift = value - float(np.nanmean(resampled))
        low, high, words = max(0.0, low + shift), high + shift, words + ", centred"
    return MeasureEstimate(value, low, high, words)


Mask = np.ndarray


def proportion_counts(said: CalibratedPredictions, name: str, c: int | None) -> tuple[Mask, Mask]:
    """bool [n]: the rows that a proportion counts, and those it counts them among."""
    called = said.called
    if said.multilabel:
        assert c is not None
        known, truth, found = ~np.isnan(said.y[:, c]), said.y[:, c] == 1, called[:, c]
    else:
        c = said.positive if c is None else c
        known, truth, found = np.ones(len(said.y), dtype=bool), said.y == c, called == c
    among: dict[str, Callable[[], tuple[Mask, Mask]]] = {
        "sensitivity": lambda: (found, truth),
        "recall": lambda: (found, truth),
        "specificity": lambda: (~found, ~truth),
        "ppv": lambda: (truth, found),
        "precision": lambda: (truth, found),
        "npv": lambda: (~truth, ~found),
        "accuracy": lambda: (found == truth if said.multilabel else called == said.y, known),
        "top5": lambda: (_among_five(said), known),
    }
    hit, of = among[name]()
    return hit & of & known, of & known


def _among_five(said: CalibratedPredictions) -> Mask:
    p = said.p
    return (p >= p[np.arange(len(p)), said.y][:, None]).sum(axis=1) <= 5


FEW = 10  # clusters that are a stratum of their own
CELLS = 1_000_000  # of a block of weights [n, b]: 4 MB, which a cache holds (tried: 25 % faster than all R at once)
KEPT = 1 << 28  # bytes of weights that are kept for the next head instead of being drawn again


@dataclass(frozen=True)
class Clusters:
    """``of_row``: the unit of each row, int [n] in 0 … U-1; ``strata``: int [U]."""

    of_row: np.ndarray
    strata: np.ndarray

    @property
    def count(self) -> int:
        return len(self.strata)

    @property
    def clustered(self) -> bool:
        """Whether some unit holds several images."""
        return self.count < len(self.of_row)

    def among(self, rows: np.ndarray) -> int:
        """Units that have one of these rows (bool [n])."""
        return len(np.unique(self.of_row[rows]))


def units_for(clusters: np.ndarray, y: np.ndarray) -> Clusters:
    """``clusters``: rows with one number belong together; y: int [n], or float [n, L] with NaN for unknown."""
    of_row = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    if y.ndim == 2:
        return Clusters(of_row, _pooled(_by_pattern(of_row, y)))
    strata = _by_class(of_row, y)
    return Clusters(of_row, strata if len(strata) == len(y) else _pooled(strata))


def _pooled(strata: np.ndarray) -> np.ndarray:
    """Strata with fewer than ``FEW`` units made one."""
    _, own, size = np.unique(strata, return_inverse=True, return_counts=True)
    own = own.reshape(-1)
    return np.where(size[own] < FEW, len(size), own)


def _by_class(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    count = int(y.max(initial=0)) + 1
    held = np.zeros((int(of_row.max(initial=-1)) + 1, count), dtype=np.int64)
    np.add.at(held, (of_row, y), 1)
    rare_first = np.argsort(np.bincount(y, minlength=count), kind="stable")
    return rare_first[held[:, rare_first].argmax(axis=1)]


def _by_pattern(of_row: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A cluster has a label if one of its images has it, and does not have it if that is known of one."""
    pattern = np.full((int(of_row.max(initial=-1)) + 1, y.shape[1]), -1, dtype=np.int8)
    np.maximum.at(pattern, of_row, np.where(np.isnan(y), -1, y).astype(np.int8))
    return np.unique(pattern, axis=0, return_inverse=True)[1].reshape(-1)


@dataclass
class BootstrapWeights:
    """R resamples of units as weights of rows. Iterating twice gives the same weights."""

    units: Clusters
    resamples: int
    seed: int = 0
    _kept: list[np.ndarray] = field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks of weights float32 [n, b]; counts, so they are exact."""
        if self._kept:
            yield from self._kept
            return
        keep = len(self.units.of_row) * self.resamples * 4 <= KEPT
        found: list[np.ndarray] = []
        for block in self._drawn():
            if keep:
                found.append(block)
            yield block
        self._kept = found

    def _drawn(self) -> Iterator[np.ndarray]:
        width = max(16, CELLS // max(len(self.units.of_row), 1))
        members = [np.flatnonzero(self.units.strata == s) for s in np.unique(self.units.strata)]
        for number, start in enumerate(range(0, self.resamples, width)):
            rng = np.random.default_rng([self.seed, number])
            b = min(width, self.resamples - start)
            weights = np.empty((self.units.count, b), dtype=np.float32)
            for own in members:
                drawn = rng.integers(0, len(own), (b, len(own))) + len(own) * np.arange(b)[:, None]
                weights[own] = np.bincount(drawn.reshape(-1), minlength=b * len(own)).reshape(b, -1).T
            yield weights[self.units.of_row]
