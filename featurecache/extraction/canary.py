"""The canary: does this machine still compute what a store holds? And its backbone, for new images and damaged rows.

The canary is four small images that every store has computed once and every later run computes again, once for each
state of a machine.

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

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import resources
from typing import Any

import numpy as np
import torch
import xxhash

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone, versions
from featurecache.errors import BadOption, Drift, ForwardUnavailable, NotInCache, UnsafeFile
from featurecache.extraction.forward import ForwardRunner, output_layout, parts_for, pick_device, spec_of
from featurecache.extraction.openvino_graph import graph_is_stored, graph_key, is_user_code
from featurecache.extraction.pipeline import decode_many
from featurecache.files.locks import update_lock
from featurecache.files.machine_state import read_state, state_key, write_state
from featurecache.formatting import timed_part
from featurecache.images.decoding import DECODING
from featurecache.images.headers import EncodedImage, read_by
from featurecache.outputs import Output, derive, members, parse
from featurecache.store.reference import read_reference, reference_hash, write_reference
from featurecache.store.shards import torch_dtype
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store
from featurecache.store.view import View

PROBES = ("photo.jpg", "small.png", "grey16.png", "odd.png")
TOLERANCE = {"fp32": 2e-4, "fp16": 5e-3, "bf16": 3e-2}
FLOAT32_TOLERANCE = 1e-5
THREADS = min(16, os.cpu_count() or 1)  # that decode


@dataclass(frozen=True)
class Reference:
    """What a store's first runs made of the probes."""

    pixels: torch.Tensor  # uint8 [4,3,h,w]
    rows: dict[str, torch.Tensor]  # output -> [4, ...] in the storage dtype
    made_by: dict[str, str]  # library -> version

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in {"pixels": self.pixels, **self.rows}.items()}

    def hash(self) -> str:
        return reference_hash(self.arrays, self.made_by)


def read_canary(store: Store) -> Reference | None:
    """None where the store has none yet. Raises DamagedFile."""
    stored = read_reference(store)
    if stored is None:
        return None
    rows = {name: torch.from_numpy(array) for name, array in stored[0].items()}
    return Reference(rows.pop("pixels"), rows, stored[1])


def write_canary(store: Store, reference: Reference) -> None:
    write_reference(store, reference.arrays, reference.made_by)


@timed_part("canary")
def check_canary(
    store: Store, backbone: Backbone, compute: ForwardRunner | None, outputs: Sequence[Output], *, write: bool = True
) -> None:
    """Compare this machine with the store; keep what the store had no reference for yet (``write``).

    Once for each reference, outputs and state of the machine (versions, processor, threads, batch, forward pass), which
    remembers it; at every run where the backbone is a program of the user's, of which the versions say nothing.
    ``compute=None``: only functions of stored tokens are to be made, so the kept tokens of the probes are enough.
    Raises Drift.
    """
    kept = read_canary(store)
    if kept is None:
        if write and compute is not None:
            _remember(store, backbone, compute, _keep(store, _measure(backbone, compute, store.spec, outputs)))
        return
    names = {output.name for output in (anchor_output(backbone), *outputs)}
    if compute is not None and names <= _agreed(store, backbone, compute, kept):
        return
    if compute is not None:
        now = _measure(backbone, compute, store.spec, outputs, kept.pixels)
        pixels = probe_pixels(backbone)
        shift = int((pixels.int() - kept.pixels.int()).abs().max()) if pixels.shape == kept.pixels.shape else 255
    else:
        now, shift = Reference(kept.pixels, _derived(backbone, outputs, kept.rows), kept.made_by), 0
    both = sorted(now.rows.keys() & kept.rows.keys())
    far = [name for name in both if not is_within_tolerance(store.spec, now.rows[name], kept.rows[name])]
    wrong = {name: relative_distance(now.rows[name], kept.rows[name]) for name in far}
    if shift > 1 or wrong:
        raise Drift(_sentence(store, shift, wrong, kept, now))
    if write and not now.rows.keys() <= kept.rows.keys():
        kept = _keep(store, now)
    if compute is not None:
        _remember(store, backbone, compute, kept, now.rows.keys() & kept.rows.keys())


