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

import os
import re
import statistics
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, TimmMap, TimmTokens, freeze, torch_seed, versions
from featurecache.backbones.processors import channel_constants, check_preprocess, from_timm
from featurecache.backbones.state_dicts import StateDict, foreign_names, other_shapes
from featurecache.backbones.timm_outputs import network_identity, output_traits
from featurecache.backbones.weights import (
    download_weights,
    existing_weights,
    library_errors,
    read_checkpoint,
    snapshot,
    weights_identity,
)
from featurecache.errors import (
    BadOption,
    CacheError,
    PreprocessingRefused,
    UnknownBackbone,
    WeightsDoNotFit,
    WeightsNotFound,
    first_line,
    nearest,
)
from featurecache.files.records import check_part_of_a_run, read_record
from featurecache.images.preprocessing import Preprocess

_NOWHERE = {"url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None, "source": None, "custom_load": False}
_IGNORED_SETTINGS = {*_NOWHERE, "state_dict", "architecture"}
# Arguments saved with weights that decide nothing of a feature, or that would make timm look for files.
_IGNORED_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
    "features_only", "num_classes", "in_chans", "scriptable", "exportable", "no_jit", "device", "dtype", "drop_rate",
    "drop_path_rate", "proj_drop_rate", "attn_drop_rate",
}  # fmt: skip


@dataclass(frozen=True)
class TimmModel:
    """An architecture, the settings of its weights, and where these are."""

    architecture: str
    settings: Any  # timm's PretrainedCfg
    id: str
    portable_name: str  # finds it from any working directory
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm.create_model, saved with the weights
    weights: Path | None = None  # a file or folder
    revision: str = ""

    @property
    def title(self) -> str:
        return f"timm:{self.id}"

    @property
    def channels(self) -> int:
        return int(self.settings.input_size[0])

    @property
    def takes_size(self) -> bool:
        """Whether the network is built for one size of images."""
        return bool(self.settings.fixed_input_size) or "img_size" in self.arguments

    def build(self, size: tuple[int, int], **options: Any) -> Any:
        """The network as timm makes it for images of ``size``."""
        import timm

        other = size != tuple(self.settings.input_size[1:]) and self.takes_size
        sized: dict[str, Any] = {"img_size": size} if other else {}
        sized |= {"in_chans": self.channels} if self.channels != 3 else {}
        settings = replace(self.settings, architecture=self.architecture, **_NOWHERE)
        return timm.create_model(self.architecture, pretrained_cfg=settings, **{**self.arguments, **sized}, **options)


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """``where``: a name as this module's docstring says."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise BadOption("a backbone of timm needs a package: pip install 'featurecache[timm]'.") from error
    with warnings.catch_warnings():  # of names that timm renamed and of layers that it moved
        warnings.simplefilter("ignore")
        model = _find(where, request)
        preprocess = _preprocess(model, request)
        network, traits, nhwc, config = _outline(model, request, preprocess)
        weights, taken = {"random_seed": request.seed}, ""
        if model.weights is not None and not request.random_weights and (request.weights or not request.meta):
            checkpoint = _checkpoint(model, request, network)
            if shown := _arguments_shown(checkpoint, network):
                model = replace(model, arguments={**model.arguments, **shown})
                network, traits, nhwc, config = _outline(model, request, preprocess)
                said = ", ".join(f"{name}={value!r}" for name, value in shown.items())
                checkpoint = _checkpoint(model, request, network).noted(f"by its names the network with {said}")
            taken = checkpoint.line if request.weights else ""
            if not request.meta:
                network, weights = _trained(model, request, checkpoint, network.state_dict(), preprocess.size)
        elif not request.meta:
            with torch_seed(request.seed):
                network = model.build(preprocess.size)
        if not request.meta:
            network.reset_classifier(0)  # no output uses it
    positions = "as trained" if nhwc is None else "none"
    if preprocess.size != tuple(model.settings.input_size[1:]) and (model.takes_size or nhwc is None):
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
            "preprocessing": "timm's transform by the data config of the weights",
            "attention": "timm's own" if nhwc is None else None,
            "versions": versions("timm", "torchvision"),
            "weights": taken,
            "request": request.portable_arguments(model.portable_name),
        },
        **traits,
    )


def _find(where: str, request: BackboneRequest) -> TimmModel:
    """Which of timm's architectures a name means. Raises UnknownBackbone, WeightsNotFound, WeightsDoNotFit."""
    where = re.sub(r"^hf[-_]hub:", "", where)  # as timm.create_model writes a repository of the hub
    folder, weights = Path(os.path.expanduser(where)), existing_weights(request.weights_path)
    if folder.is_dir():
        check_part_of_a_run(folder)
        return _of_folder(folder, where, f"timm:{folder.resolve()}", weights=weights or folder)
    name, _, revision = where.partition("@")
    if name.startswith(("/", ".", "~")):
        raise UnknownBackbone(f'there is no folder "{name}"; expected one with a config.json as timm writes it')
    if "/" in name:
        folder, commit = snapshot(name, revision or None, weights=weights is None and not request.untrained)
        return _of_folder(folder, name, f"timm:{name}@{commit}", weights=weights or folder, revision=commit)
    model = _of_name(name)
    if weights is None:
        return model if request.untrained else _with_published_weights(model, revision)
    if timm_record(weights) is None:
        return replace(model, weights=weights, settings=replace(model.settings, **_open_clip_settings(weights)))
    own = _of_folder(weights, model.id, model.portable_name, weights=weights)
    if own.architecture != model.architecture:
        raise WeightsDoNotFit(f"the weights {weights} are of timm's {own.architecture}, not of {model.architecture}")
    return own


