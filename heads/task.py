"""What a head trains on: task and labels, standardized features of a split, and predictions for its images.

A view holds one labelled dataset and serves several tasks: classes may be merged and left out
(``--classes pneumonia=bacteria,virus --classes normal``) or only some taken (``--only bacteria,virus``). `Predictions`
are logits beside labels, digests and clusters, so that any measure, interval or comparison can be made of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from featurecache.errors import BadOption, ProtocolError, nearest
from featurecache.formatting import abbreviated, join_names, names_in
from heads.stratify import connected_units

if TYPE_CHECKING:
    from featurecache.store.schema import Layout

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

    def __len__(self) -> int: ...

    @property
    def label(self) -> str:
        """As people name it: ``<store>/<view>``."""

    @property
    def cost(self) -> dict[str, Any] | None: ...

    @property
    def outputs(self) -> dict[str, Layout]: ...

    def info(self, output: str) -> Layout: ...

    def has(self, output: str) -> bool: ...

    def copies(self, rows: Any = None) -> np.ndarray:
        """int64 [n,V]: rows of the V versions of each image, the plain one first."""

    def tensor(self, output: str, rows: Any = None) -> torch.Tensor:
        """[n,...]: rows of an output, in the order given."""


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
    for ``multilabel`` float32 [N, L], NaN where unknown. ``positive`` is the index that binary measures speak of."""

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
        return is_labelled(self.labels)


