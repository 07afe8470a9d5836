""".npz sets and medmnist:.

Images in one ``.npz`` of MedMNIST's form: arrays ``{train,val,test}_images`` and ``{train,val,test}_labels``.

Images are uint8 or uint16 [n, H, W], [n, H, W, 1] or [n, H, W, 3]; labels whole numbers [n] or [n, 1] (-1: none), or
[n, L] with 1, 0 and, where they are floats, NaN for unknown. Not every split has to be there. A file that bears the
name of a MedMNIST set gets the published class names and task.

At opening only headers and labels are read. The images of a split are unpacked when the first of them is asked for:
into memory up to 1 GiB, beyond that into an unnamed temporary file that is mapped (the 224 px sets have up to 16 GB).

``medmnist:<name>[@28|64|128|224][@folder]``: the twelve 2D sets of MedMNIST v2, as their publishers have them.

The file is looked for in the folder that was given, in ``$FEATURECACHE_DATA`` and in the package's own ``~/.medmnist``;
only where it is in none of them does the package (extra ``medmnist``) say where it is to be had, and its MD5.

What the publishers of MedMNIST call the classes of its twelve 2D sets, and what kind of task each is.

Source: medmnist/info.py of MedMNIST/MedMNIST (version 2.1.0), where the index of a name is its label; Yang et al. 2023,
"MedMNIST v2", Scientific Data 10:41. RetinaMNIST's five grades of diabetic retinopathy have numbers for names.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
import zipfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, nearest
from featurecache.sources.base import (
    Dataset,
    ImageArrays,
    abbreviated,
    class_labels,
    resolve_task,
    safe_name,
    source_record,
)
from featurecache.sources.fetching import VARIABLE, at_place, beside, fetching, not_here, package

_SPLITS = ("train", "val", "test")
_IN_MEMORY = 1 << 30  # bytes of one array
_LABELS = 1 << 30  # bytes of the labels of one split
_DEFLATE = 1032  # bytes that one packed byte can give, at most


@dataclass(frozen=True)
class _Header:
    """What an array of the archive says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool
    offset: int  # of the data in the unpacked member

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass
class _Packed:
    """The images of one split, unpacked at the first use."""

    file: str
    member: str
    header: _Header
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _array: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.header.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        if self._array is None:
            with self._lock:
                if self._array is None:
                    self._array = self._unpack()
        image: np.ndarray = self._array[row]
        return image

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
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise SourceError(
                f"{self.member} of {self.file} cannot be unpacked ({error}); it needs {gib:.1f} GiB in {folder} "
                "(TMPDIR chooses another folder)."
            ) from error


def open_npz(data: str, asked: str | None) -> Dataset:
    """The dataset in the archive ``data`` (an absolute path)."""
    name = os.path.basename(data)
    arrays = _headers(data)
    splits = [split for split in _SPLITS if f"{split}_images" in arrays or f"{split}_labels" in arrays]
    if not splits:
        raise SourceError(
            f"{name} has the arrays {abbreviated(list(arrays)) or '(none)'}; expected train_images, train_labels and "
            "the same of val and test."
        )
    labels = [_labels_of(data, arrays, split) for split in splits]
    if len({part.shape[1:] for part in labels}) > 1:
        shapes = ", ".join(f"{split}_labels {list(part.shape)}" for split, part in zip(splits, labels, strict=True))
        raise SourceError(f"the labels of {name} differ in their form: {shapes}.")
    known = published(name.rsplit(".", 1)[0])
    values, classes = _classes(name, np.concatenate(labels), known)
    task = resolve_task(asked or (known.task if known else None), classes, values.ndim == 2, name)
    if task == "unlabelled":
        values, classes = np.full(len(values), -1, np.int64), []
    parts = [_Packed(data, f"{split}_images.npy", arrays[f"{split}_images"]) for split in splits]
    return Dataset(
        name=safe_name(name.rsplit(".", 1)[0]),
        source=source_record("npz", data, None, asked),
        ids=[f"{name}:{split}:{row}" for split, part in zip(splits, parts, strict=True) for row in range(len(part))],
        labels=values,
        splits=[split for split, part in zip(splits, parts, strict=True) for _ in range(len(part))],
        groups=None,
        meta={},
        classes=classes,
        task=task,
        images=ImageArrays(parts, data),
        notes=tuple(f"{name} has no {split} images." for split in _SPLITS if split not in splits),
    )


