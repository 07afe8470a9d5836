"""Forward passes as a store makes them: one device, one precision, batches of exactly B rows; and what they give."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from featurecache import images as _images
from featurecache.backbones import Backbone, load_backbone
from featurecache.errors import BadOption, NotInCache, UnreadableImage
from featurecache.outputs import Output, blocks, derive, parse
from featurecache.reader import View
from featurecache.shards import TORCH_DTYPE, Layout
from featurecache.spec import ExtractionSpec
from featurecache.stores import Store

_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """``auto``: CUDA, then MPS, then CPU."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadOption(f'no device "{device}" on this machine. --device auto takes what is there.') from error
    return picked


@contextlib.contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """No TF32, no autotuned kernels, a fixed number of CPU threads; the caller's settings come back afterwards."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])


class Compute:
    """A backbone on a device, in one precision, in batches of exactly ``batch_size`` rows."""

    def __init__(self, backbone: Backbone, precision: str, device: torch.device, batch_size: int) -> None:
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        self._dtype = _PRECISION[precision]
        self._format = torch.channels_last if backbone.channels_last else torch.contiguous_format
        backbone.model.to(device=device, dtype=self._dtype)
        if backbone.channels_last:
            backbone.model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, sources: set[str], dtype: str) -> dict[str, torch.Tensor]:
        """uint8 images [b,3,h,w], b ≤ B, to rows [b, ...] in the storage dtype, on the device, for each source."""
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        pixels = self.backbone.preprocess.normalised(images.to(self.device, non_blocking=True))
        wanted = {part for source in sources for part in _parts(source)}
        found = self.backbone.forward(pixels.to(self._dtype).contiguous(memory_format=self._format), wanted)
        rows = {source: [found[part][:count].float() for part in _parts(source)] for source in sources}
        return {key: torch.cat(parts, -1).to(TORCH_DTYPE[dtype]) for key, parts in rows.items()}

    def seconds_per_batch(self, sources: set[str]) -> float:
        """A short probe: the second of two passes over black images."""
        images = torch.zeros(self.batch_size, 3, *self.backbone.image_size, dtype=torch.uint8)
        for _ in range(2):
            start = time.perf_counter()
            for rows in self(images, sources, "float32").values():
                rows.cpu()
        return time.perf_counter() - start


def _parts(source: str) -> list[str]:
    """ "tokens@last2" → ["tokens@-2", "tokens"]: what the backbone gives, to be concatenated."""
    base, _, layer = source.partition("@")
    return [f"{base}@{part}" if part else base for part in blocks(layer)]


def layout_of(backbone: Backbone, output: Output, dtype: str) -> Layout:
    """Shape and dtype of an output's rows. Raises OutputRefused where the backbone has none."""
    backbone.offers(output.base if not output.layer else f"{output.base.split('-')[0]}@{output.layer}")
    length = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    width = backbone.width * len(blocks(output.layer))
    shape = output.row_shape((length, width), len(backbone.prefix))
    prefix, grid = output.layout(backbone.prefix, backbone.grid) or (None, None)
    return Layout(output.name, shape, dtype, prefix, grid)


def source_layout(backbone: Backbone, output: Output, dtype: str) -> Layout:
    """The layout of the tokens an output is derived from."""
    return layout_of(backbone, parse(output.source), dtype)


def spec_of(backbone: Backbone, precision: str, dtype: str) -> ExtractionSpec:
    preprocess = {**backbone.preprocess.to_dict(), "decoding": _images.DECODING}
    return ExtractionSpec(
        backbone.architecture, backbone.weights, preprocess, backbone.image_size, backbone.position_embeddings,
        precision, dtype,
    )  # fmt: skip


def compute(
    images: Sequence[bytes | np.ndarray], *, like: View, output: str, device: str = "auto", weights: str | None = None
) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """The features that ``like``'s store would hold of ``images``: same backbone, precision, batches and rounding.

    Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those left
    out). ``weights``: where they are now, if not where they were. Raises NotInCache when the backbone that is found is
    not the one of the store.
    """
    spec = ExtractionSpec.from_dict(like.spec)
    backbone = load_backbone(**{**like.provenance["request"], **({"weights": weights} if weights else {})})
    found = replace(spec_of(backbone, spec.precision, spec.dtype), generation=spec.generation)
    if found.fingerprint != spec.fingerprint:
        raise NotInCache(
            f"{backbone.name} as it is now ({found.fingerprint[:8]}) is not the backbone that {like.label} was made "
            f"with ({spec.fingerprint[:8]}): its weights, configuration or preprocessing changed. "
            "Extract again, then train."
        )
    kind, picked = parse(output), pick_device(device)
    store_plan = Store(like.store, spec, spec.fingerprint, like.provenance).plan or {}
    plan = store_plan.get(picked.type) or {"batch_size": 8, "threads": torch.get_num_threads()}
    run = Compute(backbone, spec.precision, picked, plan["batch_size"])
    ready, failed = _decode_some(images, backbone)
    shape = layout_of(backbone, kind, spec.dtype).row_shape
    rows = [torch.empty(0, *shape, dtype=getattr(torch, spec.dtype))]
    with exact_arithmetic(plan["threads"]):
        for start in range(0, len(ready), run.batch_size):
            batch = torch.stack(ready[start : start + run.batch_size])
            tokens = run(batch, {kind.source}, spec.dtype)[kind.source].cpu()
            rows.append(derive(kind, tokens, len(backbone.prefix), backbone.grid) if kind.derived else tokens)
    return torch.cat(rows), failed


def _decode_some(
    images: Sequence[bytes | np.ndarray], backbone: Backbone
) -> tuple[list[torch.Tensor], list[tuple[int, str]]]:
    ready, failed = [], []
    for index, data in enumerate(images):
        try:
            ready.append(backbone.preprocess.resized(_images.decode(data)))
        except UnreadableImage as error:
            failed.append((index, str(error)))
    return ready, failed
