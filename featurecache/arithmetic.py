"""Exact arithmetic: autocast, default dtype and device, TF32, threads and other switches of torch, set and restored.

Whoever computes features or trains heads inside somebody's program inherits what that program has switched; the
fingerprint of a store knows nothing of it. Every public function that computes runs in `exact_arithmetic`: it leaves
torch as a fresh process has it, with the products of float32 in float32 and without autotuned kernels.
"""

from __future__ import annotations

import contextlib
import timeit
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import: imported by what computes, not by who only names it
    import torch

GAIN = 1.3  # of a product by oneDNN, from which on it is taken without a look at more: on AMD about 2, on Intel 1
_Switch = tuple[Callable[[], Any], Callable[[Any], Any], Any]  # reads it, sets it, as it has to be


def _attribute(module: Any, name: str, value: bool) -> _Switch:
    return partial(getattr, module, name), partial(setattr, module, name), value


def _precision(backend: str, operation: str) -> _Switch:
    """Of products of float32. What all operations or backends have in common is "none", so that it decides nothing: it
    comes first, since one operation is read as what it inherits. (By torch._C: `mkldnn.fp32_precision` of torch 2.14
    sets that of all backends.)"""
    value = "none" if operation == "all" else "ieee"
    import torch

    read, change = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    return partial(read, backend, operation), partial(change, backend, operation), value


@cache
def _switches() -> tuple[tuple[_Switch, ...], tuple[_Switch, ...]]:
    """Those of one operation each, and the older ones of several at once."""
    import torch

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    switches: tuple[_Switch, ...] = (
        *(_precision(backend, "all") for backend in ("generic", "cuda", "mkldnn")),
        *(_precision(backend, each) for backend in ("cuda", "mkldnn") for each in ("matmul", "conv", "rnn")),
        *(
            (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device), False)
            for device in ("cpu", "cuda", "mps")
        ),
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        # by torch._C: `torch.use_deterministic_algorithms` imports the compiler first, which takes a second
        (
            deterministic,
            lambda mode: torch._C._set_deterministic_algorithms(mode[0], warn_only=mode[1]),
            (False, False),
        ),
        _attribute(cudnn, "enabled", True),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", True),
        _attribute(mkldnn, "enabled", True),
        _attribute(mkldnn, "deterministic", False),
        _attribute(cuda.matmul, "allow_fp16_accumulation", False),
        _attribute(cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
        _attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, True),
    )
    older: tuple[_Switch, ...] = (
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _attribute(cudnn, "allow_tf32", False),
    )
    return switches, older


@contextlib.contextmanager
def exact_arithmetic(threads: int | None = None) -> Iterator[None]:
    """Torch as a fresh process has it, exact and with gradients, whatever the caller has switched; his settings come
    back afterwards. ``threads``: of the CPU, where their number is fixed. Also a decorator: ``@exact_arithmetic()``."""
    import torch

    switches, switches_of_several = _switches()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # entered only then: it costs every call of torch something
            stack.enter_context(torch.device("cpu"))
        older = []
        for read, change, _ in switches_of_several:
            with contextlib.suppress(RuntimeError):  # its operations differ: those alone tell what is set
                older.append(partial(change, read()))
        for read, change, value in switches:
            stack.callback(change, read())
            change(value)
        for restore in older:  # before those of single operations come back
            stack.callback(restore)
        for _, change, value in switches_of_several:
            change(value)
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield


@contextlib.contextmanager
def onednn_products() -> Iterator[None]:
    """Products of float32 may go to oneDNN, which a CPU of AMD needs for its full speed. A CPU with AMX computes them
    in bfloat16 then: only where `onednn_gain`."""
    read, change, _ = _precision("mkldnn", "matmul")
    before = read()
    change("bf16")
    try:
        yield
    finally:
        change(before)


@cache
def onednn_is_exact() -> bool:
    """Whether products of float32 by oneDNN have float32's accuracy on this CPU: one, and several at once, beside the
    same in float64."""
    import torch
    from torch.nn import functional

    if not torch.backends.mkldnn.is_available():
        return False
    a, b = _factors()
    w, x = a[:256, :197], b[:788].view(4, 197, 768)  # a first layer of `large` on four images
    with exact_arithmetic():
        with onednn_products():
            given = functional.linear(a, b)[:16], torch.matmul(w, x)[:, :16]
        exact = functional.linear(a[:16].double(), b.double()), torch.matmul(w[:16].double(), x.double())
        return all(bool((ours - right).norm() <= 2e-6 * right.norm()) for ours, right in zip(given, exact, strict=True))


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    """The shapes of an MLP of a ViT-B on eight images: much smaller products do not go to oneDNN."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(1576, 768, generator=generator), torch.randn(3072, 768, generator=generator)


@cache
def onednn_gain() -> float:
    """How many times faster a product of float32 is by oneDNN; 0 where it has not float32's accuracy on this CPU."""
    from torch.nn import functional

    if not onednn_is_exact():
        return 0.0
    ours, plain, seconds = [], [], partial(timeit.timeit, partial(functional.linear, *_factors()), number=1)
    with exact_arithmetic():
        for _ in range(3):  # in turn: a machine is busy for a while
            plain.append(seconds())
            with onednn_products():
                ours.append(seconds())
    return min(plain) / min(ours)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bfloat16. Where oneDNN emulates them (AVX-512 without bf16),
    float32 takes less than half as long."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") == "x86_64":
        return bool(capabilities["avx512_bf16"] or capabilities["amx_bf16"])
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
