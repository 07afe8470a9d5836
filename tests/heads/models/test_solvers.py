"""The solved heads against scikit-learn, and against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from heads.models import solvers
from heads.models.catalogue import HEADS, load_head, make_head
from heads.models.solvers import LOW, SOLVERS, path_logits
from heads.models.vector import FLOOR, KNearest


def toy(n=120, width=9, classes=3, seed=0):
    """float32 [n, width] (neither centred nor scaled), int64 [n]."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(classes, width))[y] + rng.normal(size=(n, width)) * np.linspace(0.3, 2, width) + 1.5
    return torch.from_numpy(x.astype(np.float32)), y


def signs(n=150, width=6, labels=3, seed=0, unknown=0.3):
    """Multi-label: float32 [n, width], float32 [n, labels] with NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    y = (x[:, :labels] + 0.7 * rng.normal(size=(n, labels)) > 0.4).astype(np.float32)
    y[rng.random(y.shape) < unknown] = np.nan
    return torch.from_numpy(x), y


def solve(name, x, y, kind="multiclass", classes=None, note=print):
    return SOLVERS[name](x, y, kind, classes or (y.max() + 1 if y.ndim == 1 else y.shape[1]), note)


def weights(model):
    return model.ln.weight.detach().numpy(), model.ln.bias.detach().numpy()


def logits(model, x):
    with torch.no_grad():
        return model(x).double().numpy()


def alpha(setting, x):
    """scikit-learn's penalty: in units of the mean eigenvalue of XᵀX of the centred rows."""
    return setting["lambda"] * len(x) * x.double().numpy().var(0).mean()


SHAPES = [(120, 9), (14, 40), (10, 10), (50, 1), (5, 2), (2, 3)]


@pytest.mark.parametrize(("n", "width", "exact", "rtol"), [*((*s, None, 1e-4) for s in SHAPES), (120, 9, 0, 1e-3)])
def test_ridge_is_scikit_learns_ridge_classifier_at_every_penalty(n, width, exact, rtol, monkeypatch):
    """Of many images (more than ``EXACT``) the sums are in float32."""
    monkeypatch.setattr(solvers, "ROWS", 50)
    monkeypatch.setattr(solvers, "EXACT", solvers.EXACT if exact is None else exact)
    x, y = toy(n, width, 3 if n > 2 else 2)
    for setting, model in solve("ridge", x, y):
        theirs = RidgeClassifier(alpha=alpha(setting, x), solver="svd").fit(x.numpy().astype(np.float64), y)
        w, b = weights(model)
        if n == 2:
            np.testing.assert_allclose(w[0], -w[1], rtol=1e-5)
            w, b = w[1:], b[1:]
        np.testing.assert_allclose(w, np.atleast_2d(theirs.coef_), rtol=rtol, atol=1e-5 if exact == 0 else 1e-6)
        np.testing.assert_allclose(b, theirs.intercept_, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(("n", "width"), [(90, 4), (12, 40)])
def test_ridge_of_more_classes_than_the_smaller_side_of_the_features(n, width):
    x, y = toy(n, width, 45)  # 45·45 columns, 64·4 of room
    setting, model = solve("ridge", x, y, classes=45)[30]
    plain = RidgeClassifier(alpha=alpha(setting, x)).fit(x.double().numpy(), y)
    np.testing.assert_allclose(weights(model)[0][plain.classes_], plain.coef_, rtol=1e-3, atol=1e-5)


def test_ridge_of_channels_that_are_copies_of_each_other_is_finite(monkeypatch):
    monkeypatch.setattr(solvers, "EXACT", 0)
    x, y = toy(400)
    x = torch.cat([x, 1000 * x, 1000 * x, 1000 * x], 1)
    assert all(np.isfinite(logits(model, x)).all() for _, model in solve("ridge", x, y))


def test_ridge_of_features_that_do_not_vary_is_the_prevalence():
    _, model = solve("ridge", torch.full((10, 4), 7.0), np.arange(10) % 5)[0]
    np.testing.assert_allclose(logits(model, torch.full((1, 4), 7.0)), np.full((1, 5), -0.6), atol=1e-5)


def test_logreg_is_scikit_learns_cold_at_every_c_though_it_starts_from_the_one_before():
    x, y = toy(300)
    values = x.double().numpy()
    for setting, model in solve("logreg", x, y):
        cold = LogisticRegression(C=setting["C"], max_iter=1000).fit(values, y)
        least = penalised(cold.coef_, cold.intercept_, values, y, setting["C"])
        assert penalised(*weights(model), values, y, setting["C"]) <= 1.005 * least
        if setting["C"] < 1:  # a weaker penalty leaves room for several answers within the tolerance
            np.testing.assert_allclose(softmax(logits(model, x)), cold.predict_proba(values), atol=2e-3)


def softmax(z):
    return np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))


