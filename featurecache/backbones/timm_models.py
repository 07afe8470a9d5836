"""Timm:.

Backbones of timm: any of its image models, with the data config that belongs to the weights.

A network runs timm's own ``forward_features``; what the library makes of that for its classifier
(``forward_head(…, pre_logits=True)``) is its vector. A map [B,C,h,w] is a CNN's: ``tokens`` row by row, and ``gap``.
[B,T,D] is a transformer's: ``tokens``, and ``pooler`` where the vector is neither the class token nor the mean of the
patches. Earlier blocks are those of ``forward_intermediates``, with the final norm. The classifier is taken away.

Weights are read without running code, then renamed and loaded by timm itself, strictly.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.

Which of timm's architectures is meant by a name, with the settings of its weights, and where these lie.

A name is timm's own (``vit_base_patch16_224``, with or without a tag of its weights), ``<owner>/<repo>`` of the hub,
each with or without @revision, or a folder with a config.json as timm writes it.

What a network of timm gives, and which of its rows are what: read off its own attributes and shapes, so that it is
known before there are weights.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, frozen, seeded, versions
from featurecache.backbones.processors import check, from_timm
from featurecache.backbones.weights import digest, fetched, read_state_dict, snapshot, unwrapped
from featurecache.backbones.wrappers import TimmMap, TimmTokens
from featurecache.errors import (
    BadOption,
    CacheError,
    OutputRefused,
    UnknownBackbone,
    WeightsDoNotFit,
    WeightsNotFound,
    first_line,
    nearest,
)
from featurecache.files.records import read_record
from featurecache.images.preprocessing import Preprocess

_NOWHERE = {"url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None, "source": None, "custom_load": False}


def load(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """``where``: see `featurecache.backbones.timm_models`."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise BadOption("a backbone of timm needs a package: pip install 'featurecache[timm]'.") from error
    with _quiet():
        found = find(where, request)
        preprocess = _preprocess(found, request)
        size = preprocess.size
        outline, gives, config = _outline(found, request, preprocess)
        network, weights = outline, {"random_seed": request.seed}
        if not request.meta:
            network, weights = _made(found, request, outline, size)
    return Backbone(
        name=request.name if alias else found.id.rpartition("/")[2],
        model=frozen(TimmMap(network, gives.nhwc) if gives.map else TimmTokens(network, len(gives.prefix))),
        architecture={"library": "timm", "class": found.architecture, "config": config},
        weights=weights,
        preprocess=preprocess.fitted(request.fit),
        image_size=size,
        position_embeddings=_positions(found, gives, size),
        prefix=gives.prefix,
        grid=gives.grid,
        width=gives.width,
        layers=gives.layers,
        vector=gives.vector,
        channels_last=gives.map and not gives.nhwc,
        parameters=sum(p.numel() for p in network.parameters()),
        provenance={
            "provider": "timm",
            "id": found.id,
            "revision": found.revision,
            "licence": (alias.licence if alias else found.settings.license) or "not known; see where it came from",
            "source": alias.source if alias else found.settings.origin_url or "",
            "preprocessing": "timm's transform by the data config of the weights",
            "attention": None if gives.map else "timm's own",
            "versions": versions("timm", "torchvision"),
            "request": request.again(found.again),
        },
        refused=gives.refused,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """timm warns of names that it renamed and of layers that it moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _preprocess(found: ResolvedBackbone, request: BackboneRequest) -> Preprocess:
    """What timm's transform for evaluation does at the size asked for, checked against it."""
    from timm.data import create_transform, resolve_data_config

    size = request.image_size
    if size is not None and size < 1:
        raise BadOption(f"--image-size {size} is no size of an image")
    asked = {} if size is None else {"input_size": (3, size, size)}
    config = resolve_data_config(args=asked, pretrained_cfg=found.settings.to_dict())
    if config["input_size"][0] != 3 or found.settings.input_size[0] != 3:
        raise BadOption(f"{found.title} takes images of {found.settings.input_size[0]} channels; expected 3, of RGB")
    preprocess = from_timm(config)
    check(preprocess, create_transform(**config, is_training=False), found.title)
    return preprocess


def _built(found: ResolvedBackbone, size: tuple[int, int], **options: Any) -> Any:
    """The network as timm makes it for images of ``size``."""
    import timm

    arguments = dict(found.arguments)
    if size != tuple(found.settings.input_size[1:]) and (found.settings.fixed_input_size or "img_size" in arguments):
        arguments["img_size"] = size
    settings = replace(found.settings, architecture=found.architecture, **_NOWHERE)
    return timm.create_model(found.architecture, pretrained_cfg=settings, **arguments, **options)


def _outline(
    found: ResolvedBackbone, request: BackboneRequest, preprocess: Preprocess
) -> tuple[Any, OutputTraits, dict[str, Any]]:
    """The network without numbers, in no memory; what it gives; what of the arguments saved with it makes it another
    than timm makes by the name alone. Raises BadOption, OutputRefused."""
    size = preprocess.size
    try:
        with torch.device("meta"), torch.no_grad():
            network: Any = frozen(_built(found, size))
            if request.image_size is not None:
                preprocess.scaled(request.image_size, _patch(network))  # refuses what is not a multiple of it
            features = network.forward_features(torch.zeros(1, 3, *size))
            gives = infer_outputs(found.title, network, features, size)
            same = not found.arguments or identifying_traits(network) == identifying_traits(
                frozen(_built(by_name(found), size))
            )
            network.reset_classifier(0)  # no output uses it
    except (BadOption, OutputRefused):
        raise
    except Exception as error:  # whatever a network of timm's raises
        made = f"images of {size[0]}×{size[1]} pixels"
        raise BadOption(f"{found.title} cannot be made for {made}: {first_line(error)}") from error
    config = {} if same else {key: [*v] if isinstance(v, tuple) else v for key, v in found.arguments.items()}
    return network, gives, config


def _patch(network: Any) -> int:
    sides = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(sides[0]) if isinstance(sides, tuple | list) else int(sides or 1)


def _positions(found: ResolvedBackbone, gives: OutputTraits, size: tuple[int, int]) -> str:
    native = size == tuple(found.settings.input_size[1:])
    if native or (gives.map and not (found.settings.fixed_input_size or "img_size" in found.arguments)):
        return "none" if gives.map else "as trained"
    return "interpolated (as timm does)"


def _made(
    found: ResolvedBackbone, request: BackboneRequest, outline: Any, size: tuple[int, int]
) -> tuple[Any, dict[str, Any]]:
    """(network, what identifies its weights)"""
    if request.untrained:
        with seeded(request.seed):
            network = _built(found, size)
        network.reset_classifier(0)  # no output uses it
        return network, {"random_seed": request.seed}
    assert found.weights is not None
    state = read_state_dict(found.weights)
    own: dict[str, torch.Tensor] = outline.state_dict()
    options: dict[str, Any] = {}
    if request.weights is not None:
        state = unwrapped(found.title, state, own)
        options = _classes(found, state, own)
        _check_positions(found, request, state, own)
    identity = digest({key: value for key, value in state.items() if _decides(found, key, value)})
    return _filled(found, size, state, options), {"blake2b": identity}


def _decides(found: ResolvedBackbone, key: str, value: torch.Tensor) -> bool:
    """Not the classifier, which no output uses, and not counters."""
    return not key.startswith(tuple(f"{name}." for name in _classifiers(found))) and value.is_floating_point()


def _classifiers(found: ResolvedBackbone) -> tuple[str, ...]:
    names = found.settings.classifier
    return (names,) if isinstance(names, str) else tuple(names or ())


def _classes(found: ResolvedBackbone, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As many classes as the file's classifier has; none where it has none and is of timm's own names."""
    counts = {len(state[f"{name}.weight"]) for name in _classifiers(found) if f"{name}.weight" in state}
    if not counts and own.keys() & state.keys():
        counts = {0}
    return {"num_classes": counts.pop()} if len(counts) == 1 else {}


def _check_positions(
    found: ResolvedBackbone, request: BackboneRequest, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> None:
    """timm would fit the position embeddings of another size unasked."""
    for key in own.keys() & state.keys():
        if request.image_size is None and "pos_embed" in key and state[key].shape != own[key].shape:
            raise WeightsDoNotFit(
                f"the weights {request.weights} were made for images of another size than {found.title}: {key} is "
                f"{list(state[key].shape)}, expected {list(own[key].shape)}. Give their size with --image-size"
            )


def _filled(
    found: ResolvedBackbone, size: tuple[int, int], state: dict[str, torch.Tensor], options: dict[str, Any]
) -> Any:
    overlay: dict[str, Any] = {"state_dict": dict(state)}
    if options:
        overlay |= {**options, "label_offset": None}
    try:
        with seeded(0):
            network = _built(found, size, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # load_state_dict's, and whatever timm's own renaming of names meets
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[1] if len(lines) > 1 else first_line(error)
        raise WeightsDoNotFit(
            f"the weights {found.weights} are not of timm's {found.architecture}: {why[:200]}"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)
    network.reset_classifier(0)  # no output uses it
    return network


# Arguments saved with weights that decide nothing of a feature, or that would make timm look for files.
_NOT_TAKEN = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path",
              "cache_dir", "features_only", "num_classes", "in_chans", "scriptable", "exportable", "no_jit", "device",
              "dtype", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate")  # fmt: skip
_PLACES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "architecture")


@dataclass(frozen=True)
class ResolvedBackbone:
    """An architecture, the settings of its weights, and where these are."""

    architecture: str
    settings: Any  # timm's PretrainedCfg
    id: str
    again: str  # the name that finds it again from anywhere
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm.create_model, saved with the weights
    weights: Path | None = None  # a file or folder
    revision: str = ""

    @property
    def title(self) -> str:
        return f"timm:{self.id}"


def find(where: str, request: BackboneRequest) -> ResolvedBackbone:
    """Raises UnknownBackbone, WeightsNotFound, WeightsDoNotFit."""
    folder = Path(os.path.expanduser(where))
    given = Path(os.path.expanduser(request.weights)) if request.weights is not None else None
    if given is not None and not given.exists():
        raise WeightsNotFound(f"--weights {given}: there is no such file or folder")
    if folder.is_dir():
        found = _of_folder(folder, where, f"timm:{folder.resolve()}")
        return replace(found, weights=given or folder)
    name, _, revision = where.partition("@")
    if name.startswith(("/", ".", "~")):
        raise UnknownBackbone(f'there is no folder "{name}"; expected one with a config.json as timm writes it')
    if "/" in name:
        path, commit = snapshot(name, revision or None, weights=given is None and not request.untrained)
        found = _of_folder(path, name, f"timm:{name}@{commit}")
        return replace(found, weights=given or path, revision=commit)
    found = _registered(name)
    if given is None:
        return found if request.untrained else _published(found, revision)
    if not is_timm(given):
        return replace(found, weights=given)
    saved = _of_folder(given, found.id, found.again)
    if saved.architecture != found.architecture:
        raise WeightsDoNotFit(f"the weights {given} are of timm's {saved.architecture}, not of {found.architecture}")
    return saved


def is_timm(folder: Path) -> bool:
    """Whether a folder's config.json is timm's: it names an architecture, and no model type of transformers."""
    try:
        record = read_record((folder / "config.json").resolve())  # the hub's cache has links
    except CacheError:
        return False
    return isinstance(record.get("architecture"), str) and "model_type" not in record


def _of_folder(folder: Path, name: str, again: str) -> ResolvedBackbone:
    """From a config.json of timm's; an older one has everything at one level."""
    import timm

    if not is_timm(folder):
        raise UnknownBackbone(f"{folder} has no config.json as timm writes it, with an architecture in it")
    record = read_record((folder / "config.json").resolve())
    architecture, arguments = record["architecture"], record.get("model_args") or {}
    inner = record.get("pretrained_cfg", record)
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        raise UnknownBackbone(f"{folder} is of {architecture[:80]!a}, which this timm does not have.{near}")
    if not isinstance(inner, dict) or not isinstance(arguments, dict):
        raise WeightsDoNotFit(f"{folder / 'config.json'} is not as timm writes it: a record is expected in its fields")
    inner = {**inner, **{key: record[key] for key in ("num_classes",) if key in record}}
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in arguments.items()
        if key not in _NOT_TAKEN
    }
    return ResolvedBackbone(architecture, _settings(folder, inner, arguments), name, again, arguments, folder)


def _settings(folder: Path, record: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """timm's PretrainedCfg, without anything that leads elsewhere; its images have the size that a network was made for
    which takes no other."""
    from timm.models import PretrainedCfg

    made_for = arguments.get("img_size")
    if made_for is not None and record.get("fixed_input_size"):
        sides = made_for if isinstance(made_for, tuple) else (made_for, made_for)
        record = {**record, "input_size": (3, *sides)}

    kept = [key for key in PretrainedCfg.__dataclass_fields__ if key in record and key not in _PLACES]
    values: dict[str, Any] = {k: tuple(record[k]) if isinstance(record[k], list) else record[k] for k in kept}
    plain = PretrainedCfg(**values)
    sizes = plain.input_size
    whole = isinstance(sizes, tuple) and len(sizes) == 3 and all(type(n) is int and 0 < n < 1 << 16 for n in sizes)
    if not whole:
        raise WeightsDoNotFit(f"{folder / 'config.json'} has an input_size of {str(sizes)[:80]}; expected (3, h, w)")
    return plain


def _registered(name: str) -> ResolvedBackbone:
    import timm
    from timm.models import get_pretrained_cfg

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownBackbone(f'timm has no model "{name}".{nearest(architecture, timm.list_models())}')
    try:
        settings = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        known = [word.partition(".")[2] for word in timm.list_models(f"{architecture}.*", pretrained=True)]
        have = f"there are {', '.join(known)}" if known else "it was published without any"
        raise UnknownBackbone(f'timm has no weights "{tag}" of {architecture}; {have}') from error
    assert settings is not None
    tagged = f"{architecture}.{settings.tag}" if settings.tag else architecture
    return ResolvedBackbone(architecture, settings, tagged, f"timm:{tagged}")


def by_name(found: ResolvedBackbone) -> ResolvedBackbone:
    """The same without the arguments that were saved with it: as the architecture's name alone makes it."""
    from timm.models import get_pretrained_cfg

    registered = get_pretrained_cfg(found.architecture)
    fixed = registered is not None and registered.fixed_input_size
    return replace(found, arguments={}, settings=replace(found.settings, fixed_input_size=fixed))


def _published(found: ResolvedBackbone, revision: str) -> ResolvedBackbone:
    """With the weights of the hub or its local cache, else of the address that timm knows."""
    settings = found.settings
    if settings.hf_hub_id:
        folder, commit = snapshot(settings.hf_hub_id, revision or None)
        return replace(found, weights=folder, revision=commit, again=f"timm:{found.id}@{commit}")
    if isinstance(settings.url, str) and settings.url and not settings.custom_load:
        path = fetched(settings.url, found.title)
        return replace(found, weights=path, revision=path.name)
    raise WeightsNotFound(f"{found.title} was published without weights; it exists only with --random-weights")


@dataclass(frozen=True)
class OutputTraits:
    """What a network gives of an image, and which of its rows are what."""

    map: bool
    nhwc: bool
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    layers: int
    vector: str
    refused: dict[str, str]


def infer_outputs(title: str, network: Any, features: Any, size: tuple[int, int]) -> OutputTraits:
    """Of a network with its classifier, and of what its ``forward_features`` made of one image of ``size``. Raises
    OutputRefused."""
    if not isinstance(features, torch.Tensor) or features.dim() not in (3, 4):
        what = list(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise OutputRefused(
            f"{title} cannot be a backbone here: its forward_features gives {what}; expected tokens [B,T,D] or a "
            "map [B,C,h,w]"
        )
    trained, wide = _head(network, features)
    if features.dim() == 4:
        return _gives_map(title, network, features, wide)
    return _gives_tokens(title, network, features, size, trained, wide)


def _head(network: Any, features: torch.Tensor) -> tuple[bool, int]:
    """(whether parameters come between the features and the vector, width of the vector)"""
    used: list[nn.Module] = []
    with_own = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(lambda module, _: used.append(module)) for module in with_own]
    try:
        vector = network.forward_head(features, pre_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(used), vector.flatten(1).shape[1]


def _gives_map(title: str, network: Any, features: torch.Tensor, wide: int) -> OutputTraits:
    nhwc = str(getattr(getattr(network, "output_fmt", ""), "value", getattr(network, "output_fmt", ""))) == "NHWC"
    _, *sides = features.shape
    channels, grid = (sides[2], (sides[0], sides[1])) if nhwc else (sides[0], (sides[1], sides[2]))
    refused = {
        "cls": f"{title} has no class token; gap is its vector",
        "pooler": "the vector of a network that gives a map is gap",
    }
    if channels != wide:
        why = f"its map has {channels:,} channels, and the vector that its classifier receives {wide:,}"
        refused |= {"tokens": why, "mean": why}
        grid = (0, 0)
    return OutputTraits(True, nhwc, (), grid, wide, 0, "gap", refused)


def _gives_tokens(
    title: str, network: Any, features: torch.Tensor, size: tuple[int, int], trained: bool, wide: int
) -> OutputTraits:
    count, width = features.shape[1:]
    refused = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    places = _places(network, count, size) if width == wide else None
    if places is None:
        why = f"which of the {count} rows of {title} are patches is not known"
        why = why if width == wide else f"its tokens have {width:,} numbers, and the vector of its classifier {wide:,}"
        refused |= dict.fromkeys(("tokens", "cls", "mean"), why)
        return OutputTraits(False, False, (), (0, 0), wide, 0, "pooler", refused)
    prefix, grid = places
    if prefix[:1] != ("cls",):
        refused["cls"] = f"{title} has no class token"
    vector = "pooler" if trained else _bare(network, prefix)
    if vector != "pooler":
        refused["pooler"] = f"what its classifier receives is {vector}"
    options = inspect.signature(getattr(network, "forward_intermediates", _bare)).parameters
    layers = len(network.blocks) if {"return_prefix_tokens", "norm"} <= set(options) else 0
    return OutputTraits(False, False, prefix, grid, width, layers, vector, refused)


def _places(network: Any, count: int, size: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
    """(prefix, grid) of ``count`` tokens; None where nothing says so."""
    info = getattr(network, "feature_info", None) or [{}]
    stride = info[-1].get("reduction") or 1
    grid = (size[0] // stride, size[1] // stride)
    begin, pool = count - grid[0] * grid[1], getattr(network, "global_pool", "")
    names = [word for word in ("cls", "dist") if getattr(network, f"{word}_token", None) is not None]
    names = names or (["cls"] if pool == "token" else [])
    if begin != getattr(network, "num_prefix_tokens", begin) or begin < len(names):
        return None
    if begin > len(names) and not hasattr(network, "num_prefix_tokens"):
        return None
    return (*names, *(f"reg{k}" for k in range(begin - len(names)))), grid


def _bare(network: Any, prefix: tuple[str, ...]) -> str:
    """The output that a pooling without parameters gives."""
    pool, whole = getattr(network, "global_pool", ""), getattr(network, "pool_include_prefix", False)
    if pool == "token" and prefix[:1] == ("cls",) and "dist" not in prefix:
        return "cls"
    return "mean" if pool == "avg" and not (prefix and whole) else "pooler"


def identifying_traits(network: nn.Module) -> list[Any]:
    """All that tells two networks of one architecture apart, besides their weights: modules, their plain attributes and
    the shapes of their parameters."""
    found: list[Any] = []
    for name, module in network.named_modules():
        plain = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
        }
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        found.append((name, type(module).__name__, plain, shapes))
    return found
