"""Which network of timm a name, a folder or a file of weights means, and what says how its images are prepared.

Beside weights lies ``config.json`` as timm writes it (an architecture, ``model_args``, ``pretrained_cfg``; of older
ones everything at one level), or ``open_clip_config.json`` of a CLIP whose image tower is a network of timm
(BiomedCLIP). A file with neither is fed as the weights are that timm has under the name; that it is assumed is said.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featurecache.backbones.base import BackboneRequest
from featurecache.backbones.weights import assumed_feeding, download_weights, existing_weights, snapshot
from featurecache.errors import BadOption, CacheError, UnknownBackbone, WeightsDoNotFit, WeightsNotFound, nearest
from featurecache.files.records import check_part_of_a_run, read_record
from featurecache.formatting import shell_word

_NOWHERE = {"url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None, "source": None, "custom_load": False}
_IGNORED_SETTINGS = {*_NOWHERE, "state_dict", "architecture"}
# Arguments saved with weights that decide nothing of a feature, or that would make timm look for files.
_IGNORED_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
    "features_only", "num_classes", "in_chans", "scriptable", "exportable", "no_jit", "device", "dtype", "drop_rate",
    "drop_path_rate", "proj_drop_rate", "attn_drop_rate",
}  # fmt: skip
_MLPS = ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")  # classes that ``mlp_layer`` may name: JSON holds no class


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
    feeding: str = "timm's transform by the data config of the weights"  # what says how images are prepared
    open_clip: bool = False  # the image tower of an open_clip

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
        arguments = {**self.arguments, **sized}
        if isinstance(mlp := arguments.get("mlp_layer"), str):
            arguments["mlp_layer"] = getattr(timm.layers, mlp)
        return timm.create_model(self.architecture, pretrained_cfg=settings, **arguments, **options)


def find_model(where: str, request: BackboneRequest) -> TimmModel:
    """Which of timm's architectures a name means. Raises UnknownBackbone, WeightsNotFound, WeightsDoNotFit."""
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
    model = published_model(name)
    if weights is None:
        return model if request.untrained else _with_published_weights(model, revision)
    own = timm_record(folder := weights if weights.is_dir() else weights.parent)
    if own is not None and own["architecture"] == model.architecture:
        return _of_folder(folder, model.id, model.portable_name, weights=weights)
    if own is not None and weights.is_dir():
        architecture = own["architecture"][:80]
        raise WeightsDoNotFit(f"the weights {weights} are of timm's {architecture}, not of {model.architecture}")
    if (record := open_clip_record(folder)) is not None:
        return _with_open_clip_settings(replace(model, weights=weights), folder, record)
    return replace(model, weights=weights, feeding=assumed_feeding(model.title, "a config.json of timm's beside it"))


def timm_record(folder: Path) -> dict[str, Any] | None:
    """A folder's config.json where it is timm's: it names an architecture, and no model type of transformers."""
    record = _json(folder / "config.json")
    return record if isinstance(record.get("architecture"), str) and "model_type" not in record else None


def is_timm_folder(folder: Path) -> bool:
    """Whether a folder says that it holds a network of timm, alone or inside an open_clip."""
    if timm_record(folder) is not None:
        return True
    return open_clip_record(folder) is not None and "model_type" not in _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        return read_record(path.resolve())  # the hub's cache has links
    except CacheError:
        return {}


