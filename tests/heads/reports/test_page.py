"""The page of a report: in a real browser, beside independent numbers, and with names that want to break out of it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import call
from support.fake_view import label_view, toy_view
from support.pictures import untrained_view

import heads
from featurecache import open_source
from featurecache.errors import BadOption, RunError
from featurecache.sources.pseudonyms import load_secret, pseudonymise
from heads.api import ablate
from heads.evaluation.comparison import compare
from heads.evaluation.families import families_of
from heads.reports import gallery, page
from heads.reports.gallery import ImageLoader
from heads.reports.text import how_made, lab_table

EVIL = "</script><img src=x onerror=alert(1)>"


def train(view, out, head="linear", **options):
    steps = {} if head == "ridge" else {"epochs": 2}
    return heads.train_head(view, head, out=out, **{"controls": False, **steps, **options})


def write(folder: Path, runs, *, images=True, hash_ids=False, **options):
    comparison = compare(families_of(runs), resamples=40, **options)
    folder.mkdir(exist_ok=True)
    written = page.write_report(folder, comparison.families, comparison, images=images, hash_ids=hash_ids)
    return written, comparison.record


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A real small cache: 80 coloured images in class folders, an untrained ViT, tokens and their mean."""
    folder = tmp_path_factory.mktemp("cached")
    rng = np.random.default_rng(0)
    for i in range(80):
        name, split = ("sick", "well")[i % 2], ("train", "train", "val", "test")[(i // 2) % 4]
        where = folder / "data" / split / name
        where.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (20, 30, 3), dtype=np.uint8)
        pixels[4:12, 4:12] += np.uint8(120 * (i % 2))
        Image.fromarray(pixels).save(where / f"{i}.png")
    return folder, untrained_view(folder / "data", folder / "cache", "cls,tokens,mean")


@pytest.fixture(scope="module")
def lab(cached, tmp_path_factory):
    """Five runs on it, one of them with controls, side by side in one page."""
    out = tmp_path_factory.mktemp("lab")
    options = [{"controls": True}, {"seed": 1}, {"head": "large"}, {"head": "mean-linear"}, {"fraction": 0.5}]
    runs = [train(cached[1], out / str(i), **each) for i, each in enumerate(options)]
    written, record = write(out / "page", runs, reference="large on tokens at 100 %", prevalence=0.1)
    return written, record, runs


def tags_of(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every element with its attributes; text of scripts and styles apart."""
    parser, tags = HTMLParser(), []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    return tags


def read(written) -> str:
    return written.path.read_text("utf-8")


def test_nothing_on_the_page_points_outside_it(lab):
    for tag, attributes in tags_of(read(lab[0])):
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert "style" not in attributes, "the policy allows no inline style"
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in read(lab[0]) and "url(" not in read(lab[0])


def test_the_policy_allows_no_request_and_only_the_pages_own_script(lab):
    text = read(lab[0])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "http" not in policy


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose classes, ids and label are HTML, scripts and templates."""
    folder, view = tmp_path_factory.mktemp("hostile"), toy_view(n=160, noise=4.0, label="<b>store</b>/{{ 7 * 7 }}")
    view.classes[:] = [EVIL, '"><svg onload=alert(1)>']
    view.ids = [f"<script>alert({i})</script><img src=https://example.org/{i}>\u202e.png" for i in range(160)]
    return write(folder / "page", [train(view, folder / "run")])[0]


def test_class_names_and_ids_that_are_html_stay_text(hostile):
    tags = tags_of(read(hostile))
    assert [tag for tag, _ in tags].count("script") == 1 and "img" not in dict(tags)
    assert not [a for _, a in tags if any(key.startswith("on") for key in a)]
    assert "{{ 7 * 7 }}" in read(hostile)


def test_no_id_is_written_where_ids_are_hashed(lab, tmp_path):
    written, _ = write(tmp_path / "page", lab[2], hash_ids=True)
    text = read(written)
    assert not [name for run in lab[2] for name in run.answers("test").ids if name in text]
    assert re.search(r'class="id">[0-9a-f]{32}<', text) and "--hash-ids" in text


def test_the_hash_of_an_id_is_that_of_an_extraction_with_hashed_ids(cached, tmp_path):
    source = open_source(str(cached[0] / "data"))
    shown, names = page.hashed(), pseudonymise(source, load_secret(), ids=True, groups=False).ids
    assert [shown(name) for name in source.ids[:5]] == names[:5]


def cells(text: str, table: str) -> list[list[str]]:
    """Values for sorting of a table of the page, row by row, by its name."""
    body = re.search(rf'<table class="[^"]*" aria-label="{re.escape(table)}">(.*?)</table>', text, re.S)[1]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S)
    return [re.findall(r'<td[^>]*data-v="([^"]*)"', row) for row in rows]


def test_the_leaderboard_holds_the_numbers_of_the_record_in_the_order_of_val(lab):
    text, record = read(lab[0]), lab[1]
    shown = [row for row in cells(text, "Leaderboard") if row and not row[0].replace(".", "").isdecimal()]
    ordered = sorted(record["families"], key=lambda f: (-f["val"]["auroc"], f["val"]["nll"]))
    assert [row[0] for row in shown] == [family["name"] for family in ordered]
    for row, family in zip(shown, ordered, strict=True):
        assert float(row[1]) == family["test"]["auroc"]["value"] and float(row[3]) == family["val"]["auroc"]


def test_a_spread_stands_behind_the_test_that_it_is_of_and_is_named_after_it(lab):
    text, record = read(lab[0]), lab[1]
    header = text[text.index('aria-label="Leaderboard"><thead>') :].split("</thead>")[0]
    names = re.findall(r"<th [^>]*>([^<]*)</th>", header)
    assert names[:4] == ["head", "test AUROC", "± AUROC over seeds", "val AUROC"]
    assert "  test AUROC  ± AUROC over seeds  " in re.sub(" {3,}", "  ", lab_table(record).splitlines()[0])
    shown = {row[0]: row[2] for row in cells(text, "Leaderboard") if row and not row[0].replace(".", "").isdecimal()}
    spreads = {f["name"]: (f["spread"]["seeds"] or {}).get("auroc") for f in record["families"]}
    assert shown == {name: "" if value is None else str(value) for name, value in spreads.items()}
    assert any(shown.values())


def test_the_line_about_intervals_counts_the_images_of_each_table():
    """Of `evaluate`: the own test and the other view beside it."""
    own, other = ({"auroc": {"method": method}} for method in ("cluster bootstrap", "bootstrap"))
    family = {"test": own, "external": [{"view": "there", "n": 1, "test": other}]}
    record = {"n_test": 200, "clusters": {"unit": "group", "n": 40}, "families": [family]}
    first = "on 40 groups (200 images): a stratified bootstrap of whole clusters]"
    assert how_made(record) == f"[95 % intervals {first}"
    there = "[95 % intervals of there on 1 image: a stratified bootstrap]"
    assert how_made(record, "there") == f"[95 % intervals of the own test {first}\n{there}"


def csv_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_metrics_csv_and_json_hold_the_same_numbers(lab):
    folder = lab[0].path.parent
    record = json.loads((folder / "metrics.json").read_text())
    assert {k: record[k] for k in lab[1]} == json.loads(json.dumps(lab[1]))
    assert set(record) - set(lab[1]) == {"check", "format", "files"}
    rows = {(r["family"], r["split"], r["metric"], r["of"]): r for r in csv_rows(folder / "metrics.csv")}
    for family in record["families"]:
        row, test = rows[family["name"], "test", "auroc", ""], family["test"]["auroc"]
        assert [float(row[key]) for key in ("value", "low", "high")] == [test["value"], test["low"], test["high"]]


def test_a_report_in_a_runs_own_folder_adds_intervals_to_its_files_and_leaves_it_a_run(tmp_path):
    view = toy_view(n=200, noise=4.0)
    view.classes[:] = ["=1+1", "'b"]
    before = train(view, tmp_path / "run", report=False)
    for _ in range(2):  # a second report changes nothing more
        _, record = write(tmp_path / "run", [heads.load_run(tmp_path / "run")])
    after = heads.load_run(tmp_path / "run")
    assert {k: v for k, v in after.metrics.items() if k != "comparison"} == before.metrics
    rows = csv_rows(tmp_path / "run" / "metrics.csv")
    row = next(r for r in rows if (r["split"], r["metric"], r["class"]) == ("test", "auroc", ""))
    assert float(row["low"]) == record["families"][0]["test"]["auroc"]["low"]
    assert {r["class"] for r in rows} == {"", "'=1+1", "'b"}


def pictures(runs, **options):
    shown = ImageLoader(str, **options).gallery([(runs[0], runs[0].answers("test"))])
    return shown, [picture for row in shown.rows.values() for picture in row]


def test_a_thumbnail_holds_the_pixels_of_its_image(lab, cached):
    for picture in pictures(lab[2])[1]:
        original = np.asarray(Image.open(cached[0] / "data" / picture.id))
        embedded = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.image.split(",")[1]))).convert("RGB"))
        assert (embedded == original).all()


