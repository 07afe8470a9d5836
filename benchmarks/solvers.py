"""The solved heads beside scikit-learn: `ridge` for 45 penalties, `logreg` for 10.

    python benchmarks/solvers.py [--rows 10000] [--width 768] [--classes 6] [--rounds 5]

One run, the ways interleaved; medians, and ratios to scikit-learn one fit after another, cold. Features are made:
classes around different means, a spectrum that falls, float32, standardised. Beside the times, whether the answers are
the same: ridge's weights, and the share of test rows that logreg calls right.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, in which `heads` is a benchmark

from heads.models.solvers import SOLVERS, STEPS, STRENGTHS


def features(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, width] standardised, int64 [rows]."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, rows)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    spread = np.arange(1, width + 1) ** -0.5
    centres = 1.5 * rng.normal(size=(classes, width)) * spread
    x = ((centres[y] + rng.normal(size=(rows, width))) * spread) @ turn
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), y


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, and what it gave last; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gave: dict[str, Any] = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            gave[name] = way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}, gave


def show(medians: dict[str, float], beside: str) -> None:
    for name, seconds in medians.items():
        print(f"{name:44s} {seconds:9.3f} s  {medians[beside] / seconds:8.2f} x")


def ridge(x: np.ndarray, y: np.ndarray, classes: int, rounds: int) -> None:
    given = torch.from_numpy(x)
    path = SOLVERS["ridge"](given, y, "multiclass", classes, print)
    mean_eigenvalue = len(x) * float(x.var(0, dtype=np.float64).mean())
    penalties = [setting["lambda"] * mean_eigenvalue for setting, _ in path]
    beside = f"RidgeClassifier {len(penalties)} times"
    medians, gave = in_turn(
        {
            beside: lambda: [RidgeClassifier(alpha=value).fit(x, y) for value in penalties],
            f"ridge, {len(penalties)} penalties": lambda: SOLVERS["ridge"](given, y, "multiclass", classes, print),
            "XᵀX in float32 (the limit)": lambda: x.T @ x,
        },
        rounds,
    )
    show(medians, beside)
    ours = gave[f"ridge, {len(penalties)} penalties"]
    apart = max(
        float(np.abs(m.ln.weight.detach().numpy() - r.coef_).max())
        for (_, m), r in zip(ours, gave[beside], strict=True)
    )
    print(f"{'largest difference of a weight':44s} {apart:9.1e}")


def logreg(x: np.ndarray, y: np.ndarray, classes: int, rounds: int) -> None:
    train = slice(0, len(x) * 5 // 6)
    given = torch.from_numpy(x)
    beside, ours = "LogisticRegression for 10 C, each cold", "logreg, 10 C"

    def cold() -> list[LogisticRegression]:
        return [LogisticRegression(C=value, max_iter=STEPS).fit(x[train], y[train]) for value in STRENGTHS]

    medians, gave = in_turn(
        {beside: cold, ours: lambda: SOLVERS["logreg"](given[train], y[train], "multiclass", classes, print)}, rounds
    )
    show(medians, beside)
    rest = slice(train.stop, None)
    with torch.inference_mode():
        right = [float((m(given[rest]).argmax(1).numpy() == y[rest]).mean()) for _, m in gave[ours]]
    print("test accuracy by C, cold   ", *(f"{model.score(x[rest], y[rest]):.4f}" for model in gave[beside]))
    print("test accuracy by C, logreg ", *(f"{value:.4f}" for value in right))
    print("steps cold                 ", *(f"{int(model.n_iter_[0]):6d}" for model in gave[beside]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["ridge", "logreg"])
    given = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    x, y = features(given.rows, given.width, given.classes)
    for way in (ridge, logreg):
        if given.only in (None, way.__name__):
            way(x, y, given.classes, given.rounds)


if __name__ == "__main__":
    main()
