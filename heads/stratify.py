"""Stratified sampling by a seed: rows dealt out into shares, folds and nested fractions, units whole.

Rows that share a group or a digest form a *unit*: it is in one part, or not at all.

Notation: N rows, U units, S parts, C classes or labels. Part s wants share_s · n_c rows of class c.
"""

from __future__ import annotations

import numpy as np


def connected_units(digests: np.ndarray, groups: list[str] | None) -> np.ndarray:
    """int [N]: rows with one number share a digest or a group, directly or through others; numbered as they first come.
    Group "" is none."""
    n = len(digests)
    _, first, images = np.unique(digests, return_index=True, return_inverse=True)
    if groups is None or not any(groups):
        return np.argsort(np.argsort(first))[images]
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rows = np.flatnonzero(names[of] != "")
    nodes = n + len(first) + len(names)
    start, end = np.concatenate([np.arange(n), rows]), np.concatenate([n + images, n + len(first) + of[rows]])
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][:n]


def stratified_parts(
    labels: np.ndarray, units: np.ndarray, shares: np.ndarray, seed: int, stream: tuple[int, ...] = (0,)
) -> np.ndarray:
    """int [N]: the part of every row, units whole, stratified; multi-label [N, L] by iterative stratification.

    ``stream``: what is drawn for another purpose is drawn independently."""
    rng = np.random.default_rng([seed, *stream])
    _, unit, size = np.unique(units, return_inverse=True, return_counts=True)
    if labels.ndim == 2:
        return _parts_by_label(labels == 1, unit, size, shares, rng)
    return _parts_by_class(labels, unit, size, shares, rng)


def _parts_by_class(
    labels: np.ndarray, unit: np.ndarray, size: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Units of several rows first, largest first (equal ones in random order), each to the part that lacks its classes
    most; then row by row what is still wanted of every class, the fractions carried from class to class so that the
    totals fit too."""
    totals = np.bincount(labels)
    want = shares[:, None] * totals  # [S, C]
    part = np.zeros(len(labels), dtype=np.int64)
    order, ends = np.argsort(unit, kind="stable"), np.cumsum(size)
    shuffled = rng.permutation(np.flatnonzero(size > 1))
    for u in shuffled[np.argsort(-size[shuffled], kind="stable")]:
        rows = order[ends[u] - size[u] : ends[u]]
        counts = np.bincount(labels[rows], minlength=len(totals))
        chosen = int(np.argmax(want @ (counts / np.maximum(totals, 1))))
        part[rows] = chosen
        want[chosen] -= counts
    carry = np.zeros(len(shares))
    single = size[unit] == 1
    for c in range(len(totals)):
        rows = rng.permutation(np.flatnonzero(single & (labels == c)))
        part[rows] = np.repeat(np.arange(len(shares)), _share_out(len(rows), want[:, c], carry))
    return part


def _share_out(n: int, want: np.ndarray, carry: np.ndarray) -> np.ndarray:
    """int [S] with sum n in proportion to ``want``; ``carry`` keeps what rounding owes each part (changed in place)."""
    want = np.maximum(want, 0)
    exact = n * want / want.sum() if want.sum() > 0 else n * np.eye(len(want))[0]
    counts = np.floor(exact + 1e-9).astype(int)
    owed = exact - counts + carry
    counts[np.argsort(-owed, kind="stable")[: n - counts.sum()]] += 1
    carry += exact - counts
    return counts


def _parts_by_label(
    positive: np.ndarray, unit: np.ndarray, size: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Sechidis, Tsoumakas & Vlahavas (2011), algorithm 1, on units: the rarest label left is dealt out first, each
    unit to the part that still wants most of it; ties go to the part that still wants most rows. (The package
    iterative-stratification deals single rows, which would tear units apart.)"""
    counts = np.zeros((len(size), positive.shape[1]))
    np.add.at(counts, unit, positive)
    want, want_rows = shares[:, None] * counts.sum(0), shares * len(positive)
    part = np.full(len(size), -1)
    order = rng.permutation(len(size))
    order = order[np.argsort(-size[order], kind="stable")]
    while (part < 0).any():
        left = (counts[part < 0] > 0).sum(0)
        units, wish = order[part[order] < 0], want_rows  # those without any label come last
        if left.any():
            label = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
            units, wish = units[counts[units, label] > 0], want[:, label]
        for u in units:
            s = -max((wish[s], want_rows[s], -s) for s in range(len(shares)))[2]
            part[u] = s
            want[s] -= counts[u]
            want_rows[s] -= size[u]
    return part[unit]


def nested_fraction(labels: np.ndarray, units: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: about ``fraction`` of the rows of every class; what 0.01 keeps is among what 0.1 keeps.

    Every unit lies in the stratum of its rarest class (multi-label: rarest positive label), units of a stratum in
    random order. One is kept where, with m rows of it before and s its own, m + o·s <= fraction · (rows of the
    stratum); the offsets o lie evenly in (0, 1), one for each stratum, so that what rounding takes from one class it
    gives to another. The first unit of a stratum is always kept."""
    rng = np.random.default_rng([seed, 6])
    _, unit, size = np.unique(units, return_inverse=True, return_counts=True)
    stratum = _strata(labels, unit)
    keep = np.zeros(len(size), dtype=bool)
    names = np.unique(stratum)
    offsets = (rng.permutation(len(names)) + 0.5) / len(names)
    for name, offset in zip(names, offsets, strict=True):
        members = rng.permutation(np.flatnonzero(stratum == name))
        rows = size[members]
        keep[members] = np.cumsum(rows) - rows + offset * rows <= fraction * rows.sum() + 1e-9
        keep[members[0]] = True
    return keep[unit]


def _strata(labels: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """int [U]: the class of every unit that has fewest rows in all; -1 where it has none (no positive label)."""
    positive = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(labels.max(initial=0) + 1)  # [N, C]
    has = np.zeros((unit.max(initial=-1) + 1, positive.shape[1]), dtype=bool)
    np.logical_or.at(has, unit, positive)
    rare_first = np.argsort(positive.sum(0), kind="stable")
    return np.where(has.any(1), rare_first[has[:, rare_first].argmax(1)], -1)
