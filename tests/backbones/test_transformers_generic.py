"""Every vision model that the installed transformers can build: as its own call gives it, or refused with why."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import transformers
from support import checkpoints as save
from support.backbone_checks import as_rows, assert_same, edit_json, edit_tensors, outputs, refuses
from support.image_models import NEEDS, REFUSED, image_model_types, save_tiny, tiny_config
from torch import nn

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.transformers_families import FAMILIES
from featurecache.backbones.transformers_generic import vision_class
from featurecache.errors import FeatureCacheError, OutputRefused, UnknownBackbone, WeightsDoNotFit

MEASURED = sorted(set(image_model_types()) - set(FAMILIES))
OFFERED = [kind for kind in MEASURED if kind not in REFUSED]


def library(folder, pixels, **options):
    """What `AutoModel` gives for one image after the other."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model, [model(pixels[k : k + 1], **options) for k in range(len(pixels))]


def pixels_for(backbone, n=3):
    return torch.randn(n, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [kind for kind in OFFERED if kind != "vit_mae"])
def test_what_a_model_gives_is_what_its_library_gives_for_each_image_alone(kind, tmp_path):
    backbone = load_backbone(str(save_tiny(tmp_path, kind)))
    pixels = pixels_for(backbone)
    _, alone = library(tmp_path, pixels)
    hidden = torch.cat([output.last_hidden_state for output in alone])
    tokens, vector = outputs(backbone, pixels, "tokens")[0], backbone.vector
    assert_same(tokens, as_rows(hidden) if hidden.dim() == 4 else hidden)
    assert tokens.shape[1:] == (len(backbone.prefix) + backbone.grid[0] * backbone.grid[1], backbone.width)
    if hidden.dim() == 4:
        assert (vector, backbone.grid, backbone.prefix) == ("gap", tuple(hidden.shape[2:]), ())
    if vector == "gap" or "pooler" not in backbone.refusals:
        pooled = alone[0].get("pooler_output")
        pooled = None if pooled is None or pooled.flatten(1).shape[1] != backbone.width else pooled
        each = [hidden.mean((2, 3))] if pooled is None else [output.pooler_output.flatten(1) for output in alone]
        assert_same(outputs(backbone, pixels, "gap" if vector == "gap" else "pooler")[0], torch.cat(each))


@pytest.mark.parametrize("kind", [kind for kind in MEASURED if kind in REFUSED])
def test_what_cannot_be_offered_is_refused_with_why(kind, tmp_path):
    with pytest.raises(FeatureCacheError, match=REFUSED[kind]):
        vision_class("m", tiny_config(kind, image_model_types()[kind]))
        load_backbone(str(save_tiny(tmp_path, kind)))


@pytest.mark.parametrize("kind", NEEDS)
def test_a_type_whose_library_is_not_installed_is_refused_by_the_name_of_it(kind, tmp_path):
    assert find_spec(NEEDS[kind]) is None
    transformers.CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    refuses(WeightsDoNotFit, f"requires the {NEEDS[kind]} library", tmp_path, random_weights=True)


# what was measured


@pytest.mark.parametrize(
    ("kind", "prefix", "grid", "layers"),
    [
        ("vit_mae", ("cls",), (4, 4), 3),
        ("vit_msn", ("cls",), (4, 4), 3),
        ("data2vec-vision", ("cls",), (4, 4), 3),
        ("ijepa", (), (4, 4), 3),
        ("dinov3_vit", ("cls", "reg0", "reg1"), (4, 4), 3),
        ("dinov3_convnext", ("cls",), (7, 7), 0),
        ("pixio", ("cls", *(f"cls{k}" for k in range(1, 8))), (4, 4), 3),
        ("swin", (), (4, 4), 0),
        ("swinv2", (), (4, 4), 0),
        ("hiera", (), (2, 2), 0),
        ("pvt", ("cls",), (2, 2), 0),
        ("efficientnet", (), (2, 2), 0),
    ],
)
def test_prefix_grid_and_blocks_are_as_the_articles_have_them(kind, prefix, grid, layers, tmp_path):
    shown = describe_backbone(str(save_tiny(tmp_path, kind)))
    assert (shown["prefix"], shown["grid"], shown["layers"]) == (list(prefix), list(grid), layers)


NORMS = {"vit_msn": "layernorm", "ijepa": "layernorm", "dinov3_vit": "norm", "aimv2_vision_model": "rms_norm"}
NORMS |= {"data2vec-vision": "", "mlcd_vision_model": "", "dpt": "layernorm"}


@pytest.mark.parametrize("kind", NORMS)
def test_an_earlier_block_is_its_hidden_state_through_the_last_norm(kind, tmp_path):
    backbone = load_backbone(str(save_tiny(tmp_path, kind)))
    pixels = pixels_for(backbone, 1)
    model, (given,) = library(tmp_path, pixels, output_hidden_states=True)
    norm = model.get_submodule(NORMS[kind]) if NORMS[kind] else nn.Identity()
    last, second, third = outputs(backbone, pixels, "tokens@-1", "tokens@-2", "tokens@-3")
    assert torch.equal(last, outputs(backbone, pixels, "tokens")[0])
    assert_same(second, norm(given.hidden_states[-2]))
    assert_same(third, norm(given.hidden_states[-3]))


