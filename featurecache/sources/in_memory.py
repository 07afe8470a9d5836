"""Images that a program holds: an array of all, a list of arrays or of PIL images, or a list of the paths of files.

``featurecache.extract(["a.png", "b.png"], …)``: a `Dataset` without labels, of which nobody can ask again where its
images are. A PIL image is turned as its EXIF says; what is no plain grey or RGB goes through PNG, so that transparency,
palettes and 16 bits are read by the rules for files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from featurecache.errors import SourceError, UnreadableImage
from featurecache.images.headers import EncodedImage
from featurecache.sources.base import Dataset, ImageArrays, ImageFiles
from featurecache.sources.labels import resolve_labels

KIND = "memory"  # of the source of such a dataset
_EXPECTED = (
    "expected a folder, a table or another source by its name, a list of the paths of images, or pixels: uint8 "
    "[N, H, W] or [N, H, W, 3], or a list of arrays or of PIL images"
)


def is_pil(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def encoded_of_pil(image: Any) -> EncodedImage:
    """A PIL image as the rest of the program has images. Raises UnreadableImage for what PNG cannot hold."""
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("L", "RGB"):
            return np.asarray(upright)
        file = io.BytesIO()
        upright.save(file, "PNG")
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage(f"a PIL image of mode {image.mode} ({error}); convert it to RGB") from error
    return file.getvalue()


def open_memory(data: Any, task: str | None) -> Dataset:
    """The dataset of what a program holds. Raises SourceError."""
    several = list(data) if isinstance(data, list | tuple) else []
    images: ImageFiles | ImageArrays
    if isinstance(data, np.ndarray):
        images, ids = ImageArrays([_pixels(data)]), _numbers(len(data))
    elif several and all(isinstance(each, str | os.PathLike) for each in several):
        ids = _paths(several)
        images = ImageFiles(os.getcwd(), ids)
    elif several and all(isinstance(each, np.ndarray) or is_pil(each) for each in several):
        parts = [encoded_of_pil(each) if is_pil(each) else each for each in several]
        images, ids = ImageArrays([parts]), _numbers(len(parts))
    else:
        kinds = ", ".join(sorted({type(each).__name__ for each in several}))
        raise SourceError(f"the images are {type(data).__name__}{kinds and f' of {kinds}'}; {_EXPECTED}.")
    what = f"{len(ids):,} {'paths' if isinstance(images, ImageFiles) else 'images in memory'}"
    return Dataset(
        name="images",
        source={"kind": KIND, "data": what},
        ids=ids,
        **resolve_labels(np.full(len(ids), -1, np.int64), [], task, what)._asdict(),
        splits=[""] * len(ids),
        images=images,
    )


def _pixels(array: np.ndarray) -> np.ndarray:
    several = array.shape[3] in (1, 3) if array.ndim == 4 else array.ndim == 3 and array.shape[2] not in (1, 3)
    if not several or not len(array):
        one = "; one image is a list of one" if array.ndim in (2, 3) else ""
        raise SourceError(f"the images are an array {array.dtype} {list(array.shape)}; {_EXPECTED}{one}.")
    return array


def _numbers(count: int) -> list[str]:
    return [f"image {number}" for number in range(1, count + 1)]


def _paths(paths: Sequence[Any]) -> list[str]:
    names = [os.path.expanduser(os.fspath(path)) for path in paths]
    if folders := [name for name in names if os.path.isdir(name)]:
        raise SourceError(f"the list of paths holds the folder {folders[0]}; expected files, or one folder by itself.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"the list of paths holds {twice} twice; expected each image once.")
    return names
