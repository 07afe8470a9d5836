"""Columns that are checked whole when a view is opened: words of a few, digests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from featurecache.errors import CacheError
from featurecache.files.directory import TEXTS, ColumnFile
from featurecache.store import schema
from featurecache.store.schema import DIGEST, SPLITS, check_digests


def splits(text: bytes, ends: list[int]) -> list[str]:
    columns = {f"{TEXTS}splits/bytes": np.frombuffer(text, "u1"), f"{TEXTS}splits/ends": np.array(ends, "<i8")}
    file: Any = SimpleNamespace(path="view.h5", array=lambda name, dtype: columns[name])
    file.text_block = lambda name: ColumnFile.text_block(file, name)
    return schema._splits(file).tolist()


def test_words_are_those_that_were_written() -> None:
    texts = np.random.default_rng(0).choice(sorted(SPLITS), 500).tolist()
    assert splits("".join(texts).encode(), np.cumsum([len(text) for text in texts]).tolist()) == texts
    assert splits(b"", []) == [] and splits(b"", [0, 0]) == ["", ""]


@pytest.mark.parametrize(("text", "ends"), [(b"trail", [5]), (b"va", [2]), (b"trainval", [8]), (b"val\0", [4])])
def test_another_word_is_refused(text: bytes, ends: list[int]) -> None:
    with pytest.raises(CacheError, match="a split other than train, val and test"):
        splits(text, ends)


@pytest.mark.parametrize("letter", "/:`gAF\0é \x7f\xff".encode("latin-1"))
def test_a_digest_with_another_letter_is_refused(letter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_PIECE", 64)
    good = np.array([b"0123456789abcdef" * 2] * 5, DIGEST)
    check_digests(good, Path("view.h5"))
    check_digests(good[::2], Path("view.h5"))
    good.view("u1")[-1] = letter
    with pytest.raises(CacheError, match="32 hexadecimal digits"):
        check_digests(good, Path("view.h5"))
