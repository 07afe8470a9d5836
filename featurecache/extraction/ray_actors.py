"""Actors of a Ray cluster as workers: placed, and started again when their process or node is gone, by Ray.

Ray schedules: an actor that has no room waits, and an autoscaler sees it wait. The driver, this process, plans, chooses
the forward pass and writes the view; actors commit shards into the same folder, which all nodes see. The driver hands a
lost call to another actor rather than let Ray repeat it on the same one, which may wait for a node for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featurecache.errors import BadOption, FeatureCacheError
from featurecache.extraction.pipeline import ExtractionJob, ShardPlan
from featurecache.extraction.workers import ShardResult, ShardWorker, WorkerLost, WorkerSetup, run_workers
from featurecache.store.remote_cache import pull


@dataclass(frozen=True)
class RayEngine:
    """``actors``: as many as the cluster has room for if None. ``num_gpus``: of each; parts of one are shared."""

    address: str | None = None
    actors: int | None = None
    num_gpus: float | None = None
    share = 1

    @property
    def words(self) -> str:
        return f"{self.actors or 'as many'} actors{'' if self.actors else ' as Ray has room for'}"

    def run(self, job: ExtractionJob, units: list[ShardPlan], advance: Callable[[int], Any]) -> None:
        import ray

        own, on_sigterm = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
        if own:
            self._connect()
            with contextlib.suppress(ValueError):  # of a thread: there Ray has set no handler of its own either
                signal.signal(signal.SIGTERM, on_sigterm)
        try:
            on_gpu = job.compute.device.type == "cuda"
            gpus = float(on_gpu) if self.num_gpus is None else self.num_gpus
            needs = {"CPU": float(job.workers if on_gpu else job.threads), "GPU": gpus}
            setup = ray.put(WorkerSetup.of(job, units, job.compute.device.type))
            actor = ray.remote(ShardWorker).options(
                num_cpus=needs["CPU"], num_gpus=gpus, max_restarts=-1, max_task_retries=0
            )
            run_workers(job, units, advance, [_Actor(actor, setup) for _ in range(self.actors or _room(needs))])
        finally:
            pull(job.store.path)  # what other nodes have uploaded
            if own:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        # Ray reports its use to its makers unless this is said before a cluster is started
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"at {self.address}" if self.address else "here"
            raise BadOption(f"no Ray cluster can be reached or started {where}: {error}") from error


def ray_for(device: str, address: str | None, actors: int | None, num_gpus: float | None) -> RayEngine:
    if importlib.util.find_spec("ray") is None:
        raise BadOption("--engine ray needs the package ray: pip install 'featurecache[ray]'.")
    if num_gpus and device != "cuda":
        raise BadOption(f"--num-gpus {num_gpus:g} is of actors that compute on one, and the device here is {device}.")
    return RayEngine(address, actors, num_gpus)


def _room(needs: dict[str, float]) -> int:
    """Actors that the nodes have room for by what they have in all."""
    import ray

    wanted = {kind: amount for kind, amount in needs.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(kind, 0) / amount for kind, amount in wanted.items())) for node in nodes)
    if not room:
        what = ", ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
        raise BadOption(
            f"no node of the cluster has {what} for an actor. OMP_NUM_THREADS, before a store's first run, and "
            "--workers make it fewer; --actors N waits for nodes that have them."
        )
    return room


def _is_cancelled() -> bool:
    """Of the call that this actor computes."""
    import ray

    return bool(ray.get_runtime_context().is_canceled())


class _Actor:
    """A worker in an actor; Ray starts it again when it has died."""

    def __init__(self, actor: Any, setup: Any) -> None:
        self._handle, self._setup = actor.remote(_is_cancelled), setup
        self._call: Any = None

    def start(self) -> ShardResult | FeatureCacheError:
        return self._answer(self._handle.start, self._setup)

    def compute(self, units: list[ShardPlan]) -> ShardResult | FeatureCacheError:
        return self._answer(self._handle.compute, units)

    def _answer(self, method: Any, *arguments: Any) -> ShardResult | FeatureCacheError:
        import ray

        try:
            self._call = method.remote(*arguments)
            answer: ShardResult | FeatureCacheError | None = ray.get(self._call)
        except ray.exceptions.RayTaskError:  # a mistake of ours
            raise
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise WorkerLost(" … ".join(dict.fromkeys([lines[0], lines[-1].strip()]))) from error
        if answer is None:
            raise WorkerLost("Ray has started it again")
        return answer

    def stop(self) -> None:
        import ray

        ray.cancel(self._call)

    def close(self) -> None:
        import ray

        ray.kill(self._handle)
