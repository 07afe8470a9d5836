"""The labelled sets of torchvision.datasets: how each is asked for its splits, where its images and labels are.

Images are read as they lie on the disk, never through ``__getitem__``, which decodes: a set has paths, or arrays.

To add one: a line in ``SETS``. Sets of videos, pairs, boxes, masks or flows are not in it: they have no label an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """One split as it lies on the disk. ``labels``: int64 [n] (-1: none), or float32 [n, L]."""

    images: Any  # paths, or an array [n, H, W(, 3)] or what is indexed like one
    labels: np.ndarray
    classes: list[str]
    groups: list[str] | None = None
    files: tuple[str, ...] = ()  # those that hold the images, where it is worth remembering that they are the same


@dataclass(frozen=True)
class TorchvisionSet:
    """How torchvision's class is asked for each split, and where in it the images and labels are. ``splits``: ours
    (empty: none) → its arguments. ``variants``: word → arguments; the first is the default, unless it is empty: then
    one has to be named."""

    splits: dict[str, dict[str, Any]]
    read: Callable[[Any], Split]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    fetches: bool = True  # False: torchvision says that it has to be got by hand
    note: str = ""


def _files(paths: str, labels: str) -> Callable[[Any], Split]:
    """Attributes that hold the paths, and the labels as numbers."""
    return lambda found: Split(
        [str(path) for path in getattr(found, paths)], _numbers(getattr(found, labels)), _names(found.classes)
    )


def _samples(attribute: str = "samples", classes: Sequence[str] = ()) -> Callable[[Any], Split]:
    """An attribute that holds pairs of a path and a number."""
    return lambda found: Split(
        [path for path, _ in getattr(found, attribute)],
        _numbers([label for _, label in getattr(found, attribute)]),
        list(classes) or _names(found.classes),
    )


def _arrays(labels: str = "targets", classes: Sequence[str] = (), planes: bool = False) -> Callable[[Any], Split]:
    """Pixels in ``data`` ([n, H, W] or, as ``planes``, [n, 3, H, W]) and numbers in another attribute."""

    def read(found: Any) -> Split:
        pixels = np.asarray(found.data)
        numbers = np.asarray(getattr(found, labels))
        pixels = pixels.transpose(0, 2, 3, 1) if planes else pixels
        return Split(pixels, _numbers(numbers if numbers.ndim == 1 else numbers[:, 0]), list(classes) or found.classes)

    return read


def _numbers(values: Any) -> np.ndarray:
    """int64 [n]; None, as in a test set without labels, is -1."""
    return np.array([-1 if value is None else int(value) for value in values], np.int64)


def _names(classes: Sequence[Any]) -> list[str]:
    """Where torchvision has several words for a class, all of them."""
    return [name if isinstance(name, str) else ", ".join(name) for name in classes]


def _clevr(found: Any) -> Split:
    """The class is the number of things in the scene, 3 to 10 (Zhai et al. 2019, VTAB)."""
    counts = [str(number) for number in range(3, 11)]
    labels = _numbers(found._labels)
    return Split([str(path) for path in found._image_files], np.where(labels < 0, -1, labels - 3), counts)


def _caltech(folder: str, form: str) -> Callable[[Any], Split]:
    """A folder for each class; ``form`` of the files' names, of the class from 1 and the number of the image."""

    def read(found: Any) -> Split:
        rows = [(found.categories[y], form.format(y + 1, k)) for y, k in zip(found.y, found.index, strict=True)]
        return Split([os.path.join(found.root, folder, *row) for row in rows], _numbers(found.y), found.categories)

    return read


def _omniglot(found: Any) -> Split:
    rows = found._flat_character_images
    paths = [os.path.join(found.target_folder, found._characters[label], name) for name, label in rows]
    return Split(paths, _numbers([label for _, label in rows]), found._characters)


def _inaturalist(found: Any) -> Split:
    paths = [os.path.join(found.root, found.all_categories[label], name) for label, name in found.index]
    return Split(paths, _numbers([label for label, _ in found.index]), found.all_categories)


def _lfw(found: Any) -> Split:
    return Split(found.data, _numbers(found.targets), list(found.class_to_idx))


def _celeba(found: Any) -> Split:
    """Forty attributes; the group is the person."""
    folder = os.path.join(found.root, found.base_folder, "img_align_celeba")
    names = [name for name in found.attr_names if name]
    people = [str(person) for person in found.identity[:, 0].tolist()]
    paths = [os.path.join(folder, name) for name in found.filename]
    return Split(paths, found.attr.numpy().astype(np.float32), names, people)


def _emnist(found: Any) -> Split:
    """The letters begin at 1; the class 0, which nothing has, is left out."""
    split = _arrays()(found)
    return replace(split, labels=split.labels - 1, classes=split.classes[1:]) if split.classes[0] == "N/A" else split


