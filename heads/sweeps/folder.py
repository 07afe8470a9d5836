"""The folder of a sweep: which one, what its record says, and that nothing else is put into it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from featurecache import __version__
from featurecache.errors import CacheError, RunError
from featurecache.records import read_record
from heads import checks
from heads.architectures import head_info
from heads.data import task_of
from heads.metrics import METRICS
from heads.settings import is_baseline
from heads.sweeps.plan import Plan

RECORD = "sweep.json"
FORMAT = 1
Row = dict[str, Any]


def sweep_folder(out: str | Path | None, plan: Plan) -> Path:
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise RunError(f"--out {out} is a file; it must be a folder, or a name that is free.")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
            raise RunError(f"--out {out} holds other files and no sweep; give a folder that is empty or not there.")
        return folder
    number, stem = 1, f"ablate-{plan.matched.views[0].name}"
    while True:
        folder = Path("runs") / f"{stem}-{number}"
        if not folder.exists():
            return folder
        if (folder / RECORD).is_file() and not _differences(read_sweep(folder)["frame"], _frame(plan)):
            return folder
        number += 1


def read_sweep(folder: Path) -> dict[str, Any]:
    try:
        record = read_record(folder / RECORD)
    except CacheError as error:
        raise RunError(f"{folder} is damaged: {error}") from error
    if record.get("format") != FORMAT:
        raise RunError(f"{folder} has sweep format {str(record.get('format'))[:40]}; this featurecache reads {FORMAT}.")
    kinds: dict[str, Any] = {"frame": dict, "views": dict, "asked": list, "ram": (int, float), "select": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if wrong or record["select"] not in (*METRICS, "loss"):
        raise RunError(f"{folder} is damaged: {RECORD} has no proper {' and no '.join(wrong or ['select'])}.")
    return record


def _frame(plan: Plan) -> dict[str, Any]:
    """What the heads of one sweep must have in common for their numbers to compare."""
    base, matched = plan.asked.base, plan.matched
    names = ("select", "split_seed", "resplit_val", "train_per_class", "drop_leaks", "positive", "sensitivity")
    first = plan.splits(0, 1.0, plan.asked.draws[0])
    task = task_of(matched.views[0], classes=base.classes, only=base.only, positive=base.positive)
    return {
        "images": matched.digest(),
        "number of images": len(matched.places[0]),
        "classes": list(task.classes),
        "folds": plan.asked.folds,
        **{name: getattr(base, name) for name in names},
        "splits": matched.digest(first.names),
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [key for key in new if old.get(key, ...) != new[key]]


def check_frame(folder: Path, record: dict[str, Any], plan: Plan) -> None:
    old, new = record["frame"], _frame(plan)
    if not (different := _differences(old, new)):
        return
    name = different[0]
    if name == "images":
        what = f"of other images or labels ({old.get('number of images')} there, {new['number of images']} here)"
    elif name == "splits":
        what = "with other splits: divided by another --splits, or by the rows of another first view in --features"
    else:
        what = f"with {name.replace('_', ' ')} {_word(old.get(name))}, not {_word(new[name])}"
    raise RunError(f"{folder} holds a sweep {what}. Its numbers would not compare; give another --out.")


def _word(value: Any) -> str:
    return "none" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    from featurecache.files import writing
    from featurecache.locks import alone

    with writing(folder):
        (folder / "heads").mkdir(parents=True, exist_ok=True)
    with alone(folder, "ablate"):
        for torn in (folder / "heads").glob(".*.partial"):
            shutil.rmtree(torn, ignore_errors=True)
        yield


def write_record(folder: Path, record: dict[str, Any] | None, plan: Plan) -> None:
    from featurecache.files import write_whole

    asked = plan.asked.to_dict()
    old = record or {"format": FORMAT, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "asked": []}
    labels = {plan.matched.views[e.number].fingerprint: e.view for e in plan.entries}
    whole = json.loads(json.dumps(asked))
    new = old | {
        "select": plan.asked.base.select, "frame": _frame(plan), "ram": plan.ram, "featurecache": __version__,
        "views": old.get("views", {}) | labels, "command": command_of(plan, folder),
        "asked": [*(each for each in old["asked"] if each != whole), whole],
    }  # fmt: skip
    write_whole(folder / RECORD, (json.dumps(new, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def command_of(plan: Plan, folder: Path) -> str:
    """The command line that asks for this sweep."""
    from heads.reports.origin import option_words, source_words, view_word

    asked = plan.asked
    options: dict[str, Any] = {"heads": ",".join(asked.heads)}
    views = {e.view: plan.matched.views[e.number].path for e in plan.entries if not is_baseline(e.head)}
    features = [view_word(label, path) for label, path in views.items()]
    options |= {"features": ",".join(features)} if features else {}
    options |= {"outputs": ",".join(asked.outputs)} if asked.outputs else {}
    options |= {name.replace("_", "-"): _grid_word(values) for name, values in asked.grid.items() if name != "augment"}
    options |= {"seeds": asked.seeds} if asked.seeds > 1 else {}
    options |= {"fractions": _grid_word(asked.fractions)} if asked.fractions != (1.0,) else {}
    options |= {"repeats": asked.repeats} if asked.repeats > 1 else {}
    options |= {"folds": asked.folds} if asked.folds else {}
    options |= {"search": asked.search, "trials": asked.trials} if asked.search else {}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += [] if features else source_words(plan.matched.views[0].source)
    words += [word for each in asked.grid.get("augment", ()) for word in ("--augment", each or "none")]
    return f"featurecache ablate {shlex.join([*words, *option_words(asked.base.to_dict()), '--out', str(folder)])}"


def _grid_word(values: Any) -> str:
    if hasattr(values, "low"):
        return f"{values.low:g}..{values.high:g}"
    return ",".join(value if isinstance(value, str) else f"{value:g}" for value in values)


def slug(row: Row) -> str:
    """The folder of a head: unlike for every family, seed, repeat and fold."""
    head = row["head"].rpartition(":")[2] if row["head"].startswith("python:") else row["head"]
    words = [row["view"], row["output"], head, *([f"{row['fraction']:g}"] if row["fraction"] < 1 else [])]
    if not _is_solved(row):
        words.append(f"seed{row['settings']['seed']}")
    words += [f"repeat{row['repeat']}"] if row["repeat"] else []
    words += [] if row["fold"] is None else [f"fold{row['fold']}"]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(words)).lstrip(".")[:200]


def _is_solved(row: Row) -> bool:
    return not row["head"].startswith("python:") and head_info(row["head"]).solved


def key_in(path: Path) -> str | None:
    """Which head a run folder of the sweep holds."""
    try:
        return checks.read_config(path).get("sweep", {}).get("key")
    except RunError:
        return None
