"""What a checkpoint holds: which set of weights, under which prefix, in whose names, and what is set aside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints as save
from support.backbone_checks import assert_same, key, outputs, refuses
from support.checkpoints import renamed, under, wide
from support.field_networks import facebook_names
from support.small_hub import put_in_cache
from torchvision import models

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.state_dicts import foreign_names, other_shapes, select_state_dict
from featurecache.errors import WeightsDoNotFit

timm = pytest.importorskip("timm")
VIT, RESNET = "timm:test_vit", "timm:test_resnet"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(name: str = "test_vit", seed: int = 0, **arguments: Any) -> Any:
    return wide(timm.create_model(name, **arguments), seed)


def state(seed: int = 0, name: str = "test_vit", **arguments: Any) -> dict[str, torch.Tensor]:
    tensors = network(name, seed, **arguments).state_dict()
    return {key: value for key, value in tensors.items() if not key.startswith("head.")}


def load(content: Any, name: str = VIT, choice: str = "", **options: Any) -> Any:
    torch.save(content, "w.pth")
    return load_backbone(name, weights=f"w.pth{choice}", **options)


def notes(backbone: Any) -> str:
    return str(backbone.provenance["weights"])


# several sets of weights

A, B = state(0), state(1)
SEVERAL = [  # (what a file holds, set 0 being the one that is taken; what is said; what chooses the other)
    ({"state_dict": B, "state_dict_ema": A}, "state_dict_ema (timm's choice; also there: state_dict", ":state_dict"),
    ({"model": B, "model_ema": A}, "model_ema (timm's choice; also there: model", ":model"),
    ({"student": under("module.backbone.", B), "teacher": under("backbone.", A)}, "teacher (DINO's choice", ":student"),
    ({"encoder": B, "target_encoder": A, "prototypes": torch.zeros(3, 2)}, "the choice of MSN and I-JEPA", ":encoder"),
    (
        {"state_dict": under("module.encoder_k.", B) | under("module.encoder_q.", A)},
        "under encoder_q. (MoCo's choice; also there: encoder_k; --weights w.pth:encoder_k)",
        ":encoder_k",
    ),
    (under("student.backbone.", B) | under("teacher.backbone.", A), "under teacher.backbone. (DINO's", ":student"),
    ({"state_dict": under("model.", B) | under("ema_model.module.", A)}, "timm's choice; also there: model", ":model"),
    (A | under("momentum.", B), "under no prefix (also there: momentum", ":momentum"),
]


@pytest.mark.parametrize(("content", "says", "other"), SEVERAL)
def test_two_sets_of_weights_in_a_file_are_said_and_can_be_chosen(content, says, other):
    expected, second = load(A).weights, load(B).weights
    taken = load(content)
    assert taken.weights == expected and says in notes(taken)
    chosen = load(content, choice=other)
    assert chosen.weights == second and f"{other[1:]}, as asked" in notes(chosen)
    assert key(load_backbone(**chosen.provenance["request"])) == key(chosen)


def test_sets_of_which_nothing_says_which_is_meant_are_asked_about():
    torch.save({"left": A, "right": B}, "a.pth")
    torch.save(under("left.", A) | under("right.", B), "b.pth")
    refuses(WeightsDoNotFit, r"2 state dicts \(left, right\).*--weights a.pth:left", VIT, weights="a.pth")
    refuses(WeightsDoNotFit, r"2 times, as left\., right\..*--weights b.pth:left", VIT, weights="b.pth")
    assert load_backbone(VIT, weights="b.pth:right").weights == load(B).weights


def test_a_set_that_is_not_there_is_named_with_those_that_are():
    torch.save({"state_dict": A, "state_dict_ema": B}, "w.pth")
    refuses(WeightsDoNotFit, r'no weights "teacher"; there are .*state_dict', VIT, weights="w.pth:teacher")


def test_a_file_with_a_colon_in_its_name_is_that_file():
    torch.save({"state_dict": A, "state_dict_ema": B}, "w:state_dict.pth")
    assert load_backbone(VIT, weights="w:state_dict.pth").weights == load(B).weights


def test_optimizers_and_small_dicts_beside_the_weights_are_no_second_set():
    content = {"model": A, "optimizer": {"state": {}}, "dino_loss": {"center": torch.zeros(1)}, "scaler": {"scale": 1}}
    assert load(content).weights == load(A).weights and notes(load(content)) == ""


@pytest.mark.parametrize(
    "beside", [{"state_dict": {"epoch": 3}}, {"state_dict": {"hyper": {"lr": 1}}, "module": {"n": 1}}]
)
def test_of_the_usual_names_one_that_holds_tensors_is_taken(beside):
    assert load({**beside, "model": A}).weights == load(A).weights


@pytest.mark.parametrize("name", ["", "model", "state_dict"])
def test_a_wrapper_inside_another_is_opened(name):
    content = {"model": {"state_dict": {"a.weight": torch.ones(2)}, "epoch": 3}, "optimizer": {"lr": 0.1}}
    assert list(select_state_dict(Path("w.pt"), content, name).tensors) == ["a.weight"]


def test_info_says_what_a_file_of_weights_holds():
    torch.save({"state_dict": A, "state_dict_ema": B}, "w.pth")
    assert "state_dict_ema (timm's choice" in describe_backbone(VIT, weights="w.pth")["weights"]
    assert describe_backbone(VIT)["weights"] == ""


# prefixes and spellings


def densenet_of_chexnet(net: Any) -> dict[str, torch.Tensor]:
    """Names of before torchvision 0.3 and torch 0.4.1, in DataParallel, in a class of one's own."""
    skipped = ("num_batches_tracked", "classifier.weight", "classifier.bias")
    tensors = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith(skipped)}
    head = {"classifier.0.weight": torch.zeros(14, 1024), "classifier.0.bias": torch.zeros(14)}
    return under("module.densenet121.", renamed(tensors, (r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.")) | head)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["torchvision:densenet121", "timm:densenet121"])
def test_chexnet_as_published_is_read(name):
    torch.manual_seed(0)
    net = models.densenet121(weights=None).eval()
    read = load({"epoch": 1, "state_dict": densenet_of_chexnet(net), "best_loss": 0.1}, name)
    pixels = torch.rand(1, 3, 64, 64)
    expected = torch.relu(net.features(pixels)).mean((2, 3))
    assert_same(outputs(read, pixels, "gap")[0], expected.detach())
    assert "names of DenseNet before torchvision 0.3" in notes(read) and "under densenet121." in notes(read)


def test_the_prefix_is_that_of_most_names_not_of_the_longest():
    longest = max(A, key=len)
    read = load(under("net.", A) | {f"loss.copy.{longest}": A[longest]})
    assert read.weights == load(A).weights
    assert f"1 tensors set aside: loss.copy.{longest}" in notes(read)


RESNET18 = models.resnet18().state_dict()


def sequential(net: Any) -> dict[str, torch.Tensor]:
    """Without its classifier, as RadImageNet publishes its networks and lightly's examples make theirs."""
    return torch.nn.Sequential(*list(net.children())[:-1]).state_dict()


def wrapped(tensors: dict[str, torch.Tensor], word: str, depth: int) -> dict[str, torch.Tensor]:
    """As names are where a submodule at this depth was compiled or sharded by itself."""
    return renamed(tensors, (rf"^((?:\w+\.){{{depth}}})(?=\w+\.\w)", rf"\1{word}."))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (under("backbone.", sequential(models.resnet18())), "names of a Sequential of its children"),
        ({"state_dict": sequential(models.resnet18()) | {"projector.0.weight": torch.ones(1)}}, "set aside: projector"),
        (under("_orig_mod.", RESNET18), "the network under _orig_mod."),
        (wrapped(RESNET18, "_orig_mod", 1), "names of compiled, sharded or checkpointed parts"),
        ({"model": under("_fsdp_wrapped_module.", wrapped(RESNET18, "_fsdp_wrapped_module", 2))}, "sharded"),
        ({"state_dict": under("model.backbone.", RESNET18) | {"criterion.weight": torch.ones(2)}}, "model.backbone."),
    ],
    ids=["RadImageNet", "lightly", "compiled", "compiled parts", "sharded", "lightning"],
)
def test_a_resnet_in_the_names_of_what_trained_it_is_read_value_by_value(name, content, says):
    flat = [tensors for tensors in (content, *content.values()) if isinstance(tensors, dict)][-1]
    read = load(content, name)
    own = read.model.network.state_dict()
    assert says in notes(read) and {*own} <= {*RESNET18}
    places = enumerate(["conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4"])
    wrappers = (r"(model|backbone|_orig_mod|_fsdp_wrapped_module)\.", "")
    by_name = renamed(flat, wrappers, *((rf"^{number}\.", f"{place}.") for number, place in places))
    for key_, tensor in own.items():
        assert key_.startswith("fc.") or torch.equal(tensor, by_name[key_]), key_


@pytest.mark.integration
def test_a_densenet_that_radimagenet_cut_is_read():
    net = models.densenet121()
    read = load(under("backbone.", sequential(net)), "torchvision:densenet121")
    assert torch.equal(read.model.network.features.denseblock3.denselayer5.conv2.weight,
                       net.features.denseblock3.denselayer5.conv2.weight)  # fmt: skip


def test_two_sets_that_begin_alike_are_told_apart_by_the_whole_name():
    content = {"state_dict": under("backbone.", A) | under("backbone_momentum.", B)}
    torch.save(content, "w.pth")
    refuses(WeightsDoNotFit, r"2 times, as backbone\., backbone_momentum\.", VIT, weights="w.pth")
    assert load(content, choice=":backbone").weights == load(A).weights
    inner = under("backbone.", A) | under("head.backbone.", {"x.weight": torch.ones(1)})
    assert load(inner, choice=":backbone").weights == load(A).weights


def test_block_chunks_of_dinov2s_training_are_read():
    chunked = renamed(A, (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    read = load({"teacher": under("backbone.", chunked) | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}})
    assert read.weights == load(A).weights
    assert "names of DINOv2's training" in notes(read) and "set aside: dino_head.mlp.0.weight" in notes(read)


@pytest.mark.integration
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", ["", "0."])
def test_facebooks_own_file_of_dinov2_is_the_same_store_as_the_hubs(registers, chunks, tmp_path):
    folder = save.save_dinov2(tmp_path / "d", registers)
    content = facebook_names(load_file(folder / "model.safetensors"), chunks)
    assert f"blocks.{chunks}0.ls1.gamma" in content and not any("encoder" in name for name in content)
    read = load(content, str(folder))
    assert key(read) == key(load_backbone(str(folder)))
    assert "names of facebook's DINOv2" in notes(read)


@pytest.mark.integration
def test_a_student_and_a_teacher_of_transformers_are_chosen_between(tmp_path):
    first, second = (load_backbone(str(save.save_vit(tmp_path / str(n), seed=n))) for n in (0, 1))
    published = [load_file(tmp_path / name / "model.safetensors") for name in "01"]
    content = under("student.vit.", published[0]) | under("teacher.vit.", published[1])
    assert load(content, str(tmp_path / "0")).weights == second.weights
    assert load(content, str(tmp_path / "0"), ":student").weights == first.weights


# beside the network


def test_an_mae_with_its_decoder_is_its_encoder():
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 2, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_pred.bias": torch.zeros(8)}
    read = load({"model": A | decoder, "optimizer": {}, "epoch": 799})
    assert read.weights == load(A).weights
    assert "4 tensors set aside: decoder_blocks.0.norm1.weight" in notes(read)


@pytest.mark.parametrize("extra", ["head.mlp.0.weight", "fc.fc1.weight", "projector.0.weight", "queue"])
def test_projection_heads_and_queues_are_set_aside_and_said(extra):
    read = load(A | {extra: torch.zeros(2, 2)})
    assert read.weights == load(A).weights and f"1 tensors set aside: {extra}" in notes(read)


@pytest.mark.parametrize("extra", ["blocks.9.norm1.weight", "reg_token", "norm_pre.weight"])
def test_what_would_change_the_features_is_not_set_aside(extra):
    torch.save(A | {extra: torch.zeros(2)}, "w.pth")
    refuses(WeightsDoNotFit, re.escape(extra), VIT, weights="w.pth")


def test_a_fine_tuned_mae_is_the_network_with_the_mean_of_its_patches():
    net = network(num_classes=5, global_pool="avg").eval()
    read = load({"model": net.state_dict()})
    pixels = torch.rand(2, 3, 160, 160)
    tokens = net.forward_features(pixels)
    assert_same(outputs(read, pixels, "pooler")[0], net.forward_head(tokens, pre_logits=True).detach())
    assert "the network with global_pool='avg'" in notes(read) and read.vector == "pooler"
    assert read.architecture["config"] == {"global_pool": "avg"}
    assert describe_backbone(VIT, weights="w.pth")["vector"] == "pooler"


# what cannot be


@pytest.mark.parametrize(("name", "tensors"), [(VIT, A), ("torchvision:resnet18", RESNET18)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(name, tensors, value):
    worst = next(name for name in tensors if name.endswith("weight"))
    torch.save(tensors | {worst: torch.full_like(tensors[worst], value)}, "w.pth")
    refuses(WeightsDoNotFit, rf"NaN or infinite numbers in {re.escape(worst)}", name, weights="w.pth")


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("torchvision:resnet18", lambda: RESNET18 | {"conv1.weight": torch.zeros(64, 1, 7, 7)}),
        (VIT, lambda: state(in_chans=1)),
        (RESNET, lambda: state(0, "test_resnet", in_chans=1)),
    ],
)
def test_a_network_of_grey_images_is_refused_with_why(name, tensors):
    torch.save(tensors(), "w.pth")
    says = r"images of 1 channel, expected the 3 of RGB: .*--backbone python:MODULE:FACTORY"
    refuses(WeightsDoNotFit, says, name, weights="w.pth")


def test_a_shape_that_differs_otherwise_says_nothing_of_channels():
    words = other_shapes({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, {"a": torch.zeros(2, 4), "b": torch.zeros(2)})
    assert words == ["a is [2, 3], expected [2, 4]"]


@pytest.mark.integration
def test_where_another_form_would_take_a_file_the_sentence_says_so(tmp_path):
    vit, folder = timm.create_model("vit_tiny_patch16_224").state_dict(), save.save_vit(tmp_path / "v")
    torch.save(vit, "timm.pth")
    refuses(WeightsDoNotFit, r"--backbone timm:vit_tiny_patch16_224$", str(folder), weights="timm.pth")
    refuses(WeightsDoNotFit, r"--backbone timm:vit_tiny_patch16_224$", "torchvision:vit_b_16", weights="timm.pth")
    refuses(
        WeightsDoNotFit, r"names of transformers: try --backbone hf:REPO", VIT, weights=folder / "model.safetensors"
    )


def test_names_that_no_library_has_suggest_nothing():
    assert foreign_names({"body.0.weight": torch.zeros(1)}, "timm") == ""
    assert foreign_names({"blocks.0.attn.qkv.weight": torch.zeros(6, 2)}, "hf").endswith("--backbone timm:NAME")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {1: torch.zeros(1)}, {"a": 1}, {"state_dict": {"x": 1}}], ids=str
)
def test_what_holds_no_tensors_is_no_checkpoint(content):
    with pytest.raises(WeightsDoNotFit, match="expected a state dict"):
        select_state_dict(Path("w.pth"), content)


def test_hf_hub_names_are_timms(tmp_path, hub):
    timm.models.save_for_hf(network(), str(tmp_path / "repo"))
    put_in_cache(hub, tmp_path / "repo", "org/vit")
    keys = {key(load_backbone(f"{form}org/vit")) for form in ("timm:", "hf-hub:", "timm:hf-hub:", "timm:hf_hub:")}
    assert len(keys) == 1
