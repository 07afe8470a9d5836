"""Tables that list images: what their columns are, where the files lie, and every way in which one can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_sets import encoded, listed, pictures, refused, reopened, shades_of, table

from featurecache.errors import SourceError, UnreadableImage
from featurecache.sources import open_source
from featurecache.sources.summary import describe_dataset
from featurecache.sources.tables import read_annotations
from featurecache.sources.vocabulary import is_missing, spelling_key
from heads.evaluation.subgroups import cell_text


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
    assert "splits from Split (Test is test)" in data.understood


def test_without_train_rows_all_labels_count_and_none_where_none_are_wanted(tmp_path):
    file = listed(tmp_path, "path,label,split\na,x,test\nb,y,test\n")
    for task, classes, labels in (("binary", ["x", "y"], [0, 1]), ("unlabelled", [], [-1, -1])):
        data = open_source(file, task=task)
        assert (data.classes, data.labels.tolist(), data.task) == (classes, labels, task)


def test_parquet_is_read_like_the_csv_of_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    columns = {"path": ["a.png", "b.png", "c.png"], "label": [1, None, 0], "age": [1.5, None, 3.0]}
    site = pandas.Categorical(["x", "y", "x"])
    pictures(tmp_path, *columns["path"])
    frame = pandas.DataFrame({**columns, "site": site, "split": ["train", None, "train"]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    one, other = open_source(tmp_path / "t.parquet"), open_source(tmp_path / "t.csv")
    assert one.labels.tolist() == other.labels.tolist() == [1, -1, 0]
    assert (one.ids, one.classes, one.splits) == (other.ids, ["0", "1"], ["train", "", "train"])
    np.testing.assert_array_equal(one.meta["age"], [1.5, np.nan, 3.0])
    assert one.meta["site"] == ["x", "y", "x"]


def test_parquet_without_rows_or_that_is_none_is_refused(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "t.parquet"
    pandas.DataFrame({"path": []}, dtype=str).to_parquet(file)
    refused(file, "has no rows")
    file.write_bytes(b"nonsense")
    refused(file, "cannot be read as Parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(file, "featurecache[parquet]")


def parquet(folder: Path, columns: dict[str, list], about: dict | None = None) -> Path:
    """A table of these columns, in row groups of two; ``about``: the metadata of its schema."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.table(columns).replace_schema_metadata(about), folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


@pytest.mark.parametrize("inner", [True, False])
def test_parquet_with_the_images_inside(tmp_path, inner):
    cells = [{"bytes": encoded(k), "path": f"{k}.png"} if inner else encoded(k) for k in range(6)]
    data = open_source(parquet(tmp_path, {"image": cells, "label": [0, 1] * 3, "box": [[{"x": 1}]] * 6}))
    assert (shades_of(data), data.labels.tolist(), data.classes) == ([*range(6)], [0, 1] * 3, ["0", "1"])
    assert data.ids == [f"{k}.png" if inner else f"t.parquet:{k}" for k in range(6)]
    assert "images inside t.parquet, in its column image" in data.understood
    assert "columns left out, neither text nor numbers: box" in data.understood
    reopened(data)


