"""What training minimises, with its gradient written out for heads that are stacked.

Notation: B batch, C classes or labels, K heads, z logits, w class weights, e label smoothing.

Cross-entropy as torch has it: with Q[b, c] = w_y ((1 - e) [c = y]) + e w_c / C and S = sum_b w_y, the loss is
-sum Q log p / S, so dz = (p sum_c Q - Q) / S. Binary cross-entropy over the known entries, w the weight of positives,
t = y (1 - e) + e / 2: loss = mean of -(w t log s(z) + (1 - t) log s(-z)), so dz = ((w t + 1 - t) s(z) - w t) / known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from heads.metrics.calibration import prior_correction
from heads.settings import Settings
from heads.task import Task


@dataclass(frozen=True)
class _Weighted:
    classes: int
    weight: torch.Tensor | None = None  # float32 [C]
    smoothing: float = 0.0

    def weight_on(self, logits: torch.Tensor) -> torch.Tensor | None:
        return None if self.weight is None else self.weight.to(logits.device)


class CrossEntropy(_Weighted):
    """Mean over the batch; logits [B, C], y int64 [B]."""

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = self.weight_on(logits)
        return nn.functional.cross_entropy(logits, y, weight=weight, label_smoothing=self.smoothing)

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w [C], and Q by class of the image [C, C]; float64."""
        w = torch.ones(self.classes, dtype=torch.float64) if self.weight is None else self.weight.double()
        return w, torch.diag(w) * (1 - self.smoothing) + self.smoothing * w / self.classes


class BinaryCrossEntropy(_Weighted):
    """Mean over the known entries of y [B, L] (NaN = unknown); ``weight`` of the positives."""

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        label_mask, weight = ~y.isnan(), self.weight_on(logits)
        target = y.nan_to_num() * (1 - self.smoothing) + self.smoothing / 2
        each = nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        return (each * label_mask).sum() / label_mask.sum().clamp_min(1)

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w [L], and e []; float64."""
        w = torch.ones(self.classes) if self.weight is None else self.weight
        return w.double(), torch.tensor(self.smoothing, dtype=torch.float64)


Loss = CrossEntropy | BinaryCrossEntropy


class StackedLoss:
    """The losses of K heads of one kind and the gradients of their logits at once."""

    def __init__(self, losses: Sequence[Loss], dtype: torch.dtype) -> None:
        (kind,) = {type(loss) for loss in losses}
        self.binary = kind is BinaryCrossEntropy
        self.tables = [torch.stack(parts).to(dtype) for parts in zip(*(loss.table() for loss in losses), strict=True)]

    def retain(self, staying: list[int]) -> None:
        self.tables = [table[staying] for table in self.tables]

    def __call__(self, z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [K, B, C], y [B] or [B, L] -> losses [K], dz [K, B, C]."""
        if not self.binary:
            w, q = self.tables  # [K, C], [K, C, C]
            logp = z.log_softmax(-1)
            q, s = q[:, y], w[:, y].sum(1)  # [K, B, C], [K]
            losses = -(q * logp).sum((1, 2)) / s
            return losses, logp.exp_().mul_(q.sum(-1, keepdim=True)).sub_(q).div_(s[:, None, None])
        w, e = self.tables[0][:, None], self.tables[1][:, None, None]
        label_mask = ~y.isnan()
        target = y.nan_to_num().to(z.dtype) * (1 - e) + e / 2  # [K, B, L]
        positive, count = w * target, label_mask.sum().clamp_min(1)
        losses = (positive * nn.functional.softplus(-z) + (1 - target) * nn.functional.softplus(z)) * label_mask
        return losses.sum((1, 2)) / count, ((positive + 1 - target) * z.sigmoid() - positive) * label_mask / count


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
