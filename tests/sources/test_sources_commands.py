"""Every kind of published source through the commands: the dry run with its sheet, the extraction, and info."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support.published_sets import chest_xray, cifar10, eurosat, kaggle_copy, medmnist_file, tiny_imagenet

import cli
import featurecache


def call(*words: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def saved(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(np.full((9, 8), shade, np.uint8)) for shade in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "saved"))
    return str(root / "saved")


def medmnist(root: Path) -> str:
    medmnist_file(root, "breastmnist", np.arange(6) % 2)
    return f"medmnist:breastmnist@{root}"


def cifar(root: Path) -> str:
    cifar10(root, 2)
    return f"torchvision:CIFAR10@{root}"


def satellite(root: Path) -> str:
    eurosat(root)
    return f"torchvision:EuroSAT@{root}"


def kaggle(root: Path) -> str:
    chest_xray(kaggle_copy(root / "kagglehub", "o/chest") / "chest_xray")
    return "kaggle:o/chest"


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (medmnist, 18),
        (cifar, 12),
        (saved, 8),
        pytest.param(satellite, 9, marks=pytest.mark.slow),
        pytest.param(kaggle, 12, marks=pytest.mark.slow),
        pytest.param(lambda root: str(tiny_imagenet(root / "tiny")), 20, marks=pytest.mark.slow),
        pytest.param(lambda root: str(chest_xray(root / "chest")), 12, marks=pytest.mark.slow),
    ],
)
def test_dry_run_sheet_extraction_and_info(tmp_path, monkeypatch, make, images):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.chdir(tmp_path)
    data = make(tmp_path)
    words = ("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--data", data)
    dry = call(*words, "--dry-run", "--sheet", "sheet.png")
    assert f"{images} images" in dry.output
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 300
    done = json.loads(call(*words, "--json", "--quiet").stdout)
    assert done["images"] == images
    view = featurecache.open_view(done["view"])
    found = featurecache.open_source(data)
    assert (list(view.ids), list(view.classes)) == (found.ids, found.classes)
    shown = call("info", done["view"]).output
    assert all(name in shown for name in found.classes[:2])
    assert json.loads(call(*words, "--json", "--quiet").stdout)["computed"] == 0
