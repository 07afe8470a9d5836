"""Who is asked before HDF5 sees a file, what is remembered of files, and what reaches terminals and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plant import digests
from test_views import CLS, ORDER, make_view

from featurecache.commands.terminal import Console
from featurecache.errors import CacheError, UnsafeFile
from featurecache.files import guard, known
from featurecache.formatting import cell, harmless, one_line, text_of
from featurecache.store.shards import ShardWriter, read_shard
from featurecache.store.view import View


@pytest.fixture
def looked(tmp_path: Path, monkeypatch) -> list[str]:  # type: ignore[no-untyped-def]
    """Names of the files that the other process was asked about; with a memory of its own."""
    names: list[str] = []
    original = guard._examine

    def examine(paths, kind):  # type: ignore[no-untyped-def]
        names.extend(path.name for path in paths)
        return original(paths, kind)

    monkeypatch.setattr(guard, "_examine", examine)
    monkeypatch.setenv("FEATURECACHE_STATE", str(tmp_path / "state"))
    forget(monkeypatch)
    return names


def forget(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """As another process of this machine would begin."""
    monkeypatch.setattr(known, "_known", set())


def copied(view: View, to: Path) -> Path:
    shutil.copytree(view.store.parent, to)
    return to / view.store.name / view.path.name


# ---------------------------------------------------------------------------------------------- what is remembered


def test_what_our_runs_wrote_is_opened_without_asking(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", ORDER)
    forget(monkeypatch)
    View(view.path).tensor("cls")
    assert looked == []


def test_a_copy_is_asked_about_once_and_then_remembered(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = copied(make_view(tmp_path / "cache", ORDER, layouts=(CLS,)), tmp_path / "copy")
    View(path)
    assert sorted(looked) == sorted(["set.h5", *(p.name for p in (path.parent / "cls").iterdir())])
    looked.clear()
    forget(monkeypatch)
    View(path)
    assert looked == []


def test_a_changed_file_is_asked_about_though_its_size_and_mtime_are_the_same(tmp_path: Path, looked) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", ORDER)
    before = view.path.stat()
    time.sleep(0.02)
    with open(view.path, "r+b") as file:
        file.write(b"featurecache")
    os.utime(view.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    View(view.path)
    assert looked == ["set.h5"]


def test_a_refused_file_is_asked_about_again(tmp_path: Path, looked) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.h5"
    path.write_bytes(bytes(2000))
    for _ in range(2):
        with pytest.raises(CacheError, match="its beginning is damaged"):
            guard.checked([path], "shard")
    assert looked == ["a.h5", "a.h5"]


def test_a_file_that_had_the_name_before_ours_is_not_ours(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", range(4), layouts=(CLS,))
    path = next((view.store / "cls").iterdir())
    shutil.copy(path, tmp_path / "theirs")
    os.replace(tmp_path / "theirs", path)
    forget(monkeypatch)
    writer = ShardWriter(view.store, digests(4), CLS, {"fingerprint": view.fingerprint})
    writer.append([bytes(d) for d in digests(4)], np.zeros((4, 4), "f2"))
    assert writer.commit() == path
    View(view.path)
    assert looked == [path.name]


def test_a_list_that_lies_in_the_cache_or_that_others_may_write_is_not_believed(
    tmp_path: Path, looked, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", ORDER, layouts=())
    (tmp_path / "state").chmod(0o777)
    forget(monkeypatch)
    View(view.path)
    assert looked == ["set.h5"]


@pytest.mark.parametrize("state", ["file", "damaged", "locked"])
def test_a_memory_that_fails_only_costs_time(tmp_path: Path, looked, monkeypatch, state: str) -> None:  # type: ignore[no-untyped-def]
    import sqlite3

    path = copied(make_view(tmp_path / "cache", ORDER, layouts=()), tmp_path / "copy")
    memory = tmp_path / "state" / "known.sqlite"
    if state == "file":
        shutil.rmtree(tmp_path / "state")
        (tmp_path / "state").write_text("")
    if state == "damaged":
        memory.write_bytes(b"no database" * 1000)
    if state == "locked":
        holder = sqlite3.connect(memory)
        holder.execute("BEGIN EXCLUSIVE")
        inode = memory.stat().st_ino
        monkeypatch.setattr(known, "_PATIENCE", 0.05)
    for _ in range(2):
        forget(monkeypatch)
        assert len(View(path)) == len(ORDER)
    assert looked[:1] == ["set.h5"]
    if state == "locked":  # nor was it taken for damaged
        assert memory.stat().st_ino == inode
    if state == "damaged":  # begun anew
        forget(monkeypatch)
        looked.clear()
        View(path)
        assert looked == []


def test_two_processes_remember_at_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.h5" for k in range(60)]
    for file in files:
        file.touch()
    script = f"""
