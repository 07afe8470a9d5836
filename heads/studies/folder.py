"""The folder of a study: what its record says, which steps are finished, and that nothing else is put into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from featurecache import __version__
from featurecache.errors import CacheError, RunError
from heads.studies.images import Given
from heads.studies.plan import Asked
from heads.studies.spec import Study

FORMAT = 1
RECORD = "study.json"


def record_in(folder: Path, study: Study, asked: Asked) -> dict[str, Any] | None:
    """What the folder holds: nothing, or this study asked for alike. Raises RunError."""
    from featurecache.files.records import read_record

    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {folder} is a file; it must be a folder, or a name that is free.")
    if not (folder / RECORD).exists():
        held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if set(held) - {"few", "drawn"}:
            raise RunError(f"--out {folder} holds other files and no study; give a folder that is empty or not there.")
        return None
    try:
        record = read_record(folder / RECORD)
    except CacheError as error:
        raise RunError(f"{folder} is damaged: {error}") from error
    if record.get("format") != FORMAT or not isinstance(record.get("asked"), dict):
        raise RunError(f"{folder / RECORD} is not what featurecache {__version__} writes; give another --out.")
    if record.get("study") != study.name:
        raise RunError(f"{folder} holds the study {str(record.get('study'))[:60]}; give another --out.")
    differing = [
        f"{name.replace('_', ' ')} {_said(record['asked'].get(name))} → {_said(value)}"
        for name, value in asked.to_dict().items()
        if record["asked"].get(name) != value
    ]
    if differing:
        raise RunError(
            f"{folder} holds this study as it was asked otherwise ({'; '.join(differing)}). The same options go on "
            "with it; --out NAME begins another."
        )
    return record


def _said(value: Any) -> str:
    if value is None or value == {}:
        return "not given"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def with_kept_data(asked: Asked, record: dict[str, Any] | None, say: Callable[[str], None]) -> Asked:
    """--data need not be said again."""
    if asked.data or not record or not record.get("data"):
        return asked
    say(f"data       {', '.join(record['data'])}   (as before)")
    return replace(asked, data=tuple(record["data"]))


def check_images(folder: Path, record: dict[str, Any] | None, given: dict[str, Given]) -> None:
    for name, before in (record or {}).get("images", {}).items():
        if name in given and given[name].mark != before:
            raise RunError(
                f"{folder} holds this study of other images: {before.get('source')}, {before.get('images')} images, "
                "were others then, or have changed. --out NAME begins another."
            )


def finished_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Step -> record, of those that are finished. Raises RunError where a record is damaged."""
    from featurecache.files.records import read_record

    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "steps").glob("*.json")):
        try:
            record = read_record(path)
        except CacheError as error:
            raise RunError(f"{folder} is damaged: {error}") from error
        if not isinstance(record.get("asked"), dict) or not isinstance(record.get("made"), dict):
            raise RunError(
                f"{path} is damaged: it does not say what was asked and made. Without it the step is done again."
            )
        found[path.stem] = record
    return found


def as_json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
