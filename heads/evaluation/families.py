"""Families of runs: the runs of one setting, and their predictions for test images.

Runs of a family differ in ``seed`` (initialisation), ``split_seed`` (repeats: other splits or another fraction of
train) and ``fold``, and in nothing else; which setting of a sweep is shown is decided in `selection`.

Predictions are ordered by digest, labels and id, so heads on other views of the same images, extracted in any order by
any backbone, can be compared image by image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from featurecache.formatting import abbreviated, exact_number
from heads.evaluation.selection import Row, setting_of
from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.intervals import TestSet
from heads.models.catalogue import HEADS
from heads.runs.records import AT_LIMIT
from heads.runs.run import Run, is_of_pixels, name_of
from heads.settings import Settings
from heads.task import Predictions

NAMED = ("head", "output", "fraction", "folds")  # what a family's own columns say


@dataclass(frozen=True)
class Family:
    """``tried``: the rows of a sweep that the setting was chosen among, on val; () for runs that were trained alone."""

    view: str
    output: str
    head: str
    fraction: float
    runs: tuple[Run, ...]
    tried: tuple[Row, ...] = ()

    @property
    def from_pixels(self) -> bool:
        """Whether it is a network that was trained from pixels."""
        return is_of_pixels(self.output)

    def vary(self, kind: str) -> int:
        """How many seeds, repeats or folds there are."""
        return len({resample_key(run)[DRAWS[kind][1]] for run in self.runs})


# what a spread is over: places in the `resample_key` that are the same within it, and the one that varies
DRAWS: dict[str, tuple[tuple[int, ...], int]] = {"seeds": ((1, 2), 0), "repeats": ((), 1), "folds": ((1,), 2)}


def resample_key(run: Run) -> tuple[int, int, int | None]:
    """Seed, split seed, fold: what tells the runs of a family apart."""
    settings, fold = run.config["settings"], run.config["splits"].get("fold")
    return settings["seed"], settings["split_seed"], fold[0] if fold else None


def families_of(runs: Sequence[Run]) -> list[Family]:
    """Plain runs that differ only in seed, split seed and fold are one family; any other setting is one of its own."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_family_key(run), []).append(run)
    return [
        Family(first.config["view"]["label"], first.output, first.head, fraction_of(first), (first, *others))
        for first, *others in groups.values()
    ]


def _family_key(run: Run) -> str:
    config = run.config
    view = [config["view"].get("fingerprint"), config["view"]["label"]]
    setting = setting_of(config) | {"output": run.output}  # which a setting need not name
    return canonical_json([view, setting, config["classes"], config["positive"]])


def is_same_head(run: Run, other: Run) -> bool:
    """Whether it was trained in the same way on the same images."""
    return _family_key(run) == _family_key(other) and resample_key(run) == resample_key(other)


def fraction_of(run: Run) -> float:
    return float(run.config["splits"].get("fraction") or 1.0)


def shown_controls(runs: Sequence[Run], leading: Sequence[Run]) -> list[dict[str, Any]]:
    """The controls of one of the runs: of those on the test images of the ``leading`` runs, if there are any, the one
    with the most training images. Where they are of one fold or draw among several, of other test images, or of fewer
    training images than another of the runs, their names say so."""
    having = [run for run in runs if run.metrics["controls"]]
    if not having:
        return []
    digests = {run.config["splits"]["digest"] for run in leading}
    train = {id(run): run.config["splits"]["images"]["train"] for run in runs}

    def order(run: Run) -> tuple[Any, ...]:
        seed, *draw = (-1 if n is None else n for n in resample_key(run))
        return run.config["splits"]["digest"] not in digests, -train[id(run)], *draw, seed, str(run.path)

    measured, words = min(having, key=order), list[str]()
    splits, (_, split_seed, _) = measured.config["splits"], resample_key(measured)
    of_fold = f"fold {splits['fold'][0] + 1} of {splits['fold'][1]}" if splits.get("fold") else ""
    if splits["digest"] not in digests:
        words.append("on other test images")
    if len({resample_key(run)[1:] for run in leading}) > 1 and (len(digests) > 1 or fraction_of(measured) < 1):
        several = len({resample_key(run)[1] for run in leading}) > 1
        words += [f"on {of_fold}"] * bool(of_fold) + [f"on split seed {split_seed} alone"] * several
    most = max(train[id(run)] for run in runs if run.config["splits"]["digest"] == splits["digest"])
    if train[id(measured)] < most:
        words.append(f"trained on {train[id(measured)]:,} of {most:,} images")
    more = f" ({', '.join(words)})" if words else ""
    return [control | {"name": control["name"] + more} for control in measured.metrics["controls"]]


