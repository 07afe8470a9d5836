"""Small networks in the files in which the medical field publishes its own: names of tensors, nesting, settings.

The original module is written small here where no library has it; else it is the library's own, renamed. Each function
writes into a folder what a user has then, and returns a `Published`: what to type, and the module to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from support import checkpoints as save
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


def wide(network: Any, seed: int = 0) -> Any:
    """In eval mode with wide random numbers, so that norms, biases and scales matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.eval().requires_grad_(False).state_dict().items():
        if value.is_floating_point():
            noise = torch.rand if name.endswith("running_var") else torch.randn
            value += 0.2 * noise(value.shape, generator=generator)
    return network


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


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


# networks of timm by their own config.json


def _of_timm(folder: Path, architecture: str, arguments: dict[str, Any], size: int = 64, **extra: Any) -> Published:
    """``extra``: arguments that its users have to know, since the config.json does not hold them."""
    network = wide(timm.create_model(architecture, **arguments, **extra))
    timm_folder(folder, architecture, arguments, size)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    registers = tuple(f"reg{k}" for k in range(arguments.get("reg_tokens", 0)))
    return Published(str(folder), network.forward_features, prefix=("cls", *registers))


SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
SHOWN = "by its tensors the network with mlp_layer='SwiGLUPacked', act_layer='silu'"


def gigapath(folder: Path) -> Published:
    arguments = {**SMALL, "in_chans": 3, "init_values": 1e-5, "mlp_ratio": 5.33334}
    return _of_timm(folder, "vit_giant_patch14_dinov2", arguments)


def h_optimus(folder: Path) -> Published:
    published = _of_timm(folder, "vit_giant_patch14_reg4_dinov2", {**SMALL, "init_values": 1e-5, "reg_tokens": 4})
    return published


def virchow(folder: Path) -> Published:
    arguments = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True}
    published = _of_timm(folder, "vit_huge_patch14_224", arguments, **GATED)
    published.says = SHOWN
    return published


def virchow2(folder: Path) -> Published:
    arguments = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "reg_tokens": 4}
    published = _of_timm(folder, "vit_huge_patch14_224", arguments, **GATED)
    published.says = SHOWN
    return published


def uni(folder: Path) -> Published:
    """Its config.json is an older one, of one level; what is in it besides ``pretrained_cfg`` timm does not read."""
    network = wide(timm.create_model("test_vit", img_size=224, num_classes=0, init_values=1e-5, dynamic_img_size=True))
    timm_folder(folder, "test_vit", {}, 224)
    record = json.loads((folder / "config.json").read_text())
    flat = {"patch_size": 16, "img_size": 224, "init_values": 1.0, "num_features": 64, "dynamic_img_size": True}
    (folder / "config.json").write_text(json.dumps(record | flat))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return Published(str(folder), network.forward_features, says="the network with init_values=1.0")


def uni_by_its_file(folder: Path) -> Published:
    """The config.json beside a file counts as it does in its folder."""
    published = uni(folder)
    return Published("timm:test_vit", published.network, {"weights": str(folder / "pytorch_model.bin")}, published.says)


UNI2 = {**SMALL, "init_values": 1e-5, "mlp_ratio": 5.33334, "no_embed_class": True, "reg_tokens": 8}


def uni2(folder: Path) -> Published:
    """With the arguments of its card written down, but for the two classes that JSON cannot hold."""
    published = _of_timm(folder, "vit_giant_patch14_224", {**UNI2, "dynamic_img_size": True}, **GATED)
    published.says = SHOWN
    return published


