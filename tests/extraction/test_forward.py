"""The ways of a forward pass: accurate, chosen by measurement, remembered, and never mixed unless the canary agrees."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from support.backbone_checks import edit_json
from support.checkpoints import save_convnext, save_vit
from support.pictures import image_folder, save_picture
from support.plant import flip

import featurecache
from featurecache.backbones import load_backbone
from featurecache.errors import BadOption, CacheError, ForwardUnavailable
from featurecache.extraction import choose_forward, forward, openvino_graph, plan
from featurecache.extraction.forward import ForwardRunner, parts_for
from featurecache.files.records import checked_plan
from featurecache.maintenance.repair import repair
from featurecache.outputs import parse_list
from featurecache.store.store import open_store

SAVE = {"vit": (save_vit, "cls,tokens,tokens@-2"), "convnext": (save_convnext, "gap,tokens")}


@pytest.fixture(params=SAVE)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save, outputs = SAVE[request.param]
    save(tmp_path / "net")
    image_folder(tmp_path / "data", 11)
    (tmp_path / "outputs").write_text(outputs)
    return tmp_path


@pytest.fixture
def long_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job is long enough to measure for."""
    monkeypatch.setitem(choose_forward.LONG, "cpu", 0.0)
    monkeypatch.setattr(choose_forward, "SHORT", -1e9)
    monkeypatch.setattr(choose_forward, "PROBED", 0)


def prepare(home: Path, way: str = "auto", cache: str = "cache", **options):  # type: ignore[no-untyped-def]
    options = {"outputs": (home / "outputs").read_text(), "batch_size": 4, "workers": 1, **options}
    return plan.prepare(home / "data", backbone=str(home / "net"), cache=home / cache, forward=way, **options)


def extract(home: Path, way: str = "auto", cache: str = "cache", **options):  # type: ignore[no-untyped-def]
    return featurecache.open_view(prepare(home, way, cache, **options).run().view)


def plan_of(view) -> dict:  # type: ignore[no-untyped-def, type-arg]
    found = open_store(view.path.parent).plan
    assert found is not None
    return found["cpu"]


def apart(a, b) -> float:  # type: ignore[no-untyped-def]
    return float(max((a.tensor(o) - b.tensor(o)).norm() / b.tensor(o).norm() for o in a.outputs))


