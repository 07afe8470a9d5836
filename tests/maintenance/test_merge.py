"""merge: rows and views of another cache, which is never changed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from support.builders import CLS, add_shard, add_view, digests, features, make_store, make_view
from support.caches import add_shifted, files, is_whole, rows_in, shards
from support.plant import flip

import featurecache
from featurecache.errors import BadOption, NotInCache
from featurecache.extraction import canary
from featurecache.files.locks import shared_lock
from featurecache.maintenance.merge import merge
from featurecache.store.shards import Layout, read_shard
from featurecache.store.store import open_store


@pytest.fixture
def two(tmp_path):
    """Here images 0-7, there 4-11 of the same fingerprint under another folder name, and a store that is only there."""
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, range(8), name="mine")
    make_view(there, range(4, 12), name="theirs")
    (there / next(there.iterdir()).name).rename(there / "vit-of-their-own")
    add_shard(make_store(there, "else", weights={"random_seed": 7}), [1], CLS)
    return here, there


def test_rows_and_views_of_the_other_cache_are_taken_and_it_is_not_changed(two):
    here, there = two
    before, plan = files(there), '{"cpu": {"batch_size": 4, "threads": 1}}'
    store = next(here.iterdir())
    (store / "plan.json").write_text(plan)
    other, same = merge(there, here)
    assert files(there) == before
    assert (same.new, same.shards, same.rows, same.store) == (False, 2, 8, store)  # images 8-11, cls and tokens
    assert [(v.name, v.here, v.what) for v in same.views] == [("theirs", "theirs", "copied")]
    assert other.new and other.rows == 1 and (other.store / "spec.json").exists()
    assert (store / "plan.json").read_text() == plan
    is_whole(here, mine=range(8), theirs=range(4, 12))
    assert rows_in(open_store(store), "cls") == list(range(12))
    after = files(here)
    assert all(m.shards == 0 and m.complete for m in merge(there, here)) and files(here) == after


def test_a_name_that_is_taken_is_kept_or_another_is_found(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for cache, order in ((here, [0, 1]), (there, [0, 2])):
        add_view(open_store(make_view(cache, range(8), name="same").store), "set", order, [CLS])
    for _ in "ab":
        (merged,) = merge(there, here)
        named = {v.name: (v.here, v.what) for v in merged.views}
        assert named["same"] == ("same", "here") and named["set"][0] == "set-2"
    assert named["set"][1] == "here" and not (next(here.iterdir()) / "set-3.h5").exists()
    is_whole(here, **{"set": [0, 1], "set-2": [0, 2], "same": range(8)})


@pytest.mark.parametrize("what", ["pixels", "cls"])
def test_caches_whose_canaries_differ_are_not_mixed(two, what):
    here, there = two
    for folder, shift in ((next(here.iterdir()), 0), (there / "vit-of-their-own", 1)):
        pixels = torch.full((4, 3, 2, 2), 9 + (5 * shift if what == "pixels" else shift), dtype=torch.uint8)
        rows = {"cls": torch.ones(4, 4, dtype=torch.float16) + (0.1 * shift if what == "cls" else 0)}
        canary.write_canary(open_store(folder), canary.Reference(pixels, rows, {"torch": f"2.1{shift}"}))
    before = files(here)
    same = merge(there, here)[-1]
    assert not same.complete and "torch 2.10 here, 2.11 there" in same.left[0]
    assert ("saw other pixels" if what == "pixels" else "made another cls") in same.left[0]
    assert before.items() <= files(here).items() and len(rows_in(open_store(next(here.glob("tiny-*"))), "cls")) == 8


@pytest.mark.integration
def test_a_damaged_shard_is_not_taken_nor_the_view_that_needs_it(two):
    here, there = two
    victim = next(p for p in shards(there / "vit-of-their-own", "cls") if digests([9])[0] in read_shard(p, CLS).digests)
    flip(victim, read_shard(victim, CLS).offset)
    same = merge(there, here)[-1]
    assert "does not match the hash" in same.left[0] and same.views[0].what == "left" and not same.complete
    assert "4 of its rows of cls could not be copied" in same.views[0].reason
    is_whole(here, mine=range(8))


def test_rows_that_are_here_win(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, [0, 1], name="mine", layouts=[CLS])
    store = make_store(there)
    add_shifted(store, [0, 1, 2], 2**-9)
    add_view(store, "theirs", [2, 1, 0], [CLS])
    merge(there, here)
    taken = featurecache.open_view("theirs", here).array("cls")
    assert np.array_equal(taken[1:], features([1, 0], CLS)) and not np.array_equal(taken[0], features([2], CLS)[0])


@pytest.mark.parametrize("what", ["of another shape", "not readable"])
def test_an_output_that_does_not_fit_is_left(tmp_path, what):
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, range(4), layouts=[CLS], name="mine")
    path = add_shard(make_store(there), range(4, 6), Layout("cls", (6,), "float16"))
    if what == "not readable":
        path.write_bytes(b"")
    (merged,) = merge(there, here)
    said = {"of another shape": "has rows of another shape than here", "not readable": "has no shard that can be read"}
    assert "cls of" in merged.left[0] and said[what] in merged.left[0]
    is_whole(here, mine=range(4))


def test_what_is_no_other_cache_is_refused(two):
    here, there = two
    for other, error, said in (
        (here, BadOption, "is this cache itself"),
        (there / "vit-of-their-own", BadOption, "is one store; give the folder of the cache"),
        (here / "nothing", NotInCache, "there is no store in"),
    ):
        with pytest.raises(error, match=said):
            merge(other, here)


def test_a_store_that_is_not_readable_is_left_and_the_others_are_taken(two):
    here, there = two
    shutil.copytree(there / "vit-of-their-own", there / "broken")
    (there / "broken" / "spec.json").write_text("{")
    assert [m.complete for m in merge(there, here)] == [False, True, True]


def test_a_store_in_use_here_is_left(two):
    here, there = two
    with shared_lock(next(here.iterdir()), "an extraction"):
        assert "an extraction by process" in merge(there, here)[-1].left[0]
