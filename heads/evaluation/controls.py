"""Controls (baselines that a head must beat before its features mean anything), on the same val and test as the head:
chance, the majority class, and logistic regression on raw pixels.

The pixels: every image decoded as for a backbone, squashed (antialiased) to 32x32 where the first training image is
larger than that, one channel where all are grey, centred by train's mean image, over one overall standard deviation.
Logistic regression with C = 1 on at most 5,000 training images; temperature and thresholds by val, as for a head.

They look at no features, so every head and every backbone on the same images, labels and splits has the same: they are
computed once, and remembered on this machine by all that decides them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache import __version__
from featurecache.errors import FeatureCacheError
from featurecache.files.machine_state import read_state, state_key, write_state
from featurecache.files.records import canonical_json
from heads.metrics.calibration import CalibratedPredictions, calibrate
from heads.metrics.classification import evaluate
from heads.models.catalogue import HALF, squash_preprocess
from heads.pixel_view import read_images
from heads.runs.folder import replace_listed
from heads.runs.records import CONFIG, METRICS_FILE
from heads.runs.run import Run
from heads.runs.write import csv_bytes, json_bytes
from heads.settings import SPLITS
from heads.splits import Splits
from heads.task import FeatureView, Say, Task

if TYPE_CHECKING:
    from featurecache.images.preprocessing import Preprocess

SIDE = 32  # pixels
MOST = 5_000  # training images
GONE, UNFINISHED = "are gone or changed", "stopped before it converged"
CHANCE, MAJORITY, PIXELS = "chance", "majority class", "pixels, logistic regression"


def measure_controls(
    view: FeatureView, task: Task, splits: Splits, say: Say, progress: bool = False
) -> list[dict[str, Any]]:
    """`all_controls`, or what they gave before for the very same images, labels and splits; says which."""
    key = _key_of(view, task, splits)
    if record := read_state("controls", key):
        say(f"controls   {CHANCE}, the {MAJORITY}, logistic regression on raw pixels: as computed before")
        return list(json.loads(record["controls"]))
    say(f"controls   {CHANCE}, the {MAJORITY}, logistic regression on raw pixels")
    controls = all_controls(view, task, splits, progress)
    if controls[-1]["test"] is not None and GONE not in controls[-1]["note"]:  # what is gone may come back
        write_state("controls", key, {"controls": json.dumps(controls)})  # as text: a record holds no NaN
    return controls


def add_controls(run: Run, controls: list[dict[str, Any]]) -> None:
    """Into the measures of a finished run that has none: metrics.json, and lines at the end of metrics.csv."""
    text, lines = run.read("metrics.csv"), list[list[Any]]()
    more = [""] * (text.partition(b"\n")[0].count(b",") - 4)  # the columns of a report
    for control, split in product(controls, SPLITS[1:]):
        own = control[split] or {}
        for part, table in [("", own), *own.get("per_class", {}).items()]:
            numbers = {name: value for name, value in table.items() if isinstance(value, int | float)}
            lines += [[control["name"], split, part, m, "" if math.isnan(v) else v, *more] for m, v in numbers.items()]
    files = {METRICS_FILE: json_bytes(run.metrics | {"controls": controls})}
    replace_listed(run.path / CONFIG, files | {"metrics.csv": text + csv_bytes(lines[0], lines[1:])})


def _key_of(view: FeatureView, task: Task, splits: Splits) -> str:
    """Of all that decides them: which images, read how; what they are called; who trains and who tests; the code."""
    from featurecache.images.decoding import DECODING

    data = hashlib.blake2b(canonical_json(view.source).encode(), digest_size=16)
    for column in (view.digests, task.labels, splits.names):
        data.update(canonical_json(np.asarray(column).astype(str).tolist()).encode())
    how = {"decoding": DECODING, "side": SIDE, "most": MOST, "featurecache": __version__}
    how["sklearn"] = version("scikit-learn")  # whose import takes a second, and what is remembered needs none
    what = {"task": task.kind, "classes": list(task.classes), "positive": task.positive}
    return state_key(data=data.hexdigest(), **what, **how)


def all_controls(view: FeatureView, task: Task, splits: Splits, progress: bool = False) -> list[dict[str, Any]]:
    """Each {"name", "val", "test", "note"}; val and test as ``evaluate`` gives them, None where it could not be had."""
    train, *others = (task.labels[splits.rows(name)] for name in SPLITS)
    chance = {split: _chance(task, y) for split, y in zip(SPLITS[1:], others, strict=True)}
    majority = {split: _majority(task, train, y) for split, y in zip(SPLITS[1:], others, strict=True)}
    simple = [{"name": CHANCE, **chance, "note": ""}, {"name": MAJORITY, **majority, "note": ""}]
    return [*simple, pixel_control(view, task, splits, progress)]


def _chance(task: Task, y: np.ndarray) -> dict[str, Any]:
    """The expectation when every class is predicted equally often, and given equal probability."""
    count = len(task.classes)
    z = np.zeros((len(y), count))
    if task.multilabel:
        truth = np.stack([(y == 0).sum(0), (y == 1).sum(0)], axis=1)  # [L, 2]
        confusion = np.repeat(truth[:, :, None] / 2, 2, axis=2)
    else:
        confusion = np.repeat(np.bincount(y, minlength=count)[:, None] / count, count, axis=1)
    result = evaluate(CalibratedPredictions(task.kind, z, y, task.positive, (0.5,) * count), task.classes, confusion)
    if task.kind == "ordinal":
        distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        result |= {"mae": float((distance * confusion).sum() / len(y)), "quadratic_kappa": 0.0}
    if "top5" in result:
        result["top5"] = 5 / count
    return result


def _majority(task: Task, train: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Train's prevalences as the probabilities of every image; the most frequent class is what it predicts."""
    if task.multilabel:
        labelled = np.maximum((~np.isnan(train)).sum(0), 1)
        p = np.clip((train == 1).sum(0) / labelled, 1e-6, 1 - 1e-6)
        z, cuts = np.log(p) - np.log1p(-p), (0.5,) * len(p)
    else:
        p = np.bincount(train, minlength=len(task.classes)) / len(train)
        z, cuts = np.log(np.maximum(p, 1e-12)), (0.5,)
    tiled = np.tile(z, (len(y), 1))
    return evaluate(CalibratedPredictions(task.kind, tiled, y, task.positive, cuts), task.classes)


