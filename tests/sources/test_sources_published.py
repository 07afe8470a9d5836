"""MedMNIST and torchvision's sets: small copies in the true formats, read by the real loaders, and nothing fetched."""

from __future__ import annotations

import inspect
import io
import pickle
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image
from support.published_sets import CIFAR10, cifar10, cifar100, eurosat, flowers102, medmnist_file, mnist, noise
from support.small_sets import refused, reopened

from featurecache.errors import NotFetched, UnreadableImage
from featurecache.sources import SOURCES, fetching, open_source
from featurecache.sources.medmnist import MEDMNIST
from featurecache.sources.torchvision_catalogue import SETS
from featurecache.sources.torchvision_datasets import NAMES

pytestmark = pytest.mark.usefixtures("offline")


# -- MedMNIST


def test_a_file_in_the_packages_own_folder_is_used_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    medmnist_file(tmp_path / "home/.medmnist", "bloodmnist", np.arange(8), channels=3)
    data = open_source("medmnist:BloodMNIST")
    assert (data.name, data.classes, data.task) == ("bloodmnist", list(MEDMNIST["bloodmnist"].classes), "multiclass")
    assert data.ids[8] == "bloodmnist.npz:val:0"
    assert data.read(0).shape == (28, 28, 3)
    reopened(data)


@pytest.mark.parametrize("place", ["given", "variable"])
def test_a_size_and_a_folder_of_ones_own(tmp_path, monkeypatch, place):
    medmnist_file(tmp_path / "sets", "retinamnist_64", np.arange(5), size=64)
    monkeypatch.chdir(tmp_path)
    if place == "variable":
        monkeypatch.setenv(fetching.VARIABLE, "sets")
    data = open_source("medmnist:retinamnist@64" + ("@./sets" if place == "given" else ""))
    assert (data.name, data.task, data.read(0).shape) == ("retinamnist_64", "ordinal", (64, 64))
    monkeypatch.setenv(fetching.VARIABLE, str(tmp_path / "sets"))
    monkeypatch.chdir("/")
    reopened(data)


@pytest.mark.parametrize("name", MEDMNIST)
def test_the_package_says_the_same_of_every_2d_set(name):
    info = pytest.importorskip("medmnist").INFO[name]
    found = MEDMNIST[name]
    assert [text.lower() for text in found.classes] == [text.lower() for text in info["label"].values()]
    kinds = {"multilabel": "multi-label", "ordinal": "ordinal", "binary": "binary", "multiclass": "multi-class"}
    assert kinds[found.task] in info["task"]
    assert all(f"url{size}" in info and f"MD5{size}" in info for size in ("", "_64", "_128", "_224"))


def test_a_set_that_is_nowhere_says_where_it_was_looked_for_and_what_fetches_it(tmp_path, monkeypatch):
    pytest.importorskip("medmnist")
    message = refused("medmnist:breastmnist@128", "breastmnist_128.npz", str(tmp_path / "home/.medmnist"),
                      "service not known", "open_source('medmnist:breastmnist@128')", error=NotFetched)  # fmt: skip
    assert message.count(". ") <= 3
    assert not list((tmp_path / "home/.medmnist").iterdir())
    for info, words in (({}, "does not know breastmnist"), ({"breastmnist": {"url": "-"}}, "at 28 px only")):
        monkeypatch.setattr("medmnist.info.INFO", info)
        refused("medmnist:breastmnist@128", f"the installed medmnist {'has breastmnist ' * bool(info)}{words}")
    monkeypatch.setitem(sys.modules, "medmnist.info", None)
    refused("medmnist:bloodmnist", "pip install 'featurecache[medmnist]'")


def test_what_is_fetched_has_the_right_bytes_or_no_name(tmp_path, monkeypatch):
    info = pytest.importorskip("medmnist").INFO["octmnist"]
    made = medmnist_file(tmp_path / "server", "octmnist", np.arange(4))
    asked = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, md5))
        (Path(root) / filename).write_bytes(made.read_bytes()[: 1000 if len(asked) == 1 else None])
        if len(asked) == 1:
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    refused(f"medmnist:octmnist@64@{tmp_path}/sets", "corrupted", error=NotFetched)
    assert not list((tmp_path / "sets").iterdir())
    data = open_source(f"medmnist:octmnist@64@{tmp_path}/sets")
    assert asked == [(info["url_64"], info["MD5_64"])] * 2
    assert len(data) == 12


# -- CIFAR


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_has_the_pixels_and_labels_of_torchvisions_own_loader(tmp_path, monkeypatch, protocol):
    pixels = cifar10(tmp_path, protocol=protocol)
    data = open_source(f"torchvision:CIFAR10@{tmp_path}")
    assert (len(data), data.classes, Counter(data.splits)) == (60, CIFAR10, {"train": 50, "test": 10})
    assert data.ids[50] == "CIFAR10:test:0"
    np.testing.assert_array_equal(np.stack([data.read(row) for row in range(60)]), pixels)
    reopened(data)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = tv.CIFAR10(str(tmp_path), train=False)
    np.testing.assert_array_equal(np.stack([data.read(row) for row in range(50, 60)]), theirs.data)
    assert (data.labels[50:].tolist(), data.classes) == (theirs.targets, theirs.classes)


