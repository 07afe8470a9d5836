"""What training minimises, with its gradient written out for heads that are stacked.

Notation: B batch, C classes or labels, K heads, z logits, w class weights, e label smoothing.

Cross-entropy as torch has it: with Q[b, c] = w_y ((1 - e) [c = y]) + e w_c / C and S = sum_b w_y, the loss is
-sum Q log p / S, so dz = (p sum_c Q - Q) / S. Binary cross-entropy over the known entries, w the weight of positives,
t = y (1 - e) + e / 2: loss = mean of -(w t log s(z) + (1 - t) log s(-z)), so dz = ((w t + 1 - t) s(z) - w t) / known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from heads.metrics.calibration import prior_correction
from heads.settings import Settings
from heads.task import Task


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over the batch; logits [B, C], y int64 [B]."""

    classes: int
    weight: torch.Tensor | None = None  # float32 [C]
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(logits.device)
        return nn.functional.cross_entropy(logits, y, weight=weight, label_smoothing=self.smoothing)

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Q by class of the image [C, C], and w [C]; float64."""
        w = torch.ones(self.classes, dtype=torch.float64) if self.weight is None else self.weight.double()
        return torch.diag(w) * (1 - self.smoothing) + self.smoothing * w / self.classes, w


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean over the known entries of y [B, L] (NaN = unknown); ``weight`` [L] of the positives."""

    classes: int
    weight: torch.Tensor | None = None  # float32 [L]
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        known = ~y.isnan()
        target = y.nan_to_num() * (1 - self.smoothing) + self.smoothing / 2
        weight = None if self.weight is None else self.weight.to(logits.device)
        each = nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        return (each * known).sum() / known.sum().clamp_min(1)


Loss = CrossEntropy | BinaryCrossEntropy


class StackedLoss:
    """The losses of K heads and the gradients of their logits at once."""

    def __init__(self, losses: list[Loss], dtype: torch.dtype) -> None:
        self.binary = isinstance(losses[0], BinaryCrossEntropy)
        assert all(isinstance(loss, BinaryCrossEntropy) == self.binary for loss in losses)
        if self.binary:
            one = torch.ones(losses[0].classes)
            self.w = torch.stack([one if loss.weight is None else loss.weight for loss in losses]).to(dtype)
            self.e = torch.tensor([loss.smoothing for loss in losses], dtype=dtype)
        else:
            tables = [loss.table() for loss in losses if isinstance(loss, CrossEntropy)]
            self.q = torch.stack([q for q, _ in tables]).to(dtype)  # [K, C, C]
            self.w = torch.stack([w for _, w in tables]).to(dtype)  # [K, C]

    def retain(self, staying: list[int]) -> None:
        self.w = self.w[staying]
        if self.binary:
            self.e = self.e[staying]
        else:
            self.q = self.q[staying]

    def __call__(self, z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [K, B, C], y [B] or [B, L] -> losses [K], dz [K, B, C]."""
        return self._labels(z, y) if self.binary else self._classes(z, y)

    def _classes(self, z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = z.log_softmax(-1)
        q, s = self.q[:, y], self.w[:, y].sum(1)  # [K, B, C], [K]
        losses = -(q * logp).sum((1, 2)) / s
        return losses, logp.exp_().mul_(q.sum(-1, keepdim=True)).sub_(q).div_(s[:, None, None])

    def _labels(self, z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = ~y.isnan()
        e = self.e[:, None, None]
        target = y.nan_to_num().to(z.dtype) * (1 - e) + e / 2  # [K, B, L]
        positive = self.w[:, None] * target
        count = known.sum().clamp_min(1)
        losses = (positive * nn.functional.softplus(-z) + (1 - target) * nn.functional.softplus(z)) * known
        return losses.sum((1, 2)) / count, ((positive + 1 - target) * z.sigmoid() - positive) * known / count


def loss_and_prior(task: Task, y: torch.Tensor, settings: Settings) -> tuple[Loss, np.ndarray]:
    """The training loss, and what is added to logits so that they speak of train's prevalence [C]."""
    count = len(task.classes)
    if task.multilabel:
        if not settings.pos_weight:
            return BinaryCrossEntropy(count, None, settings.label_smoothing), np.zeros(count)
        positives, negatives = (y == 1).sum(0).double(), (y == 0).sum(0).double()
        weight = torch.where((positives > 0) & (negatives > 0), negatives / positives.clamp_min(1), 1.0)
        return BinaryCrossEntropy(count, weight.float(), settings.label_smoothing), -np.log(weight.numpy())
    prevalence = np.bincount(y.numpy(), minlength=count) / len(y)
    uniform = (prevalence > 0) / (prevalence > 0).sum()
    if settings.class_weights:
        weight = np.divide(uniform, prevalence, out=np.zeros(count), where=prevalence > 0)
        loss = CrossEntropy(count, torch.from_numpy(weight).float(), settings.label_smoothing)
        return loss, prior_correction(prevalence, uniform)
    seen = uniform if settings.balanced(False) else prevalence
    return CrossEntropy(count, None, settings.label_smoothing), prior_correction(prevalence, seen)