def test_parquet_of_the_hub_names_its_classes_and_may_lack_an_image(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    cells = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": None}, {"bytes": encoded(2), "path": None}]
    data = open_source(parquet(tmp_path, {"image": cells, "label": [1, 0, -1]}, about))
    assert (data.classes, data.labels.tolist()) == (["cat", "dog"], [1, 0, -1])
    with pytest.raises(UnreadableImage, match="no image in this row"):
        data.read(1)


def test_parquet_with_two_columns_of_images_is_refused(tmp_path):
    file = parquet(tmp_path, {"left": [encoded(0)], "right": [encoded(1)]})
    refused(file, "several columns hold images: left, right")


def test_lists_in_parquet_are_findings(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    data = open_source(parquet(tmp_path, {"path": ["a.png", "b.png"], "label": [["mass", "edema"], ["normal"]]}))
    assert (data.classes, data.labels.tolist()) == (["edema", "mass"], [[1, 1], [0, 0]])


def test_paths_that_are_all_missing_are_refused_with_where_they_were_looked_for(tmp_path):
    file = table(tmp_path, "path,label\nimages/a,x\nimages/b,y\n")
    refused(file, f"None of the 2 images of the table is there: looked for {tmp_path}/images/a.", "--root DIR")
    refused(table(tmp_path, "path\nhttps://x.org/a.png\n"), "https://x.org/a.png is an address, not a file")


@pytest.mark.parametrize(
    ("written", "on_disk", "said"),
    [
        ("train\\A\\1.png", "train/A/1.png", "back-slashes in the paths read as slashes"),
        ("images/ISIC_1", "images/ISIC_1.jpg", "paths without ending: the files have one"),
        ("IMG/A.PNG", "img/a.png", "differ in their case"),
        ("u\u0308/1.png", "\u00fc/1.png", "differ in their Unicode form"),
        ("a/1.jpeg", "a/1.png", "differ in their ending"),
        ("1.PNG", "deep/1.png", "differ in their case"),
    ],
)
def test_paths_that_are_written_otherwise_than_the_files(tmp_path, written, on_disk, said):
    pictures(tmp_path, on_disk)
    data = open_source(table(tmp_path, f"path,label\n{written},x\n"))
    assert (data.ids, shades_of(data)) == ([written], [0])
    assert said in data.source["understood"]


def test_paths_of_another_machine_are_refused_and_taken_with_root(tmp_path):
    pictures(tmp_path / "t", "img/0.png", "img/1.png")
    file = table(tmp_path / "t", "path,label\n/kaggle/set/img/0.png,x\n/kaggle/set/img/1.png,y\n")
    refused(file, "looked for /kaggle/set/img/0.png", f"img/0.png lies in {tmp_path}/t: --root {tmp_path}/t takes")
    data = open_source(file, root=str(tmp_path / "t"))
    assert (shades_of(data), data.source["root"]) == ([0, 1], str(tmp_path / "t"))
    assert "the first 2 folders of the paths left out" in data.source["understood"]
    reopened(data)
    refused(file, "there is no such folder", root=str(tmp_path / "gone"))


def test_images_that_are_there_behind_many_that_are_not(tmp_path):
    pictures(tmp_path, "in/last.png")
    rows = "".join(f"in/gone{k}.png\n" for k in range(30))
    assert open_source(table(tmp_path, f"path\n{rows}in/last.png\n")).read(30)


@pytest.mark.parametrize("ending", [".png", ""])
def test_bare_names_are_found_in_the_folders_below_the_table(tmp_path, ending):
    pictures(tmp_path, "part_1/images/a.png", "part_2/b.png", "__MACOSX/a.png", "part_2/._b.png")
    data = open_source(table(tmp_path, f"path,label\na{ending},x\nb{ending},y\ngone{ending},y\n"))
    assert data.ids == [f"a{ending}", f"b{ending}", f"gone{ending}"]
    assert data.read(1) == (tmp_path / "part_2/b.png").read_bytes()
    assert data.understood == ("bare names: 2 of 3 found in the folders below the table",)
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
    assert data.understood == ("paths relative to the folder above that of the table",)


def test_further_columns_are_numbers_where_all_are_and_codes_keep_their_zeros(tmp_path):
    data = open_source(listed(tmp_path, "path,note,code,count,mixed,empty\na,x,007,1,1,\nb,y,123,2,b,\n"))
    assert (data.task, data.meta["code"], data.meta["mixed"], data.meta["empty"]) == (
        "unlabelled", ["007", "123"], ["1", "b"], ["", ""],
    )  # fmt: skip
    assert (data.meta["count"].tolist(), data.meta["count"].dtype) == ([1, 2], np.int64)
    assert "among note, code, count, mixed, empty: --column label=NAME" in data.notes[0]


def test_ids_that_a_number_would_shorten_or_merge_stay_text(tmp_path):
    """A float keeps 53 bits; 1_0 is a number to Python alone."""
    rows = "a,9007199254740993,12345678901234567890,1_0,1000001\nb,,12345678901234567891,10,\n"
    data = open_source(listed(tmp_path, "path,scan,long,code,site\n" + rows))
    assert (data.meta["scan"], data.meta["code"]) == (["9007199254740993", ""], ["1_0", "10"])
    assert data.meta["long"] == ["12345678901234567890", "12345678901234567891"]
    assert [cell_text(value) for value in data.meta["site"]] == ["1000001", ""]
    data = open_source(listed(tmp_path, "path,scan\na,9007199254740993\nb,-9223372036854775808\n"))
    assert data.meta["scan"] == ["9007199254740993", "-9223372036854775808"]  # whose absolute value no int64 has


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("picture,label\na,x\n", None, ["no column of image paths among picture, label", "--column path=NAME"]),
        ("path,label\na,x\n", {"label": "lable"}, ["no column 'lable'", "it has path, label", "Near: label"]),
        ("path,label,class\na,x,y\n", None, ["could be the label: label, class", "--column label=label"]),
        ("path,label\na,x\n", {"path": "path", "label": "path"}, ["cannot be two things at once"]),
        ("path,label\na,x\n", {"lable": "label"}, ["cannot name a 'lable'"]),
        ("path,a,b\nx,1,0\n", {"split": "a,b"}, ["the split is one column"]),
        ("path,label\na,x\na,y\n", None, ["lists a twice (rows 2 and 3: label 'x' and 'y')", "--task multilabel"]),
        ("path,label\na,NA\na,1\na,0\n", None, ["lists a twice (rows 3 and 4: label '1' and '0')"]),
        ("path,label\na,\na,x\na,y\n", None, ["lists a twice (rows 3 and 4: label 'x' and 'y')"]),
        ("path,label\n,x\n", None, ["row 2 has no path"]),
        ("path,label,fold\na,x,1\nb,y,2\n", None, ["'fold' is \"1\", expected train, val or test", "--column split="]),
        ("path,label\na,x,y\n", None, ["row 2 has 3 fields, the header 2"]),
        ("path,label,label\na,x,x\n", None, ["'label' more than once"]),
        ("path,label\n", None, ["a header only"]),
        ("", None, ["no rows"]),
        ("path,label\n\udcfc,x\n", None, ["not UTF-8 (byte 0xfc)"]),
        ("path,label\n" + "x" * 200_000 + ",y\n", None, ["cannot be read as a table"]),
        ("path,a,b\nx,1,0\ny,2,1\n", {"label": "a,b"}, ["row 3: 'a' is \"2\"", "or nothing where it is not known"]),
        ("path,label,split\na,x,train\nb,y,train\nc,z,test\n", None,
         ['list.csv row 4: the label "z" is in no train row', "x, y"]),
    ],
)  # fmt: skip
def test_tables_that_are_wrong_get_their_sentence(tmp_path, text, columns, words):
    (tmp_path / "list.csv").write_text(text, "utf-8", "surrogateescape")
    refused(tmp_path / "list.csv", *words, columns=columns)


