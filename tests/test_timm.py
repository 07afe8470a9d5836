"""Backbones of timm against timm itself: its small test networks with random numbers, saved as it saves them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import image_folder, picture
from safetensors.torch import load_file, save_file
from test_backbones_found import hub, put_in_cache  # noqa: F401  (a fixture)

import featurecache
from featurecache.backbones import describe, load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    UnknownBackbone,
    WeightsDoNotFit,
    WeightsNotFound,
)
from featurecache.images.decoding import decode

timm = pytest.importorskip("timm")
SMALL_DEIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}
SMALL_SWIN = {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "img_size": 64, "window_size": 4}


def network(name: str, seed: int = 0, **arguments: Any) -> Any:
    """timm's own, with wide random numbers, so that norms, biases and statistics matter."""
    made = timm.create_model(name, **arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, value in made.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand if key.endswith("running_var") else torch.randn
            value += 0.2 * noise(value.shape, generator=generator)
    return made


def save(folder: Path, made: Any, **arguments: Any) -> Path:
    timm.models.save_for_hf(made, folder, model_args=arguments or None, safe_serialization=True)
    return folder


def pixels(backbone: Backbone, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def given(backbone: Backbone, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
    found = backbone.forward(x, set(names))
    return [found[name] for name in names]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within float32's rounding of the largest number."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


# what is kept


@pytest.mark.parametrize(
    ("name", "prefix", "vector"), [("test_vit", ("cls",), "cls"), ("test_vit2", ("reg0",), "pooler")]
)
def test_tokens_and_vector_of_a_vit_are_those_of_timm(tmp_path, name, prefix, vector):
    real = network(name)
    backbone = load_backbone(str(save(tmp_path / "vit", real)))
    assert (backbone.prefix, len(backbone.prefix), backbone.grid) == (prefix, real.num_prefix_tokens, (10, 10))
    x = pixels(backbone)
    features = real.forward_features(x)
    (tokens,) = given(backbone, x, "tokens")
    assert torch.equal(tokens, features) and backbone.vector == vector
    kept = tokens[:, 0] if vector == "cls" else given(backbone, x, "pooler")[0]
    assert near(real.get_classifier()(kept), real(x))


def test_a_distilled_vit_has_two_tokens_before_the_patches_and_their_mean_as_its_vector(tmp_path):
    real = network("deit_tiny_distilled_patch16_224", **SMALL_DEIT)
    backbone = load_backbone(str(save(tmp_path / "deit", real, **SMALL_DEIT)), image_size=64)
    tokens, pooler = given(backbone, pixels(backbone), "tokens", "pooler")
    assert (backbone.prefix, backbone.grid, backbone.vector) == (("cls", "dist"), (4, 4), "pooler")
    assert torch.allclose(pooler, tokens[:, :2].mean(1), atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_coatnet"])
def test_the_vector_of_a_cnn_gives_the_networks_own_logits(tmp_path, name):
    real = network(name)
    backbone = load_backbone(str(save(tmp_path / "cnn", real)))
    x = pixels(backbone, 1)
    tokens, gap = given(backbone, x.contiguous(memory_format=torch.channels_last), "tokens", "gap")
    assert near(real.get_classifier()(gap), real(x))
    assert near(tokens, real.forward_features(x).flatten(2).transpose(1, 2))
    assert "cls" in backbone.refused and backbone.vector == "gap" and backbone.channels_last


def test_a_swins_map_has_its_channels_last_and_is_read_row_by_row(tmp_path):
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in SMALL_SWIN.items()}
    real = network("swin_tiny_patch4_window7_224", **arguments)
    backbone = load_backbone(str(save(tmp_path / "swin", real, **SMALL_SWIN)), image_size=64)
    x = pixels(backbone)
    tokens, gap = given(backbone, x, "tokens", "gap")
    assert backbone.grid == (8, 8) and torch.equal(tokens[:, 9], real.forward_features(x)[:, 1, 1])
    assert near(real.get_classifier()(gap), real(x)) and not backbone.channels_last


def test_a_vector_wider_than_the_map_is_kept_and_the_map_refused():
    backbone = load_backbone("timm:mobilenetv3_small_050", random_weights=True)
    (gap,) = given(backbone, pixels(backbone, 1), "gap")
    assert gap.shape == (1, backbone.width) == (1, 1024)
    with pytest.raises(OutputRefused, match="map has 288 channels, and the vector that its classifier receives 1,024"):
        backbone.offers("tokens")


def test_earlier_blocks_are_timms_with_the_final_norm(tmp_path):
    real = network("test_vit")
    backbone = load_backbone(str(save(tmp_path / "vit", real)))
    x, seen = pixels(backbone), {}
    real.blocks[4].register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    (patches, begin), *_ = real.forward_intermediates(
        x, [4], True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    tokens, earlier = given(backbone, x, "tokens", "tokens@-2")
    assert backbone.layers == 6 and torch.equal(tokens, real.forward_features(x))
    assert torch.equal(earlier, real.norm(seen["block"])) and torch.equal(earlier, torch.cat([begin, patches], 1))


def test_a_class_token_that_the_classifier_receives_is_no_pooler_too():
    with pytest.raises(OutputRefused, match=r"what its classifier receives is cls"):
        load_backbone("timm:test_vit", random_weights=True).offers("pooler")


@pytest.mark.slow
def test_a_network_that_gives_a_list_is_refused_by_name():
    with pytest.raises(OutputRefused, match=r"timm:crossvit_9_240.* gives a list; expected tokens \[B,T,D\] or a map"):
        describe("timm:crossvit_9_240")


# what it sees


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_pct": 0.95, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)},
    ],
)
def test_the_data_config_of_the_weights_is_what_timms_transform_does(tmp_path, change):
    folder = save(tmp_path / "net", network("test_resnet"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(str(folder))
    settings = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    real = timm.data.create_transform(**settings)
    for width, height in ((53, 37), (301, 177), (90, 400)):
        image = picture(width, width, height)
        array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        made = backbone.preprocess.normalised(backbone.preprocess.resized(array.contiguous())[None])[0]
        assert torch.allclose(made, real(image), atol=1e-6, rtol=0)


def test_a_transform_that_does_something_else_is_noticed(monkeypatch):
    plain = timm.data.create_transform
    monkeypatch.setattr(timm.data, "create_transform", lambda **k: plain(**k | {"interpolation": "nearest"}))
    with pytest.raises(PreprocessingRefused, match=r"timm:test_resnet.* cannot be reproduced"):
        describe("timm:test_resnet")


def test_a_border_of_the_mean_is_refused(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"crop_mode": "center"', '"crop_mode": "border"'))
    with pytest.raises(PreprocessingRefused, match="'border'"):
        load_backbone(str(folder))


def test_another_image_size_is_timms_own_network_and_transform_for_it(tmp_path):
    real = network("test_vit")
    folder = save(tmp_path / "vit", real)
    backbone = load_backbone(str(folder), image_size=192)
    larger = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "model.safetensors")}, img_size=192
    ).eval()
    x = pixels(backbone)
    assert (backbone.grid, backbone.position_embeddings) == ((12, 12), "interpolated (as timm does)")
    assert torch.equal(given(backbone, x, "tokens")[0], larger.forward_features(x))
    assert backbone.weights == load_backbone(str(folder)).weights
    with pytest.raises(BadOption, match="--image-size 190 is not a multiple of the patch of 16 pixels; try 176 or 192"):
        load_backbone(str(folder), image_size=190)


# weights


def as_file(path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, path)
    return path


WRAPPED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "behind module.": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "behind a name": lambda state: {"net.encoder." + key: value for key, value in state.items()},
    "without classifier": lambda state: {key: value for key, value in state.items() if not key.startswith("head.")},
    "of seven classes": lambda state: state | {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_checkpoint_of_ones_own_is_read_as_training_scripts_write_it(tmp_path, how):
    real = network("test_vit")
    file = as_file(tmp_path / "best.pt", WRAPPED[how](real.state_dict()))
    backbone = load_backbone("timm:test_vit", weights=str(file))
    x = pixels(backbone)
    assert torch.equal(given(backbone, x, "tokens")[0], real.forward_features(x))
    assert backbone.weights == load_backbone(str(save(tmp_path / "vit", real))).weights


def test_a_name_the_hubs_cache_a_folder_and_a_file_are_one_key(tmp_path, hub):  # noqa: F811
    folder = save(tmp_path / "net", network("test_resnet"))
    put_in_cache(hub, folder, "timm/test_resnet.r160_in1k")
    names = ["timm:test_resnet", "timm:test_resnet.r160_in1k@main", "hf:timm/test_resnet.r160_in1k", f"hf:{folder}"]
    found = [load_backbone(name) for name in [*names, f"timm:{folder}"]]
    found.append(load_backbone("timm:test_resnet", weights=str(folder / "model.safetensors")))
    keys = {json.dumps([b.architecture, b.weights, b.preprocess.to_dict()]) for b in found}
    assert len(keys) == 1 and found[0].provenance["revision"] == found[1].provenance["revision"] != ""
    again = load_backbone(**found[0].provenance["request"])
    assert again.weights == found[0].weights and again.name == "test_resnet.r160_in1k"


def test_without_hub_and_weights_the_ways_out_are_said(hub):  # noqa: F811
    with pytest.raises(WeightsNotFound, match=r"--weights FOLDER .*--random-weights"):
        load_backbone("timm:test_vit")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {key: value for key, value in state.items() if key != "norm.weight"}, "norm.weight"),
        (lambda state: state | {"more": torch.zeros(1)}, "more"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 197, 64)}, "images of another size .* --image-size"),
        (lambda state: {"other." + key: torch.zeros(3) for key in "abc"}, "are not of timm's test_vit"),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, change, says):
    file = as_file(tmp_path / "w.pt", change(network("test_vit").state_dict()))
    with pytest.raises(WeightsDoNotFit, match=says):
        load_backbone("timm:test_vit", weights=str(file))


