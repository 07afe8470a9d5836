"""The worst mistakes and the surest hits of a head on test, with their images where those can still be had.

Images are read back from the source of the view by id and shown only if their digest is the one that was computed
with. What is embedded is a new, small encoding of the pixels: no metadata of the file comes along.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import FeatureCacheError
from heads import evaluate as ev
from heads.answers import Answers
from heads.runs import Run
from heads.saliency import Maps, overlay, token_maps
from heads.thumbnails import TINY, encoded, seen_part

if TYPE_CHECKING:
    from featurecache.reader import View

SHELF = 8  # images of one kind


@dataclass(frozen=True)
class Place:
    """One answer: row ``row`` of the answers of run ``run`` (its number); ``label`` of multi-label, else the call."""

    run: int
    row: int
    label: int
    truth: str
    called: str
    p_called: float
    p_truth: float


@dataclass(frozen=True)
class Picture:
    """What the page shows of a place. ``image``, ``map``: data URIs or None; ``why``: the reason for a grey box."""

    place: Place
    id: str
    image: str | None = None
    size: tuple[int, int] = (100, 100)  # width, height
    tiny: bool = False
    why: str = ""
    map: str | None = None
    box: tuple[float, float, float, float] | None = None  # what the backbone saw: x, y, width, height in parts of it
    sums: str = ""


@dataclass(frozen=True)
class Shelf:
    title: str
    pictures: list[Picture]


@dataclass
class Gallery:
    shelves: list[Shelf]
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return sum(picture.image is not None for shelf in self.shelves for picture in shelf.pictures)


def choose(task: str, classes: Sequence[str], positive: int | None, heard: Sequence[tuple[Run, Answers]]) -> list[Any]:
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


def _places(number: int, run: Run, answers: Answers) -> list[Place]:
    p = ev.probabilities(run.task, answers.z)
    called = ev.call(run.task, p, run.calibration.thresholds, run.positive)
    if run.task != "multilabel":
        rows = np.arange(len(p))
        values = zip(
            called.tolist(), answers.y.tolist(), p[rows, called].tolist(), p[rows, answers.y].tolist(), strict=True
        )
        return [
            Place(number, row, c, run.classes[y], run.classes[c], pc, pt) for row, (c, y, pc, pt) in enumerate(values)
        ]
    words = ("absent", "present")
    found = []
    for row, c in np.argwhere(~np.isnan(answers.y)).tolist():
        y, said, share = int(answers.y[row, c]), int(called[row, c]), float(p[row, c])
        shares = (1 - share, share)
        found.append(Place(number, row, c, words[y], words[said], shares[said], shares[y]))
    return found


def _in_turn(places: list[Place], key: Callable[[Place], Any]) -> list[Place]:
    """The surest of every class, then the second of every class, and so on: one easy class does not fill the shelf."""
    seen: dict[Any, int] = {}
    ranked = []
    for place in places:
        seen[key(place)] = seen.get(key(place), 0) + 1
        ranked.append((seen[key(place)], place))
    return [place for _, place in sorted(ranked, key=lambda pair: pair[0])]


def _distinct(places: list[Place]) -> list[Place]:
    return list({(place.run, place.row): place for place in reversed(places)}.values())[::-1]


class Album:
    """Images of views, read back; opened once for all families of a page. ``shown``: how an id is written."""

    def __init__(self, shown: Callable[[str], str], images: bool = True) -> None:
        self.shown, self.images = shown, images
        self._datasets: dict[str, Any] = {}
        self._views: dict[str, Any] = {}

    def gallery(self, heard: Sequence[tuple[Run, Answers]]) -> Gallery:
        run = heard[0][0]
        chosen = choose(run.task, run.classes, run.positive, heard)
        shelves = [Shelf(title, [self._picture(heard, place) for place in places]) for title, places in chosen]
        gallery = Gallery([shelf for shelf in shelves if shelf.pictures])
        if self.images:
            self._add_maps(gallery, heard)
        return gallery

    def _picture(self, heard: Sequence[tuple[Run, Answers]], place: Place) -> Picture:
        run, answers = heard[place.run]
        name = answers.ids[place.row]
        picture = Picture(place, self.shown(name))
        if not self.images:
            return picture
        pixels = self._pixels(run, name, bytes(answers.digests[place.row]))
        if isinstance(pixels, str):
            return replace(picture, why=pixels)
        uri, size = encoded(pixels)
        return replace(
            picture, image=uri, size=size, tiny=max(pixels.shape[:2]) <= TINY, box=seen_part(run.config["spec"], pixels)
        )

    def _pixels(self, run: Run, name: str, digest: bytes) -> np.ndarray | str:
        """uint8 [H, W, 3] of the very image, or why it cannot be shown."""
        from featurecache.images import decode
        from featurecache.images import digest as digest_of

        dataset, where = self._dataset(run.config["view"].get("source") or {})
        if isinstance(dataset, str):
            return dataset
        if name not in where:
            return "no longer in the source"
        try:
            data = dataset.read(where[name])
            if digest_of(data).encode() != digest:
                return "changed since it was computed with"
            return decode(data).permute(1, 2, 0).contiguous().numpy()
        except (FeatureCacheError, OSError) as error:
            return str(error)

    def _dataset(self, source: dict[str, Any]) -> tuple[Any, dict[str, int]]:
        import featurecache.sources

        key = json.dumps(source, sort_keys=True)
        if key not in self._datasets:
            try:
                dataset = featurecache.sources.reopen(source)
                self._datasets[key] = dataset, {name: i for i, name in enumerate(dataset.ids)}
            except (FeatureCacheError, OSError, KeyError, TypeError):
                self._datasets[key] = "the source is gone", {}
        return self._datasets[key]

    def _view(self, run: Run) -> View | None:
        """The view a run was trained on, as it was; None where it is gone or another."""
        from featurecache.views import open_view

        path = run.config["view"]["path"]
        if path not in self._views:
            try:
                found = open_view(path)
                self._views[path] = found if found.fingerprint == run.config["view"].get("fingerprint") else None
            except (FeatureCacheError, OSError):
                self._views[path] = None
        return self._views[path]

    def _add_maps(self, gallery: Gallery, heard: Sequence[tuple[Run, Answers]]) -> None:
        """Maps beside the images of the first run (they are of one head), with a note that says what they are."""
        run, answers = heard[0]
        if not gallery.images:
            return
        view = self._view(run)
        if view is None:
            gallery.notes.append("No maps: the view it was trained on is gone or another.")
            return
        plain = range(len(view)) if view.versions is None else np.flatnonzero(np.asarray(view.versions) == 0).tolist()
        where = {view.ids[row]: row for row in plain}
        wanted = {
            place: row
            for shelf in gallery.shelves
            for picture in shelf.pictures
            if picture.image is not None and picture.box is not None and (place := picture.place).run == 0
            and (row := where.get(answers.ids[place.row])) is not None
            and view.digests[row] == answers.digests[place.row]
        }  # fmt: skip
        if not wanted:
            gallery.notes.append("No maps: nothing says which part of these images the backbone saw.")
            return
        try:
            rows, labels = np.array(list(wanted.values())), np.array([place.label for place in wanted])
            maps = token_maps(run, view, rows, labels)
        except FeatureCacheError as error:
            maps = f"no maps: {error}"
        if isinstance(maps, str):
            gallery.notes.append(maps[0].upper() + maps[1:] + ".")
            return
        found = {place: _map_of(maps, i) for i, place in enumerate(wanted)}
        for shelf in gallery.shelves:
            shelf.pictures[:] = [_with_map(picture, found.get(picture.place)) for picture in shelf.pictures]
        gallery.notes.append(_map_words(maps, run, len(heard)))


def _map_of(maps: Maps, i: int) -> tuple[str, str]:
    uri = "data:image/png;base64," + base64.b64encode(overlay(maps.patches[i])).decode()
    if not maps.exact:
        return uri, ""
    parts = {"patches": maps.patches[i].sum(), "class token": maps.prefix[i], "constant": maps.constant[i]}
    shown = ", ".join(f"{name} {part:+.2f}" for name, part in parts.items() if abs(part) > 5e-7)
    return uri, f"log-odds {sum(parts.values()):+.2f}: {shown}".replace("-", "−").replace("log−odds", "log-odds")


def _with_map(picture: Picture, found: tuple[str, str] | None) -> Picture:
    return picture if found is None else replace(picture, map=found[0], sums=found[1])


def _map_words(maps: Maps, run: Run, runs: int) -> str:
    of = f" Of the first of {runs} heads." if runs > 1 else ""
    what = "the label being present" if run.task == "multilabel" else "the class it called"
    return (
        f"Beside each image: {maps.words}. Orange speaks for {what}, blue against; each image has its own scale, and "
        f"nothing is smoothed.{of}"
    )
