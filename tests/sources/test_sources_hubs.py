"""Kaggle's and the Hugging Face hub's data sets, through copies on this machine and a hub of our own."""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socket import getaddrinfo

import numpy as np
import pytest
from PIL import Image
from support.pictures import image_folder, picture
from support.published_sets import chest_xray, kaggle_copy
from support.small_hub import small_hub

from featurecache.errors import NotFetched, SourceError, UnreadableImage
from featurecache.extraction.digest_cache import DigestCache
from featurecache.extraction.scan import scan
from featurecache.images import decoding
from featurecache.sources import open_source, reopen

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _copies_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.getaddrinfo", _offline)
    datasets.disable_progress_bars()


def _offline(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")


def refused(data: object, *words: str, error: type[SourceError] = SourceError, **options) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        open_source(data, **options)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value
    return str(caught.value)


def opened_again(data):  # type: ignore[no-untyped-def]
    again = reopen(json.loads(json.dumps(data.source)))
    assert (again.ids, again.splits, again.classes, again.groups) == (data.ids, data.splits, data.classes, data.groups)
    np.testing.assert_array_equal(again.labels, data.labels)
    assert again.read(1) == data.read(1)
    return again


# -- Kaggle


def test_kagglehubs_own_copy_is_used_without_kagglehub(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kagglehub", None)
    chest_xray(kaggle_copy(tmp_path / "kagglehub", "paultimothymooney/chest-xray-pneumonia", 2) / "chest_xray")
    data = open_source("kaggle:paultimothymooney/chest-xray-pneumonia")
    assert (data.name, data.classes, len(data)) == ("chest-xray-pneumonia", ["NORMAL", "PNEUMONIA"], 12)
    assert data.ids[0] == "test/NORMAL/IM-0001-0001.jpeg" and data.groups
    assert data.source["data"] == "kaggle:paultimothymooney/chest-xray-pneumonia/versions/2"
    opened_again(data)
    three = open_source("kaggle:paultimothymooney/chest-xray-pneumonia", columns={"label": "kind"})
    assert len(opened_again(three).classes) == 3


def test_the_newest_whole_version_is_taken_and_stays_the_one_that_is_opened_again(tmp_path):
    for version, count, whole in ((1, 2, True), (9, 3, True), (10, 4, True), (11, 6, False)):
        image_folder(kaggle_copy(tmp_path / "kagglehub", "o/s", version, whole), count)
    data = open_source("kaggle:o/s")
    assert len(data) == 4
    image_folder(kaggle_copy(tmp_path / "kagglehub", "o/s", 12), 5)
    assert len(open_source("kaggle:o/s")) == 5 and len(opened_again(data)) == 4
    assert len(open_source("kaggle:o/s/versions/9")) == 3
    refused("kaggle:o/s/versions/11", "o/s/versions/11 is not on this machine", error=NotFetched)


def test_images_some_folders_down_a_table_and_a_folder_that_is_named(tmp_path):
    top = kaggle_copy(tmp_path / "kagglehub", "o/deep")
    image_folder(top / "a/b/data")
    (top / "__MACOSX/a").mkdir(parents=True)
    (top / "a/licence.txt").write_text("-")
    assert open_source("kaggle:o/deep").ids[0] == "ill/000.png"
    (top / "a/labels.csv").write_text("path,label\nb/data/ill/000.png,x\nb/data/well/001.png,y\n")
    refused("kaggle:o/deep", "holds b, labels.csv: say which", "kaggle:o/deep/versions/1/a/labels.csv")
    table = open_source("kaggle:o/deep/versions/1/a/labels.csv")
    assert (len(table), table.source["kind"]) == (2, "kaggle")
    assert len(open_source("kaggle:o/deep/a/b")) == 12
    refused("kaggle:o/deep/nothing", "there is no nothing in o/deep")


def test_nothing_outside_the_set_is_opened(tmp_path):
    top = kaggle_copy(tmp_path / "kagglehub", "o/s")
    image_folder(tmp_path / "private")
    (top / "link").symlink_to(tmp_path / "private")
    refused("kaggle:o/s/link", "there is no link in o/s")
    refused("kaggle:o/s/../../../../private", "no name of a data set")


def test_a_set_that_is_not_here_says_what_fetches_it(tmp_path):
    pytest.importorskip("kagglehub")
    refused("kaggle:o/none", "o/none is not on this machine", "could not be fetched", str(tmp_path / "kagglehub"),
            "open_source('kaggle:o/none')", error=NotFetched)  # fmt: skip
    refused("kaggle:none", "no name of a data set; expected kaggle:<owner>/<set>")


def test_kagglehub_is_asked_for_what_is_not_here(tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    asked = []

    def download(handle: str) -> None:
        asked.append(handle)
        image_folder(kaggle_copy(tmp_path / "kagglehub", handle))

    monkeypatch.setattr(kagglehub, "dataset_download", download)
    assert len(open_source("kaggle:o/fetched")) == len(open_source("kaggle:o/fetched")) == 12
    assert asked == ["o/fetched"]


def test_a_set_that_a_notebook_mounts_elsewhere_is_said_to_lie_there(monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: "/kaggle/input/chest")
    refused("kaggle:o/chest", "mounts o/chest at /kaggle/input/chest", "give --data /kaggle/input/chest")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kagglehub", None)
    refused("kaggle:o/none", "pip install 'featurecache[kaggle]'")


# -- Hugging Face


def encoded(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def hub_set(count: int = 6, label=None, **columns):  # type: ignore[no-untyped-def]
    """A dataset of PNGs with classes cat and dog, and ``columns`` as (feature, values)."""
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [{"bytes": encoded(seed), "path": None} for seed in range(count)],
            "label": [seed % 2 for seed in range(count)]}  # fmt: skip
    for name, (feature, values) in columns.items():
        features[name], rows[name] = feature, values
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_folder_of_save_to_disk_gives_the_stored_bytes(tmp_path):
    splits = {"train": hub_set(6), "validation": hub_set(2), "test": hub_set(3)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "pets"))
    data = open_source(tmp_path / "pets")
    assert (data.source["kind"], data.name, data.classes, data.task) == ("hf", "pets", ["cat", "dog"], "binary")
    assert Counter(data.splits) == {"train": 6, "val": 2, "test": 3}
    assert (data.ids[6], data.read(6), data.labels[7]) == ("pets:validation:0", encoded(0), 1)
    opened_again(data)
    assert open_source(f"hf:{tmp_path}/pets").ids == data.ids


def test_one_split_alone_and_rows_that_were_selected(tmp_path):
    hub_set(6).select([5, 0, 2]).save_to_disk(str(tmp_path / "some"))
    data = open_source(tmp_path / "some")
    assert (set(data.splits), data.labels.tolist(), data.read(0)) == ({""}, [1, 0, 0], encoded(5))


def test_parquet_as_the_hub_has_it(tmp_path):
    (tmp_path / "pets/data").mkdir(parents=True)
    hub_set(6).to_parquet(str(tmp_path / "pets/data/train-00000-of-00001.parquet"))
    hub_set(2).to_parquet(str(tmp_path / "pets/data/test-00000-of-00001.parquet"))
    data = open_source(f"hf:{tmp_path}/pets")
    assert (Counter(data.splits), data.classes, data.read(2)) == ({"train": 6, "test": 2}, ["cat", "dog"], encoded(2))
    opened_again(data)


def test_an_image_folder_keeps_its_files(tmp_path):
    root = image_folder(tmp_path / "pets/train")
    data = open_source(f"hf:{tmp_path}/pets")
    assert data.ids[0] == "train/ill/000.png"
    assert data.path(0) == str(root / "ill/000.png") and data.classes == ["ill", "well"]


def test_a_name_of_the_hub_is_found_in_its_cache_and_pinned_to_the_commit(tmp_path):
    commit = "a" * 40
    place = tmp_path / "hub/datasets--me--pets"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    (place / "snapshots" / commit / "data").mkdir(parents=True)
    hub_set(4).to_parquet(str(place / "snapshots" / commit / "data/train-00000-of-00001.parquet"))
    data = open_source("hf:me/pets")
    assert (data.name, len(data), data.source["data"]) == ("pets", 4, f"hf:me/pets@{commit}")
    (place / "refs/main").write_text("b" * 40)
    opened_again(data)


@pytest.fixture
def hub_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """(the folder of the dataset me/pets, names of the files that were fetched from it)"""
    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with small_hub(tmp_path / "pets", "me/pets") as (address, fetched):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield tmp_path / "pets", fetched


def test_a_dataset_is_fetched_whole_and_opened_from_the_cache(hub_of, monkeypatch):
    folder, fetched = hub_of
    image_folder(folder / "train", 6)
    (folder / "train/ill/000.png").rename(folder / "train/ill/000.PNG")
    for name in (".gitattributes", "README.md", "pets.py"):
        (folder / name).write_text("-")
    data = open_source("hf:me/pets")
    assert (len(data), data.classes, data.name) == (6, ["ill", "well"], "pets")
    assert "pets.py" not in fetched
    before = len(fetched)
    monkeypatch.setattr("socket.getaddrinfo", _offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert len(open_source("hf:me/pets")) == len(opened_again(data)) == 6 and len(fetched) == before


def test_a_fetch_that_was_interrupted_is_completed_and_never_taken_for_the_whole(hub_of, tmp_path):
    image_folder(hub_of[0] / "train", 6)
    first = open_source("hf:me/pets")
    next((tmp_path / "hub").glob("datasets--me--pets/snapshots/*/train/ill/000.png")).unlink()
    with pytest.raises(NotFetched):  # nothing is fetched for a view
        reopen(first.source)
    assert len(open_source("hf:me/pets")) == len(reopen(first.source)) == 6


def test_several_labels_as_lists_of_classes_and_as_ones_and_zeros(tmp_path):
    names = datasets.ClassLabel(names=["mass", "nodule", "edema"])
    lists = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(0), "path": None}] * 3, "label": [[0, 2], [], [1]]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(names)}),
    )
    lists.save_to_disk(str(tmp_path / "lists"))
    data = open_source(tmp_path / "lists")
    assert (data.task, data.classes, data.labels.tolist()) == (
        "multilabel", ["mass", "nodule", "edema"], [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
    )  # fmt: skip
    ones = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(0), "path": None}] * 3, "label": [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))}),
    )
    ones.save_to_disk(str(tmp_path / "ones"))
    assert open_source(tmp_path / "ones").labels.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]


