"""The errors a user can meet. One family; each class is also the builtin a caller would expect.

A message says what was found, what was expected, and what to type. ``cli`` catches the root once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class FeatureCacheError(Exception):
    """Root of every error raised for users."""

    def __str__(self) -> str:  # KeyError would quote it, OSError put its number before it
        return str(self.args[-1]) if self.args else ""


class UnknownName(FeatureCacheError, KeyError):
    """A word that is in none of the tables."""


class UnknownBackbone(UnknownName):
    """No backbone is called that."""


class UnknownHead(UnknownName):
    """No head is called that."""


class UnknownStudy(UnknownName):
    """No study, and no step of one, is called that."""


class UnknownOutput(UnknownName):
    """No output is called that."""


class OutputRefused(FeatureCacheError, ValueError):
    """The backbone has no such output, or one that would mean nothing."""


class WeightsNotFound(FeatureCacheError, FileNotFoundError):
    """Neither on this machine nor to be had from the hub."""


class WeightsDoNotFit(FeatureCacheError, ValueError):
    """The checkpoint and the architecture disagree."""


class PreprocessingRefused(FeatureCacheError, ValueError):
    """The weights' own preprocessing is missing, or cannot be reproduced exactly."""


class SourceError(FeatureCacheError, ValueError):
    """The images or their table are not as they have to be."""


@dataclass(frozen=True)
class Reading:
    """One way to read what a user gave, and the options that say that it is this one."""

    words: str
    options: dict[str, Any]  # as the library and the command line call them: {"classes_at": 2}


class UnknownSourceName(SourceError, UnknownName):
    """No data set, no column or array, or no class of the data is called that."""


class SeveralReadings(SourceError):
    """Data that can be read in several ways. At a terminal the command asks which; elsewhere it says what to type."""

    def __init__(self, message: str, readings: Sequence[Reading]) -> None:
        super().__init__(message)
        self.readings = tuple(readings)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.readings)


class NotFetched(SourceError):
    """A published data set whose files are not on this machine."""


class UnreadableImage(FeatureCacheError, ValueError):
    """One image that cannot be decoded; its message is the reason. Never ends a run by itself."""


class CacheError(FeatureCacheError, ValueError):
    """A store, shard or view that cannot be used as it is."""


class DamagedFile(CacheError):
    """A file that does not carry the bytes it was written with."""


class UnsafeFile(CacheError):
    """A file that refers outside its store or holds what no file of ours holds."""


class ViewReplaced(CacheError):
    """A view that is open here was written again with other images or bytes, and the shards it had are gone."""


class InUse(CacheError):
    """A store that another process works in."""


class Drift(CacheError):
    """This machine computes other features than those a store holds."""


class NotInCache(FeatureCacheError, LookupError):
    """Something asked for that has not been extracted."""


class UnknownView(NotInCache, UnknownName):
    """No view is called that."""


class AmbiguousName(FeatureCacheError, LookupError):
    """A name that several things carry."""


class CannotWrite(FeatureCacheError, OSError):
    """The disk is full, read-only or gone; what was committed is safe."""


class StorageError(FeatureCacheError, ConnectionError):
    """Object storage that does not answer, or refuses."""


class ForwardUnavailable(FeatureCacheError, RuntimeError):
    """A way of computing a forward pass that this machine, or this network, has not."""


class WorkersLost(FeatureCacheError, RuntimeError):
    """Processes that compute for an extraction end again and again."""


class Stopped(FeatureCacheError):
    """Ctrl-C; what is finished is safe."""


class BadOption(FeatureCacheError, ValueError):
    """Options that contradict each other or the data."""


class ProtocolError(FeatureCacheError, ValueError):
    """The data do not allow what the protocol needs (a split too small, one class only, ...)."""


class RunError(FeatureCacheError, ValueError):
    """A run folder that is missing, incomplete or in the way."""


class StepFailed(FeatureCacheError, RuntimeError):
    """A step of a study did not succeed; what came before it is kept."""


def nearest(word: str, names: Iterable[str]) -> str:
    """`` Near: a, b.`` or an empty string: at most three names that differ from ``word`` in a letter or two (compact is
    not near compare, of a ratio of 0.71), or of which one begins with the other, each once."""
    names, n = list(dict.fromkeys(names)), max(len(word), 2)
    near = difflib.get_close_matches(word, names, cutoff=min(0.72, (n - 1) / n))
    begins = [x for x in names if min(len(x), len(word)) > 2 and (x.startswith(word) or word.startswith(x))]
    near += [name for name in begins if name not in near]
    return f" Near: {', '.join(near[:3])}." if near else ""


def plain_value(option: str, value: Any, kind: str) -> Any:
    """``value`` of an option as Python's own number, word or list, where it is one of numpy's too. ``kind``: its
    annotation, such as "int | None". Raises BadOption for another kind of number, or what is none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    name, _, none = kind.partition(" | ")
    kinds: dict[str, tuple[Any, str]] = {
        "int": (int, "a whole number"), "float": ((int, float), "a number"), "bool": (bool, "True or False"),
    }  # fmt: skip
    if name not in kinds or (value is None and none):
        return value
    types, words = kinds[name]
    if not isinstance(value, types) or isinstance(value, bool) != (name == "bool"):  # True is an int to Python
        raise BadOption(f"{option} is {value!r}; it must be {words}.")
    return value


def first_line(error: BaseException) -> str:
    """``ValueError: what it says``, of a stranger's error whose message may have many lines."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
