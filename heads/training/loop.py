"""Training K heads together: shared batches, and for each head its own schedule, early stopping and best epoch on val.

A head that is no better on val for ``patience`` epochs leaves; the others go on without its cost. What a head becomes
does not depend on what it is trained with.

Notation: K heads, E epochs, n rows of val, C classes or labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.errors import BadOption, ProtocolError
from featurecache.formatting import batch_bar
from heads.metrics.calibration import CalibratedPredictions, calibrate
from heads.metrics.classification import evaluate, mean_auroc
from heads.models.catalogue import head_info, standardization
from heads.runs.folder import read_whole_tensors, write_tensors
from heads.settings import METRICS, Settings, measure_name
from heads.task import SplitData, Task
from heads.training.batches import BalancedBatches, PlainBatches, sample_versions
from heads.training.engine import Learner, SequentialTrainer, Trainer, count_right, run_epoch
from heads.training.progress import ACCURACY

PLATEAU_FACTOR, PLATEAU_PATIENCE, PLATEAU_LEAST = 0.5, 3, 1e-4  # epochs; torch's ReduceLROnPlateau, its threshold
EpochCallback = Callable[[dict[str, float], bool], None]  # of one head: the line of its history, whether it stops here


class Schedule:
    """The learning rate of a head at each step, from 0, of E epochs of S steps; the first W of all warm up.

    Then ``linear``: lr (1 - p), ``cosine``: lr (1 + cos(pi p)) / 2, where p goes from 0 at step W to 1 at step E S,
    ``constant``, or ``plateau``: halved when the loss on val was not better by a ten-thousandth for more than 3 epochs.
    A step t < W has lr (t + 1) / (W + 1). A function of t (but for plateau), so nothing of it is kept to go on from."""

    def __init__(self, settings: Settings) -> None:
        self.kind, self.lr, self.epochs, self.warmup = settings.schedule, settings.lr, settings.epochs, settings.warmup
        self.best, self.bad = math.inf, 0

    @property
    def by_step(self) -> bool:
        """Whether the rate is another one within an epoch."""
        return self.kind in ("linear", "cosine") or self.warmup > 0

    def rates(self, epoch: int, steps: int) -> np.ndarray:
        """float64 [S] of an epoch, from 1; ``steps``: S."""
        step, whole = np.arange((epoch - 1) * steps, epoch * steps), self.epochs * steps
        warm = round(self.warmup * whole)
        part = (step - warm) / max(whole - warm, 1)
        falling = {"linear": 1 - part, "cosine": (1 + np.cos(np.pi * part)) / 2}.get(self.kind, 1.0)
        return self.lr * np.where(step < warm, (step + 1) / (warm + 1), falling)

    def after(self, val_loss: float) -> None:
        if self.kind != "plateau":
            return
        if val_loss < self.best * (1 - PLATEAU_LEAST):
            self.best, self.bad = val_loss, 0
        else:
            self.bad += 1
        if self.bad > PLATEAU_PATIENCE:
            self.lr, self.bad = self.lr * PLATEAU_FACTOR, 0


def first_eligible_epoch(settings: Settings) -> int:
    """The first epoch, from 1, that val may choose: of a convex head whose rate falls to 0 and which nothing ends
    early, of the last tenth. There its weights have settled; before, 800 images of val take an epoch by chance."""
    settles = settings.schedule in ("linear", "cosine") and not settings.patience and head_info(settings.head).convex
    return settings.epochs - max(settings.epochs // 10, 1) + 1 if settles else 1


@dataclass
class TrainedState:
    """One head's way: the state of its best epoch on val, a line per epoch, seconds of its share of the work."""

    settings: Settings
    schedule: Schedule
    correction: np.ndarray  # [C], which is added to its logits
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    failed: ProtocolError | None = None
    best: tuple[float, float] = (-math.inf, -math.inf)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """What a training of one network goes on from, written after every epoch and gone when the run is there: one hidden
    file beside the run to be or in the folder of a sweep. It holds the network now and at its best, the optimiser, the
    generator; as JSON the epoch, the history and the schedule. The order of batches follows from the split seed. A
    training that goes on gives what it would have given without the stop."""

    path: Path

    @property
    def epoch(self) -> int:
        """The epochs that are done; 0 where there is none. One that is damaged is thrown away: the training begins
        anew."""
        whole = read_whole_tensors(self.path)
        if whole is None:
            self.remove()
        return whole[1]["epoch"] if whole else 0

    def save(self, heads: Trainer, trained: TrainedState, epoch: int) -> None:
        learner = _learner_of(heads)
        state = learner.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": value for name, value in heads.state(0).items()}
        tensors |= {f"best.{name}": value for name, value in trained.state.items()}
        tensors |= {f"optimizer.{k}.{name}": v.cpu() for k, each in state.items() for name, v in each.items()
                    if isinstance(v, torch.Tensor)}  # fmt: skip
        tensors["generator"] = learner.generator.get_state()
        record = {
            "epoch": epoch, "history": trained.history, "best_epoch": trained.epoch, "best": trained.best,
            "seconds": trained.seconds, "schedule": [trained.schedule.lr, trained.schedule.best, trained.schedule.bad],
        }  # fmt: skip
        write_tensors(self.path, tensors, record, sync=True)

    def restore(self, heads: Trainer, trained: TrainedState) -> int:
        """Put everything back as it was; the epochs that are done."""
        whole = read_whole_tensors(self.path)
        if whole is None:
            return 0
        tensors, record = whole
        learner = _learner_of(heads)
        learner.model.load_state_dict(_below("model", tensors))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _below("optimizer", tensors).items():
            number, _, what = name.partition(".")
            state.setdefault(int(number), {})[what] = value
        own = learner.optimizer.state_dict()
        learner.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
        learner.generator.set_state(tensors["generator"])
        trained.state, trained.history = _below("best", tensors), record["history"]
        trained.epoch, trained.seconds = record["best_epoch"], record["seconds"]
        trained.best = (record["best"][0], record["best"][1])
        trained.schedule.lr, trained.schedule.best, trained.schedule.bad = record["schedule"]
        return int(record["epoch"])

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _learner_of(heads: Trainer) -> Learner:
    assert isinstance(heads, SequentialTrainer) and len(heads) == 1, "a checkpoint is of one network"
    return heads.learners[0]


