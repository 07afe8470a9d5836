"""Stores: folders of shards and views, each for one ExtractionSpec; open, find, create; which outputs are missing.

A cache is a folder of stores.

    cache/vit-in21k-4f2a91c0/spec.json    {"fingerprint", "spec", "provenance", "check": a hash of this text}
                             plan.json    how this store computes: batch size, threads, memory format; what it takes
                             canary.safetensors    what it made of the probe images (see featurecache.extraction.canary)
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import BadOption, CacheError, CannotWrite, DamagedFile, UnsafeFile
from featurecache.files.atomic import atomic_folder, refuse_links, remove_orphans, sync_path, write_whole
from featurecache.files.directory import AGAIN
from featurecache.files.locks import update_lock
from featurecache.files.mirror import fetch_heads, place_of, refuse_address
from featurecache.files.records import (
    canonical_json,
    check_provenance,
    checked_plan,
    read_checked_json,
    refuse_broken,
    write_checked_json,
)
from featurecache.files.storage import canonical, is_address, local_path
from featurecache.formatting import with_addresses
from featurecache.outputs import Output
from featurecache.store.remote_cache import mirrored_cache
from featurecache.store.shards import Layout, RowLocations, Shard, find_by_digest, layout_in, read_shard, shard_name
from featurecache.store.spec import ExtractionSpec

ImageGroups = list[tuple[np.ndarray, tuple[Output, ...]]]  # numbers of images [n], and outputs that all of them lack


def cache_folder(cache: str | Path | None = None) -> Path:
    """``cache``, else $FEATURECACHE_DIR, else ./cache; of an address the folder that stands for it, as it is now.
    Raises BadOption, StorageError."""
    folder = cache or _default_cache()
    if is_address(folder):
        return mirrored_cache(folder)
    if re.match(r"[a-zA-Z][\w+.-]+:/", str(folder)):
        raise BadOption(
            f"the cache is a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, not {folder}: name one with --cache "
            "(or $FEATURECACHE_DIR)."
        )
    return Path(folder).expanduser()


def own_cache(cache: str | Path | None, what: str) -> Path:
    """`cache_folder` of a command that takes files away: such a command must be alone there. Raises BadOption for an
    address, before anything is asked of it."""
    refuse_address(cache or _default_cache(), what)
    return cache_folder(cache)


def _default_cache() -> str:
    return os.environ.get("FEATURECACHE_DIR") or "cache"


def is_default_cache(folder: str | Path) -> bool:
    """Whether commands take this cache, a folder or an address, where they are told none."""
    default, place = _default_cache(), canonical(folder) if is_address(folder) else place_of(folder)
    if is_address(default) and local_path(default) is None:
        return place == canonical(default)
    return place == str(cache_folder().resolve())


def cache_words(folder: str | Path) -> list[str]:
    """What a command says of a cache that it would not take by itself."""
    return [] if is_default_cache(folder) else ["--cache", with_addresses(str(folder))]


@dataclass(frozen=True)
class Store:
    path: Path
    spec: ExtractionSpec
    fingerprint: str
    provenance: dict[str, Any]  # beside the spec, not hashed: backbone name, request, revision, licence, versions
    damaged_shards: frozenset[Path] = frozenset()  # shards that are not looked at

    def folder(self, output: str) -> Path:
        return self.path / output

    def shard_paths(self, output: str) -> list[Path]:
        """Committed shards of an output, by name."""
        refuse_links(self.folder(output))
        return sorted(path for path in self.folder(output).glob("[0-9a-f]*.h5") if path not in self.damaged_shards)

    def outputs(self) -> list[str]:
        """Outputs of which there are shards."""
        folders = [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return [name for name in sorted(folders) if self.shard_paths(name)]

    def shard(self, path: Path, layout: Layout) -> Shard:
        shard = read_shard(path, layout)
        if shard.notes.get("fingerprint") != self.fingerprint:
            raise CacheError(
                f"{path} belongs to the store {shard.notes.get('fingerprint')}, but lies in that of {self.fingerprint}."
            )
        if shard_name(shard.digests) != path.stem:
            raise DamagedFile(f"{path} is damaged: its name is not the hash of its digests. {AGAIN}")
        return shard

    def shards(self, layout: Layout) -> list[Shard]:
        paths = self.shard_paths(layout.output)
        fetch_heads(paths)
        return [self.shard(path, layout) for path in paths]

    def layouts(self) -> dict[str, Layout]:
        """Of every output of which there are shards: what the first of them that can be read says of itself."""
        layouts = {}
        for output in self.outputs():
            for path in self.shard_paths(output):
                with contextlib.suppress(CacheError):
                    layouts[output] = layout_in(path)
                    break
        return layouts

    def locate(self, layout: Layout, digests: np.ndarray) -> RowLocations:
        return find_by_digest(self.shards(layout), digests)

    def views(self) -> list[Path]:
        return sorted(path for path in self.path.glob("*.h5") if not path.name.startswith(".") and not path.is_dir())

    @property
    def plan(self) -> dict[str, Any] | None:
        path = self.path / "plan.json"
        if not os.path.lexists(path):
            return None
        record, intact = read_checked_json(path)
        plan = checked_plan(record, path)
        if not intact:
            raise refuse_broken(path)
        return plan

    def write_plan(self, device: str, plan: dict[str, Any]) -> dict[str, Any]:
        """Fix how this store computes on a kind of device; the plan that holds, which is the first one written, but
        for a forward pass that was chosen by measurement where none had been."""
        with update_lock(self.path):
            plans = self.plan or {}
            held = plans.get(device, {})
            measured = {
                key: plan[key] for key in ("forward", "candidates", "parts") if key in plan and "candidates" in plan
            }
            merged = {**plan, **held, **({} if "candidates" in held else measured)}
            if merged != held:
                plans[device] = merged
                self._write_plans(plans)
        return dict(plans[device])

    def _write_plans(self, plans: dict[str, Any]) -> None:
        write_whole(self.path / "plan.json", write_checked_json(plans), inside=self.path)

    def write_cost(self, device: str, view: str, measured: dict[str, Any]) -> None:
        """Keep in the plan what an image took in a run, unless that of a run of more images is there, or of one on a
        machine that was not busy; of loading also where nothing is known of this view."""
        with update_lock(self.path):
            plans = self.plan or {}
            cost = plans.setdefault(device, {}).setdefault("cost", {"images": 0, "loading_ms": {}, "busy": True})
            more = (not measured["busy"], measured["images"]) >= (not cost["busy"], cost["images"])
            if measured["loading_ms"] is not None and (more or view not in cost["loading_ms"]):
                cost["loading_ms"][view] = measured["loading_ms"]
            if more:
                cost |= {key: measured[key] for key in ("forward_ms", "device", "images", "busy")}
            self._write_plans(plans)

    def cost_of_busy(self, device: str) -> bool:
        """Whether what an image costs on a kind of device was measured while other work had the cores."""
        return bool((self.plan or {}).get(device, {}).get("cost", {}).get("busy"))

    def cost(self, view: str) -> dict[str, Any] | None:
        """What an image of a view costs, as extractions measured it: {"forward_ms": 12.3, "loading_ms": 0.8, "device":
        "AMD EPYC", "precision": "fp32", "threads": 2, "busy": False}, milliseconds. ``loading_ms`` is None where every
        image of the view was in the store already, ``threads`` on an accelerator; ``busy``: other work had the cores.
        None: never measured (imported features)."""
        measured = [(plan["cost"], kind, plan) for kind, plan in (self.plan or {}).items() if "cost" in plan]
        if not measured:
            return None
        cost, kind, plan = max(measured, key=lambda each: (not each[0]["busy"], each[0]["images"]))
        threads = plan["threads"] if kind == "cpu" else None
        made = {"device": cost["device"], "precision": self.spec.precision, "threads": threads, "busy": cost["busy"]}
        return {"forward_ms": cost["forward_ms"], "loading_ms": cost["loading_ms"].get(view), **made}

    def replace_plan(self, plans: dict[str, Any]) -> None:
        """Another plan in the place of one that is damaged, or none."""
        with update_lock(self.path):
            if plans:
                self._write_plans(plans)
            else:
                (self.path / "plan.json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Throw away what dead processes left unfinished."""
        inside = [path for path in self.path.iterdir() if path.is_dir() and not path.is_symlink()]
        for folder in [self.path.parent, self.path, *inside]:
            remove_orphans(folder)


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
    refuse_links(folder)
    if not folder.name.isprintable():
        raise UnsafeFile(f"{str(folder)!a} has a name that a terminal would obey; rename it.")
    record, intact = read_checked_json(folder / "spec.json")
    try:
        spec = ExtractionSpec.from_dict(record["spec"])
        fingerprint, provenance = record["fingerprint"], record["provenance"]
    except KeyError as error:
        raise CacheError(f"{folder / 'spec.json'} is not the record of a store: it has no {error.args[0]}.") from error
    check_provenance(provenance, folder / "spec.json")
    if fingerprint != spec.fingerprint:
        raise CacheError(
            f"{folder / 'spec.json'} was changed: its spec has the fingerprint {spec.fingerprint}, not {fingerprint}."
        )
    if not intact or len(record) != 3:
        raise refuse_broken(folder / "spec.json")
    return Store(folder, spec, fingerprint, provenance)


