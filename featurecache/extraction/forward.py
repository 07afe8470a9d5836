"""Forward passes of a backbone as a store makes them: device, precision, batches of B rows, shapes of outputs.

A pass has B rows: a short batch is padded and the padding dropped, since another number of rows may give other bits.
(A graph of OpenVINO gives the same ones, and a network on a CPU often does; where that is seen on this machine, nothing
is padded.) What stands in the other rows makes no difference; the place in the batch can: a matrix product of MKL that
is not a whole number of blocks of rows gives the last ones of each thread to a kernel which adds in another order
(measured with AVX2 instructions and any number of threads; none with AVX-512). `ForwardRunner` computes,
`output_layout` says what the rows of an output look like, `spec_of` what they are a function of.

A network runs in one of four ways: ``library``, its library's own forward; ``onednn``, the same with float32 products
by oneDNN; ``compiled``, made into kernels of its own for B images by torch.compile; ``openvino``, a graph of OpenVINO.
Which is fastest is measured (`featurecache.extraction.choose_forward`).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from featurecache.arithmetic import onednn_gain, onednn_products
from featurecache.backbones import load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import BadOption, ForwardUnavailable
from featurecache.extraction.openvino_graph import OpenvinoGraph, compile_graph, is_user_code, pass_key
from featurecache.files.machine_state import read_state, state_key, write_state
from featurecache.images import decoding as _images
from featurecache.images.headers import READING
from featurecache.outputs import Output, blocks, function_of, source_parts
from featurecache.store.shards import Layout, torch_dtype
from featurecache.store.spec import ExtractionSpec

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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device; MPS and the CPU have no class of their own for it."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class ForwardRunner:
    """A backbone on a device, in one precision, in batches of ``batch_size`` rows or fewer, in one way.

    ``parts``: what the backbone's wrapper will be asked for, for ``openvino`` in one graph; others than these make
    another graph. Raises ForwardUnavailable. ``release`` frees the weights that the way does not need.
    """

    def __init__(
        self, backbone: Backbone, precision: str, device: torch.device, batch_size: int, way: str = "library",
        parts: Iterable[str] = (), threads: int = 1,
    ) -> None:  # fmt: skip
        self.device, self.batch_size, self.way, self.threads = device, batch_size, way, threads
        self.backbone = self._own = backbone
        self.parts = tuple(parts)
        self._precision, self._dtype = precision, _PRECISION[precision]
        self._format = torch.channels_last if backbone.channels_last else torch.contiguous_format
        self._done: list[tuple[torch.Tensor, dict[str, torch.Tensor], float]] = []
        self.rows = batch_size  # of the last call's pass
        self.earlier_s: float | None = None  # what that took, where it had been computed before
        self._graph: OpenvinoGraph | None = None
        self._last: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []  # the last whole batch on a CPU, if any
        self._independent: dict[str, bool] = {}  # of passes of few images: whether these have a batch's bits
        if way == "openvino":
            self._compile(set(parts))
            return
        if way == "onednn" and not onednn_gain():
            raise ForwardUnavailable("float32 products by oneDNN are none on this CPU, which computes them in bfloat16")
        if self._dtype != torch.float32:  # in a network of its own: others compare with float32
            self._own = _copy_of(backbone)
        self._own.model.to(device=device, dtype=self._dtype)
        if backbone.channels_last:
            self._own.model.to(memory_format=torch.channels_last)
        self._network: Callable[..., dict[str, torch.Tensor]] = self._own.forward
        if way == "compiled":
            self._network = torch.compile(self._own.model, dynamic=False)
            self._compile_kernels()

    def _compile_kernels(self) -> None:
        """A first pass, which takes a minute and needs a C compiler. Raises ForwardUnavailable."""
        try:
            self.parts_of(torch.zeros(self.batch_size, 3, *self.backbone.image_size, dtype=torch.uint8), set())
        except Exception as error:  # whatever torch, a compiler or a driver raises
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ForwardUnavailable(f"torch.compile cannot compile {self.backbone.name}: {why}") from error

    def _graph_of(self, parts: set[str]) -> OpenvinoGraph:
        return self._graph if self._graph and parts <= set(self._graph.parts) else self._compile(parts)

    def _compile(self, parts: set[str]) -> OpenvinoGraph:
        network = vars(self.backbone).get("model")  # which a remembered backbone may not have loaded
        if network is not None and next(network.parameters()).is_meta:  # released: another process wants more
            self.backbone = load_backbone(**self.backbone.provenance["request"])
        self._graph = compile_graph(self.backbone, sorted(parts), self.batch_size, self._precision, self.threads)
        return self._graph

    def release(self) -> None:
        """Free the weights that this way does not use: torch's, where a graph has its own; float32, where they were
        cast. Nothing else can be computed with the backbone afterwards."""
        if "model" in vars(self.backbone) and (self._graph is not None or self._own is not self.backbone):
            self.backbone.model.to("meta")

    @torch.no_grad()
    def parts_of(self, images: torch.Tensor, parts: set[str]) -> dict[str, torch.Tensor]:
        """uint8 images [b,3,h,w] → {part: [b, ...]} as the network gives them, on the device; b ≤ B. Rows that are
        stored come from whole batches where that decides their bits (`__call__`)."""
        if self.way == "openvino":
            return self._graph_of(parts)(self._pixels(images))
        count = len(images)
        if self.way == "compiled":  # kernels are made for B images, and for all parts that will be asked for
            images, parts = self._padded(images, slice(count)), {*parts, *self.parts}
        pixels = self._pixels(images).to(self._dtype).contiguous(memory_format=self._format)
        with onednn_products() if self.way == "onednn" else contextlib.nullcontext():
            return {part: rows[:count] for part, rows in self._network(pixels, parts).items()}

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            images = images.pin_memory()  # else the copy would hold up this thread
        return self.backbone.preprocess.normalised(images.to(self.device, non_blocking=True))

    def _needs_whole(self, images: torch.Tensor, parts: set[str], places: Sequence[int] | None) -> bool:
        """Whether the rows of these images may have other bits in a batch of their own than in one of B. Looked at once
        on this machine: for a graph, of any number of images at any places; for a network on a CPU, of so many in the
        first places, where a look costs no more than padding does."""
        looked_at, first = len(images), not places or places[-1] < len(images)
        plain = self.device.type == "cpu" and self.way != "compiled" and not is_user_code(self.backbone)
        if self.way == "openvino":
            parts, looked_at = set(self._graph_of(parts).parts), 0
        elif not (plain and first and 2 * looked_at <= self.batch_size):
            return True
        of = pass_key(self.backbone, sorted(parts), self._precision, self.batch_size, self.threads)
        key = state_key(of=of, way=self.way, images=looked_at)
        if key not in self._independent:
            if (seen := read_state("rows", key)) is None:
                seen = {"independent": self._rows_are_independent(images, parts, looked_at or 3)}
                write_state("rows", key, seen)
            self._independent[key] = seen["independent"] is True
        return not self._independent[key]

    def _rows_are_independent(self, images: torch.Tensor, parts: set[str], count: int) -> bool:
        """Whether ``count`` images alone have the bits that they have in a batch: of those computed before, else of
        these, padded, of which what will be asked for is kept."""
        batches = [(batch, given) for batch, given, _ in self._done] + self._last
        for batch, given in batches:
            if len(batch) == self.batch_size and parts <= given.keys():
                return _have_equal(self.parts_of(batch[:count], parts), given, count)
        padded, start = self._padded(images, slice(len(images))), time.perf_counter()
        among, middle = self.parts_of(padded, parts), time.perf_counter()
        alone, end = self.parts_of(images, parts), time.perf_counter()
        independent = _have_equal(alone, among, len(images))
        self.remember(*((images, alone, end - middle) if independent else (padded, among, middle - start)))
        return independent

    def _padded(self, images: torch.Tensor, places: slice | list[int]) -> torch.Tensor:
        batch = images.new_zeros(self.batch_size, *images.shape[1:])
        batch[places] = images
        return batch

    def remember(self, images: torch.Tensor, given: dict[str, torch.Tensor], seconds: float) -> None:
        """Keep what `parts_of` gave of a batch until it is computed in earnest: what was measured is work done."""
        self._done.append((images, given, seconds))

    def _computed(self, images: torch.Tensor, parts: set[str]) -> dict[str, torch.Tensor]:
        self.earlier_s = None
        for k, (batch, given, seconds) in enumerate(self._done):
            if parts <= given.keys() and torch.equal(batch, images):
                self.earlier_s = seconds
                del self._done[k]
                return given
        return self.parts_of(images, parts)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        outputs: Sequence[Output],
        dtype: str,
        places: Sequence[int] | None = None,
        *,
        whole: bool = True,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """uint8 images [b,3,h,w], b ≤ B, to what ``outputs`` are made of, on the device. ``places`` [b]: the rows of
        the batch that they take, distinct and ascending; the first ones if not given. Not ``whole``: a batch of b, for
        what is compared within a tolerance.

        Returns rows [b, ...] in the storage dtype for each source and, where that is float16, for each output what
        rounding did to it: |stored − float32|₂ / |float32|₂, float32 [b].
        """
        chosen: slice | list[int] = slice(None)
        wanted = parts_for(outputs)
        if whole and len(images) < self.batch_size and self._needs_whole(images, wanted, places):
            chosen = list(range(len(images)) if places is None else places)
            images = self._padded(images, chosen)
        sources = {output.source: source_parts(output.source) for output in outputs}
        given, self.rows = self._computed(images, wanted), len(images)
        if self.rows == self.batch_size and self.device.type == "cpu":
            self._last = [(images, given)]
        exact = {key: torch.cat([given[part][chosen].float() for part in parts], -1) for key, parts in sources.items()}
        rows = {key: tensor.to(torch_dtype(dtype)) for key, tensor in exact.items()}
        if dtype != "float16":
            return rows, {}
        return rows, {o.name: self._rounding(o, exact[o.source], rows[o.source]) for o in outputs}

    def _rounding(self, output: Output, exact: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Relative error [b] of an output as it is stored, against the one that would be without any rounding."""
        rounded = stored.float()
        if output.is_derived:
            prefix, grid = len(self.backbone.prefix), self.backbone.grid
            exact = function_of(output, exact, prefix, grid)
            rounded = function_of(output, rounded, prefix, grid).to(stored.dtype).float()
        size = exact.flatten(1).norm(dim=1)
        return (rounded - exact).flatten(1).norm(dim=1) / size.clamp_min(torch.finfo(torch.float32).tiny)


