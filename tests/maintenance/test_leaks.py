"""Leaks: images, groups and near-duplicates in two splits, two labels of one image; against plain loops and numpy."""

from __future__ import annotations

import csv
import io
import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import save_vit
from support.command import call
from support.fake_view import FakeView, toy_view
from support.pictures import image_folder, save_picture

from featurecache.commands import inspect
from featurecache.errors import BadOption, NotInCache, UnreadableImage
from featurecache.maintenance.leaks import (
    SPLITS,
    CentredUnitRows,
    NearPairs,
    exact_leaks,
    find_leaks,
    leaking,
    nearest_pairs,
)
from heads.splits import splits_csv


def view_of(splits, images=None, *, x=None, labels=None, task="binary", **more) -> FakeView:
    """A view of few rows: ``images`` are letters, one letter one digest."""
    n = len(splits)
    x = torch.randn((n, 4), generator=torch.Generator().manual_seed(0)) if x is None else x
    labels = np.zeros(n, np.int64) if labels is None else np.asarray(labels)
    codes = None if images is None else np.array([f"{ord(c):032x}".encode() for c in images], "S32")
    return FakeView({"cls": x}, labels, list(splits), ["a", "b", "c"], task, digests=codes, **more)


def exact_of(view, kind):
    return [(f.splits, f.count, f.rows.tolist(), f.copies.tolist()) for f in find_leaks(view, near=False).of(kind)]


TRAIN, VAL, TEST = SPLITS


def test_one_image_in_two_splits_is_one_leak_however_often_it_stands_there():
    view = view_of([TRAIN, TRAIN, VAL, TEST, TRAIN, VAL], "xxyyzx", groups=["p", "", "", "p", "", ""])
    between, twice = [((TRAIN, VAL), 1, [[0, 5]], [[2, 1]]), ((VAL, TEST), 1, [[2, 3]], [[1, 1]])], [[0, 1]]
    assert exact_of(view, "image") == [*between, ((TRAIN, TRAIN), 1, twice, [[1, 1]])]
    assert exact_of(view, "group") == [((TRAIN, TEST), 1, [[0, 3]], [[1, 1]])]  # the empty group is none


def test_rows_without_split_and_augmented_copies_take_no_part():
    view = view_of([TRAIN, "", TEST, TRAIN], "xxyy", groups=["p", "p", "q", "q"], versions=np.array([0, 0, 0, 1]))
    assert find_leaks(view, near=False).findings == ()


def test_one_image_under_two_labels_within_a_split_and_across():
    view = view_of([TRAIN, TRAIN, VAL, TEST, TRAIN, TEST], "xxyyzz", labels=[0, 1, 2, 0, 1, -1], task="multiclass")
    assert exact_of(view, "labels") == [((TRAIN, TRAIN), 1, [[0, 1]], [[1, 1]]), ((VAL, TEST), 1, [[2, 3]], [[1, 1]])]
    nan = np.nan  # what is unknown contradicts nothing
    labels = np.array([[1, nan], [nan, 0], [1, 0], [1, 1], [0, 0], [0, nan]], np.float32)
    view = view_of([TRAIN] * 6, "xxyyzz", labels=labels, task="multilabel")
    assert exact_of(view, "labels") == [((TRAIN, TRAIN), 1, [[2, 3]], [[1, 1]])]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "p", "q", "r"]), st.sampled_from(
    ["train", "val", "test", ""]))))  # fmt: skip
