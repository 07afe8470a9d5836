"""Verify, repair, rm, gc, compact, merge, export, import.

The commands that look after a cache: what is in it, whether it is whole, and what becomes of it.

What the command line says of `rm`, `gc`, `compact`, `export`, `import` and `merge`: records and aligned lines.

What the command line says of `verify` and `repair`: records (``--json``) and aligned lines.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featurecache.commands.terminal import Console, cache_option, command
from featurecache.errors import BadOption
from featurecache.formatting import columns, one_line, shape_text, size_text

if TYPE_CHECKING:
    from featurecache.maintenance.collect import CollectResult, CompactResult, RemovedView, StoreGarbage
    from featurecache.maintenance.export import ExportResult
    from featurecache.maintenance.import_features import ImportResult
    from featurecache.maintenance.merge import MergedView, MergeResult
    from featurecache.maintenance.repair import Repair
    from featurecache.maintenance.verify import VerifyReport
    from featurecache.store.view import View


@command
@click.argument("view", required=False, metavar="[VIEW]")
@click.option("--output", metavar="NAME", help="Vectors that are compared. [default: cls, else pooler, gap, mean]")
@click.option("--threshold", default=0.99, metavar="X", help="Cosine from which two images are near-duplicates.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write all pairs.")
@click.option("--sheet", metavar="FILE.png", help="Write a contact sheet of the pairs, side by side.")
@click.option("--most", default=1000, metavar="N", help="Near-duplicates kept for two splits: the closest; all count.")
@cache_option
def leaks(
    talk: Console, view: str | None, csv_file: str | None, sheet: str | None, cache: str | None, **options: Any
) -> int:
    """What stands in two splits at once: an image, a group, near-duplicates; and one image under two labels.

    \b
    featurecache leaks chest --csv leaks.csv --sheet leaks.png
    """
    from featurecache.commands import inspect
    from featurecache.files.atomic import write_whole
    from featurecache.maintenance.leaks import find_leaks
    from featurecache.store.write_view import open_view

    opened = open_view(view, cache)
    if not view:
        talk.say(f"view       {opened.label}   (the newest; a name chooses)")
    if sheet:
        from featurecache.commands import inspect

        images = inspect.images_of(opened)  # says at once that they have gone
    found = find_leaks(opened, progress=talk.progress, **options)
    talk.result(
        inspect.lines(opened, found), {**inspect.record(opened, found), "csv": csv_file, "sheet": sheet}
    )  # fmt: skip
    if csv_file:
        write_whole(Path(csv_file), inspect.as_csv(opened, found).encode())
        talk.say(f"csv        {csv_file}")
    if sheet:
        write_whole(Path(sheet), inspect.draw(opened, found, images))
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
def verify(talk: Console, names: tuple[str, ...], cache: str | None) -> int:
    """Check every file of the cache (or of the stores named) against its hash, and views against shards.

    \b
    featurecache verify
    """
    from featurecache.formatting import byte_bar
    from featurecache.maintenance import verify as verification
    from featurecache.store.store import cache_folder

    folder = cache_folder(cache)
    only = verification.stores_called(names, folder) if names else None
    with byte_bar(verification.size_of(folder, only), "verify", talk.progress) as bar:
        report = verification.verify(folder, only, advance=bar.update)
    talk.result(verification_lines(report), verification_record(report))
    talk.next("featurecache repair" if report.damages else "featurecache ls", cache)
    return int(bool(report.damages))


@command
@_stores_argument
@click.option("--drop", is_flag=True, help="Leave out of the views what nobody can compute again: its image is gone.")
@click.option("--device", default="auto", help="auto, cpu, cuda, mps.")
@click.option("--weights", metavar="PATH", help="Where the backbone's weights are now, if not where they were.")
@click.option("--trust-code", is_flag=True, help="Run the module of a store made by a python: backbone.")
@cache_option
def repair(talk: Console, names: tuple[str, ...], cache: str | None, **options: Any) -> int:
    """Compute damaged or missing rows again from their images; every other row keeps its bytes.

    \b
    featurecache repair
    """
    from featurecache.maintenance import repair as mending
    from featurecache.maintenance.verify import stores_called
    from featurecache.store.store import cache_folder

    folder = cache_folder(cache)
    only = stores_called(names, folder) if names else None
    found = mending.repair(folder, only, say=talk.say, **options)
    talk.result(repair_lines(found), [repair_record(each) for each in found])
    gone = any(each.gone for each in found) and not options["drop"]
    talk.next("featurecache repair --drop" if gone else "featurecache verify", cache)
    return int(any(each.left for each in found))


@command
@click.argument("view", metavar="VIEW")
@click.option("--yes", is_flag=True, help="Do not ask.")
@cache_option
def rm(talk: Console, view: str, yes: bool, cache: str | None) -> int:
    """Remove a view. Its rows stay until gc: another view, or the next extraction, may use them.

    \b
    featurecache rm vit-in21k/chest
    """
    from featurecache.maintenance import collect
    from featurecache.store.write_view import find_view

    if not yes and sys.stdin.isatty():
        click.confirm(f"remove {find_view(view, cache)}?", abort=True, err=True)
    done = collect.remove_view(view, cache)
    talk.result(removed_lines(done), record(done))
    talk.next("featurecache gc", cache)
    return 0


@command
@click.option("--delete", is_flag=True, help="Free what is listed. Without it nothing is changed.")
@cache_option
def gc(talk: Console, delete: bool, cache: str | None) -> int:
    """List rows that no view names, stores without any, and unfinished files of processes that are gone.

    \b
    featurecache gc
    featurecache gc --delete
    """
    from featurecache.maintenance import collect

    found = collect.collect(cache, delete=delete)
    talk.result(garbage_lines(found), garbage_record(found))
    talk.next("featurecache gc --delete" if found.bytes and not delete else "featurecache ls", cache)
    return int(any(garbage.left for garbage in found.stores))


@command
@click.argument("view", required=False, metavar="[VIEW]")
@cache_option
def compact(talk: Console, view: str | None, cache: str | None) -> int:
    """Write the rows of a view into shards in its order, so that they are read in one sweep.

    \b
    featurecache compact chest
    """
    from featurecache.maintenance import collect

    done = collect.compact(view, cache)
    talk.result(compact_lines(done), record(done))
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
def export(talk: Console, view: str, file: str, cache: str | None, copies: bool, **options: Any) -> int:
    """Write a view to one plain file, .h5, .npz, .parquet or .safetensors, that needs neither the cache nor this tool.

    \b
    featurecache export chest chest.h5 --compress
    """
    from featurecache.maintenance.export import export_view
    from featurecache.store.write_view import open_view

    opened = open_view(view, cache, copies=copies)
    if copies and opened.augmented is None:
        raise BadOption(f"{opened.label} has no augmented copies; leave --copies out.")
    done = export_view(opened, file, progress=talk.progress, **options)
    talk.result(export_lines(done), record(done))
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
def import_(talk: Console, file: str, name: str, cache: str | None, **options: Any) -> int:
    """Make a view of features that are there already: .npy, .npz, .h5 or .safetensors. Marked as of unknown origin.

    \b
    featurecache import feats.npy --labels labels.csv --name chest
    featurecache import old.h5 --features-key x --labels y --classes normal,ill --name chest
    """
    from featurecache.maintenance.import_features import import_view
    from featurecache.store.view import View

    options |= {"columns": _pairs(options["columns"]), "classes": _words(options["classes"])}
    options |= {"prefix": _prefix(options["prefix"]), "grid": _grid(options["grid"])}
    done = import_view(file, name, cache=cache, progress=talk.progress, **options)
    label = View(done.view, columns_only=True).label
    talk.result(import_lines(done, label), record(done))
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
def merge(talk: Console, other: str, cache: str | None) -> int:
    """Take over the rows and views of another cache, say from another machine. OTHER is not changed.

    \b
    featurecache merge /mnt/usb/cache
    """
    from featurecache.maintenance import merge as merging

    found = merging.merge(other, cache, progress=talk.progress)
    talk.result(merge_lines(found), record(found))
    talk.next("featurecache ls", cache)
    return int(not all(merged.complete for merged in found))


def record(result: Any) -> Any:
    """A result as JSON: paths as text."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: record(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {key: record(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [record(value) for value in result]
    return str(result) if isinstance(result, Path) else result


