"""How a head came about, as charts: loss and criterion by epoch, or val along the path of a solved head."""

from __future__ import annotations

from collections.abc import Sequence

from heads import metrics
from heads.reports.charts import Figure, Plot, around, around_log
from heads.reports.figures import THIN, bounds_of
from heads.runs import Run


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
        title = metrics.METRICS[chosen["by"]].title
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
    title = metrics.METRICS[chosen["by"]].title if column == by and chosen["by"] != "loss" else "loss"
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
