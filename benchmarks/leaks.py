"""Near-duplicates among random unit vectors of two splits, beside the bare matrix product of all with all.

    python benchmarks/leaks.py [--rows 60000] [--width 768] [--planted 1000] [--rounds 1]

The bare product is float32 in blocks that are thrown away. Interleaved; the medians of the rounds. All planted pairs
have to be found, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from featurecache.maintenance.leaks import BLOCK, THRESHOLD, CentredUnitRows, exact_leaks, nearest_pairs


class Memory:
    """As much of a view as is asked: one output in float16, digests, splits."""

    def __init__(self, x: torch.Tensor, rows: int) -> None:
        self.x, self.outputs = x, {"cls": x}
        self.splits = ["train"] * rows + ["test"] * (len(x) - rows)
        self.ids, self.groups, self.versions = range(len(x)), None, None
        self.digests = np.array([f"{k:032x}" for k in range(len(x))], "S32")

    def info(self, output: str) -> torch.Tensor:
        return self.x[0]

    def tensor(self, output: str, rows: np.ndarray) -> torch.Tensor:
        return self.x[torch.from_numpy(rows)]


def planted(rows: int, width: int, pairs: int) -> torch.Tensor:
    """float16 [2·rows, width]: the first ``pairs`` of the second half are those of the first, a little moved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn((2 * rows, width), generator=generator))
    noise = torch.nn.functional.normalize(torch.randn((pairs, width), generator=generator))
    x[rows : rows + pairs] = torch.nn.functional.normalize(x[:pairs] + 0.1 * noise)  # a cosine of 0.995
    return x.half()


def bare(x: torch.Tensor, rows: int) -> None:
    numbers = x.float().numpy()
    out = np.empty((BLOCK, BLOCK), np.float32)
    for a in range(0, rows, BLOCK):
        for b in range(rows, len(numbers), BLOCK):
            left, right = numbers[a : min(a + BLOCK, rows)], numbers[b : b + BLOCK]
            np.matmul(left, right.T, out=out[: len(left), : len(right)])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000, help="of each split")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--planted", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    n = given.rows
    view = Memory(planted(n, given.width, given.planted), n)
    print(f"exact leaks of {2 * n:,} images: {seconds(lambda: exact_leaks(view, np.array(view.splits))):.1f} s")

    def search() -> None:
        features = CentredUnitRows(view, "cls", np.arange(2 * n))
        first, second, same = np.arange(n), np.arange(n, 2 * n), np.arange(2 * n)
        found = nearest_pairs(features, first, second, threshold=THRESHOLD, most=given.planted, same=same)
        assert found.count == given.planted and (found.rows[:, 1] - found.rows[:, 0] == n).all()

    search_times, bare_times = [], []
    for _ in range(given.rounds):
        search_times.append(seconds(search))
        bare_times.append(seconds(lambda: bare(view.x, n)))
    took, limit = statistics.median(search_times), statistics.median(bare_times)
    print(f"near-duplicates of {n:,} × {n:,} × {given.width}: {took:.1f} s, {took / limit:.2f} of the bare product")
    print(f"the bare product: {limit:.1f} s")


if __name__ == "__main__":
    main()
