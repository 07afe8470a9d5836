"""Train one head on the features of a view, by the protocol: choice on val, test read once afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption, NotInCache, ProtocolError, nearest
from heads import evaluate as ev
from heads.architectures import count_parameters, head_info, make_head
from heads.batches import BalancedBatches, PlainBatches
from heads.data import STANDARDIZE, Features, Standardize, Task, load_features, task_of
from heads.engine import Learner, logits_of, loss_and_prior, run_epoch, threads_for
from heads.metrics import METRICS
from heads.runs import Contents, Run, run_target, write_run
from heads.splits import Splits, choose_splits, class_counts, dropped_sentence

if TYPE_CHECKING:
    from featurecache.reader import View

VECTORS = ("cls", "pooler", "gap", "vector")  # what a head on vectors takes, the first that the view has
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run, as data; what is in config.json is what ran."""

    head: str
    output: str | None = None
    epochs: int = 50
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    patience: int = 5  # epochs without a better one; 0: train all epochs
    seed: int = 0  # initialisation, dropout
    split_seed: int = 0  # splits, batch order
    select: str = "auroc"
    balance: bool = True
    standardize: str | None = None
    resplit_val: bool = False
    splits: str | None = None
    classes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    train_per_class: int | None = None
    pos_weight: bool = False
    positive: str | None = None
    drop_leaks: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("seed", 0), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.lr < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise BadOption(f"--lr must be above 0 and --weight-decay not below (got {self.lr}, {self.weight_decay}).")
        if self.train_per_class is not None and self.train_per_class < 1:
            raise BadOption(f"--train-per-class is {self.train_per_class}; it must be at least 1.")
        if self.standardize not in (None, *STANDARDIZE):
            raise BadOption(f"--standardize {self.standardize}: it is one of {', '.join(STANDARDIZE)}.")
        if self.select not in (*METRICS, "loss"):
            raise BadOption(
                f"--select {self.select} is no measure.{nearest(self.select, METRICS)} "
                f"Measures: loss, {', '.join(METRICS)}."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"classes": list(self.classes), "only": list(self.only)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in data.items() if key in known}
        return cls(**given | {"classes": tuple(given["classes"]), "only": tuple(given["only"])})


def train_head(
    view: View | str | Path,
    head: str,
    *,
    output: str | None = None,
    epochs: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    patience: int = 5,
    seed: int = 0,
    split_seed: int = 0,
    select: str = "auroc",
    balance: bool = True,
    standardize: str | None = None,
    resplit_val: bool = False,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None,
    train_per_class: int | None = None,
    pos_weight: bool = False,
    positive: str | None = None,
    drop_leaks: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    controls: bool | None = None,
    say: Say | None = None,
) -> Run:
    """Train ``head`` on a view and write a run folder; the options are those of ``featurecache train-head``.

    ``controls``: chance, majority class and logistic regression on pixels beside it; None: where the weights are
    untrained. Raises UnknownHead, BadOption, NotInCache (with the command that stores what is missing), ProtocolError
    (splits that cannot work) and RunError (a folder in the way), all before training.
    """
    say = say or (lambda line: None)
    settings = Settings(
        head, output, epochs, lr, weight_decay, batch_size, patience, seed, split_seed, select, balance, standardize,
        resplit_val, None if splits is None else str(splits), tuple(classes or ()),
        (only,) if isinstance(only, str) else tuple(only or ()), train_per_class, pos_weight, positive,
        drop_leaks,
    )  # fmt: skip
    if isinstance(view, str | Path):
        from featurecache.views import open_view

        view = open_view(view)
    output = choose_output(view, head, output)
    make_head(head, view.info(output).shape, 2)  # says at once that a head and an output do not fit
    task = task_of(view, classes=settings.classes, only=settings.only, positive=positive)
    if pos_weight and not task.multilabel:
        raise BadOption("--pos-weight is for multi-label data; classes that exclude each other have balanced batches.")
    divided = choose_splits(
        view, task, split_seed=split_seed, resplit_val=resplit_val, file=splits, train_per_class=train_per_class,
        drop_leaks=drop_leaks,
    )  # fmt: skip
    target = run_target(out, view.name, head, overwrite)
    fit = _train(view, settings, output, task, divided, say)
    beside = _controls(view, task, divided, say) if (view.untrained if controls is None else controls) else []
    return write_run(target, _contents(view, settings, output, task, divided, fit, beside))