def export_lines(done: ExportResult) -> str:
    return f"exported   {done.rows:,} rows of {', '.join(done.outputs)} to {done.path} ({size_text(done.bytes)})"


def import_lines(done: ImportResult, label: str) -> str:
    kept = " + ".join(shape_text(name, shape) for name, shape in done.outputs.items())
    classes = f", {len(done.classes)} classes" if done.classes else ""
    copies = f", {done.copies:,} copies" if done.copies else ""
    rows = [
        ("imported", f"{done.rows:,} rows, {done.task}{classes}{copies}; {done.new_rows:,} new to the cache"),
        ("keeps", kept), ("view", f"{label} in {done.view}; of unknown origin"),
    ]  # fmt: skip
    return columns([*rows, *(("note", one_line(note)) for note in done.notes)])


def removed_lines(done: RemovedView) -> str:
    images = "" if done.images is None else f" ({done.images:,} images)"
    others = f"the store still has {', '.join(done.others)}" if done.others else "it was the store's last view"
    return columns([("removed", f"{done.label}{images}; {others}"), ("remains", "its rows, until featurecache gc")])


def garbage_record(found: CollectResult) -> dict[str, Any]:
    return {**record(found), "bytes": found.bytes}


def garbage_lines(found: CollectResult) -> str:
    """A block a store; what is kept in spite of it, and why."""
    lines: list[str] = []
    for garbage in found.stores:
        lines += _garbage(garbage, found.deleted)
    if found.drafts:
        size = f"{size_text(found.draft_bytes)} {'removed' if found.deleted else 'to remove'}"
        lines.append(f"unfinished files of processes that are gone: {len(found.drafts):,}, {size}")
    if not lines:
        return "every row is named by a view; nothing to free"
    lines.append(f"{'freed' if found.deleted else 'to free':<16} {size_text(found.bytes):>9}")
    if not found.deleted and any(garbage.outputs for garbage in found.stores):
        lines.append(
            "Rows that no view names may also be those of an extraction that was stopped: finishing it keeps them."
        )
    return "\n".join(lines)


