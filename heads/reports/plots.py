"""The pictures of a run. Drawn without pyplot, so no window, no global state; matplotlib is imported here only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heads.metrics import classification
from heads.metrics import classification as ev
from heads.reports.figures import path_column
from heads.runs.write import RunContents

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8a8a"  # of Okabe and Ito's palette, told apart by colour-blind readers
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b8a800", "#7f3c8d", "#7a5230")
MANY = 10  # classes above which single curves say less than their mean


def draw_plots(folder: Path, contents: RunContents) -> None:
    """curves.png, confusion.png and roc.png into ``folder``; the last two of test."""
    with warnings.catch_warnings():
        # A class name in a script that matplotlib's font lacks is drawn as boxes; that must not end a run.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, figure in (("curves", _curves), ("confusion", _confusion), ("roc", _roc)):
            _save(figure(contents), folder / f"{name}.png", contents.config["view"]["untrained"])


def _save(figure: Figure, path: Path, untrained: bool) -> None:
    if untrained:
        figure.supxlabel("untrained backbone: shows the tool, nothing else", fontsize=8, color=GREY)
    figure.savefig(path, dpi=130)


def _text(words: str, longest: int = 24) -> str:
    """A class name as matplotlib shall show it: no mathematics, no line breaks, not too long."""
    words = "".join(c if c.isprintable() else "·" for c in words).replace("$", r"\$")
    return words if len(words) <= longest else words[: longest - 1] + "…"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _curves(contents: RunContents) -> Figure:
    history, chosen = contents.history, contents.config["chosen"]
    name = "val_" + chosen["by"]
    if "train_loss" not in history[0]:
        return _path(history, name, chosen["epoch"])
    both = name in history[0] and name != "val_loss"
    figure = Figure(figsize=(9 if both else 5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    epochs = [int(row["epoch"]) for row in history]
    marker = "o" if len(epochs) < 25 else ""
    for key, colour in (("train_loss", GREY), ("val_loss", BLUE)):
        axes[0].plot(epochs, [row[key] for row in history], colour, marker=marker, ms=3, label=key.replace("_", " "))
    axes[0].set_ylim(0, 1.06 * max(max(row["train_loss"], row["val_loss"]) for row in history))
    axes[0].set_ylabel("loss")
    if both:
        title = classification.METRICS[chosen["by"]].title
        axes[1].plot(epochs, [row[name] for row in history], BLUE, marker=marker, ms=3, label=f"val {title}")
        axes[1].set_ylabel(f"val {title}")
        axes[1].ticklabel_format(useOffset=False)
    for axis in axes:
        _plain(axis)
        axis.axvline(chosen["epoch"], color=ORANGE, linestyle="--", lw=1, label=f"chosen: epoch {chosen['epoch']}")
        axis.set_xlabel("epoch")
        axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=9)
    return figure


def _path(history: list[dict[str, float]], name: str, chosen: int) -> Figure:
    """A solved head: val along the values that it was solved for."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    column, by = path_column(history) or "epoch", name if name in history[0] else "val_loss"
    title = "loss" if by == "val_loss" else classification.METRICS[by.removeprefix("val_")].title
    xs = [row[column] for row in history]
    axes.plot(xs, [row[by] for row in history], BLUE, marker="o", ms=3, linestyle="")
    for row in history:
        if row["epoch"] == chosen:
            axes.plot(row[column], row[by], "o", color=ORANGE, ms=6, label=f"chosen: {column} {row[column]:g}")
            axes.legend(frameon=False, fontsize=9)
    if min(xs) > 0 and max(xs) > 20 * min(xs):
        axes.set_xscale("log")
    _plain(axes)
    axes.set(xlabel=column, ylabel=f"val {title}")
    axes.ticklabel_format(axis="y", useOffset=False)
    return figure


def _test(contents: RunContents) -> tuple[np.ndarray, np.ndarray]:
    rows, z = contents.calibrated("test")
    return contents.labels[rows], z


def _confusion(contents: RunContents) -> Figure:
    classes, measured = contents.config["classes"], contents.metrics["test"]
    if contents.config["task"] == "multilabel":
        return _label_calls(classes, measured)
    counts = np.array(measured["confusion"])
    side = min(max(3.6, 1.9 + 0.42 * len(classes)), 12)
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axes = figure.subplots()
    _table(figure, axes, counts, counts.sum(axis=1, keepdims=True))
    names = [_text(name) for name in classes]
    size = 9 if len(names) <= 25 else max(3, 9 * 25 / len(names))
    if len(names) > 10:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    elif len(names) > 2 and max(len(name) for name in names) > 6:
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=size)
    else:
        axes.set_xticks(range(len(names)), names, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"test, {measured['n']:,} images", fontsize=10)
    return figure


