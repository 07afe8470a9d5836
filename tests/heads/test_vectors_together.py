"""``cls+mean``, two vectors side by side as the input of a head: against concatenation by hand and scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from support.command import call
from support.squares import squares

import heads
from featurecache import compute, extract, open_view
from featurecache.errors import BadOption, NotInCache
from heads.evaluation.external import evaluate_run
from heads.reports.provenance import train_command

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """60 images, the tokens of an untrained ViT, and ridge on both vectors that follow from them."""
    folder = tmp_path_factory.mktemp("together")
    images, labels, _ = squares(60, 0)
    parts = {"train": slice(30), "val": slice(30, 45), "test": slice(45, 60)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    np.savez(folder / "set.npz", **arrays, **{f"{name}_labels": labels[part, None] for name, part in parts.items()})
    made = extract(str(folder / "set.npz"), backbone="vit-demo", random_weights=True, outputs="tokens", cache=folder)
    view = open_view(made.view)
    run = heads.train_head(view, "ridge", output="cls+mean", out=folder / "run", controls=False)
    return view, run, images, labels


def test_it_is_concatenation_by_hand_and_scikit_learn(trained):
    view, run, _, labels = trained
    by_hand = np.concatenate([view.array("cls"), view.array("mean")], 1)
    np.testing.assert_array_equal(view.array("cls+mean"), by_hand)
    train, test = (by_hand[view.split(name)].astype(np.float64) for name in ("train", "test"))
    scaled = [(x - train.mean(0)) / train.std(0) for x in (train, test)]
    penalty = len(train) * run.history[run.config["chosen"]["epoch"] - 1]["lambda"]
    theirs = RidgeClassifier(alpha=penalty).fit(scaled[0], labels[view.split("train")])
    np.testing.assert_allclose(run.answers("test").logits[:, 1], theirs.decision_function(scaled[1]), atol=1e-4)
    assert run.config["view"]["shape"] == [2 * 96] and run.output == "cls+mean"


def test_what_is_trained_on_both_predicts_evaluates_explains_and_names_its_command(trained, tmp_path):
    view, run, images, _ = trained
    features, failed = compute(list(images[:3]), like=view, output="cls+mean")
    np.testing.assert_allclose(features.numpy(), view.array("cls+mean", [0, 1, 2]), atol=2e-3)
    records = heads.predict(run, list(images[45:]))
    stored = [{"kind": r["class"], "p": r["probability"]} for r in records]
    p = np.exp(run.answers("test").calibrated_logits)
    p /= p.sum(1, keepdims=True)
    called = [run.classes.index(r["kind"]) for r in stored]
    assert [r["p"] for r in stored] == pytest.approx(p[range(15), called], abs=2e-3) and not failed
    record = evaluate_run(heads.load_run(run.path), view, split="test", resamples=50)
    assert record["output"] == "cls+mean" and record["test"]["auroc"]["value"] == run.metrics["test"]["auroc"]
    assert "--output cls+mean" in train_command(run)
    with pytest.raises(BadOption, match=r"one vector \(cls\+mean\), which has no places"):
        heads.explain(run, [view.ids[0]], out=tmp_path / "maps")
    pytest.importorskip("pytorch_grad_cam")
    maps = heads.explain(run, [view.ids[0]], out=tmp_path / "maps", kinds="grad-cam").records
    assert np.shape(maps[0]["values"]) == tuple(view.info("tokens").grid) and np.max(maps[0]["values"]) > 0


def test_a_sweep_goes_on_and_leaves_out_heads_that_take_tokens(trained, tmp_path):
    view = trained[0]
    words = {"heads": "ridge,linear,large", "outputs": "cls+mean,cls,tokens", "epochs": 1, "controls": False}
    first = heads.ablate(view, **words, out=tmp_path / "sweep")
    again = heads.ablate(view, **words, out=tmp_path / "sweep")
    pairs = {(family.head, family.output) for family in again.families}
    assert pairs == {(head, out) for head in ("ridge", "linear") for out in ("cls+mean", "cls")} | {("large", "tokens")}
    assert again.rows == first.rows  # to the second that each took


def test_extraction_and_export_keep_each_of_them_by_itself(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("extract", "--backbone", "vit-demo", "--random-weights", "--data", trained[0].source["data"])
    record = json.loads(call(*words, "--outputs", "cls+mean", "--json").stdout)
    assert list(record["outputs"]) == ["cls", "mean"]
    record = json.loads(call("export", "set", "set.npz", "--outputs", "cls+mean", "--json").stdout)
    assert record["outputs"] == ["cls", "mean"]
    with pytest.raises(NotInCache, match=r"not pooler\. Store it with: featurecache extract .* --outputs pooler"):
        open_view("set").info("cls+pooler")
    for name, said in (("cls+tokens", "different vectors"), ("cls+cls", "different vectors"), ("cls+mena", "Near: me")):
        result = call("train-head", "--head", "ridge", "--output", name)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert "name one" in call("import", "set.npz", "--name", "x", "--features-key", "cls", "--output", "a+b").stderr
