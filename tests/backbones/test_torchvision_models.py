"""Networks of torchvision: the map that is pooled and the vector that the classifier receives, against the network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.backbone_checks import as_rows, assert_same, fed, key, outputs, refuses
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.base import PooledMap
from featurecache.backbones.processors import probe
from featurecache.errors import BadOption, OutputRefused, WeightsDoNotFit, WeightsNotFound

SMALL = (
    "resnet50 densenet121 convnext_tiny efficientnet_b0 mobilenet_v2 mobilenet_v3_small googlenet mnasnet0_5 "
    "shufflenet_v2_x0_5 regnet_y_400mf swin_t"
)
UNCHANGED = ("resnet50", "densenet121", "efficientnet_b0", "swin_t")  # nothing stands between pooling and classifier
UNPOOLED = ("alexnet", "vgg", "squeezenet")


@pytest.mark.parametrize("name", SMALL.split())
def test_gap_through_the_networks_own_classifier_gives_its_logits(name):
    backbone = load_backbone(f"torchvision:{name}", random_weights=True, image_size=64)
    network, pixels = backbone.model.network, torch.rand(2, 3, 64, 64)
    gap, tokens = outputs(backbone, pixels, "gap", "tokens")
    classifier = list(network.children())[-1]
    layers = [classifier] if isinstance(classifier, nn.Linear) else list(classifier)
    first = next(k for k, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    with torch.no_grad():
        assert torch.allclose(nn.Sequential(*layers[first:])(gap), network(pixels), atol=1e-6)
    assert tokens.shape == (2, backbone.grid[0] * backbone.grid[1], backbone.width)
    assert gap.shape == (2, backbone.width)
    if name in UNCHANGED:
        assert_same(tokens.mean(1), gap)


@pytest.mark.integration
def test_resnet50_gives_what_torchvisions_own_feature_extraction_gives_for_one_pil_image_at_a_time():
    backbone = load_backbone("resnet50", random_weights=True, seed=3)
    torch.manual_seed(3)
    extractor = create_feature_extractor(models.resnet50().eval(), {"layer4": "map", "flatten": "gap"})
    transforms = models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    pictures = [Image.fromarray(probe(37, 53)), Image.fromarray(probe(70, 41))]
    gap, tokens = outputs(backbone, torch.cat([fed(backbone, each) for each in pictures]), "gap", "tokens")
    for k, picture in enumerate(pictures):
        with torch.no_grad():
            expected = extractor(transforms(picture)[None])
        assert_same(gap[k : k + 1], expected["gap"])
        assert_same(tokens[k : k + 1], as_rows(expected["map"]))


def test_densenet121_is_read_after_its_last_relu():
    backbone = load_backbone("densenet121", random_weights=True, image_size=64, seed=1)
    torch.manual_seed(1)
    network, pixels = models.densenet121().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = torch.relu(network.features(pixels))
    gap, tokens = outputs(backbone, pixels, "gap", "tokens")
    assert_same(tokens, as_rows(expected))
    assert_same(gap, expected.mean((2, 3)))


def test_a_vit_gives_its_encoders_output():
    backbone = load_backbone("torchvision:vit_b_32", random_weights=True, image_size=64)
    network, pixels = backbone.model.network, torch.rand(1, 3, 64, 64)
    tokens, last, second = outputs(backbone, pixels, "tokens", "tokens@-1", "tokens@-2")
    with torch.no_grad():
        assert torch.allclose(network.heads(tokens[:, 0]), network(pixels), atol=1e-6)
        x = torch.cat([network.class_token, as_rows(network.conv_proj(pixels))], 1) + network.encoder.pos_embedding
        for layer in network.encoder.layers[:-1]:
            x = layer(x)
        assert_same(second, network.encoder.ln(x))
    assert torch.equal(last, tokens) and "gap" in backbone.refusals
    assert (backbone.vector, backbone.prefix, backbone.grid, backbone.layers) == ("cls", ("cls",), (2, 2), 12)
    assert backbone.position_embeddings == "interpolated (bicubic, corners aligned)"


def test_a_network_that_pools_nowhere_is_refused():
    with pytest.raises(OutputRefused, match="the map that it pools was not found"):
        PooledMap("odd", nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"])


def test_a_network_that_takes_no_other_size_says_so():
    with pytest.raises(BadOption, match=r"maxvit_t does not take images of 100×100"):
        describe_backbone("torchvision:maxvit_t", image_size=100)


OFTEN = ("resnet18", "resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16",
         "alexnet", "vgg11", "squeezenet1_0")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in models.list_models(module=models)],
)
def test_every_classifier_is_described_or_refused_by_name(name):
    if name.startswith("regnet") and name.endswith(("16gf", "32gf", "128gf")):
        pytest.skip("a RegNet is built with its parameters: the largest take gigabytes, the small ones are the same")
    if name.startswith(UNPOOLED):
        with pytest.raises(OutputRefused, match=rf"torchvision:{name} cannot be a backbone"):
            describe_backbone(f"torchvision:{name}")
        return
    published = models.get_model_weights(name).DEFAULT.meta["num_params"]
    expected = 23_834_568 if name == "inception_v3" else published  # without its auxiliary head
    assert describe_backbone(f"torchvision:{name}")["parameters"] == expected


# weights


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder, and no way to any server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_that_are_neither_here_nor_to_be_had_give_the_three_ways_out(torch_home):
    says = r"ResNet18_Weights.IMAGENET1K_V1(?s:.*)curl -LO https:(?s:.*)--weights resnet18-\w+[.]pth(?s:.*)TORCH_HOME=…"
    refuses(WeightsNotFound, says, "resnet18")
    assert socket.getdefaulttimeout() is None


def test_a_download_that_came_damaged_is_said(monkeypatch, torch_home):
    def damaged(*_, **__):
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", damaged)
    refuses(WeightsNotFound, "came damaged .invalid hash value", "torchvision:resnet18")


def test_weights_come_from_torch_hubs_folder(torch_home):
    network = models.resnet18()
    torch.save(network.state_dict(), torch_home / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name)
    backbone, pixels = load_backbone("resnet18"), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(backbone.model.network(pixels), network.eval()(pixels))
    assert backbone.provenance["revision"] == "resnet18-f37072fd.pth"


@pytest.mark.integration
def test_fine_tuned_to_other_classes_or_cut_off_it_is_the_same_backbone(tmp_path):
    state = models.resnet18().state_dict()
    files = [
        state,
        {**state, "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)},
        {name: tensor for name, tensor in state.items() if not name.startswith("fc.")},
    ]
    keys = set()
    for tensors in files:
        torch.save(tensors, tmp_path / "w.pt")
        keys.add(key(load_backbone("torchvision:resnet18", weights=str(tmp_path / "w.pt"))))
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("resnet34", "hold layer1.2.bn1.bias.*which it has not"),
        ("resnet50", "other shapes"),
        ("densenet121", "lack bn1.bias"),
    ],
)
def test_weights_of_another_network_are_refused(of, says, tmp_path):
    torch.save(models.get_model(of, weights=None).state_dict(), tmp_path / "w.pt")
    says = rf"not of torchvision's resnet18: they .*{says}"
    refuses(WeightsDoNotFit, says, "torchvision:resnet18", weights=tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["mnasnet0_5", "googlenet"])
def test_weights_of_networks_with_versions_or_auxiliary_classifiers_are_read(name, tmp_path):
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    save_file(dict(models.get_model(name, weights=None, **options).state_dict()), tmp_path / "w.safetensors")
    backbone = load_backbone(f"torchvision:{name}", weights=str(tmp_path / "w.safetensors"), image_size=64)
    assert "blake2b" in backbone.weights
    assert (name == "googlenet") == (backbone.architecture["config"] == {"transform_input": True})