def _headers(file: str) -> dict[str, _Header]:
    """Name -> header of every array in the archive. An array of objects is refused by its header, never unpickled."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as packed:
                        header = _header(packed)
                    if not header.dtype.hasobject:
                        _refuse_bombs(archive.getinfo(member), header)
                    found[member.removesuffix(".npy")] = header
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{file} cannot be read as an .npz ({error}).") from error
    pickled = [name for name, header in found.items() if header.dtype.hasobject]
    if pickled:
        raise SourceError(
            f"{os.path.basename(file)} holds pickled Python objects ({abbreviated(pickled)}), which could run code and "
            "are never loaded. Save plain arrays: np.savez(file, train_images=array of uint8, ...)."
        )
    return found


def _header(packed: Any) -> _Header:
    version = np.lib.format.read_magic(packed)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(packed)
    return _Header(shape, dtype, by_columns, packed.tell())


def _refuse_bombs(member: zipfile.ZipInfo, header: _Header) -> None:
    """An array that is not the size of its member, or larger than what it was packed into could ever give."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in a way that numpy does not write")
    if header.offset + header.size != member.file_size:
        raise ValueError(
            f"{member.filename} declares {header.offset + header.size:,} bytes and holds {member.file_size:,}"
        )
    if member.file_size > _DEFLATE * member.compress_size + 4096:
        raise ValueError(f"{member.filename} declares {member.file_size:,} bytes, packed in {member.compress_size:,}")


def _labels_of(file: str, arrays: dict[str, _Header], split: str) -> np.ndarray:
    """Labels [n] or [n, L] of a split, having checked that its images are what they have to be."""
    name = os.path.basename(file)
    for kind, other in (("images", "labels"), ("labels", "images")):
        if f"{split}_{kind}" not in arrays:
            raise SourceError(f"{name} has {split}_{other} and no {split}_{kind}; expected both.")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    flat = len(images.shape) == 3 or (len(images.shape) == 4 and images.shape[3] in (1, 3))
    if not flat or images.dtype not in (np.uint8, np.uint16):
        deep = " (volumes are not images: save slices)" if len(images.shape) == 4 else ""
        raise SourceError(
            f"{split}_images of {name} is {images.dtype} {list(images.shape)}; expected uint8 [n, H, W] or "
            f"[n, H, W, 3]{deep}."
        )
    if not labels.shape or len(labels.shape) > 2 or images.shape[0] != labels.shape[0]:
        raise SourceError(
            f"{name} has {images.shape[0]:,} {split}_images and {split}_labels of shape {list(labels.shape)}; expected "
            "one row of labels for each image."
        )
    if labels.size > _LABELS:
        raise SourceError(f"{split}_labels of {name} declare {labels.size:,} bytes; expected at most {_LABELS:,}.")
    values = _array(file, f"{split}_labels.npy")
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _array(file: str, member: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as archive:
            array: np.ndarray = archive[member.removesuffix(".npy")]
            return array
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, zipfile.LargeZipFile, MemoryError) as error:
        raise SourceError(f"{member} of {file} is damaged ({error}); get the file again.") from error


def _classes(name: str, values: np.ndarray, known: Published | None) -> tuple[np.ndarray, list[str]]:
    """Labels as a dataset has them, int64 [N] or float32 [N, L], and the names of the classes."""
    if values.dtype.kind not in "iufb":
        raise SourceError(f"the labels of {name} are {values.dtype}; expected whole numbers.")
    if values.ndim == 2:
        wrong = (values != 0) & (values != 1) & (values == values)  # NaN, unknown, is not equal to itself
        if wrong.any():
            raise SourceError(f"the labels of {name} hold {values[wrong][0]}; expected 1, 0 or, where unknown, NaN.")
        classes = list(known.classes) if known else [str(place) for place in range(values.shape[1])]
        _refuse_other(name, known, values.shape[1] == len(classes), f"{values.shape[1]} labels a row")
        return values.astype(np.float32), classes
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise SourceError(f"the labels of {name} are not whole numbers ({values.dtype}); expected class numbers.")
    numbers = values.astype(np.int64)
    if (numbers < -1).any():
        raise SourceError(f"the labels of {name} hold {numbers.min()}; expected class numbers from 0 (-1: none).")
    if known:
        _refuse_other(name, known, numbers.max(initial=-1) < len(known.classes), f"the label {numbers.max(initial=-1)}")
        return numbers, list(known.classes)
    classes = [str(number) for number in np.unique(numbers[numbers >= 0])]
    return class_labels([str(number) if number >= 0 else "" for number in numbers], classes), classes


