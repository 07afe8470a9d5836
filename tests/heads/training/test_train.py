"""Training by the protocol: against plain torch and scikit-learn, choice, seeds, and what cannot be trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_view import label_view, toy_view
from support.runs import train_head
from torch import nn

from featurecache.errors import BadOption, NotInCache, ProtocolError, Stopped
from featurecache.store import write_view
from heads import api
from heads.models.catalogue import HEADS
from heads.settings import Settings
from heads.task import Standardize, task_of
from heads.training import engine
from heads.training.batches import BinaryCrossEntropy, loss_and_prior
from heads.training.job import choose_output


def test_the_best_epoch_on_val_is_kept_and_test_is_read_after_the_choice(monkeypatch):
    view = toy_view(n=200, splits="given", noise=3)
    happened = view.reads
    step = engine.StackedTrainer.step
    monkeypatch.setattr(engine.StackedTrainer, "step", lambda *a: happened.append("step") or step(*a))
    run = train_head(view, "linear", patience=3, lr=0.3)
    last_step = max(i for i, what in enumerate(happened) if what == "step")
    assert [what for what in happened if what != "step"] == ["train", "val", "test"]
    assert happened.index("test") > last_step
    best = max(run.history, key=lambda row: (row["val_auroc"], -row["val_loss"]))
    assert run.config["chosen"] == {"by": "auroc", "on": "val", "epoch": int(best["epoch"])}
    assert best["epoch"] < len(run.history) and run.metrics["val"]["auroc"] == pytest.approx(best["val_auroc"])
    assert run.history[-1]["val_auroc"] < best["val_auroc"]


@pytest.mark.parametrize("select", ["auroc", "ap", "nll", "ece", "accuracy"])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_epochs_line_and_the_table_have_one_number_for_one_choice(classes, select):
    """The ranking of several classes depends on the temperature, thresholds do, and what a probability is worth."""
    run = train_head(toy_view(n=300, classes=classes, splits="given", noise=4), "linear", lr=0.3, select=select)
    row = run.history[run.config["chosen"]["epoch"] - 1]
    assert run.config["calibration"]["temperature"] != 1
    assert row[f"val_{select}"] == pytest.approx(run.metrics["val"][select], abs=1e-6)


def test_a_head_that_is_stopped_leaves_nothing_and_says_so(monkeypatch):
    def ends(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train_together", ends)
    with pytest.raises(Stopped, match="trained in one go: the same command begins again"):
        train_head(toy_view(n=60, splits="given"), "linear", epochs=2, out="run")
    assert not Path("run").exists()


def test_a_cheap_head_goes_on_until_val_is_no_better():
    """Features as an untrained ViT gives them: a large common part and small differences."""
    view = toy_view(n=400, splits="given", noise=3)
    view.features["cls"] = 1 + 0.05 * view.features["cls"]
    plain = partial(train_head, view, "linear", standardize="none", lr=1e-3, optimizer="adam", schedule="constant")
    default, whole = plain(**HEADS["mlp"].settings), plain(epochs=1500, patience=150)
    short = plain(epochs=50, patience=5)
    assert default.config["notes"] == [] and "limit of 50 epochs" in short.config["notes"][0]
    for split in ("val", "test"):
        assert default.metrics[split]["auroc"] == pytest.approx(whole.metrics[split]["auroc"], abs=0.005)
    assert Settings.from_dict(default.config["settings"]).epochs == 500  # what ran stands in the record


def test_labels_of_test_change_nothing_of_the_head():
    view = toy_view(n=200, splits="given", noise=2)
    first = train_head(view, "linear", epochs=3)
    test = [i for i, s in enumerate(view.splits) if s == "test"]
    view.labels[test] = 1 - view.labels[test]
    second = train_head(view, "linear", epochs=3)
    assert (first.path / "head.safetensors").read_bytes() == (second.path / "head.safetensors").read_bytes()
    assert first.config["calibration"] == second.config["calibration"]
    assert first.metrics["test"]["auroc"] == pytest.approx(1 - second.metrics["test"]["auroc"])


def test_the_same_seeds_give_the_same_bytes_and_others_do_not():
    view = toy_view(n=200, splits="given", noise=2)
    heads = {}
    for name, options in (("a", {}), ("same", {}), ("seed", {"seed": 1}), ("split", {"split_seed": 1})):
        torch.rand(3)  # whatever ran before must not matter
        heads[name] = (train_head(view, "mlp", epochs=2, **options).path / "head.safetensors").read_bytes()
    assert heads["a"] == heads["same"]
    assert len(set(heads.values())) == 3


def test_training_stops_when_val_is_no_better_and_says_so():
    lines = []
    view = toy_view(n=200, splits="given", noise=0.1)
    view.labels = np.random.default_rng(0).permutation(view.labels)
    run = train_head(view, "linear", patience=3, select="loss", lr=0.5, say=lines.append)
    chosen = run.config["chosen"]["epoch"]
    assert len(run.history) == chosen + 3 < 50
    assert [row["wait"] for row in run.history[-4:]] == [0, 1, 2, 3]
    (line,) = (line for line in lines if line.startswith("epochs"))
    assert line.startswith(f"epochs     {chosen + 3} in ") and f"; best {chosen}: train loss " in line


def test_equal_criteria_go_on_by_val_loss():
    """Separable at once: AUROC is 1 from the start, and the loss still falls, so it is not time to stop."""
    run = train_head(toy_view(n=200, splits="given", noise=0.05), "linear", epochs=12, patience=2)
    assert [row["val_auroc"] for row in run.history[-6:]] == [1.0] * 6
    assert run.config["chosen"]["epoch"] == 12


def test_what_is_said_has_the_features_the_splits_and_the_head():
    lines = []
    train_head(toy_view(n=200), "linear", epochs=1, say=lines.append)
    assert lines[0] == "features   vit-toy/toy cls [8]"
    assert lines[1].startswith("splits     train 140 · val 30 · test 30 (70/15/15 drawn")
    words = "head       linear: 18 parameters; balanced batches of 32; Adam 0.03 in the eigenbasis, cosine; zscore by "
    assert lines[2].startswith(words)
    assert lines[3].startswith("epochs     1 in 0.0 s; best 1: train loss ")


@pytest.mark.parametrize(("options", "scaled"), [({}, "; l2;"), ({"standardize": "zscore"}, "; zscore by train;")])
def test_only_what_is_fitted_is_said_to_be_by_train(options, scaled):
    lines = []
    train_head(toy_view(n=200), "knn", **options, say=lines.append)
    assert f"solved{scaled}" in lines[2]


def test_the_newest_view_is_taken_when_none_is_named(monkeypatch):
    monkeypatch.setattr(write_view, "open_view", lambda name: toy_view(n=200) if name is None else None)
    assert train_head(None, "linear", epochs=1).config["view"]["label"] == "vit-toy/toy"


def test_balanced_training_is_corrected_to_the_prevalence():
    view = toy_view(n=1000, splits="given", noise=3)
    positives = np.flatnonzero(view.labels == 1)
    view.labels[positives[np.random.default_rng(0).permutation(len(positives))[:450]]] = 0
    view.features["cls"][torch.from_numpy(view.labels == 1)] += 1
    run = train_head(view, "linear", epochs=10, lr=1e-2)
    share = (view.labels[run.splits == "train"] == 1).mean()
    np.testing.assert_allclose(run.config["calibration"]["correction"], np.log([(1 - share) * 2, share * 2]))
    p = np.exp(run.logits(view.features["cls"]))
    assert (p[:, 1] / p.sum(1)).mean() == pytest.approx((view.labels == 1).mean(), abs=0.03)


def test_a_multilabel_head_learns_with_unknown_labels_masked():
    run = train_head(label_view(n=600), "linear", epochs=30, lr=1e-2)
    assert run.task == "multilabel"
    assert run.metrics["test"]["auroc"] > 0.85
    assert run.config["calibration"]["correction"] == [0.0] * 4


def test_masked_loss_is_that_of_the_known_entries():
    logits, y = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    want = nn.functional.binary_cross_entropy_with_logits(torch.tensor([1.0, 0.5, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(BinaryCrossEntropy(2)(logits, y), want)
    nothing = torch.full((2, 2), float("nan"))
    assert float(BinaryCrossEntropy(2)(logits, nothing)) == 0.0


def test_pos_weight_is_negatives_over_positives_and_taken_back_from_the_logits():
    view = label_view(n=400, labels=2, unknown=0.3)
    task = task_of(view)
    loss, correction = loss_and_prior(task, torch.from_numpy(task.labels), Settings("linear", pos_weight=True))
    weight = (view.labels == 0).sum(0) / (view.labels == 1).sum(0)
    np.testing.assert_allclose(correction, -np.log(weight))
    one = loss(torch.zeros(1, 2), torch.ones(1, 2))
    assert float(one) == pytest.approx(weight.mean() * np.log(2), rel=1e-5)


def test_zscore_is_by_train_only_and_kept_with_the_run():
    view = toy_view(n=200, splits="given")
    view.features["cls"][:, 3] = 7.0  # a constant channel is only centred
    run = train_head(view, "linear", epochs=1, standardize="zscore")
    x = view.features["cls"][[s == "train" for s in view.splits]].double()
    np.testing.assert_allclose(run.standardize.mean, x.mean(0), rtol=1e-6)
    want = x.std(0, unbiased=False)
    want[3] = 1.0
    np.testing.assert_allclose(run.standardize.std, want, rtol=1e-6)


def test_standardize_of_tokens_is_per_channel_and_l2_per_token():
    x = torch.randn(20, 4, 6).half()
    scaled = Standardize.fit("zscore", lambda: x.split(7))(x.float())
    torch.testing.assert_close(scaled.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 1), unbiased=False), torch.ones(6))
    torch.testing.assert_close(Standardize("l2")(x.float()).norm(dim=-1), torch.ones(20, 4))


def test_ordinal_and_many_class_tasks_run_and_can_choose_by_their_measures():
    view = toy_view(n=400, classes=4, task="ordinal", splits="given", noise=2)
    run = train_head(view, "linear", epochs=3, select="mae")
    best = min(run.history, key=lambda row: (row["val_mae"], row["val_loss"]))
    assert run.config["chosen"]["epoch"] == int(best["epoch"])


def test_positive_names_the_class_that_the_measures_speak_of():
    view = toy_view(n=200, splits="given", noise=3)
    one, zero = (train_head(view, "linear", epochs=2, positive=p) for p in ("kind 1", "kind 0"))
    assert (one.config["positive"], zero.config["positive"]) == ("kind 1", "kind 0")
    assert one.metrics["test"]["auroc"] == pytest.approx(zero.metrics["test"]["auroc"])
    assert one.metrics["test"]["ap"] != zero.metrics["test"]["ap"]


def test_output_is_the_one_the_head_was_made_for():
    view = toy_view()
    assert (choose_output(view, "linear", None), choose_output(view, "large", None)) == ("cls", "tokens")
    view.features["pooler"] = view.features.pop("cls")
    assert choose_output(view, "linear", None) == "pooler"
    assert choose_output(view, "linear", "tokens") == "tokens"


def test_tokens_that_are_not_stored_say_the_command_that_stores_them():
    view = toy_view()
    del view.features["tokens"]
    with pytest.raises(NotInCache, match="featurecache extract --backbone vit-toy --data toys --outputs tokens"):
        train_head(view, "large")
    del view.features["cls"]
    view.features["mean"] = torch.zeros(240, 8)
    with pytest.raises(NotInCache, match="holds mean and no vector for linear"):
        train_head(view, "linear")


@pytest.mark.parametrize(
    ("head", "options", "said"),
    [
        ("large", {"output": "cls"}, "large takes all tokens"),
        ("linear", {"output": "runs/a"}, "Did you mean --out"),
        ("linear", {"select": "auroch"}, "no measure. Near: auroc"),
        ("linear", {"select": "mae"}, "not measured for a binary task"),
        ("linear", {"pos_weight": True}, "--pos-weight is for multi-label"),
    ],
)
def test_options_that_cannot_work_are_refused(head, options, said):
    with pytest.raises(BadOption, match=said):
        train_head(toy_view(), head, **options)


def test_a_val_without_a_class_says_what_can_be_done():
    view = toy_view(n=200, splits="given")
    view.labels[[s == "val" for s in view.splits]] = 0
    with pytest.raises(ProtocolError, match=r"val AUROC is undefined.*--resplit-val"):
        train_head(view, "linear", epochs=1)
    assert train_head(view, "linear", epochs=1, select="loss").metrics["val"]["auroc"] is None


def test_outputs_that_are_not_finite_end_the_run():
    view = toy_view(n=200, splits="given")
    view.features["cls"] = view.features["cls"].float() * 1e3
    with pytest.raises(ProtocolError, match=r"not finite any more in epoch 1\. A smaller --lr than 1e\+38 helps"):
        train_head(view, "linear", lr=1e38, select="loss", balance=False)
    with pytest.raises(ProtocolError, match=r"than 1e\+38 or --standardize zscore helps"):
        train_head(view, "linear", lr=1e38, select="loss", balance=False, standardize="none")


@pytest.mark.parametrize("head", ["linear", "mlp", "logreg"])
def test_an_image_of_test_far_beyond_train_is_named(head):
    view = toy_view(n=200, splits="given")
    view.features["cls"] = view.features["cls"].float() * 1e-3
    row = view.splits.index("test")
    view.features["cls"][row] = 3e38
    with pytest.raises(ProtocolError, match=rf"not finite for 1 of 40 images of test, such as {view.ids[row]}: "):
        train_head(view, head)
    assert train_head(view, head, standardize="l2").metrics["test"]["auroc"] > 0.5  # as the sentence says


def test_small_heads_train_on_one_thread_and_give_the_others_back(monkeypatch):
    seen, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    for kind in (engine.StackedTrainer, engine.SequentialTrainer):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda *a, step=step: seen.add(torch.get_num_threads()) or step(*a))
    train_head(toy_view(n=200, splits="given"), "linear", epochs=1)
    assert (seen, torch.get_num_threads()) == ({1}, 2)
    seen.clear()
    train_head(toy_view(n=200, splits="given", tokens=100, width=128), "large", epochs=1)
    assert seen == {2}
    torch.set_num_threads(before)
