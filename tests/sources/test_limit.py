"""``--limit N``: so many images by class within splits, the same ones each time, and it is said wherever they are."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from support.command import call
from support.small_sets import npz, pictures, shades

from featurecache.errors import BadOption
from featurecache.sources import limit_images, open_source, reopen
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles


@pytest.fixture
def folder(tmp_path):
    counts = {"train/ill": 6, "train/well": 30, "test/ill": 2, "test/well": 12}
    return pictures(tmp_path / "chest", *(f"{place}/{k}.png" for place, n in counts.items() for k in range(n)))


def test_each_class_of_each_split_has_its_share_in_the_order_of_the_source(folder):
    whole, part = open_source(folder), open_source(folder, limit=25)
    kinds = Counter(zip(part.splits, part.labels.tolist(), strict=True))
    assert kinds == {("train", 0): 3, ("train", 1): 15, ("test", 0): 1, ("test", 1): 6}
    rows = [whole.ids.index(name) for name in part.ids]
    assert rows == sorted(rows) and part.labels.tolist() == whole.labels[rows].tolist()
    assert [part.read(k) for k in range(25)] == [whole.read(row) for row in rows]
    assert isinstance(part.images, ImageFiles) and part.path(3) == whole.path(rows[3])  # and so its digests are kept


def test_a_smaller_sample_is_in_a_larger_one_and_a_seed_draws_others(folder):
    ids = [set(open_source(folder, limit=n).ids) for n in (4, 9, 25, 50, 999)]
    assert [len(each) for each in ids] == [4, 9, 25, 50, 50] and all(a <= b for a, b in itertools.pairwise(ids))
    assert len({name.rsplit("/", 1)[0] for name in ids[0]}) == 4  # a rare class is not lost
    assert set(open_source(folder, limit=25, limit_seed=1).ids) != ids[2]


def test_the_data_say_that_they_are_a_part_and_open_again_as_it(folder):
    part = open_source(folder, limit=25)
    assert part.name == "chest-limit-25"
    assert "25 of 50 images (--limit), drawn by class within splits, seed 0" in part.source["understood"]
    again = reopen(part.source)
    assert (again.ids, again.name, again.source) == (part.ids, part.name, part.source)


def test_of_an_archive_the_same(tmp_path):
    npz(tmp_path / "a.npz", images=shades(30, 8, 8), labels=np.arange(30) % 2)
    packed, whole = open_source(tmp_path / "a.npz", limit=6), open_source(tmp_path / "a.npz")
    rows = [whole.ids.index(name) for name in packed.ids]
    assert all(np.array_equal(packed.read(k), whole.read(row)) for k, row in enumerate(rows))
    assert isinstance(packed.images, ImageArrays) and packed.images.files == ()  # whose digests are kept by row


def test_several_labels_are_drawn_by_the_rarest_that_an_image_has():
    labels = np.zeros((40, 2), np.float32)
    labels[:, 0], labels[:4, 1] = 1, 1
    names = [str(k) for k in range(40)]
    data = Dataset(
        name="x", source={"data": "x"}, ids=names, labels=labels, splits=[""] * 40, classes=["a", "b"],
        task="multilabel", images=ImageArrays([list(range(40))]),
    )  # fmt: skip
    assert int(limit_images(data, 10, 0).labels[:, 1].sum()) == 1


@pytest.mark.parametrize("how", [{"limit": 0}, {"limit": -3}, {"limit": 3, "limit_seed": -1}, {"limit_seed": 2}])
def test_a_limit_that_is_none_is_refused(folder, how):
    with pytest.raises(BadOption, match="--limit"):
        open_source(folder, **how)


@pytest.mark.integration
def test_extract_takes_it_says_it_and_why_agrees(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    words = ("--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--data", "chest", "--limit", 20)
    first = call("extract", *words)
    assert first.exit_code == 0 and "20 of 50 images (--limit), drawn by class within splits, seed 0" in first.stderr
    assert "vit-demo/chest-limit-20 in" in first.stdout and "nothing left to compute" in call("extract", *words).stdout
    assert "(--limit)" in (said := call("info", "chest-limit-20")).stdout, said.output
    assert "20 of 20 distinct images are there for cls\n" in (said := call("why", *words).stdout), said
    assert "computed" in (more := call("extract", *words[:-1], 30).stdout) and "30 images, 10 computed" in more