def test_blocks_of_several_widths_have_no_names(tmp_path):
    with pytest.raises(OutputRefused, match="no blocks of one width"):
        load_backbone(str(save_tiny(tmp_path, "swin"))).offers("mean@-2")


@pytest.mark.parametrize("kind", ["swin", "swinv2", "donut-swin", "focalnet", "hiera", "pvt"])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_tokens_of_stages_lie_row_by_row(kind, corner, tmp_path):
    """A change in a corner of the image changes most the tokens of that corner."""
    backbone = load_backbone(str(save_tiny(tmp_path, kind, wide=False)))
    first, (h, w) = pixels_for(backbone, 1), (side // 2 for side in backbone.image_size)
    second = first.clone()
    second[:, :, corner[0] * h : (corner[0] + 1) * h, corner[1] * w : (corner[1] + 1) * w] *= -1
    tokens = outputs(backbone, torch.cat([first, second]), "tokens")[0][:, len(backbone.prefix) :]
    change = (tokens[0] - tokens[1]).norm(dim=-1).unflatten(0, backbone.grid)
    quarters = nn.functional.adaptive_avg_pool2d(change[None], 2)[0]
    assert divmod(int(quarters.argmax()), 2) == corner


def test_a_masked_autoencoder_sees_all_patches_in_their_order_as_a_vit_does(tmp_path):
    backbone = load_backbone(str(save_tiny(tmp_path, "vit_mae")))
    edit_json(tmp_path / "config.json", model_type="vit")
    vit = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    pixels = pixels_for(backbone)
    with torch.no_grad():
        assert_same(outputs(backbone, pixels, "tokens")[0], vit(pixels).last_hidden_state)
    assert backbone.architecture["config"]["mask_ratio"] == 0


# weights, sizes and settings


def test_the_classifier_and_the_decoder_are_left_out(tmp_path):
    config = tiny_config("vit_mae", image_model_types()["vit_mae"])
    config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads = 16, 1, 2
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    whole = load_backbone(str(tmp_path))
    transformers.ViTMAEModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).weights == whole.weights


def test_a_pooler_that_was_not_trained_is_refused_and_a_missing_block_is_named(tmp_path):
    folder = save_tiny(tmp_path, "dinov3_convnext")
    refuses(WeightsDoNotFit, r"lack 1 tensors of DINOv3ConvNextModel: layer_norm.weight",
            edit_tensors(folder, layer_norm__weight=None))  # fmt: skip
    folder = save_tiny(tmp_path / "a", "aimv2_vision_model")
    backbone = load_backbone(str(edit_tensors(folder, head__cls_token=None)))
    assert "without the weights of its pooler" in backbone.refusals["pooler"] and backbone.vector == "mean"


def test_another_size_is_interpolated_only_when_it_is_asked_for(tmp_path):
    folder = save_tiny(tmp_path, "ijepa")
    large = load_backbone(str(folder), image_size=48)
    assert (large.position_embeddings, large.grid) == ("interpolated (its own way)", (6, 6))
    _, (given,) = library(folder, pixels := pixels_for(large, 1), interpolate_pos_encoding=True)
    assert_same(outputs(large, pixels, "tokens")[0], given.last_hidden_state)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    refuses(WeightsDoNotFit, r"48×48 pixels.*made for 32×32.*--image-size", folder)


def test_the_tower_of_a_model_of_images_and_texts_is_taken(tmp_path):
    vision = {**save.SQUARE, "projection_dim": 16}
    config = transformers.ChineseCLIPConfig(text_config={**save.TEXT, "type_vocab_size": 2}, vision_config=vision)
    both = transformers.ChineseCLIPModel(config).eval()
    both.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    pixels = pixels_for(backbone)
    with torch.no_grad():
        assert_same(outputs(backbone, pixels, "tokens")[0], both.vision_model(pixels).last_hidden_state)


class Odd(nn.Module):
    """In place of a network of the library: gives an image other numbers beside another, or lays tokens otherwise."""

    def __init__(self, network, change):
        super().__init__()
        self.inner, self.change, self.config = network, change, network.config

    def forward(self, pixel_values, **options):
        return self.change(self.inner(pixel_values, **options))


def beside_others(output):
    output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0)
    return output


def columns_first(output):
    hidden = output.hidden_states or ()
    output.hidden_states = tuple(h.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2) for h in hidden)
    return output


@pytest.mark.parametrize(("change", "says"), [(beside_others, "beside another image"), (columns_first, "row by row")])
def test_a_network_that_mixes_images_or_lays_patches_otherwise_is_refused(change, says, tmp_path):
    from featurecache.backbones.transformers_generic import measure

    network = transformers.AutoModel.from_pretrained(save_tiny(tmp_path, "ijepa"))
    with pytest.raises(OutputRefused, match=says):
        measure("m", Odd(network, change), (32, 32), False, set())


def test_a_type_that_is_no_vision_model_is_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    refuses(UnknownBackbone, r'a model of type "bert": BertModel takes input_ids; expected a vision model', tmp_path)
    edit_json(tmp_path / "config.json", model_type="chest_net")
    refuses(UnknownBackbone, r'of type "chest_net", which transformers \S+ does not know', tmp_path)
    refuses(UnknownBackbone, r'of type "\[\]", which', edit_json(tmp_path / "config.json", model_type=[]))
    with pytest.raises(UnknownBackbone, match="AutoModel of transformers has no network"):
        vision_class("m", transformers.Blip2VisionConfig())
