"""What is said of calibration and convergence, where the truth is known.

    python benchmarks/calibration.py [--heads 400]

Labels are drawn from softmax(z), and a head says z times a factor: at 1 it is calibrated, above it is overconfident.

``reading``: how often a head is called off by more than chance (at factor 1 about 2.5 % may be), and how often the
bootstrap interval of its ECE leaves out 0. ``bins``: the root mean square error (in 0.001) of the ECE minus what chance
alone gives, against the true calibration error, by the number of bins. ``temperature``: the temperature of val over the
true one.

As it came out (seed 0):

    reading      n  factor  called off  interval leaves out 0  ECE, mean
                45     1.0       2.0 %                  78 %      0.088
                45     1.5      15.5 %                  90 %      0.097
                45     2.5      61.0 %                  82 %      0.122
                90     1.0       2.2 %                  80 %      0.063
                90     1.5      24.8 %                  80 %      0.076
                90     2.5      84.8 %                 100 %      0.113
               300     1.0       3.0 %                 100 %      0.045
               300     1.5      59.2 %                 100 %      0.067
               300     2.5     100.0 %                 100 %      0.114
              1000     1.0       2.2 %                  95 %      0.029
              1000     1.5      98.2 %                 100 %      0.060
              1000     2.5     100.0 %                 100 %      0.113
              5000     1.0       3.0 %                 100 %      0.016
              5000     1.5     100.0 %                 100 %      0.058
              5000     2.5     100.0 %                 100 %      0.112
    bins         n        2   n^1/3  2n^1/3      15   n^1/2
                45     62.4    59.9    55.6    56.0    56.8
                90     51.2    51.3    48.9    48.9    48.4
               300     30.6    31.3    35.7    35.4    37.1
              1000     14.9    21.1    24.6    22.3    29.3
              5000      6.5    11.3    14.7    11.2    20.7

The ratio of temperatures is between (5 % to 95 %) 0.6 and 1.6 at 45 images, 0.7 and 1.4 at 90, 0.9 and 1.1 at 1,000,
whatever the factor: 0.001, 1, 50, 1000.
"""

# ruff: noqa: E402  this folder has to leave sys.path first

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder

from heads.metrics import reliability
from heads.metrics.calibration import CalibratedPredictions, temperature
from heads.metrics.classification import evaluate
from heads.metrics.intervals import FamilyEstimates, SharedResamples, TestSet

SIZES = (45, 90, 300, 1000, 5000)
LARGE = 200_000  # images on which a calibration error is as good as known


def head(rng: np.random.Generator, n: int, factor: float) -> CalibratedPredictions:
    z = 1.5 * rng.normal(size=(n, 2))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    return CalibratedPredictions("binary", factor * z, y, 1, (0.5,))


def ece(predictions: CalibratedPredictions) -> float:
    return float(evaluate(predictions, ["no", "yes"])["ece"])


def reading(rng: np.random.Generator, heads: int) -> None:
    print("reading      n  factor  called off  interval leaves out 0  ECE, mean")
    for n in SIZES:
        for factor in (1.0, 1.5, 2.5):
            drawn = [head(rng, n, factor) for _ in range(heads)]
            units, values = np.arange(n), [ece(each) for each in drawn]
            highs = [reliability.consistency_interval([((each,), units)])[1] for each in drawn]
            called = np.mean([value > high for value, high in zip(values, highs, strict=True)])
            estimates = [
                FamilyEstimates([TestSet("", units, (each,))], ["no", "yes"], SharedResamples(200)).estimate("ece")
                for each in drawn[:40]
            ]
            out = np.mean([each.low > 0 for each in estimates])
            print(f"        {n:6} {factor:7} {100 * called:9.1f} % {100 * out:19.0f} %  {np.mean(values):9.3f}")


def bins(rng: np.random.Generator, heads: int) -> None:
    print("bins         n  " + " ".join(f"{count:>7}" for count in ("2", "n^1/3", "2n^1/3", "15", "n^1/2")))
    true = ece(head(rng, LARGE, 2.0))
    ways = (lambda n: 2, lambda n: n ** (1 / 3), lambda n: 2 * n ** (1 / 3), lambda n: 15, lambda n: n**0.5)
    most, usual = reliability.MOST_BINS, reliability.bin_count
    for n in SIZES:
        errors = []
        for way in ways:
            reliability.MOST_BINS, reliability.bin_count = 1000, lambda m, way=way: max(2, round(way(m)))
            drawn = [reliability.Confidence.of(head(rng, n, 2.0)) for _ in range(heads)]
            own = np.array([each.calibration_error(each.truth[:, None])[0] for each in drawn])
            redrawn = [each.calibration_error((rng.random((n, 50)) < each.p[:, None]).astype(float)) for each in drawn]
            errors.append(1000 * np.sqrt(np.mean((own - [each.mean() for each in redrawn] - true) ** 2)))
        print(f"        {n:6}  " + " ".join(f"{error:7.1f}" for error in errors))
    reliability.MOST_BINS, reliability.bin_count = most, usual


def temperatures(rng: np.random.Generator, heads: int) -> None:
    print("temperature  n  factor  median ratio  5 % to 95 %  none")
    for n in SIZES:
        for factor in (1e-3, 1.0, 50.0, 1000.0):
            found = [temperature("binary", each.z, each.y) for each in (head(rng, n, factor) for _ in range(heads))]
            ratios = [t / factor for t, note in found if note is None]
            low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
            print(f"        {n:6} {factor:7g} {middle:13.2f}  {low:.2f} to {high:.2f} {heads - len(ratios):5}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=400)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    for each in (reading, bins, temperatures):
        each(rng, options.heads)


if __name__ == "__main__":
    main()
