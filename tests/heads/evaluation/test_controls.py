"""The controls: chance and majority by hand, pixels against scikit-learn, and images that are gone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from support.fake_view import label_view, toy_view

import featurecache.images.decoding
import featurecache.sources
from featurecache.errors import SourceError
from heads.api import ablate, train_head
from heads.evaluation import controls
from heads.evaluation.comparison import compare
from heads.evaluation.families import shown_controls
from heads.reports.text import comparison_table
from heads.settings import Settings
from heads.splits import choose_splits
from heads.task import task_of


class Pictures:
    """A source of grey arrays [4, 4], brighter for label 1."""

    def __init__(self, view, seed=0):
        rng = np.random.default_rng(seed)
        bright = np.nan_to_num(view.labels if view.labels.ndim == 1 else view.labels[:, 0])
        pixels = rng.integers(0, 200, (len(view), 4, 4)) + 30 * (bright[:, None, None] > 0)
        self.arrays = pixels.clip(0, 255).astype(np.uint8)
        self.ids = list(view.ids)
        view.digests = np.array([featurecache.images.decoding.digest(a) for a in self.arrays], dtype="S32")

    def read(self, i):
        return self.arrays[i]


@pytest.fixture
def pictured(monkeypatch):
    def make(view):
        source = Pictures(view)
        monkeypatch.setattr(featurecache.sources, "reopen", lambda given: source)
        task = task_of(view)
        return view, task, choose_splits(view, task, Settings("linear")), source

    return make


def named(view, task, divided):
    return {control["name"]: control for control in controls.all_controls(view, task, divided)}


def test_chance_and_majority_of_two_classes_by_hand(pictured):
    view = toy_view(n=400, splits="given")
    view.labels = (np.arange(400) % 20 < 5).astype(np.int64)  # a quarter is positive
    view.splits = [("train", "train", "val", "test")[i // 20 % 4] for i in range(400)]
    got = named(*pictured(view)[:3])
    chance, most = got["chance"]["test"], got["majority class"]["test"]
    half = dict.fromkeys(("auroc", "sensitivity", "specificity", "accuracy"), 0.5)
    assert chance.items() >= half.items() and chance["ppv"] == chance["ap"] == most["ap"] == 0.25
    assert chance["nll"] == pytest.approx(np.log(2))
    assert most.items() >= {"auroc": 0.5, "accuracy": 0.75, "sensitivity": 0.0, "specificity": 1.0}.items()
    assert most["nll"] == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))
    assert most["brier"] == pytest.approx(0.25 * 0.75)


def test_chance_of_many_classes_by_hand(pictured):
    got = named(*pictured(toy_view(n=2000, classes=20))[:3])["chance"]["test"]
    expected = {"accuracy": 0.05, "balanced_accuracy": 0.05, "top5": 0.25, "auroc": 0.5, "nll": np.log(20)}
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_pixels_are_a_logistic_regression_on_scaled_pixels(pictured):
    view, task, divided, source = pictured(toy_view(n=300, splits="given"))
    x = source.arrays.reshape(300, -1).astype(np.float64)
    train, test = divided.rows("train"), divided.rows("test")
    x = (x - x[train].mean(0)) / x[train].std()
    model = LogisticRegression(C=1.0, max_iter=300).fit(x[train], view.labels[train])
    want = roc_auc_score(view.labels[test], model.decision_function(x[test]))
    got = controls.pixel_control(view, task, divided)
    assert got["test"]["auroc"] == pytest.approx(want, abs=2e-3) and got["test"]["auroc"] > 0.6
    assert got["note"] == ""


def test_pixels_of_several_labels(pictured):
    got = controls.pixel_control(*pictured(label_view(n=400))[:3])
    assert got["test"]["per_class"]["sign 0"]["auroc"] > 0.6


def test_images_that_are_gone_are_said(pictured, monkeypatch):
    view, task, divided, source = pictured(toy_view(n=200, splits="given"))
    source.ids = [f"another {name}" for name in source.ids]
    note = "the images cannot be had any more: none of 200 can be read"
    assert controls.pixel_control(view, task, divided)["note"] == note

    def gone(source):
        raise SourceError("there is no folder toys.")

    monkeypatch.setattr(featurecache.sources, "reopen", gone)
    note = "the images cannot be had any more: there is no folder toys."
    nothing = {"name": controls.PIXELS, "val": None, "test": None}
    assert controls.pixel_control(view, task, divided) == nothing | {"note": note}


def test_a_changed_image_of_test_is_not_measured_and_training_images_that_are_gone_are_left_out(pictured):
    view, task, divided, source = pictured(toy_view(n=200, splits="given"))
    source.ids[divided.rows("train")[0]] = "another name"
    got = controls.pixel_control(view, task, divided)
    assert got["note"] == "1 training images are gone or changed" and got["test"] is not None
    source.arrays[divided.rows("test")[3]] += 1
    assert controls.pixel_control(view, task, divided)["note"] == "1 of 40 images of test are gone or changed"


def test_large_images_are_made_small_with_antialiasing():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    source = SimpleNamespace(read=lambda row: stripes.permute(1, 2, 0).numpy())
    small = controls._small(source, [0]).resized(stripes).numpy()
    inside = small[:, 4:-4, 4:-4]
    assert small.shape == (3, 32, 32) and abs(int(inside.mean()) - 127) <= 1 and np.ptp(inside) <= 2


@pytest.mark.integration
def test_the_controls_shown_are_those_of_the_most_training_images_and_say_what_they_are_not_of():
    def names(*runs):
        (first, *_), table = compare(list(runs), resamples=20).record["controls"], comparison_table(runs)
        assert f"{first['name']}  " in table
        return first["name"], first["val"]

    view, same = toy_view(n=300, noise=4.0), {"epochs": 1, "report": False}
    few, whole = (train_head(view, "linear", fraction=f, controls=True, **same) for f in (0.1, 1.0))
    other, bare = (train_head(view, "ridge", split_seed=seed, controls=False, report=False) for seed in (1, 0))
    assert names(few, whole) == names(whole, few) == ("chance", whole.metrics["controls"][0]["val"])
    assert names(few, bare)[0] == f"chance (trained on {few.config['splits']['images']['train']} of 210 images)"
    assert shown_controls([whole, other], [other])[0]["name"] == "chance (on other test images)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": 3}, " (on fold 1 of 3)"),
        ({"repeats": 2}, " (on split seed 0 alone)"),
        ({"repeats": 2, "folds": 3}, " (on fold 1 of 3, on split seed 0 alone)"),
        ({"seeds": 2}, ""),
    ],
)
def test_controls_of_one_of_several_test_sets_say_of_which(options, words):
    sweep = ablate(toy_view(n=150, noise=4.0), "linear", out="s", epochs=1, controls=True, **options)
    assert compare(sweep.families, resamples=20).record["controls"][1]["name"] == f"majority class{words}"


def test_controls_of_a_sweep_are_of_the_largest_part_of_train_in_whatever_order_it_grew():
    words = {"epochs": 1, "controls": True}
    ablate(view := toy_view(n=300, noise=4.0), "linear", out="grown", fractions="0.1", **words)
    swept = [ablate(view, "linear", out=out, fractions="0.1,1", **words) for out in ("grown", "whole")]
    grown, whole = (compare(sweep.families, resamples=20).record["controls"] for sweep in swept)
    assert str(grown) == str(whole) and "trained on" not in grown[0]["name"]


def test_the_controls_are_in_the_measures_of_a_run(pictured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    view, *_ = pictured(toy_view(n=300, noise=2, untrained=True))
    run = train_head(view, "linear", epochs=1, split_seed=3, report=False)
    assert [c["name"] for c in run.metrics["controls"]] == [controls.CHANCE, controls.MAJORITY, controls.PIXELS]
    assert train_head(view, "linear", epochs=1, controls=False, report=False).metrics["controls"] == []


def test_the_same_images_labels_and_splits_are_computed_once(pictured, monkeypatch):
    view, task, divided, _ = pictured(toy_view(n=200, splits="given"))
    said, computed, whole = [], [], controls.all_controls
    monkeypatch.setattr(controls, "all_controls", lambda *how: computed.append(how) or whole(*how))

    def measure(view=view, task=task, names=divided.names):
        return controls.measure_controls(view, task, replace(divided, names=names), said.append)

    first = measure()
    np.testing.assert_equal(measure(), first)
    assert len(computed) == 1 and said[1].endswith(": as computed before") and not said[0].endswith("before")
    measure(names=np.where(np.arange(200) % 7, divided.names, ""))
    measure(task=replace(task, labels=1 - task.labels))
    monkeypatch.setattr(view, "digests", np.roll(view.digests, 1))
    assert measure()[-1]["note"].endswith("are gone or changed")
    measure()  # images that are gone may come back: not remembered
    assert len(computed) == 5
