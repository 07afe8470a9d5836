"""A small study run for real: stopped and gone on with, refused where it does not fit, and its page in a browser."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import call
from support.small_sets import listed

from featurecache import open_view
from featurecache.errors import BadOption, CannotWrite, RunError, StepFailed, Stopped
from heads import api
from heads.reports.provenance import origins, sweep_commands, train_command
from heads.runs.folder import write_record
from heads.studies import runner
from heads.studies.page import format_published, grey_reasons
from heads.studies.plan import StudyOptions
from heads.studies.spec import Extract, Heads, ImageSet, Network, PublishedNumber, Question, Study
from heads.studies.tables import overview_of
from heads.sweeps.journal import _checked_line, read_journal
from heads.training.loop import Checkpoint

EVIL = "</script><img src=x onerror=alert(1)>"
SMALL = Study(
    name="small", title="Is it small?", question="is it small?", source="a book", about=("It is about that.",),
    images=(ImageSet("set", "kaggle:nobody/nothing", ("one", "two")),),
    questions=(
        Question("part", "One or two", "set", select="accuracy", reference="cnn", note="In words: small.",
             published=(
                 PublishedNumber("head", "accuracy", 0.875, "heads", "linear on cls"),
                 PublishedNumber("network", "accuracy", 0.5, "cnn", split="val", remark="of 8"),
                 PublishedNumber("network", "parameters", 174_738, "cnn"),
                 PublishedNumber("another", "auroc", 0.9, source="another book"),
             )),
    ),
    steps=(
        Extract("features", "set", "vit-in21k", "cls"),
        Heads("heads", "part", ("features",), "linear"),
        Network("cnn", "part", "cnn-cifar", {"select": "accuracy"}),
    ),
    differs=("It looked at test.",), cautions=("Small sets say little.",),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_study", lambda name: SMALL)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of grey squares, one brighter; 22, 10 and 10 of each."""
    path, rng = tmp_path_factory.mktemp("data") / "set", np.random.default_rng(0)
    for split, count in (("train", 22), ("val", 10), ("test", 10)):
        for c, name in enumerate(("one", "two")):
            (path / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(20 + 25 * c, 180 + 25 * c, (16, 16), np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{k:02}.png")
    return path


@pytest.fixture(scope="module")
def done(small, data, tmp_path_factory):
    """The study, run once without a stop."""
    return study(tmp_path_factory.mktemp("studies") / "small", data)


def study(out, data=None, **options):
    """The study as a trial; without ``data`` those that it was run on before."""
    named = {} if data is None else {"data": [str(data)]}
    return runner.run_study("small", **{"quick": True, "out": out, **named, **options})


def steps_in(folder: Path) -> dict[str, dict]:
    return {row["step"]: row for row in read_journal(folder / runner.STEPS, runner.COLUMNS)[0]}


def fail(error):
    def raising(*given, **options):
        raise error

    return raising


@pytest.fixture
def journal(done):
    """The rows of the finished study, to be damaged."""
    file = done.folder / runner.STEPS
    whole = file.read_bytes()
    yield file
    file.write_bytes(whole)


def test_every_step_is_kept_with_what_it_was_asked_and_made(done):
    assert list(steps_in(done.folder)) == ["features", "heads", "cnn"]
    row = steps_in(done.folder)["cnn"]
    assert row["asked"]["arch"] == "cnn-cifar" and row["made"] == {"run": "runs/cnn"} and row["seconds"] > 0
    assert (done.folder / "runs/cnn/head.safetensors").is_file() and (done.folder / "part/metrics.csv").is_file()


def test_the_same_command_does_nothing_twice_and_need_not_name_the_images(done, monkeypatch):
    monkeypatch.setattr(runner.StudyRunner, "_call", fail(AssertionError("done already")))
    lines, page = [], done.page.read_text()
    result = study(done.folder, say=lines.append)
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 3 and all(line.endswith("done") for line in steps)
    assert lines[-1] == "time       every step is done; what is left is the page"
    assert result.tables[0].record == done.tables[0].record and len(done.page.read_text()) == len(page)


@pytest.mark.slow
def test_stopped_in_the_middle_it_goes_on_and_ends_as_if_it_had_not_been(done, data, tmp_path, monkeypatch):
    out = tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="the same command goes on"):
        patch.setattr(api, "train_baseline", fail(KeyboardInterrupt()))
        study(out, data)
    finished = (out / runner.STEPS).read_bytes()
    result = study(out, data)
    assert (out / runner.STEPS).read_bytes().startswith(finished) and len(steps_in(out)) == 3
    mine, other = (each.tables[0].record["families"] for each in (result, done))
    assert [(f["name"], f["val"], f["test"]) for f in mine] == [(f["name"], f["val"], f["test"]) for f in other]


@pytest.mark.slow
def test_a_network_stopped_between_two_epochs_goes_on_from_there(data, tmp_path, monkeypatch):
    out, save, lines = tmp_path / "s", Checkpoint.save, []

    def kill(self, *given):
        save(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoint, "save", kill)
        study(out, data, only=["cnn"])
    study(out, only=["cnn"], say=lines.append)
    assert "resumed    after epoch 1" in lines and not list((out / "runs").glob(".*.checkpoint"))


def test_a_run_that_was_finished_but_not_noted_is_not_trained_again(done, journal, monkeypatch):
    before = steps_in(done.folder)
    journal.write_bytes(journal.read_bytes()[:-9])  # a kill tore the last row
    monkeypatch.setattr(api, "train_baseline", fail(AssertionError("it is there")))
    study(done.folder)
    assert steps_in(done.folder)["cnn"]["made"] == before["cnn"]["made"]


def test_a_step_that_was_asked_otherwise_is_refused(done, journal):
    rows = [b"{" + line[30:] for line in journal.read_bytes().replace(b"cnn-cifar", b"vit-cifar").splitlines()]
    journal.write_bytes(b"".join(_checked_line(row) + b"\n" for row in rows))
    with pytest.raises(RunError, match="the step cnn was asked otherwise"):
        study(done.folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"epochs": 1}, "epochs not given → 1"), ({"quick": False, "random_weights": True}, "quick yes → no")],
)
def test_asked_for_otherwise_the_folder_is_refused(done, options, says):
    with pytest.raises(RunError, match=says):
        study(done.folder, **options)


