"""What a view is to hold, and how it is written: outputs and augmented copies that are asked for or there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featurecache.backbones.base import Backbone
from featurecache.errors import BadOption, CacheError, SourceError, UnreadableImage
from featurecache.extraction.forward import output_layout
from featurecache.extraction.pipeline import CHANGED
from featurecache.extraction.scan import ScanResult
from featurecache.files.atomic import FileStamp, file_stamp
from featurecache.files.records import canonical_json
from featurecache.formatting import shell_words
from featurecache.images import decoding as _images
from featurecache.images.augmentation import AugmentationPlan, AugmentedCopies
from featurecache.images.headers import EncodedImage, read_by
from featurecache.outputs import Output, parse
from featurecache.sources.base import Dataset, ImageSource, may_be_trained_on
from featurecache.sources.pseudonyms import plain_reason
from featurecache.store.schema import ViewColumns, text_array
from featurecache.store.shards import Layout
from featurecache.store.store import Store, cache_words
from featurecache.store.view import View
from featurecache.store.write_view import copy_failed, view_attributes, write_view


class ViewContents(NamedTuple):
    """What the view of an extraction is to hold, as its store was at one moment."""

    outputs: tuple[Output, ...]
    layouts: dict[str, Layout]  # of the outputs, and of the tokens that some are made of
    copying: AugmentationPlan | None
    view_copies: AugmentedCopies | None  # those that the view of this name has
    images: np.ndarray  # [images] first sample of each distinct image; then the same for the augmented copies
    digests: np.ndarray  # [images] S32, and of the copies
    stamp: FileStamp | None  # of the view that is there


@dataclass(frozen=True)
class ImageReader:
    """Distinct images and their augmented copies by number, as they were when they were scanned. It can be pickled: a
    process elsewhere reads the same."""

    source: ImageSource
    reading: dict[str, Any]
    images: np.ndarray  # [images] first sample of each distinct image; then the same for the augmented copies
    digests: np.ndarray  # [images] S32, and of the copies
    copying: AugmentationPlan | None

    def read(self, number: int) -> EncodedImage:
        """A distinct image; of an augmented copy the image that it is made of. Raises UnreadableImage."""
        original = self.copying.source(number) if self.copying else number
        data = read_by(self.source.read(int(self.images[number])), self.reading)
        if _images.digest(data).encode() != self.digests[original]:
            raise UnreadableImage(CHANGED)
        return data

    def make(self, number: int, data: EncodedImage) -> EncodedImage:
        """The augmented copy, where the number is that of one."""
        if self.copying is None or number < self.copying.first:
            return data
        return self.copying.augmented.augmentation.copy_of(data, bytes(self.digests[number]))


def view_contents(
    store: Store | None, wanted: Sequence[Output], copies: AugmentedCopies | None, *, name: str, dataset: Dataset,
    scan: ScanResult, network: Backbone, dtype: str, keeps_copies: bool,
) -> ViewContents:  # fmt: skip
    """``wanted`` and what the view of this ``name`` has; ``copies``, or where it ``keeps_copies`` those of that view.
    Raises BadOption where it is another dataset's."""
    path = store.path / f"{name}.h5" if store else None
    stamp = file_stamp(path) if path else None  # before it is read: who writes it meanwhile is seen at the end
    existing = _checked(View(path, columns_only=True), dataset, scan.digests) if path and stamp else None
    outputs = tuple(dict.fromkeys([*wanted, *(parse(output) for output in (existing.outputs if existing else ()))]))
    view_copies = existing.augmented if existing else None
    copying = _copying(dataset, view_copies if keeps_copies and existing else copies, scan)
    images = copying.with_copies(scan.images) if copying else scan.images
    digests = copying.digests(scan.digests) if copying else scan.digests
    return ViewContents(outputs, layouts_of(network, outputs, dtype), copying, view_copies, images, digests, stamp)


def layouts_of(network: Backbone, wanted: Sequence[Output], dtype: str) -> dict[str, Layout]:
    """Of outputs, and of the tokens that some are made of. Raises OutputRefused where the backbone has none."""
    layouts = {output.name: output_layout(network, output, dtype) for output in wanted}
    return layouts | {o.source: output_layout(network, parse(o.source), dtype) for o in wanted if o.is_derived}


def _copying(dataset: Dataset, augmented: AugmentedCopies | None, images: ScanResult) -> AugmentationPlan | None:
    if augmented is None:
        return None
    may = may_be_trained_on(dataset)
    if not may.any():
        raise BadOption(
            f"augmented copies are made of training images, and {dataset.source.get('data')} has none: its splits are "
            f"{', '.join(sorted(set(dataset.splits) - {''}))}. --copies 0 goes on without them."
        )
    sources = np.unique(images.sample_image[may & (images.sample_image >= 0)])
    return AugmentationPlan(augmented, sources, len(images.digests))


