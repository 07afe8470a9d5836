"""Calibration error and reliability diagrams against scikit-learn, plain loops, and heads of known calibration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.classification import evaluate
from heads.metrics.reliability import (
    Confidence,
    bin_count,
    consistency_interval,
    consistency_resamples,
    mass_bins,
    reliability,
)


def head(n, sharper=1.0, classes=2, seed=0):
    """Labels are drawn from softmax(z); the head says z times ``sharper``. Calibrated at 1."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n, classes))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    binary = classes == 2
    return CalibratedPredictions("binary" if binary else "multiclass", sharper * z, y, 1 if binary else None, (0.5,))


def label_head(n, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, labels))
    y = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.float32)
    y[rng.random(y.shape) < 0.3] = np.nan
    y[:, -1] = np.nan  # of the last one nothing is known
    return CalibratedPredictions("multilabel", z, y, None, (0.5,) * labels)


def ece(predictions):
    return evaluate(predictions, [str(c) for c in range(predictions.z.shape[1])])["ece"]


def shown(predictions):
    """Whether the value is beyond what a calibrated head would show."""
    return ece(predictions) > consistency_interval([((predictions,), np.arange(len(predictions.y)))])[1]


def test_bins_are_as_many_as_images_can_fill():
    assert [bin_count(n) for n in (1, 45, 90, 624, 3000, 10**6)] == [2, 4, 4, 9, 14, 15]


def test_reliability_bins_equal_scikit_learns_quantile_bins():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    p = rng.random(350)
    truth = rng.random(350) < p**2
    share, mean = calibration_curve(truth, p, n_bins=7, strategy="quantile")
    found = reliability(p, truth, np.arange(350))
    np.testing.assert_allclose([b["p"] for b in found], mean)
    np.testing.assert_allclose([b["share"] for b in found], share)
    assert [b["n"] for b in found] == [50] * 7
    for b in found:
        interval = stats.binomtest(round(50 * b["share"]), 50).proportion_ci(method="wilson")
        assert (b["low"], b["high"]) == pytest.approx((interval.low, interval.high))


def test_answers_of_several_heads_about_one_image_count_once_in_an_interval():
    rng = np.random.default_rng(0)
    twice = (np.tile(column, 2) for column in (rng.random(100), rng.random(100) < 0.4, np.arange(100)))
    for b in reliability(*twice):
        images = b["n"] // 2
        interval = stats.binomtest(round(b["share"] * images), images).proportion_ci(method="wilson")
        assert (b["low"], b["high"]) == pytest.approx((interval.low, interval.high))


def test_equal_probabilities_share_a_bin_whatever_the_order_of_the_rows():
    p, truth = np.repeat([0.2, 0.7], [40, 20]), np.tile([1.0, 0.0], 30)
    order = np.random.default_rng(0).permutation(60)
    assert len(reliability(p, truth, np.arange(60))) == 2
    assert (mass_bins(p)[order] == mass_bins(p[order])).all()


@pytest.mark.parametrize("predictions", [head(300), head(301, classes=4), label_head(200)], ids=lambda p: p.kind)
def test_the_error_of_given_labels_is_that_of_plain_loops_and_of_the_table(predictions):
    judged = Confidence.of(predictions)
    expected = []
    for c in range(judged.labels):
        of_label = judged.bin // 15 == c
        gaps = [abs((judged.p - judged.truth)[judged.bin == b].sum()) for b in np.unique(judged.bin[of_label])]
        expected += [sum(gaps) / of_label.sum()] if of_label.any() else []
    assert judged.calibration_error(judged.truth[:, None])[0] == pytest.approx(np.mean(expected), rel=1e-5)
    assert ece(predictions) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("n", [45, 90, 600])
def test_what_a_calibrated_head_would_show_is_what_calibrated_heads_do_show(n):
    """Of 200 calibrated heads about 2.5 % may be called miscalibrated; the interval of the value alone says nothing: it
    is an error above 0 for every one of them."""
    values = [ece(head(n, seed=seed)) for seed in range(200)]
    called = np.mean([shown(head(n, seed=seed)) for seed in range(200)])
    assert called <= 0.06 and min(values) > 0
    drawn = consistency_resamples((head(n),), np.arange(n))
    assert np.mean(drawn) == pytest.approx(np.mean(values), rel=0.15)


def test_an_overconfident_head_is_shown_where_there_are_images_enough():
    assert np.mean([shown(head(600, sharper=2.5, seed=seed)) for seed in range(40)]) == 1
    assert np.mean([shown(head(45, sharper=1.2, seed=seed)) for seed in range(40)]) < 0.5


def test_copies_and_images_of_one_group_are_drawn_together():
    one = head(80)
    tenfold = CalibratedPredictions("binary", one.z.repeat(10, axis=0), one.y.repeat(10), 1, (0.5,))
    rows = np.arange(800)
    alone, grouped = (consistency_resamples((tenfold,), units).mean() for units in (rows, rows // 10))
    assert grouped > 2 * alone


def test_heads_of_several_seeds_are_wrong_about_the_same_labels():
    """Three heads that say the same vary as one does; labels drawn for each apart would vary less."""
    one, units = head(200), np.arange(200)
    drawn = consistency_resamples((one,), units)
    np.testing.assert_allclose(consistency_resamples((one, one, one), units), drawn, rtol=1e-6)
    apart = np.mean([consistency_resamples((one,), units, seed) for seed in range(3)], axis=0)
    assert apart.std() < 0.7 * drawn.std()
