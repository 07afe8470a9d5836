"""Short names for the backbones people use: one record says what each is, how it is fed and what it may be used for.

The record alone builds the architecture offline (``--random-weights``); with weights, the checkpoint's own files are
what counts. Sizes, constants and licences are as published: the hub's ``config.json`` and ``preprocessor_config.json``
(BEiT's and DINOv2's also in transformers' conversion scripts), torchvision's weight enums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
BILINEAR, BICUBIC = 2, 3  # PIL.Image.Resampling


@dataclass(frozen=True)
class Alias:
    """One row of the table of backbones."""

    id: str  # "hf:<repo>", "torchvision:<name>:<weights>" or "timm:<name>.<tag>"; empty: exists only untrained
    width: int  # of a token, and of the default vector
    tokens: int
    input: int  # pixels of the square the network sees
    parameters: int  # those of the backbone; torchvision's with its classifier
    licence: str
    source: str
    model_type: str = ""  # transformers: the family, and what differs from its configuration's defaults
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    pooler: bool = True  # published with the weights of its pooled vector


def _size(width: int, depth: int, heads: int) -> dict[str, Any]:
    mlp = 4 * width
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}


TINY, SMALL, BASE, LARGE = _size(192, 12, 3), _size(384, 12, 6), _size(768, 12, 12), _size(1024, 24, 16)
P16 = {"image_size": 224, "patch_size": 16}


def _squash(kind: str, resample: int, constants: dict[str, Any], n: int = 224) -> dict[str, Any]:
    size = {"height": n, "width": n}
    return {"image_processor_type": kind, "size": size, "resample": resample, **constants}


def _crop(kind: str, size: dict[str, int], constants: dict[str, Any]) -> dict[str, Any]:
    crop = {"height": 224, "width": 224}
    return {"image_processor_type": kind, "size": size, "crop_size": crop, "resample": BICUBIC, **constants}


def _vit(repo: str, size: dict[str, Any], parameters: int, pooler: bool) -> Alias:
    source = "Dosovitskiy et al. 2021, arXiv:2010.11929"
    row = (f"hf:google/{repo}", size["hidden_size"], 197, 224, parameters, "Apache-2.0", source)
    return Alias(*row, "vit", size | P16, _squash("ViTImageProcessor", BILINEAR, HALF), pooler)


def _deit(repo: str, size: dict[str, Any], parameters: int) -> Alias:
    """The distilled ones, which have a distillation token beside the class token."""
    source = "Touvron et al. 2021, arXiv:2012.12877 (distilled)"
    row = (f"hf:facebook/{repo}", size["hidden_size"], 198, 224, parameters, "Apache-2.0", source)
    processor = _crop("DeiTImageProcessor", {"height": 256, "width": 256}, IMAGENET)
    return Alias(*row, "deit", size | P16, processor, pooler=False)


def _dinov2(repo: str, size: dict[str, Any], parameters: int, registers: int = 0) -> Alias:
    shape = {key: value for key, value in size.items() if key != "intermediate_size"}  # its config has mlp_ratio 4
    config = {**shape, "mlp_ratio": 4, "image_size": 518, "patch_size": 14}
    config |= {"num_register_tokens": registers} if registers else {}
    source = "Oquab et al. 2023, arXiv:2304.07193" + (" (registers: arXiv:2309.16588)" if registers else "")
    row = (f"hf:facebook/{repo}", size["hidden_size"], 257 + registers, 224, parameters, "Apache-2.0", source)
    processor = _crop("BitImageProcessor", {"shortest_edge": 256}, IMAGENET)
    return Alias(*row, "dinov2_with_registers" if registers else "dinov2", config, processor)


def _clip(repo: str, size: dict[str, Any], patch: int, projection: int, parameters: int) -> Alias:
    source, tokens = "Radford et al. 2021, arXiv:2103.00020", (224 // patch) ** 2 + 1
    row = (f"hf:openai/{repo}", size["hidden_size"], tokens, 224, parameters, "MIT", source)
    config = {**size, "image_size": 224, "patch_size": patch, "projection_dim": projection}
    return Alias(*row, "clip_vision_model", config, _crop("CLIPImageProcessor", {"shortest_edge": 224}, CLIP))


def _cnn(name: str, weights: str, width: int, grid: int, parameters: int, source: str) -> Alias:
    return Alias(f"torchvision:{name}:{weights}", width, grid * grid, 224, parameters, "BSD-3-Clause", source)


_RESNET, _CONVNEXT = "He et al. 2016, arXiv:1512.03385", "Liu et al. 2022, arXiv:2201.03545"

ALIASES: dict[str, Alias] = {
    "vit-in21k": _vit("vit-base-patch16-224-in21k", BASE, 86_389_248, pooler=True),
    "vit-in1k": _vit("vit-base-patch16-224", BASE, 85_798_656, pooler=False),
    "vit-large-in21k": _vit("vit-large-patch16-224-in21k", LARGE, 304_351_232, pooler=True),
    "deit-tiny": _deit("deit-tiny-distilled-patch16-224", TINY, 5_524_800),
    "deit-small": _deit("deit-small-distilled-patch16-224", SMALL, 21_666_432),
    "deit-base": _deit("deit-base-distilled-patch16-224", BASE, 85_800_192),
    "dinov2-small": _dinov2("dinov2-small", SMALL, 22_056_576),
    "dinov2-base": _dinov2("dinov2-base", BASE, 86_580_480),
    "dinov2-large": _dinov2("dinov2-large", LARGE, 304_368_640),
    "dinov2-small-reg": _dinov2("dinov2-with-registers-small", SMALL, 22_058_112, registers=4),
    "dinov2-base-reg": _dinov2("dinov2-with-registers-base", BASE, 86_583_552, registers=4),
    "dinov2-large-reg": _dinov2("dinov2-with-registers-large", LARGE, 304_372_736, registers=4),
    "clip-vit-b16": _clip("clip-vit-base-patch16", BASE, 16, 512, 85_799_424),
    "clip-vit-b32": _clip("clip-vit-base-patch32", BASE, 32, 512, 87_456_000),
    "clip-vit-l14": _clip("clip-vit-large-patch14", LARGE, 14, 768, 303_179_776),
    "beit-base": Alias(
        *("hf:microsoft/beit-base-patch16-224", 768, 197, 224, 85_761_984, "Apache-2.0"),
        "Bao et al. 2022, arXiv:2106.08254 (fine-tuned on ImageNet-22k, then 1k)",
        *("beit", {**BASE, **P16, "use_relative_position_bias": True}),
        processor=_squash("BeitImageProcessor", BILINEAR, HALF),
    ),
    "siglip-base": Alias(
        *("hf:google/siglip-base-patch16-224", 768, 196, 224, 92_884_224, "Apache-2.0"),
        *("Zhai et al. 2023, arXiv:2303.15343", "siglip_vision_model", {**BASE, **P16}),
        processor=_squash("SiglipImageProcessor", BICUBIC, HALF),
    ),
    "resnet18": _cnn("resnet18", "IMAGENET1K_V1", 512, 7, 11_689_512, _RESNET),
    "resnet50": _cnn("resnet50", "IMAGENET1K_V2", 2048, 7, 25_557_032, _RESNET),
    "densenet121": _cnn("densenet121", "IMAGENET1K_V1", 1024, 7, 7_978_856, "Huang et al. 2017, arXiv:1608.06993"),
    "convnext-tiny": _cnn("convnext_tiny", "IMAGENET1K_V1", 768, 7, 28_589_128, _CONVNEXT),
    "convnext-small": _cnn("convnext_small", "IMAGENET1K_V1", 768, 7, 50_223_688, _CONVNEXT),
    "convnext-base": _cnn("convnext_base", "IMAGENET1K_V1", 1024, 7, 88_591_464, _CONVNEXT),
    "timm-vit-base": Alias(
        *("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k", 768, 197, 224, 85_798_656, "Apache-2.0"),
        "Steiner et al. 2021, arXiv:2106.10270 (timm's vit_base_patch16_224)",
        pooler=False,
    ),
    "efficientnet-b0": _cnn("efficientnet_b0", "IMAGENET1K_V1", 1280, 7, 5_288_548, "Tan & Le 2019, arXiv:1905.11946"),
    "vit-demo": Alias(
        *("", 96, 65, 64, 472_416, "none needed", "made for `featurecache demo`: no weights were ever trained"),
        *("vit", {**_size(96, 4, 3), "image_size": 64, "patch_size": 8}),
        processor=_squash("ViTImageProcessor", BILINEAR, HALF, n=64),
        pooler=False,
    ),
}
