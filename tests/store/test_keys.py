"""What is in the fingerprint and what is not.

The tables name every field there is, so that a new one fails here until somebody says on which list it stands.
"""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support.pictures import image_folder
from torchvision import models

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone, BackboneRequest
from featurecache.backbones.transformers_families import FAMILIES
from featurecache.backbones.transformers_generic import plain_config
from featurecache.extraction import plan
from featurecache.extraction.forward import spec_of
from featurecache.images import decoding
from featurecache.images.preprocessing import Preprocess
from featurecache.store.spec import ExtractionSpec


def fingerprint(backbone: Backbone) -> str:
    return spec_of(backbone, "fp32", "float16").fingerprint


def of(name: str | Path, **options: Any) -> str:
    return fingerprint(load_backbone(str(name), **options))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# every field of the records


SPEC = ExtractionSpec(
    {"library": "transformers", "class": "ViTModel", "config": {"a": 1}}, {"blake2b": "0" * 32}, {"mode": "squash"},
    (224, 224), "as trained",
)  # fmt: skip
OTHER_SPEC: dict[str, list[Any]] = {
    "architecture": [
        {**SPEC.architecture, "library": "torchvision"},
        {**SPEC.architecture, "class": "DeiTModel"},
        {**SPEC.architecture, "config": {"a": 2}},
        {**SPEC.architecture, "config": {"a": 1, "b": None}},
        {**SPEC.architecture, "source": "0" * 32},
    ],
    "weights": [{"blake2b": "0" * 31 + "1"}, {"random_seed": 0}, {"random_seed": 1}],
    "preprocess": [{"mode": "pad"}, {"mode": "squash", "decoding": 2}, {"mode": "squash", "bits": 12}],
    "image_size": [(224, 225), (225, 224), (256, 256)],
    "position_embeddings": ["interpolated (bicubic)", "interpolated (bicubic, corners aligned)", "none"],
    "precision": ["bf16", "fp16"],
    "dtype": ["float32"],
    "generation": [1, 2],
    "format": [SPEC.format + 1],
}


def test_every_field_of_a_spec_makes_another_key():
    assert set(OTHER_SPEC) == {field.name for field in fields(ExtractionSpec)}
    others = [replace(SPEC, **{name: value}) for name, values in OTHER_SPEC.items() for value in values]
    assert len({spec.fingerprint for spec in [SPEC, *others]}) == len(others) + 1


NUMBERS = st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=2), JSON, max_size=3), st.dictionaries(st.text(max_size=2), JSON, max_size=3))
def test_two_configurations_have_one_key_only_where_they_are_one(first, second):
    keys = [replace(SPEC, architecture=config).fingerprint for config in (first, second)]
    assert (keys[0] == keys[1]) == (json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True))
    turned = dict(reversed(list(first.items())))
    assert replace(SPEC, architecture=turned).fingerprint == keys[0]
    assert ExtractionSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))).fingerprint == SPEC.fingerprint


