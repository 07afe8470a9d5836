"""Data sources: ``open_source`` makes a ``Dataset``, images and their labels, of what ``--data`` names.

To add a source: a function that returns a Dataset, in a file of its own, and one line in ``SOURCES``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from featurecache.errors import BadOption, NotFetched, SeveralReadings, SourceError, StorageError, nearest
from featurecache.files.atomic import refuse_special
from featurecache.files.mirror import Mirror
from featurecache.files.storage import canonical, is_address, local_path
from featurecache.images.headers import check_crop
from featurecache.sources import fetching, huggingface, medmnist, torchvision_datasets
from featurecache.sources.base import Dataset, ImageArrays, safe_name
from featurecache.sources.dicom_frames import expand_frames
from featurecache.sources.folders import list_folder, open_folder, open_images_below
from featurecache.sources.in_memory import KIND as IN_MEMORY
from featurecache.sources.in_memory import open_memory
from featurecache.sources.labels import ROLES, ordered_labels, resolve_labels
from featurecache.sources.pseudonyms import pseudonymise, secret_of
from featurecache.sources.published_layouts import is_chest_xray, is_tiny_imagenet, open_chest_xray, open_tiny_imagenet
from featurecache.sources.summary import contact_sheet, describe_dataset
from featurecache.sources.tables import is_table, open_table
from featurecache.sources.webdataset import is_pattern, is_webdataset, open_webdataset

__all__ = ["SOURCES", "Dataset", "Source", "contact_sheet", "describe_dataset", "open_source", "reopen"]

Columns = dict[str, str] | None  # role -> column
# How a user says what is to be read, as `open_source` takes it.
_ABOUT = {  # what an option that only some sources take is about
    "classes_at": "a level of the folders of images", "leave_out": "folders of images that are no part of the data",
    "root": "where the images of a table lie", "uncertain": "what -1 is in the label columns of a table",
    "letter_case": "the names of classes in folders and in columns of text",
}  # fmt: skip
_WORDS = ("columns", "task", "order", *_ABOUT, "page", "bits", "crop", "limit", "limit_seed")
_CELLS = ("uncertain", "letter_case")  # how label cells are read
_PUBLISHED = ("digits", "medmnist", "torchvision")  # whose classes have the order of their publisher
_FOLDERS = ("folder", "tiny-imagenet", "chest-xray")  # kinds that are folders of images


@dataclass(frozen=True)
class Source:
    """One kind of source: what a user writes, and what opens it."""

    form: str  # for messages
    about: str  # for the table of sources
    fits: Callable[[str], bool] | None  # of the path, absolute; None: it is named by a word
    open: Callable[..., Dataset]  # path, or what stands behind the prefix; columns where it has them; task
    columns: bool = False  # whether --column says something about it
    options: tuple[str, ...] = ()  # of `_ABOUT`: those that ``open`` takes
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
        is_webdataset, open_webdataset, True, _CELLS,
    ),
    "folder": Source(
        "a folder of images", "images, in class folders or not, with splits, persons or folds above or below them",
        lambda path: os.path.isdir(path) and not huggingface.is_saved_dataset(path), open_folder,
        options=("classes_at", "leave_out", "letter_case"),
    ),
    "table": Source(
        "a table (.csv, .tsv, .parquet)", "a path a row, with label or label columns, split, group",
        is_table, open_table, True, ("root", *_CELLS),
    ),
    "npz": Source(
        "an .npz of images", "arrays train_images, train_labels (x_train, y_train), and the same of val and test",
        lambda path: path.lower().endswith(".npz"), medmnist.open_npz, options=_CELLS,
    ),
    "medmnist": Source(
        medmnist.FORM, "the twelve 2D sets, with their published classes and tasks (extra `medmnist`)",
        None, medmnist.open_medmnist, prefix="medmnist:", fetch=medmnist.fetch_medmnist,
    ),
    "torchvision": Source(
        torchvision_datasets.FORM, "its labelled sets (CIFAR10, MNIST, EuroSAT, Flowers102, …) with their own splits",
        None, torchvision_datasets.open_torchvision,
        prefix="torchvision:", fetch=torchvision_datasets.fetch_torchvision,
    ),
    "hf": Source(
        huggingface.FORM, "a dataset of the Hugging Face hub, or a folder of its `save_to_disk` (extra `hf`)",
        huggingface.is_saved_dataset, huggingface.open_hub, True, _CELLS, prefix="hf:", fetch=huggingface.fetch_hub,
    ),
    "kaggle": Source(
        fetching.KAGGLE, "a data set of Kaggle, opened as the folder or table it is (extra `kaggle`)",
        None, lambda words, columns, task, **levels: fetching.open_kaggle(words, columns, task, open_source, **levels),
        True, tuple(_ABOUT), prefix="kaggle:", fetch=fetching.fetch_kaggle,
    ),
}  # fmt: skip


def open_source(
    data: Any,
    *,
    columns: Columns = None,
    task: str | None = None,
    classes_at: int | None = None,
    order: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    root: str | None = None,
    uncertain: str | None = None,
    letter_case: str | None = None,
    page: str | None = None,
    bits: int | None = None,
    crop: Sequence[float] | None = None,
    limit: int | None = None,
    limit_seed: int | None = None,
) -> Dataset:
    """The dataset that ``data`` names: a folder, a table, an ``.npz``, the word ``digits`` (``./digits`` is a folder),
    or a published set such as ``medmnist:bloodmnist`` (see `SOURCES`), fetched where it is not on this machine; from
    Python also a list of paths, or pixels (`open_memory`).
    ``columns`` names columns by role (path, label, split, group); ``task`` overrides what the labels say;
    ``classes_at`` is the level of the class folders (1: those in the folder) where their names do not say it,
    ``leave_out`` folders in it that are no part of the data; ``order`` the classes in the order of their labels;
    ``letter_case`` whether names that differ in it alone are one class (ignore) or two (keep). Of tables: ``root`` is
    the folder of the images where it is not that of the table, ``uncertain`` (ignore, zero, one) what -1 is in label
    columns. ``page``, of TIFF stacks and DICOM files
    of several frames, is a number (from 0) or "all"; ``bits``: 2^bits − 1 is white in 16-bit images; ``crop``:
    the left, top, right and bottom edge of what is looked at, in parts of width and height; ``limit``: so many images,
    see `limit_images`. Raises SourceError, BadOption."""
    if columns is not None and not isinstance(columns, Mapping):
        raise BadOption(f'columns is {columns!r}; it must be a dict of column by role, such as {{"label": "finding"}}.')
    edges = None if crop is None else check_crop(crop)
    words: dict[str, Any] = {"columns": columns or None, "task": task, "classes_at": classes_at}
    words |= {"order": order and list(order), "leave_out": list(leave_out) or None}
    words |= {"root": root, "uncertain": uncertain, "letter_case": letter_case}
    if not isinstance(data, str | os.PathLike):
        if given := [name for name, value in words.items() if value is not None and name != "task"]:
            raise SourceError(f"{given[0]} says how a folder or a table is read; the images are given as they are.")
        whole = expand_frames(replace(open_memory(data, task), bits=bits, crop=edges), page)
        return limit_images(whole, limit, limit_seed)
    words |= {"page": page, "bits": bits, "crop": edges and list(edges), "limit": limit, "limit_seed": limit_seed}
    kind, what = _find(data)
    try:
        return _open(kind, what, data, words)
    except NotFetched as absent:
        if (fetch := SOURCES[kind].fetch) is None:
            raise
        with fetching.fetching(absent):
            fetch(what)
    return _open(kind, what, data, words)


def open_images(data: str | os.PathLike[str], *, columns: Columns = None, page: str | None = None) -> Dataset:
    """The images that ``data`` names, to be predicted: of a folder all that lie below it, whatever its folders are
    called; of a table those of its paths (``columns``: path); of other sources all, with their labels where these have
    one reading. A table's own column of labels stays in ``meta``. Raises SourceError."""
    kind, what = _find(data)
    if kind in _FOLDERS and not columns:
        return expand_frames(replace(open_images_below(what), source={"kind": "folder", "data": what}), page)
    if kind == "table":
        paths = {"path": columns["path"]} if columns and "path" in columns else {}
        words = {"columns": {**dict.fromkeys(set(ROLES) - {"path"}, ""), **paths}, "task": "unlabelled"}
        return _open(kind, what, data, dict.fromkeys(_WORDS) | words)
    try:
        return open_source(data, columns=columns, task="unlabelled" if kind == "npz" else None)
    except SeveralReadings:  # of labels, which nobody needs here
        without = {"label": "", "group": ""} if kind in ("hf", "webdataset") else {}
        return open_source(data, columns={**without, **(columns or {})}, task="unlabelled")


