"""The model types of transformers we read: one record each says where the parts of a network are."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Family:
    """Where the parts of one model type are. A CNN has no blocks: it gives a map and the pooled map."""

    model: str  # class in transformers
    processor: str  # its image processor, used with untrained weights where a folder has none
    part: str  # checkpoints of larger models carry its tensors under this prefix
    blocks: tuple[str, ...] = ()  # where the list of blocks is, by version of transformers
    norm: str = ""  # between the last block and last_hidden_state
    prefix: tuple[str, ...] = ("cls",)
    pooled: str = ""  # parameters of the pooled vector begin so; a checkpoint may lack them
    positions: str = "bicubic"  # how position embeddings are interpolated
    always: bool = False  # ... at any size, unasked
    renamed: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # names in memory -> names in checkpoints


# Checkpoints keep the names of their first publication; transformers renames while loading, differently from version
# to version. Digests go by the published names, so a state dict that was saved from memory is brought back to them.
_ATTENTION = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_VIT = (
    (r"^layers\.(\d+)\.relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"^layers\.", "encoder.layer."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *_ATTENTION,
)
_LAYERS, _LAYER = ("layers", "encoder.layer"), ("encoder.layer",)
_TOWER = ("encoder.layers", "vision_model.encoder.layers")

# fmt: off
_CLIP = Family("CLIPVisionModel", "CLIPImageProcessor", "vision_model", _TOWER, pooled="post_layernorm.")
_SIGLIP = Family("SiglipVisionModel", "SiglipImageProcessor", "vision_model", _TOWER, "post_layernorm", (), "head.")
FAMILIES: dict[str, Family] = {
    "vit": Family("ViTModel", "ViTImageProcessor", "vit", _LAYERS, "layernorm", pooled="pooler.", renamed=_VIT),
    "deit": Family("DeiTModel", "DeiTImageProcessor", "deit", _LAYERS, "layernorm", ("cls", "dist"), "pooler.",
                   renamed=_VIT),
    "beit": Family("BeitModel", "BeitImageProcessor", "beit", _LAYERS, "layernorm", pooled="pooler.",
                   positions="relative, bilinear", renamed=_VIT),
    "dinov2": Family("Dinov2Model", "BitImageProcessor", "dinov2", _LAYER, "layernorm", always=True,
                     renamed=_ATTENTION),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "BitImageProcessor", "dinov2_with_registers", _LAYER,
                                    "layernorm", always=True, renamed=_ATTENTION),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "resnet": Family("ResNetModel", "ConvNextImageProcessor", "resnet", prefix=()),
    "convnext": Family("ConvNextModel", "ConvNextImageProcessor", "convnext", prefix=()),
    "convnextv2": Family("ConvNextV2Model", "ConvNextImageProcessor", "convnextv2", prefix=()),
}
# fmt: on


def inner(network: nn.Module, paths: tuple[str, ...]) -> str:
    """The first of ``paths`` that is there."""
    modules = {name for name, _ in network.named_modules()}
    return next(path for path in paths if path in modules)
