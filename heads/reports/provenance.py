"""Provenance of a report's numbers: the commands that make them again, versions, weights, preprocessing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featurecache.errors import FeatureCacheError
from featurecache.formatting import exact_number, shell_words
from featurecache.store.remote_cache import local_place
from featurecache.store.view import View
from heads.evaluation.families import Family, fraction_of
from heads.models.catalogue import own_settings
from heads.runs.run import Run, is_pixels, option_words, source_words, view_word

MOST = 12  # heads whose commands are written out


def train_command(run: Run) -> str:
    """The command line that trains this head, or this network, again."""
    config = run.config
    if is_pixels(run):
        words = ["train-baseline", "--arch", run.head, *source_words(config["view"].get("source") or {})]
    else:
        features = view_word(config["view"]["label"], config["view"]["path"])
        words = ["train-head", "--head", run.head, "--features", features, "--output", run.output]
    return "featurecache " + shell_words(words + option_words(config["settings"], _published(run)))


def _published(run: Run) -> dict[str, Any]:
    """The own settings of a head or network; none where what it is made of is gone: then all are written out."""
    settings = run.config["settings"]
    adapted = settings.get("lora") is not None or bool(settings.get("rlrr"))
    try:
        return own_settings(run.head, weights=settings.get("weights"), adapted=adapted)
    except FeatureCacheError:
        return {}


def sweep_commands(folder: Path) -> list[str]:
    """Of a folder with a sweep.json the commands that made it, in order."""
    try:
        record = json.loads((folder / "sweep.json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    commands = record.get("commands") if isinstance(record, dict) else None
    return [each for each in commands if isinstance(each, str)] if isinstance(commands, list) else []


def commands_of(
    folder: Path, paths: Sequence[str], families: Sequence[Family], record: dict[str, Any], images: bool, hashed: bool
) -> list[tuple[str, str]]:
    """(what it makes, command): the sweep or the heads, and the page itself."""
    runs = [str(run.path) for family in families for run in family.runs]
    own = (folder / "sweep.json").is_file() or (folder / "config.json").is_file()
    words = list(paths) or ([str(folder)] if own else runs)
    commands = [(f"{each}:", made) for each in words for made in sweep_commands(Path(each))]
    if not commands:
        named = zip(record["families"], families, strict=True)
        commands = [(f"{numbers['name']}:", train_command(family.runs[0])) for numbers, family in list(named)[:MOST]]
    options: list[tuple[str, Any]] = [("--reference", record["reference"])]
    options += [("--by", column) for column in record.get("by") or {}]
    there = (point["at_prevalence"] for family in record["families"] for point in family["operating"])
    options.append(("--prevalence", next((exact_number(point["prevalence"]) for point in there if point), None)))
    options.append(("--show-test", "all" if record["test_seen"] else None))
    options.append(("--out", None if words == [str(folder)] else str(folder)))
    words += [word for option, value in options if value is not None for word in (option, value)]
    words += ([] if images else ["--no-images"]) + (["--hash-ids"] if hashed else [])
    return [*commands, ("This page:", f"featurecache report {shell_words(words)}")]


def setting_words(setting: dict[str, Any]) -> str:
    """``lr 0.001 · weight decay 0.0001``"""
    shown = {key: value for key, value in setting.items() if value is not None and value != ()}
    return " · ".join(f"{key.replace('_', ' ')} {_value_text(value)}" for key, value in shown.items())


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def split_counts(run: Run) -> str:
    """``train 1,200 · val 150 · test 150``: images."""
    return " · ".join(f"{name} {n:,}" for name, n in (run.config["splits"].get("images") or {}).items())


def origins(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For every view that runs were trained on: what it is, its splits at the largest fraction of train, and its spec
    and provenance as JSON."""
    largest: dict[tuple[Any, str], Run] = {}
    for run in sorted(runs, key=lambda run: -fraction_of(run)):
        largest.setdefault(_view_key(run), run)
    return [_origin(run, [each.head for each in runs if _view_key(each) == key]) for key, run in largest.items()]


def _origin(run: Run, names: Sequence[str]) -> dict[str, Any]:
    config, view, splits, pixels = run.config, run.config["view"], run.config["splits"], is_pixels(run)
    provenance, extract = config["provenance"], None
    if not pixels:
        with contextlib.suppress(FeatureCacheError, OSError):  # the view may be gone, or another of its name
            stored = View(local_place(view["path"]), columns_only=True)
            if stored.fingerprint == view.get("fingerprint") and run.is_of_images_in(stored):
                extract = stored.extract_command(run.output)
    backbone = [str(provenance[key]) for key in ("backbone", "id", "revision") if provenance.get(key)]
    facts = {
        "view": view["label"],
        "networks" if pixels else "heads": ", ".join(dict.fromkeys(names)),
        f"fingerprint of the {'pixels' if pixels else 'features'}": view.get("fingerprint"),
        "backbone": None if pixels else " · ".join(dict.fromkeys(backbone)),
        "weights": None if pixels else "random: never trained" if view["untrained"] else "trained",
        "licence of the weights": None if view["untrained"] else provenance.get("licence"),
        "data": (view.get("source") or {}).get("data"),
        "augmented copies": view.get("copies"),
        "splits": splits.get("how"),
        "images": split_counts(run),
        "the test images": f"BLAKE2b-128 of their digests: {splits['digest']}",
        "versions": " · ".join(f"{k} {v}" for k, v in (config.get("versions") or {}).items()),
        "made": config["created"][:19].replace("T", " "),
    }
    shown = [(name, value) for name, value in facts.items() if value]
    text = {k: json.dumps(config[k], indent=1, ensure_ascii=False, sort_keys=True) for k in ("spec", "provenance")}
    return {"label": view["label"], "facts": shown, "extract": extract, **text}


def _view_key(run: Run) -> tuple[Any, str]:
    return run.config["view"].get("fingerprint"), run.config["view"]["label"]