def clusters_of(view: FeatureView, rows: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: rows (all, or only ``rows``) that share a digest or a group share a number."""
    rows = np.arange(len(view)) if rows is None else rows
    groups = None if view.groups is None else [view.groups[i] for i in rows]
    return connected_units(np.asarray(view.digests)[rows], groups).astype(np.int64)


def plain_rows(view: FeatureView) -> np.ndarray:
    """bool [N]: rows that are no augmented copies, which a reader that does not ask for them does not get."""
    return np.ones(len(view), dtype=bool) if view.versions is None else np.asarray(view.versions) == 0


def is_labelled(labels: np.ndarray) -> np.ndarray:
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
    names = list(view.classes)
    if view.task == "multilabel":
        return _multilabel(view, names, classes, only, positive)
    groups = _merge_classes(classes, names) if classes else [(name, [name]) for name in names]
    if only:
        selected = _class_names(only, names, "--only")
        groups = [(name, members) for name, members in groups if name in selected]
    return _single_label(view, groups, positive)


def _single_label(view: FeatureView, groups: list[tuple[str, list[str]]], positive: str | None) -> Task:
    spans = [sorted(view.classes.index(member) for member in members) for _, members in groups]
    names = tuple(name for name, _ in groups)
    if len(names) < 2:
        raise ProtocolError(
            f"{view.label} has one class for this task ({', '.join(names) or 'none'}); two are needed to tell apart."
        )
    kind = "binary" if len(names) == 2 else view.task if view.task != "binary" else "multiclass"
    if kind == "ordinal" and any(a[-1] > b[0] for a, b in pairwise(spans)):
        kind = "multiclass"  # merged or reordered so that the new classes have no order any more
    if positive is not None and kind != "binary":
        raise BadOption(f"--positive is for two classes; this task has {len(names)}.")
    if positive is not None and positive not in names:
        near = nearest(positive, names)
        raise BadOption(f"--positive {positive} is not a class of this task: {', '.join(names)}.{near}")
    index = None if kind != "binary" else 1 if positive is None else names.index(positive)
    return Task(kind, names, renumber_labels(view, spans), index)


def renumber_labels(view: FeatureView, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [N]: of each row the place in ``groups`` of its class (numbers of the view); -1 where in none."""
    places = np.full(len(view.classes) + 1, -1, dtype=np.int64)  # the last entry serves label -1
    for place, members in enumerate(groups):
        places[[*members]] = place
    return places[np.asarray(view.labels, dtype=np.int64)]


def _multilabel(
    view: FeatureView, names: list[str], classes: Sequence[str], only: Sequence[str], positive: str | None
) -> Task:
    if classes:
        raise BadOption("--classes merges classes that exclude each other; multi-label data have --only.")
    if positive is not None:
        raise BadOption("--positive is for two classes; every label of multi-label data has its own positives.")
    selected = _class_names(only, names, "--only") if only else names
    columns = [i for i, name in enumerate(names) if name in selected]
    return Task("multilabel", tuple(names[i] for i in columns), np.asarray(view.labels, dtype=np.float32)[:, columns])


def _merge_classes(classes: Sequence[str], names: list[str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for text in classes:
        name, _, members = (text, "", "") if text in names else text.partition("=")
        option = f"--classes {text} (NAME ends at the first =)" if "=" in members else "--classes"
        group = _class_names([members or name], names, option)
        for member in group:
            if member in group_of:
                raise BadOption(f"--classes puts {member} into {group_of[member]} and into {name}; one of them.")
            group_of[member] = name
        if name in groups:
            raise BadOption(f"--classes names {name} twice; put all its members in one: {name}=A,B.")
        groups[name] = group
    return list(groups.items())


def _class_names(texts: Sequence[str], names: list[str], option: str) -> list[str]:
    """Class names out of ``a,b`` or a list; one that itself holds a comma is taken whole where it stands alone, and
    stands among others in quotes."""
    selected: list[str] = []
    for text in texts:
        parts = [text] if text in names else names_in(text) or [text]
        if parts == [text] and text not in names:
            there = abbreviated([join_names([name]) for name in names], 12)  # as they are typed
            raise BadOption(f"{option}: no class is called {text!r}.{nearest(text, names)} The classes are {there}.")
        selected += parts if parts == [text] else _class_names(parts, names, option)
    return selected


@dataclass(frozen=True)
class Standardize:
    """How features are scaled before a head sees them; the statistics come from train and stay with the run.

    ``zscore``: (x - mean) / std per channel, for tokens over all tokens of all images; a constant channel is only
    centred. ``l2``: every vector (for tokens: every token) divided by its length."""

    kind: str = "none"
    mean: torch.Tensor | None = None  # float32 [D]
    std: torch.Tensor | None = None  # float32 [D]
    basis: torch.Tensor | None = None  # float32 [D, R], in which training sees them then (`heads.training.eigenbasis`)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[B, ..., D] as stored -> float32 of the same shape, or [B, R]; without a basis in ``out``, if it is given."""
        if self.basis is not None:
            return replace(self, basis=None)(x) @ self.basis
        x = x.float() if out is None else out.copy_(x)
        if self.kind == "zscore":
            assert self.mean is not None and self.std is not None
            return torch.sub(x, self.mean, out=out).div_(self.std)
        if self.kind == "l2":
            return torch.div(x, x.norm(dim=-1, keepdim=True).clamp_min(1e-12), out=out)
        return x

    def tensors(self) -> dict[str, torch.Tensor]:
        statistics = {"standardize.mean": self.mean, "standardize.std": self.std}
        return {name: values for name, values in statistics.items() if values is not None}

    @classmethod
    def fit(cls, kind: str, chunks: Callable[[], Iterable[torch.Tensor]]) -> Standardize:
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


VECTORS = 512  # at once: 1.5 MB of width 768, which a core's cache holds
Room = Callable[[int, Sequence[int]], torch.Tensor]  # memory for so many rows of this shape


class Scratch:
    """Memory that stays from batch to batch. New memory of the size of tokens costs more than the numbers in it: 4 ms
    for a batch of 19 MB, which is copied in one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.rows = torch.empty(0, dtype=dtype)

    def __call__(self, count: int, shape: Sequence[int]) -> torch.Tensor:
        """[count, ...]"""
        if len(self.rows) < count:
            self.rows = self.rows.new_empty(count, *shape)
        return self.rows[:count]


@dataclass(frozen=True)
class SplitData:
    """Features and labels of n rows: in memory as they are stored, or read batch by batch from the mapped shards where
    they would not fit; no loader, no workers.

    ``x``: [n·V, D] or [n·V, T, D] in storage dtype, version by version: the n plain images, then (where augmented
    copies are in the view) the first copy of each, and so on; None where ``read`` gives rows by number. y: int64 [n] or
    float32 [n, L] with NaN for unknown."""

    x: torch.Tensor | None
    y: torch.Tensor
    scale: Standardize = Standardize()
    versions: int = 1  # V
    read: Callable[[np.ndarray], torch.Tensor] | None = None
    piece: int = 256  # rows at once in evaluation
    device: str = "cpu"  # where batches go

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: int64 [B] in 0 … n·V - 1 -> [B, ...] in storage dtype."""
        if self.x is not None:
            return self.x.index_select(0, rows)
        assert self.read is not None
        return self.read(rows.numpy())

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: int64 [B] -> float32 [B, ...], labels [B, ...]."""
        y = self.y.index_select(0, rows if self.versions == 1 else rows % len(self))
        return self.scale(self.take(rows).to(self.device)), y.to(self.device)

    def batches(
        self, order: Sequence[torch.Tensor], room: Room | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
        """Each of ``order`` as `batch` gives it, but in memory that the next one takes; ``room`` gives other memory,
        float32 or bfloat16. Vectors are small: of those in memory many batches are taken at once."""
        if self.x is not None and self.x.ndim == 2:
            many = max(1, VECTORS // max(map(len, order), default=1))
            for few in (order[start : start + many] for start in range(0, len(order), many)):
                sizes, (x, y) = [len(rows) for rows in few], self.batch(torch.cat(list(few)))
                yield from zip(x.split(sizes), y.split(sizes), strict=True)
            return
        room, values = room or Scratch(torch.float32), Scratch(torch.float32)
        stored = None if self.x is None else Scratch(self.x.dtype)
        for rows in order:
            if self.device != "cpu" or self.scale.basis is not None:
                yield self.batch(rows)
                continue
            if self.x is None or stored is None:
                part = self.take(rows)
            else:
                part = torch.index_select(self.x, 0, rows, out=stored(len(rows), self.x.shape[1:]))
            x = room(len(rows), part.shape[1:])
            if x.dtype == torch.float32:
                self.scale(part, x)
            else:  # by float32, which is also the faster way from float16 to bfloat16
                x.copy_(self.scale(part, values(len(rows), part.shape[1:])))
            yield x, self.y.index_select(0, rows if self.versions == 1 else rows % len(self))

    def map_features(self, function: Callable[[torch.Tensor], torch.Tensor] | None) -> SplitData:
        """The scaled features of all versions, or what ``function`` makes of them, float32, in memory."""
        x, count = None, len(self) * self.versions
        for rows in torch.arange(count).split(256):
            part = self.scale(self.take(rows))
            part = part if function is None else function(part)
            x = part.new_empty(count, *part.shape[1:]) if x is None else x  # once in memory, not as parts and whole
            x[rows[0] : rows[-1] + 1] = part
        return SplitData(x, self.y, versions=self.versions)

    def chunks(self, size: int | None = None) -> Iterator[torch.Tensor]:
        """float32 [<=size, ...] of the plain images in row order, for evaluation."""
        for rows in torch.arange(len(self)).split(size or self.piece):
            part = self.take(rows) if self.x is None else self.x[rows[0] : rows[-1] + 1]
            yield self.scale(part.to(self.device))


def load_features(
    view: FeatureView, output: str, rows: np.ndarray, labels: np.ndarray, scale: Standardize | None = None, *,
    resident: bool = True, copies: bool = False,
) -> SplitData:  # fmt: skip
    """The features of ``rows`` (indices into the view) with their labels; ``copies``: with their augmented copies."""
    table = rows[None] if not copies or view.versions is None else np.asarray(view.copies(rows)).T  # [V, n]
    flat, y = table.reshape(-1), torch.from_numpy(labels[rows])
    scale = scale or Standardize()
    if not resident:
        return SplitData(None, y, scale, len(table), lambda rows: view.tensor(output, flat[rows]))
    x = view.tensor(output, flat)
    assert len(x) == len(flat), "a view gives a row for every row asked"
    return SplitData(x, y, scale, len(table))


@dataclass(frozen=True)
class Predictions:
    """Of the n images of one split, C classes or labels.

    ``clusters``: images of one group, or of one digest, share a number; the numbering is that of the whole view.
    ``y``: int64 [n], or float32 [n, L] with NaN for unknown."""

    ids: list[str]
    digests: np.ndarray  # S32 [n]
    clusters: np.ndarray  # int64 [n]
    grouped: bool  # whether the data name groups
    y: np.ndarray
    logits: np.ndarray  # float64 [n, C]: as the head gives them
    calibrated_logits: np.ndarray  # float64 [n, C]: with prior correction and temperature
