"""Networks that are trained on: what is trained, what is kept for ``extract``, and the same by the libraries alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import checkpoints
from support.gradients import check_cam_layer
from support.pictures import image_folder
from torch import nn
from torch.nn import functional

import featurecache
import heads
from featurecache.backbones import load_backbone, load_without_weights
from featurecache.backbones.processors import check_processor, from_processor
from featurecache.backbones.wrappers import Tokens
from featurecache.errors import BadOption, OutputRefused, RunError, UnknownBackbone, UnknownHead
from featurecache.images.decoding import decode
from featurecache.images.preprocessing import Preprocess
from heads import api
from heads.api import train_baseline
from heads.models import finetune
from heads.models.adapters import Rescaled, add_lora, add_rlrr, merge_adapters
from heads.models.catalogue import baseline_info, make_baseline
from heads.models.finetune import (
    FineTuned,
    classifier_state,
    extract_options,
    load_finetuned,
    processor_of,
    save_backbone,
)
from heads.runs.run import pixels_of
from heads.settings import Settings

KINDS = ("vit", "deit", "dinov2", "clip_vision", "siglip", "beit", "resnet", "convnext")
FOLDERS = {kind: getattr(checkpoints, f"save_{kind}") for kind in KINDS}


SELDOM = ("beit", "convnext")


def made(name: str, classes: int = 3, **options: Any) -> Any:
    side = options.pop("image_size", None) or baseline_info(name).image_size
    return make_baseline(name, image_size=side, classes=classes, **options)


def vit(folder: Path, **options: Any) -> Any:
    return made(f"finetune:hf:{checkpoints.save_vit(folder)}", **options)


def pixels(model: Any, count: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *model.preprocess.size), generator=generator).float()


def trained(model: Any, steps: int = 2) -> Any:
    """After some steps on noise, in eval mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    x, y = pixels(model), torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [k if k not in SELDOM else pytest.param(k, marks=pytest.mark.slow) for k in FOLDERS])
def test_every_weight_that_is_trained_gets_a_gradient_and_the_folder_gives_the_same_logits(
    kind: str, tmp_path: Path
) -> None:
    model = trained(made(f"finetune:hf:{FOLDERS[kind](tmp_path / 'begin')}"))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    words = save_backbone(model, tmp_path / "tuned")
    again = load_finetuned(tmp_path / "tuned", classifier_state(model), classes=3)
    x = pixels(model, seed=2)
    close(again(x), model(x))
    assert words == f"--backbone hf:{tmp_path / 'tuned'}"


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


def test_transformers_own_classifier_gives_the_same_logits(tmp_path: Path) -> None:
    model = trained(vit(tmp_path / "begin"))
    save_backbone(model, tmp_path / "tuned")
    own = transformers.ViTForImageClassification(
        transformers.ViTConfig.from_pretrained(tmp_path / "tuned", num_labels=3)
    )
    own.vit = transformers.ViTModel.from_pretrained(tmp_path / "tuned", add_pooling_layer=False)
    own.classifier.load_state_dict(model.classifier.state_dict())
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in model.parameters())
    x = pixels(model, seed=2)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "tuned")
    given = processor(images=list(x.to(torch.uint8)), return_tensors="pt")["pixel_values"]
    close(own.eval()(given).logits, model(x))


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
    model = vit(tmp_path / "begin", image_size=48)
    assert save_backbone(model.eval(), tmp_path / "tuned").endswith(" --image-size 48")
    again, x = load_finetuned(tmp_path / "tuned", classifier_state(model)), pixels(model)
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


def states_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", ["vit", "clip_vision"])
def test_lora_trains_its_adapters_and_the_classifier_alone(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = FOLDERS[kind](tmp_path / "begin")
    model = made(f"finetune:hf:{folder}", lora=2)
    x, before = pixels(model, seed=2), states_of(model)
    plain = made(f"finetune:hf:{folder}")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    close(model.eval()(x), plain.eval()(x))  # it begins as the network was
    trained(model.train())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("classifier.")}
    assert sum(before[name].numel() for name in changed) == 3 * 4 * 2 * 64 + 3 * 33  # 3 blocks of 4 layers 32 × 32


def test_lora_worked_into_the_weights_gives_the_same_logits_in_plain_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = trained(vit(tmp_path / "begin", lora=2))
    x = pixels(model, seed=2)
    before = model(x)
    save_backbone(model, tmp_path / "tuned")
    again = load_finetuned(tmp_path / "tuned", classifier_state(model))
    close(again(x), before)
    close(model(x), before)  # and the network itself is as it was
    state, parts = again.state_dict(), dict(model.network.named_modules())
    name = next(name for name in parts if name.endswith("q_proj") or name.endswith("attention.query"))
    layer: Any = parts[name]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # α = r
    close(state[f"network.{name}.weight"], layer.base_layer.weight + product)
    assert not [key for key in state if "lora" in key]


