"""A run on other images; classes matched by name.

A finished run on another view: another hospital, another scanner. Nothing is fitted: head, standardisation, prior
correction, temperature and threshold are those of the run.

What is found lies in the run's folder, beside its internal test:

    external/<view>.json           what was evaluated, on how many images, all measures with their intervals
    external/<view>.safetensors    the answers: raw logits with labels, digests, clusters and ids

The classes of a finished run in another view, matched by name: never by place, and never by guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache import __version__
from featurecache.errors import BadOption, CacheError, CannotWrite, RunError, nearest
from featurecache.files.records import nan_to_none, read_record
from featurecache.formatting import abbreviated
from heads.evaluation.families import Family, collect_predictions
from heads.evaluation.operating_points import calibration_record, operating_points
from heads.evaluation.subgroups import list_images
from heads.metrics.intervals import FamilyEstimates, SharedResamples
from heads.models.common import pieces
from heads.pixel_view import PixelView
from heads.runs.run import Run, is_pixels, pixels_of, read_ids, read_tensors
from heads.splits import read_splits
from heads.task import FeatureView, Predictions, Say, clusters_of, has_label

FOLDER = "external"
FORMAT = 1
SPLITS = ("train", "val", "test")
ROWS = 1024  # features in memory at once


def evaluate_run(
    run: Run,
    view: FeatureView,
    *,
    split: str | None = None,
    classes: Sequence[str] = (),
    resamples: int = 2000,
    say: Say | None = None,
) -> dict[str, Any]:
    """Evaluate ``run`` on the labelled images of ``view``, all or those of one ``split``, and write what is found into
    the run. ``classes``: ``NAME=A,B`` where the view calls a class of the run otherwise, ``NAME=`` where it has none of
    it. Raises BadOption and RunError; NotInCache with the command that stores what is missing."""
    say = say or (lambda line: None)
    _check_features(run, view)
    if split is not None and split not in SPLITS:
        raise BadOption(f"--split {split}: it is one of {', '.join(SPLITS)}, or left out for all images.")
    matched = match_classes(run, view, classes)
    rows = _rows(view, matched, split)
    notes = [*matched.notes, *_overlap(run, view, rows)]
    for note in notes:
        say(f"warning    {note}")
    answers = _answers(run, view, matched, rows)
    record = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"featurecache": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "view": view.label,
        "path": str(Path(view.path).resolve()),
        "fingerprint": view.fingerprint,
        "output": run.output,
        "split": split,
        "n": len(rows),
        "classes": matched.told(run, rows),
        "left_out": matched.left_out,
        "grouped": answers.grouped,
        "warnings": notes,
        **_measured([(run, answers)], SharedResamples(resamples)),
    }
    path = _write(run, view.name + (f"-{split}" if split else ""), nan_to_none(record), answers)
    return nan_to_none(record) | {"run": str(run.path), "written": str(path)}


class ExternalImages:
    """The labelled images that runs are evaluated on: a view for heads; for networks from pixels its images, or
    ``data``, prepared as each of them has it."""

    def __init__(self, runs: Sequence[Run], features: str | None, data: Any, cache: str | Path | None) -> None:
        from featurecache.store.write_view import open_view

        if data is not None and (features is not None or not all(is_pixels(run) for run in runs)):
            why = "--features is given too" if features is not None else "a head takes features: give --features VIEW"
            raise BadOption(f"--data gives images to baselines alone; {why}.")
        self._data: Any = data if data is not None else open_view(features, cache)
        self._prepared: dict[str, PixelView] = {}

    def of(self, run: Run) -> FeatureView:
        if not is_pixels(run):
            return self._data
        key = run.config["view"]["fingerprint"]
        if key not in self._prepared:
            self._prepared[key] = pixels_of(run, self._data)
        return self._prepared[key]


def _check_features(run: Run, view: FeatureView) -> None:
    """The head means something on features of its own backbone only."""
    if view.fingerprint != run.config["view"]["fingerprint"]:
        fields = _differing(run, view)
        raise BadOption(
            f"{view.label} was not made as the features that {run.path} was trained on, and to its head other features "
            f"mean nothing. They differ in {'; '.join(fields)}. Extract these images as those were."
        )
    shape = tuple(view.info(run.output).shape)
    if shape != tuple(run.config["view"]["shape"]):
        raise BadOption(
            f"{run.output} of {view.label} has the shape {list(shape)}, and the head of {run.path} takes "
            f"{run.config['view']['shape']}."
        )


def _differing(run: Run, view: FeatureView) -> list[str]:
    from featurecache.store.spec import ExtractionSpec, describe_differences

    try:
        specs = ExtractionSpec.from_dict(run.config["spec"]), ExtractionSpec.from_dict(view.spec)
    except CacheError as error:
        raise RunError(f"{run.path} is damaged: {error}") from error
    found = describe_differences(*specs, (run.config["provenance"], view.provenance))
    return [f"{name} ({change})" for name, change in found] or ["what the fingerprint is made of"]


def _rows(view: FeatureView, matched: MatchedClasses, split: str | None) -> np.ndarray:
    usable = matched.usable.copy()
    if view.versions is not None:
        usable &= np.asarray(view.versions) == 0
    if split is not None:
        usable &= np.array(view.splits) == split
    if not usable.any():
        named = ", ".join(sorted(set(view.splits) - {""})) or "none"
        where = f" in {split} (its data name the splits: {named})" if split else ""
        raise BadOption(f"{view.label} has no image{where} that is labelled with a class of the run.")
    return np.flatnonzero(usable)


def _overlap(run: Run, view: FeatureView, rows: np.ndarray) -> list[str]:
    """A sentence where images were also used to train or choose the head; or where that cannot be looked up."""
    used, notes = {bytes(d) for d in run.answers("val").digests}, []
    try:
        used |= _trained_on(run, view)
    except (CacheError, OSError):
        path = run.config["view"]["path"]
        notes.append(f"the view it was trained on is gone ({path}): copies of training images cannot be found")
    count = sum(bytes(d) in used for d in np.asarray(view.digests)[rows])
    if count:
        notes.append(
            f"{count:,} of {len(rows):,} images were also used to train or choose this head: these numbers are too good"
        )
    return notes


def _trained_on(run: Run, view: FeatureView) -> set[bytes]:
    """Digests of the run's train and val."""
    from featurecache.store.view import View as Opened

    path, file = Path(run.config["view"]["path"]), run.path / "splits.csv"
    known = set(read_ids(file))
    if Path(view.path).resolve() == path:
        own: Any = view
    else:
        own = list_images(run, known) if is_pixels(run) else Opened(path, columns_only=True)
    rows = np.array([i for i, name in enumerate(own.ids) if name in known], dtype=np.int64)
    names = read_splits(file, [own.ids[i] for i in rows], [])
    return {bytes(d) for d in np.asarray(own.digests)[rows[np.isin(names, ("train", "val"))]]}


