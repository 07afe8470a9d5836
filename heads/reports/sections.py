"""What stands on the page of a report, as data for its template: the leaderboard, the families in detail, the rest.

Every number comes from the record of a `heads.comparison.Comparison`; curves, confusion and gallery from the runs
themselves. ``record`` is that record, ``family`` one of ``record["families"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from heads.costs import devices_words, shown
from heads.metrics import METRICS, named_by
from heads.reports.charts import Figure, Scale, around, interval, interval_axis
from heads.reports.confusion import confusion_figure, most_confused
from heads.reports.figures import (
    Heard,
    bounds_of,
    curve_figure,
    learning_figure,
    overlay_figure,
    pareto_figures,
    reliability_figure,
)
from heads.reports.gallery import Album, Gallery
from heads.reports.origin import setting_words, train_command
from heads.reports.training_curves import training_figures
from heads.runs import Run
from heads.splits import Leak, dropped_sentence, leaks_sentence
from heads.tables import COMPARED, sentence, title

DETAILED = 3  # families that are shown in full; of the others every number, folded away
SETTINGS = 400  # rows of the table of all settings
LINES = 8  # series in one chart
OVERLAID = 6  # families in the charts and tables that lay them over each other
BAR = Scale(0, 1, 6, 154)  # the inside of a row's interval plot


@dataclass
class Detail:
    """One family in full, or, when there are many, its numbers only."""

    family: dict[str, Any]
    anchor: str
    rank: int
    setting: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confused: list[dict[str, Any]] = field(default_factory=list)
    gallery: Gallery | None = None


def lead_measure(record: dict[str, Any]) -> str:
    """What the choice was made by, as a measure that is in the tables."""
    return named_by(record["select"])


def ranked(families: Sequence[Any], record: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(Family, its record), best on val first, ties by val NLL."""
    lead = lead_measure(record)
    sign = -1 if METRICS[lead].higher else 1

    def key(pair: tuple[Any, dict[str, Any]]) -> tuple[float, float]:
        value, nll = pair[1]["val"].get(lead), pair[1]["val"].get("nll")
        return (np.inf if value is None else sign * value, np.inf if nll is None else nll)

    return sorted(zip(families, record["families"], strict=True), key=key)


def shown_measures(record: dict[str, Any]) -> list[str]:
    """Columns of the leaderboard: what was chosen by, then what the task is judged by."""
    wanted = dict.fromkeys([lead_measure(record), *COMPARED[record["task"]]])
    return [m for m in wanted if m in record["measures"]]


