"""The backbone of a store, loaded again: new images through it for `predict`, damaged rows for `repair`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import NotInCache, UnreadableImage, UnsafeFile
from featurecache.extraction import canary
from featurecache.extraction.pipeline import ForwardRunner, exact_arithmetic, output_layout, pick_device, spec_of
from featurecache.images import decoding as _images
from featurecache.images.headers import EncodedImage
from featurecache.outputs import Output, derive, parse
from featurecache.store.shards import TORCH_DTYPE
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import Store
from featurecache.store.view import View


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
        self._threads: int = plan["threads"]
        self._compute = ForwardRunner(self.backbone, spec.precision, picked, plan["batch_size"])
        self._checked: set[Output] = set()

    def rows(
        self,
        images: Sequence[EncodedImage],
        output: Output,
        *,
        places: Sequence[int] | None = None,
        check: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, str]]]:
        """Encoded bytes or arrays uint8 [H,W] / [H,W,3] → ([n, ...] in the storage dtype, relative errors of rounding
        [n], NaN where not measured, [(index, reason)] of those left out). ``check``: against the canary first.
        ``places`` [n], ascending: the rows that the images have in a shard. They get the same place in their batch,
        which to a matrix product of a small network can make a difference in the last bit."""
        with exact_arithmetic(self._threads):
            if check and output not in self._checked:
                canary.check(self.store, self.backbone, self._compute, [output], write=False)
                self._checked.add(output)
            return self._rows(images, output, range(len(images)) if places is None else places)

    def renew_canary(self, output: Output) -> None:
        """What this machine makes of the probe images in the place of a reference that is damaged."""
        with exact_arithmetic(self._threads):
            canary.rewrite_canary(self.store, self.backbone, self._compute, [output])

    def _rows(
        self, images: Sequence[EncodedImage], output: Output, places: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, str]]]:
        ready, failed = _decode_some(images, self.backbone)
        shape, dtype = output_layout(self.backbone, output, self.store.spec.dtype).row_shape, self.store.spec.dtype
        rows, errors = [torch.empty(0, *shape, dtype=TORCH_DTYPE[dtype])], [torch.empty(0)]
        for batch, chosen in self._batches([(places[index], pixels) for index, pixels in ready]):
            made, measured = self._compute(batch, [output], dtype)
            tokens = made[output.source].cpu()[chosen]
            prefix, grid = len(self.backbone.prefix), self.backbone.grid
            rows.append(derive(output, tokens, prefix, grid) if output.derived else tokens)
            errors.append(measured[output.name].cpu()[chosen] if measured else torch.full((len(chosen),), float("nan")))
        return torch.cat(rows), torch.cat(errors), failed

    def _batches(self, ready: list[tuple[int, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """(uint8 images [B,3,h,w], which rows of it count): every image at its own place, black ones between."""
        size = self._compute.batch_size
        batch: dict[int, torch.Tensor] = {}
        for number, (place, pixels) in enumerate(ready):
            batch[place % size] = pixels
            following = ready[number + 1][0] % size if number + 1 < len(ready) else None
            if following is None or following <= max(batch):
                images = torch.zeros(size, *pixels.shape, dtype=torch.uint8)
                for row, image in batch.items():
                    images[row] = image
                yield images, sorted(batch)
                batch = {}


def backbone_of(
    like: View, *, device: str = "auto", weights: str | None = None, trust_code: bool = False
) -> StoreBackbone:
    """`Again` for the store of ``like``, of which only spec, provenance and path are asked: its plan and canary,
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
    out). For the other arguments and what is raised see `Again`.
    """
    found = backbone_of(like, device=device, weights=weights, trust_code=trust_code)
    rows, _, failed = found.rows(images, parse(output))
    return rows, failed


def _decode_some(
    images: Sequence[EncodedImage], backbone: Backbone
) -> tuple[list[tuple[int, torch.Tensor]], list[tuple[int, str]]]:
    ready, failed = [], []
    for index, data in enumerate(images):
        try:
            ready.append((index, backbone.preprocess.resized(_images.decode(data))))
        except UnreadableImage as error:
            failed.append((index, str(error)))
    return ready, failed
