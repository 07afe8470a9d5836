"""Gradients of the head `large` written out, on a batch in memory that stays and that all heads of a loop use.

For one head without dropout; below every x_b lies a row of ones, which brings the bias b1 as a column of W1:

    h_b = relu(W1 x_b) [H, D];  z_b = W2 · h_b + b2 [C];  loss of z and its gradient dz [B, C]
    dW2 = sum_b dz_b h_b;  dh_b = (dz_b W2) where h_b > 0;  dW1 = sum_b dh_b x_bT

Of two classes that exclude each other dz_b is -d and d, so dW1 = sum_b d_b ((W2_1 - W2_0) where h_b > 0) x_bT.

Nearly all of it is the two products with x, of which x_b dh_bT is faster than dh_b x_bT and one for each image than one
over all of them, or over several heads (5.6 and 6.3 ms a batch; 6.7, 7.1 and 6.5 ms the other ways). What autograd adds
are passes over arrays of the size of h (25 MB for B=32, D=768) in memory that is new every time, which costs more than
the numbers in it. Here there is one h and one x for all heads, the row of ones saves a pass for the bias and one for
its gradient, and dh goes through S images at a time, which the cache holds.

B batch, S images at once, T tokens, D width, H hidden, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heads.models.tokens import Large
from heads.training.batches import StackedLoss

AT_ONCE = 4 * 256 * 768  # numbers of h: four images for D=768


class LargeSteps:
    """Steps of heads of one shape, in float32 or with products in bfloat16 (as autocast has them)."""

    def __init__(self, model: Large, precision: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        _, hidden, width = model.second.shape
        self.tokens, self.size, self.dtype = model.ln1.in_features, max(1, AT_ONCE // (hidden * width)), dtype
        self.x, self.h = torch.empty(0), torch.empty(0, hidden, width)  # [B, T + 1, D], [B, H, D]
        self.below = self.first = torch.empty(0)  # [S, H, D], [B, T + 1, H]

    def room(self, count: int, shape: Sequence[int] = ()) -> torch.Tensor:
        """[B, T, D]: where a batch is put."""
        if len(self.x) < count:
            _, hidden, width = self.h.shape
            self.x = torch.ones(count, self.tokens + 1, width, dtype=self.dtype)
            self.h = torch.empty(count, hidden, width, dtype=self.dtype)
            self.below = torch.empty(min(self.size, count), hidden, width, dtype=self.dtype)
            self.first = torch.empty(count, self.tokens + 1, hidden, dtype=self.dtype)
        return self.x[:count, :-1]

    def load(self, x: torch.Tensor) -> None:
        """The batch x [B, T, D] of the next steps; nothing is to be done where it lies in `room`."""
        if (room := self.room(len(x))).data_ptr() != x.data_ptr():
            room.copy_(x)

    @torch.inference_mode()
    def __call__(self, model: Large, loss: StackedLoss, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets ``grad`` of every parameter for the batch that was loaded; the loss [] and the logits [B, C]."""
        w1, b1, w2, b2 = model.ln1.weight, model.ln1.bias, model.second, model.second_bias
        x, h, first = self.x[: len(y)], self.h[: len(y)], self.first[: len(y)]
        weight = torch.cat([w1, b1[:, None]], 1).to(self.dtype)  # [H, T + 1]
        second = w2.flatten(1).to(self.dtype)  # [C, H·D]
        torch.relu_(torch.bmm(weight.expand(len(y), -1, -1), x, out=h))
        z = torch.mm(second, h.flatten(1).T) + b2[:, None]  # [C, B]
        losses, (dz,) = loss(z[None], y)
        dlow, pair = dz.to(self.dtype), len(w2) == 2 and not loss.binary
        difference = (second[1] - second[0]).view(w2.shape[1:])
        for part in (slice(start, start + self.size) for start in range(0, len(y), self.size)):
            below = self.below[: len(h[part])]
            above = difference.expand_as(below)
            if not pair:
                above = torch.mm(dlow[:, part].T, second, out=below.flatten(1)).view_as(below)
            torch.ops.aten.threshold_backward.grad_input(above, h[part], 0, grad_input=below)
            torch.bmm(x[part], below.transpose(1, 2), out=first[part])
        if pair:
            first.mul_(dlow[1, :, None, None])
        gradient = first.sum(0).T.float()  # [H, T + 1]
        w1.grad, b1.grad = gradient[:, :-1].contiguous(), gradient[:, -1].contiguous()
        w2.grad, b2.grad = torch.mm(dlow, h.flatten(1)).float().view_as(w2), dz.sum(1)
        return losses[0], z.T
