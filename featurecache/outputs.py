"""What can be kept of one forward pass: names, and the outputs that are functions of stored tokens.

    tokens         [N,T,D]        the whole last_hidden_state, prefix tokens first; a CNN's last feature map, [N,h·w,C]
    cls            [N,D]          row 0 of tokens
    mean           [N,D]          mean of the patch tokens, without any prefix token
    tokens-257     [N,257,D]      the [D,T] matrix through torchvision's Resize((D, 257)), stored token-major
    tokens-16x16   [N,P+16·16,D]  the patch grid interpolated in its two dimensions, prefix tokens kept
    pooler, gap    [N,D]          from the network itself; not functions of the tokens
    vector         [N,D]          imported, and nobody said which vector it is; no extraction makes it
    …@-2, …@last4                 an earlier block, counted from the end; the last four concatenated to width 4·D
    cls+mean       [N,2·D]        vectors beside each other, for a head: each is stored by itself

`cls`, `mean`, `tokens-N` and `tokens-HxW` are computed from the tokens *as stored*: tokens are rounded to the storage
dtype, then selected, averaged or resized in float32, then rounded again. `derive` always runs on the CPU and only adds
and multiplies elementwise in a fixed order, so an output has the same bytes whether it is made in the first pass,
years later, or in batches of another size. (A matrix product does not promise that.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from featurecache.errors import OutputRefused, UnknownOutput, nearest

if TYPE_CHECKING:
    import torch

NAMES = ("cls", "pooler", "gap", "mean", "tokens", "tokens-257", "tokens-16x16")
_PATTERN = re.compile(r"(cls|pooler|gap|vector|mean|tokens(?:-(\d{1,5})(?:x(\d{1,5}))?)?)(?:@(-\d{1,3}|last\d{1,2}))?")
_OF_THE_NETWORK = ("pooler", "gap", "vector")  # no functions of tokens
_MAX_TOKENS = 65_536


@dataclass(frozen=True)
class Output:
    """A parsed output name. ``size`` is (N,) for tokens-N, (H, W) for tokens-HxW, else ()."""

    name: str
    base: str
    size: tuple[int, ...]
    layer: str  # "" for the output itself, "-2", "last4"

    @property
    def source(self) -> str:
        """What the forward pass must give for it: ``pooler``, ``gap``, or tokens of the same layer."""
        if self.base in _OF_THE_NETWORK:
            return self.base
        return f"tokens@{self.layer}" if self.layer else "tokens"

    @property
    def is_derived(self) -> bool:
        return self.name != self.source

    def row_shape(self, tokens: tuple[int, int], prefix: int) -> tuple[int, ...]:
        """Shape of one row, given that of its tokens (T, D) and the number P of prefix tokens."""
        length, width = tokens
        if not self.base.startswith("tokens"):
            return (width,)
        if self.size:
            length = math.prod(self.size) + (prefix if len(self.size) == 2 else 0)
        return (length, width)

    def layout(self, prefix: tuple[str, ...], grid: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, int]] | None:
        """(prefix, grid) of a token output: which rows are what. Of tokens-N none: its rows are mixtures."""
        if not self.base.startswith("tokens") or len(self.size) == 1:
            return None
        return prefix, (self.size[0], self.size[1]) if self.size else grid


def parse(name: str) -> Output:
    match = _PATTERN.fullmatch(name)
    if match is None:
        hint = f' Did you mean --out "{name}"?' if "/" in name else nearest(name, NAMES)
        hint = " It is for heads, which put vectors beside each other: name one." if "+" in name else hint
        raise UnknownOutput(
            f'no output is called "{name}".{hint} There are {", ".join(NAMES)}; '
            "@-2 or @last4 behind one is for earlier blocks."
        )
    base, first, second, layer = match[1], match[2], match[3], match[4] or ""
    size = tuple(int(part) for part in (first, second) if part)
    if size and not 0 < math.prod(size) <= _MAX_TOKENS:
        raise UnknownOutput(f'"{name}": the number of tokens must lie between 1 and {_MAX_TOKENS:,}.')
    if layer in ("-0", "last0") or (layer and base in _OF_THE_NETWORK):
        raise OutputRefused(
            f'"{name}" does not exist: blocks are counted from the end (@-1 is the last) and {base} has none.'
        )
    if layer in ("-1", "last1"):
        layer = ""  # the output itself
    return Output(base + (f"@{layer}" if layer else ""), "tokens" if size else base, size, layer)


def members(name: str) -> tuple[Output, ...]:
    """The vectors that ``cls+mean`` concatenates, in its order; of every other name the one output that it is."""
    parsed = tuple(parse(part) for part in name.split("+"))
    if len(parsed) > 1 and (len(set(parsed)) < len(parsed) or any(o.base.startswith("tokens") for o in parsed)):
        raise UnknownOutput(f'"{name}": different vectors can stand beside each other, such as cls+mean.')
    return parsed


def parse_list(names: str | Iterable[str]) -> tuple[Output, ...]:
    """Comma-separated or a sequence; each once, in the order given; of ``cls+mean`` both: each is stored alone."""
    parts = names.split(",") if isinstance(names, str) else names
    parsed = [output for part in parts if part.strip() for output in members(part.strip())]
    if not parsed:
        raise UnknownOutput(f"no output was named. There are {', '.join(NAMES)}.")
    return tuple(dict.fromkeys(parsed))


def blocks(layer: str) -> tuple[str, ...]:
    """The single layers a layer is concatenated from: "last4" → ("-4", "-3", "-2", ""), "-2" → ("-2",)."""
    if not layer.startswith("last"):
        return (layer,)
    return tuple(f"-{k}" if k > 1 else "" for k in range(int(layer[4:]), 0, -1))


def source_parts(source: str) -> list[str]:
    """ "tokens@last2" → ["tokens@-2", "tokens"]: what the backbone gives, to be concatenated."""
    base, _, layer = source.partition("@")
    return [f"{base}@{part}" if part else base for part in blocks(layer)]


def derive(output: Output, tokens: torch.Tensor, prefix: int, grid: tuple[int, int]) -> torch.Tensor:
    """A derived output from tokens as stored.

    tokens [n,T,D] in the storage dtype, on the CPU; prefix = P; grid = (h, w) with T = P + h·w.
    Returns [n, ...] in the same dtype. Raises OutputRefused where the tokens have no class token.
    """
    if output.base == "cls":
        return tokens[:, 0].clone()
    return function_of(output, tokens.float(), prefix, grid).to(tokens.dtype)


def function_of(output: Output, x: torch.Tensor, prefix: int, grid: tuple[int, int]) -> torch.Tensor:
    """The same function without rounding: float32 tokens [n,T,D], on any device, to float32 [n, ...]."""
    import torch

    if output.base == "cls":
        return x[:, 0]
    if output.base == "mean":
        total = x[:, prefix].clone()  # one token after the other: torch may split a reduction by rows and threads
        for k in range(prefix + 1, x.shape[1]):
            total += x[:, k]
        return total / (x.shape[1] - prefix)
    if len(output.size) == 1:
        return _apply(_taps(x.shape[1], output.size[0]), x)
    height, width = output.size
    patches = x[:, prefix:].unflatten(1, grid)  # [n,h,w,D]
    patches = _apply(_taps(grid[0], height), patches)  # rows first,
    patches = _apply(_taps(grid[1], width), patches.flatten(0, 1)).view(len(x), -1, x.shape[2])  # then columns
    return torch.cat([x[:, :prefix], patches], dim=1)


@lru_cache(maxsize=32)
def _taps(length: int, size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Bilinear, antialiased resampling of ``length`` points to ``size`` as (source index [size], weight [size]) pairs.

    torch's own weights, read off by resizing the identity; a row has 2 taps upwards, more downwards.
    """
    import torch

    eye = torch.eye(length)[None, None]
    resized = torch.nn.functional.interpolate(eye, (length, size), mode="bilinear", antialias=True)
    matrix = resized[0, 0].T  # [size,length]
    count = int((matrix != 0).sum(1).max())
    first = (matrix != 0).float().argmax(1).clamp(max=length - count)
    index = first[:, None] + torch.arange(count)
    weight = matrix.gather(1, index)
    return tuple((index[:, k].contiguous(), weight[:, k].contiguous()) for k in range(count))


def _apply(taps: tuple[tuple[torch.Tensor, torch.Tensor], ...], x: torch.Tensor) -> torch.Tensor:
    """Resample dimension 1 of x [n, length, ...]."""
    shape = (-1,) + (1,) * (x.dim() - 2)
    terms = (x.index_select(1, index.to(x.device)).mul_(weight.to(x.device).view(shape)) for index, weight in taps)
    return reduce(lambda total, term: total.add_(term), terms)
