"""Leaks as people read them: lines for a terminal, records for ``--json``, a CSV. Names in them come from strangers."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from featurecache.cells import cell
from featurecache.leaks import KINDS, Finding, Leaks
from featurecache.reader import View
from featurecache.terminal import one_line

FIRST = 8  # pairs of a finding that are shown as lines
_NOUNS = {"image": "image", "group": "group", "near": "pair", "labels": "image"}
COLUMNS = (
    "kind", "split a", "id a", "label a", "rows a", "split b", "id b", "label b", "rows b", "group", "cosine"
)  # fmt: skip


def heading(finding: Finding) -> str:
    """``same image, train and val``."""
    return f"{KINDS[finding.kind]}, {between(finding)}"


def between(finding: Finding) -> str:
    a, b = (name or "no split" for name in finding.splits)
    return f"{a} and {b}" if a != b else f"within {a}" if finding.splits[0] else a


def extent(finding: Finding) -> str:
    """``8 images``."""
    noun = _NOUNS[finding.kind]
    return f"{finding.count:,} {noun}{'' if finding.count == 1 else 's'}"


def words_of(view: View, row: int) -> str:
    """The class of a row, or its positive labels; empty where none is known."""
    label = view.labels[row]
    if view.labels.ndim == 2:
        numbers = np.flatnonzero(label == 1).tolist()
    else:
        numbers = [int(label)]
    return "; ".join(view.classes[number] for number in numbers if 0 <= number < len(view.classes))


def remark(view: View, finding: Finding, number: int) -> str:
    """What else there is to say of a pair: its cosine, its group, how often it stands in each split."""
    parts = []
    if finding.cosines is not None:
        parts.append(f"cosine {finding.cosines[number]:.4f}")
    if finding.kind == "group":
        assert view.groups is not None
        parts.append(f"group {view.groups[finding.rows[number, 0]]}")
    a, b = finding.copies[number].tolist()
    if max(a, b) > 1:
        parts.append(f"{a:,} and {b:,} {'images' if finding.kind == 'group' else 'times'}")
    return ", ".join(parts)


def lines(view: View, leaks: Leaks) -> str:
    """Counts of each kind and pair of splits, then the first pairs of each."""
    rows = []
    for kind, title in KINDS.items():
        found = leaks.of(kind)
        rows += [(title, between(finding), extent(finding), _note(view, leaks, finding)) for finding in found]
        if not found:
            rows.append((title, "none", "", _reason(view, leaks, kind)))
    text = _aligned(rows)
    if view.untrained and leaks.of("near"):
        text += ["The weights are untrained (random): what is near by their features is alike in light and shade only."]
    for finding in leaks.findings:
        shown = range(min(len(finding.rows), FIRST))
        pairs = [(*(_one(view, row) for row in finding.rows[k].tolist()), remark(view, finding, k)) for k in shown]
        text += ["", heading(finding), *(f"  {line}" for line in _aligned(pairs))]
        if finding.count > len(shown):
            text.append(f"  and {finding.count - len(shown):,} more (--csv FILE)")
    return "\n".join(text)


def _one(view: View, row: int) -> str:
    label = words_of(view, row)
    return view.ids[row] + (f" ({label})" if label else "")


def _note(view: View, leaks: Leaks, finding: Finding) -> str:
    if finding.kind != "near":
        return ""
    kept = f"; the {len(finding.rows):,} closest are kept" if len(finding.rows) < finding.count else ""
    return f"cosine of {leaks.output} ≥ {leaks.threshold:g}{kept}"


def _reason(view: View, leaks: Leaks, kind: str) -> str:
    """Why there are none, where the reason is not that all is well."""
    if kind != "labels" and len(set(view.splits) - {""}) < 2:
        return "fewer than two splits in the data (those that train-head draws keep copies and groups together)"
    if kind == "group" and view.groups is None:
        return "no groups are known"
    if kind == "near":
        if leaks.output is None:
            return f"not looked for: {', '.join(view.outputs)} is no vector"
        return f"cosine of {leaks.output} ≥ {leaks.threshold:g}"
    if kind == "labels" and view.task == "unlabelled":
        return "no labels are known"
    return ""


def _aligned(rows: list[Any]) -> list[str]:
    clean = [[one_line(text) for text in row] for row in rows]  # a name must not steer a terminal
    widths = [max(len(text) for text in column) for column in zip(*clean, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in clean]


def record(view: View, leaks: Leaks) -> dict[str, Any]:
    """For ``--json``: counts, and all pairs that are kept."""
    counts = [{"kind": f.kind, "splits": list(f.splits), "count": f.count} for f in leaks.findings]
    pairs = [_record(view, finding, k) for finding in leaks.findings for k in range(len(finding.rows))]
    return {
        "view": view.label, "output": leaks.output, "threshold": leaks.threshold, "counts": counts, "pairs": pairs,
    }  # fmt: skip


def _record(view: View, finding: Finding, number: int) -> dict[str, Any]:
    rows = finding.rows[number].tolist()
    return {
        "kind": finding.kind,
        "splits": list(finding.splits),
        "ids": [view.ids[row] for row in rows],
        "labels": [words_of(view, row) for row in rows],
        "rows": finding.copies[number].tolist(),
        "group": view.groups[rows[0]] if finding.kind == "group" and view.groups is not None else None,
        "cosine": None if finding.cosines is None else float(finding.cosines[number]),
    }


def as_csv(view: View, leaks: Leaks) -> str:
    """All pairs that are kept, a line each; ``rows``: how many rows of the split that image or group has."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(COLUMNS)
    for pair in record(view, leaks)["pairs"]:
        sides = zip(pair["splits"], pair["ids"], pair["labels"], pair["rows"], strict=True)
        values = [pair["kind"], *(value for side in sides for value in side), pair["group"] or "", pair["cosine"]]
        writer.writerow(["" if value is None else cell(value) for value in values])
    return text.getvalue()
