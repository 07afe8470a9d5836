"""Finished heads that wait for the choice: a file each in a hidden folder of the sweep, until their family is decided.

Only a help: what is missing or damaged here (after a power failure; nothing is synced) is trained again, in the same
company, to the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash

from heads.contents import clusters_of
from heads.jobs import Job
from heads.run_folder import Contents

FOLDER = ".unchosen"
_DIGITS = 16  # of the checksum that a file begins with


class Shelf:
    def __init__(self, sweep: Path) -> None:
        self.folder = sweep / FOLDER
        for torn in self.folder.glob(".*.tmp"):
            torn.unlink()

    def put(self, key: str, contents: Contents) -> None:
        """All of ``contents`` that is not the view's or the splits'."""
        from safetensors.torch import save

        record = {"config": contents.config, "metrics": contents.metrics, "history": contents.history}
        tensors = {f"head.{name}": tensor for name, tensor in contents.tensors.items()}
        for split, (_, logits) in contents.predictions.items():
            tensors[split] = torch.from_numpy(np.ascontiguousarray(logits))
        data = save(tensors, {"record": json.dumps(record)})
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f".{key}.tmp"
        temporary.write_bytes(xxhash.xxh3_64_hexdigest(data).encode() + data)
        os.replace(temporary, self._path(key))

    def take(self, key: str, job: Job) -> Contents | None:
        """As it was put there, None where it is not."""
        from safetensors.torch import load

        try:
            whole = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        check, data = whole[:_DIGITS], whole[_DIGITS:]
        if xxhash.xxh3_64_hexdigest(data).encode() != check:
            return None
        size = int.from_bytes(data[:8], "little")
        record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])
        tensors = load(data)
        return Contents(
            record["config"], record["metrics"], record["history"],
            {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")},
            list(job.view.ids), job.divided.names, job.task.labels,
            {split: (job.divided.rows(split), tensors[split].numpy()) for split in ("val", "test")},
            np.asarray(job.view.digests), clusters_of(job.view),
        )  # fmt: skip

    def clear(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
