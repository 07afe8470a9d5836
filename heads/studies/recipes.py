"""Recipes of the five studies: what each asked, on which images, by which steps, and what it reported.

To add one: a `Study` and its name in ``STUDIES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import UnknownStudy, nearest
from featurecache.sources.medmnist import MEDMNIST
from heads.splits import SHARE
from heads.stratify import stratified_parts
from heads.studies.spec import ExplainStep, Extract, Heads, ImageSet, Network, PublishedNumber, Question, Step, Study

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

# --- mindlina: O. Mindlina, "Vision Transformer for classification on medical images", article, January 2024

PER_CLASS = 1000  # training images, as in the article


def thousand_of_each(dataset: Dataset) -> np.ndarray:
    """[N] split names: ``PER_CLASS`` images of each class of train (two thirds where hardly more are there), the others
    of train for val; test as given. Without a test split: the same, an eighth for val, and the rest is test, as in the
    article.

    Whole groups are drawn, so that a part may be larger by the rest of one.
    """
    names = np.array(dataset.splits, dtype="<U5")
    has_test = bool((names == "test").any())
    pool = (names != "test") & (dataset.labels >= 0)
    names[pool] = ""
    groups = np.array(dataset.groups if dataset.groups is not None else [""] * len(names))
    units = np.array([group or f"\0{row}" for row, group in enumerate(groups)])
    rng = np.random.default_rng(0)
    for c in range(len(dataset.classes)):
        rows = np.flatnonzero(pool & (dataset.labels == c))
        train = PER_CLASS if len(rows) >= PER_CLASS * 1.1 else len(rows) * 2 // 3
        val = len(rows) if has_test else train + max(len(rows) // 8, 1)
        drawn = 0
        for unit in rng.permutation(np.unique(units[rows])):
            of_it = rows[units[rows] == unit]
            names[of_it] = "train" if drawn < train else "val" if drawn < val else "test"
            drawn += len(of_it)
    return names


# Its accuracies are in pictures only.
_MINDLINA_WORDS = (
    "Reported in words: in both tasks model 1 was worse than the CNN and model 2 better; of model 3, that changes of "
    "resolution are more noticeable far from 224."
)
_MINDLINA = (
    PublishedNumber("model 1: class token into a linear layer", "parameters", 1538, "pneumonia-heads", "linear on cls"),
    PublishedNumber("model 2: all tokens into two layers", "parameters", 443_906, "pneumonia-heads", "large on tokens"),
    PublishedNumber("model 3: tokens resized to 257", "parameters", 459_266, "pneumonia-heads", "large on tokens-257"),
    PublishedNumber("three-block CNN", "parameters", 348_050, "pneumonia-cnn",
                    remark="its layers are not published: ours is a stand-in"),
)  # fmt: skip
MINDLINA = Study(
    name="mindlina",
    title="A frozen ViT with a small head, or a CNN?",
    question="chest X-rays: is a frozen ViT with a small head as good as a CNN that was trained on them?",
    source="O. Mindlina, Vision Transformer for classification on medical images, January 2024",
    about=(
        "A frozen google/vit-base-patch16-224-in21k; model 1 is a linear layer on the class token, model 2 two layers "
        "on all 197 tokens, model 3 the same on tokens resized to 257. Adam, learning rate 0.001, balanced batches.",
        "Model 3's first layer acts on a fixed linear map of the tokens: it can express nothing that model 2 cannot.",
    ),
    images=(ImageSet("chest", "kaggle:paultimothymooney/chest-xray-pneumonia", ("bacteria", "normal", "virus"),
                     columns={"label": "kind"}),),
    questions=(
        Question("pneumonia", "Normal or pneumonia", "chest", splits=thousand_of_each, published=_MINDLINA,
                 options={"classes": ("normal", "pneumonia=bacteria,virus")}, reference="pneumonia-cnn",
                 note=_MINDLINA_WORDS),
        Question("kind", "Bacteria or virus", "chest", splits=thousand_of_each, options={"only": ("bacteria", "virus")},
                 reference="kind-cnn", note=_MINDLINA_WORDS),
    ),
    steps=(
        Extract("features", "chest", "vit-in21k", "cls,tokens,tokens-257"),
        *(
            step
            for name in ("pneumonia", "kind")
            for step in (
                Heads(f"{name}-heads", name, ("features",), "linear,large",
                      {"outputs": "cls,tokens,tokens-257", "optimizer": "adam", "lr": 1e-3, "schedule": "constant",
                       "standardize": "none"}),
                Network(f"{name}-cnn", name, "cnn-mindlina", {"lr": 1e-3}),
            )
        ),
    ),
    differs=(
        'No val set is mentioned and "best checkpoints" were kept: chosen on test, a number is too good. Here val '
        "chooses, and test is read once.",
        "The article names no data set; its counts (1,576 / 2,777 / 1,555) fit CoronaHack, where the source of an "
        "image is confounded with virus. On Kermany's children (about 1,583 / 2,780 / 1,493) this is another set: "
        "1,000 per class of train and the given test split.",
        "Its images were cropped to the chest in a way that is not named; here they are as they come.",
        "The CNN's layers are not published; ours is a stand-in of about its size.",
    ),
    cautions=(
        "Patients have several images: the given split of Kermany's set is by patient only as far as file names tell.",
    ),
)  # fmt: skip

# --- medical-mnist: a notebook on Medical MNIST (Kaggle gennadiimanzhos/medical-mnist-train-test-val)

_ON_300 = {"train_per_class": 50, "epochs": 20, "batch_size": 16, "lr": 2e-5, "weight_decay": 0.01, "select": "loss"}

MEDICAL_MNIST = Study(
    name="medical-mnist",
    title="Six kinds of scan: from scratch, or pretrained?",
    question="six kinds of scan: a CNN from scratch, ResNet-50, and a ViT fine-tuned on 300 images",
    source="notebook on Medical MNIST, Kaggle gennadiimanzhos/medical-mnist-train-test-val",
    about=(
        "A three-block CNN from scratch (Adam, plateau schedule, early stop), ResNet-50, and "
        "google/vit-base-patch16-224 fine-tuned on 300 images; ResNet-50 and the ViT also frozen.",
    ),
    images=(ImageSet("medical-mnist", "kaggle:gennadiimanzhos/medical-mnist-train-test-val",
                     ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")),),
    questions=(
        Question(
            "scans", "Which kind of scan", "medical-mnist", select="accuracy",
            published=(
                PublishedNumber("CNN from scratch", "accuracy", 0.9969, "cnn", split="val",
                          remark="after epoch 1; interrupted in epoch 2"),
                PublishedNumber("CNN from scratch", "parameters", 3_438_342, "cnn"),
                PublishedNumber("ViT, fine-tuned on 300 images", "accuracy", 1.0, "vit-tuned", split="val",
                          remark="50 val images"),
                PublishedNumber("ViT, fine-tuned on 300 images", "accuracy", 1.0, "vit-tuned",
                          remark="100 random test images"),
                PublishedNumber("ViT, all weights trained", "parameters", 85_803_270, "vit-tuned"),
            ),
        ),
    ),
    steps=(
        Extract("untrained-features", "medical-mnist", "vit-in1k", "cls", untrained=True),
        Heads("untrained-heads", "scans", ("untrained-features",), "logreg"),
        Extract("resnet-features", "medical-mnist", "resnet50", "gap"),
        Extract("vit-features", "medical-mnist", "vit-in1k", "cls"),
        Heads("frozen-heads", "scans", ("vit-features", "resnet-features"), "linear,logreg"),
        Network("cnn", "scans", "cnn-medical-mnist"),
        Network("resnet-tuned", "scans", "finetune:resnet50", _ON_300),
        Network("vit-tuned", "scans", "finetune:vit-in1k", _ON_300),
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
        "(the step untrained-heads) reached 99.5 % of 2,000 test images.",
    ),
)  # fmt: skip

# --- medmnist: a repository after doi 10.1038/s41598-024-63094-9 (Scientific Reports)

_MEDMNIST_TUNED = {"bloodmnist": 0.9790, "breastmnist": 0.9038, "pathmnist": 0.9462, "retinamnist": 0.570}  # accuracy
_MEDMNIST_NAMES = (*_MEDMNIST_TUNED, *(name for name in MEDMNIST if name not in _MEDMNIST_TUNED))
_TRAINER = {"schedule": "linear", "clip_norm": 1.0}  # what the Trainer of transformers does without being asked
_V2 = "MedMNIST v2 (Yang et al. 2023)"
_MEDMNIST_PUBLISHED: dict[str, tuple[PublishedNumber, ...]] = {
    "pneumoniamnist": (
        PublishedNumber("ResNet-18 at 28 px", "accuracy", 0.854, source=_V2),
        PublishedNumber("ResNet-18 at 28 px", "auroc", 0.944, source=_V2),
    ),
    **{
        name: (PublishedNumber("ViT, fine-tuned", "accuracy", value, f"{name}-tuned"),)
        for name, value in _MEDMNIST_TUNED.items()
    },
}
_MEDMNIST_TITLES = {  # as its publishers call the sets and what is on the images
    "pathmnist": "PathMNIST (colon pathology)", "chestmnist": "ChestMNIST (chest X-ray)",
    "dermamnist": "DermaMNIST (dermatoscope)", "octmnist": "OCTMNIST (retinal OCT)",
    "pneumoniamnist": "PneumoniaMNIST (chest X-ray)", "retinamnist": "RetinaMNIST (fundus camera)",
    "breastmnist": "BreastMNIST (breast ultrasound)", "bloodmnist": "BloodMNIST (blood cells)",
    "tissuemnist": "TissueMNIST (kidney cortex)", "organamnist": "OrganAMNIST (abdominal CT, axial)",
    "organcmnist": "OrganCMNIST (abdominal CT, coronal)", "organsmnist": "OrganSMNIST (abdominal CT, sagittal)",
}  # fmt: skip
_MEDMNIST_QUESTIONS = tuple(
    Question(name, _MEDMNIST_TITLES[name], name,
             select="auroc" if MEDMNIST[name].task == "multilabel" else "accuracy",
             published=_MEDMNIST_PUBLISHED.get(name, ()))
    for name in _MEDMNIST_NAMES
)  # fmt: skip


def _medmnist_steps(question: Question) -> tuple[Step, ...]:
    name, tuned = question.name, {"epochs": 20, "select": question.select, **_TRAINER}
    return (
        Extract(f"{name}-features", name, "vit-in1k", "cls"),
        Heads(f"{name}-frozen", name, (f"{name}-features",), "linear,knn"),
        Network(f"{name}-tuned", name, "finetune:vit-in1k", tuned),
        Network(f"{name}-rescaled", name, "finetune:vit-in1k", {**tuned, "rlrr": True}),
        ExplainStep(f"{name}-look", name, (f"{name}-tuned", f"{name}-rescaled"), images=2),
    )


MEDMNIST_STUDY = Study(
    name="medmnist",
    title="MedMNIST v2: fine-tuned, lightly adapted, or frozen?",
    question="blood, breast, colon pathology, retina (MedMNIST v2): a fine-tuned ViT, and frozen features beside it",
    source="repository after doi 10.1038/s41598-024-63094-9",
    about=(
        "google/vit-base-patch16-224 with its own processor: fine-tuned whole, adapted by low-rank rescaling (RLRR, "
        "Dong et al., CVPR 2024), and frozen with a linear probe and k-NN (after Doerrich et al. 2025, MedMNIST+).",
    ),
    images=tuple(
        ImageSet(name, f"medmnist:{name}", MEDMNIST[name].classes, MEDMNIST[name].task,
                 (f"{name}.npz", f"{name}_[0-9]*.npz"), default=name in _MEDMNIST_TUNED)
        for name in _MEDMNIST_NAMES
    ),
    questions=_MEDMNIST_QUESTIONS,
    steps=tuple(step for question in _MEDMNIST_QUESTIONS for step in _medmnist_steps(question)),
    differs=(
        "How its epoch and learning rate were chosen is not known here; in this study val chooses, and test is read "
        "once.",
        "Images stand in two splits of some sets (8 of PneumoniaMNIST in train and val); here such images are left out "
        "of train.",
        "RetinaMNIST's five grades are in order: its report here also has quadratic kappa and the mean absolute error.",
    ),
)  # fmt: skip

# --- pneumonia: a course project on Kaggle's paultimothymooney/chest-xray-pneumonia

_BACKBONES = {"vit": ("timm:vit_base_patch16_224", "cls"), "resnet50": ("resnet50", "gap"),
             "densenet121": ("densenet121", "gap")}  # fmt: skip
_TUNED = {"epochs": 10, "select": "accuracy"}
_AUGMENT = "flip,rotate10,shift0.1"
_OPTIMIZERS = {"sgd": 1e-3, "adam": 2e-5}  # beside AdamW, with which all are tuned; each with a usual learning rate

PNEUMONIA = Study(
    name="pneumonia",
    title="ViT, ResNet-50 or DenseNet-121 on chest X-rays?",
    question="pneumonia on chest X-rays: ViT, ResNet-50 or DenseNet-121; how much data, augmentation and optimiser "
    "matter",
    source="course project on Kaggle paultimothymooney/chest-xray-pneumonia",
    about=(
        "timm's vit_base_patch16_224, ResNet-50 and DenseNet-121, fine-tuned and frozen. Asked: which is best and how "
        "long it takes; how few images do; what augmentation and the optimiser change; where the networks look.",
    ),
    images=(ImageSet("chest", "kaggle:paultimothymooney/chest-xray-pneumonia", ("NORMAL", "PNEUMONIA")),),
    questions=(Question("pneumonia", "Normal or pneumonia", "chest", select="accuracy"),),
    steps=(
        *(Extract(f"{name}-features", "chest", *backbone) for name, backbone in _BACKBONES.items()),
        Heads("fractions", "pneumonia", tuple(f"{name}-features" for name in _BACKBONES), "linear",
              {"fractions": "0.05,0.1,0.25,0.5,1"}),
        Heads("search", "pneumonia", tuple(f"{name}-features" for name in _BACKBONES), "linear",
              {"search": "optuna", "trials": 15, "lr": "1e-5..1e-1", "weight_decay": "1e-6..1e-1",
               "batch_size": "16..128:+16"}),
        *(Network(f"{name}-tuned", "pneumonia", f"finetune:{each}", _TUNED) for name, (each, _) in _BACKBONES.items()),
        Network("resnet50-augmented", "pneumonia", "finetune:resnet50", {**_TUNED, "augment": _AUGMENT}),
        *(
            Network(f"resnet50-{name}", "pneumonia", "finetune:resnet50", {**_TUNED, "optimizer": name, "lr": lr})
            for name, lr in _OPTIMIZERS.items()
        ),
        ExplainStep("look", "pneumonia", tuple(f"{name}-tuned" for name in _BACKBONES), "fractions", "vit-features"),
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

# --- cifar-tinyimagenet: a notebook; a small ViT against a small CNN

# per set: what it is called, and what the notebook augmented with, the batch, the side in pixels
_SMALL_SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10": ("CIFAR-10", {"augment": "flip,rotate10,shift0.1", "batch_size": 128, "image_size": 32}),
    "cifar100": ("CIFAR-100", {"augment": "flip,rotate10,shift0.1", "batch_size": 128, "image_size": 32}),
    "tinyimagenet": ("Tiny ImageNet", {"augment": "flip,rotate15,shift0.15", "batch_size": 64, "image_size": 64}),
}
_SMALL_NAMES = {"vit": "small ViT", "cnn": "small residual CNN"}
_SMALL_MEASURES = {"accuracy": "", "train_seconds": "one GPU", "ms_per_image": "one GPU", "parameters": ""}
_SMALL_REPORTED = {  # the measures; inference includes loading
    ("cifar10", "vit"): (0.6292, 443, 0.347, 1_205_642), ("cifar10", "cnn"): (0.8004, 323, 0.286, 175_258),
    ("cifar100", "vit"): (0.3677, 439, 0.349, 1_217_252), ("cifar100", "cnn"): (0.4287, 326, 0.246, 181_108),
    ("tinyimagenet", "vit"): (0.3115, 884, 0.555, 1_248_584), ("tinyimagenet", "cnn"): (0.2985, 839, 0.492, 187_608),
}  # fmt: skip


def _small_published(name: str) -> tuple[PublishedNumber, ...]:
    return tuple(
        PublishedNumber(title, measure, value, f"{name}-{arch}", remark=_SMALL_MEASURES[measure])
        for arch, title in _SMALL_NAMES.items()
        for measure, value in zip(_SMALL_MEASURES, _SMALL_REPORTED[name, arch], strict=True)
    )


def val_as_test(dataset: Dataset) -> np.ndarray | None:
    """[N] split names of images that have train and val and nothing else: the published val is test, as in the
    notebook, and 15 % of train, drawn from every class alike, are val."""
    if set(dataset.splits) != {"train", "val"}:
        return None
    names = np.where(np.array(dataset.splits) == "val", "test", "train").astype("<U5")
    rows = np.flatnonzero((names == "train") & (dataset.labels >= 0))
    drawn = stratified_parts(dataset.labels[rows], np.arange(len(rows)), np.array([1 - SHARE, SHARE]), 0) == 1
    names[rows[drawn]] = "val"
    return names


CIFAR_TINYIMAGENET = Study(
    name="cifar-tinyimagenet",
    title="Small images: a ViT or a CNN, from scratch?",
    question="CIFAR-10/100 and Tiny ImageNet: a small ViT against a small CNN, both from scratch",
    source="notebook on CIFAR-10, CIFAR-100 and Tiny ImageNet",
    about=(
        "A ViT of six blocks and width 128 and a CNN of six residual blocks, Adam 0.001, 10 epochs, flips, rotations "
        "and shifts. Nothing is pretrained.",
    ),
    images=(
        ImageSet("cifar10", "torchvision:CIFAR10", tuple(f"c{k}" for k in range(10)), aliases=("cifar-10-batches-py",),
                 local="torchvision:CIFAR10@{folder}"),
        ImageSet("cifar100", "torchvision:CIFAR100", tuple(f"c{k}" for k in range(8)), aliases=("cifar-100-python",),
                 local="torchvision:CIFAR100@{folder}"),
        ImageSet("tinyimagenet", "kaggle:akash2sharma/tiny-imagenet", tuple(f"n{k}" for k in range(8)),
                 aliases=("tiny-imagenet-200",)),
    ),
    questions=tuple(
        Question(name, title, name, select="accuracy", published=_small_published(name), reference=f"{name}-cnn",
                 splits=val_as_test)
        for name, (title, _) in _SMALL_SETS.items()
    ),
    steps=tuple(
        Network(f"{name}-{arch}", name, f"{arch}-cifar", {**options, "epochs": 10, "lr": 1e-3})
        for name, (_, options) in _SMALL_SETS.items()
        for arch in _SMALL_NAMES
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

STUDIES: dict[str, Study] = {
    study.name: study for study in (MINDLINA, MEDICAL_MNIST, MEDMNIST_STUDY, PNEUMONIA, CIFAR_TINYIMAGENET)
}


def load_study(name: str) -> Study:
    if name not in STUDIES:
        raise UnknownStudy(f'no study is called "{name}".{nearest(name, STUDIES)} There are {", ".join(STUDIES)}.')
    return STUDIES[name]
