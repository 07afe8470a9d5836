"""One linear layer: trained by Adam in the eigenbasis of its features, against plain torch in numpy's basis; as good
as its one minimum, which scikit-learn finds; the epochs of which val may choose; what train does not show; what is
refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from support.fake_view import FakeView, toy_view
from support.runs import train_head
from torch import nn

from featurecache.errors import BadOption, ProtocolError
from heads.api import ablate
from heads.task import SplitData, Standardize
from heads.training import loop
from heads.training.batches import PlainBatches
from heads.training.eigenbasis import eigenbasis


def on_train(view):
    return np.array(view.splits) == "train"


def vectors_of(view, head):
    """float32 [N, D] that the head is one linear layer on."""
    if head == "linear":
        return view.features["cls"].float()
    tokens = view.features["tokens"].float()
    return tokens[:, 1:].mean(1) if head == "mean-linear" else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("head", ["linear", "mean-linear", "cls+mean"])
def test_it_is_plain_adam_on_features_in_numpys_eigenbasis(head, decay):
    view = toy_view(n=150, classes=3, noise=0.5, splits="given", tokens=5)
    view.prefix, view.grid = ("cls",), (2, 2)
    run = train_head(
        view, head, epochs=5, patience=5, balance=False, select="loss", seed=4, split_seed=7, lr=0.01,
        standardize="none", schedule="constant", weight_decay=decay,
    )  # fmt: skip
    x, y = vectors_of(view, head)[on_train(view)], torch.from_numpy(view.labels[on_train(view)])
    basis = torch.from_numpy(np.linalg.eigh(x.double().numpy().T @ x.double().numpy())[1]).float()
    torch.manual_seed(4)
    plain = nn.Linear(x.shape[1], 3)
    plain.weight.data = plain.weight.data @ basis
    optimizer = torch.optim.Adam([{"params": [plain.weight], "weight_decay": decay}, {"params": [plain.bias]}], lr=0.01)
    order = PlainBatches(len(y), 32, split_seed=7)
    for _ in range(5):
        for rows in order.epoch():
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x[rows] @ basis), y[rows]).backward()
            optimizer.step()
    assert run.config["chosen"]["epoch"] == 5
    torch.testing.assert_close(run.model.ln.weight.detach(), (plain.weight @ basis.T).detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(run.model.ln.bias.detach(), plain.bias.detach(), atol=1e-4, rtol=0)


def test_in_directions_that_train_does_not_show_the_weight_is_zero():
    """20 images of width 64: the rounding of float32 in the other 44 directions is nothing that Adam may enlarge."""
    view = toy_view(n=40, width=64, splits="given", noise=2.0)
    view.splits = ["train"] * 20 + ["val"] * 10 + ["test"] * 10
    weight = train_head(view, "linear", standardize="none").model.ln.weight.detach().double()
    seen = torch.linalg.svd(view.features["cls"][:20].double(), full_matrices=False)[2]
    outside = weight - weight @ seen.T @ seen
    assert outside.abs().max() < 1e-5 * weight.abs().max()


@pytest.mark.parametrize("standardize", ["zscore", "none"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_features_that_are_not_finite_are_said_as_of_any_head(value, standardize):
    view = toy_view(n=60, splits="given")
    view.features["cls"][0, 3] = value
    with pytest.raises(ProtocolError, match="not finite any more in epoch 1"):
        train_head(view, "linear", standardize=standardize)


def test_features_are_turned_alike_in_memory_and_read_from_shards():
    x, y = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).half(), torch.arange(50) % 2
    scale = Standardize.fit("zscore", lambda: x.float().split(20))
    resident, mapped = SplitData(x, y, scale), SplitData(None, y, scale, read=lambda rows: x[rows])
    basis = eigenbasis(resident)
    assert torch.equal(basis, eigenbasis(mapped)) and torch.allclose(basis.T @ basis, torch.eye(12), atol=1e-6)
    wanted = scale(x) @ basis
    order = list(torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(16))
    for data in (resident, mapped):
        turned = replace(data, scale=replace(scale, basis=basis))
        for rows, (part, labels) in zip(order, turned.batches(order), strict=True):
            torch.testing.assert_close(part, wanted[rows])
            assert torch.equal(labels, y[rows])
        torch.testing.assert_close(torch.cat(list(turned.chunks())), wanted)
        torch.testing.assert_close(turned.map_features(None).x, wanted)


def test_another_head_or_dropout_is_refused(tmp_path):
    view = toy_view(n=60, splits="given")
    for head, more in (("mlp", {}), ("large", {}), ("linear", {"dropout": 0.2})):
        with pytest.raises(BadOption, match=r"one linear layer on whole vectors.* Type --optimizer adam"):
            train_head(view, head, optimizer="adam-eigen", epochs=1, **more)
    train_head(view, "linear", epochs=1, dropout=0.2, optimizer="adam")
    with pytest.raises(BadOption, match="large is no such head"):
        ablate([view], heads="linear,large", optimizer="adam,adam-eigen", epochs=1, out=tmp_path / "sweep")


def converged(view, x=None):
    """Test AUROC of logistic regression on z-scores of x [N, D], equal classes, at scikit-learn's minimum."""
    x = (view.features["cls"] if x is None else x).double().numpy()
    train, test = on_train(view), np.array(view.splits) == "test"
    z = (x - x[train].mean(0)) / x[train].std(0)
    model = LogisticRegression(C=1e9, class_weight="balanced", solver="newton-cholesky", tol=1e-8)
    model.fit(z[train], view.labels[train])
    return roc_auc_score(view.labels[test], model.decision_function(z[test]))


