"""A frozen network with its preprocessing, what it can give, and how it is found by name.

Names: an alias (`aliases` beside this); ``hf:<repo or folder>[@revision]``; a folder written by ``save_pretrained``;
``torchvision:<name>[:<weights>]``; ``timm:<name>``; ``python:<module>:<factory>``, a network of the user's own.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import ALIASES
from featurecache.errors import BadOption, OutputRefused, UnknownBackbone, WeightsNotFound, nearest
from featurecache.preprocess import FITS, Preprocess

OUTPUTS = ("cls", "pooler", "gap", "mean", "tokens")
FORMS = "hf:<repo or folder>, torchvision:<name>, timm:<name>, python:<module>:<factory>, or a checkpoint's folder"


@dataclass(frozen=True)
class Request:
    """What was asked for: the arguments of `load_backbone`. ``meta``: shapes only, without weights."""

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

    def again(self, name: str) -> dict[str, Any]:
        """The arguments that load the same backbone from any working directory."""
        return {
            "name": name,
            "weights": str(Path(os.path.expanduser(self.weights)).resolve()) if self.weights else None,
            "random_weights": self.random_weights,
            "seed": self.seed,
            "image_size": self.image_size,
            "fit": self.fit,
        }


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
    refused: dict[str, str]  # output -> why there is none

    def offers(self, base: str) -> None:
        """Raise OutputRefused, with the reason, where there is no ``base`` (``cls``, ``tokens@-2``, ``mean@last4``)."""
        kind, _, layer = base.partition("@")
        kind = "tokens" if kind.startswith("tokens-") else kind
        if kind not in OUTPUTS:
            raise OutputRefused(f"{kind} is what an imported vector is called; {self.name} has {', '.join(OUTPUTS)}.")
        if kind in self.refused:
            others = [name for name in OUTPUTS if name not in self.refused]
            raise OutputRefused(f"{self.name} has no {kind}: {self.refused[kind]}. It has {', '.join(others)}.")
        if not layer:
            return
        depth = int(layer.removeprefix("last").lstrip("-") or 0)
        if kind in ("pooler", "gap"):
            raise OutputRefused(f"{kind}@{layer} does not exist: {kind} is made from the last layer only")
        if not 1 <= depth <= self.layers:
            have = f"{self.layers} blocks, @-1 to @-{self.layers}" if self.layers else "no blocks of one width"
            raise OutputRefused(f"{self.name} has no {base}: it has {have}")

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """Normalised pixels [B,3,h,w] -> of ``tokens``, ``tokens@-k`` [B,T,D], ``pooler``, ``gap`` [B,D] the wanted."""
        return self.model(pixels, want)


def load_backbone(
    name: str,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    fit: str = "model",
) -> Backbone:
    """Find, load and check a backbone.

    >>> load_backbone("vit-in21k").grid                                                  # doctest: +SKIP
    (14, 14)

    Raises: UnknownBackbone, WeightsNotFound, WeightsDoNotFit, PreprocessingRefused, OutputRefused, BadOption.
    """
    if weights is not None and random_weights:
        raise BadOption("--weights and --random-weights contradict each other; give one of them")
    if fit not in FITS:
        raise BadOption(f'--fit "{fit}" is not one of {", ".join(FITS)}')
    return _load(Request(name, str(weights) if weights is not None else None, random_weights, seed, image_size, fit))


def _load(request: Request) -> Backbone:
    name, alias = request.name, ALIASES.get(request.name)
    if alias is not None and not alias.id and not request.untrained:
        raise WeightsNotFound(f"{name} was never trained; it exists only with --random-weights")
    where = alias.id if alias else name
    if where.startswith("python:"):
        from featurecache.backbones import own

        return own.load(where.removeprefix("python:"), request)
    if where.startswith("torchvision:"):
        from featurecache.backbones import tv

        return tv.load(where.removeprefix("torchvision:"), request, alias)
    if where.startswith(("timm:", "hf:timm/")) or _is_timm(where.removeprefix("hf:")):
        from featurecache.backbones import timm_networks

        return timm_networks.load(where.removeprefix("hf:").removeprefix("timm:"), request, alias)
    if where.startswith("hf:") or (alias and not where) or os.path.isdir(os.path.expanduser(where)):
        from featurecache.backbones import hf

        return hf.load(where.removeprefix("hf:"), request, alias)
    raise unknown(where)


def _is_timm(folder: str) -> bool:
    """A folder of weights with settings as timm writes them."""
    path = Path(os.path.expanduser(folder))
    if not folder or not path.is_dir():
        return False
    from featurecache.backbones.timm_found import is_timm

    return is_timm(path)


def unknown(name: str) -> UnknownBackbone:
    """What to say of a name in none of the forms."""
    if os.path.isfile(os.path.expanduser(name)):
        return UnknownBackbone(f"{name} is a file of weights; say what they are of: --backbone NAME --weights {name}")
    if name.startswith(("/", "./", "../", "~")):
        return UnknownBackbone(f'there is no folder "{name}"; expected one written by save_pretrained')
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return UnknownBackbone(f'no folder is called "{name}"; a repository of the hub is written hf:{name}')
    return UnknownBackbone(f'no backbone is called "{name}".{nearest(name, ALIASES)} Others: {FORMS}.')


def outline(name: str, **options: Any) -> Backbone:
    """A backbone without its weights, in no memory: its shapes and its preprocessing."""
    return _load(Request(name, meta=True, **options))


def describe(backbone: Backbone | str, **options: Any) -> dict[str, Any]:
    """What ``info --backbone`` shows. A name needs no weights: an alias is built without any, in no memory."""
    if isinstance(backbone, str):
        backbone = outline(backbone, **options)
    tokens = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    outputs: dict[str, dict[str, Any]] = {}
    for name in OUTPUTS:
        shape = [tokens, backbone.width] if name == "tokens" else [backbone.width]
        outputs[name] = {"refused": backbone.refused[name]} if name in backbone.refused else {"shape": shape}
    made_of = backbone.provenance
    return {
        "name": backbone.name,
        "id": made_of["id"],
        "source": made_of["source"],
        "licence": made_of["licence"],
        "library": backbone.architecture["library"],
        "class": backbone.architecture["class"],
        "parameters": backbone.parameters,
        "layers": backbone.layers,
        "width": backbone.width,
        "image_size": list(backbone.image_size),
        "position_embeddings": backbone.position_embeddings,
        "prefix": list(backbone.prefix),
        "grid": list(backbone.grid),
        "sees": f"{backbone.preprocess.line()} ({made_of['preprocessing']})",
        "vector": backbone.vector,
        "outputs": outputs,
    }


def frozen(network: nn.Module) -> nn.Module:
    """Eval mode (no dropout, no drop path), float32, no gradients."""
    return network.eval().requires_grad_(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator for an initialisation; put back afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def versions(*libraries: str) -> dict[str, str]:
    """Versions of the libraries that compute features, for people and for the canary."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", *libraries)}
