"""Networks trained from pixels: the engine, the protocol and the run folder of a head, with augmentation and resume."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import InterpolationMode

import heads
from featurecache.errors import BadOption, CannotWrite, ProtocolError, RunError, Stopped, UnknownHead
from featurecache.extraction.plan import extract
from featurecache.images.preprocessing import Preprocess
from featurecache.sources.base import Dataset, ImageArrays
from featurecache.store.write_view import open_view
from heads.api import train_baseline
from heads.evaluation.comparison import compare
from heads.evaluation.external import evaluate_run
from heads.evaluation.families import families_of, names_of
from heads.pixel_view import open_pixels
from heads.reports.provenance import train_command
from heads.reports.side_by_side import pareto_figures
from heads.runs.run import pixels_of
from heads.sweeps.grid import SweepSpec
from heads.training.batches import Augmenter
from heads.training.loop import Checkpoint
from heads.training.network import settings_of

QUICK = {"epochs": 2, "image_size": 8, "batch_size": 16, "report": False, "augment": "none", "device": "cpu"}


def digits(n=72, classes=3, broken=()):
    """The first n of scikit-learn's digits of so many classes; ``broken``: rows that are no images."""
    found = load_digits()
    rows = np.flatnonzero(found.target < classes)[:n]
    images = np.rint(found.images[rows] * (255 / 16)).astype(np.uint8)

    class Some(ImageArrays):
        def read(self, row):
            return b"nothing" if row in broken else super().read(row)

    return Dataset(
        name="digits", source={"kind": "digits", "data": "digits"}, ids=[f"digits:{row}" for row in rows],
        labels=found.target[rows].astype(np.int64), splits=[""] * n, meta={"place": np.arange(n)},
        classes=[str(c) for c in range(classes)], task="multiclass", images=Some([images]),
    )  # fmt: skip


def trained(folder, data=None, **options):
    return train_baseline(data or digits(), "cnn-cifar", out=folder, **{**QUICK, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("baseline") / "run")


def test_pixels_are_those_of_the_preprocessing_in_the_order_of_the_data():
    data = digits(30, broken=(3,))
    (view,) = open_pixels(data, ["cnn-cifar"], 12)
    images = view.tensor("pixels-12", np.array([5, 0]))
    expected = [view.preprocess.resized(torch.from_numpy(data.read(row))[None].expand(3, -1, -1)) for row in (6, 0)]
    assert torch.equal(images, torch.stack(expected))
    assert view.failed == [{"id": data.ids[3], "reason": view.failed[0]["reason"]}] and len(view) == 29
    with pytest.raises(ProtocolError, match=r"digits: no image can be read \(.+\)"):
        open_pixels(digits(5, broken=range(5)), ["cnn-cifar"], 12)
    assert view.ids.tolist() == data.ids[:3] + data.ids[4:] and view.meta["place"].tolist()[2:4] == [2, 4]


def test_pixels_beyond_memory_lie_in_a_file_and_are_the_same(monkeypatch):
    data = digits(20)
    (memory,) = open_pixels(data, ["cnn-cifar"], 8)
    files, memmap = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *given, **more: files.append(given) or memmap(*given, **more))
    monkeypatch.setattr("heads.pixel_view.memory_for_features", lambda: 100)
    (mapped,) = open_pixels(data, ["cnn-cifar"], 8)
    assert torch.equal(memory.tensor("pixels-8"), mapped.tensor("pixels-8")) and len(files) == 1


def test_pixels_that_neither_memory_nor_disk_holds_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr("heads.pixel_view.memory_for_features", lambda: 100)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=101))
    monkeypatch.setattr(Dataset, "read", None)
    with pytest.raises(CannotWrite, match=r"20 images of 8×8 pixels.*TMPDIR=.*--image-size"):
        open_pixels(digits(20), ["cnn-cifar"], 8)


