"""Images as bytes, what decoding makes of them, and why it refuses others."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  (its first import starts ldconfig, and a test of the first tier may start nothing)
from PIL import Image

from featurecache.errors import UnreadableImage
from featurecache.images.decoding import decode


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:  # type: ignore[no-untyped-def]
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_tifffile(samples: np.ndarray, **options) -> bytes:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(buffer, samples, **options)
    return buffer.getvalue()


def decoded(data: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return decode(data).permute(1, 2, 0).numpy()


def reason(data: Any, ask=decode) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(UnreadableImage) as caught:
        ask(data)
    return str(caught.value)
