"""Decoding of one encoded image to uint8 RGB [3, H, W], by written rules.

The rules (``DECODING`` is their version; it is part of what a cache is keyed by):

1. Formats: JPEG, PNG, TIFF, BMP, GIF, WebP, PNM and DICOM (its own rules: `featurecache.images.dicom`), told by their
   content, never by the file's name.
2. 8-bit grey is repeated into the three channels. 1-, 2- and 4-bit grey spans the full range first.
3. 16-bit samples v, grey or RGB, become round(v / 257): the full scale of the format onto 0..255, never stretched to
   the values that occur (a 12-bit image in a 16-bit file comes out dark; a TIFF that declares 12 bits does not). What
   is a `RawImage` of b bits becomes round(255·v / (2^b − 1)), and is refused where a value or b is above. A TIFF whose
   0 is white is turned over.
4. Palettes are looked up. The colours of a TIFF's are of 16 bits, or, where none is above 255, of 8, as libtiff takes
   them. Alpha is dropped: the colour that stands beneath it is what counts.
5. CMYK, YCCK and YCbCr become RGB as Pillow does it; colour profiles are not applied.
6. The EXIF orientation (for a TIFF: its own) is applied; one that cannot be read counts as upright.
7. ``--crop`` cuts out a rectangle of the upright image, before all augmentation and resizing.
8. Of several images in a file the first is taken; of DICOM and TIFF any, by its number.
9. Refused by name: 32-bit, signed and floating-point pixels (nothing says what their white is), other colour spaces,
   more than ``MAX_PIXELS`` pixels, a file that stops before its end even where a decoder would fill the rest with grey.

JPEG goes through torchvision's operator, which gives Pillow's pixels to the bit in half the time and without the GIL.
PNG does not: Pillow is as fast there, and torchvision 0.29 ends the interpreter with SIGSEGV on a PNG whose data are
damaged.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from featurecache.errors import UnreadableImage
from featurecache.images import dicom, headers, tiff
from featurecache.images.headers import (
    MAX_PIXELS,
    Crop,
    EncodedFrame,
    EncodedImage,
    ImageHeader,
    RawImage,
    pillow_image,
    quiet_pillow,
    refuse_bombs,
)

if TYPE_CHECKING:
    import torch

DECODING = 2  # since 2: palettes of TIFF whose colours have 8 bits
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # others are not tried: EPS would run a program

_NO_WHITE = [  # by whether they are floating-point
    f"{kind} pixels, which have no fixed white; save it with 8 or 16 bits a sample"
    for kind in ("32-bit or signed integer", "floating-point")
]
_WHITE_IS_ZERO = "featurecache: white is zero"
_MODE_NAMES = {
    "1": "1-bit", "L": "grey", "LA": "grey + alpha", "P": "palette", "PA": "palette + alpha", "RGB": "RGB",
    "RGBA": "RGB + alpha", "I": "32-bit grey", "F": "float grey",
}  # fmt: skip

_MAGIC = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"GIF8": "GIF", b"RIFF": "WebP"}


class Samples(NamedTuple):
    """What a file stores of an image, before it becomes 8 bits."""

    values: np.ndarray  # uint8 or uint16 [H, W] or [H, W, 1 or 3]
    depth: int = 16  # bits of uint16
    white_is_zero: bool = False
    scaled: bool = False  # the file says its white, and they are scaled to it


def digest(data: EncodedImage, frame: int | None = None) -> str:
    """The identity of an image: 32 hex digits, BLAKE2b-128. Of the encoded bytes and, where a file holds several
    images, the number of the ``frame`` (default: the first, 0); of an array of dtype, shape and bytes. Raises
    UnreadableImage for DICOM whose header cannot be read."""
    data = data.image if isinstance(data, RawImage) else data
    if isinstance(data, np.ndarray):
        plain = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<"))
        hashed = hashlib.blake2b(f"{plain.dtype.str} {list(plain.shape)} ".encode(), digest_size=16)
        hashed.update(plain.data)
        return hashed.hexdigest()
    if isinstance(data, EncodedFrame):
        hashed, frame = data.hashed.copy(), data.number
    else:
        hashed = hashlib.blake2b(data, digest_size=16)
        frame = 0 if frame is None and _holds_several(data) else frame
    if frame is not None:
        hashed.update(b" frame %d" % frame)
    return hashed.hexdigest()


def _holds_several(data: bytes) -> bool:
    if headers.is_dicom(data):  # one that is a TIFF at once was read as that before DICOM was known here
        return tiff.is_tiff(data) or dicom.read_header(data).frames > 1
    return headers.holds_several(data)


def decode(data: EncodedImage) -> torch.Tensor:
    """One image as uint8 [3, H, W], RGB, by the rules above; of any memory layout. Raises UnreadableImage with the
    reason alone ("truncated after 12,288 bytes"). May be called from many threads at once."""
    if isinstance(data, RawImage) and data.crop is not None:
        return _cropped(decode(RawImage(data.image, data.bits)), data.crop)
    data, bits = (data.image, data.bits) if isinstance(data, RawImage) else (data, None)
    if isinstance(data, np.ndarray):
        return _channels_first(_eight_bits(Samples(_checked(data)), bits))
    data, frame = (data.data, data.number) if isinstance(data, EncodedFrame) else (data, None)
    if not data:
        raise UnreadableImage("zero bytes")
    if headers.is_dicom(data):
        return _channels_first(dicom.decode_dicom(data, frame or 0))
    data = data if frame is None else tiff.page_alone(data, frame)
    header = headers.jpeg(data)
    try:
        if header is None:
            return _by_pillow(data, bits)
        refuse_bombs(header.width, header.height)
        if not header.complete:
            raise UnreadableImage(f"truncated after {len(data):,} bytes")
        return _plain_jpeg(data, header.orientation) if header.plain else _by_pillow(data, bits)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise what their parsers meet: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(_reason(data, error)) from error


def image_header(data: EncodedImage) -> ImageHeader:
    """Size and kind of pixels, from the header alone; 16-bit samples are decoded, for the bits that they use. Raises
    UnreadableImage."""
    data = data.image if isinstance(data, RawImage) else data
    if isinstance(data, np.ndarray):
        data = _checked(data)
        kind = "RGB" if data.ndim == 3 and data.shape[2] == 3 else "grey"
        used = None if data.dtype.itemsize == 1 else _bits_used(data)
        return ImageHeader(data.shape[1], data.shape[0], kind if used is None else f"16-bit {kind}", used)
    data, frame = (data.data, data.number) if isinstance(data, EncodedFrame) else (data, None)
    if not data:
        raise UnreadableImage("zero bytes")
    if headers.is_dicom(data):
        return ImageHeader(*dicom.dicom_image_header(data))
    data = data if frame is None else tiff.page_alone(data, frame)
    try:
        image = _open(data)
        rawmode, size = str(_rawmode(image)), image.size  # as stored: Pillow turns a TIFF while loading it
        deep = _samples(data, image) if _bits(image) > 8 and image.mode != "F" else None
    except UnreadableImage:
        raise
    except Exception as error:  # as in decode
        raise UnreadableImage(_reason(data, error)) from error
    kind = "grey" if deep and deep.values.ndim == 2 else image.mode
    kind = _MODE_NAMES.get("LA" if rawmode.startswith("LA") else kind, kind)
    used = _bits_used(deep.values) if deep and deep.depth == 16 and not deep.scaled else None
    kind = f"{deep.depth}-bit {kind}" if deep else kind
    several = frame is None and headers.holds_several(data)
    pages = len(tiff.pages(data)) if several and image.format == "TIFF" else 1
    kind = f"{kind}, the first of several" if several else kind
    return ImageHeader(size[0], size[1], kind, used, pages)


_SMALL = 1 << 15  # bytes of a JPEG or PNG: at 1032:1, the most that deflate packs, 11 million pixels


def pixel_count(data: EncodedImage) -> int:
    """By the header; 0 where they are few, or it cannot be read: decoding says why."""
    data = data.image if isinstance(data, RawImage) else data
    if isinstance(data, np.ndarray):
        return math.prod(data.shape[:2])
    data, frame = (data.data, data.number) if isinstance(data, EncodedFrame) else (data, None)
    if len(data) < _SMALL and data.startswith((b"\xff\xd8\xff", headers.PNG)):
        return 0
    try:
        if headers.is_dicom(data):
            return math.prod(dicom.dicom_image_header(data)[:2])
        return math.prod(_open(data if frame is None else tiff.page_alone(data, frame)).size)
    except Exception:  # as in decode
        return 0


def _plain_jpeg(data: bytes, orientation: int) -> torch.Tensor:
    """8-bit grey or three-component JPEG to uint8 [3, H, W]."""
    import torch

    operator = _jpeg_operator()
    if operator is None:
        return _by_pillow(data)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: torch.Tensor = operator(encoded, 0, False)  # ImageReadMode.UNCHANGED, orientation as stored
    if image.shape[0] == 1:
        image = torch.cat((image, image, image))  # a third of the time of repeat, and of letting libjpeg do it
    return _upright(image, orientation)


@functools.cache
def _jpeg_operator() -> Any:
    """The operator under torchvision.io.decode_image, which warns at every call since 0.29 and is to go; None in a
    torchvision without it: then Pillow decodes JPEG too, to the same pixels."""
    import torch
    import torchvision.io  # noqa: F401  (defines the operator)

    return getattr(torch.ops.image, "decode_jpeg", None)


def _by_pillow(data: bytes, bits: int | None = None) -> torch.Tensor:
    """Everything else to uint8 [3, H, W]."""
    image = _open(data)
    samples = _samples(data, image)
    exif = image.info.get("exif", b"") if image.format != "TIFF" else b""  # Pillow turns a TIFF while loading it
    pixels = _channels_first(_eight_bits(samples, bits))
    return _upright(pixels, headers.exif_orientation(exif.removeprefix(b"Exif\0\0")))


def _samples(data: bytes, image: Any) -> Samples:
    """What an open file stores, unturned. Raises UnreadableImage."""
    refuse_bombs(*image.size)
    if headers.is_cut_off(data):
        raise UnreadableImage(f"truncated after {len(data):,} bytes")
    if image.mode.startswith("I;16"):
        depth = 12 if image.format == "TIFF" and _bits(image) == 12 else 16
        zero = image.format == "TIFF" and (image.tag_v2.get(262) == 0 or image.info.get(_WHITE_IS_ZERO))
        return Samples(np.asarray(image), depth, bool(zero))
    if image.format == "PPM" and image.mode == "I":  # above 8 bits; what is not of 65535 is scaled to it
        scaled = _rawmode(image) != "I;16B"  # which Pillow forgets while it loads
        return Samples(np.asarray(image).astype(np.uint16), 16, scaled=scaled)
    if image.mode in ("I", "F") or (image.format == "TIFF" and 2 in image.tag_v2.get(339, ())):  # SampleFormat
        raise UnreadableImage(_NO_WHITE[image.mode == "F"])
    if _bits(image) == 16:
        return Samples(_colour_16(data, image), 16)
    if image.format == "TIFF" and image.mode == "P" and max(image.tag_v2[320]) < 256:
        from PIL import ImagePalette

        image.palette = ImagePalette.raw("RGB;L", bytes(image.tag_v2[320]))
    return Samples(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))


def _open(data: bytes) -> Any:
    quiet_pillow()
    Image = pillow_image()
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        turned = tiff.black_is_zero(data)  # Pillow reads some deep grey only where 0 is black
        if turned is None:
            raise
        image = Image.open(io.BytesIO(turned), formats=("TIFF",))
        image.info[_WHITE_IS_ZERO] = True
        return image


def _rawmode(image: Any) -> str | None:
    """Pillow's name of the layout in the file, which says more than the mode in memory."""
    arguments = image.tile[0].args if image.tile else None
    return arguments if arguments is None or isinstance(arguments, str) else arguments[0]


