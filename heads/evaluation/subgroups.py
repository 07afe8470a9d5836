"""Subgroups of test images by a column of the data (site, sex, device, ...), read from the view by id and digest; for a
run on pixels from its images, which are read for their digests and not decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np

from featurecache.errors import BadOption, CacheError, RunError, UnreadableImage, nearest
from featurecache.formatting import exact_number
from heads.evaluation.families import FamilyPredictions
from heads.runs.run import Run, is_pixels, open_run_dataset
from heads.task import Predictions

MOST = 20  # different values: of more, the parts of test are too small to say anything


def column_values(predictions: FamilyPredictions, column: str) -> list[list[str]]:
    """For each set of test images the value of each image, in the common order; "" where it has none."""
    first = zip(predictions.runs, predictions.answers, strict=True)
    values = [_values(runs[0], answers[0], column) for runs, answers in first]
    different = {value for each in values for value in each}
    if len(different) > MOST:
        what = f"--by {column} has {len(different):,} different values on test"
        raise BadOption(f"{what}; expected at most {MOST}, such as a site, a sex or a device.")
    return values


def _values(run: Run, answers: Predictions, column: str) -> list[str]:
    try:
        view = image_columns(run, answers.ids)
    except (CacheError, OSError) as error:
        path = run.config["view"]["path"]
        gone = f"--by reads the columns of {path}, on which {run.path} was trained, and that cannot be opened"
        raise RunError(f"{gone}: {error}") from error
    if column not in view.meta:
        columns = ", ".join(view.meta) or "none"
        raise BadOption(
            f"--by {column}: {view.label} has no such column; it has {columns}.{nearest(column, view.meta)} Columns of "
            "a table beside path, label, split and group come into the view."
        )
    index = {(name, bytes(digest)): i for i, (name, digest) in enumerate(zip(view.ids, view.digests, strict=True))}
    rows = [index.get((name, bytes(d))) for name, d in zip(answers.ids, answers.digests, strict=True)]
    if None in rows:
        raise RunError(
            f"{view.label} no longer holds {rows.count(None):,} of the images that {run.path} was tested on (the "
            f"first: {answers.ids[rows.index(None)]}). Extract them again, or train again."
        )
    return [cell_text(view.meta[column][row]) for row in rows]


def cell_text(value: Any) -> str:
    """A value of a column, as its table has it but for zeros at its end: 1.0 is 1."""
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else exact_number(float(value))
    return value.decode() if isinstance(value, bytes) else str(value)


def image_columns(run: Run, ids: Collection[str]) -> Any:
    """The view that a run was made of; of a run on pixels the same columns (label, n ids, digests S32 [n], meta) of
    those images in ``ids`` that can be read, in the order of the data. RunError where the data are gone; the errors of
    a view."""
    from featurecache.images.decoding import digest
    from featurecache.store.remote_cache import local_place
    from featurecache.store.view import View

    if not is_pixels(run):
        return View(local_place(run.config["view"]["path"]), columns_only=True)
    dataset, wanted = open_run_dataset(run), set(ids)
    rows, digests = [], []
    for row, name in enumerate(dataset.ids):
        if name in wanted:
            with contextlib.suppress(UnreadableImage):
                digests.append(digest(dataset.read(row)).encode())
                rows.append(row)
    meta = {name: np.asarray(column)[rows] for name, column in dataset.meta.items()}
    names = [dataset.ids[i] for i in rows]
    return SimpleNamespace(label=run.config["view"]["label"], ids=names, digests=np.array(digests, "S32"), meta=meta)
