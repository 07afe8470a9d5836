"""DICOM: from the bytes of a file to the uint8 pixels of one of its frames, with window and modality, by written rules.

pydicom (extra ``dicom``) reads the header and decodes the pixels. What they are mapped by is done here, after PS3.3 of
the standard: pydicom's own functions do not look into the functional groups of enhanced files, wrap around in an 8-bit
table of more than 256 entries, and take 26 times as long for the window of a CT slice (3.0: 5.8 and 0.22 ms). Stored
values v become x, then a share s of white from 0 to 1, then round(255·s):

1. Unused upper bits are dropped; two's complement where the file says so.
2. Modality (C.11.1): x is looked up in the modality table, else x = slope·v + intercept, else x = v.
3. VOI (C.11.2): s is looked up in the first VOI table, else it is cut by the *first* window as its function says: c and
   w the centre and the width,

       LINEAR        s = (x − (c − 0.5)) / (w − 1) + 0.5        LINEAR_EXACT  s = (x − c) / w + 0.5
       SIGMOID       s = 1 / (1 + exp(−4·(x − c) / w))

   A file with neither spans the whole range that its stored bits, or its modality table, can hold: 0..4095 of 12 bits.
   Never the range of the values that occur.
4. MONOCHROME1 is turned over: 1 − s.
5. A file that does not name its transfer syntax has the standard's default, implicit VR little endian (PS3.5, 10.1), or
   explicit VR where its elements bear one; one without preamble and file meta information is read the same way.
6. RGB and YBR become RGB as pydicom does it, palettes are looked up; samples of b bits have 2^b − 1 for white. Colour
   profiles, overlays and padding values are left alone.
7. Refused by name: floating-point pixels, more than 16 bits, other colour spaces, segmented palettes, more than
   ``MAX_PIXELS`` pixels, a file that stops before its pixels end, a transfer syntax that nothing installed decodes.

Settings come from the frame's own functional groups, else the shared ones, where the file itself has none. Reasons
never quote the file or what pydicom says of it: a value in the wrong place may be a patient's name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurecache.errors import UnreadableImage
from featurecache.images.headers import quiet_pillow, refuse_bombs

MISSING = "DICOM needs pydicom: pip install 'featurecache[dicom]'"
_HEADER = "a DICOM file whose header cannot be read"
_INFLATED = 1 << 31  # bytes of a deflated file, unpacked
_TAGS = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "SegmentedRedPaletteColorLookupTableData",
    *(f"{name}PaletteColorLookupTable{part}" for name in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
)  # fmt: skip
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DECODERS = {  # in the name of a transfer syntax -> what to install
    "JPEG-LS": "pyjpegls", "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg", "JPEG": "pylibjpeg pylibjpeg-libjpeg",
}  # fmt: skip
_MODULES = re.compile(r"pydicom\.|featurecache\.images\.dicom")  # pydicom lays its warnings at its caller's door
_QUIET = ("ignore", None, Warning, _MODULES, 0)


@functools.cache
def installed() -> bool:
    try:
        import pydicom.pixels  # noqa: F401  (since 3.0)
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Header:
    """What is known of a file before its pixels are read."""

    settings: Any  # pydicom's Dataset of _TAGS and of what was asked for beside
    width: int
    height: int
    frames: int
    end: int  # bytes of the file in front of the pixels


def _whole(settings: Any, name: str, default: int) -> int:
    value = settings.get(name)
    return default if value in (None, "") else int(value)


def read_header(data: bytes | Any, also: tuple[str, ...] = ()) -> Header:
    """The elements of ``_TAGS`` and ``also`` of a file's bytes, or of an open file, whose pixels are not touched.
    Raises UnreadableImage, for a file without an image, too."""
    if not installed():
        raise UnreadableImage(MISSING)
    import pydicom

    if _QUIET not in warnings.filters:  # in place, as in `quiet_pillow`
        warnings.filterwarnings("ignore", module=_MODULES.pattern)
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with _named_damage(_HEADER):
        _refuse_deflate_bomb(file)
        settings = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=[*_TAGS, *also])
        width, height, frames = (_whole(settings, *tag) for tag in (("Columns", 0), ("Rows", 0), ("NumberOfFrames", 1)))
        header = Header(settings, width, height, frames, file.tell())
    if width < 1 or height < 1:
        raise UnreadableImage("a DICOM file without an image")
    size = len(data) if isinstance(data, bytes) else os.fstat(file.fileno()).st_size
    if not 1 <= frames <= size:  # a frame has a byte at least; a row is made for each
        raise UnreadableImage(f"a DICOM file that declares {frames:,} frames in {size:,} bytes")
    return header


def decode_dicom(data: bytes, frame: int = 0) -> np.ndarray:
    """One frame (from 0) as uint8 [H, W] or [H, W, 3]. Raises UnreadableImage with the reason alone."""
    header = read_header(data)
    if frame >= header.frames:
        raise UnreadableImage(f"no frame {frame:,}: the file has {header.frames:,}, counted from 0")
    refuse_bombs(header.width, header.height)
    with _named_damage("a DICOM file that cannot be decoded"):
        bits, samples = _checked(header)
        syntax = _syntax(header.settings)
        _refuse_cut_off(data, header, syntax)
        stored = _stored(data, header, syntax, frame)
        if samples == 3:
            return _to_eight(stored, bits)
        if header.settings.PhotometricInterpretation == "PALETTE COLOR":
            return _palette(stored, header.settings)
        share = _share(stored, header, bits, frame)
        return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


@contextlib.contextmanager
def _named_damage(what: str) -> Iterator[None]:
    """Whatever is raised inside as UnreadableImage: pydicom and its decoders raise what their parsers meet."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{what} ({type(error).__name__})") from error


