"""A folder that changes between two extractions: only new content is computed, the view is what a first run gives."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import image_folder, save_picture

import featurecache
from featurecache.extraction import scan
from featurecache.extraction.run import ExtractionResult
from featurecache.store.view import View


@pytest.fixture(autouse=True)
def _aged(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Files just made count as old: digests are remembered at once."""
    monkeypatch.setattr(scan, "YOUNG", 0)


class Case:
    """A folder and its cache after a first extraction."""

    def __init__(self, home: Path, vit: str) -> None:
        self.home, self.vit = home, vit
        self.data = image_folder(home / "data", 8)
        self.first = self.extract("cache").view

    def extract(self, cache: str) -> ExtractionResult:
        return featurecache.extract(self.data, backbone=self.vit, cache=self.home / cache, outputs="cls,tokens")

    def again(self, computed: int) -> View:
        """A second run: computes so many, keeps every committed byte, and gives the view of an empty cache."""
        shards = {path: path.read_bytes() for path in (self.home / "cache").glob("*/*/*.h5")}
        result = self.extract("cache")
        assert (result.computed, result.derived) == (computed, 0)
        assert all(path.read_bytes() == data for path, data in shards.items())
        view, clean = View(result.view), View(self.extract("clean").view)
        for name in ("ids", "splits", "classes", "labels", "digests"):
            assert np.array_equal(getattr(view, name), getattr(clean, name))
        for output in ("cls", "tokens"):
            assert torch.equal(view.tensor(output), clean.tensor(output))
        return view


@pytest.fixture
def case(tmp_path: Path, vit: str) -> Case:
    return Case(tmp_path, vit)


def test_nothing_changed(case: Case) -> None:
    assert len(case.again(computed=0)) == 8


def test_images_added(case: Case) -> None:
    save_picture(case.data / "ill" / "0000.png", 50)
    save_picture(case.data / "new" / "a.png", 51)  # and a class between the others: labels move
    assert case.again(computed=2).classes == ["ill", "new", "well"]


def test_images_removed(case: Case) -> None:
    (case.data / "ill" / "000.png").unlink()
    assert len(case.again(computed=0)) == 7


def test_images_renamed_so_that_they_change_places(case: Case) -> None:
    one, two = case.data / "ill" / "000.png", case.data / "ill" / "002.png"
    one.rename(case.data / "x")
    two.rename(one)
    (case.data / "x").rename(two)
    two.rename(case.data / "ill" / "zz.png")
    assert case.again(computed=0).ids[3] == "ill/zz.png"


def test_images_relabelled(case: Case) -> None:
    (case.data / "ill" / "000.png").rename(case.data / "well" / "000.png")
    assert case.again(computed=0).labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_images_put_into_splits(case: Case) -> None:
    for split, name in (("train", "ill"), ("test", "well")):
        (case.data / split).mkdir()
        (case.data / name).rename(case.data / split / name)
    with pytest.raises(featurecache.FeatureCacheError, match="another dataset"):
        case.extract("cache")  # every id is another
    result = featurecache.extract(
        case.data, backbone=case.vit, cache=case.home / "cache", outputs="cls,tokens", name="splits"
    )
    assert (result.computed, set(View(result.view).splits)) == (0, {"train", "test"})


def test_images_copied(case: Case) -> None:
    shutil.copy2(case.data / "ill" / "000.png", case.data / "well" / "copy.png")
    view = case.again(computed=0)
    assert view.digests[view.ids == "well/copy.png"] == view.digests[view.ids == "ill/000.png"]


@pytest.mark.parametrize("set_back", [False, True])
def test_an_image_replaced_under_the_same_name(case: Case, set_back: bool) -> None:
    victim = case.data / "ill" / "000.png"
    before = victim.stat()
    save_picture(victim, 60, width=20, height=20)
    victim.write_bytes(victim.read_bytes().ljust(before.st_size, b"\0"))
    if set_back:
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (victim.stat().st_size, victim.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    case.again(computed=1)


def test_replaced_by_the_content_of_another(case: Case) -> None:
    shutil.copyfile(case.data / "well" / "001.png", case.data / "ill" / "000.png")
    case.again(computed=0)


def test_a_view_open_while_it_is_written_again_keeps_what_it_was(case: Case) -> None:
    old = View(case.first)
    ids, inode = list(old.ids), case.first.stat().st_ino
    rows = old.tensor("tokens")
    save_picture(case.data / "ill" / "0000.png", 50)
    new = case.again(computed=1)
    assert case.first.stat().st_ino != inode  # a new file in its place, never the old one written over
    assert (old.ids.tolist(), len(new)) == (ids, 9)
    assert torch.equal(old.tensor("tokens"), rows)
