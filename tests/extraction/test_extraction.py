"""Extraction end to end: stored rows against what the libraries give one image at a time, and how runs continue."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from support import checkpoints
from support.checkpoints import save_resnet, save_siglip, save_vit
from support.pictures import image_folder, picture, save_picture
from torchvision import transforms

import featurecache
from featurecache.backbones.base import Backbone
from featurecache.errors import BadOption, CannotWrite, NotInCache, SourceError
from featurecache.extraction import plan
from featurecache.extraction import run as extraction_run
from featurecache.store import store
from featurecache.store.view import View

HALF = 2.0**-11  # one rounding to float16, relative


def run(data: Path, backbone: Path | str, cache: Path, **options) -> View:  # type: ignore[no-untyped-def]
    options = {"workers": 2, **options}
    result = featurecache.extract(data, backbone=str(backbone), cache=cache, **options)
    return featurecache.open_view(result.view)


def pil(view: View, data: Path) -> list[Image.Image]:
    return [Image.open(data / name).convert("RGB") for name in view.ids]


def error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 error of a row [n, ...]."""
    difference = (rows.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


@torch.no_grad()
def reference(folder: Path, kind: str, pooled: str | None, image: Image.Image) -> dict[str, torch.Tensor]:
    """The library's own lines: processor → model → last_hidden_state, one PIL image at a time."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    given = getattr(transformers, kind).from_pretrained(folder).eval()(**processor(images=image, return_tensors="pt"))
    last = given.last_hidden_state[0]
    rows = {"tokens": last.flatten(1).T if last.dim() == 3 else last}  # CNN: [C,h,w] → [h·w,C]
    if pooled:
        rows[pooled] = given.pooler_output[0].flatten()
    if (last.dim() == 2 and pooled != "pooler") or kind == "ViTModel":
        rows["cls"] = rows["tokens"][0]
    return rows


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str, str | None]] = {  # how saved; class and vector of the library
    "vit": (save_vit, "ViTModel", "pooler"),
    "deit": (checkpoints.save_deit, "DeiTModel", None),
    "dinov2": (checkpoints.save_dinov2, "Dinov2Model", None),
    "dinov2-registers": (partial(checkpoints.save_dinov2, registers=4), "Dinov2WithRegistersModel", None),
    "clip": (checkpoints.save_clip_vision, "CLIPVisionModel", "pooler"),
    "beit": (checkpoints.save_beit, "BeitModel", "pooler"),
    "siglip": (save_siglip, "SiglipVisionModel", "pooler"),
    "resnet": (save_resnet, "ResNetModel", "gap"),
    "convnext": (checkpoints.save_convnext, "ConvNextModel", "gap"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return image_folder(tmp_path_factory.mktemp("data") / "pictures", 9)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_rows_are_what_the_library_gives_one_image_at_a_time(tmp_path, images, name, dtype):
    save, *library = CHECKPOINTS[name]
    folder = save(tmp_path / name)
    pictures = (Image.open(path).convert("RGB") for path in sorted(images.rglob("*.png")))
    expected = [reference(folder, *library, image) for image in pictures]
    view = run(images, folder, tmp_path / "cache", dtype=dtype, outputs=",".join(expected[0]))
    for output in expected[0]:
        wanted = torch.stack([row[output] for row in expected])
        rows = view.tensor(output)
        if dtype == "float32":
            assert error(rows, wanted) <= 1e-5
        else:
            assert ((rows.double() - wanted).abs() <= HALF * wanted.abs() + 1e-5 * wanted.abs().max() + 2**-25).all()


def test_the_articles_lines_for_vit_cls_tokens_and_257(tmp_path: Path, images: Path, vit: str) -> None:
    view = run(images, vit, tmp_path / "cache", outputs="cls,tokens,tokens-257,tokens-5x6,mean")
    processor = transformers.ViTImageProcessor.from_pretrained(vit)
    model = transformers.ViTModel.from_pretrained(vit).eval()
    for k, image in enumerate(pil(view, images)):
        with torch.no_grad():
            last = model(**processor(images=image, return_tensors="pt")).last_hidden_state[0]
        resized = transforms.Resize((last.shape[1], 257))(last.T[None])[0].T
        grid = last[1:].T.unflatten(1, (4, 4))[None]
        patches = torch.nn.functional.interpolate(grid, (5, 6), mode="bilinear", antialias=True)[0].flatten(1).T
        derived = {"tokens-257": resized, "mean": last[1:].mean(0), "tokens-5x6": torch.cat([last[:1], patches])}
        assert torch.allclose(view.tensor("cls", [k])[0].float(), last[0], rtol=HALF, atol=1e-5)
        for name, wanted in derived.items():
            found = view.tensor(name, [k])[0].float()
            assert (found - wanted).abs().max() <= 2**-10 * last.abs().max()


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_torchvision_networks_untrained_give_their_own_features_and_logits(tmp_path, images, name):
    view = run(images, f"torchvision:{name}", tmp_path, random_weights=True, dtype="float32", image_size=64)
    network = featurecache.load_backbone(f"torchvision:{name}", random_weights=True, image_size=64)
    library = network.model.network
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    preset.crop_size, preset.resize_size = [64], [round(preset.resize_size[0] * 64 / preset.crop_size[0])]
    logits, gaps = [], view.tensor("gap")
    for path in sorted(images.rglob("*.png")):
        with torch.no_grad():
            logits.append(library(preset(Image.open(path).convert("RGB"))[None])[0])
    head = library.fc if name == "resnet50" else library.classifier
    assert error(head(gaps).detach(), torch.stack(logits)) <= 1e-5
    assert error(view.tensor("mean"), gaps) <= 1e-5  # both networks pool their last map by its mean


def test_derived_outputs_have_the_same_bytes_together_and_later(tmp_path: Path, images: Path) -> None:
    folder, names = save_vit(tmp_path / "vit"), ["cls", "mean", "tokens-257", "tokens-10", "tokens-3x5"]
    together = run(images, folder, tmp_path / "a", outputs=["tokens", *names])
    run(images, folder, tmp_path / "b", outputs="tokens")
    result = featurecache.extract(images, backbone=str(folder), cache=tmp_path / "b", outputs=names)
    assert (result.computed, result.derived) == (0, 9)
    later = featurecache.open_view(result.view)
    run(images, folder, tmp_path / "c", outputs=names)  # without tokens being kept at all
    without = featurecache.open_view(cache=tmp_path / "c")
    assert not (without.store / "tokens").exists()
    for other in (later, without, View(later.path)):
        assert all(torch.equal(together.tensor(name), other.tensor(name)) for name in names)


def test_earlier_blocks_have_the_final_norm_and_last2_is_concatenated(tmp_path: Path, images: Path, vit: str) -> None:
    view = run(images, vit, tmp_path / "c", outputs="tokens,tokens@-2,cls@-2,tokens@last2,mean@last2", dtype="float32")
    processor = transformers.ViTImageProcessor.from_pretrained(vit)
    model = transformers.ViTModel.from_pretrained(vit).eval()
    for k, image in enumerate(pil(view, images)):
        with torch.no_grad():
            given = model(**processor(images=image, return_tensors="pt"), output_hidden_states=True)
            before = model.layernorm(given.hidden_states[-2])
        both = torch.cat([before, given.last_hidden_state], -1)
        assert error(view.tensor("tokens@-2", [k]), before) <= 1e-5
        assert error(view.tensor("tokens@last2", [k]), both) <= 1e-5
        assert error(view.tensor("cls@-2", [k]), before[:, 0]) <= 1e-5
        assert error(view.tensor("mean@last2", [k]), both[:, 1:].mean(1)) <= 1e-5


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_decode_workers_and_their_order_do_not_change_a_byte(tmp_path, monkeypatch, images, workers, vit):
    plain = run(images, vit, tmp_path / "plain", workers=1)
    decode = featurecache.images.decoding.decode

    def jittered(data):  # type: ignore[no-untyped-def]
        time.sleep(random.random() * 0.02)
        return decode(data)

    monkeypatch.setattr("featurecache.images.decoding.decode", jittered)
    shaken = run(images, vit, tmp_path / "shaken", workers=workers)
    for output in ("cls", "tokens"):
        assert torch.equal(plain.tensor(output), shaken.tensor(output))
    assert shaken.ids.tolist() == plain.ids.tolist()


def test_every_forward_pass_has_the_stores_batch_size_where_a_row_alone_has_other_bits(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch, images: Path
) -> None:
    monkeypatch.setattr(extraction_run.ForwardRunner, "_rows_are_independent", lambda *_: False)
    seen, forward = [], Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, x, want: seen.append(len(x)) or forward(self, x, want))
    view = run(images, save_vit(tmp_path / "vit"), tmp_path / "c", batch_size=4, outputs="cls")
    featurecache.compute([(images / view.ids[0]).read_bytes()], like=view, output="cls")
    assert seen == [4] * 5  # the probes, nine images; and one


def test_the_batch_size_of_the_first_run_stays_the_stores(tmp_path: Path, images: Path, vit: str) -> None:
    run(images, vit, tmp_path / "c", batch_size=4, outputs="cls")
    assert plan.prepare(images, backbone=vit, cache=tmp_path / "c").plan["batch_size"] == 4
    with pytest.raises(BadOption, match="computes in batches of 4"):
        run(images, vit, tmp_path / "c", batch_size=8)


def test_the_same_image_twice_or_in_two_datasets_is_computed_once(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "one", 6)
    save_picture(data / "ill" / "copy.png", 0, width=30, height=44)
    first = featurecache.extract(data, backbone=vit, cache=tmp_path / "c")
    assert (first.images, first.computed) == (7, 6)
    (tmp_path / "two" / "other").mkdir(parents=True)
    for path in data.rglob("*.png"):
        path.rename(tmp_path / "two" / "other" / f"renamed-{path.name}")
    second = featurecache.extract(tmp_path / "two", backbone=vit, cache=tmp_path / "c")
    assert (second.images, second.computed) == (7, 0)


def test_extracting_again_keeps_and_completes_the_outputs_a_view_had(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "d", 5)
    run(data, vit, tmp_path / "c", outputs="pooler")
    image_folder(data, 8)
    view = run(data, vit, tmp_path / "c", outputs="cls")
    assert set(view.outputs) == {"pooler", "cls"}
    assert len(view.tensor("pooler")) == len(view) == 8


def test_another_dataset_with_the_same_names_does_not_replace_a_view_but_the_same_moved_does(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "a" / "scans", 6)
    options = {"random_weights": True, "outputs": "cls"}
    run(data, "vit-demo", tmp_path / "c", **options)
    shutil.copytree(data, tmp_path / "moved" / "scans")
    assert len(run(tmp_path / "moved" / "scans", "vit-demo", tmp_path / "c", **options)) == 6
    other = tmp_path / "other" / "scans"
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        save_picture(other / path.relative_to(data), 100 + number)
    with pytest.raises(BadOption, match=r"holds 6 images of which 0 are in .*--name"):
        run(other, "vit-demo", tmp_path / "c", **options)


def test_another_dataset_does_not_replace_a_view_of_the_same_name(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "a" / "scans", 6)
    other = image_folder(tmp_path / "b" / "scans", 6, classes=("x", "y"))
    run(data, vit, tmp_path / "c", outputs="cls")
    with pytest.raises(BadOption, match=r"is another dataset.*--name"):
        run(other, vit, tmp_path / "c", outputs="cls")
    assert len(run(other, vit, tmp_path / "c", outputs="cls", name="others")) == 6
    excerpt = image_folder(tmp_path / "e" / "scans", 2)  # the same names, but most of the view's are not there
    with pytest.raises(BadOption, match="is another dataset"):
        run(excerpt, vit, tmp_path / "c", outputs="cls")


def test_an_unreadable_image_is_named_and_every_other_is_kept(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "d", 6)
    (data / "ill" / "000.png").write_text("<!DOCTYPE html>")
    (data / "well" / "empty.png").touch()
    view = run(data, vit, tmp_path / "c")
    assert len(view) == 5
    assert [entry["id"] for entry in view.failed] == ["ill/000.png", "well/empty.png"]
    assert "<!DOCTYPE" in view.failed[0]["reason"]
    clean = run(data, vit, tmp_path / "clean", on_error="skip")
    assert torch.equal(view.tensor("tokens"), clean.tensor("tokens"))


def test_on_error_fail_stops_at_the_first_and_keeps_what_is_done(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "d", 12)
    save_picture(data / "well" / "zz.png", 99)
    good = (data / "well" / "zz.png").read_bytes()
    (data / "well" / "zz.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(SourceError, match=r"well/zz\.png: .*--on-error report"):
        run(data, vit, tmp_path / "c", on_error="fail", batch_size=4)
    assert featurecache.extract(data, backbone=vit, cache=tmp_path / "c").computed == 0


def test_no_readable_image_at_all_is_an_error_and_no_view(tmp_path: Path) -> None:
    (tmp_path / "d" / "x").mkdir(parents=True)
    (tmp_path / "d" / "x" / "a.png").write_text("text")
    with pytest.raises(SourceError, match="none of 1 images could be read"):
        run(tmp_path / "d", save_vit(tmp_path / "vit"), tmp_path / "c")
    assert list((tmp_path / "c").rglob("*.h5")) == []


@pytest.mark.parametrize("batch", [8, 1])  # of one no row of a batch can be stored
def test_values_that_do_not_fit_float16_are_named_and_never_stored(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch, images: Path, batch: int
) -> None:
    forward = featurecache.load_backbone("vit-demo", random_weights=True).__class__.forward

    def large(self, pixels, want):  # type: ignore[no-untyped-def]
        found = forward(self, pixels, want)
        return {
            key: rows * torch.where(pixels.mean((1, 2, 3)) > 0, 1e6, 1.0)[:, None, None] for key, rows in found.items()
        }

    monkeypatch.setattr("featurecache.backbones.base.Backbone.forward", large)
    view = run(images, save_vit(tmp_path / "vit"), tmp_path / "c", batch_size=batch)
    assert 0 < len(view.failed) < 9
    assert all("try --dtype float32" in entry["reason"] and "tokens" in entry["reason"] for entry in view.failed)
    assert torch.isfinite(view.tensor("tokens")).all()
    assert len(run(images, tmp_path / "vit", tmp_path / "c", dtype="float32")) == 9


def test_a_file_that_changes_while_it_is_read_is_not_stored_under_its_old_digest(tmp_path: Path, vit: str) -> None:
    data = image_folder(tmp_path / "d", 4)
    prepared = plan.prepare(data, backbone=vit, cache=tmp_path / "c")
    save_picture(data / "ill" / "000.png", 77)
    view = View(prepared.run().view)
    assert [(entry["id"], "changed" in entry["reason"]) for entry in view.failed] == [("ill/000.png", True)]


def test_preparing_writes_nothing(tmp_path: Path, images: Path) -> None:
    prepared = plan.prepare(images, backbone="vit-demo", random_weights=True, cache=tmp_path / "c")
    assert prepared.to_compute == 9
    assert prepared.new_bytes == prepared.bytes_of() == 9 * (65 + 1) * 96 * 2
    assert not (tmp_path / "c").exists()


def test_what_the_disk_cannot_hold_is_refused_before_anything_is_computed(tmp_path, monkeypatch, images):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CannotWrite, match=r"has 1 kB free.*--outputs"):
        run(images, save_vit(tmp_path / "vit"), tmp_path / "c")


def test_a_run_interrupted_by_ctrl_c_keeps_what_it_had_and_continues(tmp_path: Path, monkeypatch, images: Path) -> None:  # type: ignore[no-untyped-def]
    folder, calls = save_vit(tmp_path / "vit"), []
    call = extraction_run.ForwardRunner.__call__

    def interrupted(self, *arguments, **how):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3:  # after the canary and one batch
            raise KeyboardInterrupt
        return call(self, *arguments, **how)

    monkeypatch.setattr(extraction_run.ForwardRunner, "__call__", interrupted)
    with pytest.raises(extraction_run.Stopped, match="4 images are safe; the same command continues"):
        run(images, folder, tmp_path / "c", batch_size=4)
    monkeypatch.undo()
    result = featurecache.extract(images, backbone=str(folder), cache=tmp_path / "c")
    assert result.computed == 5
    clean = run(images, folder, tmp_path / "clean", batch_size=4)
    assert torch.equal(View(result.view).tensor("tokens"), clean.tensor("tokens"))


def test_new_images_are_computed_after_the_store_is_gone(tmp_path: Path, images: Path) -> None:
    view = run(images, save_vit(tmp_path / "vit"), tmp_path / "c", outputs="cls", batch_size=8)
    before = view.tensor("cls", rows=[0])
    shutil.rmtree(view.store)
    rows, _ = featurecache.compute([(images / view.ids[0]).read_bytes()], like=view, output="cls")
    assert torch.equal(rows, before)


def test_new_images_through_compute_are_what_the_cache_holds(tmp_path: Path, images: Path) -> None:
    view = run(images, save_vit(tmp_path / "vit"), tmp_path / "c", outputs="cls,tokens,pooler")
    data = [(images / name).read_bytes() for name in view.ids]
    for output in ("cls", "tokens", "pooler", "tokens-257"):
        with pytest.raises(BadOption, match=r"an image is (int|PosixPath); expected encoded bytes, or arrays"):
            featurecache.compute(data[0] if output == "cls" else [images / view.ids[0]], like=view, output=output)
        rows, failed = featurecache.compute([*data, b"nonsense"], like=view, output=output)
        assert torch.equal(rows, view.tensor(output))
        assert [index for index, _ in failed] == [9]


def test_weights_that_moved_are_given_and_other_weights_refused(tmp_path: Path, images: Path) -> None:
    view = run(images, save_vit(tmp_path / "vit"), tmp_path / "c", outputs="cls")
    moved = (tmp_path / "vit").rename(tmp_path / "moved")
    data = [(images / view.ids[0]).read_bytes()]
    rows, _ = featurecache.compute(data, like=view, output="cls", weights=str(moved))
    assert torch.equal(rows, view.tensor("cls", [0]))
    with pytest.raises(NotInCache, match="is not the backbone"):
        featurecache.compute(data, like=view, output="cls", weights=str(save_vit(tmp_path / "other", seed=9)))


def test_precision_auto_takes_that_of_the_store_that_holds_the_images(tmp_path: Path, images: Path, vit: str) -> None:
    run(images, vit, tmp_path / "c", precision="bf16", outputs="cls")
    again = plan.prepare(images, backbone=vit, cache=tmp_path / "c", outputs="cls")
    assert (again.spec.precision, again.to_compute) == ("bf16", 0)
    assert again.precision_reason == "as these images are stored already"


def test_bf16_stays_near_fp32(tmp_path: Path, images: Path, vit: str) -> None:
    exact, fast = (run(images, vit, tmp_path / "c", precision=p, outputs="tokens") for p in ("fp32", "bf16"))
    assert 1e-4 < error(fast.tensor("tokens"), exact.tensor("tokens")) < 3e-2


def test_shards_hold_256_mib_grow_when_there_are_many_and_stay_small_on_a_slow_machine() -> None:
    row = 197 * 768 * 2
    assert store.rows_per_shard(10_000, row) == (256 << 20) // row
    assert store.rows_per_shard(10**6, 768 * 2) == 16_384
    assert store.rows_per_shard(10**6, row) == 2000
    assert store.rows_per_shard(10**9, row) == (4 << 30) // row
    assert store.rows_per_shard(10_000, row, rate=0.5, batch=8) == 56
    assert store.rows_per_shard(10_000, row, rate=0.001, batch=8) == 8


def test_a_view_agrees_with_its_source_in_plain_h5py(tmp_path: Path, monkeypatch, vit: str) -> None:  # type: ignore[no-untyped-def]
    grey = [np.asarray(picture(k, 9, 9, "L")) for k in range(4)]
    arrays = {f"{s}_{what}": (np.stack(grey) if what == "images" else np.array([[0], [1], [1], [0]], np.uint8))
              for s in ("train", "val", "test") for what in ("images", "labels")}  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)
    image_folder(tmp_path / "tree", 4)
    (tmp_path / "table.csv").write_text("path,label,patient,split,age\n" + "".join(
        f"tree/{p.relative_to(tmp_path / 'tree')},{p.parent.name},p{k},{'train' if k else 'test'},{40 + k}\n"
        for k, p in enumerate(sorted((tmp_path / "tree").rglob("*.png")))
    ))  # fmt: skip
    monkeypatch.chdir("/")
    for data in ("set.npz", "tree", "table.csv"):
        source = featurecache.open_source(tmp_path / data)
        view = run(tmp_path / data, vit, tmp_path / "c", outputs="cls")
        with h5py.File(view.path) as file:
            assert file["ids"].asstr()[...].tolist() == list(source.ids)
            assert file["labels"][...].tolist() == source.labels.tolist()
            assert file["splits"].asstr()[...].tolist() == list(source.splits)
            assert np.array_equal(file["cls"][...], view.array("cls"))
            assert ("groups" in file) == (data == "table.csv")
            if data == "table.csv":
                assert file["meta/age"][...].tolist() == [40, 41, 42, 43]