def test_mistakes_are_mistakes_and_the_worst_come_first(tmp_path):
    run = train(toy_view(n=900, noise=8.0), tmp_path / "run")
    shown, _ = pictures([run])
    rows = {row["id"]: row for row in csv_rows(run.path / "predictions.csv") if row["split"] == "test"}
    missed = [r for r in rows.values() if r["true class"] == "kind 1" and r["predicted class"] == "kind 0"]
    expected = [r["id"] for r in sorted(missed, key=lambda r: float(r["p kind 1"]))][: gallery.ROW]
    assert [picture.id for picture in next(iter(shown.rows.values()))] == expected


def test_an_image_that_is_gone_or_changed_is_a_grey_box_that_says_why(lab, cached, tmp_path):
    moved = tmp_path / "data"
    shutil.copytree(cached[0] / "data", moved)
    run = heads.load_run(lab[2][0].path)
    run.config["view"]["source"] = {**run.config["view"]["source"], "data": str(moved)}
    _, whole = pictures([run])
    Image.new("RGB", (30, 20)).save(moved / whole[0].id)
    (moved / whole[1].id).unlink()
    shown, found = pictures([run])
    assert (found[0].image, found[0].why) == (None, "changed since it was computed with")
    assert (found[1].image, found[1].why) == (None, "no longer in the source")
    assert shown.images == len(found) - 2
    shutil.rmtree(moved)
    shown, found = pictures([run])
    assert shown.images == 0 and {picture.why for picture in found} == {"the source is gone"}


