"""Masks beside images: ``name_mask.png`` beside ``name.png``, a folder ``masks`` beside one called ``images``.

They are no images of the set: whoever trains a classifier on both trains it on its own labels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from featurecache.formatting import abbreviated
from featurecache.sources.vocabulary import words_of

# Words of folders that say "images" and nothing of a class.
IMAGES = {
    "image", "images", "img", "imgs", "jpg", "jpeg", "png", "original", "originals", "orig", "raw", "picture",
    "pictures", "photos", "data",
}  # fmt: skip
_MASKS = {
    "mask",
    "masks",
    "segmentation",
    "segmentations",
    "annotation",
    "annotations",
    "groundtruth",
    "gt",
    "lungmask",
}
_MASK_END = re.compile(
    r"[ _-]?(mask|masks|seg|segmentation|gt|groundtruth|superpixels|lesion|annotation)([ _-]?\d+)?$", re.I
)
_LAST_NUMBER = re.compile(r"[ _-]?\d+$")


def without_masks(paths: Sequence[str]) -> tuple[list[int], list[str]]:
    """Rows that are images, and what to say of the masks: ``name_mask.png`` beside ``name.png``, or a folder of masks
    beside one of images."""
    stems = {path.rpartition(".")[0] for path in paths}
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    beside: dict[str, set[str]] = defaultdict(set)  # folder -> names of those in it
    for folder in folders:
        parts = folder.split("/")
        for depth, name in enumerate(parts):
            beside["/".join(parts[:depth])].add(name)
    of_masks = {folder: _mask_folder(folder.split("/"), beside, folders) for folder in folders}

    def kind(path: str) -> str:
        """How the mask is called, as a pattern; nothing for an image."""
        folder, _, name = path.rpartition("/")
        if of_masks[folder]:
            return f"{of_masks[folder]}/"
        stem, _, ending = path.rpartition(".")
        end = _MASK_END.search(stem.rpartition("/")[2])
        plain = stem[: -len(end[0])] if end else ""
        return f"*{_LAST_NUMBER.sub('', end[0])}.{ending}" if end and name and plain in stems else ""

    kinds = [kind(path) for path in paths]
    masks = Counter(filter(None, kinds))
    shown = abbreviated([kind for kind, _ in masks.most_common()], 3)
    remarks = [f"{masks.total():,} mask{'s' * (masks.total() > 1)} left out ({shown})"] if masks else []
    return [row for row, kind in enumerate(kinds) if not kind], remarks


def _mask_folder(parts: list[str], beside: dict[str, set[str]], folders: Collection[str]) -> str:
    """The one of these folders that holds masks: beside one of the same name without that word (masks, images;
    train_masks, train), or below the images themselves."""
    for depth, name in enumerate(parts):
        words, above = set(words_of(name)), "/".join(parts[:depth])
        if words & _MASKS and len(words) <= 3:
            plain = words - _MASKS - IMAGES
            others = [set(words_of(other)) for other in beside[above] - {name}]
            paired = any(not other & _MASKS and other - IMAGES == plain and (other or not plain) for other in others)
            if paired or (above in folders and above and not plain and len(beside[above]) == 1):
                return name
    return ""
