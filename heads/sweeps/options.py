"""The options of ``featurecache ablate``."""

from __future__ import annotations

import click

from featurecache.commands import SOURCE_OPTIONS, options_of
from featurecache.terminal import cache_option
from heads.settings import PRECISIONS, STANDARDIZE

_OPTIONS = (
    click.option(
        "--heads",
        required=True,
        metavar="A,B",
        help="linear, large, ridge, … (see info), cnn-cifar, finetune:resnet50, …",
    ),
    click.option("--features", metavar="V,W", help="Views of the same images. [default: that of the last extraction]"),
    click.option("--data", metavar="SOURCE", help="Images for networks from pixels, where no view has them."),
    *SOURCE_OPTIONS,
    click.option("--outputs", metavar="A,B", help="cls,tokens,… each head takes those that fit it. [default: its own]"),
    click.option("--lr", metavar="GRID", help="1e-3, or 1e-3,1e-2, or 1e-4..1e-2:5. [default: 1e-3]"),
    click.option("--weight-decay", metavar="GRID", help="On weights only, not on biases. [default: 0]"),
    click.option("--dropout", metavar="GRID", help="Of heads that have it. [default: the head's own]"),
    click.option("--label-smoothing", metavar="GRID", help="[default: 0]"),
    click.option("--optimizer", metavar="A,B", help="adam, adamw, sgd. [default: adam]"),
    click.option("--schedule", metavar="A,B", help="constant, cosine, plateau. [default: constant]"),
    click.option(
        "--augment", multiple=True, metavar="WORDS", help="Of networks from pixels; several times for several."
    ),
    click.option("--image-size", type=int, metavar="N", help="Of networks from pixels. [default: their own]"),
    click.option("--lora", type=int, metavar="RANK", help="Of finetune:…: only adapters of this rank are trained."),
    click.option("--rlrr", is_flag=True, default=None, help="Of finetune:…: only low-rank rescalings are trained."),
    click.option("--weights", metavar="PATH", help="Of finetune:…: a file or folder with the backbone's weights."),
    click.option("--random-weights", is_flag=True, default=None, help="Of finetune:…: the architecture from scratch."),
    click.option("--device", default="auto", help="Of networks from pixels: auto, cpu, cuda, mps."),
    click.option("--seeds", default=1, metavar="N", help="Initialisations 0 … N-1 of every setting."),
    click.option("--fractions", default="1", metavar="GRID", help="Of train: 0.01,0.1,1; smaller ones are in larger."),
    click.option("--repeats", default=1, metavar="N", help="Draws of splits and fractions."),
    click.option(
        "--folds", type=int, metavar="K", help="Cross-validate over train and val; a given test is left alone."
    ),
    click.option("--search", type=click.Choice(["optuna"]), help="Search in ranges a..b instead of a grid."),
    click.option("--trials", type=int, metavar="N", help="With --search: of each head, output and view."),
    click.option("--epochs", type=int, metavar="N", help="[default: 50; of networks from pixels as published]"),
    click.option("--batch-size", type=int, metavar="N", help="[default: 32; of networks from pixels as published]"),
    click.option("--patience", type=int, metavar="N", help="Epochs without a better val. [default: 5; as published]"),
    click.option("--split-seed", default=0, help="Of splits, fractions, folds and batch order."),
    click.option("--select", default="auroc", help="What chooses epoch and setting, on val: a metric's name or loss."),
    click.option(
        "--balance/--no-balance", default=None, help="Batches draw the classes equally. [default: on; as published]"
    ),
    click.option("--class-weights", is_flag=True, help="Weigh the loss instead of balancing batches."),
    click.option("--standardize", type=click.Choice(STANDARDIZE), help="[default: each head's own]"),
    click.option("--pos-weight", is_flag=True, help="Multi-label: weigh positives by their rarity."),
    click.option(
        "--positive", metavar="CLASS", help="Binary: the class that counts as positive. [default: the second]"
    ),
    click.option("--classes", multiple=True, metavar="NAME[=A,B]", help="Classes kept or merged."),
    click.option("--only", metavar="A,B", help="Train and test on these classes only."),
    click.option("--train-per-class", type=int, metavar="N", help="N training images of each class."),
    click.option("--resplit-val", is_flag=True, help="Return val to train and draw a new one."),
    click.option("--splits", metavar="FILE", help="A splits.csv of a run."),
    click.option("--drop-leaks", is_flag=True, help="Leave out of train what is also in val or test."),
    click.option("--sensitivity", type=float, metavar="S", help="Threshold: the highest that reaches S on val."),
    click.option("--gated", is_flag=True, help="attention only: gated pooling."),
    click.option("--precision", default="fp32", type=click.Choice(PRECISIONS), help="Of the heads' products."),
    click.option("--ram", type=float, metavar="GB", help="Features beyond it are read from the shards."),
    click.option("--controls/--no-controls", default=None, help="Chance, majority, pixels. [default: if untrained]"),
    click.option("--out", metavar="DIR", help="A new folder, or one to go on in. [default: runs/ablate-VIEW-N]"),
    click.option("--dry-run", is_flag=True, help="Say what would be trained; write nothing."),
    click.option("--reference", metavar="NAME", help="A head of the table: the others against it, paired."),
    click.option("--show-test", type=click.Choice(["chosen", "all"]), default="chosen", help="Test of which settings."),
    click.option("--no-images", is_flag=True, help="Embed no image of the data in report.html."),
    click.option("--hash-ids", is_flag=True, help="Write ids as keyed hashes in the report."),
    cache_option,
)

sweep_options = options_of(_OPTIONS)
