"""Small DICOM files the tests make; without pydicom the tests that import this are skipped."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", minversion="3")
RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6)


def dicom_bytes(pixels: np.ndarray, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file of pixels [H, W], [F, H, W] or, with SamplesPerPixel=3, [H, W, 3]."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4"
    colour = elements.get("SamplesPerPixel") == 3
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.size:
        order = ">" if syntax == pydicom.uid.ExplicitVRBigEndian else "<"  # pydicom swaps no pixels
        ds.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
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
