"""`why`: which field of a key differs from the nearest store, and what of the images is there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from support import checkpoints as save
from support.command import call
from support.pictures import image_folder, save_picture

import featurecache
from featurecache.errors import BadOption, OutputRefused
from featurecache.extraction import canary
from featurecache.extraction.cache_miss import _nearest, explain_miss
from featurecache.store.spec import ExtractionSpec, describe_differences, spec_differences
from featurecache.store.store import Store, create_store, open_store, stores


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint "m", images "d" and the store of both."""
    monkeypatch.chdir(tmp_path)
    save.save_vit(tmp_path / "m")
    image_folder(tmp_path / "d", 6)
    featurecache.extract("d", backbone="m", cache="cache", outputs="cls", workers=2)
    return tmp_path


def why(*words: Any) -> Result:
    result = call("why", *map(str, words))
    assert result.exit_code == 0, result.output
    return result


def store_name() -> str:
    return next(stores(Path("cache"))).path.name


def drift(folder: Path, **made_by: str) -> Store:
    """The store, as if another machine had made its reference."""
    store = open_store(folder / "cache" / store_name())
    kept = canary.read_canary(store)
    assert kept is not None
    rows = {name: row * 1.5 for name, row in kept.rows.items()}
    canary.write_canary(store, replace(kept, rows=rows, made_by={**kept.made_by, **made_by}))
    save_picture(folder / "d" / "ill" / "new.png", 77)
    return store


def test_another_image_size_is_said_in_two_lines(folder):
    result = why("--backbone", "m", "--image-size", 64, "--data", "d")
    assert result.stdout.splitlines()[:3] == [
        f"no store has this key. Nearest: {store_name()}, which differs in",
        "  image_size           32 → 64",
        "  position_embeddings  as trained → interpolated (bicubic)",
    ]
    assert result.stderr == "next       featurecache extract --backbone m --data d --image-size 64\n"


def test_without_images_the_key_alone_is_looked_up(folder):
    assert why("--backbone", "m").stdout == f"{store_name()} has this key. It holds cls.\n"
    result = why("--backbone", "m", "--dtype", "float32")
    assert result.stdout.splitlines()[1:] == ["  dtype  float16 → float32"]
    assert result.stderr == "next       featurecache extract --backbone m --dtype float32 --data FOLDER\n"


def test_images_that_are_there_and_new_content_are_counted(folder):
    for name in ("new.png", "the same again.png"):
        save_picture(folder / "d" / "ill" / name, 77)
    lines = why("--backbone", "m", "--data", "d", "--outputs", "cls").stdout.splitlines()
    assert lines[1:] == ["6 of 7 distinct images are there for cls; 1 is new content"]
    record = json.loads(why("--backbone", "m", "--data", "d", "--json").stdout)
    assert record["hit"] and record["differs"] == [] and record["nearest"] is None
    assert record["images"]["cls"] == {"there": 6, "to_derive": 0, "to_compute": 1}
    assert record["images"]["tokens"] == {"there": 0, "to_derive": 0, "to_compute": 7}


def test_outputs_that_follow_from_stored_tokens_are_no_new_content(folder):
    featurecache.extract("d", backbone="m", cache="cache", outputs="tokens", workers=2)
    lines = why("--backbone", "m", "--data", "d", "--outputs", "mean,tokens").stdout.splitlines()
    assert "0 of 6 distinct images are there for mean; 6 follow from stored tokens" in lines
    assert "6 of 6 distinct images are there for tokens, cls" in lines


