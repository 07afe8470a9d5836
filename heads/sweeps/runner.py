"""Runner of a sweep: train what is missing, family by family, choose on val, write the chosen heads as runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.errors import ProtocolError, RunError, Stopped
from featurecache.files.records import canonical_json
from featurecache.formatting import counted, duration, work_bar
from heads.evaluation.controls import add_controls, measure_controls
from heads.evaluation.selection import Row, Selection, family_of, mean_of, select_setting, setting_of
from heads.models.common import FINETUNE
from heads.models.tokens import FixedVectorLinear
from heads.pixel_view import PixelView
from heads.runs.folder import seal_folder
from heads.runs.run import hash_of
from heads.runs.write import RunTarget, write_run
from heads.settings import METRICS, Settings
from heads.sweeps.folder import StagedRuns, run_at, slug
from heads.sweeps.grid import Range, Resplit
from heads.sweeps.journal import RECORD, ROWS, SEARCH, JournalFile, read_sweep_record
from heads.sweeps.plan import STEPPED, PlannedFamily, SweepPlan
from heads.sweeps.search import search
from heads.task import Say
from heads.training import engine
from heads.training.batches import loss_and_prior
from heads.training.job import TrainingJob, make_model, request_of, split_line
from heads.training.loop import Checkpoint
from heads.training.network import say_resumed, with_backbone
from heads.training.train import FittedHead, run_contents, train_together

SOLVED = 1.0  # seconds of a solved head, for the bar alone
GONE = "the order of its images or the form of keys is another. Another --out begins anew."


class SweepBar:
    """A bar that moves by steps, each as long as it takes, and an eta of what has happened so far.

    ``todo``: how many heads of a family are missing, ``seconds``: what one takes if it does not stop early. What one
    that did has left counts as done, so the pace of the bar, and its eta, are those of heads that stop early too."""

    def __init__(self, todo: dict[PlannedFamily, int], seconds: dict[PlannedFamily, float], progress: bool) -> None:
        self.seconds, self.done, self.heads = seconds, 0, sum(todo.values())
        self.bar = work_bar(sum(seconds[family] * count for family, count in todo.items()), "ablate", progress)
        self._count(0)

    @contextmanager
    def training(self, family: PlannedFamily, count: int) -> Iterator[Callable[[float], object]]:
        """While so many heads are trained together; what it gives takes the share of all their steps that was done."""
        whole, begin = self.seconds[family] * count, self.bar.n
        yield lambda share: self.bar.update(share * whole)
        self.bar.update(begin + whole - self.bar.n)
        self._count(count)

    def skip(self, family: PlannedFamily, count: int) -> None:
        """Heads that need no training."""
        self.bar.update(self.seconds[family] * count)
        self._count(count)

    def _count(self, heads: int) -> None:
        self.done += heads
        self.bar.set_postfix_str(f"{self.done:,} of {counted(self.heads, 'head')}", refresh=False)


class SweepRunner:
    """Trains the heads of a plan that are not in the journal, and writes the chosen ones."""

    def __init__(self, plan: SweepPlan, folder: Path, controls: bool | None, say: Say, progress: bool) -> None:
        self.plan, self.folder, self.say, self.progress = plan, folder, say, progress
        self.journal, self.staged = JournalFile(folder / ROWS), StagedRuns(folder)
        untrained = any(view.untrained for view in plan.matched.views)
        self.controls = untrained if controls is None else controls
        self._controls: list[dict[str, Any]] | None = None
        self.select = plan.spec.base.select

    def run(self) -> None:
        todo, seconds = say_plan(self.plan, self.folder, self.journal.rows, self.say)
        self.bar = SweepBar(todo, seconds, self.progress)
        with self.bar.bar:
            try:
                for family in self.plan.families:
                    if self.plan.spec.search and not family.solved:
                        self._search(family)
                    else:
                        self.train(family)
                    self.finish(family)
                for left in self.folder.glob(".network-*.checkpoint"):  # of settings that are asked for no more
                    left.unlink()
                # All that was asked is there: the rows, and what a search went through, are listed by their hashes.
                seal_folder(self.folder, RECORD, read_sweep_record(self.folder), (ROWS, SEARCH))
            except KeyboardInterrupt as error:
                done = len(self.journal.rows)
                safe = f"{counted(done, 'head')} {'is' if done == 1 else 'are'} safe"
                raise Stopped(f"stopped. {safe}; the same command continues.") from error

    def _search(self, family: PlannedFamily) -> None:
        """Trials of settings, each trained with every seed on every resplit, over which the criterion is averaged."""
        resplits = self.plan.spec.resplits
        heads = self.plan.spec.seeds * len(resplits)

        def train(variants: Sequence[dict[str, Any]]) -> list[float]:
            self.bar.skip(family, len(variants) * heads - self.train(family, variants))
            keys = [[key for r in resplits for key in self.plan.wanted(family, r, [v])[1]] for v in variants]
            return [mean_of([self.journal.by_key[key] for key in own], self.select) for own in keys]

        search(self.plan, family, self.folder, train)

    def train(self, family: PlannedFamily, variants: Sequence[dict[str, Any]] | None = None) -> int:
        """Every head of these settings that is not there yet, on every resplit; how many that were."""
        trained = 0
        for resplit in self.plan.spec.resplits:
            settings, keys = self.plan.wanted(family, resplit, variants)
            missing = [(s, key) for s, key in zip(settings, keys, strict=True) if key not in self.journal.by_key]
            for size in dict.fromkeys(s.batch_size for s, _ in missing):  # of other batches nothing is shared
                same = [pair for pair in missing if pair[0].batch_size == size]
                for start in range(0, len(same), family.together):
                    chunk = same[start : start + family.together]
                    self._train_set(self.plan.job(family, resplit, chunk[0][0]), family, resplit, chunk)
            trained += len(missing)
        return trained

    def _train_set(
        self, job: TrainingJob, family: PlannedFamily, resplit: Resplit, chunk: Sequence[tuple[Settings, str]],
        again: bool = False,
    ) -> None:  # fmt: skip
        """Heads that share their batches: staged first, then their rows at once (``again``: they are there). A network
        is kept after every epoch, too: it may take hours."""
        checkpoint, rows = None, []
        if isinstance(job.view, PixelView):
            ((settings, _),) = chunk
            request = hash_of(canonical_json(request_of(replace(job, settings=settings))))
            checkpoint = Checkpoint(self.folder / f".network-{request[:12]}.checkpoint")
            say_resumed(checkpoint, self._line)
        with nullcontext() if again else self.bar.training(family, len(chunk)) as advance:
            own = [settings for settings, _ in chunk]
            fits = train_together(job, own, checkpoint=checkpoint, progress=self.progress, advance=advance)
        for (settings, key), fit in zip(chunk, fits, strict=True):
            if isinstance(fit, FittedHead):
                # a budget of memory that was never reached has decided nothing, and is not written
                ram = self.plan.spec.base.ram if fit.window is None else fit.settings.ram
                contents = run_contents(job, replace(fit, settings=replace(fit.settings, ram=ram)), [])
                mark = {"key": key, "repeat": resplit.repeat, "family": list(family.identity)}
                self.staged.put(key, replace(contents, config=contents.config | {"sweep": mark}))
            asked = replace(settings, ram=self.plan.spec.base.ram).to_dict()
            place = {"view": family.view, "fingerprint": job.view.fingerprint, "output": job.output}
            drawn = {"fraction": family.fraction, "repeat": resplit.repeat, "fold": resplit.fold}
            rows.append({"key": key, **place, "head": family.head, **drawn, "settings": asked, **_measured(fit)})
        if not again:
            self.journal.append(rows)
        if checkpoint:
            checkpoint.remove()

    def finish(self, family: PlannedFamily) -> None:
        """Choose the setting of a family, write its heads as runs, and say so."""
        rows = [row for row in self.journal.rows if family_of(row) == family.identity]
        choice = select_setting(rows, self.select)
        if choice is None:
            failed = next((row["failed"] for row in rows if row["failed"]), "no measure on val is defined")
            self._line(f"warning    {family}: no setting worked on every draw; {failed}")
            return
        for row in choice.rows:
            self._keep(family, row)
        self.staged.clear(row["key"] for row in rows)
        self._line(_family_line(family, choice, rows, self.select))

    def _keep(self, family: PlannedFamily, row: Row) -> None:
        """The run folder of a chosen head, unless it is there."""
        path, resplit = self.folder / "heads" / slug(row), Resplit(row["repeat"], row["fold"])
        there = run_at(path)
        if there and there.config.get("sweep", {}).get("key") == row["key"]:
            if not there.metrics["controls"] and (controls := self._controls_for(family, resplit)):
                add_controls(there, controls)
            return
        splits, began = self.plan.spec.base.splits, read_sweep_record(self.folder)["ram"]
        # the whole set that it was trained in, as alone it would differ in the last digits, and within the same memory
        rows = self.journal.together_with(row["key"])
        settings = [Settings.from_dict(each["settings"]) for each in rows]
        settings = [replace(each, ram=began if each.ram is None else each.ram, splits=splits) for each in settings]
        job = self.plan.job(family, resplit, settings[row["together"][0]])
        contents = self.staged.take(row["key"], job)
        if contents is None:
            if self.plan.keys(family, resplit, settings) != [each["key"] for each in rows]:
                raise RunError(f"{path} is lost, and what it was trained on is no longer there as it was: {GONE}")
            chunk = [(own, each["key"]) for own, each in zip(settings, rows, strict=True)]
            self._train_set(job, family, resplit, chunk, again=True)
            contents = self.staged.take(row["key"], job)
        assert contents is not None, "it was just put there"
        if family.head.startswith(FINETUNE):
            tuned = make_model(job, job.settings).eval()  # a network that is none of the run's is needed no more
            tuned.load_state_dict(contents.tensors)
            contents = with_backbone(contents, tuned)
        contents = replace(contents, metrics=contents.metrics | {"controls": self._controls_for(family, resplit)})
        write_run(RunTarget(path, replace=True), contents)

    def _controls_for(self, family: PlannedFamily, resplit: Resplit) -> list[dict[str, Any]]:
        """The controls, once: on the first resplit with the most images. They look at pixels, so at no view."""
        plan = self.plan
        if not self.controls or resplit != plan.spec.resplits[0] or family.fraction < max(plan.spec.fractions):
            return []
        if self._controls is None:
            splits = plan.splits(0, family.fraction, resplit)
            self._controls = measure_controls(plan.matched.views[0], plan.task, splits, self._line, self.progress)
        return self._controls

    def _line(self, line: str) -> None:
        self.bar.bar.clear()
        self.say(line)
        self.bar.bar.refresh()


def _measured(fit: FittedHead | ProtocolError) -> Row:
    """What a row says of a training beside what it was of."""
    if isinstance(fit, ProtocolError):
        nothing = dict.fromkeys(("epoch", "val", "test", "parameters", "ms_per_image"))
        return {**nothing, "failed": str(fit), "notes": [], "seconds": 0.0}
    measures = {
        split: {m: float(v) for m in METRICS if isinstance(v := fit.metrics[split].get(m), int | float | np.number)}
        for split in ("val", "test")
    }
    return {
        "epoch": fit.epoch, **measures, "parameters": fit.parameters, "ms_per_image": fit.ms_per_image,
        "failed": None, "notes": list(fit.notes), "seconds": float(fit.seconds),
    }  # fmt: skip


def say_plan(
    plan: SweepPlan, folder: Path, rows: Sequence[Row], say: Say, whole: bool = False
) -> tuple[dict[PlannedFamily, int], dict[PlannedFamily, float]]:
    """The plan in a line or two; ``whole``: a line for each family. Returns how many heads of each are missing, and
    what one takes (`seconds_of_a_head`)."""
    have, resplits, todo, there = {row["key"] for row in rows}, plan.spec.resplits, {}, 0
    for family in plan.families:
        if plan.spec.trials is not None and not family.solved:  # a search finds what it has tried by itself
            todo[family] = plan.spec.trials * plan.spec.seeds * len(resplits)
            continue
        keys = [key for resplit in resplits for key in plan.wanted(family, resplit)[1]]
        todo[family] = sum(key not in have for key in keys)
        there += len(keys) - todo[family]
    for sentence in plan.left_out:
        say(f"left out   {sentence}: they do not fit")
    if plan.matched.left_out:
        verb = "is" if plan.matched.left_out == 1 else "are"
        say(f"images     {plan.matched.left_out:,} that not every view holds {verb} left out of all")
    for line in _split_lines(plan):
        say(line)
    for family in plan.families if whole else ():
        say(f"family     {family}: {counted(todo[family], 'head')}")
    already = f"; {there:,} {'is' if there == 1 else 'are'} there already" if there else ""
    seconds = seconds_of_a_head(plan, todo)
    say(f"plan       {_work(plan, todo, seconds)}, in {folder}/{already}")
    return todo, seconds


def _work(plan: SweepPlan, todo: dict[PlannedFamily, int], each: dict[PlannedFamily, float]) -> str:
    spec, busy = plan.spec, [family for family in plan.families if todo[family]]
    if spec.trials is not None:
        heads, searched = counted(spec.seeds * len(spec.resplits), "head"), sum(not f.solved for f in plan.families)
        each_for = "1 family" if searched == 1 else f"{searched:,} families"
        text = f"{counted(spec.trials, 'trial')} of {heads} each for {each_for}"
    else:
        text = f"{counted(sum(todo.values()), 'head')} in {counted(len(busy) * len(spec.resplits), 'group')}"
    seconds = sum(each[family] * count for family, count in todo.items() if not family.solved)
    return text + (f", about {duration(seconds)} if none stops early" if seconds >= 1 else "")


def _split_lines(plan: SweepPlan) -> list[str]:
    spec, resplit = plan.spec, plan.spec.resplits[0]
    whole, *smaller = sorted(spec.fractions, reverse=True)
    first = plan.splits(0, whole, resplit)
    lines = [f"splits     {split_line(first)} ({first.how})", *(f"warning    {text}" for text in first.warnings)]
    for fraction in smaller:
        own = f"{fraction:g} of train"
        lines += [f"warning    {t}" for t in plan.splits(0, fraction, resplit).warnings if t.startswith(own)]
    if spec.repeats > 1 and spec.folds is None and not first.drawn:
        varies = "the fraction and the order of batches" if min(spec.fractions) < 1 else "the order of batches"
        lines.append(
            f"repeats    the splits are {first.how}, the same in all {spec.repeats}: only {varies} vary. "
            "--folds varies what is trained on and what is tested"
        )
    return lines


def _family_line(family: PlannedFamily, choice: Selection, rows: Sequence[Row], select: str) -> str:
    title = "NLL" if select == "loss" else METRICS[select].title
    settings = [setting_of(row) for row in rows]
    varied = [n for n in choice.setting if len({str(each.get(n)) for each in settings}) > 1]
    ends = {name: f" ({end} tried)" for name, end in choice.ends.items()}
    text = ", ".join(f"{n.replace('_', ' ')} {_value_text(choice.setting[n])}{ends.get(n, '')}" for n in varied)
    among = f", the best of {choice.tried} settings: {text}" if choice.tried > 1 else ""
    few, verb = choice.incomplete, "is" if choice.incomplete == 1 else "are"
    partly = f"; {counted(few, 'setting')} with other draws or seeds {verb} not compared" if few else ""
    failed = sum(row["failed"] is not None for row in rows)
    lost = f"; {failed} of {counted(len(rows), 'head')} failed" if failed else ""
    heads = counted(len(choice.rows), "head")
    return f"family     {family}: val {title} {choice.value:.3f}; {heads}{among}{partly}{lost}"


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def seconds_of_a_head(plan: SweepPlan, todo: dict[PlannedFamily, int]) -> dict[PlannedFamily, float]:
    """Seconds if a head does not stop early, from the time of two steps of each kind; ``todo``: heads to train. The
    reading of features is not in it; of a solved head nothing is known before: ``SOLVED``."""
    speed: dict[Any, float] = {}
    seconds = dict.fromkeys(todo, SOLVED)
    for family, count in todo.items():
        if family.solved or not count:
            continue
        job = plan.job(family, plan.spec.resplits[0])
        kind = (family.number, family.output, family.head)
        together = min(family.together, count) if family.head in STEPPED else 1
        if kind not in speed:
            speed[kind] = _seconds_of_a_step(job, together) / together
        batches = math.ceil(len(job.splits.rows("train")) / job.settings.batch_size)
        epochs = plan.spec.grid.get("epochs", (job.settings.epochs,))
        middle = (epochs.low + epochs.high) / 2 if isinstance(epochs, Range) else sum(epochs) / len(epochs)
        seconds[family] = speed[kind] * batches * middle
    return seconds


def _seconds_of_a_step(job: TrainingJob, together: int) -> float:
    rows = job.splits.rows("train")
    y = torch.from_numpy(job.task.labels[rows])
    loss, _ = loss_and_prior(job.task, y, job.settings)
    generators = [torch.Generator().manual_seed(k) for k in range(together)]
    models = [make_model(job, job.settings, g).to(job.settings.device) for g in generators]
    settings = [job.settings] * together
    heads = engine.make_trainer(models, [loss] * together, generators, settings)
    size = min(job.settings.batch_size, len(rows))
    x, y = torch.full((size, *job.input.shape), 0.1).to(job.settings.device), y.to(job.settings.device)
    if isinstance(models[0], FixedVectorLinear):
        x = models[0].vectors(x)
    work = engine.work_of_a_step(models[0], settings, job.input.shape)
    with engine.arithmetic_for(math.inf if isinstance(job.view, PixelView) else work, job.settings.device):
        heads.step(x, y[:size])
        begin = time.perf_counter()
        heads.step(x, y[:size])
        heads.step(x, y[:size])
    return (time.perf_counter() - begin) / 2
