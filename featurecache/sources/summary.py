"""Dataset summary: classes and splits, sizes and kinds of pixels, duplicates, in numbers and as a contact sheet.

Both are made before anything is computed. `grid_of_images` draws every contact sheet: that of a dataset and that of
`featurecache leaks`.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import UnreadableImage
from featurecache.files.atomic import write_whole
from featurecache.formatting import aligned, counted
from featurecache.images.decoding import decode, image_header
from featurecache.images.headers import EncodedImage, ImageHeader
from featurecache.sources.base import Dataset
from featurecache.sources.folders import SHEET
from featurecache.sources.labels import SPLIT_ORDER
from featurecache.sources.vocabulary import near_names

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LOOKED_AT = 200  # images whose headers are read for sizes and kinds of pixels
FEW_IN_VAL = 10  # images of a class in val below which it cannot choose a model
_ROWS_SHOWN = 24  # classes in the printed table
_ORDER = (*SPLIT_ORDER, "")
# Of a contact sheet, in pixels.
CELL, GAP, MARGIN, HEADING, LINE, BETWEEN = 112, 10, 28, 34, 16, 18
GUTTER = 84  # left of the images, for the names of the splits
SIDE_BY_SIDE = 3  # between the images of a cell
MOST_CLASSES = 40
_LONGEST = 500  # characters of a name: more than fit on a sheet
_PAPER, _INK, _FAINT, _MAT, _ALARM = "#ffffff", "#1a1a1a", "#6b6b6b", "#f0f0f0", "#b3261e"


@dataclass(frozen=True)
class Duplicates:
    """Images whose digest another image of the dataset has."""

    total: int  # images beyond the first of their digest
    within: dict[str, int]  # split -> the same, counted inside it
    across: dict[str, int]  # "train+test" -> distinct images that stand in both
    two_labels: int  # distinct images that bear different labels


@dataclass(frozen=True)
class Description:
    """``str()`` is the table for people, ``to_dict()`` the same as JSON."""

    name: str
    task: str
    images: int
    splits: list[str]  # S of them, in the order of a protocol
    classes: list[str]  # C
    counts: list[list[int]]  # [C][S]; several labels: positives
    unlabelled: list[int]  # [S]; several labels: images with an unknown one
    totals: list[int]  # [S]
    looked_at: int
    sizes: dict[str, list[int]]  # smallest, median, largest: [width, height] in pixels
    kinds: dict[str, int]  # of pixels, most frequent first
    unreadable: list[tuple[str, str]]  # among those looked at: id, reason
    duplicates: Duplicates | None
    groups_across: dict[str, int]  # "train+test" -> groups that stand in both
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kind = "labels" if self.task == "multilabel" else "classes"
        what = f"{len(self.classes):,} {kind} ({self.task})" if self.classes else "no labels"
        return "\n".join([f"{self.name}  {counted(self.images, 'image')}, {what}", *_table(self), *_facts(self)])


def describe_dataset(
    dataset: Dataset,
    digests: Sequence[str | bytes | None] | np.ndarray | None = None,
    headers: Mapping[int, ImageHeader | str] | None = None,
) -> Description:
    """Count, and look at the headers of at most ``LOOKED_AT`` images spread over the dataset. ``digests`` [N], where
    they are known (empty for an image that could not be read), give the duplicates; ``headers``, where some were
    looked at before (row → header, or why not), are not looked at again."""
    splits = [split for split in _ORDER if split in set(dataset.splits)]
    column = np.fromiter(map(splits.index, dataset.splits), np.int64, len(dataset))
    headers = _look_at_some(dataset) if headers is None else headers

    def by_split(rows: np.ndarray) -> list[int]:
        return [int(count) for count in np.bincount(column[rows], minlength=len(splits))]

    looks = [header for header in headers.values() if not isinstance(header, str)]
    areas = sorted(looks, key=lambda look: (look[0] * look[1], look[:2]))
    sizes = {"smallest": areas[0], "median": areas[len(areas) // 2], "largest": areas[-1]} if areas else {}
    return Description(
        name=dataset.name,
        task=dataset.task,
        images=len(dataset),
        splits=splits,
        classes=list(dataset.classes),
        counts=[by_split(in_class(dataset, number)) for number in range(len(dataset.classes))],
        unlabelled=by_split(is_unlabelled(dataset)),
        totals=by_split(np.ones(len(dataset), bool)),
        looked_at=len(headers),
        sizes={name: [width, height] for name, (width, height, *_) in sizes.items()},
        kinds=dict(Counter(look.kind for look in looks).most_common()),
        unreadable=[(dataset.shown(row), header) for row, header in headers.items() if isinstance(header, str)],
        duplicates=None if digests is None else _duplicates(dataset, digests),
        groups_across=_groups_across(dataset),
        notes=notes_of(dataset, looks),
    )


def notes_of(dataset: Dataset, looks: Sequence[ImageHeader] | None = None) -> list[str]:
    """What a user should hear of a dataset before its images are used: its own notes, classes that may be misspelt, and
    dark or left out pixels (by ``looks``, where some were looked at before)."""
    if looks is None:
        looks = [header for header in _look_at_some(dataset).values() if not isinstance(header, str)]
    y, several = dataset.labels, dataset.labels.ndim == 2
    counts = (y == 1).sum(0) if several else np.bincount(y[y >= 0], minlength=len(dataset.classes))
    near = near_names(dict(zip(dataset.classes, counts.tolist(), strict=True)), several)
    return [*dataset.notes, *near, *_notes_on_pixels(dataset, looks)]


def _notes_on_pixels(dataset: Dataset, looks: Sequence[ImageHeader]) -> list[str]:
    """Where the rules of decoding may not be what is meant: an image that comes out dark, a stack of which one page is
    taken."""
    notes = []
    if dataset.bits is None and (dark := dark_pixels(looks)):
        notes.append(f"{dark[1]}; --bits {dark[0]} scales them.")
    if stacks := [look.pages for look in looks if look.pages > 1]:
        are = "are TIFF stacks of up to" if len(stacks) > 1 else "is a TIFF stack of"
        what = f"{len(stacks):,} of {counted(len(looks), 'image')} looked at {are} {max(stacks):,} pages"
        notes.append(f"{what}: the first page is used; --page N takes another (from 0), --page all each.")
    return notes


def dark_pixels(looks: Iterable[ImageHeader]) -> tuple[int, str] | None:
    """The bits that 16-bit samples use, and the words for it, where they use fewer."""
    used = max((look.used for look in looks if look.used), default=16)
    share = f"at most {100 * (2**used - 1) / 65535:.2g} % of white"
    dark = "nearly black" if used <= 12 else "dark"
    return (used, f"{used}-bit values in 16-bit files: {dark} ({share})") if used < 16 else None


def evenly_spaced(rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of ``rows``, evenly spaced, the first and the last among them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))]


def _look_at_some(dataset: Dataset) -> dict[int, ImageHeader | str]:
    headers: dict[int, ImageHeader | str] = {}
    for row in evenly_spaced(np.arange(len(dataset)), LOOKED_AT).tolist():
        try:
            headers[row] = image_header(dataset.read(row))
        except UnreadableImage as error:
            headers[row] = str(error)
    return headers


def in_class(dataset: Dataset, number: int) -> np.ndarray:
    """bool [N]: the images of class ``number``, or with that label."""
    return np.asarray(dataset.labels[:, number] == 1 if dataset.labels.ndim == 2 else dataset.labels == number)


def is_unlabelled(dataset: Dataset) -> np.ndarray:
    """bool [N]: the images without a label, or with an unknown one of several."""
    return np.asarray(np.isnan(dataset.labels).any(1) if dataset.labels.ndim == 2 else dataset.labels == -1)


def _duplicates(dataset: Dataset, digests: Sequence[str | bytes | None] | np.ndarray) -> Duplicates:
    assert len(digests) == len(dataset), (len(digests), len(dataset))
    if not isinstance(digests, np.ndarray):
        digests = np.array([d.decode() if isinstance(d, bytes) else d or "" for d in digests])
    readable = np.flatnonzero(digests != digests.dtype.type())
    distinct, image = np.unique(digests[readable], return_inverse=True)
    splits = np.array(dataset.splits)[readable]
    by_split = {split: image[splits == split] for split in _ORDER if (splits == split).any()}
    order = np.argsort(image, kind="stable")
    ordered, labels = image[order], dataset.labels[readable].reshape(len(readable), -1)[order]
    labels = np.nan_to_num(labels, nan=-1)  # unknown is a label of its own
    contradicts = (ordered[1:] == ordered[:-1]) & (labels[1:] != labels[:-1]).any(1)
    return Duplicates(
        total=len(readable) - len(distinct),
        within={split: len(rows) - len(np.unique(rows)) for split, rows in by_split.items()},
        across=_across(image, splits),
        two_labels=len(np.unique(ordered[1:][contradicts])),
    )


def _groups_across(dataset: Dataset) -> dict[str, int]:
    groups = np.array(dataset.groups or [""] * len(dataset), object)
    return _across(groups[groups != ""], np.array(dataset.splits)[groups != ""])


def _across(values: np.ndarray, splits: np.ndarray) -> dict[str, int]:
    """For any two splits that are there how many values stand in both."""
    sets = {split: np.unique(values[splits == split]) for split in SPLIT_ORDER if (splits == split).any()}
    return {f"{a}+{b}": len(np.intersect1d(sets[a], sets[b], True)) for a, b in combinations(sets, 2)}


def _table(summary: Description) -> list[str]:
    """The counts as aligned lines; many classes are cut, and it is said."""
    names = [split or "no split" for split in summary.splits]
    lines = list(zip(summary.classes, summary.counts, strict=True))[:_ROWS_SHOWN]
    if rest := summary.counts[_ROWS_SHOWN:]:
        lines.append((f"({len(rest):,} more)", [sum(column) for column in zip(*rest, strict=True)]))
    if any(summary.unlabelled) and summary.classes:
        lines.append(("(a label unknown)" if summary.task == "multilabel" else "(no label)", summary.unlabelled))
    lines.append(("images", summary.totals))
    cells = [["", *names, "all"]]
    cells += [[name, *(f"{count:,}" for count in (*counts, sum(counts)))] for name, counts in lines]
    if len(names) == 1:
        cells = [row[:-1] for row in cells]
    return aligned(cells, indent=2)


def _facts(summary: Description) -> list[str]:
    facts = []
    if summary.sizes:
        shown = list(dict.fromkeys(f"{width:,}×{height:,}" for width, height in summary.sizes.values()))
        names = "" if len(shown) == 1 else " (smallest, median, largest)" if len(shown) == 3 else " (smallest, largest)"
        sample = "" if summary.looked_at == summary.images else f", in {summary.looked_at:,} looked at"
        facts.append(("sizes", f"{' · '.join(shown)}{names}{sample}"))
        facts.append(("pixels", " · ".join(f"{kind} {count:,}" for kind, count in summary.kinds.items())))
    facts += [("unreadable", f"{name}: {reason}") for name, reason in summary.unreadable[:5]]
    if summary.duplicates is not None:
        facts.append(("duplicates", duplicates_text(summary.duplicates)))
    facts += [("note", note) for note in summary.notes]
    return [f"{name:<12}{text}" for name, text in facts]


def duplicates_text(duplicates: Duplicates) -> str:
    if not duplicates.total:
        return "none"
    parts = [f"{count:,} within {split}" for split, count in duplicates.within.items() if count and split]
    parts += [f"{count:,} in both {pair.replace('+', ' and ')}" for pair, count in duplicates.across.items() if count]
    parts += [f"{duplicates.two_labels:,} under two labels"] if duplicates.two_labels else []
    repeat = f"{counted(duplicates.total, 'image')} repeat{'s' * (duplicates.total == 1)} another"
    return repeat + (f" ({', '.join(parts)})" if parts else "")


# -- contact sheets


@dataclass(frozen=True)
class SheetCell:
    """Images side by side, each with what reads it and lines beneath; and a line beneath them all."""

    images: Sequence[tuple[Callable[[], EncodedImage], Sequence[str]]]
    remark: str = ""


@dataclass(frozen=True)
class SheetSection:
    """A heading, a note at its right, and rows of cells, each with two words at its left."""

    title: str
    note: str
    rows: Sequence[tuple[tuple[str, str], Sequence[SheetCell]]]


def grid_of_images(title: str, about: str, sections: Sequence[SheetSection]) -> bytes:
    """A contact sheet as the bytes of a PNG. An image that cannot be read is an empty frame with the reason."""
    from PIL import Image, ImageDraw, PngImagePlugin

    rows = [row for section in sections for row in section.rows]
    cells = [cell for _, row in rows for cell in row]
    beside = max((len(cell.images) for cell in cells), default=1)
    lines = max((len(text) for cell in cells for _, text in cell.images), default=1)
    cell_width = beside * (CELL + SIDE_BY_SIDE) - SIDE_BY_SIDE
    step = cell_width + beside * GAP
    strip = CELL + 2 + (lines + any(cell.remark for cell in cells)) * LINE + GAP
    gutter = GUTTER if any(words[0] for words, _ in rows) else 0
    columns = max(4, *(len(row) for _, row in rows)) if rows else 4  # room for titles
    width = 2 * MARGIN + gutter + columns * step - beside * GAP
    height = 2 * MARGIN + 2 * HEADING + sum(HEADING + BETWEEN + len(section.rows) * strip for section in sections)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN), title, 22, _INK, width - 2 * MARGIN)
    _write(pen, (MARGIN, MARGIN + 30), about, 13, _FAINT, width - 2 * MARGIN)
    y = MARGIN + 2 * HEADING
    for section in sections:
        pen.line([(MARGIN, y - 8), (width - MARGIN, y - 8)], "#d9d9d9")
        right = pen.textlength(section.note, _font(13))
        _write(pen, (width - MARGIN - right, y + 2), section.note, 13, _FAINT, right + 1)
        _write(pen, (MARGIN, y), section.title, 16, _INK, width - 2 * MARGIN - right - GAP)
        y += HEADING
        for words, row in section.rows:
            _write(pen, (MARGIN, y + CELL // 2 - LINE), words[0], 13, _INK, GUTTER - GAP)
            _write(pen, (MARGIN, y + CELL // 2 + 2), words[1], 13, _FAINT, GUTTER - GAP)
            for place, cell in enumerate(row):
                x = MARGIN + gutter + place * step
                for side, (read, text) in enumerate(cell.images):
                    left = x + side * (CELL + SIDE_BY_SIDE)
                    _picture(sheet, pen, (left, y), read)
                    for line, words_below in enumerate(text):
                        _write(pen, (left, y + CELL + 2 + line * LINE), words_below, 11, _FAINT, CELL)
                _write(pen, (x, y + CELL + 2 + lines * LINE), cell.remark, 11, _INK, cell_width)
            y += strip
        y += BETWEEN
    encoded = io.BytesIO()
    about_itself = PngImagePlugin.PngInfo()
    about_itself.add_text(*SHEET)
    sheet.save(encoded, "PNG", optimize=True, pnginfo=about_itself)
    return encoded.getvalue()


def contact_sheet(dataset: Dataset, path: str | Path, per_class: int = 8) -> None:
    """A PNG with ``per_class`` images of each class and split, as a backbone will see them before resizing."""
    assert per_class > 0
    splits, several = np.asarray(dataset.splits), dataset.labels.ndim == 2
    others = ("none positive", ~(dataset.labels == 1).any(1)) if several else ("no label", is_unlabelled(dataset))
    groups = [(name, in_class(dataset, number)) for number, name in enumerate(dataset.classes)]
    groups = [(name, images) for name, images in (*groups, others) if images.any()]
    sections = []
    for name, images in groups[:MOST_CLASSES]:
        rows = []
        for split in _ORDER:
            chosen = np.flatnonzero(images & (splits == split))
            words = (split or "no split", f"{len(chosen):,}") if any(dataset.splits) else ("", "")
            if len(chosen):
                rows.append((words, _cells(dataset, evenly_spaced(chosen, per_class))))
        sections.append(SheetSection(name, counted(int(images.sum()), "image"), rows))
    cut = f", the first {MOST_CLASSES} of {len(groups):,} classes" if len(groups) > MOST_CLASSES else ""
    about = f"{counted(len(dataset), 'image')}, {dataset.task}{cut}"
    write_whole(Path(path), grid_of_images(dataset.name, about, sections))


def _cells(dataset: Dataset, rows: np.ndarray) -> list[SheetCell]:
    """Beneath each the name of the file without folder and ending; where they are too long, without what they begin
    with in common."""
    ids = [_printable(dataset.ids[row]) for row in rows]
    names = [short_name(name) if dataset.path(0) else name.rsplit(":", 1)[-1] for name in ids]
    common = len(os.path.commonprefix(names)) if len(names) > 1 else 0  # noqa: RUF071 (characters are meant)
    if common > 1 and any(_font(11).getlength(name) > CELL for name in names):
        names = [f"…{name[common:]}" for name in names]
    return [SheetCell([(partial(dataset.read, int(row)), [name])]) for row, name in zip(rows, names, strict=True)]


def short_name(name: str) -> str:
    """A file without folder and ending; of a frame of DICOM with its number."""
    file, _, frame = name.partition("#frame=")
    return PurePosixPath(file).stem + (f" {frame}" if frame else "")


def _picture(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], read: Callable[[], EncodedImage]
) -> None:
    """What ``read`` gives in a cell, whole: small ones enlarged by whole pixels, so that they show as what they are.
    Where it raises UnreadableImage an empty frame with the reason."""
    from PIL import Image

    x, y = corner
    pen.rectangle([x, y, x + CELL - 1, y + CELL - 1], _MAT)
    try:
        image = Image.fromarray(np.ascontiguousarray(decode(read()).permute(1, 2, 0).numpy()))
        longest = max(image.size)
        small = longest * 2 <= CELL
        scale = CELL // longest if small else CELL / longest
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
        sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
    except UnreadableImage as error:
        pen.rectangle([x, y, x + CELL - 1, y + CELL - 1], outline=_ALARM)
        for line, words in enumerate(textwrap.wrap(str(error), 16)[:6]):
            _write(pen, (x + 6, y + 8 + line * LINE), words, 11, _ALARM, CELL - 12)


def _write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, width: float) -> None:
    """One line, cut in its middle with … where it is wider than ``width`` pixels (names differ at both ends)."""
    text = _printable(text)
    shown, keep = text, len(text)
    while keep > 2 and pen.textlength(shown, _font(size)) > width:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    pen.text(at, shown, colour, _font(size))


def _printable(text: str) -> str:
    """Without line breaks, which Pillow cannot measure; of a very long name both ends, which is all that is shown."""
    text = text if len(text) <= _LONGEST else text[: _LONGEST // 2] + text[-_LONGEST // 2 :]
    return "".join(c if c.isprintable() else "?" for c in text)


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
