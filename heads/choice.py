"""Which setting of a family is shown: the best on val, averaged over seeds, repeats and folds.

A *setting* is everything that is decided before training except what only repeats it: seed, split seed, fold. Settings
are compared on the same draws: one that was trained on fewer of them than another is no candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featurecache.spec import canonical_json
from heads.metrics import METRICS, named_by

REPEATED = ("seed", "split_seed", "fold", "splits", "ram", "device")  # what tells two trainings of one setting apart
GRIDS = ("lr", "weight_decay", "dropout", "label_smoothing")
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """``rows``: of the chosen setting, one for each draw and seed; ``tried``: how many settings there were."""

    setting: dict[str, Any]
    rows: tuple[Row, ...]
    tried: int
    value: float  # of the criterion on val, averaged
    ends: dict[str, str]  # option -> "smallest" or "largest" of those tried
    edges: tuple[str, ...]  # the same as sentences
    partly: int  # settings left out because they have fewer draws or seeds


def family_of(row: Row) -> tuple[str, str, str, float]:
    return row["view"], row["output"], row["head"], row["fraction"]


def setting_of(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row["settings"].items() if name not in REPEATED}


def choose(rows: Sequence[Row], select: str) -> Choice | None:
    """The choice among the rows of one family; None where every head failed."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(canonical_json(setting_of(row)), []).append(row)
    most = max(len(own) for own in settings.values())
    full = {text: own for text, own in settings.items() if len(own) == most}
    best = min(full, key=lambda text: (*rank(full[text], select), text))
    value = mean_of(full[best], select)
    if math.isnan(value):
        return None
    setting = setting_of(full[best][0])
    tried = [setting_of(own[0]) for own in full.values()]
    ends = _ends(setting, tried)
    edges = tuple(
        f"{name.replace('_', ' ')} {setting[name]:g} is the {end} tried: a {end[:-2]}r one may be better"
        for name, end in ends.items()
    )
    return Choice(setting, tuple(full[best]), len(full), value, ends, edges, len(settings) - len(full))


def rank(rows: Sequence[Row], select: str) -> tuple[float, float]:
    """Smaller is better: the criterion, then NLL; a head that failed, or has no such measure, is last."""
    value, loss = mean_of(rows, select), mean_of(rows, "loss")
    sign = -1 if select != "loss" and METRICS[select].higher else 1
    return (math.inf if math.isnan(value) else sign * value), (math.inf if math.isnan(loss) else loss)


def mean_of(rows: Sequence[Row], select: str) -> float:
    """The criterion on val over the rows; NaN where one failed or has no such measure."""
    key = named_by(select)
    values = [(row["val"] or {}).get(key) for row in rows]
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if len(there) == len(values) else math.nan


def _ends(setting: dict[str, Any], tried: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The numbers that were chosen at an end of what was tried; below 0 there is nothing to try."""
    found = {}
    for name in GRIDS:
        values = sorted({v for each in tried if (v := each.get(name)) is not None})
        chosen = setting.get(name)
        if chosen and len(values) > 1 and chosen in (values[0], values[-1]):
            found[name] = "smallest" if chosen == values[0] else "largest"
    return found
