"""Plain and balanced batches of training rows, and the augmentation of batches of images.

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

N training rows, B rows a batch, C classes that train has; images x float32 [B,3,h,w] with values 0 … 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from featurecache.images.augmentation import parse_augmentation

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
        which = np.concatenate([part for size in sizes for part in self._classes_of_batch(size)])
        rows = np.empty(self.n, dtype=np.int64)
        for c, cycle in enumerate(self.cycles):
            drawn = np.flatnonzero(which == c)
            rows[drawn] = cycle.take(len(drawn))
        return list(torch.from_numpy(rows).split(sizes))

    def _classes_of_batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        each, more = divmod(size, len(self.classes))
        return np.repeat(np.arange(len(self.classes)), each), self._extra(more)

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
Drawn = Callable[[], torch.Tensor]  # [B] even in [0, 1)


class Augmenter:
    """x -> x of the same shape. Draws from torch's generator of the CPU."""

    def __init__(self, words: str) -> None:
        self.steps = {step.word: step.amount for step in parse_augmentation(words).steps}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = len(x)
        maps = torch.eye(3).repeat(count, 1, 1)
        for word, amount in self.steps.items():
            if word in MAPS:
                maps = maps @ MAPS[word](amount, x.shape[-2] / x.shape[-1], lambda: torch.rand(count))
        if any(word in MAPS for word in self.steps):
            grid = nn.functional.affine_grid(maps[:, :2].to(x.device), list(x.shape), align_corners=False)
            x = nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for word, amount in self.steps.items():
            if word in SHADES:
                factor = 1 + amount * (2 * torch.rand(count, 1, 1, 1) - 1)
                x = SHADES[word](x, factor.to(x.device)).clamp(0, 255)
        return x


def _map(*entries: torch.Tensor) -> torch.Tensor:
    """[B,3,3] from the six entries [B] of its first two rows, in parts of half the height or width."""
    a, b, c, d, e, f = entries
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([torch.stack([a, b, c], 1), torch.stack([d, e, f], 1), torch.stack([zero, zero, one], 1)], 1)


def _turned(degrees: float, ratio: float, drawn: Drawn) -> torch.Tensor:
    """``ratio``: height by width; a turn is one of pixels, not of parts of the sides."""
    angle = math.radians(degrees) * (2 * drawn() - 1)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _map(cos, sin * ratio, zero, -sin / ratio, cos, zero)


def _moved(share: float, ratio: float, drawn: Drawn) -> torch.Tensor:
    right, down = (2 * share * (2 * drawn() - 1) for _ in range(2))
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    return _map(one, zero, -right, zero, one, -down)


def _scaled(share: float, ratio: float, drawn: Drawn) -> torch.Tensor:
    factor = 1 / (1 + share * (2 * drawn() - 1))
    zero = torch.zeros_like(factor)
    return _map(factor, zero, zero, zero, factor, zero)


def _flipped(across: bool) -> Callable[[float, float, Drawn], torch.Tensor]:
    def made(amount: float, ratio: float, drawn: Drawn) -> torch.Tensor:
        sign = torch.where(drawn() < 0.5, -1.0, 1.0)
        one, zero = torch.ones_like(sign), torch.zeros_like(sign)
        return _map(sign, zero, zero, zero, one, zero) if across else _map(one, zero, zero, zero, sign, zero)

    return made


def _contrasted(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(GREY, device=x.device).view(3, 1, 1)
    middle = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return middle + factor * (x - middle)


# Where a pixel of the new image is looked up in the old one.
MAPS: dict[str, Callable[[float, float, Drawn], torch.Tensor]] = {
    "flip": _flipped(across=True), "vflip": _flipped(across=False), "rotate": _turned, "shift": _moved,
    "scale": _scaled,
}  # fmt: skip
SHADES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda x, factor: x * factor, "contrast": _contrasted,
}  # fmt: skip
