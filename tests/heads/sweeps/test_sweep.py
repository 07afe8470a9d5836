"""Sweeps: what is trained, chosen, said and refused."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builders import make_view
from support.command import call
from support.fake_view import label_view
from support.sweeps import division, sweep, view_of

from featurecache.errors import BadOption, NotInCache, ProtocolError, RunError
from heads.api import ablate, families_in, report, train_head
from heads.evaluation.families import names_of
from heads.settings import Settings
from heads.splits import splits_csv
from heads.sweeps.folder import load_sweep
from heads.training.job import prepare_training
from heads.training.train import run_contents, train_together


def lr_of(family):
    return family.runs[0].config["settings"]["lr"]


def test_heads_with_other_batches_and_epochs_are_what_they_are_alone():
    view = view_of()
    rows = sweep(view, "linear", batch_size="8,32", epochs="1,3", schedule="cosine").rows
    sizes_and_epochs = {(row["settings"]["batch_size"], row["settings"]["epochs"]) for row in rows}
    assert sizes_and_epochs == set(product((8, 32), (1, 3)))
    for row in rows:
        own = Settings.from_dict(row["settings"])
        (fit,) = train_together(prepare_training(view, own), [own])
        assert fit.metrics["val"]["auroc"] == pytest.approx(row["val"]["auroc"], abs=1e-6) and fit.epoch == row["epoch"]


def test_rows_and_chosen_runs_are_what_train_head_gives_alone():
    def alone(settings):
        job = prepare_training(view, Settings.from_dict(settings))
        return run_contents(job, *train_together(job, [Settings.from_dict(settings)]), [])

    view = view_of()
    result = sweep(view, "linear,large,ridge", lr="1e-3,1e-2", weight_decay="0,1e-3", seeds=2, fractions="0.5")
    assert len(result.rows) == 4 * 2 * 2 + 1 and len(result.families) == 3
    for row in result.rows[1::3]:
        metrics = alone(row["settings"]).metrics
        for split in ("val", "test"):
            assert {m: metrics[split][m] for m in row[split]} == pytest.approx(row[split], abs=2e-4), row["head"]
    for run in (run for family in result.families for run in family.runs):
        contents = alone(run.config["settings"])
        for name, tensor in load_file(run.path / "head.safetensors").items():
            assert torch.allclose(tensor, contents.tensors[name], atol=1e-5, rtol=1e-5)
        assert (run.path / "splits.csv").read_text() == splits_csv(view.ids, contents.splits)


def test_a_report_shows_a_head_once_that_is_given_alone_and_in_a_sweep():
    """Otherwise it would be better than itself, which is there as a mean over seeds."""
    view = view_of()
    same = {"epochs": 2, "batch_size": 16, "report": False}
    alone = {seed: train_head(view, "linear", seed=seed, **same) for seed in (0, 7)}
    result = sweep(view, "linear", epochs=2, seeds=2, outputs="cls")
    written = report([alone[0].path, result.path], out="r")
    assert written.left_out == (f"left out: {alone[0].path} is one of the heads of {result.path}",)
    assert len(json.loads(Path("r/metrics.json").read_text())["families"]) == 1
    families = families_in(alone[7].path, result.path, left_out=(said := []))
    first = result.families[0].runs[0].path.name
    assert names_of(families) == [f"linear on cls ({first} and 1 more)", f"linear on cls ({alone[7].path.name})"]
    assert not said


def test_the_setting_of_a_family_is_the_best_on_val_over_its_seeds():
    families = sweep(view_of(), lr="1e-4..1e-1:4", seeds=3, fractions="0.3,1", select="nll").families
    assert len(families) == 2
    for family in families:
        by_lr = defaultdict(list)
        for row in family.tried:
            by_lr[row["settings"]["lr"]].append(row["val"]["nll"])
        best = min(by_lr, key=lambda lr: np.mean(by_lr[lr]))
        assert {run.config["settings"]["lr"] for run in family.runs} == {best}
        assert sorted(run.config["settings"]["seed"] for run in family.runs) == [0, 1, 2]


def test_heads_take_the_outputs_that_fit_them_and_the_rest_is_said():
    lines = []
    families = sweep(view_of(), "linear,large", outputs="cls,tokens", say=lines.append).families
    assert {(f.head, f.output) for f in families} == {("linear", "cls"), ("large", "tokens")}
    assert "left out   vit-toy/toy: linear on tokens; large on cls: they do not fit" in lines
    with pytest.raises(BadOption, match="no features to compare heads on"):
        sweep([], "linear", "t")
    with pytest.raises(BadOption, match="large fits none of --outputs cls"):
        sweep(view_of(), "linear,large", "t", outputs="cls")
    with pytest.raises(NotInCache, match="not pooler"):
        sweep(view_of(), folder="t", outputs="pooler")
    assert not Path("t").exists()


def test_a_solved_head_has_one_row_for_each_draw():
    result = sweep(view_of(), "ridge", lr="1e-3,1e-2", seeds=5, repeats=2, fractions="0.5,1")
    assert [(r["fraction"], r["repeat"]) for r in result.rows] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert {len(family.runs) for family in result.families} == {2}


def test_dropout_is_for_the_heads_that_have_it():
    view = view_of()
    view.features["cls"] = view.features["cls"][:, :4]
    assert [r["settings"]["dropout"] for r in sweep(view, "ridge,mlp", dropout="0,0.5").rows] == [None, 0.0, 0.5]
    with pytest.raises(BadOption, match="--dropout would do nothing"):
        sweep(view, "ridge", "t", dropout="0.5")


def test_choice_at_the_end_of_the_grid_is_said():
    lines = []
    (family,) = sweep(view_of(), lr="1e-6,1e-5", weight_decay="0,1e-9", say=lines.append).families
    end = {1e-6: "smallest", 1e-5: "largest"}[lr_of(family)]
    assert f"({end} tried)" in lines[-1] and "weight decay 0 (" not in lines[-1]


def test_settings_with_fewer_seeds_are_no_candidates():
    lines = []
    sweep(view_of(), lr="1e-4..1e-1:4")
    (family,) = sweep(view_of(), lr="1e-4", seeds=3, say=lines.append).families
    assert lr_of(family) == 1e-4 and "3 settings with other draws or seeds are not compared" in lines[-1]


def test_settings_on_as_many_other_draws_are_not_compared():
    lines = []
    sweep(view_of(), lr="1e-1", repeats=2)
    for lr, again in (("1e-5", {"seeds": 2}), ("1e-2", {"repeats": 2})):
        (family,) = sweep(view_of(), lr=lr, say=lines.append, **again).families
        draws = {(run.config["sweep"]["repeat"], run.config["settings"]["seed"]) for run in family.runs}
        assert draws == ({(0, 0), (0, 1)} if "seeds" in again else {(0, 0), (1, 0)})
        assert "; 1 setting with other draws or seeds is not compared" in lines[-1]


def test_one_of_a_thing_is_no_plural():
    lines = []
    sweep(view_of(), lr="1e-4", say=lines.append)
    sweep(view_of(), lr="1e-4,1e-3", seeds=2, say=lines.append)
    assert [line for line in lines if "1 head in 1 group" in line] and "; 1 is there already" in "".join(lines)
    sweep(view_of(), lr="1e-2", say=lines.append)
    sweep(view_of(), lr="1e-4,1e-3", seeds=2, say=lines.append)
    assert "1 setting with other draws or seeds is not compared" in lines[-1]


def test_a_dry_run_says_the_plan_and_writes_nothing():
    lines = []
    assert sweep(view_of(), "linear,large", seeds=3, lr="1e-3,1e-2", dry_run=True, say=lines.append) is None
    assert not Path("s").exists() and "family     vit-toy/toy cls linear: 6 heads" in lines
    assert any(line.startswith("plan       12 heads in 2 groups") for line in lines)


def test_fractions_are_nested_and_share_val_and_test():
    parts = {}
    for family in sweep(view_of(), fractions="0.1,0.5,1", repeats=2).families:
        for run in family.runs:
            used, repeat = division(run), run.config["sweep"]["repeat"]
            for s in ("train", "val", "test"):
                parts[repeat, family.fraction, s] = {i for i, split in used.items() if split == s}
    for repeat in (0, 1):
        assert parts[repeat, 0.1, "train"] < parts[repeat, 0.5, "train"] < parts[repeat, 1.0, "train"]
        assert all(parts[repeat, 0.1, s] == parts[repeat, 1.0, s] for s in ("val", "test"))
    assert parts[0, 1.0, "test"] != parts[1, 1.0, "test"]


def test_folds_test_every_image_once_and_leave_the_given_test_alone():
    view = view_of(splits="given")
    given = {i for i, s in zip(view.ids, view.splits, strict=True) if s == "test"}
    for family in sweep(view, "linear,ridge", folds=4).families:
        tested = [i for run in family.runs for i in run.answers("test").ids]
        assert sorted(tested) == sorted(set(view.ids) - given)
        assert sorted(run.config["splits"]["fold"] for run in family.runs) == [[k, 4] for k in range(4)]
        assert not given & {i for run in family.runs for i in run.answers("val").ids}
    assert not any("test" in read.split("+") for read in view.reads)


def test_repeats_of_given_splits_say_what_varies():
    lines = []
    sweep(view_of(splits="given"), repeats=2, fractions="0.5,1", say=lines.append)
    assert any("only the fraction and the order of batches vary" in line for line in lines)


def test_a_head_that_does_not_stay_finite_is_a_row_that_says_so_and_no_candidate():
    view = view_of()
    view.features["cls"] *= 100
    result = sweep(view, "mlp", lr="1e-3,1e30", seeds=2)
    failed = [row for row in result.rows if row["failed"]]
    assert {row["settings"]["lr"] for row in failed} == {1e30} and all(row["val"] is None for row in failed)
    assert lr_of(result.families[0]) == 1e-3
    with pytest.raises(ProtocolError, match=r"cls mlp: no setting of it worked on .*\. none/rows\.jsonl has a line"):
        sweep(view, "mlp", "none", lr="1e30")
    with pytest.raises(RunError, match=r"No head of the sweep none is chosen: .*: no setting of it worked"):
        families_in("none")


def test_multilabel_sweeps_over_folds_and_fractions():
    result = sweep(label_view(n=200), folds=2, fractions="0.3,1", lr="1e-3,1e-2")
    assert len(result.rows) == 8 and {len(family.runs) for family in result.families} == {2}


def test_untrained_views_bring_the_controls_once():
    for family in sweep(view_of(untrained=True), "linear,large", fractions="0.5,1", repeats=2).families:
        have = [bool(run.metrics["controls"]) for run in sorted(family.runs, key=lambda r: r.config["sweep"]["repeat"])]
        assert have == ([True, False] if family.fraction == 1 else [False, False])


def test_controls_join_a_sweep_that_was_made_without_them():
    (family,) = sweep(view_of(), controls=False).families
    before = (family.runs[0].path / "metrics.csv").read_text()
    sweep(view_of(), "linear,ridge", controls=True)
    (run, *_), (other, *_) = (family.runs for family in load_sweep("s").families)
    run.check()
    assert run.metrics["controls"] == other.metrics["controls"]
    assert run.config["created"] == family.runs[0].config["created"]
    table = (run.path / "metrics.csv").read_text()
    assert table.startswith(before) and table[len(before) :] in (other.path / "metrics.csv").read_text()
    assert table[len(before) :].startswith('"chance","val"') and '"pixels, ' not in before


def test_the_record_says_what_was_asked_each_time():
    sweep(view_of())
    sweep(view_of(), lr="1e-3..1e-1:3", seeds=2)
    record = json.loads(Path("s/sweep.json").read_text())
    assert [each["seeds"] for each in record["asked"]] == [1, 2]
    command = "featurecache ablate --heads linear --features vit-toy/toy --lr 0.001,0.01,0.1 "
    assert record["commands"][1].startswith(command) and " --seeds 2" in record["commands"][1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": "0"}, "--lr"),
        ({"gated": True}, "--gated would do nothing"),
        ({"fractions": "0,1"}, "--fraction"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"folds": 1}, "--folds is 1"),
        ({"optimizer": "rmsprop"}, "'rmsprop' is none of adam"),
        ({"seed": 3}, "--seed is for one head"),
        ({"search": "optuna"}, "go together"),
        ({"trials": 3}, "go together"),
        ({"search": "grid", "trials": 3}, "it is optuna, or left out"),
        ({"search": "optuna", "trials": 3}, "nothing to choose for linear"),
        ({"lrr": 3}, "no such option"),
    ],
)
def test_a_mistaken_option_is_named_before_anything_is_written(options, says):
    with pytest.raises(BadOption, match=says):
        sweep(view_of(), **options)
    assert not Path("s").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``featurecache ablate`` on a cache with a view of 60 images."""
    make_view(tmp_path / "cache", range(60), per_shard=60)
    monkeypatch.setenv("FEATURECACHE_DIR", str(tmp_path / "cache"))
    same = ("--features", "tiny/set", "--epochs", "1", "--no-images")
    return lambda *words: call("ablate", *words, *same)


