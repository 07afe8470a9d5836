"""Remove views, collect garbage, compact a store: rows move to other shards, views follow them, files are freed.

A removed view leaves its rows where they are: another view may name them, and an extraction takes them up again.
`collect` frees what no view names. A row is needed only by views that name *it*: one that keeps `tokens-257` needs
nothing of the `tokens` it was made of. `compact` puts the rows of a view into shards in its order.

A row is known by its digest *and* the checksum of its bytes: two machines may have computed one image with last bits
that differ, and a view keeps the bytes it has. For each row that is to stay one *home* is chosen, a shard that has it.
A shard in which all rows are at home stays as it is, one in which none is goes, of the others the rows at home are
written to a new shard. The order: new shards are committed, views are written on them, only then the old files go.
Killed between any two steps nothing is lost, and the same command begins anew with what it finds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from featurecache.errors import BadOption, CacheError, FeatureCacheError
from featurecache.files.atomic import check_room, orphaned_files, remove_orphans, sync_path, temporary_path, writing
from featurecache.files.locks import MARKS, exclusive_lock
from featurecache.formatting import counted
from featurecache.outputs import parse
from featurecache.store.reference import canary_path
from featurecache.store.shards import (
    Layout,
    RowLocations,
    Shard,
    ShardWriter,
    find_by_key,
    read_feature_rows,
    row_keys,
    shard_name,
)
from featurecache.store.store import Store, open_store, own_cache, rows_per_shard, stores, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import find_view, rewrite_view

STRETCH = 16 << 20  # bytes of rows in hand at a time
_ROOM = "Free some space; nothing was changed."


@dataclass(frozen=True)
class RemovedView:
    """A view that was removed. ``images`` is None where it could not be read, ``bytes`` where some view could not."""

    label: str
    path: Path
    images: int | None
    others: tuple[str, ...]  # views that the store still has
    bytes: int | None  # of rows that none of these names


def remove_view(name: str | Path, cache: str | Path | None = None) -> RemovedView:
    """Remove a view; its rows stay until `collect`. Raises NotInCache, AmbiguousName, BadOption, InUse."""
    path = find_view(name, own_cache(cache, "rm"))
    try:
        store = open_store(path.parent)
    except CacheError as error:
        raise BadOption(f"{path} is no view in a store; only views are removed.") from error
    label, images = f"{store.path.name}/{path.stem}", None
    with contextlib.suppress(FeatureCacheError):  # a damaged one goes too
        view = View(path, columns_only=True)
        label, images = view.label, len(view)
    size = None
    with exclusive_lock(store.path, f"rm {path.stem}"):
        store.sweep()
        with contextlib.suppress(FeatureCacheError):
            size = _own_bytes(path, [other for other in store.views() if other != path])
        with writing(path):
            path.unlink()
            sync_path(store.path)
    return RemovedView(label, path, images, tuple(other.stem for other in store.views()), size)


def _own_bytes(path: Path, others: Sequence[Path]) -> int:
    """Of the rows of a view that no other one names."""
    view, *named = (View(each, columns_only=True, copies=True) for each in (path, *others))
    rows = {name: set(_keys(view, name).tolist()) for name in view.outputs}
    for name, each in product(rows, named):
        rows[name] -= set(_keys(each, name).tolist()) if name in each.outputs else set()
    return sum(len(keys) * view.info(name).row_bytes for name, keys in rows.items())


@dataclass(frozen=True)
class UnusedRows:
    """Of one output: what no view names."""

    output: str
    shards: int  # whole ones
    rows: int
    bytes: int
    derived: tuple[str, ...]  # kept by a view and made of this; it needs none of it


@dataclass(frozen=True)
class StoreGarbage:
    """Of one store: what is freed, or would be. ``left``: why nothing of it is touched."""

    store: Path
    outputs: tuple[UnusedRows, ...] = ()
    folder: bool = False  # the store itself, in which nothing is left
    others: tuple[str, ...] = ()  # strange files that keep an empty store
    left: str | None = None

    @property
    def bytes(self) -> int:
        return sum(output.bytes for output in self.outputs)


@dataclass(frozen=True)
class CollectResult:
    """What `collect` found; ``deleted``: and freed."""

    deleted: bool
    stores: tuple[StoreGarbage, ...]
    drafts: tuple[Path, ...]  # unfinished files of processes that are gone
    draft_bytes: int

    @property
    def bytes(self) -> int:
        return sum(garbage.bytes for garbage in self.stores) + self.draft_bytes


def collect(cache: str | Path | None = None, *, delete: bool = False) -> CollectResult:
    """Garbage collection: find rows that no view names, and with ``delete`` free them; all others keep bytes,
    checksums and errors. A store is left alone while somebody works in it, and when one of its views or shards cannot
    be read: nobody knows then what that view names."""
    cache = own_cache(cache, "gc")
    drafts = [path for folder in _folders(cache) for path in orphaned_files(folder)]
    files = [file for path in drafts for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()]
    size = sum(file.lstat().st_size for file in files)
    garbage = [StoreGarbage(path, left=str(error)) for path, error in unreadable_stores(cache)]
    for store in list(stores(cache)):
        try:
            garbage.append(_collect(store) if delete else _plan_collection(store)[0])
        except CacheError as error:
            garbage.append(StoreGarbage(store.path, left=str(error)))
    for folder in _folders(cache) if delete else ():
        remove_orphans(folder)
    return CollectResult(delete, tuple(garbage), tuple(drafts), size)


def _folders(cache: Path) -> list[Path]:
    """Folders in which drafts may lie."""
    within = [path for store in stores(cache) for path in (store.path, *store.path.iterdir())]
    return [cache, *(path for path in within if path.is_dir() and not path.is_symlink())] if cache.is_dir() else []


def _collect(store: Store) -> StoreGarbage:
    with exclusive_lock(store.path, "gc"):
        garbage, outputs, views = _plan_collection(store)
        relocate(store, outputs, views)
        for output in outputs:
            with contextlib.suppress(OSError):  # not empty, or not there
                store.folder(output.layout.output).rmdir()
        if garbage.folder:
            hidden = temporary_path(store.path)
            with writing(store.path):
                os.rename(store.path, hidden)  # out of sight at once, then away: half a store is never seen
                sync_path(store.path.parent)
                shutil.rmtree(hidden)
    return garbage


def _plan_collection(store: Store) -> tuple[StoreGarbage, list[OutputRelocation], list[View]]:
    """What is freed, what becomes of each output, and the views. Raises CacheError where something cannot be read."""
    views = [View(path, columns_only=True, copies=True) for path in store.views()]
    layouts = {**store.layouts(), **{name: view.info(name) for view in views for name in view.outputs}}
    if unread := [name for name in store.outputs() if name not in layouts]:
        raise CacheError(f"no shard of {unread[0]} in {store.path} can be read. featurecache verify says why.")
    outputs, unused = [], []
    viewed = [parse(name) for name in sorted({name for view in views for name in view.outputs})]
    for name, layout in sorted(layouts.items()):
        rows = np.unique(np.concatenate([np.zeros(0, "S48"), *(_keys(v, name) for v in views if name in v.outputs)]))
        shards = store.shards(layout)
        needed = {shard.path: np.isin(row_keys(shard.digests, shard.checksums), rows) for shard in shards}
        # Shards that may stay as they are come before those that would lose rows.
        shards.sort(key=lambda shard: (-needed[shard.path].mean(), -needed[shard.path].sum(), shard.path))
        outputs.append(output := plan_relocation(layout, shards, rows))
        if output.unused_rows:
            without = {each for view in views if name not in view.outputs for each in view.outputs}
            derived = tuple(o.name for o in viewed if o.name in without and o.is_derived and o.source == name)
            unused.append(UnusedRows(name, len(output.drop), output.unused_rows, output.unused_bytes, derived))
    empty = not views and not any(output.keep or output.split for output in outputs)
    others = _strange_files(store) if empty else ()
    return StoreGarbage(store.path, tuple(unused), empty and not others, others), outputs, views


def _keys(view: View, output: str) -> np.ndarray:
    return row_keys(view.digests, view.stored(output).checksums)


def _strange_files(store: Store) -> tuple[str, ...]:
    """Files in a store that featurecache did not put there."""
    ours = {store.path / "spec.json", store.path / "plan.json", canary_path(store)}
    ours |= {path for output in store.outputs() for path in store.shard_paths(output)}

    def is_ours(path: Path) -> bool:
        return path.is_dir() or path.name.startswith(MARKS) or path.suffix == ".tmp" or path in ours

    paths = [path for path in sorted(store.path.rglob("*")) if path.is_symlink() or not is_ours(path)]
    return tuple(str(path.relative_to(store.path)) for path in paths)


@dataclass(frozen=True)
class CompactResult:
    """What `compact` did in the store of a view."""

    view: str
    shards: tuple[int, int]  # of the view's outputs, before and after
    pieces: tuple[int, int]  # runs of rows that follow each other, over all outputs
    written: int  # bytes


def compact(name: str | Path | None = None, cache: str | Path | None = None) -> CompactResult:
    """Put the rows of a view into shards in its order. Other views of the store get the same bytes from there too.
    Raises InUse, DamagedFile (before anything is removed), CannotWrite. Killed, the same command finishes."""
    view = View(find_view(name, own_cache(cache, "compact")), copies=True)
    store = open_store(view.store)
    with exclusive_lock(store.path, f"compact {view.name}"):
        store.sweep()
        views = [View(path, columns_only=True, copies=True) for path in store.views()]
        before, layouts = _pieces(view), list(view.outputs.values())
        there = {path for output in store.outputs() for path in store.shard_paths(output)}
        units = [(layout, rows) for layout in layouts for rows in _in_order(store, view, layout)]
        new = [(layout, rows) for layout, rows in units if _path(store, layout, rows) not in there]
        check_room(store.path, sum(len(rows.file) * layout.row_bytes for layout, rows in new), _ROOM)
        sizes = {shard.path: shard.size for layout, rows in units if (shard := copy_rows(store, rows, layout))}
        outputs = []
        for layout in layouts:  # all rows of an output stay, those of the view in its own shards
            shards = sorted(store.shards(layout), key=lambda shard: shard.path not in sizes)
            rows = np.concatenate([row_keys(shard.digests, shard.checksums) for shard in shards])
            outputs.append(plan_relocation(layout, shards, rows))
        relocate(store, outputs, views)
        after = _pieces(View(view.path, copies=True))
    written = sum(size for path, size in sizes.items() if path not in there)
    return CompactResult(view.label, (before[0], after[0]), (before[1], after[1]), written)


def _pieces(view: View) -> tuple[int, int]:
    """(shards a view's rows lie in, runs of rows that follow each other), over all outputs."""
    steps = [np.diff(view.stored(name).index, axis=0) for name in view.outputs]
    return len(view.files), sum(int((step != (0, 1)).any(axis=1).sum()) + 1 for step in steps)


def _in_order(store: Store, view: View, layout: Layout) -> list[RowLocations]:
    """The distinct rows of a view in its order, in units of a shard's size."""
    wanted = _keys(view, layout.output)
    first = np.unique(wanted, return_index=True)[1]
    places = find_by_key(store.shards(layout), wanted[np.sort(first)])
    if not places.mask.all():
        raise CacheError(f"{view.label} names rows of {layout.output} that lie in no shard. featurecache repair helps.")
    length = rows_per_shard(len(first), layout.row_bytes)
    return [places[start : start + length] for start in range(0, len(first), length)]


@dataclass
class OutputRelocation:
    """One output of a store: its shards, and what becomes of them."""

    layout: Layout
    keep: list[Shard] = field(default_factory=list)
    drop: list[Shard] = field(default_factory=list)
    split: list[RowLocations] = field(default_factory=list)  # of one shard each: the rows that stay, ascending
    trusted: list[RowLocations] = field(default_factory=list)  # rows of which another copy goes
    unused_rows: int = 0
    unused_bytes: int = 0  # of whole shards the files, of others the rows


def plan_relocation(layout: Layout, shards: Sequence[Shard], wanted: np.ndarray) -> OutputRelocation:
    """Choose homes for the rows ``wanted`` (keys): the first of ``shards`` that has them. Raises CacheError where one
    lies nowhere."""
    wanted = np.unique(wanted)
    places = find_by_key(shards, wanted)
    if not places.mask.all():
        raise CacheError(
            f"No shard has {counted(int((~places.mask).sum()), 'row')} of {layout.output} that views name. "
            "featurecache verify lists what is damaged, featurecache repair computes it again."
        )
    stored = [row_keys(shard.digests, shard.checksums) for shard in shards]
    distinct, counts = np.unique(np.concatenate([wanted[:0], *stored]), return_counts=True)
    several = distinct[counts > 1]  # stand in the shards more than once
    result = OutputRelocation(layout)
    for number, shard in enumerate(shards):
        rows = np.sort(places.row[places.file == number])
        if len(rows) == len(shard.digests):
            result.keep.append(shard)
        elif len(rows):
            result.split.append(_rows_of(shard, rows))
            result.unused_bytes += (len(shard.digests) - len(rows)) * layout.row_bytes
        else:
            result.drop.append(shard)
            result.unused_bytes += shard.size
        result.unused_rows += len(shard.digests) - len(rows)
        if len(rows := rows[np.isin(stored[number][rows], several)]):
            result.trusted.append(_rows_of(shard, rows))
    return result


def _rows_of(shard: Shard, rows: np.ndarray) -> RowLocations:
    return RowLocations((shard,), np.zeros(len(rows), np.int64), rows)


def relocate(store: Store, outputs: Sequence[OutputRelocation], views: Iterable[View]) -> None:
    """New shards, views on them, old files away. Raises DamagedFile before anything is removed when a row that is to
    stay does not have its checksum."""
    check_room(store.path, sum(len(rows.row) * o.layout.row_bytes for o in outputs for rows in o.split), _ROOM)
    homes: dict[str, list[Shard]] = {}
    gone: set[Path] = set()
    for output in outputs:
        for rows in output.trusted:
            deque(_checked_rows(rows, output.layout), maxlen=0)
        stay = [copy_rows(store, rows, output.layout) or rows.shards[0] for rows in output.split]
        homes[output.layout.output] = shards = [*output.keep, *stay]  # in this order: one that could not be split last
        gone |= {shard.path for shard in [*output.drop, *(rows.shards[0] for rows in output.split)]}
        gone -= {shard.path for shard in shards}
    for view in views:
        if gone & {view.store / entry["path"].decode() for entry in view.files}:
            shards_of = {layout: homes.get(name) or store.shards(layout) for name, layout in view.outputs.items()}
            located = {layout: find_by_key(shards, _keys(view, layout.output)) for layout, shards in shards_of.items()}
            rewrite_view(view, store, located)
    for path in sorted(gone):
        with writing(path):
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in gone}:
        with writing(folder):
            sync_path(folder)


