"""The options of a sweep: lists, ranges, and what is no number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from heads.sweeps.grid import Range, SweepSpec, choices, numbers, search_range
from heads.sweeps.plan import _values_text


def test_a_range_goes_in_equal_ratios_and_ends_where_it_says():
    values = numbers("lr", "1e-4..1e-2:5")
    np.testing.assert_allclose(np.diff(np.log10(values)), 0.5, rtol=1e-5)
    assert (values[0], values[2], values[-1]) == (1e-4, 1e-3, 1e-2)


def test_values_stand_in_the_order_given_each_once():
    assert numbers("weight-decay", "0,1e-4,0") == (0.0, 1e-4)
    assert numbers("weight-decay", "0, 1e-5..1e-3:3") == (0.0, 1e-5, 1e-4, 1e-3)
    assert numbers("lr", 0.1) == numbers("lr", [0.1]) == numbers("lr", ".1") == (0.1,)


def test_a_range_without_a_number_is_for_a_search():
    assert search_range("lr", "1e-4..1e-2") == Range(1e-4, 1e-2)
    assert search_range("lr", "1e-4,1e-2") == (1e-4, 1e-2)
    with pytest.raises(BadOption, match=r"1e-4\.\.1e-2:5 are five"):
        numbers("lr", "1e-4..1e-2")


def test_equal_steps_and_whole_numbers():
    assert numbers("dropout", "0..0.5:+0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert numbers("batch-size", "8..64:4") == (8, 16, 32, 64) and numbers("epochs", "5..50:4") == (5, 11, 23, 50)
    assert all(type(value) is int for value in (*numbers("epochs", 7), *numbers("batch_size", "16..64:+16")))
    assert search_range("batch-size", "16..128") == Range(16, 128)
    assert search_range("epochs", "5..52:+10") == Range(5, 45, 10) and str(Range(5, 45, 10)) == "5..45:+10"
    assert search_range("dropout", "0..0.5:+0.1") == Range(0.0, 0.5, 0.1)


@given(st.floats(1e-9, 1.0), st.floats(1.5, 1e12), st.integers(1, 10**9))
def test_numbers_in_a_command_are_those_that_were_used(low, high, whole):
    assert search_range("lr", str(Range(low, high))) == Range(low, high)
    assert numbers("lr", _values_text((low, high))) == (low, high)
    assert numbers("epochs", _values_text((whole,))) == (whole,)


@pytest.mark.parametrize(
    "text",
    [[], "", "fast", "1e-4..", "1e-2..1e-4:3", "0..1:3", "1e-4..1e-2:1", "1..2:x", "0..1:+0", "1..0:+1", "0..1:+1e-9",
     "nan", "inf", "1,,2", "-1..1:3"],
)  # fmt: skip
def test_what_is_no_grid_names_the_option(text):
    with pytest.raises(BadOption, match="--lr"):
        numbers("lr", text)


def test_names_are_a_list_and_a_misspelt_one_is_shown_its_neighbour():
    assert choices("heads", "linear, large,linear") == ("linear", "large")
    assert choices("heads", ["linear"]) == ("linear",)
    with pytest.raises(BadOption, match=r"'cosin' is none of constant, cosine\. Near: cosine"):
        choices("schedule", "cosin", ("constant", "cosine"))
    with pytest.raises(BadOption, match="--outputs is empty"):
        choices("outputs", " , ")


def test_numbers_and_lists_of_numpy_are_those_of_python():
    counts = dict.fromkeys(("seeds", "repeats", "folds"), np.int64(2))
    grid = {"lr": np.array([0.001, 0.01]), "epochs": np.int64(3), "dropout": np.float32(0.5), "patience": np.int64(4)}
    given = SweepSpec.of("mlp", **counts, **grid, fractions=np.array([0.5, 1.0]))
    own = {"lr": [0.001, 0.01], "epochs": 3, "dropout": 0.5, "patience": 4, "fractions": [0.5, 1.0]}
    assert given == SweepSpec.of("mlp", **dict.fromkeys(counts, 2), **own)
    assert canonical_json(given.to_dict())


@pytest.mark.parametrize("seeds", [1.5, "2", True])
def test_a_count_that_is_no_whole_number_is_refused(seeds):
    with pytest.raises(BadOption, match=r"--seeds is .*; it must be a whole number"):
        SweepSpec.of("mlp", seeds=seeds)
