"""Pairs of image files: masks, depth maps and labels beside images are left out; what shows one thing twice is told.

    1.png, 1_mask.png      1_color.png, 1_depth.png    a mask by its name, beside an image that is called the same
    images/, masks/        rgb/, depth/, image_2/, label_2/    train/, train_masks/    train/, test/, ground_truth/
    10_left.png, 10_right.png    x_pre_disaster.png, x_post_disaster.png    two images of one group
    left/1.png, right/1.png      image_2/1.png, image_3/1.png    pairs or classes: nobody can tell, and it is refused
    1.jpg, 1.png                 of every image both: the same

Whoever trains a classifier on masks too trains it on its own labels.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from featurecache.errors import Reading, SeveralReadings, SourceError
from featurecache.formatting import abbreviated, counted
from featurecache.sources.vocabulary import SPLITS, split_names_of, words_of

# Words of folders that say "images" and nothing of a class.
IMAGES = {
    "image", "images", "img", "imgs", "jpg", "jpeg", "png", "jpegimages", "original", "originals", "orig", "raw",
    "picture", "pictures", "photos", "data", "rgb", "color", "colors", "colour", "colours",
}  # fmt: skip
_MASKS = {
    "mask", "masks", "msk", "lungmask", "segmentation", "segmentations", "seg", "annotation", "annotations",
    "annotated", "groundtruth", "gt", "label", "labels", "trimap", "trimaps", "manual", "superpixels", "depth",
    "depths", "disparity", "disp", "heatmap", "heatmaps", "edge", "edges", "contour", "contours", "boundary",
    "saliency", "overlay", "overlays",
}  # fmt: skip
_SIDES = {
    "left", "right", "before", "after", "pre", "post", "previous", "noisy", "clean", "blur", "sharp", "hr", "lr", "ir",
    "nir", "infrared", "thermal", "visible", "grayscale", "gray", "grey",
}  # fmt: skip
_LETTERS = {"a", "b"}  # sides where another word says so: A, B and label
_MASK_WORD = "|".join(sorted(_MASKS | {"lesion"}, reverse=True))
_MASK_END = re.compile(rf"(?:{_MASK_WORD})(?:[ _.-]*(?:crop|map|image|img))?(?:[ _-]?\d+)?$")  # of names in lower case
_IMAGE_END = re.compile(rf"[ _.-](?i:{'|'.join(sorted(IMAGES | {'crop'}, reverse=True))})$")
_SIDE_END = re.compile(r"(.+)[-_ ](left|right|od|os|before|after|pre|post)(?:[-_ ]disaster)?", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"[ _-]?\d+$")
_LONGEST = 32  # characters of such an end


def without_masks(paths: Sequence[str], where: str, classes_at: int | None = None) -> tuple[list[int], list[str]]:
    """Rows that are images, and what to say of the masks. The folders of level ``classes_at`` are classes, however they
    are called. Raises SourceError where nobody can tell masks from images."""
    masks = _mask_folders(paths, where, classes_at)
    images = {_IMAGE_END.sub("", path.rpartition(".")[0]) for path in paths}
    folders = {folder: _mask_folder_above(folder, masks) for folder in {path.rpartition("/")[0] for path in paths}}

    def kind(path: str) -> str:
        """How the mask is called, as a pattern; nothing for an image."""
        if above := folders[path.rpartition("/")[0]]:
            return f"{above}/"
        stem, _, ending = path.rpartition(".")
        plain = _without_mask_end(stem)
        if plain == stem or plain not in images:
            return ""
        return f"*{_LAST_NUMBER.sub('', stem[len(plain) :])}.{ending}"

    kinds = [kind(path) for path in paths]
    rows = [row for row, kind in enumerate(kinds) if not kind]
    _refuse_two_endings([paths[row] for row in rows], where)
    counts = Counter(filter(None, kinds))
    shown = abbreviated([kind for kind, _ in counts.most_common()], 3)
    return rows, [f"{counted(counts.total(), 'mask')} left out ({shown})"] if counts else []


def _mask_folders(paths: Iterable[str], where: str, classes_at: int | None) -> set[str]:
    """The folders that hold masks: beside one of the same name without that word (masks, images; train_masks, train),
    beside splits, or below the images themselves."""
    folders = {path.rpartition("/")[0] for path in paths}
    beside: dict[str, set[str]] = defaultdict(set)  # folder -> names of those in it
    for folder in folders:
        parts = folder.split("/") if folder else []
        for depth, name in enumerate(parts):
            beside["/".join(parts[:depth])].add(name)
    masks = set()
    for above, names in beside.items():
        level = above.count("/") + 2 if above else 1
        words = {name: _words(name) for name in names}
        others = {name: own for name, own in words.items() if not own & _MASKS}
        splits = others and len(split_names_of(sorted(others))) == len(others)
        alone = above and above in folders and len(names) == 1
        for name in sorted(names - others.keys()) if level != classes_at else ():
            plain = words[name] - _MASKS - IMAGES
            same = sorted(other for other, own in others.items() if own and own - IMAGES == plain)
            if plain - SPLITS.keys():  # of a class: face, face_mask
                if same and share_names(
                    *(_names_below(paths, f"{above}/{each}".lstrip("/")) for each in (name, same[0]))
                ):
                    refuse_pairs([same[0], name], f"{where}/{above}".rstrip("/"), level)
            elif same or (not plain and (splits or alone)):
                masks.add(f"{above}/{name}".lstrip("/"))
    return masks


def _mask_folder_above(folder: str, masks: Collection[str]) -> str:
    """The name of the outermost of ``masks`` that ``folder`` is or lies in."""
    parts = folder.split("/")
    return next((name for depth, name in enumerate(parts, 1) if "/".join(parts[:depth]) in masks), "")


def _words(name: str) -> set[str]:
    """Without numbers: label_2, 1st_manual."""
    words = {word for word in words_of(name) if not word.isdigit() and word not in ("st", "nd", "rd")}
    return words - {"ground", "truth"} | {"groundtruth"} if words >= {"ground", "truth"} else words


def _names_below(paths: Iterable[str], folder: str) -> set[str]:
    below = (path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/"))
    return {plain_name(path) for path in below}


def _without_mask_end(stem: str) -> str:
    """``1_mask``, ``1mask`` or ``imgMask`` without the mask; ``hedge`` is no edge."""
    lower = stem.lower()
    end = _MASK_END.search(lower, max(len(lower) - _LONGEST, 0)) if len(lower) == len(stem) else None
    at = end.start() if end else 0
    whole = at > 0 and (not stem[at - 1].isalpha() or (stem[at - 1].islower() and stem[at].isupper()))
    return stem[:at].rstrip(" _.-") if whole else stem


def plain_name(path: str) -> str:
    """A path without ending and without the words at its end that say mask, image or side."""
    stem = os.path.splitext(path)[0]
    side = _SIDE_END.fullmatch(stem)
    return side[1] if side else _IMAGE_END.sub("", _without_mask_end(stem))


def share_names(*folders: set[str]) -> bool:
    """Whether most files of some folders are called the same in all."""
    return 2 * len(set.intersection(*folders)) >= max(map(len, folders))


def are_sides(names: Collection[str]) -> bool:
    """Whether folders are called like the sides of pairs: left, right; image_2, image_3; A, B and label."""
    if len(names) < 2:
        return False
    words = [set(words_of(name)) for name in names]
    shared = set.intersection(*words)
    own = [{word for word in several - shared if not word.isdigit()} for several in words]
    if not any(own):
        return bool(shared & IMAGES)
    return all(each and each <= _SIDES | IMAGES | _MASKS | _LETTERS for each in own) and not all(
        each <= _LETTERS for each in own
    )


def refuse_pairs(names: Sequence[str], where: str, level: int) -> None:
    one, several = f"{where}/{names[0]}", abbreviated(names)
    raise SeveralReadings(
        f"{several} in {where} hold files of the same names: are they pairs (two images of one thing, an image and its "
        f"mask), or classes? Classes: --classes-at {level}. Of pairs give one, --data {one}, or list the images in a "
        "CSV (columns path, label, group).",
        [Reading(f"the classes are {several}", {"classes_at": level}), Reading(f"{names[0]} alone", {"data": one})],
    )


def _refuse_two_endings(paths: Sequence[str], where: str) -> None:
    """Refuses images of which every one is there with two endings (1.jpg, 1.png)."""
    endings = Counter(os.path.splitext(path)[1].lower() for path in paths)
    stems = Counter(os.path.splitext(path)[0] for path in paths)
    if len(stems) > 1 and len(endings) == 2 and set(stems.values()) == {2} and set(endings.values()) == {len(stems)}:
        raise SourceError(
            f"every image of {where} is there twice, as {' and as '.join(sorted(endings))} ({min(stems)}): images and "
            "their masks, or one image in two formats? Move one of them away, or list the images in a CSV (columns "
            "path, label)."
        )


def groups_of_pairs(paths: Iterable[str]) -> tuple[list[str], str] | None:
    """The pair that each image belongs to, and what was understood, where all their names end in a side (10_left,
    10_right; x_pre_disaster) and some have both; else None."""
    pairs, sides = list[str](), set[str]()
    for path in paths:
        match = _SIDE_END.fullmatch(os.path.splitext(path.replace("\\", "/").rpartition("/")[2])[0])
        if match is None:
            return None
        pairs.append(match[1])
        sides.add(match[2])
    if not 1 < len(set(pairs)) < len(pairs):
        return None
    return pairs, f"groups are the pairs by the names of the images ({', '.join(sorted(sides))})"
