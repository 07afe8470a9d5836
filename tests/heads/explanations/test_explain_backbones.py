"""Where a backbone looks, and Grad-CAM: beside numbers worked by hand, the libraries' own, and planted squares."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.checkpoints import save_dinov2
from support.squares import on_square, squares
from torch import nn
from transformers import AutoModel

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone, Tokens
from featurecache.backbones.user_module import FeatureTap
from featurecache.errors import BadOption
from featurecache.extraction import forward
from featurecache.outputs import members
from heads.explanations.explainer import Explainer
from heads.explanations.maps import class_margin_weights
from heads.explanations.methods import (
    EndToEnd,
    Transformer,
    attention_maps,
    attention_of,
    check_extra,
    grad_cam_maps,
    layer_of,
    rollout,
)
from heads.models.catalogue import make_network
from heads.models.finetune import save_backbone
from heads.settings import Settings
from heads.task import Standardize


class Block(nn.Module):
    """A class token and two patches; query and key by hand, values as they are."""

    def __init__(self, query_and_key: torch.Tensor) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, bias=False, batch_first=True)
        eye = torch.eye(2)
        self.attention.in_proj_weight = nn.Parameter(torch.cat([query_and_key, eye, eye]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Three(nn.Module):
    """Pixels [B,3,1,2] -> three tokens: class token (1, 0), then each pixel's red and green."""

    def __init__(self, *blocks: torch.Tensor) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(each) for each in blocks))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.tensor([1.0, 0.0]).expand(len(pixels), 1, 2)
        return self.blocks(torch.cat([first, pixels[:, :2, 0].transpose(1, 2)], 1))


def backbone_of(network: nn.Module, prefix: tuple[str, ...] = ("cls",), grid=(1, 2), width: int = 2) -> Backbone:
    model = Tokens(network, "blocks", "", {}, output="blocks").eval().requires_grad_(False)
    return Backbone(
        "three", model, {}, {}, None, (1, 2), "none", prefix, grid, width, 2, "cls", False, 0, {}, {}
    )  # type: ignore[arg-type]  # fmt: skip


def test_three_tokens_worked_by_hand():
    """Ã = (A + I)/2. With A_1 = [[.5,.3,.2],[.1,.8,.1],[.2,.2,.6]] and A_2 = [[.2,.4,.4],[0,1,0],[.5,0,.5]]:
    Ã_2's first row (.6, .2, .2) times Ã_1 = [[.75,.15,.1],[.05,.9,.05],[.1,.1,.8]] is (.48, .29, .23)."""
    first = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])
    second = torch.tensor([[[0.2, 0.4, 0.4], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]])
    assert rollout([first, second])[0, 0].tolist() == pytest.approx([0.48, 0.29, 0.23])


def test_the_class_token_looks_at_the_patch_that_is_like_it():
    """One block: the class token asks for (1, 0)·2 in units of 1/√2; the left pixel has (ln 3 · √2 / 2, 0), the right
    one (0, 5), so exp of the scores are e^√2, 3 and 1."""
    backbone = backbone_of(Three(2 * torch.eye(2)))
    pixels = torch.zeros(1, 3, 1, 2)
    pixels[0, 0, 0, 0], pixels[0, 1, 0, 1] = np.log(3) * np.sqrt(2) / 2, 5
    ((last, rolled),) = attention_maps(Transformer.of_backbone(backbone), pixels)
    total = np.exp(np.sqrt(2)) + 3 + 1
    assert last.values == pytest.approx(np.array([[3 / total, 1 / total]]), abs=1e-6)
    assert rolled.values == pytest.approx(last.values / 2) and rolled.beside["class token"] > 0.5
    assert all("same for every head and class" in each.how for each in (last, rolled))


def test_registers_take_part_in_the_product_and_are_left_off_the_map(tmp_path):
    folder = save_dinov2(tmp_path, registers=2)
    backbone = load_backbone(f"hf:{folder}")
    x = torch.rand(1, 3, 42, 42)
    ((last, rolled),) = attention_maps(Transformer.of_backbone(backbone), x)
    own = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        layers = [a.mean(1) for a in own(x, output_attentions=True).attentions]
    assert last.values == pytest.approx(layers[-1][0, 0, 3:].reshape(6, 6).numpy(), abs=1e-6)
    product = torch.eye(39)
    for a in layers:
        product = (0.5 * a[0] + 0.5 * torch.eye(39)) @ product
    assert rolled.values == pytest.approx(product[0, 3:].reshape(6, 6).numpy(), abs=1e-6)
    assert rolled.beside["tokens beside it"] == pytest.approx(float(product[0, 1:3].sum()), abs=1e-6)
    assert backbone.model.network.config._attn_implementation != "eager", "features are computed as they were"


