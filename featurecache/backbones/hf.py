"""Backbones of transformers: from the hub, its local cache, a folder, or an alias's record alone.

Everything but our table of families is the library's own: the configuration class, the image processor, the loading
with its renaming of old checkpoints, the forward pass. No code from a repository is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones import Backbone, Request, frozen, seeded, versions
from featurecache.backbones.aliases import Alias
from featurecache.backbones.checkpoints import load_network, pooled_names
from featurecache.backbones.configurations import configuration, pair, plain
from featurecache.backbones.families import Family, inner
from featurecache.backbones.networks import Map, Tokens
from featurecache.backbones.processors import (
    check_processor,
    default_processor,
    from_processor,
    has_processor,
    own_processor,
)
from featurecache.backbones.weights import snapshot, tensor_names, weights_file
from featurecache.errors import PreprocessingRefused, UnknownBackbone, WeightsDoNotFit, WeightsNotFound
from featurecache.preprocess import Preprocess


@dataclass(frozen=True)
class Found:
    """Where a backbone comes from: a folder of settings, or only an alias's record; and its weights, if it has any."""

    title: str  # for people
    folder: Path | None
    weights: Path | None
    revision: str
    again: str  # the name that finds it again from anywhere


def load(where: str, request: Request, alias: Alias | None) -> Backbone:
    """``where`` is a repository with or without @revision, or a folder; empty for an alias that has no weights."""
    found = _find(where, request, alias)
    with quiet():
        family, config = configuration(found.folder, found.title, alias)
        preprocess, origin = _preprocess(found, family, config, request, alias)
        positions = _positions(found, family, config, preprocess.size, asked=request.image_size is not None)
        network, lacking, weights = _network(found, family, config, request, alias)
        model = _wrapped(family, network, positions)
        prefix, grid, width, layers = _geometry(family, model, preprocess.size)
    headless = not getattr(config, "vision_use_head", True)  # a SigLIP can be configured so
    refused = _refused(found, family, headless or bool(lacking))
    vector = "gap" if not family.blocks else next(v for v in ("cls", "pooler", "mean") if v not in refused)
    return Backbone(
        name=request.name if alias else _short(found),
        model=frozen(model),
        architecture={"library": "transformers", "class": family.model, "config": plain(config)},
        weights=weights,
        preprocess=preprocess,
        image_size=preprocess.size,
        position_embeddings=positions,
        prefix=prefix,
        grid=grid,
        width=width,
        layers=layers,
        vector=vector,
        channels_last=not family.blocks,
        parameters=sum(p.numel() for name, p in network.named_parameters() if name not in lacking),
        provenance={
            "provider": "hf",
            "id": alias.id.removeprefix("hf:") if alias else found.title,
            "revision": found.revision,
            "licence": alias.licence if alias else "not known; see where it came from",
            "source": alias.source if alias else "",
            "preprocessing": origin,
            "attention": getattr(config, "_attn_implementation", None) if family.blocks else None,
            "versions": versions("transformers", "torchvision"),
            "request": request.again(found.again),
        },
        refused=refused,
    )


def _find(where: str, request: Request, alias: Alias | None) -> Found:
    local = alias is None and os.path.isdir(os.path.expanduser(where))
    folder = Path(os.path.expanduser(where)) if local else None
    again = f"hf:{folder.resolve()}" if folder is not None else request.name
    given = Path(os.path.expanduser(request.weights)) if request.weights is not None else None
    if given is not None and not given.exists():
        raise WeightsNotFound(f"--weights {given}: there is no such file or folder")
    if given is not None and (given / "config.json").is_file():
        return Found(str(given), given, given, "", again)
    if alias is not None and (request.untrained or given is not None):
        return Found(str(given) if given else where or request.name, None, given, "", again)
    if folder is not None:
        return Found(str(folder), folder, given or (None if request.random_weights else folder), "", again)
    repo, _, revision = where.partition("@")
    if repo.startswith(("/", ".", "~")):
        raise UnknownBackbone(f'there is no folder "{repo}"; expected one written by save_pretrained')
    folder, commit = snapshot(repo, revision or None, weights=given is None and not request.untrained)
    return Found(repo, folder, given or (None if request.random_weights else folder), commit, f"hf:{repo}@{commit}")


