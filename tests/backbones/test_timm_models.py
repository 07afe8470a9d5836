"""Backbones of timm against timm itself: its small test networks with random numbers, saved as it saves them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.backbone_checks import as_rows, assert_same, edit_json, key, outputs, refuses
from support.pictures import image_folder, picture
from support.small_hub import put_in_cache
from torchvision import transforms as T

import featurecache
from featurecache.backbones import describe_backbone, load_backbone
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
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand if name.endswith("running_var") else torch.randn
            value += 0.2 * noise(value.shape, generator=generator)
    return made


def save(folder: Path, made: Any, **arguments: Any) -> Path:
    timm.models.save_for_hf(made, folder, model_args=arguments or None, safe_serialization=True)
    return folder


def both(
    folder: Path, name: str, image_size: int | None = None, **arguments: Any
) -> tuple[Any, Backbone, torch.Tensor]:
    """(timm's network, the backbone of what it saves, images for both). Lists in ``arguments`` are saved as such."""
    real = network(name, **{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    backbone = load_backbone(str(save(folder / name, real, **arguments)), image_size=image_size)
    return real, backbone, pixels(backbone)


def with_settings(folder: Path, **change: Any) -> Path:
    """The folder with other settings of its weights."""
    settings = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return edit_json(folder / "config.json", pretrained_cfg={**settings, **change})


def pixels(backbone: Backbone, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(5))


# what is kept


@pytest.mark.parametrize(
    ("name", "prefix", "vector"), [("test_vit", ("cls",), "cls"), ("test_vit2", ("reg0",), "pooler")]
)
def test_tokens_and_vector_of_a_vit_are_those_of_timm(tmp_path, name, prefix, vector):
    real, backbone, x = both(tmp_path, name)
    assert (backbone.prefix, len(backbone.prefix), backbone.grid) == (prefix, real.num_prefix_tokens, (10, 10))
    (tokens,) = outputs(backbone, x, "tokens")
    assert torch.equal(tokens, real.forward_features(x)) and backbone.vector == vector
    pooled = tokens[:, 0] if vector == "cls" else outputs(backbone, x, "pooler")[0]
    assert_same(real.get_classifier()(pooled), real(x))


def test_a_distilled_vit_has_two_tokens_before_the_patches_and_their_mean_as_its_vector(tmp_path):
    _, backbone, x = both(tmp_path, "deit_tiny_distilled_patch16_224", 64, **SMALL_DEIT)
    tokens, pooler = outputs(backbone, x, "tokens", "pooler")
    assert (backbone.prefix, backbone.grid, backbone.vector) == (("cls", "dist"), (4, 4), "pooler")
    assert torch.allclose(pooler, tokens[:, :2].mean(1), atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_coatnet"])
def test_the_vector_of_a_cnn_gives_the_networks_own_logits(tmp_path, name):
    real, backbone, x = both(tmp_path, name)
    tokens, gap = outputs(backbone, x.contiguous(memory_format=torch.channels_last), "tokens", "gap")
    assert_same(real.get_classifier()(gap), real(x))
    assert_same(tokens, as_rows(real.forward_features(x)))
    assert "cls" in backbone.refusals and backbone.vector == "gap" and backbone.channels_last


def test_a_swins_map_has_its_channels_last_and_is_read_row_by_row(tmp_path):
    real, backbone, x = both(tmp_path, "swin_tiny_patch4_window7_224", 64, **SMALL_SWIN)
    tokens, gap = outputs(backbone, x, "tokens", "gap")
    assert backbone.grid == (8, 8) and torch.equal(tokens[:, 9], real.forward_features(x)[:, 1, 1])
    assert_same(real.get_classifier()(gap), real(x))
    assert not backbone.channels_last


def test_a_vector_wider_than_the_map_is_kept_and_the_map_refused():
    backbone = load_backbone("timm:mobilenetv3_small_050", random_weights=True)
    (gap,) = outputs(backbone, pixels(backbone, 1), "gap")
    assert gap.shape == (1, backbone.width) == (1, 1024)
    with pytest.raises(OutputRefused, match="map has 288 channels, and the vector that its classifier receives 1,024"):
        backbone.offers("tokens")


def test_earlier_blocks_are_timms_with_the_final_norm(tmp_path):
    real, backbone, x = both(tmp_path, "test_vit")
    seen: dict[str, torch.Tensor] = {}
    real.blocks[4].register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    options = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
    (patches, begin), *_ = real.forward_intermediates(x, [4], True, **options)
    tokens, earlier = outputs(backbone, x, "tokens", "tokens@-2")
    assert backbone.layers == 6 and torch.equal(tokens, real.forward_features(x))
    assert torch.equal(earlier, real.norm(seen["block"])) and torch.equal(earlier, torch.cat([begin, patches], 1))


def test_a_class_token_that_the_classifier_receives_is_no_pooler_too():
    with pytest.raises(OutputRefused, match=r"what its classifier receives is cls"):
        load_backbone("timm:test_vit", random_weights=True).offers("pooler")


@pytest.mark.slow
def test_a_network_that_gives_a_list_is_refused_by_name():
    with pytest.raises(OutputRefused, match=r"timm:crossvit_9_240.* gives a list; expected tokens \[B,T,D\] or a map"):
        describe_backbone("timm:crossvit_9_240")


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
    folder = with_settings(save(tmp_path / "net", network("test_resnet")), **change)
    backbone = load_backbone(str(folder))
    settings = timm.data.resolve_data_config(
        pretrained_cfg=json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    )
    real = timm.data.create_transform(**settings)
    for width, height in ((53, 37), (301, 177), (90, 400)):
        image = picture(width, width, height)
        array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        made = backbone.preprocess.normalised(backbone.preprocess.resized(array.contiguous())[None])[0]
        assert torch.allclose(made, real(image), atol=1e-6, rtol=0)


CLIPS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}


def test_a_network_inside_an_open_clip_is_fed_as_its_open_clip_config_says(tmp_path):
    """BiomedCLIP: timm's network with CLIP's mean and std, which the network's own name does not know."""
    real = network("test_vit")
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in real.state_dict().items() if "head" not in name}
    torch.save({**trunk, "visual.head.proj.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}, tmp_path / "w.bin")
    refuses(
        WeightsDoNotFit, "are open_clip's.*put its open_clip_config.json", "timm:test_vit", weights=tmp_path / "w.bin"
    )
    steps = [T.Resize(160, T.InterpolationMode.BICUBIC), T.CenterCrop(160), T.ToTensor(), T.Normalize(**CLIPS)]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": CLIPS}))
    backbone, image = load_backbone("timm:test_vit", weights=str(tmp_path / "w.bin")), picture(1, 301, 177)
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    made = backbone.preprocess.normalised(backbone.preprocess.resized(array)[None])
    assert torch.allclose(made[0], T.Compose(steps)(image), atol=1e-6, rtol=0)
    assert_same(outputs(backbone, made, "tokens")[0], real.forward_features(made))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mean": 3}, "not as open_clip writes it"),
        ({**CLIPS, "size": "large"}, "not as open_clip writes it"),
        ({**CLIPS, "size": [0, 224]}, "images of 0×224 pixels"),
        ({**CLIPS, "size": 1 << 16}, "images of 65536×65536 pixels"),
        ({**CLIPS, "resize_mode": "longest"}, "resizes by longest"),
    ],
)
def test_an_open_clip_config_that_says_too_little_is_refused(settings, says, tmp_path):
    torch.save(network("test_vit").state_dict(), tmp_path / "w.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": settings}))
    refuses(WeightsDoNotFit, says, "timm:test_vit", weights=tmp_path / "w.bin")


