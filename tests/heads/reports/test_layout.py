"""The layout of a report's page: what stands first, what is folded, what fits, and an image that a click enlarges."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from support.fake_view import label_view, toy_view
from support.pictures import untrained_view

import heads
from heads.api import ablate
from heads.evaluation.answer import answer_of
from heads.reports.page import _interval_strips

NAMES = ("mean-linear", "large", "attention")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The page of three heads on 60 X-ray-sized images, 300 pixels wide, and its text."""
    folder, rng = tmp_path_factory.mktemp("swept"), np.random.default_rng(0)
    for i in range(60):
        where = folder / "data" / ("train", "val", "test")[i % 3] / ("sick", "well")[i // 3 % 2]
        where.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (240, 300), dtype=np.uint8) // (1 + i // 3 % 2)
        Image.fromarray(pixels).save(where / f"{i}.png")
    ablate(untrained_view(folder / "data", folder), NAMES, epochs=3, seeds=2, out=folder / "runs", controls=True)
    path = heads.report(folder / "runs", resamples=50).path
    return path, path.read_text("utf-8")


def test_the_answer_stands_first_and_is_that_of_the_record(tmp_path):
    runs = [
        heads.train_head(toy_view(n=300, noise=4.0), head, epochs=2, out=tmp_path / head, report=False)
        for head in ("linear", "large")
    ]
    comparison = heads.compare(runs, resamples=50)
    record = comparison.record
    text = heads.report([run.path for run in runs], out=tmp_path / "page", resamples=50).path.read_text("utf-8")
    assert record["answer"] == answer_of(record)
    before, after = text[text.index("<h1>") :].split(f'<p class="answer">{record["answer"]}</p>')
    assert "<table" not in before and "<section" not in before and 'aria-label="Forest plot"' in after


def test_without_a_reference_it_is_the_head_that_val_puts_first(tmp_path):
    of = label_view(n=200)
    runs = [heads.train_head(of, "linear", epochs=n, out=tmp_path / str(n), report=False) for n in (1, 8)]
    record = heads.compare(runs, resamples=20).record
    best = max(record["families"], key=lambda family: family["val"]["auroc"])
    assert record["reference"] == best["name"] and best["difference"] is None
    assert heads.compare(runs[:1], resamples=20).record["reference"] is None


def test_every_head_is_folded_but_the_best_and_no_figure_stands_twice(swept):
    text = swept[1]
    heads_shown = re.findall(r'<details class="head"( open)?><summary><h3>(\d)', text)
    assert heads_shown == [(" open" if rank == 1 else "", str(rank)) for rank in range(1, 4)]
    best = text[text.index('<details class="head" open>') : text.index('<details class="head">')]
    together = text[text.index('id="compared"') : text.index('id="heads"')]
    titles = [re.findall(r'aria-label="([^"]*)" class="chart"', part) for part in (together, best)]
    assert titles[0][-3:] == ["ROC, side by side", "Training, side by side: loss", "Training, side by side: val AUROC"]
    assert titles[1] == ["Confusion matrix", "Precision and recall", "Reliability", "Training: accuracy"]


def test_intervals_have_one_scale_and_a_control_below_it_says_so():
    tests = [{"value": 0.9, "low": 0.8, "high": 1.0}, {"value": 0.95, "low": 0.9, "high": 1.0}, {"value": 0.5}]
    axis, (first, second, control) = _interval_strips(tests, 0.9, 1.0, [[{"value": 0.7, "words": "x", "grey": False}]])
    assert [words for _, words in axis] == ["0.7", "0.8", "0.9", "1"]
    places = {float(words): at for at, words in axis}
    assert (first["low"], first["value"], second["low"], second["high"]) == tuple(places[v] for v in (0.8, 0.9, 0.9, 1))
    assert first["published"][0]["at"] == places[0.7] and first["mark"] == places[0.9]
    assert control["below"] and not first["below"]


def test_controls_have_a_scale_of_their_own_where_nothing_has_an_interval():
    (_, strips) = _interval_strips([{"value": 0.5}, {"value": 0.9}], None, 1.0, [])
    assert not any(strip["below"] for strip in strips)


