"""The network from pixels that settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from heads.networks.baselines import FINETUNE, make_baseline
from heads.settings import Settings

if TYPE_CHECKING:
    from featurecache.backbones import Backbone


def make_network(
    settings: Settings, image_size: int, classes: int, generator: torch.Generator | None = None,
    backbone: Backbone | None = None,
) -> nn.Module:  # fmt: skip
    """The network from pixels that these settings ask for. ``backbone``: as `make_baseline` takes it."""
    return make_baseline(
        settings.head, image_size=image_size, classes=classes, generator=generator, dropout=settings.dropout,
        lora=settings.lora, rlrr=settings.rlrr, weights=settings.weights, random_weights=settings.random_weights,
        seed=settings.seed, backbone=backbone,
    )  # fmt: skip


def shape_of_network(settings: Settings, image_size: int, classes: int) -> nn.Module:
    """The network, for its parameters to be counted: what `finetune:` begins from is not loaded for that."""
    backbone = None
    if settings.head.startswith(FINETUNE):
        from heads.networks.finetune import outlined

        backbone = outlined(settings, image_size)
    return make_network(settings, image_size, classes, backbone=backbone)
