"""Charts that a study asks for: the best three with their cost, loss with and without augmentation, accuracy against
time by optimiser, accuracy against the share of the training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from heads.reports.figures import Figure, Plot, around, learning_figure, short, style_of
from heads.runs.run import Run

Rows = Sequence[tuple[str, Any, dict[str, Any]]]  # (step, heads.families.Family, its record) of one part
BOUNDS = (0.0, 1.0)
TOP = 3


def pneumonia(rows: Rows, seconds: dict[str, float]) -> list[Figure]:
    """``seconds``: of every step, for the features that a head needs first."""
    runs = {step: family.runs[0] for step, family, _ in rows}
    found = [top_figure([row for row in rows if row[1].fraction == 1], seconds)]
    plain, augmented = "resnet50-tuned", "resnet50-augmented"
    if plain in runs and augmented in runs:
        found.append(loss_figure([("without augmentation", runs[plain]), ("with", runs[augmented])]))
    optimizers = [("AdamW", plain), ("Adam", "resnet50-adam"), ("SGD", "resnet50-sgd")]
    named = [(name, runs[step]) for name, step in optimizers if step in runs]
    if len(named) > 1:
        found.append(time_figure(named))
    fractions = [(step, family, record) for step, family, record in rows if step == "fractions"]
    if fractions:
        found.append(fraction_figure(fractions))
    return found


def top_figure(rows: Rows, seconds: dict[str, float]) -> Figure:
    """The ``TOP`` best by val accuracy, each with the seconds its training took."""
    measured = [row for row in rows if row[2]["val"].get("accuracy") is not None]
    best = sorted(measured, key=lambda row: -row[2]["val"]["accuracy"])[:TOP]
    times = [record["train_seconds"] or 0.0 for _, _, record in best]
    values = [record["val"]["accuracy"] for _, _, record in best]
    across, up = around(times, 1.0, (0.0, float("inf"))), around(values, 0.02, BOUNDS)
    plot = Plot(across, up, "seconds to train", "val accuracy")
    keys = []
    for number, ((step, _, record), time, value) in enumerate(zip(best, times, values, strict=True)):
        plot.dot(time, value, style_of(number), f"{record['name']}: {value:.3f} after {time:.0f} s", 6)
        keys.append((style_of(number), f"{short(record['name'], 60)} ({step}): {value:.3f}, {time:,.1f} s"))
    frozen = [step for step, family, _ in best if not family.from_pixels]
    before = sum(spent for name, spent in seconds.items() if name.endswith("-features"))
    more = f" Frozen heads need their features first: {before:,.0f} s for all of them together." if frozen else ""
    return Figure("The best three on val", plot.svg("val accuracy and seconds"), f"Chosen on val.{more}", tuple(keys))


def loss_figure(named: Sequence[tuple[str, Run]]) -> Figure:
    """Loss by epoch of several runs: val thick, train thin."""
    lines = [(run, column) for _, run in named for column in ("train_loss", "val_loss")]
    values = [row[column] for run, column in lines for row in run.history]
    last = max(row["epoch"] for _, run in named for row in run.history)
    plot = Plot((0.5, last + 0.5), (0.0, around(values)[1]), "epoch", "loss")
    plot.xticks = [v for v in plot.sx.ticks() if v == int(v) and v >= 1] or [1.0]
    for number, (_, run) in enumerate(named):
        for column, extra in (("train_loss", "thin"), ("val_loss", "")):
            plot.line([(row["epoch"], row[column]) for row in run.history], style_of(number), extra)
    keys = tuple((style_of(number), name) for number, (name, _) in enumerate(named))
    return Figure("Loss, with and without augmentation", plot.svg("loss by epoch"), "Thick: val. Thin: train.", keys)


def time_figure(named: Sequence[tuple[str, Run]]) -> Figure:
    """Val accuracy against seconds of training, at the end of each epoch."""
    curves = []
    for name, run in named:
        spent = list(accumulate(row["seconds"] for row in run.history))
        curves.append((name, [(s, row["val_accuracy"]) for s, row in zip(spent, run.history, strict=True)]))
    values = [y for _, points in curves for _, y in points]
    longest = max(x for _, points in curves for x, _ in points)
    plot = Plot((0.0, longest * 1.05), around(values, 0.02, BOUNDS), "seconds of training", "val accuracy")
    for number, (name, points) in enumerate(curves):
        plot.line(points, style_of(number))
        for x, y in points:
            plot.dot(x, y, style_of(number), f"{name}: {y:.3f} after {x:.0f} s", 2.4)
    keys = tuple((style_of(number), name) for number, (name, _) in enumerate(curves))
    caption = "A mark is the end of an epoch; each with its own usual learning rate."
    return Figure("Accuracy against time, by optimiser", plot.svg("val accuracy against seconds"), caption, keys)


def fraction_figure(rows: Rows) -> Figure:
    series: dict[str, list[dict[str, Any]]] = {}
    for _, family, record in rows:
        name = f"{family.head} on {family.output} of {family.view}"
        series.setdefault(name, []).append({"fraction": family.fraction, **record["test"]["accuracy"]})
    whole = next((family.runs[0] for _, family, _ in rows if family.fraction == 1), None)
    total = whole.config["splits"]["images"]["train"] if whole else None
    figure = learning_figure(list(series.items()), "accuracy", "accuracy", total)
    return Figure("Accuracy against the share of the training images", figure.svg, figure.caption, figure.keys)


FIGURES: dict[str, Callable[[Rows, dict[str, float]], list[Figure]]] = {"pneumonia": pneumonia}
