"""What decides a training run, as data: what is in config.json is what ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from featurecache.errors import BadOption, nearest
from heads.metrics.classification import METRICS

STANDARDIZE = ("none", "zscore", "l2")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "plateau")
PRECISIONS = ("fp32", "bf16")
# What only networks that are trained from pixels take; the second line: only `finetune:<backbone>`.
OF_BASELINES = (
    "augment", "image_size", "device",
    "lora", "rlrr", "weights", "random_weights",
)  # fmt: skip
OF_FINETUNE = OF_BASELINES[3:]
# What heads that are trained together may differ in.
VARIED = (
    "lr", "weight_decay", "seed", "dropout", "label_smoothing", "class_weights", "optimizer", "schedule", "augment",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The options of ``train-head`` and ``train-baseline``; ``head`` is a head, or the network of a baseline.

    ``dropout``: None is the head's own. ``class_weights``: the loss is weighted by 1 / train prevalence, and batches
    are not balanced besides. ``fraction``: of train, after val is taken. ``fold`` (0-based) of ``folds`` over train and
    val: that part is only reported. ``sensitivity``: wanted on val, for the threshold; None: Youden's. ``ram``: GB that
    features may take in memory; None: six tenths of what is free.

    Of baselines: ``augment``: "flip,rotate10,shift0.1", drawn anew for every image of every batch. ``image_size``:
    pixels; None: the network's own. Of ``finetune:<backbone>``: ``lora``: the rank of its adapters; ``rlrr``: low-rank
    rescaling; ``weights``: a file or folder; ``random_weights``: the architecture from scratch.
    """

    head: str
    output: str | None = None
    epochs: int = 50
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    patience: int = 5  # epochs without a better one; 0: train all epochs
    seed: int = 0  # initialisation, dropout
    split_seed: int = 0  # splits, fractions, folds, batch order
    select: str = "auroc"
    balance: bool = True
    standardize: str | None = None
    resplit_val: bool = False
    splits: str | None = None
    classes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    train_per_class: int | None = None
    pos_weight: bool = False
    positive: str | None = None
    drop_leaks: bool = False
    optimizer: str = "adam"
    schedule: str = "constant"
    dropout: float | None = None
    label_smoothing: float = 0.0
    class_weights: bool = False
    gated: bool = False
    fraction: float = 1.0
    folds: int | None = None
    fold: int | None = None
    sensitivity: float | None = None
    precision: str = "fp32"
    ram: float | None = None
    augment: str | None = None
    image_size: int | None = None
    device: str = "cpu"
    lora: int | None = None
    rlrr: bool = False
    weights: str | None = None
    random_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("seed", 0), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.lr < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise BadOption(f"--lr must be above 0 and --weight-decay not below (got {self.lr}, {self.weight_decay}).")
        if self.train_per_class is not None and self.train_per_class < 1:
            raise BadOption(f"--train-per-class is {self.train_per_class}; it must be at least 1.")
        self._check_words()
        self._check_parts()
        self._check_pixels()
        if self.select not in (*METRICS, "loss"):
            raise BadOption(
                f"--select {self.select} is no measure.{nearest(self.select, METRICS)} "
                f"Measures: loss, {', '.join(METRICS)}."
            )

    def _check_words(self) -> None:
        known = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}
        for name, words in (known | {"standardize": (None, *STANDARDIZE)}).items():
            if getattr(self, name) not in words:
                raise BadOption(f"--{name} {getattr(self, name)}: it is one of {', '.join(filter(None, words))}.")

    def _check_parts(self) -> None:
        if not 0 <= self.label_smoothing < 1 or not 0 <= (self.dropout or 0.0) < 1:
            raise BadOption(
                f"--dropout and --label-smoothing are at least 0 and below 1 (got {self.dropout}, "
                f"{self.label_smoothing})."
            )
        if not 0 < self.fraction <= 1:
            raise BadOption(f"--fraction is {self.fraction:g}; it is above 0 and at most 1.")
        if self.sensitivity is not None and not 0 < self.sensitivity <= 1:
            raise BadOption(f"--sensitivity is {self.sensitivity:g}; it is above 0 and at most 1.")
        if self.ram is not None and not self.ram >= 0:
            raise BadOption(f"--ram is {self.ram:g}; it is a number of GB.")
        if (self.folds is None) != (self.fold is None) or (self.folds is not None and self.folds < 2):
            raise BadOption("--fold is one of --folds (at least 2); give both.")
        if self.folds is not None and not 0 <= (self.fold or 0) < self.folds:
            raise BadOption(f"--fold is {self.fold}; with --folds {self.folds} it is 0 to {self.folds - 1}.")

    def _check_pixels(self) -> None:
        """What a network from pixels takes, given to a head on features, would do nothing."""
        if self.augment is not None:
            from featurecache.images.augmentation import parse_augmentation

            if "none" in (words := self.augment.split(",")) and len(words) > 1:
                raise BadOption(
                    f"--augment {self.augment}: none stands alone, and these are steps of one augmentation. ablate "
                    "takes --augment once for each: --augment none --augment flip,rotate10."
                )
            object.__setattr__(
                self, "augment", None if self.augment in ("", "none") else str(parse_augmentation(self.augment))
            )
        plain = {f.name: f.default for f in fields(Settings)}
        kind = "finetune" if self.head.startswith("finetune:") else "baseline" if is_network(self.head) else "head"
        useless = {"finetune": (), "baseline": OF_FINETUNE, "head": OF_BASELINES}[kind] if self.head else ()
        for name in useless:
            if getattr(self, name) != plain[name]:
                way = " extract --views 2 --augment … stores augmented copies." if name == "augment" else ""
                raise BadOption(f"--{name.replace('_', '-')} would do nothing: {self.head} does not take it.{way}")
        if self.image_size is not None and self.image_size < 1:
            raise BadOption(f"--image-size is {self.image_size}; it is a number of pixels.")

    @classmethod
    def of(cls, head: str, *, splits: Any = None, classes: Any = None, only: Any = None, **options: Any) -> Settings:
        """From options as people and the command line give them."""
        unknown = options.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise BadOption(f"{', '.join(sorted(unknown))}: no such option of training a head.")
        words = (only,) if isinstance(only, str) else tuple(only or ())
        return cls(head, splits=None if splits is None else str(splits), classes=tuple(classes or ()), only=words,
                   **options)  # fmt: skip

    def balanced(self, multilabel: bool) -> bool:
        """Whether batches draw their classes equally."""
        return self.balance and not multilabel and not self.class_weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"classes": list(self.classes), "only": list(self.only)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in data.items() if key in known}
        return cls(**given | {"classes": tuple(given["classes"]), "only": tuple(given["only"])})


def is_network(head: str) -> bool:
    """Whether a name is that of a network from pixels: only names of that form load the module that knows them."""
    if not head.startswith(("cnn-", "vit-", "finetune:")):
        return False
    from heads.models.catalogue import is_baseline as known

    return known(head)