def choose_output(view: View, head: str, output: str | None) -> str:
    """The output a head trains on: the one asked for, or the one it was made for."""
    takes = head_info(head).takes
    if output is not None:
        if "/" in output or "\\" in output:
            raise BadOption(
                f"--output {output} looks like a path; --output names features (cls, tokens, …). Did you mean --out?"
            )
        view.info(output)  # raises with the command that stores it
        return output
    if takes != "vector":
        view.info("tokens")
        return "tokens"
    for name in VECTORS:
        if _offers(view, name):
            return name
    raise NotInCache(
        f"{view.label} holds {', '.join(view.outputs)} and no vector for {head}. "
        "--output chooses another, such as mean."
    )


def _offers(view: View, output: str) -> bool:
    try:
        view.info(output)
    except NotInCache:
        return False
    return True


@dataclass
class Fit:
    """What training gave: the chosen head, its calibration, and all that is reported."""

    model: nn.Module
    scale: Standardize
    calibration: ev.Calibration
    history: list[dict[str, float]]
    epoch: int  # the chosen one
    metrics: dict[str, dict[str, Any]]
    predictions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> rows of the view, calibrated logits [n, C]
    notes: list[str]
    seconds: float


def _train(view: View, settings: Settings, output: str, task: Task, divided: Splits, say: Say) -> Fit:
    info = view.info(output)
    size = "×".join(str(n) for n in info.shape)
    say(f"features   {view.label} {output} [{size}]")
    say(f"splits     {_split_line(divided)} ({divided.how})")
    if divided.dropped is not None:
        say(f"leaks      {dropped_sentence(divided.dropped)}")
    for warning in divided.warnings:
        say(f"warning    {warning}")
    start = time.perf_counter()
    train, val = divided.rows("train"), divided.rows("val")
    data = load_features(view, output, train, task.labels, Standardize())
    kind = settings.standardize or head_info(settings.head).standardize
    data = Features(data.x, data.y, Standardize.fitted(kind, data.x))
    held = load_features(view, output, val, task.labels, data.scale)
    generator = torch.Generator().manual_seed(settings.seed)
    model = make_head(settings.head, info.shape, len(task.classes), generator)
    balanced = settings.balance and not task.multilabel
    loss, correction = loss_and_prior(task, data.y, balanced, settings.pos_weight)
    learner = Learner(model, loss, generator, lr=settings.lr, weight_decay=settings.weight_decay)
    say(f"head       {_head_line(model, settings, balanced, kind, task)}")
    with threads_for(settings.batch_size * math.prod(info.shape)):
        history, chosen = _epochs(learner, data, held, correction, settings, task, say)
    calibration, note = ev.calibrate(task.kind, logits_of(model, held), held.y.numpy(), correction, task.positive)
    notes = [f"calibration: {note}"] if note else []
    # The choice is made: from here on nothing changes, and test is read.
    test = load_features(view, output, divided.rows("test"), task.labels, data.scale)
    measured, predictions = {}, {}
    for name, part in (("val", held), ("test", test)):
        z = calibration(logits_of(model, part))
        measured[name] = ev.evaluate(
            task.kind, task.classes, z, part.y.numpy(), positive=task.positive, cuts=calibration.thresholds
        )
        predictions[name] = (divided.rows(name), z)
    seconds = time.perf_counter() - start
    return Fit(model, data.scale, calibration, history, chosen, measured, predictions, notes, seconds)


def _epochs(
    learner: Learner, data: Features, held: Features, correction: np.ndarray, settings: Settings, task: Task, say: Say
) -> tuple[list[dict[str, float]], int]:
    """Train until val is no better for ``patience`` epochs; the learner ends with the weights of the best one."""
    batches: BalancedBatches | PlainBatches
    if settings.balance and not task.multilabel:
        batches = BalancedBatches(data.y.numpy(), settings.batch_size, settings.split_seed)
    else:
        batches = PlainBatches(len(data), settings.batch_size, settings.split_seed)
    history: list[dict[str, float]] = []
    best, chosen = (-float("inf"), -float("inf")), 0
    for epoch in range(1, settings.epochs + 1):
        begin = time.perf_counter()
        train_loss = run_epoch(learner, data, batches.epoch())
        z = logits_of(learner.model, held) + correction
        if not (np.isfinite(z).all() and np.isfinite(train_loss)):
            raise ProtocolError(
                f"the head's outputs are not finite any more in epoch {epoch}. A smaller --lr than {settings.lr:g} "
                "or --standardize zscore helps."
            )
        val_loss = ev.nll(task.kind, z, held.y.numpy())
        value = _criterion(settings.select, task, z, held.y.numpy())
        higher = settings.select != "loss" and METRICS[settings.select].higher
        goodness = (value if higher else -value, -val_loss)
        if better := goodness > best:
            best, chosen = goodness, epoch
            learner.keep()
        row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, f"val_{settings.select}": value}
        history.append({**row, "best": int(better), "seconds": time.perf_counter() - begin})
        stop = 0 < settings.patience <= epoch - chosen
        say(_epoch_line(history[-1], settings, stop))
        if stop:
            break
    learner.restore()
    return history, chosen


