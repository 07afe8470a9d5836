"""Small sweeps on views in memory, in the current folder: run, stopped, and compared without their times."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import torch

from heads.api import ablate
from heads.sweeps import runner
from heads.sweeps.folder import load_sweep
from support.fake_view import toy_view


def view_of(n=150, **more):
    return toy_view(n=n, noise=3.0, **more)


def sweep(view, heads="linear", folder="s", **options):
    return ablate(view, heads, out=folder, **{"epochs": 2, "batch_size": 16, **options})


def content(folder="s"):
    """All that a sweep found, without times: rows by key, and the bytes of the chosen heads."""
    loaded = load_sweep(folder)
    rows = {row["key"]: {k: v for k, v in row.items() if k not in ("seconds", "ms_per_image")} for row in loaded.rows}
    runs = [run.path for family in loaded.families for run in family.runs]
    names = ("head.safetensors", "answers.safetensors", "splits.csv", "predictions.csv")
    return rows, {(path.name, name): (path / name).read_bytes() for path in runs for name in names}


def trained(patch, stop=None):
    """Which settings are handed to training from here on; Ctrl-C in the training after ``stop`` calls."""
    settings_of_all, whole, calls = [], runner.train_together, iter(range(10**6))

    def counted(job, settings, **more):
        if next(calls) == stop:
            raise KeyboardInterrupt
        settings_of_all.extend(settings)
        return whole(job, settings, **more)

    patch.setattr(runner, "train_together", counted)
    return settings_of_all


def division(run):
    """Image → split, of those that the run used."""
    with (run.path / "splits.csv").open(newline="") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file) if row["split"]}


def rows_of(view, order, failed=(), **more):
    """The view with its rows in another order, without those that could not be read."""
    keep = np.array([i for i in order if i not in failed])
    lists = {name: getattr(view, name) for name in ("ids", "splits", "groups")}
    changed = {name: values and [values[i] for i in keep] for name, values in lists.items()}
    changed |= {"features": {name: x[torch.from_numpy(keep)] for name, x in view.features.items()}}
    changed |= {"labels": view.labels[keep], "digests": view.digests[keep]}
    changed |= {"failed": [{"id": view.ids[i], "reason": "torn"} for i in failed]}
    return replace(view, **changed | more)


def other_view(view, order=None, failed=(), **more):
    """The same images through another backbone: other features, another order, some not readable."""
    weight = torch.from_numpy(np.random.default_rng(9).normal(size=(8, 6))).float()
    order = range(len(view)) if order is None else order
    other = rows_of(view, order, failed, fingerprint="b" * 64, label="resnet-toy/toy")
    return replace(other, features={name: (x.float() @ weight).half() for name, x in other.features.items()}, **more)
