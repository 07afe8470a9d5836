"""Contents of a cache as lines and JSON: stores and views (ls), one view (info), leaks with their CSV and sheet.

Names come from strangers: records go through `one_line` before they become lines, cells of the CSV through `cell`.
A command loads this when it runs, and numpy and torch with it.
"""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.commands.terminal import record_of
from featurecache.errors import BadOption, FeatureCacheError, UnreadableImage
from featurecache.formatting import aligned, cell, columns, cost_per_image, counted, one_line, shape_text, size_text
from featurecache.images.decoding import digest
from featurecache.images.headers import EncodedImage, crop_words
from featurecache.maintenance.leaks import KINDS, LeakFinding, Leaks
from featurecache.sources import reopen
from featurecache.sources.base import Dataset
from featurecache.sources.summary import SheetCell, SheetSection, grid_of_images, short_name
from featurecache.store.store import Store, stores, unreadable_stores
from featurecache.store.view import View


def cache_record(cache: Path) -> list[dict[str, Any]]:
    """Stores with their outputs (shards, rows, bytes) and views. A store that cannot be read says why."""
    broken = [{"folder": str(folder), "error": str(error), "bytes": 0} for folder, error in unreadable_stores(cache)]
    return [_store_record(store) for store in stores(cache)] + broken


def _store_record(store: Store) -> dict[str, Any]:
    outputs = {}
    for folder in sorted(path for path in store.path.iterdir() if path.is_dir() and not path.is_symlink()):
        files = list(folder.glob("[0-9a-f]*.h5"))
        outputs[folder.name] = {"shards": len(files), "bytes": sum(path.lstat().st_size for path in files)}
    names = ("untrained", "imported", "image_size", "precision", "dtype")
    return {
        "folder": str(store.path),
        "backbone": store.provenance.get("backbone", store.path.name),
        "fingerprint": store.fingerprint,
        **{name: getattr(store.spec, name) for name in names},
        "outputs": outputs,
        "views": [_view_line(path) for path in store.views()],
        "bytes": sum(entry["bytes"] for entry in outputs.values()),
    }


def _view_line(path: Path) -> dict[str, Any]:
    try:
        view = View(path)
    except FeatureCacheError as error:
        return {"name": path.stem, "error": str(error)}
    return {
        "name": path.stem,
        "label": view.label,
        "images": len(view),
        "copies": view.rows - len(view),
        "task": view.task,
        "classes": len(view.classes),
        "outputs": list(view.outputs),
        "failed": len(view.failed),
        "bytes": sum(view.info(name).row_bytes for name in view.outputs) * view.distinct,
    }


def cache_lines(cache: Path, records: list[dict[str, Any]]) -> str:
    """A block per store: its outputs with their size, its views."""
    if not records:
        return f"{cache} holds no features yet; featurecache extract --backbone NAME --data FOLDER makes some"
    lines = []
    for store in one_line(records):
        if "error" in store:
            lines.append(f"{store['folder']}  cannot be read: {store['error']}")
            continue
        size = "×".join(map(str, store["image_size"]))
        how = "origin unknown" if store["imported"] else f"{size} px, {store['precision']}"
        what = f"{how}, {store['dtype']}" + (", untrained" if store["untrained"] else "")
        lines.append(f"{store['folder']}  {store['backbone']}, {what}: {size_text(store['bytes'])}")
        for name, entry in store["outputs"].items():
            shards = counted(entry["shards"], "shard")
            lines.append(f"  {name:<14} {size_text(entry['bytes']):>9} in {shards}")
        for view in store["views"]:
            if "error" in view:
                lines.append(f"  view {view['name']}: {view['error']}")
                continue
            failed = f", {view['failed']} left out" if view["failed"] else ""
            kept = f"{', '.join(view['outputs'])}, {size_text(view['bytes'])}"
            copies = f" and {view['copies']:,} augmented copies" if view["copies"] else ""
            classes = f"{view['classes']:,} class{'es' * (view['classes'] > 1)} ({view['task']})"
            what = f"{counted(view['images'], 'image')}{copies}, {classes if view['classes'] else 'no labels'}"
            lines.append(f"  view {view['label']}  {what}{failed}: {kept}")
    lines.append(f"{'all':<16} {size_text(sum(store['bytes'] for store in records)):>9}")
    return "\n".join(lines)