def named_mlp(folder: Path) -> Published:
    published = _of_timm(folder, "vit_giant_patch14_224", UNI2, **GATED)
    record = json.loads((folder / "config.json").read_text())
    record["model_args"] |= {"mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "silu"}
    (folder / "config.json").write_text(json.dumps(record))
    return published


# open_clip's


def _open_clip(network: Any, folder: Path, extra: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    text = {"text.transformer.encoder.layer.0.output.dense.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
    trunk = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    torch.save(under("visual.trunk.", trunk) | text | extra, folder / "open_clip_pytorch_model.bin")


def biomedclip(folder: Path) -> Published:
    network = wide(timm.create_model("test_vit"))
    _open_clip(network, folder, {"visual.head.proj.weight": torch.ones(32, 64)})
    tower = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "image_size": 160}
    record = {"model_cfg": {"embed_dim": 32, "vision_cfg": tower, "text_cfg": {}}, "preprocess_cfg": CLIP}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    return Published(str(folder), network.forward_features, says="the network under visual.trunk.")


def biomedclip_by_its_file(folder: Path) -> Published:
    published = biomedclip(folder)
    weights = str(folder / "open_clip_pytorch_model.bin")
    return Published("timm:test_vit", published.network, {"weights": weights}, published.says)


def conch(folder: Path) -> Published:
    """A CoCa: attentional poolers behind the trunk, images of another size; its open_clip_config.json one writes."""
    network = wide(timm.create_model("test_vit", img_size=192))
    poolers = {f"visual.attn_pool_{kind}.query": torch.ones(2, 8) for kind in ("contrast", "caption")}
    poolers |= {
        "visual.attn_pool_contrast.attn.q_proj_weight": torch.ones(8, 8),
        "visual.ln_contrast.bias": torch.ones(8),
    }
    poolers |= {"visual.proj_contrast": torch.ones(8, 8), "text_decoder.resblocks.0.ln_1.weight": torch.ones(8)}
    _open_clip(network, folder, poolers)
    (folder / "open_clip_pytorch_model.bin").rename(folder / "pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {**CLIP, "size": 192}}))
    weights = {"weights": str(folder / "pytorch_model.bin")}
    return Published("timm:test_vit", network.forward_features, weights, "set aside: logit_scale, text.transformer")


class OpenAIBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class OpenAITower(nn.Module):
    """The image tower of OpenAI's CLIP, with its names."""

    def __init__(self, width: int = 32, grid: int = 4, patch: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(OpenAIBlock(width, 2) for _ in range(2))})
        self.proj = nn.Parameter(torch.randn(width, 16))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x)


def pubmedclip_of_openai(folder: Path) -> Published:
    """PubMedCLIP's own release: OpenAI's names, both towers, with the epoch beside them."""
    tower = wide(OpenAITower())
    text = {"positional_embedding": torch.ones(7, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    text |= {
        "text_projection": torch.ones(8, 8),
        "token_embedding.weight": torch.ones(9, 8),
        "logit_scale": torch.ones(()),
    }
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    timm_folder(folder, "vit_base_patch16_clip_quickgelu_224", arguments, 64, **CLIP)
    torch.save({"epoch": 1, "state_dict": under("visual.", tower.state_dict()) | text}, folder / "PubMedCLIP_ViT32.pth")
    weights = {"weights": str(folder / "PubMedCLIP_ViT32.pth")}
    return Published(str(folder), tower, weights, "5 tensors set aside: logit_scale, positional_embedding")


# segment-anything


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.movedim(-1, 1)


class SamAttention(nn.Module):
    """softmax(q·k/√d + q·R_h[y − y'] + q·R_w[x − x']) v, over the places of one window."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.randn(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.randn(2 * side - 1, width // heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, side, _, width = x.shape
        q, k, v = self.qkv(x).view(b, side, side, 3, self.heads, -1).unbind(3)
        apart = torch.arange(side)[:, None] - torch.arange(side)[None] + side - 1
        scores = torch.einsum("byxnd,bijnd->bnyxij", q, k) * (width // self.heads) ** -0.5
        scores = scores + torch.einsum("byxnd,yid->bnyxi", q, self.rel_pos_h[apart])[..., None]
        scores = scores + torch.einsum("byxnd,xjd->bnyxj", q, self.rel_pos_w[apart])[..., None, :]
        weights = scores.flatten(4).softmax(-1).view_as(scores)
        return self.proj(torch.einsum("bnyxij,bijnd->byxnd", weights, v).reshape(b, side, side, width))


class SamBlock(nn.Module):
    def __init__(self, width: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.window, self.attn = window, SamAttention(width, heads, window or grid)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(width, 4 * width), "lin2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed, side, w = self.norm1(x), x.shape[1], self.window
        if not w:
            x = x + self.attn(normed)
        else:
            count = -(-side // w)
            padded = nn.functional.pad(normed, (0, 0, 0, count * w - side, 0, count * w - side))
            rows = [torch.cat([self.attn(padded[:, y : y + w, z : z + w]) for z in range(0, count * w, w)], 2)
                    for y in range(0, count * w, w)]  # fmt: skip
            x = x + torch.cat(rows, 1)[:, :side, :side]
        return x + self.mlp["lin2"](nn.functional.gelu(self.mlp["lin1"](self.norm2(x))))


class SamEncoder(nn.Module):
    """segment-anything's ImageEncoderViT, with its names: a map [B,C,h,w] behind the neck."""

    def __init__(self, positions: bool = True, width: int = 32, grid: int = 8, out: int = 24) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 8, 8)})
        self.pos_embed = nn.Parameter(torch.randn(1, grid, grid, width)) if positions else None
        self.blocks = nn.ModuleList(SamBlock(width, 2, grid, window) for window in (3, 0))
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False), LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out),
        )  # fmt: skip

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](pixels).permute(0, 2, 3, 1)
        x = x if self.pos_embed is None else x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self(pixels).flatten(2).transpose(1, 2)


