"""Where images and their labels come from: ``open_source`` makes a ``Dataset`` of what ``--data`` names.

To add a source: a function that returns a Dataset, in a file of its own, and one line in ``SOURCES``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.dataset import Arrays, Dataset, settle_task, source_record
from featurecache.describe import contact_sheet, describe
from featurecache.errors import SourceError, nearest
from featurecache.folders import open_folder
from featurecache.npz import open_npz
from featurecache.privacy import hidden, known_secret
from featurecache.tables import open_table

__all__ = ["SOURCES", "Dataset", "Source", "contact_sheet", "describe", "open_source", "reopen"]

Columns = dict[str, str] | None  # role -> column


@dataclass(frozen=True)
class Source:
    """One kind of source: what a user writes, and what opens it."""

    form: str  # for messages
    about: str  # for the README's table
    fits: Callable[[str], bool]  # of the path, absolute; never asked of a word
    open: Callable[[str, Columns, str | None], Dataset]  # path, columns, task


def _digits(_: str, columns: Columns, task: str | None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8×8: v of 0..16 becomes round(v·255/16), no splits.

    The test set of Alpaydin and Kaynak (1998), UCI repository, "Optical recognition of handwritten digits".
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    classes = [str(digit) for digit in range(10)]
    settled = settle_task(task, classes, False, "digits")
    labels = found.target.astype(np.int64)
    return Dataset(
        name="digits",
        source=source_record("digits", "digits", None, task),
        ids=[f"digits:{row}" for row in range(len(images))],
        labels=labels if settled != "unlabelled" else np.full_like(labels, -1),
        splits=[""] * len(images),
        groups=None,
        meta={},
        classes=classes if settled != "unlabelled" else [],
        task=settled,
        images=Arrays([images]),
    )


SOURCES: dict[str, Source] = {
    "digits": Source(
        "the word digits", "scikit-learn's 1,797 handwritten digits: needs nothing",
        lambda path: False, _digits,
    ),
    "folder": Source(
        "a folder of images", "images, in class folders or not, with or without train/val/test above them",
        os.path.isdir, lambda path, columns, task: open_folder(path, task),
    ),
    "table": Source(
        "a table (.csv, .tsv, .parquet)", "a path a row, with label or label columns, split, group",
        lambda path: path.lower().endswith((".csv", ".tsv", ".parquet", ".pq")), open_table,
    ),
    "npz": Source(
        "an .npz of MedMNIST's form", "arrays train_images, train_labels, and the same of val and test",
        lambda path: path.lower().endswith(".npz"), lambda path, columns, task: open_npz(path, task),
    ),
}  # fmt: skip


def open_source(data: str | Path, *, columns: Columns = None, task: str | None = None) -> Dataset:
    """The dataset that ``data`` names: a folder, a table, an ``.npz``, or the word ``digits`` (``./digits`` is a
    folder).

    ``columns`` names the columns of a table by role (path, label, split, group); ``task`` overrides what the labels
    say. Raises SourceError.
    """
    if isinstance(data, str) and data == "digits":
        kind, path = "digits", data
    else:
        path = os.path.abspath(os.path.expanduser(data)) if str(data) else ""
        kind = _kind_of(str(data), path)
    if columns and kind != "table":
        raise SourceError(f"columns were named ({', '.join(columns)}), but {data} is no table (.csv, .tsv, .parquet).")
    return SOURCES[kind].open(path, columns or None, task)


def reopen(source: Mapping[str, Any]) -> Dataset:
    """The dataset again from its ``source``. Raises SourceError where its images have gone."""
    if source.get("kind") == "import":
        raise SourceError(f"{source.get('data')} was imported as features; nobody knows its images.")
    dataset = open_source(source["data"], columns=source.get("columns"), task=source.get("task"))
    ids, groups = bool(source.get("hash_ids")), bool(source.get("hash_groups"))
    return hidden(dataset, known_secret(source), ids=ids, groups=groups) if ids or groups else dataset


def _kind_of(data: str, path: str) -> str:
    forms = ", ".join(source.form for source in SOURCES.values())
    if not data:
        raise SourceError(f"--data is empty; expected {forms}.")
    if not os.path.lexists(path):
        if re.match(r"^[a-zA-Z]{2,}:", data):
            raise SourceError(f"{data}: this version has no source called {data.split(':')[0]}. It has {forms}.")
        raise SourceError(f"there is no folder or file {data}.{_near(path)}")
    for kind, source in SOURCES.items():
        if source.fits(path):
            return kind
    raise SourceError(f"{data} is {'a file' if os.path.exists(path) else 'a broken link'}; expected {forms}.")


def _near(path: str) -> str:
    """Names like it in the folder it was looked for in, as a person would type them."""
    folder = os.path.dirname(path)
    try:
        beside = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return f" Nor is there {folder}."
    return nearest(os.path.basename(path), [*beside, *SOURCES])
