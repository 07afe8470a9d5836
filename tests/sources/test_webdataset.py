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
from support.small_sets import encoded, pictures, refused, reopened, shades_of

import featurecache
from featurecache.errors import SeveralReadings, SourceError, UnreadableImage
from featurecache.extraction import scan
from featurecache.extraction.digest_cache import DigestCache
from featurecache.extraction.scan import scan as scan_dataset
from featurecache.images.decoding import digest
from featurecache.sources import open_images, open_source, webdataset
from featurecache.sources.summary import describe_dataset


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
    members = []
    for number, (key, label) in enumerate(rows, start):
        text = json.dumps(label) if field == "json" else str(label)
        members += [(f"{key}.png", encoded(number)), (f"{key}.{field}", text.encode())]
    return members


# -- what is read


def test_a_member_that_its_tar_has_lost_while_it_is_read_is_no_image(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    with open(tmp_path / "a.tar", "rb") as file:
        assert webdataset._read_at(file.fileno(), 2, 8) == b"23456789"
        with pytest.raises(UnreadableImage, match="its tar ends before it does"):
            webdataset._read_at(file.fileno(), 2, 9)


def test_cells_of_samples_are_read_as_those_of_tables(tmp_path):
    data = tar(tmp_path / "signed.tar", *samples(("b", 1), ("a", -1), ("c", 1)))
    with pytest.raises(SeveralReadings) as caught:
        open_source(data)
    assert [each.options for each in caught.value.readings][:2] == [{"task": "binary"}, {"uncertain": "ignore"}]
    assert (open_images(data).task, len(open_images(data))) == ("unlabelled", 3)  # to be predicted
    read = open_source(data, uncertain="zero")
    assert (read.labels.tolist(), read.source["uncertain"]) == ([1, 0, 1], "zero")
    data = tar(tmp_path / "letters.tar", *samples(("b", "a"), ("a", "A"), ("c", "c")))
    assert [open_source(data, letter_case=case).classes for case in ("ignore", "keep")] == [["a", "c"], ["A", "a", "c"]]


def test_samples_with_two_fields_of_labels_are_predicted_without_them(tmp_path):
    fields = {"label": "a", "finding": "b", "patient": "p"}
    data = tar(tmp_path / "two.tar", *samples(("1", fields), ("2", fields), field="json"))
    refused(data, "could be the label: label, finding", error=SeveralReadings)
    assert (open_images(data).task, open_images(data).ids) == ("unlabelled", ["two.tar:1", "two.tar:2"])


def test_samples_of_a_tar_by_key_with_their_classes_and_the_bytes_of_the_files(tmp_path):
    data = open_source(tar(tmp_path / "chest.tar", *samples(("b", 1), ("a", 0), ("p1/c", 1))))
    assert data.ids == ["chest.tar:b", "chest.tar:a", "chest.tar:p1/c"]
    assert (data.labels.tolist(), data.classes, data.task, data.name) == ([1, 0, 1], ["0", "1"], "binary", "chest")
    assert [data.read(row) for row in (2, 0, 1)] == [encoded(shade) for shade in (2, 0, 1)]
    assert data.path(0) is None


def test_a_uid_is_a_key_whole_and_other_names_end_at_their_first_dot(tmp_path):
    names = ("1.2.840.113.1", "1.2.840.113.2", "a")
    members = [member for key in names for member in samples((key, 0))]
    data = open_source(tar(tmp_path / "a.tar", *members, ("b.small.png", encoded(3))))
    assert data.ids == [*(f"a.tar:{key}" for key in names), "a.tar:b"]
    assert data.labels.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_kind_of_tar(tmp_path, form):
    key = "röntgen/" * (3 if form == tarfile.USTAR_FORMAT else 30) + "x" * 60
    data = open_source(tar(tmp_path / "a.tar", (f"./{key}.jpeg", encoded(7)), (f"{key}.cls", b"2"), format=form))
    assert (data.ids, shades_of(data)) == ([f"a.tar:{key}"], [7])


@pytest.mark.parametrize(
    "pattern", ["s-{000..002}.tar", "s-*.tar", "s-00[0-2].tar", "s-{000,001,002}.tar", "{s,s}-00{0..2}.tar", ""]
)
def test_several_tars_by_pattern_or_folder(tmp_path, pattern):
    for number in range(3):
        tar(tmp_path / f"s-{number:03}.tar", *samples((f"k{number}", number), start=number))
    data = reopened(open_source(tmp_path / pattern if pattern else tmp_path))
    assert data.ids == ["s-000.tar:k0", "s-001.tar:k1", "s-002.tar:k2"]
    assert (shades_of(data), data.name) == ([0, 1, 2], "s" if pattern.startswith("s") else data.name)


@pytest.mark.parametrize(
    ("tars", "splits"),
    [
        (["imagenet-val-0", "test", "train-0", "train-1"], ["val", "test", "train", "train"]),
        (["train/0", "train/1", "validation/0"], ["train", "train", "val"]),
        (["0", "1"], ["", ""]),
    ],
)
def test_the_names_of_tars_or_of_their_folders_tell_the_split(tmp_path, tars, splits):
    for number, name in enumerate(tars):
        tar(tmp_path / f"{name}.tar", *samples((f"k{number}", number % 2)))
    data = open_source(tmp_path)
    assert (data.ids, data.splits) == ([f"{name}.tar:k{number}" for number, name in enumerate(tars)], splits)


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
        members += [(f"{key}.jpg", encoded(number)), (f"{key}.seg.png", encoded(200)), (f"{key}.txt", b"x"),
                    (f"{key}.json", json.dumps({"finding_1": number % 2, "finding_2": 1}).encode())]  # fmt: skip
    path = tar(tmp_path / "a.tar", *members)
    with pytest.raises(SeveralReadings, match=r"a.tar:a has several images .*; --column path=jpg says which") as caught:
        open_source(path)
    assert [each.options["columns"] for each in caught.value.readings] == [{"path": "jpg"}, {"path": "seg.png"}]
    data = reopened(open_source(path, columns={"path": "jpg", "label": "finding_1,finding_2"}))
    assert (shades_of(data), data.labels.tolist(), data.task) == ([0, 1, 2], [[0, 1], [1, 1], [0, 1]], "multilabel")
    assert open_source(path, columns={"path": "jpg", "label": "txt"}).classes == ["x"] and "txt" not in data.meta
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
    (tmp_path / "classes.txt").write_bytes(b"\xff")
    refused(tmp_path / "a.tar", "classes.txt cannot be read as UTF-8 text")


def test_what_is_no_sample_is_counted_and_what_has_no_label_said(tmp_path):
    members = [*samples(("a", 0), ("b", 1)), ("c.cls", b"1"), ("a.npy", b"-"), ("README", b"-")]
    data = open_source(tar(tmp_path / "a.tar", *members))
    assert data.ids == ["a.tar:a", "a.tar:b"]
    assert data.notes == (
        "1 sample without an image left out.",
        "Ignored in the tars, neither image nor label: 2 (.npy 1, no extension 1).",
    )
    refused(tar(tmp_path / "b.tar", ("a.txt", b"-")), "no images in", ".txt 1")
    data = open_source(tar(tmp_path / "a.tar", ("a.png", encoded(0)), ("b.png", b"no png")))
    assert (data.task, data.labels.tolist()) == ("unlabelled", [-1, -1])
    assert "No labels were found" in data.notes[0]
    assert describe_dataset(data).unreadable == [("a.tar:b", 'not an image (starts with "no")')]


def test_a_folder_of_images_with_a_tar_in_it_stays_a_folder_of_images(tmp_path):
    pictures(tmp_path, "ill/1.png", "well/1.png")
    tar(tmp_path / "download.tar", *samples(("a", 0)))
    assert open_source(tmp_path).source["kind"] == "folder"


# -- hostile and damaged tars


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def with_header(path: Path, **fields: bytes) -> Path:
    """A tar in whose first header other bytes stand, under a checksum that is right."""
    data = bytearray(tar(path, ("a.png", encoded(0)), ("b.png", encoded(1))).read_bytes())
    for name, value in {**fields, "checksum": b" " * 8}.items():
        start = {"size": 124, "checksum": 148, "kind": 156}[name]
        data[start : start + len(value)] = value
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(bytes(data))
    return path


def test_links_and_devices_are_not_followed_and_names_lead_nowhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(99))
    path = tar(
        tmp_path / "t" / "a.tar", link("a.png", str(tmp_path / "secret.png")), link("b.png", "c.png", tarfile.LNKTYPE),
        link("d.png", "", tarfile.CHRTYPE), link("e.png", "", tarfile.FIFOTYPE), ("../../out.png", encoded(5)),
        ("/etc/f.png", encoded(6)),
    )  # fmt: skip
    data = open_source(path)
    assert (data.ids, shades_of(data)) == (["a.tar:../../out", "a.tar:/etc/f"], [5, 6])
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


