"""The five studies as data: what each asked, on which images, by which steps, and what it reported.

A study is one file, ``heads/studies/<name>.py``, that ends in a `Study`; ``STUDIES`` names the files. To add one: such
a file and a line here. `heads.studies.run` runs any of them.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featurecache.errors import UnknownStudy, nearest

if TYPE_CHECKING:
    import numpy as np

    from featurecache.sources.base import Dataset

STUDIES: dict[str, tuple[str, str]] = {  # name -> (module, the question it answers)
    "mindlina": (
        "heads.studies.mindlina",
        "chest X-rays: is a frozen ViT with a small head as good as a CNN that was trained on them?",
    ),
    "medical-mnist": (
        "heads.studies.medical_mnist",
        "six kinds of scan: a CNN from scratch, ResNet-50, and a ViT fine-tuned on 300 images",
    ),
    "medmnist": (
        "heads.studies.medmnist",
        "blood, breast, tissue, retina (MedMNIST v2): a fine-tuned ViT, and frozen features beside it",
    ),
    "pneumonia": (
        "heads.studies.pneumonia",
        "pneumonia on chest X-rays: ViT, ResNet-50 or DenseNet-121; how much data, augmentation and optimiser matter",
    ),
    "cifar-tinyimagenet": (
        "heads.studies.cifar_tinyimagenet",
        "CIFAR-10/100 and Tiny ImageNet: a small ViT against a small CNN, both from scratch",
    ),
}


@dataclass(frozen=True)
class Published:
    """One number as it was reported, and the step of ours that it stands beside."""

    what: str
    measure: str  # of heads.metrics.classification.METRICS, "train_seconds" or "ms_per_image"
    value: float  # of measures a fraction
    ours: str = ""  # the name of a step; "": we have none like it
    head: str = ""  # of that step, where it trains several
    split: str = "test"
    remark: str = ""  # what it was measured on, where that is not the whole of test
    source: str = ""  # "": the study's own


@dataclass(frozen=True)
class Images:
    """A set of images. ``classes`` are those that ``--quick`` draws where no images are given."""

    name: str
    source: str  # what is fetched, or looked for, without --data
    classes: tuple[str, ...]
    task: str | None = None
    known_as: tuple[str, ...] = ()  # what its file or folder is called, in a folder given with --data
    local: str = "{path}"  # how --data is spelt for what lies there; {folder}: that it lies in
    columns: dict[str, str] | None = None  # of `featurecache.open_source`
    default: bool = True  # whether it is part of the study when nothing is given


@dataclass(frozen=True)
class Part:
    """One question with one table: a set of images, a task on it, and what all steps on it have in common."""

    name: str
    title: str
    images: str
    select: str = "auroc"
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.settings.Settings`
    splits: Callable[[Dataset], np.ndarray | None] = lambda _: None  # [N] split names; None: the protocol's
    published: tuple[Published, ...] = ()
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
    part: str
    features: tuple[str, ...]
    heads: str
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.ablate`


@dataclass(frozen=True)
class Network:
    """A network that is trained from pixels: a baseline, or ``finetune:<backbone>``."""

    name: str
    part: str
    arch: str
    options: dict[str, Any] = field(default_factory=dict)  # of `heads.train_baseline`


@dataclass(frozen=True)
class Look:
    """Maps of where networks look, on a few images of test: Grad-CAM of those of ``of`` (Network steps), attention of
    those of them with a class token and, where named, of the frozen backbone whose features (``backbone``, an Extract
    step) the Heads step ``attention`` was trained on."""

    name: str
    part: str
    of: tuple[str, ...]
    attention: str = ""
    backbone: str = ""
    images: int = 4


Step = Extract | Heads | Network | Look


@dataclass(frozen=True)
class Study:
    """A study. ``differs``: what the published protocol did that this one does not, a sentence each."""

    name: str
    title: str
    source: str
    about: tuple[str, ...]
    images: tuple[Images, ...]
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    differs: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    figures: str = ""  # a function of heads.studies.figures for charts of its own

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def set_of(self, step: Step) -> str:
        """The name of the set of images that a step is about."""
        return step.images if isinstance(step, Extract) else self.part(step.part).images

    def needs(self, step: Step) -> tuple[str, ...]:
        """Steps that must be finished before ``step``."""
        if isinstance(step, Look):
            return (*step.of, *([step.attention] if step.attention else []))
        return step.features if isinstance(step, Heads) else ()


def load_study(name: str) -> Study:
    if name not in STUDIES:
        raise UnknownStudy(f'no study is called "{name}".{nearest(name, STUDIES)} There are {", ".join(STUDIES)}.')
    found: Study = importlib.import_module(STUDIES[name][0]).STUDY
    return found


def chosen(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> Iterator[Step]:
    """The steps that names or patterns (``blood-*``) choose; a word that chooses none is an error."""
    names = [step.name for step in steps]
    for word in (*only, *skip):
        if not fnmatch.filter(names, word):
            raise UnknownStudy(f'no step is called "{word}".{nearest(word, names)} There are {", ".join(names)}.')
    for step in steps:
        wanted = not only or any(fnmatch.fnmatchcase(step.name, word) for word in only)
        if wanted and not any(fnmatch.fnmatchcase(step.name, word) for word in skip):
            yield step


def studies_lines() -> str:
    """A line for each study: its name and the question it answers."""
    width = max(map(len, STUDIES))
    return "\n".join(f"  {name:<{width}}  {question}" for name, (_, question) in STUDIES.items())
