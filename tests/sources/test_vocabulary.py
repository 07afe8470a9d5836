"""The words that people use: of splits, of one class in several spellings, of missing cells; the order of classes."""

import pytest

from featurecache.errors import SourceError
from featurecache.sources.vocabulary import (
    in_order,
    is_missing,
    one_spelling,
    spelling_key,
    split_name,
    split_names_of,
)

TRAIN = ("train", "Training", "training_set", "Train Set", "train_data", "trainset", "TrainingImages", "X_train", "TRN")
VAL = ("val", "valid", "validate", "val_images", "Validation Set", "dev", "PublicTest")
TEST = ("test", "testing", "test data", "testimages", "TST", "PrivateTest", "holdout")


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN), ("val", VAL), ("test", TEST)])
def test_names_of_splits_in_the_wild(split: str, names: tuple[str, ...]) -> None:
    assert {name: split_name(name) for name in names} == dict.fromkeys(names, split)


@pytest.mark.parametrize(
    "name", ["train station", "test tube", "trainA", "data", "", "train_test", "bus", "x", "testy"]
)
def test_what_holds_another_word_is_no_split(name: str) -> None:
    assert split_name(name) is None


def test_a_word_that_all_names_share_says_nothing() -> None:
    assert split_names_of(["brain_train", "brain_test"]) == {"brain_train": "train", "brain_test": "test"}
    assert split_names_of(["train2017", "val2017"]) == {"train2017": "train", "val2017": "val"}
    assert split_names_of(["trainA", "trainB", "testA"]) == {}


def test_evaluation_is_what_the_others_leave() -> None:
    assert split_names_of(["training", "validation", "evaluation"])["evaluation"] == "test"
    assert split_names_of(["train", "test", "eval"])["eval"] == "val"
    assert split_names_of(["train", "eval"]) == {"train": "train"}


def test_cells_that_mean_nothing() -> None:
    assert all(map(is_missing, ("", " ", "NaN", "NA", "N/A", "None", "null", "-")))
    assert not any(map(is_missing, ("none", "0", "no", "normal")))


def test_one_class_in_several_spellings_has_that_of_most_rows() -> None:
    names, notes = one_spelling({"Normal": 3, "NORMAL": 2, "Pneumonia": 1}, "cxr")
    assert names == {"Normal": "Normal", "NORMAL": "Normal", "Pneumonia": "Pneumonia"}
    assert notes == ["'NORMAL' and 'Normal' are spellings of one class, Normal."]


def test_unicode_forms_and_spaces_are_spellings() -> None:
    names, notes = one_spelling({"\u00dcbung": 1, "U\u0308bung": 1, "oak ": 1, "oak": 1}, "d")
    assert set(names.values()) == {"\u00dcbung", "oak"}
    assert notes[0] == "'U\\u0308bung' and '\\xdcbung' are spellings of one class, \u00dcbung."
    assert spelling_key("a  b") == spelling_key("A b ") != spelling_key("ab")


def test_numbers_are_in_the_order_of_numbers() -> None:
    assert in_order(["10", "9", "-1", "2"], "ordinal", None, "d") == ["-1", "2", "9", "10"]
    assert in_order(["grade-10", "grade-2"], None, None, "d") == ["grade-2", "grade-10"]
    assert in_order(["b", "10", "9"], None, None, "d") == ["9", "10", "b"]


def test_ordinal_names_need_an_order() -> None:
    grades = ["Mild", "Moderate", "No_DR"]
    with pytest.raises(SourceError, match=r"no numbers: say their order .*--order Mild,Moderate,No_DR"):
        in_order(grades, "ordinal", None, "d")
    assert in_order(grades, None, None, "d") == grades
    assert in_order(grades, "ordinal", ["no_dr", "Mild", "Moderate"], "d") == ["No_DR", "Mild", "Moderate"]
