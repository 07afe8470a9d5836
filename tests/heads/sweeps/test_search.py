"""``--search optuna``: trials that go on where they were, are enlarged, and never look at test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.plant import flip
from support.sweeps import content, sweep, trained, view_of

from featurecache.errors import BadOption, RunError, Stopped
from heads.sweeps import search
from heads.sweeps.folder import load_sweep
from heads.sweeps.verify import verify_runs

SEARCH = {"lr": "1e-4..1e-1", "search": "optuna", "epochs": 1}


def test_a_stopped_search_goes_on_to_the_same_rows_and_bytes():
    options = {**SEARCH, "weight_decay": "0,1e-3", "trials": 18}
    sweep(view_of(), "linear,ridge", "whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        trained(patch, stop=2)
        sweep(view_of(), "linear,ridge", **options)
    sweep(view_of(), "linear,ridge", **options)
    assert content() == content("whole")
    lrs = {row["settings"]["lr"] for row in load_sweep("whole").rows if row["head"] == "linear"}
    assert len(lrs) == 18 and all(1e-4 <= lr <= 1e-1 for lr in lrs)


def test_a_search_stopped_between_results_of_a_batch_goes_on_with_that_batch(monkeypatch):
    options = SEARCH | {"trials": 11}
    sweep(view_of(), folder="whole", **options)
    begun, results, propose, tell = [], iter(range(100)), search._proposed, search._tell

    def noted(study, space, done, count):
        begun.append((done, count))
        return propose(study, space, done, count)

    def stopping(*words):
        if next(results) == 3:
            raise KeyboardInterrupt
        tell(*words)

    monkeypatch.setattr(search, "_proposed", noted)
    monkeypatch.setattr(search, "_tell", stopping)
    with pytest.raises(Stopped):
        sweep(view_of(), **options)
    sweep(view_of(), **options)
    assert begun == [(0, 8), (8, 3)] and content() == content("whole")


def test_batches_epochs_and_equal_steps_are_searched():
    space = {"batch_size": "8..64", "epochs": "1..5:+2", "dropout": "0..0.4:+0.1", "schedule": "constant,linear"}
    rows = sweep(view_of(), "mlp", trials=12, search="optuna", **space).rows
    tried = {name: {row["settings"][name] for row in rows} for name in space}
    assert len(tried["batch_size"]) > 4 and all(type(size) is int and 8 <= size <= 64 for size in tried["batch_size"])
    assert tried["epochs"] <= {1, 3, 5} and tried["dropout"] <= {0.0, 0.1, 0.2, 0.3, 0.4}
    assert all(len(tried[name]) > 1 for name in space)


def test_a_search_is_enlarged_by_more_trials(monkeypatch):
    sweep(view_of(), trials=3, **SEARCH)
    new = trained(monkeypatch)
    sweep(view_of(), trials=5, **SEARCH)
    assert len(new) == 2


def test_a_search_never_looks_at_test():
    """Its labels may be anything: the same settings are tried and chosen."""
    chosen = []
    for other in (False, True):
        view = view_of(splits="given")
        test = np.array(view.splits) == "test"
        view.labels[test] = (1 - view.labels[test]) if other else view.labels[test]
        result = sweep(view, folder=str(other), trials=9, **SEARCH)
        lrs = [row["settings"]["lr"] for row in result.rows]
        chosen.append((lrs, result.families[0].runs[0].config["settings"]["lr"]))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("place", [3, 40, -3])
def test_a_flipped_bit_in_the_batches_of_an_unfinished_search_is_named_and_costs_that_line(place):
    """By ``verify`` and when the command is typed again; heads stay, and the search ends as it would have."""
    options = {**SEARCH, "trials": 18}
    sweep(view_of(), folder="whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        trained(patch, stop=2)
        sweep(view_of(), **options)
    batches = Path("s/search.jsonl")
    flip(batches, place)
    (damage,) = verify_runs([Path("s")]).damages
    assert damage.path == batches and "Delete that line" in damage.what
    assert "s" in load_sweep("s").unfinished and len(load_sweep("s").rows) == 16  # a report says so; heads are there
    with pytest.raises(RunError, match=r"search\.jsonl is damaged: line \d"):
        sweep(view_of(), **options)
    number = int(re.search(r"line (\d+)", damage.what)[1])
    lines = batches.read_bytes().splitlines(keepends=True)
    batches.write_bytes(b"".join(lines[: number - 1] + lines[number:]))
    with pytest.MonkeyPatch.context() as patch:
        new = trained(patch)
        sweep(view_of(), **options)
    assert content() == content("whole") and len(new) < 18


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[optuna\]'"):
        sweep(view_of(), trials=2, **SEARCH)
