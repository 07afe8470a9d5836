"""Hugging Face datasets: ``hf:<dataset>[:config][@revision]``, or a local copy, by `datasets` (extra ``hf``).

A local copy is a folder that ``save_to_disk`` wrote, or one with what the hub has: Parquet, an image folder. Of a name
the hub's files are fetched as they are, into the hub's own cache (HF_HOME), and opened from there. The copy that is
there is used, and its commit is kept with the source: what is opened again is the same. No script of a repository is
ever run (`datasets` itself has stopped doing so).

Images come as the encoded bytes that are stored, or as files. The label is the one column of classes, or one called
label; lists in it are several labels an image. ``--column label=NAME`` names it where several columns could be it,
``image=`` and ``group=`` likewise. Whatever else has one number or text a row is kept beside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featurecache.errors import SourceError, UnreadableImage, first_line
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles, package, read_file, safe_name
from featurecache.sources.fetching import SourceOptions, not_here
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns
from featurecache.sources.labels import find_roles, groups_or_ids, labels_of_values, resolve_labels, role_columns
from featurecache.sources.vocabulary import split_names_of

FORM = "hf:<dataset>[:config][@revision]"
_REPOSITORY, _REVISION, _COMMIT = r"[\w.-]+(/[\w.-]+)?", r"[\w./-]*", "[0-9a-f]{40}"
# Of a repository everything is fetched but programs, networks, films and sound: an image of any name may be one.
_LEFT = ["*.py", "*.ipynb", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.mp4", "*.avi", "*.wav", "*.mp3"]
_LABELS = ("label", "labels")


class HubSplit(NamedTuple):
    """One split: ours and theirs, and the rows."""

    split: str
    word: str
    rows: Any


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of `datasets` wrote it."""
    names = ("dataset_dict.json", "dataset_info.json", "state.json")
    there = {name for name in names if os.path.isfile(os.path.join(folder, name))}
    return "dataset_dict.json" in there or there >= {"dataset_info.json", "state.json"}


def open_hub(words: str, columns: dict[str, str] | None, task: str | None, **how: str) -> Dataset:
    """The dataset in the folder, or of the name, ``words``; ``how`` its labels are read: see `LabelOptions`. Raises
    NotFetched where it is not on this machine."""
    reading = LabelOptions(task, **how)
    if os.path.isdir(folder := os.path.abspath(os.path.expanduser(words))):
        return _open(folder, f"hf:{folder}", os.path.basename(folder), "", columns, reading)
    options = _parse(words)
    place = _local_copy(options)
    if re.fullmatch(_COMMIT, place.name):
        options = replace(options, version=place.name)
    name = options.name.rsplit("/", 1)[-1] + (f"-{options.variant}" if options.variant else "")
    return _open(str(place), str(options), name, options.variant, columns, reading)


def fetch_hub(words: str) -> None:
    """Fetch the files of ``words`` from the hub into its own cache. Raises SourceError."""
    options = _parse(words)
    package("datasets", "hf", f"to read {options.name}")
    _snapshot(options)


def _snapshot(options: SourceOptions, **arguments: Any) -> Path:
    """Of the converted branch, which has a folder for each configuration, that folder alone."""
    from huggingface_hub import snapshot_download

    wanted = [f"{options.variant}/*"] if options.variant and options.version == "refs/convert/parquet" else None
    arguments |= {"repo_type": "dataset", "revision": options.version or None, "allow_patterns": wanted}
    return Path(snapshot_download(options.name, ignore_patterns=_LEFT, **arguments))


