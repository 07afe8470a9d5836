"""About how long the steps of a study take on this machine, from the multiply-adds of their networks."""

from __future__ import annotations

from typing import Any

import numpy as np

from heads.studies.images import Given

FINETUNE = "finetune:"
# 10^9 multiply-adds of an image and the side in pixels they are at; None: the same at any side. Dosovitskiy et al.
# 2021, torchvision's table of weights; the others counted by hand from the layers.
GMACS: dict[str, tuple[float, int | None]] = {
    "vit-in21k": (17.6, 224), "vit-in1k": (17.6, 224), "timm:vit_base_patch16_224": (17.6, 224), "vit-demo": (0.03, 64),
    "resnet50": (4.1, 224), "densenet121": (2.8, 224), "torchvision:resnet18": (1.8, 224),
    "torchvision:shufflenet_v2_x0_5": (0.04, 224), "cnn-mindlina": (0.6, 256), "cnn-medical-mnist": (0.51, 224),
    "cnn-cifar": (0.027, 32), "vit-cifar": (0.085, None),
}  # fmt: skip
HEAD_GMACS = {"large": 0.04}  # of tokens of a ViT-B; of others the steps around it, not the product
AROUND = 0.05  # minutes of a step beside the products: loading, the first batch, measures, writing
REACHED = 0.7  # of the speed of a large product of matrices, as ViT-B, ResNet-50 and DenseNet-121 reached it


def minutes_of(asked: dict[str, Any], given: Given, gflops: float) -> float | None:
    """Multiply-adds twice, training three times a forward pass; a few seconds for each image that is looked into."""
    counts = _counts(given, asked)
    if "extract" in asked:
        gmacs = _gmacs(asked["backbone"], asked.get("image_size"))
        return None if gmacs is None else _minutes(gmacs * sum(counts.values()), gflops) + AROUND
    if "train_baseline" in asked:
        arch = asked["arch"].removeprefix(FINETUNE)
        gmacs, epochs = _gmacs(arch, asked.get("image_size")), asked.get("epochs") or epochs_of(asked["arch"])
        once = counts["val"] * epochs + counts["test"]
        return None if gmacs is None else _minutes(gmacs * (3 * counts["train"] * epochs + once), gflops) + AROUND
    if "ablate" in asked:
        each = sum(HEAD_GMACS.get(head, 0.0001) for head in asked["heads"].split(",")) * asked.get("trials", 1)
        parts = sum(float(part) for part in str(asked.get("fractions", "1")).split(","))
        return _minutes(3 * each * counts["train"] * asked["epochs"] * parts, gflops) + AROUND
    return AROUND * asked["images"]


def _counts(given: Given, asked: dict[str, Any]) -> dict[str, int]:
    """About how many images each split has; without splits in the data, 70/15/15."""
    names, total = np.array(given.dataset.splits), len(given.dataset)
    found = {split: int((names == split).sum()) for split in ("train", "val", "test")}
    if not any(found.values()):
        found = {"train": total * 70 // 100, "val": total * 15 // 100, "test": total * 15 // 100}
    if asked.get("train_per_class"):
        found["train"] = min(found["train"], asked["train_per_class"] * max(len(given.dataset.classes), 1))
    return found


def _gmacs(name: str, size: int | None) -> float | None:
    if name not in GMACS:
        return None
    gmacs, side = GMACS[name]
    return gmacs * (size / side) ** 2 if size and side else gmacs


def _minutes(gmacs: float, gflops: float) -> float:
    return 2 * gmacs / (REACHED * gflops) / 60


def epochs_of(arch: str) -> int:
    """As published; recipes name those of what they fine-tune."""
    from heads.models.catalogue import BASELINES

    return int(BASELINES[arch].settings.get("epochs", 50))


def machine_gflops(device: str = "cpu") -> float:
    """10^9 operations a second of this machine, as it is now: the best product of two matrices of 1024 × 1024 in half
    a second."""
    import time

    import torch

    x = torch.ones(1024, 1024, device=device)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        begin = time.perf_counter()
        float((x @ x)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best / 1e9
