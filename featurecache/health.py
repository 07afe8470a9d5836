"""What the command line says of `verify` and `repair`: records (``--json``) and aligned lines."""

from __future__ import annotations

from typing import Any

from featurecache.amounts import byte_bar as byte_bar
from featurecache.amounts import columns, size_text
from featurecache.repair import Repair
from featurecache.verification import Report


def verification_record(report: Report) -> dict[str, Any]:
    return {
        "files": report.files,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "damages": [
            {"path": str(d.path), "what": d.what, "rows": [list(row) for row in d.rows]} for d in report.damages
        ],
    }


def verification_lines(report: Report) -> str:
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
