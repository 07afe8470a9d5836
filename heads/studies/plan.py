"""Plan of a study: its steps with every option resolved, about how long each takes, what is left out and why.

The call of a planned step is JSON, by which a finished step is recognised when the same command comes again.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from featurecache.errors import BadOption, UnknownStudy, WeightsNotFound, nearest
from heads.models.catalogue import BASELINES
from heads.models.common import FINETUNE
from heads.settings import flag
from heads.studies.images import QUICK
from heads.studies.spec import ExplainStep, Extract, Heads, Network, OpenedSet, Question, Step, Study

# Under --quick: small architectures that are quickly made, never trained, in the place of the study's.
QUICK_BACKBONES = {
    "vit-in21k": "vit-demo", "vit-in1k": "vit-demo", "timm:vit_base_patch16_224": "vit-demo",
    "resnet50": "torchvision:resnet18", "densenet121": "torchvision:shufflenet_v2_x0_5",
}  # fmt: skip
QUICK_SIZE = 32  # pixels

QUICK_HEADS = {"epochs": 20, "trials": 3}  # in the place of those that a step has
QUICK_EPOCHS, QUICK_BATCH = 8, 16  # of networks
QUICK_RATES = {"sgd": 1e-2}  # 1e-3 of the others: nothing is pretrained
# 10^9 multiply-adds of an image and the side in pixels they are at; None: the same at any side. Dosovitskiy et al.
# 2021, torchvision's table of weights; the others counted by hand from the layers.
GMACS: dict[str, tuple[float, int | None]] = {
    "vit-in21k": (17.6, 224), "vit-in1k": (17.6, 224), "timm:vit_base_patch16_224": (17.6, 224), "vit-demo": (0.03, 64),
    "resnet50": (4.1, 224), "densenet121": (2.8, 224), "torchvision:resnet18": (1.8, 224),
    "torchvision:shufflenet_v2_x0_5": (0.04, 224), "cnn-mindlina": (0.6, 256), "cnn-medical-mnist": (0.51, 224),
    "cnn-cifar": (0.027, 32), "vit-cifar": (0.085, None),
}  # fmt: skip
HEAD_GMACS = {"large": 0.04}  # of tokens of a ViT-B; of others the steps around it, not the product
AROUND = 0.05  # minutes of a step beside the products: loading, the first batch, measures, writing
REACHED = 0.7  # of the speed of a large product of matrices, as ViT-B, ResNet-50 and DenseNet-121 reached it
NUMBERS = ("image_size", "epochs", "train_per_class")  # options that are one; None: as the study has it
PACKAGES = {"explain": "pytorch_grad_cam"}  # of an extra, where it is not called as the extra


def stand_ins(study: Study, calls: Iterable[dict[str, Any]]) -> str:
    """The networks that run under --quick, and in the place of which: ``vit-demo (for vit-in1k), cnn-cifar``."""
    names = {call.get("backbone") or call.get("arch", "").removeprefix(FINETUNE) for call in calls} - {""}
    words = []
    for name in sorted(names):
        originals = [each for each in backbones_of(study.steps) if QUICK_BACKBONES.get(each) == name]
        words.append(f"{name} (for {' and '.join(originals)})" if originals else name)
    return ", ".join(words)


@dataclass(frozen=True)
class StudyOptions:
    """The options of ``featurecache study``. ``weights``: backbone -> file or folder."""

    data: tuple[str, ...] = ()
    quick: bool = False
    random_weights: bool = False
    weights: dict[str, str] = field(default_factory=dict)
    image_size: int | None = None
    epochs: int | None = None
    train_per_class: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.quick and (self.weights or self.random_weights):
            raise BadOption(
                "--quick has a small untrained backbone of its own; leave --weights and --random-weights out."
            )
        if self.random_weights and self.weights:
            raise BadOption("--random-weights and --weights contradict each other; give one of them.")
        for name in NUMBERS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadOption(f"{flag(name)} is {value}; it must be at least 1.")

    @property
    def untrained(self) -> bool:
        """Whether backbones that the study has with pretrained weights have random ones."""
        return self.quick or self.random_weights

    def to_dict(self) -> dict[str, Any]:
        """What decides results; which steps are run, and where, does not."""
        return {name: getattr(self, name) for name in ("quick", "random_weights", "weights", *NUMBERS)}


class PlannedStep(NamedTuple):
    """A step with every option resolved: ``call`` is JSON, the function it calls, what on, and its options.
    ``minutes``: about how long, None where it cannot be said."""

    step: Step
    call: dict[str, Any]
    minutes: float | None


def read_weights(texts: Sequence[str], study: Study) -> dict[str, str]:
    """--weights PATH, or BACKBONE=PATH of several. Raises BadOption."""
    backbones, weights = backbones_of(study.steps), {}
    for text in texts:
        name, sign, path = text.partition("=")
        if sign and name in backbones:
            weights[name] = path
        elif len(backbones) == 1:
            weights[backbones[0]] = text
        else:
            ways = ", ".join(f"--weights {name}=PATH" for name in backbones)
            near = nearest(name, backbones) if sign else ""
            raise BadOption(f"--weights {text}: of which backbone? {study.name} has several: {ways}.{near}")
    return weights


def backbones_of(steps: Sequence[Step]) -> list[str]:
    """Those whose weights the steps need, in order."""
    names = []
    for step in steps:
        if isinstance(step, Extract) and not step.untrained:
            names.append(step.backbone)
        elif isinstance(step, Network) and step.arch.startswith(FINETUNE):
            names.append(step.arch.removeprefix(FINETUNE))
    return list(dict.fromkeys(names))


def wanted_steps(study: Study, options: StudyOptions) -> list[Step]:
    """Those chosen by --only and --skip, names or patterns (``blood-*``), with what they need before them, in the
    study's order; a word that chooses none is an error."""
    by_name = {step.name: step for step in study.steps}
    for word in (*options.only, *options.skip):
        if not fnmatch.filter(by_name, word):
            there = ", ".join(by_name)
            raise UnknownStudy(f'no step is called "{word}".{nearest(word, by_name)} There are {there}.')
    names = {name for word in options.only or ("*",) for name in fnmatch.filter(by_name, word)}
    names -= {name for word in options.skip for name in fnmatch.filter(by_name, word)}
    for step in reversed(study.steps):  # what a step needs stands before it
        names.update(study.needs(step) if step.name in names else ())
    return [step for step in study.steps if step.name in names]


