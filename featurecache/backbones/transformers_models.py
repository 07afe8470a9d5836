"""Backbones of transformers: from the hub, its local cache, a folder, or an alias's record alone.

`transformers_families` knows where the parts of some networks are; a model type that is not in it is measured
(`transformers_generic`).
All else is the library's own: the configuration class, the image processor, the loading with its renaming of old
checkpoints, the forward pass. No code from a repository is ever run.

The configuration without bookkeeping (`plain_config`) and the digest of those tensors that decide features, by their
published names, are hashed into fingerprints: what they hold and how it is spelt is another store.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, FeatureMap, Tokens, freeze, torch_seed, versions
from featurecache.backbones.processors import check_processor, choose_processor, from_processor, has_processor
from featurecache.backbones.state_dicts import StateDict, common_names, first_names, foreign_names
from featurecache.backbones.timm_names import is_timm_folder
from featurecache.backbones.transformers_families import FAMILIES, ModelLayout
from featurecache.backbones.transformers_generic import (
    NO_TOKENS,
    UNPOOLED,
    NetworkParts,
    image_channels,
    interpolates_positions,
    measure,
    plain_config,
    published_tensors,
    sides,
    token_refusals,
    vision_class,
)
from featurecache.backbones.weights import (
    assumed_feeding,
    existing_weights,
    library_errors,
    read_checkpoint,
    snapshot,
    tensor_names,
    weights_file,
    weights_identity,
)
from featurecache.errors import PreprocessingRefused, UnknownBackbone, WeightsDoNotFit, WeightsNotFound
from featurecache.formatting import shell_word
from featurecache.images.preprocessing import Preprocess


@dataclass(frozen=True)
class CheckpointFiles:
    """Where a backbone comes from: a folder of settings, or only an alias's record; and its weights, if it has any."""

    title: str  # for people
    folder: Path | None
    weights: Path | None
    revision: str
    portable_name: str  # finds it from any working directory

    @property
    def short_name(self) -> str:
        """The name of a store: of a repository its last part, else the folder's; of a tuned backbone its run's."""
        if self.revision:
            return self.title.rpartition("/")[2]
        folder = Path(os.path.expanduser(self.title)).resolve()
        return folder.parent.name if folder.name == "backbone" else folder.name


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """``where`` is a repository with or without @revision, or a folder; empty for an alias that has no weights."""
    return load_checkpoint(find_checkpoint(where, request, alias), request, alias)


def load_checkpoint(checkpoint: CheckpointFiles, request: BackboneRequest, alias: Alias | None) -> Backbone:
    with quiet():
        family, config = _configuration(checkpoint, alias)
        preprocess, origin = _preprocess(checkpoint, family, config, request, alias)
        positions = _positions(checkpoint.title, family, config, preprocess.size, request.image_size is not None)
        network, untrained, weights, taken = _network(checkpoint, family, config, request, alias)
        parts = _parts(checkpoint.title, family, network, positions, preprocess.size, untrained)
        freeze(parts.model)
    return Backbone(
        name=request.name if alias else checkpoint.short_name,
        architecture={"library": "transformers", "class": family.model, "config": plain_config(config)},
        weights=weights,
        preprocess=preprocess,
        image_size=preprocess.size,
        position_embeddings=positions,
        vector=next(name for name in ("cls", "gap", "pooler", "mean") if name not in parts.refusals),
        parameters=sum(p.numel() for name, p in network.named_parameters() if name not in untrained),
        provenance={
            "provider": "hf",
            "id": alias.id.removeprefix("hf:") if alias else checkpoint.title,
            "revision": checkpoint.revision,
            "licence": alias.licence if alias else "not known; see where it came from",
            "source": alias.source if alias else "",
            "preprocessing": origin,
            "attention": None if parts.channels_last else getattr(config, "_attn_implementation", None),
            "versions": versions("transformers", "torchvision"),
            "weights": taken if request.weights else "",
            "request": request.portable_arguments(checkpoint.portable_name),
        },
        **vars(parts),
    )


