"""Why a command would find nothing in the cache: which fields of its key differ from those of the nearest store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import CacheError, Drift
from featurecache.extraction import canary
from featurecache.extraction.forward import output_layout, pick_device, spec_of
from featurecache.extraction.plan import choose_precision, prepare
from featurecache.extraction.run import Extraction
from featurecache.formatting import aligned
from featurecache.images.headers import check_crop, reading_record
from featurecache.outputs import parse_list
from featurecache.store.schema import DIGEST
from featurecache.store.spec import ExtractionSpec, SpecDifference, describe_differences, spec_differences
from featurecache.store.store import (
    Store,
    cache_folder,
    find_store,
    generations,
    latest_generation,
    stores,
    unreadable_stores,
)


@dataclass(frozen=True)
class Explanation:
    """``images``: output -> how many distinct images are there, follow from stored tokens, are to be computed."""

    cache: Path
    spec: ExtractionSpec
    provenance: dict[str, Any]  # of the backbone that was asked for
    store: Store | None  # that has the key
    nearest: Store | None  # where none has
    differs: tuple[SpecDifference, ...]
    images: dict[str, dict[str, int]] | None
    copies: dict[str, dict[str, int]] | None  # the same of augmented copies; None: none are asked for
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return {
            "hit": self.store is not None,
            "fingerprint": self.spec.fingerprint,
            "store": str(self.store.path) if self.store else None,
            "nearest": str(self.nearest.path) if self.nearest else None,
            "differs": [asdict(difference) for difference in self.differs],
            "images": self.images,
            "augmented_copies": self.copies,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if self.store is not None:
            outputs = ", ".join(self.store.outputs()) or "nothing yet"
            lines = [f"{self.store.path.name} has this key. It holds {outputs}."]
        elif self.nearest is None:
            lines = [f"no store has this key: {self.cache} holds no store that can be read."]
        else:
            rows = describe_differences(self.nearest.spec, self.spec, (self.nearest.provenance, self.provenance))
            lines = [f"no store has this key. Nearest: {self.nearest.path.name}, which differs in"]
            lines += aligned(rows, right=2, indent=2)
        counted = [*_image_lines(self.images or {}), *_image_lines(self.copies or {}, "augmented copies")]
        return "\n".join([*lines, *counted, *(f"note: {note}" for note in self.notes)])


@exact_arithmetic()
def explain_miss(
    data: Any = None, *, backbone: str | Path, cache: str | Path | None = None, **options: Any
) -> Explanation:
    """What `prepare` with the same arguments would find. Without ``data`` the key alone is looked up.

    >>> print(explain_miss(backbone="vit-in21k", image_size=256))                                # doctest: +SKIP
    no store has this key. Nearest: vit-in21k-4f2a91c0, which differs in
      image_size           224 → 256
      position_embeddings  as trained → interpolated (bicubic)
    """
    folder = cache_folder(cache)
    planned = None if data is None else prepare(data, backbone=backbone, cache=cache, **options)
    network, spec = (planned.backbone, planned.spec) if planned else _key(folder, backbone, **options)
    store = planned.store if planned else find_store(folder, spec)
    nearest = None if store else _nearest(folder, spec)
    differs = tuple(spec_differences(nearest.spec, spec)) if nearest else ()
    notes, counts, copies = [*_generations(folder, spec)], None, None
    if planned:
        try:  # what `extract` would stop at before it computes anything
            planned.check_canary(write=False)
        except Drift as error:
            notes.append(" ".join(str(error).split()))
        notes += _other_copies(planned)
        counts, copies = _counts(planned, copies=False), _counts(planned, copies=True) if planned.copying else None
    notes += [str(error) for _, error in unreadable_stores(folder)]
    return Explanation(folder, spec, network.provenance, store, nearest, differs, counts, copies, tuple(notes))


def _key(
    cache: Path, name: str | Path, *, precision: str = "auto", dtype: str = "float16", device: str = "auto",
    outputs: str | None = None, bits: int | None = None, crop: Sequence[float] | None = None, **options: Any,
) -> tuple[Backbone, ExtractionSpec]:  # fmt: skip
    """The backbone and the key, without images; ``auto`` precision is then that of the newest store there is."""
    network, picked = load_backbone(name, **options), pick_device(device)
    for output in parse_list(outputs) if outputs else ():
        output_layout(network, output, dtype)  # refuses what the backbone has not
    spec = spec_of(network, "fp32", dtype, reading_record(bits, None if crop is None else check_crop(crop)))
    same = [store for store in stores(cache) if replace(store.spec, precision="fp32", generation=0) == spec]
    if precision == "auto" and same:
        precision = max(same, key=_made).spec.precision
    spec, _ = choose_precision(spec, precision, picked, cache, {}, np.empty(0, DIGEST))
    return network, latest_generation(cache, spec)


def _made(store: Store) -> float:
    return (store.path / "spec.json").stat().st_mtime


def _nearest(cache: Path, spec: ExtractionSpec) -> Store | None:
    """Same architecture first, then the same class; then the fewest fields; of those the newest."""
    record, network = spec.to_dict(), spec.architecture

    def distance(store: Store) -> tuple[bool, bool, int, int, float]:
        other, stored = store.spec.architecture, store.spec.to_dict()
        another = any(other.get(key) != network.get(key) for key in ("library", "class"))
        fields = sum(stored[name] != record[name] for name in record)
        return other != network, another, fields, len(list(spec_differences(store.spec, spec))), -_made(store)

    # Of imported features nobody knows what made them.
    return min((store for store in stores(cache) if not store.spec.imported), key=distance, default=None)


def _counts(planned: Extraction, copies: bool) -> dict[str, dict[str, int]]:
    counts = {output.name: planned.counts(copies, output) for output in planned.outputs}
    return {name: {"there": count.pop("in_cache"), **dict(reversed(count.items()))} for name, count in counts.items()}


def _other_copies(planned: Extraction) -> Iterator[str]:
    """Why no copy is found where a view of this name has some."""
    if planned.contents.view_copies is None or planned.copying is None:
        return
    stored, requested = planned.contents.view_copies, planned.copying.augmented
    if requested.augmentation != stored.augmentation:
        yield (
            f"the view {planned.name} has {stored} of an image, asked for is {requested}: other steps, numbers or "
            "another seed are other copies"
        )
    elif requested.views != stored.views:
        yield f"the view {planned.name} has {stored} of an image; those with the same number are the same"


def _image_lines(images: dict[str, dict[str, int]], what: str = "distinct images") -> Iterator[str]:
    """One line for all outputs of which the same images are there."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, counts in images.items():
        alike.setdefault(tuple(counts.values()), []).append(name)
    for (there, follow, new), names in alike.items():
        line = f"{there:,} of {there + follow + new:,} {what} are there for {', '.join(names)}"
        line += f"; {follow:,} follow from stored tokens" if follow else ""
        kind = "to be computed" if what == "augmented copies" else "new content"
        yield line + (f"; {new:,} {'are' if new > 1 else 'is'} {kind}" if new else "")


def _generations(cache: Path, spec: ExtractionSpec) -> Iterator[str]:
    """What changed from one generation of this key to the next."""
    for old, new in pairwise(generations(cache, spec)):
        before, after = _made_by(old), _made_by(new)
        changed = [f"{key} {before.get(key, '—')} → {v}" for key, v in after.items() if before.get(key) != v]
        yield (
            f"{new.path.name} is generation {new.spec.generation}: another machine or other versions computed "
            f"something else than {old.path.name} holds, and that was accepted "
            f"({', '.join(changed) or 'the same versions'})"
        )


def _made_by(store: Store) -> dict[str, str]:
    with contextlib.suppress(CacheError):
        return reference.made_by if (reference := canary.read_canary(store)) else {}
    return {}