def test_exact_leaks_are_those_of_plain_sets_and_drop_leaks_leaves_none(rows):
    images, groups, names = ([row[k] for row in rows] for k in range(3))
    view = view_of(names, images, groups=groups)
    found = {(f.kind, f.splits): f.count for f in exact_leaks(view, np.array(names, "<U5"))}
    for kind, keys in (("image", images), ("group", groups)):
        there = {name: {k for k, n in zip(keys, names, strict=True) if n == name and k} for name in SPLITS}
        shared = {(a, b): len(there[a] & there[b]) for a, b in combinations(SPLITS, 2)}
        assert {pair: found.get((kind, pair), 0) for pair in shared} == shared
    kept = np.array(names, dtype="<U5")
    for drop in leaking(view, kept.copy()).values():
        kept[drop] = ""
    assert exact_leaks(view, kept) == []
    assert [n == "test" for n in kept] == [n == "test" for n in names]  # never from test
    for i, name in enumerate(names):  # and no row without a reason
        later = [j for j, n in enumerate(names) if n and SPLITS.index(n) > SPLITS.index(name or "test")]
        reason = any(images[i] == images[j] or (groups[i] and groups[i] == groups[j]) for j in later)
        assert (kept[i] != name) == bool(name and reason)


def cloud(n, width, seed=0, clusters=0, dtype=torch.float16):
    """Rows of a large common part (raw cosines near 1), the last fifth copies of others with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, width), generator=generator)
    if clusters:
        centres = 4 * torch.randn((clusters, width), generator=generator)
        x = 0.3 * x + centres[torch.arange(n) % clusters]
    few = n // 5
    x[-few:] = x[:few] + 0.05 * torch.randn((few, width), generator=generator)
    return (x + 10).to(dtype)


def plain_cosines(x):
    """[N,N] of the rows from their mean, by numpy on everything at once."""
    d = x.numpy().astype(np.float64)
    d -= d.mean(0)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    return np.round(d @ d.T, 9)


def plain_pairs(x, half, threshold):
    """[(cosine, a, b)] of a row before and one behind ``half``, closest first."""
    cosines = plain_cosines(x)[:half, half:]
    return sorted(
        ((cosines[a, b], a, b + half) for a, b in np.argwhere(cosines >= threshold).tolist()),
        key=lambda pair: (-pair[0], *pair[1:]),
    )


def search(x, half, threshold):
    rows = np.arange(len(x))
    features = CentredUnitRows(view_of([""] * len(x), x=x), "cls", rows)
    return nearest_pairs(features, rows[:half], rows[half:], threshold=threshold, most=10**6, same=rows)


@pytest.mark.parametrize("clusters", [0, 3])
@pytest.mark.parametrize("threshold", [0.99, 0.5, 0.02])
def test_near_duplicates_are_those_of_all_products(monkeypatch, threshold, clusters):
    monkeypatch.setattr("featurecache.maintenance.leaks.TILE", 40)
    monkeypatch.setattr("featurecache.maintenance.leaks.BLOCK", 16)
    x = cloud(150, 48, clusters=clusters)
    expected = plain_pairs(x, 70, threshold)
    found = search(x, 70, threshold)
    assert found.count == len(expected) > 0
    assert found.rows.tolist() == [[a, b] for _, a, b in expected]
    np.testing.assert_allclose(found.cosines, [c for c, _, _ in expected], atol=2e-9)


def test_rounding_of_float32_loses_no_pair_at_the_threshold():
    """200 pairs of equal vectors and a threshold of 1: products in float32 are often a little less."""
    x = cloud(200, 48)
    found = search(torch.cat([x, x]), 200, threshold=1.0)
    assert found.count == 200 and (found.rows[:, 1] - found.rows[:, 0] == 200).all()


def test_all_near_duplicates_are_counted_and_the_closest_held(monkeypatch):
    monkeypatch.setattr("featurecache.maintenance.leaks.BLOCK", 8)
    x = cloud(100, 6)
    expected = plain_pairs(x, 60, 0.3)
    held, add = [], NearPairs.add
    monkeypatch.setattr(NearPairs, "add", lambda self, *new: add(self, *new) or held.append(len(self.rows)))
    found = find_leaks(view_of([TRAIN] * 60 + [TEST] * 40, x=x), threshold=0.3, most=5).of("near")[0]
    assert (found.count, found.rows.tolist()) == (len(expected), [[a, b] for _, a, b in expected[:5]])
    assert len(expected) > 100 and max(held) == 5  # however many there are


def test_exact_copies_are_no_near_duplicates_and_copies_within_a_split_count_once():
    x = cloud(40, 8)
    x[3], x[33], x[5] = x[0], x[0], x[1]
    x[35] = x[1]  # the features of another image, the same to the last bit
    images = [chr(100 + k) for k in range(40)]
    images[3] = images[33] = images[0]
    images[5] = images[1]
    view = view_of([TRAIN] * 20 + [TEST] * 20, images, x=x)
    found = find_leaks(view, threshold=0.99999)
    assert [(f.splits, f.count) for f in found.of("image")] == [((TRAIN, TEST), 1), ((TRAIN, TRAIN), 2)]
    assert [(f.count, f.rows.tolist(), f.copies.tolist(), f.cosines.tolist()) for f in found.of("near")] == [
        (1, [[1, 35]], [[2, 1]], [1.0])
    ]


def test_rows_on_the_mean_or_not_finite_are_near_to_nothing_and_spoil_nothing():
    x = cloud(100, 8, dtype=torch.float32)
    x[70] = x[2]
    clean = find_leaks(view_of([TRAIN] * 50 + [TEST] * 50, x=x.clone()), threshold=0.999).of("near")[0]
    x = torch.cat([x, torch.full((2, 8), torch.nan), torch.full((2, 8), torch.inf), x.mean(0, keepdim=True)])
    found = find_leaks(view_of([TRAIN] * 50 + [TEST] * 50 + [TRAIN, TEST] * 2 + [VAL], x=x), threshold=0.999)
    assert [f.rows.tolist() for f in found.of("near")] == [clean.rows.tolist()]
    np.testing.assert_allclose(found.of("near")[0].cosines, clean.cosines, atol=1e-4)
    assert find_leaks(view_of([TRAIN, TEST] * 20, x=torch.full((40, 8), 0.3))).of("near") == ()  # all on the mean


def test_the_output_compared_is_the_first_vector_the_view_has():
    view = toy_view(n=40, splits="given")
    assert find_leaks(view).output == "cls"
    view.features = {"mean": view.features["cls"], "gap": view.features["cls"], "tokens": view.features["tokens"]}
    assert find_leaks(view).output == "gap"
    assert find_leaks(view, output="mean").output == "mean"
    view.features = {"tokens-257": view.features["tokens"]}
    assert find_leaks(view).output is None
    assert ["near-duplicates", "not compared", "tokens-257 is no vector"] in lines_of(view)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": "tokens"}, r"has \[5×8\] numbers an image; one vector is compared"),
        ({"threshold": 0.0}, "above 0 and up to 1"),
        ({"threshold": 1.5}, "above 0 and up to 1"),
        ({"threshold": float("nan")}, "above 0 and up to 1"),
        ({"most": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(BadOption, match=said):
        find_leaks(toy_view(n=40, splits="given"), **options)
    with pytest.raises(NotInCache):
        find_leaks(toy_view(n=40), output="pooler")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Pictures in split and class folders: copies of train in val and test, names that mean harm, one gone since."""
    root = tmp_path_factory.mktemp("leaks")
    for number, split in enumerate(SPLITS):
        image_folder(root / "d" / split, 6, classes=("ill", "w\x1b[2Jell"))
        for k in range(6):
            name = root / "d" / split / ("ill", "w\x1b[2Jell")[k % 2] / f"{k:03d}.png"
            save_picture(name, 10 * number + k, width=40)
    shutil.copy(root / "d/train/ill/000.png", root / "d/test/ill/=cmd()\x1b[31m.png")
    shutil.copy(root / "d/train/ill/002.png", root / "d/val/w\x1b[2Jell/\nline.png")
    shutil.copy(root / "d/train/ill/004.png", root / "d/val/ill/gone.png")
    (root / "cache").mkdir()
    backbone = save_vit(root / "vit")
    done = call(
        "extract", "--backbone", f"hf:{backbone}", "--data", root / "d", "--outputs", "cls", "--cache", root / "cache"
    )
    assert done.exit_code == 0, done.output
    return root


