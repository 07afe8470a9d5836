"""Reading the records of a run folder, which may be somebody else's: bounded, and of the form that ours have."""

from __future__ import annotations

import csv
import io
import math
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from featurecache.cells import text_of
from featurecache.errors import CacheError, RunError
from featurecache.files import open_regular
from featurecache.inspection import MAX_VALUES, TASKS
from featurecache.records import read_record
from heads.metrics import METRICS
from heads.splits import SPLITS

FORMAT = 1
MOST = 1 << 28  # bytes of a record; a confusion matrix of 5,000 classes
_VIEW = {"label": str, "path": str, "output": str, "shape": list, "untrained": bool}
_CONFIG = {
    "head": str, "view": dict, "task": str, "classes": list, "positive": (str, type(None)), "calibration": dict,
    "standardize": str, "spec": dict, "provenance": dict, "parameters": int, "splits": dict, "chosen": dict,
    "created": str, "settings": dict,
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    config = _record(path / "config.json")
    if config.get("format") != FORMAT:
        raise RunError(f"{path} has run format {str(config.get('format'))[:40]}; this featurecache reads {FORMAT}.")
    wrong = _wrong(config, _CONFIG) or [f"view {key}" for key in _wrong(config["view"], _VIEW)]
    if not wrong:
        found = {
            "shape": _is_shape(config["view"]["shape"]),
            "places of tokens": _are_places(config["view"]),
            "classes": bool(config["classes"]) and all(isinstance(name, str) for name in config["classes"]),
            "task": config["task"] in TASKS,
            "chosen": config["chosen"].get("by") in (*METRICS, "loss"),
            "splits": isinstance(config["splits"].get("digest"), str) and _are_leaks(config["splits"]),
            "calibration": _is_calibration(config["calibration"]),
        }
        wrong = [name for name, fine in found.items() if not fine]
    if wrong:
        raise RunError(f"{path} is damaged: config.json has no proper {' and no '.join(wrong)}.")
    return config


def read_metrics(path: Path) -> dict[str, Any]:
    metrics = _record(path / "metrics.json")
    controls = metrics.get("controls")
    parts = [metrics, *controls] if isinstance(controls, list) else [None]
    if not all(isinstance(part, dict) and all(_is_measured(part.get(s)) for s in ("val", "test")) for part in parts):
        raise RunError(f"{path} is damaged: metrics.json does not hold the measures of val, test and the controls.")
    val, test = metrics["val"], metrics["test"]
    shown = {name for name in METRICS if name in (test or {})} | {"nll"}
    named = all(not _wrong(control, {"name": str, "note": (str, type(None))}) for control in controls or [])
    if not named or val is None or test is None or not shown <= set(val):
        raise RunError(f"{path} is damaged: metrics.json does not name what it measured.")
    return metrics


def read_history(path: Path) -> list[dict[str, float]]:
    """A record an epoch. Raises RunError."""
    file = path / "history.csv"
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            lines = handle.read(MOST + 1).decode("utf-8").splitlines() if size <= MOST else []
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    except (OSError, ValueError, TypeError, csv.Error, CacheError) as error:
        raise RunError(f"{path} is damaged: {error}.") from error
    if not rows or not all({"epoch", "val_loss", "best"} <= row.keys() for row in rows):
        raise RunError(f"{path} is damaged: history.csv holds no epochs.")
    return rows


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}).") from error


def read_ids(file: Path) -> list[str]:
    """The ids of a run's splits.csv: one for every row of the view, in its order."""
    try:
        with open_regular(file) as handle:
            lines = handle.read(MOST).decode("utf-8")
        return [text_of(row["id"]) for row in csv.DictReader(io.StringIO(lines, newline=""), strict=True)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error, CacheError) as error:
        raise RunError(f"{file} is damaged: {error}.") from error


def _record(file: Path) -> dict[str, Any]:
    try:
        return read_record(file, MOST)
    except CacheError as error:
        raise RunError(f"{file.parent} is damaged: {error}") from error


def _wrong(record: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    return [key for key, kind in kinds.items() if not isinstance(record.get(key), kind) or key not in record]


def _is_shape(shape: list[Any]) -> bool:
    return 1 <= len(shape) <= 3 and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) <= MAX_VALUES


def _are_places(view: dict[str, Any]) -> bool:
    """Prefix and grid of tokens; runs of before have neither."""
    prefix, grid = view.get("prefix") or [], view.get("grid")
    fine = isinstance(prefix, list) and len(prefix) < 1000 and all(isinstance(word, str) for word in prefix)
    return fine and (
        grid is None
        or (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in grid))
    )


def _is_calibration(record: dict[str, Any]) -> bool:
    lists = [record.get("correction"), record.get("thresholds"), [record.get("temperature")]]
    fine = all(isinstance(v, list) and all(type(n) in (int, float) for n in v) for v in lists)
    return fine and record["temperature"] > 0


def _are_leaks(splits: dict[str, Any]) -> bool:
    """What a table says of images and groups in two splits; runs of before have neither."""
    leaks, dropped = splits.get("leaks", []), splits.get("dropped") or {"train": 0, "val": 0}
    fine = isinstance(leaks, list) and all(isinstance(leak, dict) for leak in leaks) and isinstance(dropped, dict)
    return (
        fine
        and all(leak.get("kind") in ("image", "group") and type(leak.get("count")) is int for leak in leaks)
        and all(leak.get("splits") in ([a, b] for a, b in combinations(SPLITS, 2)) for leak in leaks)
        and all(type(dropped.get(name)) is int for name in ("train", "val"))
    )


def _is_measured(measured: Any) -> bool:
    """Measures by name; those that a table shows are numbers, or undefined."""
    if measured is None:
        return True
    shown = [measured[name] for name in METRICS if name in measured] if isinstance(measured, dict) else [""]
    return all(value is None or type(value) in (int, float) for value in shown)
