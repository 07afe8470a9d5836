"""Images of a study: what ``--data`` names, what is fetched without it, and the few that ``--quick`` takes or draws."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, FeatureCacheError, SourceError, UnreadableImage
from featurecache.files.atomic import write_whole, writing
from heads.explanations.explainer import encode_image
from heads.studies.spec import ImageSet, OpenedSet, Study

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

QUICK = {"train": 20, "val": 12, "test": 12, "": 44}  # images of a class, of each split, under --quick
SIDE = 32  # pixels of drawn images
MOST_CLASSES = 20  # under --quick
SAMPLED, SAMPLES = 12, 6  # classes of which pictures are shown, and how many of each
ROWS = 40  # classes in the table of a set
_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"BM": ".bmp", b"GI": ".gif", b"II": ".tif", b"MM": ".tif"}


def sources_of(study: Study, data: Sequence[str]) -> dict[str, str]:
    """Set -> source, of what was given with ``--data`` ([SET=]SOURCE); {} where nothing was. Raises BadOption."""
    sources: dict[str, str] = {}
    names = [images.name for images in study.images]
    for text in data:
        name, sign, rest = text.partition("=")
        if sign and name in names:
            sources[name] = rest
        elif len(names) == 1:
            sources[names[0]] = text
        else:
            sources |= _recognised(study, text)
    return sources


def names_of_sets(study: Study, data: Sequence[str]) -> set[str]:
    """Those that are given with ``--data``, else those that are part of the study when nothing is."""
    return set(sources_of(study, data)) or {images.name for images in study.images if images.default}


def _recognised(study: Study, text: str) -> dict[str, str]:
    """By the names that the sets' files and folders have: the path itself, or what lies in it."""
    path, sources = Path(text).expanduser(), {}
    for images in study.images:
        itself = any(path.match(pattern) for pattern in images.aliases)
        below = [p for alias in images.aliases for p in sorted(path.glob(alias))] if path.is_dir() else []
        if match := [path] if itself else below:
            sources[images.name] = images.local.format(path=match[0], folder=match[0].parent)
        elif text.split("@")[0] == images.source:
            sources[images.name] = text
    if not sources:
        names = ", ".join(images.name for images in study.images)
        raise BadOption(f"--data {text}: which set of {study.name} is it? Write --data SET={text}; sets: {names}.")
    return sources


def open_sets(
    study: Study, data: Sequence[str], quick: bool, folder: Path, wanted: Sequence[str]
) -> dict[str, OpenedSet]:
    """The sets of ``wanted``, some of `names_of_sets`, opened. Raises SourceError and BadOption."""
    from featurecache.sources import open_source
    from featurecache.sources.published_layouts import is_chest_xray

    sources = sources_of(study, data)
    opened: dict[str, OpenedSet] = {}
    for images in (each for each in study.images if each.name in wanted):
        if quick and not data:
            dataset = draw_images(images, folder / "drawn" / images.name)
            what = f"images drawn for this trial: grey squares of {SIDE} pixels, a spot by its class, and noise"
            opened[images.name] = OpenedSet(images, "drawn", dataset, what)
            continue
        source = sources.get(images.name, images.source)
        own = source == images.source  # a folder or table of one's own says its labels itself
        columns = images.columns if own or is_chest_xray(os.path.expanduser(source)) else None
        try:
            dataset = open_source(source, columns=columns, task=images.task if own else None)
        except FeatureCacheError as error:
            if data:
                raise SourceError(str(error)) from error
            name = f"{images.name}=" if len(study.images) > 1 else ""
            raise SourceError(
                f"{study.name} needs {images.source}: {error}\n"
                f"       --data {name}DIR is a copy you have; --quick tries the study on images that it draws."
            ) from error
        opened[images.name] = OpenedSet(images, source, dataset)
    return opened


def trials(opened: dict[str, OpenedSet], folder: Path) -> dict[str, OpenedSet]:
    """A few images of each set that was given."""
    few = dict(opened)
    for name, each in opened.items():
        if not each.drawn:
            dataset, what = few_of(each.dataset, folder / "few" / name)
            few[name] = replace(each, dataset=dataset, drawn=what)
    return few


def few_of(dataset: Dataset, folder: Path) -> tuple[Dataset, str]:
    """A stratified part of a dataset, ``QUICK`` images of each class and split drawn by seed 0, as a table in
    ``folder`` with copies of those images beside it; and what to say of it. Groups are kept, further columns not."""
    names, labels = np.array(dataset.splits), np.asarray(dataset.labels)
    classes = np.where(np.isnan(labels).any(1), 0, labels.argmax(1)) if labels.ndim == 2 else labels
    rng, rows = np.random.default_rng(0), []
    for split in sorted(set(dataset.splits)):
        for c in np.unique(classes[classes >= 0])[:MOST_CLASSES]:
            members = np.flatnonzero((names == split) & (classes == c))
            rows += sorted(rng.permutation(members)[: QUICK[split]].tolist())
    cells = [_cells(dataset, row) for row in rows]
    columns = [*(["label"] if labels.ndim == 1 else dataset.classes), "split", "group"]
    few = _write(folder, columns, cells, [dataset.read(row) for row in rows], dataset, dataset.task)
    count = len(dataset.classes)
    cut = "" if count <= MOST_CLASSES else f", the first {MOST_CLASSES} of {count} classes"
    text = f"{len(rows):,} of {len(dataset):,} images{cut}: at most {QUICK['train']} of each class of train, "
    return few, text + f"{QUICK['val']} of val and {QUICK['test']} of test, drawn by seed 0"


