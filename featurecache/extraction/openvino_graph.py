"""OpenVINO graphs of a backbone: its torch module converted once for batches of any size, compiled for this CPU.

The CPU plugin of OpenVINO runs the same network with oneDNN's kernels and fused operations. A graph gives every part
that an extraction needs in one pass; a batch is cut into runs of images that streams of threads compute side by side,
which wait for each other once a batch and not once a layer. Conversion takes seconds, so the graph is kept in the
machine's state folder under weights, shape, parts and versions; one that is damaged there is made again. The precision
is always given when it is compiled: without, the plugin may choose bfloat16 by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featurecache.backbones.base import Backbone
from featurecache.errors import CacheError, CannotWrite, ForwardUnavailable
from featurecache.files.atomic import atomic_folder, hash_file
from featurecache.files.machine_state import read_state, state_folder, state_key, write_state

MOST_BYTES = 8 << 30  # of all graphs in the state folder; the oldest go
STREAM = 4  # images of a stream at least
ISA = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")  # variables that take kernels away
HINT = {"fp32": "f32", "bf16": "bf16"}


def has_openvino() -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(version("openvino"))
    return False


def import_openvino() -> Any:
    """The module, without its telemetry: it reports to Google Analytics at import and at conversion unless its
    ``openvino_telemetry`` cannot be imported, for which it has a stub. Raises ForwardUnavailable."""
    if "openvino.tools.ovc" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
        import openvino.tools.ovc
    except ImportError as error:
        raise ForwardUnavailable(f"OpenVINO cannot be used here ({error}): pip install openvino") from error
    return openvino


class _Parts(nn.Module):
    """A backbone's wrapper as conversion wants it: pixels [B,C,h,w] → a tuple of tensors."""

    def __init__(self, model: nn.Module, parts: Sequence[str]) -> None:
        super().__init__()
        self.model, self.parts = model, tuple(parts)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = self.model(pixels, set(self.parts))
        return tuple(given[part] for part in self.parts)


class OpenvinoGraph:
    """A compiled graph: normalised float32 pixels [b,C,h,w], any b → {part: float32 [b, ...]}. ``streams``: how many
    runs of images are computed at once."""

    def __init__(self, compiled: Any, parts: Sequence[str], streams: int) -> None:
        self._requests, self.parts = [compiled.create_infer_request() for _ in range(streams)], tuple(parts)

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        tensor = import_openvino().Tensor
        images = np.array_split(pixels.contiguous().numpy(), min(len(self._requests), len(pixels)))
        running = list(zip(self._requests, images, strict=False))
        try:
            for request, part in running:
                request.set_input_tensor(tensor(part, shared_memory=True))
                request.start_async()
            for request, _ in running:
                request.wait()
        except BaseException:  # Ctrl-C: those that run read the pixels still, and take no others
            for request, _ in running:
                request.wait()
            raise
        rows = zip(*([tensor.data for tensor in request.output_tensors] for request, _ in running), strict=True)
        return {part: torch.from_numpy(np.concatenate(each)) for part, each in zip(self.parts, rows, strict=True)}


def _shape(backbone: Backbone, batch: int) -> tuple[int, int, int, int]:
    return (batch, backbone.preprocess.channels, *backbone.image_size)


def graph_key(backbone: Backbone, parts: Sequence[str]) -> str:
    return state_key(
        weights=backbone.weights, architecture=backbone.architecture, shape=_shape(backbone, -1),
        positions=backbone.position_embeddings, parts=list(parts), versions=_graph_versions(backbone),
    )  # fmt: skip


def pass_key(backbone: Backbone, parts: Sequence[str], precision: str, batch: int, threads: int) -> str:
    """Of what was measured of a forward pass, by the kernels that may be used."""
    kernels = [torch.backends.cpu.get_cpu_capability(), *map(os.environ.get, ISA)]
    return state_key(graph=graph_key(backbone, parts), how=[precision, batch, threads, *kernels])


