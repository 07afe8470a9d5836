"""Journal of a resumable folder: append-only rows of finished heads, and the record of a sweep.

A killed command goes on where its journal ends; searches keep their batches in one, studies their steps. Nothing here
loads torch: `ls` and `verify` read journals.

Rows that belong together (heads that were trained together) come in one write and carry ``together``: [place, number].
After a kill, what does not end with the last line of a complete set is as if it had never been written, so heads are
always trained in the company they would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from featurecache.errors import CacheError, RunError
from featurecache.files.atomic import sync_path, writing
from featurecache.files.records import nan_to_none, parse_json
from heads.evaluation.selection import Row
from heads.runs.folder import read_checked_record, wrong_kinds
from heads.settings import METRICS

RECORD, ROWS, SEARCH = "sweep.json", "rows.jsonl", "search.jsonl"
MOST = 1 << 31  # bytes of a journal
COLUMNS: dict[str, type] = {
    "key": str, "view": str, "output": str, "head": str, "fraction": float, "repeat": int, "settings": dict,
    "seconds": float,
}  # fmt: skip
_CHECK = b'{"check": "%s", '  # what a line begins with: XXH3-64 of the row without it


def read_journal(file: Path, columns: dict[str, type] = COLUMNS) -> tuple[list[Row], int]:
    """The rows of complete sets, and the length in bytes up to the last of them: what follows is torn. Raises RunError
    where a line is not what was written."""
    if not file.exists():
        return [], 0
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST:
        raise RunError(f"{file} is not a table of ours: a link, no plain file, or too large.")
    rows: list[Row] = []
    together: list[Row] = []
    position = end = 0
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        position += len(line) + 1
        row = _row(line, columns)
        if row is None:
            raise RunError(
                f"{file} is damaged: line {number} is not what was written. Delete that line to have it done again."
            )
        place, number_together = row["together"]
        together = [*together, row] if place == len(together) else [row] if place == 0 else []
        if len(together) == number_together:
            rows.extend(together)
            together, end = [], position
    return rows, end


def _row(line: bytes, columns: dict[str, type]) -> Row | None:
    row_text = b"{" + line[len(_CHECK % (b"0" * 16)) :]
    if line != _checked_line(row_text):
        return None
    try:
        row = parse_json(row_text.decode("utf-8"), ROWS)
    except (CacheError, UnicodeDecodeError):
        return None
    if not isinstance(row, dict) or wrong_kinds(row, columns | {"together": list}):
        return None
    place = row["together"]
    return row if len(place) == 2 and all(type(n) is int for n in place) and 0 <= place[0] < place[1] else None


def _checked_line(row: bytes) -> bytes:
    return _CHECK % xxhash.xxh3_64_hexdigest(row).encode() + row[1:]


class JournalFile:
    """A file of rows to be continued: what was torn is cut off, sets of rows are appended and on the disk at once."""

    def __init__(self, path: Path, columns: dict[str, type] = COLUMNS, key: str = "key") -> None:
        self.path, self.key = path, key
        self.rows, end = read_journal(path, columns)
        if path.exists() and path.stat().st_size > end:
            with writing(path):
                os.truncate(path, end)
                sync_path(path)
        self.by_key = {row[key]: row for row in self.rows}

    def append(self, rows: Sequence[Row]) -> None:
        """Rows that belong together, in their order."""
        rows = [nan_to_none(row | {"together": [place, len(rows)]}) for place, row in enumerate(rows)]
        texts = (json.dumps(row, ensure_ascii=False, allow_nan=False).encode() for row in rows)
        data = b"".join(_checked_line(text) + b"\n" for text in texts)
        with writing(self.path):
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_path(self.path.parent)
        self.rows += rows
        self.by_key |= {row[self.key]: row for row in rows}

    def together_with(self, key: str) -> list[Row]:
        """The rows of the set that a row was written in, in order."""
        place = next(i for i, row in enumerate(self.rows) if row[self.key] == key)
        start = place - self.rows[place]["together"][0]
        return self.rows[start : start + self.rows[place]["together"][1]]


def read_sweep_record(folder: Path) -> dict[str, Any]:
    """What a sweep folder says it is. Raises RunError."""
    kinds = {"frame": dict, "views": dict, "asked": list, "ram": (int, float), "select": str}
    record = read_checked_record(folder / RECORD, "sweep", kinds)
    if record["select"] not in (*METRICS, "loss"):
        raise RunError(f"{folder} is damaged: {RECORD} has no proper select.")
    return record
