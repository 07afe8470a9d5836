"""Tables of a study: a question as compared, and one over all questions, a row for each and a column for each head.

In a cell stands test by the measure that the question chooses by, of the head that val chose, and what was published of
that head, where something was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heads.evaluation.families import Family
from heads.reports.page import ranked
from heads.runs.run import Run
from heads.settings import measure_name, title
from heads.studies.spec import Question

Rows = Sequence[tuple[str, Family, dict[str, Any]]]  # (step, family, its record) of one question


@dataclass(frozen=True)
class StudyTable:
    """A question as compared."""

    question: Question
    rows: Rows
    record: dict[str, Any]

    @property
    def families(self) -> list[Family]:
        return [family for _, family, _ in self.rows]

    @property
    def runs(self) -> list[Run]:
        return [run for family in self.families for run in family.runs]

    @property
    def best(self) -> Run:
        """Of the family that is best on val."""
        run: Run = ranked(self.families, self.record)[0][0].runs[0]
        return run


def overview_of(tables: Sequence[StudyTable], published: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """``heads``: the columns; ``rows``: of each question its ``title``, ``measure``, ``cells`` (of every column
    ``value``, ``low``, ``high``, ``published``, or None) and ``best``, the head that is best on val. None where there
    is one question only."""
    if len(tables) < 2:
        return None
    whole = [[record for _, family, record in table.rows if family.fraction == 1] for table in tables]
    names = list(dict.fromkeys(record["name"] for records in whole for record in records))
    rows = []
    for table, records in zip(tables, whole, strict=True):
        lead, named = measure_name(table.record["select"]), {record["name"]: record for record in records}
        measure, part = title(lead, table.record["task"]), table.question.title
        told = {
            row["ours"]: row["published_words"] for row in published if (row["part"], row["measure"]) == (part, measure)
        }
        cells = [_cell(named.get(name), lead, told.get(name)) for name in names]
        best = ranked(table.families, table.record)[0][1]["name"]
        rows.append({"title": part, "measure": measure, "cells": cells, "best": best})
    return {"heads": names, "rows": rows}


def _cell(record: dict[str, Any] | None, lead: str, published: str | None) -> dict[str, Any] | None:
    test = ((record or {}).get("test") or {}).get(lead)
    return None if test is None else {key: test.get(key) for key in ("value", "low", "high")} | {"published": published}