def _cells(dataset: Dataset, row: int) -> list[Any]:
    group = dataset.groups[row] if dataset.groups else ""
    if dataset.labels.ndim == 2:
        truth = ["" if np.isnan(v) else int(v) for v in dataset.labels[row]]
    else:
        truth = [dataset.classes[int(dataset.labels[row])]]
    return [*truth, dataset.splits[row], group]


def draw_images(images: ImageSet, folder: Path) -> Dataset:
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
    folder: Path, columns: Sequence[str], cells: list[list[Any]], pictures: list[Any], of: Dataset | None,
    task: str | None,
) -> Dataset:  # fmt: skip
    """A table of images with the images beside it, opened; the table last. What is there and equal is not written."""
    from featurecache.sources import open_source

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *columns])
    with writing(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number, (row, picture) in enumerate(zip(cells, pictures, strict=True)):
            data = picture if isinstance(picture, bytes) else _png(picture)
            ending = _ENDINGS.get(data[:2], ".img")
            path = f"images/{number:05}{ending}"
            if not (folder / path).is_file() or (folder / path).read_bytes() != data:
                (folder / path).write_bytes(data)
            writer.writerow([path, *row])
        write_whole(folder / f"{folder.name}.csv", text.getvalue().encode())
    named = {"path": "path", "split": "split", "group": "group" if of is not None and of.groups else ""}
    named["label"] = ",".join(columns[:-2]) if of is not None and of.labels.ndim == 2 else "label"
    return open_source(folder / f"{folder.name}.csv", columns=named, task=task)


def _png(image: Any) -> bytes:
    """What is no encoded file of its own (an array, a frame), decoded as for a backbone."""
    from PIL import Image

    from featurecache.images.decoding import decode

    pixels, data = decode(image).permute(1, 2, 0).numpy(), io.BytesIO()
    grey = bool((pixels[..., :1] == pixels).all())
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(data, "PNG")
    return data.getvalue()


def signature(opened: OpenedSet) -> dict[str, Any]:
    """What a later command recognises a set by, quickly had: labels and splits by id, and its files' sizes and times.
    Of a trial it is that of the whole set."""
    dataset, hashed = opened.dataset, hashlib.blake2b(digest_size=16)
    for row, name in enumerate(dataset.ids):
        text = f"{name}\0{dataset.splits[row]}\0{dataset.labels[row].tolist()}\0"
        hashed.update(text.encode("utf-8", "surrogatepass") + _stamp(dataset.path(row)))
    hashed.update(_stamp(getattr(dataset.images, "file", None)))
    return {"source": str(dataset.source.get("data")), "images": len(dataset), "digest": hashed.hexdigest()}


def _stamp(path: str | None) -> bytes:
    try:
        status = os.stat(path) if path else None
    except OSError:
        return b"gone"
    return f"{status.st_size} {status.st_mtime_ns}".encode() if status else b""


def set_context(opened: OpenedSet, digests: np.ndarray, images: bool) -> dict[str, Any]:
    """What the page of a study shows of a set: counts by class and split, sizes, copies, and a few of the images.
    ``digests``: S32 [N]."""
    from featurecache.sources.summary import copies_text, describe_dataset

    about = describe_dataset(opened.dataset, digests)
    rows = [(label, [*counts, sum(counts)]) for label, counts in zip(about.classes, about.counts, strict=True)]
    if len(rows) > ROWS:
        rest = [sum(column) for column in zip(*(counts for _, counts in rows[ROWS:]), strict=True)]
        rows = [*rows[:ROWS], (f"{len(rows) - ROWS} more", rest)]
    if any(about.unlabelled):
        rows.append(("without a label", [*about.unlabelled, sum(about.unlabelled)]))
    sizes = list(dict.fromkeys(f"{w:,}×{h:,}" for w, h in about.sizes.values()))
    kinds = {0: "", 1: "", 2: "smallest, largest", 3: "smallest, median, largest"}[len(sizes)]
    notes = "; ".join(
        filter(None, [kinds, "" if about.looked_at == about.images else f"{about.looked_at:,} looked at"])
    )
    facts = {
        "task": about.task, "images": f"{about.images:,}",
        "sizes": f"{' · '.join(sizes)} pixels{f' ({notes})' if notes else ''}" if sizes else None,
        "pixels": " · ".join(f"{kind} {count:,}" for kind, count in about.kinds.items()),
        "copies": "not counted" if about.copies is None else copies_text(about.copies),
        "unreadable": f"{len(about.unreadable)} of those looked at" if about.unreadable else None,
        "notes": " ".join(about.notes),
    }  # fmt: skip
    return {
        "title": opened.images.name, "ran_on": f"It ran on {opened.drawn or opened.source}.",
        "kind": "label" if about.task == "multilabel" else "class",
        "splits": [split or "no split" for split in about.splits],
        "rows": [*rows, ("images", [*about.totals, about.images])],
        "facts": [(word, value) for word, value in facts.items() if value],
        "samples": _samples(opened.dataset) if images else [],
    }  # fmt: skip


def _samples(dataset: Dataset) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(class, pictures as (data URI, width, height)): a few of each of the first classes, evenly spread over train."""
    from featurecache.sources.summary import evenly_spaced, in_class

    train, samples = np.array(dataset.splits) == "train", []
    for c, name in enumerate(dataset.classes[:SAMPLED]):
        members = in_class(dataset, c)
        rows = np.flatnonzero(members & train) if (members & train).any() else np.flatnonzero(members)
        pictures = list(_pictures(dataset, evenly_spaced(rows, SAMPLES).tolist() if len(rows) else []))
        samples += [(name, pictures)] if pictures else []
    return samples


def _pictures(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    from featurecache.images.decoding import decode

    for row in rows:
        try:
            uri, size = encode_image(np.ascontiguousarray(decode(dataset.read(row)).permute(1, 2, 0).numpy()))
        except UnreadableImage:
            continue
        yield uri, *size
