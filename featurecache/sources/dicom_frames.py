"""DICOM files in a dataset: a file of several frames is several images, and whose they are is known.

``expand_frames`` takes a dataset of files (a folder, a table) and looks into the headers of those that are DICOM. The
images of a file of several frames are called ``chest/a.dcm#frame=0``, ``#frame=1``, … in their order; all have the
label and split of the file. A table may also list single frames by such names.

Groups. Where the source says none, the group of an image is the PatientID of its file: frames and files of one patient
must not stand in train and in test. That is the only thing of a patient that a cache gets to hold, in plain unless
``--hash-groups`` is given, and a note says so. Without a PatientID the frames of a file are a group of their own. One
PatientID in all files is what anonymising leaves behind and says nothing: it is not taken.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featurecache.errors import SourceError, UnreadableImage
from featurecache.images import dicom
from featurecache.images.headers import EncodedFrame, is_dicom
from featurecache.sources.base import Dataset, ImageFiles, as_unreadable, open_image_file, read_file

EXTENSIONS = (".dcm", ".dicom", ".dic")
PLAIN_PATIENTS = "Each PatientID is stored as it is; --hash-groups hides them."
_FRAME = re.compile(r"^(.+)#frame=(0|[1-9]\d{0,8})$", re.DOTALL)
_FRONT = 132  # bytes: preamble and magic
_REMEMBERED = 1 << 18  # headers, of about 300 bytes each
_last = threading.local()  # of each thread the file it read last: its frames are asked for one after the other


@dataclass(frozen=True)
class DicomFiles(ImageFiles):
    """``ImageFiles`` of which some ids name a frame of a file."""

    def path(self, row: int) -> str:
        return os.path.join(self.root, split_frame(self.ids[row])[0])

    def read(self, row: int) -> bytes | EncodedFrame:
        path, number = self.path(row), split_frame(self.ids[row])[1]
        if number is None:
            return read_file(path)
        stamp = _stamp(path)
        if stamp is None or getattr(_last, "stamp", None) != stamp:
            data = read_file(path)
            _last.stamp, _last.file = stamp, (data, hashlib.blake2b(data, digest_size=16))
        return EncodedFrame(_last.file[0], number, _last.file[1])


@dataclass(frozen=True)
class _FileHeader:
    """What the header of a file says; of one that cannot be read nothing, it is a named failure when it is."""

    frames: int = 1
    patient: str = ""
    windows: int | None = None  # how many to choose from; None where it is no matter (colour, a table, frames' own)


def split_frame(name: str) -> tuple[str, int | None]:
    """``a.dcm#frame=3`` → ``a.dcm``, 3."""
    match = _FRAME.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def may_be_dicom(name: str) -> bool:
    """Whether a file may be DICOM by its name: its ending, or none, or a UID."""
    ending = os.path.splitext(name)[1].lower()
    return ending in EXTENSIONS or ((not ending or ending[1:].isdigit()) and name.upper() != "DICOMDIR")


def is_dicom_file(path: str) -> bool:
    """Whether a file is DICOM by its content. One that cannot be opened is none."""
    try:
        with open_image_file(path) as (descriptor, _), as_unreadable(path):
            return is_dicom(os.read(descriptor, _FRONT))
    except UnreadableImage:
        return False


def images_in_file(name: str, data: bytes) -> list[tuple[str, bytes | EncodedFrame]]:
    """The images of one file, by name: itself, or its frames."""
    try:
        frames = dicom.read_header(data).frames if is_dicom(data) else 1
    except UnreadableImage:  # said when it is decoded
        frames = 1
    if frames == 1:
        return [(name, data)]
    hashed = hashlib.blake2b(data, digest_size=16)
    return [(f"{name}#frame={number}", EncodedFrame(data, number, hashed)) for number in range(frames)]


