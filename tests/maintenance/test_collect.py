"""rm, gc, compact, merge: what is freed, what stays, and what a kill in the middle leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.builders import CLS, TOKENS, add_shard, add_view, digests, features, make_store, make_view
from support.command import call
from support.plant import flip

import cli
import featurecache
from featurecache.errors import BadOption, CacheError, CannotWrite, DamagedFile, InUse, NotInCache
from featurecache.extraction import canary
from featurecache.files.locks import shared_lock
from featurecache.maintenance import collect as collecting
from featurecache.maintenance.collect import collect, compact, remove_view
from featurecache.maintenance.merge import merge
from featurecache.maintenance.verify import verify
from featurecache.store.shards import Layout, ShardWriter, find_by_key, read_shard, row_keys
from featurecache.store.store import Store, open_store
from featurecache.store.view import View
from featurecache.store.write_view import columns_of, rewrite_view, write_view

LAYOUTS = {"cls": CLS, "tokens": TOKENS}


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def shards(store: Path | Store, output: str) -> list[Path]:
    return sorted((store.path if isinstance(store, Store) else store).glob(f"{output}/*.h5"))


def rows_in(store: Store, output: str) -> list[int]:
    """Images whose rows lie in the shards, with repeats; each row is whole, and its rounding error its own."""
    found: list[int] = []
    for path in shards(store, output):
        shard = read_shard(path, LAYOUTS[output])
        numbers = [int(digest, 16) for digest in shard.digests.tolist()]
        with h5py.File(path) as file:
            assert np.array_equal(file["features"][...], features(numbers, LAYOUTS[output]))
        assert np.allclose(shard.errors, np.array(numbers) / 1000)
        assert shard.notes["fingerprint"] == store.fingerprint
        found += numbers
    return found


def is_whole(cache: Path, **orders: Sequence[int]) -> None:
    """Nothing is damaged, no draft lies about, and each view has the rows of its images."""
    assert verify(cache).damages == () and list(cache.rglob("*.tmp")) == []
    for name, order in orders.items():
        view = featurecache.open_view(name, cache)
        assert view.digests.tolist() == digests(order).tolist()
        for output in view.outputs:
            assert np.array_equal(view.array(output), features(order, LAYOUTS[output]))


def at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, count: int, action: Callable[[], None]) -> None:
    """Do ``action`` instead of the call of this number."""
    real, seen = getattr(owner, name), [0]

    def guarded(*words, **options):  # type: ignore[no-untyped-def]
        seen[0] += 1
        if seen[0] == count:
            action()
        return real(*words, **options)

    monkeypatch.setattr(owner, name, guarded)


def kill() -> None:
    raise Killed


# --- rm


def test_a_removed_view_leaves_its_rows_and_the_other_views(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(8))
    add_view(open_store(view.store), "half", range(4), [CLS])
    before = {p: p.read_bytes() for p in shards(view.store, "cls") + shards(view.store, "tokens")}
    done = remove_view("set", tmp_path)
    assert (done.label, done.images, done.others) == ("tiny/set", 8, ("half",)) and not view.path.exists()
    assert {p: p.read_bytes() for p in before} == before
    is_whole(tmp_path, half=range(4))


def test_a_damaged_view_can_be_removed(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4))
    view.path.write_bytes(view.path.read_bytes()[:-9])
    assert remove_view("set", tmp_path).images is None and not view.path.exists()


def test_only_views_are_removed(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4))
    mine = tmp_path / "mine.h5"
    mine.write_text("dear")
    for path in (mine, shards(view.store, "cls")[0]):
        with pytest.raises(BadOption, match="is no view in a store"):
            remove_view(path, tmp_path)
        assert path.exists()


def test_nothing_is_removed_under_a_running_extraction(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4))
    with shared_lock(view.store, "an extraction"):
        for attempt in (lambda: remove_view("set", tmp_path), lambda: compact("set", tmp_path)):
            with pytest.raises(InUse, match="an extraction by process"):
                attempt()
    is_whole(tmp_path, set=range(4))


# --- gc


def test_the_dry_run_counts_and_changes_nothing(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(8))
    store = open_store(view.store)
    add_shard(store, range(20, 24), CLS)
    add_view(store, "part", [0, 1, 2, 3, 4], [CLS])
    remove_view("set", tmp_path)
    before = files(tmp_path)
    found = collect(tmp_path)
    assert files(tmp_path) == before and not found.deleted
    (garbage,) = found.stores
    cls, tokens = garbage.outputs
    whole = next(p for p in shards(store, "cls") if (read_shard(p, CLS).digests == digests(range(20, 24))).all())
    assert (cls.output, cls.shards, cls.rows, cls.bytes) == ("cls", 1, 7, whole.stat().st_size + 3 * CLS.row_bytes)
    assert (tokens.shards, tokens.rows) == (2, 8)
    assert tokens.bytes == sum(p.stat().st_size for p in shards(store, "tokens"))


def test_rows_that_no_view_names_go_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(12))
    store = open_store(view.store)
    add_view(store, "part", [0, 1, 2, 3, 5, 5, 7], [CLS, TOKENS])
    add_view(store, "few", [7, 0], [CLS])
    whole = (
        shards(store, "cls")[0]
        if (read_shard(shards(store, "cls")[0], CLS).digests == digests(range(4))).all()
        else None
    )
    remove_view("set", tmp_path)
    first = collect(tmp_path, delete=True)
    assert sorted(rows_in(store, "cls")) == sorted(rows_in(store, "tokens")) == [0, 1, 2, 3, 5, 7]
    assert whole is None or whole.exists()
    is_whole(tmp_path, part=[0, 1, 2, 3, 5, 5, 7], few=[7, 0])
    assert first.bytes > 0 and collect(tmp_path).bytes == 0


def test_a_view_of_derived_tokens_needs_nothing_of_the_tokens_and_gc_says_so(tmp_path: Path) -> None:
    make = Layout("tokens-7", (7, 4), "float16")
    store = make_store(tmp_path)
    for layout in (TOKENS, make):
        add_shard(store, range(4), layout)
    add_view(store, "set", range(4), [make])
    (unused,) = collect(tmp_path, delete=True).stores[0].outputs
    assert (unused.output, unused.rows, unused.derived) == ("tokens", 4, ("tokens-7",))
    assert not store.folder("tokens").exists() and len(featurecache.open_view("set", tmp_path).array("tokens-7")) == 4


def test_what_a_running_extraction_has_committed_stays(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add_shard(store, range(4), CLS)  # no view names it yet
    with shared_lock(store.path, "an extraction"):
        (garbage,) = collect(tmp_path, delete=True).stores
    assert garbage.left and "is in use: an extraction by process" in garbage.left
    assert rows_in(store, "cls") == [0, 1, 2, 3]


@pytest.mark.parametrize("what", ["view", "shard", "row gone"])
def test_a_store_in_which_something_cannot_be_read_is_left_alone(tmp_path: Path, what: str) -> None:
    view = make_view(tmp_path, range(8))
    add_view(open_store(view.store), "half", range(4), [CLS])
    victim = view.path if what == "view" else shards(view.store, "cls")[0]
    if what == "row gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-9])
    before = files(tmp_path)
    (garbage,) = collect(tmp_path, delete=True).stores
    assert garbage.left and files(tmp_path) == before


@pytest.mark.integration
def test_a_damaged_row_is_not_given_a_new_checksum(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(8), layouts=[CLS])
    add_view(open_store(view.store), "part", [0, 5], [CLS])
    remove_view("set", tmp_path)
    for path in shards(view.store, "cls"):
        flip(path, read_shard(path, CLS).offset + 1)
        flip(path, read_shard(path, CLS).offset + CLS.row_bytes + 1)
    before = files(tmp_path)
    (garbage,) = collect(tmp_path, delete=True).stores
    assert garbage.left and "damaged" in garbage.left and files(tmp_path) == before


@pytest.mark.integration
def test_of_two_copies_none_goes_while_the_one_that_stays_is_damaged(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    whole, other = add_shard(store, [0, 1], CLS), add_shard(store, [0, 1, 2], CLS)
    add_view(store, "set", [0, 1], [CLS])
    flip(whole, read_shard(whole, CLS).offset)
    (garbage,) = collect(tmp_path, delete=True).stores
    assert garbage.left and whole.exists() and other.exists()
    flip(whole, read_shard(whole, CLS).offset)
    collect(tmp_path, delete=True)
    assert shards(store, "cls") == [whole]
    is_whole(tmp_path, set=[0, 1])


def test_rows_of_one_image_with_other_bytes_are_not_exchanged(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add_shard(store, [0, 1], CLS)
    add_view(store, "old", [0, 1], [CLS])
    writer = ShardWriter(store.path, digests([1, 0, 9]), CLS, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests([1, 0, 9])], features([1, 0, 9], CLS) + np.float16(0.25))
    writer.commit()
    old = {p: p.stat().st_mtime_ns for p in shards(store, "cls")}
    other = next(p for p in old if (read_shard(p, CLS).checksums != read_shard(p, CLS).checksums[0]).sum() == 2)
    places = find_by_key([read_shard(other, CLS)], row_keys(digests([0, 1]), read_shard(other, CLS).checksums[[1, 0]]))
    view = featurecache.open_view("old", tmp_path)
    write_view(store, "new", columns_of(view), view.attributes, {CLS: places})
    kept = featurecache.open_view("new", tmp_path).array("cls")
    assert not np.array_equal(kept, view.array("cls"))
    collect(tmp_path, delete=True)
    assert np.array_equal(featurecache.open_view("new", tmp_path).array("cls"), kept)
    is_whole(tmp_path, old=[0, 1])


def test_a_shard_whose_place_is_taken_by_other_bytes_stays_as_it_is(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add_shard(store, [0, 1, 2], CLS)
    add_view(store, "old", [0, 1], [CLS])
    writer = ShardWriter(store.path, digests([0, 1]), CLS, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests([0, 1])], features([0, 1], CLS) + np.float16(0.25))
    new = read_shard(writer.commit() or tmp_path, CLS)
    view = featurecache.open_view("old", tmp_path)
    places = find_by_key([new], row_keys(new.digests, new.checksums))
    write_view(store, "new", columns_of(view), view.attributes, {CLS: places})
    collect(tmp_path, delete=True)
    assert np.array_equal(
        featurecache.open_view("new", tmp_path).array("cls"), features([0, 1], CLS) + np.float16(0.25)
    )
    is_whole(tmp_path, old=[0, 1])


def test_an_empty_store_goes_with_its_folder_unless_strangers_lie_in_it(tmp_path: Path) -> None:
    one, two = make_store(tmp_path), make_store(tmp_path, weights={"random_seed": 1})
    for store in (one, two):
        add_shard(store, range(4), CLS)
        (store.path / "plan.json").write_text('{"cpu": {"batch_size": 4, "threads": 1}}')
    (two.path / "notes.txt").write_text("mine")
    found = {garbage.store: garbage for garbage in collect(tmp_path, delete=True).stores}
    assert found[one.path].folder and not one.path.exists()
    assert found[two.path].others == ("notes.txt",) and not found[two.path].folder
    assert sorted(p.name for p in two.path.iterdir()) == ["notes.txt", "plan.json", "spec.json"]


def test_drafts_of_the_dead_are_listed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4))
    dead = view.store / "cls" / ".0123456789abcdef.01234567.tmp"
    dead.write_bytes(bytes(100))
    writer = ShardWriter(view.store, digests([9]), CLS, {})
    found = collect(tmp_path)
    assert (found.drafts, found.draft_bytes) == ((dead,), 100) and dead.exists()
    collect(tmp_path, delete=True)
    assert not dead.exists() and len(list(view.store.glob("cls/.*.tmp"))) == 1
    writer.discard()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (ShardWriter, "commit", 1), (ShardWriter, "commit", 2), (collecting, "rewrite_view", 1),
        (collecting, "rewrite_view", 2), (Path, "unlink", 1), (Path, "unlink", 2), (collecting, "sync_path", 1),
    ],
)  # fmt: skip
def test_gc_killed_between_two_steps_loses_nothing_and_finishes_again(tmp_path, monkeypatch, owner, name, count):
    view = make_view(tmp_path, range(12))
    store = open_store(view.store)
    add_view(store, "part", [9, 0, 1, 5], [CLS, TOKENS])
    add_view(store, "few", [5, 0], [CLS])
    remove_view("set", tmp_path)
    with monkeypatch.context() as patch:
        at(patch, owner, name, count, kill)
        if name != "sync_path":
            with pytest.raises(Killed):
                collect(tmp_path, delete=True)
    for each, order in (("part", [9, 0, 1, 5]), ("few", [5, 0])):
        assert np.array_equal(featurecache.open_view(each, tmp_path).array("cls"), features(order, CLS))
    collect(tmp_path, delete=True)
    is_whole(tmp_path, part=[9, 0, 1, 5], few=[5, 0])
    assert sorted(rows_in(store, "cls")) == sorted(rows_in(store, "tokens")) == [0, 1, 5, 9]
    assert collect(tmp_path).bytes == 0


def test_gc_does_not_make_a_view_newer(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(8))
    store = open_store(view.store)
    part = add_view(store, "part", [0, 5], [CLS])
    os.utime(part.path, ns=(10**18, 10**18))
    remove_view("set", tmp_path)
    collect(tmp_path, delete=True)
    assert part.path.stat().st_mtime_ns == 10**18 and View(part.path).array("cls").shape == (2, 4)


# --- compact


@pytest.fixture
def scattered(tmp_path: Path, monkeypatch) -> Store:  # type: ignore[no-untyped-def]
    """Twelve images in three shards, a view in another order, one of other images, and rows that no view names."""
    monkeypatch.setattr("featurecache.store.store.SHARD_ROWS", 5)
    store = make_store(tmp_path)
    for layout in (CLS, TOKENS):
        for numbers in ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]):
            add_shard(store, numbers, layout)
    add_view(store, "other", [11, 1, 0], [CLS])
    add_view(store, "set", ORDER, [CLS, TOKENS])
    return store


ORDER = [9, 1, 5, 5, 0, 10, 2, 3]


def in_order(store: Store) -> None:
    view = featurecache.open_view("set", store.path.parent)
    for output in ("cls", "tokens"):
        places = view.stored(output).index
        distinct = places[[k for k, d in enumerate(ORDER) if d not in ORDER[:k]]]
        assert distinct[:, 1].tolist() == [0, 1, 2, 3, 4, 0, 1]
        assert sorted(rows_in(store, output)) == list(range(12))  # none lost, none twice, none that gc would have freed
    is_whole(store.path.parent, set=ORDER, other=[11, 1, 0])


def test_compact_puts_the_rows_in_the_order_of_the_view(scattered: Store) -> None:
    cache = scattered.path.parent
    before = featurecache.open_view("set", cache)
    done = compact("set", cache)
    in_order(scattered)
    assert done.view == "tiny/set" and done.shards == (6, 4) and done.pieces[1] < done.pieces[0] and done.written > 0
    after = featurecache.open_view("set", cache)
    assert (after.ids, after.labels.tolist(), after.splits) == (before.ids, before.labels.tolist(), before.splits)
    again = {p: p.stat().st_mtime_ns for p in cache.rglob("*.h5")}
    assert compact("set", cache).written == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.h5")} == again


@pytest.mark.integration
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        *((ShardWriter, "commit", k) for k in (1, 2, 4, 5, 8)),
        *((collecting, "rewrite_view", k) for k in (1, 2)),
        *((Path, "unlink", k) for k in (1, 3, 6)),
    ],
)
def test_compact_killed_between_two_steps_loses_nothing_and_finishes_again(scattered, monkeypatch, owner, name, count):
    cache = scattered.path.parent
    with monkeypatch.context() as patch:
        at(patch, owner, name, count, kill)
        with pytest.raises(Killed):
            compact("set", cache)
    for each, order in (("set", ORDER), ("other", [11, 1, 0])):
        assert np.array_equal(featurecache.open_view(each, cache).array("cls"), features(order, CLS))
    compact("set", cache)
    in_order(scattered)


def test_compact_stops_at_a_damaged_row_with_everything_as_it_was(scattered: Store) -> None:
    path = shards(scattered, "tokens")[1]
    flip(path, read_shard(path, TOKENS).offset + 3)
    before = files(scattered.path.parent)
    with pytest.raises(DamagedFile, match="damaged"):
        compact("set", scattered.path.parent)
    assert before.items() <= files(scattered.path.parent).items()


def test_compact_does_not_trust_a_file_that_has_the_right_name(scattered: Store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cache = scattered.path.parent
    with monkeypatch.context() as patch:
        at(patch, collecting, "rewrite_view", 1, kill)
        with pytest.raises(Killed):
            compact("set", cache)
    new = next(p for p in shards(scattered, "cls") if len(read_shard(p, CLS).digests) == 5)
    flip(new, read_shard(new, CLS).offset)
    before = files(cache)
    with pytest.raises(DamagedFile):
        compact("set", cache)
    assert files(cache) == before and np.array_equal(
        featurecache.open_view("set", cache).array("cls"), features(ORDER, CLS)
    )


def test_compact_of_a_view_whose_rows_are_gone_says_so(scattered: Store) -> None:
    shards(scattered, "tokens")[0].unlink()
    with pytest.raises(CacheError, match="is missing"):
        compact("set", scattered.path.parent)


def test_compact_asks_for_the_space_first(scattered: Store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    before = files(scattered.path.parent)
    with pytest.raises(CannotWrite, match="Free some space; nothing was changed"):
        compact("set", scattered.path.parent)
    assert files(scattered.path.parent) == before


# --- merge


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Here images 0-7, there 4-11 of the same fingerprint under another folder name, and a store that is only there."""
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, range(8), name="mine")
    make_view(there, range(4, 12), name="theirs")
    (there / next(there.iterdir()).name).rename(there / "vit-of-their-own")
    add_shard(make_store(there, "else", weights={"random_seed": 7}), [1], CLS)
    return here, there