def reopen(source: Mapping[str, Any]) -> Dataset:
    """The dataset again from its ``source``; nothing is fetched, but what an address has that is not here yet. Raises
    SourceError where its images have gone."""
    if source.get("kind") == "import":
        raise SourceError(f"{source.get('data')} was imported as features; nobody knows its images.")
    if source.get("kind") == IN_MEMORY:
        raise SourceError(f"{source.get('data')} were given by a program; nobody knows where they are now.")
    try:
        kind, what = _find(source["data"])
        dataset = _open(kind, what, source["data"], {name: source.get(name) for name in _WORDS})
    except StorageError as error:
        raise SourceError(str(error)) from error
    hashed = {name: bool(source.get(f"hash_{name}")) for name in ("ids", "groups")}
    return pseudonymise(dataset, secret_of(source), **hashed) if any(hashed.values()) else dataset


def _open(kind: str, what: str, data: str | os.PathLike[str], words: dict[str, Any]) -> Dataset:
    source, columns, task, order = SOURCES[kind], words["columns"], words["task"], words["order"]
    if columns and not source.columns:
        raise SourceError(f"columns were named ({', '.join(columns)}), but {data} is no table (.csv, .tsv, .parquet).")
    options = {name: words[name] for name in _ABOUT if words[name] is not None}
    if is_address(options.get("root")):
        options["root"] = mirrored_source(options["root"], folder=True)
    for name in options.keys() - set(source.options):
        raise SourceError(f"--{name.replace('_', '-')} is {_ABOUT[name]}; {data} is {source.form}.")
    given = (columns or None, task) if source.columns else (task,)
    dataset = source.open(what, *given, **options)
    if order is not None or kind not in _PUBLISHED:
        labels, classes = ordered_labels(dataset.labels, dataset.classes, task or "", order, str(data))
        dataset = replace(dataset, classes=classes, labels=labels)
    record = {"kind": kind, "data": what, **words, **dataset.source}
    record |= {"data": _name_of(data)} if is_address(data) else {}
    record |= {"root": _name_of(words["root"])} if is_address(words["root"]) else {}
    record["understood"] = "; ".join(dataset.understood) or None
    record = {key: value for key, value in record.items() if value is not None}
    for name in dataset.ids:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(f"the name of {name!r} in {data} is not UTF-8; rename it.") from None
    reading = {"bits": words["bits"], "crop": words["crop"] and check_crop(words["crop"])}
    whole = expand_frames(replace(dataset, name=safe_name(dataset.name), source=record, **reading), words["page"])
    return limit_images(whole, words["limit"], words["limit_seed"])