WIDE = """[...document.querySelectorAll('.board, .forest')].filter(
  t => t.getBoundingClientRect().right > innerWidth || t.scrollWidth > t.closest('section').clientWidth).length"""


@pytest.mark.parametrize("width", [1280, 1100, 768, 400])
def test_in_a_browser_leaderboard_and_forest_plot_fit(swept, opened, width):
    tab = opened(swept[0], width)
    assert tab.evaluate(WIDE) == 0
    assert tab.evaluate("document.querySelector('.scroll:has(.board)').scrollWidth") <= width
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


SIDEWAYS = """[...document.querySelectorAll('.scroll')].filter(
  s => s.scrollWidth > s.clientWidth + 1 && s.checkVisibility()).map(s => s.ariaLabel)"""


LONG = {
    ".board td.first": "linear on gap of shufflenet_v2_x0_5/chest at 100 %, lr 0.0005546, weight decay 1.34782e-06",
    ".forest td.words": "no difference shown: -0.208 [-0.375, -0.083], p 1 by Holm over 23",
}


@pytest.mark.parametrize("width", [1280, 768, 400])
def test_in_a_browser_long_names_make_no_table_scroll_and_leave_room_for_the_plot(swept, opened, width):
    tab = opened(swept[0], width)
    for cells, text in LONG.items():
        tab.evaluate(f"document.querySelectorAll('{cells}').forEach(td => td.textContent = '{text}')")
    assert tab.evaluate("document.querySelector('.forest td.plot').getBoundingClientRect().width") > 0.25 * width
    assert tab.evaluate(WIDE) == 0 and tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(SIDEWAYS) == []


BROKEN = """[...document.querySelectorAll('th, h2, h3, h4')].filter(e => e.checkVisibility()).flatMap(e => {
  const broken = [], texts = document.createTreeWalker(e, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let text; (text = texts.nextNode()); ) for (const word of text.data.matchAll(/[^\\s/-]+/g)) {
    range.setStart(text, word.index); range.setEnd(text, word.index + word[0].length);
    if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) broken.push(word[0]);
  }
  return broken;
})"""


@pytest.mark.parametrize("width", [1280, 768, 400, 320])
def test_in_a_browser_no_heading_breaks_inside_a_word(swept, opened, width):
    tab = opened(swept[0], width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate(BROKEN) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_what_heads_are_against_the_reference_is_seen(swept, opened, width):
    words = "[...document.querySelectorAll('.forest .words')].filter(e => e.checkVisibility()).map(e => e.innerText)"
    header, *rows = opened(swept[0], width).evaluate(words)
    assert header.startswith("against ") and sorted(rows)[-1] == "the reference" and len(rows) == len(NAMES)


def test_in_a_browser_of_a_phone_costs_stand_below_each_other(swept, opened):
    tab = opened(swept[0], 400)
    assert tab.evaluate("document.querySelector('.scroll:has(.costs)').scrollWidth") <= 354
    row = "[...document.querySelector('.costs tbody tr').cells].map(cell => cell.getBoundingClientRect().top)"
    assert len(set(tab.evaluate(row))) == 3  # the name, and two lines of numbers


def test_in_a_browser_of_1280_by_900_it_is_short(swept, opened):
    tab = opened(swept[0], 1280)
    assert tab.evaluate("document.documentElement.scrollHeight") <= 6 * 900


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_a_click_enlarges_an_image_with_its_map_and_control(swept, opened, width):
    tab = opened(swept[0], width)
    pair = tab.locator(".pair").first
    sides = """figure => [...figure.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"""
    before = pair.evaluate(sides)
    pair.click()
    assert len(before) == 3 and before[2] == 0 and min(pair.evaluate(sides)) >= 256
    tab.keyboard.press("Escape")
    assert pair.evaluate(sides) == before
    pair.focus()
    tab.keyboard.press("Enter")
    assert min(pair.evaluate(sides)) >= 256


def test_in_a_browser_a_link_to_a_folded_head_opens_it(swept, opened):
    tab = opened(swept[0])
    tab.locator(".board a").nth(2).click()
    assert tab.evaluate("document.querySelectorAll('details.head')[2].open")