@torch.no_grad()
def _answers(run: Run, view: FeatureView, matched: MatchedClasses, rows: np.ndarray) -> Predictions:
    model, scale, size = run.model, run.standardize, pieces(view.info(run.output).shape)
    logits = []
    for start in range(0, len(rows), ROWS):
        features = view.tensor(run.output, rows[start : start + ROWS])
        logits += [model(scale(part.float())).double().numpy() for part in features.split(size)]
    raw = np.concatenate(logits)
    return Predictions(
        [view.ids[i] for i in rows], np.asarray(view.digests)[rows], clusters_of(view)[rows], view.groups is not None,
        matched.labels[rows], raw, run.calibration(raw),
    )  # fmt: skip


def _measured(pairs: Sequence[tuple[Run, Predictions]], resampler: SharedResamples) -> dict[str, Any]:
    run, heard = pairs[0][0], collect_predictions(pairs)
    estimates = FamilyEstimates(heard.parts, run.classes, resampler)
    by_class = estimates.of_classes()
    return {
        "test": {name: each.record() for name, each in estimates.all().items()},
        "per_class": {name: {m: e.record() for m, e in found.items()} for name, found in by_class.items()},
        "operating": operating_points(run, estimates, None),
        "calibration": calibration_record(heard),
    }


def _write(run: Run, name: str, record: dict[str, Any], answers: Predictions) -> Path:
    from safetensors.torch import save

    from featurecache.files.atomic import write_whole

    digests = np.frombuffer(bytes.fromhex("".join(d.decode() for d in answers.digests)), np.uint8).reshape(-1, 16)
    ids = np.frombuffer(json.dumps(answers.ids).encode(), np.uint8)
    found = {"digests": digests, "ids": ids, "clusters": answers.clusters, "labels": answers.y, "logits": answers.raw}
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in found.items()}
    stem = run.path / FOLDER / re.sub(r"[^\w.-]+", "_", name)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        stem.parent.mkdir(exist_ok=True)
        write_whole(stem.with_name(stem.name + ".safetensors"), save(tensors, {"format": "pt"}))
        write_whole(stem.with_name(stem.name + ".json"), text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise CannotWrite(f"Nothing can be written in {stem.parent}: {error.strerror or error}.") from error
    return stem.with_name(stem.name + ".json")


def read_external(run: Run) -> list[tuple[dict[str, Any], Predictions]]:
    """What was evaluated on other views, by name. Raises RunError."""
    found = []
    for file in sorted((run.path / FOLDER).glob("*.json")):
        try:
            record = read_record(file)
        except CacheError as error:
            raise RunError(f"{run.path} is damaged: {error}") from error
        kinds: dict[str, Any] = {
            "view": str, "split": (str, type(None)), "grouped": bool, "format": int, "warnings": list,
        }  # fmt: skip
        wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key, ...), kind)]
        if not wrong and not all(isinstance(words, str) for words in record["warnings"]):
            wrong = ["warnings"]
        if wrong or record["format"] != FORMAT:
            raise RunError(f"{file} is damaged: it has no proper {' and no '.join(wrong or ['format'])}.")
        found.append((record, _read_answers(run, file, record["grouped"])))
    return found


