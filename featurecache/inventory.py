"""What lies in a cache: records (``--json``) of stores and views, and the lines of ``ls`` and ``info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featurecache import guard
from featurecache.amounts import columns, shape_text, size_text
from featurecache.costs import cost_line
from featurecache.errors import FeatureCacheError
from featurecache.reader import View
from featurecache.stores import Store, stores, unreadable_stores
from featurecache.terminal import one_line


def cache_record(cache: Path) -> list[dict[str, Any]]:
    """Stores with their outputs (shards, rows, bytes) and views. A store that cannot be read says why."""
    broken = [{"folder": str(folder), "error": str(error), "bytes": 0} for folder, error in unreadable_stores(cache)]
    return [_store_record(store) for store in stores(cache)] + broken


def _store_record(store: Store) -> dict[str, Any]:
    outputs = {}
    for folder in sorted(path for path in store.path.iterdir() if path.is_dir() and not path.is_symlink()):
        files = list(folder.glob("[0-9a-f]*.h5"))
        outputs[folder.name] = {"shards": len(files), "bytes": sum(path.lstat().st_size for path in files)}
    guard.verdicts(store.views(), "view")  # all at once; View says what is wrong with one
    return {
        "folder": str(store.path),
        "backbone": store.provenance.get("backbone", store.path.name),
        "fingerprint": store.fingerprint,
        "untrained": store.spec.untrained,
        "imported": store.spec.imported,
        "image_size": list(store.spec.image_size),
        "precision": store.spec.precision,
        "dtype": store.spec.dtype,
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
        "images": len(view),
        "copies": view.rows - len(view),
        "task": view.task,
        "classes": len(view.classes),
        "outputs": list(view.outputs),
        "failed": len(view.failed),
        "bytes": sum(_bytes_of(view, name, view.distinct) for name in view.outputs),
    }


def _bytes_of(view: View, output: str, rows: int) -> int:
    info = view.outputs[output]
    return int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize * rows


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
            shards = f"{entry['shards']:,} shard{'s' * (entry['shards'] != 1)}"
            lines.append(f"  {name:<14} {size_text(entry['bytes']):>9} in {shards}")
        for view in store["views"]:
            if "error" in view:
                lines.append(f"  view {view['name']}: {view['error']}")
                continue
            failed = f", {view['failed']} left out" if view["failed"] else ""
            kept = f"{', '.join(view['outputs'])}, {size_text(view['bytes'])}"
            copies = f" and {view['copies']:,} augmented copies" if view["copies"] else ""
            what = f"{view['images']:,} images{copies}, {view['classes']} classes ({view['task']}){failed}: {kept}"
            lines.append(f"  view {store['backbone']}/{view['name']}  {what}")
    lines.append(f"{'all':<16} {size_text(sum(store['bytes'] for store in records)):>9}")
    return "\n".join(lines)


def view_record(view: View) -> dict[str, Any]:
    splits, counts = _class_counts(view)
    return {
        "view": view.label,
        "path": str(view.path),
        "images": len(view),
        "distinct": len(np.unique(view.digests)),
        "augmented": _view_copies(view),
        "task": view.task,
        "classes": view.classes,
        "splits": splits,
        "counts": counts,
        "groups": None if view.groups is None else len(set(view.groups)),
        "meta": list(view.meta),
        "outputs": {name: _output_record(view, name) for name in view.outputs},
        "source": view.source,
        "failed": view.failed,
        "untrained": view.untrained,
        "imported": view.imported,
        "fingerprint": view.fingerprint,
        "spec": view.spec,
        "provenance": view.provenance,
        "cost": view.cost,
    }


def _view_copies(view: View) -> dict[str, Any] | None:
    if view.augmented is None:
        return None
    images = int((view.copies()[:, 1:] >= len(view)).any(axis=1).sum())
    words = str(view.augmented.augmentation)
    return {**view.augmented.to_dict(), "words": words, "images": images, "copies": view.rows - len(view)}


def _class_counts(view: View) -> tuple[list[str], list[list[int]]]:
    order = ("train", "val", "test", "")
    splits = [split for split in order if split in view.splits]
    column = np.array(view.splits)
    labels = view.labels
    if view.task == "multilabel":
        hits = [labels[:, k] == 1 for k in range(len(view.classes))]
    else:
        hits = [labels == k for k in range(len(view.classes))]
    return splits, [[int((hit & (column == split)).sum()) for split in splits] for hit in hits]


def _output_record(view: View, name: str) -> dict[str, Any]:
    info = view.outputs[name]
    size = _bytes_of(view, name, view.rows)
    return {
        "shape": list(info.shape), "dtype": info.dtype, "bytes": size,
        "prefix": info.prefix and list(info.prefix), "grid": info.grid and list(info.grid),
        "rounding": _rounding(view, name),
    }  # fmt: skip


def _rounding(view: View, name: str) -> dict[str, Any] | None:
    """The certificate of half precision, |stored − float32|₂ / |float32|₂ over the rows; None: none were rounded."""
    errors = view.stored(name).errors
    if errors is None:
        return None
    known = errors[np.isfinite(errors)]
    worst, mean = (float(known.max()), float(known.mean(dtype=np.float64))) if len(known) else (None, None)
    return {"rows": len(known), "worst": worst, "mean": mean}


def view_lines(record: dict[str, Any]) -> str:
    """``info VIEW``: the data, the outputs, and what made them."""
    record = one_line(record)
    spec, made = record["spec"], record["provenance"]
    copies = record["images"] - record["distinct"]
    facts = f"{record['images']:,} images, {record['task']}" + (f", {copies:,} copies" if copies else "")
    if record["groups"] is not None:
        facts += f", {record['groups']:,} groups"
    rows = [("view", f"{record['view']} in {record['path']}"), ("data", f"{record['source'].get('data')}  {facts}")]
    rows.append(("classes", "\n".join(_count_table(record))))
    if made_of := record["augmented"]:
        each = "one each" if made_of["views"] == 1 else f"{made_of['views']:,} each"
        counted = f"{made_of['copies']:,} augmented copies, {each} of {made_of['images']:,} images"
        rows.append(("augment", f"{counted}: {made_of['words']}, seed {made_of['augment']['seed']}"))
    for name, info in record["outputs"].items():
        tokens = f"; prefix {info['prefix']}, grid {info['grid']}" if info["prefix"] is not None else ""
        rows.append(
            ("keeps", f"{shape_text(name, tuple(info['shape']))} {info['dtype']}, {size_text(info['bytes'])}{tokens}")
        )
        if info["rounding"]:
            rows.append(("", _rounding_line(info["rounding"], record["images"])))
    trained = "untrained: random weights" if record["untrained"] else made.get("licence", "")
    backbone = "  ".join(filter(None, [made.get("backbone"), made.get("id"), made.get("revision"), trained]))
    size = "×".join(map(str, spec["image_size"]))
    key = f"{size} px, {spec['precision']}, positions {spec['position_embeddings']}"
    if record["imported"]:
        backbone, key = f"imported from {made.get('file')}, {made.get('when')}; origin unknown", "origin unknown"
    rows.append(("backbone", backbone))
    rows.append(("spec", f"{record['fingerprint']}  {key}"))
    rows.append(("made by", ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())))
    rows.append(("cost", cost_line(record["cost"])))
    if record["failed"]:
        failed = [f"{entry['id']}  {entry['reason']}" for entry in record["failed"]]
        rows.append(("left out", "\n".join([f"{len(failed):,} images", *failed])))
    return columns(rows)


def _rounding_line(rounding: dict[str, Any], rows: int) -> str:
    if not rounding["rows"]:
        return "rounding to float16 was not measured: derived later from stored tokens, or imported"
    what = f"{rounding['worst']:.1e} at worst, {rounding['mean']:.1e} on average"
    some = f" (of {rounding['rows']:,} rows that were measured)" if rounding["rows"] < rows else ""
    return f"rounding to float16 moved a row by {what}, relative to float32{some}"


def _count_table(record: dict[str, Any]) -> list[str]:
    header = ["", *(split or "no split" for split in record["splits"])]
    body = [[name, *(f"{n:,}" for n in row)] for name, row in zip(record["classes"], record["counts"], strict=True)]
    table = [header, *body] if body else [header]
    widths = [max(len(row[k]) for row in table) for k in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