def penalised(w, b, x, y, c):
    """scikit-learn's objective over N: the mean loss and |w|² / (2 C N)."""
    loss = -np.log(softmax(x @ w.T + b)[np.arange(len(y)), y]).mean()
    return loss + (w.astype(np.float64) ** 2).sum() / (2 * c * len(y))


def test_logreg_of_two_classes_gives_scikit_learns_log_odds():
    x, y = toy(300, classes=2)
    for setting, model in solve("logreg", x, y, "binary")[:6:2]:
        cold = LogisticRegression(C=setting["C"], tol=1e-8).fit(x.numpy().astype(np.float64), y)
        z = logits(model, x)
        np.testing.assert_allclose(z[:, 1] - z[:, 0], cold.decision_function(x.numpy()), atol=5e-3)


def test_logreg_says_where_it_has_not_converged(monkeypatch):
    monkeypatch.setattr(solvers, "STEPS", 3)
    said = []
    path = solve("logreg", *toy(), note=said.append)
    assert len(path) == 10 and len(said) == 1
    assert said[0].startswith("logreg has not converged in 3 steps at C = ")
    monkeypatch.setattr(solvers, "STEPS", 1000)
    solve("logreg", *toy(), note=said.append)
    assert len(said) == 1


def test_knn_is_scikit_learns_by_cosine_with_the_votes_of_wu_et_al(monkeypatch):
    monkeypatch.setattr("heads.models.vector.ROWS", 32)  # several blocks
    monkeypatch.setattr("heads.models.vector.QUERIES", 50)
    x, y = toy(230)
    query, _ = toy(70, seed=5)
    for setting, model in solve("knn", x, y):
        k, t = int(setting["k"]), setting["temperature"]
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d, t=t: np.exp(-d / t), algorithm="brute")
        want = theirs.fit(x.double().numpy(), y).predict_proba(query.double().numpy())
        np.testing.assert_allclose(logits(model, query), np.log(np.maximum(want, FLOOR)), atol=2e-3)


