"""The certificate of half precision: what rounding did to every row, measured while it is written."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import save_vit
from support.command import call
from support.pictures import image_folder
from transformers import AutoImageProcessor, ViTModel

import featurecache


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    home = tmp_path_factory.mktemp("half")
    save_vit(home / "vit")
    image_folder(home / "data", 5)
    return home


def extract(home: Path, cache: Path, **options) -> featurecache.View:  # type: ignore[no-untyped-def, name-defined]
    options = {"outputs": "cls,tokens,mean,tokens-20", "batch_size": 4, "workers": 1, **options}
    result = featurecache.extract(home / "data", backbone=str(home / "vit"), cache=cache, **options)
    return featurecache.open_view(result.view)


def test_it_is_the_distance_from_what_the_library_computes_in_float32(home: Path, tmp_path: Path) -> None:
    view = extract(home, tmp_path)
    processor, model = AutoImageProcessor.from_pretrained(home / "vit"), ViTModel.from_pretrained(home / "vit").eval()
    images = [Image.open(home / "data" / name).convert("RGB") for name in view.ids]
    with torch.no_grad():
        tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
    for name, exact in (("tokens", tokens), ("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        stored = view.tensor(name).float()
        expected = (stored - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert view.stored(name).errors == pytest.approx(expected.numpy(), rel=0.02)
    errors = view.stored("tokens-20").errors
    assert errors is not None and ((errors > 5e-5) & (errors < 2.0**-11)).all()


def test_shards_keep_it_row_by_row_for_plain_h5py(home: Path, tmp_path: Path) -> None:
    view = extract(home, tmp_path)
    (shard,) = view.store.glob("tokens/*.h5")
    with h5py.File(shard) as file:
        assert file["errors"].dtype == np.float32
        assert sorted(file["errors"][...]) == sorted(view.stored("tokens").errors)  # type: ignore[type-var]


def test_a_float32_store_has_none(home: Path, tmp_path: Path) -> None:
    view = extract(home, tmp_path, dtype="float32")
    assert view.stored("tokens").errors is None
    assert "rounding" not in call("info", "data", "--cache", str(tmp_path)).output


def test_what_is_derived_later_was_not_measured_and_info_says_so(home: Path, tmp_path: Path) -> None:
    extract(home, tmp_path, outputs="tokens")
    view = extract(home, tmp_path, outputs="mean")
    assert np.isnan(view.stored("mean").errors).all()  # type: ignore[arg-type]
    shown = call("info", "data", "--cache", str(tmp_path)).output
    assert "rounding to float16 was not measured" in shown
    worst, mean = view.stored("tokens").errors.max(), view.stored("tokens").errors.mean()  # type: ignore[union-attr]
    assert f"moved a row by {worst:.1e} at worst, {mean:.1e} on average, relative to float32" in shown
