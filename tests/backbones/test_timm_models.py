"""Backbones of timm against timm itself: its small test networks with random numbers, saved as it saves them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbone_checks import as_rows, assert_same, edit_json, fed, key, outputs, refuses
from support.checkpoints import wide
from support.pictures import picture
from support.small_hub import put_in_cache
from torch import nn

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.base import Backbone
from featurecache.backbones.timm_models import output_traits
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    UnknownBackbone,
    WeightsDoNotFit,
    WeightsNotFound,
)

timm = pytest.importorskip("timm")
SMALL_DEIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}
SMALL_SWIN = {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "img_size": 64, "window_size": 4}


def network(name: str, **arguments: Any) -> Any:
    return wide(timm.create_model(name, **arguments))


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


@pytest.mark.parametrize("features", [[torch.zeros(1, 8)], torch.zeros(1, 8)])
def test_features_that_are_neither_tokens_nor_a_map_are_refused(features):
    with pytest.raises(OutputRefused, match=r"expected tokens \[B,T,D\] or a map"):
        output_traits("m", nn.Identity(), features, (8, 8))


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
    saved = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    real = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=saved))
    for width, height in ((53, 37), (301, 177), (90, 400)):
        image = picture(width, width, height)
        assert torch.allclose(fed(backbone, image)[0], real(image), atol=1e-6, rtol=0)


CLIPS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop_mode": "border"}, "'border'"),
        ({"crop_pct": "x"}, "."),
        ({"mean": "abc"}, "."),
        ({"interpolation": [1]}, "."),
    ],
)
def test_a_border_of_the_mean_and_settings_that_are_none_are_refused(change, says, tmp_path):
    folder = save(tmp_path / "net", network("test_resnet"))
    refuses(PreprocessingRefused, says, with_settings(folder, **change))


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


def test_a_checkpoint_of_other_classes_is_the_same_backbone(tmp_path):
    real = network("test_vit")
    classifier = {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    backbone = load_backbone("timm:test_vit", weights=as_file(tmp_path / "best.pt", real.state_dict() | classifier))
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
        (lambda state: {k: v for k, v in state.items() if "blocks.5" not in k}, r"Missing key\(s\).*blocks.5"),
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


# names


def test_sizes_names_and_folders_that_cannot_be_are_refused(tmp_path):
    refuses(BadOption, "--image-size 0 is no size", "timm:test_vit", random_weights=True, image_size=0)
    trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    bare = next(name for name in timm.list_models() if name not in trained)
    refuses(WeightsNotFound, "was published without weights", f"timm:{bare}")
    refuses(UnknownBackbone, "has no config.json as timm writes it", f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "test_vit", "pretrained_cfg": 3}')
    refuses(WeightsDoNotFit, "a record is expected", tmp_path)


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
