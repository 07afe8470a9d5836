"""Tables of what there is: runs and sweeps with their best value on val, by records and rows alone, without torch.

What lies behind a record is opened, and compared with its hash, by who reports on it or verifies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featurecache.errors import RunError
from featurecache.formatting import aligned, number, one_line
from heads.evaluation.selection import Row, family_of, select_setting, selection_key
from heads.runs.folder import check_listed
from heads.runs.records import RunRecord
from heads.settings import METRICS, measure_name
from heads.sweeps.journal import RECORD, ROWS, read_journal, read_sweep_record


@dataclass(frozen=True)
class SweepSummary:
    """A sweep by its journal. ``best``: a row of the family that is best on val; None where no head worked yet."""

    path: Path
    select: str
    heads: int
    families: int  # in which a setting can be chosen
    best: Row | None


def list_sweep_summaries(folder: str | Path, errors: list[RunError]) -> list[SweepSummary]:
    """The sweeps in a folder, by name; ``errors`` takes what is wrong with the others."""
    summaries = []
    for path in sorted(Path(folder).glob(f"[!.]*/{RECORD}")):
        try:
            summaries.append(_summary(path.parent))
        except RunError as error:
            errors.append(error)
    return summaries


def _summary(folder: Path) -> SweepSummary:
    record = read_sweep_record(folder)
    check_listed(folder / RECORD, record, record.get("files", {}))
    select, rows = record["select"], read_journal(folder / ROWS)[0]
    families: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        families.setdefault(family_of(row), []).append(row)
    chosen = [choice.rows for own in families.values() if (choice := select_setting(own, select))]
    best = min(chosen, key=lambda own: selection_key(own, select))[0] if chosen else None
    return SweepSummary(folder, select, len(rows), len(chosen), best)


def runs_table(runs: Sequence[RunRecord]) -> str:
    """A line per run: folder, head, features, the criterion on val and test, when."""
    if not runs:
        return "no runs yet; featurecache train-head makes one"
    rows = [["run", "head", "features", "criterion", "val", "test", "made"]]
    for run in runs:
        key = measure_name(run.config["chosen"]["by"])
        where = f"{run.config['view']['label']} {run.output}" + (" (untrained)" if run.untrained else "")
        val, test = (number(run.metrics[split].get(key)) for split in ("val", "test"))
        rows.append([str(run.path), run.head, where, METRICS[key].title, val, test, made_words(run)])
    return "\n".join(aligned(rows, right=4))


def sweeps_table(sweeps: Sequence[SweepSummary]) -> str:
    """A line per sweep: folder, how many heads, the one that is best on val."""
    rows = [["sweep", "heads", "best on val", "criterion", "val"]]
    for sweep in sweeps:
        key, name, value = measure_name(sweep.select), "none finished yet", None
        if best := sweep.best:
            name, value = f"{best['head']} on {best['view']} {best['output']}", best["val"].get(key)
        rows.append([str(sweep.path), f"{sweep.heads:,}", one_line(name), METRICS[key].title, number(value)])
    return "\n".join(aligned(rows, right=4))


def made_words(run: RunRecord) -> str:
    """``2026-11-30 09:15``: when it was made."""
    return str(run.config["created"])[:16].replace("T", " ")
