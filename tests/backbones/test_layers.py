"""Table of a network's layers: every parameter once, shapes of a pass, one row for blocks that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featurecache.backbones import load_without_weights
from featurecache.backbones.layers import MOST, layer_rows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 5))
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3))
        self.last = nn.Linear(4, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor, want: set[str]) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


def test_rows_are_counted_by_hand():
    net = Net()
    rows = [tuple(row.values())[:6] for row in layer_rows(net, net, (3, 8, 6))]
    assert rows == [
        ("token", "parameter", [1, 5], 1, 5, 5),
        ("stem", "Conv2d", [4, 4, 3], 1, 112, 112),
        ("blocks.0 … 2", "Sequential", [4, 4, 3], 3, 20, 20),
        ("blocks.0.0", "Conv2d", [4, 4, 3], 1, 20, 20),
        ("last", "Linear", [2], 1, 10, 0),
    ]


def test_a_network_that_cannot_be_run_so_has_no_shapes_and_all_parameters():
    net = Net()
    rows = layer_rows(net, net, (3, 0, 0))
    assert sum(row["copies"] * row["parameters"] for row in rows if row["depth"] == 0) == 5 + 112 + 3 * 20 + 10


@pytest.mark.integration
@pytest.mark.parametrize("name", ["vit-demo", "resnet50", "dinov2-small", "clip-vit-b16"])
def test_every_parameter_of_a_backbone_is_in_the_table_once(name):
    backbone = load_without_weights(name)
    network = backbone.model.network
    rows = layer_rows(network, backbone.model, (3, *backbone.image_size))
    whole = sum(row["copies"] * row["parameters"] for row in rows if row["depth"] == 0)
    assert whole == sum(p.numel() for p in network.parameters()) and len(rows) <= MOST
    assert all(row["trainable"] == 0 for row in rows) and any(row["shape"] for row in rows)
