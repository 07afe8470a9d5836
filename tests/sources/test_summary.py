"""What a dataset holds before anything is computed: in numbers, and as a contact sheet."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.small_sets import listed, pictures, table

from featurecache.errors import CannotWrite
from featurecache.images.decoding import digest
from featurecache.images.headers import ImageHeader
from featurecache.sources import open_source, summary
from featurecache.sources.summary import contact_sheet, describe_dataset


def test_the_table_counts_classes_splits_and_copies(tmp_path):
    pictures(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/3.png", "test/a/4.png", "test/b/5.png")
    for copy, of in [("train/a/6", "train/a/1"), ("test/a/7", "train/a/1"), ("test/b/8", "test/a/4")]:
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{of}.png").read_bytes())
    data = open_source(tmp_path)
    about = describe_dataset(data, [digest(data.read(row)) for row in range(len(data))])
    assert (about.splits, about.counts, about.totals) == (["train", "test"], [[3, 2], [1, 2]], [4, 4])
    assert (about.duplicates.total, about.duplicates.within) == (3, {"train": 1, "test": 1})
    assert (about.duplicates.across, about.duplicates.two_labels) == ({"train+test": 1}, 1)
    assert (about.sizes["largest"], about.kinds) == ([6, 4], {"grey": 8})
    assert "  a           3     2    5" in str(about)
    assert "3 images repeat another (1 within train, 1 within test, 1 in both train and test, 1 under two" in str(about)
    assert json.loads(json.dumps(about.to_dict()))["duplicates"]["total"] == 3


def test_the_table_of_several_labels_counts_positives_and_unknowns(tmp_path):
    data = open_source(listed(tmp_path, "path,x,y\na,1,0\nb,,1\nc,0,1\n"), columns={"label": "x,y"})
    for name in "abc":
        (tmp_path / name).unlink()
    about = describe_dataset(data)
    assert (about.counts, about.unlabelled, about.duplicates) == ([[1], [2]], [1], None)
    assert about.unreadable == [("a", "no such file"), ("b", "no such file"), ("c", "no such file")]
    assert "(a label unknown)" in str(about)
    assert describe_dataset(data, ["d", "d", "e"]).duplicates.two_labels == 1
    data.labels[:2] = np.nan
    assert describe_dataset(data, ["d", "d", "e"]).duplicates.two_labels == 0


def test_groups_that_stand_in_two_splits_are_counted_and_images_without_one_are_none(tmp_path):
    cells = "".join(f"{k},{k % 2},{split},{group}\n" for k, (split, group) in enumerate(GROUPED))
    data = open_source(listed(tmp_path, f"path,label,split,group\n{cells}"))
    assert describe_dataset(data).groups_across == {"train+val": 0, "train+test": 1, "val+test": 2}
    assert describe_dataset(open_source(listed(tmp_path, "path,label\n0,a\n1,b\n"))).groups_across == {}


GROUPED = [
    ("train", "p1"), ("train", "p1"), ("train", ""), ("val", "p2"), ("val", "p3"), ("val", ""), ("test", "p1"),
    ("test", "p2"), ("test", "p3"), ("test", ""), ("train", "p4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stacks", "said"),
    [
        ([3, 1], "1 of 2 images looked at is a TIFF stack of 3 pages: the first"),
        ([3], "1 of 1 image looked at is a TIFF stack of 3 pages: the first"),
        ([3, 2], "2 of 2 images looked at are TIFF stacks of up to 3 pages: the first"),
    ],
)
def test_one_stack_and_several_are_said_so(tmp_path, stacks, said):
    looks = [ImageHeader(8, 8, "grey", pages=pages) for pages in stacks]
    notes = summary.notes_of(open_source(pictures(tmp_path, "1.png")), looks)
    assert any(note.startswith(said) for note in notes), notes


@pytest.mark.parametrize(
    ("digests", "copies"),
    [([None, None, "ab"], 0), (np.array([b"", b"", b"ab"], "S32"), 0), (np.array([b"", b"ab", b"ab"], "S32"), 1)],
)
def test_images_that_could_not_be_read_are_no_copies_of_each_other(tmp_path, digests, copies):
    data = open_source(pictures(tmp_path, "1.png", "2.png", "3.png"))
    assert describe_dataset(data, digests).duplicates.total == copies


def test_of_many_images_two_hundred_are_looked_at_and_of_many_classes_the_first_are_shown(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(summary, "image_header", lambda data: (looked.append(1), ImageHeader(8, 8, "grey"))[1])
    about = describe_dataset(open_source("digits"))
    assert len(looked) == about.looked_at == 200
    assert "8×8, in 200 looked at" in str(about)
    data = open_source(pictures(tmp_path, *[f"{number:03d}/x.png" for number in range(60)]))
    lines = str(describe_dataset(data)).splitlines()
    assert any(line.split() == ["(36", "more)", "36"] for line in lines)
    assert len(lines) < 40


def test_contact_sheet_shows_images_of_every_class_and_the_unreadable_too(tmp_path):
    names = [f"train/{name}/{number}.png" for name in "ab" for number in range(5)]
    root = pictures(tmp_path / "set", *names, "test/a/9.png")
    (root / "test/a/broken.jpg").write_text("<html>")
    contact_sheet(open_source(root), tmp_path / "sheet.png", per_class=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(shade, shade, shade) for shade in (0, 2, 4, 5, 7, 9, 10)} <= colours
    assert (0xB3, 0x26, 0x1E) in colours


def test_contact_sheet_of_several_labels_and_of_none(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    file = table(tmp_path, "path,x,y\na.png,1,\nb.png,0,0\n")
    contact_sheet(open_source(file, columns={"label": "x,y"}), tmp_path / "1.png")
    contact_sheet(open_source(file, task="unlabelled"), tmp_path / "2.png")
    assert (tmp_path / "1.png").stat().st_size > 500 < (tmp_path / "2.png").stat().st_size
    with pytest.raises(CannotWrite):
        contact_sheet(open_source(file), tmp_path / "1.png" / "below-a-file.png")
