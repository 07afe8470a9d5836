"""Hf: and saved datasets folders.

``hf:<dataset>[:config][@revision]``: images and labels of a dataset on the Hugging Face hub, or of a local copy.

A local copy is a folder that ``save_to_disk`` wrote, or one with what the hub has: Parquet, an image folder. Of a name
the hub's files are fetched as they are, into the hub's own cache (HF_HOME), and opened from there by `datasets` (extra
``hf``). The copy that is there is used, and its commit is kept with the source: what is opened again is the same. No
script of a repository is ever run (`datasets` itself has stopped doing so).

Images come as the encoded bytes that are stored, or as files. ``--column label=NAME`` names the label where several
columns could be it, ``image=`` and ``group=`` likewise.

What the columns of a dataset of `datasets` say: which is the image, which the label, and the classes.

The label is the one column of classes, or one called label; lists in it are several labels an image. Whatever else has
one number or text a row is kept beside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import NotFetched, SourceError, UnreadableImage, first_line
from featurecache.images.headers import EncodedImage
from featurecache.sources.base import (
    SPLITS,
    Dataset,
    ImageFiles,
    ImageRows,
    ImageSource,
    abbreviated,
    class_labels,
    read_file,
    resolve_task,
    safe_name,
    source_record,
    unique_names,
)
from featurecache.sources.fetching import fetching, not_here, package
from featurecache.sources.tables import ROLES

FORM = "hf:<dataset>[:config][@revision]"
_NAME = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
# Of a repository everything is fetched but programs, networks, films and sound: an image of any name may be one.
_LEFT = ["*.py", "*.ipynb", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.mp4", "*.avi", "*.wav", "*.mp3"]


@dataclass(frozen=True)
class _Asked:
    repo: str
    config: str | None
    revision: str | None

    @property
    def words(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"hf:{self.repo}{config}" + (f"@{self.revision}" if self.revision else "")


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of `datasets` wrote it."""
    there = {name for name in ("dataset_dict.json", "dataset_info.json", "state.json")
             if os.path.isfile(os.path.join(folder, name))}  # fmt: skip
    return "dataset_dict.json" in there or there >= {"dataset_info.json", "state.json"}


def open_hub(words: str, columns: dict[str, str] | None, asked_task: str | None) -> Dataset:
    """The dataset in the folder, or of the name, ``words``. Raises NotFetched where it is not on this machine."""
    if os.path.isdir(folder := os.path.abspath(os.path.expanduser(words))):
        record = source_record("hf", f"hf:{folder}", columns, asked_task)
        return _open(folder, None, safe_name(os.path.basename(folder)), record, columns or {}, asked_task)
    asked = _parse(words)
    place = _local(asked)
    if place is None:
        raise _absent(asked)
    pinned = _Asked(asked.repo, asked.config, place.name if _COMMIT.fullmatch(place.name) else asked.revision)
    name = safe_name(asked.repo.rsplit("/", 1)[-1] + (f"-{asked.config}" if asked.config else ""))
    record = source_record("hf", pinned.words, columns, asked_task)
    return _open(str(place), asked.config, name, record, columns or {}, asked_task)


def fetch_hub(words: str) -> None:
    """Fetch the files of ``words`` from the hub into its own cache. Raises SourceError."""
    from huggingface_hub import snapshot_download

    asked = _parse(words)
    package("datasets", "hf", f"to read {asked.repo}")
    with fetching(partial(_absent, asked)):
        snapshot_download(asked.repo, repo_type="dataset", revision=asked.revision, **_wanted(asked))


def _wanted(asked: _Asked) -> dict[str, Any]:
    """Which files; of the converted branch, which has a folder for each configuration, that folder alone."""
    converted = asked.config and asked.revision == "refs/convert/parquet"
    return {"allow_patterns": [f"{asked.config}/*"] if converted else None, "ignore_patterns": _LEFT}


