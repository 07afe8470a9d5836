"""What is kept of a network of the user's own: which submodule's output, and what its shape makes of it.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from featurecache.backbones.imported import first_line
from featurecache.errors import BadOption, OutputRefused, nearest

KEPT = ("tokens", "pooler", "gap")
_SAME = 1e-3  # relative L2 that another place in the batch may cost in float32; dropout costs 0.1 and more


class Kept(nn.Module):
    """The network's own forward, read where ``keep`` says: {output: submodule}, or one submodule for what it gives."""

    def __init__(self, title: str, network: nn.Module, keep: Any) -> None:
        super().__init__()
        self.title, self.network = title, network
        one = "" if keep is None else keep
        self.keep: dict[str, str] = dict(keep) if isinstance(keep, dict) else dict.fromkeys(KEPT, one)
        if (
            not self.keep
            or not set(self.keep) <= set(KEPT)
            or not all(isinstance(at, str) for at in self.keep.values())
        ):
            raise OutputRefused(
                f"{title}: network.keep is {keep!r}; expected the name of a submodule, or a dict with some of "
                f"{', '.join(KEPT)} and a submodule for each"
            )
        known = dict(network.named_modules())
        for at in self.keep.values():
            if at not in known:
                raise OutputRefused(f'{title} has no submodule "{at}".{nearest(at, known)} See named_modules().')
        self.shapes: dict[str, tuple[int, ...]] = {}  # output -> shape of one image's, before it is made into rows
        self.chosen = isinstance(keep, dict)

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,3,h,w] -> of tokens [B,T,D], pooler and gap [B,D] the wanted ones."""
        seen = self.look(pixels)
        return {name: _as_rows(name, seen[self.keep[name]]) for name in want}

    def look(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Submodule -> its output in a forward pass, copied: a ReLU behind it may write into it."""
        seen: dict[str, list[torch.Tensor]] = {at: [] for at in self.keep.values()}
        hooks = [self.network.get_submodule(at).register_forward_hook(self._hook(kept)) for at, kept in seen.items()]
        try:
            self.network(pixels)
        except RuntimeError as error:
            if pixels.dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            kind = str(pixels.dtype).removeprefix("torch.")
            raise BadOption(
                f"{self.title} does not run in {kind} ({first_line(error)}); use --precision fp32"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for at, kept in seen.items():
            if len(kept) != 1:
                raise OutputRefused(
                    f'{self.title}: the submodule "{at}" is run {len(kept)} times in a forward pass, expected once; '
                    "name another in network.keep"
                )
        return {at: kept[0] for at, kept in seen.items()}

    def _hook(self, kept: list[torch.Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, _: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(output, torch.Tensor):
                raise OutputRefused(
                    f"{self.title}: {type(module).__name__} returns a {type(output).__name__}, expected a tensor; name "
                    "the submodule whose output is to be kept: network.keep = NAME"
                )
            kept.append(output.clone())

        return keep


def _as_rows(name: str, found: torch.Tensor) -> torch.Tensor:
    """A map [B,C,h,w]: tokens are its places [B,h·w,C], row by row; a vector is their average [B,C]."""
    if found.dim() != 4:
        return found
    return found.flatten(2).transpose(1, 2) if name == "tokens" else found.mean((2, 3))


def probe(model: Kept, size: tuple[int, int]) -> bool:
    """Run it, fix ``model.shapes`` and what of ``model.keep`` there is; whether it runs with channels last.

    Raises BadOption for a size that it does not take; OutputRefused for shapes that are no output, and where an image's
    numbers depend on what lies beside it.
    """
    pixels = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    cnn = sum(isinstance(module, nn.Conv2d) for module in model.network.modules()) > 1
    channels_last = cnn and _runs(model, pixels)
    pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    try:
        with torch.no_grad():
            seen, again = model.look(pixels[:2]), model.look(pixels[[2, 0]])
    except OutputRefused:
        raise
    except Exception as error:  # whatever the user's code raises
        why = first_line(error)
        raise BadOption(f"{model.title} does not take images of {size[0]}×{size[1]} pixels: {why}") from error
    shapes = {at: tuple(found.shape) for at, found in seen.items()}
    _choose(model, shapes)
    for at, found in seen.items():
        distance = (found[0].double() - again[at][1].double()).norm() / found[0].double().norm().clamp_min(1e-30)
        if not distance <= _SAME:
            raise OutputRefused(
                f"{model.title} gives an image other numbers beside another image (by {float(distance):.2g} of them): "
                "dropout or batch statistics that stay on in eval()"
            )
    return channels_last


def _runs(model: Kept, pixels: torch.Tensor) -> bool:
    """Whether it runs with channels last; a ``view`` of a map does not."""
    try:
        with torch.no_grad():
            model.look(pixels.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def _choose(model: Kept, shapes: dict[str, tuple[int, ...]]) -> None:
    """Which outputs there are: those that ``keep`` names, else by the number of dimensions."""
    allowed = {"tokens": (3, 4), "pooler": (2,), "gap": (4,)}
    if model.chosen:
        allowed = {"tokens": (3, 4), "pooler": (2, 4), "gap": (2, 4)}
    for name, at in list(model.keep.items()):
        shape = shapes[at]
        if shape[0] == 2 and len(shape) in allowed[name] and all(shape):
            model.shapes[name] = shape[1:]
        elif model.chosen:
            raise OutputRefused(f'{model.title}: of two images "{at}" gives {list(shape)}, which is no {name}')
        else:
            del model.keep[name]
    if not model.keep:
        (shape,) = shapes.values()
        raise OutputRefused(
            f"{model.title} gives {list(shape)} for two images; expected a vector [2,D], tokens [2,T,D] or a map "
            "[2,C,h,w]; network.keep names a submodule that gives one"
        )


def places(model: Kept, said: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, int]]:
    """(prefix, grid) of the tokens; (), (0, 0) where there are none."""
    shape = model.shapes.get("tokens", ())
    if len(shape) != 2:
        return (), (shape[1], shape[2]) if shape else (0, 0)
    prefix, count = said["prefix"], shape[0]
    if not isinstance(prefix, list | tuple) or not all(isinstance(name, str) for name in prefix):
        raise OutputRefused(
            f"{model.title} gives {count} tokens and does not say which are no patches. Write where it is made:\n"
            '       network.prefix = ["cls"]      the tokens before those of the patches; [] where there are none'
        )
    side = math.isqrt(max(count - len(prefix), 0))
    grid = tuple(said["grid"] or (side, side))
    if len(grid) != 2 or len(prefix) + grid[0] * grid[1] != count or 0 in grid:
        raise OutputRefused(
            f"{model.title} gives {count} tokens: {len(prefix)} of the prefix and a grid of {grid[0]}×{grid[-1]} are "
            "others. Write where it is made:\n       network.grid = (h, w)"
        )
    return tuple(prefix), (int(grid[0]), int(grid[1]))


def width(model: Kept) -> int:
    """D, one for all outputs: tokens [T,D], maps [C,h,w], vectors [D]."""
    widths = {name: shape[0] if len(shape) != 2 else shape[1] for name, shape in model.shapes.items()}
    if len(set(widths.values())) > 1:
        text = ", ".join(f"{name} {n}" for name, n in widths.items())
        raise OutputRefused(f"{model.title}: what network.keep names has several widths ({text}); expected one")
    return next(iter(widths.values()))


def refused(model: Kept, prefix: tuple[str, ...]) -> dict[str, str]:
    """Output -> why there is none."""
    kept = ", ".join(f"{name} from {at or 'what it returns'}" for name, at in model.keep.items())
    reasons = {name: f"it keeps {kept}; network.keep says what" for name in KEPT if name not in model.keep}
    if "tokens" not in model.keep:
        reasons["mean"] = "that is of its tokens, and it keeps none"
    if prefix[:1] != ("cls",):
        reasons["cls"] = "no class token stands first among its tokens"
    return reasons
