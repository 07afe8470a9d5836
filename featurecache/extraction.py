"""Extraction: what is asked for, what is there already, and computing the difference.

    extraction = prepare("chest/", backbone="vit-in21k")     # looks, computes nothing, writes nothing
    result = extraction.run()                                # shards, then the view

A feature is looked up by (fingerprint, output, digest): the same image in two datasets is computed once, and a run that
was killed continues where its last shard was committed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from featurecache import canary
from featurecache.amounts import progress_bar, size_text
from featurecache.augment import Augmented, Copying
from featurecache.backbones import Backbone
from featurecache.costs import cost_of, keep_cost
from featurecache.engines import Clock, Job, Unit, derive_units, run_local
from featurecache.errors import (
    BadOption,
    CannotWrite,
    Drift,
    SourceError,
    Stopped,
    UnreadableImage,
)
from featurecache.forward import Compute, exact_arithmetic
from featurecache.locks import working
from featurecache.missing import difference, shard_rows
from featurecache.outputs import Output, parse
from featurecache.privacy import Secret
from featurecache.shards import Layout, Located, notes_for
from featurecache.sources import Dataset
from featurecache.spec import ExtractionSpec
from featurecache.stores import Store, create_store, stores
from featurecache.viewing import write_view_of

if TYPE_CHECKING:
    from featurecache.looking import Looked

ASK_BYTES = 20 * 10**9  # the command asks before it keeps more than this


@dataclass(frozen=True)
class Result:
    """What an extraction did. ``failed``: [(id, reason)] of samples that are not in the view."""

    view: Path
    outputs: tuple[str, ...]
    images: int  # samples in the view
    computed: int  # distinct images and copies that went through the backbone in this run
    derived: int  # distinct images of which only functions of stored tokens were computed
    seconds: float
    shares: dict[str, float]
    failed: list[tuple[str, str]]
    copies: int = 0  # augmented copies in the view, beside the images
    cost: dict[str, Any] | None = None  # what an image costs, in this run or an earlier one: see `View.cost`

    @property
    def images_per_s(self) -> float:
        return self.computed / self.seconds if self.seconds else 0.0


@dataclass
class Extraction:
    """A prepared extraction: everything is known except the features."""

    dataset: Dataset
    backbone: Backbone
    spec: ExtractionSpec
    outputs: tuple[Output, ...]
    name: str
    cache: Path
    device: torch.device
    on_error: str
    workers: int
    batch_size: int | None
    store: Store | None
    images: np.ndarray  # [images] first sample of each distinct image; then the same for the augmented copies
    digests: np.ndarray  # [images] S32, and of the copies
    sample_image: np.ndarray  # [N] number of the distinct image, -1 where the file could not be read
    unread: dict[int, str]  # sample → reason
    layouts: dict[str, Layout]
    forward: list[tuple[np.ndarray, tuple[Output, ...]]]  # groups of images and what a pass must give of them
    derived: list[tuple[np.ndarray, tuple[Output, ...]]]  # ... and what follows from stored tokens
    precision_reason: str = ""
    accept_drift: bool = False
    looked: Looked | None = None  # what of it the cache is to remember
    secret: Secret | None = None  # of hashed ids and groups
    copying: Copying | None = None  # the augmented copies
    kept: Augmented | None = None  # those that the view of this name has
    _compute: Compute | None = field(default=None, repr=False)

    @property
    def plain(self) -> int:
        """Distinct images, without copies: those with the first numbers."""
        return self.copying.first if self.copying else len(self.digests)

    def counts(self, copies: bool) -> dict[str, int]:
        """Of the distinct images, or of their augmented copies: how many are in the cache, and what the others need."""

        def among(groups: list[tuple[np.ndarray, tuple[Output, ...]]]) -> int:
            return sum(int(((rows >= self.plain) == copies).sum()) for rows, _ in groups)

        all_ = len(self.digests) - self.plain if copies else self.plain
        compute, derive = among(self.forward), among(self.derived)
        return {"in_cache": all_ - compute - derive, "to_compute": compute, "to_derive": derive}

    @property
    def to_compute(self) -> int:
        """Distinct images and copies that need the backbone."""
        return sum(len(rows) for rows, _ in self.forward)

    @property
    def to_derive(self) -> int:
        return sum(len(rows) for rows, _ in self.derived)

    def bytes_of(self, names: Iterable[str] | None = None) -> int:
        """What the outputs take on the disk for all distinct images and copies, stored already or not."""
        wanted = [o.name for o in self.outputs] if names is None else names
        return sum(self.layouts[name].row_bytes for name in wanted) * len(self.digests)

    @property
    def new_bytes(self) -> int:
        groups = self.forward + self.derived
        return sum(len(rows) * sum(self.layouts[o.name].row_bytes for o in outputs) for rows, outputs in groups)

    @property
    def plan(self) -> dict[str, Any]:
        """How this store computes on this kind of device; fixed by its first run."""
        kept = (self.store.plan or {}).get(self.device.type) if self.store else None
        if kept:
            if self.forward and self.batch_size not in (None, kept["batch_size"]):
                raise BadOption(
                    f"{self.store.path.name} computes in batches of {kept['batch_size']} (its plan.json), "  # type: ignore[union-attr]
                    f"not {self.batch_size}: the same images would get other bits. Leave --batch-size out."
                )
            return dict(kept)
        size = self.batch_size or default_batch(self.backbone, self.device)
        return {
            "batch_size": size,
            "threads": torch.get_num_threads(),
            "memory_format": "channels_last" if self.backbone.channels_last else "contiguous",
            "forward": "library",
        }

    def compute(self) -> Compute:
        if self._compute is None:
            self._compute = Compute(self.backbone, self.spec.precision, self.device, self.plan["batch_size"])
        return self._compute

    def rate(self) -> float:
        """Images per second of the forward pass, by a short probe."""
        outputs = {output for _, outputs in self.forward for output in outputs} or {parse("tokens")}
        with exact_arithmetic(self.plan["threads"]):
            return self.plan["batch_size"] / self.compute().seconds_per_batch(sorted(outputs, key=str))

    def estimate(self) -> float | None:
        """`rate`, or None where so little is to be computed that the probe would take as long as the work."""
        return self.rate() if self.to_compute > 4 * self.plan["batch_size"] else None

    def check_disk(self) -> None:
        """Refuse what the disk cannot hold."""
        folder = self.cache
        while not folder.exists():
            folder = folder.absolute().parent
        free, needed = shutil.disk_usage(folder).free, int(self.new_bytes * 1.01) + (1 << 20)
        if self.new_bytes and needed > free:
            raise CannotWrite(
                28, f"{size_text(self.new_bytes)} are to be written and {folder} has {size_text(free)} free. "
                "Keep fewer outputs (--outputs), or choose another disk with --cache.",
            )  # fmt: skip

    def run(self, *, progress: bool = False, rate: float | None = None) -> Result:
        """Compute what is missing, then write the view. ``rate`` (images/s) sizes the shards; probed when not given.

        Raises Drift when this machine computes other features than the store holds, unless that was accepted.
        """
        self.check_disk()
        if self.secret:
            self.secret.keep()
        if self.looked:
            self.looked.seen.keep()
        try:
            return self._run(progress, rate)
        except Drift:
            if not self.accept_drift:
                raise
        self._next_generation()
        self.check_disk()
        return self._run(progress, rate)

    def _run(self, progress: bool, rate: float | None) -> Result:
        start = time.perf_counter()
        store = self._open_store()
        store.sweep()
        with working(store.path, "extract"):
            self._turn_to(self.spec, store)  # another process may have been here since the images were looked at
            plan, clock = self._fix_plan(rate), Clock()
            self._check_canary()
            failures: dict[int, str] = {}
            job: Job | None = None
            bar = progress_bar(self.to_compute + self.to_derive, progress)
            try:
                if self.to_compute or self.to_derive:
                    job = self._job(plan)
                    failures = job.failures
                    derive_units(job, self._derive_units(), lambda n, _: bar.update(n))
                    if self.forward:
                        clock = run_local(job, self._units(plan), lambda n, clock: _advance(bar, n, clock))
                    if failures and self.on_error == "fail":  # found by the writer, behind the last batch
                        raise UnreadableImage(next(iter(failures.values())))
            except KeyboardInterrupt as error:
                self._keep_cost(job, plan)
                safe = sum(int(self.locate(o).found.sum()) for o in self.outputs[:1])
                what = "images and copies" if self.copying else "images"
                raise Stopped(f"stopped. {safe:,} {what} are safe; the same command continues.") from error
            except UnreadableImage as error:
                raise SourceError(f"{self._first_failure(failures)} (--on-error report goes on without it)") from error
            finally:
                bar.close()
            self._keep_cost(job, plan)
            path, images, copies, failed = write_view_of(self, failures)
        seconds = time.perf_counter() - start
        names = tuple(output.name for output in self.outputs)
        return Result(
            path, names, images, clock.images, self.to_derive, seconds, clock.shares(), failed, copies,
            cost_of(store.path, self.name),
        )  # fmt: skip

    def _open_store(self) -> Store:
        if self.store is None:
            made_of = {"backbone": self.backbone.name, "parameters": self.backbone.parameters}
            provenance = {**self.backbone.provenance, **made_of}
            self.store = create_store(self.cache, self.backbone.name, self.spec, provenance)
        return self.store

    def _check_canary(self) -> None:
        """Before anything is written: does this machine compute what the store holds?"""
        assert self.store is not None
        wanted = [output for _, outputs in self.forward + self.derived for output in outputs]
        if not wanted:
            return
        compute = self.compute() if self.forward else None
        with exact_arithmetic(self.plan["threads"]):
            canary.check(self.store, self.backbone, compute, list(dict.fromkeys(wanted)))

    def _next_generation(self) -> None:
        """Turn to the generation of the store that agrees with this machine; to a new one where none does."""
        generation = self.spec.generation
        plain = replace(self.spec, generation=0)
        known = [store for store in stores(self.cache) if replace(store.spec, generation=0) == plain]
        with exact_arithmetic(self.plan["threads"]):
            for store in sorted(known, key=lambda store: -store.spec.generation):
                generation = max(generation, store.spec.generation)
                if canary.agrees(store, self.backbone, self.compute()):
                    self._turn_to(store.spec, store)
                    return
        self._turn_to(replace(self.spec, generation=generation + 1), None)

    def _turn_to(self, spec: ExtractionSpec, store: Store | None) -> None:
        self.spec, self.store = spec, store
        self.forward, self.derived = difference(self.outputs, self.layouts, store, self.digests)

    def _fix_plan(self, rate: float | None) -> dict[str, Any]:
        assert self.store is not None
        plan = self.plan
        if not self.forward:
            return plan
        if "images_per_s" not in plan and (speed := rate or self.estimate()):
            plan["images_per_s"] = round(speed, 3)
        plan = self.store.write_plan(self.device.type, plan)  # another process may have been first
        if self._compute is not None and self._compute.batch_size != plan["batch_size"]:
            self._compute = None
        return plan

    def _job(self, plan: dict[str, Any]) -> Job:
        assert self.store is not None
        first = self.images
        return Job(
            self.store, self.layouts, self.digests, lambda number: self.dataset.read(int(first[number])),
            self.backbone, self.compute(), notes_for(self.spec.fingerprint, self.device.type, plan), self.workers,
            plan["threads"], self.on_error == "fail", self.copying,
        )  # fmt: skip

    def _units(self, plan: dict[str, Any]) -> list[Unit]:
        units = []
        for rows, outputs in self._apart(self.forward):
            row_bytes = max(self.layouts[output.name].row_bytes for output in outputs)
            length = shard_rows(len(rows), row_bytes, plan.get("images_per_s"), plan["batch_size"])
            units += [Unit(rows[start : start + length], outputs) for start in range(0, len(rows), length)]
        return units

    def _apart(
        self, groups: list[tuple[np.ndarray, tuple[Output, ...]]]
    ) -> Iterator[tuple[np.ndarray, tuple[Output, ...]]]:
        """Images and copies in shards of their own: those of the images are the same with copies and without."""
        for rows, outputs in groups:
            for part in (rows[rows < self.plain], rows[rows >= self.plain]):
                if len(part):
                    yield part, outputs

    def _derive_units(self) -> list[tuple[Unit, dict[str, Located]]]:
        units = []
        for rows, outputs in self._apart(self.derived):
            row_bytes = max(self.layouts[output.name].row_bytes for output in outputs)
            length = shard_rows(len(rows), row_bytes)
            found = {source: self.locate(parse(source), rows) for source in {output.source for output in outputs}}
            for start in range(0, len(rows), length):
                part = slice(start, start + length)
                places = {key: all_[part] for key, all_ in found.items()}
                units.append((Unit(rows[part], outputs), places))
        return units

    def locate(self, output: Output, rows: np.ndarray | None = None) -> Located:
        assert self.store is not None
        digests = self.digests if rows is None else self.digests[rows]
        return self.store.locate(self.layouts[output.name], digests)

    def _keep_cost(self, job: Job | None, plan: dict[str, Any]) -> None:
        """Before the view is written: a view that is there has its cost beside it."""
        if job is not None:
            keep_cost(job.store.path, self.name, job.measured.record(self.spec.precision, plan["threads"]))

    def _first_failure(self, failures: dict[int, str]) -> str:
        number, reason = next(iter(failures.items()))
        return f"{self.dataset.shown(int(self.images[number]))}: {reason}"


def _advance(bar: tqdm, images: int, clock: Clock) -> None:
    bar.set_postfix_str("  ".join(f"{key} {share:.0%}" for key, share in clock.shares().items()), refresh=False)
    bar.update(images)


def default_batch(backbone: Backbone, device: torch.device) -> int:
    """Rows of a forward pass. On a CPU the activations of 8 images stay in the cache; a small ViT fills it with 32."""
    if device.type != "cpu":
        return 64
    return 8 if backbone.channels_last or backbone.parameters > 10e6 else 32
