"""Small configurations of every vision model that the installed transformers has, and why some cannot be backbones.

A model type without an entry in ``TINY`` is built as small as its configuration's usual names allow.
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

USUAL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "mlp_dim": 48}
USUAL |= {"image_size": 32, "patch_size": 8, "pooler_output_size": 32, "num_key_value_heads": 2}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
_SAM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 56}
_DINO = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 4}  # fmt: skip
_LCNET = {"model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": [f"stage{k}" for k in range(1, 5)],
          "block_configs": [[[3, 8, 8, 1, False]], *[[[3, 8, 8, 2, False]]] * 3]}  # fmt: skip
_LINES = {f"{shape}_{name}ratio": [[n if high else 1, n if wide else 1], [1, 1], [n // 2 * high, n // 2 * wide]]
          for shape, high, wide in (("vertical_long_to_small_conv", 1, 0), ("horizontal_small_to_long_conv", 0, 1),
                                    ("symmetric_conv_long", 1, 1))
          for name, n in (("long", 7), ("mid", 5), ("short", 3))}  # fmt: skip
NEEDS = {"dinat": "natten"}  # model type -> the library that it needs and that is not here
TINY: dict[str, dict[str, Any]] = {
    "bit": {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 4},
    "d_fine": {},
    "deimv2": {},
    "efficientloftr": {},
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "depth_pro": {**dict.fromkeys(("image_model_config", "patch_model_config", "fov_model_config"), _DINO),
                  "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0],
                  "intermediate_feature_dims": [8, 8], "scaled_images_feature_dims": [8, 8, 8]},
    "dinov3_convnext": _STAGES,
    "dinov3_vit": {**USUAL, "num_register_tokens": 2},
    "donut-swin": _SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "image_size": 32},
    "glpn": {**_STAGES, "num_attention_heads": [1, 2, 2, 4]},
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": [64, 64]},
    "internvl_vision": {**USUAL, "image_size": [32, 32], "patch_size": [8, 8]},
    "levit": {"hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1], "key_dim": [8] * 3,
              "image_size": 128},
    "maskformer-swin": _SWIN,
    "mgp-str": {**USUAL, "image_size": [32, 64]},
    "mobilenet_v1": {"depth_multiplier": 0.125, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64},
    "poolformer": _STAGES,
    "pp_ocrv6_medium_det": {"backbone_config": _LCNET, "neck_out_channels": 16, "scale_factor_list": [1, 2, 4, 8],
                            "kernel_list": [3, 2, 2], "intraclass_block_config": {
                                "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], **_LINES}},
    "pp_ocrv6_small_det": {"backbone_config": _LCNET, "neck_out_channels": 16, "layer_list_out_channels": [8] * 4},
    "pvt": {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "pvt_v2": {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, **_STAGES},
    "sam2_hiera_det_model": {"image_size": [64, 64]},
    "sam3_vision_model": {"backbone_config": {"model_type": "sam3_vit_model", **_SAM}, "fpn_hidden_size": 16},
    "segformer": {**_STAGES, "num_attention_heads": [1, 2, 2, 4]},
    "swiftformer": {"embed_dims": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": _SWIN,
    "swin2sr": {**_SWIN, "patch_size": 1, "image_size": 16},
    "swinv2": _SWIN,
    "textnet": {"image_size": [64, 64], "hidden_sizes": [8] * 5, "depths": [1] * 4, "stem_out_channels": 8},
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "resnet_head": [[3, 8], [8, 8]],
                                  "resnet_configs": [[[8, 8, 1, False]], [[8, 8, 1, True]], [[8, 8, 1, True]]],
                                  "stage_configs": [[[8, 1]], [[8, 2]]], "out_features": ["stage1", "stage2"]},
              "bridge_connector": [8, 8], "out_point_positions2D": [[8, 8], [8, 2]]},
    "yolos": {**USUAL, "image_size": [32, 32]},
}  # fmt: skip


_DETECTORS = ("conditional_detr d_fine dab-detr deformable_detr deimv2 detr lw_detr mask2former maskformer "
              "pp_doclayout_v3 pp_doclayout_v4 rf_detr rt_detr rt_detr_v2 table-transformer")  # fmt: skip
_GRIDS = ("cosmos3_edge_vision glm_image_vision hunyuan_vl_vision hy_v4_vl_vision kimi_k25_vision lfm3_vl_vision "
          "muse_glimmer_vision muse_spark_vision video_llama_3_vision")  # fmt: skip
_SIDEWAYS = "pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec sam2_hiera_det_model sam2_vision_model"
REFUSED: dict[str, str] = {  # model type -> words of the reason
    **dict.fromkeys(_DETECTORS.split(), "its tokens are queries"),
    **dict.fromkeys(_GRIDS.split(), "needs grid_thw"),
    **dict.fromkeys(_SIDEWAYS.split(), "is no grid of images"),
    **dict.fromkeys(("timm_wrapper", "timm_backbone", "gemma3n_vision"), "--backbone timm:<name>"),
    **dict.fromkeys(("timesformer", "videomae", "vivit"), "does not take images.*expected 5, got 4"),
    **dict.fromkeys(("efficientloftr", "lightglue"), "does not take images.*must be a 5D tensor"),
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_7_vision"), "does not take images.*NoneType"),
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), "needs input_ids"),
    "edgetam_vision_model": "'output_hidden_states' option cannot be set",
    "gemma4_vision": "needs pixel_position_ids",
    "hgnet_v2": "gives feature_maps",
    "inkling2_vision": "needs image_grid_thw",
    "mgp-str": "gives logits",
    "omdet-turbo": "needs classes_input_ids",
    "oneformer": "needs task_inputs",
    "pixtral": r"of three images is \[1, 48, 32\]",
    "pp_ocrv5_mobile_rec": "does not take images.*too small",
    "seggpt": "needs prompt_pixel_values",
    "siglip2_vision_model": "needs pixel_attention_mask",
    "yolos": "tokens that no image changes stand behind",
}


@cache
def image_model_types() -> dict[str, Any]:
    """Every model type whose `AutoModel` takes ``pixel_values`` first, of one tower -> its configuration class."""
    types: dict[str, Any] = {}
    for kind, known in modeling_auto.MODEL_MAPPING_NAMES.items():
        cls = getattr(transformers, known if isinstance(known, str) else known[0], None)
        try:
            names = list(inspect.signature(cls.forward).parameters)
        except (ImportError, AttributeError):  # of sounds, by another library; not there
            continue
        if names[1:2] == ["pixel_values"] and kind not in NEEDS and not hasattr(cls.config_class(), "vision_config"):
            types[kind] = cls.config_class
    return types


def tiny_config(kind: str, config: Any) -> Any:
    usual = {name: value for name, value in USUAL.items() if hasattr(config(), name)}
    return config(**TINY.get(kind, usual))


def save_tiny(folder: Path, kind: str, wide: bool = True) -> Path:
    """A small checkpoint with an image processor that squashes. ``wide``: norms, biases and attention matter."""
    config = tiny_config(kind, image_model_types()[kind])
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * wide * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return folder
