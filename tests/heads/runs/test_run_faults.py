"""Runs and sweeps killed, out of disk, or trained by two at once: the same command makes them, and nothing is left."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.forks import shared

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))
JOBS = ("train_run", "train_network", "train_sweep")
WRITES = ("pwrite", "write", "ftruncate", "mkdir", "rename", "replace", "open", "fsync")


class Training:
    """A job undisturbed: its events, and what it leaves."""

    def __init__(self, job: str, folder: Path, **options) -> None:
        self.job, self.folder, self.options, self.forks = job, folder, options, shared()
        answer = self.run("whole", fault={"at": None})
        self.events, self.end = answer.events, self.look("whole")
        assert self.end["damages"] == [] and self.events

    def run(self, place: str, **how):
        (self.folder / place).mkdir(exist_ok=True)
        return self.forks.run(self.job, cache=self.folder / place, **{**self.options, **how})

    def look(self, place: str):
        return self.forks.done("look_at_runs", cache=self.folder / place)

    def steps(self, most: int | None) -> list[int]:
        """Of the events all, or some."""
        if most is None:
            return list(range(len(self.events)))
        return sorted(random.Random(SEED).sample(range(len(self.events)), min(most, len(self.events))))

    def disturb(self, fault) -> None:
        """After the fault nothing is damaged; the same command ends as if there had been none."""
        place = f"{fault['do']}-{fault['at']}"
        answer = self.run(place, fault=fault)
        assert answer.killed or answer.code == 0, (fault, answer)
        assert self.look(place)["damages"] == [], (fault, self.events[fault["at"]])
        again = self.run(place)
        assert (again.code, again.error) == (0, None), (fault, self.events[fault["at"]], again)
        assert self.look(place) == self.end, (fault, self.events[fault["at"]])


@pytest.fixture(scope="module", params=JOBS)
def training(request, tmp_path_factory):
    return Training(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_at_any_step_the_same_command_makes_it(training, most):
    for at in training.steps(most):
        training.disturb({"at": at, "do": "kill"})


@pytest.mark.parametrize("most", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_within_a_write_and_on_a_full_disk(training, most):
    writes = [at for at in training.steps(None) if training.events[at][0] in ("write", "pwrite")]
    for at in random.Random(SEED).sample(writes, min(most, len(writes))):
        training.disturb({"at": at, "do": "torn"})
    for at in random.Random(SEED + 1).sample(training.steps(None), most):
        training.disturb({"at": at, "do": "ENOSPC", "on": True, "calls": WRITES})


@pytest.mark.parametrize("most", [6, pytest.param(None, marks=pytest.mark.slow)])
def test_overwrite_killed_at_any_step_leaves_the_old_run_or_the_new(tmp_path, most):
    (tmp_path / "old").mkdir()
    old = Training("train_run", tmp_path / "old")
    new = Training("train_run", tmp_path, seed=1)
    options = {"seed": 1, "overwrite": True, "copy_of": old.folder / "whole"}
    events = new.run("replaced", **options, fault={"at": None}).events
    renames = [at for at, (call, *_) in enumerate(events) if call == "rename"]
    steps = range(len(events)) if most is None else {*renames, *(at + 1 for at in renames)}
    for at in sorted(steps):
        place = f"killed-{at}"
        assert new.run(place, **options, fault={"at": at, "do": "kill"}).killed, at
        left = new.look(place)
        assert (left["damages"] == [] and left["results"] in (
            old.end["results"], new.end["results"],
            {name.replace("run/", ".run.partial/old/", 1): h for name, h in old.end["results"].items()},
        )) or any(".partial/new/" in name for name in left["results"]), at  # fmt: skip
        again = new.run(place, seed=1, overwrite=True)
        assert (again.code, again.error) == (0, None), (at, again)
        assert new.look(place) == new.end, at


@pytest.mark.parametrize("number", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_of_several_at_once_one_trains_and_none_harms_it(training, number):
    place = training.folder / f"at-once-{number}"
    place.mkdir()
    started = [training.forks.start(training.job, cache=place, fault=None) for _ in range(number)]
    answers = [training.forks.wait(each) for each in started]
    assert all(answer.code == 0 for answer in answers)
    errors = [answer.error for answer in answers if answer.error]
    assert len(errors) < number and all(error.startswith("InUse: ") for error in errors), errors
    assert training.look(place.name) == training.end
