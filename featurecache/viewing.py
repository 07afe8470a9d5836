"""The view of an extraction: which of its samples and copies have rows, and what the file says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.dataset import Dataset
from featurecache.engines import CHANGED
from featurecache.errors import CacheError, SourceError
from featurecache.files import FORMAT
from featurecache.privacy import plain_reason
from featurecache.spec import canonical_json
from featurecache.views import Rows, copy_failed, write_view

if TYPE_CHECKING:
    from featurecache.extraction import Extraction


def write_view_of(extraction: Extraction, failures: dict[int, str]) -> tuple[Path, int, int, list[tuple[str, str]]]:
    """The view's path, how many images and copies are in it, and what is not, by the names that a person here finds
    it by."""
    assert extraction.store is not None
    samples = np.flatnonzero(np.isin(extraction.sample_image, list(failures)))
    reasons = {**extraction.unread, **{k: failures[int(extraction.sample_image[k])] for k in samples.tolist()}}
    kept = np.delete(np.arange(len(extraction.dataset)), list(reasons))
    copied, lost = _copies_of(extraction, kept, failures)
    if extraction.looked:
        changed = [k for k, reason in [*reasons.items(), *((k, r) for k, _, r in lost)] if reason == CHANGED]
        extraction.looked.seen.forget(np.unique(np.array(changed, np.int64)))
    located = {extraction.layouts[o.name]: extraction.locate(o) for o in extraction.outputs}
    missing = [*sorted(reasons.items()), *((k, copy_failed(copy, reason)) for k, copy, reason in lost)]
    failed = [(extraction.dataset.shown(sample), reason) for sample, reason in missing]
    if not len(kept):
        raise SourceError(
            f"none of {len(extraction.dataset):,} images could be read. The first, {failed[0][0]}: {failed[0][1]}."
        )
    images = np.concatenate([extraction.sample_image[kept], *(numbers for _, numbers in copied)])
    places = {layout: everywhere[images] for layout, everywhere in located.items()}
    if not all(each.found.all() for each in places.values()):
        raise CacheError(
            f"rows that were in {extraction.store.path} are gone: somebody removes files there. "
            "The same command computes them again."
        )
    rows = _rows_of(extraction.dataset, np.concatenate([kept, *(of for of, _ in copied)]), extraction.digests[images])
    if extraction.copying:
        copy = [np.full(len(of), 1 + number, np.int32) for number, (of, _) in enumerate(copied)]
        rows = replace(rows, versions=np.concatenate([np.zeros(len(kept), np.int32), *copy]))
    path = write_view(extraction.store, extraction.name, rows, _attributes(extraction, missing), places)
    return path, len(kept), len(images) - len(kept), failed


def _copies_of(
    extraction: Extraction, kept: np.ndarray, failures: dict[int, str]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[int, int, str]]]:
    """For copy 1 … k: samples of ``kept`` that have it, and its numbers; and (sample, copy, why not) of others."""
    if extraction.copying is None:
        return [], []
    may = kept[may_be_trained_on(extraction.dataset)[kept]]
    copied, lost = [], []
    for copy in range(1, extraction.copying.augmented.views + 1):
        numbers = extraction.copying.numbers(extraction.sample_image[may], copy)
        fine = ~np.isin(numbers, list(failures))
        copied.append((may[fine], numbers[fine]))
        lost += [(int(may[k]), copy, failures[int(numbers[k])]) for k in np.flatnonzero(~fine)]
    return copied, lost


def _attributes(extraction: Extraction, missing: list[tuple[int, str]]) -> dict[str, Any]:
    failed = [(extraction.dataset.ids[sample], reason) for sample, reason in missing]
    if "secret" in extraction.dataset.source:
        failed = [(name, plain_reason(reason)) for name, reason in failed]
    return {
        "classes": json.dumps(extraction.dataset.classes, ensure_ascii=False),
        "task": extraction.dataset.task,
        "spec": canonical_json(extraction.spec.to_dict()),
        "fingerprint": extraction.spec.fingerprint,
        "provenance": canonical_json(extraction.store.provenance if extraction.store else {}),
        "format_version": FORMAT,
        "source": canonical_json(extraction.dataset.source),
        "failed": json.dumps(failed, ensure_ascii=False),
        **({"augmentation": canonical_json(extraction.copying.augmented.to_dict())} if extraction.copying else {}),
    }


def may_be_trained_on(dataset: Dataset) -> np.ndarray:
    """bool [N]: the samples that have augmented copies. Where the data have no splits, all: train is drawn later."""
    if not any(dataset.splits):
        return np.ones(len(dataset), bool)
    return np.array(dataset.splits) == "train"


def _rows_of(dataset: Dataset, kept: np.ndarray, digests: np.ndarray) -> Rows:
    places = None if np.array_equal(kept, np.arange(len(dataset))) else kept.tolist()

    def pick(column: Any) -> Any:
        if places is None:
            return column
        return column[kept] if isinstance(column, np.ndarray) else [column[sample] for sample in places]

    groups = None if dataset.groups is None else pick(dataset.groups)
    meta = {key: pick(column) for key, column in dataset.meta.items()}
    return Rows(pick(dataset.ids), pick(dataset.labels), pick(dataset.splits), digests, groups, meta)
