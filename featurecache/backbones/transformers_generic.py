"""Any vision model of transformers by measuring: what `AutoModel` gives for an image, and which of it is what.

A model type that `featurecache.backbones.transformers_families` does not know is taken where its network makes a
``last_hidden_state`` of pixels alone. Three images, two of noise and one mixed of both, show the rest:

    [B,C,h,w]    a map: ``tokens`` row by row, and ``gap``
    [B,T,D]      ``tokens``. Embeddings that no image changes are the prefix; the others are the patches, and those of a
                 changed quarter of the image must be those of the same quarter of the grid
    alone        an image has the same numbers beside other images
    NaN          put into the tensors that the checkpoint lacks: what turns NaN was not trained

The library's own call is what is kept. Masking, which ViT-MAE does also when it is not trained, is off.

Axis letters: B batch, T tokens = P prefix tokens + h·w patches, D width, C channels, h and w the sides of a map.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featurecache.backbones.base import SAME, earlier_blocks, freeze, relative_l2, store_outputs
from featurecache.backbones.state_dicts import first_names
from featurecache.errors import OutputRefused, UnknownBackbone, WeightsDoNotFit, first_line

_MASKS = ("vit_mae",)
NO_TOKENS = {"cls": "a CNN has no class token; gap is its vector", "pooler": "a CNN's vector is gap"}
UNPOOLED = "{} was saved without the weights of its pooler, and random ones mean nothing"


def vision_class(title: str, config: Any) -> tuple[str, str, str]:
    """(class of transformers, its image processor's, prefix of its tensors in checkpoints of larger models) that
    `AutoModel` and `AutoImageProcessor` take for ``config``. "model" is no such prefix: RADIO has it inside its own
    names, DINOv3 of a part of them.

    Raises UnknownBackbone for what is no model of images alone.
    """
    import transformers

    kind, known = config.model_type, transformers.MODEL_MAPPING.get(type(config), None)
    cls = known[0] if isinstance(known, tuple | list) else known
    refusal = f'{title} holds a model of type "{kind}"'
    if cls is None:
        raise UnknownBackbone(f"{refusal}, for which AutoModel of transformers has no network")
    if cls.__name__.startswith("Timm"):
        raise UnknownBackbone(f"{refusal}, a network of timm: --backbone timm:<name> takes it")
    first, *others = [p for p in inspect.signature(cls.forward).parameters.values() if p.name != "self"]
    if first.name != "pixel_values":
        raise UnknownBackbone(f"{refusal}: {cls.__name__} takes {first.name}; expected a vision model, of images alone")
    needs = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needs:
        raise UnknownBackbone(f"{refusal}: {cls.__name__} needs {' and '.join(needs)} beside the pixels of an image")
    processors: Any = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {})
    if "pixel_mask" in (p.name for p in others):
        raise UnknownBackbone(f"{refusal}: {cls.__name__} finds objects, so its tokens are queries and not patches")
    if kind in _MASKS:
        config.mask_ratio = 0.0
    prefix = "" if cls.base_model_prefix == "model" else cls.base_model_prefix
    return cls.__name__, processors.get("torchvision", "ViTImageProcessor"), prefix


def published_tensors(network: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of ``network``'s state dict under the names, and in the pieces, in which its ``save_pretrained`` writes
    them: in memory they change from version to version of the library. ``network`` is new: of a loaded one the library
    remembers by which names it came."""
    from transformers.core_model_loading import revert_weight_conversion

    published: dict[str, torch.Tensor] = revert_weight_conversion(network, dict(tensors))
    return published


def sides(config: Any, name: str, default: int | None = None) -> tuple[int, int]:
    """(height, width) in pixels of a field of a configuration, one number or two. Raises WeightsDoNotFit."""
    value = getattr(config, name, None)
    value = default if value is None else value
    size: Any = (value, value) if isinstance(value, int) else value
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise WeightsDoNotFit(f"a config.json of {config.model_type} with {name} {value}; expected pixels, one or two")
    return size[0], size[1]


def image_channels(config: Any) -> int:
    """C of the images that a network takes."""
    return int(getattr(config, "num_channels", 3))


def interpolates_positions(config: Any) -> bool:
    """Whether a network interpolates its position embeddings when it is told to, and only then."""
    import transformers

    forward = transformers.MODEL_MAPPING[type(config)].forward
    return "interpolate_pos_encoding" in inspect.signature(forward).parameters


# Of a configuration, what decides no feature: names, paths, versions, labels, how the library is to be used; and one
# that transformers 5.17 does not list: whether a SigLIP has its head shows in the weights.
_BOOKKEEPING = {
    "_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "model_type",
    "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
    "chunk_size_feed_forward", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
    "vision_use_head",
}  # fmt: skip


def plain_config(config: Any) -> dict[str, Any]:
    """The resolved configuration as canonical JSON holds it: the keys that its class knows, without bookkeeping."""
    keys = type(config)().to_dict().keys() - _BOOKKEEPING
    canonical: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k in keys}))
    return canonical