def _graph_versions(backbone: Backbone) -> dict[str, str]:
    library = backbone.architecture["library"]
    libraries = ["torch", *["openvino"] * has_openvino()]
    return {name: version(name) for name in [*libraries, *{library} & {"timm", "transformers", "torchvision"}]}


def is_user_code(backbone: Backbone) -> bool:
    """Whether its forward is somebody's own program, which may branch on its data: a conversion would not see that."""
    return str(backbone.provenance.get("request", {}).get("name", "")).startswith("python:")


def graph_is_stored(key: str) -> bool:
    return read_state("graphs", key) is not None


def compile_graph(backbone: Backbone, parts: Sequence[str], batch: int, precision: str, threads: int) -> OpenvinoGraph:
    """The graph of ``parts``, from the state folder or converted, for batches of about ``batch`` images. Raises
    ForwardUnavailable, which says why."""
    openvino, parts = import_openvino(), sorted(parts)
    if precision not in HINT:
        raise ForwardUnavailable(f"OpenVINO computes in fp32 and bf16, not {precision}")
    key, streams = graph_key(backbone, parts), max(1, min(threads, batch // STREAM))
    settings = {
        "INFERENCE_PRECISION_HINT": HINT[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams,
    }  # fmt: skip
    try:
        graph = None if is_user_code(backbone) else _stored_graph(key)
        graph = graph or _converted(openvino, backbone, parts, key)
        return OpenvinoGraph(openvino.Core().compile_model(graph, "CPU", settings), parts, streams)
    except Exception as error:  # whatever a converter of networks raises
        reason = " ".join(str(error).split())[:200]
        raise ForwardUnavailable(f"OpenVINO cannot convert {backbone.name}: {reason}") from error


def _stored_graph(key: str) -> str | None:
    """The .xml of an intact graph."""
    record, folder = read_state("graphs", key), state_folder()
    if record is None or folder is None:
        return None
    path = folder / "graphs" / key / "graph.xml"
    with contextlib.suppress(OSError, CacheError):
        if {name: hash_file(path.with_name(name)) for name in ("graph.xml", "graph.bin")} == record:
            os.utime(path)  # the oldest go first
            return str(path)
    return None


def _converted(openvino: Any, backbone: Backbone, parts: Sequence[str], key: str) -> Any:
    """The graph for any number of images, and a copy of it in the state folder where there is room for one."""
    network, example = _Parts(backbone.model, parts).eval(), torch.zeros(_shape(backbone, 2))
    with _quiet(), torch.no_grad():  # traced here: the converter would run the network five times more to check
        traced = torch.jit.trace(network, example, check_trace=False, strict=False)
        graph = openvino.convert_model(traced, example_input=example, input=[_shape(backbone, -1)])
    if (folder := state_folder()) and not is_user_code(backbone):  # whose key does not know all that it reads
        with contextlib.suppress(OSError, CannotWrite, RuntimeError):
            _store(openvino, graph, folder / "graphs", key)
            return _stored_graph(key) or graph  # mapped from the file, it needs no weights of torch any more
    return graph


def _store(openvino: Any, graph: Any, folder: Path, key: str) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / key
    with atomic_folder(target) as draft:
        openvino.save_model(graph, draft / "graph.xml", compress_to_fp16=False)
        hashes = {path.name: hash_file(path) for path in draft.iterdir()}
        shutil.rmtree(target, ignore_errors=True)
        os.rename(draft, target)
    write_state("graphs", key, hashes)
    others = sorted((path for path in folder.glob("*/graph.xml")), key=lambda path: -path.stat().st_mtime)
    sizes, total = {path: path.with_name("graph.bin").stat().st_size for path in others}, 0
    for path in others:
        total += sizes[path]
        if total > MOST_BYTES and path.parent != target:
            folder.joinpath(f"{path.parent.name}.json").unlink(missing_ok=True)
            shutil.rmtree(path.parent, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings about shapes that become constants: the shape is fixed here."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
