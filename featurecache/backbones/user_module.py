"""A network of the user's own as a backbone: ``python:<module>:<factory>[:<layer>]`` with ``--weights FILE``.

The factory (a function or class without arguments) returns a torch module of images [B,3,h,w]. What cannot be known
from its code is said by attributes of the network, its class or the factory:

    network.preprocess = {"image_size": 224, "resize": 256, "interpolation": "bilinear", "mean": […], "std": […]}
                          as torchvision's Resize, CenterCrop, ToTensor and Normalize treat a PIL image; "resize" is
                          "squash" (both sides to image_size) or the shortest edge in pixels before the centre is cut
                          out. Or all fields of featurecache.images.preprocessing.Preprocess. One number as mean and
                          one as std: the network takes grey images [B,1,h,w], Pillow's "L" of those in colour.
    network.keep        = "layer4"   the submodule whose output is kept; without it what the network returns. A map
                          [B,C,h,w] gives tokens, and gap (its average); [B,T,D] gives tokens; [B,D] gives pooler. Or
                          {"tokens": "norm", "pooler": "pool"}: each from its own submodule. A layer named in the
                          backbone's name (python:nets:make:features.3) comes before it.
    network.prefix      = ["cls"]    of [B,T,D]: the tokens before those of the patches, [] where there are none
    network.grid        = (h, w)     of [B,T,D]: the patches, where they are no square

Its code is known by its digest: see `featurecache.backbones.user_code`. What these attributes say is in the
fingerprint beside it.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from featurecache.backbones.base import SAME, Backbone, BackboneRequest, freeze, relative_l2, torch_seed, versions
from featurecache.backbones.processors import pil_preprocess
from featurecache.backbones.state_dicts import first_names, other_shapes
from featurecache.backbones.user_code import import_user_module, user_line
from featurecache.backbones.weights import existing_weights, read_checkpoint, weights_identity
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    UnknownBackbone,
    WeightsDoNotFit,
    WeightsNotFound,
    first_line,
    nearest,
)
from featurecache.images.preprocessing import Preprocess


def load(where: str, request: BackboneRequest) -> Backbone:
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
    with import_user_module(module) as (source, digests):
        network, attributes = _call_factory(title, source, factory, request)
        preprocess = _preprocess(title, attributes["preprocess"], request)
        weights, taken = _weights(title, network, request)
        model = FeatureTap(title, freeze(network), layer[0] if layer else attributes["keep"])
        channels_last = model.infer_shapes(preprocess.channels, preprocess.size)
    prefix, grid = model.token_layout(attributes["prefix"], attributes["grid"])
    refusals = model.output_refusals(prefix)
    imports = {name: value for name, value in digests.items() if name != module}
    config = {"keep": model.keep, "prefix": list(prefix)}
    code = {"factory": factory, "source": digests[module], "imports": imports, "config": config}
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
        width=model.width(),
        layers=0,
        vector=next(name for name in ("cls", "pooler", "gap", "mean") if name not in refusals),
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
            "weights": taken,
            "request": request.portable_arguments(title),
        },
        refusals=refusals,
    )


def _call_factory(
    title: str, source: ModuleType, factory: str, request: BackboneRequest
) -> tuple[nn.Module, dict[str, Any]]:
    """(the network, in float32, what it or its factory says of itself). What a factory draws is always the seed's."""
    make = getattr(source, factory, None)
    if not callable(make):
        names = [name for name, value in vars(source).items() if callable(value) and name[0] != "_"]
        raise UnknownBackbone(
            f"{title}: {source.__file__} has no function or class {factory}.{nearest(factory, names)}"
        )
    try:
        with torch_seed(request.seed if request.untrained else 0):
            network = make()
    except Exception as error:  # whatever the user's code raises
        raise UnknownBackbone(
            f"{title}: {factory}() failed ({user_line(error) or first_line(error)}); it is called without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise UnknownBackbone(f"{title}: {factory}() returned a {type(network).__name__}, expected a torch.nn.Module")
    attributes: dict[str, Any] = {}
    for name in ("preprocess", "keep", "prefix", "grid"):
        values = (getattr(network, name, None), getattr(make, name, None))
        # a method or submodule that happens to be called so says nothing
        says = (v for v in values if v is not None and not inspect.isroutine(v) and not isinstance(v, nn.Module))
        attributes[name] = next(says, None)
    return network.float(), attributes


_SHORT_FORM = {"image_size", "resize", "interpolation", "mean", "std"}


def _preprocess(title: str, settings: Any, request: BackboneRequest) -> Preprocess:
    fields = {field.name for field in dataclasses.fields(Preprocess)}
    if not isinstance(settings, dict) or set(settings) not in (_SHORT_FORM, fields):
        what = first_names(map(str, settings)) if isinstance(settings, dict) else f"a {type(settings).__name__}"
        how = "does not say" if settings is None else f"says in a way that we cannot read ({what})"
        raise PreprocessingRefused(
            f"{title} {how} how its images were prepared. Write where it is made, with the numbers of its training:\n"
            '       network.preprocess = {"image_size": …, "resize": …, "interpolation": "bilinear", '
            '"mean": […, …, …], "std": […, …, …]}      of grey images: [one number] each\n'
            '       "resize" is "squash", or the pixels of the shortest edge before the centre is cut out'
        )
    try:
        preprocess = Preprocess.from_dict(settings) if set(settings) == fields else _as_torchvision(**settings)
    except (TypeError, ValueError) as error:
        raise PreprocessingRefused(f"{title}: network.preprocess is not usable: {error}") from error
    if request.image_size is not None:
        preprocess = preprocess.scaled(request.image_size)
    return preprocess.fitted(request.fit)


def _as_torchvision(image_size: int, resize: Any, interpolation: str, mean: Any, std: Any) -> Preprocess:
    side, constants = operator.index(image_size), [tuple(float(x) for x in values) for values in (mean, std)]
    if resize == "squash":
        return pil_preprocess("squash", (side, side), None, interpolation, *constants)
    return pil_preprocess("shortest", (operator.index(resize),), (side, side), interpolation, *constants)


def _weights(title: str, network: nn.Module, request: BackboneRequest) -> tuple[dict[str, Any], str]:
    """Fill the network: what identifies its weights, and what of the file was taken. Of untrained ones also the digest:
    a factory may read files."""
    own = network.state_dict()
    path = existing_weights(request.weights_path)
    if path is None or request.random_weights:
        return {"random_seed": request.seed, **weights_identity(title, _deciding(own))}, ""
    checkpoint = read_checkpoint(path, request.weights_name).fitted(title, own)
    state = checkpoint.tensors
    shapes = other_shapes(state, own)
    missing = [name for name in _deciding(own) if name not in state]
    extra = [name for name in _deciding(state) if name not in own]
    if shapes or missing or extra:
        what = (
            f"hold {len(extra)} tensors that it has not: {first_names(extra)}. Let the factory return the whole "
            "network; network.keep names the submodule to keep"
        )
        what = f"lack {len(missing)} tensors: {first_names(missing)}" if missing else what
        what = f"have other shapes: {first_names(shapes, 2)}" if shapes else what
        raise WeightsDoNotFit(f"the weights {request.weights} are not of {title}: they {what}")
    network.load_state_dict(state, strict=False)
    return weights_identity(title, _deciding(state)), checkpoint.line


def _deciding(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the counters of batches, which only some files have."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


_DIMENSIONS = {"tokens": (3, 4), "pooler": (2,), "gap": (4,)}  # output -> of which outputs of a submodule it is made
_DIMENSIONS_BY_NAME = {"tokens": (3, 4), "pooler": (2, 4), "gap": (2, 4)}  # ... where ``keep`` names it for the output


class FeatureTap(nn.Module):
    """The network's own forward, read where ``keep`` says: {output: submodule}, or one submodule for what it gives."""

    def __init__(self, title: str, network: nn.Module, keep: Any) -> None:
        super().__init__()
        self.title, self.network, self.by_name = title, network, isinstance(keep, dict)
        one_for_all = "" if keep is None else keep
        self.keep: dict[str, str] = dict(keep) if self.by_name else dict.fromkeys(_DIMENSIONS, one_for_all)
        names_submodules = self.keep and all(isinstance(path, str) for path in self.keep.values())
        if not names_submodules or not self.keep.keys() <= _DIMENSIONS.keys():
            raise OutputRefused(
                f"{title}: network.keep is {keep!r}; expected the name of a submodule, or a dict with some of "
                f"{', '.join(_DIMENSIONS)} and a submodule for each"
            )
        paths = dict(network.named_modules())
        for path in self.keep.values():
            if path not in paths:
                raise OutputRefused(f'{title} has no submodule "{path}".{nearest(path, paths)} See named_modules().')
        self.shapes: dict[str, tuple[int, ...]] = {}  # output -> shape of one image's, before it is made into rows

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,C,h,w] -> of tokens [B,T,D], pooler and gap [B,D] the wanted ones. Of a map [B,C,h,w] tokens are
        its places [B,h·w,C], row by row, and a vector their average [B,C]."""
        read = self.submodule_outputs(pixels)
        result = {name: read[self.keep[name]] for name in want}
        for name, tensor in result.items():
            if tensor.dim() == 4:
                result[name] = tensor.flatten(2).transpose(1, 2) if name == "tokens" else tensor.mean((2, 3))
        return result

    def submodule_outputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Submodule -> its output in a forward pass, copied: a ReLU behind it may write into it."""
        runs: dict[str, list[torch.Tensor]] = {path: [] for path in self.keep.values()}
        try:
            with contextlib.ExitStack() as hooks:
                for path, outputs in runs.items():
                    module = self.network.get_submodule(path)
                    hooks.enter_context(module.register_forward_hook(partial(self._copy_output, outputs)))
                self.network(pixels)
        except RuntimeError as error:
            if pixels.dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            kind = str(pixels.dtype).removeprefix("torch.")
            raise BadOption(
                f"{self.title} does not run in {kind} ({first_line(error)}); use --precision fp32"
            ) from error
        for path, outputs in runs.items():
            if len(outputs) != 1:
                raise OutputRefused(
                    f'{self.title}: the submodule "{path}" is run {len(outputs)} times in a forward pass, expected '
                    "once; name another in network.keep"
                )
        return {path: outputs[0] for path, outputs in runs.items()}

    def _copy_output(self, outputs: list[torch.Tensor], module: nn.Module, _: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, torch.Tensor):
            raise OutputRefused(
                f"{self.title}: {type(module).__name__} returns a {type(output).__name__}, expected a tensor; name "
                "the submodule whose output is to be kept: network.keep = NAME"
            )
        outputs.append(output.clone())

    @torch.no_grad()
    def infer_shapes(self, channels: int, size: tuple[int, int]) -> bool:
        """Run it, fix ``shapes`` and what of ``keep`` there is; whether it runs with channels last.

        Raises BadOption for a size that it does not take; OutputRefused for shapes that are no output, and where an
        image's numbers depend on what lies beside it.
        """
        pixels = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
        channels_last = sum(isinstance(module, nn.Conv2d) for module in self.network.modules()) > 1
        if channels_last:
            try:
                self.submodule_outputs(pixels.contiguous(memory_format=torch.channels_last))
            except Exception:  # as a ``view`` of a map raises
                channels_last = False
        pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        try:
            first, turned = self.submodule_outputs(pixels[:2]), self.submodule_outputs(pixels[[2, 0]])
        except OutputRefused:
            raise
        except Exception as error:  # whatever the user's code raises
            first_conv = next((module for module in self.network.modules() if isinstance(module, nn.Conv2d)), None)
            grey = first_conv is not None and first_conv.in_channels == 1 != channels
            way = ". It takes grey images: give network.preprocess one number as mean and one as std"
            why = (user_line(error) or first_line(error)) + way * grey
            raise BadOption(f"{self.title} does not take images of {size[0]}×{size[1]} pixels: {why}") from error
        self._choose_outputs({path: tuple(tensor.shape) for path, tensor in first.items()})
        for path, tensor in first.items():
            distance = relative_l2(turned[path][1].double(), tensor[0].double())
            if not distance <= SAME:
                raise OutputRefused(
                    f"{self.title} gives an image other numbers beside another image (by {distance:.2g} of "
                    "them): dropout or batch statistics that stay on in eval()"
                )
        return channels_last

    def _choose_outputs(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Which outputs there are: those that ``keep`` names, else by the number of dimensions."""
        dimensions = _DIMENSIONS_BY_NAME if self.by_name else _DIMENSIONS
        for name, path in list(self.keep.items()):
            shape = shapes[path]
            if shape[0] == 2 and len(shape) in dimensions[name] and all(shape):
                self.shapes[name] = shape[1:]
            elif self.by_name:
                raise OutputRefused(f'{self.title}: of two images "{path}" gives {list(shape)}, which is no {name}')
            else:
                del self.keep[name]
        if not self.keep:
            (shape,) = shapes.values()
            raise OutputRefused(
                f"{self.title} gives {list(shape)} for two images; expected a vector [2,D], tokens [2,T,D] or a map "
                "[2,C,h,w]; network.keep names a submodule that gives one"
            )

    def token_layout(self, prefix: Any, grid: Any) -> tuple[tuple[str, ...], tuple[int, int]]:
        """(prefix, grid) of the tokens; (), (0, 0) where there are none."""
        shape = self.shapes.get("tokens", ())
        if len(shape) != 2:
            return (), (shape[1], shape[2]) if shape else (0, 0)
        count = shape[0]
        if not isinstance(prefix, list | tuple) or not all(isinstance(name, str) for name in prefix):
            raise OutputRefused(
                f"{self.title} gives {count} tokens and does not say which are no patches. Write where it is made:\n"
                '       network.prefix = ["cls"]      the tokens before those of the patches; [] where there are none'
            )
        side = math.isqrt(max(count - len(prefix), 0))
        grid = tuple(grid or (side, side))
        if len(grid) != 2 or len(prefix) + grid[0] * grid[1] != count or 0 in grid:
            raise OutputRefused(
                f"{self.title} gives {count} tokens: {len(prefix)} of the prefix and a grid of {grid[0]}×{grid[-1]} "
                "are others. Write where it is made:\n       network.grid = (h, w)"
            )
        return tuple(prefix), (int(grid[0]), int(grid[1]))

    def width(self) -> int:
        """D, one for all outputs: tokens [T,D], maps [C,h,w], vectors [D]."""
        widths = {name: shape[0] if len(shape) != 2 else shape[1] for name, shape in self.shapes.items()}
        if len(set(widths.values())) > 1:
            text = ", ".join(f"{name} {n}" for name, n in widths.items())
            raise OutputRefused(f"{self.title}: what network.keep names has several widths ({text}); expected one")
        return next(iter(widths.values()))

    def output_refusals(self, prefix: tuple[str, ...]) -> dict[str, str]:
        """Output -> why there is none."""
        keeps = ", ".join(f"{name} from {path or 'what it returns'}" for name, path in self.keep.items())
        reasons = {name: f"it keeps {keeps}; network.keep says what" for name in _DIMENSIONS if name not in self.keep}
        if "tokens" not in self.keep:
            reasons["mean"] = "that is of its tokens, and it keeps none"
        if prefix[:1] != ("cls",):
            reasons["cls"] = "no class token stands first among its tokens"
        return reasons
