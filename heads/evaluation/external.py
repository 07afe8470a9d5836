"""External evaluation: a finished run on another view (another hospital, another scanner), classes matched by name.

Nothing is fitted: head, standardisation, prior correction, temperature and threshold are those of the run. Classes are
matched by name, never by place and never by guess. The result lies in the run's folder, beside its internal test:

    external/<view>.json           what was evaluated, on how many images, all measures with their intervals; it lists
                                   the other by its hash
    external/<view>.safetensors    the answers: raw logits with labels, digests, clusters and ids
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, CacheError, CannotWrite, RunError, nearest
from featurecache.files.atomic import write_whole
from featurecache.files.mirror import place_of
from featurecache.files.records import nan_to_none
from featurecache.formatting import abbreviated, names_in
from featurecache.store.spec import ExtractionSpec, describe_differences
from featurecache.store.write_view import open_view
from heads.evaluation.families import Family, collect_predictions
from heads.evaluation.operating_points import calibration_record, operating_points
from heads.metrics.intervals import FamilyEstimates, SharedResamples
from heads.models.common import rows_at_once
from heads.pixel_view import PixelView, open_dataset
from heads.runs.folder import digest_of, read_checked_record, read_listed, write_record
from heads.runs.records import read_tensors
from heads.runs.run import Run, is_pixels, load_run, pixels_of
from heads.runs.write import digest_octets, record_stamp
from heads.settings import SPLITS
from heads.task import FeatureView, Predictions, Say, clusters_of, is_labelled, plain_rows, renumber_labels

FOLDER = "external"
_KINDS = {"view": str, "split": (str, type(None)), "grouped": bool, "warnings": list, "files": dict}
ROWS = 1024  # features in memory at once


@exact_arithmetic()
def evaluate_run(
    run: Run | str | Path, view: FeatureView | str | Path | None, *, split: str | None = None,
    classes: Sequence[str] = (), resamples: int = 2000, say: Say | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate ``run`` on the labelled images of ``view`` (None: the newest), all or those of one ``split``, and write
    the record into the run; a network from pixels sees its images. ``classes``: ``NAME=A,B`` where the view calls a
    class of the run otherwise, ``NAME=`` where it has none of it. Raises BadOption and RunError; NotInCache with the
    command that stores what is missing."""
    run = run if isinstance(run, Run) else load_run(run)
    view = open_view(view) if view is None or isinstance(view, str | Path) else view
    view = pixels_of(run, view) if is_pixels(run) and not isinstance(view, PixelView) else view
    resampler = SharedResamples(resamples)
    _check_features(run, view)
    if split is not None and split not in SPLITS:
        raise BadOption(f"--split {split}: it is one of {', '.join(SPLITS)}, or left out for all images.")
    labels, names, left_out, notes = match_classes(run, view, classes)
    rows = _rows(view, labels, split)
    y = labels[rows]
    n = (y == 1).sum(axis=0) if y.ndim == 2 else np.bincount(y, minlength=len(run.classes))
    notes += overlap(run, np.asarray(view.digests)[rows])
    say = say or (lambda line: None)
    for note in notes:
        say(f"warning    {note}")
    answers = _answers(run, view, y, rows)
    record = nan_to_none({
        **record_stamp(), "view": view.label, "path": place_of(view.path), "fingerprint": view.fingerprint,
        "output": run.output, "split": split, "n": len(rows),
        "classes": [{"class": c, "in_view": names[c], "n": int(n[i])} for i, c in enumerate(run.classes)],
        "left_out": left_out, "grouped": answers.grouped, "warnings": notes,
        **_measured([(run, answers)], resampler),
    })  # fmt: skip
    path = _write(run, view.name + (f"-{split}" if split else ""), record, answers)
    return record | {"run": str(run.path), "written": str(path)}


