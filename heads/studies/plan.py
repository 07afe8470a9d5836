"""What a study will do before it does it: its steps with every option settled, and about how long each takes.

A settled step (`Planned`) is JSON: it is what a finished step is recognised by when the same command comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featurecache.errors import BadOption
from heads.studies.images import QUICK, Given
from heads.studies.minutes import epochs_of, minutes_of
from heads.studies.spec import Extract, Heads, Look, Network, Part, Step, Study, chosen

# Under --quick: small architectures that are quickly made, never trained, in the place of the study's.
QUICK_BACKBONES = {
    "vit-in21k": "vit-demo", "vit-in1k": "vit-demo", "timm:vit_base_patch16_224": "vit-demo",
    "resnet50": "torchvision:resnet18", "densenet121": "torchvision:shufflenet_v2_x0_5",
}  # fmt: skip
QUICK_SIZES = {"vit-demo": 32}  # pixels; of every other network QUICK_SIZE
QUICK_SIZE = 32
QUICK_EPOCHS = {"heads": 6, "network": 2}
QUICK_TRIALS = 3
QUICK_BATCH = 16
FINETUNE = "finetune:"


@dataclass(frozen=True)
class Asked:
    """The options of ``featurecache study``. ``weights``: backbone -> file or folder (xx)."""

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

    def to_dict(self) -> dict[str, Any]:
        """What decides results; which steps are run, and where, does not."""
        names = ("quick", "random_weights", "weights", "image_size", "epochs", "train_per_class")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Planned:
    """A step with every option settled. ``asked``: JSON; ``minutes``: about how long, None where it cannot be said."""

    step: Step
    asked: dict[str, Any]
    minutes: float | None

    @property
    def name(self) -> str:
        return self.step.name


@dataclass(frozen=True)
class Plan:
    """``left_out``: (step or part, why) of what the images or the options do not allow."""

    steps: list[Planned]
    left_out: list[tuple[str, str]]

    @property
    def minutes(self) -> float:
        return sum(step.minutes or 0.0 for step in self.steps)


def read_weights(words: Sequence[str], study: Study) -> dict[str, str]:
    """--weights PATH, or BACKBONE=PATH of several. Raises BadOption."""
    known, found = backbones_of(study.steps), {}
    for word in words:
        name, sign, path = word.partition("=")
        if sign and name in known:
            found[name] = path
        elif len(known) == 1:
            found[next(iter(known))] = word
        else:
            raise BadOption(
                f"--weights {word}: of which backbone? {study.name} has several: "
                f"{', '.join(f'--weights {name}=PATH' for name in known)}."
            )
    return found


def backbones_of(steps: Sequence[Step]) -> dict[str, None]:
    """Those whose weights the steps need, in order."""
    found: dict[str, None] = {}
    for step in steps:
        if isinstance(step, Extract) and not step.untrained:
            found[step.backbone] = None
        elif isinstance(step, Network) and step.arch.startswith(FINETUNE):
            found[step.arch.removeprefix(FINETUNE)] = None
    return found


def wanted_steps(study: Study, asked: Asked) -> list[Step]:
    """Those chosen by --only and --skip, with what they need before them, in the study's order."""
    names = {step.name for step in chosen(study.steps, asked.only, asked.skip)}
    by_name = {step.name: step for step in study.steps}
    todo = list(names)
    while todo:
        for needed in study.needs(by_name[todo.pop()]):
            if needed not in names:
                names.add(needed)
                todo.append(needed)
    return [step for step in study.steps if step.name in names]


def make_plan(study: Study, asked: Asked, given: dict[str, Given], gflops: float) -> Plan:
    """``gflops``: 10^9 operations a second of this machine, for the minutes."""
    steps: list[Planned] = []
    left: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    for step in wanted_steps(study, asked):
        name = study.set_of(step)
        if name not in given:
            continue
        if not isinstance(step, Extract) and step.part not in options:
            found = task_options(study.part(step.part), given[name])
            if isinstance(found, str):
                left[step.part] = found
            else:
                options[step.part] = found
        if _same_as_untrained(study, step, asked):
            left[step.name] = "with random weights the frozen features are this control themselves"
        elif isinstance(step, Extract) or step.part not in left:
            part = {} if isinstance(step, Extract) else options[step.part]
            settled = settle(study, step, asked, part)
            steps.append(Planned(step, settled, minutes_of(settled, given[name], gflops)))
    return Plan(steps, list(left.items()))


