"""Where a transformer looks: the attention of its class token, in the last block and rolled out over all.

Of a frozen backbone it is the same for every head and class; of a network that was trained from pixels (tuned, or from
scratch) it is that network's own, the same for every class.

Notation: n images, T tokens of which P stand before the patches (class token first), L blocks, K heads. Block l's
attention A_l [T, T], a row for each query, averaged over its K heads; rows sum to 1.

    last block    the class token's row of A_L
    rollout       the class token's row of Ã_L ··· Ã_1 with Ã = (A + I) / 2, where I stands for the residual connection
                  (Abnar & Zuidema 2020, arXiv:2005.00928). Registers take part in the product and are left off the map.

The weights are read from the network's own forward pass, with attention that computes them ("eager"): transformers
returns them; torch's MultiheadAttention and timm's Attention are asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.backbones import Backbone
from featurecache.errors import BadOption
from heads.explanations.maps import Map, words_of
from heads.networks.tuned import FineTuned


@dataclass(frozen=True)
class Transformer:
    """``network``: the library's own module; ``forward``: a pass of normalised pixels [n,3,h,w] through it, ``options``
    what such a pass takes beside them."""

    name: str
    network: Any
    forward: Callable[[torch.Tensor], Any]
    prefix: tuple[str, ...]  # of the P tokens before the patches
    grid: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False  # from pixels, so that it belongs to one run

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> Transformer:
        return cls._of_tokens(backbone.name, backbone.model, backbone.prefix, backbone.grid)

    @classmethod
    def of_run(cls, name: str, model: Any) -> Transformer:
        """``model``: the network of a run on pixels, one of `heads.networks.published` or tuned."""
        network = model.network
        if not isinstance(model, FineTuned):
            prefix, (_, h, w) = ("cls",) if network.cam_grid else (), network.cam_grid or (0, 0, 0)
            return cls(name, network, network, prefix, (h, w), trained=True)
        return cls._of_tokens(name, network, model.prefix, model.grid, trained=True)

    @classmethod
    def _of_tokens(
        cls, name: str, model: Any, prefix: tuple[str, ...], grid: tuple[int, int], trained: bool = False
    ) -> Transformer:
        """``model``: that of a backbone, which gives its tokens."""
        inner, options = getattr(model, "network", model), getattr(model, "options", {})
        return cls(name, inner, lambda x: model(x, {"tokens"}), prefix, grid, options, trained)


def attention_maps(asked: Transformer, pixels: torch.Tensor) -> list[list[Map]]:
    """[last block, rollout] of every image; pixels float32 [n,3,h,w], normalised. Raises BadOption where there is no
    class token, or its attention cannot be read."""
    check_class_token(asked)
    layers = attention_of(asked, pixels)
    first, grid, words = len(asked.prefix), asked.grid, words_of("attention", asked.trained)
    rows = {"last block": layers[-1][:, 0], "rollout": rollout(layers)[:, 0]}
    hows = {
        "last block": "attention of the class token in the last block, mean of its heads",
        "rollout": "attention rolled out over all blocks",
    }
    found = []
    for i in range(len(pixels)):
        found.append(
            [_map(name, f"{hows[name]}: {words}", row[i].double().numpy(), first, grid) for name, row in rows.items()]
        )
    return found


def _map(name: str, how: str, row: np.ndarray, first: int, grid: tuple[int, int]) -> Map:
    beside = {"class token": float(row[0])}
    if first > 1:
        beside["tokens beside it"] = float(row[1:first].sum())
    return Map("attention", how, row[first:].reshape(grid), "share", False, beside, small=name)


def has_class_token(asked: Transformer) -> bool:
    return asked.prefix[:1] == ("cls",)


def check_class_token(asked: Transformer) -> None:
    if not has_class_token(asked):
        raise BadOption(
            f"{asked.name} has no class token, and these maps are of its attention. --kind contribution and "
            "--kind grad-cam need none."
        )


def rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention of blocks 1 to L, each [n, T, T] -> Ã_L ··· Ã_1 [n, T, T]."""
    product = torch.eye(layers[0].shape[-1]).expand_as(layers[0])
    for attention in layers:
        product = (attention + torch.eye(attention.shape[-1])) / 2 @ product
    return product


@torch.no_grad()
def attention_of(asked: Transformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """A_1 … A_L, each float32 [n, T, T] on the CPU."""
    if hasattr(asked.network, "set_attn_implementation"):
        with _eager(asked.network):
            options = {**asked.options, "output_attentions": True}
            found = list(asked.network(pixels, **options).attentions or ())
    else:
        found = _overheard(asked, pixels)
    layers = [attention.float().mean(1).cpu() for attention in found]
    tokens = len(asked.prefix) + asked.grid[0] * asked.grid[1]
    if not layers or any(layer.shape[1:] != (tokens, tokens) for layer in layers):
        raise BadOption(
            f"the attention of {asked.name} cannot be read: expected torch's MultiheadAttention, or timm's or "
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


def _overheard(asked: Transformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """[n, K, T, T] of each block in the order they run, of torch's and timm's modules."""
    found: list[torch.Tensor] = []

    def ask(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "need_weights": True, "average_attn_weights": False}

    def keep_second(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[1])

    def keep_input(_: nn.Module, args: Any) -> None:
        found.append(args[0])

    with ExitStack() as stack:
        for module in asked.network.modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(keep_second).remove)
            elif hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
                stack.callback(module.attn_drop.register_forward_pre_hook(keep_input).remove)
        asked.forward(pixels)
    return found
