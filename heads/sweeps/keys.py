"""What a trained head is known by: hashes of words, of the images of a job, of code."""

from __future__ import annotations

import hashlib
import inspect

import numpy as np

from featurecache.spec import canonical_json
from heads.architectures import head_info
from heads.jobs import Job


def hashed(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def images_of(job: Job) -> str:
    """One word for the images of a job with labels and splits, in the order of their rows, which is that of batches."""
    view, task, names = job.view, job.task, job.divided.names
    used = np.flatnonzero(names != "")
    hashed = hashlib.blake2b(canonical_json([task.kind, task.classes, task.positive]).encode(), digest_size=16)
    parts = [np.asarray(view.digests)[used], np.ascontiguousarray(task.labels[used]), names[used].astype("S5")]
    if view.versions is not None:
        hashed.update(canonical_json(view.augmented.to_dict() if view.augmented else None).encode())
        parts.append(np.asarray(view.copies(used)))
    for part in parts:
        hashed.update(part.tobytes())
    return hashed.hexdigest()


def code_of(head: str) -> str | None:
    """A hash of the module of a head of one's own."""
    if not head.startswith("python:"):
        return None
    import sys

    return hashed(inspect.getsource(sys.modules[head_info(head).make.__module__]))
