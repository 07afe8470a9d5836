"""Extraction: what is asked for, what is there already, and computing the difference.

    extraction = prepare("chest/", backbone="vit-in21k")     # looks, computes nothing, writes nothing
    result = extraction.run()                                # shards, then the view

A feature is looked up by (fingerprint, output, digest): the same image in two datasets is computed once, and a run that
was killed continues where its last shard was committed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from featurecache.backbones import Backbone
from featurecache.engines import Clock, Job, Unit, derive_units, run_local
from featurecache.errors import BadOption, CannotWrite, FeatureCacheError, SourceError, UnreadableImage
from featurecache.files import FORMAT
from featurecache.forward import Compute, exact_arithmetic
from featurecache.outputs import Output, parse
from featurecache.shards import Layout, Located, notes_for
from featurecache.sources import Dataset
from featurecache.spec import ExtractionSpec, canonical_json
from featurecache.stores import Store, create_store
from featurecache.views import Rows, write_view

SHARD_BYTES, SHARD_ROWS = 256 << 20, 16_384
MOST_BYTES, MOST_SHARDS = 4 << 30, 500  # a shard grows up to MOST_BYTES so that an output has at most about MOST_SHARDS
SHARD_SECONDS = 120.0  # on a slow machine: what a kill may cost
ASK_BYTES = 20 * 10**9  # the command asks before it keeps more than this


class Stopped(FeatureCacheError):
    """Ctrl-C; what was computed is committed."""


@dataclass(frozen=True)
class Result:
    """What an extraction did. ``failed``: [(id, reason)] of samples that are not in the view."""

    view: Path
    outputs: tuple[str, ...]
    images: int  # samples in the view
    computed: int  # distinct images that went through the backbone in this run
    derived: int  # distinct images of which only functions of stored tokens were computed
    seconds: float
    shares: dict[str, float]
    failed: list[tuple[str, str]]

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
    images: np.ndarray  # [images] first sample of each distinct image
    digests: np.ndarray  # [images] S32
    sample_image: np.ndarray  # [N] number of the distinct image, -1 where the file could not be read
    unread: dict[int, str]  # sample → reason
    layouts: dict[str, Layout]
    forward: list[tuple[np.ndarray, tuple[Output, ...]]]  # groups of images and what a pass must give of them
    derived: list[tuple[np.ndarray, tuple[Output, ...]]]  # ... and what follows from stored tokens
    precision_reason: str = ""
    _compute: Compute | None = field(default=None, repr=False)

    @property
    def to_compute(self) -> int:
        """Distinct images that need the backbone."""
        return sum(len(rows) for rows, _ in self.forward)

    @property
    def to_derive(self) -> int:
        return sum(len(rows) for rows, _ in self.derived)

    def bytes_of(self, names: Iterable[str] | None = None) -> int:
        """What the outputs take on the disk for all distinct images, stored already or not."""
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
            if self.batch_size not in (None, kept["batch_size"]):
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
        sources = {output.source for _, outputs in self.forward for output in outputs}
        with exact_arithmetic(self.plan["threads"]):
            return self.plan["batch_size"] / self.compute().seconds_per_batch(sources or {"tokens"})

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
        """Compute what is missing, then write the view. ``rate`` (images/s) sizes the shards; probed when not given."""
        self.check_disk()
        start = time.perf_counter()
        plan, failures, clock = self._fix_plan(rate), {}, Clock()
        assert self.store is not None
        self.store.sweep()
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
            safe = sum(int(self._locate(o).found.sum()) for o in self.outputs[:1])
            raise Stopped(f"stopped. {safe:,} images are safe; the same command continues.") from error
        except UnreadableImage as error:
            raise SourceError(f"{self._first_failure(failures)} (--on-error report goes on without it)") from error
        finally:
            bar.close()
        path, failed = self._write_view(failures)
        seconds = time.perf_counter() - start
        names, kept = tuple(output.name for output in self.outputs), len(self.dataset) - len(failed)
        return Result(path, names, kept, clock.images, self.to_derive, seconds, clock.shares(), failed)

    def _fix_plan(self, rate: float | None) -> dict[str, Any]:
        if self.store is None:
            provenance = {**self.backbone.provenance, "backbone": self.backbone.name}
            self.store = create_store(self.cache, self.backbone.name, self.spec, provenance)
        known = self.plan  # another process may have made the store, and its plan, meanwhile
        if self._compute is not None and self._compute.batch_size != known["batch_size"]:
            self._compute = None
        if "images_per_s" not in known and (speed := rate or self.estimate()):
            known["images_per_s"] = round(speed, 3)
        if self.forward and known != (self.store.plan or {}).get(self.device.type):
            self.store.write_plan({**(self.store.plan or {}), self.device.type: known})
        return known

    def _job(self, plan: dict[str, Any]) -> Job:
        assert self.store is not None
        first = self.images
        return Job(
            self.store, self.layouts, self.digests, lambda number: self.dataset.read(int(first[number])),
            self.backbone, self.compute(), notes_for(self.spec.fingerprint, plan), self.workers, plan["threads"],
            self.on_error == "fail",
        )  # fmt: skip

    def _units(self, plan: dict[str, Any]) -> list[Unit]:
        units = []
        for rows, outputs in self.forward:
            row_bytes = max(self.layouts[output.name].row_bytes for output in outputs)
            length = shard_rows(len(rows), row_bytes, plan.get("images_per_s"), plan["batch_size"])
            units += [Unit(rows[start : start + length], outputs) for start in range(0, len(rows), length)]
        return units

    def _derive_units(self) -> list[tuple[Unit, dict[str, Located]]]:
        units = []
        for rows, outputs in self.derived:
            row_bytes = max(self.layouts[output.name].row_bytes for output in outputs)
            length = shard_rows(len(rows), row_bytes)
            found = {source: self._locate(parse(source), rows) for source in {output.source for output in outputs}}
            for start in range(0, len(rows), length):
                part = slice(start, start + length)
                places = {key: Located(all_.shards, all_.file[part], all_.row[part]) for key, all_ in found.items()}
                units.append((Unit(rows[part], outputs), places))
        return units

    def _locate(self, output: Output, rows: np.ndarray | None = None) -> Located:
        assert self.store is not None
        digests = self.digests if rows is None else self.digests[rows]
        return self.store.locate(self.layouts[output.name], digests)

    def _first_failure(self, failures: dict[int, str]) -> str:
        number, reason = next(iter(failures.items()))
        return f"{self.dataset.ids[int(self.images[number])]}: {reason}"

    def _write_view(self, failures: dict[int, str]) -> tuple[Path, list[tuple[str, str]]]:
        assert self.store is not None
        reasons = {**self.unread}
        for sample, image in enumerate(self.sample_image.tolist()):
            if image in failures:
                reasons[sample] = failures[image]
        located = {self.layouts[o.name]: self._locate(o) for o in self.outputs}
        kept = np.array([sample for sample in range(len(self.dataset)) if sample not in reasons], np.int64)
        failed = [(self.dataset.ids[sample], reason) for sample, reason in sorted(reasons.items())]
        if not len(kept):
            raise SourceError(
                f"none of {len(self.dataset):,} images could be read. The first, {failed[0][0]}: {failed[0][1]}."
            )
        images = self.sample_image[kept]
        places = {lay: Located(loc.shards, loc.file[images], loc.row[images]) for lay, loc in located.items()}
        rows = _rows_of(self.dataset, kept, self.digests[images])
        return write_view(self.store, self.name, rows, self._attributes(failed), places), failed

    def _attributes(self, failed: list[tuple[str, str]]) -> dict[str, Any]:
        return {
            "classes": json.dumps(self.dataset.classes, ensure_ascii=False),
            "task": self.dataset.task,
            "spec": canonical_json(self.spec.to_dict()),
            "fingerprint": self.spec.fingerprint,
            "format_version": FORMAT,
            "source": canonical_json(self.dataset.source),
            "failed": json.dumps(failed, ensure_ascii=False),
        }


def shard_rows(rows: int, row_bytes: int, rate: float | None = None, batch: int = 1) -> int:
    """Rows of a shard: up to 256 MiB or 16,384; more where there would be over 500; at most two minutes of work."""
    length = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    length = max(length, min(-(-rows // MOST_SHARDS), MOST_BYTES // row_bytes))
    if rate is not None:
        length = min(length, int(rate * SHARD_SECONDS))
    return max(batch, length // batch * batch)


def _rows_of(dataset: Dataset, kept: np.ndarray, digests: np.ndarray) -> Rows:
    def pick(column: Any) -> Any:
        return column[kept] if isinstance(column, np.ndarray) else [column[sample] for sample in kept]

    groups = None if dataset.groups is None else pick(dataset.groups)
    meta = {key: pick(column) for key, column in dataset.meta.items()}
    return Rows(pick(dataset.ids), dataset.labels[kept], pick(dataset.splits), digests, groups, meta)


def progress_bar(total: int, progress: bool, what: str = "extract") -> tqdm:
    style = "{desc} {percentage:3.0f} % {bar} {n:,}/{total:,}  {rate_fmt}{postfix}  eta {remaining}"
    return tqdm(
        total=total, desc=what, disable=None if progress else True, unit=" img", bar_format=style, leave=False,
        smoothing=0.1, dynamic_ncols=True,
    )  # fmt: skip


def _advance(bar: tqdm, images: int, clock: Clock) -> None:
    bar.set_postfix_str("  ".join(f"{key} {share:.0%}" for key, share in clock.shares().items()), refresh=False)
    bar.update(images)


def size_text(size: float) -> str:
    """Bytes for people, decimal: 2.8 MB, 0.54 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale or (unit == "GB" and size >= 5e8):
            return f"{size / scale:.3g} {unit}"
    return f"{int(size)} B"


def default_batch(backbone: Backbone, device: torch.device) -> int:
    """Rows of a forward pass. On a CPU the activations of 8 images stay in the cache; a small ViT fills it with 32."""
    if device.type != "cpu":
        return 64
    return 8 if backbone.channels_last or backbone.parameters > 10e6 else 32
