"""Every kind of source, real and small, in tmp_path; and every way in which one can be wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.plant import flip

from featurecache.errors import CannotWrite, SourceError, UnreadableImage
from featurecache.images import decoding
from featurecache.images.decoding import digest
from featurecache.sources import SOURCES, folders, medmnist, open_source, reopen, summary
from featurecache.sources.base import safe_name
from featurecache.sources.medmnist import MEDMNIST
from featurecache.sources.summary import contact_sheet, describe_dataset


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), shade).save(path)
    return path


def pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        picture(root / name, number)
    return root


def table(folder: Path, text: str, name: str = "list.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def arrays(path: Path, **parts: np.ndarray) -> Path:
    np.savez(path, **parts)
    return path


def shades(count: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    """[count, *shape]: image i is filled with i."""
    return np.broadcast_to(np.arange(count, dtype=dtype).reshape(-1, *[1] * len(shape)), (count, *shape)).copy()


def refused(data: object, *words: str, **options) -> str:
    """The sentence that ``open_source`` raises; every one of ``words`` is in it."""
    with pytest.raises(SourceError) as caught:
        open_source(data, **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


# -- folders


def test_flat_folder_has_no_labels_and_ids_in_the_order_of_bytes(tmp_path):
    data = open_source(pictures(tmp_path / "scans", "b.png", "Z.png", "a.jpg", "é.png", "a/../10.png", "9.png"))
    assert data.ids == sorted(["10.png", "9.png", "Z.png", "a.jpg", "b.png", "é.png"], key=str.encode)
    assert (data.task, data.classes, data.name) == ("unlabelled", [], "scans")
    assert data.labels.tolist() == [-1] * 6
    assert set(data.splits) == {""}


def test_class_folders_are_sorted_and_hold_whatever_lies_deeper(tmp_path):
    data = open_source(pictures(tmp_path, "PNEUMONIA/p1/x.png", "NORMAL/b.png", "PNEUMONIA/a.png"))
    assert data.ids == ["NORMAL/b.png", "PNEUMONIA/a.png", "PNEUMONIA/p1/x.png"]
    assert (data.classes, data.labels.tolist(), data.task) == (["NORMAL", "PNEUMONIA"], [0, 1, 1], "binary")
    assert data.labels.dtype == np.int64


@pytest.mark.parametrize(("train", "val", "test"), [("train", "val", "test"), ("Training", "valid", "Testing"),
                                                    ("TRAIN", "validation", "test")])  # fmt: skip
def test_split_folders_under_the_names_people_use(tmp_path, train, val, test):
    data = open_source(pictures(tmp_path, f"{train}/a/1.png", f"{val}/b/2.png", f"{test}/c/3.png", f"{train}/b/4.png"))
    assert dict(zip(data.ids, data.splits, strict=True))[f"{val}/b/2.png"] == "val"
    assert Counter(data.splits) == {"train": 2, "val": 1, "test": 1}
    assert (data.classes, data.task) == (["a", "b", "c"], "multiclass")


def test_a_class_absent_from_a_split_keeps_its_index_and_is_named(tmp_path):
    pictures(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png")
    (tmp_path / "test" / "a").mkdir()
    data = open_source(tmp_path)
    assert data.labels.tolist() == [2, 0, 1, 2]
    assert data.notes == ("test has no images of a, b.",)


def test_a_split_without_class_folders_is_unlabelled(tmp_path):
    data = open_source(pictures(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png"))
    assert (data.labels.tolist(), data.splits) == ([-1, 0, 1], ["test", "train", "train"])
    assert "test have no class folders" in data.notes[0]


def test_hidden_files_and_other_files_are_ignored_and_counted(tmp_path):
    pictures(tmp_path, "a/1.png", "b/1.PNG", ".hidden/x.png", "__MACOSX/a/._1.png", "a/._1.png")
    for name in ("a/Thumbs.db", "a/.DS_Store", "notes.txt", "a/readme.txt", "a/LICENSE"):
        (tmp_path / name).write_text("-")
    data = open_source(tmp_path)
    assert data.ids == ["a/1.png", "b/1.PNG"]
    assert data.notes[0].startswith("4 files are no images by their names and were ignored (.txt 2, ")


def test_links_are_followed_but_loops_are_not(tmp_path):
    data = pictures(tmp_path / "data", "a/1.png", "b/2.png")
    (data / "a" / "up").symlink_to(data, target_is_directory=True)
    (data / "a" / "self").symlink_to(data / "a" / "self")
    picture(tmp_path / "elsewhere" / "3.png")
    (data / "b" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = open_source(data)
    assert found.ids == ["a/1.png", "b/2.png", "b/more/3.png"]
    assert any("a/up" in note for note in found.notes)


def test_the_bytes_of_the_file_are_read(tmp_path):
    data = open_source(pictures(tmp_path, "a/1.png", "b/2.png"))
    assert data.read(1) == (tmp_path / "b/2.png").read_bytes()
    assert data.path(1) == str(tmp_path / "b/2.png")


def test_names_of_any_script_and_length(tmp_path):
    long = "röntgen-" + "x" * 200 + ".png"
    data = open_source(pictures(tmp_path / "胸部 X線", long, "肺.png"))
    assert data.ids == [long, "肺.png"]
    assert data.name == "胸部-X線"
    assert len(data.read(0)) > 0


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).write_bytes(b"-")
    refused(tmp_path, "is not UTF-8", "rename it")


def test_no_such_folder_says_what_is_near(tmp_path):
    pictures(tmp_path / "chest", "1.png")
    refused(tmp_path / "chets", "there is no folder or file", "Near: chest")
    refused(tmp_path / "no" / "where", "Nor is there")


def test_empty_folder_and_one_with_other_files_only(tmp_path):
    refused(tmp_path, f"no images in {tmp_path}: found nothing", ".png")
    (tmp_path / "a.nii").write_text("-")
    refused(tmp_path, "only other files (.nii 1)")


def test_a_class_folder_without_images(tmp_path):
    pictures(tmp_path, "NORMAL/1.png", "PNEUMONIA/1.png")
    (tmp_path / "COVID").mkdir()
    refused(tmp_path, "class folder", "COVID holds no image")


def test_a_class_folder_without_images_below_a_split(tmp_path):
    pictures(tmp_path, "train/NORMAL/1.png", "train/PNEUMONIA/1.png")
    (tmp_path / "train" / "COVID").mkdir()
    refused(tmp_path, "train/COVID holds no image")


def test_an_empty_split_folder_is_named(tmp_path):
    pictures(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "val").mkdir()
    assert open_source(tmp_path).notes == ("The folder val is empty.",)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a/1.png", "b/1.png", "stray.png"], "stray.png) beside class folders (a, b)"),
        (["train/a/1.png", "train/b/1.png", "extra/a/1.png"], "beside them images in extra"),
        (["train/a/1.png", "train/b/1.png", "stray.png"], "beside them images in stray.png"),
        (["train/a/1.png", "train/b/1.png", "train/stray.png"], "train holds images (stray.png) beside class folders"),
        (["a/train/1.png", "a/test/1.png", "b/train/1.png"], "split folders below class folders (a/test)"),
        (["chest/train/a/1.png", "chest/test/a/1.png"], "further down: give {folder}/chest."),
        (["archive/chest/train/a/1.png", "archive/chest/test/a/1.png"], "further down: give {folder}/archive/chest."),
        (["archive/chest/train/a/1.png"], "further down: give {folder}/archive/chest."),
    ],
)
def test_what_cannot_be_told_is_not_guessed(tmp_path, names, word):
    refused(pictures(tmp_path, *names), word.format(folder=tmp_path))


def test_a_single_class_is_said(tmp_path):
    assert "one class only, data" in open_source(pictures(tmp_path, "data/a/1.png")).notes[0]


def test_a_missing_file_a_broken_link_and_a_pipe_are_named_failures(tmp_path):
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "4.png")
    data = open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    for row, reason in [(0, "no such file"), (2, "a link to a file that is gone"), (3, "not a file")]:
        with pytest.raises(UnreadableImage, match=f"^{reason}$"):
            data.read(row)


def test_a_text_file_called_jpg_fails_when_it_is_decoded(tmp_path):
    (tmp_path / "x.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(UnreadableImage, match="starts with"):
        decoding.decode(open_source(tmp_path).read(0))


@given(st.text(max_size=200))
def test_any_text_becomes_a_name_a_file_can_have(text):
    name = safe_name(text)
    assert name
    assert len(os.fsencode(f"{name}.h5")) < 255
    assert not set(name) & set('/\\\0 "*?<>|:')
    assert name[0] not in ".-"
    assert safe_name(name) == name


# -- tables


def test_csv_with_splits_groups_and_further_columns(tmp_path):
    pictures(tmp_path, "x/1.png", "x/2.png", "x/3.png")
    rows = ["61,x/2.png,sick,train,p1,F", ",x/1.png,well,train,p2,M", "7,x/3.png,sick,Test,,F"]
    file = table(
        tmp_path, "\n".join(["\ufeffage,Path,Label,Split,Patient ID,sex", *rows])
    )  # Excel begins with this mark
    data = open_source(file)
    assert data.ids == ["x/2.png", "x/1.png", "x/3.png"]  # the order of the table
    assert (data.classes, data.labels.tolist(), data.task) == (["sick", "well"], [0, 1, 0], "binary")
    assert data.splits == ["train", "train", "test"]
    assert data.groups == ["p1", "p2", "x/3.png"]  # without a patient: a group of its own
    np.testing.assert_array_equal(data.meta["age"], [61, np.nan, 7])
    assert data.meta["sex"] == ["F", "M", "F"]
    assert data.read(0) == (tmp_path / "x/2.png").read_bytes()
    assert data.name == "list"


def test_several_label_columns_with_unknown_entries(tmp_path):
    file = table(tmp_path, "image,Effusion,Mass,note\na.png,1,0,x\nb.png,,1.0,y\nc.png,NaN,False,z\n")
    data = open_source(file, columns={"label": "Effusion,Mass"})
    np.testing.assert_array_equal(data.labels, np.array([[1, 0], [np.nan, 1], [np.nan, 0]], np.float32))
    assert (data.task, data.classes, data.labels.dtype) == ("multilabel", ["Effusion", "Mass"], np.float32)
    assert list(data.meta) == ["note"]


def test_minus_one_is_not_taken_for_unknown(tmp_path):
    file = table(tmp_path, "image,Effusion,Mass\na.png,1,0\nb.png,-1,1\n")
    refused(file, "row 3: 'Effusion' is \"-1\"", "write 1, 0 or nothing", columns={"label": "Effusion,Mass"})


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path):
    file = table(tmp_path, "path,label\na,10\nb,9\nc,2.0\nd,\ne,9\n")
    data = open_source(file, task="ordinal")
    assert (data.classes, data.labels.tolist(), data.task) == (["2", "9", "10"], [2, 1, 0, -1, 1], "ordinal")


def test_a_label_seen_in_no_train_row_is_an_error_with_its_row(tmp_path):
    file = table(tmp_path, "path,label,split\na,x,train\nb,y,train\nc,z,test\n")
    refused(file, 'list.csv row 4: the label "z" is in no train row', "x, y")


def test_without_train_rows_all_labels_count(tmp_path):
    assert open_source(table(tmp_path, "path,label,split\na,x,test\nb,y,test\n")).classes == ["x", "y"]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.tsv", "\t"), ("t.csv", "|")])
def test_other_delimiters(tmp_path, name, delimiter):
    rows = [["path", "label"], ['"a, b.png"', "x"], ["c.png", "y"]]
    file = table(tmp_path, "\n".join(delimiter.join(row) for row in rows), name)
    assert open_source(file).ids == ["a, b.png", "c.png"]


def test_parquet_is_read_like_the_csv_of_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    columns = {"path": ["a.png", "b.png", "c.png"], "label": [1, None, 0], "age": [1.5, None, 3.0]}
    site = pandas.Categorical(["x", "y", "x"])
    frame = pandas.DataFrame({**columns, "site": site, "split": ["train", None, "train"]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    one, other = open_source(tmp_path / "t.parquet"), open_source(tmp_path / "t.csv")
    assert one.labels.tolist() == other.labels.tolist() == [1, -1, 0]
    assert (one.ids, one.classes, one.splits) == (other.ids, ["0", "1"], ["train", "", "train"])
    np.testing.assert_array_equal(one.meta["age"], [1.5, np.nan, 3.0])
    assert one.meta["site"] == ["x", "y", "x"]


def test_parquet_of_embedded_images_is_refused(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"path": ["a"], "image_bytes": [b"\x89PNG"]}).to_parquet(tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "other than text and numbers in image_bytes")


def test_paths_that_are_all_missing_are_hinted_at_and_fail_by_name(tmp_path):
    pictures(tmp_path, "images/a.png", "images/b.png")
    data = open_source(table(tmp_path, "path,label\nimages/a,x\nimages/b,y\n"))
    assert "None of the first 2 images is there" in data.notes[0]
    assert "images/a.png would be" in data.notes[0]
    with pytest.raises(UnreadableImage, match=r"^no such file$"):
        data.read(1)


@pytest.mark.parametrize("ending", [".png", ""])
def test_bare_names_are_found_in_the_folders_below_the_table(tmp_path, ending):
    pictures(tmp_path, "part_1/images/a.png", "part_2/b.png", "__MACOSX/a.png", "part_2/._b.png")
    data = open_source(table(tmp_path, f"path,label\na{ending},x\nb{ending},y\ngone{ending},y\n"))
    assert data.ids == [f"a{ending}", f"b{ending}", f"gone{ending}"]
    assert data.read(1) == (tmp_path / "part_2/b.png").read_bytes()
    assert data.notes == ("The table gives bare names: 2 of 3 were found in the folders below it.",)
    assert dict(describe_dataset(data).unreadable) == {f"gone{ending}": "no such file"}
    assert reopen(data.source).read(0) == data.read(0)


def test_a_bare_name_that_stands_for_two_files_is_refused(tmp_path):
    pictures(tmp_path, "train/a.png", "test/a.jpg")
    refused(table(tmp_path, "path,label\na,x\nb,y\n"), "a stands for test/a.jpg, train/a.png", "one file of that name")


def test_paths_from_the_folder_above_that_of_the_table(tmp_path):
    pictures(tmp_path, "chest/train/p1/a.png", "chest/train/p2/a.png")
    listed = table(tmp_path / "chest", "path,label\nchest/train/p1/a.png,x\nchest/train/p2/a.png,y\n")
    data = open_source(listed)
    assert not describe_dataset(data).unreadable and data.notes == (
        f"Paths are relative to {tmp_path}, the folder above that of the table.",
    )


def test_names_beside_the_table_come_before_those_below_it(tmp_path):
    pictures(tmp_path, "a.png", "old/a.png", "old/b.png")
    data = open_source(table(tmp_path, "path,label\na.png,x\nb.png,y\n"))
    assert dict(describe_dataset(data).unreadable) == {"b.png": "no such file"} and not data.notes


def test_a_table_without_labels_says_how_to_name_them(tmp_path):
    data = open_source(table(tmp_path, "path,dx\na,1\n"))
    assert data.task == "unlabelled"
    assert "among dx: --column label=NAME" in data.notes[0]


def test_codes_keep_their_zeros_and_numbers_become_numbers(tmp_path):
    data = open_source(table(tmp_path, "path,label,code,count,mixed,empty\na,x,007,1,1,\nb,y,123,2,b,\n"))
    assert (data.meta["code"], data.meta["mixed"], data.meta["empty"]) == (["007", "123"], ["1", "b"], ["", ""])
    assert data.meta["count"].tolist() == [1, 2]
    assert data.meta["count"].dtype == np.int64


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("picture,label\na,x\n", None, ["no column of image paths among picture, label", "--column path=NAME"]),
        ("path,label\na,x\n", {"label": "lable"}, ["no column 'lable'", "it has path, label", "Near: label"]),
        (
            "path,label,class\na,x,y\n",
            None,
            ["several columns that could be the label: label, class", "--column label="],
        ),
        ("path,label\na,x\n", {"path": "path", "label": "path"}, ["cannot be two things at once"]),
        ("path,label\na,x\n", {"lable": "label"}, ["cannot name a 'lable'"]),
        ("path,a,b\nx,1,0\n", {"split": "a,b"}, ["the split is one column"]),
        ("path,label\na,x\na,y\n", None, ["lists a twice (rows 2 and 3)"]),
        ("path,label\n,x\n", None, ["row 2 has no path"]),
        ("path,label,fold\na,x,1\nb,y,2\n", None, ["'fold' is \"1\", expected train, val or test", "--column split="]),
        ("path,label\na,x,y\n", None, ["row 2 has 3 fields, the header 2"]),
        ("path,label,label\na,x,x\n", None, ["'label' more than once"]),
        ("path,label\n", None, ["a header only"]),
        ("", None, ["no rows"]),
    ],
)
def test_tables_that_are_wrong_get_their_sentence(tmp_path, text, columns, words):
    refused(table(tmp_path, text), *words, columns=columns)


def test_an_empty_column_name_says_there_is_none(tmp_path):
    data = open_source(table(tmp_path, "path,label,fold\na,x,1\nb,y,2\n"), columns={"split": ""})
    assert (data.splits, data.meta["fold"].tolist()) == (["", ""], [1, 2])


def test_a_table_that_is_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_bytes("path,label\ngrün.png,x\n".encode("latin-1"))
    refused(tmp_path / "t.csv", "not UTF-8 (byte 0xfc)")


def test_files_that_only_pretend_to_be_tables(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"nonsense")
    refused(tmp_path / "t.parquet", "cannot be read as Parquet")
    (tmp_path / "t.csv").mkdir()
    refused(tmp_path / "t.csv", "no images in")  # a folder, whatever it is called


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"-")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "t.parquet", "featurecache[parquet]")


def test_columns_are_for_tables(tmp_path):
    refused(pictures(tmp_path, "1.png"), "is no table", columns={"label": "x"})


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=20),
                          st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=9)),
                min_size=1, max_size=9, unique_by=lambda row: row[0].strip()))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_a_csv_comes_back(tmp_path_factory, rows):
    import csv

    rows = [(path.strip(), label.strip()) for path, label in rows if path.strip()]
    file = tmp_path_factory.mktemp("t") / "t.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("path", "label"), *rows])
    if not rows:
        return
    data = open_source(file)
    assert data.ids == [path for path, _ in rows]
    names = ["" if label == -1 else data.classes[label] for label in data.labels]
    assert names == [_as_class(label) for _, label in rows]


def _as_class(label: str) -> str:
    """What the documentation says of a cell: "nan" is empty, a whole number has no decimals."""
    whole, point, decimals = label.partition(".")
    number = whole.removeprefix("-").isdecimal() and point and decimals and not decimals.strip("0")
    return "" if label.lower() == "nan" else whole if number else label


# -- .npz


def test_npz_in_the_order_train_val_test(tmp_path):
    file = arrays(tmp_path / "set.npz", test_images=shades(2, 5, 4), test_labels=np.array([[1], [0]]),
                  train_images=shades(3, 5, 4), train_labels=np.array([[0], [1], [2]]), val_images=shades(1, 5, 4),
                  val_labels=np.array([[2]]))  # fmt: skip
    data = open_source(file)
    assert data.ids[:4] == ["set.npz:train:0", "set.npz:train:1", "set.npz:train:2", "set.npz:val:0"]
    assert data.splits == ["train"] * 3 + ["val"] + ["test"] * 2
    assert (data.labels.tolist(), data.classes, data.task) == ([0, 1, 2, 2, 1, 0], ["0", "1", "2"], "multiclass")
    assert [int(data.read(row)[0, 0]) for row in range(6)] == [0, 1, 2, 0, 0, 1]
    assert data.path(0) is None


def test_npz_in_colour_with_several_labels(tmp_path):
    labels = np.array([[1, 0], [0, np.nan]], np.float32)
    file = arrays(tmp_path / "set.npz", train_images=shades(2, 5, 4, 3), train_labels=labels)
    data = open_source(file)
    np.testing.assert_array_equal(data.labels, labels)
    assert (data.task, data.classes) == ("multilabel", ["0", "1"])
    assert data.read(1).shape == (5, 4, 3)
    assert data.notes == ("set.npz has no val images.", "set.npz has no test images.")


def test_npz_beyond_memory_is_mapped_from_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(medmnist, "_IN_MEMORY", 10)
    np.savez_compressed(tmp_path / "set.npz", train_images=shades(9, 5, 4), train_labels=np.arange(9) % 2)
    data = open_source(tmp_path / "set.npz")
    assert [int(data.read(row)[4, 3]) for row in (8, 0, 3)] == [8, 0, 3]
    part = data.images.parts[0]
    assert isinstance(part._array.base, np.memmap)


@pytest.mark.parametrize("name", sorted(MEDMNIST))
@pytest.mark.parametrize("size", ["", "_64", "_128", "_224"])
def test_a_medmnist_name_brings_published_classes_and_task(tmp_path, name, size):
    record = MEDMNIST[name]
    several = record.task == "multilabel"
    labels = np.eye(len(record.classes), dtype=np.uint8) if several else np.arange(len(record.classes))[:, None]
    file = arrays(tmp_path / f"{name}{size}.npz", train_images=shades(len(labels), 4, 4), train_labels=labels)
    data = open_source(file)
    assert (data.classes, data.task) == (list(record.classes), record.task)
    assert len(data.labels) == len(record.classes)


def test_a_class_that_no_image_has_keeps_its_published_index(tmp_path):
    file = arrays(tmp_path / "bloodmnist.npz", train_images=shades(2, 4, 4), train_labels=np.array([[7], [2]]))
    assert open_source(file).labels.tolist() == [7, 2]


def test_what_is_known_of_some_medmnist_sets():
    assert MEDMNIST["pneumoniamnist"].classes == ("normal", "pneumonia")
    assert MEDMNIST["retinamnist"].task == "ordinal"
    assert (MEDMNIST["chestmnist"].task, len(MEDMNIST["chestmnist"].classes)) == ("multilabel", 14)
    assert MEDMNIST["breastmnist"].classes[0] == "malignant"
    assert len(MEDMNIST) == 12


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/featurecache-was-here",)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train_images": np.array([_Evil()], object), "train_labels": np.zeros(1)}, ["pickled", "(train_images)"]),
        ({"train_images": shades(1, 4, 4), "train_labels": np.array([None])}, ["pickled", "(train_labels)"]),
        ({"x": shades(2, 4, 4), "y": np.zeros(2)}, ["has the arrays x, y; expected train_images"]),
        ({"train_images": shades(2, 4, 4)}, ["has train_images and no train_labels"]),
        ({"train_labels": np.zeros(2, int)}, ["has train_labels and no train_images"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.zeros(3, int)}, ["2 train_images", "shape [3]"]),
        ({"train_images": shades(2, 4, 4, 4), "train_labels": np.zeros(2, int)}, ["volumes are not images"]),
        ({"train_images": shades(2, 4, 4, dtype=np.float32), "train_labels": np.zeros(2, int)}, ["float32 [2, 4, 4]"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.array([0.5, 1])}, ["row 0 is 0.5; a label"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.array(["a", "b"])}, ["no column of labels"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.array([-2, 1])}, ["row 0 is -2"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.array([[0, 2], [1, 1]])}, ["label 1 is 2; expected"]),
        ({"train_images": shades(2, 4, 4), "train_labels": np.eye(2, dtype=int), "test_images": shades(2, 4, 4),
          "test_labels": np.zeros(2, int)}, ["differ in their form", "train_labels [2, 2], test_labels [2]"]),
    ],
)  # fmt: skip
def test_archives_that_are_wrong_get_their_sentence(tmp_path, parts, words):
    refused(arrays(tmp_path / "set.npz", **parts), *words)
    assert not Path("/tmp/featurecache-was-here").exists()


def test_a_medmnist_name_on_other_labels_is_refused(tmp_path):
    file = arrays(tmp_path / "pneumoniamnist.npz", train_images=shades(3, 4, 4), train_labels=np.arange(3))
    refused(file, "bears the name of a MedMNIST set (rename the file", "it has the label 2, and there are 2 classes")


def test_archives_that_are_none_or_damaged(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    refused(tmp_path / "a.npz", "cannot be read as an .npz")
    file = arrays(tmp_path / "b.npz", train_images=shades(3, 40, 40), train_labels=np.arange(3))
    flip(file, 2000)
    with pytest.raises(SourceError, match="is damaged"):
        open_source(file).read(0)


# -- digits, words, tasks, coming back


def test_digits_are_scikit_learns_on_the_full_range():
    from sklearn.datasets import load_digits

    data, original = open_source("digits"), load_digits()
    assert (len(data), data.task, data.ids[12]) == (1797, "multiclass", "digits:12")
    assert data.labels.tolist() == original.target.tolist()
    np.testing.assert_allclose(data.read(5), original.images[5] * 255 / 16, atol=0.5)
    assert (data.read(5).dtype, data.read(5).max()) == (np.uint8, 255)


def test_a_folder_called_digits_is_reached_with_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(pictures(tmp_path, "digits/1.png").parent / tmp_path.name)
    assert len(open_source("digits")) == 1797
    assert len(open_source("./digits")) == len(open_source(Path("digits"))) == 1


def test_forms_of_later_versions_say_what_there_is_now():
    message = refused("zenodo:4711", "no source called zenodo", "a folder of images")
    assert all(f"{prefix}:<" in message for prefix in ("medmnist", "torchvision", "hf", "kaggle"))
    assert {"medmnist:", "torchvision:", "hf:", "kaggle:"} <= {source.prefix for source in SOURCES.values()}


def test_a_file_of_another_kind(tmp_path):
    refused(picture(tmp_path / "one.png"), "is a file; expected", "a folder of images")
    refused("", "empty")


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        ("regression", ["x", "y"], ["'regression' is unknown", "multilabel"]),
        ("binary", ["x", "y", "z"], ["has 3 classes: its task is multiclass, it cannot be binary"]),
        ("multilabel", ["x", "y"], ["expected 1, 0, or nothing"]),
        ("multiclass", ["", ""], ["no labels"]),
    ],
)
def test_a_task_that_the_labels_contradict(tmp_path, task, labels, words):
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    refused(table(tmp_path, "path,label\n" + rows), *words, task=task)


def test_tasks_that_were_asked_for(tmp_path):
    root = pictures(tmp_path, "0/1.png", "1/1.png", "2/1.png")
    assert open_source(root, task="ordinal").task == "ordinal"
    bare = open_source(root, task="unlabelled")
    assert (bare.labels.tolist(), bare.classes) == ([-1] * 3, [])
    file = table(tmp_path, "path,label\na,1\nb,0\n")
    assert open_source(file, task="multilabel").labels.tolist() == [[1], [0]]


def test_every_source_opens_again_from_its_record(tmp_path, monkeypatch):
    root = pictures(tmp_path / "folder", "train/a/1.png", "train/b/2.png")
    file = table(tmp_path, "path,x,y\nfolder/train/a/1.png,1,0\nfolder/train/b/2.png,,1\n")
    archive = arrays(tmp_path / "set.npz", train_images=shades(3, 4, 4), train_labels=np.arange(3))
    monkeypatch.chdir(tmp_path)
    found = [open_source("folder"), open_source("list.csv", columns={"label": "x,y"})]
    found += [open_source("set.npz", task="ordinal"), open_source("digits")]
    monkeypatch.chdir("/")
    assert [data.source["kind"] for data in found] == ["folder", "table", "npz", "digits"]
    for data, place in zip(found, [root, file, archive, None], strict=True):
        again = reopen(json.loads(json.dumps(data.source)))
        assert place is None or again.source["data"] == str(place)
        assert (again.ids, again.splits, again.classes, again.task) == (data.ids, data.splits, data.classes, data.task)
        np.testing.assert_array_equal(again.labels, data.labels)
        assert digest(again.read(1)) == digest(data.read(1))


def test_a_source_that_has_gone_says_so(tmp_path):
    record = open_source(picture(tmp_path / "x" / "1.png").parent).source
    (tmp_path / "x" / "1.png").unlink()
    (tmp_path / "x").rmdir()
    with pytest.raises(SourceError, match="there is no folder"):
        reopen(record)


@pytest.mark.integration
def test_importing_sources_and_reading_a_folder_needs_no_torch(tmp_path):
    pictures(tmp_path, "a/1.png", "b/1.png")
    script = (
        "import sys; from featurecache.sources import open_source; open_source(sys.argv[1]).read(0);"
        "heavy = {'torch', 'torchvision', 'PIL', 'pandas', 'pyarrow', 'sklearn', 'h5py'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listing_looks_at_no_file(tmp_path, monkeypatch):
    pictures(tmp_path, *[f"c{number % 3}/{number}.png" for number in range(30)])
    looked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(folders.os, "stat", lambda path, **kind: (looked.append(str(path)), stat(path, **kind))[1])
    assert len(open_source(tmp_path)) == 30
    assert len(looked) < 10  # the folders


# -- describing


def test_the_table_counts_classes_splits_and_copies(tmp_path):
    root = pictures(
        tmp_path / "chest", "train/a/1.png", "train/a/2.png", "train/b/3.png", "test/a/4.png", "test/b/5.png"
    )
    for copy, of in [
        ("train/a/6.png", "train/a/1.png"),
        ("test/a/7.png", "train/a/1.png"),
        ("test/b/8.png", "test/a/4.png"),
    ]:
        (root / copy).write_bytes((root / of).read_bytes())
    data = open_source(root)
    found = describe_dataset(data, [digest(data.read(row)) for row in range(len(data))])
    assert (found.splits, found.counts, found.totals) == (["train", "test"], [[3, 2], [1, 2]], [4, 4])
    assert found.copies.total == 3
    assert found.copies.within == {"train": 1, "test": 1}
    assert (found.copies.across, found.copies.two_labels) == ({"train+test": 1}, 1)
    assert (found.sizes["largest"], found.kinds) == ([6, 4], {"grey": 8})
    text = str(found)
    assert "  a           3     2    5" in text
    assert "3 images repeat another (1 within train, 1 within test, 1 in both train and test, 1 under two" in text
    assert json.loads(json.dumps(found.to_dict()))["copies"]["total"] == 3


def test_the_table_of_several_labels_counts_positives_and_unknowns(tmp_path):
    file = table(tmp_path, "path,x,y\na,1,0\nb,,1\nc,0,1\n")
    found = describe_dataset(open_source(file, columns={"label": "x,y"}))
    assert (found.counts, found.unlabelled, found.copies) == ([[1], [2]], [1], None)
    assert found.unreadable == [("a", "no such file"), ("b", "no such file"), ("c", "no such file")]
    assert "(a label unknown)" in str(found)


def test_images_that_could_not_be_read_are_no_copies_of_each_other(tmp_path):
    data = open_source(pictures(tmp_path, "1.png", "2.png", "3.png"))
    assert describe_dataset(data, [None, None, "ab"]).copies.total == 0
    assert describe_dataset(data, np.array([b"", b"", b"ab"], "S32")).copies.total == 0
    assert describe_dataset(data, np.array([b"", b"ab", b"ab"], "S32")).copies.total == 1


def test_of_many_images_two_hundred_are_looked_at(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(summary, "image_header", lambda data: (looked.append(1), (8, 8, "grey"))[1])
    found = describe_dataset(open_source("digits"))
    assert len(looked) == found.looked_at == 200
    assert "8×8, in 200 looked at" in str(found)


def test_of_many_classes_the_first_are_shown_and_the_rest_are_counted(tmp_path):
    data = open_source(pictures(tmp_path, *[f"{number:03d}/x.png" for number in range(60)]))
    lines = str(describe_dataset(data)).splitlines()
    assert any(line.split() == ["(36", "more)", "36"] for line in lines)
    assert len(lines) < 40


def test_contact_sheet_shows_images_of_every_class_and_the_unreadable_too(tmp_path):
    root = pictures(
        tmp_path / "set", *[f"train/{name}/{number}.png" for name in "ab" for number in range(5)], "test/a/9.png"
    )
    (root / "test/a/broken.jpg").write_text("<html>")
    contact_sheet(open_source(root), tmp_path / "sheet.png", per_class=3)
    sheet = Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert (sheet.format, sheet.mode) == ("PNG", "RGB")
    assert {(shade, shade, shade) for shade in (0, 2, 4, 5, 7, 9, 10)} <= {c for _, c in sheet.getcolors(1 << 20)}
    assert (0xB3, 0x26, 0x1E) in {colour for _, colour in sheet.getcolors(1 << 20)}


def test_contact_sheet_of_several_labels_and_of_none(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    file = table(tmp_path, "path,x,y\na.png,1,\nb.png,0,0\n")
    contact_sheet(open_source(file, columns={"label": "x,y"}), tmp_path / "1.png")
    contact_sheet(open_source(file, task="unlabelled"), tmp_path / "2.png")
    assert (tmp_path / "1.png").stat().st_size > 500 < (tmp_path / "2.png").stat().st_size


def test_contact_sheet_where_nothing_can_be_written(tmp_path):
    with pytest.raises(CannotWrite):
        contact_sheet(open_source(pictures(tmp_path, "1.png")), tmp_path / "1.png" / "below-a-file.png")


# -- real images


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("FEATURECACHE_TEST_DATA")
    if not folder:
        pytest.skip("FEATURECACHE_TEST_DATA names no folder with pneumoniamnist.npz and medical-mnist.tar.xz")
    return Path(folder)


def test_pneumoniamnist_has_its_published_counts_and_known_copies(real):
    data = open_source(real / "pneumoniamnist.npz")
    found = describe_dataset(data, [digest(data.read(row)) for row in range(len(data))])
    assert (found.classes, found.task) == (["normal", "pneumonia"], "binary")
    assert (found.splits, found.totals) == (["train", "val", "test"], [4708, 524, 624])
    assert found.counts == [[1214, 135, 234], [3494, 389, 390]]
    assert found.copies.total == 29
    assert found.copies.within == {"train": 18, "val": 0, "test": 3}
    assert found.copies.across == {"train+val": 8, "train+test": 0, "val+test": 0}
    assert found.copies.two_labels == 0


@pytest.mark.integration
def test_medical_mnist_is_six_thousand_small_grey_jpegs(real, tmp_path):
    with tarfile.open(real / "medical-mnist.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    data = open_source(tmp_path / "medical-mnist")
    found = describe_dataset(data)
    assert found.classes == ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"]
    assert found.counts == [[800, 100, 100]] * 6
    assert (found.sizes["smallest"], found.sizes["largest"], found.kinds) == ([64, 64], [64, 64], {"grey": 200})
    row = data.ids.index("train/CXR/000017.jpeg")
    expected = np.asarray(Image.open(tmp_path / "medical-mnist/train/CXR/000017.jpeg").convert("RGB"))
    np.testing.assert_array_equal(decoding.decode(data.read(row)).permute(1, 2, 0).numpy(), expected)
