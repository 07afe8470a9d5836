"""The record of resize, crop and normalise: what is none is refused when it is built, also where a file holds it."""

from __future__ import annotations

import math

import pytest

from featurecache.errors import PreprocessingRefused
from featurecache.images.preprocessing import Preprocess

SQUASH = {
    "mode": "squash", "resize": [8, 8], "crop": None, "kernel": "torchvision", "interpolation": "bilinear",
    "antialias": True, "crop_rounding": "down", "scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3,
    "arithmetic": "fused",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "stretch"}, '"stretch" is not one of'),
        ({"interpolation": "magic"}, "is not one we can do"),
        ({"kernel": "magic"}, "is not one we can do"),
        ({"arithmetic": "magic"}, "not an arithmetic we know"),
        ({"crop_rounding": "magic"}, "not an arithmetic we know"),
        ({"resize": [8]}, "do not go with resizing"),
        ({"resize": [8, 0]}, "do not go with resizing"),
        ({"crop": [0, 0]}, "do not go with resizing"),
        ({"mode": "shortest", "resize": [8]}, "neither squashes nor crops"),
        ({"mean": [math.nan, 0.5, 0.5]}, "not three numbers each"),
        ({"mean": [0.5, 0.5], "std": [0.5, 0.5]}, "not three numbers each"),
        ({"mean": [0.5] * 4, "std": [0.5] * 2}, "do not normalise the channels"),
        ({"std": [0.5, 0.5, 0.0]}, "do not normalise the channels"),
        ({"std": None}, "not three numbers each"),
        ({"scale": 0.0}, "leaves nothing of an image"),
    ],
)
def test_a_record_that_fits_no_network_is_refused(change, says):
    assert Preprocess.from_dict(SQUASH).to_dict() == SQUASH
    with pytest.raises(PreprocessingRefused, match=says):
        Preprocess.from_dict({**SQUASH, **change})
