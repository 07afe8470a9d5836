"""Tiny ImageNet and Kermany's chest X-rays as they are unpacked: small copies in the true layouts."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.pictures import save_picture
from support.published_sets import CHEST, WNIDS, chest_xray, tiny_imagenet
from support.small_sets import refused, reopened

from featurecache.sources import open_source
from featurecache.sources.summary import describe_dataset


def entries(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


# -- Tiny ImageNet


def test_tiny_imagenet_as_it_is_unpacked_and_nothing_is_moved(tmp_path):
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    before = entries(root)
    data = open_source(root)
    assert (data.source["kind"], Counter(data.splits)) == ("tiny-imagenet", {"train": 12, "val": 8})
    assert data.classes == ["goldfish", "European fire salamander", "crane", "crane (2)"]
    where = dict(zip(data.ids, data.labels.tolist(), strict=True))
    assert [where[f"val/images/val_{number}.JPEG"] for number in range(5)] == [0, 1, 2, 3, 0]
    assert where["train/n02124075/images/n02124075_1.JPEG"] == 2
    assert data.ids == sorted(data.ids) and data.meta["wnid"][0] == "n01443537"
    assert data.notes == (f"2 images of test left out, without published labels: give {root}/test/images.",)
    assert open_source(root / "test/images").task == "unlabelled"
    assert entries(root) == before
    reopened(data)
    (root / "words.txt").unlink()
    assert open_source(root).classes == sorted(WNIDS)


def test_images_of_val_that_are_gone_or_that_the_annotations_do_not_name(tmp_path):
    root = tiny_imagenet(tmp_path, test=0)
    (root / "val/images/val_3.JPEG").unlink()
    save_picture(root / "val/images/stray.JPEG", 1)
    data = open_source(root)
    assert (len(data), data.labels[data.ids.index("val/images/stray.JPEG")]) == (21, -1)
    assert "1 image of val not in val_annotations.txt" in data.notes[0]
    assert describe_dataset(data).unreadable == [("val/images/val_3.JPEG", "no such file")]


@pytest.mark.parametrize("inside", ["", "images/"])
@pytest.mark.parametrize("annotations", [True, False])
def test_val_that_a_script_has_sorted_into_class_folders(tmp_path, inside, annotations):
    root = tiny_imagenet(tmp_path)
    plain = open_source(root)
    for name, wnid in zip(plain.ids, plain.meta["wnid"], strict=True):
        if name.startswith("val/"):
            (root / "val" / wnid / inside).mkdir(parents=True, exist_ok=True)
            (root / name).rename(root / "val" / wnid / inside / Path(name).name)
    if not annotations:
        (root / "val/val_annotations.txt").unlink()
    data = open_source(root)
    one, other = (
        {Path(name).name: label for name, label in zip(one.ids, one.labels.tolist(), strict=True)}
        for one in (data, plain)
    )
    assert one == other and data.classes == plain.classes and not describe_dataset(data).unreadable
    save_picture(root / "val/images/val_0.JPEG", 1)
    assert "1 image of val/images left out" in " ".join(open_source(root).notes)


def test_tiny_imagenet_without_the_labels_of_val_or_without_val_or_train(tmp_path):
    root = tiny_imagenet(tmp_path)
    (root / "val/val_annotations.txt").unlink()
    refused(root, "val_annotations.txt of the Tiny ImageNet cannot be read")
    shutil.rmtree(root / "val")
    assert f"There are no images of val in {root}." in open_source(root).notes
    for wnid in WNIDS:
        shutil.rmtree(root / "train" / wnid / "images")
    refused(root, f"train in {root} holds no image of the classes of wnids.txt")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("val/val_annotations.txt", "val_0.JPEG\tn99999999\t0\n", ["line 1", "n99999999"]),
        ("val/val_annotations.txt", "val_0.JPEG\tn01443537\nval_0.JPEG\tn01443537\n", ["line 2", "each name once"]),
        ("val/val_annotations.txt", "../../x.JPEG\tn01443537\n", ["line 1", "a file's name"]),
        ("wnids.txt", "\n", ["is empty"]),
        ("wnids.txt", "n01443537\n", ["class folders", "does not name"]),
        ("wnids.txt", "n00000001\n" + "\n".join(WNIDS), ["n00000001", "has no image"]),
    ],
)
def test_lists_of_tiny_imagenet_that_contradict_the_folders(tmp_path, file, text, words):
    root = tiny_imagenet(tmp_path)
    (root / file).write_text(text)
    refused(root, *words)


# -- chest X-rays


def test_chest_xrays_have_two_classes_and_persons_as_groups_within_split_and_kind(tmp_path):
    root = chest_xray(tmp_path / "chest_xray")
    data = reopened(open_source(root))
    assert (data.source["kind"], data.classes, data.task) == ("chest-xray", ["NORMAL", "PNEUMONIA"], "binary")
    assert Counter(data.splits) == {"train": 7, "val": 2, "test": 3}
    groups = dict(zip(data.ids, data.groups, strict=True))
    assert groups[CHEST[0]] == groups[CHEST[1]] == "train/normal/im-0115"
    assert groups[CHEST[2]] == "train/normal/normal2-im-0592"
    assert groups[CHEST[3]] == groups[CHEST[4]] == "train/bacteria/person1"
    assert groups[CHEST[5]] == "train/virus/person1"
    assert groups["test/PNEUMONIA/person1_virus_12.jpeg"] == "test/virus/person1"
    assert Counter(data.meta["kind"]) == {"normal": 5, "bacteria": 4, "virus": 3}
    three = reopened(open_source(root, columns={"label": "kind"}))
    assert (three.classes, three.task) == (["normal", "bacteria", "virus"], "multiclass")
    assert [three.classes[label] for label in three.labels] == data.meta["kind"]
    refused(root, "no column for label=person", columns={"label": "person"})


def test_the_same_number_in_two_splits_is_called_possible(tmp_path):
    (note,) = [note for note in open_source(chest_xray(tmp_path)).notes if "two splits" in note]
    assert "test and train 1. Possible leaks only" in note
    alone = chest_xray(tmp_path / "alone", [name for name in CHEST if "person1_virus_12" not in name])
    assert not any("two splits" in note for note in open_source(alone).notes)


def test_kaggles_second_copy_inside_the_first_is_left_out_and_named(tmp_path):
    root = chest_xray(tmp_path / "chest_xray")
    chest_xray(root / "chest_xray")
    (root / "__MACOSX/train").mkdir(parents=True)
    data = open_source(root)
    assert len(data) == len(CHEST)
    assert f"chest_xray inside {root} repeats its splits and was left out." in data.notes


def test_mendeleys_names_and_a_split_alone(tmp_path):
    names = ["NORMAL/NORMAL-1049278-0001.jpeg", "PNEUMONIA/BACTERIA-1008087-0001.jpeg",
             "PNEUMONIA/BACTERIA-1008087-0002.jpeg", "PNEUMONIA/VIRUS-1008087-0001.jpeg"]  # fmt: skip
    data = open_source(chest_xray(tmp_path, names))
    assert data.meta["kind"] == ["normal", "bacteria", "bacteria", "virus"]
    assert data.groups == ["/normal/1049278", "/bacteria/1008087", "/bacteria/1008087", "/virus/1008087"]


def test_a_name_that_says_nothing_has_no_kind_and_is_a_group_of_its_own(tmp_path):
    data = open_source(chest_xray(tmp_path, [*CHEST, "train/PNEUMONIA/scan.jpeg"]), columns={"label": "kind"})
    row = data.ids.index("train/PNEUMONIA/scan.jpeg")
    assert (data.labels[row], data.groups[row], data.meta["kind"][row]) == (-1, data.ids[row], "")
    assert any("1 image with other names" in note and "no label" in note for note in data.notes)
    own = open_source(chest_xray(tmp_path / "own", ["NORMAL/a.png", "PNEUMONIA/b.png"]))
    assert (own.source["kind"], own.groups) == ("folder", None)
