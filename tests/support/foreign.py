"""Features as somebody else keeps them, in files of the current folder, and their import."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from featurecache.errors import SourceError
from featurecache.maintenance.import_features import import_view
from featurecache.store.view import View

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
TOKENS = RNG.normal(size=(8, 5, 6)).astype(np.float32)
Y = np.arange(40) % 3


def npy(array, name="feats.npy"):
    np.save(name, array, allow_pickle=True)
    return name


def h5(name="feats.h5", *, attributes=(), **arrays):
    with h5py.File(name, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key.replace("__", "/"), data=values)
        file.attrs.update(dict(attributes))
    return name


def bring(file, name="mine", **options) -> View:
    return View(import_view(file, name, cache="cache", **options).view)


def refused(said, file, name="mine", *, error=SourceError, **options):
    with pytest.raises(error, match=said):
        bring(file, name, **options)
