"""Image headers: what the encoded bytes say of format, orientation, completeness and number of images before decoding.

Read by hand, because it runs for every image and beside the decoder: Pillow's ``open`` costs about as much as
decoding a 64×64 JPEG (0.03 of 0.05 ms), and its answer to "how many images" changes with its version, which a digest
must not.
"""

from __future__ import annotations

import functools
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from featurecache.errors import BadOption, UnreadableImage
from featurecache.images import tiff

PNG = b"\x89PNG\r\n\x1a\n"
DICOM_FRONT = 256  # bytes that tell a DICOM file
_ORIENTATION = 0x0112  # Exif 2.32, table 4
_BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)  # the Huffman-coded DCT processes (ITU-T T.81, table B.1)
_NOT_DICOM = (b"\xff\xd8\xff", PNG, b"GIF8", b"RIFF")
_VR = re.compile(rb"[A-Z]{2}")
MAX_PIXELS = 178_956_970  # where Pillow itself raises DecompressionBombError: a quarter GiB of 24-bit pixels, twice
_PILLOW_MODULES = re.compile(r"PIL\.")
_QUIET = ("ignore", None, Warning, _PILLOW_MODULES, 0)


@dataclass(frozen=True)
class EncodedFrame:
    """One of several images in a file: the bytes of the whole file, and the number of the image, from 0."""

    data: bytes = field(repr=False)
    number: int
    hashed: Any = field(repr=False, compare=False)  # BLAKE2b of ``data``, which its frames have in common

    def __len__(self) -> int:
        return len(self.data)


Crop = tuple[float, float, float, float]  # left, top, right and bottom edge, in parts of width and height


@dataclass(frozen=True)
class RawImage:
    """An image, and what was said of reading it: its 16-bit samples have 2^``bits`` − 1 for white (one of 8 bits is as
    it is), and ``crop`` is all that is looked at of it, once it is upright."""

    image: bytes | EncodedFrame | np.ndarray = field(repr=False)
    bits: int | None = None
    crop: Crop | None = None

    def __len__(self) -> int:
        return len(self.image)


EncodedImage = bytes | EncodedFrame | np.ndarray | RawImage  # an image as its source has it: encoded, or an array
READING = ("decoding", "bits", "region")  # what a spec says of reading an image, before preprocessing


def reading_record(bits: int | None, crop: Crop | None) -> dict[str, Any]:
    """What was said of reading images, as a spec has it: nothing of what was not said."""
    record = {"bits": bits, "region": None if crop is None else list(crop)}
    return {name: value for name, value in record.items() if value is not None}


def read_by(image: EncodedImage, reading: Mapping[str, Any]) -> EncodedImage:
    """``image`` as a `reading_record`, or a spec's preprocessing with one in it, says that it is read; what a source
    says of its own images stays."""
    bits, region = reading.get("bits"), reading.get("region")
    if isinstance(image, RawImage) or (bits is None and region is None):
        return image
    return RawImage(image, bits, None if region is None else tuple(region))


def check_crop(crop: Sequence[float]) -> Crop:
    """Raises BadOption where the edges of ``--crop`` are none."""
    if len(crop) == 4 and 0 <= crop[0] < crop[2] <= 1 and 0 <= crop[1] < crop[3] <= 1:
        left, top, right, bottom = map(float, crop)
        return left, top, right, bottom
    raise BadOption(
        f"--crop {','.join(f'{edge:g}' for edge in crop)}: it is the left, top, right and bottom edge of what is seen "
        "of an image, in parts of width and height: 0.1,0.05,0.9,0.95 cuts off a tenth at either side."
    )


def crop_words(crop: Sequence[float]) -> str:
    left, top, right, bottom = (f"{100 * edge:g} %" for edge in crop)
    return f"of every image {left} to {right} of its width and {top} to {bottom} of its height, before it is resized"


class ImageHeader(NamedTuple):
    """What a look at an image says."""

    width: int  # pixels, as stored
    height: int
    kind: str  # of pixels
    used: int | None = None  # of 16-bit samples of which no header says more: the bits of the largest value
    pages: int = 1  # of a TIFF, without previews and masks


def refuse_bombs(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width:,}×{height:,} pixels; more than {MAX_PIXELS:,} are refused (decompression bomb)")


def quiet_pillow() -> None:
    """In place: warnings.catch_warnings would exchange the process-wide list under the feet of other threads."""
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)