def _garbage(garbage: StoreGarbage, deleted: bool) -> list[str]:
    if garbage.left:
        return [one_line(f"{garbage.store}  left alone: {garbage.left}")]
    if not garbage.outputs and not garbage.folder and not garbage.others:
        return []
    what = "the whole store" if garbage.folder else "rows that no view names"
    lines = [f"{garbage.store}  {what}{' removed' if deleted else ''}"]
    for unused in garbage.outputs:
        whole = f", {unused.shards:,} shards as a whole" if unused.shards else ""
        kept = f" ({', '.join(unused.derived)} made of them is kept and needs none)" if unused.derived else ""
        lines.append(f"  {unused.output:<14} {size_text(unused.bytes):>9} in {unused.rows:,} rows{whole}{kept}")
    if garbage.others:
        others = one_line(", ".join(garbage.others[:5]))
        lines.append(f"  the folder stays: it holds {others}, which featurecache did not put there")
    return lines


def compact_lines(done: CompactResult) -> str:
    if not done.written and done.shards[0] == done.shards[1]:
        return f"compact    {done.view} is in order already: {done.shards[1]:,} shards"
    shards = f"{done.shards[0]:,} → {done.shards[1]:,} shards, {done.pieces[0]:,} → {done.pieces[1]:,} pieces"
    return f"compact    {done.view}: {shards}; {size_text(done.written)} written, the old files removed"


def merge_lines(found: list[MergeResult]) -> str:
    lines = []
    for each in found:
        where = f" → {each.store}{' (new)' if each.new else ''}" if each.store else ""
        taken = f"{each.rows:,} rows, {each.shards:,} shards, {size_text(each.bytes)}" if each.rows else "no new rows"
        lines.append(f"{each.source}{where}  {taken if each.store else 'left'}")
        lines += [f"  left: {one_line(reason)}" for reason in each.left]
        for view in each.views:
            lines.append(one_line(f"  view {view.name}  {_taken(view)}"))
    return "\n".join(lines)


def _taken(view: MergedView) -> str:
    if view.what == "left":
        return f"left: {view.reason}"
    if view.what == "renamed":
        return f"copied as {view.here}: another {view.name} is here"
    return (
        "copied" if view.what == "copied" else "here already" + (f", as {view.here}" if view.here != view.name else "")
    )


def verification_record(report: VerifyReport) -> dict[str, Any]:
    return {
        "files": report.files,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "damages": [
            {"path": str(d.path), "what": d.what, "rows": [list(row) for row in d.rows]} for d in report.damages
        ],
    }


def verification_lines(report: VerifyReport) -> str:
    """One line for what was checked, then each damaged file with the samples whose rows are wrong."""
    rate = size_text(report.bytes / report.seconds) if report.seconds else "0 B"
    what = f"{report.files:,} files, {size_text(report.bytes)} in {report.seconds:.2g} s ({rate}/s)"
    if not report.damages:
        return columns([("checked", f"{what}: all are what was written")])
    rows = [("checked", f"{what}: {len(report.damages):,} damaged or missing")]
    for damage in report.damages:
        shown = [f"  {sample}  ({output})" for sample, output in damage.rows[:10]]
        more = [f"  … and {len(damage.rows) - 10:,} more rows"] if len(damage.rows) > 10 else []
        rows.append(("damaged", "\n".join([str(damage), *shown, *more])))
    return columns(rows)


def repair_record(done: Repair) -> dict[str, Any]:
    return {
        "store": str(done.store),
        "replaced": [str(path) for path in done.replaced],
        "removed": [str(path) for path in done.removed],
        "rows_kept": done.kept,
        "rows_computed": done.computed,
        "gone": [{"id": sample, "reason": reason} for sample, reason in done.gone],
        "left": [{"path": str(damage.path), "what": damage.what} for damage in done.left],
    }


def repair_lines(done: list[Repair]) -> str:
    """What became of every damaged store; images that are gone are named, at most ten."""
    if not done:
        return columns([("repaired", "nothing: every file is what was written")])
    rows = []
    for each in done:
        what = f"{len(each.replaced):,} files written again, {each.computed:,} rows computed, {each.kept:,} kept"
        removed = f"; {len(each.removed):,} damaged files removed" if each.removed else ""
        rows.append(("store", f"{each.store}: {what}{removed}"))
        if each.gone:
            told = "cannot be computed again" if each.left else "left the views"
            shown = [f"  {sample}  {reason}" for sample, reason in each.gone[:10]]
            more = [f"  … and {len(each.gone) - 10:,} more"] if len(each.gone) > 10 else []
            rows.append(("gone", "\n".join([f"{len(each.gone):,} images {told}:", *shown, *more])))
        if each.gone and each.left:
            rows.append(("unchanged", "put the images back, or leave those rows out with --drop"))
        else:
            rows += [("left", str(damage)) for damage in each.left]
    return columns(rows)