import sys; from pathlib import Path; from featurecache.files import guard, known
for k in range(60): guard.own([Path({str(tmp_path)!r}) / f"{{k}}.h5"])
known._known.clear()
assert guard.verdicts([Path({str(tmp_path)!r}) / f"{{k}}.h5" for k in range(60)], "view") == {{}}
"""
    environment = {**os.environ, "FEATURECACHE_STATE": str(tmp_path / "state"), "PYTHONPATH": os.getcwd()}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]


def test_the_oldest_are_forgotten(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(known, "_REMEMBERED", 3)
    files = [tmp_path / str(k) for k in range(5)]
    for file in files:
        file.touch()
        guard.own([file])
    keys = [known.key_of(file, "own") for file in files]
    forget(monkeypatch)
    assert [key in known.recall(keys) for key in keys] == [False, False, True, True, True]


# ---------------------------------------------------------------------------------------------- the other process


def program(monkeypatch, body: str) -> None:  # type: ignore[no-untyped-def]
    """Another one in place of `featurecache.files.child`; ``body`` runs where HDF5 would read."""
    text = (
        "import sys; sys.path[:] = {path!r}\n"
        "import os, signal, time, json\nfrom featurecache.files import child\n"
        f"def examine(path, kind):\n    {body}\n"
        "child.examine = examine; child.main()\n"
    )
    monkeypatch.setattr(guard, "_PROGRAM", text.replace("{", "{{").replace("}", "}}").replace("{{path!r}}", "{path!r}"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"HDF5 crashed on it \(signal 11\)"),
        ("os._exit(3)", "ended with code 3"),
        ("time.sleep(60)", "took more than 2 s to read it"),
        ("while True: pass", "took too long to read it, computing all the time"),
        ("bytearray(6 << 30)", "more memory than a file of its size may"),
        ("raise RecursionError('deep')", r"cannot be read as a view \(deep\)"),
        ("os.write(os.open('/tmp/featurecache-was-here', os.O_CREAT | os.O_WRONLY), b'x')", "File too large"),
    ],
)
def test_however_the_other_process_ends_it_is_a_sentence(tmp_path: Path, looked, monkeypatch, body, words) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path / "cache", ORDER, layouts=())
    path = copied(view, tmp_path / "copy")
    program(monkeypatch, body)
    monkeypatch.setattr(guard, "SECONDS", 1)
    monkeypatch.setattr(guard, "WAIT", 2 if "sleep" in body else 60)
    with pytest.raises(CacheError, match=words):
        View(path)
    Path("/tmp/featurecache-was-here").unlink(missing_ok=True)


def test_a_shard_is_looked_at_before_it_is_read(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = copied(make_view(tmp_path / "cache", range(4), layouts=(CLS,)), tmp_path / "copy")
    program(monkeypatch, "os.kill(os.getpid(), signal.SIGSEGV)")
    (shard,) = (path.parent / "cls").iterdir()
    with pytest.raises(UnsafeFile, match=r"HDF5 crashed on it \(signal 11\)"):
        read_shard(shard, CLS)


def test_after_a_crash_the_files_behind_it_are_looked_at_too(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    files = [tmp_path / name for name in "abcd"]
    for file in files:
        file.write_bytes(b"x")
    program(monkeypatch, "if path.name in 'bd': os.kill(os.getpid(), signal.SIGABRT)")
    found = guard.verdicts(files, "shard")
    assert {path.name for path in found} == {"b", "d"}
    assert all(isinstance(error, UnsafeFile) and "signal 6" in str(error) for error in found.values())


def test_a_python_that_does_not_start_is_not_blamed_on_the_file(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = copied(make_view(tmp_path / "cache", ORDER, layouts=()), tmp_path / "copy")
    monkeypatch.setattr(guard, "_PROGRAM", "raise SystemExit(7)")
    with pytest.raises(CacheError, match=r"cannot be looked at: .* code 7 before it began"):
        View(path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(CacheError, match="no process starts"):
        View(path)


@pytest.mark.parametrize("answer", ['[0, ["SystemExit", "x"]]', "[0, 5]", "{}", "[[]]", "[" * 5000, "nonsense"])
def test_an_answer_that_is_none_is_not_believed(answer: str) -> None:
    assert guard._parsed(answer.encode()) is None


_ENDLESS = "import sys, time; sys.stdout.write('x' * 300_000); sys.stdout.flush(); time.sleep(60)"


def test_an_answer_without_an_end_is_not_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDLESS], stdout=subprocess.PIPE) as process:
        assert guard._Answers(process).next(20) is None
        process.kill()


def test_a_file_exchanged_while_it_is_looked_at_is_not_remembered(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path, aside = tmp_path / "here" / "a.h5", tmp_path / "aside"
    path.parent.mkdir()
    path.write_bytes(b"x")

    def exchange(paths, kind):  # type: ignore[no-untyped-def]
        path.parent.rename(aside)  # which does not touch the file in it
        path.parent.mkdir()
        path.write_bytes(b"yy")
        return {}

    monkeypatch.setattr(guard, "_examine", exchange)
    guard.checked([path], "shard")
    shutil.rmtree(path.parent)
    aside.rename(path.parent)
    assert known.recall([known.key_of(path, "shard")]) == set()


def test_the_other_process_imports_no_torch(tmp_path: Path) -> None:
    script = "import featurecache.files.child, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}).returncode == 0


def test_no_plugins_and_nothing_of_the_caller_reach_the_other_process(tmp_path: Path, looked, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = copied(make_view(tmp_path / "cache", ORDER, layouts=()), tmp_path / "copy")
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program(monkeypatch, "raise ValueError(json.dumps([k for k in os.environ if k[:5] in ('HDF5_', 'PYTHO')]))")
    with pytest.raises(CacheError, match=r'\["HDF5_PLUGIN_PRELOAD"\]'):
        View(path)


# ---------------------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – × é 肺炎\n\ttoo", "plain – × é 肺炎\n\ttoo"),
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
    from click.testing import CliRunner

    import cli

    view = make_view(tmp_path / "cache", ORDER, layouts=(CLS,))
    spec = view.store / "spec.json"
    record = json.loads(spec.read_text())
    del record["check"]
    record["provenance"] = {"backbone": "vit\x1b]0;owned\x07\nnext       rm -rf", "request": {"name": "x"}}
    spec.write_text(json.dumps(record))
    for arguments in (["ls"], ["info", str(view.path)], ["ls", "--json"], ["info", "\x1b[2J"]):
        done = CliRunner().invoke(cli.main, [*arguments, "--cache", str(tmp_path / "cache")])
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


def test_splits_and_predictions_of_formulas_round_trip(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from fake_view import toy_view

    from heads.api import train_head
    from heads.inference import as_csv
    from heads.splits import read_splits

    monkeypatch.chdir(tmp_path)
    view = toy_view(n=200, splits="given", noise=2)
    view.ids = [f"=HYPERLINK({i})" for i in range(100)] + [f"'-a{i}" for i in range(100)]
    view.classes = ["=cmd|'/c calc'!A0", "<script>alert(1)</script>\x1b[2J"]
    run = train_head(view, "linear", epochs=1, report=False)
    for name in ("predictions.csv", "splits.csv", "metrics.csv", "history.csv"):
        cells = [c for row in csv.reader(io.StringIO((run.path / name).read_text())) for c in row]
        assert not [c for c in cells if c[:1] in "=+@\t\r" and c]
    assert (read_splits(run.path / "splits.csv", view.ids, []) == np.array(view.splits)).all()
    record = {"image": "=1+1", "class": "=cmd", "probability": 1.0, "probabilities": {"=cmd": 1.0}}
    assert as_csv([record]).splitlines()[1] == '"\'=1+1","\'=cmd",1.0,1.0,""'
