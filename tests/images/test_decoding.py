"""The rules of decoding, each against Pillow, numpy or a hand-worked answer."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.decoded import by_tifffile, decoded, encoded, reason

from featurecache.images import decoding, headers
from featurecache.images.decoding import decode, digest, image_header

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (24, 40, 3), dtype=np.uint8)
GREY = COLOUR[..., 0].copy()
DEEP = RANDOM.integers(0, 65536, (24, 40, 3), dtype=np.uint16)


def by_pillow(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(samples: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG of uint16 [H, W, channels] (Pillow writes grey only)."""
    height, width = samples.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return headers.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(samples: bytes, width: int, photometric: int, bits: int = 16, order: str = "<") -> bytes:
    """A grey TIFF of one line, tag by tag (TIFF 6.0, section 2)."""
    values = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: 1, 279: len(samples)}
    entries = [struct.pack(order + "HHLHH", tag, 3, 1, value, 0) for tag, value in values.items()]
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "LH", 8, len(entries)) + b"".join(entries) + bytes(4) + samples


# plain images

KINDS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
PLAIN = [
    *((pixels, kind, {}) for pixels in (COLOUR, GREY) for kind in KINDS),
    *((COLOUR, "JPEG", {name: value}) for name, value in (("progressive", True), ("subsampling", 0), ("quality", 30))),
    (COLOUR, "JPEG", {"subsampling": 2}),
    *((Image.fromarray(COLOUR).convert(mode), "PNG", {}) for mode in ("P", "LA", "RGBA")),
    (Image.fromarray(COLOUR).convert("P"), "PNG", {"transparency": b"\x00\x80\xff"}),  # which Pillow may warn of
    (Image.fromarray(GREY > 127), "PNG", {}), (np.dstack([COLOUR, np.zeros_like(GREY)]), "PNG", {}),  # transparent
    *((Image.fromarray(COLOUR).convert(mode), "TIFF", {}) for mode in ("CMYK", "YCbCr")),
    (Image.fromarray(COLOUR).convert("CMYK"), "JPEG", {}),
]  # fmt: skip


@pytest.mark.parametrize(("pixels", "kind", "options"), PLAIN)
def test_eight_bit_images_are_what_pillow_reads(pixels, kind, options):
    data = encoded(pixels, kind, **options)
    np.testing.assert_array_equal(decoded(data), by_pillow(data))


