"""Data leaks of a view: images, groups and near-duplicates in two splits, where a test measures memory and not sight;
and what stands twice within a split, or in data whose splits are still to be drawn.

    image    one image (one digest) in two splits, or several times in one
    group    one group (a patient) in two splits
    near     two images whose features point the same way
    labels   one image under two labels

Groups and images are each counted once for a pair of splits, however often they stand there; near-duplicates are pairs
of images, exact copies not among them. Rows without a split are a set of their own, within which alone is looked.
Augmented copies take no part.

**Near-duplicates.** The features of images of one kind share a large common part (untrained ones almost nothing else):
raw cosines are all near 1 and say nothing. So the mean over the view is taken away first. Few rows make a poor mean:
below a hundred or so, cosines say little. A row that lies on the mean has no direction and is near to nothing. All
pairs are multiplied in float32, block by block. D products u_d·v_d of unit vectors, rounded to float32 and summed in
any order, are off by at most (D+2)·2⁻²⁴/(1 − (D+2)·2⁻²⁴); every pair that could reach the threshold by this is computed
again from the stored numbers in double precision and rounded to nine decimals, so that the result depends neither on
blocks nor on the order of summation.

Notation: N rows of the view, K different images or groups, S = 3 splits, n findings, D width, h pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption
from featurecache.formatting import pair_bar
from featurecache.store.view import View

SPLITS = ("train", "val", "test")
SETS = (*SPLITS, "")  # within which is looked; "": rows without a split
_PAIRS = ((0, 1), (0, 2), (1, 2))  # of splits, by number
KINDS = {"image": "same image", "group": "same group", "near": "near-duplicates", "labels": "two labels"}
VECTORS = ("cls", "pooler", "gap", "mean")  # compared by default: the first that the view has
# Measured with an untrained ResNet-18 on PneumoniaMNIST and Medical MNIST at 64 px, mean subtracted: the same picture
# saved again as JPEG (quality 90) has a cosine of at least 0.996, at quality 60 0.983. Of 1.1 million pairs of
# different pictures 1 reaches 0.99 on PneumoniaMNIST and 25 reach 0.98; on Medical MNIST, whose slices resemble each
# other, 21,521 reach 0.99.
THRESHOLD = 0.99
TILE, BLOCK = 16_384, 2_048  # rows of the first split held at a time; rows on each side of one product
_DECIMALS = 9
_DENSE = 32  # one in so many pairs of rows: from there on all their products are faster


class LeakInput(Protocol):
    """Of a view, or of images without features, what exact leaks go by."""

    ids: np.ndarray
    splits: np.ndarray
    groups: np.ndarray | None
    digests: np.ndarray

    @property
    def versions(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class LeakFinding:
    """Leaks of one kind between two splits, in the order of the view; near-duplicates the closest first."""

    kind: str
    splits: tuple[str, str]
    count: int  # all there are; of near-duplicates only the closest are kept
    rows: np.ndarray  # int64 [n,2]: the first row in each split; of an image twice in one the first two
    copies: np.ndarray  # int64 [n,2]: how many rows it has there (labels: under that label; in one split: 1, others)
    cosines: np.ndarray | None = None  # float64 [n]


@dataclass(frozen=True)
class Leaks:
    """What ``find_leaks`` found: a finding for every kind and pair of splits that has some."""

    findings: tuple[LeakFinding, ...]
    output: str | None  # compared for near-duplicates; None: not looked for
    threshold: float
    splits: np.ndarray  # of every row, as looked at
    not_compared: dict[str, str]  # kind -> why it was not compared between splits

    def __len__(self) -> int:
        return sum(finding.count for finding in self.findings)

    def of(self, kind: str) -> tuple[LeakFinding, ...]:
        return tuple(finding for finding in self.findings if finding.kind == kind)


@exact_arithmetic()
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
    """All leaks of a view. ``names`` [N]: splits other than the view's own. ``output``: a vector; by default cls, else
    pooler, gap or mean (where a view has none of them, near-duplicates are not looked for, and ``Leaks.output`` is
    None). ``most``: the near-duplicates kept for each pair of splits; all are counted. ``near=False``: exact leaks
    only, which need no features. Raises BadOption, NotInCache."""
    if not 0 < threshold <= 1:
        raise BadOption(f"--threshold is {threshold:g}; a cosine above 0 and up to 1 is expected.")
    if most < 1:
        raise BadOption(f"--most is {most}; it must be at least 1.")
    chosen = comparison_vector(view, output) if near else None
    words = view.splits if names is None else np.asarray(names)
    codes, keys, plain = split_codes(view, words), _exact_keys(view), _plain(view)
    sets = np.where(codes < 0, np.where(plain, len(SPLITS), -1), codes)
    findings = [leak for kind, numbers in keys.items() for leak in shared_keys(kind, numbers, codes)]
    findings += image_copies(keys["image"], sets)
    if chosen is not None:
        findings += _near(view, chosen, keys["image"], sets, threshold, most, progress)
    findings += label_conflicts(keys["image"], np.asarray(view.labels), codes, plain)
    return Leaks(tuple(findings), chosen, threshold, words, _not_compared(view, codes, chosen))


def _not_compared(view: View, codes: np.ndarray, output: str | None) -> dict[str, str]:
    reasons = {}
    if len(np.unique(codes[codes >= 0])) < 2:
        few = "fewer than two splits here; --run or --splits gives those that a training drew"
        reasons = dict.fromkeys(("image", "group", "near"), few)
    if output is None:
        reasons["near"] = f"{', '.join(view.outputs)} is no vector"
    if view.groups is None:
        reasons["group"] = "no groups are known"
    return reasons | ({"labels": "no labels are known"} if view.task == "unlabelled" else {})


def exact_leaks(view: LeakInput, names: np.ndarray) -> list[LeakFinding]:
    """Images and groups that stand in two of the splits ``names`` [N]: no features are read."""
    codes = split_codes(view, names)
    return [leak for kind, numbers in _exact_keys(view).items() for leak in shared_keys(kind, numbers, codes)]


def leaking(view: LeakInput, names: np.ndarray) -> dict[str, np.ndarray]:
    """bool [N] for train and for val: rows of it whose image or group also stands in a later split."""
    codes = split_codes(view, names)
    later = np.zeros(len(codes), bool)
    for numbers in _exact_keys(view).values():
        used = (codes >= 0) & (numbers >= 0)
        last = np.full(numbers.max(initial=-1) + 1, -1)  # split of each image or group
        np.maximum.at(last, numbers[used], codes[used])
        later[used] |= last[numbers[used]] > codes[used]
    return {name: (codes == code) & later for code, name in enumerate(("train", "val"))}


def _exact_keys(view: LeakInput) -> dict[str, np.ndarray]:
    """Kind of leak -> int64 [N]: which image a row is, and where groups are known which group it belongs to."""
    groups = {} if view.groups is None else {"group": numbered(view.groups)}
    digests = np.asarray(view.digests)
    _, first, of = np.unique(digests, return_index=True, return_inverse=True)
    images = np.argsort(np.argsort(first))[of]  # in the order of their first appearance
    images[digests == b""] = -1
    return {"image": images, **groups}


def numbered(values: Iterable[Any]) -> np.ndarray:
    """int64 [N]: equal values get one number, in the order of their first appearance; empty ones -1."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) if value else -1 for value in values], dtype=np.int64)


