"""Grad-CAM through backbone and head, and through networks trained on pixels; by the package ``grad-cam``.

Selvaraju et al. 2017, arXiv:1610.02391: of a layer's output the channels weighted by the mean gradient of the margin,
summed, its positive part. The layer: of a CNN the map that its pooling receives; of a transformer the first norm of its
last block, since behind that block the gradient of a class token has left the patches (the package's own advice).

The layer's output is passed through a `Seen`, on which the package puts its hooks: layers may return tuples, and what
is behind them may write into their output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.backbones import Backbone
from featurecache.backbones.networks import Tokens
from featurecache.errors import BadOption
from featurecache.outputs import Output, blocks, function_of
from heads.explanations.maps import Map

if TYPE_CHECKING:
    from heads.data import Standardize

Hook = tuple[nn.Module, str]  # a module, and where it has the map: its "input", its "output", or a method's result


def check_extra() -> None:
    try:
        import pytorch_grad_cam  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise BadOption("Grad-CAM needs a package: pip install 'featurecache[explain]'.") from error


class Seen(nn.Module):
    """What passes through it, copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Whole(nn.Module):
    """Backbone, output, scaling and head as one network: normalised pixels [B,3,h,w] -> logits [B,C]."""

    def __init__(self, backbone: Backbone, output: Output, scale: Standardize, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.output, self.scale = backbone, output, scale
        self.network, self.head = backbone.model, head

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        base, _, layer = self.output.source.partition("@")
        parts = [f"{base}@{part}" if part else base for part in blocks(layer)]
        found = self.backbone.forward(pixels, set(parts))
        x = torch.cat([found[part] for part in parts], -1)
        if self.output.derived:
            x = function_of(self.output, x, len(self.backbone.prefix), self.backbone.grid)
        return self.head(self.scale(x))


def layer_of(backbone: Backbone, output: Output) -> Hook:
    """Where Grad-CAM looks. Raises BadOption where no layer of that network is known to show places."""
    model: Any = backbone.model
    network = getattr(model, "network", model)
    kind = type(model).__name__
    if isinstance(model, Tokens):
        depth = max((int(part.lstrip("-") or 1) for part in blocks(output.layer)), default=1)
        return _first_norm(backbone, list(network.get_submodule(model.blocks))[-depth]), "output"
    if kind == "PooledMap":
        return network.get_submodule(model.inside or model.pool), "output" if model.inside else "input"
    if kind == "TimmMap":
        return network, "forward_features"
    if kind == "Map":
        return network.encoder.stages[-1], "output"
    if kind == "Kept" and output.source in model.keep and (output.base != "cls" and output.base != "pooler"):
        return network.get_submodule(model.keep[output.source]), "output"
    raise BadOption(
        f"which layer of {backbone.name} Grad-CAM should look at for {output.name} is not known. --kind contribution "
        "needs none, and --kind attention shows where a backbone with a class token looks."
    )


def _first_norm(backbone: Backbone, block: nn.Module) -> nn.Module:
    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    if not norms:
        raise BadOption(f"the blocks of {backbone.name} have no norm, before which Grad-CAM would look.")
    return norms[0]


def grad_cam_maps(
    whole: nn.Module, layer: Hook, pixels: torch.Tensor, toward: torch.Tensor, grid: tuple[int, int] | None, first: int
) -> list[Map]:
    """One map an image. ``whole``: pixels [n,3,h,w] -> logits [n,C]; toward [n,C]: the margin in the logits. ``grid``
    and ``first`` (P): which tokens are patches, where the layer gives tokens; None: it gives maps [n,C,h,w]."""
    check_extra()
    from pytorch_grad_cam import GradCAM

    seen = Seen()
    with _through(seen, layer), torch.enable_grad():
        given = pixels.clone().requires_grad_(True)  # the network's own weights may be frozen
        cam = GradCAM(whole, [seen], reshape_transform=lambda x: _as_map(x, grid, first))
        hooked = (
            cam.activations_and_grads
        )  # calling ``cam`` itself would also stretch each map to 0…1 and to the pixels
        try:
            logits = hooked(given)
            torch.autograd.grad((logits * toward.to(logits.device)).sum(), given, allow_unused=True)
            if not hooked.gradients:
                raise BadOption("the margin does not depend on the layer that Grad-CAM looks at, so there is no map.")
            activations, gradients = hooked.activations[0].numpy(), hooked.gradients[0].numpy()
            values = cam.get_cam_image(given, seen, None, activations, gradients)
        finally:
            hooked.release()
    how = "positive part of the channels weighted by the mean gradient of the margin"
    maps = np.maximum(values, 0).astype(np.float64)
    return [Map("grad-cam", how, each, "margin × activation", False, small="Grad-CAM") for each in maps]


@contextmanager
def _through(seen: Seen, layer: Hook) -> Iterator[None]:
    module, side = layer

    def output(_: nn.Module, __: Any, given: Any) -> Any:
        return (seen(given[0]), *given[1:]) if isinstance(given, tuple) else seen(given)

    def before(_: nn.Module, given: Any) -> Any:
        return (seen(given[0]), *given[1:])

    hook: Callable[..., Any] = output if side == "output" else before
    if side not in ("output", "input"):
        method = getattr(module, side)
        setattr(module, side, lambda *given: seen(method(*given)))
        try:
            yield
        finally:
            delattr(module, side)  # the class's own is there again
        return
    handle = (module.register_forward_hook if side == "output" else module.register_forward_pre_hook)(hook)
    try:
        yield
    finally:
        handle.remove()


def _as_map(x: torch.Tensor, grid: tuple[int, int] | None, first: int) -> torch.Tensor:
    """[n,C,h,w] of maps, and of tokens [n,P+h·w,C]."""
    if x.ndim == 4:
        last = grid is not None and tuple(x.shape[1:3]) == grid and tuple(x.shape[2:]) != grid  # channels last (Swin)
        return x.permute(0, 3, 1, 2) if last else x
    assert grid is not None
    return x[:, first:].unflatten(1, grid).transpose(1, 3).transpose(2, 3)
