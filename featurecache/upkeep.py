"""The commands that look after a cache: what is in it, whether it is whole, and what becomes of it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurecache.errors import BadOption
from featurecache.terminal import Talk, cache_option, command

if TYPE_CHECKING:
    from featurecache.reader import View


@command
@click.argument("view", required=False, metavar="[VIEW]")
@click.option("--output", metavar="NAME", help="Vectors that are compared. [default: cls, else pooler, gap, mean]")
@click.option("--threshold", default=0.99, metavar="X", help="Cosine from which two images are near-duplicates.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write all pairs.")
@click.option("--sheet", metavar="FILE.png", help="Write a contact sheet of the pairs, side by side.")
@click.option("--most", default=1000, metavar="N", help="Near-duplicates kept for two splits: the closest; all count.")
@cache_option
def leaks(
    talk: Talk, view: str | None, csv_file: str | None, sheet: str | None, cache: str | None, **options: Any
) -> int:
    """What stands in two splits at once: an image, a group, near-duplicates; and one image under two labels.

    \b
    featurecache leaks chest --csv leaks.csv --sheet leaks.png
    """
    from featurecache import findings
    from featurecache.files import write_whole
    from featurecache.leaks import find_leaks
    from featurecache.views import open_view

    opened = open_view(view, cache)
    if not view:
        talk.say(f"view       {opened.label}   (the newest; a name chooses)")
    if sheet:
        from featurecache import pairs

        images = pairs.images_of(opened)  # says at once that they have gone
    found = find_leaks(opened, progress=talk.progress, **options)
    talk.result(
        findings.lines(opened, found), {**findings.record(opened, found), "csv": csv_file, "sheet": sheet}
    )  # fmt: skip
    if csv_file:
        write_whole(Path(csv_file), findings.as_csv(opened, found).encode())
        talk.say(f"csv        {csv_file}")
    if sheet:
        write_whole(Path(sheet), pairs.draw(opened, found, images))
        talk.say(f"sheet      {sheet}")
    exact = bool(found.of("image") or found.of("group"))
    talk.next(_after_leaks(opened, exact, bool(found.of("near")) and not sheet), cache)
    return 0


def _after_leaks(view: View, exact: bool, unseen: bool) -> str:
    label = shlex.quote(view.label)
    if unseen and not exact:
        return f"featurecache leaks {label} --sheet leaks.png"
    head = "large" if view.has("tokens") else "linear"
    return f"featurecache train-head --head {head} --features {label}" + (" --drop-leaks" if exact else "")


_stores_argument = click.argument("names", nargs=-1, metavar="[STORE|VIEW]…")


@command
@_stores_argument
@cache_option
def verify(talk: Talk, names: tuple[str, ...], cache: str | None) -> int:
    """Check every file of the cache (or of the stores named) against its hash, and views against shards.

    \b
    featurecache verify
    """
    from featurecache import health, verification
    from featurecache.stores import cache_folder

    folder = cache_folder(cache)
    only = verification.stores_called(names, folder) if names else None
    with health.byte_bar(verification.size_of(folder, only), "verify", talk.progress) as bar:
        report = verification.verify(folder, only, advance=bar.update)
    talk.result(health.verification_lines(report), health.verification_record(report))
    talk.next("featurecache repair" if report.damages else "featurecache ls", cache)
    return int(bool(report.damages))


@command
@_stores_argument
@click.option("--drop", is_flag=True, help="Leave out of the views what nobody can compute again: its image is gone.")
@click.option("--device", default="auto", help="auto, cpu, cuda, mps.")
@click.option("--weights", metavar="PATH", help="Where the backbone's weights are now, if not where they were.")
@click.option("--trust-code", is_flag=True, help="Run the module of a store made by a python: backbone.")
@cache_option
def repair(talk: Talk, names: tuple[str, ...], cache: str | None, **options: Any) -> int:
    """Compute damaged or missing rows again from their images; every other row keeps its bytes.

    \b
    featurecache repair
    """
    from featurecache import health
    from featurecache import repair as mending
    from featurecache.stores import cache_folder
    from featurecache.verification import stores_called

    folder = cache_folder(cache)
    only = stores_called(names, folder) if names else None
    found = mending.repair(folder, only, say=talk.say, **options)
    talk.result(health.repair_lines(found), [health.repair_record(each) for each in found])
    gone = any(each.gone for each in found) and not options["drop"]
    talk.next("featurecache repair --drop" if gone else "featurecache verify", cache)
    return int(any(each.left for each in found))


@command
@click.argument("view", metavar="VIEW")
@click.option("--yes", is_flag=True, help="Do not ask.")
@cache_option
def rm(talk: Talk, view: str, yes: bool, cache: str | None) -> int:
    """Remove a view. Its rows stay until gc: another view, or the next extraction, may use them.

    \b
    featurecache rm vit-in21k/chest
    """
    from featurecache import housekeeping, lifecycle
    from featurecache.views import find_view

    if not yes and sys.stdin.isatty():
        click.confirm(f"remove {find_view(view, cache)}?", abort=True, err=True)
    done = lifecycle.remove_view(view, cache)
    talk.result(housekeeping.removed_lines(done), housekeeping.record(done))
    talk.next("featurecache gc", cache)
    return 0


@command
@click.option("--delete", is_flag=True, help="Free what is listed. Without it nothing is changed.")
@cache_option
def gc(talk: Talk, delete: bool, cache: str | None) -> int:
    """List rows that no view names, stores without any, and unfinished files of processes that are gone.

    \b
    featurecache gc
    featurecache gc --delete
    """
    from featurecache import housekeeping, lifecycle

    found = lifecycle.collect(cache, delete=delete)
    talk.result(housekeeping.garbage_lines(found), housekeeping.garbage_record(found))
    talk.next("featurecache gc --delete" if found.bytes and not delete else "featurecache ls", cache)
    return int(any(garbage.left for garbage in found.stores))


@command
@click.argument("view", required=False, metavar="[VIEW]")
@cache_option
def compact(talk: Talk, view: str | None, cache: str | None) -> int:
    """Write the rows of a view into shards in its order, so that they are read in one sweep.

    \b
    featurecache compact chest
    """
    from featurecache import housekeeping, lifecycle

    done = lifecycle.compact(view, cache)
    talk.result(housekeeping.compact_lines(done), housekeeping.record(done))
    talk.next(f"featurecache verify {shlex.quote(done.view)}", cache)
    return 0


@command
@click.argument("view", metavar="VIEW")
@click.argument("file", metavar="FILE")
@click.option("--outputs", metavar="NAMES", help="cls,tokens,tokens-257,… [default: all that the view has]")
@click.option("--copies", is_flag=True, help="The augmented copies too, with their numbers in `versions`.")
@click.option("--compress", is_flag=True, help="gzip in .h5, deflate in .npz, zstd in .parquet.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@cache_option
def export(talk: Talk, view: str, file: str, cache: str | None, copies: bool, **options: Any) -> int:
    """Write a view to one plain file, .h5, .npz, .parquet or .safetensors, that needs neither the cache nor this tool.

    \b
    featurecache export chest chest.h5 --compress
    """
    from featurecache import housekeeping
    from featurecache.exporting import export_view
    from featurecache.views import open_view

    opened = open_view(view, cache, copies=copies)
    if copies and opened.augmented is None:
        raise BadOption(f"{opened.label} has no augmented copies; leave --copies out.")
    done = export_view(opened, file, progress=talk.progress, **options)
    talk.result(housekeeping.export_lines(done), housekeeping.record(done))
    if opened.augmented and not copies:
        talk.say(f"left out   {opened.rows - len(opened):,} augmented copies; --copies exports them too")
    if done.format != "parquet" and not copies:  # which nothing here reads as features
        talk.next(f"featurecache import {shlex.quote(str(done.path))} --name NAME")
    return 0


@command
@click.argument("file", metavar="FILE")
@click.option("--name", required=True, metavar="VIEW", help="Name of the view.")
@click.option("--labels", "--labels-key", metavar="FILE|KEY", help="A table, an .npy, or the array in FILE.")
@click.option("--features-key", metavar="KEY", help="The features. [default: the only 2-D or 3-D array of floats]")
@click.option("--ids-key", metavar="KEY", help="The array of ids. [default: ids, paths, …; '' for none]")
@click.option("--splits-key", metavar="KEY", help="The array of splits. [default: splits, split; '' for none]")
@click.option("--groups-key", metavar="KEY", help="The array of groups. [default: groups, patients, …; '' for none]")
@click.option("--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of a table of labels: label=…, split=…")
@click.option("--classes", metavar="A,B,C", help="Names of the classes, label 0 first.")
@click.option(
    "--task", type=click.Choice(["binary", "multiclass", "ordinal", "multilabel"]), help="[default: by the labels]"
)
@click.option("--output", metavar="NAME", help="What the features are: cls, pooler, … [default: vector; 3-D: tokens]")
@click.option("--prefix", metavar="NAMES", help="Of tokens: the first, which are no patches: cls,reg0,… or how many.")
@click.option("--grid", metavar="HxW", help="Of tokens: the patches.")
@cache_option
def import_(talk: Talk, file: str, name: str, cache: str | None, **options: Any) -> int:
    """Make a view of features that are there already: .npy, .npz, .h5 or .safetensors. Marked as of unknown origin.

    \b
    featurecache import feats.npy --labels labels.csv --name chest
    featurecache import old.h5 --features-key x --labels y --classes normal,ill --name chest
    """
    from featurecache import housekeeping
    from featurecache.importing import import_view
    from featurecache.reader import View

    options |= {"columns": _pairs(options["columns"]), "classes": _words(options["classes"])}
    options |= {"prefix": _prefix(options["prefix"]), "grid": _grid(options["grid"])}
    done = import_view(file, name, cache=cache, progress=talk.progress, **options)
    label = View(done.view, columns_only=True).label
    talk.result(housekeeping.import_lines(done, label), housekeeping.record(done))
    head = "large" if "tokens" in done.outputs else "linear"
    trains = f"featurecache train-head --head {head} --features {shlex.quote(label)}"
    talk.next(f"featurecache info {shlex.quote(label)}" if done.task == "unlabelled" else trains, cache)
    return 0


import_.name = "import"


def _words(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",")] if text else None


def _pairs(columns: tuple[str, ...]) -> dict[str, str] | None:
    for pair in columns:
        if "=" not in pair:
            raise BadOption(f'--column takes ROLE=NAME (--column label=finding), not "{pair}".')
    return dict(pair.split("=", 1) for pair in columns) or None


def _prefix(text: str | None) -> list[str] | None:
    """Names, or a number of tokens without one."""
    if text is None or not text.isdecimal():
        return _words(text) if text else None if text is None else []
    return [f"prefix{number}" for number in range(min(int(text), 1 << 16))]


def _grid(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise BadOption(f"--grid takes HxW, such as 14x14, not {text!r}.")
    return int(height), int(width)


@command
@click.argument("other", metavar="OTHER")
@cache_option
def merge(talk: Talk, other: str, cache: str | None) -> int:
    """Take over the rows and views of another cache, say from another machine. OTHER is not changed.

    \b
    featurecache merge /mnt/usb/cache
    """
    from featurecache import housekeeping, merging

    found = merging.merge(other, cache, progress=talk.progress)
    talk.result(housekeeping.merge_lines(found), housekeeping.record(found))
    talk.next("featurecache ls", cache)
    return int(not all(merged.complete for merged in found))
