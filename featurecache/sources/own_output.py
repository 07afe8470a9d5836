"""Own output: what this tool wrote itself, recognised by its content wherever it lies, for it is never data.

A name says nothing: a class may be called runs, a picture sheet.png. A folder (a store, a run, a sweep, a study, a
report, maps, a fine-tuned network) is known by the keys of the record in it, a contact sheet by the software that its
PNG names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from featurecache.errors import SourceError, UnreadableImage
from featurecache.sources.base import as_unreadable, open_image_file

# The record of a folder, and keys that it has and a stranger's file of that name has not.
_RECORDS = {
    "spec.json": {"fingerprint", "spec", "provenance"},
    "config.json": {"head", "view", "settings", "calibration", "splits"},
    "sweep.json": {"frame", "views", "asked"},
    "study.json": {"study", "asked", "images"},
    "metrics.json": {"families", "select"},
    "explain.json": {"format", "maps", "files"},
    "finetuned.json": {"provider", "name", "vector", "image_size", "sized"},
}
SHEET = ("Software", "featurecache contact sheet")  # a tEXt chunk, the first behind the header of 33 bytes
_STAMP = b"tEXt" + "\0".join(SHEET).encode()


def is_own_output(folder: str, files: Sequence[str]) -> bool:
    """Whether this tool wrote ``folder``, by the record among its ``files``."""
    for name in _RECORDS.keys() & set(files):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as opened:
                content = json.load(opened)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and content.keys() >= _RECORDS[name]:
            return True
    return False


def is_own_sheet(path: str) -> bool:
    """Whether a file is a contact sheet of ours: of a PNG 80 bytes are read, some 10 µs, where its digest takes all."""
    if not path.lower().endswith(".png"):
        return False
    try:
        with open_image_file(path) as (descriptor, _), as_unreadable(path):
            return os.read(descriptor, 80)[37:].startswith(_STAMP)
    except UnreadableImage:  # said when it is read
        return False


def refuse_own_output(data: str) -> None:
    """Raises SourceError where the folder ``data`` is, or lies in, what this tool wrote."""
    folder = data
    while True:
        if is_own_output(folder, list(_RECORDS)):
            what = "was written by featurecache" if folder == data else f"lies in {folder}, which featurecache wrote"
            raise SourceError(f"{data} {what}: expected a folder of your images.")
        if folder == (folder := os.path.dirname(folder)):
            return