SAM = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3, "neck_chans": 24,
       "global_attn_indexes": [1], "use_rel_pos": True}  # fmt: skip


def medsam(folder: Path) -> Published:
    """The whole SAM; its images go from 0 to 1 and are squashed (MedSAM_Inference.py), which the config.json says."""
    encoder = wide(SamEncoder())
    timm_folder(folder, "samvit_base_patch16", SAM, 64, mean=[0.0] * 3, std=[1.0] * 3, crop_mode="squash")
    other = {
        "prompt_encoder.no_mask_embed.weight": torch.ones(1, 24),
        "mask_decoder.iou_token.weight": torch.ones(1, 24),
    }
    other |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.ones(2, 12)}
    torch.save(under("image_encoder.", encoder.state_dict()) | other, folder / "medsam_vit_b.pth")
    weights = {"weights": str(folder / "medsam_vit_b.pth")}
    says = "names of segment-anything; the network under image_encoder.; 3 tensors set aside: mask_decoder.iou_token"
    return Published(str(folder), encoder.tokens, weights, says, "gap", ())


def medsam_in_its_folder(folder: Path) -> Published:
    published = medsam(folder)
    return Published(published.name, published.network, {}, published.says, "gap", ())


def lvm_med(folder: Path) -> Published:
    """LVM-Med's ViT-B: SAM's encoder alone, made with ``use_abs_pos=False``."""
    encoder = wide(SamEncoder(positions=False))
    timm_folder(folder, "samvit_base_patch16", SAM, 64)
    torch.save(encoder.state_dict(), folder / "lvmmed_vit.pth")
    weights = {"weights": str(folder / "lvmmed_vit.pth")}
    return Published(str(folder), encoder.tokens, weights, "the network with use_abs_pos=False", "gap", ())


def sam_of_transformers(folder: Path) -> Published:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
              "mlp_dim": 48, "output_channels": 24, "window_size": 3, "global_attn_indexes": [1]}  # fmt: skip
    prompt = {"hidden_size": 24, "image_size": 64, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 8}
    decoder = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
    }
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    network = wide(transformers.SamModel(config))
    network.save_pretrained(folder)
    size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    transformers.SamImageProcessor(**size).save_pretrained(folder)

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return network.vision_encoder(pixels).last_hidden_state.flatten(2).transpose(1, 2)

    return Published(str(folder), tokens, {"fit": "squash"}, vector="gap", prefix=())


# transformers


