"""The images that a run on pixels was trained and tested on, for what asks which they are and not how they look."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from featurecache.errors import UnreadableImage
from heads.pixels import source_of
from heads.runs import Run


@dataclass(frozen=True)
class Listed:
    """n images as a view lists them; they were read for their digests and not decoded."""

    label: str
    ids: list[str]
    digests: np.ndarray  # S32 [n]
    meta: dict[str, np.ndarray]  # [n] each


def listed(run: Run, wanted: Collection[str]) -> Listed:
    """Those of these ids that can be read, in the order of the data. RunError where the data are gone."""
    from featurecache.images import digest

    dataset, names = source_of(run), set(wanted)
    rows, digests = [], []
    for row, name in enumerate(dataset.ids):
        if name in names:
            with contextlib.suppress(UnreadableImage):
                digests.append(digest(dataset.read(row)).encode())
                rows.append(row)
    meta = {name: np.asarray(column)[rows] for name, column in dataset.meta.items()}
    return Listed(run.config["view"]["label"], [dataset.ids[i] for i in rows], np.array(digests, "S32"), meta)
