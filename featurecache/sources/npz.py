"""Archives of numpy, ``.npz``: images and labels as arrays, in memory or unpacked to a file.

``train_images``, ``train_labels`` and the same of val and test, as MedMNIST has them; or ``x_train``, ``y_train``,
``training_images``, ``X_test`` …: each name holds a word of `vocabulary.SPLITS` or none (then all arrays are without),
and one of images or of labels. Images are uint8 or uint16 [n, H, W], [n, H, W, 1] or [n, H, W, 3]; labels whole numbers
[n] or [n, 1] (-1: none), names [n], or [n, L] with 1, 0 and, where they are floats, NaN for unknown. Where every row of
these has exactly one 1, the columns are classes and not labels. Not every split has to be there.

At opening only headers and labels are read. The images of a split are unpacked when the first of them is asked for:
into memory up to 1 GiB, beyond that into an unnamed temporary file that is mapped (the 224 px sets have up to 16 GB).
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np

from featurecache.errors import SourceError
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset, ImageArrays
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns
from featurecache.sources.labels import SPLIT_ORDER, labels_of_numbers, resolve_labels
from featurecache.sources.vocabulary import SPLITS, words_of

_IN_MEMORY = 1 << 30  # bytes of one array
_LABELS = 1 << 30  # bytes of the labels of one split
_DEFLATE = 1032  # bytes that one packed byte can give, at most
# What the arrays of an archive are called -> what they hold.
_KINDS = {
    **dict.fromkeys(("x", "image", "images", "img", "imgs", "pixels"), "images"),
    **dict.fromkeys(("y", "label", "labels", "target", "targets"), "labels"),
}
_FILLERS = {"data", "set", "arr", "array", "all", "raw"}
_SHORT = re.compile(f"([xy])({'|'.join(SPLITS)})")  # xtrain
_DAMAGED = (
    OSError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, ValueError, EOFError, NotImplementedError,
    RuntimeError, MemoryError, SyntaxError, TypeError,
)  # fmt: skip


# -- arrays


class NpyHeader(NamedTuple):
    """What an array in numpy's format says of itself."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    offset: int  # of the data in the file

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Raises ValueError where the bytes are no array."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (version := np.lib.format.read_magic(file)) not in readers:
        raise ValueError(f"array format {version[0]}.{version[1]}, expected 1.0 or 2.0")
    return NpyHeader(*readers[version](file), file.tell())


