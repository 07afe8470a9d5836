"""What a dataset looks like before anything is computed: classes and splits, sizes and kinds of pixels, copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.dataset import Dataset
from featurecache.errors import UnreadableImage

LOOKED_AT = 200  # images whose headers are read for sizes and kinds of pixels
_ROWS_SHOWN = 24  # classes in the printed table
_ORDER = ("train", "val", "test", "")


@dataclass(frozen=True)
class Copies:
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
    copies: Copies | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([_headline(self), *_table(self), *_facts(self)])


def describe(
    dataset: Dataset,
    digests: Sequence[str | bytes | None] | np.ndarray | None = None,
    headers: Mapping[int, tuple[int, int, str] | str] | None = None,
) -> Description:
    """Count, and look at the headers of at most ``LOOKED_AT`` images spread over the dataset.

    ``digests`` [N], where they are known (empty for an image that could not be read), give the copies; ``headers``,
    where some were looked at before (row → width, height and kind of pixels, or why not), are not looked at again.
    """
    present = set(dataset.splits)
    splits = [split for split in _ORDER if split in present]
    number_of = {split: number for number, split in enumerate(splits)}
    column = np.fromiter((number_of[split] for split in dataset.splits), np.int64, len(dataset))
    headers = _look_at_some(dataset) if headers is None else headers
    looks = [header for header in headers.values() if not isinstance(header, str)]
    unreadable = [(dataset.shown(row), header) for row, header in headers.items() if isinstance(header, str)]
    areas = sorted(looks, key=lambda look: (look[0] * look[1], look[:2]))
    sizes = {"smallest": areas[0], "median": areas[len(areas) // 2], "largest": areas[-1]} if areas else {}
    return Description(
        name=dataset.name,
        task=dataset.task,
        images=len(dataset),
        splits=splits,
        classes=list(dataset.classes),
        counts=[_by_split(has_label(dataset, number), column, len(splits)) for number in range(len(dataset.classes))],
        unlabelled=_by_split(lacks_label(dataset), column, len(splits)),
        totals=_by_split(np.ones(len(dataset), bool), column, len(splits)),
        looked_at=len(looks) + len(unreadable),
        sizes={name: [width, height] for name, (width, height, _) in sizes.items()},
        kinds=dict(Counter(kind for _, _, kind in looks).most_common()),
        unreadable=unreadable,
        copies=None if digests is None else _copies(dataset, digests),
        notes=list(dataset.notes),
    )


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of ``rows``, evenly spaced, the first and the last among them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))]


def _look_at_some(dataset: Dataset) -> dict[int, tuple[int, int, str] | str]:
    from featurecache.images import look

    headers: dict[int, tuple[int, int, str] | str] = {}
    for row in spread(np.arange(len(dataset)), LOOKED_AT).tolist():
        try:
            headers[row] = look(dataset.read(row))
        except UnreadableImage as error:
            headers[row] = str(error)
    return headers


def has_label(dataset: Dataset, number: int) -> np.ndarray:
    """bool [N]: the images of class ``number``, or with that label."""
    found: np.ndarray = dataset.labels[:, number] == 1 if dataset.labels.ndim == 2 else dataset.labels == number
    return found


def lacks_label(dataset: Dataset) -> np.ndarray:
    found: np.ndarray = np.isnan(dataset.labels).any(1) if dataset.labels.ndim == 2 else dataset.labels == -1
    return found


def _by_split(chosen: np.ndarray, column: np.ndarray, splits: int) -> list[int]:
    return [int(count) for count in np.bincount(column[chosen], minlength=splits)]


def _copies(dataset: Dataset, digests: Sequence[str | bytes | None] | np.ndarray) -> Copies:
    assert len(digests) == len(dataset), (len(digests), len(dataset))
    plain = digests if isinstance(digests, np.ndarray) else [d.decode() if isinstance(d, bytes) else d for d in digests]
    text = np.array([digest or "" for digest in plain]) if not isinstance(plain, np.ndarray) else plain
    known = np.flatnonzero(text != text.dtype.type())
    distinct, image = np.unique(text[known], return_inverse=True)
    splits = np.array(dataset.splits)[known]
    by_split = {split: image[splits == split] for split in _ORDER if (splits == split).any()}
    images = {split: np.unique(rows) for split, rows in by_split.items()}
    both = {(a, b): np.intersect1d(images[a], images[b], True) for a, b in combinations(images, 2) if a and b}
    return Copies(
        total=len(known) - len(distinct),
        within={split: len(rows) - len(images[split]) for split, rows in by_split.items()},
        across={f"{a}+{b}": len(rows) for (a, b), rows in both.items()},
        two_labels=_two_labels(dataset.labels[known], image),
    )


def _two_labels(labels: np.ndarray, image: np.ndarray) -> int:
    """Of images [n] that bear labels [n] or [n, L]: how many distinct ones bear different labels (NaN is one)."""
    order = np.argsort(image, kind="stable")
    labels, image = labels.reshape(len(labels), -1)[order], image[order]
    again = image[1:] == image[:-1]  # the same image as the row before
    differs = (labels[1:] != labels[:-1]) & ((labels[1:] == labels[1:]) | (labels[:-1] == labels[:-1]))
    return len(np.unique(image[1:][again & differs.any(1)]))


def _headline(found: Description) -> str:
    kind = "labels" if found.task == "multilabel" else "classes"
    what = f"{len(found.classes):,} {kind} ({found.task})" if found.classes else "no labels"
    return f"{found.name}  {found.images:,} images, {what}"


def _table(found: Description) -> list[str]:
    """The counts as aligned lines; many classes are cut, and it is said."""
    names = [split or "no split" for split in found.splits]
    rows = list(zip(found.classes, found.counts, strict=True))
    lines = [(name, counts) for name, counts in rows[:_ROWS_SHOWN]]
    if len(rows) > _ROWS_SHOWN:
        rest = [counts for _, counts in rows[_ROWS_SHOWN:]]
        lines.append((f"({len(rest):,} more)", [sum(column) for column in zip(*rest, strict=True)]))
    if any(found.unlabelled) and found.classes:
        lines.append(("(a label unknown)" if found.task == "multilabel" else "(no label)", found.unlabelled))
    lines.append(("images", found.totals))
    cells = [["", *names, "all"]] + [
        [name, *(f"{count:,}" for count in (*counts, sum(counts)))] for name, counts in lines
    ]
    if len(names) == 1:
        cells = [row[:-1] for row in cells]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width)
                         for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip


def _facts(found: Description) -> list[str]:
    facts = []
    if found.sizes:
        shown = list(dict.fromkeys(f"{width:,}×{height:,}" for width, height in found.sizes.values()))
        names = "" if len(shown) == 1 else " (smallest, median, largest)" if len(shown) == 3 else " (smallest, largest)"
        sample = "" if found.looked_at == found.images else f", in {found.looked_at:,} looked at"
        facts.append(("sizes", f"{' · '.join(shown)}{names}{sample}"))
        facts.append(("pixels", " · ".join(f"{kind} {count:,}" for kind, count in found.kinds.items())))
    facts += [("unreadable", f"{name}: {reason}") for name, reason in found.unreadable[:5]]
    if found.copies is not None:
        facts.append(("copies", copies_text(found.copies)))
    facts += [("note", note) for note in found.notes]
    return [f"{name:<12}{text}" for name, text in facts]


def copies_text(copies: Copies) -> str:
    if not copies.total:
        return "none"
    within = [f"{count:,} within {split}" for split, count in copies.within.items() if count and split]
    across = [f"{count:,} in both {pair.replace('+', ' and ')}" for pair, count in copies.across.items() if count]
    labels = [f"{copies.two_labels:,} under two labels"] if copies.two_labels else []
    parts = ", ".join([*within, *across, *labels])
    return f"{copies.total:,} images repeat another" + (f" ({parts})" if parts else "")


def contact_sheet(dataset: Dataset, path: str | Path, per_class: int = 8) -> None:
    """A PNG with ``per_class`` images of each class and split, as a backbone will see them before resizing."""
    from featurecache.files import write_whole
    from featurecache.sheet import draw

    write_whole(Path(path), draw(dataset, per_class))
