"""The tables of models: heads on frozen features (``HEADS``) and networks from pixels (``BASELINES``), by name.

A head is a torch module made from the shape of one row of its output ((D,) or (T, D)) and C; it maps float32
[B, *shape] to logits [B, C]. Its keywords ``dropout``, ``gated``, ``prefix`` and ``grid`` are given to it if its
signature names them. How the solved ones come to their weights is in `solvers`. One record says what a network from
pixels is, the pixels it sees, how it is made and the settings it was published with; ``finetune:<backbone>`` is a
pretrained network with a new classifier (`finetune`).

To add a head: a class in `vector` or `tokens` and a line in ``HEADS``; a network: a class in `published` and a line in
``BASELINES``. N samples, B batch, T tokens, D width, C classes, H hidden; h and w height and width in pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featurecache.backbones import load_without_weights
from featurecache.backbones.user_code import import_once, user_line
from featurecache.errors import BadOption, FeatureCacheError, UnknownBackbone, UnknownHead, first_line, nearest
from featurecache.formatting import aligned
from featurecache.images.preprocessing import Preprocess
from heads.models.common import (
    FINETUNE,
    VIT_B16,
    Baseline,
    HeadInfo,
    Input,
    count_parameters,
    layers_of,
    own_randomness,
)
from heads.models.finetune import finetune_info, with_new_classifier
from heads.models.published import CifarCnn, CifarVit, MedicalMnistCnn, MindlinaCnn, Normalised
from heads.models.tokens import ClsMean, Conv, Large, MeanLinear, attention
from heads.models.vector import KNearest, Linear, Mlp
from heads.settings import EIGEN, Settings, flag, options_for

if TYPE_CHECKING:
    from featurecache.backbones.base import Backbone

# Test AUROC on PneumoniaMNIST's class tokens of an untrained vit-demo, of whose variance one direction holds two thirds
# (eigenvalues span 4e8): 0.904 at the layer's minimum; 0.903 by this; 0.894 by plain Adam, 0.898 in 400 epochs. Of the
# tokens, `mean-linear`: 0.923 of 0.920; `cls+mean`: 0.936 of 0.932. On random features, 5,856 × 768, within 0.003.
_LINEAR: dict[str, Any] = {"optimizer": EIGEN, "patience": 0, "lr": 0.03, "schedule": "cosine"}

HEADS: dict[str, HeadInfo] = {
    "linear": HeadInfo(
        "one linear layer on the vector (the article's model 1)", "vector", Linear, "zscore",
        reference="Mindlina 2024", convex=True, settings=_LINEAR),
    "large": HeadInfo(
        "two linear layers on all tokens (the article's models 2 and 3)", "tokens", Large, reference="Mindlina 2024"),
    "mlp": HeadInfo(
        "one hidden layer of 256 with dropout on the vector", "vector", Mlp, reference="Srivastava et al. 2014",
        settings={"epochs": 500, "patience": 20}),  # converges late and costs little an epoch
    "mean-linear": HeadInfo(
        "one linear layer on the mean of the patch tokens", "tokens", MeanLinear, "zscore",
        reference="Lin et al. 2014, arXiv:1312.4400", convex=True, settings=_LINEAR),
    "cls+mean": HeadInfo(
        "one linear layer on the class token beside the mean of the patch tokens", "tokens", ClsMean, "zscore",
        reference="Oquab et al. 2023, arXiv:2304.07193", convex=True, settings=_LINEAR),
    "attention": HeadInfo(
        "the attentive probe: a learned query over all tokens, multi-head (--gated: gated attention MIL)", "tokens",
        attention, "zscore",
        reference="El-Nouby et al. 2024, arXiv:2401.08541; gated: Ilse et al. 2018, arXiv:1802.04712"),
    "conv": HeadInfo(
        "a small 3×3 convolution over the patch grid, averaged", "tokens", Conv,
        reference="He et al. 2016, arXiv:1512.03385"),
    "ridge": HeadInfo(
        "least squares on ±1 targets, 45 penalties at once", "vector", Linear, "zscore", True, "Hoerl & Kennard 1970"),
    "logreg": HeadInfo(
        "logistic regression by L-BFGS, 10 penalties, each started from the last", "vector", Linear, "zscore", True,
        "Liu & Nocedal 1989; scikit-learn"),
    "knn": HeadInfo(
        "k nearest training vectors by cosine, weighted votes", "vector", KNearest, "l2", True,
        "Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294"),
    "centroid": HeadInfo(
        "the nearest class mean", "vector", Linear, "zscore", True, "Snell et al. 2017, arXiv:1703.05175"),
}  # fmt: skip


def head_info(name: str) -> HeadInfo:
    """The record of a head by name, of a baseline, or of ``python:<module>:<class>``; raises UnknownHead with the
    nearest names."""
    if name in HEADS:
        return HEADS[name]
    if is_baseline(name):
        return HeadInfo("a network from pixels", "pixels", nn.Module)  # what it is says `baseline_info`, which loads it
    if name.startswith("python:"):
        return _own_head(name)
    raise UnknownHead(
        f"no head is called {name!r}.{nearest(name, HEADS)} "
        f"Heads: {', '.join(HEADS)}; your own: python:<module>:<class>. Networks from pixels: train-baseline --help."
    )


def _own_head(name: str) -> HeadInfo:
    """A user's class(shape, classes); it may say ``takes`` and ``standardize`` as class attributes."""
    module, _, attribute = name.removeprefix("python:").partition(":")
    if not module or not attribute:
        raise UnknownHead(f"{name!r} is not python:<module>:<class>, for example python:my_heads:Gated.")
    try:
        source = import_once(module)
    except UnknownBackbone as error:
        raise UnknownHead(f"{name}: {error}.") from error
    head = getattr(source, attribute, None)
    if not (isinstance(head, type) and issubclass(head, nn.Module)):
        near = nearest(attribute, [key for key, value in vars(source).items() if isinstance(value, type)])
        raise UnknownHead(f"{name}: {module} has no torch module class called {attribute}.{near}")
    what = (head.__doc__ or attribute).strip().splitlines()[0]
    return HeadInfo(what, getattr(head, "takes", "any"), head, getattr(head, "standardize", "none"))


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
    named = inspect.signature(info.make).parameters
    if gated and "gated" not in named:
        raise BadOption(f"{name} has no gate; --gated is for attention.")
    options: dict[str, Any] = {key: getattr(given, key) for key in ("prefix", "grid") if key in named}
    options |= _dropout(name, dropout, "dropout" in named and not info.solved) | ({"gated": True} if gated else {})
    with own_randomness(generator or torch.Generator().manual_seed(0)):
        try:
            return info.make(given.shape, classes, **options)
        except Exception as error:
            if name.startswith("python:") and not isinstance(error, FeatureCacheError):
                words = user_line(error) or first_line(error)  # none of theirs: it takes other arguments
                raise UnknownHead(f"{name}: {name.rpartition(':')[2]}(shape, classes) failed ({words}).") from error
            raise


