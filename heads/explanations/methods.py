"""Attention rollout and Grad-CAM: maps through a backbone and its head, or through a network trained on pixels.

Attention of the class token: of a frozen backbone it is the same for every head and class; of a network that was
trained from pixels (tuned, or from scratch) it is that network's own, the same for every class.

    last block    the class token's row of A_L
    rollout       the class token's row of Ã_L ··· Ã_1 with Ã = (A + I) / 2, where I stands for the residual connection
                  (Abnar & Zuidema 2020, arXiv:2005.00928). Registers take part in the product and are left off the map.

Block l's attention A_l [T, T] has a row for each query, averaged over its K heads; rows sum to 1. The weights are read
from the network's own forward pass, with attention that computes them ("eager"): transformers returns them; torch's
MultiheadAttention and timm's Attention are asked for them.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391; by the package ``grad-cam``): of a layer's output the channels
weighted by the mean gradient of the margin, summed, its positive part. The layer: of a CNN the map that its pooling
receives; of a transformer the first norm of its last block, since behind that block the gradient of a class token has
left the patches (the package's own advice). The layer's output is passed through an `ActivationTap`, on which the
package puts its hooks: layers may return tuples, and what is behind them may write into their output.

n images, T tokens of which P stand before the patches (class token first), L blocks, K heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.backbones.base import Backbone, FeatureMap, PooledMap, TimmMap, Tokens
from featurecache.backbones.user_module import FeatureTap
from featurecache.errors import BadOption
from featurecache.outputs import Output, blocks, function_of, source_parts
from heads.explanations.maps import KINDS, SaliencyMap
from heads.models.adapters import is_norm
from heads.models.finetune import FineTuned
from heads.task import Standardize


@dataclass(frozen=True)
class Transformer:
    """``network``: the library's own module; ``forward``: a pass of normalised pixels [n,3,h,w] through it, ``options``
    what such a pass takes beside them."""

    name: str
    network: Any
    forward: Callable[[torch.Tensor], Any]
    prefix: tuple[str, ...]  # of the P tokens before the patches
    grid: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False  # from pixels, so that it belongs to one run

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> Transformer:
        return cls._of_tokens(backbone.name, backbone.model, backbone.prefix, backbone.grid)

    @classmethod
    def of_run(cls, name: str, model: Any) -> Transformer:
        """``model``: the network of a run on pixels, one of `heads.models.published` or tuned."""
        network = model.network
        if not isinstance(model, FineTuned):
            prefix, (_, h, w) = ("cls",) if network.cam_grid else (), network.cam_grid or (0, 0, 0)
            return cls(name, network, network, prefix, (h, w), trained=True)
        return cls._of_tokens(name, network, model.prefix, model.grid, trained=True)

    @classmethod
    def _of_tokens(
        cls, name: str, model: Any, prefix: tuple[str, ...], grid: tuple[int, int], trained: bool = False
    ) -> Transformer:
        """``model``: that of a backbone, which gives its tokens."""
        inner, options = getattr(model, "network", model), getattr(model, "options", {})
        return cls(name, inner, lambda x: model(x, {"tokens"}), prefix, grid, options, trained)


def attention_maps(transformer: Transformer, pixels: torch.Tensor) -> list[list[SaliencyMap]]:
    """[last block, rollout] of every image; pixels float32 [n,3,h,w], normalised. Raises BadOption where there is no
    class token, or its attention cannot be read."""
    if not has_class_token(transformer):
        raise BadOption(
            f"{transformer.name} has no class token, and these maps are of its attention. --kind contribution and "
            "--kind grad-cam need none."
        )
    layers = attention_of(transformer, pixels)
    first, of = len(transformer.prefix), KINDS["attention"][transformer.trained]
    rows = {
        "last block": ("attention of the class token in the last block, mean of its heads", layers[-1][:, 0]),
        "rollout": ("attention rolled out over all blocks", rollout(layers)[:, 0]),
    }
    maps: list[list[SaliencyMap]] = [[] for _ in pixels]
    for name, (how, shares) in rows.items():
        for own, row in zip(maps, shares.double().numpy(), strict=True):
            beside = {"class token": float(row[0])}
            if first > 1:
                beside["tokens beside it"] = float(row[1:first].sum())
            values = row[first:].reshape(transformer.grid)
            own.append(SaliencyMap("attention", f"{how}: {of}", values, "share", False, beside, small=name))
    return maps


def has_class_token(transformer: Transformer) -> bool:
    return transformer.prefix[:1] == ("cls",)


def rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention of blocks 1 to L, each [n, T, T] -> Ã_L ··· Ã_1 [n, T, T]."""
    product = torch.eye(layers[0].shape[-1]).expand_as(layers[0])
    for attention in layers:
        product = (attention + torch.eye(attention.shape[-1])) / 2 @ product
    return product