def test_a_transform_that_does_something_else_is_noticed(monkeypatch):
    plain = timm.data.create_transform
    monkeypatch.setattr(timm.data, "create_transform", lambda **k: plain(**k | {"interpolation": "nearest"}))
    with pytest.raises(PreprocessingRefused, match=r"timm:test_resnet.* cannot be reproduced"):
        describe_backbone("timm:test_resnet")


def test_a_border_of_the_mean_is_refused(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    refuses(PreprocessingRefused, "'border'", with_settings(folder, crop_mode="border"))


def test_another_image_size_is_timms_own_network_and_transform_for_it(tmp_path):
    real = network("test_vit")
    folder = save(tmp_path / "vit", real)
    backbone = load_backbone(str(folder), image_size=192)
    larger = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "model.safetensors")}, img_size=192
    ).eval()
    x = pixels(backbone)
    assert (backbone.grid, backbone.position_embeddings) == ((12, 12), "interpolated (as timm does)")
    assert torch.equal(outputs(backbone, x, "tokens")[0], larger.forward_features(x))
    assert backbone.weights == load_backbone(str(folder)).weights
    says = "--image-size 190 is not a multiple of the patch of 16 pixels; try 176 or 192"
    refuses(BadOption, says, folder, image_size=190)


# weights


def as_file(path: Path, state: dict[str, Any]) -> str:
    torch.save(state, path)
    return str(path)


