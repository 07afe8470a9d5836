"""Contribution of each token to the decision; where each token lies.

What a head makes of every token, from head and tokens alone: no pass through the backbone.

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

Which tokens the input of a head is made of, and how.

Notation: n images, T tokens of which P stand before the h·w patches, D width; x [T, D] tokens as they are stored.

Every output made of tokens is a fixed matrix R on them (`featurecache.outputs`): R is the identity for ``tokens``, a
row of 1/(h·w) over the patches for ``mean`` and a CNN's ``gap``, the weights of the resize for ``tokens-257`` and
``tokens-16x16``. A head sees scale(R x). So a change of token t reaches the input by column t of R, and what is said of
the rows of the input comes back to the tokens by the transposed R. Each row of R sums to 1, so that scaling by channel
(zscore) may be done before R: scale(R x) = R scale(x).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption, FeatureCacheError
from heads.explanations.maps import Map, class_margin_weights
from heads.models.tokens import ClsMean, Conv, Large, MeanLinear
from heads.models.vector import Linear, Mlp
from heads.runs.run import Run, read_ids
from heads.splits import read_splits
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
    places: TokenMap
    scale: Standardize
    correction: torch.Tensor  # float32 [C]
    temperature: float
    multilabel: bool

    @classmethod
    def of(cls, run: Run, places: TokenMap, model: nn.Module | None = None) -> MarginModel:
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
        return class_margin_weights(classes, len(self.correction), self.temperature, self.multilabel)

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


def replaced(reader: MarginModel, u: torch.Tensor, mean: torch.Tensor, classes: np.ndarray) -> TokenContributions:
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
    return TokenContributions(torch.stack(rows).numpy(), margin, how=how, small="replacement")


def _additive(reader: MarginModel, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> TokenContributions:
    gradient, margin = _gradient(reader, u, toward)
    parts = ((u - mean) * gradient).sum(2).double().numpy()
    with torch.no_grad():
        rest = reader.margins(mean.expand_as(u), toward).double().numpy()
    beside = {"mean tokens everywhere": rest}
    return TokenContributions(parts, margin, beside, True, "exact additive parts of the margin", "additive parts")


def _rank_one(reader: MarginModel, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
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


def _occluded(reader: MarginModel, u: torch.Tensor, mean: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
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


def gradient_times_input(reader: MarginModel, u: torch.Tensor, classes: np.ndarray) -> TokenContributions:
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
    return TokenContributions(parts, margin, beside, True, how, "gradient × input")


def _gradient(reader: MarginModel, u: torch.Tensor, toward: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """∂m/∂u [n, T, D] and m float64 [n]."""
    u = u.detach().requires_grad_(True)
    with torch.enable_grad():
        margin = reader.margins(u, toward)
        (gradient,) = torch.autograd.grad(margin.sum(), u)
    return gradient, margin.detach().double().numpy()


def _stretches(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def contribution_maps(
    run: Run, places: TokenMap, x: torch.Tensor, classes: np.ndarray, method: str, mean: torch.Tensor | None,
    said: str = "", model: nn.Module | None = None,
) -> list[Map]:  # fmt: skip
    """One map an image of stored tokens x [n, T, D]. ``mean`` [T, D]: the mean training token, which ``said`` describes
    and ``gradient`` does without; ``model``: another head than the run's (its control)."""
    if method not in METHODS:
        raise BadOption(f'--method "{method}" is not one of {", ".join(METHODS)}.')
    reader = MarginModel.of(run, places, model)
    u = reader.scaled(x)
    if method == "gradient":
        parts = gradient_times_input(reader, u, classes)
    else:
        assert mean is not None
        parts = replaced(reader, u, reader.scaled(mean), classes)
    return [_map(run, places, parts, i, said) for i in range(len(u))]


