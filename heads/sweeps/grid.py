"""Search space of a sweep: heads, outputs, grids of options, seeds, and how often splits are drawn.

Options are lists with commas, ``a..b:n`` for n values in equal ratios, ``a..b:+s`` for those in equal steps; ``a..b``
alone is a range for a search, which takes ``a..b:+s`` too. What counts something is rounded to whole numbers.

>>> numbers("lr", "1e-4..1e-2:3")
(0.0001, 0.001, 0.01)
>>> numbers("weight-decay", "0,1e-4")
(0.0, 0.0001)
>>> numbers("batch-size", "8..64:4"), numbers("dropout", "0..0.5:+0.25")
((8, 16, 32, 64), (0.0, 0.25, 0.5))
>>> search_range("lr", "1e-4..1e-2")
Range(low=0.0001, high=0.01, step=None)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from featurecache.errors import BadOption, nearest, plain_value
from featurecache.formatting import exact_number
from featurecache.outputs import members
from heads.models.catalogue import head_info
from heads.settings import GRIDS, TABLE, Settings

MOST = 1000  # values of a range
DIGITS = 6  # significant ones of a value within a range, so that 1e-4..1e-2:3 holds the 1e-3 that somebody types
Numbers = str | float | Sequence[float]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, of which a search draws in equal ratios, or with ``step`` those in equal steps."""

    low: float
    high: float
    step: float | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f":+{exact_number(self.step)}"
        return f"{exact_number(self.low)}..{exact_number(self.high)}{step}"


@dataclass(frozen=True)
class Resplit:
    """One drawing of splits: ``repeat`` counts up the split seed; ``fold`` of the folds, or None."""

    repeat: int
    fold: int | None


@dataclass(frozen=True)
class SweepSpec:
    """A sweep as it was asked for. ``grid``: the values of every option that is varied (with ``search`` also a
    `Range`); ``base``: the others; ``given``: the options that were named."""

    heads: tuple[str, ...]
    outputs: tuple[str, ...]  # (): each head's own
    grid: dict[str, Any]
    base: Settings
    seeds: int = 1
    fractions: tuple[float, ...] = (1.0,)
    repeats: int = 1
    folds: int | None = None
    search: str | None = None
    trials: int | None = None
    given: tuple[str, ...] = ()  # for the rest a network has its published settings

    @classmethod
    def of(
        cls, heads: Any, *, outputs: Any = None, seeds: int = 1, fractions: Any = 1.0, repeats: int = 1,
        folds: int | None = None, search: str | None = None, trials: int | None = None, **options: Any,
    ) -> SweepSpec:  # fmt: skip
        """From options as people and the command line give them; raises BadOption."""
        options = {name: plain_value(name, value, "") for name, value in options.items()}
        options = {name: value for name, value in options.items() if value is not None and value not in ((), [])}
        given = tuple(sorted(options))
        if search not in (None, "optuna"):
            raise BadOption(f"--search {search}: it is optuna, or left out for a grid.")
        if (search is None) != (trials is None):
            raise BadOption("--search optuna and --trials N go together.")
        seeds, repeats = plain_value("--seeds", seeds, "int"), plain_value("--repeats", repeats, "int")
        trials, folds = plain_value("--trials", trials, "int | None"), plain_value("--folds", folds, "int | None")
        counts = (("seeds", seeds, 1), ("repeats", repeats, 1), ("trials", trials, 1), ("folds", folds, 2))
        for name, value, low in counts:
            if value is not None and value < low:
                raise BadOption(f"--{name} is {value}; it must be at least {low}.")
        for name in ("seed", "fraction", "fold"):
            if name in options:
                raise BadOption(f"--{name} is for one head; a sweep has --{name}s.")
        grid = _grid(options, search is not None)
        base = Settings.of("", **{name: value for name, value in options.items() if name not in grid})
        parts = numbers("fractions", plain_value("fractions", fractions, ""))
        for name, values in {**grid, "fraction": parts}.items():
            tried: Any = (values.low, values.high) if isinstance(values, Range) else values
            for each in tried:
                replace(base, **{name: each})  # says at once what no head could be trained with
        names, wanted = choices("heads", heads), () if outputs is None else choices("outputs", outputs)
        for name in names:
            head_info(name)
        for name in wanted:
            members(name)
        return cls(names, wanted, grid, base, seeds, parts, repeats, folds, search, trials, given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"base": self.base.to_dict()}

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the grid, in the order given."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    @property
    def resplits(self) -> list[Resplit]:
        folds = [None] if self.folds is None else list(range(self.folds))
        return [Resplit(repeat, fold) for repeat in range(self.repeats) for fold in folds]


