"""Names that a person types: a misspelt one ends with 2 and its neighbour before anything is decoded, computed or
written; of every command every option that takes a name."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from support.command import call
from support.pictures import image_folder

import cli
import heads
from featurecache import extract
from featurecache.extraction import pipeline, run
from featurecache.maintenance.export import export_view
from featurecache.store.view import View

pytestmark = pytest.mark.integration
CACHE, RUN = ("--cache", "cache"), ("--run", "run")
MAKE = ("extract", "--backbone", "vit-demo", "--random-weights", "--outputs", "cls")
TRAIN, ABLATE = ("train-head", "--head", "ridge", "--features", "d"), ("ablate", "--heads", "ridge", "--features", "d")
NET = ("train-baseline", "--arch", "cnn-cifar", "--data", "d")
TABLE, SET = ("--data", "d/list.csv"), ("medmnist:bloodmnis", "bloodmnist")
STEP = ("pneumonia-hed", "pneumonia-heads")
OF_TRAINING = {
    "--select": ("aurok", "auroc"), "--positive": ("wel", "well"), "--only": ("ill,wel", "well"),
    "--classes": ("wel=well,il", "ill"),
}  # fmt: skip
# Command -> (words that are right, option -> (misspelt, what is near, more words; None: without --features, --data)).
NAMES = {
    "extract": (MAKE, {
        "--backbone": ("vit-dmo", "vit-demo"), "--data": SET, "--outputs": ("cls,tokns", "tokens"),
        "--column": ("lable=x", "label", *TABLE), "--order": ("wel,ill", "well", "--data", "d"),
        "--augment": ("filp", "flip", "--copies", "1"), "--leave-out": ("il", "ill", "--data", "d"),
    }),
    "train-head": (TRAIN, OF_TRAINING | {
        "--head": ("rigde", "ridge"), "--output": ("clss", "cls"), "--features": ("vit-demo/dd", "vit-demo/d"),
    }),
    "train-baseline": (NET, OF_TRAINING | {
        "--arch": ("cnn-cifr", "cnn-cifar"), "--data": SET, "--augment": ("filp", "flip"),
        "--features": ("vit-demo/dd", "vit-demo/d", None), "--order": ("wel,ill", "well"),
        "--column": ("label=finding", "findings", *TABLE), "--leave-out": ("il", "ill"),
    }),
    "ablate": (ABLATE, OF_TRAINING | {
        "--heads": ("ridge,lienar", "linear"), "--outputs": ("clss", "cls"),
        "--features": ("d,vit-demo/dd", "vit-demo/d"), "--optimizer": ("adma", "adam"),
        "--schedule": ("cosin", "cosine"), "--augment": ("filp", "flip"),
        "--reference": ("ridge on clss", "ridge on cls"), "--data": (*SET, "--heads", "cnn-cifar", None),
        "--order": ("wel,ill", "well", "--heads", "cnn-cifar", "--data", "d", None),
        "--column": ("label=finding", "findings", "--heads", "cnn-cifar", *TABLE, None),
        "--leave-out": ("il", "ill", "--heads", "cnn-cifar", "--data", "d", None),
    }),
    "evaluate": (("evaluate", *RUN, "--features", "d"), {"--features": ("dd", "d"), "--classes": ("wel=well", "well")}),
    "report": (("report", "run"), {"--reference": ("ridge on clss", "ridge on cls"), "--by": ("siet", "site")}),
    "explain": (("explain", *RUN, "d/ill/000.png"), {"--kind": ("atention", "attention"), "--class": ("wel", "well")}),
    "predict": (("predict", *RUN, "d/list.csv"), {"--column": ("label=finding", "findings")}),
    "study": (("study",), {
        "": ("pnuemonia", "pneumonia"), "--only": (*STEP, "mindlina"), "--skip": (*STEP, "mindlina"),
        "--data": ("cifr10=d", "cifar10", "cifar-tinyimagenet"), "--weights": ("resnet5=x", "resnet50", "pneumonia"),
    }),
    "info": (("info",), {
        "": ("dd", "d"), "--backbone": ("vit-dmo", "vit-demo"), "--head": ("rigde", "ridge"),
        "--output": ("clss", "cls", "--head", "ridge"), "--features": ("dd", "d", "--head", "ridge"),
    }),
    "export": (("export", "d", "new.npz"), {"--outputs": ("clss", "cls")}),
    "import": (("import", "set.npz", "--name", "new"), {
        "--features-key": ("clss", "cls"), "--ids-key": ("idss", "ids"), "--splits-key": ("spits", "splits"),
        "--groups-key": ("label", "labels"), "--labels": ("lables", "labels"),
        "--output": ("clss", "cls", "--features-key", "cls"), "--order": ("il,well", "ill"),
        "--column": ("label=finding", "findings", "--labels", "d/list.csv"),
    }),
    "why": (("why", *MAKE[1:]), {}),
    "leaks": (("leaks",), {"": ("dd", "d"), "--output": ("clss", "cls", "d")}),
    **{name: ((name,), {"": ("dd", "d")}) for name in ("verify", "repair", "compact")},
    "rm": (("rm", "--yes"), {"": ("dd", "d")}),
}  # fmt: skip
NO_NAMES = {"DIR", "FILE", "FILE.png", "PATH", "GRID", "N", "X", "P", "C", "K", "B", "N|all", "HxW", "SIZE"}
NEW = {("extract", "--name"), ("why", "--name"), ("import", "--name"), ("import", "--classes"), ("import", "--prefix")}
ELSEWHERE = {"--device", "--crop", "--address"}  # of torch; numbers; of Ray
OF_IMAGES = {
    "--data",
    "--column",
    "--order",
    "--leave-out",
}  # of evaluate: for networks from pixels, and read as for train-baseline


def takes_name(command: str, each: click.Parameter) -> bool:
    free = isinstance(each, click.Option) and not each.is_flag and each.type is click.STRING
    return free and not ({each.metavar} & NO_NAMES or each.opts[0] in ELSEWHERE or (command, each.opts[0]) in NEW)


def test_every_option_that_takes_a_name_is_here():
    for name, command in cli.main.commands.items():
        options = {each.opts[0] for each in command.params if takes_name(name, each)}
        there = set(NAMES.get(name, ((), {}))[1]) - {""}
        as_others = {"why": options, "evaluate": OF_IMAGES}.get(name, set())  # why: those of extract
        assert options <= there | as_others, (name, options - there)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Images in folders and in a table, their features in a cache and in a file, and a head."""
    folder = tmp_path_factory.mktemp("names")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = image_folder(folder / "d", 40)
        rows = [
            f"{path.relative_to(data)},{path.parent.name},{i % 2}" for i, path in enumerate(sorted(data.rglob("*.png")))
        ]
        (data / "list.csv").write_text("\n".join(["path,findings,site", *rows]))
        options = {"backbone": "vit-demo", "random_weights": True, "outputs": "cls", "cache": "cache", "name": "d"}
        view = View(extract("d/list.csv", columns={"label": "findings"}, **options).view)
        heads.train_head(view, "ridge", out="run", controls=False, report=False)
        export_view(view, "set.npz")
    return folder


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name, (_, all_) in NAMES.items() for option in all_]
)
def test_a_misspelt_name_ends_with_2_and_its_neighbour_and_nothing_is_done(made, monkeypatch, command, option):
    monkeypatch.chdir(made)
    for owner, name in ((pipeline, "decode_many"), (run, "run"), (heads.api, "train_together")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it has begun"), raising=False)
    words, options = NAMES[command]
    wrong, near, *more = options[option]
    bare, more = None in more, [word for word in more if word is not None]
    for name in ("--features", "--data"):  # which a command takes once
        if name in words and (bare or name in (*more, option)):
            start = words.index(name)
            words = words[:start] + words[start + 2 :]
    before = sorted(made.rglob("*"))
    result = call(*words, *more, *([option] if option else []), wrong)
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1, result.output
    said = result.stderr.partition("Near: ")[2] or result.stderr
    assert near.rstrip(".") in said, result.stderr
    assert sorted(made.rglob("*")) == before
