"""Merge another cache into this one, say from another machine: its rows, then its views. The other is never changed.

Stores are the same when their fingerprints are. Before a row is taken over, what both made of the probe images has to
agree. Shards with rows that are not here are copied whole, and the bytes of the copy compared with the hash the shard
was written with; of a row that both have ours stays. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, CacheError, DamagedFile, Drift, FeatureCacheError, NotInCache
from featurecache.extraction import canary
from featurecache.files.atomic import AtomicFile, check_room, hash_from, open_regular, write_whole
from featurecache.files.directory import USER_BLOCK
from featurecache.files.locks import exclusive_lock
from featurecache.files.mirror import fetch
from featurecache.formatting import byte_bar
from featurecache.store.reference import canary_path
from featurecache.store.shards import Layout, Shard, find_by_digest
from featurecache.store.store import Store, cache_folder, create_store, find_store, own_cache, stores, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import rewrite_view

_PIECE = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class MergedView:
    """What became of a view of the other cache: "copied", "renamed" (another of that name is here), "here" already,
    or "left" for a reason."""

    name: str
    here: str
    what: str
    reason: str = ""


@dataclass(frozen=True)
class MergeResult:
    """What came of one store of the other cache. ``store`` is None where nothing of it was taken."""

    source: Path
    store: Path | None
    new: bool = False
    shards: int = 0
    rows: int = 0  # that were not here
    bytes: int = 0
    views: tuple[MergedView, ...] = ()
    left: tuple[str, ...] = ()  # what was not taken, and why; each one sentence

    @property
    def complete(self) -> bool:
        return not self.left and all(view.what != "left" for view in self.views)


@exact_arithmetic()
def merge(other: str | Path, cache: str | Path | None = None, *, progress: bool = False) -> list[MergeResult]:
    """Take over what the cache ``other`` holds and ``cache`` does not; one record for each of its stores. Raises
    BadOption, NotInCache, CannotWrite, InUse."""
    folder, theirs = own_cache(cache, "merge"), cache_folder(other)
    if (theirs / "spec.json").exists():
        raise BadOption(f"{theirs} is one store; give the folder of the cache it lies in, {theirs.absolute().parent}.")
    if folder.exists() and theirs.exists() and folder.samefile(theirs):
        raise BadOption(f"{theirs} is this cache itself; --cache names the one to merge into.")
    results = [MergeResult(path, None, left=(str(error),)) for path, error in unreadable_stores(theirs)]
    for source in list(stores(theirs)):
        try:
            results.append(_merge(source, folder, progress))
        except (CacheError, NotInCache) as error:
            results.append(MergeResult(source.path, None, left=(str(error),)))
    if not results:
        raise NotInCache(f"there is no store in {theirs}.")
    return results


def _merge(source: Store, folder: Path, progress: bool) -> MergeResult:
    new = find_store(folder, source.spec) is None
    kin = source.path.name.rpartition("-")[0] or source.path.name
    mine = create_store(folder, kin, source.spec, source.provenance)
    with exclusive_lock(mine.path, f"merge of {source.path}"):
        mine.sweep()
        _agree(mine, source)
        wanted, left = _missing_shards(mine, source)
        needed = sum(shard.size for _, shard, _ in wanted)
        check_room(mine.path, needed, "Choose another disk with --cache.")
        if mine.plan is None and source.plan is not None:  # where there are a plan and a reference here, ours stay
            write_whole(mine.path / "plan.json", (source.path / "plan.json").read_bytes())
        if (theirs := canary.read_canary(source)) is not None and not canary_path(mine).exists():
            canary.write_canary(mine, theirs)
        shards = rows = size = 0
        with byte_bar(needed, source.path.name, progress) as bar:
            for layout, shard, missing in wanted:
                try:
                    copy_shard(shard, mine.folder(layout.output) / shard.path.name, bar.update)
                except DamagedFile as error:
                    left.append(str(error))
                else:
                    shards, rows, size = shards + 1, rows + missing, size + shard.size
        views = tuple(_take_view(mine, source, path) for path in source.views())
    return MergeResult(source.path, mine.path, new, shards, rows, size, views, tuple(left))


def _agree(mine: Store, source: Store) -> None:
    """Raises Drift when the two made something else of the probe images."""
    ours, theirs = canary.read_canary(mine), canary.read_canary(source)
    if ours is None or theirs is None:
        return
    here, there = ours.made_by, theirs.made_by
    differ = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    words = [f"{name} {here.get(name, 'none')} here, {there.get(name, 'none')} there" for name in differ]
    why = f"They differ in {'; '.join(words)}." if words else "Both were made with the same versions."
    same_size = ours.pixels.shape == theirs.pixels.shape
    shift = int((ours.pixels.int() - theirs.pixels.int()).abs().max()) if same_size else 255
    if shift > 1:
        raise Drift(
            f"{source.path} saw other pixels of the probe images than {mine.path} (by {shift} of 255). Its rows are "
            f"not taken. {why}"
        )
    for name in sorted(ours.rows.keys() & theirs.rows.keys()):
        if not canary.is_within_tolerance(mine.spec, theirs.rows[name], ours.rows[name]):
            far = canary.relative_distance(theirs.rows[name], ours.rows[name])
            raise Drift(
                f"{source.path} made another {name} of the probe images than {mine.path} (distance {far:.1g}). "
                f"Its rows are not taken. {why}"
            )


def _missing_shards(mine: Store, source: Store) -> tuple[list[tuple[Layout, Shard, int]], list[str]]:
    """Shards of ``source`` with the number of rows that are not in ``mine``; and what cannot be taken, and why."""
    ours, layouts, wanted = mine.layouts(), source.layouts(), []
    unread = [name for name in source.outputs() if name not in layouts]
    left = [f"{name} of {source.path} has no shard that can be read." for name in unread]
    for name, layout in layouts.items():
        if ours.get(name, layout) != layout:
            left.append(f"{name} of {source.path} has rows of another shape than here.")
            continue
        here = np.concatenate([np.zeros(0, "S32"), *(shard.digests for shard in mine.shards(layout))])
        for path in source.shard_paths(name):
            try:
                shard = source.shard(path, layout)
            except CacheError as error:
                left.append(str(error))
                continue
            if len(missing := np.setdiff1d(shard.digests, here)):
                wanted.append((layout, shard, len(missing)))
                here = np.concatenate([here, missing])
    return wanted, left


def copy_shard(shard: Shard, target: Path, advance: Callable[[int], object]) -> None:
    """The same bytes under another folder, or nothing. Raises DamagedFile when they are not those that were hashed."""
    fetch([shard.path])
    with open_regular(shard.path) as file, AtomicFile(target) as draft:
        offset = 0
        while piece := file.read(_PIECE):
            draft.write(offset, piece)
            offset += len(piece)
            advance(len(piece))
        if offset != shard.size or hash_from(draft.fileno(), USER_BLOCK) != shard.hash:
            raise DamagedFile(
                f"{shard.path} is damaged: its content does not match the hash in its first line. Not taken."
            )
        draft.commit()


def _take_view(mine: Store, source: Store, path: Path) -> MergedView:
    """The view on shards here; of a row in several, a shard that the other cache has not comes first: it is ours."""
    try:
        view = View(path, columns_only=True, copies=True)
        for number in count(1):
            name = view.name if number == 1 else f"{view.name}-{number}"
            target = mine.path / f"{name}.h5"
            if not target.exists():
                break
            if _same(view, View(target, columns_only=True, copies=True)):
                return MergedView(view.name, name, "here")
        located = {}
        for layout in view.outputs.values():
            theirs = {path.name for path in source.shard_paths(layout.output)}
            shards = sorted(mine.shards(layout), key=lambda shard: shard.path.name in theirs)
            located[layout] = places = find_by_digest(shards, view.digests)
            if missing := int((~places.mask).sum()):
                reason = f"{view.path} is not taken: {missing:,} of its rows of {layout.output} could not be copied."
                return MergedView(path.stem, "", "left", reason)
        rewrite_view(view, mine, located, name=name)
    except FeatureCacheError as error:
        return MergedView(path.stem, "", "left", str(error))
    return MergedView(view.name, name, "copied" if name == view.name else "renamed")


def _same(a: View, b: View) -> bool:
    """Whether two views say the same of the same images; where the images lay does not count."""
    fields = ("classes", "task", "failed", "augmented", "outputs")
    plain = all(getattr(a, field) == getattr(b, field) for field in fields) and list(a.meta) == list(b.meta)
    columns = [(v.ids, v.splits, v.groups, v.labels, v.digests, *v.meta.values()) for v in (a, b)]
    same = (np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in zip(*columns, strict=False))
    return plain and all(same)