def _epoch_line(row: dict[str, float], settings: Settings, stop: bool) -> str:
    by = settings.select
    measure = "" if by == "loss" else f"  val {METRICS[by].title} {row[f'val_{by}']:.3f}"
    tail = "  best" if row["best"] else f"  stopped: no better for {settings.patience} epochs" if stop else ""
    return (
        f"epoch {row['epoch']:2.0f}  train loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}{measure}{tail}"
        f"  · {row['seconds']:.1f} s"
    )


def _criterion(select: str, task: Task, z: np.ndarray, y: np.ndarray) -> float:
    """The measure that chooses, on val; z with prior correction, before any temperature."""
    if select == "loss":
        return ev.nll(task.kind, z, y)
    cuts = ev.thresholds(task.kind, ev.probabilities(task.kind, z), y, task.positive)
    measured = ev.evaluate(task.kind, task.classes, z, y, positive=task.positive, cuts=cuts)
    if select not in measured:
        fitting = ", ".join(name for name in METRICS if name in measured)
        raise BadOption(f"--select {select} is not measured for a {task.kind} task. Measures: loss, {fitting}.")
    if np.isnan(measured[select]):
        raise ProtocolError(
            f"val {METRICS[select].title} is undefined: val lacks a class. --resplit-val draws a new val; "
            "--select loss needs none."
        )
    return measured[select]


def _split_line(divided: Splits) -> str:
    return " · ".join(f"{name} {len(divided.rows(name)):,}" for name in ("train", "val", "test"))


def _head_line(model: nn.Module, settings: Settings, balanced: bool, kind: str, task: Task) -> str:
    select = "loss" if settings.select == "loss" else METRICS[settings.select].title
    macro = "macro " if settings.select in ("auroc", "ap") and task.kind != "binary" else ""
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    scaled = "" if kind == "none" else f"; {kind} by train"
    weighted = "; positives weighted" if settings.pos_weight else ""
    return (
        f"{settings.head}: {count_parameters(model):,} parameters; {'balanced ' if balanced else ''}batches of "
        f"{settings.batch_size}{weighted}; Adam {settings.lr:g}{decay}{scaled}; chosen by {macro}{select} on val"
    )


def _controls(view: View, task: Task, divided: Splits, say: Say) -> list[dict[str, Any]]:
    from heads.controls import all_controls

    say("controls   chance, the majority class, logistic regression on raw pixels")
    return all_controls(view, task, divided)


def _digest(view: View, divided: Splits) -> str:
    """Which images are tested, in one word: equal for two runs only if it is the same images."""
    import hashlib

    rows = divided.rows("test")
    return hashlib.blake2b(b"".join(sorted(np.asarray(view.digests)[rows].tolist())), digest_size=16).hexdigest()


def _contents(
    view: View, settings: Settings, output: str, task: Task, divided: Splits, fit: Fit, controls: list[dict[str, Any]]
) -> Contents:
    """The run as it will lie on disk."""
    info = view.info(output)
    config = {
        "settings": settings.to_dict(),
        "head": settings.head,
        "parameters": count_parameters(fit.model),
        "standardize": fit.scale.kind,
        "view": {"label": view.label, "name": view.name, "path": str(Path(view.path).resolve()), "output": output,
                 "shape": list(info.shape), "dtype": info.dtype, "fingerprint": view.fingerprint,
                 "untrained": view.untrained, "source": view.source},
        "spec": view.spec,
        "provenance": view.provenance,
        "task": task.kind,
        "classes": list(task.classes),
        "positive": None if task.positive is None else task.classes[task.positive],
        "splits": {"how": divided.how, "drawn": list(divided.drawn), "counts": class_counts(divided.names, task),
                   "images": {s: len(divided.rows(s)) for s in ("train", "val", "test")},
                   "digest": _digest(view, divided), "leaks": [asdict(leak) for leak in divided.leaks],
                   "dropped": divided.dropped},
        "chosen": {"by": settings.select, "on": "val", "epoch": fit.epoch},
        "calibration": fit.calibration.to_dict(),
        "warnings": divided.warnings + fit.notes,
        "seconds": fit.seconds,
    }  # fmt: skip
    tensors = {**fit.model.state_dict(), **fit.scale.tensors()}
    return Contents(
        config, {**fit.metrics, "controls": controls}, fit.history,
        tensors={key: value.detach().contiguous() for key, value in tensors.items()},
        ids=list(view.ids), splits=divided.names, labels=task.labels, predictions=fit.predictions,
    )  # fmt: skip
