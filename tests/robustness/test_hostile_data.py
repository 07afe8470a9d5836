"""Images, archives and tables that are bombs, and runs made by strangers: a sentence, and nothing fills up."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from support.fake_view import toy_view
from support.runs import reseal

from featurecache.errors import RunError, SourceError, UnreadableImage
from featurecache.images.decoding import decode
from featurecache.sources import npz as npz_source
from featurecache.sources import open_source, parquet_files
from heads.api import train_head
from heads.reports.listing import runs_table
from heads.reports.text import final_table
from heads.runs.run import list_runs, load_run

SIDE = 60_000


def encoded(kind: str, **options) -> bytearray:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def _tiff_sides(data: bytes) -> list[int]:
    """Where width and height are written: the entries of tags 256 and 257."""
    (at,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[at : at + 2])
    entries = range(at + 2, at + 2 + 12 * count, 12)
    return [entry + 2 for entry in entries if struct.unpack("<H", data[entry : entry + 2])[0] in (256, 257)]


def bomb(kind: str) -> bytes:
    """An image of a few bytes whose header says 60,000 × 60,000 pixels; of a WebP the largest there can be."""
    if kind == "PNM":
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + bytes(100)
    data = encoded(kind, **{"lossless": True} if kind == "WEBP" else {})
    edits = {
        "PNG": lambda: [(16, struct.pack(">II", SIDE, SIDE))],
        "JPEG": lambda: [(data.index(b"\xff\xc0") + 5, struct.pack(">HH", SIDE, SIDE))],
        "GIF": lambda: [(6, struct.pack("<HH", SIDE, SIDE))],
        "BMP": lambda: [(18, struct.pack("<ii", SIDE, SIDE))],
        "WEBP": lambda: [(data.index(b"VP8L") + 9, struct.pack("<I", 16_382 | 16_382 << 14 | (data[24] & 0xF0) << 24))],
        "TIFF": lambda: [(at, struct.pack("<HII", 4, 1, SIDE)) for at in _tiff_sides(data)],
    }
    for at, new in edits[kind]():
        data[at : at + len(new)] = new
    if kind == "PNG":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PNM"])
def test_images_that_are_bombs_are_refused_by_their_header(kind: str) -> None:
    with pytest.raises(UnreadableImage, match=r"decompression bomb|truncated after"):
        decode(bomb(kind))


def test_a_gif_whose_first_frame_is_larger_than_its_screen() -> None:
    data = encoded("GIF")
    at = data.index(b"\x2c", 13)
    data[at + 5 : at + 9] = struct.pack("<HH", SIDE, SIDE)
    with pytest.raises(UnreadableImage):
        decode(bytes(data))


# ---------------------------------------------------------------------------------------------- archives and tables


def archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_an_array_that_declares_a_terabyte(tmp_path: Path) -> None:
    path, header = archive(tmp_path / "a.npz", train_labels=np.zeros(2, int)), io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 1, 1)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", header.getvalue() + bytes(100))
    with pytest.raises(SourceError, match=r"declares 1,099,511,627,904 bytes and holds 228"):
        open_source(path)


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("_DEFLATE", 10, r"declares 88,337 bytes, packed in \d"),  # more than its packed bytes can give
        ("_LABELS", 50, r"train_labels of a\.npz declare 72 bytes; expected at most 50"),
    ],
)
def test_members_beyond_memory(tmp_path: Path, monkeypatch, limit: str, value: int, words: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(npz_source, limit, value)
    path = archive(tmp_path / "a.npz", train_images=np.zeros((9, 99, 99), np.uint8), train_labels=np.zeros(9, int))
    with pytest.raises(SourceError, match=words):
        open_source(path)


def test_a_member_packed_in_another_way(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as file:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((9, 8, 8), np.uint8))
        file.writestr("train_images.npy", buffer.getvalue())
    with pytest.raises(SourceError, match="packed in a way that numpy does not write"):
        open_source(tmp_path / "a.npz")


def test_images_that_the_disk_cannot_hold_are_not_begun(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(npz_source, "_IN_MEMORY", 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))  # type: ignore[attr-defined]
    path = archive(tmp_path / "a.npz", train_images=np.zeros((9, 8, 8), np.uint8), train_labels=np.zeros(9, int))
    with pytest.raises(SourceError, match="No space left on device"):
        open_source(path).read(0)


def test_a_parquet_table_of_more_cells_than_memory(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(parquet_files, "_CELLS", 1000)
    parquet.write_table(pyarrow.table({"path": ["a.png"] * 600, "label": ["x"] * 600}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="declares 600 rows of 2 columns"):
        open_source(tmp_path / "a.parquet")


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_head(
        toy_view(n=200, splits="given", noise=2), "linear", epochs=1, standardize="zscore", out=folder, report=False
    )
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "run"))


def use(path: Path) -> None:
    found = load_run(path)
    final_table(found)
    runs_table([found])
    found.logits(torch.zeros(2, 8))


def changed(path: Path, name: str, change) -> None:  # type: ignore[no-untyped-def]
    if name == "config.json":
        return reseal(path, change)
    record = json.loads((path / name).read_text())
    change(record)
    (path / name).write_text(json.dumps(record))
    reseal(path)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["view"].update(shape=[1_000_000_000]), r"does not fit the head .* the head 2,000,000,002"),
        (lambda c: c["view"].update(shape=[1 << 40]), "no proper shape"),
        (lambda c: c["view"].update(shape=["8"]), "no proper shape"),
        (lambda c: c["view"].update(label=7), "no proper view label"),
        (lambda c: c.update(view=[]), "no proper view"),
        (lambda c: c.update(classes=[1, 2]), "no proper classes"),
        (lambda c: c.update(task="evil"), "no proper task"),
        (lambda c: c.update(standardize="evil"), "statistics of train do not fit"),
        (lambda c: c.update(standardize="none"), "statistics of train do not fit"),
        (lambda c: c["chosen"].update(by="__class__"), "no proper chosen"),
        (lambda c: c["calibration"].update(temperature=0), "no proper calibration"),
        (lambda c: c["calibration"].update(correction=["a"]), "no proper calibration"),
        (lambda c: c["calibration"].update(correction=[0.0]), "calibration is not that of 2 classes"),
        (lambda c: c["calibration"].update(thresholds=[]), "calibration is not that of 2 classes"),
        (lambda c: c["splits"].pop("digest"), "no proper splits"),
        (lambda c: c.update(created=3), "no proper created"),
    ],
)
def test_a_config_of_strangers_is_checked(run: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    changed(run, "config.json", change)
    with pytest.raises(RunError, match=words):
        use(run)


@pytest.mark.integration
def test_a_positive_class_that_is_none(run: Path) -> None:
    changed(run, "config.json", lambda c: c.update(positive="\x1b[2J"))
    with pytest.raises(RunError, match="positive class is none of its classes"):
        _ = load_run(run).positive


@pytest.mark.integration
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(val=None), lambda m: m.update(test=[]), lambda m: m.update(controls={}),
        lambda m: m["test"].update(auroc="evil"), lambda m: m["val"].pop("auroc"), lambda m: m["val"].pop("nll"),
        lambda m: m.update(controls=[{"val": {}, "test": {}}]),
    ],
)  # fmt: skip
def test_metrics_of_strangers_are_checked(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    changed(run, "metrics.json", change)
    with pytest.raises(RunError, match="is damaged"):
        use(run)
    assert list_runs(run.parent) == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", b"[" * 100_000, "deeper than 64"),
        ("metrics.json", b'{"val": NaN}', "NaN is no number"),
        ("history.csv", b"epoch\nevil\n", "could not convert"),
        ("history.csv", b"epoch,a\n1\n", "is damaged"),
        ("history.csv", b"epoch\n", "holds no epochs"),
        ("history.csv", b'"' + b"x" * 200_000, "field larger than field limit"),
        ("head.safetensors", b"\xff" * 8 + b"{}", "is damaged"),
        ("head.safetensors", save({"ln.weight": torch.zeros(3, 6), "ln.bias": torch.zeros(0)}), "does not fit"),
        ("head.safetensors", save({"ln.weight": torch.zeros(2, 8), "ln.bias": torch.zeros(2)}), "statistics of train"),
    ],
)
def test_files_of_a_run_of_strangers(run: Path, name: str, data: bytes, words: str) -> None:
    (run / name).write_bytes(data)
    if name != "config.json":
        with pytest.raises(RunError, match="is not what was written"):
            use(run)
        reseal(run)
    with pytest.raises(RunError, match=words):
        use(run)


@pytest.mark.integration
def test_links_in_a_run_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "predictions.csv").unlink()
    (run / "predictions.csv").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match=r"symbolic links \(predictions.csv\)"):
        load_run(run)


@pytest.mark.integration
def test_a_sound_run_of_strangers_is_used(run: Path) -> None:
    use(run)