def split_codes(view: LeakInput, names: np.ndarray) -> np.ndarray:
    """int64 [N]: 0, 1, 2 for train, val, test; -1 for rows in no split and for augmented copies."""
    number = {name: code for code, name in enumerate(SPLITS)}
    codes = np.array([number.get(word, -1) for word in np.asarray(names).tolist()], dtype=np.int64)
    codes[~_plain(view)] = -1
    return codes


def _plain(view: LeakInput) -> np.ndarray:
    """bool [N]: rows that are no augmented copies."""
    return np.ones(len(view.digests), bool) if view.versions is None else np.asarray(view.versions) == 0


def shared_keys(kind: str, keys: np.ndarray, codes: np.ndarray) -> list[LeakFinding]:
    """A finding for each pair of splits that share a key. keys, codes: int64 [N], -1 takes no part."""
    rows = np.flatnonzero((keys >= 0) & (codes >= 0))
    cells, place, number = np.unique(keys[rows] * 3 + codes[rows], return_index=True, return_counts=True)
    first = np.full((keys.max(initial=-1) + 1, 3), -1)
    count = np.zeros_like(first)
    first.reshape(-1)[cells], count.reshape(-1)[cells] = rows[place], number
    findings = []
    for a, b in _PAIRS:
        both = np.flatnonzero((count[:, a] > 0) & (count[:, b] > 0))
        both = both[np.argsort(first[both, a])]
        if len(both):
            splits = (SPLITS[a], SPLITS[b])
            findings.append(LeakFinding(kind, splits, len(both), first[both][:, [a, b]], count[both][:, [a, b]]))
    return findings


