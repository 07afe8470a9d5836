"""Extraction: what is asked for, what is there already, and computing the difference.

    extraction = prepare("chest/", backbone="vit-in21k")     # looks, computes nothing, writes nothing
    result = extraction.run()                                # shards, then the view

A feature is looked up by (fingerprint, output, digest): the same image in two datasets is computed once, and a run that
was killed continues where its last shard was committed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from featurecache import images as _images
from featurecache.backbones import Backbone, load_backbone
from featurecache.engines import (
    Clock, Compute, Job, Unit, ahead, derive_units, exact_arithmetic, layout_of, pick_device, run_local, source_layout,
)  # fmt: skip
from featurecache.errors import BadOption, CannotWrite, FeatureCacheError, NotInCache, SourceError, UnreadableImage
from featurecache.files import FORMAT
from featurecache.outputs import Output, derive, parse, parse_list
from featurecache.shards import DIGEST, Layout, Located, notes_for
from featurecache.sources import Dataset, open_source
from featurecache.spec import ExtractionSpec, canonical_json
from featurecache.stores import Store, cache_folder, create_store, find_store, stores
from featurecache.views import Rows, View, write_view

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
        bar = _bar(self.to_compute + self.to_derive, progress)
        try:
            if self.to_compute or self.to_derive:
                job = self._job(plan)
                failures = job.failures
                derive_units(job, self._derive_units(), lambda n, _: bar.update(n))
                if self.forward:
                    clock = run_local(job, self._units(plan), lambda n, clock: _advance(bar, n, clock))
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
        known = self.plan
        if self.store is None:
            provenance = {**self.backbone.provenance, "backbone": self.backbone.name}
            self.store = create_store(self.cache, self.backbone.name, self.spec, provenance)
        if self.forward and "images_per_s" not in known:
            few = self.to_compute <= 4 * known["batch_size"]  # the probe would take as long as the work
            known["images_per_s"] = round(rate or (self.to_compute if few else self.rate()), 3)
        if known != (self.store.plan or {}).get(self.device.type) and self.forward:
            self.store.fix_plan({**(self.store.plan or {}), self.device.type: known})
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
            length = shard_rows(len(rows), row_bytes, plan["images_per_s"], plan["batch_size"])
            units += [Unit(rows[start : start + length], outputs) for start in range(0, len(rows), length)]
        return units

    def _derive_units(self) -> list[tuple[Unit, dict[str, Located]]]:
        units = []
        for rows, outputs in self.derived:
            row_bytes = max(self.layouts[output.name].row_bytes for output in outputs)
            length = shard_rows(len(rows), row_bytes)
            for start in range(0, len(rows), length):
                unit = Unit(rows[start : start + length], outputs)
                sources = {output.source for output in outputs}
                units.append((unit, {source: self._locate(parse(source), unit.rows) for source in sources}))
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


def prepare(
    data: str | Path | Dataset = "digits",
    *,
    backbone: str,
    outputs: str | Sequence[str] | None = None,
    name: str | None = None,
    weights: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    fit: str = "model",
    precision: str = "auto",
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    on_error: str = "report",
    cache: str | Path | None = None,
    columns: dict[str, str] | None = None,
    task: str | None = None,
    progress: bool = False,
) -> Extraction:
    """Look at the images, the backbone and the cache; nothing is computed or written."""
    _check_options(on_error, batch_size, workers, name)
    asked = parse_list(outputs) if outputs is not None else None
    dataset = data if isinstance(data, Dataset) else open_source(data, columns=columns, task=task)
    picked = pick_device(device)
    network = load_backbone(
        backbone, weights=weights, random_weights=random_weights, seed=seed, image_size=image_size, fit=fit
    )
    folder = cache_folder(cache)
    name = name or dataset.name
    workers = workers or default_workers(picked)
    images, digests, sample_image, unread = _digest_all(dataset, max(workers, 4), progress, on_error)
    spec = _spec_of(network, "fp32", dtype)
    spec, reason = _choose_precision(spec, precision, picked, folder, network, digests)
    store = find_store(folder, spec)
    wanted = asked or parse_list([network.vector, "tokens"])
    for output in wanted:
        layout_of(network, output, dtype)  # refuses what the backbone has not
    wanted = _with_kept(wanted, store, name, dataset)
    layouts = {output.name: layout_of(network, output, dtype) for output in wanted}
    layouts |= {o.source: source_layout(network, o, dtype) for o in wanted if o.derived}
    forward, derived = _missing(wanted, layouts, store, digests)
    return Extraction(
        dataset, network, spec, wanted, name, folder, picked, on_error, workers, batch_size, store, images, digests,
        sample_image, unread, layouts, forward, derived, reason,
    )  # fmt: skip


def extract(data: str | Path | Dataset = "digits", *, progress: bool = False, **options: Any) -> Result:
    """Run a backbone once over ``data`` and keep its outputs; see `prepare` for the options.

    >>> result = featurecache.extract("chest/", backbone="vit-in21k", outputs="cls,tokens")       # doctest: +SKIP
    >>> featurecache.open_view(result.view).tensor("cls")                                         # doctest: +SKIP
    """
    return prepare(data, progress=progress, **options).run(progress=progress)


def compute(
    images: Sequence[bytes | np.ndarray], *, like: View, output: str, device: str = "auto"
) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """The features that ``like``'s store would hold of ``images``: same backbone, precision, batches and rounding.

    Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those left
    out). Raises NotInCache when the backbone that is found now is not the one of the store.
    """
    spec = ExtractionSpec.from_dict(like.spec)
    backbone = load_backbone(**like.provenance["request"])
    found = replace(_spec_of(backbone, spec.precision, spec.dtype), generation=spec.generation)
    if found.fingerprint != spec.fingerprint:
        raise NotInCache(
            f"{backbone.name} as it is now ({found.fingerprint[:8]}) is not the backbone that {like.label} was made with "
            f"({spec.fingerprint[:8]}): its weights, configuration or preprocessing changed. Extract again, then train."
        )
    kind, picked = parse(output), pick_device(device)
    store_plan = Store(like.store, spec, spec.fingerprint, like.provenance).plan or {}
    plan = store_plan.get(picked.type) or {"batch_size": 8, "threads": torch.get_num_threads()}
    run = Compute(backbone, spec.precision, picked, plan["batch_size"])
    ready, failed = _decode_some(images, backbone)
    shape = layout_of(backbone, kind, spec.dtype).row_shape
    rows = [torch.empty(0, *shape, dtype=getattr(torch, spec.dtype))]
    with exact_arithmetic(plan["threads"]):
        for start in range(0, len(ready), run.batch_size):
            batch = torch.stack(ready[start : start + run.batch_size])
            tokens = run(batch, {kind.source}, spec.dtype)[kind.source].cpu()
            rows.append(derive(kind, tokens, len(backbone.prefix), backbone.grid) if kind.derived else tokens)
    return torch.cat(rows), failed


def _decode_some(
    images: Sequence[bytes | np.ndarray], backbone: Backbone
) -> tuple[list[torch.Tensor], list[tuple[int, str]]]:
    ready, failed = [], []
    for index, data in enumerate(images):
        try:
            ready.append(backbone.preprocess.resized(_images.decode(data)))
        except UnreadableImage as error:
            failed.append((index, str(error)))
    return ready, failed


def _spec_of(backbone: Backbone, precision: str, dtype: str) -> ExtractionSpec:
    preprocess = {**backbone.preprocess.to_dict(), "decoding": _images.DECODING}
    return ExtractionSpec(
        backbone.architecture, backbone.weights, preprocess, backbone.image_size, backbone.position_embeddings,
        precision, dtype,
    )  # fmt: skip


def _choose_precision(
    spec: ExtractionSpec, precision: str, device: torch.device, cache: Path, backbone: Backbone, digests: np.ndarray
) -> tuple[ExtractionSpec, str]:
    """``auto``: that of an existing store of this backbone that holds these images, else the device's own."""
    if precision != "auto":
        return replace(spec, precision=precision), "as asked"
    held = {}
    for store in stores(cache):
        if replace(store.spec, precision="fp32") == spec:
            held[store.spec.precision] = _held(store, backbone, digests)
    if held and max(held.values()) > 0:
        best = max(held, key=lambda key: held[key])
        return replace(spec, precision=best), "as these images are stored already"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return replace(spec, precision="bf16"), "this GPU's own"
    return spec, "exact"


