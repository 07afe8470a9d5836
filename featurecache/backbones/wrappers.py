"""How outputs are read from a network's own forward pass. Each module: forward(pixels, want) -> {output: tensor}.

Axis letters: B batch, T tokens, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from featurecache.errors import OutputRefused

# Networks that pool in their forward and not by a module: where their map comes out, and what is done to it first.
_MAPS = {"DenseNet": "features", "MobileNetV2": "features", "ShuffleNetV2": "conv5", "MNASNet": "layers"}


class Tokens(nn.Module):
    """A transformer: ``tokens`` is last_hidden_state [B,T,D]; ``tokens@-k`` the final norm of block -k's output."""

    def __init__(self, network: nn.Module, blocks: str, norm: str, options: dict[str, Any], output: str = "") -> None:
        super().__init__()
        self.network, self.blocks, self.norm, self.options, self.output = network, blocks, norm, options, output

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,3,h,w] -> the wanted tensors. Only the blocks that are asked for are kept."""
        blocks: Any = self.network.get_submodule(self.blocks)
        seen: dict[str, torch.Tensor] = {}
        deeper = {name: int(name.removeprefix("tokens@")) for name in want if name.startswith("tokens@")}
        hooks = [blocks[at].register_forward_hook(partial(_keep, seen, name)) for name, at in deeper.items()]
        if self.output:
            last = self.network.get_submodule(self.output)
            hooks.append(last.register_forward_hook(partial(_keep, seen, "tokens")))
        try:
            found = self.network(pixels, **self.options)
        finally:
            for hook in hooks:
                hook.remove()
        norm = self.network.get_submodule(self.norm) if self.norm else nn.Identity()
        result = {name: norm(seen[name]) for name in deeper}
        result["tokens"] = seen["tokens"] if self.output else found.last_hidden_state
        if "pooler" in want:
            result["pooler"] = found.pooler_output
        return {name: result["tokens" if name == "tokens@-1" else name] for name in want}


class Map(nn.Module):
    """A CNN of transformers: ``tokens`` is its last map [B,h·w,C], row by row; ``gap`` its pooled vector [B,C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        found = self.network(pixels)
        result = {"tokens": found.last_hidden_state.flatten(2).transpose(1, 2), "gap": found.pooler_output.flatten(1)}
        return {name: result[name] for name in want}


class TimmTokens(Tokens):
    """A transformer of timm: ``tokens`` is what its ``forward_features`` gives, ``pooler`` what its classifier would
    receive, ``tokens@-k`` block -k's output after the final norm."""

    def __init__(self, network: nn.Module, prefix: int) -> None:
        super().__init__(network, "blocks", "norm", {})
        self.prefix = prefix

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,3,h,w] -> the wanted tensors."""
        network: Any = self.network
        deeper = {name: int(name.removeprefix("tokens@")) for name in want if name.startswith("tokens@")}
        result: dict[str, torch.Tensor] = {}
        if deeper:
            count = len(network.blocks)
            places = sorted({count + at for at in deeper.values()})
            options = {"return_prefix_tokens": True} if self.prefix else {}
            last, between = network.forward_intermediates(
                pixels, indices=places, norm=True, output_fmt="NLC", **options
            )
            between = [torch.cat([begin, rows], 1) for rows, begin in between] if self.prefix else between
            result = {name: between[places.index(count + at)] for name, at in deeper.items()}
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
        """pixels [B,3,h,w] -> the wanted tensors."""
        network: Any = self.network
        found = network.forward_features(pixels)
        result = {"tokens": found.flatten(1, 2) if self.nhwc else found.flatten(2).transpose(1, 2)}
        if "gap" in want:
            result["gap"] = network.forward_head(found, pre_logits=True).flatten(1)
        return {name: result[name] for name in want}


def _keep(seen: dict[str, torch.Tensor], name: str, _: nn.Module, __: Any, output: Any) -> None:
    seen[name] = output[0] if isinstance(output, tuple) else output


class PooledMap(nn.Module):
    """A CNN of torchvision, read while it runs its own forward: ``tokens`` [B,h·w,C] is the map that its pooling
    receives, row by row, and ``gap`` [B,C] what the first Linear of its classifier (``tail[0]``) receives."""

    def __init__(self, name: str, network: nn.Module, tail: list[str]) -> None:
        super().__init__()
        self.network, self.tail = network, tail
        self.inside = _MAPS.get(type(network).__name__, "")  # a module whose output is the map, or ...
        pools = [path for path, module in network.named_modules() if _pools(network, path, module)]
        self.pool = pools[-1] if pools and not self.inside else ""  # ... the one whose input it is
        if not (self.inside or self.pool):
            raise OutputRefused(f"torchvision:{name} cannot be a backbone here: the map that it pools was not found")

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,3,h,w] -> the wanted tensors."""
        feature_map, gap, _ = self.look(pixels)
        result = {"tokens": feature_map.flatten(2).transpose(1, 2), "gap": gap}
        return {name: result[name] for name in want}

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(map [B,C,h,w], gap [B,·], logits [B,·]) of the network's own forward."""
        seen: dict[str, torch.Tensor] = {}

        def keep_map(_: nn.Module, given: Any, output: Any = None) -> None:
            seen["map"] = output if self.inside else given[0]

        def keep_gap(_: nn.Module, given: Any) -> None:
            seen["gap"] = given[0]

        first = self.network.get_submodule(self.tail[0])
        at = self.network.get_submodule(self.inside or self.pool)
        hooks = [
            at.register_forward_hook(keep_map) if self.inside else at.register_forward_pre_hook(keep_map),
            first.register_forward_pre_hook(keep_gap),
        ]
        try:
            logits = self.network(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        # DenseNet's ReLU comes after `features`, in place or not
        feature_map = seen["map"].relu() if type(self.network).__name__ == "DenseNet" else seen["map"]
        return feature_map, seen["gap"], logits


def _pools(network: nn.Module, path: str, module: nn.Module) -> bool:
    """An AdaptiveAvgPool2d that is not the squeeze of a squeeze-and-excitation."""
    if not isinstance(module, nn.AdaptiveAvgPool2d):
        return False
    around = network.get_submodule(path.rpartition(".")[0])
    return type(around).__name__ not in ("SqueezeExcitation", "SqueezeExcitation2d")
