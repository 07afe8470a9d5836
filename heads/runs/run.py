"""Trained runs: load, list and check run folders, and say on a command line what made them.

A run folder may be somebody else's: its records are bounded, and of the form that ours have, or refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, CacheError, FeatureCacheError, RunError
from featurecache.files.records import parse_json
from featurecache.formatting import text_of
from featurecache.images.headers import READING, check_crop
from featurecache.images.preprocessing import Preprocess
from featurecache.store.schema import MAX_VALUES, TASKS
from featurecache.store.store import cache_folder
from featurecache.store.view import source_options
from heads.metrics.calibration import Calibration
from heads.models.catalogue import load_head, load_network
from heads.models.common import FINETUNE, Input, rows_at_once
from heads.models.finetune import load_finetuned
from heads.pixel_view import PixelView, open_dataset
from heads.runs.folder import check_listed, partial_path, read_checked_record, read_listed
from heads.settings import METRICS, STANDARDIZE, TABLE, Settings, flag
from heads.task import SPLITS, Predictions, Standardize

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

T = TypeVar("T")
_VIEW = {"label": str, "path": str, "output": str, "shape": list, "untrained": bool}
_CONFIG = {
    "head": str, "view": dict, "task": str, "classes": list, "positive": (str, type(None)), "calibration": dict,
    "standardize": str, "spec": dict, "provenance": dict, "parameters": int, "splits": dict, "chosen": dict,
    "created": str, "settings": dict, "files": dict, "notes": list,
}  # fmt: skip
_COLUMNS = ("digests", "clusters", "labels", "logits")
CONFIG, METRICS_FILE, BACKBONE = "config.json", "metrics.json", "backbone"
NEEDED = (
    CONFIG, METRICS_FILE, "metrics.csv", "history.csv", "predictions.csv", "splits.csv",
    "answers.safetensors", "head.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder. Every file is compared with its hash when it is read."""

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]  # "val", "test": measures by name; "controls": list of the same
    history: list[dict[str, float]]
    trust_code: bool = False
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

    @property
    def calibration(self) -> Calibration:
        calibration = Calibration.from_dict(self.config["calibration"])
        cuts = {"binary": 1, "multilabel": len(self.classes)}.get(self.task, 0)
        if (len(calibration.correction), len(calibration.thresholds)) != (len(self.classes), cuts):
            raise RunError(f"{self.path} is damaged: its calibration is not that of {len(self.classes)} classes.")
        return calibration

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.read("head.safetensors"), self.path / "head.safetensors")

    @cached_property
    def ids(self) -> list[str]:
        """One for every row of the view, in its order. Raises RunError."""
        return _read_csv(self.read("splits.csv"), self.path / "splits.csv", lambda row: text_of(row["id"]))

    def answers(self, split: str) -> Predictions:
        """What it said of "val" or "test", checked against splits.csv; raises RunError where the file does not fit."""
        file = self.path / "answers.safetensors"
        tensors, ids = read_tensors(self.read(file.name), file), self.ids
        columns = {name: tensors[key].numpy() for name in _COLUMNS if (key := f"{split}.{name}") in tensors}
        rows, answers = tensors.get(f"{split}.rows", torch.zeros(0)).numpy(), None
        if rows.dtype == np.int64 and rows.ndim == 1 and ((rows >= 0) & (rows < len(ids))).all():
            names = [ids[row] for row in rows]
            answers = self.checked_answers(names, columns, bool(self.config["splits"].get("grouped")))
        if answers is None:
            raise RunError(f"{file} does not fit the run: what it says of {split} is not whole.")
        return answers

    def checked_answers(self, ids: list[str], columns: dict[str, np.ndarray], grouped: bool) -> Predictions | None:
        """From the columns of a file; None where their shapes, types or labels do not fit."""
        n, classes = len(ids), len(self.classes)
        labels = ((n, classes), "float32") if self.task == "multilabel" else ((n,), "int64")
        wanted = {"digests": ((n, 16), "uint8"), "clusters": ((n,), "int64"), "logits": ((n, classes), "float64")}
        kinds = {name: (values.shape, values.dtype.name) for name, values in columns.items()}
        if kinds != wanted | {"labels": labels}:
            return None
        y, raw = columns["labels"], columns["logits"]
        if self.task != "multilabel" and not ((y >= 0) & (y < classes)).all():
            return None
        digests = np.array([row.tobytes().hex().encode() for row in columns["digests"]], "S32")
        return Predictions(ids, digests, columns["clusters"], grouped, y, raw, self.calibration(raw))

    @cached_property
    @exact_arithmetic()
    def model(self) -> nn.Module:
        """The trained head. A ``python:`` head is code that the run only names: imported only when trusted."""
        if self.head.startswith("python:") and not self.trust_code:
            raise RunError(
                f"The head of {self.path} is code of its own ({self.head}). If you trust that module, "
                "load the run with trust_code=True."
            )
        state = {key: value for key, value in self._tensors.items() if not key.startswith("standardize.")}
        settings, view, classes = Settings.from_dict(self.config["settings"]), self.config["view"], len(self.classes)
        try:
            if not is_pixels(self):
                return load_head(self.head, Input.of(view), classes, state, gated=settings.gated)
            if self.head.startswith(FINETUNE):  # lies beside; the state is the last layer alone
                self.check(name for name in self.config["files"] if name.startswith(f"{BACKBONE}/"))
                return load_finetuned(self.folder / BACKBONE, state, classes=classes)
            return load_network(self.head, state, image_size=view["shape"][-1], classes=classes)
        except (BadOption, ValueError) as error:
            file, kind = self.path / "head.safetensors", "network" if is_pixels(self) else "head"
            raise RunError(f"{file} does not fit the {kind} of config.json: {error}") from error

    @property
    def standardize(self) -> Standardize:
        tensors = self._tensors
        sizes = {tensors[key].shape for key in ("standardize.mean", "standardize.std") if key in tensors}
        wanted = {(self.config["view"]["shape"][-1],)} if self.config["standardize"] == "zscore" else set()
        if sizes != wanted or self.config["standardize"] not in STANDARDIZE:
            raise RunError(f"{self.path} is damaged: its statistics of train do not fit its features.")
        return Standardize(self.config["standardize"], tensors.get("standardize.mean"), tensors.get("standardize.std"))

    @exact_arithmetic()
    @torch.no_grad()
    def logits(self, features: torch.Tensor, device: str = "cpu") -> np.ndarray:
        """Calibrated logits float64 [n, C] of features [n, ...] in storage dtype, or of images uint8 [n,3,h,w]."""
        if not len(features):
            return self.calibration(np.zeros((0, len(self.classes))))
        model, rows = self.model.to(device), 256 if features.ndim < 4 else rows_at_once(features.shape[1:])
        z = [model(self.standardize(x.to(device).float())).cpu() for x in features.split(rows)]
        return self.calibration(torch.cat(z).double().numpy())