def _table(
    figure: Figure, axes: Axes, counts: np.ndarray, whole: np.ndarray, aspect: Literal["equal", "auto"] = "equal"
) -> None:
    """Cells coloured by their share of ``whole``, with the counts in them; large tables without their zeros, very
    large ones without numbers."""
    share = np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect=aspect)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8, aspect=30, pad=0.03)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(counts) > 25 and aspect == "equal":
        return
    size = 9 if counts.max() < 1e4 else 7
    for (i, j), count in np.ndenumerate(counts):
        if count or len(counts) <= 10:
            colour = "white" if share[i, j] > 0.55 else "#333333" if count else "#a0a0a0"
            axes.text(j, i, f"{int(count):,}", ha="center", va="center", fontsize=size, color=colour)


def _label_calls(classes: list[str], measured: dict[str, Any]) -> Figure:
    """Multi-label: of each label's positives how many were found, of its negatives how many raised an alarm."""
    cells = np.array([measured["per_class"][name]["confusion"] for name in classes])  # [L, 2, 2]
    counts = np.stack([cells[:, 1, 1], cells[:, 1, 0], cells[:, 0, 1], cells[:, 0, 0]], axis=1)
    whole = np.stack([cells[:, 1].sum(1)] * 2 + [cells[:, 0].sum(1)] * 2, axis=1)
    figure = Figure(figsize=(6.6, min(1.5 + 0.36 * len(classes), 16)), layout="constrained")
    axes = figure.subplots()
    _table(figure, axes, counts, whole, aspect="auto")
    columns = ["positives\nfound", "positives\nmissed", "negatives\nalarmed", "negatives\nclear"]
    axes.set_xticks(range(4), columns, fontsize=9)
    axes.axvline(1.5, color="white", linewidth=4)
    axes.set_yticks(range(len(classes)), [_text(name) for name in classes], fontsize=9)
    axes.set_title(f"test, {measured['n']:,} images, known labels", fontsize=10)
    return figure


def _roc(contents: RunContents) -> Figure:
    config = contents.config
    kind, classes = config["task"], config["classes"]
    y, z = _test(contents)
    order = ev.measure_scores(kind, z)
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    chosen = range(len(classes)) if kind != "binary" else [classes.index(config["positive"])]
    curves = []
    for c in chosen:
        known = ~np.isnan(y[:, c]) if kind == "multilabel" else np.ones(len(y), dtype=bool)
        truth = y[known, c] == 1 if kind == "multilabel" else y == c
        if truth.any() and not truth.all():
            curves.append(
                (c, *classification.roc_curve(order[known, c], truth)[:2], classification.auroc(order[known, c], truth))
            )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    _draw_curves(axes, curves, classes)
    if kind == "binary" and curves:
        _operating_point(axes, contents.metrics["test"], config)
    _plain(axes)
    axes.set(
        xlabel="false positive rate (1 - specificity)",
        ylabel="true positive rate (sensitivity)",
        aspect="equal",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    against = "one class against the rest, " if kind in ("multiclass", "ordinal") else ""
    axes.set_title(f"test, {against}{len(y):,} images", fontsize=10)
    if curves:
        axes.legend(frameon=False, fontsize=8 if len(curves) > 4 else 9, loc="lower right")
    else:
        axes.text(0.5, 0.5, "test has one class only:\nno ROC curve", ha="center", va="center")
    return figure


def _draw_curves(axes: Axes, curves: list[tuple[int, np.ndarray, np.ndarray, float]], classes: list[str]) -> None:
    if len(curves) > MANY:
        grid = np.linspace(0, 1, 201)
        for i, (_, false, found, _) in enumerate(curves):
            axes.plot(false, found, color=GREY, alpha=0.3, linewidth=0.7, label=None if i else f"{len(curves)} classes")
        mean = np.mean([np.interp(grid, false, found) for _, false, found, _ in curves], axis=0)
        axes.plot(grid, mean, color=BLUE, label=f"mean  AUROC {np.mean([area for *_, area in curves]):.3f}")
        return
    for i, (c, false, found, area) in enumerate(curves):
        axes.plot(false, found, color=COLOURS[i], linewidth=1.6, label=f"{_text(classes[c])}  AUROC {area:.3f}")


def _operating_point(axes: Axes, measured: dict[str, Any], config: dict[str, Any]) -> None:
    axes.plot(
        1 - measured["specificity"],
        measured["sensitivity"],
        "o",
        color=ORANGE,
        ms=7,
        label=f"threshold {config['calibration']['thresholds'][0]:.3f}, chosen on val",
    )
