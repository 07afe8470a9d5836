"""torchvision.datasets: ``torchvision:<name>[:<variant>][@folder]``, its labelled sets of images.

torchvision finds, checks and downloads the files; where they lie in files of their own they are taken as they are,
encoded. Files are looked for in the folder that was given, else in ``$FEATURECACHE_DATA/torchvision`` or
``~/.cache/featurecache/data/torchvision``. Splits are the set's own; a set that has none says so by having none.

CIFAR-10 and CIFAR-100 (Krizhevsky 2009) are published as pickles, and a pickle is a program: who unpickles a file runs
whatever its author wrote into it. So the unpickler here knows no function and no class: each name in the file stands
for an inert object that only keeps what it is given, names other than those that numpy's arrays need are refused, and
the pixels are read from the bytes. (torchvision's own loader unpickles, after comparing MD5 sums. Here no sum is
needed, and smaller sets in the same format can be read too.)
"""

from __future__ import annotations

import os
import pickle  # only its parser; see above
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, UnknownSourceName, first_line, nearest
from featurecache.formatting import abbreviated, shell_word
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles
from featurecache.sources.fetching import SourceOptions, beside, data_folder, not_here
from featurecache.sources.labels import resolve_labels, unique_names
from featurecache.sources.torchvision_catalogue import SETS, Split

FORM = "torchvision:<name>[:<variant>][@folder]"
# Read here: folder, files of either split, meta file; the variants are the keys of names and labels.
_CIFAR = {
    "CIFAR10": ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta"),
    "CIFAR100": ("cifar-100-python", ["train"], ["test"], "meta"),
}
_CIFAR_KEYS = {
    "CIFAR10": {"": ("label_names", "labels")},
    "CIFAR100": {"fine": ("fine_label_names", "fine_labels"), "coarse": ("coarse_label_names", "coarse_labels")},
}
NAMES = sorted([*SETS, *_CIFAR], key=str.lower)


def open_torchvision(words: str, task: str | None) -> Dataset:
    """The set of ``words``, from files on this machine. Raises NotFetched where there are none."""
    options = _parse(words)
    splits = _cifar(options) if options.name in _CIFAR else _through_torchvision(options)
    parts = list(splits.values())
    if any(part.classes != parts[0].classes for part in parts):
        raise SourceError(f"the splits of {options.name} in {options.folder} have different classes; fetch it again.")
    ids, images = _images(options, splits)
    labels, names = np.concatenate([part.labels for part in parts]), unique_names(parts[0].classes)
    note = SETS[options.name].note if options.name in SETS else ""
    return Dataset(
        name=options.name.lower() + (f"-{options.variant}" if options.variant not in ("", "fine") else ""),
        source={"data": str(options)},
        ids=ids,
        **resolve_labels(labels, names, task, options.name)._asdict(),
        splits=[split for split, part in splits.items() for _ in range(len(part.images))],
        groups=[group for part in parts for group in part.groups or ()] or None,
        images=images,
        notes=(note,) if note else (),
    )


def fetch_torchvision(words: str) -> None:
    """Let torchvision download the set of ``words``. Raises SourceError."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_and_extract_archive

    options = _parse(words)
    make, entry = getattr(torchvision.datasets, options.name), SETS.get(options.name)
    if entry and not entry.fetches:
        raise SourceError(
            f"{options.name} is not in {options.folder}, and torchvision cannot download it: unpack it as the page of "
            f"torchvision.datasets.{options.name} says, and name the folder: --data torchvision:{options.name}@FOLDER"
        )
    with beside(Path(options.folder), options.name) as draft:
        if entry is None:
            download_and_extract_archive(make.url, str(draft), filename=make.filename, md5=make.tgz_md5)
            return
        for arguments in entry.splits.values():
            make(str(draft), download=True, **arguments, **entry.variants.get(options.variant, {}))


def _parse(words: str) -> SourceOptions:
    """The set, its variant and its folder. Raises SourceError."""
    options = SourceOptions.parse("torchvision", words)
    name = {word.lower(): word for word in NAMES}.get(options.name.lower())
    if name is None or options.version:
        import torchvision.datasets

        there = f"{nearest(options.name, NAMES)} It has {abbreviated(NAMES, 99)}."
        if hasattr(torchvision.datasets, options.name) and not options.version:
            raise UnknownSourceName(f"torchvision's {options.name} is no set of labelled images.{there}")
        wrong = options.name + (f"@{options.version}" if options.version else "")
        raise UnknownSourceName(f'torchvision has no labelled set called "{wrong}" ({FORM}).{there}')
    variants = _CIFAR_KEYS[name] if name in _CIFAR else SETS[name].variants
    choices = [word for word in variants if word]
    if options.variant and options.variant not in choices:
        raise SourceError(f'{name} has no "{options.variant}"; it has {", ".join(choices) or "no variants"}.')
    if not options.variant and "" in variants and choices:
        raise SourceError(f"say which {name}: {', '.join(f'torchvision:{name}:{word}' for word in choices)}.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featurecache" / "data"
    folder = options.folder or str(data_folder(cache) / "torchvision")
    return replace(options, name=name, variant=options.variant or next(iter(variants), ""), folder=folder)


def _absent(options: SourceOptions) -> NotFetched:
    return not_here(options.name, options.folder, options, f"--data {shell_word(replace(options, folder='FOLDER'))}")


def _images(options: SourceOptions, splits: dict[str, Split]) -> tuple[list[str], ImageArrays | ImageFiles]:
    parts = list(splits.values())
    if all(isinstance(part.images, list) for part in parts):
        ids = [os.path.relpath(path, options.folder).replace(os.sep, "/") for part in parts for path in part.images]
        return ids, ImageFiles(options.folder, ids)
    fronts = {f"{options.name}:{split}" if split else options.name: part for split, part in splits.items()}
    ids = [f"{front}:{row}" for front, part in fronts.items() for row in range(len(part.images))]
    files = [file for part in parts for file in part.files] if all(part.files for part in parts) else []
    return ids, ImageArrays([part.images for part in parts], tuple(files))


def _through_torchvision(options: SourceOptions) -> dict[str, Split]:
    """Split → what torchvision's class finds, which is never asked to download. Raises NotFetched, SourceError."""
    import torchvision.datasets

    entry = SETS[options.name]
    make, arguments = getattr(torchvision.datasets, options.name), dict(entry.variants.get(options.variant, {}))
    if entry.fetches:
        arguments["download"] = False
    if not os.path.isdir(options.folder):
        raise _absent(options)
    splits = {}
    for split, own in entry.splits.items():
        try:
            opened = make(options.folder, **own, **arguments)
        except (RuntimeError, FileNotFoundError) as error:  # what its classes raise where the files are not there
            raise _absent(options) from error
        except Exception as error:
            raise SourceError(f"{options.name} in {options.folder} cannot be read ({first_line(error)}).") from error
        splits[split] = _in_order(entry.read(opened))
        if not len(splits[split].images):
            raise SourceError(f"{options.name} in {options.folder} has no {split or ''} images; fetch it again.")
    return splits


