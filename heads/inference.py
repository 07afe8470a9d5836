"""Use a run on new images: class and calibrated probability of each, as records.

The pixels go through the same backbone, precision and rounding as the store that the head was trained on
(``featurecache.compute``), then through the head, its prior correction and its temperature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from featurecache.errors import BadOption, FeatureCacheError
from featurecache.formatting import one_line
from featurecache.images.headers import with_white
from heads.metrics.calibration import predict_labels, probabilities
from heads.pixel_view import resize_all
from heads.runs.run import Run, is_pixels, load_run, preprocess_of
from heads.runs.write import csv_bytes

TABLES = (".npz", ".csv", ".tsv", ".parquet", ".tar")  # arguments that hold many images; every other file is one image
HELD = 512 * 2**20, 2_048  # bytes and number of images in memory before they are computed
Image = str | Path | bytes | np.ndarray


def predict(
    run: Run | str | Path,
    images: Image | Iterable[Image],
    *,
    device: str = "auto",
    weights: str | None = None,
    trust_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One record an image, in the order given; folders, tables and .npz files give all their images.

    {"image", "class", "probability", "probabilities": {class: p}}; multi-label: "classes", "probabilities"; an image
    that could not be read: {"image", "error"}. A binary task calls by the threshold chosen on val, so "probability",
    which is that of the class called, can be below one half. ``weights``: where the backbone's are now, if
    not where they were. Raises RunError; the backbone's errors as in extract.
    """
    run = run if isinstance(run, Run) else load_run(run, trust_code=trust_code)
    if is_pixels(run) and weights:
        raise BadOption("--weights is for a backbone; the network of this run lies in its folder. Leave it out.")
    run.model  # noqa: B018  a head that does not load is found before the backbone is
    images = [images] if isinstance(images, str | Path | bytes | np.ndarray) else list(images)
    records: list[dict[str, Any]] = []
    source = run.config["view"].get("source") or {}
    for part in _parts(iterate_images(images, source.get("page"))):
        records += _predict_part(run, part, device, weights)
    if say:
        failed = sum("error" in record for record in records)
        say(f"predicted  {len(records) - failed:,} images" + (f"; {failed:,} could not be read" if failed else ""))
    return records


def iterate_images(images: list[Image], page: str | None = None) -> Iterator[tuple[str, Any]]:
    """(name, encoded bytes or array), or (name, reason) as str for what cannot be read; of DICOM each frame. ``page``:
    see `featurecache.open_source`."""
    from featurecache.sources.dicom_frames import images_in_file

    for number, image in enumerate(images, start=1):
        if isinstance(image, bytes | np.ndarray):
            yield f"image {number}", image
        elif Path(image).is_dir() or Path(image).suffix.lower() in TABLES:
            yield from _source(image, page)
        else:
            data = _read(lambda path=image: Path(path).read_bytes())  # type: ignore[misc]
            yield from images_in_file(str(image), data, page) if isinstance(data, bytes) else [(str(image), data)]


def _source(data: str | Path, page: str | None) -> Iterator[tuple[str, bytes | np.ndarray | str]]:
    from featurecache import open_source

    dataset = open_source(data, page=page if Path(data).is_dir() else None)
    for i, name in enumerate(dataset.ids):
        shown = os.path.join(data, name) if Path(data).is_dir() else name
        yield shown, _read(lambda i=i: dataset.read(i))  # type: ignore[misc]


def _read(reader: Callable[[], bytes | np.ndarray]) -> bytes | np.ndarray | str:
    try:
        return reader()
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except FeatureCacheError as error:
        return str(error)


def _parts(images: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """In pieces of at most about ``HELD``."""
    part: list[tuple[str, Any]] = []
    size = 0
    for name, data in images:
        part.append((name, data))
        size += data.nbytes if isinstance(data, np.ndarray) else len(data)
        if size >= HELD[0] or len(part) >= HELD[1]:
            yield part
            part, size = [], 0
    if part:
        yield part


def _predict_part(run: Run, part: list[tuple[str, Any]], device: str, weights: str | None) -> list[dict[str, Any]]:
    records = [{"image": name, **({"error": data} if isinstance(data, str) else {})} for name, data in part]
    readable = [(record, data) for record, (_, data) in zip(records, part, strict=True) if "error" not in record]
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


def _features(run: Run, images: list[Any], device: str, weights: str | None) -> tuple[torch.Tensor, dict[int, str]]:
    """What the head of a run is given of images [n, ...], and why it is not of some, by place."""
    if is_pixels(run):
        bits = run.config["spec"]["preprocess"].get("bits")
        return resize_all([with_white(image, bits) for image in images], preprocess_of(run))
    import featurecache

    features, failed = featurecache.compute(
        images, like=store_of(run), output=run.output, device=device, weights=weights, trust_code=run.trust_code
    )
    return features, dict(failed)


def store_of(run: Run) -> SimpleNamespace:
    """What new images are computed like: the store of a run, which need not be there any more."""
    view = run.config["view"]
    own = {name: run.config[name] for name in ("spec", "provenance")}
    return SimpleNamespace(**own, label=view["label"], store=Path(view["path"]).parent)  # for its plan and canary


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
    """image, class, probability, a column of probability per class, error. Control characters are written as escapes,
    so that one record is one line."""
    classes = next((list(r["probabilities"]) for r in records if "probabilities" in r), [])
    rows = []
    for record in records:
        each = [record.get("probabilities", {}).get(c, "") for c in classes]
        label, error = one_line(_label(record)), one_line(record.get("error", ""))
        rows.append([one_line(record["image"]), label, record.get("probability", ""), *each, error])
    columns = ["image", "class", "probability", *(f"p {one_line(c)}" for c in classes), "error"]
    return csv_bytes(columns, rows).decode()


def predictions_table(records: list[dict[str, Any]]) -> str:
    """Aligned columns for a terminal: image, class, probability, or the reason why there is none."""
    rows = []
    for record in records:
        what, shown = one_line(_label(record)) or "none", ""
        if "error" in record:
            what = "could not be read: " + one_line(record["error"])
        else:
            p, every = record.get("probability"), record["probabilities"]
            shown = ", ".join(f"{each:.3f}" for each in ([every[c] for c in record["classes"]] if p is None else [p]))
        rows.append((one_line(record["image"]), what, shown))
    first = max((len(image) for image, _, _ in rows), default=0)
    second = max((len(what) for _, what, shown in rows if shown), default=0)
    lines = [f"{image:<{first}}  {what:<{second}}  {shown}".rstrip() for image, what, shown in rows]
    return "\n".join(lines) or "no images"


def _label(record: dict[str, Any]) -> str:
    return record["class"] if "class" in record else "; ".join(record.get("classes", []))
