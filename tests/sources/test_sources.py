"""What ``open_source`` takes: the digits, archives of MedMNIST's form, words, tasks; and every kind opened again."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.plant import flip
from support.small_sets import npz, pictures, refused, reopened, shades, table

from featurecache.errors import BadOption, SeveralReadings, SourceError, nearest
from featurecache.sources import SOURCES, open_source
from featurecache.sources import npz as npz_source
from featurecache.sources.medmnist import MEDMNIST


def test_digits_are_scikit_learns_on_the_full_range():
    from sklearn.datasets import load_digits

    data, original = open_source("digits"), load_digits()
    assert (len(data), data.task, data.ids[12]) == (1797, "multiclass", "digits:12")
    assert data.labels.tolist() == original.target.tolist()
    np.testing.assert_allclose(data.read(5), original.images[5] * 255 / 16, atol=0.5)
    assert (data.read(5).dtype, data.read(5).max()) == (np.uint8, 255)


def test_a_folder_called_digits_is_reached_with_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(pictures(tmp_path, "digits/1.png"))
    assert len(open_source("digits")) == 1797
    assert len(open_source("./digits")) == len(open_source(Path("digits"))) == 1


def test_words_and_files_that_are_no_source_say_what_there_is(tmp_path):
    message = refused("zenodo:4711", "no source called zenodo", "a folder of images")
    assert all(f"{prefix}:<" in message for prefix in ("medmnist", "torchvision", "hf", "kaggle"))
    assert {"medmnist:", "torchvision:", "hf:", "kaggle:"} <= {source.prefix for source in SOURCES.values()}
    refused(pictures(tmp_path, "one.png") / "one.png", "is a file; expected", "a folder of images")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link", "is a broken link")
    refused("", "empty")


@pytest.mark.parametrize("name", ["hf:", "hf: ", "hf:@v1", "kaggle:", "kaggle:/", "medmnist:", "torchvision:@folder"])
def test_a_prefix_without_a_name_is_no_folder(name):
    refused(name, f"--data {name} names no data set; expected {name.partition(':')[0]}:<")


def test_near_names_are_each_said_once():
    assert nearest("compare", ["compact", "merge"]) == nearest("nodir", ["folder"]) == ""
    assert nearest("act", ["accuracy", "atc"]) == nearest("atc", ["act"]).replace("act", "atc") == " Near: atc."
    assert nearest("train", ["train-head", "train-baseline"]) == " Near: train-head, train-baseline."
    assert nearest("othre", ["other", "x", "other", "others", "other"]) == " Near: other, others."


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        ("regression", ["x", "y"], ["'regression' is unknown", "multilabel"]),
        ("binary", ["x", "y", "z"], ["has 3 classes: its task is multiclass, it cannot be binary"]),
        ("multiclass", ["", ""], ["no labels"]),
        ("ordinal", ["", ""], ["has no labels: its task is unlabelled, it cannot be ordinal"]),
    ],
)
def test_a_task_that_the_labels_contradict(tmp_path, task, labels, words):
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    refused(table(tmp_path, "path,label\n" + rows), *words, task=task)


def test_every_source_opens_again_from_its_record(tmp_path, monkeypatch):
    pictures(tmp_path / "folder", "train/a/1.png", "train/b/2.png")
    table(tmp_path, "path,x,y\nfolder/train/a/1.png,1,0\nfolder/train/b/2.png,,1\n")
    npz(tmp_path / "set.npz", train_images=shades(3, 4, 4), train_labels=np.arange(3))
    monkeypatch.chdir(tmp_path)
    opened = [open_source("folder"), open_source("list.csv", columns={"label": "x,y"})]
    opened += [open_source("set.npz", task="ordinal"), open_source("digits")]
    monkeypatch.chdir("/")
    records = [reopened(data).source for data in opened]
    assert records[0].pop("understood").startswith("splits from train/ (read as train)")
    assert records == [
        {"kind": "folder", "data": str(tmp_path / "folder")},
        {
            "kind": "table",
            "data": str(tmp_path / "list.csv"),
            "columns": {"label": "x,y"},
            "understood": "empty cells of labels (1) are unknown",
        },
        {"kind": "npz", "data": str(tmp_path / "set.npz"), "task": "ordinal"},
        {"kind": "digits", "data": "digits"},
    ]


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


# -- archives of MedMNIST's form


def test_npz_in_the_order_train_val_test(tmp_path):
    file = npz(tmp_path / "set.npz", test_images=shades(2, 5, 4), test_labels=np.array([[1], [0]]),
               train_images=shades(3, 5, 4), train_labels=np.array([[0], [1], [2]]), val_images=shades(1, 5, 4),
               val_labels=np.array([[2]]))  # fmt: skip
    data = open_source(file)
    assert data.ids[:4] == ["set.npz:train:0", "set.npz:train:1", "set.npz:train:2", "set.npz:val:0"]
    assert data.splits == ["train"] * 3 + ["val"] + ["test"] * 2
    assert (data.labels.tolist(), data.classes, data.task) == ([0, 1, 2, 2, 1, 0], ["0", "1", "2"], "multiclass")
    assert [int(data.read(row)[0, 0]) for row in range(6)] == [0, 1, 2, 0, 0, 1]
    assert data.path(0) is None


NAMES = [
    ("x_train", "y_train", "x_test", "y_test"), ("X_train", "Y_train", "X_test", "Y_test"),
    ("training_images", "training_labels", "testing_images", "testing_labels"),
    ("trainX", "trainY", "testX", "testY"), ("xtrain", "ytrain", "xtest", "ytest"),
    ("train_data", "train_targets", "test_data", "test_targets"),
]  # fmt: skip


def test_an_array_in_a_later_format_is_refused(tmp_path):
    array = io.BytesIO()
    np.lib.format.write_array(array, np.zeros((2, 4, 4), np.uint8), version=(3, 0))
    with zipfile.ZipFile(tmp_path / "new.npz", "w") as archive:
        archive.writestr("images.npy", array.getvalue())
    refused(tmp_path / "new.npz", "cannot be read as an .npz (array format 3.0, expected 1.0 or 2.0)")


def test_names_in_an_archive_are_read_as_the_cells_of_a_table(tmp_path):
    cells = npz(tmp_path / "cells.npz", images=shades(4, 4, 4), labels=np.array(["a", "A", "NA", "b"]))
    refused(cells, "'A' and 'a': one class or two?", error=SeveralReadings)
    data = reopened(open_source(cells, letter_case="ignore"))
    assert (data.classes, data.labels.tolist(), data.splits) == (["a", "b"], [0, 0, -1, 1], [""] * 4)
    assert data.ids[2] == "cells.npz:2" and [int(data.read(row)[0, 0]) for row in range(4)] == [0, 1, 2, 3]
    signed = npz(tmp_path / "signed.npz", images=shades(4, 4, 4), labels=np.array(["1", "-1", "1", "1"]))
    refused(signed, "holds 1 and -1", error=SeveralReadings)
    assert open_source(signed, uncertain="one").labels.tolist() == [0, 0, 0, 0]
    numbers = npz(tmp_path / "numbers.npz", images=shades(3, 4, 4), labels=np.array([0, 1, -1]))
    with pytest.raises(
        BadOption, match=r"--uncertain is about labels that are text.* the labels of numbers.npz are num"
    ):
        open_source(numbers, uncertain="one")


@pytest.mark.parametrize("names", NAMES)
def test_npz_by_whatever_its_arrays_are_called(tmp_path, names):
    arrays = (shades(2, 5, 4), np.array([1, 0]), shades(3, 5, 4), np.array([0, 1, 1]))
    data = open_source(npz(tmp_path / "set.npz", **dict(zip(names, arrays, strict=True)), history=np.zeros(3)))
    assert (data.splits, data.labels.tolist()) == (["train"] * 2 + ["test"] * 3, [1, 0, 0, 1, 1])
    assert f"{names[0]} as images of train" in data.understood[0] and "not used: history" in data.notes[1]


def test_npz_of_one_1_in_every_row_has_classes(tmp_path):
    file = npz(tmp_path / "set.npz", x_train=shades(4, 5, 4), y_train=np.eye(3)[[2, 0, 1, 1]])
    data = open_source(file)
    assert (data.labels.tolist(), data.classes, data.task) == ([2, 0, 1, 1], ["0", "1", "2"], "multiclass")
    assert data.understood[0].startswith("3 classes: every row of labels has exactly one 1")
    assert open_source(file, task="multilabel").labels.shape == (4, 3)


def test_npz_of_images_alone_is_read_where_no_labels_are_wanted(tmp_path):
    data = open_source(npz(tmp_path / "new.npz", X_test=shades(3, 5, 4)), task="unlabelled")
    assert (len(data), data.task, data.splits) == (3, "unlabelled", ["test"] * 3)


def test_npz_beyond_memory_is_mapped_from_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_source, "_IN_MEMORY", 10)
    np.savez_compressed(tmp_path / "set.npz", train_images=shades(9, 5, 4), train_labels=np.arange(9) % 2)
    data = open_source(tmp_path / "set.npz")
    assert [int(data.read(row)[4, 3]) for row in (8, 0, 3)] == [8, 0, 3]
    assert isinstance(data.images.parts[0]._array.base, np.memmap)


@pytest.mark.parametrize("name", sorted(MEDMNIST))
def test_a_medmnist_name_brings_published_classes_and_task(tmp_path, name):
    record = MEDMNIST[name]
    labels = np.arange(len(record.classes))[::-1, None]  # a class that no image has keeps its index
    labels = np.eye(len(labels), dtype=np.uint8) if record.task == "multilabel" else labels[:2]
    for size in ("", "_64", "_128", "_224"):
        file = npz(tmp_path / f"{name}{size}.npz", train_images=shades(len(labels), 4, 4), train_labels=labels)
        data = open_source(file)
        assert (data.classes, data.task) == (list(record.classes), record.task)
        np.testing.assert_array_equal(data.labels.reshape(labels.shape), labels)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/featurecache-was-here",)


TWO, ZEROS = shades(2, 4, 4), np.zeros(2, int)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train_images": np.array([_Evil()], object), "train_labels": np.zeros(1)}, ["pickled", "(train_images)"]),
        ({"train_images": TWO, "train_labels": np.array([None])}, ["pickled", "(train_labels)"]),
        ({"a": TWO, "train": np.zeros(2)}, ["has the arrays a, train; expected train_images"]),
        ({"x_train": TWO, "train_images": TWO}, ["has two arrays of train images, x_train and train_images"]),
        ({"x": TWO, "y": ZEROS, "x_test": TWO}, ["has x, y beside x_test: of which split are the first?"]),
        ({"x_train": TWO}, ["has x_train and no labels of the same split"]),
        ({"train_images": TWO}, ["has train_images and no train_labels"]),
        ({"train_labels": ZEROS}, ["has train_labels and no train_images"]),
        ({"train_images": TWO, "train_labels": np.zeros(3, int)}, ["2 train_images", "shape [3]"]),
        ({"train_images": shades(2, 4, 4, 4), "train_labels": ZEROS}, ["volumes are not images"]),
        ({"train_images": shades(2, 4, 4, dtype=np.float32), "train_labels": ZEROS}, ["float32 [2, 4, 4]"]),
        ({"train_images": TWO, "train_labels": np.array([0.5, 1])}, ["row 0 is 0.5; a label"]),
        ({"train_images": TWO, "train_labels": np.array([np.nan, 1])}, ["are not whole numbers (float64)"]),
        ({"train_images": TWO, "train_labels": np.array(["a", "b"], "S1")}, ["no column of labels"]),
        ({"train_images": TWO, "train_labels": np.array([-2, 1])}, ["row 0 is -2"]),
        ({"train_images": TWO, "train_labels": np.array([[0, 2], [1, 1]])}, ["label 1 is 2; expected"]),
        ({"train_images": TWO, "train_labels": np.eye(2, dtype=int), "test_images": TWO, "test_labels": ZEROS},
         ["differ in their form", "train_labels [2, 2], test_labels [2]"]),
    ],
)  # fmt: skip
def test_archives_that_are_wrong_get_their_sentence(tmp_path, parts, words):
    refused(npz(tmp_path / "set.npz", **parts), *words)
    assert not Path("/tmp/featurecache-was-here").exists()


@pytest.mark.parametrize(
    ("labels", "words"), [(np.arange(3), "has the label 2"), (np.eye(3, dtype=int), "has 3 labels a row")]
)
def test_a_medmnist_name_on_other_labels_is_refused(tmp_path, labels, words):
    file = npz(tmp_path / "pneumoniamnist.npz", train_images=shades(3, 4, 4), train_labels=labels)
    refused(file, "bears the name of a MedMNIST set (rename the file", f"{words}, and there are 2 classes")


def test_archives_that_are_none_or_damaged(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    refused(tmp_path / "a.npz", "cannot be read as an .npz")
    file = npz(tmp_path / "b.npz", train_images=shades(3, 40, 40), train_labels=np.arange(3))
    flip(file, 2000)
    with pytest.raises(SourceError, match="is damaged"):
        open_source(file).read(0)
    np.savez_compressed(file, train_images=np.random.default_rng(0).integers(0, 256, (6, 12, 12), np.uint8))
    whole = file.read_bytes()
    start = whole.index(b"train_images.npy") + len("train_images.npy") + 20
    for at in range(start, start + 40):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(SourceError):
            open_source(file, task="unlabelled").read(0)
