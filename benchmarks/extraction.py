"""From JPEG to committed shards, beside the bare forward pass on ready tensors.

    python benchmarks/extraction.py FOLDER [--images 256] [--rounds 5] [--no-plain]

Untrained weights (speed does not depend on them), fp32. Each round runs, one after the other and in alternating
order: the bare forward pass (the library's model, batches of 8, inference mode), the plain way (one PIL image at a
time through the checkpoint's processor and the model, one dataset[i] = … a row, h5py), and featurecache. The median
of the rounds' ratios is reported.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from featurecache.extraction import plan

Way = Callable[[], int]  # returns how many images


def files(folder: Path, count: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return found[:: max(1, len(found) // count)][:count]


def bare(model: torch.nn.Module, count: int) -> Way:
    pixels = torch.randn(8, 3, 224, 224)

    def run() -> int:
        with torch.inference_mode():
            for _ in range(count // 8):
                model(pixels)
        return count // 8 * 8

    return run


def plain(model: torch.nn.Module, paths: list[Path], target: Path) -> Way:
    processor = ViTImageProcessor()

    def run() -> int:
        with h5py.File(target, "w") as file, torch.no_grad():
            rows = file.create_dataset("tokens", (len(paths), 197, 768), "f2")
            for k, path in enumerate(paths):
                pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
                rows[k] = model(**pixels).last_hidden_state[0].numpy()
        return len(paths)

    return run


def ours(data: Path, backbone: str, home: Path) -> Way:
    numbers = itertools.count()

    def run() -> int:
        cache = home / f"cache{next(numbers)}"
        prepared = plan.prepare(data, backbone=backbone, random_weights=True, cache=cache, outputs="cls,tokens")
        start = time.perf_counter()  # loading the network is in none of the three ways
        result = prepared.run(rate=10.0)
        run.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
        return result.computed

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-plain", action="store_true", help="leave out one image at a time, the slowest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "data").mkdir()
        paths = files(given.folder, given.images)
        for k, path in enumerate(paths):
            (home / "data" / f"{k:05d}{path.suffix}").write_bytes(path.read_bytes())
        model = ViTModel(ViTConfig()).eval()
        ways = {
            "bare forward": bare(model, len(paths)),
            "one image at a time": plain(model, paths, home / "plain.h5"),
            "featurecache": ours(home / "data", "vit-in21k", home),
        }
        if given.no_plain:
            del ways["one image at a time"]
        measure(ways, given.rounds)


def measure(ways: dict[str, Way], rounds: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            count = way()
            rates[name].append(count / getattr(way, "seconds", time.perf_counter() - start))
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates["bare forward"], strict=True)]
        print(
            f"{name:20s} {statistics.median(values):6.2f} images/s   {statistics.median(ratios):5.3f} of the bare pass"
        )


if __name__ == "__main__":
    main()