def find_checkpoint(where: str, request: BackboneRequest, alias: Alias | None) -> CheckpointFiles:
    """Where its files are; a repository of the hub is fetched. Raises UnknownBackbone, WeightsNotFound."""
    local = alias is None and os.path.isdir(os.path.expanduser(where))
    folder = existing_weights(Path(os.path.expanduser(where)) if local else None)
    name = f"hf:{folder.resolve()}" if folder is not None else request.name
    weights = existing_weights(request.weights_path)
    if weights is not None and (weights / "config.json").is_file():
        return CheckpointFiles(str(weights), weights, weights, "", name)
    if alias is not None and (request.untrained or weights is not None):
        return CheckpointFiles(str(weights) if weights else where or request.name, None, weights, "", name)
    if folder is not None:
        return CheckpointFiles(str(folder), folder, weights or (None if request.random_weights else folder), "", name)
    repo, _, revision = where.partition("@")
    if repo.startswith(("/", ".", "~")):
        raise UnknownBackbone(f'there is no folder "{repo}"; expected one written by save_pretrained')
    folder, commit = snapshot(repo, revision or None, weights=weights is None and not request.untrained)
    weights = weights or (None if request.random_weights else folder)
    return CheckpointFiles(repo, folder, weights, commit, f"hf:{repo}@{commit}")


def _configuration(checkpoint: CheckpointFiles, alias: Alias | None) -> tuple[ModelLayout, Any]:
    """The family and the resolved configuration of the vision model."""
    import transformers

    folder, title = checkpoint.folder, checkpoint.title
    if folder is None:
        assert alias is not None
        family = FAMILIES[alias.model_type]
        return family, getattr(transformers, family.model).config_class(**alias.config)
    kind = _model_type(folder, title)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's strict configurations have errors of their own
        raise WeightsDoNotFit(f"{folder / 'config.json'} is not a configuration of {kind}: {error}") from error
    whole, tower = config, "encoder" if kind == "vision-encoder-decoder" else "vision_config"
    config = getattr(config, tower, config)
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False  # all that we read
    if (channels := image_channels(config)) not in (1, 3):
        raise WeightsDoNotFit(f"{title} is a network of images of {channels} channels; expected 3, RGB, or 1, grey")
    if getattr(config, "quantization_config", None):
        raise WeightsDoNotFit(f"{title} is quantised; expected plain weights (float32, float16 or bfloat16)")
    if alias is not None:
        _check_same_shape(title, alias, config)
    known = FAMILIES.get(kind) or FAMILIES.get(config.model_type)
    if known is None:
        model, processor, prefix = vision_class(title, config)
        part = prefix if config is whole else "vision_model"
        known = ModelLayout(model, processor, part, positions="its own way", measured=True)
    return replace(known, tower="encoder" if tower == "encoder" else ""), config


def _model_type(folder: Path, title: str) -> str:
    import transformers

    path = folder / "config.json"
    if is_timm_folder(folder):
        raise UnknownBackbone(f"{title} is a network of timm: --backbone {shell_word(f'timm:{title}')}")
    if not path.is_file():
        raise WeightsNotFound(
            f"{folder} has no config.json; expected a folder written by save_pretrained. If it holds weights of a "
            f"known architecture: --backbone NAME --weights {shell_word(folder)}"
        )
    try:
        kind: str = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsDoNotFit(f"{path} is not a configuration in JSON: {error}") from error
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        known = f"transformers {transformers.__version__}"
        raise UnknownBackbone(f'{folder} holds a model of type "{kind}", which {known} does not know')
    return kind


def _check_same_shape(title: str, alias: Alias, config: Any) -> None:
    """--weights FOLDER with an alias: the folder's own configuration counts, but it must be that architecture."""
    import transformers

    expected = getattr(transformers, FAMILIES[alias.model_type].model).config_class
    if isinstance(config, expected):
        keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
        values = {key: getattr(config, key, None) for key in keys}
        differ = [f"{key} {v}, expected {alias.config[key]}" for key, v in values.items() if v != alias.config[key]]
    else:
        differ = [f"a {type(config).__name__}, expected {expected.__name__}"]
    if differ:
        raise WeightsDoNotFit(
            f"{title} is another architecture: {'; '.join(differ)}. As it is: --backbone {shell_word(title)}"
        )


