"""Commands extract and why: their options, JSON records and aligned lines; also how any command opens a view.

The first screen of an extraction says what will happen before anything is computed; ``--dry-run`` stops behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import Choice

from featurecache.commands.help import option, options_of
from featurecache.commands.source_options import READ_BY, SOURCES, pairs_of, source_options
from featurecache.commands.terminal import Console, cache_option, command, record_of, typed_command, typed_options
from featurecache.errors import BadOption
from featurecache.files.records import ENGINES, WAYS
from featurecache.formatting import (
    abbreviated,
    columns,
    counted,
    device_title,
    duration,
    images_per_second,
    one_line,
    shape_text,
    shell_word,
    size_text,
    timed_part,
)

if TYPE_CHECKING:
    from featurecache.extraction.run import Extraction, ExtractionResult
    from featurecache.sources.summary import Description
    from featurecache.store.view import View


def description_of(extraction: Extraction) -> Description:
    import numpy as np

    from featurecache.sources.summary import describe_dataset

    digests = np.append(extraction.digests, b"")[extraction.scan.sample_image]  # -1, unread: the empty one
    return describe_dataset(extraction.dataset, digests, extraction.scan.headers)


def extraction_record(extraction: Extraction, rate: float | None) -> dict[str, Any]:
    """What an extraction would do, for ``--dry-run`` and as the beginning of a run's record."""
    from featurecache.backbones import describe_backbone

    return {
        "backbone": describe_backbone(extraction.backbone),
        "untrained": extraction.spec.untrained,
        "data": description_of(extraction).to_dict(),
        "source": extraction.dataset.source,
        "understood": extraction.dataset.source.get("understood"),
        "unread": [(extraction.dataset.shown(k), reason) for k, reason in sorted(extraction.scan.unread.items())],
        "outputs": {o.name: extraction.layouts[o.name].shape for o in extraction.outputs},
        "dtype": extraction.spec.dtype,
        "precision": extraction.spec.precision,
        "device": str(extraction.device),
        "plan": extraction.plan,
        "store": extraction.store.path if extraction.store else None,
        "view": extraction.name,
        **{f"images_{key}": count for key, count in extraction.counts(copies=False).items()},
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
    counted = {"images": len(copying.sources), "copies": len(copying), **extraction.counts(copies=True)}
    return {
        **copying.augmented.to_dict(),
        "words": str(copying.augmented.augmentation),
        "kept": extraction.contents.view_copies == copying.augmented,
        "splits_drawn_later": not any(extraction.dataset.splits),
        **counted,
    }


def extraction_lines(extraction: Extraction, record: dict[str, Any], data: str = "") -> str:
    """The first screen of ``extract``: backbone, what it sees, ``data`` as typed, what is kept, machine, warnings."""
    from featurecache.images.headers import crop_words

    record = one_line(record)
    rows = [
        ("backbone", _backbone_line(record)),
        *[("weights", record["backbone"]["weights"])] * bool(record["backbone"]["weights"]),
        ("sees", record["backbone"]["sees"]),
        ("data", f"{one_line(data) or record['source'].get('data')}  {_data_text(record['data'])}"),
        *[("understood", record["understood"])] * bool(record["understood"]),
        *[("crop", crop_words(crop)) for crop in (record["source"].get("crop"),) if crop],
        *[("augment", _augmented_line(made, extraction.name)) for made in (record["augmented"],) if made],
        ("keeps", _keeps_line(extraction)),
        ("machine", _machine_line(extraction, record["images_per_s"])),
        *[("forward", text) for text in (extraction.choice.lines(extraction.to_compute) if extraction.choice else ())],
    ]
    rows += [("warning", text) for text in _warnings(record["data"])]
    held, copies = record["images_in_cache"], (record["augmented"] or {}).get("in_cache", 0)
    if held or copies:
        also = f" and {copies:,} of {record['augmented']['copies']:,} augmented copies" if record["augmented"] else ""
        what = f"{held:,} of {counted(extraction.plain, 'distinct image')}{also}"
        rows.append(("cache", f"{what} {'are' if also or extraction.plain > 1 else 'is'} in it already"))
    if extraction.to_derive:
        what = counted(extraction.to_derive, "image") + " and augmented copies" * bool(extraction.copying)
        rows.append(("derives", f"{what} from stored tokens, without the backbone"))
    return columns(rows)


def _augmented_line(made: dict[str, Any], view: str) -> str:
    each = "one augmented copy" if made["views"] == 1 else f"{made['views']:,} augmented copies"
    what = "image" if made["splits_drawn_later"] else "training image"
    text = f"{each} of each {what}: {made['images']:,} distinct ones, {made['copies']:,} copies by {made['words']}"
    text += f", seed {made['augment']['seed']}"
    if made["kept"]:
        text += f" (as {view} has them; --copies 0 leaves them out)"
    if made["splits_drawn_later"]:
        text += "\nThe data have no splits, so every image gets copies; train-head draws the splits later and uses "
        text += "copies of what is in train only."
    return text


def _backbone_line(record: dict[str, Any]) -> str:
    made = record["backbone"]
    parameters = f"{made['parameters'] / 1e6:.3g} M parameters"
    trained = ["untrained: random weights"] if record["untrained"] else [made["licence"]] if made["licence"] else []
    return "  ".join(filter(None, [made["name"], made["id"], ", ".join([parameters, *trained, "frozen"])]))


def _data_text(data: dict[str, Any]) -> str:
    totals = zip(data["splits"], data["totals"], strict=True)
    splits = " · ".join(f"{split or 'no split'} {total:,}" for split, total in totals)
    classes = " · ".join(f"{name} {sum(row):,}" for name, row in zip(data["classes"][:6], data["counts"], strict=False))
    more = f" · {len(data['classes']) - 6:,} more" if len(data["classes"]) > 6 else ""
    duplicates = data["duplicates"]["total"] if data["duplicates"] else 0
    parts = [splits if data["splits"] not in ([], [""]) else "", classes + more or "no labels"]
    parts += [counted(duplicates, "duplicate")] * bool(duplicates)
    return f"{counted(data['images'], 'image')}: " + "; ".join(filter(None, parts))


def _keeps_line(extraction: Extraction) -> str:
    kept = " + ".join(shape_text(o.name, extraction.layouts[o.name].shape) for o in extraction.outputs)
    where = extraction.store.path if extraction.store else extraction.cache / f"{extraction.backbone.name}-…"
    text = f"{kept}, {extraction.spec.dtype}"
    if extraction.copying:
        text += f" for {counted(extraction.plain, 'image')} and {len(extraction.copying):,} augmented copies"
    text += f": {size_text(extraction.bytes_of())} in {where}"
    sizes = {o.name: extraction.bytes_of([o.name]) for o in extraction.outputs}
    cheapest = min(sizes, key=lambda name: sizes[name])
    if 2 * sizes[cheapest] < extraction.bytes_of():
        text += f" (--outputs {cheapest} alone: {size_text(sizes[cheapest])})"
    return text


def _machine_line(extraction: Extraction, rate: float | None) -> str:
    plan, device = extraction.plan, extraction.device
    threads = counted(plan["threads"], "CPU thread")
    what = threads if device.type == "cpu" else device_title(device)
    precision = f"{extraction.spec.precision} ({extraction.precision_reason})"
    engine = extraction.engine.words
    speed = f": {images_per_second(rate)}" if rate else ""
    speed += f" each, in {engine}" if engine else f", about {duration(extraction.to_compute / rate)}" if rate else ""
    return f"{what}, {precision}, batches of {plan['batch_size']}{speed}"


def _warnings(data: dict[str, Any]) -> list[str]:
    from featurecache.sources.summary import FEW_IN_VAL

    warnings = list(data["notes"])
    if "val" in data["splits"] and data["task"] in ("binary", "multiclass", "ordinal"):
        val = [row[data["splits"].index("val")] for row in data["counts"]]
        counts = [(n, name) for name, n in zip(data["classes"], val, strict=True) if n < FEW_IN_VAL]
        few = [f"{counted(n, 'image')} of {name}" for n, name in counts]
        words = f"val has {abbreviated(few, 4)}: too few to choose a model; train-head --resplit-val draws val anew"
        warnings = [words] * bool(few) + warnings
    duplicates = data["duplicates"] or {"across": {}, "two_labels": 0}
    for noun, across in (("image", duplicates["across"]), ("group", data["groups_across"])):
        for pair, n in across.items():
            where = f"in both {pair.replace('+', ' and ')}"
            warnings += [f"{counted(n, noun)} stand{'s' * (n == 1)} {where}"] * bool(n)
    if n := duplicates["two_labels"]:
        warnings.append(f"{counted(n, 'image')} bear{'s' * (n == 1)} two different labels")
    return warnings


def result_record(result: ExtractionResult) -> dict[str, Any]:
    failed = [{"id": name, "reason": reason} for name, reason in result.failed]
    return record_of(result) | {"images_per_s": result.images_per_s, "failed": failed}


def backbone_lines(record: dict[str, Any]) -> str:
    """``info --backbone``: what it is, what it sees, which outputs it offers or refuses, and its layers."""
    from featurecache.backbones.layers import layer_lines

    record = one_line(record)
    layers = (f"{record['layers']} blocks, " if record["layers"] else "") + f"width {record['width']}"
    tokens = len(record["prefix"]) + record["grid"][0] * record["grid"][1]
    prefix = f"{' '.join(record['prefix'])} + " if record["prefix"] else ""
    grid = "×".join(map(str, record["grid"]))
    rows = [
        ("backbone", "  ".join(filter(None, [record["name"], record["id"], record["licence"]]))),
        ("network", f"{record['class']} of {record['library']}: {record['parameters']:,} parameters, {layers}"),
        *[("weights", record["weights"])] * bool(record["weights"]),
        ("sees", record["sees"]),
        ("tokens", f"{tokens} = {prefix}{grid} grid; positions {record['position_embeddings']}" if tokens else "none"),
    ]
    for name, entry in record["outputs"].items():
        default = " (default)" if name in (record["vector"], "tokens") else ""
        refused = entry.get("refused")
        row = (name, f"refused: {refused}") if refused else ("output", shape_text(name, entry["shape"]) + default)
        rows.append(row)
    if record["source"]:
        rows.append(("source", record["source"]))
    return "\n".join([columns(rows), "", *layer_lines(record["modules"])])


def _number_or_auto(context: click.Context, parameter: click.Parameter, value: Any) -> int | None:
    return None if value == "auto" else click.INT.convert(value, parameter, context)


BACKBONES = "An alias (see info), hf:REPO, a folder, torchvision:NAME, timm:NAME, python:MODULE:FACTORY[:LAYER]."
STEPS = """How they differ: flip,rotate10,shift0.1 (also vflip, scale0.1, …). Labels stay: leave flips out where the
    side decides (organs, eyes, hands, writing)."""
extraction_options = options_of(  # which images, which backbone, which store: what `extract` and `why` are asked alike
    option("--backbone", required=True, metavar="NAME", help=BACKBONES),
    option("--data", default="digits", metavar="SOURCE", help=SOURCES),
    option("--outputs", metavar="NAMES", help="cls,tokens,… [default: the backbone's vector and tokens]"),
    option("--name", metavar="VIEW", help="Name of the view. [default: that of the data]"),
    option("--image-size", type=int, metavar="N", help="Pixels; resize and crop scale in the same ratio."),
    option("--fit", type=Choice(["model", "squash", "pad"]), default="model", help="How an image becomes a square."),
    option("--on-error", type=Choice(["report", "skip", "fail"]), default="report", help="At an unreadable image."),
    cache_option,
    options_of(
        option("--weights", metavar="PATH", help="A folder or file with the backbone's weights; FILE:NAME of several."),
        option("--random-weights", is_flag=True, help="The architecture untrained: shows the tool, not the backbone."),
        option("--seed", default=0, metavar="N", help="Of --random-weights."),
        option("--precision", type=Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", help="Of the network."),
        option("--dtype", type=Choice(["float16", "float32"]), default="float16", help="Of the stored rows."),
        option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps."),
        option(
            "--batch-size",
            default="auto",
            metavar="N",
            callback=_number_or_auto,
            help="Of a forward pass; fixed by a store's first run.",
        ),
        option("--engine", type=Choice(ENGINES), default="local", help="This process, several, or a Ray cluster."),
        option("--actors", type=int, metavar="N", help="Processes, or actors. [default: for all GPUs]"),
        option("--num-gpus", type=float, metavar="X", help="Of each actor of Ray. [default: 1, on a CPU 0]"),
        option("--address", metavar="HOST:PORT", help="Of the cluster. [default: $RAY_ADDRESS, else here]"),
        option("--workers", type=int, metavar="N", help="Decode threads, nothing else. [default: by the machine]"),
        section="network",
    ),
    source_options,
    options_of(
        option("--hash-ids", is_flag=True, help="Keep images under keyed hashes of their names."),
        option("--hash-groups", is_flag=True, help="The same for groups (patients)."),
        section="data",
    ),
    options_of(
        option("--copies", type=int, metavar="K", help="Augmented copies of each training image. [default: as before]"),
        option("--augment", metavar="STEPS", help=STEPS),
        option("--augment-seed", default=0, metavar="N", help="Of what --augment draws."),
        section="copies",
    ),
)


@command
@extraction_options
@option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@option("--sheet", metavar="FILE.png", help="Write a contact sheet of the images.")
@option(
    "--accept-drift", is_flag=True, help="A new generation, where this machine computes other features than the store."
)
@option("--forward", type=Choice(["auto", *WAYS]), default="auto", help="How it computes; auto: as measured.")
@option("--yes", is_flag=True, help="Do not ask before keeping more than 20 GB.")
def extract(
    talk: Console, dry_run: bool, sheet: str | None, yes: bool, columns: tuple[str, ...], **options: Any
) -> int:  # fmt: skip
    """Run a backbone over images once and keep its outputs.

    \b
    featurecache extract --backbone vit-in21k --data chest/ --outputs cls,tokens
    """
    with timed_part("imports"):
        from featurecache.extraction import plan
        from featurecache.extraction.run import ASK_BYTES
        from featurecache.sources.summary import contact_sheet
        from featurecache.store.view import View

    if options["data"] == "digits":
        talk.say("data       digits: scikit-learn's 1,797 handwritten digits; give your own with --data FOLDER")
    data = options.pop("data")
    prepared = plan.prepare(data, columns=pairs_of(columns), remember=not dry_run, progress=talk.progress, **options)
    if sheet:
        contact_sheet(prepared.dataset, Path(sheet))
    rate = prepared.estimate(measure=not dry_run)
    record = extraction_record(prepared, rate)
    if dry_run:
        table = replace(description_of(prepared), notes=[])  # which are among the warnings
        lines = [extraction_lines(prepared, record, data), "", str(table)]
        talk.result("\n".join(lines), {**record, "sheet": sheet})
        talk.next(typed_command("dry_run"))
        return 0
    talk.say(extraction_lines(prepared, record, data))
    if sheet:
        talk.say(f"sheet      {sheet}")
    prepared.check_disk()
    if prepared.new_bytes > ASK_BYTES and not yes and sys.stdin.isatty():
        click.confirm(f"keep {size_text(prepared.new_bytes)}?", abort=True, err=True)
    result = prepared.run(progress=talk.progress, rate=rate)
    label = View(result.view, columns_only=True).label
    talk.result(plan.extraction_summary(result, label), result_record(result))
    made = prepared.dataset
    talk.next(training_of(result.outputs, label, len(made.classes), made.task, newest=True), options["cache"])
    return int(bool(result.failed) and options["on_error"] != "skip")


def training_of(outputs: Iterable[str], view: str, classes: int = 2, task: str = "", newest: bool = False) -> str:
    """The command that trains a head on these outputs of a view; where there is nothing to tell apart, the one that
    writes them to a file."""
    if classes < 2 and task != "multilabel":
        return f"featurecache export {shell_word(view)} FILE.npz"
    features = "" if newest else f" --features {shell_word(view)}"
    return f"featurecache train-head --head {'large' if 'tokens' in outputs else 'linear'}{features}"


def open_features(talk: Console, features: str | None, cache: str | None, way: str = "--features chooses") -> View:
    """The view of this name, or the newest: then it is said which, and the ``way`` to another."""
    from featurecache.store.write_view import open_view

    view = open_view(features, cache)
    if not features:
        talk.say(f"view       {view.label}   (the newest; {way})")
    return view


_OF_IMAGES = (
    "name", "batch_size", "engine", "actors", "num_gpus", "address", "workers", "on_error", *READ_BY, "hash_ids",
    "hash_groups", "copies", "augment", "augment_seed",
)  # fmt: skip


@command
@extraction_options
def why(talk: Console, columns: tuple[str, ...], cache: str | None, **options: Any) -> int:
    """Say what `extract` with these options would find, and which field of the key differs from the nearest store.

    \b
    featurecache why --backbone vit-in21k --image-size 256 --data chest/

    Without --data the key alone is looked up.
    """
    from featurecache.extraction.cache_miss import explain_miss

    given = typed_options()
    data = options.pop("data") if "data" in given else None
    if data is None and (needless := [name for name in _OF_IMAGES if name in given]):
        raise BadOption(f"{given[needless[0]][0]} is about the images; say which with --data.")
    if data is None:
        options = {name: value for name, value in options.items() if name not in ("data", *_OF_IMAGES)}
        reason = explain_miss(cache=cache, **options)
    else:
        reason = explain_miss(data, cache=cache, columns=pairs_of(columns), progress=talk.progress, **options)
    talk.result(str(reason), reason.record())
    talk.next(typed_command(name="extract") + ("" if data else " --data FOLDER"))
    return 0
