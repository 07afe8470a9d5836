"""``explain``: maps over images of one or several runs, as PNG files with colour bars and as numbers.

<out>/001-chest7-contribution.png    the image; for each run its map, and below it the control
<out>/explain.json                   every map, its control and the numbers beside it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import BadOption, CannotWrite, UnreadableImage, nearest
from featurecache.formatting import aligned, one_line
from heads.explanations.explainer import Explainer, SourceImage, SourceImages, read_source_image, visible_box
from heads.explanations.maps import KINDS, Panel, SaliencyMap, class_margin_weights, draw_maps
from heads.inference import Image, iterate_images
from heads.metrics.calibration import predict_labels, probabilities
from heads.runs.run import Run, is_pixels, load_run, name_of
from heads.task import Say

PART = 16  # images at once


@dataclass(frozen=True)
class ExplainReport:
    """``records``: one for each image, kind, run and map, as in explain.json; an image that could not be read, and a
    run that has no map of a kind, have the reason under "error". ``files``: the PNGs."""

    path: Path
    records: list[dict[str, Any]]
    files: list[Path]


def explain(
    runs: Run | str | Path | Sequence[Run | str | Path], images: Image | Iterable[Image], *,
    out: str | Path | None = None, kinds: str | Sequence[str] | None = None, classes: str | Sequence[str] | None = None,
    method: str = "replace", device: str = "auto", weights: str | None = None, trust_code: bool = False,
    say: Say | None = None,
) -> ExplainReport:  # fmt: skip
    """Maps of ``runs`` over ``images`` (files, folders, tables, ids of the view), written into ``out`` (by default
    ``explain`` in the folder of the first run).

    ``kinds``: by default contribution, of networks on pixels grad-cam. ``classes``: which margins;
    by default of each image that of the class called. ``method`` of contribution: replace, or gradient.
    Raises BadOption where no run has such a map, RunError, CannotWrite; the backbone's errors as predict.
    """
    folders = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    opened = [run if isinstance(run, Run) else load_run(run, trust_code=trust_code) for run in folders]
    if not opened:
        raise BadOption("explain needs a run folder, such as runs/chest-large-1.")
    originals = SourceImages()
    explainers = [Explainer(run, originals, device=device, weights=weights, trust_code=trust_code) for run in opened]
    names: list[str | None] = [classes] if classes is None or isinstance(classes, str) else [*classes] or [None]
    request = _Request(explainers, _kinds(kinds, explainers), names, method)
    folder = _folder(Path(out) if out is not None else opened[0].path / "explain")
    records, files, number = [], [], 0
    stream = iter(_images(images, opened, originals))
    while part := list(islice(stream, PART)):
        readable = [image for image in part if isinstance(image, SourceImage)]
        records += [{"image": name, "error": why} for name, why in (p for p in part if not isinstance(p, SourceImage))]
        for image, results in zip(readable, request.results(readable) if readable else [], strict=True):
            number += 1
            paths, numbers = _write_image(folder, number, image, results)
            files += paths
            records += numbers
            if say:
                say(f"explained  {image.name}: {', '.join(path.name for path in paths)}")
    if not files and not records:
        raise BadOption("explain needs an image: a file, a folder, a table, or the id of an image of the view.")
    _write(folder / "explain.json", (json.dumps(records, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode())
    return ExplainReport(folder, records, files)


@dataclass(frozen=True)
class ExplainResult:
    """What one run says of one image: maps of a kind, or why there are none."""

    run: Run
    kind: str
    called: str  # the class explained, "" where a map is of none
    probability: float | None
    margin: float | None  # of that class, as `heads.explanations.maps` has it
    maps: list[SaliencyMap]
    why: str = ""


@dataclass
class _Request:
    explainers: list[Explainer]
    kinds: list[list[str]]  # of each run
    classes: list[str | None]
    method: str

    def results(self, images: list[SourceImage]) -> list[list[ExplainResult]]:
        """For every image its results. Raises BadOption where no run has any map."""
        by_image: list[list[ExplainResult]] = [[] for _ in images]
        for explainer, kinds in zip(self.explainers, self.kinds, strict=True):
            logits = explainer.logits(images)
            for kind in kinds:
                for name in self.classes if kind != "attention" else [None]:
                    chosen = _chosen_classes(explainer.run, logits, name)
                    results = self._of_kind(explainer, kind, images, chosen, logits)
                    for image_results, result in zip(by_image, results, strict=True):
                        image_results.append(result)
        reasons = [result.why for results in by_image for result in results]
        if reasons and all(reasons):
            raise BadOption("; ".join(dict.fromkeys(reasons)))
        return by_image

    def _of_kind(
        self, explainer: Explainer, kind: str, images: list[SourceImage], chosen: np.ndarray, logits: np.ndarray
    ) -> list[ExplainResult]:
        run, why = explainer.run, ""
        try:
            maps = explainer.maps(kind, images, chosen, self.method)
        except BadOption as error:
            if len(self.explainers) == 1 and len(self.kinds[0]) == 1:
                raise
            maps, why = [[] for _ in images], str(error)
        if kind == "attention":
            return [ExplainResult(run, kind, "", None, None, each, why) for each in maps]
        toward = class_margin_weights(chosen, len(run.classes), 1.0, run.task == "multilabel")
        margins = (logits * toward.double().numpy()).sum(1)  # these logits have their temperature already
        rows = zip(chosen, probabilities(run.task, logits), margins, maps, strict=True)
        return [
            ExplainResult(run, kind, run.classes[c], float(p[c]), float(margin), each, why)
            for c, p, margin, each in rows
        ]


def _chosen_classes(run: Run, logits: np.ndarray, name: str | None) -> np.ndarray:
    """int64 [n]: the class called, of multi-label the likeliest label, or the one that was named."""
    if name is not None:
        if name not in run.classes:
            raise BadOption(
                f"{run.path} has no class {name!r}.{nearest(name, run.classes)} Its classes: {', '.join(run.classes)}."
            )
        return np.full(len(logits), run.classes.index(name))
    p = probabilities(run.task, logits)
    if run.task == "multilabel":
        return p.argmax(axis=1)
    return predict_labels(run.task, p, run.calibration.thresholds, run.positive).astype(np.int64)


def _kinds(kinds: str | Sequence[str] | None, explainers: Sequence[Explainer]) -> list[list[str]]:
    if kinds is None:
        return [[explainer.default] for explainer in explainers]
    words = kinds.split(",") if isinstance(kinds, str) else list(kinds)
    named = list(dict.fromkeys(word.strip() for word in words))
    for word in named:
        if word not in KINDS:
            raise BadOption(f'--kind "{word}" is not one of {", ".join(KINDS)}.{nearest(word, KINDS)}')
    return [named for _ in explainers]


def _images(
    images: Image | Iterable[Image], runs: Sequence[Run], originals: SourceImages
) -> Iterable[SourceImage | tuple[str, str]]:
    """What can be read, and (name, reason) of what cannot; a word that is no path may be an id of a run's view."""
    for image in [images] if isinstance(images, str | Path | bytes | np.ndarray) else images:
        if isinstance(image, str) and not Path(image).exists():
            matches = [originals.find(run, image) for run in runs]
            reason = f"no such file, nor an image of the run's data ({matches[0]})"
            yield next((each for each in matches if isinstance(each, SourceImage)), (image, reason))
            continue
        for name, data in iterate_images([image]):
            yield _read(name, data)


