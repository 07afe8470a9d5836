"""What a terminal of 80 or of 110 columns shows: help of one screen, lines and tables that fold between words, commands
that can be pasted; a file or a pipe gets every line as it is."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.command import call
from support.pictures import image_folder

import cli
from featurecache import formatting
from featurecache.commands import terminal
from featurecache.commands.help import SCREEN, Command
from featurecache.formatting import TABLE_WIDTH, aligned, fold

WIDTHS = pytest.mark.parametrize("width", [80, 110])


@WIDTHS
def test_every_help_is_one_screen_of_whole_words_and_every_option_is_in_one_of_its_sections(width):
    for name, command in cli.main.commands.items():
        assert isinstance(command, Command)
        context = command.context_class(command, info_name=name, terminal_width=width)
        sections = command.sections(context)
        screens = [command.get_help(context), *(command.get_section(context, each) for each in sections if each)]
        for screen in screens:
            lines = screen.splitlines()
            assert len(lines) <= SCREEN and max(map(len, lines)) <= width, screen
            assert not re.search(r"[a-z]-$", screen, re.MULTILINE), screen
        listed = [option.name for options in sections.values() for option, _ in options]
        assert sorted(listed) == sorted({p.name for p in command.get_params(context) if isinstance(p, click.Option)})
        names = [max(option.opts, key=len) for options in sections.values() for option, _ in options]
        assert all(re.search(rf"(?<!\S){re.escape(word)}(?![\w-])", screens[0]) for word in names)


def test_the_help_of_a_section_is_asked_for_by_name():
    shown = call("train-head", "--help", "splits").output
    assert "--drop-leaks" in shown and "Leave out of train" in shown and "--lr" not in shown
    assert "Options of splits" not in call("train-head", "-h").output  # it does not fit, and is named
    wrong = call("train-head", "--help", "split")
    assert wrong.exit_code == 2 and "Sections: splits, training, output." in wrong.stderr


words = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30), max_size=40)


@example(["0" * 28, "A"], "view       ", 40)
@given(words, st.sampled_from(["", "view       ", "error: ", "           "]), st.integers(40, 120))
def test_a_line_folds_between_words_and_loses_none(text, label, width):
    line = label + " ".join(text)
    lines = fold(line, width).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())
    longer = [each.split() for each in lines[1:] if len(each) > width]
    assert all(len(each) == 1 or (len(each) == 2 and each[0][-1].isdigit()) for each in longer)  # a number and its unit
    assert all(each.startswith(" " * len(label)) for each in lines[1:])
    assert fold(line, None) == line


def test_a_command_folds_so_that_it_can_be_pasted():
    command = "featurecache train-head --head large --features vit-demo/digits --splits runs/a/splits.csv --drop-leaks"
    folded = fold(f"next       {command}", 80)
    assert max(map(len, folded.splitlines())) <= 80 < len(command)
    pasted = folded.removeprefix("next").replace("\\\n", "")
    assert shlex.split(pasted) == shlex.split(command)
    quoted = f"next       {command} --out 'a  b'"
    assert fold(quoted, 80) == quoted


NAMES = ["", "parameters", "val macro AUROC", "test macro AUROC", "test accuracy"]
LONG = [NAMES, ["large on tokens-16x16", "262,666", "1.000", "1.000 [0.999, 1.000]", "0.981 [0.967, 0.994]"]]
SHORT = [NAMES, ["large on tokens-16x16 of chest", "262,666", "1.000", "1.000", "0.981"]]
TEXT = [["linear", "1,538", "one linear layer on the vector " * 4], ["ridge", "1,538", "short"]]


@pytest.fixture
def _narrow():
    token = TABLE_WIDTH.set(80)
    yield
    TABLE_WIDTH.reset(token)


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize(("rows", "right", "count"), [(SHORT, 1, 4), (LONG, 1, 7), (TEXT, (1,), 3)])
def test_a_table_folds_its_header_or_its_text_or_else_puts_columns_below_each_other(rows, right, count):
    lines = aligned(rows, right)
    assert max(map(len, lines)) <= 80 and len(lines) == count, "\n".join(lines)
    again = [row[0] for row in rows] * lines.count("")  # the first cells, which each part of a table has
    assert sorted(" ".join(lines).split()) == sorted(" ".join([*map(" ".join, rows), *again]).split())


@pytest.mark.usefixtures("_narrow")
def test_a_cell_that_cannot_fold_stays_whole():
    rows = [["path", "of"], ["runs/" + "x" * 60, "y" * 40]]
    assert "runs/" + "x" * 60 in aligned(rows)[1]


def test_where_nobody_reads_along_no_table_folds(tmp_path):
    assert len(aligned(LONG)) == 2 and len(aligned(LONG)[0]) > 80
    with (tmp_path / "file").open("w") as file:
        assert formatting.terminal_width(file) is None


@pytest.mark.parametrize(
    ("columns", "size", "width"), [("", 0, 80), ("0", 0, 80), ("-5", 100, 80), ("wide", 100, 80), ("", 100, 100),
                                   ("60", 100, 60)]
)  # fmt: skip
def test_a_terminal_without_a_width_has_80_columns(columns, size, width, monkeypatch):
    """Those of containers and of `script` say 0 until somebody tells them."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 0, size, 0, 0))
    monkeypatch.setenv("COLUMNS", columns)
    with open(master, "wb"), open(slave, "w") as terminal_file:
        assert formatting.terminal_width(terminal_file) == width


