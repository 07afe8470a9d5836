"""What a sweep trains; what is already there by key.

What a sweep trains, before it trains: the heads that fit the outputs, the settings, the draws of splits.

An *entry* is one line of the table in the end: (view, output, head, fraction). For each entry every *draw* (repeat,
fold) is trained with every setting and seed; what shares an entry and a draw shares its batches.

What a trained head is known by: hashes of words, of the images of a job, of code.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from heads.alignment import AlignedViews, same_images
from heads.models.catalogue import HEADS, baseline_info, has_dropout, head_info, make_head
from heads.models.common import Input
from heads.pixel_view import PixelView
from heads.runs.run import hash_of, name_of
from heads.settings import OF_BASELINES, OF_FINETUNE, VARIED, Settings, is_network
from heads.splits import Splits
from heads.sweeps import grid
from heads.sweeps.grid import Resplit, SweepSpec
from heads.task import task_of
from heads.training.job import TrainingJob, choose_output, images_of, memory_plan, prepare, splits_for

if TYPE_CHECKING:
    from heads.task import FeatureView

FORMAT = 1  # of the keys
STEPPED = ("linear", "mlp")  # heads whose steps are one product for all of them
TOGETHER, TOGETHER_STACKED = 16, 128  # heads in one training; what a kill can cost
OF_STEPS = (*VARIED, "epochs", "batch_size", "precision", "pos_weight", "gated")  # nothing to a solved head
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
    def family(self) -> tuple[str, str, str, float]:
        return self.view, self.output, self.head, self.fraction

    @property
    def solved(self) -> bool:
        return head_info(self.head).solved

    def __str__(self) -> str:
        part = f", {self.fraction * 100:.4g} % of train" if self.fraction < 1 else ""
        if is_network(self.head):
            return f"{name_of(self.head, self.output)}{part}"
        return f"{self.view} {self.output} {self.head}{part}"


@dataclass
class SweepPlan:
    """A sweep that can begin: everything the user can have mistaken is checked."""

    asked: SweepSpec
    matched: AlignedViews
    entries: list[PlannedFamily]
    left_out: list[str]  # of each view the heads and outputs that do not fit
    ram: float  # GB
    _splits: dict[Any, Splits] = field(default_factory=dict)
    _images: dict[Any, str] = field(default_factory=dict)
    _keys: dict[Any, list[str]] = field(default_factory=dict)

    def splits(self, number: int, fraction: float, draw: Resplit) -> Splits:
        """Drawn once, on the first view, and carried over to the others by image."""
        key = (fraction, draw)
        if key not in self._splits:
            first, base = self.matched.views[0], self._settings(fraction, draw)
            task = task_of(first, classes=base.classes, only=base.only, positive=base.positive)
            self._splits[key] = splits_for(first, self.matched.common_task(task), base)
        if (number, key) not in self._splits:
            self._splits[number, key] = self.matched.carried(self._splits[key], number)
        return self._splits[number, key]

    def _settings(self, fraction: float, draw: Resplit) -> Settings:
        base = self.asked.base
        return replace(
            base, split_seed=base.split_seed + draw.repeat, fraction=fraction, folds=self.asked.folds, fold=draw.fold,
            ram=self.ram,
        )  # fmt: skip

    def settings(
        self, entry: PlannedFamily, draw: Resplit, values: dict[str, Any] | None = None, seed: int = 0
    ) -> Settings:
        """Of one head, without the options that are nothing to it: a solved head takes none about steps."""
        shared, asked = self._settings(entry.fraction, draw), self.asked
        published = _published(entry.head, asked.base)
        own = {name: value for name, value in published.items() if name not in asked.given}
        record = {**vars(shared), **own, **(values or {}), "head": entry.head, "output": entry.output, "seed": seed}
        needless = [name for name in ("dropout", "gated", *OF_BASELINES) if not has_option(entry.head, name)]
        needless += OF_STEPS if entry.solved else []
        plain = Settings(entry.head)
        return Settings(**record | {name: getattr(plain, name) for name in needless})

    def heads(
        self, entry: PlannedFamily, draw: Resplit, variants: Sequence[dict[str, Any]] | None = None
    ) -> list[Settings]:
        """Every setting (``variants``: the grid unless said otherwise) with every seed; a solved head has neither."""
        if entry.solved:
            return [self.settings(entry, draw)]
        variants = self.asked.variants() if variants is None else variants
        each = [self.settings(entry, draw, values, seed) for values in variants for seed in range(self.asked.seeds)]
        return list(dict.fromkeys(each))

    def wanted(
        self, entry: PlannedFamily, draw: Resplit, variants: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[Settings], list[str]]:
        """The heads of an entry on one draw, with their keys."""
        settings = self.heads(entry, draw, variants)
        place = (entry, draw, tuple(settings))
        if place not in self._keys:
            self._keys[place] = self.keys(self.job(entry, draw), entry, draw, settings)
        return settings, self._keys[place]

    def job(self, entry: PlannedFamily, draw: Resplit, settings: Settings | None = None) -> TrainingJob:
        """``settings``: those of a head that was asked for before."""
        wanted = settings or self.heads(entry, draw, [self.first_values])[0]
        view = self.matched.views[entry.number]
        return prepare(view, replace(wanted, ram=self.ram), self.splits(entry.number, entry.fraction, draw))

    @property
    def first_values(self) -> dict[str, Any]:
        """One value of everything that is varied, to check the others with."""
        return {n: v.low if isinstance(v, grid.Range) else v[0] for n, v in self.asked.grid.items()}

    def keys(self, job: TrainingJob, entry: PlannedFamily, draw: Resplit, settings: Sequence[Settings]) -> list[str]:
        """One word for everything that decides a row: never a path, a date or a count of threads."""
        place = (entry.number, entry.fraction, draw)
        if place not in self._images:
            self._images[place] = images_of(job)
        shared = {
            "format": FORMAT, "fingerprint": job.view.fingerprint, "output": job.output, "images": self._images[place],
            "window": memory_plan(job)[1], "code": source_hash(entry.head),
            "standardize": job.settings.standardize or head_info(entry.head).standardize,
        }  # fmt: skip
        own = [{k: v for k, v in each.to_dict().items() if k not in NOT_IN_KEY} for each in settings]
        return [hash_of(canonical_json(shared | {"settings": record})) for record in own]

    def chunk(self, entry: PlannedFamily) -> int:
        """How many heads are trained together, at most; of networks from pixels one, which is what memory holds."""
        if is_network(entry.head):
            return 1
        return TOGETHER_STACKED if entry.head in STEPPED else TOGETHER


def has_option(head: str, option: str) -> bool:
    if option in OF_BASELINES:
        return is_network(head) and (option not in OF_FINETUNE or head.startswith("finetune:"))
    if is_network(head):
        return option == "dropout" and has_dropout(head)
    info = head_info(head)
    return not info.solved and option in inspect.signature(info.make).parameters


def _published(head: str, base: Settings) -> dict[str, Any]:
    """The published settings of a baseline, but for what all heads of a sweep are judged by."""
    if not is_network(head):
        return {}
    info = baseline_info(head, weights=base.weights, adapted=base.lora is not None or base.rlrr)
    return {name: value for name, value in info.settings.items() if name != "select"}


def make_plan(views: Sequence[FeatureView], asked: SweepSpec, ram: float) -> SweepPlan:
    """Check everything and draw the splits; raises before anything is trained or written."""
    matched = same_images(_each_once(views))
    entries, left_out = _entries(matched.views, asked)
    plan = SweepPlan(asked, matched, entries, left_out, ram)
    plain = Settings("")
    wanted = [name for name in ("gated", *OF_BASELINES) if getattr(asked.base, name) != getattr(plain, name)]
    wanted += [name for name in ("dropout", "augment") if asked.grid.get(name) not in (None, (0.0,), (None,))]
    for name in wanted:
        if not any(has_option(head, name) for head in asked.heads):
            option = name.replace("_", "-")
            raise BadOption(f"--{option} would do nothing: none of --heads {','.join(asked.heads)} has it.")
    for entry in entries:
        plan.job(entry, asked.draws[0])
    for draw in asked.draws[1:]:
        for fraction in asked.fractions:
            plan.splits(0, fraction, draw)
    return plan


def _each_once(views: Sequence[FeatureView]) -> list[FeatureView]:
    found: dict[str, FeatureView] = {}
    for view in views:
        same = found.setdefault(view.fingerprint, view)
        if str(same.path) != str(view.path):
            raise BadOption(f"--features {same.label} and {view.label} are of one store: the same features twice.")
    return list(found.values())


def _entries(views: Sequence[FeatureView], asked: SweepSpec) -> tuple[list[PlannedFamily], list[str]]:
    """Each head on those of the outputs that fit it; raises BadOption for a head that fits none of a view's."""
    entries, left_out = [], []
    for number, view in enumerate(views):
        unfit = []
        for head in asked.heads:
            if isinstance(view, PixelView) or is_network(head):
                if isinstance(view, PixelView) and head in view.baselines:
                    entries += [PlannedFamily(number, view.label, view.output, head, part) for part in asked.fractions]
                continue
            outputs = asked.outputs or (choose_output(view, head, None),)
            reasons = {output: _why_not(view, head, output, asked) for output in outputs}
            if all(reasons.values()):
                raise BadOption(f"{head} fits none of --outputs {', '.join(outputs)}: {next(iter(reasons.values()))}")
            if any(reasons.values()):
                unfit.append(f"{head} on {', '.join(output for output, reason in reasons.items() if reason)}")
            for output in (output for output, reason in reasons.items() if not reason):
                entries += [PlannedFamily(number, view.label, output, head, fraction) for fraction in asked.fractions]
        left_out += [f"{view.label}: {'; '.join(unfit)}"] if unfit else []
    return entries, left_out


def _why_not(view: FeatureView, head: str, output: str, asked: SweepSpec) -> str | None:
    choose_output(view, head, output)  # raises where the view has no such output
    info = view.info(output)
    fits = Input(tuple(info.shape), tuple(info.prefix or ()), info.grid)
    try:
        with torch.device("meta" if head in HEADS else "cpu"):
            make_head(head, fits, 2, gated=asked.base.gated and has_option(head, "gated"))
    except BadOption as error:
        return str(error)
    return None


def source_hash(head: str) -> str | None:
    """A hash of the module of a head of one's own."""
    if not head.startswith("python:"):
        return None
    import sys

    return hash_of(inspect.getsource(sys.modules[head_info(head).make.__module__]))
