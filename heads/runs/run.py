"""Trained runs with their heads and answers (`Run`), and the words of a command line that say what made them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, FeatureCacheError, RunError, nearest
from featurecache.files.delimited import data_frame
from featurecache.formatting import exact_number, html_table, join_names, number, text_of, with_addresses
from featurecache.images.headers import READING, check_crop
from featurecache.images.preprocessing import Preprocess
from featurecache.store.schema import source_options
from featurecache.store.store import is_default_cache
from heads.metrics.calibration import Calibration
from heads.models.catalogue import load_head, load_network
from heads.models.common import FINETUNE, Input, rows_at_once
from heads.models.finetune import load_finetuned
from heads.pixel_view import PixelView, open_dataset
from heads.runs.records import BACKBONE, RunRecord, list_records, load_record, read_csv, read_tensors
from heads.settings import METRICS, SPLITS, STANDARDIZE, TABLE, Settings, flag, title
from heads.task import FeatureView, Predictions, Standardize

if TYPE_CHECKING:
    import pandas

    from featurecache.sources.base import Dataset

_ANSWERS = "answers.safetensors"
_COLUMNS = ("clusters", "labels", "logits")

TABLES = ("predictions", "splits", "history", "metrics")
# columns of text; the others are numbers
_TEXT = {"id", "split", "true class", "predicted class", "model", "class", "metric", "method"}


def _column(name: str, cells: list[str]) -> np.ndarray:
    """A column of a CSV of ours: text, or float64 with NaN for what is empty."""
    if name in _TEXT:
        return np.array([text_of(cell) for cell in cells], object)
    return np.array([float(cell or "nan") for cell in cells])


@dataclass(frozen=True, repr=False)
class Run(RunRecord):
    """A finished run with its head and its answers."""

    trust_code: bool = False

    @property
    def calibration(self) -> Calibration:
        calibration = Calibration.from_dict(self.config["calibration"])
        cuts = {"binary": 1, "multilabel": len(self.classes)}.get(self.task, 0)
        if (len(calibration.correction), len(calibration.thresholds)) != (len(self.classes), cuts):
            raise RunError(f"{self.path} is damaged: its calibration is not that of {len(self.classes)} classes.")
        return calibration

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.read("head.safetensors"), self.path / "head.safetensors")

    @cached_property
    def _placed(self) -> np.ndarray:
        """[N, 2] id and split of every row of the view, in its order."""
        rows = read_csv(
            self.read("splits.csv"), self.path / "splits.csv", lambda row: (text_of(row["id"]), intern(row["split"]))
        )
        return np.array(rows, object).reshape(-1, 2)

    @property
    def ids(self) -> np.ndarray:
        """[N] str: the ids of the view, in its order."""
        return self._placed[:, 0]

    @property
    def splits(self) -> np.ndarray:
        """[N] str: where each image went: train, val, test, or "" for nowhere."""
        return self._placed[:, 1]

    def frame(self, table: str = "predictions") -> pandas.DataFrame:
        """``predictions``, ``splits``, ``history`` or ``metrics`` as a pandas DataFrame. Raises BadOption, RunError."""
        if table not in TABLES:
            raise BadOption(f"a run has the tables {', '.join(TABLES)}; not {table}.{nearest(table, TABLES)}")
        rows = read_csv(self.read(f"{table}.csv"), self.path / f"{table}.csv", dict)
        return data_frame({name: _column(name, [row[name] for row in rows]) for name in rows[0]} if rows else {})

    def __repr__(self) -> str:
        by = self.config["chosen"]["by"]
        numbers = [f"{part} {title(by, self.task)} {number(self.metrics[part].get(by))}" for part in ("val", "test")]
        return f"<Run {self.path}: {name_of(self.head, self.output)}, {', '.join(numbers)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the measures of val and test."""
        measured = [self.metrics["val"], self.metrics["test"]]
        names = [name for name in METRICS if any(isinstance(part.get(name), int | float) for part in measured)]
        rows = [[METRICS[name].title, *(number(part.get(name)) for part in measured)] for name in names]
        return html_table(repr(self), [["", "val", "test"], *rows])

    def answers(self, split: str) -> Predictions:
        """What it said of "val" or "test", checked against splits.csv; raises RunError where the file does not fit."""
        tensors, ids = self._answer_tensors(), self.ids
        columns = {name: tensors[key].numpy() for name in _COLUMNS if (key := f"{split}.{name}") in tensors}
        rows, answers = tensors.get(f"{split}.rows", torch.zeros(0)).numpy(), None
        if rows.dtype == np.int64 and rows.ndim == 1 and ((rows >= 0) & (rows < len(ids))).all():
            names, columns["digests"] = [ids[row] for row in rows], self._octets(tensors)[rows]
            answers = self.checked_answers(names, columns, bool(self.config["splits"].get("grouped")))
        if answers is None:
            raise RunError(f"{self.path / _ANSWERS} does not fit the run: what it says of {split} is not whole.")
        return answers

    def digests(self, *splits: str) -> np.ndarray:
        """S32 [n]: of the images in these splits, in the order of the view."""
        return _digests_of(self._octets(self._answer_tensors())[np.isin(self.splits.astype(str), splits)])

    def is_of_images_in(self, view: FeatureView) -> bool:
        """Whether a view has, under the same ids, every image that was trained or tested on."""
        used = self.splits != ""
        there = set(zip(view.ids, map(bytes, view.digests), strict=True))
        return there.issuperset(zip(self.ids[used], map(bytes, self.digests(*SPLITS)), strict=True))

    def _answer_tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.read(_ANSWERS), self.path / _ANSWERS)

    def _octets(self, answers: dict[str, torch.Tensor]) -> np.ndarray:
        """uint8 [N, 16]: the digest of every row of the view, in its order."""
        octets = answers.get("digests", torch.zeros(0)).numpy()
        if octets.shape != (len(self.ids), 16) or octets.dtype != np.uint8:
            raise RunError(f"{self.path / _ANSWERS} does not fit the run: it has not the digest of each image.")
        return octets

    def checked_answers(self, ids: list[str], columns: dict[str, np.ndarray], grouped: bool) -> Predictions | None:
        """From the columns of a file; None where their shapes, types or labels do not fit."""
        n, classes = len(ids), len(self.classes)
        labels = ((n, classes), "float32") if self.task == "multilabel" else ((n,), "int64")
        wanted = {"digests": ((n, 16), "uint8"), "clusters": ((n,), "int64"), "logits": ((n, classes), "float64")}
        kinds = {name: (values.shape, values.dtype.name) for name, values in columns.items()}
        if kinds != wanted | {"labels": labels}:
            return None
        y, raw = columns["labels"], columns["logits"]
        if self.task != "multilabel" and not ((y >= 0) & (y < classes)).all():
            return None
        digests = _digests_of(columns["digests"])
        return Predictions(ids, digests, columns["clusters"], grouped, y, raw, self.calibration(raw))

    @cached_property
    @exact_arithmetic()
    def model(self) -> nn.Module:
        """The trained head. A ``python:`` head is code that the run only names: imported only when trusted."""
        if self.head.startswith("python:") and not self.trust_code:
            raise RunError(
                f"The head of {self.path} is code of its own ({self.head}). If you trust that module, "
                "load the run with trust_code=True."
            )
        state = {key: value for key, value in self._tensors.items() if not key.startswith("standardize.")}
        settings, view, classes = Settings.from_dict(self.config["settings"]), self.config["view"], len(self.classes)
        try:
            if not is_pixels(self):
                return load_head(self.head, Input.of(view), classes, state, gated=settings.gated)
            if self.head.startswith(FINETUNE):  # lies beside; the state is the last layer alone
                self.check(name for name in self.config["files"] if name.startswith(f"{BACKBONE}/"))
                return load_finetuned(self.folder / BACKBONE, state, classes=classes)
            return load_network(self.head, state, image_size=view["shape"][-1], classes=classes)
        except (BadOption, ValueError) as error:
            file, kind = self.path / "head.safetensors", "network" if is_pixels(self) else "head"
            raise RunError(f"{file} does not fit the {kind} of config.json: {error}") from error

    @property
    def standardize(self) -> Standardize:
        tensors = self._tensors
        sizes = {tensors[key].shape for key in ("standardize.mean", "standardize.std") if key in tensors}
        wanted = {(self.config["view"]["shape"][-1],)} if self.config["standardize"] == "zscore" else set()
        if sizes != wanted or self.config["standardize"] not in STANDARDIZE:
            raise RunError(f"{self.path} is damaged: its statistics of train do not fit its features.")
        return Standardize(self.config["standardize"], tensors.get("standardize.mean"), tensors.get("standardize.std"))

    @exact_arithmetic()
    @torch.no_grad()
    def logits(self, features: torch.Tensor, device: str = "cpu") -> np.ndarray:
        """Calibrated logits float64 [n, C] of features [n, ...] in storage dtype, or of images uint8 [n,3,h,w]."""
        if not len(features):
            return self.calibration(np.zeros((0, len(self.classes))))
        model, rows = self.model.to(device), 256 if features.ndim < 4 else rows_at_once(features.shape[1:])
        z = [model(self.standardize(x.to(device).float())).cpu() for x in features.split(rows)]
        return self.calibration(torch.cat(z).double().numpy())


