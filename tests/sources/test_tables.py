"""Tables that list images: what their columns are, where the files lie, and every way in which one can be wrong."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_sets import pictures, refused, reopened, table

from featurecache.errors import UnreadableImage
from featurecache.sources import open_source
from featurecache.sources.summary import describe_dataset


def test_csv_with_splits_groups_and_further_columns(tmp_path):
    pictures(tmp_path, "x/1.png", "x/2.png", "x/3.png")
    rows = ["61,x/2.png,sick,train,p1,F", ",x/1.png,well,train,p2,M", "7,x/3.png,sick,Test,,F"]
    byte_order_mark = "\ufeff"  # of Excel
    data = open_source(table(tmp_path, "\n".join([f"{byte_order_mark}age,Path,Label,Split,Patient ID,sex", *rows])))
    assert data.ids == ["x/2.png", "x/1.png", "x/3.png"]  # the order of the table
    assert (data.classes, data.labels.tolist(), data.task) == (["sick", "well"], [0, 1, 0], "binary")
    assert data.splits == ["train", "train", "test"]
    assert data.groups == ["p1", "p2", "x/3.png"]  # without a patient: a group of its own
    np.testing.assert_array_equal(data.meta["age"], [61, np.nan, 7])
    assert data.meta["sex"] == ["F", "M", "F"]
    assert (data.read(0), data.name) == ((tmp_path / "x/2.png").read_bytes(), "list")


def test_several_label_columns_with_unknown_entries(tmp_path):
    file = table(tmp_path, "image,Effusion,Mass,note\na.png,1,0,x\nb.png,,1.0,y\nc.png,NaN,False,z\n")
    data = open_source(file, columns={"label": "Effusion,Mass"})
    np.testing.assert_array_equal(data.labels, np.array([[1, 0], [np.nan, 1], [np.nan, 0]], np.float32))
    assert (data.task, data.classes, data.labels.dtype) == ("multilabel", ["Effusion", "Mass"], np.float32)
    assert list(data.meta) == ["note"]


@pytest.mark.parametrize(
    ("text", "task", "classes", "labels"),
    [
        ("path,label\na,10\nb,9\nc,2.0\nd,\ne,9\n", "ordinal", ["2", "9", "10"], [2, 1, 0, -1, 1]),
        ("path,label,split\na,x,test\nb,y,test\n", None, ["x", "y"], [0, 1]),  # without train rows all count
        ("path,label\na,1\nb,0\n", "multilabel", ["label"], [[1], [0]]),
        ("path,label\na,1\nb,0\n", "unlabelled", [], [-1, -1]),
    ],
)
def test_labels_of_one_column(tmp_path, text, task, classes, labels):
    data = open_source(table(tmp_path, text), task=task)
    assert (data.classes, data.labels.tolist(), data.task) == (classes, labels, task or "binary")


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.tsv", "\t"), ("t.csv", "|")])
def test_other_delimiters(tmp_path, name, delimiter):
    rows = [["path", "label"], ['"a, b.png"', "x"], ["c.png", "y"]]
    file = table(tmp_path, "\n".join(delimiter.join(row) for row in rows), name)
    assert open_source(file).ids == ["a, b.png", "c.png"]


def test_parquet_is_read_like_the_csv_of_it(tmp_path):
    pandas = pytest.importorskip("pandas")
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


def test_parquet_of_embedded_images_without_rows_or_that_is_none_is_refused(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "t.parquet"
    pandas.DataFrame({"path": ["a"], "image_bytes": [b"\x89PNG"]}).to_parquet(file)
    refused(file, "other than text and numbers in image_bytes")
    pandas.DataFrame({"path": []}, dtype=str).to_parquet(file)
    refused(file, "has no rows")
    file.write_bytes(b"nonsense")
    refused(file, "cannot be read as Parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(file, "featurecache[parquet]")


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
    reopened(data)


def test_a_bare_name_that_stands_for_two_files_is_refused(tmp_path):
    pictures(tmp_path, "train/a.png", "test/a.jpg")
    refused(table(tmp_path, "path,label\na,x\nb,y\n"), "a stands for test/a.jpg, train/a.png", "one file of that name")


def test_names_beside_the_table_come_first_and_those_from_the_folder_above_are_said(tmp_path):
    pictures(tmp_path, "a.png", "old/a.png", "old/b.png")
    data = open_source(table(tmp_path, "path,label\na.png,x\nb.png,y\n"))
    assert dict(describe_dataset(data).unreadable) == {"b.png": "no such file"} and not data.notes
    data = open_source(table(tmp_path / "old", "path,label\nold/a.png,x\nold/b.png,y\n"))
    assert not describe_dataset(data).unreadable
    assert data.notes == (f"Paths are relative to {tmp_path}, the folder above that of the table.",)


def test_further_columns_are_numbers_where_all_are_and_codes_keep_their_zeros(tmp_path):
    data = open_source(table(tmp_path, "path,dx,code,count,mixed,empty\na,x,007,1,1,\nb,y,123,2,b,\n"))
    assert (data.task, data.meta["code"], data.meta["mixed"], data.meta["empty"]) == (
        "unlabelled", ["007", "123"], ["1", "b"], ["", ""],
    )  # fmt: skip
    assert (data.meta["count"].tolist(), data.meta["count"].dtype) == ([1, 2], np.int64)
    assert "among dx, code, count, mixed, empty: --column label=NAME" in data.notes[0]


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("picture,label\na,x\n", None, ["no column of image paths among picture, label", "--column path=NAME"]),
        ("path,label\na,x\n", {"label": "lable"}, ["no column 'lable'", "it has path, label", "Near: label"]),
        ("path,label,class\na,x,y\n", None, ["could be the label: label, class", "--column label=label"]),
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
        ("path,label\n\udcfc,x\n", None, ["not UTF-8 (byte 0xfc)"]),
        ("path,label\n" + "x" * 200_000 + ",y\n", None, ["cannot be read as a table"]),
        ("path,a,b\nx,1,0\ny,-1,1\n", {"label": "a,b"}, ["row 3: 'a' is \"-1\"", "write 1, 0 or nothing"]),
        ("path,label,split\na,x,train\nb,y,train\nc,z,test\n", None,
         ['list.csv row 4: the label "z" is in no train row', "x, y"]),
    ],
)  # fmt: skip
def test_tables_that_are_wrong_get_their_sentence(tmp_path, text, columns, words):
    (tmp_path / "list.csv").write_text(text, "utf-8", "surrogateescape")
    refused(tmp_path / "list.csv", *words, columns=columns)


def test_an_empty_column_name_says_there_is_none(tmp_path):
    data = open_source(table(tmp_path, "path,label,fold\na,x,1\nb,y,2\n"), columns={"split": ""})
    assert (data.splits, data.meta["fold"].tolist()) == (["", ""], [1, 2])


def test_columns_are_for_tables_and_a_folder_is_one_whatever_it_is_called(tmp_path):
    (tmp_path / "t.csv").mkdir()
    refused(tmp_path / "t.csv", "no images in")
    refused(tmp_path / "t.csv", "is no table", columns={"label": "x"})


CELLS = st.characters(codec="utf-8", exclude_characters="\0\r\n")
PATHS = st.text(CELLS, min_size=1, max_size=20).map(str.strip).filter(bool)


@given(st.dictionaries(PATHS, st.text(CELLS, max_size=9), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_a_csv_comes_back(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("t") / "t.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("path", "label"), *rows.items()])
    data = open_source(file)
    assert data.ids == list(rows)
    names = ["" if label == -1 else data.classes[label] for label in data.labels]
    assert names == [_as_class(label.strip()) for label in rows.values()]


def _as_class(label: str) -> str:
    """What the documentation says of a cell: "nan" is empty, a whole number has no decimals."""
    whole, point, decimals = label.partition(".")
    number = whole.removeprefix("-").isdecimal() and point and decimals and not decimals.strip("0")
    return "" if label.lower() == "nan" else whole if number else label
