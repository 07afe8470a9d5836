"""``featurecache study medical-mnist``: six kinds of scan; a CNN from scratch, ResNet-50, and a fine-tuned ViT.

A notebook on Medical MNIST (Kaggle gennadiimanzhos/medical-mnist-train-test-val).
"""

from __future__ import annotations

from heads.studies.spec import Extract, Heads, Images, Network, Part, Published, Study

PART = "scans"
TUNED = {"train_per_class": 50, "epochs": 20, "batch_size": 16, "lr": 2e-5, "weight_decay": 0.01, "select": "loss"}

STUDY = Study(
    name="medical-mnist",
    title="Six kinds of scan: from scratch, or pretrained?",
    source="notebook on Medical MNIST, Kaggle gennadiimanzhos/medical-mnist-train-test-val",
    about=(
        "A three-block CNN from scratch (Adam, plateau schedule, early stop), ResNet-50, and "
        "google/vit-base-patch16-224 fine-tuned on 300 images; ResNet-50 and the ViT also frozen.",
    ),
    images=(
        Images(
            "medical-mnist",
            "kaggle:gennadiimanzhos/medical-mnist-train-test-val",
            ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"),
        ),
    ),
    parts=(
        Part(
            PART,
            "Which kind of scan",
            "medical-mnist",
            select="accuracy",
            published=(
                Published("CNN from scratch", "accuracy", 0.9969, "cnn", split="val",
                          remark="after epoch 1; interrupted in epoch 2"),
                Published("CNN from scratch", "parameters", 3_438_342, "cnn"),
                Published("ViT, fine-tuned on 300 images", "accuracy", 1.0, "vit-tuned", split="val",
                          remark="50 val images"),
                Published("ViT, fine-tuned on 300 images", "accuracy", 1.0, "vit-tuned",
                          remark="100 random test images"),
                Published("ViT, all weights trained", "parameters", 85_803_270, "vit-tuned"),
            ),
        ),
    ),
    steps=(
        Extract("untrained-features", "medical-mnist", "vit-in1k", "cls", untrained=True),
        Heads("untrained-heads", PART, ("untrained-features",), "logreg"),
        Extract("resnet-features", "medical-mnist", "resnet50", "gap"),
        Extract("vit-features", "medical-mnist", "vit-in1k", "cls"),
        Heads("frozen-heads", PART, ("vit-features", "resnet-features"), "linear,logreg"),
        Network("cnn", PART, "cnn-medical-mnist"),
        Network("resnet-tuned", PART, "finetune:resnet50", TUNED),
        Network("vit-tuned", PART, "finetune:vit-in1k", TUNED),
    ),
    differs=(
        "The ViT was tested on 100 random images and chosen on 50; here on all of test and val. ResNet-50's own cell "
        "is absent there; here it is fine-tuned on the same 300 images as the ViT, and frozen.",
        "The 300 images were drawn at random; here they are 50 of each class.",
        "Of the 58,954 files 440 repeat another's bytes, also across splits; here a training image that stands in val "
        "or test too is left out of train.",
    ),
    cautions=(
        "This set cannot tell good models apart: logistic regression on the features of a ViT that was never trained "
        "(untrained-heads, the control below) reached 99.5 % of 2,000 test images.",
    ),
)  # fmt: skip
