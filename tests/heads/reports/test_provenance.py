"""The commands that make a report's numbers again: read back by the command line itself."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import pytest
from support.fake_view import toy_view

import cli
from heads.api import train_head
from heads.reports.provenance import setting_words, train_command

pytestmark = pytest.mark.integration
train = partial(train_head, head="linear", epochs=2, controls=False, report=False)


def test_the_command_that_trained_a_head_is_on_the_page_and_quoted(tmp_path):
    view = toy_view(label="vit toy/my $(view)", path=Path("cache/vit toy/my $(view).h5"))
    words = shlex.split(train_command(train(view, out=tmp_path / "run", lr=3e-4, balance=False, weight_decay=1e-4)))
    assert words[:2] == ["featurecache", "train-head"]
    assert words[words.index("--features") + 1] == "vit toy/my $(view)"
    assert words[words.index("--lr") + 1] == "0.0003" and "--no-balance" in words and "--seed" not in words


def test_classes_that_were_kept_come_back_from_the_command_and_read_as_words(tmp_path):
    run = train(toy_view(n=200, classes=3), out=tmp_path / "run", only=["kind 2", "kind 0"])
    words = shlex.split(train_command(run))[2:]
    assert cli.main.commands["train-head"].make_context("train-head", words).params["only"] == "kind 2,kind 0"
    assert setting_words({"only": ["a", "b"], "lr": 0.1}) == "only a, b · lr 0.1"
