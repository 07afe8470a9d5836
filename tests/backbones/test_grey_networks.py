"""Networks of grey images are fed one channel as their own libraries feed it, or refused where nobody can know how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import checkpoints as save
from support.backbone_checks import assert_same, edit_json, fed, key, outputs, refuses
from support.image_models import image_model_types, tiny_config
from support.user_nets import CNN, SAYS
from torchvision import transforms

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.processors import from_processor, probe
from featurecache.errors import BadOption, PreprocessingRefused, WeightsDoNotFit
from featurecache.images.decoding import decode
from heads.models.finetune import processor_of

PICTURE = Image.fromarray(probe(61, 83))  # in colour
GREY = {"image_mean": [0.3], "image_std": [0.2]}


def test_grey_of_a_picture_in_colour_is_pillows_to_the_bit_and_a_grey_one_stays():
    colours = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    processor = transformers.BitImageProcessor(do_resize=False, do_convert_rgb=False, crop_size=200, **GREY)
    preprocess = from_processor(processor, 1)
    for picture in (Image.fromarray(colours), Image.fromarray(colours[..., 0])):
        seen = preprocess.resized(decode(np.asarray(picture.convert("RGB"))))
        expected = np.asarray(picture.convert("L"))[50:250, 100:300]
        np.testing.assert_array_equal(seen, np.broadcast_to(expected, (3, 200, 200)))


def clip_of_grey(folder):
    save.save_clip_vision(folder, num_channels=1)
    return edit_json(folder / "preprocessor_config.json", do_convert_rgb=False, **GREY)


def measured(kind):
    def save_measured(folder):
        config = tiny_config(kind, image_model_types()[kind])
        config.num_channels = 1
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}, do_normalize=False).save_pretrained(folder)
        return folder

    return save_measured


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: edit_json(save.save_vit(folder, num_channels=1) / "preprocessor_config.json", **GREY),
        lambda folder: edit_json(save.save_resnet(folder, num_channels=1) / "preprocessor_config.json", **GREY),
        clip_of_grey,
        measured("dinov3_vit"),
        measured("regnet"),
    ],
    ids=["vit", "resnet", "clip", "dinov3", "regnet, only rescaled"],
)
def test_a_grey_network_of_transformers_sees_what_its_processor_makes_of_a_grey_image(write, tmp_path):
    folder = write(tmp_path / "m")
    backbone, model = load_backbone(str(folder)), transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    real = processor(images=PICTURE.convert("L"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(fed(backbone, PICTURE), real, atol=1e-6, rtol=0)
    with torch.no_grad():
        hidden = getattr(model, "vision_model", model)(real).last_hidden_state
    tokens = outputs(backbone, fed(backbone, PICTURE), "tokens")[0]
    assert_same(tokens, hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden)
    assert "grey" in describe_backbone(str(folder))["sees"]


class OnePicture(torch.utils.data.Dataset):
    """As timm's ImageDataset with ``input_img_mode="L"``; its loader says how to transform."""

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return self.transform(PICTURE.convert("L")), 0


