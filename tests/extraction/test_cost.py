"""What an image costs: measured while extracting, kept in the plan of the store, shown with every run."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import CLS, add_shard, add_view, make_store
from support.checkpoints import save_vit
from support.command import call
from support.fake_view import toy_view
from support.pictures import image_folder, save_picture

import featurecache
from featurecache.backbones.base import Backbone
from featurecache.errors import CacheError, Stopped
from featurecache.extraction import plan, timings
from featurecache.extraction.timings import StageTimings
from featurecache.formatting import cost_per_image, device_title
from featurecache.images import decoding
from featurecache.images.augmentation import Augmentation
from heads.api import train_head
from heads.evaluation import costs
from heads.evaluation.comparison import compare
from heads.evaluation.families import families_of
from heads.reports import text as reports_text

BATCH = 4


@pytest.fixture(autouse=True)
def _a_calm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs beside the tests."""
    monkeypatch.setattr(timings, "BUSY", 1.0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_vit(tmp_path / "vit")
    image_folder(tmp_path / "data", 9)
    return tmp_path


def extract(home: Path, cache: str = "cache", data: str = "data", **options: Any) -> Any:
    options = {"outputs": "cls", "batch_size": BATCH, "workers": 1, **options}
    return featurecache.extract(home / data, backbone=str(home / "vit"), cache=home / cache, **options)


def slowed(monkeypatch: pytest.MonkeyPatch, thing: Any, name: str, seconds: float) -> None:
    plain = getattr(thing, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return plain(*arguments, **options)

    monkeypatch.setattr(thing, name, slow)


def test_forward_and_loading_are_measured_apart_and_an_image_has_its_share_of_a_batch(home, monkeypatch):
    slowed(monkeypatch, Backbone, "forward", 0.2)
    slowed(monkeypatch, decoding, "decode", 0.02)
    result = extract(home)
    cost = featurecache.open_view(result.view).cost
    assert cost == result.cost and sorted(cost) == [
        "busy", "device", "forward_ms", "loading_ms", "precision", "threads"
    ]  # fmt: skip
    assert 200 / BATCH <= cost["forward_ms"] < 350 / BATCH  # the last batch has one image and computes four rows
    assert 20 <= cost["loading_ms"] < 200 / BATCH
    assert (cost["device"], cost["precision"]) == (device_title("cpu"), "fp32")
    assert cost["threads"] == torch.get_num_threads() or cost["threads"] > 0


@pytest.mark.parametrize("images", [3, 9])
def test_an_image_costs_the_same_in_a_batch_that_is_not_full(home, monkeypatch, images):
    """Which is computed alone."""
    forward = Backbone.forward
    slow = lambda self, pixels, parts: (time.sleep(0.03 * len(pixels)), forward(self, pixels, parts))[1]  # noqa: E731
    monkeypatch.setattr(Backbone, "forward", slow)
    for k in range(images, 9):
        next((home / "data").rglob(f"{k:03d}.png")).unlink()
    assert 30 <= extract(home, batch_size=8).cost["forward_ms"] < 90


def test_where_nothing_is_computed_the_earlier_figures_stand(home):
    first = extract(home).cost
    assert first is not None and extract(home).cost == first == extract(home, outputs="cls").cost
    again = extract(home, name="again")
    assert again.cost["forward_ms"] > 0 and again.cost["loading_ms"] is None  # another view of the same images
    assert "loading not measured" in cost_per_image(again.cost)


def test_the_run_that_computed_more_images_is_believed(home, monkeypatch):
    first = extract(home).cost
    save_picture(home / "data" / "ill" / "new.png", 99)
    slowed(monkeypatch, Backbone, "forward", 0.1)
    assert extract(home).cost == first  # one image says less than nine
    for k in range(12):
        save_picture(home / "data" / "well" / f"more{k}.png", 100 + k)
    assert extract(home).cost["forward_ms"] >= 100 / BATCH


def test_a_figure_of_a_busy_machine_gives_way_to_one_that_the_next_extraction_measures(home, monkeypatch):
    slowed(monkeypatch, Backbone, "forward", 0.05)  # a thread that waits has no core
    monkeypatch.setattr(timings, "BUSY", 0.25)
    busy = extract(home).cost
    assert busy["busy"] and "other work had the cores" in cost_per_image(busy)
    assert extract(home).cost == busy  # it is busy still, and more images say more
    monkeypatch.undo()
    monkeypatch.setattr(timings, "BUSY", 1.0)
    calm = extract(home).cost
    assert not calm["busy"] and calm["forward_ms"] < busy["forward_ms"] and calm["loading_ms"] == busy["loading_ms"]
    assert extract(home).cost == calm


def test_shards_have_the_same_bytes_and_views_the_same_content_whatever_a_run_took(home, monkeypatch):
    first = featurecache.open_view(extract(home, "a").view)
    slowed(monkeypatch, Backbone, "forward", 0.05)
    second = featurecache.open_view(extract(home, "b").view)
    shards = [{p.name: p.read_bytes() for p in view.store.glob("cls/*.h5")} for view in (first, second)]
    assert shards[0] == shards[1] and len(shards[0]) == 1
    assert first.attributes == second.attributes and (first.files == second.files).all()
    assert first.fingerprint == second.fingerprint and first.cost != second.cost


def test_augmented_copies_are_made_and_not_loaded(home, monkeypatch):
    slowed(monkeypatch, Augmentation, "apply", 0.05)
    assert extract(home, copies=2, augment="flip").cost["loading_ms"] < 50


def test_a_stopped_run_keeps_what_it_measured(home, monkeypatch):
    plain, calls = Backbone.forward, []

    def forward(self: Backbone, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the first is the canary's
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Backbone, "forward", forward)
    with pytest.raises(Stopped):
        extract(home)
    (file,) = (home / "cache").glob("*/plan.json")
    cost = json.loads(file.read_text())["cpu"]["cost"]
    assert cost["images"] == 2 * BATCH and cost["loading_ms"]["data"] > 0


def test_views_of_before_and_imported_ones_say_that_it_was_not_measured(tmp_path):
    store = make_store(tmp_path / "cache")
    add_shard(store, range(6), CLS)
    view = add_view(store, "set", range(6), [CLS])
    assert view.cost is None
    shown = call("info", "tiny/set", "--cache", str(tmp_path / "cache"))
    assert "cost       not measured" in shown.stdout


STRANGE = {"device": 3}, {"images": True}, {"more": 1}, {"loading_ms": {"a": 1}}


@pytest.mark.parametrize("change", [{"forward_ms": -1.0}, {"forward_ms": "fast"}, *STRANGE])
def test_a_plan_with_figures_of_other_kinds_is_refused(tmp_path, change):
    store = make_store(tmp_path / "cache")
    fine = {"forward_ms": 1.0, "loading_ms": {"set": 2.0}, "device": "x", "images": 2, "busy": False}
    for cost in (fine, fine | change):
        plan = {"cpu": {"batch_size": 4, "threads": 1, "cost": cost}}
        (store.path / "plan.json").write_text(json.dumps(plan))
        if cost is fine:
            assert store.cost("set")["loading_ms"] == 2.0 and store.cost("other")["loading_ms"] is None
    with pytest.raises(CacheError, match="does not say what an image costs"):
        store.cost("set")


def test_a_merged_view_brings_what_its_store_measured(home):
    view = featurecache.open_view(extract(home, "there").view)
    featurecache.merge(home / "there", home / "here")
    assert featurecache.open_view("data", home / "here").cost == view.cost


def test_a_gpu_is_timed_by_its_own_events_which_are_asked_later(monkeypatch):
    asked = []

    def event(enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        record, wait = partial(asked.append, "record"), partial(asked.append, "wait")
        return SimpleNamespace(record=record, synchronize=wait, elapsed_time=lambda end: 8.0)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    measured = StageTimings(torch.device("cuda"))
    with measured.forward(SimpleNamespace(rows=4, earlier_s=None)):  # type: ignore[arg-type]
        pass
    assert asked == ["record", "record"]  # nobody waits while the next batch is being prepared
    record = measured.record()
    assert record is not None and (record["forward_ms"], record["device"]) == (2.0, "NVIDIA H200")


def test_a_loading_figure_stays_with_its_view(tmp_path):
    store = make_store(tmp_path / "cache")
    store.write_plan("cpu", {"batch_size": 4, "threads": 1})
    record = {"forward_ms": 1.0, "loading_ms": 2.0, "device": "x", "images": 5, "busy": False}
    store.write_cost("cpu", "a", record)
    store.write_cost("cpu", "b", record | {"forward_ms": 7.0, "loading_ms": 9.0, "images": 3})
    costs = [store.cost(name) for name in "ab"]
    shown = [(cost["forward_ms"], cost["loading_ms"], cost["threads"]) for cost in costs]
    assert shown == [(1.0, 2.0, 1), (1.0, 9.0, 1)]


# beside heads

MEASURED = {
    "forward_ms": 12.0,
    "loading_ms": 3.0,
    "device": "AMD EPYC",
    "precision": "fp32",
    "threads": 2,
    "busy": False,
}


def trained(cost: dict[str, Any] | None, head: str = "linear", **provenance: Any) -> Any:
    view = toy_view(n=120, splits="given", noise=2, cost=cost, provenance={"backbone": "vit-toy", **provenance})
    return train_head(view, head, epochs=2, report=False)


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
def test_an_image_costs_backbone_and_head_and_with_loading_that_too():
    run = trained(MEASURED, parameters=86_389_248)
    cost, head = costs.run_cost(run), run.config["cost"]["ms_per_image"]
    assert cost["inference_ms"] == pytest.approx(12 + head) and cost["loaded_ms"] == pytest.approx(15 + head)
    assert (cost["device"], cost["backbone_parameters"]) == ("AMD EPYC", 86_389_248)
    assert 0 < cost["seconds_to_best"] <= cost["train_seconds"]
    text = reports_text.final_table(run, compare(families_of([run]), resamples=50).record)
    line = next(line for line in text.splitlines() if line.startswith("Cost: "))
    each, loaded = (costs.cost_text(cost[key], key) for key in ("inference_ms", "loaded_ms"))
    assert f"{each} ms/image, {loaded} with loading (on AMD EPYC)" in line


@pytest.mark.usefixtures("_folder")
def test_the_table_of_a_comparison_names_the_device_once():
    runs = [trained(MEASURED, parameters=1234), trained(MEASURED, "large", parameters=1234)]
    record = compare(families_of(runs), resamples=50).record
    text = reports_text.lab_table(record)
    header = next(line for line in text.splitlines() if line.startswith("what it costs"))
    assert header.split("  ")[-1] == "with loading" and text.count("AMD EPYC") == 1
    for words in ("of the backbone", "s to train", "s to best", "ms/image"):
        assert words in header
    row = next(line for line in text.splitlines() if line.startswith("linear on cls") and "1,234" in line)
    assert row.split()[3] == "1,234"


@pytest.mark.usefixtures("_folder")
def test_what_was_not_measured_is_a_dash_and_a_run_of_before_still_opens():
    run = trained(None)
    text = reports_text.final_table(run, compare(families_of([run]), resamples=50).record)
    assert costs.run_cost(run)["inference_ms"] is None and "the backbone's not measured" in text
    run.config["cost"] = {"train_seconds": 1.5, "ms_per_image": 0.25, "device": "cpu", "bytes_per_image": 16}
    before = costs.run_cost(run)
    assert (before["train_seconds"], before["seconds_to_best"], before["device"]) == (1.5, None, None)
    del run.config["cost"]
    assert costs.mean_cost([run])["train_seconds"] is None
    both = costs.cost_rows([("a", before), ("b", costs.run_cost(run))])
    assert both == [["what it costs", "s to train"], ["a", "1.5"], ["b", "–"]]


@pytest.mark.slow
@pytest.mark.usefixtures("_folder")
def test_the_page_shows_the_columns_and_the_device_once():
    from heads.api import report

    runs = [trained(MEASURED), trained(MEASURED, "large")]
    page = report([run.path for run in runs], out=Path("r"), images=False).path.read_text()
    assert "with loading" in page and "s to best" in page and page.count("on AMD EPYC") == 1


def test_times_have_three_digits_and_counts_all():
    shown = [costs.cost_text(value, "inference_ms") for value in (1234.6, 12.345, 0.012345, None)]
    assert shown == ["1,235", "12.3", "0.0123", "–"] and costs.cost_text(443_906, "parameters") == "443,906"


@pytest.mark.parametrize(
    ("shares", "seconds", "words"),
    [
        ((0.9, 0.06, 0.04), 900, "90 % in the network, 6 % waiting for decoded images, 4 % waiting for the disk\n"),
        ((0.5, 0.3, 0.2), 20, "more decode threads (--workers) or a faster disk would help\n"),
        ((0.5, 0.1, 0.4), 20, "fewer outputs (--outputs) or a faster disk would help\n"),
        ((0.5, 0.05, 0.45), 3, "50 % in the network, 5 % waiting for decoded images, 45 % waiting for the disk\n"),
    ],
)
def test_the_last_lines_say_where_the_time_went_and_what_would_help(
    home: Path, shares: tuple[float, float, float], seconds: float, words: str
) -> None:
    result = extract(home)
    assert set(result.shares) == {"computing", "decoding", "writing"} and sum(result.shares.values()) == pytest.approx(
        1
    )
    result = replace(result, seconds=seconds, shares=dict(zip(result.shares, shares, strict=True)))
    assert words in plan.extraction_summary(result, "vit/data")
    many = replace(result, failed=[(f"{k}.png", "no image") for k in range(11)])
    more = f"more; featurecache info vit/data --cache {home / 'cache'} lists them"
    assert more in plan.extraction_summary(many, "vit/data")
    assert "network" not in plan.extraction_summary(replace(result, computed=0), "vit/data")
