"""What this tool wrote into a folder of images is left out and said, each kind of it as it is really written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.command import call
from support.small_sets import encoded, pictures, refused
from support.tuning import vit

from featurecache.sources import open_source
from featurecache.sources.folders import is_own_output
from heads.models.finetune import save_backbone
from heads.studies import runner
from heads.studies.spec import Extract, ImageSet, Question, Study

FOLDERS = ("maps", "report", "run", "study", "sweep", "tuned", "vit-demo")  # the last is a store, with its view
SHEETS = ("leaks.png", "sheet.png")
IMAGES = [f"{name}/{number:02}.png" for name in ("one", "runs") for number in range(12)]
STUDY = Study(
    name="small", title="", question="", source="", about=(), differs=(), cautions=(),
    images=(ImageSet("set", "kaggle:nobody/none", ("a", "b")),), questions=(Question("part", "", "set"),),
    steps=(Extract("features", "set", "vit-in21k", "cls"),),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; beside them, under names that say nothing, all that the commands write."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pictures(data, *IMAGES))
        patch.setattr(runner, "load_study", lambda name: STUDY)
        vit_demo = ("--backbone", "vit-demo", "--random-weights")
        train = ("--features", "x", "--cache", ".", "--epochs", 1)
        commands = [
            ("extract", *vit_demo, "--data", ".", "--cache", ".", "--name", "x", "--sheet", "sheet.png"),
            ("leaks", "x", "--cache", ".", "--sheet", "leaks.png"),
            ("train-head", "--head", "linear", *train, "--out", "run"),
            ("ablate", "--heads", "linear", *train, "--outputs", "cls", "--out", "sweep"),
            ("report", "run", "sweep", "--out", "report"),
            ("explain", "--run", "run", "--kind", "attention", "--out", "maps", IMAGES[0]),
            ("study", "small", "--quick", "--out", "study"),
        ]
        for words in commands:
            assert (result := call(*words)).exit_code == 0, (words, result.stderr)
        save_backbone(vit(data.parent / "vit"), data / "tuned")
        (store,) = data.glob("vit-demo-*")
        store.rename(data / "vit-demo")
    return data


@pytest.mark.integration
def test_beside_the_images_all_of_it_is_left_out_and_named(data):
    opened = open_source(data)
    assert (opened.ids, opened.classes) == (IMAGES, ["one", "runs"])
    left = next(words for words in opened.understood if words.startswith("what featurecache wrote left out"))
    assert f"({len(FOLDERS) + len(SHEETS)} in all)" in left


@pytest.mark.integration
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_it_is_no_data_nor_is_what_lies_deeper(data, kind):
    assert is_own_output(str(data / kind), os.listdir(data / kind))
    refused(data / kind, "was written by featurecache")
    (data / kind / "deeper").mkdir()
    refused(data / kind / "deeper", f"lies in {data / kind}, which featurecache wrote")


@pytest.mark.integration
@pytest.mark.parametrize("name", SHEETS)
def test_a_contact_sheet_is_no_image_whatever_it_is_called(data, tmp_path, name):
    (tmp_path / "7.PNG").write_bytes((data / name).read_bytes())
    refused(tmp_path, "found only what featurecache wrote (7.PNG)")
    (tmp_path / "sheet.png").write_bytes(encoded(3))
    assert open_source(tmp_path).ids == ["sheet.png"]


@pytest.mark.parametrize("text", ['{"head": 1}', "[]", "[1]", "no json", '{"spec": {}, "provenance": 1}'])
def test_records_of_others_do_not_make_a_folder_ours(tmp_path, text):
    names = ["config.json", "spec.json", "explain.json", "finetuned.json"]
    for name in names:
        (tmp_path / name).write_text(text)
    assert not is_own_output(str(tmp_path), [*names, "gone"])


def test_a_record_makes_a_folder_ours_alone(tmp_path):
    pictures(tmp_path, "a/1.png", "old/1/roc.png")
    keys = ("head", "view", "settings", "calibration", "splits")
    (tmp_path / "old/1/config.json").write_text(json.dumps(dict.fromkeys(keys, "")))
    assert "what featurecache wrote left out (old/1/)" in open_source(tmp_path).understood
    refused(tmp_path / "old", "found only what featurecache wrote (1/)")
