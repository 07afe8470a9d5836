"""A run in a few lines, for ``featurecache info``."""

from __future__ import annotations

from typing import Any

from featurecache.amounts import columns
from heads.families import setting_shown
from heads.pixels import is_pixels
from heads.prediction import printable
from heads.reports.origin import setting_words, train_command
from heads.reports.wording import chosen_words
from heads.runs import Run
from heads.tables import final_table


def run_lines(run: Run) -> str:
    """What it is, how it came about and what it measured; config.json has the rest."""
    config = run.config
    view, splits = config["view"], config["splits"]
    images = " · ".join(f"{name} {n:,}" for name, n in (splits.get("images") or {}).items())
    shape = "×".join(str(n) for n in view["shape"])
    rows: list[tuple[str, Any]] = [
        ("run", f"{run.path}   {run.head}: {config['parameters']:,} parameters, made {_made(run)}"),
        ("images" if is_pixels(run) else "features", f"{view['label']} {run.output} [{shape}]"),
        ("classes", ", ".join(run.classes[:12]) + (", …" if len(run.classes) > 12 else "")),
        ("setting", setting_words(setting_shown(run))),
        ("splits", f"{images} ({splits.get('how')})"),
        ("chosen", f"epoch {config['chosen']['epoch']}, {chosen_words(run.task, [run])} on val"),
        ("again", train_command(run)),
    ]
    lines = columns((word, printable(str(words))) for word, words in rows if words)
    return f"{lines}\n\n{final_table(run)}\n{columns([('files', f'{run.path}/   config.json has every setting')])}"


def _made(run: Run) -> str:
    return str(run.config["created"])[:16].replace("T", " ")
