"""Sweeps: what is trained, chosen, kept; killed and continued, enlarged; several views; refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.builders import make_view
from support.fake_view import label_view, toy_view

import cli
import heads.sweeps.search
from featurecache.errors import BadOption, InUse, NotInCache, ProtocolError, RunError
from featurecache.files.locks import exclusive_lock
from heads.api import ablate
from heads.evaluation.families import family_of
from heads.settings import Settings
from heads.splits import splits_csv
from heads.sweeps import runner as sweep_run
from heads.sweeps.journal import ROWS, JournalFile, load_sweep
from heads.training.job import prepare_training
from heads.training.train import run_contents, train_together

TIMES = ("seconds", "ms_per_image")


def view_of(n=150, **more):
    return toy_view(n=n, noise=3.0, **more)


def sweep(view, heads, folder, **options):
    options = {"epochs": 2, "batch_size": 16, **options}
    return ablate(view, heads, out=folder, **options)


def content(folder):
    """All that a sweep found, without times: rows by key, and the bytes of the chosen heads."""
    found = load_sweep(folder)
    rows = {row["key"]: {k: v for k, v in row.items() if k not in TIMES} for row in found.rows}
    runs = [run.path for family in found.families for run in family.runs]
    names = ("head.safetensors", "answers.safetensors", "splits.csv", "predictions.csv")
    return rows, {(path.name, name): (path / name).read_bytes() for path in runs for name in names}


def trained(patch, stop=None):
    """Which settings are handed to training from here on; Ctrl-C in the training after ``stop`` calls."""
    asked, whole, calls = [], sweep_run.train_together, iter(range(10**6))

    def counted(job, settings, **more):
        if next(calls) == stop:
            raise KeyboardInterrupt
        asked.extend(settings)
        return whole(job, settings, **more)

    patch.setattr(sweep_run, "train_together", counted)
    return asked


def trained_alone(view, settings):
    """As ``train_head`` trains, without writing and drawing."""
    job = prepare_training(view, settings)
    (fit,) = train_together(job, [settings])
    return run_contents(job, fit, [])


def test_each_row_is_what_train_head_gives_alone(tmp_path):
    view = view_of()
    found = sweep(view, "linear,large,ridge", tmp_path / "s", lr="1e-3,1e-2", weight_decay="0,1e-3", seeds=2)
    assert len(found.rows) == 4 * 2 * 2 + 1
    for row in found.rows[1::3]:
        alone = trained_alone(view, Settings.from_dict(row["settings"]))
        for split in ("val", "test"):
            for measure, value in row[split].items():
                assert alone.metrics[split][measure] == pytest.approx(value, abs=2e-4), (row["head"], measure)


def test_a_chosen_run_is_the_head_trained_alone(tmp_path):
    view = view_of()
    found = sweep(view, "linear,large", tmp_path / "s", lr="1e-3..1e-1:3", seeds=2, fractions="0.5")
    assert len(found.families) == 2
    for run in (run for family in found.families for run in family.runs):
        alone = trained_alone(view, Settings.from_dict(run.config["settings"]))
        for name, tensor in load_file(run.path / "head.safetensors").items():
            assert torch.allclose(tensor, alone.tensors[name], atol=1e-5, rtol=1e-5)
        assert (run.path / "splits.csv").read_text() == splits_csv(view.ids, alone.splits)


def test_the_setting_of_a_family_is_the_best_on_val_over_its_seeds(tmp_path):
    found = sweep(view_of(), "linear", tmp_path / "s", lr="1e-4..1e-1:4", seeds=3, fractions="0.3,1", select="nll")
    assert len(found.families) == 2
    for family in found.families:
        by_lr = defaultdict(list)
        for row in family.tried:
            by_lr[row["settings"]["lr"]].append(row["val"]["nll"])
        best = min(by_lr, key=lambda lr: np.mean(by_lr[lr]))
        assert {run.config["settings"]["lr"] for run in family.runs} == {best}
        assert sorted(run.config["settings"]["seed"] for run in family.runs) == [0, 1, 2]


def test_heads_take_the_outputs_that_fit_them_and_the_rest_is_said(tmp_path):
    said = []
    found = sweep(view_of(), "linear,large", tmp_path / "s", outputs="cls,tokens", say=said.append)
    assert {(f.head, f.output) for f in found.families} == {("linear", "cls"), ("large", "tokens")}
    assert "left out   vit-toy/toy: linear on tokens; large on cls: they do not fit" in said
    with pytest.raises(BadOption, match="large fits none of --outputs cls"):
        sweep(view_of(), "linear,large", tmp_path / "t", outputs="cls")
    with pytest.raises(NotInCache, match="not pooler"):
        sweep(view_of(), "linear", tmp_path / "t", outputs="pooler")
    assert not (tmp_path / "t").exists()


def test_a_solved_head_has_one_row_for_each_draw(tmp_path):
    found = sweep(view_of(), "ridge", tmp_path / "s", lr="1e-3,1e-2", seeds=5, repeats=2, fractions="0.5,1")
    assert [(r["fraction"], r["repeat"]) for r in found.rows] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert {len(f.runs) for f in found.families} == {2}


def test_dropout_is_for_the_heads_that_have_it(tmp_path):
    view = view_of()
    view.features["cls"] = view.features["cls"][:, :4]
    found = sweep(view, "ridge,mlp", tmp_path / "s", dropout="0,0.5")
    assert [r["settings"]["dropout"] for r in found.rows] == [None, 0.0, 0.5]
    with pytest.raises(BadOption, match="--dropout would do nothing"):
        sweep(view, "ridge", tmp_path / "t", dropout="0.5")
    with pytest.raises(BadOption, match="--gated would do nothing"):
        sweep(view, "linear", tmp_path / "t", gated=True)


def test_choice_at_the_end_of_the_grid_is_said(tmp_path):
    said = []
    found = sweep(view_of(), "linear", tmp_path / "s", lr="1e-6,1e-5", weight_decay="0,1e-9", say=said.append)
    end = {1e-6: "smallest", 1e-5: "largest"}[found.families[0].runs[0].config["settings"]["lr"]]
    assert f"({end} tried)" in said[-1]
    assert "weight decay 0 (" not in said[-1]


SEARCH = {"lr": "1e-4..1e-1", "search": "optuna", "epochs": 1}


@pytest.mark.parametrize(
    ("heads", "options", "calls"),
    [
        *(("linear,large", {"lr": "1e-3,1e-1", "repeats": 2}, calls) for calls in (0, 1, 3)),
        ("linear,ridge", {**SEARCH, "weight_decay": "0,1e-3", "trials": 18}, 2),
    ],
)
def test_a_stopped_sweep_goes_on_to_the_same_rows_and_the_same_bytes(tmp_path, heads, options, calls):
    sweep(view_of(), heads, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, stop=calls)
        with pytest.raises(sweep_run.Stopped, match="the same command continues"):
            sweep(view_of(), heads, tmp_path / "s", **options)
    sweep(view_of(), heads, tmp_path / "s", **options)
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    if "search" in options:
        rows = load_sweep(tmp_path / "whole").rows
        lrs = {row["settings"]["lr"] for row in rows if row["head"] == "linear"}
        assert len(lrs) == 18 and all(1e-4 <= lr <= 1e-1 for lr in lrs)


def test_a_torn_line_or_set_is_trained_again(tmp_path):
    options = {"lr": "1e-3,1e-2", "seeds": 2}
    sweep(view_of(), "linear,mlp", tmp_path / "whole", **options)
    data = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    wanted = content(tmp_path / "whole")
    for cut in (7, ends[1], ends[3] - 1, ends[6] + 5):
        (tmp_path / "whole" / "rows.jsonl").write_bytes(data[:cut])
        sweep(view_of(), "linear,mlp", tmp_path / "whole", **options)
        assert content(tmp_path / "whole") == wanted


def test_a_chosen_run_that_was_lost_is_trained_again_to_the_same_bytes(tmp_path):
    found = sweep(view_of(), "linear,large", tmp_path / "s", lr="1e-3,1e-2,1e-1", seeds=2)
    wanted = content(tmp_path / "s")
    for family in found.families:
        shutil.rmtree(family.runs[0].path)
    assert len(load_sweep(tmp_path / "s").families) == 0
    sweep(view_of(), "linear,large", tmp_path / "s", lr="1e-3,1e-2,1e-1", seeds=2)
    assert content(tmp_path / "s") == wanted


def test_a_damaged_head_on_the_shelf_is_not_believed(tmp_path):
    sweep(view_of(), "linear", tmp_path / "whole", lr="1e-3,1e-2", repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, stop=1)
        with pytest.raises(sweep_run.Stopped):
            sweep(view_of(), "linear", tmp_path / "s", lr="1e-3,1e-2", repeats=2)
    for file in (tmp_path / "s" / ".unchosen").iterdir():
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
    sweep(view_of(), "linear", tmp_path / "s", lr="1e-3,1e-2", repeats=2)
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    assert not (tmp_path / "s" / ".unchosen").exists()


def test_an_enlarged_sweep_computes_only_what_is_new(tmp_path, monkeypatch):
    sweep(view_of(), "linear", tmp_path / "s", lr="1e-3,1e-2", seeds=2)
    asked = trained(monkeypatch)
    found = sweep(view_of(), "linear,mlp", tmp_path / "s", lr="1e-3,1e-2,1e-1", seeds=3)
    new = [(s.head, s.lr, s.seed) for s in asked]
    old = {("linear", lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)}
    assert len(new) == 18 - 4
    assert not old & set(new)
    assert len(found.rows) == 18
    asked.clear()
    sweep(view_of(), "linear,mlp", tmp_path / "s", lr="1e-3,1e-2,1e-1", seeds=3)
    assert asked == []


def test_settings_with_fewer_seeds_are_no_candidates(tmp_path):
    sweep(view_of(), "linear", tmp_path / "s", lr="1e-4..1e-1:4", seeds=1)
    said = []
    found = sweep(view_of(), "linear", tmp_path / "s", lr="1e-4", seeds=3, say=said.append)
    (family,) = found.families
    assert {run.config["settings"]["lr"] for run in family.runs} == {1e-4}
    assert "3 settings with fewer draws or seeds are not compared" in said[-1]


def test_keys_do_not_depend_on_folder_or_name_of_the_data_but_on_labels_and_features(tmp_path):
    keys = {}
    first = view_of()
    views = {
        "same": first,
        "elsewhere": replace(first, path=tmp_path / "x.h5", source={"data": "other"}),
        "other features": replace(first, fingerprint="1" * 64),
        "other labels": replace(first, labels=1 - first.labels),
    }
    for name, view in views.items():
        (row,) = sweep(view, "linear", tmp_path / name).rows
        keys[name] = row["key"]
    assert keys["same"] == keys["elsewhere"]
    assert len(set(keys.values())) == 3


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"n": 140}, {}, r"other images or labels \(150 there, 140 here\)"),
        ({}, {"select": "nll"}, "select auroc, not nll"),
        ({}, {"split_seed": 4}, "split seed 0, not 4"),
        ({}, {"folds": 3}, "folds none, not 3"),
        ({}, {"positive": "kind 0"}, "positive none, not kind 0"),
    ],
)
def test_a_sweep_of_other_images_or_protocol_is_refused(tmp_path, change, options, said):
    sweep(view_of(), "linear", tmp_path / "s")
    with pytest.raises(RunError, match=said):
        sweep(view_of(**change), "linear", tmp_path / "s", **options)


def test_another_backbone_on_the_same_images_joins_a_sweep(tmp_path):
    sweep(view_of(), "linear", tmp_path / "s")
    found = sweep(other_view(view_of(), np.arange(150)), "linear", tmp_path / "s")
    assert [family.view for family in found.families] == ["vit-toy/toy", "resnet-toy/toy"]


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="no sweep"):
        sweep(view_of(), "linear", tmp_path / "s")
    with pytest.raises(RunError, match=r"is no sweep: it has no sweep\.json"):
        load_sweep(tmp_path / "s")


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    sweep(view_of(), "linear", tmp_path / "s")
    with exclusive_lock(tmp_path / "s", "ablate"), pytest.raises(InUse, match="ablate by process"):
        sweep(view_of(), "linear", tmp_path / "s", seeds=2)


def test_without_out_the_same_sweep_goes_on_and_another_gets_a_folder_of_its_own():
    first = ablate(view_of(), "linear", epochs=1)
    assert ablate(view_of(), "linear", epochs=1, seeds=2).path == first.path
    assert ablate(view_of(n=140), "linear", epochs=1).path.name == "ablate-toy-2"
    assert first.path.name == "ablate-toy-1"


def test_a_dry_run_says_the_plan_and_writes_nothing(tmp_path):
    said = []
    assert (
        sweep(view_of(), "linear,large", tmp_path / "s", seeds=3, lr="1e-3,1e-2", dry_run=True, say=said.append) is None
    )
    assert not (tmp_path / "s").exists()
    assert "family     vit-toy/toy cls linear: 6 heads" in said
    assert any(line.startswith("plan       12 heads in 2 groups") for line in said)


def test_fractions_are_nested_and_share_val_and_test(tmp_path):
    parts = {}
    for family in sweep(view_of(), "linear", tmp_path / "s", fractions="0.1,0.5,1", repeats=2).families:
        for run in family.runs:
            used, repeat = division(run), run.config["sweep"]["repeat"]
            for s in ("train", "val", "test"):
                parts[repeat, family.fraction, s] = {i for i, split in used.items() if split == s}
    for repeat in (0, 1):
        assert parts[repeat, 0.1, "train"] < parts[repeat, 0.5, "train"] < parts[repeat, 1.0, "train"]
        assert all(parts[repeat, 0.1, s] == parts[repeat, 1.0, s] for s in ("val", "test"))
    assert parts[0, 1.0, "test"] != parts[1, 1.0, "test"]


def test_folds_test_every_image_once_and_leave_the_given_test_alone(tmp_path):
    view = view_of(splits="given")
    found = sweep(view, "linear,ridge", tmp_path / "s", folds=4)
    given = {i for i, s in zip(view.ids, view.splits, strict=True) if s == "test"}
    for family in found.families:
        tested = [i for run in family.runs for i in run.answers("test").ids]
        assert sorted(tested) == sorted(set(view.ids) - given)
        assert sorted(run.config["splits"]["fold"] for run in family.runs) == [[k, 4] for k in range(4)]
        assert not given & {i for run in family.runs for i in run.answers("val").ids}
    assert not any("test" in read.split("+") for read in view.reads)


def test_repeats_of_given_splits_say_what_varies(tmp_path):
    said = []
    sweep(view_of(splits="given"), "linear", tmp_path / "s", repeats=2, fractions="0.5,1", say=said.append)
    assert any("only the fraction and the order of batches vary" in line for line in said)


def rows_of(view, order, failed=(), **more):
    """The view with its rows in another order, without those that could not be read."""
    keep = np.array([i for i in order if i not in failed])
    lists = {name: getattr(view, name) for name in ("ids", "splits", "groups")}
    changed = {name: values and [values[i] for i in keep] for name, values in lists.items()}
    changed |= {"features": {name: x[torch.from_numpy(keep)] for name, x in view.features.items()}}
    changed |= {"labels": view.labels[keep], "digests": view.digests[keep]}
    changed |= {"failed": [{"id": view.ids[i], "reason": "torn"} for i in failed]}
    return replace(view, **changed | more)


def other_view(view, order, failed=(), **more):
    """The same images through another backbone: other features, another order, some not readable."""
    weight = torch.from_numpy(np.random.default_rng(9).normal(size=(8, 6))).float()
    other = rows_of(view, order, failed, fingerprint="b" * 64, label="resnet-toy/toy")
    return replace(other, features={name: (x.float() @ weight).half() for name, x in other.features.items()}, **more)


def division(run):
    """Image → split, of those that the run used."""
    with (run.path / "splits.csv").open(newline="") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file) if row["split"]}


def test_views_in_other_orders_that_lack_images_are_divided_alike(tmp_path):
    first = view_of(groups=[f"patient {i // 3}" for i in range(150)])
    order = np.random.default_rng(1).permutation(150)
    second = other_view(first, order, failed=(3, 77))
    first = rows_of(first, range(150), failed=(40,))
    said = []
    found = sweep(
        [first, second], "linear", tmp_path / "s", lr="1e-3,1e-1", fractions="0.4,1", repeats=2, say=said.append
    )
    assert "images     3 that not every view holds are left out of all" in said
    assert {f.view for f in found.families} == {"vit-toy/toy", "resnet-toy/toy"}
    names = {}
    for family in found.families:
        for run in family.runs:
            used = division(run)
            assert names.setdefault((family.fraction, run.config["sweep"]["repeat"]), used) == used


def test_views_named_in_another_order_are_refused_where_that_would_divide_them_otherwise(tmp_path):
    first = view_of()
    second = other_view(first, np.random.default_rng(1).permutation(150))
    sweep([first, second], "linear", tmp_path / "s")
    with pytest.raises(RunError, match="another first view in --features"):
        sweep([second, first], "linear", tmp_path / "s")


def test_views_of_other_images_or_labels_say_what_differs(tmp_path):
    first, order = view_of(), np.arange(150)
    wrong = {
        r"not of the same images: 2 of vit-toy/toy are not in resnet-toy/toy \(the first: img/0003.png\)": replace(
            other_view(first, order, failed=(3, 77)), failed=[]
        ),
        r"other labels for 1 of 150 images \(the first: img/0005.png\)": other_view(first, order),
        "other classes": other_view(first, order, classes=["a", "b"]),
        "other splits for 150 of 150": other_view(first, order, splits=["train"] * 150),
        "other groups for": other_view(first, order, groups=["one"] * 150),
    }
    wrong[r"other labels for 1 of 150 images \(the first: img/0005.png\)"].labels[5] ^= 1
    for message, second in wrong.items():
        with pytest.raises(ProtocolError, match=message):
            sweep([first, second], "linear", tmp_path / "s")


def test_the_same_features_under_two_names_are_refused_and_named_twice_count_once(tmp_path):
    view = view_of()
    assert len(sweep([view, view], "linear", tmp_path / "s").families) == 1
    with pytest.raises(BadOption, match="vit-toy/toy and vit-toy/copy are of one store"):
        sweep([view, replace(view, path=Path("copy.h5"), label="vit-toy/copy")], "linear", tmp_path / "t")


def test_copies_of_an_image_and_hashed_ids_are_matched(tmp_path):
    digests = np.array([f"{i - (i % 10 == 1):032x}".encode() for i in range(150)])
    first = view_of(digests=digests)
    first.labels[1::10] = first.labels[0::10]
    order = np.random.default_rng(2).permutation(150)
    second = other_view(first, order)
    hashed = replace(second, ids=[f"hash {i}" for i in range(150)])
    for number, other in enumerate((second, hashed)):
        found = sweep([first, other], "linear", tmp_path / str(number))
        assert len({run.config["splits"]["digest"] for f in found.families for run in f.runs}) == 1


def test_lr_is_chosen_for_each_view_by_itself(tmp_path):
    first = view_of(n=300)
    second = other_view(first, np.arange(300))
    second.features = {name: (first.features[name].float() * 1e-3).half() for name in first.features}
    found = sweep([first, second], "linear", tmp_path / "s", lr="1e-5,1e-1", epochs=10, select="nll")
    lr = {f.view: f.runs[0].config["settings"]["lr"] for f in found.families}
    assert lr["resnet-toy/toy"] == 1e-1
    assert {r["view"] for r in found.rows} == set(lr)


def test_a_head_that_does_not_stay_finite_is_a_row_that_says_so_and_no_candidate(tmp_path):
    view = view_of()
    view.features["cls"] *= 100
    found = sweep(view, "mlp", tmp_path / "s", lr="1e-3,1e30", seeds=2)
    failed = [row for row in found.rows if row["failed"]]
    assert {row["settings"]["lr"] for row in failed} == {1e30}
    assert all(row["val"] is None for row in failed)
    assert found.families[0].runs[0].config["settings"]["lr"] == 1e-3
    with pytest.raises(ProtocolError, match=r"No setting of any head worked.*rows\.jsonl says why"):
        sweep(view, "mlp", tmp_path / "none", lr="1e30")


def test_multilabel_sweeps_over_folds_and_fractions(tmp_path):
    found = sweep(label_view(n=200), "linear", tmp_path / "s", folds=2, fractions="0.3,1", lr="1e-3,1e-2")
    assert len(found.rows) == 8
    assert {len(f.runs) for f in found.families} == {2}


def test_untrained_views_bring_the_controls_once(tmp_path):
    found = sweep(view_of(untrained=True), "linear,large", tmp_path / "s", fractions="0.5,1", repeats=2)
    for family in found.families:
        have = [bool(run.metrics["controls"]) for run in sorted(family.runs, key=lambda r: r.config["sweep"]["repeat"])]
        assert have == ([True, False] if family.fraction == 1 else [False, False])


def test_the_record_says_what_was_asked_each_time(tmp_path):
    sweep(view_of(), "linear", tmp_path / "s")
    found = sweep(view_of(), "linear", tmp_path / "s", lr="1e-3..1e-1:3", seeds=2)
    record = json.loads((found.path / "sweep.json").read_text())
    assert [each["seeds"] for each in record["asked"]] == [1, 2]
    assert record["command"].startswith(
        "featurecache ablate --heads linear --features vit-toy/toy --lr 0.001,0.01,0.1 --seeds 2"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": "fast"}, "--lr"),
        ({"lr": "0"}, "--lr"),
        ({"dropout": "1.5"}, "--dropout"),
        ({"fractions": "0,1"}, "--fraction"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"folds": 1}, "--folds is 1"),
        ({"optimizer": "rmsprop"}, "'rmsprop' is none of adam"),
        ({"seed": 3}, "--seed is for one head"),
        ({"search": "optuna"}, "go together"),
        ({"trials": 3}, "go together"),
        ({"search": "grid", "trials": 3}, "it is optuna, or left out"),
        ({"lr": "1e-4..1e-2"}, "for --search"),
        ({"search": "optuna", "trials": 3}, "nothing to choose for linear"),
        ({"lrr": 3}, "no such option"),
    ],
)
def test_a_mistaken_option_is_named_before_anything_is_written(tmp_path, options, said):
    with pytest.raises(BadOption, match=said):
        sweep(view_of(), "linear", tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_search_stopped_between_results_of_a_batch_goes_on_with_that_batch(tmp_path, monkeypatch):
    options = SEARCH | {"trials": 11}
    sweep(view_of(), "linear", tmp_path / "whole", **options)
    begun, told, proposed, tell = [], iter(range(100)), heads.sweeps.search._proposed, heads.sweeps.search._tell

    def noted(study, space, done, count):
        begun.append((done, count))
        return proposed(study, space, done, count)

    def stopping(*words):
        if next(told) == 3:
            raise KeyboardInterrupt
        tell(*words)

    monkeypatch.setattr(heads.sweeps.search, "_proposed", noted)
    monkeypatch.setattr(heads.sweeps.search, "_tell", stopping)
    with pytest.raises(sweep_run.Stopped):
        sweep(view_of(), "linear", tmp_path / "s", **options)
    sweep(view_of(), "linear", tmp_path / "s", **options)
    assert begun == [(0, 8), (8, 3)]
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_a_search_is_enlarged_by_more_trials(tmp_path, monkeypatch):
    sweep(view_of(), "linear", tmp_path / "s", trials=3, **SEARCH)
    asked = trained(monkeypatch)
    sweep(view_of(), "linear", tmp_path / "s", trials=5, **SEARCH)
    assert len(asked) == 2


def test_a_search_never_looks_at_test(tmp_path):
    """Its labels may be anything: the same settings are tried and chosen."""
    chosen = []
    for flip in (False, True):
        view = view_of(splits="given")
        if flip:
            test = np.array(view.splits) == "test"
            view.labels[test] = 1 - view.labels[test]
        found = sweep(view, "linear", tmp_path / str(flip), trials=9, **SEARCH)
        chosen.append(([r["settings"]["lr"] for r in found.rows], found.families[0].runs[0].config["settings"]["lr"]))
    assert chosen[0] == chosen[1]


def test_a_damaged_storage_says_what_to_delete(tmp_path):
    found = sweep(view_of(), "linear", tmp_path / "s", trials=2, **SEARCH)
    (found.path / "search.db").write_bytes(b"x" * 5000)
    with pytest.raises(RunError, match="Delete it"):
        sweep(view_of(), "linear", tmp_path / "s", trials=3, **SEARCH)


def test_rows_are_found_with_the_set_they_were_trained_in(tmp_path):
    found = sweep(view_of(), "linear", tmp_path / "s", lr="1e-3,1e-2", seeds=2, repeats=2)
    rows = JournalFile(found.path / ROWS)
    for row in rows.rows:
        company = rows.together_with(row["key"])
        assert len(company) == 4
        assert {(r["repeat"], *family_of(r)) for r in company} == {(row["repeat"], *family_of(row))}


KILLED = """
import sys
sys.path[:0] = [{top!r}, {tests!r}]
from support.fake_view import toy_view
from heads import ablate
ablate(toy_view(n=150, noise=3.0), "linear,large,ridge", out=sys.argv[1], batch_size=16, **{options!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 9])
def test_killed_in_the_middle_goes_on_to_the_same_rows_and_bytes(tmp_path, lines):
    options = {"lr": "1e-3,1e-1", "repeats": 8, "epochs": 3, "seeds": 2}
    sweep(view_of(), "linear,large,ridge", tmp_path / "whole", **options)
    top, tests = Path(__file__).parents[3], Path(__file__).parents[2]
    code = KILLED.format(top=str(top), tests=str(tests), options=options)
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], env=os.environ)
    rows = tmp_path / "s" / "rows.jsonl"
    while child.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    before = rows.read_bytes()
    sweep(view_of(), "linear,large,ridge", tmp_path / "s", **options)
    assert rows.read_bytes().startswith(before)
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def cached(tmp_path, monkeypatch):
    """A cache with a view of 60 images; runs and reports go into tmp_path."""
    make_view(tmp_path / "cache", range(60), per_shard=60)
    monkeypatch.setenv("FEATURECACHE_DIR", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(cli.main, ["ablate", *words, "--epochs", "1", "--no-images"])


def test_the_command_trains_compares_and_writes_the_page(tmp_path, monkeypatch):
    cached(tmp_path, monkeypatch)
    done = run("--heads", "linear,large", "--lr", "1e-3,1e-2", "--features", "tiny/set", "--no-controls")
    assert done.exit_code == 0, done.output
    assert "plan       4 heads in 2 groups" in done.stderr
    assert "linear on cls" in done.stdout
    assert "sweep      runs/ablate-set-1/   rows: 4" in done.stdout
    assert (tmp_path / "runs" / "ablate-set-1" / "report.html").is_file()
    assert done.stderr.splitlines()[-1].startswith("next       featurecache predict --run runs/ablate-set-1/heads/")
    words = ("--heads", "linear,large", "--lr", "1e-3,1e-2", "--features", "tiny/set", "--no-controls", "--json")
    record = json.loads(run(*words, "--show-test", "all").stdout)
    assert all(row["test"] for row in record["rows"])
    assert record["sweep"] == "runs/ablate-set-1"
    assert {family["head"] for family in record["families"]} == {"linear", "large"}


def test_the_command_says_what_it_would_do_and_what_it_cannot(tmp_path, monkeypatch):
    cached(tmp_path, monkeypatch)
    dry = run("--heads", "linear", "--features", "tiny/set", "--dry-run")
    assert (dry.exit_code, dry.stdout) == (0, "")
    assert "family     tiny/set cls linear: 1 head" in dry.stderr
    assert not (tmp_path / "runs").exists()
    wrong = run("--heads", "linaer", "--features", "tiny/set")
    assert wrong.exit_code == 2
    assert "no head is called 'linaer'. Near: linear" in wrong.stderr
    assert run("--heads", "linear", "--features", "tiny/set", "--lr", "x").exit_code == 2
