"""Weights: what identifies them, in whatever file they lie; the hub's cache; files that are none, or hold code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support import small_hub
from support.backbone_checks import edit_tensors, key, outputs, refuses
from support.small_hub import CACHED, put_in_cache

from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.aliases import ALIASES, Alias
from featurecache.backbones.weights import library_errors, weights_digest
from featurecache.errors import BadOption, WeightsDoNotFit, WeightsNotFound


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def as_bin(folder: Path) -> Path:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


# one key


def test_a_digest_is_blake2b_of_names_dtypes_shapes_and_bytes():
    data = b"a\0int16\0[2]\0" + bytes([1, 0, 2, 0]) + b"b\0bfloat16\0[]\0" + bytes([0x80, 0x3F])
    tensors = {"b": torch.tensor(1.0, dtype=torch.bfloat16), "a": torch.tensor([1, 2], dtype=torch.int16)}
    assert weights_digest(tensors) == hashlib.blake2b(data, digest_size=16).hexdigest()


@pytest.mark.parametrize(
    "write",
    [save.save_vit, save.save_deit, save.save_beit, save.save_dinov2, save.save_clip_vision, save.save_clip,
     save.save_siglip, save.save_siglip_both],
)  # fmt: skip
def test_other_ways_of_saving_the_same_weights_are_one_key(write, tmp_path):
    folder = write(tmp_path / "m")
    backbone, tensors = load_backbone(str(folder)), tensors_of(folder)
    assert key(load_backbone(str(as_bin(Path(shutil.copytree(folder, tmp_path / "bin")))))) == key(backbone)
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "wrapped.pt")
    assert key(load_backbone(str(folder), weights=str(tmp_path / "wrapped.pt"))) == key(backbone)
    torch.save(backbone.model.network.state_dict(), tmp_path / "memory.pt")
    memory = load_backbone(str(folder), weights=str(tmp_path / "memory.pt"))
    pixels = torch.rand(1, 3, *backbone.image_size)
    assert torch.equal(*(outputs(each, pixels, "tokens")[0] for each in (memory, backbone)))
    if write is not save.save_deit:  # of which what is in memory has a pooler that was not in the file
        assert memory.weights == backbone.weights


def test_classifiers_on_one_frozen_backbone_are_one_key_whatever_their_classes(tmp_path):
    two = save.save_vit_classifier(tmp_path / "two", ("normal", "pneumonia"))
    three = save.save_vit_classifier(tmp_path / "three", ("a", "b", "c"))
    shared = {name.replace(".", "__"): t for name, t in tensors_of(two).items() if not name.startswith("classifier")}
    edit_tensors(three, **shared)
    assert key(load_backbone(str(two))) == key(load_backbone(str(three)))


def test_a_vision_tower_saved_alone_is_the_same_key_as_in_its_clip(tmp_path):
    both = save.save_clip(tmp_path / "both")
    transformers.CLIPVisionModel.from_pretrained(both).save_pretrained(tmp_path / "vision")
    shutil.copy(both / "preprocessor_config.json", tmp_path / "vision")
    assert key(load_backbone(str(both))) == key(load_backbone(str(tmp_path / "vision")))


def test_indices_that_old_files_carry_do_not_change_the_key(tmp_path):
    expected = key(load_backbone(str(save.save_clip(tmp_path))))
    edit_tensors(tmp_path, vision_model__embeddings__position_ids=torch.arange(17)[None])
    assert key(load_backbone(str(tmp_path))) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
        lambda tensors: {name.translate(str.maketrans("01", "10")): tensor for name, tensor in tensors.items()},
    ],
    ids=["half precision", "swapped blocks"],
)
def test_other_weights_are_another_key(change, tmp_path):
    folder = save.save_vit(tmp_path)
    before = load_backbone(str(folder)).weights
    save_file(change(tensors_of(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(str(folder)).weights != before


def test_the_request_loads_the_same_backbone_from_any_folder(tmp_path, monkeypatch, hub):
    put_in_cache(hub, save.save_vit(tmp_path / "v"), "org/vit")
    torch.save(tensors_of(tmp_path / "v"), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    requests = [
        {"name": "v"},
        {"name": "hf:org/vit", "image_size": 48, "fit": "pad"},
        {"name": "v", "weights": "w.pt"},
        {"name": "vit-demo", "random_weights": True, "seed": 7},
        {"name": "v", "random_weights": True},
    ]
    backbones = [load_backbone(**arguments) for arguments in requests]
    monkeypatch.chdir("/")
    for backbone in backbones:
        request = json.loads(json.dumps(backbone.provenance["request"]))
        assert key(load_backbone(**request)) == key(backbone)


# files that are no weights, or hold code


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.pt", b""), ("w.pt", b"<!DOCTYPE html>"), ("w.safetensors", b"\xff" * 64), ("w.bin", b"PK\3\4..")],
)
def test_a_file_that_is_not_weights_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refuses(WeightsDoNotFit, r"cannot be read as weights", "vit-in21k", weights=tmp_path / name)


def test_an_index_that_points_outside_its_folder_reads_nothing_there(tmp_path):
    folder = save.save_vit(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(WeightsNotFound):
        load_backbone(str(folder))


ITSELF = '{"weight_map": {"x": "model.safetensors.index.json"}}'


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"x": 3}}', ITSELF]
)
def test_an_index_that_is_none_or_names_itself_is_refused(content, tmp_path):
    folder = save.save_vit(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(WeightsDoNotFit, r"weight_map", folder)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), BadOption("ours")])
def test_a_full_memory_and_a_sentence_of_ours_are_no_faults_of_the_library(error):
    with pytest.raises(type(error)), library_errors("the library"):
        raise error


# aliases with a copy of the weights at hand


@pytest.fixture(autouse=True)
def _small_alias(monkeypatch) -> None:
    """A published alias, made small enough to test: the record is all that an alias is."""
    config = {**save.SIZE, "image_size": 32, "patch_size": 8}
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    alias = Alias("hf:org/small", 32, 17, 32, 0, "MIT", "here", "vit", config, processor)
    monkeypatch.setitem(ALIASES, "small", alias)


def test_a_folder_that_is_called_like_an_aliass_repository_does_not_take_its_place(tmp_path, hub, monkeypatch):
    put_in_cache(hub, save.save_vit(tmp_path / "published"), "org/small")
    backbone = load_backbone("small")
    assert (backbone.name, backbone.provenance["licence"]) == ("small", "MIT")
    assert key(load_backbone("small", weights=tmp_path / "published")) == key(backbone)
    save.save_vit(tmp_path / "org" / "small", seed=1)
    monkeypatch.chdir(tmp_path)
    assert key(load_backbone("small")) == key(backbone) != key(load_backbone("org/small"))


def test_a_folder_that_is_another_architecture_than_the_alias_is_refused(tmp_path):
    shallow, deit = save.save_vit(tmp_path / "a", num_hidden_layers=2), save.save_deit(tmp_path / "b")
    refuses(WeightsDoNotFit, r"num_hidden_layers 2, expected 3", "small", weights=shallow)
    refuses(WeightsDoNotFit, r"a DeiTConfig, expected ViTConfig", "small", weights=deit)


def test_weights_that_are_not_there_or_are_several_are_named(tmp_path):
    refuses(WeightsNotFound, r"/nowhere/w.pt: there is no such file", "small", weights="/nowhere/w.pt")
    for name in ("a.pt", "b.pt"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    refuses(WeightsNotFound, r"2 files of weights .a.pt, b.pt.", "small", weights=tmp_path)


# the hub


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_what_was_fetched_once_is_there_without_the_hub(revision, tmp_path, hub, monkeypatch):
    save.save_vit(tmp_path / "vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with small_hub.small_hub(tmp_path / "vit", "org/vit", "models") as (address, fetched):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        backbone = load_backbone(f"hf:org/vit{revision}")
    assert backbone.provenance["revision"] == small_hub.COMMIT and "model.safetensors" in fetched
    assert key(load_backbone(f"hf:org/vit{revision}")) == key(backbone)  # nobody answers any more
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert key(load_backbone(**backbone.provenance["request"])) == key(backbone)


def test_the_hubs_cache_is_enough_and_gives_the_commit(tmp_path, hub):
    put_in_cache(hub, save.save_vit(tmp_path / "m"), "org/vit", refs=("main", "v1"))
    for name in ("hf:org/vit", "hf:org/vit@v1", f"hf:org/vit@{CACHED}"):
        provenance = load_backbone(name).provenance
        assert (provenance["id"], provenance["revision"]) == ("org/vit", CACHED)
        assert provenance["request"]["name"] == f"hf:org/vit@{CACHED}"
    for other in ("v2", CACHED[::-1]):  # not replaced by another
        with pytest.raises(WeightsNotFound):
            load_backbone(f"hf:org/vit@{other}")


def test_a_cached_repository_with_only_a_bin_is_read(tmp_path, hub):
    folder = save.save_vit(tmp_path / "m")
    expected = load_backbone(str(folder)).weights
    put_in_cache(hub, as_bin(folder), "org/vit")
    assert load_backbone("hf:org/vit").weights == expected


def test_a_cache_that_holds_only_the_configuration_is_enough_untrained(tmp_path, hub):
    folder = save.save_vit(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    put_in_cache(hub, folder, "org/vit")
    refuses(WeightsNotFound, r"--random-weights", "hf:org/vit")
    assert load_backbone("hf:org/vit", random_weights=True).grid == (4, 4)
    assert describe_backbone("hf:org/vit")["grid"] == [4, 4]


def gone(*_, **__):
    raise EntryNotFoundError("gone")


@pytest.mark.parametrize(
    ("download", "says"),
    [(gone, "could not be fetched from the hub: .*gone"), (lambda *_, **__: "/nowhere", "holds no weights")],
)
def test_a_repository_that_cannot_be_fetched_or_holds_no_weights_is_said(download, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuses(WeightsNotFound, says, "hf:org/vit")


MESSAGE = (
    "the weights of google/vit-base-patch16-224-in21k are not on this machine and the hub cannot be reached.\n"
    "       where there is a network:  hf download google/vit-base-patch16-224-in21k --include "
    '"*.json" --include "*.safetensors" --local-dir vit-base-patch16-224-in21k\n'
    "       then carry it here:  --weights vit-base-patch16-224-in21k/\n"
    "       or:  HF_HOME=…   an existing hub cache        --random-weights   try the tool without them"
)


def test_without_the_hub_and_without_weights_the_ways_out_are_given_in_a_second(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(WeightsNotFound) as error:
        load_backbone("vit-in21k")
    assert str(error.value) == MESSAGE
    assert time.monotonic() - start < 3


def test_a_hub_that_accepts_and_never_answers_does_not_hang_us(tmp_path, hub, monkeypatch):
    put_in_cache(hub, save.save_vit(tmp_path / "m"), "org/vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("featurecache.backbones.weights.REACH", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert load_backbone("hf:org/vit").provenance["revision"] == CACHED
        with pytest.raises(WeightsNotFound):
            load_backbone("hf:org/other")
        assert time.monotonic() - start < 10


def test_in_a_process_of_its_own_hf_home_is_enough(tmp_path):
    put_in_cache(tmp_path / "home" / "hub", save.save_vit(tmp_path / "m"), "org/vit")
    code = "from featurecache import load_backbone; b = load_backbone('hf:org/vit'); print(b.name, b.grid)"
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("vit (4, 4)\n", "")