def _checked(view: View, dataset: Dataset, digests: np.ndarray) -> View:
    """Refuses to replace another dataset's view. Where the images come from elsewhere than those of the view did, their
    contents have to be the same: names like ``0.png`` and ``set.npz:train:0`` are those of many data sets."""
    common, moved = len(set(view.ids) & set(dataset.ids)), view.source.get("data") != dataset.source.get("data")
    if moved:
        common = min(common, int(np.isin(view.digests, digests).sum()))
    if bool(view.source.get("hash_ids")) != bool(dataset.source.get("hash_ids")):
        was, now = ("with", "without") if view.source.get("hash_ids") else ("without", "with")
        raise BadOption(
            f"the view {view.label} was made {was} --hash-ids: {now} it no image has the name it has there. Give this "
            "one a name with --name, or remove that one first: featurecache "
            + shell_words(["rm", view.label, *cache_words(view.store.parent)])
        )
    if 2 * common < len(view):
        raise BadOption(
            f"the view {view.label} holds {len(view):,} images of which {common:,} are in "
            f"{dataset.source.get('data')}: it is another dataset. Give this one a name with --name."
        )
    return view


def copies_in_view(
    copying: AugmentationPlan | None, dataset: Dataset, sample_image: np.ndarray, kept: np.ndarray,
    failures: dict[int, str],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[int, int, str]]]:  # fmt: skip
    """For copy 1 … k: samples of ``kept`` that have it, and its numbers; and (sample, copy, why not) of others."""
    if copying is None:
        return [], []
    may = kept[may_be_trained_on(dataset)[kept]]
    copied, lost = [], []
    for copy in range(1, copying.augmented.views + 1):
        numbers = copying.numbers(sample_image[may], copy)
        fine = ~np.isin(numbers, list(failures))
        copied.append((may[fine], numbers[fine]))
        lost += [(int(may[k]), copy, failures[int(numbers[k])]) for k in np.flatnonzero(~fine)]
    return copied, lost


def write_view_of(
    contents: ViewContents, store: Store, name: str, dataset: Dataset, scan: ScanResult, failures: dict[int, str]
) -> tuple[Path, int, int, list[tuple[str, str]]]:
    """The view's path, how many images and copies are in it, and (id, reason) of what is not."""
    sample_image, copying = scan.sample_image, contents.copying
    bad = np.flatnonzero(np.isin(sample_image, list(failures))).tolist()
    reasons = scan.unread | {sample: failures[int(sample_image[sample])] for sample in bad}
    kept = np.delete(np.arange(len(dataset)), list(reasons))
    copied, lost = copies_in_view(copying, dataset, sample_image, kept, failures)
    changed = [k for k, reason in [*reasons.items(), *((k, r) for k, _, r in lost)] if reason == CHANGED]
    scan.files.drop(np.unique(np.array(changed, np.int64)))
    missing = [*sorted(reasons.items()), *((k, copy_failed(copy, reason)) for k, copy, reason in lost)]
    failed = [(dataset.shown(sample), reason) for sample, reason in missing]
    if not len(kept):
        raise SourceError(f"none of {len(dataset):,} images could be read. The first, {failed[0][0]}: {failed[0][1]}.")
    images = np.concatenate([sample_image[kept], *(numbers for _, numbers in copied)])
    places = {
        layout: store.locate(layout, contents.digests)[images]
        for layout in (contents.layouts[o.name] for o in contents.outputs)
    }
    if not all(each.mask.all() for each in places.values()):
        raise CacheError(
            f"rows that were in {store.path} are gone: somebody removes files there. "
            "The same command computes them again."
        )
    samples = [kept, *(of for of, _ in copied)]
    groups = None if dataset.groups is None else text_array(dataset.groups)
    columns = ViewColumns(
        text_array(dataset.ids), dataset.labels, text_array(dataset.splits), sample_image, groups, dataset.meta
    )
    columns = replace(columns, **columns.at(np.concatenate(samples)))
    columns.digests = contents.digests[images]
    reason_of = plain_reason if "secret" in dataset.source else str
    listed = [(dataset.ids[sample], reason_of(reason)) for sample, reason in missing]
    attributes = view_attributes(store, dataset.classes, dataset.task, dataset.source, listed)
    if copying:
        columns.versions = np.repeat(np.arange(len(samples), dtype=np.int32), [len(rows) for rows in samples])
        attributes["augmentation"] = canonical_json(copying.augmented.to_dict())
    path = write_view(store, name, columns, attributes, places)
    return path, len(kept), len(images) - len(kept), failed
