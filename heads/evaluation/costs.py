"""What a run costs: parameters, seconds of training, milliseconds of an image. One table of names for every place that
shows it.

The milliseconds of an image are those of the backbone and the head (or of a baseline's network) on the named device;
with loading, those of reading, decoding and resizing are added. What was not measured is None: runs of before, and
features that were imported.
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
CHARTED = ("parameters", "train_seconds", "seconds_to_best", "inference_ms", "ms_per_image", "bytes_per_image")
MEASURED = ("forward_ms", "loading_ms", *(key for key in COSTS if key not in ("parameters", "backbone_parameters")))


def cost_of(run: Run) -> dict[str, Any]:
    """The measured costs of a run, its ``device`` and the parameters of its backbone; None where nobody knows."""
    known = run.config.get("cost") or {}
    found: dict[str, Any] = {key: _number(known.get(key)) for key in MEASURED}
    found["inference_ms"] = _sum(found["forward_ms"], found["ms_per_image"])
    found["loaded_ms"] = _sum(found["inference_ms"], found["loading_ms"])
    backbone = (run.config.get("provenance") or {}).get("parameters")
    found["backbone_parameters"] = backbone if type(backbone) is int and backbone >= 0 else None
    device = known.get("device") if found["forward_ms"] is not None else None
    found["device"] = device if isinstance(device, str) else None
    return found


def mean_cost(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the runs of a family that have them."""
    each = [cost_of(run) for run in runs]
    found: dict[str, Any] = {"backbone_parameters": each[0]["backbone_parameters"]}
    for key in MEASURED:
        values = [cost[key] for cost in each if cost[key] is not None]
        found[key] = float(np.mean(values)) if values else None
    devices = dict.fromkeys(cost["device"] for cost in each if cost["device"])
    return found | {"device": ", ".join(devices) or None}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def cost_text(value: float | None, key: str) -> str:
    """Counts in full; times with three digits."""
    if value is None:
        return "–"
    if COSTS[key].whole:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def devices_words(costs: Sequence[dict[str, Any]]) -> str:
    """What the milliseconds were measured on, named once; empty where none were."""
    devices = list(dict.fromkeys(cost["device"] for cost in costs if cost.get("device")))
    return f"on {', '.join(devices)}" if devices else ""


def cost_line(cost: dict[str, Any]) -> str:
    """Of one run or family, in one line: ``0.41 s to train, best after 0.2 s; 12.3 ms/image, 13.1 with loading, …``."""
    words = f"{cost_text(cost['train_seconds'], 'train_seconds')} s to train"
    if cost["seconds_to_best"] is not None:
        words += f", best after {cost_text(cost['seconds_to_best'], 'seconds_to_best')} s"
    if cost["inference_ms"] is None:
        head = cost_text(cost["ms_per_image"], "ms_per_image")
        return f"{words}; {head} ms/image of the head, the backbone's not measured"
    words += f"; {cost_text(cost['inference_ms'], 'inference_ms')} ms/image"
    if cost["loaded_ms"] is not None:
        words += f", {cost_text(cost['loaded_ms'], 'loaded_ms')} with loading"
    return f"{words} ({devices_words([cost])})" if cost["device"] else words


def shown(costs: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of a page: those that somebody measured; of the head alone only where the whole was not."""
    known = [key for key in COSTS if any(cost.get(key) for cost in costs)]
    return [key for key in known if key != "ms_per_image" or "inference_ms" not in known]


def cost_rows(named: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """A header and a row for each; columns that nobody measured are left out, and without any there is no table."""
    keys = [key for key in PRINTED if any(cost.get(key) is not None for _, cost in named)]
    if not keys:
        return []
    header = ["what it costs", *(COSTS[key].column for key in keys)]
    return [header, *([name, *(cost_text(cost.get(key), key) for key in keys)] for name, cost in named)]
