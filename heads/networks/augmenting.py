"""Augmentation of batches in training: the words of `featurecache.augment`, drawn anew for every image.

What moves pixels (flip, vflip, rotate, shift, scale) is one affine map an image and one interpolation for all of them,
so a batch costs about as much as one image does by the image operations that stored copies are made with; those move
by whole pixels where these interpolate. Outside is black. Brightness and contrast are as torchvision's.

Notation: B images, h and w their height and width; x float32 [B,3,h,w] with values 0 … 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from featurecache.augment import parse

GREY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
Drawn = Callable[[], torch.Tensor]  # [B] even in [0, 1)


class Augmenter:
    """x -> x of the same shape. Draws from torch's generator of the CPU."""

    def __init__(self, words: str) -> None:
        self.steps = {step.word: step.amount for step in parse(words).steps}

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
