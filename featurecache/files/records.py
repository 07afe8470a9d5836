"""Checked JSON: canonical form, text with a checksum, reading with care, the types of plan and provenance.

What is read may have been written by anybody: bounded in size and depth; refused are a key that stands twice, NaN and
infinities, numbers beyond 64 bits, and half characters (lone surrogates, which nothing can write or print). What a
record means is checked by whoever reads it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import xxhash

from featurecache.errors import CacheError, DamagedFile
from featurecache.files.atomic import hash_file, open_regular


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, no NaN, UTF-8 as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


MOST = 1 << 24  # bytes of a file
DEEPEST = 64
_CHECK = "check"


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CacheError, which says what is wrong with it."""
    return _parsed(path)[0]


def write_checked_json(record: dict[str, Any]) -> bytes:
    """The text of a record with a hash of it, ``check``, so that every flipped bit is noticed."""
    return _text({_CHECK: xxhash.xxh3_64_hexdigest(_text(record)), **record})


def read_checked_json(path: Path, *, by_hand: bool = True) -> tuple[dict[str, Any], bool]:
    """(the record without its check, whether it is the text that was written). One without a check is taken as it is
    where it may be written ``by_hand``."""
    record, text = _parsed(path)
    if _CHECK not in record:
        return record, by_hand
    check = record.pop(_CHECK)
    return record, check == xxhash.xxh3_64_hexdigest(_text(record)) and text == _text({_CHECK: check, **record})


def refuse_broken(path: Path) -> DamagedFile:
    return DamagedFile(
        f"{path} is damaged, or was changed by hand: its text is not the one that was written. featurecache repair "
        "restores it."
    )


def check_part_of_a_run(path: Path) -> None:
    """Of a file that a run's config.json lists, or a folder of such: raises DamagedFile where it is not what was
    written. Another's config.json has no list of files, and says nothing."""
    path = path.absolute()
    for folder in (path.parent, path.parent.parent):
        try:
            record, intact = read_checked_json(folder / "config.json")
        except CacheError:
            continue
        listed = record.get("files") if "format" in record else None
        for name, word in listed.items() if isinstance(listed, dict) else ():
            file = folder / name
            if path in (file, file.parent) and not (intact and file.is_file() and hash_file(file) in word.split()):
                raise DamagedFile(
                    f"{file} is not what was written with the run {folder}, or config.json there is not. A whole copy, "
                    "or the command that made it with --overwrite, brings it back."
                )


def _text(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    """(the object in a JSON file, its text)."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST:
                raise CacheError(f"{path} has {size:,} bytes; a record has at most {MOST:,}.")
            text = file.read(MOST)
        record = parse_json(text.decode(), str(path))
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CacheError(f"{path} cannot be read: {error}.") from error
    if not isinstance(record, dict):
        raise CacheError(f"{path} holds {type(record).__name__}, not a record.")
    return record, text


def parse_json(text: Any, where: str) -> Any:
    """The value of JSON text; ``where`` names it in the CacheError."""
    if not isinstance(text, str):
        raise CacheError(f"{where} cannot be read: it is {type(text).__name__}, not text.")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError as error:
        raise CacheError(f"{where} cannot be read: it is nested deeper than {DEEPEST} levels.") from error
    except ValueError as error:
        raise CacheError(f"{where} cannot be read: {error}.") from error
    level = [value]  # depth and leaves, without recursion
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole, where)]
        if not level:
            return value
    raise CacheError(f"{where} cannot be read: it is nested deeper than {DEEPEST} levels.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return record


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _parts(value: Any, where: str) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str) and not is_text(value):
        raise CacheError(f"{where} cannot be read: it holds half a character ({value[:40]!a}).")
    if isinstance(value, float) and not math.isfinite(value):
        raise CacheError(f"{where} cannot be read: it holds a number beyond all bounds.")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise CacheError(f"{where} cannot be read: it holds a whole number of more than 64 bits.")
    return []


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


WAYS = ("library", "onednn", "compiled", "openvino")  # of a forward pass: see featurecache.extraction.forward
ENGINES = ("local", "processes", "ray")  # where shards are computed


def checked_plan(plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """The plan of a store, of which the numbers steer a forward pass."""
    bounds = {"batch_size": 1 << 16, "threads": 1 << 12}
    for device, how in plan.items():
        fine = isinstance(how, dict) and all(type(how.get(key)) is int for key in bounds)
        if not fine or not all(0 < how[key] <= most for key, most in bounds.items()):
            raise CacheError(f"{path} has no batch_size and threads for {device[:40]!a}. Delete it to plan anew.")
        if "cost" in how and not _is_cost(how["cost"]):
            raise CacheError(f"{path} does not say what an image costs on {device[:40]!a}. Delete it to plan anew.")
        if not _is_forward(how):
            raise CacheError(f"{path} names no forward pass for {device[:40]!a}. Delete it to plan anew.")
    return plan


def _is_forward(how: dict[str, Any]) -> bool:
    """Whether a plan's way is one, and what it was chosen by is there where it says so."""
    parts, measured = how.get("parts", []), "candidates" in how
    named = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    way = how.get("forward", None if measured else "library")
    return named and isinstance(way, str) and way in WAYS and (not measured or are_candidates(how["candidates"]))


def are_candidates(value: Any) -> bool:
    """Whether it says how fast and how far off each way of a forward pass was, the library's among them."""
    if not isinstance(value, dict) or "library" not in value or not value.keys() <= {*WAYS}:
        return False
    pairs = [(f.get("images_per_s"), f.get("error")) if isinstance(f, dict) else (None, None) for f in value.values()]
    return all(type(s) is type(e) is float and 0 < s < math.inf and 0 <= e < math.inf for s, e in pairs)


def _is_cost(cost: Any) -> bool:
    kinds = {"forward_ms": float, "images": int, "device": str, "loading_ms": dict, "busy": bool}
    if not isinstance(cost, dict) or {key: type(value) for key, value in cost.items()} != kinds:
        return False
    return all(type(ms) is float and ms >= 0 for ms in [cost["forward_ms"], *cost["loading_ms"].values()])


_REQUEST = {"name": str, "weights": str, "random_weights": bool, "seed": int, "image_size": int, "fit": str}


def check_provenance(provenance: Any, path: Path) -> None:
    """What a store says of its origin: text, and the request by which its backbone can be loaded again."""
    request = provenance.get("request", {}) if isinstance(provenance, dict) else None
    fine = (
        isinstance(request, dict)
        and ("name" in request or not request)
        and all(key in _REQUEST and (value is None or type(value) is _REQUEST[key]) for key, value in request.items())
        and isinstance(provenance.get("versions", {}), dict)
        and all(isinstance(provenance.get(key), str | None) for key in ("backbone", "id", "revision", "licence"))
    )
    if not fine:
        raise CacheError(f"{path}: its provenance is not that of a store (a name, a request, versions).")


def nan_to_none(data: Any) -> Any:
    """A record with NaN and infinities as None: JSON has none."""
    if isinstance(data, dict):
        return {key: nan_to_none(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [nan_to_none(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
