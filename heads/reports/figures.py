"""The charts of a report, each from numbers that were computed elsewhere or from the answers of runs.

Notation: n images of test, C classes or labels. A *heard* run is (run, its answers on test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from heads import evaluate as ev
from heads import metrics
from heads.answers import Answers
from heads.costs import CHARTED, COSTS, shown
from heads.families import is_of_pixels
from heads.reports.charts import SERIES, Figure, Plot, around, around_log, plain, style_of
from heads.runs import Run

Heard = Sequence[tuple[Run, Answers]]
UNIT = (-0.02, 1.02)
MANY = 30  # classes above which single curves say less than where most of them run
THIN = 20  # curves of single seeds or folds drawn behind their mean
GRID = np.linspace(0, 1, 201)
FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def bounds_of(measure: str) -> tuple[float, float] | None:
    """Measures that are better when higher end at 1; a chart does not show room above it."""
    return (-1.0, 1.0) if measure in metrics.METRICS and metrics.METRICS[measure].higher else None


def short(words: str, longest: int = 26) -> str:
    words = "".join(c if c.isprintable() else "·" for c in words)
    return words if len(words) <= longest else words[: longest - 1] + "…"


def truth_and_score(task: str, answers: Answers, c: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of class or label c: bool [m] over images where it is known, and the score; None where one side is missing."""
    order = ev.scores(task, answers.z)[:, c]
    known = ~np.isnan(answers.y[:, c]) if task == "multilabel" else np.ones(len(answers.y), bool)
    truth = answers.y[known, c] == 1 if task == "multilabel" else answers.y == c
    return (truth, order[known]) if truth.any() and not truth.all() else None