def test_what_goes_on_behind_the_end_or_is_damaged_in_the_middle_is_not_the_end(tmp_path):
    data = bytearray(tar(tmp_path / "a.tar", *samples(("a", 0), ("b", 1))).read_bytes())
    (tmp_path / "a.tar").write_bytes(data + tar(tmp_path / "b.tar", *samples(("b", 1))).read_bytes())
    refused(tmp_path / "a.tar", "goes on behind byte")
    data[1024 + 3] ^= 0xFF  # in the name of the second entry: its checksum is wrong
    (tmp_path / "a.tar").write_bytes(bytes(data))
    refused(tmp_path / "a.tar", "a.tar")


def test_a_header_that_declares_other_sizes_than_the_file_has_is_refused(tmp_path):
    whole = "a.tar is cut off or damaged: "
    for size in (b"77777777777\0", b"\xff" * 11 + b"\x80"):  # 8 GiB; a negative number in base 256
        refused(with_header(tmp_path / "a.tar", size=size), whole)
    path = with_header(tmp_path / "a.tar", kind=tarfile.GNUTYPE_LONGNAME, size=b"17777777777\0")
    os.truncate(path, 3 << 30)  # sparse
    refused(path, "a header of")


def test_a_compressed_tar_says_to_unpack_it(tmp_path):
    plain = tar(tmp_path / "a.tar", *samples(("a", 0)))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for data in (tmp_path / "b.tar.gz", tmp_path):  # a folder of tars, of which one would be left out
        refused(data, f"{tmp_path / 'b.tar.gz'} is compressed, and images are read in place: unpack it")


