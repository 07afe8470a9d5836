"""rm and gc: what is freed, what stays, and what a kill in the middle leaves."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from support.builders import CLS, TOKENS, add_shard, add_view, digests, features, make_store, make_view
from support.caches import add_shifted, files, is_whole, rows_in, shards, view_on
from support.command import call
from support.plant import flip

import cli
import featurecache
from featurecache.errors import BadOption, InUse, NotInCache
from featurecache.files.locks import shared_lock
from featurecache.maintenance.collect import collect, compact, remove_view
from featurecache.store.shards import Layout, ShardWriter, read_shard
from featurecache.store.store import open_store
from featurecache.store.view import View
from featurecache.store.write_view import rewrite_view

# --- rm


def test_a_removed_view_leaves_its_rows_and_the_other_views(tmp_path):
    view = make_view(tmp_path, range(8))
    add_view(open_store(view.store), "half", range(4), [CLS])
    before = {p: p.read_bytes() for p in shards(view.store, "cls") + shards(view.store, "tokens")}
    done = remove_view("set", tmp_path)
    assert (done.label, done.images, done.others) == ("tiny/set", 8, ("half",)) and not view.path.exists()
    assert {p: p.read_bytes() for p in before} == before
    is_whole(tmp_path, half=range(4))


def test_a_damaged_view_can_be_removed(tmp_path):
    view = make_view(tmp_path, range(4))
    view.path.write_bytes(view.path.read_bytes()[:-9])
    assert remove_view("set", tmp_path).images is None and not view.path.exists()


def test_only_views_are_removed(tmp_path):
    view = make_view(tmp_path, range(4))
    mine = tmp_path / "mine.h5"
    mine.write_text("dear")
    for path in (mine, shards(view.store, "cls")[0]):
        with pytest.raises(BadOption, match="is no view in a store"):
            remove_view(path, tmp_path)
        assert path.exists()


@pytest.mark.parametrize("attempt", [remove_view, compact])
def test_nothing_is_removed_under_a_running_extraction(tmp_path, attempt):
    view = make_view(tmp_path, range(4))
    with shared_lock(view.store, "an extraction"), pytest.raises(InUse, match="an extraction by process"):
        attempt("set", tmp_path)
    is_whole(tmp_path, set=range(4))


# --- gc


def test_the_dry_run_counts_and_changes_nothing(tmp_path):
    store = open_store(make_view(tmp_path, range(8)).store)
    whole = add_shard(store, range(20, 24), CLS)
    add_view(store, "part", [0, 1, 2, 3, 4], [CLS])
    remove_view("set", tmp_path)
    before = files(tmp_path)
    done = collect(tmp_path)
    assert files(tmp_path) == before and not done.deleted
    cls, tokens = done.stores[0].outputs
    assert (cls.output, cls.shards, cls.rows, cls.bytes) == ("cls", 1, 7, whole.stat().st_size + 3 * CLS.row_bytes)
    assert (tokens.shards, tokens.rows) == (2, 8)
    assert tokens.bytes == sum(p.stat().st_size for p in shards(store, "tokens"))


def test_rows_that_no_view_names_go_and_the_others_keep_their_bytes(tmp_path):
    store = open_store(make_view(tmp_path, range(12)).store)
    add_view(store, "part", [0, 1, 2, 3, 5, 5, 7], [CLS, TOKENS])
    add_view(store, "few", [7, 0], [CLS])
    (whole,) = (p for p in shards(store, "cls") if (read_shard(p, CLS).digests == digests(range(4))).all())
    time = whole.stat().st_mtime_ns
    remove_view("set", tmp_path)
    assert collect(tmp_path, delete=True).bytes > 0
    assert rows_in(store, "cls") == rows_in(store, "tokens") == [0, 1, 2, 3, 5, 7]
    assert whole.stat().st_mtime_ns == time
    is_whole(tmp_path, part=[0, 1, 2, 3, 5, 5, 7], few=[7, 0])
    assert collect(tmp_path).bytes == 0


def test_a_view_of_derived_tokens_needs_nothing_of_the_tokens_and_gc_says_so(tmp_path):
    store, derived = make_store(tmp_path), Layout("tokens-7", (7, 4), "float16")
    for layout in (TOKENS, derived):
        add_shard(store, range(4), layout)
    add_view(store, "set", range(4), [derived])
    (unused,) = collect(tmp_path, delete=True).stores[0].outputs
    assert (unused.output, unused.rows, unused.derived) == ("tokens", 4, ("tokens-7",))
    assert not store.folder("tokens").exists() and len(featurecache.open_view("set", tmp_path).array("tokens-7")) == 4


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("view", "set.h5 has "),
        ("shard", "it was written with"),
        ("row gone", "No shard has 4 rows of cls that views name"),
        ("every shard", "no shard of cls in "),
    ],
)
def test_a_store_in_which_something_cannot_be_read_is_left_alone(tmp_path, what, said):
    view = make_view(tmp_path, range(8))
    add_view(open_store(view.store), "half", range(4), [CLS])
    if what == "every shard":
        view.path.unlink(), (view.store / "half.h5").unlink()
    for victim in [view.path] if what == "view" else shards(view.store, "cls")[: 9 if what == "every shard" else 1]:
        victim.unlink() if what == "row gone" else victim.write_bytes(victim.read_bytes()[:-9])
    before = files(tmp_path)
    (garbage,) = collect(tmp_path, delete=True).stores
    assert garbage.left and said in garbage.left and files(tmp_path) == before


@pytest.mark.integration
def test_a_damaged_row_is_not_given_a_new_checksum(tmp_path):
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
def test_of_two_copies_none_goes_while_the_one_that_stays_is_damaged(tmp_path):
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


@pytest.mark.parametrize(("there", "shifted"), [([0, 1], [1, 0, 9]), ([0, 1, 2], [0, 1])])
def test_rows_of_one_image_with_other_bytes_are_not_exchanged(tmp_path, there, shifted):
    """Also where the place of the shard to be written is taken by one with other bytes."""
    store = make_store(tmp_path)
    add_shard(store, there, CLS)
    view = add_view(store, "old", [0, 1], [CLS])
    view_on(view, store, "new", add_shifted(store, shifted, 0.25))
    collect(tmp_path, delete=True)
    new = featurecache.open_view("new", tmp_path).array("cls")
    assert np.array_equal(new, features([0, 1], CLS) + np.float16(0.25))
    is_whole(tmp_path, old=[0, 1])


def test_an_empty_store_goes_with_its_folder_unless_strangers_lie_in_it(tmp_path):
    one, two = make_store(tmp_path), make_store(tmp_path, weights={"random_seed": 1})
    for store in (one, two):
        add_shard(store, range(4), CLS)
        (store.path / "plan.json").write_text('{"cpu": {"batch_size": 4, "threads": 1}}')
    (two.path / "notes.txt").write_text("mine")
    garbage = {each.store: each for each in collect(tmp_path, delete=True).stores}
    assert garbage[one.path].folder and not one.path.exists()
    assert garbage[two.path].others == ("notes.txt",) and not garbage[two.path].folder
    assert sorted(p.name for p in two.path.iterdir()) == ["notes.txt", "plan.json", "spec.json"]


def test_drafts_of_the_dead_are_listed_and_those_of_the_living_stay(tmp_path):
    view = make_view(tmp_path, range(4))
    dead = view.store / "cls" / ".0123456789abcdef.01234567.tmp"
    dead.write_bytes(bytes(100))
    writer = ShardWriter(view.store, digests([9]), CLS, {})
    done = collect(tmp_path)
    assert (done.drafts, done.draft_bytes) == ((dead,), 100) and dead.exists()
    collect(tmp_path, delete=True)
    assert not dead.exists() and len(list(view.store.glob("cls/.*.tmp"))) == 1
    writer.close()


# --- a view on other rows


def test_a_view_on_other_rows_keeps_its_time_and_says_which_rows_it_lost(tmp_path):
    view = make_view(tmp_path, range(4), layouts=(CLS,))
    os.utime(view.path, ns=(5, 5))
    store, opened = open_store(view.store), View(view.path, columns_only=True, copies=True)
    lost = digests([2])[0]
    path = rewrite_view(opened, store, {CLS: store.locate(CLS, opened.digests)}, name="less", lost={lost: "it is gone"})
    less = View(path)
    assert path.name == "less.h5" and path.stat().st_mtime_ns == 5
    assert less.failed == [{"id": opened.ids[2], "reason": "it is gone"}] and len(less) == 3
    assert np.array_equal(less.array("cls"), features([0, 1, 3], CLS))


def test_a_view_is_not_written_on_rows_that_are_nowhere(tmp_path):
    view = make_view(tmp_path, range(4), layouts=(CLS,))
    opened, before = View(view.path, columns_only=True, copies=True), view.path.read_bytes()
    nowhere = open_store(view.store).locate(CLS, digests([0, 1, 2, 99]))
    with pytest.raises(NotInCache, match="1 rows of cls of tiny/set lie in no shard"):
        rewrite_view(opened, open_store(view.store), {CLS: nowhere})
    assert view.path.read_bytes() == before


# --- the command line


def test_from_rm_to_gc_by_the_command_line(tmp_path):
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


def test_rm_says_what_gc_would_free(tmp_path):
    view = make_view(tmp_path, range(8))
    add_view(open_store(view.store), "half", range(4), [CLS])
    told = call("rm", "half", "--yes", "--cache", tmp_path)
    assert "remains    its rows: other views name them all\n" in told.stdout and "featurecache ls" in told.stderr
    add_view(open_store(view.store), "half", range(4), [CLS])
    size = json.loads(call("rm", "set", "--yes", "--json", "--cache", tmp_path).stdout)["bytes"]
    assert size == 4 * CLS.row_bytes + 8 * TOKENS.row_bytes
    (garbage,) = collect(tmp_path).stores
    assert [rows.rows for rows in garbage.outputs] == [4, 8]
    assert call("rm", "half", "--yes", "--cache", tmp_path).stdout.endswith(
        f"remains    {4 * CLS.row_bytes} B that no other view names, until featurecache gc --delete\n"
    )


def test_gc_names_derived_rows_only_where_a_view_keeps_them_alone(tmp_path):
    store = open_store(make_view(tmp_path, range(8)).store)
    add_view(store, "half", range(4), [CLS, TOKENS])
    remove_view("set", tmp_path)
    assert [rows.derived for rows in collect(tmp_path).stores[0].outputs] == [(), ()]


def test_gc_that_leaves_a_store_alone_does_not_end_with_zero(tmp_path):
    with shared_lock(make_view(tmp_path, range(4)).store, "an extraction"):
        left = call("gc", "--delete", "--cache", tmp_path)
    assert left.exit_code == 1 and "left alone: " in left.stdout


def test_rm_asks_at_a_terminal(tmp_path, monkeypatch):
    view = make_view(tmp_path, range(4))
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    done = CliRunner().invoke(cli.main, ["rm", "set", "--cache", str(tmp_path)], input="n\n")
    assert done.exit_code == 1 and view.path.exists() and "remove " in done.stderr
    assert call("rm", "set", "--yes", "--cache", tmp_path).exit_code == 0 and not view.path.exists()