def test_columns_are_for_tables_and_a_folder_is_one_whatever_it_is_called(tmp_path):
    (tmp_path / "t.csv").mkdir()
    refused(tmp_path / "t.csv", "no images in")
    refused(tmp_path / "t.csv", "is no table", columns={"label": "x"})
    refused(pictures(tmp_path, "a.png"), "--root is where the images of a table lie", root=str(tmp_path))


PATHS = st.from_regex(r"[a-z,; \"|]{0,9}[a-z]", fullmatch=True).map(str.strip)
LABELS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n|;,[]"), max_size=9).map(
    "xx{}".format
) | st.sampled_from(["", "NA", "1.0", "2"])


@given(st.dictionaries(PATHS, LABELS, min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_a_csv_comes_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("t")
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("path", "label"), *rows.items()])
    (folder / next(iter(rows))).touch()
    data = open_source(folder / "t.csv")
    assert data.ids == list(rows)
    names = ["" if label == -1 else data.classes[label] for label in data.labels]
    assert list(map(spelling_key, names)) == [spelling_key(_as_class(label.strip())) for label in rows.values()]


def _as_class(label: str) -> str:
    """What the documentation says of a cell: a word for missing is empty, a whole number has no decimals."""
    whole, point, decimals = label.partition(".")
    number = whole.removeprefix("-").isdecimal() and point and decimals and not decimals.strip("0")
    return "" if is_missing(label) else whole if number else label