@dataclass
class _PackedImages:
    """The images of one split, unpacked at the first use."""

    file: str
    member: str
    header: NpyHeader
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _array: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.header.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process unpacks its own."""
        return type(self), (self.file, self.member, self.header)

    def __getitem__(self, row: int) -> np.ndarray:
        with self._lock:
            if self._array is None:
                self._array = self._unpack()
        return np.asarray(self._array[row])

    def _unpack(self) -> np.ndarray:
        if self.header.size <= _IN_MEMORY or self.header.by_columns:
            return _array(self.file, self.member)
        gib, folder = self.header.size / 2**30, tempfile.gettempdir()
        try:
            if shutil.disk_usage(folder).free < self.header.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryFile() as unpacked, zipfile.ZipFile(self.file) as archive:
                with archive.open(self.member) as packed:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                unpacked.flush()
                mapped = np.memmap(unpacked, self.header.dtype, "r", self.header.offset, self.header.shape)
                return mapped.view(np.ndarray)  # the mapping lives on when the file is closed
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            needs = f"it needs {gib:.1f} GiB in {folder} (TMPDIR chooses another folder)"
            raise SourceError(f"{self.member} of {self.file} cannot be unpacked ({error}); {needs}.") from error


# -- the dataset


class ArrayRole(NamedTuple):
    """What an array is by its name."""

    split: str  # or empty
    kind: str  # images or labels


def array_role(name: str) -> ArrayRole | None:
    """``x_train`` and ``training_images`` → images of train; None for a name that says neither images nor labels."""
    words: list[str] = []
    for word in words_of(name):
        short = _SHORT.fullmatch(word)
        words += short.groups() if short else [word]
    splits, kinds = {SPLITS[word] for word in words if word in SPLITS}, {_KINDS[w] for w in words if w in _KINDS}
    if not kinds and splits and "data" in words:
        kinds = {"images"}
    known = all(word in SPLITS or word in _KINDS or word in _FILLERS for word in words)
    one = len(splits) <= 1 and (len(kinds) == 1 or (kinds == {"images", "labels"} and words[-1] in _KINDS))
    return ArrayRole("".join(splits), kinds.pop()) if known and one and len(kinds) == 1 else None


def open_archive(data: str, task: str | None, classes: Sequence[str] | None = None, **how: str) -> Dataset:
    """The dataset in the archive ``data`` (an absolute path); ``classes``, by number: the published ones of the set
    whose name it bears; ``how`` labels that are names are read: see `LabelOptions`. With the task unlabelled no labels
    are looked for."""
    name = os.path.basename(data)
    arrays = _headers(data)
    roles = _roles(name, arrays)
    splits = [split for split in (*SPLIT_ORDER, "") if any(role.split == split for role in roles)]
    columns = {split: _label_column(data, arrays, roles, split, task == "unlabelled") for split in splits}
    if len({column.shape[1:] for column in columns.values()}) > 1:
        forms = {roles.get(ArrayRole(split, "labels"), split): list(each.shape) for split, each in columns.items()}
        shapes = ", ".join(f"{array} {shape}" for array, shape in forms.items())
        raise SourceError(f"the labels of {name} differ in their form: {shapes}.")
    labels, own, understood = _labels(name, np.concatenate(list(columns.values())), classes, LabelOptions(task, **how))
    if any(array != f"{role.split}_{role.kind}" for role, array in roles.items()):
        read = [f"{array} as {role.kind}" + f" of {role.split}" * bool(role.split) for role, array in roles.items()]
        understood.append(f"arrays by their names: {', '.join(read)}")
    images = [roles[ArrayRole(split, "images")] for split in splits]
    notes = [f"{name} has no {split} images." for split in SPLIT_ORDER if split not in splits != [""]]
    if unused := sorted(set(arrays) - set(roles.values())):
        notes.append(f"{name} holds arrays that are not used: {abbreviated(unused, 8)}.")
    return Dataset(
        name=name.rsplit(".", 1)[0],
        ids=[
            ":".join(filter(None, (name, s, str(row)))) for s, column in columns.items() for row in range(len(column))
        ],
        **resolve_labels(labels, own, task, name)._asdict(),
        splits=[split for split, column in columns.items() for _ in range(len(column))],
        images=ImageArrays([_PackedImages(data, f"{array}.npy", arrays[array]) for array in images], (data,)),
        notes=tuple(notes),
        understood=tuple(understood),
    )


def _roles(name: str, arrays: Iterable[str]) -> dict[ArrayRole, str]:
    """Which array is what. Raises SourceError where none is, or two are the same."""
    roles: dict[ArrayRole, str] = {}
    for array in arrays:
        if (role := array_role(array)) is None:
            continue
        if role in roles:
            what = f"{role.split or 'all'} {role.kind}"
            raise SourceError(f"{name} has two arrays of {what}, {roles[role]} and {array}; remove or rename one.")
        roles[role] = array
    if not roles:
        there = abbreviated(list(arrays), 8) or "(none)"
        expected = "train_images, train_labels, the same of val and test (or x_train, y_train, …; or images, labels)"
        raise SourceError(f"{name} has the arrays {there}; expected {expected}.")
    if len({role.split == "" for role in roles}) > 1:
        without = [array for role, array in roles.items() if not role.split]
        beside = [array for role, array in roles.items() if role.split]
        there = f"{abbreviated(without)} beside {abbreviated(beside)}"
        raise SourceError(f"{name} has {there}: of which split are the first? Rename them, train_images and so on.")
    return roles


def _headers(file: str) -> dict[str, NpyHeader]:
    """Name -> header of every array in the archive. An array of objects is refused by its header, never unpickled."""
    headers = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as packed:
                        header = read_npy_header(packed)
                    if not header.dtype.hasobject:
                        _refuse_bombs(member, header)
                    headers[member.filename.removesuffix(".npy")] = header
    except _DAMAGED as error:
        raise SourceError(f"{file} cannot be read as an .npz ({error}).") from error
    if pickled := [name for name, header in headers.items() if header.dtype.hasobject]:
        there = f"{os.path.basename(file)} holds pickled Python objects ({abbreviated(pickled)})"
        way = "Save plain arrays: np.savez(file, train_images=array of uint8, ...)"
        raise SourceError(f"{there}, which could run code and are never loaded. {way}.")
    return headers


def _refuse_bombs(member: zipfile.ZipInfo, header: NpyHeader) -> None:
    """An array that is not the size of its member, or larger than what it was packed into could ever give."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in a way that numpy does not write")
    declared = header.offset + header.size
    if declared != member.file_size:
        raise ValueError(f"{member.filename} declares {declared:,} bytes and holds {member.file_size:,}")
    if member.file_size > _DEFLATE * member.compress_size + 4096:
        raise ValueError(f"{member.filename} declares {member.file_size:,} bytes, packed in {member.compress_size:,}")


