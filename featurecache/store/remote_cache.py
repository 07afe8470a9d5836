"""A cache in object storage: which of its files are fetched at once, and in which order what is made here goes there.

The cache is the mirror of its address (`featurecache.files.mirror`). Records, that is specs, plans, references and
views, are fetched whenever the cache is opened, shards when their features are first read. An object is seen by others
only after all that it names: the spec of a store, its shards, its plan and reference, the views.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from featurecache.files.mirror import Mirror, is_placeholder, mirror_of
from featurecache.files.storage import canonical, is_address, local_path

_RECORD = re.compile(r"[^./][^/]*/(spec\.json|plan\.json|canary\.safetensors|[^./][^/]*\.h5)")
_SHARD = re.compile(r"[^./][^/]*/[^./][^/]*/[0-9a-f]{32}\.h5")


def mirrored_cache(address: str | os.PathLike[str]) -> Path:
    """The folder that stands for a cache, as it is at this moment. Raises BadOption, StorageError."""
    if (path := local_path(address)) is not None:
        return path
    mirror = Mirror.of(address, "cache")
    mirror.folder.mkdir(exist_ok=True)
    _pull(mirror)
    return mirror.folder


def local_place(place: str | os.PathLike[str]) -> Path:
    """Where a view is on this machine of which a record says the path or the address (`mirror.place_of`); the cache of
    an address is fetched where there is nothing of it yet. Raises BadOption, StorageError."""
    if not is_address(place) or local_path(place) is not None:
        return local_path(place) or Path(place)
    cache, store, name = canonical(place).rsplit("/", 2)
    path = Mirror.of(cache, "cache").folder / store / name
    if not path.exists():
        mirrored_cache(cache)
    return path


def _pull(mirror: Mirror) -> None:
    mirror.pull(now=_RECORD.fullmatch, wanted=lambda name: _RECORD.fullmatch(name) or _SHARD.fullmatch(name))


def pull(folder: Path) -> None:
    """Take over what other machines have written meanwhile. Of a folder of this machine: nothing."""
    if mirror := mirror_of(folder):
        _pull(mirror)


def push_shards(store: Path, paths: list[Path] | None = None) -> None:
    """Upload shards that are not there yet, by default all, behind the spec of their store. Where another machine's of
    the same name is there, that one stays."""
    if (mirror := mirror_of(store)) is None:
        return
    spec = mirror.name_of(store / "spec.json")
    if mirror.unsent([spec]) and mirror.put(spec):
        mirror.check_conditions(spec)
    paths = sorted(store.glob("*/*.h5")) if paths is None else paths
    made = [path for path in paths if not is_placeholder(path)]
    names = [mirror.name_of(path) for path in made]
    for name in mirror.unsent(name for name in names if _SHARD.fullmatch(name)):
        mirror.put_new(name)


def version_of(path: Path) -> str | None:
    """Which version a record here is of, for `push`; None of a folder of this machine."""
    mirror = mirror_of(path)
    return mirror.version(mirror.name_of(path)) if mirror else None


def push(store: Path, made_from: dict[Path, str | None] | None = None) -> bool:
    """Upload all that was made in a store. False where another machine's plan, reference or view came first: it is
    here now, and what was made must be made on it. ``made_from``: of records the versions that they were made from."""
    if (mirror := mirror_of(store)) is None:
        return True
    push_shards(store)
    records = [path for name in ("plan.json", "canary.safetensors") if (path := store / name).exists()]
    records += [path for path in sorted(store.glob("*.h5")) if _RECORD.fullmatch(mirror.name_of(path))]
    first = [mirror.put(mirror.name_of(path), (made_from or {}).get(path)) for path in records]  # all of them are tried
    return all(first)
