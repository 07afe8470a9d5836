"""Backbones that this machine has loaded before are known without loading them, and only as long as nothing changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.command import call
from support.pictures import image_folder
from support.small_hub import put_in_cache
from torchvision import models

import featurecache
from featurecache.backbones import load_backbone, remembered, timm_models, torchvision_models, transformers_models
from featurecache.errors import WeightsDoNotFit
from featurecache.extraction.run import Extraction
from featurecache.store.store import Store


@pytest.fixture
def checkpoint(vit, tmp_path, monkeypatch):
    """A folder whose files count as settled at once."""
    monkeypatch.setattr(remembered, "SETTLED", 0.0)
    return shutil.copytree(vit, tmp_path / "net")


@pytest.fixture
def loadings(monkeypatch):
    """Grows by each network that is loaded."""
    made = []
    for library, name in (
        (transformers_models, "load_checkpoint"), (timm_models, "load"), (torchvision_models, "load")
    ):  # fmt: skip
        load = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *given, load=load: made.append(given[0]) or load(*given))
    return made


def known(checkpoint: Path | str, **options):
    return load_backbone(str(checkpoint), remembered=True, **options)


@pytest.fixture(params=["transformers", "timm folder", "timm name", "torchvision"])
def published(request, checkpoint, tmp_path, hub, monkeypatch):
    """(name, file of its weights) of a network of each library."""
    if request.param == "transformers":
        return str(checkpoint), checkpoint / "model.safetensors"
    if request.param == "torchvision":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        file = tmp_path / "hub" / "checkpoints" / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
        file.parent.mkdir(parents=True)
        torch.save(models.resnet18().state_dict(), file)
        return "torchvision:resnet18", file
    folder = tmp_path / "resnet"
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder, safe_serialization=True)
    if request.param == "timm folder":
        return f"timm:{folder}", folder / "model.safetensors"
    put_in_cache(hub, folder, "timm/test_resnet.r160_in1k")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))  # of another process too
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return "timm:test_resnet", next(hub.rglob("model.safetensors"))


def test_what_was_loaded_before_is_known_without_loading_and_loads_the_same_network(published, loadings):
    checkpoint, weights = published
    first, second = known(checkpoint), known(checkpoint)
    assert len(loadings) == 1 and "model" not in vars(second)
    same = [each.name for each in fields(first) if each.name != "model"]
    assert {name: getattr(first, name) for name in same} == {name: getattr(second, name) for name in same}
    a, b = (each.model.state_dict() for each in (first, second))
    assert len(loadings) == 2 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert isinstance(replace(second, name="x").model, torch.nn.Module) and len(loadings) == 2
    weights.resolve().touch()
    known(checkpoint)
    assert len(loadings) == 3


def test_an_untrained_network_is_known_by_its_seed(loadings):
    for name in ("timm:test_vit", "resnet18"):
        first, second = (known(name, random_weights=True, seed=1) for _ in range(2))
        assert len(loadings) == 1 and first.weights == second.weights == {"random_seed": 1}
        assert known(name, random_weights=True).weights != first.weights and len(loadings) == 2
        loadings.clear()


@pytest.mark.parametrize("beside", ["open_clip_config.json", "part.safetensors"])
def test_what_stands_beside_a_file_of_weights_counts_too(tmp_path, beside):
    """Settings of open_clip; the files that an index names."""
    file = tmp_path / ("model.safetensors.index.json" if beside.startswith("part") else "model.safetensors")
    for path in (file, tmp_path / beside):
        path.write_text("{}")
    before = list(remembered._stamps([file]))
    (tmp_path / beside).write_text("{ }")
    assert list(remembered._stamps([file])) != before


def test_where_nothing_is_to_compute_no_library_of_networks_is_imported(here, published):
    """In a process of its own: this one has them all."""
    image_folder(here / "a")
    featurecache.extract("a", backbone=published[0])
    look = f"import sys, featurecache; print(featurecache.prepare('a', backbone={published[0]!r}).to_compute, *("
    look += "name for name in ('timm', 'torchvision', 'transformers', 'openvino') if name in sys.modules))"
    time.sleep(2.1)  # until there what was just written is trusted
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


def test_other_weights_settings_or_options_are_not_known(checkpoint, loadings):
    first = known(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    save_file({**tensors, name: tensors[name] + 1}, checkpoint / "model.safetensors", {"format": "pt"})
    second = known(checkpoint)
    assert len(loadings) == 2 and first.weights != second.weights
    settings = checkpoint / "preprocessor_config.json"
    settings.write_text(settings.read_text() + "\n")
    known(checkpoint)
    known(checkpoint, fit="pad")
    assert len(loadings) == 4


def test_files_that_changed_just_now_are_not_trusted(checkpoint, loadings, monkeypatch):
    monkeypatch.setattr(remembered, "SETTLED", 3600.0)
    known(checkpoint)
    known(checkpoint)
    assert len(loadings) == 2


def test_settings_that_json_would_change_are_not_remembered(checkpoint, loadings, monkeypatch):
    plain = transformers_models.plain_config
    monkeypatch.setattr(transformers_models, "plain_config", lambda config: {**plain(config), "places": {10: 1, 2: 0}})
    known(checkpoint)
    known(checkpoint)
    assert len(loadings) == 2


def test_a_network_that_is_another_than_was_remembered_is_refused(checkpoint, monkeypatch):
    known(checkpoint)
    second, other = known(checkpoint), replace(load_backbone(checkpoint), weights={"blake2b": "0"})
    second.load = lambda: other
    with pytest.raises(WeightsDoNotFit, match="weights of net changed meanwhile"):
        second.model  # noqa: B018


def test_nothing_to_compute_and_what_follows_from_tokens_load_no_network(here, loadings, monkeypatch):
    image_folder(here / "a")
    words = ["extract", "--backbone", "vit-demo", "--random-weights", "--data", "a"]
    call(*words)
    monkeypatch.setattr(Extraction, "compute", None)  # calling it fails
    monkeypatch.setattr(Store, "cost_of_busy", lambda store, device: False)  # what was measured beside other work
    again = call(*words, "--debug")
    assert again.exit_code == 0 and "nothing left to compute" in again.output and len(loadings) == 1
    line = next(line for line in again.stderr.splitlines() if line.startswith("time  "))
    assert all(f"{part} " in line for part in ("imports", "source", "backbone", "view", "other")) and "in all" in line
    derived = call(*words, "--outputs", "cls,tokens,mean")
    assert derived.exit_code == 0 and "derived from stored tokens" in derived.output and len(loadings) == 1
