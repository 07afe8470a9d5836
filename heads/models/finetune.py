"""Fine-tuning: a whole pretrained network with a new linear layer on its vector, saved so that ``extract`` takes it.

``finetune:<backbone>``: all that leads to the vector the network was made for, its own preprocessing and dropout.

    config.json, model.safetensors, preprocessor_config.json   of transformers: what ``--backbone hf:FOLDER`` reads,
                                                               and where it can ``pipeline("image-classification")``
    model.safetensors                                          of torchvision and timm: what ``--weights`` reads
    finetuned.json                                             what it began as, and the vector its classifier takes

Additions (`adapters`) are worked into the weights. The classifier is the head of the run, not calibrated; a copy of it
that is lies with the network where transformers has a class for both (``ViTForImageClassification``, …), so that
``pipeline("image-classification")`` gives the probabilities of ``featurecache predict``.

B batch, C classes, T tokens of which the first P are no patches, D width, h and w in pixels or patches.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featurecache.backbones import load_backbone, load_without_weights
from featurecache.backbones.aliases import ALIASES
from featurecache.backbones.base import Backbone, PooledMap, Tokens
from featurecache.errors import BadOption, CacheError, FeatureCacheError, OutputRefused, RunError, UnknownHead
from featurecache.files.records import read_record
from featurecache.formatting import shell_word
from featurecache.images.preprocessing import Preprocess
from heads.metrics.calibration import Calibration
from heads.models.adapters import add_lora, add_rlrr, check_adapters, is_norm, merge_adapters
from heads.models.common import FINETUNE, Baseline, own_randomness
from heads.models.published import Grid
from heads.settings import Settings

# As the ViT of the Medical MNIST notebook was trained.
PUBLISHED = {
    "optimizer": "adamw", "lr": 2e-5, "weight_decay": 0.01, "epochs": 20, "batch_size": 16, "patience": 0,
    "balance": False, "select": "loss",
}  # fmt: skip
# Of the few new parameters of LoRA and RLRR. Published: 3e-3 in batches of 256 (RLRR's repository), 5e-3 in batches of
# 128 (peft's guide to image classification); by the root of the ratio to 16 that is 0.75e-3 and 1.8e-3.
ADAPTED = {"lr": 1e-3}
FORMAT = 1
RECORD, WEIGHTS = "finetuned.json", "model.safetensors"
CLOSE = 1e-4  # of logits, absolute and relative: another order of the same sums
_KINDS = {"format": int, "provider": str, "name": str, "vector": str, "image_size": int, "sized": bool}


def finetune_info(name: str, weights: str | None = None, adapted: bool = False) -> Baseline:
    """The record of ``finetune:<name>``, without loading its weights."""
    if not name or name.startswith("python:"):
        raise UnknownHead(
            f"{FINETUNE}{name}: expected {FINETUNE}<backbone>, such as {FINETUNE}vit-in21k or {FINETUNE}resnet50; a "
            "network of your own is trained by your own code."
        )
    outline = _outline(name, weights, None, _stamp(name, weights))
    return Baseline(
        f"{name} from its published weights, with a new linear layer on its {outline.vector}",
        outline.image_size[0],
        lambda size: _outline(name, weights, size, _stamp(name, weights)).preprocess,
        with_new_classifier,
        PUBLISHED | (ADAPTED if adapted else {}),
        outline.provenance["source"],
    )


def from_pretrained(settings: Settings, image_size: int) -> Backbone:
    """What these settings begin from; raises what `load_backbone` does where its weights are missing or do not fit."""
    return load_backbone(
        settings.head.removeprefix(FINETUNE), weights=settings.weights, random_weights=settings.random_weights,
        seed=settings.seed, image_size=image_size,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _outline(name: str, weights: str | None, size: int | None, stamp: tuple[int, ...]) -> Backbone:
    return load_without_weights(name, weights=weights, **{} if size is None else {"image_size": size})


def _stamp(name: str, weights: str | None) -> tuple[int, ...]:
    """When the settings in a folder of weights were written: another checkpoint may lie there by now."""
    folders = [Path(place).expanduser() for place in (name.removeprefix("hf:"), weights) if place]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    return tuple(file.stat().st_mtime_ns for file in files)


def with_new_classifier(
    settings: Settings, image_size: int, classes: int, generator: torch.Generator, backbone: Backbone | None = None
) -> FineTuned:
    """The network of ``finetune:<backbone>`` with a new classifier; its additions are drawn from ``generator``.
    ``backbone``: the one these settings begin from, which becomes a part of it."""
    name = settings.head.removeprefix(FINETUNE)
    backbone = backbone or from_pretrained(settings, image_size)
    check_adapters(name, backbone.model, settings.lora, settings.rlrr)
    if backbone.provenance["provider"] == "torchvision" and backbone.position_embeddings.startswith("interpolated"):
        raise BadOption(
            f"--image-size {image_size}: a ViT of torchvision that was tuned so could not be loaded again, for its "
            "builder has the position embeddings of one size. Leave it out, or take a ViT of hf: or timm:."
        )
    provenance, sized = backbone.provenance, image_size != finetune_info(name, settings.weights).image_size
    origin = {
        "provider": provenance["provider"], "name": provenance["request"]["name"],
        **{key: provenance[key] for key in ("id", "revision", "licence")}, "weights": backbone.weights,
        "vector": backbone.vector, "image_size": backbone.image_size[0], "sized": sized,
    }  # fmt: skip
    with own_randomness(generator):
        module = FineTuned(backbone, classes, origin, settings.dropout or 0.0)
        if isinstance(module.network, Tokens) and (settings.lora is not None or settings.rlrr):
            add_rlrr(module.network) if settings.lora is None else add_lora(module.network, settings.lora)
            module.adapted = True
    return module


def save_backbone(
    module: FineTuned, folder: Path, *, classes: Sequence[str] = (), multilabel: bool = False,
    calibration: Calibration | None = None,
) -> str:  # fmt: skip
    """Write the network; return what to give ``extract`` so that it takes it. With the names of ``classes`` and the
    ``calibration`` of their logits, as a model for image classification where transformers has one that is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    model = merge_adapters(module.network) if module.adapted else module.network
    network: Any = model.network
    unused = unused_parameters(model, module.vector)
    left_out = {name.removeprefix("network.") for name in unused if "mask_token" not in name}
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items() if k not in left_out}
    record = {"format": FORMAT, **module.origin, "classifier": None}
    if module.origin["provider"] == "hf":
        from featurecache.backbones.transformers_models import quiet

        processor = processor_of(module.preprocess)
        with quiet():
            whole = _classification_model(module, network, state, classes, multilabel, calibration)
            if whole is None:
                network.save_pretrained(folder, state_dict=state)
            else:
                whole.save_pretrained(folder)
                record["classifier"] = type(whole).__name__
            processor.save_pretrained(folder)
    else:
        from safetensors.torch import save_file

        save_file(state, folder / WEIGHTS, {"format": "pt"})
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return extract_options(folder)


