"""Networks that are trained on: what is trained, what is kept for ``extract``, and the same by the libraries alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import checkpoints
from support.gradients import check_cam_layer
from support.pictures import image_folder
from support.tuning import FOLDERS, close, made, pixels, saved, trained, vit
from torch import nn

import featurecache
import heads
from featurecache.backbones import load_backbone, load_without_weights
from featurecache.backbones.processors import check_processor, from_processor
from featurecache.errors import BadOption, OutputRefused, RunError, UnknownBackbone, UnknownHead
from featurecache.images.decoding import decode
from featurecache.images.preprocessing import Preprocess
from heads import api
from heads.api import train_baseline
from heads.metrics.calibration import Calibration, probabilities
from heads.models import finetune
from heads.models.catalogue import baseline_info
from heads.models.finetune import (
    FineTuned,
    classifier_class,
    classifier_state,
    extract_options,
    load_finetuned,
    processor_of,
    save_backbone,
)
from heads.runs.run import pixels_of
from heads.settings import Settings

SELDOM = ("beit", "convnext")


@pytest.mark.parametrize("kind", [k if k not in SELDOM else pytest.param(k, marks=pytest.mark.slow) for k in FOLDERS])
def test_every_trained_weight_gets_a_gradient_and_the_folder_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = trained(made(f"finetune:hf:{FOLDERS[kind](tmp_path / 'begin')}"))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    again, x = saved(model, tmp_path), pixels(model, seed=2)
    close(again(x), model(x))
    assert extract_options(tmp_path / "tuned") == f"--backbone hf:{tmp_path / 'tuned'}"


def test_a_backbone_whose_features_were_computed_before_can_be_trained_on(tmp_path: Path) -> None:
    """transformers keeps BEiT's table of positions for the whole process, from whichever pass came first."""
    folder = checkpoints.save_beit(tmp_path / "begin", patch_size=4)  # a table of this test alone
    featurecache.extract(image_folder(tmp_path / "images", 2), backbone=f"hf:{folder}", cache=tmp_path / "cache")
    trained(made(f"finetune:hf:{folder}"))


@pytest.mark.parametrize("kind", ["deit", "dinov2", "siglip", "resnet"])
def test_grad_cam_finds_a_layer_whose_places_all_have_a_gradient(kind: str, tmp_path: Path) -> None:
    model = made(f"finetune:hf:{FOLDERS[kind](tmp_path)}").eval()
    shape = check_cam_layer(model, pixels(model, 2))
    assert (model.cam_grid is None) == (kind == "resnet") == (shape[1:] == (24, *model.grid))


