"""Damages to files of a cache, and what verify, the readers, repair and an extraction make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from featurecache.errors import FeatureCacheError
from featurecache.store.view import View
from support import fault_jobs


def damaged(whole: bytes, how: str, place: int, more: int) -> bytes | None:
    """``bit`` number ``more`` of the byte there; ``cut`` there; ``grow`` by so many zeros; ``ones`` in so many bytes;
    ``swap`` so many bytes with the next ones; ``gone``."""
    data = bytearray(whole)
    if how == "gone":
        return None
    if how == "bit":
        data[place] ^= 1 << more
    elif how == "cut":
        del data[place:]
    elif how == "grow":
        data += bytes(more)
    elif how == "ones":
        data[place : place + more] = b"\xff" * len(data[place : place + more])
    elif how == "swap":
        data[place : place + 2 * more] = data[place + more : place + 2 * more] + data[place : place + more]
    return bytes(data)


def damage(path: Path, how: str, place: int, more: int) -> None:
    """As decay of the disk would: nothing that the system knows of the file has changed."""
    data = damaged(path.read_bytes(), how, place, more)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def flips(
    start: str, work: str, changes: list[list[tuple[str, str, int, int]]], then: str, **extraction: Any
) -> list[dict[str, Any]]:
    """Each of the ``changes`` (damages made together) in a fresh copy of the cache ``start``: what `verify` names and
    what can be read; then ``mend`` or ``extract``, and the same again."""
    found = []
    for number, together in enumerate(changes):
        cache = f"{work}/{number}"
        fault_jobs.copy(start, cache)
        for name, how, place, more in together:
            damage(Path(cache) / name, how, place, more)
        seen = {"verify": fault_jobs.verify(cache), "read": rows(cache)}
        seen["done"] = _done(then, cache, extraction)
        if then or not together:
            seen |= {"after": rows(cache), "left": fault_jobs.verify(cache), "files": fault_jobs.committed(cache)}
        found.append({key: _without(value, cache) for key, value in seen.items()})
    return found


def _done(then: str, cache: str, extraction: dict[str, Any]) -> Any:
    try:
        if then == "mend":
            return {**fault_jobs.mend(cache), "records": fault_jobs.records(cache)}
        return fault_jobs.extract(cache=cache, **extraction) if then == "extract" else None
    except FeatureCacheError as error:
        return f"{type(error).__name__}: {error}"


def _without(value: Any, cache: str) -> Any:
    """Paths as they are below the cache."""
    if isinstance(value, str):
        return value.replace(f"{cache}/", "")
    if isinstance(value, list):
        return [_without(each, cache) for each in value]
    return {_without(k, cache): _without(v, cache) for k, v in value.items()} if isinstance(value, dict) else value


def rows(cache: str) -> dict[str, Any]:
    """View → the error it gives, or sample → output → hash of the row, or the error that reading it gives."""
    return fault_jobs.of_views(cache, _rows_of)


def _rows_of(view: View) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for number, sample in enumerate(view.ids):
        found[sample] = {"label": str(view.labels[number]), "digest": view.digests[number].decode()}
        for output in view.outputs:
            try:
                row = view.array(output, [number])
                found[sample][output] = f"{row.dtype} {row.shape} {xxhash.xxh3_128_hexdigest(row.tobytes())}"
            except FeatureCacheError as error:
                found[sample][output] = f"{type(error).__name__}: {error}"
    return found