def external_images(
    runs: Sequence[Run], features: str | None, data: Any, cache: str | Path | None
) -> Callable[[Run], FeatureView]:
    """The labelled images that runs are evaluated on: a view for heads; for networks from pixels its images, or
    ``data``, prepared as each of them has it."""
    if data is not None and (features is not None or not all(is_pixels(run) for run in runs)):
        why = "--features is given too" if features is not None else "a head takes features: give --features VIEW"
        raise BadOption(f"--data gives images to baselines alone; {why}.")
    images: Any = open_dataset(data) if data is not None else open_view(features, cache)
    prepared: dict[str, PixelView] = {}

    def images_of(run: Run) -> FeatureView:
        fingerprint = run.config["view"]["fingerprint"]
        if is_pixels(run) and fingerprint not in prepared:
            prepared[fingerprint] = pixels_of(run, images)
        return prepared[fingerprint] if is_pixels(run) else images

    return images_of


def _check_features(run: Run, view: FeatureView) -> None:
    """The head means something on features of its own backbone only."""
    if view.fingerprint != run.config["view"]["fingerprint"]:
        try:
            specs = ExtractionSpec.from_dict(run.config["spec"]), ExtractionSpec.from_dict(view.spec)
        except CacheError as error:
            raise RunError(f"{run.path} is damaged: {error}") from error
        if any(spec.imported for spec in specs):
            raise BadOption(
                f"{run.path} was trained on other features than those of {view.label}. Imported features belong to no "
                "known backbone, so a head of other features cannot be evaluated on them, nor theirs on other features."
            )
        changes = describe_differences(*specs, (run.config["provenance"], view.provenance))
        fields = "; ".join(f"{name} ({change})" for name, change in changes) or "what the fingerprint is made of"
        raise BadOption(
            f"{view.label} was not made as the features that {run.path} was trained on, and to its head other features "
            f"mean nothing. They differ in {fields}. Extract these images as those were."
        )
    shape, own = list(view.info(run.output).shape), run.config["view"]["shape"]
    if shape != own:
        raise BadOption(f"{run.output} of {view.label} has the shape {shape}, and the head of {run.path} takes {own}.")


def _rows(view: FeatureView, labels: np.ndarray, split: str | None) -> np.ndarray:
    usable = is_labelled(labels) & plain_rows(view)
    if split is not None:
        usable &= np.array(view.splits) == split
    if not usable.any():
        named = ", ".join(sorted(set(view.splits) - {""})) or "none"
        where = f" in {split} (its data name the splits: {named})" if split else ""
        raise BadOption(f"{view.label} has no image{where} that is labelled with a class of the run.")
    return np.flatnonzero(usable)


def overlap(run: Run, digests: Collection[bytes]) -> list[str]:
    """A sentence where images that are measured, S32 [n], were also used to train or choose the head."""
    used = set(map(bytes, run.digests("train", "val")))
    n = sum(bytes(each) in used for each in digests)
    used_too = f"{n:,} of {len(digests):,} images were also used to train or choose this head"
    return [f"{used_too}: these numbers are too good"] if n else []


@torch.no_grad()
def _answers(run: Run, view: FeatureView, y: np.ndarray, rows: np.ndarray) -> Predictions:
    model, scale, size = run.model, run.standardize, rows_at_once(view.info(run.output).shape)
    logits = []
    for start in range(0, len(rows), ROWS):
        features = view.tensor(run.output, rows[start : start + ROWS])
        logits += [model(scale(part.float())).double().numpy() for part in features.split(size)]
    raw, ids, digests = np.concatenate(logits), [view.ids[i] for i in rows], np.asarray(view.digests)[rows]
    return Predictions(ids, digests, clusters_of(view)[rows], view.groups is not None, y, raw, run.calibration(raw))


def records_of(by_measure: Mapping[str, Any]) -> dict[str, Any]:
    """Of estimates or differences of measures."""
    return {name: each.record() for name, each in by_measure.items()}


