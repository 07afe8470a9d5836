"""The folder of a sweep: stopped, killed, torn, damaged, enlarged, of other images, at once; what is there is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.plant import flip
from support.sweeps import content, rows_of, sweep, trained, view_of

from featurecache.errors import InUse, RunError, Stopped
from featurecache.files.locks import exclusive_lock
from heads.api import ablate
from heads.runs.folder import write_record
from heads.sweeps.folder import load_sweep
from heads.sweeps.journal import ROWS


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_stopped_sweep_goes_on_to_the_same_rows_and_the_same_bytes(calls):
    options = {"lr": "1e-3,1e-1", "repeats": 2}
    sweep(view_of(), "linear,large", "whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="the same command continues"):
        trained(patch, stop=calls)
        sweep(view_of(), "linear,large", **options)
    sweep(view_of(), "linear,large", **options)
    assert content() == content("whole")


def test_a_torn_line_or_set_is_trained_again():
    options = {"lr": "1e-3,1e-2", "seeds": 2}
    file = sweep(view_of(), "linear,mlp", **options).path / ROWS
    data, wanted = file.read_bytes(), content()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (7, ends[1], ends[3] - 1, ends[6] + 5):
        file.write_bytes(data[:cut])
        sweep(view_of(), "linear,mlp", **options)
        assert content() == wanted


def test_a_chosen_run_that_was_lost_is_trained_again_to_the_same_bytes():
    options = {"lr": "1e-3,1e-2,1e-1", "seeds": 2}
    families, wanted = sweep(view_of(), "linear,large", **options).families, content()
    for family in families:
        shutil.rmtree(family.runs[0].path)
    assert load_sweep("s").families == []
    rows = Path("s", ROWS).read_bytes()
    sweep(view_of(), "linear,large", **options)
    assert content() == wanted and Path("s", ROWS).read_bytes() == rows


def test_a_damaged_head_that_waits_for_the_choice_is_not_believed():
    options = {"lr": "1e-3,1e-2", "repeats": 2}
    sweep(view_of(), folder="whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        trained(patch, stop=1)
        sweep(view_of(), **options)
    for file in Path("s/.unchosen").iterdir():
        flip(file, -3)
    sweep(view_of(), **options)
    assert content() == content("whole") and not Path("s/.unchosen").exists()


def test_an_enlarged_sweep_computes_only_what_is_new(monkeypatch):
    sweep(view_of(), lr="1e-3,1e-2", seeds=2)
    settings = trained(monkeypatch)
    result = sweep(view_of(), "linear,mlp", lr="1e-3,1e-2,1e-1", seeds=3)
    new = {(s.head, s.lr, s.seed) for s in settings}
    assert len(settings) == len(new) == 18 - 4 and len(result.rows) == 18
    assert not new & {("linear", lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1)}
    settings.clear()
    sweep(view_of(), "linear,mlp", lr="1e-3,1e-2,1e-1", seeds=3)
    assert settings == []


def test_keys_do_not_depend_on_folder_or_name_of_the_data_but_on_labels_and_features(tmp_path):
    first, keys = view_of(), {}
    views = {
        "same": first,
        "elsewhere": replace(first, path=tmp_path / "x.h5", source={"data": "other"}),
        "other features": replace(first, fingerprint="1" * 64),
        "other labels": replace(first, labels=1 - first.labels),
    }
    for name, view in views.items():
        (row,) = sweep(view, folder=name).rows
        keys[name] = row["key"]
    assert keys["same"] == keys["elsewhere"] and len(set(keys.values())) == 3


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"n": 140}, {}, r"other images or labels \(150 there, 140 here\)"),
        ({}, {"select": "nll"}, "select auroc, not nll"),
        ({}, {"split_seed": 4}, "split seed 0, not 4"),
        ({}, {"folds": 3}, "folds none, not 3"),
        ({}, {"positive": "kind 0"}, "positive none, not kind 0"),
    ],
)
def test_a_sweep_of_other_images_or_protocol_is_refused(change, options, says):
    sweep(view_of())
    with pytest.raises(RunError, match=says):
        sweep(view_of(**change), **options)


def test_a_folder_of_other_things_and_damaged_records_are_refused():
    Path("s").mkdir()
    Path("s/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="no sweep"):
        sweep(view_of())
    with pytest.raises(RunError, match=r"is no sweep: it has no sweep\.json"):
        load_sweep("s")
    for record, says in (({"format": 9}, "sweep format 9"), ({"views": {}}, "no proper frame")):
        write_record(Path("s/sweep.json"), record)
        with pytest.raises(RunError, match=says):
            load_sweep("s")
    Path("s/sweep.json").write_text('{"format": 1, "views": {}}')
    with pytest.raises(RunError, match=r"sweep\.json is not the text that was written"):
        load_sweep("s")


def test_a_sweep_killed_in_its_first_moment_begins_again():
    Path("s").mkdir()
    Path("s/.exclusive-0123456789abcdef").write_text('{"pid": 0}')
    Path("s/.1c1de84e36dac523.c2e916c0.tmp").write_text("{")
    sweep(view_of())
    assert not [path.name for path in Path("s").iterdir() if path.name.startswith(".")]


def test_two_heads_of_ones_own_with_one_class_name_are_two_families(here, monkeypatch):
    code = "from torch import nn\nclass Own(nn.Linear):\n    def __init__(self, shape, classes):\n"
    for name in ("one_of_two_heads", "other_of_two_heads"):
        (here / f"{name}.py").write_text(f"{code}        super().__init__(shape[0], classes)\n")
    monkeypatch.syspath_prepend(here)
    heads = "python:one_of_two_heads:Own,python:other_of_two_heads:Own"
    result = sweep(view_of(), heads, outputs="cls")
    assert [family.head for family in result.families] == heads.split(",") and result.unfinished == {}


def test_a_head_whose_code_was_changed_begins_a_sweep_of_its_own(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    code = "from torch import nn\nclass Own(nn.Linear):\n    def __init__(self, shape, classes):\n"
    (here / "edited_head.py").write_text(f"{code}        super().__init__(shape[0], classes)\n")
    words = {"heads": "linear,python:edited_head:Own", "outputs": "cls", "epochs": 1}
    assert ablate(view_of(), **words).path.name == "ablate-toy-1"
    monkeypatch.setattr("heads.sweeps.folder.code_hash", lambda head: "other" if ":" in head else None)
    with pytest.raises(RunError, match="with another version of python:edited_head:Own"):
        ablate(view_of(), out="runs/ablate-toy-1", **words)
    assert ablate(view_of(), **words).path.name == "ablate-toy-2"
    assert ablate(view_of(), **words | {"heads": "linear"}).path.name == "ablate-toy-1"


def test_another_budget_of_memory_trains_again_and_both_are_one_setting():
    options = {"lr": "1e-3,1e-1", "seeds": 2}
    sweep(view_of(), "linear", **options)
    result = sweep(view_of(), "linear", ram=1e-6, **options)
    (family,) = result.families
    assert len(result.rows) == 8 and len(family.tried) == 4 and len(family.runs) == 2 and not result.unfinished
    assert {run.config["sweep"]["key"] for run in family.runs} <= {row["key"] for row in result.rows[4:]}
    small = content()[1]
    for run in family.runs:
        shutil.rmtree(run.path)
    sweep(view_of(), "linear", ram=1e-6, **options)
    assert content()[1] == small
    assert load_sweep("s").record["ram"] > 1e-3


def test_a_head_that_was_lost_is_not_made_of_images_in_another_order():
    view = view_of(splits="given")
    (family,) = sweep(view, lr="1e-1").families
    shutil.rmtree(family.runs[0].path)
    with pytest.raises(RunError, match="what it was trained on is no longer there as it was"):
        sweep(rows_of(view, range(149, -1, -1)), lr="1e-9")
    assert not family.runs[0].path.exists()


def test_two_at_once_in_one_folder_are_refused():
    sweep(view_of())
    with exclusive_lock(Path("s"), "ablate"), pytest.raises(InUse, match="ablate by process"):
        sweep(view_of(), seeds=2)


def test_without_out_the_same_sweep_goes_on_and_another_gets_a_folder_of_its_own():
    views = [(view_of(), 1), (view_of(), 2), (view_of(n=140), 1)]
    names = [ablate(view, "linear", epochs=1, seeds=seeds).path.name for view, seeds in views]
    assert names == ["ablate-toy-1", "ablate-toy-1", "ablate-toy-2"]
