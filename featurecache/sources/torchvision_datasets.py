"""Torchvision:, CIFAR batches without running a pickle.

``torchvision:<name>[:<variant>][@folder]``: the labelled sets of images in torchvision.datasets.

torchvision finds, checks and downloads the files; where they lie in files of their own they are taken as they are,
encoded. Files are looked for in the folder that was given, else in ``$FEATURECACHE_DATA/torchvision`` or
``~/.cache/featurecache/data/torchvision``. Splits are the set's own; a set that has none says so by having none.
CIFAR's batches, which are pickles, are read by `featurecache.sources.cifar`.

The batches of CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read without running anything that is in them.

The published files are pickles, and a pickle is a program: who unpickles a file runs whatever its author wrote into it.
So the unpickler here knows no function and no class: each name in the file stands for an inert `_Inert` that only
keeps what it is given, names other than those that numpy's arrays need are refused, and the pixels are read from the
bytes found. (torchvision's own loader unpickles, after comparing MD5 sums. Here no sum is needed, and smaller sets in
the same format can be read too.)
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, first_line, nearest
from featurecache.sources.base import (
    Dataset,
    ImageArrays,
    ImageFiles,
    ImageRows,
    ImageSource,
    abbreviated,
    resolve_task,
    safe_name,
    source_record,
    unique_names,
)
from featurecache.sources.fetching import at_place, beside, data_folder, fetching, not_here
from featurecache.sources.torchvision_catalogue import SETS, Split

FORM = "torchvision:<name>[:<variant>][@folder]"

# Read by `cifar` beside this: folder, files of either split, meta file; the variants are the keys of names and labels.
_CIFAR = {
    "CIFAR10": ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta"),
    "CIFAR100": ("cifar-100-python", ["train"], ["test"], "meta"),
}
_CIFAR_KEYS = {
    "CIFAR10": {"": ("label_names", "labels")},
    "CIFAR100": {"fine": ("fine_label_names", "fine_labels"), "coarse": ("coarse_label_names", "coarse_labels")},
}
NAMES = sorted([*SETS, *_CIFAR], key=str.lower)


@dataclass(frozen=True)
class _Asked:
    name: str
    variant: str
    folder: str

    @property
    def words(self) -> str:
        return f"torchvision:{self.name}" + (f":{self.variant}" if self.variant else "") + f"@{self.folder}"


def open_torchvision(words: str, asked_task: str | None) -> Dataset:
    """The set of ``words``, from files on this machine. Raises NotFetched where there are none."""
    asked = _parse(words)
    found = _cifar(asked) if asked.name in _CIFAR else _through_torchvision(asked)
    parts, classes = list(found.values()), next(iter(found.values())).classes
    if any(part.classes != classes for part in parts):
        raise SourceError(f"the splits of {asked.name} in {asked.folder} have different classes; fetch it again.")
    ids, images = _images(asked, found)
    labels = np.concatenate([part.labels for part in parts])
    names = unique_names(classes)
    task = resolve_task(asked_task, names, labels.ndim == 2, asked.name)
    if task == "unlabelled":
        names, labels = [], np.full(len(ids), -1, np.int64)
    grouped = all(part.groups for part in parts)
    note = SETS[asked.name].note if asked.name in SETS else ""
    return Dataset(
        name=safe_name(asked.name.lower() + (f"-{asked.variant}" if asked.variant not in ("", "fine") else "")),
        source=source_record("torchvision", asked.words, None, asked_task),
        ids=ids,
        labels=labels,
        splits=[split for split, part in found.items() for _ in range(len(part.images))],
        groups=[group for part in parts for group in part.groups or ()] if grouped else None,
        meta={},
        classes=names,
        task=task,
        images=images,
        notes=(note,) if note else (),
    )


def _images(asked: _Asked, found: dict[str, Split]) -> tuple[list[str], ImageSource]:
    if all(isinstance(part.images, list) for part in found.values()):
        paths = [os.path.relpath(path, asked.folder) for part in found.values() for path in part.images]
        ids = [path.replace(os.sep, "/") for path in paths]
        return ids, ImageFiles(asked.folder, ids)
    ids = [
        ":".join(word for word in (asked.name, split, str(row)) if word)
        for split, part in found.items()
        for row in range(len(part.images))
    ]
    arrays = ImageArrays([part.images for part in found.values()])
    if all(part.files for part in found.values()):
        return ids, ImageRows(arrays.read, tuple(file for part in found.values() for file in part.files))
    return ids, arrays


def _through_torchvision(asked: _Asked) -> dict[str, Split]:
    """Split → what torchvision's class found, which is never asked to download. Raises NotFetched, SourceError."""
    import torchvision.datasets

    known = SETS[asked.name]
    make, variant = getattr(torchvision.datasets, asked.name), known.variants.get(asked.variant, {})
    quiet = {"download": False} if known.fetches else {}
    if not os.path.isdir(asked.folder):
        raise _absent(asked)
    found = {}
    for split, arguments in known.splits.items():
        try:
            opened = make(asked.folder, **arguments, **variant, **quiet)
        except (RuntimeError, FileNotFoundError) as error:  # what its classes raise where the files are not there
            raise _absent(asked) from error
        except Exception as error:
            raise SourceError(f"{asked.name} in {asked.folder} cannot be read ({first_line(error)}).") from error
        found[split] = _in_order(known.read(opened))
        if not len(found[split].images):
            raise SourceError(f"{asked.name} in {asked.folder} has no {split or ''} images; fetch it again.")
    return found


