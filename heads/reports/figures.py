"""Every figure once, by matplotlib: SVG in the page, PNG in the run folder.

The charts of a report, each from numbers that were computed elsewhere or from the answers of runs.

Notation: n images of test, C classes or labels. A *heard* run is (run, its answers on test).

Charts as small pieces of SVG inside a page: no picture files, no script, colours from the page's own style sheet.

Everything that is text comes in through markupsafe and is escaped. Lengths are in units of the drawing, about a CSS
pixel. Colours are classes (``s0`` … ``s7``, ``grey``), so that light, dark and paper are the style sheet's business.

Which class is taken for which: the counts of runs, as a chart and as the pairs that are confused most.

How a head came about, as charts: loss and criterion by epoch, or val along the path of a solved head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from heads.evaluation.costs import CHARTED, COSTS, shown
from heads.metrics import classification
from heads.metrics import classification as ev
from heads.runs.run import Run, is_of_pixels
from heads.task import Predictions

Heard = Sequence[tuple[Run, Predictions]]
UNIT = (-0.02, 1.02)
MANY = 30  # classes above which single curves say less than where most of them run
THIN = 20  # curves of single seeds or folds drawn behind their mean
GRID = np.linspace(0, 1, 201)
FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def bounds_of(measure: str) -> tuple[float, float] | None:
    """Measures that are better when higher end at 1; a chart does not show room above it."""
    return (-1.0, 1.0) if measure in classification.METRICS and classification.METRICS[measure].higher else None


def short(words: str, longest: int = 26) -> str:
    words = "".join(c if c.isprintable() else "·" for c in words)
    return words if len(words) <= longest else words[: longest - 1] + "…"


def truth_and_score(task: str, answers: Predictions, c: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of class or label c: bool [m] over images where it is known, and the score; None where one side is missing."""
    order = ev.measure_scores(task, answers.z)[:, c]
    known = ~np.isnan(answers.y[:, c]) if task == "multilabel" else np.ones(len(answers.y), bool)
    truth = answers.y[known, c] == 1 if task == "multilabel" else answers.y == c
    return (truth, order[known]) if truth.any() and not truth.all() else None


