"""A finished training as the run that will lie on disk."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.costs import device_title
from heads.drawing import units_of
from heads.jobs import Job
from heads.pixels import PixelView
from heads.run_folder import Contents
from heads.splits import class_counts

if TYPE_CHECKING:
    from heads.pixels import AnyView
    from heads.train import Fit


def contents_of(job: Job, fit: Fit, controls: list[dict[str, Any]]) -> Contents:
    """The run as it will lie on disk."""
    view, info, task, divided = job.view, job.view.info(job.output), job.task, job.divided
    config = {
        "settings": fit.settings.to_dict(),
        "head": fit.settings.head,
        "parameters": fit.parameters,
        "standardize": fit.scale.kind,
        "view": {"label": view.label, "name": view.name, "path": str(Path(view.path).resolve()), "output": job.output,
                 "shape": list(info.shape), "dtype": info.dtype, "prefix": list(job.input.prefix),
                 "grid": None if job.input.grid is None else list(job.input.grid), "fingerprint": view.fingerprint,
                 "untrained": view.untrained, "source": view.source},
        "spec": view.spec,
        "provenance": view.provenance,
        "task": task.kind,
        "classes": list(task.classes),
        "positive": None if task.positive is None else task.classes[task.positive],
        "splits": {"how": divided.how, "drawn": list(divided.drawn), "counts": class_counts(divided.names, task),
                   "images": {s: len(divided.rows(s)) for s in ("train", "val", "test")},
                   "digest": test_digest(job), "leaks": [asdict(leak) for leak in divided.leaks],
                   "dropped": divided.dropped, "fraction": divided.fraction,
                   "fold": None if divided.fold is None else list(divided.fold), "grouped": view.groups is not None},
        "chosen": {"by": fit.settings.select, "on": "val", "epoch": fit.epoch},
        "calibration": fit.calibration.to_dict(),
        "warnings": divided.warnings + fit.notes,
        "seconds": fit.seconds,
        "cost": cost_of(job, fit),
        "reading": "from memory" if fit.window is None else f"from the shards, {fit.window:,} rows at a time",
    }  # fmt: skip
    tensors = {**fit.model.state_dict(), **fit.scale.tensors()}
    return Contents(
        config, {**fit.metrics, "controls": controls}, fit.history,
        tensors={key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        ids=list(view.ids), splits=divided.names, labels=task.labels, predictions=fit.predictions,
        digests=np.asarray(view.digests), clusters=clusters_of(view),
    )  # fmt: skip


def test_digest(job: Job) -> str:
    """Which images are tested, in one word: equal for two runs only if it is the same images."""
    rows = job.divided.rows("test")
    return hashlib.blake2b(b"".join(sorted(np.asarray(job.view.digests)[rows].tolist())), digest_size=16).hexdigest()


def clusters_of(view: AnyView) -> np.ndarray:
    """int64 [N]: rows that share a digest or a group share a number."""
    return units_of(np.asarray(view.digests), view.groups).astype(np.int64)


def cost_of(job: Job, fit: Fit) -> dict[str, Any]:
    """Training in seconds; an image at prediction in milliseconds: ``ms_per_image`` of the head, or of the network of a
    baseline, ``forward_ms`` of the backbone before it and ``loading_ms`` of reading and resizing, both as the view
    measured them (None: it did not). ``device``: of backbone or network."""
    pixels, measured = isinstance(job.view, PixelView), job.view.cost or {}
    return {
        "train_seconds": fit.seconds, "seconds_to_best": fit.seconds_to_best, "ms_per_image": fit.ms_per_image,
        "forward_ms": measured.get("forward_ms"), "loading_ms": measured.get("loading_ms"),
        "device": device_title(fit.settings.device) if pixels else measured.get("device"),
        "bytes_per_image": _bytes_per_image(job.view, job.output),
    }  # fmt: skip


def _bytes_per_image(view: AnyView, output: str) -> int | None:
    """In the cache: of what is stored, for an output that follows from tokens those tokens; of images nothing is."""
    from featurecache.outputs import parse

    if isinstance(view, PixelView):
        return None
    info = view.outputs[output if output in view.outputs else parse(output).source]
    return math.prod(info.shape) * np.dtype(info.dtype).itemsize
