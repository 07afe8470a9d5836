"""Which rows train, which choose, which test.

Given splits are kept. What is missing is drawn: nothing given: 70/15/15; no test: 15 % of train; no val: 15 % of
train (both missing: 15 % each of what there was). Stratified by the labels of the view, so that every task made from
one view has the same test images; rows that share a group or a digest form a *unit* and stay together.

Notation: N rows, U units, S parts (train, val, test), C classes or labels. Part s wants share_s · n_c rows of class c.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurecache.cells import cell, text_of
from featurecache.errors import BadOption, ProtocolError
from heads.data import Task, has_label

if TYPE_CHECKING:
    from featurecache.reader import View

SPLITS = ("train", "val", "test")
SHARE = 0.15  # of train, for a val or a test that the data do not have
FEW = 10  # images of one class below which a val split cannot choose a model


@dataclass(frozen=True)
class Leak:
    """``count`` images or groups (``kind``) that stand in both ``splits``."""

    kind: str
    splits: tuple[str, str]
    count: int


@dataclass(frozen=True)
class Splits:
    """``names``: [N] of "train", "val", "test" or "" (not used), one for every row of the view."""

    names: np.ndarray
    how: str  # one phrase for people: where the splits come from
    drawn: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    leaks: tuple[Leak, ...] = ()  # what still stands in two splits
    dropped: dict[str, int] | None = None  # rows of train and val that were left out for it; None: not asked for

    def rows(self, name: str) -> np.ndarray:
        return np.flatnonzero(self.names == name)


def choose_splits(
    view: View,
    task: Task,
    *,
    split_seed: int = 0,
    resplit_val: bool = False,
    file: str | Path | None = None,
    train_per_class: int | None = None,
    drop_leaks: bool = False,
) -> Splits:
    """The protocol's splits of a view for one task; raises ProtocolError where the data do not allow them.

    ``drop_leaks``: rows of train whose image or group is also in val or test, and rows of val for which it is also in
    test, are not used; every row of test is.
    """
    warnings: list[str] = []
    drawn: tuple[str, ...] = ()
    if file is not None:
        if resplit_val:
            raise BadOption("--splits says which images are val; --resplit-val draws them anew. Give one of them.")
        names, how = read_splits(file, view.ids, warnings), f"as in {file}"
        names[_copies(view)] = ""
    else:
        names, how, drawn = _drawn(view, split_seed, resplit_val, warnings)
    unlabelled = int((~task.usable & ~_copies(view) & ~has_label(np.asarray(view.labels))).sum())
    if unlabelled:
        warnings.append(f"{unlabelled:,} images carry no label and are left out")
    names[~task.usable] = ""
    dropped = _drop(view, names) if drop_leaks else None
    if train_per_class is not None:
        _thin(names, task, train_per_class, split_seed, warnings)
    _check(names, task, drawn, warnings, dropped)
    leaks = _leaks(view, names)
    if leaks:
        where = f"featurecache leaks {shlex.quote(view.label)}; " if file is None else ""
        warnings.append(f"{leaks_sentence(leaks)} ({where}--drop-leaks trains without them)")
    return Splits(names, how, drawn, warnings, leaks, dropped)


def _copies(view: View) -> np.ndarray:
    """bool [N]: augmented copies, which a reader that does not ask for them does not get."""
    if view.versions is None:
        return np.zeros(len(view.ids), dtype=bool)
    return np.asarray(view.versions) != 0


def _drawn(view: View, seed: int, resplit_val: bool, warnings: list[str]) -> tuple[np.ndarray, str, tuple[str, ...]]:
    labels = np.asarray(view.labels)
    names = np.array(list(view.splits), dtype="<U5").reshape(-1)
    names[~has_label(labels) | _copies(view)] = ""
    if resplit_val:
        names[names == "val"] = "train"
    have = {s for s in SPLITS if (names == s).any()}
    if not have:
        names[has_label(labels) & ~_copies(view)] = "train"
    elif "train" not in have:
        raise ProtocolError(f"{view.label} has {' and '.join(sorted(have))} images but none to train on.")
    elif left := int((np.array(list(view.splits)) == "").sum()):
        warnings.append(f"{left:,} images have no split in the data and are left out")
    missing = tuple(s for s in ("val", "test") if s not in have)
    if not missing:
        return names, "as in the data", ()
    pool = np.flatnonzero(names == "train")
    shares = np.array([1 - SHARE * len(missing)] + [SHARE] * len(missing))
    groups = None if view.groups is None else [view.groups[i] for i in pool]
    parts = draw(labels[pool], units_of(np.asarray(view.digests)[pool], groups), shares, seed)
    for part, name in enumerate(missing, start=1):
        names[pool[parts == part]] = name
        if not (parts == part).any():
            raise ProtocolError(
                f"{view.label} has too few separate images or groups ({len(pool):,} rows) "
                f"to draw 15 % of train as {name}."
            )
    if not have:
        how = "70/15/15 drawn"
    elif resplit_val and missing == ("val",):
        how = "val returned to train and 15 % drawn anew"
    else:
        how = f"15 % of train drawn as {' and 15 % as '.join(missing)}"
    return names, f"{how}, split seed {seed}", missing


def units_of(digests: np.ndarray, groups: list[str] | None) -> np.ndarray:
    """int [N]: rows with one number share a digest or a group, directly or through others. Group "" is none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(digests)
    images = np.unique(digests, return_inverse=True)[1].reshape(-1)
    links = [(np.arange(n), n + images)]
    nodes = n + (images.max(initial=-1) + 1)
    if groups is not None:
        names, of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        rows = np.flatnonzero(np.asarray(groups, dtype=str) != "")
        links.append((rows, nodes + of.reshape(-1)[rows]))
        nodes += len(names)
    start, end = np.concatenate([a for a, _ in links]), np.concatenate([b for _, b in links])
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][:n]


