"""Study as data: sets of images, questions with published numbers, and steps in their order.

Published studies are run again from such a recipe, in a folder:

    studies/<name>/
      study.json         its options and images
      steps.jsonl        of every finished step: its call, what it made, how long it took
      runs/<step>/       the run of a network, the sweep of heads, or pictures
      splits-<part>.csv  where the study has splits of its own
      few/ drawn/        the images of --quick
      report.html        the page; <part>/metrics.csv and metrics.json beside it

Its steps are calls of public functions: `featurecache.prepare`, `heads.ablate`, `heads.train_baseline`,
`heads.explain`, each resumable by itself. The same command goes on where it was stopped; with other options the folder
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset


@dataclass(frozen=True)
class PublishedNumber:
    """One number as it was reported, and the step of ours that it stands beside."""

    what: str
    measure: str  # of heads.settings.METRICS, "train_seconds" or "ms_per_image"
    value: float  # of measures a fraction
    ours: str = ""  # the name of a step; "": we have none like it
    head: str = ""  # of that step, where it trains several
    split: str = "test"
    remark: str = ""  # what it was measured on, where that is not the whole of test
    source: str = ""  # "": the study's own


@dataclass(frozen=True)
class ImageSet:
    """A set of images. ``classes`` are those that ``--quick`` draws where no images are given."""

    name: str
    source: str  # what is fetched, or looked for, without --data
    classes: tuple[str, ...]
    task: str | None = None
    aliases: tuple[str, ...] = ()  # what its file or folder is called, in a folder given with --data
    local: str = "{path}"  # how --data is spelt for what lies there; {folder}: that it lies in
    columns: dict[str, str] | None = None  # of `featurecache.open_source`
    default: bool = True  # whether it is part of the study when nothing is given


@dataclass(frozen=True)
class Question:
    """One question with one table: a set of images, a task on it, and what all steps on it have in common."""

    name: str
    title: str
    images: str
    select: str = "auroc"
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.settings.Settings`
    splits: Callable[[Dataset], np.ndarray | None] = lambda _: None  # [N] split names; None: the protocol's
    published: tuple[PublishedNumber, ...] = ()
    reference: str = ""  # the step that the others are compared with, paired
    note: str = ""


@dataclass(frozen=True)
class Extract:
    """Features of a set of images, from a frozen backbone. ``untrained``: always with random weights, as a control."""

    name: str
    images: str
    backbone: str
    outputs: str
    untrained: bool = False


@dataclass(frozen=True)
class Heads:
    """A sweep of heads on the features of one or several `Extract` steps."""

    name: str
    question: str
    features: tuple[str, ...]
    heads: str
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.ablate`


@dataclass(frozen=True)
class Network:
    """A network that is trained from pixels: a baseline, or ``finetune:<backbone>``."""

    name: str
    question: str
    arch: str
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.train_baseline`


@dataclass(frozen=True)
class ExplainStep:
    """Maps of where networks look, on a few images of test: Grad-CAM of those of ``of`` (Network steps), attention of
    those of them with a class token and, where named, of the frozen backbone whose features (``backbone``, an Extract
    step) the Heads step ``attention`` was trained on."""

    name: str
    question: str
    of: tuple[str, ...]
    attention: str = ""
    backbone: str = ""
    images: int = 4


Step = Extract | Heads | Network | ExplainStep


@dataclass(frozen=True)
class Study:
    """A study. ``differs``: what the published protocol did that this one does not, a sentence each."""

    name: str
    title: str
    question: str  # that it answers, in a line
    source: str
    about: tuple[str, ...]
    images: tuple[ImageSet, ...]
    questions: tuple[Question, ...]
    steps: tuple[Step, ...]
    differs: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    figures: str = ""  # a function of heads.studies.page for charts of its own

    def question_of(self, step: Step) -> Question | None:
        """None of features, which belong to all questions on their images."""
        return None if isinstance(step, Extract) else next(q for q in self.questions if q.name == step.question)

    def set_of(self, step: Step) -> str:
        """The name of the set of images that a step is about."""
        question = self.question_of(step)
        return question.images if question else getattr(step, "images", "")

    def needs(self, step: Step) -> tuple[str, ...]:
        """Steps that must be finished before ``step``."""
        if isinstance(step, ExplainStep):
            return (*step.of, *([step.attention] if step.attention else []))
        return step.features if isinstance(step, Heads) else ()


@dataclass(frozen=True)
class OpenedSet:
    """A set of images of a study, opened. ``source``: as ``--data`` has it; ``drawn``: what a trial takes or draws."""

    images: ImageSet
    source: str
    dataset: Dataset
    drawn: str = ""

    @property
    def few_in_val(self) -> list[str]:
        """Classes with too few images in the val split to choose by, where there is such a split."""
        from featurecache.sources.summary import FEW_IN_VAL

        if self.dataset.labels.ndim == 2 or "val" not in self.dataset.splits:
            return []
        val = np.array(self.dataset.splits) == "val"
        counts = [int((val & (self.dataset.labels == c)).sum()) for c in range(len(self.dataset.classes))]
        return [f"{n} of {name}" for name, n in zip(self.dataset.classes, counts, strict=True) if n < FEW_IN_VAL]
