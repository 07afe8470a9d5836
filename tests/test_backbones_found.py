"""Where backbones come from: names, folders, files, the hub's local cache; what identifies weights; what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkpoints as save
import huggingface_hub
import pytest
import small_hub
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchvision import models

from featurecache.backbones import describe, load_backbone
from featurecache.backbones.aliases import ALIASES, Alias
from featurecache.backbones.base import Backbone
from featurecache.backbones.weights import digest
from featurecache.errors import BadOption, UnknownBackbone, WeightsDoNotFit, WeightsNotFound

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def key(backbone: Backbone) -> str:
    """What of a backbone makes the key of its store."""
    parts = [backbone.architecture, backbone.weights, backbone.preprocess.to_dict(), backbone.image_size]
    return json.dumps([*parts, backbone.position_embeddings], sort_keys=True)


def put_in_cache(cache: Path, folder: Path, repo: str, refs: tuple[str, ...] = ("main",), commit: str = COMMIT) -> None:
    """Lay a checkpoint out as huggingface_hub does: blobs, snapshots that link to them, refs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, home / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    for ref in refs:
        (home / "refs" / ref).write_text(commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, and no way to the hub."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_what_was_fetched_once_is_found_without_the_hub(revision, tmp_path, hub, monkeypatch):
    save.save_vit(tmp_path / "vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with small_hub.small_hub(tmp_path / "vit", "org/vit", "models") as (address, fetched):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = load_backbone(f"hf:org/vit{revision}")
    assert found.provenance["revision"] == small_hub.COMMIT and "model.safetensors" in fetched
    assert key(load_backbone(f"hf:org/vit{revision}")) == key(found)  # nobody answers any more
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert key(load_backbone(**found.provenance["request"])) == key(found)


# names


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownBackbone) as error:
        load_backbone("vit-in12k")
    assert str(error.value).startswith('no backbone is called "vit-in12k". Near: vit-in')
    assert "vit-in21k" in str(error.value) and "torchvision:<name>" in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("google/vit-base-patch16-224", "a repository of the hub is written hf:google/vit-base-patch16-224"),
        ("./nowhere", 'there is no folder "./nowhere"'),
        ("hf:/nowhere/at/all", 'there is no folder "/nowhere/at/all"'),
        ("hf:a/b/c", "cannot be the name of a repository"),
        ("timm/resnet50", "a repository of the hub is written hf:timm/resnet50"),
        ("torchvision:resnet5", 'no model "resnet5" for classification. Near: resnet5'),
        ("torchvision:resnet50:V9", "there are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
    ],
)
def test_names_that_are_nearly_right_are_answered_with_the_right_form(name, says, hub):
    with pytest.raises(UnknownBackbone, match=re.escape(says)):
        load_backbone(name)


def test_a_file_of_weights_is_not_a_name(tmp_path):
    file = tmp_path / "mine.pt"
    file.write_bytes(b"x")
    with pytest.raises(UnknownBackbone, match=r"--backbone NAME --weights"):
        load_backbone(str(file))


def test_weights_and_random_weights_contradict_each_other():
    with pytest.raises(BadOption, match=r"contradict"):
        load_backbone("vit-in21k", weights="x", random_weights=True)


def test_an_unknown_fit_is_refused_before_anything_is_looked_for():
    with pytest.raises(BadOption, match=r"model, squash, pad"):
        load_backbone("vit-in21k", fit="stretch")


def test_vit_demo_says_that_it_exists_only_untrained():
    with pytest.raises(WeightsNotFound, match=r"--random-weights"):
        load_backbone("vit-demo")


def test_names_of_stores_come_from_folders_and_repositories(tmp_path, hub):
    folder = save.save_vit(tmp_path / "my vit")
    put_in_cache(hub, folder, "org/their-vit")
    assert load_backbone(str(folder)).name == "my vit"
    assert load_backbone("hf:org/their-vit").name == "their-vit"
    assert load_backbone("vit-demo", random_weights=True).name == "vit-demo"


# what identifies weights