def expand_frames(dataset: Dataset) -> Dataset:
    """``dataset`` with a row for each frame, and groups. Raises SourceError where pydicom is missing."""
    if type(dataset.images) is not ImageFiles:
        return dataset
    root, names = dataset.images.root, dataset.images.ids
    file_of = {row: place for row, name in enumerate(names) if (place := _dicom_of(root, name)) is not None}
    if not file_of:
        return dataset
    if not dicom.installed():
        raise SourceError(f"{len(file_of):,} images of {dataset.source['data']} are DICOM. {dicom.MISSING}.")
    distinct = {file: os.path.join(root, file) for file, _ in file_of.values()}
    files = {file: _read_header(path, _stamp(path)) for file, path in distinct.items()}
    rows, marks = list[int](), list[str]()
    for row in range(len(names)):
        file, number = file_of.get(row, ("", 0))
        count = files[file].frames if number is None else 1
        rows += [row] * count
        marks += [f"#frame={k}" for k in range(count)] if count > 1 else [""]

    def taken(column: Any) -> Any:
        return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]

    ids = [name + mark for name, mark in zip(taken(dataset.ids), marks, strict=True)]
    groups = dataset.groups if dataset.groups is not None else _patients(dataset.ids, file_of, files)
    if groups is not None:  # what is a group of its own bears the id of its first image, by which it is hidden too
        first = dict(zip(reversed(taken(dataset.ids)), reversed(ids), strict=True))
        groups = [first.get(group, group) for group in taken(groups)]
    return replace(
        dataset,
        ids=ids,
        labels=taken(dataset.labels),
        splits=taken(dataset.splits),
        groups=groups,
        meta={name: taken(column) for name, column in dataset.meta.items()},
        images=DicomFiles(root, [name + mark for name, mark in zip(taken(names), marks, strict=True)]),
        notes=(*dataset.notes, *_notes(dataset.groups is not None, list(files.values()))),
    )


def _dicom_of(root: str, name: str) -> tuple[str, int | None] | None:
    """The DICOM file that a name stands for, and its frame if it names one; a file of that very name comes first."""
    file, number = split_frame(name)
    if number is not None and not os.path.lexists(os.path.join(root, name)):
        return file, number
    ending, plain = os.path.splitext(name)[1].lower(), os.path.basename(name)
    dicom_file = ending in EXTENSIONS or (may_be_dicom(plain) and is_dicom_file(os.path.join(root, name)))
    return (name, None) if dicom_file else None


@functools.lru_cache(_REMEMBERED)
def _read_header(path: str, stamp: tuple[Any, ...] | None) -> _FileHeader:
    """Of the file of this `_stamp`. In the memory of the process alone: a PatientID is to stand on no disk."""
    try:
        with open_image_file(path) as (descriptor, _), os.fdopen(os.dup(descriptor), "rb") as file:
            if not is_dicom(file.read(_FRONT)):
                return _FileHeader()
            file.seek(0)
            header = dicom.read_header(file, ("PatientID",))
    except UnreadableImage:
        return _FileHeader()
    try:
        patient = str(header.settings.get("PatientID") or "").strip().replace("\0", "")
        return _FileHeader(header.frames, patient, _windows(header.settings))
    except Exception:  # a value that pydicom cannot make text of
        return _FileHeader(header.frames)


def _windows(settings: Any) -> int | None:
    grey = str(settings.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
    own = "PerFrameFunctionalGroupsSequence" in settings or "SharedFunctionalGroupsSequence" in settings
    value = settings.get("WindowCenter")
    if not grey or settings.get("VOILUTSequence") or (own and value in (None, "")):
        return None
    return 0 if value in (None, "") else 1 if isinstance(value, int | float | str) else len(value)


def _patients(
    ids: list[str], file_of: dict[int, tuple[str, int | None]], files: dict[str, _FileHeader]
) -> list[str] | None:
    """The group of each row before frames are told apart: a patient, else the first id of its file."""
    patients = {header.patient for header in files.values()} - {""}
    told = patients if len(patients) > 1 else set()
    if not told and not any(header.frames > 1 for header in files.values()):
        return None
    firsts: dict[str, str] = {}
    groups = []
    for row, name in enumerate(ids):
        file = file_of[row][0] if row in file_of else name
        patient = files[file].patient if row in file_of else ""
        groups.append(patient if patient in told else firsts.setdefault(file, name))
    return groups


def _stamp(path: str) -> tuple[Any, ...] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _notes(grouped: bool, files: list[_FileHeader]) -> list[str]:
    notes = []
    if several := [header.frames for header in files if header.frames > 1]:
        count = f"{len(several):,} DICOM files hold {sum(several):,} frames"
        notes.append(f"{count}, each an image (#frame=0, #frame=1, …).")
    patients = {header.patient for header in files} - {""}
    if not grouped and len(patients) > 1:
        groups = f"The groups are the PatientID of the DICOM files ({len(patients):,} patients)"
        notes += [f"{groups}, so that nobody stands in train and test.", PLAIN_PATIENTS]
    elif not grouped and patients and len(files) > 1:
        notes.append("All DICOM files bear one PatientID, which tells nobody apart: it is not taken for groups.")
    if more := sum((header.windows or 0) > 1 for header in files):
        notes.append(f"{more:,} DICOM files hold several windows; the first is used.")
    if none := sum(header.windows == 0 for header in files):
        shown = "the full range of their stored bits is shown, which may look flat"
        notes.append(f"{none:,} DICOM files have no window: {shown}.")
    return notes
