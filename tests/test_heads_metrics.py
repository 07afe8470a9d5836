"""Measures and calibration against scikit-learn, scipy and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from fake_view import toy_view
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from featurecache.errors import BadOption
from heads.metrics import classification
from heads.metrics import classification as ev
from heads.metrics.calibration import Calibration, calibrate, prior_correction, temperature
from heads.settings import Settings
from heads.training.job import prepare


def sample(n=400, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    z = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[y]
    return z, y


def measured(z, y, kind, **more):
    return ev.evaluate(kind, tuple(f"c{i}" for i in range(z.shape[1])), z, y, **more)


def test_auroc_by_hand():
    """Pairs (positive, negative): 0.9 beats both, 0.4 ties with 0.4 and beats 0.1: (2 + 1.5) / 4."""
    assert classification.auroc(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])) == 3.5 / 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_ranking_measures_equal_scikit_learn_with_any_ties(pairs):
    score, truth = np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs])
    if truth.all() or not truth.any():
        assert np.isnan(classification.auroc(score, truth))
        return
    assert classification.auroc(score, truth) == pytest.approx(sk.roc_auc_score(truth, score))
    assert classification.average_precision(score, truth) == pytest.approx(sk.average_precision_score(truth, score))
    false, found, least = classification.roc_curve(score, truth)
    for x, y, threshold in zip(false, found, least, strict=True):
        called = score >= threshold
        assert (x, y) == (pytest.approx((called & ~truth).sum() / (~truth).sum()), pytest.approx(called[truth].mean()))


@pytest.mark.parametrize("positive", [0, 1])
def test_binary_measures_equal_scikit_learn(positive):
    z, y = sample(classes=2)
    p = ev.probabilities("binary", z)[:, positive]
    truth, called = y == positive, p >= 0.4
    got = measured(z, y, "binary", positive=positive, cuts=(0.4,))
    want = {
        "auroc": sk.roc_auc_score(truth, p),
        "ap": sk.average_precision_score(truth, p),
        "sensitivity": sk.recall_score(truth, called),
        "specificity": sk.recall_score(~truth, ~called),
        "ppv": sk.precision_score(truth, called),
        "npv": sk.precision_score(~truth, ~called),
        "f1": sk.f1_score(truth, called),
        "accuracy": sk.accuracy_score(truth, called),
        "nll": sk.log_loss(truth, p),
        "brier": sk.brier_score_loss(truth, p),
    }
    assert {key: got[key] for key in want} == pytest.approx(want)


def test_multiclass_measures_equal_scikit_learn():
    z, y = sample()
    p = ev.probabilities("multiclass", z)
    got, called = measured(z, y, "multiclass"), p.argmax(1)
    want = {
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "macro_f1": sk.f1_score(y, called, average="macro"),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "nll": sk.log_loss(y, p),
        "brier": sk.brier_score_loss(y, p, labels=range(4)),
    }
    assert {key: got[key] for key in want} == pytest.approx(want)
    assert got["confusion"] == sk.confusion_matrix(y, called).tolist()
    precision, recall, f1, there = sk.precision_recall_fscore_support(y, called)
    first = {"precision": precision[0], "recall": recall[0], "f1": f1[0], "n": there[0]}
    first |= {"specificity": sk.recall_score(y != 0, called != 0), "ap": sk.average_precision_score(y == 0, p[:, 0])}
    assert {key: got["per_class"]["c0"][key] for key in first} == pytest.approx(first)


def test_top5_appears_from_20_classes_on_and_equals_scikit_learn():
    z, y = sample(classes=20)
    assert measured(z, y, "multiclass")["top5"] == pytest.approx(sk.top_k_accuracy_score(y, z, k=5))
    assert "top5" not in measured(*sample(classes=19), "multiclass")


def test_ordinal_measures_equal_scikit_learn():
    z, y = sample(classes=5)
    got, called = measured(z, y, "ordinal"), z.argmax(1)
    assert got["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(y, called, weights="quadratic"))
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(y, called))


def test_multilabel_masks_what_is_unknown_and_averages_what_is_defined():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(200, 3)), (rng.random((200, 3)) < 0.4).astype(np.float32)
    y[:50, 0] = np.nan
    y[:, 2] = 0  # no positive: its AUROC is not defined
    got = measured(z, y, "multilabel", cuts=(0.5, 0.5, 0.5))
    known = ~np.isnan(y)
    p = 1 / (1 + np.exp(-z))
    first = got["per_class"]["c0"]
    assert (first["n_known"], first["n_positive"]) == (150, int(np.nansum(y[:, 0])))
    areas = [sk.roc_auc_score(y[known[:, c], c], z[known[:, c], c]) for c in (0, 1)]
    assert np.isnan(got["per_class"]["c2"]["auroc"])
    assert got["auroc"] == pytest.approx(np.mean(areas))
    assert got["nll"] == pytest.approx(sk.log_loss(y[known], p[known]))
    assert got["brier"] == pytest.approx(((p - y)[known] ** 2).mean())


def test_a_class_absent_from_test_is_undefined_and_left_out_of_the_means():
    z, y = sample(classes=3)
    z, y = z[y < 2], y[y < 2]
    got, called = measured(z, y, "multiclass"), z.argmax(1)
    assert np.isnan(got["per_class"]["c2"]["auroc"])
    assert np.isnan(got["per_class"]["c2"]["recall"])
    recalls = [(called[y == c] == c).mean() for c in (0, 1)]
    assert got["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(y, called, average="macro"))


def test_scores_keep_the_order_where_probabilities_run_into_one():
    z = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 70.0], [0.0, -50.0]])
    assert len(set(ev.probabilities("binary", z)[:, 1])) < 4
    np.testing.assert_allclose(ev.measure_scores("binary", z)[:, 1], [50, 60, 70, -50])


def test_scores_are_the_log_odds():
    z, _ = sample(classes=5)
    p = ev.probabilities("multiclass", z)
    np.testing.assert_allclose(ev.measure_scores("multiclass", z), np.log(p / (1 - p)), rtol=1e-9)


def test_youden_threshold_by_hand():
    """At >= 0.6: sensitivity 1, specificity 2/3; no other cut is as good. Halfway to 0.3 is 0.45."""
    p, truth = np.array([0.1, 0.3, 0.7, 0.6, 0.9]), np.array([False, False, False, True, True])
    assert classification.youden_threshold(p, truth) == pytest.approx(0.45)
    assert classification.youden_threshold(p, np.ones(5, dtype=bool)) == 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_no_threshold_has_a_larger_youden_index(pairs):
    p, truth = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    if truth.all() or not truth.any():
        return

    def youden(cut):
        return (p >= cut)[truth].mean() - (p >= cut)[~truth].mean()

    best = youden(classification.youden_threshold(p, truth))
    assert best >= max(youden(cut) for cut in [*p, 0.0, 1.0]) - 1e-12


def test_prior_correction_by_hand():
    """Balanced batches of two classes, 10 % in train: log(0.1/0.5), log(0.9/0.5)."""
    got = prior_correction(np.array([0.1, 0.9]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(got, [np.log(0.2), np.log(1.8)])
    assert prior_correction(np.array([0.5, 0.5, 0]), np.array([0.5, 0.5, 0])).tolist() == [0, 0, 0]


def test_prior_correction_gives_the_posterior_of_the_true_prevalence():
    """Two Gaussians at -1 and 1: trained balanced, the ideal logit is 2x; at prevalence 0.1 it is 2x + log(1/9)."""
    x = np.linspace(-3, 3, 7)
    z = np.stack([np.zeros(7), 2 * x], axis=1) + prior_correction(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    joint = np.stack([0.9 * np.exp(-((x + 1) ** 2) / 2), 0.1 * np.exp(-((x - 1) ** 2) / 2)], axis=1)
    np.testing.assert_allclose(ev.probabilities("binary", z), joint / joint.sum(1, keepdims=True))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_temperature_is_that_of_the_smallest_nll(kind, factor):
    z, y = sample()
    z = z * factor
    if kind == "multilabel":
        y = np.eye(4)[y]
        y[::3, 1] = np.nan
    found = minimize_scalar(
        lambda t: ev.nll(kind, z / np.exp(t), y), bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert temperature(kind, z, y) == pytest.approx(np.exp(found.x), rel=1e-5)


def test_a_val_separated_without_error_leaves_the_temperature_at_one():
    z, y = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([0, 1])
    calibration, note = calibrate("binary", z, y, np.zeros(2), 1)
    assert calibration.temperature == 1.0
    assert "separated without error" in note


def test_calibration_goes_to_json_and_back():
    calibration = Calibration((0.1, -0.2), 1.5, (0.3,))
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    np.testing.assert_allclose(calibration(np.array([[1.0, 1.0]])), [[1.1 / 1.5, 0.8 / 1.5]])


def test_binary_calls_by_the_threshold_and_others_by_the_largest():
    p = np.array([[0.7, 0.3], [0.9, 0.1]])
    assert ev.predict_labels("binary", p, (0.2,), 1).tolist() == [1, 0]
    assert ev.predict_labels("binary", p, (0.8,), 0).tolist() == [1, 0]
    assert ev.predict_labels("multiclass", p, (), None).tolist() == [0, 0]
    assert ev.predict_labels("multilabel", p, (0.8, 0.2), None).tolist() == [[False, True], [True, False]]


def test_the_threshold_for_a_wanted_sensitivity_by_hand():
    """Positives at 0.9, 0.8, 0.6, 0.3: three of four need 0.6; the next below is the negative at 0.5."""
    p = np.array([0.9, 0.8, 0.6, 0.3, 0.5, 0.1])
    truth = np.array([True, True, True, True, False, False])
    assert classification.sensitivity_threshold(p, truth, 0.75) == pytest.approx(0.55)
    assert classification.sensitivity_threshold(p, truth, 0.76) == pytest.approx(0.2)
    assert classification.sensitivity_threshold(p, truth, 1.0) == pytest.approx(0.2)
    assert classification.sensitivity_threshold(p, np.zeros(6, dtype=bool), 0.9) == 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.1, 0.3, 0.5, 0.9, 1]), st.booleans()), min_size=1), st.floats(0.01, 1))
def test_no_higher_threshold_reaches_the_wanted_sensitivity(pairs, wanted):
    p, truth = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    if not truth.any():
        return
    cut = classification.sensitivity_threshold(p, truth, wanted)
    assert (p >= cut)[truth].mean() >= wanted - 1e-9
    assert all(
        (p >= higher)[truth].mean() < wanted - 1e-9 for higher in p[p > cut] if (p >= higher).sum() < (p >= cut).sum()
    )


def test_a_wanted_sensitivity_is_reached_on_val_for_each_label_and_refused_for_several_classes():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 2)) < 0.4).astype(np.float32)
    y[:40, 0] = np.nan
    z = rng.normal(size=(200, 2)) + np.nan_to_num(y)
    calibration, _ = calibrate("multilabel", z, y, np.zeros(2), None, 0.9)
    p = ev.probabilities("multilabel", calibration(z))
    for c in (0, 1):
        found = (p[:, c] >= calibration.thresholds[c])[y[:, c] == 1].mean()
        assert 0.9 <= found < 0.93
    with pytest.raises(BadOption, match="of 3 classes the most probable is called"):
        prepare(toy_view(classes=3), Settings("linear", sensitivity=0.9))


def test_calibration_error_by_hand():
    """30 rows in bins of two: 0.2 with none of two right, 0.9 with one of two: (2·0.2 + 2·0.4) / 4, twice and more."""
    p = np.repeat([0.1, 0.2, 0.9], [26, 2, 2])
    truth = np.repeat([0, 0, 1, 0], [26, 2, 1, 1]).astype(float)
    assert classification.calibration_error(p, truth) == pytest.approx((26 * 0.1 + 2 * 0.2 + 2 * 0.4) / 30)
    assert np.isnan(classification.calibration_error(np.zeros(0), np.zeros(0)))


def test_reliability_bins_equal_scikit_learns_quantile_bins():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    p = rng.random(300)
    truth = rng.random(300) < p**2
    share, mean = calibration_curve(truth, p, n_bins=15, strategy="quantile")
    found = classification.reliability(p, truth)
    np.testing.assert_allclose([b["p"] for b in found], mean)
    np.testing.assert_allclose([b["share"] for b in found], share)
    assert [b["n"] for b in found] == [20] * 15
    assert classification.calibration_error(p, truth) == pytest.approx(np.abs(mean - share).mean())


def test_equal_probabilities_share_a_bin_whatever_the_order_of_the_rows():
    p, truth = np.repeat([0.2, 0.7], [40, 20]), np.tile([1.0, 0.0], 30)
    order = np.random.default_rng(0).permutation(60)
    assert len(classification.reliability(p, truth)) == 2
    assert classification.calibration_error(p, truth) == pytest.approx(
        classification.calibration_error(p[order], truth[order])
    )


def test_of_several_classes_the_surest_answer_is_judged():
    z, y = sample(classes=3)
    p = ev.probabilities("multiclass", z)
    sure, true = ev.confidence("multiclass", p, y, None)
    assert (sure == p.max(1)).all()
    assert (true == (p.argmax(1) == y)).all()
    assert measured(z, y, "multiclass")["ece"] == pytest.approx(classification.calibration_error(sure, true))
