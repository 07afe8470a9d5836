"""Commands ablate, evaluate, report, explain and study: many heads compared, heads on other data, reports and maps."""

from __future__ import annotations

from typing import Any

from click import Choice, argument

from featurecache.commands.help import option, options_of
from featurecache.commands.source_options import named_images, source_options
from featurecache.commands.terminal import (
    Console,
    cache_option,
    command,
    device_option,
    features_option,
    of_backbone_options,
    trust_option,
    typed_command,
)
from featurecache.formatting import aligned, counted, shell_word, shell_words
from heads.commands.train import open_chosen, page_options, prediction_by, training_options

tested_option = option("--show-test", type=Choice(["chosen", "all"]), default="chosen", help="Test of which settings.")


@command
@option(
    "--heads", required=True, metavar="A,B", help="linear, large, ridge, … (see info), cnn-cifar, finetune:resnet50, …"
)
@option("--features", metavar="V,W", help="Views of the same images. [default: the newest]")
@options_of(
    option("--data", metavar="SOURCE", help="Images for networks from pixels, where no view has them."),
    source_options,
    section="data",
)
@option("--outputs", metavar="A,B", help="cls,tokens,… each head takes those that fit it. [default: its own]")
@option("--seeds", default=1, metavar="N", help="Initialisations of every setting.")
@options_of(
    option("--fractions", default="1", metavar="GRID", help="Of train: 0.01,0.1,1; smaller ones are in larger."),
    option("--repeats", default=1, metavar="N", help="Draws of splits and fractions."),
    option("--folds", type=int, metavar="K", help="Cross-validate over train and val; a given test is left alone."),
    option("--search", type=Choice(["optuna"]), help="Search in ranges a..b instead of a grid."),
    option("--trials", type=int, metavar="N", help="With --search: of each head, output and view."),
    section="sweep",
)
@training_options("ablate")
@option("--controls/--no-controls", default=None, help="Chance, majority, pixels. [default: if untrained]")
@option("--out", metavar="DIR", help="New, or to go on in. [default: runs/ablate-VIEW-N]")
@option("--dry-run", is_flag=True, help="Say what would be trained; write nothing.")
@options_of(
    option("--reference", metavar="NAME", help="A head of the table: the others against it, paired."),
    tested_option,
    section="sweep",
)
@page_options
@cache_option
def ablate(
    talk: Console, heads: str, features: str | None, data: str | None,
    reference: str | None, show_test: str, no_images: bool, hash_ids: bool, **options: Any,
) -> int:  # fmt: skip
    """Train many heads, choose their settings on val, compare them on test.

    \b
    featurecache ablate --heads linear,large,attention --lr 1e-4..1e-2:5 --seeds 5
    featurecache ablate --heads linear --features vit-in21k/chest,resnet50/chest

    GRID is 1e-3, or 1e-3,1e-2, or 1e-4..1e-2:5 (equal ratios), or 0..0.5:+0.1 (equal steps); --search also takes
    1e-4..1e-2. Networks from pixels train as published. The same command goes on where it was stopped; of more seeds or
    values only what is new is trained.
    """
    from heads import api
    from heads.evaluation.comparison import compare
    from heads.reports.page import write_report
    from heads.reports.text import lab_table

    views = features.split(",") if features else None
    images = named_images(talk, data, options)
    options |= {"reference": reference, "say": talk.line, "progress": talk.progress}
    sweep = api.ablate(views, heads, data=images, **options)
    if sweep is None:
        talk.next(typed_command("dry_run"))
        return 0
    talk.status("writing the page")
    comparison = compare(sweep.families, reference=reference, show_test=show_test)
    written = write_report(sweep.path, sweep.families, comparison, images=not no_images, hash_ids=hash_ids)
    lines = [lab_table(comparison.record), f"sweep      {sweep.path}/   rows: {len(sweep.rows):,}", _written(written)]
    talk.result("\n".join(lines), {"sweep": sweep.path, "report": written.path, **comparison.record})
    talk.next(prediction_by(sweep.best))
    return 0