def _hidden(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    network = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    network = getattr(network, "vision_model", network)
    return lambda pixels: network(pixels).last_hidden_state


def phikon(folder: Path) -> Published:
    save.save_vit(folder, pooler=False)
    return Published(str(folder), _hidden(folder))


def phikon_v2(folder: Path) -> Published:
    save.save_dinov2(folder)
    return Published(str(folder), lambda x: _hidden(folder)(x))


def midnight(folder: Path) -> Published:
    save.save_dinov2(folder, use_swiglu_ffn=True)
    return Published(str(folder), lambda x: _hidden(folder)(x))


def rad_dino(folder: Path) -> Published:
    """Its repository also holds facebook's form of the backbone and the head of its training."""
    save.save_dinov2(folder)
    save_file({"last_layer.weight": torch.ones(2, 2)}, folder / "dino_head.safetensors")
    save_file(facebook_names(load_file(folder / "model.safetensors")), folder / "backbone_compatible.safetensors")
    return Published(str(folder), lambda x: _hidden(folder)(x))


def rad_dino_of_facebook(folder: Path) -> Published:
    published = rad_dino(folder)
    published.options = {"weights": str(folder / "backbone_compatible.safetensors")}
    published.says = "names of facebook's DINOv2"
    return published


def facebook_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' DINOv2 in the names of facebookresearch/dinov2: queries, keys and values in one."""
    pairs = [(r"^encoder\.layer\.(\d+)\.", r"blocks.\1."), (r"\.attention\.output\.dense\.", ".attn.proj.")]
    pairs += [(r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"), (r"^layernorm\.", "norm."), (r"^embeddings\.", "")]
    pairs += [("position_embeddings", "pos_embed"), (r"patch_embeddings\.projection", "patch_embed.proj")]
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".query." in name:
            three = [tensors[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            name, tensor = name.replace(".attention.attention.query.", ".attn.qkv."), torch.cat(three)
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        if not re.search(r"\.(key|value)\.", name):
            own[name] = tensor.contiguous()
    return own


def plip(folder: Path) -> Published:
    """PLIP, and PubMedCLIP on the hub: a CLIPModel."""
    save.save_clip(folder)
    return Published(str(folder), _hidden(folder))


def medclip_swin(folder: Path) -> Published:
    """MedCLIP's ViT: transformers' Swin and a BERT in one file; its settings are those of the Swin it began from."""
    save_tiny(folder, "swin")
    network = wide(transformers.AutoModel.from_pretrained(folder), seed=1)
    state = under("vision_model.model.", network.state_dict())
    state |= {"vision_model.projection_head.weight": torch.ones(4, 32), "logit_scale": torch.ones(())}
    state |= {"text_model.model.encoder.layer.0.attention.output.dense.weight": torch.ones(4, 4)}
    torch.save(state, folder / "pytorch_model.bin")
    weights = {"weights": str(folder / "pytorch_model.bin")}
    tokens = lambda pixels: network(pixels).last_hidden_state  # noqa: E731
    return Published(str(folder), tokens, weights, "the network under vision_model.model.", "pooler", ())


# CNNs and Swins


def medclip_resnet(folder: Path) -> Published:
    network = models.resnet18()
    network.fc = nn.Linear(512, 32, bias=False)  # its projection
    wide(network)
    state = under("vision_model.model.", network.state_dict())
    state |= {"text_model.model.embeddings.word_embeddings.weight": torch.ones(4, 4), "logit_scale": torch.ones(())}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    weights = {"weights": str(folder / "pytorch_model.bin")}
    return Published("torchvision:resnet18", _last_map(network), weights, "under vision_model.model.", "gap", ())


def lvm_med_resnet(folder: Path) -> Published:
    """LVM-Med's ResNet: torchvision's names, no classifier."""
    network, folder = wide(models.resnet18()), folder
    folder.mkdir(exist_ok=True)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    torch.save(state, folder / "lvmmed_resnet.pth")
    weights = {"weights": str(folder / "lvmmed_resnet.pth")}
    return Published("torchvision:resnet18", _last_map(network), weights, vector="gap", prefix=())


def _last_map(network: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    body = nn.Sequential(*list(network.children())[:-2]).eval()
    return lambda pixels: body(pixels).flatten(2).transpose(1, 2)


SWIN = {"img_size": 96, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 6, "num_classes": 0}


def simmim(folder: Path) -> Published:
    """SimMIM's Swin: microsoft's names (a stage ends with its downsampling), masks and indices, a decoder."""
    network = wide(timm.create_model("swin_base_patch4_window7_224", **{k: _tuple(v) for k, v in SWIN.items()}))
    timm_folder(folder, "swin_base_patch4_window7_224", SWIN, 96)
    own = {name.replace("layers.1.downsample", "layers.0.downsample"): t for name, t in network.state_dict().items()}
    own |= {"layers.0.blocks.1.attn_mask": torch.zeros(16, 36, 36), "mask_token": torch.zeros(1, 1, 16)}
    own |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(36, 36, dtype=torch.int64)}
    state = under("encoder.", own) | {"decoder.0.weight": torch.ones(4, 4, 1, 1), "decoder.0.bias": torch.ones(4)}
    torch.save({"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 799}, folder / "simmim.pth")
    weights = {"weights": str(folder / "simmim.pth")}
    tokens = lambda pixels: network.forward_features(pixels).flatten(1, 2)  # noqa: E731
    return Published(str(folder), tokens, weights, "the network under encoder.", "gap", ())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
    torch.save(network.state_dict(), folder / "weights.pt")
    tokens = lambda pixels: network.features(pixels).relu().flatten(2).transpose(1, 2)  # noqa: E731
    return Published(str(folder), tokens, {"weights": str(folder / "weights.pt")}, vector="gap", prefix=())


PUBLISHED: tuple[Callable[[Path], Published], ...] = (
    gigapath, h_optimus, virchow, virchow2, uni, uni_by_its_file, uni2, named_mlp, biomedclip, biomedclip_by_its_file,
    conch, pubmedclip_of_openai, medsam, medsam_in_its_folder, lvm_med, sam_of_transformers, phikon, phikon_v2,
    midnight, rad_dino, rad_dino_of_facebook, plip, medclip_swin, medclip_resnet, lvm_med_resnet, simmim, xrv,
)  # fmt: skip