def _local(asked: _Asked) -> Path | None:
    """The copy in the hub's cache. The hub's client knows whether all wanted files of what it fetched are there, so it
    is asked for the same ones."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                asked.repo, repo_type="dataset", revision=asked.revision, local_files_only=True, **_wanted(asked)
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise SourceError(f'"{asked.repo}" cannot be the name of a dataset; expected {FORM}.') from error


def _parse(words: str) -> _Asked:
    found = _NAME.fullmatch(words)
    if not found:
        raise SourceError(f"there is no folder {words}, and it cannot be the name of a dataset; expected {FORM}.")
    return _Asked(found["repo"], found["config"], found["revision"])


def _absent(asked: _Asked, why: str = "") -> NotFetched:
    where = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return not_here(asked.repo, where, asked.words, "--data hf:FOLDER (save_to_disk, Parquet or an image folder)", why)


def _open(
    folder: str, config: str | None, name: str, record: dict[str, Any], columns: dict[str, str], task: str | None
) -> Dataset:
    parts, notes = _parts(_load(folder, config), name)
    features = parts[0].rows.features
    if any(part.rows.features != features for part in parts):
        raise SourceError(f"the splits of {name} have different columns; expected the same in each.")
    roles = roles_of(features, columns, name)
    label, image = roles["label"], roles["image"]
    labels, classes = labels_of(parts, features[label] if label else None, label, name)
    settled = resolve_task(task, classes, labels.ndim == 2, name)
    if settled == "unlabelled":
        labels, classes = np.full(len(labels), -1, np.int64), []
    assert image is not None  # roles_of has refused it
    images, ids = _images(parts, image, folder, name)
    return Dataset(
        name=name,
        source=record,
        ids=ids,
        labels=labels,
        splits=[part.split for part in parts for _ in range(len(part.rows))],
        groups=groups_of(parts, roles["group"], ids),
        meta=rest_of(parts, list(roles.values())),
        classes=classes,
        task=settled,
        images=images,
        notes=tuple(notes),
    )


def _load(folder: str, config: str | None) -> Any:
    datasets = package("datasets", "hf", f"to read {folder}")
    try:
        if is_saved_dataset(folder):
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(folder, config) if config else datasets.load_dataset(folder)
    except Exception as error:  # the loaders of the formats have no common root
        said = first_line(error)
        if "scripts are no longer supported" in said:
            said += "; the hub's own conversion is read by @refs/convert/parquet behind the name"
        elif "Config name is missing" in str(error):
            said = " ".join(str(error).split())[:300] + f"; say which: {FORM}"
        raise SourceError(f"{folder} cannot be read by datasets: {said}") from error


def _parts(found: Any, name: str) -> tuple[list[HubSplit], list[str]]:
    """The splits that are ours, in their order; where none has a name of a split, all of it as one without."""
    if not isinstance(found, dict):
        return [HubSplit("", "", found)], []
    known = [HubSplit(SPLITS[word.lower()], word, rows) for word, rows in found.items() if word.lower() in SPLITS]
    other = [word for word in found if word.lower() not in SPLITS]
    twice = [part.word for part in known if sum(part.split == again.split for again in known) > 1]
    if twice:
        raise SourceError(
            f"{name} has the splits {abbreviated(twice)}, which mean the same; save the one you mean alone."
        )
    parts = [part for part in known if len(part.rows)] or [HubSplit("", word, found[word]) for word in other]
    if not any(len(part.rows) for part in parts):
        raise SourceError(f"{name} has no rows; expected one for each image.")
    left = [f"{word} ({len(found[word]):,})" for word in other] if known else []
    notes = (
        [f"These splits are none of train, validation and test, and were left out: {abbreviated(left)}."]
        if left
        else []
    )
    return parts, notes


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


_LABELS = ("label", "labels")


@dataclass(frozen=True)
class HubSplit:
    """One split: ours and theirs, and the rows."""

    split: str
    word: str
    rows: Any


def roles_of(features: Any, columns: dict[str, str], name: str) -> dict[str, str | None]:
    """image, label and group → their columns, as asked for or as their kinds and names have it."""
    unknown = [role for role in columns if role not in ("image", "label", "group")]
    if unknown:
        raise SourceError(f"columns of {name} cannot name a {unknown[0]!r}; they name image, label, group.")
    for role, column in columns.items():
        if column not in features:
            raise SourceError(
                f"{name} has no column {column!r} for the {role}; it has {abbreviated(list(features), 8)}."
            )
    pictures = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    classes = [key for key, kind in features.items() if _names_of(kind)]
    by_name = [key for key in features if key.lower() in (*_LABELS, *ROLES["label"])]
    named = [key for key in classes if key.lower() in _LABELS]
    labels = named or classes or by_name
    groups = [key for key in features if key.lower() in ROLES["group"] and _is_plain(features[key])]
    found = {
        "image": _one(columns, "image", pictures, name),
        "label": _one(columns, "label", labels, name),
        "group": _one(columns, "group", groups, name),
    }
    if found["image"] is None or found["image"] not in pictures:
        raise SourceError(
            f"{name} has no column of images{' called ' + columns['image'] if 'image' in columns else ''} among "
            f"{abbreviated(list(features), 8)}; cast it: dataset.cast_column(NAME, datasets.Image())."
        )
    return found


def _one(columns: dict[str, str], role: str, found: Sequence[str], name: str) -> str | None:
    if role in columns:
        return columns[role]
    if len(found) > 1:
        raise SourceError(
            f"{name} has several columns that could be the {role}: {abbreviated(list(found))}. Say which: "
            f"--column {role}={found[0]}."
        )
    return found[0] if found else None


def _names_of(kind: Any) -> list[str] | None:
    """The names of a column of classes, or of lists of them."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    return list(inner.names) if type(inner).__name__ == "ClassLabel" and inner.names else None


