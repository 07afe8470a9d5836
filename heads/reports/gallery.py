"""Gallery of a report: the worst mistakes and the most confident correct predictions of a head on test, with images.

Images are read back from the source of the view by id and shown only if their digest is the one that was computed
with. What is embedded is a new, small encoding of the pixels: no metadata of the file comes along.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from featurecache.errors import FeatureCacheError
from heads.explanations.explainer import TINY, Explainer, SourceImage, SourceImages, encode_image, visible_box
from heads.explanations.maps import AGAINST, COLOURS, SaliencyMap, extra_values_text, small_overlay
from heads.metrics.calibration import predict_labels, probabilities
from heads.reports.figures import TestPredictions
from heads.runs.run import Run, is_pixels
from heads.task import Predictions

ROW = 6  # images of one kind
FEW = 3  # images of one kind that get a map where each costs a pass of the head for every token


@dataclass(frozen=True)
class GalleryItem:
    """One prediction: row ``row`` of those of run ``run`` (its number); ``label`` of multi-label, else the class."""

    run: int
    row: int
    label: int
    truth: str
    predicted: str
    p_predicted: float
    p_truth: float


@dataclass(frozen=True)
class GalleryPicture:
    """What the page shows of an item. ``image``, ``map``: data URIs or None; ``why``: the reason for a grey box."""

    item: GalleryItem
    id: str
    image: str | None = None
    size: tuple[int, int] = (100, 100)  # width, height
    tiny: bool = False
    why: str = ""
    map: str | None = None
    control: str | None = None  # the map of the head with shuffled weights
    kind: str = ""  # of the map
    box: tuple[float, float, float, float] | None = None  # what the backbone saw: x, y, width, height in parts of it
    sums: str = ""


@dataclass
class Gallery:
    rows: dict[str, list[GalleryPicture]]  # by title
    notes: list[str] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # of its maps: (words, the colour that follows them)

    @property
    def images(self) -> int:
        return sum(picture.image is not None for row in self.rows.values() for picture in row)


def choose(predictions: TestPredictions) -> list[tuple[str, list[GalleryItem]]]:
    """[(title, items)]: of the predictions of runs that do not overlap (one run, or the folds of one seed).

    Mistakes by the probability given to the truth, lowest first; correct ones highest first. No image twice in a row.
    """
    run = predictions[0][0]
    items = [item for number, (run, answers) in enumerate(predictions) for item in _items(number, run, answers)]
    wrong = sorted((item for item in items if item.truth != item.predicted), key=lambda item: item.p_truth)
    right = sorted((item for item in items if item.truth == item.predicted), key=lambda item: -item.p_truth)
    titles = {"": "Worst mistakes"}
    if run.positive is not None:
        sick, well = run.classes[run.positive], run.classes[1 - run.positive]
        titles = {
            sick: f"False negatives: {sick} predicted as {well}",
            well: f"False positives: {well} predicted as {sick}",
        }
    elif run.task == "multilabel":
        titles = {"present": "False negatives: predicted absent", "absent": "False positives: predicted present"}
    rows = [(title, [item for item in wrong if truth in ("", item.truth)]) for truth, title in titles.items()]
    rows.append(("Most confident correct predictions", _in_turn(right)))
    size = ROW if len(rows) > 2 else 12
    distinct = [(title, {(item.run, item.row): item for item in reversed(row)}) for title, row in rows]
    return [(title, list(items.values())[::-1][:size]) for title, items in distinct]


def _items(number: int, run: Run, answers: Predictions) -> list[GalleryItem]:
    p = probabilities(run.task, answers.calibrated_logits)
    predicted = predict_labels(run.task, p, run.calibration.thresholds, run.positive)
    if run.task != "multilabel":
        rows = zip(predicted.tolist(), answers.y.tolist(), p.tolist(), strict=True)
        return [
            GalleryItem(number, row, c, run.classes[y], run.classes[c], each[c], each[y])
            for row, (c, y, each) in enumerate(rows)
        ]
    names, items = ("absent", "present"), []
    for row, c in np.argwhere(~np.isnan(answers.y)).tolist():
        y, guess, both = int(answers.y[row, c]), int(predicted[row, c]), (1 - float(p[row, c]), float(p[row, c]))
        items.append(GalleryItem(number, row, c, names[y], names[guess], both[guess], both[y]))
    return items


def _in_turn(items: list[GalleryItem]) -> list[GalleryItem]:
    """The surest of every class, then the second of every class, and so on: one easy class does not fill the row. Of
    multi-label each label, present and absent, takes its turn."""
    seen: Counter[tuple[int, str]] = Counter()
    turns = []
    for item in items:
        seen[item.label, item.truth] += 1
        turns.append((seen[item.label, item.truth], item))
    return [item for _, item in sorted(turns, key=lambda pair: pair[0])]


class ImageLoader:
    """Images of views, read back; opened once for all families of a page. ``shown``: how an id is written."""

    def __init__(self, shown: Callable[[str], str], images: bool = True) -> None:
        self.shown, self.images = shown, images
        self._originals = SourceImages()

    def gallery(self, predictions: TestPredictions) -> Gallery:
        originals: dict[GalleryItem, SourceImage] = {}
        chosen = {title: items for title, items in choose(predictions) if items}
        gallery = Gallery({t: [self._picture(predictions, item, originals) for item in chosen[t]] for t in chosen})
        if gallery.images:
            gallery.notes.append(self._add_maps(gallery, predictions, originals))
        return gallery

    def _picture(
        self, predictions: TestPredictions, item: GalleryItem, originals: dict[GalleryItem, SourceImage]
    ) -> GalleryPicture:
        run, answers = predictions[item.run]
        name = answers.ids[item.row]
        picture = GalleryPicture(item, self.shown(name))
        if not self.images:
            return picture
        original = self._originals.find(run, name, bytes(answers.digests[item.row]))
        if isinstance(original, str):
            return replace(picture, why=original)
        originals[item] = original
        uri, size = encode_image(original.pixels)
        tiny, box = max(original.pixels.shape[:2]) <= TINY, visible_box(run.config["spec"], original.pixels)
        return replace(picture, image=uri, size=size, tiny=tiny, box=box)

    def _add_maps(
        self, gallery: Gallery, predictions: TestPredictions, originals: dict[GalleryItem, SourceImage]
    ) -> str:
        """Maps beside the images of the first run (they are of one head), and a note that says what they are."""
        run, rows = predictions[0][0], gallery.rows.values()
        boxed = [[p.item for p in row if p.image and p.box and p.item.run == 0] for row in rows]
        if not any(boxed):
            return "No maps: nothing says which part of these images the backbone saw."
        explainer = Explainer(run, self._originals, trust_code=run.trust_code)
        if explainer.view is None and not explainer.on_pixels:
            return "No maps: the view it was trained on is gone or another."
        try:  # code of one's own is not imported for a page that was not asked to
            most = FEW if explainer.slow else None
            chosen = list(dict.fromkeys(item for items in boxed for item in items[:most]))
            labels, images = np.array([item.label for item in chosen]), [originals[item] for item in chosen]
            maps = [each for (each,) in explainer.maps(explainer.default, images, labels)]
        except FeatureCacheError as error:
            return f"No maps: {error}"
        by_item = dict(zip(chosen, maps, strict=True))
        for row in rows:
            row[:] = [_with_map(p, by_item[p.item]) if p.item in by_item else p for p in row]
        gallery.legend = _legend(maps[0], run)
        return _map_note(maps[0], run, len(predictions))


def _with_map(picture: GalleryPicture, each: SaliencyMap) -> GalleryPicture:
    assert each.control is not None
    numbers = [f"full colour {each.largest:.2g}"]
    if each.margin is not None:
        parts = f"patches {each.values.sum():+.2f}, " if each.adds_up else ""
        beside = f": {parts}{extra_values_text(each)}" if each.beside else ""
        numbers.insert(0, f"{each.unit} {each.margin:+.2f}{beside}")
    if each.likeness is not None:
        numbers.append(f"like its control {each.likeness:+.2f}")
    overlays = [small_overlay(values, each.kind, each.largest) for values in (each.values, each.control)]
    own, control = (f"data:image/png;base64,{base64.b64encode(overlay).decode()}" for overlay in overlays)
    return replace(picture, map=own, control=control, kind=each.kind, sums="; ".join(numbers).replace(" -", " −"))


def _legend(each: SaliencyMap, run: Run) -> list[tuple[str, str]]:
    what = "the label being present" if run.task == "multilabel" else "the predicted class"
    own, against = (f"rgb({red} {green} {blue})" for red, green, blue in (COLOURS[each.kind], AGAINST))
    ends = "of 0 to full colour, the number below an enlarged image"
    if not each.signed:
        return [(f"Of {what}, {ends}", own)]
    return [(f"For {what}", own), ("against it", against), (ends, "")]


def _map_note(each: SaliencyMap, run: Run, runs: int) -> str:
    of = f" Of the first of {runs} heads." if runs > 1 else ""
    shuffled = "the weights of the last layer" if is_pixels(run) else "the head's weights"
    return (
        f"{each.kind.capitalize()}, beside each image: {each.how}. A map and its control, the same with {shuffled} "
        "shuffled, are on one scale, each image on its own, and nothing is smoothed. A map that looks like its control "
        f"(rank correlation near 1) says nothing.{of}"
    )
