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

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption, RunError
from heads import checks
from heads import evaluate as ev
from heads.answers import Answers, read_answers
from heads.architectures import Input, load_head
from heads.data import Standardize
from heads.pixels import pieces
from heads.settings import STANDARDIZE, Settings

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
