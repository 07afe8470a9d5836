"""Families side by side: what is compared with what, by which method, and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as sk
from support.builders import CLS, add_shard, add_view, make_store
from support.fake_view import label_view, toy_view
from support.runs import train_head

from featurecache.errors import BadOption, RunError
from featurecache.store.store import open_store
from heads.evaluation.comparison import MeasureDifference, compare
from heads.evaluation.families import Family, collect_predictions, families_of, names_of
from heads.evaluation.operating_points import _ece_words
from heads.metrics import significance
from heads.reports import text as tables
from heads.runs.run import load_run


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
    assert [(len(f.runs), f.view, f.output, f.head, f.fraction) for f in families_of(runs)] == [
        (3, "vit-toy/toy", "cls", "linear", 1.0), (1, "vit-toy/toy", "cls", "linear", 1.0),
        (1, "vit-toy/toy", "tokens", "large", 1.0),
    ]  # fmt: skip
    names = [family["name"] for family in record(runs)["families"]]
    assert names == ["linear on cls, lr 0.03", "linear on cls, lr 0.1", "large on tokens"]


def test_the_record_goes_to_json_and_holds_what_reports_are_made_of():
    of = view(noise=2)
    made = record([run(of), run(of, "large")], reference="linear on cls", prevalence=0.1)
    json.dumps(made, allow_nan=False)
    facts = {"task": "binary", "positive": "kind 1", "reference": "linear on cls", "test_seen": None}
    assert made.items() >= facts.items() and made["measures"][:2] == ["auroc", "ap"]
    assert made["clusters"] == {"n": 80, "unit": "image", "few": False}
    first, second = made["families"]
    assert first["difference"] is None and set(second["difference"]) == set(made["measures"])
    assert set(first["calibration"]["after"]) == {"brier", "nll", "ece", "calibrated", "bins"}
    assert sum(b["n"] for b in first["calibration"]["before"]["bins"]) == 80
    assert first["operating"][0]["at_prevalence"]["prevalence"] == 0.1
    assert first["spread"] == {"seeds": None, "repeats": None, "folds": None}
    assert [row["chosen"] for row in made["rows"]] == [True, True]


def test_what_is_reported_is_what_the_run_measured():
    each = run(view())
    (family,) = record([each])["families"]
    for name, test in family["test"].items():
        assert test["value"] == pytest.approx(each.metrics["test"][name]), name
    assert family["val"]["auroc"] == each.metrics["val"]["auroc"]
    answers, before = each.answers("test"), family["calibration"]["before"]
    p = 1 / (1 + np.exp(-(answers.logits[:, 1] - answers.logits[:, 0])))
    expected = sk.log_loss(answers.y, p), sk.brier_score_loss(answers.y, p)
    assert (before["nll"], before["brier"]) == pytest.approx(expected)
    assert family["calibration"]["after"]["nll"] == pytest.approx(each.metrics["test"]["nll"])


def test_single_heads_without_clusters_have_exact_tests_beside_the_paired_bootstrap():
    of = view(noise=3)
    a, b = run(of), run(of, "large")
    made = record([a, b], reference=str(a.path))  # a folder names it too
    difference = made["families"][1]["difference"]
    assert made["reference"] == "linear on cls"
    (y, one), (_, two) = scores(a), scores(b)
    assert difference["auroc"]["p"] == pytest.approx(significance.delong(two, one, y == 1)[2])
    assert difference["auroc"]["method"] == "paired bootstrap, p by DeLong"
    right = [y == called(each) for each in (b, a)]
    assert difference["accuracy"]["p"] == pytest.approx(significance.mcnemar(*right))
    assert difference["sensitivity"]["p"] == pytest.approx(significance.mcnemar(*(each[y == 1] for each in right)))
    assert difference["nll"]["method"] == "paired bootstrap"
    assert difference["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, two) - sk.roc_auc_score(y, one))


def test_beside_the_calibration_error_stands_what_a_calibrated_head_would_show():
    each = run(view())
    made = record([each])
    (family,) = made["families"]
    after, words = family["calibration"]["after"], family["calibration"]["words"]
    low, high = after["calibrated"]["low"], after["calibrated"]["high"]
    would = f"a perfectly calibrated head of these probabilities would show {low:.3f} to {high:.3f} on 80 images"
    assert words == f"ECE {after['ece']:.3f}; {would}: no miscalibration is shown"
    assert 0 < low < after["ece"] < high and words in tables.final_table(each, made)
    assert all(0 <= b["low"] <= b["share"] <= b["high"] <= 1 for b in after["bins"])
    sharp = each.config["calibration"] | {"temperature": 0.02}
    off = replace(each, config=each.config | {"calibration": sharp})
    assert "off by more than chance" in record([off])["families"][0]["calibration"]["words"]


@pytest.mark.parametrize(
    "ece, numbers, reading",
    [
        (0.00142, ("0.0014", "0.0004 to 0.0012"), "its probabilities are off by more than chance"),
        (0.0012, ("0.001", "0.000 to 0.001"), "no miscalibration is shown"),
    ],
)
def test_a_calibration_error_has_the_digits_that_its_reading_needs(ece, numbers, reading):
    words = _ece_words({"ece": ece, "calibrated": {"low": 0.0004, "high": 0.0012}}, 80)
    assert words.startswith(f"ECE {numbers[0]}; ") and f"show {numbers[1]} on 80 images: {reading}" in words


CREEPING = {"epochs": 4, "lr": 1e-6, "select": "loss", "schedule": "constant"}


def limits(warnings):
    return [words for words in warnings if "at its limit" in words or "at their limit" in words]


def test_a_head_that_ended_at_its_limit_says_so_with_its_name_and_what_to_type():
    of = view()
    each = run(of, **CREEPING)
    limit = "linear on cls ended at its limit of 4 epochs while val still got better; --epochs 16 lets it go on"
    assert limits(record([each])["warnings"]) == [limit] and limit in tables.final_table(each)
    stopped = run(of, epochs=60, lr=0.3, patience=2, schedule="constant")
    assert limits(record([stopped])["warnings"]) == []
    falling = CREEPING | {"schedule": "cosine"}
    assert limits(record([run(of, **falling)])["warnings"]) == []  # better by less than what is shown
    assert limits(record([run(of, **falling | {"lr": 0.1})])["warnings"])  # its last epoch is visibly its best
    for schedule in ("cosine", "constant"):  # AUROC 1 in each epoch: a tie, but for the loss
        separated = run(toy_view(n=200, splits="given", noise=0.01), epochs=5, schedule=schedule)
        assert separated.config["chosen"]["epoch"] == 5 and limits(record([separated])["warnings"]) == []


def test_several_heads_that_ended_at_their_limit_are_one_sentence():
    of = view()
    creeping = [run(of, head, **CREEPING | more) for head, more in (("linear", {}), ("mlp", {"epochs": 6}))]
    made = record([*creeping, run(of, "linear", seed=1, **CREEPING)])
    limit = "linear on cls, mlp on cls ended at their limit of 4 or 6 epochs while val still got better"
    assert limits([*made["warnings"], *(w for f in made["families"] for w in f["warnings"])]) == [
        f"{limit}; --epochs 24 lets them go on"
    ]


def test_what_is_said_of_several_heads_is_said_once_with_their_names():
    of = toy_view(n=200, splits="given", noise=0.01)
    made = record([run(of, head, epochs=5) for head in ("linear", "mlp")])
    both = [words for words in made["warnings"] if words.startswith("linear on cls, mlp on cls: ")]
    assert any("val is separated without error" in words for words in both)
    assert not any("val is separated" in words for family in made["families"] for words in family["warnings"])
    (alone,) = record([run(of, "mlp", epochs=5, seed=1)])["families"]
    assert any(words.startswith("mlp on cls: val is separated") for words in alone["warnings"])


def difference(low, high, p_holm):
    return MeasureDifference("auroc", (low + high) / 2, low, high, 0.01, "paired bootstrap", p_holm, families=5).words


def test_where_interval_and_corrected_p_differ_it_is_said_which_decides():
    assert difference(0.01, 0.03, 0.04) == "better: +0.020 [+0.010, +0.030]"
    assert difference(-0.01, 0.03, 0.2) == "no difference shown: +0.010 [-0.010, +0.030]"
    assert difference(0.01, 0.03, 0.08) == "no difference shown: +0.020 [+0.010, +0.030], p 0.08 by Holm over 5"
    assert difference(-0.01, 0.09, 0.04) == "no difference shown: +0.040 [-0.010, +0.090], p 0.04 by Holm over 5"


def called(each):
    """[n]: the class that the run's own threshold calls."""
    _, score = scores(each)
    return np.where(1 / (1 + np.exp(-score)) >= each.calibration.thresholds[0], 1, 0)


