"""The table of baselines: networks that are trained from pixels, to be compared with heads on frozen features.

One record says what a network is, the pixels it sees, how it is made and the settings it was published with. To add
one: a class in ``networks`` and a line in ``BASELINES``. ``finetune:<backbone>`` is a pretrained network with a new
classifier (``finetune``).

Notation: B batch, C classes, h and w the height and width in pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featurecache.errors import BadOption, UnknownHead, nearest
from featurecache.preprocess import Preprocess
from heads.architectures import own_randomness
from heads.networks.published import CifarCnn, CifarVit, MedicalMnistCnn, MindlinaCnn, Normalised

if TYPE_CHECKING:
    from featurecache.backbones import Backbone

FINETUNE = "finetune:"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Baseline:
    """``preprocess``: pixels of a side -> what the network sees of an image. ``make``: (pixels of a side, classes, and
    ``dropout`` where it has any) -> network of normalised images. ``settings``: as published; the defaults of training.
    """

    what: str
    image_size: int
    preprocess: Callable[[int], Preprocess]
    make: Callable[..., nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str = ""


def squashed(size: int, constants: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Preprocess:
    """The whole image to size×size pixels, bilinear and antialiased, then x / 255, mean and std."""
    return Preprocess(
        mode="squash", resize=(size, size), crop=None, kernel="torchvision", interpolation="bilinear", antialias=True,
        crop_rounding="down", scale=1 / 255, mean=constants[0], std=constants[1], arithmetic="rescale first",
    )  # fmt: skip


def _imagenet(size: int) -> Preprocess:
    return squashed(size, IMAGENET)


def _half(size: int) -> Preprocess:
    return squashed(size, HALF)


def _cifar(size: int) -> Preprocess:
    """The study has 0.5 for CIFAR's 32 pixels, and ImageNet's constants for Tiny ImageNet's 64."""
    return squashed(size, HALF if size < 64 else IMAGENET)


_CIFAR = {
    "optimizer": "adam", "lr": 1e-3, "epochs": 10, "batch_size": 128, "patience": 0, "balance": False,
    "select": "accuracy", "augment": "flip,rotate10,shift0.1",
}  # fmt: skip

BASELINES: dict[str, Baseline] = {
    "cnn-mindlina": Baseline(
        "a stand-in of the same size for the article's three-block CNN, whose layers are not published", 256, _half,
        MindlinaCnn, {"optimizer": "adam", "lr": 1e-3}, "after Mindlina 2024",
    ),
    "cnn-medical-mnist": Baseline(
        "three convolutions and three linear layers with dropout", 224, _imagenet, MedicalMnistCnn,
        {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4, "schedule": "plateau", "epochs": 20, "patience": 5,
         "batch_size": 32, "balance": False, "select": "loss"},
        "Medical MNIST notebook",
    ),
    "cnn-cifar": Baseline(
        "six residual blocks of 16, 32 and 64 channels", 32, _cifar, CifarCnn, _CIFAR,
        "CIFAR and Tiny ImageNet notebook; blocks: He et al. 2016, arXiv:1512.03385",
    ),
    "vit-cifar": Baseline(
        "a ViT of 64 patches, width 128 and six blocks", 32, _cifar, CifarVit, _CIFAR,
        "CIFAR and Tiny ImageNet notebook; ViT: Dosovitskiy et al. 2021, arXiv:2010.11929",
    ),
}  # fmt: skip
_CONVOLUTIONAL = (MindlinaCnn, MedicalMnistCnn, CifarCnn)


def is_baseline(name: str) -> bool:
    """Whether ``name`` is of a network on pixels, and not of a head on features."""
    return name in BASELINES or name.startswith(FINETUNE)