WRAPPED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "behind a name": lambda state: {"net.encoder." + key: value for key, value in state.items()},
    "without classifier": lambda state: {key: value for key, value in state.items() if not key.startswith("head.")},
    "of seven classes": lambda state: state | {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_checkpoint_of_ones_own_is_read_as_training_scripts_write_it(tmp_path, how):
    real = network("test_vit")
    file = as_file(tmp_path / "best.pt", WRAPPED[how](real.state_dict()))
    backbone = load_backbone("timm:test_vit", weights=file)
    x = pixels(backbone)
    assert torch.equal(outputs(backbone, x, "tokens")[0], real.forward_features(x))
    assert backbone.weights == load_backbone(str(save(tmp_path / "vit", real))).weights


def test_a_name_the_hubs_cache_a_folder_and_a_file_are_one_key(tmp_path, hub):
    folder = save(tmp_path / "net", network("test_resnet"))
    put_in_cache(hub, folder, "timm/test_resnet.r160_in1k")
    names = ["timm:test_resnet", "timm:test_resnet.r160_in1k@main", "hf:timm/test_resnet.r160_in1k", f"hf:{folder}"]
    backbones = [load_backbone(name) for name in [*names, f"timm:{folder}"]]
    backbones.append(load_backbone("timm:test_resnet", weights=str(folder / "model.safetensors")))
    assert len({key(backbone) for backbone in backbones}) == 1
    first, second, *_ = (backbone.provenance for backbone in backbones)
    assert first["revision"] == second["revision"] != ""
    again = load_backbone(**first["request"])
    assert again.weights == backbones[0].weights and again.name == "test_resnet.r160_in1k"


def test_without_hub_and_weights_the_ways_out_are_said(hub):
    says = r"(?s)hf download timm/test_vit\.r160_in1k .*--weights test_vit\.r160_in1k/.*--random-weights"
    refuses(WeightsNotFound, says, "timm:test_vit")


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
    refuses(WeightsDoNotFit, says, "timm:test_vit", weights=file)


def test_code_in_weights_is_not_run_and_settings_lead_nowhere(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    arguments = {"checkpoint_path": "/nowhere", "pretrained": True, "cache_dir": str(tmp_path / "x")}
    edit_json(folder / "config.json", model_args=arguments)
    with_settings(folder, file="/nowhere", url="http://127.0.0.1:9/x.pth", custom_load=True)
    assert load_backbone(str(folder)).architecture["config"] == {}
    (folder / "model.safetensors").unlink()
    torch.save({"a": os.getcwd}, folder / "pytorch_model.bin")
    refuses(WeightsDoNotFit, "code in files is never run", str(folder))


def test_untrained_weights_are_those_of_the_seed_and_need_no_hub():
    first, second, third = (load_backbone("timm:test_vit", random_weights=True, seed=seed) for seed in (1, 1, 2))
    x = pixels(first)
    a, b, c = (outputs(each, x, "tokens")[0] for each in (first, second, third))
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
    refuses(UnknownBackbone, re.escape(says), name)


def test_weights_of_another_architecture_are_named(tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    refuses(WeightsDoNotFit, "are of timm's test_resnet, not of test_vit", "timm:test_vit", weights=str(folder))
    (folder / "config.json").write_text('{"architecture": "resnet5000", "pretrained_cfg": {}}')
    refuses(UnknownBackbone, "'resnet5000', which this timm does not have", str(folder))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[timm\]'") as error:
        describe_backbone("timm-vit-base")
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
    refuses(WeightsDoNotFit, r"Missing key\(s\).*blocks.5", "timm:test_vit", weights=str(tmp_path / "part.safetensors"))