def test_rows_and_views_of_the_other_cache_are_taken_and_it_is_not_changed(two: tuple[Path, Path]) -> None:
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
    assert sorted(rows_in(open_store(store), "cls")) == list(range(12))
    again = files(here)
    assert all(m.shards == 0 and m.complete for m in merge(there, here)) and files(here) == again


def test_a_name_that_is_taken_is_kept_or_another_is_found(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, range(8), name="same"), make_view(there, range(8), name="same")
    add_view(open_store(next(here.iterdir())), "set", [0, 1], [CLS])
    add_view(open_store(next(there.iterdir())), "set", [0, 2], [CLS])
    for _ in "ab":
        (merged,) = merge(there, here)
        named = {v.name: (v.here, v.what) for v in merged.views}
        assert named["same"] == ("same", "here") and named["set"][0] == "set-2"
    assert named["set"][1] == "here" and not (next(here.iterdir()) / "set-3.h5").exists()
    is_whole(here, **{"set": [0, 1], "set-2": [0, 2], "same": range(8)})


@pytest.mark.parametrize("what", ["pixels", "cls"])
def test_caches_whose_canaries_differ_are_not_mixed(two: tuple[Path, Path], what: str) -> None:
    here, there = two
    for folder, shift in ((next(here.iterdir()), 0), (there / "vit-of-their-own", 1)):
        pixels = torch.full((4, 3, 2, 2), 9 + (5 * shift if what == "pixels" else shift), dtype=torch.uint8)
        rows = {"cls": torch.ones(4, 4, dtype=torch.float16) + (0.1 * shift if what == "cls" else 0)}
        canary.write_canary(open_store(folder), canary.Reference(pixels, rows, {"torch": f"2.1{shift}"}))
    before = files(here)
    same = merge(there, here)[-1]
    assert not same.complete and "torch 2.10 here, 2.11 there" in same.left[0]
    assert before.items() <= files(here).items() and len(rows_in(open_store(next(here.glob("tiny-*"))), "cls")) == 8


