"""What the publishers of MedMNIST call the classes of its twelve 2D sets, and what kind of task each is.

Source: medmnist/info.py of MedMNIST/MedMNIST (version 2.1.0), where the index of a name is its label; Yang et al. 2023,
"MedMNIST v2", Scientific Data 10:41. RetinaMNIST's five grades of diabetic retinopathy have numbers for names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Task and class names of one set; index = label."""

    task: str
    classes: tuple[str, ...]


_ORGANS = Published(
    "multiclass",
    ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
     "pancreas", "spleen"),
)  # fmt: skip

MEDMNIST: dict[str, Published] = {
    "pathmnist": Published(
        "multiclass",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
    "chestmnist": Published(
        "multilabel",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
         "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
    ),
    "dermamnist": Published(
        "multiclass",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
         "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
    ),
    "octmnist": Published(
        "multiclass", ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
    ),
    "pneumoniamnist": Published("binary", ("normal", "pneumonia")),
    "retinamnist": Published("ordinal", ("0", "1", "2", "3", "4")),
    "breastmnist": Published("binary", ("malignant", "normal, benign")),
    "bloodmnist": Published(
        "multiclass",
        ("basophil", "eosinophil", "erythroblast",
         "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
         "platelet"),
    ),
    "tissuemnist": Published(
        "multiclass",
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
         "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
         "Thick Ascending Limb"),
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip


def published(stem: str) -> Published | None:
    """The record of a file called ``stem``: the name of a set, alone or with its size (``pneumoniamnist_224``)."""
    return MEDMNIST.get(re.sub(r"_(28|64|128|224)$", "", stem.lower()))
