"""Data with two readings: at a terminal a command asks which, elsewhere it says what to type and ends with 2."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from support.command import call
from support.small_sets import listed, pictures

import cli
from featurecache.commands import terminal
from featurecache.formatting import join_names, names_in

WORDS = ("extract", "--backbone", "vit-demo", "--random-weights", "--dry-run", "--json", "--data", "scans")


@pytest.fixture
def scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "scans", "CT/lung/1.png", "CT/liver/2.png", "MR/lung/3.png")


@pytest.mark.integration
def test_elsewhere_both_commands_are_said_and_the_code_is_2(scans):
    result = call(*WORDS)
    assert result.exit_code == 2 and "may be CT, MR or, below these, liver, lung" in result.stderr
    typed = "featurecache extract --backbone vit-demo --data scans --random-weights --dry-run --classes-at"
    assert [f"the classes are {names}: {typed} {level}" in result.stderr
            for names, level in (("CT, MR", 1), ("liver, lung", 2))] == [True, True]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize(("answer", "classes"), [("1", ["CT", "MR"]), ("2", ["liver", "lung"]), ("", None)])
def test_at_a_terminal_it_asks_which_and_takes_none_by_default(scans, monkeypatch, answer, classes):
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    result = CliRunner().invoke(cli.main, WORDS, input=f"{answer}\n")
    assert "  2  the classes are liver, lung" in result.stderr
    assert result.exit_code == (0 if classes else 2)
    assert not classes or json.loads(result.stdout)["data"]["classes"] == classes


SEVERAL = "path,finding\na.png,mass;cyst\nb.png,nodule;cyst\nc.png,nodule;mass\n"
SIGNED = "path,finding\na.png,1\nb.png,-1\nc.png,1\n"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("cells", "answer", "made"),
    [
        (SEVERAL, "1", ("multiclass", ["mass;cyst", "nodule;cyst", "nodule;mass"])),
        (SEVERAL, "2", ("multilabel", ["cyst", "mass", "nodule"])),
        (SIGNED, "1", ("binary", ["-1", "1"])), (SIGNED, "3", ("binary", ["0", "1"])), (SIGNED, "", None),
    ],
)  # fmt: skip
def test_cells_with_two_readings_are_asked_about_at_a_terminal(tmp_path, monkeypatch, cells, answer, made):
    monkeypatch.chdir(tmp_path)
    listed(tmp_path / "t", cells)
    words = (*WORDS[:-1], "t/list.csv")
    alone = call(*words)
    option = "--task multilabel" if cells is SEVERAL else "--uncertain zero"
    assert alone.exit_code == 2 and "featurecache extract --backbone vit-demo --data t/list.csv" in alone.stderr
    assert f"--dry-run {option}\n" in alone.stderr
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    result = CliRunner().invoke(cli.main, words, input=f"{answer}\n")
    assert result.exit_code == (0 if made else 2), result.stderr
    record = json.loads(result.stdout)["data"] if made else None
    assert not made or (record["task"], record["classes"]) == made


@pytest.mark.integration
@pytest.mark.parametrize(("answer", "classes", "images"), [("1", ["left", "right"], 2), ("2", [], 1)])
def test_at_a_terminal_a_reading_may_be_other_data(tmp_path, monkeypatch, answer, classes, images):
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    data = pictures(tmp_path / "stereo", "left/1.png", "right/1.png")
    result = CliRunner().invoke(cli.main, (*WORDS[:-1], str(data)), input=f"{answer}\n")
    record = json.loads(result.stdout)["data"]
    assert (record["classes"], record["images"]) == (classes, images)
    monkeypatch.undo()
    assert f"left alone: featurecache extract --backbone vit-demo --data {data}/left" in call(*WORDS[:-1], data).stderr


@pytest.mark.integration
def test_what_was_understood_is_said_before_anything_is_computed(scans):
    result = call(*WORDS[:-3], "--data", "scans", "--classes-at", "2", "--order", "lung,liver")
    assert "understood level 1 not used (CT, MR); classes from level 2 of the folders (liver, lung)" in result.stdout
    record = json.loads(call(*WORDS, "--classes-at", "2", "--order", "lung,liver").stdout)
    assert record["understood"] == record["source"]["understood"]
    assert (record["source"]["order"], record["data"]["classes"]) == (["lung", "liver"], ["lung", "liver"])


@pytest.mark.integration
def test_a_baseline_says_how_its_images_were_read_and_refuses_words_about_none(scans):
    result = call("train-baseline", "--arch", "cnn-cifar", "--order", "a,b")
    assert result.exit_code == 2 and "--order says how --data is read; give --data too" in result.stderr
    result = call("train-baseline", "--arch", "cnn-cifar", "--data", "scans", "--classes-at", "1", "--epochs", "1")
    assert "understood classes from level 1 of the folders (CT, MR)" in result.stderr


@pytest.mark.parametrize("names", [["a", "b"], ["mild, left", 'a"b', "c"], ["\u00fc"]])
def test_names_with_commas_and_quotes_survive_an_option(names):
    assert names_in(join_names(names)) == names