_AS_THEY_ARE = ("source", "failed", "untrained", "imported", "fingerprint", "spec", "provenance", "cost")


def view_record(view: View) -> dict[str, Any]:
    splits, counts = view.counts_by_split()
    return {
        "view": view.label,
        "path": str(view.path),
        "images": len(view),
        "distinct": len(np.unique(view.digests)),
        "augmented": _augmented_record(view),
        "task": view.task,
        "classes": view.classes,
        "splits": splits,
        "counts": counts,
        "groups": None if view.groups is None else len(set(view.groups)),
        "meta": list(view.meta),
        "outputs": {
            name: record_of(info) | {"bytes": view.info(name).row_bytes * view.rows, "rounding": _rounding(view, name)}
            for name, info in view.outputs.items()
        },
        **{name: getattr(view, name) for name in _AS_THEY_ARE},
    }


def _augmented_record(view: View) -> dict[str, Any] | None:
    if view.augmented is None:
        return None
    images = int((view.copies()[:, 1:] >= len(view)).any(axis=1).sum())
    words = str(view.augmented.augmentation)
    return {**view.augmented.to_dict(), "words": words, "images": images, "copies": view.rows - len(view)}


def _rounding(view: View, name: str) -> dict[str, Any] | None:
    """The certificate of half precision, |stored − float32|₂ / |float32|₂ over the rows; None: none were rounded."""
    errors = view.stored(name).errors
    if errors is None:
        return None
    measured = errors[np.isfinite(errors)]
    worst, mean = (float(measured.max()), float(measured.mean(dtype=np.float64))) if len(measured) else (None, None)
    return {"rows": len(measured), "worst": worst, "mean": mean}


def view_lines(record: dict[str, Any]) -> str:
    """``info VIEW``: the data, the outputs, and what made them."""
    record = one_line(record)
    spec, made = record["spec"], record["provenance"]
    duplicates = record["images"] - record["distinct"]
    facts = f"{counted(record['images'], 'image')}, {record['task']}"
    facts += f", {counted(duplicates, 'duplicate')}" * bool(duplicates)
    if record["groups"] is not None:
        facts += f", {counted(record['groups'], 'group')}"
    header = ["", *(split or "no split" for split in record["splits"])]
    counts = [[name, *(f"{n:,}" for n in row)] for name, row in zip(record["classes"], record["counts"], strict=True)]
    rows = [
        ("view", f"{record['view']} in {record['path']}"),
        ("data", f"{record['source'].get('data')}  {facts}"),
        *[("understood", text) for text in (record["source"].get("understood"),) if text],
        *[("classes", "\n".join(aligned([header, *counts], margin=11)))] * bool(counts),
    ]
    if crop := record["source"].get("crop"):
        rows.append(("crop", crop_words(crop)))
    if made_of := record["augmented"]:
        each = "one each" if made_of["views"] == 1 else f"{made_of['views']:,} each"
        copies = f"{made_of['copies']:,} augmented copies, {each} of {counted(made_of['images'], 'image')}"
        rows.append(("augment", f"{copies}: {made_of['words']}, seed {made_of['augment']['seed']}"))
    for name, info in record["outputs"].items():
        tokens = ""
        if info["prefix"] is not None:
            before = f"{', '.join(info['prefix'])}, then " if info["prefix"] else ""
            tokens = f": {before}{'×'.join(map(str, info['grid']))} patches"
        shape = shape_text(name, info["shape"])
        rows.append(("keeps", f"{shape} {info['dtype']}, {size_text(info['bytes'])}{tokens}"))
        if info["rounding"]:
            rows.append(("", _rounding_line(info["rounding"], record["images"])))
    trained = "untrained: random weights" if record["untrained"] else made.get("licence", "")
    backbone = "  ".join(filter(None, [made.get("backbone"), made.get("id"), made.get("revision"), trained]))
    size = "×".join(map(str, spec["image_size"]))
    key = f"{size} px, {spec['precision']}, positions {spec['position_embeddings']}"
    if record["imported"]:
        backbone, key = f"imported from {made.get('file')}, {made.get('when')}; origin unknown", "origin unknown"
    rows += [
        ("backbone", backbone),
        ("spec", f"{record['fingerprint']}  {key}"),
        ("made by", ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())),
        ("cost", cost_per_image(record["cost"])),
    ]
    if record["failed"]:
        failed = [f"{entry['id']}  {entry['reason']}" for entry in record["failed"]]
        rows.append(("left out", "\n".join([counted(len(failed), "image"), *failed])))
    return columns(rows)


