"""Backbones of the user's own: ``python:<module>:<factory>[:<layer>]`` with ``--weights FILE``.

The factory (a function or class without arguments) returns a torch module of images [B,3,h,w]. What cannot be known
from its code is said by attributes of the network, its class or the factory:

    network.preprocess = {"image_size": 224, "resize": 256, "interpolation": "bilinear", "mean": […], "std": […]}
                          as torchvision's Resize, CenterCrop, ToTensor and Normalize treat a PIL image; "resize" is
                          "squash" (both sides to image_size) or the shortest edge in pixels before the centre is cut
                          out. Or all fields of featurecache.preprocess.Preprocess.
    network.keep        = "layer4"   the submodule whose output is kept; without it what the network returns. A map
                          [B,C,h,w] gives tokens, and gap (its average); [B,T,D] gives tokens; [B,D] gives pooler. Or
                          {"tokens": "norm", "pooler": "pool"}: each from its own submodule. A layer named in the
                          backbone's name (python:nets:make:features.3) comes before it.
    network.prefix      = ["cls"]    of [B,T,D]: the tokens before those of the patches, [] where there are none
    network.grid        = (h, w)     of [B,T,D]: the patches, where they are no square

Axis letters: B batch, T tokens, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from featurecache.backbones import Backbone, Request, frozen, seeded, versions
from featurecache.backbones.imported import first_line, imported
from featurecache.backbones.kept import Kept, places, probe, refused, width
from featurecache.backbones.weights import digest, read_state_dict, some
from featurecache.errors import PreprocessingRefused, UnknownBackbone, WeightsDoNotFit, WeightsNotFound, nearest
from featurecache.preprocess import Preprocess

_SHORT = ("image_size", "resize", "interpolation", "mean", "std")


def load(where: str, request: Request) -> Backbone:
    """``where`` is ``<module>:<factory>[:<layer>]``. Runs the user's code, because the user named it."""
    title = f"python:{where}"
    module, factory, *layer = where.split(":") if ":" in where else (where, "")
    if not all(part.isidentifier() for part in [*module.split("."), factory]) or len(layer) > 1 or "" in layer:
        raise UnknownBackbone(
            f'"{title}" is not python:<module>:<factory>[:<layer>], for example python:my_networks:chest_net:features'
        )
    if not request.untrained and request.weights is None:
        raise WeightsNotFound(
            f"{title} names a network without weights; add --weights FILE, or --random-weights to try the tool"
        )
    with imported(module) as (source, digests):
        return _loaded(title, source, digests, request)


def _loaded(title: str, source: ModuleType, digests: dict[str, str], request: Request) -> Backbone:
    _, module, factory, *layer = title.split(":")
    network, said = _made(title, source, factory, request)
    said |= {"keep": layer[0]} if layer else {}
    preprocess = _preprocess(title, said["preprocess"], request)
    weights = _weights(title, network, request)
    model = Kept(title, frozen(network), said["keep"])
    channels_last = probe(model, preprocess.size)
    prefix, grid = places(model, said)
    reasons = refused(model, prefix)
    kept = {"keep": model.keep, "prefix": list(prefix)}
    imports = {name: value for name, value in digests.items() if name != module}
    code = {"factory": factory, "source": digests[module], "imports": imports, "config": kept}
    return Backbone(
        name=factory,
        model=model,
        architecture={"library": "python", "class": type(network).__name__, **code},
        weights=weights,
        preprocess=preprocess,
        image_size=preprocess.size,
        position_embeddings="its own",
        prefix=prefix,
        grid=grid,
        width=width(model),
        layers=0,
        vector=next(name for name in ("cls", "pooler", "gap", "mean") if name not in reasons),
        channels_last=channels_last,
        parameters=sum(p.numel() for p in network.parameters()),
        provenance={
            "provider": "python",
            "id": f"{module}:{factory}",
            "revision": "",
            "licence": "not known; it is your own",
            "source": str(source.__file__),
            "preprocessing": f"as {factory} says",
            "attention": None,
            "versions": versions("torchvision"),
            "request": request.again(title),
        },
        refused=reasons,
    )