def _roc_points(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[GRID]: sensitivity at each false positive rate, the steps taken at their upper end."""
    false, found, _ = classification.roc_curve(score, truth)
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


def _prevalence(plot: Plot, run: Run, answers: Predictions, chosen: Sequence[int]) -> None:
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
    title = classification.METRICS[measure].title
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


WIDTH, HEIGHT = 360.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 16.0, 12.0, 42.0
SERIES = 8  # colours that are told apart; a ninth series is drawn grey

Point = tuple[float, float]


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element; ``class_`` and ``font_size`` become ``class`` and ``font-size``, what is None is left out."""
    given = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    words = "".join(f' {key}="{_chart_value(value)}"' for key, value in given)
    return Markup(f"<{name}{words}>{Markup('').join(escape(part) for part in inside)}</{name}>")


def _chart_value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(escape(value))


@dataclass(frozen=True)
class Scale:
    """Data ``low`` … ``high`` onto ``start`` … ``end`` of the drawing; ``log``: in powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, -0.05), 1.05) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        return _decades(self.low, self.high) if self.log else _rounds(self.low, self.high, wanted)


def _rounds(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within low … high."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten; where fewer than two lie in the range, 1, 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**p for p in powers if low * 0.999 <= 10.0**p <= high * 1.001]
    if len(found) < 2:
        found = [k * 10.0**p for p in powers for k in (1, 2, 5) if low * 0.999 <= k * 10.0**p <= high * 1.001]
    return found[:: max(1, math.ceil(len(found) / 6))] or [low]


def around(
    values: Iterable[float], least: float = 0.0, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """A range that shows all values with a margin, at least ``least`` wide, within ``bounds``."""
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    margin = max(0.06 * (high - low), (least - (high - low)) / 2, 1e-9 if high > low else 0.05 * abs(high) or 0.5)
    low, high = low - margin, high + margin
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


def around_log(values: Iterable[float]) -> tuple[float, float]:
    found = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(found), max(found)
    room = max((high / low) ** 0.08, 1.25)
    return low / room, high * room


def line(points: Iterable[Point], style: str = "s0", extra: str = "") -> Markup:
    """A line through drawing coordinates; points closer than half a unit to the last one are dropped."""
    kept: list[Point] = []
    points = list(points)
    for i, (x, y) in enumerate(points):
        if not kept or i == len(points) - 1 or math.hypot(x - kept[-1][0], y - kept[-1][1]) >= 0.5:
            kept.append((x, y))
    if not kept:
        return Markup("")
    words = "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)
    return tag("path", d=f"M{words}", class_=f"line {style} {extra}".strip())


def dot(x: float, y: float, style: str = "s0", title: str = "", radius: float = 3.2, extra: str = "") -> Markup:
    said = [tag("title", title)] if title else []
    return tag("circle", *said, cx=x, cy=y, r=radius, class_=f"dot {style} {extra}".strip())


def stroke(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def text(x: float, y: float, words: object, anchor: str = "middle", style: str | None = None, **more: object) -> Markup:
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=style, **more)


def plain(value: float) -> str:
    """A tick: 0.25, 12, 4,000, 1e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Figure:
    """A chart with its title, one sentence that says how to read it, and what its colours mean."""

    title: str
    svg: Markup
    caption: str = ""
    keys: tuple[tuple[str, str], ...] = ()  # (style, words)


@dataclass
class Plot:
    """Two axes and what is drawn between them."""

    x: tuple[float, float]
    y: tuple[float, float]
    xlabel: str
    ylabel: str
    xlog: bool = False
    xticks: Sequence[float] | None = None
    xformat: Callable[[float], str] = plain
    yformat: Callable[[float], str] = plain
    width: float = WIDTH
    height: float = HEIGHT
    marks: list[Markup] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sy = Scale(*self.y, self.height - BOTTOM, TOP)
        longest = max(len(self.yformat(v)) for v in self.sy.ticks())
        self.sx = Scale(*self.x, max(LEFT, 32 + 6 * longest), self.width - RIGHT, self.xlog)

    def at(self, x: float, y: float) -> Point:
        return self.sx(x), self.sy(y)

    def line(self, points: Iterable[Point], style: str = "s0", extra: str = "") -> None:
        self.marks.append(line([self.at(x, y) for x, y in points], style, extra))

    def dot(self, x: float, y: float, style: str = "s0", title: str = "", radius: float = 3.2, extra: str = "") -> None:
        self.marks.append(dot(*self.at(x, y), style, title, radius, extra))

    def band(self, points: Iterable[tuple[float, float, float]], style: str) -> None:
        """The area between two lines: x, low, high."""
        found = list(points)
        edge = [self.at(x, low) for x, low, _ in found] + [self.at(x, high) for x, _, high in reversed(found)]
        words = "L".join(f"{x:.1f} {y:.1f}" for x, y in edge)
        self.marks.append(tag("path", d=f"M{words}z", class_=f"band {style}"))

    def bar(self, x: float, low: float, high: float, style: str = "s0") -> None:
        """An interval, upright."""
        across, (bottom, top) = self.sx(x), (self.sy(low), self.sy(high))
        self.marks.append(tag("path", d=f"M{across:.1f} {bottom:.1f}V{top:.1f}", class_=f"bar {style}"))

    def svg(self, title: str) -> Markup:
        """The drawing; ``title`` is what a screen reader says of it."""
        parts = [*self._grid(), *self.marks, *self._labels()]
        box = f"0 0 {self.width:g} {self.height:g}"
        return tag("svg", *parts, viewBox=box, role="img", aria_label=title, class_="chart")

    def _grid(self) -> list[Markup]:
        left, right, bottom, top = self.sx.start, self.sx.end, self.sy.start, self.sy.end
        parts = [stroke(left, self.sy(v), right, self.sy(v), "grid") for v in self.sy.ticks()]
        parts += [stroke(self.sx(v), bottom, self.sx(v), top, "grid") for v in self._xticks()]
        return [*parts, stroke(left, bottom, right, bottom, "axis")]

    def _xticks(self) -> Sequence[float]:
        return self.sx.ticks() if self.xticks is None else self.xticks

    def _labels(self) -> list[Markup]:
        left, right, bottom, top = self.sx.start, self.sx.end, self.sy.start, self.sy.end
        parts = [text(left - 6, self.sy(v) + 3.5, self.yformat(v), "end", "tick") for v in self.sy.ticks()]
        for value in self._xticks():
            words = self.xformat(value)
            inside = min(self.sx(value), self.width - 3.2 * len(words))  # half of its width; the drawing ends there
            parts.append(text(inside, bottom + 14, words, "middle", "tick"))
        middle = (top + bottom) / 2
        turned = f"rotate(-90 12 {middle:g})"
        parts.append(text((left + right) / 2, self.height - 6, self.xlabel, "middle", "label"))
        return [*parts, text(12.0, middle, self.ylabel, "middle", "label", transform=turned)]


def style_of(number: int) -> str:
    return f"s{number}" if number < SERIES else "grey"


def interval(value: float | None, low: float | None, high: float | None, scale: Scale, mark: float | None) -> Markup:
    """One row of a table: its interval on the scale that all rows share; ``mark``: a line to compare with."""
    parts = [stroke(scale(v), 0, scale(v), 20, "grid") for v in scale.ticks(4)]
    if mark is not None:
        parts.append(stroke(scale(mark), 0, scale(mark), 20, "mark"))
    if low is not None and high is not None:
        parts.append(stroke(scale(low), 10, scale(high), 10, "bar s0"))
    if value is not None:
        parts.append(dot(scale(value), 10.0, "s0"))
    return tag("svg", *parts, viewBox=f"0 0 {scale.start + scale.end:g} 20", class_="interval", aria_hidden="true")


def interval_axis(scale: Scale) -> Markup:
    """The numbers over a column of intervals."""
    parts = [text(scale(v), 9, plain(v), "middle", "tick") for v in scale.ticks(4)]
    return tag("svg", *parts, viewBox=f"0 0 {scale.start + scale.end:g} 12", class_="interval", aria_hidden="true")


NUMBERED = 14  # classes up to which every cell has its number
NAMED = 60  # classes up to which every row has its name
STEPS = 10  # shades
LETTER = 7.2  # units of the drawing, of a name in the widest of the usual fonts (DejaVu Sans)


def counts_of(heard: Heard) -> np.ndarray:
    """[C, C] counts on test: rows are the true class. Several seeds: their mean; folds: all their images together."""
    run = heard[0][0]
    total = np.zeros((len(run.classes), len(run.classes)))
    folds = {(run.config["splits"].get("fold") or [0])[0] for run, _ in heard}
    for each, answers in heard:
        p = ev.probabilities(each.task, answers.z)
        called = ev.predict_labels(each.task, p, each.calibration.thresholds, each.positive)
        total += classification.confusion_matrix(answers.y, called, len(each.classes))
    return total * len(folds) / len(heard)


def confusion_figure(heard: Heard) -> Figure:
    classes, counts = heard[0][0].classes, counts_of(heard)
    side = len(classes)
    whole = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0)
    left = 14 + LETTER * max(len(short(name, 18)) for name in classes) if side <= NAMED else 20.0
    cell = max(min(76.0 if side < 5 else 44.0, 300 / side), 3.0)
    size = cell * side
    parts = [_shades(share, cell, left), stroke(left, 18.0, left + size, 18.0, "axis")]
    if side <= NUMBERED:
        parts += _numbers(counts, share, cell, left)
    parts += _names(classes, cell, left)
    below = _room_below(classes, cell)
    parts += [text(left + size / 2, 10, "called", "middle", "label")]
    box = f"0 0 {max(left + size + 8, 330):g} {18 + size + below:g}"
    title = "Confusion matrix"
    svg = tag("svg", *parts, viewBox=box, role="img", aria_label=title, class_="chart")
    folds = {(run.config["splits"].get("fold") or [0])[0] for run, _ in heard}
    mean = f" Counts are the mean of {len(heard) // len(folds)} heads." if len(heard) > len(folds) else ""
    together = f" All {len(folds)} folds together." if len(folds) > 1 else ""
    caption = f"A row is a true class; the shade is the share of that class, the number counts images.{mean}{together}"
    return Figure(title, svg, caption)


