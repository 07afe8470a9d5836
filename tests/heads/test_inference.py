"""Prediction on new images: the records, what cannot be read, and the three renderings."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.fake_view import label_view, toy_view
from support.runs import reseal, train_head

import featurecache
from featurecache.errors import BadOption, RunError, UnknownSourceName
from heads.api import ablate, predict
from heads.inference import images_of, iterate_images, prediction_records, predictions_csv, predictions_table


@pytest.fixture
def cached(monkeypatch):
    """A featurecache.compute of its own: the bytes b"3" are row 3 of the view, b"bad" cannot be read."""
    view, calls = toy_view(n=200, splits="given", noise=2), []

    def compute(images, *, like, output, device="auto", weights=None, trust_code=False):
        calls.append((list(images), like, output, device))
        failed = [(i, "truncated after 3 bytes") for i, data in enumerate(images) if bytes(data) == b"bad"]
        rows = [int(bytes(data)) for data in images if bytes(data) != b"bad"]
        return view.features[output][rows], failed

    monkeypatch.setitem(featurecache.__dict__, "compute", compute)
    view.spec = {"precision": "fp32", "preprocess": {}}
    return view, calls, train_head(view, "linear", epochs=2)


def test_the_cache_and_predict_give_the_same_probabilities(cached):
    view, calls, run = cached
    records = predict(run, [b"3", b"150"])
    p = np.exp(run.logits(view.features["cls"][[3, 150]]))
    p /= p.sum(1, keepdims=True)
    got = [[record["probabilities"][c] for c in view.classes] for record in records]
    np.testing.assert_allclose(got, p, rtol=1e-12)
    images, like, output, device = calls[0]
    assert (images, output, device) == ([b"3", b"150"], "cls", "auto")
    assert (like.spec, like.provenance, like.label) == (view.spec, view.provenance, view.label)


def test_what_cannot_be_read_is_named_and_the_others_keep_their_places(cached, tmp_path):
    run = cached[2]
    for name, data in (("a.png", b"5"), ("b.png", b"bad"), ("c.png", b"6")):
        (tmp_path / name).write_bytes(data)
    records = predict(run.path, ["a.png", "b.png", "gone.png", "c.png"])
    assert [record["image"] for record in records] == ["a.png", "b.png", "gone.png", "c.png"]
    assert [record.get("error") for record in records] == [None, "truncated after 3 bytes", "no such file", None]
    alone = predict(run, b"6")[0]  # another batch size: the last digit of a product in float32 may differ
    assert records[3]["class"] == alone["class"]
    assert records[3]["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)


def test_a_binary_record_names_the_class_by_the_threshold_of_val(cached):
    run = cached[2]
    cut = run.config["calibration"]["thresholds"][0]
    z = np.array([[0.0, np.log(cut / (1 - cut)) + step] for step in (-0.01, 0.01)])
    below, above = prediction_records(run, z)
    assert (below["class"], above["class"]) == ("kind 0", "kind 1")
    assert above["probability"] == above["probabilities"]["kind 1"] == pytest.approx(cut, abs=0.01)


def test_multilabel_records_have_all_labels_above_their_thresholds():
    run = train_head(label_view(), "linear", epochs=1)
    cuts = np.array(run.config["calibration"]["thresholds"])
    z = np.log(cuts / (1 - cuts)) + np.array([[0.1, -0.1, 0.1, -0.1]])
    assert prediction_records(run, z)[0]["classes"] == ["sign 0", "sign 2"]


def test_many_images_are_computed_in_pieces(cached, monkeypatch):
    view, calls, run = cached
    monkeypatch.setattr("heads.inference.HELD", (5, 100))
    records = predict(run, [str(i).encode() for i in range(10, 22)])
    assert [len(images) for images, *_ in calls] == [3, 3, 3, 3]
    whole = run.logits(view.features["cls"][10:22])
    assert [r["class"] for r in records] == [a["class"] for a in prediction_records(run, whole)]


def new_images(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(str(number).encode())
    return root


def test_every_image_below_a_folder_gets_an_answer_however_they_lie_and_so_does_an_array(cached, tmp_path):
    names = ("patient/1/b.png", "patient/a.png", "top.png", "train/c.png")
    (new_images(tmp_path / "new", *reversed(names)) / "empty").mkdir()
    records = predict(cached[2], [f"{tmp_path}/new/", np.frombuffer(b"7", dtype=np.uint8)])
    assert [record["image"] for record in records] == [*(str(tmp_path / "new" / name) for name in names), "image 2"]
    assert all("class" in record and "label" not in record for record in records)
    assert [record["image"] for record in predict(cached[2], tmp_path / "new")] == [r["image"] for r in records[:4]]


def test_folders_called_as_classes_show_how_many_are_right(cached, tmp_path):
    said, run = [], cached[2]
    folder = new_images(tmp_path, "test/Kind 0/a.png", "test/kind 1/x/b.png", "c.png", "kind 0/kind 1/d.png")
    records = predict(run, folder, say=said.append)
    assert [record.get("label") for record in records] == [None, None, "kind 0", "kind 1"]  # d.png lies in both
    right = sum(record["class"] == record["label"] for record in records[2:])
    assert said[0].startswith("threshold  kind 1 from ") and said[1] == "predicted  4 images"
    assert said[2] == f"accuracy   {right / 2:.3f} of 2 images whose class is known by folder or table" + (
        "; 2 others called as none of its classes"
    )
    assert len(said) == 3  # nobody knows these images
    rows = list(csv.DictReader(io.StringIO(predictions_csv(records))))
    assert [row["true class"] for row in rows] == ["", "", "kind 0", "kind 1"]


@pytest.mark.parametrize(
    ("header", "columns"),
    [("image,label", None), ("scan,label", {"path": "scan"}), ("scan,seen", {"path": "scan", "label": "seen"})],
)
def test_a_table_needs_a_column_of_paths_and_may_have_labels(cached, tmp_path, header, columns):
    new_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "new.csv").write_text(f"{header}\na.png,kind 1\nb.png,nobody knows\nc.png,\n")
    records = predict(cached[2], tmp_path / "new.csv", columns=columns)
    labels = [(record["image"], record.get("label")) for record in records]
    assert labels == [("a.png", "kind 1"), ("b.png", None), ("c.png", None)]


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"label": "lable"}, UnknownSourceName, r"has no column 'lable' for the label; it has label\. Near: label"),
        ({"lable": "finding"}, BadOption, r"names path or label, not 'lable'\. Near: label"),
    ],
)
def test_a_column_or_a_role_that_there_is_not_is_said_with_its_neighbour(cached, tmp_path, columns, error, words):
    new_images(tmp_path, "a.png")
    (tmp_path / "new.csv").write_text("image,label\na.png,kind 1\n")
    with pytest.raises(error, match=words):
        predict(cached[2], tmp_path / "new.csv", columns=columns)


def test_arrays_and_pil_images_from_a_program(cached):
    batch = np.zeros((2, 4, 4, 3), np.uint8)
    shapes = [image.data.shape for image in iterate_images([Image.fromarray(batch[0]), *images_of(batch)])]
    assert shapes == [(4, 4, 3)] * 3
    (record,) = predict(cached[2], Image.new("F", (2, 2)))
    assert "PIL image of mode F" in record["error"]


@pytest.mark.parametrize(
    ("images", "words"),
    [(3, "the images are int"), ([None], "image 1 is NoneType"), ({"path": ["a.png"]}, "the images are dict")],
)
def test_what_is_no_image_is_said(cached, images, words):
    with pytest.raises(BadOption, match=words):
        predict(cached[2], images)


def test_a_table_in_memory_is_no_image_and_a_column_of_it_is_several(cached):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.DataFrame({"path": ["a.png", "b.png"]})
    assert images_of(table["path"]) == ["a.png", "b.png"]
    with pytest.raises(BadOption, match="the images are DataFrame; expected paths"):
        predict(cached[2], table)


def test_a_sweep_answers_by_the_run_it_chose(cached, tmp_path, monkeypatch):
    view = cached[0]
    sweep = ablate([view], "centroid,ridge", out=tmp_path / "sweep", outputs="cls", controls=False)
    with pytest.raises(
        BadOption, match=r"--reference rigde on cls is none .*: centroid on cls, ridge on cls\. Near: ridge on cls"
    ):
        ablate([view], "centroid,ridge", out=tmp_path / "other", outputs="cls", reference="rigde on cls")
    assert not (tmp_path / "other").exists()
    assert predict(tmp_path / "sweep", [b"3"])[0]["class"] == predict(sweep.best.path, [b"3"])[0]["class"]
    (tmp_path / "sweep" / "rows.jsonl").write_text("")
    with pytest.raises(RunError, match=r"rows\.jsonl is not what was written"):
        predict(tmp_path / "sweep", [b"3"])
    reseal(tmp_path / "sweep", name="sweep.json")
    with pytest.raises(RunError, match="No head of the sweep"):
        predict(tmp_path / "sweep", [b"3"])


def test_nothing_to_predict_is_no_error(cached):
    _, calls, run = cached
    assert predict(run, []) == [] == calls and predictions_table([]) == "no images"
    assert predictions_csv([]).splitlines() == ['"image","predicted class","predicted probability","error"']


EVIL = "evil\nname\x1b[2J\udcff\u2028.png"
RECORDS = [
    {"image": "a,1.png", "class": "no", "probability": 0.25, "probabilities": {"no": 0.25, "yes": 0.75}},
    {"image": EVIL, "class": "yes", "probability": 1.0, "probabilities": {"no": 0.0, "yes": 1.0}},
    {"image": "b.png", "error": "truncated after 3 bytes"},
]


def test_csv_is_one_line_a_record_whatever_the_name():
    text = predictions_csv(RECORDS)
    assert len(text.splitlines()) == 4
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["image", "predicted class", "predicted probability", "p no", "p yes", "error"]
    assert list(rows[0].values()) == ["a,1.png", "no", "0.25", "0.25", "0.75", ""]
    assert rows[1]["image"] == "evil\\nname\\x1b[2J\\udcff\\u2028.png"
    assert (rows[2]["predicted class"], rows[2]["error"]) == ("", "truncated after 3 bytes")
    text.encode()


def test_the_table_is_aligned_and_safe_for_a_terminal():
    lines = predictions_table(RECORDS).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["a,1.png", "no", "0.250"]
    assert lines[1].index("no") == lines[2].index("yes") == lines[0].index("predicted class")
    assert "\x1b" not in predictions_table(RECORDS)
    assert lines[3].split(maxsplit=1)[1].split("  ") == ["could not be read", "truncated after 3 bytes"]


def test_features_of_any_storage_type_are_taken(cached):
    view, _, run = cached
    x = view.features["cls"][:4]
    np.testing.assert_allclose(run.logits(x), run.logits(x.float()))
    assert run.logits(torch.zeros(0, 8)).shape == (0, 2)