def timm_record(folder: Path) -> dict[str, Any] | None:
    """A folder's config.json where it is timm's: it names an architecture, and no model type of transformers."""
    try:
        record = read_record((folder / "config.json").resolve())  # the hub's cache has links
    except CacheError:
        return None
    return record if isinstance(record.get("architecture"), str) and "model_type" not in record else None


def _of_folder(folder: Path, name: str, portable_name: str, **fields: Any) -> TimmModel:
    """From a config.json of timm's; an older one has everything at one level."""
    import timm
    from timm.models import PretrainedCfg

    path, record = folder / "config.json", timm_record(folder)
    if record is None:
        raise UnknownBackbone(f"{folder} has no config.json as timm writes it, with an architecture in it")
    architecture, arguments = record["architecture"], record.get("model_args") or {}
    settings = record.get("pretrained_cfg", record)
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        raise UnknownBackbone(f"{folder} is of {architecture[:80]!a}, which this timm does not have.{near}")
    if not isinstance(settings, dict) or not isinstance(arguments, dict):
        raise WeightsDoNotFit(f"{path} is not as timm writes it: a record is expected in its fields")
    channels = arguments.get("in_chans")
    arguments = {name: _tuple(value) for name, value in arguments.items() if name not in _IGNORED_ARGUMENTS}
    settings = {**settings, **{name: record[name] for name in ("num_classes",) if name in record}}
    if arguments.get("img_size") is not None and settings.get("fixed_input_size"):  # made for it, and takes no other
        side = arguments["img_size"]
        settings["input_size"] = (3, *(side if isinstance(side, tuple) else (side, side)))
    fields_of_timm = PretrainedCfg.__dataclass_fields__.keys() - _IGNORED_SETTINGS
    config = PretrainedCfg(**{name: _tuple(settings[name]) for name in fields_of_timm & settings.keys()})
    sizes = config.input_size
    if channels is not None and isinstance(sizes, tuple):
        sizes = (channels, *sizes[1:])
    if not (isinstance(sizes, tuple) and len(sizes) == 3 and all(type(n) is int and 0 < n < 1 << 16 for n in sizes)):
        raise WeightsDoNotFit(f"{path} has an input_size of {str(sizes)[:80]}; expected (3, h, w), of grey (1, h, w)")
    return TimmModel(architecture, replace(config, input_size=sizes), name, portable_name, arguments, **fields)


def _open_clip_settings(weights: Path) -> dict[str, Any]:
    """How open_clip feeds the network of timm inside its model (BiomedCLIP), by the open_clip_config.json beside the
    weights; nothing where there is none. Raises WeightsDoNotFit."""
    path = (weights if weights.is_dir() else weights.parent) / "open_clip_config.json"
    try:
        settings = read_record(path.resolve()).get("preprocess_cfg")
        settings = {"mean": None, "std": None, "resize_mode": "shortest", "interpolation": "bicubic"} | (settings or {})
        mean, std = (tuple(map(float, settings[key])) for key in ("mean", "std"))
    except CacheError:
        return {}
    except (TypeError, ValueError) as error:
        raise WeightsDoNotFit(f"{path} is not as open_clip writes it: preprocess_cfg with mean and std") from error
    if settings["resize_mode"] not in ("shortest", "squash"):
        raise WeightsDoNotFit(f"{path} resizes by {settings['resize_mode']}; expected shortest or squash")
    mode = "squash" if settings["resize_mode"] == "squash" else "center"
    return {"mean": mean, "std": std, "interpolation": settings["interpolation"], "crop_pct": 1.0, "crop_mode": mode}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_architecture(where: str) -> None:
    """Raises UnknownBackbone for an architecture or weights that timm has not; folders and repositories are looked at
    when they are loaded."""
    if "/" not in where and not os.path.isdir(os.path.expanduser(where)):
        _of_name(where.partition("@")[0])


