"""``hf:<dataset>[:config][@revision]``: images and labels of a dataset on the Hugging Face hub, or of a local copy.

A local copy is a folder that ``save_to_disk`` wrote, or one with what the hub has: Parquet, an image folder. Of a name
the hub's files are fetched as they are, into the hub's own cache (HF_HOME), and opened from there by `datasets` (extra
``hf``). The copy that is there is used, and its commit is kept with the source: what is opened again is the same. No
script of a repository is ever run (`datasets` itself has stopped doing so).

Images come as the encoded bytes that are stored, or as files. ``--column label=NAME`` names the label where several
columns could be it, ``image=`` and ``group=`` likewise.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.dataset import (
    SPLITS,
    Dataset,
    Files,
    Images,
    Rows,
    Stored,
    few,
    read_file,
    safe_name,
    settle_task,
    source_record,
)
from featurecache.errors import NotFetched, SourceError, UnreadableImage
from featurecache.sources.fetching import fetching, first_line, not_here, package
from featurecache.sources.hub_columns import Part, groups_of, labels_of, rest_of, roles_of

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
    settled = settle_task(task, classes, labels.ndim == 2, name)
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


def _parts(found: Any, name: str) -> tuple[list[Part], list[str]]:
    """The splits that are ours, in their order; where none has a name of a split, all of it as one without."""
    if not isinstance(found, dict):
        return [Part("", "", found)], []
    known = [Part(SPLITS[word.lower()], word, rows) for word, rows in found.items() if word.lower() in SPLITS]
    other = [word for word in found if word.lower() not in SPLITS]
    twice = [part.word for part in known if sum(part.split == again.split for again in known) > 1]
    if twice:
        raise SourceError(f"{name} has the splits {few(twice)}, which mean the same; save the one you mean alone.")
    parts = [part for part in known if len(part.rows)] or [Part("", word, found[word]) for word in other]
    if not any(len(part.rows) for part in parts):
        raise SourceError(f"{name} has no rows; expected one for each image.")
    left = [f"{word} ({len(found[word]):,})" for word in other] if known else []
    notes = [f"These splits are none of train, validation and test, and were left out: {few(left)}."] if left else []
    return parts, notes


def _images(parts: list[Part], key: str, folder: str, name: str) -> tuple[Images, list[str]]:
    """Encoded bytes out of Arrow; files of an image folder as files, under their own names."""
    datasets = package("datasets", "hf", f"to read {name}")
    stored = [part.rows.select_columns([key]).cast_column(key, datasets.Image(decode=False)) for part in parts]
    if all(len(rows) and rows[0][key] and rows[0][key]["bytes"] is None for rows in stored):
        paths = [cell["path"] if cell else "" for rows in stored for cell in rows[:][key]]
        if all(path and os.path.abspath(path).startswith(folder + os.sep) for path in paths):
            ids = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
            return Files(folder, ids), ids
    starts = np.cumsum([0, *(len(rows) for rows in stored)])

    def read(row: int) -> Stored:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return _encoded(stored[part][row - int(starts[part])][key], folder)

    ids = [":".join(filter(None, (name, part.word, str(row)))) for part in parts for row in range(len(part.rows))]
    files = tuple(dict.fromkeys(entry["filename"] for rows in stored for entry in rows.cache_files))
    return Rows(read, files), ids


def _encoded(cell: dict[str, Any] | None, folder: str) -> bytes:
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise UnreadableImage("no image in this row")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = os.path.abspath(os.path.join(folder, cell["path"]))
    if not path.startswith(folder + os.sep):
        raise UnreadableImage("its path leads out of the data set")
    return read_file(path)
