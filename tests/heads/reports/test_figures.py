"""Figures: their numbers beside scikit-learn's, and what of them comes onto a page."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.textpath import TextPath
from sklearn.metrics import confusion_matrix, roc_auc_score
from support.fake_view import label_view, toy_view

import heads
from heads.reports import drawing, figures, page, side_by_side
from heads.reports.drawing import Figure, Plot

EVIL = "</text><script>alert('$x_1$')</script>"


def train(view, out, **options):
    run = heads.train_head(view, "linear", epochs=2, out=out, controls=False, report=False, **options)
    return run, run.answers("test")


@pytest.mark.integration
def test_the_confusion_matrix_is_that_of_scikit_learn(tmp_path):
    run, answers = train(toy_view(n=400, classes=5, noise=3.0), tmp_path / "run")
    with (run.path / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    pairs = [(row["true class"], row["predicted class"]) for row in rows]
    expected = confusion_matrix(*zip(*pairs, strict=True), labels=run.classes)
    assert (figures.confusion_counts([(run, answers)]) == expected).all()
    pairs, off = figures.most_confused([(run, answers)]), expected - np.diag(np.diag(expected))
    assert pairs[0]["count"] == off.max() and len(pairs) == min(12, (off > 0).sum())


@pytest.mark.integration
def test_predictions_by_label_are_the_measured_counts(tmp_path):
    run, answers = train(label_view(n=300), tmp_path / "run")
    cells = [run.metrics["test"]["per_class"][name]["confusion"] for name in run.classes]
    expected = [[tp, fn, fp, tn] for (tn, fp), (fn, tp) in cells]
    assert figures.confusion_counts([(run, answers)]).tolist() == expected


@pytest.mark.integration
def test_folds_are_counted_together_and_seeds_averaged(tmp_path):
    view = toy_view(n=200, noise=4.0)
    runs = [train(view, tmp_path / f"{s}{f}", seed=s, folds=2, fold=f) for s in (0, 1) for f in (0, 1)]
    assert figures.confusion_counts(runs).sum() == sum(len(answers.y) for _, answers in runs[:2])


@pytest.mark.integration
def test_the_roc_curve_goes_through_the_points_of_scikit_learn(tmp_path):
    run, answers = train(toy_view(n=600, noise=6.0), tmp_path / "run")
    truth, score = figures.truth_and_score("binary", answers, 1)
    area = np.trapezoid(figures.roc_points(truth, score), figures.GRID)
    assert area == pytest.approx(roc_auc_score(truth, score), abs=0.01)
    keys = figures.curve_figure("roc", [(run, answers)]).keys
    assert keys[0] == ("s0", f"kind 1: AUROC {roc_auc_score(truth, score):.3f}")


def plotted(**options) -> str:
    plot = Plot("x", "y", **options)
    plot.line([(1, 1), (2, 4), (3, 9)], "s2")
    plot.dot(2, 4, "s1", "two: 4 <&>")
    return str(Figure("Squares <of> x", plot).svg())


def test_a_figure_has_a_name_marks_say_what_they_are_and_nothing_is_styled_inline():
    svg = plotted()
    assert 'role="img" aria-label="Squares &lt;of&gt; x"' in svg
    assert "<title>two: 4 &lt;&amp;&gt;</title>" in svg
    assert "style" not in svg and "font-family" not in svg and "<!" not in svg and "metadata" not in svg


def test_every_colour_of_a_figure_is_one_of_the_style_sheet():
    svg = plotted()
    used = set(re.findall(r'(?:fill|stroke)="([^"]*)"', svg)) - {"none"}
    assert {"var(--s1)", "var(--s2)", "var(--grid)", "var(--faint)"} <= used <= set(drawing.VARIABLES.values())
    sheet = (Path(drawing.__file__).parent / "templates" / "report.css").read_text()
    light = sheet[: sheet.index("@media")]
    for name, colour in drawing.COLOURS.items():
        assert f"--{name}: {colour};" in light


def test_two_figures_of_one_page_share_no_id():
    ids = [set(re.findall(r' id="([^"]+)"', plotted(xlog=log))) for log in (False, True)]
    assert all(ids) and not ids[0] & ids[1]
    svg = plotted()
    assert {f"#{name}" for name in ids[0]} == set(re.findall(r'href="([^"]+)"', svg))


def test_lines_go_through_their_points():
    svg = plotted(x=(0, 4), y=(0, 10))
    line = next(path for path in re.findall(r'<path[^>]*stroke="var\(--s2\)"[^>]*>', svg))
    path = re.findall(r"-?\d+(?:\.\d+)?", re.search(r' d="M([^"]*)"', line)[1])
    xs, ys = np.array(path, float).reshape(-1, 2).T
    assert np.diff(xs)[0] == pytest.approx(np.diff(xs)[1], abs=0.2)
    assert (ys[0] - ys[1]) / (ys[1] - ys[2]) == pytest.approx(3 / 5, abs=0.01)


@pytest.mark.parametrize(
    "low, high, log, expected",
    [(0.61, 0.98, False, ["0.7", "0.8", "0.9"]), (3, 4000, True, ["10", "100", "1,000"]), (2.5, 2.6, True, None)],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, log, expected):
    plot = Plot("x", "y", xlog=log)
    plot.line([(low, 0), (high, 1)])
    svg = str(Figure("ticks", plot).svg())
    shown = re.findall(r">([\d.,]+)</text>", svg)
    assert set(expected) <= set(shown) if expected else len(shown) > 3
    assert drawing.ticks(0.61, 0.98, 4) == pytest.approx([0.7, 0.8, 0.9])


@pytest.mark.integration
def test_a_run_shows_train_and_val_by_epoch_and_several_runs_share_axes(tmp_path):
    view = toy_view(n=200, noise=4.0)
    runs = [train(view, tmp_path / str(k), lr=lr)[0] for k, lr in enumerate((1e-3, 0.1))]
    titles = [figure.title for figure in figures.training_figures(runs[:1])]
    assert titles == ["Training: loss", "Training: accuracy", "Training: AUROC on val"]
    assert figures.training_figures(runs[:1])[-1].caption == "Chosen from epoch 2 on: before, the weights still move."
    assert "in the tables accuracy is at the threshold" in figures.training_figures(runs[:1])[1].caption
    stopping, _ = train(view, tmp_path / "stopping", patience=5)
    assert figures.training_figures([stopping])[-1].caption == ""
    both = side_by_side.overlaid_curves({"slow": runs[0], "quick": runs[1]}, "Loss", "loss", "loss")
    drawn = [list(line.get_ydata()) for line in both.plot.axes.lines]
    assert drawn == [[row[f"{s}_loss"] for row in run.history] for run in runs for s in ("train", "val")]
    assert both.keys == (("s0", "slow"), ("s1", "quick"))
    heads.report([run.path for run in runs], out=tmp_path / "page", images=False, resamples=50)
    page_text = (tmp_path / "page" / "report.html").read_text()
    assert "Training, side by side: loss" in page_text and "Training, side by side: val AUROC" in page_text


def svg_of_counts(monkeypatch, counts: np.ndarray, classes: tuple[str, ...]) -> str:
    monkeypatch.setattr(figures, "confusion_counts", lambda predictions: counts)
    run = SimpleNamespace(classes=classes, config={"splits": {}}, task="multiclass")
    return str(figures.counts_figure([(run, None)]).svg())


@pytest.mark.parametrize("name", ["AbdomenCT", "COVID-19 PNEUMONIA", EVIL, "肺炎", "\ud800\n"])
def test_the_name_of_a_class_is_text_that_fits_beside_the_confusion_matrix(name, monkeypatch):
    svg, shown = svg_of_counts(monkeypatch, np.eye(2), (name, "b")), drawing.short(name, 18)
    assert "<script" not in svg and svg.count("<text") == svg.count("</text>")
    (row, *_) = (t for t in re.findall(r"<text[^>]*>[^<]*", svg) if '"end"' in t)
    assert row.split(">", 1)[1].replace("&lt;", "<").replace("&gt;", ">") == shown
    if name.isascii():
        assert TextPath((0, 0), shown, size=10.5).get_extents().width < float(re.search(r' x="([\d.]+)"', row)[1])


@pytest.mark.parametrize(
    "names, shown",
    [
        ([f"Chest radiograph of a child {rest}" for rest in ("with pneumonia", "without any finding")],
         ["Chest rad…neumonia", "Chest rad… finding"]),
        ([f"{which} lung of a patient with one and the same finding" for which in ("left", "right")],
         ["left lung of a pa…", "right lung of a p…"]),
        ([f"{'x' * 30}{which}{'y' * 30}" for which in "ab"], ["x" * 16 + "…1", "x" * 16 + "…2"]),
        ([f"{'x' * 30}{which}{'y' * 12}" for which in "ab"], [f"…xxxx{which}{'y' * 12}" for which in "ab"]),
        (["a\n", "a\t", "b"], ["a·…1", "a·…2", "b"]),
    ],
)  # fmt: skip
def test_shortened_names_of_classes_stay_apart(names, shown, monkeypatch):
    assert drawing.distinct(names, 18) == shown
    svg = svg_of_counts(monkeypatch, np.eye(len(names)), tuple(names))
    assert set(shown) <= set(re.findall(r"<text[^>]*>([^<]*)", svg))
    keys = figures._draw_curves(figures.unit_square("x", "y"), {name: [figures.GRID] for name in names}, [])
    assert len({name for _, name in keys}) == len(names)


def test_shortened_names_of_many_classes_stay_apart():
    names = [f"{'x' * 30}{k:03}{'y' * 30}" for k in range(200)]
    assert len(set(drawing.distinct(names, 18))) == 200 and max(map(len, drawing.distinct(names, 18))) == 18


def test_a_large_matrix_is_few_elements(monkeypatch):
    assert svg_of_counts(monkeypatch, np.ones((200, 200)), tuple(f"c{i}" for i in range(200))).count("<path") < 20


def test_a_figure_that_stands_twice_on_a_page_has_ids_of_its_own():
    figure = '<svg viewBox="0" class="chart"><path id="0a1b2cm1" d="M0 0"/><use href="#0a1b2cm1"/></svg>'
    first, second = page._with_distinct_ids(f"{figure}<p>{figure}").split("<p>")
    assert first == figure
    assert second == figure.replace("0a1b2c", "0a1b2c-2-")