def _preprocess(
    checkpoint: CheckpointFiles, family: ModelLayout, config: Any, request: BackboneRequest, alias: Alias | None
) -> tuple[Preprocess, str]:
    """What the weights' own processor does, checked against it, then fitted as asked; and where it comes from."""
    published = alias if checkpoint.folder is None or request.weights is not None else None
    default = (family.processor, sides(config, "image_size", 224)[0]) if request.untrained else None
    beside = checkpoint.weights if request.weights is not None else None
    if beside is not None and not beside.is_dir():  # settings may lie beside a file
        beside = beside.parent
    folder = beside if beside is not None and has_processor(beside) else checkpoint.folder
    processor, origin = choose_processor(folder, checkpoint.title, published, default)
    if beside is not None and folder is not beside:
        origin = assumed_feeding(request.name, "a preprocessor_config.json beside it")
    with library_errors(f"the image processor of {checkpoint.title} cannot be read", PreprocessingRefused):
        preprocess = from_processor(processor, image_channels(config), request.fit)
    check_processor(preprocess, processor, checkpoint.title)
    if request.image_size is not None:
        patch = sides(config, "patch_size")[0] if family.blocks else 1  # of what is measured it shows
        preprocess = preprocess.scaled(request.image_size, patch)
    return preprocess.fitted(request.fit), origin


def _positions(title: str, family: ModelLayout, config: Any, size: tuple[int, int], sized: bool) -> str:
    """How position embeddings meet images of ``size``; another than the weights' must be asked for (``sized``)."""
    if not (family.blocks or family.measured):
        return "none"
    patch = (1, 1) if family.measured else sides(config, "patch_size")  # of what is measured it shows
    trained = sides(config, "image_size", 1 if family.measured else None)
    made = f"the processor of {title} makes images of {size[0]}×{size[1]} pixels"
    if size[0] % patch[0] or size[1] % patch[1]:
        raise WeightsDoNotFit(f"{made}, not a multiple of the patch of {patch[0]}; give a size with --image-size")
    if size == trained:
        return "as trained"
    if family.measured and not interpolates_positions(config):
        return "its own"
    if not (sized or family.any_size):
        raise WeightsDoNotFit(
            f"{made}, its weights were made for {trained[0]}×{trained[1]}; say which you mean with --image-size"
        )
    return f"interpolated ({family.positions})"


def _network(
    checkpoint: CheckpointFiles, family: ModelLayout, config: Any, request: BackboneRequest, alias: Alias | None
) -> tuple[nn.Module, set[str], dict[str, Any], str]:
    """(network, parameters of the pooled vector without trained values, what identifies the weights, what of a file was
    taken)."""
    import transformers

    cls, path = getattr(transformers, family.model), checkpoint.weights
    shapes_only = request.meta and not (family.measured and path and weights_file(path))
    if path is not None and not shapes_only:
        read = read_checkpoint(path, family.tower if request.weights is None else request.weights_name)
        return _with_weights(read, checkpoint.title, family, cls, config)
    made: Any = torch.device("meta") if request.meta and not family.measured else torch_seed(request.seed)
    with made, _library(checkpoint.title):
        network = cls(config).float()
    if checkpoint.folder is None:
        lacks_pooler = alias is not None and not alias.pooler
    else:
        names = tensor_names(path) if path and weights_file(path) else []
        inside = f"{family.tower or 'vision_model'}."
        lacks_pooler = bool(names) and not family.pooled_names(name.removeprefix(inside) for name in names)
    pooled = family.pooled_names(name for name, _ in network.named_parameters())
    return network, set(pooled if lacks_pooler else ()), {"random_seed": request.seed}, ""


