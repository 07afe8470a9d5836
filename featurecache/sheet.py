"""The contact sheet: a few images of every class and split on one PNG, with their names beneath.

`picture`, `write` and `font` draw other sheets too (`featurecache.pairs`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from featurecache.dataset import Dataset, Stored
from featurecache.describe import has_label, lacks_label, spread
from featurecache.errors import UnreadableImage
from featurecache.images import decode

# Pixels.
CELL, GAP, CAPTION, MARGIN, HEADING, LINE, BETWEEN = 112, 10, 18, 28, 34, 16, 18
GUTTER = 84  # left of the images, for the names of the splits
MOST_CLASSES = 40
_LONGEST = 500  # characters of a name: more than fit on a sheet
PAPER, INK, FAINT, MAT, ALARM = "#ffffff", "#1a1a1a", "#6b6b6b", "#f0f0f0", "#b3261e"
_SPLITS = ("train", "val", "test", "")


def draw(dataset: Dataset, per_class: int) -> bytes:
    """The sheet as the bytes of a PNG."""
    assert per_class > 0
    sections = _sections(dataset)
    shown = sections[:MOST_CLASSES]
    columns = max(min(per_class, max(len(rows) for _, _, strips in shown for _, rows in strips)), 4)  # room for titles
    strip = CELL + CAPTION + GAP
    gutter = GUTTER if any(dataset.splits) else 0
    width = 2 * MARGIN + gutter + columns * (CELL + GAP) - GAP
    height = 2 * MARGIN + 2 * HEADING - BETWEEN + sum(HEADING + BETWEEN + len(strips) * strip for _, _, strips in shown)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), dataset.name, 22, INK, width - 2 * MARGIN)
    cut = f", the first {MOST_CLASSES} of {len(sections):,} classes" if len(sections) > MOST_CLASSES else ""
    write(pen, (MARGIN, MARGIN + 30), f"{len(dataset):,} images, {dataset.task}{cut}", 13, FAINT, width - 2 * MARGIN)
    y = MARGIN + 2 * HEADING
    for title, count, strips in shown:
        pen.line([(MARGIN, y - 8), (width - MARGIN, y - 8)], "#d9d9d9")
        right = pen.textlength(count, font(13))
        write(pen, (width - MARGIN - right, y + 2), count, 13, FAINT, right + 1)
        write(pen, (MARGIN, y), title, 16, INK, width - 2 * MARGIN - right - GAP)
        y += HEADING
        for split, rows in strips:
            if gutter:
                write(pen, (MARGIN, y + CELL // 2 - LINE), split, 13, INK, gutter - GAP)
                write(pen, (MARGIN, y + CELL // 2 + 2), f"{len(rows):,}", 13, FAINT, gutter - GAP)
            rows = spread(rows, per_class)
            for place, (row, caption) in enumerate(zip(rows, _captions(pen, dataset, rows), strict=True)):
                corner = (MARGIN + gutter + place * (CELL + GAP), y)
                picture(sheet, pen, corner, partial(dataset.read, int(row)))
                write(pen, (corner[0], y + CELL + 2), caption, 11, FAINT, CELL)
            y += strip
        y += BETWEEN
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def _sections(dataset: Dataset) -> list[tuple[str, str, list[tuple[str, np.ndarray]]]]:
    """(class, its count, [(split, its rows)]) for everything that has an image."""
    split = np.asarray(dataset.splits)
    chosen = [(name, has_label(dataset, number)) for number, name in enumerate(dataset.classes)]
    if dataset.labels.ndim == 2:
        chosen.append(("none positive", ~(dataset.labels == 1).any(1)))
    else:
        chosen.append(("no label", lacks_label(dataset)))
    sections = []
    for name, images in chosen:
        strips = [(word, np.flatnonzero(images & (split == word))) for word in _SPLITS]
        strips = [(word or "no split", rows) for word, rows in strips if len(rows)]
        if strips:
            sections.append((name, f"{int(images.sum()):,} images", strips))
    return sections


def _captions(pen: ImageDraw.ImageDraw, dataset: Dataset, rows: np.ndarray) -> list[str]:
    """Names of files without folder and ending; where they are too long, without what they begin with in common."""
    ids = [_printable(dataset.ids[row]) for row in rows]
    names = [_stem(name) if dataset.path(0) else name.rsplit(":", 1)[-1] for name in ids]
    common = len(os.path.commonprefix(names)) if len(names) > 1 else 0  # noqa: RUF071 (characters are meant)
    if common > 1 and any(pen.textlength(name, font(11)) > CELL for name in names):
        names = [f"…{name[common:]}" for name in names]
    return names


def _stem(name: str) -> str:
    """Of a frame of DICOM with its number."""
    file, _, frame = name.partition("#frame=")
    return PurePosixPath(file).stem + (f" {frame}" if frame else "")


def picture(sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], read: Callable[[], Stored]) -> None:
    """What ``read`` gives in a cell; where it raises UnreadableImage an empty frame with the reason."""
    x, y = corner
    pen.rectangle([x, y, x + CELL - 1, y + CELL - 1], MAT)
    try:
        pixels = decode(read()).permute(1, 2, 0).numpy()
        image = _fitted(Image.fromarray(np.ascontiguousarray(pixels)))
        sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
    except UnreadableImage as error:
        pen.rectangle([x, y, x + CELL - 1, y + CELL - 1], outline=ALARM)
        for line, words in enumerate(_wrapped(pen, str(error), CELL - 12)[:6]):
            write(pen, (x + 6, y + 8 + line * LINE), words, 11, ALARM, CELL - 12)


def _fitted(image: Image.Image) -> Image.Image:
    """In the cell, whole: small ones enlarged by whole pixels, so that they show as what they are."""
    longest = max(image.size)
    if longest * 2 <= CELL:
        factor = CELL // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = CELL / longest
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font(11)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, width: float) -> None:
    """One line, cut in its middle with … where it is wider than ``width`` pixels (names differ at both ends)."""
    text = _printable(text)
    shown, keep = text, len(text)
    while keep > 2 and pen.textlength(shown, font(size)) > width:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    pen.text(at, shown, colour, font(size))


def _printable(text: str) -> str:
    """Without line breaks, which Pillow cannot measure; of a very long name both ends, which is all that is shown."""
    text = text if len(text) <= _LONGEST else text[: _LONGEST // 2] + text[-_LONGEST // 2 :]
    return "".join(c if c.isprintable() else "?" for c in text)


@cache
def font(size: int) -> Any:
    return ImageFont.load_default(size)
