"""What the tests of backbones ask again and again: a store's key, a refusal, outputs without gradients, closeness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.images.decoding import decode


def key(backbone: Backbone) -> str:
    """What of a backbone makes the key of its store."""
    parts = [backbone.architecture, backbone.weights, backbone.preprocess.to_dict(), backbone.image_size]
    return json.dumps([*parts, backbone.position_embeddings], sort_keys=True)


def refuses(error: type[Exception], says: str, name: str | Path, **options: Any) -> None:
    """Loading ``name`` raises ``error`` with a sentence that matches ``says``."""
    with pytest.raises(error, match=says):
        load_backbone(str(name), **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})


@torch.no_grad()
def outputs(backbone: Backbone, pixels: torch.Tensor, *names: str) -> list[torch.Tensor]:
    values = backbone.forward(pixels, set(names))
    return [values[name] for name in names]


def fed(backbone: Backbone, picture: Image.Image) -> torch.Tensor:
    """[1,C,h,w]: what the network sees of a picture."""
    image = backbone.preprocess.resized(decode(np.asarray(picture.convert("RGB"))))
    return backbone.preprocess.normalised(image[None])


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative L2 per row at most 1e-5."""
    assert got.shape == expected.shape
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() <= 1e-5


def as_rows(feature_map: torch.Tensor) -> torch.Tensor:
    """[B,C,h,w] -> [B,h·w,C]"""
    return feature_map.flatten(2).transpose(1, 2)


def edit_json(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path.parent


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """The folder's weights with tensors replaced, added or (None) taken away; dots in names as __."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
