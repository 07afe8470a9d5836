"""Repair a damaged cache: what `verify` finds is made whole again, and every other row keeps its bytes.

Of a damaged or missing shard the views know place, digest and checksum of every row they name. Rows whose bytes still
have their checksum are saved. What no whole shard has is extracted: derived from stored tokens, or computed again from
the images. The shard is written anew of both and replaces the damaged file, then the views are written on it. Rows that
no view names are not brought back. Killed in the middle, the same command finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache as cached
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import CacheError, DamagedFile, Drift, FeatureCacheError, SourceError, UnreadableImage
from featurecache.extraction import canary
from featurecache.extraction.canary import StoreBackbone
from featurecache.extraction.forward import output_layout
from featurecache.extraction.pipeline import ExtractionJob, ShardJob, ShardPlan, derive_shards, run_local
from featurecache.files.atomic import writing
from featurecache.files.locks import exclusive_lock
from featurecache.files.records import check_provenance, checked_plan, parse_json
from featurecache.formatting import counted
from featurecache.images import decoding as _images
from featurecache.images.headers import EncodedImage
from featurecache.maintenance.verify import Damage, ReferencedShard, check_store, referenced_shards
from featurecache.outputs import parse
from featurecache.sources import reopen
from featurecache.sources.base import Dataset
from featurecache.store.reference import canary_path
from featurecache.store.schema import read_view
from featurecache.store.shards import (
    Layout,
    RowLocations,
    ShardWriter,
    find_by_digest,
    find_by_key,
    notes_for,
    read_feature_rows,
    row_keys,
)
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import ImageGroups, Store, missing_outputs, stores, unreadable_stores, write_spec
from featurecache.store.view import View
from featurecache.store.write_view import rewrite_view

_STRETCH = 64  # rows in hand at a time


@dataclass(frozen=True)
class Repair:
    """What was done in one store. ``left``: damages that remain; ``gone``: (id, reason) of rows nobody can compute."""

    store: Path
    replaced: tuple[Path, ...] = ()
    removed: tuple[Path, ...] = ()
    kept: int = 0  # rows of replaced shards that kept their bytes
    computed: int = 0  # rows computed again from images or stored tokens
    gone: tuple[tuple[str, str], ...] = ()
    left: tuple[Damage, ...] = ()


@exact_arithmetic()
def repair(
    cache: Path, only: Iterable[Store] | None = None, *, drop: bool = False, device: str = "auto",
    weights: str | None = None, trust_code: bool = False, say: Callable[[str], object] = str,
) -> list[Repair]:  # fmt: skip
    """Mend the stores of a cache, or those in ``only``; one record for each in which something was damaged. Rows whose
    images are gone stop the repair of their store before anything is changed, unless ``drop``: then they leave the
    views and are listed there among what could not be read. For the others see `StoreBackbone`."""
    repairs = []
    if only is None:
        repairs += [_restore_spec(folder, error) for folder, error in list(unreadable_stores(cache))]
    for store in list(stores(cache)) if only is None else list(only):
        with exclusive_lock(store.path, "repair"):
            store.sweep()
            if damages := check_store(store).damages:
                load = partial(StoreBackbone, store, device=device, weights=weights, trust_code=trust_code, exact=True)
                repairs.append(StoreRepair(store, damages, load, say).run(drop))
    return repairs


def _restore_spec(folder: Path, error: CacheError) -> Repair:
    """spec.json out of a view, which carries it too."""
    for path in sorted(folder.glob("*.h5")):
        with contextlib.suppress(FeatureCacheError, KeyError, ValueError):
            attributes = read_view(path).attributes
            record, provenance = (parse_json(attributes[key], f"{path}: {key}") for key in ("spec", "provenance"))
            check_provenance(provenance, path)
            if (spec := ExtractionSpec.from_dict(record)).fingerprint == attributes["fingerprint"]:
                write_spec(folder, spec, provenance)
                return Repair(folder, replaced=(folder / "spec.json",))
    return Repair(folder, left=(Damage(folder / "spec.json", f"{error} No whole view is there to restore it from."),))


class DamagedShard:
    """A shard to be written anew: its rows [n] in order, each once, by their numbers in the damaged file."""

    def __init__(self, named: ReferencedShard) -> None:
        self.named, self.layout, self.output = named, named.layout, parse(named.layout.output)
        self.numbers, first = np.unique(named.numbers, return_index=True)
        self.digests, self.checksums, self.errors = named.digests[first], named.checksums[first], named.errors[first]
        self.whole = named.is_whole()[first]  # bool: the damaged file still has the row's bytes

    def rows(self, part: np.ndarray, elsewhere: RowLocations) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``part`` [k] with their bytes [k, ...] and errors [k]: saved from the file, or from where they lie
        ``elsewhere`` [n]. The same bytes have the same error, which was measured when it could be."""
        whole = self.whole[part]
        rows, errors = np.zeros((len(part), *self.layout.shape), self.layout.dtype), self.errors[part].astype("f4")
        if whole.any():
            rows[whole] = self.named.rows(self.numbers[part[whole]])
            if any(xxhash.xxh3_64_intdigest(rows[k].data) != self.checksums[part[k]] for k in np.flatnonzero(whole)):
                raise DamagedFile(f"{self.named.path} has other bytes than a moment ago; is its disk failing?")
        if not whole.all():
            other = elsewhere[part[~whole]]
            rows[~whole] = read_feature_rows(other, self.layout).numpy()
            same = other.checksums == self.checksums[part[~whole]]
            errors[~whole] = np.where(same, errors[~whole], other.errors)
        return rows, errors