@pytest.mark.parametrize(
    ("members", "word"),
    [
        ([("a.png", b"-"), ("a.png", b"-")], "holds a.png twice"),
        ([("a.png", b"-"), ("a.json", b"{")], "a.tar:a.json is no JSON"),
        ([("a.png", b"-"), ("a.json", b"[1]")], "holds list; expected an object"),
        ([("a.png", b"-"), ("a.json", b"[" * 200_000)], "a.tar:a.json is no JSON"),
        ([("a.png", b"-"), ("a.cls", b"\xff\xfe")], "a.tar:a.cls is no UTF-8"),
        ([("a.png", b"-"), ("a.cls", b"1" * 1_100_000)], "expected at most 1,048,576"),
        ([tarfile.TarInfo("\udce9.png")], "is not UTF-8"),
    ],
)
def test_samples_that_cannot_be_told_are_named(tmp_path, members, word):
    refused(tar(tmp_path / "a.tar", *members, format=tarfile.USTAR_FORMAT), word)


def test_missing_tars_and_silly_patterns(tmp_path):
    tar(tmp_path / "s-000.tar", *samples(("a", 0)))
    refused(tmp_path / "s-{000..001}.tar", "there is no", "s-001.tar")
    refused(tmp_path / "x-*.tar", "there is no", "x-*.tar")
    refused(tmp_path / "s-{0..999999999}.tar", "stands for 1,000,000,000 tars")
    refused(tmp_path / "s-{9..0}.tar", "stands for")
    refused(tmp_path / "s-00.tar", "there is no folder or file", "Near: s-000.tar")
    (tmp_path / "t.tar").symlink_to(tmp_path / "gone.tar")
    refused(tmp_path / "t.tar", "cannot be opened: a link to a file that is gone")


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
        opened = open_source(path)
    except SourceError:
        return
    assert all(opened.read(row) is not None for row in range(len(opened)))


# -- in an extraction


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
    pictures(tmp_path / "f", "ill/a.png", "ill/b.png", "well/c.png")
    options = {"backbone": "vit-demo", "random_weights": True, "outputs": "cls", "cache": tmp_path / "cache"}
    folder = featurecache.open_view(featurecache.extract(tmp_path / "f", **options).view)
    tar(tmp_path / "t-000.tar", *samples(*[(str(k), "x") for k in range(3)]))
    result = featurecache.extract(tmp_path / "t-{000..000}.tar", **options)
    view = featurecache.open_view(result.view)
    assert (view.ids.tolist(), result.computed) == (["t-000.tar:0", "t-000.tar:1", "t-000.tar:2"], 0)
    assert view.digests.tolist() == folder.digests.tolist()
    np.testing.assert_array_equal(view.array("cls", np.arange(3)), folder.array("cls", np.arange(3)))


def test_pages_of_stacks_in_tars_are_images_as_in_files(tmp_path):
    stack = io.BytesIO()
    pages = [Image.new("L", (6, 4), shade) for shade in (10, 20, 30)]
    pages[0].save(stack, "TIFF", save_all=True, append_images=pages[1:])
    path = tar(tmp_path / "scans.tar", ("p1.tif", stack.getvalue()), ("p1.cls", b"a"), *samples(("p2", "b"), start=7))
    first, third, every = (open_source(path, page=page) for page in (None, "2", "all"))
    assert (shades_of(first), shades_of(third), shades_of(every)) == ([10, 7], [30, 7], [10, 20, 30, 7])
    assert every.ids == [*(f"scans.tar:p1#frame={page}" for page in range(3)), "scans.tar:p2"]
    assert (every.labels.tolist(), third.ids[0]) == ([0, 0, 0, 1], "scans.tar:p1#frame=2")
    assert every.groups == [*["scans.tar:p1#frame=0"] * 3, "scans.tar:p2"]
    assert "1 TIFF file with 3 pages, each an image (#frame=0, #frame=1, …)." in every.notes
    (tmp_path / "file").mkdir()
    (tmp_path / "file/p1.tif").write_bytes(stack.getvalue())
    alone = open_source(tmp_path / "file", page="all")
    assert [digest(alone.read(page)) for page in range(3)] == [digest(every.read(page)) for page in range(3)]
    assert reopened(every).ids == every.ids
