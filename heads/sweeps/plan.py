"""Plan of a sweep: the heads that fit the outputs, their settings, the splits drawn, and the key of every head.

A *planned family* is one line of the table in the end: (view, output, head, fraction). For each of them every *resplit*
(repeat, fold) is trained with every setting and seed; what shares both shares its batches. A *key* is a hash of
everything that decides a row: what has one in the journal is not trained again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from featurecache.formatting import exact_number, shell_words
from heads.alignment import AlignedViews, same_images
from heads.models.catalogue import HEADS, has_dropout, head_info, is_baseline, make_head, own_settings, standardization
from heads.models.common import Input
from heads.pixel_view import PixelView
from heads.runs.run import hash_of, is_of_pixels, name_of, option_words, source_words, view_word
from heads.settings import OF_STEPS, Settings, flag, options_for
from heads.splits import Splits, choose_splits
from heads.sweeps.grid import Range, Resplit, SweepSpec
from heads.task import FeatureView, Task, task_of
from heads.training.job import (
    TrainingJob,
    check_options,
    choose_output,
    code_hash,
    memory_plan,
    prepare_training,
    training_images_hash,
)

FORMAT = 1  # of the keys
STEPPED = ("linear", "mlp")  # heads whose steps are one product for all of them
TOGETHER, TOGETHER_STACKED = 16, 128  # heads in one training; what a kill can cost
FROM_PIXELS = options_for("network", "finetune")
# What a key says in another way (the images with their labels and splits, the window), or what decides nothing.
NOT_IN_KEY = ("splits", "ram", "device", "output", "classes", "only", "positive", "standardize")


@dataclass(frozen=True)
class PlannedFamily:
    """A family to be: ``number`` is the view's."""

    number: int
    view: str
    output: str
    head: str
    fraction: float

    @property
    def identity(self) -> tuple[str, str, str, float]:
        return self.view, self.output, self.head, self.fraction

    @property
    def solved(self) -> bool:
        return head_info(self.head).solved

    @property
    def together(self) -> int:
        """How many heads are trained together, at most; of networks from pixels one, which is what memory holds."""
        return 1 if is_baseline(self.head) else TOGETHER_STACKED if self.head in STEPPED else TOGETHER

    def __str__(self) -> str:
        return family_text(*self.identity)


def family_text(view: str, output: str, head: str, fraction: float) -> str:
    """A family in words."""
    part = f", {fraction * 100:.4g} % of train" if fraction < 1 else ""
    return f"{name_of(head, output) if is_of_pixels(output) else f'{view} {output} {head}'}{part}"


