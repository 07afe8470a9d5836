"""Processes of this machine as workers: one for each GPU, or so many on a CPU.

By hand and not by a process pool: a pool of the standard library is broken for good when one of its processes is
killed, and its processes outlive a parent that is. A process here ends with the pipe to its parent; it commits what it
computes before.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from featurecache.errors import BadOption, FeatureCacheError
from featurecache.extraction.pipeline import ExtractionJob, ShardPlan
from featurecache.extraction.workers import ShardResult, ShardWorker, WorkerLost, WorkerSetup, run_workers


@dataclass(frozen=True)
class ProcessEngine:
    """So many processes, each on a GPU of its own or with its share of the cores."""

    count: int

    @property
    def share(self) -> int:
        return self.count

    @property
    def words(self) -> str:
        return f"{self.count} processes"

    def run(self, job: ExtractionJob, units: list[ShardPlan], advance: Callable[[int], Any]) -> None:
        kind = job.compute.device.type
        names = [f"cuda:{number}" if kind == "cuda" else kind for number in range(self.count)]
        setup = WorkerSetup.of(job, units, kind)  # of one run, for all of them
        run_workers(job, units, advance, [_Process(replace(setup, device=name)) for name in names])


def processes_for(device: torch.device, count: int | None) -> ProcessEngine:
    """``count``: a process for every GPU if None."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if count is None and not gpus:
        raise BadOption("--engine processes starts one for each GPU, and none is used here: --actors N says how many.")
    if gpus and count is not None and count > gpus:
        raise BadOption(f"--actors {count} is one GPU each, and this machine has {gpus}.")
    return ProcessEngine(count or gpus)


class _Process:
    """A worker in a fresh process, started again when it has died."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._process: Any = None
        self._pipe: Connection | None = None
        self._closed = False

    def start(self) -> ShardResult | FeatureCacheError:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._setup), daemon=True)
        resource_tracker.ensure_running()  # the first start would start it, and take the mask away
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of the child too, until it ignores it
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if self._closed:  # meanwhile
            self.close()
        return self._answer()

    def compute(self, units: list[ShardPlan]) -> ShardResult | FeatureCacheError:
        assert self._pipe is not None, "it was started"
        try:
            self._pipe.send(units)
        except OSError:
            raise self._death() from None
        return self._answer()

    def _answer(self) -> ShardResult | FeatureCacheError:
        assert self._pipe is not None, "it was started"
        try:
            answer: ShardResult | FeatureCacheError | str = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, str):
            raise RuntimeError(f"in a worker:\n{answer}")
        return answer

    def _death(self) -> WorkerLost:
        self._process.join()
        code = self._process.exitcode or 0
        return WorkerLost(f"process {self._process.pid} ended with {f'signal {-code}' if code < 0 else f'code {code}'}")

    def stop(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.join()


def serve(pipe: Connection, setup: WorkerSetup) -> None:
    """The life of a worker's process: units come, results go, until its parent is gone, or SIGTERM came: the parent's,
    or a batch system's to all processes of a job."""
    stopped = list[int]()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends it
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    worker, units = ShardWorker(lambda: bool(stopped)), list[ShardPlan]()
    try:
        while not stopped:
            try:
                given: Any = worker.compute(units) if units else worker.start(setup)
            except Exception:  # a mistake of ours: the parent shows it
                given = traceback.format_exc()
            pipe.send(given)
            units = pipe.recv()
    except (EOFError, OSError):
        return
