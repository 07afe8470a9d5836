"""Memory of decoding, bounded in pixels: how many may be in work at once, whatever the number of images."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from featurecache.images.decoding import pixel_count
from featurecache.images.headers import MAX_PIXELS, EncodedImage

PIXELS_PER_THREAD = 24_000_000  # a camera's image; one takes at most 12 bytes in work (a PNG: 10)


class PixelRoom:
    """The memory of decoding: so many pixels are in work at once, in all threads, or a single image. A file of a few
    bytes may hold hundreds of millions."""

    def __init__(self, threads: int) -> None:
        self._all = self._free = max(MAX_PIXELS, PIXELS_PER_THREAD * threads)
        self._turn = threading.Condition()

    @contextlib.contextmanager
    def of(self, data: EncodedImage) -> Iterator[float]:
        """While an image is in work; the seconds that it waited for others."""
        pixels, start = min(pixel_count(data), self._all), time.perf_counter()
        with self._turn:
            self._turn.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield time.perf_counter() - start
        finally:
            with self._turn:
                self._free += pixels
                self._turn.notify_all()
