"""The images of a study: what ``--data`` names, what is fetched without it, and what ``--quick`` takes or draws."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, FeatureCacheError, SourceError
from heads.studies.spec import Images, Study

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

QUICK = {"train": 20, "val": 12, "test": 12, "": 44}  # images of a class, of each split, under --quick
SIDE = 32  # pixels of drawn images
MOST_CLASSES = 20  # under --quick
OWN = "drawn"  # the source of what is drawn


@dataclass(frozen=True)
class Given:
    """A set of images of a study, opened. ``source``: as ``--data`` has it; ``said``: what a trial takes or draws."""

    images: Images
    source: str
    dataset: Dataset
    said: str = ""

    @cached_property
    def mark(self) -> dict[str, Any]:
        """What a later command recognises the images by; of a trial see `trials`."""
        return signature(self)

    @property
    def few_in_val(self) -> list[str]:
        """Classes with too few images in the val split to choose by, where there is such a split."""
        from featurecache.commands.extract import FEW

        if self.dataset.labels.ndim == 2 or "val" not in self.dataset.splits:
            return []
        val = np.array(self.dataset.splits) == "val"
        counts = [int((val & (self.dataset.labels == c)).sum()) for c in range(len(self.dataset.classes))]
        return [f"{n} of {name}" for name, n in zip(self.dataset.classes, counts, strict=True) if n < FEW]


def sources_of(study: Study, data: Sequence[str]) -> dict[str, str]:
    """Set -> source, of what was given with ``--data`` ([SET=]SOURCE); {} where nothing was. Raises BadOption."""
    found: dict[str, str] = {}
    names = [images.name for images in study.images]
    for given in data:
        name, sign, rest = given.partition("=")
        if sign and name in names:
            found[name] = rest
        elif len(study.images) == 1:
            found[names[0]] = given
        else:
            found |= _recognised(study, given)
    return found


def names_of_sets(study: Study, data: Sequence[str]) -> set[str]:
    """Those that are given with ``--data``, else those that are part of the study when nothing is."""
    return set(sources_of(study, data)) or {images.name for images in study.images if images.default}


def _recognised(study: Study, given: str) -> dict[str, str]:
    """By the names that the sets' files and folders have: the path itself, or what lies in it."""
    path, found = Path(given).expanduser(), {}
    for images in study.images:
        itself = any(path.match(pattern) for pattern in images.known_as)
        below = [] if itself or not path.is_dir() else [p for k in images.known_as for p in sorted(path.glob(k))]
        there = [path] if itself else below
        if there:
            found[images.name] = images.local.format(path=there[0], folder=there[0].parent)
        elif given.split("@")[0] == images.source:
            found[images.name] = given
    if not found:
        names = ", ".join(images.name for images in study.images)
        raise BadOption(f"--data {given}: which set of {study.name} is it? Write --data SET={given}; sets: {names}.")
    return found


def open_sets(study: Study, data: Sequence[str], quick: bool, folder: Path, wanted: Sequence[str]) -> dict[str, Given]:
    """The sets of ``wanted``, some of `names_of_sets`, opened. Raises SourceError and BadOption."""
    from featurecache.sources import open_source

    sources = sources_of(study, data)
    given: dict[str, Given] = {}
    for images in study.images:
        if images.name not in wanted:
            continue
        if quick and not data:
            dataset = draw(images, folder / "drawn" / images.name)
            said = f"images drawn for this trial: grey squares of {SIDE} pixels, a spot by its class, and noise"
            given[images.name] = Given(images, OWN, dataset, said)
            continue
        source = sources.get(images.name, images.source)
        try:
            whole = open_source(source, columns=_columns(images, source), task=_task(images, source))
        except FeatureCacheError as error:
            raise _said_for(study, images, error, bool(data)) from error
        given[images.name] = Given(images, source, whole)
    return given


def trials(given: dict[str, Given], folder: Path) -> dict[str, Given]:
    """A few images of each set that was given; recognised by the whole of it."""
    found = {}
    for name, each in given.items():
        found[name] = each
        if not each.said:
            dataset, said = few_of(each.dataset, folder / "few" / name)
            found[name] = Given(each.images, each.source, dataset, said)
            found[name].__dict__["mark"] = each.mark
    return found


def _columns(images: Images, source: str) -> dict[str, str] | None:
    """Named where the source is of the kind that has them: a folder or table of one's own says its labels itself."""
    from featurecache.sources.published_layouts import is_chest_xray

    return images.columns if source == images.source or is_chest_xray(os.path.expanduser(source)) else None


def _task(images: Images, source: str) -> str | None:
    return images.task if source == images.source else None


def _said_for(study: Study, images: Images, error: FeatureCacheError, given: bool) -> SourceError:
    if given:
        return SourceError(str(error))
    name = f"{images.name}=" if len(study.images) > 1 else ""
    return SourceError(
        f"{study.name} needs {images.source}: {error}\n"
        f"       --data {name}DIR is a copy you have; --quick tries the study on images that it draws."
    )


