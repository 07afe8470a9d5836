"""Sentences that need an odd network, an odd hub or an odd file, one by one."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from support import checkpoints as save
from support.backbone_checks import edit_json, refuses
from support.user_nets import SAYS
from torch import nn

from featurecache.backbones import load_backbone
from featurecache.backbones.base import PooledMap
from featurecache.backbones.timm_outputs import output_traits
from featurecache.backbones.weights import library_errors
from featurecache.errors import BadOption, OutputRefused, PreprocessingRefused, UnknownBackbone, WeightsDoNotFit
from featurecache.errors import WeightsNotFound as NotFound
from featurecache.extraction.plan import prepare


def test_a_backbone_is_named_by_a_text_or_a_path_and_its_outputs_by_their_names():
    with pytest.raises(BadOption, match="not by int"):
        load_backbone(3)  # type: ignore[arg-type]
    with pytest.raises(OutputRefused, match="features is what an imported vector is called"):
        load_backbone("vit-demo", random_weights=True).offers("features")


def test_a_network_that_pools_nowhere_is_refused():
    with pytest.raises(OutputRefused, match="the map that it pools was not found"):
        PooledMap("odd", nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"])


@pytest.mark.parametrize("given", [[torch.zeros(1, 8)], torch.zeros(1, 8)])
def test_features_of_timm_that_are_neither_tokens_nor_a_map_are_refused(given):
    with pytest.raises(OutputRefused, match=r"expected tokens \[B,T,D\] or a map"):
        output_traits("m", nn.Identity(), given, (8, 8))


def test_timms_names_sizes_and_folders_that_cannot_be_are_refused(tmp_path):
    timm = pytest.importorskip("timm")
    refuses(BadOption, "--image-size 0 is no size", "timm:test_vit", random_weights=True, image_size=0)
    trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    bare = next(name for name in timm.list_models() if name not in trained)
    refuses(NotFound, "was published without weights", f"timm:{bare}")
    refuses(UnknownBackbone, "has no config.json as timm writes it", f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    refuses(WeightsDoNotFit, "a record is expected", edit_json(tmp_path / "config.json", architecture="test_vit",
                                                               pretrained_cfg=3))  # fmt: skip


def test_images_that_no_patches_fill_are_refused(tmp_path):
    folder = save.save_vit(tmp_path)
    edit_json(folder / "preprocessor_config.json", size={"height": 36, "width": 36})
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


@pytest.mark.parametrize("change", [{"crop_pct": "x"}, {"mean": "abc"}, {"interpolation": [1]}])
def test_a_data_config_of_timm_that_is_none_is_one_sentence(change, tmp_path):
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    refuses(PreprocessingRefused, ".", edit_json(tmp_path / "config.json", pretrained_cfg=change))


NETWORK = f"""
from torch import nn

class Net(nn.Module):
    preprocess = {SAYS}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return RESULT
"""


@pytest.mark.parametrize(
    ("result", "says"), [("self.conv(x).sum((1, 2, 3))", r"gives \[2\] for two images"), ('{"a": x}', "returns a dict")]
)
def test_a_network_of_ones_own_that_gives_no_output_is_refused(result, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORK.replace("RESULT", result))
    refuses(OutputRefused, says, "python:nets:Net", random_weights=True)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), BadOption("ours")])
def test_a_full_memory_and_a_sentence_of_ours_are_no_faults_of_the_library(error):
    with pytest.raises(type(error)), library_errors("the library"):
        raise error


def missing(*_, **__):
    raise EntryNotFoundError("gone")


@pytest.mark.parametrize(
    ("download", "says"),
    [(missing, "could not be fetched from the hub: .*gone"), (lambda *_, **__: "/nowhere", "holds no weights")],
)
def test_a_repository_that_cannot_be_fetched_or_holds_no_weights_is_said(download, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuses(NotFound, says, "hf:org/vit")


def test_a_download_that_came_damaged_is_said(monkeypatch, tmp_path):
    def damaged(*_, **__):
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", damaged)
    refuses(NotFound, "came damaged .invalid hash value", "torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "near"),
    [("torchvision:resnet5", "resnet50"), ("torchvision:resnet50:IMAGENET1K_V9", "IMAGENET1K_V2"),
     ("timm:resnet5", "resnet50"), ("timm:resnet50.a1_in1", "a1_in1k")],
)  # fmt: skip
def test_a_name_that_its_library_has_not_is_refused_before_the_images_are_looked_at(tmp_path, name, near):
    with pytest.raises(UnknownBackbone, match=near):
        prepare(tmp_path / "nowhere", backbone=name, random_weights=True)
