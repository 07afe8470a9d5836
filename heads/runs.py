"""A run: one trained head with everything that says how it came about, as a folder.

    runs/<view>-<head>-<n>/
      config.json       settings, view, spec, task, splits in numbers, calibration, versions
      metrics.json      all measures of val, test and the controls; an undefined one is null
      metrics.csv       the same as model, split, class, metric, value
      history.csv       a line per epoch
      predictions.csv   val and test: id, split, label, what it was called, calibrated probabilities
      splits.csv        every row of the view; train-head --splits takes it
      answers.safetensors  raw logits of val and test with rows, labels, digests, clusters: what intervals are made of
      head.safetensors  the state dict; with zscore also standardize.mean and standardize.std
      backbone/         of a backbone that was tuned: what `extract` takes; head.safetensors is then the classifier
      curves.png  confusion.png  roc.png

Everything is written into a folder beside, whose name begins with a dot, and renamed at the end: a folder with a run's
name is a finished run.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache import __version__
from featurecache.cells import cell
from featurecache.errors import BadOption, CannotWrite, RunError
from heads import checks
from heads import evaluate as ev
from heads.answers import Answers, answer_tensors, read_answers
from heads.architectures import Input, load_head
from heads.data import Standardize
from heads.pixels import pieces
from heads.settings import STANDARDIZE, Settings
from heads.splits import splits_csv

BACKBONE = "backbone"
NEEDED = (
    "config.json",
    "metrics.json",
    "metrics.csv",
    "history.csv",
    "predictions.csv",
    "splits.csv",
    "answers.safetensors",
    "head.safetensors",
)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]  # "val", "test": measures by name; "controls": list of the same
    history: list[dict[str, float]]
    trust_code: bool = False

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
        if self.config["positive"] is None:
            return None
        if self.config["positive"] not in self.classes:
            raise RunError(f"{self.path} is damaged: its positive class is none of its classes.")
        return self.classes.index(self.config["positive"])

    @property
    def untrained(self) -> bool:
        return self.config["view"]["untrained"]

    @property
    def calibration(self) -> ev.Calibration:
        found = ev.Calibration.from_dict(self.config["calibration"])
        cuts = {"binary": 1, "multilabel": len(self.classes)}.get(self.task, 0)
        if (len(found.correction), len(found.thresholds)) != (len(self.classes), cuts):
            raise RunError(f"{self.path} is damaged: its calibration is not that of {len(self.classes)} classes.")
        return found

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return checks.read_tensors(self.path / "head.safetensors")

    def answers(self, split: str) -> Answers:
        """Of "val" or "test"; raises RunError where the file does not fit the run."""
        return read_answers(self, split)

    @cached_property
    def model(self) -> nn.Module:
        """The trained head. A ``python:`` head is code that the run only names: imported only when trusted."""
        if self.head.startswith("python:") and not self.trust_code:
            raise RunError(
                f"The head of {self.path} is code of its own ({self.head}). If you trust that module, "
                "load the run with trust_code=True."
            )
        state = {key: value for key, value in self._tensors.items() if not key.startswith("standardize.")}
        view, settings = self.config["view"], self.config["settings"]
        if self.config["spec"].get("kind") == "pixels":
            return self._network(state)
        grid = None if view.get("grid") is None else (view["grid"][0], view["grid"][1])
        given = Input(tuple(view["shape"]), tuple(view.get("prefix") or ()), grid)
        try:
            return load_head(self.head, given, len(self.classes), state, gated=bool(settings.get("gated")))
        except (BadOption, ValueError) as error:
            raise RunError(f"{self.path / 'head.safetensors'} does not fit the head of config.json: {error}") from error

    def _network(self, state: dict[str, torch.Tensor]) -> nn.Module:
        """That of a baseline; of a backbone that was tuned and lies beside, ``state`` is the last layer alone."""
        from heads.networks.baselines import load_baseline

        settings, size = Settings.from_dict(self.config["settings"]), self.config["view"]["shape"][-1]
        folder = self.path / BACKBONE
        try:
            if folder.is_dir():
                from heads.networks.finetune import load_finetuned

                return load_finetuned(folder, state, classes=len(self.classes))
            return load_baseline(
                self.head, state, image_size=size, classes=len(self.classes), lora=settings.lora, rlrr=settings.rlrr
            )
        except (BadOption, ValueError) as error:
            file = self.path / "head.safetensors"
            raise RunError(f"{file} does not fit the network of config.json: {error}") from error

    @property
    def standardize(self) -> Standardize:
        tensors = self._tensors
        sizes = {tensors[key].shape for key in ("standardize.mean", "standardize.std") if key in tensors}
        wanted = {(self.config["view"]["shape"][-1],)} if self.config["standardize"] == "zscore" else set()
        if sizes != wanted or self.config["standardize"] not in STANDARDIZE:
            raise RunError(f"{self.path} is damaged: its statistics of train do not fit its features.")
        return Standardize(self.config["standardize"], tensors.get("standardize.mean"), tensors.get("standardize.std"))

    @torch.no_grad()
    def logits(self, features: torch.Tensor, device: str = "cpu") -> np.ndarray:
        """Calibrated logits float64 [n, C] of features [n, ...] in storage dtype, or of images uint8 [n,3,h,w]."""
        if not len(features):
            return self.calibration(np.zeros((0, len(self.classes))))
        model, parts = self.model.to(device), features.split(256 if features.ndim < 4 else pieces(features.shape[1:]))
        z = [model(self.standardize(x.to(device).float())).cpu() for x in parts]
        return self.calibration(torch.cat(z).double().numpy())


@dataclass(frozen=True)
class Contents:
    """What train_head hands over to be written."""

    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    tensors: dict[str, torch.Tensor]
    ids: list[str]
    splits: np.ndarray  # [N] names, of every row of the view
    labels: np.ndarray  # [N] or [N, L], of every row of the view
    predictions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> rows [n], raw logits [n, C]
    digests: np.ndarray  # S32 [N]
    clusters: np.ndarray  # int64 [N]
    beside: Callable[[Path], Any] | None = None  # writes more into a folder: the backbone of a network that was tuned

    def calibrated(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n] and calibrated logits float64 [n, C]."""
        rows, raw = self.predictions[split]
        return rows, ev.Calibration.from_dict(self.config["calibration"])(raw)


