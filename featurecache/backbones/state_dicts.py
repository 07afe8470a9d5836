"""What a checkpoint holds: which of several sets of weights, under which prefix, in whose spelling, and what beside it.

A training script leaves more than a network in a file: its moving average, a student and a teacher, a decoder, and all
of it under the names of whatever wrapped it. `StateDict` is one set of weights out of that, and one sentence for each
thing that was decided on the way: what was taken, what else could be (``--weights FILE:NAME``), what was set aside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featurecache.errors import WeightsDoNotFit
from featurecache.formatting import shell_word

Tensors = dict[str, torch.Tensor]

# Of several sets of weights, the one with this word in its name -> whose choice that is.
PREFERRED = {
    "ema": "timm's choice",  # timm.models.load_state_dict(use_ema=True): state_dict_ema, model_ema
    "teacher": "DINO's choice",  # eval_linear.py --checkpoint_key teacher; iBOT, DINOv2
    "encoder_q": "MoCo's choice",  # main_lincls.py
    "base_encoder": "MoCo v3's choice",  # main_lincls.py
    "online": "BYOL's choice",
    "target_encoder": "the choice of MSN and I-JEPA",  # their load_pretrained
}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the state dict
# First parts of names that serve training alone: MAE's decoder, heads of DINO, iBOT and MSN, MoCo's queue.
_TRAINING_PART = re.compile(
    r"(decoder\w*|mask_token|(dino_|ibot_|projection_)?head|fc|projector|predictor|prototypes|queue\w*|n_averaged)(\.|$)"
)


@dataclass(frozen=True)
class StateDict:
    """One set of weights out of the file at ``path``; ``notes``: what was taken and what set aside, for people."""

    path: Path
    tensors: Tensors
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return "; ".join(self.notes)

    def noted(self, *notes: str) -> StateDict:
        return replace(self, notes=(*self.notes, *notes))

    def part(self, names: Mapping[str, str], *notes: str) -> StateDict:
        """The tensors of ``names`` under their new ones; the others are set aside, which is said behind ``notes``."""
        aside = [name for name in self.tensors if name not in names]
        notes = (*notes, f"{len(aside)} tensors set aside: {first_names(aside)}") if aside else notes
        return replace(self, tensors={new: self.tensors[name] for name, new in names.items()}).noted(*notes)

    def fitted(self, title: str, own: Mapping[str, torch.Tensor], children: Iterable[str] = ()) -> StateDict:
        """In the names of the network whose tensors are ``own``: spelled so, without what its names stand behind.
        ``children``: its direct submodules in their order, by whose numbers a Sequential of them has its names.

        Every name counts for the prefix that leaves the longest name of the network; the prefix of most names is taken.
        Where fewer than half of the network is there under any, names stay as they are: other places say what is wrong.

        Raises:
            WeightsDoNotFit: it holds the network several times, and nothing says which is meant.
        """
        spellings = {how: spell(self.tensors) for how, spell in SPELLINGS.items()}
        spellings["a Sequential of its children"] = _numbers_as_names(self.tensors, own, children)
        prefixes = {how: _prefixes(tensors, own) for how, tensors in spellings.items()}
        how = max(spellings, key=lambda each: max(prefixes[each].values(), default=0))
        most = max(prefixes[how].values(), default=0)
        if 2 * most < len(own) or not most:
            return self
        rivals = sorted(prefix for prefix, count in prefixes[how].items() if 2 * count >= most)
        prefix, why = self._chosen_prefix(title, rivals)
        inside = tuple(each for each in rivals if each.startswith(prefix) and each != prefix)  # of another set
        names = [name for name in spellings[how] if name.startswith(prefix) and not name.startswith(inside)]
        notes = [f"names of {how}"] * bool(how)
        notes += [f"the network under {prefix or 'no prefix'}{why}"] if prefix or why else []
        spelt = replace(self, tensors=spellings[how])
        return spelt.part({name: name.removeprefix(prefix) for name in names}, *notes)

    def fitted_part(self, title: str, part: str, own: Mapping[str, torch.Tensor]) -> StateDict:
        """As `fitted`, of the ``part`` (``vit``, ``vision_model``) as which a classifier or a CLIP has the network."""
        checkpoint = self.fitted(title, {f"{part}.{name}": tensor for name, tensor in own.items()})
        starts = [re.match(rf"(.*?\.)?{re.escape(part)}\.", name) for name in checkpoint.tensors]
        prefixes = {match[0] for match in starts if match}
        if len(prefixes - {f"{part}."}) > 1 or not prefixes:
            return self.fitted(title, own)
        prefix = f"{part}." if f"{part}." in prefixes else prefixes.pop()
        names = [name for name in checkpoint.tensors if name.startswith(prefix)]
        return checkpoint.part({name: name.removeprefix(prefix) for name in names})

    def _chosen_prefix(self, title: str, prefixes: list[str]) -> tuple[str, str]:
        """(the prefix that is meant, what else there is, as words)"""
        if len(prefixes) == 1:
            return prefixes[0], ""
        word, who = _preferred(prefixes) or ("", "")
        if "" in prefixes:  # the bare names are the network
            word = ""
        elif not word:
            several, way = ", ".join(prefixes), shell_word(f"{self.path}:{prefixes[0].rstrip('.')}")
            raise WeightsDoNotFit(
                f"the weights hold {title} {len(prefixes)} times, as {several}; expected it once, or the one you mean: "
                f"--weights {way}"
            )
        others = [prefix for prefix in prefixes if prefix != word]
        why = f"{who}; " if word else ""
        return word, f" ({why}also there: {_choices(self.path, (other.rstrip('.') for other in others))})"

    def without_training_parts(self, own: Iterable[str], heads: tuple[str, ...] = ()) -> StateDict:
        """Without decoders, projection heads and queues, of which the network (of tensors ``own``) has nothing of that
        name, and without ``heads``. A mask token without a decoder stays where there is a class token: timm knows
        DINOv2's files by it."""
        first = {name.partition(".")[0] for name in own}
        masked = "cls_token" in first and not any(name.startswith("decoder") for name in self.tensors)
        first |= {"mask_token"} if masked else set()
        parts = {name for name in self.tensors if _TRAINING_PART.match(name) or name.startswith(heads)}
        return self.part({k: k for k in self.tensors if k not in parts or k.partition(".")[0] in first})


