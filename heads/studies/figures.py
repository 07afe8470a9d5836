"""Charts that a study asks for: the best three with their cost, loss with and without augmentation, accuracy against
time by optimiser, accuracy against the share of the training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from heads.reports.drawing import Figure, Plot, short, style_of
from heads.reports.figures import learning_figure
from heads.runs.run import Run

Rows = Sequence[tuple[str, Any, dict[str, Any]]]  # (step, heads.families.Family, its record) of one part
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
    plot = Plot("seconds to train", "val accuracy", least=0.02, top=1.0)
    keys = []
    for number, ((step, _, record), time, value) in enumerate(zip(best, times, values, strict=True)):
        plot.dot(time, value, style_of(number), f"{record['name']}: {value:.3f} after {time:.0f} s", radius=6)
        keys.append((style_of(number), f"{short(record['name'], 60)} ({step}): {value:.3f}, {time:,.1f} s"))
    frozen = [step for step, family, _ in best if not family.from_pixels]
    before = sum(spent for name, spent in seconds.items() if name.endswith("-features"))
    more = f" Frozen heads need their features first: {before:,.0f} s for all of them together." if frozen else ""
    return Figure("The best three on val", plot, f"Chosen on val.{more}", tuple(keys))


def loss_figure(named: Sequence[tuple[str, Run]]) -> Figure:
    """Loss by epoch of several runs: val thick, train thin."""
    last = max(row["epoch"] for _, run in named for row in run.history)
    plot = Plot("epoch", "loss", x=(0.5, last + 0.5), y=(0.0, None), xwhole=True)
    for number, (_, run) in enumerate(named):
        for column in ("train_loss", "val_loss"):
            points = [(row["epoch"], row[column]) for row in run.history]
            plot.line(points, style_of(number), thin=column == "train_loss")
    keys = tuple((style_of(number), name) for number, (name, _) in enumerate(named))
    return Figure("Loss, with and without augmentation", plot, "Thick: val. Thin: train.", keys)


def time_figure(named: Sequence[tuple[str, Run]]) -> Figure:
    """Val accuracy against seconds of training, at the end of each epoch."""
    curves = []
    for name, run in named:
        spent = list(accumulate(row["seconds"] for row in run.history))
        curves.append((name, [(s, row["val_accuracy"]) for s, row in zip(spent, run.history, strict=True)]))
    longest = max(x for _, points in curves for x, _ in points)
    plot = Plot("seconds of training", "val accuracy", x=(0.0, longest * 1.05), least=0.02, top=1.0)
    for number, (name, points) in enumerate(curves):
        plot.line(points, style_of(number))
        for x, y in points:
            plot.dot(x, y, style_of(number), f"{name}: {y:.3f} after {x:.0f} s", radius=2.4)
    keys = tuple((style_of(number), name) for number, (name, _) in enumerate(curves))
    caption = "A mark is the end of an epoch; each with its own usual learning rate."
    return Figure("Accuracy against time, by optimiser", plot, caption, keys)


def fraction_figure(rows: Rows) -> Figure:
    series: dict[str, list[dict[str, Any]]] = {}
    for _, family, record in rows:
        name = f"{family.head} on {family.output} of {family.view}"
        series.setdefault(name, []).append({"fraction": family.fraction, **record["test"]["accuracy"]})
    whole = next((family.runs[0] for _, family, _ in rows if family.fraction == 1), None)
    total = whole.config["splits"]["images"]["train"] if whole else None
    figure = learning_figure(list(series.items()), "accuracy", "accuracy", total)
    return replace(figure, title="Accuracy against the share of the training images")


FIGURES: dict[str, Callable[[Rows, dict[str, float]], list[Figure]]] = {"pneumonia": pneumonia}