def check_comparable(families: Sequence[Family]) -> None:
    """Raises BadOption where the runs do not answer the same question."""
    first = families[0].runs[0]
    for run in (run for family in families for run in family.runs):
        mine, other = ((r.task, list(r.classes), r.config["positive"]) for r in (first, run))
        if mine != other:
            questions = "; ".join(
                f"{kind} of {', '.join(names[:8])}" + (f" (positive: {positive})" if positive else "")
                for kind, names, positive in (mine, other)
            )
            different = f"{first.path} and {run.path} do not answer the same question: {questions}"
            raise BadOption(f"{different}. Compare runs of one task.")


def plain_names(families: Sequence[Any]) -> list[str]:
    """Of families, or of those that a sweep plans, in which each has another name: head and output, view and fraction
    where these are several."""
    views = {family.view for family in families if not is_of_pixels(family.output)}
    fractions = {family.fraction for family in families}
    names = []
    for family in families:
        view = f" of {family.view}" if len(views) > 1 and not is_of_pixels(family.output) else ""
        fraction = f" at {100 * family.fraction:g} %" if len(fractions) > 1 else ""
        names.append(f"{name_of(family.head, family.output)}{view}{fraction}")
    return names


def names_of(families: Sequence[Family]) -> list[str]:
    """A name for each that no other has: head and output, and as much more as is needed to tell them apart."""
    plain = plain_names(families)
    settings = [run_setting(family.runs[0]) for family in families]
    names = []
    for name, setting in zip(plain, settings, strict=True):
        same = [other for other_name, other in zip(plain, settings, strict=True) if other_name == name]
        varied = [key for key in setting if len({repr(other.get(key)) for other in same}) > 1]
        names.append(", ".join([name, *(_option_text(key.replace("_", " "), setting[key]) for key in varied)]))
    repeated = [name for name in names if names.count(name) > 1]
    more = [f" and {len(f.runs) - 1} more" if len(f.runs) > 1 else "" for f in families]
    folders = [f"{f.runs[0].path.name}{others}" for f, others in zip(families, more, strict=True)]
    return [f"{name} ({folder})" if name in repeated else name for name, folder in zip(names, folders, strict=True)]


def _option_text(key: str, value: Any) -> str:
    """``lr 0.001``, ``rlrr``, ``no balance``."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {exact_number(value)}" if isinstance(value, float) else f"{key} {value}"


def run_setting(run: Run) -> dict[str, Any]:
    """Of a run's setting: the numbers that grids vary, what is not as by default, what a solver chose in its path."""
    line = next((row for row in run.history if row["epoch"] == run.config["chosen"]["epoch"]), {})
    setting = display_setting(run.config["settings"])
    if "train_loss" in line:  # trained in steps, not solved
        return setting
    others = ("epoch", "best", "seconds")
    return setting | {key: value for key, value in line.items() if key not in others and not key.startswith("val_")}


def display_setting(settings: dict[str, Any]) -> dict[str, Any]:
    plain = Settings(settings["head"]).to_dict()
    plain |= HEADS[settings["head"]].settings if settings["head"] in HEADS else {}
    always = () if settings["head"] in HEADS and HEADS[settings["head"]].solved else ("lr", "weight_decay")
    own = {key: value for key, value in setting_of({"settings": settings}).items() if key not in NAMED}
    return {key: v for key, v in own.items() if v is not None and (v != plain.get(key) or key in always)}


def remarks_of(family: Family) -> tuple[list[str], list[str]]:
    """What was said in training: of values chosen at the edge of what a solver tried, and the rest, each once; of
    epochs that were not enough `epochs_warning` says."""
    notes = list(dict.fromkeys(note for run in family.runs for note in run.config["notes"]))
    edges = [note for note in notes if "at the edge of what was tried" in note]
    return edges, [note for note in notes if note not in edges and not note.startswith(AT_LIMIT)]


def epochs_warning(names: Sequence[str], families: Sequence[Family]) -> str | None:
    """One sentence, with what to type, for all families with a run that ended at its limit of epochs."""
    ended: dict[str, int] = {}
    for name, family in zip(names, families, strict=True):
        runs = [run for run in family.runs if any(note.startswith(AT_LIMIT) for note in run.config["notes"])]
        if runs:
            ended[name] = max(run.config["settings"]["epochs"] for run in runs)
    if not ended:
        return None
    limits, several = sorted(set(ended.values())), len(ended) > 1
    return (
        f"{abbreviated(list(ended), 4)} ended at {'their' if several else 'its'} limit of "
        f"{' or '.join(f'{n:,}' for n in limits)} epoch{'s' * (limits != [1])} while val still got better; "
        f"--epochs {4 * limits[-1]} lets {'them' if several else 'it'} go on"
    )


