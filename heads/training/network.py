"""Training a network from pixels by the protocol of a head: settings, checks, and what it goes on from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from featurecache.errors import BadOption, ProtocolError, RunError, Stopped, UnknownHead
from featurecache.files.records import canonical_json
from heads.metrics.calibration import Calibration
from heads.models.catalogue import baseline_info, is_baseline, own_settings, shape_of_network
from heads.models.common import FINETUNE
from heads.models.finetune import classifier_state, from_pretrained, save_backbone
from heads.runs.run import hash_of
from heads.runs.write import RunContents, RunTarget
from heads.settings import Settings
from heads.task import Say
from heads.training.job import TrainingJob, training_images_hash
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


def check_checkpoint(checkpoint: Checkpoint, resume: bool, overwrite: bool) -> None:
    """An interrupted training is neither gone over unseen nor taken for another."""
    if checkpoint.exists and not resume and not overwrite:
        raise RunError(
            f"A training with these very settings was interrupted after epoch {checkpoint.epoch} "
            f"({checkpoint.path.name}). --resume goes on with it; --overwrite begins anew."
        )
    if resume and overwrite:
        raise BadOption("--resume goes on with an interrupted training, --overwrite begins anew; give one of them.")
    if overwrite:
        checkpoint.remove()
    others = sorted(checkpoint.path.parent.glob(f"{checkpoint.path.name.rpartition('-')[0]}-*.checkpoint"))
    if resume and not checkpoint.exists and others:
        raise RunError(
            f"--resume: the interrupted training that lies there ({others[0].name}) has other settings or images: "
            f"{', '.join(checkpoint.differences_from(others[0]))}. Give the same command again, with --resume."
        )
    if resume and not checkpoint.exists:
        raise RunError(f"--resume: no interrupted training of this lies in {checkpoint.path.parent.resolve()}.")


def train_network(
    job: TrainingJob, settings: Settings, say: Say, checkpoint: Checkpoint, progress: bool = False
) -> FittedHead:
    """After every epoch it is kept, to go on from."""
    try:
        (fit,) = train_together(job, [settings], say, checkpoint, progress)
    except KeyboardInterrupt as error:
        if not checkpoint.exists:
            raise Stopped("stopped in the first epoch. Nothing was kept.") from error
        safe = "1 epoch is safe" if checkpoint.epoch == 1 else f"{checkpoint.epoch} epochs are safe"
        raise Stopped(f"stopped. {safe}; the same command with --resume goes on.") from error
    if isinstance(fit, ProtocolError):
        checkpoint.remove()
        raise fit
    return fit


RESULT_INDEPENDENT = ("ram", "device")  # settings that decide nothing of the result


def checkpoint_of(target: RunTarget, job: TrainingJob) -> Checkpoint:
    """That of a training whose run is to lie at ``target``."""
    settings = {key: value for key, value in job.settings.to_dict().items() if key not in RESULT_INDEPENDENT}
    request = {"settings": settings, "images": training_images_hash(job), "pixels": job.view.fingerprint}
    return Checkpoint(
        target.parent / f".{target.stem[:100]}-{hash_of(canonical_json(request))[:12]}.checkpoint", request
    )