def no_conversion(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    module = openvino_graph.import_openvino()
    fail = lambda *_, **__: pytest.fail("converted") if error is None else (_ for _ in ()).throw(error)  # noqa: E731
    monkeypatch.setattr(module, "convert_model", fail)


def scale(monkeypatch: pytest.MonkeyPatch, relative: float) -> None:
    """A graph that computes something else."""
    call = openvino_graph.OpenvinoGraph.__call__
    other = lambda self, x: {k: v * (1 + relative * (v > 0)) for k, v in call(self, x).items()}  # noqa: E731
    monkeypatch.setattr(openvino_graph.OpenvinoGraph, "__call__", other)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_a_graph_gives_the_features_of_the_library(home: Path, precision: str, most: float) -> None:
    library = extract(home, "library", "a", dtype="float32")
    graph = extract(home, "openvino", "b", dtype="float32", precision=precision)
    assert plan_of(graph)["forward"] == "openvino" and plan_of(library)["forward"] == "library"
    assert graph.digests.tolist() == library.digests.tolist() and 0 < apart(graph, library) < most
    assert plan_of(graph)["candidates"]["openvino"]["error"] < most


class Request:
    """A stream of a graph, whose first wait is interrupted as Ctrl-C does."""

    running, interrupts = False, 1

    def set_input_tensor(self, pixels: object) -> None:
        assert not self.running

    def start_async(self) -> None:
        self.running = True

    def wait(self) -> None:
        self.running, self.interrupts = False, self.interrupts - 1
        if self.interrupts == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_give_the_features_of_the_library(home: Path) -> None:
    library, compiled = (extract(home, way, way, dtype="float32") for way in ("library", "compiled"))
    assert plan_of(compiled)["forward"] == "compiled" and 0 < apart(compiled, library) < 1e-5
    save_picture(home / "data" / "ill" / "new.png", 99)
    assert len(extract(home, cache="compiled", dtype="float32")) == 12


def test_a_network_that_does_not_compile_is_computed_by_its_library(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: (_ for _ in ()).throw(OSError("no compiler")))
    with pytest.raises(BadOption, match=r"--forward compiled: torch.compile cannot compile .*no compiler"):
        extract(home, "compiled")
    setting = choose_forward.ForwardSetting(
        load_backbone(str(home / "net")), "bf16", torch.device("cuda"), 64, 2, ("tokens",), 10**6
    )
    assert setting.ways() == ["library", "compiled"]


def test_an_interrupted_graph_leaves_no_stream_running() -> None:
    """It would read pixels that are gone, and take no others."""
    graph = openvino_graph.OpenvinoGraph(SimpleNamespace(create_infer_request=Request), ["cls"], 2)
    with pytest.raises(KeyboardInterrupt):
        graph(torch.zeros(8, 3, 2, 2))
    assert not any(request.running for request in graph._requests)


def test_a_graph_of_a_grey_network_is_fed_one_channel(tmp_path: Path) -> None:
    edit_json(
        save_vit(tmp_path / "net", num_channels=1) / "preprocessor_config.json", image_mean=[0.3], image_std=[0.2]
    )
    image_folder(tmp_path / "data", 6)
    (tmp_path / "outputs").write_text("cls,tokens")
    library, graph = (extract(tmp_path, way, way, dtype="float32") for way in ("library", "openvino"))
    assert plan_of(graph)["forward"] == "openvino" and 0 < apart(graph, library) < 1e-5


def test_a_row_is_the_same_at_every_place_of_a_batch_and_beside_any_others(home: Path) -> None:
    backbone = load_backbone(str(home / "net"))
    outputs = parse_list((home / "outputs").read_text())
    compute = ForwardRunner(backbone, "fp32", torch.device("cpu"), 8, "openvino", parts_for(outputs), 2)
    images = torch.randint(0, 256, (8, 3, *backbone.image_size), dtype=torch.uint8)
    rows, _ = compute(images, outputs, "float32")  # in two streams of four images
    for places in ([7], [7, 0], [0, 4, 7], [6, 1, 5, 2, 7]):
        moved, _ = compute(images[places], outputs, "float32")
        assert all(torch.equal(moved[name], rows[name][places]) for name in rows)
    assert len(compute._graph_of(parts_for(outputs))._requests) == 2


def test_interrupted_and_repaired_stores_hold_the_bytes_of_a_clean_one(home: Path) -> None:
    for number, image in enumerate(sorted((home / "data").rglob("*.png"))):
        if number % 2:
            image.rename(home / image.name)
    extract(home, "openvino")
    for image in home.glob("*.png"):
        image.rename(home / "data" / "ill" / image.name)
    view = extract(home)  # the store's plan says how
    clean = extract(home, "openvino", "clean", name="clean")
    order = [clean.digests.tolist().index(digest) for digest in view.digests.tolist()]
    before = {name: view.array(name).copy() for name in view.outputs}
    assert all(np.array_equal(before[name], clean.array(name)[order]) for name in view.outputs)
    for name in view.outputs:
        path = next((view.path.parent / name).glob("*.h5"))
        with h5py.File(path) as file:
            place = file["features"].id.get_offset()
        flip(path, place + 1)
    assert repair(home / "cache")[0].computed
    view = featurecache.open_view(view.path)
    assert all(np.array_equal(view.array(name), before[name]) for name in view.outputs)


def test_a_graph_is_converted_once_and_made_again_where_it_is_damaged(  # type: ignore[no-untyped-def]
    home: Path, machine_state: Path, monkeypatch
) -> None:
    first = extract(home, "openvino", "a")
    with monkeypatch.context() as patch:
        no_conversion(patch)
        assert apart(extract(home, "openvino", "b"), first) == 0
    (weights,) = (machine_state / "graphs").glob("*/graph.bin")
    flip(weights, -1)
    assert apart(extract(home, "openvino", "c"), first) == 0
    with monkeypatch.context() as patch:
        no_conversion(patch)
        extract(home, "openvino", "d")


def test_a_long_job_measures_and_computes_nothing_twice(home: Path, monkeypatch, long_jobs: None) -> None:  # type: ignore[no-untyped-def]
    passes: list[str] = []
    call = ForwardRunner.parts_of
    count = lambda self, *a: passes.append(self.way + self._precision) or call(self, *a)  # noqa: E731
    monkeypatch.setattr(ForwardRunner, "parts_of", count)
    prepared = prepare(home)
    assert prepared.estimate() and prepared.choice is not None and prepared.choice.bf16_images_per_s
    (line,) = [line for line in prepared.choice.lines(11) if "by measurement" in line]
    assert "library" in line and "; openvino" in line and "off by" in line
    view = featurecache.open_view(prepared.run().view)
    chosen = plan_of(view)
    assert {"library", "openvino"} <= chosen["candidates"].keys() and chosen["forward"] == prepared.choice.way
    graph = chosen["forward"] == "openvino"  # whose first pass makes its kernels; and a look at three images alone
    assert passes.count(f"{chosen['forward']}fp32") == 4 + 2 * graph  # the probes, and 11 images in batches of 4
    assert plan_of(extract(home, cache="b"))["candidates"] == chosen["candidates"]  # this machine remembers


def test_short_jobs_convert_nothing_and_a_later_long_one_changes_the_store(  # type: ignore[no-untyped-def]
    home: Path, monkeypatch, request
) -> None:
    with monkeypatch.context() as patch:
        no_conversion(patch)
        assert "candidates" not in plan_of(extract(home))
    request.getfixturevalue("long_jobs")
    for number in range(9):
        save_picture(home / "data" / "ill" / f"more{number}.png", 100 + number)
    fast = {"library": {"images_per_s": 1.0, "error": 0.0}, "openvino": {"images_per_s": 9.0, "error": 1e-7}}
    monkeypatch.setattr(choose_forward, "_remembered", lambda *_: choose_forward.ForwardChoice("openvino", fast))
    assert plan_of(extract(home))["forward"] == "openvino"


def test_another_way_that_the_probe_images_do_not_bear_out_adds_nothing(  # type: ignore[no-untyped-def]
    home: Path, monkeypatch, long_jobs: None
) -> None:
    extract(home, "library")
    fast = {"library": {"images_per_s": 1.0, "error": 0.0}, "openvino": {"images_per_s": 9.0, "error": 1e-7}}
    monkeypatch.setattr(choose_forward, "_remembered", lambda *_: choose_forward.ForwardChoice("openvino", fast))
    scale(monkeypatch, 1e-2)
    save_picture(home / "data" / "ill" / "new.png", 99)
    prepared = prepare(home)
    prepared.estimate()
    assert prepared.choice is not None and "does not agree with what the store holds" in prepared.choice.notes[-1]
    assert plan_of(featurecache.open_view(prepared.run().view))["forward"] == "library"


def test_what_is_inaccurate_is_never_chosen(home: Path, monkeypatch, long_jobs: None) -> None:  # type: ignore[no-untyped-def]
    scale(monkeypatch, 1e-4)
    monkeypatch.setattr(choose_forward, "onednn_gain", lambda: 2.0)
    monkeypatch.setattr(forward, "onednn_gain", lambda: 2.0)
    onednn = ForwardRunner.parts_of
    off = lambda self, *a: {k: v * (1.001 if self.way == "onednn" else 1) for k, v in onednn(self, *a).items()}  # noqa: E731
    monkeypatch.setattr(ForwardRunner, "parts_of", off)
    assert plan_of(extract(home))["forward"] == "library"
    with pytest.raises(BadOption, match=r"--forward openvino: it differs by \d"):
        extract(home, "openvino", "b")


def test_what_differs_on_the_first_batch_alone_is_not_chosen(home: Path, monkeypatch, long_jobs: None) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(choose_forward, "onednn_gain", lambda: 0.0)
    call, probes = ForwardRunner.parts_of, choose_forward.probe_pixels(load_backbone(str(home / "net")))
    error = 0.0

    def off(self, images, *a):  # type: ignore[no-untyped-def]
        if self.way == "library":
            time.sleep(0.4)  # long enough to be measured on the probe images alone
        wrong = self.way == "openvino" and not torch.equal(images, probes[: len(images)])
        return {part: rows * (1 + error * wrong) for part, rows in call(self, images, *a).items()}

    monkeypatch.setattr(ForwardRunner, "parts_of", off)
    assert plan_of(extract(home))["forward"] == "openvino"
    error = 1e-3
    monkeypatch.setattr(choose_forward, "_remembered", lambda *_: None)
    assert plan_of(extract(home, cache="b"))["forward"] == "library"


def test_a_network_that_does_not_convert_is_computed_by_its_library(home: Path, monkeypatch, long_jobs: None) -> None:  # type: ignore[no-untyped-def]
    no_conversion(monkeypatch, RuntimeError("no such operation"))
    prepared = prepare(home)
    prepared.estimate()
    assert prepared.choice is not None and "cannot convert" in prepared.choice.notes[0]
    assert plan_of(featurecache.open_view(prepared.run().view))["forward"] != "openvino"
    with pytest.raises(BadOption, match=r"cannot convert .*no such operation"):
        extract(home, "openvino", "b")


def test_a_store_whose_way_is_gone_goes_on_by_the_library(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    extract(home, "openvino")
    gone = lambda: (_ for _ in ()).throw(openvino_graph.ForwardUnavailable("OpenVINO cannot be used here"))  # noqa: E731
    monkeypatch.setattr(openvino_graph, "import_openvino", gone)
    save_picture(home / "data" / "ill" / "new.png", 99)
    prepared = prepare(home)
    prepared.estimate()
    assert prepared.choice is not None and "cannot be used here" in prepared.choice.notes[0]
    view = featurecache.open_view(prepared.run().view)
    assert len(view) == 12 and plan_of(view)["forward"] == "openvino"


@pytest.mark.parametrize(("gain", "error", "way"), [(2.0, 0, "onednn"), (1.1, 0, "library"), (2.0, 1e-3, "library")])
def test_short_jobs_take_what_needs_no_conversion_where_products_gain_by_it(  # type: ignore[no-untyped-def]
    home: Path, monkeypatch, gain: float, error: float, way: str
) -> None:
    for module in (choose_forward, forward):
        monkeypatch.setattr(module, "onednn_gain", lambda: gain)
    monkeypatch.setattr(forward, "onednn_products", contextlib.nullcontext)  # on this CPU they may be no float32
    monkeypatch.setattr(choose_forward, "PROBED", 0)
    call = ForwardRunner.parts_of
    off = lambda self, *a: {k: v * (1 + error * (self.way == "onednn")) for k, v in call(self, *a).items()}  # noqa: E731
    monkeypatch.setattr(ForwardRunner, "parts_of", off)
    assert plan_of(extract(home))["forward"] == way
    monkeypatch.setattr(choose_forward, "PROBED", 4)
    save_picture(home / "data" / "ill" / "new.png", 99)
    assert plan_of(extract(home))["forward"] == way  # a few more are computed as the store is


@pytest.mark.parametrize(("bf16", "lines"), [(40.0, 1), (12.0, 0), (None, 0)])
def test_the_estimate_says_what_bf16_would_save(bf16: float | None, lines: int) -> None:
    said = choose_forward.ForwardChoice(images_per_s=10.0, bf16_images_per_s=bf16).lines(4800)
    assert said == ["--precision bf16, another store, would take 2 min: 40 images/s"][:lines]


def test_another_process_that_wants_more_of_the_view_meets_no_freed_weights(home: Path) -> None:
    outputs = parse_list((home / "outputs").read_text())
    backbone = load_backbone(str(home / "net"))
    compute = ForwardRunner(backbone, "fp32", torch.device("cpu"), 4, "openvino", parts_for(outputs[:1]), 2)
    images = torch.randint(0, 256, (4, 3, *backbone.image_size), dtype=torch.uint8)
    before, _ = compute(images, outputs[:1], "float32")
    compute.release()
    rows, _ = compute(images, outputs, "float32")
    assert all(torch.allclose(rows[name], before[name], rtol=1e-4, atol=1e-5) for name in before)


def test_weights_that_a_graph_has_are_freed(home: Path) -> None:
    prepared = prepare(home, "openvino")
    prepared.run()
    assert {parameter.device.type for parameter in prepared.backbone.model.parameters()} == {"meta"}


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> None:
    """A device that has room for batches of so many."""
    call = ForwardRunner.parts_of
    full = lambda self, images, *a: (_ for _ in ()).throw(error) if len(images) > most else call(self, images, *a)  # noqa: E731
    monkeypatch.setattr(ForwardRunner, "parts_of", full)
    monkeypatch.setattr(choose_forward, "PROBED", 0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("MPS backend out of memory (MPS ...")]
)
def test_a_batch_that_the_device_has_no_memory_for_is_halved_before_the_store_keeps_it(  # type: ignore[no-untyped-def]
    home: Path, monkeypatch, error: RuntimeError
) -> None:
    plain = extract(home, "library", "plain")
    small_memory(monkeypatch, 2, error)
    prepared = prepare(home, "library", batch_size=9)
    view = featurecache.open_view(prepared.run().view)
    assert plan_of(view)["batch_size"] == 2 and apart(view, plain) < 1e-3
    assert prepared.choice and [note.split(":")[0][-1] for note in prepared.choice.notes] == ["9", "4"]
    assert extract(home, "library", name="again").outputs == view.outputs  # the store's plan fits


def test_a_store_whose_batch_does_not_fit_the_device_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(home, "library")
    save_picture(home / "data" / "ill" / "more.png", 100)
    small_memory(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ForwardUnavailable, match="computes in batches of 4"):
        extract(home, "library")
    small_memory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ForwardUnavailable, match="not even for a batch of 1"):
        extract(home, "library", "b")
    monkeypatch.setattr(ForwardRunner, "parts_of", lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        extract(home, "library", "c")


@pytest.mark.parametrize(
    "wrong",
    [
        {"forward": "magic"},
        {"forward": ["library"]},
        {"parts": "tokens"},
        {"candidates": {}},
        {"candidates": {"library": {"images_per_s": 0.0, "error": 0.0}}, "forward": "library"},
        {"candidates": {"library": {"images_per_s": 1.0, "error": 0.0}}},
    ],
)
def test_a_plan_that_names_no_forward_pass_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CacheError, match="names no forward pass"):
        checked_plan({"cpu": {"batch_size": 8, "threads": 2, **wrong}}, Path("plan.json"))


OFFLINE = """
import socket, sys
def refuse(*_, **__): raise SystemExit("a connection was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from featurecache.extraction.openvino_graph import compile_graph
from featurecache.backbones import load_backbone
compile_graph(load_backbone(sys.argv[1]), ["tokens"], 1, "fp32", 1)
assert sys.modules.get("openvino_telemetry") is None, "its telemetry was imported"
import openvino.tools.ovc.convert_impl as used
assert used.tm.__name__.endswith("telemetry_stub")
import threading, time
time.sleep(0.2)
print("quiet", [t.name for t in threading.enumerate() if "elemetry" in t.name])
"""


def test_conversion_opens_no_connection(vit: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OFFLINE, vit], capture_output=True, text=True)
    assert done.stdout.strip() == "quiet []", done.stderr