def _same_as_untrained(study: Study, step: Step, asked: Asked) -> bool:
    """A control with random weights beside features that have them too."""
    control = {s.name for s in study.steps if isinstance(s, Extract) and s.untrained}
    return (asked.random_weights or asked.quick) and (step.name in control or bool(control & set(study.needs(step))))


def task_options(part: Part, given: Given) -> dict[str, Any] | str:
    """The options of `Settings` that all steps of a part share, in the names that its images have for classes; or the
    sentence that says why the images do not answer its question."""
    found = {"drop_leaks": True, **part.options}
    classes = given.dataset.classes
    if given.few_in_val and part.splits(given.dataset) is None:
        found["resplit_val"] = True
    if "only" in found:
        names = [_named(word, classes) for word in found["only"]]
        if None in names:
            return f"{given.source} has no {' and no '.join(found['only'])}: its classes are {', '.join(classes)}"
        found["only"] = names
    if "classes" in found:
        return _merged(found, classes, given)
    return found


def _merged(found: dict[str, Any], classes: Sequence[str], given: Given) -> dict[str, Any] | str:
    """``("normal", "pneumonia=bacteria,virus")``, or nothing where the images are labelled so already."""
    words, plain = [], []
    for word in found["classes"]:
        name, sign, parts = word.partition("=")
        plain.append(_named(name, classes))
        inner = [_named(part, classes) for part in (parts if sign else name).split(",")]
        words.append(None if None in inner else f"{name}={','.join(str(part) for part in inner)}" if sign else inner[0])
    if None not in words:
        return {**found, "classes": words}
    if None not in plain and len(plain) == len(classes):
        return {key: value for key, value in found.items() if key != "classes"}
    return f"{given.source} cannot tell {' from '.join(w.split('=')[0] for w in found['classes'])}"


def _named(word: str, classes: Sequence[str]) -> str | None:
    """The class that is called so, in any case, or has the word in its name."""
    exact = [name for name in classes if name.lower() == word.lower()]
    inside = [name for name in classes if word.lower() in name.lower()]
    found = exact or (inside if len(inside) == 1 else [])
    return found[0] if found else None


def settle(study: Study, step: Step, asked: Asked, part: dict[str, Any]) -> dict[str, Any]:
    if isinstance(step, Extract):
        return {"extract": step.images, "outputs": step.outputs, **_backbone(step.backbone, step.untrained, asked)}
    if isinstance(step, Heads):
        options = {"epochs": 50, **part, "select": study.part(step.part).select, **step.options}
        if asked.quick:
            options |= {"epochs": QUICK_EPOCHS["heads"]} | ({"trials": QUICK_TRIALS} if "trials" in options else {})
        if asked.epochs:
            options["epochs"] = min(options["epochs"], asked.epochs)
        return {"ablate": list(step.features), "heads": step.heads, **options}
    if isinstance(step, Look):
        return {"explain": list(study.needs(step)), "images": 2 if asked.quick else step.images}
    return {"train_baseline": study.part(step.part).images, **_network(step, asked, part)}


def _network(step: Network, asked: Asked, part: dict[str, Any]) -> dict[str, Any]:
    options = {**part, **step.options}
    arch = step.arch
    if arch.startswith(FINETUNE):
        made = _backbone(arch.removeprefix(FINETUNE), False, asked)
        arch = FINETUNE + made.pop("backbone")
        options |= made
    else:
        size = asked.image_size or (QUICK_SIZE if asked.quick else None)
        options |= {"image_size": size} if size else {}
    if asked.quick:
        options["batch_size"] = QUICK_BATCH
        if "train_per_class" in options:
            options["train_per_class"] = min(options["train_per_class"], QUICK["train"])
    caps = {"epochs": asked.epochs or (QUICK_EPOCHS["network"] if asked.quick else None)}
    caps["train_per_class"] = asked.train_per_class
    for name, cap in caps.items():
        if cap is not None:
            known = options[name] if name in options else cap if name == "train_per_class" else epochs_of(step.arch)
            options[name] = min(known, cap)
    return {"arch": arch, **options}


def _backbone(name: str, untrained: bool, asked: Asked) -> dict[str, Any]:
    quick = QUICK_BACKBONES.get(name, name) if asked.quick else name
    size = asked.image_size or (QUICK_SIZES.get(quick, QUICK_SIZE) if asked.quick else None)
    found: dict[str, Any] = {"backbone": quick, **({"image_size": size} if size else {})}
    if asked.quick or asked.random_weights or untrained:
        found["random_weights"] = True
    elif name in asked.weights:
        found["weights"] = asked.weights[name]
    return found
