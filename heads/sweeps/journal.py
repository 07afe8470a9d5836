"""Journal of a resumable folder: append-only rows of finished heads, checked records, staged runs; the sweep folder.

A killed command goes on where its journal ends; studies keep their steps in one, too.

Rows that belong together (heads that were trained together) come in one write and carry ``together``: [place, number].
After a kill, what does not end with the last line of a complete set is as if it had never been written, so heads are
always trained in the company they would have had.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featurecache import __version__
from featurecache.errors import CacheError, RunError
from featurecache.files.atomic import sync_path, write_whole, writing
from featurecache.files.locks import exclusive_lock
from featurecache.files.names import check_path
from featurecache.files.records import nan_to_none, parse_json
from heads.evaluation.families import Family, family_of, select_setting, selection_key
from heads.models.catalogue import head_info
from heads.runs.run import FORMAT, Run, load_run, read_config, read_folder
from heads.runs.write import RunContents, check_out
from heads.settings import METRICS
from heads.sweeps.plan import SweepPlan
from heads.task import clusters_of
from heads.training.job import TrainingJob

RECORD, ROWS, STAGED = "sweep.json", "rows.jsonl", ".unchosen"
MOST = 1 << 31  # bytes of a journal
Row = dict[str, Any]
COLUMNS: dict[str, type] = {
    "key": str, "view": str, "output": str, "head": str, "fraction": float, "repeat": int, "settings": dict,
    "seconds": float,
}  # fmt: skip
_CHECKSUM = 16  # digits that a staged file begins with


def read_journal(file: Path, columns: dict[str, type] = COLUMNS) -> tuple[list[Row], int]:
    """The rows of complete sets, and the length in bytes up to the last of them: what follows is torn. Raises RunError
    where a line before it is no row."""
    if not file.exists():
        return [], 0
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST:
        raise RunError(f"{file} is not a table of ours: a link, no plain file, or too large.")
    rows: list[Row] = []
    together: list[Row] = []
    position = end = damaged = 0
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        position += len(line) + 1
        row = _row(line, columns)
        if row is None:
            damaged = damaged or number
            continue
        if damaged:
            raise RunError(
                f"{file} is damaged: line {damaged} is none of its rows. Delete that line to have it done again."
            )
        place, number_together = row["together"]
        together = [*together, row] if place == len(together) else [row] if place == 0 else []
        if len(together) == number_together:
            rows.extend(together)
            together, end = [], position
    return rows, end


def _row(line: bytes, columns: dict[str, type]) -> Row | None:
    try:
        row = parse_json(line.decode("utf-8"), ROWS)
    except (CacheError, UnicodeDecodeError):
        return None
    kinds = columns | {"together": list}
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return None
    place = row["together"]
    return row if len(place) == 2 and all(type(n) is int for n in place) and 0 <= place[0] < place[1] else None


class JournalFile:
    """A file of rows to be continued: what was torn is cut off, sets of rows are appended and on the disk at once."""

    def __init__(self, path: Path, columns: dict[str, type] = COLUMNS, key: str = "key") -> None:
        self.path, self.key = path, key
        self.rows, end = read_journal(path, columns)
        if path.exists() and path.stat().st_size > end:
            with writing(path):
                os.truncate(path, end)
                sync_path(path)
        self.by_key = {row[key]: row for row in self.rows}

    def append(self, rows: Sequence[Row]) -> None:
        """Rows that belong together, in their order."""
        rows = [nan_to_none(row | {"together": [place, len(rows)]}) for place, row in enumerate(rows)]
        data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
        with writing(self.path):
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_path(self.path.parent)
        self.rows += rows
        self.by_key |= {row[self.key]: row for row in rows}

    def together_with(self, key: str) -> list[Row]:
        """The rows of the set that a row was written in, in order."""
        place = next(i for i, row in enumerate(self.rows) if row[self.key] == key)
        start = place - self.rows[place]["together"][0]
        return self.rows[start : start + self.rows[place]["together"][1]]


def write_json(file: Path, record: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def in_use(folder: Path, by: str, *below: str) -> Iterator[None]:
    """Make a folder and those ``below`` it, and keep every other process out. Unfinished run folders are removed."""
    with writing(folder):
        for name in below:
            (folder / name).mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder, by):
        for unfinished in (path for name in below for path in (folder / name).glob(".*.partial")):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


class StagedRuns:
    """Finished heads that wait for the choice: a file each in a hidden folder, until their family is decided.

    Only a help: what is missing or damaged here (after a power failure; nothing is synced) is trained again, in the
    same company, to the same bytes.
    """

    def __init__(self, sweep: Path) -> None:
        self.folder = sweep / STAGED
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()

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
        check, data = whole[:_CHECKSUM], whole[_CHECKSUM:]
        if xxhash.xxh3_64_hexdigest(data).encode() != check:
            return None
        size = int.from_bytes(data[:8], "little")
        record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])
        tensors = load(data)
        return RunContents(
            record["config"], record["metrics"], record["history"],
            {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")},
            list(job.view.ids), job.splits.names, job.task.labels,
            {split: (job.splits.rows(split), tensors[split].numpy()) for split in ("val", "test")},
            np.asarray(job.view.digests), clusters_of(job.view),
        )  # fmt: skip

    def clear(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def open_sweep(out: str | Path | None, plan: SweepPlan) -> Path:
    """The folder of a planned sweep; where one lies in it, the plan takes the names of views and the budget of memory
    that it began with. Raises RunError where it holds another sweep, or anything else."""
    frame = _frame(plan)
    folder = check_out(out, RECORD, "sweep") if out is not None else _free_folder(plan.matched.views[0].name, frame)
    if (folder / RECORD).exists():
        record = _read_sweep(folder)
        if difference := _difference(record["frame"], frame):
            raise RunError(f"{folder} holds a sweep {difference}. Its numbers would not compare; give another --out.")
        names, views = record["views"], plan.matched.views
        plan.families = [replace(f, view=names.get(views[f.number].fingerprint, f.view)) for f in plan.families]
        plan.ram = record["ram"] if plan.spec.base.ram is None else plan.ram
    return folder


def _free_folder(view: str, frame: dict[str, Any]) -> Path:
    """The first that is not there, or holds this sweep."""
    for number in count(1):
        folder = Path("runs") / f"ablate-{view}-{number}"
        same = (folder / RECORD).is_file() and not _difference(_read_sweep(folder)["frame"], frame)
        if same or not folder.exists():
            break
    check_path(folder, "--out")
    return folder


def _read_sweep(folder: Path) -> dict[str, Any]:
    kinds = {"frame": dict, "views": dict, "asked": list, "ram": (int, float), "select": str}
    record = read_folder(folder, RECORD, "sweep", kinds)
    if record["select"] not in (*METRICS, "loss"):
        raise RunError(f"{folder} is damaged: {RECORD} has no proper select.")
    return record


def _frame(plan: SweepPlan) -> dict[str, Any]:
    """What the heads of one sweep must have in common for their numbers to compare."""
    base, matched = plan.spec.base, plan.matched
    names = ("select", "split_seed", "resplit_val", "train_per_class", "drop_leaks", "positive", "sensitivity")
    return {
        "images": matched.digest(), "number of images": len(matched.rows[0]), "classes": list(plan.task.classes),
        "folds": plan.spec.folds, **{name: getattr(base, name) for name in names},
        "splits": matched.digest(plan.splits(0, 1.0, plan.spec.resplits[0]).names),
    }  # fmt: skip


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What of a frame is other, in words; "" where nothing is."""
    name = next((key for key in new if old.get(key, ...) != new[key]), "")
    values = (old.get(name), new.get(name))
    there, here = (", ".join(v) if isinstance(v, list) else "none" if v is None else v for v in values)
    counts = f"{old.get('number of images')} there, {new['number of images']} here"
    words = {
        "": "", "images": f"of other images or labels ({counts})",
        "splits": "with other splits: divided by another --splits, or by the rows of another first view in --features",
    }  # fmt: skip
    return words.get(name, f"with {name.replace('_', ' ')} {there}, not {here}")