def test_loading_costs_what_most_images_take_and_not_the_one_that_was_slow(monkeypatch):
    resized, slow = Preprocess.resized, iter([0.2, *[0.0] * 99])

    def waiting(self, image):
        time.sleep(next(slow))
        return resized(self, image)

    monkeypatch.setattr(Preprocess, "resized", waiting)
    (view,) = open_pixels(digits(20), ["cnn-cifar"], 8)
    assert 0 < view.cost["loading_ms"] < 9  # the mean is above 10


def test_what_is_left_out_is_as_published_and_what_is_given_is_not():
    assert (settings_of("cnn-medical-mnist").weight_decay, settings_of("cnn-medical-mnist").patience) == (1e-4, 5)
    asked = settings_of("cnn-medical-mnist", lr=0.1, epochs=None)
    assert (asked.lr, asked.epochs, asked.schedule) == (0.1, 20, "plateau")


def test_a_run_predicts_what_its_network_says_of_the_same_pixels(run):
    data = digits()
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(data.read(row))[None].expand(3, -1, -1) for row in range(10)])
        z = run.calibration(run.model(pixels.float()).double().numpy())
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    found = heads.predict(run, [data.read(row) for row in range(10)])
    assert np.allclose([list(record["probabilities"].values()) for record in found], p, atol=1e-6)
    assert "error" in heads.predict(run, [b"nothing"])[0]


def test_a_training_ends_with_the_weights_of_its_best_epoch(tmp_path):
    worse = {"lr": 0.3, "select": "loss"}
    long = trained(tmp_path / "long", epochs=3, **worse)
    assert long.config["chosen"]["epoch"] == 1
    state = trained(tmp_path / "short", epochs=1, **worse).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in long.model.state_dict().items())


def stopped_in(epoch):
    def say(line):
        if line.startswith(f"epoch  {epoch}"):
            raise KeyboardInterrupt

    return say


