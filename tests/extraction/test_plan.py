"""What is decided before anything is computed, where the cache is not in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.pictures import image_folder

import featurecache
from featurecache.errors import BadOption, DamagedFile, OutputRefused
from featurecache.extraction import plan
from featurecache.files.records import canonical_json
from featurecache.store.view import View


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", 5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_cut_shard_of_another_output_stops_no_run(tmp_path: Path, data: Path, vit: str) -> None:
    view = featurecache.extract(data, backbone=vit, cache=tmp_path / "c", outputs="cls,tokens", precision="bf16").view
    cut(next(view.parent.glob("tokens/*.h5")))
    prepared = plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="cls", name="other")
    assert (prepared.spec.precision, prepared.to_compute) == ("bf16", 0)  # still that of the store with these images
    assert len(View(prepared.run().view)) == 5


def test_a_cut_shard_of_what_is_asked_for_counts_as_nothing_until_it_is_used(tmp_path, data, vit):
    options = {"backbone": vit, "cache": tmp_path / "c", "outputs": "cls", "name": "other"}
    view = featurecache.extract(data, **options, precision="bf16").view
    cut(next(view.parent.glob("cls/*.h5")))
    assert plan.prepare(data, **options).spec.precision == "fp32"  # the device's own: nothing is known to be held
    with pytest.raises(DamagedFile, match="cls"):
        plan.prepare(data, **options, precision="bf16")


def test_an_output_the_backbone_has_not_is_refused_before_an_image_is_read(tmp_path, monkeypatch, data, vit):
    monkeypatch.setattr("featurecache.sources.base.ImageFiles.read", lambda self, row: pytest.fail("was read"))
    with pytest.raises(OutputRefused):
        plan.prepare(data, backbone=vit, cache=tmp_path / "c", outputs="gap")
    assert not (tmp_path / "c").exists()


def test_a_zero_byte_in_a_column_is_refused_before_an_image_is_read(tmp_path: Path, data: Path, vit: str) -> None:
    table = data / "list.csv"
    table.write_text("path,remark\nill/000.png,fine\nwell/001.png,a\0b\n")
    with pytest.raises(featurecache.FeatureCacheError, match=r"NUL"):
        plan.prepare(table, backbone=vit, cache=tmp_path / "c")


@pytest.mark.parametrize("option", ["batch_size", "workers"])
def test_no_images_at_a_time_and_no_threads_are_refused(tmp_path: Path, data: Path, vit: str, option: str) -> None:
    with pytest.raises(BadOption, match=f"--{option.replace('_', '-')} is at least 1, not 0"):
        plan.prepare(data, backbone=vit, cache=tmp_path, **{option: 0})


def test_numbers_of_numpy_are_those_of_python(tmp_path: Path, data: Path, vit: str) -> None:
    how = {"limit": 4, "limit_seed": 1, "image_size": 64, "batch_size": 2, "workers": 1}
    given = plan.prepare(data, backbone=vit, cache=tmp_path, **{name: np.int64(value) for name, value in how.items()})
    own = plan.prepare(data, backbone=vit, cache=tmp_path, **how)
    assert (given.dataset.source, given.spec, given.workers) == (own.dataset.source, own.spec, own.workers)
    assert canonical_json([given.dataset.source, given.spec.to_dict()])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 2.5}, "--limit is 2.5; it must be a whole number"),
        ({"image_size": "64"}, "--image-size is '64'; it must be a whole number"),
        ({"hash_ids": "no"}, "--hash-ids is 'no'; it must be True or False"),
        ({"columns": "label=site"}, "columns is 'label=site'; it must be a dict of column by role"),
    ],
)
def test_an_option_of_another_type_is_refused(tmp_path: Path, data: Path, vit: str, options, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        featurecache.extract(data, backbone=vit, cache=tmp_path, **options)
