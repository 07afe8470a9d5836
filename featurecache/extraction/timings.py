"""What the stages of an extraction take, and what an image costs: measured while it runs, again where it was busy."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.extraction.forward import ForwardRunner
from featurecache.formatting import device_title
from featurecache.outputs import Output

LAST_TIMINGS = 1 << 16  # so many batches and images the medians are of, the last ones
BUSY = 0.25  # share of a pass without a core from which on a machine counts as busy
PASSES = 3  # by which a cost is measured again, behind one that warms up


@dataclass
class StageTimings:
    """What the stages of a run take: seconds of its main loop, and milliseconds an image.

    The latter are medians of what the run really did: normalising, the network and rounding, for a row of a pass, be it
    full or not; reading, decoding and resizing in one decode thread. The store's plan keeps them, not the views: the
    same images give the same files, whatever a run took.
    """

    device: torch.device
    images: int = 0  # that were computed
    seconds: dict[str, float] = field(default_factory=lambda: {"computing": 0.0, "decoding": 0.0, "writing": 0.0})
    passes: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_TIMINGS))  # seconds a row
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_TIMINGS))  # seconds
    running: float = 0.0  # seconds of the passes in which the thread that computes had a core
    elapsed: float = 0.0  # seconds of all passes
    _pending: deque[tuple[Any, Any, int]] = field(default_factory=deque)  # events of a GPU, which runs behind, and rows

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """While the main loop computes, or waits for decoded images or for the writer."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Fractions of the main loop's time, summing to 1."""
        total = sum(self.seconds.values()) or 1.0
        return {name: seconds / total for name, seconds in self.seconds.items()}

    @contextlib.contextmanager
    def forward(self, compute: ForwardRunner) -> Iterator[None]:
        """Around one forward pass; of an accelerator its own time, not that of handing over the work. What was computed
        before this run took what it took then."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                yield
                events[1].record()
            if compute.earlier_s is None:
                self._pending.append((*events, compute.rows))
            else:
                self.passes.append(compute.earlier_s / compute.rows)
            self._settle(keep=64)
            return
        start, ran = time.perf_counter(), time.thread_time()
        yield
        if self.device.type == "mps":
            torch.mps.synchronize()
        took = time.perf_counter() - start
        self.passes.append((took if compute.earlier_s is None else compute.earlier_s) / compute.rows)
        self.running += time.thread_time() - ran
        self.elapsed += took

    @property
    def busy(self) -> bool:
        """Whether other work had the cores: on a CPU the thread that computes waits for nothing else."""
        return self.device.type == "cpu" and self.running < (1 - BUSY) * self.elapsed

    def add(self, other: StageTimings) -> None:
        """What another process measured of its part of the same work."""
        self.images += other.images
        self.seconds = {name: seconds + other.seconds[name] for name, seconds in self.seconds.items()}
        self.passes += other.passes
        self.loads += other.loads
        self.running += other.running
        self.elapsed += other.elapsed

    def finish(self) -> StageTimings:
        """With what a GPU had still to do: it can be pickled."""
        self._settle()
        return self

    def _settle(self, keep: int = 0) -> None:
        while len(self._pending) > keep:
            begin, end, rows = self._pending.popleft()
            end.synchronize()
            self.passes.append(begin.elapsed_time(end) / 1000 / rows)

    def record(self) -> dict[str, Any] | None:
        """What the plan of the store keeps; None where nothing was computed."""
        self._settle()
        if not self.passes:
            return None
        loading = 1000 * statistics.median(self.loads) if self.loads else None
        forward = 1000 * statistics.median(self.passes)
        title = device_title(self.device)
        how = {"device": title, "images": self.images, "busy": self.busy}
        return {"forward_ms": forward, "loading_ms": loading, **how}


def measure_again(
    compute: ForwardRunner, device: torch.device, size: tuple[int, int], outputs: Sequence[Output], threads: int
) -> dict[str, Any]:
    """`StageTimings.record` of a few passes over black images of ``size`` (height, width in pixels)."""
    timings, images = StageTimings(device), torch.zeros(compute.batch_size, 3, *size).byte()
    with exact_arithmetic(threads):
        for number in range(1 + PASSES):
            kept = timings if number else StageTimings(device)
            with kept.forward(compute):
                compute(images, tuple(outputs), "float32")
    measured = timings.record()
    assert measured is not None, "there were passes"
    return measured