def load_run(path: str | Path, *, trust_code: bool = False) -> Run:
    """Open a run folder; raises RunError where it is none or not whole. ``trust_code``: a ``python:`` head may be
    imported."""
    return Run(**vars(load_record(path)), trust_code=trust_code)


def list_runs(folder: str | Path = "runs", errors: list[RunError] | None = None) -> list[Run]:
    """The finished runs in a folder, by name; ``errors``: takes what is wrong with the others that have a config."""
    return [Run(**vars(record)) for record in list_records(folder, errors)]


def pixels_of(run: Run, data: Any = None) -> PixelView:
    """The images of a run on pixels, or ``data``, prepared as the run has it; RunError where that cannot be."""
    dataset, preprocess = open_run_dataset(run) if data is None else open_dataset(data), preprocess_of(run)
    reading = run.config["spec"]["preprocess"]
    crop = dataset.crop or (check_crop(reading["region"]) if "region" in reading else None)
    return PixelView(replace(dataset, bits=dataset.bits or reading.get("bits"), crop=crop), preprocess)


def open_run_dataset(run: Run) -> Dataset:
    """The images that a run on pixels was made of; RunError where they are gone."""
    from featurecache.sources import reopen

    try:
        return reopen(run.config["view"].get("source") or {})
    except (FeatureCacheError, KeyError, TypeError) as error:
        raise RunError(f"the images of {run.path} cannot be had: {error}") from error


