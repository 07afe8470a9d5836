"""Training a small addition to a transformer whose own weights stay as they are: LoRA and RLRR.

Both change the weight W [J, I] of a linear layer into another of the same shape, so the network that comes out is one
of the same architecture: `merged` gives it.

    LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): W + (α / r) B A, of rank r, with α = r as theirs; by `peft`.
        Of the attention's layers; B begins at zero, so training begins with the network as it was.
    RLRR (Dong et al., CVPR 2024, arXiv:2403.19067): W + s_left s_rightᵀ ∘ W and bias + f, with s_left [J, 1], s_right
        [1, I], f [J]. Of all linear layers of the blocks, attention and MLP. As published s_left and s_right are drawn
        as He et al. draw weights and f begins at zero, so training begins near the network and not with it; the norms'
        scale and shift are trained too. Where query, key and value are one matrix they share their s_right.

Notation: I inputs and J outputs of a layer, r the rank; ∘ the product entry by entry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from featurecache.backbones.base import Tokens
from featurecache.errors import BadOption

ATTENTION = ("attention", "attn")  # in the name of the part of a block that is one


class Rescaled(nn.Module):
    """weight [J, I] -> weight + s_left s_rightᵀ ∘ weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(weight.new_empty(weight.shape[0], 1))
        self.right = nn.Parameter(weight.new_empty(1, weight.shape[1]))
        nn.init.kaiming_uniform_(self.left)
        nn.init.kaiming_uniform_(self.right)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.left * weight * self.right


class Shifted(nn.Module):
    """bias [J] -> bias + f."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return bias + self.shift


def check_adapters(name: str, model: nn.Module, lora: int | None, rlrr: bool) -> None:
    """Raises BadOption where these options do not go together, or with this network."""
    if lora is not None and rlrr:
        raise BadOption("--lora and --rlrr are two ways of adapting a network; give one of them.")
    if lora is not None and lora < 1:
        raise BadOption(f"--lora {lora}: it is the rank of the adapters, at least 1, such as 8.")
    if (lora is not None or rlrr) and not isinstance(model, Tokens):
        option = "--rlrr" if rlrr else f"--lora {lora}"
        raise BadOption(f"{option} is for plain transformers, and {name} is none. Without it all weights are tuned.")


def add_lora(model: Tokens, rank: int) -> None:
    """Put an adapter beside every linear layer of the attention; torch's randomness draws. peft freezes all else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadOption("--lora needs a package: pip install 'featurecache[peft]'.") from error
    names = [name for name, _ in _linears(model, attention_only=True)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)


def add_rlrr(model: Tokens) -> None:
    """Freeze the network and rescale every linear layer of its blocks; torch's randomness draws."""
    model.requires_grad_(False)
    for _, layer in list(_linears(model)):
        for part in ("weight", "in_proj_weight", "bias", "in_proj_bias"):
            if isinstance(value := getattr(layer, part, None), torch.Tensor):
                addition = Rescaled(value) if part.endswith("weight") else Shifted(value)
                parametrize.register_parametrization(layer, part, addition)
    for name, module in model.named_modules():
        if is_norm(module) and (name.startswith(_blocks(model)) or name == f"network.{model.norm}"):
            module.requires_grad_(True)


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their kin in the libraries."""
    return "norm" in type(module).__name__.lower()


def merge_adapters(model: nn.Module) -> nn.Module:
    """A copy of the network with every addition worked into the weights it belongs to: plain layers, as they were."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            made: Any = type(module)  # for this layer, by parametrize; a copy has the same, and removing changes it
            module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
            for part in list(module.parametrizations):
                parametrize.remove_parametrizations(module, part, leave_parametrized=True)
        elif hasattr(module, "unload_and_optionally_merge_module"):  # peft's, of torch's own attention
            model.set_submodule(name, module.unload_and_optionally_merge_module(True, True, None))
        elif hasattr(module, "get_base_layer") and ".base_layer." not in name:
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    return model


def _blocks(model: Tokens) -> str:
    return f"network.{model.blocks}."


def _linears(model: Tokens, attention_only: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(name, linear layer) of the blocks, torch's own attention as one where only attention is asked for."""
    whole: tuple[str, ...] = ()
    for name, module in model.named_modules():
        within = name.removeprefix(_blocks(model))
        if within == name or (whole and name.startswith(whole)):
            continue
        fits = not attention_only or any(word in within for word in ATTENTION)
        if isinstance(module, nn.MultiheadAttention):
            whole += (f"{name}.",) if attention_only else ()
            yield name, module
        elif isinstance(module, nn.Linear) and fits:
            yield name, module
