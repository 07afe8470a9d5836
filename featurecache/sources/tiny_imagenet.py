"""Tiny ImageNet as it is unpacked (Stanford CS231n, 2015): 200 classes of ImageNet at 64×64 pixels.

    wnids.txt  words.txt                       the classes, and what WordNet calls them
    train/n01443537/images/n01443537_0.JPEG    500 of each class
    val/images/val_0.JPEG                      50 of each class, all in one folder
    val/val_annotations.txt                    name, class and box of each, separated by tabs
    test/images/test_0.JPEG                    10,000 whose labels were never published: left out, and said so

Nothing is moved or copied. Classes are in the order of their WordNet numbers, which is that of the class folders; their
names are the first words of words.txt. The split val stays val: whoever uses it as the test set says so. Where a script
has sorted val into class folders (val/n01443537/ or val/n01443537/images/), these say the classes.
"""

from __future__ import annotations

import os
import re

from featurecache.dataset import Dataset, Files, class_labels, distinct, few, safe_name, settle_task, source_record
from featurecache.errors import SourceError
from featurecache.sources.folders import is_image, refuse_undecodable

_ANNOTATIONS = os.path.join("val", "val_annotations.txt")


def is_tiny_imagenet(folder: str) -> bool:
    """Its list of classes, and either the one of val or the class folders of train."""
    if not os.path.isfile(os.path.join(folder, "wnids.txt")):
        return False
    by_wnid = any(re.fullmatch(r"n\d{8}", name) for name in _folders(folder, "train"))
    return by_wnid or os.path.isfile(os.path.join(folder, _ANNOTATIONS))


def open_tiny_imagenet(data: str, asked: str | None) -> Dataset:
    """The dataset in the folder ``data`` (an absolute path)."""
    wnids = sorted({line.strip() for line in _lines(data, "wnids.txt")} - {""})
    names, notes = _names(data, wnids)
    train = _train(data, wnids)
    if not train:
        raise SourceError(f"train in {data} holds no image of the classes of wnids.txt; unpack the archive again.")
    val, more = _val(data, wnids)
    left_out = len(_images(data, "test/images"))
    if left_out:
        notes += (
            f"The {left_out:,} images of test have no published labels and were left out: give {data}/test/images.",
        )
    rows = sorted([*train.items(), *val.items()])
    found = [wnid for _, wnid in rows]
    task = settle_task(asked, names, False, data)
    labelled = task != "unlabelled"
    ids = [name for name, _ in rows]
    for name in ids:
        if not name.isascii():
            refuse_undecodable(data, name)
    return Dataset(
        name=safe_name(os.path.basename(data)),
        source=source_record("tiny-imagenet", data, None, asked),
        ids=ids,
        labels=class_labels(found if labelled else [""] * len(ids), wnids),
        splits=[name.split("/", 1)[0] for name in ids],
        groups=None,
        meta={"wnid": found},
        classes=names if labelled else [],
        task=task,
        images=Files(data, ids),
        notes=(*notes, *more),
    )


def _lines(data: str, name: str) -> list[str]:
    try:
        with open(os.path.join(data, name), encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{name} of the Tiny ImageNet in {data} cannot be read ({error}).") from error


def _names(data: str, wnids: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What the classes are called: the first words of words.txt, where they are there."""
    if not wnids:
        raise SourceError(f"wnids.txt of the Tiny ImageNet in {data} is empty; unpack the archive again.")
    if not os.path.exists(os.path.join(data, "words.txt")):
        return wnids, ("words.txt is missing: the classes bear their WordNet numbers.",)
    wanted = set(wnids)
    pairs = (line.partition("\t") for line in _lines(data, "words.txt"))
    words = {wnid: names.split(",")[0].strip() for wnid, _, names in pairs if wnid in wanted}
    return distinct([words.get(wnid) or wnid for wnid in wnids]), ()


def _in_class_folders(data: str, split: str, wnids: list[str]) -> dict[str, str]:
    """id → class; a class may have its images in ``images`` or directly."""
    found: dict[str, str] = {}
    for wnid in wnids:
        for folder in (f"{split}/{wnid}/images", f"{split}/{wnid}"):
            found |= dict.fromkeys(_images(data, folder), wnid)
    return found


def _train(data: str, wnids: list[str]) -> dict[str, str]:
    """id → class of the training images."""
    found = _in_class_folders(data, "train", wnids)
    strange = sorted(set(_folders(data, "train")) - set(wnids))
    if strange:
        raise SourceError(f"train holds the class folders {few(strange, 3)}, which wnids.txt in {data} does not name.")
    absent = sorted(set(wnids) - set(found.values()))
    if found and absent:
        raise SourceError(
            f"wnids.txt in {data} names {few(absent, 3)}, of which train has no image; unpack the archive again."
        )
    return found


def _val(data: str, wnids: list[str]) -> tuple[dict[str, str], list[str]]:
    """id → class of the images of val, and what to say of them."""
    together = _images(data, "val/images")
    if found := _in_class_folders(data, "val", wnids):
        again = f"val is sorted into class folders: the {len(together):,} images of val/images were left out."
        return found, [again] if together else []
    if not together and not os.path.exists(os.path.join(data, _ANNOTATIONS)):
        return {}, [f"There are no images of val in {data}."]
    found = _annotated(data, set(wnids))
    extra = [name for name in together if name not in found]
    notes = [f"{len(extra):,} images of val are not in val_annotations.txt and have no label."] if extra else []
    return found | dict.fromkeys(extra, ""), notes


def _annotated(data: str, wnids: set[str]) -> dict[str, str]:
    """id → class of the images that val_annotations.txt lists, whether they are there or not (one that is not is a
    named failure when it is read)."""
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(data, _ANNOTATIONS), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if wnid not in wnids or "/" in name or f"val/images/{name}" in found:
            raise SourceError(
                f"line {number:,} of {_ANNOTATIONS} in {data} is {line[:60]!r}; expected a file's name, a tab and one "
                "of the classes of wnids.txt, each name once."
            )
        found[f"val/images/{name}"] = wnid
    return found


def _images(data: str, folder: str) -> list[str]:
    return [f"{folder}/{entry}" for entry in _entries(data, folder) if is_image(entry)]


def _folders(data: str, folder: str) -> list[str]:
    return [entry for entry in _entries(data, folder) if os.path.isdir(os.path.join(data, folder, entry))]


def _entries(data: str, folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(os.path.join(data, folder)) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SourceError(f"the folder {data}/{folder} cannot be read ({error.strerror}).") from error
