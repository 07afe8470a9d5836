"""Use a run on new images: class and calibrated probability of each, as records.

The pixels go through the same backbone, precision and rounding as the store that the head was trained on
(``featurecache.compute``), then through the head, its prior correction and its temperature.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from featurecache.errors import BadOption, FeatureCacheError, UnknownSourceName, UnreadableImage, nearest
from featurecache.files.storage import is_address
from featurecache.formatting import abbreviated, aligned, counted, one_line, with_addresses
from featurecache.images.decoding import digest, image_header
from featurecache.images.headers import read_by
from featurecache.sources.summary import LOOKED_AT, dark_pixels
from featurecache.sources.vocabulary import spelling_key
from featurecache.store.remote_cache import local_place
from heads.evaluation.external import overlap
from heads.evaluation.subgroups import cell_text
from heads.metrics.calibration import predict_labels, probabilities
from heads.pixel_view import resize_all
from heads.runs.run import Run, is_pixels, preprocess_of
from heads.runs.write import csv_bytes

if TYPE_CHECKING:
    from featurecache.images.headers import EncodedImage
    from featurecache.sources.base import Dataset

ARCHIVES = (".npz", ".tar")  # arguments that hold many images, as tables do; every other file is one image
HELD = 512 * 2**20, 2_048  # bytes and number of images in memory before they are computed
Image = Any  # a path, encoded bytes, an array [H, W] or [H, W, 3], a PIL image; an array [N, H, W, 3] is N of them


class NewImage(NamedTuple):
    """An image to be predicted; ``data`` as text is the reason why it cannot be read."""

    name: str
    data: Any
    words: tuple[str, ...] = ()  # what its folders are called, or what its table says: one may be its class


def predict_images(
    run: Run,
    images: Image | Iterable[Image],
    *,
    columns: dict[str, str] | None = None,
    device: str = "auto",
    weights: str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One record an image, in the order given; folders, tables and .npz files give all their images.

    {"image", "class", "probability", "probabilities": {class: p}}; multi-label: "classes", "probabilities"; an image
    that could not be read: {"image", "error"}; "label" where one of its folders is called as a class of the run, or
    its table has a column of labels with that class. ``columns``: of tables, {"path": …, "label": …}.
    A binary task predicts by the threshold chosen on val, so "probability", of the predicted class, can be
    below one half. ``weights``: where the backbone's are now, if not where they were. Raises BadOption, RunError; the
    backbone's errors as in extract.
    """
    if is_pixels(run) and weights:
        raise BadOption("--weights is for a backbone; the network of this run lies in its folder. Leave it out.")
    if unknown := [role for role in columns or () if role not in ("path", "label")]:
        near = nearest(unknown[0], ("path", "label"))
        raise BadOption(f"--column of predict names path or label, not {unknown[0]!r}.{near}")
    run.model  # noqa: B018  a head that does not load is found before the backbone is
    records: list[dict[str, Any]] = []
    measured: list[bytes] = []
    source = run.config["view"].get("source") or {}
    for part in in_parts(iterate_images(images_of(images), columns, source.get("page")), _bytes_of, HELD):
        if say and not records:
            _say_how(run, part, say)
        records += (own := _predict_part(run, part, device, weights))
        if say:
            measured += [digest(i.data).encode() for i, record in zip(part, own, strict=True) if _is_measured(record)]
    if say:
        failed = sum("error" in record for record in records)
        unread = f"; {failed:,} could not be read" if failed else ""
        say(f"predicted  {counted(len(records) - failed, 'image')}{unread}")
        if found := accuracy_of(records):
            other = len(records) - failed - found[1]
            rest = f"; {counted(other, 'other')} called as none of its classes" if other else ""
            known = f"{counted(found[1], 'image')} whose class is known by folder or table"
            say(f"accuracy   {found[0]:.3f} of {known}{rest}")
            for note in overlap(run, measured):
                say(f"warning    {note}")
    return records


def _say_how(run: Run, part: list[NewImage], say: Callable[[str], None]) -> None:
    """The threshold that decides of two classes, and whether images are darker than the head may expect."""
    if run.task == "binary":
        name, cut = one_line(run.config["positive"]), run.calibration.thresholds[0]
        say(f"threshold  {name} from {cut:.3f} on, as chosen on val")
    looks = []
    for image in part[:LOOKED_AT]:
        with contextlib.suppress(UnreadableImage):
            looks += [] if isinstance(image.data, str) else [image_header(image.data)]
    if "bits" not in run.config["spec"]["preprocess"] and (dark := dark_pixels(looks)):
        say(f"warning    {dark[1]}; this run was made without --bits")


def _is_measured(record: dict[str, Any]) -> bool:
    return "label" in record and "class" in record


