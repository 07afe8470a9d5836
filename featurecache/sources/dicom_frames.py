"""Files of several images: DICOM frames and TIFF pages are images of their own, and whose they are is known.

``expand_frames`` takes a dataset of files (a folder, a table) and looks into the headers of those that are DICOM. The
images of a file of several frames are called ``chest/a.dcm#frame=0``, ``#frame=1``, … in their order; all have the
label and split of the file. A table may also list single frames by such names. ``page`` is for TIFF stacks the same:
"all" gives each page a row, a number takes this one of each (of DICOM too). Without it a TIFF is its first page.

Groups. Where the source says none, the group of an image is the PatientID of its file: frames and files of one patient
must not stand in train and in test. That is the only thing of a patient that a cache gets to hold, in plain unless
``--hash-groups`` is given, and a note says so. Without a PatientID the frames of a file are a group of their own. One
PatientID in all files is what anonymising leaves behind and says nothing: it is not taken.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from featurecache.errors import BadOption, SourceError, UnreadableImage
from featurecache.formatting import counted
from featurecache.images import dicom, tiff
from featurecache.images.headers import DICOM_FRONT, EncodedFrame, is_dicom
from featurecache.sources.base import Dataset, ImageFiles, as_unreadable, open_image_file, read_file

PICTURES = (  # what the other formats of `images.decoding` are called on a disk
    ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jpe", ".jfif", ".pgm", ".ppm", ".pbm", ".pnm",
)  # fmt: skip
EXTENSIONS = (".dcm", ".dicom", ".dic")
PLAIN_PATIENTS = "Each PatientID is stored as it is; --hash-groups hides them."
_FRAME = re.compile(r"^(.+)#frame=(0|[1-9]\d{0,8})$", re.DOTALL)
_REMEMBERED = 1 << 18  # headers, of about 300 bytes each
_last = threading.local()  # of each thread the file it read last: its frames are asked for one after the other


@dataclass(frozen=True)
class FrameFiles(ImageFiles):
    """``ImageFiles`` of which some ids name a frame or page of a file."""

    def path(self, row: int) -> str:
        return os.path.join(self.root, split_frame(self.ids[row])[0])

    def read(self, row: int) -> bytes | EncodedFrame:
        path, number = self.path(row), split_frame(self.ids[row])[1]
        if number is None:
            return read_file(path)
        return frame_of(_stamp(path), number, lambda: read_file(path))


@dataclass(frozen=True)
class _FileHeader:
    """What the header of a file says; of one that cannot be read nothing, it is a named failure when it is."""

    numbers: tuple[int, ...] | range = (0,)  # of its frames, or of the pages of a TIFF that are no previews
    dicom: bool = False
    patient: str = ""
    windows: int | None = None  # how many to choose from; None where it is no matter (colour, a table, frames' own)


def frame_of(stamp: tuple[Any, ...] | None, number: int, read: Callable[[], bytes]) -> EncodedFrame:
    """A frame of the file that ``read`` reads; not again where this thread has read that of this ``stamp`` last."""
    if stamp is None or getattr(_last, "stamp", None) != stamp:
        data = read()
        _last.stamp, _last.file = stamp, (data, hashlib.blake2b(data, digest_size=16))
    return EncodedFrame(_last.file[0], number, _last.file[1])


def split_frame(name: str) -> tuple[str, int | None]:
    """``a.dcm#frame=3`` → ``a.dcm``, 3."""
    match = _FRAME.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def may_be_dicom(name: str) -> bool:
    """Whether a file may be DICOM by its name: one that is no picture's, whatever its ending (.IMA, a UID, none)."""
    return os.path.splitext(name)[1].lower() not in PICTURES and name.upper() != "DICOMDIR"


def is_dicom_file(path: str) -> bool:
    """Whether a file is DICOM by its content. One that cannot be opened is none."""
    try:
        with open_image_file(path) as (descriptor, _), as_unreadable(path):
            return is_dicom(os.read(descriptor, DICOM_FRONT))
    except UnreadableImage:
        return False


def images_in_file(name: str, data: bytes, page: str | None = None) -> list[tuple[str, bytes | EncodedFrame]]:
    """The images of one file, by name: itself, or its frames."""
    numbers = _numbers_in(data, page)
    if len(numbers) == 1:
        return [(name, data)]
    hashed = hashlib.blake2b(data, digest_size=16)
    return [(f"{name}#frame={n}", EncodedFrame(data, n, hashed)) for n in _of_page(numbers, page)]


