"""Flipped bytes in runs, sweeps and what lies beside them: refused by name, or the same numbers; found by `verify`."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.command import call
from support.fake_view import toy_view
from support.plant import flip
from support.sweeps import sweep, view_of

from featurecache.errors import RunError
from heads.api import families_in, open_run, report, train_head
from heads.evaluation.comparison import compare
from heads.evaluation.external import evaluate_run, read_external
from heads.runs.folder import is_leftover
from heads.runs.run import list_runs, load_run
from heads.sweeps.folder import load_sweep
from heads.sweeps.verify import verify_runs

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))
FLIPS = int(os.environ.get("FEATURECACHE_FAULT_STEPS", "5"))  # of each file, in the slow tier


RECORDS = ("config.json", "sweep.json", "there.json")  # of which much is white space and words


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flips(data: bytes, count: int, seed: int) -> list[bytes]:
    """One bit other in the first byte, the last, and in some between; and cut short."""
    rng = random.Random(seed)
    places = [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(count))]
    changed = [bytearray(data) for _ in places]
    for place, each in zip(places, changed, strict=True):
        each[place] ^= 1 << rng.randrange(8)
    return [*map(bytes, changed), data[: len(data) // 2]]


def numbers_of_run(path: Path):
    run = load_run(path)
    logits = run.logits(toy_view(n=30).tensor(run.output))
    answers = [run.answers(split) for split in ("val", "test")]
    external = [(record["view"], each.logits.tolist()) for record, each in read_external(run)]
    return run.metrics, run.history, run.config, logits.tolist(), [a.logits.tolist() for a in answers], external


def numbers_of_sweep(path: Path):
    families = families_in(path)
    return json.dumps(compare(families, resamples=20).record, sort_keys=True), str(open_run(path).path)


def all_found_or_harmless(folder: Path, numbers, count: int) -> None:
    """Every flip of every file is named by verify, and whoever reads the numbers has the same ones or is refused."""
    right = numbers(folder)
    for file in files_of(folder):
        data, wrong = file.read_bytes(), []
        for changed in flips(data, count + 5 * (file.name in RECORDS), SEED):
            file.write_bytes(changed)
            damaged = [str(damage.path) for damage in verify_runs([folder]).damages]
            assert damaged == [str(file)], (file, damaged)
            try:
                if numbers(folder) != right:
                    wrong.append(changed)
            except RunError as error:
                assert str(folder) in str(error), error
        file.write_bytes(data)
        assert not wrong, (file, len(wrong))
    assert numbers(folder) == right and verify_runs([folder]).damages == ()


@pytest.mark.parametrize("count", [1, pytest.param(3 * FLIPS, marks=pytest.mark.slow)])
def test_a_run_with_what_evaluate_added(count):
    run = train_head(toy_view(n=150, splits="given", noise=2), "linear", epochs=2, standardize="zscore", out="run")
    evaluate_run(run, toy_view(n=60, noise=2, name="there", label="vit-toy/there", path=Path("b.h5")), resamples=20)
    all_found_or_harmless(run.path, numbers_of_run, count)


@pytest.mark.parametrize("count", [0, pytest.param(FLIPS, marks=pytest.mark.slow)])
def test_a_sweep_with_its_report(count):
    path = sweep(view_of(), "linear,ridge", lr="1e-3,1e-2").path
    report(path, images=False, resamples=20)
    all_found_or_harmless(path, numbers_of_sweep, count)


def test_a_row_that_was_lost_is_missed():
    path = sweep(view_of(), lr="1e-3,1e-2").path
    rows = (path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (path / "rows.jsonl").write_bytes(rows[0])
    with pytest.raises(RunError, match=r"rows\.jsonl is not what was written"):
        load_sweep(path)


def test_a_damaged_family_is_named_and_the_others_are_shown():
    path = sweep(view_of(), "linear,ridge").path
    broken = next(family for family in load_sweep(path).families if family.head == "ridge").runs[0].path
    flip(broken / "answers.safetensors", -9)
    written = report(path, images=False, resamples=20)
    (sentence,) = written.left_out
    assert "vit-toy/toy cls ridge" in sentence and f"{broken} is damaged" in sentence
    assert sentence in json.loads((path / "metrics.json").read_text())["warnings"]
    assert "ridge" in written.path.read_text()
    with pytest.raises(RunError, match=r"ridge of the sweep .* is damaged"):
        open_run(path)
    done = call("report", path, "--no-images")
    assert done.exit_code == 1 and "is damaged" in done.stderr
    sweep(view_of(), "linear,ridge")  # the same command brings it back
    assert load_sweep(path).damaged == {} and report(path, images=False, resamples=20).left_out == ()


def test_a_family_that_is_not_finished_is_named():
    path = sweep(view_of(), "linear,ridge").path
    shutil.rmtree(next(path.glob("heads/*ridge*")))
    assert [*load_sweep(path).unfinished] == ["vit-toy/toy cls ridge"]
    written = report(path, images=False, resamples=20)
    assert written.left_out == ("left out: vit-toy/toy cls ridge: its chosen heads are not all written yet",)


def test_files_of_the_user_and_another_place_do_not_hurt(tmp_path):
    first = train_head(toy_view(n=150, splits="given", noise=2), "linear", epochs=1, out="mine", report=False)
    (first.path / "notes.txt").write_text("to be read by A.")
    (first.path / "external").mkdir()
    (first.path / "external" / "mine.txt").write_text("x")
    copied = Path(shutil.copytree(first.path, tmp_path / "elsewhere" / "copy"))
    shutil.move(first.path, tmp_path / "moved")
    for path in (copied, tmp_path / "moved"):
        assert load_run(path).metrics == first.metrics and verify_runs([path]).damages == ()
        report(path, images=False, resamples=20)
        assert verify_runs([path]).damages == () and (path / "notes.txt").read_text() == "to be read by A."


def test_a_report_killed_between_its_files_leaves_the_run_whole(monkeypatch):
    from heads.runs import folder

    run = train_head(toy_view(n=150, splits="given", noise=2), "linear", epochs=1, out="run", report=False)
    report(run.path, images=False, resamples=20)
    whole, write = {path.name: path.read_bytes() for path in files_of(run.path)}, folder.write_whole
    for steps in (0, 1, 2, 4):
        left = iter([write] * steps)
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(folder, "write_whole", lambda *given: next(left)(*given))  # noqa: B023
            report(run.path, images=False, resamples=20, prevalence=0.1)
        config = load_run(run.path).config
        assert verify_runs([run.path]).damages == () and config == run.config | {"files": config["files"]}
    report(run.path, images=False, resamples=20, prevalence=0.1)
    changed = {path.name for path in files_of(run.path) if whole[path.name] != path.read_bytes()}
    assert changed == {"config.json", "metrics.json", "report.html"} | changed & {"metrics.csv"}
    assert verify_runs([run.path]).damages == () and not any(map(is_leftover, run.path.iterdir()))


def test_verify_takes_runs_sweeps_and_folders_of_them_as_it_takes_stores(here):
    run = train_head(toy_view(n=150, splits="given", noise=2), "linear", epochs=1, out="runs/a")
    sweep(view_of(), folder="runs/s")
    for words in (("runs",), ("runs/a", "runs/s"), ()):
        done = call("verify", *words)
        assert done.exit_code == 0 and "all are what was written" in done.stdout, done.output
    (run.path / "report.html").unlink()
    (here / "runs/s/rows.jsonl").write_bytes((here / "runs/s/rows.jsonl").read_bytes()[:-1])
    done = call("verify", "runs")
    assert done.exit_code == 1 and "2 damaged or missing" in done.stdout, done.output
    assert "report.html is missing" in done.stdout and "rows.jsonl is not what was written" in done.stdout
    assert call("verify", "runs/a").exit_code == 1 and "there is no view" in call("verify", "nothing").stderr
    assert [each.path.name for each in list_runs()] == ["a"]
    (here / "runs/a/config.json").write_text((here / "runs/a/config.json").read_text().replace("linear", "lineas", 1))
    listed = call("ls")
    assert listed.exit_code == 0 and "runs/a is damaged" in listed.stdout


def test_a_backbone_that_lies_in_a_run_is_none_of_ours(here):
    (here / "model").mkdir()
    (here / "model/config.json").write_text('{"model_type": "vit"}')
    assert verify_runs([here]).files == 0 and np.isfinite(verify_runs([here]).seconds)
