"""The sentence that answers a comparison, by hand: better, worse, no difference, one head, several, other images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heads.evaluation.answer import answer_of
from heads.evaluation.comparison import MeasureDifference
from heads.settings import METRICS


def difference(value: float, p: float = 0.001, measure: str = "auroc") -> dict:
    """Of an interval that is 0.03 wide on each side."""
    made = MeasureDifference(measure, value, value - 0.03, value + 0.03, p, "DeLong")
    return replace(made, p_holm=p, families=3).record()


def record(reference, families, *, select="auroc", task="binary", **more) -> dict:
    """``families``: name -> (val, difference to the reference)."""
    measure = "nll" if select == "loss" else select
    rows = [
        {"name": name, "val": {measure: val, "nll": 0.1}, "test": {measure: {"value": 0.9, "low": 0.85, "high": 0.95}},
         "difference": None if own is None else {measure: own}}
        for name, (val, own) in families.items()
    ]  # fmt: skip
    plain = {"clusters": {"unit": "image", "n": 624}, "n_test": 624, "controls": [], "families": rows}
    return plain | {"select": select, "task": task, "reference": reference} | more


CASES = {
    "better than the reference": (
        record("linear", {"linear": (0.9, None), "large": (0.95, difference(0.055))}),
        "large is better than linear by 0.055 [0.025, 0.085] AUROC on 624 test images.",
    ),
    "itself the reference": (
        record("large", {"linear": (0.9, difference(-0.055)), "large": (0.95, None),
                         "cnn": (0.8, difference(-0.01, 0.4))}),
        "large is better than linear by 0.055 [0.025, 0.085] AUROC on 624 test images; than cnn: no difference shown.",
    ),
    "worse, though val puts it first": (
        record("large", {"linear": (0.9, difference(0.055)), "large": (0.95, None)}),
        "large is worse than linear by 0.055 [0.025, 0.085] AUROC on 624 test images.",
    ),
    "no difference": (
        record("large", {"linear": (0.9, difference(-0.01, 0.3)), "large": (0.95, None)}),
        "Between large and linear no difference is shown: +0.010 [−0.020, +0.040] AUROC on 624 test images.",
    ),
    "an interval without 0 that Holm does not bear out": (
        record("large", {"linear": (0.9, difference(-0.04, 0.2)), "large": (0.95, None)}),
        "Between large and linear no difference is shown: +0.040 [+0.010, +0.070] AUROC on 624 test images, "
        "p 0.2 by Holm over 3.",
    ),
    "lower is better": (
        record("a", {"a": (0.1, None), "b": (0.2, difference(0.05, measure="nll"))}, select="loss"),
        "a is better than b by 0.050 [0.020, 0.080] NLL on 624 test images.",
    ),
    "a reference of its own and the others against it": (
        record("cnn", {"a": (0.9, difference(0.05)), "b": (0.8, difference(0.04)), "c": (0.7, difference(-0.05)),
                       "cnn": (0.6, None), "d": (0.5, difference(0.01, 0.5))}),
        "a is better than cnn by 0.050 [0.020, 0.080] AUROC on 624 test images. The others against cnn: better: b; "
        "worse: c; no difference shown: d.",
    ),
    "a sweep": (
        record("h0", {"h0": (0.99, None)} | {f"h{k}": (0.9 - k / 100, difference(-0.05)) for k in range(1, 5)}
               | {f"n{k}": (0.5, difference(0.01, 1.0)) for k in range(3)}),
        "h0 is better than h1 by 0.050 [0.020, 0.080] AUROC, h2 by 0.050 [0.020, 0.080] AUROC and 2 more on 624 test "
        "images; than n0, n1 and 1 more: no difference shown.",
    ),
    "other images": (
        record("a", {"a": (0.9, None), "b": (0.8, None), "c": (0.7, difference(-0.05))}),
        "a is better than c by 0.050 [0.020, 0.080] AUROC on 624 test images; it was not tested on the images of b.",
    ),
    "one head": (record(None, {"a": (0.9, None)}), "a: AUROC 0.900 [0.850, 0.950] on 624 test images."),
    "one head with controls, by patients": (
        record(None, {"a": (0.9, None)}, clusters={"unit": "group", "n": 40},
               controls=[{"name": "pixels", "test": {"auroc": 0.875}}]),
        "a: AUROC 0.900 [0.850, 0.950] on 624 test images of 40 groups; without a backbone: pixels 0.875.",
    ),
    "one image": (
        record(None, {"a": (0.9, None)}, clusters={"unit": "group", "n": 1}, n_test=1),
        "a: AUROC 0.900 [0.850, 0.950] on 1 test image of 1 group.",
    ),
    "labels": (
        record("a", {"a": (0.9, None), "b": (0.8, difference(-0.05))}, task="multilabel"),
        "a is better than b by 0.050 [0.020, 0.080] macro AUROC on 624 test images.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_answer_says_what_the_numbers_say(case):
    made, expected = CASES[case]
    assert answer_of(made) == expected


def test_what_rounds_to_zero_has_no_sign():
    made = MeasureDifference("auroc", 0.0001, -0.0004, 0.0004, 0.5, "DeLong").record()
    same = answer_of(record("large", {"linear": (0.9, made), "large": (0.95, None)}))
    assert same == "Between large and linear no difference is shown: 0.000 [0.000, 0.000] AUROC on 624 test images."
    worse = MeasureDifference("auroc", -0.001, -0.0012, -0.0003, 0.001, "DeLong")
    words = replace(worse, p_holm=0.001, families=3).record()["words"]
    assert words.startswith("worse: -0.001 [-0.001, 0.000]")


@pytest.mark.parametrize("measure", ["auroc", "nll"])
@pytest.mark.parametrize("value, p", [(0.05, 0.01), (-0.05, 0.01), (0.01, 0.01), (0.05, 0.2)])
def test_which_of_two_is_the_reference_changes_nothing(measure, value, p):
    """`words` of the difference are another road to the verdict and its size."""
    select, high = ("auroc" if measure == "auroc" else "loss"), METRICS[measure].higher
    val = {"first": (0.9 if high else 0.1, difference(value, p, measure)), "second": (0.5, None)}
    turned = {"first": (val["first"][0], None), "second": (0.5, difference(-value, p, measure))}
    assert answer_of(record("second", val, select=select)) == answer_of(record("first", turned, select=select))
