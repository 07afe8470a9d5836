"""Backbones of timm: any of its image models, with the data config that belongs to the weights.

A name is timm's own (``vit_base_patch16_224``, with or without a tag of its weights), ``<owner>/<repo>`` of the hub,
each with or without @revision, or a folder with a config.json as timm writes it. No model needs an entry anywhere: what
a network gives is inferred from its own attributes and shapes, before there are weights. A map [B,C,h,w] is a CNN's:
``tokens`` row by row, and ``gap``. [B,T,D] is a transformer's: ``tokens``, and ``pooler`` where its vector is neither
the class token nor the mean of the patches. One that does not say which rows are patches keeps its vector only.

Weights are read without running code, then renamed and loaded by timm itself, strictly. Settings saved with them lead
nowhere: no address, no file, no code of theirs is followed. The classifier is taken away. A folder whose settings say
one channel is fed grey images, normalised as timm's loaders do it: by the average of the three constants of RGB.

Axis letters: B batch, T tokens, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
import math
import statistics
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, TimmMap, TimmTokens, freeze, torch_seed, versions
from featurecache.backbones.processors import channel_constants, check_preprocess, from_timm
from featurecache.backbones.state_dicts import StateDict, Tensors, foreign_names, other_shapes
from featurecache.backbones.timm_names import TimmModel, as_tuple, check_timm, find_model
from featurecache.backbones.weights import library_errors, read_checkpoint, weights_identity
from featurecache.errors import BadOption, OutputRefused, PreprocessingRefused, WeightsDoNotFit, first_line
from featurecache.images.preprocessing import Preprocess

_FITTED = ("patch_embed.proj.weight", "relative_position_bias_table")  # tensors that timm fits to another size
_OTHERWISE = (
    ". Where the architecture was made with other arguments, write them down: a config.json beside the weights, with "
    '{"architecture": …, "model_args": {…}, "pretrained_cfg": {"mean": …, "std": …}}'
)


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """``where``: a name as this module's docstring says."""
    check_timm()
    with warnings.catch_warnings():  # of names that timm renamed and of layers that it moved
        warnings.simplefilter("ignore")
        model = find_model(where, request)
        preprocess = _preprocess(model, request)
        network, traits, nhwc, config = _outline(model, request, preprocess)
        weights, taken, refitted = {"random_seed": request.seed}, "", False
        if model.weights is not None and not request.random_weights and (request.weights or not request.meta):
            checkpoint = _checkpoint(model, request, network)
            if shown := _arguments_shown(checkpoint, network):
                model = replace(model, arguments={**model.arguments, **shown})
                network, traits, nhwc, config = _outline(model, request, preprocess)
                said = ", ".join(f"{name}={value!r}" for name, value in shown.items())
                checkpoint = _checkpoint(model, request, network).noted(f"by its tensors the network with {said}")
            taken = checkpoint.line
            own = network.state_dict()
            refitted = bool(_other_positions(checkpoint.tensors, own))
            if not request.meta:
                network, weights = _trained(model, request, checkpoint, own, preprocess.size)
        elif not request.meta:
            with torch_seed(request.seed):
                network = model.build(preprocess.size)
        if not request.meta:
            network.reset_classifier(0)  # no output uses it
    positions = "as trained" if nhwc is None else "none"
    resized = preprocess.size != tuple(model.settings.input_size[1:])
    if refitted or (resized and (model.takes_size or nhwc is None)):
        positions = "interpolated (as timm does)"
    return Backbone(
        name=request.name if alias else model.id.rpartition("/")[2],
        model=freeze(TimmTokens(network, len(traits["prefix"])) if nhwc is None else TimmMap(network, nhwc)),
        architecture={"library": "timm", "class": model.architecture, "config": config},
        weights=weights,
        preprocess=preprocess.fitted(request.fit),
        image_size=preprocess.size,
        position_embeddings=positions,
        channels_last=nhwc is False,
        parameters=sum(p.numel() for p in network.parameters()),
        provenance={
            "provider": "timm",
            "id": model.id,
            "revision": model.revision,
            "licence": (alias.licence if alias else model.settings.license) or "not known; see where it came from",
            "source": alias.source if alias else model.settings.origin_url or "",
            "preprocessing": model.feeding,
            "attention": "timm's own" if nhwc is None else None,
            "versions": versions("timm", "torchvision"),
            "weights": taken,
            "request": request.portable_arguments(model.portable_name),
        },
        **traits,
    )