def _local_copy(options: SourceOptions) -> Path:
    """The copy in the hub's cache. The hub's client knows whether all wanted files of what it fetched are there, so it
    is asked for the same ones."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(options, local_files_only=True)
    except LocalEntryNotFoundError:
        where = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        copy = "--data hf:FOLDER (save_to_disk, Parquet or an image folder)"
        raise not_here(options.name, where, options, copy) from None
    except HFValidationError as error:
        raise SourceError(f'"{options.name}" cannot be the name of a dataset; expected {FORM}.') from error


def _parse(words: str) -> SourceOptions:
    options = SourceOptions.parse("hf", words, with_folder=False)
    plain = re.fullmatch(_REPOSITORY, options.name) and re.fullmatch(_REVISION, options.version)
    if not plain or str(options) != f"hf:{words}":
        raise SourceError(f"there is no folder {words}, and it cannot be the name of a dataset; expected {FORM}.")
    return options


def _open(folder: str, data: str, name: str, config: str, columns: dict[str, str] | None, how: LabelOptions) -> Dataset:
    name = safe_name(name)
    parts, notes = _hub_splits(_load(folder, config), name)
    features = parts[0].rows.features
    if any(part.rows.features != features for part in parts):
        raise SourceError(f"the splits of {name} have different columns; expected the same in each.")
    roles = _find_roles(features, columns or {}, name)
    images, ids = _images(parts, roles["image"][0], folder, name)
    used = set(chain(*roles.values()))
    labels, classes = np.full(len(ids), -1, np.int64), list[str]()
    meta = {key: _meta(parts, key) for key, kind in features.items() if key not in used and _is_plain(kind)}
    reading = LabelColumns(name, lambda row: f"{name} row {row:,}", how, others=meta)
    for key in roles["label"] if how.task != "unlabelled" else ():
        labels, classes = _labels(key, _column(parts, key), _class_names(features[key]), reading)
    return Dataset(
        name=name,
        source={"data": data, "uncertain": reading.assumed},
        ids=ids,
        **resolve_labels(labels, classes, how.task, name)._asdict(),
        splits=[part.split for part in parts for _ in range(len(part.rows))],
        groups=groups_or_ids(_column(parts, roles["group"][0]), ids) if roles["group"] else None,
        meta=meta,
        images=images,
        notes=tuple(notes),
        understood=tuple(reading.remarks),
    )


def _load(folder: str, config: str) -> Any:
    datasets = package("datasets", "hf", f"to read {folder}")
    try:
        if is_saved_dataset(folder):
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(folder, config or None)
    except Exception as error:  # the loaders of the formats have no common root
        reason = first_line(error)
        if "scripts are no longer supported" in reason:
            reason += "; the hub's own conversion is read by @refs/convert/parquet behind the name"
        elif "Config name is missing" in str(error):
            reason = " ".join(str(error).split())[:300] + f"; say which: {FORM}"
        raise SourceError(f"{folder} cannot be read by datasets: {reason}") from error


def _hub_splits(loaded: Any, name: str) -> tuple[list[HubSplit], list[str]]:
    """The splits that are ours, in their order; where none has a name of a split, all of it as one without."""
    if not isinstance(loaded, dict):
        return [HubSplit("", "", loaded)], []
    splits = split_names_of(loaded)
    ours = [HubSplit(splits[word], word, rows) for word, rows in loaded.items() if word in splits]
    other = [word for word in loaded if word not in splits]
    if twice := abbreviated([part.word for part in ours if sum(part.split == again.split for again in ours) > 1]):
        raise SourceError(f"{name} has the splits {twice}, which mean the same; save the one you mean alone.")
    parts = [part for part in ours if len(part.rows)] or [HubSplit("", word, loaded[word]) for word in other]
    if not any(len(part.rows) for part in parts):
        raise SourceError(f"{name} has no rows; expected one for each image.")
    left = abbreviated([f"{word} ({len(loaded[word]):,})" for word in other]) if ours else ""
    return parts, [f"These splits are none of train, validation and test, and were left out: {left}."] if left else []


# -- what each column is


def _find_roles(features: Any, requested: dict[str, str], name: str) -> dict[str, list[str]]:
    """image, label and group → their columns, as requested or as their kinds and names have it."""
    pictures = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    classes = [key for key, kind in features.items() if _class_names(kind)]
    by_name = role_columns("label", features)
    candidates = {
        "image": pictures,
        "label": [key for key in classes if key.lower() in _LABELS] or classes or by_name,
        "group": role_columns("group", [key for key, kind in features.items() if _is_plain(kind)]),
    }
    roles = find_roles(name, list(features), requested, candidates)
    if not set(roles["image"]) & set(pictures):
        called = f" called {requested['image']}" if "image" in requested else ""
        cast = "cast it: dataset.cast_column(NAME, datasets.Image())"
        raise SourceError(f"{name} has no column of images{called} among {abbreviated(list(features), 8)}; {cast}.")
    return roles


def _class_names(kind: Any) -> list[str] | None:
    """The names of a column of classes, or of lists of them."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    return list(inner.names) if type(inner).__name__ == "ClassLabel" and inner.names else None


