"""The table of heads: what stands between frozen features and logits.

Notation: N samples, B batch, T tokens, D width, C classes, H hidden. A head is a torch module made from the shape of
one row of its output ((D,) or (T, D)) and C; it maps float32 [B, *shape] to logits [B, C]. Stepped heads are in
``vector_heads``, ``token_heads`` and ``attention_heads``; how the solved ones come to their weights is in ``solvers``.

To add one: a class there and a line in ``HEADS`` here. Its keywords ``dropout``, ``gated``, ``prefix`` and ``grid`` are
given to it if its signature names them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featurecache.errors import BadOption, UnknownHead, nearest
from heads.attention_heads import attention
from heads.settings import is_baseline
from heads.token_heads import ClsMean, Conv, Large, MeanLinear
from heads.vector_heads import Linear, Mlp, Neighbours


@dataclass(frozen=True)
class Input:
    """What a head is given of one image: ``shape`` (D,) or (T, D), and of tokens which rows are what.

    ``prefix``: names of the P tokens before the patches; ``grid``: (h, w) with T = P + h·w, None where it is not known
    which rows are patches.
    """

    shape: tuple[int, ...]
    prefix: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and len(self.shape) == 2:
            (h, w), first = self.grid, len(self.prefix)
            if first + h * w != self.shape[0]:
                raise BadOption(
                    f"{self.shape[0]} tokens are not {first} before the patches and a grid of {h}×{w}: "
                    "the prefix and the grid of this output are wrong."
                )

    @classmethod
    def of(cls, given: Any) -> Input:
        """From a bare shape, a record with shape, prefix and grid, or what ``view.info(output)`` gives."""
        if isinstance(given, Input):
            return given
        if isinstance(given, Sequence):
            return cls(tuple(given))
        record = given if isinstance(given, dict) else vars(given)
        prefix, grid = record.get("prefix"), record.get("grid")
        return cls(tuple(record["shape"]), tuple(prefix or ()), None if grid is None else (grid[0], grid[1]))


VIT_B16 = Input((197, 768), ("cls",), (14, 14))  # tokens of a ViT-B/16 at 224 pixels


@dataclass(frozen=True)
class HeadInfo:
    """What a head is made for. ``takes``: "vector" ([D] an image), "tokens" ([T, D]), "any", or, of the network of a
    baseline, "pixels" ([3, h, w]). ``solved``: its weights come from ``solvers.SOLVERS``, not from steps."""

    what: str
    takes: str
    make: Callable[..., nn.Module]
    standardize: str = "none"
    solved: bool = False
    reference: str = ""


HEADS: dict[str, HeadInfo] = {
    "linear": HeadInfo(
        "one linear layer on the vector (the article's model 1)", "vector", Linear, reference="Mindlina 2024"
    ),
    "large": HeadInfo(
        "two linear layers on all tokens (the article's models 2 and 3)", "tokens", Large, reference="Mindlina 2024"
    ),
    "mlp": HeadInfo(
        "one hidden layer of 256 with dropout on the vector", "vector", Mlp, reference="Srivastava et al. 2014"
    ),
    "mean-linear": HeadInfo(
        "one linear layer on the mean of the patch tokens", "tokens", MeanLinear,
        reference="Lin et al. 2014, arXiv:1312.4400",
    ),
    "cls+mean": HeadInfo(
        "one linear layer on the class token beside the mean of the patch tokens", "tokens", ClsMean,
        reference="Oquab et al. 2023, arXiv:2304.07193",
    ),
    "attention": HeadInfo(
        "the attentive probe: a learned query over all tokens, multi-head (--gated: gated attention MIL)", "tokens",
        attention, "zscore",
        reference="El-Nouby et al. 2024, arXiv:2401.08541; gated: Ilse et al. 2018, arXiv:1802.04712",
    ),
    "conv": HeadInfo(
        "a small 3×3 convolution over the patch grid, averaged", "tokens", Conv,
        reference="He et al. 2016, arXiv:1512.03385",
    ),
    "ridge": HeadInfo(
        "least squares on ±1 targets, 45 penalties at once", "vector", Linear, "zscore", True,
        "Hoerl & Kennard 1970",
    ),
    "logreg": HeadInfo(
        "logistic regression by L-BFGS, 10 penalties, each started from the last", "vector", Linear, "zscore", True,
        "Liu & Nocedal 1989; scikit-learn",
    ),
    "knn": HeadInfo(
        "k nearest training vectors by cosine, weighted votes", "vector", Neighbours, "l2", True,
        "Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294",
    ),
    "centroid": HeadInfo(
        "the nearest class mean", "vector", Linear, "zscore", True, "Snell et al. 2017, arXiv:1703.05175"
    ),
}  # fmt: skip


def head_info(name: str) -> HeadInfo:
    """The record of a head by name, of a baseline, or of ``python:<module>:<class>``; raises UnknownHead with the
    nearest names."""
    if name in HEADS:
        return HEADS[name]
    if is_baseline(name):
        from heads.networks.baselines import BASELINES

        found = BASELINES.get(name)  # a backbone is not loaded to say what it is
        return HeadInfo(found.what if found else "a pretrained network, trained on", "pixels", _no_head)
    if name.startswith("python:"):
        return _own_head(name)
    raise UnknownHead(
        f"no head is called {name!r}.{nearest(name, HEADS)} "
        f"Heads: {', '.join(HEADS)}; your own: python:<module>:<class>. Networks from pixels: train-baseline --help."
    )


def _no_head(*_: Any, **__: Any) -> nn.Module:
    raise BadOption("a network from pixels is no head on features: featurecache train-baseline trains it.")


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


def make_head(
    name: str,
    given: Input | Sequence[int],
    classes: int,
    generator: torch.Generator | None = None,
    *,
    dropout: float | None = None,
    gated: bool = False,
) -> nn.Module:
    """A head with weights initialised from ``generator``; raises BadOption where it cannot be made for this output, or
    has no such option. ``dropout``: None is the head's own. Of a bare shape it is not known which tokens are patches.
    """
    info, given = head_info(name), Input.of(given)
    _check_takes(name, info.takes, given.shape)
    options = _options(name, info, given, dropout, gated)
    with own_randomness(generator or torch.Generator().manual_seed(0)):
        model = info.make(given.shape, classes, **options)
    return model


def _options(name: str, info: HeadInfo, given: Input, dropout: float | None, gated: bool) -> dict[str, Any]:
    """The keywords of a head, of those that its signature names; raises BadOption for one that would do nothing."""
    named = inspect.signature(info.make).parameters
    places: dict[str, Any] = {"prefix": given.prefix, "grid": given.grid}
    options = {key: value for key, value in places.items() if key in named}
    if dropout is not None and "dropout" in named and not info.solved:
        if not 0 <= dropout < 1:
            raise BadOption(f"--dropout is {dropout:g}; it is at least 0 and below 1.")
        options["dropout"] = dropout
    elif dropout:
        raise BadOption(f"{name} has no dropout, so --dropout {dropout:g} would do nothing. Leave it out.")
    if gated and "gated" not in named:
        raise BadOption(f"{name} has no gate; --gated is for attention.")
    return options | ({"gated": True} if gated else {})


def load_head(
    name: str, given: Input | Sequence[int], classes: int, state: dict[str, torch.Tensor], *, gated: bool = False
) -> nn.Module:
    """A head with the weights of a state dict, for evaluation; raises ValueError where they are not this head's."""
    if name in HEADS and HEADS[name].make is not Neighbours:
        with torch.device("meta"):  # a size that no file of weights stands for would fill the memory
            wanted = count_parameters(make_head(name, given, classes, gated=gated))
        there = sum(tensor.numel() for tensor in state.values())
        if wanted != there:
            raise ValueError(f"it holds {there:,} numbers, the head {wanted:,}.")
    model = make_head(name, given, classes, gated=gated)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model.eval()


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


