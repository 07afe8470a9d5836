"""How numbers and names are written on the page of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from heads.costs import COSTS, cost_text
from heads.metrics import METRICS
from heads.reports.origin import setting_words
from heads.reports.sections import COUNTS
from heads.runs import Run
from heads.tables import number, title


def filters_for(task: str) -> dict[str, Callable[..., Any]]:
    """What the templates call the functions below."""
    return {
        "num": number, "signed": signed, "pvalue": pvalue, "count": count_words, "percent": percent, "plural": plural,
        "cost": cost_text, "cost_title": lambda key: COSTS[key].column, "count_title": COUNTS.get,
        "setting": setting_words,
        "title": lambda m: title(m, task), "class_title": lambda m: title(m, "binary") if m in METRICS else m,
        "higher": lambda m: METRICS[m].higher,
    }  # fmt: skip


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def pvalue(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count_words(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def plural(count: int | None, word: str) -> str:
    return f"{count or 1:,} {word}{'' if (count or 1) == 1 else 's'}"


def title_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    views = list(dict.fromkeys(run.config["view"]["label"] for run in runs))
    where = ", ".join(views[:3]) + (f" and {len(views) - 3} more" if len(views) > 3 else "")
    families = record["families"]
    return f"{families[0]['name']}: {where}" if len(families) == 1 else f"{where}: {len(families)} heads compared"


def subtitle_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    classes = record["classes"]
    named = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    positive = f"; positive is {record['positive']}" if record["positive"] else ""
    word = "labels" if record["task"] == "multilabel" else "classes"
    whole = max(runs, key=lambda run: run.config["splits"].get("fraction") or 1.0)
    images = whole.config["splits"].get("images") or {}
    counts = " · ".join(f"{name} {n:,}" for name, n in images.items())
    return f"{record['task']}, {len(classes)} {word}: {named}{positive}. Images: {counts or record['n_test']}."


def chosen_words(task: str, runs: Sequence[Run]) -> str:
    """By which criteria epochs and settings were chosen."""
    found = dict.fromkeys(run.config["chosen"]["by"] for run in runs)
    return "by " + " or ".join("loss" if by == "loss" else title(by, task) for by in found)


def unit_words(record: dict[str, Any]) -> str:
    clusters = record["clusters"]
    if clusters["unit"] == "group":
        return f" of {clusters['n']:,} groups, which are what is drawn"
    return ""


def images_words(count: int, embeds: bool) -> str:
    if not embeds:
        return "It embeds no images."
    return f"It embeds {count:,} image{'' if count == 1 else 's'}, newly encoded, without the files' own metadata."
