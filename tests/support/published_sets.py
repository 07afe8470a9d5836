"""Small copies of published data sets in their true formats, made by the tests."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

from support.pictures import picture, save_picture

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, *shape], no two images alike."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def medmnist_file(folder: Path, stem: str, labels: np.ndarray, size: int = 28, channels: int = 1) -> Path:
    """An archive as Zenodo has it: labels uint8 [n, 1] or [n, L], here the same in each split."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    parts = {}
    for number, split in enumerate(("train", "val", "test")):
        parts[f"{split}_images"] = noise(len(labels), *shape, seed=number)
        parts[f"{split}_labels"] = labels.reshape(len(labels), -1).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{stem}.npz", **parts)
    return folder / f"{stem}.npz"


def as_python_2(value: object) -> bytes:
    """A pickle with the instructions that Python 2 and its numpy wrote, as they stand in the published files."""

    def text(word: bytes) -> bytes:
        return b"U" + bytes([len(word)]) + word if len(word) < 256 else b"T" + struct.pack("<I", len(word)) + word

    def put(value: object) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(put(key) + put(item) for key, item in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(put, value)) + b"e"
        if isinstance(value, np.ndarray):
            number = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
            number += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
            shape = b"".join(put(size) for size in value.shape) + b"\x86"
            return empty + b"(K\x01" + shape + number + b"\x89" + text(value.tobytes()) + b"tb"
        return b"J" + struct.pack("<i", value) if isinstance(value, int) else text(str(value).encode())

    return b"\x80\x02" + put(value) + b"."


def pickled(value: object, protocol: int) -> bytes:
    return pickle.dumps(value, protocol) if protocol else as_python_2(value)


def cifar10(root: Path, rows: int = 10, protocol: int = 0) -> np.ndarray:
    """cifar-10-batches-py, each of its six batches with ``rows`` images; all pixels uint8 [6·rows, 32, 32, 3].

    ``protocol``: of Python 3's pickle; 0: as Python 2 wrote them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    planes = noise(6 * rows, 3072)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        part = slice(number * rows, (number + 1) * rows)
        batch = {"batch_label": "", "labels": [row % 10 for row in range(rows)], "data": planes[part]}
        (folder / name).write_bytes(pickled(batch, protocol))
    (folder / "batches.meta").write_bytes(pickled({"label_names": CIFAR10, "num_vis": 3072}, protocol))
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar100(root: Path, rows: int = 100) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for seed, name in enumerate(("train", "test")):
        fine = [row % 100 for row in range(rows)]
        coarse = [label // 5 for label in fine]
        batch = {"fine_labels": fine, "coarse_labels": coarse, "data": noise(rows, 3072, seed=seed)}
        (folder / name).write_bytes(as_python_2(batch))
    names = {
        f"{word}_label_names": [f"{word} {n}" for n in range(count)] for word, count in (("fine", 100), ("coarse", 20))
    }
    (folder / "meta").write_bytes(as_python_2(names))


def mnist(root: Path) -> np.ndarray:
    """The idx files (LeCun's format: magic number, sizes, bytes); the training images uint8 [20, 28, 28]."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = {"train": noise(20, 28, 28), "t10k": noise(10, 28, 28, seed=1)}
    for split, images in pixels.items():
        labels = np.arange(len(images), dtype=np.uint8) % 10
        head, tail = struct.pack(">IIII", 2051, *images.shape), struct.pack(">II", 2049, len(labels))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(tail + labels.tobytes())
    return pixels["train"]


def eurosat(root: Path, each: int = 3, classes: tuple[str, ...] = ("AnnualCrop", "Forest", "River")) -> None:
    for place, name in enumerate(classes):
        for number in range(1, each + 1):
            save_picture(root / "eurosat/2750" / name / f"{name}_{number}.jpg", 10 * place + number)


def flowers102(root: Path, count: int = 12) -> None:
    """Pictures numbered from 1; imagelabels.mat and setid.mat as VGG wrote them."""
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number in range(1, count + 1):
        save_picture(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(count, dtype=np.uint8)[None] % 102 + 1})
    parts = np.array_split(np.arange(1, count + 1, dtype=np.uint16), 3)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), (part[None] for part in parts), strict=True)))


WNIDS = {"n01443537": "goldfish, Carassius auratus", "n01629819": "European fire salamander", "n02124075": "crane",
         "n03126707": "crane, the machine"}  # fmt: skip


def tiny_imagenet(root: Path, train: int = 3, val: int = 8, test: int = 2) -> Path:
    (root / "val").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    words = [f"{wnid}\t{names}" for wnid, names in WNIDS.items()] + ["n00001740\tentity"]
    (root / "words.txt").write_text("\n".join(words) + "\n")
    for place, wnid in enumerate(WNIDS):
        for number in range(train):
            save_picture(root / f"train/{wnid}/images/{wnid}_{number}.JPEG", 100 * place + number, width=64, height=64)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    lines = []
    for number in range(val):
        save_picture(root / f"val/images/val_{number}.JPEG", 1000 + number, width=64, height=64)
        lines.append(f"val_{number}.JPEG\t{list(WNIDS)[number % len(WNIDS)]}\t0\t32\t44\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    for number in range(test):
        save_picture(root / f"test/images/test_{number}.JPEG", 2000 + number, width=64, height=64)
    return root


CHEST = [
    "train/NORMAL/IM-0115-0001.jpeg", "train/NORMAL/IM-0115-0002.jpeg", "train/NORMAL/NORMAL2-IM-0592-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg", "train/PNEUMONIA/person1_bacteria_2.jpeg",
    "train/PNEUMONIA/person1_virus_6.jpeg", "train/PNEUMONIA/person2_virus_9.jpeg",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg", "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    "test/NORMAL/IM-0001-0001.jpeg", "test/PNEUMONIA/person1_virus_12.jpeg",
    "test/PNEUMONIA/person80_bacteria_389.jpeg",
]  # fmt: skip


def chest_xray(root: Path, names: list[str] = CHEST) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, mode="L").save(path)
    return root


def kaggle_copy(cache: Path, handle: str, version: int = 1, complete: bool = True) -> Path:
    """The folder in which kagglehub keeps a version, marked as it marks those that are whole."""
    folder = cache / "datasets" / handle / "versions" / str(version)
    folder.mkdir(parents=True)
    if complete:
        (cache / "datasets" / handle / f"{version}.complete").touch()
    return folder
