"""MedMNIST: one ``.npz`` of its form, and ``medmnist:<name>``, the twelve 2D sets as their publishers have them.

The archive has arrays ``{train,val,test}_images`` and ``{train,val,test}_labels``. Images are uint8 or uint16
[n, H, W], [n, H, W, 1] or [n, H, W, 3]; labels whole numbers [n] or [n, 1] (-1: none), or [n, L] with 1, 0 and, where
they are floats, NaN for unknown. Not every split has to be there. A file that bears the name of a MedMNIST set gets the
published class names and task.

At opening only headers and labels are read. The images of a split are unpacked when the first of them is asked for:
into memory up to 1 GiB, beyond that into an unnamed temporary file that is mapped (the 224 px sets have up to 16 GB).

The file of ``medmnist:<name>[@28|64|128|224][@folder]`` is looked for in that folder, in ``$FEATURECACHE_DATA`` and in
the package's own ``~/.medmnist``; only where it is in none of them does the package (extra ``medmnist``) say where it
is to be had, and its MD5.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from featurecache.errors import SourceError, nearest
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset, ImageArrays, package
from featurecache.sources.fetching import SourceOptions, beside, data_folder, not_here
from featurecache.sources.labels import SPLIT_ORDER, labels_of_numbers, resolve_labels

SIZES = ("28", "64", "128", "224")  # pixels; a file without a number in its name has 28
FORM = "medmnist:<name>[@28|64|128|224][@folder]"
_IN_MEMORY = 1 << 30  # bytes of one array
_LABELS = 1 << 30  # bytes of the labels of one split
_DEFLATE = 1032  # bytes that one packed byte can give, at most


# -- the published sets


def open_medmnist(words: str, task: str | None) -> Dataset:
    """The set of ``words``, from a file on this machine. Raises NotFetched where there is none."""
    options, stem, folders = _parse(words)
    for folder in folders:
        if (file := folder / f"{stem}.npz").is_file():
            return replace(open_npz(str(file), task), name=stem, source={"data": str(options)})
    where = " and ".join(map(str, folders))
    raise not_here(f"{stem}.npz", where, options, f"--data {replace(options, folder='FOLDER')}")


def fetch_medmnist(words: str) -> None:
    """Download the file of ``words`` from where the package says. Raises SourceError."""
    options, stem, folders = _parse(words)
    info = package("medmnist.info", "medmnist", f"to fetch {options.name}").INFO.get(options.name, {})
    size = stem.removeprefix(options.name)
    if f"url{size}" not in info:
        lacks = f"has {options.name} at 28 px only" if info else f"does not know {options.name}"
        raise SourceError(f"the installed medmnist {lacks}: pip install --upgrade medmnist (3 or newer).")
    from torchvision.datasets.utils import download_url

    with beside(folders[0], stem) as draft:
        download_url(info[f"url{size}"], str(draft), f"{stem}.npz", info[f"MD5{size}"])


def _parse(words: str) -> tuple[SourceOptions, str, list[Path]]:
    """The set, the name of its file, and where that may lie; it is fetched into the first."""
    options = SourceOptions.parse("medmnist", words)
    name, size = options.name.lower(), options.version or "28"
    if name not in MEDMNIST or options.variant:
        raise SourceError(
            f'MedMNIST has no 2D set called "{name}".{nearest(name, MEDMNIST)} It has {", ".join(sorted(MEDMNIST))}.'
        )
    if size not in SIZES:
        raise SourceError(f'medmnist:{words}: "{size}" is no size; it is {", ".join(SIZES)} ({FORM}).')
    own = Path.home() / ".medmnist"
    folders = [Path(options.folder)] if options.folder else list(dict.fromkeys([data_folder(own), own]))
    return replace(options, name=name, version=size), name if size == "28" else f"{name}_{size}", folders


# -- the archive


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
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            needs = f"it needs {gib:.1f} GiB in {folder} (TMPDIR chooses another folder)"
            raise SourceError(f"{self.member} of {self.file} cannot be unpacked ({error}); {needs}.") from error


def open_npz(data: str, task: str | None) -> Dataset:
    """The dataset in the archive ``data`` (an absolute path)."""
    name = os.path.basename(data)
    arrays = _headers(data)
    splits = [split for split in SPLIT_ORDER if f"{split}_images" in arrays or f"{split}_labels" in arrays]
    if not splits:
        there = abbreviated(list(arrays)) or "(none)"
        raise SourceError(
            f"{name} has the arrays {there}; expected train_images, train_labels, the same of val and test."
        )
    columns = {split: _label_column(data, arrays, split) for split in splits}
    if len({column.shape[1:] for column in columns.values()}) > 1:
        shapes = ", ".join(f"{split}_labels {list(column.shape)}" for split, column in columns.items())
        raise SourceError(f"the labels of {name} differ in their form: {shapes}.")
    stem = name.rsplit(".", 1)[0]
    published = MEDMNIST.get(re.sub(r"_(28|64|128|224)$", "", stem.lower()))
    labels, classes = _labels(name, np.concatenate(list(columns.values())), published)
    parts = [_PackedImages(data, f"{split}_images.npy", arrays[f"{split}_images"]) for split in splits]
    return Dataset(
        name=stem,
        ids=[f"{name}:{split}:{row}" for split, column in columns.items() for row in range(len(column))],
        **resolve_labels(labels, classes, task or (published.task if published else None), name)._asdict(),
        splits=[split for split, column in columns.items() for _ in range(len(column))],
        images=ImageArrays(parts, (data,)),
        notes=tuple(f"{name} has no {split} images." for split in SPLIT_ORDER if split not in splits),
    )


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
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
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


def _label_column(file: str, arrays: dict[str, NpyHeader], split: str) -> np.ndarray:
    """Labels [n] or [n, L] of a split, having checked that its images are what they have to be."""
    name = os.path.basename(file)
    for kind, other in (("images", "labels"), ("labels", "images")):
        if f"{split}_{kind}" not in arrays:
            raise SourceError(f"{name} has {split}_{other} and no {split}_{kind}; expected both.")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    flat = len(images.shape) == 3 or images.shape[3:] in ((1,), (3,))
    if not flat or images.dtype not in (np.uint8, np.uint16):
        deep = " (volumes are not images: save slices)" if len(images.shape) == 4 else ""
        there = f"{images.dtype} {list(images.shape)}"
        raise SourceError(f"{split}_images of {name} is {there}; expected uint8 [n, H, W] or [n, H, W, 3]{deep}.")
    if not labels.shape or len(labels.shape) > 2 or images.shape[0] != labels.shape[0]:
        there = f"{images.shape[0]:,} {split}_images and {split}_labels of shape {list(labels.shape)}"
        raise SourceError(f"{name} has {there}; expected one row of labels for each image.")
    if labels.size > _LABELS:
        raise SourceError(f"{split}_labels of {name} declare {labels.size:,} bytes; expected at most {_LABELS:,}.")
    values = _array(file, f"{split}_labels.npy")
    return values[:, 0] if values.shape[1:] == (1,) else values


def _array(file: str, member: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return np.asarray(archive[member.removesuffix(".npy")])
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, zipfile.LargeZipFile, MemoryError) as error:
        raise SourceError(f"{member} of {file} is damaged ({error}); get the file again.") from error


def _labels(name: str, values: np.ndarray, published: MedMnistSet | None) -> tuple[np.ndarray, list[str]]:
    """Labels as a dataset has them, int64 [N] or float32 [N, L], and the names of the classes."""
    if values.ndim == 1 and values.dtype.kind == "f" and np.isnan(values).any():
        raise SourceError(f"the labels of {name} are not whole numbers ({values.dtype}); expected class numbers.")
    labels = labels_of_numbers(values, f"the labels of {name}")
    if published is None:
        return labels
    where = f"{name} bears the name of a MedMNIST set (rename the file if it is another): it"
    return labels_of_numbers(values, where, published.classes)


# -- what the publishers call the classes of the twelve sets, and what kind of task each is: medmnist/info.py of
# MedMNIST/MedMNIST (version 2.1.0), where the index of a name is its label; Yang et al. 2023, "MedMNIST v2", Scientific
# Data 10:41. RetinaMNIST's five grades of diabetic retinopathy have numbers for names.


class MedMnistSet(NamedTuple):
    """Task and class names of one set; index = label."""

    task: str
    classes: tuple[str, ...]


_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip
MEDMNIST: dict[str, MedMnistSet] = {
    "pathmnist": MedMnistSet("multiclass", (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium")),
    "chestmnist": MedMnistSet("multilabel", (
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia")),
    "dermamnist": MedMnistSet("multiclass", (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions")),
    "octmnist": MedMnistSet("multiclass", (
        "choroidal neovascularization", "diabetic macular edema", "drusen", "normal")),
    "pneumoniamnist": MedMnistSet("binary", ("normal", "pneumonia")),
    "retinamnist": MedMnistSet("ordinal", ("0", "1", "2", "3", "4")),
    "breastmnist": MedMnistSet("binary", ("malignant", "normal, benign")),
    "bloodmnist": MedMnistSet("multiclass", (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
        "platelet")),
    "tissuemnist": MedMnistSet("multiclass", (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb")),
    **{name: MedMnistSet("multiclass", _ORGANS) for name in ("organamnist", "organcmnist", "organsmnist")},
}  # fmt: skip
