"""Families: the runs of one setting of one head on one output of one view at one fraction, and what varied among them.

Runs of a family differ in ``seed`` (initialisation), ``split_seed`` (repeats: other splits or another fraction of
train) and ``fold``, and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption
from featurecache.spec import canonical_json
from heads.architectures import HEADS
from heads.choice import setting_of
from heads.settings import Settings

if TYPE_CHECKING:
    from heads.runs import Run

NAMED = ("head", "output", "fraction", "folds")  # what a family's own columns say
Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """``tried``: the rows of a sweep that the setting was chosen among, on val; () for runs that were trained alone."""

    view: str
    output: str
    head: str
    fraction: float
    runs: tuple[Run, ...]
    tried: tuple[Row, ...] = ()

    @property
    def from_pixels(self) -> bool:
        """Whether it is a network that was trained from pixels."""
        return is_of_pixels(self.output)

    def vary(self, what: str) -> int:
        """How many seeds, repeats or folds there are."""
        place = {"seeds": 0, "repeats": 1, "folds": 2}[what]
        return len({draw_of(run)[place] for run in self.runs})


def draw_of(run: Run) -> tuple[int, int, int | None]:
    """Seed, split seed, fold: what tells the runs of a family apart."""
    settings, fold = run.config["settings"], run.config["splits"].get("fold")
    return settings["seed"], settings["split_seed"], fold[0] if fold else None


def families_of(runs: Sequence[Run]) -> list[Family]:
    """Plain runs that differ only in seed, split seed and fold are one family; any other setting is one of its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        config = run.config
        view = [config["view"].get("fingerprint"), config["view"]["label"], run.output]
        key = [view, setting_of({"settings": config["settings"]}), config["classes"], config["positive"]]
        found.setdefault(canonical_json(key), []).append(run)
    return [
        Family(same[0].config["view"]["label"], same[0].output, same[0].head, fraction_of(same[0]), tuple(same))
        for same in found.values()
    ]


def fraction_of(run: Run) -> float:
    return float(run.config["splits"].get("fraction") or 1.0)


def check_comparable(families: Sequence[Family]) -> None:
    """Raises BadOption where the runs do not answer the same question."""
    first = families[0].runs[0]
    for family in families:
        for run in family.runs:
            mine, other = ((r.task, list(r.classes), r.config["positive"]) for r in (first, run))
            if mine != other:
                told = [f"{kind} of {', '.join(names[:8])}" + (f" (positive: {p})" if p else "") for kind, names, p in
                        (mine, other)]  # fmt: skip
                raise BadOption(
                    f"{first.path} and {run.path} do not answer the same question: {told[0]}; {told[1]}. "
                    "Compare runs of one task."
                )


def names_of(families: Sequence[Family]) -> list[str]:
    """A name for each that no other has: head and output, and as much more as is needed to tell them apart."""
    names = [name_of(family.head, family.output) for family in families]
    views = {family.view for family in families if not family.from_pixels}
    words: tuple[Callable[[Family], str], ...] = (
        lambda f: f" of {f.view}" if len(views) > 1 and not f.from_pixels else "",
        lambda f: f" at {100 * f.fraction:g} %" if len({g.fraction for g in families}) > 1 else "",
    )
    for word in words:
        names = [name + word(family) for name, family in zip(names, families, strict=True)]
    shown = [setting_shown(family.runs[0]) for family in families]
    plain = list(names)
    for k, name in enumerate(plain):
        same = [i for i, other in enumerate(plain) if other == name]
        if len(same) > 1:
            varied = [key for key in shown[k] if len({repr(shown[i].get(key)) for i in same}) > 1]
            told = ", ".join(_told(key.replace("_", " "), shown[k][key]) for key in varied)
            names[k] = f"{name}, {told}" if told else name
    repeated = [name for name in names if names.count(name) > 1]
    return [f"{n} ({f.runs[0].path.name})" if n in repeated else n for n, f in zip(names, families, strict=True)]


