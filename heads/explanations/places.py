"""Which tokens the input of a head is made of, and how.

Notation: n images, T tokens of which P stand before the h·w patches, D width; x [T, D] tokens as they are stored.

Every output made of tokens is a fixed matrix R on them (`featurecache.outputs`): R is the identity for ``tokens``, a
row of 1/(h·w) over the patches for ``mean`` and a CNN's ``gap``, the weights of the resize for ``tokens-257`` and
``tokens-16x16``. A head sees scale(R x). So a change of token t reaches the input by column t of R, and what is said of
the rows of the input comes back to the tokens by the transposed R. Each row of R sums to 1, so that scaling by channel
(zscore) may be done before R: scale(R x) = R scale(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from featurecache.errors import BadOption, FeatureCacheError
from heads import checks
from heads.runs import Run
from heads.splits import read_splits

if TYPE_CHECKING:
    from featurecache.reader import View

TRAINING = 1024  # images whose mean is the mean training token, drawn evenly where train has more
GAP = 5e-3  # relative L2 between a CNN's gap and the mean of its map: rounding to float16 costs 5e-4, a norm far more


@dataclass(frozen=True)
class Places:
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


def places_of(run: Run, prefix: Sequence[str] | None, grid: Sequence[int] | None) -> Places:
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
    return Places(source, tuple(prefix), size, matrix)


def check_gap(run: Run, places: Places, x: torch.Tensor, gap: torch.Tensor) -> None:
    """Raises BadOption where a CNN's vector is not the mean of its map x [n, h·w, C]: ConvNeXt has a norm behind it."""
    made = places.input(x)
    if bool(((made - gap.float()).norm(dim=1) > GAP * gap.float().norm(dim=1)).any()):
        raise BadOption(
            f"gap of {run.config['view']['label']} is not the mean of its map (a norm stands between them), so it is "
            "no sum of places. --kind grad-cam goes through the network's own pooling."
        )


def mean_training_token(run: Run, places: Places, view: View | None) -> tuple[torch.Tensor, str]:
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
    known = set(checks.read_ids(file))
    rows = np.array([i for i, name in enumerate(view.ids) if name in known], dtype=np.int64)
    if not len(rows):
        return rows
    try:
        names = read_splits(file, [view.ids[i] for i in rows], [])
    except FeatureCacheError as error:
        raise BadOption(f"which images {run.path} was trained on cannot be read: {error}") from error
    return rows[np.asarray(names) == "train"]
