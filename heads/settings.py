"""Training options: one table of names, defaults, help texts and allowed values for commands, checks and records; and
the table of measures, of which one chooses. Commands read both without numpy.

`Settings` is what decides a training run: what is in config.json is what ran. The click options of ``train-head``,
``train-baseline`` and ``ablate``, the checks of values and the command line that a report gives are made of its fields.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from featurecache.errors import BadOption, nearest, plain_value

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Metric:
    title: str
    higher: bool = True


SPLITS = ("train", "val", "test")
METRICS: dict[str, Metric] = {  # measures of a test set, by what --select calls them
    "auroc": Metric("AUROC"),
    "ap": Metric("AP"),
    "accuracy": Metric("accuracy"),
    "top5": Metric("top-5 accuracy"),
    "balanced_accuracy": Metric("balanced acc."),
    "macro_precision": Metric("macro precision"),
    "macro_recall": Metric("macro recall"),
    "macro_f1": Metric("macro F1"),
    "quadratic_kappa": Metric("quadratic kappa"),
    "mae": Metric("MAE (classes)", higher=False),
    "sensitivity": Metric("sensitivity"),
    "specificity": Metric("specificity"),
    "ppv": Metric("PPV"),
    "npv": Metric("NPV"),
    "f1": Metric("F1"),
    "nll": Metric("NLL", higher=False),
    "brier": Metric("Brier", higher=False),
    "ece": Metric("ECE", higher=False),
}


def title(measure: str, task: str) -> str:
    macro = "macro " if measure in ("auroc", "ap") and task != "binary" else ""
    return macro + (METRICS[measure].title if measure in METRICS else measure.upper())


def measure_name(select: str) -> str:
    """What ``--select`` is called among the measures of a run."""
    return "nll" if select == "loss" else select


STANDARDIZE = ("none", "zscore", "l2")
# What heads that are trained together may differ in.
VARIED = (
    "lr", "weight_decay", "seed", "dropout", "label_smoothing", "optimizer", "schedule", "augment", "epochs", "warmup",
    "clip_norm",
)  # fmt: skip
EIGEN = "adam-eigen"
OF_HEAD = ("epochs", "lr", "patience", "optimizer", "schedule")  # whose defaults a head may have of its own
# Numbers of which a sweep takes several, or a range.
GRIDS = ("lr", "weight_decay", "dropout", "label_smoothing", "epochs", "batch_size", "warmup", "clip_norm")


def _option(default: Any, text: str, *, values: Any = None, of: str = "any", shown: str = "") -> Any:
    """A field of `Settings`. ``values``: words, or an interval such as ``(0, 1]``. ``of``: "any"; "head" on features,
    "network" from pixels or "finetune" for what only these take. ``shown``: what its value is called in help."""
    return field(default=default, metadata={"help": text, "values": values, "for": of, "shown": shown})


@dataclass(frozen=True)
class Settings:
    """The options of ``train-head`` and ``train-baseline``; ``head`` is a head, or the network of a baseline."""

    head: str
    output: str | None = _option(
        None, "cls, tokens, tokens-257, … [default: what the head was made for]", of="head", shown="NAME"
    )
    epochs: int = _option(50, "At most.", values="[1, inf)")
    lr: float = _option(1e-3, "Learning rate.", values="(0, inf)")
    weight_decay: float = _option(0.0, "On weights, not on biases and norms.", values="[0, inf)")
    batch_size: int = _option(32, "Images in a step.", values="[1, inf)")
    patience: int = _option(5, "Epochs without a better val before it stops; 0: never.", values="[0, inf)")
    seed: int = _option(0, "Of initialisation, dropout and augmentation.", values="[0, inf)")
    split_seed: int = _option(0, "Of splits, fractions, folds and batch order.", values="[0, inf)")
    select: str = _option("auroc", "What chooses the epoch, on val: a metric's name or loss.", shown="NAME")
    balance: bool = _option(True, "Batches draw the classes equally.")
    standardize: str | None = _option(None, "[default: the head's own]", values=STANDARDIZE, of="head")
    resplit_val: bool = _option(False, "Return val to train and draw a new one.")
    splits: str | None = _option(None, "A splits.csv of another run.", shown="FILE")
    classes: tuple[str, ...] = _option(
        (), "Another task on the same images: classes kept or merged.", shown="NAME[=A,B]"
    )
    only: tuple[str, ...] = _option((), "Train and test on these classes only.", shown="A,B")
    train_per_class: int | None = _option(
        None, "N training images of each class; the rest are left out.", values="[1, inf)"
    )
    pos_weight: bool = _option(False, "Multi-label: weigh positives by their rarity.")
    positive: str | None = _option(
        None, "Binary: the class that counts as positive. [default: the second]", shown="CLASS"
    )
    drop_leaks: bool = _option(False, "Leave out of train what is also in val or test, of val what is also in test.")
    optimizer: str = _option(
        "adam", "sgd has momentum 0.9; adam-eigen is Adam in the eigenbasis of the features, for one linear layer.",
        values=("adam", "adamw", "sgd", EIGEN),
    )  # fmt: skip
    schedule: str = _option("constant", "Of the learning rate.", values=("constant", "linear", "cosine", "plateau"))
    warmup: float = _option(0.0, "Share of all steps in which the rate rises to --lr.", values="[0, 1)")
    clip_norm: float | None = _option(None, "Longer gradients are cut to this length.", values="(0, inf)")
    dropout: float | None = _option(None, "[default: the head's or network's own]", values="[0, 1)")
    label_smoothing: float = _option(0.0, "Share of a label that goes to all classes.", values="[0, 1)")
    class_weights: bool = _option(False, "Weigh the loss by 1 / prevalence instead of balancing batches.")
    gated: bool = _option(False, "attention only: gated pooling.", of="head")
    fraction: float = _option(
        1.0, "Of train, after val is taken; smaller ones are parts of larger ones.", values="(0, 1]"
    )
    folds: int | None = _option(
        None, "With --fold: train and val cut in N parts, of which one is tested.", values="[2, inf)", of="head"
    )
    fold: int | None = _option(None, "0 to N - 1.", values="[0, inf)", of="head")
    sensitivity: float | None = _option(
        None, "Threshold: the highest that reaches it on val. [default: Youden's]", values="(0, 1]"
    )
    precision: str = _option("fp32", "Of the head's products.", values=("fp32", "bf16"), of="head")
    ram: float | None = _option(
        None, "GB; features beyond it are read from the shards. [default: 60 % of what is free]", values="[0, inf)",
        of="head",
    )  # fmt: skip
    augment: str | None = _option(
        None, "none, or flip,rotate10,shift0.1, drawn anew in every batch.", of="network", shown="WORDS"
    )
    decay_all: bool = _option(False, "Weight decay also on biases and norms, as plain torch has it.", of="network")
    image_size: int | None = _option(
        None, "Pixels of a side. [default: the network's own]", values="[1, inf)", of="network"
    )
    device: str = _option("cpu", "auto, cpu, cuda, mps.", of="network", shown="NAME")
    lora: int | None = _option(None, "Only adapters of this rank are trained.", of="finetune")
    rlrr: bool = _option(False, "Only low-rank rescalings are trained.", of="finetune")
    weights: str | None = _option(None, "A file or folder with the backbone's weights.", of="finetune", shown="PATH")
    random_weights: bool = _option(False, "The architecture from scratch.", of="finetune")

    def __post_init__(self) -> None:
        if self.augment is not None:
            object.__setattr__(self, "augment", _augmentation(self.augment))
        for each in TABLE.values():
            _check_value(each, getattr(self, each.name))
        if (self.folds is None) != (self.fold is None):
            raise BadOption("--fold is one of --folds (at least 2); give both.")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise BadOption(f"--fold is {self.fold}; with --folds {self.folds} it is 0 to {self.folds - 1}.")
        if self.select not in (*METRICS, "loss"):
            raise BadOption(
                f"--select {self.select} is no measure.{nearest(self.select, METRICS)} "
                f"Measures: loss, {', '.join(METRICS)}."
            )

    @classmethod
    def of(cls, head: str, *, splits: Any = None, classes: Any = None, only: Any = None, **options: Any) -> Settings:
        """From options as people and the command line give them."""
        if unknown := options.keys() - TABLE.keys():
            raise BadOption(f"{', '.join(sorted(unknown))}: no such option of training a head.")
        names = (only,) if isinstance(only, str) else () if only is None else tuple(only)
        own = {name: plain_value(name, value, "") for name, value in options.items()}
        kept = () if classes is None else tuple(classes)
        return cls(head, splits=None if splits is None else str(splits), classes=kept, only=names, **own)

    def balanced(self, multilabel: bool) -> bool:
        """Whether batches draw their classes equally."""
        return self.balance and not multilabel and not self.class_weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"classes": list(self.classes), "only": list(self.only)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        own = {key: value for key, value in data.items() if key in TABLE or key == "head"}
        return cls(**own | {"classes": tuple(own["classes"]), "only": tuple(own["only"])})


class CommonOptions(TypedDict, total=False):
    """What `train_head`, `train_baseline` and `ablate` take by name, for editors and type checkers: `Settings` says the
    defaults and what is allowed."""

    patience: int
    split_seed: int
    select: str
    balance: bool
    resplit_val: bool
    train_per_class: int | None
    pos_weight: bool
    positive: str | None
    drop_leaks: bool
    class_weights: bool
    sensitivity: float | None


class _OneOptions(CommonOptions, total=False):
    """Of one head or network: one value each."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    optimizer: str
    schedule: str
    warmup: float
    clip_norm: float | None
    dropout: float | None
    label_smoothing: float
    fraction: float


