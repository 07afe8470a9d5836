"""The five studies as data: copied numbers, steps that fit together, and what the images and options make of them."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import call
from support.small_sets import listed, pictures

from featurecache import open_source
from featurecache.backbones.aliases import ALIASES
from featurecache.errors import BadOption, SourceError, UnknownStudy, WeightsNotFound
from featurecache.sources import SOURCES
from heads.models.catalogue import BASELINES
from heads.studies import recipes
from heads.studies.images import QUICK, draw_images, few_of, open_sets, signature, sources_of
from heads.studies.page import FIGURES, StudyResult, cautions
from heads.studies.plan import (
    GMACS,
    QUICK_BACKBONES,
    StudyOptions,
    backbones_of,
    minutes_of,
    plan_study,
    read_weights,
    task_options,
    wanted_steps,
)
from heads.studies.recipes import STUDIES, load_study
from heads.studies.runner import run_study
from heads.studies.spec import ExplainStep, Extract, Heads, ImageSet, Network, OpenedSet

ALL = [*STUDIES.values()]
SPLITS = ("train", "val", "test")
# Typed from the publications, not from the recipes: study, part, measure, split, values.
REPORTED = """
mindlina pneumonia parameters test 1538 443906 459266 348050
medical-mnist scans accuracy val 0.9969 1
medical-mnist scans accuracy test 1
medical-mnist scans parameters test 3438342 85803270
medmnist bloodmnist accuracy test 0.979
medmnist breastmnist accuracy test 0.9038
medmnist pathmnist accuracy test 0.9462
medmnist retinamnist accuracy test 0.57
medmnist pneumoniamnist accuracy test 0.854
medmnist pneumoniamnist auroc test 0.944
cifar-tinyimagenet cifar10 accuracy test 0.6292 0.8004
cifar-tinyimagenet cifar10 train_seconds test 443 323
cifar-tinyimagenet cifar10 ms_per_image test 0.347 0.286
cifar-tinyimagenet cifar10 parameters test 1205642 175258
cifar-tinyimagenet cifar100 accuracy test 0.3677 0.4287
cifar-tinyimagenet cifar100 train_seconds test 439 326
cifar-tinyimagenet cifar100 ms_per_image test 0.349 0.246
cifar-tinyimagenet cifar100 parameters test 1217252 181108
cifar-tinyimagenet tinyimagenet accuracy test 0.3115 0.2985
cifar-tinyimagenet tinyimagenet train_seconds test 884 839
cifar-tinyimagenet tinyimagenet ms_per_image test 0.555 0.492
cifar-tinyimagenet tinyimagenet parameters test 1248584 187608
"""


def folder_of(path: Path, counts: dict[str, dict[str, int]]) -> Path:
    """Small images in class folders below split folders, every one different."""
    folders = {f"{split}/{name}": count for split, classes in counts.items() for name, count in classes.items()}
    return pictures(path, *(f"{folder}/{k:03}.png" for folder, count in folders.items() for k in range(count)))


def given(path: Path, name: str = "chest") -> OpenedSet:
    return OpenedSet(ImageSet(name, str(path), ()), str(path), open_source(path))


def of_classes(path: Path, *classes: str, counts=(12, 12, 12), name: str = "chest") -> dict[str, OpenedSet]:
    """The set ``name`` with so many images of each class in train, val and test."""
    splits = {split: dict.fromkeys(classes, count) for split, count in zip(SPLITS, counts, strict=True)}
    return {name: given(folder_of(path / "data", splits), name)}


def planned(study, sets, **options):
    """Step -> call, and what is left out why."""
    steps, left_out = plan_study(load_study(study), StudyOptions(**options), sets, 100.0)
    return {step.name: call for step, call, _ in steps}, left_out


# --- recipes ----------------------------------------------------------------------------------------------------


def test_published_numbers_are_those_of_the_publications():
    copied = {
        (study.name, part.name, p.measure, p.split, p.value, p.what)
        for study in ALL for part in study.questions for p in part.published
    }  # fmt: skip
    wanted = [line.split() for line in REPORTED.split("\n") if line]
    assert sorted((*c[:4], float(c[4])) for c in copied) == sorted((*w[:4], float(v)) for w in wanted for v in w[4:])


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_steps_of_a_study_fit_together(study):
    kinds = {step.name: type(step) for step in study.steps}
    parts, sets = {part.name for part in study.questions}, {images.name for images in study.images}
    assert len(kinds) == len(study.steps) and {part.images for part in study.questions} <= sets
    for place, step in enumerate(study.steps):
        assert set(study.needs(step)) <= {*list(kinds)[:place]}, "what a step needs stands before it"
        assert step.images in sets if isinstance(step, Extract) else step.question in parts
        if isinstance(step, ExplainStep):
            assert step.of and all(kinds[name] is Network for name in step.of), "a look is at its own networks"
            assert not step.attention or (kinds[step.attention], kinds[step.backbone]) == (Heads, Extract)
        elif isinstance(step, Network):  # known, and their time can be told
            tuned = step.arch.startswith("finetune:")
            assert "epochs" in step.options if tuned else step.arch in {*BASELINES} & {*GMACS}
    for backbone in backbones_of(study.steps):
        assert backbone in ALIASES or backbone.startswith("timm:")
        assert backbone in GMACS and QUICK_BACKBONES[backbone] in GMACS
    for part in study.questions:
        of_part = {step.name for step in study.steps if not isinstance(step, Extract) and step.question == part.name}
        assert {p.ours for p in part.published} | {part.reference} <= of_part | {""}
    assert study.figures in {*FIGURES, ""} and study.differs


def test_study_without_a_name_lists_all_with_the_question_each_answers():
    result = call("study")
    assert result.exit_code == 0
    for name, study in STUDIES.items():
        assert f"{name} " in result.output and study.question in result.output
    record = json.loads(call("study", "--json").stdout)
    assert list(record["studies"]) == list(STUDIES)


# --- which steps ------------------------------------------------------------------------------------------------


def test_a_misspelt_study_or_step_is_named_with_its_neighbours():
    with pytest.raises(UnknownStudy, match="Near: pneumonia"):
        load_study("pneumona")
    with pytest.raises(UnknownStudy, match="Near: vit-tuned"):
        wanted_steps(load_study("pneumonia"), StudyOptions(only=("vit-tunde",)))


def test_only_takes_what_a_step_needs_along_and_skip_leaves_out():
    study = load_study("medical-mnist")
    names = [step.name for step in wanted_steps(study, StudyOptions(only=("frozen-heads",)))]
    assert names == ["resnet-features", "vit-features", "frozen-heads"]
    left = {step.name for step in wanted_steps(study, StudyOptions(skip=("*-tuned", "cnn")))}
    assert left == {step.name for step in study.steps} - {"resnet-tuned", "vit-tuned", "cnn"}


def test_weights_are_told_apart_by_backbone():
    assert read_weights(["/w"], load_study("mindlina")) == {"vit-in21k": "/w"}
    both = {"resnet50": "/r", "vit-in1k": "/v"}
    assert read_weights(["resnet50=/r", "vit-in1k=/v"], load_study("medical-mnist")) == both
    with pytest.raises(BadOption, match=r"of which backbone.*--weights resnet50=PATH"):
        read_weights(["/w"], load_study("medical-mnist"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quick": True, "random_weights": True}, "--quick has a small untrained backbone of its own"),
        ({"random_weights": True, "weights": ["/w"]}, "contradict each other"),
        ({"quick": True, "epochs": 0}, "--epochs is 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, says, tmp_path):
    with pytest.raises(BadOption, match=says):
        run_study("mindlina", out=tmp_path / "s", **options)


def test_without_weights_the_ways_out_are_said_before_images_are_looked_for(tmp_path):
    with pytest.raises(WeightsNotFound) as error:
        run_study("mindlina", data=[str(tmp_path / "not there")], out=tmp_path / "s")
    assert all(way in str(error.value) for way in ("hf download ", "--weights PATH", "HF_HOME=…", "--random-weights"))
    assert not (tmp_path / "s").exists()


def test_without_images_the_two_ways_on_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    unfetched = {kind: replace(source, fetch=None) for kind, source in SOURCES.items()}
    monkeypatch.setattr("featurecache.sources.SOURCES", unfetched)
    with pytest.raises(SourceError, match=r"(?s)needs kaggle.*--data DIR.*--quick"):
        run_study("mindlina", random_weights=True, out=tmp_path / "s")
    with pytest.raises(SourceError) as error:
        run_study("mindlina", random_weights=True, data=[str(tmp_path / "gone")], out=tmp_path / "s")
    assert "--quick" not in str(error.value)


# --- which images -----------------------------------------------------------------------------------------------


def test_images_are_recognised_by_the_names_their_publishers_gave_them(tmp_path):
    for name in ("bloodmnist.npz", "breastmnist_64.npz", "notes.txt"):
        (tmp_path / name).touch()
    study = load_study("medmnist")
    both = {"bloodmnist": f"{tmp_path}/bloodmnist.npz", "breastmnist": f"{tmp_path}/breastmnist_64.npz"}
    assert sources_of(study, [str(tmp_path)]) == both
    assert sources_of(study, [f"{tmp_path}/bloodmnist.npz"]) == {"bloodmnist": both["bloodmnist"]}
    assert sources_of(study, ["retinamnist=/x"]) == {"retinamnist": "/x"}
    with pytest.raises(BadOption, match="which set of medmnist"):
        sources_of(study, [f"{tmp_path}/notes.txt"])
    (tmp_path / "cifar-100-python").mkdir()  # folders of CIFAR are given to torchvision
    torchvision = {"cifar100": f"torchvision:CIFAR100@{tmp_path}"}
    assert sources_of(load_study("cifar-tinyimagenet"), [str(tmp_path)]) == torchvision


def test_a_trial_takes_the_same_number_of_every_class_and_split_of_what_is_given(tmp_path):
    counts = {"train": {"a": 30, "b": 5}, "test": {"a": 30, "b": 20}}
    opened = given(folder_of(tmp_path / "data", counts))
    trial, whole = few_of(opened, tmp_path / "few"), opened.dataset
    few = trial.dataset
    have = Counter((split, few.classes[label]) for split, label in zip(few.splits, few.labels, strict=True))
    wanted = {(s, c): min(n, QUICK[s]) for s, classes in counts.items() for c, n in classes.items()}
    assert have == wanted and f"{len(few)} of 85 images" in trial.drawn
    original = {whole.read(row): (whole.splits[row], whole.labels[row]) for row in range(len(whole))}
    for row in range(len(few)):
        assert original[few.read(row)] == (few.splits[row], few.labels[row])


def test_a_trial_of_several_labels_keeps_them(tmp_path):
    rows = [f"images/{k}.png,{k % 2},{'' if k % 3 else 1},train,p{k // 2}" for k in range(12)]
    table = listed(tmp_path, "\n".join(["path,effusion,mass,split,patient", *rows]))
    whole = open_source(table, columns={"label": "effusion,mass", "group": "patient"})
    few = few_of(OpenedSet(ImageSet("x", "", ()), "x", whole), tmp_path / "few").dataset
    assert few.task == "multilabel" and few.classes == ["effusion", "mass"]
    key = {whole.read(row): (str(whole.labels[row]), whole.groups[row]) for row in range(len(whole))}
    assert all(key[few.read(row)] == (str(few.labels[row]), few.groups[row]) for row in range(len(few)))


def test_what_is_drawn_is_drawn_alike_and_has_all_classes(tmp_path):
    images = ImageSet("x", "none:", ("one", "two", "three"), task="ordinal")
    first, second = draw_images(images, tmp_path / "a" / "x"), draw_images(images, tmp_path / "b" / "x")
    assert [first.read(i) for i in range(len(first))] == [second.read(i) for i in range(len(second))]
    assert first.task == "ordinal" and first.classes == ["one", "two", "three"]  # in their order, no alphabet
    assert len(first) == 3 * sum(QUICK[s] for s in SPLITS)


def test_only_the_sets_that_are_asked_for_are_opened(tmp_path):
    sets = open_sets(load_study("cifar-tinyimagenet"), {}, True, tmp_path, ["cifar10"])
    assert list(sets) == ["cifar10"] and not (tmp_path / "drawn" / "cifar100").exists()


def test_a_changed_label_or_file_changes_what_a_study_knows_its_images_by(tmp_path):
    path = folder_of(tmp_path / "data", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    before = signature(given(path))
    assert signature(given(path)) == before
    (path / "train/a/000.png").rename(path / "train/b/900.png")
    moved = signature(given(path))
    Image.new("L", (9, 9)).save(path / "test/a/000.png")
    assert len({before["digest"], moved["digest"], signature(given(path))["digest"]}) == 3


# --- what the images make of the plan -----------------------------------------------------------------------------


def test_a_val_split_of_few_images_is_drawn_anew_by_all_steps_of_a_study_that_uses_it(tmp_path):
    sets = of_classes(tmp_path, "NORMAL", "PNEUMONIA", counts=(30, 8, 8))
    assert sets["chest"].few_in_val == ["8 of NORMAL", "8 of PNEUMONIA"]
    calls, _ = planned("pneumonia", sets, random_weights=True)
    trained = [call for call in calls.values() if {"ablate", "train_baseline"} & call.keys()]
    assert trained and all(call["resplit_val"] and call["drop_leaks"] for call in trained)
    for name, redrawn in (("pneumonia", True), ("mindlina", False)):
        result = StudyResult(load_study(name), StudyOptions(), tmp_path, sets, [], {}, {})
        assert any("drawn anew" in words for words in cautions(result)) == redrawn


def test_classes_are_found_by_their_names_and_merged():
    part = load_study("mindlina").questions[0]

    def options(*classes):
        data = replace(open_source("digits"), classes=list(classes))
        return task_options(part, OpenedSet(ImageSet("chest", "", ()), "x", data))

    assert options("BACTERIA", "NORMAL", "VIRUS")["classes"] == ["NORMAL", "pneumonia=BACTERIA,VIRUS"]
    assert "classes" not in options("normal", "pneumonia")
    assert options("cat", "dog") == "x cannot tell normal from pneumonia"


def test_a_question_that_the_images_cannot_answer_is_left_out_and_said(tmp_path):
    calls, left_out = planned("mindlina", of_classes(tmp_path, "normal", "pneumonia"), quick=True)
    assert list(calls) == ["features", "pneumonia-heads", "pneumonia-cnn"]
    assert list(left_out) == ["kind"] and "no bacteria" in left_out["kind"]


def test_with_random_weights_the_untrained_control_would_be_the_same_twice(tmp_path):
    sets = of_classes(tmp_path, "a", "b", name="medical-mnist")
    (with_weights, _), (random, left_out) = (planned("medical-mnist", sets, random_weights=r) for r in (False, True))
    assert with_weights.keys() - random.keys() == left_out.keys() == {"untrained-features", "untrained-heads"}


def test_options_cap_what_the_study_has(tmp_path):
    sets = of_classes(tmp_path, "a", "b", name="medical-mnist")
    options = {"random_weights": True, "image_size": 64, "epochs": 3}
    steps, _ = planned("medical-mnist", sets, **options, train_per_class=4)
    assert {steps[name]["image_size"] for name in ("vit-features", "cnn", "vit-tuned")} == {64}
    assert {steps[name]["epochs"] for name in ("cnn", "vit-tuned", "frozen-heads")} == {3}
    assert {steps[name]["train_per_class"] for name in ("cnn", "vit-tuned")} == {4}
    assert "train_per_class" not in steps["frozen-heads"]
    more, _ = planned("medical-mnist", sets, **options, train_per_class=500)
    assert more["vit-tuned"]["train_per_class"] == 50, "a cap does not raise what the study has"
    trial, _ = planned("medical-mnist", sets, quick=True)
    assert trial["vit-tuned"]["train_per_class"] == QUICK["train"] and "train_per_class" not in trial["cnn"]


def test_minutes_by_hand(tmp_path):
    images = given(folder_of(tmp_path / "d", {s: {"a": n, "b": n} for s, n in zip(SPLITS, (5, 2, 3), strict=True)}))
    # 20 images of 4.1 multiply-adds at 70 % of 82/60 operations a second, and 3 s of every step around them
    once = minutes_of({"extract": "x", "backbone": "resnet50"}, images, 82 / 60) - 3 / 60
    assert once == pytest.approx(2 * 4.1 * 20 / (0.7 * 82 / 60) / 60)
    call = {"train_baseline": "x", "arch": "finetune:resnet50", "epochs": 2, "image_size": 112}
    assert minutes_of(call, images, 82 / 60) == pytest.approx(once / 20 / 4 * (3 * 10 * 2 + 4 * 2 + 6) + 3 / 60)


# --- splits of their own ------------------------------------------------------------------------------------------


def counts_of(names, data):
    return {(s, c): int(((names == s) & (data.labels == c)).sum()) for s in SPLITS for c in (0, 1)}


def test_a_thousand_of_each_class_train_and_the_rest_of_train_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PER_CLASS", 6)
    path = folder_of(tmp_path / "data", {"train": {"a": 5, "b": 4}, "val": {"a": 2, "b": 2}, "test": {"a": 3, "b": 3}})
    data = open_source(path)
    names = recipes.thousand_of_each(data)
    # a: 7 beside test, 6 of them train; b: 6, which would leave none for val: two thirds of them
    counts = {("train", 0): 6, ("val", 0): 1, ("train", 1): 4, ("val", 1): 2, ("test", 0): 3, ("test", 1): 3}
    assert counts_of(names, data) == counts
    assert all(name == "test" for name, given in zip(names, data.splits, strict=True) if given == "test")


def test_without_a_test_split_the_rest_is_test_and_groups_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PER_CLASS", 8)
    data = open_source(folder_of(tmp_path / "data", {"a": {"x": 24}, "b": {"x": 24}}))
    groups = [f"{name[0]}{k // 3}" for k, name in enumerate(data.ids)]
    names = recipes.thousand_of_each(replace(data, groups=groups))
    for group in set(groups):
        assert len({names[k] for k in range(48) if groups[k] == group}) == 1
    counts = counts_of(names, data)
    for c in (0, 1):
        assert 8 <= counts["train", c] <= 10 and 3 <= counts["val", c] <= 5
        assert sum(counts[s, c] for s in SPLITS) == 24


def test_val_of_tiny_imagenet_is_test_as_published_and_part_of_train_chooses(tmp_path):
    path = folder_of(tmp_path / "tiny", {"train": {"fish": 20, "newt": 20}, "val": {"fish": 5, "newt": 5}})
    data, part = open_source(path), load_study("cifar-tinyimagenet").questions[2]
    names = part.splits(data)
    assert ((names == "test") == (np.array(data.splits) == "val")).all()
    assert [counts_of(names, data)["val", c] for c in (0, 1)] == [3, 3]
    data = open_source(folder_of(tmp_path / "other", {s: {"fish": 2, "newt": 2} for s in SPLITS}))
    assert part.splits(data) is None, "what has a test split keeps it"


@pytest.mark.parametrize(
    "name, options, hidden, says",
    [("pneumonia", {"quick": True}, "pytorch_grad_cam", "look needs .*'featurecache\\[explain\\]', or --skip look"),
     ("pneumonia", {"quick": True}, "optuna pytorch_grad_cam", "search, look need .*\\[optuna,explain\\]"),
     ("pneumonia", {"random_weights": True}, "timm", "vit-features, vit-tuned need .*\\[timm\\]'\\.$"),
     ("medmnist", {"quick": True}, "pytorch_grad_cam", "bloodmnist-look and 3 more need .*--skip '\\*look'")],
)  # fmt: skip
def test_what_is_not_installed_is_said_before_anything_is_computed(name, options, hidden, says, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *_: None if n in hidden.split() else there(n, *_))
    with pytest.raises(BadOption, match=says):
        run_study(name, out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_the_articles_heads_are_trained_as_in_the_article():
    """Adam at 0.001 on the features as they are, not as these heads are trained by default."""
    article = {"optimizer": "adam", "lr": 1e-3, "schedule": "constant", "standardize": "none"}
    heads = [step for step in STUDIES["mindlina"].steps if isinstance(step, Heads)]
    assert heads and all(step.options | article == step.options for step in heads)
