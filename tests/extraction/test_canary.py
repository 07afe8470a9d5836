"""The canary: drift of the software is found before anything is written, and said; accepting it begins a generation."""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import save_convnext, save_vit
from support.pictures import image_folder, save_picture
from support.plant import flip
from torchvision.transforms.v2 import functional

import featurecache
from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import DamagedFile, Drift
from featurecache.extraction import canary, plan, timings
from featurecache.extraction.canary import PROBES, is_within_tolerance, probes, read_canary, relative_distance
from featurecache.maintenance.repair import repair
from featurecache.outputs import parse
from featurecache.store.reference import canary_path
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import stores

TORCH = version("torch")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    torch.manual_seed(0)  # of 32 numbers rounded to float16 a few more or fewer turn over, by network
    save_vit(tmp_path / "vit")
    image_folder(tmp_path / "data", 6)
    return tmp_path


def extract(home: Path, **options) -> plan.ExtractionResult:  # type: ignore[no-untyped-def]
    options = {"outputs": "cls", "batch_size": 4, "workers": 1, **options}
    return featurecache.extract(home / "data", backbone=str(home / "vit"), cache=home / "cache", **options)


def store_of(home: Path, generation: int = 0):  # type: ignore[no-untyped-def]
    return next(store for store in stores(home / "cache") if store.spec.generation == generation)


def files(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (home / "cache").glob("*/**/*") if path.is_file()}


def update_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions: what a machine remembers of a store is of those that it had."""
    monkeypatch.setattr(canary, "versions", lambda *names: {"torch": TORCH, "numpy": "99"})


def perturb_model(monkeypatch: pytest.MonkeyPatch, relative: float) -> None:
    """Every feature a little off, in a direction of its own, as a new version of a library would."""
    update_libraries(monkeypatch)
    forward = Backbone.forward

    def other(self: Backbone, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        found = forward(self, pixels, want)
        generator = torch.Generator().manual_seed(3)
        return {k: x * (1 + relative * torch.randn(x.shape[1:], generator=generator)) for k, x in found.items()}

    monkeypatch.setattr(Backbone, "forward", other)


def perturb_resize(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """As a new torchvision would: for the checkpoint's own processor too, so that loading notices nothing."""
    update_libraries(monkeypatch)
    resize = functional.resize
    shifted = lambda image, *a, **k: (resize(image, *a, **k).int() + shift).clamp(0, 255).to(image.dtype)  # noqa: E731
    monkeypatch.setattr(functional, "resize", shifted)


