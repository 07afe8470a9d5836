"""``featurecache study pneumonia``: ViT, ResNet-50 or DenseNet-121 on chest X-rays; data, augmentation, optimiser.

A course project on Kaggle's paultimothymooney/chest-xray-pneumonia.
"""

from __future__ import annotations

from heads.studies.spec import Extract, Heads, Images, Look, Network, Part, Study

PART = "pneumonia"
BACKBONES = {"vit": ("timm:vit_base_patch16_224", "cls"), "resnet50": ("resnet50", "gap"),
             "densenet121": ("densenet121", "gap")}  # fmt: skip
TUNED = {"epochs": 10, "select": "accuracy"}
AUGMENT = "flip,rotate10,shift0.1"
OPTIMIZERS = {"sgd": 1e-3, "adam": 2e-5}  # beside AdamW, with which all are tuned; each with a usual learning rate

STUDY = Study(
    name="pneumonia",
    title="ViT, ResNet-50 or DenseNet-121 on chest X-rays?",
    source="course project on Kaggle paultimothymooney/chest-xray-pneumonia",
    about=(
        "timm's vit_base_patch16_224, ResNet-50 and DenseNet-121, fine-tuned and frozen. Asked: which is best and how "
        "long it takes; how few images do; what augmentation and the optimiser change; where the networks look.",
    ),
    images=(
        Images(
            "chest",
            "kaggle:paultimothymooney/chest-xray-pneumonia",
            ("NORMAL", "PNEUMONIA"),
        ),
    ),
    parts=(Part(PART, "Normal or pneumonia", "chest", select="accuracy"),),
    steps=(
        *(Extract(f"{name}-features", "chest", *backbone) for name, backbone in BACKBONES.items()),
        Heads("fractions", PART, tuple(f"{name}-features" for name in BACKBONES), "linear",
              {"fractions": "0.05,0.1,0.25,0.5,1"}),
        Heads("search", PART, tuple(f"{name}-features" for name in BACKBONES), "linear",
              {"search": "optuna", "trials": 15, "lr": "1e-5..1e-1", "weight_decay": "1e-6..1e-1"}),
        *(Network(f"{name}-tuned", PART, f"finetune:{backbone}", TUNED) for name, (backbone, _) in BACKBONES.items()),
        Network("resnet50-augmented", PART, "finetune:resnet50", {**TUNED, "augment": AUGMENT}),
        *(
            Network(f"resnet50-{name}", PART, "finetune:resnet50", {**TUNED, "optimizer": name, "lr": lr})
            for name, lr in OPTIMIZERS.items()
        ),
        Look("look", PART, tuple(f"{name}-tuned" for name in BACKBONES), "fractions", "vit-features"),
    ),
    differs=(
        "Its val split has 16 images; here val is drawn anew from train where a class has fewer than 10 in it.",
        "It reports no numbers that could be copied here; its questions are asked again instead.",
        "Augmentation and optimiser are compared on ResNet-50 only, and how few images do on frozen features: a whole "
        "network for each would take days without a GPU.",
    ),
    cautions=(
        "A val split of 16 images cannot choose a model.",
        "Patients have several images: where file names tell whose an image is, they stay together.",
    ),
    figures="pneumonia",
)  # fmt: skip
