"""Random batches of token rows out of a view, beside torch.index_select on one tensor in memory; and opening views.

    python benchmarks/reading.py [--rows 2000] [--shards 8] [--batch 64]

One run, interleaved; the median of five rounds is reported as a ratio: of batches 1 is as fast as memory, of opening 1
is as long as plain h5py takes to read the same columns (and checks nothing).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from featurecache.store.schema import DIGEST, ViewColumns
from featurecache.store.shards import Layout, RowLocations, Shard, ShardWriter
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, create_store
from featurecache.store.view import View
from featurecache.store.write_view import view_attributes, write_view

LAYOUT = Layout("tokens", (197, 768), "float16", ("cls",), (14, 14))
SMALL = Layout("cls", (4,), "float16")


def new_store(folder: Path) -> Store:
    spec = ExtractionSpec({"class": "none"}, {"random_seed": 0}, {}, (224, 224), "as trained")
    return create_store(folder, "benchmark", spec, {"backbone": "benchmark"})


def add_shard(store: Store, layout: Layout, digests: np.ndarray, values: np.ndarray) -> Shard:
    writer = ShardWriter(store.path, digests, layout, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests], values)
    path = writer.commit()
    writer.close()
    assert path is not None
    return store.shard(path, layout)


def make_view(store: Store, layout: Layout, located: RowLocations, digests: np.ndarray) -> View:
    rows = len(digests)
    columns = ViewColumns(
        [f"train/{k:07}.png" for k in range(rows)], np.zeros(rows, np.int64), ["train"] * rows, digests
    )
    attributes = view_attributes(store, ["x"], "multiclass", {"kind": "none"})
    return View(write_view(store, "rows", columns, attributes, {layout: located}))


def numbered(rows: int) -> np.ndarray:
    return np.array([f"{k:032x}" for k in range(rows)], DIGEST)


def token_view(folder: Path, rows: int, shards: int) -> View:
    store, digests = new_store(folder), numbered(rows)
    values = np.random.default_rng(0).normal(size=(rows, *LAYOUT.shape)).astype("float16")
    for part in np.array_split(np.arange(rows), shards):
        add_shard(store, LAYOUT, digests[part], values[part])
    return make_view(store, LAYOUT, store.locate(LAYOUT, digests), digests)


def scattered_view(folder: Path, rows: int, shards: int) -> View:
    """Over so many files: one shard of the rows of each under as many names."""
    store, digests, each = new_store(folder), numbered(rows), rows // shards
    shard = add_shard(store, SMALL, digests[:each], np.zeros((each, 4), "f2"))
    links = [shard.path.with_name(f"{number:032x}.h5") for number in range(shards)]
    for link in links:
        os.link(shard.path, link)
    located = RowLocations(
        tuple(replace(shard, path=link) for link in links), np.arange(rows) // each, np.arange(rows) % each
    )
    return make_view(store, SMALL, located, digests)


def open_plainly(path: Path) -> None:
    """What plain h5py takes for the same columns."""
    with h5py.File(path) as file:
        for name in ("ids", "splits"):
            file[name].asstr()[...].tolist()
        for name in ("labels", "digests", "index/cls", "index/files", "checksums/cls", "errors/cls"):
            file[name][...]


def in_workers(read: Callable[[Path], object], path: Path, workers: int = 8) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read, args=(path,)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def report_opening(folder: Path) -> None:
    paths = {
        "1,000,000 rows": scattered_view(folder / "rows", 1_000_000, 1).path,
        "1,000,000 rows, 10,000 shards": scattered_view(folder / "shards", 1_000_000, 10_000).path,
    }
    few = scattered_view(folder / "few", 100_000, 100).path
    pairs = {
        f"open a view of {what}": (partial(View, path), partial(open_plainly, path)) for what, path in paths.items()
    }
    pairs["open one of 100,000 rows in 8 forked workers"] = (
        partial(in_workers, View, few), partial(in_workers, open_plainly, few),
    )  # fmt: skip
    for what, ways in pairs.items():
        times: list[list[float]] = [[], []]
        for _ in range(6):  # the first round warms up
            for taken, way in zip(times, ways, strict=True):
                start = time.perf_counter()
                way()
                taken.append(time.perf_counter() - start)
        ours, plain = (statistics.median(taken[1:]) for taken in times)
        print(f"{what:45s} {ours * 1e3:8.0f} ms   {ours / plain:5.2f} of plain h5py", flush=True)


def seconds(read: Callable[[np.ndarray], object], batches: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for rows in batches:
        read(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        view = token_view(Path(folder), given.rows, given.shards)
        memory = view.tensor("tokens")
        epoch = np.random.default_rng(2).permutation(given.rows)
        once = [epoch[start : start + given.batch] for start in range(0, given.rows, given.batch)]
        out = torch.empty((given.batch, *LAYOUT.shape), dtype=torch.float16)
        rng = np.random.default_rng(1)
        batches = [rng.choice(given.rows, given.batch, replace=False) for _ in range(100)]
        ways: dict[str, Callable[[np.ndarray], object]] = {
            "memory": lambda rows: torch.index_select(memory, 0, torch.from_numpy(rows), out=out),
            "view": lambda rows: view.take("tokens", rows, out),
            "view, sorted rows": lambda rows: view.take("tokens", np.sort(rows), out),
        }
        rates: dict[str, list[float]] = {}
        for _ in range(6):  # the first round warms up
            for name, way in ways.items():
                size = sum(map(len, batches)) * LAYOUT.row_bytes
                rates.setdefault(name, []).append(size / seconds(way, batches))
            fresh = View(view.path)  # each row's bytes are compared with its checksum when it is first read
            fresh.take("tokens", np.arange(0))
            size = sum(map(len, once)) * LAYOUT.row_bytes
            rates.setdefault("view, first epoch", []).append(size / seconds(partial(fresh.take, "tokens"), once))
    base = statistics.median(rates["memory"][1:])
    for name, found in rates.items():
        median = statistics.median(found[1:])
        print(f"{name:20s} {median / 1e9:6.1f} GB/s   {median / base:5.2f} of memory")
    with tempfile.TemporaryDirectory() as folder:
        report_opening(Path(folder))


if __name__ == "__main__":
    main()