def _fer(found: Any) -> Split:
    words = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    pixels = np.stack([image.numpy() for image, _ in found._samples])
    return Split(pixels, _numbers([label for _, label in found._samples]), words)


@dataclass(frozen=True)
class _H5Rows:
    """Pixels of PatchCamelyon, read when they are asked for: its train split has 7 GB."""

    file: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> np.ndarray:
        import h5py

        with h5py.File(self.file) as opened:
            image: np.ndarray = opened["x"][row]
            return image


def _pcam(found: Any) -> Split:
    import h5py

    names = found._FILES[found._split]
    with h5py.File(found._base_folder / names["targets"][0]) as opened:
        labels = opened["y"][:].reshape(-1)
    file = str(found._base_folder / names["images"][0])
    return Split(_H5Rows(file, len(found)), _numbers(labels), ["no tumour", "tumour"], files=(file,))


_NONE: dict[str, dict[str, Any]] = {"": {}}
_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_VALID = {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}
_DIGITS = [str(digit) for digit in range(10)]
_EMNIST = ("balanced", "byclass", "bymerge", "letters", "digits", "mnist")

SETS: dict[str, TorchvisionSet] = {
    "MNIST": TorchvisionSet(_TRAIN, _arrays()),
    "FashionMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "KMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "QMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "EMNIST": TorchvisionSet(_TRAIN, _emnist, {"": {}} | {word: {"split": word} for word in _EMNIST}),
    "SVHN": TorchvisionSet(_TWO, _arrays("labels", _DIGITS, planes=True), note="Its extra split is left out."),
    "STL10": TorchvisionSet(_TWO, _arrays("labels", planes=True), note="Its 100,000 unlabelled images are left out."),
    "USPS": TorchvisionSet(_TRAIN, _arrays("targets", _DIGITS)),
    "SEMEION": TorchvisionSet(_NONE, _arrays("labels", _DIGITS)),
    "FER2013": TorchvisionSet(_TWO, _fer, fetches=False),
    "PCAM": TorchvisionSet(_THREE, _pcam),
    "EuroSAT": TorchvisionSet(_NONE, _samples()),
    "Country211": TorchvisionSet(_VALID, _samples()),
    "ImageNet": TorchvisionSet({"train": {"split": "train"}, "val": {"split": "val"}}, _samples(), fetches=False),
    "GTSRB": TorchvisionSet(_TWO, _samples("_samples", [str(number) for number in range(43)])),
    "RenderedSST2": TorchvisionSet(_THREE, _samples("_samples")),
    "StanfordCars": TorchvisionSet(_TWO, _samples("_samples"), fetches=False),
    "Imagenette": TorchvisionSet(
        {"train": {"split": "train"}, "val": {"split": "val"}}, _samples("_samples"),
        {"full": {"size": "full"}, "320px": {"size": "320px"}, "160px": {"size": "160px"}},
    ),
    "Flowers102": TorchvisionSet(_THREE, _files("_image_files", "_labels")),
    "Food101": TorchvisionSet(_TWO, _files("_image_files", "_labels")),
    "DTD": TorchvisionSet(_THREE, _files("_image_files", "_labels")),
    "FGVCAircraft": TorchvisionSet(
        _THREE, _files("_image_files", "_labels"),
        {word: {"annotation_level": word} for word in ("variant", "family", "manufacturer")},
    ),
    "SUN397": TorchvisionSet(_NONE, _files("_image_files", "_labels")),
    "CLEVRClassification": TorchvisionSet(_THREE, _clevr),
    "OxfordIIITPet": TorchvisionSet(
        {"train": {"split": "trainval"}, "test": {"split": "test"}}, _files("_images", "_labels")
    ),
    "Caltech101": TorchvisionSet(_NONE, _caltech("101_ObjectCategories", "image_{1:04d}.jpg")),
    "Caltech256": TorchvisionSet(_NONE, _caltech("256_ObjectCategories", "{0:03d}_{1:04d}.jpg")),
    "Omniglot": TorchvisionSet(
        _NONE, _omniglot, {"background": {"background": True}, "evaluation": {"background": False}}
    ),
    "CelebA": TorchvisionSet(_VALID, _celeba),
    "INaturalist": TorchvisionSet(
        _NONE, _inaturalist,
        {"2021_valid": {"version": "2021_valid"}}
        | {word: {"version": word} for word in ("2021_train_mini", "2021_train", "2019", "2018", "2017")},
    ),
    "LFWPeople": TorchvisionSet(
        _NONE, _lfw, {word: {"image_set": word} for word in ("funneled", "deepfunneled", "original")}, fetches=False
    ),
    "Places365": TorchvisionSet(
        {"train": {"split": "train-standard"}, "val": {"split": "val"}}, _samples("imgs"),
        {"small": {"small": True}, "large": {"small": False}}, note="Its unlabelled test images are left out.",
    ),
}  # fmt: skip
