"""Python:module:factory: a network of the user's own, and taps on its submodules.

Backbones of the user's own: ``python:<module>:<factory>[:<layer>]`` with ``--weights FILE``.

The factory (a function or class without arguments) returns a torch module of images [B,3,h,w]. What cannot be known
from its code is said by attributes of the network, its class or the factory:

    network.preprocess = {"image_size": 224, "resize": 256, "interpolation": "bilinear", "mean": […], "std": […]}
                          as torchvision's Resize, CenterCrop, ToTensor and Normalize treat a PIL image; "resize" is
                          "squash" (both sides to image_size) or the shortest edge in pixels before the centre is cut
                          out. Or all fields of featurecache.images.preprocessing.Preprocess.
    network.keep        = "layer4"   the submodule whose output is kept; without it what the network returns. A map
                          [B,C,h,w] gives tokens, and gap (its average); [B,T,D] gives tokens; [B,D] gives pooler. Or
                          {"tokens": "norm", "pooler": "pool"}: each from its own submodule. A layer named in the
                          backbone's name (python:nets:make:features.3) comes before it.
    network.prefix      = ["cls"]    of [B,T,D]: the tokens before those of the patches, [] where there are none
    network.grid        = (h, w)     of [B,T,D]: the patches, where they are no square

Axis letters: B batch, T tokens, D width, C channels, h and w the sides of a map.

What is kept of a network of the user's own: which submodule's output, and what its shape makes of it.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.

A module of the user's own: the code that runs is the code that is known by its digest.

What a `python:` backbone computes is decided, beside its weights, by the source of its module and of every module of
the user's that this one imports, near or far. Found by reading their import statements, wherever in a file they stand;
what lies in the standard library or in site-packages is a library, and its version is recorded but not hashed. The
bytes that were hashed are the bytes that are compiled: no ``.pyc`` is asked, and a module that this Python imported
before and that was edited since is imported again.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import math
import operator
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

from featurecache.backbones.base import Backbone, BackboneRequest, frozen, seeded, versions
from featurecache.backbones.weights import digest, read_state_dict, unwrapped
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
from featurecache.formatting import abbreviated
from featurecache.images.preprocessing import Preprocess

_SHORT = ("image_size", "resize", "interpolation", "mean", "std")


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
    with imported(module) as (source, digests):
        return _loaded(title, source, digests, request)


def _loaded(title: str, source: ModuleType, digests: dict[str, str], request: BackboneRequest) -> Backbone:
    _, module, factory, *layer = title.split(":")
    network, said = _made(title, source, factory, request)
    said |= {"keep": layer[0]} if layer else {}
    preprocess = _preprocess(title, said["preprocess"], request)
    weights = _weights(title, network, request)
    model = FeatureTap(title, frozen(network), said["keep"])
    channels_last = infer_shapes(model, preprocess.size)
    prefix, grid = tap_layout(model, said)
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
        width=feature_width(model),
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


def _made(title: str, source: ModuleType, factory: str, request: BackboneRequest) -> tuple[nn.Module, dict[str, Any]]:
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


def _preprocess(title: str, said: Any, request: BackboneRequest) -> Preprocess:
    fields = {field.name for field in dataclasses.fields(Preprocess)}
    if not isinstance(said, dict) or set(said) not in (set(_SHORT), fields):
        what = abbreviated(map(str, said), 3) if isinstance(said, dict) else f"a {type(said).__name__}"
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


def _weights(title: str, network: nn.Module, request: BackboneRequest) -> dict[str, Any]:
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
        what = (
            f"have other shapes: {abbreviated(shapes, 2)}"
            if shapes
            else f"lack {len(missing)} tensors: {abbreviated(missing, 3)}"
        )
        if not shapes and not missing:
            what = (
                f"hold {len(extra)} tensors that it has not: {abbreviated(extra, 3)}. Let the factory return the whole "
                "network; network.keep names the submodule to keep"
            )
        raise WeightsDoNotFit(f"the weights {request.weights} are not of {title}: they {what}")
    network.load_state_dict(state, strict=False)
    return {"blake2b": digest(_deciding(state))}


def _deciding(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the counters of batches, which only some files have."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


KEPT = ("tokens", "pooler", "gap")
_SAME = 1e-3  # relative L2 that another place in the batch may cost in float32; dropout costs 0.1 and more


class FeatureTap(nn.Module):
    """The network's own forward, read where ``keep`` says: {output: submodule}, or one submodule for what it gives."""

    def __init__(self, title: str, network: nn.Module, keep: Any) -> None:
        super().__init__()
        self.title, self.network = title, network
        one = "" if keep is None else keep
        self.keep: dict[str, str] = dict(keep) if isinstance(keep, dict) else dict.fromkeys(KEPT, one)
        if (
            not self.keep
            or not set(self.keep) <= set(KEPT)
            or not all(isinstance(at, str) for at in self.keep.values())
        ):
            raise OutputRefused(
                f"{title}: network.keep is {keep!r}; expected the name of a submodule, or a dict with some of "
                f"{', '.join(KEPT)} and a submodule for each"
            )
        known = dict(network.named_modules())
        for at in self.keep.values():
            if at not in known:
                raise OutputRefused(f'{title} has no submodule "{at}".{nearest(at, known)} See named_modules().')
        self.shapes: dict[str, tuple[int, ...]] = {}  # output -> shape of one image's, before it is made into rows
        self.chosen = isinstance(keep, dict)

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        """pixels [B,3,h,w] -> of tokens [B,T,D], pooler and gap [B,D] the wanted ones."""
        seen = self.look(pixels)
        return {name: _as_rows(name, seen[self.keep[name]]) for name in want}

    def look(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Submodule -> its output in a forward pass, copied: a ReLU behind it may write into it."""
        seen: dict[str, list[torch.Tensor]] = {at: [] for at in self.keep.values()}
        hooks = [self.network.get_submodule(at).register_forward_hook(self._hook(kept)) for at, kept in seen.items()]
        try:
            self.network(pixels)
        except RuntimeError as error:
            if pixels.dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            kind = str(pixels.dtype).removeprefix("torch.")
            raise BadOption(
                f"{self.title} does not run in {kind} ({first_line(error)}); use --precision fp32"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for at, kept in seen.items():
            if len(kept) != 1:
                raise OutputRefused(
                    f'{self.title}: the submodule "{at}" is run {len(kept)} times in a forward pass, expected once; '
                    "name another in network.keep"
                )
        return {at: kept[0] for at, kept in seen.items()}

    def _hook(self, kept: list[torch.Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, _: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(output, torch.Tensor):
                raise OutputRefused(
                    f"{self.title}: {type(module).__name__} returns a {type(output).__name__}, expected a tensor; name "
                    "the submodule whose output is to be kept: network.keep = NAME"
                )
            kept.append(output.clone())

        return keep


def _as_rows(name: str, found: torch.Tensor) -> torch.Tensor:
    """A map [B,C,h,w]: tokens are its places [B,h·w,C], row by row; a vector is their average [B,C]."""
    if found.dim() != 4:
        return found
    return found.flatten(2).transpose(1, 2) if name == "tokens" else found.mean((2, 3))


def infer_shapes(model: FeatureTap, size: tuple[int, int]) -> bool:
    """Run it, fix ``model.shapes`` and what of ``model.keep`` there is; whether it runs with channels last.

    Raises BadOption for a size that it does not take; OutputRefused for shapes that are no output, and where an image's
    numbers depend on what lies beside it.
    """
    pixels = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    cnn = sum(isinstance(module, nn.Conv2d) for module in model.network.modules()) > 1
    channels_last = cnn and _runs(model, pixels)
    pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    try:
        with torch.no_grad():
            seen, again = model.look(pixels[:2]), model.look(pixels[[2, 0]])
    except OutputRefused:
        raise
    except Exception as error:  # whatever the user's code raises
        why = first_line(error)
        raise BadOption(f"{model.title} does not take images of {size[0]}×{size[1]} pixels: {why}") from error
    shapes = {at: tuple(found.shape) for at, found in seen.items()}
    _choose(model, shapes)
    for at, found in seen.items():
        distance = (found[0].double() - again[at][1].double()).norm() / found[0].double().norm().clamp_min(1e-30)
        if not distance <= _SAME:
            raise OutputRefused(
                f"{model.title} gives an image other numbers beside another image (by {float(distance):.2g} of them): "
                "dropout or batch statistics that stay on in eval()"
            )
    return channels_last


def _runs(model: FeatureTap, pixels: torch.Tensor) -> bool:
    """Whether it runs with channels last; a ``view`` of a map does not."""
    try:
        with torch.no_grad():
            model.look(pixels.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def _choose(model: FeatureTap, shapes: dict[str, tuple[int, ...]]) -> None:
    """Which outputs there are: those that ``keep`` names, else by the number of dimensions."""
    allowed = {"tokens": (3, 4), "pooler": (2,), "gap": (4,)}
    if model.chosen:
        allowed = {"tokens": (3, 4), "pooler": (2, 4), "gap": (2, 4)}
    for name, at in list(model.keep.items()):
        shape = shapes[at]
        if shape[0] == 2 and len(shape) in allowed[name] and all(shape):
            model.shapes[name] = shape[1:]
        elif model.chosen:
            raise OutputRefused(f'{model.title}: of two images "{at}" gives {list(shape)}, which is no {name}')
        else:
            del model.keep[name]
    if not model.keep:
        (shape,) = shapes.values()
        raise OutputRefused(
            f"{model.title} gives {list(shape)} for two images; expected a vector [2,D], tokens [2,T,D] or a map "
            "[2,C,h,w]; network.keep names a submodule that gives one"
        )


def tap_layout(model: FeatureTap, said: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, int]]:
    """(prefix, grid) of the tokens; (), (0, 0) where there are none."""
    shape = model.shapes.get("tokens", ())
    if len(shape) != 2:
        return (), (shape[1], shape[2]) if shape else (0, 0)
    prefix, count = said["prefix"], shape[0]
    if not isinstance(prefix, list | tuple) or not all(isinstance(name, str) for name in prefix):
        raise OutputRefused(
            f"{model.title} gives {count} tokens and does not say which are no patches. Write where it is made:\n"
            '       network.prefix = ["cls"]      the tokens before those of the patches; [] where there are none'
        )
    side = math.isqrt(max(count - len(prefix), 0))
    grid = tuple(said["grid"] or (side, side))
    if len(grid) != 2 or len(prefix) + grid[0] * grid[1] != count or 0 in grid:
        raise OutputRefused(
            f"{model.title} gives {count} tokens: {len(prefix)} of the prefix and a grid of {grid[0]}×{grid[-1]} are "
            "others. Write where it is made:\n       network.grid = (h, w)"
        )
    return tuple(prefix), (int(grid[0]), int(grid[1]))


def feature_width(model: FeatureTap) -> int:
    """D, one for all outputs: tokens [T,D], maps [C,h,w], vectors [D]."""
    widths = {name: shape[0] if len(shape) != 2 else shape[1] for name, shape in model.shapes.items()}
    if len(set(widths.values())) > 1:
        text = ", ".join(f"{name} {n}" for name, n in widths.items())
        raise OutputRefused(f"{model.title}: what network.keep names has several widths ({text}); expected one")
    return next(iter(widths.values()))


def refused(model: FeatureTap, prefix: tuple[str, ...]) -> dict[str, str]:
    """Output -> why there is none."""
    kept = ", ".join(f"{name} from {at or 'what it returns'}" for name, at in model.keep.items())
    reasons = {name: f"it keeps {kept}; network.keep says what" for name in KEPT if name not in model.keep}
    if "tokens" not in model.keep:
        reasons["mean"] = "that is of its tokens, and it keeps none"
    if prefix[:1] != ("cls",):
        reasons["cls"] = "no class token stands first among its tokens"
    return reasons


_OURS = ("featurecache", "heads")
_LIBRARIES = {"site-packages", "dist-packages"}
_STANDARD = Path(sysconfig.get_path("stdlib"))
_ran: dict[str, tuple[Path, bytes]] = {}  # module -> the file and source that this process compiled


@contextlib.contextmanager
def imported(module: str) -> Iterator[tuple[ModuleType, dict[str, str]]]:
    """(the module, name -> BLAKE2b-128 of its source and of the user's modules that it imports).

    Looked for in the current folder first, then in ``sys.path``; inside the block imports find both too. Raises
    UnknownBackbone where there is none, or it fails.
    """
    here = os.getcwd()
    finder = _Finder()
    sys.path.insert(0, here)  # a console script does not look where it is started
    sys.meta_path.insert(0, finder)
    try:
        found = _import(module, finder)
        sources = sorted(finder.sources.items())
        yield found, {name: hashlib.blake2b(read, digest_size=16).hexdigest() for name, (_, read) in sources}
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(here)


def _import(module: str, finder: _Finder) -> ModuleType:
    importlib.invalidate_caches()
    try:
        finder.sources = own_sources(module)
        if any(_ran.get(name) != source for name, source in finder.sources.items() if name in sys.modules):
            for name in finder.sources:
                _forget(name)
        if module in finder.sources:
            return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises; a script may parse its arguments
        raise UnknownBackbone(f"the module {module} cannot be imported ({first_line(error)})") from error
    raise UnknownBackbone(f"there is no {module.replace('.', '/')}.py in this folder or in PYTHONPATH")


def _forget(name: str) -> None:
    sys.modules.pop(name, None)
    package, _, last = name.rpartition(".")
    if hasattr(sys.modules.get(package), last):  # `from package import last` would find it there
        delattr(sys.modules[package], last)


def own_sources(module: str) -> dict[str, tuple[Path, bytes]]:
    """Module name -> (file, its bytes): ``module`` itself and what it imports of the user's own. Nothing is run."""
    found: dict[str, tuple[Path, bytes]] = {}
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if not name or name in seen or name.partition(".")[0] in _OURS:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # a package is run before what lies in it
        path = _file(name)
        if path is not None and (name == module or not _is_library(path)):
            found[name] = path, path.read_bytes()
            waiting += _imports(name, *found[name])
    return found


def _file(name: str) -> Path | None:
    spec = _spec(name)
    path = Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None
    return path if path is not None and path.suffix == ".py" else None


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from; unlike importlib's own this neither runs its packages nor believes
    ``sys.modules``, which may hold another folder's module of that name."""
    package, places = name.rpartition(".")[0], None
    if package:
        above = _spec(package)
        if above is None or above.submodule_search_locations is None:
            return None
        places = list(above.submodule_search_locations)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    return next((spec for finder in finders if (spec := finder.find_spec(name, places)) is not None), None)


def _is_library(path: Path) -> bool:
    return bool(_LIBRARIES & set(path.parts)) or path.is_relative_to(_STANDARD)


def _imports(name: str, path: Path, source: bytes) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):  # beyond the top: running it will say so
                    base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


class _Finder:
    """Finds the user's modules; importlib asks it before anything else."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[Path, bytes]] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.sources:
            return None
        file, source = self.sources[name]
        return importlib.util.spec_from_file_location(name, file, loader=_AsRead(name, str(file), source))


class _AsRead(SourceFileLoader):
    """Runs the bytes that were hashed."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        _ran[fullname] = Path(self.path), self.source
        code: CodeType = self.source_to_code(self.source, self.path)
        return code