def knn(x, y, k, temperature, kind="multiclass", classes=None):
    """With one k and one temperature."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "NEIGHBOURS", (k,))
        patch.setattr(solvers, "TEMPERATURES", (temperature,))
        ((_, model),) = solve("knn", x, y, kind, classes)
    return model


def test_knn_takes_no_more_neighbours_than_train_has():
    assert {setting["k"] for setting, _ in solve("knn", *toy(12))} == {1, 5, 10}
    assert [setting for setting, _ in solve("knn", *toy(3))] == [{"k": 1.0, "temperature": 0.07}]


def test_knn_of_a_label_counts_the_nearest_whose_label_is_known():
    x, y = signs()
    query = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    model = knn(x, y, 7, 0.1, "multilabel")
    for label in range(3):
        rows = ~np.isnan(y[:, label])
        theirs = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp(-d / 0.1), algorithm="brute")
        theirs.fit(x.numpy()[rows], y[rows, label])
        p = np.clip(theirs.predict_proba(query.numpy())[:, 1], FLOOR, 1 - FLOOR)
        np.testing.assert_allclose(1 / (1 + np.exp(-logits(model, query)[:, label])), p, atol=1e-3)


def test_knn_with_fewer_known_labels_than_k_counts_those():
    x, y = torch.eye(4), np.array([[1, np.nan], [np.nan, 0], [np.nan, np.nan], [0, np.nan]], np.float32)
    z = logits(knn(x, y, 3, 1e9, "multilabel"), torch.ones(1, 4))
    np.testing.assert_allclose(z, [[0.0, math.log(FLOOR)]], atol=1e-4)


def test_centroid_calls_what_scikit_learns_nearest_centroid_calls():
    x, y = toy(400, 5, 4)
    ((setting, model),) = solve("centroid", x, y)
    query, _ = toy(300, 5, 4, seed=3)
    theirs = NearestCentroid().fit(x.double().numpy(), y)
    assert setting == {} and (logits(model, query).argmax(1) == theirs.predict(query.double().numpy())).all()


def test_centroid_by_hand():
    """Means 0 and 4, variance 1 within, D = 1: at 1 the distances are 1 and 9, so the log-odds are (1 - 9) / 2."""
    ((_, model),) = solve("centroid", torch.tensor([[-1.0], [1.0], [3.0], [5.0]]), np.array([0, 0, 1, 1]), "binary")
    z = logits(model, torch.tensor([[1.0]]))
    assert z[0, 1] - z[0, 0] == pytest.approx(-4)


def test_centroid_of_one_image_a_class_and_of_features_that_do_not_vary_is_finite():
    for x in (torch.eye(3), torch.ones(3, 3)):
        ((_, model),) = solve("centroid", x, np.array([0, 1, 2]))
        assert np.isfinite(logits(model, x)).all()


@pytest.mark.parametrize("name", ["ridge", "logreg", "centroid"])
def test_a_label_is_solved_on_the_rows_where_it_is_known(name):
    x, y = signs()
    together = solve(name, x, y, "multilabel")
    for label in range(3):
        rows = ~np.isnan(y[:, label])
        alone = solve(name, x[torch.from_numpy(rows)], y[rows, label].astype(np.int64), "binary")
        for (_, model), (_, single) in list(zip(together, alone, strict=True))[::4]:
            z = logits(single, x)
            want = z[:, 1] - (0 if name == "ridge" else z[:, 0])
            np.testing.assert_allclose(logits(model, x)[:, label], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_class_that_train_has_not_is_never_called(name):
    x, y = toy(60)
    y = np.where(y == 2, 4, y)  # of five classes 2 and 3 are missing
    for _, model in solve(name, x, y, classes=5):
        z = logits(model, x)
        assert (z[:, [2, 3]] == z[0, 2]).all() and not np.isin(z.argmax(1), [2, 3]).any()
        assert z[0, 2] == (pytest.approx(math.log(FLOOR)) if name == "knn" else LOW)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_label_of_which_train_knows_one_side_or_nothing_is_constant(name):
    x, y = signs(unknown=0)
    y = np.concatenate([y, np.zeros((150, 1)), np.ones((150, 1)), np.full((150, 1), np.nan)], 1).astype(np.float32)
    for _, model in solve(name, x, y, "multilabel"):
        z = logits(model, x)
        assert (z[:, 3:] == z[0, 3:]).all() and (z[:, 3] < -13).all() and (z[:, 4] > 13).all() and (z[:, 5] < -13).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_one_class_alone_is_no_crash(name):
    for _, model in solve(name, toy(20)[0], np.ones(20, np.int64), classes=3):
        assert (logits(model, torch.randn(4, 9)).argmax(1) == 1).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_logits_of_a_path_are_those_of_its_heads_which_come_back_from_their_state_dicts(name, kind):
    x, y = toy(60) if kind == "multiclass" else signs(60)
    path = solve(name, x, y, kind, 3)
    together = path_logits(path, x.split(25))
    assert together.shape == (len(path), 60, 3) and together.dtype == np.float64
    for z, (_, model) in zip(together, path, strict=True):
        np.testing.assert_allclose(z, logits(model, x), rtol=1e-4, atol=1e-4)
    again = load_head(name, (x.shape[1],), 3, {key: value.clone() for key, value in model.state_dict().items()})
    assert np.array_equal(logits(again, x), logits(model, x))
    assert HEADS[name].solved


@pytest.mark.parametrize("name", SOLVERS)
def test_solving_draws_nothing_from_torch_and_is_the_same_again(name):
    before = torch.get_rng_state()
    first, second = solve(name, *toy(60)), solve(name, *toy(60))
    assert torch.equal(before, torch.get_rng_state())
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": torch.tensor(99)}, "k is not between 1 and the 6"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1, 7])}, "labels are not those of 3 classes"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "are not those of"),
        ({"vectors": torch.zeros(6, 4)}, "are not those of"),
        ({"temperature": torch.tensor(0.0)}, "temperature"),
        ({"k": None}, "needs vectors"),
    ],
)
def test_a_damaged_knn_is_refused(change, said):
    state = KNearest.of(torch.eye(6), torch.tensor([0, 1, 2, 0, 1, 2]), 3, k=2, temperature=0.1).state_dict()
    state = {key: value for key, value in ({**state, **change}).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        load_head("knn", (6,), 3, state)


def test_knn_of_no_rows_gives_no_logits():
    assert make_head("knn", (6,), 3)(torch.zeros(0, 6)).shape == (0, 3)
