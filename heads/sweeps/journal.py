"""The sweep folder: record, rows.jsonl, staged runs; Sweep.

The folder of a sweep: which one, what its record says, and that nothing else is put into it.

The table of a sweep on disk: a line of JSON for every finished head, in ``rows.jsonl``.

Lines of heads that were trained together come in one write and carry ``together``: [place, number]. After a kill, what
does not end with the last line of a complete set is as if it had never been written, so heads are always trained in
the company they would have had.

Finished heads that wait for the choice: a file each in a hidden folder of the sweep, until their family is decided.

Only a help: what is missing or damaged here (after a power failure; nothing is synced) is trained again, in the same
company, to the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featurecache import __version__
from featurecache.errors import CacheError, RunError
from featurecache.files.atomic import sync_path, writing
from featurecache.files.records import parse, plain, read_record
from heads.evaluation.families import Family, family_of, select_setting, selection_key
from heads.metrics.classification import METRICS
from heads.models.catalogue import head_info
from heads.reports.provenance import option_words, source_words, view_word
from heads.runs import run
from heads.runs.run import Run, load_run
from heads.runs.write import RunContents
from heads.settings import is_network
from heads.sweeps.plan import SweepPlan
from heads.task import clusters_of, task_of
from heads.training.job import TrainingJob


@dataclass(frozen=True)
class Sweep:
    """A sweep folder as it is. ``families``: those whose chosen heads are all there; ``unfinished``: the others."""

    path: Path
    record: dict[str, Any]
    rows: list[Row]
    families: list[Family]
    unfinished: list[str]

    @property
    def best(self) -> Run:
        """A run of the family that is best on val."""

        def place(family: Family) -> tuple[float, float]:
            return selection_key([{"val": run.metrics["val"]} for run in family.runs], self.record["select"])

        return min(self.families, key=place).runs[0]


def list_sweeps(folder: str | Path = "runs") -> list[Sweep]:
    """The sweeps in a folder, by name; anything else in it is passed over."""
    found = []
    for path in sorted(Path(folder).glob("*/sweep.json")):
        try:
            found.append(load_sweep(path.parent))
        except RunError:  # of another version; load_sweep on it says what is wrong
            continue
    return found


def load_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder; raises RunError where it is none."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is no sweep: it has no {RECORD}. featurecache ablate makes one.")
    record, (rows, _) = read_sweep(path), read_rows(path)
    families: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        families.setdefault(family_of(row), []).append(row)
    found, unfinished = [], []
    for family, own in families.items():
        choice = select_setting(own, record["select"])
        folders = [path / "heads" / slug(row) for row in choice.rows] if choice else []
        if not choice or any(key_in(f) != row["key"] for f, row in zip(folders, choice.rows, strict=True)):
            unfinished.append(" ".join(map(str, family[:3])))
            continue
        runs = tuple(load_run(folder) for folder in folders)
        found.append(Family(*family, runs, tuple(own)))
    return Sweep(path, record, rows, found, unfinished)


RECORD = "sweep.json"
FORMAT = 1
Row = dict[str, Any]


def sweep_folder(out: str | Path | None, plan: SweepPlan) -> Path:
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


def _frame(plan: SweepPlan) -> dict[str, Any]:
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


def check_frame(folder: Path, record: dict[str, Any], plan: SweepPlan) -> None:
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
    from featurecache.files.atomic import writing
    from featurecache.files.locks import exclusive_lock

    with writing(folder):
        (folder / "heads").mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder, "ablate"):
        for torn in (folder / "heads").glob(".*.partial"):
            shutil.rmtree(torn, ignore_errors=True)
        yield


def write_record(folder: Path, record: dict[str, Any] | None, plan: SweepPlan) -> None:
    from featurecache.files.atomic import write_whole

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


def command_of(plan: SweepPlan, folder: Path) -> str:
    """The command line that asks for this sweep."""
    asked = plan.asked
    options: dict[str, Any] = {"heads": ",".join(asked.heads)}
    views = {e.view: plan.matched.views[e.number].path for e in plan.entries if not is_network(e.head)}
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
        return run.read_config(path).get("sweep", {}).get("key")
    except RunError:
        return None


ROWS = "rows.jsonl"
MOST = 1 << 31  # bytes
_KINDS = {
    "key": str, "view": str, "output": str, "head": str, "fraction": float, "repeat": int, "settings": dict,
    "together": list, "seconds": float,
}  # fmt: skip


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of complete sets, and the length in bytes up to the last of them: what follows is torn. Raises RunError
    where a line before it is no row."""
    file = folder / ROWS
    if not file.exists():
        return [], 0
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST:
        raise RunError(f"{file} is not a table of ours: a link, no plain file, or too large.")
    rows: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    position = end = torn = 0
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        position += len(line) + 1
        row = _row(line)
        if row is None:
            torn = torn or number
            continue
        if torn:
            raise RunError(
                f"{file} is damaged: line {torn} is none of its rows. Delete that line: it is trained again."
            )
        place, count = row["together"]
        group = [*group, row] if place == len(group) else [row] if place == 0 else []
        if len(group) == count:
            rows.extend(group)
            group, end = [], position
    return rows, end


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line.decode("utf-8"), ROWS)
    except (CacheError, UnicodeDecodeError):
        return None
    fine = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in _KINDS.items())
    return row if fine and _is_place(row["together"]) else None


