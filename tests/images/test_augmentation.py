"""Augmented copies: what they are, who meets them, and that they survive what a cache goes through."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import save_vit
from support.command import call
from support.pictures import image_folder, picture, save_picture
from support.plant import flip, rewrite
from torchvision.transforms import v2

import featurecache
from featurecache.errors import BadOption, CacheError, SourceError
from featurecache.extraction import canary, pipeline
from featurecache.extraction.cache_miss import explain_miss
from featurecache.extraction.run import ExtractionResult
from featurecache.files.hdf5 import write_texts
from featurecache.files.records import canonical_json
from featurecache.images import augmentation
from featurecache.images.augmentation import (
    OPERATIONS,
    Augmentation,
    AugmentationStep,
    AugmentedCopies,
    augmentation_of,
    parse_augmentation,
    uniform_draws,
)
from featurecache.maintenance.collect import collect, compact, remove_view
from featurecache.maintenance.leaks import find_leaks
from featurecache.maintenance.merge import merge
from featurecache.maintenance.repair import repair
from featurecache.maintenance.verify import verify
from featurecache.store import store
from featurecache.store.shards import ShardWriter
from featurecache.store.view import View

STEPS = "flip,rotate10,shift0.1"
TRAIN, VAL, TEST = 6, 2, 2
N = TRAIN + VAL + TEST
IMAGE = torch.from_numpy(np.array(picture(3, 41, 30))).permute(2, 0, 1)


def make_data(folder: Path) -> Path:
    """Train, val and test, every image another."""
    for number, (split, count) in enumerate({"test": TEST, "train": TRAIN, "val": VAL}.items()):
        for k in range(count):
            save_picture(folder / split / ("ill", "well")[k % 2] / f"{k}.png", 10 * number + k, width=30 + k)
    return folder


def extract(home: Path, cache: str = "cache", data: str = "data", **options) -> ExtractionResult:  # type: ignore[no-untyped-def]
    options = {"outputs": "cls,tokens", "batch_size": 4, "workers": 1, **options}
    return featurecache.extract(home / data, backbone=str(home / "vit"), cache=home / cache, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A backbone, images, and their view with two copies of each training image."""
    home = tmp_path_factory.mktemp("whole")
    save_vit(home / "vit")
    make_data(home / "data")
    extract(home, views=2, augment=STEPS)
    return home


@pytest.fixture
def home(undisturbed: Path, tmp_path: Path) -> Path:
    """The same, to be changed; the backbone stays where it was."""
    os.symlink(undisturbed / "vit", tmp_path / "vit")
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*/data.h5"):  # the images of the copied view are the copied images
        rewrite(
            path,
            lambda file: file.attrs.modify("source", file.attrs["source"].replace(str(undisturbed), str(tmp_path))),
        )
    return tmp_path


def opened(home: Path, cache: str = "cache", name: str = "data", **options) -> View:  # type: ignore[no-untyped-def]
    return featurecache.open_view(name, home / cache, **options)


def path_of(view: View) -> Path:
    return view.path


def shards(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.glob("*/*/*.h5"))}


def by_digest(view: View, output: str = "tokens") -> dict[bytes, bytes]:
    """The bytes of every row, of images and copies."""
    everything = View(view.path, copies=True)
    rows = everything.array(output, np.arange(everything.rows))
    return dict(zip(everything.digests.tolist(), (row.tobytes() for row in rows), strict=True))


def assert_alike(one: View, other: View) -> None:
    """The same images and copies, whose features differ by rounding at most."""
    found, wanted = by_digest(one), by_digest(other)
    assert found.keys() == wanted.keys()
    for digest, row in found.items():
        ours, theirs = (np.frombuffer(each, np.float16).astype(float) for each in (row, wanted[digest]))
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def run(*words: object) -> tuple[int, str]:
    done = call(*words)
    return done.exit_code, done.output


# what a copy is


