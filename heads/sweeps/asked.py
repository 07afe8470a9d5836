"""A sweep as it was asked for: heads, outputs, the grid of options, seeds, draws of splits."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

from featurecache.errors import BadOption
from heads.choice import GRIDS
from heads.settings import OPTIMIZERS, SCHEDULES, Settings
from heads.sweeps import grids

WORDS = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


@dataclass(frozen=True)
class Asked:
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
    ) -> Asked:  # fmt: skip
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
        read = grids.numbers if search is None else grids.space
        grid: dict[str, Any] = {}
        for name in GRIDS:
            if (value := options.pop(name, None)) is not None:
                grid[name] = read(name.replace("_", "-"), value)
        for name, known in WORDS.items():
            if name in options:
                grid[name] = grids.names(name, options.pop(name), known)
        if augment := options.pop("augment", ()):
            several = [augment] if isinstance(augment, str) else list(augment)
            grid["augment"] = tuple(dict.fromkeys(Settings("", augment=words).augment for words in several))
        for name in ("seed", "fraction", "fold"):
            if name in options:
                raise BadOption(f"--{name} is for one head; a sweep has --{name}s.")
        base = Settings.of("", **options)
        parts = grids.numbers("fractions", fractions)
        for name, values in {**grid, "fraction": parts}.items():
            for value in [] if isinstance(values, grids.Range) else values:
                replace(base, **{name: value})  # says at once what no head could be trained with
        return cls(
            grids.names("heads", heads), () if outputs is None else grids.names("outputs", outputs), grid, base,
            seeds, parts, repeats, folds, search, trials, given,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"base": self.base.to_dict()}

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the grid, in the order given."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    @property
    def draws(self) -> list[Draw]:
        parts = [None] if self.folds is None else list(range(self.folds))
        return [Draw(repeat, fold) for repeat in range(self.repeats) for fold in parts]


@dataclass(frozen=True)
class Draw:
    """One drawing of splits: ``repeat`` counts up the split seed; ``fold`` of the folds, or None."""

    repeat: int
    fold: int | None
