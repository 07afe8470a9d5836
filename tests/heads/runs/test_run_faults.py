"""Runs and sweeps killed, out of disk, or trained by two at once: the same command makes them, and nothing is left.

For longer: FEATURECACHE_FAULT_STEPS=1000 python -m pytest -m "" tests/heads/runs (a quarter of an hour), with
FEATURECACHE_FAULT_SEED for others.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.forks import shared

from heads.runs.folder import in_use

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))
STEPS = int(os.environ.get("FEATURECACHE_FAULT_STEPS", "5"))  # of each test in the slow tier
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

    def steps(self, most: int, seed: int = SEED, calls: tuple[str, ...] = ()) -> list[int]:
        """Some of the events, or of these calls."""
        places = [at for at, (call, *_) in enumerate(self.events) if not calls or call in calls]
        return sorted(random.Random(seed).sample(places, min(most, len(places))))

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


@pytest.mark.parametrize("most", [2, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_killed_at_any_step_the_same_command_makes_it(training, most):
    for at in training.steps(most):
        training.disturb({"at": at, "do": "kill"})


@pytest.mark.parametrize("most", [1, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_killed_within_a_write_and_on_a_full_disk(training, most):
    for at in training.steps(most, SEED + most, calls=("write", "pwrite")):
        training.disturb({"at": at, "do": "torn"})
    for at in training.steps(most, SEED + most, WRITES):
        training.disturb({"at": at, "do": "ENOSPC", "on": True, "calls": WRITES})


@pytest.mark.parametrize("most", [0, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_overwrite_killed_at_any_step_leaves_the_old_run_or_the_new(tmp_path, most):
    (tmp_path / "old").mkdir()
    old, new = Training("train_run", tmp_path / "old"), Training("train_run", tmp_path, seed=1)
    options = {"seed": 1, "overwrite": True, "copy_of": old.folder / "whole"}
    events = new.run("replaced", **options, fault={"at": None}).events
    between = next(at for at, (_, place, _) in enumerate(events) if place.endswith("/old")) + 1  # two renames
    for at in sorted({between, between + 1, *new.steps(most)}):
        place = f"killed-{at}"
        assert new.run(place, **options, fault={"at": at, "do": "kill"}).killed, at
        left, before = new.look(place), old.end["results"]["run/head.safetensors"]
        aside = left["results"].get(".run.partial/old/head.safetensors") == before
        whole = left["results"].get("run/head.safetensors") in (before, new.end["results"]["run/head.safetensors"])
        assert left["damages"] == [] and (aside or whole), at
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


def test_a_folder_that_its_holder_removes_while_another_makes_it_is_made_again(tmp_path, monkeypatch):
    """Path.mkdir finds it there, and no folder any more when it looks what it is: that was said as "File exists"."""
    folder, is_dir = tmp_path / "held", Path.is_dir
    folder.mkdir()

    def gone(path):
        if path == folder:
            monkeypatch.undo()
            folder.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", gone)
    with in_use(folder, "a test"):
        assert len([*folder.iterdir()]) == 1
