"""Backbones of timm: any of its image models, with the data config that belongs to the weights.

A network runs timm's own ``forward_features``; what the library makes of that for its classifier
(``forward_head(…, pre_logits=True)``) is its vector. A map [B,C,h,w] is a CNN's: ``tokens`` row by row, and ``gap``.
[B,T,D] is a transformer's: ``tokens``, and ``pooler`` where the vector is neither the class token nor the mean of the
patches. Earlier blocks are those of ``forward_intermediates``, with the final norm. The classifier is taken away.

Weights are read without running code, then renamed and loaded by timm itself, strictly.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from featurecache.backbones import Backbone, Request, frozen, seeded, versions
from featurecache.backbones.aliases import Alias
from featurecache.backbones.imported import first_line
from featurecache.backbones.networks import TimmMap, TimmTokens
from featurecache.backbones.own import unwrapped
from featurecache.backbones.processors import check, from_timm
from featurecache.backbones.timm_found import Found, by_name, find
from featurecache.backbones.timm_shapes import Gives, gives_of, traits
from featurecache.backbones.weights import digest, read_state_dict
from featurecache.errors import BadOption, OutputRefused, WeightsDoNotFit
from featurecache.preprocess import Preprocess

_NOWHERE = {"url": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None, "source": None, "custom_load": False}


def load(where: str, request: Request, alias: Alias | None) -> Backbone:
    """``where``: see `featurecache.backbones.timm_found`."""
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


def _preprocess(found: Found, request: Request) -> Preprocess:
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


def _built(found: Found, size: tuple[int, int], **options: Any) -> Any:
    """The network as timm makes it for images of ``size``."""
    import timm

    arguments = dict(found.arguments)
    if size != tuple(found.settings.input_size[1:]) and (found.settings.fixed_input_size or "img_size" in arguments):
        arguments["img_size"] = size
    settings = replace(found.settings, architecture=found.architecture, **_NOWHERE)
    return timm.create_model(found.architecture, pretrained_cfg=settings, **arguments, **options)


def _outline(found: Found, request: Request, preprocess: Preprocess) -> tuple[Any, Gives, dict[str, Any]]:
    """The network without numbers, in no memory; what it gives; what of the arguments saved with it makes it another
    than timm makes by the name alone. Raises BadOption, OutputRefused."""
    size = preprocess.size
    try:
        with torch.device("meta"), torch.no_grad():
            network: Any = frozen(_built(found, size))
            if request.image_size is not None:
                preprocess.scaled(request.image_size, _patch(network))  # refuses what is not a multiple of it
            features = network.forward_features(torch.zeros(1, 3, *size))
            gives = gives_of(found.title, network, features, size)
            same = not found.arguments or traits(network) == traits(frozen(_built(by_name(found), size)))
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


def _positions(found: Found, gives: Gives, size: tuple[int, int]) -> str:
    native = size == tuple(found.settings.input_size[1:])
    if native or (gives.map and not (found.settings.fixed_input_size or "img_size" in found.arguments)):
        return "none" if gives.map else "as trained"
    return "interpolated (as timm does)"


def _made(found: Found, request: Request, outline: Any, size: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
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


def _decides(found: Found, key: str, value: torch.Tensor) -> bool:
    """Not the classifier, which no output uses, and not counters."""
    return not key.startswith(tuple(f"{name}." for name in _classifiers(found))) and value.is_floating_point()


def _classifiers(found: Found) -> tuple[str, ...]:
    names = found.settings.classifier
    return (names,) if isinstance(names, str) else tuple(names or ())


def _classes(found: Found, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As many classes as the file's classifier has; none where it has none and is of timm's own names."""
    counts = {len(state[f"{name}.weight"]) for name in _classifiers(found) if f"{name}.weight" in state}
    if not counts and own.keys() & state.keys():
        counts = {0}
    return {"num_classes": counts.pop()} if len(counts) == 1 else {}


def _check_positions(
    found: Found, request: Request, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> None:
    """timm would fit the position embeddings of another size unasked."""
    for key in own.keys() & state.keys():
        if request.image_size is None and "pos_embed" in key and state[key].shape != own[key].shape:
            raise WeightsDoNotFit(
                f"the weights {request.weights} were made for images of another size than {found.title}: {key} is "
                f"{list(state[key].shape)}, expected {list(own[key].shape)}. Give their size with --image-size"
            )


def _filled(found: Found, size: tuple[int, int], state: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
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