def test_a_copy_is_what_one_gets_by_hand(home: Path) -> None:
    view = opened(home)
    row = view.ids.index("train/well/3.png")
    plain = hashlib.blake2b((home / "data" / view.ids[row]).read_bytes(), digest_size=16).hexdigest()
    record = {
        "rules": 1,
        "seed": 0,
        "steps": [
            {"step": "flip", "probability": 0.5},
            {"step": "rotate", "degrees": 10.0, "interpolation": "bilinear", "outside": "black"},
            {"step": "shift", "fraction": 0.1, "outside": "black"},
        ],
    }
    image = torch.from_numpy(np.array(Image.open(home / "data" / view.ids[row]).convert("RGB"))).permute(2, 0, 1)
    processor = transformers.AutoImageProcessor.from_pretrained(home / "vit")
    model = transformers.ViTModel.from_pretrained(home / "vit").eval()
    for copy in (1, 2):
        text = json.dumps([plain, record, copy], sort_keys=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        half, turn, down, right = (by_hand(digest, *place) for place in ((0, 0), (1, 0), (2, 0), (2, 1)))
        made = image.flip(-1) if half < 0.5 else image
        turned = v2.RandomRotation((20 * turn - 10,) * 2, interpolation=BILINEAR, fill=None)(made)
        made = moved(turned, round(0.1 * 33 * (2 * down - 1)), round(0.1 * 33 * (2 * right - 1)))
        with torch.no_grad():
            expected = model(**processor(made, return_tensors="pt")).last_hidden_state
        stored = view.tensor("tokens", view.copies([row])[:, copy]).float()
        assert float((stored - expected).norm() / expected.norm()) < 2.0**-11  # one rounding to float16
        assert float((view.tensor("tokens", [row]).float() - expected).norm() / expected.norm()) > 0.01


def by_hand(digest: str, step: int, number: int) -> float:
    size = 16 if step == 2 else 8
    found = hashlib.blake2b(f"{digest} {step}".encode(), digest_size=size, person=b"augment").digest()
    return (int.from_bytes(found[8 * number : 8 * number + 8], "little") >> 11) / 2**53


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, x] = image[:, y - down, x - right]
    return result


BILINEAR = v2.InterpolationMode.BILINEAR
REFERENCE = {  # torchvision's own transforms, held at one value
    "flip": lambda u: v2.RandomHorizontalFlip(float(u[0] < 0.5)),
    "vflip": lambda u: v2.RandomVerticalFlip(float(u[0] < 0.5)),
    "rotate30": lambda u: v2.RandomRotation((60 * u[0] - 30,) * 2, interpolation=BILINEAR, fill=None),
    "scale0.2": lambda u: v2.RandomAffine(0, scale=(0.8 + 0.4 * u[0],) * 2, interpolation=BILINEAR, fill=None),
    "brightness0.5": lambda u: v2.ColorJitter(brightness=(0.5 + u[0],) * 2),
    "contrast0.5": lambda u: v2.ColorJitter(contrast=(0.5 + u[0],) * 2),
    "shift0.2": lambda u: lambda image: moved(image, round(6 * (2 * u[0] - 1)), round(8.2 * (2 * u[1] - 1))),
}


@pytest.mark.parametrize("word", REFERENCE)
def test_each_step_is_torchvisions(word: str) -> None:
    seen = set()
    for number in range(6):
        digest, made = f"{number:032x}".encode(), parse_augmentation(word)
        copy = made.made(IMAGE, digest)
        expected = REFERENCE[word](uniform_draws(digest, 0, OPERATIONS[made.steps[0].word].draws))(IMAGE)
        assert torch.equal(copy, expected) and copy.dtype == torch.uint8
        seen.add(copy.numpy().tobytes())
    assert len(seen) == (2 if "flip" in word else 6)


def test_every_step_has_a_reference() -> None:
    assert {parse_augmentation(word).steps[0].word for word in REFERENCE} == set(OPERATIONS)


def test_what_is_drawn_is_spread_evenly_and_each_copy_its_own() -> None:
    digests = parse_augmentation("shift0.1").digests(np.array([f"{k:032x}" for k in range(500)], "S32"), 1)
    values = np.array([uniform_draws(digest, 0, 2) for digest in digests.tolist()])
    assert scipy.stats.kstest(values.ravel(), "uniform").pvalue > 0.01
    assert abs(scipy.stats.pearsonr(values[:, 0], values[:, 1]).statistic) < 0.1
    assert len(np.unique(values)) == 1000


def test_steps_are_done_in_their_order() -> None:
    digest = b"1" * 32
    assert not torch.equal(
        parse_augmentation("rotate45,shift0.3").made(IMAGE, digest),
        parse_augmentation("shift0.3,rotate45").made(IMAGE, digest),
    )