def leaks(root, *words):
    return call("leaks", "d", "--cache", root / "cache", *words)


def cells(text):
    return [[word.strip() for word in line.split("  ") if word.strip()] for line in text.splitlines()]


@pytest.mark.integration
def test_the_command_counts_lists_and_names_what_to_type(extracted):
    done = leaks(extracted, "--threshold", "0.9999")
    assert done.exit_code == 0, done.output
    rows = cells(done.stdout)
    assert rows[:3] == [
        ["same image", "train and val", "2 images"],
        ["same image", "train and test", "1 image"],
        ["same group", "not compared", "no groups are known"],
    ]
    assert ["two labels", "train and val", "1 image"] in rows
    assert "--drop-leaks" in done.stderr.splitlines()[-1]
    assert "\x1b" not in done.stdout + done.stderr and "\nline.png" not in done.stdout
    assert r"test/ill/=cmd()\x1b[31m.png (ill)" in done.stdout
    record = json.loads(leaks(extracted, "--json", "--threshold", "0.9999").stdout)
    assert {"kind": "image", "splits": ["train", "test"], "count": 1} in record["counts"]
    assert record["pairs"][0]["ids"][0].startswith("train/ill/")


def lines_of(view, **options):
    return cells(inspect.leaks_lines(view, find_leaks(view, **options)))