class StoreRepair:
    """The repair of one store, alone in it."""

    def __init__(
        self, store: Store, damages: tuple[Damage, ...], load: Callable[[], StoreBackbone], say: Callable[[str], object]
    ) -> None:
        self._store, self._damages, self._backbone, self._say = store, damages, cached(load), say
        self._views: list[View] = []
        for path in store.views():
            with contextlib.suppress(FeatureCacheError):
                self._views.append(View(path, columns_only=True, copies=True))
        self._named = referenced_shards(self._views)
        self._layouts = {named.layout.output: named.layout for named in self._named.values()}
        self._broken = {damage.path for damage in damages if damage.path.parent.parent == store.path}
        self._bad = [DamagedShard(self._named[path]) for path in sorted(self._broken & self._named.keys())]
        # Tokens first: others follow from them; then the small ones, that the larger may have their rows from them.
        self._bad.sort(key=lambda shard: (shard.output.is_derived, len(shard.digests)))
        self._open = cached(_open_source)
        self._orders = {view.path: np.argsort(view.digests, kind="stable") for view in self._views}
        self._kept = self._computed = 0

    @property
    def _whole(self) -> Store:
        """The store without its damaged shards."""
        return replace(self._store, damaged_shards=frozenset(self._broken))

    def run(self, drop: bool) -> Repair:
        # First: what is computed below goes by the plan, and is checked by the reference of the probe images.
        mend = {self._store.path / "plan.json": self._mend_plan, canary_path(self._store): self._mend_canary}
        small = [damage.path for damage in self._damages if damage.path in mend and mend[damage.path]()]
        damages = [damage for damage in self._damages if damage.path not in small]
        damaged = set(self._broken)
        gone = self._gone()
        samples = ((name, d) for view in self._views for name, d in zip(view.ids, view.digests.tolist(), strict=True))
        named = tuple(dict.fromkeys((name, gone[digest]) for name, digest in samples if digest in gone))
        if gone and not drop:
            return Repair(self._store.path, tuple(small), gone=named, left=tuple(damages))
        new = [path for shard in self._bad if (path := self._write(shard, gone)) is not None]
        for view in self._views:
            if damaged & {view.store / entry["path"].decode() for entry in view.files}:
                located = {view.info(name): self._located(view, name, new) for name in view.outputs}
                rewrite_view(view, self._store, located, lost=gone)
        # Damaged files whose rows are elsewhere now go. One that no view names stays while a view is damaged, which
        # may name it.
        unsure = any(damage.path.parent == self._store.path and damage.path.suffix == ".h5" for damage in damages)
        removed = [path for path in sorted(self._broken) if path.exists() and (path in self._named or not unsure)]
        _remove(removed)
        left = tuple(d for d in damages if d.path not in damaged or (d.path in self._broken and d.path.exists()))
        return Repair(self._store.path, (*new, *small), tuple(removed), self._kept, self._computed, named, left)

    def _located(self, view: View, output: str, first: list[Path]) -> RowLocations:
        """The rows of a view [N] in whole shards, those in ``first`` before others: the copy with the same bytes where
        there is one (another machine may have computed other last bits), else any."""
        shards = sorted(self._whole.shards(view.info(output)), key=lambda shard: shard.path not in first)
        same = find_by_key(shards, row_keys(view.digests, view.stored(output).checksums))
        other = find_by_digest(shards, view.digests)
        file, row = np.where(same.mask, same.file, other.file), np.where(same.mask, same.row, other.row)
        return RowLocations(other.shards, file, row)

    def _missing(self, shard: DamagedShard, rows: np.ndarray) -> tuple[ImageGroups, ImageGroups]:
        """Of rows [n] that no whole shard has: (those that need the backbone, those that follow from stored tokens)."""
        layouts, tokens = {shard.output.name: shard.layout}, self._layouts.get(shard.output.source)
        if shard.output.is_derived and tokens is not None and tokens.grid is not None:
            layouts[shard.output.source] = tokens
        groups = missing_outputs((shard.output,), layouts, self._whole, shard.digests[rows])
        forward, derived = ([(rows[part], outputs) for part, outputs in each] for each in groups)
        return forward, derived

    def _gone(self) -> dict[bytes, str]:
        """Damaged rows that can be had from nowhere, and why. Looks at the images, computes nothing."""
        gone: dict[bytes, str] = {}
        coming: dict[str, set[bytes]] = {}  # by output: what will be there when the shards before are written
        for shard in self._bad:
            follow = coming.get(shard.output.source, set()) if shard.output.is_derived else set()
            mine = coming.setdefault(shard.output.name, set())
            mine.update(shard.digests.tolist())
            forward, _ = self._missing(shard, np.flatnonzero(~shard.whole))
            for digest in [digest for rows, _ in forward for digest in shard.digests[rows].tolist()]:
                if digest in follow or digest in gone:
                    continue
                try:
                    self._image(digest)
                except UnreadableImage as error:
                    gone[digest] = str(error)
                    mine.discard(digest)
        return gone

    def _image(self, digest: bytes) -> EncodedImage:
        """The image of a digest, found by the ids that views have for it. Raises UnreadableImage with the reason."""
        reason = "no view names it"
        for view in self._views:
            order = self._orders[view.path]
            left, right = (np.searchsorted(view.digests, digest, side, order) for side in ("left", "right"))
            for row in order[left:right].tolist():
                dataset, numbers = self._open(view)
                if isinstance(dataset, str):
                    reason = dataset
                    continue
                try:
                    if view.ids[row] not in numbers:
                        raise UnreadableImage(f"{view.source.get('data')} has no image of this name any more")
                    if (image := _as_named(view, row, dataset.read(numbers[view.ids[row]]))) is not None:
                        return image
                    reason = "the file of this name holds another image now"
                except (UnreadableImage, SourceError) as error:
                    reason = str(error)
        raise UnreadableImage(reason)

    def _write(self, shard: DamagedShard, gone: dict[bytes, str]) -> Path | None:
        """The shard anew without rows that are ``gone``. None when nothing of it is left."""
        chosen = np.flatnonzero([digest not in gone for digest in shard.digests.tolist()])
        if not len(chosen):
            return None
        lost = chosen[~shard.whole[chosen]]
        self._say(f"{shard.named.path}: making {len(lost):,} of {counted(len(chosen), 'row')} again")
        self._kept += len(chosen) - len(lost)
        notes = self._notes(shard.layout)
        extracted = self._extract(shard, lost, notes)
        elsewhere = find_by_digest(self._whole.shards(shard.layout), shard.digests)
        assert elsewhere.mask[lost].all()
        with contextlib.closing(ShardWriter(self._store.path, shard.digests[chosen], shard.layout, notes)) as writer:
            for start in range(0, len(chosen), _STRETCH):
                part = chosen[start : start + _STRETCH]
                writer.append(shard.digests[part].tolist(), *shard.rows(part, elsewhere))
            path = writer.commit(replace=True)
        assert path is not None
        self._broken.discard(path)  # whole again, and rows of others may come from it
        _remove([each for each in extracted if each != path])  # it has all of their rows
        return path

    def _extract(self, shard: DamagedShard, rows: np.ndarray, notes: dict[str, str]) -> list[Path]:
        """Shards with those of the rows [n] that no whole shard has: an extraction of this output alone."""
        forward, derived = self._missing(shard, rows)
        layouts = {**self._layouts, shard.output.name: shard.layout}
        jobs = [ShardJob(self._whole, layouts, shard.digests, notes, replace=True)]
        derive_shards(jobs[0], derived, str)
        if forward:
            again, source = self._backbone(), shard.output.source
            again.check(shard.output)
            layouts[source] = output_layout(again.backbone, parse(source), self._store.spec.dtype)
            job = ExtractionJob(
                self._whole, layouts, shard.digests, notes, replace=True, preprocess=again.backbone.preprocess,
                read=lambda row: self._image(shard.digests[row]), compute=again.compute, workers=canary.THREADS,
                threads=again.threads,
            )  # fmt: skip
            run_local(job, [ShardPlan(part, outputs, shard.numbers[part]) for part, outputs in forward], str)
            jobs.append(job)
        if reasons := [reason for job in jobs for reason in job.failures.values()]:
            raise SourceError(f"an image that was read before cannot be read now: {reasons[0]}.")
        written = [path for job in jobs for path in job.written]
        self._broken -= set(written)
        self._computed += sum(len(part) for part, _ in forward + derived)
        return written

    def _notes(self, layout: Layout) -> dict[str, str]:
        """What a whole shard of this output says of how it was computed; else what the plan says."""
        for shard in self._whole.shards(layout):
            return shard.notes
        with contextlib.suppress(CacheError):
            for device, plan in (self._store.plan or {}).items():
                return notes_for(self._store.fingerprint, device, plan)
        return {"fingerprint": self._store.fingerprint}

    def _mend_plan(self) -> bool:
        """The plan as whole shards have it noted; without any the next run makes one."""
        plan: dict[str, Any] = {}
        for shard in (shard for layout in self._layouts.values() for shard in self._whole.shards(layout)):
            with contextlib.suppress(CacheError, KeyError):  # it came from elsewhere and has several
                noted = {shard.notes["device"]: parse_json(shard.notes["plan"], f"{shard.path}: plan")}
                plan = checked_plan(noted, shard.path) | plan
        self._store.replace_plan(plan)
        return True

    def _mend_canary(self) -> bool:
        """A new reference, after some stored rows were computed again and agreed."""
        for path, named in self._named.items():
            whole, output = np.flatnonzero(named.is_whole())[:4], parse(named.layout.output)
            try:
                images = [self._image(digest) for digest in named.digests[whole].tolist()]
            except UnreadableImage:
                continue
            if not images:
                continue
            now, failed = self._backbone().rows(images, output, check=False)
            stored = torch.from_numpy(named.rows(named.numbers[whole]))
            if failed or not canary.is_within_tolerance(self._store.spec, now, stored):
                raise Drift(
                    f"{path} holds other rows than this machine computes of the same images, so "
                    f"{canary_path(self._store)} cannot be made again here."
                )
            self._backbone().renew_canary(output)
            return True
        return False


def _open_source(view: View) -> tuple[Dataset | str, dict[str, int]]:
    """The images of a view, or why there are none, and their numbers by id."""
    try:
        dataset = reopen(view.source)
    except (SourceError, KeyError) as error:
        return str(error), {}
    return dataset, {name: number for number, name in enumerate(dataset.ids)}


def _as_named(view: View, row: int, data: EncodedImage) -> EncodedImage | None:
    """The image of a row, or its augmented copy, uint8 [H,W,3], made again; None where ``data`` is another image's."""
    digest, version = _images.digest(data).encode(), 0 if view.versions is None else int(view.versions[row])
    if version == 0 or view.augmented is None:
        return data if digest == view.digests[row] else None
    made = view.augmented.augmentation
    same = made.digests(np.array([digest]), version)[0] == view.digests[row]
    return made.copy_of(data, bytes(view.digests[row])) if same else None


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)
