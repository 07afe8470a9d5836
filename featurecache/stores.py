"""Stores: the folder of one ExtractionSpec. The cache is a folder of stores.

    cache/vit-in21k-4f2a91c0/spec.json    {"fingerprint", "spec", "provenance"}
                             plan.json    how this store computes: batch size, threads, memory format
                             cls/ tokens/ shards
                             chest.h5     a view

The folder's name is for people; a store is found by the whole fingerprint in its spec.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import CacheError, CannotWrite
from featurecache.files import draft_folder, refuse_links, sweep_drafts, sync_path, write_whole
from featurecache.shards import Layout, Located, Shard, locate, read_shard
from featurecache.spec import ExtractionSpec


def cache_folder(cache: str | Path | None = None) -> Path:
    """``cache``, else $FEATURECACHE_DIR, else ./cache."""
    return Path(cache or os.environ.get("FEATURECACHE_DIR") or "cache").expanduser()


@dataclass(frozen=True)
class Store:
    path: Path
    spec: ExtractionSpec
    fingerprint: str
    provenance: dict[str, Any]  # beside the spec, not hashed: backbone name, request, revision, licence, versions

    def folder(self, output: str) -> Path:
        return self.path / output

    def shards(self, layout: Layout) -> list[Shard]:
        """Committed shards of an output, by name."""
        return [read_shard(path, layout) for path in sorted(self.folder(layout.output).glob("[0-9a-f]*.h5"))]

    def locate(self, layout: Layout, digests: np.ndarray) -> Located:
        return locate(self.shards(layout), digests)

    def views(self) -> list[Path]:
        return sorted(path for path in self.path.glob("*.h5") if not path.name.startswith("."))

    @property
    def plan(self) -> dict[str, Any] | None:
        path = self.path / "plan.json"
        return _read_json(path) if path.exists() else None

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_whole(self.path / "plan.json", _json(plan))

    def sweep(self) -> None:
        """Throw away what dead processes left unfinished."""
        for folder in [self.path.parent, self.path, *(path for path in self.path.iterdir() if path.is_dir())]:
            sweep_drafts(folder)


def stores(cache: Path) -> Iterator[Store]:
    """All stores of a cache, by folder name. A folder without a spec.json that we can read is none."""
    for folder in _folders(cache):
        with contextlib.suppress(CacheError):
            yield open_store(folder)


def unreadable_stores(cache: Path) -> Iterator[tuple[Path, CacheError]]:
    """Folders with a spec.json that is damaged, another's, or a newer version's, and what is wrong with it."""
    for folder in _folders(cache):
        try:
            open_store(folder)
        except CacheError as error:
            yield folder, error


def _folders(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/spec.json") if not path.parent.name.startswith("."))


def open_store(folder: Path) -> Store:
    """Raises CacheError when spec.json is not what it was written as."""
    refuse_links(folder / "spec.json")
    record = _read_json(folder / "spec.json")
    try:
        spec = ExtractionSpec.from_dict(record["spec"])
        fingerprint, provenance = record["fingerprint"], record["provenance"]
    except (KeyError, TypeError) as error:
        raise CacheError(f"{folder / 'spec.json'} is not the record of a store: it has no {error.args[0]}.") from error
    if fingerprint != spec.fingerprint:
        raise CacheError(
            f"{folder / 'spec.json'} was changed: its spec has the fingerprint {spec.fingerprint}, not {fingerprint}."
        )
    return Store(folder, spec, fingerprint, provenance)


def find_store(cache: Path, spec: ExtractionSpec) -> Store | None:
    """Raises CacheError where the folder that should be it cannot be read: its features would be computed again."""
    found = next((store for store in stores(cache) if store.fingerprint == spec.fingerprint), None)
    if found is None:
        for folder, error in unreadable_stores(cache):
            if folder.name.endswith(f"-{spec.fingerprint[:8]}"):
                raise error
    return found


def create_store(cache: Path, name: str, spec: ExtractionSpec, provenance: dict[str, Any]) -> Store:
    """The store of ``spec``, made if it is not there. Its folder appears with spec.json in it, or not at all."""
    existing = find_store(cache, spec)
    if existing:
        return existing
    record = {"fingerprint": spec.fingerprint, "spec": spec.to_dict(), "provenance": provenance}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with draft_folder(cache / "store") as draft:
            write_whole(draft / "spec.json", _json(record))
            for length in (8, 12, 32):  # longer where two fingerprints begin alike
                folder = cache / f"{_safe(name)}-{spec.fingerprint[:length]}"
                if _take(draft, folder):
                    sync_path(cache)
                    return open_store(folder)
                if folder.exists() and (existing := find_store(cache, spec)):
                    return existing  # another process made it meanwhile
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(
            error.errno, f"cannot make a store in {cache}: {error.strerror}. Choose a folder with --cache."
        ) from error
    raise CacheError(f"{cache} holds folders named like the store of {name} that are none; move them away.")


def _take(draft: Path, folder: Path) -> bool:
    try:
        os.rename(draft, folder)  # fails where a folder that is not empty has the name
    except OSError:
        if folder.exists():
            return False
        raise
    return True


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "backbone"


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}.") from error
    if not isinstance(record, dict):
        raise CacheError(f"{path} holds {type(record).__name__}, not a record.")
    return record
