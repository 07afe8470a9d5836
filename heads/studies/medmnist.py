"""``featurecache study medmnist``: a fine-tuned ViT on sets of MedMNIST v2, and frozen features beside it.

A repository after doi 10.1038/s41598-024-63094-9 (Scientific Reports).
"""

from __future__ import annotations

from featurecache.sources.medmnist import MEDMNIST
from heads.studies.spec import Extract, Heads, Images, Look, Network, Part, Published, Step, Study

DEFAULT = ("bloodmnist", "breastmnist", "pathmnist", "retinamnist")
NAMES = (*DEFAULT, *(name for name in MEDMNIST if name not in DEFAULT))
_V2 = "MedMNIST v2 (Yang et al. 2023)"
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "bloodmnist": (Published("ViT, fine-tuned", "accuracy", 0.9790, "bloodmnist-tuned"),),
    "breastmnist": (Published("ViT, fine-tuned", "accuracy", 0.9038, "breastmnist-tuned"),),
    "pathmnist": (Published("ViT, fine-tuned", "accuracy", 0.9462, "pathmnist-tuned"),),
    "retinamnist": (Published("ViT, fine-tuned", "accuracy", 0.570, "retinamnist-tuned"),),
    "pneumoniamnist": (
        Published("ResNet-18 at 28 px", "accuracy", 0.854, source=_V2),
        Published("ResNet-18 at 28 px", "auroc", 0.944, source=_V2),
    ),
}


def _part(name: str) -> Part:
    return Part(name, name.replace("mnist", "MNIST").capitalize().replace("mnist", "MNIST"), name,
                select="auroc" if MEDMNIST[name].task == "multilabel" else "accuracy",
                published=PUBLISHED.get(name, ()))  # fmt: skip


def _steps(name: str) -> tuple[Step, ...]:
    tuned = {"epochs": 20, "select": _part(name).select}
    return (
        Extract(f"{name}-features", name, "vit-in1k", "cls"),
        Heads(f"{name}-frozen", name, (f"{name}-features",), "linear,knn"),
        Network(f"{name}-tuned", name, "finetune:vit-in1k", tuned),
        Network(f"{name}-rescaled", name, "finetune:vit-in1k", {**tuned, "rlrr": True}),
        Look(f"{name}-look", name, (f"{name}-tuned", f"{name}-rescaled"), images=2),
    )


STUDY = Study(
    name="medmnist",
    title="MedMNIST v2: fine-tuned, lightly adapted, or frozen?",
    source="repository after doi 10.1038/s41598-024-63094-9",
    about=(
        "google/vit-base-patch16-224 with its own processor: fine-tuned whole, adapted by low-rank rescaling (RLRR, "
        "Dong et al., CVPR 2024), and frozen with a linear probe and k-NN (after Doerrich et al. 2025, MedMNIST+).",
    ),
    images=tuple(
        Images(name, f"medmnist:{name}", published.classes, published.task, (f"{name}.npz", f"{name}_[0-9]*.npz"),
               default=name in DEFAULT)
        for name, published in ((name, MEDMNIST[name]) for name in NAMES)
    ),
    parts=tuple(_part(name) for name in NAMES),
    steps=tuple(step for name in NAMES for step in _steps(name)),
    differs=(
        "How its epoch and learning rate were chosen is not known here; in this study val chooses, and test is read "
        "once.",
        "Images stand in two splits of some sets (8 of PneumoniaMNIST in train and val); here such images are left out "
        "of train.",
        "RetinaMNIST's five grades are in order: its report here also has quadratic kappa and the mean absolute error.",
    ),
)  # fmt: skip
