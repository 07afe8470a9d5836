"""Model types of transformers that are known by hand: where the parts of their networks are (`FAMILIES`).

Published names of tensors are hashed into fingerprints: another spelling here is another store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of one model type are. A CNN has no blocks: it gives a map and the pooled map."""

    model: str  # class in transformers
    processor: str  # its image processor, used with untrained weights where a folder has none
    part: str  # checkpoints of larger models carry its tensors under this prefix
    blocks: tuple[str, ...] = ()  # where the list of blocks is, by version of transformers
    norm: str = ""  # between the last block and last_hidden_state
    prefix: tuple[str, ...] = ("cls",)
    pooler: str = ""  # parameters of the pooled vector begin so; a checkpoint may lack them
    positions: str = "bicubic"  # how position embeddings are interpolated
    any_size: bool = False  # ... to any size, unasked
    measured: bool = False  # it is in no table: where its parts are shows when it runs
    tower: str = ""  # a folder of a larger model holds it under this name, and other networks beside it
    renames: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # names in memory -> names in checkpoints

    def published_name(self, name: str) -> str:
        """The name that a tensor of the backbone has in published checkpoints, from any name it goes by."""
        if self.measured:  # the library itself gives it back (`published_tensors`)
            return name
        name = name.removeprefix(self.part + ".")
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def pooled_names(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that belong to the pooled vector alone."""
        return [name for name in names if self.pooler and self.published_name(name).startswith(self.pooler)]


# Checkpoints keep the names of their first publication; transformers renames while loading, differently from version
# to version. Digests go by the published names, so a state dict that was saved from memory is brought back to them.
_ATTENTION = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_VIT_NAMES = (
    (r"^layers\.(\d+)\.relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"^layers\.", "encoder.layer."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *_ATTENTION,
)
_VIT: dict[str, Any] = {"blocks": ("layers", "encoder.layer"), "norm": "layernorm", "pooler": "pooler."}
_VIT |= {"renames": _VIT_NAMES}
_DINOV2: dict[str, Any] = {"processor": "BitImageProcessor", "blocks": ("encoder.layer",), "norm": "layernorm"}
_DINOV2 |= {"any_size": True, "renames": _ATTENTION}
_TOWER: dict[str, Any] = {"part": "vision_model", "blocks": ("encoder.layers", "vision_model.encoder.layers")}
_CNN: dict[str, Any] = {"processor": "ConvNextImageProcessor", "prefix": ()}
_CLIP = ModelLayout("CLIPVisionModel", "CLIPImageProcessor", pooler="post_layernorm.", **_TOWER)
_SIGLIP = ModelLayout(
    "SiglipVisionModel", "SiglipImageProcessor", norm="post_layernorm", prefix=(), pooler="head.", **_TOWER
)
FAMILIES: dict[str, ModelLayout] = {  # model_type of a config.json -> where the parts of its network are
    "vit": ModelLayout("ViTModel", "ViTImageProcessor", "vit", **_VIT),
    "deit": ModelLayout("DeiTModel", "DeiTImageProcessor", "deit", prefix=("cls", "dist"), **_VIT),
    "beit": ModelLayout("BeitModel", "BeitImageProcessor", "beit", positions="relative, bilinear", **_VIT),
    "dinov2": ModelLayout("Dinov2Model", part="dinov2", **_DINOV2),
    "dinov2_with_registers": ModelLayout("Dinov2WithRegistersModel", part="dinov2_with_registers", **_DINOV2),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "resnet": ModelLayout("ResNetModel", part="resnet", **_CNN),
    "convnext": ModelLayout("ConvNextModel", part="convnext", **_CNN),
    "convnextv2": ModelLayout("ConvNextV2Model", part="convnextv2", **_CNN),
}
