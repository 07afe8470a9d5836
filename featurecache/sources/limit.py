"""``--limit N``: a stratified sample of the images of a dataset, by class within splits, drawn by a seed.

A smaller sample is part of a larger one of the same seed, so what was computed for it is there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from featurecache.errors import BadOption
from featurecache.sources.base import Dataset, safe_name


def limit_images(dataset: Dataset, limit: int, seed: int) -> Dataset:
    """``limit`` of the images in their order; all where there are not more. Raises BadOption."""
    if limit < 1 or seed < 0:
        raise BadOption(f"--limit is at least 1 and --limit-seed at least 0, not {limit} and {seed}.")
    rows = np.sort(_drawn(_strata(dataset), seed)[:limit])
    words = f"{len(rows):,} of {len(dataset):,} images (--limit), drawn by class within splits, seed {seed}"
    understood = "; ".join([*dataset.understood, words])
    source = dataset.source | {"limit": limit, "limit_seed": seed, "understood": understood}
    name = safe_name(f"{dataset.name}-limit-{limit}" + (f"-{seed}" if seed else ""))
    return replace(dataset.at(rows), name=name, source=source, understood=(*dataset.understood, words))


def _strata(dataset: Dataset) -> np.ndarray:
    """int [N]: one number for each class in each split; of several labels the rarest that an image has."""
    labels, splits = dataset.labels, np.unique(np.array(dataset.splits, dtype=str), return_inverse=True)[1]
    if labels.ndim == 2:
        rare_first = np.argsort((labels == 1).sum(0), kind="stable")
        has = (labels == 1)[:, rare_first]
        labels = np.where(has.any(1), rare_first[has.argmax(1)], -1)
    return splits * (labels.max(initial=-1) + 2) + labels + 1


def _drawn(strata: np.ndarray, seed: int) -> np.ndarray:
    """int64 [N]: all rows in the order in which they are drawn: first one of every stratum, then each stratum evenly.
    Where the strata begin to be counted is drawn too: what rounding takes from one it gives to another."""
    rng, place = np.random.default_rng([seed, 8]), np.zeros(len(strata))
    names, sizes = np.unique(strata, return_counts=True)
    offsets = (rng.permutation(len(names)) + 0.5) / len(names)
    for name, size, offset in zip(names, sizes, offsets, strict=True):
        rows = rng.permutation(np.flatnonzero(strata == name))
        place[rows] = (np.arange(size) + offset) / size
        place[rows[0]] = 0
    return np.argsort(place, kind="stable")