def _preprocess(
    found: Found, family: Family, config: Any, request: Request, alias: Alias | None
) -> tuple[Preprocess, str]:
    """What the weights' own processor does, checked against it, then fitted as asked; and where it comes from."""
    import transformers

    if found.folder is not None and has_processor(found.folder):
        processor, origin = own_processor(found.folder, found.title), "the checkpoint's own processor"
    elif alias is not None and (found.folder is None or request.weights is not None):
        settings = dict(alias.processor)
        processor = getattr(transformers, settings.pop("image_processor_type"))(**settings)
        origin = "as published with its weights" if alias.id else "its own settings"
    elif request.untrained:
        size = pair(getattr(config, "image_size", 224))[0]
        processor, origin = default_processor(family.processor, size), "the default of its model type"
    else:
        raise PreprocessingRefused(
            f"{found.title} has no preprocessor_config.json, so how its images were prepared is not known; expected "
            "the file that belongs to the weights (processor.save_pretrained writes it)"
        )
    preprocess = from_processor(processor)
    check_processor(preprocess, processor, found.title)
    if request.image_size is not None:
        patch = pair(config.patch_size)[0] if family.blocks else 1
        preprocess = preprocess.scaled(request.image_size, patch)
    return preprocess.fitted(request.fit), origin


def _positions(found: Found, family: Family, config: Any, size: tuple[int, int], *, asked: bool) -> str:
    """How position embeddings meet images of ``size``; a size nobody asked for that the weights have not is refused."""
    if not family.blocks:
        return "none"
    patch, trained = pair(config.patch_size), pair(config.image_size)
    made = f"the processor of {found.title} makes images of {size[0]}×{size[1]} pixels"
    if size[0] % patch[0] or size[1] % patch[1]:
        raise WeightsDoNotFit(f"{made}, not a multiple of the patch of {patch[0]}; give a size with --image-size")
    if size == trained:
        return "as trained"
    if not (asked or family.always):
        raise WeightsDoNotFit(
            f"{made}, its weights were made for {trained[0]}×{trained[1]}; say which you mean with --image-size"
        )
    return f"interpolated ({family.positions})"


def _network(
    found: Found, family: Family, config: Any, request: Request, alias: Alias | None
) -> tuple[nn.Module, set[str], dict[str, Any]]:
    """(network, parameters of the pooled vector without trained values, what identifies the weights)."""
    import transformers

    cls = getattr(transformers, family.model)
    if found.weights is not None and not request.meta:
        return load_network(found.weights, found.title, family, config)
    if request.meta:
        with torch.device("meta"):
            network = cls(config)
    else:
        with seeded(request.seed):
            network = cls(config).float()
    pooled = set(pooled_names((name for name, _ in network.named_parameters()), family))
    if found.folder is None:
        lacking = alias is not None and not alias.pooler
    else:
        held = tensor_names(found.weights) if found.weights is not None and weights_file(found.weights) else None
        lacking = held is not None and not pooled_names(held, family)
    return network, pooled if lacking else set(), {"random_seed": request.seed}


def _wrapped(family: Family, network: Any, positions: str) -> nn.Module:
    if not family.blocks:
        return Map(network)
    options = {"interpolate_pos_encoding": True} if positions.startswith("inter") and not family.always else {}
    return Tokens(network, inner(network, family.blocks), family.norm, options)


def _geometry(family: Family, model: Any, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int], int, int]:
    """(prefix, grid, width, layers)"""
    config = model.network.config
    if family.blocks:
        patch = pair(config.patch_size)
        registers = tuple(f"reg{k}" for k in range(getattr(config, "num_register_tokens", 0)))
        grid = (size[0] // patch[0], size[1] // patch[1])
        return family.prefix + registers, grid, config.hidden_size, config.num_hidden_layers
    pixels = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    with torch.no_grad():
        found = frozen(model.network)(pixels).last_hidden_state
    return (), (found.shape[2], found.shape[3]), found.shape[1], 0


def _refused(found: Found, family: Family, unpooled: bool) -> dict[str, str]:
    """Output -> why there is none. A pooled vector from random parameters means nothing."""
    if not family.blocks:
        return {"cls": "a CNN has no class token; gap is its vector", "pooler": "a CNN's vector is gap"}
    refused = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    if "cls" not in family.prefix:
        refused["cls"] = "it has no class token"
    if unpooled:
        refused["pooler"] = f"{found.title} was saved without the weights of its pooler, and random ones mean nothing"
    return refused


def _short(found: Found) -> str:
    """The name of a store: of a repository its last part, else the folder's; of a tuned backbone its run's."""
    if found.revision:
        return found.title.rpartition("/")[2]
    folder = Path(os.path.expanduser(found.title)).resolve()
    return folder.parent.name if folder.name == "backbone" else folder.name


@contextmanager
def quiet() -> Iterator[None]:
    """The library prints missing tensors as tables and draws bars on stderr; what matters of it we say ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