def test_clusters_and_several_seeds_have_the_paired_bootstrap_alone():
    grouped, of = view(groups=[f"patient {i // 4}" for i in range(400)]), view()
    for runs, method in (
        ([run(grouped), run(grouped, "large")], "paired cluster bootstrap"),
        ([run(of), run(of, seed=1), run(of, "large")], "paired bootstrap"),
    ):
        made = record(runs, reference="linear on cls")
        assert made["families"][1]["difference"]["auroc"]["method"] == method
        assert made["clusters"]["unit"] == ("group" if "cluster" in method else "image")


def test_pairing_makes_a_difference_narrower_than_the_intervals_it_is_of():
    """Two seeds of one head are hard put by the same images."""
    of = view(n=600, noise=2)
    a, b = (Family("v", "cls", "linear", 1.0, (run(of, seed=s, lr=0.03, epochs=30),)) for s in (0, 1))
    _, second = compare([a, b], reference=names_of([a, b])[0], resamples=300).record["families"]
    width, paired = (each["high"] - each["low"] for each in (second["test"]["auroc"], second["difference"]["auroc"]))
    assert paired < 0.7 * width


def test_a_head_against_itself_shows_no_difference():
    each = run(view())
    twin = Family("w", "cls", "linear", 1.0, (each,))
    made = compare([*families_of([each]), twin], reference="linear on cls of vit-toy/toy", resamples=100).record
    for each in made["families"][1]["difference"].values():
        assert (each["value"], each["low"], each["high"], each["p_holm"]) == (0, 0, 0, 1)
        assert each["words"] == "no difference shown: 0.000 [0.000, 0.000]"


