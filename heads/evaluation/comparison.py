"""Comparison of families on the same test images: val for all, test with intervals for what was chosen, paired
differences; as one record that tables and reports are made of.

Nothing is chosen here, and nothing in it was not computed from the answers in the run folders. The interval of a
difference is that of a paired bootstrap: both families are measured on the same resamples, so what is hard for both
cancels. p is exact where it can be (one head each, no clusters): McNemar's for proportions, DeLong's for the AUROC of
two classes; else from the bootstrap. Where each was tested on several sets of images (folds, draws), the differences of
these are taken: Nadeau and Bengio's t. p is corrected by Holm over the families, for each measure by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from featurecache.errors import BadOption, nearest
from featurecache.files.records import nan_to_none
from featurecache.formatting import abbreviated, signed
from heads.evaluation.answer import answer_of
from heads.evaluation.costs import mean_cost
from heads.evaluation.external import external_records, records_of
from heads.evaluation.families import (
    Family,
    FamilyPredictions,
    check_comparable,
    collect_predictions,
    display_setting,
    epochs_warning,
    families_of,
    names_of,
    remarks_of,
    resample_key,
    run_setting,
    seeds_only_warning,
    shown_controls,
    spread,
    unify_clusters,
)
from heads.evaluation.operating_points import Prevalence, calibration_record, check_prevalence, operating_points
from heads.evaluation.selection import Selection, select_setting, selection_key
from heads.evaluation.subgroups import column_values
from heads.metrics.calibration import log_odds
from heads.metrics.classification import macro
from heads.metrics.intervals import FamilyEstimates, SharedResamples, proportion_counts
from heads.metrics.significance import LEVEL, delong, holm, mcnemar, over_test_sets, percentiles, sign_share
from heads.runs.run import Run
from heads.settings import METRICS, title

FEW_CLUSTERS = 20


@dataclass(frozen=True)
class Comparison:
    families: tuple[Family, ...]
    record: dict[str, Any]  # JSON


@dataclass(eq=False)
class _Entry:
    """One family on its way into the record."""

    name: str
    family: Family
    predictions: FamilyPredictions
    estimates: FamilyEstimates
    difference: dict[str, MeasureDifference] | None = None

    @cached_property
    def choice(self) -> Selection | None:
        """Of a sweep."""
        tried = self.family.tried
        return select_setting(tried, self.family.runs[0].config["chosen"]["by"]) if tried else None


def compare(
    families: Sequence[Family | Run], *, reference: str | None = None, resamples: int = 2000,
    prevalence: Prevalence | None = None, by: str | None = None, show_test: str = "chosen", select: str | None = None,
) -> Comparison:  # fmt: skip
    """Families, or runs, side by side: measures with intervals, differences, calibration, one record of plain values.

    ``reference``: the name of a family (or the folder of one of its runs) that the others are compared with; by default
    the one that is best on val. ``select``: the measure that orders them, by default the one that chose.
    ``prevalence``: for PPV and NPV elsewhere, one number or one for each label. ``by``: a column of the data, for
    measures of its values. ``show_test`` "all" shows the test of every row of a sweep. Raises BadOption, RunError."""
    if not families:
        raise BadOption("There is nothing to compare: no family of heads was given.")
    if show_test not in ("chosen", "all"):
        raise BadOption(f'--show-test {show_test}: it is "chosen" or "all".')
    runs = [each for each in families if isinstance(each, Run)]
    families = [each for each in families if isinstance(each, Family)] + families_of(runs)
    check_comparable(families)
    first = families[0].runs[0]
    check_prevalence(first, prevalence)
    select = select or first.config["chosen"]["by"]
    names, resampler = names_of(families), SharedResamples(resamples)
    lead = min(range(len(names)), key=lambda k: selection_key([run.metrics for run in families[k].runs], select))
    reference = _resolve_reference(reference, names, families, lead)
    answers = ([(run, run.answers("test")) for run in family.runs] for family in families)
    predictions = unify_clusters(list(map(collect_predictions, answers)))
    entries = [
        _Entry(name, family, each, FamilyEstimates(each.test_sets, first.classes, resampler))
        for name, family, each in zip(names, families, predictions, strict=True)
    ]
    test = _test_images(entries[0].predictions)
    warnings = _set_differences(entries, reference) + _warnings(entries, test["clusters"])
    records = [_family(entry, prevalence, resampler) for entry in entries]
    warnings += _said_of_several(records)
    record = {
        "task": first.task,
        "classes": list(first.classes),
        "positive": first.config["positive"],
        "select": select,
        "measures": entries[0].estimates.names,
        "untrained": any(run.untrained for family in families for run in family.runs),
        "controls": shown_controls([run for family in families for run in family.runs], families[lead].runs),
        **test,
        "reference": reference,
        "test_seen": sum(max(len(f.tried), len(f.runs)) for f in families) if show_test == "all" else None,
        "families": records,
        "rows": [row for entry in entries for row in _head_rows(entry, show_test == "all")],
        "by": None if by is None else {by: _by(entries, by, resampler)},
        "warnings": warnings,
    }
    record = nan_to_none(record)
    return Comparison(tuple(families), {"answer": answer_of(record), **record})


def _resolve_reference(
    reference: str | None, names: Sequence[str], families: Sequence[Family], lead: int
) -> str | None:
    if reference is None:
        return names[lead] if len(names) > 1 else None
    folders = {str(run.path): name for name, family in zip(names, families, strict=True) for run in family.runs}
    name = folders.get(reference.rstrip("/"), reference)
    if name not in names:
        options = f"{', '.join(names)}.{nearest(reference, names)}"
        raise BadOption(f"--reference {reference} is none of what is compared: {options}")
    return name


def _set_differences(entries: Sequence[_Entry], reference: str | None) -> list[str]:
    """Set each entry's differences to the reference; sentences for what has none."""
    if reference is None:
        return []
    base = next(entry for entry in entries if entry.name == reference)
    others = [entry for entry in entries if entry is not base]
    same = [entry for entry in others if same_sets(entry.estimates, base.estimates)]
    difference = _over_sets if len(base.estimates.test_sets) > 1 else _resampled
    by_family: list[dict[str, MeasureDifference]] = []
    for entry in same:
        differences = (difference(entry.estimates, base.estimates, name) for name in base.estimates.names)
        entry.difference = {each.measure: each for each in differences if each is not None}
        by_family.append(entry.difference)
    for name in base.estimates.names:  # Holm over the families, for each measure by itself
        compared = [own for own in by_family if name in own]
        for own, p in zip(compared, holm([own[name].p for own in compared]), strict=True):
            own[name] = replace(own[name], p_holm=p, families=len(compared))
    apart = [entry.name for entry in others if entry not in same]
    return [f"{name} was not tested on the images of {reference}: no difference is given" for name in apart]


