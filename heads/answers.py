"""What a head said of the images of val and of test: raw logits beside labels, digests and clusters, so that any
measure, interval or comparison can be made of a run folder alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from featurecache.errors import RunError
from heads import checks

if TYPE_CHECKING:
    from heads.run_folder import Contents
    from heads.runs import Run

_DTYPES = {"rows": np.int64, "clusters": np.int64, "digests": np.uint8, "logits": np.float64}


@dataclass(frozen=True)
class Answers:
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


def answer_tensors(contents: Contents) -> dict[str, torch.Tensor]:
    """The content of ``answers.safetensors``."""
    tensors: dict[str, torch.Tensor] = {}
    for split, (rows, raw) in contents.predictions.items():
        digests = np.frombuffer(bytes.fromhex("".join(d.decode() for d in contents.digests[rows])), np.uint8)
        found = {"rows": rows, "clusters": contents.clusters[rows], "labels": contents.labels[rows], "logits": raw}
        found["digests"] = digests.reshape(-1, 16).copy()
        tensors |= {f"{split}.{name}": torch.from_numpy(np.ascontiguousarray(v)) for name, v in found.items()}
    return tensors


def read_answers(run: Run, split: str) -> Answers:
    """``run.answers``: the tensors of one split, checked against each other and against splits.csv."""
    tensors = checks.read_tensors(run.path / "answers.safetensors")
    ids = checks.read_ids(run.path / "splits.csv")
    found = {name: tensors[key].numpy() for name in (*_DTYPES, "labels") if (key := f"{split}.{name}") in tensors}
    if len(found) < 5 or not _fit(found, run, len(ids)):
        raise RunError(
            f"{run.path / 'answers.safetensors'} does not fit the run: what it says of {split} is not whole."
        )
    raw = found["logits"]
    return Answers(
        [ids[i] for i in found["rows"]], np.array([row.tobytes().hex().encode() for row in found["digests"]], "S32"),
        found["clusters"], bool(run.config["splits"].get("grouped")), found["labels"], raw, run.calibration(raw),
    )  # fmt: skip


def _fit(found: dict[str, np.ndarray], run: Run, ids: int) -> bool:
    rows, y, classes = found["rows"], found["labels"], len(run.classes)
    n = len(rows) if rows.ndim else -1
    many = run.task == "multilabel"
    shapes = {"rows": (n,), "clusters": (n,), "digests": (n, 16), "logits": (n, classes)}
    return (
        all(found[name].shape == shape and found[name].dtype == _DTYPES[name] for name, shape in shapes.items())
        and (y.shape, y.dtype) == (((n, classes), np.float32) if many else ((n,), np.int64))
        and bool(((rows >= 0) & (rows < ids)).all())
        and (many or bool(((y >= 0) & (y < classes)).all()))
    )
