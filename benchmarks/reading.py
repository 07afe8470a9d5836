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
from pathlib import Path

import numpy as np
import torch

from featurecache.files import FORMAT
from featurecache.reader import View
from featurecache.shards import DIGEST, Layout, ShardWriter
from featurecache.spec import ExtractionSpec
from featurecache.stores import create_store
from featurecache.views import Rows, write_view

LAYOUT = Layout("tokens", (197, 768), "float16", ("cls",), (14, 14))


def make_view(folder: Path, rows: int, shards: int) -> View:
    spec = ExtractionSpec({"class": "none"}, {"random_seed": 0}, {}, (224, 224), "as trained")
    store = create_store(folder, "benchmark", spec, {"backbone": "benchmark"})
    digests = np.array([f"{k:032x}" for k in range(rows)], DIGEST)
    values = np.random.default_rng(0).normal(size=(rows, *LAYOUT.row_shape)).astype("float16")
    for part in np.array_split(np.arange(rows), shards):
        writer = ShardWriter(store.path, digests[part], LAYOUT, {})
        writer.append([bytes(d) for d in digests[part]], values[part])
        writer.commit()
        writer.discard()
    columns = Rows([str(k) for k in range(rows)], np.zeros(rows, np.int64), [""] * rows, digests)
    attributes = {
        "classes": '["x"]', "task": "multiclass", "spec": "{}", "fingerprint": store.fingerprint,
        "format_version": FORMAT, "source": "{}", "failed": "[]",
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
        out = torch.empty((given.batch, *LAYOUT.row_shape), dtype=torch.float16)
        rng = np.random.default_rng(1)
        batches = [rng.choice(given.rows, given.batch, replace=False) for _ in range(100)]
        ways: dict[str, Callable[[np.ndarray], object]] = {
            "memory": lambda rows: torch.index_select(memory, 0, torch.from_numpy(rows), out=out),
            "view": lambda rows: view.take("tokens", rows, out),
            "view, sorted rows": lambda rows: view.take("tokens", np.sort(rows), out),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(6):  # the first round warms up
            for name, way in ways.items():
                times[name].append(seconds(way, batches))
    size = 100 * given.batch * LAYOUT.row_bytes
    base = statistics.median(times["memory"][1:])
    for name, all_times in times.items():
        median = statistics.median(all_times[1:])
        print(f"{name:20s} {size / median / 1e9:6.1f} GB/s   {base / median:5.2f} of memory")


if __name__ == "__main__":
    main()
