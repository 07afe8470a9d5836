"""A cache in object storage, against an S3-compatible server: several machines, what is fetched, conflicts, kills."""

from __future__ import annotations

import contextlib
import os

import h5py
import numpy as np
import pytest
from support.builders import CLS, ORDER, TOKENS, add_shard, add_view, features, make_store
from support.caches import killed_at
from support.command import call
from support.object_storage import BUSY, copied, machine
from support.remote_store import feature_file, key_of, make_remote

import featurecache
from featurecache.errors import BadOption, NotInCache, StorageError
from featurecache.files.mirror import is_placeholder
from featurecache.maintenance.import_features import import_view
from featurecache.maintenance.verify import verify
from featurecache.store.remote_cache import push, push_shards, version_of
from featurecache.store.shards import ShardWriter
from featurecache.store.store import cache_folder, stores
from featurecache.store.view import View

# -- what is there, and what is fetched


def test_the_bucket_copied_to_a_folder_is_the_cache(server, tmp_path):
    make_remote(server)
    cache = copied(server, tmp_path / "copy")
    assert verify(cache).damages == ()
    assert np.array_equal(featurecache.open_view("set", cache)["tokens"], features(ORDER, TOKENS))


def test_another_machine_fetches_records_at_once_and_shards_of_the_output_that_is_read(server):
    make_remote(server)
    with machine("b"):
        server.requests.clear()
        view = featurecache.open_view("set", server.address)
        assert sorted(key.rpartition("/")[2] for key in server.of("GET")) == ["set.h5", "spec.json"]
        assert np.array_equal(view["cls"], features(ORDER, CLS))
        fetched = server.of("GET")[2:]
        assert len(fetched) == len(set(fetched)) == 2 and all("/cls/" in key for key in fetched)
        featurecache.open_view("set", server.address)["cls"]
        assert len(server.of("GET")) == 4  # all of it is here now


def test_who_adds_to_a_store_fetches_no_features(server, tmp_path):
    file = feature_file(tmp_path, 50_000)
    import_view(file, "one", cache=server.address)
    with machine("b"):
        sent = []
        server.changed = lambda key, body: (sent.append(len(body)), body)[1]
        again = import_view(file, "two", cache=server.address)
        assert again.new_rows == 0 and server.of("PUT")[-1].endswith("/two.h5")
        shards = list(again.view.parent.glob("vector/*.h5"))
        assert shards and all(map(is_placeholder, shards))
        assert np.array_equal(View(again.view)["vector"], np.load(file))


def test_what_is_not_here_is_never_read_as_zeros(server, tmp_path):
    view = make_remote(server)
    with machine("b"):
        there = featurecache.open_view("set", server.address)
        for store in stores(there.store.parent):
            store.shards(CLS)  # heads, which a writer needs
        with h5py.File(there.path) as file, pytest.raises(OSError, match="signature"):
            file["cls"][:]
        assert all(is_placeholder(path) for path in there.store.glob("cls/*.h5"))
    assert view.store != there.store


def test_a_view_is_found_by_its_address_and_the_newest_is_that_of_any_machine(server):
    make_remote(server)
    with machine("b"):
        store = next(stores(cache_folder(server.address)))
        assert featurecache.open_view(f"{server.address}/{store.path.name}/set.h5").name == "set"
        assert featurecache.open_view(f"{server.address}/tiny/set").name == "set"
        add_view(store, "newer", [3, 0], [CLS])
        assert push(store.path)
    os.utime(featurecache.open_view("set", server.address).path)  # touched here, which changes nothing there
    assert featurecache.open_view("newer", server.address).name == "newer"
    with pytest.raises(NotInCache, match='there is no view "tiny/none"'):
        featurecache.open_view(f"{server.address}/tiny/none")


def test_what_was_removed_there_goes_here_too(server):
    make_remote(server)
    with machine("b"):
        featurecache.open_view("set", server.address)["cls"]
        server.remove(key_of(server, "/set.h5"))
        with pytest.raises(NotInCache):
            featurecache.open_view("set", server.address)


