"""What the command line says of extractions: records (``--json``) and aligned lines made from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from featurecache import mirrored
from featurecache.amounts import columns, duration, shape_text, size_text
from featurecache.backbones import describe as describe_backbone
from featurecache.costs import cost_line
from featurecache.describe import Description
from featurecache.describe import describe as describe_dataset
from featurecache.extraction import Extraction, Result
from featurecache.terminal import one_line

FEW = 10  # images of a class in val below which it cannot choose a model


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
