"""Choosing a setting on val: the rows of one family in a sweep, and the order of heads in a table.

A *setting* is everything that is decided before training but seed, split seed and fold. Chosen is the one that is best
on val, averaged over them; settings are compared on the same draws: those of the setting that was trained on most, the
newest of such. One that was trained on fewer or on others is no candidate. A row is one head of a sweep, as its journal
has it. Nothing here loads torch: a table of sweeps is made by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featurecache.files.records import canonical_json
from heads.settings import GRIDS, METRICS, measure_name

REPEATED = ("seed", "split_seed", "fold", "splits", "ram", "device")  # what tells two trainings of one setting apart
Row = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """``rows``: of the chosen setting, one for each draw and seed; ``tried``: how many settings there were."""

    setting: dict[str, Any]
    rows: tuple[Row, ...]
    tried: int
    value: float  # of the criterion on val, averaged
    ends: dict[str, str]  # option -> "smallest" or "largest" of those tried
    edges: tuple[str, ...]  # the same as sentences
    incomplete: int  # settings left out because they have fewer or other draws or seeds


def family_of(row: Row) -> tuple[str, str, str, float]:
    return row["view"], row["output"], row["head"], row["fraction"]


def setting_of(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row["settings"].items() if name not in REPEATED}


def newest_rows(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of one family each setting on each draw once: the last, where one was trained again with another
    budget of memory or with its images in another order."""
    return list({(canonical_json(setting_of(row)), _draw_of(row)): row for row in rows}.values())


def _draw_of(row: Row) -> tuple[int, int | None, int]:
    return row["repeat"], row["fold"], row["settings"]["seed"]


def select_setting(rows: Sequence[Row], select: str) -> Selection | None:
    """The choice among the rows of one family; None where every head failed."""
    settings: dict[str, list[Row]] = {}
    for row in newest_rows(rows):
        settings.setdefault(canonical_json(setting_of(row)), []).append(row)
    draws = {text: frozenset(map(_draw_of, own)) for text, own in settings.items()}
    most = max(map(len, draws.values()))
    newest = (draws[canonical_json(setting_of(row))] for row in reversed(rows))
    wanted = next(own for own in newest if len(own) == most)
    full = {text: own for text, own in settings.items() if draws[text] == wanted}
    best = full[min(full, key=lambda text: (*selection_key(full[text], select), text))]
    value, setting = mean_of(best, select), setting_of(best[0])
    if math.isnan(value):
        return None
    ends = _ends(setting, [setting_of(own[0]) for own in full.values()])
    edges = tuple(
        f"{name.replace('_', ' ')} {setting[name]:g} is the {end} tried: a {end[:-2]}r one may be better"
        for name, end in ends.items()
    )
    return Selection(setting, tuple(best), len(full), value, ends, edges, len(settings) - len(full))


def selection_key(rows: Sequence[Row], select: str) -> tuple[float, float]:
    """Smaller is better: the criterion, then NLL; a head that failed, or has no such measure, is last."""
    value, loss = mean_of(rows, select), mean_of(rows, "loss")
    sign = -1 if METRICS[measure_name(select)].higher else 1
    return (math.inf if math.isnan(value) else sign * value), (math.inf if math.isnan(loss) else loss)


def mean_of(rows: Sequence[Row], select: str) -> float:
    """The criterion on val over the rows; NaN where one failed or has no such measure."""
    key = measure_name(select)
    values = [(row["val"] or {}).get(key) for row in rows]
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if len(there) == len(values) else math.nan


def _ends(setting: dict[str, Any], tried: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The numbers that were chosen at an end of what was tried; below 0 there is nothing to try."""
    ends = {}
    for name in GRIDS:
        values = sorted({v for each in tried if (v := each.get(name)) is not None})
        chosen = setting.get(name)
        if chosen and len(values) > 1 and chosen in (values[0], values[-1]):
            ends[name] = "smallest" if chosen == values[0] else "largest"
    return ends
