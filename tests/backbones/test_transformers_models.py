"""Networks of transformers give what the library gives for one PIL image at a time; what means nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support.backbone_checks import as_rows, assert_same, edit_json, edit_tensors, fed, key, outputs, refuses
from torch import nn

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.backbones.processors import probe
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    WeightsDoNotFit,
    WeightsNotFound,
)

PICTURES = [Image.fromarray(probe(*shape)) for shape in ((37, 53), (70, 41), (32, 32))]


class Saved(NamedTuple):
    """A checkpoint, the class that reads it, and what is expected of its backbone."""

    write: Callable[..., Path]
    config: dict[str, Any]
    kind: str
    tokens: int
    prefix: tuple[str, ...] = ("cls",)
    pooler: bool = True  # a trained one


SAVED = {
    "vit": Saved(save.save_vit, {}, "ViTModel", 17),
    "vit classifier": Saved(save.save_vit_classifier, {}, "ViTModel", 17, pooler=False),
    "deit": Saved(save.save_deit, {}, "DeiTModel", 18, ("cls", "dist"), pooler=False),
    "dinov2": Saved(save.save_dinov2, {}, "Dinov2Model", 37),
    "dinov2 with registers": Saved(
        save.save_dinov2, {"registers": 3}, "Dinov2WithRegistersModel", 40, ("cls", "reg0", "reg1", "reg2")
    ),
    "clip vision": Saved(save.save_clip_vision, {}, "CLIPVisionModel", 17),
    "clip": Saved(save.save_clip, {}, "CLIPVisionModel", 17),
    "beit": Saved(save.save_beit, {}, "BeitModel", 17),
    "beit without mean pooling": Saved(save.save_beit, {"use_mean_pooling": False}, "BeitModel", 17),
    "beit from masked pretraining": Saved(
        save.save_beit, {"classifier": False, "use_mask_token": True}, "BeitModel", 17, pooler=False
    ),
    "siglip vision": Saved(save.save_siglip, {}, "SiglipVisionModel", 16, ()),
    "siglip": Saved(save.save_siglip_both, {}, "SiglipVisionModel", 16, ()),
}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory) -> tuple[Saved, Path, Backbone]:
    expected = SAVED[request.param]
    folder = expected.write(tmp_path_factory.mktemp("saved") / "m", **expected.config)
    return expected, folder, load_backbone(str(folder))


def ours(backbone: Backbone, *names: str) -> list[torch.Tensor]:
    """Outputs of all pictures in one batch."""
    return outputs(backbone, torch.cat([fed(backbone, picture) for picture in PICTURES]), *names)


@torch.no_grad()
def library(folder: Path, kind: str, **options: Any) -> Iterator[tuple[slice, Any, Any]]:
    """The article's lines, for one picture after the other: (its row, model, outputs)."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    for k, picture in enumerate(PICTURES):
        yield slice(k, k + 1), model, model(**processor(picture, return_tensors="pt"), **options)


def test_tokens_and_pooler_are_the_librarys_or_refused_where_it_was_not_trained(saved):
    expected, folder, backbone = saved
    names = ("tokens", "pooler") if expected.pooler else ("tokens",)
    tokens, *pooler = ours(backbone, *names)
    for row, _, given in library(folder, expected.kind):
        assert_same(tokens[row], given.last_hidden_state)
        if pooler:
            assert_same(pooler[0][row], given.pooler_output)
    assert tokens.shape[1:] == (expected.tokens, backbone.width) and backbone.prefix == expected.prefix
    assert len(expected.prefix) + backbone.grid[0] * backbone.grid[1] == expected.tokens
    assert ("without the weights of its pooler" in backbone.refusals.get("pooler", "")) != expected.pooler


def test_an_earlier_block_is_its_hidden_state_through_the_models_final_norm(saved):
    expected, folder, backbone = saved
    last, second, third = ours(backbone, "tokens@-1", "tokens@-2", "tokens@-3")
    assert torch.equal(last, ours(backbone, "tokens")[0])
    for row, model, given in library(folder, expected.kind, output_hidden_states=True):
        plain = expected.kind == "CLIPVisionModel"
        norm = nn.Identity() if plain else getattr(model, "layernorm", None) or model.post_layernorm
        assert_same(second[row], norm(given.hidden_states[-2]))
        assert_same(third[row], norm(given.hidden_states[-3]))