def _name_of(address: str | os.PathLike[str]) -> str:
    """As a view keeps it: the same for other machines and users."""
    return canonical(address) if (path := local_path(address)) is None else str(path)


def _find(data: str | os.PathLike[str]) -> tuple[str, str]:
    """The kind of a source, and what its ``open`` is given. Raises SourceError."""
    if data == "digits":
        return "digits", "digits"
    text = str(data)
    for kind, source in SOURCES.items():
        if source.prefix and isinstance(data, str) and data.startswith(source.prefix):
            what = data.removeprefix(source.prefix)
            if not re.split("[:@]", what)[0].strip(" /"):
                raise SourceError(f"--data {data} names no data set; expected {source.form}.")
            return kind, what
    path = mirrored_source(data) if is_address(data) else os.path.abspath(os.path.expanduser(data))
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
    refuse_special(path)
    for kind, source in SOURCES.items():
        if source.fits and source.fits(path):
            return kind, path
    raise SourceError(f"{data} is {'a file' if os.path.exists(path) else 'a broken link'}; expected {forms}.")


# -- data in object storage


def mirrored_source(address: str | os.PathLike[str], *, folder: bool = False) -> str:
    """The absolute path that stands on this machine for an s3:// or gs:// address of a folder, table, archive or tars.

    A folder is fetched whole, a file alone. Of a table and of tars the table, and names and sizes of all that lies
    below their folder; an image or a tar is fetched when it is first read; ``folder``: of which nothing is fetched yet.
    What has come stays in this machine's state folder, where a later run finds it unless the object has changed
    (`featurecache.files.mirror`). Raises BadOption, SourceError, StorageError."""
    if (path := local_path(address)) is not None:
        return str(path)
    address = canonical(address)
    if folder or not (is_table(address) or address.lower().endswith(".tar")):
        mirror, name = Mirror.of(address, "data"), ""
    else:
        plain = re.split(r"[*?\[{]", address)[0] if is_pattern(address) else address
        above = plain.rpartition("/")[0]
        mirror, name = Mirror.of(above, "data"), address.removeprefix(f"{above}/")
    if not mirror.pull(lambda each: each == name or not (name or folder)):
        raise SourceError(f"there is nothing at {mirror.address}.")
    return str(mirror.folder / name)


