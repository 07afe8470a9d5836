"""Write a run folder, or nothing.

Writes the folder of a run: beside its place, and renamed into it when all is there.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache import __version__
from featurecache.errors import CannotWrite, RunError
from featurecache.files.records import plain
from featurecache.formatting import cell
from heads.metrics.calibration import Calibration, predict_labels, probabilities
from heads.runs import run
from heads.runs.run import BACKBONE, Run, load_run
from heads.splits import splits_csv


def answer_tensors(contents: RunContents) -> dict[str, torch.Tensor]:
    """The content of ``answers.safetensors``."""
    tensors: dict[str, torch.Tensor] = {}
    for split, (rows, raw) in contents.predictions.items():
        digests = np.frombuffer(bytes.fromhex("".join(d.decode() for d in contents.digests[rows])), np.uint8)
        found = {"rows": rows, "clusters": contents.clusters[rows], "labels": contents.labels[rows], "logits": raw}
        found["digests"] = digests.reshape(-1, 16).copy()
        tensors |= {f"{split}.{name}": torch.from_numpy(np.ascontiguousarray(v)) for name, v in found.items()}
    return tensors


@dataclass(frozen=True)
class RunContents:
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
        return rows, Calibration.from_dict(self.config["calibration"])(raw)


@dataclass(frozen=True)
class RunTarget:
    """Where a run will lie: ``exact``, or the first free number of ``parent/stem-<n>``."""

    parent: Path
    stem: str
    exact: Path | None = None


def run_target(out: str | Path | None, view: str, head: str, overwrite: bool = False) -> RunTarget:
    """Checked before training starts: another run, or a folder that is no run, is not written over."""
    short = head.rpartition(":")[2] if head.startswith("python:") else head
    stem = f"{view}-{re.sub(r'[^A-Za-z0-9._-]+', '_', short)}"
    target = RunTarget(Path("runs"), stem)
    if out is not None:
        exact = Path(out).resolve()
        if exact.exists() and not exact.is_dir():
            raise RunError(f"--out {out} is a file; it must be a folder, or a name that is free.")
        full = exact.is_dir() and any(exact.iterdir())
        if full and not (exact / "config.json").is_file():
            raise RunError(f"--out {out} holds other files and no run; give a folder that is empty or not there.")
        if full and not overwrite:
            raise RunError(f"--out {out} holds a run already. --overwrite replaces it; another --out keeps it.")
        target = RunTarget(exact.parent, exact.name, exact)
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

    def __init__(self, target: RunTarget) -> None:
        self.path = target.parent / f".{target.stem[:100]}.{os.getpid()}-{secrets.token_hex(4)}.partial"

    def __enter__(self) -> Path:
        self.path.mkdir()
        return self.path

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def write_run(target: RunTarget, contents: RunContents, draw: Callable[[Path], Any] | None = None) -> Run:
    """Write all files beside, then rename; returns the run as read back. Raises CannotWrite, and leaves nothing.

    ``draw`` adds pictures of the run to the unfinished folder, which holds everything else by then.
    """
    from featurecache.files.atomic import sync_path

    try:
        with _staging(target) as folder:
            _write_files(folder, contents)
            if draw is not None:
                draw(folder)
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


def _put_in_place(folder: Path, target: RunTarget) -> Path:
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


def _write_files(folder: Path, contents: RunContents) -> None:
    from safetensors.torch import save

    stamp = {
        "format": run.FORMAT,
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


def _write_csv(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """Words are quoted, so that a comma, a quote or a line break in a file name stays inside its cell, and none of
    them is a formula (`featurecache.formatting`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(map(cell, columns))
    writer.writerows([map(cell, row) for row in rows])
    path.write_bytes(text.getvalue().encode())


def _measures(contents: RunContents) -> list[list[Any]]:
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


def _predictions(contents: RunContents) -> tuple[list[str], list[list[Any]]]:
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
        p = probabilities(kind, z)
        called = predict_labels(kind, p, cuts, positive)
        for i, row in enumerate(where.tolist()):
            if kind == "multilabel":
                truth = ["" if math.isnan(v) else int(v) for v in contents.labels[row].tolist()]
                words = [*truth, *(int(v) for v in called[i])]
            else:
                words = [classes[contents.labels[row]], classes[called[i]]]
            rows.append([contents.ids[row], split, *words, *p[i].tolist()])
    return ["id", "split", *shown, *(f"p {name}" for name in classes)], rows
