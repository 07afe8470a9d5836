"""Figures of reports and run folders, each from numbers that were computed elsewhere or from predictions of runs.

N images of test, C classes or labels; `TestPredictions` are runs with what they predicted of test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featurecache.formatting import counted
from heads.metrics.calibration import CalibratedPredictions, counts_at, log_odds, predict_labels, probabilities
from heads.metrics.classification import auroc
from heads.reports.drawing import DASHES, GREY, SERIES, SQUARE, Figure, Matrix, Plot, distinct, save_png, style_of
from heads.runs.run import Run
from heads.settings import METRICS, title
from heads.task import Predictions
from heads.training.progress import ACCURACY

TestPredictions = Sequence[tuple[Run, Predictions]]

ROC, PR = ("1 − specificity", "sensitivity"), ("sensitivity (recall)", "precision (PPV)")  # the axes
UNIT, FIFTHS = (-0.02, 1.02), (0, 0.2, 0.4, 0.6, 0.8, 1)
GRID = np.linspace(0, 1, 201)
MANY = 30  # classes above which single curves say less than where most of them run
THIN = 20  # curves of single seeds or folds drawn behind their mean


def page_predictions(runs: Sequence[Run]) -> TestPredictions:
    return [(run, run.answers("test")) for run in runs]


def save_pictures(run: Run) -> None:
    """curves.png, confusion.png and roc.png in the folder of a run; the last two of test."""
    folder = run.folder
    predictions = page_predictions([run])
    note = "untrained backbone: shows the tool, nothing else" if run.untrained else ""
    save_png(folder / "confusion.png", [counts_figure(predictions)], note)
    save_png(folder / "roc.png", [curve_figure("roc", predictions, run.metrics["test"])], note)
    if curves := training_figures([run]):
        save_png(folder / "curves.png", curves, note)


def top_of(measure: str | None) -> float | None:
    """Measures that are better when higher end at 1; a figure shows no room above it."""
    return 1.0 if measure in METRICS and METRICS[measure].higher else None


# --- which class is predicted for which ---------------------------------------------------------------------------


def confusion_counts(predictions: TestPredictions) -> np.ndarray:
    """[C, C] counts on test: rows are the true class; of labels [C, 4]: true positives, false negatives, false
    positives, true negatives. Several seeds: their mean; folds: all their images together."""
    total = np.sum([_counts(run, answers) for run, answers in predictions], axis=0)
    return total * len(_folds(predictions)) / len(predictions)


def _counts(run: Run, answers: Predictions) -> np.ndarray:
    thresholds, y = run.calibration.thresholds, answers.y
    if run.task != "multilabel":
        calibrated = CalibratedPredictions(run.task, answers.calibrated_logits, y, run.positive, thresholds)
        return calibrated.confusion().astype(float)
    predicted = predict_labels(run.task, probabilities(run.task, answers.calibrated_logits), thresholds, run.positive)
    cells = [(y == truth) & (predicted == label) for truth, label in ((1, 1), (1, 0), (0, 1), (0, 0))]
    return np.stack([cell.sum(axis=0) for cell in cells], axis=1).astype(float)


def _folds(predictions: TestPredictions) -> set[Any]:
    return {(run.config["splits"].get("fold") or [0])[0] for run, _ in predictions}


def counts_figure(predictions: TestPredictions) -> Figure:
    """The confusion matrix; of labels what became of their positives and negatives."""
    classes, counts, folds = predictions[0][0].classes, confusion_counts(predictions), len(_folds(predictions))
    labels, names = predictions[0][0].task == "multilabel", distinct(classes, 18)
    whole = counts.reshape(len(counts), -1, 2).sum(2).repeat(2, axis=1) if labels else counts.sum(1, keepdims=True)
    share = np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0)
    mean = f" Counts are the mean of {counted(len(predictions) // folds, 'head')}." if len(predictions) > folds else ""
    notes = f"{mean} All {folds} folds together." if folds > 1 else mean
    if labels:
        columns = ("true\npositives", "false\nnegatives", "false\npositives", "true\nnegatives")
        plot = Matrix(counts, share, names, columns, "", "label", (62.0, min(24.0, max(3.0, 600 / len(classes)))))
        caption = "Shade: the share of a label's positives (left) and of its negatives (right); unknown labels are out."
        return Figure("Predictions by label", plot, caption + notes)
    side = max(min(76.0 if len(classes) < 5 else 44.0, 300 / len(classes)), 3.0)
    plot = Matrix(counts, share, names, names, "predicted class", "true class", (side, side))
    caption = "Shade: the share of the true class (row) that was predicted as each class; the number counts images."
    return Figure("Confusion matrix", plot, caption + notes)


def most_confused(predictions: TestPredictions) -> list[dict[str, Any]]:
    """The pairs of classes with the most mistakes: {"true", "predicted", "count", "share" of the true class}."""
    classes, counts = predictions[0][0].classes, confusion_counts(predictions)
    wrong = counts - np.diag(np.diag(counts))
    pairs = [divmod(int(k), len(classes)) for k in np.argsort(-wrong, axis=None, kind="stable")[:12]]
    return [
        {"true": classes[i], "predicted": classes[j], "count": wrong[i, j], "share": wrong[i, j] / counts[i].sum()}
        for i, j in pairs
        if wrong[i, j] > 0
    ]


def truth_and_score(task: str, answers: Predictions, c: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of class or label c: bool [m] over images where it is known, and the score; None where one side is missing."""
    score = log_odds(task, answers.calibrated_logits)[:, c]
    truth = answers.y == c
    if task == "multilabel":
        labelled = ~np.isnan(answers.y[:, c])
        truth, score = answers.y[labelled, c] == 1, score[labelled]
    return (truth, score) if truth.any() and not truth.all() else None


