"""The words that people use: of splits, of one class in several spellings, of missing cells; the order of classes."""

import pytest

from featurecache.errors import SourceError
from featurecache.sources.vocabulary import (
    in_order,
    is_missing,
    near_names,
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


def test_a_rare_class_that_is_called_nearly_like_another_is_asked_about() -> None:
    counts = {"normal": 30, "pneumonia": 1200, "pnuemonia": 1}
    way = "If they are one, rename it in the data"
    merged = "or train with --classes pneumonia=pneumonia,pnuemonia --classes normal"
    assert near_names(counts) == [f"class pnuemonia has 1 image. Near: pneumonia (1,200). {way}, {merged}"]
    assert near_names(counts, several=True)[0].endswith(way)
    assert near_names({"a, viral": 9, "a, virol": 2})[0].endswith(way)  # --classes cannot name it
    assert near_names(counts | {"pnuemonia": 3}) == []
    assert near_names(counts | {f"person {k}": 1 for k in range(20)}) == []  # classes of one image are usual here


@pytest.mark.parametrize(
    ("name", "other", "near"),
    [
        ("maligant", "malignant", True), ("tumors", "Tumor", True), ("lung cancer", "lung_cancer", True),
        ("viral pnuemonia", "viral pneumonia", True), ("grade 1", "grade1", True), ("grade1", "grade2", False),
        ("stage 1", "stage 2", False), ("stage I", "stage II", False), ("type a", "type b", False),
        ("cat", "cap", False), ("abnormal", "normal", False), ("atypical", "typical", False), ("oak", "Oak", False),
        ("hyperplasia", "hypoplasia", False), ("10001", "10002", False), ("lung", "liver", False),
    ],
)  # fmt: skip
def test_which_names_are_near(name: str, other: str, near: bool) -> None:
    assert bool(near_names({name: 1, other: 9})) == near


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
