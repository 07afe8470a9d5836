"""Networks of the package transformers.

Backbones of transformers: from the hub, its local cache, a folder, or an alias's record alone.

Everything but our table of families is the library's own: the configuration class, the image processor, the loading
with its renaming of old checkpoints, the forward pass. No code from a repository is ever run.

A model's configuration: from a folder or an alias's record, resolved by the library, kept as plain JSON.

A checkpoint's tensors into a network of transformers: what is missing, what does not fit, and the digest.

The model types of transformers we read: one record each says where the parts of a network are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, frozen, seeded, versions
from featurecache.backbones.processors import (
    check_processor,
    default_processor,
    from_processor,
    has_processor,
    own_processor,
)
from featurecache.backbones.weights import digest, read_state_dict, snapshot, tensor_names, weights_file
from featurecache.backbones.wrappers import Map, Tokens
from featurecache.errors import PreprocessingRefused, UnknownBackbone, WeightsDoNotFit, WeightsNotFound
from featurecache.formatting import abbreviated
from featurecache.images.preprocessing import Preprocess


@dataclass(frozen=True)
class ResolvedBackbone:
    """Where a backbone comes from: a folder of settings, or only an alias's record; and its weights, if it has any."""

    title: str  # for people
    folder: Path | None
    weights: Path | None
    revision: str
    again: str  # the name that finds it again from anywhere


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
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


def _find(where: str, request: BackboneRequest, alias: Alias | None) -> ResolvedBackbone:
    local = alias is None and os.path.isdir(os.path.expanduser(where))
    folder = Path(os.path.expanduser(where)) if local else None
    again = f"hf:{folder.resolve()}" if folder is not None else request.name
    given = Path(os.path.expanduser(request.weights)) if request.weights is not None else None
    if given is not None and not given.exists():
        raise WeightsNotFound(f"--weights {given}: there is no such file or folder")
    if given is not None and (given / "config.json").is_file():
        return ResolvedBackbone(str(given), given, given, "", again)
    if alias is not None and (request.untrained or given is not None):
        return ResolvedBackbone(str(given) if given else where or request.name, None, given, "", again)
    if folder is not None:
        return ResolvedBackbone(str(folder), folder, given or (None if request.random_weights else folder), "", again)
    repo, _, revision = where.partition("@")
    if repo.startswith(("/", ".", "~")):
        raise UnknownBackbone(f'there is no folder "{repo}"; expected one written by save_pretrained')
    folder, commit = snapshot(repo, revision or None, weights=given is None and not request.untrained)
    return ResolvedBackbone(
        repo, folder, given or (None if request.random_weights else folder), commit, f"hf:{repo}@{commit}"
    )


