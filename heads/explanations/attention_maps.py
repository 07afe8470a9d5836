"""Where a transformer's backbone looks: the attention of its class token, in the last block and rolled out over all.

Notation: n images, T tokens of which P stand before the patches (class token first), L blocks, K heads. Block l's
attention A_l [T, T], a row for each query, averaged over its K heads; rows sum to 1.

    last block    the class token's row of A_L
    rollout       the class token's row of Ã_L ··· Ã_1 with Ã = (A + I) / 2, where I stands for the residual connection
                  (Abnar & Zuidema 2020, arXiv:2005.00928). Registers take part in the product and are left off the map.

The weights are read from the network's own forward pass, with attention that computes them ("eager"): transformers
returns them; torch's MultiheadAttention and timm's Attention are asked for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.backbones import Backbone
from featurecache.errors import BadOption
from heads.explanations.maps import Map

WORDS = "where the backbone looks; the same for every head and class"


def attention_maps(backbone: Backbone, pixels: torch.Tensor) -> list[list[Map]]:
    """[last block, rollout] of every image; pixels float32 [n,3,h,w], normalised. Raises BadOption where there is no
    class token, or its attention cannot be read."""
    check_class_token(backbone)
    layers = attention_of(backbone, pixels)
    first, grid = len(backbone.prefix), backbone.grid
    rows = {"last block": layers[-1][:, 0], "rollout": rollout(layers)[:, 0]}
    hows = {
        "last block": "attention of the class token in the last block, mean of its heads",
        "rollout": "attention rolled out over all blocks",
    }
    found = []
    for i in range(len(pixels)):
        found.append(
            [_map(name, f"{hows[name]}: {WORDS}", row[i].double().numpy(), first, grid) for name, row in rows.items()]
        )
    return found


def _map(name: str, how: str, row: np.ndarray, first: int, grid: tuple[int, int]) -> Map:
    beside = {"class token": float(row[0])}
    if first > 1:
        beside["tokens beside it"] = float(row[1:first].sum())
    return Map("attention", how, row[first:].reshape(grid), "share", False, beside, small=name)


def check_class_token(backbone: Backbone) -> None:
    if backbone.prefix[:1] != ("cls",):
        raise BadOption(
            f"{backbone.name} has no class token, and these maps are of its attention. --kind contribution and "
            "--kind grad-cam need none."
        )


def rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention of blocks 1 to L, each [n, T, T] -> Ã_L ··· Ã_1 [n, T, T]."""
    product = torch.eye(layers[0].shape[-1]).expand_as(layers[0])
    for attention in layers:
        product = (attention + torch.eye(attention.shape[-1])) / 2 @ product
    return product


@torch.no_grad()
def attention_of(backbone: Backbone, pixels: torch.Tensor) -> list[torch.Tensor]:
    """A_1 … A_L, each float32 [n, T, T] on the CPU."""
    network: Any = getattr(backbone.model, "network", backbone.model)
    if hasattr(network, "set_attn_implementation"):
        with _eager(network):
            options = {**getattr(backbone.model, "options", {}), "output_attentions": True}
            found = list(network(pixels, **options).attentions or ())
    else:
        found = _overheard(backbone, network, pixels)
    layers = [attention.float().mean(1).cpu() for attention in found]
    tokens = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    if not layers or any(layer.shape[1:] != (tokens, tokens) for layer in layers):
        raise BadOption(
            f"the attention of {backbone.name} cannot be read: expected torch's MultiheadAttention, or timm's or "
            f"transformers' attention over its {tokens} tokens. --kind grad-cam needs no attention weights."
        )
    return layers


@contextmanager
def _eager(network: Any) -> Iterator[None]:
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _overheard(backbone: Backbone, network: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """[n, K, T, T] of each block in the order they run, of torch's and timm's modules."""
    found: list[torch.Tensor] = []

    def ask(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "need_weights": True, "average_attn_weights": False}

    def keep_second(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[1])

    def keep_input(_: nn.Module, args: Any) -> None:
        found.append(args[0])

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(keep_second).remove)
            elif hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False  # type: ignore[assignment]
                stack.callback(module.attn_drop.register_forward_pre_hook(keep_input).remove)  # type: ignore[union-attr]
        backbone.forward(pixels, {"tokens"})
    return found
