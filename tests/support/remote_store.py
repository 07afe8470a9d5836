"""Stores in object storage for tests: a view that was uploaded, files to import, keys of objects, flipped bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featurecache.store.remote_cache import push
from featurecache.store.store import cache_folder
from featurecache.store.view import View
from support.builders import ORDER, make_view
from support.object_storage import Server


def make_remote(server: Server) -> View:
    """A view of cls and tokens in shards of four, uploaded."""
    view = make_view(cache_folder(server.address), ORDER)
    assert push(view.store)
    return view


def feature_file(folder: Path, n: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "x.npy", np.random.default_rng(0).random((n, 8), np.float32))
    return folder / "x.npy"


def key_of(server: Server, ending: str) -> str:
    return next(key for key in server.objects() if ending in key)


def flipped(data: bytes, at: int = -200) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
