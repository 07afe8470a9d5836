"""WebDataset: images in tar files, a sample a few files of one name, read in place by offset and never unpacked.

    chest-{000..012}.tar    or chest-*.tar, one .tar, or a folder of them (also below train/, val/, test/)

Files of one tar that have the same name up to the first dot of their last part are one sample, and that name is its
key: ``p1/0001.jpg``, ``p1/0001.cls``, ``p1/0001.json``; a UID, as DICOM has them, is a key whole (``1.2.840.113.dcm``).
What stands behind the dot tells what a file is:

- an image by its ending (where a sample has several: ``--column path=jpg`` says which); of DICOM the first frame, or
  what ``--page`` says;
- ``cls``: the class, a number or a name; numbers count in ``classes.txt`` beside the tars, where there is one;
- ``json``: fields that serve as the columns of a table do (label, split, group by their names or by ``--column``, all
  further ones are kept), values that are lists or objects left out; ``txt`` only where ``--column label=txt`` asks.

Without a split in the fields the names of the tars tell it (``train-000.tar``, ``val/000.tar``). The id of an image is
``chest-003.tar:p1/0001``.

At opening the headers are walked and the small texts read; of an image its offset and size are kept. Nothing is
extracted, so no name can lead anywhere; links and devices are left out and counted. What headers claim is checked: a
tar that is cut off, compressed, or goes on behind its end is refused, since what is behind that place would be missing.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from featurecache.errors import Reading, SeveralReadings, SourceError, UnreadableImage
from featurecache.formatting import abbreviated, counted
from featurecache.images.headers import EncodedFrame
from featurecache.sources.annotations import Table, annotations_of_text, roles_of_table
from featurecache.sources.base import Dataset, ImageFiles, as_unreadable, open_image_file, read_text
from featurecache.sources.dicom_frames import frame_of
from featurecache.sources.folders import EXTENSIONS, is_image, kinds_text, list_folder
from featurecache.sources.label_cells import LabelOptions
from featurecache.sources.labels import resolve_labels
from featurecache.sources.vocabulary import SPLITS, split_names_of, words_of

CLASSES = "classes.txt"
TEXTS = ("cls", "json", "txt")
LONGEST = 1 << 20  # bytes of a text, and of a header with a long name
_TAIL = 1 << 24  # bytes behind the end of a tar that are looked at
_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"BZh")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_PATTERN = re.compile(r"[*?\[]|\{[^{}]*(,|\.\.)[^{}]*\}")
_UID = re.compile(r"([0-2](?:\.\d+){3,})(\.)([^\d.].*)")  # a name of DICOM; its dots divide nothing
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST = 100_000  # tars of one pattern


def is_webdataset(path: str) -> bool:
    """Whether ``path`` names tars: one, a pattern, or a folder of tars and no images, which may lie in folders that are
    all named for splits."""
    if _is_tar(path) and not os.path.isdir(path):
        return os.path.lexists(path) or is_pattern(path)
    if set(folders := list_folder(path)[1]) - split_names_of(folders).keys():
        return False
    names = _files_below(path)
    return not any(map(is_image, names)) and any(map(_is_tar, names))


def is_pattern(path: str) -> bool:
    """Whether ``path``, where no file of that name is, stands for several tars."""
    return bool(_PATTERN.search(path)) and _is_tar(path)


def open_webdataset(data: str, columns: dict[str, str] | None, task: str | None, **how: str) -> Dataset:
    """The dataset in the tars that ``data`` (an absolute path) names; ``how``: see `LabelOptions`."""
    root, tars = _tars(data)
    index = TarIndex()
    for number, tar in enumerate(tars):
        _walk(root, tar, number, index)
    fields = dict(columns or {})
    image = fields.pop("path", None)
    samples = [(sample, kind) for sample in index.samples.values() if (kind := _image_of(sample, image)) is not None]
    if not samples:
        kinds = Counter(f".{kind}" for sample in index.samples.values() for kind in sample.files) + index.ignored
        endings = f"endings like {abbreviated(EXTENSIONS, 4)}"
        expected = f"a .{image}, as --column path={image} says" if image else endings
        raise SourceError(f"no images in {data}: found {kinds_text(kinds) or 'nothing'}, expected {expected}.")
    table, notes = _texts(root, tars, [sample for sample, _ in samples], fields)
    if "cls" in table.columns:
        fields.setdefault("label", "cls")
    ids = [sample.id for sample, _ in samples]
    roles = roles_of_table(table, {**fields, "path": ""})
    rows = annotations_of_text(table, roles, ids, LabelOptions(task, **how), _class_list(os.path.join(root, CLASSES)))
    places = np.array([(sample.tar, *sample.files[kind]) for sample, kind in samples], np.int64)
    return Dataset(
        name=_name(data),
        source={"uncertain": rows.uncertain},
        ids=ids,
        **resolve_labels(rows.labels, rows.classes, task, table.name)._asdict(),
        splits=rows.splits if any(rows.splits) else _splits(tars, places[:, 0].tolist()),
        groups=rows.groups,
        meta=rows.meta,
        understood=rows.remarks,
        images=TarImages(root, ids, tars, index.stamps, places),
        notes=(*notes, *rows.notes, *_notes(index, len(index.samples) - len(samples), bool(rows.classes))),
    )


def _is_tar(name: str) -> bool:
    """Also one that is compressed: it is refused, where leaving it out would lose its images."""
    return name.lower().endswith(_TARS)


def _files_below(folder: str) -> list[str]:
    files, folders = list_folder(folder)
    return files + [f"{inner}/{name}" for inner in folders for name in list_folder(os.path.join(folder, inner))[0]]


def _tars(data: str) -> tuple[str, list[str]]:
    """The folder they are named from, and the tars, sorted."""
    if os.path.isdir(data):
        return data, sorted(filter(_is_tar, _files_below(data)))
    if os.path.lexists(data):
        return os.path.dirname(data), [os.path.basename(data)]
    root = os.path.dirname(data[: _PATTERN.search(data).start()])  # type: ignore[union-attr]
    paths = []
    for name in _expanded(data):
        there = sorted(glob.glob(name)) or [name]
        if missing := [path for path in there if not os.path.exists(path)]:
            raise SourceError(f"there is no {missing[0]}, which {data} stands for.")
        paths += there
    return root, sorted(os.path.relpath(path, root) for path in dict.fromkeys(paths))


def _expanded(pattern: str) -> list[str]:
    """``{000..012}`` counts with its zeros, ``{a,b}`` lists; all combinations."""
    parts: list[list[str]] = []
    count = 1
    for place, text in enumerate(_BRACES.split(pattern)):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", text) if place % 2 else None
        numbers = range(int(bounds[1]), int(bounds[2]) + 1) if bounds else range(0)
        words = text.split(",") if place % 2 and "," in text else [f"{{{text}}}" if place % 2 else text]
        count *= max(numbers.stop - numbers.start, 0) if bounds else len(words)
        if not 0 < count <= _MOST:
            expected = f"expected 1 to {_MOST:,}, as in chest-{{000..012}}.tar"
            raise SourceError(f"{pattern} stands for {count:,} tars; {expected}.")
        parts.append([f"{number:0{len(bounds[1])}d}" for number in numbers] if bounds else words)
    return ["".join(words) for words in itertools.product(*parts)]


def _name(data: str) -> str:
    """What a view is called: the name without braces, stars and numbers at its end."""
    name = os.path.basename(data)
    for ending in _TARS:
        name = name.removesuffix(ending)
    return re.sub(r"[-_.]*\d*(\{[^{}]*\}|[*?]|\[[^\]]*\])+", "", name) or os.path.basename(os.path.dirname(data))


def _image_of(sample: TarSample, requested: str | None) -> str | None:
    """What stands behind the dot of the sample's image; None where it has none."""
    kinds = [kind for kind in sample.files if is_image(f"{sample.id}.{kind}")]
    if requested is not None:
        return requested if requested in kinds else None
    if len(kinds) > 1:
        raise SeveralReadings(
            f"{sample.id} has several images ({', '.join(kinds)}); --column path={kinds[0]} says which.",
            [Reading(f"the images are the .{kind}", {"columns": {"path": kind}}) for kind in kinds],
        )
    return kinds[0] if kinds else None


