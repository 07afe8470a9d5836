"""Contribution of every token to a head's decision, from head and tokens alone: no pass through the backbone.

Every output made of tokens is a fixed matrix R on them (`featurecache.outputs`): the identity for ``tokens``, a row of
1/(h·w) over the patches for ``mean`` and a CNN's ``gap``, the weights of the resize for ``tokens-257`` and
``tokens-16x16``. A head sees scale(R x), so a change of token t reaches it by column t of R. Each row of R sums to 1,
so that scaling by channel (zscore) may be done before R: scale(R x) = R scale(x).

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

n images, T tokens of which P stand before the h·w patches, D width, C classes, H hidden; x [T, D] tokens as they are
stored, u [T, D] scaled as the head sees them, ū the mean training token, scaled too; m the margin of a class (`maps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption
from heads.explanations.maps import SaliencyMap, margin_unit
from heads.models.tokens import ClsMean, Conv, Large, MeanLinear
from heads.models.vector import Linear, Mlp
from heads.runs.run import Run
from heads.task import Standardize

if TYPE_CHECKING:
    from featurecache.store.view import View

METHODS = ("replace", "gradient")
AFFINE = (Linear, MeanLinear, ClsMean)
FAST = (*AFFINE, Large)  # of which all parts cost about as much as a forward pass or two
PIECEWISE = (*AFFINE, Large, Mlp, Conv)
ROWS, TOKENS = 64, 8  # of the hidden layer and of tokens at once: 1.5 MB for D=768 (256 and 197: five times slower)
COPIES = 64 << 20  # bytes of replaced copies in memory at once


@dataclass(frozen=True)
class MarginModel:
    """The margin as a function of tokens: ``model`` is the run's head, or its shuffled control."""

    model: nn.Module
    tokens: TokenMap
    scale: Standardize
    correction: torch.Tensor  # float32 [C]

    @property
    def early(self) -> bool:
        """Tokens may be scaled before R. A length (l2) of a mixture is not the mixture of lengths."""
        return self.tokens.matrix is None or self.scale.kind != "l2"

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., T, D] as stored -> u."""
        return self.scale(x) if self.early else x

    def input(self, u: torch.Tensor) -> torch.Tensor:
        """u [n, T, D] -> what the head is given."""
        made = self.tokens.input(u)
        return made if self.early else self.scale(made)

    def margins(self, u: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
        """u [n, T, D], toward [n, C] or [1, C] -> [n]."""
        return ((self.model(self.input(u)) + self.correction) * toward).sum(1)


@dataclass(frozen=True)
class TokenContributions:
    """Of n images. ``beside``: what belongs to no token, each [n]."""

    tokens: np.ndarray  # float64 [n, T]
    margin: np.ndarray  # float64 [n]
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    adds_up: bool = False
    how: str = ""
    small: str = ""


def replacement_contributions(
    head: MarginModel, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor
) -> TokenContributions:
    """a_t of u [n, T, D] against ``mean`` [T, D], both scaled; toward [n, C]: the margins in the logits."""
    if head.early and isinstance(head.model, AFFINE):
        gradient, margin = _gradient(head, u, toward)
        parts = ((u - mean) * gradient).sum(2).double().numpy()
        beside = {"mean tokens everywhere": head.margins(mean.expand_as(u), toward).detach().double().numpy()}
        return TokenContributions(parts, margin, beside, True, "exact additive parts of the margin", "additive parts")
    exact = head.early and isinstance(head.model, Large)
    with torch.no_grad():
        margin = head.margins(u, toward).double().numpy()
        rows = [(_rank_one if exact else _occluded)(head, *each, mean) for each in zip(u, toward, strict=True)]
    how = "change of the margin when this token is replaced"
    how = f"exact {how}" if exact else f"{how} (occlusion)"
    return TokenContributions(torch.stack(rows).numpy(), margin, how=how, small="replacement")


def _rank_one(head: MarginModel, u: torch.Tensor, toward: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """float64 [T] of one image u [T, D]."""
    model = head.model
    assert isinstance(model, Large)
    first = model.ln1.weight  # [H, T']
    before = torch.addmm(model.ln1.bias[:, None], first, head.tokens.input(u[None])[0])  # A [H, D]
    columns = first if head.tokens.matrix is None else first @ head.tokens.matrix  # W1 R [H, T]
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


def _occluded(head: MarginModel, u: torch.Tensor, toward: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """float64 [T] of one image u [T, D], by a forward pass for each token; of a head on one vector [D] all together."""
    matrix = head.tokens.matrix
    if head.early and matrix is not None and matrix.ndim == 1:
        vectors = head.input(u[None]) + matrix[:, None] * (mean - u)  # [T, D]
        logits = head.model(torch.cat([head.input(u[None]), vectors])) + head.correction
        margins = (logits.double() * toward.double()).sum(1)
        return margins[0] - margins[1:]
    whole, parts = head.margins(u[None], toward).double(), torch.zeros(len(u), dtype=torch.float64)
    for some in _stretches(len(u), max(1, COPIES // (4 * u.numel()))):
        copies = u.repeat(len(parts[some]), 1, 1)
        rows = torch.arange(len(copies))
        copies[rows, some.start + rows] = mean[some]
        parts[some] = whole - head.margins(copies, toward).double()
    return parts


def gradient_times_input(head: MarginModel, u: torch.Tensor, toward: torch.Tensor) -> TokenContributions:
    """u_t · ∂m/∂u_t of u [n, T, D]; with the parts of biases and prior correction they add up to the margin, of which
    toward [n, C] says what it is in the logits.

    Raises BadOption for a head in which they would add up to nothing (attention, knn, a user's own)."""
    if not (head.early and isinstance(head.model, PIECEWISE)):
        raise BadOption(
            "gradient × input of this head adds up to nothing: that is for linear layers with ReLU between them "
            "(linear, mean-linear, cls+mean, large, mlp, conv). --method replace is for every head."
        )
    gradient, margin = _gradient(head, u, toward)
    biases = [p for name, p in head.model.named_parameters() if name.rpartition(".")[2].endswith("bias")]
    terms = []
    for each, way in zip(u, toward, strict=True):
        slopes = torch.autograd.grad(head.margins(each[None], way[None]).sum(), biases)
        terms.append(sum(float((b.detach().double() * g.double()).sum()) for b, g in zip(biases, slopes, strict=True)))
    beside = {"bias term": np.array(terms), "prior correction": (toward @ head.correction).double().numpy()}
    parts = (u * gradient).sum(2).double().numpy()
    how = "gradient × input: with the bias term the parts add up to the margin"
    return TokenContributions(parts, margin, beside, True, how, "gradient × input")


def _gradient(head: MarginModel, u: torch.Tensor, toward: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """∂m/∂u [n, T, D] and m float64 [n]."""
    u = u.detach().requires_grad_(True)
    with torch.enable_grad():
        margin = head.margins(u, toward)
        (gradient,) = torch.autograd.grad(margin.sum(), u)
    return gradient, margin.detach().double().numpy()


def _stretches(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def contribution_maps(
    run: Run, tokens: TokenMap, x: torch.Tensor, toward: torch.Tensor, method: str, mean: torch.Tensor | None,
    description: str, model: nn.Module,
) -> list[SaliencyMap]:  # fmt: skip
    """One map an image of stored tokens x [n, T, D], of the margins toward [n, C]. ``mean`` [T, D]: the mean training
    token (``description`` says of what), which ``gradient`` does without; ``model``: the run's head, or its control."""
    if method not in METHODS:
        raise BadOption(f'--method "{method}" is not one of {", ".join(METHODS)}.')
    correction = torch.tensor(run.calibration.correction, dtype=torch.float32)
    head = MarginModel(model, tokens, run.standardize, correction)
    u = head.scaled(x)
    if method == "gradient":
        parts = gradient_times_input(head, u, toward)
    else:
        assert mean is not None
        parts = replacement_contributions(head, u, head.scaled(mean), toward)
    return [_map(run, tokens, parts, i, description) for i in range(len(u))]


def _map(run: Run, tokens: TokenMap, parts: TokenContributions, i: int, description: str) -> SaliencyMap:
    first = len(tokens.prefix)
    names = {"cls": "class token", "dist": "distillation token"}
    beside: dict[str, float] = {}
    for at, name in enumerate(tokens.prefix):
        beside[names.get(name, f"register {name[3:]}" if name.startswith("reg") else name)] = float(parts.tokens[i, at])
    beside |= {name: float(values[i]) for name, values in parts.beside.items()}
    return SaliencyMap(
        "contribution", parts.how + (f"; against {description}" if description else ""),
        parts.tokens[i, first:].reshape(tokens.grid), margin_unit(run),
        beside={name: part for name, part in beside.items() if abs(part) > 5e-7},
        margin=float(parts.margin[i]), adds_up=parts.adds_up, small=parts.small,
    )  # fmt: skip


TRAINING = 1024  # images whose mean is the mean training token, drawn evenly where train has more
GAP = 5e-3  # relative L2 between a CNN's gap and the mean of its map: rounding to float16 costs 5e-4, a norm far more


@dataclass(frozen=True)
class TokenMap:
    """``source``: the stored tokens; ``matrix``: R [T', T], or [T] where the head sees one vector; None: identity."""

    source: str
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    matrix: torch.Tensor | None

    @property
    def count(self) -> int:
        return len(self.prefix) + self.grid[0] * self.grid[1]

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, T, D] -> R x: [n, T', D] or [n, D]."""
        return x if self.matrix is None else self.matrix @ x


def token_source(run: Run) -> str:
    """The tokens that a head's input is made of; raises BadOption where it sees a vector without places."""
    from featurecache.outputs import members

    output, *more = members(run.output)
    base = output.base.partition("@")[0]
    if base == "gap" and not more:
        return "tokens"
    if (base == "mean" and not more) or base.startswith("tokens"):
        return output.source
    raise BadOption(
        f"{run.head} sees one vector ({run.output}), which has no places. --kind attention shows where the backbone "
        "looks, --kind grad-cam goes through backbone and head."
    )


def token_map(run: Run, prefix: Sequence[str] | None, grid: Sequence[int] | None) -> TokenMap:
    """``prefix`` and ``grid`` are those of the source's tokens; raises BadOption where nobody knows them."""
    from featurecache.outputs import function_of, parse

    source = token_source(run)
    if prefix is None or grid is None:
        raise BadOption(
            f"which rows of {source} are patches is not known, so there is no map. Import the file again with --prefix "
            "and --grid."
        )
    size, count = (int(grid[0]), int(grid[1])), len(prefix) + int(grid[0]) * int(grid[1])
    matrix, output = None, parse(run.output)
    if output.base == "gap":
        matrix = torch.full((count,), 1 / (size[0] * size[1]))
    elif output.is_derived:
        matrix = function_of(output, torch.eye(count)[None], len(prefix), size)[0]
    return TokenMap(source, tuple(prefix), size, matrix)


def check_gap(run: Run, tokens: TokenMap, x: torch.Tensor, gap: torch.Tensor) -> None:
    """Raises BadOption where a CNN's vector is not the mean of its map x [n, h·w, C]: ConvNeXt has a norm behind it."""
    if bool(((tokens.input(x) - gap.float()).norm(dim=1) > GAP * gap.float().norm(dim=1)).any()):
        raise BadOption(
            f"gap of {run.config['view']['label']} is not the mean of its map (a norm stands between them), so it is "
            "no sum of places. --kind grad-cam goes through the network's own pooling."
        )


def mean_training_token(run: Run, tokens: TokenMap, view: View | None) -> tuple[torch.Tensor, str]:
    """(float32 [T, D] in storage units, what it is in words): for patches the mean patch of train, for each token
    before them its own mean. Raises BadOption where the view is gone and the run does not keep it."""
    if view is None:
        scale = run.standardize
        if scale.mean is None:
            raise BadOption(
                f"the view that {run.path} was trained on is gone or another, and with it the mean training token. "
                "--method gradient needs none."
            )
        return scale.mean.expand(tokens.count, -1).clone(), "the mean of all training tokens, kept with the head"
    view.info(tokens.source)  # raises with the command that stores it
    trained = set(run.ids[run.splits == "train"])
    rows = np.array([i for i, name in enumerate(view.ids) if name in trained])
    some = rows if len(rows) <= TRAINING else rows[np.linspace(0, len(rows) - 1, TRAINING).round().astype(int)]
    total = torch.zeros(tokens.count, view.info(tokens.source).shape[-1], dtype=torch.float64)
    for part in np.array_split(some, -(-len(some) // 64)):
        total += view.tensor(tokens.source, part).double().sum(0)
    mean, first = total / len(some), len(tokens.prefix)
    mean[first:] = mean[first:].mean(0)
    of = f"{len(some):,} of {len(rows):,}" if len(some) < len(rows) else f"all {len(rows):,}"
    return mean.float(), f"the mean token of {of} training images"