def _is_place(together: list[Any]) -> bool:
    return len(together) == 2 and all(type(n) is int for n in together) and 0 <= together[0] < together[1]


class JournalFile:
    """``rows.jsonl`` to be continued: what was torn is cut off, sets of rows are appended and on the disk at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self.rows, end = read_rows(folder)
        with writing(self.path):
            if self.path.exists() and self.path.stat().st_size > end:
                os.truncate(self.path, end)
                sync_path(self.path)
        self.by_key = {row["key"]: row for row in self.rows}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of heads that were trained together, in their order."""
        told = [plain(row | {"together": [place, len(rows)]}) for place, row in enumerate(rows)]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in told)
        with writing(self.path):
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _write_all(descriptor, text.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_path(self.path.parent)
        self.rows += told
        self.by_key |= {row["key"]: row for row in told}

    def together_with(self, key: str) -> list[dict[str, Any]]:
        """The rows of the set that a row was trained in, in order."""
        place = next(i for i, row in enumerate(self.rows) if row["key"] == key)
        start = place - self.rows[place]["together"][0]
        return self.rows[start : start + self.rows[place]["together"][1]]


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


FOLDER = ".unchosen"
_DIGITS = 16  # of the checksum that a file begins with


class StagedRuns:
    def __init__(self, sweep: Path) -> None:
        self.folder = sweep / FOLDER
        for torn in self.folder.glob(".*.tmp"):
            torn.unlink()

    def put(self, key: str, contents: RunContents) -> None:
        """All of ``contents`` that is not the view's or the splits'."""
        from safetensors.torch import save

        record = {"config": contents.config, "metrics": contents.metrics, "history": contents.history}
        tensors = {f"head.{name}": tensor for name, tensor in contents.tensors.items()}
        for split, (_, logits) in contents.predictions.items():
            tensors[split] = torch.from_numpy(np.ascontiguousarray(logits))
        data = save(tensors, {"record": json.dumps(record)})
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f".{key}.tmp"
        temporary.write_bytes(xxhash.xxh3_64_hexdigest(data).encode() + data)
        os.replace(temporary, self._path(key))

    def take(self, key: str, job: TrainingJob) -> RunContents | None:
        """As it was put there, None where it is not."""
        from safetensors.torch import load

        try:
            whole = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        check, data = whole[:_DIGITS], whole[_DIGITS:]
        if xxhash.xxh3_64_hexdigest(data).encode() != check:
            return None
        size = int.from_bytes(data[:8], "little")
        record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])
        tensors = load(data)
        return RunContents(
            record["config"], record["metrics"], record["history"],
            {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")},
            list(job.view.ids), job.divided.names, job.task.labels,
            {split: (job.divided.rows(split), tensors[split].numpy()) for split in ("val", "test")},
            np.asarray(job.view.digests), clusters_of(job.view),
        )  # fmt: skip

    def clear(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