def test_cifar_100_fine_and_coarse_and_a_folder_given_directly(tmp_path):
    cifar100(tmp_path)
    fine = open_source(f"torchvision:cifar100@{tmp_path}")
    coarse = open_source(f"torchvision:CIFAR100:coarse@{tmp_path}")
    assert (len(fine.classes), len(coarse.classes), coarse.name) == (100, 20, "cifar100-coarse")
    assert fine.labels[42] // 5 == coarse.labels[42]
    assert open_source(f"torchvision:CIFAR100@{tmp_path}/cifar-100-python").ids == fine.ids


class _Evil:
    ran = False

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return setattr, (_Evil, "ran", True)


@pytest.mark.parametrize("where", ["test_batch", "batches.meta"])
def test_a_batch_that_would_run_code_is_refused_and_runs_nothing(tmp_path, where):
    cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / where
    file.write_bytes(pickle.dumps({"label_names": CIFAR10, "labels": [], "data": _Evil()}, 2))
    refused(f"torchvision:CIFAR10@{tmp_path}", "asks for", "setattr", where)
    assert not _Evil.ran


@pytest.mark.parametrize(
    ("file", "record", "words"),
    [
        ("test_batch", {"labels": [0], "data": noise(1, 3072).astype(np.float32)}, "no batch of CIFAR"),
        ("test_batch", {"labels": [0, 1], "data": noise(1, 3072)}, "no batch of CIFAR"),
        ("test_batch", {"labels": ["a"], "data": noise(1, 3072)}, "no batch of CIFAR"),
        ("test_batch", {"labels": [0, 1], "data": np.asfortranarray(noise(2, 3072))}, "no batch of CIFAR"),
        ("test_batch", {"labels": [0]}, "no batch of CIFAR"),
        ("test_batch", [1, 2], "it holds no dictionary"),
        ("test_batch", {"labels": [10], "data": noise(1, 3072)}, "has the label 10 and 10 names of classes"),
        ("batches.meta", {"label_names": "airplane"}, "has no list of names 'label_names'"),
    ],
)
def test_batches_that_are_none(tmp_path, file, record, words):
    cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(record, 2))
    refused(f"torchvision:CIFAR10@{tmp_path}", words)


def test_a_batch_cut_short_and_one_that_is_missing(tmp_path):
    cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py/data_batch_3"
    file.write_bytes(file.read_bytes()[:-500])
    refused(f"torchvision:CIFAR10@{tmp_path}", "data_batch_3", "get the archive again")
    file.unlink()
    refused(f"torchvision:CIFAR10@{tmp_path}", "data_batch_3", "No such file")


# -- torchvision


def test_every_labelled_set_is_one_of_torchvisions_and_takes_what_it_is_asked_with():
    assert all(hasattr(tv, name) for name in NAMES)
    for name, known in SETS.items():
        takes = inspect.signature(getattr(tv, name).__init__).parameters
        asked = {key for given in (*known.splits.values(), *known.variants.values()) for key in given}
        assert asked <= takes.keys() or "kwargs" in takes, name
        assert known.fetches == ("download" in takes or "kwargs" in takes) or name in ("StanfordCars", "LFWPeople",
                                                                                       "ImageNet"), name  # fmt: skip


def test_mnist_by_the_real_loader(tmp_path):
    pixels = mnist(tmp_path)
    data = open_source(f"torchvision:MNIST@{tmp_path}")
    assert (data.ids[20], data.classes[3], Counter(data.splits)) == (
        "MNIST:test:0", "3 - three", {"train": 20, "test": 10},
    )  # fmt: skip
    np.testing.assert_array_equal(data.read(7), pixels[7])
    assert data.labels.tolist() == [*range(10)] * 3
    reopened(data)


def test_eurosat_is_read_from_its_files_without_decoding(tmp_path):
    eurosat(tmp_path)
    data = open_source(f"torchvision:EuroSAT@{tmp_path}")
    assert data.ids[0] == "eurosat/2750/AnnualCrop/AnnualCrop_1.jpg"
    assert (data.classes, set(data.splits)) == (["AnnualCrop", "Forest", "River"], {""})
    assert data.read(4) == (tmp_path / data.ids[4]).read_bytes()
    assert data.path(4) == str(tmp_path / data.ids[4])
    reopened(data)


def test_flowers_by_its_matlab_files_and_a_picture_that_is_gone_is_named(tmp_path, monkeypatch):
    flowers102(tmp_path)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    data = open_source(f"torchvision:Flowers102@{tmp_path}")
    assert Counter(data.splits) == {"train": 4, "val": 4, "test": 4}
    assert (data.classes[0], len(data.classes), data.labels.tolist()) == ("pink primrose", 102, [*range(12)])
    theirs = tv.Flowers102(str(tmp_path), "val")
    picture = Image.open(io.BytesIO(data.read(5))).convert("RGB")
    assert (np.asarray(theirs[1][0]) == np.asarray(picture)).all() and theirs[1][1] == data.labels[5]
    (tmp_path / data.ids[0]).unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        data.read(0)


