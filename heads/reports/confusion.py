"""Which class is taken for which: the counts of runs, as a chart and as the pairs that are confused most."""

from __future__ import annotations

from typing import Any

import numpy as np

from heads import evaluate as ev
from heads import metrics
from heads.reports.charts import Figure, stroke, tag, text
from heads.reports.figures import Heard, short

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
        called = ev.call(each.task, p, each.calibration.thresholds, each.positive)
        total += metrics.confusion_matrix(answers.y, called, len(each.classes))
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
