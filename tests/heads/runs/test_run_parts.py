"""What is read out of a run by itself, its splits and its network, is what was written with it, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import checkpoints
from support.plant import flip

from featurecache.backbones import load_backbone
from featurecache.errors import DamagedFile
from heads.runs.folder import seal_folder
from heads.splits import read_splits, splits_csv

IDS = np.array(["a", "b", "c"], dtype=object)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "splits.csv").write_text(splits_csv(IDS, np.array(["train", "val", "test"])))
    seal_folder(tmp_path / "run", "config.json", {"head": "linear"})
    return tmp_path / "run"


def replaced(path: Path, old: bytes, new: bytes) -> None:
    assert path.read_bytes().count(old) >= 1
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new"), [("splits.csv", b"val", b"test"), ("config.json", b"linear", b"lin3ar")]
)
def test_splits_of_a_run_in_which_something_changed_are_refused(run, file, old, new, monkeypatch):
    assert read_splits(run / "splits.csv", IDS, []).tolist() == ["train", "val", "test"]
    replaced(run / file, old, new)
    monkeypatch.chdir(run)
    with pytest.raises(DamagedFile, match=r"splits\.csv is not what was written with the run .*run, or config\.json"):
        read_splits("splits.csv", IDS, [])


def test_splits_beside_a_config_of_somebody_else_are_read(tmp_path):
    (tmp_path / "splits.csv").write_text(splits_csv(IDS, np.array(["train", "val", "test"])))
    for text in (
        "no JSON",
        "{}",
        '{"format": 1}',
        '{"files": {"splits.csv": 3}}',
        '{"format": 1, "files": ["splits.csv"]}',
    ):
        (tmp_path / "config.json").write_text(text)
        assert read_splits(tmp_path / "splits.csv", IDS, []).tolist() == ["train", "val", "test"]


@pytest.mark.integration
@pytest.mark.parametrize("how", ["folder", "weights", "file"])
def test_the_network_of_a_run_with_a_flipped_bit_is_refused(tmp_path, how):
    backbone = Path(checkpoints.save_vit(tmp_path / "run" / "backbone"))
    seal_folder(tmp_path / "run", "config.json", {"head": "finetune:vit"})
    file = backbone / "model.safetensors"
    options = {"weights": str(backbone if how == "weights" else file)} if how != "folder" else {}
    other = str(checkpoints.save_vit(tmp_path / "other"))
    load_backbone(f"hf:{backbone if how == 'folder' else other}", **options)
    flip(file, -3)
    with pytest.raises(DamagedFile, match=r"backbone/model\.safetensors is not what was written with the run"):
        load_backbone(f"hf:{backbone if how == 'folder' else other}", **options)
