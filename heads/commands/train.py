"""Train-head, train-baseline, predict.

The commands of the second stage: heads on cached features.

The whole of the tool in about a minute: digits, a small untrained ViT, three heads and the controls.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurecache.commands.extract import SOURCE_OPTIONS, named_images, options_of
from featurecache.commands.terminal import Console, cache_option, command, features_option
from featurecache.errors import BadOption

if TYPE_CHECKING:
    from heads.runs.run import Run

_TAKERS = {
    "train-head": ("any", "head"),
    "train-baseline": ("any", "network", "finetune"),
    "ablate": ("any", "head", "network", "finetune"),
}
_OF_ONE_HEAD = ("output", "seed", "fraction", "folds", "fold")  # of which a sweep has several: options of its own
_NUMBERS: dict[str, tuple[type, str]] = {"int": (int, "N"), "float": (float, "X")}
page_options = options_of(
    (
        click.option("--no-images", is_flag=True, help="Embed no image of the data in report.html."),
        click.option("--hash-ids", is_flag=True, help="Write ids as keyed hashes in the report."),
    )
)


def training_options(name: str) -> Callable[..., Any]:
    """The options of `heads.settings.Settings` that a command has; without a value they are as published for networks
    from pixels, and the defaults of the table for heads."""
    from heads.settings import TABLE, options_for

    names = [each for each in options_for(*_TAKERS[name]) if name != "ablate" or each not in _OF_ONE_HEAD]
    return options_of(tuple(_training_option(TABLE[each], name) for each in names))


def _training_option(option: Field[Any], name: str) -> Callable[..., Any]:
    from heads.settings import VARIED, flag

    values, text, taker = option.metadata["values"], option.metadata["help"], option.metadata["for"]
    kind, word = option.type.split(" | ")[0], flag(option.name)  # annotations are text
    default = "auto" if option.name == "device" else option.default if name == "train-head" else None
    if name == "ablate":
        of = {"network": "Of networks from pixels: ", "finetune": "Of finetune:…: "}.get(taker)
        text = of + text[0].lower() + text[1:] if of else text
        if option.default not in (None, ()) and option.default is not False and option.name != "device":
            published = taker == "any" and option.name not in ("select", "split_seed")
            usual = "on" if option.default is True else option.default
            text += f" [default: {usual}{'; of networks as published' if published else ''}]"
    if kind == "bool":
        words = f"{word}/--no-{word[2:]}" if option.default else word
        return click.option(words, is_flag=True, default=default, help=text)
    varied = name == "ablate" and option.name in VARIED
    if varied and option.name != "augment":
        return click.option(word, metavar="GRID" if kind == "float" else "A,B", help=text)
    if varied or option.name == "classes":
        return click.option(word, multiple=True, metavar=option.metadata["shown"], help=text)
    if isinstance(values, tuple):
        return click.option(word, type=click.Choice(values), default=default, help=text)
    number, shown = _NUMBERS.get(kind, (str, option.metadata["shown"] or None))
    return click.option(word, type=number, metavar=shown, default=None if option.name == "only" else default, help=text)


@command
@click.option(
    "--head", required=True, metavar="NAME", help="linear, large, attention, ridge, … (see info); python:MODULE:CLASS."
)
@features_option
@training_options("train-head")
@click.option(
    "--controls/--no-controls", default=None, help="Chance, majority, pixels beside it. [default: if untrained]"
)
@click.option("--out", metavar="DIR", help="Run folder. [default: runs/VIEW-HEAD-N]")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@page_options
@cache_option
def train_head(talk: Console, features: str | None, cache: str | None, no_images: bool, **options: Any) -> int:
    """Train a head on cached features; val chooses, test is read once afterwards.

    \b
    featurecache train-head --head large
    featurecache train-head --head linear --features vit-in21k/chest --seed 1
    """
    _check_output(options["output"])
    import heads
    from featurecache.store.write_view import open_view
    from heads.reports.text import final_table

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
@training_options("train-baseline")
@click.option("--controls", is_flag=True, help="Chance, the majority class and raw pixels beside it.")
@click.option("--out", metavar="DIR", help="Run folder. [default: runs/DATA-ARCH-N]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training of these settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out; begin an interrupted training anew.")
@page_options
@cache_option
def train_baseline(
    talk: Console, arch: str, data: str | None, columns: tuple[str, ...], task: str | None, features: str | None,
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
    from heads.reports.text import final_table
    from heads.runs.run import BACKBONE

    if data is not None and features is not None:
        raise BadOption("--data and --features both say which images; give one of them.")
    images = named_images(data, columns, task)
    if images is None:
        from featurecache.store.write_view import open_view

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
        from heads.models.finetune import extract_words

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
    talk: Console, run: str, csv_file: str | None, trust_code: bool, images: tuple[str, ...], **options: Any
) -> int:  # fmt: skip
    """Class and calibrated probability of new images, folders or tables.

    \b
    featurecache predict --run runs/chest-large-1 new.png folder/
    """
    import heads
    from heads import inference

    loaded = heads.load_run(run, trust_code=trust_code)
    if loaded.untrained:
        talk.say("warning    the backbone of this run was never trained: its answers show the tool, nothing else")
    records = heads.predict(loaded, list(images), say=talk.say, **options)
    if csv_file and csv_file != "-":
        from featurecache.files.atomic import write_whole

        write_whole(Path(csv_file), inference.as_csv(records).encode())
        talk.say(f"predictions {csv_file}")
    if talk.json:
        talk.result("", {"run": str(loaded.path), "predictions": records})
    elif csv_file == "-":
        click.echo(inference.as_csv(records), nl=False)
    elif not csv_file:
        click.echo(inference.as_table(records))
    talk.next(f"featurecache info {shlex.quote(run)}")
    return int(any("error" in record for record in records))


BACKBONE = "vit-demo"
OUTPUTS = ("cls", "tokens")
# (head, output, epochs, patience): `linear` goes on until val stops improving; `large` is soon done
HEADS: tuple[tuple[str, str, int, int], ...] = (
    ("linear", "cls", 200, 10),
    ("large", "tokens", 20, 3),
    ("large", "tokens-257", 20, 3),
)


def run_demo(
    *,
    cache: str | Path | None = None,
    out: str | Path = "runs",
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Extract, train, compare: the table, and the same as a record. The runs lie under ``out``."""
    from featurecache import open_view
    from featurecache.commands import extract
    from featurecache.extraction import plan
    from heads.api import report
    from heads.reports.text import comparison_table, runs_cost

    prepared = plan.prepare("digits", backbone=BACKBONE, random_weights=True, outputs=OUTPUTS, cache=cache)
    say(
        "demo       scikit-learn's 1,797 handwritten digits through a small ViT that was never trained (random weights)"
    )
    say(extract.extraction_lines(prepared, extract.extraction_record(prepared, None)))
    result = prepared.run(progress=progress)
    label = f"{BACKBONE}/digits"
    say(extract.result_lines(result, label))
    view = open_view(result.view)
    runs = [_train(view, *entry, Path(out), first=number == 0, say=say) for number, entry in enumerate(HEADS)]
    table = "\n".join([comparison_table(runs), *runs_cost(runs)])
    page = report([run.path for run in runs], out=Path(out) / "demo-report")
    record = {
        "report": str(page.path),
        "extraction": extract.result_record(result),
        "runs": [{"run": str(run.path), "head": run.head, "output": run.output, **run.metrics} for run in runs],
    }
    lines = [table, "", *(f"run        {Path(out) / run.path.name}/  {run.head} on {run.output}" for run in runs)]
    lines.append(f"report     {page.path}   with intervals, curves, and {page.images} of the images")
    return "\n".join(lines), record


def _train(
    view: Any, head: str, output: str, epochs: int, patience: int, out: Path, *, first: bool, say: Callable[[str], None]
) -> Run:
    epoch = ""

    def brief(line: str) -> None:  # of a hundred epochs the last says enough; history.csv has them all
        nonlocal epoch
        epoch = line if line.startswith("epoch") else epoch
        if not line.startswith(("epoch", "features", "splits")):
            say(line)

    say("")
    from heads import api

    run = api.train_head(
        view, head, output=output, epochs=epochs, patience=patience, controls=first, out=out / f"demo-{head}-{output}",
        overwrite=True, report=False, say=brief,
    )  # fmt: skip
    say(epoch)
    return run
