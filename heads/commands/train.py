"""Commands train-head, train-baseline, predict and demo: one head or network trained, and used on new images.

The options of training are those of the table in `heads.settings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import Choice, argument

from featurecache.commands.extract import open_features
from featurecache.commands.help import option, options_of
from featurecache.commands.source_options import named_images, pairs_of, source_options
from featurecache.commands.terminal import (
    Console,
    cache_option,
    command,
    features_option,
    of_backbone_options,
)
from featurecache.errors import BadOption
from featurecache.formatting import shell_word, timed_part

if TYPE_CHECKING:
    from heads.runs.run import Run
    from heads.settings import HeadOptions

_TAKERS = {
    "train-head": ("any", "head"),
    "train-baseline": ("any", "network", "finetune"),
    "ablate": ("any", "head", "network", "finetune"),
}
_OF_ONE_HEAD = ("output", "seed", "fraction", "folds", "fold")  # of which a sweep has several: options of its own
_SECTIONS = {  # of help
    "splits": (
        "split_seed", "resplit_val", "splits", "classes", "only", "train_per_class", "positive", "drop_leaks",
        "fraction", "folds", "fold",
    ),
    "training": (
        "batch_size", "patience", "weight_decay", "balance", "class_weights", "pos_weight", "standardize", "optimizer",
        "schedule", "warmup", "clip_norm", "dropout", "label_smoothing", "gated", "sensitivity", "precision", "ram",
    ),
    "network": ("augment", "decay_all", "image_size", "device", "lora", "rlrr", "weights", "random_weights"),
}  # fmt: skip
_NUMBERS: dict[str, tuple[type, str]] = {"int": (int, "N"), "float": (float, "X")}
page_options = options_of(
    option("--no-images", is_flag=True, help="Embed no image of the data in report.html."),
    option("--hash-ids", is_flag=True, help="Write ids as keyed hashes in the report."),
    section="output",
)


def training_options(name: str) -> Callable[..., Any]:
    """The options of `heads.settings.Settings` that a command has; without a value they are as published for networks
    from pixels, and the defaults of the table for heads."""
    from heads.settings import TABLE, options_for

    names = [each for each in options_for(*_TAKERS[name]) if name != "ablate" or each not in _OF_ONE_HEAD]
    own = {each: _training_option(TABLE[each], name) for each in names}
    sections = {word: [own.pop(each) for each in of if each in own] for word, of in _SECTIONS.items()}
    return options_of(*own.values(), *(options_of(*each, section=word) for word, each in sections.items() if each))


def _training_option(entry: Field[Any], name: str) -> Callable[..., Any]:
    from heads.settings import GRIDS, OF_HEAD, VARIED, flag

    values, text, taker = entry.metadata["values"], entry.metadata["help"], entry.metadata["for"]
    kind, word = entry.type.split(" | ")[0], flag(entry.name)  # annotations are text
    of_head = entry.name in OF_HEAD
    default = "auto" if entry.name == "device" else entry.default if name == "train-head" and not of_head else None
    text += f" [default: the head's own, mostly {entry.default}]" if name == "train-head" and of_head else ""
    if name == "ablate":
        of = {"network": "Of networks from pixels: ", "finetune": "Of finetune:…: "}.get(taker)
        text = of + text[0].lower() + text[1:] if of else text
        if entry.default not in (None, ()) and entry.default is not False and entry.name != "device":
            usual = "the head's own" if of_head else "on" if entry.default is True else entry.default
            text += f" [default: {usual}]"
    if kind == "bool":
        words = f"{word}/--no-{word[2:]}" if entry.default or taker == "network" else word
        return option(words, is_flag=True, default=default, help=text)
    varied = name == "ablate" and entry.name in (*VARIED, *GRIDS)
    if varied and entry.name != "augment":
        return option(word, metavar="GRID" if entry.name in GRIDS else "A,B", help=text)
    if varied or entry.name == "classes":
        return option(word, multiple=True, metavar=entry.metadata["shown"], help=text)
    if isinstance(values, tuple):
        return option(word, type=Choice(values), default=default, help=text)
    number, shown = _NUMBERS.get(kind, (str, entry.metadata["shown"] or None))
    return option(word, type=number, metavar=shown, default=None if entry.name == "only" else default, help=text)


def prediction_by(run: Run) -> str:
    """The command that uses a run on new images; of imported features, which nobody can compute of one, its page."""
    if run.config["view"]["source"].get("kind") == "import":
        return f"featurecache report {shell_word(run.path)}"
    return f"featurecache predict --run {shell_word(run.path)} IMAGE…"


def open_chosen(talk: Console, run: str, trust_code: bool) -> Run:
    """A run, or of a sweep the one that it chose: then it is said which."""
    from heads.api import open_run

    loaded = open_run(run, trust_code=trust_code, say=talk.say)
    if loaded.path != Path(run):
        talk.line(f"run        {loaded.path}   (the choice of the sweep {run})")
    return loaded


def _show_run(talk: Console, run: Run) -> None:
    from heads.reports.text import final_table

    text = final_table(run, run.metrics["comparison"])
    talk.result(f"{text}\nrun        {run.path}/   report.html in it", {"run": run.path, **run.metrics})


@command
@option(
    "--head", required=True, metavar="NAME", help="linear, large, attention, ridge, … (see info); python:MODULE:CLASS."
)
@features_option
@training_options("train-head")
@option("--controls/--no-controls", default=None, help="Chance, majority, pixels beside it. [default: if untrained]")
@option("--out", metavar="DIR", help="Run folder. [default: runs/VIEW-HEAD-N]")
@option("--overwrite", is_flag=True, help="Replace the run in --out.")
@page_options
@cache_option
def train_head(talk: Console, features: str | None, cache: str | None, no_images: bool, **options: Any) -> int:
    """Train a head on cached features; val chooses, test is read once afterwards.

    \b
    featurecache train-head --head large
    featurecache train-head --head linear --features vit-in21k/chest --seed 1
    """
    from featurecache.outputs import members

    if options["output"] is not None:
        members(options["output"])  # a misspelt one is said before a view is opened
    view = open_features(talk, features, cache)
    with timed_part("imports"):
        from heads import api
    run = api.train_head(
        view, options.pop("head"), say=talk.line, progress=talk.progress, images=not no_images, **options
    )
    _show_run(talk, run)
    talk.next(prediction_by(run))
    return 0


@command
@option("--arch", required=True, metavar="NAME", help="One of those that --help lists.")
@option("--data", metavar="SOURCE", help="Images and labels, as for extract. [default: those of --features]")
@source_options
@features_option
@training_options("train-baseline")
@option("--controls", is_flag=True, help="Chance, the majority class and raw pixels beside it.")
@option("--out", metavar="DIR", help="Run folder. [default: runs/DATA-ARCH-N]")
@option("--overwrite", is_flag=True, help="Replace the run or the interrupted training in --out.")
@page_options
@cache_option
def train_baseline(
    talk: Console, arch: str, data: str | None, features: str | None,
    cache: str | None, no_images: bool, **options: Any,
) -> int:  # fmt: skip
    """Train a network from pixels, to be compared with heads: same splits, same choice, same measures.

    \b
    featurecache train-baseline --arch cnn-medical-mnist --data medical-mnist/
    featurecache train-baseline --arch finetune:vit-in1k --features chest --lora 8
    featurecache train-baseline --arch cnn-cifar --data digits --augment none

    \b
    cnn-mindlina       three blocks at 256 pixels, for an unpublished network
    cnn-medical-mnist  three blocks at 224 pixels, 3.4 M parameters
    cnn-cifar          six residual blocks at 32 pixels, 0.2 M parameters
    vit-cifar          a small ViT at 32 pixels, 1.2 M parameters
    finetune:BACKBONE  a pretrained network, all its weights or adapters

    What is left out is as published; the first lines say what that is. ablate takes these names among --heads, and
    several values of an option.
    """
    import heads
    from heads.models.finetune import classifier_class, extract_options
    from heads.runs.records import BACKBONE

    if data is not None and features is not None:
        raise BadOption("--data and --features both say which images; give one of them.")
    images: Any = named_images(talk, data, options)
    if images is None:
        images = partial(open_features, talk, features, cache, "--features or --data chooses")
    options |= {"classes": options["classes"] or None, "images": not no_images, "progress": talk.progress}
    run = heads.train_baseline(images, arch, say=talk.line, **options)
    _show_run(talk, run)
    backbone = run.path / BACKBONE
    extraction = f"featurecache extract {extract_options(backbone)} --data FOLDER" if backbone.is_dir() else None
    if extraction and (name := classifier_class(backbone)):
        talk.say(f"{'model':<10} {backbone}/   {name} of transformers, with its classifier and image processor")
    talk.next(extraction or prediction_by(run))
    return 0


@command
@option("--run", "run", required=True, metavar="DIR", help="A run folder of train-head, or a sweep's: its choice.")
@option("--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of tables: path=…, label=…")
@option("--csv", "csv_file", metavar="FILE", help="Write a CSV instead of a table ('-' for stdout).")
@of_backbone_options
@argument("images", nargs=-1, required=True, metavar="IMAGE…")
def predict(
    talk: Console, run: str, columns: tuple[str, ...], csv_file: str | None, trust_code: bool, images: tuple[str, ...],
    **options: Any,
) -> int:  # fmt: skip
    """Predicted class and calibrated probability of new images: files, folders or tables.

    \b
    featurecache predict --run runs/chest-large-1 new.png folder/

    Of a folder all images below it get an answer, whatever its folders are called. Where those are called as the
    classes of the run, or a table has a column of labels, accuracy is said too.
    """
    with timed_part("imports"):
        import heads
        from featurecache.files.atomic import write_whole
        from heads import inference

    loaded = open_chosen(talk, run, trust_code)
    if loaded.untrained:
        talk.warn(["the backbone of this run was never trained: its answers show the tool, nothing else"])
    records = heads.predict(loaded, list(images), columns=pairs_of(columns), say=talk.say, **options)
    if csv_file and csv_file != "-":
        write_whole(Path(csv_file), inference.predictions_csv(records).encode())
        talk.say(f"predictions {csv_file}")
    if talk.json:
        accuracy, labelled = inference.accuracy_of(records) or (None, 0)
        talk.result("", {"run": loaded.path, "accuracy": accuracy, "labelled": labelled, "predictions": records})
    elif csv_file == "-":
        click.echo(inference.predictions_csv(records), nl=False)
    elif not csv_file:
        talk.result(inference.predictions_table(records), {})
    talk.next(f"featurecache info {shell_word(run)}")
    return int(any("error" in record for record in records))


# (head, output, what is not its own): `large` is soon done
_DEMO_HEADS: tuple[tuple[str, str, HeadOptions], ...] = (
    ("linear", "cls", {}), ("large", "tokens", {"epochs": 20, "patience": 3}),
    ("large", "tokens-257", {"epochs": 20, "patience": 3}),
)  # fmt: skip


@command
@option("--out", default="runs", metavar="DIR", help="Where the run folders go.")
@cache_option
def demo(talk: Console, out: str, cache: str | None) -> int:
    """The whole of it in a minute, without network or data: digits, an untrained ViT, three heads, the controls."""
    import heads
    from featurecache.commands import extract
    from featurecache.extraction import plan
    from featurecache.store.write_view import open_view
    from heads.reports.text import comparison_table, runs_cost

    prepared = plan.prepare("digits", backbone="vit-demo", random_weights=True, outputs="cls,tokens", cache=cache)
    say = talk.say
    say(
        "demo       scikit-learn's 1,797 handwritten digits through a small ViT that was never trained (random weights)"
    )
    say(extract.extraction_lines(prepared, extract.extraction_record(prepared, None)))
    result = prepared.run(progress=talk.progress)
    say(plan.extraction_summary(result, "vit-demo/digits"))
    view, folder = open_view(result.view), Path(out)
    runs: list[Run] = []

    def brief(line: str) -> None:
        """What is the same of all three heads is said above."""
        if not line.startswith(("features", "splits")):
            say(line)

    for head, output, options in _DEMO_HEADS:
        say("")
        place = folder / f"demo-{head}-{output}"
        how: dict[str, Any] = {"out": place, "overwrite": True, "controls": not runs, "report": False, **options}
        runs.append(heads.train_head(view, head, say=brief, output=output, **how))
    page = heads.report([run.path for run in runs], out=folder / "demo-report")
    lines = [comparison_table(runs), *runs_cost(runs), ""]
    lines += [f"run        {folder / run.path.name}/  {run.head} on {run.output}" for run in runs]
    lines.append(f"report     {page.path}   with intervals, curves, and {page.images} of the images")
    records = [{"run": run.path, "head": run.head, "output": run.output, **run.metrics} for run in runs]
    record = {"report": page.path, "extraction": extract.result_record(result), "runs": records}
    talk.result("\n".join(lines), record)
    talk.next("featurecache extract --backbone vit-in21k --data FOLDER")
    return 0
