"""The backbone of a store, loaded again: new images through it for `predict`, damaged rows for `repair`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from featurecache.backbones import load_backbone
from featurecache.errors import NotInCache, UnsafeFile
from featurecache.extraction import canary
from featurecache.extraction.forward import ForwardRunner, exact_arithmetic, output_layout, pick_device, spec_of
from featurecache.extraction.pipeline import decode_many
from featurecache.images.headers import EncodedImage
from featurecache.outputs import Output, derive, parse
from featurecache.store.shards import TORCH_DTYPE
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store
from featurecache.store.view import View

THREADS = min(16, os.cpu_count() or 1)  # that decode


class StoreBackbone:
    """Makes of new images what a store would hold of them.

    ``weights``: where they are now, if not where they were. ``trust_code``: run the module of a ``python:`` backbone
    that the store's record names. Raises NotInCache when the backbone that is found is not the one of the store, Drift
    when this machine makes something else of the probe images.
    """

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
        spec = replace(spec_of(self.backbone, store.spec.precision, store.spec.dtype), generation=store.spec.generation)
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

    def check(self, output: Output) -> None:
        """Compare this machine with the store's reference, once. Raises Drift."""
        if output not in self._checked:
            with exact_arithmetic(self.threads):
                canary.check_canary(self.store, self.backbone, self.compute, [output], write=False)
            self._checked.add(output)

    def renew_canary(self, output: Output) -> None:
        """What this machine makes of the probe images in the place of a reference that is damaged."""
        with exact_arithmetic(self.threads):
            canary.rewrite_canary(self.store, self.backbone, self.compute, [output])

    def rows(
        self, images: Sequence[EncodedImage], output: Output, *, check: bool = True
    ) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those
        left out). ``check``: see there, first."""
        if check:
            self.check(output)
        shape, dtype = output_layout(self.backbone, output, self.store.spec.dtype).shape, self.store.spec.dtype
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
                made = self.compute(batch, [output], dtype)[0][output.source].cpu()
                rows.append(derive(output, made, prefix, grid) if output.is_derived else made)
        return torch.cat(rows), failed


def backbone_of(
    like: View, *, device: str = "auto", weights: str | None = None, trust_code: bool = False
) -> StoreBackbone:
    """`StoreBackbone` for the store of ``like``, of which only spec, provenance and path are read: its plan and canary,
    and the store itself, may be gone."""
    spec = ExtractionSpec.from_dict(like.spec)
    store = Store(like.store, spec, spec.fingerprint, like.provenance)
    return StoreBackbone(store, device=device, weights=weights, trust_code=trust_code)


def compute(
    images: Sequence[EncodedImage], *, like: View, output: str, device: str = "auto", weights: str | None = None,
    trust_code: bool = False,
) -> tuple[torch.Tensor, list[tuple[int, str]]]:  # fmt: skip
    """The features that ``like``'s store would hold of ``images``: same backbone, precision, batches and rounding.

    Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, [(index, reason)] of those left
    out). ``weights``: where the backbone's are now, if not where they were;
    ``trust_code``: run the module of a ``python:`` backbone. Raises what ``featurecache.load_backbone`` raises.
    """
    return backbone_of(like, device=device, weights=weights, trust_code=trust_code).rows(images, parse(output))
