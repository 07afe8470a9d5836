"""Which extractions go into the same store, where nothing of theirs is computed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support.pictures import image_folder
from support.small_hub import CACHED, put_in_cache

import featurecache
from featurecache.backbones import load_backbone
from featurecache.backbones.aliases import ALIASES, Alias
from featurecache.errors import BadOption
from featurecache.extraction import plan
from featurecache.store.store import stores

SMALL = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


class Cache:
    """One checkpoint "m" of which the images "d" are in one cache already, and a hub's cache that is empty."""

    def __init__(self, root: Path) -> None:
        self.root, self.hub, self.model, self.data = root, root / "hub", root / "m", root / "d"
        save.save_vit(self.model)
        image_folder(self.data, 4)
        self.first = self.extract(self.model)

    def extract(self, backbone: Any, data: Path | None = None, **options: Any) -> Any:
        options = {"outputs": "cls,tokens", "workers": 1, **options}
        return featurecache.extract(data or self.data, backbone=str(backbone), cache=self.root / "cache", **options)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.model, self.root / name))


@pytest.fixture
def cache(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    record = Alias(
        "hf:org/vit", 32, 17, 32, 0, "MIT", "", "vit", {**save.SIZE, "image_size": 32, "patch_size": 8}, SMALL
    )
    monkeypatch.setitem(ALIASES, "short-name", record)
    return Cache(tmp_path)


def from_the_hub(name: str) -> Callable[[Cache], dict[str, Any]]:
    def prepare(cache: Cache) -> dict[str, Any]:
        put_in_cache(cache.hub, cache.model, "org/vit")
        return {"backbone": name}

    return prepare


def by_alias_and_file(cache: Cache) -> dict[str, Any]:
    torch.save({"state_dict": cache.weights}, cache.root / "w.ckpt.pt")
    return {"backbone": "short-name", "weights": str(cache.root / "w.ckpt.pt")}


def another_readme(cache: Cache) -> dict[str, Any]:
    """A later revision that changed only its README."""
    settings = from_the_hub("hf:org/vit")(cache)
    old = cache.hub / "models--org--vit" / "snapshots" / CACHED
    new = Path(shutil.copytree(old, old.parent / CACHED[::-1], symlinks=True))
    (new / "README.md").write_text("now with a picture")
    (old.parents[1] / "refs" / "main").write_text(CACHED[::-1])
    assert load_backbone("hf:org/vit").provenance["revision"] != CACHED
    return settings


def in_shards(cache: Cache) -> dict[str, Any]:
    folder = cache.copy("sharded")
    (folder / "model.safetensors").unlink()
    network = transformers.ViTModel.from_pretrained(cache.model)
    network.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return {"backbone": folder}


def tensors_that_nothing_uses(cache: Cache) -> dict[str, Any]:
    folder = cache.copy("more")
    save_file({**cache.weights, "ema_decay": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    return {"backbone": folder}


def other_bookkeeping(cache: Cache) -> dict[str, Any]:
    folder = cache.copy("edited")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "_name_or_path": "/elsewhere", "transformers_version": "4.0.0", "torch_dtype": "float16",
        "id2label": {"0": "ill", "1": "well"}, "label2id": {"ill": 0, "well": 1}, "architectures": ["Other"],
        "problem_type": "regression", "output_attentions": False, "note_of_a_training_script": "x",
        "attn_implementation": "eager", "_attn_implementation": "eager",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {"backbone": folder}


def a_processor_saved_by_another_version(cache: Cache) -> dict[str, Any]:
    folder = cache.copy("older")
    constants = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    old = {**constants, "do_resize": True, "resample": 2, "size": 32, "feature_extractor_type": "ViTFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    return {"backbone": folder}


def renamed_relabelled_and_split(cache: Cache) -> dict[str, Any]:
    data = cache.root / "other"
    for number, path in enumerate(sorted(cache.data.rglob("*.png"))):
        label = {"ill": "well", "well": "ill"}[path.parent.name]
        target = data / ("train", "test")[number % 2] / label / f"new-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return {"backbone": cache.model, "data": data}


SAME: dict[str, Callable[[Cache], dict[str, Any]]] = {
    "the model's folder renamed": lambda cache: {"backbone": cache.model.rename(cache.root / "renamed")},
    "the model from the hub's cache": from_the_hub("hf:org/vit"),
    "an alias": from_the_hub("short-name"),
    "an alias with a file of weights": by_alias_and_file,
    "a revision that changed only its README": another_readme,
    "several files": in_shards,
    "tensors that nothing uses": tensors_that_nothing_uses,
    "bookkeeping and attention of the configuration": other_bookkeeping,
    "a processor of older transformers": a_processor_saved_by_another_version,
    "dataset moved and renamed": lambda cache: {"backbone": cache.model, "data": cache.data.rename(cache.root / "x y")},
    "images renamed, relabelled and split": renamed_relabelled_and_split,
}
OPTIONS: dict[str, Any] = {  # as they are anyway, or not of what is computed
    "image_size": 32, "fit": "squash", "seed": 5, "precision": "fp32", "dtype": "float16", "batch_size": 3,
    "workers": 3, "on_error": "skip", "name": "d", "outputs": "tokens,cls", "hash_ids": True,
}  # fmt: skip


@pytest.mark.parametrize("what", [*SAME, *OPTIONS])
def test_it_is_the_same_store_and_nothing_is_computed(what, cache):
    settings = SAME[what](cache) if what in SAME else {"backbone": cache.model, what: OPTIONS[what]}
    result = cache.extract(**{"name": "again", **settings})
    assert (result.computed, result.derived, result.images) == (0, 0, 4)
    assert len(list(stores(cache.root / "cache"))) == 1


def test_other_outputs_and_layers_are_computed_into_the_same_store(cache):
    result = cache.extract(cache.model, outputs="pooler,tokens@-2,mean,tokens-25")
    assert result.computed == 4
    assert len(list(stores(cache.root / "cache"))) == 1


def test_another_batch_size_is_refused_only_where_something_is_computed(cache):
    with pytest.raises(BadOption, match=r"Leave --batch-size out"):
        cache.extract(cache.model, outputs="pooler", batch_size=3)


def test_the_device_is_not_in_the_key(cache):
    options = {"backbone": str(cache.model), "cache": cache.root / "cache", "precision": "fp32"}
    here, there = (plan.prepare(cache.data, device=device, **options) for device in ("cpu", "meta"))
    assert here.spec.fingerprint == there.spec.fingerprint and there.to_compute == 0


def test_random_weights_of_one_seed_are_one_store_by_any_name(cache):
    first = cache.extract(cache.model, random_weights=True)
    (cache.model / "model.safetensors").unlink()
    put_in_cache(cache.hub, cache.model, "org/vit")
    again = [cache.extract(name, random_weights=True) for name in ("hf:org/vit", "short-name", cache.model)]
    assert first.computed == 4 and [result.computed for result in again] == [0, 0, 0]


def test_a_pooler_that_no_file_holds_is_not_in_the_key(tmp_path):
    """A model saved without its pooler gets a new random one at every loading; a classifier never had one."""
    alone = save.save_vit(tmp_path / "alone", pooler=False)
    data = image_folder(tmp_path / "d", 3)
    classifier = save.save_vit_classifier(tmp_path / "classifier")
    tensors = {f"vit.{name}": tensor for name, tensor in load_file(alone / "model.safetensors").items()}
    head = {n: t for n, t in load_file(classifier / "model.safetensors").items() if n.startswith("classifier")}
    save_file({**tensors, **head}, classifier / "model.safetensors", metadata={"format": "pt"})
    computed = []
    for seed, folder in enumerate((alone, alone, classifier)):
        torch.manual_seed(seed)
        computed.append(featurecache.extract(data, backbone=str(folder), cache=tmp_path / "c", workers=1).computed)
    assert computed == [3, 0, 0]