@torch.no_grad()
def attention_of(transformer: Transformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """A_1 … A_L, each float32 [n, T, T] on the CPU."""
    network = transformer.network
    if hasattr(network, "set_attn_implementation"):
        before = network.config._attn_implementation
        network.set_attn_implementation("eager")
        try:
            options = {**transformer.options, "output_attentions": True}
            attentions = list(network(pixels, **options).attentions or ())
        finally:
            network.set_attn_implementation(before)
    else:
        attentions = _hooked_attentions(transformer, pixels)
    layers = [attention.float().mean(1).cpu() for attention in attentions]
    tokens = len(transformer.prefix) + transformer.grid[0] * transformer.grid[1]
    if not layers or any(layer.shape[1:] != (tokens, tokens) for layer in layers):
        raise BadOption(
            f"the attention of {transformer.name} cannot be read: expected torch's MultiheadAttention, or timm's or "
            f"transformers' attention over its {tokens} tokens. --kind grad-cam needs no attention weights."
        )
    return layers


def _hooked_attentions(transformer: Transformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """[n, K, T, T] of each block in the order they run, of torch's and timm's modules."""
    attentions: list[torch.Tensor] = []

    def ask(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "need_weights": True, "average_attn_weights": False}

    with ExitStack() as stack:
        for module in transformer.network.modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(lambda _, __, output: attentions.append(output[1])).remove)
            elif hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
                stack.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
                hook = module.attn_drop.register_forward_pre_hook(lambda _, inputs: attentions.append(inputs[0]))
                stack.callback(hook.remove)
        transformer.forward(pixels)
    return attentions


Hook = tuple[nn.Module, str]  # a module, and where it has the map: its "input", its "output", or a method's result


def check_extra() -> None:
    try:
        import pytorch_grad_cam  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise BadOption("Grad-CAM needs a package: pip install 'featurecache[explain]'.") from error


class ActivationTap(nn.Module):
    """What passes through it, copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class EndToEnd(nn.Module):
    """Backbone, output, scaling and head as one network: normalised pixels [B,3,h,w] -> logits [B,C]."""

    def __init__(
        self, backbone: Backbone, outputs: Sequence[Output], scale: Standardize, head: nn.Module
    ) -> None:  # several are vectors, concatenated
        super().__init__()
        self.backbone, self.outputs, self.scale = backbone, outputs, scale
        self.network, self.head = backbone.model, head

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        parts = [source_parts(output.source) for output in self.outputs]
        given = self.backbone.forward(pixels, {part for each in parts for part in each})
        made = []
        for output, own in zip(self.outputs, parts, strict=True):
            x = torch.cat([given[part] for part in own], -1)
            prefix, grid = len(self.backbone.prefix), self.backbone.grid
            made.append(function_of(output, x, prefix, grid) if output.is_derived else x)
        return self.head(self.scale(torch.cat(made, -1)))


def layer_of(backbone: Backbone, outputs: Sequence[Output]) -> Hook:
    """Where Grad-CAM looks: at the earliest of the blocks that several outputs are of. Raises BadOption where no layer
    of that network is known to show places."""
    model: Any = backbone.model
    network = getattr(model, "network", model)
    if isinstance(model, Tokens):
        depth = max(int(part.lstrip("-") or 1) for output in outputs for part in blocks(output.layer))
        block = list(network.get_submodule(model.blocks))[-depth]
        norms = [part for part in block.modules() if is_norm(part) and not list(part.children())]
        norms = [norm for norm in norms if _width_of(norm) in (backbone.width, None)]
        if not norms:
            raise BadOption(f"the blocks of {backbone.name} have no norm of tokens, before which Grad-CAM would look.")
        return norms[0], "output"
    if isinstance(model, PooledMap):
        return network.get_submodule(model.inside or model.pool), "output" if model.inside else "input"
    if isinstance(model, TimmMap):
        return network, "forward_features"
    if isinstance(model, FeatureMap):
        return network.encoder.stages[-1], "output"
    kept = [o for o in outputs if isinstance(model, FeatureTap) and o.source in model.keep]
    if kept == list(outputs) and not any(output.base in ("cls", "pooler") for output in kept):
        return network.get_submodule(model.keep[kept[0].source]), "output"
    name = "+".join(output.name for output in outputs)
    raise BadOption(
        f"which layer of {backbone.name} Grad-CAM should look at for {name} is not known. --kind contribution needs "
        "none, and --kind attention shows where a backbone with a class token looks."
    )


def _width_of(norm: nn.Module) -> int | None:
    """Channels that a norm has weights for: others than of tokens are of pixels (TNT) or of heads; None without."""
    return next((parameter.shape[-1] for parameter in norm.parameters()), None)


def grad_cam_maps(
    whole: nn.Module, layer: Hook, pixels: torch.Tensor, toward: torch.Tensor, grid: tuple[int, int] | None, first: int
) -> list[SaliencyMap]:
    """One map an image. ``whole``: pixels [n,3,h,w] -> logits [n,C]; toward [n,C]: the margin in the logits. ``grid``
    and ``first`` (P): which tokens are patches, where the layer gives tokens; None: it gives maps [n,C,h,w]."""
    from pytorch_grad_cam import GradCAM  # there, as `check_extra` said

    tap = ActivationTap()
    with _through(tap, layer), torch.enable_grad():
        x = pixels.clone().requires_grad_(True)  # the network's own weights may be frozen
        cam = GradCAM(whole, [tap], reshape_transform=lambda activations: _as_map(activations, grid, first))
        hooks = cam.activations_and_grads  # calling ``cam`` would also stretch each map to 0…1 and to the pixels
        try:
            logits = hooks(x)
            torch.autograd.grad((logits * toward.to(logits.device)).sum(), x, allow_unused=True)
            if not hooks.gradients:
                raise BadOption("the margin does not depend on the layer that Grad-CAM looks at, so there is no map.")
            values = cam.get_cam_image(x, tap, None, hooks.activations[0].numpy(), hooks.gradients[0].numpy())
        finally:
            hooks.release()
    how = "positive part of the channels weighted by the mean gradient of the margin"
    maps = np.maximum(values, 0).astype(np.float64)
    return [SaliencyMap("grad-cam", how, each, "margin × activation", False, small="Grad-CAM") for each in maps]


@contextmanager
def _through(tap: ActivationTap, layer: Hook) -> Iterator[None]:
    module, side = layer

    def tap_first(values: Any) -> Any:
        return (tap(values[0]), *values[1:]) if isinstance(values, tuple) else tap(values)

    if side not in ("output", "input"):
        method = getattr(module, side)
        setattr(module, side, lambda *arguments: tap(method(*arguments)))
        remove: Callable[[], None] = functools.partial(delattr, module, side)  # the class's own is there again
    elif side == "output":
        remove = module.register_forward_hook(lambda _, __, output: tap_first(output)).remove
    else:
        remove = module.register_forward_pre_hook(lambda _, arguments: tap_first(arguments)).remove
    try:
        yield
    finally:
        remove()


def _as_map(x: torch.Tensor, grid: tuple[int, int] | None, first: int) -> torch.Tensor:
    """[n,C,h,w] of maps, and of tokens [n,P+h·w,C]."""
    if x.ndim == 4:
        last = grid is not None and tuple(x.shape[1:3]) == grid and tuple(x.shape[2:]) != grid  # channels last (Swin)
        return x.permute(0, 3, 1, 2) if last else x
    assert grid is not None
    return x[:, first:].unflatten(1, grid).transpose(1, 3).transpose(2, 3)
