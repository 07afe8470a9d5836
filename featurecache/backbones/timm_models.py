"""Backbones of timm: any of its image models, with the data config that belongs to the weights.

A name is timm's own (``vit_base_patch16_224``, with or without a tag of its weights), ``<owner>/<repo>`` of the hub,
each with or without @revision, or a folder with a config.json as timm writes it. No model needs an entry anywhere: what
a network gives is inferred from its own attributes and shapes, before there are weights. A map [B,C,h,w] is a CNN's:
``tokens`` row by row, and ``gap``. [B,T,D] is a transformer's: ``tokens``, and ``pooler`` where its vector is neither
the class token nor the mean of the patches. One that does not say which rows are patches keeps its vector only.

Weights are read without running code, then renamed and loaded by timm itself, strictly. Settings saved with them lead
nowhere: no address, no file, no code of theirs is followed. The classifier is taken away. A folder whose settings say
one channel is fed grey images, normalised as timm's loaders do it: by the average of the three constants of RGB.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, TimmMap, TimmTokens, freeze, torch_seed, versions
from featurecache.backbones.processors import channel_constants, check_preprocess, from_timm
from featurecache.backbones.state_dicts import StateDict, foreign_names, other_shapes
from featurecache.backbones.timm_names import TimmModel, as_tuple, check_timm, find_model
from featurecache.backbones.timm_outputs import network_identity, output_traits
from featurecache.backbones.weights import library_errors, read_checkpoint, weights_identity
from featurecache.errors import BadOption, PreprocessingRefused, WeightsDoNotFit, first_line
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
        read = read.only_under("visual.")
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


def _is_gated(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the second layer of an MLP takes half of what the first one gives."""
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and len(first) == 2 * second.shape[-1]


def _classifiers(model: TimmModel) -> tuple[str, ...]:
    names = as_tuple(model.settings.classifier or ())
    return (names,) if isinstance(names, str) else names


def _trained(
    model: TimmModel,
    request: BackboneRequest,
    checkpoint: StateDict,
    own: dict[str, torch.Tensor],
    size: tuple[int, int],
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


def _other_positions(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The name of position embeddings of the network's width and another grid; of tokens, by the largest square."""

    def grid(shape: torch.Size) -> Any:
        return math.isqrt(shape[1]) if len(shape) == 3 else shape

    names = [name for name in sorted(own) if "pos_embed" in name and name in state]
    names = [name for name in names if state[name].shape[-1] == own[name].shape[-1]]
    return next((name for name in names if grid(state[name].shape) != grid(own[name].shape)), "")


def _check_sizes(
    model: TimmModel, request: BackboneRequest, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> None:
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