def accuracy_of(records: Iterable[dict[str, Any]]) -> tuple[float, int] | None:
    """The share of the images with a "label" that are called so, and how many these are; None without any."""
    hits = [record["class"] == record["label"] for record in records if _is_measured(record)]
    return (sum(hits) / len(hits), len(hits)) if hits else None


def images_of(images: Image | Iterable[Image]) -> list[Image]:
    """One image, or several, as a list. Raises BadOption for what is none."""
    from featurecache.sources.in_memory import is_pil

    if isinstance(images, np.ndarray) and images.ndim == 4:
        return list(images)
    one = isinstance(images, str | os.PathLike | bytes | np.ndarray) or is_pil(images)
    table = isinstance(images, Mapping) or hasattr(images, "columns")  # which would give the names of its columns
    if not one and (table or not isinstance(images, Iterable)):
        raise BadOption(f"the images are {type(images).__name__}; {_EXPECTED}.")
    return [images] if one else list(images)


_EXPECTED = "expected paths, encoded bytes, arrays uint8 [H, W] or [H, W, 3], or PIL images"


def iterate_images(
    given: list[Image], columns: dict[str, str] | None = None, page: str | None = None
) -> Iterator[NewImage]:
    """Each image as encoded bytes or array, or the reason why it cannot be read; of DICOM each frame. ``page``: see
    `featurecache.open_source`."""
    from featurecache.sources import mirrored_source
    from featurecache.sources.base import read_file
    from featurecache.sources.dicom_frames import images_in_file
    from featurecache.sources.in_memory import encoded_of_pil, is_pil
    from featurecache.sources.tables import is_table

    for number, image in enumerate(given, start=1):
        if isinstance(image, bytes | np.ndarray):
            yield NewImage(f"image {number}", image)
        elif is_pil(image):
            yield NewImage(f"image {number}", _read(lambda image=image: encoded_of_pil(image)))  # type: ignore[misc]
        elif not isinstance(image, str | os.PathLike):
            raise BadOption(f"image {number} is {type(image).__name__}; {_EXPECTED}.")
        elif is_address(image):
            here = iterate_images([mirrored_source(image)], columns, page)
            yield from (each._replace(name=with_addresses(each.name)) for each in here)
        elif Path(image).is_dir() or is_table(str(image)) or Path(image).suffix.lower() in ARCHIVES:
            yield from _source(image, columns, page)
        else:
            data = _read(lambda path=image: read_file(os.fspath(path)))  # type: ignore[misc]
            images = images_in_file(str(image), data, page) if isinstance(data, bytes) else [(str(image), data)]
            yield from (NewImage(*each) for each in images)


def _source(data: str | os.PathLike[str], columns: dict[str, str] | None, page: str | None) -> Iterator[NewImage]:
    from featurecache.sources import open_images

    folder = Path(data).is_dir()
    dataset = open_images(data, columns=None if folder else columns, page=page if folder else None)
    words = _words(dataset, (columns or {}).get("label"))
    for i, name in enumerate(dataset.ids):
        shown = os.path.join(data, name) if folder else name
        yield NewImage(shown, _read(lambda i=i: dataset.read(i)), words[i])  # type: ignore[misc]


def _words(dataset: Dataset, column: str | None) -> list[tuple[str, ...]]:
    """Of each image of a source the words of which one may be its class."""
    from featurecache.sources.labels import role_columns

    kind = dataset.source["kind"]
    if column is not None and kind == "table" and column not in dataset.meta:
        there = f"{abbreviated(list(dataset.meta), 8)}.{nearest(column, dataset.meta)}"
        raise UnknownSourceName(f"{dataset.source['data']} has no column {column!r} for the label; it has {there}")
    if kind == "folder":
        return [tuple(name.split("/")[:-1]) for name in dataset.ids]
    if kind == "table":
        names = [column] if column is not None else role_columns("label", dataset.meta)
        return [tuple(cell_text(dataset.meta[name][row]) for name in names) for row in range(len(dataset))]
    single = dataset.labels.ndim == 1
    return [(dataset.classes[k],) if single and k >= 0 else () for k in dataset.labels.tolist()]


def _read(reader: Callable[[], EncodedImage]) -> EncodedImage | str:
    try:
        return reader()
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except FeatureCacheError as error:
        return str(error)


def _bytes_of(image: NewImage) -> int:
    return image.data.nbytes if isinstance(image.data, np.ndarray) else len(image.data)


def in_parts(images: Iterable[Any], size_of: Callable[[Any], int], most: tuple[int, int]) -> Iterator[list[Any]]:
    """In pieces of at most about ``most``: sizes together, and images."""
    part: list[Any] = []
    size = 0
    for image in images:
        part.append(image)
        size += size_of(image)
        if size >= most[0] or len(part) >= most[1]:
            yield part
            part, size = [], 0
    if part:
        yield part


