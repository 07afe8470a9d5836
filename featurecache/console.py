"""What the command line says of extractions and caches: records (``--json``) and aligned lines made from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from featurecache import guard, mirrored
from featurecache.backbones import describe as describe_backbone
from featurecache.costs import cost_line
from featurecache.describe import Description
from featurecache.describe import describe as describe_dataset
from featurecache.errors import FeatureCacheError
from featurecache.extraction import Extraction, Result, size_text
from featurecache.reader import View
from featurecache.stores import Store, stores, unreadable_stores
from featurecache.terminal import one_line

FEW = 10  # images of a class in val below which it cannot choose a model


def columns(rows: Iterable[tuple[str, str]], indent: int = 11) -> str:
    """``word       text`` lines; continuation lines of a text are indented like it."""
    lines = []
    for word, text in rows:
        first, *rest = text.splitlines() or [""]
        lines += [f"{word:<{indent}}{first}", *(" " * indent + line for line in rest)]
    return "\n".join(lines)


def shape_text(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{'×'.join(map(str, shape))}]"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def data_of(extraction: Extraction) -> Description:
    digests = np.append(extraction.digests, b"")[extraction.sample_image]  # -1, unread: the empty one
    return describe_dataset(extraction.dataset, digests, extraction.looked.headers if extraction.looked else None)


def extraction_record(extraction: Extraction, rate: float | None) -> dict[str, Any]:
    """What an extraction would do, for ``--dry-run`` and as the beginning of a run's record."""
    images = extraction.counts(copies=False)
    return {
        "backbone": describe_backbone(extraction.backbone),
        "untrained": extraction.spec.untrained,
        "data": data_of(extraction).to_dict(),
        "source": extraction.dataset.source,
        "unread": [[extraction.dataset.shown(k), reason] for k, reason in sorted(extraction.unread.items())],
        "outputs": {o.name: list(extraction.layouts[o.name].row_shape) for o in extraction.outputs},
        "dtype": extraction.spec.dtype,
        "precision": extraction.spec.precision,
        "device": str(extraction.device),
        "plan": extraction.plan,
        "store": str(extraction.store.path) if extraction.store else None,
        "view": extraction.name,
        "images_in_cache": images["in_cache"],
        "images_to_compute": images["to_compute"],
        "images_to_derive": images["to_derive"],
        "augmented": _augmented_record(extraction),
        "bytes": extraction.bytes_of(),
        "new_bytes": extraction.new_bytes,
        "images_per_s": rate,
        "seconds": extraction.to_compute / rate if rate else None,
    }


def _augmented_record(extraction: Extraction) -> dict[str, Any] | None:
    """The copies: how many of how many images, by what; None without any."""
    copying = extraction.copying
    if copying is None:
        return None
    made, data = copying.augmented, extraction.dataset
    return {
        **made.to_dict(),
        "words": str(made.augmentation),
        "images": len(copying.sources),
        "copies": len(copying),
        "kept": extraction.kept == made,
        "splits_drawn_later": not any(data.splits),
        "warnings": mirrored.warnings(made.augmentation, data.classes, data.source),
        **extraction.counts(copies=True),
    }


def extraction_lines(extraction: Extraction, record: dict[str, Any]) -> str:
    """The first screen of ``extract``: backbone, what it sees, data, what is kept, machine, warnings."""
    record = one_line(record)
    rows = [
        ("backbone", _backbone_line(record)),
        ("sees", record["backbone"]["sees"]),
        ("data", _data_line(record)),
        ("keeps", _keeps_line(extraction)),
        ("machine", _machine_line(extraction, record["images_per_s"])),
    ]
    if record["augmented"]:
        rows.insert(3, ("augment", _augmented_line(record["augmented"], extraction.name)))
        rows += [("warning", text) for text in record["augmented"]["warnings"]]
    rows += [("warning", text) for text in _warnings(record["data"])]
    held, copies = record["images_in_cache"], (record["augmented"] or {}).get("in_cache", 0)
    if held or copies:
        also = f" and {copies:,} of {record['augmented']['copies']:,} augmented copies" if record["augmented"] else ""
        rows.append(("cache", f"{held:,} of {extraction.plain:,} distinct images{also} are in it already"))
    if extraction.to_derive:
        rows.append(
            ("derives", f"{extraction.to_derive:,} {_noun(extraction)} from stored tokens, without the backbone")
        )
    return columns(rows)