def test_the_digest_of_a_copy_knows_the_image_the_steps_the_copy_and_the_seed() -> None:
    images = np.array(["a" * 32, "b" * 32], "S32")
    found = [
        made.digests(images, copy).tolist()
        for made in (
            parse_augmentation("flip,shift0.1"),
            parse_augmentation("flip,shift0.2"),
            parse_augmentation("shift0.1,flip"),
            parse_augmentation("flip,shift0.1", 1),
        )
        for copy in (1, 2)
    ]
    assert len({digest for pair in found for digest in pair}) == 16
    text = canonical_json(["a" * 32, parse_augmentation("flip,shift0.1").to_dict(), 1])
    assert found[0][0] == hashlib.blake2b(text.encode(), digest_size=16).hexdigest().encode()


_AMOUNTS = st.floats(0.01, 0.89, allow_subnormal=False)
_STEPS = st.permutations(list(OPERATIONS)).flatmap(
    lambda words: st.integers(1, len(words)).flatmap(
        lambda n: st.tuples(
            *(
                st.builds(AugmentationStep, st.just(w), _AMOUNTS if OPERATIONS[w].amount else st.just(0.0))
                for w in words[:n]
            )
        )
    )
)


@given(st.builds(AugmentedCopies, st.builds(Augmentation, _STEPS, st.integers(0, 2**62)), st.integers(1, 100)))
def test_the_record_gives_the_augmentation_again(made: AugmentedCopies) -> None:
    assert AugmentedCopies.from_dict(json.loads(canonical_json(made.to_dict()))) == made


def test_words_give_the_augmentation_again() -> None:
    assert str(parse_augmentation(" Flip, rotate010.50 ,shift.1")) == "flip,rotate10.5,shift0.1"
    assert parse_augmentation(str(parse_augmentation(STEPS))) == parse_augmentation(STEPS)


# the same bytes always


def test_images_have_the_same_shards_with_copies_and_without(home: Path) -> None:
    extract(home, "plain")
    plain, copied = shards(home / "plain"), shards(home / "cache")
    assert plain.items() <= copied.items() and len(copied) == 2 * len(plain)
    a, b = opened(home, "plain"), opened(home)
    assert (a.ids, a.splits, a.digests.tolist()) == (b.ids, b.splits, b.digests.tolist())
    assert torch.equal(a.tensor("tokens"), b.tensor("tokens"))


@pytest.mark.parametrize("options", [{"workers": 4}, {"name": "other"}])
def test_other_workers_or_another_name_give_the_same_bytes(home: Path, options) -> None:  # type: ignore[no-untyped-def]
    result = extract(home, "other", views=2, augment=STEPS, **options)
    assert by_digest(View(result.view)) == by_digest(opened(home))


def test_another_batch_size_gives_the_same_copies(home: Path) -> None:
    """In another store with its own plan: a ViT as small as this one has another last digit there."""
    assert_alike(View(extract(home, "other", views=2, augment=STEPS, batch_size=7).view), opened(home))


def test_another_order_of_the_images_gives_the_same_copies(home: Path) -> None:
    """At another place of the batch a ViT as small as this one may have another last digit."""
    for path in sorted((home / "data").rglob("*.png")):
        path.rename(path.with_stem(str(9 - int(path.stem))))
    result = extract(home, "other", views=2, augment=STEPS)
    assert_alike(View(result.view), opened(home))