def _numbers_in(data: bytes, page: str | None) -> Sequence[int]:
    """Those of a file's frames; of its pages where ``page`` asks for them."""
    if not is_dicom(data):
        return tiff.pages(data) if page is not None and tiff.is_tiff(data) else (0,)
    try:
        return range(dicom.read_header(data).frames)
    except UnreadableImage:  # said when it is decoded
        return (0,)


def _of_page(numbers: Sequence[int], page: str | None) -> Sequence[int]:
    return numbers if page in (None, "all") else [int(str(page))]


def expand_frames(dataset: Dataset, page: str | None = None) -> Dataset:
    """``dataset`` with a row for each frame, and groups. Raises SourceError where pydicom is missing, BadOption for a
    ``page`` that is none or of images that lie in arrays."""
    if page is not None and not re.fullmatch(r"all|0|[1-9]\d{0,8}", page):
        raise BadOption(f'--page is a number from 0 on, or all; not "{page}".')
    if not isinstance(dataset.images, ImageFiles):
        if page is not None:
            where = f"those of {dataset.source['data']} lie in an archive or in arrays"
            raise BadOption(f"--page is for images in files of their own or in tars; {where}. Leave it out.")
        return dataset
    file_of, headers = _files_of(dataset, dataset.images, page)
    if not file_of:
        return dataset
    numbers = {row: headers[file].numbers for row, (file, number) in file_of.items() if number is None}
    of_row = [numbers.get(row, (0,)) for row in range(len(dataset))]
    frames_of = [list(_of_page(several, page)) if len(several) > 1 else [None] for several in of_row]
    frames: list[int | None] = list(chain(*frames_of))  # None of a file that holds one image
    rows = np.repeat(np.arange(len(dataset)), [len(each) for each in frames_of])
    groups = dataset.groups if dataset.groups is not None else _patients(dataset.ids, file_of, headers, len(rows))
    taken = replace(dataset, groups=groups).at(rows)
    ids = _frame_names(taken.ids, frames)
    if taken.groups is not None:  # a group of its own bears the id of its first image, by which it is hidden too
        first = dict(zip(reversed(taken.ids), reversed(ids), strict=True))
        groups = [first.get(group, group) for group in taken.groups]
    images: Any = taken.images  # whose files may be called otherwise than the rows: without an ending, with backslashes
    files = _frame_names(images.ids, frames)
    images = replace(images, ids=files, frames=frames) if images.archived else FrameFiles(images.root, files)
    notes = (*dataset.notes, *_notes(dataset.groups is not None, list(headers.values()), page))
    return replace(taken, ids=ids, groups=groups, images=images, notes=notes)


def _frame_names(names: Sequence[str], frames: Sequence[int | None]) -> list[str]:
    """What `split_frame` divides."""
    return [name if frame is None else f"{name}#frame={frame}" for name, frame in zip(names, frames, strict=True)]


def _files_of(
    dataset: Dataset, images: ImageFiles, page: str | None
) -> tuple[dict[int, tuple[str, int | None]], dict[str, _FileHeader]]:
    """Row → its file, and its frame where its id names one, of the rows of files that may hold several images; and the
    header of each file. Images in tars are read for it, once."""
    if images.archived:
        archived = enumerate(images.ids if page is not None else ())
        headers = {name: _header_of(images, row, page) for row, name in archived}
        return {row: (name, None) for row, name in enumerate(headers)}, headers
    places = ((row, _file_of(images.root, name, page)) for row, name in enumerate(images.ids))
    file_of = {row: place for row, place in places if place is not None}
    distinct = {file: os.path.join(images.root, file) for file, _ in file_of.values()}
    if distinct and not dicom.installed() and (count := sum(is_dicom_file(path) for path in distinct.values())):
        raise SourceError(f"{dataset.source['data']} has {counted(count, 'image')} in DICOM. {dicom.MISSING}.")
    return file_of, {file: _read_header(path, _stamp(path)) for file, path in distinct.items()}


def _header_of(images: ImageFiles, row: int, page: str | None) -> _FileHeader:
    """The same of an image in a tar."""
    try:
        data: Any = images.read(row)
        return _FileHeader(tuple(_numbers_in(data, page)), is_dicom(data))
    except UnreadableImage:
        return _FileHeader()