@pytest.mark.parametrize(("optimizer", "schedule"), [("adam", "plateau"), ("sgd", "linear")])
def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path, optimizer, schedule):
    more = {"epochs": 4, "optimizer": optimizer, "augment": "flip,rotate10", "schedule": schedule, "seed": 3}
    more |= {"warmup": 0.6, "clip_norm": 0.5} if schedule == "linear" else {}
    trained(tmp_path / "whole", **more)

    with pytest.raises(Stopped, match=r"in the first epoch\. Nothing was kept"):
        trained(tmp_path / "parts", say=stopped_in(1), **more)
    with pytest.raises(Stopped, match=r"2 epochs are safe; the same command goes on"):
        trained(tmp_path / "parts", say=stopped_in(3), **more)
    with pytest.raises(RunError, match=r"A training with other lr was interrupted.*--overwrite throws it away"):
        trained(tmp_path / "parts", **more, lr=0.5)
    trained(tmp_path / "parts", say=(lines := []).append, **more)
    assert "resumed    after epoch 2" in lines
    for name in ("head.safetensors", "splits.csv", "predictions.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]  # no checkpoint is left


def test_a_sweep_stopped_within_a_network_goes_on_in_it_to_the_same_bytes(tmp_path, monkeypatch):
    asked = {"data": digits(60), "epochs": 3, "image_size": 8, "batch_size": 16, "lr": "1e-3,1e-2", "controls": False}
    whole = heads.ablate(None, "cnn-cifar", out=tmp_path / "whole", **asked)
    saved, save = [], Checkpoint.save

    def stopping(self, *given):
        save(self, *given)
        saved.append(given[-1])
        if len(saved) == 5:  # of the second network the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stopping)
    with pytest.raises(Stopped, match="1 head is safe"):
        heads.ablate(None, "cnn-cifar", out=tmp_path / "parts", **asked)
    again = heads.ablate(None, "cnn-cifar", out=tmp_path / "parts", **asked)
    assert saved == [1, 2, 3, 1, 2, 3]
    (one,), (other,) = whole.families[0].runs, again.families[0].runs
    assert (one.path / "head.safetensors").read_bytes() == (other.path / "head.safetensors").read_bytes()
    assert not list((tmp_path / "parts").glob(".*.checkpoint"))


@pytest.mark.parametrize("place", [0, 9, 0.3, 0.6, 0.9, -20, "cut"])
def test_a_damaged_checkpoint_is_thrown_away_and_the_training_begins_anew(tmp_path, run, place):
    with pytest.raises(Stopped):
        trained(tmp_path / "run", say=stopped_in(2))
    (file,) = tmp_path.glob(".run.checkpoint")
    data = bytearray(file.read_bytes())
    if place == "cut":
        del data[-100:]
    else:
        data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    file.write_bytes(data)
    again = trained(tmp_path / "run", say=(lines := []).append)
    assert any(line.startswith("warning") and "is damaged and was thrown away" in line for line in lines)
    assert (again.path / "head.safetensors").read_bytes() == (run.path / "head.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_training_of_other_settings_is_thrown_away_when_asked(tmp_path):
    with pytest.raises(Stopped):
        trained(tmp_path / "run", say=stopped_in(2), lr=0.5)
    trained(tmp_path / "run", say=(lines := []).append, overwrite=True)
    assert not any(line.startswith("resumed") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_network_and_heads_on_features_are_compared_on_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURECACHE_DIR", str(tmp_path))
    data = digits()
    made = extract(data, backbone="vit-demo", random_weights=True, outputs="cls")
    monkeypatch.setattr("featurecache.sources.reopen", lambda source: data)
    found = heads.ablate(
        open_view(made.view), ["linear", "cnn-cifar"], out=tmp_path / "sweep", epochs=2, image_size=8, batch_size=16,
        optimizer="adam,sgd", augment=["none", "flip"], controls=False,
    )  # fmt: skip
    by_head = {family.head: family for family in found.families}
    assert set(by_head) == {"linear", "cnn-cifar"}
    digests = [family.runs[0].config["splits"]["digest"] for family in found.families]
    assert digests[0] == digests[1]  # the same test images
    tried = {(r["settings"]["optimizer"], r["settings"]["augment"]) for r in found.rows if r["head"] == "cnn-cifar"}
    assert tried == {("adam", None), ("adam", "flip"), ("sgd", None), ("sgd", "flip")}
    assert sum(row["head"] == "linear" for row in found.rows) == 2  # --augment is nothing to it
    network = by_head["cnn-cifar"].runs[0]
    own = {k: network.config["settings"][k] or "none" for k in ("optimizer", "augment", "select")}
    state = trained(tmp_path / "alone", data, **own).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.model.state_dict().items())


def test_a_sweep_keeps_the_published_settings_of_what_was_not_asked():
    found = heads.ablate(None, "cnn-cifar", data=digits(60), out="sweep", epochs=1, image_size=8, lr="1e-3,1e-2")
    settings = [row["settings"] for row in found.rows]
    assert {each["batch_size"] for each in settings} == {128} and {each["balance"] for each in settings} == {False}
    assert [each["lr"] for each in settings] == [1e-3, 1e-2] and settings[0]["augment"] == "flip,rotate10,shift0.1"


def test_what_the_command_line_leaves_out_is_not_asked_of_a_sweep():
    """An option that may be given several times is () where it was not."""
    assert SweepSpec.of("cnn-cifar", augment=(), classes=(), lr="1e-3").given == ("lr",)
    assert SweepSpec.of("cnn-cifar", augment=("none",)).given == ("augment",)


def test_a_search_without_optuna_is_refused_before_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(Dataset, "read", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[optuna\]'"):
        heads.ablate(None, "cnn-cifar", data=digits(60), out=tmp_path / "s", lr="1e-3..1e-1", search="optuna", trials=2)


def test_optuna_searches_for_a_network_and_goes_on(tmp_path):
    pytest.importorskip("optuna")
    asked = {"data": digits(60), "out": tmp_path / "sweep", "epochs": 1, "image_size": 8, "lr": "1e-4..1e-1"}
    asked |= {"augment": ["none", "flip"], "search": "optuna"}
    first = heads.ablate(None, "cnn-cifar", **asked, trials=2)
    second = heads.ablate(None, "cnn-cifar", **asked, trials=3)
    assert len(first.rows) == 2 and [row["key"] for row in second.rows][:2] == [row["key"] for row in first.rows]
    assert len(second.rows) == 3


def test_a_network_is_evaluated_on_the_images_of_a_view_that_is_named(run, monkeypatch):
    monkeypatch.setattr("heads.evaluation.external.open_view", lambda name: digits(60))
    assert evaluate_run(run.path, "vit-demo/digits", resamples=20)["n"] == 60


def test_the_images_a_run_was_trained_on_and_columns_of_the_data_are_found_without_decoding(run, monkeypatch):
    other, own, network = pixels_of(run, digits(60)), digits(), run.model
    own.meta["place"] %= 2
    monkeypatch.setattr("featurecache.sources.reopen", lambda source: own)
    monkeypatch.setattr("featurecache.images.decoding.decode", None)
    monkeypatch.setattr(other, "path", other.path / "elsewhere")
    record = evaluate_run(replace(run), other, resamples=50)
    assert network is run.model and record["n"] == 60
    used = {*run.ids[np.isin(run.splits.astype(str), ("train", "val"))]}
    assert f"{len(used & set(other.ids))} of 60 images were also used to train" in record["warnings"][-1]
    found = compare(families_of([run]), by="place", resamples=20).record["by"]["place"]
    assert [row["value"] for row in found] == ["0", "1"]
    assert sum(row["n"] for row in found) == len(run.answers("test").y)


def test_a_name_that_is_no_network_has_its_neighbours_named_and_heads_take_no_images(tmp_path):
    with pytest.raises(UnknownHead, match=r"cnn-cifar.*train-head"):
        train_baseline(digits(), "cnn-cifer", out=tmp_path / "run")
    with pytest.raises(BadOption, match="train-baseline --arch cnn-cifar"):
        heads.training.job.choose_output(None, "cnn-cifar", None)
    (view,) = open_pixels(digits(30), ["cnn-cifar"], 8)
    with pytest.raises(BadOption, match="linear is a head on features"):
        heads.train_head(view, "linear", out=tmp_path / "run")


BILINEAR = InterpolationMode.BILINEAR


def moved(image, words, numbers, monkeypatch):
    """``numbers``: what is drawn, in [0, 1), step by step."""
    given = iter(numbers)
    monkeypatch.setattr(torch, "rand", lambda n, *rest: torch.full((n, *rest), next(given)))
    return Augmenter(words)(image[None])[0]


@pytest.mark.parametrize(
    ("words", "drawn", "theirs", "atol"),
    [
        ("flip", [0.1], lambda f, x: f.horizontal_flip(x), 1e-3),
        ("flip", [0.9], lambda f, x: x, 1e-3),
        ("vflip", [0.1], lambda f, x: f.vertical_flip(x), 1e-3),
        ("rotate20", [0.25], lambda f, x: f.rotate(x, 10, interpolation=BILINEAR), 0.5),
        ("shift0.25", [1.0, 0.0], lambda f, x: f.affine(x, 0.0, [4, -3], 1.0, [0.0, 0.0], BILINEAR), 1e-2),
        ("scale0.5", [0.75], lambda f, x: f.affine(x, 0.0, [0, 0], 1.25, [0.0, 0.0], BILINEAR), 0.5),
        ("brightness0.4", [0.75], lambda f, x: f.adjust_brightness(x / 255, 1.2) * 255, 1e-3),
        ("contrast0.4", [0.75], lambda f, x: f.adjust_contrast(x / 255, 1.2) * 255, 1e-2),
    ],
)
def test_augmented_pixels_are_those_of_torchvision(words, drawn, theirs, atol, monkeypatch):
    from torchvision.transforms.v2 import functional

    image = 255 * torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))
    ours, expected = moved(image, words, drawn, monkeypatch), theirs(functional, image)
    border = 3 if words.startswith("rotate") else 0  # which is darkened otherwise
    inside = (slice(None), slice(border, 12 - border), slice(border, 16 - border))
    assert torch.allclose(ours[inside], expected[inside], atol=atol)


def test_steps_are_done_in_their_order(monkeypatch):
    image = torch.zeros(3, 9, 9)
    image[:, 4, 1] = 255
    first_turned = moved(image, "rotate180,flip", [0.75, 0.9], monkeypatch)  # by 90 degrees, not flipped
    assert first_turned[0, 7, 4] > 250 or first_turned[0, 1, 4] > 250
    shifted = moved(image, "flip,shift0.45", [0.1, 1.0, 0.5], monkeypatch)  # to column 7, then 4 to the right: outside
    assert shifted.abs().max() < 1e-3
    assert moved(image, "shift0.45,flip", [1.0, 0.5, 0.1], monkeypatch)[0].argmax() == 4 * 9 + 3  # to 5, then to 3


def test_two_images_of_a_batch_are_drawn_apart():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8) * 255
    made = Augmenter("rotate30,shift0.2")(image.repeat(4, 1, 1, 1))
    assert len({tuple(each.flatten().tolist()) for each in made}) == 4