def _rounding_line(rounding: dict[str, Any], rows: int) -> str:
    if not rounding["rows"]:
        return "rounding to float16 was not measured: derived later from stored tokens, or imported"
    what = f"{rounding['worst']:.1e} at worst, {rounding['mean']:.1e} on average"
    some = f" (of {rounding['rows']:,} rows that were measured)" if rounding["rows"] < rows else ""
    return f"rounding to float16 moved a row by {what}, relative to float32{some}"


FIRST = 8  # pairs of a finding that are shown as lines


def _title(finding: LeakFinding) -> str:
    """``same image, train and val``."""
    return f"{KINDS[finding.kind]}, {_splits(finding)}"


def _splits(finding: LeakFinding) -> str:
    a, b = (name or "no split" for name in finding.splits)
    return f"{a} and {b}" if a != b else f"within {a}" if finding.splits[0] else "without a split"


def _size(finding: LeakFinding) -> str:
    """``8 images``."""
    noun = {"group": "group", "near": "pair"}.get(finding.kind, "image")
    return counted(finding.count, noun)


def _label(view: View, row: int) -> str:
    """The class of a row, or its positive labels; empty where none is known."""
    label = view.labels[row]
    numbers = np.flatnonzero(label == 1).tolist() if view.labels.ndim == 2 else [int(label)]
    return "; ".join(view.classes[number] for number in numbers if 0 <= number < len(view.classes))


def _pairs(view: View, finding: LeakFinding, most: int | None = None) -> list[dict[str, Any]]:
    """The first pairs of a finding as records."""
    groups = view.groups if finding.kind == "group" else None
    return [
        {
            "kind": finding.kind,
            "splits": finding.splits,
            "ids": [view.ids[row] for row in rows],
            "labels": [_label(view, row) for row in rows],
            "rows": finding.copies[number].tolist(),
            "group": None if groups is None else groups[rows[0]],
            "cosine": None if finding.cosines is None else float(finding.cosines[number]),
        }
        for number, rows in enumerate(finding.rows[:most].tolist())
    ]


def _pair_note(pair: dict[str, Any]) -> str:
    """What else there is to say of a pair: its cosine, its group, how often it stands in each split."""
    parts = [] if pair["cosine"] is None else [f"cosine {pair['cosine']:.4f}"]
    parts += [] if pair["group"] is None else [f"group {pair['group']}"]
    if max(pair["rows"]) > 1:
        a, b = pair["rows"]
        parts.append(f"{a:,} and {b:,} {'images' if pair['kind'] == 'group' else 'times'}")
    return ", ".join(parts)


def leaks_lines(view: View, leaks: Leaks) -> str:
    """Counts of each kind and pair of splits, then the first pairs of each."""
    rows = [row for kind in KINDS for row in _kind_rows(leaks, kind)]
    text = _aligned(rows)
    if view.untrained and leaks.of("near"):
        text += ["The weights are untrained (random): what is near by their features is alike in light and shade only."]
    for finding in leaks.findings:
        shown = []
        for pair in _pairs(view, finding, FIRST):
            sides = zip(pair["ids"], pair["labels"], strict=True)
            shown.append([*(f"{name} ({label})" if label else name for name, label in sides), _pair_note(pair)])
        text += ["", _title(finding), *_aligned(shown, indent=2)]
        if finding.count > len(shown):
            text.append(f"  and {finding.count - len(shown):,} more (--csv FILE)")
    return "\n".join(text)