def test_other_images_are_refused(done, tmp_path, data):
    other, few = tmp_path / "set", done.folder / "few/set/images"
    shutil.copytree(data, other)
    (other / "train/one/00.png").rename(other / "train/two/90.png")
    before = {path.name: path.read_bytes() for path in few.iterdir()}
    with pytest.raises(RunError, match="of other images"):
        study(done.folder, other)
    assert {path.name: path.read_bytes() for path in few.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("note.txt", "", "holds other files and no study"),
        ("study.json", {"study": "large", "asked": {}, "data": [], "images": {}}, "the study large"),
        ("study.json", {"format": 99, "study": "small", "asked": {}}, "study format 99; .* reads 1"),
        ("study.json", {"study": "small", "asked": [], "data": []}, "no proper asked and no images"),
        ("study.json", '{"format": 1, "study"', "is damaged"),
    ],
)
def test_a_folder_of_something_else_and_a_damaged_one_are_refused(file, text, says, tmp_path, data):
    (tmp_path / file).write_text(text) if isinstance(text, str) else write_record(tmp_path / file, text)
    with pytest.raises(RunError, match=says):
        study(tmp_path, data)


def test_a_step_that_fails_is_named_with_the_way_around_it(data, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "ablate", fail(BadOption("it cannot be.")))
    with pytest.raises(StepFailed, match=r"step heads: it cannot be\.\n +--skip heads goes on"):
        study(tmp_path / "s", data)


def test_a_dry_run_says_the_steps_and_writes_nothing(data, tmp_path):
    out = tmp_path / "s"
    result = call("study", "small", "--data", data, "--out", out, "--dry-run")  # no weights are here
    assert result.exit_code == 0 and not out.exists()
    assert "cnn-cifar" in result.output and "time       about" in result.output


def test_a_dry_run_of_a_trial_that_drew_its_images_finds_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.StudyRunner, "_call", lambda self, step, call, done: {})
    out = tmp_path / "s"
    study(out, only=["features"])
    (out / "drawn/set/images/00000.png").touch()
    assert study(out, only=["features"], dry_run=True).rows.keys() == {"features"}


def test_a_row_of_the_printed_table_says_which_step_it_is_of(done):
    lines = runner.result_lines(done).splitlines()
    assert lines[0].split() == ["One", "or", "two", "step", "val", "accuracy", "test", "accuracy", "s", "to", "train"]
    assert any(re.match(r"linear on cls of vit-demo +heads +[01]\.", line) for line in lines)
    assert any(re.match(r"cnn-cifar at 32 px +cnn +[01]\.", line) for line in lines)


def test_the_page_claims_no_weights_of_images_and_its_commands_find_the_features(done):
    heads, network = done.tables[0].runs
    features, pixels = (dict(each["facts"]) for each in origins([heads, network]))
    assert features["weights"] == "random: never trained" and features["heads"] == "linear"
    assert not {"weights", "backbone"} & set(pixels) and pixels["networks"] == "cnn-cifar"
    words = shlex.split(train_command(heads))
    assert open_view(words[words.index("--features") + 1]).label == "vit-demo/set"
    assert str(heads.config["view"]["path"]) in sweep_commands(done.folder / "runs" / "heads")[0]
    assert network.config["cost"]["bytes_per_image"] is None


# --- the page ---------------------------------------------------------------------------------------------------


def test_numbers_stand_beside_the_published_ones_and_are_grey_in_a_trial(done):
    head, network, parameters, other = done.published
    records = {step: record for step, _, record in done.tables[0].rows}
    test, val = records["heads"]["test"]["accuracy"], records["cnn"]["val"]["accuracy"]
    assert head["published_words"] == "87.50 %" and head["here_words"] == f"{100 * test['value']:.2f} %"
    assert head["range"] == f"[{100 * test['low']:.2f} %, {100 * test['high']:.2f} %]"
    assert network["here"] == val and network["range"] is None and network["measure"] == "accuracy on val"
    assert parameters["here_words"] == "174,738"
    assert other["here"] is None and other["remark"] == "another book" and "none like it" in other["ours"]
    assert all(row["grey"] for row in done.published) and done.page.read_text().count('<tr class="greyed">') == 4


