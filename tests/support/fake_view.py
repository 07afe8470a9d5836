"""A view in memory, with what heads read of one: no store, no HDF5."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from featurecache.errors import NotInCache
from featurecache.images.augmentation import AugmentedCopies


@dataclass
class FakeView:
    features: dict[str, torch.Tensor]
    labels: np.ndarray
    splits: list[str]
    classes: list[str]
    task: str = "binary"
    groups: list[str] | None = None
    digests: np.ndarray | None = None
    versions: np.ndarray | None = None
    augmented: AugmentedCopies | None = None
    untrained: bool = False
    prefix: tuple[str, ...] | None = None  # of every output that holds tokens
    grid: tuple[int, int] | None = None
    ids: list[str] | None = None
    name: str = "toy"
    label: str = "vit-toy/toy"
    path: Path = Path("cache/vit-toy/toy.h5")
    fingerprint: str = "0" * 64
    spec: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=lambda: {"backbone": "vit-toy"})
    source: dict = field(default_factory=lambda: {"kind": "folder", "data": "toys"})
    failed: list[dict[str, str]] = field(default_factory=list)
    cost: dict | None = None
    reads: list[str] = field(default_factory=list)  # which splits' rows were asked for, in order

    def __post_init__(self) -> None:
        n = len(self.labels)
        self.ids = self.ids or [f"img/{i:04d}.png" for i in range(n)]
        if self.digests is None:
            self.digests = np.array([f"{i:032x}".encode() for i in range(n)], dtype="S32")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def outputs(self):
        return {name: self.info(name) for name in self.features}

    def info(self, output):
        if output not in self.features:
            raise NotInCache(
                f"{self.label} holds {', '.join(self.features)}, not {output}. Store it with: "
                f"featurecache extract --backbone vit-toy --data toys --outputs {output} --name toy"
            )
        x = self.features[output]
        return SimpleNamespace(
            shape=tuple(x.shape[1:]),
            dtype=str(x.dtype).removeprefix("torch."),
            prefix=self.prefix if x.ndim == 3 else None,
            grid=self.grid if x.ndim == 3 else None,
        )

    def has(self, output):
        return output in self.features

    def tensor(self, output, rows=None):
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        self.reads.append("+".join(sorted({self.splits[i] for i in rows})))
        return self.features[output][torch.from_numpy(rows)]


def toy_view(n=240, classes=2, width=8, tokens=5, task=None, seed=0, splits="drawn", noise=1.0, **more):
    """Classes around different means in ``cls`` [n, width] and ``tokens`` [n, tokens, width], float16."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = rng.normal(size=(classes, tokens, width))
    x = centres[labels] + noise * rng.normal(size=(n, tokens, width))
    x = torch.from_numpy(x).to(torch.float16)
    if splits == "drawn":
        splits = [""] * n
    elif splits == "given":
        splits = [("train", "train", "train", "val", "test")[(i // classes) % 5] for i in range(n)]
    task = task or ("binary" if classes == 2 else "multiclass")
    names = [f"kind {c}" for c in range(classes)]
    features = {"tokens": x, "cls": x[:, 0].clone()}
    return FakeView(features, labels.astype(np.int64), list(splits), names, task, **more)


def label_view(n=300, labels=4, unknown=0.2, seed=0, **more):
    """Multi-label, some entries unknown."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8))
    y = (x[:, :labels] + 0.5 * rng.normal(size=(n, labels)) > 0.7).astype(np.float32)
    y[rng.random(y.shape) < unknown] = np.nan
    names = [f"sign {c}" for c in range(labels)]
    return FakeView({"cls": torch.from_numpy(x).to(torch.float16)}, y, [""] * n, names, "multilabel", **more)