@pytest.mark.parametrize("means", [(0.25,), (0.4, 0.5, 0.6)], ids=["its own mean", "three of RGB, as old timms save"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_grey_network_of_timm_sees_what_timms_own_loader_gives_it(name, means, tmp_path):
    timm = pytest.importorskip("timm")
    from timm.data import create_loader, resolve_data_config

    torch.manual_seed(0)
    made = timm.create_model(name, in_chans=1).eval()
    settings = {**made.pretrained_cfg, "mean": means, "std": means, "input_size": (1, 64, 64)}
    settings = {key: settings[key] for key in ("mean", "std", "input_size", "crop_pct", "interpolation", "classifier")}
    timm.models.save_for_hf(made, tmp_path / "m", safe_serialization=True)
    edit_json(tmp_path / "m" / "config.json", pretrained_cfg=settings, model_args={"in_chans": 1, "img_size": [64, 64]}
              if name == "test_vit" else {"in_chans": 1})  # fmt: skip
    feeding = resolve_data_config(pretrained_cfg=settings)
    ((real, _),) = create_loader(OnePicture(), batch_size=1, num_workers=0, device=torch.device("cpu"), **feeding)
    backbone = load_backbone(str(tmp_path / "m"))
    assert torch.allclose(fed(backbone, PICTURE), real, atol=2e-6, rtol=0)
    network = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    features = network.forward_features(real).detach()
    tokens = outputs(backbone, real, "tokens")[0]
    assert_same(tokens, features if name == "test_vit" else features.flatten(2).transpose(1, 2))
    assert backbone.preprocess.mean == pytest.approx((sum(means) / len(means),))


def test_a_grey_network_of_ones_own_sees_torchvisions_transforms_of_a_grey_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says = SAYS.replace("[0.4, 0.5, 0.6]", "[0.4]").replace("[0.2, 0.3, 0.2]", "[0.2]")
    (tmp_path / "nets.py").write_text(CNN.replace("nn.Conv2d(3, 8", "nn.Conv2d(1, 8").replace(SAYS, says))
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(0.4, 0.2)]
    backbone = load_backbone("python:nets:make", random_weights=True)
    assert torch.equal(fed(backbone, PICTURE)[0], transforms.Compose(steps)(PICTURE.convert("L")))
    assert outputs(backbone, fed(backbone, PICTURE), "gap")[0].shape == (1, 12)
    (tmp_path / "nets.py").write_text((tmp_path / "nets.py").read_text().replace(says, SAYS))
    refuses(BadOption, "takes grey images: give network.preprocess one number", "python:nets:make", random_weights=True)


def test_the_spec_says_grey_and_a_fine_tuned_copy_is_saved_with_it(tmp_path):
    folder = edit_json(save.save_vit(tmp_path / "m", num_channels=1) / "preprocessor_config.json", **GREY)
    backbone = load_backbone(str(folder))
    spec = backbone.preprocess.to_dict()
    assert spec["mean"] == [0.3] and type(backbone.preprocess).from_dict(spec) == backbone.preprocess
    assert backbone.preprocess.line() == "32×32 squashed, bilinear, grey, mean 0.3, std 0.2"
    assert from_processor(processor_of(backbone.preprocess), 1) == backbone.preprocess
    assert all(row["shape"] for row in describe_backbone(str(folder))["modules"] if row["parameters"])
    assert key(backbone) != key(load_backbone(str(edit_json(folder / "preprocessor_config.json", image_mean=[0.31]))))


@pytest.mark.parametrize(
    ("config", "processor", "error", "says"),
    [
        ({"num_channels": 1}, {}, PreprocessingRefused, "of 3 channels; expected the one of the grey images"),
        ({"num_channels": 1}, {**GREY, "do_convert_rgb": True}, PreprocessingRefused, '"do_convert_rgb": false'),
        ({"num_channels": 4}, {}, WeightsDoNotFit, "images of 4 channels; expected 3, RGB, or 1, grey"),
    ],
)
def test_how_a_network_of_transformers_was_fed_is_never_guessed(config, processor, error, says, tmp_path):
    folder = save.save_vit(tmp_path, **config)
    refuses(error, says, edit_json(folder / "preprocessor_config.json", **processor))


def test_how_a_network_of_timm_was_fed_is_never_guessed(tmp_path):
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(timm.create_model("test_resnet", in_chans=1), tmp_path, safe_serialization=True)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "rgb.pth")
    refuses(WeightsDoNotFit, r"images of 3 channels, expected the 1 of grey", tmp_path, weights=tmp_path / "rgb.pth")
    refuses(BadOption, "images of 2 channels", edit_json(tmp_path / "config.json", model_args={"in_chans": 2}))
    refuses(WeightsDoNotFit, "input_size of", edit_json(tmp_path / "config.json", model_args={"in_chans": "grey"}))