def _made(title: str, source: ModuleType, factory: str, request: Request) -> tuple[nn.Module, dict[str, Any]]:
    """(the network, in float32, what it or its factory says of itself). What a factory draws is always the seed's."""
    make = getattr(source, factory, None)
    if not callable(make):
        known = [name for name, value in vars(source).items() if callable(value) and name[0] != "_"]
        raise UnknownBackbone(
            f"{title}: {source.__file__} has no function or class {factory}.{nearest(factory, known)}"
        )
    try:
        with seeded(request.seed if request.untrained else 0):
            network = make()
    except Exception as error:  # whatever the user's code raises
        raise UnknownBackbone(
            f"{title}: {factory}() failed ({first_line(error)}); it is called without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise UnknownBackbone(f"{title}: {factory}() returned a {type(network).__name__}, expected a torch.nn.Module")
    said = {name: _said(name, network, make) for name in ("preprocess", "keep", "prefix", "grid")}
    return network.float(), said


def _said(name: str, *objects: Any) -> Any:
    """An attribute of the network, else of its factory; a method or submodule that happens to be called so is none."""
    values = (getattr(place, name, None) for place in objects)
    fine = (v for v in values if v is not None and not inspect.isroutine(v) and not isinstance(v, nn.Module))
    return next(fine, None)


def _preprocess(title: str, said: Any, request: Request) -> Preprocess:
    fields = {field.name for field in dataclasses.fields(Preprocess)}
    if not isinstance(said, dict) or set(said) not in (set(_SHORT), fields):
        what = some(map(str, said)) if isinstance(said, dict) else f"a {type(said).__name__}"
        found = "does not say" if said is None else f"says in a way that we cannot read ({what})"
        raise PreprocessingRefused(
            f"{title} {found} how its images were prepared. Write where it is made, with the numbers of its training:\n"
            '       network.preprocess = {"image_size": …, "resize": …, "interpolation": "bilinear", '
            '"mean": […, …, …], "std": […, …, …]}\n'
            '       "resize" is "squash", or the pixels of the shortest edge before the centre is cut out'
        )
    try:
        preprocess = Preprocess.from_dict(said if set(said) == fields else _as_torchvision(**said))
    except (TypeError, ValueError) as error:
        raise PreprocessingRefused(f"{title}: network.preprocess is not usable: {error}") from error
    if request.image_size is not None:
        preprocess = preprocess.scaled(request.image_size)
    return preprocess.fitted(request.fit)


def _as_torchvision(image_size: int, resize: int | str, interpolation: str, mean: Any, std: Any) -> dict[str, Any]:
    """Resize, CenterCrop, ToTensor and Normalize of a PIL image."""
    sides, squash = [operator.index(image_size)] * 2, resize == "squash"
    return {
        "mode": "squash" if squash else "shortest", "resize": sides if squash else [operator.index(resize)],  # type: ignore[arg-type]
        "crop": None if squash else sides, "kernel": "pil", "interpolation": interpolation, "antialias": True,
        "crop_rounding": "half even", "scale": 1 / 255, "mean": [float(m) for m in mean],
        "std": [float(s) for s in std], "arithmetic": "rescale first",
    }  # fmt: skip


def _weights(title: str, network: nn.Module, request: Request) -> dict[str, Any]:
    """Fill the network; what identifies its weights. Of untrained ones also the digest: a factory may read files."""
    own = network.state_dict()
    if request.untrained:
        return {"random_seed": request.seed, "blake2b": digest(_deciding(own))}
    assert request.weights is not None
    state = unwrapped(title, read_state_dict(Path(os.path.expanduser(request.weights))), own)
    shapes = [
        f"{name} is {list(value.shape)}, expected {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    missing = [name for name in _deciding(own) if name not in state]
    extra = [name for name in _deciding(state) if name not in own]
    if shapes or missing or extra:
        what = f"have other shapes: {some(shapes, 2)}" if shapes else f"lack {len(missing)} tensors: {some(missing)}"
        if not shapes and not missing:
            what = (
                f"hold {len(extra)} tensors that it has not: {some(extra)}. Let the factory return the whole network; "
                "network.keep names the submodule to keep"
            )
        raise WeightsDoNotFit(f"the weights {request.weights} are not of {title}: they {what}")
    network.load_state_dict(state, strict=False)
    return {"blake2b": digest(_deciding(state))}


def unwrapped(title: str, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix under which a training script keeps the network (``model.``, ``net.backbone.``)."""
    if not own or any(name in own for name in state):
        return state
    first = max(own, key=len)
    prefixes = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    if len(prefixes) > 1:
        raise WeightsDoNotFit(f"the weights hold {title} {len(prefixes)} times, as {some(prefixes)}; expected it once")
    if not prefixes:
        return state
    return {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}


def _deciding(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the counters of batches, which only some files have."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