def dicom_image_header(data: bytes) -> tuple[int, int, str]:
    """(width, height in pixels, kind of pixels) from the header alone. Raises UnreadableImage."""
    header = read_header(data)
    with _named_damage(_HEADER):
        bits, samples = _checked(header)
    palette = header.settings.PhotometricInterpretation == "PALETTE COLOR"
    kind = "palette" if palette else "RGB" if samples == 3 else "grey"
    return header.width, header.height, f"{kind} (DICOM)" if bits == 8 else f"{bits}-bit {kind} (DICOM)"


def _refuse_deflate_bomb(file: Any) -> None:
    """pydicom unpacks a deflated file (PS3.5 A.5) whole, however large it becomes."""
    start, front = file.tell(), file.read(4096)
    if b"1.2.840.10008.1.2.1.99" in front:
        meta = 132 if front[128:132] == b"DICM" else 0
        if front[meta : meta + 4] != b"\x02\0\0\0":
            raise UnreadableImage("a deflated DICOM file without the length of its first group")
        length = int.from_bytes(front[meta + 8 : meta + 12], "little")
        file.seek(start + meta + 12 + length)  # behind the group whose length this is
        unpacker, unpacked = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while packed := unpacker.unconsumed_tail or file.read(1 << 20):
            unpacked += len(unpacker.decompress(packed, 1 << 24))
            if unpacked > _INFLATED:
                raise UnreadableImage(f"more than {_INFLATED:,} bytes when unpacked are refused (decompression bomb)")
    file.seek(start)


def _syntax(settings: Any) -> Any:
    """The transfer syntax as the file names it, else as its elements are written."""
    from pydicom import uid

    if named := settings.file_meta.get("TransferSyntaxUID"):
        return named
    implicit, little = settings.original_encoding
    explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else explicit


