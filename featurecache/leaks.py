"""Leaks of a view: what stands in two splits at once, so that a test would measure memory instead of sight.

    image    one image (one digest) in two splits
    group    one group (a patient) in two splits
    near     two images of different splits whose features point the same way (`featurecache.neighbours`)
    labels   one image under two labels, within a split or across

Groups and images are each counted once for a pair of splits, however often they stand there; near-duplicates are pairs
of images, exact copies not among them. Augmented copies and rows without a split take no part (the latter do in
``labels``).

Notation: N rows of the view, K different images or groups, S = 3 splits, n findings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from featurecache.errors import BadOption, NotInCache

if TYPE_CHECKING:
    from featurecache.reader import View

SPLITS = ("train", "val", "test")
_PAIRS = ((0, 1), (0, 2), (1, 2))  # of splits, by number
KINDS = {"image": "same image", "group": "same group", "near": "near-duplicates", "labels": "two labels"}
VECTORS = ("cls", "pooler", "gap", "mean")  # compared by default: the first that the view has
# Measured with an untrained ResNet-18 on PneumoniaMNIST and Medical MNIST at 64 px, mean subtracted: the same picture
# saved again as JPEG (quality 90) has a cosine of at least 0.996, at quality 60 0.983. Of 1.1 million pairs of
# different pictures 1 reaches 0.99 on PneumoniaMNIST and 25 reach 0.98; on Medical MNIST, whose slices resemble each
# other, 21,521 reach 0.99.
THRESHOLD = 0.99


class Labelled(Protocol):
    """Of a view, or of images without features, what exact leaks go by."""

    ids: list[str]
    splits: list[str]
    groups: list[str] | None
    digests: np.ndarray

    @property
    def versions(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Finding:
    """Leaks of one kind between two splits, in the order of the view; near-duplicates the closest first."""

    kind: str
    splits: tuple[str, str]
    count: int  # all there are; of near-duplicates only the closest are kept
    rows: np.ndarray  # int64 [n,2]: the first row in each split
    copies: np.ndarray  # int64 [n,2]: how many rows it has there (labels: under that label)
    cosines: np.ndarray | None = None  # float64 [n]


@dataclass(frozen=True)
class Leaks:
    """What ``find_leaks`` found: a finding for every kind and pair of splits that has some."""

    findings: tuple[Finding, ...]
    output: str | None  # compared for near-duplicates; None: not looked for
    threshold: float

    def __len__(self) -> int:
        return sum(finding.count for finding in self.findings)

    def of(self, kind: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.kind == kind)


def find_leaks(
    view: View,
    *,
    output: str | None = None,
    threshold: float = THRESHOLD,
    most: int = 1000,
    names: np.ndarray | None = None,
    near: bool = True,
    progress: bool = False,
) -> Leaks:
    """All leaks of a view.

    ``names`` [N]: splits other than the view's own. ``output``: a vector; by default cls, else pooler, gap or mean
    (where a view has none of them, near-duplicates are not looked for, and ``Leaks.output`` is None). ``most``: the
    near-duplicates kept for each pair of splits; all are counted. ``near=False``: exact leaks only, which need no
    features. Raises BadOption, NotInCache.
    """
    if not 0 < threshold <= 1:
        raise BadOption(f"--threshold is {threshold:g}; a cosine above 0 and up to 1 is expected.")
    if most < 1:
        raise BadOption(f"--most is {most}; it must be at least 1.")
    chosen = vector_of(view, output) if near else None
    codes = codes_of(view, names)
    images = numbered(np.asarray(view.digests).tolist())
    found = [*shared("image", images, codes), *_groups(view, codes)]
    if chosen is not None:
        found += _near(view, chosen, images, codes, threshold, most, progress)
    found += contradictions(images, np.asarray(view.labels), codes, _plain(view))
    return Leaks(tuple(found), chosen, threshold)


def exact_leaks(view: Labelled, names: np.ndarray) -> list[Finding]:
    """Images and groups that stand in two of the splits ``names`` [N]: no features are read."""
    codes = codes_of(view, names)
    return shared("image", numbered(np.asarray(view.digests).tolist()), codes) + _groups(view, codes)


def leaking(view: Labelled, names: np.ndarray) -> dict[str, np.ndarray]:
    """bool [N] for train and for val: rows of it whose image or group also stands in a later split."""
    codes = codes_of(view, names)
    keys = [numbered(np.asarray(view.digests).tolist())]
    if view.groups is not None:
        keys.append(numbered(view.groups))
    later = np.zeros((2, len(codes)), dtype=bool)
    for key in keys:
        used = (codes >= 0) & (key >= 0)
        there = np.zeros((key.max(initial=-1) + 1, len(SPLITS)), dtype=bool)
        there[key[used], codes[used]] = True
        later[0][used] |= there[key[used], 1] | there[key[used], 2]
        later[1][used] |= there[key[used], 2]
    return {name: (codes == code) & later[code] for code, name in enumerate(("train", "val"))}


def numbered(values: Iterable[Any]) -> np.ndarray:
    """int64 [N]: equal values get one number, in the order of their first appearance; empty ones -1."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) if value else -1 for value in values], dtype=np.int64)