def load_run(path: str | Path, *, trust_code: bool = False) -> Run:
    """Open a run folder; raises RunError where it is none or not whole. ``trust_code``: a ``python:`` head may be
    imported."""
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
    metrics = _parse_metrics(path, read_listed(path / CONFIG, config, METRICS_FILE))
    history = _parse_history(path, read_listed(path / CONFIG, config, "history.csv"))
    return Run(path, config, metrics, history, trust_code, path)


def list_runs(folder: str | Path = "runs", errors: list[RunError] | None = None) -> list[Run]:
    """The finished runs in a folder, by name; ``errors``: takes what is wrong with the others that have a config."""
    runs = []
    for path in sorted(Path(folder).glob(f"[!.]*/{CONFIG}")):
        try:
            runs.append(load_run(path.parent))
        except RunError as error:  # damaged, of another version, or somebody else's
            if errors is not None:
                errors.append(error)
    return runs


def read_config(path: Path) -> dict[str, Any]:
    config = read_checked_record(path / CONFIG, "run", _CONFIG)
    view, wrong = config["view"], [f"view {key}" for key in _wrong(config["view"], _VIEW)]
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


def _parse_metrics(path: Path, data: bytes) -> dict[str, Any]:
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
    named = all(not _wrong(control, {"name": str, "note": (str, type(None))}) for control in controls or [])
    if not named or val is None or test is None or not shown <= set(val):
        raise RunError(f"{path} is damaged: metrics.json does not name what it measured.")
    return metrics


