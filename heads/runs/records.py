"""Records of runs: load, list and check run folders, by what config.json, metrics.json and history.csv must hold.

A run folder may be somebody else's: its records are bounded, and of the form that ours have, or refused. Nothing here
loads torch, which takes seconds: `RunRecord` is all that a table of runs is made of.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featurecache.errors import CacheError, RunError
from featurecache.files.records import parse_json
from featurecache.store.schema import MAX_VALUES, TASKS
from heads.runs.folder import check_listed, partial_path, read_checked_record, read_listed, wrong_kinds
from heads.settings import METRICS, SPLITS

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_VIEW = {"label": str, "path": str, "output": str, "shape": list, "untrained": bool}
_CONFIG = {
    "head": str, "view": dict, "task": str, "classes": list, "positive": (str, type(None)), "calibration": dict,
    "standardize": str, "spec": dict, "provenance": dict, "parameters": int, "splits": dict, "chosen": dict,
    "created": str, "settings": dict, "files": dict, "notes": list,
}  # fmt: skip
CONFIG, METRICS_FILE, BACKBONE = "config.json", "metrics.json", "backbone"
AT_LIMIT = "it ended at its limit"  # how the note of a run begins whose epochs were not enough
NEEDED = (
    CONFIG, METRICS_FILE, "metrics.csv", "history.csv", "predictions.csv", "splits.csv",
    "answers.safetensors", "head.safetensors",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class RunRecord:
    """What the records of a finished run say. Every file is compared with its hash when it is read."""

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]  # "val", "test": measures by name; "controls": list of the same
    history: list[dict[str, float]]
    folder: Path = Path()  # where the files lie: ``path``, but for a run that is still being written

    def read(self, name: str) -> bytes:
        """The bytes of one of its files; RunError where they are not what was written."""
        return read_listed(self.folder / CONFIG, self.config, name)

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises RunError where one of its files (None: any) is not what was written."""
        check_listed(self.folder / CONFIG, self.config, self.config["files"] if names is None else names)

    @property
    def head(self) -> str:
        return self.config["head"]

    @property
    def output(self) -> str:
        return self.config["view"]["output"]

    @property
    def task(self) -> str:
        return self.config["task"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def positive(self) -> int | None:
        """Index of the positive class of a binary task."""
        name = self.config["positive"]
        if name is not None and name not in self.classes:
            raise RunError(f"{self.path} is damaged: its positive class is none of its classes.")
        return None if name is None else self.classes.index(name)

    @property
    def untrained(self) -> bool:
        return self.config["view"]["untrained"]


def load_record(path: str | Path) -> RunRecord:
    """Of a run folder; raises RunError where it is none or not whole."""
    path = Path(path)
    if not path.is_dir():
        way = "a run is one, such as runs/chest-large-1. featurecache ls lists them"
        if (partial_path(path) / "old").is_dir():
            way = "it was being replaced when that was stopped. The same command goes on"
        raise RunError(f"{path} is not a folder; {way}.")
    if missing := [name for name in NEEDED if not (path / name).is_file()]:
        raise RunError(f"{path} is not a finished run: it has no {', '.join(missing)}. Train it again.")
    if links := [name for name in NEEDED if (path / name).is_symlink()]:
        raise RunError(f"{path} holds symbolic links ({', '.join(links)}); put the files themselves there.")
    config = read_config(path)
    metrics = parse_metrics(path, read_listed(path / CONFIG, config, METRICS_FILE))
    history = parse_history(path, read_listed(path / CONFIG, config, "history.csv"))
    return RunRecord(path, config, metrics, history, path)


def list_records(folder: str | Path = "runs", errors: list[RunError] | None = None) -> list[RunRecord]:
    """The finished runs in a folder, by name; ``errors``: takes what is wrong with the others that have a config."""
    records = []
    for path in sorted(Path(folder).glob(f"[!.]*/{CONFIG}")):
        try:
            records.append(load_record(path.parent))
        except RunError as error:  # damaged, of another version, or somebody else's
            if errors is not None:
                errors.append(error)
    return records


def read_config(path: Path) -> dict[str, Any]:
    config = read_checked_record(path / CONFIG, "run", _CONFIG)
    view, wrong = config["view"], [f"view {key}" for key in wrong_kinds(config["view"], _VIEW)]
    if not wrong:
        shape, classes, splits = view["shape"], config["classes"], config["splits"]
        numbers = 1 <= len(shape) <= 3 and all(type(n) is int and n > 0 for n in shape)
        proper = {
            "shape": numbers and math.prod(shape) <= MAX_VALUES,
            "places of tokens": _are_places(view),
            "classes": bool(classes) and all(isinstance(name, str) for name in classes),
            "task": config["task"] in TASKS,
            "chosen": config["chosen"].get("by") in (*METRICS, "loss"),
            "splits": isinstance(splits.get("digest"), str) and _are_leaks(splits),
            "calibration": _is_calibration(config["calibration"]),
            "notes": all(isinstance(note, str) for note in config["notes"]),
        }
        wrong = [name for name, fine in proper.items() if not fine]
    if wrong:
        raise RunError(f"{path} is damaged: config.json has no proper {' and no '.join(wrong)}.")
    return config


def parse_metrics(path: Path, data: bytes) -> dict[str, Any]:
    try:
        metrics = parse_json(data.decode(), f"{path} is damaged: metrics.json")
    except (CacheError, UnicodeDecodeError) as error:
        raise RunError(str(error)) from error
    if not isinstance(metrics, dict):
        raise RunError(f"{path} is damaged: metrics.json is no record.")
    controls = metrics.get("controls")
    parts = [metrics, *controls] if isinstance(controls, list) else [None]
    if not all(isinstance(part, dict) and all(_is_measured(part.get(s)) for s in ("val", "test")) for part in parts):
        raise RunError(f"{path} is damaged: metrics.json does not hold the measures of val, test and the controls.")
    val, test = metrics["val"], metrics["test"]
    shown = {name for name in METRICS if name in (test or {})} | {"nll"}
    named = all(not wrong_kinds(control, {"name": str, "note": (str, type(None))}) for control in controls or [])
    if not named or val is None or test is None or not shown <= set(val):
        raise RunError(f"{path} is damaged: metrics.json does not name what it measured.")
    return metrics


def parse_history(path: Path, data: bytes) -> list[dict[str, float]]:
    """A record an epoch."""
    rows = read_csv(data, path / "history.csv", lambda row: {key: float(value) for key, value in row.items()})
    if not rows or not all({"epoch", "val_loss", "best"} <= row.keys() for row in rows):
        raise RunError(f"{path} is damaged: history.csv holds no epochs.")
    return rows


def read_csv(data: bytes, file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")  # StringIO holds four bytes a character
        return [parse(row) for row in csv.DictReader(text, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, CacheError) as error:
        raise RunError(f"{file} is damaged: {error}.") from error


def read_tensors(data: bytes, file: Path) -> dict[str, torch.Tensor]:
    """Of the bytes of ``file``, in safetensors. Raises RunError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}).") from error


def _are_places(view: dict[str, Any]) -> bool:
    """Prefix and grid of tokens."""
    prefix, grid = view.get("prefix"), view.get("grid")
    fine = isinstance(prefix, list) and len(prefix) < 1000 and all(isinstance(word, str) for word in prefix)
    sides = grid if isinstance(grid, list) else [0]
    return fine and (grid is None or (len(sides) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in sides)))


def _is_calibration(record: dict[str, Any]) -> bool:
    lists = [record.get("correction"), record.get("thresholds"), [record.get("temperature")]]
    fine = all(isinstance(v, list) and all(type(n) in (int, float) for n in v) for v in lists)
    return fine and record["temperature"] > 0


def _are_leaks(splits: dict[str, Any]) -> bool:
    """What a table says of images and groups in two splits; ``dropped``: None where none were to be."""
    leaks, dropped = splits.get("leaks"), splits.get("dropped") or {"train": 0, "val": 0}
    return (
        isinstance(leaks, list) and all(isinstance(leak, dict) for leak in leaks) and isinstance(dropped, dict)
        and all(leak.get("kind") in ("image", "group") and type(leak.get("count")) is int for leak in leaks)
        and all(leak.get("splits") in ([a, b] for a, b in combinations(SPLITS, 2)) for leak in leaks)
        and all(type(dropped.get(name)) is int for name in ("train", "val"))
    )  # fmt: skip


def _is_measured(measured: Any) -> bool:
    """Measures by name; those that a table shows are numbers, or undefined."""
    if measured is None:
        return True
    shown = [measured[name] for name in METRICS if name in measured] if isinstance(measured, dict) else [""]
    return all(value is None or type(value) in (int, float) for value in shown)
