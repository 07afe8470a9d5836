"""Published numbers beside ours: which of our heads stands beside which number, and whether the two compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featurecache.formatting import number
from heads.metrics.classification import METRICS, title
from heads.runs.run import name_of
from heads.studies.spec import Network, Published

if TYPE_CHECKING:
    from heads.studies.page import Table
    from heads.studies.run import Done

OTHERS = {"parameters": "parameters", "train_seconds": "seconds to train", "ms_per_image": "ms an image, with loading"}


def published_rows(done: Done, table: Table) -> list[dict[str, Any]]:
    """A row for each published number of a part."""
    return [_row(done, table, each) for each in table.part.published]


def _row(done: Done, table: Table, published: Published) -> dict[str, Any]:
    record = beside(table, published)
    value, low, high, name = None, None, None, "none: this study trains none like it"
    if record:
        value, low, high = here(published, record)
        name = record["name"]
    elif published.ours:
        name = f"not run: {published.ours}"
    ends = [words(published.measure, end) for end in (low, high) if end is not None]
    split = " on val" if published.split == "val" else ""
    measure = OTHERS.get(published.measure) or title(published.measure, table.record["task"])
    return {
        "what": published.what, "part": table.part.title, "measure": f"{measure}{split}",
        "published": published.value, "published_words": words(published.measure, published.value),
        "here": value, "here_words": words(published.measure, value),
        "range": f"[{', '.join(ends)}]" if len(ends) == 2 else None,
        "ours": name, "remark": "; ".join(filter(None, [published.remark, published.source])),
        "grey": greyed(done, published),
    }  # fmt: skip


def beside(table: Table, published: Published) -> dict[str, Any] | None:
    """The record of the family that a number stands beside: of its step the best on val, on all of train."""
    rows = [
        record
        for step, family, record in table.rows
        if step == published.ours and family.fraction == 1
        and published.head in ("", name_of(family.head, family.output))
    ]  # fmt: skip
    lead = "nll" if table.record["select"] == "loss" else table.record["select"]
    sign = -1 if METRICS[lead].higher else 1
    return min(rows, key=lambda record: sign * (record["val"].get(lead) or 0.0), default=None)


def here(published: Published, record: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(value, low, high) of ours; an interval only of test."""
    if published.measure == "ms_per_image":
        return record["loaded_ms"], None, None
    if published.measure in OTHERS:
        return record[published.measure], None, None
    if published.split == "val":
        return record["val"].get(published.measure), None, None
    test = record["test"].get(published.measure) or {}
    return test.get("value"), test.get("low"), test.get("high")


def words(measure: str, value: float | None) -> str:
    """Shares as the studies write them, in percent; areas as they are."""
    if value is None:
        return "–"
    if measure in ("accuracy",):
        return f"{100 * value:.2f} %"
    if measure in OTHERS:
        return f"{value:,.3f}" if measure == "ms_per_image" else f"{value:,.0f}"
    return number(value)


def greyed(done: Done, published: Published) -> bool:
    """Whether what stands here is no answer to the number: a trial, random weights in the place of pretrained ones, or
    fewer epochs or images than the study has."""
    if done.asked.quick:
        return True
    step = next((s for s in done.study.steps if s.name == published.ours), None)
    if step is None or published.measure == "parameters":
        return False
    pretrained = not isinstance(step, Network) or step.arch.startswith("finetune:")
    fewer = done.asked.epochs or (isinstance(step, Network) and done.asked.train_per_class)
    return bool(fewer or (done.asked.random_weights and pretrained))


def grey_words(done: Done) -> str:
    """Why rows are grey."""
    reasons = {
        "a trial": done.asked.quick,
        "begun from random weights": done.asked.random_weights,
        "trained for fewer epochs than the study has": done.asked.epochs,
        "trained on fewer images than the study has": done.asked.train_per_class,
    }
    return " or ".join(words for words, there in reasons.items() if there)