def test_code_in_weights_is_not_run_and_settings_lead_nowhere(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"checkpoint_path": "/nowhere", "pretrained": True, "cache_dir": str(tmp_path / "x")}
    config["pretrained_cfg"] |= {"file": "/nowhere", "url": "http://127.0.0.1:9/x.pth", "custom_load": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_backbone(str(folder)).architecture["config"] == {}
    (folder / "model.safetensors").unlink()
    torch.save({"a": os.getcwd}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsDoNotFit, match="code in files is never run"):
        load_backbone(str(folder))


def test_untrained_weights_are_those_of_the_seed_and_need_no_hub():
    first, second, third = (load_backbone("timm:test_vit", random_weights=True, seed=seed) for seed in (1, 1, 2))
    x = pixels(first)
    a, b, c = (given(each, x, "tokens")[0] for each in (first, second, third))
    assert torch.equal(a, b) and not torch.equal(a, c) and first.weights == {"random_seed": 1}


# names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_base_patch16_22", 'timm has no model "vit_base_patch16_22". Near: vit_base_patch16_224'),
        ("timm:test_vit.nonsense", 'timm has no weights "nonsense" of test_vit; there are r160_in1k'),
        ("timm:./nowhere", 'there is no folder "./nowhere"; expected one with a config.json as timm writes it'),
    ],
)
def test_names_that_are_nearly_right_are_answered(name, says):
    with pytest.raises(UnknownBackbone, match=re.escape(says)):
        load_backbone(name)