def _digests_of(octets: np.ndarray) -> np.ndarray:
    return np.array([row.tobytes().hex().encode() for row in octets], "S32")


def preprocess_of(run: Run) -> Preprocess:
    """How a run on pixels resizes; RunError where its config is damaged."""
    record = run.config["spec"].get("preprocess")
    try:
        check_crop(record.get("region", (0, 0, 1, 1)))
        return Preprocess.from_dict({key: value for key, value in record.items() if key not in READING})
    except (FeatureCacheError, TypeError, AttributeError) as error:
        raise RunError(f"{run.path} is damaged: it does not say how its images were resized ({error}).") from error


def is_pixels(run: Run) -> bool:
    return run.config["spec"].get("kind") == "pixels"


def is_of_pixels(output: str) -> bool:
    """Whether an output is that of a network from pixels: the images themselves."""
    return output.startswith("pixels-")


def name_of(head: str, output: str) -> str:
    """``large on tokens``; of a network from pixels its name and theirs: ``cnn-cifar at 32 px``."""
    side = output.removeprefix("pixels-")
    return f"{head} on {output}" if side == output else f"{head} at {side} px"


def option_words(settings: dict[str, Any], published: dict[str, Any] | None = None) -> list[str]:
    """The options of training that differ from their defaults, or from what was ``published`` of a network, as words of
    a command line."""
    words: list[str] = []
    for name, option in TABLE.items():
        value, usual = settings.get(name, option.default), (published or {}).get(name, option.default)
        if published is not None and name == "augment" and value is None and usual is not None:
            value = "none"
        if name in ("output", "device") or value is None or value == usual:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list | tuple):
            each = [join_names(value)] if name == "only" and len(value) > 1 else map(str, value)
            words += [word for text in each for word in (flag(name), text)]
        else:
            words += [flag(name), exact_number(value) if isinstance(value, float) else str(value)]
    return words


def view_word(label: str, path: str | Path) -> str:
    """How --features names a view at any time, whatever others are made: by the folder of its store, or where it lies
    in no default cache by its path or address."""
    *cache, store, _ = str(path).rsplit("/", 2)
    usual = is_default_cache("".join(cache) or ".")
    return f"{store}/{label.rpartition('/')[2]}" if usual else with_addresses(str(path))


def source_words(source: dict[str, Any]) -> list[str]:
    """Images as --data, --column and --task name them."""
    return [str(word) for option in source_options(source) for word in option]


def hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
