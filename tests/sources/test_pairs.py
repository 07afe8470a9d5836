"""Files that belong to another image: masks, depth, labels are left out and said; two sides are a group, or asked."""

from __future__ import annotations

import pytest
from support.small_sets import listed, pictures, refused

from featurecache.errors import SeveralReadings
from featurecache.sources import open_source
from featurecache.sources.layout import read_layout


def paths(*folders: str) -> list[str]:
    """Two images in each."""
    return [f"{folder}/{number}.png" for folder in folders for number in range(2)]


def images(*names: str, **options: int) -> list[str]:
    """Those that are no masks."""
    return [names[row] for row in read_layout(names, "data", **options).rows]


def test_masks_beside_their_images_are_left_out_and_said(tmp_path):
    names = ["benign/1.png", "benign/1_mask.png", "benign/1_mask_1.png", "normal/2.jpg", "normal/2_segmentation.png"]
    data = open_source(pictures(tmp_path, *names))
    assert data.ids == ["benign/1.png", "normal/2.jpg"]
    assert "3 masks left out (*_mask.png, *_segmentation.png)" in data.source["understood"]


@pytest.mark.parametrize(
    ("image", "other"),
    [
        ("1.jpg", "1_gt.png"),
        ("1.jpg", "1_seg.png"),
        ("1.jpg", "1_label.png"),
        ("1.jpg", "1 heatmap.png"),
        ("1.jpg", "1-edges.png"),
        ("00_color.png", "00_depth.png"),  # RGB-D scans
        ("apple_1_crop.png", "apple_1_depthcrop.png"),  # RGB-D Object Dataset
        ("benign (1).png", "benign (1)mask.png"),
        ("scanImage.png", "scanImageMask.png"),
    ],
)
def test_the_name_of_an_image_with_a_word_for_a_mask(image, other):
    assert images(f"a/{image}", f"a/{other}", "b/7.png") == [f"a/{image}", "b/7.png"]


FOLDERS = [
    (("A/images", "B/images"), ("A/masks", "B/masks")),
    (("images/A", "images/B"), ("masks/A", "masks/B")),
    (("A", "B"), ("A/mask",)),
    (("rgb/A", "rgb/B"), ("depth/A", "depth/B")),
    (("image_2/A", "image_2/B"), ("label_2/A", "label_2/B")),  # KITTI
    (("train/A", "train/B", "test/A"), ("train_masks/A",)),  # Carvana
    (("train/A", "train/B", "test/A"), ("ground_truth/A",)),  # MVTec
    (("set/Original/A", "set/Original/B"), ("set/Ground Truth/A",)),  # CVC-ClinicDB
    (("images/A", "images/B"), ("1st_manual/A",)),  # DRIVE
]


@pytest.mark.parametrize(("folders", "others"), FOLDERS)
def test_folders_of_masks_beside_images_are_left_out(folders, others):
    layout = read_layout(paths(*folders, *others), "data")
    assert set(layout.classes) == {"A", "B"} and len(layout.rows) == 2 * len(folders)
    assert f"{2 * len(others)} masks left out" in layout.remarks[-1]


@pytest.mark.parametrize(
    "names",
    [
        ("with_mask/0.png", "without_mask/0.png"),
        ("mask/0.png", "no_mask/0.png"),
        ("a/x_mask.png", "b/y.png"),
        ("face/0.png", "face_mask/1.png", "hand/2.png", "hand/3.png"),
        ("leaf/hedge.png", "leaf/h.png"),
        ("label_0/0.png", "label_1/0.png"),
        ("left/0.png", "right/1.png"),
        ("a/0.png", "b/0.png"),
        ("a/1.jpg", "a/1.png", "b/2.jpg"),
    ],
)
def test_what_only_looks_like_a_pair_is_data(names):
    assert images(*names) == list(names)


@pytest.mark.parametrize(
    "folders",
    [
        ("left", "right"),
        ("before", "after"),
        ("stereo_left", "stereo_right"),
        ("image_2", "image_3"),
        ("A", "B", "label"),
        ("face", "face_mask"),
        ("visible", "infrared"),
    ],
)
def test_folders_that_may_be_classes_or_pairs_are_refused_and_their_level_makes_them_classes(folders):
    words = r"are they pairs .* or classes\? Classes: --classes-at 2\. .* --data data/x/"
    with pytest.raises(SeveralReadings, match=words) as caught:
        read_layout(paths(*(f"x/{folder}" for folder in folders)), "data")
    one = caught.value.readings[1].options["data"]
    assert one in [f"data/x/{folder}" for folder in folders] and "mask" not in one
    assert set(read_layout(paths(*folders), "data", 1).classes) == set(folders)


def test_images_that_are_all_there_with_two_endings_are_refused(tmp_path):
    names = ("a/1.jpg", "a/1.png", "b/2.jpg", "b/2.png")
    refused(pictures(tmp_path, *names), "is there twice, as .jpg and as .png (a/1): images and their masks, or one")


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("0/10_left.png", "1/10_right.png", "0/11_left.png"), ["10", "11", "10"]),
        (("0/a_pre_disaster.png", "1/a_post_disaster.png", "1/b_post_disaster.png"), ["a", "a", "b"]),
        (("0/10_left.png", "1/11_right.png"), None),
        (("0/10_left.png", "1/10_right.png", "0/other.png"), None),
    ],
)
def test_two_sides_of_one_thing_are_one_group_in_folders_and_tables(tmp_path, names, groups):
    data = open_source(pictures(tmp_path, *names))
    assert sorted(data.groups or []) == sorted(groups or [])
    assert groups is None or any(words.startswith("groups are the pairs") for words in data.understood)
    rows = "".join(f"{name},{name[0]}\n" for name in names)
    assert open_source(listed(tmp_path / "t", f"path,label\n{rows}")).groups == (
        groups and [dict(zip(data.ids, data.groups, strict=True))[name] for name in names]
    )
