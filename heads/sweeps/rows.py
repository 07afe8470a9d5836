"""The table of a sweep on disk: a line of JSON for every finished head, in ``rows.jsonl``.

Lines of heads that were trained together come in one write and carry ``together``: [place, number]. After a kill, what
does not end with the last line of a complete set is as if it had never been written, so heads are always trained in
the company they would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featurecache.errors import CacheError, RunError
from featurecache.files import sync_path, writing
from featurecache.records import parse
from heads.run_folder import plain

ROWS = "rows.jsonl"
MOST = 1 << 31  # bytes
_KINDS = {
    "key": str, "view": str, "output": str, "head": str, "fraction": float, "repeat": int, "settings": dict,
    "together": list, "seconds": float,
}  # fmt: skip


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of complete sets, and the length in bytes up to the last of them: what follows is torn. Raises RunError
    where a line before it is no row."""
    file = folder / ROWS
    if not file.exists():
        return [], 0
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MOST:
        raise RunError(f"{file} is not a table of ours: a link, no plain file, or too large.")
    rows: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    position = end = torn = 0
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        position += len(line) + 1
        row = _row(line)
        if row is None:
            torn = torn or number
            continue
        if torn:
            raise RunError(
                f"{file} is damaged: line {torn} is none of its rows. Delete that line: it is trained again."
            )
        place, count = row["together"]
        group = [*group, row] if place == len(group) else [row] if place == 0 else []
        if len(group) == count:
            rows.extend(group)
            group, end = [], position
    return rows, end


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line.decode("utf-8"), ROWS)
    except (CacheError, UnicodeDecodeError):
        return None
    fine = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in _KINDS.items())
    return row if fine and _is_place(row["together"]) else None


def _is_place(together: list[Any]) -> bool:
    return len(together) == 2 and all(type(n) is int for n in together) and 0 <= together[0] < together[1]


class RowFile:
    """``rows.jsonl`` to be continued: what was torn is cut off, sets of rows are appended and on the disk at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self.rows, end = read_rows(folder)
        with writing(self.path):
            if self.path.exists() and self.path.stat().st_size > end:
                os.truncate(self.path, end)
                sync_path(self.path)
        self.by_key = {row["key"]: row for row in self.rows}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of heads that were trained together, in their order."""
        told = [plain(row | {"together": [place, len(rows)]}) for place, row in enumerate(rows)]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in told)
        with writing(self.path):
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _write_all(descriptor, text.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_path(self.path.parent)
        self.rows += told
        self.by_key |= {row["key"]: row for row in told}

    def together_with(self, key: str) -> list[dict[str, Any]]:
        """The rows of the set that a row was trained in, in order."""
        place = next(i for i, row in enumerate(self.rows) if row["key"] == key)
        start = place - self.rows[place]["together"][0]
        return self.rows[start : start + self.rows[place]["together"][1]]


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
