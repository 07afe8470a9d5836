"""DICOM by its rules, each against pydicom's own functions or a value worked by hand; and in data sets."""

from __future__ import annotations

import io
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import featurecache
from featurecache.errors import SourceError, UnreadableImage
from featurecache.images import dicom
from featurecache.images.decoding import decode, digest, image_header
from featurecache.sources import open_source, reopen
from featurecache.sources.pseudonyms import load_secret, pseudonymise
from featurecache.sources.summary import describe_dataset

pydicom = pytest.importorskip("pydicom", minversion="3")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

TINY = {"backbone": "vit-demo", "random_weights": True}
EXAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(24, dtype=np.int64).reshape(4, 6)


def dicom_bytes(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file of pixels [H, W], [F, H, W] or, with SamplesPerPixel=3, [H, W, 3]."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4"
    colour = elements.get("SamplesPerPixel") == 3
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PlanarConfiguration = (3, 0) if colour else (1, None)
    if not colour:
        del ds.PlanarConfiguration
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    if pixels.size:
        ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        ds.PixelData += b"\0" * (len(ds.PixelData) % 2)
        ds["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that are wrong on purpose
        for name, value in elements.items():
            setattr(ds, name, value)
        ds.HighBit = elements.get("HighBit", ds.BitsStored - 1)
        ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def grey(data: bytes) -> list[int]:
    """The decoded pixels in their order; all three channels are the same."""
    found = decode(data).numpy()
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    return found[0].ravel().tolist()


def reason(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    return str(caught.value)


def by_pydicom(file: Path, frame: int = 0) -> np.ndarray:
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


# -- pixels


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
    data = (EXAMPLES / name).read_bytes()
    found, expected = decode(data).permute(1, 2, 0).numpy(), by_pydicom(EXAMPLES / name)
    np.testing.assert_array_equal(found, expected if expected.ndim == 3 else expected[..., None].repeat(3, 2))
    assert image_header(data)[:2] == expected.shape[1::-1]


def test_a_palette_is_looked_up_as_pydicom_does_it():
    from pydicom.pixels import apply_color_lut

    ds = pydicom.dcmread(EXAMPLES / "examples_palette.dcm")
    colours = apply_color_lut(ds.pixel_array, ds)
    expected = colours if colours.dtype == np.uint8 else np.rint(colours / 257)
    data = (EXAMPLES / "examples_palette.dcm").read_bytes()
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


def test_without_a_window_the_bits_that_are_stored_span_the_range_not_the_values_that_occur():
    values = np.array([[0, 8, 9, 100, 2048, 4095]], np.uint16)
    assert grey(dicom_bytes(values, BitsStored=12)) == [0, 0, 1, 6, 128, 255]  # round(v·255/4095)
    assert grey(dicom_bytes(values)) == [0, 0, 0, 0, 8, 16]  # round(v / 257), as a 16-bit PNG


def test_signed_values_span_from_the_most_negative():
    values = np.array([[-2048, -1, 0, 2047]], np.int16)
    assert grey(dicom_bytes(values, BitsStored=12)) == [0, 127, 128, 255]  # round((v + 2048)·255/4095)


def test_what_stands_in_unused_upper_bits_is_dropped():
    values = np.array([[0x0FFF, 0xF000, 0xFFFF, 0x1800]], np.uint16)
    assert grey(dicom_bytes(values, BitsStored=12)) == [255, 0, 255, 128]


def test_monochrome1_is_turned_over_after_everything_else():
    values = np.array([[0, 1000, 4095]], np.uint16)
    window = {"WindowCenter": 1000, "WindowWidth": 2001}
    plain = grey(dicom_bytes(values, BitsStored=12, **window))
    turned = grey(dicom_bytes(values, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **window))
    assert (plain, turned) == ([0, 128, 255], [255, 127, 0])  # (1000 − 999.5) / 2000 + 0.5 = 0.50025


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2.5, -1024), (-1, 100)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescale_and_each_window_function_are_what_pydicom_makes_of_them(
    tmp_path, function, slope, intercept, photometric
):
    values = np.random.default_rng(0).integers(-2048, 2048, (9, 7)).astype(np.int16)
    data = dicom_bytes(
        values, BitsStored=12, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=[40, 600],
        WindowWidth=[400, 1600], VOILUTFunction=function, PhotometricInterpretation=photometric,
    )  # fmt: skip
    (tmp_path / "a.dcm").write_bytes(data)
    expected = by_pydicom(tmp_path / "a.dcm")  # of two windows the first, too
    np.testing.assert_array_equal(np.reshape(grey(data), (9, 7)), expected)


def test_a_linear_window_one_wide_is_a_threshold():
    data = dicom_bytes(RAMP.astype(np.uint8), WindowCenter=10, WindowWidth=1)
    assert grey(data) == [0] * 10 + [255] * 14  # above c − 0.5


def lut(entries: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], np.array(entries, "<u2").tobytes()
    return item


def test_values_outside_a_modality_table_get_its_ends():
    table = lut([0, 10, 100, 255], 2, 8)
    data = dicom_bytes(np.array([[0, 2, 3, 4, 5, 200]], np.uint8), ModalityLUTSequence=[table])
    assert grey(data) == [0, 0, 10, 100, 255, 255]


def test_a_voi_table_of_eight_bits_and_more_than_256_entries():
    """pydicom's own wraps around here: an index is kept in the dtype of the table."""
    table = lut([k // 16 for k in range(4096)], 0, 8)
    data = dicom_bytes(np.array([[0, 255, 256, 4080, 4095]], np.uint16), BitsStored=12, VOILUTSequence=[table],
                       WindowCenter=5, WindowWidth=2)  # fmt: skip
    assert grey(data) == [0, 15, 16, 255, 255]


def test_a_voi_table_begins_below_zero_where_the_values_do():
    table = lut([0, 4095], 0x10000 - 1000, 12)  # −1000, which an unsigned number has to say
    data = dicom_bytes(np.array([[0, 24, 25, 26]], np.uint16), BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024,
                       VOILUTSequence=[table])  # fmt: skip
    assert grey(data) == [0, 0, 255, 255]


def test_colour_of_twelve_bits_has_4095_for_white():
    values = np.array([[[0, 2048, 4095], [4095, 16, 8]]], np.uint16)
    data = dicom_bytes(values, SamplesPerPixel=3, BitsStored=12)
    assert decode(data).permute(1, 2, 0).tolist() == [[[0, 128, 255], [255, 1, 0]]]
    assert image_header(data) == (2, 1, "12-bit RGB (DICOM)")


def test_windows_of_enhanced_files_stand_with_the_frame_or_are_shared():
    def group(intercept: float, centre: float | None) -> Dataset:
        found, modality, voi = Dataset(), Dataset(), Dataset()
        modality.RescaleSlope, modality.RescaleIntercept = 1, intercept
        found.PixelValueTransformationSequence = [modality]
        if centre is not None:
            voi.WindowCenter, voi.WindowWidth = centre, 1
            found.FrameVOILUTSequence = [voi]
        return found

    frames = np.tile(np.array([[10, 20, 30]], np.uint8), (2, 1, 1))
    data = dicom_bytes(frames, PerFrameFunctionalGroupsSequence=[group(0, 20), group(10, None)],
                       SharedFunctionalGroupsSequence=[group(0, 40)])  # fmt: skip
    assert [dicom.decode_dicom(data, k).tolist() for k in (0, 1)] == [[[0, 255, 255]], [[0, 0, 255]]]


# -- frames


def test_frames_are_images_of_their_own(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 4, 6)).astype(np.uint8)
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(frames))
    (tmp_path / "b.dcm").write_bytes(dicom_bytes(RAMP.astype(np.uint8)))
    data = open_source(tmp_path)
    assert data.ids == [*(f"a.dcm#frame={k}" for k in range(12)), "b.dcm"]
    for row in range(12):
        np.testing.assert_array_equal(decode(data.read(row))[0].numpy(), frames[row])
    assert "1 DICOM files hold 12 frames" in " ".join(data.notes)
    assert data.path(11) == str(tmp_path / "a.dcm")


def test_the_digest_of_a_frame_is_of_the_bytes_and_its_number(tmp_path):
    raw = dicom_bytes(np.zeros((3, 4, 6), np.uint8))
    (tmp_path / "a.dcm").write_bytes(raw)
    data = open_source(tmp_path)
    assert [digest(data.read(row)) for row in range(3)] == [digest(raw, k) for k in range(3)]
    assert digest(raw) == digest(raw, 0)  # read without a number the first is taken, and it is the same image
    single = dicom_bytes(RAMP.astype(np.uint8))
    assert digest(single) != digest(single, 0)


def test_compressed_frames_are_found_by_their_number():
    path = EXAMPLES / "SC_rgb_rle_16bit_2frame.dcm"
    for frame in range(2):
        np.testing.assert_array_equal(dicom.decode_dicom(path.read_bytes(), frame), by_pydicom(path, frame))


def test_frames_in_class_folders_bear_the_label_and_splits_of_their_file(tmp_path):
    for name in ("train/ill/a", "train/well/b", "test/ill/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.dcm").write_bytes(dicom_bytes(np.zeros((2, 4, 6), np.uint8)))
    data = open_source(tmp_path)
    assert data.ids[:2] == ["test/ill/c.dcm#frame=0", "test/ill/c.dcm#frame=1"]
    assert (data.labels.tolist(), data.splits) == ([0, 0, 0, 0, 1, 1], ["test"] * 2 + ["train"] * 4)
    assert data.groups == [name for name in data.ids[::2] for _ in range(2)]  # frames stay together


def test_a_table_lists_files_or_single_frames(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(np.arange(48, dtype=np.uint8).reshape(3, 4, 4)))
    (tmp_path / "b.dcm").write_bytes(dicom_bytes(np.zeros((2, 4, 4), np.uint8)))
    (tmp_path / "t.csv").write_text("path,label,age\na.dcm#frame=2,x,50\nb.dcm,y,60\na.dcm#frame=0,y,50\n")
    data = open_source(tmp_path / "t.csv")
    assert data.ids == ["a.dcm#frame=2", "b.dcm#frame=0", "b.dcm#frame=1", "a.dcm#frame=0"]
    assert (data.labels.tolist(), data.meta["age"].tolist()) == ([0, 1, 1, 1], [50, 60, 60, 50])
    assert decode(data.read(0))[0, 0, 0] == 32
    assert data.groups == ["a.dcm#frame=2", "b.dcm#frame=0", "b.dcm#frame=0", "a.dcm#frame=2"]


def test_a_frame_that_is_not_there_is_a_named_failure(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(np.zeros((2, 4, 4), np.uint8)))
    (tmp_path / "t.csv").write_text("path\na.dcm#frame=2\nc.dcm#frame=0\n")
    data = open_source(tmp_path / "t.csv")
    with pytest.raises(UnreadableImage, match=r"no frame 2: the file has 2, counted from 0"):
        decode(data.read(0))
    with pytest.raises(UnreadableImage, match="no such file"):
        data.read(1)


def test_a_file_that_changes_between_its_frames_is_read_again(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom_bytes(np.zeros((2, 4, 4), np.uint8)))
    data = open_source(tmp_path)
    data.read(0)
    path.write_bytes(dicom_bytes(np.full((2, 4, 5), 9, np.uint8)))
    assert decode(data.read(1))[0, 0].tolist() == [9] * 5


def test_headers_are_read_once_in_a_process_and_again_where_a_file_has_changed(tmp_path, monkeypatch):
    path, read = tmp_path / "a.dcm", []
    path.write_bytes(dicom_bytes(np.zeros((2, 4, 4), np.uint8)))
    real = dicom.read_header
    monkeypatch.setattr(dicom, "read_header", lambda *given: read.append(1) or real(*given))
    assert [len(open_source(tmp_path)) for _ in range(3)] == [2, 2, 2] and len(read) == 1
    path.write_bytes(dicom_bytes(np.zeros((3, 4, 4), np.uint8)))
    assert len(open_source(tmp_path)) == 3 and len(read) == 2


def test_files_without_an_ending_are_found_by_their_content(tmp_path):
    for name in ("IM00001", "1.2.840.113619", "README"):
        (tmp_path / name).write_bytes(dicom_bytes(RAMP.astype(np.uint8)) if name != "README" else b"hello" * 99)
    (tmp_path / "DICOMDIR").write_bytes((EXAMPLES / "dicomdirtests" / "DICOMDIR").read_bytes())
    assert open_source(tmp_path).ids == ["1.2.840.113619", "IM00001"]


def test_what_is_tiff_and_dicom_at_once_is_dicom_and_another_image_than_the_tiff():
    data = bytearray(dicom_bytes(RAMP.astype(np.uint8), WindowCenter=10, WindowWidth=1))
    plain = digest(bytes(data))
    data[:8] = b"II*\0\x08\0\0\0"
    assert grey(bytes(data)) == [0] * 10 + [255] * 14
    assert digest(bytes(data)) == digest(bytes(data), 0) != plain


# -- patients


def patients(folder: Path, *names: str, **elements: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.full((4, 4), number, np.uint8)
        (folder / f"{number}.dcm").write_bytes(dicom_bytes(pixels, PatientID=name, PatientName="DOE^JANE", **elements))
    return folder


def test_the_patient_is_the_group_where_nobody_says_one_and_that_is_said(tmp_path):
    data = open_source(patients(tmp_path / "d", "p7", "p8", "p7", ""))
    assert data.groups == ["p7", "p8", "p7", "3.dcm"]
    assert any("PatientID" in note and "--hash-groups" in note for note in data.notes)
    assert not any(
        "--hash-groups" in note for note in pseudonymise(data, load_secret(), ids=False, groups=True).notes[:2]
    )


def test_a_table_with_groups_keeps_its_own(tmp_path):
    patients(tmp_path / "d", "p7", "p8")
    (tmp_path / "d" / "t.csv").write_text("path,patient\n0.dcm,a\n1.dcm,a\n")
    data = open_source(tmp_path / "d" / "t.csv")
    assert data.groups == ["a", "a"]
    assert not any("PatientID" in note for note in data.notes)


def test_one_patient_in_all_files_says_nothing(tmp_path):
    data = open_source(patients(tmp_path / "d", "ANON", "ANON"))
    assert data.groups is None
    assert any("tells nobody apart" in note for note in data.notes)
    assert "ANON" not in str(data)


@pytest.mark.integration
def test_nothing_of_a_patient_but_the_group_reaches_the_cache_and_hashing_hides_that(tmp_path):
    folder = patients(tmp_path / "d", "SECRET-7", "SECRET-8", "SECRET-9")
    text = dicom_bytes(RAMP.astype(np.uint8), NumberOfFrames="12345678").replace(b"12345678", b"DOE^JANE")
    (folder / "3.dcm").write_bytes(text)
    for hashed, cache in ((False, tmp_path / "plain"), (True, tmp_path / "hashed")):
        featurecache.extract(folder, cache=cache, outputs="cls", hash_groups=hashed, **TINY)
        stored = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
        assert b"JANE" not in stored and b"header cannot be read (ValueError)" in stored
        assert (b"SECRET-7" in stored) == (not hashed)


def test_frames_of_a_file_without_a_patient_are_hidden_with_their_ids(tmp_path):
    (tmp_path / "doe.dcm").write_bytes(dicom_bytes(np.zeros((2, 4, 4), np.uint8)))
    data = pseudonymise(open_source(tmp_path), load_secret(), ids=True, groups=False)
    assert data.groups == [data.ids[0]] * 2
    assert "doe" not in "".join([*data.ids, *data.groups])
    raw = (tmp_path / "doe.dcm").read_bytes()
    assert [digest(data.read(row)) for row in (0, 1)] == [digest(raw, row) for row in (0, 1)]


# -- what is said


def test_which_window_was_taken_is_said(tmp_path):
    patients(tmp_path / "d", "", WindowCenter=[1, 2], WindowWidth=[3, 4])
    (tmp_path / "d" / "x.dcm").write_bytes(dicom_bytes(RAMP.astype(np.uint8)))
    notes = " ".join(open_source(tmp_path / "d").notes)
    assert "1 DICOM files hold several windows; the first is used." in notes
    assert "1 DICOM files have no window" in notes


def test_info_tells_bits_and_kinds(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(RAMP.astype(np.uint16), BitsStored=12))
    assert describe_dataset(open_source(tmp_path)).kinds == {"12-bit grey (DICOM)": 1}


def test_without_pydicom_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "installed", lambda: False)
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(RAMP.astype(np.uint8)))
    with pytest.raises(SourceError, match=r"1 images of .* are DICOM\. .*pip install 'featurecache\[dicom\]'"):
        open_source(tmp_path)
    for ask in (decode, digest, image_header):
        with pytest.raises(UnreadableImage, match="pip install"):
            ask((tmp_path / "a.dcm").read_bytes())


def test_other_images_need_no_pydicom(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    dicom.installed.cache_clear()
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    assert decode(open_source(tmp_path).read(0))[0, 0].tolist() == [7] * 4
    (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(SourceError, match=r"1 images of .* are DICOM"):
        open_source(tmp_path)
    monkeypatch.undo()
    dicom.installed.cache_clear()


# -- what is refused


@pytest.mark.parametrize(
    ("elements", "words"),
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
def test_what_no_rule_covers_is_refused_by_name(elements, words):
    data = dicom_bytes(RAMP.astype(np.uint16), **elements)
    with pytest.raises(UnreadableImage, match=words):
        decode(data)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MR_truncated.dcm", "truncated after 9,630 bytes"),
        ("JPEGLSNearLossless_08.dcm", "need another decoder: pip install pyjpegls"),
        ("JPGExtended.dcm", "its JPEG Extended data are damaged or need another decoder: pip install pylibjpeg"),
        ("SC_rgb_jpeg_gdcm.dcm", "pip install pylibjpeg pylibjpeg-libjpeg"),
        ("test-SR.dcm", "a DICOM file without an image"),
        ("badVR.dcm", "a DICOM file whose header cannot be read (ValueError)"),
        ("meta_missing_tsyntax.dcm", "a DICOM file without an image"),
        ("rtdose_1frame.dcm", "32 of 32 bits a sample"),
    ],
)
def test_real_files_that_are_not_read_are_named_failures(name, words):
    from pydicom.pixels import get_decoder

    if "pyjpegls" in words and get_decoder(JPEGLSLossless).is_available:
        pytest.skip("pyjpegls is installed")
    if "pylibjpeg" in words and "pylibjpeg" in sys.modules:
        pytest.skip("pylibjpeg is installed")
    assert words in reason((EXAMPLES / name).read_bytes())


def test_a_cut_off_compressed_file_is_truncated_even_where_its_decoder_would_fill_the_rest():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(buffer, "JPEG")
    whole = dicom_bytes(np.zeros((64, 64), np.uint8), PixelData=encapsulate([buffer.getvalue()]),
                        syntax=JPEGBaseline8Bit)  # fmt: skip
    assert decode(whole).shape == (3, 64, 64)
    for share in (0.9, 0.6):
        cut = whole[: int(len(whole) * share)]
        assert reason(cut) == f"truncated after {len(cut):,} bytes"


def test_a_deflated_file_that_unpacks_to_more_than_fits_is_refused(monkeypatch):
    data = dicom_bytes(np.zeros((512, 512), np.uint8), DeflatedExplicitVRLittleEndian)
    assert decode(data).shape == (3, 512, 512)
    monkeypatch.setattr(dicom, "_INFLATED", 10_000)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("was unpacked whole"))
    assert "decompression bomb" in reason(data)


def test_a_jpeg_of_another_size_inside_is_a_failure():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    pixels = encapsulate([buffer.getvalue()])
    data = dicom_bytes(np.zeros((64, 64), np.uint8), JPEGBaseline8Bit, PixelData=pixels)
    assert "cannot be decoded" in reason(data) or "damaged" in reason(data)


@given(st.sampled_from(["MR_small.dcm", "MR_small_RLE.dcm", "SC_rgb_small_odd_jpeg.dcm", "examples_overlay.dcm"]),
       st.lists(st.tuples(st.integers(132, 2000), st.integers(0, 255)), max_size=6), st.integers(0, 100))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_pixels_or_a_reason_that_quotes_nothing(name, changes, share):
    data = bytearray((EXAMPLES / name).read_bytes())
    for place, value in changes:
        data[place] = value
    data = data[: len(data) * share // 100] if share > 20 else data
    try:
        assert decode(bytes(data)).shape[0] == 3
    except UnreadableImage as error:
        assert "CompressedSamples" not in str(error) and "Lestrade" not in str(error)  # patients in those files


def test_threads_decode_what_one_thread_decodes_and_no_warning_escapes():
    files = [(EXAMPLES / name).read_bytes() for name in ("MR_small.dcm", "SC_rgb_rle.dcm", "JPEG2000.dcm")]
    expected = [decode(data) for data in files]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        for number, found in enumerate(pool.map(decode, files * 5)):
            assert (found == expected[number % 3]).all()


# -- a whole extraction


@pytest.mark.integration
def test_frames_extracted_and_found_again_by_name(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 20)).astype(np.uint8)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.dcm").write_bytes(dicom_bytes(frames, RLELossless, PixelData=rle(frames)))
    (tmp_path / "d" / "b.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"junk" * 9)
    result = featurecache.extract(tmp_path / "d", cache=tmp_path / "cache", outputs="cls", **TINY)
    view = featurecache.open_view(result.view)
    assert view.ids == ["a.dcm#frame=0", "a.dcm#frame=1", "a.dcm#frame=2"]
    assert [failed["id"] for failed in view.failed] == ["b.dcm"]
    again = reopen(view.source)
    assert [digest(again.read(row)).encode() for row in range(3)] == view.digests.tolist()
    assert len(set(view.digests.tolist())) == 3


def rle(frames: np.ndarray) -> bytes:
    """Frames uint8 [F, H, W] as literal runs (PS3.5 annex G), encapsulated."""
    encoded = []
    for frame in frames:
        rows = b"".join(bytes([len(row) - 1]) + row.tobytes() for row in frame)
        encoded.append(np.array([1, 64, *[0] * 14], "<u4").tobytes() + rows + b"\0" * (len(rows) % 2))
    return encapsulate(encoded)