def _is_plain(kind: Any) -> bool:
    """One number or text a row."""
    plain = re.match(r"u?int|float|bool|string|large_string", str(getattr(kind, "dtype", "")))
    return type(kind).__name__ in ("Value", "ClassLabel") and bool(plain)


def _column(parts: list[HubSplit], key: str) -> list[Any]:
    return [value for part in parts for value in part.rows.select_columns([key])[:][key]]


def rest_of(parts: list[HubSplit], used: Sequence[str | None]) -> dict[str, list[str] | np.ndarray]:
    """Further columns."""
    features = parts[0].rows.features
    return {key: _meta(parts, key) for key, kind in features.items() if key not in used and _is_plain(kind)}


def _meta(parts: list[HubSplit], key: str) -> list[str] | np.ndarray:
    """A further column: numbers, a class by its name, else text."""
    values = _column(parts, key)
    names = _names_of(parts[0].rows.features[key])
    if names:
        return [names[value] if value is not None and value >= 0 else "" for value in values]
    if all(type(value) is int and abs(value) < 1 << 63 for value in values):
        return np.array(values, np.int64)
    if all(value is None or isinstance(value, float) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return ["" if value is None else str(value) for value in values]


def labels_of(parts: list[HubSplit], kind: Any, key: str | None, name: str) -> tuple[np.ndarray, list[str]]:
    """int64 [N], or float32 [N, L] of lists of classes, and their names."""
    if key is None:
        return np.full(sum(len(part.rows) for part in parts), -1, np.int64), []
    values, names = _column(parts, key), _names_of(kind)
    if any(isinstance(value, list) for value in values):
        return _several(values, names, f"the column {key} of {name}")
    if names:
        numbers = np.array([-1 if value is None else int(value) for value in values], np.int64)
        if numbers.max(initial=-1) >= len(names) or numbers.min(initial=0) < -1:
            raise SourceError(f"the column {key} of {name} holds the class {numbers.max()} and has {len(names)} names.")
        return numbers, unique_names(names)
    words = ["" if value is None else str(value) for value in values]
    numbered = all(type(value) is int for value in values if value is not None)
    classes = sorted(set(words) - {""}, key=int) if numbered else sorted(set(words) - {""})
    if len(classes) > 2 and not numbered and 2 * len(classes) > len(words):
        raise SourceError(f"the column {key} of {name} has {len(classes):,} values in {len(words):,} rows: no classes.")
    return class_labels(words, classes), classes


def _several(values: list[Any], names: list[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Lists as labels [N, L]: of the classes that are there; or, as long as each other and of 0 and 1 alone, one
    number for each label."""
    lengths = {len(value) for value in values if value is not None}
    flat = {entry for value in values if value is not None for entry in value}
    ones = len(lengths) == 1 and flat <= {0, 1, None} and (not names or len(names) in (2, *lengths))
    if ones and (not names or any(len(set(value)) < len(value) for value in values if value is not None)):
        width = next(iter(lengths))
        columns = names if names and len(names) == width else [str(place) for place in range(width)]
        unknown = [None] * width
        rows = [[np.nan if entry is None else entry for entry in (value or unknown)] for value in values]
        return np.array(rows, np.float32).reshape(len(values), width), unique_names(columns)
    if not names or any(not isinstance(entry, int) or not 0 <= entry < len(names) for entry in flat):
        raise SourceError(
            f"{where} holds lists that are neither numbers of classes nor 0 and 1 for each label: "
            f"{abbreviated(sorted(map(str, flat)))}."
        )
    labels = np.zeros((len(values), len(names)), np.float32)
    for row, value in enumerate(values):
        labels[row, value if value is not None else slice(None)] = np.nan if value is None else 1
    return labels, unique_names(names)


def groups_of(parts: list[HubSplit], key: str | None, ids: list[str]) -> list[str] | None:
    """The group of each image; one without is a group of its own."""
    if key is None:
        return None
    values = zip(_column(parts, key), ids, strict=True)
    return [own if value is None or value == "" else str(value) for value, own in values]
