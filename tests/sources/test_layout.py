"""What the folders above images say: splits, classes, persons, folds, masks, one class in several spellings, order."""

from __future__ import annotations

import pytest
from support.small_sets import pictures, refused, reopened

from featurecache.errors import SeveralReadings, SourceError
from featurecache.sources import open_source
from featurecache.sources.layout import FolderLayout, read_layout


def paths(*folders: str) -> list[str]:
    """Two images in each."""
    return [f"{folder}/{number}.png" for folder in folders for number in range(2)]


def rows_of(layout: FolderLayout) -> set[tuple[str, ...]]:
    """(split, class, person, fold) of the images; the last two where there are any."""
    columns = [layout.splits, layout.classes, layout.groups, layout.folds]
    return set(zip(*(column for column in columns if column is not None), strict=True))


def read(*folders: str, classes_at: int | None = None) -> set[tuple[str, ...]]:
    return rows_of(read_layout(paths(*folders), "data", classes_at))


SPLITS_ABOVE = [
    ("training_set/cats", "training_set/dogs", "test_set/cats"),
    ("Train Set/cats", "Train Set/dogs", "Test Set/cats"),
    ("seg_train/seg_train/cats", "seg_train/seg_train/dogs", "seg_test/seg_test/cats"),
    ("pets/brain_train/cats", "pets/brain_train/dogs", "pets/brain_test/cats"),
    ("train/images/cats", "train/images/dogs", "test/images/cats"),
    ("train2017/cats/images", "train2017/dogs/images", "test2017/cats/images"),
    ("cats/train", "dogs/train", "cats/test"),
    ("chest/cats/Training", "chest/dogs/Training", "chest/cats/Testing"),
]


@pytest.mark.parametrize("folders", SPLITS_ABOVE, ids=" ".join)
def test_splits_are_no_classes_however_they_are_called(folders):
    assert read(*folders) == {("train", "cats"), ("train", "dogs"), ("test", "cats")}


READ = {  # situation -> folders; of each split-class-person or -fold; the level of the classes where it is told
    "folders above everything": ("chest/xray/N chest/xray/P", "-N -P", None),
    "folders of images alone": ("A/images A/original B/images B/original", "-A -B", None),
    "numbers of ImageNet": ("n01440764/images n01443537/images", "-n01440764 -n01443537", None),
    "persons above classes": ("8863/0 8863/1 8864/0", "-0-8863 -1-8863 -0-8864", None),
    "persons below classes": ("N/patient1 N/patient2 P/patient3", "-N-patient1 -N-patient2 -P-patient3", None),
    "persons below one class": ("N P/patient1 P/patient2", "-N- -P-patient1 -P-patient2", None),
    "persons with studies and no classes":
        ("train/patient1/study1 valid/patient4/study1", "train--patient1 val--patient4", None),
    "splits below persons, some without classes":
        ("patient1/train/a patient1/train/b patient2/test", "train-a-patient1 train-b-patient1 test--patient2", None),
    "splits below persons": ("P001/train/0 P001/train/1 P002/test/0", "train-0-P001 train-1-P001 test-0-P002", 3),
    "folds": ("fold_0/all fold_0/hem fold_1/all", "-all-fold_0 -hem-fold_0 -all-fold_1", None),
    "a class called train inside splits":
        ("train/train train/bus test/train test/bus", "train-train train-bus test-train test-bus", None),
    "splits and persons above a told level":
        ("train/8863/0 train/8863/1 test/8864/0", "train-0-8863 train-1-8863 test-0-8864", 3),
    "folds above a told level": ("fold1/a fold2/b", "-a-fold1 -b-fold2", 2),
    "a told class called train": ("bus train car", "-bus -train -car", 1),
    "told classes of two depths": ("train test/deep", "-train -test", 1),
}  # fmt: skip


@pytest.mark.parametrize(("folders", "said", "classes_at"), READ.values(), ids=READ)
def test_what_folders_say_of_splits_classes_persons_and_folds(folders, said, classes_at):
    assert read(*folders.split(), classes_at=classes_at) == {tuple(row.split("-")) for row in said.split()}


def test_folds_are_kept_in_a_column_of_their_own(tmp_path):
    data = open_source(pictures(tmp_path, "fold_0/all/1.png", "fold_1/hem/2.png"))
    assert (data.meta, data.classes) == ({"fold": ["fold_0", "fold_1"]}, ["all", "hem"])


TWO_READINGS = [
    (("CT/lung", "CT/liver", "MR/lung"), 1, 2),
    (("benign/40X", "benign/100X", "malignant/40X"), 1, 2),
    (("set/CT/lung", "set/CT/liver", "set/MR/lung"), 2, 3),
    (("P001/benign", "P002/malignant"), 1, 2),
    (("P001/train/benign", "P002/test/malignant"), 1, 3),
]


@pytest.mark.parametrize(("folders", "first", "second"), TWO_READINGS)
def test_the_same_names_below_several_are_asked_about(folders, first, second):
    with pytest.raises(SeveralReadings, match=rf"--classes-at {first} or --classes-at {second}") as caught:
        read(*folders)
    assert [reading.options for reading in caught.value.readings] == [{"classes_at": first}, {"classes_at": second}]