def _noun(extraction: Extraction) -> str:
    return "images and copies" if extraction.copying else "images"


def _augmented_line(made: dict[str, Any], view: str) -> str:
    each = "one copy" if made["views"] == 1 else f"{made['views']:,} copies"
    what = "image" if made["splits_drawn_later"] else "training image"
    text = f"{each} of each {what}: {made['images']:,} distinct ones, {made['copies']:,} copies by {made['words']}"
    text += f", seed {made['augment']['seed']}"
    if made["kept"]:
        text += f" (as {view} has them; --views 0 leaves them out)"
    if made["splits_drawn_later"]:
        text += (
            "\nThe data have no splits, so every image gets copies; train-head draws the splits later and uses copies "
            "of what is in train only."
        )
    return text


def _backbone_line(record: dict[str, Any]) -> str:
    made = record["backbone"]
    parameters = f"{made['parameters'] / 1e6:.3g} M parameters"
    trained = ["untrained: random weights"] if record["untrained"] else [made["licence"]] if made["licence"] else []
    return "  ".join(filter(None, [made["name"], made["id"], ", ".join([parameters, *trained, "frozen"])]))


def _data_line(record: dict[str, Any]) -> str:
    data = record["data"]
    splits = " · ".join(
        f"{split or 'no split'} {sum_:,}" for split, sum_ in zip(data["splits"], data["totals"], strict=True)
    )
    classes = " · ".join(f"{name} {sum(row):,}" for name, row in zip(data["classes"][:6], data["counts"], strict=False))
    more = f" · {len(data['classes']) - 6} more classes" if len(data["classes"]) > 6 else ""
    copies = data["copies"]["total"] if data["copies"] else 0
    parts = [splits if data["splits"] not in ([], [""]) else "", classes + more, f"{copies:,} copies" if copies else ""]
    return f"{record['source'].get('data')}  {data['images']:,} images: " + "; ".join(filter(None, parts))


def _keeps_line(extraction: Extraction) -> str:
    kept = " + ".join(shape_text(o.name, extraction.layouts[o.name].row_shape) for o in extraction.outputs)
    where = extraction.store.path if extraction.store else extraction.cache / f"{extraction.backbone.name}-…"
    each = f" for {extraction.plain:,} images and {len(extraction.copying):,} copies" if extraction.copying else ""
    text = f"{kept}, {extraction.spec.dtype}{each}: {size_text(extraction.bytes_of())} in {where}"
    sizes = {o.name: extraction.bytes_of([o.name]) for o in extraction.outputs}
    cheapest = min(sizes, key=lambda name: sizes[name])
    if 2 * sizes[cheapest] < extraction.bytes_of():
        text += f" (--outputs {cheapest} alone: {size_text(sizes[cheapest])})"
    return text


def _machine_line(extraction: Extraction, rate: float | None) -> str:
    plan, device = extraction.plan, extraction.device
    what = f"{plan['threads']} CPU threads" if device.type == "cpu" else _device_name(extraction)
    precision = f"{extraction.spec.precision} ({extraction.precision_reason})"
    speed = f": {rate:.3g} images/s, about {duration(extraction.to_compute / rate)}" if rate else ""
    return f"{what}, {precision}, batches of {plan['batch_size']}{speed}"


def _device_name(extraction: Extraction) -> str:
    import torch

    return torch.cuda.get_device_name(extraction.device) if extraction.device.type == "cuda" else str(extraction.device)


