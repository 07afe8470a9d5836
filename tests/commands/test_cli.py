"""The command line as a user meets it: exit codes, one sentence per mistake, results on stdout."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from support.command import call
from support.pictures import image_folder

import cli
from featurecache.commands.terminal import Console


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATURECACHE_DIR", raising=False)


def fails(code: int, *words: object) -> str:
    """The error's text; exactly one `error:`, no traceback, nothing on stdout."""
    result = call(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :].strip()


def extract(data: object, *words: object, code: int = 0) -> Result:
    result = call("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "cls", "--data", data, *words)
    assert result.exit_code == code, result.output
    return result


HERE = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent)}
DEMO = ("extract", "--backbone", "vit-demo", "--random-weights", "--data")


def test_help_loads_no_torch_and_no_numpy():
    script = "import sys, click, cli\n"
    script += "for name, each in cli.main.commands.items(): each.get_help(click.Context(each, info_name=name))\n"
    script += "print([m for m in ('torch', 'numpy', 'h5py', 'transformers', 'torchvision', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=HERE)
    assert done.stdout.splitlines() == ["[]"], done.stderr


def test_importing_heads_and_training_load_no_transformers_torchvision_or_pil(tmp_path: Path):
    extract(image_folder(tmp_path / "d", 60))
    script = "import sys, heads, heads.api as t\n"
    script += "seen = lambda: [m for m in ('transformers', 'torchvision', 'PIL', 'matplotlib') if m in sys.modules]\n"
    script += "write = t.write_run\n"
    script += "t.write_run = lambda *words, **options: print(seen()) or write(*words, **options)\n"
    script += "heads.train_head('d', 'linear', epochs=1, controls=False)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=HERE)
    assert done.stdout.splitlines() == ["[]"], done.stderr


def test_json_is_one_object_with_images_per_s(tmp_path: Path):
    words = ("--batch-size", "auto", "--engine", "local", "--device", "auto", "--precision", "auto", "--fit", "model")
    result = extract(image_folder(tmp_path / "d", 8), "--json", *words)
    assert "keeps      cls [96]" in result.stderr and "machine    " in result.stderr
    record = json.loads(result.stdout)
    assert record["images_per_s"] > 0
    assert (record["images"], record["computed"], record["failed"]) == (8, 8, [])


def test_a_dataclass_is_printed_as_json_with_all_that_its_repr_shows(capsys: pytest.CaptureFixture[str]):
    @dataclass
    class Inner:
        path: Path

    @dataclass
    class Outer:
        inner: tuple[Inner, ...]
        rows: int
        secret: object = field(default=None, repr=False)

    Console(True, True).result("text", {"all": [Outer((Inner(Path("a/b")),), 3)]})
    assert json.loads(capsys.readouterr().out) == {"all": [{"inner": [{"path": "a/b"}], "rows": 3}]}
    with pytest.raises(TypeError):
        Console(True, True).result("text", object())


def test_unreadable_images_are_listed_and_the_exit_code_says_so(tmp_path: Path):
    data = image_folder(tmp_path / "d", 6)
    (data / "ill" / "text.png").write_text("<!DOCTYPE html>")
    (data / "well" / "zero.png").touch()
    result = extract(data, code=1)
    for text in ("2 could not be kept", "ill/text.png", '"<!DOCTYPE', "well/zero.png", "zero bytes"):
        assert text in result.stdout
    assert extract(data, "--on-error", "skip").exit_code == 0
    assert "ill/text.png" in fails(1, *DEMO, data, "--on-error", "fail")
    assert "left out   2 images" in call("info", "d").stdout


