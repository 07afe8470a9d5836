"""The command line `featurecache`: order of its commands; ls, info, verify and leaks, which look at both packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import argument

from featurecache.commands import extract, maintain
from featurecache.commands.help import option
from featurecache.commands.terminal import CONTEXT, CommandGroup, Console, cache_option, command, features_option
from featurecache.errors import BadOption, NotInCache, RunError
from featurecache.formatting import shell_word
from heads.commands import compare, train

if TYPE_CHECKING:
    import numpy as np

    from featurecache.store.view import View


@click.group(cls=CommandGroup, context_settings=CONTEXT)
@click.version_option(package_name="featurecache")
def main() -> None:
    """Run a frozen vision backbone once over a set of images, keep its features in HDF5, then train and compare small
    heads in seconds.

    \b
    Try it without data:     featurecache demo
    Published comparisons:   featurecache study
    Your own images:         featurecache extract --backbone vit-in21k --data DIR
                             featurecache train-head --head large
                             featurecache predict --run runs/DIR-large-1 NEW.png
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
        from heads.reports.listing import list_sweep_summaries, runs_table, sweeps_table
        from heads.runs.records import list_records

        errors: list[RunError] = []
        trained, sweeps = list_records(runs, errors), list_sweep_summaries(runs, errors)
        blocks += ["\n".join(f"warning    {error}" for error in errors)] * bool(errors)
        blocks += [runs_table(trained)] * bool(trained) + [sweeps_table(sweeps)] * bool(sweeps)
    record = {
        "cache": folder,
        "stores": stores,
        "runs": [{name: getattr(run, name) for name in ("path", "head", "output", "metrics")} for run in trained],
        "sweeps": [{"path": s.path, "heads": s.heads, "families": s.families} for s in sweeps],
    }
    talk.result("\n\n".join(blocks), record)
    views = [view["label"] for store in stores for view in store.get("views", []) if "label" in view]
    talk.next(
        f"featurecache info {shell_word(views[0])}" if views else "featurecache extract --backbone NAME --data FOLDER",
        cache,
    )
    return 0


@command
@argument("names", nargs=-1, metavar="[STORE|VIEW|RUN]…")
@option("--runs", default="runs", metavar="DIR", help="Folder of runs, where nothing is named.")
@cache_option
def verify(talk: Console, names: tuple[str, ...], runs: str, cache: str | None) -> int:
    """Check every file of cache and runs against its hash: all, or what is named (a run, a sweep, a study, a folder of
    them).

    \b
    featurecache verify
    featurecache verify runs/chest-large-1
    """
    from featurecache.formatting import byte_bar
    from featurecache.maintenance import verify as verification
    from featurecache.store.store import cache_folder
    from heads.sweeps.verify import records_below, verify_runs

    folder = cache_folder(cache)
    trained = [Path(name) for name in names or (runs,) if any(records_below(Path(name)))]
    stores = [name for name in names if Path(name) not in trained]
    only = verification.stores_called(stores, folder) if names else None
    with byte_bar(verification.bytes_to_verify(folder, only), "verify", talk.progress) as bar:
        reports = [verification.verify(folder, only, advance=bar.update), verify_runs(trained)]
    report = verification.VerifyReport(
        sum(each.files for each in reports), sum(each.bytes for each in reports),
        sum(each.seconds for each in reports), (*reports[0].damages, *reports[1].damages),
    )  # fmt: skip
    talk.result(maintain.verification_lines(report), report)
    talk.next("featurecache repair" if reports[0].damages else "featurecache ls", cache)
    return int(bool(report.damages))


@command
@argument("name", required=False, metavar="[VIEW|RUN|SWEEP]")
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
    """A view, run, sweep, backbone or head in detail; without a name all backbones and heads there are."""
    cache = options["cache"]
    if sum(map(bool, (name, backbone, head))) > 1:
        raise BadOption("info shows one thing at a time: a view, run or sweep, --backbone NAME, or --head NAME.")
    if backbone:
        from featurecache.backbones import describe_backbone

        record = describe_backbone(backbone, weights=weights, image_size=image_size)
        talk.result(extract.backbone_lines(record), record)
        talk.next(f"featurecache extract --backbone {shell_word(backbone)} --data FOLDER")
    elif head:
        from heads.models.catalogue import describe_network, is_baseline
        from heads.reports.text import head_table

        if is_baseline(head):
            record, cache = describe_network(head, options["classes"], image_size), None
            words = f"train-baseline --arch {shell_word(head)} --data FOLDER"
        else:
            record, words = _head_record(talk, head, **options), f"train-head --head {shell_word(head)}"
        talk.result(head_table(record), record)
        talk.next(f"featurecache {words}", cache)
    elif name and (Path(name) / "config.json").exists():
        import heads
        from heads.reports.text import run_lines

        run = heads.load_run(name)
        talk.result(run_lines(run), {"run": run.path, "config": run.config, "metrics": run.metrics})
        talk.next(f"featurecache report {shell_word(name)}")
    elif name and (Path(name) / "sweep.json").exists():
        from heads.api import families_in
        from heads.evaluation.comparison import compare
        from heads.reports.text import lab_table

        left_out: list[str] = []
        comparison = compare(families_in(name, left_out=left_out)).record
        comparison["warnings"] += left_out
        talk.result(lab_table(comparison), {"sweep": name, **comparison})
        talk.next(f"featurecache report {shell_word(name)}")
    elif name:
        from featurecache.commands import inspect
        from featurecache.store.write_view import open_view

        record = inspect.view_record(open_view(name, cache))
        talk.result(inspect.view_lines(record), record)
        talk.next(extract.training_of(record["outputs"], record["view"], len(record["classes"]), record["task"]), cache)
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


