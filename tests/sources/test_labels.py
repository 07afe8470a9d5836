"""Labels of foreign columns, and how published sets are named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurecache.errors import SourceError
from featurecache.sources.fetching import SourceOptions
from featurecache.sources.labels import (
    groups_or_ids,
    labels_of_listed,
    labels_of_numbers,
    labels_of_text,
    resolve_labels,
    several_labels_of_text,
)

WORD = st.from_regex(r"[a-z0-9.-]{1,8}", fullmatch=True)


def row(index: int) -> str:
    return f"row {index}"


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
    of_numbers, of_text = labels_of_numbers(numbers, "x"), labels_of_text(["10.0", "2", "nan", "2.0"], [""] * 4, row)
    assert of_numbers[1] == of_text[1] == ["2", "10"]
    assert of_numbers[0].tolist() == of_text[0].tolist() == [1, 0, -1, 0]
    assert labels_of_listed(["1", "b", ""], ["a", "b"], row)[0].tolist() == [1, 1, -1]


def test_several_labels_are_one_zero_or_unknown_and_nothing_else():
    labels = several_labels_of_text({"a": ["1", "0"], "b": ["", "True"]}, row)
    np.testing.assert_array_equal(labels, labels_of_numbers(np.array([[1, np.nan], [0, 1]]), "x")[0])
    with pytest.raises(SourceError, match="row 1: 'a' is \"-1\""):
        several_labels_of_text({"a": ["1", "-1"]}, row)
    with pytest.raises(SourceError, match="x row 1, label 0 is -1"):
        labels_of_numbers(np.array([[1, 0], [-1, 0]]), "x")


@pytest.mark.parametrize("values", [np.array([0.5]), np.array([-2]), np.array([1 << 40]), np.array(["a"])])
def test_what_is_no_label_is_refused(values):
    with pytest.raises(SourceError, match=r"a label is a whole number|no column of labels"):
        labels_of_numbers(values, "x")
    with pytest.raises(SourceError, match="the label 2, and there are 2 classes"):
        labels_of_numbers(np.array([2]), "x", ["a", "b"])


def test_an_image_without_a_group_is_a_group_of_its_own():
    assert groups_or_ids(["p", "", None, 7], ["a", "b", "c", "d"]) == ["p", "b", "c", "7"]


@given(WORD, st.just("") | WORD, st.just("") | st.from_regex(r"[0-9]{1,3}", fullmatch=True), st.none() | WORD)
def test_the_name_of_a_published_set_is_read_as_it_is_written(name, variant, version, folder):
    options = SourceOptions("kind", name, variant, version, f"/{folder}" if folder else "")
    assert SourceOptions.parse("kind", str(options).removeprefix("kind:")) == options


def test_several_labels_of_another_number_of_classes_are_refused():
    with pytest.raises(SourceError, match=r"a\.npy has 2 labels a row, and there are 3 classes"):
        labels_of_numbers(np.zeros((4, 2)), "a.npy", ["a", "b", "c"])
