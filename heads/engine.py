"""The engine: step a head on batches of features that lie in memory as they are stored.

A batch is one ``index_select`` and one conversion to float32; there is no loader and no gradient of the input. A
``Learner`` is one head with its optimiser and its own randomness, while the batch order belongs to the data
(``heads.batches``), so heads that differ in anything else can be stepped on the same batch.

Notation: B batch, C classes, L labels, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from heads import evaluate as ev
from heads.architectures import own_randomness
from heads.data import Features, Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Learner:
    """One head in training: module, optimiser, its own randomness, and the best state so far."""

    def __init__(
        self, model: nn.Module, loss: Loss, generator: torch.Generator, *, lr: float, weight_decay: float
    ) -> None:
        self.model, self.loss, self.generator = model, loss, generator
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=lr, fused=True)
        self.best: dict[str, torch.Tensor] = {}

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step on a batch x float32 [B, ...], y [B, ...]; the loss before it, a scalar tensor."""
        with own_randomness(self.generator):
            loss = self.loss(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def keep(self) -> None:
        self.best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def restore(self) -> None:
        self.model.load_state_dict(self.best)


@contextmanager
def threads_for(batch_elements: int) -> Iterator[None]:
    """One thread inside, where a batch has too few numbers to be worth dividing: two threads wait for each other
    longer than a linear head's step takes, and on a machine that is busy a hundred times as long (tried: 2 ms a step
    became 70 ms)."""
    before = torch.get_num_threads()
    if batch_elements < 100_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over the batch; logits [B, C], y int64 [B]."""
    return nn.functional.cross_entropy(logits, y)


def masked_bce(pos_weight: torch.Tensor | None) -> Loss:
    """Binary cross-entropy, mean over the known entries of y [B, L] (NaN = unknown)."""

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        known = ~y.isnan()
        each = nn.functional.binary_cross_entropy_with_logits(
            logits, y.nan_to_num(), pos_weight=pos_weight, reduction="none"
        )
        return (each * known).sum() / known.sum().clamp_min(1)

    return loss


@torch.inference_mode()
def logits_of(model: nn.Module, data: Features) -> np.ndarray:
    """float64 [n, C], without dropout."""
    training = model.training
    model.eval()
    result = torch.cat([model(x) for x in data.chunks()]).double().numpy()
    model.train(training)
    return result


def run_epoch(learner: Learner, data: Features, order: list[torch.Tensor]) -> float:
    """One pass over the batches; the mean training loss per row."""
    learner.model.train()
    total = torch.zeros((), dtype=torch.float64)
    for rows in order:
        x, y = data.batch(rows)
        total += learner.step(x, y).double() * len(rows)
    return float(total) / sum(len(rows) for rows in order)


def loss_and_prior(task: Task, y: torch.Tensor, balanced: bool, pos_weight: bool) -> tuple[Loss, np.ndarray]:
    """The training loss, and what is added to logits so that they speak of train's prevalence [C]."""
    count = len(task.classes)
    if task.multilabel:
        if not pos_weight:
            return masked_bce(None), np.zeros(count)
        positives, negatives = (y == 1).sum(0).double(), (y == 0).sum(0).double()
        weight = torch.where((positives > 0) & (negatives > 0), negatives / positives.clamp_min(1), 1.0)
        return masked_bce(weight.float()), -np.log(weight.numpy())
    prevalence = np.bincount(y.numpy(), minlength=count) / len(y)
    seen = (prevalence > 0) / (prevalence > 0).sum() if balanced else prevalence
    return cross_entropy, ev.prior_correction(prevalence, seen)
