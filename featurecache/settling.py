"""Rows move to other shards: what `gc` and `compact` have in common.

A row is known by its digest *and* the checksum of its bytes: two machines may have computed one image with last bits
that differ, and a view keeps the bytes it has. For each row that is to stay one *home* is chosen, a shard that has it.
A shard in which all rows are at home stays as it is, one in which none is goes, of the others the rows at home are
written to a new shard. The order: new shards are committed, views are written on them, only then the old files go.
Killed between any two steps nothing is lost, and the same command begins anew with what it finds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featurecache import guard
from featurecache.errors import CacheError
from featurecache.exporting import check_room
from featurecache.files import sync_path, writing
from featurecache.reader import View
from featurecache.shards import Layout, Located, Shard, ShardWriter, find, keys, read_rows, shard_name
from featurecache.stores import Store
from featurecache.views import columns_of, write_view

STRETCH = 16 << 20  # bytes of rows in hand at a time


def keys_in(view: View, output: str) -> np.ndarray:
    return keys(view.digests, view.stored(output).checksums)


@dataclass
class Output:
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


def plan(layout: Layout, shards: Sequence[Shard], wanted: np.ndarray) -> Output:
    """Choose homes for the rows ``wanted`` (keys): the first of ``shards`` that has them. Raises CacheError where one
    lies nowhere."""
    wanted = np.unique(wanted)
    found = find(shards, wanted)
    if not found.found.all():
        raise CacheError(
            f"{int((~found.found).sum()):,} rows of {layout.output} that views name lie in no shard. "
            "featurecache verify lists what is damaged, featurecache repair computes it again."
        )
    result = Output(layout)
    copies = _copies(shards, wanted)
    for number, shard in enumerate(shards):
        rows = np.sort(found.row[found.file == number])
        if len(rows) == len(shard.digests):
            result.keep.append(shard)
        elif len(rows):
            result.split.append((shard, rows))
        else:
            result.drop.append(shard)
        several = rows[np.isin(keys(shard.digests[rows], shard.checksums[rows]), copies)]
        if len(several):
            result.trusted.append((shard, several))
    return result


def _copies(shards: Sequence[Shard], wanted: np.ndarray) -> np.ndarray:
    """Keys that stand in the shards more than once."""
    if not shards:
        return wanted[:0]
    distinct, counts = np.unique(
        np.concatenate([keys(shard.digests, shard.checksums) for shard in shards]), return_counts=True
    )  # fmt: skip
    return np.intersect1d(distinct[counts > 1], wanted)


def carry_out(store: Store, outputs: Sequence[Output], views: Iterable[Path], first: Sequence[Shard] = ()) -> None:
    """New shards, views on them, old files away. ``first``: shards whose copies of rows the views shall take.

    Raises DamagedFile before anything is removed when a row that is to stay does not have its checksum.
    """
    check_room(store.path, sum(output.new_bytes for output in outputs), "Free some space; nothing was changed.")
    homes: dict[str, list[Shard]] = {}
    going: list[Shard] = []
    for output in outputs:
        for shard, rows in output.trusted:
            read_through(shard, rows, output.layout)
        stay = [move(store, _some(shard, rows), output.layout) or shard for shard, rows in output.split]
        chosen = [shard for shard in first if shard.path.parent.name == output.layout.output]
        homes[output.layout.output] = list({s.path: s for s in [*chosen, *stay, *output.keep]}.values())
        kept = {shard.path for shard in homes[output.layout.output]}
        going += [s for s in [*output.drop, *(shard for shard, _ in output.split)] if s.path not in kept]
    gone = {shard.path for shard in going}
    for path in views:
        repoint(store, path, homes, gone)
    for folder in {remove(path).parent for path in sorted(gone)}:
        with writing(folder):
            sync_path(folder)


def remove(path: Path) -> Path:
    with writing(path):
        path.unlink(missing_ok=True)
    return path


def read_through(shard: Shard, rows: np.ndarray, layout: Layout) -> None:
    """Raises DamagedFile when one of the rows does not have its checksum."""
    step = max(1, STRETCH // layout.row_bytes)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        read_rows(_some(shard, part), layout)


def _some(shard: Shard, rows: np.ndarray) -> Located:
    return Located((shard,), np.zeros(len(rows), np.int64), rows)


def move(store: Store, places: Located, layout: Layout) -> Shard | None:
    """Write rows that lie anywhere into one new shard, in the order of ``places``, with their bytes, errors and notes.

    A file that has its name and these bytes is taken for it. None where one with other bytes has the name.
    """
    digests, path = _digests(places), shard_path(store, layout, places)
    if path.exists():
        there = store.shard(path, layout)
        if not np.array_equal(there.checksums, places.checksums):
            return None
        read_through(there, np.arange(len(digests)), layout)
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


def shard_path(store: Store, layout: Layout, places: Located) -> Path:
    """Where a shard of these rows has its place."""
    return store.folder(layout.output) / f"{shard_name(_digests(places))}.h5"


def _digests(places: Located) -> np.ndarray:
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


def repoint(store: Store, path: Path, homes: dict[str, list[Shard]], gone: set[Path]) -> None:
    """Write a view that names shards in ``gone`` on those that stay. Its bytes stay what they are, and its time: it is
    no newer than it was."""
    view = View(path, columns_only=True, copies=True)
    if not gone & {view.store / entry["path"].decode() for entry in view.files}:
        return
    located = {}
    for name in view.outputs:
        layout = view.layout(name)
        shards = homes[name] if name in homes else store.shards(layout)
        located[layout] = places = find(shards, keys_in(view, name))
        assert places.found.all(), "every row that a view names has a home"
    stat = path.stat()
    write_view(store, view.name, columns_of(view), view.attributes, located)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    guard.own([path])  # it has another ctime now
