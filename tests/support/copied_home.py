"""A backbone, images, and a cache that has their features and those of augmented copies of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np

import featurecache
from featurecache.extraction.run import ExtractionResult
from featurecache.maintenance.verify import verify
from featurecache.store.view import View

from .checkpoints import save_vit
from .command import call
from .pictures import save_picture
from .plant import rewrite

STEPS = "flip,rotate10,shift0.1"
TRAIN, VAL, TEST = 6, 2, 2
N = TRAIN + VAL + TEST


def extract(home: Path, cache: str = "cache", data: str = "data", **options) -> ExtractionResult:
    options = {"outputs": "cls,tokens", "batch_size": 4, "workers": 1, "forward": "library", **options}
    return featurecache.extract(home / data, backbone=str(home / "vit"), cache=home / cache, **options)


def make_home(home: Path) -> Path:
    """A backbone, images, every one another, and their view with two copies of each training image."""
    save_vit(home / "vit")
    for number, (split, count) in enumerate({"test": TEST, "train": TRAIN, "val": VAL}.items()):
        for k in range(count):
            save_picture(home / "data" / split / ("ill", "well")[k % 2] / f"{k}.png", 10 * number + k, width=30 + k)
    extract(home, copies=2, augment=STEPS)
    return home


def copy_home(undisturbed: Path, tmp_path: Path) -> Path:
    """The same, to be changed; the backbone stays where it was."""
    os.symlink(undisturbed / "vit", tmp_path / "vit")
    for name in ("data", "cache"):
        shutil.copytree(undisturbed / name, tmp_path / name)

    def move(file: h5py.File) -> None:  # the images of the copied view are the copied images
        file.attrs["source"] = file.attrs["source"].replace(str(undisturbed), str(tmp_path))

    rewrite(view_path(tmp_path), move)
    return tmp_path


def view_path(home: Path) -> Path:
    return next((home / "cache").glob("*/data.h5"))


def opened(home: Path, cache: str = "cache", name: str = "data", **options) -> View:
    return featurecache.open_view(name, home / cache, **options)


def shards(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.glob("*/*/*.h5"))}


def by_digest(view: View | Path) -> dict[bytes, bytes]:
    """The bytes of the tokens of every row, of images and copies."""
    everything = View(getattr(view, "path", view), copies=True)
    rows = everything.array("tokens", np.arange(everything.rows))
    return dict(zip(everything.digests.tolist(), (row.tobytes() for row in rows), strict=True))


def run(*arguments: object) -> str:
    done = call(*arguments)
    assert done.exit_code == 0
    return done.output


def damages(home: Path) -> tuple:
    return verify(home / "cache").damages
