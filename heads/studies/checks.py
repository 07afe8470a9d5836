"""What a study is refused for before anything is computed: options, packages and weights that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from featurecache.errors import BadOption, WeightsNotFound
from heads.studies import Heads, Network, Study
from heads.studies.plan import Asked, backbones_of


def check_options(asked: Asked) -> None:
    if asked.quick and (asked.weights or asked.random_weights):
        raise BadOption("--quick has a small untrained backbone of its own; leave --weights and --random-weights out.")
    if asked.random_weights and asked.weights:
        raise BadOption("--random-weights and --weights contradict each other; give one of them.")
    for option in ("image_size", "epochs", "train_per_class"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise BadOption(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")


def check_extras(steps: Sequence[Any]) -> None:
    """Said before hours of work: what a step needs that is not installed."""
    for step in steps:
        if isinstance(step, Heads) and step.options.get("search") and importlib.util.find_spec("optuna") is None:
            raise BadOption(
                f"the step {step.name} searches with Optuna, which is not installed: pip install "
                f"'featurecache[optuna]', or --skip {step.name}."
            )
        if isinstance(step, Network) and step.options.get("lora") and importlib.util.find_spec("peft") is None:
            raise BadOption(
                f"the step {step.name} needs peft: pip install 'featurecache[peft]', or --skip {step.name}."
            )


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