def _agreement(store: Store, backbone: Backbone, compute: ForwardRunner, kept: Reference) -> str:
    return state_key(
        store=store.fingerprint, reference=kept.hash(), made_by=_made_by(backbone, compute), way=compute.way,
        batch=compute.batch_size, threads=compute.threads, decoding=DECODING, probes=probe_hash(),
    )  # fmt: skip


def _agreed(store: Store, backbone: Backbone, compute: ForwardRunner, kept: Reference) -> set[str]:
    """Outputs of which this machine, as it is, was seen to agree with the reference."""
    record = None if is_user_code(backbone) else read_state("agreed", _agreement(store, backbone, compute, kept))
    return {str(name) for name in (record or {}).get("outputs", ())}


def _remember(
    store: Store, backbone: Backbone, compute: ForwardRunner, kept: Reference, names: Iterable[str] | None = None
) -> None:
    agreed = _agreed(store, backbone, compute, kept) | set(kept.rows if names is None else names)
    write_state("agreed", _agreement(store, backbone, compute, kept), {"outputs": sorted(agreed)})


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


def _keep(store: Store, new: Reference) -> Reference:
    """Add to the store's reference, which is returned; of two runs at once the first one's rows stay."""
    with update_lock(store.path):
        kept = read_canary(store)
        if kept is not None and new.rows.keys() <= kept.rows.keys():
            return kept
        merged = Reference(kept.pixels, {**new.rows, **kept.rows}, kept.made_by) if kept else new
        write_canary(store, merged)
        return merged


def anchor_output(backbone: Backbone) -> Output:
    """What every reference has: the tokens, or the vector where there are none."""
    return parse("tokens" if "tokens" not in backbone.refusals else backbone.vector)


def _measure(
    backbone: Backbone, compute: ForwardRunner, spec: ExtractionSpec, outputs: Sequence[Output],
    pixels: torch.Tensor | None = None,
) -> Reference:  # fmt: skip
    """What this machine makes of the probes: the anchor and ``outputs``."""
    pixels = probe_pixels(backbone) if pixels is None else pixels
    wanted = tuple(dict.fromkeys([anchor_output(backbone), *outputs]))
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(pixels), compute.batch_size):
        rows, _ = compute(pixels[start : start + compute.batch_size], wanted, spec.dtype, whole=False)
        for source, tensor in rows.items():
            parts.setdefault(source, []).append(tensor.cpu())
    made = {source: torch.cat(tensors) for source, tensors in parts.items()}
    return Reference(pixels, {**made, **_derived(backbone, wanted, made)}, _made_by(backbone, compute))


def _made_by(backbone: Backbone, compute: ForwardRunner) -> dict[str, str]:
    more = ["timm"] * (backbone.architecture["library"] == "timm") + ["openvino"] * (compute.way == "openvino")
    device = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else compute.device.type
    return {**versions("torchvision", "transformers", "numpy", "pillow", *more), "device": device}


def _derived(backbone: Backbone, outputs: Sequence[Output], rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen = [output for output in outputs if output.is_derived and output.source in rows]
    return {o.name: derive(o, rows[o.source], len(backbone.prefix), backbone.grid) for o in chosen}


def probe_pixels(backbone: Backbone) -> torch.Tensor:
    """uint8 [4,3,h,w]: the probes as the network sees them."""
    images = decode_many(probes().__getitem__, range(len(PROBES)), backbone.preprocess, 1)
    return torch.stack([pixels for _, pixels, _ in images if isinstance(pixels, torch.Tensor)])


@lru_cache(maxsize=1)
def probes() -> tuple[bytes, ...]:
    folder = resources.files("featurecache") / "probes"
    return tuple((folder / name).read_bytes() for name in PROBES)


@lru_cache(maxsize=1)
def probe_hash() -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(probes()))


