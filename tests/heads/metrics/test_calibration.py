"""Calibration against scikit-learn, scipy and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from sklearn.metrics import precision_recall_curve, roc_curve
from support.fake_view import toy_view

from featurecache.errors import BadOption
from heads.metrics import calibration as cal
from heads.settings import Settings
from heads.training.job import prepare_training


def test_log_odds_keep_the_order_where_probabilities_run_into_one():
    z = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 70.0], [0.0, -50.0]])
    assert len(set(cal.probabilities("binary", z)[:, 1])) < 4
    np.testing.assert_allclose(cal.log_odds("binary", z)[:, 1], [50, 60, 70, -50])
    z = 2 * np.random.default_rng(0).normal(size=(400, 5))
    p = cal.probabilities("multiclass", z)
    np.testing.assert_allclose(cal.log_odds("multiclass", z), np.log(p / (1 - p)), rtol=1e-9)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5 + 1e-12, 1.0]), st.booleans()), min_size=2))
def test_counts_at_every_threshold_are_the_curves_of_scikit_learn(pairs):
    score, truth = (np.array(column) for column in zip(*pairs, strict=True))
    assume(truth.any() and not truth.all())
    values, hits, alarms = cal.counts_at(score, truth)
    false_rate, true_rate, thresholds = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_array_equal(values, thresholds[1:])
    np.testing.assert_allclose(hits / hits[-1], true_rate[1:])
    np.testing.assert_allclose(alarms / alarms[-1], false_rate[1:])
    precision, _, _ = precision_recall_curve(truth, score)
    np.testing.assert_allclose(hits / (hits + alarms), precision[-2::-1])


def test_youden_threshold_by_hand():
    """At >= 0.6: sensitivity 1, specificity 2/3; no other cut is as good. Halfway to 0.3 is 0.45."""
    p, truth = np.array([0.1, 0.3, 0.7, 0.6, 0.9]), np.array([False, False, False, True, True])
    assert cal.youden_threshold(p, truth) == pytest.approx(0.45)
    assert cal.youden_threshold(p, np.ones(5, dtype=bool)) == 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_no_threshold_has_a_larger_youden_index(pairs):
    p, truth = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assume(truth.any() and not truth.all())
    cuts = (cal.youden_threshold(p, truth), *p, 0.0, 1.0)
    best, *others = ((p >= cut)[truth].mean() - (p >= cut)[~truth].mean() for cut in cuts)
    assert best >= max(others) - 1e-12


def test_prior_correction_gives_the_posterior_of_the_true_prevalence():
    """Two Gaussians at -1 and 1: trained balanced, the ideal logit is 2x; at prevalence 0.1 it is 2x + log(1/9)."""
    x = np.linspace(-3, 3, 7)
    z = np.stack([np.zeros(7), 2 * x], axis=1) + cal.prior_correction(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    joint = np.stack([0.9 * np.exp(-((x + 1) ** 2) / 2), 0.1 * np.exp(-((x - 1) ** 2) / 2)], axis=1)
    np.testing.assert_allclose(cal.probabilities("binary", z), joint / joint.sum(1, keepdims=True))
    assert cal.prior_correction(np.array([0.5, 0.5, 0]), np.array([0.5, 0.5, 0])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_temperature_is_that_of_the_smallest_nll_of_tiny_and_of_huge_logits_too(kind, scale):
    """Labels are drawn from softmax(z); the head says z times ``scale``: the temperature that makes it right."""
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(3000, 2 if kind == "binary" else 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    if kind == "multilabel":
        y = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.float32)
        y[::3, 1] = np.nan

    def nll(log_t):
        return cal.CalibratedPredictions(kind, z / np.exp(log_t), y).nll

    wanted = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}).x
    found, note = cal.temperature(kind, scale * z, y)
    assert note is None and found == pytest.approx(scale * np.exp(wanted), rel=1e-5)
    assert found == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize("slope", [np.expm1, lambda x: np.expm1(30 * x), lambda x: 1e-12 * x if x > 0 else x, np.tanh])
@pytest.mark.parametrize("ends", [(-20.0, 1.0), (-0.3, 0.9), (-1e-9, 5.0)])
def test_where_a_slope_crosses_zero_is_what_brentq_finds(slope, ends):
    """Steep on one side and flat on the other too."""
    shifted = lambda x: slope(x - 0.01)  # noqa: E731
    assert cal._zero(shifted, *ends) == pytest.approx(brentq(shifted, *ends, xtol=1e-12), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_val_separated_without_error_leaves_the_temperature_at_one(scale):
    z, y = scale * np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([0, 1])
    calibration, note = cal.calibrate("binary", z, y, np.zeros(2), 1, None)
    assert calibration.temperature == 1.0
    assert "separated without error" in note
    assert cal.temperature("binary", np.array([[3.0, 0.0], [1e-9, 0.0]]), y)[1] is None  # one error, however small


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_a_head_worse_than_equal_probabilities_gets_nearly_these_and_keeps_its_order(scale):
    rng = np.random.default_rng(0)
    z = scale * rng.normal(size=(200, 2))
    calibration, note = cal.calibrate("binary", z, z.argmin(axis=1), np.zeros(2), 1, None)
    p = cal.probabilities("binary", calibration(z))
    assert np.abs(p - 0.5).max() < 1e-3 and "no better than equal ones" in note
    assert (np.argsort(p[:, 1]) == np.argsort(z[:, 1] - z[:, 0])).all()


def test_calibration_goes_to_json_and_back():
    calibration = cal.Calibration((0.1, -0.2), 1.5, (0.3,))
    assert cal.Calibration.from_dict(calibration.to_dict()) == calibration
    np.testing.assert_allclose(calibration(np.array([[1.0, 1.0]])), [[1.1 / 1.5, 0.8 / 1.5]])


def test_binary_calls_by_the_threshold_and_others_by_the_largest():
    p = np.array([[0.7, 0.3], [0.9, 0.1]])
    assert cal.predict_labels("binary", p, (0.2,), 1).tolist() == [1, 0]
    assert cal.predict_labels("binary", p, (0.8,), 0).tolist() == [1, 0]
    assert cal.predict_labels("multiclass", p, (), None).tolist() == [0, 0]
    assert cal.predict_labels("multilabel", p, (0.8, 0.2), None).tolist() == [[False, True], [True, False]]


def test_the_threshold_for_a_wanted_sensitivity_by_hand():
    """Positives at 0.9, 0.8, 0.6, 0.3: three of four need 0.6; the next below is the negative at 0.5."""
    p = np.array([0.9, 0.8, 0.6, 0.3, 0.5, 0.1])
    truth = np.array([True, True, True, True, False, False])
    assert cal.sensitivity_threshold(p, truth, 0.75) == pytest.approx(0.55)
    assert cal.sensitivity_threshold(p, truth, 0.76) == pytest.approx(0.2)
    assert cal.sensitivity_threshold(p, truth, 1.0) == pytest.approx(0.2)
    assert cal.sensitivity_threshold(p, np.zeros(6, dtype=bool), 0.9) == 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.1, 0.3, 0.5, 0.9, 1]), st.booleans()), min_size=1), st.floats(0.01, 1))
def test_no_higher_threshold_reaches_the_wanted_sensitivity(pairs, wanted):
    p, truth = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assume(truth.any())
    cut = cal.sensitivity_threshold(p, truth, wanted)
    assert (p >= cut)[truth].mean() >= wanted - 1e-9
    assert all((p >= higher)[truth].mean() < wanted - 1e-9 for higher in p[p > cut] if (p < higher)[p >= cut].any())


def test_a_wanted_sensitivity_is_reached_on_val_for_each_label_and_refused_for_several_classes():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 2)) < 0.4).astype(np.float32)
    y[:40, 0] = np.nan
    z = rng.normal(size=(200, 2)) + np.nan_to_num(y)
    calibration, _ = cal.calibrate("multilabel", z, y, np.zeros(2), None, 0.9)
    p = cal.probabilities("multilabel", calibration(z))
    for c in (0, 1):
        found = (p[:, c] >= calibration.thresholds[c])[y[:, c] == 1].mean()
        assert 0.9 <= found < 0.93
    with pytest.raises(BadOption, match="of 3 classes the most probable is predicted"):
        prepare_training(toy_view(classes=3), Settings("linear", sensitivity=0.9))