PREPROCESS = Preprocess(
    mode="squash", resize=(40, 40), crop=(32, 32), kernel="torchvision", interpolation="bilinear", antialias=True,
    crop_rounding="down", scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), arithmetic="fused",
)  # fmt: skip
OTHER_PREPROCESS: dict[str, list[Any]] = {
    "mode": ["pad"],
    "resize": [(40, 41), (48, 48)],
    "crop": [(32, 31), None],
    "kernel": ["pil"],
    "interpolation": ["bicubic", "nearest-exact"],
    "antialias": [False],
    "crop_rounding": ["half even"],
    "scale": [1 / 256, None],
    "mean": [(0.5, 0.5, 0.5 + 2e-16), (0.485, 0.456, 0.406)],
    "std": [(0.5, 0.5, 0.25), (0.229, 0.224, 0.225)],
    "arithmetic": ["rescale first"],
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save.save_vit(tmp_path_factory.mktemp("vit") / "m")


def test_every_field_of_the_preprocessing_makes_another_key(vit):
    assert set(OTHER_PREPROCESS) == {field.name for field in fields(Preprocess)}
    others = [replace(PREPROCESS, **{name: value}) for name, values in OTHER_PREPROCESS.items() for value in values]
    backbone = load_backbone(str(vit))
    keys = {fingerprint(replace(backbone, preprocess=preprocess)) for preprocess in [PREPROCESS, *others]}
    assert len(keys) == len(others) + 1


def test_the_version_of_the_decoding_rules_makes_another_key(vit, monkeypatch):
    before = of(vit)
    monkeypatch.setattr(decoding, "DECODING", decoding.DECODING + 1)
    assert of(vit) != before


IN_KEY = {"architecture", "weights", "preprocess", "image_size", "position_embeddings"}
BESIDE_KEY: dict[str, Any] = {  # what follows from the others, or says how and from where
    "name": "x", "model": None, "prefix": ("x",), "grid": (9, 9), "width": 9, "layers": 9, "vector": "x",
    "channels_last": True, "parameters": 9, "provenance": {}, "refusals": {"x": "y"},
}  # fmt: skip


def test_of_a_backbone_the_key_knows_what_decides_and_nothing_else(vit):
    assert IN_KEY | set(BESIDE_KEY) == {field.name for field in fields(Backbone)}
    backbone = load_backbone(str(vit))
    for name, value in BESIDE_KEY.items():
        assert fingerprint(replace(backbone, **{name: value})) == fingerprint(backbone)
    for name, value in [("architecture", {}), ("weights", {}), ("image_size", (9, 9)), ("position_embeddings", "x")]:
        assert fingerprint(replace(backbone, **{name: value})) != fingerprint(backbone)


ASKED = {"backbone", "weights", "random_weights", "seed", "image_size", "fit", "precision", "dtype", "bits", "crop"}
NOT_ASKED = {
    "data", "outputs", "name", "device", "batch_size", "workers", "on_error", "accept_drift", "cache", "columns",
    "task", "page", "classes_at", "leave_out", "order", "root", "uncertain", "letter_case", "hash_ids", "hash_groups",
    "remember", "progress", "copies", "augment", "augment_seed", "forward", "limit", "limit_seed",
    "engine", "actors", "num_gpus", "address",
}  # fmt: skip


def test_every_option_of_an_extraction_stands_on_one_of_the_lists():
    assert ASKED | NOT_ASKED == set(inspect.signature(plan.prepare).parameters)
    asked_of_backbone = {field.name for field in fields(BackboneRequest)} - {"meta"}
    assert asked_of_backbone == (ASKED - {"backbone", "precision", "dtype", "bits", "crop"}) | {"name"}


# what makes another store


def flip(path: Path, name: str) -> None:
    """One bit of one tensor."""
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.uint8)[-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_one_bit_of_any_tensor_makes_another_key(vit, tmp_path):
    names = sorted(load_file(vit / "model.safetensors"))
    names = names[:: max(1, len(names) // 12)]
    for name in names:
        flip(Path(shutil.copytree(vit, tmp_path / name)) / "model.safetensors", name)
    assert len({of(vit), *(of(tmp_path / name) for name in names)}) == len(names) + 1


def test_one_bit_of_a_torchvision_network_makes_another_key_one_of_its_classifier_does_not(tmp_path):
    state = models.mnasnet0_5().state_dict()
    keys = {}
    for name in ("", "layers.0.weight", "layers.1.running_var", "classifier.1.weight"):
        changed = {key: tensor.clone() for key, tensor in state.items()}
        if name:
            changed[name].view(-1).view(torch.uint8)[0] ^= 1
        torch.save(changed, tmp_path / "w.pt")
        keys[name] = of("torchvision:mnasnet0_5", weights=str(tmp_path / "w.pt"), image_size=64)
    assert keys["classifier.1.weight"] == keys[""]
    assert len(set(keys.values())) == 3


OTHER_CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 96, "hidden_act": "relu",
    "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "initializer_range": 0.5, "layer_norm_eps": 1e-6,
    "image_size": 64, "patch_size": 16, "num_channels": 3, "qkv_bias": False, "encoder_stride": 8,
    "pooler_output_size": 16, "pooler_act": "relu",
}  # fmt: skip


def test_every_field_of_a_configuration_makes_another_key(vit, tmp_path):
    known = load_backbone(str(vit)).architecture["config"]
    assert set(known) == set(OTHER_CONFIG)
    keys = {of(vit, random_weights=True, image_size=32)}
    for name in set(known) - {"num_channels"}:  # images have three
        folder = Path(shutil.copytree(vit, tmp_path / name))
        edit(folder / "config.json", **{name: OTHER_CONFIG[name]})
        keys.add(of(folder, random_weights=True, image_size=32))
    assert len(keys) == len(known)


NOT_DECIDING = {  # of the configurations of transformers: names, versions, labels, how the library is to be used
    "_name_or_path", "architectures", "transformers_version", "model_type", "id2label", "label2id", "problem_type",
    "dtype", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
    "chunk_size_feed_forward", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
    "vision_use_head",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted({family.model for family in FAMILIES.values()}))
def test_of_no_family_a_field_is_left_out_but_those_that_decide_nothing(kind):
    config = getattr(transformers, kind).config_class()
    assert set(config.to_dict()) - set(plain_config(config)) <= NOT_DECIDING


def test_the_scale_of_a_processor_makes_another_key(vit, tmp_path):
    folder = Path(shutil.copytree(vit, tmp_path / "m"))
    edit(folder / "preprocessor_config.json", rescale_factor=1 / 256)
    assert of(folder) != of(vit)


def test_what_is_asked_for_makes_another_key(vit, tmp_path):
    data = image_folder(tmp_path / "d", 2)
    asked = [
        {}, {"image_size": 64}, {"fit": "pad"}, {"precision": "bf16"}, {"precision": "fp16"}, {"dtype": "float32"},
        {"random_weights": True}, {"random_weights": True, "seed": 1},
    ]  # fmt: skip
    found = [plan.prepare(data, backbone=str(vit), cache=tmp_path / "c", **options).spec for options in asked]
    assert len({spec.fingerprint for spec in found}) == len(asked)


# what makes no other store: by the fingerprint


def test_names_of_torchvision_for_one_network_are_one_key():
    names = ("resnet18", "torchvision:resnet18", "torchvision:resnet18:IMAGENET1K_V1")
    assert len({of(name, random_weights=True, image_size=32) for name in names}) == 1


def test_a_pooler_that_a_file_holds_is_weights(tmp_path):
    with_pooler = save.save_vit(tmp_path / "with")
    without = Path(shutil.copytree(with_pooler, tmp_path / "without"))
    kept = {n: t for n, t in load_file(without / "model.safetensors").items() if not n.startswith("pooler")}
    save_file(kept, without / "model.safetensors", metadata={"format": "pt"})
    assert of(with_pooler) != of(without)