def _is_plain(kind: Any) -> bool:
    """One number or text a row."""
    plain = re.match(r"u?int|float|bool|string|large_string", str(getattr(kind, "dtype", "")))
    return type(kind).__name__ in ("Value", "ClassLabel") and bool(plain)


def _column(parts: Sequence[HubSplit], key: str) -> list[Any]:
    return [value for part in parts for value in part.rows.select_columns([key])[:][key]]


def _labels(
    key: str, values: list[Any], names: list[str] | None, reading: LabelColumns
) -> tuple[np.ndarray, list[str]]:
    """Labels and classes of numbers that index ``names``, of lists, or of other values as of the cells of a table."""
    if names or any(isinstance(value, list) for value in values):
        reading.how.refuse_unused(f"{key} of {reading.where} holds {'lists' if not names else 'numbers of classes'}")
        return labels_of_values(values, names, f"the column {key} of {reading.where}")
    return labels_of_columns({key: ["" if value is None else str(value) for value in values]}, reading)


def _meta(parts: Sequence[HubSplit], key: str) -> list[str] | np.ndarray:
    """A further column: numbers, a class by its name, else text."""
    values = _column(parts, key)
    names = _class_names(parts[0].rows.features[key])
    if names:
        return [names[value] if value is not None and value >= 0 else "" for value in values]
    if all(type(value) is int and abs(value) < 1 << 63 for value in values):
        return np.array(values, np.int64)
    if all(value is None or isinstance(value, float) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return ["" if value is None else str(value) for value in values]


# -- the images


def _images(parts: list[HubSplit], key: str, folder: str, name: str) -> tuple[ImageArrays | ImageFiles, list[str]]:
    """Encoded bytes out of Arrow; files of an image folder as files, under their own names."""
    datasets = package("datasets", "hf", f"to read {name}")
    stored = [part.rows.select_columns([key]).cast_column(key, datasets.Image(decode=False)) for part in parts]
    if all(len(rows) and rows[0][key] and rows[0][key]["bytes"] is None for rows in stored):
        paths = [cell["path"] if cell else "" for rows in stored for cell in rows[:][key]]
        if all(path and os.path.abspath(path).startswith(folder + os.sep) for path in paths):
            ids = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
            return ImageFiles(folder, ids), ids
    ids = [":".join(filter(None, (name, part.word, str(row)))) for part in parts for row in range(len(part.rows))]
    files = tuple(dict.fromkeys(entry["filename"] for rows in stored for entry in rows.cache_files))
    return ImageArrays([_Cells(rows, key, folder) for rows in stored], files), ids


@dataclass(frozen=True)
class _Cells:
    """The encoded images of one split."""

    rows: Any
    key: str
    folder: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> bytes:
        cell = self.rows[row][self.key]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise UnreadableImage("no image in this row")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        path = os.path.abspath(os.path.join(self.folder, cell["path"]))
        if not path.startswith(self.folder + os.sep):
            raise UnreadableImage("its path leads out of the data set")
        return read_file(path)