def select_state_dict(path: Path, data: Any, name: str = "") -> StateDict:
    """The state dict in what a training script has saved: the one of this name, or by `PREFERRED`, or under one of the
    usual names, or the only one there is. Raises WeightsDoNotFit."""
    sets = {str(k): v for k, v in data.items() if isinstance(v, Mapping) and v} if isinstance(data, Mapping) else {}
    usual = sorted((each for each in _WRAPPERS if each in sets), key=lambda each: not _holds_tensors(sets[each]))
    sets = {key: value for key, value in sets.items() if _holds_tensors(value) or key in usual}
    preferred = _preferred(key for key in sets if _holds_tensors(sets[key]))
    why = ""
    if name in sets:
        key = name
    elif preferred:
        key, why = preferred
    elif usual or not isinstance(data, Mapping) or _holds_tensors(data):
        key = usual[0] if usual else ""
    elif len(sets) > 1:
        raise WeightsDoNotFit(
            f"{path} holds {len(sets)} state dicts ({first_names(sets)}); choose one: "
            f"--weights {shell_word(f'{path}:{sorted(sets)[0]}')}"
        )
    else:
        key = next(iter(sets), "")
    if key and not _holds_tensors(sets[key]) and any(isinstance(value, Mapping) for value in sets[key].values()):
        return select_state_dict(path, sets[key], "" if name == key else name)  # one wrapper inside another
    checkpoint = StateDict(path, _named_tensors(path, sets[key] if key else data))
    size = len(checkpoint.tensors)
    others = [k for k, v in sets.items() if k != key and 2 * sum(map(torch.is_tensor, v.values())) >= size]
    if name and name != key:
        return _part(checkpoint, name, others)
    if name:
        return checkpoint.noted(f"{name}, as asked")
    if others:
        what = f"{key or 'the names without a prefix'} ({why + '; ' if why else ''}also there: "
        return checkpoint.noted(f"{what}{_choices(path, others)})")
    return checkpoint


def _named_tensors(path: Path, values: Any) -> Tensors:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise WeightsDoNotFit(
            f"{path} holds a {type(values).__name__}; expected a state dict, name by name a tensor. A whole network "
            f"becomes one where its library is: torch.save(torch.load({path.name!r}, weights_only=False).state_dict(), "
            "'weights.pt')"
        )
    state = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise WeightsDoNotFit(f"{path} holds no tensors; expected a state dict")
    parallel = all(name.startswith("module.") for name in state)  # saved from DataParallel
    return {name.removeprefix("module.") if parallel else name: value for name, value in state.items()}


