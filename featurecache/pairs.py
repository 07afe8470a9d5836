"""The sheet of leaks: the images of each pair side by side, with names, splits and classes beneath."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import PurePosixPath

from PIL import Image, ImageDraw

from featurecache.dataset import Dataset, Stored
from featurecache.errors import BadOption, UnreadableImage
from featurecache.findings import extent, heading, remark, words_of
from featurecache.images import digest
from featurecache.leaks import Finding, Leaks
from featurecache.reader import View
from featurecache.sheet import BETWEEN, CELL, FAINT, GAP, HEADING, INK, LINE, MARGIN, PAPER, font, picture, write
from featurecache.sources import reopen

MOST = 24  # pairs of one kind and two splits
ACROSS = 4  # pairs in a row
BESIDE = 3  # pixels between the two of a pair
_WIDTH = 2 * CELL + BESIDE
_STRIP = CELL + 4 * LINE + GAP


def images_of(view: View) -> Dataset:
    """The images a view was made of, opened again. Raises SourceError where they are not there any more, and BadOption
    for an imported view, which never had any."""
    if view.source.get("kind") == "import":
        raise BadOption(f"{view.label} was imported as features: it has no images for a sheet. Leave out --sheet.")
    return reopen(view.source)


def draw(view: View, leaks: Leaks, dataset: Dataset) -> bytes:
    """The sheet as the bytes of a PNG. Rows are found by their ids; an image that has gone is an empty frame."""
    place = {name: row for row, name in enumerate(dataset.ids)}
    rows_down = [-(-min(len(finding.rows), MOST) // ACROSS) for finding in leaks.findings]
    width = 2 * MARGIN + ACROSS * (_WIDTH + 2 * GAP) - 2 * GAP
    height = 2 * MARGIN + 2 * HEADING + sum(HEADING + BETWEEN + down * _STRIP for down in rows_down)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), view.label, 22, INK, width - 2 * MARGIN)
    found = "what stands in two splits, or under two labels" if leaks.findings else "no leaks were found"
    write(pen, (MARGIN, MARGIN + 30), found, 13, FAINT, width - 2 * MARGIN)
    y = MARGIN + 2 * HEADING
    for finding, down in zip(leaks.findings, rows_down, strict=True):
        _title(pen, y, width, finding)
        for number in range(min(len(finding.rows), MOST)):
            corner = (MARGIN + number % ACROSS * (_WIDTH + 2 * GAP), y + HEADING + number // ACROSS * _STRIP)
            _pair(sheet, pen, corner, view, finding, number, lambda row: _read(view, dataset, place, row))
        y += HEADING + BETWEEN + down * _STRIP
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def _title(pen: ImageDraw.ImageDraw, y: int, width: int, finding: Finding) -> None:
    pen.line([(MARGIN, y - 8), (width - MARGIN, y - 8)], "#d9d9d9")
    shown = f", the first {MOST}" if finding.count > MOST else ""
    count = extent(finding) + shown
    right = pen.textlength(count, font(13))
    write(pen, (width - MARGIN - right, y + 2), count, 13, FAINT, right + 1)
    write(pen, (MARGIN, y), heading(finding), 16, INK, width - 2 * MARGIN - right - GAP)


def _pair(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    view: View,
    finding: Finding,
    number: int,
    read: Callable[[int], Stored],
) -> None:
    x, y = corner
    for side, row in enumerate(finding.rows[number].tolist()):
        left = x + side * (CELL + BESIDE)
        picture(sheet, pen, (left, y), lambda row=row: read(row))  # type: ignore[misc]
        name = view.ids[row]
        short = name.rpartition(":")[2] if ":" in name else PurePosixPath(name).stem
        lines = [short, view.splits[row] or "no split", words_of(view, row)]
        for line, text in enumerate(lines):
            write(pen, (left, y + CELL + 2 + line * LINE), text, 11, FAINT, CELL)
    write(pen, (x, y + CELL + 2 + 3 * LINE), remark(view, finding, number), 11, INK, _WIDTH)


def _read(view: View, dataset: Dataset, place: dict[str, int], row: int) -> Stored:
    if view.ids[row] not in place:
        raise UnreadableImage("not among the images any more")
    data = dataset.read(place[view.ids[row]])
    if digest(data).encode() != bytes(view.digests[row]):
        raise UnreadableImage("another image now than when its features were computed")
    return data
