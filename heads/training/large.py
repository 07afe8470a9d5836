"""Losses and gradients of the head `large` written out, on a batch in memory that stays and that all heads of a loop use.

For one head without dropout, w the row of ones below every x_b that brings the bias b1 as a column of W1:

    h_b = relu(W1 x_b) [H, D];  z_b = W2 · h_b + b2 [C];  loss of z and its gradient dz [B, C]
    dW2 = sum_b dz_b h_b;  dh_b = (dz_b W2) where h_b > 0;  dW1 = sum_b dh_b x_bT

Nearly all of it is the two products with x. What autograd adds are passes over arrays of the size of h (25 MB for B=32,
D=768), of which every new one costs more than its numbers: memory that the system has to hand out first (4 ms for 19
MB, where a pass over them takes half of one). So there is one h for all heads, and one x, in which the row of ones
saves a pass for the bias and one for its gradient. The two passes for dh go through S images at a time, which the
cache holds.

B batch, S images at once, T tokens, D width, H hidden, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heads.models.tokens import Large
from heads.training.batches import StackedLoss

AT_ONCE = 8 << 20  # numbers of h, about


class LargeSteps:
    """Gradients of heads of one shape, in float32 or with products in bfloat16 (what autocast does to them)."""

    def __init__(self, model: Large, dtype: torch.dtype) -> None:
        _, hidden, width = model.second.shape
        self.shape, self.dtype = (model.ln1.in_features, width, hidden), dtype
        self.size = max(1, AT_ONCE // (4 * hidden * width))  # S
        self._allocate(0)

    def _allocate(self, count: int) -> None:
        tokens, width, hidden = self.shape
        self.x = torch.ones(count, tokens + 1, width, dtype=self.dtype)
        self.hidden = torch.empty(count, hidden, width, dtype=self.dtype)
        self.below = torch.empty(min(self.size, count), hidden, width, dtype=self.dtype)
        self.first = torch.empty(count, tokens + 1, hidden, dtype=self.dtype)

    def room(self, count: int, shape: Sequence[int] = ()) -> torch.Tensor:
        """[B, T, D]: where a batch is put."""
        if len(self.x) < count:
            self._allocate(count)
        return self.x[:count, :-1]

    def load(self, x: torch.Tensor) -> None:
        """The batch x [B, T, D] of the next steps; nothing is to be done where it lies in `room`."""
        if (room := self.room(len(x))).data_ptr() != x.data_ptr():
            room.copy_(x)

    @torch.inference_mode()
    def __call__(self, model: Large, loss: StackedLoss, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets ``grad`` of every parameter for the batch that is loaded; the loss [] and the logits [B, C]."""
        w1, b1, w2, b2 = model.ln1.weight, model.ln1.bias, model.second, model.second_bias
        x, h, first = self.x[: len(y)], self.hidden[: len(y)], self.first[: len(y)]
        weight, flat = torch.cat([w1, b1[:, None]], 1).to(self.dtype), w2.flatten(1).to(self.dtype)  # [H, T+1], [C, H·D]
        parts = [slice(start, start + self.size) for start in range(0, len(y), self.size)]
        for part in parts:
            torch.relu_(torch.matmul(weight, x[part], out=h[part]))
        z = torch.mm(flat, h.flatten(1).T).T + b2
        losses, dz = loss(z[None], y)
        low = dz[0].to(self.dtype)
        for part in parts:
            below = self.below[: len(h[part])]
            torch.mm(low[part], flat, out=below.flatten(1))
            torch.ops.aten.threshold_backward.grad_input(below, h[part], 0, grad_input=below)
            torch.bmm(x[part], below.transpose(1, 2), out=first[part])
        gradient = first.sum(0, dtype=torch.float32).T  # [H, T+1]
        w1.grad, b1.grad = gradient[:, :-1].contiguous(), gradient[:, -1].contiguous()
        w2.grad, b2.grad = torch.mm(low.T, h.flatten(1)).float().view_as(w2), dz[0].sum(0)
        return losses[0], z