def _noise(module: FineTuned, count: int) -> torch.Tensor:
    """Images of noise as the network sees them: [count,3,h,w], normalised."""
    pixels = 255 * torch.rand(count, 3, *module.preprocess.size, generator=torch.Generator().manual_seed(0))
    return module.preprocess.normalised(pixels.to(module.classifier.weight.device))


@torch.no_grad()
def _classification_model(
    module: FineTuned, network: Any, state: dict[str, torch.Tensor], classes: Sequence[str], multilabel: bool,
    calibration: Calibration | None,
) -> Any:  # fmt: skip
    """The model of transformers for image classification that is ``network``, whose weights are ``state``, with the
    classifier of ``module`` behind it: (W x + b + correction) / temperature as one linear layer. None without a
    ``calibration``, or where transformers has none that computes the same, which is not known of a class but measured:
    its logits of two images of noise are compared with ours."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as kinds

    kind = kinds.get(type(network.config), None)
    if kind is None or calibration is None:
        return None
    config = copy.deepcopy(network.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = f"{'multi' if multilabel else 'single'}_label_classification"
    with torch.random.fork_rng():
        model = (kind[0] if isinstance(kind, tuple) else kind)(config).eval()
    behind = getattr(model, "classifier", nn.Identity())
    layers = [part for part in behind.modules() if isinstance(part, nn.Linear)]
    weight, bias = (value.detach().cpu().double() for value in (module.classifier.weight, module.classifier.bias))
    if len(layers) != 1 or layers[0].weight.shape != weight.shape:
        return None
    correction = torch.tensor(calibration.correction, dtype=torch.float64)
    layers[0].weight.copy_(weight / calibration.temperature)
    layers[0].bias.copy_((bias + correction) / calibration.temperature)
    x = _noise(module, 2)
    try:
        model.base_model.load_state_dict(state)
        logits = model(x).logits
    except (RuntimeError, ValueError):  # other parts than ours, or another size of images
        return None
    return model if torch.allclose(logits, layers[0](module.vectors(x)), CLOSE, CLOSE) else None


def classifier_class(folder: Path) -> str | None:
    """The class of transformers that the network in ``folder`` and its classifier can be loaded as, if there is one."""
    name = _record(folder).get("classifier")
    return name if isinstance(name, str) else None


def processor_of(preprocess: Preprocess) -> Any:
    """An image processor of transformers that does just this."""
    import transformers
    from PIL import Image

    from featurecache.backbones.processors import from_processor

    sides = ("shortest_edge",) if preprocess.mode == "shortest" else ("height", "width")
    settings = {
        "do_resize": preprocess.mode != "none", "size": dict(zip(sides, preprocess.resize, strict=False)) or None,
        "do_center_crop": preprocess.crop is not None,
        "crop_size": dict(zip(("height", "width"), preprocess.crop or (), strict=False)) or None,
        "do_rescale": preprocess.scale is not None, "rescale_factor": preprocess.scale,
        "do_normalize": preprocess.mean is not None, "image_mean": preprocess.mean, "image_std": preprocess.std,
        "do_convert_rgb": preprocess.channels == 3,
        "resample": int(Image.Resampling[preprocess.interpolation.removesuffix("-exact").upper()]),
    }  # fmt: skip
    processor = transformers.CLIPImageProcessor(**{key: value for key, value in settings.items() if value is not None})
    assert from_processor(processor, preprocess.channels) == preprocess
    return processor


def extract_options(folder: Path) -> str:
    """The options of ``extract`` for what `save_backbone` wrote into ``folder``."""
    record = _record(folder)
    if record["provider"] == "hf":
        options = f"--backbone {shell_word(f'hf:{folder}')}"
    else:
        options = f"--backbone {shell_word(record['name'])} --weights {shell_word(folder / WEIGHTS)}"
    return options + (f" --image-size {record['image_size']}" if record["sized"] else "")


def _record(folder: Path) -> dict[str, Any]:
    """What `save_backbone` wrote; it may be somebody else's. Raises RunError."""
    try:
        record = read_record(folder / RECORD)
    except (CacheError, OSError) as error:
        raise RunError(f"{folder} is no fine-tuned network, or is damaged: {error}") from error
    wrong = [key for key, kind in _KINDS.items() if not isinstance(record.get(key), kind)]
    if not wrong:
        alias = ALIASES.get(record["name"])
        name, provider = alias.id if alias else record["name"], record["provider"]
        if provider != "hf" and not (provider in ("torchvision", "timm") and name.startswith(f"{provider}:")):
            wrong.append("provider")
    if wrong or record["format"] != FORMAT:
        raise RunError(f"{folder / RECORD} is damaged: it has no proper {' and no '.join(wrong or ['format'])}.")
    return record