def image_copies(images: np.ndarray, sets: np.ndarray) -> list[LeakFinding]:
    """A finding for each set that has an image several times. images, sets: int64 [N], -1 takes no part."""
    findings = []
    for number, name in enumerate(SETS):
        rows = np.flatnonzero((sets == number) & (images >= 0))
        rows = rows[np.argsort(images[rows], kind="stable")]
        _, start, count = np.unique(images[rows], return_index=True, return_counts=True)
        start, count = start[count > 1], count[count > 1]
        if len(start):
            order = np.argsort(rows[start])
            pairs = np.stack([rows[start], rows[start + 1]], 1)[order]
            copies = np.stack([np.ones_like(count), count - 1], 1)[order]
            findings.append(LeakFinding("image", (name, name), len(pairs), pairs, copies))
    return findings


def label_conflicts(images: np.ndarray, labels: np.ndarray, codes: np.ndarray, plain: np.ndarray) -> list[LeakFinding]:
    """One image under two labels; of several labels the least and the greatest, of multi-label data the first that is
    both given and denied. Unknown labels contradict nothing. images, codes int64 [N]; labels int64 [N] (-1 none) or
    float [N,L] (NaN unknown); plain bool [N]."""
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


def _by_splits(rows: np.ndarray, copies: np.ndarray, codes: np.ndarray) -> list[LeakFinding]:
    """Findings of ``labels``, one for every pair of splits; the earlier split stands first, none at the end."""
    order = np.where(codes < 0, len(SPLITS), codes)
    swap = (order[rows[:, 0]] * len(order) + rows[:, 0]) > (order[rows[:, 1]] * len(order) + rows[:, 1])
    rows, copies = (np.where(swap[:, None], pairs[:, ::-1], pairs) for pairs in (rows, copies))
    findings = []
    for a, b in np.unique(order[rows], axis=0).tolist():
        here = np.flatnonzero((order[rows] == (a, b)).all(axis=1))
        here = here[np.argsort(rows[here, 0])]
        findings.append(LeakFinding("labels", (SETS[a], SETS[b]), len(here), rows[here], copies[here]))
    return findings


def comparison_vector(view: View, output: str | None) -> str | None:
    """The output whose vectors are compared. Raises NotInCache, and BadOption where it has many vectors an image."""
    if output is None:
        return next((name for name in VECTORS if view.has(name)), None)
    if len(shape := view.info(output).shape) != 1:
        size = "×".join(map(str, shape))
        raise BadOption(f"--output {output} has [{size}] numbers an image; one vector is compared: cls or mean.")
    return output


def _near(
    view: View, output: str, images: np.ndarray, sets: np.ndarray, threshold: float, most: int, progress: bool
) -> list[LeakFinding]:
    cells = images * (len(SETS) + 1) + sets + 1
    _, place, again, number = np.unique(cells, return_index=True, return_inverse=True, return_counts=True)
    once = [np.sort(place[sets[place] == code]) for code in range(len(SETS))]  # of copies in a split the first
    copies = number[again.reshape(-1)]
    features = CentredUnitRows(view, output, np.flatnonzero(_plain(view)))
    findings = []
    for a, b in (*_PAIRS, *((code, code) for code in range(len(SETS)))):
        named = f"{SETS[a]} and {SETS[b]}" if a != b else f"within {SETS[a]}" if SETS[a] else "without a split"
        what = named if progress else ""
        pairs = nearest_pairs(features, once[a], once[b], threshold=threshold, most=most, same=images, what=what)
        if pairs.count:
            splits = (SETS[a], SETS[b])
            findings.append(LeakFinding("near", splits, pairs.count, pairs.rows, copies[pairs.rows], pairs.cosines))
    return findings