def _checked_rows(places: RowLocations, layout: Layout) -> Iterator[tuple[RowLocations, np.ndarray]]:
    """Rows [n, ...], so many at a time. Raises DamagedFile when one of them does not have its checksum."""
    step = max(1, STRETCH // layout.row_bytes)
    for start in range(0, len(places.row), step):
        part = places[start : start + step]
        yield part, read_feature_rows(part, layout).numpy()


def copy_rows(store: Store, places: RowLocations, layout: Layout) -> Shard | None:
    """Write rows that lie anywhere into one new shard, in the order of ``places``, with their bytes, errors and notes.
    A file that has its name and these bytes is taken for it. None where one with other bytes has the name."""
    digests, path = places.digests, _path(store, layout, places)
    if path.exists():
        there = store.shard(path, layout)
        if not np.array_equal(there.checksums, places.checksums):
            return None
        deque(_checked_rows(_rows_of(there, np.arange(len(digests))), layout), maxlen=0)
        return there
    notes = [places.shards[k].notes for k in np.unique(places.file)]
    values = {key: list(dict.fromkeys(n[key] for n in notes if key in n)) for each in notes for key in each}
    # Of rows of several shards what these say, all of it as a JSON list where they differ.
    notes_of_all = {key: each[0] if len(each) == 1 else json.dumps(each) for key, each in values.items()}
    with contextlib.closing(ShardWriter(store.path, digests, layout, notes_of_all)) as writer:
        for part, rows in _checked_rows(places, layout):
            writer.append(part.digests.tolist(), rows, part.errors)
        writer.commit()
    return store.shard(path, layout)


def _path(store: Store, layout: Layout, places: RowLocations) -> Path:
    """Where a shard of these rows has its place."""
    return store.folder(layout.output) / f"{shard_name(places.digests)}.h5"
