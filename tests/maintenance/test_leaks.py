"""Leaks: images, groups and near-duplicates in two splits, two labels of one image; against plain loops and numpy."""

from __future__ import annotations

import csv
import io
import json
import shutil
from functools import partial
from itertools import combinations, product

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
from featurecache.errors import BadOption, NotInCache, ProtocolError, RunError, SourceError, UnreadableImage
from featurecache.images.decoding import digest
from featurecache.maintenance.leaks import (
    SPLITS,
    CentredUnitRows,
    NearPairs,
    exact_leaks,
    find_leaks,
    leaking,
    nearest_pairs,
)
from featurecache.sources import open_source
from heads.api import train_head
from heads.reports.text import final_table
from heads.runs.run import load_run
from heads.settings import Settings
from heads.splits import choose_splits
from heads.task import task_of

train_head = partial(train_head, report=False)


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
    view = view_of([TRAIN, TRAIN, VAL, TEST, TRAIN, VAL], "xxyyzx")
    assert exact_of(view, "image") == [((TRAIN, VAL), 1, [[0, 5]], [[2, 1]]), ((VAL, TEST), 1, [[2, 3]], [[1, 1]])]


def test_one_group_in_two_splits_and_the_empty_group_is_none():
    view = view_of([TRAIN, TRAIN, VAL, TEST, ""], groups=["p", "", "", "p", "p"])
    assert exact_of(view, "group") == [((TRAIN, TEST), 1, [[0, 3]], [[1, 1]])]


def test_rows_without_split_and_augmented_copies_take_no_part():
    view = view_of([TRAIN, "", TEST, TRAIN], "xxyy", groups=["p", "p", "q", "q"], versions=np.array([0, 0, 0, 1]))
    assert find_leaks(view, near=False).findings == ()


def test_one_image_under_two_labels_within_a_split_and_across():
    view = view_of([TRAIN, TRAIN, VAL, TEST, TRAIN, TEST], "xxyyzz", labels=[0, 1, 2, 0, 1, -1], task="multiclass")
    assert exact_of(view, "labels") == [
        ((TRAIN, TRAIN), 1, [[0, 1]], [[1, 1]]),
        ((VAL, TEST), 1, [[2, 3]], [[1, 1]]),
    ]


def test_labels_that_are_unknown_contradict_nothing():
    nan = np.nan
    labels = np.array([[1, nan], [nan, 0], [1, 0], [1, 1], [0, 0], [0, nan]], np.float32)
    view = view_of([TRAIN] * 6, "xxyyzz", labels=labels, task="multilabel")
    assert exact_of(view, "labels") == [((TRAIN, TRAIN), 1, [[2, 3]], [[1, 1]])]


def brute_pairs(keys, names):
    """(a, b) -> how many keys stand in both."""
    there = {name: {k for k, n in zip(keys, names, strict=True) if n == name and k} for name in SPLITS}
    return {pair: len(there[pair[0]] & there[pair[1]]) for pair in combinations(SPLITS, 2)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "p", "q", "r"]), st.sampled_from(
    ["train", "val", "test", ""]))))  # fmt: skip
def test_exact_leaks_are_those_of_plain_sets_and_drop_leaks_leaves_none(rows):
    images, groups, names = ([row[k] for row in rows] for k in range(3))
    view = view_of(names, images, groups=groups)
    found = {(f.kind, f.splits): f.count for f in exact_leaks(view, np.array(names, "<U5"))}
    for kind, keys in (("image", images), ("group", groups)):
        assert {pair: found.get((kind, pair), 0) for pair in combinations(SPLITS, 2)} == brute_pairs(keys, names)
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


def plain_pairs(x, first, second, threshold):
    """[(cosine, a, b)], closest first, by numpy on everything at once."""
    d = x.numpy().astype(np.float64)
    d -= d.mean(0)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    cosines = np.round(d @ d.T, 9)
    found = [(-cosines[a, b], a, b) for a, b in product(first.tolist(), second.tolist()) if cosines[a, b] >= threshold]
    return [(-c, a, b) for c, a, b in sorted(found)]


def search(view, first, second, **more):
    n = len(view)
    options = {"threshold": 0.99, "most": 10**6, "same": np.arange(n), **more}
    return nearest_pairs(CentredUnitRows(view, "cls", np.arange(n)), first, second, **options)