@pytest.mark.parametrize(
    ("write", "kind"),
    [(save.save_resnet, "ResNetForImageClassification"), (save.save_convnext, "ConvNextForImageClassification")],
)
def test_a_cnns_map_and_vector_are_the_librarys_and_give_its_logits(write, kind, tmp_path):
    backbone = load_backbone(str(write(tmp_path)))
    tokens, gap = ours(backbone, "tokens", "gap")
    for row, model, given in library(tmp_path, kind, output_hidden_states=True):
        last = given.hidden_states[-1]
        assert_same(tokens[row], as_rows(last))
        assert_same(model.classifier(gap[row]), given.logits)
    assert backbone.grid == tuple(last.shape[2:])
    assert (backbone.vector, backbone.layers, backbone.prefix, backbone.channels_last) == ("gap", 0, (), True)


def test_a_network_is_in_eval_mode_without_gradients_in_float32(tmp_path):
    model = load_backbone(str(save.save_beit(tmp_path))).model
    assert not any(module.training for module in model.modules())
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.float32)}


def test_half_precision_on_disk_is_computed_in_float32(tmp_path):
    folder = save.save_vit(tmp_path / "m")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backbone, pixels = load_backbone(str(edit_json(folder / "config.json", dtype="float16"))), torch.rand(1, 3, 32, 32)
    expected = transformers.ViTModel.from_pretrained(folder).float().eval()
    with torch.no_grad():
        assert torch.equal(outputs(backbone, pixels, "tokens")[0], expected(pixels).last_hidden_state)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


# which outputs there are


@pytest.mark.parametrize(
    ("write", "output", "reason"),
    [
        (save.save_siglip, "features", "features is what an imported vector is called"),
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
def test_outputs_that_would_mean_nothing_are_refused_with_the_reason(write, output, reason, tmp_path):
    with pytest.raises(OutputRefused, match=reason):
        load_backbone(str(write(tmp_path))).offers(output)


def test_outputs_that_there_are_are_offered(tmp_path):
    backbone = load_backbone(str(save.save_vit(tmp_path)))
    for name in ("cls", "mean", "tokens", "tokens-257", "tokens-16x16", "pooler", "cls@-3", "mean@last3"):
        backbone.offers(name)


def test_a_siglip_without_its_head_has_the_mean_as_its_vector(tmp_path):
    backbone = load_backbone(str(save.save_siglip(tmp_path, vision_use_head=False)))
    assert backbone.vector == "mean" and "pooler" in backbone.refusals


def test_half_a_pooler_is_no_pooler(tmp_path):
    assert "pooler" in load_backbone(str(edit_tensors(save.save_vit(tmp_path), pooler__dense__bias=None))).refusals


# sizes and processors


@pytest.mark.parametrize(
    ("write", "size", "how"),
    [
        (save.save_vit, 48, "bicubic"),
        (save.save_deit, 48, "bicubic"),
        (save.save_clip, 48, "bicubic"),
        (save.save_siglip, 48, "bicubic"),
        (save.save_beit, 48, "relative"),
        (save.save_dinov2, 63, "bicubic"),
    ],
)
def test_another_image_size_interpolates_positions_as_the_library_does(write, size, how, tmp_path):
    folder = str(write(tmp_path / "m"))
    plain, larger = load_backbone(folder), load_backbone(folder, image_size=size)
    pixels = torch.rand(2, 3, size, size)
    options = {} if write is save.save_dinov2 else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = plain.model.network(pixels, **options).last_hidden_state
    assert torch.equal(outputs(larger, pixels, "tokens")[0], expected)
    assert larger.image_size == (size, size) and larger.architecture == plain.architecture
    assert larger.position_embeddings.startswith("interpolated") and how in larger.position_embeddings


def test_positions_are_as_trained_where_the_sizes_agree(tmp_path):
    vit, dinov2 = str(save.save_vit(tmp_path / "v")), str(save.save_dinov2(tmp_path / "d"))
    assert load_backbone(vit).position_embeddings == "as trained"
    assert load_backbone(dinov2).position_embeddings == "interpolated (bicubic)"
    assert load_backbone(dinov2, image_size=56).position_embeddings == "as trained"
    refuses(BadOption, r"36 is not a multiple of the patch of 8", vit, image_size=36)


def test_a_processor_of_another_size_than_the_weights_is_refused_until_a_size_is_named(tmp_path):
    save.save_vit(tmp_path)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    refuses(WeightsDoNotFit, r"48×48 pixels, its weights were made for 32×32.*--image-size", tmp_path)
    assert load_backbone(str(tmp_path), image_size=32).position_embeddings == "as trained"


def test_images_that_no_patches_fill_are_refused(tmp_path):
    folder = edit_json(save.save_vit(tmp_path) / "preprocessor_config.json", size={"height": 36, "width": 36})
    refuses(WeightsDoNotFit, "36×36 pixels, not a multiple of the patch of 8", folder)


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (save.save_vit, {"resample": []}),
        (save.save_vit, {"rescale_factor": "x"}),
        (save.save_vit, {"image_mean": "abc"}),
        (save.save_clip_vision, {"crop_size": {"height": None}}),
        (save.save_resnet, {"crop_pct": 0}),
    ],
)
def test_settings_of_a_processor_that_are_no_numbers_are_one_sentence(write, change, tmp_path):
    refuses(PreprocessingRefused, ".", edit_json(write(tmp_path) / "preprocessor_config.json", **change))