def _held(store: Store, backbone: Backbone, digests: np.ndarray) -> int:
    most = 0
    for folder in store.path.iterdir():
        if folder.is_dir() and any(folder.glob("[0-9a-f]*.h5")):
            layout = layout_of(backbone, parse(folder.name), store.spec.dtype)
            most = max(most, int(store.locate(layout, digests).found.sum()))
    return most


def _with_kept(wanted: tuple[Output, ...], store: Store | None, name: str, dataset: Dataset) -> tuple[Output, ...]:
    """The outputs asked for and those a view of this name has already; refuses to replace another dataset's view."""
    path = store.path / f"{name}.h5" if store else None
    if path is None or not path.exists():
        return wanted
    view = View(path, columns_only=True)
    common = len(set(view.ids) & set(dataset.ids))
    if 2 * common < len(view):
        raise BadOption(
            f"the view {view.label} holds {len(view):,} images of which {common:,} are in {dataset.source.get('data')}: "
            "it is another dataset. Give this one a name with --name."
        )
    return tuple(dict.fromkeys([*wanted, *(parse(output) for output in view.outputs)]))


def _missing(
    wanted: tuple[Output, ...], layouts: dict[str, Layout], store: Store | None, digests: np.ndarray
) -> tuple[list[tuple[np.ndarray, tuple[Output, ...]]], list[tuple[np.ndarray, tuple[Output, ...]]]]:
    """Images grouped by what is missing of them: (needs the backbone, follows from stored tokens)."""
    there = {key: _found(store, layout, digests) for key, layout in layouts.items()}
    forward, derived = [], []
    key = np.stack([there[name] for name in layouts], 1)
    patterns, group = np.unique(key, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.ravel() == number)
        stored = {name for name, yes in zip(layouts, pattern, strict=True) if yes}
        missing = [output for output in wanted if output.name not in stored]
        follow = tuple(output for output in missing if output.derived and output.source in stored)
        need = tuple(output for output in missing if output not in follow)
        if need:
            forward.append((rows, need))
        if follow:
            derived.append((rows, follow))
    return forward, derived


