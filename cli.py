"""The command line. Commands of one stage are declared with it; those that look at both, and the order, are here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from featurecache.commands import extract, maintain
from featurecache.commands.terminal import CONTEXT, CommandGroup, Console, cache_option, command, features_option
from featurecache.errors import BadOption, NotInCache
from heads.commands import compare
from heads.commands import train as head_commands


@click.group(cls=CommandGroup, context_settings=CONTEXT)
@click.version_option(package_name="featurecache")
def main() -> None:
    """Run a frozen vision backbone once over a set of images, keep its features in HDF5, then train and compare small
    heads in seconds.

    \b
    Try it without data or network:   featurecache demo
    Published comparisons again:      featurecache study
    Your own images:                  featurecache extract --backbone vit-in21k --data FOLDER
                                      featurecache train-head --head large
                                      featurecache predict --run runs/FOLDER-large-1 NEW.png
    """


@command
@click.option("--runs", default="runs", metavar="DIR", help="Folder of runs.")
@cache_option
def ls(talk: Console, runs: str, cache: str | None) -> int:
    """Stores, views and runs: what there is, how big, made from what."""
    from featurecache.commands import inspect
    from featurecache.store.store import cache_folder

    folder = cache_folder(cache)
    records = inspect.cache_record(folder)
    found, sweeps = _runs(runs)
    text = inspect.cache_lines(folder, records)
    if found or sweeps:
        from heads.reports.text import runs_table, sweeps_table

        text += "\n\n" + "\n\n".join([runs_table(found)] * bool(found) + [sweeps_table(sweeps)] * bool(sweeps))
    listed = [{"path": str(r.path), "head": r.head, "output": r.output, "metrics": r.metrics} for r in found]
    lab = [{"path": str(s.path), "heads": len(s.rows), "families": len(s.families)} for s in sweeps]
    talk.result(text, {"cache": str(folder), "stores": records, "runs": listed, "sweeps": lab})
    views = [f"{store['backbone']}/{view['name']}" for store in records for view in store.get("views", [])]
    talk.next(f"featurecache info {views[0]}" if views else "featurecache extract --backbone NAME --data FOLDER", cache)
    return 0


def _runs(folder: str) -> tuple[list[Any], list[Any]]:
    """Runs and sweeps."""
    if not Path(folder).is_dir():
        return [], []
    import heads

    return heads.list_runs(folder), heads.list_sweeps(folder)


@command
@click.argument("name", required=False, metavar="[VIEW|RUN]")
@click.option(
    "--backbone", metavar="NAME", help="Layers, shapes, parameters, outputs of a backbone; no weights needed."
)
@click.option("--head", metavar="NAME", help="Layers, shapes and parameters of a head, or of a network from pixels.")
@click.option("--output", metavar="NAME", help="With --head: the output it would take.")
@click.option("--classes", default=2, metavar="C", help="With --head: number of classes.")
@click.option("--weights", metavar="PATH", help="With --backbone.")
@click.option("--image-size", type=int, metavar="N", help="With --backbone, or the --head of a network from pixels.")
@features_option
@cache_option
def info(
    talk: Console, name: str | None, backbone: str | None, head: str | None, cache: str | None, **options: Any
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


def _info_backbone(talk: Console, backbone: str, weights: str | None, image_size: int | None) -> int:
    from featurecache.backbones import describe_backbone
    from featurecache.commands import extract

    record = describe_backbone(backbone, weights=weights, image_size=image_size)
    talk.result(extract.backbone_lines(record), record)
    talk.next(f"featurecache extract --backbone {shlex.quote(backbone)} --data FOLDER")
    return 0


def _features_line(view: Any, asked: str | None) -> str:
    kept = ", ".join(view.outputs)
    chosen = "" if asked else "   (the newest view; --features chooses)"
    return f"features   {view.label}: {len(view):,} images, {kept}{chosen}"


def _info_head(talk: Console, head: str, options: dict[str, Any], cache: str | None) -> int:
    from featurecache.store.write_view import open_view
    from heads.models.catalogue import describe_head, is_baseline
    from heads.models.common import Input
    from heads.reports.text import head_table
    from heads.training.job import choose_output

    if is_baseline(head):
        from heads.models.catalogue import describe_network

        record = describe_network(head, options["classes"], options["image_size"])
        talk.result(head_table(record), record)
        talk.next(f"featurecache train-baseline --arch {head} --data FOLDER")
        return 0
    try:
        view = open_view(options["features"], cache)
    except NotInCache:
        if options["features"]:
            raise
        record = describe_head(head, _input_at_vit_b16(head, options["output"]), options["classes"])
        talk.say("features   none extracted yet: shapes are those of a ViT-B/16 at 224 px")
    else:
        output = choose_output(view, head, options["output"])
        talk.say(_features_line(view, options["features"]))
        record = describe_head(head, Input.of(view.info(output)), options["classes"])
    talk.result(head_table(record), record)
    talk.next(f"featurecache train-head --head {head}", cache)
    return 0


def _input_at_vit_b16(head: str, output: str | None) -> Any:
    from featurecache.outputs import parse
    from heads.models.catalogue import head_info
    from heads.models.common import VIT_B16, Input

    asked = parse(output or ("tokens" if head_info(head).takes == "tokens" else "cls"))
    places = asked.layout(VIT_B16.prefix, (14, 14)) or ((), None)
    return Input(asked.row_shape((197, 768), 1), *places)


def _info_thing(talk: Console, name: str, cache: str | None) -> int:
    if (Path(name) / "config.json").exists():
        import heads
        from heads.reports.text import run_lines

        run = heads.load_run(name)
        talk.result(run_lines(run), {"run": str(run.path), "config": run.config, "metrics": run.metrics})
        talk.next(f"featurecache report {shlex.quote(name)}")
        return 0
    from featurecache.commands import inspect
    from featurecache.store.write_view import open_view

    record = inspect.view_record(open_view(name, cache))
    talk.result(inspect.view_lines(record), record)
    head = "large" if "tokens" in record["outputs"] else "linear"
    talk.next(f"featurecache train-head --head {head} --features {shlex.quote(record['view'])}", cache)
    return 0


def _info_all(talk: Console) -> int:
    from featurecache.backbones.aliases import ALIASES
    from featurecache.formatting import aligned
    from heads.models.catalogue import heads_table, networks_lines, networks_table
    from heads.reports.text import heads_lines

    heads = heads_table()
    forms = "hf:REPO[@REVISION], a folder written by save_pretrained, torchvision:NAME[:WEIGHTS], timm:NAME[.TAG], "
    forms += "python:MODULE:FACTORY[:LAYER]"
    lines = [f"backbones (also {forms}):"]
    names = [[name, alias.id or "untrained only"] for name, alias in ALIASES.items()]
    lines += aligned(names, right=2, indent=2)
    lines += ["heads (also python:MODULE:CLASS; parameters for a ViT-B/16 and two classes):", heads_lines(heads)]
    lines += ["networks from pixels (train-baseline; also finetune:BACKBONE):", networks_lines()]
    record = {
        "backbones": list(ALIASES), "heads": [head["head"] for head in heads], "about_heads": heads,
        "networks": networks_table(),
    }  # fmt: skip
    talk.result("\n".join(lines), record)
    return 0


@command
@click.option("--out", default="runs", metavar="DIR", help="Where the run folders go.")
@cache_option
def demo(talk: Console, out: str, cache: str | None) -> int:
    """The whole of it in a minute, without network or data: digits, an untrained ViT, three heads, the controls."""
    from heads.commands.train import run_demo

    table, record = run_demo(cache=cache, out=out, say=talk.say, progress=talk.progress)
    talk.result(table, record)
    talk.next("featurecache extract --backbone vit-in21k --data FOLDER")
    return 0


for each in (
    extract.extract,
    extract.why,
    head_commands.train_head,
    head_commands.train_baseline,
    compare.ablate,
    compare.study,
    compare.evaluate,
    compare.report,
    head_commands.predict,
    compare.explain,
    ls,
    info,
    maintain.verify,
    maintain.repair,
    maintain.leaks,
    maintain.rm,
    maintain.gc,
    maintain.compact,
    maintain.export,
    maintain.import_,
    maintain.merge,
    demo,
):
    main.add_command(each)


if __name__ == "__main__":
    main()