def pixel_control(view: FeatureView, task: Task, splits: Splits, progress: bool = False) -> dict[str, Any]:
    """Logistic regression on raw pixels; where the images are gone, the note says so."""
    import featurecache.sources

    nothing = {"name": PIXELS, "val": None, "test": None}
    rows = {name: splits.rows(name) for name in SPLITS}
    notes = []
    if len(rows["train"]) > MOST:
        notes.append(f"on {MOST:,} of {len(rows['train']):,} training images")
        rows["train"] = np.sort(np.random.default_rng(0).permutation(rows["train"])[:MOST])
    try:
        dataset = featurecache.sources.reopen(view.source)
        images, read = _read_images(view, dataset, np.concatenate([rows[name] for name in SPLITS]), progress)
    except (FeatureCacheError, OSError) as error:
        return {**nothing, "note": f"the images cannot be had any more: {error}"}
    data: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    ends = np.cumsum([len(own) for own in rows.values()])[:-1]
    parts = zip(rows.items(), np.split(images, ends), np.split(read, ends), strict=True)
    for (name, own), pixels, readable in parts:
        gone = int((~readable).sum())
        if gone and (name != "train" or gone == len(own)):
            return {**nothing, "note": f"{gone:,} of {len(own):,} images of {name} {GONE}"}
        if gone:
            notes.append(f"{gone:,} training images {GONE}")
        data[name] = pixels[readable], task.labels[own[readable]]
    return {**_fit_pixels(task, data, notes), "note": "; ".join(notes)}


