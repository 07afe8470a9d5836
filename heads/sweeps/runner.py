"""Train what is missing, stacked where it can be.

Running a plan: train what is missing, family by family; choose; keep what is chosen as runs.

How long the steps of a sweep take, from a few of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from featurecache.errors import ProtocolError, Stopped
from heads.evaluation.controls import all_controls
from heads.evaluation.families import Selection, family_of, mean_of, select_setting, setting_of
from heads.metrics.classification import METRICS
from heads.models.common import FINETUNE
from heads.pixel_view import PixelView
from heads.runs.write import RunContents, RunTarget, write_run
from heads.settings import Settings
from heads.sweeps.grid import Resplit
from heads.sweeps.journal import JournalFile, Row, StagedRuns, key_in, slug
from heads.sweeps.plan import STEPPED, PlannedFamily, SweepPlan
from heads.task import Say, task_of
from heads.training import engine
from heads.training.job import TrainingJob, make_model, split_line
from heads.training.losses import loss_and_prior
from heads.training.network import Checkpoint, with_backbone
from heads.training.train import FittedHead, contents_of, train_together


class SweepRunner:
    """Trains what is missing, family by family, and keeps what is chosen."""

    def __init__(self, plan: SweepPlan, folder: Path, controls: bool | None, say: Say, progress: bool) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.rows, self.shelf = JournalFile(folder), StagedRuns(folder)
        untrained = any(view.untrained for view in plan.matched.views)
        self.controls = untrained if controls is None else controls
        self._controls: dict[Any, list[dict[str, Any]]] = {}
        self.progress = progress
        self.select = plan.asked.base.select

    def run(self) -> None:
        todo = say_plan(self.plan, self.folder, self.rows.rows, self.say)
        with _bar(sum(todo.values()), self.progress) as self.bar:
            try:
                for entry in self.plan.entries:
                    if self.plan.asked.search and not entry.solved:
                        from heads.sweeps.search import search

                        search(self, entry)
                    else:
                        self.train(entry)
                    self.finish(entry)
                for left in self.folder.glob(".network-*.checkpoint"):  # of settings that are asked for no more
                    left.unlink()
            except KeyboardInterrupt as error:
                raise Stopped(
                    f"stopped. {len(self.rows.rows):,} heads are safe; the same command continues."
                ) from error

    def train(self, entry: PlannedFamily, variants: Sequence[dict[str, Any]] | None = None) -> int:
        """Every head of these settings that is not there yet, on every draw; how many that were."""
        trained = 0
        for draw in self.plan.asked.draws:
            settings, keys = self.plan.wanted(entry, draw, variants)
            missing = [(s, key) for s, key in zip(settings, keys, strict=True) if key not in self.rows.by_key]
            size = self.plan.chunk(entry)
            for start in range(0, len(missing), size):
                chunk = missing[start : start + size]
                self._train_set(self.plan.job(entry, draw), entry, draw, chunk)
                self.bar.update(len(chunk))
            trained += len(missing)
        return trained

    def value(self, entry: PlannedFamily, values: dict[str, Any]) -> float | None:
        """The criterion of one setting, averaged over its seeds and draws; None where a head of it failed."""
        keys = [key for draw in self.plan.asked.draws for key in self.plan.wanted(entry, draw, [values])[1]]
        value = mean_of([self.rows.by_key[key] for key in keys], self.select)
        return None if math.isnan(value) else value

    def _train_set(
        self, job: TrainingJob, entry: PlannedFamily, draw: Resplit, chunk: Sequence[tuple[Settings, str]]
    ) -> None:
        """Heads that share their batches: to the shelf first, then their rows at once. A network is kept after every
        epoch, too: it may take hours."""
        kept = None
        if isinstance(job.view, PixelView):
            ((settings, _),) = chunk
            kept = Checkpoint.of(RunTarget(self.folder, "network"), replace(job, settings=settings))
        fits = train_together(job, [settings for settings, _ in chunk], keeper=kept)
        rows = []
        for (settings, key), fit in zip(chunk, fits, strict=True):
            if isinstance(fit, FittedHead):
                self.shelf.put(key, self._contents(job, fit, entry, draw, key))
            rows.append(_row(self.plan, entry, draw, job, settings, key, fit))
        self.rows.append(rows)
        if kept:
            kept.remove()

    def _contents(
        self, job: TrainingJob, fit: FittedHead, entry: PlannedFamily, draw: Resplit, key: str
    ) -> RunContents:
        contents = contents_of(job, replace(fit, settings=self._told(fit.settings, fit.window)), [])
        mark = {"key": key, "repeat": draw.repeat, "family": list(entry.family)}
        return replace(contents, config=contents.config | {"sweep": mark})

    def _told(self, settings: Settings, window: int | None) -> Settings:
        """What is written of the settings: a budget of memory that was never reached has decided nothing."""
        return replace(settings, ram=self.plan.asked.base.ram) if window is None else settings

    def finish(self, entry: PlannedFamily) -> None:
        """Choose the setting of a family, write its heads as runs, and say so."""
        rows = [row for row in self.rows.rows if family_of(row) == entry.family]
        choice = select_setting(rows, self.select)
        if choice is None:
            failed = next((row["failed"] for row in rows if row["failed"]), "no measure on val is defined")
            self._line(f"warning    {entry}: no setting worked on every draw; {failed}")
            return
        for row in choice.rows:
            self._keep(entry, row)
        self.shelf.clear(row["key"] for row in rows)
        self._line(_family_line(entry, choice, rows, self.select))

    def _keep(self, entry: PlannedFamily, row: Row) -> None:
        """The run folder of a chosen head, unless it is there."""
        path = self.folder / "heads" / slug(row)
        if key_in(path) == row["key"]:
            return
        draw = Resplit(row["repeat"], row["fold"])
        job = self.plan.job(entry, draw, Settings.from_dict(row["settings"]))
        contents = self.shelf.take(row["key"], job)
        if contents is None:
            self._again(entry, draw, job, row["key"])
            contents = self.shelf.take(row["key"], job)
        assert contents is not None, "it was just put there"
        if entry.head.startswith(FINETUNE):
            tuned = make_model(job, job.settings).eval()  # a network that is none of the run's is needed no more
            tuned.load_state_dict(contents.tensors)
            contents = with_backbone(contents, tuned)
        contents = replace(contents, metrics=contents.metrics | {"controls": self._beside(entry, draw)})
        write_run(RunTarget(path.parent, path.name, path), contents)

    def _again(self, entry: PlannedFamily, draw: Resplit, job: TrainingJob, key: str) -> None:
        """Train the whole set again that a head was trained in: alone it would differ in the last digits."""
        rows = self.rows.together_with(key)
        own = [Settings.from_dict(row["settings"]) for row in rows]
        settings = [replace(each, ram=job.settings.ram, splits=job.settings.splits) for each in own]
        for row, fit in zip(rows, train_together(job, settings), strict=True):
            if isinstance(fit, FittedHead):
                self.shelf.put(row["key"], self._contents(job, fit, entry, draw, row["key"]))

    def _beside(self, entry: PlannedFamily, draw: Resplit) -> list[dict[str, Any]]:
        """The controls, once: on the first draw with the most images. They look at pixels, so at no view."""
        first = self.plan.asked.draws[0]
        if not self.controls or draw != first or entry.fraction < max(self.plan.asked.fractions):
            return []
        if draw not in self._controls:
            self._line("controls   chance, the majority class, logistic regression on raw pixels")
            view, base = self.plan.matched.views[0], self.plan.asked.base
            task = task_of(view, classes=base.classes, only=base.only, positive=base.positive)
            divided = self.plan.splits(0, entry.fraction, draw)
            self._controls[draw] = all_controls(view, self.plan.matched.common_task(task), divided)
        return self._controls[draw]

    def _line(self, line: str) -> None:
        self.bar.clear()
        self.say(line)
        self.bar.refresh()


def _bar(total: int, progress: bool) -> tqdm:
    style = "ablate {percentage:3.0f} % {bar} {n:,}/{total:,} heads  eta {remaining}"
    return tqdm(
        total=total, disable=None if progress else True, bar_format=style, leave=False, smoothing=0.1,
        dynamic_ncols=True,
    )  # fmt: skip


def _row(
    plan: SweepPlan,
    entry: PlannedFamily,
    draw: Resplit,
    job: TrainingJob,
    settings: Settings,
    key: str,
    fit: FittedHead | ProtocolError,
) -> Row:
    told = settings if plan.asked.base.ram is not None else replace(settings, ram=None)
    row = {
        "key": key, "view": entry.view, "fingerprint": job.view.fingerprint, "output": job.output, "head": entry.head,
        "fraction": entry.fraction, "repeat": draw.repeat, "fold": draw.fold, "settings": told.to_dict(),
    }  # fmt: skip
    if isinstance(fit, ProtocolError):
        nothing = dict.fromkeys(("epoch", "val", "test", "parameters", "ms_per_image"))
        return row | nothing | {"failed": str(fit), "notes": [], "seconds": 0.0}
    return row | {
        "epoch": fit.epoch, "val": _scalars(fit.metrics["val"]), "test": _scalars(fit.metrics["test"]),
        "parameters": fit.parameters, "ms_per_image": fit.ms_per_image, "failed": None, "notes": list(fit.notes),
        "seconds": float(fit.seconds),
    }  # fmt: skip


def _scalars(measured: dict[str, Any]) -> dict[str, float]:
    return {name: float(measured[name]) for name in METRICS if isinstance(measured.get(name), int | float | np.number)}


def say_plan(
    plan: SweepPlan, folder: Path, rows: Sequence[Row], say: Say, whole: bool = False
) -> dict[PlannedFamily, int]:
    """The plan in a line or two; ``whole``: a line for each family. Returns how many heads of each are missing."""
    todo, there = _missing(plan, {row["key"] for row in rows})
    for sentence in plan.left_out:
        say(f"left out   {sentence}: they do not fit")
    if plan.matched.left_out:
        say(f"images     {plan.matched.left_out:,} that not every view holds are left out of all")
    for line in _about_draws(plan):
        say(line)
    if whole:
        for entry in plan.entries:
            say(f"family     {entry}: {_count(todo[entry], 'head')}")
    already = f"; {there:,} are there already" if there else ""
    say(f"plan       {_work(plan, todo)}, in {folder}/{already}")
    return todo


def _missing(plan: SweepPlan, have: set[str]) -> tuple[dict[PlannedFamily, int], int]:
    """Heads of each entry to be trained, and how many are there; a search finds what it has tried by itself."""
    draws, todo, there = plan.asked.draws, {}, 0
    for entry in plan.entries:
        if plan.asked.trials is not None and not entry.solved:
            todo[entry] = plan.asked.trials * plan.asked.seeds * len(draws)
            continue
        keys = [key for draw in draws for key in plan.wanted(entry, draw)[1]]
        todo[entry] = sum(key not in have for key in keys)
        there += len(keys) - todo[entry]
    return todo, there


def _work(plan: SweepPlan, todo: dict[PlannedFamily, int]) -> str:
    from featurecache.formatting import duration

    asked, busy = plan.asked, [entry for entry in plan.entries if todo[entry]]
    if asked.trials is not None:
        heads = _count(asked.seeds * len(asked.draws), "head")
        searched = _count(sum(not entry.solved for entry in plan.entries), "family", "families")
        words = f"{_count(asked.trials, 'trial')} of {heads} each for {searched}"
    else:
        words = f"{_count(sum(todo.values()), 'head')} in {_count(len(busy) * len(asked.draws), 'group')}"
    seconds = seconds_at_most(plan, todo)
    return words + (f", about {duration(seconds)} if none stops early" if seconds >= 1 else "")


def _about_draws(plan: SweepPlan) -> list[str]:
    asked, draw = plan.asked, plan.asked.draws[0]
    whole, *smaller = sorted(asked.fractions, reverse=True)
    first = plan.splits(0, whole, draw)
    lines = [f"splits     {split_line(first)} ({first.how})", *(f"warning    {words}" for words in first.warnings)]
    for fraction in smaller:
        own = f"{fraction:g} of train"
        lines += [f"warning    {words}" for words in plan.splits(0, fraction, draw).warnings if words.startswith(own)]
    if asked.repeats > 1 and asked.folds is None and not first.drawn:
        varies = "the fraction and the order of batches" if min(asked.fractions) < 1 else "the order of batches"
        lines.append(
            f"repeats    the splits are {first.how}, the same in all {asked.repeats}: only {varies} vary. "
            "--folds varies what is trained on and what is tested"
        )
    return lines


def _family_line(entry: PlannedFamily, choice: Selection, rows: Sequence[Row], select: str) -> str:
    title = "NLL" if select == "loss" else METRICS[select].title
    settings = [setting_of(row) for row in rows]
    varied = [n for n in choice.setting if len({str(each.get(n)) for each in settings}) > 1]
    words = ", ".join(f"{n.replace('_', ' ')} {_value(choice.setting[n])}{_edge(choice, n)}" for n in varied)
    heads = _count(len(choice.rows), "head")
    among = f", the best of {choice.tried} settings: {words}" if choice.tried > 1 else ""
    partly = f"; {choice.partly} settings with fewer draws or seeds are not compared" if choice.partly else ""
    failed = sum(row["failed"] is not None for row in rows)
    lost = f"; {failed} of {len(rows)} heads failed" if failed else ""
    return f"family     {entry}: val {title} {choice.value:.3f}; {heads}{among}{partly}{lost}"


def _edge(choice: Selection, name: str) -> str:
    return f" ({choice.ends[name]} tried)" if name in choice.ends else ""


def _count(number: int, word: str, several: str | None = None) -> str:
    return f"{number:,} {word if number == 1 else several or word + 's'}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def seconds_at_most(plan: SweepPlan, todo: dict[PlannedFamily, int]) -> float:
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


def _seconds_of_a_step(job: TrainingJob, together: int) -> float:
    rows = job.divided.rows("train")
    y = torch.from_numpy(job.task.labels[rows])
    loss, _ = loss_and_prior(job.task, y, job.settings)
    generators = [torch.Generator().manual_seed(k) for k in range(together)]
    models = [make_model(job, job.settings, g).to(job.settings.device) for g in generators]
    heads = engine.make_trainer(models, [loss] * together, generators, [job.settings] * together)
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