def _warnings(data: dict[str, Any]) -> list[str]:
    found = []
    if "val" in data["splits"] and data["task"] in ("binary", "multiclass", "ordinal"):
        k = data["splits"].index("val")
        few = [f"{row[k]} of {name}" for name, row in zip(data["classes"], data["counts"], strict=True) if row[k] < FEW]
        if few:
            found.append(
                f"val has {', '.join(few[:3])}: too few to choose a model; train-head will ask for --resplit-val"
            )
    found += data["notes"]
    copies = data["copies"]
    if copies:
        found += [
            f"{n:,} image{'s stand' if n > 1 else ' stands'} in both {pair.replace('+', ' and ')}"
            for pair, n in copies["across"].items()
            if n
        ]
        if copies["two_labels"]:
            found.append(f"{copies['two_labels']:,} images bear two different labels")
    return found


def result_record(result: Result) -> dict[str, Any]:
    return {
        "view": str(result.view),
        "outputs": list(result.outputs),
        "images": result.images,
        "copies": result.copies,
        "computed": result.computed,
        "derived": result.derived,
        "seconds": round(result.seconds, 3),
        "images_per_s": round(result.images_per_s, 3),
        "shares": {key: round(share, 4) for key, share in result.shares.items()},
        "cost": result.cost,
        "failed": [{"id": name, "reason": reason} for name, reason in result.failed],
    }


def result_lines(result: Result, view_label: str) -> str:
    """The last lines of ``extract``; unreadable images are named, at most ten."""
    work = "nothing left to compute"
    if result.computed:
        work = f"{result.computed:,} computed in {duration(result.seconds)} ({result.images_per_s:.3g} images/s)"
    elif result.derived:
        work = f"{result.derived:,} derived from stored tokens in {duration(result.seconds)}"
    unread = f"; {len(result.failed):,} could not be kept:" if result.failed else ""
    copies = f" and {result.copies:,} augmented copies" if result.copies else ""
    done = f"{result.images:,} images{copies}, {work}{unread}"
    failed = one_line(result.failed[:10])
    width = max((len(name) for name, _ in failed), default=0)
    lines = [f"  {name:<{min(width, 60)}}  {reason}" for name, reason in failed]
    if len(result.failed) > 10:
        lines.append(f"  … and {len(result.failed) - 10:,} more; featurecache info {view_label} lists them")
    cost = [("cost", cost_line(result.cost))] if result.computed else []
    return columns([("done", "\n".join([done, *lines])), *cost, ("view", f"{view_label} in {result.view}")])


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
            lines.append(f"  {name:<14} {size_text(entry['bytes']):>9} in {entry['shards']:,} shards")
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


def backbone_lines(record: dict[str, Any]) -> str:
    """``info --backbone``: what it is, what it sees, and which outputs it offers or refuses."""
    layers = (f"{record['layers']} blocks, " if record["layers"] else "") + f"width {record['width']}"
    tokens = len(record["prefix"]) + record["grid"][0] * record["grid"][1]
    prefix = f"{' '.join(record['prefix'])} + " if record["prefix"] else ""
    grid = "×".join(map(str, record["grid"]))
    rows = [
        ("backbone", "  ".join(filter(None, [record["name"], record["id"], record["licence"]]))),
        ("network", f"{record['class']} of {record['library']}: {record['parameters']:,} parameters, {layers}"),
        ("sees", record["sees"]),
        ("tokens", f"{tokens} = {prefix}{grid} grid; positions {record['position_embeddings']}" if tokens else "none"),
    ]  # fmt: skip
    for name, entry in record["outputs"].items():
        default = " (default)" if name in (record["vector"], "tokens") else ""
        text = (
            f"refused: {entry['refused']}" if "refused" in entry else shape_text(name, tuple(entry["shape"])) + default
        )
        rows.append((name if "refused" in entry else "output", text))
    if record["source"]:
        rows.append(("source", record["source"]))
    return columns(rows)
