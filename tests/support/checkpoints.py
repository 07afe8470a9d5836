"""Small checkpoints as the libraries save them: every ``save_`` writes a folder and returns it; tensors in other names.

Weights are drawn wide (std 0.2), so that attention, norms and biases really matter to what is compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SQUARE = {**SIZE, "image_size": 32, "patch_size": 8}
TEXT = {**SIZE, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}


def wide(network: Any, seed: int = 0) -> Any:
    """In eval mode with wide random numbers, so that norms, biases and statistics matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.eval().requires_grad_(False).state_dict().items():
        if value.is_floating_point():
            noise = torch.rand if name.endswith("running_var") else torch.randn
            value += 0.2 * noise(value.shape, generator=generator)
    return network


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, torch.Tensor], *pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    """``pairs``: regular expressions in names and what takes their place, one after the other."""
    for pattern, replacement in pairs:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def fused(tensors: dict[str, torch.Tensor], parts: list[str], whole: str) -> dict[str, torch.Tensor]:
    """Queries, keys and values, in whose names are ``parts``, as one tensor with ``whole`` in its name."""
    first = [name for name in tensors if parts[0] in name]
    joined = {
        name.replace(parts[0], whole): torch.cat([tensors[name.replace(parts[0], part)] for part in parts])
        for name in first
    }
    return joined | {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def _save(folder: Path, kind: str, config: dict[str, Any], processor: Any, seed: int = 0, **options: Any) -> Path:
    """The same weights in every process: the library draws its own from torch's generator, which nobody has seeded."""
    model = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(model.config_class(**config), **options)
    wide(made, seed).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def _squash(kind: Any, n: int = 32, **settings: Any) -> Any:
    return kind(size={"height": n, "width": n}, **settings)


def save_vit(folder: Path, seed: int = 0, pooler: bool = True, processor: bool = True, **config: Any) -> Path:
    own = _squash(transformers.ViTImageProcessor) if processor else None
    return _save(folder, "ViTModel", {**SQUARE, **config}, own, seed, add_pooling_layer=pooler)


def save_vit_classifier(folder: Path, labels: tuple[str, ...] = ("a", "b"), **config: Any) -> Path:
    config = {**SQUARE, "id2label": dict(enumerate(labels)), **config}
    return _save(folder, "ViTForImageClassification", config, _squash(transformers.ViTImageProcessor))


def save_deit(folder: Path, **config: Any) -> Path:
    processor = _squash(transformers.DeiTImageProcessor, 36, crop_size={"height": 32, "width": 32})
    return _save(folder, "DeiTForImageClassificationWithTeacher", {**SQUARE, **config}, processor)


def save_dinov2(folder: Path, registers: int = 0, **config: Any) -> Path:
    shape = {key: value for key, value in SIZE.items() if key != "intermediate_size"}
    shape |= {"image_size": 56, "patch_size": 7, "mlp_ratio": 2, **config}
    processor = transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42})
    if not registers:
        return _save(folder, "Dinov2Model", shape, processor)
    return _save(folder, "Dinov2WithRegistersModel", {**shape, "num_register_tokens": registers}, processor)


def _clip_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_clip_vision(folder: Path, **config: Any) -> Path:
    return _save(folder, "CLIPVisionModel", {**SQUARE, **config}, _clip_processor())


def save_clip(folder: Path, **config: Any) -> Path:
    """Both towers, as CLIP is published."""
    towers = {"text_config": TEXT, "vision_config": {**SQUARE, **config}}
    return _save(folder, "CLIPModel", towers, _clip_processor())


def save_beit(folder: Path, classifier: bool = True, **config: Any) -> Path:
    config = {**SQUARE, "use_relative_position_bias": True, "drop_path_rate": 0.5, **config}
    kind = "BeitForImageClassification" if classifier else "BeitForMaskedImageModeling"
    return _save(folder, kind, config, _squash(transformers.BeitImageProcessor, resample=2))


def save_siglip(folder: Path, **config: Any) -> Path:
    return _save(folder, "SiglipVisionModel", {**SQUARE, **config}, _squash(transformers.SiglipImageProcessor))


def save_siglip_both(folder: Path, **config: Any) -> Path:
    towers = {"text_config": TEXT, "vision_config": {**SQUARE, **config}}
    return _save(folder, "SiglipModel", towers, _squash(transformers.SiglipImageProcessor))


def _cnn_processor() -> Any:
    return transformers.ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.875)


def save_resnet(folder: Path, **config: Any) -> Path:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 2], "layer_type": "basic", **config}
    return _save(folder, "ResNetForImageClassification", shape, _cnn_processor())


def save_convnext(folder: Path, **config: Any) -> Path:
    shape = {"hidden_sizes": [8, 24], "depths": [1, 2], "num_stages": 2, "image_size": 40, **config}
    return _save(folder, "ConvNextForImageClassification", shape, _cnn_processor())
