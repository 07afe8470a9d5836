"""ExtractionSpec: everything that decides the value of a feature, the fingerprint that names it; two specs compared.

Not in it: batch size, workers, device, paths, dates, outputs (an earlier layer is an output), the dataset. An alias,
a hub id and a local copy of the same weights therefore share one store.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featurecache.errors import BadOption, CacheError, FeatureCacheError
from featurecache.files.records import canonical_json
from featurecache.images.headers import READING
from featurecache.images.preprocessing import Preprocess

FORMAT = 1  # of the spec, which is hashed: raising it would make every feature another one
PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = ("float16", "float32")
UNKNOWN = "unknown"  # precision, and every word on origin, of features that were imported
_LONGEST = 60  # characters of a value in a difference
ABSENT = "—"
_HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class ExtractionSpec:
    """What a stored feature is a function of, besides the image.

    architecture          library, class, resolved model config
    weights               {"blake2b": digest of the tensors taken from the checkpoint} or {"random_seed": n}
    preprocess            resize implementation, sizes, crop, interpolation, mean, std, version of the decoding rules,
                          bits: 2^bits − 1 is white in 16-bit images, where that was said; region: what is looked at
                          of an image, before all that (left, top, right, bottom in parts), where that was said
    image_size            (height, width) in pixels the network sees
    position_embeddings   as trained, or how they are interpolated
    precision             fp32 | bf16 | fp16: weights and activations of the forward pass
    dtype                 float16 | float32: how rows are stored
    generation            0; raised when drift of the software was accepted
    """

    architecture: dict[str, Any]
    weights: dict[str, Any]
    preprocess: dict[str, Any]
    image_size: tuple[int, int]
    position_embeddings: str
    precision: str = "fp32"
    dtype: str = "float16"
    generation: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.precision not in (*PRECISIONS, UNKNOWN):
            raise BadOption(f'no precision is called "{self.precision}"; there are {", ".join(PRECISIONS)}.')
        if self.dtype not in DTYPES:
            raise BadOption(f'no storage dtype is called "{self.dtype}"; there are {", ".join(DTYPES)}.')

    @property
    def imported(self) -> bool:
        """Nobody knows what made these features; nothing can be computed beside them."""
        return self.precision == UNKNOWN

    @property
    def untrained(self) -> bool:
        return "random_seed" in self.weights

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ExtractionSpec:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            actual = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise CacheError(
                f"an extraction spec has the fields {', '.join(sorted(names))}; found {str(actual)[:200]}."
            )
        kinds = {"architecture": dict, "weights": dict, "preprocess": dict, "image_size": list, "generation": int}
        wrong = [name for name in names if type(record[name]) is not kinds.get(name, int if name == "format" else str)]
        sides = record["image_size"]
        if wrong or len(sides) != 2 or not all(type(side) is int and 0 <= side <= 1 << 16 for side in sides):
            raise CacheError(f"an extraction spec does not hold such {' and '.join(sorted(wrong)) or 'an image_size'}.")
        if (0 in sides) != (record["precision"] == UNKNOWN):
            raise CacheError(f"an extraction spec has no image_size {sides} at the precision {record['precision']!a}.")
        if record["precision"] not in (*PRECISIONS, UNKNOWN) or record["dtype"] not in DTYPES:
            raise CacheError(f"an extraction spec has no precision {record['precision']!a} of {record['dtype']!a}.")
        return cls(**{**record, "image_size": tuple(sides)})

    @property
    def fingerprint(self) -> str:
        """BLAKE2b-128 of the canonical JSON, 32 hex."""
        return hashlib.blake2b(canonical_json(self.to_dict()).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SpecDifference:
    """One field by its dotted path; ``ABSENT`` where only the other side has it."""

    field: str
    stored: Any
    asked: Any


def spec_differences(stored: ExtractionSpec, asked: ExtractionSpec) -> Iterator[SpecDifference]:
    """Field by field, in the order of the spec."""
    old, new = _flat(stored.to_dict()), _flat(asked.to_dict())
    for name in dict.fromkeys([*new, *old]):
        stored, asked = old.get(name, ABSENT), new.get(name, ABSENT)
        if stored != asked:
            yield SpecDifference(name, stored, asked)


def _flat(record: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def describe_differences(
    old: ExtractionSpec, new: ExtractionSpec, origins: tuple[dict[str, Any], dict[str, Any]]
) -> list[tuple[str, str]]:
    """(field, "stored → asked") for people: weights as one thing, an architecture of another class as one, nothing that
    only follows from another field. ``origins``: the provenance of both."""
    rows: dict[str, str] = {}
    follow, differences = _following(old, new), list(spec_differences(old, new))
    other = any(each.field in ("architecture.library", "architecture.class") for each in differences)
    for each in differences:
        name = each.field
        if name.startswith("weights."):
            rows["weights"] = f"{_weights(old, origins[0])} → {_weights(new, origins[1])}"
        elif other and name.startswith("architecture."):
            kinds = [_cut(f"{a.get('class')} of {a.get('library')}") for a in (old.architecture, new.architecture)]
            rows["architecture"] = " → ".join(kinds)
        elif name not in follow:
            short = name.removeprefix("architecture.").removeprefix("preprocess.")
            rows[_cut(short)] = f"{_text(name, each.stored)} → {_text(name, each.asked)}"
    return list(rows.items())


def _following(stored: ExtractionSpec, asked: ExtractionSpec) -> set[str]:
    """Fields of the preprocessing that differ only because another image size scales them."""
    if stored.image_size == asked.image_size:
        return set()
    try:
        settings = {key: value for key, value in stored.preprocess.items() if key not in READING}
        scaled = Preprocess.from_dict(settings).scaled(asked.image_size[0]).to_dict()
    except (FeatureCacheError, TypeError):
        return set()
    return {f"preprocess.{key}" for key in ("resize", "crop") if scaled[key] == asked.preprocess.get(key)}


def _weights(spec: ExtractionSpec, provenance: dict[str, Any]) -> str:
    if spec.untrained:
        return f"untrained, seed {spec.weights['random_seed']}"
    origin = "@".join(filter(None, [str(provenance.get("id", "")), str(provenance.get("revision") or "")[:8]]))
    origin = (provenance.get("request") or {}).get("weights") or origin
    return f"{_text('', spec.weights.get('blake2b'))} ({_cut(origin[-_LONGEST:])})"


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