def test_nothing_is_written(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    save_picture(folder / "other" / "ill" / "new.png", 77)
    before |= {path: path.stat().st_mtime_ns for path in (folder / "other").rglob("*")}
    before[folder / "other"] = (folder / "other").stat().st_mtime_ns
    why("--backbone", "m", "--data", "other", "--dtype", "float32")
    why("--backbone", "m", "--data", "other", "--outputs", "pooler")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_weights_are_named_by_digest_and_where_they_came_from(folder):
    tensors = load_file(folder / "m" / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, folder / "w.safetensors", metadata={"format": "pt"})
    old = next(stores(Path("cache"))).spec.weights["blake2b"][:8]
    found = explain_miss(backbone="m", weights="w.safetensors", cache="cache")
    row = str(found).splitlines()[1]
    new = found.spec.weights["blake2b"][:8]
    assert row == f"  weights  {old} (m) → {new} ({str(folder / 'w.safetensors')[-60:]})"
    row = str(explain_miss(backbone="m", random_weights=True, seed=3, cache="cache")).splitlines()[1]
    assert row == f"  weights  {old} (m) → untrained, seed 3"


def test_a_field_of_the_configuration_and_of_the_preprocessing_is_named(folder):
    config = json.loads((folder / "m" / "config.json").read_text())
    (folder / "m" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    processor = json.loads((folder / "m" / "preprocessor_config.json").read_text())
    changed = {"image_mean": [0.485, 0.456, 0.406], "resample": 3}
    (folder / "m" / "preprocessor_config.json").write_text(json.dumps({**processor, **changed}))
    found = explain_miss(backbone="m", cache="cache", fit="pad")
    assert str(found).splitlines()[1:] == [
        "  config.layer_norm_eps  1e-12 → 1e-06",
        "  mode                   squash → pad",
        "  interpolation          bilinear → bicubic",
        "  mean                   0.5 → 0.485 0.456 0.406",
    ]
    names = [each["field"] for each in found.record()["differs"]]
    assert names[0] == "architecture.config.layer_norm_eps" and "preprocess.mean" in names


def test_another_architecture_is_one_line(folder):
    save.save_resnet(folder / "r")
    lines = str(explain_miss(backbone="r", cache="cache")).splitlines()
    assert "  architecture         ViTModel of transformers → ResNetModel of transformers" in lines
    assert not any("config" in line for line in lines)


def test_an_empty_cache_says_so(folder):
    result = why("--backbone", "m", "--cache", "nothing")
    assert result.stdout == "no store has this key: nothing holds no store that can be read.\n"
    assert result.stderr.endswith("--cache nothing --data FOLDER\n") and not (folder / "nothing").exists()


def test_a_store_that_cannot_be_read_is_named(folder):
    (folder / "cache" / store_name() / "spec.json").write_text("{")
    text = why("--backbone", "m", "--dtype", "float32").stdout
    assert "holds no store that can be read" in text and "note: " in text and "spec.json" in text


def test_auto_precision_is_that_of_the_store_there_is(folder):
    featurecache.extract("d", backbone="m", cache="b", outputs="cls", workers=2, precision="bf16")
    assert explain_miss(backbone="m", cache="b").store is not None
    assert explain_miss("d", backbone="m", cache="b").store is not None
    found = explain_miss(backbone="m", cache="b", precision="fp32")
    assert str(found).splitlines()[1:] == ["  precision  bf16 → fp32"]


def test_options_about_images_need_images(folder):
    result = call("why", "--backbone", "m", "--workers", "2")
    assert result.exit_code == 2 and result.output == "error: --workers is about the images; say which with --data.\n"


def test_an_output_that_there_is_not_is_refused_without_images_too(folder):
    with pytest.raises(OutputRefused, match=r"has no gap"):
        explain_miss(backbone="m", cache="cache", outputs="gap")
    with pytest.raises(BadOption, match=r"stretch"):
        explain_miss(backbone="m", cache="cache", fit="stretch")


def test_a_run_that_drift_would_stop_is_foretold(folder):
    drift(folder)
    text = why("--backbone", "m", "--data", "d", "--outputs", "cls").stdout
    assert "note: this machine does not compute the features that" in text and "--accept-drift" in text


def test_generations_are_explained_by_what_changed_between_them(folder):
    store = drift(folder, torch="1.0")
    featurecache.extract("d", backbone="m", cache="cache", outputs="cls", workers=2, accept_drift=True)
    text = why("--backbone", "m").stdout
    newest = max(stores(folder / "cache"), key=lambda store: store.spec.generation)
    assert newest.spec.generation == 1 and text.startswith(f"{newest.path.name} has this key.")
    assert f"is generation 1: another machine or other versions computed something else than {store.path.name}" in text
    assert f"torch 1.0 → {version('torch')}" in text


# the two specs side by side


def spec(**changes: Any) -> ExtractionSpec:
    plain = ExtractionSpec(
        {"library": "l", "class": "c", "config": {"a": 1}}, {"blake2b": "0" * 32}, {}, (8, 8), "none"
    )
    return replace(plain, **changes)


def test_the_same_architecture_comes_before_fewer_fields_and_fewer_fields_before_fewer_values_then_the_newest(tmp_path):
    asked = spec(preprocess={"a": 1, "b": 2, "c": 3})
    many = replace(asked, weights={"random_seed": 1}, dtype="float32", precision="bf16", position_embeddings="x")
    two = replace(asked, dtype="float32", precision="bf16")
    one = replace(asked, preprocess={"a": 9, "b": 9, "c": 9})
    resized = replace(asked, architecture={"library": "l", "class": "c", "config": {"a": 2}})
    other = replace(asked, architecture={"library": "l", "class": "d", "config": {"a": 1}})
    stored = [(many, (other, many)), (one, (one, two)), (two, (resized, two)), (resized, (other, resized))]
    for expected, known in stored:
        cache = tmp_path / expected.fingerprint
        for each in known:
            create_store(cache, "s", each, {})
        nearest = _nearest(cache, asked)
        assert nearest is not None and nearest.spec == expected
    for seed in (1, 2):
        create_store(tmp_path / "newest", "s", replace(asked, weights={"random_seed": seed}), {})
    *_, last = stores(tmp_path / "newest")
    os.utime(last.path / "spec.json", (2**40, 2**40))
    assert _nearest(tmp_path / "newest", asked).path == last.path  # type: ignore[union-attr]


def test_a_field_that_only_one_has_is_a_dash():
    new = spec(architecture={"library": "l", "class": "c", "config": {"a": 1, "b": None, "c": [1, 2]}})
    assert [(d.field, d.stored, d.asked) for d in spec_differences(spec(), new)] == [
        ("architecture.config.b", "—", None),
        ("architecture.config.c", "—", [1, 2]),
    ]
    assert describe_differences(spec(), new, ({}, {})) == [("config.b", "— → none"), ("config.c", "— → 1×2")]


def test_long_values_are_cut_and_control_characters_do_not_reach_the_terminal():
    new = spec(position_embeddings="x" * 500, architecture={"library": "l", "class": "c", "config": {"a": "\x1b[31m"}})
    rows = dict(describe_differences(spec(), new, ({}, {})))
    assert rows["position_embeddings"] == f"none → {'x' * 59}…"
    assert rows["config.a"] == "1 → ?[31m"


def test_sizes_that_do_not_only_follow_from_the_image_size_are_shown(folder):
    processor = json.loads((folder / "m" / "preprocessor_config.json").read_text())
    changed = {**processor, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    changed["size"] = {"shortest_edge": 40}
    (folder / "m" / "preprocessor_config.json").write_text(
        json.dumps({**changed, "image_processor_type": "BitImageProcessor"})
    )
    rows = str(explain_miss(backbone="m", cache="cache", image_size=64)).splitlines()
    assert any(row.split() == ["resize", "32×32", "→", "80"] for row in rows)