def _preprocess(model: TimmModel, request: BackboneRequest) -> Preprocess:
    """What timm's transform for evaluation does at the size asked for, checked against it."""
    from timm.data import create_transform, resolve_data_config

    size = request.image_size
    if size is not None and size < 1:
        raise BadOption(f"--image-size {size} is no size of an image")
    arguments = {} if size is None else {"input_size": (model.channels, size, size)}
    if model.channels not in (1, 3):
        raise BadOption(f"{model.title} takes images of {model.channels} channels; expected 3, RGB, or 1, grey")
    with library_errors(f"the data config of {model.title} cannot be read", PreprocessingRefused):
        config = resolve_data_config(args=arguments, pretrained_cfg=model.settings.to_dict())
        if model.channels == 1:
            config |= {key: (statistics.fmean(channel_constants(config[key])),) for key in ("mean", "std")}
        preprocess, transform = from_timm(config), create_transform(**config, is_training=False)
    check_preprocess(preprocess, transform, model.title)
    return preprocess


def _outline(
    model: TimmModel, request: BackboneRequest, preprocess: Preprocess
) -> tuple[Any, dict[str, Any], bool | None, dict[str, Any]]:
    """The network without numbers, in no memory; what it gives (`output_traits`); what of the arguments saved with it
    makes it another than timm makes by the name alone. Raises BadOption, OutputRefused."""
    from timm.models import get_pretrained_cfg

    size, config = preprocess.size, {}
    refused = f"{model.title} cannot be made for images of {size[0]}×{size[1]} pixels"
    with torch.device("meta"), torch.no_grad():
        with library_errors(refused, BadOption):
            network: Any = freeze(model.build(size))
        if request.image_size is not None:
            patch = as_tuple(getattr(getattr(network, "patch_embed", None), "patch_size", 1))
            patch = patch[0] if isinstance(patch, tuple) else patch
            preprocess.scaled(request.image_size, int(patch or 1))  # refuses what is not a multiple of it
        with library_errors(refused, BadOption):
            features = network.forward_features(torch.zeros(1, model.channels, *size))
        traits, nhwc = output_traits(model.title, network, features, size)
        if model.arguments:
            published = get_pretrained_cfg(model.architecture)
            settings = replace(model.settings, fixed_input_size=bool(published and published.fixed_input_size))
            with library_errors(refused, BadOption):
                plain = replace(model, arguments={}, settings=settings).build(size)
            if network_identity(network) != network_identity(freeze(plain)):
                config = {name: [*v] if isinstance(v, tuple) else v for name, v in model.arguments.items()}
        network.reset_classifier(0)  # no output uses it
    return network, traits, nhwc, config


def _checkpoint(model: TimmModel, request: BackboneRequest, network: Any) -> StateDict:
    """What the file of weights holds of a ``network`` without its classifier. A file of one's own (``--weights``), or
    one in a folder that has none of its names (MedSAM), in its names."""
    assert model.weights is not None
    own, children = network.state_dict(), dict(network.named_children())
    read = read_checkpoint(model.weights, request.weights_name)
    published = model.feeding == TimmModel.feeding or own.keys() & read.tensors.keys()
    if request.weights is None and not model.open_clip and published:
        return read
    if "visual.class_embedding" in read.tensors:  # of OpenAI's CLIP, whose names timm knows
        read = read.part({name: name for name in read.tensors if name.startswith("visual.")})
    if any(name.startswith("visual.trunk.") for name in read.tensors) and not model.open_clip:
        raise WeightsDoNotFit(
            f"the weights {request.weights} are open_clip's, and how it prepares images is in another file: put its "
            'open_clip_config.json beside them, or one with {"preprocess_cfg": {"mean": […], "std": […], "size": …}}'
        )
    checkpoint = read.fitted(model.title, own, children)
    kept = [f"{name}.weight" for name in _classifiers(model) if f"{name}.weight" in checkpoint.tensors]
    cut = () if kept else tuple(f"{name}." for name in _classifiers(model))
    return checkpoint.without_training_parts([*own, *kept], cut)


def _arguments_shown(checkpoint: StateDict, network: Any) -> dict[str, Any]:
    """Arguments of the network that the names and shapes of its tensors show, where its settings mean another: the mean
    of its patches (a fine-tuned MAE: ``fc_norm`` where the other has ``norm``); LayerScale (UNI); two halves of an MLP,
    one the gate of the other (Virchow, UNI 2, whose settings cannot name a class); no absolute positions (LVM-Med)."""
    own, names = network.state_dict(), checkpoint.tensors
    shown: dict[str, Any] = {}
    if "blocks.0.attn.qkv.weight" not in own or "blocks.0.norm1.weight" not in names:  # no vision transformer
        return {}
    if getattr(network, "global_pool", "") == "token" and "norm.weight" in own and "norm.weight" not in names:
        shown |= {"global_pool": "avg"} if "fc_norm.weight" not in own and "fc_norm.weight" in names else {}
    if "blocks.0.ls1.gamma" in names and "blocks.0.ls1.gamma" not in own:
        shown["init_values"] = 1.0  # the scales themselves are in the file
    if _is_gated(names) and not _is_gated(own):
        shown |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    if "blocks.0.attn.rel_pos_h" in own.keys() & names.keys() and "pos_embed" in own.keys() - names.keys():
        shown["use_abs_pos"] = False
    return shown


