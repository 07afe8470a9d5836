"""What becomes of a cache: views are removed, rows that no view names are freed, shards are put in a view's order.

A removed view leaves its rows where they are: another view may name them, and an extraction takes them up again. `gc`
frees what no view names. A row is needed only by views that name *it*: one that keeps `tokens-257` needs nothing of the
`tokens` it was made of.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurecache.canary import canary_path
from featurecache.costs import NAME as COST
from featurecache.costs import forget_cost
from featurecache.errors import BadOption, CacheError, FeatureCacheError
from featurecache.exporting import check_room
from featurecache.files import dead_drafts, draft_path, sweep_drafts, sync_path, writing
from featurecache.locks import alone
from featurecache.missing import shard_rows
from featurecache.outputs import parse
from featurecache.reader import View
from featurecache.settling import Output, carry_out, keys_in, move, plan, shard_path
from featurecache.shards import Layout, Located, Shard, find, keys
from featurecache.stores import Store, cache_folder, open_store, stores, unreadable_stores
from featurecache.views import find_view


@dataclass(frozen=True)
class Removed:
    """A view that was removed. ``images`` is None where it could not be read."""

    label: str
    path: Path
    images: int | None
    others: tuple[str, ...]  # views that the store still has


def remove_view(name: str | Path, cache: str | Path | None = None) -> Removed:
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
    with alone(store.path, f"rm {path.stem}"):
        store.sweep()
        with writing(path):
            path.unlink()
            forget_cost(store.path, path.stem)
            sync_path(store.path)
    return Removed(label, path, images, tuple(other.stem for other in store.views()))


@dataclass(frozen=True)
class Unused:
    """Of one output: what no view names."""

    output: str
    shards: int  # whole ones
    rows: int
    bytes: int
    derived: tuple[str, ...]  # kept by a view and made of this; it needs none of it


@dataclass(frozen=True)
class Garbage:
    """Of one store: what is freed, or would be. ``left``: why nothing of it is touched."""

    store: Path
    outputs: tuple[Unused, ...] = ()
    folder: bool = False  # the store itself, in which nothing is left
    others: tuple[str, ...] = ()  # strange files that keep an empty store
    left: str | None = None

    @property
    def bytes(self) -> int:
        return sum(output.bytes for output in self.outputs)


@dataclass(frozen=True)
class Collected:
    """What `collect` found; ``deleted``: and freed."""

    deleted: bool
    stores: tuple[Garbage, ...]
    drafts: tuple[Path, ...]  # unfinished files of processes that are gone
    draft_bytes: int

    @property
    def bytes(self) -> int:
        return sum(garbage.bytes for garbage in self.stores) + self.draft_bytes


def collect(cache: str | Path | None = None, *, delete: bool = False) -> Collected:
    """Find what no view names, and with ``delete`` free it. Rows that stay keep bytes, checksums and errors.

    A store is left alone while somebody works in it, and when one of its views or shards cannot be read: nobody knows
    then what that view names.
    """
    folder = cache_folder(cache)
    drafts = list(_drafts(folder))
    size = sum(_size(path) for path in drafts)
    found = [Garbage(path, left=str(error)) for path, error in unreadable_stores(folder)]
    for store in list(stores(folder)):
        try:
            found.append(_collect(store, delete))
        except CacheError as error:
            found.append(Garbage(store.path, left=str(error)))
    if delete:
        for place in _places(folder):
            sweep_drafts(place)
    return Collected(delete, tuple(found), tuple(drafts), size)


def _places(folder: Path) -> Iterator[Path]:
    """Folders in which drafts may lie."""
    yield folder
    for store in stores(folder):
        yield store.path
        yield from (path for path in store.path.iterdir() if path.is_dir() and not path.is_symlink())


def _drafts(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for place in _places(folder):
            yield from dead_drafts(place)


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.lstat().st_size for file in files)


def _collect(store: Store, delete: bool) -> Garbage:
    if not delete:
        return _listed(store, *_unused(store))
    with alone(store.path, "gc"):
        outputs, views = _unused(store)
        garbage = _listed(store, outputs, views)
        carry_out(store, outputs, views)
        for output in outputs:
            _remove_if_empty(store.folder(output.layout.output))
        if garbage.folder:
            _remove_store(store)
    return garbage


def _unused(store: Store) -> tuple[list[Output], list[Path]]:
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
        outputs.append(plan(layout, _fullest_first(store.shards(layout), rows), rows))
    return outputs, [view.path for view in views]


def _fullest_first(shards: list[Shard], wanted: np.ndarray) -> list[Shard]:
    """Shards that may stay as they are before those that would lose rows."""
    needed = {shard.path: np.isin(keys(shard.digests, shard.checksums), wanted) for shard in shards}
    return sorted(shards, key=lambda shard: (-needed[shard.path].mean(), -needed[shard.path].sum(), shard.path))


def _listed(store: Store, outputs: list[Output], views: list[Path]) -> Garbage:
    kept = {name for path in views for name in View(path, columns_only=True).outputs}
    unused = tuple(
        Unused(o.layout.output, len(o.drop), o.unused_rows, o.unused_bytes, _made_of(o.layout.output, kept))
        for o in outputs
        if o.unused_rows
    )
    empty = not views and not any(output.keep or output.split for output in outputs)
    others = _strange(store) if empty else ()
    return Garbage(store.path, unused, empty and not others, others)


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
class Compacted:
    """What `compact` did in the store of a view."""

    view: str
    shards: tuple[int, int]  # of the view's outputs, before and after
    pieces: tuple[int, int]  # runs of rows that follow each other, over all outputs
    written: int  # bytes


def compact(name: str | Path | None = None, cache: str | Path | None = None) -> Compacted:
    """Put the rows of a view into shards in its order. Other views of the store get the same bytes from there too.

    Raises InUse, DamagedFile (before anything is removed), CannotWrite. Killed, the same command finishes.
    """
    view = View(find_view(name, cache), copies=True)
    store = open_store(view.store)
    with alone(store.path, f"compact {view.name}"):
        store.sweep()
        views = [View(path, columns_only=True).path for path in store.views()]
        before, size = _spread(view), _bytes_in(store)
        ordered = {layout: _in_order(store, view, layout) for layout in (view.layout(key) for key in view.outputs)}
        needed = sum(_to_write(store, layout, unit) for layout, units in ordered.items() for unit in units)
        check_room(store.path, needed, "Free some space; nothing was changed.")
        moved = {layout: [move(store, unit, layout) for unit in units] for layout, units in ordered.items()}
        first = [shard for shards in moved.values() for shard in shards if shard is not None]
        written = _bytes_in(store) - size
        outputs = [_superseded(store, layout, first) for layout in ordered]
        carry_out(store, outputs, views, first)
        after = _spread(View(view.path, copies=True))
    return Compacted(view.label, (before[0], after[0]), (before[1], after[1]), written)


def _spread(view: View) -> tuple[int, int]:
    """(shards a view's rows lie in, runs of rows that follow each other), over all outputs."""
    indexes = [view.stored(name).index for name in view.outputs]
    pieces = sum(int(((np.diff(index[:, 0]) != 0) | (np.diff(index[:, 1]) != 1)).sum()) + 1 for index in indexes)
    return len(view.files), pieces


def _bytes_in(store: Store) -> int:
    return sum(path.stat().st_size for output in store.outputs() for path in store.shard_paths(output))


def _in_order(store: Store, view: View, layout: Layout) -> list[Located]:
    """The distinct rows of a view in its order, in units of a shard's size."""
    wanted = keys_in(view, layout.output)
    _, first = np.unique(wanted, return_index=True)
    places = find(store.shards(layout), wanted[np.sort(first)])
    if not places.found.all():
        raise CacheError(f"{view.label} names rows of {layout.output} that lie in no shard. featurecache repair helps.")
    length = shard_rows(len(first), layout.row_bytes)
    return [places[start : start + length] for start in range(0, len(first), length)]


def _to_write(store: Store, layout: Layout, unit: Located) -> int:
    return 0 if shard_path(store, layout, unit).exists() else len(unit.file) * layout.row_bytes


def _superseded(store: Store, layout: Layout, first: list[Shard]) -> Output:
    """All rows of an output stay, those of ``first`` there; what has copies of them loses these."""
    shards = {shard.path: shard for shard in [*first, *store.shards(layout)] if shard.path.parent.name == layout.output}
    rows = [keys(shard.digests, shard.checksums) for shard in shards.values()]
    return plan(layout, list(shards.values()), np.concatenate(rows))
