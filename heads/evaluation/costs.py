"""What a run costs: parameters, seconds of training, milliseconds of an image; one table of names for all who show it.

The milliseconds of an image are those of the backbone and the head (or of a baseline's network) on the named device;
with loading, those of reading, decoding and resizing are added. What was not measured is None, as of imported features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heads.runs.run import Run


@dataclass(frozen=True)
class Cost:
    column: str  # over a column of a table
    words: str  # on the axis of a chart
    whole: bool = False  # a count, not a measured time


COSTS: dict[str, Cost] = {
    "parameters": Cost("parameters", "parameters of the head", whole=True),
    "backbone_parameters": Cost("of the backbone", "parameters of the backbone", whole=True),
    "train_seconds": Cost("s to train", "seconds to train"),
    "seconds_to_best": Cost("s to best", "seconds to the best epoch"),
    "inference_ms": Cost("ms/image", "ms an image, backbone and head"),
    "loaded_ms": Cost("with loading", "ms an image, with loading"),
    "ms_per_image": Cost("head alone", "ms an image, head alone"),
    "bytes_per_image": Cost("bytes/image", "bytes of cache an image", whole=True),
}
PRINTED = ("backbone_parameters", "train_seconds", "seconds_to_best", "inference_ms", "loaded_ms")
CHARTED = ("parameters", "train_seconds", "inference_ms", "ms_per_image")
MEASURED = ("forward_ms", "loading_ms", *(key for key in COSTS if key not in ("parameters", "backbone_parameters")))


def run_cost(run: Run) -> dict[str, Any]:
    """The measured costs of a run, its ``device`` and the parameters of its backbone; None where nobody knows."""
    record = run.config.get("cost") or {}
    measured = {key: record.get(key) for key in MEASURED}
    cost: dict[str, Any] = {key: float(v) if isinstance(v, int | float) else None for key, v in measured.items()}
    for key, *parts in (("inference_ms", "forward_ms", "ms_per_image"), ("loaded_ms", "inference_ms", "loading_ms")):
        cost[key] = None if None in (ms := [cost[part] for part in parts]) else sum(ms)
    backbone = (run.config.get("provenance") or {}).get("parameters")
    cost["backbone_parameters"] = backbone if type(backbone) is int and backbone >= 0 else None
    device = record.get("device") if cost["forward_ms"] is not None else None
    return cost | {"device": device if isinstance(device, str) else None}


def mean_cost(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the runs of a family that have them."""
    costs = [run_cost(run) for run in runs]
    values = {key: [cost[key] for cost in costs if cost[key] is not None] for key in MEASURED}
    mean = {key: float(np.mean(each)) if each else None for key, each in values.items()}
    return {"backbone_parameters": costs[0]["backbone_parameters"], **mean, "device": _devices(costs) or None}


def _devices(costs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(cost["device"] for cost in costs if cost.get("device")))


def cost_text(value: float | None, key: str) -> str:
    """Counts in full; times with three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if COSTS[key].whole or value >= 100 else f"{value:.3g}"


def devices_words(costs: Sequence[dict[str, Any]]) -> str:
    """What the milliseconds were measured on, named once; empty where none were."""
    return f"on {devices}" if (devices := _devices(costs)) else ""


def run_cost_line(cost: dict[str, Any]) -> str:
    """Of one run or family, in one line: ``0.41 s to train, best after 0.2 s; 12.3 ms/image, 13.1 with loading, …``."""
    text = {key: cost_text(cost.get(key), key) for key in COSTS}
    words = f"{text['train_seconds']} s to train"
    if cost["seconds_to_best"] is not None:
        words += f", best after {text['seconds_to_best']} s"
    if cost["inference_ms"] is None:
        return f"{words}; {text['ms_per_image']} ms/image of the head, the backbone's not measured"
    words += f"; {text['inference_ms']} ms/image"
    if cost["loaded_ms"] is not None:
        words += f", {text['loaded_ms']} with loading"
    return f"{words} ({devices_words([cost])})" if cost["device"] else words


def cost_columns(costs: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of a page: those that somebody measured; of the head alone only where the whole was not."""
    measured = [key for key in COSTS if any(cost.get(key) for cost in costs)]
    return [key for key in measured if key != "ms_per_image" or "inference_ms" not in measured]


def cost_rows(named: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """A header and a row for each; columns that nobody measured are left out, and without any there is no table."""
    keys = [key for key in PRINTED if any(cost.get(key) is not None for _, cost in named)]
    if not keys:
        return []
    header = ["what it costs", *(COSTS[key].column for key in keys)]
    return [header, *([name, *(cost_text(cost.get(key), key) for key in keys)] for name, cost in named)]