def _read_answers(run: Run, file: Path, grouped: bool) -> Predictions:
    source = file.with_suffix(".safetensors")
    if not source.is_file() or source.is_symlink():
        raise RunError(f"{source} is missing; evaluate the run on that view again.")
    tensors = {k: v.numpy() for k, v in read_tensors(source).items()}
    digests, ids = (tensors.get(name, np.zeros(0, np.uint8)) for name in ("digests", "ids"))
    try:
        names = json.loads(ids.tobytes())
    except ValueError:
        names = None
    n, classes = len(digests), len(run.classes)
    many = run.task == "multilabel"
    shapes = {"digests": (n, 16), "clusters": (n,), "labels": (n, classes) if many else (n,), "logits": (n, classes)}
    dtypes = {"digests": "uint8", "clusters": "int64", "labels": "float32" if many else "int64", "logits": "float64"}
    fine = isinstance(names, list) and len(names) == n and all(isinstance(name, str) for name in names)
    fine = fine and all(
        name in tensors and tensors[name].shape == shape and tensors[name].dtype == dtypes[name]
        for name, shape in shapes.items()
    )
    if not fine or not (many or ((tensors["labels"] >= 0) & (tensors["labels"] < classes)).all()):
        raise RunError(f"{source} is damaged: it does not fit the run.")
    words = np.array([row.tobytes().hex().encode() for row in digests], "S32")
    raw = tensors["logits"]
    return Predictions(names, words, tensors["clusters"], grouped, tensors["labels"], raw, run.calibration(raw))


