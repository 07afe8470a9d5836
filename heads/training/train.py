"""The protocol of training: fit, choose on val, calibrate, read test once; and the run that comes of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import ProtocolError
from featurecache.files.mirror import place_of
from featurecache.formatting import device_title, one_line
from heads.metrics.calibration import Calibration, calibrate
from heads.metrics.classification import evaluate
from heads.models.catalogue import head_info
from heads.models.common import count_parameters
from heads.models.solvers import SOLVERS, path_logits
from heads.pixel_view import PixelView
from heads.runs.records import AT_LIMIT
from heads.runs.write import RunContents
from heads.settings import EIGEN, METRICS, VARIED, Settings, measure_name
from heads.splits import class_counts
from heads.task import FeatureView, Say, SplitData, Standardize, clusters_of
from heads.training.batches import loss_and_prior
from heads.training.eigenbasis import turn_weight
from heads.training.engine import arithmetic_for, logits_of, make_trainer, work_of_a_step
from heads.training.job import TrainingData, TrainingJob, make_model
from heads.training.loop import Checkpoint, Schedule, TrainedState, score_epoch, train_heads
from heads.training.progress import EpochTable, path_line

TIMED = 256  # images, at most, on which a head's time at prediction is measured


@dataclass
class FittedHead:
    """What training gave: the chosen head, its calibration, and all that is reported."""

    settings: Settings
    model: nn.Module
    scale: Standardize
    calibration: Calibration
    history: list[dict[str, float]]
    epoch: int  # the chosen one; of a solved head the place of the chosen setting in its path, from 1
    metrics: dict[str, dict[str, Any]]
    predictions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> rows of the view, raw logits float64 [n, C]
    notes: list[str]
    seconds: float
    ms_per_image: float  # of the head alone
    window: int | None  # rows in use at once where features were read from the shards
    products: str  # whose products of float32 it was trained with: torch's own (library), or onednn's

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def seconds_to_best(self) -> float:
        """Of training, up to the end of the epoch that was chosen; a solved head needs its whole path."""
        if head_info(self.settings.head).solved:
            return self.seconds
        return sum(row["seconds"] for row in self.history[: self.epoch])


def train_together(
    job: TrainingJob, settings: Sequence[Settings], say: Say | None = None, checkpoint: Checkpoint | None = None,
    progress: bool = False, advance: Callable[[float], object] | None = None,
) -> list[FittedHead | ProtocolError]:  # fmt: skip
    """One head for each of ``settings``, which differ from the job's in `VARIED` only; each is what it is alone. A head
    whose outputs do not stay finite is the error that says so. ``checkpoint``: of one network, ``progress``
    and ``advance``: see `train_heads`."""
    shared = {f: v for f, v in asdict(job.settings).items() if f not in VARIED}
    assert all({f: asdict(each)[f] for f in shared} == shared for each in settings)
    features = TrainingData(job)
    fits: dict[int, FittedHead | ProtocolError] = {}
    work = math.inf  # an image through a network is always worth dividing, and what is solved for all rows at once
    if not isinstance(job.view, PixelView) and not head_info(job.settings.head).solved:
        work = work_of_a_step(make_model(job, job.settings), settings, job.input.shape)
    with arithmetic_for(work, job.settings.device) as products:
        for turned in (False, True):  # into a basis, which is another view of the features
            numbers = [k for k, each in enumerate(settings) if (each.optimizer == EIGEN) is turned]
            if not numbers:
                continue
            own = [settings[k] for k in numbers]
            part = None if advance is None else partial(_scaled, advance, len(numbers) / len(settings))
            heads = _train(job, own, features, say or (lambda line: None), checkpoint, progress, part)
            fits |= dict(zip(numbers, _calibrate_and_test(job, heads, features, products), strict=True))
    return [fits[k] for k in range(len(settings))]


def _scaled(advance: Callable[[float], object], factor: float, share: float) -> None:
    advance(factor * share)


Trained = tuple[nn.Module, TrainedState]  # a head before it is calibrated


def _train(
    job: TrainingJob, settings: list[Settings], features: TrainingData, say: Say, checkpoint: Checkpoint | None,
    progress: bool, advance: Callable[[float], object] | None,
) -> list[Trained]:  # fmt: skip
    if head_info(job.settings.head).solved:
        return [_solve(job, each, features, say) for each in settings]
    losses, corrections = zip(*(loss_and_prior(job.task, features.train.y, each) for each in settings), strict=True)
    generators = [torch.Generator().manual_seed(each.seed) for each in settings]
    models = [make_model(job, s, own).to(s.device) for s, own in zip(settings, generators, strict=True)]
    train, val, basis = features.for_model(models[0], settings[0].optimizer)
    if basis is not None:
        for model in models:
            turn_weight(model, basis)
    heads = make_trainer(models, losses, generators, settings)
    table = EpochTable(settings[0], say)
    trained = train_heads(
        heads, settings, train, val, corrections, job.task,
        window=features.window, on_epoch=table if len(settings) == 1 else None, checkpoint=checkpoint,
        progress=progress, advance=advance,
    )  # fmt: skip
    for model, each in zip(models, trained, strict=True):
        if each.failed is None:
            model.load_state_dict(each.state)
        if basis is not None:
            turn_weight(model, basis.T)
    return [(model.eval(), each) for model, each in zip(models, trained, strict=True)]


def _solve(job: TrainingJob, settings: Settings, features: TrainingData, say: Say) -> Trained:
    """Every value of a solver's own path is solved; val chooses one. A line of the history is a value."""
    begin, count = time.perf_counter(), len(job.task.classes)
    x, y = features.all_of_train()
    trained = TrainedState(settings, Schedule(settings), np.zeros(count))
    path = SOLVERS[settings.head](x, y.numpy(), job.task.kind, count, trained.notes.append)
    logits = path_logits(path, features.val.chunks())
    for place, (values, _) in enumerate(path):
        line = {"epoch": place + 1, **values}
        _, better = score_epoch(trained, line, logits[place], features.val.y.numpy(), job.task)
        trained.epoch = place + 1 if better else trained.epoch
    trained.seconds = time.perf_counter() - begin
    say(path_line(trained.history, trained.epoch, settings.select))
    chosen, model = path[trained.epoch - 1]
    for name, value in chosen.items():
        tried = sorted({setting[name] for setting, _ in path})
        if len(tried) > 2 and value in (tried[0], tried[-1]):
            trained.notes.append(f"{name} {value:g} is at the edge of what was tried ({tried[0]:g} to {tried[-1]:g})")
    return model.eval(), trained