def test_the_page_says_how_many_images_it_embeds(lab, tmp_path):
    text = read(lab[0])
    plain = [a for tag, a in tags_of(text) if tag == "image" and "id" in a]
    assert lab[0].images == len(plain) > 0
    assert f"It embeds {len(plain)} images" in text
    written, _ = write(tmp_path / "page", lab[2], images=False)
    assert written.images == 0 and "data:image" not in read(written) and "It embeds no images" in read(written)


def test_the_command_writes_the_page_and_says_how_many_images_it_embeds(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("report", lab[2][0].path, "--out", "my page")
    assert done.exit_code == 0, done.output
    assert re.search(r"embeds \d+ images of the data", done.output)
    text = (tmp_path / "my page" / "report.html").read_text()
    assert "--out &#39;my page&#39;" in text
    done = call("report", lab[2][0].path, "--no-images", "--out", "other", "--json")
    assert json.loads(done.stdout)["images"] == 0


def test_a_folder_that_holds_other_things_is_not_written_into(lab, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    one, other, third = (run.path for run in lab[2][:3])
    for error, words, runs, out in (
        (BadOption, r"holds other files \(thesis.txt\)", one, tmp_path / "mine"),
        (BadOption, "holds other files", [one, other], third),
        (RunError, r"no config\.json", tmp_path / "mine", None),
        (BadOption, "needs a run folder or a sweep folder", [], None),
    ):
        with pytest.raises(error, match=words):
            heads.report(runs, out=out)


@pytest.mark.parametrize(
    "kind", ["multilabel", "ordinal", pytest.param("many", marks=pytest.mark.slow), "folds", "ridge"]
)
def test_every_kind_of_task_has_its_page(tmp_path, kind):
    views = {
        "multilabel": lambda: label_view(n=200), "ordinal": lambda: toy_view(classes=4, task="ordinal"),
        "many": lambda: toy_view(n=500, classes=33, noise=3.0), "ridge": lambda: toy_view(noise=4.0),
        "folds": lambda: toy_view(n=120),
    }  # fmt: skip
    folds = [{"folds": 2, "fold": k} for k in range(2)] if kind == "folds" else [{}]
    head = "ridge" if kind == "ridge" else "linear"
    runs = [train(views[kind](), tmp_path / str(i), head, **fold) for i, fold in enumerate(folds)]
    written, record = write(tmp_path / "page", runs)
    text = read(written)
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S) and ">nan" not in text.lower()
    assert len(text) < 400_000 and ("Path of solutions" in text) == (kind == "ridge")
    assert all(name in text for name in record["classes"])


def test_a_sweep_is_reported_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    view = toy_view(n=150, noise=4.0)
    ablate(view, "linear", lr="1e-3,1e-2", seeds=2, fractions="0.5,1", epochs=2, out="swept", controls=False)
    written = heads.report("swept", resamples=20, show_test="all")
    text = read(written)
    assert written.path == Path("swept/report.html") and "featurecache ablate --heads linear" in text
    assert "Learning curves" in text and "Test seen 8 times" in text
    assert len([row for row in cells(text, "Every head that was trained") if row]) == 8


def test_a_page_lists_every_command_that_made_its_sweep_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for head, lr in (("linear", 1e-3), ("mlp", 1e-2), ("linear", 1e-3)):
        ablate(toy_view(n=150, noise=4.0), head, lr=lr, epochs=1, out="swept", controls=False)
    text = read(heads.report("swept", resamples=20))
    made = [text.find(f"ablate --heads {head} ") for head in ("linear", "mlp")]
    assert 0 < made[0] < made[1] < text.find("featurecache report swept") and text.count("featurecache ablate") == 2


def test_sixty_families_are_one_table_of_which_three_are_shown_in_full(tmp_path):
    families = families_of([train(toy_view(n=120, noise=4.0), tmp_path / "run")]) * 60
    record = compare(families[:1], resamples=20).record
    copies = [{**record["families"][0], "name": f"head {i}"} for i in range(60)]
    text, _ = page.render(tmp_path, families, {**record, "families": copies}, ImageLoader(str))
    assert len([row for row in cells(text, "Leaderboard") if row]) == 60
    assert text.count("Worst mistakes and most confident correct") == 3 and text.count('<details class="head"') == 60
    assert len(text) < 2_000_000


def test_weights_that_were_never_trained_have_watermark_and_controls(lab, tmp_path):
    text = read(lab[0])
    assert '<body class="untrained">' in text and 'content: "untrained weights"' in text
    table = text[text.index('aria-label="Leaderboard"') :]
    assert table.index("majority class") < table.index("mean-linear")
    written, _ = write(tmp_path / "page", [train(toy_view(), tmp_path / "run")])
    assert '<body class="untrained">' not in read(written)


def test_parts_of_test_by_a_column_are_in_the_order_of_the_leaderboard(lab, tmp_path):
    families, record = families_of(lab[2]), lab[1]
    parts = [
        {"value": v, "n": 9, "family": f["name"], "test": f["test"]} for f in record["families"] for v in ("b", "")
    ]
    text, _ = page.render(tmp_path, families, {**record, "by": {"site <1>": parts}}, ImageLoader(str, images=False))
    ordered = sorted(record["families"], key=lambda f: (-f["val"]["auroc"], f["val"]["nll"]))
    body = text[text.index('<section id="by-1">') : text.index('<section id="heads">')]
    names = re.findall(r'<td class="first">([^<]*)</td><td class="words">([^<]*)</td>', body)
    assert names == [(value, f["name"]) for value in ("(not given)", "b") for f in ordered]
    assert "By site &lt;1&gt;" in text


def test_images_in_two_splits_are_the_first_warning(tmp_path):
    view = toy_view(n=200, splits="given")
    view.digests[list(view.splits).index("test")] = view.digests[0]
    written, _ = write(tmp_path / "page", [train(view, tmp_path / "run")])
    warned = read(written)[read(written).index('class="warnings"') :]
    assert "1 image stands in both train and test: these numbers may be too good." in warned[:400]


VALUES = """table => { const body = table.tBodies[table.tBodies.length - 1];
  return place => [...body.rows].map(({cells}) => cells[place].dataset.v ?? cells[place].textContent.trim()) }"""
SORT_ALL = f"""() => [...document.querySelectorAll('table.sortable')].flatMap((table, number) =>
  [...table.tHead.rows[0].cells].flatMap((head, place) => head.hasAttribute('data-fixed') ? [] : [0, 1].map(() => {{
    head.querySelector('button').click();
    return {{number, place, way: head.getAttribute('aria-sort'),
      marked: table.querySelectorAll('th[aria-sort]').length, values: ({VALUES})(table)(place)}};
  }})))"""


def in_order(values: list[str], down: bool) -> bool:
    there = [v for v in values if v not in ("", "–")]
    if values[: len(there)] != there:
        return False  # what is undefined stands last
    try:
        numbers = [float(v) for v in there]
    except ValueError:
        return True  # words: by the language of the browser
    return numbers == sorted(numbers, reverse=down)


def test_in_a_browser_every_column_of_every_table_sorts_both_ways(lab, opened):
    done = opened(lab[0].path).evaluate(SORT_ALL)
    assert len({one["number"] for one in done}) > 5
    for first, second in zip(done[::2], done[1::2], strict=True):
        assert {first["way"], second["way"]} == {"ascending", "descending"}
        for one in (first, second):
            assert one["marked"] == 1 and in_order(one["values"], one["way"] == "descending"), one


def test_in_a_browser_the_keyboard_sorts_and_controls_stay_on_top(lab, opened):
    tab = opened(lab[0].path)
    button = tab.locator("table.board thead th").nth(1).locator("button")
    button.focus()
    values = f"({VALUES})(document.querySelector('table.sortable'))(1)"
    before = tab.evaluate(values)
    tab.keyboard.press("Enter")
    tab.keyboard.press("Space")
    assert tab.locator("table.board thead th").nth(1).get_attribute("aria-sort") == "ascending"
    assert tab.evaluate(values) == sorted(before, key=float)
    assert tab.locator("table.board tbody").first.locator("tr.control").count() == 3


def test_in_a_browser_of_1240_pixels_no_open_table_scrolls_sideways(lab, opened):
    wide = "[...document.querySelectorAll('section > .scroll')].filter(s => s.scrollWidth > s.clientWidth)"
    assert opened(lab[0].path, 1240).evaluate(f"{wide}.map(s => s.ariaLabel)") == []


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_in_a_browser_of_400_pixels_the_page_does_not_scroll_sideways(lab, opened, colours):
    tab = opened(lab[0].path, 400, colours)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) is (colours == "dark")
    ink = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 384) is (colours == "dark")


def test_in_a_browser_it_prints(lab, opened, tmp_path):
    tab = opened(lab[0].path)
    tab.pdf(path=tmp_path / "report.pdf", format="A4")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 40
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_in_a_browser_hostile_names_run_nothing_and_are_readable(opened, hostile):
    tab = opened(hostile.path)
    assert EVIL in tab.locator("body").inner_text()
    assert tab.locator("img").count() == 0