def generations(cache: Path, spec: ExtractionSpec) -> list[Store]:
    """The stores of ``spec`` in any generation, the oldest first."""
    plain = replace(spec, generation=0)
    same = [store for store in stores(cache) if replace(store.spec, generation=0) == plain]
    return sorted(same, key=lambda store: store.spec.generation)


def latest_generation(cache: Path, spec: ExtractionSpec) -> ExtractionSpec:
    """``spec`` in the newest generation that has a store; 0 where there is none."""
    return replace(spec, generation=max((store.spec.generation for store in generations(cache, spec)), default=0))


def find_store(cache: Path, spec: ExtractionSpec) -> Store | None:
    """Raises CacheError where the folder that should be it cannot be read: its features would be computed again."""
    for store in stores(cache):
        if store.fingerprint == spec.fingerprint:
            return store
    for folder, error in unreadable_stores(cache):
        if folder.name.endswith(f"-{spec.fingerprint[:8]}"):
            raise error
    return None


def create_store(cache: Path, name: str, spec: ExtractionSpec, provenance: dict[str, Any]) -> Store:
    """The store of ``spec``, made if it is not there. Its folder appears with spec.json in it, or not at all."""
    if existing := find_store(cache, spec):
        return existing
    label = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "backbone"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_folder(cache / "store") as draft:
            write_spec(draft, spec, provenance)
            for length in (8, 12, 32):  # longer where two fingerprints begin alike
                folder = cache / f"{label}-{spec.fingerprint[:length]}"
                try:
                    os.rename(draft, folder)  # fails where a folder that is not empty has the name
                except OSError:
                    if not folder.exists():
                        raise
                    if existing := find_store(cache, spec):
                        return existing  # another process made it meanwhile
                else:
                    sync_path(cache)
                    return open_store(folder)
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(
            error.errno, f"cannot make a store in {cache}: {error.strerror}. Choose a folder with --cache."
        ) from error
    raise CacheError(f"{cache} holds folders named like the store of {name} that are none; move them away.")