def test_torchs_own_attention_takes_both_additions() -> None:
    pytest.importorskip("peft")
    from torchvision.models import VisionTransformer

    for adapt in (lambda m: add_lora(m, 2), add_rlrr):
        network = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
        model = Tokens(network, "encoder.layers", "encoder.ln", {}, output="encoder")
        adapt(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model.eval()
        plain = merge_adapters(model)
        assert {type(part) for part in plain.network.modules()} == {
            type(part) for part in VisionTransformer(32, 8, 2, 2, 16, 32).modules()
        }
        close(plain(x, {"tokens"})["tokens"], model(x, {"tokens"})["tokens"])


def test_low_rank_rescaling_by_hand() -> None:
    """W + s_left s_rightᵀ ∘ W with W = [[1, 2], [3, 4]], s_left = (1/2, −1), s_right = (2, 1/10)."""
    rescaled = Rescaled(torch.zeros(2, 2))
    with torch.no_grad():
        rescaled.left.copy_(torch.tensor([[0.5], [-1.0]]))
        rescaled.right.copy_(torch.tensor([[2.0, 0.1]]))
    close(rescaled(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([[2.0, 2.1], [-3.0, 3.6]]))


def test_low_rank_rescaling_of_a_network_is_the_published_formula_in_every_linear_layer(tmp_path: Path) -> None:
    name = f"finetune:hf:{checkpoints.save_vit(tmp_path / 'begin')}"
    model, own = trained(made(name, rlrr=True)), made(name).network.state_dict()
    save_backbone(model, tmp_path / "tuned")
    again, state = load_finetuned(tmp_path / "tuned", classifier_state(model)), model.network.state_dict()
    tuned = again.network.state_dict()
    layers = [key.removesuffix(".parametrizations.weight.0.left") for key in state if key.endswith("weight.0.left")]
    assert len(layers) == 3 * 6  # of three blocks: query, key, value, output and two of the MLP
    for layer in layers:
        left, right = (state[f"{layer}.parametrizations.weight.0.{side}"] for side in ("left", "right"))
        rank_one = torch.outer(left.flatten(), right.flatten())
        close(tuned[f"{layer}.weight"], own[f"{layer}.weight"] + rank_one * own[f"{layer}.weight"])
        shift = state[f"{layer}.parametrizations.bias.0.shift"]
        assert shift.any()
        close(tuned[f"{layer}.bias"], own[f"{layer}.bias"] + shift)
    x = pixels(model, seed=2)
    close(again(x), model(x))


def test_low_rank_rescaling_trains_its_vectors_the_norms_and_the_classifier_alone(tmp_path: Path) -> None:
    model = vit(tmp_path, rlrr=True)
    before = states_of(model)
    trained(model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    new = {name for name in before if name.endswith((".left", ".right", ".shift"))}
    norms = {name for name in before if "norm" in name and not name.endswith(".original")}
    assert changed == new | norms | {"classifier.weight", "classifier.bias"}
    # a block: four layers 32 × 32, 64 × 32 and 32 × 64, each with two vectors and a shift
    assert sum(before[name].numel() for name in new) == 3 * (4 * 96 + 160 + 128)
    assert all(not before[name].any() for name in new if name.endswith(".shift"))


def test_the_published_beginning_of_low_rank_rescaling() -> None:
    """Kaiming's uniform draw: bounds √(6 / 1) of a column and √(6 / 768) of a row."""
    torch.manual_seed(0)
    rescaled = Rescaled(torch.zeros(3000, 768))
    assert 2.4 < rescaled.left.abs().max() <= 6**0.5
    assert 0.085 < rescaled.right.abs().max() <= (6 / 768) ** 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": 0}, "at least 1"),
        ({"lora": 4, "rlrr": True}, "give one of them"),
        ({"dropout": 1.0}, "below 1"),
        ({"image_size": 33}, "multiple of the patch"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=said):
        vit(tmp_path, **options)


@pytest.mark.parametrize("options", [{"lora": 4}, {"rlrr": True}])
def test_a_cnn_takes_no_addition_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"plain transformers.*is none"):
        made(f"finetune:hf:{checkpoints.save_resnet(tmp_path)}", **options)


def test_without_peft_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[peft\]'"):
        vit(tmp_path, lora=4)


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
    save_backbone(model, tmp_path / "tuned")
    record = tmp_path / "tuned" / "finetuned.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(RunError, match=said):
        load_finetuned(tmp_path / "tuned", classifier_state(model))


def test_a_classifier_of_another_network_or_none_is_refused(tmp_path: Path) -> None:
    model = vit(tmp_path / "begin")
    save_backbone(model, tmp_path / "tuned")
    state = classifier_state(model)
    for wrong, said in (
        ({}, "is missing"),
        ({**state, "classifier.bias": torch.zeros(2)}, "a bias for each"),
        ({**state, "classifier.weight": torch.zeros(3, 7)}, "takes a cls of 7"),
    ):
        with pytest.raises(RunError, match=said):
            load_finetuned(tmp_path / "tuned", wrong)
    with pytest.raises(RunError, match="of 3 classes; expected 4"):
        load_finetuned(tmp_path / "tuned", state, classes=4)
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
    close(torch.from_numpy(z), torch.from_numpy(run.calibration(run.answers("test").logits)))


def test_a_network_no_layer_of_which_gives_its_last_map_has_no_grad_cam(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor, names: set[str]) -> dict[str, torch.Tensor]:
            return {name: 2 * values + 1 for name, values in self.inside(x, names).items()}

    model = made(f"finetune:hf:{checkpoints.save_resnet(tmp_path)}")
    model.network = Doubled(model.network)
    with pytest.raises(OutputRefused, match="no layer of this network gives its last map"):
        _ = model.cam_layer