class _NetworkOptions(TypedDict, total=False):
    image_size: int | None
    decay_all: bool
    lora: int | None
    rlrr: bool
    weights: str | None
    random_weights: bool


class _FeatureOptions(TypedDict, total=False):
    standardize: str | None
    gated: bool
    precision: str
    ram: float | None


class HeadOptions(_OneOptions, _FeatureOptions, total=False):
    output: str | None
    folds: int | None
    fold: int | None


class NetworkOptions(_OneOptions, _NetworkOptions, total=False):
    augment: str | None


class SweepOptions(CommonOptions, _FeatureOptions, _NetworkOptions, total=False):
    """Grids are one value, several, or words: ``"1e-4..1e-2:3"``, ``"adam,sgd"``."""

    outputs: str | Sequence[str] | None
    seeds: int
    fractions: str | float | Sequence[float]
    repeats: int
    folds: int | None
    search: str | None
    trials: int | None
    splits: str | Path | None
    classes: Sequence[str] | None
    only: Sequence[str] | str | None
    device: str | None
    epochs: str | int | Sequence[int]
    batch_size: str | int | Sequence[int]
    lr: str | float | Sequence[float]
    warmup: str | float | Sequence[float]
    clip_norm: str | float | Sequence[float]
    weight_decay: str | float | Sequence[float]
    dropout: str | float | Sequence[float]
    label_smoothing: str | float | Sequence[float]
    optimizer: str | Sequence[str]
    schedule: str | Sequence[str]
    augment: str | Sequence[str] | None


