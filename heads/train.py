"""Train heads on the features of a view, by the protocol: choice on val, test read once afterwards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import ProtocolError
from heads import evaluate as ev
from heads.architectures import count_parameters, head_info
from heads.contents import contents_of
from heads.data import Features, Standardize, Task
from heads.engine import logits_of, threads_for, together, work_of_a_step
from heads.jobs import Job, JobFeatures, Say, describe, make_model, prepare
from heads.joint import Keeper, Schedule, Trained, judge, train_heads
from heads.losses import loss_and_prior
from heads.metrics import METRICS
from heads.pixels import PixelView
from heads.run_folder import run_target, write_run
from heads.runs import Run, load_run
from heads.settings import VARIED, Settings

if TYPE_CHECKING:
    from heads.pixels import AnyView

TIMED = 256  # images, at most, on which a head's time at prediction is measured
OF_HISTORY = ("epoch", "best", "seconds")


def train_head(
    view: AnyView | str | Path,
    head: str,
    *,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    controls: bool | None = None,
    report: bool = True,
    images: bool = True,
    hash_ids: bool = False,
    say: Say | None = None,
    **options: Any,
) -> Run:
    """Train ``head`` on a view and write a run folder; ``options`` are the other fields of `Settings`, which are the
    options of ``featurecache train-head``.

    ``controls``: chance, majority class and logistic regression on pixels beside it; None: where the weights are
    untrained. ``report``: report.html in the folder, with or without ``images`` of the data in it, ids as keyed hashes
    with ``hash_ids``; ``run.metrics["comparison"]`` then holds the intervals. Raises UnknownHead, BadOption, NotInCache
    (with the command that stores what is missing), ProtocolError (splits that cannot work) and RunError (a folder in
    the way), all before training.
    """
    say = say or (lambda line: None)
    settings = Settings.of(head, splits=splits, classes=classes, only=only, **options)
    job = prepare(view, settings)
    target = run_target(out, job.view.name, head, overwrite)
    describe(job, say)
    (fit,) = train_together(job, [settings], say)
    if isinstance(fit, ProtocolError):
        raise fit
    beside = controls_beside(job, say) if (job.view.untrained if controls is None else controls) else []
    run = write_run(target, contents_of(job, fit, beside))
    return with_report(run, images, hash_ids) if report else run


def with_report(run: Run, images: bool, hash_ids: bool) -> Run:
    from heads.comparison import compare, families_of
    from heads.reports.page import write_report

    families = families_of([run])
    write_report(run.path, families, compare(families), images=images, hash_ids=hash_ids)
    return load_run(run.path, trust_code=True)


@dataclass
class Fit:
    """What training gave: the chosen head, its calibration, and all that is reported."""

    settings: Settings
    model: nn.Module
    scale: Standardize
    calibration: ev.Calibration
    history: list[dict[str, float]]
    epoch: int  # the chosen one; of a solved head the place of the chosen setting in its path, from 1
    metrics: dict[str, dict[str, Any]]
    predictions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> rows of the view, raw logits float64 [n, C]
    notes: list[str]
    seconds: float
    ms_per_image: float  # of the head alone
    window: int | None  # rows in use at once where features were read from the shards

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
    job: Job, settings: Sequence[Settings], say: Say | None = None, keeper: Keeper | None = None
) -> list[Fit | ProtocolError]:
    """One head for each of ``settings``, which differ from the job's in `VARIED` only; each is what it is alone. A head
    whose outputs do not stay finite is the error that says so. ``keeper``: of one network, see `train_heads`."""
    shared = {f: v for f, v in asdict(job.settings).items() if f not in VARIED}
    assert all({f: asdict(each)[f] for f in shared} == shared for each in settings)
    features = JobFeatures(job)
    found: dict[int, Fit | ProtocolError] = {}
    with _threads(job, len(settings)):
        for places in _same_batches(settings, job.task):
            trained = _trained(job, [settings[k] for k in places], features, say or (lambda line: None), keeper)
            found |= dict(zip(places, _judged(job, trained, features), strict=True))
    return [found[k] for k in range(len(settings))]


def _threads(job: Job, count: int) -> AbstractContextManager[None]:
    """An image through a network is always worth dividing."""
    if isinstance(job.view, PixelView):
        return nullcontext()
    model = make_model(job, job.settings)
    return threads_for(work_of_a_step(model, count, job.settings.batch_size, job.input.shape))


def _same_batches(settings: Sequence[Settings], task: Task) -> list[list[int]]:
    """Class weights go without balanced batches, so those heads see others."""
    kinds = [each.balanced(task.multilabel) for each in settings]
    return [[k for k, kind in enumerate(kinds) if kind is wanted] for wanted in sorted(set(kinds))]


@dataclass(frozen=True)
class _Head:
    """A trained head before it is calibrated; ``correction`` [C] is added to its logits."""

    model: nn.Module
    trained: Trained
    correction: np.ndarray
    notes: tuple[str, ...] = ()


def _trained(job: Job, settings: list[Settings], features: JobFeatures, say: Say, keeper: Keeper | None) -> list[_Head]:
    if head_info(job.settings.head).solved:
        return [_solved(job, each, features, say) for each in settings]
    prior = [loss_and_prior(job.task, features.train.y, each) for each in settings]
    generators = [torch.Generator().manual_seed(each.seed) for each in settings]
    models = [make_model(job, s, own).to(s.device) for s, own in zip(settings, generators, strict=True)]
    heads = together(models, [loss for loss, _ in prior], generators, settings)
    train, val = features.given_to(models[0])

    def said(k: int, row: dict[str, float], stop: bool) -> None:
        if len(settings) == 1:
            say(_epoch_line(row, settings[k], stop))

    corrections = [correction for _, correction in prior]
    trained = train_heads(
        heads, settings, train, val, corrections, job.task, window=features.window, said=said, keeper=keeper
    )
    for model, each in zip(models, trained, strict=True):
        if each.failed is None:
            model.load_state_dict(each.state)
    return [_Head(m.eval(), t, c) for m, t, c in zip(models, trained, corrections, strict=True)]


def _solved(job: Job, settings: Settings, features: JobFeatures, say: Say) -> _Head:
    """Every value of a solver's own path is solved; val chooses one. A line of the history is a value."""
    from heads.solvers import SOLVERS, path_logits

    begin, count = time.perf_counter(), len(job.task.classes)
    x, y = features.all_of_train()
    notes: list[str] = []
    path = SOLVERS[settings.head].solve(x, y.numpy(), job.task.kind, count, settings.seed, notes.append)
    z = path_logits(path, features.val.chunks())
    trained = Trained(settings, Schedule(settings))
    for place, (values, _) in enumerate(path):
        line = {"epoch": place + 1, **values}
        judged, better = judge(trained, line, z[place], features.val.y.numpy(), job.task)
        say(_epoch_line(judged, settings, False))
        trained.epoch = place + 1 if better else trained.epoch
    trained.seconds = time.perf_counter() - begin
    return _Head(path[trained.epoch - 1][1].eval(), trained, np.zeros(count), (*notes, *_edge(path, trained.epoch)))


