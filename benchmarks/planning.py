"""Planning over a million synthetic files: what `prepare` costs before anything is computed.

    python benchmarks/planning.py [--files 1000000] [--folder DIR]

The files are real names (hard links to a thousand small files, in 100 class folders), so listing, stat, open and read
are the system's own; each read gives other bytes. Every step is timed in one process, with its CPU time beside (the
machine may be busy); its memory is the highest resident size during the step less that at the start of the first.
Linux only (/proc).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featurecache.commands import extract
from featurecache.extraction import plan
from featurecache.extraction.digest_cache import NAME
from featurecache.extraction.run import Extraction
from featurecache.sources import open_source
from featurecache.sources.base import Dataset, ImageFiles
from featurecache.store.schema import DIGEST
from featurecache.store.shards import ShardWriter
from featurecache.store.store import create_store
from featurecache.store.view import View

BACKBONE, OUTPUT = "vit-demo", "cls"


class Different(ImageFiles):
    """Files that are links to a few, each read as if it were another."""

    reads = 0

    def read(self, row: int) -> bytes:
        Different.reads += 1
        return super().read(row) + self.ids[row].encode()


def make_files(folder: Path, count: int) -> Path:
    for number in range(1000):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(folder / f"{number}.png")
    for number in range(count):
        place = folder / "data" / f"class{number % 100:02d}"
        if number < 100:
            place.mkdir(parents=True)
        os.link(folder / f"{number % 1000}.png", place / f"patient{number:07d}.png")
    return folder / "data"


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (highest since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


class Steps:
    """Runs and prints steps; ``count`` images."""

    def __init__(self, count: int) -> None:
        gc.collect()
        self.count, self.base = count, resident("VmRSS")

    def __call__(self, what: str, step: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        reads, start, cpu = Different.reads, time.perf_counter(), time.process_time()
        result = step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = max(0, resident("VmHWM") - self.base)
        print(
            f"{what:40s} {seconds:6.1f} s  {cpu:6.1f} s of CPU  {memory / 2**20:6.0f} MiB  "
            f"{memory / self.count:5.0f} bytes an image  {Different.reads - reads:9,} read", flush=True,
        )  # fmt: skip
        return result


def fill_store(extraction: Extraction) -> None:
    """All rows of all images, zeros."""
    store = create_store(extraction.cache, BACKBONE, extraction.spec, {"backbone": BACKBONE})
    layout = extraction.layouts[OUTPUT]
    for start in range(0, len(extraction.digests), 16_384):
        digests = extraction.digests[start : start + 16_384].astype(DIGEST)
        writer = ShardWriter(store.path, digests, layout, {"fingerprint": extraction.spec.fingerprint})
        writer.append([bytes(d) for d in digests], np.zeros((len(digests), *layout.shape), layout.dtype))
        writer.commit()
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the files are made (a file system in memory) [default: TMPDIR]")
    given = parser.parse_args()
    options: dict[str, Any] = {"backbone": BACKBONE, "random_weights": True, "outputs": OUTPUT, "device": "cpu"}
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        data = make_files(Path(home), given.files)
        plan.prepare("digits", **options, cache=Path(home) / "other")  # libraries loaded, the network built once
        options["cache"] = Path(home) / "cache"
        time.sleep(2.1)  # younger files are not remembered
        step = Steps(given.files)
        plain: Dataset = step("list the folder", lambda: open_source(data))
        dataset = replace(plain, images=Different(plain.images.root, plain.ids))  # type: ignore[attr-defined]
        look: Callable[[], Extraction] = lambda: plan.prepare(dataset, remember=True, **options)  # noqa: E731
        first = step("first look", look)
        second = step("second look, with memory", look)
        assert second.to_compute == given.files and (first.digests == second.digests).all()
        size = (options["cache"] / NAME).stat().st_size
        print(f"{NAME}: {size / 2**20:.0f} MiB, {size / given.files:.0f} bytes an image")
        del first
        fill_store(second)
        del second
        third = step("third look, a store holds all of them", look)
        assert third.to_compute == 0
        screen: Callable[[Extraction], str] = lambda found: extract.extraction_lines(  # noqa: E731
            found, extract.extraction_record(found, None)
        )
        step("the first screen", partial(screen, third))
        write = third.run
        del third
        result = step("write the view", write)
        step("open the view", lambda: View(result.view))


if __name__ == "__main__":
    main()
