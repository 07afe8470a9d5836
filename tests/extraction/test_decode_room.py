"""Large images wait for each other while they are decoded: the memory of decoding has a bound in pixels."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurecache.extraction.pipeline import decode_many
from featurecache.images import decoding, pixel_room


class Meter:
    """A step of decoding, and the most images that were in it at once."""

    def __init__(self) -> None:
        self.now, self.most, self._turn = 0, 0, threading.Lock()

    def __call__(self, image: Any) -> Any:
        with self._turn:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self._turn:
            self.now -= 1
        return image


def most_at_once(monkeypatch: pytest.MonkeyPatch, images: Sequence[Any], *, pixels: int, copies: bool = False) -> int:
    """Of four threads, which may have so many pixels in work."""
    monkeypatch.setattr(pixel_room, "MAX_PIXELS", pixels)
    monkeypatch.setattr(pixel_room, "PIXELS_PER_THREAD", 0)
    meter = Meter()
    preprocess: Any = SimpleNamespace(resized=(lambda image: image) if copies else meter)
    make = (lambda row, data: meter(data)) if copies else None
    done = [row for row, _, _ in decode_many(images.__getitem__, range(len(images)), preprocess, 4, make=make)]
    assert done == list(range(len(images)))
    return meter.most


def picture(side: int, kind: str) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)  # noise: a file of its pixels' size
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["array", "PNG", "JPEG", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("copies", [False, True])
def test_images_of_which_two_have_too_many_pixels_are_in_work_one_by_one(monkeypatch, kind, copies):
    image = np.zeros((300, 300, 3), np.uint8) if kind == "array" else picture(300, kind)
    assert most_at_once(monkeypatch, [image] * 6, pixels=150_000, copies=copies) == 1
    assert 1 < most_at_once(monkeypatch, [image] * 8, pixels=190_000, copies=copies) <= 2


def test_an_image_larger_than_all_the_room_is_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = np.zeros((300, 300), np.uint8), np.zeros((2, 2), np.uint8)
    assert most_at_once(monkeypatch, [small, large, large, small], pixels=80_000) <= 2


def test_small_files_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_open", None)
    assert decoding.pixel_count(picture(20, "PNG")) == decoding.pixel_count(picture(20, "JPEG")) == 0


def test_what_cannot_be_read_is_said_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess: Any = SimpleNamespace(resized=lambda image: image)
    (why,) = [why for _, why, _ in decode_many([b"x" * 50_000].__getitem__, range(1), preprocess, 1)]
    assert isinstance(why, str) and why


KEPT = """
import io, resource
from dataclasses import replace
from pathlib import Path
from PIL import Image
from featurecache.extraction.pipeline import decode_many
from heads.models.catalogue import HALF, squash_preprocess

file = io.BytesIO()
Image.new("RGB", (4000, 4000)).save(file, "PNG", compress_level=1)  # 64 MB in Pillow
preprocess = replace(squash_preprocess(32, HALF), kernel="pil")
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
images = [file.getvalue()] * 4
list(decode_many(images.__getitem__, range(1), preprocess, 1))  # imports
before = resident()
assert all(not isinstance(x, str) for _, x, _ in decode_many(images.__getitem__, range(4), preprocess, 4))
print(resident() - before)
"""


@pytest.mark.integration
def test_no_thread_keeps_the_memory_of_a_large_image_that_it_decoded() -> None:
    """In a process of its own: what else a process has allocated decides what goes back."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64e6
