"""Workers: other processes that compute shards of a plan, here or on other machines, and who hands the work out.

A `ShardWorker` loads the backbone that this process has loaded, computes the way that was chosen here, compares the
probe images with the store, and commits by `run_local`, as one process would: the same plan gives the same bytes.
`run_workers` gives each worker one call at a time, of so many shards as take about half a minute, and the next one when
that has come back. A worker that died is started again by whoever keeps it; its call goes to the next one that is free,
and what was committed of it is not computed again. Workers that are not there yet, such as those of a node that is
still to join a cluster, keep nobody waiting.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import CacheError, Drift, FeatureCacheError, ForwardUnavailable, UnreadableImage, WorkersLost
from featurecache.extraction.canary import check_canary, load_stored_backbone
from featurecache.extraction.forward import ForwardRunner
from featurecache.extraction.pipeline import ExtractionJob, ShardPlan, memory_errors, run_local
from featurecache.extraction.timings import StageTimings
from featurecache.files.mirror import Mirror, place_of
from featurecache.files.storage import is_address
from featurecache.images.headers import EncodedImage
from featurecache.outputs import Output
from featurecache.store.remote_cache import mirrored_cache
from featurecache.store.shards import Layout, shard_name
from featurecache.store.store import Store

CALL_SECONDS = 30.0  # of work that a worker is given at a time: between two calls nothing overlaps for about a second
LEAST_CALLS = 4  # for each worker, so that all come to their end together: shards of few images are cut for it,
LEAST_SECONDS = 10.0  # but not below so much work, where the speed is known
FINISH_SECONDS = 20.0  # that workers have to commit what they computed when a run is stopped: SLURM kills after 30
LOSSES = 3  # of a worker in a row while it starts, or over one call, from which on it is no accident


class WorkerLost(Exception):
    """A worker's process is gone, or its machine."""


class Worker(Protocol):
    """A `ShardWorker` in a process of its own. Both calls wait, and raise WorkerLost."""

    def start(self) -> ShardResult | FeatureCacheError: ...

    def compute(self, units: list[ShardPlan]) -> ShardResult | FeatureCacheError: ...

    def stop(self) -> None:
        """Have the call that is computed end behind its batch: what it computed is committed."""

    def close(self) -> None:
        """End the process, whatever it does."""


@dataclass
class ShardResult:
    """What became of a call."""

    failures: dict[int, str] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    timings: StageTimings | None = None
    images: int = 0  # that are done with, computed or not


@dataclass(frozen=True)
class WorkerSetup:
    """An `ExtractionJob` as it goes to other processes: with the name of its backbone in place of the network."""

    folder: str  # in which relative paths begin
    place: str  # of the store: its address, or its path
    store: Store
    layouts: dict[str, Layout]
    digests: np.ndarray
    notes: dict[str, str]
    read: Callable[[int], EncodedImage]
    make: Callable[[int, EncodedImage], EncodedImage] | None
    data: str  # address of the images, if they have one
    run: str  # by which workers of this run know each other
    workers: int
    threads: int
    fail_fast: bool
    plain: int | None
    request: dict[str, Any]  # of `load_backbone`
    outputs: tuple[Output, ...]
    device: str
    batch_size: int
    way: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, job: ExtractionJob, units: Sequence[ShardPlan], device: str) -> WorkerSetup:
        compute = job.compute
        outputs = tuple(dict.fromkeys(output for unit in units for output in unit.outputs))
        return cls(
            os.getcwd(), place_of(job.store.path), job.store, job.layouts, job.digests, job.notes, job.read, job.make,
            job.data, secrets.token_hex(8), job.workers, job.threads, job.fail_fast, job.plain,
            compute.backbone.provenance["request"], outputs, device, compute.batch_size, compute.way, compute.parts,
        )  # fmt: skip