def test_letters_of_emnist_begin_with_a(tmp_path):
    (tmp_path / "EMNIST/raw").mkdir(parents=True)
    mnist(tmp_path)
    for file in (tmp_path / "MNIST/raw").iterdir():
        data = bytearray(file.read_bytes())
        if "labels" in file.name:
            data[8:] = bytes(1 + value for value in data[8:])
        split, rest = file.name.replace("t10k", "test").split("-", 1)
        for word in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist"):
            (tmp_path / f"EMNIST/raw/emnist-{word}-{split}-{rest}").write_bytes(data)
    data = open_source(f"torchvision:EMNIST:letters@{tmp_path}")
    assert (data.classes[0], len(data.classes), data.labels.min(), data.name) == ("a", 26, 0, "emnist-letters")
    refused(f"torchvision:EMNIST@{tmp_path}", "say which EMNIST", "torchvision:EMNIST:letters")


def test_patchcamelyon_is_read_row_by_row_out_of_hdf5(tmp_path):
    pixels = noise(4, 96, 96, 3)
    (tmp_path / "pcam").mkdir()
    for split in ("train", "valid", "test"):
        for kind, key, array in (("x", "x", pixels), ("y", "y", np.array([0, 1, 1, 0], np.uint8).reshape(4, 1, 1, 1))):
            with h5py.File(tmp_path / f"pcam/camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[key] = array
    data = open_source(f"torchvision:PCAM@{tmp_path}")
    assert data.labels.tolist() == [0, 1, 1, 0] * 3
    np.testing.assert_array_equal(data.read(6), pixels[2])
    assert len(data.images.files) == 3  # type: ignore[attr-defined]


def test_celeba_has_forty_attributes_and_persons_as_groups(tmp_path, monkeypatch):
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, 8)]
    words = [f"attribute_{number}" for number in range(40)]
    attributes = np.where(noise(7, 40) > 127, 1, -1)
    texts = [" ".join(map(str, row)) for row in attributes]
    rows = {
        "list_attr_celeba.txt": ["7", " ".join(words) + " "] + [f"{n}  {a}" for n, a in zip(names, texts, strict=True)],
        "identity_CelebA.txt": [f"{name} {person}" for name, person in zip(names, [7, 7, 8, 9, 9, 7, 8], strict=True)],
        "list_bbox_celeba.txt": ["7", "image_id x_1 y_1 width height"] + [f"{name} 1 2 3 4" for name in names],
        "list_landmarks_align_celeba.txt": ["7", "a b"] + [f"{name} 1 2" for name in names],
        "list_eval_partition.txt": [f"{name} {split}" for name, split in zip(names, [0, 0, 0, 1, 1, 2, 2], strict=True)]
    }  # fmt: skip
    for file, lines in rows.items():
        (folder / file).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda *_: True)
    data = open_source(f"torchvision:CelebA@{tmp_path}")
    assert (data.task, data.classes, data.groups) == ("multilabel", words, ["7", "7", "8", "9", "9", "7", "8"])
    np.testing.assert_array_equal(data.labels, (attributes + 1) / 2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("medmnist:blodmnist", ["no 2D set", "Near: bloodmnist"]),
        ("medmnist:bloodmnist@32", ['"32" is no size', "28, 64, 128, 224"]),
        ("medmnist:organmnist3d", ["no 2D set"]),
        ("torchvision:CIFR10", ["no labelled set called", "Near: CIFAR10"]),
        ("torchvision:Kinetics", ["is no set of labelled images"]),
        ("torchvision:Imagenette:640px", ['has no "640px"', "full, 320px, 160px"]),
        ("torchvision:StanfordCars", ["cannot download it", "--data torchvision:StanfordCars@FOLDER"]),
    ],
)
def test_names_that_medmnist_and_torchvision_have_not(word, said):
    refused(word, *said)


def test_a_set_that_is_not_here_fails_soon_and_leaves_nothing_behind(tmp_path):
    refused(f"torchvision:EuroSAT@{tmp_path}/sets", "service not known", f"@{tmp_path}/sets')", error=NotFetched)
    assert not list((tmp_path / "sets").iterdir())


def test_half_unpacked_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    """torchvision takes a folder that is there for all of it."""

    def download(url: str, download_root: str, **_: object) -> None:
        eurosat(Path(download_root).parent, each=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.eurosat.download_and_extract_archive", download)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"torchvision:EuroSAT@{tmp_path}/sets")
    assert not list((tmp_path / "sets").iterdir())
    monkeypatch.setattr(
        "torchvision.datasets.eurosat.download_and_extract_archive",
        lambda url, download_root, **_: eurosat(Path(download_root).parent),
    )
    assert len(open_source(f"torchvision:EuroSAT@{tmp_path}/sets")) == 9


def test_every_source_that_is_named_can_be_fetched():
    assert all(bool(source.prefix) == bool(source.fetch) == (source.fits is None) or kind in ("hf", "digits")
               for kind, source in SOURCES.items())  # fmt: skip
