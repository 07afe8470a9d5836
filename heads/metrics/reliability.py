"""Reliability: predicted probabilities against what came true. Bins, the calibration error (ECE), and what it would be
of a perfectly calibrated head.

ECE is biased upwards: in a bin of m images the share that comes true is off by about sqrt(p (1 - p) / m) by chance,
and what is off is counted without its sign. So a value says little by itself. Beside it stands what a head would show
whose probabilities are right: labels are redrawn from them, again and again ("consistency resampling", Bröcker & Smith
2007; as a test of the ECE, Vaicenavicius et al. 2019, arXiv:1902.06977).

Bins are of equal mass (Nixon et al. 2019, arXiv:1904.01685): round(n^(1/3)), at most 15, as few as two. The bias of the
binned ECE is smallest where bins grow as n^(1/3) (Futami & Fujisawa 2024, arXiv:2405.15709); 15 is what the literature
has (Guo et al. 2017). So 45 images have 4 bins, 90 have 4, 624 have 9, 3,000 have 14.

Notation: N images, C classes or labels, M judged probabilities (N, or the known entries of labels), B bins, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.significance import percentiles, wilson

MOST_BINS = 15
DRAWS = 1000  # of all labels
CELLS = 4_000_000  # of a block of draws [M, R], float32


def bin_count(n: int) -> int:
    """Of n probabilities."""
    return int(np.clip(round(n ** (1 / 3)), 2, MOST_BINS))


def mass_bins(probability: np.ndarray) -> np.ndarray:
    """int [N]: bins of equal numbers of rows, by increasing probability; equal probabilities share a bin, so that no
    order of the rows matters."""
    n = len(probability)
    order, rank, bins = np.argsort(probability), np.empty(n), bin_count(n)
    ordered = probability[order]
    rank[order] = (ordered.searchsorted(ordered) + ordered.searchsorted(ordered, "right")) / 2  # from 1/2 to N - 1/2
    return np.minimum((rank * bins / max(n, 1)).astype(np.int64), bins - 1)


@dataclass(frozen=True)
class Confidence:
    """The M probabilities that are judged by what came true: ``p``, ``truth`` (0.0 or 1.0), ``row`` (of N), ``bin``.

    Of the positive class; of several classes of the most probable one, which is true or not (Guo et al. 2017); of
    labels all that are known, each label in ``MOST_BINS`` numbers of bins of its own."""

    p: np.ndarray
    truth: np.ndarray
    row: np.ndarray
    bin: np.ndarray
    labels: int = 1

    @classmethod
    def of(cls, predictions: CalibratedPredictions) -> Confidence:
        p, y, rows = predictions.p, predictions.y, np.arange(len(predictions.y))
        if predictions.multilabel:
            label, rows = np.nonzero(predictions.label_mask.T)
            p, y, width = p[rows, label], y[rows, label].astype(float), predictions.z.shape[1]
            bins = [mass_bins(p[label == c]) + MOST_BINS * c for c in range(width)]
            return cls(p, y, rows, np.concatenate(bins), width)
        judged = p.max(axis=1) if predictions.positive is None else p[:, predictions.positive]
        true = p.argmax(axis=1) == y if predictions.positive is None else y == predictions.positive
        return cls(judged, true.astype(float), rows, mass_bins(judged))

    def calibration_error(self, truth: np.ndarray) -> np.ndarray:
        """ECE [R] of ``truth`` [M, R]: of each bin |sum of p - truth|, over images; of labels the mean over those that
        are known of some image (Naeini, Cooper & Hauskrecht 2015)."""
        from scipy.sparse import csr_array

        n = np.bincount(self.bin // MOST_BINS, minlength=self.labels)[:, None]
        place = (self.bin, np.arange(len(self.p)))
        of_bin = csr_array((np.ones(len(self.p), np.float32), place), shape=(self.labels * MOST_BINS, len(self.p)))
        gaps = np.abs((of_bin @ self.p)[:, None] - of_bin @ truth).reshape(self.labels, MOST_BINS, -1).sum(axis=1)
        return (gaps / np.maximum(n, 1))[n[:, 0] > 0].mean(axis=0)


def consistency_resamples(heads: Sequence[CalibratedPredictions], units: np.ndarray, seed: int = 0) -> np.ndarray:
    """[R]: the mean ECE of heads on the same images if their probabilities were right: labels drawn from them. One
    uniform number serves all heads, whose labels are the same ones, and all images of a unit (``units`` [N]: a group,
    or copies of an image): they come true together, as they may, so that many images of few patients show little."""
    judged = [Confidence.of(each) for each in heads]
    first, rng = judged[0], np.random.default_rng(seed)
    unit_and_label = np.stack([units[first.row], first.bin // MOST_BINS])
    _, place = np.unique(unit_and_label, axis=1, return_inverse=True)
    place, parts = place.reshape(-1), list[np.ndarray]()
    block = max(1, CELLS // max(len(place), 1))
    for start in range(0, DRAWS, block):
        u = rng.random((int(place.max(initial=-1)) + 1, min(block, DRAWS - start)), dtype=np.float32)[place]
        parts.append(np.mean([each.calibration_error((u < each.p[:, None]).astype(np.float32)) for each in judged], 0))
    return np.concatenate(parts)


def consistency_interval(sets: Sequence[tuple[Sequence[CalibratedPredictions], np.ndarray]]) -> tuple[float, float]:
    """The middle 95 % of `consistency_resamples`; of several sets of images of the mean over these."""
    return percentiles(np.mean([consistency_resamples(*each, seed) for seed, each in enumerate(sets)], axis=0))


def reliability(probability: np.ndarray, truth: np.ndarray, units: np.ndarray) -> list[dict[str, float]]:
    """Reliability diagram: of the bins that hold rows the mean probability ``p``, the ``share`` that came true, ``n``
    rows, and Wilson's ``low`` and ``high`` of the share. ``units`` [N]: equal for answers about one image or one group,
    which count once in the interval."""
    bins = mass_bins(probability)
    rows = []
    for b in np.unique(bins):
        own = bins == b
        share, independent = float(truth[own].mean()), len(np.unique(units[own]))
        low, high = wilson(share * independent, independent)
        record = {"p": float(probability[own].mean()), "share": share, "n": int(own.sum())}
        rows.append(record | {"low": low, "high": high})
    return rows
