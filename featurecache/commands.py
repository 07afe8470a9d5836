"""The commands of the first stage: images and a backbone into the cache."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featurecache.errors import BadOption
from featurecache.terminal import Talk, cache_option, command


class BatchSize(click.ParamType):
    """A number, or auto."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value in (None, "auto") else click.INT.convert(value, param, ctx)


SOURCE_OPTIONS = (  # how the labels of --data are to be read
    click.option(
        "--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of a table: path=…, label=…, split=…, group=…"
    ),
    click.option(
        "--task", type=click.Choice(["binary", "multiclass", "ordinal", "multilabel"]), help="[default: by the labels]"
    ),
)
EXTRACTION = (  # which images, which backbone, which store: what `extract` and `why` are asked alike
    click.option(
        "--backbone",
        required=True,
        metavar="NAME",
        help="An alias (see info), hf:REPO, a folder, torchvision:NAME, timm:NAME, python:MODULE:FACTORY[:LAYER].",
    ),
    click.option(
        "--data",
        default="digits",
        metavar="SOURCE",
        help="Folder, table, .npz, medmnist:NAME, torchvision:NAME, hf:NAME, kaggle:OWNER/SET, or digits.",
    ),
    click.option("--outputs", metavar="NAMES", help="cls,tokens,… [default: the backbone's vector and tokens]"),
    click.option("--name", metavar="VIEW", help="Name of the view. [default: that of the data]"),
    click.option("--weights", metavar="PATH", help="A folder or file with the backbone's weights."),
    click.option(
        "--random-weights", is_flag=True, help="The architecture untrained: shows the tool, not the backbone."
    ),
    click.option("--seed", default=0, help="Of --random-weights."),
    click.option("--image-size", type=int, metavar="N", help="Pixels; resize and crop scale in the same ratio."),
    click.option(
        "--fit", type=click.Choice(["model", "squash", "pad"]), default="model", help="How an image becomes a square."
    ),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto"),
    click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the stored rows."),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps."),
    click.option(
        "--batch-size", type=BatchSize(), default="auto", help="Rows of a forward pass; fixed by a store's first run."
    ),
    click.option("--engine", type=click.Choice(["local"]), default="local", help="Where it runs: on this machine."),
    click.option("--workers", type=int, metavar="N", help="Decode threads, nothing else. [default: by the machine]"),
    click.option(
        "--on-error", type=click.Choice(["report", "skip", "fail"]), default="report", help="At an unreadable image."
    ),
    *SOURCE_OPTIONS,
    click.option(
        "--views", type=int, metavar="K", help="Augmented copies of each training image. [default: as before]"
    ),
    click.option(
        "--augment", metavar="STEPS", help="How copies differ: flip,rotate10,shift0.1 (also vflip, scale0.1, …)"
    ),
    click.option("--augment-seed", default=0, metavar="N", help="Of what --augment draws."),
    click.option("--hash-ids", is_flag=True, help="Keep images under keyed hashes of their names."),
    click.option("--hash-groups", is_flag=True, help="The same for groups (patients)."),
    cache_option,
)


