"""The little language of a sweep's options: lists with commas, and ``a..b:n`` for n values in equal ratios.

>>> numbers("lr", "1e-4..1e-2:3")
(0.0001, 0.001, 0.01)
>>> numbers("weight-decay", "0,1e-4")
(0.0, 0.0001)
>>> space("lr", "1e-4..1e-2")
Range(low=0.0001, high=0.01)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from featurecache.errors import BadOption, nearest

DIGITS = 6  # significant ones of a value within a range, so that 1e-4..1e-2:3 holds the 1e-3 that somebody types
Numbers = str | float | Sequence[float]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, of which a search draws in equal ratios."""

    low: float
    high: float


def numbers(option: str, given: Numbers) -> tuple[float, ...]:
    """The values of an option such as ``lr``, each once, in the order given; raises BadOption."""
    found = space(option, given)
    if isinstance(found, Range):
        raise BadOption(
            f"--{option} {given}: how many values? {given}:5 are five; without a number it is a range for --search."
        )
    return found


def space(option: str, given: Numbers) -> tuple[float, ...] | Range:
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


def names(option: str, given: str | Iterable[str], known: Iterable[str] | None = None) -> tuple[str, ...]:
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
