"""How long the steps of a sweep take, from a few of them."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from heads.jobs import Job, make_model
from heads.pixels import PixelView
from heads.sweeps.plan import STEPPED, Entry, Plan


def seconds_at_most(plan: Plan, todo: dict[Entry, int]) -> float:
    """Seconds if no head stops early, from the time of two steps of each kind; ``todo``: heads to train. Solved heads
    and the reading of features are not in it."""
    speed: dict[Any, float] = {}
    total = 0.0
    for entry, count in todo.items():
        if entry.solved or not count:
            continue
        job = plan.job(entry, plan.asked.draws[0])
        kind = (entry.number, entry.output, entry.head)
        together = min(plan.chunk(entry), count) if entry.head in STEPPED else 1
        if kind not in speed:
            speed[kind] = _seconds_of_a_step(job, together) / together
        batches = math.ceil(len(job.divided.rows("train")) / job.settings.batch_size)
        total += speed[kind] * batches * job.settings.epochs * count
    return total


def _seconds_of_a_step(job: Job, together: int) -> float:
    from heads import engine
    from heads.losses import loss_and_prior

    rows = job.divided.rows("train")
    y = torch.from_numpy(job.task.labels[rows])
    loss, _ = loss_and_prior(job.task, y, job.settings)
    generators = [torch.Generator().manual_seed(k) for k in range(together)]
    models = [make_model(job, job.settings, g).to(job.settings.device) for g in generators]
    heads = engine.together(models, [loss] * together, generators, [job.settings] * together)
    size = min(job.settings.batch_size, len(rows))
    x, y = torch.full((size, *job.input.shape), 0.1).to(job.settings.device), y.to(job.settings.device)
    if (vectors := engine.fixed_vectors(models[0])) is not None:
        x = vectors(x)
    work = engine.work_of_a_step(models[0], together, size, job.input.shape)
    with nullcontext() if isinstance(job.view, PixelView) else engine.threads_for(work):
        heads.step(x, y[:size])
        begin = time.perf_counter()
        heads.step(x, y[:size])
        heads.step(x, y[:size])
    return (time.perf_counter() - begin) / 2
