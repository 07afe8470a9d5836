"""Images as a view (`PixelView`) for networks that are trained from pixels: resized once and held as uint8.

It has what the engine and the protocol ask of a view of features (ids, labels, splits, digests, one output of so many
numbers a row), so such a network has the splits, the batches, the calibration, the measures and the run folder of a
head. Its output is called ``pixels-<height>``. N images, h and w height and width in pixels that the network sees.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import CannotWrite, NotInCache, ProtocolError
from featurecache.files.records import canonical_json
from featurecache.formatting import device_title
from featurecache.store.schema import Layout
from heads.memory import memory_for_features
from heads.models.catalogue import baseline_info

if TYPE_CHECKING:
    from featurecache.images.headers import EncodedImage
    from featurecache.images.preprocessing import Preprocess
    from featurecache.sources.base import Dataset

THREADS = min(16, os.cpu_count() or 1)  # that read and resize; nothing else computes meanwhile


class PixelView:
    """The N images of a dataset that can be read, uint8 [N,3,h,w]; in memory, or beyond it in a temporary file."""

    versions = augmented = None
    untrained = False

    def __init__(
        self, dataset: Dataset, preprocess: Preprocess, baselines: Sequence[str] = (), *, progress: bool = False
    ) -> None:
        """``baselines``: the networks that take images prepared so."""
        from featurecache.images.decoding import DECODING

        self.preprocess, self.baselines, self.source = preprocess, tuple(baselines), dataset.source
        self.output = f"pixels-{preprocess.size[0]}"
        self.path, self.name, self.label = Path(str(dataset.source["data"])), dataset.name, f"pixels/{dataset.name}"
        settings = preprocess.to_dict() | {"decoding": DECODING} | dataset.reading
        self.spec = {"kind": "pixels", "preprocess": settings}
        self.provenance = {"backbone": self.output}
        self.fingerprint = hashlib.blake2b(canonical_json(self.spec).encode(), digest_size=16).hexdigest()
        self._pixels, digests, reasons, self.loading_ms = read_images(
            dataset, range(len(dataset)), preprocess, progress=progress
        )
        self.failed = [{"id": dataset.ids[row], "reason": reasons[row]} for row in sorted(reasons)]
        gone = {failure["id"] for failure in self.failed}
        self._rows = rows = np.array([i for i, name in enumerate(dataset.ids) if name not in gone], dtype=np.int64)
        if not len(rows):
            reason = self.failed[0]["reason"] if self.failed else "it has none"
            raise ProtocolError(f"{dataset.source['data']}: no image can be read ({reason}).")
        self.classes, self.task, self.labels = list(dataset.classes), dataset.task, dataset.labels[rows]
        self.ids, self.digests = np.array(dataset.ids, object)[rows], digests[rows]
        self.splits = np.array(dataset.splits, object)[rows]
        self.groups = None if dataset.groups is None else np.array(dataset.groups, object)[rows]
        self.meta = {name: np.asarray(column)[rows] for name, column in dataset.meta.items()}

    @property
    def cost(self) -> dict[str, Any]:
        """No backbone stands before the network, so nothing but reading and resizing: milliseconds of one thread."""
        return {"forward_ms": 0.0, "loading_ms": self.loading_ms, "device": device_title("cpu"), "threads": 1,
                "busy": False}  # fmt: skip

    @property
    def outputs(self) -> dict[str, Layout]:
        return {self.output: Layout(self.output, (3, *self.preprocess.size), "uint8")}

    def info(self, output: str) -> Layout:
        if output != self.output:
            raise NotInCache(f"{self.label} holds {self.output}, which are images and no features; not {output}.")
        return self.outputs[output]

    def has(self, output: str) -> bool:
        return output == self.output

    def __len__(self) -> int:
        return len(self.ids)

    def copies(self, rows: Any = None) -> np.ndarray:
        """int64 [n, 1]: there are no stored copies; baselines draw theirs anew in every step."""
        return np.asarray(np.arange(len(self)) if rows is None else rows)[:, None]

    def tensor(self, output: str, rows: Any = None) -> torch.Tensor:
        """uint8 [n,3,h,w] in the order asked."""
        self.info(output)
        return self._pixels.index_select(0, torch.from_numpy(self._rows if rows is None else self._rows[rows]))


@exact_arithmetic()
def open_pixels(
    data: Any, baselines: Sequence[str], image_size: int | None = None, *, weights: str | None = None,
    progress: bool = False,
) -> list[PixelView]:  # fmt: skip
    """What networks are trained on: of a source as ``--data`` names it, of a dataset, or of the images of a view. One
    view for all that see images alike. ``weights``: where those of ``finetune:<backbone>`` are."""
    alike: dict[Preprocess, list[str]] = {}
    for name in baselines:
        info = baseline_info(name, weights=weights)
        alike.setdefault(info.preprocess(image_size or info.image_size), []).append(name)
    dataset = open_dataset(data)
    return [PixelView(dataset, preprocess, names, progress=progress) for preprocess, names in alike.items()]


def open_dataset(data: Any) -> Dataset:
    """That of a source as ``--data`` names it, of a view, itself, or what a function opens."""
    from featurecache.sources import open_source, reopen
    from featurecache.sources.base import Dataset

    data = data() if callable(data) else data
    if isinstance(data, Dataset):
        return data
    return reopen(data.source) if hasattr(data, "source") else open_source(data)


def resize_all(images: Sequence[EncodedImage], preprocess: Preprocess) -> tuple[torch.Tensor, dict[int, str]]:
    """uint8 [n,3,h,w] of those that can be read, and why the others cannot, by place."""
    from featurecache.extraction.pipeline import decode_many

    decoded = {k: pixels for k, pixels, _ in decode_many(images.__getitem__, range(len(images)), preprocess, THREADS)}
    failed = {place: pixels for place, pixels in decoded.items() if isinstance(pixels, str)}
    none = torch.zeros(0, 3, *preprocess.size, dtype=torch.uint8)
    return torch.cat([none, *(pixels[None] for pixels in decoded.values() if not isinstance(pixels, str))]), failed


def read_images(
    dataset: Dataset, rows: Sequence[int], preprocess: Preprocess, *, progress: bool = False
) -> tuple[torch.Tensor, np.ndarray, dict[int, str], float]:
    """Of n rows of a dataset: pixels uint8 [n,3,h,w], digests S32 [n], why some could not be read (by place), and
    milliseconds of one thread for an image: the median, as `Store.cost` has it of an extraction."""
    from featurecache.extraction.pipeline import decode_many
    from featurecache.formatting import progress_bar
    from featurecache.images.decoding import digest

    count = len(rows)
    pixels, digests = _room((count, 3, *preprocess.size)), np.zeros(count, "S32")
    reasons: dict[int, str] = {}
    seconds = np.full(count, np.nan)

    def read(place: int) -> EncodedImage:
        data = dataset.read(rows[place])
        digests[place] = digest(data).encode()
        return data

    with progress_bar(count, progress, "images") as bar:
        for place, image, took in decode_many(read, range(count), preprocess, THREADS):
            if isinstance(image, str):
                reasons[place] = image
            else:
                pixels[place], seconds[place] = image, took
            bar.update(1)
    return pixels, digests, reasons, 1000 * float(np.nanmedian(seconds)) if len(reasons) < count else 0.0


def _room(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 of ``shape``: memory, or a file without a name where that is short."""
    if int(np.prod(shape)) <= memory_for_features():
        return torch.empty(shape, dtype=torch.uint8)
    folder, needed = tempfile.gettempdir(), int(np.prod(shape))
    if (free := shutil.disk_usage(folder).free) < needed:  # a mapping that outgrows the disk ends the process (SIGBUS)
        raise CannotWrite(
            f"{shape[0]:,} images of {shape[3]}×{shape[2]} pixels take {needed / 1e9:.1f} GB, more than memory "
            f"holds or {folder} has free ({free / 1e9:.1f} GB). TMPDIR=… names another place; a smaller --image-size "
            "takes less."
        )
    with tempfile.TemporaryFile(prefix="featurecache-pixels-") as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))