class MeasuredModel(nn.Module):
    """The network's own call: ``tokens`` is last_hidden_state [B,T,D], of a map [B,h·w,C]; ``tokens@-k`` is what comes
    out of block -k, through ``norm``; ``pooler`` and ``gap`` are pooler_output [B,D], where ``averages`` their mean."""

    def __init__(self, network: nn.Module, interpolates: bool) -> None:
        super().__init__()
        self.network, self.norm, self.averages = network, "", False
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolates else {}

    def call(self, pixels: torch.Tensor, **options: Any) -> Any:
        """The library's output for pixels [B,C,h,w]."""
        config: Any = self.network.config
        if config.model_type in _MASKS:  # noise that rises from patch to patch leaves all of them in their order
            patches = math.prod(side // config.patch_size for side in pixels.shape[2:])
            options["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        return self.network(pixels, **self.options, **options)

    def forward(self, pixels: torch.Tensor, want: set[str]) -> dict[str, torch.Tensor]:
        earlier = {name: index for name, index in earlier_blocks(want).items() if index < -1}
        output = self.call(pixels, output_hidden_states=True) if earlier else self.call(pixels)
        norm = self.network.get_submodule(self.norm) if self.norm else nn.Identity()
        result = {name: norm(output.hidden_states[index]) for name, index in earlier.items()}
        result["tokens"] = result["tokens@-1"] = _rows(output.last_hidden_state)
        if want & {"pooler", "gap"}:
            vector = result["tokens"].mean(1) if self.averages else output.pooler_output.flatten(1)
            result["pooler"] = result["gap"] = vector
        return {name: result[name] for name in want}


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


@dataclass(frozen=True)
class NetworkParts:
    """What a network gives, as `Backbone` has it."""

    model: nn.Module
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    layers: int
    channels_last: bool
    refusals: dict[str, str]


@torch.no_grad()
def measure(title: str, network: Any, size: tuple[int, int], interpolates: bool, missing: set[str]) -> NetworkParts:
    """Run it on images of ``size``. ``missing``: tensors that the weights lack.

    Raises OutputRefused: it does not take them, gives no tokens of an image, or others beside another image.
    WeightsDoNotFit: the tokens depend on what is missing.
    """
    model = MeasuredModel(freeze(network), interpolates)

    def refuse(reason: str) -> OutputRefused:
        kind = type(network).__name__
        return OutputRefused(f"{title} cannot be a backbone here: {kind} of transformers was measured, and {reason}")

    pixels = _images(image_channels(network.config), size)
    try:
        output, alone = model.call(pixels, output_hidden_states=True), model.call(pixels[:1])
    except Exception as error:  # whatever the library raises
        reason = f"it does not take images of {size[0]}×{size[1]} pixels ({first_line(error)})"
        raise refuse(reason) from error
    last = getattr(output, "last_hidden_state", None)
    if not isinstance(last, torch.Tensor):
        raise refuse(f"it gives {', '.join(output.keys())}; expected last_hidden_state")
    if len(last) != len(pixels) or last.dim() not in (3, 4):
        raise refuse(f"its last_hidden_state of three images is {list(last.shape)}; expected [3,T,D] or [3,C,h,w]")
    for name in ("last_hidden_state", "pooler_output"):
        distance = relative_l2(alone[name][0], output[name][0]) if isinstance(output.get(name), torch.Tensor) else 0.0
        if not distance <= SAME:
            raise refuse(f"an image has other numbers beside another image (by {distance:.2g} of them)")
    pooled, is_map, tokens = getattr(output, "pooler_output", None), last.dim() == 4, _rows(last)
    pooled = pooled.flatten(1) if isinstance(pooled, torch.Tensor) else None
    hidden = [h for h in getattr(output, "hidden_states", None) or () if isinstance(h, torch.Tensor)]
    names, width = _prefix_names(network, tokens.shape[2]), tokens.shape[2]
    embeddings = hidden[0] if hidden and not is_map and hidden[0].shape[:2] == last.shape[:2] else None
    count = _prefix_length(refuse, embeddings) if embeddings is not None else 0
    grid = _grid(tokens.shape[1] - count, size)
    if grid is None and not count and (names or (pooled is not None and torch.equal(pooled, tokens[:, 0]))):
        count, grid = 1, _grid(tokens.shape[1] - 1, size)  # put before the patches of the last stage
    if grid is None or (is_map and grid != last.shape[2:]):
        raise refuse(f"its last_hidden_state {list(last.shape)} is no grid of images of {size[0]}×{size[1]} pixels")
    if embeddings is not None and not _is_in_rows(embeddings[:, count:].unflatten(1, grid)):
        raise refuse("its tokens do not lie as the patches of an image do, row by row")
    prefix = (*(names or ["cls"]), *(f"reg{k}" for k in range(count)))[:count]
    layers = 0 if is_map else _layers(model, pixels[:1], hidden, last)
    no_pooler = _no_pooler(title, pooled, width, _untrained(title, model, pixels[:1], missing))
    refusals = NO_TOKENS if is_map else token_refusals(prefix, no_pooler)
    model.averages = is_map and (pooled is None or pooled.shape[1] != width)
    return NetworkParts(model, prefix, grid, width, layers, is_map and _runs_channels_last(model, pixels), refusals)


def _images(channels: int, size: tuple[int, int]) -> torch.Tensor:
    """[3,C,H,W]: two images of noise, and the first with the upper right quarter of the second."""
    one, other = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    mixed, (height, width) = one.clone(), size
    mixed[:, : height // 2, width // 2 :] = other[:, : height // 2, width // 2 :]
    return torch.stack([one, other, mixed])


def _prefix_length(refuse: Any, embeddings: torch.Tensor) -> int:
    """How many of the embeddings [3,T,D] are the same in every image."""
    constant = ((embeddings[0] - embeddings[1]).abs().amax(1) <= 1e-6).tolist()
    if not all(constant[: sum(constant)]):
        raise refuse("tokens that no image changes stand behind those of the patches")
    return sum(constant)


def _is_in_rows(patches: torch.Tensor) -> bool:
    """Whether the upper right quarter of the third of the embeddings [3,h,w,D] differs most from the first's."""
    change, (height, width) = (patches[0] - patches[2]).norm(dim=-1), (side // 2 for side in patches.shape[1:3])
    quarters = [change[rows, columns].mean() for rows in (slice(height), slice(-height, None))
                for columns in (slice(-width, None), slice(width))]  # fmt: skip
    return not (height and width) or max(quarters) == quarters[0]


def _grid(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) with h·w = count that one stride in pixels gives, rounded down or up."""
    for stride in range(1, max(size) + 1):
        for rounding in (0, stride - 1):
            h, w = ((side + rounding) // stride for side in size)
            if h * w == count:
                return h, w
    return None


def _prefix_names(network: nn.Module, width: int) -> list[str]:
    """What the first tokens are called by the parameters they come from: class tokens, then that of distillation."""
    names: list[str] = []
    for word, called in (("cls|class", "cls"), ("dist", "dist")):
        tokens = [p for name, p in network.named_parameters() if re.search(word, name.rpartition(".")[2])]
        names += [f"{called}{k or ''}" for k in range(sum(p.numel() for p in tokens) // width)]
    return names


def _runs_channels_last(model: MeasuredModel, pixels: torch.Tensor) -> bool:
    try:
        model.call(pixels[:1].contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # as a ``view`` of a map raises
        return False
    return True


def _layers(model: MeasuredModel, pixels: torch.Tensor, hidden: list[torch.Tensor], last: torch.Tensor) -> int:
    """How many blocks can be counted from the end: all, where each gives what the last one gives, and what is between
    it and last_hidden_state is nothing or a norm (``model.norm``); else none."""
    blocks = getattr(model.network.config, "num_hidden_layers", 0)
    if len(hidden) != blocks + 1 or any(h.shape != last.shape for h in hidden):
        return 0
    within = {name: module for name, module in model.network.named_modules() if re.search(r"\d", name) is None}
    norms = [name for name, module in within.items() if "Norm" in type(module).__name__]
    lasts = [name for name, _ in model.network.named_modules() if re.fullmatch(rf"\D*\.?{blocks - 1}", name)]
    with store_outputs({name: model.network.get_submodule(name) for name in norms + lasts}) as results:
        final = model.call(pixels).last_hidden_state
    same = [name for name in results if isinstance(results[name], torch.Tensor) and torch.equal(results[name], final)]
    model.norm = next((name for name in same if name in norms), "")
    return blocks if same else 0


def _untrained(title: str, model: MeasuredModel, pixels: torch.Tensor, missing: set[str]) -> bool:
    """Whether the pooled vector depends on tensors that the weights lack. Raises WeightsDoNotFit: the tokens do."""
    state = model.network.state_dict()
    lack = {name: state[name] for name in missing if name in state and state[name].is_floating_point()}
    before = {name: tensor.clone() for name, tensor in lack.items()}
    for tensor in lack.values():
        tensor.fill_(torch.nan)
    output = model.call(pixels)
    for name, tensor in lack.items():
        tensor.copy_(before[name])
    if output.last_hidden_state.isnan().any():
        kind = type(model.network).__name__
        raise WeightsDoNotFit(f"the weights of {title} lack {len(lack)} tensors of {kind}: {first_names(lack)}")
    pooled = getattr(output, "pooler_output", None)
    return isinstance(pooled, torch.Tensor) and bool(pooled.isnan().any())


def _no_pooler(title: str, pooled: torch.Tensor | None, width: int, untrained: bool) -> str:
    """Why the pooled vector [B,·] beside tokens of ``width`` is no output; empty where it is one."""
    if pooled is None:
        return "its network gives no pooled vector"
    if pooled.shape[1] != width:
        return f"its pooled vector has {pooled.shape[1]} numbers, its tokens {width}"
    return UNPOOLED.format(title) if untrained else ""


def token_refusals(prefix: tuple[str, ...], no_pooler: str) -> dict[str, str]:
    """Output -> why a network that gives tokens has none. ``no_pooler``: the reason, where it has no pooled vector."""
    refusals = {"gap": "that is a CNN's; mean is the average of its patch tokens"}
    refusals |= {} if prefix[:1] == ("cls",) else {"cls": "it has no class token"}
    return refusals | ({"pooler": no_pooler} if no_pooler else {})
