"""Views: what a stranger sees with plain h5py, what our reader gives, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from featurecache.errors import AmbiguousName, CacheError, DamagedFile, NotInCache, UnsafeFile
from featurecache.files.atomic import FORMAT, AtomicFile, WriteTrace
from featurecache.files.records import canonical_json
from featurecache.store.schema import DIGEST
from featurecache.store.shards import Layout, ShardWriter
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store, create_store, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import ViewColumns, find_view, open_view, write_view

CLS = Layout("cls", (4,), "float16")
TOKENS = Layout("tokens", (5, 4), "float32", ("cls",), (2, 2))


def make_spec(**change) -> ExtractionSpec:  # type: ignore[no-untyped-def]
    record = {"architecture": {"class": "Tiny"}, "weights": {"random_seed": 0}, "preprocess": {"mean": [0.5]}}
    return ExtractionSpec(**{**record, "image_size": (8, 8), "position_embeddings": "as trained", **change})


def digests(numbers) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.array([f"{k:032x}" for k in numbers], DIGEST)


def features(numbers, layout: Layout) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Rows that say which image they are of."""
    values = np.asarray(list(numbers), layout.dtype).reshape(-1, *(1 for _ in layout.row_shape))
    return values + np.linspace(0, 0.5, int(np.prod(layout.row_shape)), dtype=layout.dtype).reshape(layout.row_shape)


def add_shard(store: Store, numbers, layout: Layout) -> None:  # type: ignore[no-untyped-def]
    writer = ShardWriter(store.path, digests(numbers), layout, {"fingerprint": store.fingerprint})
    writer.append([bytes(d) for d in digests(numbers)], features(numbers, layout))
    writer.commit()
    writer.discard()