@command
@option("--run", "run", required=True, metavar="DIR", help="A run, or a sweep: its chosen heads.")
@features_option
@option("--data", metavar="SOURCE", help="Of a baseline: the images, where no view has them.")
@source_options
@option("--split", type=Choice(["train", "val", "test"]), help="Of the view. [default: all its labelled images]")
@option(
    "--classes", multiple=True, metavar="NAME=A,B", help="What the view calls a class of the run; NAME= for not there."
)
@trust_option
@cache_option
def evaluate(
    talk: Console, run: str, features: str | None, data: str | None, cache: str | None, split: str | None,
    classes: tuple[str, ...], trust_code: bool, **how: Any,
) -> int:  # fmt: skip
    """A finished head on another view (another hospital): nothing is fitted, all measures with intervals.

    \b
    featurecache evaluate --run runs/chest-large-1 --features other-hospital
    """
    from heads.api import families_in
    from heads.evaluation.comparison import compare
    from heads.evaluation.external import evaluate_run, external_images
    from heads.reports.text import external_table, how_made

    left_out: list[str] = []
    families = families_in(run, trust_code=trust_code, left_out=left_out)
    talk.warn(left_out)
    runs = [each for family in families for each in family.runs]
    images = external_images(runs, features, named_images(talk, data, how), cache)
    view = images(runs[0])
    if not features and not data:
        talk.say(f"view       {view.label}   (the newest; --features chooses)")
    evaluated = [
        evaluate_run(each, images(each), split=split, classes=classes, say=talk.line if number == 0 else None)
        for number, each in enumerate(runs)
    ]
    record = compare(families).record
    name = view.label + (f" ({split})" if split else "")
    tables = [external_table(family, name, record["task"], record["n_test"]) for family in record["families"]]
    written = sorted({each["written"] for each in evaluated})
    lines = [*tables, how_made(record, name), *(f"written    {path}" for path in written)]
    talk.result("\n".join(lines), {"evaluated": evaluated, "families": record["families"]})
    talk.next(f"featurecache report {shell_word(run)}")
    return int(any(" is damaged" in sentence for sentence in left_out))


@command
@argument("runs", nargs=-1, required=True, metavar="RUN…")
@option("--out", metavar="DIR", help="[default: the folder itself; of several: report-N beside the first]")
@option("--reference", metavar="NAME", help="A head of the table, or its folder: the others against it, paired.")
@option("--by", metavar="COLUMN", help="Measures by site, sex, device: a further column of the data.")
@option("--prevalence", type=float, metavar="P", help="PPV and NPV where this share is positive.")
@tested_option
@page_options
def report(talk: Console, runs: tuple[str, ...], no_images: bool, **options: Any) -> int:
    """One page of a run, a sweep, or several side by side: report.html, metrics.csv, metrics.json.

    \b
    featurecache report runs/ablate-chest-1
    featurecache report runs/chest-linear-1 runs/chest-large-1 --by sex
    """
    import heads

    talk.status("writing the page")
    written = heads.report(list(runs), images=not no_images, **options)
    files = {"report": written.path, "metrics": written.path.parent / "metrics.json"}
    talk.result(_written(written), files | {"images": written.images, "left_out": written.left_out})
    talk.warn(written.left_out)
    if written.images:
        hides = "" if options["hash_ids"] else ", --hash-ids hides what they are called"
        talk.say(f"           before you send it: --no-images leaves them out{hides}")
    talk.next(f"featurecache info {shell_word(runs[0])}")
    return int(any(" is damaged" in sentence for sentence in written.left_out))


