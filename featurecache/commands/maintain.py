"""Commands that look after a cache: repair, rm, gc, compact, export, import, merge; what they and verify print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from click import argument

from featurecache.commands.extract import training_of
from featurecache.commands.help import option, options_of
from featurecache.commands.source_options import (
    letter_case_option,
    order_option,
    pairs_of,
    task_option,
    uncertain_option,
)
from featurecache.commands.terminal import Console, cache_option, command, of_backbone_options, record_of
from featurecache.errors import BadOption
from featurecache.formatting import columns, counted, first_of, one_line, shape_text, shell_word, size_text

if TYPE_CHECKING:
    from featurecache.maintenance.collect import CollectResult
    from featurecache.maintenance.merge import MergeResult
    from featurecache.maintenance.repair import Repair
    from featurecache.maintenance.verify import VerifyReport


@command
@argument("names", nargs=-1, metavar="[STORE|VIEW]…")
@option("--drop", is_flag=True, help="Leave out of the views what nobody can compute again: its image is gone.")
@of_backbone_options
@cache_option
def repair(talk: Console, names: tuple[str, ...], cache: str | None, **options: Any) -> int:
    """Compute damaged or missing rows again from their images; every other row keeps its bytes.

    \b
    featurecache repair
    """
    from featurecache.maintenance import repair as mending
    from featurecache.maintenance.verify import stores_called
    from featurecache.store.store import own_cache

    folder = own_cache(cache, "repair")
    only = stores_called(names, folder) if names else None
    repairs = mending.repair(folder, only, say=talk.say, **options)
    records = []
    for each in repairs:
        record = record_of(each)
        rows = {"rows_kept": record.pop("kept"), "rows_computed": record.pop("computed")}
        records.append(record | rows | {"gone": [{"id": sample, "reason": reason} for sample, reason in each.gone]})
    talk.result(repair_lines(repairs), records)
    gone = any(each.gone for each in repairs) and not options["drop"]
    talk.next("featurecache repair --drop" if gone else "featurecache verify", cache)
    return int(any(each.left for each in repairs))


@command
@argument("view", metavar="VIEW")
@option("--yes", is_flag=True, help="Do not ask.")
@cache_option
def rm(talk: Console, view: str, yes: bool, cache: str | None) -> int:
    """Remove a view. Its rows stay until gc --delete: another view, or the next extraction, may use them.

    \b
    featurecache rm vit-in21k/chest
    """
    from featurecache.maintenance import collect
    from featurecache.store.store import own_cache
    from featurecache.store.write_view import find_view

    if not yes and sys.stdin.isatty():
        click.confirm(f"remove {find_view(view, own_cache(cache, 'rm'))}?", abort=True, err=True)
    done = collect.remove_view(view, cache)
    images = "" if done.images is None else f" ({counted(done.images, 'image')})"
    others = f"the store still has {', '.join(done.others)}" if done.others else "it was the store's last view"
    own = f"{size_text(done.bytes)} that no other view names" if done.bytes else "its rows: other views name them all"
    own = "its rows, as far as no other view names them" if done.bytes is None else own
    until = "" if done.bytes == 0 else ", until featurecache gc --delete"
    talk.result(columns([("removed", f"{done.label}{images}; {others}"), ("remains", own + until)]), done)
    talk.next("featurecache ls" if done.bytes == 0 else "featurecache gc", cache)
    return 0


@command
@option("--delete", is_flag=True, help="Free what is listed. Without it nothing is changed.")
@cache_option
def gc(talk: Console, delete: bool, cache: str | None) -> int:
    """List rows that no view names, stores without any, and unfinished files of processes that are gone.

    \b
    featurecache gc
    featurecache gc --delete
    """
    from featurecache.maintenance import collect

    done = collect.collect(cache, delete=delete)
    talk.result(garbage_lines(done), record_of(done) | {"bytes": done.bytes})
    talk.next("featurecache gc --delete" if done.bytes and not delete else "featurecache ls", cache)
    return int(any(garbage.left for garbage in done.stores))


@command
@argument("view", required=False, metavar="[VIEW]")
@cache_option
def compact(talk: Console, view: str | None, cache: str | None) -> int:
    """Write the rows of a view into shards in its order, so that they are read in one sweep.

    \b
    featurecache compact chest
    """
    from featurecache.maintenance import collect

    done = collect.compact(view, cache)
    what = f"{done.view} is in order already: {counted(done.shards[1], 'shard')}"
    if done.written or done.shards[0] != done.shards[1]:
        shards = f"{done.shards[0]:,} → {counted(done.shards[1], 'shard')}, "
        shards += f"{done.pieces[0]:,} → {counted(done.pieces[1], 'piece')}"
        what = f"{done.view}: {shards}; {size_text(done.written)} written, the old files removed"
    talk.result(f"compact    {what}", done)
    talk.next(f"featurecache verify {shell_word(done.view)}", cache)
    return 0


@command
@argument("view", metavar="VIEW")
@argument("file", metavar="FILE")
@option("--outputs", metavar="NAMES", help="cls,tokens,tokens-257,… [default: all that the view has]")
@option("--copies", is_flag=True, help="The augmented copies too, with their numbers in `versions`.")
@option("--compress", is_flag=True, help="gzip in .h5, deflate in .npz, zstd in .parquet.")
@option("--overwrite", is_flag=True, help="Replace a file that is there.")
@cache_option
def export(talk: Console, view: str, file: str, cache: str | None, copies: bool, **options: Any) -> int:
    """Write a view to one plain file that needs no cache and no tool of ours: .h5, .npz, .parquet, .csv, .safetensors.

    \b
    featurecache export chest chest.h5 --compress
    """
    from featurecache.maintenance.export import export_view
    from featurecache.store.write_view import open_view

    opened = open_view(view, cache, copies=copies)
    if copies and opened.augmented is None:
        raise BadOption(f"{opened.label} has no augmented copies; leave --copies out.")
    done = export_view(opened, file, progress=talk.progress, **options)
    kept = f"{counted(done.rows, 'row')} of {', '.join(done.outputs)}"
    talk.result(f"exported   {kept} to {done.path} ({size_text(done.bytes)})", done)
    if opened.augmented and not copies:
        talk.say(f"left out   {opened.rows - len(opened):,} augmented copies; --copies exports them too")
    if done.format not in ("parquet", "csv") and not copies:  # which nothing here reads as features
        talk.next(f"featurecache import {shell_word(done.path)} --name NAME")
    return 0


@command
@argument("file", metavar="FILE")
@option("--name", required=True, metavar="VIEW", help="Name of the view.")
@option("--labels", "--labels-key", metavar="FILE|KEY", help="A table, an .npy, or the array in FILE.")
@option("--features-key", metavar="KEY", help="The features. [default: the only 2-D or 3-D array of floats]")
@option("--ids-key", metavar="KEY", help="The array of ids. [default: ids, paths, …; '' for none]")
@option("--splits-key", metavar="KEY", help="The array of splits. [default: splits, split; '' for none]")
@option("--groups-key", metavar="KEY", help="The array of groups. [default: groups, patients, …; '' for none]")
@option("--column", "columns", multiple=True, metavar="ROLE=NAME", help="Of a table of labels: label=…, split=…")
@option("--classes", metavar="A,B,C", help="Names of the classes, label 0 first.")
@options_of(task_option, order_option, uncertain_option, letter_case_option)
@option("--output", metavar="NAME", help="What the features are: cls, pooler, … [default: vector; 3-D: tokens]")
@option("--prefix", metavar="NAMES", help="Of tokens: the first, which are no patches: cls,reg0,… or how many.")
@option("--grid", metavar="HxW", help="Of tokens: the patches.")
@cache_option
def import_(talk: Console, file: str, name: str, cache: str | None, **options: Any) -> int:
    """Make a view of features that are there already: .npy, .npz, .h5 or .safetensors. Marked as of unknown origin.

    \b
    featurecache import feats.npy --labels labels.csv --name chest
    featurecache import old.h5 --features-key x --labels y --name chest
    """
    from featurecache.maintenance.import_features import import_view
    from featurecache.store.view import View

    options |= {"columns": pairs_of(options["columns"]), "classes": _names(options["classes"])}
    options |= {"prefix": _prefix(options["prefix"]), "grid": _grid(options["grid"])}
    done = import_view(file, name, cache=cache, progress=talk.progress, **options)
    label = View(done.view, columns_only=True).label
    task = done.task + f", {len(done.classes):,} class{'es' * (len(done.classes) > 1)}" * bool(done.classes)
    duplicates = f", {counted(done.duplicates, 'duplicate')}" if done.duplicates else ""
    rows = [
        ("imported", f"{counted(done.rows, 'row')}, {task}{duplicates}; {done.new_rows:,} new to the cache"),
        ("keeps", " + ".join(shape_text(name, shape) for name, shape in done.outputs.items())),
        ("view", f"{label} in {done.view}; of unknown origin"),
    ]
    talk.result(columns([*rows, *(("note", one_line(note)) for note in done.notes)]), done)
    look = f"featurecache info {shell_word(label)}"
    talk.next(look if done.task == "unlabelled" else training_of(done.outputs, label), cache)
    return 0


import_.name = "import"


def _names(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",")] if text else None


def _prefix(text: str | None) -> list[str] | None:
    """Names, or a number of tokens without one."""
    if text and text.isdecimal():
        return [f"prefix{number}" for number in range(min(int(text), 1 << 16))]
    return [] if text == "" else _names(text)


def _grid(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise BadOption(f"--grid takes HxW, such as 14x14, not {text!r}.")
    return int(height), int(width)


@command
@argument("other", metavar="OTHER")
@cache_option
def merge(talk: Console, other: str, cache: str | None) -> int:
    """Take over the rows and views of another cache, say from another machine. OTHER is not changed.

    \b
    featurecache merge /mnt/usb/cache
    """
    from featurecache.maintenance import merge as merging

    results = merging.merge(other, cache, progress=talk.progress)
    talk.result(merge_lines(results), results)
    talk.next("featurecache ls", cache)
    return int(not all(merged.complete for merged in results))


def garbage_lines(done: CollectResult) -> str:
    """A block a store; what is kept in spite of it, and why."""
    lines: list[str] = []
    for store in done.stores:
        if store.left:
            lines.append(one_line(f"{store.store}  left alone: {store.left}"))
            continue
        if store.outputs or store.folder or store.others:
            what = "the whole store" if store.folder else "rows that no view names"
            lines.append(f"{store.store}  {what}{' removed' if done.deleted else ''}")
        for rows in store.outputs:
            whole = f", {counted(rows.shards, 'shard')} as a whole" if rows.shards else ""
            kept = f" ({', '.join(rows.derived)} made of them is kept and needs none)" if rows.derived else ""
            lines.append(f"  {rows.output:<14} {size_text(rows.bytes):>9} in {counted(rows.rows, 'row')}{whole}{kept}")
        if store.others:
            others = one_line(", ".join(store.others[:5]))
            lines.append(f"  the folder stays: it holds {others}, which featurecache did not put there")
    if done.drafts:
        size = f"{size_text(done.draft_bytes)} {'removed' if done.deleted else 'to remove'}"
        lines.append(f"unfinished files of processes that are gone: {len(done.drafts):,}, {size}")
    if not lines:
        return "every row is named by a view; nothing to free"
    lines.append(f"{'freed' if done.deleted else 'to free':<16} {size_text(done.bytes):>9}")
    if not done.deleted and any(store.outputs for store in done.stores):
        what = "Rows that no view names may also be those of an extraction that was stopped: finishing it keeps them."
        lines.append(what)
    return "\n".join(lines)


def merge_lines(results: list[MergeResult]) -> str:
    lines = []
    for each in results:
        where = f" → {each.store}{' (new)' if each.new else ''}" if each.store else ""
        shards = f"{counted(each.rows, 'row')}, {counted(each.shards, 'shard')}, {size_text(each.bytes)}"
        taken = shards if each.rows else "no new rows"
        lines.append(f"{each.source}{where}  {taken if each.store else 'left'}")
        lines += [f"  left: {one_line(reason)}" for reason in each.left]
        for view in each.views:
            what = {
                "left": f"left: {view.reason}",
                "renamed": f"copied as {view.here}: another {view.name} is here",
                "here": "here already" + (f", as {view.here}" if view.here != view.name else ""),
            }
            lines.append(one_line(f"  view {view.name}  {what.get(view.what, view.what)}"))
    return "\n".join(lines)


def verification_lines(report: VerifyReport) -> str:
    """One line for what was checked, then each damaged file with the samples whose rows are wrong."""
    rate = size_text(report.bytes / report.seconds) if report.seconds else "0 B"
    what = f"{counted(report.files, 'file')}, {size_text(report.bytes)} in {report.seconds:.2g} s ({rate}/s)"
    if not report.damages:
        return columns([("checked", f"{what}: all are what was written")])
    rows = [("checked", f"{what}: {len(report.damages):,} damaged or missing")]
    for damage in report.damages:
        shown = first_of([(sample, f"({output})") for sample, output in damage.rows], "more rows")
        rows.append(("damaged", "\n".join([str(damage), *shown])))
    return columns(rows)


def repair_lines(done: list[Repair]) -> str:
    """What became of every damaged store; images that are gone are named, at most ten."""
    if not done:
        return columns([("repaired", "nothing: every file is what was written")])
    rows = []
    for each in done:
        rows_made = f"{counted(each.computed, 'row')} computed, {each.kept:,} kept"
        what = f"{counted(len(each.replaced), 'file')} written again, {rows_made}"
        removed = f"; {counted(len(each.removed), 'damaged file')} removed" if each.removed else ""
        rows.append(("store", f"{each.store}: {what}{removed}"))
        if each.gone:
            told = "cannot be computed again" if each.left else "left the views"
            rows.append(("gone", "\n".join([f"{counted(len(each.gone), 'image')} {told}:", *first_of(each.gone)])))
        if each.gone and each.left:
            rows.append(("unchanged", "put the images back, or leave those rows out with --drop"))
        else:
            rows += [("left", str(damage)) for damage in each.left]
    return columns(rows)