def _preprocess(
    found: ResolvedBackbone, family: ModelLayout, config: Any, request: BackboneRequest, alias: Alias | None
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


def _positions(found: ResolvedBackbone, family: ModelLayout, config: Any, size: tuple[int, int], *, asked: bool) -> str:
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
    found: ResolvedBackbone, family: ModelLayout, config: Any, request: BackboneRequest, alias: Alias | None
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


def _wrapped(family: ModelLayout, network: Any, positions: str) -> nn.Module:
    if not family.blocks:
        return Map(network)
    options = {"interpolate_pos_encoding": True} if positions.startswith("inter") and not family.always else {}
    return Tokens(network, inner(network, family.blocks), family.norm, options)


def _geometry(
    family: ModelLayout, model: Any, size: tuple[int, int]
) -> tuple[tuple[str, ...], tuple[int, int], int, int]:
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


def _refused(found: ResolvedBackbone, family: ModelLayout, unpooled: bool) -> dict[str, str]:
    """Output -> why there is none. A pooled vector from random parameters means nothing."""
    if not family.blocks:
        return {"cls": "a CNN has no class token; gap is its vector", "pooler": "a CNN's vector is gap"}
    refused = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    if "cls" not in family.prefix:
        refused["cls"] = "it has no class token"
    if unpooled:
        refused["pooler"] = f"{found.title} was saved without the weights of its pooler, and random ones mean nothing"
    return refused


def _short(found: ResolvedBackbone) -> str:
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


# Of a configuration, what decides no feature: names, paths, versions, labels, how the library is to be used; and one
# that transformers 5.17 does not list: whether a SigLIP has its head shows in the weights.
_BOOKKEEPING = {
    "_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "model_type",
    "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
    "chunk_size_feed_forward", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
    "vision_use_head",
}  # fmt: skip


def configuration(folder: Path | None, title: str, alias: Alias | None) -> tuple[ModelLayout, Any]:
    """The family and the resolved configuration of the vision model."""
    import transformers

    if folder is None:
        assert alias is not None
        family = FAMILIES[alias.model_type]
        return family, _config_class(family)(**alias.config)
    family, kind = _family(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's strict configurations have errors of their own
        raise WeightsDoNotFit(f"{folder / 'config.json'} is not a configuration of {kind}: {error}") from error
    config = getattr(config, "vision_config", config)
    if getattr(config, "quantization_config", None):
        raise WeightsDoNotFit(f"{title} is quantised; expected plain weights (float32, float16 or bfloat16)")
    if alias is not None:
        _same_shape(title, alias, config)
    return family, config


def _family(folder: Path) -> tuple[ModelLayout, str]:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsNotFound(
            f"{folder} has no config.json; expected a folder written by save_pretrained. If it holds weights of a "
            f"known architecture: --backbone NAME --weights {folder}"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsDoNotFit(f"{path} is not a configuration in JSON: {error}") from error
    if kind not in FAMILIES:
        raise UnknownBackbone(f'{folder} holds a model of type "{kind}"; expected one of {", ".join(FAMILIES)}')
    return FAMILIES[kind], kind


def _config_class(family: ModelLayout) -> Any:
    import transformers

    return getattr(transformers, family.model).config_class


def _same_shape(title: str, alias: Alias, config: Any) -> None:
    """--weights FOLDER with an alias: the folder's own configuration counts, but it must be that architecture."""
    kind = _config_class(FAMILIES[alias.model_type])
    keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    differ = [f"{key} {getattr(config, key, None)}, expected {alias.config[key]}" for key in keys]
    differ = [text for key, text in zip(keys, differ, strict=True) if getattr(config, key, None) != alias.config[key]]
    if not isinstance(config, kind) or differ:
        what = "; ".join(differ) if isinstance(config, kind) else f"a {type(config).__name__}, expected {kind.__name__}"
        raise WeightsDoNotFit(f"{title} is another architecture: {what}. As it is: --backbone {title}")


def plain(config: Any) -> dict[str, Any]:
    """The resolved configuration as canonical JSON holds it: the keys that its class knows, without bookkeeping."""
    known = type(config)().to_dict()
    data = {key: value for key, value in config.to_dict().items() if key in known and key not in _BOOKKEEPING}
    canonical: dict[str, Any] = json.loads(json.dumps(data))
    return canonical


def pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def load_network(
    path: Path, title: str, family: ModelLayout, config: Any
) -> tuple[nn.Module, set[str], dict[str, Any]]:
    """(network, parameters of the pooled vector that the checkpoint had not, what identifies the weights).

    Raises WeightsDoNotFit for other shapes, for other missing tensors, and for more blocks than were asked for.
    """
    import transformers

    state = _part(read_state_dict(path), family)
    network, info = getattr(transformers, family.model).from_pretrained(
        None, config=config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )  # fmt: skip
    shapes = [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in info["mismatched_keys"]]
    if shapes:
        raise WeightsDoNotFit(
            f"the weights of {title} have other shapes than its architecture: {abbreviated(shapes, 2)}"
        )
    missing = {published(name, family) for name in info["missing_keys"] if "mask_token" not in name}  # never used
    pooled = set(pooled_names(missing, family))
    if missing - pooled:
        raise WeightsDoNotFit(
            f"the weights of {title} lack {len(missing - pooled)} tensors of {family.model}: "
            f"{abbreviated(missing - pooled, 3)}; they hold {abbreviated(sorted(state), 3)}"
        )
    unused = {published(name, family) for name in info["unexpected_keys"]}
    blocks = [name for name in unused if re.search(r"\.\d+\..*(weight|bias)$", name)]
    if blocks:
        raise WeightsDoNotFit(f"the weights of {title} have more than its configuration says: {abbreviated(blocks, 3)}")
    return network, pooled, {"blake2b": digest(_deciding(state, family, unused))}


def published(name: str, family: ModelLayout) -> str:
    """The name that a tensor of the backbone has in published checkpoints, from any name it goes by."""
    name = name.removeprefix(family.part + ".")
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def pooled_names(names: Iterable[str], family: ModelLayout) -> list[str]:
    """Those of ``names`` that belong to the pooled vector alone."""
    if not family.pooled:
        return []
    return [name for name in names if published(name, family).startswith(family.pooled)]


def _part(state: dict[str, torch.Tensor], family: ModelLayout) -> dict[str, torch.Tensor]:
    """The backbone's own tensors out of those of a classifier or a whole CLIP, without their prefix; also where a
    network of the user's own holds that (``model.vit.``)."""
    prefix = family.part + "."
    if not any(name.startswith(prefix) for name in state):
        outer = {name[: name.index(f".{prefix}") + 1] for name in state if f".{prefix}" in name}
        prefix = outer.pop() + prefix if len(outer) == 1 else prefix
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return part or state


def _deciding(state: dict[str, torch.Tensor], family: ModelLayout, unused: set[str]) -> dict[str, torch.Tensor]:
    """Those that decide features. Integers do not: indices of positions, counters of batches, only in some files."""
    named = {published(name, family): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and name not in unused}


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of one model type are. A CNN has no blocks: it gives a map and the pooled map."""

    model: str  # class in transformers
    processor: str  # its image processor, used with untrained weights where a folder has none
    part: str  # checkpoints of larger models carry its tensors under this prefix
    blocks: tuple[str, ...] = ()  # where the list of blocks is, by version of transformers
    norm: str = ""  # between the last block and last_hidden_state
    prefix: tuple[str, ...] = ("cls",)
    pooled: str = ""  # parameters of the pooled vector begin so; a checkpoint may lack them
    positions: str = "bicubic"  # how position embeddings are interpolated
    always: bool = False  # ... at any size, unasked
    renamed: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # names in memory -> names in checkpoints


# Checkpoints keep the names of their first publication; transformers renames while loading, differently from version
# to version. Digests go by the published names, so a state dict that was saved from memory is brought back to them.
_ATTENTION = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_VIT = (
    (r"^layers\.(\d+)\.relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"^layers\.", "encoder.layer."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *_ATTENTION,
)
_LAYERS, _LAYER = ("layers", "encoder.layer"), ("encoder.layer",)
_TOWER = ("encoder.layers", "vision_model.encoder.layers")

_CLIP = ModelLayout("CLIPVisionModel", "CLIPImageProcessor", "vision_model", _TOWER, pooled="post_layernorm.")
_SIGLIP = ModelLayout(
    "SiglipVisionModel", "SiglipImageProcessor", "vision_model", _TOWER, "post_layernorm", (), "head."
)
FAMILIES: dict[str, ModelLayout] = {
    "vit": ModelLayout("ViTModel", "ViTImageProcessor", "vit", _LAYERS, "layernorm", pooled="pooler.", renamed=_VIT),
    "deit": ModelLayout(
        "DeiTModel", "DeiTImageProcessor", "deit", _LAYERS, "layernorm", ("cls", "dist"), "pooler.", renamed=_VIT
    ),
    "beit": ModelLayout(
        "BeitModel",
        "BeitImageProcessor",
        "beit",
        _LAYERS,
        "layernorm",
        pooled="pooler.",
        positions="relative, bilinear",
        renamed=_VIT,
    ),
    "dinov2": ModelLayout(
        "Dinov2Model", "BitImageProcessor", "dinov2", _LAYER, "layernorm", always=True, renamed=_ATTENTION
    ),
    "dinov2_with_registers": ModelLayout(
        "Dinov2WithRegistersModel",
        "BitImageProcessor",
        "dinov2_with_registers",
        _LAYER,
        "layernorm",
        always=True,
        renamed=_ATTENTION,
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "resnet": ModelLayout("ResNetModel", "ConvNextImageProcessor", "resnet", prefix=()),
    "convnext": ModelLayout("ConvNextModel", "ConvNextImageProcessor", "convnext", prefix=()),
    "convnextv2": ModelLayout("ConvNextV2Model", "ConvNextImageProcessor", "convnextv2", prefix=()),
}


def inner(network: nn.Module, paths: tuple[str, ...]) -> str:
    """The first of ``paths`` that is there."""
    modules = {name for name, _ in network.named_modules()}
    return next(path for path in paths if path in modules)
