"""The canary: four small images that every store has computed once and every later run computes again.

A fingerprint cannot see that a library now resizes or multiplies differently. So a store's first run keeps what it made
of the probe images that ship with this package (a colour JPEG larger than any network's input, a small PNG, a PNG with
16-bit grey, one of odd size): their pixels as the network sees them, and the outputs as they would be stored. Before a
later run writes anything it compares. Pixels may differ by 1 of 255. Features are computed from the *kept* pixels, so
that a difference is either in the pixels or in the model; a row r' may differ from the kept r by

    |r' − r|₂ / |r|₂ ≤  2·10⁻⁴ for fp32 (1·10⁻⁵ where float32 is stored), 5·10⁻³ for fp16,
                        3·10⁻² for bf16 (so cos(r', r) ≥ √(1 − 0.03²) > 0.9995)

which other batch sizes, thread counts and devices keep (rounding to float16 alone moves a row by 2·10⁻⁴).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import xxhash

from featurecache.backbones.base import Backbone, versions
from featurecache.errors import DamagedFile, Drift
from featurecache.extraction.forward import ForwardRunner
from featurecache.extraction.pipeline import decode_many
from featurecache.files.atomic import refuse_links, write_whole
from featurecache.files.locks import update_lock
from featurecache.outputs import Output, derive, parse
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store

PROBES = ("photo.jpg", "small.png", "grey16.png", "odd.png")
TOLERANCE = {"fp32": 2e-4, "fp16": 5e-3, "bf16": 3e-2}
FLOAT32_TOLERANCE = 1e-5
_LARGEST = 1 << 30  # bytes; four images of all layers of the largest networks stay far below


@dataclass(frozen=True)
class Reference:
    """What a store's first runs made of the probes."""

    pixels: torch.Tensor  # uint8 [4,3,h,w]
    rows: dict[str, torch.Tensor]  # output -> [4, ...] in the storage dtype
    made_by: dict[str, str]  # library -> version

    def hash(self) -> str:
        found = xxhash.xxh3_128(json.dumps(self.made_by, sort_keys=True).encode())
        for name, tensor in sorted({"pixels": self.pixels, **self.rows}.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()


def canary_path(store: Store) -> Path:
    return store.path / "canary.safetensors"


def read_canary(store: Store) -> Reference | None:
    """None where the store has none yet. Raises DamagedFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = canary_path(store)
    refuse_links(path)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _LARGEST or not path.is_file():
            raise ValueError("it is no small file")
        data = path.read_bytes()  # once: safe_open would open it twice, and it may be replaced in between
        rows = load(data)
        notes = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        found = Reference(rows.pop("pixels"), rows, json.loads(notes["made_by"]))
        fine = found.hash() == notes["hash"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}). {_RENEW}") from error
    if not fine:
        raise DamagedFile(f"{path} is damaged: its content does not match its hash. {_RENEW}")
    return found


_RENEW = "featurecache repair makes it again, after comparing rows of the store with what this machine computes."


def write_canary(store: Store, reference: Reference) -> None:
    from safetensors.torch import save

    notes = {"made_by": json.dumps(reference.made_by, sort_keys=True), "hash": reference.hash()}
    tensors = {key: tensor.contiguous() for key, tensor in {"pixels": reference.pixels, **reference.rows}.items()}
    write_whole(canary_path(store), save(tensors, notes), inside=store.path)


def check_canary(
    store: Store, backbone: Backbone, compute: ForwardRunner | None, outputs: Sequence[Output], *, write: bool = True
) -> None:
    """Compare this machine with the store; keep what the store had no reference for yet (``write``).

    ``compute=None``: only functions of stored tokens are to be made, so the kept tokens of the probes are enough.
    Raises Drift.
    """
    kept = read_canary(store)
    if kept is None:
        if write and compute is not None:
            _keep(store, _measure(backbone, compute, store.spec, outputs, _pixels(backbone)))
        return
    if compute is not None:
        now = _measure(backbone, compute, store.spec, outputs, kept.pixels)
        shift = int((_pixels(backbone).int() - kept.pixels.int()).abs().max()) if _fits(backbone, kept) else 255
    else:
        now, shift = Reference(kept.pixels, _derived(backbone, outputs, kept.rows), kept.made_by), 0
    both = sorted(now.rows.keys() & kept.rows.keys())
    far = [name for name in both if not is_within_tolerance(store.spec, now.rows[name], kept.rows[name])]
    wrong = {name: relative_distance(now.rows[name], kept.rows[name]) for name in far}
    if shift > 1 or wrong:
        raise Drift(_sentence(store, shift, wrong, kept, now))
    if write and not now.rows.keys() <= kept.rows.keys():
        _keep(store, now)


def rewrite_canary(store: Store, backbone: Backbone, compute: ForwardRunner, outputs: Sequence[Output]) -> None:
    """Replace the store's reference, which is damaged; there is no moment without one."""
    with update_lock(store.path):
        write_canary(store, _measure(backbone, compute, store.spec, outputs, _pixels(backbone)))


def matches_this_machine(store: Store, backbone: Backbone, compute: ForwardRunner) -> bool:
    """Whether the store has a reference and this machine computes it."""
    try:
        check_canary(store, backbone, compute, [], write=False)
    except (Drift, DamagedFile):
        return False
    return read_canary(store) is not None


def relative_distance(now: torch.Tensor, kept: torch.Tensor) -> float:
    """Largest relative L2 distance of the rows [n, ...]; infinite where shapes differ or values are not finite."""
    if now.shape != kept.shape:
        return float("inf")
    a, b = now.double().flatten(1), kept.double().flatten(1)
    distance = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-30)
    return float(distance.nan_to_num(float("inf")).max()) if len(distance) else 0.0