def _measured(pairs: Sequence[tuple[Run, Predictions]], resampler: SharedResamples) -> dict[str, Any]:
    run, predictions = pairs[0][0], collect_predictions(pairs)
    estimates = FamilyEstimates(predictions.test_sets, run.classes, resampler)
    return {
        "test": records_of(estimates.all()),
        "per_class": {name: records_of(measures) for name, measures in estimates.of_classes().items()},
        "operating": operating_points(run, estimates, None),
        "calibration": calibration_record(predictions),
    }


def _write(run: Run, name: str, record: dict[str, Any], answers: Predictions) -> Path:
    ids = np.frombuffer(json.dumps(answers.ids).encode(), np.uint8)
    columns = {
        "ids": ids, "digests": digest_octets(answers.digests), "clusters": answers.clusters, "labels": answers.y,
        "logits": answers.logits,
    }  # fmt: skip
    folder, name = run.path / FOLDER, re.sub(r"[^\w.-]+", "_", name)
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").unlink(missing_ok=True)  # the record goes first and comes last
        data = save({key: torch.from_numpy(np.array(value)) for key, value in columns.items()}, {"format": "pt"})
        write_whole(folder / f"{name}.safetensors", data)
        write_record(folder / f"{name}.json", record, {f"{name}.safetensors": digest_of(data)})
    except OSError as error:
        raise CannotWrite(f"Nothing can be written in {folder}: {error.strerror or error}.") from error
    return folder / f"{name}.json"


def read_external(run: Run) -> list[tuple[dict[str, Any], Predictions]]:
    """What was evaluated on other views, by name. Raises RunError."""
    evaluations = []
    for file in sorted((run.path / FOLDER).glob("*.json")):
        record = read_checked_record(file, "evaluation", _KINDS)
        if not all(isinstance(warning, str) for warning in record["warnings"]):
            raise RunError(f"{file} is damaged: it has no proper warnings.")
        evaluations.append((record, _read_answers(run, file, record)))
    return evaluations


def _read_answers(run: Run, file: Path, record: dict[str, Any]) -> Predictions:
    source = file.with_suffix(".safetensors")
    if not source.is_file() or source.is_symlink():
        raise RunError(f"{source} is missing; evaluate the run on that view again.")
    tensors = read_tensors(read_listed(file, record, source.name), source)
    columns = {name: tensor.numpy() for name, tensor in tensors.items()}
    try:
        ids = json.loads(columns.pop("ids", np.zeros(0, np.uint8)).tobytes())
    except ValueError:
        ids = None
    proper = isinstance(ids, list) and all(isinstance(name, str) for name in ids)
    answers = run.checked_answers(ids, columns, record["grouped"]) if proper else None
    if answers is None:
        raise RunError(f"{source} is damaged: it does not fit the run.")
    return answers


def external_records(family: Family, resampler: SharedResamples) -> list[dict[str, Any]]:
    """For each other view: the measures of the family's heads that were evaluated on it, with intervals."""
    views: dict[str, list[tuple[Run, dict[str, Any], Predictions]]] = {}
    for run in family.runs:
        for record, answers in read_external(run):
            name = record["view"] + (f" ({record['split']})" if record["split"] else "")
            views.setdefault(name, []).append((run, record, answers))
    records = []
    for name, evaluations in views.items():
        warnings = list(dict.fromkeys(words for _, record, _ in evaluations for words in record["warnings"]))
        about = {"view": name, "n": len(evaluations[0][2].ids), "heads": len(evaluations), "warnings": warnings}
        records.append(about | _measured([(run, answers) for run, _, answers in evaluations], resampler))
    return records


