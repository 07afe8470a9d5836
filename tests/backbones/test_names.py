"""Names of backbones: aliases, what info shows of one, and what a name in none of the forms is answered with."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import checkpoints as save
from support.backbone_checks import refuses
from support.small_hub import put_in_cache

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.aliases import ALIASES
from featurecache.errors import BadOption, UnknownBackbone, WeightsNotFound
from featurecache.images.preprocessing import Preprocess


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit-in12k", 'no backbone is called "vit-in12k". Near: vit-in'),
        ("vit-in12k", "torchvision:<name>"),
        ("google/vit-base-patch16-224", "a repository of the hub is written hf:google/vit-base-patch16-224"),
        ("./nowhere", 'there is no folder "./nowhere"'),
        ("hf:/nowhere/at/all", 'there is no folder "/nowhere/at/all"'),
        ("hf:a/b/c", "cannot be the name of a repository"),
        ("timm/resnet50", "a repository of the hub is written hf:timm/resnet50"),
        ("torchvision:resnet5", 'no model "resnet5" for classification. Near: resnet5'),
        *[(f"{kind}:{rest}", f'names no network behind "{kind}:"; expected hf:<repo or folder>, torchvision:<name>')
          for kind in ("timm", "torchvision", "hf", "hf-hub", "hf_hub") for rest in ("", " ", "/", "@", " @")],
        ("torchvision:resnet50:V9", "there are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
    ],
)  # fmt: skip
def test_names_that_are_nearly_right_are_answered_with_the_right_form(name, says, hub):
    refuses(UnknownBackbone, re.escape(says), name)


def test_a_file_of_weights_is_not_a_name(tmp_path):
    (tmp_path / "mine.pt").write_bytes(b"x")
    refuses(UnknownBackbone, r"--backbone NAME --weights", tmp_path / "mine.pt")


@pytest.mark.integration
def test_options_that_make_no_sense_are_refused_before_anything_is_looked_for():
    refuses(BadOption, r"contradict", "vit-in21k", weights="x", random_weights=True)
    refuses(BadOption, r"model, squash, pad", "vit-in21k", fit="stretch")
    refuses(WeightsNotFound, r"--random-weights", "vit-demo")


@pytest.mark.integration
def test_names_of_stores_come_from_folders_and_repositories(tmp_path, hub):
    folder = save.save_vit(tmp_path / "my vit")
    put_in_cache(hub, folder, "org/their-vit")
    assert load_backbone(str(folder)).name == "my vit"
    assert load_backbone("hf:org/their-vit").name == "their-vit"
    assert load_backbone("vit-demo", random_weights=True).name == "vit-demo"


# counted from the checkpoints on the hub and in torchvision's tables (classifiers of the hub's left out)
PUBLISHED = {
    "vit-in21k": 86_389_248,
    "vit-in1k": 85_798_656,
    "vit-large-in21k": 304_351_232,
    "dinov2-small": 22_056_576,
    "dinov2-base": 86_580_480,
    "dinov2-large": 304_368_640,
    "clip-vit-b32": 87_456_000,
    "siglip-base": 92_884_224,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "densenet121": 7_978_856,
    "convnext-tiny": 28_589_128,
}


@pytest.mark.integration
@pytest.mark.parametrize("name", ALIASES)
def test_an_aliass_record_agrees_with_the_network_it_builds(name):
    alias, shape = ALIASES[name], describe_backbone(name)
    assert (shape["parameters"], shape["width"]) == (alias.parameters, alias.width)
    assert shape["parameters"] == PUBLISHED.get(name, alias.parameters)
    assert shape["outputs"]["tokens"]["shape"] == [alias.tokens, alias.width]
    assert shape["image_size"] == [alias.input, alias.input]
    assert shape["licence"] and shape["source"] and "mean" in shape["sees"]
    assert ("refused" in shape["outputs"]["pooler"]) == (not alias.pooler or not alias.model_type)


@pytest.mark.integration
def test_a_description_says_what_is_seen_and_why_an_output_is_missing():
    shape = describe_backbone("siglip-base")
    assert shape["sees"] == "224×224 squashed, bicubic, mean 0.5, std 0.5 (as published with its weights)"
    assert "no class token" in shape["outputs"]["cls"]["refused"]
    assert shape["outputs"]["pooler"] == {"shape": [768]}
    assert (shape["layers"], shape["vector"], shape["licence"]) == (12, "pooler", "Apache-2.0")
    json.dumps(shape)


@pytest.mark.integration
def test_a_description_of_a_folder_knows_that_its_pooler_was_not_saved(tmp_path):
    with_pooler, without = save.save_vit(tmp_path / "a"), save.save_vit(tmp_path / "b", pooler=False)
    assert "shape" in describe_backbone(str(with_pooler))["outputs"]["pooler"]
    assert "refused" in describe_backbone(str(without))["outputs"]["pooler"]


@pytest.mark.integration
def test_a_loaded_backbone_is_described_as_its_name_is(tmp_path):
    folder = str(save.save_deit(tmp_path))
    described = describe_backbone(folder)
    assert described.pop("modules")  # of a name only: they take a forward pass
    assert describe_backbone(load_backbone(folder)) == described


@pytest.mark.integration
def test_untrained_weights_follow_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    models = [load_backbone("vit-demo", random_weights=True, seed=seed).model for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), before)
    first, again, other = (model.network.embeddings.cls_token for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.integration
def test_vit_demo_is_small_and_sees_small_images():
    backbone = load_backbone("vit-demo", random_weights=True)
    assert (backbone.image_size, backbone.grid, backbone.weights) == ((64, 64), (8, 8), {"random_seed": 0})
    assert backbone.parameters < 500_000
    assert Preprocess.from_dict(backbone.preprocess.to_dict()) == backbone.preprocess
