"""What a head takes and says of itself; own randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption
from featurecache.images.preprocessing import Preprocess


@dataclass(frozen=True)
class Input:
    """What a head is given of one image: ``shape`` (D,) or (T, D), and of tokens which rows are what.

    ``prefix``: names of the P tokens before the patches; ``grid``: (h, w) with T = P + h·w, None where it is not known
    which rows are patches."""

    shape: tuple[int, ...]
    prefix: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and len(self.shape) == 2:
            (h, w), first = self.grid, len(self.prefix)
            if first + h * w != self.shape[0]:
                raise BadOption(
                    f"{self.shape[0]} tokens are not {first} before the patches and a grid of {h}×{w}: "
                    "the prefix and the grid of this output are wrong."
                )

    @classmethod
    def of(cls, given: Any) -> Input:
        """From a bare shape, a record with shape, prefix and grid, or what ``view.info(output)`` gives."""
        if isinstance(given, Input):
            return given
        if isinstance(given, Sequence):
            return cls(tuple(given))
        record = given if isinstance(given, dict) else vars(given)
        prefix, grid = record.get("prefix"), record.get("grid")
        return cls(tuple(record["shape"]), tuple(prefix or ()), None if grid is None else (grid[0], grid[1]))


VIT_B16 = Input((197, 768), ("cls",), (14, 14))  # tokens of a ViT-B/16 at 224 pixels


@dataclass(frozen=True)
class HeadInfo:
    """What a head is made for. ``takes``: "vector" ([D] an image), "tokens" ([T, D]), "any", or, of the network of a
    baseline, "pixels" ([3, h, w]). ``solved``: its weights come from ``solvers.SOLVERS``, not from steps. ``convex``:
    its loss has one minimum, to which a falling learning rate leads."""

    what: str
    takes: str
    make: Callable[..., nn.Module]
    standardize: str = "none"
    solved: bool = False
    reference: str = ""
    convex: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # its own, in the place of the table's defaults


@contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Inside, torch's CPU randomness is this generator's and nobody else's: plain torch layers initialise and drop
    out from a head's own generator, whatever is trained beside it."""
    outside = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers_of(model: nn.Module) -> list[tuple[str, str, str, int]]:
    """(name, layer, shape it gives for one image, parameters); a user's own head: its leaf modules."""
    own = getattr(model, "layers", None)
    if callable(own):
        return own()
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    return [(n, repr(m), "", sum(p.numel() for p in m.parameters())) for n, m in leaves]


FINETUNE = "finetune:"


@dataclass(frozen=True)
class Baseline:
    """``preprocess``: pixels of a side -> what the network sees of an image. ``make``: (pixels of a side, classes, and
    ``dropout`` where it has any) -> network of normalised images. ``settings``: as published; the defaults of training.
    """

    what: str
    image_size: int
    preprocess: Callable[[int], Preprocess]
    make: Callable[..., nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = ""


AT_ONCE = 2**23  # numbers in memory as float32 where images go through a network in rows_at_once


def rows_at_once(shape: Sequence[int]) -> int:
    """How many rows of ``shape`` go through a network at once when it is judged."""
    return max(8, min(256, AT_ONCE // int(np.prod(shape))))