CALIBRATION = Calibration((0.3, -0.1, 0.0), 1.7)
NAMES = ("bacteria", "normal", "virus")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("vit", "ViTForImageClassification"), ("deit", "DeiTForImageClassification"),
     ("resnet", "ResNetForImageClassification"), ("dinov2", None), ("siglip", None)],
)  # fmt: skip
def test_transformers_loads_a_tuned_network_with_its_calibrated_classifier(kind, name, tmp_path: Path) -> None:
    model = trained(made(f"finetune:hf:{FOLDERS[kind](tmp_path / 'begin')}"))
    save_backbone(model, tmp_path / "tuned", classes=NAMES, calibration=CALIBRATION)
    x = pixels(model, seed=2)
    close(load_finetuned(tmp_path / "tuned", classifier_state(model))(x), model(x))
    assert classifier_class(tmp_path / "tuned") == name
    if name is None:  # whose classifier takes other vectors than ours
        return
    own, info = getattr(transformers, name).from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values()) and own.config.id2label == dict(enumerate(NAMES))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "tuned")
    check_processor(model.preprocess, processor, "the one beside it")
    logits = own.eval()(model.preprocess.normalised(x)).logits
    close(logits, torch.from_numpy(CALIBRATION(model(x).detach().numpy())).float())


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_pipeline_of_transformers_says_what_predict_says(multilabel, tmp_path: Path) -> None:
    model = vit(tmp_path / "begin").eval()
    save_backbone(model, tmp_path / "tuned", classes=NAMES, multilabel=multilabel, calibration=CALIBRATION)
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "tuned"), device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    x = model.preprocess.resized(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    z = model(x[None].float()).detach().numpy()
    p = probabilities("multilabel" if multilabel else "multiclass", CALIBRATION(z))[0]
    got = {each["label"]: each["score"] for each in pipe(image)}
    assert got == pytest.approx(dict(zip(NAMES, p, strict=True)), abs=1e-5)


def test_the_published_vit_has_as_many_trained_parameters_as_published() -> None:
    backbone = load_without_weights("vit-in1k")
    with torch.device("meta"):
        model = FineTuned(backbone, 6, {})
    assert sum(p.numel() for p in model.parameters()) == 85_803_270
    assert all(p.requires_grad for p in model.parameters())


def test_extract_takes_the_folder_and_stores_the_features_of_the_tuned_network(tmp_path: Path) -> None:
    model = trained(vit(tmp_path / "begin"))
    words = save_backbone(model, tmp_path / "tuned").split()
    data = image_folder(tmp_path / "images", 6)
    options = {"outputs": ["cls"], "dtype": "float32", "precision": "fp32", "device": "cpu"}
    featurecache.extract(str(data), backbone=words[1], cache=tmp_path / "cache", name="set", **options)
    view = featurecache.open_view("set", cache=tmp_path / "cache")
    source = featurecache.open_source(str(data))
    images = torch.stack([model.preprocess.resized(decode(source.read(row))) for row in range(6)])
    close(view.tensor("cls"), model.vectors(model.preprocess.normalised(images)).detach())
    logits = view.tensor("cls") @ model.classifier.weight.T + model.classifier.bias
    close(logits, model(images.float()))


SLOW = ("densenet121", "resnet50", "timm:test_vit", "timm:test_resnet")


@pytest.mark.parametrize(
    "name", ["torchvision:shufflenet_v2_x0_5", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_network_of_a_library_is_trained_and_kept_as_a_file_of_weights(name: str, tmp_path: Path) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = trained(made(f"finetune:{name}", random_weights=True, image_size=64), 1)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not [key for key, _ in model.named_parameters() if ".fc." in key]
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(norm.running_mean.any() for norm in norms), "BatchNorm was in training"
    words = save_backbone(model, tmp_path / "tuned").split()
    assert words[::2] == ["--backbone", "--weights", "--image-size"] and words[5] == "64"
    x = pixels(model, seed=2)
    given = model.preprocess.normalised(x)
    close(load_finetuned(tmp_path / "tuned", classifier_state(model))(x), model(x))
    backbone = load_backbone(words[1], weights=words[3], image_size=64)
    found = backbone.forward(given, {"tokens", model.vector} - {"cls"})
    vectors = found["tokens"][:, 0] if model.vector == "cls" else found[model.vector]
    # extract computes a deep CNN in another memory format, and untrained layers magnify the last bits
    bound = 1e-3 if name in ("densenet121", "resnet50") else 1e-5
    assert torch.linalg.norm(vectors - model.vectors(given)) < bound * torch.linalg.norm(vectors)
    check_cam_layer(model, x)


def test_another_image_size_is_said_to_extract(tmp_path: Path) -> None:
    model = vit(tmp_path / "begin", image_size=48).eval()
    again, x = saved(model, tmp_path), pixels(model)
    assert extract_options(tmp_path / "tuned").endswith(" --image-size 48")
    assert x.shape[2:] == (48, 48) and model.cam_grid == (1, 6, 6)
    close(again(x), model(x))


def test_what_was_not_tuned_with_the_rest_is_not_kept(tmp_path: Path) -> None:
    """CLIP's norm behind the class token fits the tokens of before."""
    model = trained(made(f"finetune:hf:{checkpoints.save_clip_vision(tmp_path / 'begin')}"))
    save_backbone(model, tmp_path / "tuned")
    load_backbone(f"hf:{tmp_path / 'begin'}").offers("pooler")
    with pytest.raises(OutputRefused, match="pooler"):
        load_backbone(f"hf:{tmp_path / 'tuned'}").offers("pooler")


def test_dropout_is_as_the_checkpoint_has_it_and_off_when_judged(tmp_path: Path) -> None:
    folder = checkpoints.save_vit(tmp_path, hidden_dropout_prob=0.5)
    model = made(f"finetune:hf:{folder}")
    x = pixels(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert made(f"finetune:hf:{folder}", dropout=0.2).dropout.p == 0.2


def test_the_generator_decides_the_new_parts(tmp_path: Path) -> None:
    name = f"finetune:hf:{checkpoints.save_vit(tmp_path)}"
    a, b, c = (made(name, generator=torch.Generator().manual_seed(seed), rlrr=True) for seed in (1, 1, 2))
    states = [torch.cat([value.flatten() for value in model.state_dict().values()]) for model in (a, b, c)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("vit", {"lora": 0}, "at least 1"),
        ("vit", {"lora": 4, "rlrr": True}, "give one of them"),
        ("vit", {"dropout": 1.0}, "below 1"),
        ("vit", {"image_size": 33}, "multiple of the patch"),
        ("resnet", {"lora": 4}, "plain transformers.*is none"),
        ("resnet", {"rlrr": True}, "plain transformers.*is none"),
    ],
)
def test_options_that_cannot_be_are_refused(kind: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=said):
        made(f"finetune:hf:{FOLDERS[kind](tmp_path)}", **options)


@pytest.mark.slow
def test_a_vit_of_torchvision_at_another_size_is_refused_for_it_could_not_be_read_back() -> None:
    with pytest.raises(BadOption, match="could not be loaded again"):
        made("finetune:torchvision:vit_b_32", random_weights=True, image_size=64)


@pytest.mark.parametrize("name", ["", "python:mine:net"])
def test_names_that_are_no_backbone_to_tune(name: str) -> None:
    with pytest.raises(UnknownHead, match="finetune:<backbone>"):
        baseline_info(f"finetune:{name}")
    with pytest.raises(UnknownBackbone, match="Near: resnet50"):
        baseline_info("finetune:resnet5O")


def test_the_record_says_the_checkpoints_own_pixels_and_the_published_settings(tmp_path: Path) -> None:
    info = baseline_info(f"finetune:hf:{checkpoints.save_dinov2(tmp_path)}")
    assert info.image_size == 42 and info.preprocess(42).resize == (48,) and info.preprocess(70).resize == (80,)
    settings = Settings.of("finetune:vit-in1k", **info.settings)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.weight_decay) == (20, 16, 2e-5, 0.01)
    assert (settings.optimizer, settings.select, settings.balance) == ("adamw", "loss", False)
    assert baseline_info("finetune:vit-in1k", adapted=True).settings == {**info.settings, "lr": 1e-3}


def test_a_folder_that_holds_another_checkpoint_by_now_is_read_anew(tmp_path: Path) -> None:
    name = f"finetune:hf:{checkpoints.save_vit(tmp_path)}"
    assert baseline_info(name).image_size == 32
    checkpoints.save_vit(tmp_path, image_size=16)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    assert baseline_info(name).image_size == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"provider": "python", "name": "python:os:getcwd"}, "no proper provider"),
        ({"provider": "torchvision", "name": "python:os:getcwd"}, "no proper provider"),
        ({"image_size": "32"}, "no proper image_size"),
        ({"format": 9}, "no proper format"),
        ({"vector": "pooler"}, "its classifier takes a pooler"),
        ({"image_size": 33}, "multiple of the patch"),
    ],
)
def test_a_record_that_was_changed_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = vit(tmp_path / "begin")
    saved(model, tmp_path)
    record = tmp_path / "tuned" / "finetuned.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(RunError, match=said):
        load_finetuned(tmp_path / "tuned", classifier_state(model))


