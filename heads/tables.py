"""What the command line prints of runs and heads: aligned text, numbers with three decimals, "–" where undefined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heads.metrics import METRICS
from heads.prediction import printable
from heads.runs import Run
from heads.splits import Leak, dropped_sentence, leaks_sentence

UNTRAINED = "The weights are untrained (random): these numbers show that the tool works, not what a backbone can do."
SHOWN = {  # measures of the final table, in order
    "binary": ("auroc", "ap", "sensitivity", "specificity", "ppv", "npv", "f1", "accuracy", "nll", "brier"),
    "multiclass": ("auroc", "ap", "accuracy", "top5", "balanced_accuracy", "macro_f1", "nll", "brier"),
    "ordinal": ("quadratic_kappa", "mae", "auroc", "ap", "accuracy", "balanced_accuracy", "macro_f1", "nll", "brier"),
    "multilabel": ("auroc", "ap", "sensitivity", "specificity", "f1", "accuracy", "nll", "brier"),
}
COMPARED = {  # measures of test in a comparison table
    "binary": ("auroc", "sensitivity", "specificity", "accuracy"),
    "multiclass": ("auroc", "accuracy", "macro_f1"),
    "ordinal": ("quadratic_kappa", "mae", "accuracy"),
    "multilabel": ("auroc", "ap", "f1"),
}


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def align(rows: Sequence[Sequence[str]], right: int = 1) -> list[str]:
    """Columns padded to their widest cell; from column ``right`` on to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i >= right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def final_table(run: Run) -> str:
    """Val and test of one run; with untrained weights it begins with the controls and a sentence."""
    lines = [*comparison_table([run]).splitlines(), ""] if run.metrics["controls"] else []
    val, test = run.metrics["val"], run.metrics["test"]
    macro = "" if run.task == "binary" else "macro "
    rows = [["", "val", "test (read once)"]]
    for name in SHOWN[run.task]:
        if name in test:
            title = (macro if name in ("auroc", "ap") else "") + METRICS[name].title
            rows.append([title, number(val[name]), number(test[name])])
    table = align(rows)
    if run.task == "binary":
        cut = run.calibration.thresholds[0]
        at = next((i for i, row in enumerate(rows) if row[0] == "sensitivity"), 0)
        table[at] += f"   of {printable(run.config['positive'])} at {cut:.3f}, the threshold chosen on val"
    lines += [*table, *_leak_lines(run)]
    if run.untrained and not run.metrics["controls"]:
        lines.append(UNTRAINED)
    return "\n".join(lines)


def _leak_lines(run: Run) -> list[str]:
    """What stands in two splits, and what was left out for it; a run may be from before either was recorded."""
    splits = run.config["splits"]
    leaks = [Leak(leak["kind"], tuple(leak["splits"]), leak["count"]) for leak in splits.get("leaks") or []]
    lines = [f"{leaks_sentence(leaks)}: these numbers may be too good."] if leaks else []
    return lines + ([f"{dropped_sentence(splits['dropped'])}."] if any((splits.get("dropped") or {}).values()) else [])


def comparison_table(runs: Sequence[Run], controls: Sequence[dict[str, Any]] | None = None) -> str:
    """Controls first, then the runs, best on val first: the first run's criterion, ties by val NLL.

    ``controls`` are by default those of the first run that has some. Runs that were not tested on the same images with
    the same classes are shown, and it is said.
    """
    if controls is None:
        controls = next((run.metrics["controls"] for run in runs if run.metrics["controls"]), [])
    by = runs[0].config["chosen"]["by"]
    key = "nll" if by == "loss" else by
    shown = COMPARED[runs[0].task]
    macro = "" if runs[0].task == "binary" else "macro "
    titles = [(macro if m in ("auroc", "ap") else "") + METRICS[m].title for m in shown]
    head_title = (macro if key in ("auroc", "ap") else "") + METRICS[key].title
    rows = [["", "parameters", f"val {head_title}", *(f"test {t}" for t in titles)]]
    for control in controls:
        rows.append([control["name"], "", *_cells(control, key, shown)])
    ordered = sorted(runs, key=lambda run: _rank(run, key))
    for run in ordered:
        rows.append([_name(run, runs), f"{run.config['parameters']:,}", *_cells(run.metrics, key, shown)])
    lines = align(rows)
    lines += [f"{control['name']}: {printable(control['note'])}" for control in controls if control["note"]]
    if len({(run.config["splits"]["digest"], run.classes) for run in runs}) > 1:
        lines.append("Not all of these were tested on the same images and classes: their numbers do not compare.")
    if any(run.untrained for run in runs):
        lines.append(UNTRAINED)
    return "\n".join(lines)


def _cells(measured: dict[str, Any], key: str, shown: Sequence[str]) -> list[str]:
    val, test = measured["val"] or {}, measured["test"] or {}
    return [number(val.get(key)), *(number(test.get(m)) for m in shown)]


def _rank(run: Run, key: str) -> tuple[float, float]:
    value = run.metrics["val"].get(key)
    sign = -1 if METRICS[key].higher else 1
    return (float("inf") if value is None else sign * value, run.metrics["val"]["nll"] or float("inf"))


def _name(run: Run, runs: Sequence[Run]) -> str:
    view = run.config["view"]["label"]
    where = f" of {view}" if len({r.config["view"]["label"] for r in runs}) > 1 else ""
    return f"{run.head} on {run.output}{where}"


def runs_table(runs: Sequence[Run]) -> str:
    """A line per run: folder, head, features, the criterion on val and test, when."""
    if not runs:
        return "no runs yet; featurecache train-head makes one"
    rows = [["run", "head", "features", "criterion", "val", "test", "made"]]
    for run in runs:
        by = run.config["chosen"]["by"]
        key = "nll" if by == "loss" else by
        where = f"{run.config['view']['label']} {run.output}" + (" (untrained)" if run.untrained else "")
        rows.append(
            [
                str(run.path),
                run.head,
                where,
                METRICS[key].title,
                number(run.metrics["val"].get(key)),
                number(run.metrics["test"].get(key)),
                run.config["created"][:16].replace("T", " "),
            ]
        )
    return "\n".join(align(rows, right=4))


def head_table(described: dict[str, Any]) -> str:
    """The layers of a head, from ``architectures.describe_head``."""
    shape = "×".join(str(n) for n in described["shape"])
    rows = [["layer", "", "gives", "parameters"], ["input", "features", f"[{shape}]", "0"]]
    for layer in described["layers"]:
        rows.append([layer["name"], layer["layer"], layer["gives"], f"{layer['parameters']:,}"])
    rows.append(["", "", "", f"{described['parameters']:,}"])
    first = f"{described['head']}: {described['what']}; {described['classes']} classes"
    return "\n".join([first, *align(rows, right=3)])