def check_packages(steps: Sequence[Step], quick: bool) -> None:
    """Said before hours of work: which steps need what is not installed (but for data: said when they are opened).
    Raises BadOption."""
    pairs: list[tuple[str, str]] = []
    for step in steps:
        timm = not quick and any(name.startswith("timm:") for name in backbones_of([step]))
        searches = isinstance(step, Heads) and "search" in step.options
        needed = {"optuna": searches, "explain": isinstance(step, ExplainStep), "timm": timm}
        pairs += [(step.name, extra) for extra in needed if needed[extra]]
    missing = [(name, extra) for name, extra in pairs if not importlib.util.find_spec(PACKAGES.get(extra, extra))]
    if not missing:
        return
    names, extras = (list(dict.fromkeys(words)) for words in zip(*missing, strict=True))
    few = len(names) <= 3
    skips = names if few else [f"'*{kind}'" for kind in dict.fromkeys(name.rpartition("-")[2] for name in names)]
    way = "" if "timm" in extras else f", or {' '.join(f'--skip {word}' for word in skips)}"
    raise BadOption(
        f"{', '.join(names) if few else f'{names[0]} and {len(names) - 1} more'} need{'s' * (len(names) == 1)} what is "
        f"not installed: pip install 'featurecache[{','.join(extras)}]'{way}."
    )


def check_weights(study: Study, options: StudyOptions, steps: Sequence[Step]) -> None:
    """Every backbone is loaded once, so that it is fetched, or its absence said, before anything is computed."""
    from featurecache.backbones import load_backbone

    for name in [] if options.untrained else backbones_of(steps):
        try:
            load_backbone(name, weights=options.weights.get(name))
        except WeightsNotFound as error:
            what = "\n".join(str(error).splitlines()[:2])  # what is missing, and how it is fetched
            way = "PATH" if len(backbones_of(study.steps)) == 1 else f"{name}=PATH"
            raise WeightsNotFound(
                f"{what}\n"
                f"       --weights {way}   a copy you have        HF_HOME=…, TORCH_HOME=…   an existing cache"
                "        --random-weights   the study without them, which shows the tool and no backbone"
            ) from error


