"""Which places of an image speak for what a head said, from its tokens alone.

Notation: T tokens of which P stand before the h·w patches, D width; u [T, D] tokens as the head receives them (after
standardising), z [C] logits. What is explained is the margin of class c, m = (z_c − mean of the other z) / temperature:
with two classes the log-odds; of multi-label z_c / temperature.

The map is a_t = Σ_d u_td · ∂m/∂u_td (gradient × input: Shrikumar et al. 2016, arXiv:1605.01713). Where m is affine in
u — the gradient is the same everywhere, which is checked for every image — the a_t add up, with a constant, to m: the
map is exact. Elsewhere it is a local linear reading and adds up to nothing in particular. Nothing is smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heads.runs import Run

if TYPE_CHECKING:
    from featurecache.reader import View

SAME = 1e-4  # relative difference of gradients up to which a margin counts as affine


@dataclass(frozen=True)
class Maps:
    """Of n images. ``exact``: the tokens' parts and ``constant`` add up to the margin."""

    patches: np.ndarray  # float64 [n, h, w]
    prefix: np.ndarray  # float64 [n]: what the tokens before the patches add together
    constant: np.ndarray  # float64 [n]
    exact: bool

    @property
    def words(self) -> str:
        if self.exact:
            return "exact additive map: what every patch adds to the log-odds of what the head called"
        return "gradient × input at every patch: a local linear reading of the head, not parts of a sum"


def token_maps(run: Run, view: View, rows: np.ndarray, classes: np.ndarray) -> Maps | str:
    """Maps of the margins of ``classes`` [n] at ``rows`` [n] of the view, or a sentence why there can be none."""
    found = _tokens(run, view)
    if isinstance(found, str):
        return found
    source, prefix, grid, averaged = found
    u = run.standardize(view.tensor(source, rows).float()).detach().requires_grad_(True)
    if u.shape[1] != prefix + grid[0] * grid[1]:
        return f"no maps: which of the rows of {source} are patches is not known"
    gradient, margin = _gradient(run, u, prefix, averaged, classes)
    parts = (gradient * u.detach()).sum(dim=2).double().numpy()  # [n, T]
    affine = all(_same(gradient, _gradient(run, other, prefix, averaged, classes)[0]) for other in _elsewhere(u))
    constant = margin - parts.sum(axis=1)
    patches = parts[:, prefix:].reshape(len(rows), *grid)
    return Maps(patches, parts[:, :prefix].sum(axis=1), constant, affine)


def _tokens(run: Run, view: View) -> tuple[str, int, tuple[int, int], bool] | str:
    """(tokens that the head's input is made of, P, grid, whether the head sees their mean), or why there are none."""
    from featurecache.outputs import parse

    output = parse(run.output)
    averaged = output.base == "mean" or output.base.startswith("mean@")
    if not output.base.startswith("tokens") and not averaged:
        return f"no maps: {run.head} sees one vector ({run.output}), which has no places"
    if averaged and run.config["standardize"] == "l2":
        return "no maps: the mean of the patches is scaled to length 1, so it is no sum of places"
    source = output.source if averaged else run.output
    if not view.has(source):
        return f"no maps: {view.label} holds no {source}"
    info = view.info(source)
    if info.grid is None:
        return f"no maps: the rows of {source} are mixtures of places, or nobody knows which place they are"
    return source, len(info.prefix or ()), (info.grid[0], info.grid[1]), averaged


def _gradient(
    run: Run, u: torch.Tensor, prefix: int, averaged: bool, classes: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """∂m/∂u [n, T, D] and m float64 [n]."""
    with torch.enable_grad():
        z = run.model(u[:, prefix:].mean(dim=1) if averaged else u)  # [n, C]
        correction = torch.tensor(run.calibration.correction, dtype=torch.float32)
        z = (z + correction) / run.calibration.temperature
        chosen = z.gather(1, torch.from_numpy(classes)[:, None])[:, 0]
        others = 0.0 if run.task == "multilabel" else (z.sum(dim=1) - chosen) / (z.shape[1] - 1)
        margin = chosen - others
        (gradient,) = torch.autograd.grad(margin.sum(), u)
    return gradient, margin.detach().double().numpy()


def _elsewhere(u: torch.Tensor) -> list[torch.Tensor]:
    """Two other places: the origin, and the same tokens turned over and moved on by one."""
    return [x.detach().clone().requires_grad_(True) for x in (torch.zeros_like(u), -2 * u.roll(1, dims=1))]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * one.abs().max())


def overlay(map_: np.ndarray) -> bytes:
    """A PNG of [h, w] pixels: orange for, blue against; opacity by size, the largest of this image the strongest."""
    import io

    from PIL import Image

    largest = np.abs(map_).max()
    share = np.abs(map_) / largest if largest > 0 else np.zeros_like(map_)
    colour = np.where((map_ > 0)[..., None], (230, 97, 0), (0, 114, 230))
    pixels: Any = np.concatenate([colour, (185 * share)[..., None]], axis=2).round().astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(encoded, "PNG", optimize=True)
    return encoded.getvalue()
