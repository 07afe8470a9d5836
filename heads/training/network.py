"""Training a network from pixels by the protocol of a head: settings, checks, and checkpoints to resume from.

A checkpoint is written after every epoch and gone when the run is there: one hidden safetensors file beside the run to
be or in the folder of a sweep, named after what is trained. It holds the network now and at its best, the optimiser,
the generator; in its header, as JSON, the epoch, the history and the schedule. The order of batches follows from the
split seed. A training that goes on gives what it would have given without the stop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featurecache.errors import BadOption, ProtocolError, RunError, Stopped, UnknownHead
from featurecache.files.records import canonical_json
from heads.models.catalogue import baseline_info, is_baseline, shape_of_network
from heads.models.common import FINETUNE
from heads.models.finetune import classifier_state, from_pretrained, save_backbone
from heads.runs.run import hash_of
from heads.runs.write import RunContents, RunTarget
from heads.settings import Settings
from heads.task import Say
from heads.training.engine import Learner, SequentialTrainer, StackedTrainer
from heads.training.job import TrainingJob, training_images_hash
from heads.training.loop import TrainedState
from heads.training.train import FittedHead, train_together

if TYPE_CHECKING:
    from featurecache.backbones.base import Backbone


def with_backbone(contents: RunContents, tuned: Any) -> RunContents:
    """The contents of the run of a `FineTuned`: a folder that ``extract`` takes, the classifier in head.safetensors."""
    return replace(contents, tensors=classifier_state(tuned), beside=partial(save_backbone, tuned))


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


def train_network(job: TrainingJob, settings: Settings, say: Say, checkpoint: Checkpoint) -> FittedHead:
    """After every epoch it is kept, to go on from."""
    try:
        (fit,) = train_together(job, [settings], say, checkpoint)
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


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training; ``request`` is all that decides what comes out."""

    path: Path
    request: dict[str, Any]

    @classmethod
    def of(cls, target: RunTarget, job: TrainingJob) -> Checkpoint:
        settings = {key: value for key, value in job.settings.to_dict().items() if key not in RESULT_INDEPENDENT}
        request = {"settings": settings, "images": training_images_hash(job), "pixels": job.view.fingerprint}
        return cls(target.parent / f".{target.stem[:100]}-{hash_of(canonical_json(request))[:12]}.checkpoint", request)

    @property
    def exists(self) -> bool:
        return self.path.exists()

    @property
    def epoch(self) -> int:
        """The epochs that are done."""
        return self._read()[1]["epoch"]

    def save(self, heads: SequentialTrainer | StackedTrainer, trained: TrainedState, epoch: int) -> None:
        from safetensors.torch import save

        from featurecache.files.atomic import write_whole

        learner = _only(heads)
        state = learner.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": value for name, value in heads.state(0).items()}
        tensors |= {f"best.{name}": value for name, value in trained.state.items()}
        tensors |= {f"optimizer.{k}.{name}": v.cpu() for k, each in state.items() for name, v in each.items()
                    if isinstance(v, torch.Tensor)}  # fmt: skip
        tensors["generator"] = learner.generator.get_state()
        record = {
            "asked": self.request, "epoch": epoch, "history": trained.history, "best_epoch": trained.epoch,
            "best": trained.best, "seconds": trained.seconds,
            "schedule": [trained.schedule.lr, trained.schedule.best, trained.schedule.bad],
        }  # fmt: skip
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        write_whole(self.path, save(contiguous, {"record": json.dumps(record)}))

    def restore(self, heads: SequentialTrainer | StackedTrainer, trained: TrainedState) -> int:
        """Put everything back as it was; the epochs that are done. Raises RunError where the file is damaged."""
        if not self.exists:
            return 0
        tensors, record = self._read()
        learner = _only(heads)
        try:
            learner.model.load_state_dict(_below("model", tensors))
            own = learner.optimizer.state_dict()
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in _below("optimizer", tensors).items():
                number, _, what = name.partition(".")
                state.setdefault(int(number), {})[what] = value
            learner.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
            learner.generator.set_state(tensors["generator"])
            trained.state, trained.history = _below("best", tensors), record["history"]
            trained.epoch, trained.seconds = record["best_epoch"], record["seconds"]
            trained.best = (record["best"][0], record["best"][1])
            trained.schedule.lr, trained.schedule.best, trained.schedule.bad = record["schedule"]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from error
        return int(record["epoch"])

    def differences_from(self, other: Path) -> list[str]:
        """What another checkpoint was asked for that this one is not."""
        theirs = Checkpoint(other, {})._read()[1].get("asked", {})
        pairs = [(self.request["settings"], theirs.get("settings", {})), (self.request, theirs)]
        return [
            name for mine, their in pairs for name in mine
            if name != "settings" and json.loads(json.dumps(mine[name])) != their.get(name)
        ]  # fmt: skip

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            whole = self.path.read_bytes()
            tensors = load(whole)
            size = int.from_bytes(whole[:8], "little")
            record = json.loads(json.loads(whole[8 : 8 + size])["__metadata__"]["record"])
            record["epoch"] = int(record["epoch"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        return tensors, record

    def _damaged(self, error: Exception) -> RunError:
        return RunError(
            f"{self.path} is damaged ({error}). --overwrite, or in a sweep removing it, begins the training anew."
        )


def _only(heads: SequentialTrainer | StackedTrainer) -> Learner:
    assert isinstance(heads, SequentialTrainer) and len(heads) == 1, "a checkpoint is of one network"
    return heads.learners[0]


def _below(word: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{word}."): value for name, value in tensors.items() if name.startswith(f"{word}.")}
