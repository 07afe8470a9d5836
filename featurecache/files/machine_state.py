"""Machine state: what one machine remembers between runs, in ``$FEATURECACHE_STATE`` or ``~/.cache/featurecache``.

Nothing here decides a value: converted graphs, measured speeds, stores that this machine agreed with, what controls
gave for the same images. All of it can be made again, so it may be deleted at any time, and what cannot be read or
written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import xxhash

from featurecache.errors import CacheError, CannotWrite
from featurecache.files.atomic import write_whole
from featurecache.files.records import canonical_json, read_checked_json, write_checked_json
from featurecache.formatting import device_title


def state_folder() -> Path | None:
    """None for a user without a home."""
    if named := os.environ.get("FEATURECACHE_STATE"):
        return Path(named).expanduser()
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featurecache"
    return None


def state_key(**facts: Any) -> str:
    """32 hex of ``facts`` and of this machine: its name (a home is often shared by several) and its processor."""
    machine = {"host": platform.node(), "cpu": device_title("cpu")}
    return xxhash.xxh3_128_hexdigest(canonical_json({**facts, **machine}).encode())


def read_state(kind: str, key: str) -> dict[str, Any] | None:
    """The record written under this key; None where there is none that can be read."""
    folder = state_folder()
    with contextlib.suppress(CacheError, OSError):
        record, intact = read_checked_json(folder / kind / f"{key}.json") if folder else ({}, False)
        return record if intact else None
    return None


def write_state(kind: str, key: str, record: dict[str, Any]) -> None:
    if folder := state_folder():
        with contextlib.suppress(CannotWrite, OSError):
            (folder / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(folder / kind / f"{key}.json", write_checked_json(record))
