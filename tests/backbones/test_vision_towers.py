"""A vision tower is one store, however a larger model of transformers wraps it and whichever names its file has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support.backbone_checks import edit_json, key, outputs
from support.image_models import save_tiny

from featurecache.backbones import describe_backbone, load_backbone, timm_models, transformers_models
from featurecache.errors import FeatureCacheError

TEXT = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
TOWERS = {
    "vit": save.save_vit,
    "dinov2": save.save_dinov2,
    "beit": save.save_beit,
    "clip_vision_model": save.save_clip_vision,
}
MEASURED = ("swin", "dinov3_vit", "dinov3_convnext", "vit_mae", "ijepa", "radio", "donut-swin")


def tower(folder: Path, kind: str) -> Path:
    return TOWERS[kind](folder) if kind in TOWERS else save_tiny(folder, kind)


def beside_text(vision):
    return transformers.VisionTextDualEncoderModel(
        vision_model=vision, text_model=transformers.BertModel(transformers.BertConfig(**TEXT))
    )


def before_a_decoder(vision):
    config = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    return transformers.VisionEncoderDecoderModel(encoder=vision, decoder=transformers.BertLMHeadModel(config))


@pytest.mark.parametrize("wrap", [beside_text, before_a_decoder])
@pytest.mark.parametrize("kind", [*TOWERS, "swin", "dinov3_vit", "vit_mae", "donut-swin"])
def test_a_tower_inside_a_larger_model_is_the_store_of_the_tower_alone(wrap, kind, tmp_path):
    alone, whole = tower(tmp_path / "alone", kind), tmp_path / "whole"
    wrap(transformers.AutoModel.from_pretrained(alone)).save_pretrained(whole)
    shutil.copy(alone / "preprocessor_config.json", whole)
    one, other = load_backbone(str(alone)), load_backbone(str(whole))
    assert key(one) == key(other)
    pixels = torch.rand(2, 3, *one.image_size)
    assert torch.equal(outputs(one, pixels, "tokens")[0], outputs(other, pixels, "tokens")[0])
    for shown in (describe_backbone(str(whole)), describe_backbone(other)):
        assert shown["outputs"] == describe_backbone(one)["outputs"]


@pytest.mark.parametrize("names", ["", "vision_model.", "backbone."])
@pytest.mark.parametrize("memory", [False, True], ids=["published", "as in memory"])
@pytest.mark.parametrize("kind", MEASURED)
def test_a_measured_tower_under_any_names_is_one_store(kind, memory, names, tmp_path):
    folder = tower(tmp_path / "m", kind)
    expected = key(load_backbone(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    tensors = transformers.AutoModel.from_pretrained(folder).state_dict() if memory else tensors
    tensors = {f"{names}{name}": tensor.clone() for name, tensor in tensors.items()} | {"head.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", architectures=["CLIPModel"])
    assert key(load_backbone(str(folder))) == expected


# our own mistakes


OURS = dict.fromkeys(
    ("_positions", "_parts", "plain_config", "weights_identity", "published_tensors"), transformers_models
)
OURS |= dict.fromkeys(("output_traits", "network_identity"), timm_models)


@pytest.mark.parametrize("function", OURS)
def test_a_mistake_of_ours_is_no_sentence_about_the_checkpoint(function, tmp_path, monkeypatch):
    if OURS[function] is timm_models:
        timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
        edit_json(tmp_path / "config.json", model_args={"global_pool": "token"})
    else:
        save_tiny(tmp_path, "swin")
    monkeypatch.setattr(OURS[function], function, lambda *_, **__: {}["ours"])
    with pytest.raises(KeyError, match="ours") as error:
        load_backbone(str(tmp_path))
    assert not isinstance(error.value, FeatureCacheError)


@pytest.mark.parametrize("sides", [0, [16], "16", [16, 0], [4, 4, 4]])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_sizes_in_a_configuration_that_are_none_are_one_sentence(sides, kind, tmp_path):
    folder = tower(tmp_path, kind)
    for name in ("image_size", "patch_size"):
        before = json.loads((folder / "config.json").read_text())[name]
        with pytest.raises(FeatureCacheError):
            load_backbone(str(edit_json(folder / "config.json", **{name: sides})))
        edit_json(folder / "config.json", **{name: before})
