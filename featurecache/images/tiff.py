"""TIFF: its directories, one page of several, one plane of several colours; by hand, as a digest and a look need it.

A TIFF is a chain of directories, one for each page (TIFF 6.0, section 2; BigTIFF has eight bytes where it has four).
Pages and planes are given as the bytes of a file that has that one only: the same data under another directory, so that
every decoder reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from featurecache.errors import UnreadableImage

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, each in two byte orders
_MOST_PAGES = 1 << 16  # what has more leads in circles
_MOST_ENTRIES = 4096
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: a smaller copy of another page; where another one is transparent
_SHORT, _LONG, _LONG8 = 3, 4, 16
_FORMAT = {_SHORT: "H", _LONG: "L", _LONG8: "Q"}  # whole numbers
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ONE = {262: 1, 277: 1, 284: 1}  # of a grey plane: black is zero, one sample, not planar
_OFFSETS = (273, 279, 324, 325)  # of strips and tiles, and their sizes
_PER_SAMPLE = (258, 339)  # bits and format of each sample
_OF_COLOURS = (280, 281, 338, 340, 341)  # ends of the range, meaning of further samples: of no single plane


class Tiff(NamedTuple):
    """What a directory says of its pixels (TIFF 6.0, section 8; the first value of each tag)."""

    bits: int  # of a sample
    samples: int  # of a pixel
    photometric: int  # 0: white is zero, 1: black is zero, 2: RGB, ...
    format: int  # 1: unsigned, 2: signed, 3: floating-point, ...
    planar: bool  # whether each sample has a plane of its own
    subfile: int
    big_endian: bool
    big: bool
    photometric_at: int  # place of that value in the file


class _TiffEntry(NamedTuple):
    tag: int
    kind: int
    length: int
    at: int  # place of its values


def is_tiff(data: Any) -> bool:
    return data[:4] in _MAGIC


def _numbers(data: Any) -> tuple[str, str, str, int]:
    """(offset, number of entries, entry) as `struct` has them, and bytes of an entry."""
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
    return (order + "Q", order + "Q", order + "HHQ", 20) if big else (order + "L", order + "H", order + "HHL", 12)


def _directories(data: Any) -> Iterator[tuple[int, int]]:
    """(place, number of entries) of each directory, up to the first that is not in the file."""
    offset, number, _, size = _numbers(data)
    at, places = _first_at(offset), set[int]()
    try:
        while len(places) < _MOST_PAGES:
            (place,) = struct.unpack_from(offset, data, at)
            if not place or place in places:
                return
            (entries,) = struct.unpack_from(number, data, place)
            places.add(place)
            yield place, entries
            at = place + struct.calcsize(number) + size * entries
    except (struct.error, OverflowError):
        return


def _entries(data: Any, place: int, entries: int) -> Iterator[_TiffEntry]:
    offset, number, entry, size = _numbers(data)
    room, start = struct.calcsize(offset), place + struct.calcsize(number)
    for at in range(start, start + size * min(entries, _MOST_ENTRIES), size):
        tag, kind, length = struct.unpack_from(entry, data, at)
        each = _TiffEntry(tag, kind, length, at + size - room)
        if _bytes_of(each) > room:
            each = each._replace(at=struct.unpack_from(offset, data, each.at)[0])
        yield each


def _bytes_of(entry: _TiffEntry) -> int:
    return entry.length * _BYTES.get(entry.kind, 1)


def has_second(data: bytes) -> bool:
    """Whether the first directory names another, wherever that is: what a digest goes by."""
    offset, number, _, size = _numbers(data)
    for place, entries in _directories(data):
        try:
            (second,) = struct.unpack_from(offset, data, place + struct.calcsize(number) + size * entries)
        except (struct.error, OverflowError):
            return False
        return bool(second)
    return False


def read_tiff(data: bytes, page: tuple[int, int] | None = None) -> Tiff | None:
    """The first directory, or ``page``; None where the bytes are no TIFF, or it cannot be read."""
    page = page or (next(_directories(data), None) if is_tiff(data) else None)
    if page is None:
        return None
    order = _numbers(data)[0][0]
    values, photometric_at = {258: 1, 277: 1, 262: 1, 339: 1, 284: 1, 254: 0}, 0  # where the tags are not there
    try:
        for each in _entries(data, *page):
            if each.tag in values and each.kind in _FORMAT:
                (values[each.tag],) = struct.unpack_from(order + _FORMAT[each.kind], data, each.at)
                photometric_at = each.at if (each.tag, each.kind) == (262, _SHORT) else photometric_at
    except (struct.error, OverflowError):
        return None
    bits, samples, photometric, kind, planar, subfile = values.values()
    big = _numbers(data)[3] == 20
    return Tiff(bits, samples, photometric, kind, planar == 2, subfile, order == ">", big, photometric_at)


def black_is_zero(data: bytes) -> bytes | None:
    """A grey TIFF whose 0 is white with a header that says the opposite; None where it is no such thing."""
    header = read_tiff(data)
    if header is None or header.photometric != 0 or not header.photometric_at or header.samples != 1:
        return None
    value = struct.pack(">H" if header.big_endian else "<H", 1)
    return data[: header.photometric_at] + value + data[header.photometric_at + 2 :]


def pages(data: Any) -> list[int]:
    """The numbers of the directories that are pages and no previews or masks of others; the first at least."""
    headers = [(number, read_tiff(data, page)) for number, page in enumerate(_directories(data))]
    whole = [number for number, header in headers if header and not header.subfile & (_REDUCED | _MASK)]
    return whole or [0]


def page_alone(data: bytes, number: int) -> bytes:
    """The file with page ``number`` (from 0) for its first. Raises UnreadableImage."""
    if not is_tiff(data):
        raise UnreadableImage("a page by its number, of a file that is no TIFF and no DICOM")
    places = [place for place, _ in _directories(data)]
    if number >= len(places):
        raise UnreadableImage(f"no page {number:,}: the file has {len(places):,}, counted from 0")
    return _first_directory_at(data, places[number])


def plane_alone(data: bytes, plane: int) -> bytes:
    """The plane of one colour of the first page as a grey file. Raises struct.error where there is none."""
    offset, number, entry, _ = _numbers(data)
    page, header = next(_directories(data), (0, 0)), read_tiff(data)
    samples = 1 if header is None else header.samples
    fresh = []
    for each in _entries(data, *page):
        kind, count, values = each.kind, each.length, data[each.at : each.at + _bytes_of(each)]
        if each.tag in _OF_COLOURS:
            continue
        if each.tag in _ONE:
            kind, count, values = _SHORT, 1, struct.pack(offset[0] + "H", _ONE[each.tag])
        elif each.tag in _PER_SAMPLE:
            count, values = 1, values[: _bytes_of(each) // each.length]
        elif each.tag in _OFFSETS:
            length = len(values) // samples
            count, values = each.length // samples, values[plane * length : (plane + 1) * length]
            each = each._replace(at=each.at + plane * length)
        short = len(values) <= struct.calcsize(offset)
        fresh.append(struct.pack(entry, each.tag, kind, count))
        fresh.append(values.ljust(struct.calcsize(offset), b"\0") if short else struct.pack(offset, each.at))
    data += b"\0" * (len(data) % 2)
    directory = struct.pack(number, len(fresh) // 2) + b"".join(fresh) + struct.pack(offset, 0)
    return _first_directory_at(data + directory, len(data))


def _first_directory_at(data: bytes, place: int) -> bytes:
    offset = _numbers(data)[0]
    at = _first_at(offset)
    return data[:at] + struct.pack(offset, place) + data[at + struct.calcsize(offset) :]


def _first_at(offset: str) -> int:
    """Where the place of the first directory stands."""
    return 8 if offset[1] == "Q" else 4
