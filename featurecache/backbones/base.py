"""What a backbone is: `Backbone`, the request it is loaded by (`BackboneRequest`), and how a network is frozen.

Every module of this folder that loads networks gives a `Backbone`, so that extraction knows one kind of them. Its
``architecture``, ``weights``, ``preprocess``, ``image_size`` and ``position_embeddings`` are hashed into the
fingerprint of a store: a value that reads differently there is another store. All else is for people, or follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.weights import split_weights
from featurecache.errors import OutputRefused
from featurecache.images.preprocessing import Preprocess

OUTPUTS = ("cls", "pooler", "gap", "mean", "tokens")


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
        arguments = asdict(self) | {"name": name, "weights": weights}
        del arguments["meta"]
        return arguments


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
        """Normalised pixels [B,3,h,w] -> of ``tokens``, ``tokens@-k`` [B,T,D], ``pooler``, ``gap`` [B,D] the wanted."""
        return self.model(pixels, want)


def freeze(network: nn.Module) -> nn.Module:
    """Eval mode (no dropout, no drop path), float32, no gradients."""
    return network.eval().requires_grad_(False)


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """torch's generator for an initialisation; put back afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def versions(*libraries: str) -> dict[str, str]:
    """Versions of the libraries that compute features, for people and for the canary."""
    return {name: version(name) for name in ("torch", *libraries)}