def _label_column(
    file: str, arrays: dict[str, NpyHeader], roles: dict[ArrayRole, str], split: str, unlabelled: bool
) -> np.ndarray:
    """Labels [n] or [n, L] of a split, having checked that its images are what they have to be."""
    name, own = os.path.basename(file), {kind: roles.get(ArrayRole(split, kind)) for kind in ("images", "labels")}
    for kind, other in (("images", "labels"), ("labels", "images")):
        if own[kind] is None and not (unlabelled and kind == "labels"):
            lacks = str(own[other]).replace(other, kind) if other in str(own[other]) else f"{kind} of the same split"
            raise SourceError(f"{name} has {own[other]} and no {lacks}; expected both.")
    images, array = arrays[str(own["images"])], own["labels"]
    flat = len(images.shape) == 3 or images.shape[3:] in ((1,), (3,))
    if not flat or images.dtype not in (np.uint8, np.uint16):
        deep = " (volumes are not images: save slices)" if len(images.shape) == 4 else ""
        there = f"{images.dtype} {list(images.shape)}"
        raise SourceError(f"{own['images']} of {name} is {there}; expected uint8 [n, H, W] or [n, H, W, 3]{deep}.")
    if array is None or unlabelled:
        return np.full(images.shape[0], -1, np.int64)
    labels = arrays[array]
    if not labels.shape or len(labels.shape) > 2 or images.shape[0] != labels.shape[0]:
        there = f"{images.shape[0]:,} {own['images']} and {array} of shape {list(labels.shape)}"
        raise SourceError(f"{name} has {there}; expected one row of labels for each image.")
    if labels.size > _LABELS:
        raise SourceError(f"{array} of {name} declare {labels.size:,} bytes; expected at most {_LABELS:,}.")
    values = _array(file, f"{array}.npy")
    return values[:, 0] if values.shape[1:] == (1,) else values


def _array(file: str, member: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return np.asarray(archive[member.removesuffix(".npy")])
    except _DAMAGED as error:
        raise SourceError(f"{member} of {file} is damaged ({error}); get the file again.") from error


def _labels(
    name: str, values: np.ndarray, published: Sequence[str] | None, how: LabelOptions
) -> tuple[np.ndarray, list[str], list[str]]:
    """Labels as a dataset has them, int64 [N] or float32 [N, L], the names of the classes, how they were understood."""
    where = f"the labels of {name}"
    if values.ndim == 1 and values.dtype.kind == "U":
        reading = LabelColumns(name, lambda row: f"{where}, row {row:,}", how)
        return *labels_of_columns({"labels": values.tolist()}, reading), reading.remarks
    how.refuse_unused(f"{where} are numbers")
    if values.ndim == 1 and values.dtype.kind == "f" and np.isnan(values).any():
        raise SourceError(f"{where} are not whole numbers ({values.dtype}); expected class numbers.")
    labels, classes = labels_of_numbers(values, where)
    if published is not None:
        bears = f"{name} bears the name of a MedMNIST set (rename the file if it is another): it"
        return *labels_of_numbers(values, bears, published), []
    if labels.ndim == 2 and len(labels) and how.task != "multilabel" and (labels.sum(1) == 1).all():  # NaN: is none
        way = "--task multilabel reads them as labels of their own"
        return labels.argmax(1), classes, [f"{labels.shape[1]} classes: every row of labels has exactly one 1 ({way})"]
    return labels, classes, []
