"""What decides a training run, as data: what is in config.json is what ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from featurecache.errors import BadOption, nearest

STANDARDIZE = ("none", "zscore", "l2")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine", "plateau")
PRECISIONS = ("fp32", "bf16")
# What heads that are trained together may differ in.
VARIED = (
    "lr", "weight_decay", "seed", "dropout", "label_smoothing", "class_weights", "optimizer", "schedule",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The options of ``train-head``.

    ``dropout``: None is the head's own. ``class_weights``: the loss is weighted by 1 / train prevalence, and batches
    are not balanced besides. ``fraction``: of train, after val is taken. ``fold`` (0-based) of ``folds`` over train and
    val: that part is only reported. ``sensitivity``: wanted on val, for the threshold; None: Youden's. ``ram``: GB that
    features may take in memory; None: six tenths of what is free.
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
        from heads.metrics import METRICS

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