@dataclass(frozen=True)
class Target:
    """Where a run will lie: ``exact``, or the first free number of ``parent/stem-<n>``."""

    parent: Path
    stem: str
    exact: Path | None = None


def run_target(out: str | Path | None, view: str, head: str, overwrite: bool = False) -> Target:
    """Checked before training starts: another run, or a folder that is no run, is not written over."""
    short = head.rpartition(":")[2] if head.startswith("python:") else head
    stem = f"{view}-{re.sub(r'[^A-Za-z0-9._-]+', '_', short)}"
    target = Target(Path("runs"), stem)
    if out is not None:
        exact = Path(out).resolve()
        if exact.exists() and not exact.is_dir():
            raise RunError(f"--out {out} is a file; it must be a folder, or a name that is free.")
        full = exact.is_dir() and any(exact.iterdir())
        if full and not (exact / "config.json").is_file():
            raise RunError(f"--out {out} holds other files and no run; give a folder that is empty or not there.")
        if full and not overwrite:
            raise RunError(f"--out {out} holds a run already. --overwrite replaces it; another --out keeps it.")
        target = Target(exact.parent, exact.name, exact)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target):
            pass
    except OSError as error:
        raise CannotWrite(
            f"No run can be written in {target.parent.resolve()}: {error.strerror}. --out chooses another place."
        ) from error
    return target


class _staging:
    """A new folder beside the target; gone afterwards unless it was renamed into its place."""

    def __init__(self, target: Target) -> None:
        self.path = target.parent / f".{target.stem[:100]}.{os.getpid()}-{secrets.token_hex(4)}.partial"

    def __enter__(self) -> Path:
        self.path.mkdir()
        return self.path

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def write_run(target: Target, contents: Contents, plots: bool = True) -> Run:
    """Write all files beside, then rename; returns the run as read back. Raises CannotWrite, and leaves nothing."""
    from featurecache.files import sync_path

    try:
        with _staging(target) as folder:
            _write_files(folder, contents)
            if plots:
                from heads.reports.plots import draw_plots  # matplotlib, only after training

                draw_plots(folder, contents)
            for file in folder.rglob("*"):
                sync_path(file)
            sync_path(folder)
            path = _put_in_place(folder, target)
            sync_path(path.parent)
    except OSError as error:
        raise CannotWrite(
            f"The run could not be written in {target.parent.resolve()}: {error.strerror or error}. "
            "Nothing of it is left there."
        ) from error
    return load_run(path, trust_code=True)  # its code, if any, has just run


