"""The extraction pipeline on one machine: decode threads → forward pass → writer thread.

Order never depends on who finishes first: decoded images are taken in the order they were asked for, every forward
pass has exactly B rows (a short batch is padded and the padding dropped), and the writer handles batches one by one.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from featurecache import images as _images
from featurecache.augment import Copying
from featurecache.backbones import Backbone
from featurecache.costs import Measured
from featurecache.dataset import Stored
from featurecache.errors import UnreadableImage
from featurecache.forward import Compute, exact_arithmetic
from featurecache.outputs import Output, derive
from featurecache.shards import Layout, Located, ShardWriter, read_rows
from featurecache.stores import Store

CHANGED = "the file changed while the extraction ran; run it again"


@dataclass(frozen=True)
class Unit:
    """A run of images and the outputs that are to be computed of them: one shard each."""

    rows: np.ndarray  # [n] numbers of distinct images and of their copies
    outputs: tuple[Output, ...]


@dataclass
class Job:
    """What the engine needs to know of an extraction; ``failures`` and ``measured`` are filled while it runs."""

    store: Store
    layouts: dict[str, Layout]
    digests: np.ndarray  # [images] S32
    read: Callable[[int], Stored]  # by number of the distinct image
    backbone: Backbone
    compute: Compute
    notes: dict[str, str]
    workers: int
    threads: int
    fail_fast: bool = False
    copying: Copying | None = None  # which of the numbers are augmented copies
    failures: dict[int, str] = field(default_factory=dict)
    measured: Measured = field(init=False)

    def __post_init__(self) -> None:
        self.measured = Measured(self.compute.device, self.compute.batch_size)

    def prepare(self, number: int) -> torch.Tensor | str:
        """One image as the network sees it, uint8 [3,h,w], or why not. Runs in a decode thread."""
        source = self.copying.source(number) if self.copying else number
        start = time.perf_counter()
        try:
            data = self.read(number)
            if _images.digest(data).encode() != self.digests[source]:
                return CHANGED
            image = _images.decode(data)
            if self.copying and source != number:
                image = self.copying.augmented.augmentation.made(image, bytes(self.digests[number]))
            pixels = self.backbone.preprocess.resized(image)
            if source == number:
                self.measured.loads.append(time.perf_counter() - start)
            return pixels
        except UnreadableImage as error:
            return str(error)
        except (RuntimeError, MemoryError, ValueError) as error:
            return f"cannot be resized for the network: {error}"


@dataclass
class Clock:
    """Seconds the main loop spent waiting for decoded images, computing, and waiting for the writer."""

    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    images: int = 0

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.perf_counter() - start)

    def shares(self) -> dict[str, float]:
        """Fractions of the time, summing to 1."""
        parts = {"computing": self.computing, "decoding": self.reading, "writing": self.writing}
        total = sum(parts.values()) or 1.0
        return {key: value / total for key, value in parts.items()}


class _Shards:
    """The shards of one unit while they fill; used by the writer thread only."""

    def __init__(self, job: Job, unit: Unit) -> None:
        self._job, self._unit = job, unit
        planned = job.digests[unit.rows]
        self._writers: dict[Output, ShardWriter] = {}
        try:
            for output in unit.outputs:
                layout = job.layouts[output.name]
                self._writers[output] = ShardWriter(job.store.path, planned, layout, job.notes)
        except BaseException:
            self.discard()
            raise

    def write(self, numbers: list[int], rows: dict[str, torch.Tensor], errors: dict[str, torch.Tensor]) -> None:
        """numbers [b] of images; rows [b, ...] per source, errors [b] per output. A row that does not fit the dtype is
        never stored."""
        kept = {source: tensor.cpu() for source, tensor in rows.items()}
        good = self._finite(numbers, kept)
        digests = [bytes(self._job.digests[numbers[k]]) for k in good]
        for output, writer in self._writers.items():
            tensor = kept[output.source][good] if len(good) < len(numbers) else kept[output.source]
            if output.derived:
                backbone = self._job.backbone
                tensor = derive(output, tensor, len(backbone.prefix), backbone.grid)
            measured = errors[output.name].cpu().numpy()[good] if output.name in errors else None
            writer.append(digests, tensor.numpy(), measured)

    def _finite(self, numbers: list[int], rows: dict[str, torch.Tensor]) -> list[int]:
        good = []
        for k, number in enumerate(numbers):
            bad = next((source for source, tensor in rows.items() if not torch.isfinite(tensor[k]).all()), None)
            if bad is None:
                good.append(k)
            else:
                self._job.failures[number] = _why_not_finite(bad, rows[bad][k])
        return good

    def commit(self) -> None:
        try:
            for writer in self._writers.values():
                writer.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()


def helpers(count: int, name: str) -> ThreadPoolExecutor:
    """Threads beside the one that computes. Each works alone: a team of OpenMP threads for every one of them would spin
    and take the cores from the forward pass (tried: 7 % of a ViT's speed on two). The setting is the thread's own."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


class _Behind:
    """One writer thread, a bounded number of batches behind the forward pass. Errors surface at the next call."""

    def __init__(self, clock: Clock, most: int = 8) -> None:
        self._pool = helpers(1, "write")
        self._clock, self._most = clock, most
        self._pending: deque[Future[Any]] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        with self._clock.on("writing"):
            self._pending.append(self._pool.submit(function, *arguments))
            while len(self._pending) > self._most:
                self._pending.popleft().result()

    def finish(self) -> None:
        """Wait for all that was handed over; raises the first error."""
        with self._clock.on("writing"):
            while self._pending:
                self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _why_not_finite(source: str, row: torch.Tensor) -> str:
    if row.dtype == torch.float16 and not torch.isnan(row).any():
        return f"{source} has values beyond 65,504, which do not fit float16; try --dtype float32"
    return f"{source} has values that are not finite; try --precision fp32 and --dtype float32"


def run_local(job: Job, units: list[Unit], advance: Callable[[int, Clock], Any]) -> Clock:
    """Compute the units in order and commit their shards. ``advance(images, clock)`` is called after every batch.

    Interrupted (Ctrl-C, or an unreadable image under ``fail_fast``), what was computed is committed first.
    """
    clock = Clock()
    decoders, behind = helpers(job.workers, "decode"), _Behind(clock)
    items = ((unit, int(number)) for unit in units for number in unit.rows)
    upcoming = ahead(decoders, lambda item: job.prepare(item[1]), items, 2 * job.compute.batch_size + job.workers)
    open_shards: list[_Shards] = []
    try:
        with exact_arithmetic(job.threads):
            for unit in units:
                open_shards.append(_Shards(job, unit))
                try:
                    _run_unit(job, unit, open_shards[-1], upcoming, behind, clock, advance)
                finally:  # also when interrupted: what was computed is kept
                    behind(open_shards[-1].commit)
        behind.finish()
    except (KeyboardInterrupt, UnreadableImage):
        behind.finish()
        raise
    finally:
        decoders.shutdown(cancel_futures=True)
        behind.close()
        for shards in open_shards:
            shards.discard()
    return clock


def _run_unit(
    job: Job, unit: Unit, shards: _Shards, upcoming: Iterator[tuple[Any, Future[Any]]], behind: _Behind, clock: Clock,
    advance: Callable[[int, Clock], Any],
) -> None:  # fmt: skip
    dtype = job.layouts[unit.outputs[0].name].dtype
    for numbers, images in _batches(job, unit, upcoming, clock, advance):
        with clock.on("computing"), job.measured.forward():
            rows, errors = job.compute(images, unit.outputs, dtype)
        behind(shards.write, numbers, rows, errors)
        if job.fail_fast and job.failures:
            raise UnreadableImage(next(iter(job.failures.values())))
        clock.images += len(numbers)
        job.measured.images += len(numbers)
        advance(len(numbers), clock)


def _batches(
    job: Job,
    unit: Unit,
    upcoming: Iterator[tuple[Any, Future[Any]]],
    clock: Clock,
    advance: Callable[[int, Clock], Any],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of up to B readable images of one unit."""
    numbers: list[int] = []
    pixels: list[torch.Tensor] = []
    for _ in range(len(unit.rows)):
        with clock.on("reading"):
            (_, number), future = next(upcoming)
            image = future.result()
        if isinstance(image, str):
            job.failures[number] = image
            advance(1, clock)
            if job.fail_fast:
                raise UnreadableImage(image)
            continue
        numbers.append(number)
        pixels.append(image)
        if len(numbers) == job.compute.batch_size:
            yield numbers, torch.stack(pixels)
            numbers, pixels = [], []
    if numbers:
        yield numbers, torch.stack(pixels)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], window: int
) -> Iterator[tuple[Any, Future[Any]]]:
    """Submit up to ``window`` items in advance; give (item, future) in the order of the items."""
    pending: deque[tuple[Any, Future[Any]]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > window:
            yield pending.popleft()
    yield from pending


def derive_units(job: Job, units: list[tuple[Unit, dict[str, Located]]], advance: Callable[[int, Clock], Any]) -> None:
    """Compute outputs that are functions of stored tokens. ``Located`` says where the tokens of the unit's rows lie."""
    for unit, places in units:
        shards = _Shards(job, unit)
        try:
            for start in range(0, len(unit.rows), 64):
                stretch = slice(start, start + 64)
                rows = {source: read_rows(place[stretch], job.layouts[source]) for source, place in places.items()}
                shards.write(unit.rows[stretch].tolist(), rows, {})
                advance(len(unit.rows[stretch]), Clock())
            shards.commit()
        finally:
            shards.discard()
