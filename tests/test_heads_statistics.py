"""Intervals and tests against scipy, statsmodels, scikit-learn, published tables, and the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from heads.metrics import classification as ev
from heads.metrics import significance
from heads.metrics.classification import CalibratedPredictions, WeightedMeasures
from heads.metrics.intervals import (
    BootstrapWeights,
    EvaluationSet,
    FamilyEstimates,
    SharedResamples,
    bootstrap,
    units_for,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits, n, low, high):
    """Newcombe (1998), table I, method 3."""
    assert significance.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = significance.wilson(n - hits, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_of_nothing_is_undefined():
    assert np.isnan(significance.wilson(0, 0)).all()


def test_mcnemar_of_agrestis_approval_ratings():
    """Agresti (1990): 150 approved the first time only, 86 the second time only."""
    from statsmodels.stats.contingency_tables import mcnemar

    first = np.repeat([True, True, False, False], [794, 150, 86, 570])
    second = np.repeat([True, False, True, False], [794, 150, 86, 570])
    assert significance.mcnemar(first, second) == pytest.approx(mcnemar([[794, 150], [86, 570]], exact=True).pvalue)
    assert significance.mcnemar(first, first) == 1.0


# DeLong, DeLong & Clarke-Pearson (1988), as in SAS/STAT's example of PROC LOGISTIC: albumin, total protein, K-G score,
# whether surgery helped.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7 5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4 6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def delong_by_pairs(first, second, truth):
    """The paper's definition: a kernel over all pairs, its means over rows and over columns, and their covariances."""
    rows, columns = [], []
    for score in (first, second):
        pairs = score[truth][:, None] - score[~truth][None, :]
        kernel = (pairs > 0) + 0.5 * (pairs == 0)
        rows.append(kernel.mean(axis=1))
        columns.append(kernel.mean(axis=0))
    covariance = np.cov(rows) / truth.sum() + np.cov(columns) / (~truth).sum()
    contrast = np.array([1.0, -1.0])
    difference, error = rows[0].mean() - rows[1].mean(), np.sqrt(contrast @ covariance @ contrast)
    return difference, error, 2 * stats.norm.sf(abs(difference) / error)


def test_delong_on_the_data_of_its_paper():
    albumin, protein, score, helped = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4).T
    truth = helped == 1
    for other in (albumin, protein):
        found = significance.delong(other, 10 - score, truth)
        assert found == pytest.approx(delong_by_pairs(other, 10 - score, truth))
        assert found[0] == pytest.approx(sk.roc_auc_score(truth, other) - sk.roc_auc_score(truth, 10 - score))
    assert significance.delong(albumin, 2 * albumin, truth)[2] == 1.0


def test_holm_equals_statsmodels():
    from statsmodels.stats.multitest import multipletests

    for ps in ([0.01, 0.04, 0.03, 0.005], [0.5], [0.04, 0.04, 0.9], [0.02, 0.6, 0.5, 1.0, 0.0]):
        assert significance.holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_nadeau_and_bengios_t_by_hand():
    """Differences 0.01, 0.02, 0.03 on 3 folds with 1 tested for 2 trained on: s² = 0.0001, variance
    (1/3 + 1/2) 0.0001, t = 0.02 / 0.00912871 = 2.19089 on 2 degrees."""
    low, high, p = significance.corrected_t(np.array([0.01, 0.02, 0.03]), 0.5)
    assert p == pytest.approx(2 * stats.t.sf(2.190890, 2), rel=1e-5)
    assert (low, high) == pytest.approx((0.02 - 4.302653 * 0.00912871, 0.02 + 4.302653 * 0.00912871), rel=1e-5)
    plain = stats.ttest_1samp([0.01, 0.02, 0.03], 0.0).pvalue
    assert p > significance.corrected_t(np.array([0.01, 0.02, 0.03]), 0.0)[2] == pytest.approx(plain)


def test_the_p_of_a_bootstrap_is_never_zero():
    assert significance.sign_share(np.full(1999, 0.1)) == 2 / 2000
    assert significance.sign_share(np.array([-1.0, 1.0, np.nan])) == 1.0


KINDS = ["binary", "multiclass", "ordinal", "many", "multilabel"]


