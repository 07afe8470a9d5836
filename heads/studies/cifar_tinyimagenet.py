"""``featurecache study cifar-tinyimagenet``: a small ViT against a small CNN, both from scratch. A notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from heads.splits import SHARE
from heads.stratify import stratified_parts
from heads.studies.spec import Images, Network, Part, Published, Study

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

# per set: what the notebook augmented with, the batch, the side in pixels, and accuracy, train seconds, ms an image
SETS: dict[str, dict[str, Any]] = {
    "cifar10": {"augment": "flip,rotate10,shift0.1", "batch_size": 128, "image_size": 32},
    "cifar100": {"augment": "flip,rotate10,shift0.1", "batch_size": 128, "image_size": 32},
    "tinyimagenet": {"augment": "flip,rotate15,shift0.15", "batch_size": 64, "image_size": 64},
}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "Tiny ImageNet"}
REPORTED = {  # one GPU; inference includes loading
    ("cifar10", "vit"): (0.6292, 443, 0.347, 1_205_642), ("cifar10", "cnn"): (0.8004, 323, 0.286, 175_258),
    ("cifar100", "vit"): (0.3677, 439, 0.349, 1_217_252), ("cifar100", "cnn"): (0.4287, 326, 0.246, 181_108),
    ("tinyimagenet", "vit"): (0.3115, 884, 0.555, 1_248_584), ("tinyimagenet", "cnn"): (0.2985, 839, 0.492, 187_608),
}  # fmt: skip
MEASURES = ("accuracy", "train_seconds", "ms_per_image", "parameters")
NAMES = {"vit": "small ViT", "cnn": "small residual CNN"}


def _published(name: str) -> tuple[Published, ...]:
    return tuple(
        Published(NAMES[arch], measure, value, f"{name}-{arch}", remark="" if "_" not in measure else "one GPU")
        for arch in NAMES
        for measure, value in zip(MEASURES, REPORTED[name, arch], strict=True)
    )


def val_is_test(dataset: Dataset) -> np.ndarray | None:
    """[N] split names of images that have train and val and nothing else: the published val is test, as in the
    notebook, and 15 % of train, drawn from every class alike, are val."""
    if set(dataset.splits) != {"train", "val"}:
        return None
    names = np.where(np.array(dataset.splits) == "val", "test", "train").astype("<U5")
    rows = np.flatnonzero((names == "train") & (dataset.labels >= 0))
    drawn = stratified_parts(dataset.labels[rows], np.arange(len(rows)), np.array([1 - SHARE, SHARE]), 0) == 1
    names[rows[drawn]] = "val"
    return names


STUDY = Study(
    name="cifar-tinyimagenet",
    title="Small images: a ViT or a CNN, from scratch?",
    source="notebook on CIFAR-10, CIFAR-100 and Tiny ImageNet",
    about=(
        "A ViT of six blocks and width 128 and a CNN of six residual blocks, Adam 0.001, 10 epochs, flips, rotations "
        "and shifts. Nothing is pretrained.",
    ),
    images=(
        Images("cifar10", "torchvision:CIFAR10", tuple(f"c{k}" for k in range(10)), known_as=("cifar-10-batches-py",),
               local="torchvision:CIFAR10@{folder}"),
        Images("cifar100", "torchvision:CIFAR100", tuple(f"c{k}" for k in range(8)),
               known_as=("cifar-100-python",), local="torchvision:CIFAR100@{folder}"),
        Images("tinyimagenet", "kaggle:akash2sharma/tiny-imagenet", tuple(f"n{k}" for k in range(8)),
               known_as=("tiny-imagenet-200",)),
    ),
    parts=tuple(
        Part(name, TITLES[name], name, select="accuracy", published=_published(name), reference=f"{name}-cnn",
             splits=val_is_test)
        for name in SETS
    ),
    steps=tuple(
        Network(f"{name}-{arch}", name, f"{arch}-cifar", {**options, "epochs": 10, "lr": 1e-3})
        for name, options in SETS.items()
        for arch in NAMES
    ),
    differs=(
        "There is no val set there; its 10 epochs are all trained, and test is looked at once at the end. Here 15 % of "
        "train are val and choose the epoch, so that the networks train on 85 % of the images.",
        "Seconds and milliseconds there are of one GPU, with loading; ours are of the device that the table names.",
        "The text says GELU; the ViT's MLP has ReLU, torch's default, and so has ours.",
    ),
    cautions=(
        "Tiny ImageNet's 10,000 published val images are its test images, there and here: the labels of its own test "
        "images were never published.",
        "Images that cannot be read were skipped there; here each is named.",
    ),
)  # fmt: skip