def _part(checkpoint: StateDict, name: str, others: list[str]) -> StateDict:
    """What stands under ``name``, a part of the names in a state dict (``module.encoder_q.``)."""
    name = name.strip(".")
    cut = re.compile(rf"(?:^|.*?\.){re.escape(name)}\.(.+)$")
    first = [key for key in checkpoint.tensors if key.startswith(f"{name}.")]  # where names begin so, these alone
    matches = {key: cut.match(key) for key in first or checkpoint.tensors}
    names = {key: match[1] for key, match in matches.items() if match}
    if not names:
        starts = {key.partition(".")[0] for key in checkpoint.tensors}
        raise WeightsDoNotFit(
            f'{checkpoint.path} holds no weights "{name}"; there are {first_names([*others, *starts], 6)}'
        )
    return checkpoint.part(names, f"{name}, as asked")


def _preferred(names: Iterable[str]) -> tuple[str, str] | None:
    """(name, whose choice): of several names of sets of weights; None where there is one, or no word of `PREFERRED`."""
    names = list(names)
    found = (
        (name, who)
        for word, who in PREFERRED.items()
        for name in sorted(names)
        if re.search(rf"(^|[._]){word}([._]|$)", name)
    )
    return next(found, None) if len(names) > 1 else None


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())


def _choices(path: Path, names: Iterable[str]) -> str:
    names = list(names)
    return f"{first_names(names)}; --weights {shell_word(f'{path.name}:{sorted(names)[0]}')}"


def common_names(tensors: Tensors, own: Mapping[str, torch.Tensor]) -> int:
    """How many names of the network are there, under the prefix of most."""
    return max(_prefixes(tensors, own).values(), default=0)


def _prefixes(tensors: Tensors, own: Mapping[str, Any]) -> Counter[str]:
    """Prefix -> how many names it leaves as the network has them."""
    counts: Counter[str] = Counter()
    for name in tensors:
        starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
        start = next((start for start in starts if name[start:] in own), None)
        if start is not None:
            counts[name[:start]] += 1
    return counts