def _parse_history(path: Path, data: bytes) -> list[dict[str, float]]:
    """A record an epoch."""
    rows = _read_csv(data, path / "history.csv", lambda row: {key: float(value) for key, value in row.items()})
    if not rows or not all({"epoch", "val_loss", "best"} <= row.keys() for row in rows):
        raise RunError(f"{path} is damaged: history.csv holds no epochs.")
    return rows


def _read_csv(data: bytes, file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        text = io.StringIO(data.decode("utf-8"), newline="")
        return [parse(row) for row in csv.DictReader(text, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, CacheError) as error:
        raise RunError(f"{file} is damaged: {error}.") from error


def read_tensors(data: bytes, file: Path) -> dict[str, torch.Tensor]:
    """Of the bytes of ``file``, in safetensors. Raises RunError."""
    try:
        return load(data)
    except SafetensorError as error:
        raise RunError(f"{file} is damaged ({error}).") from error


def _wrong(record: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    return [key for key, kind in kinds.items() if not isinstance(record.get(key), kind) or key not in record]


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


def pixels_of(run: Run, data: Any = None) -> PixelView:
    """The images of a run on pixels, or ``data``, prepared as the run has it; RunError where that cannot be."""
    dataset, preprocess = open_run_dataset(run) if data is None else open_dataset(data), preprocess_of(run)
    reading = run.config["spec"]["preprocess"]
    crop = dataset.crop or (check_crop(reading["region"]) if "region" in reading else None)
    return PixelView(replace(dataset, bits=dataset.bits or reading.get("bits"), crop=crop), preprocess)


def open_run_dataset(run: Run) -> Dataset:
    """The images that a run on pixels was made of; RunError where they are gone."""
    from featurecache.sources import reopen

    try:
        return reopen(run.config["view"].get("source") or {})
    except (FeatureCacheError, KeyError, TypeError) as error:
        raise RunError(f"the images of {run.path} cannot be had: {error}") from error


def preprocess_of(run: Run) -> Preprocess:
    """How a run on pixels resizes; RunError where its config is damaged."""
    record = run.config["spec"].get("preprocess")
    try:
        check_crop(record.get("region", (0, 0, 1, 1)))
        return Preprocess.from_dict({key: value for key, value in record.items() if key not in READING})
    except (FeatureCacheError, TypeError, AttributeError) as error:
        raise RunError(f"{run.path} is damaged: it does not say how its images were resized ({error}).") from error


def is_pixels(run: Run) -> bool:
    return run.config["spec"].get("kind") == "pixels"


def is_of_pixels(output: str) -> bool:
    """Whether an output is that of a network from pixels: the images themselves."""
    return output.startswith("pixels-")


def name_of(head: str, output: str) -> str:
    """``large on tokens``; of a network from pixels its name and theirs: ``cnn-cifar at 32 px``."""
    side = output.removeprefix("pixels-")
    return f"{head} on {output}" if side == output else f"{head} at {side} px"


def option_words(settings: dict[str, Any], published: dict[str, Any] | None = None) -> list[str]:
    """The options of training that differ from their defaults, or from what was ``published`` of a network, as words of
    a command line."""
    words: list[str] = []
    for name, option in TABLE.items():
        value, usual = settings.get(name, option.default), (published or {}).get(name, option.default)
        if published is not None and name == "augment" and value is None and usual is not None:
            value = "none"
        if name in ("output", "device") or value is None or value == usual:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list | tuple):
            each = [",".join(value)] if name == "only" and value else map(str, value)
            words += [word for text in each for word in (flag(name), text)]
        else:
            words += [flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def view_word(label: str, path: str | Path) -> str:
    """How --features names a view: its label, or where it lies in no default cache its path."""
    return label if Path(path).parent.parent.resolve() == cache_folder().resolve() else str(path)


def source_words(source: dict[str, Any]) -> list[str]:
    """Images as --data, --column and --task name them."""
    return [str(word) for option in source_options(source) for word in option]


def hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
