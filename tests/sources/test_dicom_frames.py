"""DICOM files in data sets: frames as images of their own, patients as groups, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.dicom_files import RAMP, dicom_bytes, pydicom

import featurecache
from featurecache.errors import BadOption, SourceError, UnreadableImage
from featurecache.images import dicom
from featurecache.images.decoding import decode, digest, image_header
from featurecache.sources import open_source, reopen
from featurecache.sources.pseudonyms import load_secret, pseudonymise
from featurecache.sources.summary import describe_dataset

TINY = {"backbone": "vit-demo", "random_weights": True}
TWO, THREE = (np.arange(n * 16, dtype=np.uint8).reshape(n, 4, 4) for n in (2, 3))


def save(path: Path, pixels: np.ndarray = RAMP, *arguments: Any, **elements: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dicom_bytes(pixels, *arguments, **elements))
    return path.read_bytes()


def test_frames_are_images_of_their_own(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 4, 6)).astype(np.uint8)
    raw = save(tmp_path / "a.dcm", frames)
    save(tmp_path / "b.dcm")
    data = open_source(tmp_path)
    assert data.ids == [*(f"a.dcm#frame={k}" for k in range(12)), "b.dcm"]
    for row in range(12):
        np.testing.assert_array_equal(decode(data.read(row))[0].numpy(), frames[row])
        assert digest(data.read(row)) == digest(raw, row)
    assert len({digest(raw, k) for k in range(12)}) == 12 and digest(raw) == digest(raw, 0) != digest(data.read(12))
    assert "1 DICOM file with 12 frames" in " ".join(data.notes)
    assert data.path(11) == str(tmp_path / "a.dcm")


def test_frames_in_class_folders_bear_the_label_and_splits_of_their_file(tmp_path):
    for name in ("train/ill/a", "train/well/b", "test/ill/c"):
        save(tmp_path / f"{name}.dcm", TWO)
    data = open_source(tmp_path)
    assert data.ids[:2] == ["test/ill/c.dcm#frame=0", "test/ill/c.dcm#frame=1"]
    assert (data.labels.tolist(), data.splits) == ([0, 0, 0, 0, 1, 1], ["test"] * 2 + ["train"] * 4)
    assert data.groups == [name for name in data.ids[::2] for _ in range(2)]  # frames stay together


def test_a_table_lists_files_or_single_frames(tmp_path):
    save(tmp_path / "a.dcm", THREE)
    save(tmp_path / "b.dcm", TWO)
    (tmp_path / "t.csv").write_text("path,label,age\na.dcm#frame=2,x,50\nb.dcm,y,60\na.dcm#frame=0,y,50\n")
    data = open_source(tmp_path / "t.csv")
    assert data.ids == ["a.dcm#frame=2", "b.dcm#frame=0", "b.dcm#frame=1", "a.dcm#frame=0"]
    assert (data.labels.tolist(), data.meta["age"].tolist()) == ([0, 1, 1, 1], [50, 60, 60, 50])
    assert decode(data.read(0))[0, 0, 0] == 32
    assert data.groups == ["a.dcm#frame=2", "b.dcm#frame=0", "b.dcm#frame=0", "a.dcm#frame=2"]


@pytest.mark.parametrize("name", ["scans/{}.dcm", "scans\\{}.dcm", "scans/{}"])
def test_frames_of_a_file_that_a_table_calls_otherwise_are_read(tmp_path, name):
    save(tmp_path / "scans" / "a.dcm", THREE)
    save(tmp_path / "scans" / "b.dcm", TWO)
    (tmp_path / "t.csv").write_text(f"path,label\n{name.format('a')},x\n{name.format('b')},y\n")
    data = open_source(tmp_path / "t.csv")
    assert data.ids == [f"{name.format(file)}#frame={k}" for file, n in (("a", 3), ("b", 2)) for k in range(n)]
    assert [int(decode(data.read(row))[0, 0, 0]) for row in range(5)] == [0, 16, 32, 0, 16]


def test_a_frame_that_is_not_there_is_a_named_failure(tmp_path):
    save(tmp_path / "a.dcm", TWO)
    (tmp_path / "t.csv").write_text("path\na.dcm#frame=2\nc.dcm#frame=0\n")
    data = open_source(tmp_path / "t.csv")
    with pytest.raises(UnreadableImage, match=r"no frame 2: the file has 2, counted from 0"):
        decode(data.read(0))
    with pytest.raises(UnreadableImage, match="no such file"):
        data.read(1)


def test_a_file_that_changes_between_its_frames_is_read_again(tmp_path):
    save(tmp_path / "a.dcm", TWO)
    data = open_source(tmp_path)
    data.read(0)
    save(tmp_path / "a.dcm", np.full((2, 4, 5), 9, np.uint8))
    assert decode(data.read(1))[0, 0].tolist() == [9] * 5


def test_headers_are_read_once_in_a_process_and_again_where_a_file_has_changed(tmp_path, monkeypatch):
    reads, real = [], dicom.read_header
    save(tmp_path / "a.dcm", TWO)
    monkeypatch.setattr(dicom, "read_header", lambda *arguments: reads.append(1) or real(*arguments))
    assert [len(open_source(tmp_path)) for _ in range(3)] == [2, 2, 2] and len(reads) == 1
    save(tmp_path / "a.dcm", THREE)
    assert len(open_source(tmp_path)) == 3 and len(reads) == 2


# patients


def patients(folder: Path, *names: str, **elements: Any) -> Path:
    for number, name in enumerate(names):
        pixels = np.full((4, 4), number, np.uint8)
        save(folder / f"{number}.dcm", pixels, PatientID=name, PatientName="DOE^JANE", **elements)
    return folder


def test_the_patient_is_the_group_where_nobody_says_one_and_that_is_said(tmp_path):
    data = open_source(patients(tmp_path, "p7", "p8", "p7", ""))
    assert data.groups == ["p7", "p8", "p7", "3.dcm"]
    assert any("PatientID" in note and "--hash-groups" in note for note in data.notes)
    hashed = pseudonymise(data, load_secret(), ids=False, groups=True)
    assert not any("--hash-groups" in note for note in hashed.notes[:2])


def test_a_table_with_groups_keeps_its_own(tmp_path):
    (patients(tmp_path, "p7", "p8") / "t.csv").write_text("path,patient\n0.dcm,a\n1.dcm,a\n")
    data = open_source(tmp_path / "t.csv")
    assert data.groups == ["a", "a"] and not any("PatientID" in note for note in data.notes)


def test_one_patient_in_all_files_says_nothing(tmp_path):
    data = open_source(patients(tmp_path, "ANON", "ANON"))
    assert data.groups is None and "ANON" not in str(data)
    assert any("tells nobody apart" in note for note in data.notes)


@pytest.mark.integration
@pytest.mark.parametrize("hashed", [False, True])
def test_nothing_of_a_patient_but_the_group_reaches_the_cache_and_hashing_hides_that(tmp_path, hashed):
    folder, cache = patients(tmp_path / "d", "SECRET-7", "SECRET-8", "SECRET-9"), tmp_path / "cache"
    broken = dicom_bytes(RAMP, NumberOfFrames="12345678").replace(b"12345678", b"DOE^JANE")
    (folder / "3.dcm").write_bytes(broken)
    featurecache.extract(folder, cache=cache, outputs="cls", hash_groups=hashed, **TINY)
    stored = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    assert b"JANE" not in stored and b"header cannot be read (ValueError)" in stored
    assert (b"SECRET-7" in stored) == (not hashed)


def test_frames_of_a_file_without_a_patient_are_hidden_with_their_ids(tmp_path):
    raw = save(tmp_path / "doe.dcm", TWO)
    data = pseudonymise(open_source(tmp_path), load_secret(), ids=True, groups=False)
    assert data.groups == [data.ids[0]] * 2
    assert "doe" not in "".join([*data.ids, *data.groups])
    assert [digest(data.read(row)) for row in (0, 1)] == [digest(raw, row) for row in (0, 1)]


# what is said


def test_which_window_was_taken_is_said(tmp_path):
    patients(tmp_path, "", WindowCenter=[1, 2], WindowWidth=[3, 4])
    save(tmp_path / "x.dcm", RAMP.astype(np.uint16), BitsStored=12)
    data = open_source(tmp_path)
    notes = " ".join(data.notes)
    assert "1 DICOM file with several windows; the first is used." in notes
    assert "1 DICOM file without a window" in notes
    assert describe_dataset(data).kinds == {"grey (DICOM)": 1, "12-bit grey (DICOM)": 1}


def test_without_pydicom_other_images_are_read_and_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    dicom.installed.cache_clear()
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    assert decode(open_source(tmp_path).read(0))[0, 0].tolist() == [7] * 4
    (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(SourceError, match=r"has 1 image in DICOM\. .*pip install 'featurecache\[dicom\]'"):
        open_source(tmp_path)
    for ask in (decode, digest, image_header):
        with pytest.raises(UnreadableImage, match="pip install"):
            ask((tmp_path / "b.dcm").read_bytes())
    monkeypatch.undo()
    dicom.installed.cache_clear()


# a whole extraction


def rle(frames: np.ndarray) -> bytes:
    """Frames uint8 [F, H, W] as literal runs (PS3.5 annex G), encapsulated."""
    encoded = []
    for frame in frames:
        rows = b"".join(bytes([len(row) - 1]) + row.tobytes() for row in frame)
        encoded.append(np.array([1, 64, *[0] * 14], "<u4").tobytes() + rows + b"\0" * (len(rows) % 2))
    return pydicom.encaps.encapsulate(encoded)


@pytest.mark.integration
def test_frames_extracted_and_found_again_by_name(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 20)).astype(np.uint8)
    save(tmp_path / "d" / "a.dcm", frames, pydicom.uid.RLELossless, PixelData=rle(frames))
    (tmp_path / "d" / "b.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"junk" * 9)
    result = featurecache.extract(tmp_path / "d", cache=tmp_path / "cache", outputs="cls", **TINY)
    view = featurecache.open_view(result.view)
    assert view.ids.tolist() == ["a.dcm#frame=0", "a.dcm#frame=1", "a.dcm#frame=2"]
    assert [failed["id"] for failed in view.failed] == ["b.dcm"]
    again = reopen(view.source)
    assert [digest(again.read(row)).encode() for row in range(3)] == view.digests.tolist()
    assert len(set(view.digests.tolist())) == 3


# whatever the ending; pages of TIFF


def test_dicom_is_found_by_its_content_whatever_the_ending(tmp_path):
    raw = save(tmp_path / "a" / "MR.0001.IMA")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "scan.old").write_bytes(raw[144 + int.from_bytes(raw[140:144], "little") :])  # no preamble
    save(tmp_path / "b" / "1.2.840.113619")
    (tmp_path / "b" / "notes.txt").write_text("nothing")
    (tmp_path / "b" / "README").write_bytes(b"hello" * 99)
    examples = Path(pydicom.__file__).parent / "data" / "test_files"
    (tmp_path / "b" / "DICOMDIR").write_bytes((examples / "dicomdirtests" / "DICOMDIR").read_bytes())
    data = open_source(tmp_path)
    assert data.ids == ["a/MR.0001.IMA", "b/1.2.840.113619", "b/scan.old"]
    assert [decode(data.read(row))[0, 0, 3] for row in range(3)] == [3, 3, 3]


def stack(path: Path, pages: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(page) for page in pages)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, "TIFF", save_all=True, append_images=others)
    return path.read_bytes()


def test_pages_of_a_stack_are_images_of_their_own_where_all_are_asked_for(tmp_path):
    raw = stack(tmp_path / "x" / "a.tif", THREE)
    Image.fromarray(RAMP).save(tmp_path / "x" / "b.tif")
    data = open_source(tmp_path, page="all")
    assert data.ids == ["x/a.tif#frame=0", "x/a.tif#frame=1", "x/a.tif#frame=2", "x/b.tif"]
    assert [digest(data.read(row)) for row in range(3)] == [digest(raw, page) for page in range(3)]
    np.testing.assert_array_equal(decode(data.read(2))[0].numpy(), THREE[2])
    assert data.groups == [data.ids[0]] * 3 + ["x/b.tif"] and "1 TIFF file with 3 pages" in " ".join(data.notes)
    assert reopen(data.source).ids == data.ids


def test_one_page_of_each_stack_and_frame_of_each_dicom_file(tmp_path):
    stack(tmp_path / "a.tif", THREE)
    stack(tmp_path / "b.tif", TWO)
    save(tmp_path / "c.dcm", THREE)
    data = open_source(tmp_path, page="2")
    assert data.ids == ["a.tif#frame=2", "b.tif#frame=2", "c.dcm#frame=2"] and data.groups is None
    assert [int(decode(data.read(row))[0, 0, 0]) for row in (0, 2)] == [32, 32]
    with pytest.raises(UnreadableImage, match="no page 2: the file has 2"):
        decode(data.read(1))


def test_without_a_page_the_first_is_taken_and_a_look_says_how_many_there_are(tmp_path):
    stack(tmp_path / "a.tif", THREE)
    data = open_source(tmp_path)
    assert data.ids == ["a.tif"] and int(decode(data.read(0))[0, 0, 0]) == 0
    assert any("is a TIFF stack of 3 pages" in note and "--page all" in note for note in describe_dataset(data).notes)


def test_a_page_that_is_none_and_a_page_of_no_files_are_refused(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with pytest.raises(BadOption, match='--page is a number from 0 on, or all; not "-1"'):
        open_source(tmp_path, page="-1")
    with pytest.raises(BadOption, match="images in files of their own"):
        open_source("digits", page="1")
    Image.fromarray(RAMP).save(tmp_path / "a.tif")
    assert "No file holds several images: --page all changes nothing." in open_source(tmp_path, page="all").notes