def _is_gated(tensors: Tensors) -> bool:
    """Whether the second layer of an MLP takes half of what the first one gives."""
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and len(first) == 2 * second.shape[-1]


def _classifiers(model: TimmModel) -> tuple[str, ...]:
    names = as_tuple(model.settings.classifier or ())
    return (names,) if isinstance(names, str) else names


def _trained(
    model: TimmModel, request: BackboneRequest, checkpoint: StateDict, own: Tensors, size: tuple[int, int]
) -> tuple[Any, dict[str, Any]]:
    """(network, what identifies its weights). ``own``: the shapes of its tensors, without its classifier."""
    state, options = checkpoint.tensors, {}
    if request.weights is not None or model.open_clip:
        _check_sizes(model, request, state, own)
        counts = {state[name].shape[1] for name in state if name == "visual.proj"}  # timm's classifier of a CLIP
        counts |= {len(state[f"{name}.weight"]) for name in _classifiers(model) if f"{name}.weight" in state}
        if not counts and own.keys() & state.keys():  # cut off, and else of timm's own names
            counts = {0}
        options = {"num_classes": counts.pop()} if len(counts) == 1 else {}
    head = tuple(f"{name}." for name in _classifiers(model))
    deciding = {key: v for key, v in state.items() if not key.startswith(head) and v.is_floating_point()}
    identity = weights_identity(model.title, deciding)
    overlay = {"state_dict": dict(state)} | ({**options, "label_offset": None} if options else {})
    try:
        with torch_seed(0):
            network = model.build(size, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # load_state_dict's, and whatever timm's own renaming of names meets
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = (lines[1] if len(lines) > 1 else first_line(error)).rstrip(".")[:200]
        raise WeightsDoNotFit(
            f"the weights {model.weights} are not of timm's {model.architecture}: {why}"
            + (foreign_names(state, "timm", own) or _OTHERWISE)
        ) from error
    network.pretrained_cfg.pop("state_dict", None)
    return network, identity


def _other_positions(state: Tensors, own: Tensors) -> str:
    """The name of position embeddings of the network's width and another grid; of tokens, by the largest square."""

    def grid(shape: torch.Size) -> Any:
        return math.isqrt(shape[1]) if len(shape) == 3 else shape

    names = [name for name in sorted(own) if "pos_embed" in name and name in state]
    names = [name for name in names if state[name].shape[-1] == own[name].shape[-1]]
    return next((name for name in names if grid(state[name].shape) != grid(own[name].shape)), "")


def _check_sizes(model: TimmModel, request: BackboneRequest, state: Tensors, own: Tensors) -> None:
    """What timm would fit to other sizes unasked. Raises WeightsDoNotFit: positions of images of another size, unless
    that is asked for; patches or windows of another size; images of other channels."""
    if grey := [words for words in other_shapes(state, own) if "channel" in words]:
        raise WeightsDoNotFit(f"the weights {model.weights} are not of {model.title}: {grey[0]}")
    name = _other_positions(state, own)
    if name and request.image_size is None:
        raise WeightsDoNotFit(
            f"the weights {model.weights} were made for images of another size than {model.title}: {name} is "
            f"{list(state[name].shape)}, expected {list(own[name].shape)}. Give their size with --image-size"
        )
    both = (name for name in own.keys() & state.keys() if name.endswith(_FITTED))
    fitted = {name: state[name] for name in both if state[name].shape != own[name].shape}
    if fitted and request.image_size is not None:  # tables grow with the image
        with torch.device("meta"):
            plain = model.build(model.settings.input_size[1:]).state_dict()
        fitted = {name: value for name, value in fitted.items() if value.shape != plain[name].shape}
    if fitted:
        words = other_shapes(fitted, own)[0]
        raise WeightsDoNotFit(f"the weights {model.weights} are not of {model.title}: {words}" + _OTHERWISE)


# what a network gives, by its own attributes and shapes: tokens, which of them are patches, a map, a vector


def output_traits(title: str, network: Any, features: Any, size: tuple[int, int]) -> tuple[dict[str, Any], bool | None]:
    """(fields of a `Backbone`, whether its map is [B,h,w,C], None of tokens): of a network with its classifier, and of
    what its ``forward_features`` made of one image of ``size``. Raises OutputRefused."""
    tensor = isinstance(features, torch.Tensor)
    if not tensor or features.dim() not in (3, 4):
        what = list(features.shape) if tensor else f"a {type(features).__name__}"
        raise OutputRefused(
            f"{title} cannot be a backbone here: its forward_features gives {what}; expected tokens [B,T,D] or a "
            "map [B,C,h,w]"
        )
    applied: list[nn.Module] = []  # what has parameters and comes between the features and the vector
    with ExitStack() as hooks:
        for module in network.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(lambda module, _: applied.append(module)))
        with library_errors(f"{title} cannot be a backbone here: its forward_head fails", OutputRefused):
            vector = network.forward_head(features, pre_logits=True)
    output_fmt = getattr(network, "output_fmt", "")
    nhwc = str(getattr(output_fmt, "value", output_fmt)) == "NHWC"
    channels = features.shape[1 if features.dim() == 4 and not nhwc else -1]
    pools = vector.shape != features.shape  # Virchow leaves that to its users
    wide = vector.flatten(1).shape[1] if pools else channels
    if features.dim() == 3:
        pooling = ("" if applied else str(getattr(network, "global_pool", ""))) if pools else "nothing"
        return _token_traits(title, network, features.shape[1:], size, pooling, wide), None
    height, width = features.shape[1:3] if nhwc else features.shape[2:]
    refusals = {"cls": f"{title} has no class token; gap is its vector"}
    refusals["pooler"] = "the vector of a network that gives a map is gap"
    refusals |= {} if pools else {"gap": "its network pools nothing; mean is the average of its map"}
    if channels != wide:
        why = f"its map has {channels:,} channels, and the vector that its classifier receives {wide:,}"
        refusals |= {"tokens": why, "mean": why}
    grid = (height, width) if channels == wide else (0, 0)
    return _traits((), grid, wide, "gap" if pools else "mean", refusals, 0), nhwc


