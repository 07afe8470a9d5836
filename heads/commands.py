"""The commands of the second stage: heads on cached features."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from featurecache.commands import SOURCE_OPTIONS, named_images, options_of
from featurecache.errors import BadOption
from featurecache.terminal import Talk, cache_option, command, features_option
from heads.settings import OPTIMIZERS, PRECISIONS, SCHEDULES, STANDARDIZE


@command
@click.option(
    "--head", required=True, metavar="NAME", help="linear, large, attention, ridge, … (see info); python:MODULE:CLASS."
)
@features_option
@click.option("--output", metavar="NAME", help="cls, tokens, tokens-257, … [default: what the head was made for]")
@click.option("--epochs", default=50)
@click.option("--lr", default=1e-3)
@click.option("--weight-decay", default=0.0, help="On weights only, not on biases.")
@click.option("--optimizer", default="adam", type=click.Choice(OPTIMIZERS))
@click.option("--schedule", default="constant", type=click.Choice(SCHEDULES), help="Of the learning rate.")
@click.option("--dropout", type=float, metavar="P", help="[default: the head's own]")
@click.option("--label-smoothing", default=0.0)
@click.option("--batch-size", default=32)
@click.option("--patience", default=5, help="Epochs without a better val before it stops.")
@click.option("--seed", default=0, help="Of initialisation and dropout.")
@click.option("--split-seed", default=0, help="Of splits and batch order.")
@click.option("--select", default="auroc", help="What chooses the epoch, on val: a metric's name or loss.")
@click.option("--balance/--no-balance", default=True, help="Batches draw the classes equally.")
@click.option("--class-weights", is_flag=True, help="Weigh the loss by 1 / prevalence instead of balancing batches.")
@click.option("--standardize", type=click.Choice(STANDARDIZE), help="[default: the head's own]")
@click.option("--pos-weight", is_flag=True, help="Multi-label: weigh positives by their rarity.")
@click.option("--positive", metavar="CLASS", help="Binary: the class that counts as positive. [default: the second]")
@click.option(
    "--classes", multiple=True, metavar="NAME[=A,B]", help="Another task on the same cache: classes kept or merged."
)
@click.option("--only", metavar="A,B", help="Train and test on these classes only.")
@click.option(
    "--train-per-class", type=int, metavar="N", help="N training images of each class; the rest are left out."
)
@click.option("--fraction", default=1.0, help="Of train, after val is taken; smaller ones are parts of larger ones.")
@click.option(
    "--folds", type=int, metavar="N", help="With --fold: train and val cut in N parts, of which one is tested."
)
@click.option("--fold", type=int, metavar="K", help="0 to N - 1.")
@click.option("--resplit-val", is_flag=True, help="Return val to train and draw a new one.")
@click.option("--splits", metavar="FILE", help="A splits.csv of another run.")
@click.option(
    "--drop-leaks", is_flag=True, help="Leave out of train what is also in val or test, of val what is also in test."
)
@click.option(
    "--sensitivity", type=float, metavar="S", help="Threshold: the highest that reaches S on val. [default: Youden's]"
)
@click.option("--gated", is_flag=True, help="attention only: gated pooling.")
@click.option("--precision", default="fp32", type=click.Choice(PRECISIONS), help="Of the head's products.")
@click.option(
    "--ram",
    type=float,
    metavar="GB",
    help="Features beyond it are read from the shards. [default: 60 % of what is free]",
)
@click.option(
    "--controls/--no-controls", default=None, help="Chance, majority, pixels beside it. [default: if untrained]"
)
@click.option("--out", metavar="DIR", help="Run folder. [default: runs/VIEW-HEAD-N]")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--no-images", is_flag=True, help="Embed no image of the data in report.html.")
@click.option("--hash-ids", is_flag=True, help="Write ids as keyed hashes in the report.")
@cache_option
def train_head(talk: Talk, features: str | None, cache: str | None, no_images: bool, **options: Any) -> int:
    """Train a head on cached features; val chooses, test is read once afterwards.

    \b
    featurecache train-head --head large
    featurecache train-head --head linear --features vit-in21k/chest --seed 1
    """
    _check_output(options["output"])
    import heads
    from featurecache.views import open_view
    from heads.tables import final_table

    view = open_view(features, cache)
    if not features:
        talk.say(f"view       {view.label}   (the newest; --features chooses)")
    run = heads.train_head(view, options.pop("head"), say=talk.line, images=not no_images, **options)
    text = final_table(run, run.metrics["comparison"])
    talk.result(f"{text}\nrun        {run.path}/   report.html in it", {"run": str(run.path), **run.metrics})
    talk.next(f"featurecache predict --run {shlex.quote(str(run.path))} IMAGE…")
    return 0


@command
@click.option("--arch", required=True, metavar="NAME", help="One of those below, or finetune:<backbone>.")
@click.option("--data", metavar="SOURCE", help="Images and labels, as for extract. [default: those of --features]")
@options_of(SOURCE_OPTIONS)
@features_option
@click.option("--image-size", type=int, metavar="N", help="Pixels. [default: the network's own]")
@click.option("--epochs", type=int, metavar="N")
@click.option("--lr", type=float, metavar="X")
@click.option("--weight-decay", type=float, metavar="X", help="On weights only, not on biases.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="sgd has momentum 0.9.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate.")
@click.option("--augment", metavar="WORDS", help="none, or flip,rotate10,shift0.1, drawn anew in every batch.")
@click.option("--dropout", type=float, metavar="P")
@click.option("--label-smoothing", type=float, metavar="X")
@click.option("--batch-size", type=int, metavar="N")
@click.option("--patience", type=int, metavar="N", help="Epochs without a better val before it stops; 0: never.")
@click.option("--seed", default=0, help="Of initialisation, dropout and augmentation.")
@click.option("--split-seed", default=0, help="Of splits and batch order.")
@click.option("--select", metavar="NAME", help="What chooses the epoch, on val: a metric's name or loss.")
@click.option("--balance/--no-balance", default=None, help="Batches draw the classes equally.")
@click.option("--class-weights", is_flag=True, default=None, help="Weigh the loss by 1 / prevalence.")
@click.option("--pos-weight", is_flag=True, default=None, help="Multi-label: weigh positives by their rarity.")
@click.option("--positive", metavar="CLASS", help="Binary: the class that counts as positive. [default: the second]")
@click.option("--classes", multiple=True, metavar="NAME[=A,B]", help="Classes kept or merged.")
@click.option("--only", metavar="A,B", help="Train and test on these classes only.")
@click.option("--train-per-class", type=int, metavar="N", help="N training images of each class.")
@click.option("--fraction", type=float, metavar="P", help="Of train, after val is taken.")
@click.option("--resplit-val", is_flag=True, default=None, help="Return val to train and draw a new one.")
@click.option("--splits", metavar="FILE", help="A splits.csv of another run.")
@click.option("--drop-leaks", is_flag=True, default=None, help="Leave out of train what is also in val or test.")
@click.option("--sensitivity", type=float, metavar="S", help="Threshold: the highest that reaches S on val.")
@click.option("--lora", type=int, metavar="RANK", help="finetune: only adapters of this rank are trained.")
@click.option("--rlrr", is_flag=True, default=None, help="finetune: only low-rank rescalings are trained.")
@click.option("--weights", metavar="PATH", help="finetune: a file or folder with the backbone's weights.")
@click.option("--random-weights", is_flag=True, default=None, help="finetune: the architecture from scratch.")
@click.option("--device", default="auto", help="auto, cpu, cuda, mps.")
@click.option("--controls", is_flag=True, help="Chance, the majority class and raw pixels beside it.")
@click.option("--out", metavar="DIR", help="Run folder. [default: runs/DATA-ARCH-N]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training of these settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out; begin an interrupted training anew.")
@click.option("--no-images", is_flag=True, help="Embed no image of the data in report.html.")
@click.option("--hash-ids", is_flag=True, help="Write ids as keyed hashes in the report.")
@cache_option
def train_baseline(
    talk: Talk, arch: str, data: str | None, columns: tuple[str, ...], task: str | None, features: str | None,
    cache: str | None, no_images: bool, **options: Any,
) -> int:  # fmt: skip
    """Train a network from pixels, to be compared with heads: same splits, same choice, same measures.

    \b
    featurecache train-baseline --arch cnn-medical-mnist --data medical-mnist/
    featurecache train-baseline --arch finetune:vit-in1k --features vit-in21k/chest --lora 8
    featurecache train-baseline --arch cnn-cifar --data digits --augment none --lr 3e-4

    \b
    cnn-mindlina       three blocks at 256 pixels: a stand-in for an unpublished network
    cnn-medical-mnist  three blocks at 224 pixels, 3.4 M parameters
    cnn-cifar          six residual blocks at 32 pixels, 0.2 M parameters
    vit-cifar          a small ViT at 32 pixels, 1.2 M parameters
    finetune:BACKBONE  a pretrained network, all its weights or adapters

    What is left out is as published; the first lines say what that is. ablate takes these names among --heads, and
    several values of an option.
    """
    import heads
    from heads.runs import BACKBONE
    from heads.tables import final_table

    if data is not None and features is not None:
        raise BadOption("--data and --features both say which images; give one of them.")
    images = named_images(data, columns, task)
    if images is None:
        from featurecache.views import open_view

        images = open_view(features, cache)
        if not features:
            talk.say(f"view       {images.label}   (the newest; --features or --data chooses)")
    options["classes"] = options["classes"] or None
    run = heads.train_baseline(
        images, arch, say=talk.line, images=not no_images, progress=talk.progress, **options
    )  # fmt: skip
    text = final_table(run, run.metrics["comparison"])
    talk.result(f"{text}\nrun        {run.path}/   report.html in it", {"run": str(run.path), **run.metrics})
    if (run.path / BACKBONE).is_dir():
        from heads.networks.finetune import extract_words

        talk.next(f"featurecache extract {extract_words(run.path / BACKBONE)} --data FOLDER")
    else:
        talk.next(f"featurecache predict --run {shlex.quote(str(run.path))} IMAGE…")
    return 0


def _check_output(output: str | None) -> None:
    if output is not None:
        from featurecache.outputs import parse

        parse(output)


@command
@click.option("--run", "run", required=True, metavar="DIR", help="A run folder of train-head.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write a CSV instead of a table ('-' for stdout).")
@click.option("--device", default="auto", help="auto, cpu, cuda, mps.")
@click.option("--weights", metavar="PATH", help="Where the backbone's weights are now, if not where they were.")
@click.option("--trust-code", is_flag=True, help="Import the module of a python: head or backbone.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE…")
def predict(
    talk: Talk, run: str, csv_file: str | None, trust_code: bool, images: tuple[str, ...], **options: Any
) -> int:  # fmt: skip
    """Class and calibrated probability of new images, folders or tables.

    \b
    featurecache predict --run runs/chest-large-1 new.png folder/
    """
    import heads
    from heads import prediction

    loaded = heads.load_run(run, trust_code=trust_code)
    if loaded.untrained:
        talk.say("warning    the backbone of this run was never trained: its answers show the tool, nothing else")
    records = heads.predict(loaded, list(images), say=talk.say, **options)
    if csv_file and csv_file != "-":
        from featurecache.files import write_whole

        write_whole(Path(csv_file), prediction.as_csv(records).encode())
        talk.say(f"predictions {csv_file}")
    if talk.json:
        talk.result("", {"run": str(loaded.path), "predictions": records})
    elif csv_file == "-":
        click.echo(prediction.as_csv(records), nl=False)
    elif not csv_file:
        click.echo(prediction.as_table(records))
    talk.next(f"featurecache info {shlex.quote(run)}")
    return int(any("error" in record for record in records))
