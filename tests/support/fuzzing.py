"""Mutants of files of ours with right hashes: of the directory's JSON, of the bytes, and of where the line points."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from featurecache.files.directory import USER_BLOCK
from support.plant import sealed

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
            text = _changed_json(text, random)
        body[offset - USER_BLOCK :] = text
        length = len(text)
    else:
        for _ in range(random.randint(1, 3)):
            _change_bytes(body, random, offset - USER_BLOCK if random.random() < 0.3 else 0)
        if random.random() < 0.1:
            offset, length = random.randrange(len(body)) + USER_BLOCK, random.randrange(length)
    return sealed(bytes(body), offset, length)


def _change_bytes(body: bytearray, random: Random, first: int) -> None:
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


def _changed_json(text: bytes, random: Random) -> bytes:
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
    holder, key = _somewhere(record, random)
    if kind == 1 and isinstance(holder, dict):
        del holder[key]
    elif kind == 2:
        other, name = _somewhere(record, random)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 3 and type(holder[key]) is int:
        holder[key] += random.choice([-64, -1, 1, 64, 128])
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(record).encode()


def _somewhere(record: Any, random: Random) -> tuple[Any, Any]:
    """(dict or list, key) of a value in it, at any depth."""
    holder, key = record, random.choice(list(record))
    while isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.9:
        holder = holder[key]
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    return holder, key
