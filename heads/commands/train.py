"""Train-head, train-baseline, predict.

The commands of the second stage: heads on cached features.

The options of ``featurecache ablate``.

The whole of the tool in about a minute: digits, a small untrained ViT, three heads and the controls.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurecache.commands.extract import SOURCE_OPTIONS, named_images, options_of
from featurecache.commands.terminal import Console, cache_option, command, features_option
from featurecache.errors import BadOption
from heads.settings import OPTIMIZERS, PRECISIONS, SCHEDULES, STANDARDIZE

if TYPE_CHECKING:
    from heads.runs.run import Run


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
@click.option("--image-size", type=int, metavar="N", help="Pixels. [default: the network's own]")
@click.option("--epochs", type=int, metavar="N")
@click.option("--lr", type=float, metavar="X")
@click.option("--weight-decay", type=float, metavar="X", help="On weights only, not on biases.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="sgd has momentum 0.9.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate.")
@click.option(
    "--augment",
    metavar="WORDS",
    help="none, or flip,rotate10,shift0.1, drawn anew in every batch. Labels stay: no flips where the side decides.",
)
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
    from heads.api import train_head as run_training

    epoch = ""

    def brief(line: str) -> None:  # of a hundred epochs the last says enough; history.csv has them all
        nonlocal epoch
        epoch = line if line.startswith("epoch") else epoch
        if not line.startswith(("epoch", "features", "splits")):
            say(line)

    say("")
    run = run_training(
        view, head, output=output, epochs=epochs, patience=patience, controls=first, out=out / f"demo-{head}-{output}",
        overwrite=True, report=False, say=brief,
    )  # fmt: skip
    say(epoch)
    return run