def _kind_rows(leaks: Leaks, kind: str) -> list[tuple[str, str, str, str]]:
    """Leaks of one kind, that there are none, or why nothing was compared."""
    title, how = KINDS[kind], f"cosine of centred {leaks.output} ≥ {leaks.threshold:g}" if kind == "near" else ""
    rows = []
    for each in leaks.of(kind):
        cut = f"; the {len(each.rows):,} closest are kept" if kind == "near" and len(each.rows) < each.count else ""
        rows.append((title, _splits(each), _size(each), how + cut))
    if reason := leaks.not_compared.get(kind):
        within = kind == "image" or (kind == "near" and leaks.output is not None)
        return [(title, "not compared", "", reason), *(rows or [(title, "none within the set", "", how)] * within)]
    return rows or [(title, "none", "", how)]


def _aligned(rows: list[Any], indent: int = 0) -> list[str]:
    return aligned(one_line(rows), right=len(rows[0]), indent=indent)  # a name must not steer a terminal


def leaks_record(view: View, leaks: Leaks) -> dict[str, Any]:
    """For ``--json``: counts, and all pairs that are kept."""
    counts = [{"kind": f.kind, "splits": f.splits, "count": f.count} for f in leaks.findings]
    pairs = [pair for finding in leaks.findings for pair in _pairs(view, finding)]
    about = {"view": view.label, "output": leaks.output, "threshold": leaks.threshold, "centred": True}
    return about | {"not_compared": leaks.not_compared, "counts": counts, "pairs": pairs}


def leaks_csv(record: dict[str, Any]) -> str:
    """All pairs that are kept, a line each; ``rows``: how many rows of the split that image or group has."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    sides = [f"{name} {side}" for side in "ab" for name in ("split", "id", "label", "rows")]
    writer.writerow(["kind", *sides, "group", "cosine"])
    for pair in record["pairs"]:
        both = zip(pair["splits"], pair["ids"], pair["labels"], pair["rows"], strict=True)
        values = [pair["kind"], *(value for side in both for value in side), pair["group"] or "", pair["cosine"]]
        writer.writerow(["" if value is None else cell(value) for value in values])
    return text.getvalue()


MOST = 24  # pairs of one kind and two splits
ACROSS = 4  # pairs in a row


def open_images(view: View) -> Dataset:
    """The images a view was made of, opened again. Raises SourceError where they are not there any more, and BadOption
    for an imported view, which never had any."""
    if view.source.get("kind") == "import":
        raise BadOption(f"{view.label} was imported as features: it has no images for a sheet. Leave out --sheet.")
    return reopen(view.source)


def leaks_sheet(view: View, leaks: Leaks, dataset: Dataset) -> bytes:
    """The sheet as the bytes of a PNG. Rows are found by their ids; an image that has gone is an empty frame."""
    row_of = {name: row for row, name in enumerate(dataset.ids)}
    sections = []
    for finding in leaks.findings:
        pairs = zip(finding.rows.tolist(), _pairs(view, finding, MOST), strict=False)
        cells = [_cell(view, leaks, dataset, row_of, rows, pair) for rows, pair in pairs]
        rows = [(("", ""), cells[start : start + ACROSS]) for start in range(0, len(cells), ACROSS)]
        cut = f", the first {MOST}" if finding.count > MOST else ""
        sections.append(SheetSection(_title(finding), _size(finding) + cut, rows))
    about = "what stands twice, or under two labels" if sections else "no leaks were found"
    return grid_of_images(view.label, about, sections)


def _cell(
    view: View, leaks: Leaks, dataset: Dataset, row_of: dict[str, int], rows: list[int], pair: dict[str, Any]
) -> SheetCell:
    images = []
    for row, name, label in zip(rows, pair["ids"], pair["labels"], strict=True):
        short = name.rpartition(":")[2] if ":" in name else short_name(name)
        images.append((partial(_read, view, dataset, row_of, row), [short, leaks.splits[row] or "no split", label]))
    return SheetCell(images, _pair_note(pair))


def _read(view: View, dataset: Dataset, row_of: dict[str, int], row: int) -> EncodedImage:
    if view.ids[row] not in row_of:
        raise UnreadableImage("not among the images any more")
    data = dataset.read(row_of[view.ids[row]])
    if digest(data).encode() != bytes(view.digests[row]):
        raise UnreadableImage("another image now than when its features were computed")
    return data
