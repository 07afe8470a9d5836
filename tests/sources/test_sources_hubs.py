"""Kaggle's and the Hugging Face hub's data sets, through copies on this machine and a hub of our own."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socket import getaddrinfo

import pytest
from support.pictures import image_folder
from support.published_sets import chest_xray, kaggle_copy
from support.small_hub import small_hub
from support.small_sets import encoded, refused, reopened, shades_of

from featurecache.errors import BadOption, NotFetched, SeveralReadings, UnreadableImage
from featurecache.extraction.digest_cache import DigestCache
from featurecache.extraction.scan import scan
from featurecache.images import decoding
from featurecache.sources import huggingface, open_images, open_source, reopen

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _copies_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


# -- Kaggle


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    return tmp_path / "kagglehub"


def test_kagglehubs_own_copy_is_used_without_kagglehub(kaggle, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    chest_xray(kaggle_copy(kaggle, "paultimothymooney/chest-xray-pneumonia", 2) / "chest_xray")
    data = open_source("kaggle:paultimothymooney/chest-xray-pneumonia")
    assert (data.name, data.classes, len(data)) == ("chest-xray-pneumonia", ["NORMAL", "PNEUMONIA"], 12)
    assert data.ids[0] == "test/NORMAL/IM-0001-0001.jpeg" and data.groups
    assert data.source["data"] == "kaggle:paultimothymooney/chest-xray-pneumonia/versions/2"
    reopened(data)
    three = open_source("kaggle:paultimothymooney/chest-xray-pneumonia", columns={"label": "kind"})
    assert len(reopened(three).classes) == 3
    refused("kaggle:o/none", "pip install 'featurecache[kaggle]'")


def test_the_newest_whole_version_is_taken_and_stays_the_one_that_is_opened_again(kaggle):
    for version, count, whole in ((1, 2, True), (9, 3, True), (10, 4, True), (11, 6, False)):
        image_folder(kaggle_copy(kaggle, "o/s", version, whole), count)
    data = open_source("kaggle:o/s")
    assert len(data) == 4
    image_folder(kaggle_copy(kaggle, "o/s", 12), 5)
    assert len(open_source("kaggle:o/s")) == 5 and len(reopened(data)) == 4
    assert len(open_source("kaggle:o/s/versions/9")) == 3
    refused("kaggle:o/s/versions/11", "o/s/versions/11 is not on this machine", error=NotFetched)


def test_images_some_folders_down_a_table_and_a_folder_that_is_named(kaggle):
    top = kaggle_copy(kaggle, "o/deep")
    refused("kaggle:o/deep", "o/deep/versions/1 holds no folder of images and no table")
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


def test_nothing_outside_the_set_is_opened(kaggle, tmp_path):
    (kaggle_copy(kaggle, "o/s") / "link").symlink_to(image_folder(tmp_path / "private"))
    refused("kaggle:o/s/link", "there is no link in o/s")
    refused("kaggle:o/s/../../../../private", "no name of a data set")
    refused("kaggle:none", "no name of a data set; expected kaggle:<owner>/<set>")


def test_kagglehub_is_asked_for_what_is_not_here(kaggle, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    refused("kaggle:o/none", f"o/none is not on this machine (looked in {kaggle}/datasets/o/none) and could not be "
            "fetched (", "). Where there is a network", "open_source('kaggle:o/none')", error=NotFetched)  # fmt: skip
    handles = []

    def download(handle: str) -> None:
        handles.append(handle)
        image_folder(kaggle_copy(kaggle, handle))

    monkeypatch.setattr(kagglehub, "dataset_download", download)
    assert len(open_source("kaggle:o/fetched")) == len(open_source("kaggle:o/fetched")) == 12
    assert handles == ["o/fetched"]
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: "/kaggle/input/chest")  # as notebooks mount it
    refused("kaggle:o/chest", "mounts o/chest at /kaggle/input/chest", "give --data /kaggle/input/chest")


# -- Hugging Face


def rows_of(*labels, kind=None, **columns):  # type: ignore[no-untyped-def]
    """A dataset of PNGs whose shade is their number, with classes cat and dog or labels of another ``kind``, and
    ``columns`` as (feature, values)."""
    columns = {"label": (kind or datasets.ClassLabel(names=["cat", "dog"]), list(labels)), **columns}
    images = [{"bytes": encoded(shade), "path": None} for shade in range(len(labels))]
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    rows = {"image": images, **{name: values for name, (_, values) in columns.items()}}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def pets(count: int):  # type: ignore[no-untyped-def]
    return rows_of(*[number % 2 for number in range(count)])


def saved(folder: Path, rows) -> Path:  # type: ignore[no-untyped-def]
    """``rows``, or those of some splits, as ``save_to_disk`` writes them."""
    (datasets.DatasetDict(rows) if isinstance(rows, dict) else rows).save_to_disk(str(folder))
    return folder


def test_a_folder_of_save_to_disk_gives_the_stored_bytes(tmp_path):
    folder = saved(tmp_path / "pets", {"train": pets(6), "validation": pets(2), "test": pets(3)})
    data = open_source(folder)
    assert (data.source["kind"], data.name, data.classes, data.task) == ("hf", "pets", ["cat", "dog"], "binary")
    assert Counter(data.splits) == {"train": 6, "val": 2, "test": 3}
    assert (data.ids[6], data.read(6), data.labels[7]) == ("pets:validation:0", encoded(0), 1)
    assert shades_of(data) == [*range(6), *range(2), *range(3)]
    reopened(data)
    assert open_source(f"hf:{folder}").ids == data.ids
    some = open_source(saved(tmp_path / "some", pets(6).select([5, 0, 2])))
    assert (set(some.splits), some.labels.tolist(), some.read(0)) == ({""}, [1, 0, 0], encoded(5))


def test_parquet_as_the_hub_has_it_and_an_image_folder_that_keeps_its_files(tmp_path):
    (tmp_path / "pets/data").mkdir(parents=True)
    pets(6).to_parquet(str(tmp_path / "pets/data/train-00000-of-00001.parquet"))
    pets(2).to_parquet(str(tmp_path / "pets/data/test-00000-of-00001.parquet"))
    data = reopened(open_source(f"hf:{tmp_path}/pets"))
    assert (Counter(data.splits), data.classes, data.read(2)) == ({"train": 6, "test": 2}, ["cat", "dog"], encoded(2))
    root = image_folder(tmp_path / "files/train")
    data = open_source(f"hf:{tmp_path}/files")
    assert (data.ids[0], data.path(0)) == ("train/ill/000.png", str(root / "ill/000.png"))
    assert data.classes == ["ill", "well"]


def test_a_name_of_the_hub_is_found_in_its_cache_and_pinned_to_the_commit(tmp_path):
    commit = "a" * 40
    place = tmp_path / "hub/datasets--me--pets"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    (place / "snapshots" / commit / "data").mkdir(parents=True)
    pets(4).to_parquet(str(place / "snapshots" / commit / "data/train-00000-of-00001.parquet"))
    data = open_source("hf:me/pets")
    assert (data.name, len(data), data.source["data"]) == ("pets", 4, f"hf:me/pets@{commit}")
    (place / "refs/main").write_text("b" * 40)
    reopened(data)


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
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert len(open_source("hf:me/pets")) == len(reopened(data)) == 6 and len(fetched) == before


def test_a_fetch_that_was_interrupted_is_completed_and_never_taken_for_the_whole(hub_of, tmp_path):
    image_folder(hub_of[0] / "train", 6)
    first = open_source("hf:me/pets")
    next((tmp_path / "hub").glob("datasets--me--pets/snapshots/*/train/ill/000.png")).unlink()
    with pytest.raises(NotFetched):  # nothing is fetched for a view
        reopen(first.source)
    assert len(open_source("hf:me/pets")) == len(reopen(first.source)) == 6


@pytest.mark.parametrize(
    ("kind", "values", "classes", "labels"),
    [
        (["mass", "edema"], [[0, 1], [], [1]], ["mass", "edema"], [[1, 1], [0, 0], [0, 1]]),
        ("int64", [[1, 0, 1], [0, 0, 0], [0, 1, 1]], ["0", "1", "2"], [[1, 0, 1], [0, 0, 0], [0, 1, 1]]),
        (None, [0, 1, -1], ["cat", "dog"], [0, 1, -1]),
        ("string", ["b", "a", None], ["a", "b"], [1, 0, -1]),
        ("int64", [10, 9, 10], ["9", "10"], [1, 0, 1]),
    ],
)
def test_labels_as_lists_classes_words_and_numbers(tmp_path, kind, values, classes, labels):
    plain = datasets.Value(kind) if isinstance(kind, str) else kind and datasets.ClassLabel(names=kind)
    kind = datasets.Sequence(plain) if isinstance(values[0], list) else plain
    data = open_source(saved(tmp_path / "set", rows_of(*values, kind=kind)))
    assert (data.classes, data.labels.tolist()) == (classes, labels)


def test_lists_that_are_no_labels(tmp_path):
    lists = rows_of([1], [5], [7, 9], kind=datasets.Sequence(datasets.Value("int64")))
    refused(saved(tmp_path / "a", lists), "neither numbers of classes nor 0 and 1 for each label: 1, 5, 7, 9")


def test_cells_of_a_column_are_read_as_those_of_a_table(tmp_path):
    text, number = datasets.Value("string"), datasets.Value("float32")
    words = saved(tmp_path / "words", rows_of("Mass", "mass ", "NA", "cyst|mass", kind=text))
    data = reopened(open_source(words))
    assert (data.task, data.classes) == ("multilabel", ["cyst", "mass"])
    ages = rows_of(*(20.5 + k for k in range(12)), kind=number, sex=(text, ["f", "m"] * 6))
    with pytest.raises(SeveralReadings, match="a measurement, no classes") as caught:
        open_source(saved(tmp_path / "ages", ages))
    assert caught.value.readings[1].options == {"columns": {"label": "sex"}}
    assert len(open_source(tmp_path / "ages", task="multiclass").classes) == 12
    assert open_images(tmp_path / "ages").task == "unlabelled"
    signed = saved(tmp_path / "signed", rows_of(1, 0, -1, kind=datasets.Value("int64")))
    data = reopened(open_source(signed, uncertain="one"))
    assert (data.labels.tolist(), data.source["uncertain"]) == ([1, 0, 1], "one")
    pets(4).save_to_disk(str(tmp_path / "pets"))
    with pytest.raises(
        BadOption, match=r"--letter-case is about labels that are text.* label of pets holds numbers of"
    ):
        open_source(tmp_path / "pets", letter_case="keep")


def test_two_columns_of_classes_have_to_be_told_apart_and_the_rest_is_kept(tmp_path):
    columns = {
        "fine": (datasets.ClassLabel(names=["a", "b", "c"]), [0, 1, 2, 0, 1, 2]),
        "coarse": (datasets.ClassLabel(names=["x", "y"]), [0, 0, 1, 0, 0, 1]),
        "patient": (datasets.Value("string"), ["p", "p", "q", None, "q", "r"]),
        "age": (datasets.Value("int32"), [1, 2, 3, 4, 5, 6]),
    }
    folder = saved(tmp_path / "set", rows_of(*[0] * 6, **columns).remove_columns("label"))
    refused(folder, "could be the label: fine, coarse", "--column label=fine")
    data = reopened(open_source(folder, columns={"label": "coarse"}))
    assert (data.classes, data.labels.tolist()) == (["x", "y"], [0, 0, 1, 0, 0, 1])
    assert data.groups == ["p", "p", "q", "set:3", "q", "r"]
    assert (data.meta["fine"], data.meta["age"].tolist()) == (["a", "b", "c"] * 2, [1, 2, 3, 4, 5, 6])
    refused(folder, "no column 'kind' for the label", columns={"label": "kind"})
    refused(folder, "the label is one column of set, not 2", columns={"label": "fine,coarse"})
    refused(folder, "cannot name a 'split'; they name image, label, group", columns={"split": "age"})
    refused(folder, "no column of images called age among", columns={"image": "age", "label": "fine"})


def test_an_empty_cell_is_a_failure_by_name_and_a_path_that_leads_out_is_not_followed(tmp_path):
    import pyarrow

    (tmp_path / "secret.png").write_bytes(encoded(3))
    (file,) = saved(tmp_path / "set", pets(3)).glob("*.arrow")
    table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
    cells = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    table = table.set_column(0, table.schema.field(0), pyarrow.array(cells, table.schema.field(0).type))
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    data = open_source(tmp_path / "set")
    for row, reason in ((1, "no image in this row"), (2, "leads out of the data set")):
        with pytest.raises(UnreadableImage, match=reason):
            data.read(row)


def test_splits_of_other_names_columns_or_without_rows(tmp_path, monkeypatch):
    data = open_source(saved(tmp_path / "a", {"train": pets(4), "extra": pets(3)}))
    assert len(data) == 4 and "extra (3)" in data.notes[0]
    assert set(open_source(saved(tmp_path / "b", {"full": pets(4)})).splits) == {""}
    refused(saved(tmp_path / "c", {"val": pets(4), "validation": pets(1)}), "val, validation", "mean the same")
    refused(saved(tmp_path / "d", {"train": pets(4), "test": rows_of("a", kind=datasets.Value("string"))}),
            "the splits of d have different columns")  # fmt: skip
    monkeypatch.setattr(huggingface, "_load", lambda *_: {"train": pets(4).select([])})
    refused(tmp_path / "d", "d has no rows")


def test_names_that_are_none_and_folders_without_images(tmp_path):
    refused("hf:me/none", "me/none is not on this machine", "could not be fetched", error=NotFetched)
    refused("hf:not a name", "cannot be the name of a dataset")
    refused("hf:me/no--ne", '"me/no--ne" cannot be the name of a dataset')
    refused(saved(tmp_path / "text", datasets.Dataset.from_dict({"text": ["a"]})), "no column of images among text")
    (tmp_path / "empty").mkdir()
    refused(f"hf:{tmp_path}/empty", "cannot be read by datasets")


@pytest.mark.slow
def test_rows_of_arrow_are_remembered_until_a_file_of_theirs_changes(tmp_path):
    data = open_source(saved(tmp_path / "set", {"train": pets(4), "test": pets(2)}))
    past, reads = time.time() - 100, []
    for file in data.images.files:  # type: ignore[attr-defined]
        os.utime(file, (past, past))

    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, row):  # type: ignore[no-untyped-def]
            reads.append(row)
            return data.read(row)

    watched = replace(data, images=replace(data.images, parts=[Counted(range(6))]))  # type: ignore[type-var]
    time.sleep(2.1)  # a file that has just changed is not trusted
    first = scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert sorted(reads) == [*range(6)]
    again = scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert len(reads) == 6 and (again.sample_image == first.sample_image).all()
    assert first.digests[2].decode() == decoding.digest(encoded(2))
    os.utime(data.images.files[1], (past + 5, past + 5))  # type: ignore[attr-defined]
    scan(watched, DigestCache(tmp_path, writes=True), b"", 1)
    assert len(reads) == 12
