"""Leaks between the splits that a head trains on: said in one line, and left out by --drop-leaks."""

from __future__ import annotations

import shutil

import pytest
from support.fake_view import toy_view
from support.runs import reseal, train_head

from featurecache.errors import ProtocolError, RunError
from featurecache.maintenance.leaks import SPLITS, exact_leaks
from heads.reports.text import final_table
from heads.runs.run import load_run
from heads.settings import Settings
from heads.splits import choose_splits
from heads.task import task_of


def rows_of(view):
    return {s: [i for i, name in enumerate(view.splits) if name == s] for s in SPLITS}


def leaky(**more):
    """240 rows; 6 images of train also in test, 2 of them also in val; a patient of val also in test."""
    view = toy_view(n=240, splits="given", **more)
    rows = rows_of(view)
    view.digests[rows["test"][:6]] = view.digests[rows["train"][:6]]
    view.digests[rows["val"][:2]] = view.digests[rows["train"][:2]]
    view.groups = [""] * 240
    view.groups[rows["val"][7]] = view.groups[rows["test"][9]] = view.groups[rows["test"][10]] = "p1"
    return view


WARNING = (
    "6 images stand in both train and test, 2 images in both val and test, 2 images in both train and val, "
    "1 group in both val and test"
)


@pytest.mark.integration
def test_training_warns_in_one_line_and_the_run_and_its_table_say_it_too():
    said = []
    run = train_head(leaky(), "linear", epochs=1, say=said.append)
    assert f"warning    {WARNING} (featurecache leaks vit-toy/toy; --drop-leaks trains without them)" in said
    assert {"kind": "image", "splits": ["train", "test"], "count": 6} in run.config["splits"]["leaks"]
    assert f"{WARNING}: these numbers may be too good." in final_table(load_run(run.path))


@pytest.mark.integration
def test_drop_leaks_leaves_out_train_then_val_never_test_and_says_so():
    said, view = [], leaky()
    run = train_head(view, "linear", epochs=1, drop_leaks=True, say=said.append)
    plain = train_head(view, "linear", epochs=1)
    lost = {s: [i for i, name in enumerate(view.splits) if name == s != run.splits[i]] for s in SPLITS}
    assert {s: len(rows) for s, rows in lost.items()} == {"train": 6, "val": 3, "test": 0}
    assert run.config["splits"]["dropped"] == {"train": 6, "val": 3}
    assert run.config["splits"]["leaks"] == []
    assert run.config["splits"]["images"] == {"train": 144 - 6, "val": 48 - 3, "test": 48}
    assert run.config["splits"]["digest"] == plain.config["splits"]["digest"]  # the same test
    assert run.config["settings"]["drop_leaks"] is True
    words = "--drop-leaks left out 6 of train (also in val or test) and 3 of val (also in test)"
    assert any(words in line for line in said) and words in final_table(load_run(run.path))
    assert not any("stand in both" in line for line in said)
    run = train_head(toy_view(), "linear", epochs=1, drop_leaks=True, say=said.append)
    assert run.config["splits"]["dropped"] == {"train": 0, "val": 0}
    assert any("found nothing to leave out" in line for line in said)


def used(view, task=None, **options):
    return choose_splits(view, task or task_of(view), Settings("linear", drop_leaks=True, **options))


def test_drop_leaks_with_a_val_drawn_anew_and_a_train_that_is_thinned():
    """The six images of test go wherever they were put, and so does what the patient of test left in val."""
    chosen = used(leaky(), resplit_val=True)
    assert exact_leaks(leaky(), chosen.names) == []
    assert sum(chosen.dropped.values()) == 6 + 2 + 1
    assert (chosen.names == "test").sum() == 48
    thinned = used(leaky(), train_per_class=69)  # after the leaks: 72 of each class less three
    assert (thinned.names == "train").sum() == 2 * 69


@pytest.mark.integration
def test_drop_leaks_looks_only_at_the_rows_of_the_task():
    """An image of train under class 0 that stands in test under class 1 is no leak where class 1 is not tested."""
    view = toy_view(n=240, classes=3, splits="given")
    rows = rows_of(view)
    train, test = (next(i for i in rows[s] if view.labels[i] == c) for s, c in (("train", 0), ("test", 1)))
    view.digests[train] = view.digests[test]
    assert used(view).dropped == {"train": 1, "val": 0}
    assert used(view, task_of(view, only=["kind 0", "kind 2"])).dropped == {"train": 0, "val": 0}
    assert used(view, task_of(view, classes=["x=kind 0,kind 1", "kind 2"])).dropped == {"train": 1, "val": 0}


def test_drop_leaks_with_splits_from_a_file(tmp_path):
    view = toy_view(n=240, splits="given")
    view.digests[1] = view.digests[0]
    words = ("test", "train", "val", "train", "train") * 48
    lines = [f"{name},{word}" for name, word in zip(view.ids, words, strict=True)]
    (tmp_path / "s.csv").write_text("\n".join(["id,split", *lines]))
    plain = choose_splits(view, task_of(view), Settings("linear", splits=str(tmp_path / "s.csv")))
    assert plain.warnings == ["1 image stands in both train and test (--drop-leaks trains without them)"]
    assert used(view, splits=str(tmp_path / "s.csv")).dropped == {"train": 1, "val": 0}


def test_a_val_that_stands_in_test_as_a_whole_is_said():
    view = toy_view(n=240, splits="given")
    rows = rows_of(view)
    view.digests[rows["val"]] = view.digests[rows["test"]]
    with pytest.raises(ProtocolError, match="--drop-leaks leaves no image in val: all 48 are"):
        used(view)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_head(leaky(), "linear", epochs=1, out=tmp_path_factory.mktemp("r") / "run").path


@pytest.mark.integration
@pytest.mark.parametrize(
    "changed",
    [
        *({"leaks": [{"kind": "image", "splits": ["train", "val"], "count": 1} | wrong]} for wrong in (
            {"kind": "\x1b[31m"}, {"splits": ["train", "\x1b"]}, {"count": "1"})),
        {"leaks": [7]}, {"leaks": {"a": 1}}, {"dropped": {"train": "\x1b", "val": 0}}, {"dropped": 3},
    ],
)  # fmt: skip
def test_a_run_with_a_made_up_record_of_leaks_is_refused(trained, tmp_path, changed):
    folder = shutil.copytree(trained, tmp_path / "run")
    reseal(folder, lambda config: config["splits"].update(changed))
    with pytest.raises(RunError, match="no proper splits"):
        load_run(folder)
