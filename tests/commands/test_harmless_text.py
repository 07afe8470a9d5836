"""What reaches terminals and spreadsheets: nothing that they would obey."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import CLS, ORDER, make_view
from support.command import call

import cli
from featurecache.commands.terminal import CommandGroup, Console, command
from featurecache.formatting import cell, harmless, join_names, names_in, one_line, shell_words, text_of

# ---------------------------------------------------------------------------------------------- terminals


PAGES = [("latin-1", "\\u80ba × é ..."), ("cp1252", "\\u80ba × é …"), ("utf-8", "肺 × é …")]


@pytest.mark.parametrize(("page", "shown"), PAGES)
def test_a_code_page_without_the_characters_ends_no_command(page: str, shown: str):
    group, runner = CommandGroup("tool"), CliRunner(charset=page)
    group.add_command(command(lambda talk: talk.result("肺 × é …", {"a": "肺 × é"})), "say")
    assert runner.invoke(group, ["say"]).stdout == shown + "\n"
    assert json.loads(runner.invoke(group, ["say", "--json"]).stdout) == {"a": "肺 × é"}
    assert runner.invoke(cli.main, ["predict", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("harmless – × é 肺炎\n\ttoo", "harmless – × é 肺炎\n\ttoo"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\x9b31mb\x07\r\x7f", "a\\x9b31mb\\x07\\r\\x7f"),
        ("abc\u202ecod.exe", "abc\\u202ecod.exe"),
        ("half \ud800", "half \\ud800"),
        ("می\u200cخواهم\u00a0", "می\u200cخواهم\u00a0"),
    ],
)
def test_nothing_raw_reaches_the_terminal(text: str, shown: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert harmless(text) == shown
    Console(as_json=False, quiet=False).say(text)
    Console(as_json=False, quiet=False).result(text, {})
    assert capsys.readouterr() == (shown + "\n", shown + "\n")
    Console(as_json=True, quiet=False).result("", {"a": text})
    out = capsys.readouterr().out
    assert out.strip().isprintable() or "\u200c" in out
    assert json.loads(out) == {"a": text}


def test_a_name_cannot_make_lines_of_its_own() -> None:
    assert one_line({"a\nb": ["c\td", 3, None]}) == {"a\\nb": ["c\\td", 3, None]}


def test_listing_and_describing_a_strangers_cache_shows_its_names_harmless(tmp_path: Path) -> None:

    view = make_view(tmp_path / "cache", ORDER, layouts=(CLS,))
    spec = view.store / "spec.json"
    record = json.loads(spec.read_text())
    del record["check"]
    record["provenance"] = {"backbone": "vit\x1b]0;owned\x07\nnext       rm -rf", "request": {"name": "x"}}
    spec.write_text(json.dumps(record))
    for arguments in (["ls"], ["info", str(view.path)], ["ls", "--json"], ["info", "\x1b[2J"]):
        done = call(*arguments, "--cache", str(tmp_path / "cache"))
        assert "\x1b" not in done.output and "\x07" not in done.output
        assert "\nnext       rm" not in done.output
        assert "\\nnext       rm" in done.output or arguments[-1] == "\x1b[2J"


# ---------------------------------------------------------------------------------------------- spreadsheets


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "＝1", '="a"&B1'])
def test_no_cell_is_a_formula(text: str) -> None:
    assert cell(text) == "'" + text
    assert text_of(cell(text)) == text


@pytest.mark.parametrize("text", ["a=1", "-1", "+0.5", "1e-3", "-1.5e+10", "", "'quoted'", 3, -1.5, None])
def test_other_cells_stay_as_they_are(text) -> None:  # type: ignore[no-untyped-def]
    assert cell(text) == text


@given(st.text(alphabet="=+-@'\t\r\n01a", max_size=6) | st.text())
def test_whatever_was_written_comes_back(text: str) -> None:
    assert text_of(cell(text)) == text
    assert cell(text)[:1] not in tuple("=@＝＋－＠\t\r\n")


@pytest.mark.parametrize("names", [["a", "b"], ["mild, left", 'a"b', "c"], ["\u00fc"], ["a\nb", "c"]])
def test_names_with_commas_and_quotes_survive_an_option(names):
    assert names_in(join_names(names)) == names


@pytest.mark.integration
def test_splits_and_predictions_of_formulas_round_trip(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from support.fake_view import toy_view

    from heads.api import train_head
    from heads.inference import predictions_csv
    from heads.splits import read_splits

    monkeypatch.chdir(tmp_path)
    view = toy_view(n=200, splits="given", noise=2)
    view.ids = [f"=HYPERLINK({i})" for i in range(100)] + [f"'-a{i}" for i in range(100)]
    view.classes = ["=cmd|'/c calc'!A0", "<script>alert(1)</script>\x1b[2J"]
    run = train_head(view, "linear", epochs=1)
    for name in ("predictions.csv", "splits.csv", "metrics.csv", "history.csv"):
        cells = [c for row in csv.reader(io.StringIO((run.path / name).read_text())) for c in row]
        assert not [c for c in cells if c[:1] in "=+@\t\r" and c]
    assert (read_splits(run.path / "splits.csv", view.ids, []) == np.array(view.splits)).all()
    record = {"image": "=1+1", "class": "=cmd", "probability": 1.0, "probabilities": {"=cmd": 1.0}}
    assert predictions_csv([record]).splitlines()[1] == '"\'=1+1","\'=cmd",1.0,1.0,""'


# ---------------------------------------------------------------------------------------------- shells

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@pytest.mark.integration
@given(st.lists(WORDS, min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_a_shell_reads_back_the_words_of_a_command(words: list[str]) -> None:
    typed = shell_words(words)
    assert typed == one_line(typed)
    script = f"printf '%s\\0' {typed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert done.stdout.decode().split("\0")[:-1] == words


def test_a_name_that_is_no_utf8_is_typed_by_its_bytes() -> None:
    assert shell_words(["a\udcff'"]) == r"$'a\xff\x27'"


def test_commands_are_quoted_by_one_function() -> None:
    home = Path(cli.__file__).parent
    modules = [*home.glob("featurecache/**/*.py"), *home.glob("heads/**/*.py"), home / "cli.py"]
    assert [path.name for path in modules if "shlex" in path.read_text()] == ["formatting.py"]


@pytest.mark.parametrize("name", ["a$(touch pwned)", "a b", "a'b", 'a"b', "a;ls", "a&b"])
@pytest.mark.parametrize("words", [("ls",), ("info", "{}")])
def test_the_next_command_holds_the_name_as_one_word(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    view = make_view(tmp_path, ORDER, name=name, layouts=(CLS,))
    done = call(*(word.format(view.path) for word in words), "--cache", tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next ")]
    assert f" {shell_words([view.label])}" in line and shell_words([view.label]) != view.label