def test_none_is_said_where_something_was_compared_and_why_where_nothing_was():
    clean, whole = (toy_view(n=40, splits=splits, groups=[""] * 40) for splits in ("given", "drawn"))
    near = "cosine of centred cls ≥ 1"
    assert lines_of(clean, threshold=1.0) == [
        ["same image", "none"], ["same group", "none"], ["near-duplicates", "none", near], ["two labels", "none"]
    ]  # fmt: skip
    few = "fewer than two splits here; --run or --splits gives those that a training drew"
    assert lines_of(whole, threshold=1.0) == [
        ["same image", "not compared", few], ["same image", "none within the set"], ["same group", "not compared", few],
        ["near-duplicates", "not compared", few], ["near-duplicates", "none within the set", near],
        ["two labels", "none"],
    ]  # fmt: skip
    clean.groups, clean.task = None, "unlabelled"
    said = lines_of(clean, threshold=1.0)
    assert ["same group", "not compared", "no groups are known"] in said
    assert ["two labels", "not compared", "no labels are known"] in said


def test_what_stands_twice_within_a_split_or_without_one_is_found():
    view = view_of([TRAIN, TRAIN, TRAIN, TEST, "", "", TEST], "xxxyzzy", x=torch.eye(7))
    within = [(f.splits, f.rows.tolist(), f.copies.tolist()) for f in find_leaks(view).of("image")]
    assert within == [
        ((TRAIN, TRAIN), [[0, 1]], [[1, 2]]), ((TEST, TEST), [[3, 6]], [[1, 1]]), (("", ""), [[4, 5]], [[1, 1]])
    ]  # fmt: skip
    assert exact_leaks(view, np.array(view.splits)) == []  # which is what training warns of
    record = inspect.leaks_record(view, find_leaks(view))
    assert record["pairs"][0]["rows"] == [1, 2] and record["not_compared"] == {"group": "no groups are known"}


@pytest.mark.parametrize("block", [16, 2048])
def test_near_duplicates_within_a_set_are_those_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr("featurecache.maintenance.leaks.BLOCK", block)
    monkeypatch.setattr("featurecache.maintenance.leaks.TILE", 40)
    x = cloud(90, 8)
    expected = set(map(tuple, np.argwhere(np.triu(plain_cosines(x) >= 0.9, 1)).tolist()))
    (found,) = find_leaks(view_of([""] * 90, x=x), threshold=0.9).of("near")
    assert found.splits == ("", "") and found.count == len(expected) > 10
    assert {tuple(pair) for pair in found.rows.tolist()} == expected