# -- a part of the images


def limit_images(dataset: Dataset, limit: int | None, seed: int | None) -> Dataset:
    """``--limit N``: a stratified sample of the images, by class within splits, drawn by a seed, in their order; all
    where there are not more, or no ``limit``. A smaller sample is part of a larger one of the same seed, so what was
    computed for it is there. Raises BadOption."""
    if limit is None:
        if seed is not None:
            raise BadOption("--limit-seed is of what --limit draws; give --limit too.")
        return dataset
    seed = seed or 0
    if limit < 1 or seed < 0:
        raise BadOption(f"--limit is at least 1 and --limit-seed at least 0, not {limit} and {seed}.")
    rows = np.sort(_drawn(_strata(dataset), seed)[:limit])
    words = f"{len(rows):,} of {len(dataset):,} images (--limit), drawn by class within splits, seed {seed}"
    understood = "; ".join([*dataset.understood, words])
    source = dataset.source | {"limit": limit, "limit_seed": seed, "understood": understood}
    name = safe_name(f"{dataset.name}-limit-{limit}" + (f"-{seed}" if seed else ""))
    return replace(dataset.at(rows), name=name, source=source, understood=(*dataset.understood, words))


def _strata(dataset: Dataset) -> np.ndarray:
    """int [N]: one number for each class in each split; of several labels the rarest that an image has."""
    labels, splits = dataset.labels, np.unique(np.array(dataset.splits, dtype=str), return_inverse=True)[1]
    if labels.ndim == 2:
        rare_first = np.argsort((labels == 1).sum(0), kind="stable")
        has = (labels == 1)[:, rare_first]
        labels = np.where(has.any(1), rare_first[has.argmax(1)], -1)
    return splits * (labels.max(initial=-1) + 2) + labels + 1


def _drawn(strata: np.ndarray, seed: int) -> np.ndarray:
    """int64 [N]: all rows in the order in which they are drawn: first one of every stratum, then each stratum evenly.
    Where the strata begin to be counted is drawn too: what rounding takes from one it gives to another."""
    rng, place = np.random.default_rng([seed, 8]), np.zeros(len(strata))
    names, sizes = np.unique(strata, return_counts=True)
    offsets = (rng.permutation(len(names)) + 0.5) / len(names)
    for name, size, offset in zip(names, sizes, offsets, strict=True):
        rows = rng.permutation(np.flatnonzero(strata == name))
        place[rows] = (np.arange(size) + offset) / size
        place[rows[0]] = 0
    return np.argsort(place, kind="stable")
