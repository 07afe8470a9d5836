"""Rm, gc, compact: move rows, repoint views, free files.

What becomes of a cache: views are removed, rows that no view names are freed, shards are put in a view's order.

A removed view leaves its rows where they are: another view may name them, and an extraction takes them up again. `gc`
frees what no view names. A row is needed only by views that name *it*: one that keeps `tokens-257` needs nothing of the
`tokens` it was made of.

Rows move to other shards: what `gc` and `compact` have in common.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featurecache.errors import BadOption, CacheError, FeatureCacheError
from featurecache.extraction.canary import canary_path
from featurecache.files import guard
from featurecache.files.atomic import check_room, draft_path, orphaned_files, remove_orphans, sync_path, writing
from featurecache.files.locks import exclusive_lock
from featurecache.outputs import parse
from featurecache.store.shards import (
    Layout,
    RowLocations,
    Shard,
    ShardWriter,
    find_by_key,
    read_rows,
    row_keys,
    shard_name,
)
from featurecache.store.store import Store, cache_folder, open_store, rows_per_shard, stores, unreadable_stores
from featurecache.store.timings import NAME as COST
from featurecache.store.timings import forget_cost
from featurecache.store.view import View
from featurecache.store.write_view import columns_of, find_view, write_view


@dataclass(frozen=True)
class RemovedView:
    """A view that was removed. ``images`` is None where it could not be read."""

    label: str
    path: Path
    images: int | None
    others: tuple[str, ...]  # views that the store still has


def remove_view(name: str | Path, cache: str | Path | None = None) -> RemovedView:
    """Remove a view; its rows stay until `collect`. Raises NotInCache, AmbiguousName, BadOption, InUse."""
    path = find_view(name, cache)
    try:
        store = open_store(path.parent)
    except CacheError as error:
        raise BadOption(f"{path} is no view in a store; only views are removed.") from error
    label, images = f"{store.path.name}/{path.stem}", None
    with contextlib.suppress(FeatureCacheError):  # a damaged one goes too
        view = View(path, columns_only=True)
        label, images = view.label, len(view)
    with exclusive_lock(store.path, f"rm {path.stem}"):
        store.sweep()
        with writing(path):
            path.unlink()
            forget_cost(store.path, path.stem)
            sync_path(store.path)
    return RemovedView(label, path, images, tuple(other.stem for other in store.views()))


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
    """Find what no view names, and with ``delete`` free it. Rows that stay keep bytes, checksums and errors.

    A store is left alone while somebody works in it, and when one of its views or shards cannot be read: nobody knows
    then what that view names.
    """
    folder = cache_folder(cache)
    drafts = list(_drafts(folder))
    size = sum(_size(path) for path in drafts)
    found = [StoreGarbage(path, left=str(error)) for path, error in unreadable_stores(folder)]
    for store in list(stores(folder)):
        try:
            found.append(_collect(store, delete))
        except CacheError as error:
            found.append(StoreGarbage(store.path, left=str(error)))
    if delete:
        for place in _places(folder):
            remove_orphans(place)
    return CollectResult(delete, tuple(found), tuple(drafts), size)


def _places(folder: Path) -> Iterator[Path]:
    """Folders in which drafts may lie."""
    yield folder
    for store in stores(folder):
        yield store.path
        yield from (path for path in store.path.iterdir() if path.is_dir() and not path.is_symlink())


def _drafts(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for place in _places(folder):
            yield from orphaned_files(place)


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.lstat().st_size for file in files)


def _collect(store: Store, delete: bool) -> StoreGarbage:
    if not delete:
        return _listed(store, *_unused(store))
    with exclusive_lock(store.path, "gc"):
        outputs, views = _unused(store)
        garbage = _listed(store, outputs, views)
        relocate(store, outputs, views)
        for output in outputs:
            _remove_if_empty(store.folder(output.layout.output))
        if garbage.folder:
            _remove_store(store)
    return garbage


def _unused(store: Store) -> tuple[list[OutputRelocation], list[Path]]:
    """What becomes of each output, and the paths of the views. Raises CacheError where something cannot be read."""
    views = [View(path, columns_only=True, copies=True) for path in store.views()]
    layouts = {**store.layouts(), **{name: view.layout(name) for view in views for name in view.outputs}}
    unread = [name for name in store.outputs() if name not in layouts]
    if unread:
        raise CacheError(f"no shard of {unread[0]} in {store.path} can be read. featurecache verify says why.")
    outputs = []
    for name, layout in sorted(layouts.items()):
        wanted = [keys_in(view, name) for view in views if name in view.outputs]
        rows = np.unique(np.concatenate([np.zeros(0, "S48"), *wanted]))
        outputs.append(plan_relocation(layout, _fullest_first(store.shards(layout), rows), rows))
    return outputs, [view.path for view in views]


def _fullest_first(shards: list[Shard], wanted: np.ndarray) -> list[Shard]:
    """Shards that may stay as they are before those that would lose rows."""
    needed = {shard.path: np.isin(row_keys(shard.digests, shard.checksums), wanted) for shard in shards}
    return sorted(shards, key=lambda shard: (-needed[shard.path].mean(), -needed[shard.path].sum(), shard.path))


def _listed(store: Store, outputs: list[OutputRelocation], views: list[Path]) -> StoreGarbage:
    kept = {name for path in views for name in View(path, columns_only=True).outputs}
    unused = tuple(
        UnusedRows(o.layout.output, len(o.drop), o.unused_rows, o.unused_bytes, _made_of(o.layout.output, kept))
        for o in outputs
        if o.unused_rows
    )
    empty = not views and not any(output.keep or output.split for output in outputs)
    others = _strange(store) if empty else ()
    return StoreGarbage(store.path, unused, empty and not others, others)


def _made_of(name: str, kept: set[str]) -> tuple[str, ...]:
    return tuple(sorted(other for other in kept - {name} if parse(other).derived and parse(other).source == name))


def _strange(store: Store) -> tuple[str, ...]:
    """Files in a store that featurecache did not put there."""
    ours = {"spec.json", "plan.json", canary_path(store).name, COST}
    found = []
    for path in sorted(store.path.rglob("*")):
        relative = path.relative_to(store.path)
        shard = len(relative.parts) == 2 and path in store.shard_paths(relative.parts[0])
        hidden = relative.name.startswith((".working-", ".alone-")) or relative.suffix == ".tmp"
        if not (path.is_dir() or shard or hidden or str(relative) in ours) or path.is_symlink():
            found.append(str(relative))
    return tuple(found)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


def _remove_store(store: Store) -> None:
    """Out of sight at once, then away: half a store is never seen."""
    hidden = draft_path(store.path)
    with writing(store.path):
        os.rename(store.path, hidden)
        sync_path(store.path.parent)
        shutil.rmtree(hidden)


@dataclass(frozen=True)
class CompactResult:
    """What `compact` did in the store of a view."""

    view: str
    shards: tuple[int, int]  # of the view's outputs, before and after
    pieces: tuple[int, int]  # runs of rows that follow each other, over all outputs
    written: int  # bytes


def compact(name: str | Path | None = None, cache: str | Path | None = None) -> CompactResult:
    """Put the rows of a view into shards in its order. Other views of the store get the same bytes from there too.

    Raises InUse, DamagedFile (before anything is removed), CannotWrite. Killed, the same command finishes.
    """
    view = View(find_view(name, cache), copies=True)
    store = open_store(view.store)
    with exclusive_lock(store.path, f"compact {view.name}"):
        store.sweep()
        views = [View(path, columns_only=True).path for path in store.views()]
        before, size = _spread(view), _bytes_in(store)
        ordered = {layout: _in_order(store, view, layout) for layout in (view.layout(key) for key in view.outputs)}
        needed = sum(_to_write(store, layout, unit) for layout, units in ordered.items() for unit in units)
        check_room(store.path, needed, "Free some space; nothing was changed.")
        moved = {layout: [copy_rows(store, unit, layout) for unit in units] for layout, units in ordered.items()}
        first = [shard for shards in moved.values() for shard in shards if shard is not None]
        written = _bytes_in(store) - size
        outputs = [_superseded(store, layout, first) for layout in ordered]
        relocate(store, outputs, views, first)
        after = _spread(View(view.path, copies=True))
    return CompactResult(view.label, (before[0], after[0]), (before[1], after[1]), written)


def _spread(view: View) -> tuple[int, int]:
    """(shards a view's rows lie in, runs of rows that follow each other), over all outputs."""
    indexes = [view.stored(name).index for name in view.outputs]
    pieces = sum(int(((np.diff(index[:, 0]) != 0) | (np.diff(index[:, 1]) != 1)).sum()) + 1 for index in indexes)
    return len(view.files), pieces


def _bytes_in(store: Store) -> int:
    return sum(path.stat().st_size for output in store.outputs() for path in store.shard_paths(output))


def _in_order(store: Store, view: View, layout: Layout) -> list[RowLocations]:
    """The distinct rows of a view in its order, in units of a shard's size."""
    wanted = keys_in(view, layout.output)
    _, first = np.unique(wanted, return_index=True)
    places = find_by_key(store.shards(layout), wanted[np.sort(first)])
    if not places.found.all():
        raise CacheError(f"{view.label} names rows of {layout.output} that lie in no shard. featurecache repair helps.")
    length = rows_per_shard(len(first), layout.row_bytes)
    return [places[start : start + length] for start in range(0, len(first), length)]


def _to_write(store: Store, layout: Layout, unit: RowLocations) -> int:
    return 0 if shard_path(store, layout, unit).exists() else len(unit.file) * layout.row_bytes


def _superseded(store: Store, layout: Layout, first: list[Shard]) -> OutputRelocation:
    """All rows of an output stay, those of ``first`` there; what has copies of them loses these."""
    shards = {shard.path: shard for shard in [*first, *store.shards(layout)] if shard.path.parent.name == layout.output}
    rows = [row_keys(shard.digests, shard.checksums) for shard in shards.values()]
    return plan_relocation(layout, list(shards.values()), np.concatenate(rows))


STRETCH = 16 << 20  # bytes of rows in hand at a time


def keys_in(view: View, output: str) -> np.ndarray:
    return row_keys(view.digests, view.stored(output).checksums)


@dataclass
class OutputRelocation:
    """One output of a store: its shards, and what becomes of them."""

    layout: Layout
    keep: list[Shard] = field(default_factory=list)
    drop: list[Shard] = field(default_factory=list)
    split: list[tuple[Shard, np.ndarray]] = field(default_factory=list)  # with the rows that stay, ascending
    trusted: list[tuple[Shard, np.ndarray]] = field(default_factory=list)  # rows of which another copy goes

    @property
    def new_bytes(self) -> int:
        return sum(len(rows) for _, rows in self.split) * self.layout.row_bytes

    @property
    def unused_rows(self) -> int:
        return sum(len(s.digests) for s in self.drop) + sum(len(s.digests) - len(rows) for s, rows in self.split)

    @property
    def unused_bytes(self) -> int:
        """Of whole shards the files, of others the rows."""
        parts = sum(len(shard.digests) - len(rows) for shard, rows in self.split)
        return sum(shard.size for shard in self.drop) + parts * self.layout.row_bytes


def plan_relocation(layout: Layout, shards: Sequence[Shard], wanted: np.ndarray) -> OutputRelocation:
    """Choose homes for the rows ``wanted`` (keys): the first of ``shards`` that has them. Raises CacheError where one
    lies nowhere."""
    wanted = np.unique(wanted)
    found = find_by_key(shards, wanted)
    if not found.found.all():
        raise CacheError(
            f"{int((~found.found).sum()):,} rows of {layout.output} that views name lie in no shard. "
            "featurecache verify lists what is damaged, featurecache repair computes it again."
        )
    result = OutputRelocation(layout)
    copies = _copies(shards, wanted)
    for number, shard in enumerate(shards):
        rows = np.sort(found.row[found.file == number])
        if len(rows) == len(shard.digests):
            result.keep.append(shard)
        elif len(rows):
            result.split.append((shard, rows))
        else:
            result.drop.append(shard)
        several = rows[np.isin(row_keys(shard.digests[rows], shard.checksums[rows]), copies)]
        if len(several):
            result.trusted.append((shard, several))
    return result


def _copies(shards: Sequence[Shard], wanted: np.ndarray) -> np.ndarray:
    """Keys that stand in the shards more than once."""
    if not shards:
        return wanted[:0]
    distinct, counts = np.unique(
        np.concatenate([row_keys(shard.digests, shard.checksums) for shard in shards]), return_counts=True
    )  # fmt: skip
    return np.intersect1d(distinct[counts > 1], wanted)


def relocate(
    store: Store, outputs: Sequence[OutputRelocation], views: Iterable[Path], first: Sequence[Shard] = ()
) -> None:
    """New shards, views on them, old files away. ``first``: shards whose copies of rows the views shall take.

    Raises DamagedFile before anything is removed when a row that is to stay does not have its checksum.
    """
    check_room(store.path, sum(output.new_bytes for output in outputs), "Free some space; nothing was changed.")
    homes: dict[str, list[Shard]] = {}
    going: list[Shard] = []
    for output in outputs:
        for shard, rows in output.trusted:
            verify_rows(shard, rows, output.layout)
        stay = [copy_rows(store, _some(shard, rows), output.layout) or shard for shard, rows in output.split]
        chosen = [shard for shard in first if shard.path.parent.name == output.layout.output]
        homes[output.layout.output] = list({s.path: s for s in [*chosen, *stay, *output.keep]}.values())
        kept = {shard.path for shard in homes[output.layout.output]}
        going += [s for s in [*output.drop, *(shard for shard, _ in output.split)] if s.path not in kept]
    gone = {shard.path for shard in going}
    for path in views:
        repoint_view(store, path, homes, gone)
    for folder in {remove(path).parent for path in sorted(gone)}:
        with writing(folder):
            sync_path(folder)


def remove(path: Path) -> Path:
    with writing(path):
        path.unlink(missing_ok=True)
    return path


def verify_rows(shard: Shard, rows: np.ndarray, layout: Layout) -> None:
    """Raises DamagedFile when one of the rows does not have its checksum."""
    step = max(1, STRETCH // layout.row_bytes)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        read_rows(_some(shard, part), layout)


def _some(shard: Shard, rows: np.ndarray) -> RowLocations:
    return RowLocations((shard,), np.zeros(len(rows), np.int64), rows)


def copy_rows(store: Store, places: RowLocations, layout: Layout) -> Shard | None:
    """Write rows that lie anywhere into one new shard, in the order of ``places``, with their bytes, errors and notes.

    A file that has its name and these bytes is taken for it. None where one with other bytes has the name.
    """
    digests, path = _digests(places), shard_path(store, layout, places)
    if path.exists():
        there = store.shard(path, layout)
        if not np.array_equal(there.checksums, places.checksums):
            return None
        verify_rows(there, np.arange(len(digests)), layout)
        return there
    notes = _notes([places.shards[k].notes for k in np.unique(places.file)])
    writer = ShardWriter(store.path, digests, layout, notes)
    try:
        step = max(1, STRETCH // layout.row_bytes)
        for start in range(0, len(digests), step):
            part = places[start : start + step]
            writer.append(digests[start : start + step].tolist(), read_rows(part, layout).numpy(), part.errors)
        written = writer.commit()
    finally:
        writer.discard()
    assert written is not None
    return store.shard(written, layout)


def shard_path(store: Store, layout: Layout, places: RowLocations) -> Path:
    """Where a shard of these rows has its place."""
    return store.folder(layout.output) / f"{shard_name(_digests(places))}.h5"


def _digests(places: RowLocations) -> np.ndarray:
    starts = np.cumsum([0, *(len(shard.digests) for shard in places.shards)])
    found: np.ndarray = np.concatenate([shard.digests for shard in places.shards])[starts[places.file] + places.row]
    return found


def _notes(several: Sequence[dict[str, str]]) -> dict[str, str]:
    """Attributes of a shard with rows of several: where they differ, all of them as a JSON list."""
    found = {}
    for key in dict.fromkeys(key for notes in several for key in notes):
        values = list(dict.fromkeys(notes[key] for notes in several if key in notes))
        found[key] = values[0] if len(values) == 1 else json.dumps(values)
    return found


def repoint_view(store: Store, path: Path, homes: dict[str, list[Shard]], gone: set[Path]) -> None:
    """Write a view that names shards in ``gone`` on those that stay. Its bytes stay what they are, and its time: it is
    no newer than it was."""
    view = View(path, columns_only=True, copies=True)
    if not gone & {view.store / entry["path"].decode() for entry in view.files}:
        return
    located = {}
    for name in view.outputs:
        layout = view.layout(name)
        shards = homes[name] if name in homes else store.shards(layout)
        located[layout] = places = find_by_key(shards, keys_in(view, name))
        assert places.found.all(), "every row that a view names has a home"
    stat = path.stat()
    write_view(store, view.name, columns_of(view), view.attributes, located)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    guard.own([path])  # it has another ctime now
