"""`verify` over a store of warm files, beside what the machine can do at most.

    python benchmarks/verify.py [--gigabytes 1.5] [--shards 24]

In one run, interleaved, each way with as many threads as `verify` takes: reading the same bytes into a buffer, hashing
a buffer that is in memory already (xxh3_128). Median of five rounds; GB are 10⁹ bytes. A core's share is bytes by the
processor time that was spent: it stays true on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from reading import LAYOUT

from featurecache.maintenance.verify import check_store, hashed_files, verify
from featurecache.store.schema import DIGEST, ViewColumns
from featurecache.store.shards import ShardWriter, notes_for
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, create_store
from featurecache.store.write_view import view_attributes, write_view

PIECE = 1 << 20  # bytes


def make_store(folder: Path, size: float, shards: int) -> Store:
    """Rows of tokens of a ViT-B/16, different in every shard, and a view of all of them."""
    spec = ExtractionSpec({"class": "none"}, {"random_seed": 0}, {}, (224, 224), "as trained")
    store = create_store(folder, "benchmark", spec, {"backbone": "benchmark"})
    count = int(size / LAYOUT.row_bytes / shards)
    digests = np.array([f"{k:032x}" for k in range(count * shards)], DIGEST)
    values = np.random.default_rng(0).normal(size=(count, *LAYOUT.shape)).astype("float16")
    for part in np.split(np.arange(len(digests)), shards):
        writer = ShardWriter(store.path, digests[part], LAYOUT, notes_for(store.fingerprint, "cpu", {"threads": 1}))
        values[:, 0, 0] = part
        writer.append([bytes(d) for d in digests[part]], values)
        writer.commit()
        writer.close()
    columns = ViewColumns(
        [str(k) for k in range(len(digests))], np.zeros(len(digests), np.int64), [""] * len(digests), digests
    )
    write_view(
        store, "rows", columns, view_attributes(store, ["x"], "multiclass", {}), {LAYOUT: store.locate(LAYOUT, digests)}
    )
    return store


def read(path: Path) -> None:
    """Into a buffer that stays in the cache of a core, as `verify` does."""
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def hash_memory(path: Path, buffer: bytes = os.urandom(PIECE)) -> None:
    """As many bytes as the file has."""
    digest = xxhash.xxh3_128()
    for _ in range(path.stat().st_size // PIECE):
        digest.update(buffer)


def in_threads(work: Callable[[Path], None], paths: list[Path], threads: int) -> Callable[[], None]:
    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, paths))

    return run


def seconds(way: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of all processors together."""
    start, spent = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - start, time.process_time() - spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--folder", help="Where the store is made. [default: the folder of temporary files]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        store = make_store(Path(folder), given.gigabytes * 1e9, given.shards)
        paths, cores = hashed_files(store), os.cpu_count() or 1
        size = sum(path.stat().st_size for path in paths)
        ways: dict[str, Callable[[], object]] = {
            "reading": in_threads(read, paths, cores),
            "hashing": in_threads(hash_memory, paths, cores),
            "verify": lambda: check_store(store),
        }
        assert verify(Path(folder)).damages == ()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(6):  # the first round warms up
            for name, way in ways.items():
                times[name].append(seconds(way))
    clock, spent = (
        {name: statistics.median(pair[k] for pair in pairs[1:]) for name, pairs in times.items()} for k in (0, 1)
    )
    print(f"{size / 1e9:.2f} GB in {len(paths)} files, {cores} cores")
    for name in ways:
        print(f"{name:12s} {size / clock[name] / 1e9:6.2f} GB/s   {size / spent[name] / 1e9:6.2f} GB/s a core")
    for what, measured in (("time", clock), ("processor time", spent)):
        ratio = measured["verify"] / (measured["reading"] + measured["hashing"])
        print(f"verify takes {ratio:.2f} of the {what} of reading and hashing one after the other")


if __name__ == "__main__":
    main()