@pytest.mark.parametrize("clusters", [0, 3])
@pytest.mark.parametrize("threshold", [0.99, 0.5, 0.02])
def test_near_duplicates_are_those_of_all_products(monkeypatch, threshold, clusters):
    monkeypatch.setattr("featurecache.maintenance.leaks.TILE", 40)
    monkeypatch.setattr("featurecache.maintenance.leaks.BLOCK", 16)
    x = cloud(150, 48, clusters=clusters)
    first, second = np.arange(70), np.arange(70, 150)
    expected = plain_pairs(x, first, second, threshold)
    found = search(view_of([""] * 150, x=x), first, second, threshold=threshold)
    assert found.count == len(expected) > 0
    assert found.rows.tolist() == [[a, b] for _, a, b in expected]
    np.testing.assert_allclose(found.cosines, [c for c, _, _ in expected], atol=2e-9)


def test_rounding_of_float32_loses_no_pair_at_the_threshold():
    """200 pairs of equal vectors and a threshold of 1: products in float32 are often a little less."""
    x = cloud(200, 48)
    found = search(view_of([""] * 400, x=torch.cat([x, x])), np.arange(200), np.arange(200, 400), threshold=1.0)
    assert found.count == 200 and (found.rows[:, 1] - found.rows[:, 0] == 200).all()


def test_all_near_duplicates_are_counted_and_the_closest_held(monkeypatch):
    monkeypatch.setattr("featurecache.maintenance.leaks.BLOCK", 8)
    x = cloud(100, 6)
    expected = plain_pairs(x, np.arange(60), np.arange(60, 100), 0.3)
    held, add = [], NearPairs.add
    monkeypatch.setattr(NearPairs, "add", lambda self, *new: add(self, *new) or held.append(len(self.rows)))
    (found,) = find_leaks(view_of([TRAIN] * 60 + [TEST] * 40, x=x), threshold=0.3, most=5).of("near")
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
    assert [f.count for f in found.of("image")] == [1]
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


def test_equal_features_have_no_direction():
    assert find_leaks(view_of([TRAIN, TEST] * 20, x=torch.full((40, 8), 0.3))).of("near") == ()


def test_the_output_compared_is_the_first_vector_the_view_has():
    view = toy_view(n=40, splits="given")
    assert find_leaks(view).output == "cls"
    view.features = {"mean": view.features["cls"], "gap": view.features["cls"], "tokens": view.features["tokens"]}
    assert find_leaks(view).output == "gap"
    assert find_leaks(view, output="mean").output == "mean"
    view.features = {"tokens-257": view.features["tokens"]}
    assert find_leaks(view).output is None
    assert "not looked for: tokens-257 is no vector" in inspect.leaks_lines(view, find_leaks(view))


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


# ---- training


def leaky(**more) -> FakeView:
    """240 rows; 6 images of train also in test, 2 of them also in val; a patient of val also in test."""
    view = toy_view(n=240, splits="given", **more)
    rows = {s: [i for i, name in enumerate(view.splits) if name == s] for s in SPLITS}
    view.digests[rows["test"][:6]] = view.digests[rows["train"][:6]]
    view.digests[rows["val"][:2]] = view.digests[rows["train"][:2]]
    view.groups = [""] * 240
    view.groups[rows["val"][7]] = view.groups[rows["test"][9]] = view.groups[rows["test"][10]] = "p1"
    return view


