"""Small image folders and tables the tests make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import featurecache
from featurecache.store.view import View


def picture(seed: int, width: int = 40, height: int = 33, mode: str = "RGB") -> Image.Image:
    """A smooth random picture: noise resized up, so that resizing it is like resizing a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save_picture(path: Path, seed: int, **shape) -> Path:  # type: ignore[no-untyped-def]
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **shape).save(path)
    return path


def untrained_view(data: Path, cache: Path, outputs: str = "cls,tokens") -> View:
    """What an untrained small ViT sees in ``data``."""
    made = featurecache.extract(data, backbone="vit-demo", random_weights=True, outputs=outputs, cache=cache)
    return featurecache.open_view(made.view)


def image_folder(root: Path, n: int = 12, classes: tuple[str, ...] = ("ill", "well"), suffix: str = ".png") -> Path:
    """``n`` different pictures in class folders, of different sizes, some grey."""
    for k in range(n):
        shape = {"width": 30 + k % 5, "height": 44 - k % 7, "mode": "L" if k % 3 == 2 else "RGB"}
        save_picture(root / classes[k % len(classes)] / f"{k:03d}{suffix}", k, **shape)
    return root