def test_the_command_trains_compares_and_writes_the_page(run):
    words = ("--heads", "linear,large", "--lr", "1e-3,1e-2", "--no-controls")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "plan       4 heads in 2 groups" in done.stderr and "linear on cls" in done.stdout
    assert "sweep      runs/ablate-set-1/   rows: 4" in done.stdout
    assert Path("runs/ablate-set-1/report.html").is_file()
    assert done.stderr.splitlines()[-1].startswith("next       featurecache predict --run runs/ablate-set-1/heads/")
    record = json.loads(run(*words, "--json", "--show-test", "all").stdout)
    assert all(row["test"] for row in record["rows"]) and record["sweep"] == "runs/ablate-set-1"
    assert {family["head"] for family in record["families"]} == {"linear", "large"}


def test_the_command_says_what_it_would_do_and_what_it_cannot(run):
    dry = run("--heads", "linear", "--dry-run")
    assert (dry.exit_code, dry.stdout) == (0, "") and "family     tiny/set cls linear: 1 head" in dry.stderr
    assert not Path("runs").exists()
    wrong = run("--heads", "linaer")
    assert wrong.exit_code == 2 and "no head is called 'linaer'. Near: linear" in wrong.stderr
    assert run("--heads", "linear", "--lr", "x").exit_code == 2


def test_heads_may_come_from_a_generator():
    lines = []
    assert ablate(view_of(), (head for head in ("linear", "ridge")), dry_run=True, say=lines.append) is None
    assert all(any(head in line for line in lines) for head in ("linear", "ridge"))