def leaderboard(record: dict[str, Any], families: list[dict[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Rows with their interval plots, all on one scale; ``axis`` stands over them. ``prefix``: of their anchors."""
    lead = lead_measure(record)
    tests = [(family["test"] or {}).get(lead) or {} for family in families]
    controls = [(control["test"] or {}).get(lead) for control in record["controls"]]
    values = [v for t in tests for v in (t.get("value"), t.get("low"), t.get("high")) if v is not None]
    low, high = around([*values, *(c for c in controls if c is not None)], bounds=bounds_of(lead))
    scale = Scale(low, high, BAR.start, BAR.end)
    best = tests[0].get("value") if len(tests) + len(controls) > 1 else None
    plots = [interval(t.get("value"), t.get("low"), t.get("high"), scale, best) for t in tests]
    varied = varied_settings(families)
    rows = [
        {"family": family, "plot": plot, "anchor": f"{prefix}f{i + 1}", "setting": setting_words(varied[i])}
        for i, (family, plot) in enumerate(zip(families, plots, strict=True))
    ]
    dots = [interval(c, None, None, scale, best) for c in controls]
    spreads = [kind for kind in ("seeds", "repeats", "folds") if any((f["spread"] or {}).get(kind) for f in families)]
    return {
        "rows": rows, "controls": list(zip(record["controls"], dots, strict=True)), "axis": interval_axis(scale),
        "measures": shown_measures(record), "lead": lead, "spreads": spreads, "costs": shown(families),
        "device": devices_words(families),
        "fractions": len({f["fraction"] for f in families}) > 1, "views": len({f["view"] for f in families}) > 1,
        "differences": any(f.get("difference") for f in families),
    }  # fmt: skip


def varied_settings(families: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each family's setting what is not the same in all of them."""
    keys = {key for family in families for key in family["setting"]}
    same = {key for key in keys if len({repr(family["setting"].get(key)) for family in families}) == 1}
    several = len(families) > 1
    return [{k: v for k, v in f["setting"].items() if not several or k not in same} for f in families]


def comparing_figures(pairs: list[tuple[Any, dict[str, Any]]], record: dict[str, Any]) -> list[Figure]:
    """What only several families can show: learning curves, cost beside quality, ROC over each other."""
    lead, families = lead_measure(record), [family for _, family in pairs]
    figures = []
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for family in families:
        test = (family["test"] or {}).get(lead)
        if test and test["value"] is not None:
            curves.setdefault((family["view"], family["output"], family["head"]), []).append(
                {"fraction": family["fraction"], **test}
            )
    several = {key: points for key, points in curves.items() if len({p["fraction"] for p in points}) > 1}
    if several:
        views = len({key[0] for key in several}) > 1
        named = [(_series_name(key, views), points) for key, points in list(several.items())[:LINES]]
        figures.append(learning_figure(named, lead, title(lead, record["task"]), _train_images(pairs)))
    full = [family for family in families if family["fraction"] == max(f["fraction"] for f in families)]
    figures += pareto_figures(full, lead, METRICS[lead].higher)
    return figures + overlay(pairs)


def _series_name(key: tuple[Any, ...], views: bool) -> str:
    view, output, head = key
    return f"{head} on {output}" + (f" of {view}" if views else "")


def _train_images(pairs: list[tuple[Any, dict[str, Any]]]) -> int | None:
    """Images of train at fraction 1, where all views have the same number."""
    found = {
        run.config["splits"].get("images", {}).get("train")
        for family, _ in pairs
        if family.fraction == 1
        for run in family.runs[:1]
    }
    return found.pop() if len(found) == 1 else None


def heard_of(runs: Sequence[Run]) -> Heard:
    return [(run, run.answers("test")) for run in runs]


def detail_of(rank: int, family: dict[str, Any], runs: Sequence[Run], album: Album | None, prefix: str = "") -> Detail:
    """``album`` None: numbers only, no charts and no images."""
    detail = Detail(family, f"{prefix}f{rank}", rank, setting_words(family["setting"]), train_command(runs[0]))
    detail.per_class = per_class(family, runs)
    if album is None:
        return detail
    heard = heard_of(runs)
    run = runs[0]
    chosen = [run.positive] if run.task == "binary" else range(len(run.classes))
    points = _operating_point(family) if run.task == "binary" else None
    detail.figures += [curve_figure("roc", heard, chosen, points), curve_figure("pr", heard, chosen, points)]  # type: ignore[arg-type]
    if family.get("calibration"):
        detail.figures.append(reliability_figure(family["calibration"]))
    for part in family.get("external") or []:
        if part.get("calibration"):
            figure = reliability_figure(part["calibration"])
            detail.figures.append(replace(figure, title=f"Reliability on {part['view']}"))
    if run.task != "multilabel":
        detail.figures.insert(0, confusion_figure(heard))
        detail.confused = most_confused(heard) if len(run.classes) > 2 else []
    detail.figures += training_figures(runs)
    detail.gallery = album.gallery(one_of_each_fold(heard))
    return detail


def _operating_point(family: dict[str, Any]) -> dict[str, Any]:
    test = family["test"] or {}
    return {m: (test.get(m) or {}).get("value") for m in ("sensitivity", "specificity", "ppv")}


def one_of_each_fold(heard: Heard) -> Heard:
    """The first run of each fold: no image twice, every call by a head that exists."""
    found: dict[Any, tuple[Run, Any]] = {}
    for run, answers in heard:
        found.setdefault((run.config["splits"].get("fold") or [0])[0], (run, answers))
    return list(found.values())


COUNTS = {"n": "images", "n_known": "known", "n_positive": "positive"}


def per_class(family: dict[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of every class or label: its name, how many images of test (mean over folds), its measures with intervals."""
    rows = []
    for name in runs[0].classes:
        tables = [(run.metrics["test"].get("per_class") or {}).get(name) or {} for run in runs]
        counts = {key: float(np.mean([t[key] for t in tables])) for key in COUNTS if all(key in t for t in tables)}
        rows.append({"class": name, "counts": counts, "test": (family.get("per_class") or {}).get(name) or {}})
    return rows


def overlay(pairs: list[tuple[Any, dict[str, Any]]]) -> list[Figure]:
    """Binary, several families: the ROC of the best over each other."""
    if len(pairs) < 2 or pairs[0][0].runs[0].task != "binary":
        return []
    return [overlay_figure([(numbers["name"], heard_of(family.runs)) for family, numbers in pairs[:OVERLAID]])]


def by_tables(
    record: dict[str, Any], pairs: list[tuple[Any, dict[str, Any]]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """(column, rows): for each value of the column the best families on val, in their order."""
    place = {numbers["name"]: rank for rank, (_, numbers) in enumerate(pairs)}
    tables = []
    for column, rows in (record.get("by") or {}).items():
        shown = [row for row in rows if place[row["family"]] < OVERLAID]
        tables.append((column, sorted(shown, key=lambda row: (row["value"], place[row["family"]]))))
    return tables


def all_warnings(record: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    """What a reader must know before the numbers: leaks first, each sentence once."""
    worst: dict[tuple[Any, ...], int] = {}  # a part of train leaks less than the whole: the most is said
    others = []
    for run in runs:
        splits = run.config["splits"]
        for leak in splits.get("leaks") or []:
            key = (leak["kind"], tuple(leak["splits"]))
            worst[key] = max(worst.get(key, 0), leak["count"])
        if any((splits.get("dropped") or {}).values()):
            others.append(f"{dropped_sentence(splits['dropped'])}.")
        others += [w for w in run.config.get("warnings") or [] if "stand" not in w or " in both " not in w]
    found = [Leak(kind, splits, count) for (kind, splits), count in worst.items()]
    leaks = [f"{leaks_sentence(found)}: these numbers may be too good."] if found else []
    others = [*record["warnings"], *(w for family in record["families"] for w in family["warnings"]), *others]
    return [sentence(words, record) for words in dict.fromkeys([*leaks, *others])]


def settings_rows(record: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Every setting that was tried, best on val first within the order of the record; and how many are left out."""
    rows = record.get("rows") or []
    return rows[:SETTINGS], max(0, len(rows) - SETTINGS)
