"""What a head makes of every token, from head and tokens alone: no pass through the backbone.

Notation: n images, T tokens, D width, C classes, H hidden; u [T, D] tokens scaled as the head sees them, R their fixed
map to its input (`places` beside this), m the margin of one class (`maps`), ū the mean training token, scaled too.

Replacement: the part of token t is a_t = m(u) − m(u with ū in the place of u_t), exactly. Three roads, one number:

* m is affine in u (``linear`` on a mean of tokens or a CNN's gap, ``mean-linear``, ``cls+mean``):
  a_t = (u_t − ū) · ∂m/∂u_t, and Σ_t a_t + m(ū everywhere) = m(u). On gap this is class activation mapping (Zhou et al.
  2016, arXiv:1512.04150), measured from the mean.
* ``large``: with A = W1 R u + b1 [H, D] and w_t = W1 R[:, t], replacing token t is a rank-one update of the first
  layer's output, A + w_t (ū − u_t)ᵀ; so a_t = Σ_hd v_hd (relu(A) − relu(A + w_t (ū − u_t)ᵀ))_hd with v the second
  layer along the margin. T·H·D multiply-adds instead of T forward passes of T·H·D each, in pieces that stay in the
  processor's cache: 197 tokens of a ViT-B in 20 ms on two cores. The a_t need not add up.
* any other head: by T forward passes (occlusion).

Gradient × input (Shrikumar et al. 2016, arXiv:1605.01713): a_t = u_t · ∂m/∂u_t. Where layers are linear with ReLU
between them m is piecewise linear, so Σ_t a_t + Σ b·∂m/∂b + the prior correction's part = m, over all biases b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption
from heads.data import Standardize
from heads.explanations.maps import Map, direction
from heads.explanations.places import Places
from heads.runs import Run
from heads.token_heads import ClsMean, Conv, Large, MeanLinear
from heads.vector_heads import Linear, Mlp

METHODS = ("replace", "gradient")
AFFINE = (Linear, MeanLinear, ClsMean)
FAST = (*AFFINE, Large)  # of which all parts cost about as much as a forward pass or two
PIECEWISE = (*AFFINE, Large, Mlp, Conv)
ROWS, TOKENS = 64, 8  # of the hidden layer and of tokens at once: 1.5 MB for D=768 (256 and 197: five times slower)
COPIES = 64 << 20  # bytes of replaced copies in memory at once


@dataclass(frozen=True)
class Reader:
    """The margin as a function of tokens: ``model`` is the run's head, or its shuffled control."""

    model: nn.Module
    places: Places
    scale: Standardize
    correction: torch.Tensor  # float32 [C]
    temperature: float
    multilabel: bool

    @classmethod
    def of(cls, run: Run, places: Places, model: nn.Module | None = None) -> Reader:
        calibration = run.calibration
        correction = torch.tensor(calibration.correction, dtype=torch.float32)
        return cls(
            model or run.model, places, run.standardize, correction, calibration.temperature, run.task == "multilabel"
        )

    @property
    def early(self) -> bool:
        """Tokens may be scaled before R. A length (l2) of a mixture is not the mixture of lengths."""
        return self.places.matrix is None or self.scale.kind != "l2"

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., T, D] as stored -> u."""
        return self.scale(x) if self.early else x

    def input(self, u: torch.Tensor) -> torch.Tensor:
        """u [n, T, D] -> what the head is given."""
        made = self.places.input(u)
        return made if self.early else self.scale(made)

    def toward(self, classes: np.ndarray) -> torch.Tensor:
        return direction(classes, len(self.correction), self.temperature, self.multilabel)

    def margins(self, u: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
        """u [n, T, D], toward [n, C] or [1, C] -> [n]."""
        return ((self.model(self.input(u)) + self.correction) * toward).sum(1)


@dataclass(frozen=True)
class Parts:
    """Of n images. ``beside``: what belongs to no token, each [n]."""

    tokens: np.ndarray  # float64 [n, T]
    margin: np.ndarray  # float64 [n]
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    adds_up: bool = False
    how: str = ""
    small: str = ""


def replaced(reader: Reader, u: torch.Tensor, mean: torch.Tensor, classes: np.ndarray) -> Parts:
    """a_t of u [n, T, D] against ``mean`` [T, D], both scaled."""
    toward = reader.toward(classes)
    if reader.early and isinstance(reader.model, AFFINE):
        return _additive(reader, u, mean, toward)
    with torch.no_grad():
        margin = reader.margins(u, toward).double().numpy()
        if reader.early and isinstance(reader.model, Large):
            rows = [_rank_one(reader, each, mean, way) for each, way in zip(u, toward, strict=True)]
            how = "exact change of the margin when this token is replaced"
        else:
            rows = [_occluded(reader, each, mean, way) for each, way in zip(u, toward, strict=True)]
            how = "change of the margin when this token is replaced (occlusion)"
    return Parts(torch.stack(rows).numpy(), margin, how=how, small="replacement")


def _additive(reader: Reader, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> Parts:
    gradient, margin = _gradient(reader, u, toward)
    parts = ((u - mean) * gradient).sum(2).double().numpy()
    with torch.no_grad():
        rest = reader.margins(mean.expand_as(u), toward).double().numpy()
    beside = {"mean tokens everywhere": rest}
    return Parts(parts, margin, beside, True, "exact additive parts of the margin", "additive parts")


def _rank_one(reader: Reader, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    """float64 [T] of one image u [T, D]."""
    model = reader.model
    assert isinstance(model, Large)
    first = model.fc1.weight  # [H, T']
    before = torch.addmm(model.fc1.bias[:, None], first, reader.places.input(u[None])[0])  # A [H, D]
    columns = first if reader.places.matrix is None else first @ reader.places.matrix  # W1 R [H, T]
    second = torch.einsum("c,chd->hd", toward, model.second)
    change, parts = mean - u, torch.zeros(len(u), dtype=torch.float64)
    memory = torch.empty(TOKENS, ROWS, u.shape[1])
    for rows in _stretches(len(before), ROWS):
        under, weight, unchanged = before[rows], second[rows].flatten(), before[rows].relu()
        for some in _stretches(len(u), TOKENS):
            beyond = memory[: len(change[some]), : len(under)]
            torch.addcmul(under, columns[rows, some].T[:, :, None], change[some, None], out=beyond)
            beyond.relu_().sub_(unchanged)
            parts[some] -= (beyond.flatten(1) @ weight).double()
    return parts


def _occluded(reader: Reader, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    """float64 [T] of one image u [T, D], by a forward pass for each token; of a head on one vector [D] all together."""
    matrix = reader.places.matrix
    if reader.early and matrix is not None and matrix.ndim == 1:
        vectors = reader.input(u[None]) + matrix[:, None] * (mean - u)  # [T, D]
        z = reader.model(torch.cat([reader.input(u[None]), vectors])) + reader.correction
        margins = (z.double() * toward.double()).sum(1)
        return margins[0] - margins[1:]
    whole, parts = reader.margins(u[None], toward).double(), torch.zeros(len(u), dtype=torch.float64)
    for some in _stretches(len(u), max(1, COPIES // (4 * u.numel()))):
        copies = u.repeat(len(parts[some]), 1, 1)
        places = torch.arange(some.start, some.start + len(copies))
        copies[torch.arange(len(copies)), places] = mean[some]
        parts[some] = whole - reader.margins(copies, toward).double()
    return parts


def gradient_times_input(reader: Reader, u: torch.Tensor, classes: np.ndarray) -> Parts:
    """u_t · ∂m/∂u_t of u [n, T, D]; with the parts of biases and prior correction they add up to the margin.

    Raises BadOption for a head in which they would add up to nothing (attention, knn, a user's own)."""
    if not (reader.early and isinstance(reader.model, PIECEWISE)):
        raise BadOption(
            "gradient × input of this head adds up to nothing: that is for linear layers with ReLU between them "
            "(linear, mean-linear, cls+mean, large, mlp, conv). --method replace is for every head."
        )
    toward = reader.toward(classes)
    gradient, margin = _gradient(reader, u, toward)
    biases = [p for name, p in reader.model.named_parameters() if name.rpartition(".")[2].endswith("bias")]
    terms = []
    for each, way in zip(u, toward, strict=True):
        found = torch.autograd.grad(reader.margins(each[None], way[None]).sum(), biases)
        terms.append(sum(float((b.detach().double() * g.double()).sum()) for b, g in zip(biases, found, strict=True)))
    beside = {"bias term": np.array(terms), "prior correction": (toward @ reader.correction).double().numpy()}
    parts = (u * gradient).sum(2).double().numpy()
    how = "gradient × input: with the bias term the parts add up to the margin"
    return Parts(parts, margin, beside, True, how, "gradient × input")


def _gradient(reader: Reader, u: torch.Tensor, toward: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """∂m/∂u [n, T, D] and m float64 [n]."""
    u = u.detach().requires_grad_(True)
    with torch.enable_grad():
        margin = reader.margins(u, toward)
        (gradient,) = torch.autograd.grad(margin.sum(), u)
    return gradient, margin.detach().double().numpy()


def _stretches(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def contribution_maps(
    run: Run, places: Places, x: torch.Tensor, classes: np.ndarray, method: str, mean: torch.Tensor | None,
    said: str = "", model: nn.Module | None = None,
) -> list[Map]:  # fmt: skip
    """One map an image of stored tokens x [n, T, D]. ``mean`` [T, D]: the mean training token, which ``said`` describes
    and ``gradient`` does without; ``model``: another head than the run's (its control)."""
    if method not in METHODS:
        raise BadOption(f'--method "{method}" is not one of {", ".join(METHODS)}.')
    reader = Reader.of(run, places, model)
    u = reader.scaled(x)
    if method == "gradient":
        parts = gradient_times_input(reader, u, classes)
    else:
        assert mean is not None
        parts = replaced(reader, u, reader.scaled(mean), classes)
    return [_map(run, places, parts, i, said) for i in range(len(u))]


def _map(run: Run, places: Places, parts: Parts, i: int, said: str) -> Map:
    first = len(places.prefix)
    names = {"cls": "class token", "dist": "distillation token"}
    beside: dict[str, float] = {}
    for at, name in enumerate(places.prefix):
        beside[names.get(name, f"register {name[3:]}" if name.startswith("reg") else name)] = float(parts.tokens[i, at])
    beside |= {name: float(values[i]) for name, values in parts.beside.items()}
    unit = "log-odds" if run.task != "multilabel" and len(run.classes) == 2 else "margin"
    return Map(
        "contribution", parts.how + (f"; against {said}" if said else ""), parts.tokens[i, first:].reshape(places.grid),
        unit, beside={name: part for name, part in beside.items() if abs(part) > 5e-7},
        margin=float(parts.margin[i]), adds_up=parts.adds_up, small=parts.small,
    )  # fmt: skip