def test_images_in_another_order_are_compared_image_by_image():
    of, order = view(), np.random.default_rng(0).permutation(400)
    other = view(label="vit-two/toy")
    other.labels, other.digests = of.labels[order], of.digests[order]
    other.features = {name: x[order] for name, x in of.features.items()}
    other.splits, other.ids = [of.splits[i] for i in order], [of.ids[i] for i in order]
    a, b = run(of), run(other)
    one, two = (collect_predictions([(each, each.answers("test"))]).test_sets[0] for each in (a, b))
    assert one.key == two.key and (one.y == two.y).all()
    made = record([a, b], reference="linear on cls of vit-toy/toy")
    expected = sk.roc_auc_score(*scores(b)) - sk.roc_auc_score(*scores(a))
    assert made["warnings"] == limits(made["warnings"])
    assert made["families"][1]["difference"]["auroc"]["value"] == pytest.approx(expected)


def test_heads_tested_on_other_images_are_shown_and_not_compared():
    of = view(splits="drawn")
    made = record([run(of), run(of, "large", split_seed=1)], reference="linear on cls")
    assert made["families"][1]["difference"] is None
    for warning in ("not all of these were tested on the same images", "no difference is given"):
        assert any(warning in each for each in made["warnings"])


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
    assert (family["seeds"], family["repeats"], family["folds"], family["spread"]["folds"]) == (3, 2, None, None)
    assert "2 sets of test images" in family["test"]["auroc"]["method"]
    assert family["test"]["auroc"]["value"] == pytest.approx(values.mean())


def test_that_only_the_initialisation_varied_is_said():
    of = view()
    warning = record([run(of), run(of, seed=1)])["warnings"][0]
    assert warning.startswith("only the initialisation varied (2 seeds)")
    for runs in ([run(of), run(of, split_seed=1)], [run(of)]):
        assert (made := record(runs)["warnings"]) == limits(made)


def test_folds_have_the_corrected_t_for_values_and_differences():
    of = view(n=300)
    folds = [run(of, h, folds=3, fold=k) for h in ("linear", "large") for k in range(3)]
    made = record(folds, reference="linear on cls")
    first, second = made["families"]
    values = np.array([each.metrics["test"]["auroc"] for each in folds]).reshape(2, 3)
    images = [each.config["splits"]["images"] for each in folds[:3]]
    ratio = np.mean([i["test"] for i in images]) / np.mean([i["train"] for i in images])
    low, _, _ = significance.corrected_t(values[0], ratio)
    assert first["test"]["auroc"]["low"] == pytest.approx(max(low, 0))
    p = significance.corrected_t(values[1] - values[0], ratio)[2]
    assert second["difference"]["auroc"]["p"] == pytest.approx(p)
    assert first["folds"] == 3 and made["n_test"] == sum(i["test"] for i in images)


def test_fewer_than_20_clusters_are_said():
    few = view(n=300, groups=[f"patient {i // 30}" for i in range(300)], splits="drawn")
    made = record([run(few)])
    assert made["clusters"]["few"] and "independent groups: with fewer than 20" in made["warnings"][0]


