"""What a program around the library has switched in torch reaches neither features nor heads."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import image_folder
from torch.nn.attention import SDPBackend, sdpa_kernel

import featurecache
import heads
from featurecache import arithmetic
from featurecache.arithmetic import exact_arithmetic, onednn_gain, onednn_is_exact
from featurecache.extraction.canary import StoreBackbone
from featurecache.extraction.run import Extraction
from featurecache.store.view import View
from heads.runs.run import Run


@contextlib.contextmanager
def called(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


def attribute(module: Any, name: str, value: Any) -> contextlib.AbstractContextManager[None]:
    return called(lambda each: setattr(module, name, each), value, getattr(module, name))


def fp32(backend: str, operation: str, value: str) -> contextlib.AbstractContextManager[None]:
    change = torch._C._set_fp32_precision_setter
    return called(
        lambda v: change(backend, operation, v), value, torch._C._get_fp32_precision_getter(backend, operation)
    )


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: called(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "deterministic": lambda: called(torch.use_deterministic_algorithms, True, False),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "matmul precision": lambda: called(torch.set_float32_matmul_precision, "medium", "highest"),
    "fp32 of all": lambda: fp32("generic", "all", "tf32"),
    "fp32 of matmul": lambda: fp32("cuda", "matmul", "tf32"),
    "fp32 of convolutions": lambda: fp32("cuda", "conv", "ieee"),
    "fp32 of the CPU": lambda: fp32("mkldnn", "matmul", "bf16"),
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "fast path": lambda: called(torch.backends.mha.set_fastpath_enabled, False, True),
    "mkldnn": lambda: attribute(torch.backends.mkldnn, "enabled", False),
    "cudnn": lambda: attribute(torch.backends.cudnn, "benchmark", True),
    "fp16 sums": lambda: attribute(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
}


def state() -> list[Any]:
    """All that the context manager sets, read by the same functions, and what it enters."""
    found: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()]
    for read, _, _ in itertools.chain(*arithmetic._switches()):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return [*found, torch.get_num_threads()]


@pytest.mark.parametrize("name", STATES)
def test_inside_it_is_as_in_a_calm_process_and_afterwards_as_it_was(name: str) -> None:
    with exact_arithmetic(1):
        calm = state()
    with STATES[name]():
        before = state()
        with exact_arithmetic(1):
            assert state() == calm
        assert state() == before
    assert "tf32" not in calm and "bf16" not in calm


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("world") / "data", 20)


def everything(data: Path, folder: Path) -> dict[str, bytes]:
    """Features by three roads, a head, a network from pixels, predictions and a map, as bytes."""
    options = {"backbone": "vit-demo", "random_weights": True, "outputs": "cls,tokens", "cache": folder / "cache"}
    view = featurecache.open_view(featurecache.extract(data, **options).view)
    image = (data / "ill" / "000.png").read_bytes()
    rows, _ = featurecache.compute([image], like=view, output="cls")
    how: Any = {"report": False, "epochs": 1}
    run = heads.train_head(view, "large", out=folder / "head", **how)
    solved = heads.train_head(view, "logreg", out=folder / "solved", report=False)
    network = heads.train_baseline(str(data), "cnn-cifar", out=folder / "network", **how)
    predictions = heads.predict(run, [image])
    maps = heads.explain(run, [image], out=folder / "maps")
    made = {name: view.array(name).tobytes() for name in ("cls", "tokens", "tokens-257")}
    made |= {each.path.name: (each.path / "head.safetensors").read_bytes() for each in (run, solved, network)}
    made |= {"rows": rows.numpy().tobytes(), "predictions": repr(predictions).encode()}
    record = json.loads((maps.path / "explain.json").read_text().replace(str(folder), ""))
    del record["check"]  # of the folder's name too
    return made | {"maps": json.dumps(record).encode()}


@pytest.fixture(scope="module")
def calm(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return everything(world, tmp_path_factory.mktemp("calm"))


@pytest.mark.integration
@pytest.mark.parametrize("name", STATES)
def test_features_and_heads_are_the_same_bytes_under_every_switch(tmp_path, world, calm, name):
    with STATES[name]():
        made = everything(world, tmp_path)
    assert {each: made[each] == calm[each] for each in calm} == dict.fromkeys(calm, True)


# They read, list or write, or compute with numpy alone.
NO_TORCH = {
    *("open_view", "View", "export_view", "import_view", "remove_view", "collect", "compact", "open_source"),
    *("FeatureCacheError", "__version__", "load_run", "list_runs", "Run", "list_sweeps", "load_sweep", "compare"),
    *("families_of", "STUDIES", "HEADS"),
}


def is_exact(function: Any) -> bool:
    while hasattr(function, "__wrapped__"):
        manager = inspect.getclosurevars(function).nonlocals.get("self")
        if getattr(manager, "func", None) is inspect.unwrap(exact_arithmetic):
            return True
        function = function.__wrapped__
    return False


@pytest.mark.integration  # importing them all starts a process
def test_every_public_function_that_computes_runs_in_it() -> None:
    public = {name: getattr(package, name) for package in (featurecache, heads) for name in package.__all__}
    assert {name for name, each in public.items() if not is_exact(each)} == NO_TORCH
    methods = (Extraction.run, Extraction.estimate, StoreBackbone.__init__, StoreBackbone.rows, View.tensor, Run.logits)
    assert all(map(is_exact, (*methods, vars(Run)["model"].func)))


def test_products_that_are_no_float32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU with AMX computes them."""
    linear = torch.nn.functional.linear

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear(a, b) if a.dtype == torch.float64 else linear(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    monkeypatch.setattr(arithmetic, "onednn_is_exact", onednn_is_exact.__wrapped__)
    assert not onednn_is_exact.__wrapped__() and onednn_gain.__wrapped__() == 0
