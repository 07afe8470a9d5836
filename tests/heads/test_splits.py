"""Splits: drawn, completed, given; units stay whole; what is wrong is said."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_view import FakeView, label_view, toy_view

from featurecache.errors import BadOption, ProtocolError
from heads.runs.run import option_words
from heads.settings import Settings
from heads.splits import choose_splits, class_counts, read_splits, splits_csv
from heads.stratify import connected_units, nested_fraction, stratified_parts
from heads.task import task_of


def split(view, **options):
    task = task_of(view)
    return choose_splits(view, task, Settings("linear", **options)), task


def counts(view, **options):
    chosen, task = split(view, **options)
    return class_counts(chosen.names, task)


def with_splits(words, labels, **more):
    view = toy_view(n=len(labels), splits=words, **more)
    view.labels = np.array(labels)
    return view


@pytest.mark.parametrize(
    ("words", "train", "val", "test"),
    [
        ([""] * 240, [84, 84], [18, 18], [18, 18]),
        (["train"] * 200, [70, 70], [15, 15], [15, 15]),
        (["train"] * 200 + ["val"] * 40, [85, 85], [20, 20], [15, 15]),
        (["train"] * 200 + ["test"] * 40, [85, 85], [15, 15], [20, 20]),
    ],
)
def test_what_is_not_given_is_15_percent_of_train_and_of_every_class_and_what_is_given_stays(words, train, val, test):
    view = with_splits(words, [0, 1] * (len(words) // 2))
    assert counts(view) == {"train": train, "val": val, "test": test}
    assert (split(view)[0].names[200:] == words[200:]).all() or words[0] == ""


def test_fractions_of_small_classes_add_up_over_classes():
    """100 classes of 2: 70/15/15 of each is 1.4/0.3/0.3; carried on, the totals are 140/30/30."""
    labels = np.repeat(np.arange(100), 2)
    parts = stratified_parts(labels, np.arange(200), np.array([0.7, 0.15, 0.15]), 0)
    assert np.bincount(parts).tolist() == [140, 30, 30]


def test_small_val_is_named_and_resplit_val_draws_it_anew():
    view = with_splits(["train"] * 200 + ["val"] * 16 + ["test"] * 20, [0, 1] * 118)
    chosen, _ = split(view)
    assert "val has 8 images of kind 0, 8 images of kind 1" in chosen.warnings[0]
    assert "--resplit-val" in chosen.warnings[0]
    again = counts(view, resplit_val=True)
    assert sum(again["val"]) in (32, 33)  # 15 % of 216
    assert again["test"] == [10, 10]


def test_the_split_seed_decides_and_another_gives_another():
    view = with_splits([""] * 300, [0, 1, 1] * 100)
    first, same, other = (split(view, split_seed=s)[0].names for s in (0, 0, 1))
    assert (first == same).all()
    assert (first != other).any()


def test_groups_and_copies_stay_together_directly_and_through_each_other():
    digests = np.array([b"a", b"a", b"b", b"c", b"d", b"e"])
    units = connected_units(digests, ["p1", "p2", "p2", "", "", "p3"])
    assert units[0] == units[1] == units[2]  # a copy joins patients p1 and p2
    assert len(set(units[2:])) == 4  # an empty group joins nothing


def test_without_groups_units_are_numbered_as_with_groups_of_one_row():
    digests = np.array([b"c", b"a", b"c", b"b", b"a", b"d"])
    alone = connected_units(digests, None)
    assert alone.tolist() == connected_units(digests, [""] * 6).tolist() == [0, 1, 0, 2, 1, 3]
    assert alone.tolist() == connected_units(digests, ["c", "a", "c", "b", "a", "d"]).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_no_group_is_ever_divided(seed, classes):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 60, 300)
    parts = stratified_parts(rng.integers(0, classes, 300), groups, np.array([0.7, 0.15, 0.15]), seed)
    assert all(len(set(parts[groups == g])) == 1 for g in set(groups))
    assert abs((parts == 0).mean() - 0.7) < 0.06


def test_multilabel_is_stratified_by_every_label():
    view = label_view(n=1000, labels=5, unknown=0.1)
    view.labels[:, 4] = np.nan
    view.labels[:20, 4] = 1  # a rare label
    have = counts(view)
    share = np.array([have[s] for s in ("train", "val", "test")]) / np.sum([have[s] for s in have], axis=0)
    np.testing.assert_allclose(share[:, :4], np.repeat([[0.7], [0.15], [0.15]], 4, axis=1), atol=0.02)
    assert have["val"][4] == have["test"][4] == 3


def test_rows_without_label_or_split_are_left_out_and_counted():
    view = with_splits(["train", "val", "test", ""] * 60, [0, 0, 0, 0, 1, 1, 1, 1] * 30)
    view.labels[:8] = -1
    chosen, _ = split(view)
    unlabelled, unsplit = "8 images carry no label", "60 images have no split in the data"
    assert {f"{which} and are left out" for which in (unlabelled, unsplit)} <= {*chosen.warnings}
    assert (chosen.names[:8] == "").all()


@pytest.mark.parametrize("words", [[""] * 200, (["train"] * 12 + ["val"] * 4 + ["test"] * 4) * 10])
def test_augmented_copies_are_not_used_unless_asked(words):
    view = with_splits(words, [0, 1, 1, 0] * 50)
    view.versions = np.array([0, 0, 1, 2] * 50, dtype=np.int32)
    assert (split(view)[0].names[view.versions > 0] == "").all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")), unique=True))
def test_any_id_survives_the_splits_file(tmp_path_factory, ids):
    file = tmp_path_factory.mktemp("s") / "splits.csv"
    names = np.array([("train", "val", "test", "")[i % 4] for i in range(len(ids))], dtype="<U5")
    file.write_bytes(splits_csv(ids, names).encode())
    assert (read_splits(file, ids, []) == names).all()


def test_a_splits_file_that_excel_has_saved_is_read(tmp_path):
    (tmp_path / "s.csv").write_text("\ufeffid;split\r\na;train\r\n\r\nb;test\r\n", "utf-8")
    assert read_splits(tmp_path / "s.csv", ["b", "a"], []).tolist() == ["test", "train"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no row for 240 of 240 images"),
        ("id,split\nimg/0000.png,train\n", "no row for 239 of 240 images"),
        ("id,split\nimg/0000.png,train\nimg/0000.png,test\n", "puts img/0000.png into"),
        ("id,split\nimg/0000.png,training\n", "'training' is none of train, val, test"),
        ("name,split\nimg/0000.png,train\n", "needs the columns id and split"),
        ("\x80\udcff\x00", "not a CSV file"),
        (None, "no such file"),
    ],
)
def test_a_bad_splits_file_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "s.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadOption, match=said):
        split(toy_view(n=240), splits=str(tmp_path / "s.csv"))


@pytest.mark.parametrize(
    ("view", "options", "said"),
    [
        (toy_view(), {"splits": "s.csv", "resplit_val": True}, "Give one of them"),
        (toy_view(), {"fold": 0, "folds": 5, "resplit_val": True}, "leave --resplit-val out"),
        (label_view(), {"train_per_class": 5}, "not for multi-label"),
        (with_splits(["train"] * 2 + ["test"] * 4, [0, 1] * 3), {}, "too few separate images"),
        (with_splits(["val", "test"] * 20, [0, 1] * 20), {}, "none to train on"),
        (toy_view(), {"splits": "without_test.csv"}, "No image of this task is in test"),
        (with_splits(["train"] * 20 + ["val", "test"] * 20, [0] * 20 + [0, 0, 1, 1] * 10), {}, "of kind 0 only"),
        (toy_view(n=40, groups=["a", "b"] * 20), {"fold": 0, "folds": 5}, r"images or groups \(2\) for 5 folds"),
    ],
)
def test_what_cannot_be_divided_says_why(here, view, options, said):
    Path("without_test.csv").write_text(splits_csv(toy_view().ids, np.array(["train", "train", "val", "val"] * 60)))
    with pytest.raises((BadOption, ProtocolError), match=said):
        split(view, **options)


def test_a_class_that_train_lacks_is_named():
    view = toy_view(n=240, classes=3, splits="given")
    view.labels[[i for i in range(240) if view.splits[i] == "train" and view.labels[i] == 2]] = 0
    assert "train has no image of kind 2: no head can learn it" in split(view)[0].warnings


def test_tasks_of_one_view_share_their_test_images():
    view = toy_view(n=300, classes=3)
    whole = choose_splits(view, task_of(view), Settings("linear"))
    two = choose_splits(view, task_of(view, only=["kind 1,kind 2"]), Settings("linear"))
    inside = view.labels > 0
    assert (two.names[inside] == whole.names[inside]).all()
    assert (two.names[~inside] == "").all()


def test_train_per_class_keeps_that_many_of_each_and_drops_the_rest():
    view = with_splits([""] * 300, [0] * 200 + [1] * 100)
    chosen, task = split(view, train_per_class=50)
    assert class_counts(chosen.names, task) == {"train": [50, 50], "val": [30, 15], "test": [30, 15]}
    assert counts(view, train_per_class=100)["train"] == [100, 70]
    assert any("fewer than --train-per-class 100" in w for w in split(view, train_per_class=100)[0].warnings)


def three_kinds(**more) -> FakeView:
    view = toy_view(n=300, classes=3, **more)
    view.classes = ["bacteria", "normal", "virus"]
    return view


def test_classes_are_merged_in_the_order_given():
    task = task_of(three_kinds(), classes=["pneumonia=bacteria,virus", "normal"])
    assert (task.kind, task.classes, task.positive) == ("binary", ("pneumonia", "normal"), 1)
    assert task.labels[:3].tolist() == [0, 1, 0]


def test_only_keeps_some_classes_in_the_order_of_the_data():
    task = task_of(three_kinds(), only=["virus,bacteria"], positive="bacteria")
    assert (task.classes, task.positive, task.labels[:3].tolist()) == (("bacteria", "virus"), 0, [0, -1, 1])


def test_only_chooses_labels_of_multilabel_data():
    view = label_view(labels=4)
    task = task_of(view, only=["sign 1", "sign 3"])
    np.testing.assert_array_equal(task.labels, view.labels[:, [1, 3]])


def test_neighbouring_grades_stay_ordinal_and_others_do_not():
    view = toy_view(n=300, classes=5, task="ordinal")
    assert task_of(view, classes=["low=kind 0,kind 1", "mid=kind 2", "high=kind 3,kind 4"]).kind == "ordinal"
    assert task_of(view, classes=["a=kind 0,kind 4", "b=kind 1", "c=kind 2"]).kind == "multiclass"


def test_a_class_name_with_comma_or_equals_sign_is_taken_whole():
    view = three_kinds()
    view.classes = ["a,b", "c=d", "e"]
    assert task_of(view, classes=["a,b", "c=d"]).classes == ("a,b", "c=d")
    assert task_of(view, only=["a,b", "e"]).classes == ("a,b", "e")


@pytest.mark.parametrize("only", [["mass, benign", "it's=ok"], ['it\'s=ok,"mass, benign"'], ["kind\n0", "it's=ok"]])
def test_classes_with_commas_equals_signs_and_quotes_are_taken_again_from_what_is_printed(only):
    view = three_kinds()
    view.classes = ["mass, benign", "it's=ok", "kind\n0"]
    printed = option_words(Settings.of("linear", only=only).to_dict())
    again = Settings.of("linear", only=printed[1])
    assert printed[::2] == ["--only"] and len(task_of(view, only=only).classes) == 2
    assert task_of(view, only=again.only).classes == task_of(view, only=only).classes


def test_classes_with_commas_and_equals_signs_can_be_merged():
    view = three_kinds()
    view.classes = ["mass, benign", "it's=ok", "virus"]
    assert task_of(view, classes=['fine="mass, benign",it\'s=ok', "virus"]).classes == ("fine", "virus")
    with pytest.raises(BadOption, match=r"--classes a=b=virus \(NAME ends at the first =\): no class .* 'b=virus'"):
        task_of(view, classes=["a=b=virus", "it's=ok"])
    with pytest.raises(BadOption, match=r"no class is called 'mass'.* The classes are \"mass, benign\", it"):
        task_of(view, only=["mass, benign,virus"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ["bacterium,virus"]}, "no class is called 'bacterium'. Near: bacteria"),
        ({"classes": ["p=bacteria,virus", "q=virus,normal"]}, "puts virus into p and into q"),
        ({"classes": ["p=bacteria", "p=virus"]}, "names p twice"),
        ({"classes": ["normal", "virus"], "only": ["virus"]}, "either it or --only"),
        ({"only": ["virus"]}, "one class for this task"),
        ({"only": [""]}, "no class is called ''"),
        ({"only": ["vir\nus"]}, "no class is called 'vir.*nus'"),
        ({"positive": "virus"}, "--positive is for two classes"),
        ({"only": ["virus,normal"], "positive": "bacteria"}, "is not a class of this task"),
        ({"view": toy_view(task="unlabelled")}, "carries no labels"),
        ({"view": label_view(), "classes": ["a=sign 0"]}, "multi-label data have --only"),
        ({"view": label_view(), "positive": "sign 0"}, "has its own positives"),
    ],
)
def test_task_options_that_do_not_fit_are_refused(options, said):
    options = {"view": three_kinds(), **options}
    with pytest.raises((BadOption, ProtocolError), match=said):
        task_of(options.pop("view"), **options)


def images(view, chosen, name):
    return {view.digests[i] for i in chosen.rows(name)}


@pytest.mark.parametrize("fold", [{}, {"fold": 1, "folds": 3}], ids=["whole", "fold"])
@pytest.mark.parametrize("make", [lambda: toy_view(n=400, classes=4), lambda: label_view(n=400)])
def test_a_smaller_fraction_is_among_a_larger_one_and_val_and_test_stay(make, fold):
    view = make()
    chosen = [split(view, fraction=f, **fold)[0] for f in (0.01, 0.05, 0.1, 0.33, 0.5, 1.0)]
    trained = [images(view, c, "train") for c in chosen]
    assert all(a <= b for a, b in itertools.pairwise(trained))
    assert [len(t) for t in trained] == sorted(len(t) for t in trained)
    assert all(len({frozenset(images(view, c, s)) for c in chosen}) == 1 for s in ("val", "test"))
    assert images(view, split(view, fraction=0.1, split_seed=1, **fold)[0], "train") != trained[2]


@given(
    st.lists(st.integers(0, 3), min_size=60, max_size=200), st.floats(0.02, 1.0), st.integers(0, 5), st.integers(1, 4)
)
@settings(max_examples=40, deadline=None)
def test_a_fraction_takes_its_share_of_every_class_within_a_unit(labels, fraction, seed, largest):
    labels = np.array(labels)
    units = np.random.default_rng(seed).integers(0, len(labels) // largest, len(labels)) + 1000 * labels  # of one class
    kept = nested_fraction(labels, units, fraction, seed)
    assert all(len(set(kept[units == u])) == 1 for u in np.unique(units))
    for c in np.unique(labels):
        biggest = np.bincount(units[labels == c]).max()
        assert kept[labels == c].any()
        assert abs(kept[labels == c].sum() - fraction * (labels == c).sum()) <= biggest


def test_a_fraction_of_many_classes_adds_up():
    labels = np.repeat(np.arange(100), 15)
    kept = nested_fraction(labels, np.arange(1500), 0.1, 0)
    assert kept.sum() == 150
    assert set(np.bincount(labels[kept])) == {1, 2}


def test_one_image_of_a_rare_class_stays_and_that_is_said():
    view = with_splits(["train"] * 208 + ["val"] * 20 + ["test"] * 20, [0] * 200 + [1] * 8 + [0, 1] * 20)
    chosen, task = split(view, fraction=0.05)
    assert class_counts(chosen.names, task)["train"] == [10, 1]
    assert "0.05 of train has one image of kind 1, whose share is less than half of one" in chosen.warnings
    assert chosen.how.endswith("5 % of train")


@pytest.mark.parametrize("options", [{"fraction": 0.3}, *({"fold": k, "folds": 3} for k in range(3))])
def test_groups_and_copies_stay_whole_in_fractions_and_folds(options):
    groups = [f"patient {i // 7}" for i in range(420)]
    view = toy_view(n=420, groups=groups, digests=np.array([f"{i - (i % 10 == 1):032x}".encode() for i in range(420)]))
    names, units = split(view, **options)[0].names, connected_units(view.digests, groups)
    assert all(len(set(names[units == unit].tolist())) == 1 for unit in np.unique(units))


@pytest.mark.parametrize("make", [lambda: toy_view(n=200, classes=3), lambda: label_view(n=200)])
def test_folds_part_all_that_is_no_given_test(make):
    view = make()
    folds = [split(view, fold=k, folds=5)[0] for k in range(5)]
    tested = [images(view, f, "test") for f in folds]
    assert set().union(*tested) == set(view.digests)
    assert sum(len(t) for t in tested) == 200
    assert all(38 <= len(t) <= 42 for t in tested)
    for chosen in folds:
        used = [images(view, chosen, s) for s in ("train", "val", "test")]
        assert sum(len(u) for u in used) == 200
        assert 22 <= len(used[1]) <= 26  # 15 % of 160
        assert "fold" in chosen.how


def test_folds_leave_a_given_test_out_and_draw_val_anew():
    view = toy_view(n=250, splits="given")
    given = {view.digests[i] for i, s in enumerate(view.splits) if s == "test"}
    folds = [split(view, fold=k, folds=4)[0] for k in range(4)]
    assert set().union(*(images(view, f, "test") for f in folds)) == set(view.digests) - given
    assert all(images(view, f, s).isdisjoint(given) for f in folds for s in ("train", "val", "test"))
    assert "the given test (50 images) is not touched" in folds[0].how
    counts = [class_counts(f.names, task_of(view)) for f in folds]
    assert {c["test"][0] for c in counts} == {25}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "(featurecache leaks vit-toy/toy; --drop-leaks"),
        (
            {"path": Path("else where/vit-toy/toy.h5")},
            "(featurecache leaks vit-toy/toy --cache 'else where'; --drop-leaks",
        ),
        ({"spec": {"kind": "pixels"}}, "(--drop-leaks"),
    ],
)
def test_the_command_that_lists_leaks_finds_the_view_that_leaks(change, words):
    view = toy_view(n=240, splits="given", **change)
    view.digests[view.splits.index("test")] = view.digests[view.splits.index("train")]
    assert [text for text in split(view)[0].warnings if words in text]
