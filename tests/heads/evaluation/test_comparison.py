"""Families side by side: what is compared with what, by which method, and what is said about it."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import sklearn.metrics as sk
from support.fake_view import label_view, toy_view

from featurecache.errors import BadOption, RunError
from featurecache.store.store import open_store
from heads.api import train_head
from heads.evaluation import comparison, families
from heads.evaluation.comparison import compare
from heads.evaluation.families import Family, families_of
from heads.metrics import significance
from heads.reports import text as tables
from heads.runs.run import load_run

train_head = partial(train_head, report=False)


def view(n=400, classes=2, **more):
    return toy_view(n=n, classes=classes, splits=more.pop("splits", "given"), noise=more.pop("noise", 4.0), **more)


def run(of, head="linear", **options):
    return train_head(of, head, epochs=options.pop("epochs", 2), **options)


def record(runs, **options):
    return compare(families_of(runs), resamples=options.pop("resamples", 300), **options).record


def scores(each):
    answers = each.answers("test")
    return answers.y, answers.calibrated_logits[:, 1] - answers.calibrated_logits[:, 0]


def test_runs_that_differ_in_seed_and_split_seed_only_are_a_family():
    of = view()
    runs = [run(of, seed=s) for s in (0, 1)] + [run(of, split_seed=1), run(of, lr=0.1), run(of, "large")]
    found = families_of(runs)
    assert [len(family.runs) for family in found] == [3, 1, 1]
    assert [(f.view, f.output, f.head, f.fraction) for f in found] == [
        ("vit-toy/toy", "cls", "linear", 1.0), ("vit-toy/toy", "cls", "linear", 1.0),
        ("vit-toy/toy", "tokens", "large", 1.0),
    ]  # fmt: skip
    names = [family["name"] for family in record(runs)["families"]]
    assert names == ["linear on cls, lr 0.001", "linear on cls, lr 0.1", "large on tokens"]


def test_the_record_goes_to_json_and_holds_what_reports_are_made_of():
    of = view(noise=2)
    made = record([run(of), run(of, "large")], reference="linear on cls", prevalence=0.1)
    json.dumps(made, allow_nan=False)
    assert made["measures"][:2] == ["auroc", "ap"]
    assert (made["task"], made["positive"], made["reference"], made["test_seen"]) == (
        "binary", "kind 1", "linear on cls", None)  # fmt: skip
    assert made["clusters"] == {"n": 80, "unit": "image", "few": False}
    first, second = made["families"]
    assert first["difference"] is None
    assert set(second["difference"]) == set(made["measures"])
    assert set(first["calibration"]["after"]) == {"brier", "nll", "ece", "bins"}
    assert sum(b["n"] for b in first["calibration"]["before"]["bins"]) == 80
    assert first["operating"][0]["at_prevalence"]["prevalence"] == 0.1
    assert first["spread"] == {"seeds": None, "repeats": None, "folds": None}
    assert [row["chosen"] for row in made["rows"]] == [True, True]


def test_what_is_reported_is_what_the_run_measured():
    each = run(view())
    (family,) = record([each])["families"]
    for name, found in family["test"].items():
        assert found["value"] == pytest.approx(each.metrics["test"][name]), name
    assert family["val"]["auroc"] == each.metrics["val"]["auroc"]
    answers, calibration = each.answers("test"), family["calibration"]
    p = 1 / (1 + np.exp(-(answers.logits[:, 1] - answers.logits[:, 0])))
    assert calibration["before"]["nll"] == pytest.approx(sk.log_loss(answers.y, p))
    assert calibration["before"]["brier"] == pytest.approx(sk.brier_score_loss(answers.y, p))
    assert calibration["after"]["nll"] == pytest.approx(each.metrics["test"]["nll"])


def test_single_heads_without_clusters_have_exact_tests_beside_the_paired_bootstrap():
    of = view(noise=3)
    a, b = run(of), run(of, "large")
    made = record([a, b], reference=str(a.path))  # a folder names it too
    found = made["families"][1]["difference"]
    assert made["reference"] == "linear on cls"
    (y, one), (_, two) = scores(a), scores(b)
    assert found["auroc"]["p"] == pytest.approx(significance.delong(two, one, y == 1)[2])
    assert found["auroc"]["method"] == "paired bootstrap, p by DeLong"
    calls = [(each.answers("test").y == np.where(_p(each) >= each.calibration.thresholds[0], 1, 0)) for each in (b, a)]
    assert found["accuracy"]["p"] == pytest.approx(significance.mcnemar(*calls))
    assert found["sensitivity"]["p"] == pytest.approx(significance.mcnemar(*(c[y == 1] for c in calls)))
    assert found["nll"]["method"] == "paired bootstrap"
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, two) - sk.roc_auc_score(y, one))


def _p(each):
    z = each.answers("test").calibrated_logits
    return 1 / (1 + np.exp(z[:, 0] - z[:, 1]))


def test_clusters_and_several_seeds_have_the_paired_bootstrap_alone():
    grouped = view(groups=[f"patient {i // 4}" for i in range(400)])
    seeds = view()
    for runs, words in (
        ([run(grouped), run(grouped, "large")], "paired cluster bootstrap"),
        ([run(seeds), run(seeds, seed=1), run(seeds, "large")], "paired bootstrap"),
    ):
        made = record(runs, reference="linear on cls")
        assert made["families"][1]["difference"]["auroc"]["method"] == words
    assert record([run(grouped)])["clusters"]["unit"] == "group"


def test_pairing_makes_a_difference_narrower_than_the_intervals_it_is_of():
    """Two seeds of one head are hard put by the same images."""
    of = view(n=600, noise=2)
    a, b = (Family("v", "cls", "linear", 1.0, (run(of, seed=s, lr=0.03, epochs=30),)) for s in (0, 1))
    made = compare([a, b], reference=comparison.names_of([a, b])[0], resamples=300).record
    _, second = made["families"]
    width = second["test"]["auroc"]["high"] - second["test"]["auroc"]["low"]
    paired = second["difference"]["auroc"]["high"] - second["difference"]["auroc"]["low"]
    assert paired < 0.7 * width


def test_a_head_against_itself_shows_no_difference():
    each = run(view())
    twin = Family("w", "cls", "linear", 1.0, (each,))
    made = compare([*families_of([each]), twin], reference="linear on cls of vit-toy/toy", resamples=100).record
    for found in made["families"][1]["difference"].values():
        assert (found["value"], found["low"], found["high"], found["p_holm"]) == (0, 0, 0, 1)
        assert found["words"] == "no difference shown: +0.000 [+0.000, +0.000]"


def test_images_in_another_order_are_compared_image_by_image():
    of = view()
    order = np.random.default_rng(0).permutation(400)
    other = view()
    other.labels, other.digests = of.labels[order], of.digests[order]
    other.features = {name: x[order] for name, x in of.features.items()}
    other.splits, other.ids, other.label = [of.splits[i] for i in order], [of.ids[i] for i in order], "vit-two/toy"
    a, b = run(of), run(other)
    found = (
        families.test_predictions(families_of([a])[0]).test_sets[0],
        families.test_predictions(families_of([b])[0]).test_sets[0],
    )
    assert found[0].key == found[1].key
    assert (found[0].y == found[1].y).all()
    made = record([a, b], reference="linear on cls of vit-toy/toy")
    assert made["warnings"] == []
    assert made["families"][1]["difference"]["auroc"]["value"] == pytest.approx(
        sk.roc_auc_score(*scores(b)) - sk.roc_auc_score(*scores(a))
    )


def test_heads_tested_on_other_images_are_shown_and_not_compared():
    of = view(splits="drawn")
    made = record([run(of), run(of, "large", split_seed=1)], reference="linear on cls")
    assert made["families"][1]["difference"] is None
    assert any("not all of these were tested on the same images" in words for words in made["warnings"])
    assert any("no difference is given" in words for words in made["warnings"])


def test_runs_of_other_questions_are_refused():
    with pytest.raises(BadOption, match=r"do not answer the same question: binary of kind 0, kind 1.*multiclass"):
        record([run(view()), run(view(classes=3))])
    of = view()
    with pytest.raises(BadOption, match=r"positive: kind 1.*positive: kind 0"):
        record([run(of), run(of, positive="kind 0")])


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (2, {"reference": "linear"}, "none of what is compared: linear on cls. Near"),
        (2, {"prevalence": 1.5}, "above 0 and below 1"),
        (2, {"prevalence": {"kind 0": 0.1}}, "the positives of this task are kind 1"),
        (2, {"show_test": "some"}, '"chosen" or "all"'),
        (3, {"prevalence": 0.1}, "a multiclass task has none"),
        (0, {}, "nothing to compare"),
    ],
)
def test_mistaken_options(classes, options, words):
    runs = [run(view(classes=classes))] if classes else []
    with pytest.raises(BadOption, match=words):
        record(runs, **options)


def test_spreads_are_named_for_what_varied():
    of = view(splits="drawn")
    runs = [run(of, seed=s, split_seed=r) for r in (0, 1) for s in (0, 1, 2)]
    (family,) = record(runs)["families"]
    values = np.array([each.metrics["test"]["auroc"] for each in runs]).reshape(2, 3)
    assert family["spread"]["seeds"]["auroc"] == pytest.approx(np.sqrt(values.var(axis=1, ddof=1).mean()))
    assert family["spread"]["repeats"]["auroc"] == pytest.approx(values.mean(axis=1).std(ddof=1))
    assert family["spread"]["folds"] is None
    assert (family["seeds"], family["repeats"], family["folds"]) == (3, 2, None)
    assert "2 sets of test images" in family["test"]["auroc"]["method"]
    assert family["test"]["auroc"]["value"] == pytest.approx(values.mean())


def test_that_only_the_initialisation_varied_is_said():
    of = view()
    words = "only the initialisation varied (2 seeds)"
    assert any(words in each for each in record([run(of), run(of, seed=1)])["warnings"])
    assert record([run(of), run(of, split_seed=1)])["warnings"] == []
    assert record([run(of)])["warnings"] == []


def test_folds_have_the_corrected_t_for_values_and_differences():
    of = view(n=300)
    folds = [run(of, h, folds=3, fold=k) for h in ("linear", "large") for k in range(3)]
    made = record(folds, reference="linear on cls")
    first, second = made["families"]
    values = np.array([each.metrics["test"]["auroc"] for each in folds]).reshape(2, 3)
    images = [each.config["splits"]["images"] for each in folds[:3]]
    ratio = np.mean([i["test"] for i in images]) / np.mean([i["train"] for i in images])
    low, _, _ = significance.corrected_t(values[0], ratio)
    assert first["test"]["auroc"]["value"] == pytest.approx(values[0].mean())
    assert first["test"]["auroc"]["low"] == pytest.approx(max(low, 0))
    p = significance.corrected_t(values[1] - values[0], ratio)[2]
    assert second["difference"]["auroc"]["p"] == pytest.approx(p)
    assert first["folds"] == 3
    assert made["n_test"] == sum(i["test"] for i in images)


def test_fewer_than_20_clusters_are_said():
    few = view(n=300, groups=[f"patient {i // 30}" for i in range(300)], splits="drawn")
    made = record([run(few)])
    assert made["clusters"]["few"]
    assert any("independent groups: with fewer than 20" in words for words in made["warnings"])


def test_a_perfect_head_has_wilsons_width_and_a_word_about_the_rest():
    made = record([run(toy_view(n=300, splits="given", noise=0.01), epochs=20)])
    (family,) = made["families"]
    assert family["test"]["accuracy"]["low"] == pytest.approx(significance.wilson(60, 60)[0])
    assert "AUROC" in family["warnings"][0]
    assert "no certainty" in family["warnings"][0]


def test_labels_beside_each_other_have_points_prevalences_and_measures_each():
    made = record([run(label_view())], prevalence={"sign 1": 0.05})
    (family,) = made["families"]
    assert [point["class"] for point in family["operating"]] == [f"sign {c}" for c in range(4)]
    assert [point["at_prevalence"] is None for point in family["operating"]] == [True, False, True, True]
    each = run(label_view())
    for name, found in family["per_class"].items():
        assert found["auroc"]["value"] == pytest.approx(each.metrics["test"]["per_class"][name]["auroc"])
    mean = np.mean([found["auroc"]["value"] for found in family["per_class"].values()])
    assert family["test"]["auroc"]["value"] == pytest.approx(mean)


def test_a_wanted_sensitivity_and_what_it_reached_are_shown():
    (family,) = record([run(view(noise=6), sensitivity=0.9)])["families"]
    (point,) = family["operating"]
    assert point["wanted"] == 0.9
    assert point["sensitivity"]["low"] < point["sensitivity"]["value"] <= point["sensitivity"]["high"]


def rows_of(runs):
    """As a sweep keeps them."""
    family = {"view": "v", "output": "cls", "head": "linear", "fraction": 1.0, "repeat": 0, "fold": None}
    return [family | {"settings": r.config["settings"]} | {s: r.metrics[s] for s in ("val", "test")} for r in runs]


def test_of_a_sweep_test_is_shown_for_the_chosen_setting_only_unless_asked():
    of = view()
    runs = [run(of, lr=lr, seed=s) for lr in (1e-5, 1e-3, 1e-1) for s in (0, 1)]
    best = max(range(3), key=lambda k: np.mean([r.metrics["val"]["auroc"] for r in runs[2 * k : 2 * k + 2]]))
    family = Family("v", "cls", "linear", 1.0, tuple(runs[2 * best : 2 * best + 2]), tuple(rows_of(runs)))
    made = compare([family], resamples=100).record
    assert [row["test"] is not None for row in made["rows"]] == [k // 2 == best for k in range(6)]
    assert all(row["val"] for row in made["rows"])
    assert made["families"][0]["tried"] == 3
    if best in (0, 2):
        assert "est tried: a " in made["families"][0]["edges"][0]
    shown = compare([family], resamples=100, show_test="all").record
    assert shown["test_seen"] == 6
    assert all(row["test"] for row in shown["rows"])
    assert "TEST SEEN 6 TIMES" in tables.lab_table(shown)
    assert "TEST SEEN" not in tables.lab_table(made)


def test_the_table_is_ordered_by_val_and_its_intervals_are_of_test():
    of = view(noise=2)
    made = record([run(of, lr=1e-5), run(of, "large"), run(of)], reference="large on tokens")
    text = tables.lab_table(made)
    lines = text.splitlines()
    order = sorted(made["families"], key=lambda f: (-f["val"]["auroc"], f["val"]["nll"]))
    assert [line.startswith(f["name"]) for line, f in zip(lines[1:4], order, strict=True)] == [True] * 3
    best = order[0]["test"]["auroc"]
    assert f"{best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}]" in lines[1]
    assert "proportions by Wilson" in lines[4]
    assert "against large on tokens" in text


def tiny_view(tmp_path, **change):
    from support.builders import CLS, add_shard, add_view, make_store

    store = make_store(tmp_path / "cache")
    add_shard(store, range(120), CLS)
    return add_view(store, "set", range(120), [CLS], **change)


def test_measures_by_a_column_of_the_data(tmp_path):
    site = np.array(["north", "south", "south"])[(np.arange(120) // 6) % 3]
    of = tiny_view(tmp_path, meta={"site": site.tolist(), "age": np.arange(120)})
    each = run(of)
    found = record([each], by="site")["by"]["site"]
    answers = each.answers("test")
    for row, name in zip(found, ("north", "south"), strict=True):
        rows = np.array([site[of.ids.index(i)] == name for i in answers.ids])
        assert (row["family"], row["value"], row["n"]) == ("linear on cls", name, rows.sum())
        called = np.where(_p(each)[rows] >= each.calibration.thresholds[0], 1, 0)
        assert row["test"]["accuracy"]["value"] == pytest.approx((called == answers.y[rows]).mean())
        assert row["test"]["accuracy"]["low"] is not None
    with pytest.raises(BadOption, match="no such column; it has age, site"):
        record([each], by="sites")
    with pytest.raises(BadOption, match="40 different values"):
        record([each], by="age")


def test_a_column_of_a_view_that_is_gone_or_changed_is_an_error(tmp_path):
    from support.builders import CLS, add_shard, add_view

    of = tiny_view(tmp_path, meta={"site": ["a", "b"] * 60})
    each = run(of)
    store = open_store(of.store)
    add_shard(store, range(120, 240), CLS)
    add_view(store, "set", range(120, 240), [CLS], meta={"site": ["a", "b"] * 60})
    with pytest.raises(RunError, match="no longer holds 40 of the images"):
        record([load_run(each.path)], by="site")
    of.path.unlink()
    with pytest.raises(RunError, match="cannot be opened"):
        record([load_run(each.path)], by="site")


def test_a_setting_that_is_on_is_in_a_name_as_its_word(tmp_path):
    options = {"epochs": 1, "controls": False}
    plain = train_head(toy_view(), "linear", out=tmp_path / "a", **options)
    weighted = train_head(toy_view(), "linear", out=tmp_path / "b", class_weights=True, balance=False, **options)
    _, name = comparison.names_of(families_of([plain, weighted]))
    assert name == "linear on cls, no balance, class weights"
