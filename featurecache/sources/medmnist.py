"""MedMNIST: ``medmnist:<name>``, the twelve 2D sets as their publishers have them, and their files by themselves.

The archive is read by `featurecache.sources.npz`; a file that bears the name of a MedMNIST set gets the published class
names and task.

The file of ``medmnist:<name>[@28|64|128|224][@folder]`` is looked for in that folder, in ``$FEATURECACHE_DATA`` and in
the package's own ``~/.medmnist``; only where it is in none of them does the package (extra ``medmnist``) say where it
is to be had, and its MD5.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from featurecache.errors import SourceError, UnknownSourceName, nearest
from featurecache.formatting import shell_word
from featurecache.sources.base import Dataset, package
from featurecache.sources.fetching import SourceOptions, beside, data_folder, not_here
from featurecache.sources.npz import open_archive

SIZES = ("28", "64", "128", "224")  # pixels; a file without a number in its name has 28
FORM = "medmnist:<name>[@28|64|128|224][@folder]"


# -- the published sets


def open_medmnist(words: str, task: str | None) -> Dataset:
    """The set of ``words``, from a file on this machine. Raises NotFetched where there is none."""
    options, stem, folders = _parse(words)
    for folder in folders:
        if (file := folder / f"{stem}.npz").is_file():
            return replace(open_npz(str(file), task), name=stem, source={"data": str(options)})
    where = " and ".join(map(str, folders))
    raise not_here(f"{stem}.npz", where, options, f"--data {shell_word(replace(options, folder='FOLDER'))}")


def fetch_medmnist(words: str) -> None:
    """Download the file of ``words`` from where the package says. Raises SourceError."""
    options, stem, folders = _parse(words)
    info = package("medmnist.info", "medmnist", f"to fetch {options.name}").INFO.get(options.name, {})
    size = stem.removeprefix(options.name)
    if f"url{size}" not in info:
        lacks = f"has {options.name} at 28 px only" if info else f"does not know {options.name}"
        raise SourceError(f"the installed medmnist {lacks}: pip install --upgrade medmnist (3 or newer).")
    from torchvision.datasets.utils import download_url

    with beside(folders[0], stem) as draft:
        download_url(info[f"url{size}"], str(draft), f"{stem}.npz", info[f"MD5{size}"])


def _parse(words: str) -> tuple[SourceOptions, str, list[Path]]:
    """The set, the name of its file, and where that may lie; it is fetched into the first."""
    options = SourceOptions.parse("medmnist", words)
    name, size = options.name.lower(), options.version or "28"
    if name not in MEDMNIST or options.variant:
        raise UnknownSourceName(
            f'MedMNIST has no 2D set called "{name}".{nearest(name, MEDMNIST)} It has {", ".join(sorted(MEDMNIST))}.'
        )
    if size not in SIZES:
        raise SourceError(f'medmnist:{words}: "{size}" is no size; it is {", ".join(SIZES)} ({FORM}).')
    own = Path.home() / ".medmnist"
    folders = [Path(options.folder)] if options.folder else list(dict.fromkeys([data_folder(own), own]))
    return replace(options, name=name, version=size), name if size == "28" else f"{name}_{size}", folders


def open_npz(data: str, task: str | None, **how: str) -> Dataset:
    """The dataset in the archive ``data`` (an absolute path); one named as a MedMNIST set has its classes and task.
    ``how`` labels that are names are read: see `LabelOptions`."""
    stem = os.path.basename(data).rsplit(".", 1)[0]
    published = MEDMNIST.get(re.sub(r"_(28|64|128|224)$", "", stem.lower()))
    if published is None:
        return open_archive(data, task, **how)
    return open_archive(data, task or published.task, published.classes, **how)


# -- what the publishers call the classes of the twelve sets, and what kind of task each is: medmnist/info.py of
# MedMNIST/MedMNIST (version 2.1.0), where the index of a name is its label; Yang et al. 2023, "MedMNIST v2", Scientific
# Data 10:41. RetinaMNIST's five grades of diabetic retinopathy have numbers for names.


class MedMnistSet(NamedTuple):
    """Task and class names of one set; index = label."""

    task: str
    classes: tuple[str, ...]


_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip
MEDMNIST: dict[str, MedMnistSet] = {
    "pathmnist": MedMnistSet("multiclass", (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium")),
    "chestmnist": MedMnistSet("multilabel", (
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia")),
    "dermamnist": MedMnistSet("multiclass", (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions")),
    "octmnist": MedMnistSet("multiclass", (
        "choroidal neovascularization", "diabetic macular edema", "drusen", "normal")),
    "pneumoniamnist": MedMnistSet("binary", ("normal", "pneumonia")),
    "retinamnist": MedMnistSet("ordinal", ("0", "1", "2", "3", "4")),
    "breastmnist": MedMnistSet("binary", ("malignant", "normal, benign")),
    "bloodmnist": MedMnistSet("multiclass", (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
        "platelet")),
    "tissuemnist": MedMnistSet("multiclass", (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb")),
    **{name: MedMnistSet("multiclass", _ORGANS) for name in ("organamnist", "organcmnist", "organsmnist")},
}  # fmt: skip
