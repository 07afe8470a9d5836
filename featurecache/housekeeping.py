"""What the command line says of `rm`, `gc`, `compact`, `export`, `import` and `merge`: records and aligned lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from featurecache.amounts import columns, shape_text, size_text
from featurecache.exporting import Exported
from featurecache.importing import Imported
from featurecache.lifecycle import Collected, Compacted, Garbage, Removed
from featurecache.merging import Merged, TakenView
from featurecache.terminal import one_line


def record(result: Any) -> Any:
    """A result as JSON: paths as text."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: record(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {key: record(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [record(value) for value in result]
    return str(result) if isinstance(result, Path) else result


def export_lines(done: Exported) -> str:
    return f"exported   {done.rows:,} rows of {', '.join(done.outputs)} to {done.path} ({size_text(done.bytes)})"


def import_lines(done: Imported, label: str) -> str:
    kept = " + ".join(shape_text(name, shape) for name, shape in done.outputs.items())
    classes = f", {len(done.classes)} classes" if done.classes else ""
    copies = f", {done.copies:,} copies" if done.copies else ""
    rows = [
        ("imported", f"{done.rows:,} rows, {done.task}{classes}{copies}; {done.new_rows:,} new to the cache"),
        ("keeps", kept), ("view", f"{label} in {done.view}; of unknown origin"),
    ]  # fmt: skip
    return columns([*rows, *(("note", one_line(note)) for note in done.notes)])


def removed_lines(done: Removed) -> str:
    images = "" if done.images is None else f" ({done.images:,} images)"
    others = f"the store still has {', '.join(done.others)}" if done.others else "it was the store's last view"
    return columns([("removed", f"{done.label}{images}; {others}"), ("remains", "its rows, until featurecache gc")])


def garbage_record(found: Collected) -> dict[str, Any]:
    return {**record(found), "bytes": found.bytes}


def garbage_lines(found: Collected) -> str:
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


def _garbage(garbage: Garbage, deleted: bool) -> list[str]:
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


def compact_lines(done: Compacted) -> str:
    if not done.written and done.shards[0] == done.shards[1]:
        return f"compact    {done.view} is in order already: {done.shards[1]:,} shards"
    shards = f"{done.shards[0]:,} → {done.shards[1]:,} shards, {done.pieces[0]:,} → {done.pieces[1]:,} pieces"
    return f"compact    {done.view}: {shards}; {size_text(done.written)} written, the old files removed"


def merge_lines(found: list[Merged]) -> str:
    lines = []
    for each in found:
        where = f" → {each.store}{' (new)' if each.new else ''}" if each.store else ""
        taken = f"{each.rows:,} rows, {each.shards:,} shards, {size_text(each.bytes)}" if each.rows else "no new rows"
        lines.append(f"{each.source}{where}  {taken if each.store else 'left'}")
        lines += [f"  left: {one_line(reason)}" for reason in each.left]
        for view in each.views:
            lines.append(one_line(f"  view {view.name}  {_taken(view)}"))
    return "\n".join(lines)


def _taken(view: TakenView) -> str:
    if view.what == "left":
        return f"left: {view.reason}"
    if view.what == "renamed":
        return f"copied as {view.here}: another {view.name} is here"
    return (
        "copied" if view.what == "copied" else "here already" + (f", as {view.here}" if view.here != view.name else "")
    )