@pytest.mark.integration
def test_a_damaged_shard_is_not_taken_nor_the_view_that_needs_it(two: tuple[Path, Path]) -> None:
    here, there = two
    victim = next(p for p in shards(there / "vit-of-their-own", "cls") if digests([9])[0] in read_shard(p, CLS).digests)
    flip(victim, read_shard(victim, CLS).offset)
    same = merge(there, here)[-1]
    assert "does not match the hash" in same.left[0] and same.views[0].what == "left" and not same.complete
    assert "4 of its rows of cls could not be copied" in same.views[0].reason
    is_whole(here, mine=range(8))


@pytest.mark.integration
@pytest.mark.parametrize("count", [2, 4])
def test_merge_interrupted_goes_on(two: tuple[Path, Path], monkeypatch, count: int) -> None:  # type: ignore[no-untyped-def]
    here, there = two
    with monkeypatch.context() as patch:
        at(patch, featurecache.files.atomic.AtomicFile, "commit", count, kill)
        with pytest.raises(Killed):
            merge(there, here)
    is_whole(here, mine=range(8))
    assert all(merged.complete for merged in merge(there, here))
    is_whole(here, mine=range(8), theirs=range(4, 12))


def test_rows_that_are_here_win(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, [0, 1], name="mine", layouts=[CLS])
    store = make_store(there)
    writer = ShardWriter(store.path, digests([0, 1, 2]), CLS, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests([0, 1, 2])], features([0, 1, 2], CLS) + np.float16(2**-9))
    writer.commit()
    add_view(store, "theirs", [2, 1, 0], [CLS])
    merge(there, here)
    taken = featurecache.open_view("theirs", here).array("cls")
    assert np.array_equal(taken[1:], features([1, 0], CLS)) and not np.array_equal(taken[0], features([2], CLS)[0])


