"""Small networks in the files in which the medical field publishes its own: names of tensors, nesting, settings.

The original module is written small here where no library has it; else it is the library's own, renamed. Each function
writes into a folder what a user has then, and returns a `Published`: what to type, and the module to compare with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from support import checkpoints as save
from support.backbone_checks import as_rows, edit_json
from support.checkpoints import fused, renamed, under, wide
from support.image_models import save_tiny

timm = pytest.importorskip("timm")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIP = {"mean": [0.481, 0.457, 0.408], "std": [0.268, 0.261, 0.275]}


@dataclass
class Published:
    """``--backbone name`` with ``options``; ``network``: pixels [B,C,h,w] -> tokens [B,T,D]; ``says``: of weights."""

    name: str
    network: Callable[[torch.Tensor], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    vector: str = "cls"
    prefix: tuple[str, ...] = ("cls",)


def timm_folder(folder: Path, architecture: str, arguments: dict[str, Any], size: int, **feeding: Any) -> Path:
    """A config.json as timm writes it, for images of ``size``."""
    folder.mkdir(exist_ok=True)
    record: dict[str, Any] = {"architecture": architecture, "num_classes": 0, "global_pool": "token"}
    record |= {"model_args": arguments} if arguments else {}
    record["pretrained_cfg"] = {
        "tag": "", "custom_load": False, "input_size": [feeding.pop("channels", 3), size, size], "crop_pct": 1.0,
        "fixed_input_size": "img_size" in arguments, "interpolation": "bicubic", "crop_mode": "center",
        "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        **IMAGENET, **feeding,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def weights_in(folder: Path, name: str, content: Any) -> dict[str, str]:
    """``--weights`` of a new file of a folder."""
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    return {"weights": str(folder / name)}


# networks of timm by their own config.json


def _of_timm(
    folder: Path, architecture: str, arguments: dict[str, Any], says: str = "", size: int = 64, **extra: Any
) -> Published:
    """``extra``: arguments that its users have to know, since the config.json does not hold them."""
    network = wide(timm.create_model(architecture, **arguments, **extra))
    weights_in(timm_folder(folder, architecture, arguments, size), "pytorch_model.bin", network.state_dict())
    registers = tuple(f"reg{k}" for k in range(arguments.get("reg_tokens", 0)))
    return Published(str(folder), network.forward_features, says=says, prefix=("cls", *registers))


SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
SHOWN = "by its tensors the network with mlp_layer='SwiGLUPacked', act_layer='silu'"


def gigapath(folder: Path) -> Published:
    arguments = {**SMALL, "in_chans": 3, "init_values": 1e-5, "mlp_ratio": 5.33334}
    return _of_timm(folder, "vit_giant_patch14_dinov2", arguments)


def h_optimus(folder: Path) -> Published:
    return _of_timm(folder, "vit_giant_patch14_reg4_dinov2", {**SMALL, "init_values": 1e-5, "reg_tokens": 4})


def virchow(folder: Path) -> Published:
    arguments = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True}
    return _of_timm(folder, "vit_huge_patch14_224", arguments, SHOWN, **GATED)


def virchow2(folder: Path) -> Published:
    arguments = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "reg_tokens": 4}
    return _of_timm(folder, "vit_huge_patch14_224", arguments, SHOWN, **GATED)


def uni(folder: Path) -> Published:
    """Its config.json is an older one, of one level; what is in it besides ``pretrained_cfg`` timm does not read."""
    network = wide(timm.create_model("test_vit", img_size=224, num_classes=0, init_values=1e-5, dynamic_img_size=True))
    weights_in(timm_folder(folder, "test_vit", {}, 224), "pytorch_model.bin", network.state_dict())
    flat = {"patch_size": 16, "img_size": 224, "init_values": 1.0, "num_features": 64, "dynamic_img_size": True}
    edit_json(folder / "config.json", **flat)
    return Published(str(folder), network.forward_features, says="the network with init_values=1.0")


def uni_by_its_file(folder: Path) -> Published:
    """The config.json beside a file counts as it does in its folder."""
    return replace(uni(folder), name="timm:test_vit", options={"weights": str(folder / "pytorch_model.bin")})


UNI2 = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.33334, "no_embed_class": True, "reg_tokens": 8}


def uni2(folder: Path) -> Published:
    """With the arguments of its card written down, but for the two classes that JSON cannot hold."""
    return _of_timm(folder, "vit_giant_patch14_224", {**UNI2, "dynamic_img_size": True}, SHOWN, **GATED)


def named_mlp(folder: Path) -> Published:
    published = _of_timm(folder, "vit_giant_patch14_224", UNI2, **GATED)
    arguments = {**UNI2, "mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "silu"}
    edit_json(folder / "config.json", model_args=arguments)
    return published


# open_clip's


def _open_clip(network: Any, folder: Path, name: str, extra: dict[str, torch.Tensor]) -> dict[str, str]:
    text = {"text.transformer.encoder.layer.0.output.dense.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
    trunk = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    return weights_in(folder, name, under("visual.trunk.", trunk) | text | extra)


def biomedclip(folder: Path) -> Published:
    network = wide(timm.create_model("test_vit"))
    _open_clip(network, folder, "open_clip_pytorch_model.bin", {"visual.head.proj.weight": torch.ones(32, 64)})
    tower = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "image_size": 160}
    record = {"model_cfg": {"embed_dim": 32, "vision_cfg": tower, "text_cfg": {}}, "preprocess_cfg": CLIP}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    return Published(str(folder), network.forward_features, says="the network under visual.trunk.")


def biomedclip_by_its_file(folder: Path) -> Published:
    weights = {"weights": str(folder / "open_clip_pytorch_model.bin")}
    return replace(biomedclip(folder), name="timm:test_vit", options=weights)


def conch(folder: Path) -> Published:
    """A CoCa: attentional poolers behind the trunk, images of another size; its open_clip_config.json one writes."""
    network = wide(timm.create_model("test_vit", img_size=192))
    poolers = {f"visual.attn_pool_{kind}.query": torch.ones(2, 8) for kind in ("contrast", "caption")}
    poolers |= {
        "visual.attn_pool_contrast.attn.q_proj_weight": torch.ones(8, 8),
        "visual.ln_contrast.bias": torch.ones(8),
    }
    poolers |= {"visual.proj_contrast": torch.ones(8, 8), "text_decoder.resblocks.0.ln_1.weight": torch.ones(8)}
    weights = _open_clip(network, folder, "pytorch_model.bin", poolers)
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {**CLIP, "size": 192}}))
    return Published("timm:test_vit", network.forward_features, weights, "set aside: logit_scale, text.transformer")


def pubmedclip_of_openai(folder: Path) -> Published:
    """PubMedCLIP's own release: OpenAI's names, both towers, with the epoch beside them."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = wide(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape, image_size=64, patch_size=16)))
    tower = getattr(model, "vision_model", model)
    names = fused(tower.state_dict(), [f".self_attn.{part}_proj." for part in "qkv"], ".attn.in_proj_")
    names = renamed(
        names,
        ("self_attn", "attn"),
        (r"\.layer_norm(\d)\.", r".ln_\1."),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        ("^pre_layrnorm", "ln_pre"),
        ("^post_layernorm", "ln_post"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^embeddings\.patch_embedding\.", "conv1."),
        (r"^embeddings\.class", "class"),
    )
    both = under("visual.", names | {"proj": torch.ones(32, 16)})
    both |= {"positional_embedding": torch.ones(7, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    both |= {"text_projection": torch.ones(8, 8), "token_embedding.weight": torch.ones(9, 8)}
    both |= {"logit_scale": torch.ones(())}
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    timm_folder(folder, "vit_base_patch16_clip_quickgelu_224", arguments, 64, **CLIP)
    weights = weights_in(folder, "PubMedCLIP_ViT32.pth", {"epoch": 1, "state_dict": both})
    tokens = lambda pixels: tower.post_layernorm(model(pixels).last_hidden_state)  # noqa: E731
    return Published(str(folder), tokens, weights, "5 tensors set aside: logit_scale, positional_embedding")


# segment-anything


SAM = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3, "neck_chans": 24,
       "global_attn_indexes": [1], "use_rel_pos": True}  # fmt: skip


def _sam(**change: Any) -> Any:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
              "mlp_dim": 128, "output_channels": 24, "window_size": 3, "global_attn_indexes": [1]}  # fmt: skip
    prompt = {"hidden_size": 24, "image_size": 64, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 8}
    decoder = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "mlp_dim": 16}
    decoder |= {"iou_head_hidden_dim": 16}
    parts = {"prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    return wide(transformers.SamModel(transformers.SamConfig(vision_config=vision | change, **parts)))


def _sam_tokens(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels: as_rows(model.vision_encoder(pixels).last_hidden_state)


def _segment_anything_names(model: Any) -> dict[str, torch.Tensor]:
    """The image encoder's tensors as segment-anything publishes them."""
    return renamed(
        model.vision_encoder.state_dict(),
        (r"^layers\.", "blocks."),
        (r"^(blocks\.\d+)\.layer_norm", r"\1.norm"),
        (r"\.projection\.", ".proj."),
        (r"neck\.conv1", "neck.0"),
        (r"neck\.layer_norm1", "neck.1"),
        (r"neck\.conv2", "neck.2"),
        (r"neck\.layer_norm2", "neck.3"),
    )


def medsam(folder: Path) -> Published:
    """The whole SAM; its images go from 0 to 1 and are squashed (MedSAM_Inference.py), which the config.json says."""
    model = _sam()
    timm_folder(folder, "samvit_base_patch16", SAM, 64, mean=[0.0] * 3, std=[1.0] * 3, crop_mode="squash")
    whole = under("image_encoder.", _segment_anything_names(model))
    whole |= {"prompt_encoder.no_mask_embed.weight": torch.ones(1, 24), "mask_decoder.iou_token.weight": torch.ones(24)}
    whole |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.ones(2, 12)}
    says = "names of segment-anything; the network under image_encoder.; 3 tensors set aside: mask_decoder.iou_token"
    weights = weights_in(folder, "medsam_vit_b.pth", whole)
    return Published(str(folder), _sam_tokens(model), weights, says, "gap", ())


def medsam_in_its_folder(folder: Path) -> Published:
    return replace(medsam(folder), options={})


def lvm_med(folder: Path) -> Published:
    """LVM-Med's ViT-B: SAM's encoder alone, made with ``use_abs_pos=False``."""
    model = _sam(use_abs_pos=False)
    timm_folder(folder, "samvit_base_patch16", SAM, 64)
    weights = weights_in(folder, "lvmmed_vit.pth", _segment_anything_names(model))
    return Published(str(folder), _sam_tokens(model), weights, "the network with use_abs_pos=False", "gap", ())


def sam_of_transformers(folder: Path) -> Published:
    model = _sam()
    model.save_pretrained(folder)
    size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    transformers.SamImageProcessor(**size).save_pretrained(folder)
    return Published(str(folder), _sam_tokens(model), {"fit": "squash"}, vector="gap", prefix=())


# transformers


def _of_transformers(folder: Path) -> Published:
    network = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    network = getattr(network, "vision_model", network)
    return Published(str(folder), lambda pixels: network(pixels).last_hidden_state)


def phikon(folder: Path) -> Published:
    return _of_transformers(save.save_vit(folder, pooler=False))


def phikon_v2(folder: Path) -> Published:
    return _of_transformers(save.save_dinov2(folder))


def midnight(folder: Path) -> Published:
    return _of_transformers(save.save_dinov2(folder, use_swiglu_ffn=True))


def rad_dino(folder: Path) -> Published:
    """Its repository also holds facebook's form of the backbone and the head of its training."""
    save.save_dinov2(folder)
    save_file({"last_layer.weight": torch.ones(2, 2)}, folder / "dino_head.safetensors")
    save_file(facebook_names(load_file(folder / "model.safetensors")), folder / "backbone_compatible.safetensors")
    return _of_transformers(folder)


def rad_dino_of_facebook(folder: Path) -> Published:
    weights = {"weights": str(folder / "backbone_compatible.safetensors")}
    return replace(rad_dino(folder), options=weights, says="names of facebook's DINOv2")


def facebook_names(tensors: dict[str, torch.Tensor], chunks: str = "") -> dict[str, torch.Tensor]:
    """transformers' DINOv2 in the names of facebookresearch/dinov2: queries, keys and values in one."""
    return renamed(
        fused(tensors, [f".attention.attention.{part}." for part in ("query", "key", "value")], ".attn.qkv."),
        (r"^encoder\.layer\.(\d+)\.", rf"blocks.{chunks}\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^embeddings\.", ""),
        ("position_embeddings", "pos_embed"),
        (r"patch_embeddings\.projection", "patch_embed.proj"),
    )


def plip(folder: Path) -> Published:
    """PLIP, and PubMedCLIP on the hub: a CLIPModel."""
    return _of_transformers(save.save_clip(folder))


def medclip_swin(folder: Path) -> Published:
    """MedCLIP's ViT: transformers' Swin and a BERT in one file; its settings are those of the Swin it began from."""
    save_tiny(folder, "swin")
    network = wide(transformers.AutoModel.from_pretrained(folder), seed=1)
    state = under("vision_model.model.", network.state_dict())
    state |= {"vision_model.projection_head.weight": torch.ones(4, 32), "logit_scale": torch.ones(())}
    state |= {"text_model.model.encoder.layer.0.attention.output.dense.weight": torch.ones(4, 4)}
    weights = weights_in(folder, "pytorch_model.bin", state)
    tokens = lambda pixels: network(pixels).last_hidden_state  # noqa: E731
    return Published(str(folder), tokens, weights, "the network under vision_model.model.", "pooler", ())


# CNNs and Swins


def medclip_resnet(folder: Path) -> Published:
    network = models.resnet18()
    network.fc = nn.Linear(512, 32, bias=False)  # its projection
    wide(network)
    state = under("vision_model.model.", network.state_dict())
    state |= {"text_model.model.embeddings.word_embeddings.weight": torch.ones(4, 4), "logit_scale": torch.ones(())}
    weights = weights_in(folder, "pytorch_model.bin", state)
    return Published("torchvision:resnet18", _last_map(network), weights, "under vision_model.model.", "gap", ())


def lvm_med_resnet(folder: Path) -> Published:
    """LVM-Med's ResNet: torchvision's names, no classifier."""
    network = wide(models.resnet18())
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    weights = weights_in(folder, "lvmmed_resnet.pth", state)
    return Published("torchvision:resnet18", _last_map(network), weights, vector="gap", prefix=())


def _last_map(network: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    body = nn.Sequential(*list(network.children())[:-2]).eval()
    return lambda pixels: as_rows(body(pixels))


SWIN = {"img_size": 96, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 6, "num_classes": 0}


def simmim(folder: Path) -> Published:
    """SimMIM's Swin: microsoft's names (a stage ends with its downsampling), masks and indices, a decoder."""
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in SWIN.items()}
    network = wide(timm.create_model("swin_base_patch4_window7_224", **arguments))
    timm_folder(folder, "swin_base_patch4_window7_224", SWIN, 96)
    own = {name.replace("layers.1.downsample", "layers.0.downsample"): t for name, t in network.state_dict().items()}
    own |= {"layers.0.blocks.1.attn_mask": torch.zeros(16, 36, 36), "mask_token": torch.zeros(1, 1, 16)}
    own |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(36, 36, dtype=torch.int64)}
    state = under("encoder.", own) | {"decoder.0.weight": torch.ones(4, 4, 1, 1), "decoder.0.bias": torch.ones(4)}
    content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 799}
    weights = weights_in(folder, "simmim.pth", content)
    tokens = lambda pixels: network.forward_features(pixels).flatten(1, 2)  # noqa: E731
    return Published(str(folder), tokens, weights, "the network under encoder.", "gap", ())


