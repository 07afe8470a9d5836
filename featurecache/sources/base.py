"""Dataset: N labelled images, what each is called, and how its bytes or pixels are read.

Every source (a folder, a table, an archive) makes one of these, and nothing after it knows which it was. Row i is the
same image in every field. About 300 bytes an image: the images themselves stay where they are.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import stat
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np

from featurecache.errors import BadOption, SourceError, UnreadableImage
from featurecache.files.mirror import Mirror, fetch, mirror_of, place_of
from featurecache.files.storage import is_address
from featurecache.images.headers import Crop, EncodedFrame, EncodedImage, check_crop, read_by, reading_record
from featurecache.sources.labels import TASKS

# Opening a pipe must not wait for its other end.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_LONGEST_NAME = 80  # characters: with .h5 behind it and four bytes each still a file name (255 bytes)


class ImageSource(Protocol):
    """Where the images of a dataset are read from."""

    def read(self, row: int) -> EncodedImage: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """N labelled images. Made by ``open_source``."""

    name: str  # of the view made of it: the folder's or file's, made safe for a file name
    source: dict[str, Any] = field(default_factory=dict)  # JSON, with ``data``: `sources.reopen` makes the same of it
    ids: list[str]  # stable, relative to the source
    labels: np.ndarray  # int64 [N], -1 none; several labels: float32 [N, L], NaN unknown
    splits: list[str]  # train, val, test, or empty
    groups: list[str] | None = None  # patients; None where not known
    meta: dict[str, list[str] | np.ndarray] = field(default_factory=dict)  # further columns [N]
    classes: list[str]  # index = label; several labels: their names
    task: str
    images: ImageSource = field(repr=False)
    notes: tuple[str, ...] = ()  # what a user should hear about it, each one sentence
    understood: tuple[str, ...] = ()  # how its names were read, each a few words; no ids or groups in them
    bits: int | None = None  # 2^bits − 1 is white in 16-bit images; None: 65,535
    crop: Crop | None = None  # all that is looked at of every image

    def __post_init__(self) -> None:
        columns: list[Sequence[Any] | np.ndarray] = [self.labels, self.splits, *self.meta.values()]
        assert all(len(column) == len(self.ids) for column in columns)
        assert self.groups is None or len(self.groups) == len(self.ids)
        assert self.task in TASKS, self.task
        if self.bits is not None and not 0 < self.bits < 16:
            raise BadOption(f"--bits is 1 to 15 (of 16, which is what 16-bit files have without it), not {self.bits}.")
        if self.crop is not None:
            check_crop(self.crop)
        assert (self.labels.ndim == 2) == (self.task == "multilabel"), (self.labels.shape, self.task)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> str:
        """As people name it."""
        return self.name

    def at(self, rows: np.ndarray) -> Dataset:
        """The dataset of these rows alone."""
        images = self.images
        return replace(
            self, ids=_at(self.ids, rows), labels=self.labels[rows], splits=_at(self.splits, rows),
            groups=self.groups and _at(self.groups, rows), meta={name: _at(c, rows) for name, c in self.meta.items()},
            images=images.at(rows) if isinstance(images, ImageFiles) else ImageArrays([_ImageRows(images, rows)]),
        )  # fmt: skip

    def read(self, row: int) -> EncodedImage:
        """The encoded bytes of a file, or an array [H, W], [H, W, 1] or [H, W, 3]. Raises UnreadableImage."""
        return read_by(self.images.read(row), self.reading)

    @property
    def reading(self) -> dict[str, Any]:
        """What was said of reading the images, as a spec has it."""
        return reading_record(self.bits, self.crop)

    def path(self, row: int) -> str | None:
        """The file of this image (and, of DICOM, of its other frames); None where it lies in an archive of many."""
        return self.images.path(row) if isinstance(self.images, ImageFiles) and not self.images.archived else None

    def shown(self, row: int) -> str:
        """By what a person at this machine finds an image: its id; where ids are hashed, its path."""
        return (self.path(row) if self.source.get("hash_ids") else None) or self.ids[row]


def _at(column: Any, rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()]


@dataclass(frozen=True)
class _ImageRows:
    """Some rows of images that lie in an archive or in arrays."""

    images: ImageSource
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> EncodedImage:
        return self.images.read(int(self.rows[row]))


@dataclass(frozen=True)
class ImageFiles:
    """Images in files of their own: ``ids`` are paths relative to ``root`` (or absolute)."""

    root: str
    ids: list[str] = field(repr=False)
    archived: ClassVar[bool] = False  # whether a file is an archive of many images

    def __getstate__(self) -> dict[str, Any]:
        """With the address of a root in a mirror: a process on another machine reads from a mirror of its own."""
        return vars(self) | {"root": (self.root, self.address)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        root, address = state["root"]
        if address and mirror_of(root) is None:
            root = str(Mirror.of(address, "data").folder)
        vars(self).update(state | {"root": root})

    @property
    def address(self) -> str:
        """Of ``root``, where it lies in object storage; else empty."""
        return place if is_address(place := place_of(self.root)) else ""

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.ids[row])

    def at(self, rows: np.ndarray) -> ImageFiles:
        return replace(self, ids=_at(self.ids, rows))

    def read(self, row: int) -> bytes | EncodedFrame:
        return read_file(self.path(row))


def read_file(path: str) -> bytes:
    """A file's bytes. Raises UnreadableImage."""
    with open_image_file(path) as (descriptor, status), as_unreadable(path):
        # to its end, which may have moved since it had this size; half the time of open().read()
        parts = [os.read(descriptor, status.st_size + 1)]
        while parts[-1] and len(parts[0]) != status.st_size:
            parts.append(os.read(descriptor, 1 << 24))
        return b"".join(parts)