def _in_order(split: Split) -> Split:
    """Files sorted by their paths: some of torchvision's classes list them as the file system does."""
    if not isinstance(split.images, list):
        return split
    order = sorted(range(len(split.images)), key=split.images.__getitem__)
    groups = [split.groups[row] for row in order] if split.groups else None
    return replace(split, images=[split.images[row] for row in order], labels=split.labels[order], groups=groups)


def _cifar(asked: _Asked) -> dict[str, Split]:
    name, train, test, meta = _CIFAR[asked.name]
    folder = batch_folder(asked.folder, name, meta)
    if folder is None:
        raise _absent(asked)
    names, labels = _CIFAR_KEYS[asked.name][asked.variant]
    classes = read_names(os.path.join(folder, meta), names)
    found = {}
    for split, names_of_files in {"train": train, "test": test}.items():
        files = [os.path.join(folder, file) for file in names_of_files]
        try:
            batches = read_batches(files, labels)
        except OSError as error:
            raise SourceError(f"{error.filename} cannot be read ({error.strerror}); get the archive again.") from error
        if len(batches.labels) and batches.labels.max() >= len(classes):
            raise SourceError(f"{folder} has the label {batches.labels.max()} and {len(classes)} names of classes.")
        found[split] = Split(batches.pixels, batches.labels, classes, files=tuple(files))
    return found


def fetch_torchvision(words: str) -> None:
    """Let torchvision download the set of ``words``. Raises SourceError."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_and_extract_archive

    asked = _parse(words)
    make = getattr(torchvision.datasets, asked.name)
    known = SETS.get(asked.name)
    if known and not known.fetches:
        raise SourceError(
            f"{asked.name} is not in {asked.folder}, and torchvision cannot download it: unpack it as the page of "
            f"torchvision.datasets.{asked.name} says, and name the folder: --data torchvision:{asked.name}@FOLDER"
        )
    variant = known.variants.get(asked.variant, {}) if known else {}
    with fetching(partial(_absent, asked)), beside(Path(asked.folder), asked.name) as draft:
        if known is None:
            download_and_extract_archive(make.url, str(draft), filename=make.filename, md5=make.tgz_md5)
        for arguments in known.splits.values() if known else []:
            make(str(draft), download=True, **arguments, **variant)


def _parse(words: str) -> _Asked:
    (name, *more), folder = at_place(words)
    name, _, variant = name.partition(":")
    known = {word.lower(): word for word in NAMES}
    if name.lower() not in known or more:
        import torchvision.datasets

        if hasattr(torchvision.datasets, name) and not more:
            raise SourceError(f"torchvision's {name} is no set of labelled images. Those that are: {', '.join(NAMES)}.")
        raise SourceError(
            f'torchvision has no labelled set called "{"@".join([name, *more])}" ({FORM}).{nearest(name, NAMES)} '
            f"It has {abbreviated(NAMES, 99)}."
        )
    name = known[name.lower()]
    variants = _CIFAR_KEYS[name] if name in _CIFAR else SETS[name].variants
    choices = [word for word in variants if word]
    if variant and variant not in choices:
        raise SourceError(f'{name} has no "{variant}"; it has {", ".join(choices) or "no variants"}.')
    if not variant and "" in variants and choices:
        raise SourceError(f"say which {name}: {', '.join(f'torchvision:{name}:{word}' for word in choices)}.")
    variant = variant or next(iter(variants), "")
    return _Asked(name, variant, folder or str(data_folder() / "torchvision"))


def _absent(asked: _Asked, why: str = "") -> NotFetched:
    word = f":{asked.variant}" if asked.variant else ""
    return not_here(asked.name, asked.folder, asked.words, f"--data torchvision:{asked.name}{word}@FOLDER", why)


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
