"""The run folder: what is in it, what stands in its way, and that half of one is never taken for one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from PIL import Image
from safetensors.torch import load_file
from support.builders import make_view
from support.fake_view import label_view, toy_view

from featurecache.errors import BadOption, CannotWrite, InUse, NotInCache, RunError
from featurecache.files.mirror import place_of
from featurecache.store.write_view import open_view
from heads import api
from heads.api import train_head
from heads.evaluation.comparison import compare
from heads.reports import listing
from heads.reports import text as tables
from heads.runs.run import list_runs, load_run, view_word
from heads.runs.write import claim_run

FILES = {
    "config.json", "metrics.json", "metrics.csv", "history.csv", "predictions.csv", "splits.csv",
    "answers.safetensors", "head.safetensors", "report.html",
    "curves.png", "confusion.png", "roc.png",
}  # fmt: skip


def quick(view=None, head="linear", **options):
    return train_head(view or toy_view(n=200, splits="given", noise=2), head, epochs=2, **options)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_has_its_files_and_a_number():
    first, second = quick(), quick()
    assert (first.path, second.path) == (Path("runs/toy-linear-1"), Path("runs/toy-linear-2"))
    assert {file.name for file in first.path.iterdir()} == FILES
    assert [p.name for p in Path("runs").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "large"])
def test_a_run_read_again_is_the_run(kind):
    view = {"multiclass": toy_view(classes=4, noise=3), "multilabel": label_view()}.get(kind) or toy_view(noise=2)
    run = quick(view, "large" if kind == "large" else "linear", standardize="zscore")
    again = load_run(run.path)
    assert (again.config, again.metrics, again.history) == (run.config, run.metrics, run.history)
    features = view.tensor(run.output)
    np.testing.assert_array_equal(again.logits(features), run.logits(features))


def test_a_command_names_the_very_view_whatever_others_are_made_or_removed(tmp_path, monkeypatch):
    view = make_view(tmp_path / "cache", range(6), name="d1")
    label = view.label
    other = make_view(tmp_path / "cache", range(6), name="d1", spec={"image_size": (9, 9)})
    word = view_word(label, place_of(view.path))
    assert (label, word) == ("tiny/d1", f"{view.store.name}/d1") and open_view(word).path.samefile(view.path)
    view.path.unlink()
    with pytest.raises(NotInCache, match="there is no view"):
        open_view(word)
    elsewhere = make_view(tmp_path / "c", range(6), name="d1")
    assert open_view(view_word(other.label, place_of(other.path))).path.samefile(other.path)
    assert open_view(view_word(elsewhere.label, place_of(elsewhere.path))).path.samefile(elsewhere.path)
    monkeypatch.chdir(tmp_path / "c")
    assert open_view(view_word("tiny/d1", elsewhere.path.relative_to(Path.cwd()))).path.samefile(elsewhere.path)


def test_a_run_gives_its_tables_as_frames_and_its_splits_as_masks():
    view = toy_view(n=300, splits="given", noise=3)
    run = quick(view)
    assert run.ids.tolist() == list(view.ids) and run.splits.tolist() == list(view.splits)
    frame = run.frame()
    assert frame["id"].tolist() == [*run.ids[run.splits == "val"], *run.ids[run.splits == "test"]]
    right = (frame["true class"] == frame["predicted class"])[frame["split"] == "test"]
    assert right.mean() == run.metrics["test"]["accuracy"]
    assert frame["p kind 1"].dtype == np.float64 and len(run.frame("history")) == len(run.history)
    measured = run.frame("metrics").query("split == 'test' and metric == 'auroc' and `class` == ''")["value"]
    assert measured[:1].tolist() == [run.metrics["test"]["auroc"]]
    assert repr(run).startswith(f"<Run {run.path}: linear on cls, val AUROC 0.")
    assert "<td>AUROC</td>" in run._repr_html_()
    with pytest.raises(BadOption, match=r"Did you mean|Near: predictions|near"):
        run.frame("prediction")


def test_runs_are_compared_without_a_word_about_families():
    first, second = (quick(toy_view(n=300, splits="given", noise=3), lr=lr) for lr in (0.1, 0.01))
    assert len(compare([first, second], resamples=50).record["families"]) == 2


def test_predictions_are_those_of_the_head_and_give_the_metrics():
    view = toy_view(n=300, splits="given", noise=3)
    run = quick(view)
    rows = table(run.path / "predictions.csv")
    assert [row["split"] for row in rows] == ["val"] * 60 + ["test"] * 60
    where = [list(view.ids).index(row["id"]) for row in rows]
    z = run.logits(view.features["cls"][where])
    p = np.array([float(row["p kind 1"]) for row in rows])
    np.testing.assert_allclose(p, 1 / (1 + np.exp(z[:, 0] - z[:, 1])))
    assert [row["true class"] for row in rows] == [f"kind {view.labels[i]}" for i in where]
    cut = run.config["calibration"]["thresholds"][0]
    assert [row["predicted class"] for row in rows] == [f"kind {int(v >= cut)}" for v in p]
    truth = [row["true class"] == "kind 1" for row in rows]
    assert run.metrics["test"]["auroc"] == pytest.approx(sk.roc_auc_score(truth[60:], p[60:]))


def test_multilabel_predictions_leave_unknown_labels_empty():
    view = label_view(n=300)
    row = table(quick(view).path / "predictions.csv")[0]
    labels = view.labels[list(view.ids).index(row["id"])]
    assert [row[f"true sign {c}"] for c in range(4)] == ["" if np.isnan(v) else str(int(v)) for v in labels]


def test_metrics_csv_says_what_metrics_json_says():
    run = quick()
    values = {(r["model"], r["split"], r["class"], r["metric"]): r["value"] for r in table(run.path / "metrics.csv")}
    assert float(values["linear", "test", "", "auroc"]) == run.metrics["test"]["auroc"]
    assert float(values["linear", "val", "kind 0", "recall"]) == run.metrics["val"]["per_class"]["kind 0"]["recall"]


@pytest.mark.parametrize("classes", [['no, "none"', "yes\n$x_1$"], ["正常", "肺炎"]])
def test_names_in_any_script_with_commas_quotes_and_line_breaks_stay_in_their_cells(classes):
    view = toy_view(n=200, splits="given", noise=2)
    view.ids, view.classes = [f'a,"{i}"\nb\r;=1' for i in range(200)], classes
    run = quick(view)
    rows = table(run.path / "predictions.csv")
    assert {row["id"] for row in rows} < set(view.ids) and {row["true class"] for row in rows} == set(classes)
    assert load_run(run.path).config["positive"] == classes[1]


def test_undefined_measures_are_null_in_json_and_the_head_file_is_a_plain_state_dict():
    view = toy_view(n=300, classes=3, splits="given")
    view.labels[[s == "test" and y == 2 for s, y in zip(view.splits, view.labels, strict=True)]] = 1
    run = quick(view, head="large")
    assert run.metrics["test"]["per_class"]["kind 2"]["auroc"] is None
    assert "NaN" not in (run.path / "metrics.json").read_text()
    assert list(load_file(run.path / "head.safetensors")) == ["ln1.bias", "ln1.weight", "ln2.bias", "ln2.weight"]


def test_a_folder_with_another_run_is_refused_and_overwrite_replaces_it():
    first = quick(out="mine")
    with pytest.raises(RunError, match=r"holds a run already, with other seed\. --overwrite replaces it"):
        quick(out="mine", seed=1)
    (first.path / "note.txt").write_text("of the first run")
    second = quick(out="mine", seed=1, overwrite=True)
    assert second.config["settings"]["seed"] == 1
    assert {file.name for file in Path("mine").iterdir()} == FILES
    assert [p.name for p in Path().iterdir()] == ["mine"]


def test_the_same_command_says_that_the_run_is_finished_and_trains_nothing(monkeypatch):
    lines, first = [], quick(out="mine")
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    monkeypatch.setattr("heads.api.train_together", None)
    assert quick(out="mine", say=lines.append).config == first.config
    assert lines == [f"finished   {first.path} is this very run already; --overwrite trains it again"]
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    with pytest.raises(RunError, match=r"other images in the page\..* featurecache report .* writes its page anew"):
        quick(out="mine", images=False)
    (first.path / "roc.png").write_bytes(b"x")
    with pytest.raises(RunError, match=r"roc\.png is not what was written.* --overwrite begins anew"):
        quick(out="mine")


def test_a_run_that_another_command_finished_meanwhile_stays(monkeypatch):
    other, train = quick(seed=1), api.train_together

    def slowly(*given, **more):
        other.path.rename("mine")  # as from a machine without locks in common
        return train(*given, **more)

    monkeypatch.setattr(api, "train_together", slowly)
    with pytest.raises(RunError, match="mine was finished by another command meanwhile; it stays"):
        quick(out="mine")
    assert load_run("mine").config == other.config
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "runs"]


def test_while_one_trains_another_with_its_out_is_refused_and_without_out_has_its_own():
    with claim_run("runs/toy-linear-1", "toy", "linear", {}):
        with pytest.raises(InUse, match="a training for toy-linear-1 by process"):
            quick(out="runs/toy-linear-1")
        assert quick().path.name == "toy-linear-2"
    assert quick().path.name == "toy-linear-1"


def test_a_folder_of_other_files_is_never_replaced_and_an_empty_one_may_be_given():
    Path("photos").mkdir()
    assert quick(out="photos").path.resolve() == Path("photos").resolve()
    Path("others").mkdir()
    Path("others/cat.jpg").write_text("x")
    with pytest.raises(RunError, match="holds other files and no run"):
        quick(out="others", overwrite=True)
    with pytest.raises(RunError, match="is a file"):
        quick(out="others/cat.jpg")
    assert Path("others/cat.jpg").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_place_that_cannot_be_written_is_said_before_training():
    Path("file").write_text("")
    with pytest.raises(CannotWrite, match="--out chooses another place"), claim_run("file/run", "toy", "linear", {}):
        pass


def test_a_disk_that_fails_while_writing_leaves_nothing(monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heads.runs.folder.sync_path", full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        quick()
    assert list(Path("runs").iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_while_writing_never_looks_finished():
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from support.fake_view import toy_view\n"
        "import heads.reports.figures\n"
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "heads.reports.figures.save_pictures = kill\n"
        "from heads.api import train_head\n"
        "train_head(toy_view(), 'linear', epochs=1)\n"
    )
    tests = Path(__file__).parents[2]
    path = {**os.environ, "PYTHONPATH": str(tests.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(tests)], env=path, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = list(Path("runs").iterdir())
    assert [p.name for p in left] == [".toy-linear-1.partial"]
    assert list_runs("runs") == []
    assert quick().path.name == "toy-linear-1"
    assert [p.name for p in Path("runs").iterdir()] == ["toy-linear-1"]


def test_a_run_that_lacks_a_file_is_no_run():
    path = quick().path
    for name in ("config.json", "head.safetensors", "predictions.csv"):
        (path / name).rename("elsewhere")
        with pytest.raises(RunError, match=f"is not a finished run: it has no {name}"):
            load_run(path)
        Path("elsewhere").rename(path / name)
    (path / "splits.csv").rename("elsewhere")
    (path / "splits.csv").symlink_to(Path("elsewhere").resolve())
    with pytest.raises(RunError, match="holds symbolic links"):
        load_run(path)
    with pytest.raises(RunError, match="is not a folder"):
        load_run("runs/nothing")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("splits.csv", lambda data: b"".join(data.splitlines(keepends=True)[:9]), "not what was written"),
        ("config.json", lambda data: data.replace(b'"kind 0"', b'"kind 2"', 1), "not the text that was written"),
        ("config.json", lambda data: data.replace(b'"format": 1', b'"format": 99'), "run format 99; .* reads 1"),
    ],
)
def test_a_damaged_run_is_refused(name, change, says):
    file = quick().path / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RunError, match=says):
        load_run(file.parent).answers("val")


def test_code_that_a_run_only_names_is_not_imported_unless_trusted(here, monkeypatch):
    (here / "own_head_of_a_run.py").write_text(
        "from torch import nn\nclass Own(nn.Linear):\n    'Mine.'\n"
        "    def __init__(self, shape, classes): super().__init__(shape[0], classes)\n"
    )
    run = quick(head="python:own_head_of_a_run:Own", output="cls")
    assert run.path.name == "toy-Own-1" and run.model is not None
    with pytest.raises(RunError, match="trust_code=True"):
        load_run(run.path).model  # noqa: B018
    assert load_run(run.path, trust_code=True).model is not None


def test_list_runs_passes_over_what_is_no_run():
    a, b = quick(), quick(head="mlp")
    Path("runs/other").mkdir()
    Path("runs/other/config.json").write_text("{}")
    assert [run.path for run in list_runs()] == [a.path, b.path]
    text = listing.runs_table(list_runs())
    assert "runs/toy-linear-1" in text and "vit-toy/toy cls" in text
    assert list_runs("nowhere") == [] and "no runs yet" in listing.runs_table([])


def test_the_final_table_has_val_and_test_and_names_the_positive_class():
    text = tables.final_table(quick())
    lines = text.splitlines()
    assert lines[0].split("  ")[-1] == "test (read once)"
    assert [line.split()[0] for line in lines[1:12]] == [
        "AUROC", "AP", "sensitivity", "specificity", "PPV", "NPV", "F1", "accuracy", "NLL", "Brier", "ECE",
    ]  # fmt: skip
    assert "of kind 1 at " in lines[3]
    assert "untrained" not in text


def test_untrained_weights_bring_the_controls_first_and_one_sentence(monkeypatch):
    monkeypatch.setattr(
        "heads.evaluation.controls.pixel_control",
        lambda *a: {"name": "pixels, logistic regression", "val": None, "test": None, "note": "gone"},
    )
    run = quick(toy_view(n=300, splits="given", noise=2, untrained=True))
    lines = tables.final_table(run).splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["chance", "majority class", "pixels, logistic regression"]
    assert lines[4].startswith("linear on cls")
    assert "pixels, logistic regression: gone" in lines
    assert tables.final_table(run).count(tables.UNTRAINED) == 1


def test_a_comparison_is_ordered_by_val_alone_and_says_where_tests_differ():
    view = toy_view(n=300, splits="given", noise=2)
    lines = tables.comparison_table([quick(view), quick(view, head="large"), quick(view, lr=1e-5)]).splitlines()
    shown = [float(line.split()[4]) for line in lines[1:]]
    assert shown == sorted(shown, reverse=True) and "do not compare" not in lines[-1]
    view = toy_view(n=300, noise=2)
    assert "do not compare" in tables.comparison_table([quick(view), quick(view, split_seed=1)])


def test_pictures_of_many_classes_and_of_labels_are_drawn():
    for view in (toy_view(n=720, classes=24), toy_view(n=400, classes=12), label_view(labels=6)):
        path = quick(view).path
        for name in ("curves.png", "confusion.png", "roc.png"):
            with Image.open(path / name) as image:
                assert min(image.size) > 300 and len(image.convert("RGB").getcolors(2**20)) > 20


def test_splits_of_one_run_serve_another():
    view = toy_view(n=300, noise=2)
    first = quick(view, split_seed=5)
    second = quick(view, splits=first.path / "splits.csv")
    assert (first.path / "splits.csv").read_bytes() == (second.path / "splits.csv").read_bytes()
    assert first.config["splits"]["digest"] == second.config["splits"]["digest"]


def test_numbers_in_config_say_what_ran():
    config = quick(lr=3e-4).config
    assert config["settings"]["lr"] == 3e-4 and config["parameters"] == 18 and config["view"]["shape"] == [8]
    assert config["splits"]["counts"]["train"] == [60, 60] and config["versions"]["torch"] == torch.__version__