def test_an_output_of_another_shape_is_left(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_view(here, range(4), layouts=[CLS], name="mine")
    wide = Layout("cls", (6,), "float16")
    add_shard(make_store(there), range(4, 6), wide)
    (merged,) = merge(there, here)
    assert "cls of" in merged.left[0] and "has rows of another shape than here" in merged.left[0]
    is_whole(here, mine=range(4))


def test_what_is_no_other_cache_is_refused(two: tuple[Path, Path]) -> None:
    here, there = two
    with pytest.raises(BadOption, match="is this cache itself"):
        merge(here, here)
    with pytest.raises(BadOption, match="is one store; give the folder of the cache"):
        merge(there / "vit-of-their-own", here)
    with pytest.raises(NotInCache, match="there is no store in"):
        merge(here / "nothing", here)


def test_a_store_that_is_not_readable_is_left_and_the_others_are_taken(two: tuple[Path, Path]) -> None:
    here, there = two
    shutil.copytree(there / "vit-of-their-own", there / "broken")
    (there / "broken" / "spec.json").write_text("{")
    assert [m.complete for m in merge(there, here)] == [False, True, True]


def test_a_store_in_use_here_is_left(two: tuple[Path, Path]) -> None:
    here, there = two
    with shared_lock(next(here.iterdir()), "an extraction"):
        assert "an extraction by process" in merge(there, here)[-1].left[0]


# --- the command line


def test_from_rm_to_gc_by_the_command_line(tmp_path: Path) -> None:
    here = ("--cache", tmp_path)
    make_view(tmp_path, range(8))
    removed = call("rm", "set", *here)
    assert removed.stdout.splitlines()[0] == "removed    tiny/set (8 images); it was the store's last view"
    assert removed.stderr.splitlines()[-1] == f"next       featurecache gc --cache {tmp_path}"
    listed = call("gc", *here)
    assert "the whole store" in listed.stdout and "finishing it keeps them" in listed.stdout
    assert len(list(tmp_path.glob("*/cls/*.h5"))) == 2
    freed = json.loads(call("gc", "--delete", "--json", *here).stdout)
    assert freed["deleted"] and freed["bytes"] > 0 and list(tmp_path.iterdir()) == []
    assert call("gc", *here).stdout == "every row is named by a view; nothing to free\n"


def test_gc_that_leaves_a_store_alone_does_not_end_with_zero(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4))
    with shared_lock(view.store, "an extraction"):
        left = call("gc", "--delete", "--cache", tmp_path)
    assert left.exit_code == 1 and "left alone: " in left.stdout


