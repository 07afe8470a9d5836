"""Batches on their way through the pipeline: how many images a pass has, and how rows leave the device."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import save_vit

from featurecache.backbones import load_backbone
from featurecache.extraction.forward import ForwardRunner, HostCopies
from featurecache.outputs import parse_list


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
    rows = SimpleNamespace(to=note("copy", torch.ones(2)), record_stream=note("keep"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    copied = HostCopies(torch.device("cuda")).begin({"cls": rows})  # type: ignore[dict-item]
    assert done == ["after the pass", "copy", "keep", "event"]
    assert torch.equal(copied()["cls"], torch.ones(2)) and done[-1] == "wait"