def _of_folder(folder: Path, name: str, portable_name: str, **fields: Any) -> TimmModel:
    """From a config.json of timm's; an older one has everything at one level."""
    import timm
    from timm.models import PretrainedCfg

    path, record = folder / "config.json", timm_record(folder)
    if record is None and (clip := open_clip_record(folder)) is not None:
        return _of_open_clip(folder, name, portable_name, clip, **fields)
    if record is None and "model_type" in _json(path):
        raise UnknownBackbone(f"{name} is a checkpoint of transformers: --backbone {shell_word(f'hf:{name}')}")
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
    arguments = {name: as_tuple(value) for name, value in arguments.items() if name not in _IGNORED_ARGUMENTS}
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = str(arguments["mlp_layer"]).removeprefix("timm.layers.")
        if arguments["mlp_layer"] not in _MLPS:
            raise WeightsDoNotFit(f"{path} has another mlp_layer than {', '.join(_MLPS)}")
    settings = {**settings, **{name: record[name] for name in ("num_classes",) if name in record}}
    if arguments.get("img_size") is not None and settings.get("fixed_input_size"):  # made for it, and takes no other
        side = arguments["img_size"]
        settings["input_size"] = (3, *(side if isinstance(side, tuple) else (side, side)))
    fields_of_timm = PretrainedCfg.__dataclass_fields__.keys() - _IGNORED_SETTINGS
    config = PretrainedCfg(**{name: as_tuple(settings[name]) for name in fields_of_timm & settings.keys()})
    sizes = config.input_size
    if channels is not None and isinstance(sizes, tuple):
        sizes = (channels, *sizes[1:])
    if not (isinstance(sizes, tuple) and len(sizes) == 3 and all(type(n) is int and 0 < n < 1 << 16 for n in sizes)):
        raise WeightsDoNotFit(f"{path} has an input_size of {str(sizes)[:80]}; expected (3, h, w), of grey (1, h, w)")
    settings, feeding = replace(config, input_size=sizes), "timm's transform, as its config.json says"
    return TimmModel(architecture, settings, name, portable_name, arguments, feeding=feeding, **fields)


def open_clip_record(folder: Path) -> dict[str, Any] | None:
    """The open_clip_config.json in a folder; None where there is none."""
    record = _json(folder / "open_clip_config.json")
    return record if "preprocess_cfg" in record or "model_cfg" in record else None


def _of_open_clip(folder: Path, name: str, portable_name: str, record: dict[str, Any], **fields: Any) -> TimmModel:
    """The network of timm inside an open_clip. Raises UnknownBackbone: its settings name none."""
    vision = _part(_part(record, "model_cfg"), "vision_cfg")
    if not isinstance(tower := vision.get("timm_model_name"), str):
        names = "is open_clip's own and no network of timm" if vision else "has no name in its open_clip_config.json"
        kind = "vit_base_patch32_clip_224" if vision else "vit_base_patch16_224"
        way = f"--backbone timm:{kind} --weights {shell_word(str(fields['weights'] or folder))}"
        raise UnknownBackbone(f"the image tower of {name} {names}; say which it is, such as {way}")
    model = replace(published_model(tower), id=name, portable_name=portable_name, **fields)
    return _with_open_clip_settings(model, folder, record)


def _part(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _with_open_clip_settings(model: TimmModel, folder: Path, record: dict[str, Any]) -> TimmModel:
    """Fed as open_clip feeds the network of timm inside its model. Raises WeightsDoNotFit."""
    path, defaults = folder / "open_clip_config.json", {"resize_mode": "shortest", "interpolation": "bicubic"}
    settings = defaults | _part(record, "preprocess_cfg")
    size = settings.get("size") or _part(_part(record, "model_cfg"), "vision_cfg").get("image_size")
    size = [size, size] if isinstance(size, int) else size or model.settings.input_size[1:]
    try:
        mean, std = (tuple(map(float, settings[key])) for key in ("mean", "std"))
        height, width = map(int, size)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsDoNotFit(f"{path} is not as open_clip writes it: preprocess_cfg with mean and std") from error
    if not (0 < height < 1 << 16 and 0 < width < 1 << 16):
        raise WeightsDoNotFit(f"{path} has images of {height}×{width} pixels; expected the two sides, such as 224")
    if settings["resize_mode"] not in ("shortest", "squash"):
        raise WeightsDoNotFit(f"{path} resizes by {settings['resize_mode']}; expected shortest or squash")
    mode = "squash" if settings["resize_mode"] == "squash" else "center"
    feeding = {"mean": mean, "std": std, "interpolation": settings["interpolation"], "crop_mode": mode}
    feeding |= {"crop_pct": 1.0, "input_size": (3, height, width)}
    words = "open_clip's transform, as its open_clip_config.json says"
    return replace(model, settings=replace(model.settings, **feeding), feeding=words, open_clip=True)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_timm() -> None:
    """Raises BadOption where the package is not installed."""
    if find_spec("timm") is None:
        raise BadOption("a backbone of timm needs a package: pip install 'featurecache[timm]'.")


def published_model(name: str) -> TimmModel:
    """An architecture of timm's, with or without a tag of its weights. Raises UnknownBackbone."""
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