def make_view(cache: Path, order, *, per_shard: int = 4, layouts=(CLS, TOKENS), name="set", **spec) -> View:  # type: ignore[no-untyped-def]
    """A view of images ``order`` (numbers, repeats allowed) over shards of ``per_shard`` rows."""
    order = np.asarray(order)
    store = create_store(cache, "tiny", make_spec(**spec), {"backbone": "tiny", "request": {"name": "tiny"}})
    distinct = np.unique(order)
    for layout in layouts:
        for start in range(0, len(distinct), per_shard):
            add_shard(store, distinct[start : start + per_shard], layout)
    ids = [f"é/{k}.png" for k in range(len(order))]
    rows = ViewColumns(ids, order % 2, ["train", "test"] * (len(order) // 2) + [""] * (len(order) % 2), digests(order))
    attributes = {
        "classes": json.dumps(["no", "yes"]), "task": "binary", "spec": canonical_json(store.spec.to_dict()),
        "fingerprint": store.fingerprint, "format_version": FORMAT, "source": "{}", "failed": "[]",
    }  # fmt: skip
    located = {layout: store.locate(layout, rows.digests) for layout in layouts}
    return View(write_view(store, name, rows, attributes, located))


ORDER = [7, 3, 3, 0, 11, 10, 9, 1, 2]


def test_plain_h5py_from_another_folder_sees_ids_labels_splits_and_features(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", ORDER)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with h5py.File(view.path) as file:
        assert file["ids"].asstr()[3] == "é/3.png"
        assert file["labels"][...].tolist() == [k % 2 for k in ORDER]
        assert file["splits"].asstr()[0] == "train"
        assert file["digests"].dtype == "S32"
        assert np.array_equal(file["cls"][...], features(ORDER, CLS))
        assert np.array_equal(file["tokens"][...], features(ORDER, TOKENS))
        assert json.loads(file["tokens"].attrs["prefix"]) == ["cls"]
        assert json.loads(file["tokens"].attrs["grid"]) == [2, 2]


@pytest.mark.parametrize("per_shard", [1, 4, 100])
def test_our_reader_gives_rows_in_the_order_asked(tmp_path: Path, per_shard: int) -> None:
    view = make_view(tmp_path, ORDER, per_shard=per_shard)
    for rows in ([8, 0, 1, 1, 4], [0, 1, 2], [], None):
        asked = ORDER if rows is None else [ORDER[k] for k in rows]
        assert np.array_equal(view.array("tokens", rows), features(asked, TOKENS))
    out = torch.empty(2, 4, dtype=torch.float16)
    assert view.take("cls", [5, 0], out) is out
    assert np.array_equal(out.numpy(), features([ORDER[5], ORDER[0]], CLS))


def test_a_boolean_mask_and_rows_that_are_not_there(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    assert len(view.tensor("cls", np.array(view.splits) == "train")) == 4
    with pytest.raises(IndexError, match="rows 0 to 8"):
        view.tensor("cls", [9])


def test_derived_outputs_need_only_tokens(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER, layouts=(TOKENS,))
    assert view.has("cls") and view.has("tokens-257") and not view.has("pooler")
    assert np.array_equal(view.array("cls"), features(ORDER, TOKENS)[:, 0])
    assert view.info("tokens-257").shape == (257, 4)
    assert view.info("tokens-3x3").grid == (3, 3)


def test_an_output_that_is_not_stored_says_the_command_that_stores_it(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER, layouts=(CLS,))
    with pytest.raises(NotInCache, match=r"holds cls, not tokens.*featurecache extract .*--outputs tokens"):
        view.tensor("tokens")


def test_a_missing_shard_is_refused_by_us_and_nan_in_plain_h5py(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(8), layouts=(CLS,))
    victim = sorted((view.store / "cls").iterdir())[0]
    victim.unlink()
    with pytest.raises(CacheError, match=f"{victim.name}.*is missing"):
        View(view.path)
    with h5py.File(view.path) as file:
        lost = np.isnan(file["cls"][...]).all(1)
    assert lost.sum() == 4


def test_a_cut_shard_is_refused_at_opening(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    victim = next((view.store / "cls").iterdir())
    os.truncate(victim, victim.stat().st_size - 8)
    with pytest.raises(CacheError, match=r"has [\d,]+ bytes, not"):
        View(view.path)


def test_a_flipped_bit_in_a_view_is_found_before_hdf5_sees_it(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = make_view(tmp_path, ORDER).path
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(h5py, "File", None)
    with pytest.raises(DamagedFile, match="does not match the hash"):
        View(path)


def reseal(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change a view behind its user block's back, and seal it again."""
    buffer = io.BytesIO(path.read_bytes())
    with h5py.File(buffer, "r+") as file:
        change(file)
    with AtomicFile(path) as draft:
        draft.commit(WriteTrace.of(buffer.getvalue()), replace=True)


def outside_index(file: h5py.File) -> None:
    files = file["index/files"][...]
    files["path"] = b"../../secret.h5"
    file["index/files"][...] = files


def outside_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((9, 4), "f2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "features", (9, 4), "f2")
    del file["cls"]
    file.create_virtual_dataset("cls", layout)


def far_row(file: h5py.File) -> None:
    file["index/cls"][3, 1] = 1 << 40


def negative_row(file: h5py.File) -> None:
    file["index/cls"][3, 1] = -1


def far_file(file: h5py.File) -> None:
    file["index/cls"][3, 0] = 77


def far_offset(file: h5py.File) -> None:
    files = file["index/files"][...]
    files["offset"] += 1 << 30
    file["index/files"][...] = files


def many_rows(file: h5py.File) -> None:
    files = file["index/files"][...]
    files["rows"] = 1 << 61  # times the bytes of a row, beyond 64 bits
    file["index/files"][...] = files


@pytest.mark.parametrize("change", [far_row, negative_row, far_file, far_offset, many_rows])
def test_an_index_that_points_outside_the_shards_is_refused(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = make_view(tmp_path, ORDER).path
    reseal(path, change)
    with pytest.raises(UnsafeFile, match="points outside the shards"):
        View(path)


@pytest.mark.parametrize("width", [1, 3, 32, 100])
def test_rows_of_any_width_are_gathered_from_many_shards(tmp_path: Path, width: int) -> None:
    layout = Layout("cls", (width,), "float16")
    view = make_view(tmp_path, ORDER, per_shard=2, layouts=(layout,))
    assert np.array_equal(view.array("cls", [8, 0, 3]), features([ORDER[k] for k in (8, 0, 3)], layout))


@pytest.mark.parametrize("change", [outside_index, outside_virtual])
def test_a_view_that_refers_outside_its_store_is_refused(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = make_view(tmp_path, ORDER).path
    reseal(path, change)
    with pytest.raises(UnsafeFile, match="outside its store"):
        View(path)


def test_a_view_in_another_store_or_a_changed_spec_is_refused(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    other = create_store(tmp_path, "tiny", make_spec(precision="bf16"), {})
    (other.path / "set.h5").write_bytes(view.path.read_bytes())
    with pytest.raises(CacheError, match="belongs to the store"):
        View(other.path / "set.h5")
    record = view.store / "spec.json"
    record.write_text(record.read_text().replace('"fp32"', '"fp16"'))
    with pytest.raises(CacheError, match="was changed"):
        View(view.path)


def test_a_view_whose_store_is_gone_is_refused(tmp_path: Path) -> None:
    view = make_view(tmp_path / "cache", ORDER)
    moved = view.path.rename(tmp_path / "set.h5")
    with pytest.raises(CacheError, match=r"spec\.json is missing"):
        View(moved)


def test_symbolic_links_in_a_store_are_refused(tmp_path: Path) -> None:
    view = make_view(tmp_path / "cache", ORDER)
    (view.store / "cls").rename(tmp_path / "cls")
    (view.store / "cls").symlink_to(tmp_path / "cls")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        View(view.path)


def test_a_foreign_or_damaged_spec_stops_only_its_own_store(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "spec.json").write_text('{"a": 1}')
    assert open_view("set", tmp_path).path == view.path
    assert [str(error).count("it has no spec") for _, error in unreadable_stores(tmp_path)] == [1]
    (view.store / "spec.json").write_text("{")
    with pytest.raises(CacheError, match="cannot be read"):
        create_store(tmp_path, "tiny", make_spec(), {})


def test_views_survive_pickling_and_keep_no_file_open(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    again = pickle.loads(pickle.dumps(view))
    before = len(os.listdir("/proc/self/fd"))
    assert torch.equal(again.tensor("cls"), view.tensor("cls"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
@pytest.mark.slow
def test_more_shards_than_file_descriptors(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(3000), per_shard=1, layouts=(CLS,))
    script = f"""
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import numpy as np, sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_views import *
view = open_view({str(view.path)!r})
assert np.array_equal(view.array("cls"), features(range(3000), CLS))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_too_many_pieces_leave_the_virtual_dataset_out_and_say_so(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("featurecache.store.write_view.MAX_MAPPINGS", 3)
    view = make_view(tmp_path, ORDER, layouts=(CLS,))
    with h5py.File(view.path) as file:
        assert "cls" not in file
        assert not file["index/cls"].attrs["virtual"]
        assert "too many for a virtual dataset" in file["index/cls"].attrs["note"]
    assert np.array_equal(view.array("cls"), features(ORDER, CLS))


def test_consecutive_rows_are_one_mapping(tmp_path: Path) -> None:
    view = make_view(tmp_path, range(100), per_shard=50, layouts=(CLS,))
    with h5py.File(view.path) as file:
        assert len(file["cls"].virtual_sources()) == 2


def test_a_view_opens_in_an_h5py_built_on_hdf5_1_14(tmp_path: Path) -> None:
    site = os.environ.get("FEATURECACHE_TEST_HDF5_1_14")
    if not site:
        pytest.skip("FEATURECACHE_TEST_HDF5_1_14 names no folder with an h5py built on HDF5 1.14")
    view = make_view(tmp_path, ORDER)
    script = f"""
import sys; sys.path.insert(0, {site!r})
import h5py; assert h5py.version.hdf5_version.startswith("1.14"), h5py.version.hdf5_version
with h5py.File({str(view.path)!r}) as file:
    print(file["cls"][...].tolist(), file["ids"].asstr()[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stderr == ""
    assert done.stdout.strip() == f"{features(ORDER, CLS).tolist()} é/0.png"


def test_views_are_found_by_path_store_and_name(tmp_path: Path) -> None:
    view = make_view(tmp_path, ORDER)
    for name in (view.path, "set", "tiny/set", f"{view.store.name}/set", None):
        assert find_view(name, tmp_path) == view.path
    assert open_view("set", tmp_path).label == "tiny/set"


def test_a_name_in_two_stores_lists_them_and_an_unknown_one_its_neighbours(tmp_path: Path) -> None:
    first, second = make_view(tmp_path, ORDER), make_view(tmp_path, ORDER, precision="bf16")
    with pytest.raises(AmbiguousName, match=f"{min(first.store, second.store).name}/set.*--features STORE/VIEW"):
        find_view("set", tmp_path)
    with pytest.raises(NotInCache, match=r"Near: .*set"):
        find_view("sett", tmp_path)
    with pytest.raises(NotInCache, match="no view in"):
        find_view(None, tmp_path / "empty")


def test_the_newest_view_is_taken_when_none_is_named(tmp_path: Path) -> None:
    make_view(tmp_path, ORDER, name="old")
    newest = make_view(tmp_path, ORDER, name="new")
    os.utime(newest.path, ns=(2**62, 2**62))
    assert find_view(None, tmp_path) == newest.path


def test_a_store_is_made_once_and_found_by_its_fingerprint(tmp_path: Path) -> None:
    store = create_store(tmp_path, "tiny", make_spec(), {})
    store.path.rename(tmp_path / "renamed")
    assert create_store(tmp_path, "tiny", make_spec(), {}).path == tmp_path / "renamed"
    assert create_store(tmp_path, "tiny", make_spec(dtype="float32"), {}).path != tmp_path / "renamed"


def test_specs_round_trip_and_every_field_changes_the_fingerprint() -> None:
    spec = make_spec()
    assert ExtractionSpec.from_dict(json.loads(canonical_json(spec.to_dict()))) == spec
    changes = {
        "architecture": {"class": "Other"}, "weights": {"random_seed": 1}, "preprocess": {"mean": [0.4]},
        "image_size": (8, 9), "position_embeddings": "interpolated", "precision": "bf16", "dtype": "float32",
        "generation": 1, "format": 2,
    }  # fmt: skip
    assert set(changes) == set(spec.to_dict())
    prints = {make_spec(**{key: value}).fingerprint for key, value in changes.items()} | {spec.fingerprint}
    assert len(prints) == len(changes) + 1


def test_the_fingerprint_is_blake2b_of_the_canonical_json() -> None:
    import hashlib

    text = json.dumps(make_spec().to_dict(), sort_keys=True, separators=(",", ":"))
    assert make_spec().fingerprint == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