def _shades(share: np.ndarray, cell: float, left: float) -> Any:
    """One path for each of ten shades, so that 200 classes are no 40,000 elements."""
    level = np.ceil(share * STEPS - 1e-9).astype(int)
    paths = []
    for step in range(1, STEPS + 1):
        places = np.argwhere(level == step)
        if len(places):
            d = "".join(
                f"M{left + j * cell:.1f} {18 + i * cell:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z" for i, j in places
            )
            paths.append(tag("path", d=d, class_="heat", fill_opacity=f"{step / STEPS:g}"))
    return tag("g", *paths)


def _numbers(counts: np.ndarray, share: np.ndarray, cell: float, left: float) -> list[Any]:
    parts = []
    small = "small" if counts.max() >= 1000 or cell < 26 else ""
    for (i, j), count in np.ndenumerate(counts):
        words = f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"
        style = "on" if share[i, j] > 0.55 else "off" if count else "none"
        x, y = left + (j + 0.5) * cell, 18 + (i + 0.5) * cell + 3.5
        parts.append(text(x, y, words, "middle", f"count {style} {small}".strip()))
    return parts


def _turned(classes: tuple[str, ...], cell: float) -> bool:
    """Whether the names of the columns do not fit beside each other."""
    return 5.8 * max(len(short(name, 18)) for name in classes) > cell - 2


def _room_below(classes: tuple[str, ...], cell: float) -> float:
    if len(classes) > NAMED:
        return 8.0
    return 18 + 5.2 * max(len(short(name, 18)) for name in classes) if _turned(classes, cell) else 20.0