def _warnings(entries: Sequence[_Entry], test: dict[str, Any]) -> list[str]:
    """``test``: the clusters of test."""
    warnings = []
    if any(not same_sets(entry.estimates, entries[0].estimates) for entry in entries[1:]):
        warnings.append("not all of these were tested on the same images: their numbers do not compare")
    if warning := seeds_only_warning([entry.family for entry in entries]):
        warnings.append(warning)
    independent = f"independent {test['unit']}s"
    if test["few"]:
        few = f"test holds {test['n']} {independent}: with fewer than {FEW_CLUSTERS}"
        warnings.append(f"{few} every interval is a rough guess")
    elif rare := _rare(entries[0]):
        warnings.append(f"test has few {independent} of {rare}: what is said of it is a rough guess")
    if warning := epochs_warning([entry.name for entry in entries], [entry.family for entry in entries]):
        warnings.append(warning)
    return warnings


def _said_of_several(families: Sequence[dict[str, Any]]) -> list[str]:
    """What is said of more than one family, once and with their names; it goes out of the families' own warnings, which
    get their names."""
    names: dict[str, list[str]] = {}
    for family in families:
        for note in family["warnings"]:
            names.setdefault(note, []).append(family["name"])
    for family in families:
        family["warnings"] = [f"{family['name']}: {note}" for note in family["warnings"] if len(names[note]) == 1]
        for part in family["external"]:
            family["warnings"] += [f"on {part['view']}: {words}" for words in part["warnings"]]
    return [f"{abbreviated(of, 4)}: {note}" for note, of in names.items() if len(of) > 1]


