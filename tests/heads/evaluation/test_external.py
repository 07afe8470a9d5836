"""A finished head on another view: nothing fitted, classes by name, features of the same backbone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from support.builders import make_spec
from support.fake_view import label_view, toy_view
from support.runs import reseal, train_head

from featurecache.errors import BadOption, CannotWrite, NotInCache, RunError
from heads.api import report
from heads.evaluation import external
from heads.evaluation.comparison import compare
from heads.evaluation.external import evaluate_run, external_images, read_external
from heads.evaluation.families import families_of
from heads.metrics.calibration import CalibratedPredictions
from heads.metrics.classification import evaluate
from heads.reports import text as tables
from heads.runs.folder import write_record
from heads.runs.run import load_run


def train(classes=2, **options):
    view = toy_view(n=300, classes=classes, splits="given", noise=2.0)
    return train_head(view, "linear", epochs=3, **options)


def elsewhere(classes=2, names=None, n=200, seed=0, **more):
    """Other images through the same backbone."""
    more |= {"name": "there", "label": "vit-toy/there", "path": Path("there.h5")}
    view = toy_view(n=n, classes=classes, seed=seed, noise=3.0, **more)
    view.classes = names or view.classes
    view.digests = np.array([f"{i + 10_000:032x}".encode() for i in range(n)], dtype="S32")
    return view


def measure(run, view, rows, y):
    z = run.logits(view.features["cls"][rows])
    predictions = CalibratedPredictions(run.task, z, y, run.positive, run.calibration.thresholds)
    return evaluate(predictions, run.classes)


def test_the_frozen_head_with_its_own_threshold_and_temperature():
    run, view = train(), elsewhere()
    before = {file.name: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    found = evaluate_run(run, view, resamples=100)
    want = measure(run, view, np.arange(200), view.labels)
    for name, each in found["test"].items():
        assert each["value"] == pytest.approx(want[name]), name
    assert found["operating"][0]["threshold"] == run.calibration.thresholds[0]
    assert {file.name: file.read_bytes() for file in run.path.iterdir() if file.is_file()} == before
    assert json.loads((run.path / "external/there.json").read_text())["n"] == 200


def test_it_is_shown_beside_the_internal_test():
    run = train()
    evaluate_run(run, elsewhere(), resamples=100)
    record = compare(families_of([load_run(run.path)]), resamples=100).record
    (family,) = record["families"]
    (other,) = family["external"]
    own, there = family["test"]["auroc"]["value"], other["test"]["auroc"]["value"]
    assert (other["view"], other["n"]) == ("vit-toy/there", 200) and own != there
    text = tables.external_table(family, "vit-toy/there", "binary", record["n_test"])
    assert f"{own:.3f} [" in text and f"{there:.3f} [" in text
    assert "on vit-toy/there, 200 images: AUROC" in tables.lab_table(record)


def test_classes_are_matched_by_name_wherever_they_stand():
    run, view = train(classes=3), elsewhere(classes=4, names=["kind 2", "other", "kind 0", "kind 1"])
    found = evaluate_run(run, view, resamples=50)
    recode = np.array([2, -1, 0, 1])[view.labels]
    rows = np.flatnonzero(recode >= 0)
    want = measure(run, view, rows, recode[rows])
    assert found["test"]["accuracy"]["value"] == pytest.approx(want["accuracy"])
    assert (found["n"], found["left_out"], [row["n"] for row in found["classes"]]) == (150, {"other": 50}, [50, 50, 50])
    assert "50 images of classes that the head does not know are left out (other 50)" in found["warnings"]


def test_a_class_under_another_name_is_one_clear_sentence_and_can_be_named():
    run, view = train(), elsewhere(names=["kind 0", "Kind 1"])
    with pytest.raises(BadOption, match=r"has no class 'kind 1'.*it has kind 0, Kind 1\. Near: .*Kind 1"):
        evaluate_run(run, view)
    found = evaluate_run(run, view, classes=["kind 1=Kind 1"], resamples=50)
    assert found["classes"][1] == {"class": "kind 1", "in_view": ["Kind 1"], "n": 100}
    view = elsewhere(3, names=["kind 0", "mass, benign", "mass"])
    found = evaluate_run(run, view, classes=['kind 1="mass, benign",mass'], resamples=50)
    assert found["classes"][1]["in_view"] == ["mass, benign", "mass"]


def test_a_class_that_is_not_there_is_said_and_its_measures_are_undefined():
    run, view = train(classes=3), elsewhere(names=["kind 0", "kind 1"])
    with pytest.raises(BadOption, match="has no class 'kind 2'"):
        evaluate_run(run, view)
    found = evaluate_run(run, view, classes=["kind 2="], resamples=50)
    assert "vit-toy/there has no kind 2: measures of that class are undefined" in found["warnings"]
    assert found["per_class"]["kind 2"]["auroc"]["value"] is None and found["test"]["auroc"]["value"] is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("kind 9=kind 0", "a class of the run"),
        ("kind 0", "expected NAME=A,B"),
        ("kind 0=none", "has no class 'none'"),
        ("kind 0=kind 1", "cannot be both"),
        ("kind 0=", "fewer than two classes"),
    ],
)
def test_mistaken_names(given, words):
    with pytest.raises(BadOption, match=words):
        evaluate_run(train(), elsewhere(), classes=[given])


def test_merged_classes_are_merged_in_the_other_view_too():
    view, there = toy_view(n=300, classes=3, splits="given", noise=2.0), elsewhere(classes=3)
    run = train_head(view, "linear", epochs=2, classes=["sick=kind 1,kind 2", "kind 0"])
    sick = run.classes.index("sick")
    want = measure(run, there, np.arange(200), np.where(there.labels > 0, sick, 1 - sick))
    found = evaluate_run(run, there, resamples=50)
    assert found["test"]["accuracy"]["value"] == pytest.approx(want["accuracy"])


def test_features_of_another_backbone_are_refused_with_the_fields_that_differ():
    view = toy_view(n=300, splits="given")
    spec, other = make_spec(), make_spec(image_size=(16, 16), precision="bf16")
    view.spec, view.fingerprint = spec.to_dict(), spec.fingerprint
    run, there = train_head(view, "linear", epochs=1), elsewhere()
    there.spec, there.fingerprint = other.to_dict(), other.fingerprint
    with pytest.raises(BadOption, match=r"image_size \(8 → 16\).*precision \(fp32 → bf16\)"):
        evaluate_run(run, there)
    with pytest.raises(RunError, match="is damaged: an extraction spec"):
        evaluate_run(train(), there)


@pytest.mark.parametrize("own", [make_spec(), make_spec(image_size=(0, 0), precision="unknown")])
def test_imported_features_are_those_of_no_head_but_their_own(own):
    view, there = toy_view(n=300, splits="given"), elsewhere()
    other = make_spec(image_size=(0, 0), precision="unknown", weights={"features_blake2b": "b"})
    view.spec, view.fingerprint = own.to_dict(), own.fingerprint
    there.spec, there.fingerprint = other.to_dict(), other.fingerprint
    with pytest.raises(BadOption, match="Imported features belong to no known backbone, so") as refusal:
        evaluate_run(train_head(view, "linear", epochs=1), there)
    assert "differ in" not in str(refusal.value)


def test_runs_and_views_are_named_by_path_and_the_newest_view_is_taken_when_none_is_named(monkeypatch):
    run, named = train(), []
    monkeypatch.setattr(external, "open_view", lambda name: named.append(name) or elsewhere())
    assert evaluate_run(run.path, "vit-toy/there", resamples=50)["view"] == "vit-toy/there"
    assert evaluate_run(str(run.path), None, resamples=50)["run"] == str(run.path)
    assert named == ["vit-toy/there", None]


@pytest.mark.parametrize(
    ("resamples", "says"), [(0, "resamples is 0; it must be at least 1"), (0.5, "must be a whole number")]
)
def test_a_bootstrap_of_no_resamples_is_refused(resamples, says):
    run = train()
    for measured in (lambda: evaluate_run(run, elsewhere(), resamples=resamples),
                     lambda: report(run, resamples=resamples)):  # fmt: skip
        with pytest.raises(BadOption, match=says):
            measured()


def test_a_report_takes_runs_as_it_takes_their_folders():
    run = train()
    written = report(run, resamples=50, images=False)
    assert written == report([run], resamples=50, images=False) == report(run.path, resamples=50, images=False)


def test_an_output_the_view_does_not_hold_is_named_with_the_command_that_stores_it():
    view = elsewhere()
    del view.features["cls"]
    with pytest.raises(NotInCache, match="featurecache extract"):
        evaluate_run(train(), view)
    with pytest.raises(BadOption, match=r"has the shape \[9\], and the head of .* takes \[8\]"):
        evaluate_run(train(), elsewhere(width=9))


def test_a_split_alone_unlabelled_images_and_a_view_without_any():
    run, view = train(), elsewhere(splits="given")
    view.labels = np.where(np.arange(200) < 10, -1, view.labels)
    found = evaluate_run(run, view, split="test", resamples=50)
    assert found["n"] == ((np.array(view.splits) == "test") & (view.labels >= 0)).sum()
    assert "10 images carry no label and are left out" in found["warnings"]
    (family,) = compare(families_of([run]), resamples=50).record["families"]
    assert "on vit-toy/there (test): 10 images carry no label and are left out" in family["warnings"]
    assert (run.path / "external/there-test.json").exists()
    view.task = "unlabelled"
    for other, split, words in (
        (elsewhere(), "Test", "one of train, val, test"), (elsewhere(), "val", "no image in val"),
        (view, None, "carries no labels"),
    ):  # fmt: skip
        with pytest.raises(BadOption, match=words):
            evaluate_run(run, other, split=split)


def test_images_the_head_was_trained_on_are_said():
    run = train()
    again = toy_view(n=300, splits="given", noise=2.0, name="again", label="vit-toy/again", path=Path("again.h5"))
    used = len(run.answers("val").ids) + run.config["splits"]["images"]["train"]
    found = evaluate_run(run, again, resamples=50)  # the view of training is gone
    assert f"{used} of 300 images were also used to train or choose this head" in found["warnings"][-1]
    assert evaluate_run(run, again, split="test", resamples=50)["warnings"] == []
    replaced = elsewhere(n=300)  # other images under the name, path and ids of those
    replaced.name, replaced.label, replaced.path = "toy", "vit-toy/toy", Path(run.config["view"]["path"])
    replaced.ids = again.ids
    assert evaluate_run(run, replaced, resamples=50)["warnings"] == []
    assert run.is_of_images_in(again) and not run.is_of_images_in(replaced)


def test_labels_beside_each_other_are_matched_by_name_too():
    run = train_head(label_view(), "linear", epochs=2)
    there = label_view(labels=5, seed=1, name="there", label="vit-toy/there")
    there.classes = ["sign 3", "sign 0", "more", "sign 2", "sign 1"]
    there.digests = np.array([f"{i + 9_000:032x}".encode() for i in range(300)], dtype="S32")
    want = measure(run, there, np.arange(300), there.labels[:, [1, 4, 3, 0]])
    assert evaluate_run(run, there, resamples=50)["test"]["auroc"]["value"] == pytest.approx(want["auroc"])
    with pytest.raises(BadOption, match="labels beside each other and classes that exclude"):
        evaluate_run(train(), there)


def test_groups_of_the_other_view_are_its_clusters():
    run, view = train(), elsewhere(groups=[f"patient {i // 5}" for i in range(200)])
    found = evaluate_run(run, view, resamples=50)
    (family,) = compare(families_of([load_run(run.path)]), resamples=50).record["families"]
    assert found["grouped"]
    for record in (found, family["external"][0]):
        assert record["test"]["accuracy"]["method"] == "cluster bootstrap"


def test_several_seeds_are_averaged_elsewhere_too():
    view = toy_view(n=300, splits="given", noise=2.0)
    runs = [train_head(view, "linear", epochs=2, seed=s) for s in (0, 1)]
    there = elsewhere()
    values = [evaluate_run(run, there, resamples=50)["test"]["auroc"]["value"] for run in runs]
    (other,) = compare(families_of(runs), resamples=50).record["families"][0]["external"]
    assert (other["heads"], other["test"]["auroc"]["value"]) == (2, pytest.approx(np.mean(values)))


def test_what_was_written_is_checked_when_it_is_read():
    run = train()
    evaluate_run(run, elsewhere(), resamples=50)
    ((_, answers),) = read_external(run)
    assert answers.ids[0] == "img/0000.png"
    file = run.path / "external/there.safetensors"
    other = {**load(file.read_bytes()), "ids": torch.tensor(list(b'["a"]'), dtype=torch.uint8)}
    for spoil, words in (
        (lambda: file.write_bytes(save(other)), r"there\.safetensors is not what was written"),
        (lambda: reseal(file.parent, name="there.json"), "is damaged: it does not fit the run"),
        (lambda: file.write_bytes(file.read_bytes()[:-8]), "damaged"), (file.unlink, "is missing"),
        (lambda: file.with_suffix(".json").write_text('{"format": 1, "view": 1}'), "not the text that was written"),
        (lambda: write_record(file.with_suffix(".json"), {"view": 1}), "no proper view"),
    ):  # fmt: skip
        spoil()
        with pytest.raises(RunError, match=words):
            read_external(run)


@pytest.mark.parametrize(("features", "why"), [(None, "a head takes features"), ("vit/a", "--features is given too")])
def test_images_alone_are_for_networks_from_pixels(features, why):
    with pytest.raises(BadOption, match=why):
        external_images([train()], features, "digits", None)


def test_a_folder_that_cannot_be_written_is_named():
    run = train()
    (run.path / "external").touch()
    with pytest.raises(CannotWrite, match=r"Nothing can be written in .*external: File exists"):
        evaluate_run(run, elsewhere(), resamples=50)