def _names(classes: tuple[str, ...], cell: float, left: float) -> list[Any]:
    if len(classes) > NAMED:
        return [text(12.0, 18 + cell * len(classes) / 2, "true", "middle", "label", transform="")]
    parts = []
    end = 18 + cell * len(classes)
    style = "tick" if cell >= 11 else "tick tiny"
    for i, name in enumerate(classes):
        middle = (i + 0.5) * cell
        parts.append(text(left - 5, 18 + middle + 3.5, short(name, 18), "end", style))
        x = left + middle
        if _turned(classes, cell):
            turned = f"rotate(-60 {x:.1f} {end + 10:.1f})"
            parts.append(text(x, end + 10, short(name, 18), "end", style, transform=turned))
        else:
            parts.append(text(x, end + 13, short(name, 18), "middle", style))
    return parts


def most_confused(heard: Heard, most: int = 12) -> list[dict[str, Any]]:
    """The pairs of classes with the most mistakes: {"true", "called", "count", "share" of the true class}."""
    classes, counts = heard[0][0].classes, counts_of(heard)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(k), len(classes)) for k in order]
    return [
        {"true": classes[i], "called": classes[j], "count": wrong[i, j], "share": wrong[i, j] / counts[i].sum()}
        for i, j in pairs
        if wrong[i, j] > 0
    ]


def training_figures(runs: Sequence[Run]) -> list[Figure]:
    """Loss and criterion by epoch; of a solved head the criterion along its path."""
    history, chosen = runs[0].history, runs[0].config["chosen"]
    if "train_loss" not in history[0] or "epoch" not in history[0]:
        return _path_figures(runs)
    by = "val_" + chosen["by"]
    both = by != "val_loss" and by in history[0]
    loss = _history_plot(runs, ("train_loss", "val_loss"), "loss", zero=True)
    keys = (("grey", "train"), ("s0", "val"), ("mark", f"chosen: epoch {chosen['epoch']}"))
    several = f"The thick line is the first of {len(runs)} heads." if len(runs) > 1 else ""
    figures = [Figure("Training: loss", loss.svg("loss by epoch"), several, keys)]
    if both:
        title = classification.METRICS[chosen["by"]].title
        plot = _history_plot(runs, (by,), f"val {title}", zero=False)
        figures.append(Figure(f"Training: {title} on val", plot.svg(f"val {title} by epoch"), several, keys[1:]))
    return figures


def _history_plot(runs: Sequence[Run], columns: Sequence[str], ylabel: str, zero: bool) -> Plot:
    rows = [row for run in runs[:THIN] for row in run.history]
    values = [row[c] for row in rows for c in columns if c in row]
    low, high = around(values, 0.0 if zero else 0.02, None if zero else bounds_of(columns[0].removeprefix("val_")))
    plot = Plot((0.5, max(row["epoch"] for row in rows) + 0.5), (0 if zero else low, high), "epoch", ylabel)
    plot.xticks = [v for v in plot.sx.ticks() if v == int(v) and v >= 1] or [1.0]
    styles = {"train_loss": "grey"}
    for number, run in reversed(list(enumerate(runs[:THIN]))):
        for column in columns:
            points = [(row["epoch"], row[column]) for row in run.history if column in row]
            plot.line(points, styles.get(column, "s0"), "thin" if number else "")
            if not number and len(points) == 1:
                plot.dot(*points[0], styles.get(column, "s0"))
    chosen = runs[0].config["chosen"]["epoch"]
    plot.line([(chosen, plot.y[0]), (chosen, plot.y[1])], "mark")
    return plot


def _path_figures(runs: Sequence[Run]) -> list[Figure]:
    """A solved head: val along the values of its path."""
    history, chosen = runs[0].history, runs[0].config["chosen"]
    by = "val_" + chosen["by"]
    column = by if by in history[0] else "val_loss"
    name = path_column(history)
    if name is None or column not in history[0]:
        return []
    values = [(row[name], row[column]) for row in history]
    log = all(x > 0 for x, _ in values) and max(x for x, _ in values) > 20 * min(x for x, _ in values)
    xs = [x for x, _ in values]
    title = classification.METRICS[chosen["by"]].title if column == by and chosen["by"] != "loss" else "loss"
    plot = Plot(
        around_log(xs) if log else around(xs), around([y for _, y in values], 0.02), name, f"val {title}", xlog=log
    )
    if len(set(xs)) == len(xs):  # with a second setting there are several values at one place
        plot.line(sorted(values), "s0")
    for row in history:
        best = row["epoch"] == chosen["epoch"]
        plot.dot(row[name], row[column], "s1" if best else "s0", f"{name} {row[name]:g}: {row[column]:.3f}")
    keys = (("s0", "val"), ("s1", "chosen"))
    return [Figure(f"Path of solutions: {title} on val", plot.svg(f"val {title} along {name}"), "", keys)]


def path_column(history: Sequence[dict[str, float]]) -> str | None:
    """The setting that varies along the path of a solved head, None where nothing does."""
    columns = [key for key in history[0] if not key.startswith("val") and key not in ("epoch", "best", "seconds")]
    return next((key for key in columns if len({row[key] for row in history}) > 1), None)