def test_the_probes_are_a_jpeg_a_png_sixteen_bits_and_an_odd_size() -> None:
    images = [Image.open(io.BytesIO(data)) for data in probes()]
    assert len(images) == len(PROBES)
    assert [(image.format, image.mode) for image in images] == [
        ("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "I;16"), ("PNG", "L"),
    ]  # fmt: skip
    assert images[0].width > 518 and max(images[1].size) < 64 and all(side % 2 for side in images[3].size)
    assert len(set(probes())) == 4


def test_the_first_run_keeps_pixels_and_outputs_as_the_library_computes_them(home: Path) -> None:
    from transformers import AutoImageProcessor, ViTModel

    extract(home)
    kept = read_canary(store_of(home))
    assert kept is not None and kept.pixels.shape == (4, 3, 32, 32) and sorted(kept.rows) == ["cls", "tokens"]
    assert kept.rows["tokens"].dtype == torch.float16 and torch.equal(kept.rows["cls"], kept.rows["tokens"][:, 0])
    processor, model = AutoImageProcessor.from_pretrained(home / "vit"), ViTModel.from_pretrained(home / "vit").eval()
    photo = Image.open(io.BytesIO(probes()[0]))
    with torch.no_grad():
        expected = model(**processor(photo, return_tensors="pt")).last_hidden_state
    assert relative_distance(kept.rows["tokens"][:1], expected) < 4e-4
    assert kept.made_by["torch"] == TORCH


@pytest.mark.parametrize(
    ("perturb", "amount", "said"),
    [
        (perturb_model, 2e-3, ["cls differs by 0.00", "(at most 0.0002)", "The model of the installed libraries"]),
        (perturb_resize, 2, ["pixels of the probe images differ by 2 of 255", "The preprocessing of the installed"]),
    ],
)
def test_drift_stops_the_run_before_it_writes(home: Path, monkeypatch, perturb, amount, said) -> None:  # type: ignore[no-untyped-def]
    extract(home)
    before = files(home)
    save_picture(home / "data" / "ill" / "new.png", 99)
    perturb(monkeypatch, amount)
    with pytest.raises(Drift) as drift:
        extract(home)
    assert all(words in str(drift.value) for words in [*said, "--accept-drift", f"torch {TORCH}"])
    assert files(home) == before


def test_both_sets_of_versions_are_named(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home)
    (home / "data" / "ill" / "000.png").write_bytes((home / "data" / "well" / "001.png").read_bytes() + b"x")
    perturb_model(monkeypatch, 0.1)
    monkeypatch.setattr(canary, "versions", lambda *names: {"torch": "3.9"})
    with pytest.raises(Drift, match=rf"begun with .*torch {TORCH}.*; here are .*torch 3\.9"):
        extract(home)


@pytest.mark.parametrize(("perturb", "amount"), [(perturb_model, 1e-5), (perturb_resize, 1)])
def test_what_another_machine_may_differ_by_is_no_drift(home: Path, monkeypatch, perturb, amount) -> None:  # type: ignore[no-untyped-def]
    extract(home)
    save_picture(home / "data" / "ill" / "new.png", 99)
    perturb(monkeypatch, amount)
    assert extract(home).computed == 1


def test_a_float32_store_allows_a_twentieth_of_it(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home, dtype="float32")
    save_picture(home / "data" / "ill" / "new.png", 99)
    perturb_model(monkeypatch, 3e-5)
    with pytest.raises(Drift, match=r"at most 1e-05"):
        extract(home, dtype="float32")


def test_bfloat16_may_turn_a_row_by_three_hundredths_of_its_length() -> None:
    spec = ExtractionSpec({}, {}, {}, (8, 8), "as trained", precision="bf16")
    kept = torch.ones(4, 100)
    turned = kept.clone()
    turned[:, :50] += 0.0299
    turned[:, 50:] -= 0.0299
    assert relative_distance(turned, kept) == pytest.approx(0.0299) and is_within_tolerance(spec, turned, kept)
    assert torch.cosine_similarity(turned, kept).min() > 0.999
    assert not is_within_tolerance(spec, turned * 1.02, kept)
    assert not is_within_tolerance(spec, torch.full_like(kept, float("nan")), kept)
    assert not is_within_tolerance(spec, kept[:, :99], kept)


def test_accepted_drift_begins_a_generation_and_mixes_nothing(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home)
    before = files(home)
    save_picture(home / "data" / "ill" / "new.png", 99)
    with monkeypatch.context() as patch:
        perturb_model(patch, 0.01)
        result = extract(home, accept_drift=True)
        assert result.computed == 7 and result.view.parent == store_of(home, 1).path
        assert before.items() <= files(home).items()
        assert extract(home).computed == 0  # the newest generation is the one that goes on
        save_picture(home / "data" / "ill" / "newer.png", 98)
        assert extract(home).computed == 1
    with pytest.raises(Drift):  # the libraries of before, and the store of after
        save_picture(home / "data" / "ill" / "newest.png", 97)
        extract(home)
    back = extract(home, accept_drift=True)  # goes on in the generation that agrees
    assert back.view.parent == store_of(home, 0).path and back.computed == 3
    assert sorted(store.spec.generation for store in stores(home / "cache")) == [0, 1]


def test_accept_drift_without_drift_changes_nothing(home: Path) -> None:
    extract(home)
    assert extract(home, accept_drift=True, outputs="cls,tokens").view.parent == store_of(home, 0).path


def test_a_machine_asks_once_in_each_of_its_states(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    measured = []
    measure = canary._measure
    monkeypatch.setattr(canary, "_measure", lambda *a: measured.append(1) or measure(*a))
    for number in range(3):
        extract(home)
        save_picture(home / "data" / "ill" / f"new{number}.png", 90 + number)
    assert len(measured) == 1  # what the store keeps was made here
    extract(home, outputs="cls,pooler")
    assert len(measured) == 2
    save_picture(home / "data" / "ill" / "last.png", 80)
    update_libraries(monkeypatch)
    extract(home)
    assert len(measured) == 3


def test_an_output_asked_for_later_joins_the_reference(home: Path) -> None:
    extract(home)
    first = read_canary(store_of(home))
    extract(home, outputs="pooler,tokens@-2")
    kept = read_canary(store_of(home))
    assert first is not None and kept is not None
    assert sorted(kept.rows) == ["cls", "pooler", "tokens", "tokens@-2"]
    assert all(torch.equal(kept.rows[name], first.rows[name]) for name in first.rows)


def test_outputs_derived_from_stored_tokens_are_compared_without_the_backbone(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(timings, "BUSY", 1.0)  # no pass is measured again, whatever else this machine does
    extract(home, outputs="tokens,mean")
    save_picture(home / "data" / "ill" / "new.png", 99)
    extract(home, outputs="tokens", name="more")
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("no pass is needed"))
    derive = canary.derive
    monkeypatch.setattr(canary, "derive", lambda *a: derive(*a) * 1.01)
    with pytest.raises(Drift, match=r"mean differs by 0\.01"):
        extract(home, outputs="tokens,mean", name="more")
    monkeypatch.setattr(canary, "derive", derive)
    assert extract(home, outputs="tokens,mean", name="more").derived == 1


def test_a_view_of_what_is_there_asks_nothing_of_the_canary(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home)
    perturb_model(monkeypatch, 0.1)
    assert extract(home, name="again").computed == 0


def test_new_images_for_a_head_are_refused_after_drift(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    view = featurecache.open_view(extract(home).view)
    perturb_model(monkeypatch, 0.01)
    with pytest.raises(Drift):
        featurecache.compute([(home / "data" / view.ids[0]).read_bytes()], like=view, output="cls")


def test_batch_size_and_device_threads_are_no_drift(home: Path) -> None:
    extract(home, batch_size=3)  # fewer than there are probes
    store = store_of(home)
    backbone = load_backbone(str(home / "vit"))
    for size in (1, 4, 7):
        compute = featurecache.extraction.forward.ForwardRunner(backbone, "fp32", torch.device("cpu"), size)  # type: ignore[attr-defined]
        canary.check_canary(store, backbone, compute, [parse("cls")], write=False)


def test_a_cnn_has_one_too(tmp_path: Path) -> None:
    save_convnext(tmp_path / "vit")
    image_folder(tmp_path / "data", 3)
    extract(tmp_path, outputs="gap")
    kept = read_canary(store_of(tmp_path))
    assert kept is not None and sorted(kept.rows) == ["gap", "tokens"]


@pytest.mark.parametrize("place", [100, -1])
def test_a_damaged_reference_is_no_drift_and_repair_makes_it_again(home: Path, place: int) -> None:
    extract(home)
    path = canary_path(store_of(home))
    flip(path, place)
    save_picture(home / "data" / "ill" / "new.png", 99)
    with pytest.raises(DamagedFile, match=r"canary\.safetensors .*featurecache repair"):
        extract(home)
    assert repair(home / "cache")[0].replaced == (path,)
    assert json.loads(json.dumps(read_canary(store_of(home)).made_by))["torch"] == TORCH  # type: ignore[union-attr]
    assert extract(home).computed == 1


def test_repair_makes_no_reference_on_a_machine_that_has_drifted(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home, outputs="tokens")
    path = canary_path(store_of(home))
    path.write_bytes(b"nonsense")
    perturb_model(monkeypatch, 0.01)
    with pytest.raises(Drift, match="holds other rows than this machine computes"):
        repair(home / "cache")
    assert path.read_bytes() == b"nonsense"


def test_apart_is_relative_and_by_row() -> None:
    kept = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    now = torch.tensor([[3.0, 4.5], [30.0, 40.5]])
    assert relative_distance(now, kept) == pytest.approx(0.5 / 5)
    assert relative_distance(kept.clone(), kept) == 0 and relative_distance(kept[:1], kept) == np.inf
