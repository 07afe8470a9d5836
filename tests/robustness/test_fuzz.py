"""Mutants of valid files, sealed anew so that they get past the hashes, through our public readers.

Only a refusal of ours or an answer may come out: no other exception, no warning, no read outside of the file. Features
that are given bear their checksums. FEATURECACHE_FUZZ_MUTANTS: how many of the long run; FEATURECACHE_FUZZ_SEED:
another one.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.builders import CLS, ORDER, TOKENS, make_view
from support.plant import sealed

from featurecache.commands.inspect import view_lines, view_record
from featurecache.errors import CacheError, FeatureCacheError
from featurecache.files import directory
from featurecache.files.directory import USER_BLOCK, read_user_block
from featurecache.store.shards import layout_in, map_rows, read_shard
from featurecache.store.store import open_store
from featurecache.store.view import View

LONG = int(os.environ.get("FEATURECACHE_FUZZ_MUTANTS", 12_000))
SEED = int(os.environ.get("FEATURECACHE_FUZZ_SEED", 0))


VALUES: list[Any] = [
    0, 1, -1, 2, 63, 64, 512, 1 << 31, 1 << 40, (1 << 48) - 1, 1 << 48, (1 << 63) - 1, 1 << 63, 1 << 70, -64, 0.0, 1.5,
    1e300, True, False, None, "", "a", "\u80ba", "\x00", "[]", "[1]", "{}", "null", "[2, 2]", [], {}, [1], [[]], [9, 4],
    "<f2", "<f4", ">f2", "<i8", "<u8", "|S32", "|S9999", "|b1", "|u1", "|O", "<M8[s]", "|V8", "<c8",
    [["path", "|S255"]], [["a", "<i8"], ["a", "<i8"]], {"dtype": "<f2", "shape": [1], "offset": 512, "attributes": {}},
]  # fmt: skip


def mutant(data: bytes, random: Random) -> bytes:
    """``data`` with one to three changes, sealed anew."""
    words = data[:USER_BLOCK].split(b"\n")[0].split(b" ")
    offset, length = int(words[4]), int(words[5])
    body, text = bytearray(data[USER_BLOCK:]), data[offset : offset + length]
    if random.random() < 0.5:
        for _ in range(random.randint(1, 3)):
            text = changed_json(text, random)
        body[offset - USER_BLOCK :] = text
        length = len(text)
    else:
        for _ in range(random.randint(1, 3)):
            change_bytes(body, random, offset - USER_BLOCK if random.random() < 0.3 else 0)
        if random.random() < 0.1:
            offset, length = random.randrange(len(body)) + USER_BLOCK, random.randrange(length)
    return sealed(bytes(body), offset, length)


def change_bytes(body: bytearray, random: Random, first: int) -> None:
    place = random.randrange(first, len(body) - 8)
    kind = random.randrange(6)
    if kind == 0:
        body[place] ^= 1 << random.randrange(8)
    elif kind == 1:
        body[place] = random.randrange(256)
    elif kind == 2:
        number = random.choice([0, 1, 0xFF, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, random.randrange(1 << 16)])
        body[place : place + 8] = number.to_bytes(8, "little")
    elif kind == 3:
        source = random.randrange(len(body) - 8)
        body[place : place + 8] = body[source : source + 8]
    elif kind == 4:
        del body[max(64, len(body) - random.randrange(64)) :]
    else:
        body += bytes(random.randrange(64))


def changed_json(text: bytes, random: Random) -> bytes:
    try:
        record = json.loads(text)
    except ValueError:  # an earlier change has made it none
        return text
    kind = random.randrange(10)
    if kind == 0:  # of the text itself
        place = random.randrange(len(text))
        return (
            text[:place] + random.choice([b"NaN", b"[" * 99, b'"a":1,', b"\xff", b"1e999", b"0" * 5000]) + text[place:]
        )
    holder, key = somewhere(record, random)
    if kind == 1 and isinstance(holder, dict):
        del holder[key]
    elif kind == 2:
        other, name = somewhere(record, random)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 3 and type(holder[key]) is int:
        holder[key] += random.choice([-64, -1, 1, 64, 128])
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(record).encode()


def somewhere(record: Any, random: Random) -> tuple[Any, Any]:
    """(dict or list, key) of a value in it, at any depth."""
    holder, key = record, random.choice(list(record))
    while isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.9:
        holder = holder[key]
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    return holder, key


def read_view(path: Path) -> None:
    view = View(path)
    view_lines(view_record(view))
    for output in view.outputs:
        rows = view.array(output).reshape(len(view), -1)
        sums = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows]
        assert sums == view.stored(output).checksums.tolist()
        view.tensor(output, [0] if len(view) else [])


def read_one_shard(path: Path) -> None:
    layout = layout_in(path)
    shard = read_shard(path, layout)
    rows = map_rows(path, shard.size, shard.offset, len(shard.digests), layout)
    assert rows.shape == (len(shard.digests), *layout.shape)
    rows.sum()


@pytest.mark.parametrize("kind", ["view", "shard"])
@pytest.mark.parametrize(
    "count", [pytest.param(300, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
def test_mutants_are_refused_or_read(tmp_path: Path, monkeypatch, kind: str, count: int) -> None:  # type: ignore[no-untyped-def]
    view = make_view(
        tmp_path / "cache", ORDER, layouts=(CLS, TOKENS), meta={"age": list(range(9)), "site": list("aßcdefghi")}
    )
    target = view.path if kind == "view" else next((view.store / "tokens").iterdir())
    read, real = read_view if kind == "view" else read_one_shard, directory._pread

    def inside(path: Path, descriptor: int, offset: int, size: int) -> bytearray:
        assert 0 <= offset and 0 <= size and offset + size <= os.fstat(descriptor).st_size
        return real(path, descriptor, offset, size)

    monkeypatch.setattr(directory, "_pread", inside)
    original, random, outcomes = target.read_bytes(), Random(SEED), Counter[str]()
    for number in range(count):
        target.write_bytes(mutant(original, random))
        try:
            read(target)
            outcomes["read"] += 1
        except FeatureCacheError as error:
            assert str(error)
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number} of {kind}, seed {SEED}") from error
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes["refused"] > count // 5 and outcomes["read"] > count // 20


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 80))
@example(b"featurecache 2 " + b"0" * 32 + b" 99999999999999999999999999 512 9 " + b"0" * 16 + b"\n", 0)
@example("featurecache ٢ ".encode(), 0)
def test_first_lines_are_read_or_refused(tmp_path_factory, data: bytes, at: int) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "line.h5"
    line = b"featurecache 2 " + b"0" * 32 + b" 600 512 88 " + b"0" * 16 + b"\n"
    whole = bytearray(line.ljust(600, b"\0"))
    whole[at : at + len(data)] = data
    path.write_bytes(whole[:600])
    try:
        assert read_user_block(path).size == path.stat().st_size
    except CacheError as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4), max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_records_are_read_or_refused(tmp_path_factory, data) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.getbasetemp() / "records"
    if not folder.exists():
        make_view(folder, ORDER, layouts=())
    (source,) = (path for path in folder.iterdir() if path.name.startswith("tiny"))
    record = json.loads((source / "spec.json").read_text())
    del record["check"]  # made by hand
    place = record
    while True:  # somewhere in the record another value
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    copy = folder / ".copy"
    copy.mkdir(exist_ok=True)
    (copy / "spec.json").write_text(json.dumps(record))
    (copy / "plan.json").write_text(json.dumps({"cpu": data.draw(JSON)}))
    for read in (lambda: open_store(copy), lambda: open_store(copy).plan):
        try:
            read()
        except CacheError as error:
            assert str(error)