def _dropout(name: str, dropout: float | None, has_any: bool) -> dict[str, float]:
    """The keyword for a model that has any; 0 is what one without has."""
    if dropout and not has_any:
        raise BadOption(f"{name} has no dropout, so --dropout {dropout:g} would do nothing. Leave it out.")
    if dropout is not None and not 0 <= dropout < 1:
        raise BadOption(f"--dropout is {dropout:g}; it is at least 0 and below 1.")
    return {} if dropout is None or not has_any else {"dropout": dropout}


def load_head(
    name: str, given: Input | Sequence[int], classes: int, state: dict[str, torch.Tensor], *, gated: bool = False
) -> nn.Module:
    """A head with the weights of a state dict, for evaluation; raises ValueError where they are not this head's."""
    fixed_size = name in HEADS and HEADS[name].make is not KNearest
    return _with_state(lambda: make_head(name, given, classes, gated=gated), state, "head", fixed_size)


def _with_state(
    make: Callable[[], nn.Module], state: dict[str, torch.Tensor], what: str, fixed_size: bool = True
) -> nn.Module:
    if fixed_size:
        with torch.device("meta"):  # a size that no file of weights stands for would fill the memory
            expected = sum(tensor.numel() for tensor in make().state_dict().values())
        if expected != (size := sum(tensor.numel() for tensor in state.values())):
            raise ValueError(f"it holds {size:,} numbers, the {what} {expected:,}.")
    model = make()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model.eval()


