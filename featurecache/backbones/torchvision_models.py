"""Backbones of torchvision: its classification models, with the transforms that belong to their weights.

A network runs its own forward. Of a CNN two things are read on the way: the map that its pooling receives (``tokens``,
row by row) and the vector that the first Linear of its classifier receives (``gap``). When it is loaded, that vector
through the rest of the classifier must give the network's own logits, and be as wide as the map has channels; AlexNet,
VGG (a flattened 7×7 map) and SqueezeNet (no Linear at all) fail this and are refused by name. So any model that
torchvision lists works without an entry anywhere.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, PooledMap, Tokens, freeze, torch_seed, versions
from featurecache.backbones.processors import check_preprocess, from_transforms
from featurecache.backbones.state_dicts import StateDict, first_names, foreign_names, other_shapes
from featurecache.backbones.weights import (
    assumed_feeding,
    download_weights,
    existing_weights,
    read_checkpoint,
    weights_identity,
)
from featurecache.errors import BadOption, OutputRefused, UnknownBackbone, WeightsDoNotFit, nearest
from featurecache.images.preprocessing import Preprocess

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers for training; never part of the forward in eval


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """``where`` is ``<name>`` or ``<name>:<weights>``, as torchvision calls them."""
    name, enum = find_weights(where)
    preprocess = _preprocess(name, enum, request)
    model, positions, weights, taken = _network(name, enum, request, preprocess.size)
    transformer = isinstance(model, Tokens)
    network: Any = model.network
    grid, width = _grid(name, model, preprocess.size)
    # of what a builder decides, what neither its name nor its weights show
    config = {"transform_input": True} if getattr(network, "transform_input", False) else {}
    assumed = assumed_feeding(f"torchvision's {enum}", "--backbone python:MODULE:FACTORY")
    refusals = {"pooler": f"{name} has no pooled vector of its own beside its classifier"}
    refusals |= {"gap": "that is a CNN's"} if transformer else {"cls": f"{name} has no class token; gap is its vector"}
    return Backbone(
        name=request.name if alias else name,
        model=freeze(model),
        architecture={"library": "torchvision", "class": name, "config": config},
        weights=weights,
        preprocess=preprocess,
        image_size=preprocess.size,
        position_embeddings=positions,
        prefix=("cls",) if transformer else (),
        grid=grid,
        width=width,
        layers=len(network.encoder.layers) if transformer else 0,
        vector="cls" if transformer else "gap",
        channels_last=not transformer,
        parameters=sum(p.numel() for p in network.parameters()),
        provenance={
            "provider": "torchvision",
            "id": f"{name}:{enum.name}",
            "revision": Path(enum.url).name,
            "licence": enum.meta.get("license", "BSD-3-Clause"),
            "source": alias.source if alias else enum.meta.get("recipe", ""),
            "preprocessing": f"the transforms of {enum}" if request.weights is None else assumed,
            "attention": None,
            "versions": versions("torchvision"),
            "weights": taken,
            "request": request.portable_arguments(f"torchvision:{name}:{enum.name}"),
        },
        refusals=refusals,
    )


def find_weights(where: str) -> tuple[str, Any]:
    """(name, member of its weights enum); DEFAULT where no weights are named. Raises UnknownBackbone."""
    from torchvision import models

    name, _, version = where.partition(":")
    names = models.list_models(module=models)
    if name not in names:
        raise UnknownBackbone(f'torchvision has no model "{name}" for classification.{nearest(name, names)}')
    enum = models.get_model_weights(name)
    members = {**enum.__members__}
    if version and version not in members:
        raise UnknownBackbone(f'torchvision has no weights "{version}" of {name}; there are {", ".join(members)}')
    return name, members[version] if version else enum.DEFAULT


def _preprocess(name: str, enum: Any, request: BackboneRequest) -> Preprocess:
    transforms = enum.transforms()
    preprocess = from_transforms(transforms)
    check_preprocess(preprocess, transforms, f"torchvision:{name}")
    if request.image_size is not None:
        patch = re.fullmatch(r"vit_\w_(\d+)", name)
        preprocess = preprocess.scaled(request.image_size, int(patch[1]) if patch else 1)
    return preprocess.fitted(request.fit)


def _network(
    name: str, enum: Any, request: BackboneRequest, size: tuple[int, int]
) -> tuple[Any, str, dict[str, Any], str]:
    """(module, position embeddings, what identifies the weights, what of a file was taken)."""
    network, weights = _built(name, enum, request), {"random_seed": request.seed}
    path, taken = existing_weights(request.weights_path), ""
    if not request.untrained or (path and request.meta):
        checkpoint = read_checkpoint(
            path or download_weights(enum.url, f"torchvision's {enum}"), request.weights_name
        ).fitted(f"torchvision:{name}", network.state_dict(), dict(network.named_children()))
        weights, taken = _fill(name, network, checkpoint)
        taken = taken if path else ""
    freeze(network)
    if type(network).__name__ != "VisionTransformer":
        return PooledMap(name, network, _tail(name, network)), "none", weights, taken
    positions = _interpolated(network, size)
    return Tokens(network, "encoder.layers", "encoder.ln", {}, output="encoder"), positions, weights, taken


def _built(name: str, enum: Any, request: BackboneRequest) -> Any:
    """The network as its builder makes it for these weights, untrained; without weights at all for a description."""
    from torchvision import models

    options: dict[str, Any] = {"num_classes": len(enum.meta["categories"])}
    if name in ("googlenet", "inception_v3"):  # the published weights expect inputs normalised another way
        options |= {"transform_input": True, "aux_logits": False, "init_weights": request.random_weights}
    if name.startswith("vit_"):
        options["image_size"] = enum.meta["min_size"][0]
    shapes_only = request.meta and not name.startswith("regnet")  # a RegNet computes its widths with tensors
    made: Any = torch.device("meta") if shapes_only else torch_seed(request.seed)
    with made:
        return models.get_model(name, weights=None, **options)


def _tail(name: str, network: nn.Module) -> list[str]:
    """Names of the modules of the classifier from its first Linear on."""
    head, classifier = list(network.named_children())[-1]
    if isinstance(classifier, nn.Linear):
        return [head]
    layers = list(classifier.named_children())
    first = next((k for k, (_, layer) in enumerate(layers) if isinstance(layer, nn.Linear)), None)
    if first is None:
        raise OutputRefused(
            f"torchvision:{name} cannot be a backbone here: its classifier has no Linear layer, so there is no pooled "
            "vector that it receives"
        )
    return [f"{head}.{key}" for key, _ in layers[first:]]


def _fill(name: str, network: nn.Module, checkpoint: StateDict) -> tuple[dict[str, Any], str]:
    """Load it; return what identifies it, without the classifier, which no output uses, and what of it was taken.

    So a file with another number of classes, or with no classifier, is as good. Raises WeightsDoNotFit.
    """
    behind = (*(f"{path}." for path in _tail(name, network)), *_AUXILIARY)
    own = network.state_dict()
    classifier = {key: value for key, value in checkpoint.tensors.items() if key.startswith(behind)}
    deciding = {key: value for key, value in checkpoint.tensors.items() if key not in classifier}
    checkpoint = replace(checkpoint, tensors=deciding).without_training_parts(own)
    deciding, state = checkpoint.tensors, checkpoint.tensors | classifier
    shapes = other_shapes(deciding, own)
    missing = [key for key in own if key not in state and not key.startswith(behind)]
    missing = [key for key in missing if own[key].is_floating_point()]  # counters of batches decide nothing
    extra = [key for key in deciding if key not in own]
    if shapes or missing or extra:
        what = f"lack {first_names(missing)}" if missing else f"hold {first_names(extra)}, which it has not"
        what = f"have other shapes: {first_names(shapes, 2)}" if shapes else what
        foreign = foreign_names(deciding, "torchvision") if 2 * len(missing) > len(own) else ""
        raise WeightsDoNotFit(f"the weights given are not of torchvision's {name}: they {what}{foreign}")
    fitting = OrderedDict((key, state[key]) for key in own if key in state and state[key].shape == own[key].shape)
    fitting._metadata = own._metadata  # type: ignore[attr-defined]  # MNASNet asks which version they are
    if not next(network.parameters()).is_meta:
        network.load_state_dict(fitting, strict=False)
    decisive = {key: value for key, value in deciding.items() if value.is_floating_point()}
    return weights_identity(f"torchvision:{name}", decisive), checkpoint.line


def _interpolated(network: Any, size: tuple[int, int]) -> str:
    """Fit a VisionTransformer's position embeddings to ``size``, by torchvision's own function (corners aligned)."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    if size == (network.image_size, network.image_size):
        return "as trained"
    state = {"encoder.pos_embedding": network.encoder.pos_embedding.detach()}
    state = interpolate_embeddings(size[0], network.patch_size, state)
    network.encoder.pos_embedding = nn.Parameter(state["encoder.pos_embedding"], requires_grad=False)
    network.image_size = size[0]
    return "interpolated (bicubic, corners aligned)"


def _grid(name: str, model: Any, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """(grid, width); of a CNN by a forward pass of a probe, which is also its logits test."""
    network = model.network
    if isinstance(model, Tokens):
        return (size[0] // network.patch_size, size[1] // network.patch_size), network.hidden_dim
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, *size, generator=generator).to(device)
    try:
        with torch.no_grad():
            feature_map, gap, logits = model.map_gap_logits(pixels)
            through = gap
            for path in model.tail:
                through = network.get_submodule(path)(through)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BadOption(f"torchvision:{name} does not take images of {size[0]}×{size[1]} pixels: {error}") from error
    channels, same = feature_map.shape[1], through.shape == logits.shape
    same = same and (device.type == "meta" or torch.allclose(through, logits, rtol=1e-5, atol=1e-6))
    if gap.shape[1:] != (channels,) or not same:
        raise OutputRefused(
            f"torchvision:{name} cannot be a backbone here: its classifier receives {gap.shape[-1]:,} numbers, which "
            f"are not its pooled map of {channels} channels"
        )
    return (feature_map.shape[2], feature_map.shape[3]), channels