def write_spec(folder: Path, spec: ExtractionSpec, provenance: dict[str, Any]) -> None:
    """In the order of keys that a view has, so that what is restored from one is the same text, with the same check."""
    record = {"fingerprint": spec.fingerprint, "spec": spec.to_dict(), "provenance": provenance}
    record = {key: json.loads(canonical_json(value)) for key, value in record.items()}
    write_whole(folder / "spec.json", write_checked_json(record), inside=folder)


SHARD_BYTES, SHARD_ROWS = 256 << 20, 16_384
MOST_BYTES, MOST_SHARDS = 4 << 30, 500  # a shard grows up to MOST_BYTES so that an output has at most about MOST_SHARDS
SHARD_SECONDS = 120.0  # on a slow machine: what a kill may cost


def missing_outputs(
    wanted: tuple[Output, ...], layouts: dict[str, Layout], store: Store | None, digests: np.ndarray
) -> tuple[ImageGroups, ImageGroups]:
    """Images grouped by what is missing of them: (needs the backbone, follows from stored tokens)."""

    def is_stored(name: str) -> np.ndarray:
        return store.locate(layouts[name], digests).mask if store else np.zeros(len(digests), bool)

    masks = {output.name: is_stored(output.name) for output in wanted}
    for output in wanted:  # tokens that nothing is to be derived from are not even looked for: they may be damaged
        if output.is_derived and output.source in layouts.keys() - masks.keys() and not masks[output.name].all():
            masks[output.source] = is_stored(output.source)
    forward, derived = [], []
    assert len(masks) < 63
    pattern = sum((mask.astype(np.int64) << k for k, mask in enumerate(masks.values())), np.zeros(len(digests), int))
    for number in np.unique(pattern).tolist():
        rows = np.flatnonzero(pattern == number)
        stored = {name for k, name in enumerate(masks) if number >> k & 1}
        missing = [output for output in wanted if output.name not in stored]
        follow = tuple(output for output in missing if output.is_derived and output.source in stored)
        need = tuple(output for output in missing if output not in follow)
        if need:
            forward.append((rows, need))
        if follow:
            derived.append((rows, follow))
    return forward, derived


def rows_per_shard(rows: int, row_bytes: int, rate: float | None = None, batch: int = 1) -> int:
    """Rows of a shard: up to 256 MiB or 16,384; more where there would be over 500; at most two minutes of work."""
    length = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    length = max(length, min(-(-rows // MOST_SHARDS), MOST_BYTES // row_bytes))
    if rate is not None:
        length = min(length, int(rate * SHARD_SECONDS))
    return max(batch, length // batch * batch)