def codes_of(view: Labelled, names: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: 0, 1, 2 for train, val, test; -1 for rows in no split and for augmented copies."""
    words = view.splits if names is None else np.asarray(names).tolist()
    number = {name: code for code, name in enumerate(SPLITS)}
    codes = np.array([number.get(word, -1) for word in words], dtype=np.int64)
    codes[~_plain(view)] = -1
    return codes


def _plain(view: Labelled) -> np.ndarray:
    """bool [N]: rows that are no augmented copies."""
    return np.ones(len(view.ids), bool) if view.versions is None else np.asarray(view.versions) == 0


def _groups(view: Labelled, codes: np.ndarray) -> list[Finding]:
    return [] if view.groups is None else shared("group", numbered(view.groups), codes)


def shared(kind: str, keys: np.ndarray, codes: np.ndarray) -> list[Finding]:
    """A finding for each pair of splits that share a key. keys, codes: int64 [N], -1 takes no part."""
    rows = np.flatnonzero((keys >= 0) & (codes >= 0))
    cells, place, number = np.unique(keys[rows] * 3 + codes[rows], return_index=True, return_counts=True)
    first = np.full((keys.max(initial=-1) + 1, 3), -1)
    count = np.zeros_like(first)
    first.reshape(-1)[cells], count.reshape(-1)[cells] = rows[place], number
    found = []
    for a, b in _PAIRS:
        both = np.flatnonzero((count[:, a] > 0) & (count[:, b] > 0))
        both = both[np.argsort(first[both, a])]
        if len(both):
            pair = (SPLITS[a], SPLITS[b])
            found.append(Finding(kind, pair, len(both), first[both][:, [a, b]], count[both][:, [a, b]]))
    return found


def contradictions(images: np.ndarray, labels: np.ndarray, codes: np.ndarray, plain: np.ndarray) -> list[Finding]:
    """One image under two labels; of several labels the least and the greatest, of multi-label data the first that
    is both given and denied. Unknown labels contradict nothing.

    images, codes int64 [N]; labels int64 [N] (-1 none) or float [N,L] (NaN unknown); plain bool [N].
    """
    values = labels.astype(np.float64) if labels.ndim == 2 else np.where(labels < 0, np.nan, labels)[:, None]
    rows = np.flatnonzero(plain & (images >= 0))
    rows = rows[(np.bincount(images[rows]) > 1)[images[rows]]]
    if not len(rows) or not values.shape[1]:
        return []
    rows = rows[np.argsort(images[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(images[rows], prepend=-1))
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rows)))
    low: np.ndarray = np.fmin.reduceat(values[rows], starts, axis=0)
    high: np.ndarray = np.fmax.reduceat(values[rows], starts, axis=0)
    column = (low < high).argmax(axis=1)
    split: np.ndarray = np.any(low < high, axis=1)
    own = values[rows, column[group]]
    ends = []
    for extreme in (low, high):
        here = np.flatnonzero(split[group] & (own == extreme[group, column[group]]))
        _, place, number = np.unique(group[here], return_index=True, return_counts=True)
        ends.append((rows[here[place]], number))
    return _by_splits(np.stack([e[0] for e in ends], 1), np.stack([e[1] for e in ends], 1), codes)


def _by_splits(rows: np.ndarray, copies: np.ndarray, codes: np.ndarray) -> list[Finding]:
    """Findings of ``labels``, one for every pair of splits; the earlier split stands first, none at the end."""
    order = np.where(codes < 0, len(SPLITS), codes)
    swap = (order[rows[:, 0]] * len(order) + rows[:, 0]) > (order[rows[:, 1]] * len(order) + rows[:, 1])
    rows, copies = (np.where(swap[:, None], pairs[:, ::-1], pairs) for pairs in (rows, copies))
    words = (*SPLITS, "")
    found = []
    for a, b in np.unique(order[rows], axis=0).tolist():
        here = np.flatnonzero((order[rows] == (a, b)).all(axis=1))
        here = here[np.argsort(rows[here, 0])]
        found.append(Finding("labels", (words[a], words[b]), len(here), rows[here], copies[here]))
    return found


def vector_of(view: View, output: str | None) -> str | None:
    """The output whose vectors are compared. Raises BadOption where the one asked for has many vectors an image."""
    if output is not None:
        if len(shape := view.info(output).shape) != 1:
            size = "×".join(str(side) for side in shape)
            raise BadOption(f"--output {output} has [{size}] numbers an image; one vector is compared: cls or mean.")
        return output
    for name in VECTORS:
        try:
            view.info(name)
        except NotInCache:
            continue
        return name
    return None


def _near(
    view: View, output: str, images: np.ndarray, codes: np.ndarray, threshold: float, most: int, progress: bool
) -> list[Finding]:
    from featurecache.neighbours import Directions, closest

    cells = images * 4 + codes + 1
    _, place, again, number = np.unique(cells, return_index=True, return_inverse=True, return_counts=True)
    once = [np.sort(place[codes[place] == code]) for code in range(len(SPLITS))]  # of copies in a split the first
    copies = number[again.reshape(-1)]
    directions = Directions.of(view, output, np.flatnonzero(_plain(view)))
    found = []
    for a, b in _PAIRS:
        if not (len(once[a]) and len(once[b])):
            continue
        what = f"{SPLITS[a]} and {SPLITS[b]}" if progress else ""
        pairs = closest(directions, once[a], once[b], threshold=threshold, most=most, same=images, what=what)
        if pairs.count:
            pair = (SPLITS[a], SPLITS[b])
            found.append(Finding("near", pair, pairs.count, pairs.rows, copies[pairs.rows], pairs.cosines))
    return found