@dataclass
class SweepPlan:
    """A sweep that can begin: everything the user can have mistaken is checked."""

    spec: SweepSpec
    matched: AlignedViews
    families: list[PlannedFamily]
    left_out: list[str]  # of each view the heads and outputs that do not fit
    ram: float  # GB
    _splits: dict[Any, Splits] = field(default_factory=dict)
    _images: dict[Any, str] = field(default_factory=dict)
    _keys: dict[Any, list[str]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """Of the first view, without the images that another lacks."""
        base, rows = self.spec.base, self.matched.rows[0]
        own = task_of(self.matched.views[0], classes=base.classes, only=base.only, positive=base.positive)
        labels = np.full_like(own.labels, np.nan if own.multilabel else -1)
        labels[rows] = own.labels[rows]
        return replace(own, labels=labels)

    def splits(self, number: int, fraction: float, resplit: Resplit) -> Splits:
        """Drawn once, on the first view, and carried over to the others by image."""
        place = (fraction, resplit)
        if place not in self._splits:
            self._splits[place] = choose_splits(self.matched.views[0], self.task, self._settings(fraction, resplit))
        if (number, place) not in self._splits:
            first, rows = self._splits[place], self.matched.rows
            names = np.full(len(self.matched.views[number].ids), "", dtype=first.names.dtype)
            names[rows[number]] = first.names[rows[0]]
            self._splits[number, place] = replace(first, names=names)
        return self._splits[number, place]

    def _settings(self, fraction: float, resplit: Resplit) -> Settings:
        base = self.spec.base
        return replace(
            base, split_seed=base.split_seed + resplit.repeat, fraction=fraction, folds=self.spec.folds,
            fold=resplit.fold, ram=self.ram,
        )  # fmt: skip

    def heads(
        self, family: PlannedFamily, resplit: Resplit, variants: Sequence[dict[str, Any]] | None = None
    ) -> list[Settings]:
        """Every setting (``variants``: the grid unless said otherwise) with every seed, without the options that are
        nothing to the head; a solved one has one setting, and takes no option about steps."""
        spec, plain = self.spec, Settings(family.head)
        needless = [name for name in ("dropout", "gated", *FROM_PIXELS) if not has_option(family.head, name)]
        if family.solved:
            needless, variants, seeds = [*needless, *OF_STEPS], [{}], 1
        else:
            variants, seeds = spec.variants() if variants is None else variants, spec.seeds
        shared = dict(vars(self._settings(family.fraction, resplit)))
        adapted = spec.base.lora is not None or spec.base.rlrr
        of_head = own_settings(family.head, weights=spec.base.weights, adapted=adapted)
        shared |= {k: v for k, v in of_head.items() if k not in (*spec.given, "select")}  # by which all are judged
        own = {"head": family.head, "output": family.output}
        nothing = {name: getattr(plain, name) for name in needless}
        each = [shared | values | own | {"seed": seed} | nothing for values in variants for seed in range(seeds)]
        return list(dict.fromkeys(Settings(**record) for record in each))

    def wanted(
        self, family: PlannedFamily, resplit: Resplit, variants: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[Settings], list[str]]:
        """The heads of a family on one resplit, with their keys: one word for everything that decides a row, never a
        path, a date or a count of threads."""
        settings = self.heads(family, resplit, variants)
        return settings, self.keys(family, resplit, settings)

    def keys(self, family: PlannedFamily, resplit: Resplit, settings: Sequence[Settings]) -> list[str]:
        place = (family, resplit, tuple(settings))
        if place not in self._keys:
            job, drawn = self.job(family, resplit), (family.number, family.fraction, resplit)
            if drawn not in self._images:
                self._images[drawn] = training_images_hash(job)
            shared = {
                "format": FORMAT, "fingerprint": job.view.fingerprint, "output": job.output,
                "images": self._images[drawn], "code": code_hash(family.head),
                "standardize": standardization(job.settings),
            }  # fmt: skip
            by_size = {(each.batch_size, each.ram): each for each in settings}
            windows = {size: memory_plan(replace(job, settings=each))[1] for size, each in by_size.items()}
            own = [{k: v for k, v in each.to_dict().items() if k not in NOT_IN_KEY} for each in settings]
            sizes = [windows[each.batch_size, each.ram] for each in settings]
            records = [shared | {"settings": e, "window": size} for e, size in zip(own, sizes, strict=True)]
            self._keys[place] = [hash_of(canonical_json(record)) for record in records]
        return self._keys[place]

    def job(self, family: PlannedFamily, resplit: Resplit, settings: Settings | None = None) -> TrainingJob:
        """``settings``: those of a head that was trained before; else the first of the grid."""
        first = {name: v.low if isinstance(v, Range) else v[0] for name, v in self.spec.grid.items()}
        settings = settings or self.heads(family, resplit, [first])[0]
        splits = self.splits(family.number, family.fraction, resplit)
        return prepare_training(self.matched.views[family.number], settings, splits)

    def command(self, folder: Path) -> str:
        """The command line that asks for this sweep."""
        spec, views = self.spec, self.matched.views
        numbers = dict.fromkeys(f.number for f in self.families if not is_baseline(f.head))
        features = ",".join(view_word(views[number].label, views[number].path) for number in numbers)
        options = {"heads": ",".join(spec.heads), "features": features, "outputs": ",".join(spec.outputs)}
        options |= {name: _values_text(values) for name, values in spec.grid.items() if name != "augment"}
        options |= {"seeds": str(spec.seeds) if spec.seeds > 1 else ""}
        options |= {"fractions": _values_text(spec.fractions) if spec.fractions != (1.0,) else ""}
        options |= {"repeats": str(spec.repeats) if spec.repeats > 1 else "", "folds": str(spec.folds or "")}
        options |= {"search": spec.search or "", "trials": str(spec.trials or "")}
        words = [word for name, value in options.items() if value for word in (flag(name), value)]
        words += [] if features else source_words(views[0].source)
        words += [word for each in spec.grid.get("augment", ()) for word in ("--augment", each or "none")]
        return f"featurecache ablate {shell_words([*words, *option_words(spec.base.to_dict()), '--out', str(folder)])}"


def _values_text(values: Any) -> str:
    if isinstance(values, Range):
        return str(values)
    return ",".join(value if isinstance(value, str) else exact_number(value) for value in values)


def has_option(head: str, option: str) -> bool:
    """Whether an option that not every head has means something to this one."""
    if option in FROM_PIXELS:
        return is_baseline(head) and (option in options_for("network") or head.startswith("finetune:"))
    if is_baseline(head):
        return option == "dropout" and has_dropout(head)
    info = head_info(head)
    return not info.solved and option in inspect.signature(info.make).parameters


def plan_sweep(views: Sequence[FeatureView], spec: SweepSpec, ram: float) -> SweepPlan:
    """Check everything and draw the splits; raises before anything is trained or written."""
    by_fingerprint: dict[str, FeatureView] = {}
    for view in views:
        same = by_fingerprint.setdefault(view.fingerprint, view)
        if str(same.path) != str(view.path):
            raise BadOption(f"--features {same.label} and {view.label} are of one store: the same features twice.")
    matched = same_images(list(by_fingerprint.values()))
    families, left_out = _families(matched.views, spec)
    plan = SweepPlan(spec, matched, families, left_out, ram)
    plain = Settings("")
    wanted = [name for name in ("gated", *FROM_PIXELS) if getattr(spec.base, name) != getattr(plain, name)]
    wanted += [name for name in ("dropout", "augment") if spec.grid.get(name) not in (None, (0.0,), (None,))]
    for name in wanted:
        if not any(has_option(head, name) for head in spec.heads):
            raise BadOption(f"{flag(name)} would do nothing: none of --heads {','.join(spec.heads)} has it.")
    for family in families:
        job = plan.job(family, spec.resplits[0])
        for optimizer in spec.grid.get("optimizer", ()) if not family.solved else ():
            check_options(replace(job.settings, optimizer=optimizer))
    for resplit in spec.resplits[1:]:
        for fraction in spec.fractions:
            plan.splits(0, fraction, resplit)
    return plan


def _families(views: Sequence[FeatureView], spec: SweepSpec) -> tuple[list[PlannedFamily], list[str]]:
    """Each head on those of the outputs that fit it; raises BadOption for a head that fits none of a view's."""
    families, left_out = [], []
    for number, view in enumerate(views):
        unfit = []
        for head in spec.heads:
            if isinstance(view, PixelView) or is_baseline(head):
                outputs = [view.output] if isinstance(view, PixelView) and head in view.baselines else []
            else:
                reasons = {o: _why_not(view, head, o, spec) for o in spec.outputs or (choose_output(view, head, None),)}
                outputs = [output for output, reason in reasons.items() if not reason]
                if not outputs:
                    why = next(iter(reasons.values()))
                    raise BadOption(f"{head} fits none of --outputs {', '.join(reasons)}: {why}")
                if len(outputs) < len(reasons):
                    unfit.append(f"{head} on {', '.join(output for output, reason in reasons.items() if reason)}")
            families += [PlannedFamily(number, view.label, o, head, part) for o in outputs for part in spec.fractions]
        left_out += [f"{view.label}: {'; '.join(unfit)}"] if unfit else []
    return families, left_out


def _why_not(view: FeatureView, head: str, output: str, spec: SweepSpec) -> str | None:
    choose_output(view, head, output)  # raises where the view has no such output
    try:
        with torch.device("meta" if head in HEADS else "cpu"):
            fits = Input.of(view.info(output))
            make_head(head, fits, 2, gated=spec.base.gated and has_option(head, "gated"))
    except BadOption as error:
        return str(error)
    return None
