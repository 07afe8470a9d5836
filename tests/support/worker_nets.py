"""A network that takes its time and says which process computes, for tests of workers; and what watches them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from featurecache.extraction.pipeline import ShardPlan
from featurecache.extraction.timings import StageTimings
from featurecache.extraction.workers import ShardResult
from support.user_nets import CNN

BACKBONE = {"backbone": "python:nets:make", "random_weights": True, "outputs": "gap", "batch_size": 2, "workers": 1}
_SAYS = """
        import os, time
        from pathlib import Path
        with open("computed", "a") as log:
            log.write(f"{os.getpid()}\\n")
        time.sleep(float(Path("seconds").read_text()))
"""


def write_slow_net(seconds: float) -> None:
    """nets.py of the current folder: a CNN, of which every pass takes so long."""
    Path("nets.py").write_text(CNN.replace("    def forward(self, x):\n", f"    def forward(self, x):{_SAYS}"))
    Path("seconds").write_text(str(seconds))


def passes_by(driver: int) -> Counter[int]:
    """Passes that each process other than the driver has begun."""
    log = Path("computed")
    lines = log.read_text().split() if log.exists() else []
    return Counter(int(line) for line in lines if int(line) != driver)


def computed_by() -> set[int]:
    """Processes other than this one that have computed."""
    return set(passes_by(os.getpid()))


def shard_bytes(cache: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cache).glob("*/*/*.h5")}


def wait_until(ready: Callable[[], Any], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@contextmanager
def meanwhile(ready: Callable[[], Any], act: Callable[[], Any]) -> Iterator[list[str]]:
    """While the block runs: as soon as it is ``ready``, ``act``; what that raised."""
    errors: list[str] = []

    def watch() -> None:
        try:
            wait_until(ready)
            act()
        except BaseException as error:
            errors.append(repr(error))

    thread = threading.Thread(target=watch)
    thread.start()
    yield errors
    thread.join()
    assert not errors, errors


def kill_a_worker() -> None:
    os.kill(min(computed_by()), signal.SIGKILL)


class CountingWorker:
    """In the place of a `ShardWorker`: notes the rows it is given, in the folder that is its setup."""

    def __init__(self, stops: Callable[[], bool]) -> None: ...

    def start(self, folder: str) -> ShardResult:
        self._file = Path(folder) / f"rows-{os.getpid()}"
        return ShardResult()

    def compute(self, units: list[ShardPlan]) -> ShardResult:
        rows = [row for unit in units for row in unit.rows.tolist()]
        with self._file.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))
        return ShardResult(timings=StageTimings(torch.device("cpu")), images=len(rows))