def test_several_sets_stand_in_one_table_with_what_was_published_of_each_head(done):
    (table,) = done.tables
    other = replace(table, question=replace(table.question, name="other", title="Other"))
    assert overview_of([table], done.published) is None
    found = overview_of([table, other], done.published)
    first, second = found["rows"]
    names = [record["name"] for _, _, record in table.rows]
    assert found["heads"] == names and [first["title"], second["title"]] == ["One or two", "Other"]
    assert [cell["value"] for cell in first["cells"]] == [r["test"]["accuracy"]["value"] for _, _, r in table.rows]
    assert [cell["published"] for cell in first["cells"]] == ["87.50 %", None] and first["best"] in names
    assert all(cell["published"] is None for cell in second["cells"])


@pytest.mark.parametrize(
    ("options", "grey"),
    [
        ({"quick": True}, [True, True, True, True]),
        ({"random_weights": True}, [True, False, False, False]),
        ({"epochs": 1}, [True, True, False, False]),
        ({"train_per_class": 5}, [False, True, False, False]),
        ({}, [False, False, False, False]),
    ],
)
def test_what_does_not_compare_is_grey(done, options, grey):
    other = replace(done, options=StudyOptions(**options))
    assert [bool(grey_reasons(other, each)) for each in SMALL.questions[0].published] == grey


def test_the_page_says_what_it_ran_on_and_shows_the_numbers_first(done, data):
    page = done.page.read_text()
    order = [page.index(f'id="{part}"') for part in ("published", "part-part", "images", "steps", "origin")]
    assert order == sorted(order) and '<body class="untrained">' in page
    for words in (
        "It ran on 80 of 84 images: at most 20 of each class of train", "It looked at test.", "Small sets say little.",
        "Small networks at 32 pixels, none of them pretrained: cnn-cifar, vit-demo (for vit-in21k).",
        f"featurecache study small --data {data} --quick --out {done.folder}",
    ):  # fmt: skip
        assert words in page
    cells = re.search(r'aria-label="Images of set".*?</table>', page, re.S)[0]
    assert re.findall(r'data-v="(\d+)"', cells)[:4] == ["20", "10", "10", "40"]


def test_without_images_none_is_embedded(done):
    result = study(done.folder, images=False)
    assert result.images == 0 and "<image" not in done.page.read_text()
    study(done.folder)


def test_a_page_that_cannot_be_written_says_where(done, monkeypatch):
    monkeypatch.setattr("heads.studies.page.write_whole", fail(OSError(28, "No space left on device")))
    with pytest.raises(CannotWrite, match=r"report could not be written in .*small: No space left on device"):
        study(done.folder)


def test_a_share_is_written_as_studies_write_it():
    assert format_published("accuracy", 0.9969) == "99.69 %" and format_published("auroc", 0.944) == "0.944"
    assert format_published("train_seconds", 443) == "443" and format_published("ms_per_image", 0.347) == "0.347"
    assert format_published("parameters", 85_803_270) == "85,803,270" and format_published("accuracy", None) == "–"


@pytest.mark.slow
def test_names_that_are_html_stay_text(tmp_path):
    splits = ["train"] * 38 + ["val"] * 20 + ["test"] * 20
    rows = [f'{k}.png,"{EVIL if k % 2 else "b"}",{split}' for k, split in enumerate(splits)]
    table = listed(tmp_path / "d", "\n".join(["path,label,split", *rows]))
    page = study(tmp_path / "s", table, only=["heads"]).page.read_text()
    assert page.count("<script>") == 1 and "<img" not in page and "&lt;img src=x" in page


@pytest.mark.slow
@pytest.mark.parametrize(("width", "colours"), [(1200, "light"), (768, "light"), (400, "dark")])
def test_in_a_browser_it_asks_for_nothing_sorts_and_does_not_scroll_sideways(done, opened, width, colours):
    tab = opened(done.folder / "report.html", width, colours)
    sideways = "s => s.scrollWidth > s.clientWidth + 1 && s.checkVisibility()"
    assert tab.evaluate(f"[...document.querySelectorAll('.scroll')].filter({sideways}).map(s => s.ariaLabel)") == []
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dead = "a => !document.getElementById(a.getAttribute('href').slice(1))"
    assert tab.evaluate(f"[...document.querySelectorAll('a[href^=\"#\"]')].filter({dead}).length") == 0
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    head = tab.locator('table[aria-label="Images of set"] th').nth(1)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    grey = tab.evaluate("getComputedStyle(document.querySelector('tr.greyed td')).color")
    assert grey != tab.evaluate("getComputedStyle(document.body).color")
    marked = "e => getComputedStyle(document.querySelector(e), '::after').content"
    assert "untrained" in tab.evaluate(marked, "#part-leaderboard .sheet")
    assert "untrained" not in tab.evaluate(marked, "#images .sheet")
