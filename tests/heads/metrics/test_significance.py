"""Tests and intervals that need no resampling, against scipy, statsmodels, published tables and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import stats

from heads.metrics import significance


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published_and_as_scipy_has_it(hits, n, low, high):
    """Newcombe (1998), table I, method 3; and scipy's."""
    assert significance.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert significance.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert significance.wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_parts_of_a_hit_lies_between_whole_ones_and_of_nothing_is_undefined():
    low, high = significance.wilson(2.5, 10)
    assert significance.wilson(2, 10)[0] < low < significance.wilson(3, 10)[0] < significance.wilson(2, 10)[1] < high
    assert np.isnan(significance.wilson(0, 0)).all()


def test_mcnemar_of_agrestis_approval_ratings():
    """Agresti (1990): 150 approved the first time only, 86 the second time only."""
    from statsmodels.stats.contingency_tables import mcnemar

    first = np.repeat([True, True, False, False], [794, 150, 86, 570])
    second = np.repeat([True, False, True, False], [794, 150, 86, 570])
    assert significance.mcnemar(first, second) == pytest.approx(mcnemar([[794, 150], [86, 570]], exact=True).pvalue)
    assert significance.mcnemar(first, first) == 1.0


def delong_by_pairs(first, second, truth):
    """DeLong, DeLong & Clarke-Pearson (1988): a kernel over all pairs, its means over rows and over columns, and their
    covariances."""
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


def test_delong_is_the_definition_of_its_paper_with_ties_too():
    rng = np.random.default_rng(0)
    truth = rng.random(50) < 0.4
    first, second = (rng.normal(size=50) + truth, rng.integers(0, 6, 50) + 2 * truth)
    found = significance.delong(first, second, truth)
    assert found == pytest.approx(delong_by_pairs(first, second, truth))
    assert found[0] == pytest.approx(sk.roc_auc_score(truth, first) - sk.roc_auc_score(truth, second))
    assert significance.delong(first, 2 * first, truth)[2] == 1.0


@pytest.mark.integration
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
