"""Batches of training: plain and balanced draws of rows, the augmentation of images, and the losses.

The order of rows is a function of ``split_seed`` alone, so that heads can share batches. An epoch is N draws, so
ceil(N / B) batches, the last one short. Balanced batches (the article's): B = qC + r gives every class q rows and r
classes one more; who gets one more goes round, so that over the batches all classes are drawn equally. Every class is
cycled through its own shuffle: no image of it comes again before all of them have come, across epochs too.

Features that do not fit in memory are read from the mapped shards, where rows far apart are slow: ``window`` then says
how many rows may be in use at once, and a shuffle is one of blocks of ``BLOCK`` neighbouring rows first, and of the
rows inside windows of that size after.

Augmentation has the words of `featurecache.images.augmentation`, drawn anew for every image. What moves pixels (flip,
vflip, rotate, shift, scale) is one affine map an image and one interpolation for all of them, so a batch costs about as
much as one image does by the operations that stored copies are made with; those move by whole pixels where these
interpolate. Outside is black. Brightness and contrast are as torchvision's.

Losses have their gradient written out, for heads that are stacked; w class weights, e label smoothing. Cross-entropy as
torch has it: with Q[b, c] = w_y ((1 - e) [c = y]) + e w_c / C and S = sum_b w_y, the loss is -sum Q log p / S, so
dz = (p sum_c Q - Q) / S. Binary cross-entropy over the known entries, w the weight of positives, t = y (1 - e) + e / 2:
loss = mean of -(w t log s(z) + (1 - t) log s(-z)), so dz = ((w t + 1 - t) s(z) - w t) / known.

N training rows, B rows a batch, C classes that train has or labels, K heads, z logits; images x float32 [B,3,h,w] with
values 0 … 255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from featurecache.images.augmentation import parse_augmentation
from heads.metrics.calibration import prior_correction
from heads.settings import Settings
from heads.task import Task

BLOCK = 64  # neighbouring rows


def shuffle_rows(rows: np.ndarray, rng: np.random.Generator, window: int | None) -> np.ndarray:
    """A permutation of ``rows`` [n], which are in the order they are stored in."""
    if window is None or window >= len(rows):
        return rng.permutation(rows)
    blocks = np.split(rows, np.arange(BLOCK, len(rows), BLOCK))
    mixed = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return np.concatenate([rng.permutation(part) for part in np.split(mixed, np.arange(window, len(rows), window))])


class _Cycle:
    """Endless draws from ``rows``, each pass in a new order."""

    def __init__(self, rows: np.ndarray, rng: np.random.Generator, window: int | None) -> None:
        self.rows, self.rng, self.window = rows, rng, window
        self.queue = shuffle_rows(rows, rng, window)

    def take(self, n: int) -> np.ndarray:
        while len(self.queue) < n:
            self.queue = np.concatenate([self.queue, shuffle_rows(self.rows, self.rng, self.window)])
        taken, self.queue = self.queue[:n], self.queue[n:]
        return taken


class PlainBatches:
    """A new permutation of all N rows in every epoch."""

    def __init__(self, n: int, batch_size: int, split_seed: int, window: int | None = None) -> None:
        self.n, self.batch_size, self.window = n, batch_size, window
        self.rng = np.random.default_rng([split_seed, 1])

    def epoch(self) -> list[torch.Tensor]:
        """int64 [B] row numbers, batch by batch."""
        order = shuffle_rows(np.arange(self.n), self.rng, self.window)
        return list(torch.from_numpy(order).split(self.batch_size))


class BalancedBatches:
    """Every batch draws its classes equally. ``labels``: int64 [N]."""

    def __init__(self, labels: np.ndarray, batch_size: int, split_seed: int, window: int | None = None) -> None:
        self.n, self.batch_size = len(labels), batch_size
        self.rng = np.random.default_rng([split_seed, 1])
        self.classes = np.unique(labels)
        each = None if window is None else max(BLOCK, window // len(self.classes))
        self.cycles = [_Cycle(np.flatnonzero(labels == c), self.rng, each) for c in self.classes]
        self.turn = self.rng.permutation(len(self.classes))  # whose turn it is to give one more

    def epoch(self) -> list[torch.Tensor]:
        """int64 [B] row numbers, batch by batch."""
        sizes = [min(self.batch_size, self.n - start) for start in range(0, self.n, self.batch_size)]
        classes, which = len(self.classes), list[np.ndarray]()
        for size in sizes:
            which += [np.repeat(np.arange(classes), size // classes), self._extra(size % classes)]
        rows = np.empty(self.n, dtype=np.int64)
        class_of = np.concatenate(which)
        for c, cycle in enumerate(self.cycles):
            drawn = np.flatnonzero(class_of == c)
            rows[drawn] = cycle.take(len(drawn))
        return list(torch.from_numpy(rows).split(sizes))

    def _extra(self, n: int) -> np.ndarray:
        """n different classes, in turn; a new round begins with those that this batch has not had."""
        if len(self.turn) < n:
            order = self.rng.permutation(len(self.classes))
            had = np.isin(order, self.turn)
            self.turn = np.concatenate([self.turn, order[~had], order[had]])
        taken, self.turn = self.turn[:n], self.turn[n:]
        return taken


def sample_versions(order: list[torch.Tensor], n: int, versions: int, rng: np.random.Generator) -> list[torch.Tensor]:
    """Every image's version for this epoch, drawn anew: rows in 0 … n - 1 become rows in 0 … n·V - 1."""
    drawn = torch.from_numpy(rng.integers(versions, size=n)) * n
    return [rows + drawn[rows] for rows in order]