def test_a_run_says_what_it_cost_and_saw_and_by_which_command(run):
    assert run.config["parameters"] == 174_803 and run.config["spec"]["kind"] == "pixels"
    cost = run.config["cost"]
    assert cost["forward_ms"] == 0 and cost["loading_ms"] > 0 and 0 < cost["seconds_to_best"] <= cost["train_seconds"]
    assert [row["epoch"] for row in run.history] == [1, 2] and all(0 <= row["val_top1"] <= 1 for row in run.history)
    assert names_of(families_of([run])) == ["cnn-cifar at 8 px"]
    options = "--epochs 2 --batch-size 16 --augment none --image-size 8"
    assert train_command(run) == f"featurecache train-baseline --arch cnn-cifar --data digits {options}"


def test_a_preprocessing_that_is_damaged_is_said(run):
    spec = {**run.config["spec"], "preprocess": {"mode": "no"}}
    with pytest.raises(RunError, match="how its images were resized"):
        pixels_of(replace(run, config={**run.config, "spec": spec}))


def test_quality_is_charted_against_the_costs_that_decide():
    def family(name, output, seconds, value):
        cost = dict.fromkeys(("seconds_to_best", "inference_ms", "ms_per_image"), seconds)
        cost["train_seconds"] = 2 * seconds
        return {"name": name, "output": output, "test": {"auroc": {"value": value, "low": None, "high": None}}, **cost}

    rows = [family("linear", "cls", 1.0, 0.8), family("cnn", "pixels-32", 9.0, 0.7), family("ridge", "cls", 4.0, 0.9)]
    found = {figure.title: figure for figure in pareto_figures(rows, "auroc", "binary")}
    assert list(found) == ["AUROC and seconds to train", "AUROC and ms an image, backbone and head"]
    chart = found["AUROC and seconds to train"]
    assert "extraction" in chart.caption and "cnn: 0.700 at 18" in chart.svg()
    alone = pareto_figures([rows[0], rows[2]], "auroc", "binary")[0]
    assert not alone.caption  # nothing beside heads on features


def test_weights_of_a_backbone_are_refused_where_the_network_lies_in_the_run(run):
    with pytest.raises(BadOption, match="the network of this run lies in its folder"):
        heads.predict(run, [np.zeros((8, 8), np.uint8)], weights="w.pt")
