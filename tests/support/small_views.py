"""Small stores with views whose rows tell which image and output they are of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from featurecache.files.directory import FORMAT
from featurecache.files.records import canonical_json
from featurecache.store.schema import DIGEST
from featurecache.store.shards import Layout, ShardWriter
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, create_store
from featurecache.store.view import View
from featurecache.store.write_view import ViewColumns, write_view

CLS = Layout("cls", (4,), "float16")
TOKENS = Layout("tokens", (5, 4), "float32", ("cls",), (2, 2))


def make_spec(**change) -> ExtractionSpec:  # type: ignore[no-untyped-def]
    record = {"architecture": {"class": "Tiny"}, "weights": {"random_seed": 0}, "preprocess": {"mean": [0.5]}}
    return ExtractionSpec(**{**record, "image_size": (8, 8), "position_embeddings": "as trained", **change})


def digests(numbers) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.array([f"{k:032x}" for k in numbers], DIGEST)


def features(numbers, layout: Layout) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Rows that say which image they are of."""
    values = np.asarray(list(numbers), layout.dtype).reshape(-1, *(1 for _ in layout.row_shape))
    return values + np.linspace(0, 0.5, int(np.prod(layout.row_shape)), dtype=layout.dtype).reshape(layout.row_shape)


def add_shard(store: Store, numbers, layout: Layout) -> None:  # type: ignore[no-untyped-def]
    writer = ShardWriter(store.path, digests(numbers), layout, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests(numbers)], features(numbers, layout))
    writer.commit()
    writer.discard()


def make_view(
    cache: Path, order, *, per_shard: int = 4, layouts=(CLS, TOKENS), name="set", groups=None, meta=None, **spec
) -> View:  # type: ignore[no-untyped-def]
    """A view of images ``order`` (numbers, repeats allowed) over shards of ``per_shard`` rows."""
    order = np.asarray(order)
    store = create_store(cache, "tiny", make_spec(**spec), {"backbone": "tiny", "request": {"name": "tiny"}})
    distinct = np.unique(order)
    for layout in layouts:
        for start in range(0, len(distinct), per_shard):
            add_shard(store, distinct[start : start + per_shard], layout)
    ids = [f"é/{k}.png" for k in range(len(order))]
    splits = ["train", "test"] * (len(order) // 2) + [""] * (len(order) % 2)
    rows = ViewColumns(ids, order % 2, splits, digests(order), groups, meta or {})
    attributes = {
        "classes": json.dumps(["no", "yes"]), "task": "binary", "spec": canonical_json(store.spec.to_dict()),
        "fingerprint": store.fingerprint, "format_version": FORMAT, "source": "{}", "failed": "[]",
    }  # fmt: skip
    located = {layout: store.locate(layout, rows.digests) for layout in layouts}
    return View(write_view(store, name, rows, attributes, located))


ORDER = [7, 3, 3, 0, 11, 10, 9, 1, 2]
