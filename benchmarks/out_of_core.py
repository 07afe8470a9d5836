"""A linear head on more features than memory may hold: seconds of an epoch and memory beside the same in memory.

    python benchmarks/out_of_core.py [--rows 1000000] [--width 768] [--shards 10000] [--limit 1.0] [--folder DIR]

Makes a view of random features with a class direction in them, then trains ``linear`` in three fresh processes: with
all memory, in a control group of so many GiB (as root; it counts what the system keeps of files too, which it may drop
at any time), and there again with nothing of the files in memory. Of each are reported the seconds of an epoch after
the first, the most anonymous memory, and the test accuracy; and beside them how long a plain read of the shards takes
that are not in memory. Linux only.
"""

# ruff: noqa: E402  this folder has to leave sys.path first

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, in which `heads` is a benchmark

import heads
from benchmarks.reading import add_shard, new_store, numbered
from featurecache.store.schema import ViewColumns
from featurecache.store.shards import Layout
from featurecache.store.view import View
from featurecache.store.write_view import view_attributes, write_view

EPOCHS = 3


def make(folder: Path, rows: int, width: int, shards: int) -> Path:
    store, digests, layout = new_store(folder), numbered(rows), Layout("cls", (width,), "float16")
    rng = np.random.default_rng(0)
    labels, direction = rng.integers(0, 2, rows), 0.1 * rng.normal(size=width)
    for part in np.array_split(np.arange(rows), shards):
        values = rng.normal(size=(len(part), width)).astype("f4") + labels[part, None] * direction
        add_shard(store, layout, digests[part], values.astype("f2"))
    splits = np.array(["train"] * 8 + ["val", "test"])[np.arange(rows) % 10]
    columns = ViewColumns([f"{k:07}.png" for k in range(rows)], labels, splits.tolist(), digests)
    attributes = view_attributes(store, ["a", "b"], "binary", {"kind": "none"})
    return write_view(store, "rows", columns, attributes, {layout: store.locate(layout, digests)})


def train(view: Path, out: Path) -> dict[str, Any]:
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            most[0] = max(most[0], next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")))

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    run = heads.train_head(view, "linear", epochs=EPOCHS, batch_size=256, patience=0, controls=False, out=out)
    done.set()
    seconds = [row["seconds"] for row in run.history]
    right = run.metrics["test"]["accuracy"]
    return {"epoch": min(seconds[1:]), "all": time.perf_counter() - start, "anonymous": most[0], "accuracy": right}


@contextmanager
def control_group(limit: int | None):  # type: ignore[no-untyped-def]
    """What makes a process one of a new group with this limit."""
    if limit is None:
        yield lambda: None
        return
    one = Path("/sys/fs/cgroup/memory")
    group = (one if one.is_dir() else one.parent) / f"featurecache-benchmark-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if one.is_dir() else "memory.max")).write_text(str(limit))
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def forget(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=1.0, help="GiB")
    parser.add_argument("--folder")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.train:
            print(json.dumps(train(given.train, Path(folder) / "run")))
            return
        start = time.perf_counter()
        path = make(Path(folder), given.rows, given.width, given.shards)
        files = sorted(path.parent.glob("cls/*.h5"))
        size = sum(file.stat().st_size for file in files)
        print(
            f"{given.rows:,} rows, {size / 2**30:.2f} GiB in {len(files):,} shards: {time.perf_counter() - start:.0f} s"
        )
        start = time.perf_counter()
        View(path)
        print(f"open the view, warm: {time.perf_counter() - start:.3f} s")
        forget(files)
        start = time.perf_counter()
        for file in files:
            file.read_bytes()
        plain = time.perf_counter() - start
        print(f"read the shards plainly, from the disk: {plain:.1f} s, {size / plain / 1e9:.2f} GB/s")
        forget(files)
        view, out = View(path), torch.empty(4096, given.width, dtype=torch.float16)
        start = time.perf_counter()
        for rows in np.array_split(np.arange(given.rows), -(-given.rows // 4096)):
            view.take("cls", rows, out[: len(rows)])
        seconds = time.perf_counter() - start
        print(f"the same through the view, checked: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s", flush=True)
        limit = int(given.limit * 2**30)
        for what, most, cold in (("in memory", None, False), ("limited", limit, False), ("limited, cold", limit, True)):
            if cold:
                forget(files)
            with control_group(most) as join:
                command = [sys.executable, __file__, "--train", str(path)]
                done = subprocess.run(command, preexec_fn=join, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{what:14s} ended with {done.returncode}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{what:14s} {found['epoch']:6.1f} s an epoch  {found['all']:6.1f} s in all  "
                f"{found['anonymous'] / 2**30:.2f} GiB anonymous  test accuracy {found['accuracy']:.4f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
