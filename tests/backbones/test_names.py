"""Names of backbones: aliases, what info shows of one, and what a name in none of the forms is answered with."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import checkpoints as save
from support.backbone_checks import outputs, refuses
from support.image_models import image_model_types, tiny_config
from support.small_hub import put_in_cache

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.aliases import ALIASES
from featurecache.errors import BadOption, UnknownBackbone, WeightsNotFound
from featurecache.extraction.plan import prepare


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit-in12k", 'no backbone is called "vit-in12k". Near: vit-in'),
        ("vit-in12k", "torchvision:<name>"),
        ("google/vit-base-patch16-224", "a repository of the hub is written hf:google/vit-base-patch16-224"),
        ("./nowhere", 'there is no folder "./nowhere"'),
        ("hf:/nowhere/at/all", 'there is no folder "/nowhere/at/all"'),
        ("timm:./nowhere", 'there is no folder "./nowhere"; expected one with a config.json as timm writes it'),
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
    with pytest.raises(BadOption, match="not by int"):
        load_backbone(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "near"),
    [("torchvision:resnet5", "resnet50"), ("torchvision:resnet50:IMAGENET1K_V9", "IMAGENET1K_V2"),
     ("timm:resnet5", "resnet50"), ("timm:resnet50.a1_in1", "a1_in1k")],
)  # fmt: skip
def test_a_name_that_its_library_has_not_is_refused_before_the_images_are_looked_at(tmp_path, name, near):
    with pytest.raises(UnknownBackbone, match=near):
        prepare(tmp_path / "nowhere", backbone=name, random_weights=True)


@pytest.mark.integration
def test_names_of_stores_come_from_folders_and_repositories(tmp_path, hub):
    folder = save.save_vit(tmp_path / "my vit")
    put_in_cache(hub, folder, "org/their-vit")
    assert load_backbone(str(folder)).name == "my vit"
    assert load_backbone("hf:org/their-vit").name == "their-vit"
    assert load_backbone("vit-demo", random_weights=True).name == "vit-demo"


@pytest.mark.integration
@pytest.mark.parametrize("name", ALIASES)
def test_an_aliass_record_agrees_with_the_network_it_builds(name):
    alias, shape = ALIASES[name], describe_backbone(name)
    assert (shape["parameters"], shape["width"]) == (alias.parameters, alias.width)
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
def test_a_loaded_backbone_is_described_as_its_name_is(tmp_path):
    folder = str(save.save_deit(tmp_path))
    described = describe_backbone(folder)
    assert described.pop("modules")  # of a name only: they take a forward pass
    assert describe_backbone(load_backbone(folder)) == described


@pytest.mark.integration
@pytest.mark.parametrize("name", ["vit-demo", "swin", "timm:test_vit", "resnet18", "python:nets:make"])
def test_untrained_weights_follow_the_seed_and_leave_torchs_generator_alone(name, here):
    tiny_config("swin", image_model_types()["swin"]).save_pretrained(here / "swin")
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    backbones = [load_backbone(name, random_weights=True, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), before)
    pixels = torch.rand(1, 3, *backbones[0].image_size)
    first, again, other = (outputs(backbone, pixels, "tokens")[0] for backbone in backbones)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert backbones[0].weights == backbones[1].weights and backbones[0].weights["random_seed"] == 1
