"""What a cache remembers of files: the unchanged are not read again, and nothing else is ever taken for unchanged."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command import call
from support.pictures import image_folder, save_picture

import featurecache
from featurecache.commands import extract
from featurecache.extraction import digest_cache, plan, scan
from featurecache.extraction.digest_cache import STAT, DigestCache
from featurecache.images import decoding
from featurecache.sources import open_source
from featurecache.sources.base import ImageFiles
from featurecache.sources.npz import _PackedImages

HOME = Path(featurecache.__file__).parent.parent


@pytest.fixture(autouse=True)
def _aged(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Files just made count as old."""
    monkeypatch.setattr(scan, "YOUNG", 0)


@pytest.fixture
def reads(monkeypatch) -> list[str]:  # type: ignore[no-untyped-def]
    """Every file read, by its path."""
    seen, read = [], ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda self, row: seen.append(self.path(row)) or read(self, row))
    return seen


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", 9)


def look(data: Path, cache: Path, remember: bool = True) -> plan.Extraction:
    """All that is done before anything is computed, the first screen included."""
    prepared = plan.prepare(data, backbone="vit-demo", random_weights=True, cache=cache, remember=remember)
    extract.extraction_record(prepared, None)
    return prepared


def digests_of(prepared: plan.Extraction) -> list[str]:
    return [prepared.digests[k].decode() for k in prepared.scan.sample_image]


def truth(data: Path) -> list[str]:
    return [decoding.digest(path.read_bytes()) for path in sorted(data.rglob("*.png"))]


def test_a_second_run_reads_no_file_and_one_more_image_is_read_alone(tmp_path, monkeypatch, data, vit, reads):
    monkeypatch.setattr(scan, "LOOKED_AT", 4)  # headers of some only, as of 100,000
    featurecache.extract(data, backbone=vit, cache=tmp_path / "c", outputs="cls")
    reads.clear()
    prepared = plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="cls", remember=True)
    again = extract.extraction_record(prepared, None)
    assert prepared.run().images == 9
    assert (again["data"]["looked_at"], reads) == (4, [])
    new = save_picture(data / "ill" / "new.png", 77)
    monkeypatch.setattr(scan, "_header_rows", lambda dataset, keys: np.arange(0))
    assert featurecache.extract(data, backbone=vit, cache=tmp_path / "c", outputs="cls").computed == 1
    assert set(reads) == {str(new)}


def test_one_image_more_changes_at_most_one_of_those_whose_header_is_looked_at() -> None:
    keys = np.random.default_rng(0).integers(-(2**62), 2**62, 1000)
    dataset = ImageFiles("/", [])  # only its length would be asked for
    before = scan._header_rows(dataset, keys)  # type: ignore[arg-type]
    after = scan._header_rows(dataset, np.append(keys, -(2**63)))  # type: ignore[arg-type]
    assert len(before) == len(after) == scan.LOOKED_AT
    assert len(set(after.tolist()) - set(before.tolist())) == 1


def test_a_file_that_changed_just_before_is_read_again(tmp_path, monkeypatch, data, reads):
    monkeypatch.setattr(scan, "YOUNG", digest_cache.YOUNG)
    look(data, tmp_path / "c")
    reads.clear()
    look(data, tmp_path / "c")
    assert len(reads) == 9


