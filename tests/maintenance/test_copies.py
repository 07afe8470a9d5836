"""What a cache with augmented copies goes through: clearing up, merging, repair, export, and files that lie."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.copied_home import (
    STEPS,
    TRAIN,
    N,
    by_digest,
    copy_home,
    damages,
    extract,
    opened,
    run,
    view_path,
)
from support.plant import flip, rewrite

import featurecache
from featurecache.errors import CacheError, SourceError
from featurecache.files.hdf5 import write_texts
from featurecache.images.augmentation import AugmentedCopies, parse_augmentation
from featurecache.maintenance.collect import collect, compact
from featurecache.maintenance.merge import merge
from featurecache.maintenance.repair import repair
from featurecache.store.view import View


@pytest.fixture
def home(home_with_copies, tmp_path) -> Path:
    return copy_home(home_with_copies, tmp_path)


# what a cache goes through


def test_gc_and_compact_keep_copies_and_free_them_when_nobody_names_them(home):
    rows = by_digest(opened(home))
    assert collect(home / "cache", delete=True).bytes == 0
    compact("data", home / "cache")
    assert by_digest(opened(home)) == rows and damages(home) == ()
    assert opened(home).augmented == AugmentedCopies(parse_augmentation(STEPS), 2)
    extract(home, copies=1, augment=STEPS)
    freed = collect(home / "cache", delete=True)
    assert {unused.output: unused.rows for unused in freed.stores[0].outputs} == {"cls": TRAIN, "tokens": TRAIN}
    assert by_digest(opened(home)).items() < rows.items() and damages(home) == ()


def test_merge_takes_copies_along_and_tells_views_apart_by_them(home):
    extract(home, "here", copies=1, augment=STEPS)
    (first,) = merge(home / "cache", home / "here")
    assert [(view.what, view.here) for view in first.views] == [("renamed", "data-2")] and first.rows == 2 * TRAIN
    assert by_digest(opened(home, "here", "data-2")) == by_digest(opened(home))
    (second,) = merge(home / "cache", home / "here")
    assert [view.what for view in second.views] == ["here"] and second.rows == 0


def damage(home: Path, copy: int, output: str = "tokens") -> tuple[str, int]:
    """One bit of the features of a training image (0) or a copy of it; the name and row of the image."""
    view = opened(home)
    row = int(view.split("train")[2])
    file, number = View(view.path, copies=True).stored(output).index[view.copies([row])[0, copy]]
    entry = view.files[file]
    flip(view.store / entry["path"].decode(), int(entry["offset"]) + int(number) * view.info(output).row_bytes)
    return view.ids[row], row


def test_repair_computes_a_copy_again(home):
    rows = by_digest(opened(home))
    name, _ = damage(home, copy=1)
    assert [damaged.rows for damaged in damages(home)] == [((name, "tokens"),)]
    (done,) = repair(home / "cache")
    assert (done.computed, done.gone, done.left) == (1, (), ()) and damages(home) == ()
    assert by_digest(opened(home)) == rows


def test_repair_leaves_out_a_copy_whose_image_is_gone_and_says_which(home):
    name, row = damage(home, copy=1)
    (home / "data" / name).unlink()
    (stopped,) = repair(home / "cache")
    assert stopped.gone == ((name, f"{home}/data has no image of this name any more"),) and stopped.left
    (done,) = repair(home / "cache", drop=True)
    view = opened(home)
    assert done.left == () and len(view) == N and view.rows == N + 2 * TRAIN - 1
    assert view.failed == [{"id": name, "reason": f"its augmented copy 1: {stopped.gone[0][1]}"}]
    assert (view.copies([row])[0] == row).tolist() == [True, True, False]
    assert damages(home) == ()


def test_repair_leaves_no_copy_of_an_image_that_left(home):
    name, _ = damage(home, copy=0)
    (home / "data" / name).unlink()
    repair(home / "cache", drop=True)
    view = opened(home, copies=True)
    assert name not in view.ids and [entry["id"] for entry in view.failed] == [name]
    assert len(view) == N - 1 + 2 * (TRAIN - 1) and damages(home) == ()


@pytest.mark.parametrize("ending", [".h5", ".npz", ".parquet", ".safetensors"])
def test_an_export_has_the_images_and_asked_for_the_copies(home, ending):
    plain, all_ = home / f"plain{ending}", home / f"all{ending}"
    options = ["--outputs", "cls", "--cache", home / "cache"]
    text = run("export", "data", plain, *options)
    assert "10 rows" in text and "12 augmented copies; --copies exports them too" in text
    assert "22 rows" in run("export", "data", all_, "--copies", *options)
    if ending == ".parquet":
        return
    done = featurecache.import_view(plain, "back", cache=home / "imported")
    assert done.rows == N and torch.equal(View(done.view).tensor("cls"), opened(home).tensor("cls"))
    with pytest.raises(SourceError, match="was exported with augmented copies"):
        featurecache.import_view(all_, "back2", cache=home / "imported")


# files that lie


def change_column(home: Path, key: str, values) -> View:
    def change(file: h5py.File) -> None:
        column = file[key].asstr()[:] if key == "ids" else file[key][:]
        del file[f"index/text/{key}" if key == "ids" else key]
        if key == "ids":
            write_texts(file, key, values(column))
        else:
            file.create_dataset(key, data=values(column))

    rewrite(view_path(home), change)
    return View(view_path(home), columns_only=True)


def last(value: object):
    return lambda column: [*column[:-1], type(column[0])(value)]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("versions", lambda column: column[::-1]), ("versions", last(3)), ("versions", last(-1)),
        ("versions", np.ones_like), ("ids", last("elsewhere.png")),
    ],
    ids=["copies first", "more than said", "negative", "no images", "copy of nothing"],
)  # fmt: skip
def test_a_view_whose_copies_do_not_fit_is_refused(home, key, values):
    with pytest.raises(CacheError, match="its augmented copies are not those of its images"):
        change_column(home, key, values)


def test_copies_of_other_images_than_said_are_found(home):
    view = change_column(home, "ids", lambda column: np.concatenate([column[:N], column[N:][::-1]]))
    with pytest.raises(CacheError, match="of other images than it says"):
        view.copies()
    assert [damaged.path for damaged in damages(home)] == [view.path]


@pytest.mark.parametrize(
    "record",
    [
        "[]", "{}", '{"views": 2}', '{"views": 0, "augment": {}}', '{"views": true, "augment": {}}',
        '{"views": 2, "augment": {"rules": 9, "seed": 0, "steps": [{"step": "flip", "probability": 0.5}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": [{"step": "flip", "probability": 0.4}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": -1, "steps": [{"step": "flip", "probability": 0.5}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": [{"step": "melt"}]}}',
        '{"views": 2, "augment": {"rules": 1, "seed": 0, "steps": 5}}', None,
    ],
)  # fmt: skip
def test_a_record_of_copies_that_is_missing_or_that_nobody_here_could_make_is_refused(home, record):
    def change(file: h5py.File) -> None:
        del file.attrs["augmentation"]
        if record:
            file.attrs["augmentation"] = record

    rewrite(view_path(home), change)
    with pytest.raises(CacheError):
        View(view_path(home), columns_only=True)