def classifier_state(module: FineTuned) -> dict[str, torch.Tensor]:
    """``weight`` [C,D] and ``bias`` [C] of the new classifier: what is left of a run's network beside its folder."""
    return {f"classifier.{key}": value.detach().cpu().clone() for key, value in module.classifier.state_dict().items()}


def load_finetuned(folder: Path, state: dict[str, torch.Tensor], *, classes: int | None = None) -> FineTuned:
    """The network that `save_backbone` wrote with the classifier of `classifier_state`, in eval mode. Raises RunError
    where they do not belong together."""
    record, place = _record(folder), folder / WEIGHTS
    name, weights = (f"hf:{folder}", None) if record["provider"] == "hf" else (record["name"], str(place))
    try:
        backbone = load_backbone(name, weights=weights, image_size=record["image_size"])
    except FeatureCacheError as error:
        raise RunError(f"{folder} is no fine-tuned network, or is damaged: {error}") from error
    weight = state.get("classifier.weight")
    if weight is None or weight.ndim != 2 or set(state) != {"classifier.weight", "classifier.bias"}:
        raise RunError(f"{folder}: its classifier is missing; expected a weight [C,D] and a bias [C].")
    if state["classifier.bias"].shape != weight.shape[:1] or classes not in (None, len(weight)):
        wanted = classes or "a bias for each"
        raise RunError(f"{folder}: its classifier is of {len(weight)} classes; expected {wanted}.")
    if backbone.vector != record["vector"] or weight.shape[1] != backbone.width:
        raise RunError(
            f"{folder} gives a {backbone.vector} of {backbone.width} numbers, and its classifier takes a "
            f"{record['vector']} of {weight.shape[1]}."
        )
    module = FineTuned(backbone, len(weight), {key: value for key, value in record.items() if key != "format"})
    module.classifier.load_state_dict({key.removeprefix("classifier."): value for key, value in state.items()})
    return module.eval()