def draw(labels: np.ndarray, units: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """int [N]: the part of every row, units whole, stratified; multi-label [N, L] by iterative stratification."""
    rng = np.random.default_rng([seed, 0])
    if labels.ndim == 2:
        return _draw_multilabel(labels == 1, units, shares, rng)
    return _draw_classes(labels, units, shares, rng)


def _draw_classes(labels: np.ndarray, units: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Units of several rows first, largest first, each to the part that lacks its classes most; then row by row
    what is still wanted of every class, the fractions carried from class to class so that the totals fit too."""
    totals = np.bincount(labels)
    want = shares[:, None] * totals  # [S, C]
    part = np.zeros(len(labels), dtype=np.int64)
    _, unit, size = np.unique(units, return_inverse=True, return_counts=True)
    several = np.flatnonzero(size > 1)
    for rows in _members(unit, several, size, rng):
        counts = np.bincount(labels[rows], minlength=len(totals))
        chosen = int(np.argmax(want @ (counts / np.maximum(totals, 1))))
        part[rows] = chosen
        want[chosen] -= counts
    carry = np.zeros(len(shares))
    single = size[unit.reshape(-1)] == 1
    for c in range(len(totals)):
        rows = rng.permutation(np.flatnonzero(single & (labels == c)))
        part[rows] = np.repeat(np.arange(len(shares)), _share_out(len(rows), want[:, c], carry))
    return part


def _members(unit: np.ndarray, chosen: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of the chosen units, largest unit first, equal ones in random order."""
    order = np.argsort(unit.reshape(-1), kind="stable")
    starts = np.concatenate([[0], np.cumsum(size)])
    shuffled = rng.permutation(chosen)
    shuffled = shuffled[np.argsort(-size[shuffled], kind="stable")]
    return [order[starts[u] : starts[u + 1]] for u in shuffled]


def _share_out(n: int, want: np.ndarray, carry: np.ndarray) -> np.ndarray:
    """int [S] with sum n in proportion to ``want``; ``carry`` keeps what rounding owes each part (changed in place)."""
    want = np.maximum(want, 0)
    exact = n * want / want.sum() if want.sum() > 0 else n * np.eye(len(want))[0]
    given = np.floor(exact + 1e-9).astype(int)
    owed = exact - given + carry
    given[np.argsort(-owed, kind="stable")[: n - given.sum()]] += 1
    carry += exact - given
    return given


def _draw_multilabel(
    positive: np.ndarray, units: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Sechidis, Tsoumakas & Vlahavas (2011), algorithm 1, on units: the rarest label left is dealt out first, each
    unit to the part that still wants most of it; ties go to the part that still wants most rows. (The package
    iterative-stratification deals single rows, which would tear units apart.)"""
    _, unit, size = np.unique(units, return_inverse=True, return_counts=True)
    unit = unit.reshape(-1)
    counts = np.zeros((len(size), positive.shape[1]))
    np.add.at(counts, unit, positive)
    want, want_rows = shares[:, None] * counts.sum(0), shares * len(positive)
    part = np.full(len(size), -1)

    def give(u: int, label: int | None) -> None:
        wish = want_rows if label is None else want[:, label]
        s = max(range(len(shares)), key=lambda s: (wish[s], want_rows[s]))
        part[u] = s
        want[s] -= counts[u]
        want_rows[s] -= size[u]

    order = rng.permutation(len(size))
    order = order[np.argsort(-size[order], kind="stable")]
    while (left := (counts[part < 0] > 0).sum(0)).any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        for u in order[(part[order] < 0) & (counts[order, label] > 0)]:
            give(u, label)
    for u in order[part[order] < 0]:
        give(u, None)
    return part[unit]


def _thin(names: np.ndarray, task: Task, per_class: int, seed: int, warnings: list[str]) -> None:
    """Keep ``per_class`` training rows of every class, drawn by the split seed; the others are not used at all."""
    if task.multilabel:
        raise BadOption("--train-per-class is for classes that exclude each other, not for multi-label data.")
    rng = np.random.default_rng([seed, 2])
    for c, name in enumerate(task.classes):
        rows = np.flatnonzero((names == "train") & (task.labels == c))
        if len(rows) < per_class:
            warnings.append(f"train has {len(rows):,} images of {name}, fewer than --train-per-class {per_class:,}")
        names[rng.permutation(rows)[per_class:]] = ""


def _check(
    names: np.ndarray, task: Task, drawn: tuple[str, ...], warnings: list[str], dropped: dict[str, int] | None
) -> None:
    for split in SPLITS:
        if not (names == split).any():
            if dropped and dropped.get(split):
                raise ProtocolError(
                    f"--drop-leaks leaves no image in {split}: all {dropped[split]:,} are, themselves or by their "
                    "group, also in another split. Splits that fit: --splits FILE."
                )
            raise ProtocolError(f"No image of this task is in {split}. Splits that fit: --splits FILE.")
    counts = class_counts(names, task)
    present = [n for n, count in zip(task.classes, counts["train"], strict=True) if count]
    absent = [n for n, count in zip(task.classes, counts["train"], strict=True) if not count]
    if len(present) < 2 and not task.multilabel:
        raise ProtocolError(f"train has images of {present[0]} only; two classes are needed to tell apart.")
    if absent:
        warnings.append(f"train has no image of {_listed(absent)}: no head can learn it")
    if few := [f"{n:,} images of {c}" for c, n in zip(task.classes, counts["val"], strict=True) if n < FEW]:
        way = "they were drawn from train, which has few"
        if "val" not in drawn:
            way = "--resplit-val returns them to train and draws 15 % anew"
        warnings.append(f"val has {_listed(few)}: too few to choose a model ({way})")


def _listed(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def class_counts(names: np.ndarray, task: Task) -> dict[str, list[int]]:
    """Images of every class in every split (multi-label: known positives of every label)."""
    y = task.labels
    if task.multilabel:
        return {s: [int(v) for v in (y[names == s] == 1).sum(0)] for s in SPLITS}
    return {s: [int(v) for v in np.bincount(y[names == s], minlength=len(task.classes))] for s in SPLITS}


def _drop(view: View, names: np.ndarray) -> dict[str, int]:
    """Take the rows that leak out of train and val (``names`` is changed); how many of each."""
    from featurecache.leaks import leaking

    found = leaking(view, names)
    for rows in found.values():
        names[rows] = ""
    return {name: int(rows.sum()) for name, rows in found.items()}


def _leaks(view: View, names: np.ndarray) -> tuple[Leak, ...]:
    """What stands in two splits (only given splits can have such); near-duplicates are not looked for."""
    from featurecache.leaks import exact_leaks

    return tuple(Leak(found.kind, found.splits, found.count) for found in exact_leaks(view, names))


def leaks_sentence(leaks: Sequence[Leak]) -> str:
    """``6 images stand in both train and test, 1 group in both train and val``; test first."""
    parts: list[str] = []
    for leak in sorted(leaks, key=lambda leak: (leak.kind != "image", "test" not in leak.splits)):
        verb = "" if parts else " stand" if leak.count > 1 else " stands"
        noun = leak.kind + ("s" if leak.count > 1 else "")
        parts.append(f"{leak.count:,} {noun}{verb} in both {' and '.join(leak.splits)}")
    return ", ".join(parts)


def dropped_sentence(dropped: dict[str, int]) -> str:
    """What ``--drop-leaks`` did."""
    parts = [f"{dropped['train']:,} of train (also in val or test)", f"{dropped['val']:,} of val (also in test)"]
    lost = [part for part, count in zip(parts, (dropped["train"], dropped["val"]), strict=True) if count]
    if not lost:
        return "--drop-leaks found nothing to leave out: no image or group stands in two splits"
    return f"--drop-leaks left out {' and '.join(lost)}: images or groups of other splits"


def splits_csv(ids: list[str], names: np.ndarray) -> str:
    """Every row of the view with its split as used, "" where it was left out; ``read_splits`` gives it back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "split"])
    writer.writerows(zip(map(cell, ids), names.tolist(), strict=True))
    return text.getvalue()


def read_splits(file: str | Path, ids: list[str], warnings: list[str]) -> np.ndarray:
    """[N] split names of ``ids`` out of a CSV with the columns id and split."""
    path = Path(file)
    if not path.is_file():
        raise BadOption(f"--splits {path}: no such file. A run's splits.csv is one.")
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            table = list(csv.DictReader(handle, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadOption(f"--splits {path} is not a CSV file: {error}") from error
    given: dict[str, str] = {}
    for line, row in enumerate(table, start=2):
        if row.get("id") is None or row.get("split") is None:
            raise BadOption(f"--splits {path} needs the columns id and split; row {line} has them not.")
        if row["split"] not in (*SPLITS, ""):
            raise BadOption(f"--splits {path}, row {line}: {row['split']!r} is none of train, val, test or empty.")
        name = text_of(row["id"])
        if given.setdefault(name, row["split"]) != row["split"]:
            raise BadOption(f"--splits {path} puts {name} into {given[name]!r} and into {row['split']!r}.")
    missing = [i for i in ids if i not in given]
    if missing:
        raise BadOption(
            f"--splits {path} has no row for {len(missing):,} of {len(ids):,} images (the first: {missing[0]})."
        )
    if others := len(given.keys() - set(ids)):
        warnings.append(f"{path} names {others:,} images that are not in this view")
    return np.array([given[i] for i in ids], dtype="<U5")