def _grid(options: dict[str, Any], search: bool) -> dict[str, Any]:
    """The values of those options that are varied."""
    read = search_range if search else numbers
    grid: dict[str, Any] = {name: read(name.replace("_", "-"), options[name]) for name in GRIDS if name in options}
    for name in ("optimizer", "schedule"):
        if name in options:
            grid[name] = choices(name, options[name], TABLE[name].metadata["values"])
    if augment := options.get("augment"):
        several = [augment] if isinstance(augment, str) else list(augment)
        grid["augment"] = tuple(dict.fromkeys(Settings("", augment=steps).augment for steps in several))
    return grid


def numbers(option: str, value: Numbers) -> tuple[float, ...]:
    """The values of an option such as ``lr``, each once, in the order given; raises BadOption."""
    values = _values(option, value)
    if isinstance(values, Range):
        raise BadOption(
            f"--{option} {value}: how many values? {value}:5 are five; without a number it is a range for --search."
        )
    return values


def search_range(option: str, value: Numbers) -> tuple[float, ...] | Range:
    """`numbers`, or the one ``a..b`` or ``a..b:+s`` that a search may take any number of."""
    values, text = _values(option, value), str(value)
    if isinstance(values, Range) or ":+" not in text or "," in text:
        return values
    return Range(values[0], values[-1], _whole(option, _finite(option, text.partition(":+")[2])))


def _values(option: str, value: Numbers) -> tuple[float, ...] | Range:
    if not isinstance(value, str):
        value = ",".join(map(str, [value] if isinstance(value, int | float) else value))
    pieces = [piece.strip() for piece in value.split(",")]
    if len(pieces) == 1 and ".." in value and ":" not in value:
        return Range(*(_whole(option, end) for end in _ends(option, value)))
    return tuple(dict.fromkeys(_whole(option, number) for piece in pieces for number in _piece(option, piece)))


def _whole(option: str, value: float) -> float:
    """Of an option that counts something a whole number."""
    entry = TABLE.get(option.replace("-", "_"))
    return round(value) if entry is not None and entry.type == "int" else value


def _piece(option: str, text: str) -> list[float]:
    if ".." not in text:
        return [_finite(option, text)]
    ends, _, count = text.partition(":")
    if count.startswith("+"):
        return _steps(option, ends, count[1:])
    low, high = _ends(option, ends)
    if not count.isdecimal() or int(count) < 2:
        raise BadOption(f"--{option} {text}: a range ends with how many values, at least two: {ends}:5.")
    values = np.geomspace(low, high, int(count))
    return [low, *(float(f"{value:.{DIGITS}g}") for value in values[1:-1]), high]


def _steps(option: str, ends: str, text: str) -> list[float]:
    low, high = (_finite(option, end) for end in ends.split("..", 1))
    step = _finite(option, text)
    count = math.floor((high - low) / step + 1e-9) + 1 if step > 0 else 0
    if not 2 <= count <= MOST:
        raise BadOption(
            f"--{option} {ends}:+{text}: equal steps go from a number to a larger one, {MOST:,} values at most: "
            "0..0.5:+0.1."
        )
    return [float(f"{low + place * step:.{DIGITS}g}") for place in range(count)]


def _ends(option: str, text: str) -> tuple[float, float]:
    first, _, last = text.partition("..")
    low, high = _finite(option, first), _finite(option, last)
    if not 0 < low < high:
        raise BadOption(
            f"--{option} {text}: a range goes in equal ratios from a number above 0 to a larger one. "
            "0 can stand beside it: 0,1e-5..1e-3:3; equal steps are 0..0.5:+0.1."
        )
    return low, high


def _finite(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadOption(f"--{option}: {text!r} is no number. It takes 1e-3, or 0,1e-4, or 1e-4..1e-2:5.")
    return value


def choices(option: str, value: str | Iterable[str], allowed: Iterable[str] | None = None) -> tuple[str, ...]:
    """A list of words, each once, in the order given; ``allowed``: those that there are."""
    words = value.split(",") if isinstance(value, str) else list(value)
    chosen = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not chosen:
        raise BadOption(f"--{option} is empty; it takes names with commas between them.")
    for word in chosen:
        if allowed is not None and word not in allowed:
            raise BadOption(f"--{option}: {word!r} is none of {', '.join(allowed)}.{nearest(word, allowed)}")
    return chosen
