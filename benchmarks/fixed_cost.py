"""The fixed cost of commands that have nothing to compute, or one image: seconds and memory of whole processes.

    python benchmarks/fixed_cost.py [--backbone FOLDER] [--images FOLDER] [--rounds 5]

Each round starts every command once, in a fresh process, beside ``python -c "import torch"``, which is what a command
that computes cannot go below. Medians over the rounds; memory is the highest resident size of the process (Linux only).
Without --backbone the untrained vit-demo takes the place of a checkpoint. The cache, the run and what the machine
remembers lie in a folder of their own; the first round of a state that is empty is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def make_images(folder: Path) -> Path:
    for number in range(66):
        place = folder / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(np.where(pixels > 80 * (number % 3), pixels, 0).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def took(command: list[str], home: Path) -> tuple[float, float]:
    """Seconds and MB of a process that ends well."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone")
    parser.add_argument("--images")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ.update(PYTHONPATH=str(ROOT), FEATURECACHE_STATE=str(home / "state"))
        images = Path(given.images).resolve() if given.images else make_images(home / "images")
        image = next(path for path in sorted(images.rglob("*")) if path.is_file())
        what = [str(Path(given.backbone).resolve())] if given.backbone else ["vit-demo", "--random-weights"]
        tool = [sys.executable, "-m", "featurecache"]
        extract = [*tool, "extract", "--data", str(images), "--name", "few", "--backbone", *what]
        train = [*tool, "train-head", "--head", "linear", "--features", "few", "--overwrite", "--out"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "--help": [*tool, "--help"],
            "ls": [*tool, "ls"],
            "info VIEW": [*tool, "info", "few"],
            "verify": [*tool, "verify"],
            "extract again": extract,
            "predict, one image": [*tool, "predict", "--run", "runs/one", str(image)],
            "train-head linear": [*train, "runs/other"],
        }
        for first in (extract, [*train, "runs/one"], commands["predict, one image"]):
            took(first, home)
        rounds = [{name: took(command, home) for name, command in commands.items()} for _ in range(given.rounds)]
    least = statistics.median(each["import torch"][0] for each in rounds)
    for name in commands:
        seconds, memory = zip(*(each[name] for each in rounds), strict=True)
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:<20} {middle:6.2f} s ({spread}), {middle / least:5.2f} × import torch, {max(memory):5.0f} MB")


if __name__ == "__main__":
    main()
