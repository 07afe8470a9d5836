"""The extraction pipeline on one machine: decode threads → forward pass → writer thread; what each stage takes.

Order never depends on who finishes first: decoded images are taken in the order they were requested, every forward pass
has B rows or was seen to give their bits with fewer (`featurecache.extraction.forward`), and the writer handles batches
one by one. `decode_many` is the one way in which images are read, decoded and resized in threads, also where no shard
is written.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import ForwardUnavailable, UnreadableImage
from featurecache.extraction.forward import ForwardRunner, HostCopies, is_out_of_memory
from featurecache.extraction.timings import StageTimings
from featurecache.images import decoding as _images
from featurecache.images.headers import EncodedImage
from featurecache.images.pixel_room import PixelRoom
from featurecache.images.preprocessing import Preprocess
from featurecache.outputs import Output, derive
from featurecache.store.remote_cache import push_shards
from featurecache.store.shards import Layout, ShardWriter, read_feature_rows
from featurecache.store.store import Store, rows_per_shard

CHANGED = "the file changed while the extraction ran; run it again"


@dataclass(frozen=True)
class ShardPlan:
    """A run of images and the outputs that are to be computed of them: one shard each."""

    rows: np.ndarray  # [n] numbers of distinct images and of their copies
    outputs: tuple[Output, ...]
    places: np.ndarray | None = None  # [n] ascending: rows in a shard that was, whose places in their batches they keep


@dataclass
class ShardJob:
    """Rows that are to be written as shards; ``failures`` and ``written`` are filled meanwhile."""

    store: Store
    layouts: dict[str, Layout]
    digests: np.ndarray  # [images] S32
    notes: dict[str, str]
    _: KW_ONLY
    replace: bool = False  # over a file of the same name, which is damaged
    failures: dict[int, str] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)


@dataclass(kw_only=True)
class ExtractionJob(ShardJob):
    """What the pipeline needs to know of an extraction; ``timings`` are filled while it runs."""

    read: Callable[[int], EncodedImage]  # by number: the image of this digest; raises UnreadableImage
    preprocess: Preprocess
    make: Callable[[int, EncodedImage], EncodedImage] | None = None  # of what was read, an augmented copy
    compute: ForwardRunner
    workers: int
    threads: int
    fail_fast: bool = False
    data: str = ""  # address of the images, where they lie in object storage
    plain: int | None = None  # numbers from here on are augmented copies, whose making is no loading
    images_per_s: float | None = None  # of the forward pass, where it was measured
    timings: StageTimings = field(init=False)

    def __post_init__(self) -> None:
        self.timings = StageTimings(self.compute.device)


def decode_many(
    read: Callable[[int], EncodedImage], rows: Iterable[int], preprocess: Preprocess, threads: int, ahead: int = 64,
    make: Callable[[int, EncodedImage], EncodedImage] | None = None,
) -> Generator[tuple[int, torch.Tensor | str, float], None, None]:  # fmt: skip
    """Read, decode and resize images in threads: (row, pixels uint8 [3,h,w] or why not, seconds of one thread).

    In the order of ``rows``, of which up to ``ahead`` are in work or waiting; ``read`` raises UnreadableImage. ``make``
    gives what is computed of the image that was read, such as an augmented copy. Large images wait for each other
    (`PixelRoom`). Close it where it is not read to its end.
    """

    room = PixelRoom(threads)

    def decode(row: int) -> tuple[torch.Tensor | str, float]:
        start, waited = time.perf_counter(), 0.0
        try:
            data = read(row)
            with room.of(data) as waited:
                data = data if make is None else make(row, data)
                pixels: torch.Tensor | str = preprocess.resized(_images.decode(data))
        except UnreadableImage as error:
            pixels = str(error)
        except (RuntimeError, MemoryError, ValueError) as error:
            pixels = f"cannot be resized for the network: {error}"
        return pixels, time.perf_counter() - start - waited

    pool = worker_threads(threads, "decode")
    try:
        for row, future in prefetch(pool, decode, rows, ahead):
            yield row, *future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Shards:
    """The shards of one unit while they fill; used by the writer thread only."""

    def __init__(self, job: ShardJob, unit: ShardPlan) -> None:
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
        """numbers [b] of images; rows [b, ...] per source, errors [b] per output, in this machine's memory. A row that
        does not fit the dtype is never stored."""
        good = []
        for k, number in enumerate(numbers):
            bad = next((source for source, tensor in rows.items() if not torch.isfinite(tensor[k]).all()), None)
            if bad is None:
                good.append(k)
            else:
                self._job.failures[number] = _why_not_finite(bad, rows[bad][k])
        if not good:
            return
        digests = [bytes(self._job.digests[numbers[k]]) for k in good]
        for output, writer in self._writers.items():
            tensor = rows[output.source][good] if len(good) < len(numbers) else rows[output.source]
            if output.is_derived:
                tokens = self._job.layouts[output.source]
                assert tokens.prefix is not None and tokens.grid is not None
                tensor = derive(output, tensor, len(tokens.prefix), tokens.grid)
            measured = errors[output.name].numpy()[good] if output.name in errors else None
            writer.append(digests, tensor.numpy(), measured)

    def commit(self) -> None:
        try:
            for writer in self._writers.values():
                if path := writer.commit(replace=self._job.replace):
                    self._job.written.append(path)
                    push_shards(path.parent.parent, [path])
        finally:
            self.discard()

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.close()


def worker_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads beside the one that computes. Each works alone: a team of OpenMP threads for every one of them would spin
    and take the cores from the forward pass (tried: 7 % of a ViT's speed on two). The setting is the thread's own."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


class _Writer:
    """One writer thread, a bounded number of batches behind the forward pass. Errors surface at the next call."""

    def __init__(self, timings: StageTimings) -> None:
        self._pool = worker_threads(1, "write")
        self._timings = timings
        self._pending: deque[Future[Any]] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        with self._timings.stage("writing"):
            self._pending.append(self._pool.submit(function, *arguments))
            while len(self._pending) > 8:
                self._pending.popleft().result()

    def finish(self) -> None:
        """Wait for all that was handed over; raises the first error."""
        with self._timings.stage("writing"):
            while self._pending:
                self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _why_not_finite(source: str, row: torch.Tensor) -> str:
    if row.dtype == torch.float16 and not torch.isnan(row).any():
        return f"{source} has values beyond 65,504, which do not fit float16; try --dtype float32"
    return f"{source} has values that are not finite; try --precision fp32 and --dtype float32"


def run_local(job: ExtractionJob, units: list[ShardPlan], advance: Callable[[int], Any]) -> None:
    """Compute the units in order and commit their shards. ``advance(images)`` is called after every batch.

    Interrupted (Ctrl-C, an unreadable image under ``fail_fast``, a device whose memory others took), what was computed
    is committed first. Raises UnreadableImage, ForwardUnavailable.
    """
    writer, copies = _Writer(job.timings), HostCopies(job.compute.device)
    numbers = (int(number) for unit in units for number in unit.rows)
    images = decode_many(
        job.read, numbers, job.preprocess, job.workers, 2 * job.compute.batch_size + job.workers, job.make
    )
    open_shards: list[_Shards] = []
    try:
        with exact_arithmetic(job.threads):
            for unit in units:
                open_shards.append(_Shards(job, unit))
                try:
                    _run_unit(job, unit, open_shards[-1], images, writer, copies, advance)
                finally:  # also when interrupted: what was computed is kept
                    writer(open_shards[-1].commit)
        writer.finish()
    except (KeyboardInterrupt, UnreadableImage, ForwardUnavailable):
        writer.finish()
        raise
    finally:
        images.close()
        writer.close()
        for shards in open_shards:
            shards.discard()


@contextlib.contextmanager
def memory_errors(device: torch.device, batch: int) -> Iterator[None]:
    """Around what a store's batches need of a device. Raises ForwardUnavailable where it has not the memory for one."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ForwardUnavailable(
            f"{device} has not the memory for batches of {batch}, in which this store computes: free some of it, or "
            "take another device (--device cpu)."
        ) from error


