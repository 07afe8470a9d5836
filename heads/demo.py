"""The whole of the tool in about a minute: digits, a small untrained ViT, three heads and the controls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from heads.runs import Run
from heads.tables import comparison_table, runs_cost
from heads.train import train_head

BACKBONE = "vit-demo"
OUTPUTS = ("cls", "tokens")
# (head, output, epochs, patience): `linear` goes on until val stops improving; `large` is soon done
HEADS: tuple[tuple[str, str, int, int], ...] = (
    ("linear", "cls", 200, 10),
    ("large", "tokens", 20, 3),
    ("large", "tokens-257", 20, 3),
)


def run_demo(
    *,
    cache: str | Path | None = None,
    out: str | Path = "runs",
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Extract, train, compare: the table, and the same as a record. The runs lie under ``out``."""
    from featurecache import console, open_view, planning
    from heads.reports.page import report

    prepared = planning.prepare("digits", backbone=BACKBONE, random_weights=True, outputs=OUTPUTS, cache=cache)
    say(
        "demo       scikit-learn's 1,797 handwritten digits through a small ViT that was never trained (random weights)"
    )
    say(console.extraction_lines(prepared, console.extraction_record(prepared, None)))
    result = prepared.run(progress=progress)
    label = f"{BACKBONE}/digits"
    say(console.result_lines(result, label))
    view = open_view(result.view)
    runs = [_train(view, *entry, Path(out), first=number == 0, say=say) for number, entry in enumerate(HEADS)]
    table = "\n".join([comparison_table(runs), *runs_cost(runs)])
    page = report([run.path for run in runs], out=Path(out) / "demo-report")
    record = {
        "report": str(page.path),
        "extraction": console.result_record(result),
        "runs": [{"run": str(run.path), "head": run.head, "output": run.output, **run.metrics} for run in runs],
    }
    lines = [table, "", *(f"run        {Path(out) / run.path.name}/  {run.head} on {run.output}" for run in runs)]
    lines.append(f"report     {page.path}   with intervals, curves, and {page.images} of the images")
    return "\n".join(lines), record


def _train(
    view: Any, head: str, output: str, epochs: int, patience: int, out: Path, *, first: bool, say: Callable[[str], None]
) -> Run:
    epoch = ""

    def brief(line: str) -> None:  # of a hundred epochs the last says enough; history.csv has them all
        nonlocal epoch
        epoch = line if line.startswith("epoch") else epoch
        if not line.startswith(("epoch", "features", "splits")):
            say(line)

    say("")
    run = train_head(
        view, head, output=output, epochs=epochs, patience=patience, controls=first, out=out / f"demo-{head}-{output}",
        overwrite=True, report=False, say=brief,
    )  # fmt: skip
    say(epoch)
    return run
