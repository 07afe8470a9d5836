"""Stores in object storage for tests: a view that was uploaded, files to import, keys of objects, flipped bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featurecache.store.remote_cache import push, push_shards
from featurecache.store.store import cache_folder
from featurecache.store.view import View
from support.builders import CLS, ORDER, TOKENS, add_shard, add_view, make_store
from support.object_storage import Server


def make_remote(server: Server, order: list[int] = ORDER, name: str = "set") -> View:
    """A view of cls and tokens in shards of four, uploaded."""
    store, distinct = make_store(cache_folder(server.address)), sorted(set(order))
    for layout in (CLS, TOKENS):
        for start in range(0, len(distinct), 4):
            add_shard(store, distinct[start : start + 4], layout)
    push_shards(store.path)
    view = add_view(store, name, order, [CLS, TOKENS])
    assert push(store.path)
    return view


def feature_file(folder: Path, n: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "x.npy", np.random.default_rng(0).random((n, 8), np.float32))
    return folder / "x.npy"


def key_of(server: Server, ending: str) -> str:
    return next(key for key in server.objects() if ending in key)


def flipped(data: bytes, at: int = -200) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
