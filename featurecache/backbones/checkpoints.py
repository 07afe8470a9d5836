"""A checkpoint's tensors into a network of transformers: what is missing, what does not fit, and the digest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones.families import Family
from featurecache.backbones.weights import digest, read_state_dict, some
from featurecache.errors import WeightsDoNotFit


def load_network(path: Path, title: str, family: Family, config: Any) -> tuple[nn.Module, set[str], dict[str, Any]]:
    """(network, parameters of the pooled vector that the checkpoint had not, what identifies the weights).

    Raises WeightsDoNotFit for other shapes, for other missing tensors, and for more blocks than were asked for.
    """
    import transformers

    state = _part(read_state_dict(path), family)
    network, info = getattr(transformers, family.model).from_pretrained(
        None, config=config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )  # fmt: skip
    shapes = [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in info["mismatched_keys"]]
    if shapes:
        raise WeightsDoNotFit(f"the weights of {title} have other shapes than its architecture: {some(shapes, 2)}")
    missing = {published(name, family) for name in info["missing_keys"] if "mask_token" not in name}  # never used
    pooled = set(pooled_names(missing, family))
    if missing - pooled:
        raise WeightsDoNotFit(
            f"the weights of {title} lack {len(missing - pooled)} tensors of {family.model}: {some(missing - pooled)}; "
            f"they hold {some(state)}"
        )
    unused = {published(name, family) for name in info["unexpected_keys"]}
    blocks = [name for name in unused if re.search(r"\.\d+\..*(weight|bias)$", name)]
    if blocks:
        raise WeightsDoNotFit(f"the weights of {title} have more than its configuration says: {some(blocks)}")
    return network, pooled, {"blake2b": digest(_deciding(state, family, unused))}


def published(name: str, family: Family) -> str:
    """The name that a tensor of the backbone has in published checkpoints, from any name it goes by."""
    name = name.removeprefix(family.part + ".")
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def pooled_names(names: Iterable[str], family: Family) -> list[str]:
    """Those of ``names`` that belong to the pooled vector alone."""
    if not family.pooled:
        return []
    return [name for name in names if published(name, family).startswith(family.pooled)]


def _part(state: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The backbone's own tensors out of those of a classifier or a whole CLIP, without their prefix; also where a
    network of the user's own holds that (``model.vit.``)."""
    prefix = family.part + "."
    if not any(name.startswith(prefix) for name in state):
        outer = {name[: name.index(f".{prefix}") + 1] for name in state if f".{prefix}" in name}
        prefix = outer.pop() + prefix if len(outer) == 1 else prefix
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return part or state


def _deciding(state: dict[str, torch.Tensor], family: Family, unused: set[str]) -> dict[str, torch.Tensor]:
    """Those that decide features. Integers do not: indices of positions, counters of batches, only in some files."""
    named = {published(name, family): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and name not in unused}
