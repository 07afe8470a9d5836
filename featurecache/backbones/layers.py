"""Layers of a network as a table: name, class, shape of what it gives for an image, parameters, how many are trainable.

Modules that are alike and stand one after another (the blocks of a transformer) share a row. Shapes come from one pass
through the network, which may have no weights (the meta device).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from featurecache.formatting import aligned

MOST = 40  # rows; of a network with more the table is less deep
DEEPEST = 6


def layer_rows(network: nn.Module, run: nn.Module, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Records with ``name``, ``class``, ``shape`` ([] where it is not known), ``copies``, ``parameters`` and
    ``trainable`` of one copy, ``depth`` from 0. ``run`` takes pixels of ``size`` [C,h,w] through ``network``."""
    shapes: dict[str, list[int]] = {}
    pixels = torch.zeros(1, *size, device=next(network.parameters()).device)
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, part in network.named_modules():
            hooks.enter_context(part.register_forward_hook(partial(_note, shapes, name)))
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            run(pixels, {"tokens"})
    for deepest in range(DEEPEST, 0, -1):
        rows = list(_rows(network, "", shapes, 0, deepest))
        if len(rows) <= MOST:
            break
    return rows


def layer_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table for a terminal."""
    cells = [["layer", "class", "shape", "parameters", "trainable"]]
    for each in rows:
        times = f"{each['copies']} × " if each["copies"] > 1 else ""
        counts = [f"{times}{each[name]:,}" if each[name] else "0" for name in ("parameters", "trainable")]
        shape = f"[{','.join(map(str, each['shape']))}]" if each["shape"] else "–"
        cells.append([each["name"], each["class"], shape, *counts])
    return [*aligned(cells, right=3), "Frozen: extract trains nothing; train-baseline --arch finetune:NAME does."]


def _note(shapes: dict[str, list[int]], name: str, _: nn.Module, __: Any, output: Any) -> None:
    """The shape of the first tensor that a module gives, without the batch."""
    while isinstance(output, tuple | list | dict) and output:
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if isinstance(output, torch.Tensor):
        shapes.setdefault(name, list(output.shape[1:]))


def _rows(
    module: nn.Module, path: str, shapes: dict[str, list[int]], depth: int, deepest: int
) -> Iterator[dict[str, Any]]:
    for name, value in module.named_parameters(recurse=False):
        if depth == 0 or list(module.children()):
            yield _row(f"{path}{name}", "parameter", list(value.shape), [value], 1, depth)
    # of children with numbers for names those that are alike share a row
    alike = groupby(module.named_children(), lambda each: str(each[1]) if each[0].isdecimal() else each[0])
    for children in (list(group) for _, group in alike):
        (first, child), (last, _), count = children[0], children[-1], len(children)
        if not (values := list(child.parameters())):
            continue
        own, below = f"{path}{first}", depth + 1
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # which gives nothing itself
            below = depth
        else:
            shown = own if count == 1 else f"{own} … {last}"
            yield _row(shown, type(child).__name__, shapes.get(own, []), values, count, depth)
        if below < deepest:
            yield from _rows(child, f"{own}.", shapes, below, deepest)


def _row(
    name: str, kind: str, shape: list[int], values: list[nn.Parameter], copies: int, depth: int
) -> dict[str, Any]:  # fmt: skip
    trainable = sum(value.numel() for value in values if value.requires_grad)
    counts = {"parameters": sum(value.numel() for value in values), "trainable": trainable}
    return {"name": name, "class": kind, "shape": shape, "copies": copies, **counts, "depth": depth}