def plan_study(
    study: Study, options: StudyOptions, sets: dict[str, OpenedSet], gflops: float
) -> tuple[list[PlannedStep], dict[str, str]]:
    """The steps, and of each step or question that the images or the options do not allow why. ``gflops``: 10^9
    operations a second of this machine, for the minutes."""
    steps: list[PlannedStep] = []
    left_out: dict[str, str] = {}
    tasks: dict[str, dict[str, Any] | str] = {"": {}}
    control = {step.name for step in study.steps if isinstance(step, Extract) and step.untrained}
    for step in (each for each in wanted_steps(study, options) if study.set_of(each) in sets):
        opened, question = sets[study.set_of(step)], study.question_of(step)
        name = question.name if question else ""
        if question and name not in tasks:
            tasks[name] = task_options(question, opened)
        task = tasks[name]
        if isinstance(task, str):
            left_out[name] = task
        if options.untrained and control & {step.name, *study.needs(step)}:
            left_out[step.name] = "with random weights the frozen features are this control themselves"
        elif not isinstance(task, str):
            call = resolve_options(study, step, options, task)
            steps.append(PlannedStep(step, call, minutes_of(call, opened, gflops)))
    return steps, left_out


def task_options(question: Question, opened: OpenedSet) -> dict[str, Any] | str:
    """The options of `Settings` that all steps of a question share, in the names that its images have for classes; or
    the sentence that says why the images do not answer it."""
    options = {"drop_leaks": True, **question.options}
    classes = opened.dataset.classes
    if opened.few_in_val and question.splits(opened.dataset) is None:
        options["resplit_val"] = True
    if "only" in options:
        names = [_class_called(word, classes) for word in options["only"]]
        if None in names:
            return f"{opened.source} has no {' and no '.join(options['only'])}: its classes are {', '.join(classes)}"
        options["only"] = names
    if "classes" not in options:
        return options
    merged, plain = [], []  # ("normal", "pneumonia=bacteria,virus"), or nothing where they are labelled so already
    for text in options.pop("classes"):
        name, sign, parts = text.partition("=")
        plain.append(_class_called(name, classes))
        inner = [_class_called(part, classes) for part in (parts if sign else name).split(",")]
        merged.append(None if None in inner else f"{name}={','.join(map(str, inner))}" if sign else inner[0])
    if None not in merged:
        return {**options, "classes": merged}
    if None not in plain and len(plain) == len(classes):
        return options
    return f"{opened.source} cannot tell {' from '.join(w.split('=')[0] for w in question.options['classes'])}"


def _class_called(word: str, classes: Sequence[str]) -> str | None:
    """The class that is called so, in any case, or alone has the word in its name."""
    exact = [name for name in classes if name.lower() == word.lower()]
    inside = [name for name in classes if word.lower() in name.lower()]
    return exact[0] if exact else inside[0] if len(inside) == 1 else None


def resolve_options(study: Study, step: Step, options: StudyOptions, task: dict[str, Any]) -> dict[str, Any]:
    """The call of a step. ``task``: the options that its question has for all."""
    question, quick, most = study.question_of(step), options.quick, options.train_per_class
    if isinstance(step, Extract):
        backbone = _backbone_options(step.backbone, step.untrained, options)
        return {"extract": step.images, "outputs": step.outputs, **backbone}
    if isinstance(step, ExplainStep):
        return {"explain": list(study.needs(step)), "images": 2 if quick else step.images}
    assert question is not None
    if isinstance(step, Heads):
        call = {"ablate": list(step.features), "heads": step.heads, **task, "select": question.select, **step.options}
        if quick:
            call |= {name: value for name, value in QUICK_HEADS.items() if name in call or name == "epochs"}
        limits = [n for n in (call.get("epochs"), options.epochs) if n]  # none: each head's own
        return call | ({"epochs": min(limits)} if limits else {})
    call = {"train_baseline": question.images, "arch": step.arch, **task, **step.options}
    if step.arch.startswith(FINETUNE):
        backbone = _backbone_options(step.arch.removeprefix(FINETUNE), False, options)
        call |= {"arch": FINETUNE + backbone.pop("backbone")} | backbone
    elif size := _image_size(options):
        call["image_size"] = size
    if quick:
        call |= {"batch_size": QUICK_BATCH, "lr": QUICK_RATES.get(call.get("optimizer", ""), 1e-3)}
    if epochs := options.epochs or (QUICK_EPOCHS if quick else None):
        call["epochs"] = min(call.get("epochs") or _published_epochs(step.arch), epochs)
    if most or "train_per_class" in call:
        caps = (call.get("train_per_class"), most, QUICK["train"] if quick and "train_per_class" in call else None)
        call["train_per_class"] = min(cap for cap in caps if cap)
    return call