def test_a_folder_its_copy_and_the_hubs_cache_are_one_key(tmp_path, hub):
    folder = save.save_vit(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    put_in_cache(hub, folder, "org/vit")
    names = [str(folder), f"hf:{folder}", str(tmp_path / "two"), "hf:org/vit"]
    assert len({key(load_backbone(name)) for name in names}) == 1


@pytest.mark.parametrize(
    "saver", [save.save_vit, save.save_deit, save.save_beit, save.save_dinov2, save.save_clip_vision, save.save_siglip]
)
def test_other_ways_of_saving_the_same_weights_are_one_key(saver, tmp_path):
    folder = saver(tmp_path / "safetensors")
    expected = load_backbone(str(folder))
    tensors = load_file(folder / "model.safetensors")
    for way in ("bin", "sharded"):
        other = tmp_path / way
        shutil.copytree(folder, other)
        (other / "model.safetensors").unlink()
        if way == "bin":
            torch.save(tensors, other / "pytorch_model.bin")
        else:
            expected.model.network.save_pretrained(other, max_shard_size="20KB")
            assert (other / "model.safetensors.index.json").is_file()
        if saver is save.save_deit and way == "sharded":
            continue  # what is in memory has a pooler that was not in the file
        assert key(load_backbone(str(other))) == key(expected)
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "wrapped.pt")
    assert key(load_backbone(str(folder), weights=str(tmp_path / "wrapped.pt"))) == key(expected)


@pytest.mark.parametrize(
    "saver", [save.save_vit, save.save_beit, save.save_dinov2, save.save_clip, save.save_siglip_both]
)
def test_a_state_dict_saved_from_memory_is_the_same_key(saver, tmp_path):
    folder = saver(tmp_path / "m")
    expected = load_backbone(str(folder))
    torch.save(expected.model.network.state_dict(), tmp_path / "memory.pt")
    again = load_backbone(str(folder), weights=str(tmp_path / "memory.pt"))
    assert again.weights == expected.weights
    pixels = torch.rand(1, 3, *expected.image_size)
    assert torch.equal(again.forward(pixels, {"tokens"})["tokens"], expected.forward(pixels, {"tokens"})["tokens"])


def test_a_classifier_inside_a_network_of_ones_own_is_the_same_weights(tmp_path):
    folder = save.save_vit_classifier(tmp_path / "vit")
    inside = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save({"state_dict": inside, "epoch": 3}, tmp_path / "last.ckpt")
    expected = key(load_backbone(str(folder)))
    assert key(load_backbone(str(folder), weights=str(tmp_path / "last.ckpt"))) == expected


def test_classifiers_on_one_frozen_backbone_are_one_key_whatever_their_classes(tmp_path):
    two = save.save_vit_classifier(tmp_path / "two", ("normal", "pneumonia"))
    tensors = load_file(two / "model.safetensors")
    three = save.save_vit_classifier(tmp_path / "three", ("a", "b", "c"))
    own = load_file(three / "model.safetensors")
    kept = {name: own[name] if name.startswith("classifier") else tensors[name] for name in own}
    save_file(kept, three / "model.safetensors", metadata={"format": "pt"})
    assert key(load_backbone(str(two))) == key(load_backbone(str(three)))


def test_a_vision_tower_saved_alone_is_the_same_key_as_in_its_clip(tmp_path):
    both = save.save_clip(tmp_path / "both")
    transformers.CLIPVisionModel.from_pretrained(both).save_pretrained(tmp_path / "vision")
    shutil.copy(both / "preprocessor_config.json", tmp_path / "vision")
    assert key(load_backbone(str(both))) == key(load_backbone(str(tmp_path / "vision")))