@pytest.mark.integration
@WIDTHS
def test_a_session_at_a_terminal_breaks_no_word_and_no_line(width, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "terminal_width", lambda stream: width)
    image_folder(tmp_path / "chest", 60)
    session = [
        "extract --backbone vit-demo --random-weights --data chest",
        "train-head --head linear --epochs 3", "ablate --heads linear,ridge --epochs 2 --seeds 2", "leaks", "ls",
        "info", "info vit-demo/chest", "info runs/chest-linear-1", "info --backbone vit-demo", "info --head large",
        "predict --run runs/chest-linear-1 chest/ill", "why --backbone vit-demo --random-weights --image-size 32",
        "study medical-mnist --quick --dry-run",
    ]  # fmt: skip
    for command in session:
        result = call(*shlex.split(command))
        assert result.exit_code == 0, result.output
        for line in result.output.splitlines():
            text = line.strip()
            unbroken = " " not in text or text.startswith(("--", "featurecache "))  # one word, one option
            assert len(line) <= width or unbroken, f"{command}\n{line}"
            assert not re.search(r"^\S$", text), f"{command}\n{line}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_done_without_steps_stands_at_a_terminal_until_the_next_line(monkeypatch, capsys):
    talk = terminal.Console(as_json=False, quiet=False)
    talk.status("loading")
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr", Terminal())
    terminal.Console(as_json=False, quiet=True).status("loading")
    assert sys.stderr.getvalue() == ""
    talk.status("loading")
    assert sys.stderr.getvalue() == "loading ..."
    talk.result("found", {})
    formatting.clear_status()
    assert sys.stderr.getvalue() == f"loading ...\r{' ' * 11}\r"


def test_a_command_says_at_once_that_it_loads(monkeypatch):
    shown = []
    monkeypatch.setattr(terminal, "show_status", lambda text, progress: shown.append((text, progress)))
    call("ls", "--cache", "nowhere")
    call("ls", "--cache", "nowhere", "-q")
    assert shown == [("loading", True), ("loading", False)]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("extract --data chest", "--backbone NAME is missing: An alias (see info), hf:REPO, a folder"),
        ("predict a.png", "--run DIR is missing: A run folder of train-head, or a sweep's: its choice."),
        ("extract --backbone vit-demo --data a b", "b belongs to no option: --data takes one. A name with spaces"),
        ("extract --dry-run a --backbone vit-demo", "a belongs to no option: --dry-run takes none."),
        ("ls cache", "cache belongs to no option: ls takes options only."),
    ],
)
def test_what_is_missing_or_too_much_is_named_with_what_belongs_there(command, says):
    result = call(*command.split())
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())


def test_help_is_shown_whatever_else_stands_there():
    assert call("train-head", "linear", "--help").stdout == call("train-head", "--help").stdout


KILLED_IN_A_BAR = """
import os, signal
from featurecache.formatting import byte_bar
with byte_bar(1, "first", True) as bar:
    if (child := os.fork()) == 0:
        bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    bar.update(1)
with byte_bar(1, "second", True) as bar:
    bar.update(1)
print("whole")
"""


@pytest.mark.integration
def test_a_process_killed_while_it_draws_a_bar_stops_no_other():
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_BAR], capture_output=True, text=True, timeout=30)
    assert done.stdout == "whole\n", done.stderr


def test_a_rate_is_written_as_people_write_it():
    rates = {0.0414: "0.0414", 7.456: "7.46", 99.94: "99.9", 100: "100", 1968.4: "1,968", 12345.6: "12,346"}
    assert {rate: formatting.images_per_second(rate) for rate in rates} == {
        r: f"{s} images/s" for r, s in rates.items()
    }