def is_within_tolerance(spec: ExtractionSpec, now: torch.Tensor, kept: torch.Tensor) -> bool:
    """Whether rows [n, ...] agree as closely as another machine's would."""
    return relative_distance(now, kept) <= tolerance(spec)


def tolerance(spec: ExtractionSpec) -> float:
    return FLOAT32_TOLERANCE if (spec.precision, spec.dtype) == ("fp32", "float32") else TOLERANCE[spec.precision]


def _sentence(store: Store, shift: int, wrong: dict[str, float], kept: Reference, now: Reference) -> str:
    found = [f"the pixels of the probe images differ by {shift} of 255 (1 is allowed)"] if shift > 1 else []
    found += [
        f"{name} differs by {distance:.2g} (at most {tolerance(store.spec):g})" for name, distance in wrong.items()
    ]
    where = "preprocessing and model" if shift > 1 and wrong else "preprocessing" if shift > 1 else "model"
    then, today = (", ".join(f"{key} {value}" for key, value in sorted(r.made_by.items())) for r in (kept, now))
    return (
        f"this machine does not compute the features that {store.path.name} holds: {'; '.join(found)}. The {where} of "
        f"the installed libraries changed.\nThe store was begun with {then}; here are {today}.\nGo back to those "
        "versions, or begin the store's next generation with --accept-drift."
    )


def _keep(store: Store, found: Reference) -> None:
    """Add to the store's reference; of two runs at once the first one's rows stay."""
    with update_lock(store.path):
        kept = read_canary(store)
        if kept is None:
            write_canary(store, found)
        elif not found.rows.keys() <= kept.rows.keys():
            write_canary(store, Reference(kept.pixels, {**found.rows, **kept.rows}, kept.made_by))


def _measure(
    backbone: Backbone, compute: ForwardRunner, spec: ExtractionSpec, outputs: Sequence[Output], pixels: torch.Tensor
) -> Reference:
    """What this machine makes of the probes: always the tokens, or the vector where there are none, and ``outputs``."""
    anchor = parse("tokens" if "tokens" not in backbone.refusals else backbone.vector)
    wanted = tuple(dict.fromkeys([anchor, *outputs]))
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(pixels), compute.batch_size):
        rows, _ = compute(pixels[start : start + compute.batch_size], wanted, spec.dtype)
        for source, tensor in rows.items():
            parts.setdefault(source, []).append(tensor.cpu())
    found = {source: torch.cat(tensors) for source, tensors in parts.items()}
    libraries = ["torchvision", "transformers", "numpy", "pillow"]
    libraries += ["timm"] if backbone.architecture["library"] == "timm" else []
    made_by = {**versions(*libraries), "device": compute.device_name()}
    return Reference(pixels, {**found, **_derived(backbone, wanted, found)}, made_by)


def _derived(backbone: Backbone, outputs: Sequence[Output], rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen = [output for output in outputs if output.is_derived and output.source in rows]
    return {o.name: derive(o, rows[o.source], len(backbone.prefix), backbone.grid) for o in chosen}


def _fits(backbone: Backbone, kept: Reference) -> bool:
    return tuple(kept.pixels.shape) == (len(PROBES), 3, *backbone.image_size)


def _pixels(backbone: Backbone) -> torch.Tensor:
    """uint8 [4,3,h,w]: the probes as the network sees them."""
    images = decode_many(probes().__getitem__, range(len(PROBES)), backbone.preprocess, 1)
    return torch.stack([pixels for _, pixels, _ in images if isinstance(pixels, torch.Tensor)])


@lru_cache(maxsize=1)
def probes() -> tuple[bytes, ...]:
    folder = resources.files("featurecache") / "probes"
    return tuple((folder / name).read_bytes() for name in PROBES)
