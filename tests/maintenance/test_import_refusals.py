"""Import: what a file of somebody else may hold that is not taken, and that nothing of it is run or followed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.foreign import TOKENS, X, Y, h5, npy, refused

from featurecache.errors import BadOption, SourceError, UnsafeFile
from featurecache.maintenance import import_features


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("value", "why"), [(np.nan, "is not finite"), (-np.inf, "is not finite"), (1e300, "does not fit float32")]
)
def test_a_value_that_cannot_be_kept_names_its_row(monkeypatch, value, why):
    monkeypatch.setattr(import_features, "BLOCK", 7 * 48)
    bad = X.astype(np.float64)
    bad[23, 2] = value
    refused(f"row 23 of feats in feats.npy has a value that {why}", npy(bad))
    assert not Path("cache").exists()


CLAIMS = {"fingerprint": "0" * 32, "classes": '["a", "b"]', "task": "binary"}  # of one of our exports


@pytest.mark.parametrize(
    ("arrays", "attributes", "said"),
    [
        ({"features": X[:0]}, {}, "feats.h5 has no rows of features, or not as many of each"),
        ({"cls": X, "tokens": TOKENS}, CLAIMS, "not as many of each"),
        ({"cls": X}, CLAIMS | {"classes": "7"}, "feats.h5: its classes are no list of names"),
        ({"cls": X, "meta__age": X}, CLAIMS, r"meta/age \[40, 6\] float32 is no further column"),
        ({"features": X, "ids": X}, {}, r"ids has the shape \[40, 6\]; expected one value a row"),
    ],
)
def test_what_does_not_hold_together_is_refused(arrays, attributes, said):
    refused(said, h5(attributes=attributes, **arrays))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickled_arrays_are_refused_and_run_nothing():
    np.savez("a.npz", x=np.array([[Bomb()]], object))
    labels = npy(np.array([Bomb()] * 40, object), "y.npy")
    for file, options in ((labels, {}), ("a.npz", {}), (npy(X), {"labels": labels})):
        refused("holds Python objects, which only pickle reads", file, **options)
    assert not Path("owned").exists()


def soft(file):
    file["features"] = h5py.SoftLink("/elsewhere")


def external(file):
    file["features"] = h5py.ExternalLink("secret.h5", "x")


def virtual(file):
    layout = h5py.VirtualLayout((40, 6), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "x", (40, 6))
    file.create_virtual_dataset("features", layout)


def storage(file):
    file.create_dataset("features", (40, 6), "f4", external=[("raw", 0, 960)])


def plugin(file):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((40, 6))
    creation.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL)  # zstandard
    h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((40, 6)), creation)


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        *((fill, "is a link that leads elsewhere") for fill in (soft, external)),
        (virtual, "refers to other files .a virtual dataset."),
        (storage, "keeps its data in another file"),
        (plugin, "would load a plugin; save it plain, or with gzip"),
    ],
)
def test_an_h5_that_leads_elsewhere_or_to_code_is_not_followed(fill, said):
    h5("secret.h5", x=X)
    Path("raw").write_bytes(X.tobytes())
    with h5py.File("bad.h5", "w") as file:
        fill(file)
    refused(said, "bad.h5", error=UnsafeFile)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': oops}  ", "cannot be read as npy"),
        ("a.npz", b"PK\x03\x04 no archive", "cannot be read as npz"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(90), "cannot be read"),
        ("a.safetensors", b"\xff" * 20, "header too large"),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0[]", "cannot be read as safetensors|no features"),
        ("a.csv", b"1,2", "has an ending that is not read here"),
    ],
)
def test_files_that_are_none_are_refused_in_a_sentence(name, content, said):
    Path(name).write_bytes(content)
    refused(said, name)


def test_a_shape_beyond_the_file_is_refused_before_memory_is_asked_for():
    path = Path(npy(X))
    path.write_bytes(path.read_bytes().replace(b"(40, 6), }            ", b"(400000000000, 6), }  "))
    refused("declares 9,600,000,000,000 bytes", path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 6], "data_offsets": [0, 24 << 40]}}).encode()
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(96))
    refused("not fully covered", "a.safetensors")


def test_a_file_that_changes_while_it_is_imported_is_refused(monkeypatch):
    real = import_features.create_store
    monkeypatch.setattr(import_features, "create_store", lambda *words: npy(X[::-1]) and real(*words))
    refused("changed while it was imported", npy(X))


@pytest.mark.parametrize(
    ("limit", "value", "make", "said"),
    [
        ("_COLUMN", 100, lambda: h5(features=X, labels=Y), r"labels \[40\] is too large for a column"),
        ("_COLUMN", 500, lambda: npy(np.asfortranarray(X)), r"feats is stored by columns \(Fortran order\)"),
        ("_OBJECTS", 3, lambda: h5(a=X, b=X, c=X), "holds more than 3 datasets"),
        ("_ATTRIBUTE", 3, lambda: h5(a=X, attributes={"note": "x" * 9}), "has an attribute of 16 bytes"),
    ],
)
def test_what_would_fill_the_memory_is_refused(monkeypatch, limit, value, make, said):
    monkeypatch.setattr(f"featurecache.maintenance.feature_files.{limit}", value)
    refused(said, make(), error=(SourceError, UnsafeFile))


def test_more_rows_than_a_view_can_have_are_refused_before_they_are_looked_at(monkeypatch):
    monkeypatch.setattr(import_features, "MOST_ROWS", 39)
    monkeypatch.setattr(import_features, "annotate_rows", None)
    refused(r"feats\.npy has 40 rows; a view has at most 39", npy(X))


def test_tensors_that_numpy_cannot_hold_and_text_that_cannot_be_stored_are_refused():
    save_file({"x": torch.zeros(4, 2, dtype=torch.bfloat16)}, "a.safetensors")
    refused(r"x of a\.safetensors is BF16, which numpy cannot hold; save it as F16 or F32", "a.safetensors")
    np.savez("a.npz", x=X[:2], ids=np.array(["a", "b\0c"]))
    refused(r"ids has 'b\\x00c', which cannot be stored as text", "a.npz")


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "", "x" * 300])
def test_names_that_no_file_may_have_are_refused(name):
    refused("cannot be the name of a view", npy(X), name, error=BadOption)
