"""Signals end a command as Ctrl-C does; a full disk says what is true; pipes and devices are never waited for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.command import call
from support.pictures import image_folder

import featurecache
from featurecache.commands.terminal import CommandGroup, command
from featurecache.errors import CannotWrite, UnsafeFile
from featurecache.files.atomic import write_whole
from featurecache.files.names import is_file_name

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]
# An extraction in which every batch takes a while; the file says that some have been computed.
SLOW = """
import sys, time
from pathlib import Path
import cli
from featurecache.extraction.forward import ForwardRunner
call, count = ForwardRunner.__call__, []
def slow(self, *rest, **how):
    count.append(1)
    if len(count) == 5:
        Path("begun").touch()
        time.sleep(60)
    return call(self, *rest, **how)
ForwardRunner.__call__ = slow
sys.argv[0] = "featurecache"
cli.main()
"""


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_an_extraction_that_gets_a_signal_commits_what_it_has_and_continues(tmp_path, monkeypatch, vit, number, code):
    monkeypatch.chdir(tmp_path)
    image_folder(Path("data"), 40)
    words = ["extract", "--backbone", vit, "--data", "data", "--outputs", "cls", "--batch-size", "4"]
    home = str(Path(featurecache.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": home}
    )
    while not Path("begun").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1].split(".")[0]) == (code, "stopped"), said
    safe = int(said.splitlines()[-1].split()[1])
    assert "the same command continues" in said and 4 <= safe < 40
    assert list(Path("cache").rglob("*.tmp")) == []
    done = call(*words)
    assert done.exit_code == 0 and f"{40 - safe} computed" in done.stdout, done.output


def ended(function) -> Result:  # type: ignore[no-untyped-def]
    """A command that does this."""
    group = CommandGroup("tool")
    group.add_command(command(function), "work")
    return CliRunner().invoke(group, ["work"])


@pytest.mark.parametrize(("number", "code"), [*SIGNALS, (signal.SIGINT, 1)])
def test_every_command_ends_so(number: int, code: int) -> None:
    before = signal.getsignal(number)
    done = ended(lambda talk: os.kill(os.getpid(), number) or time.sleep(5))
    assert (done.exit_code, done.stderr.strip()) == (code, "stopped.")
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_stop_what_the_first_began() -> None:
    finished = []

    def work(talk: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            finished.append(1)

    assert ended(work).exit_code == 143 and finished


def test_under_nohup_a_terminal_that_closes_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(lambda talk: os.kill(os.getpid(), signal.SIGHUP)).exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("number", "way"), [(errno.ENOSPC, "make room on that disk"), (errno.EROFS, "choose another folder")]
)
def test_what_cannot_be_written_says_what_is_whole_and_what_to_type(tmp_path, monkeypatch, number, way):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(CannotWrite, match=f"What is finished is whole; .*{way}, then give the same command again"):
        write_whole(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_a_library_is_no_mistake_of_ours() -> None:
    def work(talk: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/plot.png")

    done = ended(work)
    assert done.exit_code == 1 and "mistake" not in done.stderr
    assert "cannot write somewhere/plot.png: No space left on device" in done.stderr


@pytest.mark.integration
def test_a_full_disk_behind_stdout_is_said_once() -> None:
    home = str(Path(featurecache.__file__).parents[1])
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli", "ls"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=home
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write the result: No space left") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- pipes and devices


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Where something waits at a pipe after all, the test ends."""

    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".npz", ".tar", ".png", ""])
def test_data_that_is_a_pipe_is_refused(tmp_path: Path, no_waiting: None, ending: str) -> None:
    pipe = tmp_path / f"data{ending}"
    os.mkfifo(pipe)
    with pytest.raises(UnsafeFile, match=f"data{ending} is a pipe or a device; give a file"):
        featurecache.open_source(pipe)
    with pytest.raises(UnsafeFile, match="/dev/zero is a pipe or a device"):
        featurecache.open_source("/dev/zero")


@pytest.mark.parametrize("words", [("--weights", "{}"), ("--backbone", "{}")])
@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin"])
def test_weights_that_are_a_pipe_are_refused(tmp_path, no_waiting, words, ending):
    pipe = tmp_path / f"model{ending}"
    os.mkfifo(pipe)
    given = {"--backbone": "vit-in21k", words[0]: words[1].format(pipe)}
    done = call("extract", "--data", "digits", *[word for pair in given.items() for word in pair])
    assert done.exit_code in (1, 2) and "mistake" not in done.stderr and str(pipe) in done.stderr


@pytest.mark.parametrize("ending", [".npy", ".npz", ".h5", ".safetensors"])
def test_features_and_labels_that_are_a_pipe_are_refused(tmp_path: Path, no_waiting: None, ending: str) -> None:
    pipe, labels = tmp_path / f"features{ending}", tmp_path / "labels.csv"
    os.mkfifo(pipe)
    os.mkfifo(labels)
    with pytest.raises(UnsafeFile, match="is a pipe or a device"):
        featurecache.import_view(pipe, name="x", cache=tmp_path / "c")
    np.save(tmp_path / "real.npy", np.ones((4, 3), np.float32))
    with pytest.raises(UnsafeFile, match=r"labels\.csv is a pipe or a device"):
        featurecache.import_view(tmp_path / "real.npy", name="x", cache=tmp_path / "c", labels=str(labels))


@pytest.mark.integration
def test_a_pipe_for_the_memory_of_files_is_thrown_away(tmp_path: Path, no_waiting: None, vit: str) -> None:
    data, cache = image_folder(tmp_path / "data", 4), tmp_path / "cache"
    cache.mkdir()
    os.mkfifo(cache / "files.sqlite")
    featurecache.extract(data, backbone=vit, outputs="cls", cache=cache)
    assert (cache / "files.sqlite").is_file()


def test_a_result_does_not_replace_a_pipe(tmp_path: Path, no_waiting: None) -> None:
    os.mkfifo(tmp_path / "out.csv")
    with pytest.raises(UnsafeFile, match="is a pipe or a device"):
        write_whole(tmp_path / "out.csv", b"data")
    assert (tmp_path / "out.csv").is_fifo()
    done = call("predict", "--run", "none", "--csv", tmp_path / "out.csv", "x.png")
    assert "out.csv is a pipe or a device" in done.stderr


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a\0b", "ä" * 127, "nul", "COM1.x", "é" * 200])
def test_a_name_that_no_file_can_have(name: str) -> None:
    assert not is_file_name(name, ".h5")


@pytest.mark.parametrize("name", ["a", "a b", "ä" * 126, "nullity", "肺", "$(x)", "a.b"])
def test_a_name_that_a_file_can_have(name: str) -> None:
    assert is_file_name(name, ".h5")


LONG = "x" * 256


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "--backbone", "vit-demo", "--random-weights", "--name", LONG),
        ("extract", "--backbone", "vit-demo", "--random-weights", "--sheet", LONG),
        ("train-head", "--head", "linear", "--out", f"runs/{LONG}"),
        ("predict", "--run", "none", "--csv", LONG, "x.png"),
        ("explain", "--run", "none", "x.png", "--out", LONG),
        ("report", "none", "--out", LONG),
    ],
)
def test_a_name_that_is_too_long_is_said_before_anything_is_computed(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = call(*words)
    assert done.exit_code == 2 and ("256 bytes" in done.stderr or "cannot be the name of a view" in done.stderr)
    assert list(tmp_path.iterdir()) == []
