"""Runs without a page, and run folders of strangers: changed, and sealed again as our own are, hashes and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import heads
from featurecache.files.atomic import hash_file
from heads.runs.folder import write_record

train_head = partial(heads.train_head, report=False)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, name: str = "config.json") -> None:
    """Change a record, and list its files as they are now."""
    record = json.loads((folder / name).read_text())
    record.pop("check", None)
    if change:
        change(record)
    listed = record.pop("files", {})
    write_record(folder / name, record, {file: hash_file(folder / file) for file in listed})