def test_a_perfect_head_has_wilsons_width_and_a_word_about_the_rest():
    (family,) = record([run(toy_view(n=300, splits="given", noise=0.01), epochs=20)])["families"]
    assert family["test"]["accuracy"]["low"] == pytest.approx(significance.wilson(60, 60)[0])
    (word,) = (warning for warning in family["warnings"] if "no certainty" in warning)
    assert "AUROC" in word


def test_labels_beside_each_other_have_points_prevalences_and_measures_each():
    each = run(label_view())
    (family,) = record([each], prevalence={"sign 1": 0.05})["families"]
    points = [(point["class"], point["at_prevalence"] is None) for point in family["operating"]]
    assert points == [("sign 0", True), ("sign 1", False), ("sign 2", True), ("sign 3", True)]
    aurocs = {name: tests["auroc"]["value"] for name, tests in family["per_class"].items()}
    assert aurocs == pytest.approx({name: m["auroc"] for name, m in each.metrics["test"]["per_class"].items()})
    assert family["test"]["auroc"]["value"] == pytest.approx(np.mean(list(aurocs.values())))


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
    assert all(row["val"] for row in made["rows"]) and made["families"][0]["tried"] == 3
    if best in (0, 2):
        assert "est tried: a " in made["families"][0]["edges"][0]
    shown = compare([family], resamples=100, show_test="all").record
    assert shown["test_seen"] == 6 and all(row["test"] for row in shown["rows"])
    assert "TEST SEEN 6 TIMES" in tables.lab_table(shown) and "TEST SEEN" not in tables.lab_table(made)


def test_the_table_is_ordered_by_val_and_its_intervals_are_of_test():
    of = view(noise=2)
    made = record([run(of, lr=1e-5), run(of, "large"), run(of)], reference="large on tokens")
    lines = tables.lab_table(made).splitlines()
    order = sorted(made["families"], key=lambda f: (-f["val"]["auroc"], f["val"]["nll"]))
    assert all(line.startswith(f["name"]) for line, f in zip(lines[1:4], order, strict=True))
    best = order[0]["test"]["auroc"]
    assert f"{best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}]" in lines[1]
    assert "proportions by Wilson" in lines[4] and any("against large on tokens" in line for line in lines)


def tiny_view(tmp_path, **change):
    store = make_store(tmp_path / "cache")
    add_shard(store, range(120), CLS)
    return add_view(store, "set", range(120), [CLS], **change)


def test_measures_by_a_column_of_the_data(tmp_path):
    site = np.array(["north", "south", "south"])[(np.arange(120) // 6) % 3]
    of = tiny_view(tmp_path, meta={"site": site.tolist(), "age": np.arange(120)})
    each = run(of)
    answers = each.answers("test")
    for row, name in zip(record([each], by="site")["by"]["site"], ("north", "south"), strict=True):
        rows = np.array([site[of.ids.tolist().index(i)] == name for i in answers.ids])
        assert (row["family"], row["value"], row["n"]) == ("linear on cls", name, rows.sum())
        right = (called(each) == answers.y)[rows]
        assert row["test"]["accuracy"]["value"] == pytest.approx(right.mean())
        assert row["test"]["accuracy"]["low"] is not None
    with pytest.raises(BadOption, match="no such column; it has age, site"):
        record([each], by="sites")
    with pytest.raises(BadOption, match="40 different values"):
        record([each], by="age")


def test_a_column_of_a_view_that_is_gone_or_changed_is_an_error(tmp_path):
    of = tiny_view(tmp_path, meta={"site": ["a", "b"] * 60})
    each, store = run(of), open_store(of.store)
    add_shard(store, range(120, 240), CLS)
    add_view(store, "set", range(120, 240), [CLS], meta={"site": ["a", "b"] * 60})
    with pytest.raises(RunError, match="no longer holds 40 of the images"):
        record([load_run(each.path)], by="site")
    of.path.unlink()
    with pytest.raises(RunError, match="cannot be opened"):
        record([load_run(each.path)], by="site")


def test_a_setting_that_is_on_is_in_a_name_as_its_word():
    runs = [run(toy_view()), run(toy_view(), class_weights=True, balance=False)]
    assert names_of(families_of(runs))[1] == "linear on cls, no balance, class weights"


def test_a_name_at_the_beginning_of_a_warning_keeps_its_letters():
    name = "finetune:resnet18 at 32 px"
    record = {"families": [{"name": name}]}
    assert tables.sentence(f"{name}: f1 came out", record) == f"{name}: f1 came out."
    assert tables.sentence("no temperature!", record) == "No temperature!"