def _predict_part(run: Run, part: list[NewImage], device: str, weights: str | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    called = _spellings(run.classes) if run.task != "multilabel" else {}
    for name, data, words in part:
        labels = {called[key] for word in words if (key := word if word in called else spelling_key(word)) in called}
        label = {"label": labels.pop()} if len(labels) == 1 else {}
        records.append({"image": name, **label, **({"error": data} if isinstance(data, str) else {})})
    readable = [(record, each.data) for record, each in zip(records, part, strict=True) if "error" not in record]
    if not readable:
        return records
    features, reasons = _features(run, [data for _, data in readable], device, weights)
    assert len(features) == len(readable) - len(reasons), "a row for every image that is not a failure"
    if is_pixels(run):  # heads on features are computed on the CPU
        from featurecache.extraction.forward import pick_device

        logits = run.logits(features, pick_device(device).type)
    else:
        logits = run.logits(features)
    computed = iter(prediction_records(run, logits))
    for place, (record, _) in enumerate(readable):
        record.update({"error": reasons[place]} if place in reasons else next(computed))
    return records


def _spellings(classes: Sequence[str]) -> dict[str, str]:
    """Class by what it may be called: its name, and any spelling that is no other's."""
    keys = [spelling_key(name) for name in classes]
    own = {key: name for key, name in zip(keys, classes, strict=True) if keys.count(key) == 1}
    return own | {name: name for name in classes}


def _features(run: Run, images: list[Any], device: str, weights: str | None) -> tuple[torch.Tensor, dict[int, str]]:
    """What the head of a run is given of images [n, ...], and why it is not of some, by place."""
    if is_pixels(run):
        reading = run.config["spec"]["preprocess"]
        return resize_all([read_by(image, reading) for image in images], preprocess_of(run))
    import featurecache

    like = cast(Any, store_of(run))  # what of a view names its store
    features, failed = featurecache.compute(
        images, like=like, output=run.output, device=device, weights=weights, trust_code=run.trust_code
    )
    return features, dict(failed)


def store_of(run: Run) -> SimpleNamespace:
    """What new images are computed like: the store of a run, which need not be there any more."""
    view = run.config["view"]
    own = {name: run.config[name] for name in ("spec", "provenance")}
    store = local_place(view["path"]).parent  # for its plan and canary
    return SimpleNamespace(**own, label=view["label"], store=store)


def prediction_records(run: Run, logits: np.ndarray) -> list[dict[str, Any]]:
    """What is said of each image, from calibrated logits [n, C]."""
    p = probabilities(run.task, logits)
    labels = predict_labels(run.task, p, run.calibration.thresholds, run.positive)
    records: list[dict[str, Any]] = []
    for row, label in zip(p.tolist(), labels, strict=True):
        each = dict(zip(run.classes, row, strict=True))
        if run.task == "multilabel":
            positive = [name for name, is_positive in zip(run.classes, label, strict=True) if is_positive]
            records.append({"classes": positive, "probabilities": each})
        else:
            records.append({"class": run.classes[label], "probability": row[label], "probabilities": each})
    return records


def predictions_csv(records: list[dict[str, Any]]) -> str:
    """image, true class (where one is known), predicted class and probability, a column of probability per class,
    error. Control characters are written as escapes, so that one record is one line."""
    known = any("label" in record for record in records)
    classes = next((list(r["probabilities"]) for r in records if "probabilities" in r), [])
    rows = []
    for record in records:
        each = [record.get("probabilities", {}).get(c, "") for c in classes]
        label, error = one_line(_label(record)), one_line(record.get("error", ""))
        own = [one_line(record.get("label", ""))] if known else []
        rows.append([one_line(record["image"]), *own, label, record.get("probability", ""), *each, error])
    every = [f"p {one_line(c)}" for c in classes]
    columns = ["image", *["true class"] * known, "predicted class", "predicted probability", *every, "error"]
    return csv_bytes(columns, rows).decode()


def predictions_table(records: list[dict[str, Any]]) -> str:
    """Aligned columns for a terminal: image, predicted class and probability, or the reason why there is none."""
    rows = [("image", "predicted class", "predicted probability")]
    for record in records:
        what = one_line(_label(record)) or "none"
        if "error" in record:
            what, shown = "could not be read", one_line(record["error"])
        else:
            p, every = record.get("probability"), record["probabilities"]
            shown = ", ".join(f"{each:.3f}" for each in ([every[c] for c in record["classes"]] if p is None else [p]))
        rows.append((one_line(record["image"]), what, shown))
    return "\n".join(aligned(rows, right=()) if records else ["no images"])


def _label(record: dict[str, Any]) -> str:
    return record["class"] if "class" in record else "; ".join(record.get("classes", []))
