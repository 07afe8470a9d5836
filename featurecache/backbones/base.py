"""What a backbone is: `Backbone`, its request (`BackboneRequest`), and how outputs are read from a network's forward.

Every module of this folder that loads networks gives a `Backbone`, so that extraction knows one kind of them. Its
``architecture``, ``weights``, ``preprocess``, ``image_size`` and ``position_embeddings`` are hashed into the
fingerprint of a store: a value that reads differently there is another store. All else is for people, or follows.

Tokens, maps and pooled vectors stand under one interface. Each wrapper of a network: forward(pixels [B,C,h,w], want)
-> {output: tensor}, of ``tokens`` and ``tokens@-k`` [B,T,D], ``pooler`` and ``gap`` [B,D] the wanted. The network
itself runs as its library wrote it; hooks read on the way.

Axis letters: B batch, T tokens, D width, C channels (of pixels 3, of grey images 1), h and w the sides of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.weights import split_weights
from featurecache.errors import OutputRefused
from featurecache.images.preprocessing import Preprocess

SAME = 1e-3  # relative L2 that other images of the batch may cost in float32; dropout costs 0.1 and more
OUTPUTS = ("cls", "pooler", "gap", "mean", "tokens")
# Networks that pool in their forward and not by a module: where their map comes out, and what is done to it first.
_MAPS = {"DenseNet": "features", "MobileNetV2": "features", "ShuffleNetV2": "conv5", "MNASNet": "layers"}


@dataclass(frozen=True)
class BackboneRequest:
    """The arguments of `load_backbone`. ``meta``: shapes only, without weights."""

    name: str
    weights: str | None = None
    random_weights: bool = False
    seed: int = 0
    image_size: int | None = None
    fit: str = "model"
    meta: bool = False

    @property
    def untrained(self) -> bool:
        return self.random_weights or self.meta

    @property
    def weights_path(self) -> Path | None:
        return split_weights(self.weights)[0] if self.weights is not None else None

    @property
    def weights_name(self) -> str:
        """Of ``--weights FILE:NAME``: which of several sets of weights in the file."""
        return split_weights(self.weights)[1] if self.weights is not None else ""

    def portable_arguments(self, name: str) -> dict[str, Any]:
        """The arguments that load the same backbone from any working directory, where ``name`` finds it."""
        weights = str(self.weights_path.resolve()) if self.weights_path is not None else None
        weights = f"{weights}:{self.weights_name}" if self.weights_name else weights
        return {key: value for key, value in asdict(self).items() if key != "meta"} | {"name": name, "weights": weights}


@dataclass
class Backbone:
    """A network in eval mode, float32, without gradients. Sizes are (height, width) in pixels."""

    name: str
    model: nn.Module  # forward(pixels, want) -> {output: tensor}; the library's own network is model.network
    architecture: dict[str, Any]  # what decides values beside the weights: library, class, configuration
    weights: dict[str, Any]  # {"blake2b": ...} of the tensors of the checkpoint, or {"random_seed": ...}
    preprocess: Preprocess
    image_size: tuple[int, int]
    position_embeddings: str
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    layers: int  # blocks that can be counted from the end; 0 of a CNN
    vector: str  # the vector it was made for
    channels_last: bool
    parameters: int
    provenance: dict[str, Any]  # beside the spec: provider, id, revision, licence, versions, the request
    refusals: dict[str, str]  # output -> why there is none

    def offers(self, base: str) -> None:
        """Raise OutputRefused, with the reason, where there is no ``base`` (``cls``, ``tokens@-2``, ``mean@last4``)."""
        kind, _, layer = base.partition("@")
        kind = "tokens" if kind.startswith("tokens-") else kind
        if kind not in OUTPUTS:
            raise OutputRefused(f"{kind} is what an imported vector is called; {self.name} has {', '.join(OUTPUTS)}.")
        if kind in self.refusals:
            others = [name for name in OUTPUTS if name not in self.refusals]
            raise OutputRefused(f"{self.name} has no {kind}: {self.refusals[kind]}. It has {', '.join(others)}.")
        if not layer:
            return
        if kind in ("pooler", "gap"):
            raise OutputRefused(f"{kind}@{layer} does not exist: {kind} is made from the last layer only")
        if not 1 <= int(layer.removeprefix("last").lstrip("-") or 0) <= self.layers:
            have = f"{self.layers} blocks, @-1 to @-{self.layers}" if self.layers else "no blocks of one width"
            raise OutputRefused(f"{self.name} has no {base}: it has {have}")

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """Normalised pixels [B,C,h,w] -> of ``tokens``, ``tokens@-k`` [B,T,D], ``pooler``, ``gap`` [B,D] the wanted."""
        return self.model(pixels, want)


def freeze(network: nn.Module) -> nn.Module:
    """Eval mode (no dropout, no drop path), float32, no gradients."""
    return network.eval().requires_grad_(False)


def relative_l2(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖ / ‖other‖ of tensors of one shape; at most `SAME` of the same image twice."""
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """torch's generator for an initialisation; put back afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def versions(*libraries: str) -> dict[str, str]:
    """Versions of the libraries that compute features, for people and for the canary."""
    return {name: version(name) for name in ("torch", *libraries)}


class Tokens(nn.Module):
    """A transformer: ``tokens`` is last_hidden_state [B,T,D]; ``tokens@-k`` the final norm of block -k's output."""

    def __init__(self, network: nn.Module, blocks: str, norm: str, options: dict[str, Any], output: str = "") -> None:
        super().__init__()
        self.network, self.blocks, self.norm, self.options, self.output = network, blocks, norm, options, output

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """Only the blocks that are asked for are kept."""
        blocks: Any = self.network.get_submodule(self.blocks)
        read = {name: blocks[index] for name, index in earlier_blocks(want).items()}
        if self.output:
            read["tokens"] = self.network.get_submodule(self.output)
        with store_outputs(read) as outputs:
            last = self.network(pixels, **self.options)
        norm = self.network.get_submodule(self.norm) if self.norm else nn.Identity()
        result = {name: norm(outputs[name]) for name in read if name != "tokens"}
        result["tokens"] = outputs["tokens"] if self.output else last.last_hidden_state
        if "pooler" in want:
            result["pooler"] = last.pooler_output
        return {name: result["tokens" if name == "tokens@-1" else name] for name in want}


