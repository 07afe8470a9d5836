"""LoRA and low-rank rescaling: what they train, and that they work into plain weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.tuning import FOLDERS, close, made, pixels, saved, trained, vit

from featurecache.backbones.base import Tokens
from featurecache.errors import BadOption
from heads.models.adapters import Rescaled, add_lora, add_rlrr, merge_adapters


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
    again = saved(model, tmp_path)
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
        kinds = set(map(type, network.modules()))
        model = Tokens(network, "encoder.layers", "encoder.ln", {}, output="encoder")
        adapt(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model.eval()
        plain = merge_adapters(model)
        assert set(map(type, plain.network.modules())) == kinds
        close(plain(x, {"tokens"})["tokens"], model(x, {"tokens"})["tokens"])


def test_low_rank_rescaling_of_a_network_is_the_published_formula_in_every_linear_layer(tmp_path: Path) -> None:
    name = f"finetune:hf:{checkpoints.save_vit(tmp_path / 'begin')}"
    model, own = trained(made(name, rlrr=True)), made(name).network.state_dict()
    again, state = saved(model, tmp_path), model.network.state_dict()
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


def test_without_peft_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadOption, match=r"pip install 'featurecache\[peft\]'"):
        vit(tmp_path, lora=4)