def _bits(image: Any) -> int:
    """Bits of a sample as the file says: 16 where Pillow would cut them to 8."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (1,))))
    deep = image.mode == "I" or ";16" in str(_rawmode(image))  # of a BMP that is 5 and 6 bits
    return 16 if deep and image.format in ("PNG", "PPM") else 8


def _colour_16(data: bytes, image: Any) -> np.ndarray:
    """uint16 [H, W, 1 or 3] of 16-bit colour, of which Pillow keeps the upper byte. So it is read twice, the second
    time with the byte order turned round: that gives the lower byte."""
    rawmode = _rawmode(image) or ""
    swapped = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    if image.format == "TIFF" and image.tag_v2.get(284) == 2 and image.mode in ("RGB", "RGBA"):  # planes
        # a plane for each colour, of which Pillow reads single bytes
        return np.stack([np.asarray(_open(tiff.plane_alone(data, plane))) for plane in range(3)], -1)
    if rawmode == "LA;16B":  # PNG, grey and alpha: as four bytes they are the two halves of either
        upper_lower = np.asarray(_reopened(data, "RGBA")).astype(np.uint16)
        return upper_lower[..., :1] << 8 | upper_lower[..., 1:2]
    if rawmode[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16"):
        raise UnreadableImage(f"16-bit {image.mode} in an unusual layout; save it as PNG, or with 8 bits a sample")
    upper, lower = np.asarray(image), np.asarray(_reopened(data, rawmode[:-1] + swapped[rawmode[-1]]))
    return (upper.astype(np.uint16) << 8 | lower)[..., :3]


def _reopened(data: bytes, rawmode: str) -> Any:
    image = _open(data)
    arguments = [rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]) for tile in image.tile]
    image.tile = [tile._replace(args=each) for tile, each in zip(image.tile, arguments, strict=True)]
    return image


def _eight_bits(samples: Samples, bits: int | None = None) -> np.ndarray:
    """round(255·v / (2^b − 1)), b the depth or ``bits``; for 16 that is round(v / 257). uint8 stays. Raises
    UnreadableImage where ``bits`` do not hold the values."""
    values, depth, turned, scaled = samples
    if values.dtype == np.uint8:
        return values
    white = 2 ** (depth if bits is None or scaled else bits) - 1
    if white >= 2**depth:
        raise UnreadableImage(f"{depth} bits a sample, which --bits {bits} is above")
    if (largest := int(values.max())) > white:
        raise UnreadableImage(f"a value of {largest:,}; --bits {bits} ends at {white:,}")
    eight = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return 255 - eight if turned else eight


def _bits_used(values: np.ndarray) -> int:
    return max(int(values.max()).bit_length(), 1)


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] to uint8 [3, H, W] of its own memory; grey is repeated. Colour stays
    interleaved in memory, as torchvision's JPEG operator has it and its resize wants it."""
    import torch

    image = torch.from_numpy(np.array(pixels, order="C"))
    if image.ndim == 3 and image.shape[2] == 3:
        return image.permute(2, 0, 1)
    return torch.cat([image.reshape(1, *image.shape[:2])] * 3)