def test_a_file_address_is_the_folder(tmp_path, server):
    import_view(feature_file(tmp_path), "v", cache=f"file://{tmp_path}/cache")
    assert (tmp_path / "cache").is_dir() and not server.requests
    assert cache_folder(f"file://localhost{tmp_path}/cache") == tmp_path / "cache"


# -- commands


def test_commands_read_by_address_and_say_addresses(server, tmp_path):
    import_view(feature_file(tmp_path), "feats", cache=server.address)
    with machine("b"):
        listed = call("ls", "--cache", server.address)
        assert listed.exit_code == 0 and f"{server.address}/imported-" in listed.stdout
        shown = call("info", "feats", "--cache", server.address)
        assert f"in {server.address}/imported-" in shown.stdout, shown
        assert call("verify", "--cache", server.address).exit_code == 0
        exported = call("export", "feats", tmp_path / "out.npz", "--cache", server.address)
        assert exported.exit_code == 0, exported.stderr
        assert np.array_equal(np.load(tmp_path / "out.npz")["vector"], np.load(tmp_path / "x.npy"))
        as_json = call("info", "feats", "--cache", server.address, "--json").stdout
        assert f'"path": "{server.address}/' in as_json
        assert "/remote/" not in listed.stdout + shown.stdout + as_json
        assert call("merge", server.address, "--cache", tmp_path / "merged").exit_code == 0
    assert verify(tmp_path / "merged").damages == ()
    assert np.array_equal(featurecache.open_view("feats", tmp_path / "merged")["vector"], np.load(tmp_path / "x.npy"))


