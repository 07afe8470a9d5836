"""Figures of several families on the same axes: ROC, curves by epoch, learning curves, quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featurecache.formatting import counted
from heads.evaluation.costs import CHARTED, COSTS, cost_columns
from heads.evaluation.families import Family
from heads.reports.drawing import SERIES, Figure, Plot, plain, style_of
from heads.reports.figures import (
    GRID,
    ROC,
    TestPredictions,
    is_stepped,
    page_predictions,
    roc_points,
    top_of,
    truths_and_scores,
    unit_square,
)
from heads.runs.run import Run, is_of_pixels
from heads.settings import METRICS, title

OVERLAID = 6  # families in the figures and tables that lay them over each other
APART = 1.5  # the dearest over the cheapest, from which on a cost is worth a chart


def comparing_figures(pairs: Sequence[tuple[Family, dict[str, Any]]], lead: str, task: str) -> list[Figure]:
    """What only several families can show: learning curves, quality against cost, ROC over each other. ``pairs``: each
    with its record, best first."""
    families, figures = [family for _, family in pairs], []
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for family in families:
        test = (family["test"] or {}).get(lead)
        if test and test["value"] is not None:
            key = (family["view"], family["output"], family["head"])
            curves.setdefault(key, []).append({"fraction": family["fraction"], **test})
    if several := {key: points for key, points in curves.items() if len({p["fraction"] for p in points}) > 1}:
        views = len({view for view, _, _ in several}) > 1
        names = [f"{head} on {output}" + (f" of {view}" if views else "") for view, output, head in several]
        named = list(zip(names, several.values(), strict=True))[: len(SERIES)]
        whole = [family.runs[0].config["splits"].get("images", {}) for family, _ in pairs if family.fraction == 1]
        counts = {images.get("train") for images in whole}
        total = counts.pop() if len(counts) == 1 else None  # where all views have the same number
        figures.append(learning_figure(named, lead, title(lead, task), total))
    largest = max(family["fraction"] for family in families)
    figures += pareto_figures([family for family in families if family["fraction"] == largest], lead, task)
    if "roc" in overlaid_kinds(pairs, task):
        best = [(numbers, page_predictions(family.runs)) for family, numbers in pairs[:OVERLAID]]
        figures.append(overlay_figure(best))
    return figures + _side_by_side(pairs, task)


def overlaid_kinds(pairs: Sequence[tuple[Family, dict[str, Any]]], task: str) -> set[str]:
    """What `comparing_figures` lays over each other, so that no head shows it again: "roc", "training"."""
    kinds = {"roc": len(pairs) > 1 and task == "binary", "training": len(_stepped(pairs)) > 1}
    return {kind for kind, there in kinds.items() if there}


def _stepped(pairs: Sequence[tuple[Family, dict[str, Any]]]) -> Sequence[tuple[Family, dict[str, Any]]]:
    return [pair for pair in pairs if is_stepped(pair[0].runs[0])][:OVERLAID]


def _side_by_side(pairs: Sequence[tuple[Family, dict[str, Any]]], task: str) -> list[Figure]:
    """Loss and criterion by epoch of the best families that were trained in steps, the first run of each."""
    stepped = _stepped(pairs)
    if len(stepped) < 2:
        return []
    shown, what = {numbers["name"]: family.runs[0] for family, numbers in stepped}, "Training, side by side:"
    figures = [overlaid_curves(shown, f"{what} loss", "loss", "loss", y=(0.0, None))]
    by, *others = {run.config["chosen"]["by"] for run in shown.values()}
    if by != "loss" and not others:
        name = f"val {title(by, task)}"
        figures.append(overlaid_curves(shown, f"{what} {name}", by, name, least=0.02, top=top_of(by)))
    return figures


def overlay_figure(named: Sequence[tuple[dict[str, Any], TestPredictions]]) -> Figure:
    """Binary: the mean ROC of several families (their records) over each other, rings where their thresholds are."""
    plot, keys = unit_square(*ROC), []
    plot.line([(0, 0), (1, 1)], "guide")
    for number, (family, predictions) in enumerate(named):
        name, test = family["name"], {m: each["value"] for m, each in (family["test"] or {}).items()}
        positive = predictions[0][0].positive
        assert positive is not None, "only binary tasks are laid over each other"
        if pairs := truths_and_scores(predictions, positive):
            mean = np.mean([roc_points(*pair) for pair in pairs], axis=0)
            plot.line([(0.0, 0.0), *zip(GRID, mean, strict=True)], style_of(number))
            area = test.get("auroc")
            keys.append((style_of(number), name if area is None else f"{name}: AUROC {area:.3f}"))
            x, y = test.get("specificity"), test.get("sensitivity")
            if x is not None and y is not None:
                words = f"{name}: specificity {x:.3f}, sensitivity {y:.3f}"
                plot.dot(1 - x, y, style_of(number), words, radius=4, ring=True)
    return Figure("ROC, side by side", plot, "Rings: thresholds chosen on val. Dotted: guessing.", tuple(keys))


def overlaid_curves(runs: dict[str, Run], what: str, column: str, ylabel: str, **ranges: Any) -> Figure:
    """``column`` of val by epoch of several runs, thick, and where it is there that of train, thin."""
    last = max(row["epoch"] for run in runs.values() for row in run.history)
    plot = Plot("epoch", ylabel, x=(0.5, last + 0.5), xwhole=True, **ranges)
    for number, run in enumerate(runs.values()):
        for split in ("train", "val"):
            points = [(row["epoch"], row[name]) for row in run.history if (name := f"{split}_{column}") in row]
            if points:
                plot.line(points, style_of(number), thin=split == "train")
            if len(points) == 1:
                plot.dot(*points[0], style_of(number))
    both = any(f"train_{column}" in run.history[0] for run in runs.values())
    keys = tuple((style_of(number), name) for number, name in enumerate(runs))
    return Figure(what, plot, "Thick: val. Thin: train." if both else "", keys)


def learning_figure(
    series: Sequence[tuple[str, list[dict[str, Any]]]], measure: str, title: str, total: int | None
) -> Figure:
    """Test measure with interval over the fraction of train; ``series``: (name, points fraction/value/low/high)."""
    fractions = sorted({p["fraction"] for _, each in series for p in each})
    plot = Plot(
        "share of the training images", f"test {title}", top=top_of(measure), xlog=True,
        xticks=fractions if len(fractions) <= 7 else None, xformat=lambda v, _: f"{100 * v:.3g} %",
    )  # fmt: skip
    for number, (name, each) in enumerate(series):
        style, shift = style_of(number), 1 + 0.012 * (number - (len(series) - 1) / 2)
        defined = [p for p in sorted(each, key=lambda p: p["fraction"]) if p["value"] is not None]
        plot.line([(p["fraction"] * shift, p["value"]) for p in defined], style)
        for p in defined:
            plot.bar(p["fraction"] * shift, p["low"], p["high"], style)
            hint = f"{name}, {100 * p['fraction']:.3g} % of train: {p['value']:.3f}"
            plot.dot(p["fraction"] * shift, p["value"], style, hint)
    keys = [(style_of(number), name) for number, (name, _) in enumerate(series[: len(SERIES)])]
    whole = f" 100 % are {counted(total, 'image')}." if total else ""
    caption = f"How much labelling buys: upright bars are 95 % intervals on test.{whole}"
    return Figure("Learning curves", plot, caption, tuple(keys))


def pareto_figures(families: Sequence[dict[str, Any]], measure: str, task: str) -> list[Figure]:
    """Quality against each cost that differs between families; those that no other beats on both are joined."""
    quality, higher = title(measure, task), METRICS[measure].higher
    figures: list[Figure] = []
    both = len({is_of_pixels(f["output"]) for f in families}) == 2
    tested = [(f, test) for f in families if (test := (f["test"] or {}).get(measure)) and test["value"] is not None]
    for cost in (key for key in cost_columns(families) if key in CHARTED):
        marks = [(f[cost], test, f["name"]) for f, test in tested if f.get(cost)]
        costs = [c for c, _, _ in marks]
        if not costs or max(costs) < APART * min(costs):
            continue
        plot = Plot(COSTS[cost].words, f"test {quality}", top=top_of(measure), xlog=True)
        front = _front([(c, t["value"]) for c, t, _ in marks], higher)
        corners = [(c, front[i - 1][1]) for i, (c, _) in enumerate(front) if i]
        plot.line(sorted([*front, *corners], key=lambda p: (p[0], p[1] if higher else -p[1])), "s1")
        for c, t, name in marks:
            style = "s1" if (c, t["value"]) in front else "s0"
            plot.bar(c, t["low"], t["high"], style, faint=True)
            plot.dot(c, t["value"], style, f"{name}: {t['value']:.3f} at {plain(c)}")
        extraction = "Of heads on features without the seconds of extraction, which all of them share."
        caption = extraction if both and cost == "train_seconds" else ""
        keys = () if figures else (("s1", "no other is both cheaper and better"), ("s0", "the others"))
        figures.append(Figure(f"{quality[0].upper()}{quality[1:]} and {COSTS[cost].words}", plot, caption, keys))
    return figures


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Points that no other beats: by rising cost, each better than all before."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((cost, value))
    return front