def _check_takes(name: str, takes: str, shape: tuple[int, ...]) -> None:
    kind = "vector" if len(shape) == 1 else "tokens"
    if takes in ("any", kind):
        return
    if takes == "pixels":
        raise BadOption(f"{name} is no head on features: featurecache train-baseline trains it on images.")
    fitting = ", ".join(n for n, info in HEADS.items() if info.takes == kind)
    size = "×".join(str(n) for n in shape)
    want = "all tokens [T×D], such as --output tokens" if takes == "tokens" else "one vector [D], such as --output cls"
    raise BadOption(f"{name} takes {want}, and this output is [{size}] an image. Heads for that: {fitting}.")


def describe_head(name: str, given: Input | Sequence[int], classes: int) -> dict[str, Any]:
    """Layers, shapes and parameters of a head for one output, as data (``info --head NAME --output …``)."""
    given = Input.of(given)
    return _model_record(name, head_info(name), given.shape, classes, make_head(name, given, classes))


def _model_record(name: str, info: HeadInfo, shape: Sequence[int], classes: int, model: nn.Module) -> dict[str, Any]:
    layers = [dict(zip(("name", "layer", "gives", "parameters"), layer, strict=True)) for layer in layers_of(model)]
    return {
        "head": name, **_about(info), "shape": list(shape),
        "classes": classes, "layers": layers,
        "state_dict": {key: list(value.shape) for key, value in model.state_dict().items()},
        "parameters": count_parameters(model),
    }  # fmt: skip


def _about(info: HeadInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ("what", "takes", "standardize", "solved", "reference")}


def heads_table() -> list[dict[str, Any]]:
    """A record for every head: what it takes, its parameters for a ViT-B/16 and two classes, where it comes from."""
    records = []
    for name, info in HEADS.items():
        given = Input(VIT_B16.shape[1:]) if info.takes == "vector" else VIT_B16
        with torch.device("meta"):
            count = count_parameters(make_head(name, given, 2))
        records.append({"head": name, **_about(info), "parameters": count})
    return records


Constants = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std
IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Constants = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def squash_preprocess(size: int, constants: Constants) -> Preprocess:
    """The whole image to size×size pixels, bilinear and antialiased, then x / 255, mean and std."""
    return Preprocess(
        mode="squash", resize=(size, size), crop=None, kernel="torchvision", interpolation="bilinear", antialias=True,
        crop_rounding="down", scale=1 / 255, mean=constants[0], std=constants[1], arithmetic="rescale first",
    )  # fmt: skip


def _cifar(size: int) -> Preprocess:
    """The study has 0.5 for CIFAR's 32 pixels, and ImageNet's constants for Tiny ImageNet's 64."""
    return squash_preprocess(size, HALF if size < 64 else IMAGENET)


_CIFAR = {
    "optimizer": "adam", "lr": 1e-3, "epochs": 10, "batch_size": 128, "patience": 0, "balance": False,
    "select": "accuracy", "augment": "flip,rotate10,shift0.1",
}  # fmt: skip

