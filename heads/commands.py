"""The commands of the second stage: heads on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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
    talk.next(f"featurecache predict --run {run.path} IMAGE…")
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
    talk.next(f"featurecache info {run}")
    return int(any("error" in record for record in records))