def spread(family: Family, names: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """Standard deviations on test: over seeds within a split and fold (initialisation only), over repeats of the means
    of their seeds and folds, over folds within a repeat of the means of their seeds. None where only one is there."""
    tests = {resample_key(run): run.metrics["test"] for run in family.runs}
    values = {m: {key: math.nan if test.get(m) is None else test[m] for key, test in tests.items()} for m in names}
    return {
        kind: {m: _deviation(values[m], *places) for m in names} if family.vary(kind) > 1 else None
        for kind, places in DRAWS.items()
    }


def _deviation(values: dict[Any, float], within: tuple[int, ...], over: int) -> float:
    """Square root of the mean variance within."""
    cells: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for draw, value in values.items():
        cells.setdefault(tuple(draw[i] for i in within), {}).setdefault(draw[over], []).append(value)
    means = [[float(np.mean(v)) for v in cell.values()] for cell in cells.values()]
    variances = [np.var(cell, ddof=1) for cell in means if len(cell) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else math.nan


def seeds_only_warning(families: Sequence[Family]) -> str | None:
    """A sentence where seeds vary and splits do not."""
    seeds = max(family.vary("seeds") for family in families)
    if seeds < 2 or any(family.vary(kind) > 1 for family in families for kind in ("repeats", "folds")):
        return None
    return (
        f"only the initialisation varied ({seeds} seeds): the spread over seeds says nothing about other splits, which "
        "matter several times as much; --repeats or --folds draws them"
    )


@dataclass(frozen=True)
class FamilyPredictions:
    """The sets of test images of one family, and for each the runs with their answers in the common order."""

    test_sets: tuple[TestSet, ...]
    runs: tuple[tuple[Run, ...], ...]
    answers: tuple[tuple[Predictions, ...], ...]

    @property
    def grouped(self) -> bool:
        return all(answers.grouped for same in self.answers for answers in same)


def in_common_order(answers: Predictions) -> tuple[Predictions, str]:
    """The same in the common order, and a key that is equal for equal images with equal labels."""
    y = answers.y.reshape(len(answers.ids), -1)
    columns = [np.array(answers.ids), *np.nan_to_num(y.T[::-1].astype(np.float64), nan=-1), answers.digests]
    order = np.lexsort(columns)
    text = answers.digests[order].tobytes() + y[order].astype(np.float64).tobytes()
    rows = {name: getattr(answers, name)[order] for name in ("digests", "clusters", "y", "logits", "calibrated_logits")}
    key = hashlib.blake2b(text, digest_size=16).hexdigest()
    return replace(answers, ids=[answers.ids[i] for i in order], **rows), key


def collect_predictions(pairs: Iterable[tuple[Run, Predictions]]) -> FamilyPredictions:
    """From runs and what each said of images it was not trained on."""
    groups: dict[str, list[tuple[Run, Predictions]]] = {}
    for run, answers in pairs:
        ordered, key = in_common_order(answers)
        groups.setdefault(key, []).append((run, ordered))
    test_sets = []
    for key, same in groups.items():
        calibrated = tuple(
            CalibratedPredictions(run.task, each.calibrated_logits, each.y, run.positive, run.calibration.thresholds)
            for run, each in same
        )
        train = float(np.mean([run.config["splits"]["images"]["train"] for run, _ in same]))
        test_sets.append(TestSet(key, same[0][1].clusters, calibrated, train))
    runs, ordered_answers = zip(*(zip(*same, strict=True) for same in groups.values()), strict=True)
    return FamilyPredictions(tuple(test_sets), runs, ordered_answers)


def unify_clusters(families: Sequence[FamilyPredictions]) -> list[FamilyPredictions]:
    """One division into clusters for each set of images: that with the fewest, where views know of groups or do not."""
    fewest: dict[str, TestSet] = {}
    for test_set in (test_set for each in families for test_set in each.test_sets):
        if test_set.clusters.strata.size < fewest.setdefault(test_set.key, test_set).clusters.strata.size:
            fewest[test_set.key] = test_set
    return [
        replace(each, test_sets=tuple(replace(s, cluster_ids=fewest[s.key].cluster_ids) for s in each.test_sets))
        for each in families
    ]