class Engine(Protocol):
    """Where the shards of a plan are computed: in this process, in others of this machine, on a cluster. Each commits
    them by `run_local`."""

    @property
    def share(self) -> int:
        """Among so many processes this machine's cores are divided."""

    @property
    def words(self) -> str:
        """For people: "2 processes"; empty for this one."""

    def run(self, job: ExtractionJob, units: list[ShardPlan], advance: Callable[[int], Any]) -> None: ...


class LocalEngine:
    """This process."""

    share, words = 1, ""

    def run(self, job: ExtractionJob, units: list[ShardPlan], advance: Callable[[int], Any]) -> None:
        run_local(job, units, advance)


_Decoded = tuple[int, torch.Tensor | str, float]  # what `decode_many` gives


def _run_unit(
    job: ExtractionJob, unit: ShardPlan, shards: _Shards, images: Iterator[_Decoded], writer: _Writer,
    copies: HostCopies, advance: Callable[[int], Any],
) -> None:  # fmt: skip
    dtype, compute, timings = job.layouts[unit.outputs[0].name].dtype, job.compute, job.timings
    for batch in _batches(job, unit, images, advance):
        numbers, places, pixels = (list(column) for column in zip(*batch, strict=True))
        stacked = torch.stack(pixels)
        with memory_errors(timings.device, compute.batch_size), timings.stage("computing"), timings.forward(compute):
            rows, errors = compute(stacked, unit.outputs, dtype, places)
        writer(_write, shards, numbers, copies.begin(rows), copies.begin(errors))
        if job.fail_fast and job.failures:
            raise UnreadableImage(next(iter(job.failures.values())))
        timings.images += len(numbers)
        advance(len(numbers))