@pytest.mark.parametrize("back", [False, True])
def test_replaced_under_the_same_name_with_size_and_mtime_set_back(tmp_path, data, reads, back):
    victim = data / "ill" / "000.png"
    look(data, tmp_path / "c")
    before, old = victim.stat(), victim.read_bytes()
    reads.clear()
    other = old[:-1] + bytes([old[-1] ^ 1])
    if back:  # in place, the same inode
        victim.write_bytes(other)
    else:
        (data / "new").write_bytes(other)
        (data / "new").replace(victim)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (victim.stat().st_size, victim.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert digests_of(look(data, tmp_path / "c")) == truth(data)
    assert reads == [str(victim)]


@pytest.mark.parametrize("field", STAT.names)
def test_a_digest_is_given_back_only_where_the_whole_stat_agrees(tmp_path: Path, field: str) -> None:
    stats = np.array([(5, 10**18, 10**18 + 1, 2**64 - 1)], STAT)
    found, keys = DigestCache(tmp_path, writes=True), np.array([-(2**63)])
    digest = np.array([b"0123456789abcdef" * 2], "S32")
    found.put(keys, stats, digest)
    assert found.get(keys, stats) == digest
    stats[field] -= 1
    assert found.get(keys, stats) == b""


def test_many_are_remembered_found_and_forgotten(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 25_000
    keys = rng.integers(-(2**63), 2**63 - 1, n)
    stats = np.zeros(n, STAT)
    stats["size"] = np.arange(n)
    digests = np.frombuffer(rng.bytes(16 * n).hex().encode(), "S32")
    DigestCache(tmp_path, writes=True).put(keys[: n - 5], stats[: n - 5], digests[: n - 5])
    DigestCache(tmp_path, writes=True).drop(keys[:7])
    found = DigestCache(tmp_path, writes=False).get(keys, stats)
    assert (found[7 : n - 5] == digests[7 : n - 5]).all()
    assert (found[:7] == b"").all() and (found[n - 5 :] == b"").all()


def test_a_look_that_is_killed_need_not_be_repeated(tmp_path: Path, monkeypatch, data: Path, reads: list[str]) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scan, "_KEEP_EVERY", 0.0)
    monkeypatch.setattr(scan, "_STRETCH", 2)
    read = ImageFiles.read

    def dies(self: ImageFiles, row: int) -> bytes:
        if row == 6:
            raise KeyboardInterrupt
        return read(self, row)

    monkeypatch.setattr(ImageFiles, "read", dies)
    with pytest.raises(KeyboardInterrupt):
        look(data, tmp_path / "c")
    monkeypatch.setattr(ImageFiles, "read", read)
    reads.clear()
    assert digests_of(look(data, tmp_path / "c")) == truth(data)
    assert len(reads) == 3


def test_preparing_and_a_dry_run_write_nothing_and_the_run_remembers(tmp_path, data, vit, reads):
    words = ["extract", "--backbone", vit, "--data", str(data), "--cache", str(tmp_path / "c"), "--outputs", "cls"]
    assert call(*words, "--dry-run").exit_code == 0
    prepared = plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="cls")
    assert not (tmp_path / "c").exists()
    prepared.run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    reads.clear()
    assert call(*words, "--dry-run").exit_code == 0
    assert reads == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def test_no_path_and_no_name_is_written_into_the_memory(tmp_path: Path, data: Path) -> None:
    data.rename(tmp_path / "Meier_Hans")
    look(tmp_path / "Meier_Hans", tmp_path / "c")
    content = (tmp_path / "c" / digest_cache.NAME).read_bytes()
    assert b"Meier" not in content and b"000.png" not in content and str(tmp_path).encode() not in content


