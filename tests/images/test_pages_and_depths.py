"""TIFF by page and plane, palettes of 8 bits, BMP of 5 and 6, and 16-bit files that use fewer bits."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import struct

import numpy as np
import pytest
from PIL import Image
from support.decoded import by_tifffile, decoded, encoded, reason

from featurecache.errors import UnreadableImage
from featurecache.images import tiff
from featurecache.images.decoding import decode, digest, image_header
from featurecache.images.headers import EncodedFrame, RawImage

tifffile = pytest.importorskip("tifffile")
RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 65536, (24, 40, 3), dtype=np.uint16)
TWELVE = RANDOM.integers(0, 4096, (24, 40), dtype=np.uint16)
TWELVE[0, 0] = 4095
EIGHT = np.rint(TWELVE * 255.0 / 4095).astype(np.uint8)


def frame(data: bytes, number: int) -> EncodedFrame:
    return EncodedFrame(data, number, hashlib.blake2b(data, digest_size=16))


# palettes, 5-6-5


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("scale", [257, 256, 1])
def test_a_palette_has_colours_of_sixteen_bits_or_where_none_is_above_255_of_eight(scale, order):
    colours = RANDOM.integers(0, 256, (3, 256))
    places = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = by_tifffile(places, photometric="palette", colormap=(colours * scale).astype(np.uint16), byteorder=order)
    np.testing.assert_array_equal(decoded(data), colours.T[places])


def test_a_bmp_of_five_six_and_five_bits_is_what_pillow_reads():
    values = RANDOM.integers(0, 65536, (16, 16), dtype=np.uint16)
    front = struct.pack("<2sLHHL", b"BM", 66 + values.nbytes, 0, 0, 66)
    front += struct.pack("<LllHHLLllLL", 40, 16, -16, 1, 16, 3, values.nbytes, 0, 0, 0, 0)
    data = front + struct.pack("<LLL", 0xF800, 0x07E0, 0x001F) + values.tobytes()
    red = (values >> 11).astype(int) * 255 // 31
    np.testing.assert_array_equal(decoded(data)[..., 0], red)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_header(data)[:3] == (16, 16, "RGB")


# planes and pages


@pytest.mark.parametrize(("big", "order"), [(False, "<"), (False, ">"), (True, "<")])
@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 5}, {"tile": (16, 16)}, {"compression": "deflate"},
                                     {"compression": "deflate", "predictor": 2, "rowsperstrip": 7}])  # fmt: skip
@pytest.mark.parametrize("channels", [3, 4])
def test_a_plane_for_each_colour_is_the_same_picture_to_the_last_bit(big, order, options, channels):
    samples = RANDOM.integers(0, 65536, (24, 40, channels), dtype=np.uint16)
    options = options | {"extrasamples": ["unassalpha"] if channels == 4 else None}
    data = by_tifffile(samples.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", bigtiff=big,
                   byteorder=order, **options)  # fmt: skip
    np.testing.assert_array_equal(decoded(data), np.rint(samples[..., :3] / 257))


@pytest.mark.parametrize(("big", "order"), [(False, "<"), (False, ">"), (True, "<")])
def test_each_page_of_a_stack_is_read_by_its_number_which_is_in_the_digest(big, order):
    data = by_tifffile(DEEP.transpose(2, 0, 1), photometric="minisblack", bigtiff=big, byteorder=order)
    for page in range(3):
        np.testing.assert_array_equal(decoded(frame(data, page))[..., 0], np.rint(DEEP[..., page] / 257))
        assert digest(frame(data, page)) == digest(data, page)
    assert digest(data) == digest(data, 0) and image_header(frame(data, 2)).kind == "16-bit grey"
    assert image_header(data) == (40, 24, "16-bit grey, the first of several", 16, 3)
    np.testing.assert_array_equal(decoded(data), decoded(frame(data, 0)))
    assert reason(frame(data, 3)) == "no page 3: the file has 3, counted from 0"
    assert "no TIFF and no DICOM" in reason(frame(encoded(EIGHT, "PNG"), 1))


def test_previews_are_no_pages():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for kind, pixels in ((0, EIGHT), (1, EIGHT[::2, ::2]), (0, EIGHT.T)):
            file.write(pixels, subfiletype=kind, photometric="minisblack")
    assert tiff.pages(buffer.getvalue()) == [0, 2]
    assert image_header(buffer.getvalue()).pages == 2


def test_directories_that_lead_in_a_circle_end():
    data = bytearray(by_tifffile(np.stack([EIGHT] * 2), photometric="minisblack"))
    places = [page.offset for page in tifffile.TiffFile(io.BytesIO(data)).pages]
    (entries,) = struct.unpack_from("<H", data, places[1])
    struct.pack_into("<L", data, places[1] + 2 + 12 * entries, places[0])
    assert tiff.pages(bytes(data)) == [0, 1]


# 16-bit files of fewer bits


DARK = [
    TWELVE, np.stack([TWELVE] * 3, -1), encoded(TWELVE, "PNG"), encoded(TWELVE, "PPM"), by_tifffile(TWELVE),
    by_tifffile(np.stack([TWELVE] * 3, -1), photometric="rgb"), by_tifffile(4095 - TWELVE, photometric="miniswhite"),
]  # fmt: skip


@pytest.mark.parametrize("data", DARK)
def test_values_of_twelve_bits_span_the_range_where_that_is_said(data):
    np.testing.assert_array_equal(decoded(RawImage(data, 12)), np.repeat(EIGHT[..., None], 3, 2))
    assert image_header(data).used == image_header(RawImage(data, 12)).used == 12
    assert digest(RawImage(data, 12)) == digest(data)
    assert reason(RawImage(data, 11)) == "a value of 4,095; --bits 11 ends at 2,047"


def test_bits_above_the_depth_are_refused_and_eight_bits_are_as_they_are():
    twelve = struct.pack("<LH", 8, 9)
    values = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHLHH", tag, 3, 1, value, 0) for tag, value in values.items())
    declared = b"II*\0" + twelve + entries + bytes(4) + bytes.fromhex("3ff000")
    assert decoded(RawImage(declared, 10))[0, :, 0].tolist() == [255, 0]
    assert image_header(declared)[2:4] == ("12-bit grey", None)
    assert reason(RawImage(declared, 14)) == "12 bits a sample, which --bits 14 is above"
    np.testing.assert_array_equal(decoded(RawImage(encoded(EIGHT, "PNG"), 12))[..., 0], EIGHT)


def test_a_pnm_that_says_its_white_keeps_it():
    data = b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 1000)
    assert decoded(RawImage(data, 12))[0, :, 0].tolist() == decoded(data)[0, :, 0].tolist() == [255, 62]
    assert image_header(data).used is None


# damage


SOUND = [
    by_tifffile(DEEP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", rowsperstrip=5),
    by_tifffile(DEEP.transpose(2, 0, 1), photometric="minisblack"), by_tifffile(TWELVE, photometric="miniswhite"),
    by_tifffile(EIGHT, photometric="palette", colormap=RANDOM.integers(0, 256, (3, 256), dtype=np.uint16)),
    by_tifffile(np.stack([EIGHT] * 2, -1), photometric="minisblack", planarconfig="contig"), encoded(EIGHT, "BMP"),
    *(encoded(TWELVE, kind) for kind in ("PNG", "PPM")), *(encoded(EIGHT, kind) for kind in ("GIF", "WEBP", "JPEG")),
    encoded(EIGHT > 99, "PNG"), encoded(np.stack([EIGHT] * 3, -1), "JPEG"),
]  # fmt: skip


@pytest.mark.parametrize("sound", range(len(SOUND)))
def test_a_header_of_any_damage_gives_an_image_or_a_reason(sound):
    draw = random.Random(sound)
    for _ in range(150):
        data = bytearray(SOUND[sound])
        edges = [*range(min(len(data), 400)), *range(max(len(data) - 400, 0), len(data))]
        for place in draw.sample(edges, draw.randint(1, 3)):
            data[place] = draw.choice([0, 1, 2, 3, 5, 16, 32, 127, 255, draw.randrange(256)])
        data = data[: draw.choice([None, None, None, len(data) // 2])]
        assert len(digest(bytes(data))) == 32
        for image in (bytes(data), frame(bytes(data), 1), RawImage(bytes(data), 12)):
            for look in (decode, image_header):
                with contextlib.suppress(UnreadableImage):
                    look(image)