@command
@option("--run", "runs", required=True, multiple=True, metavar="DIR", help="A run, or a sweep's choice; several.")
@option("--out", metavar="DIR", help="Where the PNGs go. [default: explain in the folder of the first run]")
@option(
    "--kind",
    "kinds",
    metavar="A,B",
    help="contribution, attention, grad-cam. [default: contribution; on pixels grad-cam]",
)
@option("--class", "classes", multiple=True, metavar="NAME", help="Whose margin. [default: the predicted class]")
@option("--method", type=Choice(["replace", "gradient"]), default="replace", help="Of contribution.")
@of_backbone_options
@argument("images", nargs=-1, required=True, metavar="IMAGE…")
def explain(talk: Console, runs: tuple[str, ...], images: tuple[str, ...], **options: Any) -> int:
    """Maps over images: what a head makes of every place, where the backbone looks, or Grad-CAM.

    \b
    featurecache explain --run runs/chest-large-1 new.png folder/
    featurecache explain --run runs/chest-large-1 --kind attention new.png

    Beside each map but attention's the same of the head with its weights shuffled: a map that looks like that says
    nothing. IMAGE is a file, a folder, a table, or the id of an image of the run's data.
    """
    import heads
    from heads.explanations.explain import explanations_table

    options["classes"] = options["classes"] or None
    opened = [open_chosen(talk, run, options["trust_code"]) for run in runs]
    maps = heads.explain(opened, list(images), **options)
    files = f"{counted(len(maps.files), 'PNG file')}, explain.json"
    made = f"{maps.path}/   {files}" if maps.files else "none; nothing was written"
    lines = [explanations_table(maps.records), f"maps       {made}"]
    talk.result("\n".join(lines), {"explained": maps.path, "files": maps.files, "maps": maps.records})
    if maps.files:
        talk.next(f"featurecache report {shell_words(runs)}")
    return int(any("error" in record for record in maps.records))


def _written(report: Any) -> str:
    shown = "no image of the data" if not report.images else f"{counted(report.images, 'image')} of the data"
    size = report.path.stat().st_size / 1e6
    return f"report     {report.path}   {size:.1f} MB, embeds {shown}; metrics.csv and metrics.json beside it"


@command
@argument("name", required=False, metavar="[NAME]")
@option("--data", multiple=True, metavar="[SET=]SOURCE", help="As extract takes it. [default: fetched]")
@option("--quick", is_flag=True, help="A trial in a minute or two: few images, small untrained networks.")
@option("--random-weights", is_flag=True, help="Run it without pretrained weights; published numbers are greyed.")
@option("--weights", multiple=True, metavar="[BACKBONE=]PATH", help="A copy of the weights that you have.")
@option("--only", metavar="A,B", help="These steps, and what they need; * stands for anything.")
@option("--skip", metavar="A,B", help="All steps but these.")
@option("--image-size", type=int, metavar="N", help="Pixels that every network sees. [default: its own]")
@option("--epochs", type=int, metavar="N", help="At most so many, of every network and head.")
@option("--train-per-class", type=int, metavar="N", help="Of networks from pixels: at most N images of a class.")
@device_option
@option("--out", metavar="DIR", help="[default: studies/NAME; with --quick studies/NAME-quick]")
@option("--dry-run", is_flag=True, help="Say the steps and about how long they take; compute nothing.")
@page_options
@cache_option
def study(
    talk: Console, name: str | None, only: str | None, skip: str | None, no_images: bool, **options: Any
) -> int:  # fmt: skip
    """A published study again, from its images to one page: features, heads, networks, numbers beside the published.

    \b
    featurecache study                            what there is
    featurecache study medical-mnist --quick      a trial, without any download
    featurecache study pneumonia --data chest_xray/

    The same command goes on where it was stopped; no step is done twice.
    """
    if name is None:
        from heads.studies.recipes import STUDIES

        questions = {key: each.question for key, each in STUDIES.items()}
        lines = aligned(list(questions.items()), right=2, indent=2)
        talk.result("\n".join(["studies:", *lines]), {"studies": questions})
        talk.next("featurecache study medical-mnist --quick")
        return 0
    from heads.studies.runner import result_lines, result_record, run_study

    options |= {"only": _words(only), "skip": _words(skip), "images": not no_images}
    result = run_study(name, say=talk.say, progress=talk.progress, **options)
    talk.result(result_lines(result), result_record(result))
    if not result.page:
        talk.next(typed_command("dry_run"))
    elif result.options.quick:
        talk.next(f"featurecache study {name} --data DIR")
    else:
        talk.next(prediction_by(result.tables[0].best))
    return 0


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