class ShardWorker:
    """Computes shards in a process of its own. Errors for users are returned: not every one can be raised anew in
    another process. ``stops``: whether it shall end, which is asked behind each batch."""

    def __init__(self, stops: Callable[[], bool]) -> None:
        self._stops = stops
        self._compute: ForwardRunner | None = None

    def start(self, setup: WorkerSetup) -> ShardResult | FeatureCacheError:
        """Load the backbone, compare the probe images with the store."""
        try:
            self._start(setup)
        except (Drift, ForwardUnavailable) as error:
            return _on_this_machine(error)
        except FeatureCacheError as error:
            return error
        return ShardResult()

    def _start(self, setup: WorkerSetup) -> None:
        folder = Path(setup.folder) / setup.store.path
        if is_address(setup.place):  # another machine has a mirror of its own
            cache, name = setup.place.rsplit("/", 1)
            folder = mirrored_cache(cache) / name
        if not os.path.isdir(setup.folder) or not folder.is_dir():
            missing = folder if os.path.isdir(setup.folder) else setup.folder
            raise CacheError(
                f"{platform.node()} has no {missing}: this folder, and images and a cache that are no addresses, have "
                "to be on a file system that all machines mount at the same place."
            )
        os.chdir(setup.folder)
        if setup.data:
            Mirror.of(setup.data, "data").pull_once(setup.run)  # an image is fetched when it is read
        setup = replace(setup, store=replace(setup.store, path=folder))
        device = torch.device(setup.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backbone, precision = load_stored_backbone(setup.store, setup.request), setup.store.spec.precision
        with memory_errors(device, setup.batch_size), exact_arithmetic(setup.threads):
            compute = ForwardRunner(
                backbone, precision, device, setup.batch_size, setup.way, setup.parts, setup.threads
            )
            check_canary(setup.store, backbone, compute, setup.outputs, write=False)
        compute.release()
        self._setup, self._compute = setup, compute

    def compute(self, units: list[ShardPlan]) -> ShardResult | FeatureCacheError | None:
        """Commit the shards of ``units`` that are not there yet. None where this is a fresh process, to be started."""
        if self._compute is None:
            return None
        setup, compute = self._setup, self._compute
        job = ExtractionJob(
            setup.store, setup.layouts, setup.digests, setup.notes, read=setup.read, make=setup.make, compute=compute,
            preprocess=compute.backbone.preprocess, workers=setup.workers, threads=setup.threads,
            fail_fast=setup.fail_fast, plain=setup.plain,
        )  # fmt: skip
        images = sum(len(unit.rows) for unit in units)
        try:
            run_local(job, [unit for unit in units if not self._is_committed(unit)], self._end_if_stopped)
        except UnreadableImage:  # what was computed is committed; the failure says the rest
            assert job.failures
        except KeyboardInterrupt:  # the same
            images = job.timings.images
        except ForwardUnavailable as error:
            return _on_this_machine(error)
        except FeatureCacheError as error:
            return error
        return ShardResult(job.failures, job.written, job.timings.finish(), images)

    def _end_if_stopped(self, images: int) -> None:
        if self._stops():
            raise KeyboardInterrupt

    def _is_committed(self, unit: ShardPlan) -> bool:
        name = f"{shard_name(self._setup.digests[unit.rows])}.h5"
        return all((self._setup.store.folder(output.name) / name).exists() for output in unit.outputs)


def _on_this_machine(error: FeatureCacheError) -> FeatureCacheError:
    """``error`` with the machine's name; of a device without memory with what is different for workers."""
    fewer = " Where several workers share it, --actors takes fewer." if error.__cause__ is not None else ""
    return type(error)(f"on {platform.node()}: {error}{fewer}")


def calls_of(
    units: Sequence[ShardPlan], images_per_s: float | None, batch: int, workers: int
) -> Iterator[list[ShardPlan]]:
    """Shards that are given to a worker at once, in the order of the plan; long ones cut after whole batches."""
    rate, part = images_per_s or 0.0, sum(len(unit.rows) for unit in units) / (LEAST_CALLS * workers)
    length = max(batch, int(max(part, rate * LEAST_SECONDS)) // batch * batch)
    cut = (
        replace(unit, rows=unit.rows[start : start + length])
        for unit in units
        for start in range(0, len(unit.rows), length)
    )
    most, call, images = min(rate * CALL_SECONDS, part), list[ShardPlan](), 0
    for unit in cut:
        if call and images + len(unit.rows) > most:
            yield call
            call, images = [], 0
        call.append(unit)
        images += len(unit.rows)
    if call:
        yield call


_Waiting = dict[Future[Any], tuple[Worker, list[ShardPlan] | None]]  # of a call, or of a start


def run_workers(
    job: ExtractionJob, units: Sequence[ShardPlan], advance: Callable[[int], Any], workers: Sequence[Worker]
) -> None:
    """Have the workers compute the units; ``job`` gets what they found, ``advance(images)`` is called after each call.

    Raises WorkersLost, UnreadableImage under ``fail_fast``, and what a worker could not do. They are ended on the way
    out; interrupted, they commit first what they have computed, unless that takes longer than ``FINISH_SECONDS`` or the
    next interrupt comes.
    """
    if job.compute.device.type == "cuda":  # one of them is on the GPU on which this process found the batch that fits
        torch.cuda.empty_cache()
    todo = deque(calls_of(units, job.images_per_s, job.compute.batch_size, len(workers)))
    losses: Counter[int] = Counter()  # of a call, by its first image; of a worker's starts, by -1 − its number
    pool, idle = ThreadPoolExecutor(len(workers), "worker"), list[Worker]()
    waiting: _Waiting = {pool.submit(worker.start): (worker, None) for worker in workers}
    try:
        while todo or any(call for _, call in waiting.values()):
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                worker, call = waiting.pop(future)
                key = int(call[0].rows[0]) if call else -1 - workers.index(worker)
                try:
                    _merge(job, future.result(), advance)
                except WorkerLost as error:
                    losses[key] += 1
                    if losses[key] >= LOSSES:
                        raise _lost(job, call, error) from error
                    todo.extendleft([call] if call else [])
                    waiting[pool.submit(worker.start)] = worker, None
                else:
                    losses[key] = 0
                    idle.append(worker)
            while idle and todo:
                worker, call = idle.pop(), todo.popleft()
                waiting[pool.submit(worker.compute, call)] = worker, call
    except KeyboardInterrupt:
        calls = {future: worker for future, (worker, call) in waiting.items() if call}
        for worker in calls.values():
            worker.stop()
        for future in wait(calls, FINISH_SECONDS).done:
            with contextlib.suppress(WorkerLost, FeatureCacheError):
                _merge(job, future.result(), advance)
        raise
    finally:
        for worker in workers:
            worker.close()
        pool.shutdown(cancel_futures=True)


def _merge(job: ExtractionJob, result: ShardResult | FeatureCacheError, advance: Callable[[int], Any]) -> None:
    if isinstance(result, FeatureCacheError):
        raise result
    job.failures |= result.failures
    job.written += result.written
    if result.timings is not None:
        job.timings.add(result.timings)
        advance(result.images)
    if job.fail_fast and job.failures:
        raise UnreadableImage(next(iter(job.failures.values())))


def _lost(job: ExtractionJob, call: list[ShardPlan] | None, error: WorkerLost) -> WorkersLost:
    if call is None:
        return WorkersLost(
            f"a worker ended {LOSSES} times while it loaded the backbone ({error}): is there memory for so many? "
            "--actors takes fewer."
        )
    numbers = [int(call[0].rows[0]), int(call[-1].rows[-1])]
    first, last = (job.digests[number].decode() for number in numbers)
    images = sum(len(unit.rows) for unit in call)
    return WorkersLost(
        f"{LOSSES} workers ended over the same {images:,} images ({error}), those of the digests {first} to {last}. "
        "What is committed is safe, and the same command continues; --engine local shows what ends it."
    )
