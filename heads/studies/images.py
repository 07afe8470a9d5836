"""Images of a study: what ``--data`` names, what is fetched without it, and the few that ``--quick`` takes or draws."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, FeatureCacheError, SourceError, UnreadableImage, nearest
from featurecache.files.atomic import write_whole, writing
from featurecache.formatting import shell_word
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
        names, (name, sign, source) = [images.name for images in study.images], text.partition("=")
        near, source = (nearest(name, names), source) if sign else ("", text)
        which = f"which set of {study.name} is it? Write --data SET={shell_word(source)}; "
        raise BadOption(f"--data {text}: {which}sets: {', '.join(names)}.{near}")
    return sources


def open_sets(
    study: Study, sources: dict[str, str], quick: bool, folder: Path, wanted: Sequence[str]
) -> dict[str, OpenedSet]:
    """The sets of ``wanted``, of ``sources`` where these were given. Raises SourceError and BadOption."""
    from featurecache.sources import open_source
    from featurecache.sources.published_layouts import is_chest_xray

    opened: dict[str, OpenedSet] = {}
    for images in (each for each in study.images if each.name in wanted):
        if quick and not sources:
            dataset = draw_images(images, folder / "drawn" / images.name)
            what = f"images drawn for this trial: squares of {SIDE} pixels, a spot whose colour tells the class, noise"
            opened[images.name] = OpenedSet(images, "drawn", dataset, what)
            continue
        source = sources.get(images.name, images.source)
        own = source == images.source  # a folder or table of one's own says its labels itself
        columns = images.columns if own or is_chest_xray(os.path.expanduser(source)) else None
        try:
            dataset = open_source(source, columns=columns, task=images.task if own else None)
        except FeatureCacheError as error:
            if sources:
                raise SourceError(str(error)) from error
            name = f"{images.name}=" if len(study.images) > 1 else ""
            raise SourceError(
                f"{study.name} needs {images.source}: {error}\n"
                f"       --data {name}DIR is a copy you have; --quick tries the study on images that it draws."
            ) from error
        opened[images.name] = OpenedSet(images, source, dataset)
    return opened


def few_of(opened: OpenedSet, folder: Path) -> OpenedSet:
    """A stratified part of a set, ``QUICK`` images of each class and split drawn by seed 0, as a table in ``folder``
    with copies of those images beside it. Groups are kept, further columns not."""
    dataset, labels, splits = opened.dataset, opened.dataset.labels, np.array(opened.dataset.splits)
    several, classes, groups = labels.ndim == 2, list(dataset.classes), dataset.groups
    first = np.where(np.isnan(labels).any(1), 0, labels.argmax(1)) if several else labels
    rng, rows = np.random.default_rng(0), []
    for split in sorted(set(dataset.splits)):
        for c in np.unique(first[first >= 0])[:MOST_CLASSES]:
            members = np.flatnonzero((splits == split) & (first == c))
            rows += sorted(rng.permutation(members)[: QUICK[split]].tolist())
    cells: list[list[Any]] = []
    for row in rows:
        truth = ["" if np.isnan(v) else int(v) for v in labels[row]] if several else [classes[int(labels[row])]]
        cells.append([*truth, dataset.splits[row], groups[row] if groups else ""])
    pictures = [dataset.read(row) for row in rows]
    few = _write(folder, classes if several else ["label"], cells, pictures, dataset.task, bool(groups), classes)
    cut = "" if len(classes) <= MOST_CLASSES else f", the first {MOST_CLASSES} of {len(classes)} classes"
    text = f"{len(rows):,} of {len(dataset):,} images{cut}: at most {QUICK['train']} of each class of train, "
    text += f"{QUICK['val']} of val and {QUICK['test']} of test, drawn by seed 0"
    return replace(opened, dataset=few, drawn=text)


def draw_images(images: ImageSet, folder: Path) -> Dataset:
    """Grey squares with a spot whose colour tells the class, and noise: what small networks learn in a few epochs, the
    same when it is turned, flipped or moved, and nothing to learn from."""
    rng, side = np.random.default_rng(len(images.classes)), np.arange(SIDE)
    hues = np.arange(len(images.classes)) / len(images.classes)
    colours = 0.5 + 0.5 * np.cos(2 * np.pi * (hues[:, None] - np.arange(3) / 3))  # [C, 3]
    cells, pictures = [], []
    for split in ("train", "val", "test"):
        for c, name in enumerate(images.classes):
            for _ in range(QUICK[split]):
                y, x = SIDE / 2 + rng.normal(0, 3, 2)
                spot = np.exp(-((side[:, None] - y) ** 2 + (side[None] - x) ** 2) / 60)[..., None] * colours[c]
                pictures.append(np.clip(50 + 150 * spot + rng.normal(0, 15, spot.shape), 0, 255).astype(np.uint8))
                cells.append([name, split, ""])
    return _write(folder, ["label"], cells, pictures, images.task, False, images.classes)


def _write(
    folder: Path, labels: Sequence[str], cells: list[list[Any]], pictures: list[Any], task: str | None, grouped: bool,
    classes: Sequence[str],
) -> Dataset:  # fmt: skip
    """A table of images with the images beside it, opened; the table last. What is there and equal is not written."""
    from featurecache.sources import open_source

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *labels, "split", "group"])
    with writing(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number, (row, picture) in enumerate(zip(cells, pictures, strict=True)):
            data = picture if isinstance(picture, bytes) else _png(picture)
            path = f"images/{number:05}{_ENDINGS.get(data[:2], '.img')}"
            if not (folder / path).is_file() or (folder / path).read_bytes() != data:
                (folder / path).write_bytes(data)
            writer.writerow([path, *row])
        write_whole(folder / f"{folder.name}.csv", text.getvalue().encode())
    columns = {"path": "path", "split": "split", "group": "group" if grouped else "", "label": ",".join(labels)}
    there = {row[0] for row in cells}
    order = [name for name in classes if name in there] if task == "ordinal" else None
    return open_source(folder / f"{folder.name}.csv", columns=columns, task=task, order=order)


def _pixels(image: Any) -> np.ndarray:
    """uint8 [H, W, 3], decoded as for a backbone."""
    from featurecache.images.decoding import decode

    return np.ascontiguousarray(decode(image).permute(1, 2, 0).numpy())


def _png(image: Any) -> bytes:
    """What is no encoded file of its own (an array, a frame)."""
    from PIL import Image

    pixels, data = _pixels(image), io.BytesIO()
    grey = bool((pixels[..., :1] == pixels).all())
    Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels).save(data, "PNG")
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
    """What the page of a study shows of a set: counts by class and split, sizes, duplicates, and a few of the images.
    ``digests``: S32 [N]."""
    from featurecache.sources.summary import describe_dataset, duplicates_text

    about = describe_dataset(opened.dataset, digests)
    rows = list(zip(about.classes, about.counts, strict=True))
    if rest := about.counts[ROWS:]:
        rows = [*rows[:ROWS], (f"{len(rest)} more", [sum(column) for column in zip(*rest, strict=True)])]
    rows += [("without a label", about.unlabelled)] if any(about.unlabelled) else []
    sizes = list(dict.fromkeys(f"{w:,}×{h:,}" for w, h in about.sizes.values()))
    notes = [{2: "smallest, largest", 3: "smallest, median, largest"}.get(len(sizes), "")]
    notes += ["" if about.looked_at == about.images else f"{about.looked_at:,} looked at"]
    note = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
    facts = {
        "task": about.task, "images": f"{about.images:,}",
        "sizes": f"{' · '.join(sizes)} pixels{note}" if sizes else None,
        "pixels": " · ".join(f"{kind} {count:,}" for kind, count in about.kinds.items()),
        "duplicates": about.duplicates and duplicates_text(about.duplicates),
        "unreadable": f"{len(about.unreadable)} of those looked at" if about.unreadable else None,
        "notes": " ".join(about.notes),
    }  # fmt: skip
    return {
        "title": opened.images.name, "ran_on": f"It ran on {opened.drawn or opened.source}.",
        "kind": "label" if about.task == "multilabel" else "class",
        "splits": [split or "no split" for split in about.splits],
        "rows": [*((name, [*counts, sum(counts)]) for name, counts in rows), ("images", [*about.totals, about.images])],
        "facts": [(word, value) for word, value in facts.items() if value],
        "samples": _samples(opened.dataset) if images else [],
    }  # fmt: skip


def _samples(dataset: Dataset) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(class, pictures as (data URI, width, height)): a few of each of the first classes, evenly spread over train."""
    from featurecache.sources.summary import evenly_spaced, in_class

    train, samples = np.array(dataset.splits) == "train", []
    for c, name in enumerate(dataset.classes[:SAMPLED]):
        members, pictures = in_class(dataset, c), []
        rows = np.flatnonzero(members & train if (members & train).any() else members)
        for row in evenly_spaced(rows, SAMPLES).tolist():
            with suppress(UnreadableImage):
                uri, size = encode_image(_pixels(dataset.read(row)))
                pictures.append((uri, *size))
        samples += [(name, pictures)] if pictures else []
    return samples