def _read_images(
    view: FeatureView, dataset: Any, rows: np.ndarray, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 3, h, w] of rows of the view, and bool [n]: whether the very image of the view was there to read."""
    index = {name: i for i, name in enumerate(dataset.ids)}
    there = np.flatnonzero([view.ids[row] in index for row in rows])
    own = [index[view.ids[row]] for row in rows[there]]
    pixels, digests, failed, _ = read_images(dataset, own, _small(dataset, own), progress=progress)
    if len(failed) == len(own):
        raise FileNotFoundError(f"none of {len(rows):,} can be read")
    images, read = np.zeros((len(rows), *pixels.shape[1:]), np.uint8), np.zeros(len(rows), bool)
    images[there] = pixels.numpy()
    read[there] = digests == np.asarray(view.digests)[rows[there]]
    read[there[list(failed)]] = False
    return images, read


def _small(dataset: Any, rows: list[int]) -> Preprocess:
    """What makes all images as large as the first that can be read, or ``SIDE`` pixels where that is larger."""
    from featurecache.errors import UnreadableImage
    from featurecache.images.decoding import decode

    for row in rows:
        with contextlib.suppress(UnreadableImage):
            _, height, width = decode(dataset.read(row)).shape
            size = (height, width) if max(height, width) <= SIDE else (SIDE, SIDE)
            return replace(squash_preprocess(SIDE, HALF), resize=size)
    return squash_preprocess(SIDE, HALF)


def _fit_pixels(task: Task, data: dict[str, tuple[np.ndarray, np.ndarray]], notes: list[str]) -> dict[str, Any]:
    images, (y, *others) = zip(*data.values(), strict=True)
    channels = 1 if all((x[:, :1] == x).all() for x in images) else 3
    flat = [x[:, :channels].reshape(len(x), -1).astype(np.float32) for x in images]
    mean, scale = flat[0].mean(0), flat[0].std() or 1.0
    train, *scaled = ((x - mean) / scale for x in flat)
    z = _logits(task, train, y, scaled, notes)
    calibration, note = calibrate(task.kind, z[0], others[0], np.zeros(len(task.classes)), task.positive, None)
    notes += [note] if note else []
    measured = {
        name: evaluate(calibration.predictions(task.kind, values, labels, task.positive), task.classes)
        for name, values, labels in zip(SPLITS[1:], z, others, strict=True)
    }
    return {"name": PIXELS, **measured}


def _logits(task: Task, x: np.ndarray, y: np.ndarray, others: list[np.ndarray], notes: list[str]) -> list[np.ndarray]:
    """Logits float64 [n, C] for each of ``others``; a class or label that train cannot teach gets a constant."""
    z = [np.full((len(other), len(task.classes)), 0.0 if task.multilabel else -20.0) for other in others]
    if not task.multilabel:
        model = _regression(x, y, notes)
        for values, other in zip(z, others, strict=True):
            own = model.decision_function(other)
            values[:, model.classes_] = own if own.ndim == 2 else np.stack([np.zeros_like(own), own], axis=1)
        return z
    for c, truth in enumerate(y.T):
        labelled = ~np.isnan(truth)
        if len(np.unique(truth[labelled])) == 2:
            model = _regression(x[labelled], truth[labelled].astype(int), notes)
            for values, other in zip(z, others, strict=True):
                values[:, c] = model.decision_function(other)
    return z


def _regression(x: np.ndarray, y: np.ndarray, notes: list[str]) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the control's note instead
        model = LogisticRegression(C=1.0, max_iter=300).fit(x, y)
    if model.n_iter_.max() >= 300 and UNFINISHED not in notes:
        notes.append(UNFINISHED)
    return model