def test_a_classifier_of_another_network_or_none_is_refused(tmp_path: Path) -> None:
    model = vit(tmp_path / "begin")
    save_backbone(model, tmp_path / "tuned")
    state = classifier_state(model)
    for wrong, classes, said in (
        ({}, None, "is missing"),
        ({**state, "classifier.bias": torch.zeros(2)}, None, "a bias for each"),
        ({**state, "classifier.weight": torch.zeros(3, 7)}, None, "takes a cls of 7"),
        (state, 4, "of 3 classes; expected 4"),
    ):
        with pytest.raises(RunError, match=said):
            load_finetuned(tmp_path / "tuned", wrong, classes=classes)
    with pytest.raises(RunError, match="no fine-tuned network"):
        extract_options(tmp_path / "begin")


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "squash", "resize": (32, 32)},
        {"mode": "squash", "resize": (36, 36), "crop": (32, 32), "interpolation": "bicubic"},
        {"mode": "shortest", "resize": (40,), "crop": (32, 32), "interpolation": "nearest-exact", "antialias": True},
        {"mode": "none", "resize": (), "crop": (32, 32)},
        {"mode": "squash", "resize": (32, 32), "mean": None, "std": None},
    ],
)
def test_a_processor_that_is_written_does_what_the_preprocessing_did(settings: dict[str, Any]) -> None:
    plain = {
        "crop": None, "kernel": "torchvision", "interpolation": "bilinear", "antialias": True, "crop_rounding": "down",
        "scale": 1 / 255, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "arithmetic": "fused",
    }  # fmt: skip
    preprocess = Preprocess(**{**plain, **settings})
    processor = processor_of(preprocess)
    assert from_processor(processor) == preprocess
    if preprocess.interpolation != "nearest-exact":
        check_processor(preprocess, processor, "ours")