def said(kind, n=160, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    count = {"binary": 2, "multiclass": 4, "ordinal": 5, "many": 21, "multilabel": 3}[kind]
    y = rng.integers(0, count, n)
    z = rng.normal(size=(n, count)) + 1.5 * np.eye(count)[y]
    if ties:
        z = z.round()
    if kind == "multilabel":
        labels = (rng.random((n, count)) < 0.3).astype(np.float32)
        labels[rng.random(labels.shape) < 0.2] = np.nan
        return CalibratedPredictions(kind, z, labels, None, (0.5, 0.4, 0.6))
    if kind == "binary":
        return CalibratedPredictions(kind, z, y, 1, (0.4,))
    return CalibratedPredictions("multiclass" if kind == "many" else kind, z, y)


def evaluated(one: CalibratedPredictions, rows):
    names = tuple(f"c{c}" for c in range(one.z.shape[1]))
    return ev.evaluate(one.kind, names, one.z[rows], one.y[rows], positive=one.positive, cuts=one.cuts)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_as_good_as_that_many_copies_of_the_row(kind, ties):
    one, rng = said(kind, ties=ties), np.random.default_rng(1)
    weights = np.stack([np.ones(160), rng.integers(0, 4, 160), rng.integers(1, 3, 160)], axis=1)
    overall, of_class = WeightedMeasures(one)(weights.astype(np.float32))
    for column in range(3):
        want = evaluated(one, np.repeat(np.arange(160), weights[:, column].astype(int)))
        own = {name for name, value in want.items() if isinstance(value, float)}
        assert set(overall) == own
        for name in own - {"ece"}:  # its bins stay those of the whole sample
            assert overall[name][column] == pytest.approx(want[name], abs=1e-6), name
        for name, values in of_class.items():
            if len(values) == len(want["per_class"]) and name != "ece":
                table = [row[name] for row in want["per_class"].values()]
                np.testing.assert_allclose(values[:, column], table, atol=1e-6)
    assert overall["ece"][0] == pytest.approx(evaluated(one, np.arange(160))["ece"], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
def test_weighted_rankings_equal_scikit_learn_with_any_ties(rows):
    score, truth, weight = (np.array(column) for column in zip(*rows, strict=True))
    one = CalibratedPredictions(
        "binary", np.stack([np.zeros(len(rows)), score.astype(float)], axis=1), truth.astype(int), 1, (0.5,)
    )
    overall, _ = WeightedMeasures(one)(weight[:, None].astype(np.float32))
    if not weight[truth].sum():
        assert np.isnan([overall["auroc"][0], overall["ap"][0]]).all()
        return
    want = sk.average_precision_score(truth, score, sample_weight=weight)
    assert overall["ap"][0] == pytest.approx(want, abs=1e-6)
    if weight[~truth].sum():
        assert overall["auroc"][0] == pytest.approx(sk.roc_auc_score(truth, score, sample_weight=weight), abs=1e-6)
    else:
        assert np.isnan(overall["auroc"][0])


def test_a_class_missing_in_a_resample_makes_its_mean_undefined_there():
    """Never the mean over the classes that happen to be left: that would be another measure."""
    one = said("multiclass")
    weights = np.stack([np.ones(160), one.y != 2], axis=1).astype(np.float32)
    overall, of_class = WeightedMeasures(one)(weights)
    assert np.isfinite(overall["auroc"][0])
    for name in ("auroc", "ap", "balanced_accuracy"):
        assert np.isnan(overall[name][1]), name
    assert np.isnan(of_class["recall"][2, 1])
    assert np.isfinite(overall["accuracy"]).all()


def test_a_class_that_test_does_not_have_is_left_out_of_every_mean():
    one = said("multiclass")
    there = one.y != 3
    absent = CalibratedPredictions(one.kind, one.z[there], one.y[there])
    overall, _ = WeightedMeasures(absent)(np.ones((there.sum(), 2), dtype=np.float32))
    assert overall["auroc"][0] == pytest.approx(evaluated(absent, np.arange(there.sum()))["auroc"])


def test_images_are_drawn_within_their_class_and_clusters_whole():
    y = np.repeat([0, 1], [30, 12])
    for weights in BootstrapWeights(units_for(np.arange(42), y), 50):
        assert (weights[y == 0].sum(axis=0) == 30).all()
        assert (weights[y == 1].sum(axis=0) == 12).all()
    clusters = np.repeat(np.arange(14), 3)
    units = units_for(clusters, y)
    assert units.clustered
    for weights in BootstrapWeights(units, 50):
        grouped = weights.reshape(14, 3, -1)
        assert (grouped == grouped[:, :1]).all()
        assert (grouped[:, 0].sum(axis=0) == 14).all()


def test_strata_of_a_few_clusters_are_one_so_that_none_is_drawn_the_same_every_time():
    y = np.repeat(np.arange(5), 4)
    clusters = np.repeat(np.arange(10), 2)  # two clusters of each class
    assert len(np.unique(units_for(clusters, y).strata)) == 1
    assert len(np.unique(units_for(np.arange(20), y).strata)) == 5
    labels = np.zeros((40, 3), dtype=np.float32)
    labels[:3] = np.eye(3)
    labels[30:, 0] = 1
    strata = units_for(np.arange(40), labels).strata
    assert sorted(np.unique(strata, return_counts=True)[1]) == [2, 11, 27]  # 1,0,0 with the 10; two patterns of one


def test_the_same_seed_draws_the_same_and_another_another():
    units = units_for(np.arange(100), np.zeros(100, dtype=int))
    first, again, other = (np.concatenate(list(BootstrapWeights(units, 60, seed)), axis=1) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    draws = BootstrapWeights(units, 60)
    assert all((a == b).all() for a, b in zip(list(draws), list(draws), strict=True))


def test_each_row_is_drawn_once_on_average_with_the_variance_of_a_multinomial():
    weights = np.concatenate(list(BootstrapWeights(units_for(np.arange(50), np.zeros(50, dtype=int)), 20_000)), axis=1)
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.05)
    np.testing.assert_allclose(weights.var(axis=1), 1 - 1 / 50, atol=0.06)


def one_part(one, clusters=None, heads=1):
    clusters = np.arange(len(one.z)) if clusters is None else clusters
    return EvaluationSet("k", clusters, (one,) * heads, 100.0)


def estimates(one, clusters=None, resamples=400, heads=1):
    names = [f"c{c}" for c in range(one.z.shape[1])]
    return FamilyEstimates([one_part(one, clusters, heads)], names, SharedResamples(resamples))


def test_proportions_are_wilsons_and_everything_else_a_bootstrap():
    found = estimates(said("binary")).all()
    one = said("binary")
    called, truth = one.called == 1, one.y == 1
    assert (found["sensitivity"].low, found["sensitivity"].high) == pytest.approx(
        significance.wilson(int((called & truth).sum()), int(truth.sum()))
    )
    assert (found["ppv"].low, found["ppv"].high) == pytest.approx(
        significance.wilson(int((called & truth).sum()), int(called.sum()))
    )
    assert {m: e.method for m, e in found.items()} == {
        **dict.fromkeys(("sensitivity", "specificity", "ppv", "npv", "accuracy"), "Wilson"),
        **dict.fromkeys(("auroc", "ap", "f1", "nll", "brier"), "bootstrap"),
        "ece": "bootstrap, centred",
    }
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_the_bootstrap_is_the_one_written_out():
    one = said("binary")
    found = estimates(one, resamples=100)
    rows = [
        np.repeat(np.arange(160), w.astype(int))
        for block in BootstrapWeights(one_part(one).units, 100)
        for w in block.T
    ]  # fmt: skip
    areas = [sk.roc_auc_score(one.y[r], one.z[r, 1] - one.z[r, 0]) for r in rows]
    assert (found.estimate("auroc").low, found.estimate("auroc").high) == pytest.approx(
        tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-6
    )


def test_at_0_or_100_percent_wilson_counts_clusters_not_images():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    z = np.stack([np.where(y == 0, 2.0, -2.0), np.zeros(80)], axis=1) + 0.01 * rng.normal(size=(80, 2))
    perfect, clusters = CalibratedPredictions("binary", z, y, 1, (0.5,)), np.repeat(np.arange(20), 4)
    alone, grouped = (estimates(perfect, c).estimate("sensitivity") for c in (None, clusters))
    assert (alone.value, grouped.value) == (1.0, 1.0)
    assert alone.low == pytest.approx(significance.wilson(40, 40)[0])
    assert grouped.low == pytest.approx(significance.wilson(10, 10)[0])  # ten clusters hold positives
    assert "10 clusters" in grouped.method


def test_clusters_make_proportions_a_cluster_bootstrap_and_wider():
    rng = np.random.default_rng(0)
    of_group = rng.normal(size=30)
    y = np.tile([0, 1], 150)
    z = np.stack([np.zeros(300), 1.2 * y - 0.6 + 1.5 * np.repeat(of_group, 10)], axis=1)
    one, clusters = CalibratedPredictions("binary", z, y, 1, (0.5,)), np.repeat(np.arange(30), 10)
    alone, grouped = (estimates(one, c).estimate("sensitivity") for c in (None, clusters))
    assert grouped.method == "cluster bootstrap"
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_several_seeds_are_averaged_within_each_resample():
    """What is hard for all of them stays: three equal heads have the interval of one; 3 of different errors less."""
    one = said("binary")
    alone, thrice = (estimates(one, heads=k).estimate("auroc") for k in (1, 3))
    assert (alone.low, alone.high) == pytest.approx((thrice.low, thrice.high))
    other = [
        CalibratedPredictions(one.kind, one.z + np.random.default_rng(s).normal(size=one.z.shape), one.y, 1, (0.4,))
        for s in (1, 2)
    ]
    mean = FamilyEstimates([EvaluationSet("k", np.arange(160), (one, *other))], ["a", "b"], SharedResamples(300))
    areas = [sk.roc_auc_score(s.y, s.z[:, 1] - s.z[:, 0]) for s in (one, *other)]
    assert mean.value("auroc") == pytest.approx(np.mean(areas))
    assert mean.estimate("accuracy").method == "bootstrap"


def test_a_measure_that_most_resamples_lack_has_no_interval_and_says_so():
    values = np.array([0.5] * 40 + [np.nan] * 60)
    none = bootstrap(0.5, values, "bootstrap")
    assert np.isnan([none.low, none.high]).all()
    assert none.method == "undefined in 60 of 100 resamples"
    assert none.record() == {"value": 0.5, "low": None, "high": None, "method": none.method}
    assert bootstrap(0.5, values[:50], "bootstrap").method == "bootstrap, undefined in 10 of 50"
    assert bootstrap(0.5, values[:42], "bootstrap").method == "bootstrap"


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
        one = said("binary", seed=fold)
        parts.append(
            EvaluationSet(
                str(fold),
                np.arange(160),
                (CalibratedPredictions("binary", one.z + np.array([0, shift]), one.y, 1, (0.5,)),),
                160.0,
            )
        )
    found = FamilyEstimates(parts, ["a", "b"], SharedResamples(100))
    areas = np.array([sk.roc_auc_score(p.y, p.said[0].z[:, 1] - p.said[0].z[:, 0]) for p in parts])
    estimate = found.estimate("auroc")
    assert estimate.value == pytest.approx(areas.mean())
    low, high, _ = significance.corrected_t(areas, 1.0)
    assert (estimate.low, estimate.high) == pytest.approx((max(low, 0), min(high, 1)))
    assert "2 sets of test images" in estimate.method


def test_ppv_and_npv_at_a_prevalence_by_bayes():
    """Altman & Bland (1994): 0.90 sensitive, 0.75 specific at a prevalence of 0.25 would give 0.5455 and 0.9574."""
    from heads.metrics.classification import predictive_values

    assert predictive_values(0.9, 0.75, 0.25) == pytest.approx((0.9 * 0.25 / 0.4125, 0.75 * 0.75 / 0.5875))
    one = said("binary")
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
    return CalibratedPredictions(
        "binary", np.stack([np.zeros(n), 1.2 * x - 0.72 + np.log(3 / 7)], axis=1), y, 1, (0.5,)
    ), np.arange(n)


def correlated(rng, groups=60):
    """Patients of six images that share their difficulty."""
    y = np.repeat(rng.permutation(np.repeat([0, 1], [groups * 6 // 10, groups * 4 // 10])), 6)
    x = np.repeat(rng.normal(size=groups), 6) + 0.7 * rng.normal(size=6 * groups) + 1.2 * y
    one = CalibratedPredictions("binary", np.stack([np.zeros(6 * groups), x - 0.6], axis=1), y, 1, (0.5,))
    return one, np.repeat(np.arange(groups), 6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [independent, correlated])
def test_intervals_hold_the_truth_as_often_as_they_say(make):
    """120 data sets each: 95 % within what 120 can show (three standard errors: 0.89)."""
    large, _ = make(np.random.default_rng(0), 200_000 if make is independent else 60_000)
    truth = evaluated(large, np.arange(len(large.z)))
    found = coverage(make, {name: truth[name] for name in ("auroc", "nll", "brier", "accuracy", "sensitivity")})
    assert all(0.88 <= share <= 1 for share in found.values()), found
    assert min(found["auroc"], found["nll"]) < 1


@pytest.mark.slow
def test_images_of_one_patient_taken_for_independent_would_promise_too_much():
    large, _ = correlated(np.random.default_rng(0), 60_000)
    truth = {"auroc": evaluated(large, np.arange(len(large.z)))["auroc"]}

    def torn(rng):
        one, _ = correlated(rng)
        return one, np.arange(len(one.z))

    assert coverage(torn, truth)["auroc"] < 0.8 < coverage(correlated, truth)["auroc"]
