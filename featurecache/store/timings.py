"""What an image costs: milliseconds of the forward pass and of loading, as extractions measured them.

    cost.json in a store: {"store": {...}, "views": {"chest": {...}}}, each {"forward_ms", "loading_ms", "device",
    "precision", "threads", "images"}

Both are medians of what an extraction really did, on its own clock: `forward_ms` of the batches (normalising, the
network, rounding; per row of the B that every pass computes), `loading_ms` of the images (reading, decoding, resizing,
one decode thread; copies, which are made and not loaded, do not count). Of several runs the one that computed the most
images is kept. It lies beside the views and not in them: the same images give the same files, whatever a run took.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featurecache.errors import CacheError
from featurecache.files.atomic import write_whole
from featurecache.files.locks import update_lock
from featurecache.files.records import read_checked_json, refuse_broken, write_checked_json
from featurecache.formatting import milliseconds

NAME = "cost.json"
LAST = 1 << 16  # so many batches and images the medians are of, the last ones
_FIELDS: dict[str, type] = {
    "forward_ms": float, "loading_ms": float, "device": str, "precision": str, "threads": int, "images": int,
}  # fmt: skip


@dataclass
class Measured:
    """Seconds of one run: of forward passes over ``batch`` rows, and of loading an image."""

    device: torch.device
    batch: int
    images: int = 0  # that were computed
    passes: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))  # filled by the decode threads
    _pending: deque[tuple[Any, Any]] = field(default_factory=deque)  # events of a GPU, which runs behind

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass; of an accelerator its own time, not that of handing over the work."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                yield
                events[1].record()
            self._pending.append(events)
            self._settle(keep=64)
            return
        start = time.perf_counter()
        yield
        if self.device.type == "mps":
            torch.mps.synchronize()
        self.passes.append(time.perf_counter() - start)

    def _settle(self, keep: int = 0) -> None:
        while len(self._pending) > keep:
            begin, end = self._pending.popleft()
            end.synchronize()
            self.passes.append(begin.elapsed_time(end) / 1000)

    def record(self, precision: str, threads: int) -> dict[str, Any] | None:
        """What is kept of it; None where nothing was computed."""
        self._settle()
        if not self.passes:
            return None
        loading = 1000 * statistics.median(self.loads) if self.loads else None
        return {
            "forward_ms": 1000 * statistics.median(self.passes) / self.batch,
            "loading_ms": loading,
            "device": device_title(self.device),
            "precision": precision,
            "threads": threads if self.device.type == "cpu" else None,
            "images": self.images,
        }


def device_title(device: torch.device | str) -> str:
    """What a person calls it: the name of the GPU, or of the processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor()
    return name if device.type == "cpu" else f"{name} ({device.type})"


def _processor() -> str:
    """Linux names it in /proc/cpuinfo, other systems by `platform`."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "CPU"


def read_costs(store: Path) -> dict[str, Any]:
    """{"store": record or None, "views": {name: record}}; empty where nothing was measured. Raises CacheError."""
    path = store / NAME
    if not os.path.lexists(path):
        return {"store": None, "views": {}}
    found, intact = read_checked_json(path)
    views = found.get("views")
    records = [found.get("store"), *(views.values() if isinstance(views, dict) else [0])]
    if not intact:
        raise refuse_broken(path)
    if set(found) != {"store", "views"} or not all(record is None or _fine(record) for record in records):
        raise CacheError(f"{path} is no record of what images cost. Delete it; the next extraction measures anew.")
    return found


def _fine(record: Any) -> bool:
    if not isinstance(record, dict) or set(record) != set(_FIELDS):
        return False
    for key, kind in _FIELDS.items():
        value = record[key]
        if value is None and key in ("loading_ms", "threads"):
            continue
        if type(value) is not kind or (kind is not str and not 0 <= record[key] < math.inf):
            return False
    return True


def keep_cost(store: Path, view: str, record: dict[str, Any] | None) -> None:
    """Put a run's figures beside the views, unless those of a run that computed more images are there."""
    if record is None:
        return
    with update_lock(store):
        try:
            known = read_costs(store)
        except CacheError:  # measured anew
            known = {"store": None, "views": {}}
        if _more(record, known["store"]):
            known["store"] = record
        if _more(record, known["views"].get(view)):
            known["views"][view] = record
        write_whole(store / NAME, write_checked_json(known), inside=store)


def _more(record: dict[str, Any], known: dict[str, Any] | None) -> bool:
    return known is None or record["images"] >= known["images"]


def cost_of(store: Path, view: str) -> dict[str, Any] | None:
    """What an image of a view costs: measured when it was extracted; of a view whose images were all there already the
    store's forward pass, without loading. None: never measured. Raises CacheError."""
    known = read_costs(store)
    found = known["views"].get(view)
    if found is None and known["store"] is not None:
        found = {**known["store"], "loading_ms": None}
    return None if found is None else {key: value for key, value in found.items() if key != "images"}


def move_cost(source: Path, view: str, store: Path, name: str) -> None:
    """Take over what was measured for a view of another cache's store."""
    keep_cost(store, name, read_costs(source)["views"].get(view))


def forget_cost(store: Path, view: str | None = None) -> None:
    """Of a view that is gone, or of all of a store."""
    with update_lock(store):
        if view is None:
            (store / NAME).unlink(missing_ok=True)
            return
        try:
            known = read_costs(store)
        except CacheError:  # verify says so, repair mends it
            return
        if known["views"].pop(view, None) is not None:
            write_whole(store / NAME, write_checked_json(known), inside=store)


def cost_line(cost: dict[str, Any] | None) -> str:
    """One line for people: ``12.3 ms/image forward (AMD EPYC, 2 threads, fp32), 0.81 ms loading``."""
    if cost is None:
        return "not measured"
    threads = "" if cost["threads"] is None else f", {cost['threads']} thread{'s' if cost['threads'] != 1 else ''}"
    loading = "loading not measured" if cost["loading_ms"] is None else f"{milliseconds(cost['loading_ms'])} ms loading"
    made = f"{cost['device']}{threads}, {cost['precision']}"
    return f"{milliseconds(cost['forward_ms'])} ms/image forward ({made}), {loading}"