def test_killed_among_the_copies_it_goes_on_and_the_bytes_are_the_same(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(store, "SHARD_ROWS", 4)

    class Killed(BaseException):
        pass

    commits, whole = [], ShardWriter.commit

    def commit(self: ShardWriter, **options: bool) -> Path | None:
        if len(commits) == 9:  # of 3 + 3 shards, each of two outputs
            raise Killed
        commits.append(self)
        return whole(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", commit)
        with pytest.raises(Killed):
            extract(home, "other", views=2, augment=STEPS)
    kept = shards(home / "other")
    result = extract(home, "other", views=2, augment=STEPS)
    assert len(kept) == 9 and kept.items() <= shards(home / "other").items()
    assert result.computed == 4 + 4  # the third shard of copies, and the second's tokens
    assert by_digest(View(result.view)) == by_digest(opened(home))


# what an extraction computes


def test_a_larger_number_computes_the_new_copies_only(home: Path) -> None:
    before, rows = shards(home / "cache"), by_digest(opened(home))
    result = extract(home, views=3, augment=STEPS)
    assert (result.images, result.copies, result.computed) == (N, 3 * TRAIN, TRAIN)
    assert before.items() <= shards(home / "cache").items()
    assert rows.items() <= by_digest(View(result.view)).items()
    fewer = extract(home, views=1, augment=STEPS)
    assert (fewer.copies, fewer.computed) == (TRAIN, 0)


def test_extracting_again_without_asking_keeps_the_copies_and_completes_them(home: Path) -> None:
    result = extract(home, outputs="mean")
    view = View(result.view)
    assert (result.images, result.copies, result.computed) == (N, 2 * TRAIN, 0)
    assert result.derived == N + 2 * TRAIN and list(view.outputs) == ["cls", "mean", "tokens"]
    copies = view.copies(view.split("train"))[:, 2]
    expected = view.tensor("tokens", copies).float()[:, 1:].mean(1)
    assert torch.allclose(view.tensor("mean", copies).float(), expected, atol=2e-3)


def test_an_image_that_is_new_gets_its_copies_too(home: Path) -> None:
    save_picture(home / "data" / "train" / "ill" / "new.png", 99)
    result = extract(home)
    assert (result.images, result.copies, result.computed) == (N + 1, 2 * TRAIN + 2, 3)


def test_no_copies_any_more_when_none_are_asked_for(home: Path) -> None:
    result = extract(home, views=0)
    view = View(result.view)
    assert (result.copies, result.computed, view.versions, view.augmented) == (0, 0, None, None)
    assert "versions" not in h5py.File(view.path) and view.copies().shape == (N, 1)


def test_other_steps_or_another_seed_are_other_copies(home: Path) -> None:
    old = set(by_digest(opened(home)))
    for options in ({"augment": "flip,rotate10,shift0.2"}, {"augment": STEPS, "augment_seed": 1}):
        result = extract(home, views=1, **options)
        assert result.computed == TRAIN
        assert len(old & set(by_digest(View(result.view)))) == N


def test_only_training_images_have_copies(home: Path) -> None:
    view = opened(home)
    copies = view.copies()
    train = view.split("train")
    assert copies.shape == (N, 3) and (copies[:, 0] == np.arange(N)).all()
    others = np.setdiff1d(np.arange(N), train)
    assert (copies[others] == others[:, None]).all()
    assert sorted(copies[train, 1:].ravel().tolist()) == list(range(N, N + 2 * TRAIN))


def test_without_splits_every_image_has_copies_and_it_is_said(home: Path) -> None:
    image_folder(home / "loose", 5)
    result = extract(home, data="loose", views=1, augment="shift0.2")
    assert (result.images, result.copies) == (5, 5)
    words = ["extract", "--backbone", home / "vit", "--data", home / "loose", "--views", 1, "--augment", "shift0.2"]
    code, said = run(*words, "--cache", home / "cache", "--dry-run")
    assert code == 0 and "one copy of each image: 5 distinct ones, 5 copies by shift0.2, seed 0" in said
    assert "The data have no splits, so every image gets copies; train-head draws the splits later" in said


def test_splits_without_train_have_nothing_to_copy(home: Path) -> None:
    shutil.rmtree(home / "data" / "train")
    with pytest.raises(BadOption, match="has none: its splits are test, val"):
        extract(home, "new", views=1, augment="flip")


def test_one_image_under_several_ids_is_copied_once(home: Path) -> None:
    again_, elsewhere = home / "data" / "train" / "ill" / "again.png", home / "data" / "test" / "ill" / "again.png"
    for target in (again_, elsewhere):
        shutil.copy(home / "data" / "train" / "ill" / "0.png", target)
    result = extract(home)
    view = View(result.view)
    a, b, other = (view.ids.index(name) for name in ("train/ill/0.png", "train/ill/again.png", "test/ill/again.png"))
    assert (result.computed, result.copies) == (0, 2 * TRAIN + 2)
    assert torch.equal(view.tensor("cls", view.copies([a])[0]), view.tensor("cls", view.copies([b])[0]))
    assert view.copies([other]).tolist() == [[other] * 3]


def test_images_under_hashed_names_have_copies(home: Path) -> None:
    result = extract(home, "hashed", views=1, augment="flip", hash_ids=True)
    view = View(result.view, copies=True)
    assert set(view.ids[N:]) < set(view.ids[:N]) and not any("png" in name for name in view.ids)


def test_size_and_disk_count_the_copies(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    options = {"backbone": str(home / "vit"), "cache": home / "new", "outputs": "cls,tokens"}
    plain = featurecache.prepare(home / "data", **options)
    found = featurecache.prepare(home / "data", views=2, augment=STEPS, **options)
    row = plain.bytes_of() // N
    assert (found.bytes_of(), found.new_bytes, found.to_compute) == (row * (N + 2 * TRAIN),) * 2 + (N + 2 * TRAIN,)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, plain.new_bytes + (1 << 20) + 999))
    plain.check_disk()
    with pytest.raises(OSError, match="are to be written"):
        found.check_disk()


def test_an_image_that_is_replaced_meanwhile_loses_its_copies_and_is_named(home: Path) -> None:
    prepared = featurecache.prepare(
        home / "data", backbone=str(home / "vit"), cache=home / "cache", outputs="cls,tokens", views=3, augment=STEPS
    )
    save_picture(home / "data" / "train" / "ill" / "2.png", 77)
    result = prepared.run()
    view = View(result.view)
    reason = f"its augmented copy 3: {pipeline.CHANGED}"
    assert result.failed == [("train/ill/2.png", reason)] and view.failed == [
        {"id": "train/ill/2.png", "reason": reason}
    ]
    assert (result.images, result.copies) == (N, 3 * TRAIN - 1)
    row = view.ids.index("train/ill/2.png")
    assert (view.copies([row])[0] != row).tolist() == [False, True, True, False]
    assert extract(home, views=3, augment=STEPS).copies == 3 * TRAIN  # and nothing wrong is remembered


def test_an_image_that_cannot_be_read_has_neither_row_nor_copies(home: Path) -> None:
    (home / "data" / "train" / "ill" / "bad.png").write_bytes(b"no image")
    result = extract(home)
    assert [name for name, _ in result.failed] == ["train/ill/bad.png"]
    assert (result.images, result.copies) == (N, 2 * TRAIN)


# readers that do not ask


def test_a_reader_that_does_not_ask_sees_the_images_only(home: Path) -> None:
    view = opened(home)
    assert len(view) == len(view.labels) == len(view.splits) == len(view.digests) == len(view.tensor("cls")) == N
    assert view.versions is not None and not view.versions.any() and len(view.split("train")) == TRAIN
    assert view.stored("cls").index.shape == (N, 2) and len(set(view.ids)) == N


def test_who_asks_sees_copies_behind_the_images_with_their_ids(home: Path) -> None:
    view = opened(home, copies=True)
    assert view.versions is not None and view.versions.tolist() == [0] * N + [1] * TRAIN + [2] * TRAIN
    train = view.split("train")[:TRAIN]
    for start in (N, N + TRAIN):
        assert view.ids[start : start + TRAIN] == [view.ids[row] for row in train]
        assert view.labels[start : start + TRAIN].tolist() == view.labels[train].tolist()
    assert set(view.splits[N:]) == {"train"}


def test_h5py_alone_finds_images_by_versions(home: Path) -> None:
    view = opened(home)
    with h5py.File(view.path) as file:
        plain = file["versions"][:] == 0
        assert np.array_equal(file["tokens"][:][plain], view.array("tokens"))
        assert len(file["tokens"]) == N + 2 * TRAIN and json.loads(file.attrs["augmentation"])["views"] == 2


def test_rows_beyond_the_copies_are_refused(home: Path) -> None:
    view = opened(home)
    with pytest.raises(IndexError, match="has rows 0 to 21"):
        view.tensor("cls", [N + 2 * TRAIN])
    with pytest.raises(IndexError):
        view.copies([N])


def test_copies_are_no_leaks_and_no_images(home: Path) -> None:
    assert len(find_leaks(opened(home), threshold=1e-6).of("image")) == 0
    assert not find_leaks(opened(home, copies=True)).of("labels")
    _, info = run("info", "data", "--cache", home / "cache", "--json")
    record = json.loads(info)
    assert (record["images"], record["distinct"], record["counts"]) == (N, N, [[3, 1, 1], [3, 1, 1]])
    assert record["augmented"]["copies"] == 2 * TRAIN and record["augmented"]["words"] == STEPS
    _, text = run("info", "data", "--cache", home / "cache")
    assert "augment    12 augmented copies, 2 each of 6 images: flip,rotate10,shift0.1, seed 0" in text
    _, listed = run("ls", "--cache", home / "cache", "--json")
    (line,) = json.loads(listed)["stores"][0]["views"]
    assert (line["images"], line["copies"], line["bytes"]) == (N, 2 * TRAIN, (N + 2 * TRAIN) * (32 + 17 * 32) * 2)


def test_first_screen_and_record_say_what_is_copied(home: Path) -> None:
    words = ["extract", "--backbone", home / "vit", "--data", home / "data", "--cache", home / "cache"]
    code, said = run(*words, "--dry-run")
    assert code == 0 and "2 copies of each training image: 6 distinct ones, 12 copies by flip,rotate10,shift0.1" in said
    assert "(as data has them; --views 0 leaves them out)" in said
    assert "10 of 10 distinct images and 12 of 12 augmented copies are in it already" in said
    code, text = run(*words, "--views", 3, "--augment", STEPS, "--dry-run", "--json", "--quiet")
    record = json.loads(text)
    assert (record["images_in_cache"], record["images_to_compute"]) == (N, 0)
    made = record["augmented"]
    assert (made["copies"], made["in_cache"], made["to_compute"], made["kept"]) == (18, 12, 6, False)


def test_why_counts_copies_and_says_why_there_are_none(home: Path) -> None:
    options = {"backbone": str(home / "vit"), "cache": home / "cache", "outputs": "cls"}
    more = explain_miss(home / "data", views=3, augment=STEPS, **options)
    assert more.images == {"cls": {"there": N, "to_derive": 0, "to_compute": 0}, "tokens": more.images["tokens"]}
    assert more.copies is not None and more.copies["cls"] == {"there": 12, "to_derive": 0, "to_compute": 6}
    assert "12 of 18 augmented copies are there for cls, tokens; 6 are to be computed" in str(more)
    other = explain_miss(home / "data", views=1, augment="flip", **options)
    assert "0 of 6 augmented copies are there" in str(other) and "another seed are other copies" in str(other)
    assert "augmented" not in str(explain_miss(home / "data", views=0, **options))


# what a cache goes through


def test_gc_and_compact_keep_copies_and_free_them_when_nobody_names_them(home: Path) -> None:
    rows = by_digest(opened(home))
    assert collect(home / "cache", delete=True).bytes == 0
    compact("data", home / "cache")
    assert by_digest(opened(home)) == rows and verify(home / "cache").damages == ()
    assert opened(home).augmented == AugmentedCopies(parse_augmentation(STEPS), 2)
    extract(home, views=1, augment=STEPS)
    freed = collect(home / "cache", delete=True)
    assert {unused.output: unused.rows for unused in freed.stores[0].outputs} == {"cls": TRAIN, "tokens": TRAIN}
    assert by_digest(opened(home)).items() < rows.items() and verify(home / "cache").damages == ()


def test_a_removed_view_comes_back_without_computing(home: Path) -> None:
    rows = by_digest(opened(home))
    remove_view("data", home / "cache")
    result = extract(home, views=2, augment=STEPS)
    assert result.computed == 0 and by_digest(View(result.view)) == rows


def test_merge_takes_copies_along_and_tells_views_apart_by_them(home: Path) -> None:
    extract(home, "here", views=1, augment=STEPS)
    (done,) = merge(home / "cache", home / "here")
    assert [(view.what, view.here) for view in done.views] == [("renamed", "data-2")] and done.rows == 2 * TRAIN
    assert by_digest(opened(home, "here", "data-2")) == by_digest(opened(home))
    (again_,) = merge(home / "cache", home / "here")
    assert [view.what for view in again_.views] == ["here"] and again_.rows == 0


def damage(view: View, row: int, output: str) -> None:
    """One bit of the features of a row."""
    file, number = View(view.path, copies=True).stored(output).index[row]
    entry = view.files[file]
    flip(view.store / entry["path"].decode(), int(entry["offset"]) + int(number) * view.layout(output).row_bytes)


def test_repair_computes_a_copy_again(home: Path) -> None:
    view, rows = opened(home), by_digest(opened(home))
    copy = int(view.copies(view.split("train"))[2, 1])
    damage(view, copy, "tokens")
    (damaged,) = verify(home / "cache").damages
    assert damaged.rows == ((view.ids[view.split("train")[2]], "tokens"),)
    (done,) = repair(home / "cache")
    assert (done.computed, done.gone, done.left) == (1, (), ()) and verify(home / "cache").damages == ()
    assert by_digest(opened(home)) == rows


def test_repair_leaves_out_a_copy_whose_image_is_gone_and_says_which(home: Path) -> None:
    view = opened(home)
    row = int(view.split("train")[2])
    name = view.ids[row]
    damage(view, int(view.copies([row])[0, 1]), "tokens")
    (home / "data" / name).unlink()
    (stopped,) = repair(home / "cache")
    assert stopped.gone == ((name, f"{home}/data has no image of this name any more"),) and stopped.left
    (done,) = repair(home / "cache", drop=True)
    view = opened(home)
    assert done.left == () and len(view) == N and view.rows == N + 2 * TRAIN - 1
    assert view.failed == [{"id": name, "reason": f"its augmented copy 1: {stopped.gone[0][1]}"}]
    assert (view.copies([row])[0] == row).tolist() == [True, True, False]
    assert verify(home / "cache").damages == ()


def test_repair_leaves_no_copy_of_an_image_that_left(home: Path) -> None:
    view = opened(home)
    row = int(view.split("train")[2])
    name = view.ids[row]
    damage(view, row, "tokens")
    (home / "data" / name).unlink()
    repair(home / "cache", drop=True)
    view = opened(home, copies=True)
    assert name not in view.ids and [entry["id"] for entry in view.failed] == [name]
    assert len(view) == N - 1 + 2 * (TRAIN - 1) and verify(home / "cache").damages == ()


def test_a_view_read_while_compact_moves_its_rows(home: Path) -> None:
    (home / "data" / "test" / "ill" / "0.png").unlink()
    extract(home)
    view = opened(home)
    copies = view.copies(view.split("train"))
    compact("data", home / "cache")
    assert torch.equal(view.tensor("cls", copies.ravel()), opened(home).tensor("cls", copies.ravel()))


@pytest.mark.parametrize("ending", [".h5", ".npz", ".parquet", ".safetensors"])
def test_an_export_has_the_images_and_asked_for_the_copies(home: Path, ending: str) -> None:
    outputs = ["--outputs", "cls"]
    plain, all_ = home / f"plain{ending}", home / f"all{ending}"
    code, said = run("export", "data", plain, *outputs, "--cache", home / "cache")
    assert code == 0 and "10 rows" in said and "12 augmented copies; --copies exports them too" in said
    code, said = run("export", "data", all_, *outputs, "--copies", "--cache", home / "cache")
    assert code == 0 and "22 rows" in said
    if ending == ".parquet":
        return
    done = featurecache.import_view(plain, "back", cache=home / "imported")
    assert done.rows == N and torch.equal(View(done.view).tensor("cls"), opened(home).tensor("cls"))
    with pytest.raises(SourceError, match="was exported with augmented copies"):
        featurecache.import_view(all_, "back2", cache=home / "imported")


def test_there_are_no_copies_to_export(home: Path) -> None:
    extract(home, views=0)
    code, said = run("export", "data", home / "x.h5", "--copies", "--cache", home / "cache")
    assert code == 2 and "has no augmented copies" in said


def test_a_copied_view_computes_new_images_like_any_other(home: Path) -> None:
    view = opened(home)
    data = (home / "data" / view.ids[0]).read_bytes()
    rows, failed = canary.compute([data], like=view, output="cls")
    assert not failed and torch.equal(rows, view.tensor("cls", [0]))


# files that lie


def changed(home: Path, key: str, values) -> View:  # type: ignore[no-untyped-def]
    path = opened(home).path

    def change(file: h5py.File) -> None:
        column = file[key].asstr()[:] if key == "ids" else file[key][:]
        del file[f"index/text/{key}" if key == "ids" else key]
        if key == "ids":
            write_texts(file, key, values(column))
        else:
            file.create_dataset(key, data=values(column))

    rewrite(path, change)
    return View(path, columns_only=True)


def last(column: np.ndarray, value: object) -> np.ndarray:
    column[-1] = value
    return column


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("versions", lambda column: column[::-1]),
        ("versions", lambda column: last(column, 3)),
        ("versions", lambda column: last(column, -1)),
        ("versions", lambda column: np.ones_like(column)),
        ("ids", lambda column: last(column, "elsewhere.png")),
    ],
    ids=["copies first", "more than said", "negative", "no images", "copy of nothing"],
)
def test_a_view_whose_copies_do_not_fit_is_refused(home: Path, key: str, values) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CacheError, match="its augmented copies are not those of its images"):
        changed(home, key, values)


