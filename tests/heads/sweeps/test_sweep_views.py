"""Sweeps over several views: matched by image, divided alike, refused where they are not of the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.sweeps import content, division, other_view, rows_of, sweep, view_of

from featurecache.errors import BadOption, ProtocolError, RunError
from featurecache.images.augmentation import AugmentedCopies, parse_augmentation

SHUFFLED = np.random.default_rng(1).permutation(150)


def test_another_backbone_on_the_same_images_joins_a_sweep():
    sweep(view_of())
    assert [f.view for f in sweep(other_view(view_of())).families] == ["vit-toy/toy", "resnet-toy/toy"]


def test_features_extracted_again_under_one_name_are_another_view_and_leave_the_heads_alone():
    """Cropped otherwise, in another cache, with augmented copies: no family and no folder is shared."""
    first, copies = view_of(), AugmentedCopies(parse_augmentation("flip"), 1)
    cropped = replace(other_view(first), label=first.label)
    copied = replace(first, augmented=copies, versions=np.zeros(150, np.int64))
    copied.copies = lambda rows: np.stack([rows, rows], axis=1)
    names = [first.label, f"{first.label} (bbbbbbbb)", f"{first.label} with {copies}"]
    for count, views in enumerate((first, cropped, copied, [first, cropped]), start=1):
        before = content()[1] if count > 1 else {}
        result = sweep(views, lr="1e-3,1e-1")
        assert [family.view for family in result.families] == names[:count] and not result.unfinished
        assert before.items() <= content()[1].items() and {len(family.tried) for family in result.families} == {2}
    prints = [{row["fingerprint"] for row in family.tried} for family in result.families]
    assert prints == [{first.fingerprint}, {cropped.fingerprint}, {first.fingerprint}]
    assert [family.view for family in sweep([first, cropped], folder="new").families] == names[:2]


def test_views_in_other_orders_that_lack_images_are_divided_alike():
    whole, lines, names = view_of(groups=[f"patient {i // 3}" for i in range(150)]), [], {}
    views = [rows_of(whole, range(150), failed=(40,)), other_view(whole, SHUFFLED, failed=(3, 77))]
    sweep([whole, other_view(whole, failed=(7,))], dry_run=True, say=lines.append)
    assert "images     1 that not every view holds is left out of all" in lines
    result = sweep(views, lr="1e-3,1e-1", fractions="0.4,1", repeats=2, say=lines.append)
    assert "images     3 that not every view holds are left out of all" in lines
    assert {family.view for family in result.families} == {"vit-toy/toy", "resnet-toy/toy"}
    for family in result.families:
        for run in family.runs:
            used = division(run)
            assert names.setdefault((family.fraction, run.config["sweep"]["repeat"]), used) == used


def test_views_named_in_another_order_are_refused_where_that_would_divide_them_otherwise():
    views = [view_of(), other_view(view_of(), SHUFFLED)]
    sweep(views)
    with pytest.raises(RunError, match="another first view in --features"):
        sweep(views[::-1])


def test_views_of_other_images_or_labels_say_what_differs():
    first = view_of()
    labels = first.labels.copy()
    labels[5] ^= 1
    wrong = {
        r"not of the same images: 2 of vit-toy/toy are not in resnet-toy/toy \(the first: img/0003.png\)": replace(
            other_view(first, failed=(3, 77)), failed=[]
        ),
        r"other labels for 1 of 150 images \(the first: img/0005.png\)": other_view(first, labels=labels),
        "other classes": other_view(first, classes=["a", "b"]),
        "other splits for 150 of 150": other_view(first, splits=["train"] * 150),
        "other groups for": other_view(first, groups=["one"] * 150),
    }
    for message, second in wrong.items():
        with pytest.raises(ProtocolError, match=message):
            sweep([first, second])


def test_the_same_features_under_two_names_are_refused_and_named_twice_count_once():
    view = view_of()
    assert len(sweep([view, view]).families) == 1
    with pytest.raises(BadOption, match="vit-toy/toy and vit-toy/copy are of one store"):
        sweep([view, replace(view, path=Path("copy.h5"), label="vit-toy/copy")], folder="t")


def test_copies_of_an_image_and_hashed_ids_are_matched():
    first = view_of(digests=np.array([f"{i - (i % 10 == 1):032x}".encode() for i in range(150)]))
    first.labels[1::10] = first.labels[0::10]
    second = other_view(first, SHUFFLED)
    for folder, other in (("plain", second), ("hashed", replace(second, ids=[f"hash {i}" for i in range(150)]))):
        families = sweep([first, other], folder=folder).families
        assert len({run.config["splits"]["digest"] for family in families for run in family.runs}) == 1


def test_lr_is_chosen_for_each_view_by_itself():
    first = view_of(n=300)
    second = other_view(first)
    second.features = {name: (x.float() * 1e-3).half() for name, x in first.features.items()}
    families = sweep([first, second], lr="1e-5,1e-1", epochs=10, select="nll").families
    lr = {family.view: family.runs[0].config["settings"]["lr"] for family in families}
    assert lr["resnet-toy/toy"] == 1e-1 and len(lr) == 2
