"""Somebody's HDF5 file of features: what datasets there are, and their rows in blocks.

HDF5 can crash or hang on a hostile file, so another process looks at it first (`featurecache.guard`) and does with it
what `open_hdf5` and `Array.blocks` do here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o

from featurecache import guard
from featurecache.errors import SourceError, UnsafeFile
from featurecache.foreign import Array, Foreign, first_line
from featurecache.inspection import places_of

FOREIGN = "file of features"  # what `guard` calls them
_ATTRIBUTE = 32 << 20  # bytes of an attribute
_OBJECTS = 65_536  # datasets of a file


def open_hdf5(path: Path) -> Foreign:
    """What is in a file that was looked at. Raises UnsafeFile, DamagedFile."""
    guard.checked([path], FOREIGN)
    return _look(path)


def _look(path: Path) -> Foreign:
    with h5py.File(path, "r", locking=False) as file:
        arrays = {name: _dataset(path, name, file[name]) for name in datasets_of(file, path)}
        attributes = _words_of(file)
        about = {name: _words_of(file[name]) for name in arrays}
    places = {name: dict(zip(("prefix", "grid"), places_of(words, path), strict=True)) for name, words in about.items()}
    return Foreign(path, arrays, attributes, places)


def _words_of(thing: h5py.HLObject) -> dict[str, str]:
    """Attributes that are a text; others say nothing to us."""
    found = {}
    for key in thing.attrs:
        attribute = h5py.h5a.open(thing.id, key.encode())
        if attribute.shape == () and isinstance(attribute.get_type(), h5py.h5t.TypeStringID):
            if attribute.get_storage_size() > _ATTRIBUTE:
                raise UnsafeFile(f"{thing.file.filename} has an attribute of {attribute.get_storage_size():,} bytes.")
            value = thing.attrs[key]
            found[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return found


def datasets_of(file: h5py.File, path: Path) -> list[str]:
    """Names of all datasets with their groups. Refuses what could lead HDF5 out of the file, before it is followed."""
    found, seen = [], {h5o.get_info(file.id).addr}
    pending: list[tuple[h5g.GroupID, str]] = [(file.id, "")]
    while pending:
        group, above = pending.pop()
        for key in group:
            name = above + key.decode("utf-8", "backslashreplace")
            if group.links.get_info(key).type != h5l.TYPE_HARD:
                raise UnsafeFile(f"{path}: {name!a} is a link that leads elsewhere; a plain file has none.")
            thing = h5o.open(group, key)
            address = h5o.get_info(thing).addr
            if address in seen:
                continue  # a second name for one object
            seen.add(address)
            if len(seen) > _OBJECTS:
                raise UnsafeFile(f"{path} holds more than {_OBJECTS:,} datasets.")
            if isinstance(thing, h5g.GroupID):
                pending.append((thing, f"{name}/"))
            elif isinstance(thing, h5d.DatasetID):
                _refuse_references(thing, f"{path}: {name!a}")
                found.append(name)
    return sorted(found)


def _refuse_references(dataset: h5d.DatasetID, name: str) -> None:
    creation = dataset.get_create_plist()
    if creation.get_external_count():
        raise UnsafeFile(f"{name} keeps its data in another file.")
    if creation.get_layout() == h5d.VIRTUAL:
        raise UnsafeFile(f"{name} refers to other files (a virtual dataset); featurecache export makes one plain file.")


def _dataset(path: Path, name: str, dataset: h5py.Dataset) -> Array:
    text, sides = h5py.check_string_dtype(dataset.dtype) is not None, dataset.shape or ()

    def read(rows: int) -> Iterator[np.ndarray]:
        try:
            with h5py.File(path, "r", locking=False) as file:
                found = file[name].asstr() if text else file[name]
                if not sides:
                    yield np.asarray(found[()])
                for start in range(0, sides[0] if sides else 0, rows):
                    yield np.asarray(found[start : start + rows])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise SourceError(f"{name} of {path} cannot be read ({first_line(error)}).") from error

    return Array(name, sides, dataset.dtype, text, read)


def read_all(path: Path) -> None:
    """Read a strange HDF5 file from its beginning to its end, as an import does."""
    for array in _look(path).arrays.values():
        if array.text or array.dtype.kind in "biuf":
            for _ in array.blocks():
                pass