def _in_order(split: Split) -> Split:
    """Files sorted by their paths: some of torchvision's classes list them as the file system does."""
    if not isinstance(split.images, list):
        return split
    order = sorted(range(len(split.images)), key=split.images.__getitem__)
    groups = [split.groups[row] for row in order] if split.groups else None
    return replace(split, images=[split.images[row] for row in order], labels=split.labels[order], groups=groups)


# -- CIFAR


def _cifar(options: SourceOptions) -> dict[str, Split]:
    name, train, test, meta = _CIFAR[options.name]
    folders = (os.path.join(options.folder, name), options.folder)
    folder = next((folder for folder in folders if os.path.isfile(os.path.join(folder, meta))), None)
    if folder is None:
        raise _absent(options)
    names, key = _CIFAR_KEYS[options.name][options.variant]
    file = os.path.join(folder, meta)
    classes = _record(file).get(names)
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str | bytes) for name in classes):
        raise SourceError(f"{file} has no list of names {names!r}; expected the file of the published archive.")
    classes = [name if isinstance(name, str) else name.decode("latin1") for name in classes]
    splits = {}
    for split, batches in {"train": train, "test": test}.items():
        files = tuple(os.path.join(folder, file) for file in batches)
        pixels, labels = map(np.concatenate, zip(*(_batch(file, key) for file in files), strict=True))
        if len(labels) and labels.max() >= len(classes):
            raise SourceError(f"{folder} has the label {labels.max()} and {len(classes)} names of classes.")
        splits[split] = Split(pixels, labels, classes, files=files)
    return splits


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


_NEEDED = {
    ("numpy", "ndarray"): _Inert, ("numpy", "dtype"): _Inert, ("numpy.core.multiarray", "_reconstruct"): _Inert,
    ("numpy._core.multiarray", "_reconstruct"): _Inert, ("numpy._core.numeric", "_frombuffer"): _Inert,
    ("numpy.core.numeric", "_frombuffer"): _Inert, ("_codecs", "encode"): _encode, ("__builtin__", "bytes"): _encode,
}  # fmt: skip


class _Parser(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of pixels needs")
        return _NEEDED[module, name]


def _batch(file: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    record = _record(file)
    labels: Any = record.get(key)
    pixels = _bytes_of(record.get("data"))
    numbers = isinstance(labels, list) and all(type(label) is int and 0 <= label < 1000 for label in labels)
    if pixels is None or not numbers or len(pixels) != len(labels) * _PIXELS:
        expected = f"expected 'data' of {_PIXELS:,} bytes a row and a list of as many {key!r}"
        raise SourceError(f"{file} is no batch of CIFAR: {expected}.")
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _record(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            record = _Parser(opened, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes make the parser do
        raise SourceError(f"{file} cannot be read as a batch of CIFAR ({error}); get the archive again.") from error
    if not isinstance(record, dict):
        raise SourceError(f"{file} is no batch of CIFAR: it holds no dictionary.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in record.items()}


def _bytes_of(array: Any) -> bytes | None:
    """The bytes of a pickled array of uint8 in the order of its rows; None where it is something else."""
    match array:
        case _Inert(state=None, arguments=(raw, _Inert(arguments=(kind, *_)), _, order)):  # _frombuffer of protocol 5
            by_columns = order != "C"
        case _Inert(state=(_version, _shape, _Inert(arguments=(kind, *_)), by_columns, raw)):
            pass
        case _:
            return None
    plain = kind in ("u1", b"u1", "|u1") and not by_columns and isinstance(raw, bytes | bytearray)
    return bytes(raw) if plain else None