def _found(store: Store | None, layout: Layout, digests: np.ndarray) -> np.ndarray:
    return store.locate(layout, digests).found if store else np.zeros(len(digests), bool)


def _digest_all(
    dataset: Dataset, workers: int, progress: bool, on_error: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """Read every image once: (first sample of each distinct image, its digest, image of each sample, unread)."""
    digests, unread = np.zeros(len(dataset), DIGEST), {}

    def one(sample: int) -> str | UnreadableImage:
        try:
            return _images.digest(dataset.read(sample))
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(workers) as pool, _bar(len(dataset), progress, "look") as bar:
        for sample, future in ahead(pool, one, range(len(dataset)), 16 * workers):
            digest = future.result()
            bar.update()
            if isinstance(digest, UnreadableImage):
                if on_error == "fail":
                    raise SourceError(
                        f"{dataset.ids[sample]}: {digest} (--on-error report goes on without it)"
                    ) from digest
                unread[sample] = str(digest)
            else:
                digests[sample] = digest.encode()
    distinct, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)  # in the order of the source
    order = order[distinct[order] != b""]
    number = np.full(len(distinct), -1, np.int64)
    number[order] = np.arange(len(order))
    return first[order], distinct[order], number[inverse], unread


def shard_rows(rows: int, row_bytes: int, rate: float | None = None, batch: int = 1) -> int:
    """Rows of a shard: up to 256 MiB or 16,384, grown so that there are at most about 500, at most two minutes of work."""
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


def default_batch(backbone: Backbone, device: torch.device) -> int:
    """Rows of a forward pass. On a CPU activations of 8 images stay in the cache; a small ViT needs more to fill the cores."""
    if device.type != "cpu":
        return 64
    return 8 if backbone.channels_last or backbone.parameters > 10e6 else 32


def default_workers(device: torch.device) -> int:
    """Decode threads: enough to feed a GPU; on a CPU the forward pass needs the cores."""
    cores = os.cpu_count() or 1
    return min(16, cores) if device.type != "cpu" else max(1, cores // 2)


def _check_options(on_error: str, batch_size: int | None, workers: int | None, name: str | None) -> None:
    if on_error not in ("report", "skip", "fail"):
        raise BadOption(f'--on-error is report, skip or fail, not "{on_error}".')
    for option, value in (("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise BadOption(f"{option} is at least 1, not {value}.")
    if name is not None and (
        not name or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 200
    ):
        raise BadOption(f'"{name[:60]}" cannot be the name of a view: no slash, no dot in front, at most 200 bytes.')


def _bar(total: int, progress: bool, what: str = "extract") -> tqdm:
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
