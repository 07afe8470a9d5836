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


def _split(images: Any, labels: Any, classes: Sequence[Any], **more: Any) -> Split:
    """Paths as text; labels that are None, as in a test set without any, as -1; where torchvision has several words for
    a class, all of them."""
    images = [str(path) for path in images] if isinstance(images, list) else images
    numbers = np.array([-1 if value is None else int(value) for value in labels], np.int64)
    return Split(images, numbers, [name if isinstance(name, str) else ", ".join(name) for name in classes], **more)


def _files(paths: str, labels: str) -> Callable[[Any], Split]:
    """Attributes that hold the paths, and the labels as numbers."""
    return lambda opened: _split(list(getattr(opened, paths)), getattr(opened, labels), opened.classes)


def _samples(attribute: str = "samples", classes: Sequence[str] = ()) -> Callable[[Any], Split]:
    """An attribute that holds pairs of a path and a number."""

    def read(opened: Any) -> Split:
        pairs = getattr(opened, attribute)
        return _split([path for path, _ in pairs], [label for _, label in pairs], classes or opened.classes)

    return read


def _arrays(labels: str = "targets", classes: Sequence[str] = (), planes: bool = False) -> Callable[[Any], Split]:
    """Pixels in ``data`` ([n, H, W] or, as ``planes``, [n, 3, H, W]) and numbers in another attribute."""

    def read(opened: Any) -> Split:
        pixels, numbers = np.asarray(opened.data), np.asarray(getattr(opened, labels))
        numbers = numbers if numbers.ndim == 1 else numbers[:, 0]
        return _split(pixels.transpose(0, 2, 3, 1) if planes else pixels, numbers, classes or opened.classes)

    return read


def _clevr(opened: Any) -> Split:
    """The class is the number of things in the scene, 3 to 10 (Zhai et al. 2019, VTAB)."""
    labels = [None if count is None else count - 3 for count in opened._labels]
    return _split(list(opened._image_files), labels, [str(count) for count in range(3, 11)])


def _caltech(folder: str, form: str) -> Callable[[Any], Split]:
    """A folder for each class; ``form`` of the files' names, of the class from 1 and the number of the image."""

    def read(opened: Any) -> Split:
        rows = [(opened.categories[y], form.format(y + 1, k)) for y, k in zip(opened.y, opened.index, strict=True)]
        return _split([os.path.join(opened.root, folder, *row) for row in rows], opened.y, opened.categories)

    return read


def _omniglot(opened: Any) -> Split:
    rows, classes = opened._flat_character_images, opened._characters
    paths = [os.path.join(opened.target_folder, classes[label], name) for name, label in rows]
    return _split(paths, [label for _, label in rows], classes)


def _inaturalist(opened: Any) -> Split:
    paths = [os.path.join(opened.root, opened.all_categories[label], name) for label, name in opened.index]
    return _split(paths, [label for label, _ in opened.index], opened.all_categories)


def _celeba(opened: Any) -> Split:
    """Forty attributes; the group is the person."""
    folder = os.path.join(opened.root, opened.base_folder, "img_align_celeba")
    people = [str(person) for person in opened.identity[:, 0].tolist()]
    paths = [os.path.join(folder, name) for name in opened.filename]
    return Split(paths, opened.attr.numpy().astype(np.float32), [name for name in opened.attr_names if name], people)


def _emnist(opened: Any) -> Split:
    """The letters begin at 1; the class 0, which nothing has, is left out."""
    split = _arrays()(opened)
    return replace(split, labels=split.labels - 1, classes=split.classes[1:]) if split.classes[0] == "N/A" else split


def _fer(opened: Any) -> Split:
    words = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    pixels = np.stack([image.numpy() for image, _ in opened._samples])
    return _split(pixels, [label for _, label in opened._samples], words)


def _pcam(opened: Any) -> Split:
    import h5py

    names = opened._FILES[opened._split]
    with h5py.File(opened._base_folder / names["targets"][0]) as targets:
        labels = targets["y"][:].reshape(-1)
    file = str(opened._base_folder / names["images"][0])
    pixels = h5py.File(file)["x"]  # open for as long as they are used, and read row by row: train has 7 GB
    return _split(pixels, labels, ["no tumour", "tumour"], files=(file,))


def _variants(argument: str, *words: str) -> dict[str, dict[str, Any]]:
    return {word: {argument: word} for word in words}


_NONE: dict[str, dict[str, Any]] = {"": {}}
_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_VALID = {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}
_DIGITS = [str(digit) for digit in range(10)]
_EMNIST: dict[str, dict[str, Any]] = {"": {}} | _variants(
    "split", "balanced", "byclass", "bymerge", "letters", "digits", "mnist"
)

SETS: dict[str, TorchvisionSet] = {
    "MNIST": TorchvisionSet(_TRAIN, _arrays()),
    "FashionMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "KMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "QMNIST": TorchvisionSet(_TRAIN, _arrays()),
    "EMNIST": TorchvisionSet(_TRAIN, _emnist, _EMNIST),
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
        _variants("size", "full", "320px", "160px"),
    ),
    "Flowers102": TorchvisionSet(_THREE, _files("_image_files", "_labels")),
    "Food101": TorchvisionSet(_TWO, _files("_image_files", "_labels")),
    "DTD": TorchvisionSet(_THREE, _files("_image_files", "_labels")),
    "FGVCAircraft": TorchvisionSet(
        _THREE, _files("_image_files", "_labels"),
        _variants("annotation_level", "variant", "family", "manufacturer"),
    ),
    "SUN397": TorchvisionSet(_NONE, _files("_image_files", "_labels")),
    "CLEVRClassification": TorchvisionSet(_THREE, _clevr),
    "OxfordIIITPet": TorchvisionSet({**_TWO, "train": {"split": "trainval"}}, _files("_images", "_labels")),
    "Caltech101": TorchvisionSet(_NONE, _caltech("101_ObjectCategories", "image_{1:04d}.jpg")),
    "Caltech256": TorchvisionSet(_NONE, _caltech("256_ObjectCategories", "{0:03d}_{1:04d}.jpg")),
    "Omniglot": TorchvisionSet(
        _NONE, _omniglot, {"background": {"background": True}, "evaluation": {"background": False}}
    ),
    "CelebA": TorchvisionSet(_VALID, _celeba),
    "INaturalist": TorchvisionSet(
        _NONE, _inaturalist,
        _variants("version", "2021_valid", "2021_train_mini", "2021_train", "2019", "2018", "2017"),
    ),
    "LFWPeople": TorchvisionSet(
        _NONE, lambda opened: _split(opened.data, opened.targets, opened.class_to_idx),
        _variants("image_set", "funneled", "deepfunneled", "original"), fetches=False,
    ),
    "Places365": TorchvisionSet(
        {"train": {"split": "train-standard"}, "val": {"split": "val"}}, _samples("imgs"),
        {"small": {"small": True}, "large": {"small": False}}, note="Its unlabelled test images are left out.",
    ),
}  # fmt: skip
