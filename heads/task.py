"""Task, Standardize, Features, Predictions; the FeatureView that both kinds of views satisfy.

From a view to what a head trains on: the task, and the features of the rows that are asked for.

A view holds one labelled dataset. The same cache serves several tasks: classes may be merged and left out
(``--classes pneumonia=bacteria,virus --classes normal``) or only some kept (``--only bacteria,virus``).

What a head said of the images of val and of test: raw logits beside labels, digests and clusters, so that any
measure, interval or comparison can be made of a run folder alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from featurecache.errors import BadOption, ProtocolError, nearest
from featurecache.formatting import abbreviated
from heads.stratify import connected_units

if TYPE_CHECKING:
    from featurecache.store.schema import OutputInfo


def clusters_of(view: FeatureView) -> np.ndarray:
    """int64 [N]: rows that share a digest or a group share a number."""
    return connected_units(np.asarray(view.digests), view.groups).astype(np.int64)


Say = Callable[[str], None]


class FeatureView(Protocol):
    """What heads read of N labelled images: a ``View`` of features, or a ``PixelView`` of the images themselves."""

    path: Path
    name: str
    source: dict[str, Any]
    spec: dict[str, Any]
    provenance: dict[str, Any]
    fingerprint: str
    classes: list[str]
    task: str
    labels: np.ndarray  # int64 [N], -1 unlabelled; multi-label float32 [N,C], NaN unknown
    ids: Any  # N names; so splits, digests (32 hex digits each) and groups, where these are known
    splits: Any
    digests: Any
    groups: Any
    meta: Any  # name -> N values
    failed: list[dict[str, str]]
    versions: Any
    augmented: Any
    untrained: bool
    imported: bool

    def __len__(self) -> int: ...

    @property
    def label(self) -> str:
        """As people name it: ``<store>/<view>``."""

    @property
    def cost(self) -> dict[str, Any] | None: ...

    @property
    def outputs(self) -> dict[str, OutputInfo]: ...

    def info(self, output: str) -> OutputInfo: ...

    def has(self, output: str) -> bool: ...

    def split(self, name: str) -> np.ndarray:
        """int64 [n]: rows of a split."""

    def copies(self, rows: Any = None) -> np.ndarray:
        """int64 [n,V]: rows of the V versions of each image, the plain one first."""

    def tensor(self, output: str, rows: Any = None) -> torch.Tensor:
        """[n,...]: rows of an output, in the order given."""


SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Leak:
    """``count`` images or groups (``kind``) that stand in both ``splits``."""

    kind: str
    splits: tuple[str, str]
    count: int


@dataclass(frozen=True)
class Task:
    """What is to be told apart.

    ``labels`` has one entry for every row of the view: int64 [N], -1 where the row is not part of the task;
    for ``multilabel`` float32 [N, L], NaN where unknown. ``positive`` is the index that binary measures speak of.
    """

    kind: str
    classes: tuple[str, ...]
    labels: np.ndarray
    positive: int | None = None

    @property
    def multilabel(self) -> bool:
        return self.kind == "multilabel"

    @property
    def usable(self) -> np.ndarray:
        """bool [N]: rows of which at least one label is known."""
        return has_label(self.labels)


def has_label(labels: np.ndarray) -> np.ndarray:
    """bool [N]: rows that carry a label (multi-label [N, L]: at least one known)."""
    return ~np.isnan(labels).all(axis=1) if labels.ndim == 2 else labels >= 0


def task_of(
    view: FeatureView, *, classes: Sequence[str] = (), only: Sequence[str] = (), positive: str | None = None
) -> Task:
    """The task of a view, with classes merged (``classes``) or left out (``only``); raises on unknown words."""
    if view.task == "unlabelled":
        raise ProtocolError(
            f"{view.label} carries no labels, and a head learns from labels. "
            "Class folders or a table with a label column bring them."
        )
    if classes and only:
        raise BadOption("--classes already leaves out every class it does not name; give either it or --only.")
    known = list(view.classes)
    if view.task == "multilabel":
        return _labels_chosen(view, known, classes, only, positive)
    groups = [(name, [name]) for name in known]
    if classes:
        groups = _merged(classes, known)
    if only:
        kept = _names(only, known, "--only")
        groups = [(name, members) for name, members in groups if name in kept]
    return _single_label(view, groups, positive)


def _single_label(view: FeatureView, groups: list[tuple[str, list[str]]], positive: str | None) -> Task:
    recode = np.full(len(view.classes) + 1, -1, dtype=np.int64)  # the last entry serves label -1
    for new, (_, members) in enumerate(groups):
        recode[[view.classes.index(m) for m in members]] = new
    names = tuple(name for name, _ in groups)
    if len(names) < 2:
        raise ProtocolError(
            f"{view.label} has one class for this task ({', '.join(names) or 'none'}); two are needed to tell apart."
        )
    kind = "binary" if len(names) == 2 else view.task if view.task != "binary" else "multiclass"
    spans = [sorted(view.classes.index(m) for m in members) for _, members in groups]
    if kind == "ordinal" and any(a[-1] > b[0] for a, b in pairwise(spans)):
        kind = "multiclass"  # merged or reordered so that the new classes have no order any more
    if positive is not None and kind != "binary":
        raise BadOption(f"--positive is for two classes; this task has {len(names)}.")
    index = _positive(names, positive) if kind == "binary" else None
    return Task(kind, names, recode[np.asarray(view.labels, dtype=np.int64)], index)


def _positive(names: tuple[str, ...], positive: str | None) -> int:
    if positive is None:
        return 1
    if positive not in names:
        raise BadOption(f"--positive {positive} is not a class of this task: {', '.join(names)}.")
    return names.index(positive)


def _labels_chosen(
    view: FeatureView, known: list[str], classes: Sequence[str], only: Sequence[str], positive: str | None
) -> Task:
    if classes:
        raise BadOption("--classes merges classes that exclude each other; multi-label data have --only.")
    if positive is not None:
        raise BadOption("--positive is for two classes; every label of multi-label data has its own positives.")
    kept = _names(only, known, "--only") if only else known
    columns = [i for i, name in enumerate(known) if name in kept]
    return Task("multilabel", tuple(known[i] for i in columns), np.asarray(view.labels, dtype=np.float32)[:, columns])


def _merged(classes: Sequence[str], known: list[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    taken: dict[str, str] = {}
    for text in classes:
        name, _, members = (text, "", "") if text in known else text.partition("=")
        found = _names([members or name], known, "--classes")
        for member in found:
            if member in taken:
                raise BadOption(f"--classes puts {member} into {taken[member]} and into {name}; one of them.")
            taken[member] = name
        if name in [n for n, _ in groups]:
            raise BadOption(f"--classes names {name} twice; put all its members in one: {name}=A,B.")
        groups.append((name, found))
    return groups


def _names(words: Sequence[str], known: list[str], option: str) -> list[str]:
    """Class names out of ``a,b`` or a list; a name that itself holds a comma is taken whole."""
    names: list[str] = []
    for word in words:
        names += [word] if word in known else [part.strip() for part in word.split(",")]
    for name in names:
        if name not in known:
            raise BadOption(
                f"{option}: no class is called {name!r}.{nearest(name, known)} "
                f"The classes are {abbreviated(known, 12)}."
            )
    return names


@dataclass(frozen=True)
class Standardize:
    """How features are scaled before a head sees them; the statistics come from train and stay with the run.

    ``zscore``: (x - mean) / std per channel, for tokens over all tokens of all images; a constant channel is only
    centred. ``l2``: every vector (for tokens: every token) divided by its length.
    """

    kind: str = "none"
    mean: torch.Tensor | None = None  # float32 [D]
    std: torch.Tensor | None = None  # float32 [D]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, ..., D] -> the same shape."""
        if self.kind == "zscore":
            assert self.mean is not None and self.std is not None
            return (x - self.mean) / self.std
        if self.kind == "l2":
            return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return x

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.mean is None or self.std is None:
            return {}
        return {"standardize.mean": self.mean, "standardize.std": self.std}

    @classmethod
    def fitted(cls, kind: str, chunks: Callable[[], Iterable[torch.Tensor]]) -> Standardize:
        """``chunks()``: training features in parts [n, ..., D], unscaled; gone through twice."""
        if kind != "zscore":
            return cls(kind)
        count, total = 0, torch.zeros((), dtype=torch.float64)
        for part in chunks():
            rows = part.reshape(-1, part.shape[-1]).double()
            count, total = count + len(rows), total + rows.sum(0)
        mean, square = total / count, torch.zeros_like(total)
        for part in chunks():
            square += (part.reshape(-1, part.shape[-1]).double() - mean).square().sum(0) / count
        std = square.sqrt()
        std[std <= 1e-7 * mean.abs().clamp_min(1e-7)] = 1.0
        return cls(kind, mean.float(), std.float())