def read_text(file: str, of: str = "") -> str:
    """A file that belongs to a data set (``of``: which). Raises SourceError where it is no UTF-8 text."""
    try:
        return read_file(file).decode("utf-8-sig")
    except (UnreadableImage, UnicodeDecodeError) as error:
        raise SourceError(f"{file}{of} cannot be read as UTF-8 text ({error}).") from error


@contextlib.contextmanager
def open_image_file(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """The descriptor and the stat of a regular file; nothing else is opened. Raises UnreadableImage; StorageError where
    it lies in object storage that does not answer, which says nothing of the image."""
    try:
        fetch([path])
    except FileNotFoundError:
        raise UnreadableImage("no such object any more") from None
    with as_unreadable(path):
        descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a file")
        yield descriptor, status
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def as_unreadable(path: str) -> Iterator[None]:
    """What the system says of a file, as UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage("a link to a file that is gone" if os.path.islink(path) else "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UnreadableImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


@dataclass(frozen=True)
class ImageArrays:
    """Images as the elements of arrays or of Arrow's tables, one after another."""

    parts: Sequence[Any] = field(repr=False)  # each: len() and [row], an image as `Dataset.read` gives it
    files: tuple[str, ...] = ()  # those that hold all of them, where it is known: unchanged, so is every row

    def read(self, row: int) -> EncodedImage:
        starts = [0, *accumulate(len(part) for part in self.parts)]
        part = bisect_right(starts, row) - 1
        image: EncodedImage = self.parts[part][row - starts[part]]
        return image


def may_be_trained_on(dataset: Dataset) -> np.ndarray:
    """bool [N]: the samples that have augmented copies. Where the data have no splits, all: train is drawn later."""
    if not any(dataset.splits):
        return np.ones(len(dataset), bool)
    return np.array(dataset.splits) == "train"


def safe_name(text: str) -> str:
    """``text`` as the name of a view: letters of any script, digits, ``_``, ``-``, ``.``; no dot or dash in front."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:_LONGEST_NAME] or "data"


def package(name: str, extra: str, what: str) -> Any:
    """An optional package. Raises SourceError where it is not installed."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some keep the stdout they find for their log
            return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(f"{name.partition('.')[0]} is needed {what}: pip install 'featurecache[{extra}]'.") from error
