"""Every kind of published source through the commands: the dry run with its sheet, the extraction, and info."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import call
from support.pictures import image_folder
from support.published_sets import chest_xray, cifar10, eurosat, kaggle_copy, medmnist_file, tiny_imagenet
from support.small_sets import encoded

import featurecache


def saved(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": encoded(shade), "path": None} for shade in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "saved"))


def slow(*values: object):  # type: ignore[no-untyped-def]
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("data", "images", "make"),
    [
        ("medmnist:breastmnist@{}", 18, lambda root: medmnist_file(root, "breastmnist", np.arange(6) % 2)),
        ("torchvision:CIFAR10@{}", 12, lambda root: cifar10(root, 2)),
        ("{}/saved", 8, saved),
        slow("torchvision:EuroSAT@{}", 9, eurosat),
        slow("kaggle:o/chest", 12, lambda root: chest_xray(kaggle_copy(root / "kagglehub", "o/chest") / "chest_xray")),
        slow("{}/tiny", 20, lambda root: tiny_imagenet(root / "tiny")),
        slow("{}/chest", 12, lambda root: chest_xray(root / "chest")),
    ],
)
def test_dry_run_sheet_extraction_and_info(tmp_path, monkeypatch, data, images, make):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    data = data.format(tmp_path)
    words = ("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--data", data)
    assert f"{images} images" in call(*words, "--dry-run", "--sheet", "sheet.png").output
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 300
    record = json.loads(call(*words, "--json", "--quiet").stdout)
    view, opened = featurecache.open_view(record["view"]), featurecache.open_source(data)
    assert (record["images"], view.ids.tolist(), list(view.classes)) == (images, opened.ids, opened.classes)
    shown = call("info", record["view"]).output
    assert all(name in shown for name in opened.classes[:2])
    assert json.loads(call(*words, "--json", "--quiet").stdout)["computed"] == 0


EXTRACT = ("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--data")


def test_a_misspelt_class_is_a_warning_and_no_note_and_data_are_called_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "scans", 8, ("normal", "pneumonia"))
    image_folder(tmp_path / "scans", 1, ("pnuemonia",))
    screen = call(*EXTRACT, "scans/", "--dry-run").stdout
    assert "data       scans/  9 images: normal 4 · pneumonia 4 · pnuemonia 1" in screen
    assert "warning    class pnuemonia has 1 image. Near: pneumonia (4). " in screen
    assert screen.count("pnuemonia has") == 1 and str(tmp_path) not in screen
    (tmp_path / "scans/pnuemonia").rename(tmp_path / "scans/viral")
    assert "Near: " not in call(*EXTRACT, "scans/", "--dry-run").stdout


def test_one_image_without_a_label_from_extract_to_gc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "plain", 1, (".",))
    made = call(*EXTRACT, "plain")
    assert "data       plain  1 image: no labels\n" in made.stderr
    assert made.stderr.splitlines()[-1] == "next       featurecache export vit-demo/plain FILE.npz"
    shown = [made.output, call(*shlex.split("export vit-demo/plain FILE.npz")).output]
    info = call("info", "plain").stdout
    assert "understood" not in info and "classes" not in info
    sessions = (*EXTRACT, "plain", "--dry-run"), ("ls",), ("rm", "plain", "--yes"), ("gc",), ("gc", "--delete")
    shown += [info, *(call(*words).output for words in sessions)]
    assert "1 image, no labels: cls" in "".join(shown)
    assert re.findall(r"\b1 (?:\w+ )?(?:images|rows|shards|classes|files)\b.*", "".join(shown)) == []


def test_a_val_that_was_drawn_of_data_without_splits_was_not_drawn_from_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*EXTRACT, image_folder(tmp_path / "scans", 40))
    told = call("train-head", "--head", "linear", "--epochs", "1", "--no-controls").stderr
    assert "val has 3 images of ill, 3 images of well: too few to choose a model (drawn at random from few)" in told