def _file_of(root: str, name: str, page: str | None) -> tuple[str, int | None] | None:
    """The file of several images that a name stands for, and its frame if it names one; a file of that very name comes
    first. None for what is no DICOM, nor a TIFF of which a ``page`` is asked for."""
    file, number = split_frame(name)
    if number is not None and not os.path.lexists(os.path.join(root, name)):
        return file, number
    ending, plain = os.path.splitext(name)[1].lower(), os.path.basename(name)
    if page is not None and ending in (".tif", ".tiff"):
        return name, None
    dicom_file = ending in EXTENSIONS or (may_be_dicom(plain) and is_dicom_file(os.path.join(root, name)))
    return (name, None) if dicom_file else None


@functools.lru_cache(_REMEMBERED)
def _read_header(path: str, stamp: tuple[Any, ...] | None) -> _FileHeader:
    """Of the file of this `_stamp`. In the memory of the process alone: a PatientID is to stand on no disk."""
    try:
        with open_image_file(path) as (descriptor, status), os.fdopen(os.dup(descriptor), "rb") as file:
            front = file.read(DICOM_FRONT)
            if not is_dicom(front):
                if not tiff.is_tiff(front):
                    return _FileHeader()
                with mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ) as mapped:
                    return _FileHeader(tuple(tiff.pages(mapped)))
            file.seek(0)
            header = dicom.read_header(file, ("PatientID",))
    except UnreadableImage:
        return _FileHeader()
    try:
        patient = str(header.settings.get("PatientID") or "").strip().replace("\0", "")
        return _FileHeader(range(header.frames), True, patient, _windows(header.settings))
    except Exception:  # a value that pydicom cannot make text of
        return _FileHeader(range(header.frames), True)


def _windows(settings: Any) -> int | None:
    grey = str(settings.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
    own = "PerFrameFunctionalGroupsSequence" in settings or "SharedFunctionalGroupsSequence" in settings
    value = settings.get("WindowCenter")
    if not grey or settings.get("VOILUTSequence") or (own and value in (None, "")):
        return None
    return 0 if value in (None, "") else 1 if isinstance(value, int | float | str) else len(value)


def _patients(
    ids: list[str], file_of: dict[int, tuple[str, int | None]], files: dict[str, _FileHeader], rows: int
) -> list[str] | None:
    """The group of each row before frames are told apart: a patient, else the first id of its file. None where that is
    every image by itself, of the ``rows`` that there will be."""
    patients = {header.patient for header in files.values()} - {""}
    told = patients if len(patients) > 1 else set()
    firsts: dict[str, str] = {}
    groups = []
    for row, name in enumerate(ids):
        file = file_of[row][0] if row in file_of else name
        patient = files[file].patient if row in file_of else ""
        groups.append(patient if patient in told else firsts.setdefault(file, name))
    return groups if told or len(set(groups)) < rows else None


def _stamp(path: str) -> tuple[Any, ...] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _notes(grouped: bool, files: list[_FileHeader], page: str | None) -> list[str]:
    notes = []
    for kind, unit in (("DICOM", "frame"), ("TIFF", "page")):
        of_kind = [len(header.numbers) for header in files if header.dicom == (kind == "DICOM")]
        each = "each an image (#frame=0, #frame=1, …)"
        used = each if page in (None, "all") else f"{unit} {page} of each is used"
        if several := [count for count in of_kind if count > 1]:
            notes.append(f"{counted(len(several), f'{kind} file')} with {sum(several):,} {unit}s, {used}.")
    if page is not None and all(len(header.numbers) == 1 for header in files):
        notes.append(f"No file holds several images: --page {page} changes nothing.")
    patients = {header.patient for header in files} - {""}
    if not grouped and len(patients) > 1:
        groups = f"The groups are the PatientID of the DICOM files ({len(patients):,} patients)"
        notes += [f"{groups}, so that nobody stands in train and test.", PLAIN_PATIENTS]
    elif not grouped and patients and len(files) > 1:
        notes.append("All DICOM files bear one PatientID, which tells nobody apart: it is not taken for groups.")
    if more := sum((header.windows or 0) > 1 for header in files):
        notes.append(f"{counted(more, 'DICOM file')} with several windows; the first is used.")
    if none := sum(header.windows == 0 for header in files):
        shown = "the full range of their stored bits is shown, which may look flat"
        notes.append(f"{counted(none, 'DICOM file')} without a window: {shown}.")
    return notes