def test_weights_of_another_architecture_are_named(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    with pytest.raises(WeightsDoNotFit, match="are of timm's test_resnet, not of test_vit"):
        load_backbone("timm:test_vit", weights=str(folder))
    (folder / "config.json").write_text('{"architecture": "resnet5000", "pretrained_cfg": {}}')
    with pytest.raises(UnknownBackbone, match="'resnet5000', which this timm does not have"):
        load_backbone(str(folder))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[timm\]'") as error:
        describe("timm-vit-base")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_images_go_through_it_into_a_view_that_computes_the_same_again(tmp_path):
    folder, data = save(tmp_path / "vit", network("test_vit")), image_folder(tmp_path / "data", 6)
    result = featurecache.extract(
        data, backbone=str(folder), outputs="cls,mean,tokens@-2", cache=tmp_path / "c", workers=1
    )
    view = featurecache.open_view(result.view)
    real, backbone = timm.create_model("test_vit").eval(), load_backbone(str(folder))
    real.load_state_dict(load_file(folder / "model.safetensors"))
    image = backbone.preprocess.resized(decode((data / view.ids[2]).read_bytes()))
    with torch.no_grad():
        expected = real.forward_features(backbone.preprocess.normalised(image[None]))
    assert torch.allclose(view.tensor("cls", [2]).float(), expected[:, 0], rtol=2e-3, atol=2e-3)
    images = [(data / name).read_bytes() for name in view.ids]
    rows, _ = featurecache.compute(images, like=view, output="cls")
    assert torch.equal(rows, view.tensor("cls"))
    assert view.provenance["parameters"] == backbone.parameters == sum(p.numel() for p in real.parameters()) - 65_000


def test_a_safetensors_file_of_part_of_a_network_says_what_is_missing(tmp_path):
    state = {key: value.clone() for key, value in network("test_vit").state_dict().items() if "blocks.5" not in key}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsDoNotFit, match=r"Missing key\(s\).*blocks.5"):
        load_backbone("timm:test_vit", weights=str(tmp_path / "part.safetensors"))