def _upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """uint8 [3, H, W] turned as EXIF says: 5 to 8 exchange rows and columns, then flips."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 5: [], 6: [2], 7: [1, 2], 8: [1]}[orientation]
    return image.flip(flips).contiguous()


def _cropped(image: torch.Tensor, crop: Crop) -> torch.Tensor:
    """uint8 [3, H, W] → what is within the edges, rounded to whole pixels as Pillow's ``crop`` does."""
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(edge * side) for edge, side in zip(crop, (width, height) * 2, strict=True))
    if left == right or top == bottom:
        raise UnreadableImage(f"{width:,}×{height:,} pixels, of which --crop leaves none")
    return image.permute(1, 2, 0)[top:bottom, left:right].contiguous().permute(2, 0, 1)


def _checked(array: np.ndarray) -> np.ndarray:
    shape = "×".join(map(str, array.shape))
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise UnreadableImage(f"an array of {array.dtype} [{shape}]; pixels have to be uint8 or uint16")
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise UnreadableImage(f"an array of shape [{shape}]; an image is [H, W], [H, W, 1] or [H, W, 3]")
    return array


def _reason(data: bytes, error: Exception) -> str:
    from PIL import Image

    if headers.is_cut_off(data) or "truncated" in str(error).lower():
        return f"truncated after {len(data):,} bytes"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels are refused (decompression bomb)"
    if not isinstance(error, Image.UnidentifiedImageError):
        message = str(error).partition("\n")[0]
        message = re.sub(r"^\w+, \S+:\d+, ", "", message)  # torch puts the operator and a line of its source in front
        return f"cannot be decoded ({message.strip() or type(error).__name__})"
    if header := tiff.read_tiff(data):  # which has a directory and is not read all the same
        if header.format != 1 or header.bits > 16:
            return _NO_WHITE[header.format == 3]
        if header.big and header.big_endian:
            return "a BigTIFF of big-endian byte order, which Pillow does not read; save it little-endian"
        if header.bits not in (1, 2, 4, 8, 16) or header.samples > 1:
            return (
                f"a TIFF of {header.samples} × {header.bits} bits a pixel, which Pillow does not read; save it as PNG"
            )
    if name := _MAGIC.get(data[:4]):
        return f"a {name} file whose header cannot be read ({len(data):,} bytes)"
    start = (data.split(maxsplit=1) or [data])[0][:16]
    if start.isascii() and start.decode("ascii", "replace").isprintable():
        return f'not an image (starts with "{start.decode("ascii")}")'
    return f"not an image this reads (starts with the bytes {data[:8].hex(' ')})"