def test_jpeg_goes_through_torchvision_and_nothing_else_does(monkeypatch):
    monkeypatch.setattr(decoding, "_by_pillow", lambda data: pytest.fail("Pillow was asked"))
    decode(encoded(COLOUR, "JPEG"))
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "_plain_jpeg", lambda *_: pytest.fail("torchvision was asked"))
    decode(encoded(COLOUR, "PNG"))
    decode(encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"))


def test_a_torchvision_without_its_jpeg_operator_changes_no_pixel(monkeypatch):
    data = encoded(COLOUR, "JPEG")
    expected = decoded(data)
    monkeypatch.setattr(decoding, "_jpeg_operator", lambda: None)
    np.testing.assert_array_equal(decoded(data), expected)


# the rules


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_exif_orientation_is_applied(orientation, kind, endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = orientation
    data = encoded(COLOUR, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decoded(data), np.asarray(upright))


def test_damaged_exif_counts_as_upright():
    data = encoded(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(decoded(data), by_pillow(encoded(COLOUR, "JPEG")))


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_is_rounded_to_eight_not_cut(colour_type, channels):
    samples = RANDOM.integers(0, 65536, (24, 40, channels), dtype=np.uint16)
    expected = np.rint(samples / 257).astype(np.uint8)
    expected = expected[..., :3] if channels > 2 else expected[..., [0, 0, 0]]
    np.testing.assert_array_equal(decoded(png(samples, colour_type)), expected)
    assert not np.array_equal(expected[..., :1], samples[..., :1] >> 8)  # what Pillow alone gives for colour


@pytest.mark.parametrize(
    ("bits", "order", "photometric", "samples", "expected"),
    [
        (16, "<", 0, "0000ffff0101fefe", [255, 0, 254, 1]), (16, ">", 0, "0000ffff0101fefe", [255, 0, 254, 1]),
        (12, "<", 1, "000fff800100", [0, 255, 128, 16]), (12, "<", 0, "000fff800100", [255, 0, 127, 239]),
    ],
)  # fmt: skip
def test_deep_tiff_has_its_own_white_which_may_be_zero(bits, order, photometric, samples, expected):
    """Pillow reads some of these only where 0 is black; the values are turned over all the same."""
    assert decoded(tiff(bytes.fromhex(samples), 4, photometric, bits, order))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("big", "order"), [(False, "<"), (False, ">"), (True, "<")])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize(("photometric", "channels"), [("minisblack", 1), ("miniswhite", 1), ("rgb", 3), ("rgb", 4)])
def test_sixteen_bit_tiff_is_rounded_to_eight_not_cut(big, order, tile, compression, photometric, channels):
    samples = RANDOM.integers(0, 65536, (24, 40, channels) if channels > 1 else (24, 40), dtype=np.uint16)
    data = by_tifffile(samples, photometric=photometric, bigtiff=big, tile=tile, compression=compression,
                       predictor=2 if compression else None, byteorder=order,
                       extrasamples=["unassalpha"] if channels == 4 else None)  # fmt: skip
    values = np.rint((65535 - samples if photometric == "miniswhite" else samples) / 257)
    expected = values[..., :3] if channels > 1 else values[..., None].repeat(3, 2)
    np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_images_the_first_is_taken_and_its_number_is_in_the_digest(kind):
    others = [Image.fromarray(np.roll(COLOUR, shift, 0)) for shift in (3, 9)]
    options = {"lossless": True} if kind == "WEBP" else {}
    single = encoded(COLOUR, kind, **options)
    several = encoded(COLOUR, kind, save_all=True, append_images=others, **options)
    np.testing.assert_array_equal(decoded(several), by_pillow(several))
    assert (headers.holds_several(single), headers.holds_several(several)) == (False, True)
    assert digest(several) == digest(several, 0) != digest(several, 1)
    assert digest(several) != hashlib.blake2b(several, digest_size=16).hexdigest()


# what is refused


@pytest.mark.parametrize(
    ("dtype", "channels", "words"),
    [
        ("i1", 1, "signed integer"), ("i2", 1, "signed integer"), ("i2", 3, "signed integer"), ("u4", 3, "32-bit"),
        ("f2", 1, "floating-point"), ("f4", 3, "floating-point"), ("f8", 1, "floating-point"),
        ("i4", 1, "32-bit"), ("f4", 1, "floating-point"), ("u2", 2, "2 × 16 bits a pixel"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_other_samples_is_refused_by_name(dtype, channels, words, order):
    samples = np.zeros((4, 6, channels) if channels > 1 else (4, 6), dtype)
    photometric, planar = "rgb" if channels == 3 else "minisblack", "contig" if channels > 1 else None
    assert words in reason(by_tifffile(samples, photometric=photometric, byteorder=order, planarconfig=planar))


def test_tiff_that_pillow_does_not_read_is_told_by_what_it_is():
    assert "1 × 10 bits a pixel" in reason(tiff(bytes(5), 4, 1, 10))
    assert "1 × 12 bits a pixel" in reason(tiff(bytes(6), 4, 0, 12, ">"))
    assert "big-endian" in reason(by_tifffile(GREY, photometric="minisblack", bigtiff=True, byteorder=">"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_truncated_images_say_after_how_many_bytes(kind, share):
    whole = encoded(COLOUR, kind)
    data = whole[: min(int(len(whole) * share), len(whole) - 1)]
    assert reason(data) == f"truncated after {len(data):,} bytes"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_whose_tail_was_never_downloaded_is_truncated(mode):
    data = encoded(Image.fromarray(COLOUR).convert(mode), "JPEG")
    assert reason(data[: len(data) // 2] + bytes(len(data) - len(data) // 2)) == f"truncated after {len(data):,} bytes"


def test_deep_colours_in_a_layout_that_is_no_rgb_are_refused():
    inks = by_tifffile(np.zeros((4, 6, 4), np.uint16), photometric="separated")
    assert reason(inks) == "16-bit CMYK in an unusual layout; save it as PNG, or with 8 bits a sample"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html>", 'not an image (starts with "<!DOCTYPE")'),
        (b"PK\x03\x04" + bytes(60), "not an image this reads (starts with the bytes 50 4b 03 04 00 00 00 00)"),
        (b"   \n", "not an image this reads (starts with the bytes 20 20 20 0a)"),
        (b"II*\0" + bytes(8), "a TIFF file whose header cannot be read (12 bytes)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 'not an image (starts with "%!PS-Adobe-3.0")'),
    ],
)
def test_what_is_no_image_is_shown_by_its_start(data, message):
    assert reason(data) == reason(data, image_header) == message


def test_large_images_below_the_limit_do_not_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # GREY has 960: Pillow warns
    assert decode(encoded(GREY, "PNG")).shape == (3, 24, 40)
    monkeypatch.setattr(headers, "MAX_PIXELS", 900)
    assert "40×24 pixels" in reason(encoded(GREY, "PNG"))


@pytest.mark.integration
def test_png_with_damaged_data_is_a_failure_and_not_the_end_of_the_interpreter():
    data = bytearray(encoded(COLOUR, "PNG"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    script = "import sys; from featurecache.images.decoding import decode; decode(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", script], input=bytes(data), capture_output=True, check=False)
    assert done.returncode == 1
    assert b"UnreadableImage: cannot be decoded" in done.stderr


# arrays


@pytest.mark.parametrize("shape", [(24, 40), (24, 40, 1), (24, 40, 3)])
def test_arrays_are_images_too(shape):
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(decoded(pixels), np.broadcast_to(pixels.reshape(24, 40, -1), (24, 40, 3)))


@pytest.mark.parametrize(
    "image", [DEEP, DEEP.astype(">u2"), encoded(DEEP[..., 0], "PNG"), encoded(DEEP[..., 0], "PPM")]
)
def test_sixteen_bits_are_rounded_to_eight_by_the_full_range_not_by_what_occurs(image):
    expected = np.rint(DEEP / 257) if isinstance(image, np.ndarray) else np.rint(DEEP[..., :1] / 257).repeat(3, 2)
    np.testing.assert_array_equal(decoded(image), expected)


@pytest.mark.parametrize(
    ("array", "word"),
    [(np.zeros((4, 4), "f4"), "float32"), (np.zeros((3, 4, 4), "u1"), "3×4×4"), (np.zeros((0, 4), "u1"), "0×4")],
)
def test_other_arrays_are_refused_with_their_shape(array, word):
    assert word in reason(array)


# digests


def test_digest_is_blake2b_of_the_bytes_and_of_an_array_of_dtype_shape_and_bytes():
    data = encoded(COLOUR, "JPEG")
    assert digest(data) == hashlib.blake2b(data, digest_size=16).hexdigest()
    plain = np.arange(16, dtype=np.uint8).reshape(4, 4)
    others = [plain.reshape(2, 8), plain.reshape(4, 4, 1), plain.astype(np.uint16), plain + np.uint8(1)]
    assert len({digest(array) for array in [plain, *others]}) == 5
    assert digest(np.asfortranarray(plain)) == digest(plain)
    assert digest(plain.astype("<u2")) == digest(plain.astype(">u2"))


# threads, warnings, a look


def test_threads_decode_what_one_thread_decodes_and_no_warning_escapes():
    palette = encoded(Image.fromarray(COLOUR).convert("P"), "PNG", transparency=b"\0")
    kinds = [encoded(COLOUR, "JPEG"), png(DEEP, 2), palette]
    expected = [decoded(data) for data in kinds]
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        for number, found in enumerate(pool.map(decoded, kinds * 40)):
            np.testing.assert_array_equal(found, expected[number % 3])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(COLOUR, "JPEG"), "RGB"), (encoded(GREY, "JPEG"), "grey"), (png(DEEP, 2), "16-bit RGB"),
        (encoded(DEEP[..., 0], "PNG"), "16-bit grey"), (encoded(DEEP[..., 0], "PPM"), "16-bit grey"),
        (encoded(Image.fromarray(COLOUR).convert("P"), "PNG"), "palette"), (GREY, "grey"), (DEEP, "16-bit RGB"),
    ],
)  # fmt: skip
def test_a_look_tells_size_and_kind_of_pixels(data, kind):
    assert image_header(data)[:3] == (40, 24, kind)
