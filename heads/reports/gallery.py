"""The worst mistakes and the surest hits of a head on test, with their images where those can still be had.

Images are read back from the source of the view by id and shown only if their digest is the one that was computed
with. What is embedded is a new, small encoding of the pixels: no metadata of the file comes along.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featurecache.errors import FeatureCacheError
from heads.explanations.explainer import TINY, Explainer, SourceImage, SourceImages, encoded, seen_part
from heads.explanations.maps import Map, beside_words, small_overlay
from heads.metrics import classification as ev
from heads.runs.run import Run, is_pixels
from heads.task import Predictions

SHELF = 8  # images of one kind
FEW = 3  # images of one kind that get a map where each costs a pass of the head for every token


@dataclass(frozen=True)
class GalleryItem:
    """One answer: row ``row`` of the answers of run ``run`` (its number); ``label`` of multi-label, else the call."""

    run: int
    row: int
    label: int
    truth: str
    called: str
    p_called: float
    p_truth: float


@dataclass(frozen=True)
class GalleryPicture:
    """What the page shows of a place. ``image``, ``map``: data URIs or None; ``why``: the reason for a grey box."""

    place: GalleryItem
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


@dataclass(frozen=True)
class GalleryRow:
    title: str
    pictures: list[GalleryPicture]


@dataclass
class Gallery:
    shelves: list[GalleryRow]
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return sum(picture.image is not None for shelf in self.shelves for picture in shelf.pictures)


def choose(
    task: str, classes: Sequence[str], positive: int | None, heard: Sequence[tuple[Run, Predictions]]
) -> list[Any]:
    """[(title, [Place])]: of the answers of runs that do not overlap (one run, or the folds of one seed).

    Mistakes by the probability given to the truth, lowest first; hits highest first. No image twice on one shelf.
    """
    places = [place for number, (run, answers) in enumerate(heard) for place in _places(number, run, answers)]
    wrong = sorted((p for p in places if p.truth != p.called), key=lambda p: p.p_truth)
    right = sorted((p for p in places if p.truth == p.called), key=lambda p: -p.p_truth)
    if task == "binary":
        assert positive is not None
        sick, well = classes[positive], classes[1 - positive]
        titles = {sick: f"Missed: {sick} called {well}", well: f"False alarms: {well} called {sick}"}
        shelves = [(titles[truth], [p for p in wrong if p.truth == truth]) for truth in (sick, well)]
    elif task == "multilabel":
        kinds = {"present": "Missed: called absent", "absent": "False alarms: called present"}
        shelves = [(title, [p for p in wrong if p.truth == truth]) for truth, title in kinds.items()]
    else:
        shelves = [("Worst mistakes", wrong)]
    key = (lambda p: (p.label, p.truth)) if task == "multilabel" else (lambda p: p.truth)
    shelves.append(("Surest hits", _in_turn(right, key)))
    size = SHELF if len(shelves) > 2 else 12
    return [(title, _distinct(found)[:size]) for title, found in shelves]


def _places(number: int, run: Run, answers: Predictions) -> list[GalleryItem]:
    p = ev.probabilities(run.task, answers.z)
    called = ev.predict_labels(run.task, p, run.calibration.thresholds, run.positive)
    if run.task != "multilabel":
        rows = np.arange(len(p))
        values = zip(
            called.tolist(), answers.y.tolist(), p[rows, called].tolist(), p[rows, answers.y].tolist(), strict=True
        )
        return [
            GalleryItem(number, row, c, run.classes[y], run.classes[c], pc, pt)
            for row, (c, y, pc, pt) in enumerate(values)
        ]
    words = ("absent", "present")
    found = []
    for row, c in np.argwhere(~np.isnan(answers.y)).tolist():
        y, said, share = int(answers.y[row, c]), int(called[row, c]), float(p[row, c])
        shares = (1 - share, share)
        found.append(GalleryItem(number, row, c, words[y], words[said], shares[said], shares[y]))
    return found


def _in_turn(places: list[GalleryItem], key: Callable[[GalleryItem], Any]) -> list[GalleryItem]:
    """The surest of every class, then the second of every class, and so on: one easy class does not fill the shelf."""
    seen: dict[Any, int] = {}
    ranked = []
    for place in places:
        seen[key(place)] = seen.get(key(place), 0) + 1
        ranked.append((seen[key(place)], place))
    return [place for _, place in sorted(ranked, key=lambda pair: pair[0])]


def _distinct(places: list[GalleryItem]) -> list[GalleryItem]:
    return list({(place.run, place.row): place for place in reversed(places)}.values())[::-1]


class ImageLoader:
    """Images of views, read back; opened once for all families of a page. ``shown``: how an id is written."""

    def __init__(self, shown: Callable[[str], str], images: bool = True) -> None:
        self.shown, self.images = shown, images
        self._originals = SourceImages()

    def gallery(self, heard: Sequence[tuple[Run, Predictions]]) -> Gallery:
        run = heard[0][0]
        chosen = choose(run.task, run.classes, run.positive, heard)
        found: dict[GalleryItem, SourceImage] = {}
        shelves = [
            GalleryRow(title, [self._picture(heard, place, found) for place in places]) for title, places in chosen
        ]
        gallery = Gallery([shelf for shelf in shelves if shelf.pictures])
        if gallery.images:
            self._add_maps(gallery, heard, found)
        return gallery

    def _picture(
        self, heard: Sequence[tuple[Run, Predictions]], place: GalleryItem, found: dict[GalleryItem, SourceImage]
    ) -> GalleryPicture:
        run, answers = heard[place.run]
        name = answers.ids[place.row]
        picture = GalleryPicture(place, self.shown(name))
        if not self.images:
            return picture
        original = self._originals.find(run, name, bytes(answers.digests[place.row]))
        if isinstance(original, str):
            return replace(picture, why=original)
        found[place] = original
        uri, size = encoded(original.pixels)
        tiny, box = max(original.pixels.shape[:2]) <= TINY, seen_part(run.config["spec"], original.pixels)
        return replace(picture, image=uri, size=size, tiny=tiny, box=box)

    def _add_maps(
        self, gallery: Gallery, heard: Sequence[tuple[Run, Predictions]], found: dict[GalleryItem, SourceImage]
    ) -> None:
        """Maps beside the images of the first run (they are of one head), with a note that says what they are."""
        run = heard[0][0]
        boxed = [[p.place for p in s.pictures if p.image and p.box and p.place.run == 0] for s in gallery.shelves]
        if not any(boxed):
            gallery.notes.append("No maps: nothing says which part of these images the backbone saw.")
            return
        explainer = Explainer(run, self._originals, trust_code=run.trust_code)
        if explainer.view is None and not explainer.on_pixels:
            gallery.notes.append("No maps: the view it was trained on is gone or another.")
            return
        try:
            most = FEW if explainer.slow else None
            wanted = {place: found[place] for places in boxed for place in places[:most]}
            labels = np.array([place.label for place in wanted])
            maps = [each for (each,) in explainer.maps(explainer.default, list(wanted.values()), labels)]
        except FeatureCacheError as error:
            gallery.notes.append(f"No maps: {error}")
            return
        by_place = dict(zip(wanted, maps, strict=True))
        for shelf in gallery.shelves:
            shelf.pictures[:] = [_with_map(picture, by_place.get(picture.place)) for picture in shelf.pictures]
        gallery.notes.append(_map_words(maps[0], run, len(heard)))


def _with_map(picture: GalleryPicture, found: Map | None) -> GalleryPicture:
    if found is None:
        return picture
    sums = f"{found.unit} {found.margin:+.2f}" if found.margin is not None else ""
    parts = f"patches {found.values.sum():+.2f}, " if found.adds_up else ""
    numbers = [sums + (f": {parts}{beside_words(found)}" if found.beside else "")] if sums else []
    numbers.append(f"strongest {np.abs(found.values).max():.2g}")
    if found.likeness is not None:
        numbers.append(f"like its control {found.likeness:+.2f}")
    assert found.control is not None
    return replace(
        picture, map=_uri(found.values, found.kind), control=_uri(found.control, found.kind), kind=found.kind,
        sums="; ".join(numbers).replace(" -", " −"),
    )  # fmt: skip


def _uri(values: np.ndarray, kind: str) -> str:
    return "data:image/png;base64," + base64.b64encode(small_overlay(values, kind)).decode()


def _map_words(each: Map, run: Run, runs: int) -> str:
    of = f" Of the first of {runs} heads." if runs > 1 else ""
    what = "the label being present" if run.task == "multilabel" else "the class it called"
    colours = f"Orange speaks for {what}, blue against; each" if each.signed else f"Of {what}; each"
    shuffled = "the weights of the last layer" if is_pixels(run) else "the head's weights"
    return (
        f"{each.kind.capitalize()}, beside each image: {each.how}. {colours} image has its own scale, and nothing is "
        f"smoothed. Right of it the control: the same with {shuffled} shuffled; a map that looks like its "
        f"control (rank correlation near 1) says nothing.{of}"
    )
