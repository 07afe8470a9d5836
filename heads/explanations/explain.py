"""``explain``: maps over images of one or several runs, as PNG files with colour bars and as numbers.

<out>/001-chest7-contribution.png    the image; for each run its map, and below it the control
<out>/explain.json                   every map, its control and the numbers beside it; it lists the images by hash
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, CannotWrite, UnreadableImage, nearest
from featurecache.files.atomic import write_whole
from featurecache.files.names import check_path
from featurecache.formatting import aligned, one_line, signed
from featurecache.images.headers import read_by
from heads.explanations.explainer import Explainer, SourceImage, SourceImages, read_source_image, visible_box
from heads.explanations.maps import KINDS, Panel, SaliencyMap, class_margin_weights, draw_maps
from heads.inference import Image, images_of, in_parts, iterate_images
from heads.metrics.calibration import predict_labels, probabilities
from heads.runs.folder import digest_of, write_record
from heads.runs.run import Run, is_pixels, load_run, name_of
from heads.task import Say

RECORD = "explain.json"
PART = 100_000_000, 16  # about the pixels, and images, in memory at once


@dataclass(frozen=True)
class ExplainReport:
    """``records``: one for each image, kind, run and map, as in explain.json; an image that could not be read, and a
    run that has no map of a kind, have the reason under "error". ``files``: the PNGs."""

    path: Path
    records: list[dict[str, Any]]
    files: list[Path]


@exact_arithmetic()
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
    requested = _kinds(kinds)
    _check_classes(opened, names)
    folder = _folder(Path(out) if out is not None else opened[0].path / "explain")
    records: list[dict[str, Any]] = []
    files: dict[Path, str] = {}
    numbers = count(1)
    for part in in_parts(_images(images, opened, originals), _pixels_of, PART):
        readable = [image for image in part if isinstance(image, SourceImage)]
        records += [{"image": p[0], "error": p[1]} for p in part if not isinstance(p, SourceImage)]
        if not readable:
            continue
        explained = [each for one in explainers for each in _of_run(one, requested, names, method, readable)]
        if all(reasons := [result.why for result, *_ in explained]):
            raise BadOption("; ".join(dict.fromkeys(reasons)))
        (folder / RECORD).unlink(missing_ok=True)  # it goes first and comes last
        for image, results in zip(readable, zip(*explained, strict=True), strict=True):
            paths, written = _write_image(folder, next(numbers), image, results)
            files |= paths
            records += written
            if say:
                say(f"explained  {image.name}: {', '.join(path.name for path in paths)}")
    if not records:
        raise BadOption("explain needs an image: a file, a folder, a table, or the id of an image of the view.")
    if files:  # else those that are there stay described
        write_record(folder / RECORD, {"maps": records}, {path.name: h for path, h in files.items()})
    return ExplainReport(folder, records, list(files))


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


def _pixels_of(image: SourceImage | tuple[str, str]) -> int:
    return image.pixels.size // 3 if isinstance(image, SourceImage) else 0


def _of_run(
    explainer: Explainer, kinds: Sequence[str], names: Sequence[str | None], method: str, images: list[SourceImage]
) -> list[list[ExplainResult]]:
    """For every kind (by default the run's own) and class that is explained the result of every image."""
    run, logits, results = explainer.run, explainer.logits(images), []
    wanted = [(k, name) for k in kinds or [explainer.default] for name in (names if k != "attention" else [None])]
    for kind, name in wanted:
        chosen, why = _chosen_classes(run, logits, name), ""
        try:
            maps = explainer.maps(kind, images, chosen, method)
        except BadOption as error:
            maps, why = [[] for _ in images], str(error)
        if kind == "attention":
            results.append([ExplainResult(run, kind, "", None, None, each, why) for each in maps])
            continue
        toward = class_margin_weights(chosen, len(run.classes), 1.0, run.task == "multilabel")
        margins = (logits * toward.double().numpy()).sum(1)  # these logits have their temperature already
        rows = zip(chosen, probabilities(run.task, logits), margins, maps, strict=True)
        named = (ExplainResult(run, kind, run.classes[c], float(p[c]), float(m), each, why) for c, p, m, each in rows)
        results.append(list(named))
    return results


def _check_classes(runs: Sequence[Run], names: Sequence[str | None]) -> None:
    for run, name in product(runs, names):
        if name is not None and name not in run.classes:
            classes = f"Its classes: {', '.join(run.classes)}."
            raise BadOption(f"{run.path} has no class {name!r}.{nearest(name, run.classes)} {classes}")


def _chosen_classes(run: Run, logits: np.ndarray, name: str | None) -> np.ndarray:
    """int64 [n]: the class called, of multi-label the likeliest label, or the one that was named."""
    if name is not None:
        return np.full(len(logits), run.classes.index(name))
    p = probabilities(run.task, logits)
    if run.task == "multilabel":
        return p.argmax(axis=1)
    return predict_labels(run.task, p, run.calibration.thresholds, run.positive).astype(np.int64)


def _kinds(kinds: str | Sequence[str] | None) -> list[str]:
    """Those that were named, none where each run has its default."""
    names = kinds.split(",") if isinstance(kinds, str) else kinds or ()
    kinds = list(dict.fromkeys(name.strip() for name in names))
    for kind in kinds:
        if kind not in KINDS:
            raise BadOption(f'--kind "{kind}" is not one of {", ".join(KINDS)}.{nearest(kind, KINDS)}')
    return kinds


def _images(
    images: Image | Iterable[Image], runs: Sequence[Run], originals: SourceImages
) -> Iterable[SourceImage | tuple[str, str]]:
    """What can be read, and (name, reason) of what cannot; a word that is no path may be an id of a run's view."""
    for image in images_of(images):
        if isinstance(image, str) and not Path(image).exists():
            matches = [originals.find(run, image) for run in runs]
            reason = f"no such file, nor an image of the run's data ({matches[0]})"
            yield next((each for each in matches if isinstance(each, SourceImage)), (image, reason))
            continue
        reading = runs[0].config["spec"].get("preprocess", {})
        for name, data, _ in iterate_images([image]):
            try:
                yield (name, data) if isinstance(data, str) else read_source_image(name, read_by(data, reading))
            except UnreadableImage as error:
                yield name, str(error)


def _write_image(
    folder: Path, number: int, image: SourceImage, results: Sequence[ExplainResult]
) -> tuple[dict[Path, str], list[dict[str, Any]]]:
    """A PNG for every kind with its hash, and the records."""
    files, records = {}, []
    stem = re.sub(r"(?i)\.(png|jpe?g|tiff?|bmp|gif|webp|p[gpn]m|dcm)$", "", Path(image.name).name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[-60:]
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        panels = [_panel(result, image.pixels) for result in of_kind]
        path = folder / f"{number:03d}-{stem}-{kind}.png"
        data = draw_maps(image.pixels, kind, panels, any(result.run.untrained for result in of_kind))
        write_whole(path, data)
        files[path] = digest_of(data)
        records += [record for result in of_kind for record in _records(image.name, result, path)]
    return files, records


def _panel(result: ExplainResult, pixels: np.ndarray) -> Panel:
    run = result.run
    lines = [name_of(run.head, run.output), f"{run.path.resolve().name} on {run.config['view']['label']}"]
    if run.config["settings"].get("random_weights"):
        lines.append("begun from random weights")
    if result.probability is not None:
        lines.append(f"p {result.probability:.2f} of {result.called}")
    box = visible_box(run.config["spec"], pixels)
    return Panel("\n".join(lines), box, result.maps, result.why, is_pixels(run))


def _records(name: str, result: ExplainResult, path: Path) -> list[dict[str, Any]]:
    run, called = str(result.run.path), result.called or None
    name = name.encode("utf-8", "backslashreplace").decode()  # of files whose names are no text
    about: dict[str, Any] = {"image": name, "run": run, "kind": result.kind, "class": called}
    if result.why:
        return [about | {"error": result.why}]
    about |= {"probability": result.probability, "margin": result.margin}
    return [
        about | {
            "map_of": each.small, "how": each.how, "unit": each.unit, "adds_up": each.adds_up, "beside": each.beside,
            "peak": None if each.peak is None else list(each.peak), "grid": list(each.values.shape),
            "values": _rounded(each.values), "control": _rounded(each.control), "likeness_to_control": each.likeness,
            "png": path.name,
        }
        for each in result.maps
    ]  # fmt: skip


def _rounded(values: np.ndarray | None) -> list[Any] | None:
    return None if values is None else [[float(f"{v:.6g}") for v in row] for row in values.tolist()]


def explanations_table(records: Sequence[dict[str, Any]]) -> str:
    """For a terminal: a line for each map, places counted from 1 at the upper left; errors below."""
    rows = [["image", "map", "run", "class explained", "margin", "strongest at", "beside it", "like its control"]]
    errors = []
    for r in records:
        if "error" in r:
            what = f"no {r['kind']} for {Path(r['run']).name}: " if "kind" in r else "could not be read: "
            errors.append(f"{one_line(r['image'])}  {what}{one_line(r['error'])}")
            continue
        margin, likeness = ("–" if r[k] is None else signed(r[k]) for k in ("margin", "likeness_to_control"))
        (height, width), (down, across) = r["grid"], r["peak"] or (-1, -1)
        place = f"row {down + 1}/{height}, column {across + 1}/{width}" if r["peak"] else "nowhere above 0"
        beside = ", ".join(f"{name} {signed(part)}" for name, part in r["beside"].items()) or "–"
        name, run = one_line(r["image"]), Path(r["run"]).resolve().name
        of = r["class"] or "any"
        rows.append([name, f"{r['kind']}: {r['map_of']}", run, of, margin, place, beside, likeness])
    return "\n".join([*(aligned(rows, right=len(rows[0])) if len(rows) > 1 else []), *errors])


def _folder(path: Path) -> Path:
    check_path(path, "--out")
    if path.exists() and not path.is_dir():
        raise BadOption(f"--out {path} is a file; it must be a folder, or a name that is free.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(error.errno, f"No maps can be written in {path}: {error.strerror}.") from error
    return path