def test_attention_of_timm_is_that_of_its_queries_and_keys():
    pytest.importorskip("timm")
    backbone = load_backbone("timm:vit_tiny_patch16_224", random_weights=True, image_size=32)
    x = torch.rand(1, 3, 32, 32)
    seen = {}
    block = backbone.model.network.blocks[-1].attn
    handle = block.qkv.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    layers = attention_of(Transformer.of_backbone(backbone), x)
    handle.remove()
    q, k, _ = seen["qkv"].reshape(1, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 8).softmax(-1).mean(1)
    assert len(layers) == 12 and torch.allclose(layers[-1], expected, atol=1e-6)
    assert block.fused_attn == type(block)(192, 3).fused_attn, "left as it was"


def test_attention_of_a_tuned_network_is_that_of_the_backbone_it_was_saved_as(tmp_path):
    model = make_network(Settings(f"finetune:hf:{save_dinov2(tmp_path, registers=2)}", rlrr=True), 42, 3).eval()
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    x = torch.rand(1, 3, 42, 42)
    ((last, rolled),) = attention_maps(Transformer.of_run("tuned", model), x)
    save_backbone(model, tmp_path / "saved")
    own = AutoModel.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = own(x, output_attentions=True).attentions[-1].mean(1)[0, 0, 3:]
    assert last.values == pytest.approx(expected.reshape(6, 6).numpy(), abs=1e-5)
    assert expected.std() > 1e-3 and rolled.values.shape == (6, 6)
    assert "the same for every class" in last.how and "head" not in last.how.partition(":")[2]


def test_attention_of_the_small_vit_trained_from_scratch_is_that_of_its_queries_and_keys():
    model = make_network(Settings("vit-cifar"), 32, 2).eval()
    seen = {}
    block = model.network.blocks[-1]
    handle = block.norm1.register_forward_hook(lambda m, i, out: seen.update(x=out))
    layers = attention_of(Transformer.of_run("vit-cifar", model), torch.rand(2, 3, 32, 32))
    handle.remove()
    q, k, _ = block.self_attn.in_proj_weight.chunk(3)
    b, c, _ = block.self_attn.in_proj_bias.chunk(3)
    q, k = ((seen["x"] @ w.T + v).unflatten(2, (8, 16)).transpose(1, 2) for w, v in ((q, b), (k, c)))
    expected = (q @ k.transpose(2, 3) / 4).softmax(-1).mean(1)
    assert len(layers) == 6 and torch.allclose(layers[-1], expected, atol=1e-6)


def test_a_network_from_pixels_is_explained_where_it_is_asked_for_and_is_back_afterwards(monkeypatch):
    """A device that only renames: what is sent there, and what comes back, is written down."""
    model, steps = make_network(Settings("vit-cifar"), 32, 2).eval(), []
    monkeypatch.setattr(forward, "pick_device", lambda name: steps.append(name) or torch.device("meta"))
    config = {"spec": {"kind": "pixels"}, "view": {}}
    explainer = Explainer(SimpleNamespace(model=model, config=config), None, device="cuda:1")
    monkeypatch.setattr(nn.Module, "to", lambda self, device: steps.append(device))
    monkeypatch.setattr(nn.Module, "cpu", lambda self: steps.append("back"))
    with pytest.raises(ValueError), explainer._there(model) as device:
        steps.append(f"on {device}")
        raise ValueError
    assert steps == ["cuda:1", "meta", "on meta", "back"]


@pytest.mark.parametrize(
    "backbone, words",
    [(backbone_of(Three(torch.zeros(2, 2)), prefix=()), "no class token"),
     (backbone_of(nn.Sequential(OrderedDict(blocks=nn.Flatten(2)))), "cannot be read")],
)  # fmt: skip
def test_attention_that_is_not_there_or_cannot_be_read_is_refused(backbone, words):
    with pytest.raises(BadOption, match=words):
        attention_maps(Transformer.of_backbone(backbone), torch.rand(1, 3, 1, 2))


def test_a_cnn_trained_from_pixels_has_no_attention():
    model = make_network(Settings("cnn-cifar"), 32, 2)
    with pytest.raises(BadOption, match="cnn-cifar has no class token"):
        attention_maps(Transformer.of_run("cnn-cifar", model), torch.rand(1, 3, 32, 32))