def test_indices_that_old_files_carry_do_not_change_the_key(tmp_path):
    folder = save.save_clip(tmp_path)
    expected = key(load_backbone(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert key(load_backbone(str(folder))) == expected


@pytest.mark.parametrize("change", ["one bit", "half precision", "swapped blocks"])
def test_other_weights_are_another_key(change, tmp_path):
    folder = save.save_vit(tmp_path)
    before = load_backbone(str(folder)).weights
    tensors = load_file(folder / "model.safetensors")
    if change == "one bit":
        tensors["layernorm.bias"].view(torch.int32)[3] ^= 1
    elif change == "half precision":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    else:
        other = {name: name.replace("layer.0.", "layer.1.") for name in tensors if "layer.0." in name}
        for first, second in other.items():
            tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(str(folder)).weights != before


def test_a_digest_is_blake2b_of_names_dtypes_shapes_and_bytes():
    import hashlib

    data = b"a\0int16\0[2]\0" + bytes([1, 0, 2, 0]) + b"b\0bfloat16\0[]\0" + bytes([0x80, 0x3F])
    tensors = {"b": torch.tensor(1.0, dtype=torch.bfloat16), "a": torch.tensor([1, 2], dtype=torch.int16)}
    assert digest(tensors) == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_the_key_does_not_know_names_paths_or_versions(tmp_path):
    folder = save.save_vit_classifier(tmp_path / "somewhere", ("normal", "pneumonia"))
    text = key(load_backbone(str(folder)))
    for word in ("somewhere", "pneumonia", transformers.__version__, "sdpa", "float32", "ForImageClassification"):
        assert word not in text


def test_half_precision_on_disk_is_computed_in_float32(tmp_path):
    folder = save.save_vit(tmp_path / "m")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    backbone, pixels = load_backbone(str(folder)), torch.rand(1, 3, 32, 32)
    expected = transformers.ViTModel.from_pretrained(folder).float().eval()
    with torch.no_grad():
        assert torch.equal(backbone.forward(pixels, {"tokens"})["tokens"], expected(pixels).last_hidden_state)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


def test_the_request_loads_the_same_backbone_from_any_folder(tmp_path, monkeypatch, hub):
    put_in_cache(hub, save.save_vit(tmp_path / "v"), "org/vit")
    torch.save(load_file(tmp_path / "v" / "model.safetensors"), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    asked = [
        {"name": "v"},
        {"name": "hf:org/vit", "image_size": 48, "fit": "pad"},
        {"name": "v", "weights": "w.pt"},
        {"name": "vit-demo", "random_weights": True, "seed": 7},
        {"name": "v", "random_weights": True},
    ]
    found = [load_backbone(**arguments) for arguments in asked]
    monkeypatch.chdir("/")
    for backbone in found:
        request = json.loads(json.dumps(backbone.provenance["request"]))
        assert key(load_backbone(**request)) == key(backbone)


# weights that do not fit


def edited(folder: Path, **changes) -> str:
    """The folder's weights with tensors replaced, added or (None) taken away; dots in names as __."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(WeightsDoNotFit, match=r"lack 1 tensors of ViTModel: layernorm.weight"):
        load_backbone(edited(save.save_vit(tmp_path), layernorm__weight=None))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    with pytest.raises(WeightsDoNotFit, match=r"layernorm.bias is \[31\], expected \[32\]"):
        load_backbone(edited(save.save_vit(tmp_path), layernorm__bias=torch.zeros(31)))


def test_more_blocks_than_the_configuration_says_are_refused(tmp_path):
    folder = save.save_vit(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(WeightsDoNotFit, match=r"more than its configuration says"):
        load_backbone(str(folder))


def test_half_a_pooler_is_no_pooler(tmp_path):
    backbone = load_backbone(edited(save.save_vit(tmp_path), pooler__dense__bias=None))
    assert "pooler" in backbone.refused


def test_a_missing_mask_token_is_never_used_and_so_no_matter(tmp_path):
    load_backbone(edited(save.save_dinov2(tmp_path), embeddings__mask_token=None))


def test_weights_of_something_else_altogether_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(WeightsDoNotFit, match=r"they hold bias, weight"):
        load_backbone(str(save.save_vit(tmp_path / "m")), weights=str(tmp_path / "linear.pt"))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.pth"])
def test_code_in_a_file_of_weights_is_refused_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, name)
    with pytest.raises(WeightsDoNotFit, match=r"cannot be read as weights"):
        load_backbone("vit-in21k", weights=name)
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.pt", b""), ("w.pt", b"<!DOCTYPE html>"), ("w.safetensors", b"\xff" * 64), ("w.bin", b"PK\3\4..")],
)
def test_a_file_that_is_not_weights_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsDoNotFit, match=r"cannot be read as weights"):
        load_backbone("vit-in21k", weights=str(tmp_path / name))


@pytest.mark.parametrize("value", [torch.zeros(3), [1, 2], {"epoch": 3}, {1: torch.zeros(1)}])
def test_a_file_without_a_state_dict_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(WeightsDoNotFit, match=r"expected a state dict"):
        load_backbone("vit-in21k", weights=str(tmp_path / "w.pt"))


def test_an_index_that_points_outside_its_folder_reads_nothing_there(tmp_path):
    folder = save.save_vit(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(WeightsNotFound):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "bert"}, UnknownBackbone, 'a model of type "bert"; expected one of vit'),
        ({"hidden_size": "wide"}, WeightsDoNotFit, "not a configuration of vit"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, WeightsDoNotFit, "quantised"),
    ],
)
def test_a_configuration_we_cannot_use_is_refused(change, error, says, tmp_path):
    folder = save.save_vit(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=says):
        load_backbone(str(folder))


def test_a_configuration_that_is_no_json_is_refused(tmp_path):
    (save.save_vit(tmp_path) / "config.json").write_text("{")
    with pytest.raises(WeightsDoNotFit, match=r"not a configuration in JSON"):
        load_backbone(str(tmp_path))


def test_a_folder_without_a_configuration_is_answered_with_how_to_use_its_weights(tmp_path):
    with pytest.raises(WeightsNotFound, match=r"no config.json.*--backbone NAME --weights"):
        load_backbone(str(tmp_path))


def test_a_folder_without_weights_works_only_untrained(tmp_path):
    folder = save.save_vit(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFound, match=r"no file of weights"):
        load_backbone(str(folder))
    assert load_backbone(str(folder), random_weights=True).weights == {"random_seed": 0}


def test_a_folder_with_only_a_configuration_gets_its_model_types_processor_untrained(tmp_path):
    transformers.DeiTConfig(**save.SIZE, image_size=64, patch_size=8).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), random_weights=True)
    assert (backbone.preprocess.size, backbone.preprocess.resize) == ((64, 64), (73, 73))
    assert backbone.provenance["preprocessing"] == "the default of its model type"


# aliases with a copy of the weights at hand


@pytest.fixture
def small_alias(monkeypatch):
    """A published alias, made small enough to test: the record is all that an alias is."""
    config = {**save.SIZE, "image_size": 32, "patch_size": 8}
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    alias = Alias("hf:org/small", 32, 17, 32, 0, "MIT", "here", "vit", config, processor)
    monkeypatch.setitem(ALIASES, "small", alias)
    return alias


def test_an_alias_a_hub_id_and_a_local_copy_are_one_key(tmp_path, hub, small_alias):
    folder = save.save_vit(tmp_path / "copy")
    put_in_cache(hub, folder, "org/small")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "w.bin")
    ways = [
        load_backbone("small"),
        load_backbone("hf:org/small"),
        load_backbone(str(folder)),
        load_backbone("small", weights=str(folder)),
        load_backbone("small", weights=str(tmp_path / "w.bin")),
    ]
    assert len({key(backbone) for backbone in ways}) == 1
    assert [ways[k].name for k in (0, 3, 4)] == ["small"] * 3
    assert ways[0].provenance["licence"] == "MIT"


def test_a_folder_that_is_called_like_an_aliass_repository_does_not_take_its_place(
    tmp_path, hub, small_alias, monkeypatch
):
    put_in_cache(hub, save.save_vit(tmp_path / "published"), "org/small")
    expected = key(load_backbone("small"))
    save.save_vit(tmp_path / "org" / "small", seed=1)
    monkeypatch.chdir(tmp_path)
    assert key(load_backbone("small")) == expected != key(load_backbone("org/small"))


def test_a_folder_that_is_another_architecture_than_the_alias_is_refused(tmp_path, small_alias):
    with pytest.raises(WeightsDoNotFit, match=r"num_hidden_layers 2, expected 3"):
        load_backbone("small", weights=str(save.save_vit(tmp_path / "a", num_hidden_layers=2)))
    with pytest.raises(WeightsDoNotFit, match=r"a DeiTConfig, expected ViTConfig"):
        load_backbone("small", weights=str(save.save_deit(tmp_path / "b")))


def test_weights_that_are_not_there_are_named(small_alias):
    with pytest.raises(WeightsNotFound, match=r"/nowhere/w.pt: there is no such file"):
        load_backbone("small", weights="/nowhere/w.pt")


def test_a_folder_with_two_files_of_weights_asks_which(tmp_path, small_alias):
    for name in ("a.pt", "b.pt"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(WeightsNotFound, match=r"2 files of weights .a.pt, b.pt."):
        load_backbone("small", weights=str(tmp_path))


# the hub


def test_the_hubs_cache_is_enough_and_gives_the_commit(tmp_path, hub):
    put_in_cache(hub, save.save_vit(tmp_path / "m"), "org/vit", refs=("main", "v1"))
    for name in ("hf:org/vit", "hf:org/vit@v1", f"hf:org/vit@{COMMIT}"):
        backbone = load_backbone(name)
        assert (backbone.provenance["id"], backbone.provenance["revision"]) == ("org/vit", COMMIT)
        assert backbone.provenance["request"]["name"] == f"hf:org/vit@{COMMIT}"


def test_a_cached_repository_with_only_a_bin_is_read(tmp_path, hub):
    folder = save.save_vit(tmp_path / "m")
    expected = load_backbone(str(folder)).weights
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    put_in_cache(hub, folder, "org/vit")
    assert load_backbone("hf:org/vit").weights == expected


def test_a_cache_that_holds_only_the_configuration_is_enough_untrained(tmp_path, hub):
    folder = save.save_vit(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    put_in_cache(hub, folder, "org/vit")
    with pytest.raises(WeightsNotFound, match=r"--random-weights"):
        load_backbone("hf:org/vit")
    assert load_backbone("hf:org/vit", random_weights=True).grid == (4, 4)
    assert describe("hf:org/vit")["grid"] == [4, 4]


def test_a_revision_that_is_not_in_the_cache_is_not_replaced_by_another(tmp_path, hub):
    put_in_cache(hub, save.save_vit(tmp_path / "m"), "org/vit")
    for other in ("v2", COMMIT[::-1]):
        with pytest.raises(WeightsNotFound):
            load_backbone(f"hf:org/vit@{other}")


MESSAGE = (
    "the weights of google/vit-base-patch16-224-in21k are not on this machine and the hub cannot be reached.\n"
    "       --weights FOLDER   a copy you have        HF_HOME=…   an existing hub cache        "
    "--random-weights   try the tool without them"
)


def test_without_the_hub_and_without_weights_the_three_ways_out_are_given_in_a_second(hub, monkeypatch):
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
        assert load_backbone("hf:org/vit").provenance["revision"] == COMMIT
        with pytest.raises(WeightsNotFound):
            load_backbone("hf:org/other")
        assert time.monotonic() - start < 10


def test_in_a_process_of_its_own_hf_home_is_enough(tmp_path):
    put_in_cache(tmp_path / "home" / "hub", save.save_vit(tmp_path / "m"), "org/vit")
    code = "from featurecache import load_backbone; b = load_backbone('hf:org/vit'); print(b.name, b.grid)"
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("vit (4, 4)\n", "")


# torchvision's weights


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch.hub's folder, and no way to any server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def nowhere(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_weights_that_are_neither_here_nor_to_be_had_give_the_three_ways_out(torch_home):
    with pytest.raises(
        WeightsNotFound, match=r"ResNet18_Weights.IMAGENET1K_V1(?s:.*)--weights FILE(?s:.*)TORCH_HOME=…"
    ):
        load_backbone("resnet18")
    assert socket.getdefaulttimeout() is None


def test_torchvision_weights_come_from_torch_hubs_folder(torch_home):
    network = models.resnet18()
    torch.save(network.state_dict(), torch_home / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name)
    backbone, pixels = load_backbone("resnet18"), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(backbone.model.network(pixels), network.eval()(pixels))
    assert backbone.provenance["revision"] == "resnet18-f37072fd.pth"


def test_a_torchvision_network_fine_tuned_to_other_classes_or_cut_off_is_the_same_backbone(tmp_path):
    state = models.resnet18().state_dict()
    tuned = {**state, "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}
    cut = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    keys = set()
    for number, tensors in enumerate((state, tuned, cut)):
        torch.save(tensors, tmp_path / f"{number}.pt")
        keys.add(key(load_backbone("torchvision:resnet18", weights=str(tmp_path / f"{number}.pt"))))
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("resnet34", "hold layer1.2.bn1.bias.*which it has not"),
        ("resnet50", "other shapes"),
        ("densenet121", "lack bn1.bias"),
    ],
)
def test_weights_of_another_torchvision_network_are_refused(of, says, tmp_path):
    torch.save(models.get_model(of, weights=None).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsDoNotFit, match=rf"not of torchvision's resnet18: they .*{says}"):
        load_backbone("torchvision:resnet18", weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_weights_of_torchvision_inside_a_network_of_ones_own_are_found(prefix, tmp_path):
    state = models.resnet18(num_classes=3).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "inside.pt")
    plain, inside = (
        load_backbone("torchvision:resnet18", weights=str(tmp_path / name)) for name in ("plain.pt", "inside.pt")
    )
    assert plain.weights == inside.weights


def test_densenet_weights_with_the_names_of_their_publication_are_read(tmp_path):
    network = models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name): t for name, t in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    torch.save(network.state_dict(), tmp_path / "new.pth")
    found = [load_backbone("densenet121", weights=str(tmp_path / name)) for name in ("old.pth", "new.pth")]
    assert found[0].weights == found[1].weights


@pytest.mark.parametrize("name", ["mnasnet0_5", "googlenet"])
def test_weights_of_networks_with_versions_or_auxiliary_classifiers_are_read(name, tmp_path):
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    network = models.get_model(name, weights=None, **options)
    save_file(dict(network.state_dict()), tmp_path / "w.safetensors")
    backbone = load_backbone(f"torchvision:{name}", weights=str(tmp_path / "w.safetensors"), image_size=64)
    assert "blake2b" in backbone.weights
    assert (name == "googlenet") == (backbone.architecture["config"] == {"transform_input": True})
