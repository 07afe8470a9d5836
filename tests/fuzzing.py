"""Mutants of HDF5 files that get past hashes: of the file, in its user block, and of HDF5's own structures.

HDF5 guards the parts of a file with checksums (Jenkins' lookup3 over the part, the sum behind it). A mutant that does
not recompute them dies at the first, and the code behind it is never reached; so here most of them are recomputed.
"""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import strategies as st
from plant import seal

_SIGNATURES = (b"\x89HDF\r\n\x1a\n", b"OHDR", b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHIB", b"FSHD", b"FSSE")
_LONGEST = 1200  # bytes of a guarded part that is looked for
_WORD = 0xFFFFFFFF


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hashlittle with seed 0, as HDF5 uses it."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    padded = data + bytes(-len(data) % 12)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    if not words:
        return c
    for k in range(0, len(words) - 3, 3):
        a, b, c = (a + words[k]) & _WORD, (b + words[k + 1]) & _WORD, (c + words[k + 2]) & _WORD
        for shift in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & _WORD) ^ _turned(c, shift)
            c = (c + b) & _WORD
            a, b, c = b, c, a
    a, b, c = (a + words[-3]) & _WORD, (b + words[-2]) & _WORD, (c + words[-1]) & _WORD
    for shift in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _turned(b, shift)) & _WORD
        a, b, c = b, c, a
    return b


def _turned(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _WORD


def guarded(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of the parts whose checksum stands at ``end``, found by trying."""
    found = []
    for signature in _SIGNATURES:
        start = data.find(signature)
        while start >= 0:
            ends = range(start + 8, min(start + _LONGEST, len(data) - 4))
            end = next((e for e in ends if struct.unpack_from("<I", data, e)[0] == lookup3(data[start:e])), None)
            if end is not None:
                found.append((start, end))
            start = data.find(signature, start + 4)
    return found


NUMBERS = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, _WORD, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
MUTATION = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.sampled_from(["u16", "u32", "u64"]), st.floats(0, 1), NUMBERS | st.integers(0, 1 << 16)),
    st.tuples(st.just("copy"), st.floats(0, 1), st.tuples(st.floats(0, 1), st.integers(1, 64))),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(0, 64)),
    st.tuples(st.just("grow"), st.floats(0, 1), st.integers(1, 64)),
)
MUTANT = st.tuples(st.lists(MUTATION, min_size=1, max_size=4), st.booleans() | st.just(True), st.booleans())


def mutate(data: bytes, parts: list[tuple[int, int]], mutant: tuple[list[Any], bool, bool]) -> bytes:
    """``data`` changed and sealed anew. ``mutant``: what to do, whether HDF5's checksums are recomputed, and whether
    only guarded parts (the structure) are aimed at."""
    mutations, mend, aimed = mutant
    changed = bytearray(data)
    for kind, where, value in mutations:
        place = _place(where, parts, len(changed)) if aimed else 512 + int(where * (len(changed) - 513))
        if kind == "flip":
            changed[place] ^= 1 << value
        elif kind == "byte":
            changed[place] = value
        elif kind == "copy":
            source = 512 + int(value[0] * (len(changed) - 513))
            piece = changed[source : source + value[1]]
            changed[place : place + len(piece)] = piece[: len(changed) - place]
        elif kind == "cut":
            del changed[max(600, len(changed) - value) :]
        elif kind == "grow":
            changed += bytes(value)
        else:
            width = {"u16": 2, "u32": 4, "u64": 8}[kind]
            piece = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            changed[place : place + width] = piece[: len(changed) - place]
    if mend:
        for start, end in parts:
            if end + 4 <= len(changed) and changed[start:end] != data[start:end]:
                struct.pack_into("<I", changed, end, lookup3(bytes(changed[start:end])))
    return seal(bytes(changed))


def _place(where: float, parts: list[tuple[int, int]], size: int) -> int:
    """A byte of a guarded part, all bytes of all parts alike."""
    rest = int(where * (sum(end - start for start, end in parts) - 1))
    for start, end in parts:
        if rest < end - start:
            return min(start + rest, size - 1)
        rest -= end - start
    raise AssertionError