@pytest.mark.integration
def test_the_splits_that_a_run_drew_are_looked_at(extracted, tmp_path):
    names = {}
    for path in sorted((extracted / "d").rglob("*.png")):
        names[path.relative_to(extracted / "d").as_posix()] = "train"
    moved = "train/ill/002.png"
    (tmp_path / "s.csv").write_text(
        splits_csv(list(names), np.array(["val" if n == moved else "train" for n in names]))
    )
    done = leaks(extracted, "--splits", tmp_path / "s.csv", "--threshold", "0.9999")
    assert done.exit_code == 0, done.output
    rows = cells(done.stdout)
    assert ["same image", "train and val", "1 image"] in rows and ["same image", "within train", "2 images"] in rows
    assert "--splits" in done.stderr.splitlines()[-1]
    both = leaks(extracted, "--splits", tmp_path / "s.csv", "--run", tmp_path)
    assert both.exit_code == 2 and "both say which splits" in both.stderr


@pytest.mark.integration
def test_the_csv_has_every_pair_and_no_formula(extracted, tmp_path):
    assert leaks(extracted, "--threshold", "0.9999", "--csv", tmp_path / "l.csv").exit_code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "l.csv").read_text(), newline="")))
    exact = [row for row in rows if row["kind"] == "image"]
    assert [(row["split a"], row["split b"]) for row in exact] == [(TRAIN, VAL), (TRAIN, VAL), (TRAIN, TEST)]
    assert exact[0]["id b"] == "val/w\x1b[2Jell/\nline.png"
    view = view_of([TRAIN, TEST], "xx", labels=[0, 1], ids=["=cmd()", "-1+1"])
    text = inspect.leaks_csv(inspect.leaks_record(view, find_leaks(view, near=False)))
    cells = [value for row in csv.reader(io.StringIO(text)) for value in row]
    assert "'=cmd()" in cells and "'-1+1" in cells
    assert not any(value.startswith(("=", "-", "+", "@")) for value in cells)


@pytest.mark.integration
def test_the_sheet_shows_each_pair_and_an_empty_frame_for_what_has_gone(extracted, tmp_path, monkeypatch):
    reasons, read = [], inspect._read

    def noted(*arguments):
        try:
            return read(*arguments)
        except UnreadableImage as error:
            reasons.append(str(error))
            raise

    monkeypatch.setattr(inspect, "_read", noted)
    source = extracted / "d"
    copy = shutil.copytree(source, tmp_path / "copy")
    (source / "val/ill/gone.png").unlink()
    shutil.copy(source / "train/ill/000.png", source / "train/ill/002.png")
    try:
        done = leaks(extracted, "--sheet", tmp_path / "l.png", "--threshold", "0.9999")
    finally:
        shutil.copytree(copy, source, dirs_exist_ok=True)
    assert done.exit_code == 0, done.output
    assert set(reasons) == {"not among the images any more", "another image now than when its features were computed"}
    with Image.open(tmp_path / "l.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == inspect.ACROSS * (2 * 112 + 3 + 20) - 20 + 56
        assert len(set(sheet.convert("L").resize((64, 64)).get_flattened_data())) > 10


@pytest.mark.integration
def test_a_sheet_without_images_is_refused_before_anything_is_compared(extracted, tmp_path):
    (extracted / "d").rename(extracted / "moved")
    try:
        done = leaks(extracted, "--sheet", tmp_path / "l.png", "--csv", tmp_path / "l.csv")
    finally:
        (extracted / "moved").rename(extracted / "d")
    assert (done.exit_code, done.stdout, list(tmp_path.iterdir())) == (1, "", [])
    assert "there is no folder" in done.stderr
    view = view_of([TRAIN, TEST], "xx", source={"kind": "import", "data": "features.npy"})
    with pytest.raises(BadOption, match="imported as features: it has no images"):
        inspect.open_images(view)
