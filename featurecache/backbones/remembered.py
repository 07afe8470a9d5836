"""Backbones that this machine has loaded before: what they are, without loading them again.

A run in which nothing is left to compute needs a backbone's fingerprint, not its network. What a network of
transformers, timm or torchvision came out as is kept in the state of the machine, by everything that it is made of: the
request, the stamps of all files (inode, size, times), the versions of the libraries and our own code. Files that
changed within the last two seconds are not trusted: a later change might leave their stamps as they are. The network is
loaded when it is first asked for, and has to be the same. (A converted graph needs none: it is kept by the digest of
the weights.) Where timm and torchvision publish the weights of a name is kept by their versions: to ask them takes as
long as importing torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import timm_models, timm_names, torchvision_models, transformers_models
from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, versions
from featurecache.backbones.weights import downloaded_file, snapshot
from featurecache.errors import WeightsDoNotFit
from featurecache.files.machine_state import read_state, state_key, write_state
from featurecache.formatting import timed_part
from featurecache.images import preprocessing
from featurecache.images.preprocessing import Preprocess

SETTLED = 2.0  # seconds since its last change, from which on the stamp of a file is trusted
_HASHED = ("architecture", "weights", "preprocess", "image_size", "position_embeddings")  # into fingerprints
_TUPLES = ("image_size", "prefix", "grid")


class RememberedBackbone(Backbone):
    """A backbone whose network is loaded when it is first asked for. Raises WeightsDoNotFit where that is another."""

    load: Callable[[], Backbone]

    def __getattr__(self, name: str) -> Any:  # only what is not there
        if name != "model":
            raise AttributeError(name)
        loaded = self.load()
        if differ := [each for each in _HASHED if getattr(loaded, each) != getattr(self, each)]:
            raise WeightsDoNotFit(f"the {' and '.join(differ)} of {self.name} changed meanwhile. Run the command again")
        self.model = loaded.model
        return self.model


def remembered_or_loaded(
    load: Callable[..., Backbone], where: str, request: BackboneRequest, alias: Alias | None
) -> Backbone:
    """``load`` of transformers, timm or torchvision, but that a network which is known is loaded when it is first asked
    for."""
    if load is transformers_models.load:
        library, files = "transformers", transformers_models.find_checkpoint(where, request, alias)
        build = partial(transformers_models.load_checkpoint, files, request, alias)
        name, places = str(files), [place for place in (files.folder, files.weights) if place is not None]
    else:
        library = "timm" if load is timm_models.load else "torchvision"
        name, places = _files_of(library, where, request)
        build = partial(load, name, request, alias)
    key = _key(library, name, places, request)
    load = partial(_load, build)
    if key is None:
        return load()
    if record := read_state("backbones", key):
        backbone = object.__new__(RememberedBackbone)
        vars(backbone).update(_values(record), load=load)
        return backbone
    loaded = load()
    values = {each.name: getattr(loaded, each.name) for each in fields(loaded) if each.name != "model"}
    record = json.loads(json.dumps({**values, "preprocess": loaded.preprocess.to_dict()}))
    if _values(record) == values:  # settings that JSON has no words for would come back as others
        write_state("backbones", key, record)
    return loaded


def _values(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Backbone` but its network, from JSON."""
    values = {name: tuple(value) if name in _TUPLES else value for name, value in record.items()}
    return {**values, "preprocess": Preprocess.from_dict(record["preprocess"])}


@timed_part("backbone")
@exact_arithmetic()
def _load(build: Callable[[], Backbone]) -> Backbone:
    return build()


def published_weights(library: str, name: str) -> dict[str, str]:
    """{"repo", "url"}: where timm or torchvision have the weights of one of their names, if anywhere. Raises
    UnknownBackbone; BadOption without the library."""
    if library == "timm":
        timm_names.check_timm()
    key = state_key(library=library, name=name, versions=versions(library))
    if record := read_state("published", key):
        return record
    if library == "timm":
        settings = timm_names.published_model(name).settings
        record = {"repo": settings.hf_hub_id or "", "url": "" if settings.custom_load else settings.url or ""}
    else:
        record = {"repo": "", "url": torchvision_models.find_weights(name)[1].url}
    write_state("published", key, record)
    return record


def _files_of(library: str, where: str, request: BackboneRequest) -> tuple[str, list[Path]]:
    """A name of timm's or torchvision's, of a repository of the hub with its commit, and the files and folders that its
    network is made of."""
    folder, (name, _, revision) = Path(os.path.expanduser(where)), where.partition("@")
    own = [] if request.weights_path is None else [request.weights_path]
    published = not own and not request.untrained
    if library == "timm" and (folder.is_dir() or name.startswith(("/", ".", "~"))):
        return where, [folder, *own]
    repo = name if library == "timm" and "/" in name else ""
    if not repo:
        record = published_weights(library, name)
        if not published or not record["repo"]:
            return where, own or ([downloaded_file(record["url"])] if published and record["url"] else [])
    folder, commit = snapshot(repo or record["repo"], revision or None, weights=published)
    return f"{name}@{commit}", [folder, *own]


def _key(library: str, name: str, places: list[Path], request: BackboneRequest) -> str | None:
    """None where a file is not there, or changed so lately that its stamp may stay the same at the next change."""
    if find_spec(library) is None or not all(place.exists() for place in places):
        return None  # which is said where it is loaded
    files, own = list(_stamps(places)), list(_stamps([Path(__file__).parent, Path(preprocessing.__file__)]))
    newest = max((max(times) for _, _, *times in files), default=0)
    if newest > time.time_ns() - SETTLED * 1e9:
        return None
    return state_key(
        request=asdict(request), name=name, files=files, code=own, versions=versions("torchvision", library)
    )


def _stamps(places: Iterable[Path]) -> Iterator[tuple[str, list[int], int, int]]:
    """Path, (inode, size), and the times of the last changes in nanoseconds, of files and of those in folders."""
    for path in (path for place in places for path in _files_at(place)):
        entry = path.stat()  # of a hub's snapshot that of the file that is linked
        yield str(path.absolute()), [entry.st_ino, entry.st_size], entry.st_mtime_ns, entry.st_ctime_ns


def _files_at(place: Path) -> list[Path]:
    if place.is_dir() or place.suffix == ".json":  # an index of the files of weights beside it
        return sorted((place if place.is_dir() else place.parent).iterdir())
    return [place, *sorted(place.parent.glob("*.json"))]  # settings may lie beside it
