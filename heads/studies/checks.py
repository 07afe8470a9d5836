"""What a study is refused for before anything is computed: options, packages and weights that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

from featurecache.errors import BadOption, WeightsNotFound
from heads.studies.plan import Asked, backbones_of
from heads.studies.spec import Heads, Look, Network, Step, Study


def check_options(asked: Asked) -> None:
    if asked.quick and (asked.weights or asked.random_weights):
        raise BadOption("--quick has a small untrained backbone of its own; leave --weights and --random-weights out.")
    if asked.random_weights and asked.weights:
        raise BadOption("--random-weights and --weights contradict each other; give one of them.")
    for option in ("image_size", "epochs", "train_per_class"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise BadOption(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")


def check_extras(steps: Sequence[Step], quick: bool) -> None:
    """Said before hours of work: which steps need what is not installed."""
    found = [(step.name, extra) for step in steps for extra in extras_of(step, quick) if not is_there(extra)]
    if not found:
        return
    names, extras = (list(dict.fromkeys(words)) for words in zip(*found, strict=True))
    kinds = dict.fromkeys(name.rpartition("-")[2] for name in names)
    words = names if len(names) <= 3 else [f"'*{kind}'" for kind in kinds]
    way = "" if "timm" in extras else f", or {' '.join(f'--skip {word}' for word in words)}"
    said = ", ".join(names) if words is names else f"{names[0]} and {len(names) - 1} more"
    raise BadOption(
        f"{said} need{'s' * (len(names) == 1)} what is not installed: "
        f"pip install 'featurecache[{','.join(extras)}]'{way}."
    )


def extras_of(step: Step, quick: bool) -> Iterator[str]:
    """The extras that a step needs; those of data are said when they are opened."""
    if isinstance(step, Heads) and step.options.get("search"):
        yield "optuna"
    if isinstance(step, Network) and step.options.get("lora"):
        yield "peft"
    if isinstance(step, Look):
        yield "explain"
    if not quick and any(name.startswith("timm:") for name in backbones_of([step])):
        yield "timm"


def is_there(extra: str) -> bool:
    return importlib.util.find_spec({"explain": "pytorch_grad_cam"}.get(extra, extra)) is not None


def check_weights(study: Study, asked: Asked, backbones: Sequence[str]) -> None:
    """Every backbone is loaded once, so that it is fetched, or its absence said, before anything is computed."""
    from featurecache.backbones import load_backbone

    if asked.quick or asked.random_weights:
        return
    for name in backbones:
        try:
            load_backbone(name, weights=asked.weights.get(name))
        except WeightsNotFound as error:
            first = str(error).splitlines()[0]
            way = "PATH" if len(backbones_of(study.steps)) == 1 else f"{name}=PATH"
            raise WeightsNotFound(
                f"{first}\n       --weights {way}   a copy you have        HF_HOME=…, TORCH_HOME=…   an existing cache"
                "        --random-weights   the study without them, which shows the tool and no backbone"
            ) from error
