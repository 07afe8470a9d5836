"""Load_backbone: from a name to a Backbone; what info --backbone shows.

A frozen network with its preprocessing, what it can give, and how it is found by name.

Names: an alias (`aliases` beside this); ``hf:<repo or folder>[@revision]``; a folder written by ``save_pretrained``;
``torchvision:<name>[:<weights>]``; ``timm:<name>``; ``python:<module>:<factory>``, a network of the user's own.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from featurecache.backbones import timm_models, torchvision_models, transformers_models, user_module
from featurecache.backbones.aliases import ALIASES
from featurecache.backbones.base import OUTPUTS, Backbone, BackboneRequest
from featurecache.backbones.timm_models import is_timm
from featurecache.errors import BadOption, UnknownBackbone, WeightsNotFound, nearest
from featurecache.images.preprocessing import FITS

FORMS = "hf:<repo or folder>, torchvision:<name>, timm:<name>, python:<module>:<factory>, or a checkpoint's folder"


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
    return _load(
        BackboneRequest(name, str(weights) if weights is not None else None, random_weights, seed, image_size, fit)
    )


def _load(request: BackboneRequest) -> Backbone:
    name, alias = request.name, ALIASES.get(request.name)
    if alias is not None and not alias.id and not request.untrained:
        raise WeightsNotFound(f"{name} was never trained; it exists only with --random-weights")
    where = alias.id if alias else name
    if where.startswith("python:"):
        return user_module.load(where.removeprefix("python:"), request)
    if where.startswith("torchvision:"):
        return torchvision_models.load(where.removeprefix("torchvision:"), request, alias)
    if where.startswith(("timm:", "hf:timm/")) or _is_timm(where.removeprefix("hf:")):
        return timm_models.load(where.removeprefix("hf:").removeprefix("timm:"), request, alias)
    if where.startswith("hf:") or (alias and not where) or os.path.isdir(os.path.expanduser(where)):
        return transformers_models.load(where.removeprefix("hf:"), request, alias)
    raise unknown(where)


def _is_timm(folder: str) -> bool:
    """A folder of weights with settings as timm writes them."""
    path = Path(os.path.expanduser(folder))
    if not folder or not path.is_dir():
        return False
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


def load_without_weights(name: str, **options: Any) -> Backbone:
    """A backbone without its weights, in no memory: its shapes and its preprocessing."""
    return _load(BackboneRequest(name, meta=True, **options))


def describe(backbone: Backbone | str, **options: Any) -> dict[str, Any]:
    """What ``info --backbone`` shows. A name needs no weights: an alias is built without any, in no memory."""
    if isinstance(backbone, str):
        backbone = load_without_weights(backbone, **options)
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
