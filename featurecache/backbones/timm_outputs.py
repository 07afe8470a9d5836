"""What a network of timm gives: which outputs, which of its rows are what, and how they are read in a forward pass.

A network runs timm's own ``forward_features``; what the library makes of that for its classifier
(``forward_head(…, pre_logits=True)``) is its vector. A map [B,C,h,w] is a CNN's: ``tokens`` row by row, and ``gap``.
[B,T,D] is a transformer's: ``tokens``, and ``pooler`` where the vector is neither the class token nor the mean of the
patches. Earlier blocks are those of ``forward_intermediates``, with the final norm.

All of this is inferred from the network's own attributes and shapes; a network that does not say which of its rows are
patches keeps its vector only. Nothing is looked up by name.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featurecache.backbones.wrappers import Tokens, earlier_blocks
from featurecache.errors import OutputRefused


class TimmTokens(Tokens):
    """A transformer of timm: ``tokens`` is what its ``forward_features`` gives, ``pooler`` what its classifier would
    receive, ``tokens@-k`` block -k's output after the final norm."""

    def __init__(self, network: nn.Module, prefix: int) -> None:
        super().__init__(network, "blocks", "norm", {})
        self.prefix = prefix

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        network: Any = self.network
        result: dict[str, torch.Tensor] = {}
        earlier = {name: len(network.blocks) + index for name, index in earlier_blocks(want).items()}
        if earlier:
            indices = sorted(set(earlier.values()))
            options = {"return_prefix_tokens": True} if self.prefix else {}
            last, outputs = network.forward_intermediates(
                pixels, indices=indices, norm=True, output_fmt="NLC", **options
            )
            outputs = [torch.cat([prefix, rows], 1) for rows, prefix in outputs] if self.prefix else outputs
            result = {name: outputs[indices.index(index)] for name, index in earlier.items()}
        else:
            last = network.forward_features(pixels)
        result["tokens"] = last
        if "pooler" in want:
            result["pooler"] = network.forward_head(last, pre_logits=True).flatten(1)
        return {name: result[name] for name in want}


class TimmMap(nn.Module):
    """A network of timm that gives a map: ``tokens`` [B,h·w,C] row by row, ``gap`` [B,D] what its classifier would
    receive. ``nhwc``: the map is [B,h,w,C]."""

    def __init__(self, network: nn.Module, nhwc: bool) -> None:
        super().__init__()
        self.network, self.nhwc = network, nhwc

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        network: Any = self.network
        last = network.forward_features(pixels)
        result = {"tokens": last.flatten(1, 2) if self.nhwc else last.flatten(2).transpose(1, 2)}
        if "gap" in want:
            result["gap"] = network.forward_head(last, pre_logits=True).flatten(1)
        return {name: result[name] for name in want}


@dataclass(frozen=True)
class OutputTraits:
    """What a network gives of an image, and which of its rows are what."""

    prefix: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    vector: str
    refusals: dict[str, str]
    layers: int = 0
    map: bool = False
    nhwc: bool = False


def infer_outputs(title: str, network: Any, features: Any, size: tuple[int, int]) -> OutputTraits:
    """Of a network with its classifier, and of what its ``forward_features`` made of one image of ``size``. Raises
    OutputRefused."""
    if not isinstance(features, torch.Tensor) or features.dim() not in (3, 4):
        what = list(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise OutputRefused(
            f"{title} cannot be a backbone here: its forward_features gives {what}; expected tokens [B,T,D] or a "
            "map [B,C,h,w]"
        )
    applied: list[nn.Module] = []  # what has parameters and comes between the features and the vector
    with ExitStack() as hooks:
        for module in network.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(lambda module, _: applied.append(module)))
        wide = network.forward_head(features, pre_logits=True).flatten(1).shape[1]
    if features.dim() == 4:
        return _map_traits(title, network, features.shape[1:], wide)
    return _token_traits(title, network, features.shape[1:], size, bool(applied), wide)


def _map_traits(title: str, network: Any, shape: torch.Size, wide: int) -> OutputTraits:
    output_fmt = getattr(network, "output_fmt", "")
    nhwc = str(getattr(output_fmt, "value", output_fmt)) == "NHWC"
    height, width, channels = shape if nhwc else (*shape[1:], shape[0])
    refusals = {
        "cls": f"{title} has no class token; gap is its vector",
        "pooler": "the vector of a network that gives a map is gap",
    }
    if channels != wide:
        why = f"its map has {channels:,} channels, and the vector that its classifier receives {wide:,}"
        refusals |= {"tokens": why, "mean": why}
    grid = (height, width) if channels == wide else (0, 0)
    return OutputTraits((), grid, wide, "gap", refusals, map=True, nhwc=nhwc)


def _token_traits(
    title: str, network: Any, shape: torch.Size, size: tuple[int, int], trained: bool, wide: int
) -> OutputTraits:
    """``trained``: parameters come between the tokens and the vector, of ``wide`` numbers."""
    count, width = shape
    refusals = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    layout = _token_layout(network, count, size) if width == wide else None
    if layout is None:
        why = f"which of the {count} rows of {title} are patches is not known"
        why = why if width == wide else f"its tokens have {width:,} numbers, and the vector of its classifier {wide:,}"
        refusals |= dict.fromkeys(("tokens", "cls", "mean"), why)
        return OutputTraits((), (0, 0), wide, "pooler", refusals)
    prefix, grid = layout
    if prefix[:1] != ("cls",):
        refusals["cls"] = f"{title} has no class token"
    vector = "pooler" if trained else _pooled_output(network, prefix)
    if vector != "pooler":
        refusals["pooler"] = f"what its classifier receives is {vector}"
    options = inspect.signature(getattr(network, "forward_intermediates", _pooled_output)).parameters
    layers = len(network.blocks) if {"return_prefix_tokens", "norm"} <= set(options) else 0
    return OutputTraits(prefix, grid, width, vector, refusals, layers)


def _token_layout(network: Any, count: int, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """(prefix, grid) of ``count`` tokens; None where nothing says so."""
    info = getattr(network, "feature_info", None) or [{}]
    stride = info[-1].get("reduction") or 1
    grid = (size[0] // stride, size[1] // stride)
    begin = count - grid[0] * grid[1]
    names = [name for name in ("cls", "dist") if getattr(network, f"{name}_token", None) is not None]
    names = names or (["cls"] if getattr(network, "global_pool", "") == "token" else [])
    registers = begin - len(names)
    says = hasattr(network, "num_prefix_tokens")
    if registers < 0 or (network.num_prefix_tokens != begin if says else registers > 0):
        return None
    return (*names, *(f"reg{k}" for k in range(registers))), grid


def _pooled_output(network: Any, prefix: tuple[str, ...]) -> str:
    """The output that a pooling without parameters gives."""
    pool, whole = getattr(network, "global_pool", ""), getattr(network, "pool_include_prefix", False)
    if pool == "token" and prefix[:1] == ("cls",) and "dist" not in prefix:
        return "cls"
    return "mean" if pool == "avg" and not (prefix and whole) else "pooler"


def identifying_traits(network: nn.Module) -> list[Any]:
    """All that tells two networks of one architecture apart, besides their weights: modules, their plain attributes and
    the shapes of their parameters."""
    traits: list[Any] = []
    for name, module in network.named_modules():
        plain = {key: v for key, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        traits.append((name, type(module).__name__, plain, shapes))
    return traits
