"""Networks of a user's own: a module's text written to nets.py, and the network run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.extraction.forward import spec_of

SAYS = '{"image_size": 32, "resize": 40, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2]}'
CNN = f"""
import torch
from torch import nn

class Cnn(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3))
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.act(self.body(x))).flatten(1)))

def make():
    network = Cnn()
    network.preprocess = {SAYS}
    network.keep = "act"
    return network
"""
VIT = f"""
import torch
from torch import nn

class Vit(nn.Module):
    preprocess = {SAYS}
    keep = "norm"
    prefix = ["cls"]

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])
"""
PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def write(source: str) -> None:
    Path("nets.py").write_text(source)


@torch.no_grad()
def by_hand(source: str = CNN, make: str = "make", seed: int = 1) -> Any:
    """The network of a module's text with weights drawn wide, made without us; its state dict is in w.pt."""
    space: dict[str, Any] = {}
    exec(source, space)
    torch.manual_seed(seed)
    network = space[make]().eval().requires_grad_(False)
    for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
        tensor += 0.6 * (torch.rand(tensor.shape) - 0.5)
    torch.save(network.state_dict(), "w.pt")
    return network


def mine(make: str = "make", **options: Any) -> Backbone:
    return load_backbone(f"python:nets:{make}", **({"weights": "w.pt"} | options))


def untrained(**options: Any) -> Backbone:
    return load_backbone("python:nets:make", random_weights=True, **options)


def both(source: str = CNN, make: str = "make", **options: Any) -> tuple[Any, Backbone]:
    """(the network by hand, its backbone) of a module's text."""
    write(source)
    return by_hand(source, make), mine(make, **options)


def fingerprint(backbone: Backbone) -> str:
    return spec_of(backbone, "fp32", "float16").fingerprint