def _refuse_other(name: str, known: Published | None, fits: bool, found: str) -> None:
    if known and not fits:
        raise SourceError(
            f"{name} bears the name of a MedMNIST set of {len(known.classes)} classes and has {found}: rename the file."
        )


SIZES = ("28", "64", "128", "224")  # pixels; a file without a number in its name has 28
FORM = "medmnist:<name>[@28|64|128|224][@folder]"


@dataclass(frozen=True)
class _Asked:
    name: str
    size: str
    folder: str | None

    @property
    def stem(self) -> str:
        return self.name if self.size == "28" else f"{self.name}_{self.size}"

    @property
    def words(self) -> str:
        return f"medmnist:{self.name}@{self.size}" + (f"@{self.folder}" if self.folder else "")

    @property
    def places(self) -> list[Path]:
        """Folders in which the file may lie; it is fetched into the first."""
        if self.folder:
            return [Path(self.folder)]
        given = os.environ.get(VARIABLE)
        return [*([Path(given).expanduser().absolute()] if given else []), Path.home() / ".medmnist"]


def open_medmnist(words: str, asked_task: str | None) -> Dataset:
    """The set of ``words``, from a file on this machine. Raises NotFetched where there is none."""
    asked = _parse(words)
    for folder in asked.places:
        file = folder / f"{asked.stem}.npz"
        if file.is_file():
            record = source_record("medmnist", asked.words, None, asked_task)
            return replace(open_npz(str(file), asked_task), name=safe_name(asked.stem), source=record)
    raise _absent(asked)


def fetch_medmnist(words: str) -> None:
    """Download the file of ``words`` from where the package says. Raises SourceError."""
    asked = _parse(words)
    infos = package("medmnist.info", "medmnist", f"to fetch {asked.name}").INFO
    if asked.name not in infos:
        raise SourceError(f"the installed medmnist does not know {asked.name}: pip install --upgrade medmnist.")
    info, size = infos[asked.name], "" if asked.size == "28" else f"_{asked.size}"
    if f"url{size}" not in info:
        raise SourceError(
            f"the installed medmnist has {asked.name} at 28 px only: pip install --upgrade medmnist (3 or newer)."
        )
    from torchvision.datasets.utils import download_url

    with fetching(partial(_absent, asked)), beside(asked.places[0], asked.stem) as draft:
        download_url(info[f"url{size}"], str(draft), f"{asked.stem}.npz", info[f"MD5{size}"])


def _parse(words: str) -> _Asked:
    (name, *sizes), folder = at_place(words)
    name = name.lower()
    if name not in MEDMNIST:
        raise SourceError(
            f'MedMNIST has no 2D set called "{name}".{nearest(name, MEDMNIST)} It has {", ".join(sorted(MEDMNIST))}.'
        )
    if len(sizes) > 1 or (sizes and sizes[0] not in SIZES):
        raise SourceError(f'medmnist:{words}: "{"@".join(sizes)}" is no size; it is {", ".join(SIZES)} ({FORM}).')
    return _Asked(name, sizes[0] if sizes else "28", folder)


def _absent(asked: _Asked, why: str = "") -> NotFetched:
    places = " and ".join(map(str, asked.places))
    return not_here(f"{asked.stem}.npz", places, asked.words, f"--data medmnist:{asked.name}@{asked.size}@FOLDER", why)


@dataclass(frozen=True)
class Published:
    """Task and class names of one set; index = label."""

    task: str
    classes: tuple[str, ...]


_ORGANS = Published(
    "multiclass",
    ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
     "pancreas", "spleen"),
)  # fmt: skip

MEDMNIST: dict[str, Published] = {
    "pathmnist": Published(
        "multiclass",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
    "chestmnist": Published(
        "multilabel",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
         "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
    ),
    "dermamnist": Published(
        "multiclass",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
         "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
    ),
    "octmnist": Published(
        "multiclass", ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
    ),
    "pneumoniamnist": Published("binary", ("normal", "pneumonia")),
    "retinamnist": Published("ordinal", ("0", "1", "2", "3", "4")),
    "breastmnist": Published("binary", ("malignant", "normal, benign")),
    "bloodmnist": Published(
        "multiclass",
        ("basophil", "eosinophil", "erythroblast",
         "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
         "platelet"),
    ),
    "tissuemnist": Published(
        "multiclass",
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
         "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
         "Thick Ascending Limb"),
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip


def published(stem: str) -> Published | None:
    """The record of a file called ``stem``: the name of a set, alone or with its size (``pneumoniamnist_224``)."""
    return MEDMNIST.get(re.sub(r"_(28|64|128|224)$", "", stem.lower()))