@dataclass(frozen=True)
class SplitData:
    """Features and labels of n rows: in memory as they are stored, or read batch by batch from the mapped shards where
    they would not fit; no loader, no workers.

    ``x``: [n·V, D] or [n·V, T, D] in storage dtype, version by version: the n plain images, then (where augmented
    copies are in the view) the first copy of each, and so on; None where ``read`` gives rows by place. y: int64 [n] or
    float32 [n, L] with NaN for unknown.
    """

    x: torch.Tensor | None
    y: torch.Tensor
    scale: Standardize = Standardize()
    versions: int = 1  # V
    read: Callable[[np.ndarray], torch.Tensor] | None = None
    piece: int = 256  # rows at once in evaluation
    device: str = "cpu"  # where batches go

    def __len__(self) -> int:
        return len(self.y)

    def take(self, places: torch.Tensor) -> torch.Tensor:
        """places: int64 [B] in 0 … n·V - 1 -> [B, ...] in storage dtype."""
        if self.x is not None:
            return self.x.index_select(0, places)
        assert self.read is not None
        return self.read(places.numpy())

    def batch(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """places: int64 [B] -> float32 [B, ...], labels [B, ...]."""
        y = self.y.index_select(0, places if self.versions == 1 else places % len(self))
        return self.scale(self.take(places).to(self.device).float()), y.to(self.device)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SplitData:
        """What ``function`` makes of the scaled features of all versions, float32, in memory."""
        parts = torch.arange(len(self) * self.versions).split(256)
        x = torch.cat([function(self.scale(self.take(places).float())) for places in parts])
        return SplitData(x, self.y, versions=self.versions)

    def chunks(self, size: int | None = None) -> Iterator[torch.Tensor]:
        """float32 [<=size, ...] of the plain images in row order, for evaluation."""
        for places in torch.arange(len(self)).split(size or self.piece):
            part = self.take(places) if self.x is None else self.x[places[0] : places[-1] + 1]
            yield self.scale(part.to(self.device).float())


def load_features(
    view: Any,
    output: str,
    rows: np.ndarray,
    labels: np.ndarray,
    scale: Standardize | None = None,
    *,
    resident: bool = True,
    copies: bool = False,
) -> SplitData:
    """The features of ``rows`` (indices into the view) with their labels; ``copies``: with their augmented copies."""
    table = rows[None] if not copies or view.versions is None else np.asarray(view.copies(rows)).T  # [V, n]
    flat, y = table.reshape(-1), torch.from_numpy(labels[rows])
    scale = scale or Standardize()
    if not resident:
        return SplitData(None, y, scale, len(table), lambda places: view.tensor(output, flat[places]))
    x = view.tensor(output, flat)
    assert len(x) == len(flat), "a view gives a row for every row asked"
    return SplitData(x, y, scale, len(table))


def memory_for_features() -> int:
    """Bytes: six tenths of the memory that is free now."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return int(0.6 * free)


@dataclass(frozen=True)
class Predictions:
    """Of the n images of one split, C classes or labels.

    ``clusters``: images of one group, or of one digest, share a number; the numbering is that of the whole view.
    ``y``: int64 [n], or float32 [n, L] with NaN for unknown.
    """

    ids: list[str]
    digests: np.ndarray  # S32 [n]
    clusters: np.ndarray  # int64 [n]
    grouped: bool  # whether the data name groups
    y: np.ndarray
    raw: np.ndarray  # float64 [n, C]: logits as the head gives them
    z: np.ndarray  # float64 [n, C]: with prior correction and temperature
