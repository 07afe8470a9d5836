"""Jobs on runs and sweeps for `support.forks`: trained in a folder, and what lies there afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from featurecache.sources.base import Dataset, ImageArrays
from heads.api import ablate, train_baseline, train_head
from heads.sweeps.verify import verify_runs
from support.fake_view import toy_view

RESULTS = ("head.safetensors", "answers.safetensors", "splits.csv", "predictions.csv")


def train_run(cache: str, **options: Any) -> str:
    view = toy_view(n=100, splits="given", noise=2)
    run = train_head(view, "linear", out=Path(cache, "run"), **{"epochs": 1, "report": False, **options})
    return run.config["created"]


def train_network(cache: str) -> None:
    found = load_digits()
    rows = np.flatnonzero(found.target < 2)[:40]
    data = Dataset(
        name="digits", source={"kind": "digits", "data": "digits"}, ids=[f"digits:{row}" for row in rows],
        labels=found.target[rows].astype(np.int64), splits=[""] * len(rows), groups=None, meta={}, classes=["0", "1"],
        task="binary", images=ImageArrays([np.rint(found.images[rows] * (255 / 16)).astype(np.uint8)]),
    )  # fmt: skip
    options = {"epochs": 2, "image_size": 8, "batch_size": 16, "augment": "none", "device": "cpu", "select": "loss"}
    train_baseline(data, "cnn-cifar", out=Path(cache, "run"), report=False, **options)


def train_sweep(cache: str) -> None:
    view = toy_view(n=100, splits="given", noise=2)
    ablate(view, "linear,ridge", out=Path(cache, "sweep"), epochs=1, lr="1e-3,1e-2", batch_size=32)


def look_at_runs(cache: str) -> dict[str, Any]:
    """Every file there, hidden ones too; the hashes of those that equal trainings have alike; what verify says."""
    files = sorted(path for path in Path(cache).rglob("*") if path.is_file())
    results = {
        str(f.relative_to(cache)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name in RESULTS
    }
    damages = [str(damage) for damage in verify_runs([Path(cache)]).damages]
    return {"files": [str(path.relative_to(cache)) for path in files], "results": results, "damages": damages}
