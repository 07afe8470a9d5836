"""The folder of a sweep: what lies in it, its staged runs, its chosen heads; opened again, or for a report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache import __version__
from featurecache.errors import RunError
from featurecache.files.names import check_path
from featurecache.files.records import canonical_json
from heads.evaluation.families import Family
from heads.evaluation.selection import Row, family_of, newest_rows, select_setting, selection_key
from heads.models.catalogue import head_info
from heads.runs.folder import check_listed, is_leftover, read_whole_tensors, write_record, write_tensors
from heads.runs.records import NEEDED
from heads.runs.run import Run, hash_of, load_run
from heads.runs.write import RunContents, check_out
from heads.sweeps.journal import RECORD, ROWS, read_journal, read_sweep_record
from heads.sweeps.plan import SweepPlan, family_text
from heads.task import FeatureView, clusters_of
from heads.training.job import TrainingJob, code_hash

STAGED = ".unchosen"


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
        record = {"config": contents.config, "metrics": contents.metrics, "history": contents.history}
        tensors = {f"head.{name}": tensor for name, tensor in contents.tensors.items()}
        for split, (_, logits) in contents.predictions.items():
            tensors[split] = torch.from_numpy(np.ascontiguousarray(logits))
        write_tensors(self._path(key), tensors, record, sync=False)

    def take(self, key: str, job: TrainingJob) -> RunContents | None:
        """As it was put there, None where it is not."""
        whole = read_whole_tensors(self._path(key))
        if whole is None:
            return None
        tensors, record = whole
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
    that it began with. No two views in it have one name. Raises RunError where it holds another sweep, or anything
    else."""
    frame = _frame(plan)
    folder = check_out(out, RECORD, "sweep") if out is not None else _free_folder(plan.matched.views[0].name, frame)
    names, keys = dict[str, str](), [_view_key(view) for view in plan.matched.views]
    if (folder / RECORD).exists():
        record = read_sweep_record(folder)
        if difference := _difference(record["frame"], frame):
            raise RunError(f"{folder} holds a sweep {difference}. Its numbers would not compare; give another --out.")
        names |= record["views"]
        plan.ram = record["ram"] if plan.spec.base.ram is None else plan.ram
    for view, key in zip(plan.matched.views, keys, strict=True):
        copies = f"{view.label}{key.removeprefix(view.fingerprint)}"
        ways = (view.label, copies, f"{copies} ({view.fingerprint[:8]})", f"{copies} ({view.fingerprint})")
        if key not in names:
            names[key] = next(way for way in ways if way not in names.values())
    plan.families = [replace(family, view=names[keys[family.number]]) for family in plan.families]
    return folder


def _view_key(view: FeatureView) -> str:
    """Which features a view holds, and which augmented copies."""
    return view.fingerprint + (f" with {view.augmented}" if view.augmented else "")


def _free_folder(view: str, frame: dict[str, Any]) -> Path:
    """The first that is not there, or holds this sweep."""
    for number in count(1):
        folder = Path("runs") / f"ablate-{view}-{number}"
        same = (folder / RECORD).is_file() and not _difference(read_sweep_record(folder)["frame"], frame)
        if same or not folder.exists() or all(map(is_leftover, folder.iterdir())):
            break
    check_path(folder, "--out")
    return folder


