"""Values of 12 bits in 16-bit files: said, scaled by ``--bits``, which is in the key; decoding rules of before."""

from __future__ import annotations

import h5py  # noqa: F401  (its first import starts a process, and a test here may start nothing)
import numpy as np
import pytest
from PIL import Image
from support.command import call

import featurecache
from featurecache.errors import BadOption
from featurecache.extraction import plan
from featurecache.images import decoding
from featurecache.images.decoding import decode
from featurecache.sources import open_source, reopen
from featurecache.sources.summary import describe_dataset


@pytest.fixture
def dark(tmp_path):
    """Six 16-bit files of which the largest value is 4,095."""
    (tmp_path / "d").mkdir()
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 4096, (20, 20), dtype=np.uint16)
        values[0, 0] = 4095
        Image.fromarray(values).save(tmp_path / "d" / f"{number}.png")
    return tmp_path / "d"


def test_fewer_bits_than_the_files_have_are_said_with_what_to_type(dark):
    notes = [note for note in describe_dataset(open_source(dark)).notes if "12-bit" in note]
    assert notes == [
        "12-bit values in 16-bit files: nearly black (at most 6.2 % of white); --bits 12 scales them."
    ]  # fmt: skip
    assert not any("12-bit" in note for note in describe_dataset(open_source(dark, bits=12)).notes)


def test_bits_are_in_the_key_the_source_and_the_command(dark, vit, tmp_path):
    options = {"backbone": vit, "cache": tmp_path / "c", "outputs": "cls"}
    plain = featurecache.open_view(featurecache.extract(dark, **options).view)
    scaled = featurecache.open_view(featurecache.extract(dark, **options, bits=12).view)
    assert scaled.fingerprint != plain.fingerprint and scaled.spec["preprocess"]["bits"] == 12
    assert "bits" not in plain.spec["preprocess"] and "--bits 12" in scaled.extract_command("tokens")
    assert decode(reopen(scaled.source).read(0)).max() == 255 and decode(reopen(plain.source).read(0)).max() == 16
    rows, failed = featurecache.compute([(dark / "0.png").read_bytes()], like=scaled, output="cls")
    assert not failed and np.allclose(rows[0].float(), scaled.tensor("cls", [0])[0].float(), atol=1e-2)
    assert not np.allclose(rows[0].float(), plain.tensor("cls", [0])[0].float(), atol=1e-2)


def test_bits_that_are_about_none_of_the_images_or_no_bits_are_refused(dark, vit, tmp_path):
    with pytest.raises(BadOption, match=r"none of 200 images looked at is one"):
        plan.prepare("digits", backbone=vit, cache=tmp_path / "c", bits=12)
    with pytest.raises(BadOption, match="--bits is 1 to 15"):
        open_source(dark, bits=16)
    with pytest.raises(BadOption, match="give them to open_source"):
        plan.prepare(open_source(dark), backbone=vit, cache=tmp_path / "c", bits=12)
    with pytest.raises(BadOption, match="columns and classes_at say how data are read: give them to open_source"):
        plan.prepare(open_source(dark), backbone=vit, cache=tmp_path / "c", classes_at=1, columns={"label": "x"})


def test_values_above_the_bits_are_a_named_failure(dark, vit, tmp_path):
    Image.fromarray(np.full((20, 20), 5000, np.uint16)).save(dark / "x.png")
    result = featurecache.extract(dark, backbone=vit, cache=tmp_path / "c", outputs="cls", bits=12)
    assert result.failed == [("x.png", "a value of 5,000; --bits 12 ends at 4,095")]


def test_a_store_of_the_rules_of_before_is_not_used_and_why_names_them(dark, tmp_path, monkeypatch):
    asked = ("--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--cache", tmp_path / "c")
    monkeypatch.setattr(decoding, "DECODING", decoding.DECODING - 1)
    assert call("extract", "--data", dark, *asked).exit_code == 0
    assert "has this key" in call("why", *asked).output
    monkeypatch.undo()
    assert f"decoding  {decoding.DECODING - 1} → {decoding.DECODING}" in call("why", *asked).output
    told = call("why", "--data", dark, *asked).output
    assert "0 of 6 distinct images are there" in told


@pytest.mark.integration
def test_networks_from_pixels_are_warned_of_dark_images_as_an_extraction_is(dark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{k}.png,{k % 2},{('train', 'val', 'test')[k // 2]}" for k in range(6)]
    (dark / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    words = ("--data", dark / "list.csv", "--dry-run")
    said = "warning    12-bit values in 16-bit files: nearly black (at most 6.2 % of white); --bits 12 scales them."
    assert said in call("ablate", "--heads", "cnn-cifar", *words).stderr
    assert "12-bit" not in call("ablate", "--heads", "cnn-cifar", *words, "--bits", "12").stderr
    result = call("train-baseline", "--arch", "cnn-cifar", *words[:2], "--epochs", "1", "--only", "none")
    assert result.exit_code == 2 and said not in result.stderr  # the class is looked for before an image is
    monkeypatch.setattr("heads.api.open_pixels", lambda *_, **__: (_ for _ in ()).throw(BadOption("enough")))
    assert said in call("train-baseline", "--arch", "cnn-cifar", *words[:2], "--epochs", "1").stderr