@dataclass(frozen=True)
class TarImages(ImageFiles):
    """Images in tars: ``ids`` are ``<tar>:<key>``."""

    tars: list[str] = field(repr=False)  # relative to ``root``
    stamps: list[tuple[int, int | None]] = field(repr=False)  # size and time of change of each tar, as it was indexed
    places: np.ndarray = field(repr=False)  # int64 [N, 3]: of each its tar, offset and size in bytes
    frames: list[int | None] | None = field(default=None, repr=False)  # of each its frame or page; None: it is whole
    archived: ClassVar[bool] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.root != state["root"][0]:  # in the mirror of another machine, whose times are its own
            vars(self)["stamps"] = [(size, None) for size, _ in self.stamps]

    def at(self, rows: np.ndarray) -> TarImages:
        frames = None if self.frames is None else [self.frames[row] for row in rows.tolist()]
        return replace(self, ids=[self.ids[row] for row in rows.tolist()], places=self.places[rows], frames=frames)

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.tars[self.places[row, 0]])

    def read(self, row: int) -> bytes | EncodedFrame:
        frame = None if self.frames is None else self.frames[row]
        if frame is None:
            return self._read(row)
        stamp = (self.root, *self.places[row].tolist(), self.stamps[self.places[row, 0]])
        return frame_of(stamp, frame, lambda: self._read(row))

    def _read(self, row: int) -> bytes:
        number, offset, size = self.places[row].tolist()
        with open_image_file(self.path(row)) as (descriptor, status):
            length, changed = self.stamps[number]
            if status.st_size != length or changed not in (None, status.st_mtime_ns):
                raise UnreadableImage(f"{self.tars[number]} has changed since it was opened; run the command again")
            with as_unreadable(self.path(row)):
                return _read_at(descriptor, offset, size)


