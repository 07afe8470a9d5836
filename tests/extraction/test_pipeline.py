"""Batches on their way through the pipeline: what a pass computes and is compiled for, how rows leave the device."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import save_vit
from support.pictures import image_folder

import featurecache
from featurecache.backbones import load_backbone
from featurecache.extraction import choose_forward
from featurecache.extraction.choose_forward import ForwardSetting
from featurecache.extraction.forward import ForwardRunner, HostCopies
from featurecache.files.machine_state import write_state
from featurecache.outputs import parse_list
from featurecache.store.store import open_store


@pytest.mark.parametrize(
    ("depends", "first", "passes", "then"),
    [  # on other rows of the batch or not; images before; passes of two images and then of the same in other places
        (0.0, [8], [8, 2, 2, 8], [2, 8]),
        (0.0, [], [8, 2, 8], [2, 8]),
        (1e-3, [8], [8, 2, 8, 8], [8, 8]),
        (1e-3, [], [8, 2, 8], [8, 8]),
    ],
)
def test_a_network_computes_few_images_alone_where_they_have_the_bits_of_a_batch(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch, depends: float, first: list[int], passes: list[int], then: list[int]
) -> None:
    seen = list[int]()

    def parts_of(self, images, parts):  # type: ignore[no-untyped-def]
        seen.append(len(images))
        return {part: images.flatten(1)[:, :9] + depends * len(images) for part in parts}

    monkeypatch.setattr(ForwardRunner, "parts_of", parts_of)
    backbone, outputs = load_backbone(str(save_vit(tmp_path / "net"))), parse_list("tokens")
    images = torch.randint(0, 256, (8, 3, *backbone.image_size), dtype=torch.uint8)
    for expected in (passes, then):  # the second process remembers
        compute = ForwardRunner(backbone, "fp32", torch.device("cpu"), 8)
        for count in first if expected is passes else []:
            compute(images[:count], outputs, "float32")
        few, moved = (compute(images[:2], outputs, "float32", places)[0]["tokens"] for places in (None, [3, 6]))
        assert seen == expected and torch.equal(few, images[:2].flatten(1)[:, :9] + 8 * depends)
        assert torch.equal(few, moved)
        seen.clear()


def test_rows_leave_a_gpu_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    note = lambda what, gives=None: lambda *_, **__: done.append(what) or gives  # noqa: E731
    event = SimpleNamespace(synchronize=note("wait"))
    stream = SimpleNamespace(device="cuda", wait_stream=note("after the pass"), record_event=note("event", event))
    rows = SimpleNamespace(to=note("copy", torch.ones(2)), record_stream=note("keep"), is_cuda=True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    copied = HostCopies(torch.device("cuda")).begin({"cls": rows, "measured": torch.zeros(3)})  # type: ignore[dict-item]
    assert done == ["after the pass", "copy", "keep", "event"]
    assert torch.equal(copied()["cls"], torch.ones(2)) and done[-1] == "wait"
    assert torch.equal(copied()["measured"], torch.zeros(3))  # what was measured lies on the host already


def test_a_pass_in_another_precision_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    backbone, outputs = load_backbone(str(save_vit(tmp_path / "net"))), parse_list("tokens")
    images = torch.randint(0, 256, (4, 3, *backbone.image_size), dtype=torch.uint8)
    exact, fast = (ForwardRunner(backbone, precision, torch.device("cpu"), 4) for precision in ("fp32", "bf16"))
    rows = [runner(images, outputs, "float32")[0]["tokens"] for runner in (exact, fast, exact)]
    assert torch.equal(rows[0], rows[2]) and 1e-4 < (rows[1] - rows[0]).norm() / rows[0].norm() < 3e-2


@pytest.mark.slow
def test_compiled_kernels_give_all_parts_whatever_was_asked_for_before(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    backbone = load_backbone(str(save_vit(tmp_path / "net")))
    images = torch.randint(0, 256, (4, 3, *backbone.image_size), dtype=torch.uint8)
    parts, cpu = ("tokens", "tokens@-2"), torch.device("cpu")
    library, runner = (ForwardRunner(backbone, "fp32", cpu, 4, way, parts) for way in ("library", "compiled"))
    for name in ("tokens@-2", "tokens", "tokens@-2"):
        given = runner.parts_of(images, {name})[name]
        assert torch.allclose(given, library.parts_of(images, {name})[name], atol=1e-6)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a network whose kernels were compiled."""
    save_vit(tmp_path / "net")
    image_folder(tmp_path / "data", 9)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    options = {"backbone": str(tmp_path / "net"), "cache": tmp_path / "cache", "outputs": "cls", "batch_size": 4}
    store = open_store(featurecache.extract(tmp_path / "data", **options).view.parent)
    candidates = {way: {"images_per_s": 9.0, "error": 0.0} for way in ("library", "compiled")}
    plan = store.write_plan("cpu", {"forward": "compiled", "candidates": candidates, "parts": ["tokens"]})
    assert plan["forward"] == "compiled"
    return tmp_path


def test_few_new_images_do_not_wait_for_a_compiler(compiled: Path) -> None:
    view = featurecache.open_view("data", compiled / "cache")
    rows, _ = featurecache.compute([(compiled / "data" / view.ids[0]).read_bytes()], like=view, output="cls")
    assert torch.equal(rows[0], view.tensor("cls")[0])


@pytest.mark.parametrize(("images", "way"), [(2_000, None), (200_000, "compiled")])
def test_compiled_kernels_are_remembered_where_they_save_more_than_compiling_takes(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch, images: int, way: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    backbone = load_backbone(str(save_vit(tmp_path / "net")))
    setting = ForwardSetting(backbone, "fp32", torch.device("cuda"), 64, 2, ("tokens",), images)
    speeds = {"library": 1000.0, "compiled": 2000.0}
    candidates = {way: {"images_per_s": rate, "error": 0.0} for way, rate in speeds.items()}
    write_state("forward", setting.key, {"candidates": candidates})
    remembered = choose_forward._remembered(setting, "auto")
    assert (remembered and remembered.way) == way
