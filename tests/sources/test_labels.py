"""Labels of foreign columns, and how published sets are named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurecache.errors import SourceError
from featurecache.sources.annotations import labels_of_listed
from featurecache.sources.fetching import SourceOptions
from featurecache.sources.label_cells import LabelColumns, LabelOptions, labels_of_columns, one_hot_columns
from featurecache.sources.labels import groups_or_ids, labels_of_numbers, resolve_labels

WORD = st.from_regex(r"[a-z0-9.-]{1,8}", fullmatch=True)


def row(index: int) -> str:
    return f"row {index}"


def read(*cells: str, **options):  # type: ignore[no-untyped-def]
    """Labels, classes and what was understood of one column ``finding``."""
    reading = LabelColumns("t.csv", row, LabelOptions(**options))
    labels, classes = labels_of_columns({"finding": cells}, reading)
    return labels.tolist(), classes, " ".join(reading.remarks)


def read_columns(columns: dict[str, str], **options):  # type: ignore[no-untyped-def]
    """The same of several columns, one character a cell (-: -1, a space: empty)."""
    cells = {name: ["-1" if cell == "-" else cell.strip() for cell in text] for name, text in columns.items()}
    reading = LabelColumns("t.csv", row, LabelOptions(**options))
    labels, classes = labels_of_columns(cells, reading)
    return labels, classes, " ".join(reading.remarks)


@pytest.mark.parametrize(
    ("classes", "task", "expected"),
    [
        (0, None, "unlabelled"), (1, None, "multiclass"), (2, None, "binary"), (3, None, "multiclass"),
        (2, "multiclass", "multiclass"), (2, "ordinal", "ordinal"), (3, "ordinal", "ordinal"),
        (3, "unlabelled", "unlabelled"),
    ],
)  # fmt: skip
def test_the_task_is_what_is_requested_or_what_the_labels_say(classes, task, expected):
    names = [str(number) for number in range(classes)]
    labels, left, resolved = resolve_labels(np.zeros(4, np.int64), names, task, "x")
    assert (resolved, left) == (expected, [] if expected == "unlabelled" else names)
    assert (labels == (-1 if expected == "unlabelled" else 0)).all()


def test_numbers_and_text_of_the_same_column_are_the_same_labels():
    numbers = np.array([10, 2, -1, 2])
    of_numbers, of_text = labels_of_numbers(numbers, "x"), read("10.0", "2", "nan", "2.0")
    assert of_numbers[1] == of_text[1] == ["2", "10"]
    assert of_numbers[0].tolist() == of_text[0] == [1, 0, -1, 0]
    assert labels_of_listed(["1", "b", ""], ["a", "b"], row)[0].tolist() == [1, 1, -1]


def test_several_labels_are_one_zero_or_unknown_and_nothing_else():
    labels = labels_of_columns({"a": ["1.00", "no"], "b": ["NA", "True"]}, LabelColumns("t.csv", row))[0]
    np.testing.assert_array_equal(labels, labels_of_numbers(np.array([[1, np.nan], [0, 1]]), "x")[0])
    with pytest.raises(SourceError, match="row 1: 'a' is \"2\", expected 1 or 0, -1 where it is uncertain"):
        read_columns({"a": "12", "b": "10"})
    with pytest.raises(SourceError, match="x row 1, label 0 is -1"):
        labels_of_numbers(np.array([[1, 0], [-1, 0]]), "x")


@pytest.mark.parametrize(("uncertain", "value"), [(None, np.nan), ("ignore", np.nan), ("zero", 0), ("one", 1)])
def test_uncertain_labels_beside_each_other(uncertain, value):
    labels, _, said = read_columns({"Edema": "1- ", "Mass": "110"}, uncertain=uncertain)
    np.testing.assert_array_equal(labels[:, 0], [1, value, np.nan])
    assert "-1 (1 cell) is read as" in said and "empty cells of labels (1) are unknown" in said


@pytest.mark.parametrize(("uncertain", "labels"), [(None, [1, 0, -1]), ("zero", [1, 0, 0]), ("one", [1, 0, 1])])
def test_uncertain_labels_of_one_column(uncertain, labels):
    assert read("1.0", "0.0", "-1.0", uncertain=uncertain)[:2] == (labels, ["0", "1"])


def test_minus_one_beside_one_alone_and_beside_other_numbers():
    with pytest.raises(SourceError, match=r"holds 1 and -1: two classes \(--task binary\), or is -1 uncertain"):
        read("1", "-1")
    assert read("1", "-1", task="binary")[:2] == ([1, 0], ["-1", "1"])
    assert read("0", "2", "-1", "1")[:2] == ([0, 2, -1, 1], ["0", "1", "2"])
    with pytest.raises(SourceError, match="--uncertain zero is about labels of 1, 0 and -1"):
        read("0", "2", "-1", uncertain="zero")
    with pytest.raises(SourceError, match="--uncertain is ignore, zero, one, not 'maybe'"):
        LabelOptions(uncertain="maybe")


def test_findings_in_one_cell_are_labels_beside_each_other():
    labels, classes, said = read("No Finding", "Effusion|Mass", "Mass", "", "effusion", "Effusion")
    assert classes == ["Effusion", "Mass"]
    np.testing.assert_array_equal(labels, [[0, 0], [1, 1], [0, 1], [np.nan] * 2, [1, 0], [1, 0]])
    assert 'finding holds several findings, divided by "|": 2 labels; No Finding is a row without any' in said
    assert read("mass|", "mass|NA", " | fluid |mass")[:2] == ([[0, 1], [0, 1], [1, 1]], ["fluid", "mass"])


@pytest.mark.parametrize("sign", ["; ", ", ", ";", ","])
def test_another_sign_divides_where_its_parts_stand_alone(sign):
    assert read("a", "b", f"a{sign}b", "normal")[:2] == ([[1, 0], [0, 1], [1, 1], [0, 0]], ["a", "b"])
    assert read(f"mass{sign}benign", "cyst")[1] == ["cyst", f"mass{sign}benign"]


def test_one_column_of_yes_and_no_is_one_label_where_several_are_asked_for():
    labels, classes, _ = read("1", "0", "", task="multilabel")
    np.testing.assert_array_equal(labels, [[1], [0], [np.nan]])
    assert classes == ["finding"]


def test_a_sign_that_may_divide_or_not_is_asked_about():
    cells = ("mass, benign", "mass, malignant", "cyst, benign", "cyst, malignant")
    with pytest.raises(SourceError, match=r"one class, or several findings .*--task multiclass .*--task multilabel"):
        read(*cells)
    assert (len(read(*cells, task="multiclass")[1]), len(read(*cells, task="multilabel")[1])) == (4, 4)
    assert read("a|b", "a", task="multiclass")[1] == ["a", "a|b"]


def test_lists_of_findings():
    cells = ("['mass', 'effusion']", "['normal']", "[]", "['mass']")
    assert read(*cells)[:2] == ([[1, 1], [0, 0], [0, 0], [0, 1]], ["effusion", "mass"])
    assert read("[mass", "[mass]", "['a'")[1] == ["['a'", "[mass", "[mass]"]


def test_normal_beside_a_finding_is_a_label():
    assert read("normal", "normal|old", "old")[1] == ["normal", "old"]
    assert read("x", "y", "normal", task="multilabel")[:2] == ([[1, 0], [0, 1], [0, 0]], ["x", "y"])


def test_one_hot_columns_are_classes():
    columns = {"MEL": "100", "NV": "011"}
    labels, classes, said = read_columns(columns)
    assert (labels.tolist(), classes) == ([0, 1, 1], ["MEL", "NV"])
    assert "the columns MEL, NV are classes: each row has exactly one 1 (--task multilabel" in said
    assert read_columns(columns, task="multilabel")[0].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert read_columns({"MEL": "1 0", "NV": "0 1"})[0].tolist() == [0, -1, 1]


def test_columns_that_are_not_one_hot():
    assert read_columns({"a": "11", "b": "01"})[0].shape == (2, 2)
    with pytest.raises(SourceError, match=r"row 1 has a 1, b 1: for the task multiclass each row needs exactly one 1"):
        read_columns({"a": "11", "b": "01"}, task="multiclass")
    with pytest.raises(SourceError, match="row 0 has a 0, b nan"):
        read_columns({"a": "01", "b": " 0"}, task="binary")


def test_words_for_yes_and_no_of_one_column():
    labels, classes, said = read("1", "yes", "1", "0", "False", "0", "")
    assert (labels, classes) == ([1, 1, 1, 0, 0, 0, -1], ["0", "1"])
    assert "are read as 0 and 1" in said
    assert read("yes", "no")[1] == ["no", "yes"] and read("t", "n", "f")[1] == ["f", "n", "t"]


@pytest.mark.parametrize(
    ("cells", "meant"),
    [
        ([f"{20 + 1.37 * k:.2f}" for k in range(12)] + [""], "a measurement"),
        ([str(20 + k % 40) for k in range(400)], "a measurement"),
        ([f"a chest film, number {k}" for k in range(12)], "captions or ids"),
    ],
)
def test_ages_measurements_and_captions_are_no_classes(cells, meant):
    with pytest.raises(SourceError, match=f"{meant}, no classes.* regression is not offered. --task multiclass"):
        read(*cells)
    assert len(read(*cells, task="multiclass")[1]) == len(set(cells) - {""})


def test_a_hundred_numbered_classes_are_classes():
    assert len(read(*(str(k % 100) for k in range(1000)))[1]) == 100


@pytest.mark.parametrize("values", [np.array([0.5]), np.array([-2]), np.array([1 << 40]), np.array(["a"])])
def test_what_is_no_label_is_refused(values):
    with pytest.raises(SourceError, match=r"a label is a whole number|no column of labels"):
        labels_of_numbers(values, "x")


def test_numbers_that_the_classes_do_not_have_are_refused():
    with pytest.raises(SourceError, match="the label 2, and there are 2 classes"):
        labels_of_numbers(np.array([2]), "x", ["a", "b"])
    with pytest.raises(SourceError, match="x has 2 labels a row, and there are 3 classes"):
        labels_of_numbers(np.zeros((4, 2)), "x", ["a", "b", "c"])


def test_an_image_without_a_group_is_a_group_of_its_own():
    assert groups_or_ids(["p", "", None, 7, "NA"], ["a", "b", "c", "d", "e"]) == ["p", "b", "c", "7", "e"]


FOLDER = WORD.filter(lambda word: word not in (".", ".."))  # names of no folder of their own


@given(WORD, st.just("") | WORD, st.just("") | st.from_regex(r"[0-9]{1,3}", fullmatch=True), st.none() | FOLDER)
def test_the_name_of_a_published_set_is_read_as_it_is_written(name, variant, version, folder):
    options = SourceOptions("kind", name, variant, version, f"/{folder}" if folder else "")
    assert SourceOptions.parse("kind", str(options).removeprefix("kind:")) == options


def test_one_hot_columns_are_told_from_numbers_and_text():
    ones = {"a": np.array([1, 0]), "b": np.array([0, 1])}
    assert one_hot_columns({**ones, "age": np.array([60, 61]), "code": ["1", "0"]}) == ["a", "b"]
    assert one_hot_columns({"a": ones["a"]}) == []
