"""Backbones that this machine has loaded before: what they are, without loading them again.

A run in which nothing is left to compute needs a backbone's fingerprint, not its network. What a checkpoint of
transformers came out as is kept in the state of the machine, by everything that it is made of: the request, the stamps
of all files (inode, size, times), the versions of the libraries and our own code. Files that changed within the last
two seconds are not trusted: a later change might leave their stamps as they are. The network is loaded when it is first
asked for, and has to be the same. (A converted graph needs none: it is kept by the digest of the weights.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import transformers_models
from featurecache.backbones.aliases import Alias
from featurecache.backbones.base import Backbone, BackboneRequest, versions
from featurecache.backbones.processors import PROCESSOR_FILES
from featurecache.backbones.transformers_models import CheckpointFiles
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


def remembered_or_loaded(where: str, request: BackboneRequest, alias: Alias | None) -> Backbone:
    """`transformers_models.load`, but that a network which is known is loaded when it is first asked for."""
    checkpoint = transformers_models.find_checkpoint(where, request, alias)
    load, key = partial(_load, checkpoint, request, alias), _key(request, checkpoint)
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
def _load(checkpoint: CheckpointFiles, request: BackboneRequest, alias: Alias | None) -> Backbone:
    return transformers_models.load_checkpoint(checkpoint, request, alias)


def _key(request: BackboneRequest, checkpoint: CheckpointFiles) -> str | None:
    """None where a file changed so lately that its stamp may stay the same at the next change."""
    places = [place for place in (checkpoint.folder, checkpoint.weights) if place is not None]
    if beside := checkpoint.folder_of_weights:
        places += [beside / name for name in PROCESSOR_FILES if (beside / name).is_file()]
    files, own = list(_stamps(places)), list(_stamps([Path(__file__).parent, Path(preprocessing.__file__)]))
    newest = max((max(times) for _, _, *times in files), default=0)
    if newest > time.time_ns() - SETTLED * 1e9:
        return None
    return state_key(
        request=asdict(request), title=checkpoint.title, revision=checkpoint.revision, name=checkpoint.portable_name,
        files=files, code=own, versions=versions("torchvision", "transformers"),
    )  # fmt: skip


def _stamps(places: Iterable[Path]) -> Iterator[tuple[str, list[int], int, int]]:
    """Path, (inode, size), and the times of the last changes in nanoseconds, of files and of those in folders."""
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            entry = path.stat()  # of a hub's snapshot that of the file that is linked
            yield str(path.absolute()), [entry.st_ino, entry.st_size], entry.st_mtime_ns, entry.st_ctime_ns