def _rare(entry: _Entry) -> str:
    """Classes (or labels) that fewer than 20 clusters of test show."""
    first, classes = entry.predictions.test_sets[0], entry.estimates.classes
    positive = (first.y == 1 if first.y.ndim == 2 else first.y[:, None] == np.arange(len(classes))).T
    counts = [(first.clusters.among(rows), name) for rows, name in zip(positive, classes, strict=True)]
    counts.sort(key=lambda pair: pair[0])
    return abbreviated([f"{name} ({n})" for n, name in counts if n < FEW_CLUSTERS], 4)


def _test_images(predictions: FamilyPredictions) -> dict[str, Any]:
    """Images and clusters of a family's test images; of several sets, all in them."""
    images = {name for answers in predictions.answers for name in answers[0].ids}
    n = len({int(c) for test_set in predictions.test_sets for c in test_set.cluster_ids})
    unit = "group" if predictions.grouped else "image"
    return {"n_test": len(images), "clusters": {"n": n, "unit": unit, "few": n < FEW_CLUSTERS}}


def _family(entry: _Entry, prevalence: Prevalence | None, resampler: SharedResamples) -> dict[str, Any]:
    family, estimates, run, choice = entry.family, entry.estimates, entry.family.runs[0], entry.choice
    test, external = estimates.all(), external_records(family, resampler)
    val = {m: [each.metrics["val"].get(m) for each in family.runs] for m in estimates.names}
    edges, notes = remarks_of(family)
    flat = [title(m, run.task) for m, e in test.items() if e.low == e.high and e.method and "bootstrap" in e.method]
    same = "came out the same in every resample; an interval without width is no certainty"
    return {
        "name": entry.name,
        "view": family.view,
        "output": family.output,
        "head": family.head,
        "fraction": family.fraction,
        "setting": run_setting(run),
        "tried": choice.tried if choice else 1,
        "edges": [*(choice.edges if choice else ()), *edges],
        **{kind: family.vary(kind) for kind in ("seeds", "repeats")},
        "folds": family.vary("folds") if run.config["splits"].get("fold") else None,
        "parameters": run.config["parameters"],
        **mean_cost(family.runs),
        "val": {m: None if None in values else float(np.mean(values)) for m, values in val.items()},
        "test": records_of(test),
        "per_class": {name: records_of(measures) for name, measures in estimates.of_classes().items()},
        "spread": spread(family, estimates.names),
        "calibration": calibration_record(entry.predictions),
        "operating": operating_points(run, estimates, prevalence),
        "difference": None if entry.difference is None else records_of(entry.difference),
        "external": external,
        "runs": [str(each.path) for each in family.runs],
        "warnings": [*notes, *[f"{', '.join(flat)} {same}"] * bool(flat)],
    }


def _head_rows(entry: _Entry, all_shown: bool) -> list[dict[str, Any]]:
    """A line for each head that was trained: val always, test where its setting was chosen or all are shown."""
    keys = ("setting", "seed", "repeat", "fold", "chosen")
    rows: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((run_setting(run), *resample_key(run), True), run.metrics) for run in entry.family.runs
    ]
    if entry.family.tried:
        chosen = {id(row) for row in entry.choice.rows} if entry.choice else set()
        rows = [
            ((display_setting(s := row["settings"]), s["seed"], row["repeat"], row["fold"], id(row) in chosen), row)
            for row in entry.family.tried
        ]
    return [
        {"family": entry.name, **dict(zip(keys, values, strict=True)), "val": _scalars(measured["val"]),
         "test": _scalars(measured["test"]) if all_shown or values[-1] else None}
        for values, measured in rows
    ]  # fmt: skip