def _edge(path: Sequence[tuple[dict[str, float], nn.Module]], chosen: int) -> list[str]:
    """A sentence for each setting that was chosen at an end of its path."""
    notes = []
    for name, value in path[chosen - 1][0].items():
        values = sorted({setting[name] for setting, _ in path})
        if len(values) > 2 and value in (values[0], values[-1]):
            notes.append(f"{name} {value:g} is at the edge of what was tried ({values[0]:g} to {values[-1]:g})")
    return notes


def _judged(job: Job, heads: list[_Head], features: JobFeatures) -> list[Fit | ProtocolError]:
    """Calibration and measures. Every choice is made: from here on nothing changes, and test is read."""
    held, divided = features.val, job.divided
    kept = [head for head in heads if head.trained.failed is None]
    if not kept:
        return [head.trained.failed for head in heads if head.trained.failed is not None]
    z_val = logits_of([head.model for head in kept], held)
    test = features.test()
    z_test = logits_of([head.model for head in kept], test)
    fits = []
    for head, *raw in zip(kept, z_val, z_test, strict=True):
        settings = head.trained.settings
        calibration, note = ev.calibrate(
            job.task.kind, raw[0], held.y.numpy(), head.correction, job.task.positive, settings.sensitivity
        )
        parts = {"val": (held, raw[0]), "test": (test, raw[1])}
        measured = {
            name: ev.evaluate(
                job.task.kind, job.task.classes, calibration(z), part.y.numpy(), positive=job.task.positive,
                cuts=calibration.thresholds,
            )
            for name, (part, z) in parts.items()
        }  # fmt: skip
        fits.append(
            Fit(
                settings, head.model, features.train.scale, calibration, head.trained.history, head.trained.epoch,
                measured, {name: (divided.rows(name), z) for name, (_, z) in parts.items()},
                [*head.notes, *([f"calibration: {note}"] if note else [])], head.trained.seconds,
                _ms_per_image(head.model, test), features.window,
            )
        )  # fmt: skip
    given = iter(fits)
    return [next(given) if head.trained.failed is None else head.trained.failed for head in heads]


def _ms_per_image(model: nn.Module, data: Features) -> float:
    """Milliseconds that a head takes for an image, once its features are in memory."""
    x = next(iter(data.chunks(min(TIMED, data.piece))))
    begin = time.perf_counter()
    with torch.no_grad():
        model(x).cpu()
    return 1000 * (time.perf_counter() - begin) / len(x)


def _epoch_line(row: dict[str, float], settings: Settings, stop: bool) -> str:
    by = settings.select
    measure = "" if by == "loss" else f"  val {METRICS[by].title} {row[f'val_{by}']:.3f}"
    if "train_loss" not in row:
        values = ", ".join(f"{name} {v:g}" for name, v in row.items() if name not in OF_HISTORY and name[:4] != "val_")
        return f"{values}  val loss {row['val_loss']:.3f}{measure}{'  best' if row['best'] else ''}"
    tail = "  best" if row["best"] else f"  stopped: no better for {settings.patience} epochs" if stop else ""
    return (
        f"epoch {row['epoch']:2.0f}  train loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}{measure}{tail}"
        f"  · {row['seconds']:.1f} s"
    )


def controls_beside(job: Job, say: Say) -> list[dict[str, Any]]:
    from heads.controls import all_controls

    say("controls   chance, the majority class, logistic regression on raw pixels")
    return all_controls(job.view, job.task, job.divided)