def test_rm_asks_at_a_terminal(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path, range(4))
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    done = CliRunner().invoke(cli.main, ["rm", "set", "--cache", str(tmp_path)], input="n\n")
    assert done.exit_code == 1 and view.path.exists() and "remove " in done.stderr
    assert call("rm", "set", "--yes", "--cache", tmp_path).exit_code == 0 and not view.path.exists()


def test_compact_export_and_merge_by_the_command_line(scattered: Store, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    cache, away = scattered.path.parent, tmp_path_factory.mktemp("away")
    assert "6 → 4 shards" in call("compact", "set", "--cache", cache).stdout
    assert "is in order already: 4 shards" in call("compact", "set", "--cache", cache).stdout
    done = json.loads(call("export", "set", away / "set.npz", "--outputs", "cls", "--json", "--cache", cache).stdout)
    assert done["rows"] == 8 and done["outputs"] == ["cls"] and (away / "set.npz").stat().st_size == done["bytes"]
    assert call("export", "set", away / "set.npz", "--cache", cache).exit_code == 2
    (merged,) = json.loads(call("merge", cache, "--cache", away / "cache", "--json").stdout)
    assert merged["new"] and merged["rows"] == 24 and {v["what"] for v in merged["views"]} == {"copied"}
    again = call("merge", cache, "--cache", away / "cache")
    assert again.exit_code == 0 and "no new rows" in again.stdout and "view set  here already" in again.stdout


# --- a view on other rows


def test_a_view_on_other_rows_keeps_its_time_and_says_which_rows_it_lost(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4), layouts=(CLS,))
    os.utime(view.path, ns=(5, 5))
    store, opened = open_store(view.store), View(view.path, columns_only=True, copies=True)
    lost = digests([2])[0]
    path = rewrite_view(opened, store, {CLS: store.locate(CLS, opened.digests)}, name="less", lost={lost: "it is gone"})
    less = View(path)
    assert path.name == "less.h5" and path.stat().st_mtime_ns == 5
    assert less.failed == [{"id": opened.ids[2], "reason": "it is gone"}] and len(less) == 3
    assert np.array_equal(less.array("cls"), features([0, 1, 3], CLS))


def test_a_view_is_not_written_on_rows_that_are_nowhere(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(4), layouts=(CLS,))
    opened, before = View(view.path, columns_only=True, copies=True), view.path.read_bytes()
    nowhere = open_store(view.store).locate(CLS, digests([0, 1, 2, 99]))
    with pytest.raises(NotInCache, match="1 rows of cls of tiny/set lie in no shard"):
        rewrite_view(opened, open_store(view.store), {CLS: nowhere})
    assert view.path.read_bytes() == before
