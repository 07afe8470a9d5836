"""DICOM by its rules, each against pydicom's own functions or a value worked by hand."""

from __future__ import annotations

import io
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoded import encoded, reason
from support.dicom_files import RAMP, dicom_bytes, pydicom

from featurecache.errors import UnreadableImage
from featurecache.images import dicom
from featurecache.images.decoding import decode, digest, image_header

from pydicom.encaps import encapsulate  # isort: skip
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder  # isort: skip
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless, MPEG2MPML  # isort: skip

EXAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"


def example(name: str) -> bytes:
    return (EXAMPLES / name).read_bytes()


def jpeg(pixels: np.ndarray) -> bytes:
    return encapsulate([encoded(pixels, "JPEG")])


def grey(data: bytes) -> list[int]:
    """The decoded pixels in their order; all three channels are the same."""
    pixels = decode(data).numpy()
    assert (pixels == pixels[:1]).all()
    return pixels[0].ravel().tolist()


def by_pydicom(file: Path | io.BytesIO, frame: int = 0) -> np.ndarray:
    """The same rules, by pydicom's functions alone: uint8 [H, W] or [H, W, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(file)
        stored = ds.pixel_array[frame] if int(ds.get("NumberOfFrames") or 1) > 1 else ds.pixel_array
        if stored.ndim == 3:
            return np.rint(stored * (255 / (2**ds.BitsStored - 1)))
        low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1)
        ends = np.array((low, high) if ds.PixelRepresentation else (0, 2**ds.BitsStored - 1), np.float64)
        ends = apply_modality_lut(ends, ds) if "RescaleSlope" in ds else ends
        shown = (apply_voi_lut(apply_modality_lut(stored, ds), ds) - ends[0]) / (ends[1] - ends[0])
    return np.rint(255 * (1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown))


# pixels


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm", "JPEG2000.dcm", "J2K_pixelrep_mismatch.dcm", "examples_overlay.dcm",
        "liver_1frame.dcm", "image_dfl.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm",
        "SC_rgb_small_odd_jpeg.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_jpeg_app14_dcmd.dcm",
    ],
)  # fmt: skip
def test_real_files_of_all_kinds_are_what_pydicom_makes_of_them(name):
    pixels, expected = decode(example(name)).permute(1, 2, 0).numpy(), by_pydicom(EXAMPLES / name)
    np.testing.assert_array_equal(pixels, expected if expected.ndim == 3 else expected[..., None].repeat(3, 2))
    assert image_header(example(name))[:2] == expected.shape[1::-1]


def test_a_palette_is_looked_up_as_pydicom_does_it():
    ds = pydicom.dcmread(EXAMPLES / "examples_palette.dcm")
    colours = apply_color_lut(ds.pixel_array, ds)
    expected = colours if colours.dtype == np.uint8 else np.rint(colours / 257)
    np.testing.assert_array_equal(decode(example("examples_palette.dcm")).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("frame", [0, 1])
def test_compressed_frames_are_read_by_their_number(frame):
    name = "SC_rgb_rle_16bit_2frame.dcm"
    np.testing.assert_array_equal(dicom.decode_dicom(example(name), frame), by_pydicom(EXAMPLES / name, frame))


def lut(entries: list[int], first: int, bits: int) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], np.array(entries, "<u2").tobytes()
    return item


TWELVE = {"BitsStored": 12}
WINDOW = {**TWELVE, "WindowCenter": 1000, "WindowWidth": 2001}  # (1000 − 999.5) / 2000 + 0.5 = 0.50025
TURNED = {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"}
MODALITY = {"ModalityLUTSequence": [lut([0, 10, 100, 255], 2, 8)]}
# pydicom's own wraps around here: an index is kept in the dtype of the table. A window beside it says nothing.
LONG = {**TWELVE, "VOILUTSequence": [lut([k // 16 for k in range(4096)], 0, 8)], "WindowCenter": 5, "WindowWidth": 2}
BEGINS_BELOW = {"VOILUTSequence": [lut([0, 4095], 0x10000 - 1000, 12)]}  # at −1000, which an unsigned number has to say
BELOW = {**TWELVE, **BEGINS_BELOW, "RescaleSlope": 1, "RescaleIntercept": -1024}


@pytest.mark.parametrize(
    ("values", "dtype", "elements", "expected"),
    [
        ([0, 8, 9, 100, 2048, 4095], "u2", TWELVE, [0, 0, 1, 6, 128, 255]),  # round(v·255/4095)
        ([0, 8, 9, 100, 2048, 4095], "u2", {}, [0, 0, 0, 0, 8, 16]),  # round(v / 257), as a 16-bit PNG
        ([-2048, -1, 0, 2047], "i2", TWELVE, [0, 127, 128, 255]),  # round((v + 2048)·255/4095)
        ([0x0FFF, 0xF000, 0xFFFF, 0x1800], "u2", TWELVE, [255, 0, 255, 128]),
        ([0, 1000, 4095], "u2", WINDOW, [0, 128, 255]),
        ([0, 1000, 4095], "u2", TURNED, [255, 127, 0]),
        ([9, 10], "u1", {"WindowCenter": 10, "WindowWidth": 1}, [0, 255]),  # above c − 0.5
        ([0, 2, 3, 4, 5, 200], "u1", MODALITY, [0, 0, 10, 100, 255, 255]),
        ([0, 255, 256, 4080, 4095], "u2", LONG, [0, 15, 16, 255, 255]),
        ([0, 24, 25, 26], "u2", BELOW, [0, 0, 255, 255]),
    ],
    ids=["stored bits span the range", "16 bits", "signed", "unused bits", "window", "turned over last", "threshold",
         "outside a modality table", "VOI table of 8 bits and more than 256 entries", "VOI table from below zero"],
)  # fmt: skip
def test_values_worked_by_hand(values, dtype, elements, expected):
    assert grey(dicom_bytes(np.array([values]).astype(dtype), **elements)) == expected


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2.5, -1024), (-1, 100)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescale_and_each_window_function_are_what_pydicom_makes_of_them(function, slope, intercept, photometric):
    values = np.random.default_rng(0).integers(-2048, 2048, (9, 7)).astype(np.int16)
    data = dicom_bytes(
        values, BitsStored=12, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=[40, 600],
        WindowWidth=[400, 1600], VOILUTFunction=function, PhotometricInterpretation=photometric,
    )  # fmt: skip
    np.testing.assert_array_equal(np.reshape(grey(data), (9, 7)), by_pydicom(io.BytesIO(data)))  # of two the first


def test_colour_of_twelve_bits_has_4095_for_white():
    values = np.array([[[0, 2048, 4095], [4095, 16, 8]]], np.uint16)
    data = dicom_bytes(values, SamplesPerPixel=3, BitsStored=12)
    assert decode(data).permute(1, 2, 0).tolist() == [[[0, 128, 255], [255, 1, 0]]]
    assert image_header(data)[:3] == (2, 1, "12-bit RGB (DICOM)")


def test_windows_of_enhanced_files_stand_with_the_frame_or_are_shared():
    def group(intercept: float, centre: float | None) -> pydicom.Dataset:
        settings, modality, voi = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        modality.RescaleSlope, modality.RescaleIntercept = 1, intercept
        settings.PixelValueTransformationSequence = [modality]
        if centre is not None:
            voi.WindowCenter, voi.WindowWidth = centre, 1
            settings.FrameVOILUTSequence = [voi]
        return settings

    own, shared = [group(0, 20), group(10, None)], [group(0, 40)]
    frames = np.tile(np.array([[10, 20, 30]], np.uint8), (2, 1, 1))
    data = dicom_bytes(frames, PerFrameFunctionalGroupsSequence=own, SharedFunctionalGroupsSequence=shared)
    assert [dicom.decode_dicom(data, k).tolist() for k in (0, 1)] == [[[0, 255, 255]], [[0, 0, 255]]]


def test_what_is_tiff_and_dicom_at_once_is_dicom_and_another_image_than_the_tiff():
    data = bytearray(dicom_bytes(RAMP, WindowCenter=10, WindowWidth=1))
    plain = digest(bytes(data))
    data[:8] = b"II*\0\x08\0\0\0"
    assert grey(bytes(data)) == [0] * 10 + [255] * 14
    assert digest(bytes(data)) == digest(bytes(data), 0) != plain


# what is refused


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"BitsAllocated": 32, "BitsStored": 32}, "32 of 32 bits a sample"),
        ({"BitsStored": 12, "HighBit": 15}, "do not begin at the lowest bit"),
        ({"PhotometricInterpretation": "DOE^JANE"}, r"of \(unknown\); grey"),
        ({"PhotometricInterpretation": "CMYK"}, "of CMYK; grey"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "a window of width 0 around 5"),
        ({"WindowCenter": 5, "WindowWidth": 2, "VOILUTFunction": "DOE"}, "function that the standard does not know"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope of 0"),
        ({"VOILUTSequence": [lut([1, 2], 0, 17)]}, "lookup table that is shorter"),
        ({"Rows": 0}, "without an image"),
        ({"Rows": 60_000, "Columns": 60_000}, "decompression bomb"),
        ({"NumberOfFrames": 10**9}, "declares 1,000,000,000 frames"),
        ({"NumberOfFrames": 0}, "declares 0 frames"),
        ({"Rows": 40}, "truncated|cannot be decoded"),
    ],
)
def test_what_no_rule_covers_is_refused_by_name(elements, message):
    with pytest.raises(UnreadableImage, match=message):
        decode(dicom_bytes(RAMP.astype(np.uint16), **elements))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MR_truncated.dcm", "truncated after 9,630 bytes"),
        ("JPEGLSNearLossless_08.dcm", "data need another decoder: pip install pyjpegls"),
        ("JPGExtended.dcm", "its JPEG Extended data are damaged or need another decoder: pip install pylibjpeg"),
        ("SC_rgb_jpeg_gdcm.dcm", "pip install pylibjpeg pylibjpeg-libjpeg"),
        ("test-SR.dcm", "a DICOM file without an image"),
        ("badVR.dcm", "a DICOM file whose header cannot be read (ValueError)"),
        ("meta_missing_tsyntax.dcm", "a DICOM file without an image"),
        ("rtdose_1frame.dcm", "32 of 32 bits a sample"),
    ],
)
def test_real_files_that_are_not_read_are_named_failures(name, message):
    decoders = {"pyjpegls": get_decoder(JPEGLSLossless).is_available, "pylibjpeg": "pylibjpeg" in sys.modules}
    if any(package in message and installed for package, installed in decoders.items()):
        pytest.skip("its decoder is installed")
    assert message in reason(example(name))


def test_files_that_no_rule_covers_are_named_failures():
    palette = {"PhotometricInterpretation": "PALETTE COLOR", "SegmentedRedPaletteColorLookupTableData": b"\0\0"}
    assert reason(dicom_bytes(RAMP, **palette)) == "a segmented palette; save it with a plain one"
    film = dicom_bytes(RAMP, MPEG2MPML, PixelData=encapsulate([b"1234"]))
    assert reason(film) == "its transfer syntax MPEG2 Main Profile / Main Level is none that pydicom decodes"
    packed = dicom_bytes(RAMP, DeflatedExplicitVRLittleEndian)  # nobody can tell where its packed part begins
    assert reason(packed[:132] + packed[144:]) == "a deflated DICOM file without the length of its first group"


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_cut_off_compressed_file_is_truncated_even_where_its_decoder_would_fill_the_rest(share):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    whole = dicom_bytes(pixels, JPEGBaseline8Bit, PixelData=jpeg(pixels))
    assert decode(whole).shape == (3, 64, 64)
    cut = whole[: int(len(whole) * share)]
    assert reason(cut) == f"truncated after {len(cut):,} bytes"


def test_a_deflated_file_that_unpacks_to_more_than_fits_is_refused(monkeypatch):
    data = dicom_bytes(np.zeros((512, 512), np.uint8), DeflatedExplicitVRLittleEndian)
    assert decode(data).shape == (3, 512, 512)
    monkeypatch.setattr(dicom, "_INFLATED", 10_000)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("was unpacked whole"))
    assert "decompression bomb" in reason(data)


def test_a_jpeg_of_another_size_inside_is_a_failure():
    pixels = np.zeros((64, 64), np.uint8)
    message = reason(dicom_bytes(pixels, JPEGBaseline8Bit, PixelData=jpeg(pixels[:8, :8])))
    assert "cannot be decoded" in message or "damaged" in message


@given(st.sampled_from(["MR_small.dcm", "MR_small_RLE.dcm", "SC_rgb_small_odd_jpeg.dcm", "examples_overlay.dcm"]),
       st.lists(st.tuples(st.integers(132, 2000), st.integers(0, 255)), max_size=6), st.integers(0, 100))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_pixels_or_a_reason_that_quotes_nothing(name, changes, share):
    data = bytearray(example(name))
    for place, value in changes:
        data[place] = value
    data = data[: len(data) * share // 100] if share > 20 else data
    try:
        assert decode(bytes(data)).shape[0] == 3
    except UnreadableImage as error:
        assert "CompressedSamples" not in str(error) and "Lestrade" not in str(error)  # patients in those files


def test_threads_decode_what_one_thread_decodes_and_no_warning_escapes():
    files = [example(name) for name in ("MR_small.dcm", "SC_rgb_rle.dcm", "JPEG2000.dcm")]
    expected = [decode(data) for data in files]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        for number, pixels in enumerate(pool.map(decode, files * 5)):
            assert torch.equal(pixels, expected[number % 3])


# headers with gaps


def without_syntax(data: bytes) -> bytes:
    """The same file whose header does not name its transfer syntax."""
    at = data.index(b"\x02\0\x10\0UI")
    size = 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    length = int.from_bytes(data[140:144], "little") - size
    return data[:140] + length.to_bytes(4, "little") + data[144:at] + data[at + size :]


def without_meta(data: bytes) -> bytes:
    return data[144 + int.from_bytes(data[140:144], "little") :]


@pytest.mark.parametrize("gap", [without_syntax, without_meta, lambda data: data[132:]])
@pytest.mark.parametrize(
    "syntax",
    [pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian],
)
def test_a_header_with_gaps_is_read_by_the_default_of_the_standard(gap, syntax):
    frames = np.random.default_rng(0).integers(0, 4096, (2, 8, 8)).astype(np.uint16)
    whole = dicom_bytes(frames, syntax, BitsStored=12)
    data = gap(whole)
    assert len(data) < len(whole)
    np.testing.assert_array_equal(dicom.decode_dicom(data, 1), np.rint(frames[1] * (255 / 4095)))
    assert torch.equal(decode(data), decode(whole))
    cut = data[:-9]
    assert reason(cut) == f"truncated after {len(cut):,} bytes"


def test_compressed_pixels_of_a_syntax_that_is_not_named_are_refused():
    data = without_syntax(dicom_bytes(RAMP, JPEGBaseline8Bit, PixelData=jpeg(RAMP)))
    assert reason(data) == "a DICOM file of compressed pixels that does not say its transfer syntax"


def test_a_deflated_file_without_a_preamble_is_read():
    data = dicom_bytes(np.zeros((8, 8), np.uint8), DeflatedExplicitVRLittleEndian)
    assert decode(data[132:]).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\0" * 90,
        b"\2\0\0\0" + bytes(60),
        b"\x08\0\5\0\4\0\0\0abcd\x08\0\1\0" + b"\1" * 9,
        b"\0\x08\0\5\0\0\0\4abcd\0\x08\0\x16" + bytes(40),  # big-endian without VR: there is no such thing
    ],
)
def test_bytes_that_only_begin_alike_are_no_dicom(data):
    assert "not an image" in reason(data)
