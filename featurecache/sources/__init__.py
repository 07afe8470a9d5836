"""Data sources: ``open_source`` makes a ``Dataset``, images and their labels, of what ``--data`` names.

To add a source: a function that returns a Dataset, in a file of its own, and one line in ``SOURCES``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, nearest
from featurecache.sources import fetching, huggingface, medmnist, torchvision_datasets
from featurecache.sources.base import Dataset, ImageArrays, safe_name
from featurecache.sources.dicom_frames import expand_frames
from featurecache.sources.folders import list_folder, open_folder
from featurecache.sources.labels import resolve_labels
from featurecache.sources.pseudonyms import pseudonymise, secret_of
from featurecache.sources.published_layouts import is_chest_xray, is_tiny_imagenet, open_chest_xray, open_tiny_imagenet
from featurecache.sources.summary import contact_sheet, describe_dataset
from featurecache.sources.tables import TABLES, open_table
from featurecache.sources.webdataset import is_pattern, is_webdataset, open_webdataset

__all__ = ["SOURCES", "Dataset", "Source", "contact_sheet", "describe_dataset", "open_source", "reopen"]

Columns = dict[str, str] | None  # role -> column


@dataclass(frozen=True)
class Source:
    """One kind of source: what a user writes, and what opens it."""

    form: str  # for messages
    about: str  # for the table of sources
    fits: Callable[[str], bool] | None  # of the path, absolute; None: it is named by a word
    open: Callable[..., Dataset]  # path, or what stands behind the prefix; columns where it has them; task
    columns: bool = False  # whether --column says something about it
    prefix: str = ""  # of a data set that is named and lies where its tool puts it
    fetch: Callable[[str], None] | None = None  # asked once, where ``open`` raised NotFetched


def _digits(_: str, task: str | None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8×8: v of 0..16 becomes round(v·255/16), no splits. The test set of
    Alpaydin and Kaynak (1998), UCI repository, "Optical recognition of handwritten digits"."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return Dataset(
        name="digits",
        ids=[f"digits:{row}" for row in range(len(images))],
        **resolve_labels(labels, [str(digit) for digit in range(10)], task, "digits")._asdict(),
        splits=[""] * len(images),
        images=ImageArrays([images]),
    )


SOURCES: dict[str, Source] = {
    "digits": Source("the word digits", "scikit-learn's 1,797 handwritten digits: needs nothing", None, _digits),
    "tiny-imagenet": Source(
        "a folder of Tiny ImageNet", "as it is unpacked: val by `val_annotations.txt`, names by `words.txt`",
        is_tiny_imagenet, open_tiny_imagenet,
    ),
    "chest-xray": Source(
        "a folder of Kermany's chest X-rays",
        "`NORMAL`, `PNEUMONIA`; persons as groups; `--column label=kind`: normal, bacteria, virus",
        is_chest_xray, open_chest_xray, True,
    ),
    "webdataset": Source(
        "WebDataset tars", "`chest-{000..012}.tar`, `*.tar` or a folder of tars: samples by key, read in place",
        is_webdataset, open_webdataset, True,
    ),
    "folder": Source(
        "a folder of images", "images, in class folders or not, with or without train/val/test above them",
        lambda path: os.path.isdir(path) and not huggingface.is_saved_dataset(path), open_folder,
    ),
    "table": Source(
        "a table (.csv, .tsv, .parquet)", "a path a row, with label or label columns, split, group",
        lambda path: path.lower().endswith(TABLES), open_table, True,
    ),
    "npz": Source(
        "an .npz of MedMNIST's form", "arrays train_images, train_labels, and the same of val and test",
        lambda path: path.lower().endswith(".npz"), medmnist.open_npz,
    ),
    "medmnist": Source(
        medmnist.FORM, "the twelve 2D sets, with their published classes and tasks (extra `medmnist`)",
        None, medmnist.open_medmnist, False, "medmnist:", medmnist.fetch_medmnist,
    ),
    "torchvision": Source(
        torchvision_datasets.FORM, "its labelled sets (CIFAR10, MNIST, EuroSAT, Flowers102, …) with their own splits",
        None, torchvision_datasets.open_torchvision, False, "torchvision:", torchvision_datasets.fetch_torchvision,
    ),
    "hf": Source(
        huggingface.FORM, "a dataset of the Hugging Face hub, or a folder of its `save_to_disk` (extra `hf`)",
        huggingface.is_saved_dataset, huggingface.open_hub, True, "hf:", huggingface.fetch_hub,
    ),
    "kaggle": Source(
        fetching.KAGGLE, "a data set of Kaggle, opened as the folder or table it is (extra `kaggle`)",
        None, lambda words, columns, task: fetching.open_kaggle(words, columns, task, open_source), True,
        "kaggle:", fetching.fetch_kaggle,
    ),
}  # fmt: skip


def open_source(
    data: str | Path, *, columns: Columns = None, task: str | None = None, page: str | None = None,
    bits: int | None = None,
) -> Dataset:  # fmt: skip
    """The dataset that ``data`` names: a folder, a table, an ``.npz``, the word ``digits`` (``./digits`` is a folder),
    or a published set such as ``medmnist:bloodmnist`` (see `SOURCES`), fetched where it is not on this machine.
    ``columns`` names columns by role (path, label, split, group); ``task`` overrides what the labels say;
    ``page``, of TIFF stacks and DICOM files of several frames, is a number (from 0) or "all"; ``bits``: 2^bits − 1 is
    white in 16-bit images. Raises SourceError, BadOption."""
    kind, what = _find(data)
    options: dict[str, Any] = {"columns": columns, "task": task, "page": page, "bits": bits}
    try:
        return _open(kind, what, data, **options)
    except NotFetched as absent:
        if (fetch := SOURCES[kind].fetch) is None:
            raise
        with fetching.fetching(absent):
            fetch(what)
    return _open(kind, what, data, **options)


def reopen(source: Mapping[str, Any]) -> Dataset:
    """The dataset again from its ``source``; nothing is fetched. Raises SourceError where its images have gone."""
    if source.get("kind") == "import":
        raise SourceError(f"{source.get('data')} was imported as features; nobody knows its images.")
    kind, what = _find(source["data"])
    options: dict[str, Any] = {name: source.get(name) for name in ("columns", "task", "page", "bits")}
    dataset = _open(kind, what, source["data"], **options)
    hashed = {name: bool(source.get(f"hash_{name}")) for name in ("ids", "groups")}
    return pseudonymise(dataset, secret_of(source), **hashed) if any(hashed.values()) else dataset


def _open(
    kind: str, what: str, data: str | Path, columns: Columns, task: str | None, page: str | None, bits: int | None
) -> Dataset:
    source = SOURCES[kind]
    if columns and not source.columns:
        raise SourceError(f"columns were named ({', '.join(columns)}), but {data} is no table (.csv, .tsv, .parquet).")
    dataset = source.open(what, columns or None, task) if source.columns else source.open(what, task)
    record = {"kind": kind, "data": dataset.source.get("data", what), "columns": columns or None, "task": task}
    record |= {"page": page, "bits": bits}
    record = {key: value for key, value in record.items() if value is not None}
    for name in dataset.ids:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(f"the name of {name!r} in {data} is not UTF-8; rename it.") from None
    return expand_frames(replace(dataset, name=safe_name(dataset.name), source=record, bits=bits), page)


def _find(data: str | Path) -> tuple[str, str]:
    """The kind of a source, and what its ``open`` is given. Raises SourceError."""
    if data == "digits":
        return "digits", "digits"
    text, path = str(data), os.path.abspath(os.path.expanduser(data))
    for kind, source in SOURCES.items():
        if source.prefix and isinstance(data, str) and data.startswith(source.prefix):
            return kind, data.removeprefix(source.prefix)
    short = [source.form.split("[")[0] for source in SOURCES.values()]
    forms = ", ".join(dict.fromkeys("a folder of images" if form.startswith("a folder") else form for form in short))
    if not text:
        raise SourceError(f"--data is empty; expected {forms}.")
    if not os.path.lexists(path) and not is_pattern(path):
        if re.match(r"^[a-zA-Z]{2,}:", text):
            raise SourceError(f"{data}: this version has no source called {text.split(':')[0]}. It has {forms}.")
        folder, name = os.path.split(path)
        near = nearest(name, [*chain(*list_folder(folder)), *SOURCES])
        raise SourceError(
            f"there is no folder or file {data}.{near if os.path.isdir(folder) else f' Nor is there {folder}.'}"
        )
    for kind, source in SOURCES.items():
        if source.fits and source.fits(path):
            return kind, path
    raise SourceError(f"{data} is {'a file' if os.path.exists(path) else 'a broken link'}; expected {forms}.")
