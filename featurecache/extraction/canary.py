"""The canary: does this machine still compute what a store holds? And its backbone, for new images and damaged rows.

The canary is four small images that every store has computed once and every later run computes again.

A fingerprint cannot see that a library now resizes or multiplies differently. So a store's first run keeps what it made
of the probe images that ship with this package (a colour JPEG larger than any network's input, a small PNG, a PNG with
16-bit grey, one of odd size): their pixels as the network sees them, and the outputs as they would be stored. Before a
later run writes anything it compares. Pixels may differ by 1 of 255. Features are computed from the *kept* pixels, so
that a difference is either in the pixels or in the model; a row r' may differ from the kept r by

    |r' − r|₂ / |r|₂ ≤  2·10⁻⁴ for fp32 (1·10⁻⁵ where float32 is stored), 5·10⁻³ for fp16,
                        3·10⁻² for bf16 (so cos(r', r) ≥ √(1 − 0.03²) > 0.9995)

which other batch sizes, thread counts and devices keep (rounding to float16 alone moves a row by 2·10⁻⁴).

`StoreBackbone` and `compute` load the backbone that a store was made with, and make of other images what the store
would hold of them: for heads that predict, and for `repair`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import xxhash

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone, versions
from featurecache.errors import DamagedFile, Drift, NotInCache, UnsafeFile
from featurecache.extraction.forward import ForwardRunner, output_layout, pick_device, spec_of
from featurecache.extraction.pipeline import decode_many
from featurecache.files.atomic import refuse_links, write_whole
from featurecache.files.locks import update_lock
from featurecache.images.headers import EncodedImage, read_by
from featurecache.outputs import Output, derive, members, parse
from featurecache.store.shards import TORCH_DTYPE
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store
from featurecache.store.view import View

PROBES = ("photo.jpg", "small.png", "grey16.png", "odd.png")
TOLERANCE = {"fp32": 2e-4, "fp16": 5e-3, "bf16": 3e-2}
FLOAT32_TOLERANCE = 1e-5
THREADS = min(16, os.cpu_count() or 1)  # that decode
_LARGEST = 1 << 30  # bytes; four images of all layers of the largest networks stay far below


@dataclass(frozen=True)
class Reference:
    """What a store's first runs made of the probes."""

    pixels: torch.Tensor  # uint8 [4,3,h,w]
    rows: dict[str, torch.Tensor]  # output -> [4, ...] in the storage dtype
    made_by: dict[str, str]  # library -> version

    def hash(self) -> str:
        digest = xxhash.xxh3_128(json.dumps(self.made_by, sort_keys=True).encode())
        for name, tensor in sorted({"pixels": self.pixels, **self.rows}.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


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
        reference = Reference(rows.pop("pixels"), rows, json.loads(notes["made_by"]))
        fine = reference.hash() == notes["hash"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}). {_RENEW}") from error
    if not fine:
        raise DamagedFile(f"{path} is damaged: its content does not match its hash. {_RENEW}")
    return reference


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
        pixels = _pixels(backbone)
        shift = int((pixels.int() - kept.pixels.int()).abs().max()) if pixels.shape == kept.pixels.shape else 255
    else:
        now, shift = Reference(kept.pixels, _derived(backbone, outputs, kept.rows), kept.made_by), 0
    both = sorted(now.rows.keys() & kept.rows.keys())
    far = [name for name in both if not is_within_tolerance(store.spec, now.rows[name], kept.rows[name])]
    wrong = {name: relative_distance(now.rows[name], kept.rows[name]) for name in far}
    if shift > 1 or wrong:
        raise Drift(_sentence(store, shift, wrong, kept, now))
    if write and not now.rows.keys() <= kept.rows.keys():
        _keep(store, now)


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


def _keep(store: Store, new: Reference) -> None:
    """Add to the store's reference; of two runs at once the first one's rows stay."""
    with update_lock(store.path):
        kept = read_canary(store)
        if kept is None:
            write_canary(store, new)
        elif not new.rows.keys() <= kept.rows.keys():
            write_canary(store, Reference(kept.pixels, {**new.rows, **kept.rows}, kept.made_by))


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
    made = {source: torch.cat(tensors) for source, tensors in parts.items()}
    timm = ["timm"] if backbone.architecture["library"] == "timm" else []
    device = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else compute.device.type
    made_by = {**versions("torchvision", "transformers", "numpy", "pillow", *timm), "device": device}
    return Reference(pixels, {**made, **_derived(backbone, wanted, made)}, made_by)


