"""repair: what `verify` finds damaged is made whole again, and every other row keeps its bytes.

Of a damaged or missing shard the views know place, digest and checksum of every row they name. Rows whose bytes still
have their checksum are copied. The others are taken from another shard that has them, or derived from stored tokens, or
computed again from their images. The shard is written anew and replaces the damaged file, then the views are written on
it. Rows that no view names are not brought back. Killed in the middle, the same command finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.errors import CacheError, Drift, FeatureCacheError, SourceError, UnreadableImage
from featurecache.extraction import canary
from featurecache.extraction.recompute import StoreBackbone
from featurecache.files.atomic import open_regular, writing
from featurecache.files.locks import exclusive_lock
from featurecache.files.records import check_provenance, checked_plan
from featurecache.files.records import parse as parse_json
from featurecache.images import decoding as _images
from featurecache.images.headers import EncodedImage
from featurecache.maintenance.verify import Damage, ReferencedShard, check_store, named_shards
from featurecache.outputs import derive, parse
from featurecache.sources import reopen
from featurecache.sources.base import Dataset
from featurecache.store.shards import (
    TORCH_DTYPE,
    Layout,
    RowLocations,
    ShardWriter,
    find_by_digest,
    notes_for,
    read_rows,
    wrong_rows,
)
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, stores, unreadable_stores, write_spec
from featurecache.store.timings import NAME as COST
from featurecache.store.timings import forget_cost
from featurecache.store.view import View, read_view
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


def repair(
    cache: Path, only: Iterable[Store] | None = None, *, drop: bool = False, device: str = "auto",
    weights: str | None = None, trust_code: bool = False, say: Callable[[str], object] = str,
) -> list[Repair]:  # fmt: skip
    """Mend the stores of a cache, or those in ``only``; one record for each in which something was damaged.

    Rows whose images are gone stop the repair of their store before anything is changed, unless ``drop``: then they
    leave the views and are listed there among what could not be read. For the others see `Again`.
    """
    found = []
    if only is None:
        found += [_restore_spec(folder, error) for folder, error in list(unreadable_stores(cache))]
    for store in list(stores(cache)) if only is None else list(only):
        with exclusive_lock(store.path, "repair"):
            store.sweep()
            damages = check_store(store).damages
            if damages:
                found.append(StoreRepair(store, drop, device, weights, trust_code, say).mend(damages))
    return found


def _restore_spec(folder: Path, error: CacheError) -> Repair:
    """spec.json out of a view, which carries it too."""
    for path in sorted(folder.glob("*.h5")):
        with contextlib.suppress(FeatureCacheError, KeyError, ValueError):
            attributes = read_view(path).attributes
            spec = ExtractionSpec.from_dict(parse_json(attributes["spec"], f"{path}: spec"))
            if spec.fingerprint == attributes["fingerprint"]:
                provenance = parse_json(attributes["provenance"], f"{path}: provenance")
                check_provenance(provenance, path)
                write_spec(folder, spec, provenance)
                return Repair(folder, replaced=(folder / "spec.json",))
    return Repair(folder, left=(Damage(folder / "spec.json", f"{error} No whole view is there to restore it from."),))


@dataclass
class DamagedShard:
    """A shard to be written anew: its rows in order, each once."""

    known: ReferencedShard
    digests: np.ndarray  # [n] S32
    numbers: np.ndarray  # [n] row in the damaged file
    checksums: np.ndarray  # [n] of the rows as they were
    errors: np.ndarray  # [n] of rounding
    whole: np.ndarray  # [n] whether the damaged file still has its bytes

    @property
    def layout(self) -> Layout:
        return self.known.layout


@dataclass
class SalvagedRows:
    """Where whole shards have the rows of a damaged one, and the tokens that they follow from."""

    copies: RowLocations
    tokens: tuple[Layout, RowLocations] | None


@dataclass
class StoreRepair:
    store: Store
    drop: bool
    device: str
    weights: str | None
    trust_code: bool
    say: Callable[[str], object]
    _again: StoreBackbone | None = None
    _datasets: dict[Path, Dataset | str] = field(default_factory=dict)
    _positions: dict[Path, dict[str, int]] = field(default_factory=dict)
    _layouts: dict[str, Layout] = field(default_factory=dict)
    _computed: int = 0
    _kept: int = 0

    def mend(self, damages: tuple[Damage, ...]) -> Repair:
        views = self._views()
        named = named_shards(views)
        self._layouts = {known.layout.output: known.layout for known in named.values()}
        broken = {damage.path for damage in damages if damage.path.parent.parent == self.store.path}
        # First: what is computed below goes by the plan, and is checked by the reference of the probe images.
        replaced = [damage.path for damage in damages if self._mend_small(damage.path, named, broken)]
        damages = tuple(damage for damage in damages if damage.path not in replaced)
        bad = [_bad(named[path]) for path in sorted(broken & named.keys())]
        bad.sort(key=lambda shard: parse(shard.layout.output).derived)  # tokens first: others follow from them
        gone = self._gone(bad, broken)
        if gone and not self.drop:
            return Repair(self.store.path, tuple(replaced), gone=self._named(gone, views), left=damages)
        unmended = set(broken)
        new = [path for shard in bad if (path := self._write(shard, gone, unmended)) is not None]
        for view in views:
            if broken & {view.store / entry["path"].decode() for entry in view.files}:
                rewrite_view(view.path, prefer=new, without=unmended, lost=gone)
        removed = self._remove(unmended, named, damages)
        left = tuple(d for d in damages if d.path not in broken or (d.path in unmended and d.path.exists()))
        return Repair(
            self.store.path, (*new, *replaced), removed, self._kept, self._computed, self._named(gone, views), left
        )

    def _remove(
        self, unmended: set[Path], named: dict[Path, ReferencedShard], damages: tuple[Damage, ...]
    ) -> tuple[Path, ...]:
        """Damaged files whose rows are elsewhere now. One that no view names stays while a view is damaged, which may
        name it."""
        unsure = any(damage.path.parent == self.store.path and damage.path.suffix == ".h5" for damage in damages)
        removed = [path for path in sorted(unmended) if path.exists() and not (unsure and path not in named)]
        for path in removed:
            with writing(path):
                path.unlink()
        return tuple(removed)

    def _views(self) -> list[View]:
        found = []
        for path in self.store.views():
            with contextlib.suppress(FeatureCacheError):
                found.append(View(path, columns_only=True, copies=True))
        return found

    def _gone(self, bad: list[DamagedShard], broken: set[Path]) -> dict[bytes, str]:
        """Damaged rows that can be had from nowhere, and why. Looks at the images, computes nothing."""
        gone: dict[bytes, str] = {}
        coming: dict[str, set[bytes]] = {}  # by output: what will be there when the shards before are written
        for shard in bad:
            output = parse(shard.layout.output)
            there = self._located(shard.layout, shard.digests, broken).found
            if (tokens := self._tokens_of(shard.layout)) is not None:
                there = there | self._located(tokens, shard.digests, broken).found
            follow = coming.get(output.source, set()) if output.derived else set()
            coming.setdefault(output.name, set()).update(shard.digests.tolist())
            for digest in shard.digests[~shard.whole & ~there].tolist():
                if digest in follow or digest in gone:
                    continue
                try:
                    self._image(shard.known, digest)
                except UnreadableImage as error:
                    gone[digest] = str(error)
                    coming[output.name].discard(digest)
        return gone

    def _tokens_of(self, layout: Layout) -> Layout | None:
        """Of an output that is a function of stored tokens, those; None where views know none."""
        output = parse(layout.output)
        tokens = self._layouts.get(output.source) if output.derived else None
        return tokens if tokens is not None and tokens.grid is not None else None

    def _image(self, known: ReferencedShard, digest: bytes) -> EncodedImage:
        """The image of a row, found by the ids that views have for it. Raises UnreadableImage with the reason."""
        reason = "no view names it"
        for view, rows in known.parts:
            for row in rows[view.digests[rows] == digest].tolist():
                try:
                    data = self._read(view, view.ids[row])
                except (UnreadableImage, SourceError) as error:
                    reason = str(error)
                    continue
                if (image := _as_named(view, row, data)) is not None:
                    return image
                reason = "the file of this name holds another image now"
        raise UnreadableImage(reason)

    def _read(self, view: View, sample: str) -> EncodedImage:
        if view.path not in self._datasets:
            try:
                dataset: Dataset | str = reopen(view.source)
                self._positions[view.path] = {name: k for k, name in enumerate(dataset.ids)}  # type: ignore[union-attr]
            except (SourceError, KeyError) as error:
                dataset = str(error)
            self._datasets[view.path] = dataset
        dataset = self._datasets[view.path]
        if isinstance(dataset, str):
            raise UnreadableImage(dataset)
        position = self._positions[view.path].get(sample)
        if position is None:
            raise UnreadableImage(f"{view.source.get('data')} has no image of this name any more")
        return dataset.read(position)

    def _write(self, shard: DamagedShard, gone: dict[bytes, str], broken: set[Path]) -> Path | None:
        """The shard anew without rows that are ``gone``. None when nothing of it is left."""
        keep = np.array([digest not in gone for digest in shard.digests.tolist()], bool)
        chosen = np.flatnonzero(keep)
        if not len(chosen):
            return None
        self.say(f"{shard.known.path}: {int((~shard.whole[chosen]).sum()):,} of {len(chosen):,} rows are made again")
        elsewhere = self._elsewhere(shard, broken)
        writer = ShardWriter(self.store.path, shard.digests[chosen], shard.layout, self._notes(shard.layout, broken))
        try:
            for start in range(0, len(chosen), _STRETCH):
                part = chosen[start : start + _STRETCH]
                rows, errors = self._rows(shard, part, elsewhere)
                writer.append(shard.digests[part].tolist(), rows.numpy(), errors)
            path = writer.commit(replace=True)
        finally:
            writer.discard()
        assert path is not None
        broken.discard(path)  # whole again, and rows of others may come from it
        return path

    def _rows(self, shard: DamagedShard, part: np.ndarray, elsewhere: SalvagedRows) -> tuple[torch.Tensor, np.ndarray]:
        """Rows [n, ...] of a shard and their errors [n]: kept, found elsewhere, derived, or computed."""
        layout, rows = shard.layout, np.zeros((len(part), *shard.layout.row_shape), shard.layout.dtype)
        errors, todo = shard.errors[part].astype(np.float32), np.flatnonzero(~shard.whole[part])
        with contextlib.suppress(OSError, CacheError), open_regular(shard.known.path) as file:
            for k in np.flatnonzero(shard.whole[part]).tolist():
                data = shard.known.read(file, int(shard.numbers[part[k]]))
                rows[k] = np.frombuffer(data, layout.dtype).reshape(layout.row_shape)
        self._kept += len(part) - len(todo)
        if len(todo):
            made, measured = self._made(shard, part[todo], elsewhere)
            rows[todo] = made.numpy()
            other = wrong_rows(made, np.arange(len(todo)), shard.checksums[part[todo]])
            errors[todo[other]] = measured[other]  # the same bytes have the same error, measured when it could be
        return torch.from_numpy(rows), errors

    def _made(self, shard: DamagedShard, todo: np.ndarray, elsewhere: SalvagedRows) -> tuple[torch.Tensor, np.ndarray]:
        """Rows [n, ...] that the damaged file does not have any more, and their errors [n]."""
        layout, output, digests = shard.layout, parse(shard.layout.output), shard.digests[todo]
        rows = torch.empty((len(digests), *layout.row_shape), dtype=TORCH_DTYPE[layout.dtype])
        errors = np.full(len(digests), np.nan, np.float32)
        copies = elsewhere.copies[todo]
        found = np.flatnonzero(copies.found)
        if len(found):
            rows[torch.from_numpy(found)], errors[found] = read_rows(copies[found], layout), copies[found].errors
        rest = np.flatnonzero(~copies.found)
        if elsewhere.tokens is not None:
            tokens, places = elsewhere.tokens[0], elsewhere.tokens[1][todo]
            follow = rest[places.found[rest]]
            if len(follow):
                assert tokens.prefix is not None and tokens.grid is not None
                made = derive(output, read_rows(places[follow], tokens), len(tokens.prefix), tokens.grid)
                rows[torch.from_numpy(follow)] = made
                self._computed += len(follow)
            rest = rest[~places.found[rest]]
        if len(rest):
            images = [self._image(shard.known, digest) for digest in digests[rest].tolist()]
            made, measured, failed = self._backbone().rows(images, output, places=shard.numbers[todo[rest]].tolist())
            if failed:
                raise SourceError(f"an image that was read before cannot be read now: {failed[0][1]}.")
            rows[torch.from_numpy(rest)], errors[rest] = made, measured.numpy()
            self._computed += len(rest)
        return rows, errors

    def _elsewhere(self, shard: DamagedShard, broken: set[Path]) -> SalvagedRows:
        copies = self._located(shard.layout, shard.digests, broken)
        tokens = self._tokens_of(shard.layout)
        return SalvagedRows(copies, None if tokens is None else (tokens, self._located(tokens, shard.digests, broken)))

    def _located(self, layout: Layout, digests: np.ndarray, broken: set[Path]) -> RowLocations:
        paths = [path for path in self.store.shard_paths(layout.output) if path not in broken]
        return find_by_digest([self.store.shard(path, layout) for path in paths], digests)

    def _backbone(self) -> StoreBackbone:
        if self._again is None:
            self._again = StoreBackbone(
                self.store, device=self.device, weights=self.weights, trust_code=self.trust_code
            )
        return self._again

    def _notes(self, layout: Layout, broken: set[Path]) -> dict[str, str]:
        """What a whole shard of this output says of how it was computed; else what the plan says."""
        for path in self.store.shard_paths(layout.output):
            if path not in broken:
                return self.store.shard(path, layout).notes
        with contextlib.suppress(CacheError):
            for device, plan in (self.store.plan or {}).items():
                return notes_for(self.store.fingerprint, device, plan)
        return {"fingerprint": self.store.fingerprint}

    def _named(self, gone: dict[bytes, str], views: list[View]) -> tuple[tuple[str, str], ...]:
        samples = ((name, d) for view in views for name, d in zip(view.ids, view.digests.tolist(), strict=True))
        return tuple(dict.fromkeys((name, gone[d]) for name, d in samples if d in gone))

    def _mend_small(self, path: Path, named: dict[Path, ReferencedShard], broken: set[Path]) -> bool:
        if path == self.store.path / "plan.json":
            return self._mend_plan(broken)
        if path == self.store.path / COST:
            forget_cost(self.store.path)  # nothing is made of it; the next extraction measures anew
            return True
        return path == canary.canary_path(self.store) and self._mend_canary(named)

    def _mend_plan(self, broken: set[Path]) -> bool:
        """The plan as whole shards have it noted; without any the next run makes one."""
        plan: dict[str, Any] = {}
        for path in (path for output in self._layouts for path in self.store.shard_paths(output) if path not in broken):
            notes = self.store.shard(path, self._layouts[path.parent.name]).notes
            with contextlib.suppress(CacheError, KeyError):  # it came from elsewhere and has several
                device = notes["device"]
                found = checked_plan({device: parse_json(notes["plan"], f"{path}: plan")}, path)
                plan.setdefault(device, found[device])
        self.store.replace_plan(plan)
        return True

    def _mend_canary(self, named: dict[Path, ReferencedShard]) -> bool:
        """A new reference, after some stored rows were computed again and agreed."""
        for path, known in named.items():
            whole, output = np.flatnonzero(known.is_whole())[:4], parse(known.layout.output)
            try:
                images = [self._image(known, digest) for digest in known.digests[whole].tolist()]
            except UnreadableImage:
                continue
            if not images:
                continue
            now, _, failed = self._backbone().rows(images, output, check=False)
            with open_regular(path) as file:
                data = b"".join(known.read(file, number) for number in known.numbers[whole].tolist())
            stored = np.frombuffer(bytearray(data), known.layout.dtype).reshape(-1, *known.layout.row_shape)
            if failed or not canary.is_within_tolerance(self.store.spec, now, torch.from_numpy(stored)):
                raise Drift(
                    f"{path} holds other rows than this machine computes of the same images, so "
                    f"{canary.canary_path(self.store)} cannot be made again here."
                )
            self._backbone().renew_canary(output)
            return True
        return False


def _bad(known: ReferencedShard) -> DamagedShard:
    """Rows of a damaged shard in their order, each once."""
    numbers, first = np.unique(known.numbers, return_index=True)
    whole = known.is_whole()
    return DamagedShard(known, known.digests[first], numbers, known.checksums[first], known.errors[first], whole[first])


def _as_named(view: View, row: int, data: EncodedImage) -> EncodedImage | None:
    """The image of a row, or its augmented copy, uint8 [H,W,3], made again; None where ``data`` is another image's."""
    digest, version = _images.digest(data).encode(), 0 if view.versions is None else int(view.versions[row])
    if version == 0 or view.augmented is None:
        return data if digest == view.digests[row] else None
    made = view.augmented.augmentation
    if made.digests(np.array([digest]), version)[0] != view.digests[row]:
        return None
    return made.made(_images.decode(data), bytes(view.digests[row])).permute(1, 2, 0).numpy()
