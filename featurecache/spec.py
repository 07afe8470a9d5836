"""The ExtractionSpec: everything that decides the value of a feature, and the fingerprint that names it.

Not in it: batch size, workers, device, paths, dates, outputs (an earlier layer is an output), the dataset. An alias,
a hub id and a local copy of the same weights therefore share one store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from featurecache.errors import BadOption, CacheError
from featurecache.files import FORMAT

PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = ("float16", "float32")
UNKNOWN = "unknown"  # precision, and every word on origin, of features that were imported


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, no NaN, UTF-8 as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True)
class ExtractionSpec:
    """What a stored feature is a function of, besides the image.

    architecture          library, class, resolved model config
    weights               {"blake2b": digest of the tensors taken from the checkpoint} or {"random_seed": n}
    preprocess            resize implementation, sizes, crop, interpolation, mean, std, version of the decoding rules
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

    @property
    def itemsize(self) -> int:
        return {"float16": 2, "float32": 4}[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ExtractionSpec:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise CacheError(f"an extraction spec has the fields {', '.join(sorted(names))}; found {str(found)[:200]}.")
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