def _scalars(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if measured is None else {k: v for k, v in measured.items() if isinstance(v, float | None)}


def _by(entries: Sequence[_Entry], column: str, resampler: SharedResamples) -> list[dict[str, Any]]:
    """Measures of each family on the test images of each value of a column of the data."""
    rows = []
    for entry in entries:
        values = column_values(entry.predictions, column)
        for value in sorted({v for each in values for v in each}):
            masks = [np.array([v == value for v in each]) for each in values]
            masked = zip(entry.predictions.test_sets, masks, strict=True)
            test_sets = [each.where(mask, f"{column}={value}") for each, mask in masked if mask.any()]
            test = records_of(FamilyEstimates(test_sets, entry.estimates.classes, resampler).all())
            rows.append({"family": entry.name, "value": value, "n": sum(map(len, test_sets)), "test": test})
    return sorted(rows, key=lambda row: row["value"])


MCNEMAR = ("accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class MeasureDifference:
    """Of a measure, this family minus the reference."""

    measure: str
    value: float
    low: float
    high: float
    p: float
    method: str
    p_holm: float = math.nan
    families: int = 1  # that Holm's correction is over

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "measure"} | {"words": self.words}

    @property
    def words(self) -> str:
        """Better or worse where the interval leaves out 0 and Holm's p is small; where these differ, what decides."""
        numbers = f"{signed(self.value)} [{signed(self.low)}, {signed(self.high)}]"
        holds_0, small = self.low <= 0 <= self.high, self.p_holm < 1 - LEVEL
        if holds_0 or not small:
            why = "" if holds_0 is not small else f", p {self.p_holm:.2g} by Holm over {self.families}"
            return f"no difference shown: {numbers}{why}"
        better = (self.value > 0) is METRICS[self.measure].higher
        return f"{'better' if better else 'worse'}: {numbers}"


def same_sets(a: FamilyEstimates, b: FamilyEstimates) -> bool:
    return {each.key for each in a.test_sets} == {each.key for each in b.test_sets}


def _resampled(a: FamilyEstimates, b: FamilyEstimates, name: str) -> MeasureDifference | None:
    value = a.value(name) - b.value(name)
    resampled = a.resampled(name) - b.resampled(name)
    if math.isnan(value) or np.isnan(resampled).mean() > 0.5:
        return None
    low, high = percentiles(resampled)
    exact = _exact(a, b, name)
    method = "paired cluster bootstrap" if a.clustered else "paired bootstrap"
    p, method = (sign_share(resampled), method) if exact is None else (exact[0], f"{method}, p by {exact[1]}")
    return MeasureDifference(name, value, low, high, p, method)


def _exact(a: FamilyEstimates, b: FamilyEstimates, name: str) -> tuple[float, str] | None:
    (one, *more), (other, *others) = (each.test_sets[0].predictions for each in (a, b))
    if a.clustered or more or others:
        return None
    if name == "auroc" and one.kind == "binary":
        truth = one.y == one.positive
        if min(truth.sum(), (~truth).sum()) < 2:
            return None
        first_score, second_score = (log_odds(s.kind, s.z)[:, s.positive] for s in (one, other))
        return delong(first_score, second_score, truth)[2], "DeLong"
    if name in MCNEMAR and not one.multilabel:
        right, of = proportion_counts(one, name, None)
        return mcnemar(right[of], proportion_counts(other, name, None)[0][of]), "exact McNemar"
    return None


def _over_sets(a: FamilyEstimates, b: FamilyEstimates, name: str) -> MeasureDifference | None:
    index = {each.key: j for j, each in enumerate(b.test_sets)}
    values = a.by_test_set(name) - b.by_test_set(name)[[index[each.key] for each in a.test_sets]]
    test = over_test_sets(values, a.ratio)
    return None if test is None else MeasureDifference(name, macro(values), *test)
