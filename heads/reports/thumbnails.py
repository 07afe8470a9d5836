"""An image as it is embedded in a page: small, newly encoded, without metadata; and what of it the backbone saw."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from featurecache.errors import FeatureCacheError

SIDE = 208  # pixels of the longer side of what is embedded
TINY = 64  # images up to this side are embedded pixel by pixel


def encoded(pixels: np.ndarray) -> tuple[str, tuple[int, int]]:
    """(data URI, (width, height)) of uint8 [H, W, 3]: small images as they are, others as JPEG of ``SIDE`` pixels."""
    from PIL import Image

    grey = bool((pixels[..., :1] == pixels).all())
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    tiny = max(image.size) <= TINY
    if max(image.size) > SIDE:
        scale = SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True) if tiny else image.save(data, "JPEG", quality=82, optimize=True)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", image.size


def seen_part(spec: dict[str, Any], pixels: np.ndarray) -> tuple[float, float, float, float] | None:
    """What of an image the backbone saw, in parts of its width and height: x, y, width, height (padding: beyond it);
    None where the spec does not say."""
    from featurecache.preprocess import Preprocess

    try:
        fields = {key: value for key, value in spec["preprocess"].items() if key != "decoding"}
        preprocess = Preprocess.from_dict(fields)
    except (
        FeatureCacheError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # imported features, or a backbone with its own way
        return None
    height, width = pixels.shape[:2]
    rows, columns = resized_size(preprocess.mode, preprocess.resize, height, width)
    seen_height, seen_width = preprocess.size[0] / rows, preprocess.size[1] / columns
    return (1 - seen_width) / 2, (1 - seen_height) / 2, seen_width, seen_height


def resized_size(mode: str, resize: Sequence[int], height: int, width: int) -> tuple[float, float]:
    """(height, width) in pixels that an image has before it is cropped or padded to the input of the network."""
    if mode == "shortest":
        factor = resize[0] / min(height, width)
    elif mode == "pad":
        factor = min(resize[0] / height, resize[1] / width)
    elif mode == "squash":
        return resize[0], resize[1]
    else:
        factor = 1.0
    return height * factor, width * factor
