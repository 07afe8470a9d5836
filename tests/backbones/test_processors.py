"""Pixels equal those of the library's own processor, or the processor is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

from featurecache.backbones.processors import (
    check_preprocess,
    check_processor,
    default_processor,
    from_processor,
    from_transforms,
    probe,
)
from featurecache.errors import BadOption, PreprocessingRefused
from featurecache.images.preprocessing import Preprocess

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "vit": lambda: transformers.ViTImageProcessor(size={"height": 48, "width": 48}),
    "vit, not square": lambda: transformers.ViTImageProcessor(size={"height": 33, "width": 47}),
    "vit, legacy size": lambda: transformers.ViTImageProcessor(size=40),
    "vit, nearest": lambda: transformers.ViTImageProcessor(size=40, resample=0),
    "vit, only rescaled": lambda: transformers.ViTImageProcessor(size=40, do_normalize=False),
    "vit, not rescaled": lambda: transformers.ViTImageProcessor(size=40, do_rescale=False),
    "deit": lambda: transformers.DeiTImageProcessor(size=50, crop_size=44, **IMAGENET),
    "clip": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=40),
    "dinov2": lambda: transformers.BitImageProcessor(size={"shortest_edge": 50}, crop_size=42, **IMAGENET),
    "crop wider than the image": lambda: transformers.BitImageProcessor(size={"shortest_edge": 30}, crop_size=43),
    "crop without resizing": lambda: transformers.BitImageProcessor(do_resize=False, crop_size=45),
    "beit": lambda: transformers.BeitImageProcessor(size=40, resample=2),
    "siglip": lambda: transformers.SiglipImageProcessor(size={"height": 48, "width": 48}),
    "convnext below 384": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 50}, crop_pct=0.9),
    "convnext from 384 on": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
}
SHAPES = [(37, 53), (120, 41), (64, 64), (300, 211), (1, 7)]


def image(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(probe(height, width)).permute(2, 0, 1).contiguous()


def ours(preprocess: Preprocess, height: int, width: int) -> torch.Tensor:
    return preprocess.normalised(preprocess.resized(image(height, width))[None])[0]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_those_of_the_transformers_processor(name, shape):
    processor = PROCESSORS[name]()
    expected = processor(images=Image.fromarray(probe(*shape)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ours(from_processor(processor), *shape), expected)


@pytest.mark.parametrize(
    "weights",
    [
        "ResNet50_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.IMAGENET1K_V2",
        "EfficientNet_B0_Weights.IMAGENET1K_V1",
        "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
    ],
)
@pytest.mark.parametrize("shape", [(37, 53), (300, 211), (255, 256)])
def test_pixels_are_those_of_torchvisions_transforms_of_a_pil_image(weights, shape):
    transforms = models.get_weight(weights).transforms()
    assert torch.equal(ours(from_transforms(transforms), *shape), transforms(Image.fromarray(probe(*shape))))


def test_grey_batches_on_their_way_are_not_changed_in_place():
    preprocess = from_processor(PROCESSORS["vit"]())
    batch = torch.full((2, 3, 48, 48), 200, dtype=torch.uint8)
    assert torch.equal(preprocess.normalised(batch), preprocess.normalised(batch))
    assert batch.unique().tolist() == [200]


def test_an_image_of_the_right_size_is_not_resampled():
    picture = image(48, 48)
    assert torch.equal(from_processor(PROCESSORS["vit"]()).resized(picture), picture)


def test_squash_shows_the_whole_image_to_a_processor_that_crops():
    squashed = from_processor(PROCESSORS["dinov2"]()).fitted("squash")
    expected = v2.functional.resize(image(30, 90), [42, 42], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(squashed.resized(image(30, 90)), expected)


def test_pad_keeps_proportions_and_fills_with_black_on_both_sides():
    pad = from_processor(PROCESSORS["vit"]()).fitted("pad")
    wide = pad.resized(torch.full((3, 20, 80), 255, dtype=torch.uint8))
    assert wide.shape == (3, 48, 48)
    assert (wide[0].float().mean(1) == 255).nonzero().flatten().tolist() == list(range(18, 30))
    assert wide[:, [*range(18), *range(30, 48)]].max() == 0
    line = pad.resized(torch.full((3, 1, 900), 255, dtype=torch.uint8))
    assert (line[0, :, 0] == 255).sum() == 1


def test_model_fit_changes_nothing_and_an_unknown_one_is_named():
    preprocess = from_processor(PROCESSORS["clip"]())
    assert preprocess.fitted("model") == preprocess
    with pytest.raises(BadOption, match=r"stretch.*model, squash, pad"):
        preprocess.fitted("stretch")


def test_image_size_scales_resize_and_crop_in_their_ratio():
    scaled = from_transforms(models.get_weight("ResNet50_Weights.IMAGENET1K_V2").transforms()).scaled(448)
    assert (scaled.resize, scaled.crop, scaled.size) == ((464,), (448, 448), (448, 448))
    assert from_processor(PROCESSORS["vit"]()).scaled(64, 16).resize == (64, 64)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("vit", 250, r"250 is not a multiple of the patch of 16 pixels; try 240 or 256"),
        ("vit", 7, r"try 16$"),
        ("vit, not square", 64, r"33×47"),
    ],
)
def test_an_image_size_that_cannot_be_is_refused_with_those_that_can(name, size, says):
    with pytest.raises(BadOption, match=says):
        from_processor(PROCESSORS[name]()).scaled(size, 16)


def test_a_processor_with_rules_of_its_own_is_refused_by_name():
    processor = transformers.LevitImageProcessor()
    with pytest.raises(PreprocessingRefused, match=r"levit cannot be reproduced: a 37×53 image differs by"):
        check_processor(from_processor(processor), processor, "levit")


def test_a_processor_that_differs_by_one_step_of_grey_or_in_size_is_refused():
    processor = PROCESSORS["vit"]()
    preprocess = from_processor(processor)

    def brighter(picture: Image.Image) -> torch.Tensor:
        array = np.minimum(np.asarray(picture).astype(int) + 1, 255).astype(np.uint8)
        return processor(images=Image.fromarray(array), return_tensors="pt")["pixel_values"][0]

    with pytest.raises(PreprocessingRefused):
        check_preprocess(preprocess, brighter, "brighter")
    with pytest.raises(PreprocessingRefused, match=r"inf"):
        check_processor(preprocess.scaled(32), processor, "smaller")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": {"longest_edge": 40}}, r"resizes by \['longest_edge'\]"),
        ({"size": {"shortest_edge": 30, "longest_edge": 40}}, r"resizes by"),
        ({"size": {"max_height": 30, "max_width": 40}}, r"resizes by"),
        ({"do_resize": False}, r"different sizes"),
        ({"do_center_crop": True, "crop_size": {"height": 0, "width": 0}}, r"do not go with resizing"),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"1 channels"),
    ],
)
def test_settings_that_fit_no_network_are_refused(settings, says):
    with pytest.raises(PreprocessingRefused, match=says):
        from_processor(transformers.ViTImageProcessor(**settings))


def test_transforms_for_video_are_refused():
    with pytest.raises(PreprocessingRefused, match=r"VideoClassification"):
        from_transforms(models.get_weight("R3D_18_Weights.DEFAULT").transforms())


@pytest.mark.parametrize(
    "kind", ["ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "ConvNextImageProcessor"]
)
def test_the_default_processor_of_a_model_type_is_scaled_to_the_model(kind):
    assert from_processor(default_processor(kind, 64)).size == (64, 64)


def test_one_line_for_people():
    assert from_processor(transformers.ViTImageProcessor()).line() == "224×224 squashed, bilinear, mean 0.5, std 0.5"
    assert from_processor(PROCESSORS["dinov2"]()).line() == (
        "42×42 from the centre, shortest edge resized to 50, bicubic, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )


sizes = st.tuples(st.integers(1, 900), st.integers(1, 900))
three = st.tuples(*[st.floats(0.01, 2.0)] * 3)


@settings(deadline=None)
@given(
    sizes,
    st.none() | sizes,
    st.none() | three,
    st.sampled_from(["bilinear", "bicubic"]),
    st.none() | st.floats(1e-3, 1),
)
def test_settings_come_back_from_json_as_they_were(resize, crop, norm, interpolation, scale):
    preprocess = Preprocess(
        "squash", resize, crop, "torchvision", interpolation, True, "down", scale, norm, norm, "fused"
    )
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
