"""Files as a stranger would make them: the user block is right, the content is not ours, no run of ours wrote it."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import xxhash

from featurecache.files.atomic import USER_BLOCK, new_hdf5, user_block


def seal(data: bytes) -> bytes:
    """``data`` with the user block that belongs to it."""
    return user_block(xxhash.xxh3_128_hexdigest(data[USER_BLOCK:]), len(data)) + data[USER_BLOCK:]


def plant(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(seal(data))
    return path


def build(fill) -> bytes:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    with new_hdf5(buffer) as file:
        fill(file)
    return buffer.getvalue()


def changed(path: Path, change) -> Path:  # type: ignore[no-untyped-def]
    """The same file after ``change(file)``, as a stranger's."""
    buffer = io.BytesIO(path.read_bytes())
    with h5py.File(buffer, "r+") as file:
        change(file)
    return plant(path, buffer.getvalue())


def digests(n: int) -> np.ndarray:
    return np.array([f"{k:032x}" for k in range(n)], "S32")


# Contents of a shard that lead out of it.


def external(file: h5py.File) -> None:
    file.create_dataset("features", shape=(2, 5, 3), dtype="f2", external=[("/etc/passwd", 0, 60)])


def soft(file: h5py.File) -> None:
    file["features"] = h5py.SoftLink("/digests")


def elsewhere(file: h5py.File) -> None:
    file["features"] = h5py.ExternalLink("/etc/passwd", "/x")


def cycle(file: h5py.File) -> None:
    group = file.create_group("group")
    group["again"] = group
