"""One extraction from lock to view: compute what is missing, write the view; interruption, failures, drift.

    extraction = prepare("chest/", backbone="vit-in21k")     # reads and compares, computes nothing, writes nothing
    result = extraction.run()                                # shards, then the view

A feature is looked up by (fingerprint, output, digest): the same image in two datasets is computed once, and a run that
was killed continues where its last shard was committed. Before anything is computed the canary says whether this
machine still makes what the store holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones.base import Backbone
from featurecache.errors import BadOption, CacheError, DamagedFile, Drift, SourceError, Stopped, UnreadableImage
from featurecache.extraction import canary
from featurecache.extraction.choose_forward import (
    FirstImages,
    ForwardChoice,
    ForwardSetting,
    choose_for_store,
    is_fixed,
)
from featurecache.extraction.contents import ImageReader, ViewContents, write_view_of
from featurecache.extraction.forward import ForwardRunner, parts_for
from featurecache.extraction.pipeline import (
    Engine,
    ExtractionJob,
    LocalEngine,
    ShardJob,
    derive_shards,
    forward_units,
)
from featurecache.extraction.scan import ScanResult
from featurecache.extraction.timings import StageTimings, measure_again
from featurecache.files.atomic import check_room, file_stamp
from featurecache.files.locks import shared_lock, update_lock
from featurecache.formatting import progress_bar, timed_part
from featurecache.images.augmentation import AugmentationPlan, AugmentedCopies
from featurecache.outputs import Output
from featurecache.sources.base import Dataset, ImageFiles
from featurecache.sources.pseudonyms import Secret
from featurecache.store.remote_cache import pull, push, version_of
from featurecache.store.shards import Layout, RowLocations, notes_for
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import ImageGroups, Store, create_store, generations, missing_outputs

ASK_BYTES = 20 * 10**9  # the command asks before it keeps more than this
ROUNDS = 50  # that others may be quicker with what this run writes too


@dataclass(frozen=True)
class ExtractionResult:
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
    cost: dict[str, Any] | None = None  # what an image costs, in this run or an earlier one: see `Store.cost`

    @property
    def images_per_s(self) -> float:
        return self.computed / self.seconds if self.seconds else 0.0


@dataclass
class Extraction:
    """A prepared extraction: everything is known except the features."""

    dataset: Dataset
    backbone: Backbone
    spec: ExtractionSpec
    name: str
    cache: Path
    device: torch.device
    on_error: str
    workers: int
    batch_size: int | None
    store: Store | None
    contents: ViewContents
    forward: ImageGroups  # groups of images and what a pass must give of them
    derived: ImageGroups  # ... and what follows from stored tokens
    scan: ScanResult  # which sample is which image, and what the cache is to remember of the files
    look: Callable[
        [Store | None, tuple[Output, ...], AugmentedCopies | None], ViewContents
    ]  # at the view that is there by now
    precision_reason: str = ""
    accept_drift: bool = False
    secret: Secret | None = None  # of hashed ids and groups
    forward_way: str = "auto"  # or one of WAYS
    engine: Engine = field(default_factory=LocalEngine)
    choice: ForwardChoice | None = None  # of the forward pass, once it is made
    choosing_s: float = 0.0  # seconds that the choice took, before the run
    _compute: ForwardRunner | None = field(default=None, repr=False)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.contents.outputs

    @property
    def layouts(self) -> dict[str, Layout]:
        return self.contents.layouts

    @property
    def digests(self) -> np.ndarray:
        """[images] S32, and of the copies."""
        return self.contents.digests

    @property
    def copying(self) -> AugmentationPlan | None:
        """The augmented copies."""
        return self.contents.copying

    @property
    def plain(self) -> int:
        """Distinct images, without copies: those with the first numbers."""
        return self.copying.first if self.copying else len(self.digests)

    def counts(self, copies: bool, only: Output | None = None) -> dict[str, int]:
        """Of the distinct images, or of their augmented copies: how many are in the cache, and what the others need;
        for all outputs, or one."""

        def among(groups: ImageGroups) -> int:
            chosen = [rows for rows, outputs in groups if only is None or only in outputs]
            return sum(int(((rows >= self.plain) == copies).sum()) for rows in chosen)

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
        chosen = (self.choice or ForwardChoice()).record()
        if kept := (self.store.plan or {}).get(self.device.type) if self.store else None:
            if self.forward and self.batch_size not in (None, kept["batch_size"]):
                raise BadOption(
                    f"{self.store.path.name} computes in batches of {kept['batch_size']} (its plan.json), "  # type: ignore[union-attr]
                    f"not {self.batch_size}: the same images would get other bits. Leave --batch-size out."
                )
            return {**kept, **({} if is_fixed(kept) else chosen)}
        # On a CPU the activations of 8 images stay in the cache; a small ViT fills it with 32.
        small = 8 if self.backbone.channels_last or self.backbone.parameters > 10e6 else 32
        return {
            "batch_size": self.batch_size or (small if self.device.type == "cpu" else 64),
            "threads": max(1, torch.get_num_threads() // self.engine.share),
            "memory_format": "channels_last" if self.backbone.channels_last else "contiguous",
            **chosen,
        }

    def compute(self) -> ForwardRunner:
        """The forward pass of this store: its way is chosen when it is first asked for."""
        if self._compute is None:
            self._choose(measure=False, images=0)
        assert self._compute is not None
        return self._compute

    @timed_part("choose forward")
    def _choose(self, measure: bool, images: int) -> None:
        plan, start = self.plan, time.perf_counter()
        parts = parts_for([canary.anchor_output(self.backbone), *self.outputs])
        if parts <= set(plan.get("parts", ())):
            parts = set(plan["parts"])  # the graph of the store's first run
        setting = ForwardSetting(
            self.backbone, self.spec.precision, self.device, plan["batch_size"], plan["threads"],
            tuple(sorted(parts)), images,
        )  # fmt: skip
        rows = self._apart(self.forward)[0][0] if self.forward else np.empty(0, np.int64)
        wanted = [output for _, outputs in self.forward for output in outputs]
        with exact_arithmetic(plan["threads"]):
            reader = self._reader()
            first = FirstImages(self.backbone, rows, lambda number: reader.make(number, reader.read(number)))
            self._compute, self.choice = choose_for_store(setting, first, self.store, wanted, measure, self.forward_way)
        if self._compute.batch_size != plan["batch_size"]:  # for want of memory
            self.batch_size = self._compute.batch_size
        self.choosing_s += time.perf_counter() - start

    @exact_arithmetic()
    def estimate(self, measure: bool = True) -> float | None:
        """Images per second of the forward pass, on the first batches of the job, which are not computed again. None
        where so little is to be computed that it is not worth a look. ``measure``: other ways too, in a long job."""
        if self._compute is None and self.forward:
            self._choose(measure, self.to_compute)
        return self.choice.images_per_s if self.choice else None

    def check_disk(self) -> None:
        """Refuse what the disk cannot hold."""
        if self.new_bytes:
            way = "Keep fewer outputs (--outputs), or choose another disk with --cache."
            check_room(self.cache, int(self.new_bytes * 1.01) + (1 << 20), way)

    @exact_arithmetic()
    def run(self, *, progress: bool = False, rate: float | None = None) -> ExtractionResult:
        """Compute what is missing, then write the view. ``rate`` (images/s) sizes the shards; probed when not given.

        Raises Drift when this machine computes other features than the store holds, unless that was accepted.
        """
        self.check_disk()
        if self.secret:
            self.secret.keep()
        self.scan.files.save()
        try:
            return self._run(progress, rate)
        except Drift:
            if not self.accept_drift:
                raise
        self._next_generation()
        self.check_disk()
        return self._run(progress, rate)

    def _run(self, progress: bool, rate: float | None) -> ExtractionResult:
        start = time.perf_counter() - self.choosing_s
        if (store := self.store) is None:
            made_of = {"backbone": self.backbone.name, "parameters": self.backbone.parameters}
            store = create_store(self.cache, self.backbone.name, self.spec, {**self.backbone.provenance, **made_of})
        store.sweep()
        jobs, derived = list[ShardJob](), 0
        with shared_lock(store.path, "extract"):
            for _ in range(ROUNDS):
                pull(store.path)
                self._turn_to(self.spec, store)  # another process may have been here since the images were scanned
                plan = self._fix_plan(rate)
                self.check_canary(write=True)
                agreed = push(store.path)
                kept = (store.plan or {}).get(self.device.type, plan) if self.forward else plan
                if not agreed or any(kept.get(key) != plan.get(key) for key in ("batch_size", "threads", "forward")):
                    self._compute = self.choice = None  # another machine's plan was first: on with that one
                    continue
                done = self._compute_missing(plan, progress)
                jobs += done
                derived += self.to_derive
                view = store.path / f"{self.name}.h5"
                with timed_part("view"), update_lock(store.path):  # of two the second keeps what the first wrote
                    made_from = {view: version_of(view)}
                    if file_stamp(view) == self.contents.stamp:
                        failures = done[0].failures if done else {}
                        written = write_view_of(self.contents, store, self.name, self.dataset, self.scan, failures)
                        if push(store.path, made_from):
                            break
            else:
                told = f"others were quicker {ROUNDS} times with what this run writes: give the same command later"
                raise CacheError(f"{store.path}: {told}.")
        timings = [job.timings for job in jobs if isinstance(job, ExtractionJob)]
        if not any(each.images for each in timings) and store.cost_of_busy(self.device.type):
            again = measure_again(self.compute(), self.device, self.backbone.image_size, self.outputs, plan["threads"])
            store.write_cost(self.device.type, self.name, again)
            push(store.path)
        timings = timings or [StageTimings(self.device)]
        names, computed = tuple(output.name for output in self.outputs), sum(each.images for each in timings)
        path, images, copies, failed = written
        return ExtractionResult(
            path, names, images, computed, derived, time.perf_counter() - start, timings[0].shares(), failed, copies,
            store.cost(self.name),
        )  # fmt: skip

    @timed_part("compute")
    def _compute_missing(self, plan: dict[str, Any], progress: bool) -> list[ShardJob]:
        """Write the shards that are missing; what was done, where anything was. Raises Stopped and, under ``--on-error
        fail``, SourceError."""
        assert self.store is not None
        if not self.to_compute and not self.to_derive:
            return []
        done = {**plan, "forward": self.compute().way} if self.forward else plan
        notes = notes_for(self.spec.fingerprint, self.device.type, done)
        job = ShardJob(self.store, self.layouts, self.digests, notes)  # what follows from tokens needs no network
        if self.forward:
            self.compute().release()
            reader, images = self._reader(), self.dataset.images
            job = ExtractionJob(
                self.store, self.layouts, self.digests, notes, read=reader.read, make=reader.make,
                preprocess=self.backbone.preprocess, compute=self.compute(), workers=self.workers,
                threads=plan["threads"], fail_fast=self.on_error == "fail", plain=self.plain,
                images_per_s=plan.get("images_per_s"), data=images.address if isinstance(images, ImageFiles) else "",
            )  # fmt: skip
        try:
            self._write_shards(job, plan, progress)
        except KeyboardInterrupt as error:
            self._keep_timings(job)
            safe = sum(int(self.locate(o).mask.sum()) for o in self.outputs[:1])
            what = "images and augmented copies" if self.copying else "images"
            raise Stopped(f"stopped. {safe:,} {what} are safe; the same command continues.") from error
        except UnreadableImage as error:
            number, reason = next(iter(job.failures.items()))
            image = self.dataset.shown(int(self.contents.images[number]))
            raise SourceError(f"{image}: {reason} (--on-error report goes on without it)") from error
        self._keep_timings(job)
        return [job]

    def _keep_timings(self, job: ShardJob) -> None:
        if isinstance(job, ExtractionJob) and (measured := job.timings.record()):
            job.store.write_cost(self.device.type, self.name, measured)

    def _write_shards(self, job: ShardJob, plan: dict[str, Any], progress: bool) -> None:
        """Raises UnreadableImage under ``--on-error fail``."""
        with progress_bar(self.to_compute + self.to_derive, progress) as bar:
            derive_shards(job, self._apart(self.derived), bar.update)
            if isinstance(job, ExtractionJob):
                timings = job.timings

                def advance(images: int) -> None:
                    stage, share = max(timings.shares().items(), key=lambda each: each[1])
                    bar.set_postfix_str(f"{100 * share:.0f} % {stage}", refresh=False)
                    bar.update(images)

                self.engine.run(job, forward_units(self._apart(self.forward), self.layouts, plan), advance)
        if job.failures and self.on_error == "fail":  # seen by the writer, behind the last batch
            raise UnreadableImage(next(iter(job.failures.values())))

    def check_canary(self, *, write: bool) -> None:
        """Before anything is written: does this machine compute what the store holds? Raises Drift."""
        wanted = list(dict.fromkeys(output for _, outputs in self.forward + self.derived for output in outputs))
        if self.store is not None and wanted:
            compute = self.compute() if self.forward else None
            with exact_arithmetic(self.plan["threads"]):
                canary.check_canary(self.store, self.backbone, compute, wanted, write=write)

    def _next_generation(self) -> None:
        """Turn to the generation of the store that agrees with this machine; to a new one where none does."""
        stores, agreeing = generations(self.cache, self.spec), None
        with exact_arithmetic(self.plan["threads"]):
            for store in reversed(stores):
                with contextlib.suppress(Drift, DamagedFile):
                    canary.check_canary(store, self.backbone, self.compute(), [], write=False)
                    if canary.read_canary(store) is not None:
                        agreeing = store
                        break
        newest = max([self.spec.generation, *(store.spec.generation for store in stores)])
        self._turn_to(agreeing.spec if agreeing else replace(self.spec, generation=newest + 1), agreeing)

    def _turn_to(self, spec: ExtractionSpec, store: Store | None) -> None:
        self.spec, self.store = spec, store
        self.contents = self.look(store, self.outputs, self.copying.augmented if self.copying else None)
        self.forward, self.derived = missing_outputs(self.outputs, self.layouts, store, self.digests)

    def _fix_plan(self, rate: float | None) -> dict[str, Any]:
        assert self.store is not None
        plan = self.plan
        if not self.forward:
            return plan
        speed = self.estimate()
        plan = self.plan
        if "images_per_s" not in plan and (speed := rate or speed):
            plan["images_per_s"] = round(speed, 3)
        fixed = self.store.write_plan(self.device.type, plan)  # another process may have been first
        if any(fixed.get(key) != plan[key] for key in ("batch_size", "forward")):
            self._compute = self.choice = None
        return fixed

    def _reader(self) -> ImageReader:
        dataset = self.dataset
        return ImageReader(dataset.images, dataset.reading, self.contents.images, self.digests, self.copying)

    def _apart(self, groups: ImageGroups) -> ImageGroups:
        """Images and copies in shards of their own: those of the images are the same with copies and without."""
        parts = [
            (rows[(rows >= self.plain) == copies], outputs) for rows, outputs in groups for copies in (False, True)
        ]
        return [(part, outputs) for part, outputs in parts if len(part)]

    def locate(self, output: Output) -> RowLocations:
        assert self.store is not None
        return self.store.locate(self.layouts[output.name], self.digests)
