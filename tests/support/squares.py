"""Images of noise in which one square decides the label, and whether a map peaks on it."""

from __future__ import annotations

import numpy as np

BLUE, RED = (40, 60, 190), (190, 60, 40)


def squares(n: int, seed: int, side: int = 32, size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 images [n,side,side,3] of grey noise with a red (1) or blue (0) square; labels; corners [n,2] in pixels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 130, (n, side, side, 1), dtype=np.uint8).repeat(3, 3)
    labels, corners = np.arange(n) % 2, rng.integers(0, side // 4 - 1, (n, 2)) * 4
    for image, label, (y, x) in zip(images, labels, corners, strict=True):
        image[y : y + size, x : x + size] = (BLUE, RED)[label]
    return images, labels, corners


def on_square(
    peak: tuple[int, int] | None, grid: tuple[int, int], corner: np.ndarray, side: int = 32, size: int = 8
) -> bool:
    """Whether the middle of the peak's cell lies in the square."""
    if peak is None:
        return False
    middle = [(at + 0.5) * side / count for at, count in zip(peak, grid, strict=True)]
    return all(low <= at < low + size for low, at in zip(corner, middle, strict=True))
