"""Reading, decoding and resizing in threads: the order, the reasons, and how far ahead of its user it goes."""

from __future__ import annotations

import re
import threading
from contextlib import closing

import numpy as np
import pytest
import torch

from featurecache.errors import UnreadableImage
from featurecache.extraction.pipeline import decode_many
from featurecache.images.preprocessing import Preprocess

PLAIN = Preprocess("squash", (4, 4), None, "torchvision", "bilinear", True, "down", None, None, None, "fused")


def image(row: int) -> np.ndarray:
    return np.full((8, 8, 3), row, np.uint8)


def test_images_come_in_the_order_asked_whoever_is_ready_first():
    later = threading.Event()

    def read(row: int) -> np.ndarray:
        if row == 9:
            assert later.wait(10)  # until another is done
        else:
            later.set()
        return image(row)

    found = list(decode_many(read, [9, 3, 5], PLAIN, 2))
    assert [row for row, _, _ in found] == [9, 3, 5]
    assert all(torch.equal(pixels, torch.full((3, 4, 4), row, dtype=torch.uint8)) for row, pixels, _ in found)
    assert all(seconds > 0 for _, _, seconds in found)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(UnreadableImage("no such file"), "no such file"), (MemoryError("too large"), "cannot be resized .*: too large")],
)
def test_an_image_that_cannot_be_had_is_a_reason_and_the_others_come(error, reason):
    def read(row: int) -> np.ndarray:
        if row == 1:
            raise error
        return image(row)

    (_, first, _), (row, why, _), (_, last, _) = decode_many(read, range(3), PLAIN, 2)
    assert isinstance(first, torch.Tensor) and isinstance(last, torch.Tensor) and row == 1
    assert isinstance(why, str) and re.fullmatch(reason, why)


def test_no_more_is_read_than_a_window_ahead_and_nothing_after_it_is_closed():
    seen: list[int] = []
    with closing(decode_many(lambda row: seen.append(row) or image(row), range(1000), PLAIN, 2, ahead=5)) as images:
        for _ in range(3):
            next(images)
    assert len(seen) <= 3 + 5
