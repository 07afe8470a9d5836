"""The heads: what stands between frozen features and logits.

Notation: B batch, T tokens, D width, C classes, H hidden. A head is a torch module made from the shape of one row of
its output ((D,) or (T, D)) and C; it maps float32 [B, *shape] to logits [B, C].

To add one: a class here and a line in ``HEADS``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featurecache.errors import BadOption, UnknownHead, nearest

ARTICLE_HIDDEN = 256  # Linear(197, 256) in O. Mindlina's model 2


class Linear(nn.Module):
    """Mindlina's model 1: D·C + C parameters (1,538 for D=768, C=2). State dict: fc.weight [C, D], fc.bias [C]."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        (width,) = shape
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] -> [B, C]."""
        return self.fc(x)

    def layers(self) -> list[tuple[str, str, str, int]]:
        d, c = self.fc.in_features, self.fc.out_features
        return [("fc", f"Linear({d}, {c})", f"[{c}]", d * c + c)]


class Large(nn.Module):
    """Mindlina's model 2: on the transposed tokens [D, T] Linear(T, 256), ReLU, Flatten, Linear(D·256, C).

    State dict, as in her classes: fc1.weight [256, T], fc1.bias [256], fc2.weight [C, D·256] (column d·256 + h),
    fc2.bias [C]. Classes with other names (an nn.Sequential's ``0.weight``, ``0.bias``, ``3.weight``, ``3.bias``) have
    the same four tensors in the same order.

    Inside, tokens stay as they are stored, [T, D]: W1 @ x gives [H, D] for every image by one baddbmm, and the second
    weight is kept as [C, H, D] so that nothing is transposed in training (1.22 against 1.52 s an epoch in bf16, 3.27
    against 3.73 in float32, for 3,000 x 197 x 768). Adam works element by element, so the order changes no result.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        tokens, width = shape
        first, second = nn.Linear(tokens, ARTICLE_HIDDEN), nn.Linear(width * ARTICLE_HIDDEN, classes)
        self.fc1 = first
        inside = second.weight.detach().view(classes, width, ARTICLE_HIDDEN).transpose(1, 2).contiguous()
        self.second = nn.Parameter(inside)  # [C, H, D]
        self.second_bias = nn.Parameter(second.bias.detach())  # [C]
        self.register_state_dict_post_hook(_to_article)
        self.register_load_state_dict_pre_hook(_from_article)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        weight = self.fc1.weight.expand(len(x), -1, -1)
        hidden = torch.baddbmm(self.fc1.bias[:, None], weight, x).relu_()  # [B, H, D]
        return nn.functional.linear(hidden.flatten(1), self.second.flatten(1), self.second_bias)

    def layers(self) -> list[tuple[str, str, str, int]]:
        classes, hidden, width = self.second.shape
        tokens = self.fc1.in_features
        return [
            ("", "transpose", f"[{width}×{tokens}]", 0),
            ("fc1", f"Linear({tokens}, {hidden})", f"[{width}×{hidden}]", tokens * hidden + hidden),
            ("", "ReLU, Flatten", f"[{width * hidden}]", 0),
            ("fc2", f"Linear({width * hidden}, {classes})", f"[{classes}]", width * hidden * classes + classes),
        ]


def _to_article(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    second = state.pop(prefix + "second")  # [C, H, D]
    state[prefix + "fc2.weight"] = second.transpose(1, 2).reshape(len(second), -1)
    state[prefix + "fc2.bias"] = state.pop(prefix + "second_bias")


def _from_article(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, Large)
    classes, hidden, width = module.second.shape
    weight = state.get(prefix + "fc2.weight")
    if weight is not None and weight.shape == (classes, width * hidden):  # any other shape is named by torch itself
        state[prefix + "second"] = weight.view(classes, width, hidden).transpose(1, 2)
        del state[prefix + "fc2.weight"]
    if prefix + "fc2.bias" in state:
        state[prefix + "second_bias"] = state.pop(prefix + "fc2.bias")


class Mlp(nn.Module):
    """Linear(D, 256), ReLU, Dropout(0.5), Linear(256, C). State dict: fc1.*, fc2.*."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        (width,) = shape
        self.fc1 = nn.Linear(width, 256)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] -> [B, C]."""
        return self.fc2(self.dropout(self.fc1(x).relu()))

    def layers(self) -> list[tuple[str, str, str, int]]:
        d, h, c = self.fc1.in_features, self.fc1.out_features, self.fc2.out_features
        return [
            ("fc1", f"Linear({d}, {h})", f"[{h}]", d * h + h),
            ("", f"ReLU, Dropout({self.dropout.p})", f"[{h}]", 0),
            ("fc2", f"Linear({h}, {c})", f"[{c}]", h * c + c),
        ]


@dataclass(frozen=True)
class HeadInfo:
    """What a head is made for. ``takes``: "vector" ([D] an image), "tokens" ([T, D]) or "any"."""

    what: str
    takes: str
    make: Callable[[tuple[int, ...], int], nn.Module]
    standardize: str = "none"


HEADS: dict[str, HeadInfo] = {
    "linear": HeadInfo("one linear layer on the vector (the article's model 1)", "vector", Linear),
    "large": HeadInfo("two linear layers on all tokens (the article's models 2 and 3)", "tokens", Large),
    "mlp": HeadInfo("one hidden layer of 256 with dropout on the vector", "vector", Mlp),
}


def head_info(name: str) -> HeadInfo:
    """The record of a head by name, or of ``python:<module>:<class>``; raises UnknownHead with the nearest names."""
    if name in HEADS:
        return HEADS[name]
    if name.startswith("python:"):
        return _own_head(name)
    raise UnknownHead(
        f"no head is called {name!r}.{nearest(name, HEADS)} "
        f"Heads: {', '.join(HEADS)}; your own: python:<module>:<class>."
    )


def _own_head(name: str) -> HeadInfo:
    """A user's class(shape, classes); it may say ``takes`` and ``standardize`` as class attributes."""
    module, _, attribute = name.removeprefix("python:").partition(":")
    if not module or not attribute:
        raise UnknownHead(f"{name!r} is not python:<module>:<class>, for example python:my_heads:Gated.")
    sys.path.insert(0, os.getcwd())  # a console script does not look where it is started
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UnknownHead(f"{name}: the module {module} cannot be imported ({error}).") from error
    finally:
        sys.path.remove(os.getcwd())
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UnknownHead(f"{name}: {module} has no torch module class called {attribute}.")
    return HeadInfo(
        (found.__doc__ or attribute).strip().splitlines()[0],
        getattr(found, "takes", "any"),
        found,
        getattr(found, "standardize", "none"),
    )


@contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Inside, torch's CPU randomness is this generator's and nobody else's: plain torch layers initialise and drop
    out from a head's own generator, whatever is trained beside it."""
    outside = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def make_head(name: str, shape: tuple[int, ...], classes: int, generator: torch.Generator | None = None) -> nn.Module:
    """A head with weights initialised from ``generator``; raises BadOption where it cannot be made for this shape."""
    info = head_info(name)
    _check_takes(name, info.takes, shape)
    with own_randomness(generator or torch.Generator().manual_seed(0)):
        model = info.make(shape, classes)
    return model


def _check_takes(name: str, takes: str, shape: tuple[int, ...]) -> None:
    given = "vector" if len(shape) == 1 else "tokens"
    if takes in ("any", given):
        return
    fitting = ", ".join(n for n, info in HEADS.items() if info.takes == given)
    size = "×".join(str(n) for n in shape)
    want = "all tokens [T×D], such as --output tokens" if takes == "tokens" else "one vector [D], such as --output cls"
    raise BadOption(f"{name} takes {want}, and this output is [{size}] an image. Heads for that: {fitting}.")


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers_of(model: nn.Module) -> list[tuple[str, str, str, int]]:
    """(name, layer, shape it gives for one image, parameters); a user's own head: its leaf modules."""
    own = getattr(model, "layers", None)
    if callable(own):
        return own()
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    return [(n, repr(m), "", sum(p.numel() for p in m.parameters())) for n, m in leaves]


def describe_head(name: str, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """Layers, shapes and parameters of a head for one output, as data (``info --head NAME --output …``)."""
    model = make_head(name, shape, classes)
    layers = [
        {"name": n, "layer": what, "gives": gives, "parameters": count} for n, what, gives, count in layers_of(model)
    ]
    tensors = {key: list(value.shape) for key, value in model.state_dict().items()}
    return {
        "head": name,
        "what": head_info(name).what,
        "takes": head_info(name).takes,
        "shape": list(shape),
        "classes": classes,
        "layers": layers,
        "state_dict": tensors,
        "parameters": count_parameters(model),
    }