def test_the_default_cache_may_be_an_address(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURECACHE_DIR", server.address)
    import_view(feature_file(tmp_path), "feats")
    view = featurecache.open_view("feats")
    assert view.path.is_relative_to(cache_folder())
    assert "--cache" not in call("info", "feats").stderr


@pytest.mark.parametrize("words", [("gc",), ("gc", "--delete"), ("rm", "set", "--yes"), ("compact",), ("repair",),
                                   ("merge", "OTHER")])  # fmt: skip
def test_commands_that_take_away_are_refused_before_anything_is_asked(server, tmp_path, words):
    (tmp_path / "other").mkdir()
    typed = [str(tmp_path / "other") if word == "OTHER" else word for word in words]
    answer = call(*typed, "--cache", server.address)
    assert answer.exit_code == 2 and len(answer.stderr.splitlines()) == 1
    assert f"{words[0]} takes files away, and others cannot be locked out of {server.address}" in answer.stderr
    assert f"{words[0]} there with --cache DIR" in answer.stderr and not server.requests


def test_nor_by_the_name_of_a_view_or_by_the_folder_that_stands_for_it(server):
    view = make_remote(server)
    before = server.objects()
    for name in (f"{server.address}/tiny/set", view.path):
        with pytest.raises(BadOption, match="rm takes files away"):
            featurecache.remove_view(name)
    with pytest.raises(BadOption, match="gc takes files away"):
        featurecache.collect(view.store.parent)
    assert server.objects() == before and view.path.exists()


# -- several machines


def test_a_record_that_another_machine_wrote_first_comes_here_and_is_said(server):
    store = make_store(cache_folder(server.address))
    plan = {"batch_size": 4, "threads": 1, "memory_format": "contiguous", "forward": "library"}
    assert push(store.path)
    with machine("b"):
        theirs = next(stores(cache_folder(server.address)))
        theirs.write_plan("cpu", {**plan, "batch_size": 7})
        assert push(theirs.path)
    store.write_plan("cpu", plan)
    assert not push(store.path)
    assert store.plan is not None and store.plan["cpu"]["batch_size"] == 7
    store.write_plan("cuda", plan)
    assert push(store.path) and push(store.path)
    with machine("b"):  # which has seen the one before
        theirs.write_plan("mps", plan)
        assert not push(theirs.path) and theirs.plan == store.plan
        theirs.write_plan("mps", plan)
        assert push(theirs.path)
    cache_folder(server.address)
    assert store.plan is not None and store.plan.keys() == {"cpu", "cuda", "mps"}


def test_a_record_that_another_process_has_replaced_meanwhile_is_not_overwritten(server):
    """Machine b writes; on this one a process reads, another takes b's over, and only then the first writes."""
    view = make_remote(server)
    seen = version_of(view.path)
    with machine("b"):
        store = next(stores(cache_folder(server.address)))
        add_view(store, "set", [3, 0], [CLS])
        assert push(store.path)
    cache_folder(server.address)
    theirs = view.path.read_bytes()
    mine = add_view(next(stores(view.store.parent)), "set", [7], [CLS])
    assert not push(view.store, {mine.path: seen})
    assert view.path.read_bytes() == theirs == server.objects()[key_of(server, "/set.h5")]


def test_a_shard_with_other_notes_that_is_first_is_the_one_that_the_view_names(server, tmp_path):
    file = feature_file(tmp_path)
    alone = View(import_view(file, "v", cache=tmp_path / "alone").view)
    (layout,), store = alone.outputs.values(), next(stores(tmp_path / "alone"))
    (shard,) = store.shards(layout)
    writer = ShardWriter(store.path, shard.digests, layout, {**shard.notes, "more": "words " * 100})
    rows = alone.array(layout.output)[np.argsort(alone.digests)][np.argsort(np.argsort(shard.digests))]
    writer.append(shard.digests.tolist(), rows)
    other = writer.commit(replace=True)
    assert other is not None

    def first(method: str, key: str) -> None:
        if method == "PUT" and "/vector/" in key:
            server.write(key, other.read_bytes())

    server.rule = first
    import_view(file, "v", cache=server.address)
    cache = copied(server, tmp_path / "copy")
    assert verify(cache).damages == () and np.array_equal(featurecache.open_view("v", cache)["vector"], np.load(file))


def test_an_answer_that_is_lost_is_no_conflict(server, tmp_path):
    lost: set[str] = set()

    def lose(method: str, key: str):  # type: ignore[no-untyped-def]
        first = method == "PUT" and key not in lost
        lost.add(key)
        return BUSY if first else None

    server.lost = lose
    result = import_view(feature_file(tmp_path), "v", cache=server.address)
    assert len(lost) >= 3 and not any(map(is_placeholder, result.view.parent.glob("vector/*.h5")))
    assert verify(copied(server, tmp_path / "copy")).damages == ()


def test_a_server_that_keeps_no_conditions_is_refused(server, tmp_path):
    server.lenient = True
    with pytest.raises(StorageError, match=r"does not keep conditions of uploads \(If-None-Match\)"):
        import_view(feature_file(tmp_path), "v", cache=server.address)


# -- kills


@pytest.mark.parametrize("count", range(1, 9))
def test_killed_while_it_takes_over_what_is_there(server, count):
    make_remote(server)
    with machine("b"):
        with contextlib.suppress(AssertionError, pytest.fail.Exception), killed_at(os, "replace", count):
            cache_folder(server.address)
        view = featurecache.open_view("set", server.address)
        assert np.array_equal(view["tokens"], features(ORDER, TOKENS))
        with contextlib.suppress(pytest.fail.Exception), killed_at(os, "replace", count):
            view["cls"]
        assert np.array_equal(featurecache.open_view("set", server.address)["cls"], features(ORDER, CLS))


def test_what_was_made_here_is_uploaded_by_the_next_run_and_not_lost_before(server):
    store = make_store(cache_folder(server.address))
    path = add_shard(store, [1, 2], CLS)
    made = path.read_bytes()
    cache_folder(server.address)  # the next command looks what is there: nothing
    assert path.read_bytes() == made and not server.objects()
    push_shards(store.path)
    assert server.objects()[key_of(server, path.name)] == made


def test_a_server_that_fails_while_shards_are_compared_costs_none(server, monkeypatch):
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.0)
    store = make_store(cache_folder(server.address))
    path = add_shard(store, [1, 2], CLS)
    server.write(f"caches/main/{store.path.name}/cls/{path.name}", path.read_bytes())
    server.rule = lambda method, key: BUSY if method == "GET" and "/cls/" in key else None
    with pytest.raises(StorageError):
        cache_folder(server.address)
    assert not is_placeholder(path)
    server.rule = lambda method, key: None
    assert cache_folder(server.address) and not is_placeholder(path)  # it is the same
