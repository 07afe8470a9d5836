"""Small data sets whose images have their number as shade; what a source is told that is wrong, and opened again."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401 (its first import starts a process, which no test of the first tier may)
from PIL import Image

from featurecache.errors import SourceError
from featurecache.images.decoding import decode, digest
from featurecache.sources import Dataset, open_source, reopen


def encoded(shade: int, kind: str = "PNG") -> bytes:
    """6×4 grey pixels."""
    buffer = io.BytesIO()
    Image.new("L", (6, 4), shade).save(buffer, kind)
    return buffer.getvalue()


def pictures(root: Path, *names: str) -> Path:
    """``root`` with PNGs of these names; their shades are their numbers."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))
    return root


def table(folder: Path, text: str, name: str = "list.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def listed(folder: Path, text: str, name: str = "list.csv") -> Path:
    """A table like `table`, and an image for each of its rows: the first column holds their paths."""
    sign = "\t" if name.endswith(".tsv") else max(",;|", key=text.count)
    paths = [row[0].strip() for row in csv.reader(text.splitlines()[1:], delimiter=sign) if row]
    pictures(folder, *paths)
    return table(folder, text, name)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def shades(count: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    """[count, *shape]: image i is filled with i."""
    return np.broadcast_to(np.arange(count, dtype=dtype).reshape(-1, *[1] * len(shape)), (count, *shape)).copy()


def shades_of(data: Dataset) -> list[int]:
    return [int(decode(data.read(row))[0, 0, 0]) for row in range(len(data))]


def refused(data: object, *words: str, error: type[SourceError] = SourceError, **options) -> str:  # type: ignore[no-untyped-def]
    """The sentence that ``open_source`` raises; every one of ``words`` is in it."""
    with pytest.raises(error) as caught:
        open_source(data, **options)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value
    return str(caught.value)


def reopened(data: Dataset) -> Dataset:
    """The same from its record, as JSON keeps it."""
    again = reopen(json.loads(json.dumps(data.source)))
    for name in ("ids", "splits", "classes", "groups", "task", "source", "name"):
        assert getattr(again, name) == getattr(data, name), name
    np.testing.assert_array_equal(again.labels, data.labels)
    assert digest(again.read(1)) == digest(data.read(1))
    return again
