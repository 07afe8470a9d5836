"""The batches of CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read without running anything that is in them.

The published files are pickles, and a pickle is a program: who unpickles a file runs whatever its author wrote into it.
So the unpickler here knows no function and no class: each name in the file stands for an inert `_Inert` that only
keeps what it is given, names other than those that numpy's arrays need are refused, and the pixels are read from the
bytes found. (torchvision's own loader unpickles, after comparing MD5 sums. Here no sum is needed, and smaller sets in
the same format can be read too.)
"""

from __future__ import annotations

import os
import pickle  # only its parser; see above
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurecache.errors import SourceError

_PIXELS = 3 * 32 * 32  # of a row: the red plane, the green, the blue


class _Inert:
    """What a pickle calls or builds, as data: the arguments, and the state set on it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str = "", coding: str = "latin1") -> bytes:
    """What Python 3 makes of bytes where it writes for Python 2."""
    if coding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes as {coding}")
    return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): _Inert, ("numpy", "dtype"): _Inert, ("numpy.core.multiarray", "_reconstruct"): _Inert,
    ("numpy._core.multiarray", "_reconstruct"): _Inert, ("numpy._core.numeric", "_frombuffer"): _Inert,
    ("numpy.core.numeric", "_frombuffer"): _Inert, ("_codecs", "encode"): _encode, ("__builtin__", "bytes"): _encode,
}  # fmt: skip


class _Parser(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of pixels needs")
        return _KNOWN[module, name]


@dataclass(frozen=True)
class Batches:
    """Pixels uint8 [n, 32, 32, 3] and labels int64 [n] of one split."""

    pixels: np.ndarray
    labels: np.ndarray


def read_batches(files: list[str], key: str) -> Batches:
    """The rows of ``files``, one after another; ``key`` names the labels. Raises SourceError, OSError."""
    parts = [_batch(file, key) for file in files]
    return Batches(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def read_names(file: str, key: str) -> list[str]:
    """The names of the classes in ``batches.meta`` or ``meta``; index = label."""
    names = _record(file).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise SourceError(f"{file} has no list of names {key!r}; expected the file of the published archive.")
    return [name if isinstance(name, str) else name.decode("latin1") for name in names]


def _batch(file: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    record = _record(file)
    labels: Any = record.get(key)
    pixels = _bytes_of(record.get("data"))
    if pixels is None or not _are_numbers(labels) or len(pixels) != len(labels) * _PIXELS:
        raise SourceError(
            f"{file} is no batch of CIFAR: expected 'data' of {_PIXELS:,} bytes a row and a list of as many {key!r}."
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _are_numbers(labels: Any) -> bool:
    return isinstance(labels, list) and all(type(label) is int and 0 <= label < 1000 for label in labels)


def _record(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            found = _Parser(opened, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes make the parser do
        raise SourceError(f"{file} cannot be read as a batch of CIFAR ({error}); get the archive again.") from error
    if not isinstance(found, dict):
        raise SourceError(f"{file} is no batch of CIFAR: it holds no dictionary.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _bytes_of(array: Any) -> bytes | None:
    """The bytes of a pickled array of uint8 in the order of its rows; None where it is something else."""
    if not isinstance(array, _Inert):
        return None
    if array.state is None and len(array.arguments) == 4:  # protocol 5: _frombuffer(bytes, dtype, shape, order)
        raw, dtype, fortran = array.arguments[0], array.arguments[1], array.arguments[3] != "C"
    elif isinstance(array.state, tuple) and len(array.state) == 5:  # version, shape, dtype, whether by columns, bytes
        _, _, dtype, fortran, raw = array.state
    else:
        return None
    if fortran or not isinstance(dtype, _Inert) or dtype.arguments[:1] not in (("u1",), (b"u1",), ("|u1",)):
        return None
    return bytes(raw) if isinstance(raw, bytes | bytearray) else None


def batch_folder(root: str, name: str, meta: str) -> str | None:
    """The folder called ``name`` in ``root`` that holds ``meta``, or ``root`` itself where it does."""
    for folder in (os.path.join(root, name), root):
        if os.path.isfile(os.path.join(folder, meta)):
            return folder
    return None
