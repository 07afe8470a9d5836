"""What an interrupted training goes on from: written after every epoch, gone when the run is there.

One safetensors file, hidden, beside the run to be or in the folder of a sweep, named after what is trained: the network
now and at its best, the optimiser, the generator; in its header, as JSON, the epoch, the history and the schedule. The
order of batches needs no keeping: it follows from the split seed. A training that goes on gives what it would have
given without the stop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featurecache.errors import RunError
from featurecache.spec import canonical_json
from heads.engine import Learner, Loop, Stack
from heads.jobs import Job
from heads.joint import Trained
from heads.run_folder import Target
from heads.sweeps.keys import hashed, images_of

NOTHING = ("ram", "device")  # settings that decide nothing of the result


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training; ``asked`` is all that decides what comes out."""

    path: Path
    asked: dict[str, Any]

    @classmethod
    def of(cls, target: Target, job: Job) -> Checkpoint:
        settings = {key: value for key, value in job.settings.to_dict().items() if key not in NOTHING}
        asked = {"settings": settings, "images": images_of(job), "pixels": job.view.fingerprint}
        return cls(target.parent / f".{target.stem[:100]}-{hashed(canonical_json(asked))[:12]}.checkpoint", asked)

    @property
    def there(self) -> bool:
        return self.path.exists()

    @property
    def epoch(self) -> int:
        """The epochs that are done."""
        return self._read()[1]["epoch"]

    def save(self, heads: Loop | Stack, trained: Trained, epoch: int) -> None:
        from safetensors.torch import save

        from featurecache.files import write_whole

        learner = _only(heads)
        state = learner.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": value for name, value in heads.state(0).items()}
        tensors |= {f"best.{name}": value for name, value in trained.state.items()}
        tensors |= {f"optimizer.{k}.{name}": v.cpu() for k, each in state.items() for name, v in each.items()
                    if isinstance(v, torch.Tensor)}  # fmt: skip
        tensors["generator"] = learner.generator.get_state()
        record = {
            "asked": self.asked, "epoch": epoch, "history": trained.history, "best_epoch": trained.epoch,
            "best": trained.best, "seconds": trained.seconds,
            "schedule": [trained.schedule.lr, trained.schedule.best, trained.schedule.bad],
        }  # fmt: skip
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        write_whole(self.path, save(contiguous, {"record": json.dumps(record)}))

    def restore(self, heads: Loop | Stack, trained: Trained) -> int:
        """Put everything back as it was; the epochs that are done. Raises RunError where the file is damaged."""
        if not self.there:
            return 0
        tensors, record = self._read()
        learner = _only(heads)
        try:
            learner.model.load_state_dict(_below("model", tensors))
            own = learner.optimizer.state_dict()
            kept: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in _below("optimizer", tensors).items():
                number, _, what = name.partition(".")
                kept.setdefault(int(number), {})[what] = value
            learner.optimizer.load_state_dict({"state": kept, "param_groups": own["param_groups"]})
            learner.generator.set_state(tensors["generator"])
            trained.state, trained.history = _below("best", tensors), record["history"]
            trained.epoch, trained.seconds = record["best_epoch"], record["seconds"]
            trained.best = (record["best"][0], record["best"][1])
            trained.schedule.lr, trained.schedule.best, trained.schedule.bad = record["schedule"]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from error
        return int(record["epoch"])

    def differing(self, other: Path) -> list[str]:
        """What another checkpoint was asked for that this one is not."""
        theirs = Checkpoint(other, {})._read()[1].get("asked", {})
        pairs = [(self.asked["settings"], theirs.get("settings", {})), (self.asked, theirs)]
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


def _only(heads: Loop | Stack) -> Learner:
    assert isinstance(heads, Loop) and len(heads) == 1, "a checkpoint is of one network"
    return heads.learners[0]


def _below(word: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{word}."): value for name, value in tensors.items() if name.startswith(f"{word}.")}