def earlier_blocks(want: set[str]) -> dict[str, int]:
    """``tokens@-k`` -> -k"""
    return {name: int(name.removeprefix("tokens@")) for name in want if name.startswith("tokens@")}


@contextmanager
def store_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Name of a module -> what it gives, of several tensors the first, when the network runs inside the block."""
    outputs: dict[str, torch.Tensor] = {}

    def store(name: str, _: nn.Module, __: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(store, name)))
        yield outputs


class FeatureMap(nn.Module):
    """A CNN of transformers: ``tokens`` is its last map [B,h·w,C], row by row; ``gap`` its pooled vector [B,C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        last = self.network(pixels)
        result = {"tokens": last.last_hidden_state.flatten(2).transpose(1, 2), "gap": last.pooler_output.flatten(1)}
        return {name: result[name] for name in want}


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
            # timm's own way: a block may give more than its tokens (TNT's begin with those of its pixels)
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
        feature_map, gap, _ = self.map_gap_logits(pixels)
        result = {"tokens": feature_map.flatten(2).transpose(1, 2), "gap": gap}
        return {name: result[name] for name in want}

    def map_gap_logits(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(map [B,C,h,w], gap [B,·], logits [B,·]) of the network's own forward."""
        network = self.network
        inside = {"map": network.get_submodule(self.inside)} if self.inside else {}
        with store_outputs(inside) as tensors, ExitStack() as hooks:
            for name, path in (("map", self.pool), ("gap", self.tail[0])):
                if path:
                    before = lambda _, inputs, name=name: tensors.update({name: inputs[0]})  # noqa: E731
                    hooks.enter_context(network.get_submodule(path).register_forward_pre_hook(before))
            logits = network(pixels)
        # DenseNet's ReLU comes after `features`, in place or not
        feature_map = tensors["map"].relu() if type(network).__name__ == "DenseNet" else tensors["map"]
        return feature_map, tensors["gap"], logits


def _pools(network: nn.Module, path: str, module: nn.Module) -> bool:
    """An AdaptiveAvgPool2d that is not the squeeze of a squeeze-and-excitation."""
    around = network.get_submodule(path.rpartition(".")[0])
    excites = type(around).__name__ in ("SqueezeExcitation", "SqueezeExcitation2d")
    return isinstance(module, nn.AdaptiveAvgPool2d) and not excites