def roc_points(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[GRID]: sensitivity at each false positive rate, the steps taken at their upper end."""
    _, hits, alarms = counts_at(score, truth)
    false_positive_rate, sensitivity = np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1])
    return sensitivity[np.searchsorted(false_positive_rate, GRID + 1e-12, side="right") - 1]


def _pr_points(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[GRID]: precision at the smallest recall that is at least each of the grid; no line between the steps."""
    _, hits, alarms = counts_at(score, truth)
    precision, recall = np.append(1, hits / (hits + alarms)), np.append(0, hits / hits[-1])
    return precision[np.minimum(np.searchsorted(recall, GRID - 1e-12), len(recall) - 1)]


def curve_figure(kind: str, predictions: TestPredictions, measured: dict[str, Any] | None = None) -> Figure:
    """ROC (``kind`` "roc") or precision against recall ("pr") of the positive class, or a line for every class.

    One class and several runs: the runs thin, their mean (upright: over sensitivities at equal false positive rate)
    thick. ``measured``: of two classes sensitivity, specificity and ppv at the threshold chosen on val, a ring.
    """
    run, roc = predictions[0][0], kind == "roc"
    title, plot = "ROC" if roc else "Precision and recall", unit_square(*(ROC if roc else PR))
    chosen = range(len(run.classes)) if run.positive is None else [run.positive]
    pairs = {c: each for c in chosen if (each := truths_and_scores(predictions, c))}
    if not pairs:
        return Figure(title, plot, "Test has one class only: there is no curve.")
    chance = 0.0 if roc else float(next(iter(pairs.values()))[0][0].mean())
    if roc or len(pairs) == 1:
        plot.line([(0, chance), (1, 1 if roc else chance)], "guide")
    curves = {
        run.classes[c]: [(roc_points if roc else _pr_points)(*pair) for pair in each] for c, each in pairs.items()
    }
    keys = _draw_curves(plot, curves, [(0.0, 0.0)] if roc else [])
    if roc and len(predictions) == 1 and len(keys) == len(pairs):
        areas = [auroc(score, truth) for ((truth, score),) in pairs.values()]
        keys = [(style, f"{name}: AUROC {area:.3f}") for (style, name), area in zip(keys, areas, strict=True)]
    point = measured if measured and run.task == "binary" else {}
    x, y = (point.get(m) for m in (("specificity", "sensitivity") if roc else ("sensitivity", "ppv")))
    if x is not None and y is not None:
        x = 1 - x if roc else x
        plot.dot(x, y, "s1", f"threshold chosen on val: {x:.3f}, {y:.3f}", radius=5, ring=True)
        keys.append(("s1", "threshold chosen on val"))
    notes = ["Each class against all others."] if run.task not in ("binary", "multilabel") else []
    if len(predictions) > 1:
        notes.append(f"Mean of {len(predictions)} heads{'; thin lines are the heads' if len(pairs) == 1 else ''}.")
    if roc or len(pairs) == 1:
        notes.append("Dotted: guessing." if roc else "Dotted: the share of positives, which is what guessing gives.")
    return Figure(title, plot, " ".join(notes), tuple(keys))


def truths_and_scores(predictions: TestPredictions, c: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [pair for run, answers in predictions if (pair := truth_and_score(run.task, answers, c))]


def unit_square(xlabel: str, ylabel: str) -> Plot:
    plot = Plot(xlabel, ylabel, x=UNIT, y=UNIT, xticks=FIFTHS, height=SQUARE)
    plot.axes.set_yticks(FIFTHS)
    return plot


def _draw_curves(
    plot: Plot, curves: dict[str, list[np.ndarray]], start: list[tuple[float, float]]
) -> list[tuple[str, str]]:
    """The mean curve of every class over [GRID]; its legend."""
    means = np.array([np.mean(each, axis=0) for each in curves.values()])
    if len(curves) > len(SERIES):
        which = f"{len(curves)} classes"
        if len(curves) > MANY:
            low, high = np.quantile(means, [0.1, 0.9], axis=0)
            plot.axes.fill_between(GRID, low, high, color=GREY, alpha=0.3, linewidth=0, clip_on=False)
            which = f"the middle 80 % of {which}"
        for mean in means if len(curves) <= MANY else ():
            plot.line([*start, *zip(GRID, mean, strict=True)], "grey", thin=True)
        plot.line([*start, *zip(GRID, means.mean(axis=0), strict=True)])
        return [("grey", which), ("s0", "their mean")]
    (first, *_) = curves.values()
    for each in first[:THIN] if len(curves) == 1 < len(first) else ():
        plot.line([*start, *zip(GRID, each, strict=True)], thin=True)
    for number, mean in enumerate(means):
        plot.line([*start, *zip(GRID, mean, strict=True)], style_of(number))
    return [(style_of(number), name) for number, name in enumerate(distinct(curves))]


def reliability_figure(calibration: dict[str, Any], where: str = "") -> Figure:
    """Predicted probability against observed frequency, before and after the correction of the protocol."""
    plot, keys = unit_square("predicted probability", "observed frequency"), []
    plot.line([(0, 0), (1, 1)], "guide")
    for when, style, name in (("before", "grey", "before"), ("after", "s0", "after prior correction and temperature")):
        part = calibration.get(when) or {}
        bins = [b for b in part.get("bins", []) if b["n"] and b["p"] is not None and b["share"] is not None]
        if bins:
            plot.line([(b["p"], b["share"]) for b in bins], style)
            keys.append((style, name if part.get("ece") is None else f"{name}: ECE {part['ece']:.3f}"))
        for b in bins:
            if when == "after":
                plot.bar(b["p"], b["low"], b["high"], style, faint=True)
                below = b["high"] > 0.93  # there is no room above
                plot.words(b["p"], b["low"] if below else b["high"], f"{b['n']:,}", below=below)
            hint = f"{b['n']:,} predicted {b['p']:.3f}, observed {b['share']:.3f} [{b['low']:.3f}, {b['high']:.3f}]"
            plot.dot(b["p"], b["share"], style, hint)
    caption = (
        "Dotted: probabilities mean what they say; above it the head is underconfident, below overconfident. Bars: "
        "95 % (Wilson) of a bin; numbers: its images."
    )
    return Figure(f"Reliability{where and f' on {where}'}", plot, caption, tuple(keys))


def is_stepped(run: Run) -> bool:
    """Trained by epochs, not solved."""
    return {"train_loss", "epoch"} <= run.history[0].keys()


def training_figures(runs: Sequence[Run], overlaid: bool = False) -> list[Figure]:
    """Loss, accuracy and criterion by epoch; of a solved head the criterion along its path. ``overlaid``: loss and
    criterion stand side by side with those of others."""
    history, chosen = runs[0].history, runs[0].config["chosen"]
    if not is_stepped(runs[0]):
        return _path_figures(runs[0])
    loss = _history_plot(runs, ("train_loss", "val_loss"), "loss", y=(0.0, None))
    keys = (("grey", "train"), ("s0", "val"), ("mark", f"chosen: epoch {chosen['epoch']}"))
    several = f"The thick line is the first of {len(runs)} heads." if len(runs) > 1 else ""
    figures = [] if overlaid else [Figure("Training: loss", loss, several, keys)]
    if overlaid and chosen["by"] == "accuracy":
        return []
    if right := next((name for name in ACCURACY if f"train_{name}" in history[0]), None):
        plot = _history_plot(runs, (f"train_{right}", f"val_{right}"), "accuracy", least=0.02, top=1.0)
        drawn = "Of train as drawn: balanced, augmented and with dropout where these are on."
        if runs[0].task in ("binary", "multilabel"):
            drawn += " What is likelier counts; in the tables accuracy is at the threshold."
        figures.append(Figure("Training: accuracy", plot, " ".join(filter(None, [several, drawn])), keys))
    if not overlaid and chosen["by"] not in ("loss", "accuracy") and f"val_{chosen['by']}" in history[0]:
        criterion = title(chosen["by"], runs[0].task)
        top = top_of(chosen["by"])
        plot = _history_plot(runs, (f"val_{chosen['by']}",), f"val {criterion}", least=0.02, top=top)
        first = int(next(row["epoch"] for row in history if row["best"]))  # the first that could be chosen is the best
        settled = f"Chosen from epoch {first} on: before, the weights still move." if first > 1 else ""
        figures.append(
            Figure(f"Training: {criterion} on val", plot, " ".join(filter(None, [several, settled])), keys[1:])
        )
    return figures


def _history_plot(runs: Sequence[Run], columns: Sequence[str], ylabel: str, **ranges: Any) -> Plot:
    last = max(row["epoch"] for run in runs[:THIN] for row in run.history)
    plot = Plot("epoch", ylabel, x=(0.5, last + 0.5), xwhole=True, **ranges)
    for number, run in reversed(list(enumerate(runs[:THIN]))):
        for column in columns:
            points = [(row["epoch"], row[column]) for row in run.history if column in row]
            style = "grey" if column.startswith("train") else "s0"
            plot.line(points, style, thin=number > 0)
            if not number and len(points) == 1:
                plot.dot(*points[0], style)
    plot.axes.axvline(runs[0].config["chosen"]["epoch"], color=SERIES[1], linewidth=1, linestyle=DASHES["mark"])
    return plot


def _path_figures(run: Run) -> list[Figure]:
    """A solved head: val along the values of the setting that varies along its path, if one does."""
    history, chosen = run.history, run.config["chosen"]
    measure = chosen["by"] if f"val_{chosen['by']}" in history[0] else "loss"
    column, criterion = f"val_{measure}", title(measure, run.task) if measure != "loss" else "loss"
    settings = [key for key in history[0] if not key.startswith("val") and key not in ("epoch", "best", "seconds")]
    name = next((key for key in settings if len({row[key] for row in history}) > 1), None)
    if name is None or column not in history[0]:
        return []
    values = sorted((row[name], row[column]) for row in history)
    xs = [x for x, _ in values]
    plot = Plot(name, f"val {criterion}", least=0.02, xlog=xs[0] > 0 and xs[-1] > 20 * xs[0])
    if len(set(xs)) == len(xs):  # with a second setting there are several values at one place
        plot.line(values)
    for row in history:
        style = "s1" if row["epoch"] == chosen["epoch"] else "s0"
        plot.dot(row[name], row[column], style, f"{name} {row[name]:g}: {row[column]:.3f}")
    return [Figure(f"Path of solutions: {criterion} on val", plot, "", (("s0", "val"), ("s1", "chosen")))]
