"""Shards and the files they lie in: shape on disk, commits that are whole, reading back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import TOKENS, add_shard, digests, features, make_store

from featurecache.errors import CannotWrite, DamagedFile, UnsafeFile
from featurecache.files.atomic import AtomicFile
from featurecache.files.directory import USER_BLOCK, open_columns, read_user_block
from featurecache.store.shards import Layout, ShardWriter, find_by_digest, map_rows, read_shard, shard_name
from featurecache.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "cache")


@pytest.fixture
def path(store) -> Path:
    """A shard of seven rows."""
    return add_shard(store, range(7), TOKENS)


def test_a_shard_opens_with_plain_h5py_and_starts_at_a_multiple_of_64(path):
    rows = features(range(7), TOKENS)
    with h5py.File(path) as file:
        assert np.array_equal(file["features"][...], rows)
        assert file["digests"][...].tolist() == digests(range(7)).tolist()
        assert file["checksums"][...].tolist() == [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows]
        assert file["features"].id.get_offset() % 64 == 0
        assert file["features"].chunks is None
        assert file["features"].attrs["prefix"] == '["cls"]'


def test_the_first_line_says_format_hash_length_and_where_the_directory_lies(path):
    data = path.read_bytes()
    with h5py.File(path) as file:
        offset, directory = file["directory"].id.get_offset(), file["directory"][...].tobytes()
        places = {name: file[name].id.get_offset() for name in ("checksums", "digests", "errors", "features")}
    line = f"featurecache 2 {xxhash.xxh3_128_hexdigest(data[USER_BLOCK:])} {len(data)} {offset} {len(directory)} "
    assert data[:USER_BLOCK] == f"{line}{xxhash.xxh3_64_hexdigest(directory)}\n".encode().ljust(USER_BLOCK, b"\0")
    assert {name: entry["offset"] for name, entry in json.loads(directory)["columns"].items()} == places


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40), lost=st.integers(0, 39), width=st.integers(1, 70),
    dtype=st.sampled_from(["float16", "float32"]), tokens=st.booleans(),
)  # fmt: skip
def test_rows_come_back_as_they_were_given(tmp_path_factory, n, lost, width, dtype, tokens):
    store = make_store(tmp_path_factory.mktemp("store"))
    layout = Layout("x", (3, width) if tokens else (width,), dtype)
    kept = max(1, n - lost)  # images that fail leave a shorter shard than planned
    path = add_shard(store, range(kept), layout, range(n))
    shard = read_shard(path, layout)
    mapped = map_rows(path, shard.size, shard.offset, kept, layout)
    assert path.stem == shard_name(digests(range(kept)))
    assert np.array_equal(mapped.numpy(), features(range(kept), layout))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_rows_give_the_same_file(tmp_path: Path):
    first = add_shard(make_store(tmp_path / "a"), range(9), TOKENS)
    second = add_shard(make_store(tmp_path / "b"), range(9), TOKENS, range(12))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_first_to_commit_a_name_wins(store, path):
    before = path.stat()
    add_shard(store, range(7), TOKENS)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_shard_without_rows_leaves_nothing(tmp_path: Path):
    writer = ShardWriter(tmp_path, digests(range(3)), TOKENS, {})
    assert writer.commit() is None
    assert list((tmp_path / "tokens").iterdir()) == []


def test_rows_are_found_by_digest_and_the_first_shard_wins(store):
    shards = [read_shard(add_shard(store, numbers, TOKENS), TOKENS) for numbers in (range(4), range(2, 6))]
    places = find_by_digest(shards, digests([5, 99, 2]))
    assert places.mask.tolist() == [True, False, True]
    assert (places.file.tolist(), places.row.tolist()) == ([1, -1, 0], [3, -1, 2])


@pytest.mark.parametrize("size", [0, 100, USER_BLOCK, 700, 8_048, 8_050])
def test_a_shard_of_another_length_is_refused(path, size):
    assert path.stat().st_size == 8_049
    os.truncate(path, size)
    with pytest.raises(DamagedFile, match="was written with" if size else "is not a file"):
        read_shard(path, TOKENS)


@pytest.mark.parametrize("place", ["line", "directory"])
def test_a_flipped_bit_in_the_line_or_the_directory_is_noticed(path, place):
    block, data = read_user_block(path), bytearray(path.read_bytes())
    places = range(len(data[:USER_BLOCK].split(b"\n")[0])) if place == "line" else range(block.offset, len(data), 7)
    for number in places:
        damaged = data.copy()
        damaged[number] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile), open_columns(path) as file:
            file.check_bytes()


def test_a_file_of_a_very_long_name_can_be_written(tmp_path: Path):
    with AtomicFile(tmp_path / f"{'x' * 250}.h5") as file:
        file.commit()
    assert [len(path.name) for path in tmp_path.iterdir()] == [253]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_symbolic_links_in_a_store_are_refused(tmp_path, path, what):
    if what == "file":
        (tmp_path / "tokens").mkdir()
        (tmp_path / "tokens" / path.name).symlink_to(path)
    else:
        (tmp_path / "tokens").symlink_to(path.parent)
    with pytest.raises(UnsafeFile, match="symbolic link"):
        read_shard(tmp_path / "tokens" / path.name, TOKENS)


def test_a_read_only_folder_is_one_sentence(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        AtomicFile(file / "a.h5")


@pytest.mark.parametrize(
    ("line", "words"),
    [("featurecache 1 ", "has format 1"), ("featurecache 2 x", "is not a file"), ("", "is not a file")],
)
def test_files_of_other_formats_are_named(tmp_path: Path, line: str, words: str):
    (tmp_path / "a.h5").write_bytes(line.encode().ljust(700, b"\0"))
    with pytest.raises(DamagedFile, match=words):
        read_user_block(tmp_path / "a.h5")
