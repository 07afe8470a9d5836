"""Loading a backbone by its name (`load_backbone`), and what ``info --backbone`` says of it (`describe_backbone`).

Names: an alias (`featurecache.backbones.aliases`); ``hf:<repo or folder>[@revision]``; a folder written by
``save_pretrained``; ``torchvision:<name>[:<weights>]``; ``timm:<name>``, or ``hf-hub:<repo>`` as timm writes it;
``python:<module>:<factory>``, a network of the user's own. To add one: a short name is an entry in ``ALIASES``
(`aliases`); every model of torchvision and timm and every vision model of transformers is there already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import timm_models, torchvision_models, transformers_models, user_module
from featurecache.backbones.aliases import ALIASES
from featurecache.backbones.base import OUTPUTS, Backbone, BackboneRequest
from featurecache.backbones.layers import layer_rows
from featurecache.backbones.remembered import published_weights, remembered_or_loaded
from featurecache.backbones.timm_names import is_timm_folder
from featurecache.errors import BadOption, UnknownBackbone, WeightsNotFound, nearest
from featurecache.formatting import shell_word, timed_part
from featurecache.images.preprocessing import FITS

FORMS = "hf:<repo or folder>, torchvision:<name>, timm:<name>, python:<module>:<factory>, or a checkpoint's folder"


@exact_arithmetic()
def load_backbone(
    name: str | Path,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    fit: str = "model",
    remembered: bool = False,
) -> Backbone:
    """Find, load and check a backbone. ``remembered``: load its network when it is first asked for, where this machine
    knows what it is (`featurecache.backbones.remembered`).

    >>> load_backbone("vit-in21k").grid                                                  # doctest: +SKIP
    (14, 14)

    Raises: UnknownBackbone, WeightsNotFound, WeightsDoNotFit, PreprocessingRefused, OutputRefused, BadOption.
    """
    if weights is not None and random_weights:
        raise BadOption("--weights and --random-weights contradict each other; give one of them")
    if fit not in FITS:
        raise BadOption(f'--fit "{fit}" is not one of {", ".join(FITS)}')
    if not isinstance(name, str | os.PathLike):
        raise BadOption(f"a backbone is named by a text or a path, not by {type(name).__name__}; {FORMS}.")
    weights = str(weights) if weights is not None else None
    request = BackboneRequest(os.fspath(name), weights, random_weights, seed, image_size, fit)
    return _load(request, remembered)


@timed_part("backbone")
def _load(request: BackboneRequest, remembered: bool = False) -> Backbone:
    name, alias = request.name, ALIASES.get(request.name)
    if alias is not None and not alias.id and not request.untrained:
        raise WeightsNotFound(f"{name} was never trained; it exists only with --random-weights")
    load, path = _loader(name)
    if load is user_module.load:
        return load(path, request)
    return remembered_or_loaded(load, path, request, alias) if remembered else load(path, request, alias)


def check_name(name: str | Path) -> None:
    """Raises UnknownBackbone for a name in none of the forms, or that its library has not, with the nearest; BadOption
    without the library. Folders and repositories are looked at when they are loaded."""
    if not isinstance(name, str | os.PathLike):
        return
    load, path = _loader(os.fspath(name))
    if load is torchvision_models.load:
        published_weights("torchvision", path)
    elif load is timm_models.load and "/" not in path and not os.path.isdir(os.path.expanduser(path)):
        published_weights("timm", path.partition("@")[0])


def _loader(name: str) -> tuple[Callable[..., Backbone], str]:
    """What loads a backbone of this name, and its name there."""
    alias = ALIASES.get(name)
    where = alias.id if alias else name
    if prefix := re.fullmatch(r"(timm|torchvision|hf|hf[-_]hub):[\s/@:]*", where):
        raise UnknownBackbone(f'--backbone "{name}" names no network behind "{prefix[1]}:"; expected {FORMS}')
    if where.startswith("python:"):
        return user_module.load, where.removeprefix("python:")
    if where != (repo := re.sub("^(timm:)?hf[-_]hub:", "", where)):  # as timm writes a repository of the hub
        return timm_models.load, repo
    if where.startswith("torchvision:"):
        return torchvision_models.load, where.removeprefix("torchvision:")
    path = where.removeprefix("hf:")
    if where.startswith(("timm:", "hf:timm/")) or (path and is_timm_folder(Path(os.path.expanduser(path)))):
        return timm_models.load, path.removeprefix("timm:")
    if where.startswith("hf:") or (alias and not where) or os.path.isdir(os.path.expanduser(where)):
        return transformers_models.load, path
    raise _unknown(where)


def _unknown(name: str) -> UnknownBackbone:
    """What to say of a name in none of the forms."""
    if os.path.isfile(os.path.expanduser(name)):
        return UnknownBackbone(
            f"{name} is a file of weights; say what they are of: --backbone NAME --weights {shell_word(name)}"
        )
    if name.startswith(("/", "./", "../", "~")):
        return UnknownBackbone(f'there is no folder "{name}"; expected one written by save_pretrained')
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return UnknownBackbone(f'no folder is called "{name}"; a repository of the hub is written hf:{name}')
    return UnknownBackbone(f'no backbone is called "{name}".{nearest(name, ALIASES)} Others: {FORMS}.')


def load_without_weights(name: str, **options: Any) -> Backbone:
    """A backbone without its weights, in no memory: its shapes and its preprocessing."""
    return _load(BackboneRequest(name, meta=True, **options))


@exact_arithmetic()
def describe_backbone(backbone: Backbone | str, **options: Any) -> dict[str, Any]:
    """What ``info --backbone`` shows. A name needs no weights: an alias is built without any, in no memory; with it
    come the layers (`layers.layer_rows`)."""
    modules: dict[str, Any] = {}
    if isinstance(backbone, str):
        backbone = load_without_weights(backbone, **options)
        network: Any = backbone.model.network
        modules = {"modules": layer_rows(network, backbone.model, (backbone.preprocess.channels, *backbone.image_size))}
    tokens = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    outputs: dict[str, dict[str, Any]] = {}
    for name in OUTPUTS:
        shape = [tokens, backbone.width] if name == "tokens" else [backbone.width]
        outputs[name] = {"refused": backbone.refusals[name]} if name in backbone.refusals else {"shape": shape}
    return {
        "name": backbone.name,
        **{key: backbone.provenance[key] for key in ("id", "source", "licence")},
        **{key: backbone.architecture[key] for key in ("library", "class")},
        **{key: getattr(backbone, key) for key in ("parameters", "layers", "width")},
        "image_size": list(backbone.image_size),
        "position_embeddings": backbone.position_embeddings,
        "prefix": list(backbone.prefix),
        "grid": list(backbone.grid),
        "sees": f"{backbone.preprocess.line()} ({backbone.provenance['preprocessing']})",
        "weights": backbone.provenance.get("weights", ""),
        "vector": backbone.vector,
        "outputs": outputs,
        **modules,
    }
