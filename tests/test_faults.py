"""Killed, out of disk, two at once: nothing committed is lost, nothing wrong is readable, the command completes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import save_vit
from pictures import image_folder

import featurecache
from featurecache.reader import View

N = 24  # images, in shards of eight and batches of four


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("featurecache.extraction.SHARD_ROWS", 8)


# Runs in a process of its own: an extraction in shards of eight images, with a guard around one call of the system.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import featurecache
from featurecache import extraction, files, shards
extraction.SHARD_ROWS = 8
folder, data, cache, where, count = sys.argv[1:6]
seen = 0

def at(module, name, action):
    real = getattr(module, name)
    def guarded(*a, **k):
        global seen
        seen += 1
        if seen == int(count):
            action()
        return real(*a, **k)
    setattr(module, name, guarded)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def full():
    raise OSError(28, "No space left on device")

module, name, action = {
    "row": (os, "pwrite", die), "fsync": (os, "fsync", die), "name": (files, "_give_name", die),
    "folder": (files, "sync_path", die), "shard": (shards.ShardWriter, "commit", die),
    "view": (os, "replace", die), "full": (os, "pwrite", full), "nothing": (os, "getpgid", die),
}[where]
at(module, name, action)
try:
    result = featurecache.extract(data, backbone=folder, cache=cache, outputs="cls,tokens", batch_size=4)
except featurecache.FeatureCacheError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
print("done", result.computed)
"""


def extract(
    folder: Path, data: Path, cache: Path, where: str = "nothing", count: int = 1
) -> subprocess.CompletedProcess:  # type: ignore[type-arg]
    words = [sys.executable, "-c", SCRIPT, str(folder), str(data), str(cache), where, str(count)]
    return subprocess.run(words, capture_output=True, text=True, cwd=Path(featurecache.__file__).parent.parent)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path, View]:  # type: ignore[no-untyped-def]
    home = tmp_path_factory.mktemp("undisturbed")
    folder, data = save_vit(home / "vit"), image_folder(home / "data", N)
    assert extract(folder, data, home / "cache").stdout == f"done {N}\n"
    return folder, data, featurecache.open_view("data", home / "cache")


def committed(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("*/*/*.h5")}


def finishes_as_if_undisturbed(folder: Path, data: Path, cache: Path, clean: View) -> int:
    """Run the same command to its end; how many images it still computed."""
    before = committed(cache)
    result = featurecache.extract(data, backbone=str(folder), cache=cache, outputs="cls,tokens", batch_size=4)
    assert before.items() <= committed(cache).items()
    view = featurecache.open_view("data", cache)
    assert view.ids == clean.ids
    for output in ("cls", "tokens"):
        assert torch.equal(view.tensor(output), clean.tensor(output))
    assert list(cache.rglob("*.tmp")) == []
    return result.computed


@pytest.mark.parametrize(
    ("where", "count", "left"),
    [
        ("row", 1, {N}),  # the very first write of the store
        ("row", 12, {N, N - 8}),  # rows of a later batch
        ("fsync", 5, {N, N - 8}),
        ("name", 2, {N}),  # tokens of the first images: cls is committed, tokens are not
        ("folder", 5, {N - 8}),  # it has its name, the folder is not synced
        ("shard", 4, {N - 8}),
        ("view", 3, {0, N}),
    ],
)
def test_killed_in_mid_extraction_the_same_command_finishes(
    tmp_path: Path, undisturbed: tuple[Path, Path, View], where: str, count: int, left: set[int]
) -> None:
    folder, data, clean = undisturbed
    killed = extract(folder, data, tmp_path, where, count)
    assert killed.returncode == -signal.SIGKILL
    assert finishes_as_if_undisturbed(folder, data, tmp_path, clean) in left


@pytest.mark.parametrize("count", [3, 20])
def test_a_full_disk_is_one_sentence_and_the_same_command_continues(
    tmp_path: Path, undisturbed: tuple[Path, Path, View], count: int
) -> None:
    folder, data, clean = undisturbed
    full = extract(folder, data, tmp_path, "full", count)
    assert (full.returncode, full.stderr) == (1, "")
    assert full.stdout.startswith("CannotWrite: cannot write ")
    assert "No space left on device. What was committed is safe; the same command continues." in full.stdout
    finishes_as_if_undisturbed(folder, data, tmp_path, clean)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user cannot mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_loses_nothing_and_ends_no_interpreter(
    small_disk: Path, undisturbed: tuple[Path, Path, View], monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    folder, data, clean = undisturbed
    (small_disk / "ballast").write_bytes(bytes(70_000))
    monkeypatch.setitem(
        globals(),
        "SCRIPT",
        SCRIPT.replace(
            "seen = 0", "seen = 0; extraction.shutil.disk_usage = lambda _: type('U', (), {'free': 10**9})", 1
        ),
    )
    full = extract(folder, data, small_disk)
    assert (full.returncode, full.stderr) == (1, "")
    assert "No space left on device" in full.stdout
    kept = committed(small_disk)
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert kept.items() <= committed(small_disk).items()
    finishes_as_if_undisturbed(folder, data, small_disk, clean)


def test_two_extractions_into_one_store_at_once(tmp_path: Path, undisturbed: tuple[Path, Path, View]) -> None:
    folder, data, clean = undisturbed
    words = [sys.executable, "-c", SCRIPT, str(folder), str(data), str(tmp_path), "nothing", "1"]
    home = Path(featurecache.__file__).parent.parent
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home) for _ in "ab"]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert finishes_as_if_undisturbed(folder, data, tmp_path, clean) == 0


def test_a_cut_shard_says_what_to_do_and_its_rows_are_computed_again(
    tmp_path: Path, undisturbed: tuple[Path, Path, View]
) -> None:
    folder, data, clean = undisturbed
    extract(folder, data, tmp_path)
    victim = sorted(tmp_path.glob("*/tokens/*.h5"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    broken = extract(folder, data, tmp_path)
    assert broken.returncode == 1
    assert victim.name in broken.stdout
    victim.unlink()
    assert finishes_as_if_undisturbed(folder, data, tmp_path, clean) == 8
