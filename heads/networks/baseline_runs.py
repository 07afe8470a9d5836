"""Train a network from pixels, with the protocol of a head: the same splits, choice, calibration, measures and run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.errors import BadOption, ProtocolError, RunError, Stopped, UnknownHead
from heads.contents import contents_of
from heads.jobs import Job, Say, describe, prepare
from heads.networks.baselines import FINETUNE, baseline_info
from heads.networks.checkpoints import Checkpoint
from heads.networks.making import shape_of_network
from heads.pixels import PixelView, open_pixels
from heads.run_folder import Contents, run_target, write_run
from heads.runs import Run
from heads.settings import Settings, is_baseline
from heads.train import controls_beside, train_together, with_report

if TYPE_CHECKING:
    from featurecache.backbones import Backbone


def train_baseline(
    data: Any,
    arch: str,
    *,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    controls: bool = False,
    report: bool = True,
    images: bool = True,
    hash_ids: bool = False,
    device: str = "auto",
    say: Say | None = None,
    progress: bool = False,
    **options: Any,
) -> Run:
    """Train ``arch`` (a name of `baselines.BASELINES`, or ``finetune:<backbone>``) on images and write a run.

    ``data``: a source as ``--data`` names it, a dataset, a view (its images) or a `PixelView`. ``options`` are fields
    of `Settings`; those not given are as published. After every epoch the training is kept beside the run to be;
    ``resume`` goes on with it. Raises what `heads.train_head` raises, before anything is trained.
    """
    from featurecache.forward import pick_device

    say = say or (lambda line: None)
    settings = settings_of(arch, splits=splits, classes=classes, only=only, device=pick_device(device).type, **options)
    begun = check_network(settings)
    view = data if isinstance(data, PixelView) else _images(data, settings, progress)
    for failure in view.failed:
        say(f"warning    {failure['id']} could not be read and is left out: {failure['reason']}")
    job = dataclasses.replace(prepare(view, settings), begun=begun)
    target = run_target(out, view.name, arch, overwrite)
    kept = Checkpoint.of(target, job)
    _check_kept(kept, resume, overwrite)
    describe(job, say)
    if kept.there:
        say(f"resumed    after epoch {kept.epoch}")
    fit = _trained(job, settings, say, kept)
    contents = contents_of(job, fit, controls_beside(job, say) if controls else [])
    if arch.startswith(FINETUNE):
        contents = with_backbone(contents, fit.model.cpu())
    run = write_run(target, contents)
    kept.remove()
    return with_report(run, images, hash_ids) if report else run


def with_backbone(contents: Contents, tuned: Any) -> Contents:
    """A tuned network as its run keeps it: a folder that ``extract`` takes, and the classifier in head.safetensors.
    ``tuned``: the `heads.networks.tuned.FineTuned` that ``contents`` are of."""
    from heads.networks.finetune import classifier_state, save_backbone

    return dataclasses.replace(
        contents, tensors=classifier_state(tuned), beside=functools.partial(save_backbone, tuned)
    )


def settings_of(arch: str, **options: Any) -> Settings:
    """The published settings of a network, and ``options`` in the place of some. None is as published."""
    if not is_baseline(arch):
        try:
            baseline_info(arch)  # raises with the nearest names
        except UnknownHead as error:
            raise UnknownHead(f"{error} Heads on features are trained by train-head.") from error
    adapted = bool(options.get("lora") or options.get("rlrr"))
    published = baseline_info(arch, weights=options.get("weights"), adapted=adapted).settings
    return Settings.of(arch, **{**published, **{name: value for name, value in options.items() if value is not None}})


def check_network(settings: Settings) -> Backbone | None:
    """Raises what making the network would, before images are read: options that do not fit, weights that are missing.
    What `finetune:` begins from, so that it is loaded once."""
    size = settings.image_size or baseline_info(settings.head, weights=settings.weights).image_size
    shape_of_network(settings, size, classes=2)
    if not settings.head.startswith(FINETUNE):
        return None
    from heads.networks.finetune import begun

    return begun(settings, size)


def _images(data: Any, settings: Settings, progress: bool) -> PixelView:
    return open_pixels(data, [settings.head], settings.image_size, weights=settings.weights, progress=progress)[0]


def _check_kept(kept: Checkpoint, resume: bool, overwrite: bool) -> None:
    """An interrupted training is neither gone over unseen nor taken for another."""
    if kept.there and not resume and not overwrite:
        raise RunError(
            f"A training with these very settings was interrupted after epoch {kept.epoch} ({kept.path.name}). "
            "--resume goes on with it; --overwrite begins anew."
        )
    if resume and overwrite:
        raise BadOption("--resume goes on with an interrupted training, --overwrite begins anew; give one of them.")
    if overwrite:
        kept.remove()
    others = sorted(kept.path.parent.glob(f"{kept.path.name.rpartition('-')[0]}-*.checkpoint"))
    if resume and not kept.there and others:
        raise RunError(
            f"--resume: the interrupted training that lies there ({others[0].name}) has other settings or images: "
            f"{', '.join(kept.differing(others[0]))}. Give the same command again, with --resume."
        )
    if resume and not kept.there:
        raise RunError(f"--resume: no interrupted training of this lies in {kept.path.parent.resolve()}.")


def _trained(job: Job, settings: Settings, say: Say, kept: Checkpoint) -> Any:
    try:
        (fit,) = train_together(job, [settings], say, kept)
    except KeyboardInterrupt as error:
        if not kept.there:
            raise Stopped("stopped in the first epoch. Nothing was kept.") from error
        safe = "1 epoch is safe" if kept.epoch == 1 else f"{kept.epoch} epochs are safe"
        raise Stopped(f"stopped. {safe}; the same command with --resume goes on.") from error
    if isinstance(fit, ProtocolError):
        kept.remove()
        raise fit
    return fit