def few_of(dataset: Dataset, folder: Path) -> tuple[Dataset, str]:
    """A stratified part of a dataset, ``QUICK`` images of each class and split drawn by seed 0, as a table in
    ``folder`` with copies of those images beside it; and what to say of it. Groups are kept, further columns not."""
    names, labels = np.array(dataset.splits), np.asarray(dataset.labels)
    classes = np.where(np.isnan(labels).any(1), 0, labels.argmax(1)) if labels.ndim == 2 else labels
    rng, rows = np.random.default_rng(0), []
    for split in sorted(set(dataset.splits)):
        for c in np.unique(classes[classes >= 0])[:MOST_CLASSES]:
            there = np.flatnonzero((names == split) & (classes == c))
            rows += sorted(rng.permutation(there)[: QUICK[split]].tolist())
    cells = [_cells(dataset, row) for row in rows]
    columns = [*(["label"] if labels.ndim == 1 else dataset.classes), "split", "group"]
    found = _write(folder, columns, cells, [dataset.read(row) for row in rows], dataset)
    count = len(dataset.classes)
    cut = "" if count <= MOST_CLASSES else f", the first {MOST_CLASSES} of {count} classes"
    said = f"{len(rows):,} of {len(dataset):,} images{cut}: at most {QUICK['train']} of each class of train, "
    said += f"{QUICK['val']} of val and {QUICK['test']} of test, drawn by seed 0"
    return found, said


def _cells(dataset: Dataset, row: int) -> list[Any]:
    group = dataset.groups[row] if dataset.groups else ""
    if dataset.labels.ndim == 2:
        truth = ["" if np.isnan(v) else int(v) for v in dataset.labels[row]]
    else:
        truth = [dataset.classes[int(dataset.labels[row])]]
    return [*truth, dataset.splits[row], group]


def draw(images: Images, folder: Path) -> Dataset:
    """Grey squares with a spot whose place tells the class, noise over it: enough to train on, and nothing to learn
    from."""
    rng, side = np.random.default_rng(len(images.classes)), np.arange(SIDE)
    angles = 2 * np.pi * np.arange(len(images.classes)) / len(images.classes)
    cells, pictures = [], []
    for split in ("train", "val", "test"):
        for c, name in enumerate(images.classes):
            for _ in range(QUICK[split]):
                y, x = SIDE / 2 + 7 * np.array([np.sin(angles[c]), np.cos(angles[c])]) + rng.normal(0, 4, 2)
                spot = 90 * np.exp(-((side[:, None] - y) ** 2 + (side[None] - x) ** 2) / 18)
                pictures.append(np.clip(60 + spot + rng.normal(0, 35, (SIDE, SIDE)), 0, 255).astype(np.uint8))
                cells.append([name, split, ""])
    return _write(folder, ["label", "split", "group"], cells, pictures, None, images.task)


def _write(
    folder: Path, columns: Sequence[str], cells: list[list[Any]], pictures: list[Any],
    of: Dataset | None, task: str | None = None,
) -> Dataset:  # fmt: skip
    """A table of images with the images beside it, opened; the table last. What is there and equal is not written."""
    import csv

    from featurecache.files.atomic import write_whole, writing
    from featurecache.sources import open_source

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *columns])
    with writing(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number, (row, picture) in enumerate(zip(cells, pictures, strict=True)):
            data, ending = (picture, _ending(picture)) if isinstance(picture, bytes) else (_png(picture), ".png")
            path = f"images/{number:05}{ending}"
            if not (folder / path).is_file() or (folder / path).read_bytes() != data:
                (folder / path).write_bytes(data)
            writer.writerow([path, *row])
        write_whole(folder / f"{folder.name}.csv", text.getvalue().encode())
    several = of is not None and of.labels.ndim == 2
    given = {"path": "path", "split": "split", "group": "group" if of is not None and of.groups else ""}
    given["label"] = ",".join(columns[:-2]) if several else "label"
    return open_source(folder / f"{folder.name}.csv", columns=given, task=task or (of.task if of else None))


def _png(image: Any) -> bytes:
    """What is no encoded file of its own (an array, a frame), decoded as for a backbone."""
    from PIL import Image

    from featurecache.images.decoding import decode

    pixels, data = decode(image).permute(1, 2, 0).numpy(), io.BytesIO()
    grey = bool((pixels[..., :1] == pixels).all())
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(data, "PNG")
    return data.getvalue()


def _ending(data: bytes) -> str:
    kinds = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"BM": ".bmp", b"GI": ".gif", b"II": ".tif", b"MM": ".tif"}
    return kinds.get(data[:2], ".img")


def signature(given: Given) -> dict[str, Any]:
    """What of a set decides the results, quickly had: its labels and splits by id, and its files' sizes and times."""
    import hashlib

    found, dataset = hashlib.blake2b(digest_size=16), given.dataset
    for row, name in enumerate(dataset.ids):
        path = dataset.path(row)
        found.update(
            f"{name}\0{dataset.splits[row]}\0{dataset.labels[row].tolist()}\0".encode("utf-8", "surrogatepass")
        )
        found.update(_stamp(path).encode() if path else b"")
    file = getattr(dataset.images, "file", None)
    found.update(_stamp(file).encode() if file else b"")
    return {"source": str(dataset.source.get("data")), "images": len(dataset), "digest": found.hexdigest()}


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"