def _checked(header: Header) -> tuple[int, int]:
    """(bits stored, samples a pixel), having refused what no rule covers."""
    photometric = str(header.settings.get("PhotometricInterpretation", ""))
    samples = _whole(header.settings, "SamplesPerPixel", 1)
    allocated = _whole(header.settings, "BitsAllocated", 0)
    bits = _whole(header.settings, "BitsStored", allocated)
    if not 1 <= bits <= allocated <= 16:
        raise UnreadableImage(f"{bits} of {allocated} bits a sample; 1 to 16 are read (what is white in more?)")
    if _whole(header.settings, "HighBit", bits - 1) != bits - 1:
        raise UnreadableImage("pixels that do not begin at the lowest bit, which the standard has retired")
    grey = samples == 1 and photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    if not (grey or (samples == 3 and photometric in _COLOURS)):
        shown = photometric if re.fullmatch(r"[A-Z0-9_ ]{1,16}", photometric) else "(unknown)"
        raise UnreadableImage(f"{samples} samples a pixel of {shown}; grey, palette, RGB and YBR are read")
    return bits, samples


def _refuse_cut_off(data: bytes, header: Header, syntax: Any) -> None:
    """Pixels that stop before the length they declare, or, encapsulated, before the mark of their end (PS3.5 A.4)."""
    if syntax.is_deflated:
        return
    order = "<" if syntax.is_little_endian else ">"
    element, whole = data[header.end : header.end + 12], False
    if len(element) == 12:
        place = 8 if element[4:6].isalpha() and not syntax.is_implicit_VR else 4  # of the length, behind tag and VR
        (size,) = struct.unpack_from(order + "L", element, place)
        start = header.end + place + 4
        if size == 0xFFFFFFFF and not syntax.is_encapsulated:
            raise UnreadableImage("a DICOM file of compressed pixels that does not say its transfer syntax")
        end_mark = struct.pack(order + "HHL", 0xFFFE, 0xE0DD, 0)
        whole = data.find(end_mark, start) >= 0 if size == 0xFFFFFFFF else start + size <= len(data)  # encapsulated?
    if not whole:
        raise UnreadableImage(f"truncated after {len(data):,} bytes")


def _stored(data: bytes, header: Header, syntax: Any, frame: int) -> np.ndarray:
    """The stored values of a frame, [H, W] or [H, W, 3]; YBR as RGB, unused bits dropped."""
    import pydicom
    from pydicom.pixels import get_decoder, pixel_array

    quiet_pillow()  # pydicom decodes JPEG with it
    full = str(syntax.name)
    name = full.split(" (")[0] if re.fullmatch(r"[\w .,()&/\[\]:-]+", full) else "(unknown)"
    install = next((f": pip install {what}" for family, what in _DECODERS.items() if family in full), "")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise UnreadableImage(f"its transfer syntax {name} is none that pydicom decodes") from error
    if syntax.is_compressed and not decoder.is_available:
        raise UnreadableImage(f"its {name} data need another decoder{install}")
    try:
        if syntax.is_deflated or "TransferSyntaxUID" not in header.settings.file_meta or data[128:132] != b"DICM":
            return np.asarray(decoder.as_array(pydicom.dcmread(io.BytesIO(data), force=True), index=frame)[0])
        return np.asarray(pixel_array(io.BytesIO(data), index=frame))
    except RuntimeError as error:  # every decoder that is installed has failed
        if not syntax.is_compressed:
            raise
        raise UnreadableImage(f"its {name} data are damaged or need another decoder{install}") from error


def _to_eight(values: np.ndarray, bits: int) -> np.ndarray:
    white = 2**bits - 1
    exact = values if bits == 8 else np.rint(np.minimum(values.astype(np.float64), white) * (255 / white))
    return exact.astype(np.uint8)


