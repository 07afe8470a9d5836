"""Metrics files of a report, metrics.csv and metrics.json: every number of the page, for a program.

In a folder of their own they hold the comparison. In the folder of a run they are the run's own files, to which the
intervals are added: ``comparison`` in metrics.json, the columns low, high and method in metrics.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featurecache.files.atomic import write_whole
from featurecache.files.records import nan_to_none
from featurecache.formatting import text_of
from heads.evaluation.costs import COSTS
from heads.runs.folder import digest_of, replace_listed, write_record
from heads.runs.records import CONFIG, METRICS_FILE
from heads.runs.run import Run
from heads.runs.write import csv_bytes, json_bytes

COLUMNS = ("family", "view", "output", "head", "fraction", "split", "of", "metric", "value", "low", "high", "method")
OWN = ["model", "split", "class", "metric", "value", "low", "high", "method"]


def write_report_files(folder: Path, page: bytes | None, record: dict[str, Any], run: Run | None = None) -> None:
    """The ``page`` as report.html, and metrics.csv and metrics.json, into ``folder``. Of a ``run`` they are files that
    its config lists; elsewhere metrics.json lists the two others, goes first and comes last."""
    record = nan_to_none(record)
    files = {} if page is None else {"report.html": page}
    if run is None:
        files["metrics.csv"] = comparison_csv(record)
        (folder / METRICS_FILE).unlink(missing_ok=True)
        for name, data in files.items():
            write_whole(folder / name, data)
        write_record(folder / METRICS_FILE, record, {name: digest_of(data) for name, data in files.items()})
        return
    files["metrics.csv"] = _with_intervals(run.read("metrics.csv").decode(), record)
    files[METRICS_FILE] = json_bytes(run.metrics | {"comparison": record})
    if run.folder == run.path:
        replace_listed(folder / CONFIG, files)
        return
    for name, data in files.items():  # of a run in the making, which is sealed and synced as a whole
        (folder / name).write_bytes(data)


def comparison_csv(record: dict[str, Any]) -> bytes:
    """A line for every number of the comparison."""
    rows = [row for family in record["families"] for row in _family_rows(family)]
    rows += [
        {"family": control["name"], "split": split, "metric": metric, "value": value}
        for control in record["controls"]
        for split in ("val", "test")
        for metric, value in (control[split] or {}).items()
        if metric in record["measures"]
    ]
    for column, parts in (record.get("by") or {}).items():
        for part in parts:
            rows += _tested(part["test"], family=part.get("family"), split="test", of=f"{column}={part['value']}")
    return csv_bytes(COLUMNS, [["" if (v := row.get(key)) is None else v for key in COLUMNS] for row in rows])


def _numbers(test: Any) -> dict[str, Any]:
    return {key: (test or {}).get(key) for key in ("value", "low", "high", "method")}


def _tested(tests: dict[str, Any] | None, **same: Any) -> list[dict[str, Any]]:
    return [same | {"metric": metric} | _numbers(test) for metric, test in (tests or {}).items()]


def _family_rows(family: dict[str, Any]) -> Iterator[dict[str, Any]]:
    same = {key: family[key] for key in ("view", "output", "head", "fraction")} | {"family": family["name"]}
    for metric, value in family["val"].items():
        yield same | {"split": "val", "metric": metric, "value": value}
    yield from _tested(family["test"], **same, split="test")
    for kind, spread in (family["spread"] or {}).items():
        for metric, value in (spread or {}).items():
            yield same | {"split": "test", "of": f"standard deviation over {kind}", "metric": metric, "value": value}
    for metric, difference in (family.get("difference") or {}).items():
        of = "difference to the reference"
        yield same | dict(split="test", of=of, metric=metric, **_numbers(difference))
        for key in ("p", "p_holm"):
            if difference.get(key) is not None:
                yield same | {"split": "test", "of": f"{of}, {key}", "metric": metric, "value": difference[key]}
    for part in family.get("external") or []:
        yield from _tested(part["test"], **same, split="external", of=part["view"])
    for when in ("before", "after"):
        measured = family["calibration"][when]
        for metric in ("brier", "nll", "ece"):
            value = measured[metric]
            yield same | {"split": "test", "of": f"{when} calibration", "metric": metric, "value": value}
        redrawn = {"of": f"{when} calibration, if it were calibrated", "method": "labels redrawn"}
        yield same | {"split": "test", "metric": "ece"} | redrawn | measured["calibrated"]
    for point in family.get("operating") or []:
        of = f"threshold of {point['class']}"
        yield same | {"split": "val", "of": of, "metric": "threshold", "value": point["threshold"]}
        measures = ("sensitivity", "specificity", "ppv", "npv")
        yield from _tested({m: point.get(m) for m in measures}, **same, split="test", of=of)
        there = point.get("at_prevalence") or {}
        elsewhere = {m: v if isinstance(v, dict) else {"value": v} for m, v in there.items()}
        yield from _tested(elsewhere, **same, split="test", of=f"{of}, at another prevalence")
    for key in COSTS:
        yield same | {"split": "cost", "metric": key, "value": family.get(key)}


def _with_intervals(text: str, record: dict[str, Any]) -> bytes:
    """A run's own metrics.csv with the intervals of its test measures."""
    (family,) = record["families"]
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        mine = row["model"] == family["head"] and row["split"] == "test" and not row["class"]
        test = (family["test"] or {}).get(row["metric"]) if mine else None
        value = float(row["value"]) if row["value"] else ""
        ends = ["" if (v := _numbers(test)[key]) is None else v for key in ("low", "high", "method")]
        rows.append([*(text_of(row[key]) for key in OWN[:4]), value, *ends])
    return csv_bytes(OWN, rows)
