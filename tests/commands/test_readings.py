"""Data with two readings: at a terminal a command asks which, elsewhere it says what to type and ends with 2."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.command import call
from support.small_sets import listed, pictures, table

from featurecache.commands import terminal
from featurecache.errors import Reading, SeveralReadings

pytestmark = pytest.mark.integration
WORDS = ("extract", "--backbone", "vit-demo", "--random-weights", "--dry-run", "--json", "--data", "scans")


@pytest.fixture
def scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "scans", "CT/lung/1.png", "CT/liver/2.png", "MR/lung/3.png")


@dataclass(frozen=True)
class Question:
    """What is given, what is typed besides, the answers with (task, classes) of each, the options they stand for."""

    data: str | tuple[str, ...]  # cells of a table, or images in folders
    answers: dict[str, tuple[str, list[str]]]
    options: tuple[str, ...]
    typed: tuple[str, ...] = ()


def rows(**columns: list[object]) -> str:
    """A table of images with these columns."""
    lines = zip(*columns.values(), strict=True)
    cells = [",".join([f"{number}.png", *map(str, line)]) for number, line in enumerate(lines)]
    return "\n".join([",".join(["path", *columns]), *cells])


LETTERS = rows(label=["a", "A", "b", "b"])
AGES = rows(label=[20.5 + k for k in range(12)], sex=["f", "m"] * 6, site=[*range(12)])
CAPTIONS = rows(label=[f"a film of {k}" for k in range(12)], note=["x", "y", "x"] * 4)
NUMBERS, FILMS = [f"{20.5 + k}" for k in range(12)], [f"a film of {k}" for k in range(12)]
QUESTIONS = {
    "levels of folders": Question(
        ("CT/lung/1.png", "CT/liver/2.png", "MR/lung/3.png"),
        {"1": ("binary", ["CT", "MR"]), "2": ("binary", ["liver", "lung"])},
        ("extract --backbone vit-demo --data t --random-weights --dry-run --classes-at 1", "--classes-at 2"),
    ),
    "pairs": Question(
        ("left/1.png", "right/1.png"), {"1": ("binary", ["left", "right"]), "2": ("unlabelled", [])},
        ("--classes-at 1", "/t/left --random-weights"),
    ),
    "findings in one cell": Question(
        "path,finding\na.png,mass;cyst\nb.png,nodule;cyst\nc.png,nodule;mass\n",
        {"1": ("multiclass", ["mass;cyst", "nodule;cyst", "nodule;mass"]),
         "2": ("multilabel", ["cyst", "mass", "nodule"])},
        ("--task multiclass", "--task multilabel"),
    ),
    "minus one": Question(
        "path,finding\na.png,1\nb.png,-1\nc.png,1\n",
        {"1": ("binary", ["-1", "1"]), "2": ("multiclass", ["1"]), "3": ("binary", ["0", "1"]),
         "4": ("multiclass", ["1"])},
        ("--task binary", "--uncertain ignore", "--uncertain zero", "--uncertain one"),
    ),
    "ages": Question(
        AGES, {"1": ("multiclass", NUMBERS), "2": ("binary", ["f", "m"])}, ("--task multiclass", "--column label=sex"),
    ),
    "captions, the column typed": Question(
        CAPTIONS, {"1": ("multiclass", FILMS), "2": ("binary", ["x", "y"])},
        ("--column label=label --column path=path", "--column path=path --column label=note "),
        ("--column", "label=label", "--column", "path=path"),
    ),
    "columns that could be the label": Question(
        rows(label=["a", "b", "b"], finding=["x", "y", "z"]),
        {"1": ("binary", ["a", "b"]), "2": ("multiclass", ["x", "y", "z"])},
        ("--column label=label", "--column label=finding"),
    ),
    "a column that is no split": Question(
        rows(label=["a", "b", "b"], fold=["train", "test", "other"]),
        {"1": ("binary", ["a", "b"])}, ("--column split=",),
    ),
    "two rows of an image": Question(
        "path,label\na.png,mass\na.png,cyst\nb.png,cyst\n", {"1": ("multilabel", ["cyst", "mass"])},
        ("--task multilabel",),
    ),
    "one letter in two cases": Question(
        LETTERS, {"1": ("binary", ["a", "b"]), "2": ("multiclass", ["A", "a", "b"])},
        ("--letter-case ignore", "--letter-case keep"),
    ),
    "folders in two cases": Question(
        ("Nodule/1.png", "NODULE/2.png", "cyst/3.png"),
        {"1": ("binary", ["Nodule", "cyst"]), "2": ("multiclass", ["NODULE", "Nodule", "cyst"])},
        ("--letter-case ignore", "--letter-case keep"),
    ),
    "what is none beside splits": Question(
        ("set/train/a/1.png", "set/train/b/2.png", "set/test/a/3.png", "set/extra/b/4.png"),
        {"1": ("binary", ["a", "b"]), "2": ("multiclass", ["extra", "test", "train"])},
        ("--leave-out set/extra ", "--classes-at 2 "),
    ),
    "two of them beside splits": Question(
        ("train/a/1.png", "test/b/2.png", "old/a/3.png", "unused/4.png"),
        {"1": ("binary", ["a", "b"]), "2": ("multiclass", ["old", "test", "train", "unused"])},
        ("--leave-out old --leave-out unused", "--classes-at 1"),
    ),
    "what hints at splits": Question(
        ("trainA/1.png", "testB/2.png"), {"1": ("binary", ["testB", "trainA"])}, ("--classes-at 1",),
    ),
    "a split twice": Question(
        ("train/a/1.png", "training/b/2.png"), {"1": ("binary", ["train", "training"])}, ("--classes-at 1",),
    ),
    "splits in a split": Question(
        ("train/train/1.png", "train/test/2.png", "test/test/3.png"), {"1": ("binary", ["test", "train"])},
        ("--classes-at 2",),
    ),
    "splits below some classes": Question(
        ("bus/train/1.png", "bus/test/2.png", "car/3.png"), {"1": ("binary", ["bus", "car"])}, ("--classes-at 1",),
    ),
}  # fmt: skip


def given(folder: Path, question: Question) -> tuple[str, ...]:
    """The words of a command about what the question gives."""
    if isinstance(question.data, str):
        listed(folder / "t", question.data)
    else:
        pictures(folder / "t", *question.data)
    return (*WORDS[:-1], "t/list.csv" if isinstance(question.data, str) else "t", *question.typed)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_each_answer_is_what_its_option_says(tmp_path, monkeypatch, question):
    monkeypatch.chdir(tmp_path)
    words = given(tmp_path, question)
    alone = call(*words)
    typed = [line.partition(": featurecache ")[2] for line in alone.stderr.splitlines() if ": featurecache " in line]
    assert alone.exit_code == 2 and len(typed) == len(question.options) == len(question.answers)
    assert all(line.count("--column label=") <= 1 for line in typed)  # what was typed gives way
    assert all(option in f"{line} " for option, line in zip(question.options, typed, strict=True))
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    for (answer, made), command in zip(question.answers.items(), typed, strict=True):
        asked = call(*words, typed=f"{answer}\n")
        pasted = call(*shlex.split(command), "--json")
        for result in (asked, pasted):
            record = json.loads(result.stdout)["data"]
            assert (record["task"], record["classes"]) == made
        assert "which" not in pasted.stderr and asked.exit_code == pasted.exit_code == 0


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("answer", ["\n", "none\n", "9\nnone\n"])
def test_no_answer_ends_with_the_sentence_and_what_to_type(tmp_path, monkeypatch, question, answer):
    monkeypatch.chdir(tmp_path)
    words = given(tmp_path, question)
    alone = call(*words)
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    result = call(*words, typed=answer)
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.endswith(alone.stderr)


@pytest.mark.parametrize("ended", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_and_ctrl_c_stop_and_write_nothing(scans, monkeypatch, tmp_path, ended):
    def read(*_: object) -> str:
        raise ended

    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr("click.termui.visible_prompt_func", read)
    result = call(*WORDS[:-4], "--data", "scans", "--cache", "new")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "stopped.") and not (tmp_path / "new").exists()


def test_an_answer_is_in_the_command_that_comes_next_and_in_further_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    listed(tmp_path / "t", rows(label=["a", "A", "b"], finding=["x", "y", "z"]))
    words = (*WORDS[:-3], "--data", "t/list.csv")
    result = call(*words, typed="1\n2\n")
    typed = "featurecache extract --backbone vit-demo --data t/list.csv --random-weights --column label=label"
    assert f"next       {typed} --letter-case keep\n" in result.stderr
    result = call(*words, typed="1\nnone\n")
    assert result.exit_code == 2 and f"{typed} --dry-run --letter-case keep\n" in result.stderr


def test_an_import_asks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", left=np.ones((4, 3), np.float32), right=np.zeros((4, 2), np.float32), y=np.array([*"aAbb"]))
    table(tmp_path, "label,sex\n" + "".join(f"{k}.5,{'fm'[k % 2]}\n" for k in range(4)))
    words = ("import", "two.npz", "--name", "v", "--cache", "c")
    alone = call(*words)
    assert alone.exit_code == 2 and "--cache c --features-key right\n" in alone.stderr
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    result = call(*words, "--json", typed="2\n1\n")
    assert json.loads(result.stdout)["classes"] == ["a", "b"]


def test_a_command_without_the_options_does_not_ask(scans, monkeypatch):
    """`predict` has no --classes-at, and needs none."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)

    @terminal.command
    def look(talk):
        raise SeveralReadings("a or b", [Reading("a", {"classes_at": 1})])

    result = CliRunner().invoke(look, [], obj=None, input="1\n")
    assert result.exit_code == 2 and "which" not in result.stderr


def test_what_was_understood_is_said_before_anything_is_computed(scans):
    result = call(*WORDS[:-3], "--data", "scans", "--classes-at", "2", "--order", "lung,liver")
    assert "understood level 1 not used (CT, MR); classes from level 2 of the folders (liver, lung)" in result.stdout
    record = json.loads(call(*WORDS, "--classes-at", "2", "--order", "lung,liver").stdout)
    assert record["understood"] == record["source"]["understood"]
    assert (record["source"]["order"], record["data"]["classes"]) == (["lung", "liver"], ["lung", "liver"])


def test_a_baseline_says_how_its_images_were_read_and_refuses_words_about_none(scans):
    result = call("train-baseline", "--arch", "cnn-cifar", "--order", "a,b")
    assert result.exit_code == 2 and "--order says how --data is read; give --data too" in result.stderr
    result = call("train-baseline", "--arch", "cnn-cifar", "--data", "scans", "--classes-at", "1", "--epochs", "1")
    assert "understood classes from level 1 of the folders (CT, MR)" in result.stderr
