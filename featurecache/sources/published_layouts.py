"""Published data sets as they are unpacked: the chest X-rays of Kermany et al. (2018), and Tiny ImageNet.

The chest X-rays of children, as Kaggle and Mendeley have them, by what the file names say:

    train/NORMAL/IM-0115-0001.jpeg             train/NORMAL/NORMAL2-IM-0592-0001.jpeg
    train/PNEUMONIA/person1_bacteria_1.jpeg    test/PNEUMONIA/person1_virus_6.jpeg        (Kaggle)
    train/PNEUMONIA/BACTERIA-1049278-0001.jpeg                                            (Mendeley, version 2 and 3)

Classes are the two folders; ``--column label=kind`` makes three of them, normal, bacteria and virus, by the names. In
both cases the kind is also a further column. Groups are the numbers of persons (of the normal ones: of examinations),
within a split and a kind. Whether person 1 of train and person 1 of test are the same child nobody has said, so such
pairs are counted and called possible. Kaggle's archive holds everything twice, the second time in a folder of the same
name: that one is left out.

Tiny ImageNet (Stanford CS231n, 2015), 200 classes of ImageNet at 64×64 pixels:

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
from collections import Counter
from dataclasses import replace
from itertools import combinations

from featurecache.errors import SourceError
from featurecache.formatting import abbreviated, counted
from featurecache.sources.base import Dataset, ImageFiles, read_text
from featurecache.sources.folders import is_image, list_folder, open_folder
from featurecache.sources.labels import class_labels, resolve_labels, unique_names
from featurecache.sources.vocabulary import split_names_of

KINDS = ("normal", "bacteria", "virus")
_NAMES = (
    re.compile(r"(?P<number>person\d+)_(?P<kind>bacteria|virus)_\d+$", re.IGNORECASE),
    re.compile(r"(?P<number>(NORMAL2-)?IM-\d+)-\d+(-\d+)*$", re.IGNORECASE),
    re.compile(r"(?P<kind>NORMAL|BACTERIA|VIRUS)-(?P<number>\d+)-\d+$", re.IGNORECASE),
)
_TRIED = 50  # names of a folder
_ANNOTATIONS = os.path.join("val", "val_annotations.txt")


# -- the chest X-rays


def is_chest_xray(folder: str) -> bool:
    """Class folders NORMAL and PNEUMONIA, with or without split folders above them, and names of this set in them."""
    for above in (folder, *(os.path.join(folder, name) for name in _split_folders(folder).values())):
        classes = {name.lower(): name for name in list_folder(above)[1]}
        if classes.keys() >= {"normal", "pneumonia"}:
            names = list_folder(os.path.join(above, classes["pneumonia"]))[0][:_TRIED]
            if any((parts := _read_name(name)) and parts[0] != "normal" for name in names):
                return True
    return False


def open_chest_xray(data: str, columns: dict[str, str] | None, task: str | None) -> Dataset:
    """The dataset in the folder ``data`` (an absolute path)."""
    by_kind = _by_kind(columns or {})
    splits = _split_folders(data).keys()
    inner = [name for name in list_folder(data)[1] if splits and name in (os.path.basename(data), "chest_xray")]
    again = [name for name in inner if _split_folders(os.path.join(data, name)).keys() == splits]
    plain = open_folder(data, None, leave_out=again)
    kinds, groups, unnamed = list[str](), list[str](), 0
    for name, split, label in zip(plain.ids, plain.splits, plain.labels.tolist(), strict=True):
        folder = plain.classes[label].lower() if label >= 0 else ""
        kind, person = _read_name(os.path.basename(name)) or ("", "")
        unnamed += not person
        if folder != "pneumonia" or kind == "normal":  # what is normal the folder says alone
            kind = "normal" if folder == "normal" else ""
        kinds.append(kind)
        groups.append(f"{split}/{kind}/{person}" if person and kind else name)
    numbers, names = (class_labels(kinds, KINDS), KINDS) if by_kind else (plain.labels, plain.classes)
    notes = [f"{name} inside {data} repeats its splits and was left out." for name in again]
    if unnamed:
        missing = " and no label" if by_kind and "" in kinds else ""
        notes.append(f"{counted(unnamed, 'image')} with other names than this set's: no number of a person{missing}.")
    return replace(
        plain,
        **resolve_labels(numbers, names, task, data)._asdict(),
        groups=groups,
        meta={"kind": kinds},
        notes=(*plain.notes, *notes, *_possible(groups, plain.ids)),
    )


def _by_kind(columns: dict[str, str]) -> bool:
    """Whether the label is the kind, as ``--column label=kind`` says; the folder is ``label=folder``, or nothing."""
    for role, name in columns.items():
        if role != "label" or name not in ("kind", "folder"):
            ways = (
                "--column label=kind makes three classes (normal, bacteria, virus), label=folder those of the folders"
            )
            raise SourceError(f"a folder of chest X-rays has no column for {role}={name}; {ways}.")
    return columns.get("label") == "kind"


def _read_name(name: str) -> tuple[str, str] | None:
    """(kind, number of the person) as a file name has them."""
    for pattern in _NAMES:
        if match := pattern.match(os.path.splitext(name)[0]):
            parts = match.groupdict()
            return (parts.get("kind") or "normal").lower(), parts["number"].lower()
    return None


def _possible(groups: list[str], ids: list[str]) -> list[str]:
    """One sentence for the persons of one kind whose number stands in two splits."""
    named = {group for group, name in zip(groups, ids, strict=True) if group != name}
    splits: dict[tuple[str, str], set[str]] = {}
    for split, kind, number in (group.split("/", 2) for group in named):
        splits.setdefault((kind, number), set()).add(split)
    both = Counter(pair for several in splits.values() for pair in combinations(sorted(several), 2))
    if not both:
        return []
    pairs = ", ".join(f"{first} and {second} {count:,}" for (first, second), count in sorted(both.items()))
    return [
        f"Persons of one kind with the same number in two splits: {pairs}. Possible leaks only: nobody has said "
        "whether a number means the same child in both."
    ]


def _split_folders(folder: str) -> dict[str, str]:
    """Split → its folder."""
    return {split: name for name, split in split_names_of(list_folder(folder)[1]).items()}


# -- Tiny ImageNet


def is_tiny_imagenet(folder: str) -> bool:
    """Its list of classes, and either the one of val or the class folders of train."""
    if not os.path.isfile(os.path.join(folder, "wnids.txt")):
        return False
    by_wnid = any(re.fullmatch(r"n\d{8}", name) for name in list_folder(os.path.join(folder, "train"))[1])
    return by_wnid or os.path.isfile(os.path.join(folder, _ANNOTATIONS))


def open_tiny_imagenet(data: str, task: str | None) -> Dataset:
    """The dataset in the folder ``data`` (an absolute path)."""
    wnids = sorted({line.strip() for line in _lines(data, "wnids.txt")} - {""})
    if not wnids:
        raise SourceError(f"wnids.txt of the Tiny ImageNet in {data} is empty; unpack the archive again.")
    notes = []
    if os.path.exists(os.path.join(data, "words.txt")):
        pairs = (line.partition("\t") for line in _lines(data, "words.txt"))
        words = {wnid: names.split(",")[0].strip() for wnid, _, names in pairs}
        names = unique_names([words.get(wnid) or wnid for wnid in wnids])
    else:
        names = wnids
        notes.append("words.txt is missing: the classes bear their WordNet numbers.")
    train = _train(data, wnids)
    val, more = _val(data, wnids)
    if left_out := len(_images(data, "test/images")):
        left = f"{counted(left_out, 'image')} of test left out, without published labels"
        notes.append(f"{left}: give {data}/test/images.")
    ids, wnid_of = map(list, zip(*sorted([*train.items(), *val.items()]), strict=True))
    return Dataset(
        name=os.path.basename(data),
        ids=ids,
        **resolve_labels(class_labels(wnid_of, wnids), names, task, data)._asdict(),
        splits=[name.split("/", 1)[0] for name in ids],
        meta={"wnid": wnid_of},
        images=ImageFiles(data, ids),
        notes=(*notes, *more),
    )


def _lines(data: str, name: str) -> list[str]:
    return read_text(os.path.join(data, name), " of the Tiny ImageNet").splitlines()


def _images(data: str, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in list_folder(os.path.join(data, folder))[0] if is_image(name)]


def _in_class_folders(data: str, split: str, wnids: list[str]) -> dict[str, str]:
    """id → class; a class may have its images in ``images`` or directly."""
    folders = [(f"{split}/{wnid}{inner}", wnid) for wnid in wnids for inner in ("/images", "")]
    return {image: wnid for folder, wnid in folders for image in _images(data, folder)}


def _train(data: str, wnids: list[str]) -> dict[str, str]:
    """id → class of the training images."""
    train = _in_class_folders(data, "train", wnids)
    strange = [name for name in list_folder(os.path.join(data, "train"))[1] if name not in wnids]
    absent = sorted(set(wnids) - set(train.values()))
    again = "; unpack the archive again."
    if strange:
        there = abbreviated(strange, 3)
        raise SourceError(f"train holds the class folders {there}, which wnids.txt in {data} does not name.")
    if not train:
        raise SourceError(f"train in {data} holds no image of the classes of wnids.txt{again}")
    if absent:
        raise SourceError(f"wnids.txt in {data} names {abbreviated(absent, 3)}, of which train has no image{again}")
    return train


def _val(data: str, wnids: list[str]) -> tuple[dict[str, str], list[str]]:
    """id → class of the images of val, and what to say of them."""
    together = _images(data, "val/images")
    if sorted_in := _in_class_folders(data, "val", wnids):
        again = f"val is sorted into class folders: {counted(len(together), 'image')} of val/images left out."
        return sorted_in, [again] if together else []
    if not together and not os.path.exists(os.path.join(data, _ANNOTATIONS)):
        return {}, [f"There are no images of val in {data}."]
    annotated = _annotated(data, wnids)
    extra = [name for name in together if name not in annotated]
    notes = [f"{counted(len(extra), 'image')} of val not in val_annotations.txt, without a label."] if extra else []
    return annotated | dict.fromkeys(extra, ""), notes


def _annotated(data: str, wnids: list[str]) -> dict[str, str]:
    """id → class of the images that val_annotations.txt lists, whether they are there or not (one that is not is a
    named failure when it is read)."""
    annotated: dict[str, str] = {}
    for number, line in enumerate(_lines(data, _ANNOTATIONS), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if wnid not in wnids or "/" in name or f"val/images/{name}" in annotated:
            expected = "expected a file's name, a tab and one of the classes of wnids.txt, each name once"
            raise SourceError(f"line {number:,} of {_ANNOTATIONS} in {data} is {line[:60]!r}; {expected}.")
        annotated[f"val/images/{name}"] = wnid
    return annotated