def match_classes(
    run: Run, view: FeatureView, given: Sequence[str]
) -> tuple[np.ndarray, dict[str, list[str]], dict[str, int], list[str]]:
    """``given``: "NAME=A,B" for a class of the run that the view calls otherwise, "NAME=" for one that it has not.
    Raises BadOption where a class is not found: a class under another name would be missing without a word.

    Returns the labels of every row of the view, as the run counts its classes: int64 [N], -1 for none; of several
    labels float32 [N, L], NaN for unknown; what the view calls each class of the run; images of each class that the
    head does not know, which are left out; sentences about it."""
    if view.task == "unlabelled":
        raise BadOption(f"{view.label} carries no labels to evaluate against. featurecache predict needs none.")
    if (view.task == "multilabel") != (run.task == "multilabel"):
        raise BadOption(
            f"{run.path} is a {run.task} head and the labels of {view.label} are {view.task}: labels beside each other "
            "and classes that exclude each other do not match."
        )
    names = _view_names(run, view, _parse_names(run, view, given))
    run_class: dict[str, str] = {}
    for name, own in names.items():
        for word in own:
            if run_class.setdefault(word, name) != name:
                raise BadOption(f"{word} of {view.label} cannot be both {run_class[word]} and {name} of the run.")
    absent = [name for name, own in names.items() if not own]
    if len(names) - len(absent) < 2 and run.task != "multilabel":
        raise BadOption(f"{view.label} has fewer than two classes of the run; there is nothing to tell apart.")
    view_labels, left_out = np.asarray(view.labels), {}
    if run.task != "multilabel":
        n = np.bincount(view_labels[view_labels >= 0], minlength=len(view.classes))
        left_out = {name: int(n[c]) for c, name in enumerate(view.classes) if name not in run_class and n[c]}
    notes = [f"{view.label} has no {name}: measures of that class are undefined" for name in absent]
    if left_out:
        count, classes = sum(left_out.values()), abbreviated([f"{name} {n:,}" for name, n in left_out.items()], 6)
        notes.append(f"{count:,} images of classes that the head does not know are left out ({classes})")
    if unlabelled := int((~is_labelled(view_labels)).sum()):
        notes.append(f"{unlabelled:,} images carry no label and are left out")
    return _recode(run, view, names), names, left_out, notes


def _parse_names(run: Run, view: FeatureView, given: Sequence[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for text in given:
        name, equals, members = text.partition("=")
        if name not in run.classes or not equals:
            raise BadOption(
                f"--classes {text}: expected NAME=A,B with a class of the run ({', '.join(run.classes[:12])}) before "
                f"the = and what {view.label} calls it behind.{nearest(name, run.classes)}"
            )
        names[name] = [members] if members in view.classes else _members(members)
        if unknown := [member for member in names[name] if member not in view.classes]:
            raise BadOption(
                f"--classes {text}: {view.label} has no class {unknown[0]!r}; it has {', '.join(view.classes[:12])}."
            )
    return names


def _members(text: str) -> list[str]:
    return list(filter(None, names_in(text)))


def _view_names(run: Run, view: FeatureView, given: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class of the run -> classes of the view: as given, of the same name, or those it was merged from in training."""
    names = {name: [name] for name in run.classes if name in view.classes}
    for text in run.config["settings"].get("classes") or ():
        name, _, members = text.partition("=")
        if merged := [member for member in _members(members) if member in view.classes]:
            names.setdefault(name, merged)
    names |= given
    for name in run.classes:
        if name not in names:
            raise BadOption(
                f"{view.label} has no class {name!r}, which {run.path} tells apart; it has "
                f"{', '.join(view.classes[:12])}.{nearest(name, view.classes)} --classes '{name}=…' says what it is "
                f"called there, --classes '{name}=' that there is none."
            )
    return {name: names[name] for name in run.classes}


def _recode(run: Run, view: FeatureView, names: dict[str, list[str]]) -> np.ndarray:
    """The labels of the view as the run counts its classes; of several merged labels any that is there makes it one."""
    columns = [[view.classes.index(word) for word in names[name]] for name in run.classes]
    if run.task != "multilabel":
        return renumber_labels(view, columns)
    labels = np.asarray(view.labels)
    recoded = np.full((len(labels), len(columns)), np.nan, dtype=np.float32)
    for c, own in enumerate(columns):
        if own:
            absent = np.where(np.isnan(labels[:, own]).any(axis=1), np.nan, 0.0)
            recoded[:, c] = np.where((labels[:, own] == 1).any(axis=1), 1.0, absent)
    return recoded
