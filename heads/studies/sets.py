"""A set of images as the page of a study shows it: counts by class and split, sizes, copies, and a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import UnreadableImage

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset
    from heads.studies.run import Done

CLASSES, EACH = 12, 6  # shown as pictures
ROWS = 40  # classes in the table


def set_context(done: Done, name: str, images: bool) -> dict[str, Any]:
    """What ``study.html`` shows of one set."""
    from featurecache.sources.summary import copies_text, describe

    given = done.given[name]
    dataset = given.dataset
    found = describe(dataset, digests_of(done, name))
    rows = list(zip(found.classes, found.counts, strict=True))
    shown = [(label, [*counts, sum(counts)]) for label, counts in rows[:ROWS]]
    if len(rows) > ROWS:
        rest = [sum(column) for column in zip(*(counts for _, counts in rows[ROWS:]), strict=True)]
        shown.append((f"{len(rows) - ROWS} more", [*rest, sum(rest)]))
    if any(found.unlabelled):
        shown.append(("without a label", [*found.unlabelled, sum(found.unlabelled)]))
    sizes = list(dict.fromkeys(f"{w:,}×{h:,}" for w, h in found.sizes.values()))
    kinds = {1: "", 2: "smallest, largest", 3: "smallest, median, largest"}
    looked = "" if found.looked_at == found.images else f"{found.looked_at:,} looked at"
    about = "; ".join(filter(None, [kinds[len(sizes)] if sizes else "", looked]))
    facts = {
        "task": found.task, "images": f"{found.images:,}",
        "sizes": f"{' · '.join(sizes)} pixels{f' ({about})' if about else ''}" if sizes else None,
        "pixels": " · ".join(f"{kind} {count:,}" for kind, count in found.kinds.items()),
        "copies": "not counted" if found.copies is None else copies_text(found.copies),
        "unreadable": f"{len(found.unreadable)} of those looked at" if found.unreadable else None,
        "notes": " ".join(found.notes),
    }  # fmt: skip
    return {
        "title": given.images.name, "said": f"It ran on {given.said}." if given.said else f"It ran on {given.source}.",
        "kind": "label" if found.task == "multilabel" else "class", "splits": [s or "no split" for s in found.splits],
        "rows": [*shown, ("images", [*found.totals, found.images])],
        "facts": [(word, value) for word, value in facts.items() if value],
        "samples": samples(dataset) if images else [],
    }  # fmt: skip


def digests_of(done: Done, name: str) -> np.ndarray:
    """S32 [N]: of every image of the set, from the features of it where there are some, else read once more."""
    from featurecache.images.decoding import digest
    from featurecache.store.write_view import open_view
    from heads.studies.spec import Extract

    dataset = done.given[name].dataset
    known: dict[str, bytes] = {}
    for step in done.study.steps:
        if isinstance(step, Extract) and step.images == name and step.name in done.made and not known:
            view = open_view(done.made[step.name]["made"]["view"])
            known = dict(zip(view.ids, view.digests.tolist(), strict=True))
    found = np.zeros(len(dataset), "S32")
    for row, identity in enumerate(dataset.ids):
        try:
            found[row] = known[identity] if identity in known else digest(dataset.read(row)).encode()
        except UnreadableImage:
            continue
    return found


def samples(dataset: Dataset) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(class, pictures as (data URI, width, height)): a few of each of the first classes, evenly spread over train."""
    from featurecache.sources.summary import evenly_spaced, has_label

    train = np.array(dataset.splits) == "train"
    found = []
    for number, name in enumerate(dataset.classes[:CLASSES]):
        there = has_label(dataset, number)
        rows = np.flatnonzero(there & train) if (there & train).any() else np.flatnonzero(there)
        pictures = list(_encoded(dataset, evenly_spaced(rows, EACH).tolist() if len(rows) else []))
        if pictures:
            found.append((name, pictures))
    return found


def _encoded(dataset: Dataset, rows: Sequence[int]) -> Any:
    from featurecache.images.decoding import decode
    from heads.explanations.explainer import encoded

    for row in rows:
        try:
            uri, (width, height) = encoded(np.ascontiguousarray(decode(dataset.read(row)).permute(1, 2, 0).numpy()))
        except UnreadableImage:
            continue
        yield uri, width, height
