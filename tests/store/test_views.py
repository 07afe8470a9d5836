"""Views: what a stranger sees with plain h5py, what our reader gives, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.builders import CLS, ORDER, TOKENS, features, make_spec, make_view
from support.plant import Content, changed

from featurecache.errors import AmbiguousName, CacheError, NotInCache, UnsafeFile
from featurecache.store import mapped_rows
from featurecache.store.shards import Layout
from featurecache.store.store import create_store, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import find_view, open_view


@pytest.fixture
def view(tmp_path: Path) -> View:
    return make_view(tmp_path, ORDER)


@pytest.mark.parametrize("per_shard", [1, 4, 100])
def test_our_reader_gives_rows_in_the_order_asked(tmp_path, per_shard: int):
    view = make_view(tmp_path, ORDER, per_shard=per_shard)
    for rows in ([8, 0, 1, 1, 4], [0, 1, 2], [], None):
        asked = ORDER if rows is None else [ORDER[k] for k in rows]
        assert np.array_equal(view.array("tokens", rows), features(asked, TOKENS))
    out = torch.empty(2, 4, dtype=torch.float16)
    assert view.take("cls", [5, 0], out) is out
    assert np.array_equal(out.numpy(), features([ORDER[5], ORDER[0]], CLS))


def test_the_disk_is_asked_for_the_next_shards_where_a_good_part_of_them_is_read(tmp_path, monkeypatch):
    asked: list[int] = []
    read_ahead = mapped_rows._read_ahead
    monkeypatch.setattr(mapped_rows, "_read_ahead", lambda rows: asked.append(rows.data_ptr()) or read_ahead(rows))
    rows = list(range(20))
    view = make_view(tmp_path, rows, per_shard=5)

    def shards(take: list[int]) -> int:
        asked.clear()
        assert np.array_equal(view.array("cls", take), features(take, CLS))
        return len(asked)

    assert shards([0]) == 0  # one row of five: the rest of the shard is not wanted
    assert shards([1, 5, 6, 10, 11, 12]) == 3
    assert shards(rows) == 4 and shards(rows) == 0  # what was checked is in memory, as far as it has room
    monkeypatch.setattr(mapped_rows, "AHEAD", 1)
    view = open_view("set", tmp_path)
    assert shards(rows) == 4


def test_a_boolean_mask_and_rows_that_are_not_there(view):
    assert len(view.tensor("cls", np.array(view.splits) == "train")) == 3
    with pytest.raises(IndexError, match="rows 0 to 8"):
        view.tensor("cls", [9])
    assert len(view.array("cls", [])) == 0 and len(view.array("cls", range(2))) == 2


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (np.array([False, True, False]), IndexError, "a mask of .* has 9 booleans, one a row; got 3"),
        (np.arange(12) == 8, IndexError, "got 12"),
        ([1.9], TypeError, r"whole numbers or a mask of booleans; got float64 \[1\]"),
        (["1"], TypeError, "got <U1"),
        ([[1], [2]], TypeError, r"got int64 \[2, 1\]"),
        (1, TypeError, r"got int64 \[\]"),
    ],
)
def test_rows_that_numpy_would_refuse_are_refused(view, rows, error, words):
    for read in (view.array, view.tensor):
        with pytest.raises(error, match=words):
            read("cls", rows)


def test_derived_outputs_need_only_tokens(tmp_path):
    view = make_view(tmp_path, ORDER, layouts=(TOKENS,))
    assert view.has("cls") and view.has("tokens-257") and not view.has("pooler")
    assert np.array_equal(view.array("cls"), features(ORDER, TOKENS)[:, 0])
    assert view.info("tokens-257").shape == (257, 4)
    assert view.info("tokens-3x3").grid == (3, 3)


def test_an_output_that_is_not_stored_says_the_command_that_stores_it(tmp_path):
    view = make_view(tmp_path, ORDER, layouts=(CLS,))
    with pytest.raises(NotInCache, match=r"holds cls, not tokens.*featurecache extract .*--outputs tokens"):
        view.tensor("tokens")


def test_a_missing_shard_is_refused_by_us_and_nan_in_plain_h5py(tmp_path):
    view = make_view(tmp_path, range(8), layouts=(CLS,))
    victim = sorted((view.store / "cls").iterdir())[0]
    victim.unlink()
    with pytest.raises(CacheError, match=f"{victim.name}.*is missing"):
        View(view.path)
    with h5py.File(view.path) as file:
        lost = np.isnan(file["cls"][...]).all(1)
    assert lost.sum() == 4


@pytest.mark.integration
def test_reading_a_view_and_its_rows_loads_no_hdf5(view):
    script = "import sys; from featurecache import open_view; print(open_view(sys.argv[1]).array('cls').sum())\n"
    script += "assert 'h5py' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, str(view.path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{view.array('cls').sum()}\n")


@pytest.mark.parametrize(
    ("column", "place", "value"),
    [
        ("cls", (3, 1), 1 << 40), ("cls", (3, 1), -1), ("cls", (3, 0), 77), ("files", "offset", 1 << 30),
        ("files", "rows", 1 << 61),  # times the bytes of a row, beyond 64 bits
    ],
)  # fmt: skip
def test_an_index_that_points_outside_the_shards_is_refused(tmp_path, column, place, value):
    def change(content: Content) -> None:
        content.columns[f"index/{column}"][place] = value

    path = changed(make_view(tmp_path, ORDER).path, change)
    with pytest.raises(UnsafeFile, match="points outside the shards"):
        View(path)


@pytest.mark.parametrize("width", [1, 3, 32, 100])
def test_rows_of_any_width_are_gathered_from_many_shards(tmp_path, width: int):
    layout = Layout("cls", (width,), "float16")
    view = make_view(tmp_path, ORDER, per_shard=2, layouts=(layout,))
    assert np.array_equal(view.array("cls", [8, 0, 3]), features([ORDER[k] for k in (8, 0, 3)], layout))


def test_a_view_in_another_store_or_a_changed_spec_is_refused(view, tmp_path):
    other = create_store(tmp_path, "tiny", make_spec(precision="bf16"), {})
    (other.path / "set.h5").write_bytes(view.path.read_bytes())
    with pytest.raises(CacheError, match="belongs to the store"):
        View(other.path / "set.h5")
    record = view.store / "spec.json"
    record.write_text(record.read_text().replace('"fp32"', '"fp16"'))
    with pytest.raises(CacheError, match="was changed"):
        View(view.path)


def test_a_view_whose_store_is_gone_is_refused(tmp_path):
    view = make_view(tmp_path / "cache", ORDER)
    moved = view.path.rename(tmp_path / "set.h5")
    with pytest.raises(CacheError, match=r"spec\.json is missing"):
        View(moved)


def test_a_foreign_or_damaged_spec_stops_only_its_own_store(view, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "spec.json").write_text('{"a": 1}')
    assert open_view("set", tmp_path).path == view.path
    assert [str(error).count("it has no spec") for _, error in unreadable_stores(tmp_path)] == [1]
    (view.store / "spec.json").write_text("{")
    with pytest.raises(CacheError, match="cannot be read"):
        create_store(tmp_path, "tiny", make_spec(), {})


def test_too_many_pieces_leave_the_virtual_dataset_out_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("featurecache.store.write_view.MAX_MAPPINGS", 3)
    view = make_view(tmp_path, ORDER, layouts=(CLS,))
    with h5py.File(view.path) as file:
        assert "cls" not in file
        assert not file["index/cls"].attrs["virtual"]
        assert "too many for a virtual dataset" in file["index/cls"].attrs["note"]
    assert np.array_equal(view.array("cls"), features(ORDER, CLS))


def test_consecutive_rows_are_one_mapping(tmp_path):
    view = make_view(tmp_path, range(100), per_shard=50, layouts=(CLS,))
    with h5py.File(view.path) as file:
        assert len(file["cls"].virtual_sources()) == 2


def test_the_reader_of_the_documentation_reads_views_with_numpy_alone(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    reader: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], reader)
    view = make_view(tmp_path, ORDER, meta={"site": list("aßc肺efghi"), "age": np.arange(9)})
    attributes, columns = reader["read_columns"](view.path)
    assert json.loads(attributes["classes"]) == view.classes and attributes["task"] == view.task
    assert columns["labels"][0].tolist() == view.labels.tolist()
    assert reader["read_texts"](columns, "ids") == view.ids.tolist()
    assert reader["read_texts"](columns, "meta/site") == view.meta["site"].tolist()
    for output in ("cls", "tokens"):
        assert np.array_equal(reader["read_features"](view.path, output), view.array(output))


EVERY_KIND = """
import json, sys
if len(sys.argv) > 3: sys.path.insert(0, sys.argv[3])
import h5py
view, shard = (h5py.File(path) for path in sys.argv[1:3])
texts = {name: view[name].asstr()[...].tolist() for name in ("ids", "splits", "groups", "meta/site")}
names = ("labels", "cls", "tokens", "meta/age", "meta/old", "checksums/cls")
numbers = {name: view[name][...].tolist() for name in names} | dict(view["tokens"].attrs)
inside = [name for name in shard if name != "directory"]
listed = json.loads(shard["directory"][...].tobytes())["columns"]
print(json.dumps([h5py.version.hdf5_version, texts, numbers, {k: shard[k][...].astype("U").tolist() for k in inside}]))
assert sorted(inside) == sorted(listed) and "virtual" in view["index/cls"].attrs and view["digests"].dtype == "S32"
"""


@pytest.mark.integration
@pytest.mark.parametrize("site", ["", os.environ.get("FEATURECACHE_TEST_HDF5_1_14")], ids=["installed", "1.14"])
def test_every_kind_of_file_and_column_opens_in_plain_h5py(tmp_path, site: str | None):
    if site is None:
        pytest.skip("FEATURECACHE_TEST_HDF5_1_14 names no folder with an h5py built on HDF5 1.14")
    n, meta = len(ORDER), {"site": list("aßc肺efghi"), "age": np.arange(9) / 2, "old": np.arange(9) > 4}
    view = make_view(tmp_path, ORDER, groups=[f"p{k}" for k in range(n)], meta=meta)
    shard = next((view.store / "cls").iterdir())
    words = [sys.executable, "-c", EVERY_KIND, str(view.path), str(shard), *([site] if site else [])]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.stderr == ""
    version, texts, numbers, inside = json.loads(done.stdout)
    assert version.startswith("1.14") or not site
    names = {"ids": view.ids, "splits": view.splits, "groups": view.groups}
    assert texts == {name: column.tolist() for name, column in names.items()} | {"meta/site": meta["site"]}
    assert numbers["cls"] == features(ORDER, CLS).tolist() and numbers["tokens"] == features(ORDER, TOKENS).tolist()
    assert numbers["prefix"] == '["cls"]' and numbers["grid"] == "[2, 2]"
    assert numbers["labels"] == [k % 2 for k in ORDER] and texts["ids"][3] == "é/3.png"
    assert numbers["meta/age"] == view.meta["age"].tolist() and numbers["meta/old"] == view.meta["old"].tolist()
    assert set(inside) == {"features", "digests", "checksums", "errors"}


def test_views_are_found_by_path_store_and_name(view, tmp_path):
    for name in (view.path, "set", "tiny/set", f"{view.store.name}/set", None):
        assert find_view(name, tmp_path) == view.path
    assert open_view("set", tmp_path).label == "tiny/set"


def test_a_name_in_two_stores_lists_them_and_an_unknown_one_its_neighbours(tmp_path):
    first, second = make_view(tmp_path, ORDER), make_view(tmp_path, ORDER, spec={"precision": "bf16"})
    with pytest.raises(AmbiguousName, match=f"{min(first.store, second.store).name}/set.*--features STORE/VIEW"):
        find_view("set", tmp_path)
    with pytest.raises(NotInCache, match=r"Near: .*set"):
        find_view("sett", tmp_path)
    with pytest.raises(NotInCache, match="no view in"):
        find_view(None, tmp_path / "empty")


def test_the_newest_view_is_taken_when_none_is_named(tmp_path):
    make_view(tmp_path, ORDER, name="old")
    newest = make_view(tmp_path, ORDER, name="new")
    os.utime(newest.path, ns=(2**62, 2**62))
    assert find_view(None, tmp_path) == newest.path


def test_a_store_is_made_once_and_found_by_its_fingerprint(tmp_path):
    store = create_store(tmp_path, "tiny", make_spec(), {})
    store.path.rename(tmp_path / "renamed")
    assert create_store(tmp_path, "tiny", make_spec(), {}).path == tmp_path / "renamed"
    assert create_store(tmp_path, "tiny", make_spec(dtype="float32"), {}).path != tmp_path / "renamed"


def test_the_fingerprint_is_blake2b_of_the_canonical_json():
    text = json.dumps(make_spec().to_dict(), sort_keys=True, separators=(",", ":"))
    assert make_spec().fingerprint == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