def logged(log: list[str], name: str, function: Any) -> Any:
    return lambda *given, **options: log.append(name) or function(*given, **options)


def test_what_a_training_begins_from_is_loaded_once_and_before_the_images(tmp_path: Path, monkeypatch: Any) -> None:
    folder, log = checkpoints.save_vit(tmp_path / "begin"), list[str]()
    for module, name in ((finetune, "load_backbone"), (api, "open_pixels")):
        monkeypatch.setattr(module, name, logged(log, name, getattr(module, name)))
    lines: list[str] = []
    options = {"epochs": 1, "rlrr": True, "report": False, "device": "cpu", "say": lines.append}
    run = train_baseline(str(image_folder(tmp_path / "data")), f"finetune:hf:{folder}", out=tmp_path / "run", **options)
    assert log == ["load_backbone", "open_pixels"]
    model = made(f"finetune:hf:{folder}", classes=len(run.classes), rlrr=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    assert any(f"{whole:,} parameters, of which {trained:,} are trained" in line for line in lines)


def test_the_tuned_network_that_a_sweep_chose_needs_no_longer_what_it_began_from(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, data = checkpoints.save_vit(tmp_path / "begin"), str(image_folder(tmp_path / "data"))
    asked = {"epochs": 1, "lora": 2, "device": "cpu", "split_seed": 1}
    found = heads.ablate(None, f"finetune:hf:{folder}", data=data, lr="1e-3,1e-2", out=tmp_path / "sweep", **asked)
    (run,) = (run for family in found.families for run in family.runs)
    alone = train_baseline(
        data, run.head, out=tmp_path / "alone", report=False, select="auroc", lr=run.config["settings"]["lr"], **asked
    )
    for file in ("head.safetensors", "backbone/model.safetensors", "backbone/finetuned.json"):
        assert (run.path / file).read_bytes() == (alone.path / file).read_bytes(), file
    shutil.rmtree(folder)
    again = heads.load_run(run.path)
    images = pixels_of(again)
    rows = [row for row, name in enumerate(images.ids) if name in run.answers("test").ids]
    z = again.logits(images.tensor(run.output, rows))
    # Before the division by the temperature, which may be 0.04 of so few images on val: it would enlarge rounding of
    # float32, which is another one once the additions are worked into the weights.
    t, wanted = run.calibration.temperature, run.calibration(run.answers("test").logits)
    close(torch.from_numpy(t * z), torch.from_numpy(t * wanted))


def test_a_network_no_layer_of_which_gives_its_last_map_has_no_grad_cam(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor, names: set[str]) -> dict[str, torch.Tensor]:
            return {name: 2 * values + 1 for name, values in self.inside(x, names).items()}

    model = made(f"finetune:hf:{checkpoints.save_resnet(tmp_path)}").eval()
    model.network = Doubled(model.network)
    with pytest.raises(OutputRefused, match="no layer of this network gives its last map"):
        _ = model.cam_layer
