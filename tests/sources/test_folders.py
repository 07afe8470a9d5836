"""Folders of images: as they lie, in class folders, below split folders; and what cannot be told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_sets import pictures, refused, reopened

from featurecache.errors import SourceError, UnreadableImage
from featurecache.sources import folders, open_source
from featurecache.sources.base import safe_name


def test_flat_folder_has_no_labels_and_ids_in_the_order_of_bytes(tmp_path):
    names = ["b.png", "Z.png", "a.jpg", "é.png", "10.png", "9.png", "肺" + "x" * 80 + ".png"]
    data = open_source(pictures(tmp_path / "胸部 X線", *names))
    assert data.ids == sorted(names, key=str.encode)
    assert (data.task, data.classes, data.name) == ("unlabelled", [], "胸部-X線")
    assert (data.labels.tolist(), set(data.splits)) == ([-1] * 7, {""})


def test_class_folders_are_sorted_and_hold_whatever_lies_deeper(tmp_path):
    data = open_source(pictures(tmp_path, "PNEUMONIA/p1/x.png", "NORMAL/b.png", "PNEUMONIA/a.png"))
    assert data.ids == ["NORMAL/b.png", "PNEUMONIA/a.png", "PNEUMONIA/p1/x.png"]
    assert (data.classes, data.labels.tolist(), data.task) == (["NORMAL", "PNEUMONIA"], [0, 1, 1], "binary")
    assert (data.labels.dtype, data.path(1)) == (np.int64, str(tmp_path / "PNEUMONIA/a.png"))
    assert data.read(1) == (tmp_path / "PNEUMONIA/a.png").read_bytes()


@pytest.mark.parametrize(
    ("names", "empty", "labels", "note"),
    [
        (["test/c/1.png", "train/a/1.png", "train/b/1.png", "train/c/1.png"], "test/a", [2, 0, 1, 2],
         "test has no images of a, b."),
        (["test/1.png", "train/a/1.png", "train/b/1.png"], "train", [-1, 0, 1],
         "The images of test have no class folders and so no labels."),
        (["train/a/1.png", "train/b/1.png"], "val", [0, 1], "The folder val is empty."),
        (["data/a/1.png"], "data/a/b", [0],
         "There is one class only, a; if the classes lie deeper, --classes-at says where."),
    ],
)  # fmt: skip
def test_what_a_split_lacks_is_said_and_classes_keep_their_index(tmp_path, names, empty, labels, note):
    (pictures(tmp_path, *names) / empty).mkdir(exist_ok=True)
    data = open_source(tmp_path)
    assert (data.labels.tolist(), data.notes) == (labels, (note,))


def test_files_that_are_no_images_and_folders_of_systems_are_left_out_and_counted(tmp_path):
    systems = ["@eaDir/1.png", "$RECYCLE.BIN/1.png", "a/thumbnails/1.png", "lost+found/1.png", ".hidden/1.png"]
    pictures(tmp_path, "a/1.png", "b/1.PNG", "__MACOSX/a/._1.png", "a/._1.png", *systems)
    for name in ("a/Thumbs.db", "a/.DS_Store", "notes.txt", "a/readme.txt", "a/LICENSE"):
        (tmp_path / name).write_text("-")
    data = open_source(tmp_path)
    assert data.ids == ["a/1.png", "b/1.PNG"]
    assert data.notes[0].startswith("4 files ignored, by name no image (.txt 2, ")
    assert "6 folders of systems left out ($RECYCLE.BIN/, .hidden/, @eaDir/, … (6 in all))" in data.understood


def test_links_are_followed_but_loops_are_not(tmp_path):
    data = pictures(tmp_path / "data", "a/1.png", "b/2.png")
    (data / "a" / "up").symlink_to(data, target_is_directory=True)
    (data / "a" / "self").symlink_to(data / "a" / "self")
    (data / "b" / "more").symlink_to(pictures(tmp_path / "elsewhere", "3.png"), target_is_directory=True)
    assert open_source(data).ids == ["a/1.png", "b/2.png", "b/more/3.png"]
    assert any("a/up" in note for note in open_source(data).notes)


@pytest.mark.parametrize(
    ("names", "empty", "words"),
    [
        ([], "", "no images in {folder}: found nothing, expected files ending in .jpg"),
        ([], "a", "found empty folders"),
        (["a.nii"], "", "only other files (.nii 1)"),
        (["NORMAL/1.png", "PNEUMONIA/1.png"], "COVID", "class folder {folder}/COVID holds no image"),
        (["train/a/1.png", "train/b/1.png"], "train/c", "train/c holds no image"),
        (["data/a/1.png"], "data/b", "class folder {folder}/data/b holds no image"),
        (["a/1.png", "b/1.png", "stray.png"], "", "holds images (stray.png) beside the folders a, b"),
        (["train/a/1.png", "train/b/1.png", "extra/a/1.png"], "", "beside them extra, which belong to no split"),
        (["train/a/1.png", "train/b/1.png", "stray.png"], "", "holds images (stray.png) beside the folders train"),
        (["train/a/1.png", "train/b/1.png", "train/x.png"], "", "train holds images (x.png) beside the folders a, b"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(tmp_path, names, empty, words):
    (pictures(tmp_path, *names) / empty).mkdir(exist_ok=True)
    refused(tmp_path, words.format(folder=tmp_path))


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).write_bytes(b"-")
    refused(tmp_path, "is not UTF-8", "rename it")


def test_a_folder_that_nobody_may_list_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    pictures(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def closed(path: str):  # type: ignore[no-untyped-def]
        if path == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", closed)
    refused(tmp_path, f"the folder {tmp_path}/b cannot be read (Permission denied)")


def test_a_folder_or_file_that_is_not_there_says_what_is_near(tmp_path):
    data = open_source(pictures(tmp_path / "chest", "1.png"))
    refused(tmp_path / "chets", "there is no folder or file", "Near: chest")
    refused(tmp_path / "no" / "where", f"Nor is there {tmp_path}/no.")
    (tmp_path / "chest" / "1.png").unlink()
    (tmp_path / "chest").rmdir()
    with pytest.raises(SourceError, match="there is no folder"):
        reopened(data)


def test_a_missing_file_a_broken_link_and_a_pipe_are_named_failures(tmp_path):
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "4.png")
    data = open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    for row, reason in [(0, "no such file"), (2, "a link to a file that is gone"), (3, "not a file")]:
        with pytest.raises(UnreadableImage, match=f"^{reason}$"):
            data.read(row)


def test_listing_looks_at_no_file(tmp_path, monkeypatch):
    pictures(tmp_path, *[f"c{number % 3}/{number}.png" for number in range(30)])
    looked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(folders.os, "stat", lambda path, **kind: (looked.append(str(path)), stat(path, **kind))[1])
    assert len(open_source(tmp_path)) == 30
    assert not any(path.endswith(".png") for path in looked)


@given(st.text(max_size=200))
def test_any_text_becomes_a_name_a_file_can_have(text):
    name = safe_name(text)
    assert name and len(os.fsencode(f"{name}.h5")) < 255
    assert not set(name) & set('/\\\0 "*?<>|:') and name[0] not in ".-"
    assert safe_name(name) == name
