"""The command line: parse, call one library function, print. Results on stdout, talk and progress on stderr."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featurecache.errors import BadOption, FeatureCacheError, NotInCache, UnknownName, nearest

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class _BatchSize(click.ParamType):
    """A number, or auto."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value in (None, "auto") else click.INT.convert(value, param, ctx)


class _Commands(click.Group):
    """Commands in the order of a day's work; a misspelt one names its neighbours."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            near = nearest(args[0], self.commands)
            raise click.UsageError(f'no command is called "{args[0]}".{near} There are {", ".join(self.commands)}.')
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **options: Any) -> Any:
        """click's own errors in the form of ours."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except click.Abort:
            click.echo("stopped.", err=True)
            code = 1
        except click.ClickException as error:
            word = "" if type(error).__name__ == "NoArgsIsHelpError" else "error: "  # `featurecache` alone
            click.echo(word + error.format_message(), err=True)
            code = error.exit_code
        sys.exit(code or 0)


class Talk:
    """Where lines go: results to stdout, talk to stderr; under --json one object is the result."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.json, self.quiet = as_json, quiet

    @property
    def progress(self) -> bool:
        return not self.quiet

    def say(self, line: str) -> None:
        if not self.quiet:
            click.echo(line, err=True)

    def result(self, text: str, record: Any) -> None:
        """The command's result, as lines or as one JSON object."""
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False) if self.json else text)

    def next(self, command: str, cache: str | None = None) -> None:
        if not self.json:
            self.say(f"next       {command}" + (f" --cache {shlex.quote(cache)}" if cache else ""))