def test_two_columns_of_classes_have_to_be_told_apart_and_the_rest_is_kept(tmp_path):
    columns = {
        "fine": (datasets.ClassLabel(names=["a", "b", "c"]), [0, 1, 2, 0, 1, 2]),
        "coarse": (datasets.ClassLabel(names=["x", "y"]), [0, 0, 1, 0, 0, 1]),
        "patient": (datasets.Value("string"), ["p", "p", "q", None, "q", "r"]),
        "age": (datasets.Value("int32"), [1, 2, 3, 4, 5, 6]),
    }
    hub_set(6, **columns).remove_columns("label").save_to_disk(str(tmp_path / "set"))
    refused(tmp_path / "set", "could be the label: fine, coarse", "--column label=fine")
    data = open_source(tmp_path / "set", columns={"label": "coarse"})
    assert (data.classes, data.labels.tolist()) == (["x", "y"], [0, 0, 1, 0, 0, 1])
    assert data.groups == ["p", "p", "q", "set:3", "q", "r"]
    assert (data.meta["fine"], data.meta["age"].tolist()) == (["a", "b", "c"] * 2, [1, 2, 3, 4, 5, 6])
    opened_again(data)
    refused(tmp_path / "set", "no column 'kind' for the label", columns={"label": "kind"})