def test_the_level_of_the_classes_can_be_told(tmp_path):
    folders = ("CT/lung", "CT/liver", "MR/lung")
    assert read(*folders, classes_at=1) == {("", "CT"), ("", "MR")}
    assert read(*folders, classes_at=2) == {("", "lung"), ("", "liver")}
    data = open_source(pictures(tmp_path, *paths(*folders)), classes_at=2)
    assert reopened(data).classes == data.classes == ["liver", "lung"]
    assert data.source["classes_at"] == 2 and "level 1 not used (CT, MR)" in data.source["understood"]
    refused(tmp_path, "may be CT, MR or, below these, liver, lung")


REFUSED = [
    (("seg_train/a", "seg_test/a", "seg_pred"), "beside them seg_pred, which belong to no split"),
    (("bus", "train", "car"), "if all folders of that level are classes, --classes-at 1"),
    (("trainA", "trainB", "testA", "testB"), "look like splits, and what their other words mean is not plain"),
    (("train/a", "train_data/a"), "the folders train and train_data in data both say train"),
    (("a/train", "a/test", "b"), "split folders below class folders (a/t"),
    (("a/other", "a/train", "b/train"), "split folders below class folders (a/train), but not every image"),
    (("train/train", "train/test", "test/test"), "in it lie test, train: which of them says the split"),
    (("fold_0/train/a", "fold_0/test/a", "fold_1/train/a"), "Give one fold: --data data/fold_0"),
    (("train/a", "train"), "holds images (0.png, 1.png) beside the folders a"),
]


@pytest.mark.parametrize(("folders", "words"), REFUSED)
def test_what_is_not_plain_is_refused_with_what_to_type(folders, words):
    with pytest.raises(SourceError) as caught:
        read(*folders)
    assert words in str(caught.value)


@pytest.mark.parametrize("level", [0, 2, 9])
def test_a_level_that_images_do_not_reach_is_refused(level):
    with pytest.raises(SourceError, match=rf"--classes-at {level}: \d images? of data above that level"):
        read("a", "b/c", classes_at=level)


def test_folders_that_are_no_part_are_left_out_as_told(tmp_path):
    pictures(
        tmp_path, "set/train/a/1.png", "set/train/b/2.png", "set/test/a/3.png", "set/old/c/4.png", "set/seg/a/5.png"
    )
    data = reopened(open_source(tmp_path, leave_out=["set/old/", "set/seg"]))
    assert (data.classes, data.splits) == (["a", "b"], ["test", "train", "train"])
    assert "left out as told (set/old/, set/seg)" in data.source["understood"]
    refused(tmp_path, "--leave-out set/odl: there is no such folder", "Near: old.", leave_out=["set/odl"])
    for name in ("..", "", "set/..", str(tmp_path / "set/old")):
        refused(tmp_path, "there is no such folder in", leave_out=[name])
    refused("digits", "--leave-out is folders of images that are no part", leave_out=["a"])
    refused("digits", "--classes-at is a level of the folders of images", classes_at=1)


# -- spellings and order


def test_one_class_in_two_cases_is_one_and_said(tmp_path):
    data = open_source(
        pictures(tmp_path, "train/Normal/1.png", "train/Ill/2.png", "train/Normal/3.png", "test/NORMAL/4.png")
    )
    assert (data.classes, data.labels.tolist()) == (["Ill", "Normal"], [1, 0, 1, 1])
    assert "'NORMAL' and 'Normal' are spellings of one class, Normal" in data.source["understood"]


def test_spellings_in_one_folder_may_be_two_classes(tmp_path):
    refused(pictures(tmp_path, "Normal/1.png", "NORMAL/2.png"), "has 'NORMAL' and 'Normal': one class or two")
    assert open_source(tmp_path, letter_case="ignore").classes == ["Normal"]
    data = reopened(open_source(tmp_path, letter_case="keep"))
    assert (data.classes, data.labels.tolist()) == (["NORMAL", "Normal"], [0, 1])
    two = pictures(tmp_path / "two", "\u00fcbel/1.png", "u\u0308bel/2.png")
    refused(two, "has 'u\\u0308bel' and '\\xfcbel' in one folder: rename one")
    refused(two, "rename one", letter_case="keep")
    refused(two, "--letter-case is ignore, keep, not 'fold'", letter_case="fold")


def test_numbers_are_ordered_as_numbers_without_being_asked(tmp_path):
    data = open_source(pictures(tmp_path, *(f"{grade}/1.png" for grade in range(12))), task="ordinal")
    assert data.classes == [str(grade) for grade in range(12)]
    assert open_source(pictures(tmp_path / "g", "grade 10/1.png", "grade 2/1.png")).classes == ["grade 2", "grade 10"]


def test_names_of_severity_need_an_order_which_is_kept(tmp_path):
    pictures(tmp_path, "Mild/1.png", "No_DR/2.png", "Severe/3.png")
    refused(tmp_path, "their names are no numbers", "--order Mild,No_DR,Severe", task="ordinal")
    data = open_source(tmp_path, task="ordinal", order=["No_DR", "Mild", "Severe"])
    assert (data.classes, data.labels.tolist()) == (["No_DR", "Mild", "Severe"], [1, 0, 2])
    assert reopened(data).classes == data.classes
    refused(tmp_path, "--order names Mild, Severe", order=["Mild", "Severe"])
    refused(pictures(tmp_path / "flat", "1.png"), "has no labels", order=["a"])


def test_the_names_of_persons_are_in_nothing_that_is_said(tmp_path):
    data = open_source(pictures(tmp_path, "patient7/0/1.png", "patient8/1/2.png", "patient7/0/1_mask.png"))
    assert data.groups == ["patient7", "patient8"] and "persons from level 1 (2, kept together)" in data.understood
    assert "patient" not in data.source["understood"]