class CentredUnitRows:
    """The rows of one output as unit vectors from their mean."""

    def __init__(self, view: View, output: str, rows: np.ndarray) -> None:
        """``mean`` [D] is that of ``rows``; rows that are not finite are not in it. An output that is made of tokens is
        made once and kept in memory, a stored one is read block by block."""
        whole = None if output in view.outputs else view.tensor(output).numpy()
        self._read = lambda rows: view.tensor(output, rows).numpy() if whole is None else whole[rows]
        total, number = np.zeros(view.info(output).shape), 0
        for part in _parts(rows, BLOCK):
            x = self._read(part).astype(np.float64)  # five times as fast as torch's own, of float16
            x = x[np.isfinite(x).all(axis=1)]
            total += x.sum(axis=0)
            number += len(x)
        self.mean = total / max(number, 1)
        self._tiny = 1e-9 * float(np.linalg.norm(self.mean))  # a distance from the mean that is only rounding

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n,D]; zero where a row has no direction."""
        x = self._read(rows).astype(np.float64) - self.mean
        length = np.sqrt(np.einsum("nd,nd->n", x, x))
        none = ~((length > self._tiny) & np.isfinite(length))
        length[none], x[none] = 1, 0
        x /= length[:, None]
        return x


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass
class NearPairs:
    """The closest pairs of rows. All are counted; not many more than ``most`` are held while they are looked for."""

    most: int
    count: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # [n,2], closest first
    cosines: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64 [n]

    def add(self, rows: np.ndarray, cosines: np.ndarray) -> None:
        """rows int64 [h,2], cosines [h]; of equal cosines those of the first rows stay."""
        self.count += len(rows)
        if len(self.rows) == self.most:
            rows, cosines = rows[cosines >= self.cosines[-1]], cosines[cosines >= self.cosines[-1]]
        rows, cosines = np.concatenate([self.rows, rows]), np.concatenate([self.cosines, cosines])
        order = np.lexsort((rows[:, 1], rows[:, 0], -cosines))[: self.most]
        self.rows, self.cosines = rows[order], cosines[order]


def nearest_pairs(
    features: CentredUnitRows, first: np.ndarray, second: np.ndarray, *, threshold: float, most: int,
    same: np.ndarray, what: str = "",
) -> NearPairs:  # fmt: skip
    """The pairs of a row of ``first`` and one of ``second`` (both rising; the same rows: every pair once) with a cosine
    of at least ``threshold``. Rows with one number in ``same`` [N] are copies and no pair. ``what``: name of a progress
    bar, "" for none. Memory: a tile of rows, a block of products, and ``most`` pairs."""
    error = (len(features.mean) + 2) * 2.0**-24
    cut = np.float32(threshold - 0.5 * 10**-_DECIMALS - 1.01 * error / (1 - error) - 2.0**-22)
    pairs, within = NearPairs(most), first is second
    product = np.empty((BLOCK, BLOCK), np.float32)
    with pair_bar(len(first) * len(second), what, bool(what)) as bar:
        for tile in _parts(first, TILE):
            left = [(rows, features[rows].astype(np.float32)) for rows in _parts(tile, BLOCK)]
            for columns in _parts(second, BLOCK):
                exact = features[columns]
                v = exact.astype(np.float32)
                for rows, u in left:
                    bar.update(len(rows) * len(columns))
                    if within and columns[-1] <= rows[0]:
                        continue
                    near = np.matmul(u, v.T, out=product[: len(u), : len(v)])
                    if near.max() < cut:
                        continue
                    a, b = np.divmod(np.flatnonzero(near.reshape(-1) >= cut), len(v))
                    other = same[rows[a]] != same[columns[b]]
                    other &= (rows[a] < columns[b]) | (not within)
                    a, b = a[other], b[other]
                    cosines = exact_cosines(features, rows, exact, a, b)
                    here = cosines >= threshold
                    pairs.add(np.stack([rows[a[here]], columns[b[here]]], 1), cosines[here])
    return pairs


def exact_cosines(
    features: CentredUnitRows, rows: np.ndarray, right: np.ndarray, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """Cosines float64 [h] of rows ``rows[a]`` [h] and of ``right[b]``, float64 [n,D], from the stored numbers, to nine
    decimals; few of all pairs one by one, many as a whole."""
    used, place = np.unique(a, return_inverse=True)
    left = features[rows[used]]
    if len(a) * _DENSE > len(used) * len(right):
        return np.round((left @ right.T)[place, b], _DECIMALS)
    cosines = np.empty(len(a))
    for part in _parts(np.arange(len(a)), BLOCK):
        cosines[part] = np.einsum("hd,hd->h", left[place[part]], right[b[part]])
    return np.round(cosines, _DECIMALS)
