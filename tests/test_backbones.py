"""What a backbone gives equals what its library gives for one PIL image at a time; what means nothing is refused."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints as save
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torchvision import models

from featurecache.backbones import describe, load_backbone
from featurecache.backbones.aliases import ALIASES
from featurecache.backbones.base import Backbone
from featurecache.backbones.processors import probe
from featurecache.errors import BadOption, OutputRefused, PreprocessingRefused, WeightsDoNotFit
from featurecache.images.preprocessing import Preprocess

PICTURES = [Image.fromarray(probe(*shape)) for shape in ((37, 53), (70, 41), (32, 32))]

SAVED = {
    "vit": (save.save_vit, {}, "ViTModel"),
    "vit classifier": (save.save_vit_classifier, {}, "ViTModel"),
    "deit": (save.save_deit, {}, "DeiTModel"),
    "dinov2": (save.save_dinov2, {}, "Dinov2Model"),
    "dinov2 with registers": (save.save_dinov2, {"registers": 3}, "Dinov2WithRegistersModel"),
    "clip vision": (save.save_clip_vision, {}, "CLIPVisionModel"),
    "clip": (save.save_clip, {}, "CLIPVisionModel"),
    "beit": (save.save_beit, {}, "BeitModel"),
    "beit without mean pooling": (save.save_beit, {"use_mean_pooling": False}, "BeitModel"),
    "beit from masked pretraining": (save.save_beit, {"classifier": False, "use_mask_token": True}, "BeitModel"),
    "siglip vision": (save.save_siglip, {}, "SiglipVisionModel"),
    "siglip": (save.save_siglip_both, {}, "SiglipVisionModel"),
}
CNNS = {
    "resnet": (save.save_resnet, "ResNetForImageClassification"),
    "convnext": (save.save_convnext, "ConvNextForImageClassification"),
}
# tokens, prefix and whether there is a trained pooled vector
EXPECTED = {
    "vit": (17, ("cls",), True),
    "vit classifier": (17, ("cls",), False),
    "deit": (18, ("cls", "dist"), False),
    "dinov2": (37, ("cls",), True),
    "dinov2 with registers": (40, ("cls", "reg0", "reg1", "reg2"), True),
    "clip vision": (17, ("cls",), True),
    "clip": (17, ("cls",), True),
    "beit": (17, ("cls",), True),
    "beit without mean pooling": (17, ("cls",), True),
    "beit from masked pretraining": (17, ("cls",), False),
    "siglip vision": (16, (), True),
    "siglip": (16, (), True),
}


def ours(backbone: Backbone, *want: str, pictures=PICTURES) -> dict[str, torch.Tensor]:
    """All pictures in one batch."""
    images = [backbone.preprocess.resized(as_tensor(picture)) for picture in pictures]
    with torch.no_grad():
        return backbone.forward(backbone.preprocess.normalised(torch.stack(images)), set(want))


def as_tensor(picture: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def library(folder: Path, kind: str, **options):
    """The article's lines, for one picture after the other: processor, model, outputs."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    for picture in PICTURES:
        with torch.no_grad():
            yield model, model(**processor(picture, return_tensors="pt"), **options)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative L2 per row at most 1e-5."""
    assert got.shape == expected.shape
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() <= 1e-5


@pytest.mark.parametrize("name", SAVED)
def test_tokens_are_the_librarys_last_hidden_state(name, tmp_path):
    saver, config, kind = SAVED[name]
    backbone = load_backbone(str(saver(tmp_path / "m", **config)))
    tokens = ours(backbone, "tokens")["tokens"]
    for k, (_, expected) in enumerate(library(tmp_path / "m", kind)):
        assert_same(tokens[k : k + 1], expected.last_hidden_state)
    length, prefix, _ = EXPECTED[name]
    assert tokens.shape[1:] == (length, backbone.width)
    assert backbone.prefix == prefix
    assert len(prefix) + backbone.grid[0] * backbone.grid[1] == length


@pytest.mark.parametrize("name", SAVED)
def test_pooler_is_the_librarys_or_refused_where_it_was_not_trained(name, tmp_path):
    saver, config, kind = SAVED[name]
    backbone = load_backbone(str(saver(tmp_path / "m", **config)))
    if not EXPECTED[name][2]:
        with pytest.raises(OutputRefused, match=r"without the weights of its pooler"):
            backbone.offers("pooler")
        return
    backbone.offers("pooler")
    pooled = ours(backbone, "pooler")["pooler"]
    for k, (_, expected) in enumerate(library(tmp_path / "m", kind)):
        assert_same(pooled[k : k + 1], expected.pooler_output)


@pytest.mark.parametrize("name", SAVED)
def test_an_earlier_block_is_its_hidden_state_through_the_models_final_norm(name, tmp_path):
    saver, config, kind = SAVED[name]
    backbone = load_backbone(str(saver(tmp_path / "m", **config)))
    tokens = ours(backbone, "tokens@-2", "tokens@-3")
    for k, (model, expected) in enumerate(library(tmp_path / "m", kind, output_hidden_states=True)):
        norm = nn.Identity() if kind == "CLIPVisionModel" else getattr(model, "layernorm", None) or model.post_layernorm
        for depth in (2, 3):
            with torch.no_grad():
                assert_same(tokens[f"tokens@-{depth}"][k : k + 1], norm(expected.hidden_states[-depth]))


def test_the_last_block_is_the_tokens_themselves(tmp_path):
    backbone = load_backbone(str(save.save_vit(tmp_path)))
    found = ours(backbone, "tokens", "tokens@-1")
    assert torch.equal(found["tokens"], found["tokens@-1"])


@pytest.mark.parametrize("name", CNNS)
def test_a_cnns_map_and_vector_are_the_librarys_and_give_its_logits(name, tmp_path):
    saver, kind = CNNS[name]
    backbone = load_backbone(str(saver(tmp_path)))
    found = ours(backbone, "tokens", "gap")
    for k, (model, expected) in enumerate(library(tmp_path, kind, output_hidden_states=True)):
        last = expected.hidden_states[-1]
        assert_same(found["tokens"][k : k + 1], last.flatten(2).transpose(1, 2))
        with torch.no_grad():
            assert_same(model.classifier(found["gap"][k : k + 1]), expected.logits)
    assert backbone.grid == tuple(last.shape[2:])
    assert (backbone.vector, backbone.layers, backbone.prefix, backbone.channels_last) == ("gap", 0, (), True)


def test_a_network_is_in_eval_mode_without_gradients_in_float32(tmp_path):
    model = load_backbone(str(save.save_beit(tmp_path))).model
    assert not any(module.training for module in model.modules())
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.float32)}


@pytest.mark.parametrize(
    ("saver", "output", "reason"),
    [
        (save.save_siglip, "cls", "no class token"),
        (save.save_siglip, "cls@-2", "no class token"),
        (save.save_siglip, "gap", "that is a CNN's"),
        (save.save_vit, "gap", "mean is the average"),
        (save.save_vit, "tokens@-4", "it has 3 blocks, @-1 to @-3"),
        (save.save_vit, "tokens@last4", "it has 3 blocks"),
        (save.save_vit, "pooler@-2", "last layer only"),
        (save.save_resnet, "cls", "a CNN has no class token"),
        (save.save_resnet, "pooler", "gap"),
        (save.save_convnext, "tokens@-2", "no blocks"),
    ],
)
def test_outputs_that_would_mean_nothing_are_refused_with_the_reason(saver, output, reason, tmp_path):
    with pytest.raises(OutputRefused, match=reason):
        load_backbone(str(saver(tmp_path))).offers(output)


@pytest.mark.parametrize(
    "output", ["cls", "mean", "tokens", "tokens-257", "tokens-16x16", "pooler", "cls@-3", "mean@last3"]
)
def test_outputs_that_there_are_are_offered(output, tmp_path):
    load_backbone(str(save.save_vit(tmp_path))).offers(output)


def test_a_siglip_without_its_head_has_the_mean_as_its_vector(tmp_path):
    backbone = load_backbone(str(save.save_siglip(tmp_path, vision_use_head=False)))
    assert backbone.vector == "mean"
    with pytest.raises(OutputRefused):
        backbone.offers("pooler")


@pytest.mark.parametrize(
    ("saver", "size", "word"),
    [
        (save.save_vit, 48, "bicubic"),
        (save.save_deit, 48, "bicubic"),
        (save.save_clip, 48, "bicubic"),
        (save.save_siglip, 48, "bicubic"),
        (save.save_beit, 48, "relative"),
        (save.save_dinov2, 63, "bicubic"),
    ],
)
def test_another_image_size_interpolates_positions_as_the_library_does(saver, size, word, tmp_path):
    folder = saver(tmp_path / "m")
    plain, larger = load_backbone(str(folder)), load_backbone(str(folder), image_size=size)
    pixels = torch.rand(2, 3, size, size)
    options = {} if saver is save.save_dinov2 else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = plain.model.network(pixels, **options).last_hidden_state
        assert torch.equal(larger.forward(pixels, {"tokens"})["tokens"], expected)
    assert larger.image_size == (size, size)
    assert larger.position_embeddings.startswith("interpolated") and word in larger.position_embeddings
    assert larger.architecture == plain.architecture


def test_positions_are_as_trained_where_the_sizes_agree(tmp_path):
    assert load_backbone(str(save.save_vit(tmp_path / "v"))).position_embeddings == "as trained"
    dinov2 = save.save_dinov2(tmp_path / "d")
    assert load_backbone(str(dinov2)).position_embeddings == "interpolated (bicubic)"
    assert load_backbone(str(dinov2), image_size=56).position_embeddings == "as trained"


def test_an_image_size_that_no_patches_fill_is_refused(tmp_path):
    with pytest.raises(BadOption, match=r"36 is not a multiple of the patch of 8"):
        load_backbone(str(save.save_vit(tmp_path)), image_size=36)


def test_a_processor_of_another_size_than_the_weights_is_refused_until_a_size_is_named(tmp_path):
    save.save_vit(tmp_path)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(WeightsDoNotFit, match=r"48×48 pixels, its weights were made for 32×32.*--image-size"):
        load_backbone(str(tmp_path))
    assert load_backbone(str(tmp_path), image_size=32).position_embeddings == "as trained"


def test_fit_makes_two_backbones_see_the_same(tmp_path):
    vit = load_backbone(str(save.save_vit(tmp_path / "v")), fit="squash")
    clip = load_backbone(str(save.save_clip(tmp_path / "c")), fit="squash")
    assert (vit.preprocess.mode, vit.preprocess.size) == (clip.preprocess.mode, clip.preprocess.size)


def test_a_checkpoint_without_its_processor_is_refused(tmp_path):
    with pytest.raises(PreprocessingRefused, match=r"no preprocessor_config.json"):
        load_backbone(str(save.save_vit(tmp_path, processor=False)))


def test_a_processor_saved_inside_processor_config_is_found(tmp_path):
    save.save_vit(tmp_path)
    own = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(own.read_text())}))
    own.unlink()
    assert load_backbone(str(tmp_path)).preprocess.size == (32, 32)


def test_a_processor_with_code_of_its_own_is_refused_and_not_run(tmp_path):
    save.save_vit(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    settings = {"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(PreprocessingRefused, match=r"cannot be read"):
        load_backbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# torchvision

SMALL = [
    "resnet50",
    "densenet121",
    "convnext_tiny",
    "efficientnet_b0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "googlenet",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
    "swin_t",
]


@pytest.mark.parametrize("name", SMALL)
def test_torchvision_gap_through_the_networks_own_classifier_gives_its_logits(name):
    backbone = load_backbone(f"torchvision:{name}", random_weights=True, image_size=64)
    network, pixels = backbone.model.network, torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, logits = backbone.forward(pixels, {"gap", "tokens"}), network(pixels)
        classifier = list(network.children())[-1]
        layers = [classifier] if isinstance(classifier, nn.Linear) else list(classifier)
        first = next(k for k, layer in enumerate(layers) if isinstance(layer, nn.Linear))
        assert torch.allclose(nn.Sequential(*layers[first:])(found["gap"]), logits, atol=1e-6)
    assert found["tokens"].shape == (2, backbone.grid[0] * backbone.grid[1], backbone.width)
    assert found["gap"].shape == (2, backbone.width)


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "efficientnet_b0", "swin_t"])
def test_the_mean_over_a_torchvision_map_is_its_gap(name):
    backbone = load_backbone(f"torchvision:{name}", random_weights=True, image_size=64)
    with torch.no_grad():
        found = backbone.forward(torch.rand(2, 3, 64, 64), {"gap", "tokens"})
    assert_same(found["tokens"].mean(1), found["gap"])


def test_resnet50_gives_what_torchvisions_own_feature_extraction_gives_for_one_pil_image_at_a_time():
    from torchvision.models.feature_extraction import create_feature_extractor

    backbone = load_backbone("resnet50", random_weights=True, seed=3)
    torch.manual_seed(3)
    network = models.resnet50().eval()
    extractor = create_feature_extractor(network, {"layer4": "map", "flatten": "gap"})
    transforms = models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    found = ours(backbone, "gap", "tokens", pictures=PICTURES[:2])
    for k, picture in enumerate(PICTURES[:2]):
        with torch.no_grad():
            expected = extractor(transforms(picture)[None])
        assert_same(found["gap"][k : k + 1], expected["gap"])
        assert_same(found["tokens"][k : k + 1], expected["map"].flatten(2).transpose(1, 2))


def test_densenet121_is_read_after_its_last_relu():
    backbone = load_backbone("densenet121", random_weights=True, image_size=64, seed=1)
    torch.manual_seed(1)
    network, pixels = models.densenet121().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = torch.relu(network.features(pixels))
        found = backbone.forward(pixels, {"gap", "tokens"})
    assert_same(found["tokens"], expected.flatten(2).transpose(1, 2))
    assert_same(found["gap"], expected.mean((2, 3)))


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "squeezenet1_0"])
def test_torchvision_networks_that_do_not_pool_are_refused_by_name(name):
    with pytest.raises(OutputRefused, match=rf"torchvision:{name} cannot be a backbone"):
        describe(f"torchvision:{name}")


def test_a_torchvision_vit_gives_its_encoders_output():
    backbone = load_backbone("torchvision:vit_b_32", random_weights=True, image_size=64)
    network, pixels = backbone.model.network, torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = backbone.forward(pixels, {"tokens", "tokens@-1", "tokens@-2"})
        assert torch.allclose(network.heads(found["tokens"][:, 0]), network(pixels), atol=1e-6)
        x = network.conv_proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([network.class_token, x], 1) + network.encoder.pos_embedding
        for layer in network.encoder.layers[:-1]:
            x = layer(x)
        assert_same(found["tokens@-2"], network.encoder.ln(x))
    assert torch.equal(found["tokens@-1"], found["tokens"])
    assert (backbone.vector, backbone.prefix, backbone.grid, backbone.layers) == ("cls", ("cls",), (2, 2), 12)
    assert backbone.position_embeddings == "interpolated (bicubic, corners aligned)"
    with pytest.raises(OutputRefused):
        backbone.offers("gap")


def test_a_torchvision_network_that_takes_no_other_size_says_so():
    with pytest.raises(BadOption, match=r"maxvit_t does not take images of 100×100"):
        describe("torchvision:maxvit_t", image_size=100)


OFTEN = ("resnet18", "resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16", "vgg11")


@pytest.mark.parametrize(
    "name",
    [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in models.list_models(module=models)],
)
def test_every_torchvision_classifier_is_described_or_refused_by_name(name):
    if name.startswith("regnet") and name.endswith(("16gf", "32gf", "128gf")):
        pytest.skip(
            "a RegNet is built with its parameters: the largest take gigabytes, and the small ones are the same"
        )
    try:
        shape = describe(f"torchvision:{name}")
    except OutputRefused:
        assert name.startswith(("alexnet", "vgg", "squeezenet"))
        return
    published = models.get_model_weights(name).DEFAULT.meta["num_params"]
    assert shape["parameters"] == (23_834_568 if name == "inception_v3" else published)  # without its auxiliary head
    assert not name.startswith(("alexnet", "vgg", "squeezenet"))


# aliases and descriptions


@pytest.mark.parametrize("name", ALIASES)
def test_an_aliass_record_agrees_with_the_network_it_builds(name):
    alias, shape = ALIASES[name], describe(name)
    assert (shape["parameters"], shape["width"]) == (alias.parameters, alias.width)
    assert shape["outputs"]["tokens"]["shape"] == [alias.tokens, alias.width]
    assert shape["image_size"] == [alias.input, alias.input]
    assert shape["licence"] and shape["source"] and "mean" in shape["sees"]
    assert ("refused" in shape["outputs"]["pooler"]) == (not alias.pooler or not alias.model_type)


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert describe(name)["parameters"] == PUBLISHED[name]


def test_a_description_says_what_is_seen_and_why_an_output_is_missing():
    shape = describe("siglip-base")
    assert shape["sees"] == "224×224 squashed, bicubic, mean 0.5, std 0.5 (as published with its weights)"
    assert "no class token" in shape["outputs"]["cls"]["refused"]
    assert shape["outputs"]["pooler"] == {"shape": [768]}
    assert (shape["layers"], shape["vector"], shape["licence"]) == (12, "pooler", "Apache-2.0")
    json.dumps(shape)


def test_a_description_of_a_folder_knows_that_its_pooler_was_not_saved(tmp_path):
    with_pooler, without = save.save_vit(tmp_path / "a"), save.save_vit(tmp_path / "b", pooler=False)
    assert "shape" in describe(str(with_pooler))["outputs"]["pooler"]
    assert "refused" in describe(str(without))["outputs"]["pooler"]


def test_a_loaded_backbone_is_described_as_its_name_is(tmp_path):
    folder = str(save.save_deit(tmp_path))
    assert describe(load_backbone(folder)) == describe(folder)


def test_untrained_weights_follow_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (load_backbone("vit-demo", random_weights=True, seed=s).model for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), before)
    states = [model.network.embeddings.cls_token for model in (first, again, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_vit_demo_is_small_and_sees_small_images():
    backbone = load_backbone("vit-demo", random_weights=True)
    assert (backbone.image_size, backbone.grid, backbone.weights) == ((64, 64), (8, 8), {"random_seed": 0})
    assert backbone.parameters < 500_000
    assert Preprocess.from_dict(backbone.preprocess.to_dict()) == backbone.preprocess
