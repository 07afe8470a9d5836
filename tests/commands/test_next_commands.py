"""Every command that a session prints as the next one to type runs: all are collected from real sessions, and those
that these print in turn."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from support.command import call
from support.pictures import image_folder

import cli

pytestmark = pytest.mark.slow
NEXT = re.compile(r"^next       (featurecache .+)$", re.MULTILINE)
VIT = "--backbone vit-demo --random-weights"
SESSION = (
    f"why {VIT} --data chest", f"extract {VIT} --data chest --dry-run", f"extract {VIT} --data chest",
    f"extract {VIT} --data chest --limit 40 --copies 1 --augment flip", "ls", "info",
    "info vit-demo/chest", "info --backbone vit-demo", "info --head large", "info --head cnn-cifar", "leaks chest",
    "train-head --head linear --epochs 2 --features chest", "train-head --head large --epochs 2 --features chest",
    "train-baseline --arch cnn-cifar --data chest --epochs 1",
    "ablate --heads linear,ridge --epochs 2 --no-controls --dry-run",
    "train-baseline --arch finetune:vit-demo --random-weights --data chest --epochs 1 --image-size 32",
    "ablate --heads linear,ridge --epochs 2 --out runs/sweep", "info runs/chest-linear-1", "report runs/chest-linear-1",
    "report runs/sweep", "report runs/chest-linear-1 runs/chest-large-1",
    "evaluate --run runs/chest-linear-1 --features chest", "predict --run runs/chest-linear-1 chest/ill/000.png",
    "explain --run runs/chest-large-1 chest/ill/000.png", "verify", "repair", "gc", "compact chest",
    "export chest chest.npz", "import own.npz --name own", "merge other/cache", "study",
    "study medical-mnist --quick --dry-run", "rm chest-limit-40 --yes", f"why {VIT} --image-size 32",
)  # fmt: skip
FILL = {"FOLDER": "chest", "IMAGE…": "chest/ill/000.png", "NAME": "mine", "DIR": "chest"}  # what a reader puts in


def run(words: list[str]) -> str:
    result = call(*words)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    return result.stderr


def test_every_next_command_runs_and_so_do_those_that_it_prints(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATURECACHE_DIR", raising=False)
    image_folder(tmp_path / "chest", 60)
    features, labels = np.random.default_rng(0).normal(size=(60, 8)).astype("f4"), np.arange(60) % 2
    np.savez(tmp_path / "own.npz", features=features, labels=labels, ids=np.arange(60).astype(str))
    (tmp_path / "other").mkdir()
    run(["extract", *shlex.split(VIT), "--data", "chest", "--cache", "other/cache", "--name", "there"])
    todo, done, without = [shlex.split(line) for line in SESSION], set(), set()
    while todo:
        words = todo.pop(0)
        for line in NEXT.findall(run(words)):
            following = [FILL.get(word, word) for word in shlex.split(line)[1:]]
            key = tuple(following)
            if key in done | without:
                continue
            if needs_more(following):  # weights, or minutes: its words are right
                without.add(key)
                cli.main.commands[following[0]].make_context(
                    following[0], following[1:], parent=click.Context(cli.main)
                )
                continue
            done.add(key)
            todo.insert(0, following)  # before what comes later in the session takes away what it is about
    names = {words[0] for words in done}
    assert names >= {"extract", "train-head", "predict", "info", "report", "verify", "ls", "gc", "import"}, names
    assert {words[0] for words in without} <= {"extract", "study", "train-baseline"}, without


def needs_more(words: list[str]) -> bool:
    """A backbone without its weights here, or a whole study."""
    study = words[0] == "study" and "--dry-run" not in words
    return study or (words[0] == "extract" and "--random-weights" not in words and "--weights" not in words)
