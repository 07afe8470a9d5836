"""The command line `featurecache`: the order of its commands, and ls and info, which look at both packages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from click import argument, option

from featurecache.commands import extract, maintain
from featurecache.commands.terminal import CONTEXT, CommandGroup, Console, cache_option, command, features_option
from featurecache.errors import BadOption, NotInCache
from heads.commands import compare, train


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
@option("--runs", default="runs", metavar="DIR", help="Folder of runs.")
@cache_option
def ls(talk: Console, runs: str, cache: str | None) -> int:
    """Stores, views and runs: what there is, how big, made from what."""
    from featurecache.commands import inspect
    from featurecache.store.store import cache_folder

    folder = cache_folder(cache)
    stores = inspect.cache_record(folder)
    blocks, trained, sweeps = [inspect.cache_lines(folder, stores)], [], []
    if Path(runs).is_dir():
        import heads
        from heads.reports.text import runs_table, sweeps_table

        trained, sweeps = heads.list_runs(runs), heads.list_sweeps(runs)
        blocks += [runs_table(trained)] * bool(trained) + [sweeps_table(sweeps)] * bool(sweeps)
    record = {
        "cache": folder,
        "stores": stores,
        "runs": [{name: getattr(run, name) for name in ("path", "head", "output", "metrics")} for run in trained],
        "sweeps": [{"path": s.path, "heads": len(s.rows), "families": len(s.families)} for s in sweeps],
    }
    talk.result("\n\n".join(blocks), record)
    views = [f"{store['backbone']}/{view['name']}" for store in stores for view in store.get("views", [])]
    talk.next(f"featurecache info {views[0]}" if views else "featurecache extract --backbone NAME --data FOLDER", cache)
    return 0


@command
@argument("name", required=False, metavar="[VIEW|RUN]")
@option("--backbone", metavar="NAME", help="Layers, shapes, parameters, outputs of a backbone; no weights needed.")
@option("--head", metavar="NAME", help="Layers, shapes and parameters of a head, or of a network from pixels.")
@option("--output", metavar="NAME", help="With --head: the output it would take.")
@option("--classes", default=2, metavar="C", help="With --head: number of classes.")
@option("--weights", metavar="PATH", help="With --backbone.")
@option("--image-size", type=int, metavar="N", help="With --backbone, or the --head of a network from pixels.")
@features_option
@cache_option
def info(
    talk: Console, name: str | None, backbone: str | None, head: str | None, weights: str | None,
    image_size: int | None, **options: Any,
) -> int:  # fmt: skip
    """A view, a run, a backbone or a head in detail; without a name all backbones and heads there are."""
    import heads
    from featurecache.backbones import describe_backbone
    from featurecache.commands import inspect
    from featurecache.store.write_view import open_view
    from heads.models.catalogue import describe_network, is_baseline
    from heads.reports.text import head_table, run_lines

    cache = options["cache"]
    if sum(map(bool, (name, backbone, head))) > 1:
        raise BadOption("info shows one thing at a time: a view or run, --backbone NAME, or --head NAME.")
    if backbone:
        record = describe_backbone(backbone, weights=weights, image_size=image_size)
        talk.result(extract.backbone_lines(record), record)
        talk.next(f"featurecache extract --backbone {shlex.quote(backbone)} --data FOLDER")
    elif head and is_baseline(head):
        record = describe_network(head, options["classes"], image_size)
        talk.result(head_table(record), record)
        talk.next(f"featurecache train-baseline --arch {head} --data FOLDER")
    elif head:
        record = _head_record(talk, head, **options)
        talk.result(head_table(record), record)
        talk.next(f"featurecache train-head --head {head}", cache)
    elif name and (Path(name) / "config.json").exists():
        run = heads.load_run(name)
        talk.result(run_lines(run), {"run": run.path, "config": run.config, "metrics": run.metrics})
        talk.next(f"featurecache report {shlex.quote(name)}")
    elif name:
        record = inspect.view_record(open_view(name, cache))
        talk.result(inspect.view_lines(record), record)
        talk.next(extract.training_of(record["outputs"], record["view"]), cache)
    else:
        _info_all(talk)
    return 0


def _head_record(
    talk: Console, head: str, *, output: str | None, classes: int, features: str | None, cache: str | None
) -> dict[str, Any]:
    """A head on an output of a view; where no view is there, on that of a ViT-B/16."""
    from featurecache.outputs import members
    from featurecache.store.write_view import open_view
    from heads.models.catalogue import describe_head, head_info
    from heads.models.common import VIT_B16, Input
    from heads.training.job import choose_output

    try:
        view = open_view(features, cache)
    except NotInCache:
        if features:
            raise
        talk.say("features   none extracted yet: shapes are those of a ViT-B/16 at 224 px")
        chosen, *more = members(output or ("tokens" if head_info(head).takes == "tokens" else "cls"))
        places = chosen.layout(VIT_B16.prefix, (14, 14)) or ((), None)
        shape = (768 * (1 + len(more)),) if more else chosen.row_shape((197, 768), 1)
        return describe_head(head, Input(shape, *places), classes)
    name = choose_output(view, head, output)
    newest = "" if features else "   (the newest view; --features chooses)"
    talk.say(f"features   {view.label}: {len(view):,} images, {', '.join(view.outputs)}{newest}")
    return describe_head(head, Input.of(view.info(name)), classes)


def _info_all(talk: Console) -> None:
    from featurecache.backbones.aliases import ALIASES
    from featurecache.formatting import aligned
    from heads.models.catalogue import heads_table, networks_lines, networks_table
    from heads.reports.text import heads_lines

    heads, forms = heads_table(), "hf:REPO[@REVISION], a folder written by save_pretrained, "
    forms += "torchvision:NAME[:WEIGHTS], timm:NAME[.TAG], python:MODULE:FACTORY[:LAYER]"
    lines = [f"backbones (also {forms}):"]
    lines += aligned([[name, alias.id or "untrained only"] for name, alias in ALIASES.items()], right=2, indent=2)
    lines += ["heads (also python:MODULE:CLASS; parameters for a ViT-B/16 and two classes):", heads_lines(heads)]
    lines += ["networks from pixels (train-baseline; also finetune:BACKBONE):", networks_lines()]
    record = {"backbones": list(ALIASES), "heads": [head["head"] for head in heads], "about_heads": heads}
    talk.result("\n".join(lines), record | {"networks": networks_table()})


COMMANDS = (
    *(extract.extract, extract.why),
    *(train.train_head, train.train_baseline, compare.ablate, compare.study, compare.evaluate, compare.report),
    *(train.predict, compare.explain, ls, info),
    *(maintain.verify, maintain.repair, maintain.leaks, maintain.rm, maintain.gc, maintain.compact),
    *(maintain.export, maintain.import_, maintain.merge, train.demo),
)
for each in COMMANDS:
    main.add_command(each)


if __name__ == "__main__":
    main()