def takes(options: Any) -> Callable[[F], F]:
    """Shows the names of a TypedDict in the signature of a function, in the place of its ``**options``."""

    def change(function: F) -> F:
        signature = inspect.signature(function)
        fixed = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        usual = {name: TABLE[name].default if name in TABLE else None for name in options.__annotations__}
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=usual[name]) for name in usual]
        function.__signature__ = signature.replace(parameters=fixed + named)  # type: ignore[attr-defined]
        return function

    return change


OF_STEPS = (*VARIED, "class_weights", "batch_size", "precision", "pos_weight", "gated")  # nothing to a solved head
TABLE: dict[str, Field[Any]] = {each.name: each for each in fields(Settings) if each.metadata}


def options_for(*takers: str) -> tuple[str, ...]:
    """Names of the options that only these take: "head", "network" from pixels, "finetune"; "any": that all take."""
    return tuple(name for name, each in TABLE.items() if each.metadata["for"] in takers)


def flag(name: str) -> str:
    """How an option is spelt on the command line."""
    return f"--{name.replace('_', '-')}"


def _augmentation(text: str) -> str | None:
    """In its canonical form; None for none."""
    from featurecache.images.augmentation import parse_augmentation

    if "none" in (steps := text.split(",")) and len(steps) > 1:
        raise BadOption(
            f"--augment {text}: none stands alone, and these are steps of one augmentation. ablate "
            "takes --augment once for each: --augment none --augment flip,rotate10."
        )
    return None if text in ("", "none") else str(parse_augmentation(text))


def _check_value(option: Field[Any], value: Any) -> None:
    """Raises BadOption where a value is of another type than the field, none of the words, or outside the interval, of
    the table."""
    values, value = option.metadata["values"], plain_value(flag(option.name), value, str(option.type))
    if values is None or value is None:
        return
    if isinstance(values, tuple):
        if value not in values:
            near = nearest(str(value), values)
            raise BadOption(f"{flag(option.name)} {value}: it is one of {', '.join(values)}.{near}")
        return
    low, high = (float(end) for end in values[1:-1].split(","))
    closed = [end for end, bracket in ((low, values[0]), (high, values[-1])) if bracket in "[]"]
    if not (low < value < high or value in closed):
        bounds = [f"{'at least' if values[0] == '[' else 'above'} {low:g}"]
        bounds += [] if math.isinf(high) else [f"{'at most' if values[-1] == ']' else 'below'} {high:g}"]
        shown = f"{value:g}" if isinstance(value, float) else value
        raise BadOption(f"{flag(option.name)} is {shown}; it must be {' and '.join(bounds)}.")
