"""What networks from pixels are, as data: for ``info``, and the README's table."""

from __future__ import annotations

from typing import Any

import torch

from heads.architectures import count_parameters, layers_of
from heads.networks.baselines import BASELINES, FINETUNE, baseline_info, make_baseline

# Classes and pixels that the parameters are counted for: those of the studies.
COUNTED: dict[str, tuple[tuple[int, int], ...]] = {
    "cnn-mindlina": ((2, 256),), "cnn-medical-mnist": ((6, 224),),
    "cnn-cifar": ((10, 32), (100, 32), (200, 64)), "vit-cifar": ((10, 32), (100, 32), (200, 64)),
}  # fmt: skip
SETTINGS = ("optimizer", "lr", "weight_decay", "schedule", "epochs", "batch_size", "augment")


def networks_table() -> list[dict[str, Any]]:
    """A record for every network: pixels, parameters by (classes, pixels), published settings, where it comes from."""
    return [
        {
            "network": name, "what": info.what, "image_size": info.image_size,
            "parameters": [[classes, size, _count(name, classes, size)] for classes, size in COUNTED[name]],
            "settings": {key: info.settings[key] for key in SETTINGS if key in info.settings},
            "reference": info.reference,
        }
        for name, info in BASELINES.items()
    ]  # fmt: skip


def _count(name: str, classes: int, size: int) -> int:
    with torch.device("meta"):
        return count_parameters(BASELINES[name].make(size, classes))


def networks_lines() -> str:
    """A line per network."""
    rows = networks_table()
    width = max(len(row["network"]) for row in rows)
    lines = []
    for row in rows:
        counts = " / ".join(f"{count:,}" for _, _, count in row["parameters"])
        classes = " / ".join(str(c) for c, _, _ in row["parameters"])
        lines.append(f"  {row['network']:<{width}}  {row['image_size']} px  {counts} (C = {classes})  {row['what']}")
    return "\n".join(lines)


def describe_network(name: str, classes: int, image_size: int | None = None) -> dict[str, Any]:
    """Layers and parameters, in the form of `heads.architectures.describe_head`; no weights are needed."""
    info = baseline_info(name)
    size = image_size or info.image_size
    model = make_baseline(name, image_size=size, classes=classes, random_weights=name.startswith(FINETUNE))
    layers = [{"name": n, "layer": what, "gives": gives, "parameters": k} for n, what, gives, k in layers_of(model)]
    return {
        "head": name, "what": info.what, "takes": "pixels", "standardize": "none", "solved": False,
        "reference": info.reference, "shape": [3, *info.preprocess(size).size], "classes": classes, "layers": layers,
        "state_dict": {key: list(value.shape) for key, value in model.state_dict().items()},
        "parameters": count_parameters(model), "settings": info.settings,
    }  # fmt: skip