def _report(error: FeatureCacheError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first, *rest = str(error).splitlines()
    word = "" if type(error).__name__ == "Stopped" else "error: "  # Ctrl-C is none
    click.echo("\n".join([word + first, *(" " * 7 + line.strip() for line in rest)]), err=True)
    return 2 if isinstance(error, BadOption | UnknownName) else 1


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A subcommand: the options every command has, and errors as one or two sentences with an exit code."""

    @functools.wraps(function)
    def wrapped(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        try:
            code = function(Talk(as_json, quiet), **options)
        except FeatureCacheError as error:
            code = _report(error, debug)
        except (click.ClickException, click.Abort, SystemExit):
            raise
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            code = 1
        except BrokenPipeError:  # `featurecache ls | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except Exception as error:
            if debug:
                raise
            click.echo(f"error: {type(error).__name__}: {error} (a mistake of ours; --debug shows where)", err=True)
            code = 1
        sys.exit(code or 0)

    for option in (
        click.option("--debug", is_flag=True, help="Show where an error came from."),
        click.option("--quiet", "-q", is_flag=True, help="Results only: no talk, no progress bar."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ):
        wrapped = option(wrapped)
    return main.command(context_settings=CONTEXT)(wrapped)


cache_option = click.option(
    "--cache", metavar="DIR", help="Folder of the cache. [default: $FEATURECACHE_DIR, else ./cache]"
)
features_option = click.option(
    "--features", metavar="VIEW", help="A view: path, STORE/VIEW or name. [default: that of the last extraction]"
)


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(package_name="featurecache")
def main() -> None:
    """Run a frozen vision backbone once over a set of images, keep its features in HDF5, then train and compare small
    heads in seconds.

    \b
    Try it without data or network:   featurecache demo
    Your own images:                  featurecache extract --backbone vit-in21k --data FOLDER
                                      featurecache train-head --head large
                                      featurecache predict --run runs/FOLDER-large-1 NEW.png
    """


@command
@click.option(
    "--backbone", required=True, metavar="NAME", help="An alias (see info), hf:REPO, a folder, torchvision:NAME."
)
@click.option("--data", default="digits", metavar="SOURCE", help="Folder, CSV or Parquet table, .npz, or digits.")
@click.option("--outputs", metavar="NAMES", help="cls,tokens,… [default: the backbone's vector and tokens]")
@click.option("--name", metavar="VIEW", help="Name of the view. [default: that of the data]")
@click.option("--weights", metavar="PATH", help="A folder or file with the backbone's weights.")
@click.option("--random-weights", is_flag=True, help="The architecture untrained: shows the tool, not the backbone.")
@click.option("--seed", default=0, help="Of --random-weights.")
@click.option("--image-size", type=int, metavar="N", help="Pixels; resize and crop scale in the same ratio.")
@click.option(
    "--fit", type=click.Choice(["model", "squash", "pad"]), default="model", help="How an image becomes a square."
)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the stored rows.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--batch-size", type=_BatchSize(), default="auto", help="Rows of a forward pass; fixed by a store's first run."
)
@click.option("--engine", type=click.Choice(["local"]), default="local", help="Where it runs: on this machine.")
@click.option("--workers", type=int, metavar="N", help="Decode threads, nothing else. [default: by the machine]")
@click.option(
    "--on-error", type=click.Choice(["report", "skip", "fail"]), default="report", help="At an unreadable image."
)
@click.option(
    "--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of a table: path=…, label=…, split=…, group=…"
)
@click.option(
    "--task", type=click.Choice(["binary", "multiclass", "ordinal", "multilabel"]), help="[default: by the labels]"
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@click.option("--sheet", metavar="FILE.png", help="Write a contact sheet of the images.")
@click.option("--yes", is_flag=True, help="Do not ask before keeping more than 20 GB.")
@cache_option
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
    prepared = planning.prepare(options.pop("data"), columns=_pairs(columns), progress=talk.progress, **options)
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
    from featurecache.extraction import ASK_BYTES, size_text

    prepared.check_disk()
    if prepared.new_bytes > ASK_BYTES and not yes and sys.stdin.isatty():
        click.confirm(f"keep {size_text(prepared.new_bytes)}?", abort=True, err=True)


def _pairs(columns: tuple[str, ...]) -> dict[str, str] | None:
    for pair in columns:
        if "=" not in pair:
            raise BadOption(f'--column takes ROLE=NAME (--column label=finding), not "{pair}".')
    return dict(pair.split("=", 1) for pair in columns) or None


@command
@click.option("--head", required=True, metavar="NAME", help="linear, large, mlp, or python:MODULE:CLASS.")
@features_option
@click.option("--output", metavar="NAME", help="cls, tokens, tokens-257, … [default: what the head was made for]")
@click.option("--epochs", default=50)
@click.option("--lr", default=1e-3)
@click.option("--weight-decay", default=0.0, help="On weights only, not on biases.")
@click.option("--batch-size", default=32)
@click.option("--patience", default=5, help="Epochs without a better val before it stops.")
@click.option("--seed", default=0, help="Of initialisation and dropout.")
@click.option("--split-seed", default=0, help="Of splits and batch order.")
@click.option("--select", default="auroc", help="What chooses the epoch, on val: a metric's name or loss.")
@click.option("--balance/--no-balance", default=True, help="Batches draw the classes equally.")
@click.option("--standardize", type=click.Choice(["none", "zscore", "l2"]), help="[default: the head's own]")
@click.option("--pos-weight", is_flag=True, help="Multi-label: weigh positives by their rarity.")
@click.option("--positive", metavar="CLASS", help="Binary: the class that counts as positive. [default: the second]")
@click.option(
    "--classes", multiple=True, metavar="NAME[=A,B]", help="Another task on the same cache: classes kept or merged."
)
@click.option("--only", metavar="A,B", help="Train and test on these classes only.")
@click.option(
    "--train-per-class", type=int, metavar="N", help="N training images of each class; the rest are left out."
)
@click.option("--resplit-val", is_flag=True, help="Return val to train and draw a new one.")
@click.option("--splits", metavar="FILE", help="A splits.csv of another run.")
@click.option(
    "--controls/--no-controls", default=None, help="Chance, majority, pixels beside it. [default: if untrained]"
)
@click.option("--out", metavar="DIR", help="Run folder. [default: runs/VIEW-HEAD-N]")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@cache_option
def train_head(talk: Talk, features: str | None, cache: str | None, **options: Any) -> int:
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
    run = heads.train_head(view, options.pop("head"), say=talk.say, **options)
    talk.result(f"{final_table(run)}\nrun        {run.path}/", {"run": str(run.path), **run.metrics})
    talk.next(f"featurecache predict --run {run.path} IMAGE…")
    return 0


def _features_line(view: Any, asked: str | None) -> str:
    kept = ", ".join(view.outputs)
    chosen = "" if asked else "   (the newest view; --features chooses)"
    return f"features   {view.label}: {len(view):,} images, {kept}{chosen}"


def _check_output(output: str | None) -> None:
    if output is not None:
        from featurecache.outputs import parse

        parse(output)


@command
@click.option("--run", "run", required=True, metavar="DIR", help="A run folder of train-head.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write a CSV instead of a table ('-' for stdout).")
@click.option("--device", default="auto", help="auto, cpu, cuda, mps.")
@click.option("--weights", metavar="PATH", help="Where the backbone's weights are now, if not where they were.")
@click.option("--trust-code", is_flag=True, help="Import the module of a run with a python: head.")
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


@command
@click.option("--runs", default="runs", metavar="DIR", help="Folder of runs.")
@cache_option
def ls(talk: Talk, runs: str, cache: str | None) -> int:
    """Stores, views and runs: what there is, how big, made from what."""
    from featurecache import console
    from featurecache.stores import cache_folder

    folder = cache_folder(cache)
    records = console.cache_record(folder)
    found = _runs(runs)
    text = console.cache_lines(folder, records)
    if found:
        from heads.tables import runs_table

        text += "\n\n" + runs_table(found)
    listed = [{"path": str(r.path), "head": r.head, "output": r.output, "metrics": r.metrics} for r in found]
    talk.result(text, {"cache": str(folder), "stores": records, "runs": listed})
    views = [f"{store['backbone']}/{view['name']}" for store in records for view in store.get("views", [])]
    talk.next(f"featurecache info {views[0]}" if views else "featurecache extract --backbone NAME --data FOLDER", cache)
    return 0


def _runs(folder: str) -> list[Any]:
    if not Path(folder).is_dir():
        return []
    import heads

    return heads.list_runs(folder)


@command
@click.argument("name", required=False, metavar="[VIEW|RUN]")
@click.option(
    "--backbone", metavar="NAME", help="Layers, shapes, parameters, outputs of a backbone; no weights needed."
)
@click.option("--head", metavar="NAME", help="Layers, shapes and parameters of a head.")
@click.option("--output", metavar="NAME", help="With --head: the output it would take.")
@click.option("--classes", default=2, metavar="C", help="With --head: number of classes.")
@click.option("--weights", metavar="PATH", help="With --backbone.")
@click.option("--image-size", type=int, metavar="N", help="With --backbone.")
@features_option
@cache_option
def info(
    talk: Talk, name: str | None, backbone: str | None, head: str | None, cache: str | None, **options: Any
) -> int:
    """A view, a run, a backbone or a head in detail; without a name all backbones and heads there are."""
    asked = [value for value in (name, backbone, head) if value]
    if len(asked) > 1:
        raise BadOption("info shows one thing at a time: a view or run, --backbone NAME, or --head NAME.")
    if backbone:
        return _info_backbone(talk, backbone, options["weights"], options["image_size"])
    if head:
        return _info_head(talk, head, options, cache)
    if name:
        return _info_thing(talk, name, cache)
    return _info_all(talk)


def _info_backbone(talk: Talk, backbone: str, weights: str | None, image_size: int | None) -> int:
    from featurecache import console
    from featurecache.backbones import describe

    record = describe(backbone, weights=weights, image_size=image_size)
    talk.result(console.backbone_lines(record), record)
    talk.next(f"featurecache extract --backbone {record['name']} --data FOLDER")
    return 0


def _info_head(talk: Talk, head: str, options: dict[str, Any], cache: str | None) -> int:
    from featurecache.views import open_view
    from heads.architectures import describe_head
    from heads.tables import head_table
    from heads.train import choose_output

    try:
        view = open_view(options["features"], cache)
    except NotInCache:
        if options["features"]:
            raise
        record = describe_head(head, _shape_at_vit_b16(head, options["output"]), options["classes"])
        talk.say("features   none extracted yet: shapes are those of a ViT-B/16 at 224 px")
    else:
        output = choose_output(view, head, options["output"])
        talk.say(_features_line(view, options["features"]))
        record = describe_head(head, view.info(output).shape, options["classes"])
    talk.result(head_table(record), record)
    talk.next(f"featurecache train-head --head {head}", cache)
    return 0


def _shape_at_vit_b16(head: str, output: str | None) -> tuple[int, ...]:
    from featurecache.outputs import parse
    from heads.architectures import head_info

    name = output or ("tokens" if head_info(head).takes == "tokens" else "cls")
    return parse(name).row_shape((197, 768), 1)


def _info_thing(talk: Talk, name: str, cache: str | None) -> int:
    if (Path(name) / "config.json").exists():
        import heads
        from heads.tables import final_table

        run = heads.load_run(name)
        config = json.dumps(run.config, indent=1, ensure_ascii=False)
        talk.result(
            f"{final_table(run)}\n\n{config}", {"run": str(run.path), "config": run.config, "metrics": run.metrics}
        )
        return 0
    from featurecache import console
    from featurecache.views import open_view

    record = console.view_record(open_view(name, cache))
    talk.result(console.view_lines(record), record)
    talk.next(f"featurecache train-head --head large --features {record['view']}", cache)
    return 0


def _info_all(talk: Talk) -> int:
    from featurecache.aliases import ALIASES
    from heads.architectures import HEADS

    width = max(map(len, ALIASES))
    lines = ["backbones (also hf:REPO[@REVISION], a folder written by save_pretrained, torchvision:NAME[:WEIGHTS]):"]
    lines += [f"  {name:<{width}}  {alias.id or 'untrained only'}" for name, alias in ALIASES.items()]
    lines += ["heads (also python:MODULE:CLASS):", *(f"  {name:<{width}}  {head.what}" for name, head in HEADS.items())]
    talk.result("\n".join(lines), {"backbones": list(ALIASES), "heads": list(HEADS)})
    return 0


@command
@click.option("--out", default="runs", metavar="DIR", help="Where the run folders go.")
@cache_option
def demo(talk: Talk, out: str, cache: str | None) -> int:
    """The whole of it in a minute, without network or data: digits, an untrained ViT, three heads, the controls."""
    from heads.demo import run_demo

    table, record = run_demo(cache=cache, out=out, say=talk.say, progress=talk.progress)
    talk.result(table, record)
    talk.next("featurecache extract --backbone vit-in21k --data FOLDER")
    return 0


if __name__ == "__main__":
    main()
