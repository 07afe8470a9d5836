"""Several views of the same images, one for each backbone: matched image by image, so that all are splits alike.

Rows are matched by digest, never by place: a view may have another order, and lack images that could not be read. Only
images that every view holds are used. Rows of one digest are told apart by id, or, where ids are hashed, by order.

Notation: V views, N rows of a view, M images that all views hold.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurecache.errors import ProtocolError
from featurecache.maintenance.leaks import numbered
from heads.task import FeatureView, plain_rows


@dataclass(frozen=True)
class AlignedViews:
    """``rows``: for every view int64 [M], its rows of the common images, in the first view's order; ``left_out``: how
    many images only some of the views hold."""

    views: tuple[FeatureView, ...]
    rows: tuple[np.ndarray, ...]
    left_out: int = 0

    def digest(self, names: np.ndarray | None = None) -> str:
        """One word for images, labels and what else is said of them, in whatever order they lie; ``names`` [N]: with
        these splits of the first view instead of those in the data."""
        view, rows = self.views[0], self.rows[0]
        words = np.asarray(view.splits, dtype=str) if names is None else names
        columns = np.asarray(view.digests)[rows].tolist(), _label_texts(view, rows), words[rows].tolist()
        table = sorted(zip(*columns, strict=True))
        return hashlib.blake2b(repr(table).encode(), digest_size=16).hexdigest()


def same_images(views: Sequence[FeatureView]) -> AlignedViews:
    """Match the views; raises ProtocolError with what differs where they are not of the same labelled images."""
    first, *others = views
    by_id = all(set(view.ids) & set(first.ids) for view in views)
    keys = [_keys(view, by_id) for view in views]
    common = set(keys[0]).intersection(*keys[1:])
    for view, own in zip(others, keys[1:], strict=True):
        _same_set(first, view, keys[0], own)
    order = [key for key in keys[0] if key in common]
    rows = tuple(np.array([own[key] for key in order], dtype=np.int64) for own in keys)
    for view, own_rows in zip(others, rows[1:], strict=True):
        _same_record(first, view, rows[0], own_rows)
    return AlignedViews(tuple(views), rows, len(set().union(*keys)) - len(common))


def _keys(view: FeatureView, by_id: bool) -> dict[tuple[Any, ...], int]:
    """What tells an image from all others of its view -> its row."""
    seen: Counter[Any] = Counter()
    keys: dict[tuple[Any, ...], int] = {}
    for row in np.flatnonzero(plain_rows(view)).tolist():
        digest = bytes(view.digests[row])
        name = view.ids[row] if by_id else seen[digest]
        seen[digest] += 1
        keys[digest, name] = row
    return keys


def _same_set(
    first: FeatureView, view: FeatureView, keys: dict[tuple[Any, ...], int], own: dict[tuple[Any, ...], int]
) -> None:
    """An image that a view lacks must be one that it could not read."""
    for there, lacking, a, b in ((first, view, keys, own), (view, first, own, keys)):
        missing = [row for key, row in a.items() if key not in b]
        unread = {failure["id"] for failure in lacking.failed}
        same_ids = bool(set(there.ids) & (set(lacking.ids) | unread))
        if other := [row for row in missing if there.ids[row] not in unread] if same_ids else missing[len(unread) :]:
            raise ProtocolError(
                f"{there.label} and {lacking.label} are not of the same images: {len(other):,} of {there.label} "
                f"are not in {lacking.label} (the first: {there.ids[other[0]]}). Extract the same --data with both."
            )


def _same_record(first: FeatureView, view: FeatureView, rows: np.ndarray, own: np.ndarray) -> None:
    """Classes, labels, splits and groups of the common images."""
    pair = f"{first.label} and {view.label}"
    if (first.task, list(first.classes)) != (view.task, list(view.classes)):
        raise ProtocolError(
            f"{pair} have other classes: {first.task} of {', '.join(first.classes[:6])}; {view.task} of "
            f"{', '.join(view.classes[:6])}."
        )
    for what, a, b in (
        ("labels", _label_texts(first, rows), _label_texts(view, own)),
        ("splits", [first.splits[i] for i in rows], [view.splits[i] for i in own]),
        ("groups", _groups(first, rows), _groups(view, own)),
    ):
        if wrong := [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]:
            raise ProtocolError(
                f"{pair} have other {what} for {len(wrong):,} of {len(rows):,} images (the first: "
                f"{first.ids[rows[wrong[0]]]}). Extract the same --data with both; nothing is computed twice."
            )


def _label_texts(view: FeatureView, rows: np.ndarray) -> list[str]:
    return [str(label) for label in np.asarray(view.labels)[rows].tolist()]


def _groups(view: FeatureView, rows: np.ndarray) -> list[int]:
    """Which rows belong together, whatever the groups are called."""
    return [-1] * len(rows) if view.groups is None else numbered([view.groups[i] for i in rows]).tolist()
