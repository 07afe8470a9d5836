"""Networks of the medical field, in the files in which they are published: as their own modules give them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from support import field_networks as field
from support.backbone_checks import assert_same, edit_json, fed, key, outputs, refuses
from support.command import call
from support.small_hub import put_in_cache

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.processors import probe
from featurecache.errors import OutputRefused, PreprocessingRefused, UnknownBackbone, WeightsDoNotFit

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("write", field.PUBLISHED, ids=lambda write: write.__name__)
def test_features_are_those_of_the_original_module(write, tmp_path):
    published = write(tmp_path / "net")
    backbone = load_backbone(published.name, **published.options)
    pixels = torch.randn(2, backbone.preprocess.channels, *backbone.image_size)
    with torch.no_grad():
        expected = published.network(pixels)
    tokens = outputs(backbone, pixels, "tokens")[0]
    assert_same(tokens, expected)
    assert tokens.shape[1:] == (len(backbone.prefix) + backbone.grid[0] * backbone.grid[1], backbone.width)
    assert (backbone.vector, backbone.prefix) == (published.vector, published.prefix)
    assert published.says in backbone.provenance["weights"]
    assert describe_backbone(published.name, **published.options)["outputs"] == describe_backbone(backbone)["outputs"]


def test_what_pools_nothing_gives_its_class_token_and_no_pooler(tmp_path):
    backbone = load_backbone(field.virchow2(tmp_path / "net").name)
    with pytest.raises(OutputRefused, match="its network pools nothing"):
        backbone.offers("pooler")
    map_only = field.timm_folder(tmp_path / "map", "test_resnet", {"global_pool": ""}, 64)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), map_only / "pytorch_model.bin")
    backbone = load_backbone(str(map_only))
    assert (backbone.vector, backbone.refusals["gap"]) == (
        "mean",
        "its network pools nothing; mean is the average of its map",
    )


def test_a_file_in_its_folder_and_the_same_file_by_its_name_are_one_store(tmp_path):
    published = field.medsam(tmp_path)
    assert key(load_backbone(published.name)) == key(load_backbone(published.name, **published.options))


# how images are prepared


def sees(name: str, **options: str) -> str:
    return str(describe_backbone(name, **options)["sees"])


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (field.gigapath, "mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (timm's transform, as its config.json says)"),
        (field.uni_by_its_file, "std 0.229 0.224 0.225 (timm's transform, as its config.json says)"),
        (field.medsam, "64×64 squashed, bicubic, mean 0, std 1 (timm's transform, as its config.json says)"),
        (field.xrv, "grey, mean 0.5, std 0.0004883 (timm's transform, as its config.json says)"),
        (field.biomedclip, "mean 0.481 0.457 0.408, std 0.268 0.261 0.275 (open_clip's transform, as its open_clip_"),
        (field.conch, "192×192 from the centre, shortest edge resized to 192, bicubic, mean 0.481 0.457 0.408"),
        (field.phikon, "(the checkpoint's own processor)"),
        (field.rad_dino_of_facebook, "(the checkpoint's own processor)"),
        (field.medclip_swin, "(the checkpoint's own processor)"),
        (field.medclip_resnet, "(assumed, as torchvision's ResNet18_Weights.IMAGENET1K_V1 is fed: the file does not "
                               "say; --backbone python:MODULE:FACTORY would)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_is_said_beside_the_weights_is_used_and_what_is_assumed_is_said(write, line, tmp_path):
    published = write(tmp_path / "net")
    assert line in sees(published.name, **published.options)


def test_a_file_of_weights_alone_is_fed_as_its_name_is_and_that_is_said(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    assumed = (
        "(assumed, as timm:test_vit.r160_in1k is fed: the file does not say; a config.json of timm's beside it would)"
    )
    assert sees("timm:test_vit", weights=str(tmp_path / "w.pth")).endswith(assumed)
    field.phikon(tmp_path / "net")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "net" / "model.safetensors", tmp_path / "alone")
    file, name = str(tmp_path / "alone" / "model.safetensors"), str(tmp_path / "net")
    assert "does not say; a preprocessor_config.json beside it would)" in sees(name, weights=file)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "alone"
    )
    assert "mean 0.1, std 0.5 (the checkpoint's own processor)" in sees(name, weights=file)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_squares_are_fed_to_a_sam_as_its_own_processor_does(fit, tmp_path):
    published = field.sam_of_transformers(tmp_path)
    refuses(PreprocessingRefused, "longest edge to 64 pixels and pads .*--fit squash, or --fit pad", published.name)
    picture = Image.fromarray(probe(90, 90))
    ours = fed(load_backbone(published.name, fit=fit), picture)
    theirs = transformers.AutoImageProcessor.from_pretrained(published.name)(images=picture, return_tensors="pt")
    assert torch.allclose(ours, theirs["pixel_values"], atol=1e-6, rtol=0)
    edit_json(tmp_path / "preprocessor_config.json", pad_size={"height": 96, "width": 96})
    refuses(PreprocessingRefused, "resizes by ..longest_edge", published.name, fit=fit)


# what is refused, and what to type


def file_of(write, folder, name: str = "weights") -> str:
    """The file of weights alone, in another folder."""
    published = write(folder / "net")
    files = [published.options.get("weights", ""), *(folder / "net").glob("*.bin"), *(folder / "net").glob("model.s*")]
    path = next(Path(file) for file in files if file)
    return shutil.move(path, folder / f"{name}{path.suffix}")


@pytest.mark.parametrize(
    ("write", "name", "says"),
    [
        (field.medsam, "timm:test_vit", r"segment-anything's names: try --backbone timm:samvit_base_patch16$"),
        (field.medsam, "VIT", r"segment-anything's names: try --backbone timm:samvit_base_patch16$"),
        (field.sam_of_transformers, "timm:test_vit", r"the names of transformers' SAM: try --backbone hf:REPO"),
        (field.simmim, "timm:test_vit", r"the names of a Swin: try --backbone timm:swin_base_patch4_window7_224"),
        (field.pubmedclip_of_openai, "timm:test_resnet", r"OpenAI's CLIP: try --backbone timm:vit_base_patch16_clip"),
        (field.conch, "timm:test_vit", r"put its open_clip_config.json beside them, or one with \{.preprocess_cfg"),
        (field.virchow2, "timm:test_vit", r"with other arguments, write them down: a config.json beside the weights"),
        (field.xrv, "torchvision:densenet121", r"images of 1 channel, expected the 3 of RGB: .*python:MODULE:FACTORY"),
        (field.uni2, "VIT", r"timm's names of a vision transformer: try --backbone timm:"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_file_of_another_network_is_refused_with_what_to_type(write, name, says, tmp_path):
    weights = file_of(write, tmp_path)
    backbone = str(field.phikon(tmp_path / "vit").name) if name == "VIT" else name
    with pytest.raises(WeightsDoNotFit, match=says) as error:
        load_backbone(backbone, weights=weights)
    assert "\n" not in str(error.value)


def test_arguments_that_neither_settings_nor_tensors_say_are_asked_for(tmp_path):
    """UNI 2: how many heads share the width is in its card alone."""
    folder = Path(field.uni2(tmp_path / "net").name)
    edit_json(folder / "config.json", architecture="vit_tiny_patch16_224", model_args={})
    refuses(WeightsDoNotFit, r'write them down: a config.json beside the weights, with .*"model_args"', folder)


def test_a_whole_network_in_a_file_is_refused_with_how_to_make_a_state_dict_of_it(tmp_path):
    torch.save(field.XrvDenseNet(), tmp_path / "xrv.pt")
    says = r"holds a support.field_networks.XrvDenseNet; .*torch.save\(torch.load\('xrv.pt', weights_only=False\)"
    refuses(WeightsDoNotFit, says, "torchvision:densenet121", weights=tmp_path / "xrv.pt")


@pytest.mark.parametrize("mlp", ["torch.nn.Linear", "__doc__", 3])
def test_a_config_names_no_other_class_than_those_of_mlps(mlp, tmp_path):
    folder = Path(field.uni2(tmp_path / "net").name)
    edit_json(folder / "config.json", model_args={**field.UNI2, "mlp_layer": mlp})
    refuses(WeightsDoNotFit, "another mlp_layer than Mlp, GluMlp, SwiGLU, SwiGLUPacked", folder)


def test_windows_and_patches_of_another_size_are_never_fitted_unasked(tmp_path):
    published = field.simmim(tmp_path / "net")
    for window, size in ((4, None), (4, 64)):
        arguments = {**field.SWIN, "window_size": window, "img_size": size or 96}
        edit_json(tmp_path / "net" / "config.json", model_args=arguments)
        refuses(WeightsDoNotFit, r"relative_position_bias_table is \[121, 2\], expected \[49, 2\]", published.name,
                **published.options, image_size=size)  # fmt: skip
    state = timm.create_model("test_vit").state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(64, 3, 14, 14)
    torch.save(state, tmp_path / "w.pth")
    refuses(
        WeightsDoNotFit, r"patch_embed.proj.weight is \[64, 3, 14, 14\]", "timm:test_vit", weights=tmp_path / "w.pth"
    )


def test_tables_that_grow_with_the_image_grow_when_a_size_is_asked_for(tmp_path):
    small = {"img_size": (64, 64), "embed_dim": 32, "depth": 2, "num_heads": 2}
    field.timm_folder(tmp_path, "beit_base_patch16_224", {**small, "img_size": [64, 64]}, 64)
    torch.save(timm.create_model("beit_base_patch16_224", **small).state_dict(), tmp_path / "w.pth")
    large = load_backbone(str(tmp_path), weights=str(tmp_path / "w.pth"), image_size=96)
    assert (large.grid, large.position_embeddings) == ((6, 6), "interpolated (as timm does)")


def test_positions_that_timm_fits_to_the_size_of_a_config_are_said(tmp_path):
    field.timm_folder(tmp_path, "test_vit", {}, 224)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "pytorch_model.bin")
    assert load_backbone(str(tmp_path)).position_embeddings == "interpolated (as timm does)"


# repositories


@pytest.mark.parametrize(
    ("write", "form", "says"),
    [
        (field.uni, "hf:", "is a network of timm: --backbone timm:org/net"),
        (field.biomedclip, "hf:", "is a network of timm: --backbone timm:org/net"),
        (field.phikon, "hf-hub:", "is a checkpoint of transformers: --backbone hf:org/net"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_repository_under_the_other_librarys_form_is_answered_with_its_own(write, form, says, tmp_path, hub):
    put_in_cache(hub, Path(write(tmp_path / "net").name), "org/net")
    refuses(UnknownBackbone, says, f"{form}org/net")
    assert load_backbone(says.rpartition(" ")[2]).provenance["id"] == "org/net"


def test_an_open_clip_without_a_network_of_timm_is_refused(tmp_path):
    field.biomedclip(tmp_path)
    edit_json(tmp_path / "open_clip_config.json", model_cfg={"vision_cfg": {"layers": 12, "width": 768}})
    says = (
        r"open_clip's own and no network of timm; say which it is, such as --backbone timm:vit_base_patch32_clip_224 "
    )
    refuses(UnknownBackbone, f"{says}--weights ", tmp_path, weights=tmp_path / "open_clip_pytorch_model.bin")
    says = r"has no name in its open_clip_config.json; .*--backbone timm:vit_base_patch16_224 --weights \S+net"
    refuses(UnknownBackbone, says, field.conch(tmp_path / "net").options["weights"].rpartition("/")[0])


@pytest.mark.parametrize("weights", ["lone/weights.pth", "net"])
def test_a_refused_file_ends_the_command_with_2_before_the_images_are_looked_at(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lone").mkdir()
    shutil.copy(field.medsam(tmp_path / "net").options["weights"], tmp_path / "lone" / "weights.pth")
    options = ("--data", "digits", "--limit", 4, "--dry-run")
    result = call("extract", "--backbone", "timm:test_vit", "--weights", weights, *options)
    assert (result.exit_code, result.stderr.count("error: ")) == (2, 1)
    assert "samvit_base_patch16" in result.stderr