def _of_name(name: str) -> TimmModel:
    import timm
    from timm.models import get_pretrained_cfg

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownBackbone(f'timm has no model "{name}".{nearest(architecture, timm.list_models())}')
    try:
        settings = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(each.partition(".")[2] for each in timm.list_models(f"{architecture}.*", pretrained=True))
        have = f"there are {tags}" if tags else "it was published without any"
        raise UnknownBackbone(f'timm has no weights "{tag}" of {architecture}; {have}') from error
    tagged = f"{architecture}.{settings.tag}" if settings and settings.tag else architecture
    return TimmModel(architecture, settings, tagged, f"timm:{tagged}")


def _with_published_weights(model: TimmModel, revision: str) -> TimmModel:
    """Those of the hub or its local cache, else of the address that timm knows."""
    settings = model.settings
    if settings.hf_hub_id:
        folder, commit = snapshot(settings.hf_hub_id, revision or None)
        return replace(model, weights=folder, revision=commit, portable_name=f"timm:{model.id}@{commit}")
    if isinstance(settings.url, str) and settings.url and not settings.custom_load:
        path = download_weights(settings.url, model.title)
        return replace(model, weights=path, revision=path.name)
    raise WeightsNotFound(f"{model.title} was published without weights; it exists only with --random-weights")


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
            patch = _tuple(getattr(getattr(network, "patch_embed", None), "patch_size", 1))
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
    """What the file of weights holds of a ``network`` without its classifier. A file of one's own (``--weights``) in
    its names."""
    assert model.weights is not None
    if request.weights is None:
        return read_checkpoint(model.weights)
    own, children = network.state_dict(), dict(network.named_children())
    read = read_checkpoint(model.weights, request.weights_name)
    if any(name.startswith("visual.trunk.") for name in read.tensors) and not _open_clip_settings(model.weights):
        raise WeightsDoNotFit(
            f"the weights {request.weights} are open_clip's, and how it prepares images is in another file: put its "
            "open_clip_config.json beside them"
        )
    checkpoint = read.fitted(model.title, own, children)
    kept = [f"{name}.weight" for name in _classifiers(model) if f"{name}.weight" in checkpoint.tensors]
    cut = () if kept else tuple(f"{name}." for name in _classifiers(model))
    return checkpoint.without_training_parts([*own, *kept], cut)


def _arguments_shown(checkpoint: StateDict, network: Any) -> dict[str, Any]:
    """Arguments of the network that the names of its tensors show, where timm's name alone means another: fine-tuned on
    the mean of its patches (MAE, RETFound: ``fc_norm`` where the other has ``norm``); with LayerScale (UNI)."""
    own, names = network.state_dict(), checkpoint.tensors
    shown: dict[str, Any] = {}
    if getattr(network, "global_pool", "") != "token" or "norm.weight" not in own:  # no vision transformer so made
        return {}
    if "fc_norm.weight" not in own and "fc_norm.weight" in names and "norm.weight" not in names:
        shown["global_pool"] = "avg"
    if "blocks.0.ls1.gamma" in names and "blocks.0.ls1.gamma" not in own:
        shown["init_values"] = 1.0  # the scales themselves are in the file
    return shown


def _classifiers(model: TimmModel) -> tuple[str, ...]:
    names = _tuple(model.settings.classifier or ())
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
    if request.weights is not None:
        for key in own.keys() & state.keys():  # timm would fit the position embeddings of another size unasked
            if request.image_size is None and "pos_embed" in key and state[key].shape != own[key].shape:
                raise WeightsDoNotFit(
                    f"the weights {request.weights} were made for images of another size than {model.title}: {key} is "
                    f"{list(state[key].shape)}, expected {list(own[key].shape)}. Give their size with --image-size"
                )
        if grey := [words for words in other_shapes(state, own) if "channel" in words]:
            raise WeightsDoNotFit(f"the weights {request.weights} are not of {model.title}: {grey[0]}")
        counts = {len(state[f"{name}.weight"]) for name in _classifiers(model) if f"{name}.weight" in state}
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
        why = (lines[1] if len(lines) > 1 else first_line(error))[:200]
        why += foreign_names(state, "timm") if 2 * len(own.keys() & state.keys()) < len(own) else ""
        raise WeightsDoNotFit(f"the weights {model.weights} are not of timm's {model.architecture}: {why}") from error
    network.pretrained_cfg.pop("state_dict", None)
    return network, identity