BASELINES: dict[str, Baseline] = {
    "cnn-mindlina": Baseline(
        "a stand-in of the same size for the article's three-block CNN, whose layers are not published", 256,
        partial(squash_preprocess, constants=HALF), MindlinaCnn, {"optimizer": "adam", "lr": 1e-3},
        "after Mindlina 2024",
    ),
    "cnn-medical-mnist": Baseline(
        "three convolutions and three linear layers with dropout", 224,
        partial(squash_preprocess, constants=IMAGENET), MedicalMnistCnn,
        {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4, "decay_all": True, "schedule": "plateau", "epochs": 20,
         "patience": 5, "batch_size": 32, "balance": False, "select": "loss"},
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
        return finetune_info(name.removeprefix(FINETUNE), weights, adapted)
    if name in BASELINES:
        return BASELINES[name]
    raise UnknownHead(
        f"no baseline is called {name!r}.{nearest(name, BASELINES)} Baselines: {', '.join(BASELINES)}, "
        "finetune:<backbone>."
    )


def own_settings(name: str, *, weights: str | None = None, adapted: bool = False) -> dict[str, Any]:
    """The settings of a head, or the published ones of a network, where they are not the table's defaults."""
    if is_baseline(name):
        return baseline_info(name, weights=weights, adapted=adapted).settings
    return head_info(name).settings


def standardization(settings: Settings) -> str:
    """How the features of a head are scaled (none, zscore, l2): as asked, else as is usual for the head."""
    return settings.standardize or head_info(settings.head).standardize


def make_network(
    settings: Settings, image_size: int, classes: int, generator: torch.Generator | None = None,
    backbone: Backbone | None = None,
) -> nn.Module:  # fmt: skip
    """The network from pixels of these settings: [B,3,h,w] with values 0 to 255 -> logits [B,C], initialised from
    ``generator``. ``backbone``: what ``finetune:`` begins from, where that is loaded, or its outline, to count
    parameters. Raises BadOption for an option that would do nothing."""
    name, generator = settings.head, generator or torch.Generator().manual_seed(0)
    if name.startswith(FINETUNE):
        return with_new_classifier(settings, image_size, classes, generator, backbone)
    for option in options_for("finetune"):
        if getattr(settings, option) not in (None, False):
            raise BadOption(f"{flag(option)} is for finetune:<backbone>; {name} begins from nothing.")
    info = baseline_info(name)
    with own_randomness(generator):
        network = info.make(image_size, classes, **_dropout(name, settings.dropout, has_dropout(name)))
    return Normalised(info.preprocess(image_size), network, channels_last=isinstance(network, _CONVOLUTIONAL))


def shape_of_network(settings: Settings, image_size: int, classes: int) -> nn.Module:
    """The network, for its parameters to be counted: what `finetune:` begins from is not loaded for that."""
    backbone = None
    if settings.head.startswith(FINETUNE):
        name, weights = settings.head.removeprefix(FINETUNE), settings.weights
        backbone = load_without_weights(name, weights=weights, image_size=image_size)
    return make_network(settings, image_size, classes, backbone=backbone)


def has_dropout(name: str) -> bool:
    """Whether ``dropout`` means something to a baseline: to ``finetune:<backbone>`` that before its classifier."""
    return name.startswith(FINETUNE) or "dropout" in inspect.signature(BASELINES[name].make).parameters


def load_network(name: str, state: dict[str, torch.Tensor], *, image_size: int, classes: int) -> nn.Module:
    """A network with the state dict of one, for evaluation; raises ValueError where it is not this network's. (What
    ``finetune:`` wrote as a folder is read by `heads.models.finetune.load_finetuned`.)"""
    return _with_state(partial(make_network, Settings(name), image_size, classes), state, "network")


# Classes and pixels that the parameters are counted for: those of the studies.
COUNTED: dict[str, tuple[tuple[int, int], ...]] = {
    "cnn-mindlina": ((2, 256),), "cnn-medical-mnist": ((6, 224),),
    "cnn-cifar": ((10, 32), (100, 32), (200, 64)), "vit-cifar": ((10, 32), (100, 32), (200, 64)),
}  # fmt: skip
SETTINGS = ("optimizer", "lr", "weight_decay", "decay_all", "schedule", "epochs", "batch_size", "augment")


def networks_table() -> list[dict[str, Any]]:
    """A record for every network: pixels, parameters by (classes, pixels), published settings, reference."""
    records = []
    for name, info in BASELINES.items():
        with torch.device("meta"):
            counts = [[c, size, count_parameters(info.make(size, c))] for c, size in COUNTED[name]]
        settings = {key: info.settings[key] for key in SETTINGS if key in info.settings}
        about = {"network": name, "what": info.what, "image_size": info.image_size, "parameters": counts}
        records.append(about | {"settings": settings, "reference": info.reference})
    return records


def networks_lines() -> str:
    """A line per network."""
    rows = []
    for row in networks_table():
        classes, _, counts = (" / ".join(f"{n:,}" for n in column) for column in zip(*row["parameters"], strict=True))
        rows.append([row["network"], f"{row['what']}: {row['image_size']} px, {counts} parameters (C = {classes})"])
    return "\n".join(aligned(rows, right=(), indent=2))


def describe_network(name: str, classes: int, image_size: int | None = None) -> dict[str, Any]:
    """Layers and parameters, in the form of `heads.models.catalogue.describe_head`; no weights are needed."""
    info = baseline_info(name)
    size = image_size or info.image_size
    model = make_network(Settings(name, random_weights=name.startswith(FINETUNE)), size, classes)
    head = HeadInfo(info.what, "pixels", info.make, reference=info.reference)
    record = _model_record(name, head, [3, *info.preprocess(size).size], classes, model)
    return record | {"settings": info.settings}
