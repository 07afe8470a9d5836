"""``explain`` from run and images to PNG files: which features are read, what is written, planted squares, the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from support.command import call
from support.pictures import untrained_view
from support.squares import on_square, squares

import heads
from featurecache.errors import BadOption, NotInCache
from featurecache.extraction import canary
from featurecache.images.preprocessing import Preprocess
from heads.explanations.contributions import mean_training_token, token_map
from heads.explanations.explain import ExplainResult, _panel, explanations_table
from heads.explanations.explainer import Explainer, SourceImages, read_source_image, visible_box
from heads.explanations.maps import Panel, draw_maps, rgba
from heads.reports.gallery import ImageLoader


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """180 grey images with a red or a blue square, tokens of an untrained ViT, and five runs; the last 50 are test."""
    folder = tmp_path_factory.mktemp("planted")
    images, labels, corners = squares(180, 0)
    splits = {"train": slice(110), "val": slice(110, 130), "test": slice(130, 180)}
    save_squares(folder / "squares.npz", images, labels, splits)
    view = untrained_view(folder / "squares.npz", folder / "cache")
    kinds = {
        "large": ("large", "tokens", 5), "mean": ("mean-linear", "tokens", 1), "cls": ("linear", "cls", 1),
        "resized": ("large", "tokens-80", 5), "attention": ("attention", "tokens", 1),
    }  # fmt: skip
    same = {"controls": False, "report": False, "patience": 0}
    runs = {
        name: heads.train_head(view, head, output=output, epochs=epochs, out=folder / name, **same)
        for name, (head, output, epochs) in kinds.items()
    }
    return folder, view, runs, images, corners


def save_squares(path, images, labels, splits):
    arrays = {f"{name}_images": images[part] for name, part in splits.items()}
    np.savez(path, **arrays, **{f"{name}_labels": labels[part, None] for name, part in splits.items()})


def run_of(planted, name):
    """Read anew: a run remembers its model."""
    return heads.load_run(planted[2][name].path)


@pytest.mark.parametrize("name", ["large", "resized"])
def test_the_map_of_a_trained_large_head_peaks_on_the_square_that_decides(planted, name):
    _, _, _, images, corners = planted
    run = run_of(planted, name)
    explainer = Explainer(run, SourceImages())
    shown = [read_source_image(str(i), images[i]) for i in range(130, 180)]
    called = explainer.logits(shown).argmax(1)
    maps = [each for (each,) in explainer.maps("contribution", shown, called)]
    hits = sum(on_square(m.peak, m.values.shape, corner) for m, corner in zip(maps, corners[130:], strict=True))
    assert hits >= 45, hits
    controls = [np.unravel_index(m.control.argmax(), m.control.shape) for m in maps]
    lost = sum(on_square(c, maps[0].control.shape, corner) for c, corner in zip(controls, corners[130:], strict=True))
    assert lost < hits


def test_stored_images_are_explained_without_the_backbone(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(canary, "load_backbone", lambda **_: pytest.fail("the backbone was loaded"))
    view = planted[1]
    found = heads.explain(run_of(planted, "large"), [view.ids[0], view.ids[179]], out=tmp_path / "maps")
    assert [record["image"] for record in found.records] == [view.ids[0], view.ids[179]]
    assert all(record["kind"] == "contribution" for record in found.records)


def test_a_new_image_goes_through_the_same_backbone(planted, tmp_path):
    """The same pixels in a file of their own, with other bytes: the same map."""
    _, view, _, images, _ = planted
    Image.fromarray(images[179]).save(tmp_path / "new.png")
    both = [view.ids[179], str(tmp_path / "new.png")]
    stored, new = heads.explain(run_of(planted, "large"), both, out=tmp_path / "maps").records
    assert new["margin"] == pytest.approx(stored["margin"], abs=1e-3)
    assert np.array(new["values"]) == pytest.approx(np.array(stored["values"]), abs=1e-3)


def test_runs_stand_side_by_side_and_what_is_written_is_what_was_found(planted, tmp_path):
    runs = [run_of(planted, name) for name in ("large", "mean", "cls")]
    options = {"out": tmp_path / "maps", "kinds": "contribution,attention", "classes": "1"}
    found = heads.explain(runs, [planted[1].ids[150]], **options)
    assert [path.name.rpartition("-")[2] for path in found.files] == ["contribution.png", "attention.png"]
    for path in found.files:
        with Image.open(path) as image:
            assert image.size[0] > 800
    assert json.loads((tmp_path / "maps" / "explain.json").read_text())["maps"] == found.records
    large, mean, cls = (r for r in found.records if r["kind"] == "contribution")
    assert "no places" in cls["error"] and large["class"] == mean["class"] == "1"
    total = np.sum(mean["values"]) + sum(mean["beside"].values())
    assert mean["adds_up"] and total == pytest.approx(mean["margin"], abs=1e-4)
    assert np.shape(large["control"]) == np.shape(large["values"]) == tuple(large["grid"])
    attention = [r for r in found.records if r["kind"] == "attention"]
    assert len(attention) == 6 and all(r["class"] is None and r["control"] is None for r in attention)


def test_a_run_without_places_alone_is_refused_with_what_there_is(planted, tmp_path):
    with pytest.raises(BadOption, match="--kind attention"):
        heads.explain(run_of(planted, "cls"), [planted[1].ids[0]], out=tmp_path / "maps")


@pytest.mark.parametrize("options, words", [({"method": "x"}, "--method"), ({"out": __file__}, "is a file")])
def test_what_is_misspelt_is_named_and_without_an_image_nothing_is_explained(planted, tmp_path, options, words):
    with pytest.raises(BadOption, match="explain needs an image"):
        heads.explain(run_of(planted, "large"), [], out=tmp_path / "none")
    with pytest.raises(BadOption, match=words):
        heads.explain(run_of(planted, "large"), [planted[1].ids[0]], **{"out": tmp_path / "maps", **options})


def test_tokens_that_are_not_stored_are_asked_for_by_the_command_that_stores_them(tmp_path):
    images, labels, _ = squares(60, 0)
    splits = {"train": slice(20), "val": slice(20, 40), "test": slice(40, 60)}
    save_squares(tmp_path / "few.npz", images, labels, splits)
    view = untrained_view(tmp_path / "few.npz", tmp_path, "mean")
    run = heads.train_head(view, "linear", output="mean", epochs=1, out=tmp_path / "run", report=False)
    with pytest.raises(NotInCache, match="--outputs tokens"):
        heads.explain(run, ["few.npz:test:1"], out=tmp_path / "maps")


def test_an_image_that_cannot_be_read_is_a_record_and_the_others_are_explained(planted, tmp_path):
    (tmp_path / "no.png").write_bytes(b"<!DOCTYPE html>")
    asked = [str(tmp_path / "no.png"), planted[1].ids[0], "gone.png"]
    records = heads.explain(run_of(planted, "large"), asked, out=tmp_path / "maps").records
    errors = {r["image"]: r["error"] for r in records if "error" in r}
    assert set(errors) == {asked[0], "gone.png"} and "no such file" in errors["gone.png"]
    assert len(records) == 3
    written = (tmp_path / "maps" / "explain.json").read_bytes()
    assert not heads.explain(run_of(planted, "large"), asked[:1], out=tmp_path / "maps").files
    assert (tmp_path / "maps" / "explain.json").read_bytes() == written  # it describes the PNGs that are there still


def test_the_mean_training_token_is_of_train_alone(planted):
    view, run = planted[1], run_of(planted, "large")
    info = view.info("tokens")
    mean, words = mean_training_token(run, token_map(run, info.prefix, info.grid), view)
    train = view.array("tokens", view.split("train")).astype(np.float64)
    assert mean[0].numpy() == pytest.approx(train[:, 0].mean(0), abs=1e-5)
    assert mean[1].numpy() == pytest.approx(train[:, 1:].mean((0, 1)), abs=1e-5) and (mean[1:] == mean[1]).all()
    assert "all 110 training images" in words


def test_a_view_of_other_images_under_the_same_name_is_not_the_one_a_run_was_trained_on(planted, tmp_path):
    folder, _, runs, *_ = planted
    kept = (folder / "cache").rename(tmp_path / "kept")
    try:
        others, labels, _ = squares(180, 1)
        save_squares(tmp_path / "squares.npz", others, labels, {"train": slice(110), "val": slice(110, 180)})
        untrained_view(tmp_path / "squares.npz", folder / "cache")
        assert SourceImages().view(runs["large"]) is None
    finally:
        shutil.rmtree(folder / "cache")
        kept.rename(folder / "cache")
    assert SourceImages().view(runs["large"]) is not None


def test_the_command_shows_a_line_for_each_map(planted, tmp_path):
    words = ("explain", "--run", planted[2]["large"].path, "--out", tmp_path / "maps", planted[1].ids[0])
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "contribution: replacement" in result.output and "1 PNG file, " in result.output
    found = json.loads(call(*words, "--json").stdout)
    assert found["maps"][0]["kind"] == "contribution" and Path(found["files"][0]).is_file()


def test_a_margin_that_rounds_to_nothing_has_no_sign_and_a_small_one_its_digits():
    record = {"image": "a.png", "kind": "contribution", "map_of": "mean", "run": "r", "class": "ill", "grid": [2, 2]}
    record |= {"margin": -0.0031, "likeness_to_control": -0.0002, "peak": [0, 1], "beside": {"b": -1e-9}}
    words = explanations_table([record]).split()[-8:]
    assert words == ["-0.003", "row", "1/2,", "column", "2/2", "b", "0.000", "0.000"]


def test_of_a_sweep_the_head_that_it_chose_is_explained(planted, tmp_path):
    sweep = heads.ablate(planted[1], "large", epochs=1, out=tmp_path / "sweep", controls=False)
    result = call("explain", "--run", tmp_path / "sweep", "--out", tmp_path / "maps", planted[1].ids[0])
    assert result.exit_code == 0, result.output
    assert f"run        {sweep.best.path}   (the choice of the sweep {tmp_path / 'sweep'})" in result.stderr


@pytest.mark.slow
def test_a_network_on_pixels_has_grad_cam_and_occlusion_and_no_attention(planted, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    folder, view, _, _, corners = planted
    run = heads.train_baseline(
        str(folder / "squares.npz"), "cnn-cifar", epochs=4, augment="none", out=tmp_path / "run", report=False,
        device="cpu", patience=0,
    )  # fmt: skip
    found = heads.explain(run, [view.ids[179]], out=tmp_path / "maps", kinds="grad-cam,contribution")
    cam, occlusion = found.records
    assert (cam["kind"], cam["grid"]) == ("grad-cam", [8, 8]) and np.shape(cam["control"]) == (8, 8)
    assert occlusion["map_of"] == "occlusion" and on_square(occlusion["peak"], (8, 8), corners[179])
    assert heads.explain(run, [view.ids[179]], out=tmp_path / "maps").records[0]["kind"] == "grad-cam"
    with pytest.raises(BadOption, match="no class token"):
        heads.explain(run, [view.ids[179]], out=tmp_path / "maps", kinds="attention")


def test_every_kind_has_its_own_colours_and_opacity_is_size():
    values = np.array([[2.0, -1.0, 0.0]])
    assert rgba(values, "contribution")[0].tolist() == [[230, 97, 0, 185], [0, 114, 230, 92], [230, 97, 0, 0]]
    assert len({tuple(rgba(values, kind)[0, 0, :3]) for kind in ("contribution", "attention", "grad-cam")}) == 3


def test_what_stands_below_a_picture_is_not_cut_off(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_maps(np.zeros((40, 20, 3), np.uint8), "grad-cam", [Panel("one")], untrained=True)
    (foot,) = figures[0].texts
    ends = foot.get_window_extent(FigureCanvasAgg(figures[0]).get_renderer())
    assert foot.get_text().endswith("nothing else") and ends.x1 < figures[0].bbox.width


def test_a_run_without_a_map_stands_there_with_its_reason():
    pixels = np.zeros((20, 40, 3), np.uint8)
    png = draw_maps(pixels, "contribution", [Panel("$one$\n雪", None, (), "no places: 100 %")])
    assert png.startswith(b"\x89PNG")


def gallery_of(run):
    shown = ImageLoader(str).gallery([(run, run.answers("test"))])
    return shown.notes[0], list(shown.rows.values())


def test_the_gallery_names_its_maps_by_kind_and_has_the_control_beside(planted):
    note, rows = gallery_of(run_of(planted, "large"))
    pictures = [picture for row in rows for picture in row]
    assert pictures and all(p.kind == "contribution" and p.map and p.control and p.map != p.control for p in pictures)
    assert note.startswith("Contribution, beside each image: exact change of the margin") and "control" in note


def test_the_gallery_of_a_vector_without_places_says_so(planted):
    note, rows = gallery_of(run_of(planted, "cls"))
    assert "no places" in note and not any(picture.map for row in rows for picture in row)


def test_the_gallery_of_a_head_that_is_occluded_has_a_few_maps_only(planted):
    note, rows = gallery_of(run_of(planted, "attention"))
    for row in rows:
        assert [picture.map is not None for picture in row] == [number < 3 for number in range(len(row))]
    assert "occlusion" in note


def test_runs_of_one_kind_are_told_apart_by_their_folders_and_long_names_leave_the_numbers():
    config = {"settings": {"random_weights": True}, "view": {"label": "pixels/blood"}, "spec": {"kind": "pixels"}}
    run = SimpleNamespace(head="finetune:vit-demo", output="pixels-32", path=Path("studies/blood-tuned"), config=config)
    panel = _panel(ExplainResult(run, "grad-cam", "x" * 80, 0.125, 1.0, []), np.zeros((2, 2, 3)))
    lines = panel.title.split("\n")
    assert lines[:3] == ["finetune:vit-demo at 32 px", "blood-tuned on pixels/blood", "begun from random weights"]
    assert lines[3].startswith("p 0.12 of xxx")


@pytest.mark.parametrize(
    "mode, resize, crop", [("squash", (16, 16), None), ("shortest", (20,), (16, 16)), ("pad", (16, 16), None)]
)
def test_what_the_backbone_saw_of_an_image_is_where_its_pixels_come_from(mode, resize, crop):
    made = Preprocess(mode, resize, crop, "torchvision", "bilinear", True, "down", 1 / 255, None, None, "fused")
    ramp = torch.arange(240, dtype=torch.uint8).expand(3, 80, 240)  # value = column, of an 80×240 image
    seen = made.resized(ramp)[0].float()
    spec = {"preprocess": {**made.to_dict(), "decoding": 1}}
    x, y, width, height = visible_box(spec, np.zeros((80, 240, 3)))
    for column in (2, 8, 13):
        at = (x + width * (column + 0.5) / 16) * 240 - 0.5
        assert seen[8, column] == pytest.approx(at, abs=3)
    inside = (seen.sum(1) > 0).nonzero().flatten()  # padded rows are black
    assert y + height * inside[0].item() / 16 == pytest.approx(0 if mode != "shortest" else y, abs=0.1)