def _write(
    shards: _Shards, numbers: list[int], rows: Callable[[], dict[str, torch.Tensor]],
    errors: Callable[[], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    shards.write(numbers, rows(), errors())


def _batches(
    job: ExtractionJob, unit: ShardPlan, images: Iterator[_Decoded], advance: Callable[[int], Any]
) -> Iterator[list[tuple[int, int, torch.Tensor]]]:
    """Up to B readable images of one unit: (number, place in the batch, pixels)."""
    size = job.compute.batch_size
    batch: list[tuple[int, int, torch.Tensor]] = []
    for k in range(len(unit.rows)):
        with job.timings.stage("decoding"):
            number, image, seconds = next(images)
        if isinstance(image, str):
            job.failures[number] = image
            advance(1)
            if job.fail_fast:
                raise UnreadableImage(image)
            continue
        if job.plain is None or number < job.plain:
            job.timings.loads.append(seconds)
        place = len(batch) if unit.places is None else int(unit.places[k]) % size
        if batch and place <= batch[-1][1]:
            yield batch
            batch = []
        batch.append((number, place, image))
        if place == size - 1:
            yield batch
            batch = []
    if batch:
        yield batch


def prefetch(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], window: int
) -> Iterator[tuple[Any, Future[Any]]]:
    """Submit up to ``window`` items in advance; (item, future) in the order of the items."""
    pending: deque[tuple[Any, Future[Any]]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > window:
            yield pending.popleft()
    yield from pending


def forward_units(
    groups: Sequence[tuple[np.ndarray, tuple[Output, ...]]], layouts: dict[str, Layout], plan: dict[str, Any]
) -> list[ShardPlan]:
    """Images [n] and what is to be computed of them, in runs of a shard's size."""
    units = []
    for rows, outputs in groups:
        row_bytes = max(layouts[output.name].row_bytes for output in outputs)
        length = rows_per_shard(len(rows), row_bytes, plan.get("images_per_s"), plan["batch_size"])
        units += [ShardPlan(rows[start : start + length], outputs) for start in range(0, len(rows), length)]
    return units


def derive_shards(
    job: ShardJob, groups: Sequence[tuple[np.ndarray, tuple[Output, ...]]], advance: Callable[[int], Any]
) -> None:
    """Compute outputs that are functions of stored tokens."""
    for numbers, outputs in groups:
        length = rows_per_shard(len(numbers), max(job.layouts[output.name].row_bytes for output in outputs))
        sources = {output.source: job.layouts[output.source] for output in outputs}
        tokens = {source: job.store.locate(layout, job.digests[numbers]) for source, layout in sources.items()}
        for first in range(0, len(numbers), length):
            end = min(first + length, len(numbers))
            shards = _Shards(job, ShardPlan(numbers[first:end], outputs))
            try:
                for start in range(first, end, 64):
                    part = slice(start, min(start + 64, end))
                    rows = {source: read_feature_rows(tokens[source][part], sources[source]) for source in sources}
                    shards.write(numbers[part].tolist(), rows, {})
                    advance(part.stop - start)
                shards.commit()
            finally:
                shards.discard()