def external_records(family: Family, resampler: SharedResamples) -> list[dict[str, Any]]:
    """For each other view: the measures of the family's heads that were evaluated on it, with intervals."""
    found: dict[str, list[tuple[Run, Predictions]]] = {}
    warnings: dict[str, dict[str, None]] = {}
    for run in family.runs:
        for record, answers in read_external(run):
            name = record["view"] + (f" ({record['split']})" if record["split"] else "")
            found.setdefault(name, []).append((run, answers))
            warnings.setdefault(name, {}).update(dict.fromkeys(record["warnings"]))
    return [
        {"view": name, "n": len(pairs[0][1].ids), "heads": len(pairs), "warnings": list(warnings[name]),
         **_measured(pairs, resampler)}
        for name, pairs in found.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class MatchedClasses:
    """``labels`` of every row of the view, as the run counts its classes: int64 [N], -1 for none; of several labels
    float32 [N, L], NaN for unknown. ``left_out``: images of each class that the head does not know."""

    labels: np.ndarray
    members: dict[str, list[str]]  # class of the run -> what the view calls it
    left_out: dict[str, int]
    notes: tuple[str, ...]

    @property
    def usable(self) -> np.ndarray:
        return has_label(self.labels)

    def told(self, run: Run, rows: np.ndarray) -> list[dict[str, Any]]:
        """For each class of the run what it is called in the view, and how many of these rows it has."""
        y = self.labels[rows]
        counts = (y == 1).sum(axis=0) if y.ndim == 2 else np.bincount(y, minlength=len(run.classes))
        return [
            {"class": name, "in_view": self.members[name], "n": int(n)}
            for name, n in zip(run.classes, counts, strict=True)
        ]


def match_classes(run: Run, view: FeatureView, given: Sequence[str] = ()) -> MatchedClasses:
    """``given``: "NAME=A,B" for a class of the run that the view calls otherwise, "NAME=" for one that it has not.
    Raises BadOption where a class is not found: a class under another name would be missing without a word."""
    if view.task == "unlabelled":
        raise BadOption(f"{view.label} carries no labels to evaluate against. featurecache predict needs none.")
    if (view.task == "multilabel") != (run.task == "multilabel"):
        raise BadOption(
            f"{run.path} is a {run.task} head and the labels of {view.label} are {view.task}: labels beside each other "
            "and classes that exclude each other do not match."
        )
    members = _members(run, view, _given(run, view, given))
    taken: dict[str, str] = {}
    for name, own in members.items():
        for word in own:
            if taken.setdefault(word, name) != name:
                raise BadOption(f"{word} of {view.label} cannot be both {taken[word]} and {name} of the run.")
    absent = [name for name, own in members.items() if not own]
    if len(members) - len(absent) < 2 and run.task != "multilabel":
        raise BadOption(f"{view.label} has fewer than two classes of the run; there is nothing to tell apart.")
    labels = _labels(run, view, members)
    left_out = _left_out(view, taken) if run.task != "multilabel" else {}
    notes = [f"{view.label} has no {name}: measures of that class are undefined" for name in absent]
    if left_out:
        count = sum(left_out.values())
        notes.append(f"{count:,} images of classes that the head does not know are left out ({_few(left_out)})")
    if unlabelled := int((~has_label(np.asarray(view.labels))).sum()):
        notes.append(f"{unlabelled:,} images carry no label and are left out")
    return MatchedClasses(labels, members, left_out, tuple(notes))


def _given(run: Run, view: FeatureView, given: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, words = text.partition("=")
        if name not in run.classes or not equals:
            raise BadOption(
                f"--classes {text}: expected NAME=A,B with a class of the run ({', '.join(run.classes[:12])}) before "
                f"the = and what {view.label} calls it behind.{nearest(name, run.classes)}"
            )
        parts = [words] if words in view.classes else [word.strip() for word in words.split(",") if word.strip()]
        if unknown := [word for word in parts if word not in view.classes]:
            raise BadOption(
                f"--classes {text}: {view.label} has no class {unknown[0]!r}; it has {', '.join(view.classes[:12])}."
            )
        found[name] = parts
    return found


def _members(run: Run, view: FeatureView, given: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class of the run -> classes of the view: as given, of the same name, or those it was merged from in training."""
    merged = {}
    for text in run.config["settings"].get("classes") or ():
        name, _, words = text.partition("=")
        merged[name] = [word.strip() for word in words.split(",") if word.strip()]
    found = {}
    for name in run.classes:
        parts = [word for word in merged.get(name, ()) if word in view.classes]
        if name in given:
            found[name] = given[name]
        elif name in view.classes:
            found[name] = [name]
        elif parts:
            found[name] = parts
        else:
            raise BadOption(
                f"{view.label} has no class {name!r}, which {run.path} tells apart; it has "
                f"{', '.join(view.classes[:12])}.{nearest(name, view.classes)} --classes '{name}=…' says what it is "
                f"called there, --classes '{name}=' that there is none."
            )
    return found


def _labels(run: Run, view: FeatureView, members: dict[str, list[str]]) -> np.ndarray:
    labels = np.asarray(view.labels)
    places = [[view.classes.index(word) for word in members[name]] for name in run.classes]
    if run.task == "multilabel":
        found = np.full((len(labels), len(places)), np.nan, dtype=np.float32)
        for c, own in enumerate(places):
            if own:
                column = labels[:, own]
                known = ~np.isnan(column)
                any_yes = (np.nan_to_num(column) == 1).any(axis=1)
                found[:, c] = np.where(any_yes, 1.0, np.where(known.all(axis=1), 0.0, np.nan))
        return found
    recode = np.full(len(view.classes) + 1, -1, dtype=np.int64)  # the last entry serves label -1
    for c, own in enumerate(places):
        recode[own] = c
    return recode[labels.astype(np.int64)]


def _left_out(view: FeatureView, taken: dict[str, str]) -> dict[str, int]:
    labels = np.asarray(view.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(view.classes))
    return {name: int(n) for name, n in zip(view.classes, counts, strict=True) if name not in taken and n}


def _few(counts: dict[str, int]) -> str:
    return abbreviated([f"{name} {n:,}" for name, n in counts.items()], 6)