def _execute(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def _foreign(path: Path) -> None:
    path.unlink()
    _execute(path, "CREATE TABLE films (title TEXT)")


def _symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


LOOKS_AS_A_VIEW = "CREATE VIEW looks AS SELECT key AS digest, entry AS look FROM files"
SPOILS = {
    "garbage": lambda path: path.write_bytes(b"SQLite format 3\0\x10\0\1\1" + bytes(range(256)) * 40),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "no header": lambda path: path.write_text("not a database, but a note somebody put there"),
    "newer": lambda path: _execute(path, "PRAGMA user_version = 99"),
    "foreign": _foreign,
    "trigger": lambda path: _execute(path, "CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM files; END"),
    "view": lambda path: _execute(path, "DROP TABLE looks", LOOKS_AS_A_VIEW),
    "log": lambda path: _execute(path, "PRAGMA journal_mode = WAL"),
    "stray log": lambda path: path.with_name(path.name + "-wal").write_bytes(bytes(100)),
    "symlink": _symlink,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_foreign_or_newer_file_is_made_anew_without_failing(tmp_path, data, reads, spoil):
    look(data, tmp_path / "c")
    path = tmp_path / "c" / digest_cache.NAME
    spoil(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    reads.clear()
    assert digests_of(look(data, tmp_path / "c", remember=False)) == truth(data)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before  # it may not write
    assert len(reads) == 9
    reads.clear()
    assert digests_of(look(data, tmp_path / "c")) == truth(data)
    assert len(reads) == 9
    reads.clear()
    assert look(data, tmp_path / "c").dataset.notes == ()
    assert reads == []
    assert not path.is_symlink()


def test_a_strangers_journal_deletes_no_file_of_mine(tmp_path: Path, data: Path) -> None:
    """A journal may name a "super-journal", which SQLite removes after it has played the journal back."""
    look(data, tmp_path / "c")
    thesis, path = tmp_path / "thesis.txt", tmp_path / "c" / digest_cache.NAME
    thesis.write_text("three years")
    name = str(thesis).encode()
    page = (512).to_bytes(4, "big")
    header = bytes.fromhex("d9d505f920a163d7") + bytes(12) + page + (4096).to_bytes(4, "big")
    total = sum(value - 256 if value > 127 else value for value in name) & 0xFFFFFFFF
    tail = (4096 // 4096 + 1).to_bytes(4, "big") + name + len(name).to_bytes(4, "big") + total.to_bytes(4, "big")
    journal = header.ljust(512, b"\0") + tail + bytes.fromhex("d9d505f920a163d7")
    path.with_name(path.name + "-journal").write_bytes(journal)
    assert digests_of(look(data, tmp_path / "c")) == truth(data)
    assert thesis.read_text() == "three years"


def test_a_flipped_bit_of_an_entry_is_noticed(tmp_path: Path, monkeypatch, data: Path) -> None:  # type: ignore[no-untyped-def]
    look(data, tmp_path / "c")
    monkeypatch.setattr(scan, "_header_rows", lambda dataset, keys: np.arange(0))  # looking would find it out
    path = tmp_path / "c" / digest_cache.NAME
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        entries = database.execute("SELECT key, entry FROM files").fetchall()
        for number, (key, entry) in enumerate(entries):
            flipped = bytearray(entry)
            flipped[32 + number] ^= 1 << number % 8  # in the digest
            database.execute("UPDATE files SET entry = ? WHERE key = ?", (bytes(flipped), key))
    assert digests_of(look(data, tmp_path / "c")) == truth(data)


def test_values_of_other_kinds_in_our_own_tables_are_passed_over(tmp_path: Path, data: Path) -> None:
    look(data, tmp_path / "c")
    path = tmp_path / "c" / digest_cache.NAME
    odd, even = "entry = 'text' WHERE key % 2", "entry = zeroblob(9) WHERE key % 2 = 0"
    _execute(path, f"UPDATE files SET {odd}", f"UPDATE files SET {even}")
    assert digests_of(look(data, tmp_path / "c")) == truth(data)


@pytest.mark.parametrize("said", ['[8, 8, "\\u001b[2J"]', '[1e999, 8, "RGB"]', '[8, -8, "RGB"]', '{"a": 1}', "[[", "7"])
def test_a_remembered_header_that_is_none_is_looked_at_again(tmp_path: Path, data: Path, said: str) -> None:
    look(data, tmp_path / "c")
    _execute(tmp_path / "c" / digest_cache.NAME, f"UPDATE looks SET look = CAST('{said}' AS BLOB)")
    prepared = look(data, tmp_path / "c")
    assert all(header[2] in ("RGB", "grey") and header[0] > 20 for header in prepared.scan.headers.values())  # type: ignore


def test_without_a_lock_the_run_goes_on_without_memory_and_says_so(tmp_path, monkeypatch, data, vit):
    monkeypatch.setattr(digest_cache, "_PATIENCE", 0.05)
    look(data, tmp_path / "c")
    with contextlib.closing(sqlite3.connect(tmp_path / "c" / digest_cache.NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        prepared = plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="cls", remember=True)
        assert ["locked" in note and "read again" in note for note in prepared.dataset.notes] == [True]
        assert prepared.run().computed == 9


def test_a_read_only_cache_is_asked_and_not_written(tmp_path, mounted, data, reads):
    look(data, mounted)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    save_picture(data / "well" / "new.png", 50)
    reads.clear()
    prepared = look(data, mounted)
    assert digests_of(prepared) == truth(data)
    assert len(reads) == 1
    assert "readonly" in prepared.dataset.notes[0]


def test_a_full_disk_takes_the_memory_and_not_the_run(mounted: Path, data: Path, reads: list[str]) -> None:
    (mounted / "ballast").write_bytes(bytes(8 << 20)[: shutil.disk_usage(mounted).free])
    prepared = look(data, mounted / "c")
    assert digests_of(prepared) == truth(data)
    assert len(prepared.dataset.notes) == 1


WRITER = """
import sys
from pathlib import Path
import numpy as np
from featurecache.extraction.digest_cache import STAT, DigestCache
print("ready", flush=True)
stats, digests = np.zeros(50, STAT), np.full(50, b"ab" * 16)
for part in range(8):
    DigestCache(Path(sys.argv[1]), writes=True).put(np.arange(50) * 20 + part, stats, digests)
"""


@pytest.mark.slow
def test_two_processes_remember_at_once(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=HOME, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"ready\n"
    stats, digests = np.zeros(1000, STAT), np.full(50, b"ab" * 16)
    for part in range(8, 16):
        DigestCache(tmp_path, writes=True).put(np.arange(50) * 20 + part, stats[:50], digests)
    other.stdout.close()
    assert other.wait() == 0
    found = DigestCache(tmp_path, writes=False).get(np.arange(1000), stats)
    assert (found.reshape(50, 20)[:, :16] == b"ab" * 16).all()


def test_a_remembered_digest_that_proves_wrong_is_forgotten(tmp_path: Path, monkeypatch, data: Path, vit: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scan, "_header_rows", lambda dataset, keys: np.arange(0))  # looking would find it out
    seen = plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="cls").scan.files  # type: ignore[union-attr]
    DigestCache(tmp_path / "c", writes=True).put(seen.keys[:1], seen.stats[:1], np.array([b"ab" * 16]))
    first = featurecache.extract(data, backbone=vit, cache=tmp_path / "c", outputs="cls")
    assert [(name, "changed" in reason) for name, reason in first.failed] == [("ill/000.png", True)]
    second = featurecache.extract(data, backbone=vit, cache=tmp_path / "c", outputs="cls")
    assert (second.computed, second.images, second.failed) == (1, 9, [])


def test_an_unchanged_archive_is_not_unpacked_again(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path, unpacked = tmp_path / "set.npz", []
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    np.savez(path, train_images=pixels, train_labels=np.arange(6) % 2)
    first = look(path, tmp_path / "c")
    unpack = _PackedImages._unpack
    monkeypatch.setattr(_PackedImages, "_unpack", lambda self: unpacked.append(1) or unpack(self))
    second = look(path, tmp_path / "c")
    assert digests_of(second) == digests_of(first) == [decoding.digest(image) for image in pixels]
    assert unpacked == []
    np.savez(path, train_images=pixels[::-1], train_labels=np.arange(6) % 2)
    assert digests_of(look(path, tmp_path / "c")) == digests_of(first)[::-1]


def test_files_that_are_no_files_are_read_every_time_and_named(tmp_path: Path, data: Path) -> None:
    (data / "ill" / "gone.png").symlink_to("nowhere")
    os.mkfifo(data / "ill" / "pipe.png")
    assert sorted(look(data, tmp_path / "c").scan.unread.values()) == ["a link to a file that is gone", "not a file"]


def test_a_file_longer_than_its_stat_said_is_read_to_its_end(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.png").write_bytes(bytes(range(200)))
    stat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda d: os.stat_result([*stat(d)[:6], 10, *stat(d)[7:]]))
    assert open_source(tmp_path).read(0) == bytes(range(200))
