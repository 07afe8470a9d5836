"""What a network of timm gives, and which of its rows are what: read off its own attributes and shapes, so that it is
known before there are weights.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featurecache.errors import OutputRefused


@dataclass(frozen=True)
class Gives:
    """What a network gives of an image, and which of its rows are what."""

    map: bool
    nhwc: bool
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    layers: int
    vector: str
    refused: dict[str, str]


def gives_of(title: str, network: Any, features: Any, size: tuple[int, int]) -> Gives:
    """Of a network with its classifier, and of what its ``forward_features`` made of one image of ``size``. Raises
    OutputRefused."""
    if not isinstance(features, torch.Tensor) or features.dim() not in (3, 4):
        what = list(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise OutputRefused(
            f"{title} cannot be a backbone here: its forward_features gives {what}; expected tokens [B,T,D] or a "
            "map [B,C,h,w]"
        )
    trained, wide = _head(network, features)
    if features.dim() == 4:
        return _gives_map(title, network, features, wide)
    return _gives_tokens(title, network, features, size, trained, wide)


def _head(network: Any, features: torch.Tensor) -> tuple[bool, int]:
    """(whether parameters come between the features and the vector, width of the vector)"""
    used: list[nn.Module] = []
    with_own = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(lambda module, _: used.append(module)) for module in with_own]
    try:
        vector = network.forward_head(features, pre_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(used), vector.flatten(1).shape[1]


def _gives_map(title: str, network: Any, features: torch.Tensor, wide: int) -> Gives:
    nhwc = str(getattr(getattr(network, "output_fmt", ""), "value", getattr(network, "output_fmt", ""))) == "NHWC"
    _, *sides = features.shape
    channels, grid = (sides[2], (sides[0], sides[1])) if nhwc else (sides[0], (sides[1], sides[2]))
    refused = {
        "cls": f"{title} has no class token; gap is its vector",
        "pooler": "the vector of a network that gives a map is gap",
    }
    if channels != wide:
        why = f"its map has {channels:,} channels, and the vector that its classifier receives {wide:,}"
        refused |= {"tokens": why, "mean": why}
        grid = (0, 0)
    return Gives(True, nhwc, (), grid, wide, 0, "gap", refused)


def _gives_tokens(
    title: str, network: Any, features: torch.Tensor, size: tuple[int, int], trained: bool, wide: int
) -> Gives:
    count, width = features.shape[1:]
    refused = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    places = _places(network, count, size) if width == wide else None
    if places is None:
        why = f"which of the {count} rows of {title} are patches is not known"
        why = why if width == wide else f"its tokens have {width:,} numbers, and the vector of its classifier {wide:,}"
        refused |= dict.fromkeys(("tokens", "cls", "mean"), why)
        return Gives(False, False, (), (0, 0), wide, 0, "pooler", refused)
    prefix, grid = places
    if prefix[:1] != ("cls",):
        refused["cls"] = f"{title} has no class token"
    vector = "pooler" if trained else _bare(network, prefix)
    if vector != "pooler":
        refused["pooler"] = f"what its classifier receives is {vector}"
    options = inspect.signature(getattr(network, "forward_intermediates", _bare)).parameters
    layers = len(network.blocks) if {"return_prefix_tokens", "norm"} <= set(options) else 0
    return Gives(False, False, prefix, grid, width, layers, vector, refused)


def _places(network: Any, count: int, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """(prefix, grid) of ``count`` tokens; None where nothing says so."""
    info = getattr(network, "feature_info", None) or [{}]
    stride = info[-1].get("reduction") or 1
    grid = (size[0] // stride, size[1] // stride)
    begin, pool = count - grid[0] * grid[1], getattr(network, "global_pool", "")
    names = [word for word in ("cls", "dist") if getattr(network, f"{word}_token", None) is not None]
    names = names or (["cls"] if pool == "token" else [])
    if begin != getattr(network, "num_prefix_tokens", begin) or begin < len(names):
        return None
    if begin > len(names) and not hasattr(network, "num_prefix_tokens"):
        return None
    return (*names, *(f"reg{k}" for k in range(begin - len(names)))), grid


def _bare(network: Any, prefix: tuple[str, ...]) -> str:
    """The output that a pooling without parameters gives."""
    pool, whole = getattr(network, "global_pool", ""), getattr(network, "pool_include_prefix", False)
    if pool == "token" and prefix[:1] == ("cls",) and "dist" not in prefix:
        return "cls"
    return "mean" if pool == "avg" and not (prefix and whole) else "pooler"


def traits(network: nn.Module) -> list[Any]:
    """All that tells two networks of one architecture apart, besides their weights: modules, their plain attributes and
    the shapes of their parameters."""
    found: list[Any] = []
    for name, module in network.named_modules():
        plain = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
        }
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        found.append((name, type(module).__name__, plain, shapes))
    return found
