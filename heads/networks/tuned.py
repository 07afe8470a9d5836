"""A pretrained network that is trained on: all that leads to the vector it was made for, then a new linear layer.

What its preprocessing makes of an image is the checkpoint's own; its dropout, if it has any, is too.

Notation: B batch, C classes, T tokens of which the first P are no patches, D width, h and w in pixels or patches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from featurecache.backbones import Backbone
from featurecache.backbones.networks import PooledMap, Tokens
from featurecache.errors import OutputRefused
from heads.networks.adapters import is_norm
from heads.networks.published import Grid

SPREAD = 0.02  # standard deviation of a new classifier's weights; that of transformers' own


class FineTuned(nn.Module):
    """Pixels [B,3,h,w] with values 0 to 255 -> logits [B,C]: ``network`` with all that its vector does not need taken
    away, then ``classifier``. ``origin``: what it began as."""

    def __init__(self, backbone: Backbone, classes: int, origin: dict[str, Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.preprocess, self.channels_last = backbone.preprocess, backbone.channels_last
        self.vector, self.prefix, self.grid = backbone.vector, backbone.prefix, backbone.grid
        self.origin, self.adapted = origin, False
        self.network = backbone.model
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(backbone.width, classes)
        nn.init.normal_(self.classifier.weight, std=SPREAD)
        nn.init.zeros_(self.classifier.bias)
        _strip(self.network, self.vector)
        self.requires_grad_(True).train()
        for name in unused(self.network, self.vector):
            self.network.get_parameter(name).requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.vectors(self.preprocess.normalised(pixels))))

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B,3,h,w] -> the vector [B,D] that ``extract`` keeps of it."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        source = "tokens" if self.vector in ("cls", "mean") else self.vector
        found = self.network(x, {source})[source]
        if self.vector == "cls":
            return found[:, 0]
        return found[:, len(self.prefix) :].mean(1) if self.vector == "mean" else found

    @property
    def cam_grid(self) -> Grid | None:
        """(P, h, w) of a transformer's tokens; None where ``cam_layer`` gives a map [B,D,h,w]."""
        return (len(self.prefix), *self.grid) if isinstance(self.network, Tokens) else None

    @property
    def cam_layer(self) -> nn.Module:
        """The module whose output Grad-CAM takes: the first norm of a transformer's last block (of what comes after
        it, the head may see the class token alone), the module that gives a CNN's last map."""
        if isinstance(self.network, Tokens):
            blocks: Any = self.network.network.get_submodule(self.network.blocks)
            return next(part for part in blocks[-1].modules() if is_norm(part))
        return self.network.get_submodule(_gives_map(self))


def _strip(model: nn.Module, vector: str) -> None:
    """Take away what was behind the vector: the old classifier, or a pooling that it does not go through."""
    network: Any = model.network
    if isinstance(model, PooledMap):
        for path in model.tail:
            network.set_submodule(path, nn.Identity())
    elif isinstance(getattr(network, "heads", None), nn.Module):  # torchvision's ViT
        network.heads = nn.Identity()
    elif isinstance(model, Tokens) and vector != "pooler" and hasattr(network, "pooler"):
        network.pooler = None


def unused(model: nn.Module, vector: str) -> list[str]:
    """Parameters that ``vector`` does not depend on: a mask token, CLIP's norm behind the class token."""
    from featurecache.backbones.checkpoints import pooled_names
    from featurecache.backbones.families import FAMILIES

    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if name.endswith("mask_token")]
    family = FAMILIES.get(getattr(getattr(model.network, "config", None), "model_type", ""))
    if family is not None and vector != "pooler":
        inside = {name.removeprefix("network."): name for name in names}
        found += [inside[name] for name in pooled_names(inside, family)]
    return found


def _gives_map(module: FineTuned) -> str:
    """The name of the module of the network whose output is the last map [B,D,h,w]; found on an image of noise."""
    pixels = 255 * torch.rand(1, 3, *module.preprocess.size, generator=torch.Generator().manual_seed(0))
    x = module.preprocess.normalised(pixels.to(module.classifier.weight.device))
    given: dict[str, torch.Tensor] = {}
    hooks = [part.register_forward_hook(partial(_keep, given, name)) for name, part in module.network.named_modules()]
    was = module.training
    try:
        with torch.no_grad():
            tokens = module.eval().network(x, {"tokens"})["tokens"]
    finally:
        module.train(was)
        for hook in hooks:
            hook.remove()
    same = [n for n, found in given.items() if torch.equal(found.flatten(2).transpose(1, 2), tokens)]
    if not same:
        raise OutputRefused("no layer of this network gives its last map, so there is no Grad-CAM of it.")
    return min(same, key=len)


def _keep(given: dict[str, torch.Tensor], name: str, _: nn.Module, __: Any, output: Any) -> None:
    if isinstance(output, torch.Tensor) and output.ndim == 4:
        given[name] = output