def _frame(plan: SweepPlan) -> dict[str, Any]:
    """What the heads of one sweep must have in common for their numbers to compare."""
    base, matched = plan.spec.base, plan.matched
    names = ("select", "split_seed", "resplit_val", "train_per_class", "drop_leaks", "positive", "sensitivity")
    return {
        "images": matched.digest(), "number of images": len(matched.rows[0]), "classes": list(plan.task.classes),
        "folds": plan.spec.folds, **{name: getattr(base, name) for name in names},
        "splits": matched.digest(plan.splits(0, 1.0, plan.spec.resplits[0]).names),
        "code": {head: code for head in plan.spec.heads if (code := code_hash(head))},
    }  # fmt: skip


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What of a frame is other, in words; "" where nothing is."""
    code = old.get("code", {})
    if changed := [head for head, word in new["code"].items() if code.get(head, word) != word]:
        return f"with another version of {', '.join(changed)}"
    name = next((key for key in new if key != "code" and old.get(key, ...) != new[key]), "")
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
    first: dict[str, Any] = {"created": now, "asked": [], "commands": [], "frame": {}, "ram": plan.ram, "views": {}}
    old = read_sweep_record(folder) if (folder / RECORD).exists() else first
    old.pop("files", None)  # it lists them again when it is finished
    labels = {_view_key(plan.matched.views[f.number]): f.view for f in plan.families}
    frame, command = _frame(plan), plan.command(folder)
    frame["code"] = old["frame"].get("code", {}) | frame["code"]
    new = {
        "select": plan.spec.base.select, "frame": frame, "featurecache": __version__, "views": old["views"] | labels,
        "commands": list(dict.fromkeys([*old.get("commands", []), command])),
        "asked": [*(each for each in old["asked"] if each != spec), spec],
    }  # fmt: skip
    write_record(folder / RECORD, old | new)


def slug(row: Row) -> str:
    """The folder of a head: words for people, and a hash that is another for every family, seed, repeat and fold."""
    own = row["head"].startswith("python:")
    place = [*family_of(row), row["repeat"], row["fold"]]
    words = [row["view"], row["output"], row["head"].rpartition(":")[2] if own else row["head"]]
    if own or not head_info(row["head"]).solved:
        words.append(f"seed{row['settings']['seed']}")
        place.append(row["settings"]["seed"])
    text = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(words)).lstrip(".")[:80]
    return f"{text}-{hash_of(canonical_json(place))[:12]}"


def run_at(path: Path) -> Run | None:
    """The head in a run folder of the sweep; None where it is none, or not whole."""
    try:
        run = load_run(path)
        run.check()
    except RunError:
        return None
    return run


@dataclass(frozen=True)
class Sweep:
    """A sweep folder as it is. ``families``: those whose chosen heads are all there; ``unfinished``, ``damaged``: the
    others by name, with the reason."""

    path: Path
    record: dict[str, Any]
    rows: list[Row]
    families: list[Family]
    unfinished: dict[str, str]
    damaged: dict[str, str]

    @property
    def best(self) -> Run:
        """A run of the family that is best on val."""
        keys = [selection_key([run.metrics for run in family.runs], self.record["select"]) for family in self.families]
        return self.families[keys.index(min(keys))].runs[0]


def list_sweeps(folder: str | Path = "runs", errors: list[RunError] | None = None) -> list[Sweep]:
    """The sweeps in a folder, by name; ``errors``: takes what is wrong with the others."""
    sweeps = []
    for path in sorted(Path(folder).glob(f"[!.]*/{RECORD}")):
        try:
            sweeps.append(load_sweep(path.parent))
        except RunError as error:
            if errors is not None:
                errors.append(error)
    return sweeps


def load_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder; raises RunError where it is none, or its record or rows are damaged."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is no sweep: it has no {RECORD}. featurecache ablate makes one.")
    record = read_sweep_record(path)
    check_listed(path / RECORD, record, record.get("files", {}))
    rows = read_journal(path / ROWS)[0]
    sweep = Sweep(path, record, rows, [], {}, {})
    by_family: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        by_family.setdefault(family_of(row), []).append(row)
    for family, own in by_family.items():
        try:
            _add_family(sweep, family, own)
        except RunError as error:
            sweep.damaged[family_text(*family)] = str(error)
    if "files" not in record:
        begun = {family[2] for family in by_family}
        wanted = {str(name) for spec in record["asked"] if isinstance(spec, dict) for name in spec.get("heads") or ()}
        sweep.unfinished.update(dict.fromkeys(sorted(wanted - begun), "none of it is trained yet"))
        sweep.unfinished[path.name] = "the sweep was not finished; the same ablate command goes on"
    return sweep


def _add_family(sweep: Sweep, family: tuple[str, str, str, float], rows: list[Row]) -> None:
    """The chosen heads of a family, which a report reads whole; raises RunError where one of them is damaged."""
    choice = select_setting(rows, sweep.record["select"])
    if choice is None:
        sweep.unfinished[family_text(*family)] = "no setting of it worked on every draw"
        return
    runs = []
    for row in choice.rows:
        folder = sweep.path / "heads" / slug(row)
        run = load_run(folder) if folder.is_dir() else None
        if run is None or run.config.get("sweep", {}).get("key") != row["key"]:
            sweep.unfinished[family_text(*family)] = "its chosen heads are not all written yet"
            return
        run.check(NEEDED[1:])
        runs.append(run)
    sweep.families.append(Family(*family, tuple(runs), tuple(newest_rows(rows))))
