"""Random batches of token rows out of a view, beside torch.index_select on one tensor in memory.

    python benchmarks/reading.py [--rows 2000] [--shards 8] [--batch 64]

One run, interleaved; the median of five rounds is reported as a ratio (1 = as fast as memory).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from featurecache.files.atomic import FORMAT
from featurecache.store.schema import DIGEST
from featurecache.store.shards import Layout, ShardWriter
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import create_store
from featurecache.store.view import View
from featurecache.store.write_view import ViewColumns, write_view

LAYOUT = Layout("tokens", (197, 768), "float16", ("cls",), (14, 14))


def make_view(folder: Path, rows: int, shards: int) -> View:
    spec = ExtractionSpec({"class": "none"}, {"random_seed": 0}, {}, (224, 224), "as trained")
    store = create_store(folder, "benchmark", spec, {"backbone": "benchmark"})
    digests = np.array([f"{k:032x}" for k in range(rows)], DIGEST)
    values = np.random.default_rng(0).normal(size=(rows, *LAYOUT.row_shape)).astype("float16")
    for part in np.array_split(np.arange(rows), shards):
        writer = ShardWriter(store.path, digests[part], LAYOUT, {"fingerprint": store.fingerprint})
        writer.append([bytes(d) for d in digests[part]], values[part])
        writer.commit()
        writer.discard()
    columns = ViewColumns([str(k) for k in range(rows)], np.zeros(rows, np.int64), [""] * rows, digests)
    attributes = {
        "classes": '["x"]', "task": "multiclass", "spec": "{}", "fingerprint": store.fingerprint,
        "format_version": FORMAT, "source": '{"kind": "none"}', "failed": "[]",
    }  # fmt: skip
    return View(write_view(store, "rows", columns, attributes, {LAYOUT: store.locate(LAYOUT, digests)}))


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
        view = make_view(Path(folder), given.rows, given.shards)
        memory = view.tensor("tokens")
        epoch = np.random.default_rng(2).permutation(given.rows)
        once = [epoch[start : start + given.batch] for start in range(0, given.rows, given.batch)]
        out = torch.empty((given.batch, *LAYOUT.row_shape), dtype=torch.float16)
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


if __name__ == "__main__":
    main()