def _numbers_as_names(tensors: Tensors, own: Mapping[str, torch.Tensor], children: Iterable[str]) -> Tensors:
    """Of ``nn.Sequential(*network.children())`` (RadImageNet, lightly) in the names of the network."""
    numbers = {child: number for number, child in enumerate(children)}
    parts = [name.partition(".") for name in own]
    names = {f"{numbers[child]}.{rest}": f"{child}.{rest}" for child, _, rest in parts if child in numbers}
    (prefix, _), *_ = _prefixes(tensors, names).most_common(1) or [("", 0)]
    names = {prefix + number: prefix + name for number, name in names.items()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


_FACEBOOK = (  # as transformers' convert_dinov2_to_hf.py renames them
    (r"(^|\.)blocks\.(?:\d+\.)?(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"(^|\.)norm\.", r"\1layernorm."),
    (r"(^|\.)(cls_token|mask_token|register_tokens)$", r"\1embeddings.\2"),
    (r"(^|\.)pos_embed$", r"\1embeddings.position_embeddings"),
    (r"(^|\.)patch_embed\.proj\.", r"\1embeddings.patch_embeddings.projection."),
)


def _renamed(pattern: str, replacement: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def _transformers_dinov2(tensors: Tensors) -> Tensors:
    """Facebook's DINOv2 in the names of transformers: queries, keys and values one by one. Of a vision transformer
    without its scales of layers nothing: its norms may have another epsilon in transformers."""
    if not any(name.endswith(".ls1.gamma") for name in tensors):
        return tensors
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _FACEBOOK:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=False):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            renamed[name] = tensor
    return renamed


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {  # whose names -> into those of the library; first one as it is
    "": lambda tensors: tensors,
    # "norm.1.weight"
    "DenseNet before torchvision 0.3": _renamed(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$", r"\1\2"),
    "compiled, sharded or checkpointed parts": _renamed(
        r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+", r"\1"
    ),
    # blocks in chunks, for FSDP
    "DINOv2's training": _renamed(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2."),
    "facebook's DINOv2": _transformers_dinov2,
    # SAM, MedSAM, LVM-Med
    "segment-anything": _renamed(r"(^|\.)blocks\.(\d+)\.mlp\.lin([12])\.", r"\1blocks.\2.mlp.fc\3."),
}

# A name that shows whose network a file is of -> the words for it, and the form of backbone that takes it.
_FOREIGN = {
    r"(^|\.)blocks\.0\.attn\.rel_pos_h$": ("segment-anything's names", "timm:samvit_{size}_patch16"),
    r"(^|\.)blocks\.(\d+\.)?\d+\.attn\.qkv\.weight$": ("timm's names of a vision transformer", "timm:{vit}"),
    r"(^|\.)encoder\.layer\.0\.attention\.attention\.query\.weight$": ("the names of transformers", "hf:REPO"),
    r"(^|\.)vision_encoder\.layers\.0\.attn\.rel_pos_h$": ("the names of transformers' SAM", "hf:REPO"),
    r"(^|\.)vision_model\.encoder\.layers\.0\.": ("the names of transformers' CLIP or SigLIP", "hf:REPO"),
    r"(^|\.)visual\.transformer\.resblocks\.0\.": (
        "the names of OpenAI's CLIP",
        "timm:{clip} (where it was not trained from OpenAI's, without quickgelu_)",
    ),
    r"(^|\.)encoder\.layers\.encoder_layer_0\.": (
        "torchvision's names of a vision transformer",
        "torchvision:vit_b_16",
    ),
    r"(^|\.)layers\.0\.blocks\.0\.attn\.qkv\.weight$": ("the names of a Swin", "timm:swin_base_patch4_window7_224"),
    r"(^|\.)layer1\.0\.conv1\.weight$": ("the names of a ResNet", "torchvision:resnet50"),
    r"(^|\.)denseblock1\.denselayer1\.": ("the names of a DenseNet", "torchvision:densenet121"),
    r"(^|\.)downsample_layers\.0\.0\.weight$": ("facebook's names of a ConvNeXt", "timm:convnext_base"),
    r"(^|\.)stages\.0\.blocks\.0\.conv_dw\.": ("timm's names of a ConvNeXt", "timm:convnext_base"),
}
_VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def foreign_names(tensors: Mapping[str, torch.Tensor], library: str, own: Iterable[str] = ()) -> str:
    """``. They bear timm's names …: --backbone timm:…`` where another form than ``library``:, or another network of it
    than the one whose tensors are called ``own``, takes such a file."""
    own = list(own)
    for pattern, (words, form) in _FOREIGN.items():
        there, here = (any(re.search(pattern, name) for name in names) for names in (tensors, own))
        if there and not here and (own or not form.startswith(f"{library}:")):
            return f". They bear {words}: try --backbone {form.format(**_timm_names(tensors))}"
    return ""


def _timm_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What timm calls a vision transformer (``vit``), a CLIP's (``clip``) and the ``size`` of either, by the shapes of
    patches and positions."""
    patches = [v for name, v in tensors.items() if name.endswith(("patch_embed.proj.weight", "visual.conv1.weight"))]
    places = [value for name, value in tensors.items() if name.endswith("pos_embed") and "decoder" not in name]
    size = _VIT_WIDTHS.get(len(patches[0]), "base") if patches else "base"
    patch = patches[0].shape[-1] if patches else 16
    names = {"size": size, "clip": f"vit_{size}_patch{patch}_clip_quickgelu_224", "vit": "NAME"}
    if patches and patches[0].dim() == 4 and len(patches[0]) in _VIT_WIDTHS:
        side = int(max(places[0].shape[-2] - 1, 0) ** 0.5) * patch if places and places[0].dim() == 3 else 224
        dinov2 = patch == 14 and any(name.endswith(".ls1.gamma") for name in tensors)
        names["vit"] = f"vit_{size}_patch{patch}_{'dinov2' if dinov2 else side}"
    return names


def other_shapes(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors of ``state`` that the network has in another shape, as words."""
    return [
        f"{name} is {list(value.shape)}, expected {list(own[name].shape)}{_channels(value.shape, own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]


def _channels(shape: torch.Size, expected: torch.Size) -> str:
    """Why weights of images of other channels are refused: no file of weights says by which mean and std of grey."""
    if len(shape) != 4 or len(expected) != 4 or shape[1] == expected[1] or shape[0] != expected[0]:
        return ""
    made = f" (made for images of {shape[1]} channel{'s' * (shape[1] > 1)}, expected "
    if expected[1] == 3:
        return (
            f"{made}the 3 of RGB: how it was fed is not in the file; write it down: --backbone python:MODULE:FACTORY, "
            "with one number as mean and one as std where that is grey)"
        )
    return f"{made}the 1 of grey)" * (expected[1] == 1 and shape[1] == 3)


def first_names(names: Iterable[str], n: int = 3) -> str:
    """``a, b, c and 7 more``"""
    ordered = sorted(names)
    more = len(ordered) - n
    return ", ".join(ordered[:n]) + (f" and {more} more" if more > 0 else "")
