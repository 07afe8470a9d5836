"""The steps of the ``large`` head, with the gradient written out.

Notation: B batch, S images at once, T tokens, D width, H = 256 hidden, C classes.

    h_b = relu(W1 x_b + b1) [H, D];  z_b = W2 · h_b + b2 [C];  loss of z and its gradient dz [B, C]
    dW2 = sum_b dz_b h_b;  dh_b = (dz_b W2) where h_b > 0;  dW1 = sum_b dh_b x_bT;  db1 = sum_b,d dh_b

Nearly all of it is the two products with x. What autograd adds are passes over arrays of the size of h for the whole
batch (25 MB for B=32, D=768), in memory that is new every time. Here some images at a time go through all of it in
memory that is kept: 60 against 85 ms a step, of which the products are 40. (Tried: two images at a time, 68 ms; a
Python thread for each half of the images, 75 ms; numpy's products, as fast, but with threads that wait for torch's.)
"""

from __future__ import annotations

import torch

from heads.losses import Loss, StackedLoss
from heads.token_heads import Large

AT_ONCE = 8 << 20  # bytes of h: ten images for D=768


class LargeSteps:
    """Gradients of one `Large` head without dropout."""

    def __init__(self, model: Large, loss: Loss) -> None:
        self.model, self.loss = model, StackedLoss([loss], torch.float32)
        _, hidden, width = model.second.shape
        self.size = max(1, AT_ONCE // (4 * hidden * width))  # S
        self.hidden = torch.empty(0)  # [B, H, D]
        self.below = torch.empty(self.size, hidden, width)
        self.first = torch.empty(self.size, hidden, model.fc1.in_features)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sets ``grad`` of every parameter for a batch x float32 [B, T, D]; the loss, a scalar tensor."""
        with torch.inference_mode():
            return self._gradients(x, y)

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2 = self.model.fc1.weight, self.model.fc1.bias, self.model.second, self.model.second_bias
        flat = w2.flatten(1)  # [C, H·D]
        if len(self.hidden) < len(x):
            self.hidden = torch.empty(len(x), *w2.shape[1:])
        h, z = self.hidden[: len(x)], torch.empty(len(x), len(w2))
        for part in range(0, len(x), self.size):
            some = slice(part, part + self.size)
            torch.matmul(w1, x[some], out=h[some])
            torch.relu_(h[some].add_(b1[:, None]))
            torch.addmm(b2, h[some].flatten(1), flat.T, out=z[some])
        losses, dz = self.loss(z[None], y)
        w1.grad, b1.grad = torch.zeros_like(w1), torch.zeros_like(b1)
        for part in range(0, len(x), self.size):
            some = slice(part, part + self.size)
            below = self.below[: len(h[some])]
            torch.mm(dz[0, some], flat, out=below.view(len(below), -1))
            torch.ops.aten.threshold_backward.grad_input(below, h[some], 0, grad_input=below)
            b1.grad += below.sum((0, 2))
            w1.grad += torch.bmm(below, x[some].transpose(1, 2), out=self.first[: len(below)]).sum(0)
        w2.grad, b2.grad = (dz[0].T @ h.flatten(1)).view_as(w2), dz[0].sum(0)
        return losses[0]