@pytest.mark.parametrize("name", ["list.csv.gz", "list.TSV.gz", "list.csv.zip", "list.csv"])
def test_packed_tables_are_read_as_the_table_in_them(tmp_path, name):
    text = "path,label\na.png,x\nb.png,y\n".replace(",", "\t" if "TSV" in name else ",").encode()
    pictures(tmp_path, "a.png", "b.png")
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("inner/list.csv", text)
            archive.writestr("__MACOSX/._list.csv", "x")
    else:
        (tmp_path / name).write_bytes(gzip.compress(text))
    data = open_source(tmp_path / name)
    assert (data.ids, data.classes, data.name) == (["a.png", "b.png"], ["x", "y"], "list")
    assert reopened(data).ids == data.ids


def test_packed_tables_that_are_damaged_several_or_too_large_are_refused(tmp_path, monkeypatch):
    file, packed = tmp_path / "list.csv.gz", gzip.compress(b"path,label\n" + bytes(range(33, 127)) * 9)
    for damaged in (packed[:40], packed[:20] + b"\xff" * 20, b"PK\3\4" + packed):
        file.write_bytes(damaged)
        refused(file, "cannot be read as a table (packed, and damaged")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.csv", "")
        archive.writestr("b.csv", "")
    refused(file, "a zip of 2 files; expected one table in it")
    monkeypatch.setattr("featurecache.files.delimited._MOST", 100)
    file.write_bytes(packed)
    refused(file, "more than 100 bytes when unpacked")


def test_splits_that_only_the_paths_name_are_taken_and_said(tmp_path):
    rows = "set/train_data/x/1.png,x\nset/train_data/y/2.png,y\nset/test_data/x/3.png,x\n"
    data = open_source(listed(tmp_path, "path,label\n" + rows))
    assert data.splits == ["train", "train", "test"]
    assert "splits from test_data/, train_data/ in the paths (read as test, train)" in data.understood
    assert open_source(tmp_path / "list.csv", columns={"split": ""}).splits == [""] * 3
    assert reopened(data).splits == data.splits


@pytest.mark.parametrize(
    ("paths", "note"),
    [
        (("train/1.png", "train/2.png"), False),  # one file of several, as CheXpert has them
        (("train/1.png", "test/2.png", "pred/3.png"), True),
        (("train/1.png", "2.png"), False),
        (("bus/1.png", "train/2.png", "car/3.png"), False),
    ],
)
def test_paths_that_say_no_splits_of_all_images_say_none(tmp_path, paths, note):
    data = open_source(listed(tmp_path, "path,label\n" + "".join(f"{path},x\n" for path in paths)))
    assert set(data.splits) == {""}
    assert any("The paths have test/, train/ and beside them pred" in words for words in data.notes) == note


@pytest.mark.parametrize(
    ("column", "cells", "groups", "note"),
    [
        ("case", ["1", "2", "3", "1"], True, False),
        ("case", ["1", "0", "", "1"], False, False),  # yes and no
        ("barcode", ["x1", "x2", "x3", "x1"], False, True),
        ("barcode", ["x1", "x2", "x3", ""], False, False),
    ],
)
def test_empty_cells_are_no_group_and_no_id_that_repeats(tmp_path, column, cells, groups, note):
    rows = "".join(f"{row}.png,{'xy'[row % 2]},{cell}\n" for row, cell in enumerate([*cells, *cells[3:]]))
    data = open_source(listed(tmp_path, f"path,label,{column}\n{rows}"))
    assert (data.groups is not None, any("barcode stands beside" in words for words in data.notes)) == (groups, note)


def test_a_table_of_labels_for_features_without_a_label_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"list.csv has no column of labels among a, b; --column label=NAME"):
        read_annotations(str(table(tmp_path, "a,b\n1,2\n")), None, None)


def test_a_column_that_is_the_label_leaves_the_groups_to_another(tmp_path):
    rows = "path,patient,subject\na.png,x,1\nb.png,y,1\n"
    assert open_source(listed(tmp_path, rows), columns={"label": "patient"}).groups == ["1", "1"]


def test_what_is_no_image_is_not_found_below_the_table(tmp_path):
    (pictures(tmp_path, "sub/1.png") / "sub/a.dat").write_text("")
    refused(table(tmp_path, "path,label\na.dat,x\n"), "looked for", "a.dat")
