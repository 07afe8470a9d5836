"""The options of ``featurecache ablate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from featurecache.terminal import cache_option
from heads.settings import PRECISIONS, STANDARDIZE

_OPTIONS = (
    click.option("--heads", required=True, metavar="A,B", help="linear, large, attention, ridge, … (see info)."),
    click.option("--features", metavar="V,W", help="Views of the same images. [default: that of the last extraction]"),
    click.option("--outputs", metavar="A,B", help="cls,tokens,… each head takes those that fit it. [default: its own]"),
    click.option("--lr", default="1e-3", metavar="GRID", help="1e-3, or 1e-3,1e-2, or 1e-4..1e-2:5."),
    click.option("--weight-decay", default="0", metavar="GRID", help="On weights only, not on biases."),
    click.option("--dropout", metavar="GRID", help="Of heads that have it. [default: the head's own]"),
    click.option("--label-smoothing", default="0", metavar="GRID"),
    click.option("--optimizer", default="adam", metavar="A,B", help="adam, adamw."),
    click.option("--schedule", default="constant", metavar="A,B", help="constant, cosine, plateau."),
    click.option("--seeds", default=1, metavar="N", help="Initialisations 0 … N-1 of every setting."),
    click.option("--fractions", default="1", metavar="GRID", help="Of train: 0.01,0.1,1; smaller ones are in larger."),
    click.option("--repeats", default=1, metavar="N", help="Draws of splits and fractions."),
    click.option(
        "--folds", type=int, metavar="K", help="Cross-validate over train and val; a given test is left alone."
    ),
    click.option("--search", type=click.Choice(["optuna"]), help="Search in ranges a..b instead of a grid."),
    click.option("--trials", type=int, metavar="N", help="With --search: of each head, output and view."),
    click.option("--epochs", default=50),
    click.option("--batch-size", default=32),
    click.option("--patience", default=5, help="Epochs without a better val before a head stops."),
    click.option("--split-seed", default=0, help="Of splits, fractions, folds and batch order."),
    click.option("--select", default="auroc", help="What chooses epoch and setting, on val: a metric's name or loss."),
    click.option("--balance/--no-balance", default=True, help="Batches draw the classes equally."),
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


def sweep_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of them, in help in their order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