def test_copies_of_other_images_than_said_are_found(home: Path) -> None:
    view = changed(home, "ids", lambda column: np.concatenate([column[:N], column[N:][::-1]]))
    with pytest.raises(CacheError, match="of other images than it says"):
        view.copies()
    (damaged,) = verify(home / "cache").damages
    assert damaged.path == view.path


@pytest.mark.parametrize(
    "record",
    [
        "[]", "{}", '{"views": 2}', '{"views": 0, "augment": {}}', '{"views": true, "augment": {}}',
        '{"views": 2, "augment": {"rules": 9, "seed": 0, "steps": [{"step": "flip", "probability": 0.5}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": [{"step": "flip", "probability": 0.4}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": -1, "steps": [{"step": "flip", "probability": 0.5}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": [{"step": "melt"}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": 5}}',
    ],
)  # fmt: skip
def test_a_record_of_copies_that_nobody_here_could_make_is_refused(home: Path, record: str) -> None:
    path = opened(home).path
    rewrite(path, lambda file: file.attrs.modify("augmentation", record))
    with pytest.raises(CacheError):
        View(path, columns_only=True)


def test_copies_without_a_word_on_how_they_were_made_are_refused(home: Path) -> None:
    path = opened(home).path
    rewrite(path, lambda file: file.attrs.__delitem__("augmentation"))
    with pytest.raises(CacheError, match="its augmented copies"):
        View(path, columns_only=True)


