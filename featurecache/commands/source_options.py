"""Options of commands that say which images are meant and how they are read, and how a command opens them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click import Choice

from featurecache.commands.help import option, options_of
from featurecache.commands.terminal import Console
from featurecache.errors import BadOption
from featurecache.formatting import names_in

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset


def _order(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else names_in(value)


def _crop(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(edge) for edge in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"--crop {value}: it is four numbers, such as 0.1,0.05,0.9,0.95.") from error


TASKS = ("binary", "multiclass", "ordinal", "multilabel")
SOURCES = "Folder, table, .npz, medmnist:NAME, torchvision:NAME, hf:NAME, kaggle:OWNER/SET, or digits."
task_option = option("--task", type=Choice(TASKS), help="What the labels are. [default: by the labels]")
order_option = option("--order", metavar="A,B,C", callback=_order, help="The classes from the lowest to the highest.")
uncertain_option = option(
    "--uncertain", type=Choice(["ignore", "zero", "one"]), help="Of tables: what -1 is. [default: ignore]"
)
letter_case_option = option(
    "--letter-case", type=Choice(["ignore", "keep"]), help="Classes that differ in it alone: one, or two."
)
READ_BY = (
    "columns", "task", "classes_at", "leave_out", "order", "root", "uncertain", "letter_case", "page", "bits", "crop",
    "limit", "limit_seed",
)  # fmt: skip
source_options = options_of(  # how the labels of --data are to be read
    option(
        "--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of tables: path=…, label=…, split=…, group=…"
    ),
    task_option,
    option("--root", metavar="DIR", help="Of tables: the folder of the images. [default: that of the table]"),
    uncertain_option,
    option("--classes-at", type=int, metavar="LEVEL", help="Of folders: the level of the classes; 1: those in --data."),
    option("--leave-out", multiple=True, metavar="FOLDER", help="Of folders: one in --data that is no part of it."),
    letter_case_option,
    order_option,
    option("--page", metavar="N|all", help="Of TIFF stacks, DICOM frames (from 0). [default: TIFF 0, DICOM all]"),
    option("--bits", type=int, metavar="N", help="Of 16-bit files: 2^N − 1 is white; others are as they are."),
    option("--crop", metavar="L,T,R,B", callback=_crop, help="Edges of what is looked at, in parts of each side."),
    option("--limit", type=int, metavar="N", help="N of the images only, drawn by class within the splits."),
    option("--limit-seed", type=int, metavar="N", help="Of what --limit draws. [default: 0]"),
    section="data",
)


def named_images(talk: Console, data: str | None, options: dict[str, Any]) -> Callable[[], Dataset] | None:
    """What opens the dataset that --data and the `source_options` name, which are taken out of ``options``, and says
    how it was read: other names are checked first. None without --data."""
    how = {name: value for name in READ_BY if (value := options.pop(name)) not in (None, ())}
    if data is None:
        if how:
            given = " and ".join(f"--{'column' if name == 'columns' else name.replace('_', '-')}" for name in how)
            raise BadOption(f"{given} says how --data is read; give --data too.")
        return None
    columns = pairs_of(how.get("columns", ()))

    def open_it() -> Dataset:
        from featurecache.sources import open_source

        dataset = open_source(data, **how | {"columns": columns})
        if understood := dataset.source.get("understood"):
            talk.line(f"understood {understood}")
        return dataset

    return open_it


def pairs_of(columns: tuple[str, ...]) -> dict[str, str] | None:
    for pair in columns:
        if "=" not in pair:
            raise BadOption(f'--column takes ROLE=NAME (--column label=finding), not "{pair}".')
    return dict(pair.split("=", 1) for pair in columns) or None