def _put_in_place(folder: Path, target: Target) -> Path:
    if target.exact is None:
        number = 1
        while (path := target.parent / f"{target.stem}-{number}").exists():
            number += 1
        return folder.rename(path)
    if not target.exact.exists():
        return folder.rename(target.exact)
    old = folder.with_suffix(".old")
    target.exact.rename(old)
    path = folder.rename(target.exact)
    shutil.rmtree(old)
    return path


def _write_files(folder: Path, contents: Contents) -> None:
    from safetensors.torch import save

    stamp = {
        "format": checks.FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"featurecache": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    _write_json(folder / "config.json", stamp | contents.config)
    _write_json(folder / "metrics.json", contents.metrics)
    _write_csv(folder / "metrics.csv", ["model", "split", "class", "metric", "value"], _measures(contents))
    columns = list(contents.history[0])
    _write_csv(folder / "history.csv", columns, [[row[key] for key in columns] for row in contents.history])
    _write_csv(folder / "predictions.csv", *_predictions(contents))
    (folder / "splits.csv").write_bytes(splits_csv(contents.ids, contents.splits).encode())
    (folder / "answers.safetensors").write_bytes(save(answer_tensors(contents), {"format": "pt"}))
    # One word of metadata only: safetensors writes several in no fixed order, and equal heads shall be equal bytes.
    (folder / "head.safetensors").write_bytes(save(contents.tensors, {"format": "pt"}))
    if contents.beside:
        contents.beside(folder / BACKBONE)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def plain(data: Any) -> Any:
    """The same with NaN and infinities as None: JSON has none."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _write_csv(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """Words are quoted, so that a comma, a quote or a line break in a file name stays inside its cell, and none of
    them is a formula (`featurecache.cells`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(map(cell, columns))
    writer.writerows([map(cell, row) for row in rows])
    path.write_bytes(text.getvalue().encode())


def _measures(contents: Contents) -> list[list[Any]]:
    models = [(contents.config["head"], contents.metrics)] + [(c["name"], c) for c in contents.metrics["controls"]]
    rows: list[list[Any]] = []
    for model, measured in models:
        for split in ("val", "test"):
            for key, value in (measured[split] or {}).items():
                if isinstance(value, int | float):
                    rows.append([model, split, "", key, value])
            for name, table in (measured[split] or {}).get("per_class", {}).items():
                rows += [[model, split, name, key, v] for key, v in table.items() if isinstance(v, int | float)]
    return [["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows]


def _predictions(contents: Contents) -> tuple[list[str], list[list[Any]]]:
    config = contents.config
    kind, classes = config["task"], config["classes"]
    positive = None if config["positive"] is None else classes.index(config["positive"])
    cuts = tuple(config["calibration"]["thresholds"])
    shown = (
        ["label", "predicted"]
        if kind != "multilabel"
        else [*(f"label {name}" for name in classes), *(f"predicted {name}" for name in classes)]
    )
    rows: list[list[Any]] = []
    for split in contents.predictions:
        where, z = contents.calibrated(split)
        p = ev.probabilities(kind, z)
        called = ev.call(kind, p, cuts, positive)
        for i, row in enumerate(where.tolist()):
            if kind == "multilabel":
                truth = ["" if math.isnan(v) else int(v) for v in contents.labels[row].tolist()]
                words = [*truth, *(int(v) for v in called[i])]
            else:
                words = [classes[contents.labels[row]], classes[called[i]]]
            rows.append([contents.ids[row], split, *words, *p[i].tolist()])
    return ["id", "split", *shown, *(f"p {name}" for name in classes)], rows


def load_run(path: str | Path, *, trust_code: bool = False) -> Run:
    """Open a run folder; raises RunError where it is none or not whole. ``trust_code``: a ``python:`` head may be
    imported."""
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path} is not a folder; a run is one, such as runs/chest-large-1. featurecache ls lists them.")
    if missing := [name for name in NEEDED if not (path / name).is_file()]:
        raise RunError(f"{path} is not a finished run: it has no {', '.join(missing)}. Train it again.")
    if links := [name for name in NEEDED if (path / name).is_symlink()]:
        raise RunError(f"{path} holds symbolic links ({', '.join(links)}); put the files themselves there.")
    return Run(path, checks.read_config(path), checks.read_metrics(path), checks.read_history(path), trust_code)


def list_runs(folder: str | Path = "runs") -> list[Run]:
    """The finished runs in a folder, by name; anything else in it is passed over."""
    runs = []
    for path in sorted(Path(folder).glob("*/config.json")):
        if not path.parent.name.startswith("."):
            try:
                runs.append(load_run(path.parent))
            except RunError:  # a folder of someone else's, or of another version; load_run on it says what is wrong
                continue
    return runs