def test_a_test_split_without_labels_and_names_in_words(tmp_path):
    unknown = hub_set(2).map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": hub_set(4), "test": unknown}).save_to_disk(str(tmp_path / "a"))
    assert open_source(tmp_path / "a").labels.tolist() == [0, 1, 0, 1, -1, -1]
    words = datasets.Value("string")
    hub_set(4, kind=(words, ["b", "a", "b", "a"])).remove_columns("label").rename_column("kind", "label").save_to_disk(
        str(tmp_path / "b")
    )
    assert open_source(tmp_path / "b").labels.tolist() == [1, 0, 1, 0]


def test_an_empty_cell_is_a_failure_by_name_and_a_path_that_leads_out_is_not_followed(tmp_path):
    import pyarrow

    (tmp_path / "secret.png").write_bytes(encoded(3))
    hub_set(3).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
    cells = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    table = table.set_column(0, table.schema.field(0), pyarrow.array(cells, table.schema.field(0).type))
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    data = open_source(tmp_path / "set")
    for row, reason in ((1, "no image in this row"), (2, "leads out of the data set")):
        with pytest.raises(UnreadableImage, match=reason):
            data.read(row)


def test_splits_of_other_names(tmp_path):
    datasets.DatasetDict({"train": hub_set(4), "extra": hub_set(3)}).save_to_disk(str(tmp_path / "a"))
    data = open_source(tmp_path / "a")
    assert len(data) == 4 and "extra (3)" in data.notes[0]
    datasets.DatasetDict({"full": hub_set(4)}).save_to_disk(str(tmp_path / "b"))
    assert set(open_source(tmp_path / "b").splits) == {""}
    datasets.DatasetDict({"val": hub_set(4), "validation": hub_set(1)}).save_to_disk(str(tmp_path / "c"))
    refused(tmp_path / "c", "val, validation", "mean the same")


def test_names_that_are_none_and_folders_without_images(tmp_path):
    refused("hf:me/none", "me/none is not on this machine", "could not be fetched", error=NotFetched)
    refused("hf:not a name", "cannot be the name of a dataset")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    refused(tmp_path / "text", "no column of images among text, label")


@pytest.mark.slow
def test_rows_of_arrow_are_remembered_until_a_file_of_theirs_changes(tmp_path):
    datasets.DatasetDict({"train": hub_set(4), "test": hub_set(2)}).save_to_disk(str(tmp_path / "set"))
    past = time.time() - 100
    data = open_source(tmp_path / "set")
    for file in data.images.files:  # type: ignore[attr-defined]
        os.utime(file, (past, past))
    reads = []

    def counted(row: int):  # type: ignore[no-untyped-def]
        reads.append(row)
        return data.images.read_row(row)  # type: ignore[attr-defined]

    watched = replace(data, images=replace(data.images, read_row=counted))  # type: ignore[type-var]
    time.sleep(2.1)  # a file that has just changed is not trusted
    first = scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert sorted(reads) == [*range(6)]
    again = scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert len(reads) == 6 and (again.sample_image == first.sample_image).all()
    assert first.digests[2].decode() == decoding.digest(encoded(2))
    os.utime(data.images.files[1], (past + 5, past + 5))  # type: ignore[attr-defined]
    scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert len(reads) == 12


def test_stored_pixels_decode_as_they_should(tmp_path):
    hub_set(3).save_to_disk(str(tmp_path / "set"))
    decoded = decoding.decode(open_source(tmp_path / "set").read(1)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(encoded(1)))))
