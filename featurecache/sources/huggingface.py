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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, UnreadableImage, first_line
from featurecache.formatting import abbreviated
from featurecache.images.headers import EncodedImage
from featurecache.sources.base import Dataset, ImageFiles, ImageRows, ImageSource, read_file, safe_name, source_record
from featurecache.sources.fetching import SourceOptions, fetching, not_here, package
from featurecache.sources.labels import (
    ROLES,
    SPLITS,
    groups_or_ids,
    labels_of_lists,
    labels_of_values,
    resolve_labels,
    unique_names,
)

FORM = "hf:<dataset>[:config][@revision]"
_REPOSITORY, _REVISION, _COMMIT = r"[\w.-]+(/[\w.-]+)?", r"[\w./-]*", "[0-9a-f]{40}"
# Of a repository everything is fetched but programs, networks, films and sound: an image of any name may be one.
_LEFT = ["*.py", "*.ipynb", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.mp4", "*.avi", "*.wav", "*.mp3"]
_LABELS = ("label", "labels")


@dataclass(frozen=True)
class HubSplit:
    """One split: ours and theirs, and the rows."""

    split: str
    word: str
    rows: Any


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of `datasets` wrote it."""
    names = ("dataset_dict.json", "dataset_info.json", "state.json")
    there = {name for name in names if os.path.isfile(os.path.join(folder, name))}
    return "dataset_dict.json" in there or there >= {"dataset_info.json", "state.json"}


def open_hub(words: str, columns: dict[str, str] | None, task: str | None) -> Dataset:
    """The dataset in the folder, or of the name, ``words``. Raises NotFetched where it is not on this machine."""
    if os.path.isdir(folder := os.path.abspath(os.path.expanduser(words))):
        record = source_record("hf", f"hf:{folder}", columns, task)
        return _open(folder, "", safe_name(os.path.basename(folder)), record, columns or {}, task)
    options = _parse(words)
    place = _local_copy(options)
    if place is None:
        raise _absent(options)
    pinned = replace(options, version=place.name) if re.fullmatch(_COMMIT, place.name) else options
    name = safe_name(options.name.rsplit("/", 1)[-1] + (f"-{options.variant}" if options.variant else ""))
    record = source_record("hf", str(pinned), columns, task)
    return _open(str(place), options.variant, name, record, columns or {}, task)


def fetch_hub(words: str) -> None:
    """Fetch the files of ``words`` from the hub into its own cache. Raises SourceError."""
    options = _parse(words)
    package("datasets", "hf", f"to read {options.name}")
    with fetching(partial(_absent, options)):
        _snapshot(options)


def _snapshot(options: SourceOptions, **arguments: Any) -> str:
    """Of the converted branch, which has a folder for each configuration, that folder alone."""
    from huggingface_hub import snapshot_download

    wanted = [f"{options.variant}/*"] if options.variant and options.version == "refs/convert/parquet" else None
    arguments |= {"repo_type": "dataset", "revision": options.version or None, "allow_patterns": wanted}
    return str(snapshot_download(options.name, ignore_patterns=_LEFT, **arguments))


def _local_copy(options: SourceOptions) -> Path | None:
    """The copy in the hub's cache. The hub's client knows whether all wanted files of what it fetched are there, so it
    is asked for the same ones."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(_snapshot(options, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise SourceError(f'"{options.name}" cannot be the name of a dataset; expected {FORM}.') from error


def _parse(words: str) -> SourceOptions:
    options = SourceOptions.parse("hf", words, with_folder=False)
    plain = re.fullmatch(_REPOSITORY, options.name) and re.fullmatch(_REVISION, options.version)
    if not plain or str(options) != f"hf:{words}":
        raise SourceError(f"there is no folder {words}, and it cannot be the name of a dataset; expected {FORM}.")
    return options


def _absent(options: SourceOptions, why: str = "") -> NotFetched:
    where = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return not_here(options.name, where, options, "--data hf:FOLDER (save_to_disk, Parquet or an image folder)", why)


def _open(
    folder: str, config: str, name: str, record: dict[str, Any], columns: dict[str, str], task: str | None
) -> Dataset:
    parts, notes = _hub_splits(_load(folder, config), name)
    features = parts[0].rows.features
    if any(part.rows.features != features for part in parts):
        raise SourceError(f"the splits of {name} have different columns; expected the same in each.")
    roles = _find_roles(features, columns, name)
    labels, classes, resolved = resolve_labels(*_labels(parts, roles["label"], name), task, name)
    assert roles["image"] is not None  # _find_roles has refused it
    images, ids = _images(parts, roles["image"], folder, name)
    used, group = set(roles.values()), roles["group"]
    return Dataset(
        name=name,
        source=record,
        ids=ids,
        labels=labels,
        splits=[part.split for part in parts for _ in range(len(part.rows))],
        groups=groups_or_ids(_column(parts, group), ids) if group else None,
        meta={key: _meta(parts, key) for key, kind in features.items() if key not in used and _is_plain(kind)},
        classes=classes,
        task=resolved,
        images=images,
        notes=tuple(notes),
    )


def _load(folder: str, config: str) -> Any:
    datasets = package("datasets", "hf", f"to read {folder}")
    try:
        if is_saved_dataset(folder):
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(folder, config) if config else datasets.load_dataset(folder)
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
    ours = [HubSplit(SPLITS[word.lower()], word, rows) for word, rows in loaded.items() if word.lower() in SPLITS]
    other = [word for word in loaded if word.lower() not in SPLITS]
    if twice := abbreviated([part.word for part in ours if sum(part.split == again.split for again in ours) > 1]):
        raise SourceError(f"{name} has the splits {twice}, which mean the same; save the one you mean alone.")
    parts = [part for part in ours if len(part.rows)] or [HubSplit("", word, loaded[word]) for word in other]
    if not any(len(part.rows) for part in parts):
        raise SourceError(f"{name} has no rows; expected one for each image.")
    left = abbreviated([f"{word} ({len(loaded[word]):,})" for word in other]) if ours else ""
    return parts, [f"These splits are none of train, validation and test, and were left out: {left}."] if left else []


# -- what each column is


def _find_roles(features: Any, columns: dict[str, str], name: str) -> dict[str, str | None]:
    """image, label and group → their columns, as requested or as their kinds and names have it."""
    unknown = next((role for role in columns if role not in ("image", "label", "group")), None)
    if unknown is not None:
        raise SourceError(f"columns of {name} cannot name a {unknown!r}; they name image, label, group.")
    for role, column in columns.items():
        if column not in features:
            there = abbreviated(list(features), 8)
            raise SourceError(f"{name} has no column {column!r} for the {role}; it has {there}.")
    pictures = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    classes = [key for key, kind in features.items() if _class_names(kind)]
    by_name = [key for key in features if key.lower() in (*_LABELS, *ROLES["label"])]
    candidates = {
        "image": pictures,
        "label": [key for key in classes if key.lower() in _LABELS] or classes or by_name,
        "group": [key for key in features if key.lower() in ROLES["group"] and _is_plain(features[key])],
    }
    roles: dict[str, str | None] = {}
    for role, keys in candidates.items():
        if role not in columns and len(keys) > 1:
            raise SourceError(
                f"{name} has several columns that could be the {role}: {abbreviated(keys)}. Say which: "
                f"--column {role}={keys[0]}."
            )
        roles[role] = columns.get(role, keys[0] if keys else None)
    if roles["image"] not in pictures:
        raise SourceError(
            f"{name} has no column of images{' called ' + columns['image'] if 'image' in columns else ''} among "
            f"{abbreviated(list(features), 8)}; cast it: dataset.cast_column(NAME, datasets.Image())."
        )
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


def _labels(parts: Sequence[HubSplit], key: str | None, name: str) -> tuple[np.ndarray, list[str]]:
    """int64 [N], or float32 [N, L] of lists of classes, and their names."""
    if key is None:
        return np.full(sum(len(part.rows) for part in parts), -1, np.int64), []
    where = f"the column {key} of {name}"
    values, names = _column(parts, key), _class_names(parts[0].rows.features[key])
    if any(isinstance(value, list) for value in values):
        return labels_of_lists(values, names, where)
    if not names:
        return labels_of_values(values, where)
    numbers = np.array([-1 if value is None else int(value) for value in values], np.int64)
    if numbers.max(initial=-1) >= len(names) or numbers.min(initial=0) < -1:
        raise SourceError(f"{where} holds the class {numbers.max()} and has {len(names)} names.")
    return numbers, unique_names(names)


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


def _images(parts: list[HubSplit], key: str, folder: str, name: str) -> tuple[ImageSource, list[str]]:
    """Encoded bytes out of Arrow; files of an image folder as files, under their own names."""
    datasets = package("datasets", "hf", f"to read {name}")
    stored = [part.rows.select_columns([key]).cast_column(key, datasets.Image(decode=False)) for part in parts]
    if all(len(rows) and rows[0][key] and rows[0][key]["bytes"] is None for rows in stored):
        paths = [cell["path"] if cell else "" for rows in stored for cell in rows[:][key]]
        if all(path and os.path.abspath(path).startswith(folder + os.sep) for path in paths):
            ids = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
            return ImageFiles(folder, ids), ids
    starts = np.cumsum([0, *(len(rows) for rows in stored)])

    def read(row: int) -> EncodedImage:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return _encoded(stored[part][row - int(starts[part])][key], folder)

    ids = [":".join(filter(None, (name, part.word, str(row)))) for part in parts for row in range(len(part.rows))]
    files = tuple(dict.fromkeys(entry["filename"] for rows in stored for entry in rows.cache_files))
    return ImageRows(read, files), ids


def _encoded(cell: dict[str, Any] | None, folder: str) -> bytes:
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise UnreadableImage("no image in this row")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = os.path.abspath(os.path.join(folder, cell["path"]))
    if not path.startswith(folder + os.sep):
        raise UnreadableImage("its path leads out of the data set")
    return read_file(path)