class XrvDenseNet(models.DenseNet):
    """TorchXRayVision's: torchvision's DenseNet of one channel, published as a whole object."""

    def __init__(self) -> None:
        super().__init__(growth_rate=32, block_config=(1, 1, 1, 1), num_init_features=64, num_classes=18)
        self.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)


def xrv(folder: Path) -> Published:
    """As a state dict, with what its library does to pixels written down: (2x − 1)·1024 of x from 0 to 1."""
    network, arguments = wide(XrvDenseNet()), {"in_chans": 1, "block_config": [1, 1, 1, 1]}
    feeding = {"channels": 1, "mean": [0.5], "std": [0.5 / 1024], "classifier": "classifier"}
    timm_folder(folder, "densenet121", arguments, 64, **feeding)
    weights = weights_in(folder, "weights.pt", network.state_dict())
    tokens = lambda pixels: as_rows(network.features(pixels).relu())  # noqa: E731
    return Published(str(folder), tokens, weights, vector="gap", prefix=())


PUBLISHED: tuple[Callable[[Path], Published], ...] = (
    gigapath, h_optimus, virchow, virchow2, uni, uni_by_its_file, uni2, named_mlp, biomedclip, biomedclip_by_its_file,
    conch, pubmedclip_of_openai, medsam, medsam_in_its_folder, lvm_med, sam_of_transformers, phikon, phikon_v2,
    midnight, rad_dino, rad_dino_of_facebook, plip, medclip_swin, medclip_resnet, lvm_med_resnet, simmim, xrv,
)  # fmt: skip
