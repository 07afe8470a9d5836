"""Small checkpoints as the libraries save them: every function writes a folder and returns it.

Weights are drawn wide (std 0.2), so that attention, norms and biases really matter to what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SQUARE = {**SIZE, "image_size": 32, "patch_size": 8}
TEXT = {**SIZE, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}


def _save(folder: Path, make: Callable[[], Any], processor: Any, seed: int = 0) -> Path:
    """The same weights in every process: the library draws its own from torch's generator, which nobody has seeded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand(buffer.shape, generator=generator)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def _squash(kind: Any, n: int = 32, **settings: Any) -> Any:
    return kind(size={"height": n, "width": n}, **settings)


def save_vit(folder: Path, seed: int = 0, pooler: bool = True, processor: bool = True, **config: Any) -> Path:
    built = transformers.ViTConfig(**{**SQUARE, **config})
    own = _squash(transformers.ViTImageProcessor) if processor else None
    return _save(folder, lambda: transformers.ViTModel(built, add_pooling_layer=pooler), own, seed)


def save_vit_classifier(folder: Path, labels: tuple[str, ...] = ("a", "b"), **config: Any) -> Path:
    built = transformers.ViTConfig(**{**SQUARE, "id2label": dict(enumerate(labels)), **config})
    return _save(folder, lambda: transformers.ViTForImageClassification(built), _squash(transformers.ViTImageProcessor))


def save_deit(folder: Path, **config: Any) -> Path:
    built = transformers.DeiTConfig(**{**SQUARE, **config})
    processor = _squash(transformers.DeiTImageProcessor, 36, crop_size={"height": 32, "width": 32})
    return _save(folder, lambda: transformers.DeiTForImageClassificationWithTeacher(built), processor)


def save_dinov2(folder: Path, registers: int = 0, **config: Any) -> Path:
    shape = {key: value for key, value in SIZE.items() if key != "intermediate_size"}
    shape |= {"image_size": 56, "patch_size": 7, "mlp_ratio": 2, **config}
    processor = transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42})
    if not registers:
        return _save(folder, lambda: transformers.Dinov2Model(transformers.Dinov2Config(**shape)), processor)
    built = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
    return _save(folder, lambda: transformers.Dinov2WithRegistersModel(built), processor)


def _clip_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_clip_vision(folder: Path, **config: Any) -> Path:
    built = transformers.CLIPVisionConfig(**{**SQUARE, **config})
    return _save(folder, lambda: transformers.CLIPVisionModel(built), _clip_processor())


def save_clip(folder: Path, **config: Any) -> Path:
    """Both towers, as CLIP is published."""
    built = transformers.CLIPConfig(text_config=TEXT, vision_config={**SQUARE, **config})
    return _save(folder, lambda: transformers.CLIPModel(built), _clip_processor())


def save_beit(folder: Path, classifier: bool = True, **config: Any) -> Path:
    built = transformers.BeitConfig(**{**SQUARE, "use_relative_position_bias": True, "drop_path_rate": 0.5, **config})
    kind = transformers.BeitForImageClassification if classifier else transformers.BeitForMaskedImageModeling
    return _save(folder, lambda: kind(built), _squash(transformers.BeitImageProcessor, resample=2))


def save_siglip(folder: Path, **config: Any) -> Path:
    built = transformers.SiglipVisionConfig(**{**SQUARE, **config})
    return _save(folder, lambda: transformers.SiglipVisionModel(built), _squash(transformers.SiglipImageProcessor))


def save_siglip_both(folder: Path, **config: Any) -> Path:
    built = transformers.SiglipConfig(text_config=TEXT, vision_config={**SQUARE, **config})
    return _save(folder, lambda: transformers.SiglipModel(built), _squash(transformers.SiglipImageProcessor))


def save_resnet(folder: Path, **config: Any) -> Path:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 2], "layer_type": "basic", **config}
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.875)
    return _save(
        folder, lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)), processor
    )


def save_convnext(folder: Path, **config: Any) -> Path:
    shape = {"hidden_sizes": [8, 24], "depths": [1, 2], "num_stages": 2, "image_size": 40, **config}
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.875)
    return _save(
        folder, lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**shape)), processor
    )