def test_grad_cam_of_a_linear_head_on_gap_is_class_activation_mapping():
    """The gradient of w·gap is w/(h·w) at every place, so the map is the positive part of w·f/(h·w)."""
    pytest.importorskip("pytorch_grad_cam")
    backbone = load_backbone("torchvision:resnet18", random_weights=True, image_size=64)
    head, x = nn.Linear(512, 3), torch.rand(2, 3, 64, 64)
    toward = class_margin_weights(np.array([0, 2]), 3, 1.0, False)
    whole = EndToEnd(backbone, members("gap"), Standardize(), head)
    maps = grad_cam_maps(whole, layer_of(backbone, members("gap")), x, toward, backbone.grid, 0)
    tokens = backbone.forward(x, {"tokens"})["tokens"]  # [2, h·w, 512]
    expected = (tokens @ (toward @ head.weight)[:, :, None])[..., 0].clamp_min(0).view(2, 2, 2).detach() / 4
    assert np.stack([each.values for each in maps]) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_transformer_is_looked_at_before_its_last_block(tmp_path):
    """Behind the last block a head on the class token gives the patches no gradient at all."""
    pytest.importorskip("pytorch_grad_cam")
    backbone = load_backbone(f"hf:{save_dinov2(tmp_path, registers=2)}")
    whole = EndToEnd(backbone, members("cls"), Standardize(), nn.Linear(32, 2))
    layer, toward = layer_of(backbone, members("cls")), torch.tensor([[1.0, -1.0]])
    x = torch.rand(1, 3, 42, 42)
    (found,) = grad_cam_maps(whole, layer, x, toward, backbone.grid, 3)
    (other,) = grad_cam_maps(whole, layer, x, -toward, backbone.grid, 3)
    assert layer[0] is backbone.model.network.encoder.layer[-1].norm1
    assert found.values.shape == (6, 6) and (found.values + other.values > 0).any()
    assert not ((found.values > 0) & (other.values > 0)).any(), "what speaks for one of two speaks against the other"


def test_grad_cam_looks_before_the_norm_of_tokens_not_of_the_pixels_within_them():
    layer, _ = layer_of(load_backbone("timm:tnt_s_legacy_patch16_224", random_weights=True), members("cls"))
    assert layer.normalized_shape == (384,)  # a block begins with the norm of its 24 channels of pixels


def test_grad_cam_of_a_cnn_trained_here_peaks_on_the_square_that_decides():
    pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    images, labels, _ = squares(256, 1)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5, torch.from_numpy(labels)
    steps = torch.optim.Adam(network.parameters(), 5e-3)
    for epoch in range(12):
        for part in torch.randperm(256, generator=torch.Generator().manual_seed(epoch)).split(32):
            steps.zero_grad()
            nn.functional.cross_entropy(network(x[part]), y[part]).backward()
            steps.step()
    images, labels, corners = squares(50, 2)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5
    called = network.eval()(x).argmax(1).numpy()
    assert (called == labels).all()
    maps = grad_cam_maps(network, (network[4], "output"), x, class_margin_weights(called, 2, 1.0, False), None, 0)
    hits = sum(on_square(each.peak, (16, 16), corner) for each, corner in zip(maps, corners, strict=True))
    assert hits >= 45, hits


def test_a_network_of_ones_own_is_looked_at_where_its_output_is_kept():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    backbone = replace(backbone_of(nn.Identity()), model=FeatureTap("python:nets:make", network, "1"))
    assert layer_of(backbone, members("gap")) == (network[1], "output")
    with pytest.raises(BadOption, match="is not known"):
        layer_of(backbone, members("cls"))


def test_blocks_without_a_norm_have_no_grad_cam():
    with pytest.raises(BadOption, match="the blocks of three have no norm"):
        layer_of(backbone_of(Three(torch.zeros(2, 2))), members("cls"))


def test_grad_cam_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[explain\]'"):
        check_extra()


def test_a_layer_that_the_margin_does_not_depend_on_has_no_map():
    pytest.importorskip("pytorch_grad_cam")

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.fc = nn.Conv2d(3, 2, 1), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aside(x)
            return self.fc(x.mean((2, 3)))

    network = Aside()
    with pytest.raises(BadOption, match="does not depend"):
        grad_cam_maps(network, (network.aside, "output"), torch.rand(1, 3, 4, 4), torch.ones(1, 2), None, 0)