# what is typed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flop", 'no step is called "flop". Near: flip'),
        ("flip,rotate", "behind rotate stands a number (degrees) above 0 and at most 180, such as rotate10"),
        ("rotate200", "at most 180"),
        ("shift1.5", "at most 0.99"),
        ("shift0", "above 0"),
        ("flip2", "flip takes no number"),
        ("flip,vflip,flip", "flip stands there twice"),
        ("", "names no step"),
        (" , ", "names no step"),
        ("rotate-5", '"rotate-5" is no step'),
        ("rotate1e2", '"rotate1e2" is no step'),
    ],
)
def test_steps_that_are_not_understood(text: str, words: str) -> None:
    with pytest.raises(BadOption) as error:
        parse_augmentation(text)
    assert words in str(error.value) and (
        "takes no number" in words or any(kind.form in str(error.value) for kind in OPERATIONS.values())
    )


@pytest.mark.parametrize(
    ("views", "text", "seed", "words"),
    [
        (None, "flip", 0, "--augment needs the number of copies"),
        (0, "flip", 0, "--augment needs the number of copies"),
        (None, None, 3, "--augment-seed needs"),
        (2, None, 0, "--views 2 needs --augment"),
        (-1, "flip", 0, "--views is -1"),
        (10_001, "flip", 0, "from 0 to 10,000"),
        (1, "flip", -1, "--augment-seed is -1"),
    ],
)
def test_options_that_contradict_each_other(views: int | None, text: str | None, seed: int, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        augmentation_of(views, text, seed)


def test_a_mistake_is_found_before_anything_is_read(tmp_path: Path) -> None:
    code, said = run("extract", "--backbone", "none-there", "--data", tmp_path, "--views", 1, "--augment", "flop")
    assert code == 2 and "flip, vflip, rotate10, shift0.1, scale0.1, brightness0.2, contrast0.2" in said


def test_the_help_says_where_flips_are_wrong(home: Path) -> None:
    code, said = run("extract", "--help")
    assert code == 0 and "leave flips out where the side decides" in " ".join(said.split())
    assert augmentation.RULES == 1


# heads


def test_a_head_trains_on_copies_of_its_training_images_only(home: Path) -> None:
    from heads.task import load_features

    view = opened(home)
    train = view.split("train")
    features = load_features(view, "cls", train, view.labels, copies=True)
    assert features.versions == 3 and features.x is not None and features.x.shape == (3 * TRAIN, 32)
    assert torch.equal(features.x[TRAIN : 2 * TRAIN], view.tensor("cls", view.copies(train)[:, 1]))
    assert load_features(view, "cls", train, view.labels).versions == 1
