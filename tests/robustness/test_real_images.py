"""Real images end to end: PneumoniaMNIST and Medical MNIST. Skipped where they are absent."""

from __future__ import annotations

import tarfile
from pathlib import Path

import h5py
import numpy as np
from support.checkpoints import save_vit

import featurecache
import heads


def test_pneumoniamnist_has_its_rows_and_its_repeated_images_are_stored_once(real_data: Path, tmp_path: Path) -> None:
    result = featurecache.extract(
        real_data / "pneumoniamnist.npz", backbone=str(save_vit(tmp_path / "vit")), cache=tmp_path, outputs="cls"
    )
    view = featurecache.open_view(result.view)
    assert [len(view.split(name)) for name in ("train", "val", "test")] == [4708, 524, 624]
    assert (view.task, view.classes) == ("binary", ["normal", "pneumonia"])
    counts = {name: np.bincount(view.labels[view.split(name)]).tolist() for name in ("train", "val", "test")}
    assert counts == {"train": [1214, 3494], "val": [135, 389], "test": [234, 390]}
    stored = sum(len(h5py.File(path)["digests"]) for path in view.store.glob("cls/*.h5"))
    assert stored == result.computed == 5856 - 18 - 3 - 8  # repeats in train, in test, and of train in val
    assert len(set(view.digests[view.split("train")]) & set(view.digests[view.split("val")])) == 8


def test_medical_mnist_from_its_folders_to_a_prediction(real_data: Path, tmp_path: Path) -> None:
    with tarfile.open(real_data / "medical-mnist.tar.xz") as archive:
        some = [m for m in archive if m.isfile() and int(Path(m.name).stem.lstrip("0") or 0) % 8 == 0]
        archive.extractall(tmp_path, members=some, filter="data")
    data = tmp_path / "medical-mnist"
    result = featurecache.extract(data, backbone=str(save_vit(tmp_path / "vit")), cache=tmp_path)
    view = featurecache.open_view(result.view)
    assert view.classes == ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"]
    assert {i.split("/")[0] for i in view.ids} == {"train", "val", "test"}
    run = heads.train_head(view, "large", epochs=3, out=tmp_path / "run", controls=False)
    assert run.metrics["test"]["accuracy"] > 0.8
    image = next((data / "test" / "CXR").iterdir())
    assert set(heads.predict(run, image)[0]["probabilities"]) == set(view.classes)
