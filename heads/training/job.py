"""A training before it begins: task, output, splits, model and features, with every mistake of the user named."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.arithmetic import cpu_multiplies_bf16
from featurecache.errors import BadOption, NotInCache
from featurecache.files.records import canonical_json
from featurecache.formatting import shell_word
from featurecache.images.headers import crop_words
from heads.memory import memory_for_features
from heads.models.catalogue import head_info, make_head, make_network, shape_of_network, standardization
from heads.models.common import Input, count_parameters, rows_at_once
from heads.models.tokens import FixedVectorLinear
from heads.pixel_view import PixelView
from heads.runs.run import hash_of
from heads.runs.write import deciding
from heads.settings import EIGEN, OF_STEPS, Settings, flag, options_for, title
from heads.splits import Splits, choose_splits, dropped_sentence
from heads.task import FeatureView, Say, SplitData, Standardize, Task, load_features, task_of
from heads.training.eigenbasis import eigenbasis
from heads.training.loop import first_eligible_epoch

if TYPE_CHECKING:
    from featurecache.backbones.base import Backbone

VECTORS = ("cls", "pooler", "gap", "vector")  # what a head on vectors takes, the first that the view has


@dataclass(frozen=True)
class TrainingJob:
    """What heads that are trained together have in common; everything the user can have mistaken is checked."""

    view: FeatureView
    settings: Settings
    output: str
    task: Task
    splits: Splits
    pretrained: Backbone | None = None  # what the one network of `finetune:` begins from, loaded before the images were

    @property
    def input(self) -> Input:
        return Input.of(self.view.info(self.output))


def prepare_training(
    view: FeatureView | str | Path | None, settings: Settings, splits: Splits | None = None
) -> TrainingJob:
    """The task, the output and the splits of a training, checked. ``view``: None is the newest; ``splits``: splits that
    are given from elsewhere."""
    if view is None or isinstance(view, str | Path):
        from featurecache.store.write_view import open_view

        view = open_view(view)
    check_options(settings)
    output = choose_output(view, settings.head, settings.output)
    task = task_of(view, classes=settings.classes, only=settings.only, positive=settings.positive)
    if settings.pos_weight and not task.multilabel:
        raise BadOption("--pos-weight is for multi-label data; classes that exclude each other have balanced batches.")
    if settings.class_weights and task.multilabel:
        raise BadOption("--class-weights is for classes that exclude each other; multi-label data have --pos-weight.")
    if settings.sensitivity is not None and task.kind not in ("binary", "multilabel"):
        raise BadOption(
            f"--sensitivity sets a threshold, and of {len(task.classes)} classes the most probable is predicted "
            "without one. It is for two classes, or for labels beside each other."
        )
    if settings.precision == "bf16" and settings.device == "cpu" and not cpu_multiplies_bf16():
        raise BadOption("--precision bf16: this CPU has no fast products in bf16. Leave it out: fp32 is exact.")
    job = TrainingJob(view, settings, output, task, splits or choose_splits(view, task, settings))
    if not isinstance(view, PixelView):
        model = make_model(job, settings)  # says at once that a head and an output do not fit
        if settings.head.startswith("python:"):
            _check_shape(settings.head, model.eval(), job.input.shape, len(task.classes))
    return job


@torch.no_grad()
def _check_shape(head: str, model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    logits = model(torch.zeros(2, *shape))
    if getattr(logits, "shape", None) != (2, classes):
        gives = f"{list(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise BadOption(f"{head} gives {gives} for two images; expected logits [2, {classes}], one for each class.")


def check_options(settings: Settings) -> None:
    """An option that a head or network does not take is refused: one that did nothing would look as if it did."""
    info, plain = head_info(settings.head), Settings(settings.head)
    takers = ["finetune"] if info.takes == "pixels" else ["network", "finetune"]
    useless = () if settings.head.startswith("finetune:") else options_for(*takers)
    for name in (each for each in useless if getattr(settings, each) != getattr(plain, each)):
        way = " extract --copies 2 --augment … stores augmented copies." if name == "augment" else ""
        raise BadOption(f"{flag(name)} would do nothing: {settings.head} does not take it.{way}")
    if settings.optimizer == EIGEN and (settings.dropout or not info.convex):
        other = (
            f"--dropout {settings.dropout:g} leaves channels out" if info.convex else f"{settings.head} is no such head"
        )
        raise BadOption(
            f"--optimizer {EIGEN} is for one linear layer on whole vectors; {other}. Type --optimizer adam."
        )
    for name in OF_STEPS if info.solved else ():
        if name != "seed" and getattr(settings, name) != getattr(plain, name):
            raise BadOption(f"{flag(name)} is for heads that are trained in steps; {settings.head} is solved.")


def training_images_hash(job: TrainingJob) -> str:
    """One word for the images of a job with labels and splits, in the order of their rows, which is that of batches."""
    view, task, names = job.view, job.task, job.splits.names
    used = np.flatnonzero(names != "")
    state = hashlib.blake2b(canonical_json([task.kind, task.classes, task.positive]).encode(), digest_size=16)
    parts = [np.asarray(view.digests)[used], np.ascontiguousarray(task.labels[used]), names[used].astype("S5")]
    if view.versions is not None:
        state.update(canonical_json(view.augmented.to_dict() if view.augmented else None).encode())
        parts.append(np.asarray(view.copies(used)))
    for part in parts:
        state.update(part.tobytes())
    return state.hexdigest()


def request_of(job: TrainingJob) -> dict[str, Any]:
    """All that decides what comes of a job: equal requests give equal runs."""
    return {
        "settings": deciding(job.settings.to_dict()), "images": training_images_hash(job),
        "features": job.view.fingerprint, "output": job.output, "code": code_hash(job.settings.head),
    }  # fmt: skip


def code_hash(head: str) -> str | None:
    """Of the module that a ``python:`` head is in."""
    if not head.startswith("python:"):
        return None
    return hash_of(inspect.getsource(sys.modules[head_info(head).make.__module__]))


def make_model(job: TrainingJob, settings: Settings, generator: torch.Generator | None = None) -> nn.Module:
    classes = len(job.task.classes)
    if isinstance(job.view, PixelView):
        return make_network(settings, job.input.shape[1], classes, generator, job.pretrained)
    return make_head(settings.head, job.input, classes, generator, dropout=settings.dropout, gated=settings.gated)


def choose_output(view: FeatureView, head: str, output: str | None) -> str:
    """The output a head trains on: the one asked for, or the one it was made for."""
    takes = head_info(head).takes
    if isinstance(view, PixelView):
        if takes != "pixels":
            raise BadOption(f"{head} is a head on features; {view.label} holds images. train-head trains it on a view.")
        return view.output
    if takes == "pixels":
        raise BadOption(f"{head} is trained from pixels: featurecache train-baseline --arch {shell_word(head)}")
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
    if vectors := [name for name in VECTORS if view.has(name)]:
        return vectors[0]
    have = ", ".join(view.outputs)
    raise NotInCache(f"{view.label} holds {have} and no vector for {head}. --output chooses another, such as mean.")


def describe_training(job: TrainingJob, say: Say) -> None:
    """What is trained on what, before it is."""
    size = "×".join(str(n) for n in job.input.shape)
    kind = "images  " if isinstance(job.view, PixelView) else "features"
    say(f"{kind}   {job.view.label} {job.output} [{size}]")
    say(f"splits     {split_line(job.splits)} ({job.splits.how})")
    if crop := job.view.source.get("crop"):
        say(f"crop       {crop_words(crop)}")
    if (copies := versions_in(job.view) - 1) > 0:
        say(f"copies     {copies} augmented of each training image; each epoch shows one of the {copies + 1}")
    if job.splits.dropped is not None:
        say(f"leaks      {dropped_sentence(job.splits.dropped)}")
    for warning in job.splits.warnings:
        say(f"warning    {warning}")
    if job.settings.augment:
        say(f"augment    {job.settings.augment}, drawn anew for every image of every batch")
    say(f"{'network ' if isinstance(job.view, PixelView) else 'head    '}   {_head_line(job)}")


def split_line(splits: Splits) -> str:
    return " · ".join(f"{name} {len(splits.rows(name)):,}" for name in ("train", "val", "test"))


def _head_line(job: TrainingJob) -> str:
    settings, task, info = job.settings, job.task, head_info(job.settings.head)
    select = "loss" if settings.select == "loss" else title(settings.select, task.kind)
    kind = standardization(settings)
    scaled = "" if kind == "none" else f"; {kind}{' by train' if kind == 'zscore' else ''}"
    if info.solved:
        return f"{settings.head}: solved{scaled}; chosen by {select} on val"
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    decay += " on everything" if decay and settings.decay_all else ""
    optimizer = {"adamw": "AdamW", "sgd": "SGD with momentum 0.9,"}.get(settings.optimizer, "Adam")
    schedule = " in the eigenbasis" if settings.optimizer == EIGEN else ""
    schedule += "" if settings.schedule == "constant" else f", {settings.schedule}"
    schedule += f", warm-up {100 * settings.warmup:g} %" if settings.warmup else ""
    schedule += "" if settings.clip_norm is None else f", gradients clipped at {settings.clip_norm:g}"
    dropped = "" if settings.dropout is None else f"; dropout {settings.dropout:g}"
    smoothed = f"; labels smoothed by {settings.label_smoothing:g}" if settings.label_smoothing else ""
    weighted = "; positives weighted" if settings.pos_weight else "; classes weighted" if settings.class_weights else ""
    balanced = "balanced " if settings.balanced(task.multilabel) else ""
    bf16 = "; products in bf16" if settings.precision == "bf16" else ""
    if isinstance(job.view, PixelView):
        model = shape_of_network(settings, job.input.shape[1], len(task.classes))
    else:
        model = make_model(job, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    partly = f", of which {trained:,} are trained" if trained < count_parameters(model) else ""
    eligible = settings.epochs - first_eligible_epoch(settings) + 1
    chosen = f"chosen by {select} on val{f' among the last {eligible:,} epochs' if eligible < settings.epochs else ''}"
    if eligible == 1 < settings.epochs:
        chosen = "the last epoch is taken"
    return (
        f"{settings.head}: {count_parameters(model):,} parameters{partly}; {balanced}batches of "
        f"{settings.batch_size}{weighted}{dropped}{smoothed}; {optimizer} {settings.lr:g}{schedule}{decay}{scaled}"
        f"{bf16}; {chosen}"
    )


class TrainingData:
    """The features of a job: train and val at once, test when it is asked for."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.resident, self.window = memory_plan(job)
        train = self._load("train", None, copies=True)
        scale = Standardize.fit(standardization(job.settings), train.chunks)  # which are not scaled yet
        self.train = replace(train, scale=scale)
        self.val = self._load("val", self.train.scale)

    def _load(self, split: str, scale: Standardize | None, copies: bool = False) -> SplitData:
        job, rows = self.job, self.job.splits.rows(split)
        data = load_features(job.view, job.output, rows, job.task.labels, scale, resident=self.resident, copies=copies)
        if isinstance(job.view, PixelView):
            return replace(data, piece=rows_at_once(job.input.shape), device=job.settings.device)
        return data

    def all_of_train(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [N·V, ...] scaled, and their labels: augmented copies are images like others to a solver."""
        rows = torch.arange(len(self.train) * self.train.versions).split(4096)
        x, y = zip(*map(self.train.batch, rows), strict=True)
        return torch.cat(x), torch.cat(y)

    def for_model(self, model: nn.Module, optimizer: str) -> tuple[SplitData, SplitData, torch.Tensor | None]:
        """Train and val as training sees them, and the basis in which it does: the vectors of a head that only sees
        tokens through some fixed vector are computed once, and it is trained as the linear head it is on these. Vectors
        in memory are scaled and turned once: for every batch that takes as long as a linear head's step."""
        train, val, basis = self.train, self.val, None
        if isinstance(model, FixedVectorLinear):
            train, val = train.map_features(model.vectors), val.map_features(model.vectors)
        if optimizer == EIGEN:
            basis = eigenbasis(train)
            train, val = (replace(data, scale=replace(data.scale, basis=basis)) for data in (train, val))
        if train.x is not None and train.x.ndim == 2 and (train is self.train or basis is not None):
            train, val = train.map_features(None), val.map_features(None)
        return train, val, basis

    def test(self) -> SplitData:
        return self._load("test", self.train.scale)


def memory_plan(job: TrainingJob) -> tuple[bool, int | None]:
    """Whether the features fit into the budget (vectors also as float32, as they are trained with), and else how many
    rows may be in use at once. Images are where they are, and any of them are quickly had."""
    if isinstance(job.view, PixelView):
        return False, None
    info, names = job.view.info(job.output), job.splits.names
    numbers = math.prod(info.shape)
    row = numbers * np.dtype(info.dtype).itemsize
    whole = row + 4 * numbers if len(info.shape) == 1 else row
    rows = int((names == "train").sum()) * versions_in(job.view) + int(np.isin(names, ("val", "test")).sum())
    budget = memory_for_features(len(names)) if job.settings.ram is None else int(job.settings.ram * 1e9)
    return (True, None) if rows * whole <= budget else (False, max(job.settings.batch_size, budget // row))


def versions_in(view: FeatureView) -> int:
    """1, and the augmented copies of each training image."""
    return 1 if view.versions is None else view.copies(np.zeros(0, np.int64)).shape[1]