def _calibrate_and_test(
    job: TrainingJob, heads: list[Trained], features: TrainingData, products: str
) -> list[FittedHead | ProtocolError]:
    """Calibration and measures. Every choice is made: from here on nothing changes, and test is read."""
    models = [model for model, trained in heads if trained.failed is None]
    if not models:
        return [trained.failed for _, trained in heads if trained.failed is not None]
    data = {"val": features.val, "test": features.test()}
    logits = {name: iter(logits_of(models, each)) for name, each in data.items()}
    return [
        trained.failed
        or _fitted_head(job, model, trained, features, products, data, {n: next(z) for n, z in logits.items()})
        for model, trained in heads
    ]


def _fitted_head(
    job: TrainingJob, model: nn.Module, trained: TrainedState, features: TrainingData, products: str,
    data: dict[str, SplitData], logits: dict[str, np.ndarray],
) -> FittedHead | ProtocolError:  # fmt: skip
    if wrong := np.flatnonzero(~np.isfinite(logits["test"]).all(1)).tolist():  # of val training has seen to that
        first, way = one_line(job.view.ids[job.splits.rows("test")[wrong[0]]]), "a smaller --lr helps"
        if not isinstance(job.view, PixelView):
            way = "its features are far beyond those of train; --standardize l2 scales each image by itself"
        counts = f"{len(wrong):,} of {len(logits['test']):,} images of test"
        return ProtocolError(f"the head's outputs are not finite for {counts}, such as {first}: {way}.")
    task, y, sensitivity = job.task, {name: each.y.numpy() for name, each in data.items()}, trained.settings.sensitivity
    calibration, note = calibrate(task.kind, logits["val"], y["val"], trained.correction, task.positive, sensitivity)
    notes = [*trained.notes, *filter(None, (limit_note(trained), note))]
    return FittedHead(
        trained.settings, model, features.train.scale, calibration, trained.history, trained.epoch,
        {name: evaluate(calibration.predictions(task.kind, each, y[name], task.positive), task.classes)
         for name, each in logits.items()},
        {name: (job.splits.rows(name), each) for name, each in logits.items()},
        notes, trained.seconds, _ms_per_image(model, data["test"]), features.window, products,
    )  # fmt: skip


def limit_note(trained: TrainedState) -> str | None:
    """A sentence where training ended at its limit of epochs and not because val was no better: at a learning rate that
    does not end by itself ``patience`` had not run out, else the criterion of the last epoch is above all others, by
    more than the last digit that is shown."""
    settings, history = trained.settings, trained.history
    if head_info(settings.head).solved:
        return None
    values = [row[f"val_{settings.select}"] for row in history]
    sign = 1 if METRICS[measure_name(settings.select)].higher else -1
    if sign == 1 and max(values, default=0) >= 1:  # nothing is better
        return None
    if settings.schedule in ("constant", "plateau"):
        ended = settings.epochs - trained.epoch < max(settings.patience, 1)
    else:
        gain = min((sign * (values[-1] - value) for value in values[:-1]), default=math.inf)
        ended = trained.epoch == settings.epochs and gain > 1e-3
    best = f"(best: epoch {trained.epoch:,})"
    return f"{AT_LIMIT} of {settings.epochs:,} epochs while val still got better {best}" if ended else None


