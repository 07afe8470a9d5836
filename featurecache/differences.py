"""Two extraction specs side by side: which fields differ, and how that is said to people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featurecache.errors import FeatureCacheError
from featurecache.preprocess import Preprocess
from featurecache.spec import ExtractionSpec

_LONGEST = 60  # characters of a value
ABSENT = "—"
_HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class Difference:
    """One field by its dotted path; ``ABSENT`` where only the other side has it."""

    field: str
    stored: Any
    asked: Any


def differences(stored: ExtractionSpec, asked: ExtractionSpec) -> Iterator[Difference]:
    """Field by field, in the order of the spec."""
    old, new = _flat(stored.to_dict()), _flat(asked.to_dict())
    for name in dict.fromkeys([*new, *old]):
        stored, asked = old.get(name, ABSENT), new.get(name, ABSENT)
        if stored != asked:
            yield Difference(name, stored, asked)


def _flat(record: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def rows_of(
    old: ExtractionSpec, new: ExtractionSpec, origins: tuple[dict[str, Any], dict[str, Any]]
) -> list[tuple[str, str]]:
    """(field, "stored → asked") for people: weights as one thing, an architecture of another class as one, nothing that
    only follows from another field. ``origins``: the provenance of both."""
    rows: dict[str, str] = {}
    follow = _following(old, new)
    found = list(differences(old, new))
    other = any(each.field in ("architecture.library", "architecture.class") for each in found)
    for each in found:
        name = each.field
        if name.startswith("weights."):
            made = _weights(old, origins[0]), _weights(new, origins[1])
            rows["weights"] = f"{made[0]} → {made[1]}"
        elif other and name.startswith("architecture."):
            names = [f"{a.get('class')} of {a.get('library')}" for a in (old.architecture, new.architecture)]
            rows["architecture"] = f"{_cut(names[0])} → {_cut(names[1])}"
        elif name not in follow:
            short = name.removeprefix("architecture.").removeprefix("preprocess.")
            rows[_cut(short)] = f"{_text(name, each.stored)} → {_text(name, each.asked)}"
    return list(rows.items())


def _following(stored: ExtractionSpec, asked: ExtractionSpec) -> set[str]:
    """Fields of the preprocessing that differ only because another image size scales them."""
    if stored.image_size == asked.image_size:
        return set()
    try:
        settings = {key: value for key, value in stored.preprocess.items() if key != "decoding"}
        scaled = Preprocess.from_dict(settings).scaled(asked.image_size[0]).to_dict()
    except (FeatureCacheError, TypeError):
        return set()
    return {f"preprocess.{key}" for key in ("resize", "crop") if scaled[key] == asked.preprocess.get(key)}


def _weights(spec: ExtractionSpec, provenance: dict[str, Any]) -> str:
    if spec.untrained:
        return f"untrained, seed {spec.weights['random_seed']}"
    given = (provenance.get("request") or {}).get("weights")
    revision = str(provenance.get("revision") or "")
    came = given or "@".join(filter(None, [str(provenance.get("id", "")), revision[:8]]))
    return f"{_text('', spec.weights.get('blake2b'))} ({_cut(came[-_LONGEST:])})"


def _text(name: str, value: Any) -> str:
    """A value as people write it: 224 or 224×196, 0.5 or 0.485 0.456 0.406, digests by their beginning."""
    if value is None:
        return "none"
    if isinstance(value, str) and len(value) == 32 and set(value) <= _HEX:
        return value[:8]
    if isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
        words = [f"{v:.6g}" for v in value]
        square = len(set(words)) == 1 and (name == "image_size" or type(value[0]) is float)
        return words[0] if square else ("×" if type(value[0]) is int else " ").join(words)
    return _cut(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _cut(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)  # a stranger's record may hold control characters
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
