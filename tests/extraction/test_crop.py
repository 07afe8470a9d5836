"""``--crop``: a rectangle of every image before all else, in the key, said, and the same wherever images are seen."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import call

import featurecache
import heads
from featurecache.errors import BadOption, UnreadableImage
from featurecache.images.augmentation import parse_augmentation
from featurecache.images.decoding import decode, digest
from featurecache.images.headers import RawImage
from featurecache.sources import open_source, reopen
from heads.explanations.explainer import visible_box
from heads.runs.run import pixels_of

CROP = (0.1, 0.25, 0.85, 1.0)


@pytest.fixture
def photos(tmp_path):
    """Twenty images of odd sizes in two classes, and beside them the same cropped by Pillow."""
    for number in range(20):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (37 + number, 53, 3), dtype=np.uint8))
        width, height = image.size
        box = tuple(edge * side for edge, side in zip(CROP, (width, height) * 2, strict=True))
        for folder, each in (("whole", image), ("cut", image.crop(box))):
            (tmp_path / folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            each.save(tmp_path / folder / "ab"[number % 2] / f"{number}.png")
    return tmp_path


def encoded(array, **options):
    data = io.BytesIO()
    Image.fromarray(array).save(data, **options)
    return data.getvalue()


def test_features_are_those_of_images_that_pillow_cropped_under_another_key(photos, vit):
    options = {"backbone": vit, "cache": photos / "c", "outputs": "cls", "dtype": "float32", "precision": "fp32"}
    cropped, cut, whole = (
        featurecache.open_view(featurecache.extract(photos / folder, name=name, **options, **more).view)
        for folder, name, more in (("whole", "x", {"crop": CROP}), ("cut", "y", {}), ("whole", "z", {}))
    )
    torch.testing.assert_close(cropped.tensor("cls"), cut.tensor("cls"), atol=1e-5, rtol=0)
    assert cropped.fingerprint != whole.fingerprint and cropped.spec["preprocess"]["region"] == list(CROP)
    assert (np.asarray(cropped.digests) == np.asarray(whole.digests)).all()  # an image is what it was
    assert "--crop 0.1,0.25,0.85,1" in cropped.extract_command("tokens")
    (row,), failed = featurecache.compute([(photos / "whole/a/0.png").read_bytes()], like=cropped, output="cls")
    assert not failed and torch.allclose(row, cropped.tensor("cls", [0])[0], atol=1e-5)
    again = reopen(cropped.source)
    assert decode(again.read(0)).shape == decode((photos / "cut/a/0.png").read_bytes()).shape


def test_copies_are_augmented_within_the_crop(photos):
    steps = parse_augmentation("rotate10,shift0.2")
    whole, cut = (open_source(photos / folder, crop=crop) for folder, crop in (("whole", CROP), ("cut", None)))
    for row in range(4):
        assert (steps.copy_of(whole.read(row), b"0" * 32) == steps.copy_of(cut.read(row), b"0" * 32)).all()


def test_it_is_of_the_upright_image_and_of_deep_samples_and_no_other_image():
    array = np.arange(80, dtype=np.uint8).reshape(8, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(array, format="PNG", exif=exif)
    upright = decode(turned)
    assert upright.shape == (3, 10, 8)
    half = RawImage(turned, crop=(0, 0, 0.5, 1))
    assert torch.equal(decode(half), upright[:, :, :4]) and digest(half) == digest(turned)
    deep = encoded(np.full((4, 4), 4095, np.uint16), format="PNG")
    assert decode(RawImage(deep, 12, (0, 0, 1, 0.5))).shape == (3, 2, 4)
    assert int(decode(RawImage(deep, 12, (0, 0, 1, 0.5))).min()) == 255
    with pytest.raises(UnreadableImage, match="4×4 pixels, of which --crop leaves none"):
        decode(RawImage(deep, None, (0.4, 0, 0.45, 1)))


@pytest.mark.integration
def test_networks_from_pixels_and_maps_see_the_same_rectangle(photos, monkeypatch):
    monkeypatch.chdir(photos)
    whole, cut = open_source(photos / "whole", crop=CROP), open_source(photos / "cut")
    options = {"epochs": 1, "image_size": 8, "device": "cpu", "report": False, "batch_size": 4}
    lines: list[str] = []
    run = heads.train_baseline(whole, "cnn-cifar", out=photos / "run", say=lines.append, **options)
    other = heads.train_baseline(cut, "cnn-cifar", out=photos / "other", **options)
    assert "crop       of every image 10 % to 85 % of its width and 25 % to 100 % of its height" in "\n".join(lines)
    assert (run.path / "head.safetensors").read_bytes() == (other.path / "head.safetensors").read_bytes()
    paths = [photos / "whole/a/0.png", photos / "cut/a/0.png"]
    (mine,), (theirs,) = heads.predict(run, [paths[0]]), heads.predict(other, [paths[1]])
    assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)
    given = pixels_of(run, str(photos / "whole"))  # other images are cropped as those that it was trained on
    assert torch.equal(given.tensor(run.output), pixels_of(other).tensor(run.output))
    assert visible_box(run.config["spec"], np.zeros((10, 20, 3))) == (0, 0, 1, 1)


@pytest.mark.parametrize("crop", [(0.1, 0.1, 0.1, 0.1), (0, 0, 1), (0, 0, 1.2, 1), (0.9, 0, 0.1, 1)])
def test_edges_that_are_none_are_refused_with_some_that_are(crop, photos):
    with pytest.raises(BadOption, match=r"the left, top, right and bottom edge.*0\.1,0\.05,0\.9,0\.95"):
        open_source(photos / "whole", crop=crop)


@pytest.mark.integration
def test_a_crop_is_said_before_and_after_and_why_names_it(photos):
    asked = ("--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--cache", photos / "c")
    told = call("extract", "--data", photos / "whole", "--crop", "0,0,0.5,1", *asked)
    line = "of every image 0 % to 50 % of its width and 0 % to 100 % of its height, before it is resized"
    assert told.exit_code == 0 and line in told.output
    assert line in call("info", "vit-demo/whole", "--cache", photos / "c").output
    assert "region  0 0 0.5 1 → —" in call("why", *asked).output
    assert call("extract", "--data", photos / "whole", "--crop", "left", *asked).exit_code == 2