def view_of(x, y, splits=None):
    """Of vectors x [N, D] and truth y [N]."""
    splits = splits or [("train", "train", "train", "val", "test")[i % 5] for i in range(len(y))]
    return FakeView({"cls": torch.from_numpy(x).half()}, y.astype(np.int64), splits, ["no", "yes"])


def dominated(seed, n=3000, width=16):
    """One direction of the features holds two thirds of their variance, and decides nothing."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, width))
    y = 2 * z[:, 1:] @ rng.normal(size=width - 1) / width**0.5 + rng.logistic(size=n) > 0
    z[:, 0] *= (2 * (width - 1)) ** 0.5
    return view_of(0.02 * z @ np.linalg.qr(rng.normal(size=(width, width)))[0] + rng.normal(size=width), y)


def far_apart(seed, n=3000, width=64):
    """Variances along the principal axes from 1 to 1e-4; all axes decide alike. Plain Adam's is 0.02 below."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, width))
    y = 3 * z @ rng.normal(size=width) / width**0.5 + rng.logistic(size=n) > 0
    return view_of((z * np.geomspace(1, 1e-2, width)) @ np.linalg.qr(rng.normal(size=(width, width)))[0], y)


def wide(seed, n=5856, width=768):
    """Independent features, as many as a ViT-B's, which decide little: test AUROC 0.64 to 0.71."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, width))
    y = z @ rng.normal(size=width) / width**0.5 + rng.logistic(size=n) > 0
    return view_of(z, y, rng.choice(["train", "val", "test"], n, p=[0.7, 0.15, 0.15]).tolist())


@pytest.mark.parametrize("data_seed", range(3))
@pytest.mark.parametrize("make", [dominated, far_apart, pytest.param(wide, marks=pytest.mark.slow)])
def test_linear_by_default_is_within_five_thousandths_of_its_converged_self_on_random_features(make, data_seed):
    view = make(data_seed)
    run = train_head(view, "linear")
    assert run.metrics["test"]["auroc"] == pytest.approx(converged(view), abs=0.005)
    assert run.config["notes"] == [] and run.config["standardize"] == "zscore"


@pytest.mark.parametrize("data_seed", range(3))
@pytest.mark.parametrize("head", ["mean-linear", "cls+mean"])
def test_a_linear_layer_on_a_mean_of_tokens_is_within_five_thousandths_of_its_converged_self(head, data_seed):
    view = dominated(data_seed)
    noise = torch.randn(len(view), 5, 16, generator=torch.Generator().manual_seed(data_seed))
    tokens = view.features.pop("cls")[:, None] + (0.02 * noise).half()
    view.features["tokens"], view.prefix, view.grid = tokens, ("cls",), (2, 2)
    run = train_head(view, head)
    mean = tokens[:, 1:].float().mean(1)
    x = torch.cat([tokens[:, 0].float(), mean], 1) if head == "cls+mean" else mean
    assert run.metrics["test"]["auroc"] == pytest.approx(converged(view, x), abs=0.005)
    assert run.config["standardize"] == "zscore"


def random_relu(real_data):
    """PneumoniaMNIST through a random projection and ReLU."""
    with np.load(real_data / "pneumoniamnist.npz") as arrays:
        parts = {s: (arrays[f"{s}_images"], arrays[f"{s}_labels"].ravel()) for s in ("train", "val", "test")}
    pixels = np.concatenate([images.reshape(len(images), -1) / 255 - 0.5 for images, _ in parts.values()])
    random = np.random.default_rng(0).normal(size=(pixels.shape[1], 96)) / 28
    names = [name for name, (images, _) in parts.items() for _ in images]
    return view_of(np.maximum(pixels @ random, 0), np.concatenate([labels for _, labels in parts.values()]), names)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_linear_by_default_is_within_five_thousandths_of_its_converged_self_on_pneumoniamnist(real_data, seed):
    view = random_relu(real_data)
    run = train_head(view, "linear", seed=seed)
    assert run.metrics["test"]["auroc"] == pytest.approx(converged(view), abs=0.005)


@pytest.mark.parametrize(
    ("head", "options", "first"),
    [
        ("linear", {"epochs": 30}, 28), ("linear", {"epochs": 30, "schedule": "linear"}, 28),
        ("linear", {"epochs": 5}, 5), ("linear", {"patience": 20}, 1), ("linear", {"schedule": "constant"}, 1),
        ("linear", {"optimizer": "adam", "epochs": 30}, 28),
        ("mlp", {"schedule": "cosine", "patience": 0}, 1),
    ],
)  # fmt: skip
def test_a_convex_head_whose_rate_falls_is_chosen_of_its_last_tenth(head, options, first, monkeypatch):
    """Val scores that fall with every epoch: the first that may be chosen is."""
    scores = iter(range(1000, 0, -1))
    monkeypatch.setattr(loop, "selection_score", lambda *_: next(scores))
    said = []
    run = train_head(toy_view(n=60, splits="given"), head, say=said.append, **{"epochs": 20, "patience": 0} | options)
    assert run.config["chosen"]["epoch"] == first
    words = "the last epoch is taken" if options.get("epochs") == 5 else "on val among the last 3 epochs"
    assert any(line.endswith(words) for line in said) == (first > 1)
