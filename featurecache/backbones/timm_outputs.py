"""What a network of timm gives, by its own attributes and shapes: tokens, which of them are patches, a map, a vector.

Axis letters: B batch, T tokens, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from featurecache.backbones.weights import library_errors
from featurecache.errors import OutputRefused


def output_traits(title: str, network: Any, features: Any, size: tuple[int, int]) -> tuple[dict[str, Any], bool | None]:
    """(fields of a `Backbone`, whether its map is [B,h,w,C], None of tokens): of a network with its classifier, and of
    what its ``forward_features`` made of one image of ``size``. Raises OutputRefused."""
    tensor = isinstance(features, torch.Tensor)
    if not tensor or features.dim() not in (3, 4):
        what = list(features.shape) if tensor else f"a {type(features).__name__}"
        raise OutputRefused(
            f"{title} cannot be a backbone here: its forward_features gives {what}; expected tokens [B,T,D] or a "
            "map [B,C,h,w]"
        )
    applied: list[nn.Module] = []  # what has parameters and comes between the features and the vector
    with ExitStack() as hooks:
        for module in network.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(lambda module, _: applied.append(module)))
        with library_errors(f"{title} cannot be a backbone here: its forward_head fails", OutputRefused):
            vector = network.forward_head(features, pre_logits=True)
    pools, wide = vector.shape != features.shape, vector.flatten(1).shape[1]  # Virchow leaves that to its users
    if features.dim() == 3:
        pooling = ("" if applied else str(getattr(network, "global_pool", ""))) if pools else "nothing"
        return _token_traits(
            title, network, features.shape[1:], size, pooling, wide if pools else vector.shape[2]
        ), None
    output_fmt = getattr(network, "output_fmt", "")
    nhwc = str(getattr(output_fmt, "value", output_fmt)) == "NHWC"
    height, width, channels = features.shape[1:] if nhwc else (*features.shape[2:], features.shape[1])
    refusals = {"cls": f"{title} has no class token; gap is its vector"}
    wide = wide if pools else channels
    refusals["pooler"] = "the vector of a network that gives a map is gap"
    refusals |= {} if pools else {"gap": "its network pools nothing; mean is the average of its map"}
    if channels != wide:
        why = f"its map has {channels:,} channels, and the vector that its classifier receives {wide:,}"
        refusals |= {"tokens": why, "mean": why}
    grid = (height, width) if channels == wide else (0, 0)
    return _traits((), grid, wide, "gap" if pools else "mean", refusals, 0), nhwc


def _token_traits(
    title: str, network: Any, shape: torch.Size, size: tuple[int, int], pooling: str, wide: int
) -> dict[str, Any]:
    """``pooling``: how the vector, of ``wide`` numbers, is made of the tokens: "token", "avg", "nothing" where they are
    left as they are, empty for what has parameters, or takes prefix tokens too."""
    count, width = shape
    refusals = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    layout = _token_layout(network, count, size) if width == wide else None
    if layout is None:
        why = f"which of the {count} rows of {title} are patches is not known"
        why = why if width == wide else f"its tokens have {width:,} numbers, and the vector of its classifier {wide:,}"
        refusals |= dict.fromkeys(("tokens", "cls", "mean"), why)
        return _traits((), (0, 0), wide, "pooler", refusals, 0)
    prefix, grid = layout
    if prefix[:1] != ("cls",):
        refusals["cls"] = f"{title} has no class token"
    vector = "pooler"
    if pooling == "nothing":
        vector, refusals["pooler"] = "mean" if "cls" in refusals else "cls", "its network pools nothing"
    elif (pooling == "token" and "cls" not in refusals and "dist" not in prefix) or (
        pooling == "avg" and not (prefix and getattr(network, "pool_include_prefix", False))
    ):
        vector = "cls" if pooling == "token" else "mean"
        refusals["pooler"] = f"what its classifier receives is {vector}"
    options = inspect.signature(getattr(network, "forward_intermediates", _traits)).parameters
    layers = len(network.blocks) if {"return_prefix_tokens", "norm"} <= set(options) else 0
    return _traits(prefix, grid, width, vector, refusals, layers)


def _traits(*values: Any) -> dict[str, Any]:
    return dict(zip(("prefix", "grid", "width", "vector", "refusals", "layers"), values, strict=True))


def _token_layout(network: Any, count: int, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """(prefix, grid) of ``count`` tokens; None where nothing says so."""
    stride = (getattr(network, "feature_info", None) or [{}])[-1].get("reduction") or 1
    grid = (size[0] // stride, size[1] // stride)
    begin = count - grid[0] * grid[1]
    names = [name for name in ("cls", "dist") if getattr(network, f"{name}_token", None) is not None]
    names = names or (["cls"] if getattr(network, "global_pool", "") == "token" else [])
    registers = begin - len(names)
    if registers < 0 or getattr(network, "num_prefix_tokens", len(names)) != begin:
        return None
    return (*names, *(f"reg{k}" for k in range(registers))), grid


def network_identity(network: nn.Module) -> list[Any]:
    """All that tells two networks of one architecture apart, besides their weights: modules, their plain attributes and
    the shapes of their parameters."""
    identity: list[Any] = []
    for name, module in network.named_modules():
        plain = {key: v for key, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        identity.append((name, type(module).__name__, plain, shapes))
    return identity