def _backbone_options(name: str, untrained: bool, options: StudyOptions) -> dict[str, Any]:
    call: dict[str, Any] = {"backbone": QUICK_BACKBONES.get(name, name) if options.quick else name}
    if size := _image_size(options):
        call["image_size"] = size
    if options.untrained or untrained:
        call["random_weights"] = True
    elif name in options.weights:
        call["weights"] = options.weights[name]
    return call


def _image_size(options: StudyOptions) -> int | None:
    return options.image_size or (QUICK_SIZE if options.quick else None)


def minutes_of(call: dict[str, Any], opened: OpenedSet, gflops: float) -> float | None:
    """Multiply-adds twice, training three times a forward pass; a few seconds for each image that is looked into."""
    if "explain" in call:
        return AROUND * call["images"]
    counts = _split_counts(opened, call)
    if "ablate" in call:
        each = sum(HEAD_GMACS.get(head, 0.0001) for head in call["heads"].split(",")) * call.get("trials", 1)
        shares = sum(float(share) for share in str(call.get("fractions", "1")).split(","))
        gmacs = 3 * each * counts["train"] * call.get("epochs", 50) * shares
    else:
        name = call.get("backbone") or call["arch"].removeprefix(FINETUNE)
        if name not in GMACS:
            return None
        once, side = GMACS[name]
        once *= (call["image_size"] / side) ** 2 if call.get("image_size") and side else 1
        epochs = 0 if "extract" in call else call.get("epochs") or _published_epochs(call["arch"])
        images = 3 * counts["train"] * epochs + counts["val"] * epochs + counts["test"]
        gmacs = once * (images if epochs else sum(counts.values()))
    return 2 * gmacs / (REACHED * gflops) / 60 + AROUND


def _split_counts(opened: OpenedSet, call: dict[str, Any]) -> dict[str, int]:
    """About how many images each split has; without splits in the data, 70/15/15."""
    names, total = list(opened.dataset.splits), len(opened.dataset)
    counts = {split: names.count(split) for split in ("train", "val", "test")}
    if not any(counts.values()):
        counts = {"train": total * 70 // 100, "val": total * 15 // 100, "test": total * 15 // 100}
    if call.get("train_per_class"):
        counts["train"] = min(counts["train"], call["train_per_class"] * max(len(opened.dataset.classes), 1))
    return counts


def _published_epochs(arch: str) -> int:
    """Recipes name those of what they fine-tune."""
    return int(BASELINES[arch].settings.get("epochs", 50))


def machine_gflops(device: str = "cpu") -> float:
    """10^9 operations a second of this machine, as it is now: the best product of two matrices of 1024 × 1024 in half
    a second."""
    x = torch.ones(1024, 1024, device=device)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        begin = time.perf_counter()
        float((x @ x)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best / 1e9


def call_text(call: dict[str, Any]) -> str:
    """A planned step in a few words."""
    size = f" at {call['image_size']} px" if call.get("image_size") else ""
    random = ", random weights" if call.get("random_weights") else ""
    if "extract" in call:
        return f"{call['outputs']} of {call['backbone']}{size}{random}"
    if "ablate" in call:
        more = "".join(f", {key} {call[key]}" for key in ("fractions", "search") if key in call)
        return f"heads {call['heads']} on {', '.join(call['ablate'])}{more}"
    if "explain" in call:
        return f"where {', '.join(call['explain'])} look"
    shown = [key for key in ("epochs", "train_per_class", "optimizer", "augment", "rlrr") if call.get(key)]
    more = "".join(f", {key.replace('_', ' ')}{'' if call[key] is True else f' {call[key]}'}" for key in shown)
    return f"{call['arch']}{size}{more}{random}"