@functools.cache
def pillow_image() -> Any:
    """Pillow's ``Image``. It keeps an image in blocks, of 16 MB by default: glibc takes those from a heap of the
    thread's own, which stays as large as its largest image was. A block above 32 MB is mapped by itself (mallopt,
    M_MMAP_THRESHOLD) and gone with the image."""
    from PIL import Image

    Image.core.set_block_size(64 << 20)  # bytes; a smaller image takes what it needs
    return Image


def is_dicom(data: bytes) -> bool:
    """Whether bytes, of which the first ``DICOM_FRONT`` will do, are a DICOM file (PS3.10, 7.1: 128 bytes for anybody's
    use, then "DICM"). Some scanners and slides make use of them to be a TIFF at once: that is DICOM.
    Old archives have neither, and begin with the data set."""
    if data[128:132] == b"DICM":
        return not data.startswith(_NOT_DICOM)
    return _begins_as_data_set(data[:DICOM_FRONT])


def _begins_as_data_set(front: bytes) -> bool:
    """Two DICOM elements in their order (PS3.5, 7.1), the first of group 2 or 8; big-endian ones, since retired, with
    their VR."""
    if front[:2] not in (b"\2\0", b"\x08\0", b"\0\x08") or len(front) < 20:
        return False
    order = ">" if front[0] == 0 else "<"
    explicit = _VR.fullmatch(front, 4, 6)
    (size,) = struct.unpack_from(order + ("H" if explicit else "L"), front, 6 if explicit else 4)
    if size % 2 or 8 + size + 4 > len(front) or (order == ">" and not explicit):
        return False
    first, second = (struct.unpack_from(order + "HH", front, at) for at in (0, 8 + size))
    return first < second and second[0] <= 0x0010


class Jpeg(NamedTuple):
    """The frame header of a JPEG, its EXIF orientation (1 = upright) and whether the file has its end."""

    plain: bool  # 8 bits, grey or three components, Huffman-coded DCT
    width: int
    height: int
    orientation: int
    complete: bool


def jpeg(data: bytes) -> Jpeg | None:
    """The header of a JPEG (ITU-T T.81, annex B); None where the bytes are none or stop before the first scan."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame, orientation, at = None, 1, 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # fill bytes
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without a length
            at += 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xDA and frame is not None:
                # The first scan. In its data FF is always followed by 00, so FF D9 is the end of the image.
                return Jpeg(*frame, orientation, data.find(b"\xff\xd9", at) > 0)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 10 <= len(data):
                bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                frame = bits == 8 and components in (1, 3) and marker in _BASELINE_TO_PROGRESSIVE, width, height
            elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = exif_orientation(data[at + 10 : at + 2 + length])
            at += 2 + length
    return None


def exif_orientation(tiff: bytes) -> int:
    """The orientation (1..8) in the first directory of an EXIF block; 1 where it has none or cannot be read."""
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        (at,) = struct.unpack_from(order + "L", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHLH", tiff, entry)
            if tag == _ORIENTATION and kind == 3 and 1 <= value <= 8:
                return int(value)
    except (KeyError, struct.error):
        pass
    return 1


def is_cut_off(data: bytes) -> bool:
    """Whether an encoded image stops before its format says it ends; JPEG, PNG and WebP say it."""
    if data[:2] == b"\xff\xd8":
        header = jpeg(data)
        return header is None or not header.complete
    if data[:8] == PNG[: len(data)]:  # its chunks run up to IEND; a decoder may be content without the last ones
        at = len(PNG)
        while at + 12 <= len(data) and data[at + 4 : at + 8] != b"IEND":
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return at + 12 > len(data)
    return data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def holds_several(data: bytes) -> bool:
    """Whether a file holds more than one image: GIF, TIFF, WebP and PNG can. Previews behind a JPEG do not count."""
    if data[:8] == PNG:
        return b"acTL" in data[: max(data.find(b"IDAT"), 0)]
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        return len(data) > 20 and bool(data[20] & 2)
    if data[:4] == b"GIF8":
        return _gif_images(data) > 1
    return tiff.is_tiff(data) and tiff.has_second(data)


def _gif_images(data: bytes) -> int:
    """Images of a GIF, counted up to two (GIF89a specification, appendix A)."""
    if len(data) < 13:
        return 0
    at, images = 13 + _palette_bytes(data[10]), 0
    while at < len(data) and images < 2:
        if data[at] == 0x2C and at + 10 < len(data):  # image: descriptor, palette, code size, blocks
            images += 1
            at = _after_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
        elif data[at] == 0x21:  # extension: label, blocks
            at = _after_blocks(data, at + 2)
        else:
            break
    return images


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1