def baseline_info(name: str, *, weights: str | None = None, adapted: bool = False) -> Baseline:
    """The record of a baseline, also of ``finetune:<backbone>`` (``weights``: where its own are, as for ``extract``;
    ``adapted``: its settings for ``lora`` or ``rlrr``); raises UnknownHead with the nearest names."""
    if name.startswith(FINETUNE):
        from heads.networks.finetune import finetune_info

        return finetune_info(name.removeprefix(FINETUNE), weights, adapted)
    if name in BASELINES:
        return BASELINES[name]
    raise UnknownHead(
        f"no baseline is called {name!r}.{nearest(name, BASELINES)} Baselines: {', '.join(BASELINES)}, "
        "finetune:<backbone>."
    )


def make_baseline(
    name: str,
    *,
    image_size: int,
    classes: int,
    generator: torch.Generator | None = None,
    dropout: float | None = None,
    lora: int | None = None,
    rlrr: bool = False,
    weights: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    backbone: Backbone | None = None,
) -> nn.Module:
    """Pixels [B,3,h,w] with values 0 to 255 -> logits [B,C], initialised from ``generator``.

    ``weights``, ``random_weights``, ``seed`` say which weights ``finetune:<backbone>`` begins with, as for ``extract``;
    ``lora`` (a rank) and ``rlrr`` train a small addition to them; ``backbone``: what these load, where that is done, or
    its outline, to count parameters. Raises BadOption for an option that would do nothing.
    """
    info = baseline_info(name, weights=weights)
    if dropout is not None and not 0 <= dropout < 1:
        raise BadOption(f"--dropout is {dropout:g}; it is at least 0 and below 1.")
    generator = generator or torch.Generator().manual_seed(0)
    if name.startswith(FINETUNE):
        return info.make(
            image_size, classes, generator=generator, dropout=dropout, lora=lora, rlrr=rlrr,
            random_weights=random_weights, seed=seed, backbone=backbone,
        )  # fmt: skip
    given = {"lora": lora is not None, "rlrr": rlrr, "weights": weights is not None, "random-weights": random_weights}
    for option in (key for key, there in given.items() if there):
        raise BadOption(f"--{option} is for finetune:<backbone>; {name} begins from nothing.")
    return _from_nothing(name, info, image_size, classes, generator, dropout)


def has_dropout(name: str) -> bool:
    """Whether ``dropout`` means something to a baseline: to ``finetune:<backbone>`` that before its classifier."""
    return name.startswith(FINETUNE) or "dropout" in inspect.signature(BASELINES[name].make).parameters


def _from_nothing(
    name: str, info: Baseline, image_size: int, classes: int, generator: torch.Generator, dropout: float | None
) -> nn.Module:
    options = {} if dropout is None else {"dropout": dropout}
    if options and "dropout" not in inspect.signature(info.make).parameters:
        if dropout:
            raise BadOption(f"{name} has no dropout, so --dropout {dropout:g} would do nothing. Leave it out.")
        options = {}
    with own_randomness(generator):
        network = info.make(image_size, classes, **options)
    return Normalised(info.preprocess(image_size), network, channels_last=isinstance(network, _CONVOLUTIONAL))


def load_baseline(
    name: str, state: dict[str, torch.Tensor], *, image_size: int, classes: int, lora: int | None = None,
    rlrr: bool = False,
) -> nn.Module:  # fmt: skip
    """A network with the whole state dict of one, for evaluation; raises ValueError where it is not this network's.
    (What ``finetune:`` wrote as a folder is read by `heads.networks.finetune.load_finetuned`.)"""
    options: dict[str, Any] = {"image_size": image_size, "classes": classes, "lora": lora, "rlrr": rlrr}
    if name.startswith(FINETUNE):
        options["random_weights"] = True  # every one of them comes from ``state``
    else:
        with torch.device("meta"):  # a size that no file of weights stands for would fill the memory
            wanted = sum(tensor.numel() for tensor in make_baseline(name, **options).state_dict().values())
        if wanted != (there := sum(tensor.numel() for tensor in state.values())):
            raise ValueError(f"it holds {there:,} numbers, the network {wanted:,}.")
    model = make_baseline(name, **options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model.eval()