def _with_weights(
    checkpoint: StateDict, title: str, family: ModelLayout, cls: Any, config: Any
) -> tuple[nn.Module, set[str], dict[str, Any], str]:
    """As `_network`. Raises WeightsDoNotFit: other shapes, other missing tensors, more blocks than asked for."""
    with torch.device("meta"), _library(title):
        empty = cls(config)
    own = empty.state_dict()
    if family.measured:  # its file has published names, or those in memory
        published = published_tensors(empty, own)
        own = published if common_names(checkpoint.tensors, published) >= common_names(checkpoint.tensors, own) else own
    own = {family.published_name(name): tensor for name, tensor in own.items()}
    checkpoint = checkpoint.fitted_part(title, family.part, own)
    state = checkpoint.tensors
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    with _library(title):
        network, info = cls.from_pretrained(None, config=config, state_dict=dict(state), **options)
    shapes = [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in info["mismatched_keys"]]
    if shapes:
        others = first_names(shapes, 2)
        raise WeightsDoNotFit(f"the weights of {title} have other shapes than its architecture: {others}")
    missing = {family.published_name(name) for name in info["missing_keys"] if "mask_token" not in name}  # never used
    pooled = missing if family.measured else set(family.pooled_names(missing))
    if missing - pooled:
        raise WeightsDoNotFit(
            f"the weights of {title} lack {len(missing - pooled)} tensors of {family.model}: "
            f"{first_names(missing - pooled)}; they hold {first_names(state)}{foreign_names(state, 'hf')}"
        )
    unused = {family.published_name(name) for name in info["unexpected_keys"]}
    parts = {name.partition(".")[0] for name in own}  # what stands beside them (a SAM's decoder) is another network
    blocks = [
        name for name in unused if re.search(r"\.\d+\..*(weight|bias)$", name) and name.partition(".")[0] in parts
    ]
    if blocks:
        raise WeightsDoNotFit(f"the weights of {title} have more than its configuration says: {first_names(blocks)}")
    if family.measured:
        published = published_tensors(empty, network.state_dict())
        lacking = {name: tensor for name, tensor in network.state_dict().items() if name in info["missing_keys"]}
        aside = set(published_tensors(empty, lacking))
    else:
        published, aside = {family.published_name(name): tensor for name, tensor in state.items()}, unused
    # integers do not decide features: indices of positions, counters of batches, only in some files
    deciding = {name: tensor for name, tensor in published.items() if name not in aside and tensor.is_floating_point()}
    checkpoint = checkpoint.noted(*[f"not used: {first_names(unused)}"] * bool(unused))
    return network, pooled, weights_identity(title, deciding), checkpoint.line


def _library(title: str) -> AbstractContextManager[None]:
    return library_errors(f"transformers cannot make the network of {title} as its settings say")


def _parts(
    title: str, family: ModelLayout, network: Any, positions: str, size: tuple[int, int], untrained: set[str]
) -> NetworkParts:
    """The network read by hooks, or measured."""
    if family.measured:
        return measure(title, network, size, positions.startswith("inter"), untrained)
    config, modules = network.config, {name for name, _ in network.named_modules()}
    if not family.blocks:
        pixels = torch.zeros(1, image_channels(config), *size, device=next(network.parameters()).device)
        with torch.no_grad(), _library(title):
            _, channels, height, width = freeze(network)(pixels).last_hidden_state.shape
        return NetworkParts(FeatureMap(network), (), (height, width), channels, 0, True, NO_TOKENS)
    options = {"interpolate_pos_encoding": True} if positions.startswith("inter") and not family.any_size else {}
    model = Tokens(network, next(path for path in family.blocks if path in modules), family.norm, options)
    registers = tuple(f"reg{k}" for k in range(getattr(config, "num_register_tokens", 0)))
    patch, layers = sides(config, "patch_size"), config.num_hidden_layers
    grid = (size[0] // patch[0], size[1] // patch[1])
    headless = not getattr(config, "vision_use_head", True)  # a SigLIP can be configured so
    # of random parameters a pooled vector means nothing
    refusals = token_refusals(family.prefix, UNPOOLED.format(title) if headless or untrained else "")
    return NetworkParts(model, family.prefix + registers, grid, config.hidden_size, layers, False, refusals)


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