def _ms_per_image(model: nn.Module, data: SplitData) -> float:
    """Milliseconds that a head takes for an image, once its features are in memory."""
    x = next(iter(data.chunks(min(TIMED, data.piece))))
    begin = time.perf_counter()
    with torch.no_grad():
        model(x).cpu()
    return 1000 * (time.perf_counter() - begin) / len(x)


def run_contents(job: TrainingJob, fit: FittedHead, controls: list[dict[str, Any]]) -> RunContents:
    """The run as it will lie on disk."""
    view, info, task, splits = job.view, job.view.info(job.output), job.task, job.splits
    tested = sorted(np.asarray(view.digests)[splits.rows("test")].tolist())  # the same for the same images only
    config = {
        "settings": fit.settings.to_dict(),
        "head": fit.settings.head,
        "parameters": fit.parameters,
        "standardize": fit.scale.kind,
        "view": {"label": view.label, "name": view.name, "path": place_of(view.path), "output": job.output,
                 "shape": list(info.shape), "dtype": info.dtype, "prefix": list(job.input.prefix),
                 "grid": None if job.input.grid is None else list(job.input.grid), "fingerprint": view.fingerprint,
                 "untrained": view.untrained, "source": view.source,
                 "copies": str(view.augmented) if view.augmented else None},
        "spec": view.spec,
        "provenance": view.provenance,
        "task": task.kind,
        "classes": list(task.classes),
        "positive": None if task.positive is None else task.classes[task.positive],
        "splits": {"how": splits.how, "drawn": list(splits.drawn), "counts": class_counts(splits.names, task),
                   "images": {s: len(splits.rows(s)) for s in ("train", "val", "test")},
                   "digest": hashlib.blake2b(b"".join(tested), digest_size=16).hexdigest(),
                   "leaks": [asdict(leak) for leak in splits.leaks], "dropped": splits.dropped,
                   "fraction": splits.fraction,
                   "fold": None if splits.fold is None else list(splits.fold), "grouped": view.groups is not None},
        "chosen": {"by": fit.settings.select, "on": "val", "epoch": fit.epoch},
        "calibration": fit.calibration.to_dict(),
        "warnings": splits.warnings,
        "notes": fit.notes,
        "seconds": fit.seconds,
        "cost": training_cost(job, fit),
        "reading": "from memory" if fit.window is None else f"from the shards, {fit.window:,} rows at a time",
        "products": fit.products,
    }  # fmt: skip
    tensors = {**fit.model.state_dict(), **fit.scale.tensors()}
    return RunContents(
        config, {**fit.metrics, "controls": controls}, fit.history,
        tensors={key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        ids=list(view.ids), splits=splits.names, labels=task.labels, predictions=fit.predictions,
        digests=np.asarray(view.digests), clusters=clusters_of(view),
    )  # fmt: skip


def training_cost(job: TrainingJob, fit: FittedHead) -> dict[str, Any]:
    """Training in seconds; an image at prediction in milliseconds: ``ms_per_image`` of the head, or of the network of a
    baseline, ``forward_ms`` of the backbone before it and ``loading_ms`` of reading and resizing, both as the view
    measured them (None: it did not). ``device``: of backbone or network."""
    measured = job.view.cost or {}
    device = device_title(fit.settings.device) if isinstance(job.view, PixelView) else measured.get("device")
    return {
        "train_seconds": fit.seconds, "seconds_to_best": fit.seconds_to_best, "ms_per_image": fit.ms_per_image,
        "forward_ms": measured.get("forward_ms"), "loading_ms": measured.get("loading_ms"),
        "device": f"{device}, busy with other work" if measured.get("busy") else device,
        "bytes_per_image": _bytes_per_image(job.view, job.output),
    }  # fmt: skip


def _bytes_per_image(view: FeatureView, output: str) -> int | None:
    """In the cache: of what is stored, for an output that follows from tokens those tokens; of images nothing is."""
    from featurecache.outputs import members

    if isinstance(view, PixelView):
        return None
    stored = {output} if output in view.outputs else set()
    stored = stored or {each.name if each.name in view.outputs else each.source for each in members(output)}
    infos = [view.outputs[name] for name in stored]
    return sum(math.prod(info.shape) * np.dtype(info.dtype).itemsize for info in infos)