def _roc_points(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[GRID]: sensitivity at each false positive rate, the steps taken at their upper end."""
    false, found, _ = metrics.roc_curve(score, truth)
    last = np.searchsorted(false, GRID + 1e-12, side="right") - 1
    return found[last]


def _pr_points(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[GRID]: precision at the smallest recall that is at least each of the grid; no line between the steps."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, score)
    precision, recall = precision[::-1], recall[::-1]  # recall from 0 upwards
    return precision[np.minimum(np.searchsorted(recall, GRID - 1e-12), len(recall) - 1)]


def curve_figure(kind: str, heard: Heard, chosen: Sequence[int], measured: dict[str, Any] | None = None) -> Figure:
    """ROC (``kind`` "roc") or precision against recall ("pr") of the classes ``chosen``, every class its own line.

    One class and several runs: the runs thin, their mean (upright: over sensitivities at equal false positive rate)
    thick. ``measured``: {"sensitivity", "specificity", "ppv"} of the threshold chosen on val, drawn as a ring.
    """
    run = heard[0][0]
    points = {"roc": _roc_points, "pr": _pr_points}[kind]
    plot = _curve_plot(kind)
    curves: list[tuple[int, list[np.ndarray]]] = []
    for c in chosen:
        pairs = [pair for _, answers in heard if (pair := truth_and_score(run.task, answers, c))]
        if pairs:
            curves.append((c, [points(*pair) for pair in pairs]))
    if kind == "roc":
        plot.line([(0, 0), (1, 1)], "guide")
    else:
        _prevalence(plot, run, heard[0][1], chosen)
    keys = _draw_curves(plot, curves, run.classes, kind)
    if measured is not None and curves and None not in (x := _operating(kind, measured)):
        plot.dot(*x, "s1", f"threshold chosen on val: {x[0]:.3f}, {x[1]:.3f}", 5, "ring")
        keys.append(("s1", "threshold chosen on val"))
    return _curve_figure(kind, plot, curves, heard, keys)


def _curve_plot(kind: str) -> Plot:
    words = ("1 − specificity", "sensitivity") if kind == "roc" else ("sensitivity (recall)", "precision (PPV)")
    return Plot(UNIT, UNIT, *words, xticks=FIFTHS, height=340.0)


def _operating(kind: str, measured: dict[str, Any]) -> tuple[Any, Any]:
    sensitivity, specificity, ppv = (measured.get(m) for m in ("sensitivity", "specificity", "ppv"))
    if kind == "pr":
        return sensitivity, ppv
    return None if specificity is None else 1 - specificity, sensitivity


def _prevalence(plot: Plot, run: Run, answers: Answers, chosen: Sequence[int]) -> None:
    pairs = [pair for c in chosen if (pair := truth_and_score(run.task, answers, c))]
    if len(pairs) == 1:
        plot.line([(0, pairs[0][0].mean()), (1, pairs[0][0].mean())], "guide")


def _draw_curves(
    plot: Plot, curves: list[tuple[int, list[np.ndarray]]], classes: Sequence[str], kind: str
) -> list[tuple[str, str]]:
    start = [(0.0, 0.0)] if kind == "roc" else []
    if len(curves) > SERIES:
        means = np.array([np.mean(parts, axis=0) for _, parts in curves])
        if len(curves) > MANY:
            low, high = np.quantile(means, [0.1, 0.9], axis=0)
            plot.band(zip(GRID, low, high, strict=True), "grey")
        for mean in means if len(curves) <= MANY else ():
            plot.line([*start, *zip(GRID, mean, strict=True)], "grey", "thin")
        plot.line([*start, *zip(GRID, means.mean(axis=0), strict=True)], "s0")
        which = f"{len(curves)} classes" if len(curves) <= MANY else f"the middle 80 % of {len(curves)} classes"
        return [("grey", which), ("s0", "their mean")]
    for number, (_, parts) in enumerate(curves):
        if len(curves) == 1 and len(parts) > 1:
            for part in parts[:THIN]:
                plot.line([*start, *zip(GRID, part, strict=True)], "s0", "thin")
        plot.line([*start, *zip(GRID, np.mean(parts, axis=0), strict=True)], style_of(number))
    return [(style_of(i), short(classes[c])) for i, (c, _) in enumerate(curves)]


def _curve_figure(kind: str, plot: Plot, curves: list[Any], heard: Heard, keys: list[tuple[str, str]]) -> Figure:
    title = "ROC" if kind == "roc" else "Precision and recall"
    task = heard[0][0].task
    against = "" if task in ("binary", "multilabel") else "Each class against all others. "
    several = f"Mean of {len(heard)} heads, thin lines are the heads. " if len(heard) > 1 and len(curves) == 1 else ""
    several = f"Mean of {len(heard)} heads. " if len(heard) > 1 and not several else several
    dotted = "Dotted: a head that guesses." if kind == "roc" else "Dotted: the share of positives, what guessing gives."
    if not curves:
        return Figure(title, plot.svg(title), "Test has one class only: there is no curve.")
    if kind == "pr" and len(curves) > 1:
        dotted = ""
    return Figure(title, plot.svg(title), f"{against}{several}{dotted}".strip(), tuple(keys))


def overlay_figure(named: Sequence[tuple[str, Heard]]) -> Figure:
    """Binary: the mean ROC of several families over each other."""
    plot = _curve_plot("roc")
    plot.line([(0, 0), (1, 1)], "guide")
    keys = []
    for number, (name, heard) in enumerate(named[:SERIES]):
        positive = heard[0][0].positive
        assert positive is not None, "only binary tasks are laid over each other"
        pairs = [pair for run, answers in heard if (pair := truth_and_score(run.task, answers, positive))]
        if pairs:
            mean = np.mean([_roc_points(*pair) for pair in pairs], axis=0)
            plot.line([(0.0, 0.0), *zip(GRID, mean, strict=True)], style_of(number))
            keys.append((style_of(number), name))
    return Figure("ROC, side by side", plot.svg("ROC of several heads"), "Dotted: a head that guesses.", tuple(keys))


def reliability_figure(calibration: dict[str, Any]) -> Figure:
    """Said probability against what came true, before and after the correction of the protocol."""
    plot = Plot(UNIT, UNIT, "probability that was said", "share that came true", xticks=FIFTHS, height=340.0)
    plot.line([(0, 0), (1, 1)], "guide")
    keys = []
    for when, style, words in (("before", "grey", "before"), ("after", "s0", "after prior correction and temperature")):
        part = calibration.get(when)
        bins = [b for b in (part or {}).get("bins", []) if b["n"] and b["p"] is not None and b["share"] is not None]
        if not part or not bins:
            continue
        plot.line([(b["p"], b["share"]) for b in bins], style)
        for b in bins:
            plot.dot(b["p"], b["share"], style, f"{b['n']:,} said {b['p']:.3f}, came true {b['share']:.3f}")
        error = "" if part.get("ece") is None else f": ECE {part['ece']:.3f}"
        keys.append((style, f"{words}{error}"))
    caption = "On the dotted line probabilities mean what they say; above it the head is too cautious, below too sure."
    return Figure("Reliability", plot.svg("reliability"), caption, tuple(keys))


def learning_figure(
    series: Sequence[tuple[str, list[dict[str, Any]]]], measure: str, title: str, total: int | None
) -> Figure:
    """Test measure with interval over the fraction of train; ``series``: (name, points fraction/value/low/high)."""
    points = [p for _, found in series for p in found]
    fractions = sorted({p["fraction"] for p in points})
    ends = [v for p in points for v in (p["value"], p["low"], p["high"]) if v is not None]
    ticks = fractions if len(fractions) <= 7 else None
    across, up = around_log(fractions), around(ends, bounds=bounds_of(measure))
    words = ("share of the training images", f"test {title}")
    plot = Plot(across, up, *words, xlog=True, xticks=ticks, xformat=lambda v: f"{100 * v:.3g} %")
    keys = []
    for number, (name, found) in enumerate(series):
        style, shift = style_of(number), 1 + 0.012 * (number - (len(series) - 1) / 2)
        places = [
            (p["fraction"] * shift, p) for p in sorted(found, key=lambda p: p["fraction"]) if p["value"] is not None
        ]
        plot.line([(x, p["value"]) for x, p in places], style)
        for x, p in places:
            if p["low"] is not None and p["high"] is not None:
                plot.bar(x, p["low"], p["high"], style)
            plot.dot(x, p["value"], style, f"{name}, {100 * p['fraction']:.3g} % of train: {p['value']:.3f}")
        keys.append((style, name))
    whole = f" 100 % are {total:,} images." if total else ""
    caption = f"How much labelling buys: upright bars are 95 % intervals on test.{whole}"
    return Figure("Learning curves", plot.svg("learning curves"), caption, tuple(keys[:SERIES]))


def pareto_figures(families: Sequence[dict[str, Any]], measure: str, higher: bool) -> list[Figure]:
    """Quality beside each cost that differs between families; those that no other beats on both are joined."""
    title = metrics.METRICS[measure].title
    figures: list[Figure] = []
    both = len({is_of_pixels(f["output"]) for f in families}) == 2
    for cost in (key for key in shown(families) if key in CHARTED):
        words = COSTS[cost].words
        found = [
            (f[cost], f["test"][measure], f["name"]) for f in families if f.get(cost) and _value(f, measure) is not None
        ]
        if len({c for c, _, _ in found}) < 2:
            continue
        ends = [v for _, t, _ in found for v in (t["value"], t["low"], t["high"]) if v is not None]
        across, up = around_log([c for c, _, _ in found]), around(ends, bounds=bounds_of(measure))
        plot = Plot(across, up, words, f"test {title}", xlog=True, xformat=plain)
        front = _front([(c, t["value"]) for c, t, _ in found], higher)
        plot.line(_steps(front), "s1")
        for c, t, name in found:
            style = "s1" if (c, t["value"]) in front else "s0"
            if t["low"] is not None and t["high"] is not None:
                plot.bar(c, t["low"], t["high"], style + " faint")
            plot.dot(c, t["value"], style, f"{name}: {t['value']:.3f} at {plain(c)}")
        caption = _FEATURES if both and cost in ("train_seconds", "seconds_to_best") else ""
        keys = () if figures else _FRONT
        figures.append(Figure(f"{title} and {words}", plot.svg(f"{title} against {words}"), caption, keys))
    return figures


_FEATURES = "Of heads on features without the seconds of extraction, which all of them share."
_FRONT = (("s1", "no other is both cheaper and better"), ("s0", "the others"))


def _value(family: dict[str, Any], measure: str) -> float | None:
    return ((family["test"] or {}).get(measure) or {}).get("value")


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Points that no other beats: by rising cost, each better than all before."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((cost, value))
    return front


def _steps(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    steps: list[tuple[float, float]] = []
    for cost, value in front:
        steps += [(cost, steps[-1][1])] if steps else []
        steps.append((cost, value))
    return steps
