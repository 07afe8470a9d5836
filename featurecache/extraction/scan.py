"""Scanning a dataset before anything is computed: the digest of every image, so which are the same.

A file that the digest cache knows by its path and stat is not read; the rest is read once, in threads. From the bytes
in its hands the scan also takes the headers of some images, for sizes and kinds of pixels.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from featurecache.errors import SourceError, UnreadableImage
from featurecache.extraction.digest_cache import STAT, YOUNG, DigestCache
from featurecache.extraction.pipeline import prefetch
from featurecache.formatting import progress_bar
from featurecache.images import decoding as _images
from featurecache.images.headers import ImageHeader
from featurecache.images.pixel_room import PixelRoom
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles
from featurecache.sources.summary import LOOKED_AT, evenly_spaced
from featurecache.store.schema import DIGEST

_STRETCH = 16  # images of one task: a task for each would cost more than reading a small file
_STATS = 500  # files of one task that asks for stats
_PROBE = 4  # tasks before it is known how long one takes
_KEEP_EVERY = 20.0  # seconds between writes to the cache: what a kill may cost


@dataclass
class FileRecords:
    """The files of a dataset as they were found, and what the cache is to remember of them."""

    cache: DigestCache
    keys: np.ndarray = field(repr=False)  # int64 [N]; empty where images lie in no file
    stats: np.ndarray = field(repr=False)  # STAT [N]
    settled: np.ndarray = field(repr=False)  # bool [N]: had not changed for a while when it was looked at
    new: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)  # rows [n], digests [n]; to keep
    headers: dict[bytes, ImageHeader] = field(default_factory=dict, repr=False)  # digest → header; to keep

    def add(self, rows: np.ndarray, digests: np.ndarray) -> None:
        if len(self.keys):
            keep = self.settled[rows] & (digests != b"")
            self.new.append((rows[keep], digests[keep]))

    def save(self) -> None:
        """Write what is new into the digest cache. Where that cannot be, ``cache.trouble`` says so."""
        if not self.cache.writes:
            self.cache = DigestCache(self.cache.path.parent, writes=True)
        if self.new:
            rows, digests = (np.concatenate(parts) for parts in zip(*self.new, strict=True))
            self.cache.put(self.keys[rows], self.stats[rows], digests)
        self.cache.put_headers(self.headers)
        self.new, self.headers = [], {}

    def drop(self, rows: np.ndarray) -> None:
        """What the digest cache said of these files has turned out wrong."""
        if len(self.keys):
            DigestCache(self.cache.path.parent, writes=True).drop(self.keys[rows])


@dataclass
class ScanResult:
    """What the samples of a dataset hold."""

    images: np.ndarray  # [images] first sample of each distinct image, in the order of the source
    digests: np.ndarray  # [images] S32
    sample_image: np.ndarray  # [N] number of the distinct image, -1 where the file could not be read
    unread: dict[int, str]  # sample → reason
    headers: dict[int, ImageHeader | str]  # of some samples: what the header says, or why it cannot be read
    files: FileRecords


def scan(
    dataset: Dataset, cache: DigestCache, secret: bytes, workers: int, *, progress: bool = False, fail: bool = False
) -> ScanResult:
    """Know every image by its digest, reading those that ``cache`` does not know; what is new is saved now and then if
    it may write. ``fail``: raise SourceError at the first image that cannot be read."""
    with ThreadPoolExecutor(workers) as pool:
        files = _file_records(dataset, cache, secret, pool)
        digests = cache.get(files.keys, files.stats) if len(files.keys) else np.zeros(len(dataset), DIGEST)
        wanted = _header_rows(dataset, files.keys)
        cached = cache.get_headers({bytes(digest) for digest in digests[wanted]} - {b""})
        headers: dict[int, ImageHeader | str] = {
            row: cached[bytes(digests[row])] for row in wanted.tolist() if bytes(digests[row]) in cached
        }
        unread: dict[int, str] = {}
        missing = digests == b""
        missing[[row for row in wanted.tolist() if row not in headers]] = True
        look = partial(_read, dataset, set(wanted.tolist()) - set(headers))
        rows = np.flatnonzero(missing)
        stretches = [rows[start : start + _STRETCH] for start in range(0, len(rows), _STRETCH)]
        kept = time.monotonic()
        with progress_bar(len(dataset), progress, "look") as bar:
            bar.update(len(dataset) - len(rows))
            for stretch, (new, failures, looks) in _in_turn(look, stretches, pool, 8 * workers, _STRETCH * 100e-6):
                if failures and fail:
                    row, reason = next(iter(failures.items()))
                    raise SourceError(f"{dataset.shown(row)}: {reason} (--on-error report goes on without it)")
                digests[stretch] = new
                unread |= failures
                headers |= looks
                files.add(stretch, new)
                files.headers |= {
                    bytes(digests[row]): header for row, header in looks.items() if isinstance(header, ImageHeader)
                }
                bar.update(len(stretch))
                if cache.writes and time.monotonic() - kept > _KEEP_EVERY:
                    files.save()
                    kept = time.monotonic()
        if cache.writes:
            files.save()
            files.stats = files.stats[:0]  # 32 bytes an image that nobody needs any more
    return ScanResult(*_distinct(digests), unread, headers, files)


def _in_turn(
    function: Callable[[Any], Any], parts: Sequence[Any], pool: ThreadPoolExecutor, window: int, quick: float
) -> Iterator[tuple[Any, Any]]:
    """(part, what ``function`` makes of it) in order; in threads once a part takes more than ``quick`` seconds.

    Threads are for files that are waited for or take long to hash. With small ones from memory they only fight for the
    interpreter (tried: four take three times as long as one).
    """
    mean = 0.0
    for number, part in enumerate(parts):
        if number >= _PROBE and mean > quick:
            for later, future in prefetch(pool, function, parts[number:], window):
                yield later, future.result()
            return
        start = time.perf_counter()
        result = function(part)
        mean += (time.perf_counter() - start - mean) / min(number + 1, 8)
        yield part, result


_ROOM = PixelRoom(1)  # the header of 16-bit samples takes decoding them


def _read(
    dataset: Dataset, header_rows: set[int], rows: np.ndarray
) -> tuple[np.ndarray, dict[int, str], dict[int, ImageHeader | str]]:
    """Read images, in a thread: digests S32 [n], empty where an image cannot be read; why not; headers of some."""
    digests = np.zeros(len(rows), DIGEST)
    failures: dict[int, str] = {}
    headers: dict[int, ImageHeader | str] = {}
    for k, row in enumerate(rows.tolist()):
        try:
            data = dataset.read(row)
            digests[k] = _images.digest(data).encode()
        except UnreadableImage as error:
            failures[row] = str(error)
        if row in header_rows:
            try:
                with _ROOM.of(b"" if row in failures else data):
                    headers[row] = failures[row] if row in failures else _images.image_header(data)
            except UnreadableImage as error:
                headers[row] = str(error)
    return digests, failures, headers


def _header_rows(dataset: Dataset, keys: np.ndarray) -> np.ndarray:
    """Of which images the header is looked at: where they lie in files the lowest keys, so that adding an image to
    100,000 makes at most one other be read."""
    if len(keys) > LOOKED_AT:
        return np.sort(np.argpartition(keys, LOOKED_AT)[:LOOKED_AT])
    return evenly_spaced(np.arange(len(dataset)), LOOKED_AT)


def _distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """digests [N] S32 → first sample of each distinct image, its digest, the image of each sample (-1: none).

    As np.unique does it, with a third of the memory; images in the order of the source.
    """
    order = np.argsort(digests, kind="stable")
    begins = np.ones(len(digests), bool)
    ordered = digests[order]
    begins[1:] = ordered[1:] != ordered[:-1]
    del ordered
    first = order[begins]  # by digest; the sort is stable, so each is the lowest sample of its image
    place = np.argsort(first)
    place = place[digests[first[place]] != b""]
    number = np.full(len(first), -1, np.int64)
    number[place] = np.arange(len(place))
    sample_image = np.empty(len(digests), np.int64)
    sample_image[order] = np.repeat(number, np.diff(np.append(np.flatnonzero(begins), len(digests))))
    images = first[place]
    return images, digests[images] if len(images) < len(digests) else digests, sample_image


def _file_records(dataset: Dataset, cache: DigestCache, secret: bytes, pool: ThreadPoolExecutor) -> FileRecords:
    """Keys and stats of the files of a dataset. Rows of an archive share its stat."""
    images = dataset.images
    if isinstance(images, ImageFiles):
        parts = [slice(start, start + _STATS) for start in range(0, len(dataset), _STATS)]
        keys = np.empty(len(dataset), np.int64)
        stats, settled = np.empty(len(dataset), STAT), np.empty(len(dataset), bool)
        ask = lambda part: _stats([images.path(row) for row in range(*part.indices(len(images.ids)))])  # noqa: E731
        for part, answer in _in_turn(ask, parts, pool, 64, _STATS * 20e-6):
            keys[part] = _keys(images.root, images.ids[part], secret)
            stats[part], settled[part] = answer
    elif isinstance(images, ImageArrays) and images.files:
        keys = _keys("\0".join(images.files), [str(row) for row in range(len(dataset))], secret)
        stats, settled = (np.repeat(column, len(dataset)) for column in _stats_of_all(images.files))
    else:
        keys, stats, settled = np.zeros(0, np.int64), np.zeros(0, STAT), np.zeros(0, bool)
    return FileRecords(cache, keys, stats, settled)


def _stats_of_all(files: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """One stat, STAT [1], for files that hold images together: another as soon as one of them has another."""
    stats, settled = _stats(files)
    if len(files) > 1 and (stats["size"] >= 0).all():
        together = int.from_bytes(hashlib.blake2b(stats.tobytes(), digest_size=8).digest(), "little")
        sums = (stats["size"].sum(), stats["mtime"].max(), stats["ctime"].max(), together)
        return np.array([sums], STAT), np.array([settled.all()])
    return stats[:1] if len(files) == 1 else np.array([(-1, 0, 0, 0)], STAT), np.array([settled.all()])


def _keys(root: str, names: Sequence[str], secret: bytes) -> np.ndarray:
    """int64 [N]: BLAKE2b-64 of the absolute path. (Two files of one key only forget each other: stats differ.)"""
    below = hashlib.blake2b(os.fsencode(root) + b"/", digest_size=8, key=secret)
    alone = hashlib.blake2b(digest_size=8, key=secret)
    hashes = []
    for name in names:
        path_hash = (alone if name.startswith("/") else below).copy()
        path_hash.update(name.encode(errors="surrogateescape"))
        hashes.append(path_hash.digest())
    return np.frombuffer(b"".join(hashes), "<i8").astype(np.int64)


def _stats(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """STAT [n] of files, size -1 where there is none, and bool [n]: unchanged for ``YOUNG`` before now."""
    now = time.time_ns()
    rows = []
    for path in paths:
        try:
            status = os.stat(path)
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1
            rows.append((size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
        except (OSError, ValueError):  # gone; a zero byte in its name
            rows.append((-1, 0, 0, 0))
    stats = np.array(rows, STAT)
    return stats, np.maximum(stats["mtime"], stats["ctime"]) < now - YOUNG
