"""Bootstrap weights and intervals against scikit-learn, the definitions, and how often they hold the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as sk

from heads.metrics import classification, intervals, significance
from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.intervals import Clusters, FamilyEstimates, SharedResamples, bootstrap_estimate, bootstrap_weights


def predictions(seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 160)
    return CalibratedPredictions("binary", rng.normal(size=(160, 2)) + 1.5 * np.eye(2)[y], y, 1, (0.4,))


def binary(z, y):
    """``z``: logits of the positive class."""
    return CalibratedPredictions("binary", np.stack([np.zeros(len(z)), z], axis=1), y, 1, (0.5,))


def test_images_are_drawn_within_their_class_and_clusters_whole():
    y = np.repeat([0, 1], [30, 12])
    for weights in bootstrap_weights(Clusters.of(np.arange(42), y), 50):
        assert (weights[y == 0].sum(axis=0) == 30).all()
        assert (weights[y == 1].sum(axis=0) == 12).all()
    clusters = np.repeat(np.arange(14), 3)
    units = Clusters.of(clusters, y)
    assert units.clustered
    for weights in bootstrap_weights(units, 50):
        grouped = weights.reshape(14, 3, -1)
        assert (grouped == grouped[:, :1]).all()
        assert (grouped[:, 0].sum(axis=0) == 14).all()


def test_strata_of_a_few_clusters_are_one_so_that_none_is_drawn_the_same_every_time():
    y = np.repeat(np.arange(5), 4)
    clusters = np.repeat(np.arange(10), 2)  # two clusters of each class
    assert len(np.unique(Clusters.of(clusters, y).strata)) == 1
    assert len(np.unique(Clusters.of(np.arange(20), y).strata)) == 5
    labels = np.zeros((40, 3), dtype=np.float32)
    labels[:3] = np.eye(3)
    labels[30:, 0] = 1
    strata = Clusters.of(np.arange(40), labels).strata
    assert sorted(np.unique(strata, return_counts=True)[1]) == [2, 11, 27]  # 1,0,0 with the 10; two patterns of one


def test_each_row_is_drawn_once_on_average_with_the_variance_of_a_multinomial():
    units = Clusters.of(np.arange(50), np.zeros(50, dtype=int))
    weights = np.concatenate(list(bootstrap_weights(units, 20_000)), axis=1)
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.05)
    np.testing.assert_allclose(weights.var(axis=1), 1 - 1 / 50, atol=0.06)


def one_part(one, clusters=None, heads=1):
    clusters = np.arange(len(one.z)) if clusters is None else clusters
    return intervals.TestSet("k", clusters, (one,) * heads, 100.0)


def estimates(one, clusters=None, resamples=400, heads=1):
    names = [f"c{c}" for c in range(one.z.shape[1])]
    return FamilyEstimates([one_part(one, clusters, heads)], names, SharedResamples(resamples))


def test_proportions_are_wilsons_and_everything_else_a_bootstrap():
    one = predictions()
    found, called, truth = estimates(one).all(), one.predicted_labels == 1, one.y == 1
    for name, of in (("sensitivity", truth), ("ppv", called)):
        expected = significance.wilson(int((called & truth).sum()), int(of.sum()))
        assert (found[name].low, found[name].high) == pytest.approx(expected)
    by_wilson = dict.fromkeys(("sensitivity", "specificity", "ppv", "npv", "accuracy"), "Wilson")
    others = {m: e.method for m, e in found.items() if e.method != "bootstrap"}
    assert others == by_wilson | {"ece": "bootstrap, centred"} and found["auroc"].method == "bootstrap"
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_the_bootstrap_is_the_one_written_out():
    one = predictions()
    found = estimates(one, resamples=100)
    weights = np.concatenate(list(bootstrap_weights(one_part(one).clusters, 100)), axis=1)
    rows = [np.repeat(np.arange(160), w.astype(int)) for w in weights.T]
    areas = [sk.roc_auc_score(one.y[r], one.z[r, 1] - one.z[r, 0]) for r in rows]
    ends = found.estimate("auroc").low, found.estimate("auroc").high
    assert ends == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-6)


def test_at_0_or_100_percent_wilson_counts_clusters_not_images():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    perfect, clusters = binary(np.where(y == 0, -2.0, 2.0) + 0.01 * rng.normal(size=80), y), np.repeat(np.arange(20), 4)
    alone, grouped = (estimates(perfect, c).estimate("sensitivity") for c in (None, clusters))
    assert (alone.value, grouped.value) == (1.0, 1.0)
    assert alone.low == pytest.approx(significance.wilson(40, 40)[0])
    assert grouped.low == pytest.approx(significance.wilson(10, 10)[0])  # ten clusters hold positives
    assert "10 clusters" in grouped.method


def test_clusters_make_proportions_a_cluster_bootstrap_and_wider():
    rng = np.random.default_rng(0)
    of_group = rng.normal(size=30)
    y = np.tile([0, 1], 150)
    one, clusters = binary(1.2 * y - 0.6 + 1.5 * np.repeat(of_group, 10), y), np.repeat(np.arange(30), 10)
    alone, grouped = (estimates(one, c).estimate("sensitivity") for c in (None, clusters))
    assert grouped.method == "cluster bootstrap"
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_several_seeds_are_averaged_within_each_resample():
    """What is hard for all of them stays: three equal heads have the interval of one; 3 of different errors less."""
    one = predictions()
    alone, thrice = (estimates(one, heads=k).estimate("auroc") for k in (1, 3))
    assert (alone.low, alone.high) == pytest.approx((thrice.low, thrice.high))
    other = [replace(one, z=one.z + np.random.default_rng(s).normal(size=one.z.shape)) for s in (1, 2)]
    mean = FamilyEstimates([intervals.TestSet("k", np.arange(160), (one, *other))], ["a", "b"], SharedResamples(300))
    areas = [sk.roc_auc_score(s.y, s.z[:, 1] - s.z[:, 0]) for s in (one, *other)]
    assert mean.value("auroc") == pytest.approx(np.mean(areas))
    assert mean.estimate("accuracy").method == "bootstrap"


def test_a_measure_that_most_resamples_lack_has_no_interval_and_says_so():
    values = np.array([0.5] * 40 + [np.nan] * 60)
    none = bootstrap_estimate(0.5, values, "bootstrap")
    assert np.isnan([none.low, none.high]).all()
    assert none.method == "undefined in 60 of 100 resamples"
    assert none.record() == {"value": 0.5, "low": None, "high": None, "method": none.method}
    assert bootstrap_estimate(0.5, values[:50], "bootstrap").method == "bootstrap, undefined in 10 of 50"
    assert bootstrap_estimate(0.5, values[:42], "bootstrap").method == "bootstrap"


def test_a_rare_label_is_undefined_in_some_resamples_and_that_is_said():
    y = np.zeros((60, 2), dtype=np.float32)
    y[::2, 1] = 1
    y[:4] = [[1, np.nan], [np.nan, 0], [np.nan, 1], [0, np.nan]]  # patterns of one image each: drawn together
    z = np.random.default_rng(0).normal(size=(60, 2))
    found = estimates(CalibratedPredictions("multilabel", z, y, None, (0.5, 0.5))).of_classes()
    assert "undefined in" in found["c0"]["auroc"].method
    assert found["c1"]["auroc"].method == "bootstrap"


def test_folds_are_averaged_and_never_pooled():
    """Two folds whose scores lie at other heights: pooled, the AUROC would be far from either."""
    parts = []
    for fold, shift in enumerate((0.0, 50.0)):
        one = predictions(fold)
        shifted = replace(one, z=one.z + np.array([0, shift]))
        parts.append(intervals.TestSet(str(fold), np.arange(160), (shifted,), 160.0))
    found = FamilyEstimates(parts, ["a", "b"], SharedResamples(100))
    areas = np.array([sk.roc_auc_score(p.y, p.predictions[0].z[:, 1] - p.predictions[0].z[:, 0]) for p in parts])
    estimate = found.estimate("auroc")
    assert estimate.value == pytest.approx(areas.mean())
    low, high, _ = significance.corrected_t(areas, 1.0)
    assert (estimate.low, estimate.high) == pytest.approx((max(low, 0), min(high, 1)))
    assert "2 sets of test images" in estimate.method


def test_ppv_and_npv_at_a_prevalence_by_bayes():
    """Altman & Bland (1994): 0.90 sensitive, 0.75 specific at a prevalence of 0.25 would give 0.5455 and 0.9574."""
    expected = {"ppv": 0.9 * 0.25 / 0.4125, "npv": 0.75 * 0.75 / 0.5875}
    assert classification.predictive_values(0.9, 0.75, 0.25) == pytest.approx(expected)
    one = predictions()
    found = estimates(one)
    share = float((one.y == 1).mean())
    there = found.at_prevalence(share)
    assert there["ppv"].value == pytest.approx(found.value("ppv"))  # at test's own prevalence
    assert there["npv"].value == pytest.approx(found.value("npv"))
    rare = found.at_prevalence(0.01)
    assert rare["ppv"].low < rare["ppv"].value < rare["ppv"].high < there["ppv"].low


def coverage(make, truths, runs=120, resamples=200):
    hits = dict.fromkeys(truths, 0)
    for seed in range(runs):
        one, clusters = make(np.random.default_rng(seed))
        found = estimates(one, clusters, resamples)
        for name, truth in truths.items():
            estimate = found.estimate(name)
            hits[name] += estimate.low <= truth <= estimate.high
    return {name: count / runs for name, count in hits.items()}


def independent(rng, n=200):
    """Logits of the true model: 60 of 200 positive."""
    y = np.repeat([0, 1], [n * 7 // 10, n * 3 // 10])
    x = rng.normal(size=n) + 1.2 * y
    return binary(1.2 * x - 0.72 + np.log(3 / 7), y), np.arange(n)


def correlated(rng, groups=60):
    """Patients of six images that share their difficulty."""
    y = np.repeat(rng.permutation(np.repeat([0, 1], [groups * 6 // 10, groups * 4 // 10])), 6)
    x = np.repeat(rng.normal(size=groups), 6) + 0.7 * rng.normal(size=6 * groups) + 1.2 * y
    return binary(x - 0.6, y), np.repeat(np.arange(groups), 6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [independent, correlated])
def test_intervals_hold_the_truth_as_often_as_they_say(make):
    """120 data sets each: 95 % within what 120 can show (three standard errors: 0.89)."""
    large, _ = make(np.random.default_rng(0), 200_000 if make is independent else 60_000)
    truth = classification.evaluate(large, ["a", "b"])
    found = coverage(make, {name: truth[name] for name in ("auroc", "nll", "brier", "accuracy", "sensitivity")})
    assert all(0.88 <= share <= 1 for share in found.values()), found
    assert min(found["auroc"], found["nll"]) < 1


@pytest.mark.slow
def test_images_of_one_patient_taken_for_independent_would_promise_too_much():
    large, _ = correlated(np.random.default_rng(0), 60_000)
    truth = {"auroc": classification.evaluate(large, ["a", "b"])["auroc"]}

    def torn(rng):
        one, _ = correlated(rng)
        return one, np.arange(len(one.z))

    assert coverage(torn, truth)["auroc"] < 0.8 < coverage(correlated, truth)["auroc"]