def is_of_pixels(output: str) -> bool:
    """Whether an output is that of a network from pixels: the images themselves."""
    return output.startswith("pixels-")


def name_of(head: str, output: str) -> str:
    """``large on tokens``; of a network from pixels its name and theirs: ``cnn-cifar at 32 px``."""
    side = output.removeprefix("pixels-")
    return f"{head} on {output}" if side == output else f"{head} at {side} px"


def _told(key: str, value: Any) -> str:
    """``lr 0.001``, ``rlrr``, ``no balance``."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def setting_shown(run: Run) -> dict[str, Any]:
    """Of a run's setting: the numbers that grids vary, what is not as by default, what a solver chose in its path."""
    return shown_of(run.config["settings"]) | _solved(run)


def shown_of(settings: dict[str, Any]) -> dict[str, Any]:
    plain = Settings(settings["head"]).to_dict()
    solved = settings["head"] in HEADS and HEADS[settings["head"]].solved
    always = () if solved else ("lr", "weight_decay")
    own = setting_of({"settings": settings})
    return {
        key: value
        for key, value in own.items()
        if key not in NAMED and (value != plain.get(key) or key in always) and value is not None
    }


def _solved(run: Run) -> dict[str, Any]:
    """The chosen value of the path of a solved head; a head that was trained in steps has a training loss instead."""
    line = next((row for row in run.history if row["epoch"] == run.config["chosen"]["epoch"]), {})
    if "train_loss" in line:
        return {}
    known = ("epoch", "best", "seconds")
    return {key: value for key, value in line.items() if key not in known and not key.startswith("val_")}


def edges_of_paths(family: Family) -> list[str]:
    """What was said in training of values chosen at the edge of what a solver tried."""
    words = [w for run in family.runs for w in run.config.get("warnings", []) if "at the edge of what was tried" in w]
    return list(dict.fromkeys(words))


def spread(family: Family, names: Sequence[str]) -> dict[str, dict[str, float | None] | None]:
    """Standard deviations on test: over seeds within a split and fold (initialisation only), over repeats of the means
    of their seeds and folds, over folds within a repeat of the means of their seeds. None where only one is there."""
    values = {m: {draw_of(run): _number(run.metrics["test"].get(m)) for run in family.runs} for m in names}
    kinds: dict[str, tuple[Callable[..., Hashable], Callable[..., Hashable]]] = {
        "seeds": (lambda seed, split, fold: (split, fold), lambda seed, split, fold: seed),
        "repeats": (lambda seed, split, fold: None, lambda seed, split, fold: split),
        "folds": (lambda seed, split, fold: split, lambda seed, split, fold: fold),
    }
    found: dict[str, dict[str, float | None] | None] = {}
    for kind, (within, over) in kinds.items():
        several = family.vary(kind) > 1
        found[kind] = {m: _deviation(values[m], within, over) for m in names} if several else None
    return found


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _deviation(values: dict[Any, float], within: Callable[..., Hashable], over: Callable[..., Hashable]) -> float:
    """Square root of the mean variance within."""
    cells: dict[Hashable, dict[Hashable, list[float]]] = {}
    for draw, value in values.items():
        cells.setdefault(within(*draw), {}).setdefault(over(*draw), []).append(value)
    means = [[float(np.mean(v)) for v in cell.values()] for cell in cells.values()]
    variances = [np.var(cell, ddof=1) for cell in means if len(cell) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else math.nan


def only_initialisation(families: Sequence[Family]) -> str | None:
    """A sentence where seeds vary and splits do not."""
    seeds = max(family.vary("seeds") for family in families)
    others = max(max(family.vary("repeats"), family.vary("folds")) for family in families)
    if seeds < 2 or others > 1:
        return None
    return (
        f"only the initialisation varied ({seeds} seeds): the spread over seeds says nothing about other splits, which "
        "matter several times as much; --repeats or --folds draws them"
    )
