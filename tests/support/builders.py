"""Builders of specs, stores, shards and views without a backbone: every row says which image it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.store.schema import DIGEST, ViewColumns, text_array
from featurecache.store.shards import Layout, ShardWriter, notes_for
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, create_store
from featurecache.store.view import View
from featurecache.store.write_view import view_attributes, write_view

CLS = Layout("cls", (4,), "float16")
TOKENS = Layout("tokens", (5, 4), "float16", ("cls",), (2, 2))
ORDER = [7, 3, 3, 0, 11, 10, 9, 1, 2]  # images of a view, one of them twice


def make_spec(**change) -> ExtractionSpec:  # type: ignore[no-untyped-def]
    record = {"architecture": {"class": "Tiny"}, "weights": {"random_seed": 0}, "preprocess": {"mean": [0.5]}}
    return ExtractionSpec(**{**record, "image_size": (8, 8), "position_embeddings": "as trained", **change})


def make_store(cache: Path, name: str = "tiny", **spec) -> Store:  # type: ignore[no-untyped-def]
    return create_store(cache, name, make_spec(**spec), {"backbone": name, "request": {"name": name}})


def digests(numbers: Sequence[int]) -> np.ndarray:
    return np.array([f"{k:032x}" for k in numbers], DIGEST)


def features(numbers: Sequence[int], layout: Layout) -> np.ndarray:
    values = np.asarray(list(numbers), layout.dtype).reshape(-1, *(1 for _ in layout.shape))
    return values + np.linspace(0, 0.5, int(np.prod(layout.shape)), dtype=layout.dtype).reshape(layout.shape)


def add_shard(store: Store, numbers: Sequence[int], layout: Layout, planned: Sequence[int] = ()) -> Path:
    """Rows of images ``numbers``, of more that were ``planned``; the rounding error of image k is k thousandths."""
    notes = notes_for(store.fingerprint, "cpu", {"threads": 1})
    errors = np.array([k / 1000 for k in numbers], np.float32)
    with contextlib.closing(ShardWriter(store.path, digests(planned or numbers), layout, notes)) as writer:
        writer.append([bytes(d) for d in digests(numbers)], features(numbers, layout), errors)
        path = writer.commit()
    assert path is not None
    return path


def add_view(store: Store, name: str, order: Sequence[int], layouts: Sequence[Layout], **change) -> View:  # type: ignore[no-untyped-def]
    """A view of images ``order`` (repeats allowed), which must lie in the store's shards; labels are their parity."""
    numbers = np.asarray(order)
    ids, splits = [f"é/{k}.png" for k in range(len(order))], ["train", "val", "test"] * len(order)
    rows = ViewColumns(text_array(ids), numbers % 2, text_array(splits[: len(order)]), digests(order), **change)
    attributes = view_attributes(store, ["no", "yes"], "binary", {"data": "toys"})
    located = {layout: store.locate(layout, rows.digests) for layout in layouts}
    return View(write_view(store, name, rows, attributes, located))


def make_view(
    cache: Path, order: Sequence[int], *, per_shard: int = 4, layouts: Sequence[Layout] = (CLS, TOKENS),
    name: str = "set", spec: dict[str, Any] | None = None, **change: Any,
) -> View:  # fmt: skip
    """A store with the distinct images of ``order``, ascending, in shards of ``per_shard`` rows, and a view of them."""
    store, distinct = make_store(cache, **(spec or {})), sorted(set(order))
    for layout in layouts:
        for start in range(0, len(distinct), per_shard):
            add_shard(store, distinct[start : start + per_shard], layout)
    return add_view(store, name, order, layouts, **change)