GREY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
SHADES = ("brightness", "contrast")  # all other steps move pixels


class Augmenter:
    """x -> x of the same shape. Draws from torch's generator of the CPU."""

    def __init__(self, words: str) -> None:
        self.steps = {step.word: step.amount for step in parse_augmentation(words).steps}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if moves := [step for step in self.steps.items() if step[0] not in SHADES]:
            maps = torch.eye(3).repeat(len(x), 1, 1)
            for word, amount in moves:
                maps = maps @ _draw_map(word, amount, x.shape[-2] / x.shape[-1], len(x))
            grid = nn.functional.affine_grid(maps[:, :2].to(x.device), list(x.shape), align_corners=False)
            x = nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for word in (word for word in self.steps if word in SHADES):
            factor = (1 + self.steps[word] * (2 * torch.rand(len(x), 1, 1, 1) - 1)).to(x.device)
            grey = (x * torch.tensor(GREY, device=x.device).view(3, 1, 1)).sum(1, keepdim=True)
            middle = grey.mean((2, 3), keepdim=True) if word == "contrast" else 0.0
            x = (middle + factor * (x - middle)).clamp(0, 255)
        return x


def _draw_map(word: str, amount: float, ratio: float, count: int) -> torch.Tensor:
    """Where the pixels of new images are looked up in the old ones, in parts of half the height or width: float32
    [B,3,3]. ``ratio``: height by width; a turn is one of pixels, not of parts of the sides."""
    drawn, maps = torch.rand(count), torch.eye(3).repeat(count, 1, 1)
    even = 2 * drawn - 1  # in [-1, 1)
    if word in ("flip", "vflip"):
        side = int(word == "vflip")
        maps[:, side, side] = torch.where(drawn < 0.5, -1.0, 1.0)
    elif word == "rotate":
        angle = math.radians(amount) * even
        maps[:, 0, 0] = maps[:, 1, 1] = angle.cos()
        maps[:, 0, 1], maps[:, 1, 0] = angle.sin() * ratio, -angle.sin() / ratio
    elif word == "shift":
        maps[:, 0, 2], maps[:, 1, 2] = -2 * amount * even, -2 * amount * (2 * torch.rand(count) - 1)
    else:
        assert word == "scale", "all words of `featurecache.images.augmentation` are here"
        maps[:, 0, 0] = maps[:, 1, 1] = 1 / (1 + amount * even)
    return maps


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

    def __init__(self, losses: Sequence[Loss]) -> None:
        (kind,) = {type(loss) for loss in losses}
        self.binary = kind is BinaryCrossEntropy
        self.tables = [torch.stack(parts).float() for parts in zip(*(loss.table() for loss in losses), strict=True)]
        if not self.binary:  # by the class of the image, the last axis: Q, its sum over c, and w: [K, C + 2, C]
            w, q = self.tables
            self.tables = [torch.cat([q.transpose(1, 2), q.sum(2)[:, None], w[:, None]], 1)]
        if all(torch.equal(table, table[:1].expand_as(table)) for table in self.tables):
            self.tables = [table[:1] for table in self.tables]  # one lookup for all heads

    def retain(self, staying: list[int]) -> None:
        self.tables = [table[staying] if len(table) > 1 else table for table in self.tables]

    def __call__(self, z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [K, C, B], y [B] or [B, L] -> losses [K], dz [K, C, B]."""
        if not self.binary:
            table = self.tables[0].index_select(2, y)  # [K, C + 2, B]
            q, sums, s = table[:, :-2], table[:, -2:-1], table[:, -1].sum(1)
            logp = z.log_softmax(1)
            losses = (q * logp).sum((1, 2)).div_(-s)
            return losses, logp.exp_().mul_(sums).sub_(q).div_(s.view(-1, 1, 1))
        w, e = self.tables[0][:, :, None], self.tables[1][:, None, None]
        y = y.T
        label_mask = ~y.isnan()
        target = y.nan_to_num().to(z.dtype) * (1 - e) + e / 2  # [K, L, B]
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
