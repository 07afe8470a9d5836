"""1e-4..1e-1:7, lists, seeds, draws of splits: SweepSpec.

The little language of a sweep's options: lists with commas, and ``a..b:n`` for n values in equal ratios.

>>> numbers("lr", "1e-4..1e-2:3")
(0.0001, 0.001, 0.01)
>>> numbers("weight-decay", "0,1e-4")
(0.0, 0.0001)
>>> space("lr", "1e-4..1e-2")
Range(low=0.0001, high=0.01)

A sweep as it was asked for: heads, outputs, the grid of options, seeds, draws of splits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from featurecache.errors import BadOption, nearest
from heads.evaluation.families import GRIDS
from heads.settings import OPTIMIZERS, SCHEDULES, Settings

DIGITS = 6  # significant ones of a value within a range, so that 1e-4..1e-2:3 holds the 1e-3 that somebody types
Numbers = str | float | Sequence[float]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, of which a search draws in equal ratios."""

    low: float
    high: float


def numbers(option: str, given: Numbers) -> tuple[float, ...]:
    """The values of an option such as ``lr``, each once, in the order given; raises BadOption."""
    found = search_range(option, given)
    if isinstance(found, Range):
        raise BadOption(
            f"--{option} {given}: how many values? {given}:5 are five; without a number it is a range for --search."
        )
    return found


def search_range(option: str, given: Numbers) -> tuple[float, ...] | Range:
    """`numbers`, or the one ``a..b`` that a search may take any number of."""
    if not isinstance(given, str):
        values = [given] if isinstance(given, int | float) else list(given)
        return _once(option, [_finite(option, str(value)) for value in values])
    pieces = [piece.strip() for piece in given.split(",")]
    if len(pieces) == 1 and ".." in given and ":" not in given:
        return Range(*_ends(option, given))
    return _once(option, [value for piece in pieces for value in _piece(option, piece)])


def _piece(option: str, text: str) -> list[float]:
    if ".." not in text:
        return [_finite(option, text)]
    ends, _, count = text.partition(":")
    low, high = _ends(option, ends)
    if not count.isdecimal() or int(count) < 2:
        raise BadOption(f"--{option} {text}: a range ends with how many values, at least two: {ends}:5.")
    values = np.geomspace(low, high, int(count))
    return [low, *(float(f"{value:.{DIGITS}g}") for value in values[1:-1]), high]


def _ends(option: str, text: str) -> tuple[float, float]:
    first, _, last = text.partition("..")
    low, high = _finite(option, first), _finite(option, last)
    if not 0 < low < high:
        raise BadOption(
            f"--{option} {text}: a range goes in equal ratios from a number above 0 to a larger one. "
            "0 can stand beside it: 0,1e-5..1e-3:3."
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


def _once(option: str, values: list[float]) -> tuple[float, ...]:
    if not values:
        raise BadOption(f"--{option} is empty; it takes 1e-3, or 0,1e-4, or 1e-4..1e-2:5.")
    return tuple(dict.fromkeys(values))


def choices(option: str, given: str | Iterable[str], known: Iterable[str] | None = None) -> tuple[str, ...]:
    """A list of words, each once, in the order given; ``known``: those that there are."""
    words = given.split(",") if isinstance(given, str) else list(given)
    found = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not found:
        raise BadOption(f"--{option} is empty; it takes names with commas between them.")
    known = None if known is None else list(known)
    for word in found:
        if known is not None and word not in known:
            raise BadOption(f"--{option}: {word!r} is none of {', '.join(known)}.{nearest(word, known)}")
    return found


WORDS = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


@dataclass(frozen=True)
class SweepSpec:
    """A sweep as it was asked for. ``grid``: the values of every option that is varied; ``base``: the others.

    With ``search`` a value of ``grid`` may be a `grids.Range`.
    """

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
    given: tuple[str, ...] = ()  # what was asked for; for the rest a baseline has its published settings

    @classmethod
    def of(
        cls, heads: Any, *, outputs: Any = None, seeds: int = 1, fractions: Any = 1.0, repeats: int = 1,
        folds: int | None = None, search: str | None = None, trials: int | None = None, **options: Any,
    ) -> SweepSpec:  # fmt: skip
        """From options as people and the command line give them; raises BadOption."""
        options = {name: value for name, value in options.items() if value is not None and value != ()}
        given = tuple(sorted(options))
        if search not in (None, "optuna"):
            raise BadOption(f"--search {search}: it is optuna, or left out for a grid.")
        if (search is None) != (trials is None):
            raise BadOption("--search optuna and --trials N go together.")
        for name, value, least in (("seeds", seeds, 1), ("repeats", repeats, 1), ("trials", trials or 1, 1)):
            if value < least:
                raise BadOption(f"--{name} is {value}; it must be at least {least}.")
        if folds is not None and folds < 2:
            raise BadOption(f"--folds is {folds}; it must be at least 2.")
        read = numbers if search is None else search_range
        grid: dict[str, Any] = {}
        for name in GRIDS:
            if (value := options.pop(name, None)) is not None:
                grid[name] = read(name.replace("_", "-"), value)
        for name, known in WORDS.items():
            if name in options:
                grid[name] = choices(name, options.pop(name), known)
        if augment := options.pop("augment", ()):
            several = [augment] if isinstance(augment, str) else list(augment)
            grid["augment"] = tuple(dict.fromkeys(Settings("", augment=words).augment for words in several))
        for name in ("seed", "fraction", "fold"):
            if name in options:
                raise BadOption(f"--{name} is for one head; a sweep has --{name}s.")
        base = Settings.of("", **options)
        parts = numbers("fractions", fractions)
        for name, values in {**grid, "fraction": parts}.items():
            for value in [] if isinstance(values, Range) else values:
                replace(base, **{name: value})  # says at once what no head could be trained with
        return cls(
            choices("heads", heads), () if outputs is None else choices("outputs", outputs), grid, base,
            seeds, parts, repeats, folds, search, trials, given,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"base": self.base.to_dict()}

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the grid, in the order given."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    @property
    def draws(self) -> list[Resplit]:
        parts = [None] if self.folds is None else list(range(self.folds))
        return [Resplit(repeat, fold) for repeat in range(self.repeats) for fold in parts]


@dataclass(frozen=True)
class Resplit:
    """One drawing of splits: ``repeat`` counts up the split seed; ``fold`` of the folds, or None."""

    repeat: int
    fold: int | None
