"""WebDataset tars, made by Python's own tarfile or byte by byte, and read in place."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import featurecache
from featurecache.errors import SourceError, UnreadableImage
from featurecache.extraction import scan
from featurecache.extraction.digest_cache import DigestCache
from featurecache.extraction.scan import scan as scan_dataset
from featurecache.images.decoding import decode, digest
from featurecache.sources import open_source, reopen, webdataset
from featurecache.sources.summary import describe_dataset


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 4), shade).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            archive.addfile(entry, io.BytesIO(member[1]))
    return path


def samples(*rows: tuple[str, object], start: int = 0, field: str = "cls") -> list[tuple[str, bytes]]:
    """A PNG whose shade is its number, and its label, for each (key, label)."""
    found = []
    for number, (key, label) in enumerate(rows, start):
        text = json.dumps(label) if field == "json" else str(label)
        found += [(f"{key}.png", png(number)), (f"{key}.{field}", text.encode())]
    return found


def shades(data) -> list[int]:
    return [int(decode(data.read(row))[0, 0, 0]) for row in range(len(data))]


def refused(data: object, *words: str, **options) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(data, **options)
    for word in words:
        assert word in str(caught.value)


# -- what is read


def test_samples_of_a_tar_by_key_with_their_classes(tmp_path):
    data = open_source(tar(tmp_path / "chest.tar", *samples(("b", 1), ("a", 0), ("p1/c", 1))))
    assert data.ids == ["chest.tar:b", "chest.tar:a", "chest.tar:p1/c"]
    assert (data.labels.tolist(), data.classes, data.task) == ([1, 0, 1], ["0", "1"], "binary")
    assert (shades(data), data.name) == ([0, 1, 2], "chest")


def test_bytes_are_those_of_the_file_wherever_it_lies(tmp_path):
    path = tar(tmp_path / "a.tar", *samples(*[(f"{k:03}", k % 2) for k in range(40)]))
    data = open_source(path)
    with tarfile.open(path) as archive:
        for row in (39, 0, 17):
            assert data.read(row) == archive.extractfile(f"{row:03}.png").read()
    assert digest(data.read(3)) == digest(png(3))  # the same image as in a folder


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_kind_of_tar(tmp_path, form):
    key = "röntgen/" * (3 if form == tarfile.USTAR_FORMAT else 30) + "x" * 60
    data = open_source(tar(tmp_path / "a.tar", (f"./{key}.jpeg", png(7)), (f"{key}.cls", b"2"), format=form))
    assert data.ids == [f"a.tar:{key}"]
    assert shades(data) == [7]


@pytest.mark.parametrize(
    "pattern", ["s-{000..002}.tar", "s-*.tar", "s-00[0-2].tar", "s-{000,001,002}.tar", "{s,s}-00{0..2}.tar", ""]
)
def test_several_tars_by_pattern_or_folder(tmp_path, pattern):
    for number in range(3):
        tar(tmp_path / f"s-{number:03}.tar", *samples((f"k{number}", number), start=number))
    data = open_source(tmp_path / pattern if pattern else tmp_path)
    assert data.ids == ["s-000.tar:k0", "s-001.tar:k1", "s-002.tar:k2"]
    assert shades(data) == [0, 1, 2]
    again = reopen(data.source)
    assert (again.ids, again.labels.tolist()) == (data.ids, data.labels.tolist())
    assert data.name == ("s" if pattern.startswith("s") else data.name)


def test_the_names_of_tars_tell_the_split(tmp_path):
    for number, name in enumerate(("train-000", "train-001", "imagenet-val-000", "test")):
        tar(tmp_path / f"{name}.tar", *samples((f"k{number}", number % 2)))
    data = open_source(tmp_path)
    assert dict(zip(data.ids, data.splits, strict=True)) == {
        "imagenet-val-000.tar:k2": "val", "test.tar:k3": "test", "train-000.tar:k0": "train",
        "train-001.tar:k1": "train",
    }  # fmt: skip


def test_tars_in_split_folders(tmp_path):
    tar(tmp_path / "train" / "0.tar", *samples(("a", 0), ("b", 1)))
    tar(tmp_path / "validation" / "0.tar", *samples(("a", 1)))
    data = open_source(tmp_path)
    assert data.ids == ["train/0.tar:a", "train/0.tar:b", "validation/0.tar:a"]
    assert data.splits == ["train", "train", "val"]


def test_a_split_told_by_some_names_only_is_not_guessed(tmp_path):
    tar(tmp_path / "train-0.tar", *samples(("a", 0)))
    tar(tmp_path / "more.tar", *samples(("b", 1)))
    refused(tmp_path, "train-0.tar is named for a split and more.tar for none")
    (tmp_path / "more.tar").rename(tmp_path / "train-test.tar")
    refused(tmp_path, "train-test.tar stands for two splits")


def test_fields_of_json_serve_as_the_columns_of_a_table(tmp_path):
    rows = [
        ("a", {"label": "ill", "split": "train", "patient_id": 7, "age": 50, "boxes": [1]}),
        ("b", {"label": "well", "split": "train", "patient_id": 7, "age": 51.5}),
        ("c", {"label": "ill", "split": "test", "patient_id": None, "age": None}),
    ]
    data = open_source(tar(tmp_path / "a.tar", *samples(*rows, field="json")))
    assert (data.classes, data.labels.tolist(), data.splits) == (["ill", "well"], [0, 1, 0], ["train", "train", "test"])
    assert data.groups == ["7", "7", "a.tar:c"]
    np.testing.assert_array_equal(data.meta["age"], [50, 51.5, np.nan])
    assert any("boxes" in note for note in data.notes)


def test_columns_name_the_field_and_the_image(tmp_path):
    members = []
    for number, key in enumerate("abc"):
        members += [(f"{key}.jpg", png(number)), (f"{key}.seg.png", png(200)),
                    (f"{key}.json", json.dumps({"finding_1": number % 2, "finding_2": 1}).encode())]  # fmt: skip
    path = tar(tmp_path / "a.tar", *members)
    refused(path, "a.tar:a has several images (jpg, seg.png); --column path=jpg says which")
    data = open_source(path, columns={"path": "jpg", "label": "finding_1,finding_2"})
    assert (shades(data), data.labels.tolist(), data.task) == ([0, 1, 2], [[0, 1], [1, 1], [0, 1]], "multilabel")
    assert reopen(data.source).labels.tolist() == data.labels.tolist()
    refused(path, "finding_3", columns={"path": "jpg", "label": "finding_3"})
    refused(path, "expected a .bmp", columns={"path": "bmp"})


def test_classes_txt_names_the_numbers_and_keeps_their_order(tmp_path):
    (tmp_path / "classes.txt").write_text("well\nill\nunsure\n")
    data = open_source(tar(tmp_path / "a.tar", *samples(("a", 1), ("b", 0), ("c", "ill"), ("d", ""))))
    assert (data.classes, data.labels.tolist()) == (["well", "ill", "unsure"], [1, 0, 1, -1])
    tar(tmp_path / "a.tar", *samples(("a", 3)))
    refused(tmp_path / "a.tar", 'the label of a.tar:a is "3"; expected 0 to 2 or one of well, ill, unsure')
    (tmp_path / "classes.txt").write_text("well\n\nill\n")
    refused(tmp_path / "a.tar", "has an empty line or a name twice")


def test_samples_without_an_image_and_other_files_are_counted(tmp_path):
    path = tar(tmp_path / "a.tar", *samples(("a", 0), ("b", 1)), ("c.cls", b"1"), ("a.npy", b"-"), ("README", b"-"))
    data = open_source(path)
    assert data.ids == ["a.tar:a", "a.tar:b"]
    assert "1 samples hold no image" in data.notes[0]
    assert "2 entries" in data.notes[1]
    refused(tar(tmp_path / "b.tar", ("a.txt", b"-")), "no images in", ".txt 1")


def test_tars_without_labels(tmp_path):
    data = open_source(tar(tmp_path / "a.tar", ("a.png", png(0)), ("b.png", png(1))))
    assert (data.task, data.labels.tolist()) == ("unlabelled", [-1, -1])
    assert any("No labels were found" in note for note in data.notes)


def test_a_folder_of_images_with_a_tar_in_it_stays_a_folder_of_images(tmp_path):
    for name in ("ill", "well"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(1))
    tar(tmp_path / "download.tar", *samples(("a", 0)))
    assert open_source(tmp_path).source["kind"] == "folder"


def test_describe_and_a_damaged_image_in_a_tar(tmp_path):
    found = describe_dataset(
        open_source(tar(tmp_path / "a.tar", *samples(("a", 0)), ("b.png", b"no png"), ("b.cls", b"1")))
    )
    assert found.unreadable == [("a.tar:b", 'not an image (starts with "no")')]


# -- hostile and damaged tars


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def test_links_and_devices_are_not_followed_and_names_lead_nowhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(99))
    path = tar(
        tmp_path / "t" / "a.tar", link("a.png", str(tmp_path / "secret.png")), link("b.png", "c.png", tarfile.LNKTYPE),
        link("d.png", "", tarfile.CHRTYPE), link("e.png", "", tarfile.FIFOTYPE), ("../../out.png", png(5)),
        ("/etc/f.png", png(6)),
    )  # fmt: skip
    data = open_source(path)
    assert data.ids == ["a.tar:../../out", "a.tar:/etc/f"]
    assert shades(data) == [5, 6]
    assert any("links or devices 4" in note for note in data.notes)
    assert sorted(os.listdir(tmp_path)) == ["secret.png", "t"]


def test_a_tar_that_is_cut_off_is_refused_at_any_place(tmp_path):
    whole = tar(tmp_path / "a.tar", *samples(("a", 0), ("b", 1))).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last entry's data
    for size in (end, end - 300, end - 512, 1024, 700, 100, 0):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        refused(tmp_path / "a.tar", "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])  # one block of the two is enough
    assert len(open_source(tmp_path / "a.tar")) == 2


def test_two_tars_one_behind_the_other_are_not_read_as_the_first(tmp_path):
    one = tar(tmp_path / "a.tar", *samples(("a", 0))).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + tar(tmp_path / "b.tar", *samples(("b", 1))).read_bytes())
    refused(tmp_path / "a.tar", "goes on behind byte")


def test_a_damaged_header_in_the_middle_is_refused_and_not_the_end(tmp_path):
    data = bytearray(tar(tmp_path / "a.tar", *samples(("a", 0), ("b", 1))).read_bytes())
    data[1024 + 3] ^= 0xFF  # in the name of the second entry: its checksum is wrong
    (tmp_path / "a.tar").write_bytes(bytes(data))
    refused(tmp_path / "a.tar", "a.tar")


def test_a_size_that_leads_beyond_the_file_or_backwards(tmp_path):
    for size in (b"77777777777\0", b"\xff" * 11 + b"\x80"):  # 8 GiB; a negative number in base 256
        data = bytearray(tar(tmp_path / "a.tar", ("a.png", png(0)), ("b.png", png(1))).read_bytes())
        data[124:136] = size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (tmp_path / "a.tar").write_bytes(bytes(data))
        refused(tmp_path / "a.tar", "a.tar")


def test_a_header_that_declares_a_name_of_gigabytes_is_not_read(tmp_path):
    data = bytearray(tar(tmp_path / "a.tar", ("a.png", png(0))).read_bytes())
    data[156:157] = tarfile.GNUTYPE_LONGNAME
    data[124:136] = b"17777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(bytes(data))
    os.truncate(tmp_path / "a.tar", 3 << 30)  # sparse
    refused(tmp_path / "a.tar", "a header of")


def test_a_compressed_tar_says_to_unpack_it(tmp_path):
    plain = tar(tmp_path / "a.tar", *samples(("a", 0)))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    said = f"{tmp_path / 'b.tar.gz'} is compressed, and images are read in place: unpack it"
    refused(tmp_path / "b.tar.gz", said)
    with pytest.raises(SourceError, match=f"^{said}"):
        open_source(tmp_path)  # a folder of tars, of which one would be left out


@pytest.mark.parametrize(
    ("members", "word"),
    [
        ([("a.png", b"-"), ("a.png", b"-")], "holds a.png twice"),
        ([("a.png", b"-"), ("a.json", b"{")], "a.tar:a.json is no JSON"),
        ([("a.png", b"-"), ("a.json", b"[1]")], "holds list; expected an object"),
        ([("a.png", b"-"), ("a.json", b"[" * 200_000)], "a.tar:a.json is no JSON"),
        ([("a.png", b"-"), ("a.cls", b"\xff\xfe")], "a.tar:a.cls is no UTF-8"),
        ([("a.png", b"-"), ("a.cls", b"1" * 1_100_000)], "expected at most 1,048,576"),
    ],
)
def test_samples_that_cannot_be_told_are_named(tmp_path, members, word):
    refused(tar(tmp_path / "a.tar", *members), word)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    entry = tarfile.TarInfo("\udce9.png")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
        archive.addfile(entry)
    refused(tmp_path / "a.tar", "is not UTF-8")


def test_missing_tars_and_silly_patterns(tmp_path):
    tar(tmp_path / "s-000.tar", *samples(("a", 0)))
    refused(tmp_path / "s-{000..001}.tar", "there is no", "s-001.tar")
    refused(tmp_path / "x-*.tar", "there is no", "x-*.tar")
    refused(tmp_path / "s-{0..999999999}.tar", "stands for 1,000,000,000 tars")
    refused(tmp_path / "s-{9..0}.tar", "stands for")
    refused(tmp_path / "s-00.tar", "there is no folder or file", "Near: s-000.tar")


def test_a_tar_that_changed_since_it_was_opened_is_a_named_failure(tmp_path):
    path = tar(tmp_path / "a.tar", *samples(("a", 0), ("b", 1)))
    data = open_source(path)
    tar(path, *samples(("x", 0), ("y", 1), ("z", 1)))
    with pytest.raises(UnreadableImage, match=r"a\.tar has changed since it was opened"):
        data.read(0)
    path.unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        data.read(0)


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=5), st.integers(0, 11_000))
@settings(max_examples=80, deadline=None)
def test_damaged_tars_are_read_or_refused(tmp_path_factory, changes, size):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    data = bytearray(tar(path, *samples(("a", 0), ("b", 1))).read_bytes())
    for place, value in changes:
        data[place] = value
    path.write_bytes(bytes(data[:size]) if size > 600 else bytes(data))
    try:
        found = open_source(path)
    except SourceError:
        return
    for row in range(len(found)):
        assert found.read(row) is not None


# -- at scale, and in an extraction


def test_a_tar_that_did_not_change_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "YOUNG", 0)
    for number in range(2):
        tar(tmp_path / "d" / f"{number}.tar", *samples(*[(f"k{k}", k % 2) for k in range(5)], start=9 * number))
    first = scan_dataset(open_source(tmp_path / "d"), DigestCache(tmp_path, writes=True), b"", 2)
    tar(tmp_path / "d" / "2.tar", *samples(("new", 0), start=99))
    read, seen = webdataset.TarImages.read, []
    monkeypatch.setattr(webdataset.TarImages, "read", lambda self, row: seen.append(self.ids[row]) or read(self, row))
    again = scan_dataset(open_source(tmp_path / "d"), DigestCache(tmp_path, writes=True), b"", 2)
    assert seen == ["2.tar:new"]
    assert again.digests.tolist()[:10] == first.digests.tolist()


@pytest.mark.integration
def test_extracted_as_the_same_images_in_a_folder_are(tmp_path):
    for number, name in enumerate(("ill/a", "well/b", "ill/c")):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / f"{name}.png").write_bytes(png(40 * number))
    options = {"backbone": "vit-demo", "random_weights": True, "outputs": "cls", "cache": tmp_path / "cache"}
    folder = featurecache.open_view(featurecache.extract(tmp_path / "f", **options).view)
    members = [(f"{k}.png", png(40 * k)) for k in range(3)] + [(f"{k}.cls", b"x") for k in range(3)]
    tar(tmp_path / "t-000.tar", *members)
    result = featurecache.extract(tmp_path / "t-{000..000}.tar", **options)
    view = featurecache.open_view(result.view)
    assert view.ids == ["t-000.tar:0", "t-000.tar:1", "t-000.tar:2"]
    assert result.computed == 0
    order = [folder.ids.index(name) for name in ("ill/a.png", "well/b.png", "ill/c.png")]
    assert view.digests.tolist() == folder.digests[order].tolist()
    np.testing.assert_array_equal(view.array("cls", np.arange(3)), folder.array("cls", np.array(order)))