def test_fit_makes_two_backbones_see_the_same(tmp_path):
    vit = load_backbone(str(save.save_vit(tmp_path / "v")), fit="squash")
    clip = load_backbone(str(save.save_clip(tmp_path / "c")), fit="squash")
    assert (vit.preprocess.mode, vit.preprocess.size) == (clip.preprocess.mode, clip.preprocess.size)


def test_a_checkpoint_without_its_processor_is_refused(tmp_path):
    refuses(PreprocessingRefused, r"no preprocessor_config.json", save.save_vit(tmp_path, processor=False))


def test_a_processor_saved_inside_processor_config_is_read(tmp_path):
    own = save.save_vit(tmp_path) / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(own.read_text())}))
    own.unlink()
    assert load_backbone(str(tmp_path)).preprocess.size == (32, 32)


def test_a_processor_with_code_of_its_own_is_refused_and_not_run(tmp_path):
    save.save_vit(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    settings = {"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    refuses(PreprocessingRefused, r"cannot be read", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_only_a_configuration_gets_its_model_types_processor_untrained(tmp_path):
    transformers.DeiTConfig(**save.SIZE, image_size=64, patch_size=8).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), random_weights=True)
    assert (backbone.preprocess.size, backbone.preprocess.resize) == ((64, 64), (73, 73))
    assert backbone.provenance["preprocessing"] == "the default of its model type"


# weights and configurations that do not fit


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"layernorm__weight": None}, r"lack 1 tensors of ViTModel: layernorm.weight"),
        ({"layernorm__bias": torch.zeros(31)}, r"layernorm.bias is \[31\], expected \[32\]"),
    ],
)
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tensors, says, tmp_path):
    refuses(WeightsDoNotFit, says, edit_tensors(save.save_vit(tmp_path), **tensors))


def test_a_missing_mask_token_is_never_used_and_so_no_matter(tmp_path):
    load_backbone(str(edit_tensors(save.save_dinov2(tmp_path), embeddings__mask_token=None)))


def test_weights_of_something_else_altogether_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    folder = save.save_vit(tmp_path / "m")
    refuses(WeightsDoNotFit, r"they hold bias, weight", folder, weights=tmp_path / "linear.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 2}, "more than its configuration says"),
        ({"hidden_size": "wide"}, "is not a configuration of vit"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"hidden_act": "nope"}, "as its settings say"),
        ({"num_attention_heads": 0}, "as its settings say"),
        ({"_attn_implementation": "flash_attention_2"}, "as its settings say"),
    ],
)
def test_a_configuration_we_cannot_use_is_refused_in_one_sentence(change, says, tmp_path):
    refuses(WeightsDoNotFit, says, edit_json(save.save_vit(tmp_path) / "config.json", **change))


def test_a_configuration_that_is_none_is_refused(tmp_path):
    refuses(WeightsNotFound, r"no config.json.*--backbone NAME --weights", tmp_path)
    (save.save_vit(tmp_path) / "config.json").write_text("{")
    refuses(WeightsDoNotFit, r"not a configuration in JSON", tmp_path)


def test_a_folder_without_weights_works_only_untrained(tmp_path):
    (save.save_vit(tmp_path) / "model.safetensors").unlink()
    refuses(WeightsNotFound, r"no file of weights", tmp_path)
    assert load_backbone(str(tmp_path), random_weights=True).weights == {"random_seed": 0}


@pytest.mark.parametrize("change", [{"return_dict": False}, {"output_hidden_states": "x"}, {"torchscript": True}])
def test_settings_that_only_say_how_the_library_answers_change_nothing(change, tmp_path):
    folder = save.save_vit(tmp_path)
    before = key(load_backbone(str(folder)))
    edit_json(folder / "config.json", **change)
    backbone = load_backbone(str(folder))
    assert key(backbone) == before
    assert outputs(backbone, torch.rand(1, 3, 32, 32), "tokens")[0].shape == (1, 17, 32)