def test_a_network_is_trained_on_a_table_whose_columns_are_called_otherwise(tmp_path: Path):
    data = image_folder(tmp_path / "d", 60)
    rows = [f"{path},{path.parent.name}\n" for path in sorted(data.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("picture,finding\n" + "".join(rows))
    words = ("train-baseline", "--arch", "cnn-cifar", "--image-size", "8", "--epochs", "1", "--data", "t.csv")
    assert "--column path=NAME" in fails(1, *words)
    columns = ("--column", "path=picture", "--column", "label=finding")
    run = json.loads(call(*words, *columns, "--no-images", "--json").stdout)["run"]
    command = re.search(r"featurecache train-baseline [^<]*", (Path(run) / "report.html").read_text())
    assert command and "--column path=picture --column label=finding" in command[0]
    assert "give --data too" in fails(2, *words[:-2], *columns)


def test_a_table_that_lists_a_file_that_is_not_there(tmp_path: Path):
    image_folder(tmp_path / "d", 4)
    (tmp_path / "t.csv").write_text("path,label\nd/ill/000.png,a\nd/gone.png,b\nd/well/001.png,b\n")
    result = extract(tmp_path / "t.csv", code=1)
    assert "d/gone.png" in result.stdout and "1 could not be kept" in result.stdout


def test_an_unknown_command_says_the_nearest():
    assert "Near: train-head" in fails(2, "trainhead")


def test_the_command_that_stores_what_is_missing_has_every_setting_of_the_view(tmp_path: Path):
    image_folder(tmp_path / "my chest", 30)
    rows = "".join(f"{p},{p.parent.name}\n" for p in sorted((tmp_path / "my chest").rglob("*.png")))
    (tmp_path / "my chest" / "t.csv").write_text("file,finding\n" + rows)
    settings = ("--image-size", 48, "--dtype", "float32", "--seed", 3, "--fit", "pad", "--cache", "else where")
    extract(tmp_path / "my chest" / "t.csv", *settings, "--column", "label=finding", "--column", "path=file")
    text = fails(1, "train-head", "--head", "large", "--cache", "else where")
    result = call(*shlex.split(text[text.index("featurecache extract") :])[1:])
    assert result.exit_code == 0, result.output
    stores = json.loads(call("ls", "--cache", "else where", "--json").stdout)["stores"]
    assert [list(store["outputs"]) for store in stores] == [["cls", "tokens"]]


def test_a_strip_too_long_to_be_resized_is_a_named_failure(tmp_path: Path):
    from PIL import Image

    data = image_folder(tmp_path / "d", 3)
    Image.new("L", (60_000, 1)).save(data / "ill" / "strip.png")
    words = ("--backbone", "resnet18", "--random-weights", "--outputs", "gap", "--data", data)
    result = call("extract", *words)
    assert result.exit_code == 1
    assert "ill/strip.png  60,000×1 pixels are too long a strip" in result.stdout


def test_featurecache_alone_is_the_help_and_no_error():
    result = call()
    assert "error" not in result.output
    assert "featurecache demo" in result.output


@pytest.mark.parametrize(
    "words",
    ["extract --backbone vit-demo --data train_data --data test_data", "predict --run a --run b c.png",
     "train-head --features a --head large --features b"],
)  # fmt: skip
def test_what_is_read_is_named_once_where_a_command_takes_one(words):
    """The first folder of two would be left out without a word."""
    result = call(*words.split())
    assert result.exit_code == 2 and "takes one and is given 2 times: leave one." in result.stderr


def test_the_last_of_other_options_counts_and_several_of_those_that_take_several():
    words = ("--data", "t.csv", "--column", "path=a", "--column", "label=b", "--limit", "5", "--limit", "6")
    assert "no folder or file t.csv" in fails(1, "extract", "--backbone", "vit-demo", *words)


def test_help_cuts_no_sentence_and_names_a_commands_own_options_first():
    text = " ".join(call("--help").output.split("Commands, ")[1].split())
    assert "..." not in text
    assert "choose their settings on val, compare them on test study A published study again, from" in text
    own = call("evaluate", "--help").output.split("Options:")[1]
    assert own.index("--run DIR") < own.index("--features") < own.index("--json") < own.index("--debug")


def test_every_example_in_a_help_text_has_options_that_exist():
    helps = [(each.help or "").splitlines() for each in cli.main.commands.values()]
    lines = [line.strip().split("   ")[0] for lines in helps for line in lines]
    examples = [line for line in lines if line.startswith("featurecache ")]
    assert len(examples) > 15
    for example in examples:
        name, *words = shlex.split(example)[1:]
        cli.main.commands[name].make_context(name, words)


def test_a_cache_without_a_view_is_no_mistake_of_the_words():
    assert "there is no view in cache" in fails(1, "train-head", "--head", "linear")


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    data = image_folder(tmp_path / "d", 4)
    assert "cannot" in fails(1, *DEMO, data, "--cache", tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "words",
    [
        *((*DEMO[:-1], *words) for words in (
            ("--weights", "x"), ("--name", "../x"), ("--batch-size", "0"), ("--batch-size", "x"),
            ("--device", "cuda:99"), ("--image-size", "65"), ("--column", "label"))),
        ("extract",),
        ("info", "digits", "--head", "large"),
        ("extract", "--backbone", "x", "--fit", "stretch"),
    ],
)  # fmt: skip
def test_misuse_is_exit_code_2(words: tuple[str, ...]):
    fails(2, *words)


def test_dry_run_and_sheet_write_nothing_but_the_sheet(tmp_path: Path):
    result = extract(image_folder(tmp_path / "d", 8), "--dry-run", "--sheet", "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "cache").exists()
    assert "ill" in result.stdout and "well" in result.stdout and "4" in result.stdout


def test_ls_and_info_say_what_is_in_the_cache(tmp_path: Path):
    extract(image_folder(tmp_path / "d", 8), "--outputs", "cls,tokens")
    text = call("ls").stdout
    assert "vit-demo/d" in text and "8 images, 2 classes (binary)" in text and "tokens" in text
    record = json.loads(call("ls", "--json").stdout)
    assert record["stores"][0]["outputs"]["tokens"]["shards"] == 1
    assert record["stores"][0]["bytes"] > 8 * 66 * 96 * 2
    info = json.loads(call("info", "vit-demo/d", "--json").stdout)
    assert (info["images"], info["classes"], info["untrained"]) == (8, ["ill", "well"], True)
    assert "4" in call("info", "d").stdout
    assert "holds no features yet" in call("ls", "--cache", "other").stdout


def test_info_of_backbones_and_heads():
    text = call("info", "--backbone", "vit-in21k").stdout
    assert "86,389,248 parameters" in text and "197 = cls + 14×14 grid" in text
    assert re.search(r"layers?\.0 … 11 +ViTLayer +\[197,768\] +12 × 7,087,872 +0\n", text)
    assert "1,538" in call("info", "--head", "linear").stdout
    assert "443,906" in call("info", "--head", "large").stdout
    assert "459,266" in call("info", "--head", "large", "--output", "tokens-257").stdout
    assert set(json.loads(call("info", "--json").stdout)["heads"]) >= {"linear", "large", "mlp"}


def test_train_head_and_predict_agree_with_the_library(tmp_path: Path):
    data = image_folder(tmp_path / "d", 60)
    extract(data)
    result = call("train-head", "--head", "linear", "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert "epochs     " in result.stderr and "test (read once)" in result.stdout
    assert "run        runs/d-linear-1/" in result.stdout
    predicted = call("predict", "--run", "runs/d-linear-1", data / "ill", data / "well" / "001.png", "--json")
    records = json.loads(predicted.stdout)["predictions"]
    assert len(records) == 31
    assert abs(sum(records[0]["probabilities"].values()) - 1) < 1e-6
    splits = Counter(
        row["split"] for row in csv.DictReader(Path("runs/d-linear-1/splits.csv").read_text().splitlines())
    )
    used = splits["train"] + splits["val"]
    told = call("predict", "--run", "runs/d-linear-1", data, "--csv", "all.csv").stderr
    assert f"warning    {used} of 60 images were also used to train or choose this head: these numbers are" in told
    assert "runs/d-linear-1" in call("ls").stdout
    told = call("info", "runs/d-linear-1")
    for word in ("epochs 2", "splits     train ", "chosen     epoch ", "again      featurecache train-head --head"):
        assert word in told.stdout
    assert "--only" not in told.stdout
    assert "{" not in told.stdout and "next       featurecache report runs/d-linear-1" in told.stderr


def test_groups_in_two_splits_are_said_before_training_and_listed_by_the_command_that_it_prints(tmp_path: Path):
    image_folder(tmp_path / "d", 60)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted((tmp_path / "d").rglob("*.png"))]
    places = [("train", "val", "test")[k % 3] + f",p{k // 2 if k == 1 else k}" for k in range(60)]
    lines = [f"{row},{place}" for row, place in zip(rows, places, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(["path,label,split,group", *lines]))
    for said in (extract("d.csv", "--dry-run").stdout, extract("d.csv", "--cache", "c").stderr):
        assert "warning    1 group stands in both train and val\n" in said
    head = call("train-head", "--head", "linear", "--epochs", 1, "--no-controls", "--cache", "c", "--no-images")
    command = re.search(r"\(featurecache (leaks .+?); --drop-leaks", head.stderr)
    assert command and re.search("same group +train and val +1 group", call(*shlex.split(command[1])).stdout)


def test_leaks_of_a_sweep_are_those_of_the_head_that_it_chose(tmp_path: Path):
    extract(image_folder(tmp_path / "d", 60))
    words = ("--heads", "linear,ridge", "--epochs", 1, "--no-controls", "--no-images", "--out", "s")
    assert call("ablate", *words).exit_code == 0
    done = call("leaks", "--run", "s")
    assert done.exit_code == 0, done.output
    (chosen,) = re.findall(r"run +(s/heads/\S+) +\(the choice of the sweep s\)", done.stderr)
    assert f"--splits {chosen}/splits.csv" in done.stderr


def test_predict_says_what_decides_of_two_classes_and_that_images_are_nearly_black(tmp_path: Path):
    extract(image_folder(tmp_path / "d", 60))
    call("train-head", "--head", "linear", "--epochs", "1", "--no-controls")
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save("deep.png")
    told = call("predict", "--run", "runs/d-linear-1", "d/ill/000.png", "deep.png").stderr
    cut = json.loads(Path("runs/d-linear-1/config.json").read_text())["calibration"]["thresholds"][0]
    assert f"threshold  well from {cut:.3f} on, as chosen on val\n" in told
    dark = "12-bit values in 16-bit files: nearly black (at most 6.2 % of white); this run was made without --bits"
    assert f"warning    {dark}\n" in told
    assert "nearly black" not in call("predict", "--run", "runs/d-linear-1", "d/ill/000.png").stderr


def test_predict_names_what_it_cannot_read_and_exits_with_1(tmp_path: Path):
    extract(image_folder(tmp_path / "d", 60))
    call("train-head", "--head", "linear", "--epochs", "1", "--no-controls")
    (tmp_path / "bad.png").write_text("text")
    result = call("predict", "--run", "runs/d-linear-1", "bad.png", "d/ill/000.png", "gone.png", "--csv", "-")
    assert result.exit_code == 1
    assert "bad.png" in result.stdout and "gone.png" in result.stdout
    assert "nowhere is not a folder" in fails(1, "predict", "--run", "nowhere", "bad.png")


def test_a_pipe_that_closes_is_no_error(tmp_path: Path):
    script = f"{sys.executable} -c 'import cli; cli.main()' info | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, env=HERE)
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_mistake_of_ours_is_one_line_and_debug_shows_where(monkeypatch):
    def broken(*_: object, **__: object):
        raise ZeroDivisionError("x")

    monkeypatch.setattr("featurecache.commands.inspect.cache_record", broken)
    assert "ZeroDivisionError: x (a mistake of ours; --debug shows where)" in fails(1, "ls")
    assert isinstance(call("ls", "--debug").exception, ZeroDivisionError)