def _below(word: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{word}."): value for name, value in tensors.items() if name.startswith(f"{word}.")}


def train_heads(
    heads: Trainer, settings: Sequence[Settings], data: SplitData, val: SplitData,
    corrections: Sequence[np.ndarray], task: Task, *, window: int | None = None, on_epoch: EpochCallback | None = None,
    checkpoint: Checkpoint | None = None, progress: bool = False, advance: Callable[[float], object] | None = None,
) -> list[TrainedState]:  # fmt: skip
    """``corrections``: what is added to each head's logits [C] before val is judged. A head whose outputs are not
    finite any more ends with ``failed``; the others go on. ``checkpoint``: where one network is kept after every
    epoch, and what it goes on from. ``progress``: a bar within an epoch that takes long, at a terminal.
    ``advance``: called at every step with its share of all steps that there are if no head stops early."""
    first = settings[0]
    batches: BalancedBatches | PlainBatches = PlainBatches(len(data), first.batch_size, first.split_seed, window)
    if first.balanced(task.multilabel):
        batches = BalancedBatches(data.y.numpy(), first.batch_size, first.split_seed, window)
    versions = np.random.default_rng([first.split_seed, 3])
    trained = [TrainedState(each, Schedule(each), c) for each, c in zip(settings, corrections, strict=True)]
    active = list(range(len(settings)))
    done = checkpoint.restore(heads, trained[0]) if checkpoint else 0
    for _ in range(done):
        batches.epoch()
    last = max(each.epochs for each in settings)
    for epoch in range(done + 1, last + 1):
        begin = time.perf_counter()
        order = batches.epoch()
        if data.versions > 1:
            order = sample_versions(order, len(data), data.versions, versions)
        schedules = [trained[k].schedule for k in active]
        with batch_bar(len(order), f"epoch {epoch} of {last}", progress) as bar:
            rates = np.stack([each.rates(epoch, len(order)) for each in schedules], 1)  # [S, K]
            by_step = any(each.by_step for each in schedules)
            on_step = partial(_before_step, heads, rates, by_step, bar, advance, 1 / (last * len(order)))
            losses, right = run_epoch(heads, data, order, on_step)
        logits = heads.logits(val)
        seconds = (time.perf_counter() - begin) / len(active)
        staying = []
        for place, k in enumerate(active):
            lines = {
                "epoch": epoch, "lr": float(rates[-1, place]), "train_loss": float(losses[place]),
                f"train_{ACCURACY[task.multilabel]}": float(right[place]), "seconds": seconds,
            }  # fmt: skip
            row, better = score_epoch(trained[k], lines, logits[place], val.y.numpy(), task)
            if better:
                trained[k].epoch, trained[k].state = epoch, heads.state(place)
            wait = row["wait"] = epoch - trained[k].epoch
            stop = trained[k].failed is not None or 0 < first.patience <= wait
            if on_epoch and trained[k].failed is None:
                on_epoch(row, stop)
            if checkpoint and not stop:
                checkpoint.save(heads, trained[k], epoch)
            if not stop and epoch < settings[k].epochs:
                staying.append(place)
        if not staying:
            break
        if len(staying) < len(active):
            heads.retain(staying)
            active = [active[place] for place in staying]
    return trained


def _before_step(
    heads: Trainer, rates: np.ndarray, by_step: bool, bar: Any, advance: Callable[[float], object] | None,
    share: float, step: int,
) -> None:  # fmt: skip
    """Learning rates, where they are other ones now, and the bars; ``share`` of a step in all; ``step``: from 0."""
    if by_step or step == 0:
        heads.set_rates(rates[step])
    bar.update(1)
    if advance is not None:
        advance(share)


def score_epoch(
    head: TrainedState, line: dict[str, float], logits: np.ndarray, y: np.ndarray, task: Task
) -> tuple[dict[str, float], bool]:
    """Enter a line of the history with what val says of logits [n, C]: the line, and whether it is the best so far.
    Outputs that are not finite end the head: an empty line."""
    settings, select, logits = head.settings, head.settings.select, logits + head.correction
    seconds = line.pop("seconds", 0.0)
    head.seconds += seconds
    if not (np.isfinite(logits).all() and np.isfinite(line.get("train_loss", 0.0))):
        head.failed = ProtocolError(
            f"the head's outputs are not finite any more in epoch {line['epoch']}. A smaller --lr than "
            f"{settings.lr:g}{'' if standardization(settings) == 'zscore' else ' or --standardize zscore'} helps."
        )
        return {}, False
    predictions = CalibratedPredictions(task.kind, logits, y, task.positive)
    val_loss, value = predictions.nll, selection_score(settings, task, predictions)
    head.schedule.after(val_loss)
    goodness = (value if METRICS[measure_name(select)].higher else -value, -val_loss)
    if better := line["epoch"] >= first_eligible_epoch(settings) and goodness > head.best:
        head.best = goodness
    row = line | {"val_loss": val_loss, f"val_{select}": value}
    right, known = count_right(torch.from_numpy(logits[None]), torch.from_numpy(y))
    row[f"val_{ACCURACY[task.multilabel]}"] = float(right[0]) / max(known, 1)
    row |= {"best": int(better), "seconds": seconds}
    head.history.append(row)
    return row, better


def selection_score(settings: Settings, task: Task, predictions: CalibratedPredictions) -> float:
    """The measure that chooses, on val, of the probabilities and thresholds that the head would have if this were its
    last epoch: of the chosen one it is the number in the tables. ``predictions``: after prior correction alone."""
    select = settings.select
    if select == "loss":
        return predictions.nll
    if select != "auroc" or task.kind not in ("binary", "multilabel"):  # whose AUROC no temperature changes
        z, none = predictions.z, np.zeros(predictions.z.shape[1])
        calibration, _ = calibrate(task.kind, z, predictions.y, none, task.positive, settings.sensitivity)
        predictions = calibration.predictions(task.kind, z, predictions.y, task.positive)
    if select == "auroc":
        value = mean_auroc(predictions)
    else:
        measured = evaluate(predictions, task.classes)
        if select not in measured:
            fitting = ", ".join(name for name in METRICS if name in measured)
            raise BadOption(f"--select {select} is not measured for a {task.kind} task. Measures: loss, {fitting}.")
        value = measured[select]
    if np.isnan(value):
        raise ProtocolError(
            f"val {METRICS[select].title} is undefined: val lacks a class. --resplit-val draws a new val; "
            "--select loss needs none."
        )
    return value