def options_of(several: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    """Several options at once, in help in their order."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(several):
            function = option(function)
        return function

    return declare


@command
@options_of(EXTRACTION)
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@click.option("--sheet", metavar="FILE.png", help="Write a contact sheet of the images.")
@click.option(
    "--accept-drift", is_flag=True, help="If this machine computes other features than the store: a new generation."
)
@click.option("--yes", is_flag=True, help="Do not ask before keeping more than 20 GB.")
def extract(
    talk: Talk, dry_run: bool, sheet: str | None, yes: bool, columns: tuple[str, ...], engine: str, **options: Any
) -> int:  # fmt: skip
    """Run a backbone over images once and keep its outputs.

    \b
    featurecache extract --backbone vit-in21k --data chest/ --outputs cls,tokens
    """
    from featurecache import console, planning
    from featurecache.reader import View

    if options["data"] == "digits":
        talk.say("data       digits: scikit-learn's 1,797 handwritten digits; give your own with --data FOLDER")
    prepared = planning.prepare(
        options.pop("data"), columns=_pairs(columns), remember=not dry_run, progress=talk.progress, **options
    )
    if sheet:
        from featurecache.sources import contact_sheet

        contact_sheet(prepared.dataset, Path(sheet))
    rate = prepared.estimate()
    record = console.extraction_record(prepared, rate)
    if dry_run:
        lines = [console.extraction_lines(prepared, record), "", str(console.data_of(prepared))]
        talk.result("\n".join(lines), {**record, "sheet": sheet})
        talk.next("the same command without --dry-run")
        return 0
    talk.say(console.extraction_lines(prepared, record))
    if sheet:
        talk.say(f"sheet      {sheet}")
    _ask(prepared, yes)
    result = prepared.run(progress=talk.progress, rate=rate)
    label = View(result.view, columns_only=True).label
    talk.result(console.result_lines(result, label), console.result_record(result))
    talk.next(f"featurecache train-head --head {'large' if 'tokens' in result.outputs else 'linear'}", options["cache"])
    return int(bool(result.failed) and options["on_error"] != "skip")


def _ask(prepared: Any, yes: bool) -> None:
    from featurecache.amounts import size_text
    from featurecache.extraction import ASK_BYTES

    prepared.check_disk()
    if prepared.new_bytes > ASK_BYTES and not yes and sys.stdin.isatty():
        click.confirm(f"keep {size_text(prepared.new_bytes)}?", abort=True, err=True)


def named_images(data: str | None, columns: tuple[str, ...], task: str | None) -> Any:
    """What --data, --column and --task name: a dataset where one of the last two is given, else ``data`` as it is."""
    if not columns and task is None:
        return data
    if data is None:
        raise BadOption("--column and --task say how --data is read; give --data too.")
    from featurecache.sources import open_source

    return open_source(data, columns=_pairs(columns), task=task)


def _pairs(columns: tuple[str, ...]) -> dict[str, str] | None:
    for pair in columns:
        if "=" not in pair:
            raise BadOption(f'--column takes ROLE=NAME (--column label=finding), not "{pair}".')
    return dict(pair.split("=", 1) for pair in columns) or None


_OF_IMAGES = (
    "name", "batch_size", "engine", "workers", "on_error", "columns", "task", "hash_ids", "hash_groups", "views",
    "augment", "augment_seed",
)  # fmt: skip


@command
@options_of(EXTRACTION)
def why(talk: Talk, columns: tuple[str, ...], engine: str, cache: str | None, **options: Any) -> int:
    """Say what `extract` with these options would find, and which field of the key differs from the nearest store.

    \b
    featurecache why --backbone vit-in21k --image-size 256 --data chest/

    Without --data the key alone is looked up.
    """
    from featurecache.why import explain

    given = _given()
    data = options.pop("data") if "data" in given else None
    if data is None and (needless := [name for name in _OF_IMAGES if name in given]):
        raise BadOption(f"{given[needless[0]][0]} is about the images; say which with --data.")
    if data is None:
        for name in ("data", *_OF_IMAGES):
            options.pop(name, None)
        found = explain(cache=cache, **options)
    else:
        found = explain(data, cache=cache, columns=_pairs(columns), progress=talk.progress, **options)
    talk.result(str(found), found.record())
    words = [word for name, part in given.items() for word in part]
    talk.next(shlex.join(["featurecache", "extract", *words, *([] if data else ["--data", "FOLDER"])]))
    return 0


def _given() -> dict[str, list[str]]:
    """Option -> the words that give it again, of those that were typed."""
    context, found = click.get_current_context(), {}
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        typed = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if typed and name not in ("as_json", "quiet", "debug"):
            flag, values = option.opts[0], value if isinstance(value, tuple) else (value,)
            found[name] = [word for v in values for word in ([flag] if v is True else [flag, str(v)])]
    return found
