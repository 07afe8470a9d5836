"""Data in object storage: folders, tables, archives and tars by address, against an S3-compatible server."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.object_storage import BUCKET, BUSY, DENIED, KEY, Server
from support.pictures import image_folder, save_picture

from featurecache.errors import BadOption, SourceError, StorageError, UnreadableImage
from featurecache.files.mirror import Mirror, is_placeholder
from featurecache.sources import open_source, reopen
from featurecache.sources.base import Dataset

HERE = f"s3://{BUCKET}/data"


def upload(server: Server, folder: Path, below: str = "data") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.write(f"{below}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def same(a: Dataset, b: Dataset) -> bool:
    fields = ("ids", "classes", "splits", "task", "groups")
    fine = all(getattr(a, name) == getattr(b, name) for name in fields) and np.array_equal(a.labels, b.labels)
    read = [[np.asarray(each.read(k)).tobytes() for k in range(len(each))] for each in (a, b)]
    return fine and read[0] == read[1]


def test_a_folder_is_what_it_is_on_a_disk_and_is_fetched_once(server, tmp_path):
    local = image_folder(tmp_path / "chest", 6)
    upload(server, local, "data/chest")
    dataset = open_source(f"{HERE}/chest/")
    assert dataset.name == "chest" and same(dataset, open_source(local))
    assert dataset.source["data"] == f"{HERE}/chest" and dataset.source["kind"] == "folder"
    fetched = len(server.of("GET"))
    assert same(reopen(json.loads(json.dumps(dataset.source))), dataset)
    assert fetched == len(server.of("GET")) == 6


def test_an_image_that_changed_there_is_fetched_again_and_one_that_is_gone_goes(server, tmp_path):
    local = image_folder(tmp_path / "chest", 6)
    upload(server, local)
    before = open_source(HERE)
    changed, gone = before.ids[0], before.ids[1]
    other = save_picture(tmp_path / "other.png", 77).read_bytes()
    server.write(f"data/{changed}", other)
    server.remove(f"data/{gone}")
    server.requests.clear()
    after = open_source(HERE)
    assert after.ids == [name for name in before.ids if name != gone]
    assert after.read(0) == other and server.of("GET") == [f"data/{changed}"]
    for name in after.ids:
        if name.startswith("well/"):
            server.remove(f"data/{name}")
    assert open_source(HERE).classes == ["ill"]  # of which none is left is no empty class


def test_of_a_table_the_images_that_are_read_are_fetched(server, tmp_path):
    image_folder(tmp_path / "set" / "images", 6)
    names = [f"images/{'ill' if k % 2 == 0 else 'well'}/{k:03d}.png" for k in range(5)]
    rows = [f"{name},{k % 2}" for k, name in enumerate(names)]
    (tmp_path / "set" / "list.csv").write_text("\n".join(["path,label", *rows, "images/none.png,1"]))
    upload(server, tmp_path / "set")
    dataset = open_source(f"{HERE}/list.csv")
    assert server.of("GET") == ["data/list.csv"] and dataset.source["data"] == f"{HERE}/list.csv"
    assert dataset.read(2) == (tmp_path / "set" / names[2]).read_bytes()
    assert server.of("GET")[1:] == [f"data/{names[2]}"]
    with pytest.raises(UnreadableImage, match="no such file"):
        dataset.read(5)
    server.remove(f"data/{names[3]}")
    with pytest.raises(UnreadableImage, match="no such object any more"):
        dataset.read(3)


def test_paths_from_the_folder_above_the_table_are_found_by_other_machines_too(server, tmp_path, monkeypatch):
    names = [f"data/images/{'ill' if k % 2 == 0 else 'well'}/{k:03d}.png" for k in range(4)]
    image_folder(tmp_path / "data" / "images", 4)
    (tmp_path / "data" / "list.csv").write_text("\n".join(["path,label", *(f"{name},{name[12]}" for name in names)]))
    upload(server, tmp_path / "data")
    dataset = open_source(f"{HERE}/list.csv")
    assert dataset.ids == names and dataset.images.address == HERE
    sent = pickle.dumps(dataset.images)
    monkeypatch.setenv("FEATURECACHE_STATE", str(tmp_path / "another machine"))
    images, mirror = pickle.loads(sent), Mirror.of(HERE, "data")
    mirror.pull_once("run")
    assert images.root == str(mirror.folder) and images.read(2) == (tmp_path / names[2]).read_bytes()


def test_a_table_here_and_its_images_there(server, tmp_path):
    upload(server, image_folder(tmp_path / "images", 4))
    (tmp_path / "list.csv").write_text("path,label\nill/000.png,a\nwell/001.png,b\n")
    dataset = open_source(tmp_path / "list.csv", root=HERE)
    assert dataset.source["root"] == HERE and not server.of("GET")
    assert dataset.read(1) == (tmp_path / "images" / "well" / "001.png").read_bytes()
    assert reopen(dataset.source).read(0) == (tmp_path / "images" / "ill" / "000.png").read_bytes()


def test_archives(server, tmp_path):
    arrays = {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "set.npz", **arrays)
    save_picture(tmp_path / "a.png", 1)
    for number in range(3):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            tar.add(tmp_path / "a.png", f"{number}.png")
    upload(server, tmp_path)
    assert same(open_source(f"{HERE}/set.npz"), open_source(tmp_path / "set.npz"))
    assert server.of("GET") == ["data/set.npz"]
    for pattern, count in (("train-{0..1}.tar", 2), ("train-*.tar", 3), ("train-2.tar", 1)):
        dataset = open_source(f"{HERE}/{pattern}")
        assert len(dataset) == count and dataset.splits == ["train"] * count, pattern
        assert dataset.source["data"] == f"{HERE}/{pattern}"
        assert dataset.read(0) == (tmp_path / "a.png").read_bytes()
    assert sorted(set(server.of("GET"))) == ["data/set.npz", *(f"data/train-{n}.tar" for n in range(3))]


def test_a_file_address_is_the_folder(tmp_path):
    local = image_folder(tmp_path / "chest", 4)
    dataset = open_source(f"file://{local}")
    assert dataset.source["data"] == str(local) and same(dataset, open_source(local))


def test_a_server_that_fails_leaves_no_image_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.0)
    image_folder(tmp_path / "images", 2)
    (tmp_path / "list.csv").write_text("path,label\nimages/ill/000.png,a\nimages/well/001.png,b\n")
    upload(server, tmp_path)
    dataset = open_source(f"{HERE}/list.csv")
    server.rule = lambda method, key: BUSY if key.endswith(".png") else None
    with pytest.raises(StorageError, match=r"000\.png does not answer as it should"):
        dataset.read(0)
    server.rule = lambda method, key: DENIED if key.endswith(".png") else None
    with pytest.raises(StorageError, match="no permission for"):
        dataset.read(0)
    server.rule = lambda method, key: DENIED
    with pytest.raises(SourceError, match="no permission for"):
        reopen(dataset.source)


def test_what_is_not_there_and_what_is_a_cache(server, tmp_path):
    with pytest.raises(SourceError, match=f"there is nothing at {HERE}/none."):
        open_source(f"{HERE}/none")
    with pytest.raises(SourceError, match="there is nothing at"):
        open_source(f"{HERE}/list.csv")
    upload(server, image_folder(tmp_path / "images", 2))
    with pytest.raises(SourceError, match=r"there is no folder or file s3://bucket/data/list\.csv"):
        open_source(f"{HERE}/list.csv")
    server.write("cache/vit-1/spec.json", b'{"fingerprint": "", "spec": {}, "provenance": {}}')
    server.write("cache/vit-1/x.png", b"")
    with pytest.raises(SourceError, match="only what featurecache wrote"):
        open_source(f"s3://{BUCKET}/cache")
    with pytest.raises(SourceError, match="no source called https"):
        open_source("https://example.org/set.csv")
    with pytest.raises(BadOption, match="Credentials are no part of it"):
        open_source(f"s3://{KEY}:x@{BUCKET}/data")


def test_addresses_in_the_rows_of_a_table_say_how_they_are_given(tmp_path):
    (tmp_path / "list.csv").write_text(f"path,label\n{HERE}/a.png,1\n{HERE}/b.png,0\n")
    with pytest.raises(SourceError, match=rf"list paths below one folder, .* such as --root {HERE}"):
        open_source(tmp_path / "list.csv")


def test_placeholders_have_sizes_and_no_bytes(server, tmp_path):
    (tmp_path / "list.csv").write_text("path,label\nx/a.bin,1\n")
    server.write("data/x/big.bin", bytes(range(256)) * 4096)
    server.write("data/x/a.png", save_picture(tmp_path / "a.png", 1).read_bytes())
    server.write("data/list.csv", b"path,label\nx/a.png,1\n")
    open_source(f"{HERE}/list.csv")
    (big,) = Path(os.environ["FEATURECACHE_STATE"]).rglob("big.bin")
    assert is_placeholder(big) and big.stat().st_size == 1 << 20 and big.stat().st_blocks == 0