def _palette(stored: np.ndarray, settings: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    if "SegmentedRedPaletteColorLookupTableData" in settings:
        raise UnreadableImage("a segmented palette; save it with a plain one")
    colours = apply_color_lut(stored, settings)[..., :3]
    return _to_eight(colours, 8 * colours.dtype.itemsize)


def _share(stored: np.ndarray, header: Header, bits: int, frame: int) -> np.ndarray:
    """float64 [H, W]: the share of white, which may lie outside 0..1."""
    signed = _whole(header.settings, "PixelRepresentation", 0) == 1
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    modality = _group(header.settings, frame, "PixelValueTransformationSequence", "RescaleSlope", "ModalityLUTSequence")
    if modality.get("ModalityLUTSequence"):
        values, highest = _looked_up(stored, modality.ModalityLUTSequence[0], lowest)
        lowest = 0
    else:
        slope, intercept = _float(modality, "RescaleSlope", 1.0), _float(modality, "RescaleIntercept", 0.0)
        if not (np.isfinite([slope, intercept]).all() and slope):
            raise UnreadableImage("a rescale slope or intercept that is no number, or a slope of 0")
        values = stored.astype(np.float64) * slope + intercept
        lowest, highest = sorted((lowest * slope + intercept, highest * slope + intercept))
    voi = _group(header.settings, frame, "FrameVOILUTSequence", "WindowCenter", "VOILUTSequence")
    if voi.get("VOILUTSequence"):
        shown, white = _looked_up(values, voi.VOILUTSequence[0], lowest)
        share = shown / white
    elif voi.get("WindowCenter") not in (None, "") and voi.get("WindowWidth") not in (None, ""):
        share = _windowed(values, voi)
    else:
        share = (values - lowest) / (highest - lowest)
    return 1 - np.clip(share, 0, 1) if header.settings.PhotometricInterpretation == "MONOCHROME1" else share


def _group(settings: Any, frame: int, sequence: str, *names: str) -> Any:
    """Where the settings ``names`` stand: in the file, in the frame's functional groups, in the shared ones."""
    if any(settings.get(name) not in (None, "") for name in names):
        return settings
    own = settings.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*own[frame : frame + 1], *(settings.get("SharedFunctionalGroupsSequence") or [])[:1]):
        if group.get(sequence):
            return group.get(sequence)[0]
    return settings


def _float(settings: Any, name: str, default: float) -> float:
    """A number, of several the first."""
    value = settings.get(name)
    value = default if value in (None, "") else value
    return float(value if isinstance(value, int | float | str) else value[0])


def _windowed(values: np.ndarray, voi: Any) -> np.ndarray:
    """C.11.2.1.2 and C.11.2.1.3: the share of white in the first window."""
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    centre, width = _float(voi, "WindowCenter", np.nan), _float(voi, "WindowWidth", np.nan)
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UnreadableImage("a VOI LUT function that the standard does not know")
    if not np.isfinite([centre, width]).all() or width < (1 if function == "LINEAR" else np.finfo(float).tiny):
        raise UnreadableImage(f"a window of width {width:g} around {centre:g}, which shows nothing")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-4 * (values - centre) / width)))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return np.where(values > centre, 1.0, 0.0)
    return np.asarray((values - centre) / width + 0.5)


def _looked_up(values: np.ndarray, item: Any, lowest: float) -> tuple[np.ndarray, int]:
    """Values through a table (C.11.1.1), float64, and its white. Values beyond its ends get its first or last entry."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries or 1 << 16
    if first > 0x7FFF and lowest < 0:  # signed as the values are, which the file cannot say of itself
        first -= 1 << 16
    elif first < 0 <= lowest:
        first += 1 << 16
    data = item["LUTData"].value
    if isinstance(data, bytes):
        order = ">" if item.original_encoding[1] is False else "<"
        table = np.frombuffer(data, "u1" if len(data) < 2 * entries else order + "u2")
    else:
        table = np.asarray(data, np.int64).reshape(-1)
    if len(table) < entries or not 1 <= bits <= 16:
        raise UnreadableImage("a lookup table that is shorter than it declares, or of more than 16 bits")
    places = np.clip(np.rint(values.astype(np.float64)) - first, 0, entries - 1).astype(np.int64)
    return table[:entries][places].astype(np.float64), 2**bits - 1