WARNING = (
    "6 images stand in both train and test, 2 images in both val and test, 2 images in both train and val, "
    "1 group in both val and test"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.integration
def test_training_warns_in_one_line_and_the_run_and_its_table_say_it_too(here):
    said = []
    run = train_head(leaky(), "linear", epochs=1, say=said.append)
    assert f"warning    {WARNING} (featurecache leaks vit-toy/toy; --drop-leaks trains without them)" in said
    assert {"kind": "image", "splits": ["train", "test"], "count": 6} in run.config["splits"]["leaks"]
    assert f"{WARNING}: these numbers may be too good." in final_table(load_run(run.path))


@pytest.mark.integration
def test_drop_leaks_leaves_out_train_then_val_never_test_and_says_so(here):
    said, view = [], leaky()
    run = train_head(view, "linear", epochs=1, drop_leaks=True, say=said.append)
    plain = train_head(view, "linear", epochs=1)
    with (run.path / "splits.csv").open(newline="") as file:
        used = [row["split"] for row in csv.DictReader(file)]
    lost = {s: [i for i, name in enumerate(view.splits) if name == s != used[i]] for s in SPLITS}
    assert {s: len(rows) for s, rows in lost.items()} == {"train": 6, "val": 3, "test": 0}
    assert run.config["splits"]["dropped"] == {"train": 6, "val": 3}
    assert run.config["splits"]["leaks"] == []
    assert run.config["splits"]["images"] == {"train": 144 - 6, "val": 48 - 3, "test": 48}
    assert run.config["splits"]["digest"] == plain.config["splits"]["digest"]  # the same test
    assert run.config["settings"]["drop_leaks"] is True
    words = "--drop-leaks left out 6 of train (also in val or test) and 3 of val (also in test)"
    assert any(words in line for line in said) and words in final_table(load_run(run.path))
    assert not any("stand in both" in line for line in said)


@pytest.mark.integration
def test_drop_leaks_says_when_there_is_nothing_to_leave_out(here):
    said = []
    run = train_head(toy_view(), "linear", epochs=1, drop_leaks=True, say=said.append)
    assert run.config["splits"]["dropped"] == {"train": 0, "val": 0}
    assert any("found nothing to leave out" in line for line in said)


def used(view, task=None, **options):
    return choose_splits(view, task or task_of(view), Settings("linear", drop_leaks=True, **options))


def test_drop_leaks_with_a_val_drawn_anew():
    """The six images of test go wherever they were put, and so does what the patient of test left in val."""
    chosen = used(leaky(), resplit_val=True)
    assert exact_leaks(leaky(), chosen.names) == []
    assert sum(chosen.dropped.values()) == 6 + 2 + 1
    assert (chosen.names == "test").sum() == 48


@pytest.mark.integration
def test_drop_leaks_looks_only_at_the_rows_of_the_task():
    """An image of train under class 0 that stands in test under class 1 is no leak where class 1 is not tested."""
    view = toy_view(n=240, classes=3, splits="given")
    rows = {s: [i for i, name in enumerate(view.splits) if name == s] for s in SPLITS}
    train, test = (next(i for i in rows[s] if view.labels[i] == c) for s, c in ((TRAIN, 0), (TEST, 1)))
    view.digests[train] = view.digests[test]
    assert used(view).dropped == {"train": 1, "val": 0}
    assert used(view, task_of(view, only=["kind 0", "kind 2"])).dropped == {"train": 0, "val": 0}
    assert used(view, task_of(view, classes=["x=kind 0,kind 1", "kind 2"])).dropped == {"train": 1, "val": 0}


def test_drop_leaks_with_splits_from_a_file(tmp_path):
    view = toy_view(n=240, splits="given")
    view.digests[1] = view.digests[0]
    lines = [
        "id,split",
        *(f"{name},{('test', 'train', 'val', 'train', 'train')[i % 5]}" for i, name in enumerate(view.ids)),
    ]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    plain = choose_splits(view, task_of(view), Settings("linear", splits=str(tmp_path / "s.csv")))
    assert plain.warnings == ["1 image stands in both train and test (--drop-leaks trains without them)"]
    assert used(view, splits=str(tmp_path / "s.csv")).dropped == {"train": 1, "val": 0}


def test_leaks_are_left_out_before_train_is_thinned():
    chosen = used(leaky(), train_per_class=69)
    assert (chosen.names == "train").sum() == 2 * 69  # 72 of each class less three


def test_a_val_that_stands_in_test_as_a_whole_is_said():
    view = toy_view(n=240, splits="given")
    rows = {s: [i for i, name in enumerate(view.splits) if name == s] for s in SPLITS}
    view.digests[rows["val"]] = view.digests[rows["test"]]
    with pytest.raises(ProtocolError, match="--drop-leaks leaves no image in val: all 48 are"):
        used(view)


def with_record(path, **changed):
    """A copy of the run with other records of leaks; None: without."""
    shutil.copytree(path, path.parent / "other")
    file = path.parent / "other" / "config.json"
    config = json.loads(file.read_text())
    splits = {**config["splits"], **changed}
    config["splits"] = {key: value for key, value in splits.items() if value is not None}
    file.write_text(json.dumps(config))
    return path.parent / "other"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_head(leaky(), "linear", epochs=1, out=tmp_path_factory.mktemp("r") / "run").path


@pytest.mark.integration
@pytest.mark.parametrize(
    "changed",
    [
        {"leaks": [{"kind": "\x1b[31m", "splits": ["train", "val"], "count": 1}]},
        {"leaks": [{"kind": "image", "splits": ["train", "\x1b"], "count": 1}]},
        {"leaks": [{"kind": "image", "splits": ["train", "val"], "count": "1"}]},
        {"leaks": [7]},
        {"leaks": {"a": 1}},
        {"dropped": {"train": "\x1b", "val": 0}},
        {"dropped": 3},
    ],
)
def test_a_run_with_a_made_up_record_of_leaks_is_refused(trained, tmp_path, changed):
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(RunError, match="no proper splits"):
        load_run(with_record(run, **changed))


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


@pytest.mark.integration
def test_the_command_counts_lists_and_names_what_to_type(extracted):
    done = leaks(extracted, "--threshold", "0.9999")
    assert done.exit_code == 0, done.output
    rows = [[word for word in line.split("  ") if word] for line in done.stdout.splitlines()]
    assert [[word.strip() for word in row] for row in rows[:3]] == [
        ["same image", "train and val", "2 images"],
        ["same image", "train and test", "1 image"],
        ["same group", "none", "no groups are known"],
    ]
    assert ["two labels", "train and val", "1 image"] in [[word.strip() for word in row] for row in rows]
    assert "--drop-leaks" in done.stderr.splitlines()[-1]
    assert "\x1b" not in done.stdout + done.stderr and "\nline.png" not in done.stdout
    assert r"test/ill/=cmd()\x1b[31m.png (ill)" in done.stdout


def test_nothing_found_is_said_as_none():
    clean = toy_view(n=40, splits="given")
    text = inspect.leaks_lines(clean, find_leaks(clean, threshold=1.0)).splitlines()
    assert len(text) == 4 and all("none" in line for line in text)


def test_a_view_without_splits_says_why_there_is_nothing():
    view = toy_view(n=40)
    assert inspect.leaks_lines(view, find_leaks(view)).count("fewer than two splits in the data") == 3


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
def test_json_is_one_object_with_the_pairs(extracted):
    record = json.loads(leaks(extracted, "--json", "--threshold", "0.9999").stdout)
    assert {"kind": "image", "splits": ["train", "test"], "count": 1} in record["counts"]
    assert record["pairs"][0]["ids"][0].startswith("train/ill/")


@pytest.mark.integration
def test_the_sheet_shows_each_pair_and_an_empty_frame_for_what_has_gone(extracted, tmp_path, monkeypatch):
    shutil.copytree(extracted, tmp_path / "c")
    root, reasons = tmp_path / "c", []
    view = json.loads(leaks(root, "--json").stdout)["view"]
    read = inspect._read

    def noted(*arguments):
        try:
            return read(*arguments)
        except UnreadableImage as error:
            reasons.append(str(error))
            raise

    monkeypatch.setattr(inspect, "_read", noted)
    source = extracted / "d"
    (source / "val/ill/gone.png").rename(tmp_path / "away.png")
    shutil.copy(source / "train/ill/002.png", tmp_path / "kept.png")
    shutil.copy(source / "train/ill/000.png", source / "train/ill/002.png")
    try:
        done = leaks(root, "--sheet", tmp_path / "l.png", "--threshold", "0.9999")
    finally:
        shutil.copy(tmp_path / "kept.png", source / "train/ill/002.png")
        (tmp_path / "away.png").rename(source / "val/ill/gone.png")
    assert done.exit_code == 0, (done.output, view)
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
    with pytest.raises(SourceError, match="there is no folder"):
        inspect.open_images(view_of([TRAIN], "x", source={"kind": "folder", "data": str(tmp_path / "gone")}))


@pytest.mark.integration
def test_pneumoniamnist_has_eight_images_in_train_and_val(real_data):
    """By digests, against the bytes of the arrays themselves."""
    data = open_source(real_data / "pneumoniamnist.npz")
    digests = np.array([digest(data.read(row)) for row in range(len(data))], "S32")
    view = FakeView({}, data.labels, data.splits, data.classes, digests=digests, ids=data.ids)
    with np.load(real_data / "pneumoniamnist.npz") as arrays:
        train, val, test = ([a.tobytes() for a in arrays[f"{name}_images"]] for name in SPLITS)
    both = set(train) & set(val)
    assert len(both) == 8 and not set(test) & set(train + val)
    (found,) = find_leaks(view, near=False).findings
    assert (found.kind, found.splits, found.count) == ("image", (TRAIN, VAL), 8)
    assert {(a, b - len(train)) for a, b in found.rows.tolist()} == {(train.index(x), val.index(x)) for x in both}
    assert int(leaking(view, np.array(data.splits))["train"].sum()) == sum(x in both for x in train)