def describe_head(
    name: str, given: Input | Sequence[int], classes: int, *, dropout: float | None = None, gated: bool = False
) -> dict[str, Any]:
    """Layers, shapes and parameters of a head for one output, as data (``info --head NAME --output …``)."""
    info, given = head_info(name), Input.of(given)
    model = make_head(name, given, classes, dropout=dropout, gated=gated)
    layers = [
        {"name": n, "layer": what, "gives": gives, "parameters": count} for n, what, gives, count in layers_of(model)
    ]
    tensors = {key: list(value.shape) for key, value in model.state_dict().items()}
    return {
        "head": name,
        "what": info.what,
        "takes": info.takes,
        "standardize": info.standardize,
        "solved": info.solved,
        "reference": info.reference,
        "shape": list(given.shape),
        "classes": classes,
        "layers": layers,
        "state_dict": tensors,
        "parameters": count_parameters(model),
    }


def heads_table(classes: int = 2) -> list[dict[str, Any]]:
    """A record for every head: what it takes, its parameters for a ViT-B/16 and ``classes``, where it comes from."""
    records = []
    for name, info in HEADS.items():
        given = Input(VIT_B16.shape[1:]) if info.takes == "vector" else VIT_B16
        with torch.device("meta"):
            count = count_parameters(make_head(name, given, classes))
        records.append(
            {
                "head": name,
                "what": info.what,
                "takes": info.takes,
                "solved": info.solved,
                "standardize": info.standardize,
                "parameters": count,
                "reference": info.reference,
            }
        )
    return records
