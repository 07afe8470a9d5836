"""Verify checksums of a cache: is every file what was written?

Every shard and view is hashed and compared with its first line; no file whose hash does not match is read.
Which rows of a damaged shard are wrong follows from the views: they know place, digest and checksum of each row they
name, and are hashed themselves. Of whole shards the digests are compared with the views' index, and the name with the
digests.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from featurecache.errors import CacheError, FeatureCacheError, StorageError
from featurecache.files.atomic import FileStamp, file_stamp, hash_from, open_regular
from featurecache.files.directory import USER_BLOCK, read_user_block
from featurecache.files.mirror import fetch
from featurecache.store.reference import canary_path, read_reference
from featurecache.store.schema import StoredOutput
from featurecache.store.shards import Layout, layout_in, unmeasured
from featurecache.store.store import Store, open_store, unreadable_stores
from featurecache.store.store import stores as all_stores
from featurecache.store.view import View
from featurecache.store.write_view import find_view

_ATTEMPTS = 5  # at a store in which views are replaced all the time


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written. ``rows``: of a shard, (id, output) of the samples whose row is wrong."""

    path: Path
    what: str
    rows: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" if str(self.path) not in self.what else self.what


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at and what it found."""

    files: int
    bytes: int
    seconds: float
    damages: tuple[Damage, ...]


@dataclass
class ReferencedShard:
    """A shard as the views of its store know it. A row's columns: number in the shard, digest, checksum, error."""

    path: Path
    layout: Layout
    offset: int
    count: int  # rows in the file, named or not
    facts: set[tuple[int, int, int, str]] = field(default_factory=set)  # size, offset, count, hash: what views say
    parts: list[tuple[View, np.ndarray]] = field(default_factory=list)  # which rows of which views lie in it

    def column(self, of: Callable[[View, StoredOutput], np.ndarray]) -> np.ndarray:
        name = self.layout.output
        return np.concatenate([of(view, view.stored(name))[rows] for view, rows in self.parts])

    @property
    def numbers(self) -> np.ndarray:
        return self.column(lambda view, stored: stored.index[:, 1])

    @property
    def digests(self) -> np.ndarray:
        return self.column(lambda view, stored: view.digests)

    @property
    def checksums(self) -> np.ndarray:
        return self.column(lambda view, stored: stored.checksums)

    @property
    def errors(self) -> np.ndarray:
        return self.column(lambda view, stored: unmeasured(len(view)) if stored.errors is None else stored.errors)

    def is_whole(self) -> np.ndarray:
        """bool, one for each of ``numbers``: whether the bytes in the file, if there is one, have the checksum."""
        whole, size = np.zeros(len(self.numbers), bool), self.layout.row_bytes
        with contextlib.suppress(OSError, CacheError), open_regular(self.path) as file:
            for k, (number, checksum) in enumerate(zip(self.numbers.tolist(), self.checksums.tolist(), strict=True)):
                data = os.pread(file.fileno(), size, self.offset + number * size)  # fewer where the file is cut
                whole[k] = xxhash.xxh3_64_intdigest(data) == checksum
        return whole

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows [n, ...] as they lie in the file, zeros behind its end."""
        size, data = self.layout.row_bytes, bytearray()
        with open_regular(self.path) as file:
            for number in numbers.tolist():
                data += os.pread(file.fileno(), size, self.offset + number * size).ljust(size, b"\0")
        return np.frombuffer(data, self.layout.dtype).reshape(-1, *self.layout.shape)


def verify(cache: Path, only: Iterable[Store] | None = None, *, advance: Callable[[int], object] = int) -> VerifyReport:
    """Check every file of a cache, or of the stores in ``only``. ``advance(bytes)`` is told of the progress."""
    start, reports, unreadable = time.perf_counter(), [], unreadable_stores(cache) if only is None else ()
    damages = [Damage(folder / "spec.json", str(error)) for folder, error in unreadable]
    for store in all_stores(cache) if only is None else only:
        try:
            reports.append(check_store(store, advance))
        except FileNotFoundError:
            if store.path.exists():  # else it was removed meanwhile
                raise
    damages += [damage for report in reports for damage in report.damages]
    files, size = sum(report.files for report in reports), sum(report.bytes for report in reports)
    return VerifyReport(files, size, time.perf_counter() - start, tuple(damages))


def bytes_to_verify(cache: Path, only: Iterable[Store] | None = None) -> int:
    """Bytes that `verify` will read."""
    chosen = all_stores(cache) if only is None else only
    return sum(stamp[1] for store in chosen for path in hashed_files(store) if (stamp := file_stamp(path)))


def hashed_files(store: Store) -> list[Path]:
    return [*store.views(), *(path for output in store.outputs() for path in store.shard_paths(output))]


def check_store(store: Store, advance: Callable[[int], object] = int) -> VerifyReport:
    """Everything in one store's folder, while others may write there: what is found damaged is looked at again if a
    view was replaced meanwhile, for a view that was read before names shards that may have been removed since."""
    start = time.perf_counter()
    hashed: dict[tuple[Path, FileStamp | None], str | None] = {}  # a file as it was found → what is wrong with it
    for _ in range(_ATTEMPTS):
        views = {path: file_stamp(path) for path in store.views()}
        damages = list(_damages(store, hashed, advance))
        if not damages or views == {path: file_stamp(path) for path in store.views()}:
            break
    sizes = [stamp[1] for _, stamp in hashed if stamp]
    return VerifyReport(len(sizes), sum(sizes), time.perf_counter() - start, tuple(damages))


def _damages(
    store: Store, hashed: dict[tuple[Path, FileStamp | None], str | None], advance: Callable[[int], object]
) -> Iterator[Damage]:
    def problems_of(paths: Iterable[Path]) -> dict[Path, str | None]:
        keys = {path: (path, file_stamp(path)) for path in paths}
        todo = [key for key in keys.values() if key not in hashed]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # xxh3 and reading both release the interpreter's lock
            hashed.update(zip(todo, pool.map(lambda key: _hashed(key[0], advance), todo), strict=True))
        return {path: hashed[key] for path, key in keys.items()}

    readers = {store.path / "plan.json": lambda: store.plan, canary_path(store): lambda: read_reference(store)}
    for path, read in readers.items():
        try:
            read()
        except CacheError as error:
            yield Damage(path, str(error))
    problems = problems_of(hashed_files(store))
    views = {path: _view(path, problems[path]) for path in problems if path.parent == store.path}
    yield from (Damage(path, wrong) for path, wrong in views.items() if isinstance(wrong, str) and file_stamp(path))
    named = referenced_shards(view for view in views.values() if isinstance(view, View))
    problems |= problems_of(named.keys() - problems.keys())  # missing, or newer than the list of files
    shards = sorted(problems.keys() - views.keys())
    yield from (damage for path in shards if (damage := _shard(store, path, problems[path], named.get(path))))


def _hashed(path: Path, advance: Callable[[int], object]) -> str | None:
    """What is wrong with the bytes of a file, or None."""
    try:
        fetch([path], again=True)
        block = read_user_block(path)
        with open_regular(path) as file:
            actual = hash_from(file.fileno(), USER_BLOCK)
    except StorageError:  # which says nothing of the file
        raise
    except (CacheError, OSError) as error:
        return str(error)
    advance(block.size)
    return None if actual == block.digest else "its content does not match the hash in its first line"


def _view(path: Path, problem: str | None) -> View | str:
    if problem:
        return f"{problem}; delete it and run the extraction again, which computes nothing that is there"
    try:
        view = View(path, columns_only=True, copies=True)
        view.copies()  # which looks at their digests
        return view
    except FeatureCacheError as error:
        return str(error)


def referenced_shards(views: Iterable[View]) -> dict[Path, ReferencedShard]:
    """All shards that views name, with the rows that they name of them."""
    shards: dict[Path, ReferencedShard] = {}
    for view in views:
        for output in view.outputs:
            files, layout = view.stored(output).index[:, 0], view.info(output)
            for number in np.unique(files).tolist():
                entry = view.files[number]
                path = view.store / entry["path"].decode()
                facts = int(entry["size"]), int(entry["offset"]), int(entry["rows"]), entry["hash"].decode()
                shard = shards.setdefault(path, ReferencedShard(path, layout, facts[1], facts[2]))
                shard.facts.add(facts)
                shard.parts.append((view, np.flatnonzero(files == number)))
    return shards


def _shard(store: Store, path: Path, problem: str | None, named: ReferencedShard | None) -> Damage | None:
    """What is wrong with a shard, by its bytes, by its content, or by what the views say of it."""
    if (problem := problem or _content(store, path, named)) is None:
        return None
    if named is None:  # one that is gone meanwhile is missed by nobody
        return Damage(path, f"{problem}; no view names its rows") if file_stamp(path) else None
    wrong = set(named.digests[~named.is_whole()].tolist())
    count = len(set(named.digests.tolist()))
    ids = [view.ids[row] for view, rows in named.parts for row in rows if view.digests[row] in wrong]
    samples = tuple((name, path.parent.name) for name in dict.fromkeys(ids))
    are = "is" if len(wrong) == 1 else "are"
    return Damage(path, f"{problem}; {len(wrong):,} of the {count:,} rows that views name {are} wrong", samples)


def _content(store: Store, path: Path, named: ReferencedShard | None) -> str | None:
    """What a shard says of itself, and what views and shard say of the same rows."""
    try:
        shard = store.shard(path, named.layout if named else layout_in(path))
    except CacheError as error:
        return str(error)
    if named is None:
        return None
    if any(fact[:3] != (shard.size, shard.offset, len(shard.digests)) for fact in named.facts):
        return "the views' index has another size, offset or number of rows for it"
    if any(fact[3] != shard.hash for fact in named.facts):
        return "the views' index has another hash for it"
    numbers = named.numbers
    if numbers.max(initial=-1) >= named.count or (shard.digests[numbers] != named.digests).any():
        return "its rows are of other images than the views say"
    if (shard.checksums[numbers] != named.checksums).any():
        return "its rows have other checksums than the views say"
    return None


def stores_called(names: Iterable[str], cache: Path) -> list[Store]:
    """Stores by folder, or that of a view by its name."""
    named: dict[Path, Store] = {}
    for name in names:
        folder = next((path for path in (Path(name), cache / name) if (path / "spec.json").exists()), None)
        store = open_store(folder or find_view(name, cache).parent)
        named[store.path] = store
    return list(named.values())