def _read(name: str, data: bytes | np.ndarray | str) -> SourceImage | tuple[str, str]:
    if isinstance(data, str):
        return name, data
    try:
        return read_source_image(name, data)
    except UnreadableImage as error:
        return name, str(error)


def _write_image(
    folder: Path, number: int, image: SourceImage, results: list[ExplainResult]
) -> tuple[list[Path], list[dict[str, Any]]]:
    """A PNG for every kind, and the records."""
    files, records = [], []
    stem = re.sub(r"(?i)\.(png|jpe?g|tiff?|bmp|gif|webp|p[gpn]m|dcm)$", "", Path(image.name).name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[-60:]
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        panels = [
            Panel(
                _title(result), visible_box(result.run.config["spec"], image.pixels), result.maps, result.why,
                is_pixels(result.run),
            )
            for result in of_kind
        ]  # fmt: skip
        untrained = any(result.run.untrained for result in of_kind)
        path = folder / f"{number:03d}-{stem}-{kind}.png"
        _write(path, draw_maps(image.pixels, kind, panels, untrained))
        files.append(path)
        records += [record for result in of_kind for record in _records(image.name, result, path)]
    return files, records


def _title(result: ExplainResult) -> str:
    run = result.run
    lines = [name_of(run.head, run.output), f"{run.path.resolve().name} on {run.config['view']['label']}"]
    if run.config["settings"].get("random_weights"):
        lines.append("begun from random weights")
    if result.probability is not None:
        lines.append(f"p {result.probability:.2f} of {result.called}")
    return "\n".join(lines)


def _records(name: str, result: ExplainResult, path: Path) -> list[dict[str, Any]]:
    run, called = str(result.run.path), result.called or None
    about: dict[str, Any] = {"image": name, "run": run, "kind": result.kind, "class": called}
    if result.why:
        return [about | {"error": result.why}]
    about |= {"probability": result.probability, "margin": result.margin}
    return [about | _numbers(each) | {"png": path.name} for each in result.maps]


def _numbers(each: SaliencyMap) -> dict[str, Any]:
    return {
        "map_of": each.small, "how": each.how, "unit": each.unit, "adds_up": each.adds_up, "beside": each.beside,
        "peak": None if each.peak is None else list(each.peak), "grid": list(each.values.shape),
        "values": _rounded(each.values), "control": _rounded(each.control), "likeness_to_control": each.likeness,
    }  # fmt: skip


def _rounded(values: np.ndarray | None) -> list[Any] | None:
    return None if values is None else [[float(f"{v:.6g}") for v in row] for row in values.tolist()]


def explanations_table(records: Sequence[dict[str, Any]]) -> str:
    """For a terminal: a line for each map, places counted from 1 at the upper left; errors below."""
    rows = [["image", "map", "run", "class", "margin", "strongest at", "beside it", "like its control"]]
    for r in records:
        if "error" not in r:
            run, (height, width) = Path(r["run"]).resolve().name, r["grid"]
            down, across = r["peak"] or (-1, -1)
            place = f"row {down + 1}/{height}, column {across + 1}/{width}" if r["peak"] else "nowhere above 0"
            beside = ", ".join(f"{name} {part:+.2f}" for name, part in r["beside"].items()) or "–"
            rows.append(
                [one_line(r["image"]), f"{r['kind']}: {r['map_of']}", run, r["class"] or "any",
                 _number(r["margin"]), place, beside, _number(r["likeness_to_control"])]
            )  # fmt: skip
    lines = aligned(rows, right=len(rows[0])) if len(rows) > 1 else []
    for r in records:
        if "error" in r:
            what = f"no {r['kind']} for {Path(r['run']).name}: " if "kind" in r else "could not be read: "
            lines.append(f"{one_line(r['image'])}  {what}{one_line(r['error'])}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise BadOption(f"--out {path} is a file; it must be a folder, or a name that is free.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(error.errno, f"No maps can be written in {path}: {error.strerror}.") from error
    return path


def _write(path: Path, data: bytes) -> None:
    from featurecache.files.atomic import write_whole

    try:
        write_whole(path, data)
    except OSError as error:
        raise CannotWrite(error.errno, f"{path} could not be written: {error.strerror or error}.") from error
