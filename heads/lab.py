"""The commands of the head lab: many heads compared, heads on other data, and the report of either."""

from __future__ import annotations

import shlex
from typing import Any

import click

from featurecache.terminal import Talk, cache_option, command, features_option
from heads.sweep_options import sweep_options


@command
@sweep_options
def ablate(
    talk: Talk, heads: str, features: str | None, reference: str | None, show_test: str, no_images: bool,
    hash_ids: bool, **options: Any,
) -> int:  # fmt: skip
    """Train many heads, choose their settings on val, and compare them on test: a table and a page.

    \b
    featurecache ablate --heads linear,large,attention --lr 1e-4..1e-2:5 --seeds 5
    featurecache ablate --heads linear --features vit-in21k/chest,resnet50/chest --fractions 0.01,0.1,1

    The same command goes on where it was stopped; with more seeds or values only what is new is trained.
    """
    from heads import sweep
    from heads.comparison import compare
    from heads.page import write_report
    from heads.tables import lab_table

    views = features.split(",") if features else None
    found = sweep.ablate(views, heads, say=talk.line, progress=talk.progress, **options)
    if found is None:
        talk.next("the same command without --dry-run")
        return 0
    comparison = compare(found.families, reference=reference, show_test=show_test)
    written = write_report(found.path, found.families, comparison, images=not no_images, hash_ids=hash_ids)
    lines = [lab_table(comparison.record), f"sweep      {found.path}/   rows: {len(found.rows):,}", _written(written)]
    talk.result("\n".join(lines), {"sweep": str(found.path), "report": str(written.path), **comparison.record})
    talk.next(f"featurecache predict --run {shlex.quote(str(found.best.path))} IMAGE…")
    return 0


@command
@click.option("--run", "run", required=True, metavar="DIR", help="A run, or a sweep: its chosen heads.")
@features_option
@click.option("--split", metavar="NAME", help="train, val or test of the view. [default: all its labelled images]")
@click.option(
    "--classes", multiple=True, metavar="NAME=A,B", help="What the view calls a class of the run; NAME= for not there."
)
@click.option("--trust-code", is_flag=True, help="Import the module of a python: head.")
@cache_option
def evaluate(
    talk: Talk, run: str, features: str | None, cache: str | None, split: str | None, classes: tuple[str, ...],
    trust_code: bool,
) -> int:  # fmt: skip
    """A finished head on another view (another hospital): nothing is fitted, all measures with intervals.

    \b
    featurecache evaluate --run runs/chest-large-1 --features vit-in21k/other-hospital
    """
    from featurecache.views import open_view
    from heads.comparison import compare
    from heads.external import evaluate_run, families_in
    from heads.tables import external_table, how_made

    families = families_in(run, trust_code)
    view = open_view(features, cache)
    if not features:
        talk.say(f"view       {view.label}   (the newest; --features chooses)")
    evaluated = [
        evaluate_run(each, view, split=split, classes=classes, say=talk.line if number == 0 else None)
        for number, each in enumerate(each for family in families for each in family.runs)
    ]
    record = compare(families).record
    name = view.label + (f" ({split})" if split else "")
    tables = [external_table(family, name, record["task"], record["n_test"]) for family in record["families"]]
    written = sorted({each["written"] for each in evaluated})
    lines = [*tables, how_made(record), *(f"written    {path}" for path in written)]
    talk.result("\n".join(lines), {"evaluated": evaluated, "families": record["families"]})
    talk.next(f"featurecache report {shlex.quote(run)}")
    return 0


@command
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@click.option("--out", metavar="DIR", help="[default: the folder itself; of several: report-N beside the first]")
@click.option("--reference", metavar="NAME", help="A head of the table, or its folder: the others against it, paired.")
@click.option("--by", metavar="COLUMN", help="Measures by site, sex, device: a further column of the data.")
@click.option("--prevalence", type=float, metavar="P", help="PPV and NPV where this share is positive.")
@click.option("--show-test", type=click.Choice(["chosen", "all"]), default="chosen", help="Test of which settings.")
@click.option("--no-images", is_flag=True, help="Embed no image of the data.")
@click.option("--hash-ids", is_flag=True, help="Write ids as keyed hashes.")
def report(talk: Talk, runs: tuple[str, ...], no_images: bool, **options: Any) -> int:
    """One page of a run, a sweep, or several side by side: report.html, metrics.csv, metrics.json.

    \b
    featurecache report runs/ablate-chest-1
    featurecache report runs/chest-linear-1 runs/chest-large-1 --reference "linear on cls"
    """
    import heads

    written = heads.report(list(runs), images=not no_images, **options)
    record = {
        "report": str(written.path),
        "images": written.images,
        "metrics": str(written.path.parent / "metrics.json"),
    }
    talk.result(_written(written), record)
    if written.images:
        hides = "" if options["hash_ids"] else ", --hash-ids hides what they are called"
        talk.say(f"           before you send it: --no-images leaves them out{hides}")
    talk.next(f"featurecache info {shlex.quote(runs[0])}")
    return 0


def _written(report: Any) -> str:
    shown = "no image of the data" if not report.images else f"{report.images:,} images of the data"
    size = report.path.stat().st_size / 1e6
    return f"report     {report.path}   {size:.1f} MB, embeds {shown}; metrics.csv and metrics.json beside it"