def _token_traits(
    title: str, network: Any, shape: torch.Size, size: tuple[int, int], pooling: str, wide: int
) -> dict[str, Any]:
    """``pooling``: how the vector, of ``wide`` numbers, is made of the tokens: "token", "avg", "nothing" where they are
    left as they are, empty for what has parameters, or takes prefix tokens too."""
    count, width = shape
    refusals = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    layout = _token_layout(network, count, size) if width == wide else None
    if layout is None:
        why = f"which of the {count} rows of {title} are patches is not known"
        why = why if width == wide else f"its tokens have {width:,} numbers, and the vector of its classifier {wide:,}"
        refusals |= dict.fromkeys(("tokens", "cls", "mean"), why)
        return _traits((), (0, 0), wide, "pooler", refusals, 0)
    prefix, grid = layout
    if prefix[:1] != ("cls",):
        refusals["cls"] = f"{title} has no class token"
    vector = "pooler"
    if pooling == "nothing":
        vector, refusals["pooler"] = "mean" if "cls" in refusals else "cls", "its network pools nothing"
    elif (pooling == "token" and "cls" not in refusals and "dist" not in prefix) or (
        pooling == "avg" and not (prefix and getattr(network, "pool_include_prefix", False))
    ):
        vector = "cls" if pooling == "token" else "mean"
        refusals["pooler"] = f"what its classifier receives is {vector}"
    options = inspect.signature(getattr(network, "forward_intermediates", _traits)).parameters
    layers = len(network.blocks) if {"return_prefix_tokens", "norm"} <= set(options) else 0
    return _traits(prefix, grid, width, vector, refusals, layers)


def _traits(*values: Any) -> dict[str, Any]:
    return dict(zip(("prefix", "grid", "width", "vector", "refusals", "layers"), values, strict=True))


def _token_layout(network: Any, count: int, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """(prefix, grid) of ``count`` tokens; None where nothing says so."""
    stride = (getattr(network, "feature_info", None) or [{}])[-1].get("reduction") or 1
    grid = (size[0] // stride, size[1] // stride)
    begin = count - grid[0] * grid[1]
    names = [name for name in ("cls", "dist") if getattr(network, f"{name}_token", None) is not None]
    names = names or (["cls"] if getattr(network, "global_pool", "") == "token" else [])
    registers = begin - len(names)
    if registers < 0 or getattr(network, "num_prefix_tokens", len(names)) != begin:
        return None
    return (*names, *(f"reg{k}" for k in range(registers))), grid


def network_identity(network: nn.Module) -> list[Any]:
    """All that tells two networks of one architecture apart, besides their weights: modules, their plain attributes and
    the shapes of their parameters."""
    identity: list[Any] = []
    for name, module in network.named_modules():
        plain = {key: v for key, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        identity.append((name, type(module).__name__, plain, shapes))
    return identity
