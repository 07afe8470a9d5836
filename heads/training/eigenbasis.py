"""Adam in the eigenbasis of the features, for heads that are one linear layer on a vector (``--optimizer adam-eigen``).

Adam gives every coordinate a step of its own. Along the channels of a backbone's features, which say nearly the same
things, that is of little use; along the eigenvectors of their second moments it undoes how far their variances lie
apart (4e8 on an untrained ViT), and 50 epochs come closer to the layer's one minimum than 400 along the channels.
SOAP (Vyas et al. 2024, arXiv:2409.11321) turns gradients into the eigenbasis of Shampoo's preconditioner. Features are
frozen, so theirs is the same in every step, and they are turned instead, once. What is trained is turned back.

n rows, D width, R directions in which train varies.
"""

from __future__ import annotations

import torch
from torch import nn

from heads.task import SplitData

MOST_ROWS = 32_768  # evenly spaced: many times the width of any vector
LEAST = 1e-12  # of the largest eigenvalue: below is the rounding of float32, which Adam would make large


def eigenbasis(data: SplitData) -> torch.Tensor:
    """float32 [D, R], orthonormal columns: the eigenvectors of the scaled features' second moments, XᵀX."""
    count = min(len(data), MOST_ROWS)
    rows = torch.arange(count) * len(data) // count
    moments = torch.zeros((), dtype=torch.float64)
    for part in rows.split(1024):
        x = data.scale(data.take(part)).double()
        moments = moments + x.T @ x
    if not moments.isfinite().all():
        return torch.eye(len(moments))  # training says what is not finite
    values, vectors = torch.linalg.eigh(moments)
    return vectors[:, values > LEAST * values[-1]].float()


def turn_weight(model: nn.Module, matrix: torch.Tensor) -> None:
    """The weight of ``model.ln`` [C, D] becomes weight @ matrix: with the basis, that of the same layer on turned
    features [C, R]; with its transpose, back."""
    layer = model.ln
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach() @ matrix)