def _map(run: Run, places: TokenMap, parts: TokenContributions, i: int, said: str) -> Map:
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
    def tokens(self) -> int:
        return len(self.prefix) + self.grid[0] * self.grid[1]

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, T, D] -> R x: [n, T', D] or [n, D]."""
        return x if self.matrix is None else self.matrix @ x

    def columns(self) -> torch.Tensor:
        """R as [T', T]; of a vector [1, T]."""
        if self.matrix is None:
            return torch.eye(self.tokens)
        return self.matrix if self.matrix.ndim == 2 else self.matrix[None]


def source_of(run: Run) -> str:
    """The tokens that a head's input is made of; raises BadOption where it sees a vector without places."""
    from featurecache.outputs import parse

    output = parse(run.output)
    base = output.base.partition("@")[0]
    if base == "gap":
        return "tokens"
    if base == "mean" or base.startswith("tokens"):
        return output.source
    raise BadOption(
        f"{run.head} sees one vector ({run.output}), which has no places. --kind attention shows where the backbone "
        "looks, --kind grad-cam goes through backbone and head."
    )


def token_map(run: Run, prefix: Sequence[str] | None, grid: Sequence[int] | None) -> TokenMap:
    """``prefix`` and ``grid`` are those of the source's tokens; raises BadOption where nobody knows them."""
    from featurecache.outputs import function_of, parse

    output, source = parse(run.output), source_of(run)
    if prefix is None or grid is None:
        raise BadOption(
            f"which rows of {source} are patches is not known, so there is no map. Import the file again with --prefix "
            "and --grid."
        )
    size, count = (int(grid[0]), int(grid[1])), len(prefix) + int(grid[0]) * int(grid[1])
    matrix = None
    if output.base == "gap":
        matrix = torch.full((count,), 1 / (size[0] * size[1]))
    elif output.derived:
        matrix = function_of(output, torch.eye(count)[None], len(prefix), size)[0]
    return TokenMap(source, tuple(prefix), size, matrix)


def check_gap(run: Run, places: TokenMap, x: torch.Tensor, gap: torch.Tensor) -> None:
    """Raises BadOption where a CNN's vector is not the mean of its map x [n, h·w, C]: ConvNeXt has a norm behind it."""
    made = places.input(x)
    if bool(((made - gap.float()).norm(dim=1) > GAP * gap.float().norm(dim=1)).any()):
        raise BadOption(
            f"gap of {run.config['view']['label']} is not the mean of its map (a norm stands between them), so it is "
            "no sum of places. --kind grad-cam goes through the network's own pooling."
        )


def mean_training_token(run: Run, places: TokenMap, view: View | None) -> tuple[torch.Tensor, str]:
    """(float32 [T, D] in storage units, what it is in words): for patches the mean patch of train, for each token
    before them its own mean. Raises BadOption where the view is gone and the run does not keep it."""
    if view is None:
        scale = run.standardize
        if scale.mean is None:
            raise BadOption(
                f"the view that {run.path} was trained on is gone or another, and with it the mean training token. "
                "--method gradient needs none."
            )
        return scale.mean.expand(places.tokens, -1).clone(), "the mean of all training tokens, kept with the head"
    view.info(places.source)  # raises with the command that stores it
    rows = _train_rows(run, view)
    if not len(rows):
        raise BadOption(f"{view.label} holds none of the images that {run.path} was trained on.")
    some = rows if len(rows) <= TRAINING else rows[np.linspace(0, len(rows) - 1, TRAINING).round().astype(int)]
    total = torch.zeros(places.tokens, view.info(places.source).shape[-1], dtype=torch.float64)
    for part in np.array_split(some, -(-len(some) // 64)):
        total += view.tensor(places.source, part).double().sum(0)
    mean, first = total / len(some), len(places.prefix)
    mean[first:] = mean[first:].mean(0)
    of = f"{len(some):,} of {len(rows):,}" if len(some) < len(rows) else f"all {len(rows):,}"
    return mean.float(), f"the mean token of {of} training images"


def _train_rows(run: Run, view: View) -> np.ndarray:
    """Rows of the view that the run was trained on."""
    file = run.path / "splits.csv"
    known = set(read_ids(file))
    rows = np.array([i for i, name in enumerate(view.ids) if name in known], dtype=np.int64)
    if not len(rows):
        return rows
    try:
        names = read_splits(file, [view.ids[i] for i in rows], [])
    except FeatureCacheError as error:
        raise BadOption(f"which images {run.path} was trained on cannot be read: {error}") from error
    return rows[np.asarray(names) == "train"]
