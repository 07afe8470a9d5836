"""Train, val and test splits, folds and fractions: which rows train, which choose, which test.

Given splits stay. What is missing is drawn: nothing given: 70/15/15; no test: 15 % of train; no val: 15 % of train
(both missing: 15 % each of what there was). Stratified by the labels of the view, so that every task made from one view
has the same test images; rows that share a group or a digest stay together (`heads.stratify`). Folds are drawn over
what is no given test: in fold k of n that part is called test, and val is 15 % of the others; a given test is not used
at all. A fraction is taken of train at the very end, when val and test are settled.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featurecache.errors import BadOption, ProtocolError
from featurecache.files.delimited import read_delimited
from featurecache.files.records import check_part_of_a_run
from featurecache.formatting import abbreviated, cell, counted, shell_words, text_of
from featurecache.store.store import cache_words
from heads.settings import SPLITS, Settings
from heads.stratify import nested_fraction, stratified_parts
from heads.task import FeatureView, Leak, Task, clusters_of, is_labelled, plain_rows

SHARE = 0.15  # of train, for a val or a test that the data do not have
FEW = 10  # images of one class below which a val split cannot choose a model


@dataclass(frozen=True)
class Splits:
    """``names``: [N] of "train", "val", "test" or "" (not used), one for every row of the view."""

    names: np.ndarray
    how: str  # one phrase for people: where the splits come from
    drawn: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    leaks: tuple[Leak, ...] = ()  # what still stands in two splits
    dropped: dict[str, int] | None = None  # rows of train and val that were left out for it; None: not asked for
    fraction: float = 1.0  # of train that is used
    fold: tuple[int, int] | None = None  # (k, n), k from 0: "test" is part k of n

    def rows(self, name: str) -> np.ndarray:
        return np.flatnonzero(self.names == name)


def choose_splits(view: FeatureView, task: Task, settings: Settings) -> Splits:
    """The protocol's splits of a view for one task; raises ProtocolError where the data do not allow them.

    ``drop_leaks``: rows of train whose image or group is also in val or test, and rows of val for which it is also in
    test, are not used; every row of test is. ``fraction``: of train, nested for one split seed."""
    from featurecache.maintenance.leaks import exact_leaks, leaking

    warnings: list[str] = []
    drawn: tuple[str, ...] = ()
    file, seed, resplit_val, fraction = settings.splits, settings.split_seed, settings.resplit_val, settings.fraction
    fold = None if settings.fold is None or settings.folds is None else (settings.fold, settings.folds)
    if file is not None:
        if resplit_val:
            raise BadOption("--splits says which images are val; --resplit-val draws them anew. Give one of them.")
        names, how = read_splits(file, view.ids, warnings), f"as in {file}"
        names[~plain_rows(view)] = ""
    else:
        names, how, drawn = _drawn(view, seed, resplit_val, warnings, whole=fold is None)
    if fold is not None:
        how, drawn = _fold(view, names, fold, seed, resplit_val), ("val", "test")
    if unlabelled := int((~task.usable & plain_rows(view) & ~is_labelled(np.asarray(view.labels))).sum()):
        carry = "carries no label and is" if unlabelled == 1 else "carry no label and are"
        warnings.append(f"{counted(unlabelled, 'image')} {carry} left out")
    names[~task.usable] = ""
    leaks_of = leaking(view, names) if settings.drop_leaks else {}
    for rows in leaks_of.values():
        names[rows] = ""
    dropped = {name: int(rows.sum()) for name, rows in leaks_of.items()} if settings.drop_leaks else None
    if settings.train_per_class is not None:
        _thin(names, task, settings.train_per_class, seed, warnings)
    if fraction < 1:
        how += f", {fraction * 100:.4g} % of train"
        _fraction(view, names, task, fraction, seed, warnings)
    _check(names, task, drawn, warnings, dropped)
    leaks = tuple(Leak(leak.kind, leak.splits, leak.count) for leak in exact_leaks(view, names))  # no near-duplicates
    if leaks:
        words = [] if file or view.spec.get("kind") == "pixels" else [view.label, *cache_words(view.path.parent.parent)]
        where = f"featurecache leaks {shell_words(words)}; " if words else ""
        warnings.append(f"{leaks_sentence(leaks)} ({where}--drop-leaks trains without them)")
    return Splits(names, how, drawn, warnings, leaks, dropped, fraction, fold)


def _drawn(
    view: FeatureView, seed: int, resplit_val: bool, warnings: list[str], whole: bool
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """``whole``: a split that the data do not have is drawn from train."""
    labels = np.asarray(view.labels)
    names = np.array(list(view.splits), dtype="<U5").reshape(-1)
    names[~is_labelled(labels) | ~plain_rows(view)] = ""
    if resplit_val:
        names[names == "val"] = "train"
    have = {s for s in SPLITS if (names == s).any()}
    if not have:
        names[is_labelled(labels) & plain_rows(view)] = "train"
    elif "train" not in have:
        raise ProtocolError(f"{view.label} has {' and '.join(sorted(have))} images but none to train on.")
    elif left := int((np.array(list(view.splits)) == "").sum()):
        verbs = ("has", "is") if left == 1 else ("have", "are")
        warnings.append(f"{counted(left, 'image')} {verbs[0]} no split in the data and {verbs[1]} left out")
    missing = tuple(s for s in ("val", "test") if s not in have)
    if not missing or not whole:
        return names, "as in the data", ()
    pool = np.flatnonzero(names == "train")
    shares = np.array([1 - SHARE * len(missing)] + [SHARE] * len(missing))
    parts = stratified_parts(labels[pool], clusters_of(view, pool), shares, seed)
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


def _fold(view: FeatureView, names: np.ndarray, fold: tuple[int, int], seed: int, resplit_val: bool) -> str:
    """Part k of n becomes test, 15 % of the rest val (``names`` is changed); a given test is taken out."""
    if resplit_val:
        raise BadOption("--folds draws val anew in every fold; leave --resplit-val out.")
    number, count = fold
    labels, tests = np.asarray(view.labels), int((names == "test").sum())
    names[names == "test"] = ""
    pool = np.flatnonzero(names != "")
    units = clusters_of(view, pool)
    parts = stratified_parts(labels[pool], units, np.full(count, 1 / count), seed, (4,))
    if (few := len(np.unique(parts))) < count:
        raise ProtocolError(
            f"{view.label} has too few separate images or groups ({len(np.unique(units)):,}) for {count} folds: "
            f"{few} of them would hold any. --folds {max(few, 2)}"
        )
    names[pool[parts == number]] = "test"
    rest = np.flatnonzero(parts != number)
    names[pool[rest]] = "train"
    val = stratified_parts(labels[pool[rest]], units[rest], np.array([1 - SHARE, SHARE]), seed, (5, number)) == 1
    names[pool[rest[val]]] = "val"
    note = f"; the given test ({counted(tests, 'image')}) is not touched" if tests else ""
    return f"fold {number + 1} of {count}, val 15 % of the others{note}, split seed {seed}"


def _fraction(
    view: FeatureView, names: np.ndarray, task: Task, fraction: float, seed: int, warnings: list[str]
) -> None:
    """Keep a part of train (``names`` is changed); a class that it leaves without any image is said by `_check`."""
    rows = np.flatnonzero(names == "train")
    if not len(rows):
        return
    share = np.array(class_counts(names, task)["train"]) * fraction
    names[rows[~nested_fraction(task.labels[rows], clusters_of(view, rows), fraction, seed)]] = ""
    counts = class_counts(names, task)["train"]
    if least := [name for name, n, now in zip(task.classes, share, counts, strict=True) if now == 1 and n < 0.5]:
        warnings.append(
            f"{fraction:g} of train has one image of {abbreviated(least, 4)}, whose share is less than half of one"
        )


def _thin(names: np.ndarray, task: Task, per_class: int, seed: int, warnings: list[str]) -> None:
    """Keep ``per_class`` training rows of every class, drawn by the split seed; the others are not used at all."""
    if task.multilabel:
        raise BadOption("--train-per-class is for classes that exclude each other, not for multi-label data.")
    rng = np.random.default_rng([seed, 2])
    for c, name in enumerate(task.classes):
        rows = np.flatnonzero((names == "train") & (task.labels == c))
        if len(rows) < per_class:
            few = f"{counted(len(rows), 'image')} of {name}"
            warnings.append(f"train has {few}, fewer than --train-per-class {per_class:,}")
        names[rng.permutation(rows)[per_class:]] = ""


def _check(
    names: np.ndarray, task: Task, drawn: tuple[str, ...], warnings: list[str], dropped: dict[str, int] | None
) -> None:
    for split in (split for split in SPLITS if not (names == split).any()):
        if dropped and dropped.get(split):
            raise ProtocolError(
                f"--drop-leaks leaves no image in {split}: all {dropped[split]:,} are, themselves or by their "
                "group, also in another split. Splits that fit: --splits FILE."
            )
        raise ProtocolError(f"No image of this task is in {split}. Splits that fit: --splits FILE.")
    counts = class_counts(names, task)
    absent = [name for name, count in zip(task.classes, counts["train"], strict=True) if not count]
    if len(absent) > len(task.classes) - 2 and not task.multilabel:
        (present,) = set(task.classes) - set(absent)
        raise ProtocolError(f"train has images of {present} only; two classes are needed to tell apart.")
    if absent:
        warnings.append(f"train has no image of {abbreviated(absent, 4)}: no head can learn it")
    in_val = zip(task.classes, counts["val"], strict=True)
    if few := [f"{counted(n, 'image')} of {name}" for name, n in in_val if n < FEW]:
        again = "--resplit-val returns them to train and draws 15 % anew"
        way = "drawn at random from few" if "val" in drawn else again
        warnings.append(f"val has {abbreviated(few, 4)}: too few to choose a model ({way})")


def class_counts(names: np.ndarray, task: Task) -> dict[str, list[int]]:
    """Images of every class in every split (multi-label: known positives of every label)."""
    of_split = {split: task.labels[names == split] for split in SPLITS}
    if task.multilabel:
        return {split: (y == 1).sum(0).tolist() for split, y in of_split.items()}
    return {split: np.bincount(y, minlength=len(task.classes)).tolist() for split, y in of_split.items()}


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
    where = {"train": "also in val or test", "val": "also in test"}
    lost = [f"{dropped[name]:,} of {name} ({others})" for name, others in where.items() if dropped[name]]
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


def read_splits(file: str | Path, ids: Sequence[str] | np.ndarray, warnings: list[str]) -> np.ndarray:
    """[N] split names of ``ids`` out of a CSV with the columns id and split."""
    path = Path(file)
    if not path.is_file():
        raise BadOption(f"--splits {path}: no such file. A run's splits.csv is one.")
    check_part_of_a_run(path)
    try:
        (_, header), *table = read_delimited(path, strict=True) or [(1, [])]
    except (OSError, UnicodeError, csv.Error) as error:
        raise BadOption(f"--splits {path} is not a CSV file: {error}") from error
    split_of: dict[str, str] = {}
    for line, cells in table:
        row = dict(zip(header, cells, strict=False))
        if row.get("id") is None or row.get("split") is None:
            raise BadOption(f"--splits {path} needs the columns id and split; row {line} has them not.")
        if row["split"] not in (*SPLITS, ""):
            raise BadOption(f"--splits {path}, row {line}: {row['split']!r} is none of train, val, test or empty.")
        name = text_of(row["id"])
        if split_of.setdefault(name, row["split"]) != row["split"]:
            raise BadOption(f"--splits {path} puts {name} into {split_of[name]!r} and into {row['split']!r}.")
    if missing := [i for i in ids if i not in split_of]:
        raise BadOption(
            f"--splits {path} has no row for {len(missing):,} of {len(ids):,} images (the first: {missing[0]})."
        )
    if others := len(split_of.keys() - set(ids)):
        warnings.append(f"{path} names {counted(others, 'image')} not in this view")
    return np.array([split_of[i] for i in ids], dtype="<U5")