def _derived(backbone: Backbone, outputs: Sequence[Output], rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen = [output for output in outputs if output.is_derived and output.source in rows]
    return {o.name: derive(o, rows[o.source], len(backbone.prefix), backbone.grid) for o in chosen}


def _pixels(backbone: Backbone) -> torch.Tensor:
    """uint8 [4,3,h,w]: the probes as the network sees them."""
    images = decode_many(probes().__getitem__, range(len(PROBES)), backbone.preprocess, 1)
    return torch.stack([pixels for _, pixels, _ in images if isinstance(pixels, torch.Tensor)])


@lru_cache(maxsize=1)
def probes() -> tuple[bytes, ...]:
    folder = resources.files("featurecache") / "probes"
    return tuple((folder / name).read_bytes() for name in PROBES)


class StoreBackbone:
    """Makes of new images what a store would hold of them.

    ``weights``: where they are now, if not where they were. ``trust_code``: run the module of a ``python:`` backbone
    that the store's record names. Raises NotInCache when the backbone that is found is not the one of the store, Drift
    when this machine makes something else of the probe images.
    """

    @exact_arithmetic()
    def __init__(
        self, store: Store, *, device: str = "auto", weights: str | None = None, trust_code: bool = False
    ) -> None:
        if "request" not in store.provenance:
            raise NotInCache(f"{store.path.name} was imported: nobody knows which backbone makes such features.")
        request = {**store.provenance["request"], **({"weights": weights} if weights else {})}
        if str(request.get("name", "")).startswith("python:") and not trust_code:
            raise UnsafeFile(
                f"{store.path.name} was made by {request['name']}, which is a program. Run it with --trust-code if the "
                "module of that name in this folder is yours."
            )
        self.store, self.backbone = store, load_backbone(**request)
        spec = spec_of(self.backbone, store.spec.precision, store.spec.dtype, store.spec.preprocess)
        spec = replace(spec, generation=store.spec.generation)
        if spec.fingerprint != store.fingerprint:
            raise NotInCache(
                f"{self.backbone.name} as it is now ({spec.fingerprint[:8]}) is not the backbone that "
                f"{store.path.name} was made with: its weights, configuration or preprocessing changed. "
                "featurecache why says what; extract again, then train."
            )
        picked = pick_device(device)
        plan = (store.plan or {}).get(picked.type) or {"batch_size": 8, "threads": torch.get_num_threads()}
        self.threads: int = plan["threads"]
        self.compute = ForwardRunner(self.backbone, spec.precision, picked, plan["batch_size"])
        self._checked: set[Output] = set()

    def check(self, *outputs: Output) -> None:
        """Compare this machine with the store's reference, once. Raises Drift."""
        if new := set(outputs) - self._checked:
            with exact_arithmetic(self.threads):
                check_canary(self.store, self.backbone, self.compute, [o for o in outputs if o in new], write=False)
            self._checked |= new

    def renew_canary(self, output: Output) -> None:
        """Replace a reference that is damaged by what this machine makes; there is no moment without one."""
        with exact_arithmetic(self.threads), update_lock(self.store.path):
            pixels = _pixels(self.backbone)
            write_canary(self.store, _measure(self.backbone, self.compute, self.store.spec, [output], pixels))

    @exact_arithmetic()
    def rows(
        self, images: Sequence[EncodedImage], *outputs: Output, check: bool = True
    ) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those
        left out). Several ``outputs`` are vectors, concatenated. ``check``: see there, first."""
        if check:
            self.check(*outputs)
        dtype = self.store.spec.dtype
        shapes = [output_layout(self.backbone, output, dtype).shape for output in outputs]
        shape = shapes[0] if len(shapes) == 1 else (sum(width for (width,) in shapes),)
        images = [read_by(image, self.store.spec.preprocess) for image in images]
        rows, failed, pixels = [torch.empty(0, *shape, dtype=TORCH_DTYPE[dtype])], [], []
        for index, image, _ in decode_many(images.__getitem__, range(len(images)), self.backbone.preprocess, THREADS):
            if isinstance(image, str):
                failed.append((index, image))
            else:
                pixels.append(image)
        prefix, grid = len(self.backbone.prefix), self.backbone.grid
        with exact_arithmetic(self.threads):
            for start in range(0, len(pixels), self.compute.batch_size):
                batch = torch.stack(pixels[start : start + self.compute.batch_size])
                made = {key: part.cpu() for key, part in self.compute(batch, outputs, dtype)[0].items()}
                parts = [derive(o, made[o.source], prefix, grid) if o.is_derived else made[o.source] for o in outputs]
                rows.append(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return torch.cat(rows), failed


def backbone_of(
    like: View, *, device: str = "auto", weights: str | None = None, trust_code: bool = False
) -> StoreBackbone:
    """`StoreBackbone` for the store of ``like``, of which only spec, provenance and path are read: its plan and canary,
    and the store itself, may be gone."""
    spec = ExtractionSpec.from_dict(like.spec)
    store = Store(like.store, spec, spec.fingerprint, like.provenance)
    return StoreBackbone(store, device=device, weights=weights, trust_code=trust_code)


@exact_arithmetic()
def compute(
    images: Sequence[EncodedImage], *, like: View, output: str, device: str = "auto", weights: str | None = None,
    trust_code: bool = False,
) -> tuple[torch.Tensor, list[tuple[int, str]]]:  # fmt: skip
    """The features that ``like``'s store would hold of ``images``: same backbone, precision, batches and rounding.

    Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those left
    out). For the options, and what it raises beside what ``load_backbone`` does, see `StoreBackbone`."""
    return backbone_of(like, device=device, weights=weights, trust_code=trust_code).rows(images, *members(output))