@command
@argument("view", required=False, metavar="[VIEW]")
@option("--run", metavar="DIR", help="Look at the splits that this run drew, or a sweep's choice.")
@option("--splits", metavar="FILE", help="Look at the splits of a splits.csv.")
@option("--output", metavar="NAME", help="Vectors that are compared. [default: cls, else pooler, gap, mean]")
@option("--threshold", default=0.99, metavar="X", help="Cosine (features centred) of near-duplicates.")
@option("--csv", "csv_file", metavar="FILE", help="Write all pairs.")
@option("--sheet", metavar="FILE.png", help="Write a contact sheet of the pairs, side by side.")
@option("--most", default=1000, metavar="N", help="Near-duplicates kept for two splits: the closest; all count.")
@cache_option
def leaks(
    talk: Console, view: str | None, run: str | None, splits: str | None, csv_file: str | None, sheet: str | None,
    cache: str | None, **options: Any,
) -> int:  # fmt: skip
    """What stands in two splits at once, or twice in one: an image, a group, near-duplicates; and one image under two
    labels.

    \b
    featurecache leaks chest --csv leaks.csv --sheet leaks.png
    """
    from featurecache.commands import inspect
    from featurecache.files.atomic import write_whole
    from featurecache.maintenance.leaks import find_leaks

    opened, names, training = _splits_to_look_at(talk, view, run, splits, cache)
    images = inspect.open_images(opened) if sheet else None  # first: they may have gone
    found = find_leaks(opened, names=names, progress=talk.progress, **options)
    record = inspect.leaks_record(opened, found)
    talk.result(inspect.leaks_lines(opened, found), {**record, "csv": csv_file, "sheet": sheet})
    if csv_file:
        write_whole(Path(csv_file), inspect.leaks_csv(record).encode())
        talk.say(f"csv        {csv_file}")
    if sheet and images is not None:
        write_whole(Path(sheet), inspect.leaks_sheet(opened, found, images))
        talk.say(f"sheet      {sheet}")
    exact = any(each.splits[0] != each.splits[1] for each in (*found.of("image"), *found.of("group")))
    way = training + " --drop-leaks" * (exact and "train-head" in training)
    if found.of("near") and not sheet and not exact:
        way = f"featurecache leaks {shell_word(opened.label)} --sheet leaks.png"
    talk.next(way, cache)
    return 0


def _splits_to_look_at(
    talk: Console, view: str | None, run: str | None, splits: str | None, cache: str | None
) -> tuple[View, np.ndarray | None, str]:
    """The view, the splits of its rows where these are not its own, and the command that trains on them."""
    if run and splits:
        raise BadOption("--run and --splits both say which splits; give one of them.")
    if run:
        from heads.runs.run import is_pixels

        loaded = train.open_chosen(talk, run, trust_code=False)
        view = view or (None if is_pixels(loaded) else loaded.config["view"]["path"])
        splits = str(loaded.path / "splits.csv")
    opened = extract.open_features(talk, view, cache, "a name chooses")
    training = extract.training_of(opened.outputs, opened.label, len(opened.classes), opened.task)
    if not splits:
        return opened, None, training
    from heads.splits import read_splits

    warnings: list[str] = []
    names = read_splits(splits, opened.ids, warnings)
    talk.warn(warnings)
    return opened, names, f"{training} --splits {shell_word(splits)}"


COMMANDS = (
    *(extract.extract, extract.why),
    *(train.train_head, train.train_baseline, compare.ablate, compare.study, compare.evaluate, compare.report),
    *(train.predict, compare.explain, ls, info),
    *(verify, maintain.repair, leaks, maintain.rm, maintain.gc, maintain.compact),
    *(maintain.export, maintain.import_, maintain.merge, train.demo),
)
for each in COMMANDS:
    main.add_command(each)


if __name__ == "__main__":
    main()