SPREAD = 0.02  # standard deviation of a new classifier's weights; that of transformers' own


class FineTuned(nn.Module):
    """Pixels [B,3,h,w] with values 0 to 255 -> logits [B,C]: ``network`` with all that its vector does not need taken
    away, then ``classifier``. ``origin``: what it began as, as data; ``sized``: at another image size than the
    checkpoint's own."""

    def __init__(self, backbone: Backbone, classes: int, origin: dict[str, Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.preprocess, self.channels_last = backbone.preprocess, backbone.channels_last
        self.vector, self.prefix, self.grid = backbone.vector, backbone.prefix, backbone.grid
        self.origin, self.adapted = origin, False
        self.network = backbone.model
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(backbone.width, classes)
        nn.init.normal_(self.classifier.weight, std=SPREAD)
        nn.init.zeros_(self.classifier.bias)
        _strip(self.network, self.vector)
        self.requires_grad_(True).train()
        for name in unused_parameters(self.network, self.vector):
            self.network.get_parameter(name).requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.vectors(self.preprocess.normalised(pixels))))

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B,3,h,w] -> the vector [B,D] that ``extract`` keeps of it."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        source = "tokens" if self.vector in ("cls", "mean") else self.vector
        values = self.network(x, {source})[source]
        if self.vector == "cls":
            return values[:, 0]
        return values[:, len(self.prefix) :].mean(1) if self.vector == "mean" else values

    @property
    def cam_grid(self) -> Grid | None:
        """(P, h, w) of a transformer's tokens; None where ``cam_layer`` gives a map [B,D,h,w]."""
        return (len(self.prefix), *self.grid) if isinstance(self.network, Tokens) else None

    @property
    def cam_layer(self) -> nn.Module:
        """The module whose output Grad-CAM takes: the first norm of a transformer's last block (of what comes after
        it, the head may see the class token alone), the module that gives a CNN's last map."""
        if isinstance(self.network, Tokens):
            blocks: Any = self.network.network.get_submodule(self.network.blocks)
            return next(part for part in blocks[-1].modules() if is_norm(part))
        return self.network.get_submodule(_gives_map(self))


def _strip(model: nn.Module, vector: str) -> None:
    """Take away what was behind the vector: the old classifier, or a pooling that it does not go through."""
    network: Any = model.network
    if isinstance(model, PooledMap):
        for path in model.tail:
            network.set_submodule(path, nn.Identity())
    elif isinstance(getattr(network, "heads", None), nn.Module):  # torchvision's ViT
        network.heads = nn.Identity()
    elif isinstance(model, Tokens) and vector != "pooler" and hasattr(network, "pooler"):
        network.pooler = None


def unused_parameters(model: nn.Module, vector: str) -> list[str]:
    """Parameters that ``vector`` does not depend on: a mask token, CLIP's norm behind the class token."""
    from featurecache.backbones.transformers_families import FAMILIES

    inside = {name.removeprefix("network."): name for name, _ in model.named_parameters()}
    unused = [name for name in inside.values() if name.endswith("mask_token")]
    family = FAMILIES.get(getattr(getattr(model.network, "config", None), "model_type", ""))
    if family is not None and vector != "pooler":
        unused += [inside[name] for name in family.pooled_names(inside)]
    return unused


def _gives_map(module: FineTuned) -> str:
    """The name of the module of the network whose output is the last map [B,D,h,w]; found on an image of noise."""
    maps: dict[str, torch.Tensor] = {}
    assert not module.training, "it would change what BatchNorm holds"

    def store(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            maps[name] = output

    hooks = [part.register_forward_hook(partial(store, name)) for name, part in module.network.named_modules()]
    try:
        with torch.no_grad():
            tokens = module.network(_noise(module, 1), {"tokens"})["tokens"]
    finally:
        for hook in hooks:
            hook.remove()
    same = [name for name, each in maps.items() if torch.equal(each.flatten(2).transpose(1, 2), tokens)]
    if not same:
        raise OutputRefused("no layer of this network gives its last map, so there is no Grad-CAM of it.")
    return min(same, key=len)
