"""What faults are made in: operations on a small cache, the state each begins with, and what it gives undisturbed."""

from __future__ import annotations

import atexit
import functools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from support.forks import Answer, Forks, shared
from support.plant import flip

IMAGES = 8  # in shards of four and batches of four
Views = dict[str, Any]  # name → rows


@dataclass(frozen=True)
class Scenario:
    """An operation. ``states``: what the views may show after it was killed; ``result``: what they show at its end."""

    job: str
    arguments: dict[str, Any]
    start: Path | None
    states: tuple[Views, ...]
    result: Views
    events: list[tuple[str, str, str]] = field(default_factory=list, repr=False)  # of an undisturbed run
    seconds: float = 0.0
    damaged: bool = False  # it begins with damaged files
    records: list[Any] = field(default_factory=list, repr=False)  # plan and reference at its end

    @property
    def end(self) -> dict[str, Any]:
        return {"views": self.result, "damaged": [], "records": self.records}

    def on(self, cache: Path, **more: Any) -> dict[str, Any]:
        return {**self.arguments, "cache": cache, "copy_of": self.start, **more}

    def again(self, cache: Path) -> dict[str, Any]:
        return {"job": self.job, **self.arguments, "cache": cache}

    def kinds(self) -> dict[str, list[int]]:
        """Events by the call and the kind of file it is made for."""
        found: dict[str, list[int]] = {}
        for number, (call, place, source) in enumerate(self.events):
            plain = [re.sub(r"\.[0-9a-f]{16}\.[0-9a-f]{8}\.tmp", "DRAFT", name) for name in (place, source)]
            plain = [re.sub(r"-[0-9a-f]{8}\b|[0-9a-f]{16,}|\b(cls|tokens|mean)\b", "…", name) for name in plain]
            found.setdefault(" ".join([call, *plain]), []).append(number)
        return found

    def one_of_each_kind(self, seed: int, most: int) -> list[int]:
        rng = random.Random(seed)
        points = [rng.choice(numbers) for numbers in self.kinds().values()]
        return sorted(rng.sample(points, min(most, len(points))))


class Home:
    """A backbone, images, and the caches that operations begin with; made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.forks = folder, shared()
        self.forks.done("make", home=folder, images=IMAGES)
        self.extract = {"backbone": folder / "vit", "data": folder / "data"}
        self.grow = {"backbone": folder / "vit", "data": folder / "grown", "outputs": "cls,tokens,mean"}
        self.cache, self.grown = folder / "cache", folder / "both"
        self.forks.done("extract", cache=self.cache, **self.extract)
        self.forks.done("extract", cache=self.grown, copy_of=self.cache, **self.grow)
        self.rows: Views = self.forks.done("read", cache=self.cache)
        self.grown_rows: Views = self.forks.done("read", cache=self.grown)

    @functools.cache  # noqa: B019  (there is one)
    def scenario(self, name: str) -> Scenario:
        return getattr(self, f"_{name}")()

    def _new(self) -> Scenario:
        return self._measured(Scenario("extract", self.extract, None, ({}, self.rows), self.rows))

    def _grow(self) -> Scenario:
        """More images, one less, one renamed, one output more: old rows stay, the view is replaced."""
        states = (self.rows, self.grown_rows)
        return self._measured(Scenario("extract", self.grow, self.cache, states, self.grown_rows))

    def _mend(self) -> Scenario:
        """One row flipped, one file cut in its head, one gone; plan and reference damaged too."""
        start = self.folder / "damaged"
        self.forks.done("copy", start=self.grown, cache=start)
        cls, tokens = (sorted(start.glob(f"*/{output}/*.h5")) for output in ("cls", "tokens"))
        flip(tokens[0], tokens[0].stat().st_size - 300)
        tokens[1].unlink()
        cls[0].write_bytes(cls[0].read_bytes()[:200])
        records = self.forks.done("records", cache=start)
        for name, place in (("canary.safetensors", -3), ("plan.json", 20)):
            (path,) = start.glob(f"*/{name}")
            flip(path, place)
        scenario = self._measured(Scenario("mend", {}, start, (), self.grown_rows, damaged=True))
        assert scenario.records == records  # the plan and the reference came back
        return scenario

    def _compact(self) -> Scenario:
        rows = self.grown_rows
        return self._measured(Scenario("compact", {"name": "set"}, self.grown, (rows,), rows))

    def _gc(self) -> Scenario:
        """Rows of a view that is gone, in shards of their own and among others."""
        start = self.folder / "littered"
        self.forks.done("extract", cache=start, copy_of=self.grown, **self.extract, outputs="cls")
        rows = self.forks.done("read", cache=start)
        return self._measured(Scenario("gc", {}, start, (rows,), rows))

    def _merge(self) -> Scenario:
        rows = self.grown_rows
        return self._measured(Scenario("merge", {"other": self.grown}, None, ({}, rows), rows))

    def _remove(self) -> Scenario:
        return self._measured(Scenario("remove", {"name": "set"}, self.cache, (self.rows, {}), {}))

    def _measured(self, scenario: Scenario) -> Scenario:
        cache = self.folder / f"measured-{scenario.job}-{len(list(self.folder.iterdir()))}"
        answer = self.forks.run(scenario.job, fault={}, **scenario.on(cache))
        assert answer.code == 0 and answer.error is None, answer
        found = self.forks.done("state", cache=cache)
        assert (found["views"], found["damaged"]) == (scenario.result, [])
        events = [tuple(event) for event in answer.events]
        return replace(scenario, events=events, seconds=answer.seconds, records=found["records"])  # type: ignore[arg-type]


def scratch_folder() -> Path:
    """A new folder in memory, where there is room."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    return Path(tempfile.mkdtemp(prefix="featurecache-faults-", dir=memory if roomy else None))


@functools.cache
def home() -> Home:
    folder = scratch_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Home(folder)


def disturbed(forks: Forks, scenario: Scenario, folder: Path, faults: Iterable[dict[str, Any]]) -> list[Answer]:
    """The operation with each of the faults (``fault`` or ``after``), in caches ``folder/0``, ``folder/1``, …"""
    return forks.all(scenario.job, [scenario.on(folder / str(k), **fault) for k, fault in enumerate(faults)])


def all_is_well_after(forks: Forks, scenario: Scenario, folder: Path, caches: Iterable[int]) -> None:
    """After each fault: nothing committed is lost, nothing wrong is readable, the same command completes, the result
    is that of an undisturbed run, and nothing lies about."""
    numbers = list(caches)
    answers = forks.all("after", [scenario.again(folder / str(number)) for number in numbers])
    for number, answer in zip(numbers, answers, strict=True):
        where = (scenario.job, number, scenario.events[number : number + 1])
        assert answer.code == 0 and answer.error is None, (where, answer)
        found = answer.value
        check_before(scenario, found["before"], where)
        assert found["after"] == scenario.end, where
        assert found["left"] == [] or scenario.job == "remove", where  # removed before: nobody was there to clear up
        if scenario.job == "extract":
            assert found["changed"] == [], where


def check_before(scenario: Scenario, before: dict[str, Any], where: object) -> None:
    views = before["views"]
    if not scenario.damaged:
        assert views in scenario.states, (where, views)
        assert before["damaged"] == [], (where, before["damaged"])
        return
    for name, rows in views.items():
        assert rows == scenario.result[name] or "DamagedFile" in rows or "CacheError" in rows, (where, rows)