@dataclass
class TarSample:
    id: str
    tar: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # what stands behind the dot → offset, size


@dataclass
class TarIndex:
    """What the headers of the tars have told."""

    samples: dict[str, TarSample] = field(default_factory=dict)  # by id
    stamps: list[tuple[int, int | None]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)  # by kind


class _Headers(io.FileIO):
    """A tar whose headers are read and nothing larger: a name may declare gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header of {size or 0:,} bytes")
        return super().read(size) or b""


def _walk(root: str, tar: str, number: int, index: TarIndex) -> None:
    path = os.path.join(root, tar)
    try:
        with open_image_file(path) as (descriptor, status):
            index.stamps.append((status.st_size, status.st_mtime_ns))
            with _Headers(os.dup(descriptor), "rb") as file:
                for member in _members(file, path, status.st_size):
                    _add(member, tar, number, index)
    except SourceError:
        raise
    except UnreadableImage as error:
        raise SourceError(f"{path} cannot be opened: {error}.") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as a tar ({error}).") from error


def _members(file: _Headers, path: str, size: int) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar up to its end, which has to be one."""
    if file.read(_BLOCK).startswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed, and images are read in place: unpack it to a .tar first (gunzip).")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        before = -1
        while (member := archive.next()) is not None:
            if archive.offset <= before or member.offset_data + max(member.size, 0) > size or member.size < 0:
                raise SourceError(f"{path} is cut off or damaged: {member.name!r} goes beyond its {size:,} bytes.")
            before = archive.offset
            yield member
            archive.members.clear()  # type: ignore[attr-defined]
        end = int(archive.offset)
    file.seek(end)
    if len(block := file.read(_BLOCK)) < _BLOCK:
        raise SourceError(f"{path} is cut off: it has no end mark after {end:,} bytes. Get it again.")
    for _ in range(_TAIL // _BLOCK):
        if block.strip(b"\0"):
            what = "what is no entry of this tar (damaged, or one tar behind another)"
            way = "Get it again, or give each as a file of its own"
            raise SourceError(f"{path} goes on behind byte {end:,} with {what}. {way}.")
        if not (block := file.read(_BLOCK)):
            return


def _add(member: tarfile.TarInfo, tar: str, number: int, index: TarIndex) -> None:
    name = re.sub(r"^(\./)+", "", member.name)
    folder, slash, last = name.rpartition("/")
    if member.isdir() or last.startswith(".") or name.startswith("__MACOSX/"):
        return
    stem, dot, kind = uid.groups() if (uid := _UID.fullmatch(last)) else last.partition(".")
    key, kind = folder + slash + stem, kind.lower()
    if not member.isreg() or member.issparse():
        index.ignored["links or devices"] += 1
    elif kind not in TEXTS and not is_image(last):
        index.ignored[dot + kind if kind else ""] += 1
    else:
        files = index.samples.setdefault(f"{tar}:{key}", TarSample(f"{tar}:{key}", number)).files
        if kind in files:
            raise SourceError(f"{tar} holds {key}.{kind} twice; expected a key for each sample.")
        files[kind] = member.offset_data, member.size


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    parts, end = list[bytes](), offset + size
    while offset < end:
        parts.append(os.pread(descriptor, min(end - offset, 1 << 30), offset))
        offset += len(parts[-1])
        if not parts[-1]:
            raise UnreadableImage("its tar ends before it does")
    return b"".join(parts)


# -- what is said of them


def _texts(root: str, tars: list[str], samples: list[TarSample], columns: dict[str, str]) -> tuple[Table, list[str]]:
    """The texts of samples as columns, one row a sample; and what to say about them."""
    kinds = [kind for kind in TEXTS if kind != "txt" or "txt" in columns.values()]
    cells: dict[str, list[str]] = {}
    nested: set[str] = set()
    for number, group in itertools.groupby(enumerate(samples), key=lambda pair: pair[1].tar):
        with open_image_file(os.path.join(root, tars[number])) as (descriptor, _):
            for row, sample in group:
                for kind in filter(sample.files.__contains__, kinds):
                    for name, value in _fields(descriptor, sample, kind, nested):
                        column = cells.setdefault(name, [""] * len(samples))
                        column[row] = sys.intern(value)  # each value once in memory
    notes = [f"Lists and objects in the JSON are left out: {abbreviated(sorted(nested))}."] if nested else []
    return Table(root, cells, [sample.id for sample in samples]), notes


def _fields(descriptor: int, sample: TarSample, kind: str, nested: set[str]) -> Iterator[tuple[str, str]]:
    """(column, value) of one text."""
    offset, size = sample.files[kind]
    if size > LONGEST:
        raise SourceError(f"{sample.id}.{kind} has {size:,} bytes; expected at most {LONGEST:,}.")
    try:
        text = _read_at(descriptor, offset, size).decode("utf-8-sig")
        record = json.loads(text) if kind == "json" else {kind: text.strip()}
    except (ValueError, RecursionError, UnreadableImage) as error:
        what = "JSON" if kind == "json" else "UTF-8 text"
        raise SourceError(f"{sample.id}.{kind} is no {what} ({str(error).splitlines()[0]}).") from error
    if not isinstance(record, dict):
        raise SourceError(f"{sample.id}.json holds {type(record).__name__}; expected an object with fields.")
    for name, value in record.items():
        if isinstance(value, dict | list):
            nested.add(name)
        elif kind != "json" or name not in sample.files:  # beside a .cls a field called cls is not asked
            yield name, "" if value is None else str(value).strip()


def _class_list(file: str) -> list[str]:
    """The lines of ``classes.txt``; nothing where there is none."""
    if not os.path.exists(file):
        return []
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if "" in names or len(set(names)) < len(names):
        raise SourceError(f"{file} has an empty line or a name twice; expected the name of a class on each line.")
    return names


def _splits(tars: list[str], numbers: list[int]) -> list[str]:
    """The split that the name of each image's tar bears; none bears one, or all do."""
    words = {tar: {SPLITS[word] for word in words_of(tar) if word in SPLITS} for tar in tars}
    named, without = [tar for tar in tars if words[tar]], [tar for tar in tars if not words[tar]]
    if several := [tar for tar in tars if len(words[tar]) > 1]:
        raise SourceError(f"the name {several[0]} stands for two splits; expected one of train, val, test.")
    if named and without:
        raise SourceError(f"{named[0]} is named for a split and {without[0]} for none; name all of them, or none.")
    return ["".join(words[tars[number]]) for number in numbers]


def _notes(index: TarIndex, without: int, labelled: bool) -> list[str]:
    notes = [f"{counted(without, 'sample')} without an image left out."] if without else []
    if many := index.ignored.total():
        kinds = kinds_text(index.ignored)
        notes.append(f"Ignored in the tars, neither image nor label: {many:,} ({kinds}).")
    if not labelled:
        notes.append("No labels were found: expected .cls files, or a field of the .json that --column label= names.")
    return notes