def _copy_of(backbone: Backbone) -> Backbone:
    """With a network of its own. Somebody's program is asked for another: hooks of a copy may write to the original."""
    if is_user_code(backbone):
        return load_backbone(**backbone.provenance["request"])
    return replace(backbone, model=copy.deepcopy(backbone.model))


def _have_equal(few: dict[str, torch.Tensor], among: dict[str, torch.Tensor], count: int) -> bool:
    return all(torch.equal(rows, among[part][:count]) for part, rows in few.items())


class HostCopies:
    """Rows of a batch on their way from the device, of a GPU of NVIDIA on a stream of their own into pinned memory: the
    next batch is computed meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, tensors: dict[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
        """What waits for the copies and gives them; to be called once, in any thread."""
        if self._stream is None:
            return lambda: {name: tensor.cpu() for name, tensor in tensors.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
            for tensor in tensors.values():
                if tensor.is_cuda:  # else it was measured, and came to the host then
                    tensor.record_stream(self._stream)  # its memory serves no other tensor before it was read
            copied = self._stream.record_event()

        def wait() -> dict[str, torch.Tensor]:
            copied.synchronize()
            return copies

        return wait


def parts_for(outputs: Iterable[Output]) -> set[str]:
    """What the backbone's wrapper is asked for, of which the outputs are made."""
    return {part for output in outputs for part in source_parts(output.source)}


def output_layout(backbone: Backbone, output: Output, dtype: str) -> Layout:
    """Shape and dtype of an output's rows. Raises OutputRefused where the backbone has none."""
    backbone.offers(output.base if not output.layer else f"{output.base.split('-')[0]}@{output.layer}")
    length = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    shape = output.row_shape((length, backbone.width * len(blocks(output.layer))), len(backbone.prefix))
    prefix, grid = output.layout(backbone.prefix, backbone.grid) or (None, None)
    return Layout(output.name, shape, dtype, prefix, grid)


def spec_of(backbone: Backbone, precision: str, dtype: str, reading: Mapping[str, Any] | None = None) -> ExtractionSpec:
    """``reading``: a `reading_record`, or what has one in it."""
    said = {name: value for name, value in (reading or {}).items() if name in READING}
    preprocess = backbone.preprocess.to_dict() | said | {"decoding": _images.DECODING}
    return ExtractionSpec(
        backbone.architecture, backbone.weights, preprocess, backbone.image_size, backbone.position_embeddings,
        precision, dtype,
    )  # fmt: skip
