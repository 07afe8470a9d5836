"""Training a network from pixels by the protocol of a head: settings, checks, and what it goes on from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from featurecache.errors import ProtocolError, Stopped, UnknownHead
from heads.metrics.calibration import Calibration
from heads.models.catalogue import baseline_info, is_baseline, own_settings, shape_of_network
from heads.models.common import FINETUNE
from heads.models.finetune import classifier_state, from_pretrained, save_backbone
from heads.runs.write import RunContents
from heads.settings import Settings
from heads.task import Say
from heads.training.job import TrainingJob
from heads.training.loop import Checkpoint
from heads.training.train import FittedHead, train_together

if TYPE_CHECKING:
    from featurecache.backbones.base import Backbone


def with_backbone(contents: RunContents, tuned: Any) -> RunContents:
    """The contents of the run of a `FineTuned`: a folder that ``extract`` takes, the classifier in head.safetensors."""
    config = contents.config
    calibration, multilabel = Calibration.from_dict(config["calibration"]), config["task"] == "multilabel"
    own = {"classes": config["classes"], "multilabel": multilabel, "calibration": calibration}
    return replace(contents, tensors=classifier_state(tuned), beside=partial(save_backbone, tuned, **own))


def settings_of(arch: str, **options: Any) -> Settings:
    """The published settings of a network, and ``options`` in the place of some. None is as published."""
    if not is_baseline(arch):
        try:
            baseline_info(arch)  # raises with the nearest names
        except UnknownHead as error:
            raise UnknownHead(f"{error} Heads on features are trained by train-head.") from error
    adapted = bool(options.get("lora") or options.get("rlrr"))
    own = own_settings(arch, weights=options.get("weights"), adapted=adapted)
    return Settings.of(arch, **own | {name: value for name, value in options.items() if value is not None})


def check_network(settings: Settings) -> Backbone | None:
    """Raises what making the network would, before images are read: options that do not fit, weights that are missing.
    What `finetune:` begins from, so that it is loaded once."""
    size = settings.image_size or baseline_info(settings.head, weights=settings.weights).image_size
    shape_of_network(settings, size, classes=2)
    return from_pretrained(settings, size) if settings.head.startswith(FINETUNE) else None


def train_network(
    job: TrainingJob, settings: Settings, say: Say, checkpoint: Checkpoint, progress: bool = False
) -> FittedHead:
    """From where an interrupted training of it ended; after every epoch it is kept, to go on from."""
    say_resumed(checkpoint, say)
    try:
        (fit,) = train_together(job, [settings], say, checkpoint, progress)
    except KeyboardInterrupt as error:
        if not (epoch := checkpoint.epoch):
            raise Stopped("stopped in the first epoch. Nothing was kept.") from error
        safe = "1 epoch is safe" if epoch == 1 else f"{epoch} epochs are safe"
        raise Stopped(f"stopped. {safe}; the same command goes on.") from error
    if isinstance(fit, ProtocolError):
        checkpoint.remove()
        raise fit
    return fit


def say_resumed(checkpoint: Checkpoint, say: Say) -> None:
    """A line where an interrupted training goes on, or where what is left of it is damaged and goes."""
    if not checkpoint.path.exists():
        return
    epoch = checkpoint.epoch
    lost = f"warning    {checkpoint.path} is damaged and was thrown away: the training begins anew"
    say(f"resumed    after epoch {epoch}" if epoch else lost)
