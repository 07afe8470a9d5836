"""Write a run folder whole or not at all: beside its place, and renamed into it when all is there."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from featurecache import __version__
from featurecache.errors import CannotWrite, RunError
from featurecache.files.atomic import sync_path
from featurecache.files.names import check_path
from featurecache.files.records import nan_to_none
from featurecache.formatting import cell
from heads.metrics.calibration import Calibration, predict_labels, probabilities
from heads.runs.run import BACKBONE, FORMAT, Run, load_run
from heads.splits import splits_csv


@dataclass(frozen=True)
class RunContents:
    """What a training hands over to be written."""

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


@dataclass(frozen=True)
class RunTarget:
    """Where a run will lie: ``exact``, or the first free number of ``parent/stem-<n>``."""

    parent: Path
    stem: str
    exact: Path | None = None


def check_out(out: str | Path, record: str, kind: str, allowed: Sequence[str] = ()) -> Path:
    """``--out`` as a folder that is empty, not there, or has a ``record``; raises RunError for any other."""
    check_path(out, "--out")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {out} is a file; it must be a folder, or a name that is free.")
    others = {path.name for path in folder.iterdir()} - {*allowed} if folder.is_dir() else set()
    if others and not (folder / record).is_file():
        raise RunError(f"--out {out} holds other files and no {kind}; give a folder that is empty or not there.")
    return folder


def run_target(out: str | Path | None, view: str, head: str, overwrite: bool = False) -> RunTarget:
    """Checked before training starts: another run, or a folder that is no run, is not written over."""
    short = head.rpartition(":")[2] if head.startswith("python:") else head
    target = RunTarget(Path("runs"), f"{view}-{re.sub(r'[^A-Za-z0-9._-]+', '_', short)}")
    if out is not None:
        exact = check_out(out, "config.json", "run").resolve()
        if (exact / "config.json").is_file() and not overwrite:
            raise RunError(f"--out {out} holds a run already. --overwrite replaces it; another --out keeps it.")
        target = RunTarget(exact.parent, exact.name, exact)
    check_path(f"{target.stem}-1", "--out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target):
            pass
    except OSError as error:
        raise CannotWrite(
            f"No run can be written in {target.parent.resolve()}: {error.strerror}. --out chooses another place."
        ) from error
    return target


@contextmanager
def _staging(target: RunTarget) -> Iterator[Path]:
    """A new folder beside the target; gone afterwards unless it was renamed into its place."""
    folder = target.parent / f".{target.stem[:100]}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_run(target: RunTarget, contents: RunContents, draw: Callable[[Path], Any] | None = None) -> Run:
    """Write all files beside, then rename; returns the run as read back. Raises CannotWrite, and leaves nothing.

    ``draw`` adds pictures of the run to the unfinished folder, which holds everything else by then.
    """
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
        paths = (target.parent / f"{target.stem}-{number}" for number in count(1))
        return folder.rename(next(path for path in paths if not path.exists()))
    if not target.exact.exists():
        return folder.rename(target.exact)
    old = folder.with_suffix(".old")
    target.exact.rename(old)
    path = folder.rename(target.exact)
    shutil.rmtree(old)
    return path


def _write_files(folder: Path, contents: RunContents) -> None:
    (folder / "config.json").write_bytes(json_bytes(record_stamp() | contents.config))
    (folder / "metrics.json").write_bytes(json_bytes(contents.metrics))
    measures = csv_bytes(["model", "split", "class", "metric", "value"], _measures(contents))
    (folder / "metrics.csv").write_bytes(measures)
    columns = list(contents.history[0])
    history = csv_bytes(columns, [[row[key] for key in columns] for row in contents.history])
    (folder / "history.csv").write_bytes(history)
    (folder / "predictions.csv").write_bytes(csv_bytes(*_predictions(contents)))
    (folder / "splits.csv").write_bytes(splits_csv(contents.ids, contents.splits).encode())
    (folder / "answers.safetensors").write_bytes(save(_answer_tensors(contents), {"format": "pt"}))
    # One word of metadata only: safetensors writes several in no fixed order, and equal heads shall be equal bytes.
    (folder / "head.safetensors").write_bytes(save(contents.tensors, {"format": "pt"}))
    if contents.beside:
        contents.beside(folder / BACKBONE)


def record_stamp() -> dict[str, Any]:
    """Format, time and versions, which a record of a run begins with."""
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"featurecache": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def json_bytes(record: dict[str, Any]) -> bytes:
    text = json.dumps(nan_to_none(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def answer_columns(digests: np.ndarray, clusters: np.ndarray, y: np.ndarray, raw: np.ndarray) -> dict[str, np.ndarray]:
    """Raw logits of n images beside their labels, digests (uint8 [n, 16]) and clusters, as they lie in a file."""
    octets = np.frombuffer(bytes.fromhex("".join(d.decode() for d in digests)), np.uint8).reshape(-1, 16)
    return {"digests": octets, "clusters": clusters, "labels": y, "logits": raw}


def _answer_tensors(contents: RunContents) -> dict[str, torch.Tensor]:
    """The content of ``answers.safetensors``: the answers of each split and the rows they are of."""
    tensors: dict[str, torch.Tensor] = {}
    for split, (rows, raw) in contents.predictions.items():
        own = contents.digests[rows], contents.clusters[rows], contents.labels[rows]
        columns = {"rows": rows, **answer_columns(*own, raw)}
        tensors |= {f"{split}.{name}": torch.from_numpy(np.array(values)) for name, values in columns.items()}
    return tensors


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Words are quoted, so that a comma, a quote or a line break stays inside its cell, and none is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([map(cell, row) for row in (columns, *rows)])
    return text.getvalue().encode()


def _measures(contents: RunContents) -> list[list[Any]]:
    models = [(contents.config["head"], contents.metrics)] + [(c["name"], c) for c in contents.metrics["controls"]]
    rows: list[list[Any]] = []
    for model, measured in models:
        for split in ("val", "test"):
            own = measured[split] or {}
            for name, table in [("", own), *own.get("per_class", {}).items()]:
                numbers = {key: value for key, value in table.items() if isinstance(value, int | float)}
                rows += [[model, split, name, key, "" if math.isnan(v) else v] for key, v in numbers.items()]
    return rows


def _predictions(contents: RunContents) -> tuple[list[str], list[list[Any]]]:
    config = contents.config
    kind, classes, calibration = config["task"], config["classes"], Calibration.from_dict(config["calibration"])
    positive = None if config["positive"] is None else classes.index(config["positive"])
    columns = ["label", "predicted"]
    if kind == "multilabel":
        columns = [f"{word} {name}" for word in columns for name in classes]
    rows: list[list[Any]] = []
    for split, (where, raw) in contents.predictions.items():
        p = probabilities(kind, calibration(raw))
        predicted = predict_labels(kind, p, calibration.thresholds, positive)
        for i, row in enumerate(where.tolist()):
            if kind == "multilabel":
                truth = ["" if math.isnan(v) else int(v) for v in contents.labels[row].tolist()]
                cells = [*truth, *(int(v) for v in predicted[i])]
            else:
                cells = [classes[contents.labels[row]], classes[predicted[i]]]
            rows.append([contents.ids[row], split, *cells, *p[i].tolist()])
    return ["id", "split", *columns, *(f"p {name}" for name in classes)], rows
