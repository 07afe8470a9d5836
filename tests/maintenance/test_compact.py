"""compact: the rows of a view in its order, the bytes of all others as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.builders import CLS, TOKENS, add_shard, add_view, digests, features, make_store
from support.caches import add_shifted, files, is_whole, killed_at, rows_in, shards
from support.command import call
from support.plant import flip

import featurecache
from featurecache.errors import CacheError, CannotWrite, DamagedFile
from featurecache.maintenance import collect as collecting
from featurecache.maintenance.collect import compact
from featurecache.store.shards import read_shard

ORDER = [9, 1, 5, 5, 0, 10, 2, 3]


@pytest.fixture
def scattered(tmp_path, monkeypatch):
    """Twelve images in three shards, a view in another order, one of other images, and rows that no view names."""
    monkeypatch.setattr("featurecache.store.store.SHARD_ROWS", 5)
    store = make_store(tmp_path)
    for layout in (CLS, TOKENS):
        for numbers in ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]):
            add_shard(store, numbers, layout)
    add_view(store, "other", [11, 1, 0], [CLS])
    add_view(store, "set", ORDER, [CLS, TOKENS])
    return store


def in_order(store):
    view = featurecache.open_view("set", store.path.parent)
    for output in ("cls", "tokens"):
        places = view.stored(output).index
        distinct = places[[k for k, d in enumerate(ORDER) if d not in ORDER[:k]]]
        assert distinct[:, 1].tolist() == [0, 1, 2, 3, 4, 0, 1]
        assert rows_in(store, output) == list(range(12))  # none lost, none twice, none that gc would have freed
    is_whole(store.path.parent, set=ORDER, other=[11, 1, 0])


def test_the_rows_lie_in_the_order_of_the_view(scattered):
    cache = scattered.path.parent
    before = featurecache.open_view("set", cache)
    done = compact("set", cache)
    in_order(scattered)
    assert done.view == "tiny/set" and done.shards == (6, 4) and done.pieces[1] < done.pieces[0] and done.written > 0
    after = featurecache.open_view("set", cache)
    assert all(np.array_equal(getattr(after, name), getattr(before, name)) for name in ("ids", "labels", "splits"))
    times = {p: p.stat().st_mtime_ns for p in cache.rglob("*.h5")}
    assert compact("set", cache).written == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.h5")} == times


def test_it_stops_at_a_damaged_row_with_everything_as_it_was(scattered):
    path = shards(scattered, "tokens")[1]
    flip(path, read_shard(path, TOKENS).offset + 3)
    before = files(scattered.path.parent)
    with pytest.raises(DamagedFile, match="damaged"):
        compact("set", scattered.path.parent)
    assert before.items() <= files(scattered.path.parent).items()


def test_a_file_that_has_the_right_name_is_not_trusted(scattered):
    cache = scattered.path.parent
    with killed_at(collecting, "rewrite_view", 1):
        compact("set", cache)
    new = next(p for p in shards(scattered, "cls") if len(read_shard(p, CLS).digests) == 5)
    flip(new, read_shard(new, CLS).offset)
    before = files(cache)
    with pytest.raises(DamagedFile):
        compact("set", cache)
    assert files(cache) == before
    assert np.array_equal(featurecache.open_view("set", cache).array("cls"), features(ORDER, CLS))


def test_a_view_whose_rows_are_gone_is_said(scattered):
    next(p for p in shards(scattered, "cls") if digests([9])[0] in read_shard(p, CLS).digests).unlink()
    add_shifted(scattered, [0, 3, 6, 9], 0.25)  # in its place, with other bytes
    with pytest.raises(CacheError, match=r"tiny/set names rows of cls that lie in no shard\. featurecache repair"):
        compact("set", scattered.path.parent)


def test_it_asks_for_the_space_first(scattered, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    before = files(scattered.path.parent)
    with pytest.raises(CannotWrite, match="Free some space; nothing was changed"):
        compact("set", scattered.path.parent)
    assert files(scattered.path.parent) == before


def test_compact_export_and_merge_by_the_command_line(scattered, tmp_path_factory):
    cache, away = scattered.path.parent, tmp_path_factory.mktemp("away")
    assert "6 → 4 shards" in call("compact", "set", "--cache", cache).stdout
    assert "is in order already: 4 shards" in call("compact", "set", "--cache", cache).stdout
    done = json.loads(call("export", "set", away / "set.npz", "--outputs", "cls", "--json", "--cache", cache).stdout)
    assert done["rows"] == 8 and done["outputs"] == ["cls"] and (away / "set.npz").stat().st_size == done["bytes"]
    assert call("export", "set", away / "set.npz", "--cache", cache).exit_code == 2
    assert "has no augmented copies" in call("export", "set", away / "a.h5", "--copies", "--cache", cache).stderr
    (merged,) = json.loads(call("merge", cache, "--cache", away / "cache", "--json").stdout)
    assert merged["new"] and merged["rows"] == 24 and {v["what"] for v in merged["views"]} == {"copied"}
    again = call("merge", cache, "--cache", away / "cache")
    assert again.exit_code == 0 and "no new rows" in again.stdout and "view set  here already" in again.stdout
