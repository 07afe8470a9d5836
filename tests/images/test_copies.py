"""Augmented copies: which images have them, that they are always the same, and who meets them."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.command import call
from support.copied_home import STEPS, TRAIN, N, by_digest, copy_home, extract, opened, run, shards
from support.pictures import image_folder, save_picture

import featurecache
from featurecache.errors import BadOption
from featurecache.extraction import canary, pipeline
from featurecache.extraction.cache_miss import explain_miss
from featurecache.images.augmentation import parse_augmentation
from featurecache.maintenance.leaks import find_leaks
from featurecache.store import store
from featurecache.store.shards import ShardWriter
from featurecache.store.view import View


@pytest.fixture
def home(home_with_copies, tmp_path) -> Path:
    return copy_home(home_with_copies, tmp_path)


# the same copies always


def test_a_copy_has_the_features_of_its_pixels(home):
    view = opened(home)
    row = view.ids.tolist().index("train/well/3.png")
    image = torch.from_numpy(np.array(Image.open(home / "data" / view.ids[row]).convert("RGB"))).permute(2, 0, 1)
    processor = transformers.AutoImageProcessor.from_pretrained(home / "vit")
    model = transformers.ViTModel.from_pretrained(home / "vit").eval()
    augmentation = parse_augmentation(STEPS)
    for copy in (1, 2):
        pixels = augmentation.apply(image, augmentation.digests(view.digests[[row]], copy)[0])
        with torch.no_grad():
            expected = model(**processor(pixels, return_tensors="pt")).last_hidden_state
        stored = view.tensor("tokens", view.copies([row])[:, copy]).float()
        assert float((stored - expected).norm() / expected.norm()) < 2.0**-11  # one rounding to float16
        assert float((view.tensor("tokens", [row]).float() - expected).norm() / expected.norm()) > 0.01
    rows, failed = canary.compute([(home / "data" / view.ids[row]).read_bytes()], like=view, output="cls")
    assert not failed and torch.equal(rows, view.tensor("cls", [row]))


def test_images_have_the_same_shards_with_copies_and_without(home):
    extract(home, "plain")
    plain, copied = shards(home / "plain"), shards(home / "cache")
    assert plain.items() <= copied.items() and len(copied) == 2 * len(plain)
    a, b = opened(home, "plain"), opened(home)
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "splits", "digests"))
    assert torch.equal(a.tensor("tokens"), b.tensor("tokens"))


@pytest.mark.parametrize("options", [{"workers": 4}, {"name": "other"}])
def test_other_workers_or_another_name_give_the_same_bytes(home, options):
    assert by_digest(extract(home, "other", copies=2, augment=STEPS, **options).view) == by_digest(opened(home))


def test_another_order_or_batch_size_gives_the_same_copies(home):
    """Up to the last digit that a ViT as small as this one has at another place of a batch."""
    for path in sorted((home / "data").rglob("*.png")):
        path.rename(path.with_stem(str(9 - int(path.stem))))
    rows, expected = (
        by_digest(extract(home, "other", copies=2, augment=STEPS, batch_size=7).view),
        by_digest(opened(home)),
    )
    assert rows.keys() == expected.keys()
    for digest, row in rows.items():
        ours, theirs = (np.frombuffer(each, np.float16).astype(float) for each in (row, expected[digest]))
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_killed_among_the_copies_it_goes_on_and_the_bytes_are_the_same(home, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 4)

    class Killed(BaseException):
        pass

    commits, whole = [], ShardWriter.commit

    def commit(self: ShardWriter, **options: bool) -> Path | None:
        if len(commits) == 9:  # of 3 + 3 shards, each of two outputs
            raise Killed
        commits.append(self)
        return whole(self, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ShardWriter, "commit", commit)
        extract(home, "other", copies=2, augment=STEPS)
    before = shards(home / "other")
    result = extract(home, "other", copies=2, augment=STEPS)
    assert len(before) == 9 and before.items() <= shards(home / "other").items()
    assert result.computed == 4 + 4  # the third shard of copies, and the second's tokens
    assert by_digest(result.view) == by_digest(opened(home))


# what an extraction computes


def test_a_larger_number_computes_the_new_copies_only(home):
    before, rows = shards(home / "cache"), by_digest(opened(home))
    result = extract(home, copies=3, augment=STEPS)
    assert (result.images, result.copies, result.computed) == (N, 3 * TRAIN, TRAIN)
    assert before.items() <= shards(home / "cache").items()
    assert rows.items() <= by_digest(result.view).items()
    fewer = extract(home, copies=1, augment=STEPS)
    assert (fewer.copies, fewer.computed) == (TRAIN, 0)


def test_extracting_again_without_asking_keeps_the_copies_and_completes_them(home):
    result = extract(home, outputs="mean")
    view = View(result.view)
    assert (result.images, result.copies, result.computed) == (N, 2 * TRAIN, 0)
    assert result.derived == N + 2 * TRAIN and list(view.outputs) == ["cls", "mean", "tokens"]
    copies = view.copies(view.split("train"))[:, 2]
    expected = view.tensor("tokens", copies).float()[:, 1:].mean(1)
    assert torch.allclose(view.tensor("mean", copies).float(), expected, atol=2e-3)


def test_an_image_that_is_new_gets_its_copies_and_one_that_cannot_be_read_none(home):
    save_picture(home / "data" / "train" / "ill" / "new.png", 99)
    (home / "data" / "train" / "ill" / "bad.png").write_bytes(b"no image")
    result = extract(home)
    assert (result.images, result.copies, result.computed) == (N + 1, 2 * TRAIN + 2, 3)
    assert [name for name, _ in result.failed] == ["train/ill/bad.png"]


def test_no_copies_any_more_when_none_are_asked_for(home):
    result = extract(home, copies=0)
    view = View(result.view)
    assert (result.copies, result.computed, view.versions, view.augmented) == (0, 0, None, None)
    assert "versions" not in h5py.File(view.path) and view.copies().shape == (N, 1)
    done = call("export", "data", home / "x.h5", "--copies", "--cache", home / "cache")
    assert done.exit_code == 2 and "has no augmented copies" in done.output


@pytest.mark.parametrize("options", [{"augment": "flip,rotate10,shift0.2"}, {"augment": STEPS, "augment_seed": 1}])
def test_other_steps_or_another_seed_are_other_copies(home, options):
    before = set(by_digest(opened(home)))
    result = extract(home, copies=1, **options)
    assert result.computed == TRAIN and len(before & set(by_digest(result.view))) == N


def test_only_training_images_have_copies(home):
    view = opened(home)
    copies, train = view.copies(), view.split("train")
    others = np.setdiff1d(np.arange(N), train)
    assert copies.shape == (N, 3) and (copies[:, 0] == np.arange(N)).all()
    assert (copies[others] == others[:, None]).all()
    assert sorted(copies[train, 1:].ravel().tolist()) == list(range(N, N + 2 * TRAIN))


def test_without_splits_every_image_has_copies_and_it_is_said(home):
    image_folder(home / "loose", 5)
    result = extract(home, data="loose", copies=1, augment="shift0.2")
    assert (result.images, result.copies) == (5, 5)
    options = ["--data", home / "loose", "--copies", 1, "--augment", "shift0.2", "--cache", home / "cache", "--dry-run"]
    text = run("extract", "--backbone", home / "vit", *options)
    assert "one augmented copy of each image: 5 distinct ones, 5 copies by shift0.2, seed 0" in text
    assert "The data have no splits, so every image gets copies; train-head draws the splits later" in text


def test_splits_without_train_have_nothing_to_copy(home):
    shutil.rmtree(home / "data" / "train")
    with pytest.raises(BadOption, match="has none: its splits are test, val"):
        extract(home, "new", copies=1, augment="flip")


def test_one_image_under_several_ids_is_copied_once(home):
    for folder in ("train", "test"):
        shutil.copy(home / "data" / "train" / "ill" / "0.png", home / "data" / folder / "ill" / "again.png")
    result = extract(home)
    view = View(result.view)
    a, b, other = (
        view.ids.tolist().index(name) for name in ("train/ill/0.png", "train/ill/again.png", "test/ill/again.png")
    )
    assert (result.computed, result.copies) == (0, 2 * TRAIN + 2)
    assert torch.equal(view.tensor("cls", view.copies([a])[0]), view.tensor("cls", view.copies([b])[0]))
    assert view.copies([other]).tolist() == [[other] * 3]


def test_images_under_hashed_names_have_copies(home):
    view = View(extract(home, "hashed", copies=1, augment="flip", hash_ids=True).view, copies=True)
    assert set(view.ids[N:]) < set(view.ids[:N]) and not any("png" in name for name in view.ids)


def test_size_and_disk_count_the_copies(home, monkeypatch):
    options = {"backbone": str(home / "vit"), "cache": home / "new", "outputs": "cls,tokens"}
    plain = featurecache.prepare(home / "data", **options)
    copied = featurecache.prepare(home / "data", copies=2, augment=STEPS, **options)
    total = plain.bytes_of() // N * (N + 2 * TRAIN)
    assert (copied.bytes_of(), copied.new_bytes, copied.to_compute) == (total, total, N + 2 * TRAIN)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, plain.new_bytes + (1 << 20) + 999))
    plain.check_disk()
    with pytest.raises(OSError, match="are to be written"):
        copied.check_disk()


def test_an_image_that_is_replaced_meanwhile_loses_its_copies_and_is_named(home):
    options = {"backbone": str(home / "vit"), "cache": home / "cache", "outputs": "cls,tokens"}
    prepared = featurecache.prepare(home / "data", copies=3, augment=STEPS, **options)
    save_picture(home / "data" / "train" / "ill" / "2.png", 77)
    result = prepared.run()
    view, reason = View(result.view), f"its augmented copy 3: {pipeline.CHANGED}"
    assert result.failed == [("train/ill/2.png", reason)]
    assert view.failed == [{"id": "train/ill/2.png", "reason": reason}]
    assert (result.images, result.copies) == (N, 3 * TRAIN - 1)
    row = view.ids.tolist().index("train/ill/2.png")
    assert (view.copies([row])[0] != row).tolist() == [False, True, True, False]
    assert extract(home, copies=3, augment=STEPS).copies == 3 * TRAIN  # and nothing wrong is remembered


# readers


def test_copies_stand_behind_the_images_and_only_who_asks_sees_them(home):
    view, everything = opened(home), opened(home, copies=True)
    assert len(view) == len(view.labels) == len(view.splits) == len(view.digests) == len(view.tensor("cls")) == N
    assert view.versions is not None and not view.versions.any()
    assert view.stored("cls").index.shape == (N, 2) and len(set(view.ids)) == N
    train = view.split("train")
    assert len(train) == TRAIN and everything.versions.tolist() == [0] * N + [1] * TRAIN + [2] * TRAIN
    assert everything.ids.tolist() == view.ids.tolist() + [view.ids[row] for row in train] * 2
    assert everything.labels.tolist() == [*view.labels, *view.labels[train], *view.labels[train]]
    assert everything.splits.tolist() == view.splits.tolist() + ["train"] * 2 * TRAIN
    with pytest.raises(IndexError, match="has rows 0 to 21"):
        view.tensor("cls", [N + 2 * TRAIN])
    with pytest.raises(IndexError):
        view.copies([N])
    with h5py.File(view.path) as file:  # without us
        assert np.array_equal(file["tokens"][:][file["versions"][:] == 0], view.array("tokens"))
        assert len(file["tokens"]) == N + 2 * TRAIN and json.loads(file.attrs["augmentation"])["views"] == 2


def test_copies_are_no_leaks_and_no_images(home):
    cache = ["--cache", home / "cache"]
    assert len(find_leaks(opened(home), threshold=1e-6).of("image")) == 0
    assert not find_leaks(opened(home, copies=True)).of("labels")
    record = json.loads(run("info", "data", *cache, "--json"))
    assert (record["images"], record["distinct"], record["counts"]) == (N, N, [[3, 1, 1], [3, 1, 1]])
    assert record["augmented"]["copies"] == 2 * TRAIN and record["augmented"]["words"] == STEPS
    text = "augment    12 augmented copies, 2 each of 6 images: flip,rotate10,shift0.1, seed 0"
    assert text in run("info", "data", *cache)
    (line,) = json.loads(run("ls", *cache, "--json"))["stores"][0]["views"]
    assert (line["images"], line["copies"], line["bytes"]) == (N, 2 * TRAIN, (N + 2 * TRAIN) * (32 + 17 * 32) * 2)


def test_first_screen_and_record_say_what_is_copied(home):
    command = ["extract", "--backbone", home / "vit", "--data", home / "data", "--cache", home / "cache", "--dry-run"]
    text = run(*command)
    assert "2 augmented copies of each training image: 6 distinct ones, 12 copies by flip,rotate10,shift0.1" in text
    assert "(as data has them; --copies 0 leaves them out)" in text
    assert "10 of 10 distinct images and 12 of 12 augmented copies are in it already" in text
    record = json.loads(run(*command, "--copies", 3, "--augment", STEPS, "--json", "--quiet"))
    assert (record["images_in_cache"], record["images_to_compute"]) == (N, 0)
    copies = record["augmented"]
    assert [copies[key] for key in ("copies", "in_cache", "to_compute", "kept")] == [18, 12, 6, False]


def test_why_counts_copies_and_says_why_there_are_none(home):
    options = {"backbone": str(home / "vit"), "cache": home / "cache", "outputs": "cls"}
    more = explain_miss(home / "data", copies=3, augment=STEPS, **options)
    assert more.images["cls"] == {"there": N, "to_derive": 0, "to_compute": 0} and set(more.images) == {"cls", "tokens"}
    assert more.copies is not None and more.copies["cls"] == {"there": 12, "to_derive": 0, "to_compute": 6}
    assert "12 of 18 augmented copies are there for cls, tokens; 6 are to be computed" in str(more)
    other = explain_miss(home / "data", copies=1, augment="flip", **options)
    assert "0 of 6 augmented copies are there" in str(other) and "another seed are other copies" in str(other)
    assert "augmented" not in str(explain_miss(home / "data", copies=0, **options))
