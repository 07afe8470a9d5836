"""Which of timm's architectures is meant by a name, with the settings of its weights, and where these lie.

A name is timm's own (``vit_base_patch16_224``, with or without a tag of its weights), ``<owner>/<repo>`` of the hub,
each with or without @revision, or a folder with a config.json as timm writes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featurecache.backbones import Request
from featurecache.backbones.tv import fetched
from featurecache.backbones.weights import snapshot
from featurecache.errors import CacheError, UnknownBackbone, WeightsDoNotFit, WeightsNotFound, nearest
from featurecache.records import read_record

# Arguments saved with weights that decide nothing of a feature, or that would make timm look for files.
_NOT_TAKEN = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path",
              "cache_dir", "features_only", "num_classes", "in_chans", "scriptable", "exportable", "no_jit", "device",
              "dtype", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate")  # fmt: skip
_PLACES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "architecture")


@dataclass(frozen=True)
class Found:
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


def find(where: str, request: Request) -> Found:
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


def _of_folder(folder: Path, name: str, again: str) -> Found:
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
    return Found(architecture, _settings(folder, inner, arguments), name, again, arguments, folder)


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


def _registered(name: str) -> Found:
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
    return Found(architecture, settings, tagged, f"timm:{tagged}")


def by_name(found: Found) -> Found:
    """The same without the arguments that were saved with it: as the architecture's name alone makes it."""
    from timm.models import get_pretrained_cfg

    registered = get_pretrained_cfg(found.architecture)
    fixed = registered is not None and registered.fixed_input_size
    return replace(found, arguments={}, settings=replace(found.settings, fixed_input_size=fixed))


def _published(found: Found, revision: str) -> Found:
    """With the weights of the hub or its local cache, else of the address that timm knows."""
    settings = found.settings
    if settings.hf_hub_id:
        folder, commit = snapshot(settings.hf_hub_id, revision or None)
        return replace(found, weights=folder, revision=commit, again=f"timm:{found.id}@{commit}")
    if isinstance(settings.url, str) and settings.url and not settings.custom_load:
        path = fetched(settings.url, found.title)
        return replace(found, weights=path, revision=path.name)
    raise WeightsNotFound(f"{found.title} was published without weights; it exists only with --random-weights")