def load_stored_backbone(store: Store, request: dict[str, Any]) -> Backbone:
    """Raises NotInCache when the backbone that is found is not the one of the store."""
    backbone = load_backbone(**request, remembered=True)
    spec = spec_of(backbone, store.spec.precision, store.spec.dtype, store.spec.preprocess)
    spec = replace(spec, generation=store.spec.generation)
    if spec.fingerprint != store.fingerprint:
        raise NotInCache(
            f"{backbone.name} as it is now ({spec.fingerprint[:8]}) is not the backbone that "
            f"{store.path.name} was made with: its weights, configuration or preprocessing changed. "
            "featurecache why says what; extract again, then train."
        )
    return backbone


class StoreBackbone:
    """Makes of new images what a store would hold of them.

    ``exact``: in the store's own way also where its graph has to be converted or its network compiled first, which
    takes seconds or a minute; otherwise the library's may serve. ``weights``: where they are now, if not where they
    were. ``trust_code``: run the module of a ``python:`` backbone that the store's record names. Raises NotInCache when
    the backbone that is found is not the one of the store, Drift when this machine makes something else of the probe
    images.
    """

    @exact_arithmetic()
    def __init__(
        self, store: Store, *, device: str = "auto", weights: str | None = None, trust_code: bool = False,
        exact: bool = False,
    ) -> None:  # fmt: skip
        if "request" not in store.provenance:
            raise NotInCache(f"{store.path.name} was imported: nobody knows which backbone makes such features.")
        request = {**store.provenance["request"], **({"weights": weights} if weights else {})}
        if str(request.get("name", "")).startswith("python:") and not trust_code:
            raise UnsafeFile(
                f"{store.path.name} was made by {request['name']}, which is a program. Run it with --trust-code if the "
                "module of that name in this folder is yours."
            )
        self.store, self.backbone = store, load_stored_backbone(store, request)
        picked = pick_device(device)
        plan = (store.plan or {}).get(picked.type) or {"batch_size": 8, "threads": torch.get_num_threads()}
        self.threads: int = plan["threads"]
        self.compute = self._runner(plan, picked, exact)
        self._checked: set[Output] = set()

    def _runner(self, plan: dict[str, Any], device: torch.device, exact: bool) -> ForwardRunner:
        """As the store computes, where that can be had; what is converted or compiled first only if ``exact``."""
        parts = plan.get("parts") or sorted(parts_for([anchor_output(self.backbone)]))
        precision = self.store.spec.precision
        make = partial(ForwardRunner, self.backbone, precision, device, plan["batch_size"], threads=plan["threads"])
        way = plan.get("forward", "library")
        is_ready = way == "openvino" and graph_is_stored(graph_key(self.backbone, parts))
        if exact or is_ready or way not in ("openvino", "compiled"):
            with contextlib.suppress(ForwardUnavailable):  # the probe images decide about another way
                return make(way=way, parts=parts)
        return make()

    def check(self, *outputs: Output) -> None:
        """Compare this machine with the store's reference, once. Raises Drift."""
        if new := set(outputs) - self._checked:
            with exact_arithmetic(self.threads):
                check_canary(self.store, self.backbone, self.compute, [o for o in outputs if o in new], write=False)
            self._checked |= new

    def renew_canary(self, output: Output) -> None:
        """Replace a reference that is damaged by what this machine makes; there is no moment without one."""
        with exact_arithmetic(self.threads), update_lock(self.store.path):
            pixels = probe_pixels(self.backbone)
            write_canary(self.store, _measure(self.backbone, self.compute, self.store.spec, [output], pixels))

    @timed_part("compute")
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
        rows, failed, pixels = [torch.empty(0, *shape, dtype=torch_dtype(dtype))], [], []
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
    if wrong := [type(each).__name__ for each in images if not isinstance(each, EncodedImage)]:
        raise BadOption(f"an image is {wrong[0]}; expected encoded bytes, or arrays uint8 [H, W] or [H, W, 3].")
    return backbone_of(like, device=device, weights=weights, trust_code=trust_code).rows(images, *members(output))