def write_sweep(folder: Path, plan: SweepPlan) -> None:
    """Write what the sweep is, or what it is now."""
    spec = json.loads(json.dumps(plan.spec.to_dict()))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    first: dict[str, Any] = {"format": FORMAT, "created": now, "asked": []}
    old = _read_sweep(folder) if (folder / RECORD).exists() else first
    labels = {plan.matched.views[f.number].fingerprint: f.view for f in plan.families}
    new = {
        "select": plan.spec.base.select, "frame": _frame(plan), "ram": plan.ram, "featurecache": __version__,
        "views": old.get("views", {}) | labels, "command": plan.command(folder),
        "asked": [*(each for each in old["asked"] if each != spec), spec],
    }  # fmt: skip
    write_json(folder / RECORD, old | new)


def slug(row: Row) -> str:
    """The folder of a head: unlike for every family, seed, repeat and fold."""
    own = row["head"].startswith("python:")
    words = [row["view"], row["output"], row["head"].rpartition(":")[2] if own else row["head"]]
    words += [f"{row['fraction']:g}"] if row["fraction"] < 1 else []
    words += [f"seed{row['settings']['seed']}"] if own or not head_info(row["head"]).solved else []
    words += [f"repeat{row['repeat']}"] if row["repeat"] else []
    words += [] if row["fold"] is None else [f"fold{row['fold']}"]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(words)).lstrip(".")[:200]


def key_in(path: Path) -> str | None:
    """Which head a run folder of the sweep holds."""
    try:
        return read_config(path).get("sweep", {}).get("key")
    except RunError:
        return None


@dataclass(frozen=True)
class Sweep:
    """A sweep folder as it is. ``families``: those whose chosen heads are all there."""

    path: Path
    record: dict[str, Any]
    rows: list[Row]
    families: list[Family]

    @property
    def best(self) -> Run:
        """A run of the family that is best on val."""
        keys = [selection_key([run.metrics for run in family.runs], self.record["select"]) for family in self.families]
        return self.families[keys.index(min(keys))].runs[0]


def list_sweeps(folder: str | Path = "runs") -> list[Sweep]:
    """The sweeps in a folder, by name; anything else in it is passed over."""
    sweeps = []
    for path in sorted(Path(folder).glob(f"*/{RECORD}")):
        with suppress(RunError):  # of another version; load_sweep on it says what is wrong
            sweeps.append(load_sweep(path.parent))
    return sweeps


def load_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder; raises RunError where it is none."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is no sweep: it has no {RECORD}. featurecache ablate makes one.")
    record, (rows, _) = _read_sweep(path), read_journal(path / ROWS)
    by_family: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        by_family.setdefault(family_of(row), []).append(row)
    families = []
    for family, own in by_family.items():
        choice = select_setting(own, record["select"])
        folders = [(path / "heads" / slug(row), row["key"]) for row in choice.rows] if choice else []
        if folders and all(key_in(folder) == key for folder, key in folders):
            families.append(Family(*family, tuple(load_run(folder) for folder, _ in folders), tuple(own)))
    return Sweep(path, record, rows, families)
