"""Columns that are checked whole when a view is opened: words of a few, digests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from featurecache.errors import CacheError, UnknownName, UnsafeFile
from featurecache.files.directory import TEXTS, ColumnFile
from featurecache.store import schema
from featurecache.store.schema import DIGEST, check_digests

KNOWN = {"train", "val", "test", ""}


def words(text: bytes, ends: list[int]) -> list[str]:
    columns = {"bytes": np.frombuffer(text, "u1"), "ends": np.array(ends, "<i8")}
    file: Any = SimpleNamespace(path="view.h5", array=lambda name, dtype: columns[name.removeprefix(f"{TEXTS}s/")])
    return ColumnFile.words(file, "s", KNOWN).tolist()


def test_words_are_those_that_were_written() -> None:
    texts = np.random.default_rng(0).choice(sorted(KNOWN), 500).tolist()
    assert words("".join(texts).encode(), np.cumsum([len(text) for text in texts]).tolist()) == texts
    assert words(b"", []) == [] and words(b"", [0, 0]) == ["", ""]


@pytest.mark.parametrize(("text", "ends"), [(b"trail", [5]), (b"va", [2]), (b"trainval", [8]), (b"val\0", [4])])
def test_another_word_is_refused(text: bytes, ends: list[int]) -> None:
    with pytest.raises(UnknownName, match="other words"):
        words(text, ends)


@pytest.mark.parametrize("ends", [[2], [4], [], [4, 3], [-1, 3], [2**62, 3], [-(2**63), 3]])
def test_words_that_lie_elsewhere_are_refused(ends: list[int]) -> None:
    with pytest.raises(UnsafeFile, match="do not lie where it says"):
        words(b"val", ends)


@pytest.mark.parametrize("letter", "/:`gAF\0é \x7f\xff".encode("latin-1"))
def test_a_digest_with_another_letter_is_refused(letter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_PIECE", 64)
    good = np.array([b"0123456789abcdef" * 2] * 5, DIGEST)
    check_digests(good, Path("view.h5"))
    check_digests(good[::2], Path("view.h5"))
    good.view("u1")[-1] = letter
    with pytest.raises(CacheError, match="32 hexadecimal digits"):
        check_digests(good, Path("view.h5"))
