"""Classification measures against scikit-learn and written out on rows, with weights of one and as copies of rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.metrics.calibration import CalibratedPredictions, log_odds
from heads.metrics.classification import WeightedMeasures, evaluate, mean_auroc

KINDS = ["binary", "multiclass", "ordinal", "many", "multilabel"]


def predictions(kind, ties=False, lacking=False):
    """``lacking``: a class that no row is, a label that no row has."""
    rng, n = np.random.default_rng(0), 160
    count = {"binary": 2, "multiclass": 4, "ordinal": 5, "many": 21, "multilabel": 3}[kind]
    y = rng.integers(0, count - lacking, n)
    z = rng.normal(size=(n, count)) + 1.5 * np.eye(count)[y]
    if ties:
        z = z.round()
    if kind == "multilabel":
        labels = (rng.random((n, count)) < 0.3).astype(np.float32)
        labels[rng.random(labels.shape) < 0.2] = np.nan
        labels[:, 2] *= not lacking
        return CalibratedPredictions(kind, z, labels, None, (0.5, 0.4, 0.6))
    if kind == "binary":
        return CalibratedPredictions(kind, z, y, 1, (0.4,))
    return CalibratedPredictions("multiclass" if kind == "many" else kind, z, y)


def evaluated(one):
    return evaluate(one, [f"c{c}" for c in range(one.z.shape[1])])


def share(part, whole):
    return part / whole if whole else np.nan


def mean(values):
    defined = [v for v in values if not np.isnan(v)]
    return np.mean(defined) if defined else np.nan


def rates(truth, predicted, score):
    """Of one class against all others, by counting."""
    found, cleared = (predicted & truth).sum(), (~predicted & ~truth).sum()
    return {
        "sensitivity": share(found, truth.sum()),
        "specificity": share(cleared, (~truth).sum()),
        "ppv": share(found, predicted.sum()),
        "npv": share(cleared, (~predicted).sum()),
        "f1": share(2 * found, truth.sum() + predicted.sum()),
        "accuracy": (predicted == truth).mean(),
        "auroc": sk.roc_auc_score(truth, score) if 0 < truth.sum() < len(truth) else np.nan,
        "ap": sk.average_precision_score(truth, score) if truth.any() else np.nan,
    }


def error(p, truth):
    """ECE: rows by rising probability in bins of equal mass, at most 15, equal probabilities in one bin."""
    rank = np.array([(p < x).sum() + ((p == x).sum() - 1) / 2 + 0.5 for x in p])
    count = min(15, max(2, round(len(p) ** (1 / 3))))
    bins = np.minimum((rank * count / len(p)).astype(int), count - 1)
    return sum(abs((p - truth)[bins == b].sum()) for b in range(count)) / len(p)


def written_out(one):
    """(measures, per class) of rows, each by scikit-learn or a definition of its own."""
    z, y, classes = one.z, one.y, range(one.z.shape[1])
    score = log_odds(one.kind, z)
    if one.kind == "multilabel":
        p, known = one.p, ~np.isnan(y)
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-z)))
        columns = [(y[k, c] == 1, p[k, c], score[k, c]) for c, k in enumerate(known.T)]
        table = [rates(t, p >= cut, s) for (t, p, s), cut in zip(columns, one.thresholds, strict=True)]
        found = {m: mean([row[m] for row in table]) for m in table[0]}
        found |= {"nll": sk.log_loss(y[known], p[known], labels=[0, 1]), "brier": ((p - y)[known] ** 2).mean()}
        return found | {"ece": mean([error(p, t) for t, p, _ in columns])}, table
    p = one.p  # not computed again: another rounding would break ties
    np.testing.assert_allclose(p, np.exp(z) / np.exp(z).sum(1, keepdims=True))
    predicted = (p[:, 1] >= one.thresholds[0]).astype(int) if one.kind == "binary" else p.argmax(1)
    table = [rates(y == c, predicted == c, score[:, c]) for c in classes]
    loss = sk.log_loss(y, p, labels=list(classes))
    if one.kind == "binary":
        found = table[1] | {"nll": loss, "brier": ((p[:, 1] - y) ** 2).mean(), "ece": error(p[:, 1], y)}
    else:
        found = {name: mean([row[name] for row in table]) for name in ("auroc", "ap")} | {"nll": loss}
        found["balanced_accuracy"] = mean([row["sensitivity"] for row in table])
        found |= {"accuracy": (predicted == y).mean(), "macro_f1": mean([row["f1"] for row in table])}
        found |= {"brier": ((p - np.eye(len(classes))[y]) ** 2).sum(1).mean(), "ece": error(p.max(1), predicted == y)}
    if len(classes) >= 20:
        found["top5"] = sk.top_k_accuracy_score(y, p, k=5, labels=list(classes))
    present = sorted({*y.tolist(), *predicted.tolist()})
    if set(y.tolist()) == set(present):  # of a class that is predicted and is not there recall is undefined, not 0
        macro = sk.precision_recall_fscore_support(y, predicted, average="macro", labels=present, zero_division=0)
        found |= dict(zip(("macro_precision", "macro_recall", "macro_f1"), macro[:3], strict=True))
    if one.kind == "ordinal":
        found["quadratic_kappa"] = sk.cohen_kappa_score(y, predicted, weights="quadratic")
        found["mae"] = np.abs(predicted - y).mean()
    for row in table:
        row |= {"recall": row.pop("sensitivity"), "precision": row.pop("ppv")}
        row["precision"] = 0.0 if np.isnan(row["precision"]) and row["recall"] == 0 else row["precision"]
    return found, table


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_is_the_one_written_out_and_top5_appears_from_20_classes_on(kind, ties, lacking):
    one = predictions(kind, ties=ties and kind != "many", lacking=lacking and kind != "binary")
    want, table = written_out(one)
    got = evaluated(one)
    mine = {name: value for name, value in got.items() if isinstance(value, float)}
    mine = mine if "macro_recall" in want else {name: value for name, value in mine.items() if name in want}
    assert mine == pytest.approx(want, rel=1e-12, nan_ok=True)
    for mine, row in zip(got["per_class"].values(), table, strict=True):
        numbers = {name: value for name, value in mine.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: row[name] for name in numbers}, rel=1e-12, nan_ok=True)
    assert mean_auroc(one) == pytest.approx(want["auroc"], rel=1e-12)


def test_counts_and_the_confusion_matrix_are_those_of_the_rows():
    one, labels = predictions("multiclass"), predictions("multilabel")
    got = evaluated(one)
    assert got["confusion"] == sk.confusion_matrix(one.y, one.z.argmax(1)).tolist()
    assert [row["n"] for row in got["per_class"].values()] == np.bincount(one.y).tolist()
    first, known = evaluated(labels)["per_class"]["c0"], ~np.isnan(labels.y[:, 0])
    assert (first["n_known"], first["n_positive"]) == (known.sum(), np.nansum(labels.y[:, 0]))
    assert first["confusion"] == sk.confusion_matrix(labels.y[known, 0], labels.predicted_labels[known, 0]).tolist()


@pytest.mark.parametrize(("ties", "lacking"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_as_good_as_that_many_copies_of_the_row(kind, ties, lacking):
    one, rng = predictions(kind, ties and kind != "many", lacking and kind != "binary"), np.random.default_rng(1)
    weights = np.stack([np.ones(160), rng.integers(0, 4, 160), rng.integers(1, 3, 160)], axis=1)
    overall, of_class = WeightedMeasures(one)(weights.astype(np.float32))
    for column in range(3):
        rows = np.repeat(np.arange(160), weights[:, column].astype(int))
        want, table = written_out(replace(one, z=one.z[rows], y=one.y[rows]))
        macro = {"macro_precision", "macro_recall"}  # written out only where every class is there
        assert set(overall) - macro == set(want) - macro
        for name in set(want) - {"ece"}:  # its bins stay those of the whole sample
            assert overall[name][column] == pytest.approx(want[name], abs=1e-6, nan_ok=True), name
        for name, values in of_class.items():
            np.testing.assert_allclose(values[:, column], [row[name] for row in table], atol=1e-6)
    assert overall["ece"][0] == pytest.approx(written_out(one)[0]["ece"], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
def test_rankings_equal_scikit_learn_with_any_ties_and_weights(rows):
    score, truth, weight = (np.array(column) for column in zip(*rows, strict=True))
    z = np.stack([np.zeros(len(rows)), score.astype(float)], axis=1)
    measures = WeightedMeasures(CalibratedPredictions("binary", z, truth.astype(int), 1, (0.5,)))
    ones, weighted = np.ones(len(rows)), measures(np.float32(weight)[:, None])
    for (overall, _), weights in ((measures.value, ones), (weighted, weight)):
        both = weights[truth].sum() and weights[~truth].sum()
        areas = sk.roc_auc_score(truth, score, sample_weight=weights) if both else np.nan
        assert overall["auroc"][0] == pytest.approx(areas, abs=1e-6, nan_ok=True)
        if weights[truth].sum():
            want = sk.average_precision_score(truth, score, sample_weight=weights)
            assert overall["ap"][0] == pytest.approx(want, abs=1e-6)
        else:
            assert np.isnan(overall["ap"][0])


def test_a_class_missing_in_a_resample_makes_its_mean_undefined_there():
    """Never the mean over the classes that happen to be left: that would be another measure."""
    one = predictions("multiclass")
    weights = np.stack([np.ones(160), one.y != 2], axis=1).astype(np.float32)
    overall, of_class = WeightedMeasures(one)(weights)
    assert np.isfinite(overall["auroc"][0])
    for name in ("auroc", "ap", "balanced_accuracy"):
        assert np.isnan(overall[name][1]), name
    assert np.isnan(of_class["recall"][2, 1])
    assert np.isfinite(overall["accuracy"]).all()
