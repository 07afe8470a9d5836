"""Export: one plain file, read by plain libraries, whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.builders import CLS, ORDER, TOKENS, features, make_view

from featurecache.errors import BadOption, CannotWrite
from featurecache.files.atomic import AtomicFile, temporary_path
from featurecache.maintenance import export
from featurecache.maintenance.export import export_view
from featurecache.store.view import View

IDS = [f"é/{k}.png" for k in range(len(ORDER))]
PLACES = {"prefix": ["cls"], "grid": [2, 2]}


@pytest.fixture
def view(tmp_path: Path, monkeypatch) -> View:
    """With groups and further columns; two rows a block, so that every writer writes several."""
    monkeypatch.setattr(export, "BLOCK", 80)
    site = np.array(["a/b", "ö", *"cdefghi"], object)
    meta = {"age": np.array([30.5, np.nan, *range(7)]), "site": site, "id": np.array(ORDER)}
    return make_view(tmp_path / "cache", ORDER, groups=[f"p{k}" for k in range(9)], meta=meta)


@pytest.mark.parametrize("compress", [False, True])
def test_the_h5_opens_in_plain_h5py_without_the_cache(tmp_path: Path, view: View, compress: bool):
    done = export_view(view, tmp_path / "set.h5", compress=compress)
    expected = {name: view.array(name) for name in view.outputs}
    view.store.rename(tmp_path / "gone")
    with h5py.File(done.path) as file:
        assert file["ids"].asstr()[...].tolist() == IDS
        assert file["labels"][...].tolist() == [k % 2 for k in ORDER]
        assert file["groups"].asstr()[3] == "p3" and file["meta/site"].asstr()[1] == "ö" and file["meta/age"][0] == 30.5
        assert file["digests"][...].tolist() == view.digests.tolist()
        assert json.loads(file.attrs["classes"]) == ["no", "yes"] and file.attrs["fingerprint"] == view.fingerprint
        assert "index" not in file and "checksums" not in file
        for name, layout in (("cls", CLS), ("tokens", TOKENS)):
            data = file[name]
            packed = ("gzip", True) if compress else (None, False)
            assert not data.is_virtual and (data.compression, data.shuffle) == packed
            assert np.array_equal(data[...], features(ORDER, layout)) and np.array_equal(data[...], expected[name])
        assert {key: json.loads(text) for key, text in file["tokens"].attrs.items()} == PLACES
    assert (done.rows, done.bytes, done.format) == (9, done.path.stat().st_size, "hdf5")


@pytest.mark.parametrize("compress", [False, True])
def test_the_h5_opens_in_hdf5_1_8_which_has_superblocks_0_and_2(tmp_path: Path, view: View, compress: bool):
    data = export_view(view, tmp_path / "set.h5", compress=compress).path.read_bytes()
    assert data.startswith(b"\x89HDF\r\n\x1a\n") and data[8] in (0, 2)
    layouts = [data[at + 4] for at in range(len(data)) if data[at : at + 4] in (b"FAHD", b"EAHD", b"BTHD")]
    assert layouts == []  # the chunk indexes of 1.10


@pytest.mark.parametrize("compress", [False, True])
def test_the_npz_is_read_by_numpy_without_pickle(tmp_path: Path, view: View, compress: bool):
    with np.load(export_view(view, tmp_path / "set.npz", compress=compress).path, allow_pickle=False) as file:
        assert file["ids"].tolist() == IDS and file["meta/site"][0] == "a/b"
        assert file["labels"].tolist() == view.labels.tolist() and file["classes"].tolist() == ["no", "yes"]
        for name, layout in (("cls", CLS), ("tokens", TOKENS)):
            assert np.array_equal(file[name], features(ORDER, layout)) and file[name].dtype == np.float16
        about = json.loads(str(file["attributes"]))
    assert json.loads(about["outputs"])["tokens"] == PLACES and about["task"] == "binary"


@pytest.mark.parametrize("compress", [False, True])
def test_the_parquet_has_a_row_an_image_and_vectors_as_lists_of_fixed_size(tmp_path, view, compress):
    from pyarrow import parquet

    done = export_view(view, tmp_path / "set.parquet", outputs="cls,mean", compress=compress)
    table = parquet.read_table(done.path)
    assert table["id"].to_pylist() == IDS and table["class"].to_pylist() == [("no", "yes")[k % 2] for k in ORDER]
    assert table["meta.id"].to_pylist() == ORDER and table["site"][1].as_py() == "ö"
    assert table.schema.field("cls").type.list_size == 4
    assert np.array_equal(np.array(table["cls"].to_pylist(), np.float16), features(ORDER, CLS))
    assert np.array_equal(np.array(table["mean"].to_pylist(), np.float32), view.array("mean"))
    codec = parquet.ParquetFile(done.path).metadata.row_group(0).column(0).compression
    assert codec == ("ZSTD" if compress else "UNCOMPRESSED")


def test_the_csv_holds_every_number_as_it_is_and_no_cell_that_a_spreadsheet_would_run(tmp_path, view):
    import pandas

    path = export_view(view, tmp_path / "set.csv", outputs="cls,mean").path
    table = pandas.read_csv(path, keep_default_na=False, na_values=["nan"])
    assert table["id"].tolist() == IDS and table["class"].tolist() == [("no", "yes")[k % 2] for k in ORDER]
    assert np.array_equal(table.filter(regex=r"^cls\.").to_numpy(np.float16), features(ORDER, CLS))
    assert np.array_equal(table.filter(regex=r"^mean\.").to_numpy(np.float32), view.array("mean"))
    view.meta["site"][0] = "=HYPERLINK()"
    assert ",'=HYPERLINK()," in export_view(view, tmp_path / "b.csv", outputs="cls").path.read_text()


def test_a_frame_has_a_row_an_image_and_the_columns_of_the_view(view):
    frame = view.frame()
    assert frame["id"].tolist() == IDS and frame["split"].tolist() == view.splits.tolist()
    assert frame.loc[frame["split"] == "val", "label"].tolist() == view.labels[view.splits == "val"].tolist()
    assert frame["meta.id"].tolist() == ORDER and frame["group"][1] == "p1"
    assert "<td>yes</td>" in view._repr_html_() and np.array_equal(view["cls"], features(ORDER, CLS))
    with pytest.raises(TypeError, match=r'is read by output, view\["cls"\]'):
        view[0]


def test_the_safetensors_is_read_by_its_library(tmp_path: Path, view: View):
    from safetensors import safe_open

    with safe_open(export_view(view, tmp_path / "set.safetensors").path, "pt") as file:
        assert torch.equal(file.get_tensor("cls"), torch.from_numpy(features(ORDER, CLS)))
        assert torch.equal(file.get_tensor("tokens"), torch.from_numpy(features(ORDER, TOKENS)))
        assert file.get_tensor("labels").tolist() == view.labels.tolist()
        about = file.metadata()
    assert json.loads(about["ids"]) == IDS and json.loads(about["splits"]) == view.splits.tolist()
    assert json.loads(about["meta"])["age"][:2] == [30.5, None] and json.loads(about["classes"]) == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("set.parquet", {}, "Parquet holds vectors, and tokens is 5×4 an image: --outputs cls, or export to .h5"),
        ("set.safetensors", {"compress": True}, "safetensors has no compression"),
        ("set.xlsx", {}, r'"set.xlsx" has no ending that names a format; there are \.h5'),
        ("set.csv", {}, "CSV holds vectors, and tokens is 5×4 an image"),
        ("set.csv", {"outputs": "cls", "compress": True}, "csv has no compression"),
        ("old.h5", {}, "exists; --overwrite replaces it"),
        ("cache/tiny.h5", {}, "belongs to a cache"),
        ("folder.h5", {}, "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path, view: View, name: str, options, said: str):
    (tmp_path / "old.h5").write_text("mine")
    (tmp_path / "folder.h5").mkdir()
    target = view.store / "x.h5" if name.startswith("cache") else tmp_path / name
    with pytest.raises(BadOption, match=said):
        export_view(view, target, **options)
    assert (tmp_path / "old.h5").read_text() == "mine" and not (tmp_path / "set.h5").exists()


def test_parquet_without_its_library_says_what_to_install(tmp_path, view, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadOption, match=r"Parquet needs pyarrow: pip install 'featurecache\[parquet\]'"):
        export_view(view, tmp_path / "set.parquet", outputs="cls")


def test_columns_too_long_for_the_header_of_a_safetensors_file_are_refused(tmp_path, view, monkeypatch):
    monkeypatch.setattr(export, "_HEADER", 500)
    with pytest.raises(BadOption, match="too long for the header"):
        export_view(view, tmp_path / "set.safetensors")
    assert list(tmp_path.glob("*set*")) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path, view: View, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(CannotWrite, match=r"are to be written and .* has 100 B free"):
        export_view(view, tmp_path / "set.h5")
    assert list(tmp_path.glob("*set*")) == []


def test_an_export_clears_up_what_a_killed_one_left_and_nothing_else(tmp_path: Path, view: View):
    target, somebodys = tmp_path / "set.h5", tmp_path / ".editor.abc.tmp"
    for path in (temporary_path(target), somebodys):
        path.touch()
    export_view(view, target)
    assert list(tmp_path.glob(".*.tmp")) == [somebodys]


def test_a_chunk_index_that_hdf5_reads_back_is_the_one_it_wrote(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(export, "CHUNK", 16)  # 3,000 chunks: their index is far larger than HDF5's cache of it
    view = make_view(tmp_path / "cache", range(3000), per_shard=3000, layouts=[CLS])
    path = export_view(view, tmp_path / "set.h5", compress=True).path
    with h5py.File(path) as file:
        assert np.array_equal(file["cls"][:2048:7], features(range(0, 2048, 7), CLS))


class Full:
    """A draft on a disk that takes ten bytes."""

    def __init__(self):
        self.data = bytearray()

    def write(self, offset: int, data: memoryview):
        if offset + len(data) > 10:
            raise CannotWrite(28, "full")
        self.data[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])


def test_the_writer_never_meets_a_failed_write_and_reads_back_what_it_wrote():
    sink = export.Sink(Full())
    assert sink.write(b"12345678") == 8
    assert sink.write(b"abcdef") == 6
    sink.seek(2)
    assert sink.write(b"xy") == 2
    sink.seek(0)
    assert sink.read(20) == b"12xy5678abcdef"
    with pytest.raises(CannotWrite, match="full"):
        sink.check()


@pytest.mark.parametrize("ending", ["h5", "npz", "safetensors", "parquet", "csv"])
@pytest.mark.parametrize("number", [1, 3, -1])
def test_one_write_that_fails_is_enough(tmp_path: Path, view: View, monkeypatch, ending: str, number: int):
    target, seen, real = tmp_path / f"set.{ending}", [0], AtomicFile.write
    outputs = "cls" if ending in ("parquet", "csv") else None
    if number < 0:  # the last: written when all rows are
        monkeypatch.setattr(AtomicFile, "write", lambda *words: seen.__setitem__(0, seen[0] + 1) or real(*words))
        export_view(view, target, outputs=outputs)
        number, seen[0] = seen[0], 0

    def write(*words):
        seen[0] += 1
        if seen[0] == number:
            raise CannotWrite(28, "full")
        return real(*words)

    target.write_text("mine")
    monkeypatch.setattr(AtomicFile, "write", write)
    with pytest.raises(CannotWrite, match=r"No space left on device\. What was there before is as it was"):
        export_view(view, target, outputs=outputs, overwrite=True)
    assert target.read_text() == "mine" and list(tmp_path.glob(".*")) == []
