"""Backbones that this machine has loaded before are known without loading them, and only as long as nothing changed."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import call
from support.pictures import image_folder

from featurecache.backbones import load_backbone, remembered, transformers_models
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
    """Grows by each checkpoint that is loaded."""
    made, load = [], transformers_models.load_checkpoint
    monkeypatch.setattr(transformers_models, "load_checkpoint", lambda *given: made.append(given[0]) or load(*given))
    return made


def known(checkpoint: Path, **options):
    return load_backbone(str(checkpoint), remembered=True, **options)


def test_what_was_loaded_before_is_known_without_loading_and_loads_the_same_network(checkpoint, loadings):
    first, second = known(checkpoint), known(checkpoint)
    assert len(loadings) == 1 and "model" not in vars(second)
    same = [each.name for each in fields(first) if each.name != "model"]
    assert {name: getattr(first, name) for name in same} == {name: getattr(second, name) for name in same}
    a, b = (each.model.state_dict() for each in (first, second))
    assert len(loadings) == 2 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert isinstance(replace(second, name="x").model, torch.nn.Module) and len(loadings) == 2


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
