"""What a map over an image is: its kind, how it was made, its values and the numbers that stand beside it.

There are three kinds, and they answer different questions:

    contribution   what a head makes of every place: how far the margin of a class changes when the place is replaced by
                   the mean of training. From tokens and head alone; of a network on pixels by squares of pixels.
    attention      where the backbone looks; the same for every head and class. Of a network on pixels: where it looks.
    grad-cam       which places of a late layer raise the margin, through backbone and head, by their gradients
                   (Selvaraju et al. 2017, arXiv:1610.02391).

The margin of class c is (z_c − mean of the other z) / temperature, of the calibrated logits z: with two classes the
log-odds; of multi-label z_c / temperature. The control of a map is the same map of the same head with the numbers of
every weight tensor shuffled: a map that looks like its control says nothing about what was learned (Adebayo et al.
2018, arXiv:1810.03292).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from heads.vector_heads import Neighbours

KINDS: dict[str, tuple[str, str]] = {  # kind -> what it shows of a head on a backbone, of a network from pixels
    "contribution": ("what the head makes of every place", "what the network makes of every place"),
    "attention": (
        "where the backbone looks; the same for every head and class",
        "where the trained network looks; the same for every class",
    ),
    "grad-cam": (
        "places of a late layer that raise the margin, through backbone and head",
        "places of a late layer that raise the margin, through the network",
    ),
}


def words_of(kind: str, from_pixels: bool) -> str:
    return KINDS[kind][from_pixels]


@dataclass(frozen=True)
class Map:
    """Of one image. ``values``: float64 [h, w] over what the network saw. ``beside``: numbers that have no place."""

    kind: str
    how: str
    values: np.ndarray
    unit: str
    signed: bool = True
    beside: dict[str, float] = field(default_factory=dict)
    margin: float | None = None
    adds_up: bool = False  # values and ``beside`` together are the margin
    control: np.ndarray | None = None  # float64 [h, w]
    small: str = ""  # ``how`` in a few words

    @property
    def peak(self) -> tuple[int, int] | None:
        """(row, column), from 0, of the largest value; None where no value is above 0."""
        if self.values.max() <= 0:
            return None
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(row), int(column)

    @property
    def likeness(self) -> float | None:
        """Spearman's rank correlation of the map and its control; None where one of them is the same everywhere."""
        if self.control is None or min(np.ptp(self.values), np.ptp(self.control)) == 0:
            return None
        from scipy.stats import spearmanr

        return float(spearmanr(self.values.ravel(), self.control.ravel()).statistic)


def with_controls(maps: Sequence[Map], controls: Sequence[Map]) -> list[Map]:
    return [replace(one, control=other.values) for one, other in zip(maps, controls, strict=True)]


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a head in which the numbers of every parameter stand in another order; of k-NN the labels."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    tensors = [other.labels] if isinstance(other, Neighbours) else list(other.parameters())
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            order = torch.randperm(len(flat), generator=generator).to(flat.device)
            tensor.copy_(flat[order].view_as(tensor))
    return other


def direction(classes: np.ndarray, count: int, temperature: float, multilabel: bool) -> torch.Tensor:
    """float32 [n, C]: logits times it are the margins of ``classes`` [n]."""
    rows = torch.zeros(len(classes), count)
    if not multilabel:
        rows += -1 / (count - 1)
    rows[torch.arange(len(classes)), torch.from_numpy(classes)] = 1.0
    return rows / temperature
