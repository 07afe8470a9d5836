"""Every kind of published source through the commands: the dry run with its sheet, the extraction, and info."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import call
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
